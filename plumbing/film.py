"""One film or mask from one file: whatever radiographs are saved as → uint8 (H, W), bright = dense.

What a file is, its first bytes say, never its name.
"""

import os

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from plumbing.launch import UserError

# Suffixes of films, in lower case; files without a suffix are looked into.
SUFFIXES = frozenset(
    ".png .jpg .jpeg .jpe .jfif .webp .tif .tiff .gif .bmp .jp2 .dcm .dicom .dic".split()
)

# Named one by one, so that Pillow never starts a PostScript interpreter.
PILLOW_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "JPEG2000")

# The first bytes of PNG, JPEG, GIF, TIFF (both byte orders), BMP, JPEG 2000 (boxed and bare).
# fmt: off
IMAGE_STARTS = (
    b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*", b"BM",
    b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51",
)
# fmt: on

# A DICOM file without the usual header begins with one of these tags of groups 2 and 8.
DICOM_TAGS = "02000000 02001000 08000000 08000500 08000800 08001600".split()
DICOM_STARTS = tuple(bytes.fromhex(tag) for tag in DICOM_TAGS)

# Transfer syntaxes of JPEG 2000, which openjpeg decodes; libjpeg decodes the other compressed ones.
OPENJPEG = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")


class UnreadableFilm(Exception):
    """A file that cannot be read as a film; the message is the reason."""


# ---------------------------------------------------------------- what a file is
def sniff(head: bytes) -> str:
    """'dicom', 'image' or '' for neither, from the first 132 or more bytes of a file."""
    if head[128:132] == b"DICM" or head.startswith(DICOM_STARTS):
        return "dicom"
    is_webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    return "image" if is_webp or head.startswith(IMAGE_STARTS) else ""


def looks_like_film(path: str) -> bool:
    """Whether a file looks like a film: by its suffix, and without one by its first bytes.

    Names of DICOM files are often UIDs, so that a number is no suffix.
    """
    name = os.path.basename(path)
    suffix = os.path.splitext(name)[1].lower()
    if suffix[1:] and not suffix[1:].isdigit():
        return suffix in SUFFIXES
    if name == "DICOMDIR":
        return False
    try:
        with open(path, "rb") as file:
            return sniff(file.read(132)) != ""
    except OSError:
        return False


# ---------------------------------------------------------------- films
def read_film(path, side: int = 0) -> np.ndarray:
    """Read any image or DICOM file → uint8 (H, W). UnreadableFilm, also where no anatomy is left.

    side: the short side that is wanted, px. A JPEG may then be decoded at 1/2, 1/4 or 1/8 of its
    size, never below `side`; 0 = full size.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(256)
        kind = sniff(head)
        if kind == "dicom":
            film = read_dicom(path, has_header=head[128:132] == b"DICM")
        elif kind == "image":
            film = read_image(path, side)
        elif head:
            raise UnreadableFilm(f"neither an image nor DICOM (begins with {head[:12]!r})")
        else:
            raise UnreadableFilm("empty file")
    except UnreadableFilm:
        raise
    except UnidentifiedImageError:
        raise UnreadableFilm("damaged image header") from None
    except Exception as error:  # a decoder may raise anything on a broken file
        reason = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
        raise UnreadableFilm(reason.splitlines()[0]) from None
    return refuse_flat(film)


def read_shrunk(path, side: int) -> np.ndarray:
    """Read a film, shrunk to a short side of at most `side` px; 0 = as stored. → uint8 (H, W)"""
    film = read_film(path, side)  # a reduced JPEG, too, may still be nearly twice as large
    is_larger = 0 < side < min(film.shape)
    return fit(film, side) if is_larger else film


def refuse_flat(film: np.ndarray) -> np.ndarray:
    """The film itself, unless it is tiny, constant, or nine tenths pure black or white.

    Of 2,050 real films the worst, a small body in a black border, has half of its pixels there; a
    posterised one has 98 %.
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


def fit(film: np.ndarray, side: int) -> np.ndarray:
    """Resize a film so that its short side is `side` px: aspect kept, antialiased bicubic."""
    height, width = film.shape
    scale = side / min(height, width)
    size = (max(side, round(width * scale)), max(side, round(height * scale)))
    if size == (width, height):
        return film
    return np.asarray(Image.fromarray(film).resize(size, Image.Resampling.BICUBIC))


def read_image(path, side: int) -> np.ndarray:
    """Read the first frame of a PNG, JPEG, WEBP, TIFF, GIF, BMP or JPEG 2000 file → uint8 (H, W).

    Colour becomes luma, palettes are looked up, EXIF rotation is applied. Alpha is dropped: grey
    under a transparent border is still the film, and compositing would draw edges. More than 8 bit
    are spread by percentiles as in DICOM, since 12-bit films are often saved unscaled in 16 bits.
    """
    with Image.open(path, formats=PILLOW_FORMATS) as image:
        # For a JPEG: decode luma alone, and at a reduced scale.
        image.draft("L", (side, side) if side else None)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode[0] not in "IF":
            image.info.pop("transparency", None)
            return np.asarray(image.convert("L"))
        film = stretch(np.asarray(image))  # 16 and 32 bit, float
        # TIFF may store white as 0 (tag 262); Pillow inverts these itself, but only at 8 bit.
        white_is_zero = getattr(image, "tag_v2", {}).get(262) == 0
        return 255 - film if white_is_zero else film


def stretch(values: np.ndarray, used: np.ndarray | None = None) -> np.ndarray:
    """Deep grey values → uint8: percentiles 0.5 and 99.5 (of `used`, a mask) become 0 and 255."""
    low, high = np.percentile(values if used is None else values[used], (0.5, 99.5))
    if not high > low:
        raise UnreadableFilm("constant image")
    return ((np.clip(values, low, high) - low) * (255 / (high - low)) + 0.5).astype(np.uint8)


# ---------------------------------------------------------------- DICOM
def read_dicom(path, has_header: bool) -> np.ndarray:
    """Read the first frame of a DICOM file → uint8 (H, W).

    In this order: modality LUT, window, percentiles, and MONOCHROME1 inverted last. The window
    describes stored values, so inverting before it would be wrong. Padding pixels count for nothing
    and end black.
    """
    try:
        import pydicom
        from pydicom.pixels import apply_modality_lut, apply_voi_lut
    except ImportError:
        raise UnreadableFilm('DICOM needs a reader: pip install "pydicom>=3"') from None
    data = pydicom.dcmread(path, force=not has_header)
    if "PixelData" not in data:
        raise UnreadableFilm("DICOM without pixel data")
    values = decode_pixels(data)
    if values.ndim == 3:  # colour
        values = values if values.dtype == np.uint8 else stretch(values)
        return np.asarray(Image.fromarray(values).convert("L"))
    used = not_padding(data, values)
    film = stretch(apply_voi_lut(apply_modality_lut(values, data), data, index=0), used)
    if data.PhotometricInterpretation == "MONOCHROME1":
        film = 255 - film
    return film if used is None else np.where(used, film, 0).astype(np.uint8)


def decode_pixels(data) -> np.ndarray:
    """The stored values of the first frame: (H, W), or (H, W, 3) in colour."""
    from pydicom import uid
    from pydicom.pixels import pixel_array

    if "TransferSyntaxUID" not in data.file_meta:  # no header: as the parser found it
        is_implicit, is_little = data.original_encoding
        little = uid.ImplicitVRLittleEndian if is_implicit else uid.ExplicitVRLittleEndian
        data.file_meta.TransferSyntaxUID = little if is_little else uid.ExplicitVRBigEndian
    syntax = data.file_meta.TransferSyntaxUID
    try:
        return pixel_array(data, index=0)
    except RuntimeError as error:
        if "missing dependencies" not in str(error):
            raise
    decoder = "openjpeg" if syntax in OPENJPEG else "libjpeg"
    raise UnreadableFilm(
        f"{syntax.name}: no decoder installed: pip install pylibjpeg pylibjpeg-{decoder}"
    )


def not_padding(data, values: np.ndarray) -> np.ndarray | None:
    """bool (H, W): what is outside the padding values; None when nothing is padded, or all is."""
    if "PixelPaddingValue" not in data:
        return None
    first = int(data.PixelPaddingValue)
    last = int(data.get("PixelPaddingRangeLimit", first))
    used = (values < min(first, last)) | (values > max(first, last))
    return used if used.any() and not used.all() else None


def film_size(path) -> tuple[int, int]:
    """(height, width) in px from the header of a film's file alone; UserError when it has none."""
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


# ---------------------------------------------------------------- masks
def read_mask(mask: tuple, film_path) -> np.ndarray:
    """Read or draw the mask of a film → bool (H, W), to be squeezed to a square as the film is.

    mask: ("file", path), a picture that counts from half its largest grey value;
    ("rle", run lengths, canvas) or ("boxes", rectangles (x, y, width, height), canvas), drawn on a
    canvas of (height, width) px, None = the film's own size. Raises OSError or UserError.
    """
    kind, what, *canvas = mask
    if kind == "file":
        grey = np.asarray(Image.open(what).convert("L"))
        return grey > grey.max() / 2
    height, width = canvas[0] or film_size(film_path)
    drawn = np.zeros((height, width), bool)
    for item in what:
        if kind == "rle":
            drawn |= decode_rle(item, height, width)
        else:
            x, y, w, h = item
            drawn[int(y) : int(y + h), int(x) : int(x + w)] = True
    return drawn


def decode_rle(text: str, height: int, width: int) -> np.ndarray:
    """Run lengths as SIIM writes them → bool (height, width).

    Pairs of (gap since the last run's end, length of the run) go down the columns, left to right.
    """
    flat = np.zeros(height * width, bool)
    end = 0
    numbers = [int(word) for word in text.split()]
    for gap, length in zip(numbers[::2], numbers[1::2], strict=False):  # '-1' alone: no run
        start = end + gap
        end = start + length
        flat[start:end] = True
    if end > height * width:
        raise UserError(f"run lengths reach pixel {end}, the film has {height * width}")
    return flat.reshape(width, height).T
