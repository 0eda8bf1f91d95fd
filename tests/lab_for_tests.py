"""A folder with a run of random weights and phantoms, and the programs of the lab run in it."""

import importlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from model import CheXWorld
from plumbing import checkpoint, phantom
from plumbing.film import UnreadableFilm

TINY = dict(
    image=64,
    patch=8,
    dim=32,
    depth=1,
    heads=2,
    predictor_dim=32,
    predictor_depth=1,
    predictor_heads=2,
)


class Films:
    """A list of arrays under names; None cannot be read."""

    def __init__(self, films):
        self.names = list(films)
        self.patients = list(films)
        self.links = {}
        self.films = list(films.values())

    def __len__(self):
        return len(self.films)

    def __getitem__(self, i):
        if self.films[i] is None:
            raise UnreadableFilm("broken")
        return self.films[i]


def noise(seed, shape=(40, 50)):
    """A film of random grey values."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(name="place", scope="module")
def make_place(tmp_path_factory):
    """A folder with runs/tiny (last.pt, encoder.pt: random weights) and set/ (48 phantoms)."""
    folder = tmp_path_factory.mktemp("lab")
    torch.manual_seed(0)
    world = CheXWorld(**TINY)
    encoder = world.target_encoder
    run_folder = folder / "runs" / "tiny"
    checkpoint.save_atomic(
        {"world": world.state_dict(), "config": world.config}, run_folder / "last.pt"
    )
    checkpoint.save_atomic(
        {"encoder": encoder.state_dict(), "config": encoder.config}, run_folder / "encoder.pt"
    )
    phantom.write_phantoms(folder / "set", 48, size=64)
    return folder


@pytest.fixture(name="here")
def make_here(place, monkeypatch):
    """main() of a program, called in that folder without a new process: here("domain", ...)."""

    def call(name, *words):
        monkeypatch.chdir(place)
        importlib.import_module(f"lab.{name}").main(list(map(str, words)))

    return call


def run(place, name, *words):
    """`python -m lab.NAME WORDS` in the folder `place`. → the finished process"""
    command = [sys.executable, "-m", f"lab.{name}", *map(str, words)]
    return subprocess.run(command, cwd=place, capture_output=True, text=True)


def good(place, name, *words):
    """The same, which must succeed. → what it printed"""
    done = run(place, name, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout
