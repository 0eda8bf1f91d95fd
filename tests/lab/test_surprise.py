"""Surprise: p-values on exchangeable films, errors one patch at a time, and the program."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lab_for_tests import TINY, good, make_here, make_place  # noqa: F401 (fixtures)
from PIL import Image
from scipy import stats

from lab import common, surprise
from model import CheXWorld
from plumbing import launch, phantom


# ---------------------------------------------------------------- p-values
def test_conformal_p_is_uniform_on_exchangeable_films():
    rng = np.random.default_rng(0)
    p = []
    for _ in range(3000):
        p.append(surprise.conformal_p(rng.standard_normal(199), rng.standard_normal(1)))
    p = np.concatenate(p)
    assert stats.kstest(p, "uniform").pvalue > 0.01 and p.min() >= 1 / 200 and p.max() <= 1
    for a in (0.01, 0.05, 0.2):
        assert (p <= a).mean() <= a + 3 * (a * (1 - a) / 3000) ** 0.5


def test_conformal_p_by_counting_with_ties():
    reference = [1.0, 2.0, 2.0, 5.0]
    scores = [0.0, 2.0, 5.0, 6.0]
    counted = [(1 + sum(r >= s for r in reference)) / 5 for s in scores]
    assert surprise.conformal_p(reference, scores).tolist() == counted == [1.0, 0.8, 0.4, 0.2]


@pytest.mark.parametrize("with_reference", [True, False])
def test_good_films_are_flagged_as_often_as_promised_and_odd_ones_always(with_reference):
    rng = np.random.default_rng(1)

    def draw(n, more=0.0):
        return {
            "whole": np.exp(rng.standard_normal((n, 9)) * 0.3 + more),
            "swept": np.exp(rng.standard_normal((n, 9)) * 0.3 + more),
            "features": rng.standard_normal((n, 4)),
            "pixels": rng.standard_normal((n, 2)),
        }

    good_films = draw(400)
    odd_films = draw(8, 2.0)
    films = {key: np.concatenate([good_films[key], odd_films[key]]) for key in good_films}
    if with_reference:
        scores, p, z, calibrating = surprise.fold(draw(400), films, rng)
    else:
        scores, p, z, calibrating = surprise.against_itself(films, rng)
    assert calibrating == (200 if with_reference else 102)  # half of 400, of 408 / 2
    assert (p[400:] < 0.06).all() and 0.01 < (p[:400] <= 0.05).mean() < 0.1
    assert z.shape == (408, 9) and z[400:].mean() > 3
    assert scores["surprise"][400:].min() > np.median(scores["surprise"])
    assert all(values.shape == (408,) for values in scores.values())


@pytest.mark.parametrize(
    "header, cells, kinds",
    [
        ("filename,label", "normal mass Mass none uncertain", "normal mass mass normal -"),
        ("Image Index,Finding Labels", "No_Finding Mass Mass NA -1", "normal Mass Mass - -"),
        ("file,Label", "no yes YES N/A -1.0", "normal yes yes - -"),
        ("file,class", "0.0 1.0 1.0 . uncertain", "normal 1.0 1.0 - -"),
        ("file,remark", "normal mass mass mass mass", "- - - - -"),
    ],
)
def test_labels_go_by_their_usual_names_and_spellings(tmp_path, header, cells, kinds):
    rows = [f"{k}.png,{cell}" for k, cell in enumerate(cells.split())]
    (tmp_path / "table.csv").write_text("\n".join([header, *rows]))
    films = SimpleNamespace(names=[f"{k}.png" for k in range(5)])
    labels = surprise.labels_of(tmp_path / "table.csv", films, np.arange(5))
    assert [label or "-" for label in labels] == kinds.split()
    areas = surprise.separation(labels, {"surprise": np.array([1.0, 2, 3, 0, 9])})
    assert not areas if set(labels) == {""} else areas["surprise"]["all"] == 100


# ---------------------------------------------------------------- errors
def test_windows_mask_every_patch_and_never_everything():
    for grid in (1, 2, 4, 8, 14):
        block = surprise.windows(grid)
        assert block.any(0).all() and (grid == 1 or not block.all(1).any())
    area = surprise.windows(14).float().mean(1)
    assert (area - area[0]).abs().max() == 0 and 0.15 <= area[0] <= 0.2


def test_errors_against_one_patch_at_a_time():
    """The swept error of a patch is the mean over the blocks that mask it, each in its own pass."""
    torch.manual_seed(0)
    world = CheXWorld(**TINY).eval()
    images = torch.rand(2, 1, 64, 64)
    whole, swept = surprise.errors(world, images)
    truth = world.targets(images)
    identity = torch.tensor([[1.0, 1, 1, 0]]).expand(2, 4)
    expected = (world.predict(images, identity) - truth).square().mean(2)
    assert np.allclose(whole, expected.detach(), atol=1e-5)

    def coords(numbers):
        return torch.tensor([[[float(i // 8), float(i % 8)] for i in numbers]] * 2)

    patch = 19
    found = []
    for block in surprise.windows(8):
        if block[patch]:
            keep = [i for i in range(64) if not block[i]]
            asked = [i for i in range(64) if block[i]]
            context = world.encoder(images, torch.tensor([keep] * 2))
            guess = world.predictor(context, coords(keep), coords(asked), identity)
            error = guess[:, asked.index(patch)] - truth[:, patch]
            found.append(error.square().mean(1).detach().numpy())
    assert len(found) > 1 and np.allclose(swept[:, patch], np.mean(found, 0), rtol=1e-3)


# ---------------------------------------------------------------- as a user runs it
@pytest.mark.slow
def test_films_that_pretraining_saw_are_no_measure_for_new_ones(place, here, capsys, monkeypatch):
    """Reference films that the model was trained on, and new films to judge: p is not uniform."""
    with open(place / "set" / "phantoms.csv") as file:
        rows = list(csv.DictReader(file))
    learnt = {row["filename"] for row in rows[:40]}, {row["patient_id"] for row in rows[:40]}
    monkeypatch.setattr(common, "trained_on", lambda weights, films: learnt)
    folder = place / "new"
    folder.mkdir()
    for i in range(4):
        Image.fromarray(phantom.make_phantom(9, i, 64)["film"]).save(folder / f"new{i}.png")
    here("surprise", "--data", "new", "--reference", "set/films", "--out", "s5")
    said = capsys.readouterr().out
    assert "0 of 4 to judge, 40 of 48 reference films" in said
    assert "\nwarning: p holds for films that pre-training knows as well" in said
    overlap = json.loads((place / "s5" / "result.json").read_text())["overlap"]
    assert "40 of 48 reference films" in overlap and surprise.UNLIKE in overlap
    here("surprise", "--data", "set/films", "--reference", "set/films", "--out", "s6")
    assert "warning: p holds" not in capsys.readouterr().out
    here("domain", "--data", "set/films", "--films", 1, "--out", "d5")
    assert "1 of 1 to ask about" in capsys.readouterr().out


@pytest.mark.slow
def test_surprise_on_an_odd_film_and_a_broken_file(place, here, capsys):
    archive = place / "archive"
    archive.mkdir()
    for i in range(6):
        film = phantom.make_phantom(7, i, 64)["film"]
        Image.fromarray(film if i else 255 - film).save(archive / f"{i}.png")
    (archive / "broken.png").write_bytes(b"")
    data = ["--data", "archive", "--reference", "set/films"]
    words = good(place, "surprise", *data, "--out", "s")
    with open(place / "s" / "surprise.csv") as file:
        rows = list(csv.DictReader(file))
    result = json.loads((place / "s" / "result.json").read_text())
    assert len(rows) == 7 and rows[0]["film"] == "broken.png" and "unreadable" in rows[0]["note"]
    assert list(result["unreadable"]) == ["broken.png"] and "1 unreadable" in words
    values = [float(row["surprise"]) for row in rows[1:]]
    assert values == sorted(values, reverse=True)
    assert all(0 < float(row["p"]) <= 1 for row in rows[1:])
    here("surprise", "--data", "set/films", "--out", "s2")  # each half judges the other
    said = capsys.readouterr().out
    with open(place / "s2" / "surprise.csv") as file:
        least = min(float(row["p"]) for row in csv.DictReader(file))
    assert least >= 0.0769  # 1 / 13: of 48 films 24 judge, of whom 12 calibrate
    assert "none can have p ≤ 0.05: 12 films calibrate, so that no p is below 0.077; " in said
    here("surprise", "--data", "set/films", "--alpha", 0.08, "--out", "s4")
    assert "with p ≤ 0.08, where 4 would be by chance" in capsys.readouterr().out
    with pytest.raises(launch.UserError, match="fewer than 40"):
        here("surprise", "--data", "archive", "--out", "s3")
