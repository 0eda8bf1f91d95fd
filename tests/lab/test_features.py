"""Features of films: each number against a loop over patches, and the files that are written."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from lab_for_tests import Films, good, make_place, noise  # noqa: F401 (place is a fixture)
from PIL import Image

import augment
from lab import common, features
from model import ViT
from plumbing.launch import UserError
from plumbing.weights import load_encoder


def by_hand(tokens, grid):
    """(N, D) → mean (D,), cells (16, D): each the mean over the patches that touch it."""
    cells = []
    for row in range(4):
        for col in range(4):
            inside = []
            for i in range(math.floor(row * grid / 4), math.ceil((row + 1) * grid / 4)):
                for j in range(math.floor(col * grid / 4), math.ceil((col + 1) * grid / 4)):
                    inside.append(tokens[i * grid + j])
            cells.append(sum(inside) / len(inside))
    return sum(tokens) / len(tokens), torch.stack(cells)


@pytest.mark.parametrize("grid", [2, 4, 7, 8])
def test_features_are_means_over_patches(grid):
    torch.manual_seed(0)
    vit = ViT(8 * grid, 8, 32, 1, 4)
    images = torch.rand(3, 1, 8 * grid, 8 * grid)
    found = features.pool_features(vit, images)
    mean, cells = found["mean"], found["cells"]
    assert mean.shape == (3, 32) and cells.shape == (3, 16, 32)
    for k in range(3):
        tokens = vit(images[k : k + 1])[0].detach()
        expected_mean, expected_cells = by_hand(tokens, grid)
        assert np.allclose(mean[k], expected_mean, atol=1e-5)
        assert np.allclose(cells[k], expected_cells, atol=1e-5)


@pytest.mark.slow
def test_features_of_a_folder_with_a_broken_film(place):
    folder = place / "some"
    (folder / "deep").mkdir(parents=True)
    names = ["a.png", "b.png", "deep/c.png"]
    for k, name in enumerate(names):
        Image.fromarray(noise(k, (64, 80))).save(folder / name)
    (folder / "broken.png").write_bytes(b"")
    words = good(place, "features", "--weights", "runs/tiny", "--data", "some", "--out", "f")
    assert "unreadable: broken.png" in words and "3 films, 1 unreadable" in words
    arrays = np.load(place / "f" / "features.npz")
    assert sorted(arrays["names"].tolist()) == names
    assert arrays["mean"].shape == (3, 32) and arrays["cells"].shape == (3, 16, 32)
    assert not [path for path in (place / "f").iterdir() if path.name.startswith(".features")]
    with open(place / "f" / "cells.csv") as file:
        of_cells = {row["filename"]: row for row in csv.DictReader(file)}
    for name, cells in zip(arrays["names"], arrays["cells"], strict=True):
        written = [float(of_cells[str(name)][f"c{c}_f{k}"]) for c in range(16) for k in range(32)]
        assert np.allclose(written, cells.ravel(), rtol=1e-6)
    vit = load_encoder(place / "runs" / "tiny" / "last.pt").eval()
    with open(place / "f" / "features.csv") as file:
        rows = {
            row["filename"]: list(map(float, list(row.values())[1:]))
            for row in csv.DictReader(file)
        }
    for name, mean, cells in zip(arrays["names"], arrays["mean"], arrays["cells"], strict=True):
        film = np.asarray(Image.open(folder / str(name)))
        image = augment.to_float(torch.from_numpy(augment.crop(film, (0, 0, 64, 80), 64).copy()))
        expected_mean, expected_cells = by_hand(vit(image[None, None])[0].detach(), 8)
        assert np.allclose(mean, expected_mean, atol=1e-5)
        assert np.allclose(cells, expected_cells, atol=1e-5)
        assert np.allclose(rows[str(name)], mean, rtol=1e-6)
    result = json.loads((place / "f" / "result.json").read_text())
    assert result["films"] == 3 and list(result["unreadable"]) == ["broken.png"]


def test_more_films_than_memory_holds_are_refused_after_the_first(monkeypatch):
    monkeypatch.setattr(common, "count_memory", lambda: 1e6)
    films = Films({f"{k}.png": np.zeros((8, 8), np.uint8) for k in range(4)})
    seen = []

    def by_row(images):
        seen.append(len(images))
        return {"mean": np.zeros((len(images), 40), np.float32)}

    words = r"of 8,000 films takes 0.0 GB, .* memory, 0.0 GB: .*--films 5000$"
    with pytest.raises(UserError, match=words):
        common.map_films(by_row, films, np.arange(8000) % 4, 8)
    assert seen == [32]
    found, _, _ = common.map_films(by_row, films, np.arange(5000) % 4, 8)
    assert found["mean"].shape == (5000, 40)


def test_films_come_in_batches_one_of_which_may_hold_none(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "LARGEST_CSV", 1000)
    names = [f"{k}.png" for k in range(400)]
    films = {name: np.full((8, 8), k % 256, np.uint8) for k, name in enumerate(names)}
    films |= dict.fromkeys(names[70:80])  # these cannot be read

    def double(images):
        grey = 255 * images[:, 0, 0, 0].numpy()
        cells = np.repeat(grey[:, None], 16 * 5, 1).reshape(-1, 16, 5)
        return {"mean": 2 * cells[:, 0], "cells": cells}

    found, read, unreadable = common.map_films(double, Films(films), np.arange(400), 8, batch=10)
    (tmp_path / "cells.csv").touch()  # of other films
    written = features.write_files(tmp_path, [names[i] for i in read], **found)
    assert written == ["features.npz", "features.csv"]
    assert len(read) == 390 and list(unreadable) == names[70:80]
    assert np.allclose(found["mean"][:, 2], 2 * (read % 256), atol=1e-3)
    assert not (tmp_path / "cells.csv").exists()
    with np.load(tmp_path / "features.npz") as arrays:
        assert (arrays["cells"] == found["cells"]).all() and arrays["cells"].shape == (390, 16, 5)
