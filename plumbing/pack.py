"""plumbing.pack"""

import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from plumbing.checkpoint import write_text
from plumbing.film import UnreadableFilm
from plumbing.launch import UserError, leave_with_parent

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
            raise UserError(f"{path}: not a packed file ({error})") from None
        if magic != MAGIC or zlib.crc32(blob) != check:
            raise UserError(
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
        """Film i, after comparing it with its checksum; UnreadableFilm when they differ."""
        if zlib.crc32(self[i]) != self.sums[i]:
            raise UnreadableFilm(f"its bytes in {self.path} have changed since packing")
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
        except UnreadableFilm as error:
            return None, str(error)


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
    lines = resume_packing(part, journal, key)
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
    finish_packing(part, films, [line.split(" ", 3) for line in lines])
    os.replace(part, out)
    journal.unlink()
    return Pack(out)


def resume_packing(part, journal, key):
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
        raise UserError(
            f"{part} was begun from other films or another --side: delete it and {journal.name} to begin again"
        )
    ends = place([[int(n) for n in line.split()[:2]] for line in lines])[1:]
    lines = lines[
        : int((ends <= part.stat().st_size).sum())
    ]  # after a power cut, bytes may be fewer than the journal says
    os.truncate(part, ends[len(lines) - 1] if lines else len(MAGIC))
    write_text(journal, "\n".join([key, *lines, ""]))
    return lines


def finish_packing(part, films, rows):
    """Compare every film in `part` with its checksum, then append index and footer."""
    good = [i for i, row in enumerate(rows) if row[0] != "0"]
    if not good:
        raise UserError(
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
            raise UserError(
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
