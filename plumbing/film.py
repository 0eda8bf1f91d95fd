"""One film from one file, whatever radiographs are saved as → uint8 (H, W), bright = dense; and the packed file of many. Part of data.py.

What a file is, its first bytes say, never its name. A file that is not a readable film raises UnreadableFilm with the reason.
"""

import os

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from plumbing.launch import UserError

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


class UnreadableFilm(Exception):
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
    """Any image or DICOM file → uint8 (H, W). Raises UnreadableFilm, also for constant and black-and-white pictures (masks, posterised films).

    side: the short side that is wanted, px: a JPEG may then be decoded at 1/2, 1/4 or 1/8, never below `side`. 0 = full size.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(256)
        kind = sniff(head)
        if not kind:
            raise UnreadableFilm(
                f"neither an image nor DICOM (begins with {head[:12]!r})" if head else "empty file"
            )
        film = (
            read_dicom(path, head[128:132] == b"DICM")
            if kind == "dicom"
            else read_image(path, side)
        )
    except UnreadableFilm:
        raise
    except UnidentifiedImageError:
        raise UnreadableFilm("damaged image header") from None
    except Exception as error:  # a decoder may raise anything on a broken file
        raise UnreadableFilm(
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
        raise UnreadableFilm(f"only {film.shape[1]} × {film.shape[0]} px")
    if film.min() == film.max():
        raise UnreadableFilm("constant image")
    step = max(1, min(film.shape) // 512)
    part = film[::step, ::step]
    if np.mean((part < 3) | (part > 252)) > 0.9:
        raise UnreadableFilm("black-and-white picture (a mask, or a film posterised beyond use)")
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
        raise UnreadableFilm("constant image")
    return ((np.clip(values, low, high) - low) * (255 / (high - low)) + 0.5).astype(np.uint8)


def read_dicom(path, has_header):
    """DICOM → uint8 (H, W): first frame, modality LUT, window on the stored polarity, percentiles, MONOCHROME1 inverted last.

    The window describes stored values: inverting before it would be wrong. Padding pixels count for nothing and end black.
    """
    try:
        import pydicom
        from pydicom.pixels import apply_modality_lut, apply_voi_lut, pixel_array
    except ImportError:
        raise UnreadableFilm('DICOM needs a reader: pip install "pydicom>=3"') from None
    data = pydicom.dcmread(path, force=not has_header)
    if "PixelData" not in data:
        raise UnreadableFilm("DICOM without pixel data")
    syntax = transfer_syntax(data)
    try:
        values = pixel_array(data, index=0)
    except RuntimeError as error:
        if "missing dependencies" not in str(error):
            raise
        decoder = "openjpeg" if syntax in OPENJPEG else "libjpeg"
        raise UnreadableFilm(
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
    from pydicom.uid import (
        ExplicitVRBigEndian,
        ExplicitVRLittleEndian,
        ImplicitVRLittleEndian,
    )

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


def film_size(path):
    """(height, width) in pixels from the header alone; Stop when there is none."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except OSError:
        pass
    try:
        import pydicom

        header = pydicom.dcmread(path, stop_before_pixels=True, force=True)
        return int(header.Rows), int(header.Columns)
    except ImportError:
        raise UserError('DICOM needs a reader: pip install "pydicom>=3"') from None
    except Exception as error:  # a broken file may raise anything
        raise UserError(f"{path}: no image size in its header ({error})") from None


def decode_rle(text, height, width):
    """SIIM's run lengths → bool (height, width): (gap since the last run's end, length) pairs over columns, top to bottom."""
    flat, at = np.zeros(height * width, bool), 0
    numbers = [int(x) for x in text.split()]
    for gap, length in zip(numbers[::2], numbers[1::2]):
        flat[at + gap : at + gap + length] = True
        at += gap + length
    if at > height * width:
        raise UserError(f"run lengths reach pixel {at}, the film has {height * width}")
    return flat.reshape(width, height).T


def encode_rle(mask):
    """bool (H, W) → SIIM's run lengths, '-1' when empty; the inverse of decode_rle."""
    edges = np.flatnonzero(np.diff(np.r_[0, np.asarray(mask, np.int8).T.ravel(), 0]))
    gaps, lengths = edges[::2] - np.r_[0, edges[1:-1:2]], edges[1::2] - edges[::2]
    return " ".join(f"{g} {n}" for g, n in zip(gaps, lengths)) or "-1"


def read_mask(mask, film_path):
    """The mask of one film → bool (H, W) on its own canvas, to be resized together with the film.

    mask: ("file", path), ("rle", rows, canvas) or ("boxes", rows, canvas), as in plumbing.splits.Example. Grey masks count from half
    their maximum. Raises OSError or UserError when it cannot be read.
    """
    kind, what, *canvas = mask
    if kind == "file":
        gray = np.asarray(Image.open(what).convert("L"))
        return gray > gray.max() / 2
    height, width = canvas[0] or film_size(film_path)
    drawn = np.zeros((height, width), bool)
    for item in what:
        if kind == "rle":
            drawn |= decode_rle(item, height, width)
        else:
            x, y, w, h = item
            drawn[int(y) : int(y + h), int(x) : int(x + w)] = True
    return drawn
