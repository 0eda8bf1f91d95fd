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
