"""lab.letters: what is burnt is what is read; a decoder that is told of letters paints them."""

import json

import numpy as np
import pytest
from lab_for_tests import make_here, make_place, noise  # noqa: F401
from PIL import Image
from sklearn.metrics import roc_auc_score

from lab import letters, markers
from plumbing import weights


def squares():
    """Strokes of an R and an L that share a column. → (2, 16, 16)"""
    strokes = np.zeros((2, 16, 16), np.uint8)
    strokes[:, 4:12, 5] = 250  # the stem of both
    strokes[0, 4:8, 8] = 250
    strokes[1, 11, 6:10] = 250
    return strokes


def test_a_letter_is_read_off_its_strokes():
    """By a loop over the pixels."""
    rng = np.random.default_rng(0)
    strokes = np.stack([squares()] * 4)
    blocks = rng.integers(0, 100, (4, 16, 16)).astype(np.uint8)
    letter = np.array([0, 1, 0, 1.0])
    for k in (0, 1):
        blocks[k] = np.maximum(blocks[k], strokes[k, k])
    there, which = letters.read(blocks, strokes, letter)
    for k in range(4):
        own, other = (strokes[k, int(v)] > 0 for v in (letter[k], 1 - letter[k]))
        inked = [int(v) for v, is_in in zip(blocks[k].flat, own.flat, strict=True) if is_in]
        rest = [int(v) for v, is_in in zip(blocks[k].flat, own.flat, strict=True) if not is_in]
        assert there[k] == pytest.approx(np.mean(inked) - np.mean(rest))
        alone = blocks[k][own & ~other].mean() - blocks[k][other & ~own].mean()
        assert which[k] == pytest.approx(alone if letter[k] else -alone)
    assert (there[:2] > 120).all() and (np.abs(there[2:]) < 40).all()
    assert which[0] < -60 and which[1] > 60


def test_strokes_are_the_pixels_that_a_letter_changes(place):
    world = weights.load_world(place / "runs" / "tiny" / "last.pt").eval()
    films = [noise(k, (150, 130)) // 4 for k in range(6)]
    for setting in markers.SETTINGS:
        drawn = [
            markers.draw(setting, film, 64, 8, 0.3 * np.array([1, 0.75]), k)
            for k, film in enumerate(films)
        ]
        pair = [
            letters.look(world, films, [p._replace(is_present=there) for p in drawn])
            for there in (False, True)
        ]
        for k, one in enumerate(drawn):
            change = pair[1]["crop"][k].astype(int) - pair[0]["crop"][k]
            strokes = pair[1]["strokes"][k, markers.LETTERS.index(one.letter)]
            assert (strokes > 200).any() and (change[strokes > 200] > 80).all()
            assert np.abs(change[strokes == 0]).mean() < 4  # bicubic resizing rings
            box = markers.augment.crop(films[k], one.boxes[1], 256)
            top, left, height, width = (one.parts[0] * 32).tolist()
            by_hand = Image.fromarray(box[top : top + height, left : left + width]).resize((32, 32))
            assert np.abs(np.asarray(by_hand).astype(int) - pair[0]["crop"][k]).mean() < 4
        if setting == "hidden":
            assert np.array_equal(pair[1]["prediction"], pair[1]["clean"])
        assert not np.array_equal(pair[0]["target"], pair[1]["target"])
        assert np.array_equal(pair[0]["prediction"], pair[0]["clean"])


def test_the_share_is_that_of_the_true_letters_brightness():
    rng = np.random.default_rng(1)
    present = rng.integers(0, 2, 200)
    truth = 30 + 120 * present + rng.normal(size=200)
    there = np.zeros((200, len(letters.SOURCES)))
    columns = [letters.SOURCES.index(source) for source in ("truth", "prediction")]
    there[:, columns] = np.stack([truth, 50 + 36 * present + rng.normal(size=200)], 1)
    found = dict(there=there, present=present, patient=np.arange(200) // 2)
    halves = [
        {name: values[part] for name, values in found.items()}
        for part in (slice(90), slice(90, 200))
    ]
    got = letters.share_painted(halves, columns[1])
    assert got["low"] < got["percent"] < got["high"] < got["low"] + 2
    assert got["percent"] == pytest.approx(30, abs=0.5)
    assert letters.share_painted(halves, columns[0]) == {"percent": 100, "low": 100, "high": 100}


def test_a_probe_finds_what_features_hold_and_judges_new_patients():
    rng = np.random.default_rng(3)
    present, letter = rng.integers(0, 2, (2, 600)).astype(float)
    told = rng.normal(size=(600, 6))
    told[:, 0] += 3 * present
    told[:, 1] += 3 * letter * present
    found = dict(target=told, present=present, letter=letter, patient=np.arange(600) // 3 * 7)
    taught, asked = (
        {k: v[part] for k, v in found.items()} for part in (slice(390), slice(390, 600))
    )
    there, which = letters.probe(taught, asked, "target", 0)
    assert 90 < 100 * roc_auc_score(asked["present"], there) < 100  # 98 by the normal integral
    inked = asked["present"] == 1
    assert roc_auc_score(asked["letter"][inked], which[inked]) > 0.9
    taught["target"] = rng.normal(size=(390, 6))
    there, _ = letters.probe(taught, asked | {"target": rng.normal(size=(210, 6))}, "target", 0)
    assert 0.35 < roc_auc_score(asked["present"], there) < 0.65


def test_a_decoder_paints_the_letters_that_it_is_told_of():
    rng = np.random.default_rng(2)
    present, letter = rng.integers(0, 2, (2, 900)).astype(float)
    strokes = np.stack([squares()] * 900)
    shade = rng.integers(20, 60, 900)
    own = strokes[np.arange(900), letter.astype(int)]
    is_ink = (own > 0) & (present[:, None, None] == 1)
    crops = np.where(is_ink, 250, shade[:, None, None]).astype(np.uint8)
    told = np.stack([present, present * (2 * letter - 1), shade], 1).astype(np.float32)
    told = np.concatenate([told, rng.normal(size=(900, 5)).astype(np.float32)], 1)
    taught = {"target": told[:800], "crop": crops[:800]}
    decoder = letters.teach(taught, "target", 0, "cpu")
    asked = {"target": told[800:], "prediction": told[800:] * [0, 0, *[1] * 6], "crop": crops[800:]}
    asked["prediction"] = asked["prediction"].astype(np.float32)
    inked = present[800:] == 1
    for source, low, high in (("ceiling", 99, 100), ("translated", 25, 75)):
        blocks = letters.paint({"target": decoder}, asked, source)
        there, which = letters.read(blocks, strokes[800:], letter[800:])
        assert low <= 100 * roc_auc_score(present[800:], there) <= high
        assert low <= 100 * roc_auc_score(letter[800:][inked], which[inked]) <= high
    error = letters.paint({"target": decoder}, asked, "ceiling").astype(int) - crops[800:]
    assert np.abs(error).mean() < 12


@pytest.mark.slow
def test_the_program_paints_patients_that_its_decoders_have_not_seen(
    place, here, monkeypatch, capsys
):
    found = []
    asked = []
    collect = markers.collect
    answer = letters.answer
    monkeypatch.setattr(markers, "collect", lambda *a: found.append(collect(*a)) or found[-1])
    monkeypatch.setattr(letters, "answer", lambda *a: asked.append(a[2]) or answer(*a))
    words = "--data set/films --allow_seen --draws 1 --seeds 2"
    here("letters", "--weights", "runs/tiny", *words.split())
    for everything, some in zip(found, asked[::3], strict=True):  # the settings' are the same
        rest = set(everything["patient"]) - set(some["patient"])
        share = len(set(some["patient"])) / len(set(everything["patient"]))
        assert 0.25 < share < 0.4 and len(rest) > len(set(some["patient"]))
        count = np.isin(everything["patient"], list(set(some["patient"]))).sum()
        assert len(some["patient"]) == count  # no film of theirs is left to learn from
    result = json.loads((place / "runs" / "letters" / "result.json").read_text())
    for setting in markers.SETTINGS:
        sources = result["settings"][setting]
        assert list(sources) == list(letters.SOURCES)
        assert (
            sources["truth"]["present"]["percent"] > 99
            and sources["truth"]["share"]["percent"] == 100
        )
        assert len(sources["ceiling"]["present"]["seeds"]) == 2
    page = Image.open(place / "runs" / "letters" / "paintings.png")
    assert page.width > 6 * markers.SHOWN and page.height > 6 * markers.SHOWN
    words = capsys.readouterr().out
    assert "painted from the prediction" in words and "nobody can tell" in words


def test_a_letter_that_is_too_large_is_refused(here):
    with pytest.raises(letters.UserError, match="--letter 0.5"):
        here("letters", "--weights", "runs/tiny", "--letter", 0.5, "--out", "x")
