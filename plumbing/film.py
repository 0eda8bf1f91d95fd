"""One film or mask from one file: whatever radiographs are saved as → uint8 (H, W), bright = dense.

What a file is, its first bytes say, never its name.
"""

import contextlib
import io
import logging
import os
import warnings

import numpy as np
from PIL import Image, ImageFilter, ImageOps, UnidentifiedImageError, features

from plumbing.launch import UserError

# Suffixes of films, in lower case; files without a suffix are looked into.
# fmt: off
SUFFIXES = frozenset((
    ".png .jpg .jpeg .jpe .jfif .webp .tif .tiff .gif .bmp .dib .jp2 .j2k .jpx .avif .pgm .ppm "
    ".pnm .dcm .dicom .dic .ima"
).split())

# Named one by one, so that Pillow never starts a PostScript interpreter.
PILLOW_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "DIB", "JPEG2000", "PPM")
PILLOW_FORMATS += ("AVIF",) if features.check("avif") else ()

# The first bytes of PNG, JPEG, GIF, TIFF (small and big, in both byte orders), BMP, and JPEG 2000
# (boxed and bare).
IMAGE_STARTS = (
    b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"II+\0", b"MM\0*", b"MM\0+", b"BM",
    b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51",
)
# fmt: on

# A DICOM file without the usual header begins with one of these tags of groups 2 and 8, its two
# numbers of two bytes each in either byte order.
DICOM_TAGS = "02000000 02001000 08000000 08000500 08000800 08001600".split()
DICOM_TAGS += "00020000 00020010 00080000 00080005 00080008 00080016".split()
DICOM_STARTS = tuple(bytes.fromhex(tag) for tag in DICOM_TAGS)

# What a decoder thinks of a file is no news for the console, a thousand times over: a film is read,
# or refused with a reason. Here, since every process that reads films imports this file.
LIBRARIES = "PIL pydicom openjpeg libjpeg rle gdcm jpeg_ls".split()
warnings.filterwarnings("ignore", module=rf"({'|'.join(LIBRARIES)}|plumbing\.film)(\.|$)")
for library in LIBRARIES:
    logging.getLogger(library).addHandler(logging.NullHandler())
    logging.getLogger(library).propagate = False


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

    Names of DICOM files are often UIDs, so that a number is no suffix. Raises OSError.
    """
    name = os.path.basename(path)
    suffix = os.path.splitext(name)[1].lower()
    if suffix[1:] and not suffix[1:].isdigit():
        return suffix in SUFFIXES
    if name == "DICOMDIR":
        return False
    with open(path, "rb") as file:
        return sniff(file.read(132)) != ""


# ---------------------------------------------------------------- films
def read_film(path, side: int = 0) -> np.ndarray:
    """Read any image or DICOM file → uint8 (H, W). UnreadableFilm, also where no anatomy is left.

    side: the short side that is wanted, px. A JPEG may then be decoded at 1/2, 1/4 or 1/8 of its
    size, never below `side`; 0 = full size.
    """
    with explain_unreadable(path):
        head = read_head(path)
        if sniff(head) == "dicom":
            return refuse_flat(read_dicom(path, has_header=head[128:132] == b"DICM"))
        return refuse_flat(read_image(path, side))


@contextlib.contextmanager
def explain_unreadable(path):
    """Turn whatever a decoder raises on a broken file into UnreadableFilm with a short reason."""
    try:
        yield
    except UnreadableFilm:
        raise
    except FileNotFoundError:
        raise UnreadableFilm(f"No such file or directory: {path}") from None
    except UnidentifiedImageError:
        head = read_head(path)
        if sniff(head) == "image":
            raise UnreadableFilm("damaged image header") from None
        raise UnreadableFilm(f"neither an image nor DICOM (begins with {head[:12]!r})") from None
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
        raise UnreadableFilm(reason.splitlines()[0]) from None


def read_head(path) -> bytes:
    """The first bytes of a file. UnreadableFilm when it is empty."""
    with open(path, "rb") as file:
        head = file.read(256)
    if not head:
        raise UnreadableFilm("empty file")
    return head


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
    """Read the first frame of a file that Pillow opens (PILLOW_FORMATS) → uint8 (H, W).

    Colour becomes luma, palettes are looked up, EXIF rotation is applied. Alpha is dropped: grey
    under a transparent border is still the film, and compositing would draw edges. More than 8 bit
    are spread by percentiles as in DICOM, since 12-bit films are often saved unscaled in 16 bits.
    """
    with open_picture(path) as image:
        # For a JPEG: decode luma alone, and at a reduced scale.
        image.draft("L", (side, side) if side else None)
        is_cut = is_cut_to_8_bit(image)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode[0] in "IF":  # 16 and 32 bit, float
            return stretch(deep_values(image))
        image.info.pop("transparency", None)
        is_premultiplied = image.mode in ("La", "RGBa")
        image = image.convert(image.mode.upper()) if is_premultiplied else image
        film = np.asarray(image.convert("L"))
    if is_cut and int(film.max()) - int(film.min()) < 64:
        raise UnreadableFilm("16-bit colour with few bits used: save it as 16-bit grey")
    return film


@contextlib.contextmanager
def open_picture(path):
    """Open a file of PILLOW_FORMATS.

    By a file object, not by its name: a named TIFF without compression is mapped into memory, and
    Pillow 11 to 13 then shears it where its orientation tag turns it by a quarter.
    """
    with open(path, "rb") as file, Image.open(file, formats=PILLOW_FORMATS) as image:
        yield image


def is_cut_to_8_bit(image) -> bool:
    """Whether an image, not loaded yet, has colours of 16 bits: Pillow reads the upper 8 alone."""
    return image.mode not in ("I", "F") and ";16" not in image.mode and ";16" in str(image.tile)


def deep_values(image) -> np.ndarray:
    """The values of an open image of more than 8 bit, bright = high."""
    values = np.asarray(image)
    # TIFF may store white as 0 (tag 262); Pillow inverts these itself, but only up to 8 bit.
    white_is_zero = getattr(image, "tag_v2", {}).get(262) == 0
    return values.max() - values if white_is_zero and image.mode[0] in "IF" else values


def stretch(values: np.ndarray, used: np.ndarray | None = None) -> np.ndarray:
    """Deep grey values → uint8: percentiles 0.5 and 99.5 (of `used`, a mask) become 0 and 255.

    What is no number (NaN, infinite) counts for nothing and ends black.
    """
    is_number = np.isfinite(values)
    counted = values[is_number if used is None else is_number & used]
    if not counted.size:
        raise UnreadableFilm("no pixel is a number")
    low, high = np.percentile(counted, (0.5, 99.5))
    if not high > low:
        raise UnreadableFilm("constant image")
    clipped = np.clip(np.where(is_number, values, low), low, high)
    return ((clipped - low) * (255 / (high - low)) + 0.5).astype(np.uint8)


# ---------------------------------------------------------------- DICOM
def read_dicom(path, has_header: bool) -> np.ndarray:
    """Read the first frame of a DICOM file → uint8 (H, W).

    In this order: modality LUT, window, percentiles, and MONOCHROME1 inverted last. The window
    describes stored values, so inverting before it would be wrong. Padding pixels count for nothing
    and end black. An attribute that is empty or makes no sense counts as absent: a window that
    leaves no picture, say, gives way to the percentiles alone.
    """
    try:
        import pydicom
        from pydicom.pixels import apply_color_lut
    except ImportError:
        raise UnreadableFilm('DICOM needs a reader: pip install "pydicom>=3"') from None
    data = pydicom.dcmread(path, force=not has_header)
    values = decode_pixels(data)
    if data.PhotometricInterpretation == "PALETTE COLOR":
        values = apply_color_lut(values, data)
    if values.ndim == 3:
        values = values if values.dtype == np.uint8 else stretch(values)
        return np.asarray(Image.fromarray(values).convert("L"))
    return show(data, values)


def show(data, values: np.ndarray) -> np.ndarray:
    """The film that a DICOM file shows, of its stored values (H, W) → uint8 (H, W)

    The first of VOI LUT, window and no window at all counts with which there is a picture.
    """
    is_inverse = data.PhotometricInterpretation == "MONOCHROME1"
    is_inverse |= data.get("PresentationLUTShape") == "INVERSE"
    used = not_padding(data, values)
    measured = apply_modality(data, values)
    for window in (apply_voi_table, apply_window, lambda data, measured: measured):
        try:
            film = refuse_flat(stretch(window(data, measured), used))
            break
        except Exception as error:  # a broken table may raise anything
            reason = error
    else:
        raise reason
    film = 255 - film if is_inverse else film
    return film if used is None else np.where(used, film, 0).astype(np.uint8)


def apply_modality(data, values: np.ndarray) -> np.ndarray:
    """Stored values → what the machine measured, by table or slope and intercept, if it says so."""
    from pydicom.pixels import apply_modality_lut

    if data.get("ModalityLUTSequence"):
        with contextlib.suppress(Exception):  # a broken table
            return apply_modality_lut(values, data)
    slope, *_ = [slope for slope in numbers(data, "RescaleSlope") if slope] or [1.0]
    intercept, *_ = numbers(data, "RescaleIntercept") or [0.0]
    return values * slope + intercept


def apply_voi_table(data, measured: np.ndarray) -> np.ndarray:
    """Apply the first table of VOILUTSequence. Raises KeyError without one."""
    from pydicom.pixels import apply_voi

    if not data.get("VOILUTSequence"):
        raise KeyError("VOILUTSequence")
    return apply_voi(measured, data, index=0)


def apply_window(data, measured: np.ndarray) -> np.ndarray:
    """Apply the first window that makes sense → (H, W) in [0, 1]. IndexError without one.

    DICOM PS3.3 C.11.2.1: linear, LINEAR_EXACT or SIGMOID, by VOILUTFunction.
    """
    pairs = zip(numbers(data, "WindowCenter"), numbers(data, "WindowWidth"), strict=False)
    centre, width = [(centre, width) for centre, width in pairs if width > 1][0]
    function = data.get("VOILUTFunction")
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (measured - centre) / width, -500, 500)))
    if function == "LINEAR_EXACT":
        return np.clip((measured - centre) / width + 0.5, 0, 1)
    return np.clip((measured - (centre - 0.5)) / (width - 1) + 0.5, 0, 1)


def numbers(data, keyword: str) -> list[float]:
    """The finite numbers that an attribute of a DICOM file holds, [] when it is absent or empty.

    '1500,5', which the standard forbids, is 1500.5.
    """
    try:
        value = data.get(keyword)
    except Exception:  # pydicom refuses what is no number; here is the text itself
        value = data.get_item(keyword).value
    if isinstance(value, bytes):
        value = value.decode("ascii", "replace")
    if isinstance(value, str):
        value = value.split("\\")
    found = []
    for item in np.atleast_1d(np.array(value, object)).ravel():
        with contextlib.suppress(TypeError, ValueError):
            found.append(float(str(item).replace(",", ".")))
    return [number for number in found if np.isfinite(number)]


def not_padding(data, values: np.ndarray) -> np.ndarray | None:
    """bool (H, W): what is outside the padding values; None when nothing is, or nearly all."""
    first = numbers(data, "PixelPaddingValue")[:1]
    if not first:
        return None
    last = numbers(data, "PixelPaddingRangeLimit")[:1] or first
    used = (values < min(first, last)[0]) | (values > max(first, last)[0])
    return used if 0.1 < used.mean() < 1 else None


# ---- Its pixels
def decode_pixels(data) -> np.ndarray:
    """The stored values of the first frame: (H, W), or (H, W, 3) in colour."""
    from pydicom import uid
    from pydicom.pixels import pixel_array

    if not any(data.get(f"{kind}PixelData") for kind in ("", "Float", "DoubleFloat")):
        raise UnreadableFilm("DICOM without pixel data")
    if "TransferSyntaxUID" not in data.file_meta:  # no header: as the parser found it
        is_implicit, is_little = data.original_encoding
        little = uid.ImplicitVRLittleEndian if is_implicit else uid.ExplicitVRLittleEndian
        data.file_meta.TransferSyntaxUID = little if is_little else uid.ExplicitVRBigEndian
    complete_pixel_attributes(data)
    try:
        return smoothest(data, pixel_array(data, index=0))
    except Exception as error:
        with contextlib.suppress(Exception):
            return open_frame(data)
        if "missing dependencies" not in str(error):
            raise
    raise UnreadableFilm(
        f"{data.file_meta.TransferSyntaxUID.name}: no decoder installed: "
        "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
    )


def complete_pixel_attributes(data):
    """Fill in what a DICOM file does not say of its pixels, or says impossibly."""
    kind = str(data.get("PhotometricInterpretation") or "").upper().strip()
    is_colour = kind.startswith(("RGB", "YBR"))
    samples = data.get("SamplesPerPixel") or (3 if is_colour else 1)
    if samples == 1 and kind not in ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR"):
        kind = "MONOCHROME2"
    data.PhotometricInterpretation = kind or "RGB"
    data.SamplesPerPixel = samples
    if samples > 1 and data.get("PlanarConfiguration") not in (0, 1):
        data.PlanarConfiguration = 0
    frames = [int(number) for number in numbers(data, "NumberOfFrames") if number >= 1][:1] or [1]
    if data.get("PixelRepresentation") not in (0, 1):
        data.PixelRepresentation = 0
    allocated = data.get("BitsAllocated") or 0
    stored = data.get("BitsStored") or 0
    if data.get("PixelData") and not data.file_meta.TransferSyntaxUID.is_compressed:
        room = 8 * len(data.PixelData) // (data.Rows * data.Columns * samples)  # bits per value
        fits = 0 < allocated <= room and stored <= allocated
        if not fits and room in (8, 16, 32) and stored <= room:  # else it is cut short
            allocated = room
        frames = [max(1, min(frames[0], room // max(1, allocated)))]
    data.NumberOfFrames = frames[0]
    data.BitsAllocated = allocated or 16
    if not 1 <= stored <= data.BitsAllocated:
        data.BitsStored = data.BitsAllocated


def smoothest(data, values: np.ndarray) -> np.ndarray:
    """The stored values as the file describes them, unless another reading is far smoother.

    Files lie about sign (PixelRepresentation) and depth (BitsStored): values then wrap around,
    bright becomes dark, and the picture has edges everywhere. Of 51 real films read so, 19 of 20
    are at least four times as rough, and none of the right readings is twice as rough as a wrong
    one. Uncompressed 16 bit only.
    """
    is_plain = not data.file_meta.TransferSyntaxUID.is_compressed
    if not (is_plain and values.ndim == 2 and values.dtype in (np.uint16, np.int16)):
        return values
    order = "<" if data.file_meta.TransferSyntaxUID.is_little_endian else ">"
    unsigned = np.frombuffer(data.PixelData, f"{order}u2", values.size).reshape(values.shape)
    readings = [unsigned, unsigned.view(f"{order}i2")]
    other = min(readings, key=roughness)
    return other if roughness(other) < 0.3 * roughness(values) else values


def roughness(values: np.ndarray) -> float:
    """How much neighbours differ, of the variance of all (von Neumann's ratio): small for films."""
    values = values.astype(np.float32)
    variance = values.var()
    return float(np.square(np.diff(values)).mean() / variance) if variance else np.inf


def open_frame(data) -> np.ndarray:
    """The first frame as Pillow opens it, where a file is wrong about how its pixels are packed."""
    from pydicom.encaps import get_frame

    content = data.PixelData
    if content.startswith(b"\xfe\xff\x00\xe0"):  # wrapped into items
        content = get_frame(content, 0, number_of_frames=data.NumberOfFrames)
    with Image.open(io.BytesIO(content), formats=PILLOW_FORMATS) as image:
        return np.asarray(image)


def film_size(path) -> tuple[int, int]:
    """(height, width) in px, as the film is read, from the header of its file alone; UserError when
    it has none.
    """
    try:
        with open_picture(path) as image:
            is_turned = image.getexif().get(274) in (5, 6, 7, 8)  # EXIF: by a quarter
            tags = getattr(image, "tag_v2", {})  # a TIFF's size, which Pillow may have turned
            width = tags.get(256, image.width)
            height = tags.get(257, image.height)
            return (width, height) if is_turned else (height, width)
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
EMPTY_MASK = ("boxes", (), (1, 1))  # of no boxes, as read_mask takes it


def read_mask(mask: tuple, shape=None) -> np.ndarray:
    """Read or draw the mask of a film → bool (H, W), to be squeezed to a square as the film is.

    mask: ("file", path), a picture, of which counts what marked_in says; ("rle", run lengths,
    canvas) or ("boxes", rectangles (x, y, width, height), canvas), drawn on a canvas of
    (height, width) px and within it. shape: of the film; a picture may have another size, not
    another shape. Raises UnreadableFilm.
    """
    kind, what, *canvas = mask
    name = os.path.basename(what) if kind == "file" else kind
    try:
        with explain_unreadable(what):
            return read_mask_file(what, shape) if kind == "file" else draw_mask(*mask)
    except UnreadableFilm as error:
        raise UnreadableFilm(f"its mask ({name}): {error}") from None


def draw_mask(kind: str, items, canvas) -> np.ndarray:
    """Draw run lengths or rectangles as read_mask describes them → bool (H, W)"""
    height, width = canvas
    drawn = np.zeros((height, width), bool)
    for item in items:
        if kind == "rle":
            drawn |= decode_rle(item, height, width)
        else:
            x, y, w, h = item
            drawn[int(y) : int(y + h), int(x) : int(x + w)] = True
    return drawn


def read_mask_file(path, shape) -> np.ndarray:
    """Read a mask's picture → bool (H, W). UnreadableFilm when it is none, or none of this film.

    shape: (height, width) of the film, as large or shrunk; None: any.
    """
    head = read_head(path)
    if sniff(head) == "dicom":
        import pydicom

        values = decode_pixels(pydicom.dcmread(path))
        marked = marked_in(values.max(axis=2) if values.ndim == 3 else values)
    else:
        with open_picture(path) as image:
            is_lossy = head.startswith(b"\xff\xd8") or head[12:16] in (b"VP8 ", b"VP8X")
            marked = marked_in(mask_values(image), is_lossy)  # JPEG, or WEBP
    if shape:
        height, width = marked.shape
        squeezed = abs(np.log(width / height * shape[0] / shape[1]))
        if squeezed > 0.01 + 1 / min(*marked.shape, *shape):  # of rounding, a pixel at most
            raise UnreadableFilm(
                f"it is {width} × {height} px, of another shape than its film "
                f"({shape[1]} × {shape[0]}): make it as large as the film"
            )
    return marked


def mask_values(image) -> np.ndarray:
    """The values of an open mask (H, W): 0 is background, whatever else says that a pixel counts.

    Colours count by their brightest channel, black being background. Where transparency varies, the
    visible pixels count, if all of them are black, or none is.
    """
    if getattr(image, "n_frames", 1) > 1:
        raise UnreadableFilm(f"it has {image.n_frames} pages: save the one that is the mask")
    is_cut = is_cut_to_8_bit(image)
    image.load()
    indices = np.asarray(image) if image.mode == "P" else None
    ImageOps.exif_transpose(image, in_place=True)
    has_alpha = "transparency" in image.info or image.mode[-1] in "aA"
    if image.mode[0] in "IF1" or (image.mode == "L" and not has_alpha):
        return deep_values(image) * 1  # of bool: 0 and 1
    colours = np.asarray(image.convert("RGBA" if has_alpha else "RGB"))
    values = colours[..., :3].max(axis=2)
    if indices is not None and indices.min() < indices.max() and values.min() == values.max():
        raise UnreadableFilm("its palette shows all values in one colour")
    if is_cut and values.max() < 255:
        raise UnreadableFilm("it is 16-bit colour, which Pillow reads in part: save it as 8 bit")
    if not has_alpha or colours[..., 3].min() == colours[..., 3].max():
        return values
    alpha = colours[..., 3]
    is_coloured = values[alpha > alpha.max() / 2] > 0
    if is_coloured.any() and not is_coloured.all():
        raise UnreadableFilm("black and transparent pixels: one of them must be the background")
    return alpha


def marked_in(values: np.ndarray, is_lossy: bool = False) -> np.ndarray:
    """Which pixels a mask marks, of its values (H, W) → bool (H, W). 0 is background.

    A mask of a few values (0/1, 0/255, 0/1/2 for two lungs) marks all that is not 0. Lossy files
    and soft edges have many values: there it is what exceeds half of the largest one.
    UnreadableFilm when it is all one value but 0, has no 0, or is no mask: a film, or several
    labels blurred.
    """
    levels = np.unique(values)
    if not np.isfinite(levels).all() or levels[0] < 0:
        raise UnreadableFilm("some of its values are negative or no numbers")
    if levels[-1] == 0:
        return np.zeros(values.shape, bool)
    if len(levels) == 1:
        raise UnreadableFilm(f"all of its pixels are {levels[0]:g}: nothing is background")
    # A lossy copy that was saved anew has values near both ends: 1, 2, 3 and 252, 253, 254.
    top = levels[-1]
    is_near_end = [((levels > 0) & (levels < 0.04 * top)).any()]
    is_near_end.append(((levels > 0.96 * top) & (levels < top)).any())
    if len(levels) <= 32 and not is_lossy and not all(is_near_end):
        if levels[0] != 0:
            raise UnreadableFilm(f"its values are {levels[0]:g} to {top:g}: none is background, 0")
        return values > 0
    if is_lossy and top < 32:
        raise UnreadableFilm(f"values up to {top:g} do not survive its format: save it as PNG")
    refuse_grey(values / top)
    return values > top / 2


def refuse_grey(values: np.ndarray) -> None:
    """UnreadableFilm when values (H, W) in [0, 1] are not near 0 and 1 but for narrow edges.

    Of 137 real films a fifth and more lies between 1/4 and 3/4, of 20 lung masks, compressed as
    JPEG or blurred by 3 px, a tenth at most; and films have areas of even grey, masks have none.
    """
    is_marked = values > 0.25
    share_between = np.mean(is_marked & (values < 0.75))
    picture = Image.fromarray(values.astype(np.float32))
    higher = picture.filter(ImageFilter.MaxFilter(3)) - values  # than a pixel, of its neighbours
    lower = values - picture.filter(ImageFilter.MinFilter(3))
    is_even = (values > 0.1) & (values < 0.9) & (higher < 0.03) & (lower < 0.03)
    if share_between > 0.15 or is_even.sum() > 0.02 * is_marked.sum():
        raise UnreadableFilm(
            "a grey picture, no mask: save it with 0 for the background and 255 for what counts"
        )


def decode_rle(text: str, height: int, width: int) -> np.ndarray:
    """Run lengths as SIIM writes them → bool (height, width).

    Pairs of (gap since the last run's end, length of the run) go down the columns, left to right.
    """
    flat = np.zeros(height * width, bool)
    edges = np.cumsum([int(word) for word in text.split()])
    for start, end in zip(edges[::2], edges[1::2], strict=False):  # '-1' alone: no run
        flat[start:end] = True
    return flat.reshape(width, height).T
