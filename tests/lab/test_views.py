"""The picture of what a training step shows, as a user draws it."""

import json

import pytest
from lab_for_tests import good, make_place  # noqa: F401 (place is a fixture)
from PIL import Image


@pytest.mark.slow
def test_views(place):
    size = ["--image", 64, "--patch", 8]
    good(place, "views", "--data", "set/films", "--films", 2, *size, "--out", "v")
    assert Image.open(place / "v" / "views.png").width > 1000
    result = json.loads((place / "v" / "result.json").read_text())
    assert result["films"] == 2 and result["settings"]["image"] == 64
