"""A table of one's own: columns, cells, patients and splits in every spelling, or refused.

One reader serves finetune.py --task csv and the linear probes; a property test writes tables with a
known truth in random ways.
"""

from types import SimpleNamespace

import pytest

from plumbing.launch import UserError
from plumbing.own_table import Labels


# ---------------------------------------------------------------- label tables of probes
def make_labels(tmp_path, text):
    (tmp_path / "table.csv").write_text(text)
    return Labels(tmp_path / "table.csv")


def films_named(*names):
    return SimpleNamespace(names=list(names))


def refused(call, *words):
    """The call ends with one line that holds these words, in this order."""
    with pytest.raises(UserError, match=".*".join(words)) as error:
        call()
    assert "\n" not in str(error.value)


def test_labels_of_several_classes(tmp_path):
    rows = [
        "filename,label,patient_id,split",
        "a.png,effusion|nodule,p1,train",
        "b.png,normal,p2,Val",
        "c.png, nodule ,,test",
        "d.png,No Finding,p3,test",
    ]
    labels = make_labels(tmp_path, "\n".join(rows))
    assert labels.classes == ["effusion", "nodule"]
    assert labels.y.tolist() == [[1, 1], [0, 0], [0, 1], [0, 0]]
    assert labels.split.tolist() == ["train", "val", "test", "test"]
    assert labels.patients == ["p1", "p2", "c.png", "p3"]
    assert labels.names == ["a.png", "b.png", "c.png", "d.png"]


SPLIT_ROWS = "filename,label,split\na,x,train\nb,x,val\n"


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "no row below its header .empty"),
        ("filename,label,split\n", "no row below its header .filename, label, split"),
        ("filename,label\na,b\nc,normal\n", "no column split, which a probe needs"),
        ("filename,mask,split\na,b.png,train\n", "no column label or mask, and none of 0 and 1"),
        ("filename,label,split\na.png,x\n", "line 2: 2 cells where the header has 3"),
        ("filename,label,split\n,x,train\n", "line 2: column filename names no film"),
        ("filename,label,split\na,x,train\nb,x,vaal\n", "line 3: column split must say"),
        ("filename,label,split\na,x,train\nb,x,\n", "line 3: column split must say .*, not ''"),
        (SPLIT_ROWS + "a,x,test\n", "lines 2 and 4: a stands twice, with a different split"),
        (SPLIT_ROWS + "a,normal,train\n", "lines 2 and 4: a stands twice.*different label"),
        ("filename,label,split,pid\na,x,train,7\nb,x,test,7.0\n", "patient 7 has films in"),
    ],
)
def test_a_wrong_table_of_a_probe_is_one_line(tmp_path, text, words):
    refused(lambda: make_labels(tmp_path, text), "table.csv", words)


def test_a_missing_table_is_one_line(tmp_path):
    refused(lambda: Labels(tmp_path / "none.csv"), "no such file")


def test_a_probe_needs_films_of_all_three_splits_and_both_answers(tmp_path):
    films = films_named("a.png", "b.png", "c.png", "d.png")
    rows = SPLIT_ROWS + "d,normal,train\n"
    refused(lambda: make_labels(tmp_path, rows).complete(films), "no film of split test")
    rows += "c,normal,test\n"
    refused(lambda: make_labels(tmp_path, rows).complete(films), "no class of x .* in test")
    labels = make_labels(tmp_path, rows + "e,x,test\n")
    refused(lambda: labels.complete(films), "no class of x .* in test")  # e is not there
    assert labels.complete(films_named("a", "b", "c", "d", "e")) is labels
    rows = rows.replace("d,normal", "d,x") + "e,x,test\n"
    refused(
        lambda: make_labels(tmp_path, rows).complete(films_named(*"abcde")), "no class .* in train"
    )


def test_rows_find_their_films_by_the_tail_of_the_path(tmp_path):
    """CheXpert calls every film view1_frontal.jpg: a base name is not enough."""
    rows = [
        "filename,label,split",
        "CheXpert/train/patient1/view1.jpg,x,train",
        "CheXpert/train/patient2/view1.jpg,z,train",
        "gone.jpg,x,test",
        "plain.png,x,test",
    ]
    films = films_named(
        "patient2/view1.jpg", "deep/below/plain.png", "patient1/view1.jpg", "patient3/view1.jpg"
    )
    labels = make_labels(tmp_path, "\n".join(rows))
    assert labels.locate(films).tolist() == [2, 0, -1, 1]
    assert "1 of 4 films are not there: gone.jpg, ..." in labels.describe()


def test_a_row_that_fits_two_films_or_a_table_that_fits_none_is_refused(tmp_path):
    labels = make_labels(tmp_path, "filename,label,split\nview1.jpg,x,train\n")
    films = films_named("patient1/view1.jpg", "patient2/view1.jpg")
    refused(lambda: labels.locate(films), "line 2: view1.jpg fits both", "patient2/view1.jpg")
    refused(lambda: labels.locate(films_named("other.jpg")), "none of its 1 films")


def test_rows_that_turn_out_to_be_of_one_film_must_agree(tmp_path):
    rows = "filename,label,split\nx/a.png,x,train\na.png,x,train\nb,normal,train\n"
    films = films_named("x/a.png", "b.png")
    labels = make_labels(tmp_path, rows)
    assert labels.locate(films).tolist() == [0, -1, 1]
    assert "1 repeated rows dropped" in labels.describe()
    labels = make_labels(tmp_path, rows.replace("\na.png,x", "\na.png,normal"))
    refused(lambda: labels.locate(films), "lines 2 and 3: a.png stands twice")
