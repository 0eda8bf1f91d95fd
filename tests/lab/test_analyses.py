"""Analyses: pooled features against a loop, landmarks of a drawn mask, p-values on exchangeable films, a perfect world, and every command as a user runs it."""

import csv
import importlib
import json
import sys

import numpy as np
import pytest
import torch
from lab_for_tests import TINY, good, make_place  # noqa: F401 (place is a fixture)
from PIL import Image
from scipy import stats

import augment
from lab import common, domain, correspondence, health, surprise
from model import CheXWorld
from plumbing import launch, phantom


# ---------------------------------------------------------------- correspondence
@pytest.mark.parametrize("grid,side", [(4, 16), (5, 12), (7, 7)])
def test_roi_pooling_is_the_mean_over_two_by_two_patches_around_each_pixel(grid, side):
    torch.manual_seed(0)
    tokens, fine = (
        torch.randn(2, grid * grid, 3),
        2,
    )  # 2 · side samples a patch: all window edges fall between samples
    pooled, patches = (
        correspondence.roi_pool(tokens, side),
        tokens.view(2, grid, grid, 3).double().numpy(),
    )
    sheet = patches.repeat(fine * side, 1).repeat(fine * side, 2)  # piecewise constant features
    for row in range(0, side, 3):
        for col in range(0, side, 2):
            edges = [
                round((c + 0.5) * grid * fine) for c in (row, col)
            ]  # centre of the pixel, in samples
            (top, bottom), (left, right) = (
                (max(0, e - fine * side), min(grid * fine * side, e + fine * side)) for e in edges
            )
            expected = sheet[:, top:bottom, left:right].mean((1, 2))
            assert np.allclose(pooled[:, row, col], expected, atol=1e-5)


def test_a_landmark_is_found_where_its_feature_is():
    torch.manual_seed(0)
    features, places = torch.randn(3, 16, 16, 8), np.array([[0.1, 0.9], [0.53, 0.28]])
    at = (places * 16).astype(int)
    for film, (dr, dc) in ((1, (2, -3)), (2, (-1, 1))):
        for r, c in at:
            features[film, r + dr, c + dc] = features[0, r, c]
    found = correspondence.nearest(correspondence.heat_maps(features[0], places, features[1:]))
    assert np.allclose(found[0], (at + [2, -3] + 0.5) / 16) and np.allclose(
        found[1], (at + [-1, 1] + 0.5) / 16
    )


def test_find_uses_each_reference_alone():
    torch.manual_seed(1)
    images, places = torch.rand(5, 1, 16, 16), np.random.default_rng(0).random((2, 3, 2))
    way = lambda x: torch.cat([x[:, 0, ..., None], x[:, 0, ..., None].roll(1, 1)], -1)
    found = correspondence.find(way, images[:2], places, images[2:], batch=2)
    each = [
        correspondence.nearest(
            correspondence.heat_maps(way(images[r : r + 1])[0], places[r], way(images[2:]))
        )
        for r in (0, 1)
    ]
    assert found.shape == (2, 3, 3, 2) and np.allclose(found, np.stack(each))


def test_score_counts_in_percent_of_the_width():
    true, shapes = np.array([[[0.5, 0.5], [0.2, 0.2]]]), np.array([[200.0, 100.0]])
    found = np.array([[[[0.52, 0.5], [0.2, 0.28]]]])  # 4 of 200 rows = 4 % of the width; 8 %
    row = correspondence.score(found, true, shapes)
    assert np.allclose(
        [row["distance"], row["pck@5"], row["pck@10"], *row["distance_each"]], [6, 50, 100, 4, 8]
    )


def test_a_random_box_holds_the_landmarks_and_moves_them():
    rng, places, shape = (
        np.random.default_rng(0),
        np.array([[0.4, 0.5], [0.6, 0.7]]),
        (200.0, 300.0),
    )
    boxes = np.array([correspondence.box_around(rng, shape, places) for _ in range(50)])
    inside = (places * shape - boxes[:, None, :2]) / boxes[:, None, 2:]
    assert (
        inside.min() > 0
        and inside.max() < 1
        and (inside.std(0) > 0.05).all()
        and (boxes[:, 2:].prod(1) < 0.81 * 6e4).all()
    )
    assert correspondence.box_around(rng, shape, np.array([[0.0, 0.0], [1.0, 1.0]])).tolist() == [
        0,
        0,
        200,
        300,
    ]


def test_landmarks_of_a_mask():
    mask = np.zeros((100, 200), bool)
    mask[20:81, 40:80] = mask[30:71, 120:170] = True
    mask[10:20, 58:61] = True  # the right lung's tip
    places = correspondence.from_mask(mask) * (100, 200) - 0.5
    assert (
        np.allclose(places[0], [10.5, 59], atol=0.6) and abs(places[1, 0] - 30.5) < 1
    )  # right, left apex
    assert np.allclose(places[2], [80, 40]) and np.allclose(
        places[3], [70, 169]
    )  # outer lower corners
    assert correspondence.from_mask(np.zeros((9, 9), bool)) is None


def test_raw_windows_hold_the_grey_values_around_a_pixel():
    image = torch.rand(1, 1, 12, 12)
    windows = correspondence.raw_windows(image, 12, 6)  # patches of 2 px: windows of 5 × 5
    assert torch.allclose(windows[0, 6, 4], image[0, 0, 4:9, 2:7].flatten(), atol=1e-5)


# ---------------------------------------------------------------- surprise
def test_conformal_p_is_uniform_on_exchangeable_films():
    rng = np.random.default_rng(0)
    p = np.concatenate(
        [
            surprise.conformal_p(rng.standard_normal(199), rng.standard_normal(1))
            for _ in range(3000)
        ]
    )
    assert stats.kstest(p, "uniform").pvalue > 0.01 and p.min() >= 1 / 200 and p.max() <= 1
    assert all((p <= a).mean() <= a + 3 * (a * (1 - a) / 3000) ** 0.5 for a in (0.01, 0.05, 0.2))


def test_conformal_p_by_counting_with_ties():
    reference, scores = [1.0, 2.0, 2.0, 5.0], [0.0, 2.0, 5.0, 6.0]
    assert (
        surprise.conformal_p(reference, scores).tolist()
        == [(1 + sum(r >= s for r in reference)) / 5 for s in scores]
        == [1.0, 0.8, 0.4, 0.2]
    )


@pytest.mark.parametrize("with_reference", [True, False])
def test_good_films_are_flagged_as_often_as_promised_and_odd_ones_always(with_reference):
    rng = np.random.default_rng(1)
    draw = lambda n, more=0.0: {
        "whole": np.exp(rng.standard_normal((n, 9)) * 0.3 + more),
        "swept": np.exp(rng.standard_normal((n, 9)) * 0.3 + more),
        "features": rng.standard_normal((n, 4)),
        "pixels": rng.standard_normal((n, 2)),
    }
    good, odd = draw(400), draw(8, 2.0)
    films = {key: np.concatenate([good[key], odd[key]]) for key in good}
    scores, z = (
        surprise.fold(draw(400), films, rng)
        if with_reference
        else surprise.against_itself(films, rng)
    )
    p = scores["surprise"][2]
    assert (
        (p[400:] < 0.06).all()
        and 0.01 < (p[:400] <= 0.05).mean() < 0.1
        and z.shape == (408, 9)
        and z[400:].mean() > 3
    )
    assert abs((scores["pixel mean and std"][2] <= 0.2).mean() - 0.2) < 0.1


def test_windows_hide_every_patch_and_never_everything():
    for grid in (1, 2, 4, 8, 14):
        hidden = surprise.windows(grid)
        assert hidden.any(0).all() and (grid == 1 or not hidden.all(1).any())
    area = surprise.windows(14).float().mean(1)
    assert (area - area[0]).abs().max() == 0 and 0.15 <= area[0] <= 0.2


class Perfect(torch.nn.Module):
    """A world whose prediction is the truth, hidden patches and domain included: the features are the un-augmented grey values, looked up."""

    def __init__(self, grid=4, patch=4):
        super().__init__()
        self.encoder, self.grid, self.coords = (
            (lambda images: images),
            grid,
            torch.zeros(grid**2, 2),
        )
        self.anchor = torch.nn.Parameter(torch.zeros(1))

    def targets(self, images):
        p = images.shape[-1] // self.grid
        return images.unfold(2, p, p).unfold(3, p, p).reshape(len(images), self.grid**2, -1)

    def predictor(self, h, context_coords, target_coords, action):
        return self.targets(self.told)

    told = None


def test_a_perfect_world_recalls_everything_and_one_blind_to_the_film_nothing(monkeypatch):
    world, images = Perfect(), torch.rand(2, 1, 16, 16)

    def remember(y, action):
        world.told = y
        return y * 0

    monkeypatch.setattr(augment, "apply_action", remember)
    perfect = domain.domain_test(world, images)
    assert perfect["action"]["recall@1"] > 99 and perfect["random"]["recall@1"] == 100 / 64
    monkeypatch.setattr(world, "predictor", lambda h, *_: torch.zeros(len(h), 16, 16))
    blind = domain.domain_test(world, images)
    assert blind["action"]["recall@5"] < 30 and blind["action"] == blind["no_action"]


def test_errors_against_one_patch_at_a_time():
    """The swept error of a patch is the mean over the blocks that hide it, each predicted in a pass of its own."""
    torch.manual_seed(0)
    world, images = CheXWorld(**TINY).eval(), torch.rand(2, 1, 64, 64)
    whole, swept = surprise.errors(world, images)
    truth, identity = world.targets(images), torch.tensor([[1.0, 1, 1, 0]]).expand(2, 4)
    assert np.allclose(
        whole, (world.predict(images, identity) - truth).square().mean(2).detach(), atol=1e-5
    )
    patch, found = 19, []
    for hidden in surprise.windows(8):
        if hidden[patch]:
            keep = torch.tensor([[i for i in range(64) if not hidden[i]]] * 2)
            place = lambda numbers: torch.tensor(
                [[[float(i // 8), float(i % 8)] for i in numbers]] * 2
            )
            asked = [i for i in range(64) if hidden[i]]
            guess = world.predictor(
                world.encoder(images, keep), place(keep[0].tolist()), place(asked), identity
            )[:, asked.index(patch)]
            found.append((guess - truth[:, patch]).square().mean(1).detach().numpy())
    assert len(found) > 1 and np.allclose(swept[:, patch], np.mean(found, 0), rtol=1e-3)


# ---------------------------------------------------------------- health
def test_variety_knows_collapse():
    rng = np.random.default_rng(0)
    same, free = (
        health.variety(np.ones((50, 8)) + 1e-4 * rng.standard_normal((50, 8))),
        health.variety(rng.standard_normal((50, 8))),
    )
    brute = rng.standard_normal((6, 3))
    cosines = [
        brute[i] @ brute[j] / np.linalg.norm(brute[i]) / np.linalg.norm(brute[j])
        for i in range(6)
        for j in range(6)
        if i != j
    ]
    assert np.isclose(health.variety(brute)["mean_cosine"], np.mean(cosines))
    assert (
        same["rankme"] < 1.1
        and free["rankme"] > 7
        and health.verdict(same, free, None).startswith("collapsed")
        and health.verdict(free, free, None).startswith("healthy")
    )


# ---------------------------------------------------------------- as a user runs them
@pytest.fixture
def here(place, monkeypatch):
    """The same without a new process: here("domain", "--films", 3)."""

    def call(*words):
        monkeypatch.chdir(place)
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        module = importlib.import_module(f"lab.{words[0]}")
        Config = getattr(module, "Config", common.Common)
        common.run_command(Config, module.command, words[0])

    return call


def test_domain(place):
    words = good(place, "domain", "--data", "set/films", "--films", 3, "--out", "d")
    result = json.loads((place / "d" / "result.json").read_text())
    assert (
        result["images"] == 3
        and result["candidates"] == 64
        and set(result["action"]) == {"recall@1", "recall@3", "recall@5"}
        and "with the action" in words
    )
    assert (
        Image.open(place / "d" / "errors.png").width > 600
        and Image.open(place / "d" / "choices.png").width > 900
    )


def test_correspondence_with_points_and_with_masks(place, here):
    good(
        place,
        "correspondence",
        "--data",
        "set/films",
        "--table",
        "set/phantoms.csv",
        "--films",
        4,
        "--references",
        2,
        "--out",
        "c",
        "--image",
        96,
        "--side",
        32,
    )
    points = json.loads((place / "c" / "result.json").read_text())
    assert (
        points["landmarks"] == list(phantom.LANDMARKS)
        and points["films"] == 4
        and points["image"] == 96
        and (place / "c" / "maps.png").is_file()
    )
    assert 0 < points["methods"]["mean place of all other films"]["distance"] < 20
    with open(place / "set" / "phantoms.csv") as file:
        rows = [f"{r['filename']},{r['mask']}" for r in csv.DictReader(file)]
    (place / "set" / "lungs.csv").write_text("\n".join(["filename,mask", *rows]) + "\n")
    here(
        "correspondence",
        "--weights",
        "runs/tiny/encoder.pt",
        "--data",
        "set/films",
        "--table",
        "set/lungs.csv",
        "--films",
        4,
        "--references",
        1,
        "--out",
        "m",
        "--side",
        32,
    )
    assert json.loads((place / "m" / "result.json").read_text())["landmarks"] == list(
        correspondence.MASK_LANDMARKS
    )


def test_health(place):
    words = good(place, "health", "--data", "set/films", "--films", 40, "--out", "h")
    result = json.loads((place / "h" / "result.json").read_text())
    assert (
        result["films"] == 40
        and {"target encoder", "context encoder", "random weights"} <= set(result)
        and "verdict" in words
    )


def test_surprise_on_an_odd_film_and_a_broken_file(place, here):
    archive = place / "archive"
    archive.mkdir()
    for i in range(6):
        film = phantom.make_phantom(7, i, 64)["film"]
        Image.fromarray(film if i else 255 - film).save(archive / f"{i}.png")
    (archive / "broken.png").write_bytes(b"")
    words = good(
        place,
        "surprise",
        "--data",
        "archive",
        "--reference",
        "set/films",
        "--out",
        "s",
        "--table",
        "",
    )
    with open(place / "s" / "surprise.csv") as file:
        rows = list(csv.DictReader(file))
    result = json.loads((place / "s" / "result.json").read_text())
    assert (
        len(rows) == 7
        and rows[0]["film"] == "broken.png"
        and "unreadable" in rows[0]["note"]
        and list(result["unreadable"]) == ["broken.png"]
    )
    values = [float(r["surprise"]) for r in rows[1:]]
    assert (
        values == sorted(values, reverse=True)
        and all(0 < float(r["p"]) <= 1 for r in rows[1:])
        and "1 unreadable" in words
    )
    here(
        "surprise", "--data", "set/films", "--out", "s2"
    )  # no reference: each half judges the other
    with pytest.raises(launch.UserError, match="fewer than 40"):
        here("surprise", "--data", "archive", "--out", "s3")


def test_views(place):
    good(
        place,
        "views",
        "--data",
        "set/films",
        "--films",
        2,
        "--image",
        64,
        "--patch",
        8,
        "--out",
        "v",
    )
    assert Image.open(place / "v" / "views.png").width > 1000


@pytest.mark.parametrize(
    "words,message",
    [
        (["domain", "--weights", "runs/tiny/encoder.pt", "--data", "set/films"], "no predictor"),
        (["surprise", "--weights", "runs/tiny/encoder.pt", "--data", "set/films"], "no predictor"),
        (["domain", "--weights", "nowhere.pt"], "no such checkpoint"),
        (["correspondence", "--data", "set/films"], "--table"),
        (["correspondence", "--data", "set/films", "--table", "nowhere.csv"], "no such file"),
        (["health", "--data", "nowhere"], "no such folder"),
        (["views", "--data", "set/films", "--films", "0"], "at least one"),
        (["views", "--data", "set/films", "--image", "65"], "multiple"),
    ],
)
def test_mistakes_are_said_in_one_line(here, words, message):
    with pytest.raises(Exception, match=message) as error:
        here(*words, *(["--out", "x"] if len(words) > 1 else []))
    assert error.value.one_line and "\n" not in str(error.value)
