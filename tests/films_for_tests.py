"""Small pictures, folder trees and the data.py command, for the tests that read films."""

import io
import subprocess
import sys

import numpy as np
import pytest
from conftest import REAL, ROOT
from PIL import Image

needs_real = pytest.mark.skipif(
    not (REAL / "formats").is_dir(), reason="no real films beside the repository"
)


def film(seed=0, height=80, width=64):
    """A smooth random grey picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def jpeg(picture, quality=90, **options):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality, **options)
    return file.getvalue()


TINY = jpeg(film(1, 40, 40))


def tree(root, names, content=TINY):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def run(*words, **options):
    return subprocess.run(
        [sys.executable, str(ROOT / "data.py"), *map(str, words)],
        capture_output=True,
        text=True,
        **options,
    )


def write_dicom(path, values, header=True, **tags):
    """Write a DICOM file of 12 bits per pixel; tags override what it says. → path"""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileDataset, FileMetaDataset

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = (
        pydicom.uid.ExplicitVRLittleEndian if header else pydicom.uid.ImplicitVRLittleEndian
    )
    meta.MediaStorageSOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    d = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    shown = {
        "SOPClassUID": meta.MediaStorageSOPClassUID,
        "SOPInstanceUID": "1.2.3",
        "Modality": "DX",
        "Rows": values.shape[-2],
        "Columns": values.shape[-1],
        "SamplesPerPixel": 1,
        "BitsAllocated": 16,
        "BitsStored": 12,
        "HighBit": 11,
        "PixelRepresentation": 0,
        "PhotometricInterpretation": "MONOCHROME2",
        "PixelData": values.astype("<u2").tobytes(),
    }
    for key, value in (shown | tags).items():
        setattr(d, key, value)
    if header:
        d.save_as(path, enforce_file_format=True)
    else:
        del d.file_meta
        d.preamble = None
        d.save_as(path, implicit_vr=True, little_endian=True)
    return path
