"""The gallery: which programs it runs, and where their pictures go."""

from pathlib import Path

import numpy as np
import pytest
from lab_for_tests import make_place  # noqa: F401 (place is a fixture)
from PIL import Image

from lab import gallery
from plumbing.launch import UserError


def test_every_program_is_run_and_every_picture_collected(place, monkeypatch):
    commands = []

    def draw(name, *words):
        """Stand in for `python -m lab.NAME`: a picture of each name that its folder should hold."""
        commands.append((name, words))
        out = Path(words[words.index("--out") + 1])
        out.mkdir(parents=True)
        for picture in gallery.PAGES[out.name]:
            Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(out / f"{picture}.png")

    monkeypatch.chdir(place)
    monkeypatch.setattr(gallery, "run", draw)
    gallery.main("--data set/films --out g --docs pictures --steps 5 --seed 3".split())
    assert [name for name, _ in commands] == ["views", *gallery.ANALYSES, "rcdm", "rcdm"]
    for name, words in commands:
        text = " ".join(words)
        assert "--seed 3 --device auto" in text
        assert ("--weights runs/tiny/last.pt" in text) == (name != "views")
        assert ("--steps 5 --data set/films" in text) == (name == "rcdm")
    pages = {path.name for path in (place / "pictures").iterdir()}
    assert "domain_choices.png" in pages and "markers_examples.png" in pages
    assert len(pages) == sum(map(len, gallery.PAGES.values()))


@pytest.mark.slow
def test_a_failing_program_is_named(place, monkeypatch):
    monkeypatch.chdir(place)
    with pytest.raises(UserError, match="lab.domain failed"):
        gallery.run("domain", "--weights", "nowhere.pt", "--out", "x")
