"""Tables: what read_table forgives and refuses, and the label tables of linear probes."""

import gzip
import time
from types import SimpleNamespace

import pytest

from plumbing import benchmarks
from plumbing.launch import UserError
from plumbing.table import (
    NEGATIVE,
    Labels,
    match,
    number,
    read_findings,
    read_list,
    read_table,
    without_suffix,
)


# ---------------------------------------------------------------- files
def test_a_table_is_read_whatever_its_spaces_commas_and_line_ends(tmp_path):
    path = tmp_path / "t.csv"
    text = '\ufeffname, label ,b\r\n a.png , "x, y" ,1,\r\n\r\nb.png\r\n'
    path.write_bytes(text.encode())
    assert read_table(path) == [
        {"name": "a.png", "label": "x, y", "b": "1"},
        {"name": "b.png", "label": "", "b": ""},
    ]
    assert read_table(path, "b", "name") == [
        {"b": "1", "name": "a.png"},
        {"b": "", "name": "b.png"},
    ]


def test_a_zipped_table_is_read_by_its_suffix(tmp_path):
    with gzip.open(tmp_path / "t.csv.gz", "wt") as file:
        file.write("a,b\n1,2\n")
    assert read_table(tmp_path / "t.csv.gz", "a") == [{"a": "1"}]


@pytest.mark.parametrize("header, names", [("a;b", "a;b"), ("", "none")])
def test_a_missing_column_is_named_with_those_that_are_there(tmp_path, header, names):
    (tmp_path / "t.csv").write_text(f"{header}\n1;2\n")
    with pytest.raises(UserError, match=f"t.csv: no column b; its columns are {names}$"):
        read_table(tmp_path / "t.csv", "b")


@pytest.mark.parametrize(
    "name, content",
    [
        ("latin.csv", "a,b\n1,Erguß".encode("cp1252")),
        ("junk.csv.gz", b"\x1f\x8bjunk"),
        ("plain.csv.gz", b"a,b"),
        ("absent.csv", None),
    ],
)
def test_what_is_no_table_is_one_line(tmp_path, name, content):
    if content:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: cannot be read as a table") as error:
        read_table(tmp_path / name)
    assert "\n" not in str(error.value)


def test_lists_keep_their_numbers_and_names_their_dots(tmp_path):
    path = tmp_path / "l.txt"
    path.write_bytes(b"a.png 0,1,0\r\nb,1\r\n\r\nc\r\n")
    assert read_list(path) == [("a.png", (0, 1, 0)), ("b", (1,)), ("c", ())]
    path.write_text("a.png zero one")
    with pytest.raises(UserError, match="l.txt: not a split list"):
        read_list(path)
    assert without_suffix("DX.1.2.392.png") == "DX.1.2.392"
    assert without_suffix("CR.1.3.12") == "CR.1.3.12"
    assert without_suffix("a/b.dicom") == "a/b"


# ---------------------------------------------------------------- cells
def test_words_and_blanks_are_the_number_0():
    cells = ["1.0", "-1", "", "nan", "yes"]
    assert [number(cell) for cell in cells] == [1, -1, 0, 0, 0]


def test_every_word_of_negative_names_no_finding():
    cells = [word.upper() for word in NEGATIVE] + ["No Finding| mass "]
    classes, findings = read_findings(cells)
    assert classes == ["mass"]
    assert findings == [set()] * len(NEGATIVE) + [{"mass"}]


def test_a_probe_and_the_csv_task_learn_the_same_targets(tmp_path):
    words = ["normal", "pneumonia", "No Finding", "no_finding", "pneumonia", "none"]
    rows = ["filename,label,split"]
    for k, word in enumerate(words):
        (tmp_path / f"{k}.png").write_bytes(b"")
        rows.append(f"{k}.png,{word},{['train', 'val', 'test'][k % 3]}")
    path = tmp_path / "t.csv"
    path.write_text("\n".join(rows))
    labels = Labels(path)
    splits = benchmarks.load_task("csv", tmp_path, path)
    assert labels.classes == list(splits.labels) == ["pneumonia"]
    examples = sorted(splits.train + splits.val + splits.test)
    assert [example.target for example in examples] == [tuple(row) for row in labels.y.tolist()]
    assert labels.y[:, 0].tolist() == [0, 1, 0, 0, 1, 0]


# ---------------------------------------------------------------- paths
def test_a_row_matches_a_film_when_one_path_ends_with_the_other():
    listed = ["b/1.png", "z/c/2.png", "d/2.png", "11.png"]
    found = match(["a/b/1.png", "1.png", "x11.png", "c/2.png"], listed)
    assert found == ["b/1.png", "b/1.png", None, "z/c/2.png"]
    many = [f"train/patient{k:05d}/study1/view1_frontal.jpg" for k in range(20000)]
    began = time.time()
    found = match(many, [f"CheXpert-v1.0/{name}" for name in many[::2]])
    assert found[:2] == [f"CheXpert-v1.0/{many[0]}", None]
    assert time.time() - began < 5


# ---------------------------------------------------------------- label tables of probes
def make_labels(tmp_path, text):
    (tmp_path / "table.csv").write_text(text)
    return Labels(tmp_path / "table.csv")


def films_named(*names):
    return SimpleNamespace(names=list(names))


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


WRONG = {
    "": ["nothing"],
    "filename,label\na,b\n": ["filename", "split"],
    "filename,label,split\n": ["nothing"],
    "filename,label,split\na.png,x\n": ["line 2"],
    "filename,split,label\na.png,train,\nb.png,train\n": ["line 3", "a label", "b.png,train,"],
    "filename,label,split\n,x,train\n": ["line 2"],
    "filename,label,split\na.png,x,train\nb.png,y,valid\n": ["line 3", "valid", "train, val, test"],
}


@pytest.mark.parametrize("text, words", WRONG.items())
def test_a_wrong_table_is_one_line(tmp_path, text, words):
    with pytest.raises(UserError, match="table.csv") as error:
        make_labels(tmp_path, text)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words)


def test_a_missing_table_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        Labels(tmp_path / "none.csv")


def test_a_probe_needs_all_three_splits_and_a_class(tmp_path):
    rows = "filename,label,split\na,x,train\nb,x,val\n"
    with pytest.raises(UserError, match="films of all three splits"):
        make_labels(tmp_path, rows).complete()
    labels = make_labels(tmp_path, rows + "c,normal,test\n")
    assert labels.complete() is labels
    with pytest.raises(UserError, match="no class"):
        make_labels(tmp_path, rows.replace("x", "normal") + "c,normal,test\n").complete()


def test_rows_find_their_films_by_the_tail_of_the_path(tmp_path):
    """CheXpert calls every film view1_frontal.jpg: a base name is not enough."""
    rows = [
        "filename,label,split",
        "CheXpert/train/patient1/view1.jpg,x,train",
        "CheXpert/train/patient2/view1.jpg,y,train",
        "gone.jpg,x,test",
        "plain.png,x,test",
    ]
    films = films_named(
        "patient2/view1.jpg", "deep/below/plain.png", "patient1/view1.jpg", "patient3/view1.jpg"
    )
    assert make_labels(tmp_path, "\n".join(rows)).locate(films).tolist() == [2, 0, -1, 1]


def test_a_row_that_fits_two_films_or_a_table_that_fits_none_is_refused(tmp_path):
    labels = make_labels(tmp_path, "filename,label,split\nview1.jpg,x,train\n")
    with pytest.raises(UserError, match="fits both patient1/view1.jpg and patient2/view1.jpg"):
        labels.locate(films_named("patient1/view1.jpg", "patient2/view1.jpg"))
    with pytest.raises(UserError, match="none of its 1 films"):
        labels.locate(films_named("other.jpg"))
