"""Finding, batching and cropping of films, against hand-made folders and slow re-statements."""

import numpy as np
import pytest
import torch
from conftest import REAL
from films_for_tests import TINY, film, needs_real, run, tree

from augment import crop, sample_boxes
from data import Batches, Views, open_films
from plumbing import keys
from plumbing.film import UnreadableFilm
from plumbing.launch import UserError
from plumbing.pack import InMemory, UnreadableFilms


# ---------------------------------------------------------------- finding
def test_any_folder(tmp_path):
    films = ["3.jfif", "CR.1.2.840.113564.99", "a/2.JPG", "a/b/c/1.png", "noname", "å ü/4.webp"]
    tree(tmp_path, films)
    tree(tmp_path, [".hidden.png", ".git/5.png", "index.html", "labels.csv", "DICOMDIR"])
    tree(tmp_path, ["a/README.txt", "a/notes.json"])
    tree(tmp_path, ["LICENSE", "1.2.3"], b"words")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    found = open_films(tmp_path)
    assert found.names == films == found.patients
    assert found[0].shape == (40, 40) and len(found) == 6
    assert "films: 6 in 4 folders" in found.summary[0]
    assert open_films(tmp_path, side=16)[3].shape == (16, 16)
    (tmp_path / "people.csv").write_text(
        "filename,patient_id\nb/c/1.png,anna\nsomewhere/else/3.jfif,ben\nx/1.png,nobody\n"
    )
    known = open_films(tmp_path, patients=tmp_path / "people.csv")
    assert known.patients == ["ben", *films[1:3], "anna", *films[4:]]


def test_nothing_to_open(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        open_films(tmp_path / "gone")
    tree(tmp_path, ["labels.csv", "LICENSE"], b"words")
    with pytest.raises(UserError, match="no films.*2 files"):
        open_films(tmp_path)


# ---------------------------------------------------------------- the commands
@pytest.mark.slow
def test_commands_and_their_errors(tmp_path):
    tree(tmp_path / "films", ["a/1.png", "b/2.jpg"])
    tree(tmp_path / "films", ["b/3.jpg"], TINY[: len(TINY) // 2])
    result = run("check", "--data", tmp_path / "films", "--workers", 2)
    assert result.returncode == 0
    assert "films: 3 in 2 folders" in result.stdout
    assert "2 of 3 films can be read" in result.stdout
    assert "bad: b/3.jpg: image file is truncated" in result.stdout
    for words, line in (
        (["check", "--data", tmp_path / "no"], "no such folder"),
        (["check", "--dta", "x"], "unrecognized arguments"),
        (["chek", "--data", "x"], "say what to do"),
        ([], "say what to do"),
    ):
        result = run(*words)
        assert result.returncode == 1 and line in result.stderr
        assert result.stderr.count("\n") == 1 and not result.stdout


# ---------------------------------------------------------------- batches
def slow_batches(n, batch, seed, steps):
    """Every step's global batch: the epochs' permutations, each cut to whole batches, in a row."""
    places = []
    for epoch in range(steps):
        order = np.random.default_rng((keys.ORDER, seed, epoch)).permutation(n).tolist()
        places += [(epoch, i) for i in order[: n - n % batch]]
    return [places[s * batch : (s + 1) * batch] for s in range(steps)]


@pytest.mark.parametrize("world,micro", [(1, 12), (1, 3), (2, 6), (2, 2), (4, 1), (3, 4)])
@pytest.mark.parametrize("start", [0, 1, 7])
def test_batches_are_the_same_for_every_team(world, micro, start):
    reference = slow_batches(50, 12, seed=5, steps=11)
    shares = [
        list(Batches(50, 12, micro, rank, world, 5, start_step=start, steps=11))
        for rank in range(world)
    ]
    per_step = 12 // world // micro
    count = len(Batches(50, 12, micro, 0, world, 5, start, 11))
    assert all(len(share) == per_step * (11 - start) == count for share in shares)
    for step in range(start, 11):
        first = (step - start) * per_step
        micros = [m for share in shares for m in share[first : first + per_step]]
        assert all(len(m) == micro for m in micros)
        assert [item for m in micros for item in m] == reference[step]


def test_batches_cover_an_epoch_and_differ_between_epochs():
    items = [item for m in Batches(48, 12, 12, 0, 1, 0, steps=8) for item in m]
    first, second = ([i for e, i in items if e == epoch] for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(48)) and first != second
    one, other = (list(Batches(48, 12, 12, 0, 1, seed, steps=1)) for seed in (0, 1))
    assert one != other
    assert len(list(Batches(50, 12, 12, 0, 1, 0))) == 4  # without `steps`: one epoch


def test_batches_that_cannot_be():
    with pytest.raises(UserError, match="11 films are fewer than one batch of 12"):
        Batches(11, 12, 12, 0, 1, 0, steps=1)
    with pytest.raises(UserError, match="not a multiple"):
        Batches(100, 12, 5, 0, 2, 0, steps=1)


# ---------------------------------------------------------------- views
class Memory:
    """Films in memory, some of them bad."""

    def __init__(self, count, bad=()):
        self.names = [f"{k}.png" for k in range(count)]
        self.bad = bad
        self.reads = 0

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        self.reads += 1
        if i in self.bad:
            raise UnreadableFilm("broken")
        return film(i, 90 + i % 7, 100)


def test_views_are_the_keyed_crops():
    item = Views(Memory(9), 32, seed=4)[(2, 5)]
    boxes, flips = sample_boxes(np.random.default_rng((keys.VIEWS, 4, 2, 5)), 95, 100)
    assert item["views"].shape == (2, 32, 32) and item["views"].dtype == np.uint8
    assert item["boxes"].dtype == np.float32 and item["unreadable"] == item["reason"] == ""
    for k in range(2):
        assert np.array_equal(item["views"][k], crop(film(5, 95, 100), boxes[k], 32, flips[k]))
        assert np.allclose(item["boxes"][k], boxes[k])
    keyed = [(4, 2, 5), (5, 2, 5), (4, 3, 5), (4, 2, 6)]
    same, *others = [Views(Memory(9), 32, seed=s)[(e, i)]["boxes"] for s, e, i in keyed]
    assert np.array_equal(same, item["boxes"])
    assert not any(np.array_equal(same, other) for other in others)


def test_views_do_not_depend_on_workers_or_ranks():
    views = Views(Memory(40, bad=(7, 8)), 24, seed=1)

    def whole(workers, micro, world):
        samplers = [
            Batches(40, 8, micro, rank, world, seed=3, start_step=2, steps=7)
            for rank in range(world)
        ]
        parts = [
            list(torch.utils.data.DataLoader(views, batch_sampler=s, num_workers=workers))
            for s in samplers
        ]
        per = 8 // world // micro
        rows = [parts[r][s * per + a] for s in range(5) for r in range(world) for a in range(per)]
        unreadable = [name for row in rows for name in row.pop("unreadable")]
        reasons = [reason for row in rows for reason in row.pop("reason")]
        return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}, unreadable, reasons

    reference, unreadable, reasons = whole(0, 8, 1)
    assert reference["views"].shape == (40, 2, 24, 24)
    assert set(zip(unreadable, reasons, strict=True)) == {
        ("", ""),
        ("7.png", "broken"),
        ("8.png", "broken"),
    }
    for other, *names_and_reasons in (whole(2, 8, 1), whole(1, 2, 1), whole(0, 4, 2)):
        assert all(torch.equal(reference[key], other[key]) for key in reference)
        assert names_and_reasons == [unreadable, reasons]


def test_a_bad_film_gives_way_to_the_next():
    views = Views(Memory(10, bad=(3, 4, 9)), 24, seed=1)
    assert [views[(0, i)]["unreadable"] for i in (3, 4, 5)] == ["3.png", "4.png", ""]
    assert np.array_equal(views.read(3)[0], film(5, 95, 100))
    assert np.array_equal(views.read(9)[0], film(0, 90, 100))
    some = Views(Memory(10, bad=(3, 4, 9)), 24, seed=1, subset=[9, 3, 8])
    assert len(some) == 3 and some[(0, 1)]["unreadable"] == "3.png"
    assert np.array_equal(some.read(0)[0], film(8, 91, 100))
    with pytest.raises(UserError, match="10 films in a row cannot be read, from 0.png on .broken."):
        Views(Memory(10, bad=range(10)), 24, seed=1)[(0, 0)]


def test_films_in_memory_are_read_once():
    behind = Memory(5, bad=(2,))
    for is_decoded_first in (False, True):
        films = InMemory(behind)
        behind.reads = 0
        if is_decoded_first:
            films.decode_all()
        for _ in range(2):
            assert all(np.array_equal(films[i], film(i, 90 + i, 100)) for i in (0, 1, 3, 4))
            with pytest.raises(UnreadableFilm, match="broken"):
                films[2]
        assert behind.reads == 5 and films.names == behind.names and len(films) == 5


@pytest.mark.parametrize("total,allowed", [(10, 1), (199, 1), (200, 2), (1000, 10)])
def test_unreadable_films_are_named_once_and_too_many_stop(total, allowed, capsys):
    unreadable = UnreadableFilms(total)
    for k in range(allowed):
        item = {"unreadable": ["", f"{k}.png"], "reason": ["", "broken"]}
        unreadable.note_batch(item)
        unreadable.note_batch(item)
    assert list(unreadable.reasons) == [f"{k}.png" for k in range(allowed)]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == allowed and said[0] == "bad film, skipped (1 so far): 0.png: broken"
    with pytest.raises(UserError, match=f"{allowed + 1} of {total:,} films .* 1 %: 0.png"):
        unreadable.note("another.png", "broken")


@needs_real
def test_real_films_are_found_and_read():
    found = open_films(REAL / "films", side=160)
    assert len(found) == 2050
    sample = [found[i] for i in range(0, 2050, 200)]
    assert all(min(f.shape) == 160 and f.std() > 5 for f in sample)


def test_a_run_inside_of_its_films_would_take_its_own_pictures_for_films(tmp_path):
    films = tree(tmp_path / "films", ["a.png", "b.png"])
    for out in (films, films / "runs" / "one"):
        with pytest.raises(UserError, match="choose another --out"):
            open_films(films, out)
    assert len(open_films(films, tmp_path)) == len(open_films(films, tmp_path / "films2")) == 2
