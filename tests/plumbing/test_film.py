"""Reading of films, against a table made by hand, Pillow, and the rules of DICOM in NumPy."""

import importlib.util
import io
import subprocess
import sys
import zlib

import numpy as np
import pytest
from conftest import REAL
from films_for_tests import TINY, film, jpeg, needs_real, write_dicom
from PIL import Image, ImageFilter, PngImagePlugin, features

from plumbing.film import (
    UnreadableFilm,
    film_size,
    fit,
    read_film,
    read_mask,
    read_shrunk,
)

# ---------------------------------------------------------------- the formats, one by one
# File, height, width, mean grey, and by how much the mediastinum is brighter than the lungs: looked
# at; None where there is no frontal chest, upright.
FORMATS = [
    ("000001-9.jpg", 587, 732, 109, 135),
    ("000002-9.jpg", 384, 384, 58, None),
    ("00000317_003.png", 1024, 1024, 117, 55),
    ("000005-5-a.jpg", 328, 381, 124, 94),
    ("000006-12.jpg", 744, 744, 124, 93),
    ("00000773_001.png", 1024, 1024, 166, 113),
    ("00001281_000.png", 1024, 1024, 155, 87),
    ("00001880_006.png", 1024, 1024, 117, None),
    ("00002922_000.png", 1024, 1024, 169, 30),
    ("00003611_007.png", 1024, 1024, 184, 49),
    ("23E99E2E-447C-46E5-8EB2-D35D12473C39.png", 1552, 1726, 148, 106),
    ("248.jfif", 1310, 1383, 162, 68),
    ("465.webp", 513, 685, 106, 61),
    ("58cb9263f16e94305c730685358e4e_jumbo.jpeg", 1024, 931, 152, 110),
    ("766p.jpg", 1876, 1934, 140, 23),
    ("770.png", 415, 438, 151, 79),
    ("80b5f00f.png", 591, 640, 103, 28),
    ("884.png", 648, 768, 121, 81),
    ("CR.1.2.840.113564.1722810170.20200403202154234940.1003000225002.png", 1970, 2498, 105, 56),
    ("DX.1.2.840.113564.1722810162.20200320155115417540.1203801020003.png", 2414, 2487, 132, 98),
    ("a1a7d22e66f6570df523e0077c6a5a_jumbo.jpeg", 1024, 933, 102, None),
    ("covid-19-pneumonia-19.jpg", 1062, 1296, 108, 48),
    ("covid-19-pneumonia-23-day1.jpg", 3520, 4280, 164, 47),
    ("covid-19-pneumonia-8.jpg", 512, 512, 47, 47),
    (
        "derived/RG1_gray16_mono1.png",
        978,
        921,
        65,
        -79,
    ),  # nothing in a PNG says that it is inverted
    ("derived/RG1_gray16_mono2.tif", 978, 921, 190, 79),
    ("derived/hannover_cmyk.jpg", 691, 640, 93, 77),
    ("derived/hannover_inverted.png", 691, 640, 162, -77),  # nor here
    ("derived/hannover_la.png", 691, 640, 93, 77),
    ("dicom/CR-MONO1-10-chest", 440, 440, 145, 92),
    ("dicom/Fake_MONOHR1.dcm", 1024, 1024, 85, -110),  # the tag lies, and is obeyed
    ("dicom/NIH_DX_8bit_implicitLE.dcm", 1024, 1024, 186, 124),
    ("dicom/RG1_J2KI.dcm", 1955, 1841, 190, 79),
    ("dicom/RG3_J2KR.dcm", 1760, 1760, 174, None),
    ("dicom/RSNA_CR_AP_jpegbaseline.dcm", 1024, 1024, 144, 66),
    ("dicom/SIIM_CR_jpegbaseline.dcm", 1024, 1024, 170, 110),
    ("fff13f3a.png", 691, 640, 93, 77),
    ("jkms-35-e79-g001-l-e.jpg", 341, 509, 161, None),
    ("person1052_virus_1751.jpeg", 521, 836, 158, 43),
    ("person1642_bacteria_4352.jpeg", 286, 724, 121, 54),
    ("pneumocystis-pneumonia-2-PA.png", 954, 955, 130, 112),
    ("ryct.2020003.fig2-a.png", 156, 157, 155, 50),
    ("tpmd200203f2-c.png", 1264, 1399, 103, 78),
]
REFUSED = [
    ("27f5a41d.jpg", "black-and-white picture"),
    ("derived/empty.png", "empty file"),
    ("derived/hannover_truncated.png", "truncated"),
    ("dicom/CR-ModalitySequenceLUT.dcm", "JPEG Lossless.*pip install pylibjpeg pylibjpeg-libjpeg"),
    ("index.csv", "neither an image nor DICOM"),
]


@needs_real
@pytest.mark.parametrize(
    "name,height,width,mean,contrast", FORMATS, ids=[row[0][:30] for row in FORMATS]
)
def test_format_is_read(name, height, width, mean, contrast):
    if name.startswith("dicom"):
        pytest.importorskip("pydicom")
    picture = read_film(REAL / "formats" / name)
    assert picture.dtype == np.uint8 and picture.shape == (height, width)
    assert abs(picture.mean() - mean) < 1.5
    small = np.asarray(
        Image.fromarray(picture).resize((100, 100), Image.Resampling.BILINEAR)
    ).astype(float)
    lungs = (small[35:60, 22:36].mean() + small[35:60, 66:80].mean()) / 2
    assert contrast is None or abs(small[35:75, 45:60].mean() - lungs - contrast) < 4
    reduced = read_film(REAL / "formats" / name, 200)
    assert min(reduced.shape) >= min(200, height, width) and abs(reduced.mean() - mean) < 2


@needs_real
@pytest.mark.parametrize("name,reason", REFUSED)
def test_format_is_refused_by_name(name, reason):
    if name.startswith("dicom"):
        pytest.importorskip("pydicom")
        if importlib.util.find_spec("libjpeg") or importlib.util.find_spec("gdcm"):
            pytest.skip("a lossless JPEG decoder is installed here")
    with pytest.raises(UnreadableFilm, match=reason):
        read_film(REAL / "formats" / name)


@needs_real
def test_every_format_file_is_in_a_table():
    found = {
        str(p.relative_to(REAL / "formats")) for p in (REAL / "formats").rglob("*") if p.is_file()
    }
    assert found == {row[0] for row in FORMATS} | {row[0] for row in REFUSED}


@needs_real
def test_eight_bit_files_equal_pillow():
    for name in (
        "00000773_001.png",
        "766p.jpg",
        "tpmd200203f2-c.png",
        "covid-19-pneumonia-19.jpg",
        "derived/hannover_cmyk.jpg",
        "248.jfif",
    ):
        with Image.open(REAL / "formats" / name) as image:
            expected = np.asarray(image.convert("L")).astype(int)
        assert np.abs(read_film(REAL / "formats" / name) - expected).max() <= 1, name


def save(tmp_path, name, image, **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def test_palettes_alpha_and_modes(tmp_path):
    grey = film(3)
    reversed_palette = Image.frombytes("P", (64, 80), (255 - grey).tobytes())
    reversed_palette.putpalette([255 - v for v in range(256) for _ in range(3)])
    half = Image.merge("LA", (Image.fromarray(grey), Image.fromarray(film(4))))
    plain, colour = Image.fromarray(grey), Image.fromarray(grey).convert("RGB")
    for name, image, options in (
        ("reversed.png", reversed_palette, {}),
        ("clear.png", reversed_palette, {"transparency": bytes(range(256))}),
        ("la.png", half, {}),
        ("rgba.png", half.convert("RGBA"), {}),
        ("rgb.bmp", colour, {}),
        ("named_wrong.jpg", plain, {"format": "TIFF"}),
        ("gif.png", plain, {"format": "GIF"}),
        ("webp.gif", colour, {"format": "WEBP", "lossless": True}),
    ):
        picture = read_film(save(tmp_path, name, image, **options))
        assert np.abs(picture.astype(int) - grey).max() <= 1, name


def test_first_frame_of_many(tmp_path):
    frames = [Image.fromarray(film(k)) for k in range(3)]
    for name in ("many.tif", "many.gif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert np.array_equal(read_film(tmp_path / name), film(0)), name


def test_sixteen_bits_are_spread_by_percentiles(tmp_path):
    deep = film(5).astype(np.uint16) * 16  # 12-bit values in 16 bits
    deep[0, :3] = 65535  # a burnt-in marker must not darken the rest
    picture = read_film(save(tmp_path, "deep.png", Image.fromarray(deep)))
    low, high = (sorted(deep.ravel())[round(q * (deep.size - 1))] for q in (0.005, 0.995))
    expected = np.clip((deep.astype(float) - low) / (high - low), 0, 1) * 255
    assert np.abs(picture - expected).max() < 2
    white_zero = save(
        tmp_path, "white_is_zero.tif", Image.fromarray(65535 - deep), tiffinfo={262: 0}
    )
    assert np.abs(read_film(white_zero).astype(int) - picture).max() <= 2
    real = save(tmp_path, "float.tif", Image.fromarray(deep.astype(np.float32) / 7 - 3))
    assert np.abs(read_film(real).astype(int) - picture).max() <= 1


def test_whatever_pillow_opens_is_a_film(tmp_path):
    grey = film(5)
    deep = grey.astype(np.uint16) * 257
    plain = Image.fromarray(grey)
    for name, image, options in (
        ("film.pgm", plain, {}),
        ("film.ppm", plain.convert("RGB"), {}),
        ("film.dib", plain, {}),
        ("film.dcm", plain, {"format": "PNG"}),
        ("film", plain, {"format": "TIFF"}),
        ("film.jp2", plain, {}),
        ("film.j2k", plain, {}),
        ("gamma.png", plain, {"pnginfo": gamma(0.01)}),
        ("cmyk.jpg", plain.convert("CMYK"), {"quality": 100}),
        ("ycbcr.tif", plain.convert("YCbCr"), {}),
        ("apng.png", plain, {"save_all": True, "append_images": [Image.fromarray(film(6))]}),
    ):
        picture = read_film(save(tmp_path, name, image, **options))
        assert np.abs(picture.astype(int) - grey).max() <= 3, name
    if features.check("avif"):
        picture = read_film(save(tmp_path, "film.avif", plain, quality=100))
        assert np.abs(picture.astype(int) - grey).max() <= 6
    spread = read_film(save(tmp_path, "deep.png", Image.fromarray(deep))).astype(int)
    big = Image.frombytes("I;16B", plain.size, deep.astype(">u2").tobytes())
    holes = deep.astype(np.float32)
    holes[:5, :5] = np.nan
    holes[5, :5] = np.inf
    for name, image in (("big.tif", big), ("i32.tif", Image.fromarray(deep.astype(np.int32)))):
        assert np.abs(read_film(save(tmp_path, name, image)) - spread).max() <= 1, name
    picture = read_film(save(tmp_path, "holes.tif", Image.fromarray(holes)))
    assert np.abs(picture.astype(int) - spread)[6:].max() <= 6 and (picture[:5, :5] == 0).all()
    save(tmp_path, "bits.png", Image.fromarray(grey > 128))
    with pytest.raises(UnreadableFilm, match="black-and-white"):
        read_film(tmp_path / "bits.png")


def gamma(value):
    info = PngImagePlugin.PngInfo()
    info.add(b"gAMA", int(value * 100000).to_bytes(4, "big"))
    return info


def png_16(colours):
    """A PNG of 16-bit colours (H, W, 3), which Pillow cannot write."""

    def chunk(kind, content):
        check = zlib.crc32(kind + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + kind + content + check

    height, width, _ = colours.shape
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colours)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_16_bit_colour_is_read_or_refused_but_never_posterised(tmp_path):
    grey = film(5)
    for factor in (257, 16):
        colours = np.dstack([grey.astype(np.uint16) * factor] * 3)
        (tmp_path / "film.png").write_bytes(png_16(colours))
        if factor == 257:
            assert np.abs(read_film(tmp_path / "film.png").astype(int) - grey).max() <= 1
        else:
            with pytest.raises(UnreadableFilm, match="16-bit colour with few bits used"):
                read_film(tmp_path / "film.png")
    (tmp_path / "mask.png").write_bytes(png_16(np.dstack([LUNGS.astype(np.uint16)] * 3)))
    with pytest.raises(UnreadableFilm, match="16-bit colour"):
        read_mask(("file", tmp_path / "mask.png"))
    (tmp_path / "mask.png").write_bytes(png_16(np.dstack([GREY[255].astype(np.uint16) * 257] * 3)))
    assert np.array_equal(read_mask(("file", tmp_path / "mask.png")), LUNGS > 0)


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # the camera was turned: rotate by 90° clockwise to see it upright
    (tmp_path / "turned.jpg").write_bytes(jpeg(film(6), exif=exif))
    assert np.abs(read_film(tmp_path / "turned.jpg").astype(int) - np.rot90(film(6), -1)).max() < 12
    assert film_size(tmp_path / "turned.jpg") == (64, 80)  # as it is read


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_turned_tiffs_are_upright_films_and_masks(tmp_path, compression):
    """Pillow 13 shears those that are uncompressed when it opens them by name."""
    upright = film(6)
    mask = upright > 200
    ways = {  # tag 274: how the stored picture comes from the upright one, TIFF 6.0
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: np.transpose,
        6: np.rot90,
        7: lambda a: np.rot90(a, 2).T,
        8: lambda a: np.rot90(a, -1),
    }
    for orientation, store in ways.items():
        for values in (upright, mask * np.uint8(255)):
            stored = Image.fromarray(np.ascontiguousarray(store(values)))
            path = tmp_path / f"{values is upright}.tif"
            stored.save(path, tiffinfo={274: orientation}, compression=compression)
        assert np.array_equal(read_film(tmp_path / "True.tif"), upright), orientation
        assert film_size(tmp_path / "True.tif") == upright.shape
        assert np.array_equal(read_mask(("file", path), upright.shape), mask), orientation


@pytest.mark.parametrize(
    "content,reason",
    [
        (b"", "empty file"),
        (b"<html>404</html>" * 20, "neither.*<html>"),
        (TINY[: len(TINY) // 2], "truncated"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 300, "header|PNG"),
        (b"\0" * 128 + b"DICM" + b"junk" * 40, "."),
        (jpeg(np.full((50, 50), 77, np.uint8)), "constant"),
        (jpeg(film(2, 15, 90)), "only 90 × 15 px"),
        (jpeg(np.where(film(2) > 128, 255, 0).astype(np.uint8), 100), "black-and-white"),
    ],
)
def test_bad_files_are_refused_with_a_reason(tmp_path, content, reason):
    (tmp_path / "film.png").write_bytes(content)
    # Scaled down, black and white blend to grey.
    for side in (0,) if reason == "black-and-white" else (0, 16):
        with pytest.raises(UnreadableFilm, match=reason):
            read_film(tmp_path / "film.png", side)
    with pytest.raises(UnreadableFilm, match="No such file or directory: .*gone.png"):
        read_film(tmp_path / "gone.png")


def thumbnail(picture):
    small = Image.fromarray(picture).resize((40, 40), Image.Resampling.BOX)
    return np.asarray(small).astype(int)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_reduced_decoding_is_never_below_the_wanted_side(tmp_path, mode):
    image = Image.fromarray(film(7, 1000, 777)).convert(mode)
    image.save(tmp_path / "big.jpg", progressive=mode == "RGB")
    whole = read_film(tmp_path / "big.jpg")
    for side in (50, 97, 98, 200, 224, 320, 400, 777, 1500):
        part = read_film(tmp_path / "big.jpg", side)
        assert min(part.shape) >= min(side, 777)
        assert min(part.shape) < 2 * side or side < 90  # 1/8 is the smallest scale there is
        # The last block of 8 is padded: a shift of at most half a pixel.
        assert np.abs(thumbnail(part) - thumbnail(whole)).mean() < 3
    assert min(read_film(tmp_path / "big.jpg", 97).shape) == 98  # 777 / 8, rounded up


def test_fit():
    for height, width, side in ((80, 64, 32), (64, 80, 33), (50, 50, 64), (30, 300, 7)):
        small = fit(film(8, height, width), side)
        long_side = max(height, width) * side / min(height, width)
        assert min(small.shape) == side and abs(max(small.shape) - long_side) <= 0.5
    assert np.array_equal(fit(film(8), 64), film(8))


def test_read_shrunk(tmp_path):
    path = save(tmp_path, "film.jpg", Image.fromarray(film(7, 700, 900)))
    assert np.array_equal(read_shrunk(path, 300), fit(read_film(path, 300), 300))
    for side in (0, 700, 800):
        assert np.array_equal(read_shrunk(path, side), read_film(path)), side


# ---------------------------------------------------------------- DICOM
def slow_dicom(values, slope=1.0, intercept=0.0, window=None, mono1=False):
    """The rules of read_dicom with NumPy; window as in DICOM PS3.3 C.11.2.1.2.1."""
    x = values * slope + intercept
    if window:
        centre, width = window
        low, high = sorted(stored * slope + intercept for stored in (0, 4095))
        x = np.clip((x - (centre - 0.5)) / (width - 1) + 0.5, 0, 1) * (high - low) + low
    low, high = np.percentile(x, [0.5, 99.5])
    x = np.clip((x - low) / (high - low), 0, 1) * 255
    return 255 - x if mono1 else x


@pytest.mark.parametrize("mono1", [False, True])
@pytest.mark.parametrize("window", [None, (900.0, 700.0)])
@pytest.mark.parametrize("slope,intercept", [(1, 0), (2, -100)])
@pytest.mark.parametrize("header", [True, False])
def test_dicom_order(tmp_path, mono1, window, slope, intercept, header):
    values = film(9).astype(int) * 8
    tags = {
        "PhotometricInterpretation": "MONOCHROME1" if mono1 else "MONOCHROME2",
        "RescaleSlope": slope,
        "RescaleIntercept": intercept,
    }
    if window:
        tags |= {"WindowCenter": [window[0], 5], "WindowWidth": [window[1], 6]}
    path = write_dicom(tmp_path / "film", values, header, **tags)
    expected = slow_dicom(values, slope, intercept, window, mono1)
    assert np.abs(read_film(path) - expected).max() < 1.01


def test_dicom_padding_frames_and_refusals(tmp_path, monkeypatch):
    values = film(10).astype(int) * 8 + 40
    padded = values.copy()
    padded[:20] = 4095
    picture = read_film(write_dicom(tmp_path / "padded.dcm", padded, PixelPaddingValue=4095))
    assert (picture[:20] == 0).all() and np.abs(picture[20:] - slow_dicom(values[20:])).max() < 1.01
    frames = np.stack([values, values[::-1]])
    first = read_film(write_dicom(tmp_path / "frames.dcm", frames, NumberOfFrames=2))
    assert np.abs(first - slow_dicom(values)).max() < 1.01
    with pytest.raises(UnreadableFilm, match="constant"):
        read_film(write_dicom(tmp_path / "constant.dcm", values * 0 + 5))
    report = write_dicom(tmp_path / "report.dcm", values)
    without = pytest.importorskip("pydicom").dcmread(report)
    del without.PixelData
    without.save_as(report)
    with pytest.raises(UnreadableFilm, match="without pixel data"):
        read_film(report)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UnreadableFilm, match='pip install "pydicom>=3"'):
        read_film(tmp_path / "padded.dcm")


def odd_dicom(path, values, **tags):
    """A DICOM file whose attributes may be text that pydicom would refuse to write.

    None leaves an attribute out, "" leaves it empty, bytes are written as they are.
    """
    pydicom = pytest.importorskip("pydicom")
    given = {name: tag for name, tag in tags.items() if not isinstance(tag, bytes)}
    path = write_dicom(path, values, **{n: t for n, t in given.items() if t is not None})
    data = pydicom.dcmread(path)
    for name, tag in tags.items():
        if tag is None and name in data:
            del data[name]
        if isinstance(tag, bytes):
            number = pydicom.tag.Tag(name)
            vr = pydicom.datadict.dictionary_VR(number)
            data[number] = pydicom.dataelem.RawDataElement(
                number, vr, len(tag), tag, 0, False, True
            )
    data.save_as(path)
    return path


WINDOW = {"WindowCenter": 900, "WindowWidth": 700}
ODD = {  # attributes, and (slope, intercept, window) that the film is to be read with
    "empty slope": ({"RescaleSlope": "", "RescaleIntercept": ""}, (1, 0, None)),
    "slope of 0": ({"RescaleSlope": 0, "RescaleIntercept": -7}, (1, -7, None)),
    "slope alone": ({"RescaleSlope": 2, **WINDOW}, (2, 0, (900, 700))),
    "slope is a word": ({"RescaleSlope": b"none", "RescaleIntercept": b"0 "}, (1, 0, None)),
    "width 0": ({"WindowCenter": 900, "WindowWidth": 0}, (1, 0, None)),
    "width 1": ({"WindowCenter": 900, "WindowWidth": 1}, (1, 0, None)),
    "width below 0": ({"WindowCenter": 900, "WindowWidth": -5}, (1, 0, None)),
    "empty width": ({"WindowCenter": 900, "WindowWidth": ""}, (1, 0, None)),
    "centre alone": ({"WindowCenter": 900}, (1, 0, None)),
    "window elsewhere": ({"WindowCenter": -9000, "WindowWidth": 700}, (1, 0, None)),
    "window too narrow": ({"WindowCenter": 900, "WindowWidth": 2}, (1, 0, None)),
    "second window": ({"WindowCenter": [5, 900], "WindowWidth": [0, 700]}, (1, 0, (900, 700))),
    "commas": ({"WindowCenter": b"900,0 ", "WindowWidth": b"700,0 "}, (1, 0, (900, 700))),
    "words": ({"WindowCenter": b"AUTO", "WindowWidth": b"AUTO"}, (1, 0, None)),
    "empty tables": ({"VOILUTSequence": [], "ModalityLUTSequence": []}, (1, 0, None)),
    "empty padding": ({"PixelPaddingValue": ""}, (1, 0, None)),
    "no sign": ({"PixelRepresentation": None}, (1, 0, None)),
    "empty sign": ({"PixelRepresentation": ""}, (1, 0, None)),
    "no samples": ({"SamplesPerPixel": None}, (1, 0, None)),
    "no photometric": ({"PhotometricInterpretation": ""}, (1, 0, None)),
    "unknown photometric": ({"PhotometricInterpretation": "GREY"}, (1, 0, None)),
    "no bits": ({"BitsStored": None, "HighBit": None}, (1, 0, None)),
    "too many bits": ({"BitsStored": 99, "HighBit": 98}, (1, 0, None)),
    "too few bits": ({"BitsStored": 8, "HighBit": 7}, (1, 0, None)),
    "signed, it says": ({"PixelRepresentation": 1, "BitsStored": 11}, (1, 0, None)),
    "8 bits, it says": ({"BitsAllocated": 8}, (1, 0, None)),
    "no allocated bits": ({"BitsAllocated": None}, (1, 0, None)),
    "0 frames": ({"NumberOfFrames": 0}, (1, 0, None)),
    "empty frames": ({"NumberOfFrames": ""}, (1, 0, None)),
    "2 frames, it says": ({"NumberOfFrames": 2}, (1, 0, None)),
    "no patient, bad UID": ({"PatientID": None, "SOPInstanceUID": "1.2.0003.x"}, (1, 0, None)),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_attributes_never_cost_a_film(tmp_path, name, capfd, recwarn):
    values = film(9).astype(int) * 8
    tags, (slope, intercept, window) = ODD[name]
    path = odd_dicom(tmp_path / "odd.dcm", values, **tags)
    capfd.readouterr()
    recwarn.clear()
    expected = slow_dicom(values, slope, intercept, window)
    assert np.abs(read_film(path) - expected).max() < 1.01
    assert capfd.readouterr() == ("", "")


def test_inversions_palettes_and_colours(tmp_path):
    values = film(9).astype(int) * 8
    plain = slow_dicom(values)
    for tags, expected in (
        ({"PresentationLUTShape": "INVERSE"}, 255 - plain),
        ({"PresentationLUTShape": "IDENTITY"}, plain),
        ({"PresentationLUTShape": ""}, plain),
        (
            {"PresentationLUTShape": "INVERSE", "PhotometricInterpretation": "MONOCHROME1"},
            255 - plain,
        ),
    ):
        path = write_dicom(tmp_path / "film.dcm", values, **tags)
        assert np.abs(read_film(path) - expected).max() < 1.01
    grey = film(9)
    eight = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
    table = (255 - np.arange(256)).astype("<u2") * 256  # 8-bit values in 16-bit tables, reversed
    palette = {"PhotometricInterpretation": "PALETTE COLOR", "PixelData": grey.tobytes()}
    for colour in ("Red", "Green", "Blue"):
        palette[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        palette[f"{colour}PaletteColorLookupTableData"] = table.tobytes()
    picture = read_film(write_dicom(tmp_path / "palette.dcm", grey, **eight, **palette))
    assert np.abs(picture - slow_dicom(255 - grey.astype(int))).max() < 1.01
    del palette["RedPaletteColorLookupTableData"]
    with pytest.raises(UnreadableFilm, match="."):
        read_film(write_dicom(tmp_path / "no_palette.dcm", grey, **eight, **palette))
    chroma = np.full((80, 64), 128, np.uint8)
    for kind, channels in (("RGB", [grey] * 3), ("YBR_FULL", [grey, chroma, chroma])):
        colour = {"PhotometricInterpretation": kind, "SamplesPerPixel": 3}
        colour |= {"PixelData": np.dstack(channels).tobytes(), "PlanarConfiguration": 0}
        picture = read_film(write_dicom(tmp_path / "colour.dcm", grey, **eight, **colour))
        assert np.abs(picture.astype(int) - grey).max() <= 1, kind


def test_tables_of_dicom(tmp_path):
    """A modality table that doubles, a VOI table that inverts, and broken ones."""
    pydicom = pytest.importorskip("pydicom")
    values = film(9).astype(int) * 8  # 0 to 2040

    def table(entries, **tags):
        item = pydicom.Dataset()
        item.LUTDescriptor = [len(entries), 0, 16]
        item.LUTData = np.asarray(entries, "<u2").tobytes()
        item["LUTData"].VR = "OW"
        for name, value in tags.items():
            setattr(item, name, value)
        return [item]

    falling = 4095 - np.arange(4096)
    path = write_dicom(tmp_path / "voi.dcm", values, VOILUTSequence=table(falling))
    assert np.abs(read_film(path) - slow_dicom(4095 - values)).max() < 1.01
    square = np.arange(4096) ** 2 // 4096
    modality = table(square, ModalityLUTType="US")
    path = write_dicom(tmp_path / "modality.dcm", values, ModalityLUTSequence=modality)
    assert np.abs(read_film(path) - slow_dicom(square[values])).max() < 1.01
    broken = table(falling)
    broken[0].LUTDescriptor = None
    for name in ("VOILUTSequence", "ModalityLUTSequence"):
        path = write_dicom(tmp_path / "broken.dcm", values, **{name: broken})
        assert np.abs(read_film(path) - slow_dicom(values)).max() < 1.01


def test_windows_of_other_functions(tmp_path):
    values = film(9).astype(int) * 8
    for function, shown in (
        ("SIGMOID", 1 / (1 + np.exp(-4 * (values - 900) / 700))),
        ("LINEAR_EXACT", np.clip((values - 900) / 700 + 0.5, 0, 1)),
    ):
        path = write_dicom(tmp_path / "film.dcm", values, VOILUTFunction=function, **WINDOW)
        assert np.abs(read_film(path) - slow_dicom(shown)).max() < 1.01


def test_depth_and_sign_that_wrap_around_are_seen(tmp_path):
    values = film(9).astype(int) * 257  # all of 16 bits
    deep = {"BitsStored": 16, "HighBit": 15}
    for tags in (deep, deep | {"PixelRepresentation": 1}, {"BitsStored": 12, "HighBit": 11}):
        path = write_dicom(tmp_path / "film.dcm", values, **tags)
        assert np.abs(read_film(path) - slow_dicom(values)).max() < 1.01, tags
    below_zero = values // 16 - 2000
    tags = deep | {"PixelRepresentation": 0, "PixelData": below_zero.astype("<i2").tobytes()}
    path = write_dicom(tmp_path / "film.dcm", values, **tags)
    assert np.abs(read_film(path) - slow_dicom(below_zero)).max() < 1.01
    overlay = np.zeros_like(values)
    overlay[30:40, 20:23] = 4096 * 8  # graphics in the unused bits of a 12-bit film
    path = write_dicom(tmp_path / "film.dcm", values // 16 + overlay)
    assert np.abs(read_film(path) - slow_dicom(values // 16)).max() < 1.01


def test_containers_and_byte_orders(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    from pydicom.encaps import encapsulate

    values = film(9).astype(int) * 8
    grey = film(9)
    little = pydicom.dcmread(write_dicom(tmp_path / "film.dcm", values))
    big = pydicom.Dataset(little)
    big.file_meta = little.file_meta
    big.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRBigEndian
    big.PixelData = values.astype(">u2").tobytes()
    big.save_as(tmp_path / "big.dcm", enforce_file_format=True)
    assert np.abs(read_film(tmp_path / "big.dcm") - slow_dicom(values)).max() < 1.01
    content = (tmp_path / "big.dcm").read_bytes()
    (tmp_path / "bare.dcm").write_bytes(content[content.index(b"\x00\x08\x00\x16") :])
    assert np.abs(read_film(tmp_path / "bare.dcm") - slow_dicom(values)).max() < 1.01
    eight = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
    png = io.BytesIO()
    Image.fromarray(grey).save(png, "PNG")
    for syntax, frame in (("1.2.840.10008.1.2.4.50", jpeg(grey, 100)),) + tuple(
        (syntax, png.getvalue()) for syntax in ("1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.90")
    ):
        data = pydicom.dcmread(write_dicom(tmp_path / "film.dcm", grey, **eight))
        data.PixelData = encapsulate([frame])
        data["PixelData"].is_undefined_length = True
        data.file_meta.TransferSyntaxUID = syntax
        data.save_as(tmp_path / "wrapped.dcm")
        picture = read_film(tmp_path / "wrapped.dcm").astype(float)
        stretched = np.abs(picture - slow_dicom(grey.astype(int))).max()
        assert stretched < 6, syntax  # JPEG's own error, spread
    for name, source in (("dicom.jpg", tmp_path / "film.dcm"), ("film", tmp_path / "film.dcm")):
        (tmp_path / name).write_bytes(source.read_bytes())
        assert read_film(tmp_path / name).shape == grey.shape
    whole = write_dicom(tmp_path / "film.dcm", values).read_bytes()
    for lacking in (1, 3000, values.size):
        (tmp_path / "cut.dcm").write_bytes(whole[:-lacking])
        with pytest.raises(UnreadableFilm, match="less than expected|end of file|EOF"):
            read_film(tmp_path / "cut.dcm")


def test_no_library_floods_the_console(tmp_path):
    """In this process, in a forked one and in a spawned one."""
    pytest.importorskip("pydicom")
    odd_dicom(tmp_path / "a.dcm", film(1).astype(int) * 8, SOPInstanceUID="1.2.0003.x")
    clear = paletted(film(2), [[k, k, k] for k in range(256)])
    clear.save(tmp_path / "b.png", transparency=bytes(range(256)))
    Image.fromarray(film(3)).save(tmp_path / "c.tif", tiffinfo={282: 0.0, 305: "x"})
    Image.fromarray(film(4)).resize((9500, 9500)).save(tmp_path / "d.png", compress_level=1)
    script = (
        "import multiprocessing, sys\n"
        "from plumbing.film import read_film\n"
        "if __name__ == '__main__':\n"
        "    for name in sys.argv[1:]:\n"
        "        read_film(name)\n"
        "    for way in ('fork', 'spawn'):\n"
        "        with multiprocessing.get_context(way).Pool(1) as pool:\n"
        "            pool.map(read_film, sys.argv[1:])\n"
    )
    (tmp_path / "script.py").write_text(script)
    names = [tmp_path / name for name in ("a.dcm", "b.png", "c.tif", "d.png")]
    words = [sys.executable, "-W", "default", str(tmp_path / "script.py"), *map(str, names)]
    result = subprocess.run(words, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


# ---------------------------------------------------------------- masks
LUNGS = np.zeros((80, 64), np.uint8)  # 1 and 2: two lungs
LUNGS[20:61, 8:27] = 1
LUNGS[24:66, 37:55] = 2
GREY = {value: np.array([0, value, value], np.uint8)[LUNGS] for value in (1, 128, 255)}
RED_AND_BLUE = np.array([[0, 0, 0], [128, 0, 0], [0, 0, 200]], np.uint8)[LUNGS]
VISIBLE = GREY[255]


def paletted(values, colours):
    image = Image.frombytes("P", values.shape[::-1], values.tobytes())
    image.putpalette(np.ravel(colours).astype(np.uint8).tolist())
    return image


def rgba(colours, alpha):
    colours = np.broadcast_to(np.array(colours, np.uint8), (*alpha.shape, 3))
    return Image.fromarray(np.dstack([colours, alpha]))


VOC = [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
MASKS = {
    "0 1 2.png": Image.fromarray(LUNGS),
    "0 1 2.tif": Image.fromarray(LUNGS.astype(np.float32)),
    "0 127 255.png": Image.fromarray(np.array([0, 127, 255], np.uint8)[LUNGS]),
    "0 1 2 and 255.png": Image.fromarray(np.where((LUNGS == 1) & (film(1) > 99), 255, LUNGS)),
    "0 255.bmp": Image.fromarray(GREY[255]),
    "0 1.gif": Image.fromarray(GREY[1]),
    "1 bit.png": Image.fromarray(LUNGS > 0),
    "1 bit.tif": Image.fromarray(LUNGS > 0),
    "16 bit.png": Image.fromarray(LUNGS.astype(np.uint16)),
    "16 bit deep.tif": Image.fromarray(LUNGS.astype(np.uint16) * 32767),
    "32 bit.tif": Image.fromarray(LUNGS.astype(np.int32)),
    "0 to 1.tif": Image.fromarray((LUNGS > 0).astype(np.float32)),
    "palette.png": paletted(LUNGS, VOC),
    "grey palette.png": paletted(LUNGS, [[k, k, k] for k in range(256)]),
    "reversed palette.png": paletted(2 - LUNGS, VOC[::-1]),
    "colours.png": Image.fromarray(RED_AND_BLUE),
    "opaque.png": rgba(RED_AND_BLUE, np.full_like(LUNGS, 255)),
    "forgotten alpha.png": rgba(RED_AND_BLUE, np.zeros_like(LUNGS)),
    "overlay.png": rgba((255, 40, 0), VISIBLE // 2),
    "white under transparency.png": rgba((255, 255, 255), VISIBLE),
    "alpha alone.png": rgba((0, 0, 0), VISIBLE),
    "alpha alone 2.png": Image.fromarray(np.dstack([GREY[255] * 0, VISIBLE])),
    "black is transparent.png": Image.fromarray(GREY[255]),
    "cmyk.tif": Image.fromarray(RED_AND_BLUE).convert("CMYK"),
    "lossless.webp": Image.fromarray(RED_AND_BLUE),
}
OPTIONS = {
    "black is transparent.png": {"transparency": 0},
    "lossless.webp": {"lossless": True},
}


@pytest.mark.parametrize("name", MASKS)
def test_however_a_mask_is_stored_what_it_marks_counts(tmp_path, name):
    path = save(tmp_path, name, MASKS[name], **OPTIONS.get(name, {}))
    assert np.array_equal(read_mask(("file", path)), LUNGS > 0)
    assert np.array_equal(read_mask(("file", path), (160, 128)), LUNGS > 0)


def overlap(mask):
    return (mask & (LUNGS > 0)).sum() / (mask | (LUNGS > 0)).sum()


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("quality", [95, 75, 30])
def test_compressed_masks_count_from_half(tmp_path, mode, quality):
    image = Image.fromarray(GREY[255]).convert(mode)
    path = save(tmp_path, "mask.jpg", image, quality=quality)
    assert overlap(read_mask(("file", path))) > 0.99
    again = save(tmp_path, "again.png", Image.open(path).convert("L"))  # ringing, in a PNG
    assert overlap(read_mask(("file", again))) > 0.99


def test_soft_masks_count_from_half(tmp_path):
    soft = Image.fromarray(GREY[255]).filter(ImageFilter.GaussianBlur(1.5))
    for name, image in (
        ("soft.png", soft),
        ("probability.tif", Image.fromarray(np.asarray(soft, np.float32) / 255)),
        ("alpha.png", rgba((0, 255, 0), np.asarray(soft))),
    ):
        mask = read_mask(("file", save(tmp_path, name, image)))
        assert np.array_equal(mask, np.asarray(soft) > 127), name
    turned = Image.Exif()
    turned[274] = 6
    path = save(tmp_path, "turned.jpg", Image.fromarray(GREY[255]), quality=95, exif=turned)
    assert overlap(np.rot90(read_mask(("file", path), (64, 80)))) > 0.98


@pytest.mark.parametrize("mode", ["1", "L"])
def test_a_tiff_that_stores_white_as_0_is_no_inverted_mask(tmp_path, mode):
    image = Image.fromarray(GREY[255]).convert(mode)
    path = save(tmp_path, "mask.tif", image, tiffinfo={262: 0})
    with Image.open(path) as stored:
        assert stored.tag_v2[262] == 0
    assert np.array_equal(read_mask(("file", path)), LUNGS > 0)


def test_an_empty_mask_is_empty(tmp_path):
    for name in ("empty.png", "empty.jpg", "empty.tif"):
        path = save(tmp_path, name, Image.fromarray(LUNGS * 0))
        assert not read_mask(("file", path)).any()


NOT_MASKS = {
    "film.png": (Image.fromarray(film(3)), "a grey picture, no mask"),
    "film.jpg": (Image.fromarray(film(3)), "a grey picture, no mask"),
    "tinted film.png": (
        Image.fromarray(np.dstack([film(3), film(3) // 2 + GREY[128] // 2, film(3)])),
        "a grey picture, no mask",
    ),
    "three values.jpg": (
        Image.fromarray(np.array([0, 127, 255], np.uint8)[LUNGS]),
        "a grey picture, no mask",
    ),
    "0 1 2.jpg": (Image.fromarray(LUNGS), "do not survive"),
    "white.png": (Image.fromarray(GREY[1] * 0 + 255), "all of its pixels are 255"),
    "1 2 3.png": (Image.fromarray(LUNGS + 1), "none is background"),
    "white background.png": (
        Image.fromarray(np.array([[255, 255, 255], [255, 0, 0], [255, 9, 9]], np.uint8)[LUNGS]),
        "all of its pixels are 255",
    ),
    "ignored.tif": (Image.fromarray(LUNGS.astype(np.float32) - 1), "negative"),
    "nan.tif": (Image.fromarray(np.where(LUNGS, 1, np.nan).astype(np.float32)), "no numbers"),
    "no palette.png": (paletted(LUNGS, [[0, 0, 0]] * 256), "palette shows all values in one"),
    "black and clear.png": (
        rgba(RED_AND_BLUE, np.where(np.arange(64) < 5, 0, np.full_like(LUNGS, 255))),
        "black and transparent pixels",
    ),
    "mask.npy.png": (None, "neither an image nor DICOM"),
    "empty file.png": (b"", "empty file"),
}


@pytest.mark.parametrize("name", NOT_MASKS)
def test_what_is_no_mask_is_refused_by_name(tmp_path, name):
    image, reason = NOT_MASKS[name]
    if image is None:
        image = b"\x93NUMPY\x01\x00v\x00" + b"0" * 200
    if isinstance(image, bytes):
        (tmp_path / name).write_bytes(image)
    else:
        save(tmp_path, name, image)
    with pytest.raises(UnreadableFilm, match=rf"its mask \({name}\): .*{reason}"):
        read_mask(("file", tmp_path / name))


def test_pages_and_shapes_of_masks(tmp_path):
    path = save(tmp_path, "mask.png", Image.fromarray(GREY[255]))
    for shape in ((80, 64), (40, 32), (1250, 1000), (1253, 1000)):
        assert read_mask(("file", path), shape).sum() == (LUNGS > 0).sum()
    for shape in ((64, 64), (64, 80), (1000, 760)):
        with pytest.raises(UnreadableFilm, match="64 × 80 px, of another shape than its film"):
            read_mask(("file", path), shape)
    pages = [Image.fromarray(page) for page in (LUNGS, LUNGS.T.copy())]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(UnreadableFilm, match="it has 2 pages"):
        read_mask(("file", tmp_path / "pages.tif"))
    path = write_dicom(tmp_path / "mask.dcm", LUNGS.astype(int))
    assert np.array_equal(read_mask(("file", path)), LUNGS > 0)


@needs_real
def test_real_masks_are_read_and_real_films_are_no_masks():
    for path in sorted((REAL / "masks").rglob("*.png"))[::20]:
        assert np.array_equal(read_mask(("file", path)), np.asarray(Image.open(path)) > 0)
    for path in sorted((REAL / "films").rglob("*.*"))[::100]:
        with pytest.raises(UnreadableFilm, match="a grey picture, no mask"):
            read_mask(("file", path))
