"""A table of one's own: columns, cells, patients and splits in every spelling, or refused.

One reader serves finetune.py --task csv and the linear probes; a property test writes tables with a
known truth in random ways.
"""

import csv
import io
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from plumbing import benchmarks
from plumbing.folder import Index
from plumbing.launch import UserError
from plumbing.own_table import Labels
from plumbing.table import plain


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


# ---------------------------------------------------------------- tables with a known truth
FOLDER = [f"set/p{k // 2}/film{k:02d}.png" for k in range(24)]
FINDINGS = ("Pleural Effusion", "Mass", "Nodule")
SAY = {
    1: ["1", "1.0", "yes", "Y", "TRUE", "positive", "Present", "1,0"],
    0: ["0", "0.0", "No", "n", "false", "NEGATIVE", "absent", "0,00"],
    -1: ["-1", "-1.0", "uncertain", "Equivocal"],
    None: ["", "NA", "nan", "N/A", "null", "-", "?", " "],
}
NAMES = {
    "film": ["filename", "Image Index", "image_id", "PATH", "image-name", "DICOM ID", "File"],
    "patient": ["patient_id", "Patient ID", "SUBJECT-ID", "PatientID", "pid", "subject"],
    "split": ["split", "Set", "FOLD", "subset"],
    "label": ["label", "Finding Labels", "LABELS", "Diagnosis", "class", "findings"],
}
SPLIT_SAY = {
    "train": ["train", "Training", "TRAIN"],
    "val": ["val", "valid", "Validation", "dev", "validate"],
    "test": ["test", "Testing", "TEST"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("films")
    for name in FOLDER:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(root / name)
    return root


class Truth:
    """What a random table is to say: values[film][label] of 1, 0, -1 and None, split, patient."""

    def __init__(self, rng, style):
        self.style = style
        self.has_split = rng.random() < 0.7
        self.has_patient = rng.random() < 0.7
        p = [0.35, 0.45, 0.08, 0.12] if style == "columns" else [0.4, 0.6, 0, 0]
        self.values = []
        for _ in FOLDER:
            row = [(1, 0, -1, None)[i] for i in rng.choice(4, 3, p=p)]
            if style == "answer":
                row = [(1, 0, -1, None)[rng.choice(4, p=[0.35, 0.45, 0.08, 0.12])]]
            if style != "columns" and style != "answer" and rng.random() < 0.1:
                row = [None] * 3
            self.values.append(row)
        for k in range(3):  # each label is known of some film either way
            self.values[k] = [1] * len(row)
            self.values[k + 8] = [0] * len(row)
        self.split = [("train", "train", "val", "test")[k // 6] for k in range(len(FOLDER))]

    def expected(self, uncertain):
        """{film: (target, patient, split)} of the rows that count."""
        result = {}
        for k, name in enumerate(FOLDER):
            become = {-1: {"positive": 1, "negative": 0}.get(uncertain)}
            target = tuple(become.get(value, value) for value in self.values[k])
            if set(target) != {None}:
                patient = k // 2 if self.has_patient else name
                result[name] = target, patient, self.split[k] if self.has_split else None
        return result


def column_name(rng, role):
    name = rng.choice(NAMES[role])
    cases = [str, str.lower, str.upper, str.title]
    return cases[rng.integers(4)](str(name).replace(" ", rng.choice([" ", "_", "-", ""])))


def film_name(rng, name):
    spelt = [name, name.removeprefix("set/"), name.rpartition("/")[2], f"/home/x/{name}"]
    spelt += [name.replace("/", "\\"), "C:\\a\\" + name.replace("/", "\\"), "./" + name]
    spelt += [name.upper(), name.removesuffix(".png"), f"https://h/{name}?x=1"]
    spelt += [name.replace(".png", ".dcm"), f"elsewhere/{name.rpartition('/')[2]}"]
    return str(rng.choice(spelt))


def findings_cell(rng, row, divider):
    if row == [None] * 3:
        return str(rng.choice(["", "NA", "nan", "-"]))
    found = [name for name, value in zip(FINDINGS, row, strict=True) if value]
    if not found:
        return str(rng.choice(["No Finding", "normal", "none", "no_finding", "NEGATIVE"]))
    spelt = [rng.choice([n, n.lower(), n.upper(), n.replace(" ", "_")]) for n in found]
    rng.shuffle(spelt)
    return divider.join(spelt)


def write_randomly(rng, truth, path):
    """Write a table that says the truth, in one of very many ways."""
    divider = str(rng.choice(["|", ";", ",", " | ", ", ", "; ", "\n"]))
    header = [column_name(rng, "film")]
    columns = [[film_name(rng, name) for name in FOLDER]]
    if truth.style == "columns":
        header += FINDINGS
        columns += [[str(rng.choice(SAY[row[c]])) for row in truth.values] for c in range(3)]
    else:
        header.append(column_name(rng, "label"))
        if truth.style == "answer":
            columns.append([str(rng.choice(SAY[row[0]])) for row in truth.values])
        else:
            columns.append([findings_cell(rng, row, divider) for row in truth.values])
    if truth.has_patient:
        header.append(column_name(rng, "patient"))
        ways = ("{}", "{}.0", "{:03d}", " {} ")
        columns.append([str(rng.choice(ways)).format(k // 2) for k in range(len(FOLDER))])
    if truth.has_split:
        header.append(column_name(rng, "split"))
        columns.append([str(rng.choice(SPLIT_SAY[split])) for split in truth.split])
    header.append("Patient Age")
    columns.append([f"{k + 30}" for k in range(len(FOLDER))])
    order = rng.permutation(len(header))
    rows = [[columns[c][k] for c in order] for k in rng.permutation(len(FOLDER))]
    lines = [[header[c] for c in order], *rows]
    if rng.random() < 0.3:
        lines = [[*line, "", ""] for line in lines[:-1]] + [lines[-1]]
    lines += [[""] * len(header)] * rng.integers(3)
    text = io.StringIO()
    csv.writer(
        text,
        delimiter=str(rng.choice([",", ";", "\t"])),
        lineterminator=str(rng.choice(["\n", "\r\n"])),
        quoting=int(rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])),
    ).writerows(lines)
    path.write_bytes(text.getvalue().encode(rng.choice(["utf-8", "utf-8-sig", "utf-16"])))
    return text.getvalue()


def read_by_both(root, path, uncertain="ignore"):
    """{film: (target, patient, split)} as finetune and, with splits, as a probe reads the table."""
    index = Index(root)
    found = benchmarks.read_csv(index, path, None, uncertain)
    films = {}
    for split, rows in found.parts.items():
        for row in rows:
            name = row.path.relative_to(root).as_posix()
            films[name] = row.target, row.patient, None if split == "all" else split
    if "all" not in found.parts and uncertain == "ignore":
        labels = Labels(path)
        where = labels.locate(films_named(*FOLDER))
        probe = {}
        for row, i in enumerate(where):
            target = tuple(None if np.isnan(v) else int(v) for v in labels.y[row])
            probe[FOLDER[i]] = target, labels.patients[row], labels.split[row]
        assert probe == films and labels.classes == list(found.labels)
    return films, found


@pytest.mark.parametrize("style", ["columns", "answer", "names"])
def test_random_tables_say_the_truth_however_they_are_written(folder, tmp_path, style):
    for seed in range(60):
        rng = np.random.default_rng((seed, len(style)))
        truth = Truth(rng, style)
        uncertain = "ignore" if style == "names" else str(rng.choice(["ignore", "positive"]))
        text = write_randomly(rng, truth, tmp_path / "t.csv")
        films, found = read_by_both(folder, tmp_path / "t.csv", uncertain)
        expected = truth.expected(uncertain)
        assert {plain(label) for label in found.labels} == (
            {plain(label) for label in FINDINGS} if style != "answer" else {plain(found.labels[0])}
        )
        order = range(1)
        if style != "answer":
            order = [[plain(n) for n in FINDINGS].index(plain(n)) for n in found.labels]
        assert films.keys() == expected.keys(), text
        groups = {}
        for name, (target, patient, split) in films.items():
            wanted, who, where = expected[name]
            assert target == tuple(wanted[c] for c in order), (name, text)
            assert split == where
            groups.setdefault(patient, set()).add(who)
        # Patients are the same groups of films, however they are called.
        assert all(len(group) == 1 for group in groups.values())
        assert len(groups) == len({who for _, who, _ in expected.values()})
        left_out = len(FOLDER) - len(expected)
        assert any(f"left out: {left_out} of 24" in note for note in found.notes) == (left_out > 0)


def spoil(rng, text):
    """Spoil one place of a table that csv wrote with commas. → text"""
    lines = text.split("\n")
    row = int(rng.integers(1, len(FOLDER)))
    cells = lines[row].split(",")
    at = int(rng.integers(len(cells)))
    way = rng.integers(8)
    if way == 0:
        cells[at] = str(
            rng.choice(["maybe", "2", "0.5", "trian", "17 3 40 2", "x.npy", "2020-1-1"])
        )
    elif way == 1:
        del cells[at]
    elif way == 2:
        cells.insert(at, "stray")
    elif way == 3:
        cells[at] = '"' + cells[at]
    elif way == 4:
        lines.insert(row, lines[row].replace("1", "0"))
    elif way == 5:
        lines[0] = lines[0].replace(",", ";")
    elif way == 6:
        lines[row] = lines[row].replace(",", ";")
        cells = lines[row].split(",")
    else:
        lines[0], lines[row] = lines[row], lines[0]
        return "\n".join(lines)
    lines[row] = ",".join(cells) if way not in (4, 5) else lines[row]
    return "\n".join(lines)


def test_a_spoilt_table_is_refused_or_says_the_same_of_all_other_films(folder, tmp_path):
    refusals = 0
    for seed in range(150):
        rng = np.random.default_rng((seed, 7))
        rows = ["filename,Mass,Nodule,patient_id,split"]
        truth = {}
        for k, name in enumerate(FOLDER):
            split = ("train", "train", "val", "test")[k // 6]
            target = (int(rng.integers(2)), int(rng.integers(2)))
            rows.append(f"{name},{target[0]},{target[1]},p{k // 2},{split}")
            truth[name] = target, f"p{k // 2}", split
        spoilt = spoil(rng, "\n".join(rows) + "\n")
        (tmp_path / "t.csv").write_text(spoilt)
        try:
            films, found = read_by_both(folder, tmp_path / "t.csv")
        except UserError as error:
            refusals += 1
            assert "\n" not in str(error) and "t.csv" in str(error)
            continue
        wrong = [name for name in FOLDER if films.get(name) != truth[name]]
        assert len(wrong) <= 1 and set(found.labels) <= {"Mass", "Nodule"}, spoilt
    assert refusals > 100
