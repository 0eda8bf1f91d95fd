"""Splits: no patient on two sides, draws by seed, and the sentences that say what was decided."""

import re
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from plumbing.film import EMPTY_MASK
from plumbing.launch import UserError
from plumbing.own_table import Labels
from plumbing.results import describe_task, refuse_untestable
from plumbing.splits import (
    Example,
    Splits,
    class_warnings,
    complete,
    disjoint,
    draw_few,
    hold_out_films,
    warn_of_copies,
)


def make_films(patients):
    """Films without pixels, {name: patient}."""

    class Films(SimpleNamespace):
        def __len__(self):
            return len(self.names)

    return Films(names=list(patients), patients=list(patients.values()), links={})


def make_labels(tmp_path, rows, films):
    path = tmp_path / "table.csv"
    path.write_text("\n".join(["filename,label,split,patient_id", *rows]))
    return Labels(path, films)


def example(name, target=(0,), patient=None):
    return Example(Path(name), target, patient or name)


# ---------------------------------------------------------------- films held out of pre-training
def test_a_tenth_of_the_films_is_held_out_with_all_films_of_their_patients():
    films = make_films({f"{k}.png": f"p{k // 4}" for k in range(80)})
    train, held = hold_out_films(films, [], holdout=50, seed=1)
    # The same films as ever: runs of earlier versions are judged on what they have not seen.
    assert held.tolist() == sorted(np.random.default_rng((3, 1)).permutation(80)[:8])
    held_patients = {films.patients[i] for i in held}
    rest = [i for i in range(80) if films.patients[i] not in held_patients]
    assert train.tolist() == rest and len(rest) < 80 - 8
    assert len(hold_out_films(films, [], holdout=3, seed=1)[1]) == 3
    assert hold_out_films(films, [], holdout=50, seed=2)[1].tolist() != held.tolist()


def test_the_test_films_of_a_table_are_held_out_and_the_table_may_know_the_patient(tmp_path):
    known = {"a.png": "nih:1", "b.png": "nih:1", "c.png": "nih:2"}
    unknown = {name: name for name in ("d.png", "e.png", "f.png")}  # the folder knows nobody
    films = make_films(known | unknown)
    rows = ["a.png,x,test,9", "c.png,x,train,8", "d.png,x,test,7"]
    tables = [make_labels(tmp_path, part, films) for part in (rows, ["e.png,x,train,7"])]
    train, held = hold_out_films(films, tables, holdout=2, seed=0)
    assert [films.names[i] for i in held] == ["a.png", "d.png"]
    assert [films.names[i] for i in train] == ["c.png", "f.png"]  # b, e: of a held-out patient


def test_rows_without_a_label_still_tell_whose_films_are_held_out(tmp_path):
    films = make_films({name: name for name in ("a.png", "b.png", "c.png", "d.png")})
    rows = ["a.png,1,test,7", "b.png,NA,test,7", "c.png,-1,train,7", "d.png,0,train,8"]
    train, held = hold_out_films(films, [make_labels(tmp_path, rows, films)], 2, seed=0)
    assert [films.names[i] for i in held] == ["a.png"]
    assert [films.names[i] for i in train] == ["d.png"]


def test_holding_everything_out_is_refused(tmp_path):
    films = make_films({"a.png": "p", "b.png": "p"})
    table = make_labels(tmp_path, ["a.png,x,test,p"], films)
    with pytest.raises(UserError, match="every film is held out"):
        hold_out_films(films, [table], holdout=2, seed=0)


# ---------------------------------------------------------------- splits of a task
def test_missing_splits_are_drawn_by_patient_and_always_the_same():
    films = [example(f"{k}.png", patient=f"p{k // 3}") for k in range(60)]
    parts, notes = complete({"all": films}, (70, 10, 20))
    assert sum(map(len, parts.values())) == 60
    patients = [{film.patient for film in parts[split]} for split in ("train", "val", "test")]
    assert sum(map(len, patients)) == len(set().union(*patients)) == 20
    assert [len(parts[split]) for split in ("train", "val", "test")] == [42, 6, 12]
    assert parts == complete({"all": films}, (70, 10, 20))[0]
    assert [note.partition(":")[0] for note in notes] == ["test", "val"]
    given = {"train": films[:30], "val": films[30:40], "test": films[40:]}
    assert complete(given, (70, 10, 20)) == (given, [])


@pytest.mark.parametrize("has_patients", [True, False])
def test_few_patients_change_sides_when_rows_of_a_table_come_or_go(has_patients):
    films = [example(f"a/{k}.png", patient=f"P{k // 2}" * has_patients) for k in range(600)]

    def split_of(films, by_name=True):
        """The split of every film."""
        parts, _ = complete({"all": films}, (72, 8, 20), by_name)
        assert len(parts["test"]) == pytest.approx(len(films) / 5, abs=2)
        return {film.path.stem: split for split, part in parts.items() for film in part}

    before = split_of(films)
    for some in (films[:-2], films[2:], films[7:580], films[::-1]):
        assert sum(before[name] != split for name, split in split_of(some).items()) <= 8
    half = split_of(films[::3])  # as another column may know of
    assert sum(before[name] != split for name, split in half.items()) < 0.1 * len(half)
    again = [film._replace(path=Path(f"b/{film.path.stem}.JPG")) for film in films]  # saved anew
    if not has_patients:
        again = [film._replace(patient=f"{film.path.name}") for film in again]
    assert split_of(again) == before
    by_position = [split_of(part, by_name=False) for part in (films, films[2:])]
    assert sum(by_position[0][name] != split for name, split in by_position[1].items()) > 100


def test_films_of_one_name_in_many_folders_are_not_drawn_together():
    films = []
    for k in range(200):
        kind = "ill" if k < 100 else "well"
        films += [example(f"{kind}/case{k}/{view}.png") for view in ("pa", "lateral")]
    parts, _ = complete({"all": films}, (72, 8, 20), by_name=True)
    for part in parts.values():
        assert 0.3 < np.mean([film.path.stem == "pa" for film in part]) < 0.7
        assert 0.3 < np.mean(["ill" in film.path.parts for film in part]) < 0.7


def test_films_not_rows_are_counted_that_are_drawn():
    films = [example(f"{k}.png") for k in range(20)]
    parts, notes = complete({"all": films + films}, (72, 8, 20), by_name=True)
    kept, _ = disjoint(parts)
    counts = [int(re.search(r"\d+", note)[0]) for note in notes]
    assert counts == [len(kept["test"]), len(kept["val"])] == [4, 2]


def test_a_name_draws_alike_however_a_machine_writes_its_letters():
    films = [example(f"Müller{k}.png") for k in range(60)]
    apart = [example(unicodedata.normalize("NFD", film.patient)) for film in films]
    here, there = (complete({"all": some}, (72, 8, 20), True)[0] for some in (films, apart))
    names = [film.path.name for film in here["test"]]
    assert names == [unicodedata.normalize("NFC", film.path.name) for film in there["test"]]


def test_a_film_stays_in_one_split_test_before_train_before_val():
    a, b, c, d = (example(name) for name in "abcd")
    parts, notes = disjoint({"train": [a, a, b, c], "val": [b, d], "test": [c]})
    assert parts == {"test": [c], "train": [a, b], "val": [d]}
    assert notes == [
        "train: 1 repeated rows dropped",
        "train: 1 films removed that are in test too",
        "val: 1 films removed that are in train too",
    ]


def test_rows_that_contradict_each_other_and_patients_in_two_splits_are_refused():
    with pytest.raises(UserError, match="a stands twice in train, with different labels"):
        disjoint({"train": [example("a", (0,)), example("a", (1,))]})
    with pytest.raises(UserError, match="patient p has films in test and in train"):
        disjoint({"train": [example("a", patient="p")], "test": [example("b", patient="p")]})


# ---------------------------------------------------------------- few films
HUNDRED = [example(f"{k}.png", (int(k % 10 == 0), int(k % 3 == 0))) for k in range(100)]


@pytest.mark.parametrize("kind", [dict(fraction=0.1), dict(shots=4)])
def test_draws_are_keyed_by_seed(kind):
    drawn = draw_few(HUNDRED, draw=1, **kind)
    assert drawn == draw_few(HUNDRED, draw=1, **kind) != draw_few(HUNDRED, draw=2, **kind)


def test_one_film_under_two_names_in_two_splits_is_told(tmp_path):
    rng = np.random.default_rng(0)
    contents = [rng.bytes(100_000) for _ in range(4)]
    other = contents[0][:50_000] + b"!!" + contents[0][50_002:]
    contents += [other, contents[1], contents[2][:99_999]]  # one copy: of 1
    examples = []
    for k, content in enumerate(contents):
        (tmp_path / f"{k}.png").write_bytes(content)
        examples.append(Example(tmp_path / f"{k}.png", (1,), str(k)))
    examples.append(Example(tmp_path / "gone.png", (1,), "8"))
    parts = {"train": examples[:4], "val": [], "test": examples[4:]}
    (note,) = warn_of_copies(parts)
    assert note.startswith("warning: 1 films are in two splits")
    assert "1.png (train) and 5.png (test)" in note
    assert warn_of_copies({"train": examples, "val": [], "test": []}) == []


def test_draws_have_the_wanted_size():
    assert len(draw_few(HUNDRED, 0.1)) == 10
    assert len(draw_few(HUNDRED, 0.29)) == 29 and 0.29 * 100 < 29
    assert draw_few(HUNDRED) == HUNDRED
    assert len(draw_few(HUNDRED, 1e-9)) == 1
    few = draw_few(HUNDRED, shots=4)
    assert all(sum(film.truth[k] for film in few) >= 4 for k in (0, 1))
    assert sum(not any(film.truth) for film in few) == 4
    assert len(few) <= 12


def test_shots_of_segmentation_are_films_with_a_mask_and_films_without(tmp_path):
    Image.new("L", (9, 9)).save(tmp_path / "empty.png")
    corner = Image.new("L", (9, 9))
    corner.putpixel((0, 0), 255)
    corner.save(tmp_path / "corner.png")
    boxes = ("boxes", ((1, 1, 3, 3),), (9, 9))
    marked = [boxes, ("rle", ("3 2",), (9, 9)), ("file", tmp_path / "corner.png")]
    empty = [EMPTY_MASK, ("rle", (), (9, 9)), ("file", tmp_path / "empty.png")]
    masks = marked + empty * 15
    films = [Example(Path(f"{k}.png"), (), str(k), mask) for k, mask in enumerate(masks)]
    for draw in range(5):
        drawn = draw_few(films, shots=2, draw=draw)
        assert [film.mask in marked for film in drawn] == [True, True, False, False]
    splits = Splits("siim", "mask", ("pneumothorax",), films, films, films)
    refuse_untestable(splits, films)
    with pytest.raises(UserError, match="none of the 45 training films has a mask"):
        refuse_untestable(splits, films[3:])


def test_labels_that_are_not_known_are_counted_and_are_no_negatives():
    targets = [(1, 0), (0, None), (None, None), (None, 1), (0, 0)]
    films = [example(f"{k}.png", target) for k, target in enumerate(targets)]
    splits = Splits("csv", "labels", ("a", "b"), films, films[:2], films[1:2], [])
    counts = splits.counts()
    assert counts["train"]["positive"] == {"a": 1, "b": 1}
    assert counts["train"]["unknown"] == {"a": 2, "b": 2}
    assert counts["test"]["unknown"] == {"b": 1}
    assert class_warnings(splits, ["val", "test"]) == [
        "warning: val has only 1 films with a: which step is best is mostly luck",
        "warning: val has no positive film of b: it does not count in model selection",
        "warning: test has no positive film of a: it has no AUROC",
        "warning: of no film of test is b known: it has no AUROC",
    ]
    without_finding = draw_few(films, shots=9)  # 0 and 3 have a finding, of 1 and 2 nobody knows
    assert [film.path.name for film in without_finding] == ["0.png", "3.png", "4.png"]
    splits.notes[:] = ["warning: copies", "split: none"]
    said = describe_task(Path("films"), splits)
    assert said.index("split: none") < said.index("warning: copies")  # warnings stand last
    assert (
        "train: 5 films, patients unknown: every film counts as one (a 1 and 2 unknown, b" in said
    )
    with pytest.raises(UserError, match="among the 1 test films: nothing can be measured"):
        refuse_untestable(splits, splits.train)
    splits = Splits("csv", "labels", ("a", "b"), films[:1], films, films, [])
    with pytest.raises(UserError, match="among the 1 training films: nothing can be learnt"):
        refuse_untestable(splits, splits.train)


def test_classes_without_positives_are_named():
    splits = Splits("csv", "labels", ("rare", "third"), HUNDRED[1:10], HUNDRED, HUNDRED[:1], [])
    assert class_warnings(splits) == [
        "warning: train has no positive film of rare: it cannot be learnt",
        "warning: test has no negative film of rare: it has no AUROC",
        "warning: test has no negative film of third: it has no AUROC",
    ]


def test_of_exclusive_classes_the_choice_is_by_right_guesses():
    splits = Splits("rsna", "classes", ("rare", "third"), HUNDRED, HUNDRED[1:10], HUNDRED, [])
    assert class_warnings(splits, ["val"])[0] == (
        "warning: val has no positive film of rare: model selection sees only whether other films "
        "are taken for it"
    )


def test_few_films_with_a_finding_or_without_it_are_told_where_they_choose_or_judge():
    films = [example(f"{k}.png", (int(k < 4), int(k > 2), int(k % 2))) for k in range(20)]
    splits = Splits("csv", "labels", ("a", "b", "c"), films, films, films, [])
    assert class_warnings(splits) == [
        "warning: val has only 4 films with a: which step is best is mostly luck",
        "warning: val has only 3 films without b: which step is best is mostly luck",
        "warning: test has only 4 films with a: its AUROC is mostly luck",
        "warning: test has only 3 films without b: its AUROC is mostly luck",
        "warning: test has only 10 films with c: the 95 % interval of its AUROC is too narrow",
    ]
