"""One film from one file, whatever radiographs are saved as → uint8 (H, W), bright = dense; and the packed file of many. Part of data.py.

What a file is, its first bytes say, never its name. A file that is not a readable film raises BadFilm with the reason.
"""

import io
import json
import os
import struct
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from runtime import Stop, write_text

FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "TIFF",
    "GIF",
    "BMP",
    "JPEG2000",
)  # named, so that Pillow never starts a PostScript interpreter
IMAGE_STARTS = (
    b"\x89PNG",
    b"\xff\xd8\xff",
    b"GIF8",
    b"II*\0",
    b"MM\0*",
    b"BM",
    b"\0\0\0\x0cjP  ",
    b"\xff\x4f\xff\x51",
)
DICOM_STARTS = (
    b"\x02\0\0\0",
    b"\x02\0\x10\0",
    b"\x08\0\0\0",
    b"\x08\0\x05\0",
    b"\x08\0\x08\0",
    b"\x08\0\x16\0",
)  # tags, without header
OPENJPEG = (
    "1.2.840.10008.1.2.4.90",
    "1.2.840.10008.1.2.4.91",
)  # JPEG 2000; every other compressed syntax: libjpeg
SUFFIXES = {
    ".png",
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".webp",
    ".tif",
    ".tiff",
    ".gif",
    ".bmp",
    ".jp2",
    ".dcm",
    ".dicom",
    ".dic",
}


class BadFilm(Exception):
    """A file that cannot be read as a film; the message is the reason."""


def sniff(head):
    """'dicom', 'image' or '' from the first 132 or more bytes of a file."""
    if head[128:132] == b"DICM" or head.startswith(DICOM_STARTS):
        return "dicom"
    return (
        "image"
        if head.startswith(IMAGE_STARTS) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        else ""
    )


def looks_like_film(path):
    """By suffix; a file without one, or with a number for one as DICOM UIDs have, by its first bytes."""
    name = os.path.basename(path)
    suffix = os.path.splitext(name)[1].lower()
    if suffix[1:] and not suffix[1:].isdigit():
        return suffix in SUFFIXES
    try:
        with open(path, "rb") as file:
            return name != "DICOMDIR" and bool(sniff(file.read(132)))
    except OSError:
        return False


def read_film(path, side=0):
    """Any image or DICOM file → uint8 (H, W). Raises BadFilm, also for constant and black-and-white pictures (masks, posterised films).

    side: the short side that is wanted, px: a JPEG may then be decoded at 1/2, 1/4 or 1/8, never below `side`. 0 = full size.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(256)
        kind = sniff(head)
        if not kind:
            raise BadFilm(
                f"neither an image nor DICOM (begins with {head[:12]!r})" if head else "empty file"
            )
        film = (
            read_dicom(path, head[128:132] == b"DICM")
            if kind == "dicom"
            else read_image(path, side)
        )
    except BadFilm:
        raise
    except UnidentifiedImageError:
        raise BadFilm("damaged image header") from None
    except Exception as error:  # a decoder may raise anything on a broken file
        raise BadFilm(
            (
                getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
            ).splitlines()[0]
        ) from None
    return refuse_flat(film)


def refuse_flat(film):
    """The film itself, unless it is tiny, constant, or nine tenths of it are pure black or white: no anatomy is left in it.

    Of 2,050 real films the worst, a small body in a black border, has half of its pixels there; a posterised one 98 %.
    """
    if min(film.shape) < 16:
        raise BadFilm(f"only {film.shape[1]} × {film.shape[0]} px")
    if film.min() == film.max():
        raise BadFilm("constant image")
    step = max(1, min(film.shape) // 512)
    part = film[::step, ::step]
    if np.mean((part < 3) | (part > 252)) > 0.9:
        raise BadFilm("black-and-white picture (a mask, or a film posterised beyond use)")
    return film


def fit(film, side):
    """Resize so that the short side is `side` px, aspect kept, antialiased bicubic. uint8 (H, W) → uint8."""
    height, width = film.shape
    scale = side / min(height, width)
    size = max(side, round(width * scale)), max(side, round(height * scale))
    return (
        film
        if size == (width, height)
        else np.asarray(Image.fromarray(film).resize(size, Image.Resampling.BICUBIC))
    )


def read_image(path, side):
    """PNG, JPEG, WEBP, TIFF, GIF, BMP or JPEG 2000 → uint8 (H, W), first frame.

    Colour → luma; palettes are looked up; alpha is dropped (grey under a transparent border is still the film, and compositing would draw
    edges); EXIF rotation is applied; more than 8 bit → percentiles as for DICOM, since 12-bit films are often saved in 16 bits unscaled.
    """
    with Image.open(path, formats=FORMATS) as image:
        image.draft(
            "L", (side, side) if side else None
        )  # JPEG only: decodes luma alone, and at reduced scale
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode[0] in "IF":  # 16 and 32 bit, float
            film = stretch(np.asarray(image))
            white_is_zero = (
                getattr(image, "tag_v2", {}).get(262) == 0
            )  # Pillow inverts these itself, but only at 8 bit
            return 255 - film if white_is_zero else film
        image.info.pop("transparency", None)
        return np.asarray(image.convert("L"))


def stretch(values, used=None):
    """Deep grey values → uint8: the range between percentiles 0.5 and 99.5 (of the pixels in `used`) becomes 0–255."""
    low, high = np.percentile(values if used is None else values[used], (0.5, 99.5))
    if not high > low:
        raise BadFilm("constant image")
    return ((np.clip(values, low, high) - low) * (255 / (high - low)) + 0.5).astype(np.uint8)


def read_dicom(path, has_header):
    """DICOM → uint8 (H, W): first frame, modality LUT, window on the stored polarity, percentiles, MONOCHROME1 inverted last.

    The window describes stored values: inverting before it would be wrong. Padding pixels count for nothing and end black.
    """
    try:
        import pydicom
        from pydicom.pixels import apply_modality_lut, apply_voi_lut, pixel_array
    except ImportError:
        raise BadFilm('DICOM needs a reader: pip install "pydicom>=3"') from None
    data = pydicom.dcmread(path, force=not has_header)
    if "PixelData" not in data:
        raise BadFilm("DICOM without pixel data")
    syntax = transfer_syntax(data)
    try:
        values = pixel_array(data, index=0)
    except RuntimeError as error:
        if "missing dependencies" not in str(error):
            raise
        decoder = "openjpeg" if syntax in OPENJPEG else "libjpeg"
        raise BadFilm(
            f"{syntax.name}: no decoder installed: pip install pylibjpeg pylibjpeg-{decoder}"
        ) from None
    if values.ndim == 3:
        return np.asarray(
            Image.fromarray(stretch(values) if values.dtype != np.uint8 else values).convert("L")
        )
    used = not_padding(data, values)
    film = stretch(apply_voi_lut(apply_modality_lut(values, data), data, index=0), used)
    if data.PhotometricInterpretation == "MONOCHROME1":
        film = 255 - film
    return film if used is None else np.where(used, film, 0).astype(np.uint8)


def transfer_syntax(data):
    """The transfer syntax UID; headless files get the uncompressed one that pydicom's parser found them to be in."""
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    if "TransferSyntaxUID" not in data.file_meta:
        implicit, little = data.original_encoding
        data.file_meta.TransferSyntaxUID = (
            ImplicitVRLittleEndian
            if implicit
            else ExplicitVRLittleEndian
            if little
            else ExplicitVRBigEndian
        )
    return data.file_meta.TransferSyntaxUID


def not_padding(data, values):
    """bool (H, W): pixels outside PixelPaddingValue … PixelPaddingRangeLimit; None when nothing is padded, or everything is."""
    if "PixelPaddingValue" not in data:
        return None
    ends = sorted(
        (
            int(data.PixelPaddingValue),
            int(data.get("PixelPaddingRangeLimit", data.PixelPaddingValue)),
        )
    )
    used = (values < ends[0]) | (values > ends[1])
    return used if used.any() and not used.all() else None


# ------------------------------------------------------------------------------------------------ the packed file
# MAGIC, the films' bytes one after the other, the index (three .npy), then a footer: where the index starts, its size, its checksum, MAGIC.
MAGIC = b"CXRPACK1"
FOOTER = struct.Struct("<QQI8s")


class Pack:
    """pack[i] → uint8 (H, W), a read-only view of the mapped file. Raises Stop when the file is cut short or something else."""

    def __init__(self, path):
        self.path, self.bytes = str(path), None
        try:
            with open(path, "rb") as file:
                file.seek(-FOOTER.size, os.SEEK_END)
                start, size, check, magic = FOOTER.unpack(file.read())
                file.seek(start if magic == MAGIC else 0)
                blob = file.read(size if magic == MAGIC else 0)
        except OSError as error:
            raise Stop(f"{path}: not a packed file ({error})") from None
        if magic != MAGIC or zlib.crc32(blob) != check:
            raise Stop(
                f"{path}: not a packed file, or one cut short: make it again with python data.py pack"
            )
        stream = io.BytesIO(blob)
        self.shapes, self.sums, text = (
            np.load(stream, allow_pickle=False) for _ in range(3)
        )  # (n, 2); (n,) CRC-32; JSON
        self.starts, text = place(self.shapes), json.loads(text.tobytes())
        self.names, self.patients, self.side, self.bad, self.folder = (
            text[k] for k in ("names", "patients", "side", "bad", "folder")
        )
        self.told = f"{path}: {len(self.names):,} packed films, short side at most {self.side or 'as it was'}"

    def __len__(self):
        return len(self.names)

    def __getstate__(self):
        return {**self.__dict__, "bytes": None}  # a worker maps the file itself

    def __getitem__(self, i):
        if self.bytes is None:
            self.bytes = np.asarray(np.memmap(self.path, np.uint8, "r"))
        return self.bytes[self.starts[i] : self.starts[i + 1]].reshape(self.shapes[i])

    def verified(self, i):
        """Film i, after comparing it with its checksum; BadFilm when they differ."""
        if zlib.crc32(self[i]) != self.sums[i]:
            raise BadFilm(f"its bytes in {self.path} have changed since packing")
        return self[i]


def place(shapes):
    """Where each film begins and the last one ends, bytes. (n, 2) → int64 (n + 1,)"""
    return len(MAGIC) + np.concatenate(
        [[0], np.cumsum(np.prod(np.reshape(shapes, (-1, 2)), axis=1, dtype=np.int64))]
    )


class Attempts(torch.utils.data.Dataset):
    """Item i → (film i, "") or (None, why not): reading that never raises, for worker processes."""

    def __init__(self, films):
        self.films = films

    def __getitem__(self, i):
        try:
            return self.films.verified(i), ""
        except BadFilm as error:
            return None, str(error)


def leave_with_parent(_):
    """In a worker: end when the parent is killed. PyTorch's own watch does not see it while a film waits in a pipe that nobody reads."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def attempts(films, start, workers, task):
    """Films from number `start` on, in order, read by `workers` processes, with a progress bar: yields (film or None, reason)."""
    loader = torch.utils.data.DataLoader(
        Attempts(films),
        batch_size=None,
        sampler=range(start, len(films)),
        num_workers=workers,
        collate_fn=tuple,
        prefetch_factor=16 if workers else None,
        worker_init_fn=leave_with_parent,
    )
    return tqdm(loader, desc=task, initial=start, total=len(films), unit=" films", disable=None)


def pack_films(films, out, workers=0):
    """Write every readable film into the packed file `out` → Pack. Killed at any moment, the same call goes on where it was.

    Until it is complete there is <out>.part, and <out>.journal with a line (height, width, CRC-32, reason) a film, written after its bytes.
    """
    part, journal = Path(f"{out}.part"), Path(f"{out}.journal")
    key = f"{films.side} {len(films)} {zlib.crc32(json.dumps(films.names).encode())}"
    lines = resume(part, journal, key)
    with open(part, "ab", buffering=0) as file, open(journal, "a", buffering=1) as log:
        for film, reason in attempts(films, len(lines), workers, "pack"):
            if film is not None:
                file.write(film.tobytes())
            lines.append(
                f"0 0 0 {reason}"
                if film is None
                else f"{film.shape[0]} {film.shape[1]} {zlib.crc32(film.tobytes())} "
            )
            log.write(lines[-1] + "\n")
    finish(part, films, [line.split(" ", 3) for line in lines])
    os.replace(part, out)
    journal.unlink()
    return Pack(out)


def resume(part, journal, key):
    """Journal lines of the films that `part` holds, after cutting both to whole films; begins them when there is nothing to go on from."""
    if not journal.exists() or not part.exists():
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(MAGIC)
        write_text(journal, key + "\n")
    text = journal.read_text()
    first, *lines = text[: text.rindex("\n")].split(
        "\n"
    )  # a line without an end was cut by the kill
    if first != key:
        raise Stop(
            f"{part} was begun from other films or another --side: delete it and {journal.name} to begin again"
        )
    ends = place([[int(n) for n in line.split()[:2]] for line in lines])[1:]
    lines = lines[
        : int((ends <= part.stat().st_size).sum())
    ]  # after a power cut, bytes may be fewer than the journal says
    os.truncate(part, ends[len(lines) - 1] if lines else len(MAGIC))
    write_text(journal, "\n".join([key, *lines, ""]))
    return lines


def finish(part, films, rows):
    """Compare every film in `part` with its checksum, then append index and footer."""
    good = [i for i, row in enumerate(rows) if row[0] != "0"]
    if not good:
        raise Stop(
            f"none of the {len(films)} films can be read, first {films.names[0]}: {rows[0][3]}"
        )
    table = np.array([[int(n) for n in rows[i][:3]] for i in good])
    shapes, sums, starts = (
        table[:, :2].astype(np.int32),
        table[:, 2].astype(np.uint32),
        place(table[:, :2]),
    )
    data = np.asarray(np.memmap(part, np.uint8, "r"))
    for k, i in enumerate(tqdm(good, desc="verify", unit=" films", disable=None)):
        if zlib.crc32(data[starts[k] : starts[k + 1]]) != sums[k]:
            raise Stop(
                f"{part}: {films.names[i]} is not as it was written: see to the disk, delete the file, pack again"
            )
    text = {
        "names": [films.names[i] for i in good],
        "patients": [films.patients[i] for i in good],
        "side": films.side,
        "folder": os.path.basename(os.path.abspath(films.root)),
        "bad": [[films.names[i], row[3]] for i, row in enumerate(rows) if row[0] == "0"],
    }
    blob = io.BytesIO()
    for array in (shapes, sums, np.frombuffer(json.dumps(text).encode(), np.uint8)):
        np.save(blob, array)
    with open(part, "ab") as file:
        file.write(
            blob.getvalue()
            + FOOTER.pack(int(starts[-1]), blob.tell(), zlib.crc32(blob.getvalue()), MAGIC)
        )
        file.flush()
        os.fsync(file.fileno())


# ------------------------------------------------------------------------------------------------ sets of films
class InMemory:
    """A small set, each film decoded once and then kept. Same names, patients and errors as the set behind it."""

    def __init__(self, films):
        self.films, self.kept, self.names, self.patients = films, {}, films.names, films.patients

    def __len__(self):
        return len(self.films)

    def __getitem__(self, i):
        if i not in self.kept:
            try:
                self.kept[i] = self.films[i]
            except BadFilm as error:
                self.kept[i] = error
        if isinstance(self.kept[i], BadFilm):
            raise self.kept[i]
        return self.kept[i]


class BadFilms:
    """Names and counts what the loader replaced; more than 1 % of the films bad stops the run."""

    def __init__(self, films):
        self.films, self.seen = films, set()

    def note(self, numbers):
        """numbers (b,): -1 or the number of a film that could not be read."""
        for i in set(numbers[numbers >= 0].tolist()) - self.seen:
            self.seen.add(i)
            print(f"bad film, skipped ({len(self.seen)} so far): {self.films.names[i]}", flush=True)
        if len(self.seen) > 0.01 * len(self.films):
            names = ", ".join(self.films.names[i] for i in sorted(self.seen)[:5])
            raise Stop(
                f"{len(self.seen)} of {len(self.films)} films cannot be read, more than 1 %: {names} … run python data.py check --data … for all, with reasons"
            )
