"""lab.markers: places, letters and what is seen by hand; the probe against scikit-learn."""

import json

import numpy as np
import pytest
import torch
from lab_for_tests import make_here, make_place, noise  # noqa: F401
from PIL import Image
from sklearn.metrics import roc_auc_score

from lab import markers
from masks import mask_sizes
from plumbing import weights

GRID = 8
IMAGE = 64


def dark(seed, shape=(150, 130)):
    """A film of random dark grey values."""
    return noise(seed, shape) // 4


def places(setting, count=40, size=0.2, shape=(150, 130)):
    """Questions about films of this shape. → [(film, place)]"""
    films = [dark(k, shape) for k in range(count)]
    return [(f, markers.draw(setting, f, IMAGE, GRID, size, 0, k)) for k, f in enumerate(films)]


def view_of_change(film, place, which):
    """Which patches of a view (0 context, 1 target) the letter changes. → (N,) bool"""
    size = 16 * GRID
    before = markers.augment.crop(film, place.boxes[which], size).astype(int)
    after = markers.augment.crop(markers.burn(film, place), place.boxes[which], size)
    changed = np.abs(after - before).reshape(GRID, 16, GRID, 16).max((1, 3)) > 40
    return changed.flatten()


def inside(rectangle):
    top, left, height, width = rectangle
    found = np.zeros((GRID, GRID), bool)
    found[top : top + height, left : left + width] = True
    return found.flatten()


# ------------------------------------------------------------------ the letter and what is kept
def test_a_hidden_letter_lies_in_the_block_and_no_pixel_that_is_kept_changes():
    for film, place in places("hidden"):
        block, spot = (inside(part) for part in place.parts.tolist())
        changed = view_of_change(film, place, 1)
        assert changed.any() and not (changed & ~spot).any() and not (spot & ~block).any()
        assert not block[place.keep].any()
        assert set(np.flatnonzero(spot)) <= set(place.asked.tolist())
        assert (len(place.keep), len(place.asked)) == mask_sizes(GRID)
        plain = markers.ask(film, place, IMAGE, GRID)["context"]
        burnt = markers.ask(markers.burn(film, place), place, IMAGE, GRID)["context"]
        p = IMAGE // GRID
        cells = (plain != burnt).reshape(GRID, p, GRID, p).any((1, 3)).flatten()
        assert cells.any() and not cells[place.keep].any()  # exactly: no grey value


def test_half_a_letter_is_kept_and_the_other_half_is_asked_for():
    for film, place in places("half"):
        block, spot = (inside(part) for part in place.parts.tolist())
        changed = view_of_change(film, place, 1)
        assert (changed & block).any() and (changed & ~block).any()
        kept = np.zeros(GRID**2, bool)
        kept[place.keep] = True
        assert not (kept & block).any()
        assert not (changed & ~block & ~kept).any()  # all of the other half is kept
        assert not (changed & block & ~spot).any()


def test_a_seen_letter_is_wholly_kept_in_another_crop():
    for film, place in places("seen"):
        changed = view_of_change(film, place, 0)
        kept = np.zeros(GRID**2, bool)
        kept[place.keep] = True
        assert changed.any() and not (changed & ~kept).any()
        assert (view_of_change(film, place, 1) & inside(place.parts[1].tolist())).any()
        assert (place.boxes[0] != place.boxes[1]).any() and len(place.asked) == GRID**2


def test_letter_and_presence_are_fair_coins_and_places_differ_by_seed():
    drawn = [place for _, place in places("half", 400)]
    for share in (
        np.mean([p.is_present for p in drawn]),
        np.mean([p.letter == "L" for p in drawn]),
    ):
        assert 0.42 < share < 0.58
    film = dark(0)
    first, again = (markers.draw("half", film, IMAGE, GRID, 0.2, 0, 3) for _ in range(2))
    other = markers.draw("half", film, IMAGE, GRID, 0.2, 1, 3)
    assert (first.centre == again.centre).all() and (first.centre != other.centre).any()


def test_the_letter_is_white_and_as_tall_as_it_is_said_to_be():
    film = np.zeros((200, 300), np.uint8)
    place = markers.draw("hidden", film, IMAGE, GRID, 0.2, 0, 0)
    for letter in "LR":
        burnt = markers.burn(film, place._replace(letter=letter, height=40.0))
        rows, cols = np.nonzero(burnt > 100)
        assert abs(np.ptp(rows) + 1 - 40) <= 2 and burnt.max() >= 245
        middle = (rows.min() + rows.max()) / 2, (cols.min() + cols.max()) / 2
        assert np.abs(np.subtract(middle, place.centre)).max() < 2.5
    assert (film == 0).all()


def test_a_bright_place_is_avoided():
    film = np.full((150, 130), 230, np.uint8)
    film[:, :70] = 20
    for k in range(20):
        place = markers.draw("half", film, IMAGE, GRID, 0.2, 0, k)
        assert markers.window(film, place.centre, place.height).mean() < markers.DARK


# ------------------------------------------------------------------ the probe
def found_of(x, y):
    """What collect finds, when block and spot have these features with and without letter."""
    features = np.stack([x, x], 1)[:, :, None].repeat(2, 2)
    return dict(prediction=features, target=features, place=x, present=y, letter=y)


def test_features_that_hold_the_letter_are_found_and_others_are_not():
    rng = np.random.default_rng(1)
    count = 600
    patients = np.array([f"p{k // 2}" for k in range(count)])
    draws = []
    for _ in range(3):
        y = rng.integers(0, 2, count).astype(float)
        told = found_of(rng.normal(size=(count, 20)), y)
        told["target"] = told["target"] + y[:, None, None, None] * 8
        draws.append(told | {"patient": patients, "setting": np.full(count, "half")})
    result = markers.judge(draws, "half", 0)
    for question in markers.QUESTIONS:
        for pool in markers.POOLS:
            ceiling = result[f"target {pool}"][question]
            assert ceiling["percent"] > 99.9 and ceiling["low"] > 99.5
            for kind in ("prediction", "clean", "place"):
                floor = result[f"{kind} {pool}"][question]
                assert floor["low"] < 50 < floor["high"], floor
                assert 2 < floor["high"] - floor["low"] < 20
                assert len(floor["seeds"]) == 3


def test_the_interval_is_a_bootstrap_over_patients():
    """Written out as a loop that repeats the rows of every drawn patient, by scikit-learn."""
    rng = np.random.default_rng(2)
    answers = []
    for _ in range(2):
        patients = rng.integers(0, 40, 150).astype(str)
        labels = rng.integers(0, 2, 150).astype(float)
        answers.append((labels + rng.normal(size=150).round(1), labels, patients))
    values = []
    for _ in range(400):
        drawn = rng.integers(0, 40, 40).astype(str)
        seeds = []
        for scores, labels, patients in answers:
            rows = np.concatenate([np.flatnonzero(patients == patient) for patient in drawn])
            seeds.append(roc_auc_score(labels[rows], scores[rows]))
        values.append(100 * np.mean(seeds))
    got = markers.interval(answers)
    assert np.allclose([got["low"], got["high"]], np.percentile(values, [2.5, 97.5]), atol=1)
    expected = [100 * roc_auc_score(labels, scores) for scores, labels, _ in answers]
    assert np.allclose(got["seeds"], expected) and got["percent"] == pytest.approx(
        np.mean(expected)
    )


def test_probe_and_judgement_share_no_patient(monkeypatch):
    rng = np.random.default_rng(3)
    patients = rng.integers(0, 50, 300).astype(str)
    x = np.concatenate([patients.astype(float)[:, None], rng.normal(size=(300, 5))], 1)
    y = (x[:, 1] + rng.normal(size=300) > 0).astype(float)
    seen = []
    probe = markers.linear_probe
    monkeypatch.setattr(markers, "linear_probe", lambda *args: seen.append(args) or probe(*args))
    scores, labels, tested = markers.answer(x, y, patients, 0)
    train_x, _, val_x, _, test_x = seen[0]
    groups = [set(part[:, 0].astype(int).astype(str)) for part in (train_x, val_x, test_x)]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
    assert groups[2] == set(tested) and 22 <= len(groups[2]) <= 27
    assert roc_auc_score(labels, scores) > 0.6  # chance is 0.5


# ------------------------------------------------------------------ the program
def test_the_program_proves_that_nothing_leaks(place, here, capsys):
    here("markers", "--weights", "runs/tiny", "--films", 40, "--seeds", 2, "--draws", 1)
    result = json.loads((place / "runs" / "markers" / "result.json").read_text())
    assert result["largest_change_of_a_hidden_prediction"] == 0
    hidden = result["settings"]["hidden"]
    assert len(hidden) == len(markers.KINDS) * len(markers.POOLS)
    for pool in markers.POOLS:
        assert hidden[f"prediction {pool}"] == hidden[f"clean {pool}"]
        assert len(hidden[f"target {pool}"]["letter"]["seeds"]) == 2
    assert f": 0 of {result['films']} to ask about, by name" in result["overlap"]
    assert result["films"] >= 20 and result["patients"] <= result["films"]
    words = capsys.readouterr().out
    assert "place alone (spot)" in words and result["overlap"] in words
    page = Image.open(place / "runs" / "markers" / "examples.png")
    assert page.width > 4 * markers.SHOWN and page.height > 3 * markers.SHOWN


def test_features_are_those_of_the_model_asked_by_hand(place):
    world = weights.load_world(place / "runs" / "tiny" / "last.pt").eval()
    film = dark(5)
    for setting in markers.SETTINGS:
        where = markers.draw(setting, film, IMAGE, GRID, 0.2, 0, 1)
        found = markers.look(world, [film], [where])
        for k, version in enumerate((film, markers.burn(film, where))):
            views = [markers.augment.crop(version, box, IMAGE) for box in where.boxes]
            x, y = (torch.tensor(view)[None, None] / 255 for view in views)
            coords = markers.augment.relative_coords(*torch.tensor(where.boxes)[:, None], GRID)
            identity = torch.tensor([[1.0, 1, 1, 0]])
            with torch.no_grad():
                context = world.encoder(x, where.keep[None])
                at = world.own_coords[where.keep][None]
                guess = world.predictor(context, at, coords[:, where.asked], identity)[0]
                truth = world.targets(y)[0]
            for p, part in enumerate(where.parts.tolist()):
                is_in = torch.from_numpy(inside(part))[where.asked]
                assert np.allclose(found["prediction"][0, k, p], guess[is_in].mean(0), atol=1e-4)
                expected = truth[where.asked][is_in].mean(0)
                assert np.allclose(found["target"][0, k, p], expected, atol=1e-4)


@pytest.mark.parametrize(
    "words, says",
    [
        (["--letter", "0.4"], "--letter 0.4"),
        (["--data", "set/films"], "0 patients .* 20 are the least.*--allow_seen"),
        (["--data", "set/films", "--allow_seen", "--films", "9"], "9 patients .* are the least"),
    ],
)
def test_mistakes_are_said_in_one_line(here, words, says):
    with pytest.raises(markers.UserError, match=says) as error:
        here("markers", "--weights", "runs/tiny", "--out", "x", *words)
    assert "\n" not in str(error.value)
