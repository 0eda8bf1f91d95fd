"""A table of one's own: columns, cells, patients and splits in every spelling, or refused.

One reader serves finetune.py --task csv and the linear probes; a property test writes tables with a
known truth in random ways.
"""

import csv
import io
import re
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from plumbing import benchmarks
from plumbing.folder import Index
from plumbing.launch import UserError
from plumbing.own_table import Labels, open_tables
from plumbing.phantom import FINDINGS as FINDINGS_OF_PHANTOMS
from plumbing.words import is_same_in_doubt, is_slip, plain


# ---------------------------------------------------------------- label tables of probes
def make_labels(tmp_path, text, *films):
    """The table of a probe, of some films (of a to e, unless others are given)."""
    (tmp_path / "table.csv").write_text(text)
    return Labels(tmp_path / "table.csv", films_named(*films or "abcde"))


def films_named(*names):
    return SimpleNamespace(names=list(names), patients=list(names), links={})


def test_a_probe_knows_the_patients_whom_the_films_know(tmp_path):
    """As --patients, a pack or a set's lists tell; the table's own word counts first."""
    films = films_named("a", "b", "c", "d")
    films.patients = ["anna", "anna", "bo", "d"]
    head = "filename,label,split"
    rows = ("a,yes,train", "b,no,train", "c,yes,test", "d,no,test")
    labels = labels_of_known(tmp_path, films, head, *rows, "absent,no,val")
    assert labels.patients == ["anna", "anna", "bo", "d", "absent"]
    assert "those of 3 of 5 rows are taken from --patients" in labels.patient_note
    told = [f"{row},{who}" for row, who in zip(rows, ("x", "", "y", "z"), strict=True)]
    labels = labels_of_known(tmp_path, films, f"{head},patient_id", *told)
    assert labels.patients == ["x", "anna", "y", "z"]
    rows = ("a,yes,train", "b,no,test", "c,yes,test", "d,no,train")
    crossed = "patient anna has films in train and"
    refused(lambda: labels_of_known(tmp_path, films, head, *rows), crossed)


def test_a_probe_holds_out_the_film_that_a_link_leads_to(tmp_path):
    """The link is no second film; taken for absent, its film would be trained on."""
    films = films_named("all/1.png", "all/2.png", "all/3.png", "all/4.png")
    films.links = {"test/ill.png": "all/2.png", "test/well.png": "all/4.png", "mimic.png": "gone"}
    rows = ("test/ill.png,yes,test", "well,no,test", "all/1.png,yes,train", "all/3.png,no,train")
    labels = labels_of_known(tmp_path, films, "filename,label,split", *rows, "mimic,no,val")
    assert labels.where.tolist() == [1, 3, 0, 2, -1]
    assert labels.split.tolist() == ["test", "test", "train", "train", "val"]
    rows = ("all/2.png,yes,train", "test/ill.png,yes,test", "all/1.png,no,test")
    refused(lambda: labels_of_known(tmp_path, films, "filename,label,split", *rows), "split")


def labels_of_known(tmp_path, films, *lines):
    """The table of a probe, of films whose patients are known."""
    (tmp_path / "table.csv").write_text("\n".join(lines))
    return Labels(tmp_path / "table.csv", films)


def refused(call, *words):
    """The call ends with one line that holds these words, in this order."""
    with pytest.raises(UserError, match=".*".join(words)) as error:
        call()
    assert "\n" not in str(error.value)


def test_two_tables_of_one_name_are_refused_since_one_would_hide_the_other():
    with pytest.raises(UserError, match="two tables of one name"):
        open_tables("hospital_a/labels.csv,hospital_b/labels.csv", None, None)
    assert open_tables(None, None, None) == []


SPLIT_ROWS = "filename,label,split\na,x,train\nb,x,val\n"


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "no row below its header .empty"),
        ("filename,label,split\n", "no row below its header .filename, label, split"),
        ("filename,label\na,b\nc,normal\n", "no column split, .* needs: say train, val or test"),
        ("filename,mask,split\na,b.png,train\n", "no column label or mask, and none of yes and no"),
        ("file,TB,split\na,x,train\nb,,val\n", "column TB has 'x' and blanks: write 1 and 0"),
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
    refused(lambda: Labels(tmp_path / "none.csv", films_named()), "no such file")


def test_a_probe_needs_films_of_all_three_splits_and_both_answers(tmp_path):
    rows = SPLIT_ROWS + "d,normal,train\n"
    refused(make_labels(tmp_path, rows).complete, "no film of split test")
    rows += "c,normal,test\n"
    refused(make_labels(tmp_path, rows).complete, "no class of x .* in test")
    rows += "e,x,test\n"
    refused(make_labels(tmp_path, rows, *"abcd").complete, "no class of x .* in test")
    labels = make_labels(tmp_path, rows)
    assert labels.complete() is labels
    rows = rows.replace("d,normal", "d,x")
    refused(make_labels(tmp_path, rows).complete, "no class .* in train")


def test_rows_find_their_films_by_the_tail_of_the_path(tmp_path):
    """CheXpert calls every film view1_frontal.jpg: a base name is not enough."""
    rows = [
        "filename,label,split",
        "CheXpert/train/patient1/view1.jpg,x,train",
        "CheXpert/train/patient2/view1.jpg,z,train",
        "gone.jpg,x,test",
        "plain.png,x,test",
    ]
    films = "patient2/view1.jpg deep/below/plain.png patient1/view1.jpg patient3/view1.jpg".split()
    labels = make_labels(tmp_path, "\n".join(rows), *films)
    assert labels.where.tolist() == [2, 0, -1, 1]
    assert "1 of 4 films are not there: gone.jpg, ..." in labels.describe()


def test_a_row_that_fits_two_films_or_a_table_that_fits_none_is_refused(tmp_path):
    text = "filename,label,split\nview1.jpg,x,train\n"
    films = "patient1/view1.jpg", "patient2/view1.jpg"
    refused(
        lambda: make_labels(tmp_path, text, *films), "line 2: view1.jpg fits both", "patient2/view1"
    )
    refused(lambda: make_labels(tmp_path, text, "other.jpg"), "none of its 1 films")


def test_rows_that_turn_out_to_be_of_one_film_must_agree(tmp_path):
    rows = "filename,label,split\nx/a.png,x,train\na.png,x,train\nb,normal,train\n"
    labels = make_labels(tmp_path, rows, "x/a.png", "b.png")
    assert labels.where.tolist() == [0, -1, 1]
    assert "1 repeated rows dropped" in labels.describe()
    rows = rows.replace("\na.png,x", "\na.png,normal")
    refused(
        lambda: make_labels(tmp_path, rows, "x/a.png", "b.png"), "lines 2 and 3: a.png stands twice"
    )


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
    "film": [
        "filename",
        "Image Index",
        "image_id",
        "PATH",
        "image-name",
        "DICOM ID",
        "File",
        "Dateiname",
    ],
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
            films[name] = row.truth, row.patient, None if split == "all" else split
    if "all" not in found.parts and uncertain == "ignore":
        labels = Labels(path, films_named(*FOLDER))
        probe = {}
        for row, i in enumerate(labels.where):
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


# ---------------------------------------------------------------- one kind of fault each
def read_rows(root, tmp_path, *rows, **kwargs):
    """The films of a table by split, as finetune reads them → Found."""
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    return benchmarks.read_csv(Index(root), tmp_path / "t.csv", **kwargs)


def said(found):
    return "\n".join(found.notes)


def patients_of(found):
    return [row.patient for rows in found.parts.values() for row in rows]


def targets_of(found):
    return [row.truth for rows in found.parts.values() for row in rows]


SET_HEADERS = {
    "NIH": ("Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age", "{},Mass,0,{},60"),
    "MIMIC": ("subject_id,study_id,dicom_id,Mass", "{1},5,{0},1.0"),
    "own": ("FileName,LABEL,patientID", "{},Mass,{}"),
}


@pytest.mark.parametrize("header, row", SET_HEADERS.values(), ids=SET_HEADERS)
def test_the_sets_own_names_of_columns_keep_patients_on_one_side(folder, tmp_path, header, row):
    rows = [row.format(f"film{k:02d}", k // 2 + 7) for k in range(24)]
    rows[0] = rows[0].replace("Mass", "No Finding").replace("1.0", "0.0")
    table = tmp_path / "t.csv"
    table.write_text("\n".join([header, *rows]))
    splits = benchmarks.load_task("csv", folder, table)
    homes = {}
    for split in ("train", "val", "test"):
        for example in getattr(splits, split):
            number = int(example.path.stem.removeprefix("film"))
            assert homes.setdefault(number // 2, split) == split
    assert len(homes) == 12 and splits.labels == ("Mass",)


def make_films(root, names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(root / name)


STYLES = [
    ("patient0000{}/study1/view{}_frontal.png", "CheXpert"),
    ("p1000000{}/s5000000{}/abc.png", "MIMIC"),
    ("0000000{}_00{}.png", "NIH"),
]


@pytest.mark.parametrize("style, title", STYLES)
@pytest.mark.parametrize("is_whole", [True, False])
def test_patients_are_read_from_names_where_all_films_have_them(tmp_path, style, title, is_whole):
    names = [style.format(k // 2, k % 2) for k in range(8)]
    names = [name.replace("abc", f"abc{k}") for k, name in enumerate(names)]
    make_films(tmp_path / "films", names)
    written = names if is_whole or title == "CheXpert" else [n.rpartition("/")[2] for n in names]
    rows = [f"{name},{k % 2}" for k, name in enumerate(written)]
    found = read_rows(tmp_path / "films", tmp_path, "file,label", *rows)
    patients = patients_of(found)
    assert [patients.index(patient) // 2 for patient in patients] == [k // 2 for k in range(8)]
    assert f"patients: as the names say, {title}" in said(found)
    make_films(tmp_path / "films", ["other.png"])
    found = read_rows(tmp_path / "films", tmp_path, "file,label", *rows, "other,1")
    assert len(set(patients_of(found))) == 9
    assert "every film counts as one, although 8 of 9 films are named like" in said(found)


def test_without_patients_it_is_said_that_films_of_one_may_be_on_both_sides(folder, tmp_path):
    found = read_rows(folder, tmp_path, "file,label", "film00,1", "film01,0")
    assert "no column patient_id, so every film counts as one" in said(found)


def test_nobody_is_no_patient_and_numbers_are_one_however_excel_wrote_them(folder, tmp_path):
    cells = ["nan", "", "NA", "None", "-", "Anonymous", "13", "13.0", "0013", "P1", "p1"]
    rows = [f"film{k:02d},{k % 2},{cell}" for k, cell in enumerate(cells)]
    found = read_rows(folder, tmp_path, "file,label,patient", *rows)
    patients = patients_of(found)
    assert len(set(patients[:6])) == 6 and len(set(patients[6:9])) == len(set(patients[9:])) == 1
    assert "6 films have none and count as one each" in said(found)
    rounded = "film00,1,1.23457E+11"
    refused(lambda: read_rows(folder, tmp_path, "file,label,patient", rounded), "line 2", "rounded")


def test_of_columns_that_fit_one_role_it_is_said_which_counts(folder, tmp_path):
    found = read_rows(
        folder, tmp_path, "path,file,label,diagnosis", "x,film00,1,Mass", "y,film01,0,"
    )
    assert "film: column file, not path" in said(found)
    assert "label: column label, not diagnosis" in said(found)


LEFT_OUT = [  # header, rows, targets, notes
    ("file,label", ["0", "1", "", "NA", "-1"], [(0,), (1,)], "left out: 3 of 5 rows"),
    ("file,label", ["0", "1", "None"], [(0,), (1,)], "left out: 1 of 3 rows"),
    ("file,label", ["Yes", "yes", "no"], [(1,), (1,), (0,)], "column label"),
    ("file,label", ["Mass", "mass", "MASS", "normal"], [(1,)] * 3 + [(0,)], "column label"),
    ("file,label", ["Mass", "nan", "-1", "None"], [(1,), (0,)], "uncertain: 1 rows: left out"),
    (
        "file,A,B",
        ["1,0", "-1,1", "0,NaN"],
        [(1, 0), (None, 1), (0, None)],
        "missing: 1 values (B 1)",
    ),
    (
        "file,A,B",
        ["1,0", "-1,1", "0,"],
        [(1, 0), (None, 1), (0, None)],
        "uncertain: 1 values (A 1)",
    ),
    ("file,A,age", ["1,60", "0,71", "0,8"], [(1,), (0,), (0,)], "columns not learnt: age"),
    (
        "file,class",
        ["0.0", "2.0", "1.0", "", "2", "0", "1"],
        [(1, 0, 0), (0, 0, 1), (0, 1, 0), (0, 0, 1), (1, 0, 0), (0, 1, 0)],
        "numbers are taken as classes",
    ),
]


@pytest.mark.parametrize("header, cells, targets, note", LEFT_OUT)
def test_missing_and_uncertain_values_are_left_out_and_counted(
    folder, tmp_path, header, cells, targets, note
):
    rows = [f"film{k:02d},{cell}" for k, cell in enumerate(cells)]
    found = read_rows(folder, tmp_path, header, *rows)
    assert targets_of(found) == targets and note in said(found)


@pytest.mark.parametrize("uncertain, value", [("positive", 1), ("negative", 0), ("ignore", None)])
def test_uncertain_is_what_the_flag_says(folder, tmp_path, uncertain, value):
    rows = ["film00,1,0", "film01,0,1", "film02,-1,1"]
    found = read_rows(folder, tmp_path, "file,A,B", *rows, uncertain=uncertain)
    assert targets_of(found) == [(1, 0), (0, 1), (value, 1)]


NO_LABELS = [
    (["51", "48", "70", "35", "52", "61"], "6 different values in 6 rows"),
    ([f"seen on day {k}" for k in range(11)], "11 different values"),
    (["2020-01-01", "2020-02-01"], "line 2.*a date and no class"),
    (["1 5 9 3", "4 4"], "line 2.*run lengths and no class"),
    (["Mass", "a.npy"], "line 3.*a file and no class"),
    (["0.37", "0.5"], "line 2.*a number and no class"),
    (["Mass", "1", "normal"], "line 3.*'1', an answer and no class, beside 'Mass'"),
    (["Mass/Efusion", "Mass", "Effusion"], "line 2.*one finding or several"),
    (["normal", "No Finding"], "names no class beside"),
    (["", "NA"], "column label is empty"),
    (["0", "1", "-9", "0", "1"], "line 4.*'-9', a number below 0, one that no other row has"),
    (["0", "1", "2", "0", "1"], "line 4.*'2', a number below 0, one that no other row has"),
    (['"Mass, possible"', "normal", "Mass"], "line 2.*'possible', a doubt and no class"),
    (['"135,4"', "7"], "line 2: column label says '135,4', a number and no class"),
    (["135", '"135,4"', "4"], "line 2: column label says '135', a number and no class"),
    (["Mass", '"7,2 mg/l"'], "line 3.*'7,2 mg/l', a number and"),
    (["90%", "10%"], "line 2.*'90%', a number and no class"),
    (["Mass", "dito"], "line 3.*'dito', a ditto and no class"),
    (["Mass", "″"], "line 3.*'″', a ditto and no class"),
    (["Mass", '""""'], "line 3.*, a ditto and no class"),
    (["058Y", "060Y"], "line 2.*'058Y', an age and no class"),
]


@pytest.mark.parametrize("cells, words", NO_LABELS)
def test_a_column_that_cannot_be_classes_is_refused(folder, tmp_path, cells, words):
    rows = [f"film{k:02d},{cell}" for k, cell in enumerate(cells)]
    refused(lambda: read_rows(folder, tmp_path, "file,label", *rows), words)


def test_a_column_that_is_nearly_of_answers_is_refused_by_row(folder, tmp_path):
    rows = ["film00,1,0", "film01,0,1", "film02,0,maybe"]
    refused(lambda: read_rows(folder, tmp_path, "file,A,B", *rows), "line 4: column B says 'maybe'")
    found = read_rows(folder, tmp_path, "file,A,B", *rows, column="A")
    assert targets_of(found) == [(1,), (0,), (0,)]
    refused(lambda: read_rows(folder, tmp_path, "file,Mass,B", *rows, column="Mas"), "mean Mass?")
    twice = "--column Mass,mass names column Mass twice"
    refused(lambda: read_rows(folder, tmp_path, "file,Mass,B", *rows, column="Mass,mass"), twice)


JOINED = [
    ("Mass|Effusion", "Mass", "Effusion"),
    ("Mass; Effusion", "Mass", "Effusion"),
    ('"Mass, Effusion"', "Mass", "Effusion"),
    ("Mass/Effusion", "Mass", "Effusion"),
    ("Mass + Effusion", "mass", "EFFUSION"),
    ("Mass and Effusion", "Mass", "Effusion"),
    ("\"['Mass', 'Effusion']\"", "['Mass']", "['Effusion']"),
]


@pytest.mark.parametrize("both, mass, effusion", JOINED)
def test_the_usual_separators_of_findings_are_understood(folder, tmp_path, both, mass, effusion):
    rows = [f"film00,{both}", f"film01,{mass}", f"film02,{effusion}", "film03,normal"]
    found = read_rows(folder, tmp_path, "file,label", *rows)
    assert len(found.labels) == 2
    assert targets_of(found) == [(1, 1), (0, 1), (1, 0), (0, 0)]


def test_a_slash_may_belong_to_a_name(folder, tmp_path):
    cells = ["No Lung Opacity / Not Normal", "Normal", "Lung Opacity"]
    rows = [f"film{k:02d},{cell}" for k, cell in enumerate(cells)]
    assert read_rows(folder, tmp_path, "file,label", *rows).labels == (cells[2], cells[0])


MASKS = [  # cell, name of the file that is meant; None: refused with these words
    ("film00_mask.png", "film00_mask.png", ""),
    ("masks\\film00_mask.png", "film00_mask.png", ""),
    ("C:\\work\\masks\\film00_mask.png", "film00_mask.png", ""),
    ("film00_mask", "film00_mask.png", ""),
    ("both", None, "fits .*both.png and .*both.png"),
    ("film00_mask.npy", None, "a file and no picture"),
    ("3 5 20 1", None, "run lengths and no picture"),
    ("-1", None, "'-1' is not there"),
    ("1", None, "'1' is not there"),
    ("Mass", None, "'Mass' is not there"),
    ("ja", None, "mask 'ja' is not there .column mask.*save each as PNG.*--column NAME"),
    (f'"[{", ".join(map(str, range(100)))}]"', None, "mask .* is not there .column mask"),
    ("film01.png", None, "'film01.png' is not there"),  # a film is no mask
]


@pytest.mark.parametrize("cell, name, words", MASKS)
def test_masks_are_pictures_or_refused_by_row(tmp_path, cell, name, words):
    films = ["film00.png", "film01.png"]
    masks = ["masks/film00_mask.png", "masks/both.png", "more_masks/both.png"]
    make_films(tmp_path / "films", [*films, *masks])
    rows = ["file,mask", "film01,", f"film00,{cell}"]
    if name is None:
        refused(lambda: read_rows(tmp_path / "films", tmp_path, *rows), "line 3", words)
        return
    found = read_rows(tmp_path / "films", tmp_path, *rows)
    empty, full = (row.mask for row in found.parts["all"])
    assert empty == benchmarks.EMPTY_MASK and full[1].name == name
    assert "1 rows have none: their masks are empty" in said(found)


def test_films_that_are_found_otherwise_than_written_are_told_and_absent_ones_refused(
    folder, tmp_path
):
    rows = ["film00.dcm,1", "old/place/film01.png,0", "FILM02.png,1", "set/p1/film03.png,0"]
    found = read_rows(folder, tmp_path, "file,label", *rows)
    for note in (
        "1 films with another suffix: film00.dcm is film00.png",
        "1 films in other folders than they say: old/place/film01.png is set/p0/film01.png",
        "1 films with other small and large letters: FILM02.png is film02.png",
        "20 films of the folder are in no row that is used here",
    ):
        assert note in said(found)
    refused(
        lambda: read_rows(folder, tmp_path, "file,label", *rows, "gone.png,1", "gone2.png,0"),
        "2 of the 6 films are not below",
        "gone.png .line 6., gone2.png .*: delete these rows, or point --data higher",
    )
    refused(
        lambda: read_rows(folder, tmp_path, "file,label", "gone.png,1", "gone2.png,0"),
        "2 of the 2 films are not below",
        "is --data the right folder",
    )


SLIPS = [  # names, films of each; the first is refused beside the second, or not
    ("pneumonia?", 6, "pneumonia", 17, True),
    ("possible pneumonia", 6, "Pneumonia", 17, True),
    ("Pneumonia (suspected)", 1, "pneumonia", 17, True),
    ("V.a. Pneumonie", 6, "Pneumonie", 17, True),
    ("Verdacht auf Pneumonie", 6, "pneumonie", 17, True),
    ("fragliche Pneumonie", 6, "Pneumonie", 17, True),
    ("equivocal pneumonia", 6, "pneumonia", 17, True),
    ("suspicion de pneumonie", 6, "Pneumonie", 17, True),
    ("keine Pneumonie", 6, "Pneumonie", 17, False),
    ("pneumonai", 1, "pneumonia", 17, True),
    ("pneumonias", 2, "pneumonia", 17, True),
    ("nromal", 1, "normal", 17, True),
    ("pleural efusion", 1, "Pleural Effusion", 17, True),
    ("oedema", 1, "edema", 17, True),
    ("pneumonai", 3, "pneumonia", 17, False),  # not rare: 3 films and more than 2 % of 17
    ("abnormal", 1, "normal", 17, False),
    ("atypical", 1, "typical", 17, False),
    ("empyema", 1, "emphysema", 17, False),
    ("covid1", 1, "covid2", 17, False),
    ("stage II", 1, "stage III", 17, False),
    ("groupB", 1, "groupA", 17, False),
    ("upper lobe opacity", 1, "lower lobe opacity", 17, False),
    ("left", 1, "right", 17, False),
    ("AP", 1, "PA", 17, False),
    ("no pneumonia", 1, "pneumonia", 17, False),
    ("pneumonia (viral)", 1, "pneumonia", 17, False),
]


@pytest.mark.parametrize("odd, odd_films, usual, films, is_refused", SLIPS)
def test_a_slip_or_a_doubt_is_no_class_of_its_own(
    folder, tmp_path, odd, odd_films, usual, films, is_refused
):
    cells = [usual] * films + [odd] * odd_films + ["Cardiomegaly"]
    rows = [f"film{k % 24:02d},{cell}" for k, cell in enumerate(cells[-24:])]

    def read():
        return read_rows(folder, tmp_path, "file,label", *rows)

    if not is_refused:
        assert read()
        return
    line = 2 + min(k for k, row in enumerate(rows) if row.endswith(odd))
    refused(
        read, f"line {line}: column label says {re.escape(repr(odd))} .{odd_films} ×.", "--column"
    )


def test_a_slip_among_several_findings_counts_as_well(folder, tmp_path):
    rows = ["film00,Mass|Nodule", "film01,Mass|Nodlue", "film02,Nodule", "film03,normal"]
    refused(
        lambda: read_rows(folder, tmp_path, "file,label", *rows),
        "line 3: column label says 'Nodlue' .1 ×. beside 'Nodule' .2 ×.",
    )


def test_the_names_of_the_sets_are_no_slips_of_each_other():
    of_sets = [task.labels for task in benchmarks.TASKS.values()]
    for labels in [*of_sets, FINDINGS_OF_PHANTOMS]:
        for one, other in combinations([*labels, "No Finding", "normal"], 2):
            is_told = is_slip(one, other) or is_same_in_doubt(one, other)
            assert not is_told or plain(one) == plain(other), (one, other)


def test_blanks_beside_yes_alone_are_told_to_be_no_answer(folder, tmp_path):
    for yes in ("yes", "x", "1"):
        rows = [f"film00,{yes}", "film01,", f"film02,{yes}", "film03,"]
        refused(
            lambda rows=rows: read_rows(folder, tmp_path, "file,tb", *rows, column="tb"),
            "column tb never says no; 2 blank cells count as not known: write 0 where a blank",
        )


def test_yes_and_no_of_other_languages_and_two_unknown_words_are_not_turned_round(folder, tmp_path):
    rows = [
        "film00,vorhanden",
        "film01,não",
        "film02,Sí",
        "film03,normal",
        "film04,nicht_vorhanden",
    ]
    found = read_rows(folder, tmp_path, "file,tb", *rows, column="tb")
    assert (found.labels, targets_of(found)) == (("tb",), [(1,), (0,), (1,), (0,), (0,)])
    rows = ["film00,evet", "film01,hayir", "film02,evet"]
    found = read_rows(folder, tmp_path, "file,tb", *rows, column="tb")
    assert (found.labels, targets_of(found)) == (("hayir",), [(0,), (1,), (0,)])
    assert "hayir (1) is learnt against evet (0)" in said(found)
    assert "should they mean yes and no, write yes and no" in said(found)


def test_no_finding_and_not_known_are_understood_in_german(folder, tmp_path):
    cells = [
        "o.B.",
        "Erguss",
        "unauffällig",
        "k. A.",
        "fraglich",
        "nicht beurteilbar",
        "Ohne Befund",
    ]
    rows = [f"film{k:02d},{cell}" for k, cell in enumerate(cells)]
    found = read_rows(folder, tmp_path, "file,Diagnosis", *rows)
    assert (found.labels, targets_of(found)) == (("Erguss",), [(0,), (1,), (0,), (0,)])
    assert "left out: 3 of 7 rows" in said(found)


def test_a_column_of_normal_and_a_name_is_told_to_be_learnt_by_its_name(folder, tmp_path):
    rows = ["film00,normal", "film01,Mass", "film02,normal"]
    refused(
        lambda: read_rows(folder, tmp_path, "file,outcome", *rows),
        "line 3: column outcome says 'Mass'",
        "as classes: --column outcome",
    )
    found = read_rows(folder, tmp_path, "file,outcome", *rows, column="outcome")
    assert targets_of(found) == [(0,), (1,), (0,)]
    assert "'normal' counts as no finding" in said(found)


MODEL = ("labels", ("Mass", "Nodule"))
FOR_A_MODEL = [
    ("file,mass,Age", ["1,70", ",60"], [(1, None), (None, None)], "not in the table: Nodule"),
    ("file,age", ["1", "2"], [(None, None)] * 2, "nothing to compare with"),
    (
        "file,label",
        ["nodule|Edema", ""],
        [(0, 1), (None, None)],
        "none of the model's labels: Edema",
    ),
]


@pytest.mark.parametrize("header, cells, targets, note", FOR_A_MODEL)
def test_a_table_for_a_trained_model_keeps_every_row(
    folder, tmp_path, header, cells, targets, note
):
    rows = [f"film{k:02d},{cell}" for k, cell in enumerate(cells)]
    found = read_rows(folder, tmp_path, header, *rows, trained=MODEL)
    assert list(found.parts) == ["test"] and found.labels == MODEL[1]
    assert targets_of(found) == targets and note in said(found)
    refused(
        lambda: read_rows(folder, tmp_path, "file,label", "film00,Edema", trained=MODEL),
        "none of what the model was trained for",
    )


LIKE_A_LABEL = (
    "Mass li.|two masses|Left mass|V.a. Mass|mass?|Masss|Bronchomass|Pulmonary-Nodule|nodulle"
)
UNLIKE = "no mass|keine Mass|Pseudonodule|Amass|Massive|Nodular|Edema|Hernia"


@pytest.mark.parametrize("name", [*LIKE_A_LABEL.split("|"), *UNLIKE.split("|")])
def test_what_may_be_a_label_of_the_model_is_refused_not_counted_as_negative(
    folder, tmp_path, name
):
    known = "Nodule" if "mass" in name.casefold() else "Mass"  # not beside its like
    rows = [f"film00,{known}", "film01,normal", f"film02,{name}"]

    def read():
        return read_rows(folder, tmp_path, "file,label", *rows, trained=MODEL)

    if name in UNLIKE.split("|"):
        assert targets_of(read())[1:] == [(0, 0), (0, 0)]
    else:
        words = f"line 4: column label says {re.escape(repr(name))}, which may be the model's"
        refused(read, words, "make a column (Mass|Nodule) of 0 and 1")


def test_a_column_of_1_and_2_beside_findings_of_0_and_1_is_refused(folder, tmp_path):
    """2 is often no (SPSS); a score of 0 to 3, or of three grades, stays an unlearnt column."""
    others = ["0", "1", "0", "1", "0", "1"]

    def read(name, *codes, **kwargs):
        rows = [f"film{k:02d},{others[k]},{code}" for k, code in enumerate(codes)]
        return read_rows(folder, tmp_path, f"file,Mass,{name}", *rows, **kwargs)

    for codes in ("212212", "129222", "202122"):
        refused(
            lambda codes=codes: read("Erguss", *codes), "column Erguss says '2'.*delete the column"
        )
    refused(lambda: read("effusion right side", *"010x10"), "right side says 'x'")  # a slip
    assert read("Erguss", *"212212", column="Mass").labels == ("Mass",)
    of_a_patient = [("sex", "212212"), ("sex", "112121"), ("Sesso", "212212"), ("site", "112112")]
    of_a_patient += [("severity", "010202"), ("Raucher", "001220"), ("Zimmer", "212212")]
    for name, codes in (*of_a_patient, ("grade", "312322"), ("beds", "323322")):
        assert f"columns not learnt: {name}" in said(read(name, *codes))


def test_amounts_that_are_mostly_0_are_no_answers_but_few_odd_codes_are(folder, tmp_path):
    amounts = [*"00000000", "7", "12,5", "20", "31.5", "40"]
    for cells, is_refused in ((amounts, False), ([*amounts[:-1], "7"], True)):
        rows = [f'film{k:02d},{k % 2},"{cell}"' for k, cell in enumerate(cells)]

        def read(rows=rows):
            return read_rows(folder, tmp_path, "file,Mass,pack years", *rows)

        if is_refused:
            refused(read, "column pack years says '7', which is neither")
        else:
            assert read().labels == ("Mass",)


def test_a_model_that_learnt_a_word_for_no_finding_is_judged_as_before(folder, tmp_path):
    """Version 0.2 knew 'normal', but not 'gesund', as no finding."""
    model = ("labels", ("krank",), "gesund")
    rows = ["film00,gesund", "film01,krank"]
    found = read_rows(folder, tmp_path, "file,label", *rows, trained=model)
    assert targets_of(found) == [(0,), (1,)]


def test_a_name_of_which_a_label_of_the_model_is_a_kind_is_refused(folder, tmp_path):
    rows = ["film00,Fibrosis", "film01,normal", "film02,Pneumonia"]
    model = ("labels", ("Pulmonary fibrosis", "Pneumonia"), "")
    refused(
        lambda: read_rows(folder, tmp_path, "file,label", *rows, trained=model),
        "line 2: column label says 'Fibrosis', which may be the model's 'Pulmonary fibrosis'",
    )


def test_a_column_of_comments_is_no_column_of_classes(folder, tmp_path):
    rows = ["film00,siehe CT,1", "film01,vgl. VA,0", "film02,,1", "film03,siehe CT,0"]
    for name in ("Kommentar", "Remarks", "Bemerkungen", "notes"):
        header = f"file,{name},Mass"
        refused(
            lambda header=header, name=name: read_rows(
                folder, tmp_path, header, *rows, column=name
            ),
            f"column {name} holds comments",
        )
        assert read_rows(folder, tmp_path, header, *rows).labels == ("Mass",)


@pytest.mark.parametrize("header", ["file,label,dataset", "file,label,Dataset_type"])
def test_a_column_that_says_train_and_test_is_the_split_whatever_its_name(folder, tmp_path, header):
    rows = [f"film{k:02d},{k % 2},{('TRAIN', 'Test')[k // 2]}" for k in range(4)]
    found = read_rows(folder, tmp_path, header, *rows)
    assert [row.name for row in found.parts["test"]] == ["film02", "film03"]
    two = [f"{row},{row.rpartition(',')[2]}" for row in rows]
    refused(
        lambda: read_rows(folder, tmp_path, f"{header},ours", *two),
        "and ours may both be the column of the split",
    )
    flags = [f"film{k:02d},{k % 2},{k // 2}" for k in range(4)]
    for label in ("label", "Mass"):
        refused(
            lambda label=label: read_rows(folder, tmp_path, f"file,{label},is_test", *flags),
            "column is_test: write a column split",
        )


def test_a_column_of_splits_in_other_words_is_understood_or_refused_not_passed_over(
    folder, tmp_path
):
    words = ["Training", "Validierung", "Test", "Training"]
    rows = [f"film{k:02d},{k % 2},{word}" for k, word in enumerate(words)]
    for name in ("Aufteilung", "Datensatz", "jeu"):
        found = read_rows(folder, tmp_path, f"file,Mass,{name}", *rows)
        names = {split: [row.name for row in part] for split, part in found.parts.items()}
        wanted = {"train": ["film00", "film03"], "val": ["film01"], "test": ["film02"]}
        assert names == wanted
    for strange in ("", "Prüfung"):
        spoilt = [*rows, f"film04,1,{strange}"]
        refused(
            lambda spoilt=spoilt: read_rows(folder, tmp_path, "file,Mass,Datensatz", *spoilt),
            f"line 6: column Datensatz must say train, val, test, not '{strange}'",
        )
    half = [f"film{k:02d},{k % 2},{word}" for k, word in enumerate([*words, *["", "NA"] * 4])]
    refused(  # blanks speak for nothing else than a split
        lambda: read_rows(folder, tmp_path, "file,Mass,Datensatz", *half),
        "line 6: column Datensatz must say train, val, test, not ''",
    )
    half_told = [  # these splits were passed over, and others drawn
        ("train|external test", "line 3: .* not 'external test': rename or delete the column"),
        ("train|holdout", "line 3: .* not 'holdout'"),
        ("Training|Test 1|Test 2", "line 3: .* not 'Test 1'"),
        ("derivation|validation", "line 2: .* not 'derivation'"),
        ("development|validation", "train, val, test; development and val both mean val"),
        ("développement|validation|test", "line 2: .* not 'développement'"),
    ]
    for kinds, words in half_told:
        told = [f"film{k:02d},{k % 2},{kind}" for k, kind in enumerate(2 * kinds.split("|"))]
        refused(
            lambda told=told: read_rows(folder, tmp_path, "file,Mass,Datensatz", *told),
            f"{words}",
        )
    cohort = ["film00,1,Test", "film01,0,Kontrolle", "film02,1,Kontrolle", "film03,0,Training"]
    assert set(read_rows(folder, tmp_path, "file,Mass,Kurs", *cohort).parts) == {"all"}


def test_a_column_of_yes_and_no_that_is_called_like_a_split_is_no_finding(folder, tmp_path):
    rows = [f"film{k:02d},{k % 2},{'ja' if k < 2 else 'nein'}" for k in range(4)]
    for name in ("Testset", "test data", "Training", "in_test", "validation"):
        refused(
            lambda name=name: read_rows(folder, tmp_path, f"file,Mass,{name}", *rows),
            f"column {name}: write a column split that says train, val or test, or delete",
        )
    for name in ("Test", "valid", "TR", "Testosteron"):  # of blood, of the film's quality, a valve
        assert read_rows(folder, tmp_path, f"file,Mass,{name}", *rows).labels == ("Mass", name)
    for cell in ("A", ""):
        others = [f"film{k:02d},{k % 2},{cell}" for k in range(4)]
        assert read_rows(folder, tmp_path, "file,Mass,Testgruppe", *others).labels == ("Mass",)


def test_advice_to_learn_a_column_as_classes_can_be_followed(folder, tmp_path):
    cells = {"Mass": ["x", "0", "x", "0"], "TB": ["p", "n", "p", "n"]}
    for name, said_so in cells.items():
        rows = [f"film{k:02d},{k % 2},{cell}" for k, cell in enumerate(said_so)]
        with pytest.raises(UserError, match=f"column {name} says") as error:
            read_rows(folder, tmp_path, f"file,Nodule,{name}", *rows)
        advised = f"learn column {name} alone, as classes" in str(error.value)
        assert advised == (name == "Mass")
        if advised:
            header = f"file,Nodule,{name}"
            found = read_rows(folder, tmp_path, header, *rows, column=name)
            assert targets_of(found) == [(1,), (0,), (1,), (0,)]


def test_what_a_spreadsheet_leaves_of_a_failed_formula_is_no_class_and_no_patient(folder, tmp_path):
    for error in ("#REF!", "#VALUE!", "#DIV/0!", "#NAME?", "#BEZUG!", "####"):
        rows = ["film00,normal,p1", "film01,mass,p2"]
        refused(
            lambda rows=[*rows, f"film02,{error},p3"]: read_rows(
                folder, tmp_path, "file,label,patient", *rows
            ),
            "line 4: column label says",
            "an error of the spreadsheet",
        )
        refused(
            lambda rows=[*rows, f"film02,mass,{error}"]: read_rows(
                folder, tmp_path, "file,label,patient", *rows
            ),
            "line 4: column patient says",
            "an error of the spreadsheet",
        )


def test_letters_with_accents_are_one_however_they_are_encoded(folder, tmp_path):
    rows = ["film00,e\u0301panchement,Mu\u0308ller", "film01,\u00e9panchement,M\u00fcller"]
    found = read_rows(folder, tmp_path, "file,label,patient", *rows, "film02,normal,Z")
    assert found.labels == ("\u00e9panchement",)
    assert targets_of(found) == [(1,), (1,), (0,)]
    assert patients_of(found) == ["M\u00fcller", "M\u00fcller", "Z"]


def test_of_a_name_and_its_denial_the_name_is_learnt(folder, tmp_path):
    for no in ("Non-COVID", "no covid", "Not_COVID", "kein COVID"):
        rows = [f"film00,{no}", "film01,COVID"]
        found = read_rows(folder, tmp_path, "file,label", *rows)
        assert (found.labels, targets_of(found)) == (("COVID",), [(0,), (1,)])


def test_a_model_of_one_of_two_codes_is_not_asked_yes_or_no(folder, tmp_path):
    model = ("labels", ("2",))
    rows = ["film00,1", "film01,2", "film02,"]
    found = read_rows(folder, tmp_path, "file,label", *rows, trained=model)
    assert targets_of(found) == [(0,), (1,), (None,)]
    refused(  # 1 alone is no "yes" to 2
        lambda: read_rows(folder, tmp_path, "file,label", "film00,1", "film01,", trained=model),
        "names 1, but none of what the model was trained for: 2",
    )


def test_a_model_of_one_of_two_classes_is_not_judged_on_films_that_are_neither(folder, tmp_path):
    rows = ["film00,viral", "film01,bacterial", "film02,viral"]
    learnt = read_rows(folder, tmp_path, "file,label", *rows)
    assert (learnt.labels, learnt.against) == (("viral",), "bacterial")
    model = ("labels", learnt.labels, learnt.against)
    rows = ["film00,Viral", "film01,bacterial", "film02,normal", "film03,fungal", "film04,"]
    found = read_rows(folder, tmp_path, "file,label", *rows, trained=model)
    assert targets_of(found) == [(1,), (0,), (None,), (None,), (None,)]
    assert "neither viral nor bacterial, hence not judged: 3 rows" in found.notes


def test_of_classes_that_exclude_each_other_one_column_says_yes_or_none_counts(folder, tmp_path):
    model = ("classes", ("Normal", "Opacity", "Other"))
    rows = ["film00,1,0,0", "film01,0,0,1", "film02,0,0,0", "film03,1,1,0", "film04,1,,0"]
    found = read_rows(folder, tmp_path, "file,Normal,Opacity,other", *rows, trained=model)
    unknown = (None, None, None)
    assert targets_of(found) == [(1, 0, 0), (0, 0, 1), unknown, unknown, (1, None, 0)]


CALLED = (
    "Patient Nr|patient_key|SubjectNo|Patienten-Nummer|Pat.-Nr.|Pat. Nr.|Patientennr.|Patienten-ID|"
    "Patient No.|Patient #|N° patient|Nº paciente|Numéro patient|Numéro de patient|"
    "Fallnummer|IPP|Pseudonym|Patient (ID)|ID Paziente"
).split("|")


@pytest.mark.parametrize("name", CALLED)
def test_patients_go_by_other_names_as_well(folder, tmp_path, name):
    rows = ["film00,1,7,train", "film01,0,8,train", "film02,1,7,test"]
    refused(
        lambda: read_rows(folder, tmp_path, f"file,label,{name},split", *rows),
        "patient 7 has films in train and in test",
    )


LIKE_A_PATIENT = [  # a column, its cell in row k of 24, whether it is refused as the patient
    ("Patientenkennung", "{0}", True),
    ("Patient/in", "Meier {0}", True),
    ("pat_hash", "a{0}f", True),
    ("Aktennr.", "{0}", True),
    ("Kürzel", "P-{0:03d}", True),
    ("Kürzel", "P-{1:03d}", False),  # no two are alike
    ("Kürzel", "P-{3:03d}", True),  # four films each
    ("Stadium", "T{3}", False),
    ("candidate_id", "{0}", True),
    ("Patientendatei-Nr.", "{0}", True),
    ("Datensatz-ID", "{0}", True),
    ("Triage-Nr.", "{0}", True),
    ("Hospital No", "{0}", True),
    ("MRN (Hospital)", "{0}", True),
    ("Klinik-Nr.", "{0}", True),
    ("Study ID", "{0}", True),
    ("NHC", "{0}", True),
    ("PESEL", "{0}", True),
    ("住院号", "{0}", True),
    ("患者年龄", "{0}", False),
    ("Study date", "202401{0:02d}", False),
    ("hospital", "H{0}", False),
    ("numeric score", "{0}", False),
    ("Kürzel", "P{2}", False),  # three of 24, such as a scanner
    ("Patient Age (y)", "{0}", False),
    ("Patientengröße", "1{0:02d}", False),
    ("Patient Position", "P{0}", False),
    ("Patient seen", "2024-01-{0:02d}", False),
    ("Patientenaussage", "hustet seit {0} Tagen sehr", False),
    ("pathway", "W{2}", False),
    ("Leukozyten", "{0}00", False),
    ("CRP", "{0},4", False),
    ("Untersuchungsnr.", "U{0}", False),
    ("Kommentar", "siehe CT {0}", False),
    ("ward", "", False),
    ("Operator", "OP{0}", False),
    ("Idade", "3{0:02d}", False),
    ("Edad del paciente", "{0}", False),
    ("number of cigarettes", "{0}", False),
    ("Zimmer", "Z{0}", False),
    ("Befunder", "R{0:02d}", False),
    ("Protokoll", "thx{0}", False),
    ("Zentrum", "Z{0}", False),
    ("Patient: Anmerkung", "{0}", False),
]


@pytest.mark.parametrize("name, cell, is_refused", LIKE_A_PATIENT)
def test_a_column_that_looks_like_the_patient_is_refused_and_no_other(
    folder, tmp_path, name, cell, is_refused
):
    cells = [cell.format(k // 2 + 1, k + 1, k % 3, k // 4) for k in range(24)]
    rows = [f'film{k:02d},{("normal", "Mass")[k % 2]},"{cells[k]}",test' for k in range(24)]

    def read(**kwargs):
        return read_rows(folder, tmp_path, f"file,label,{name},split", *rows, **kwargs)

    def probe():
        return Labels(tmp_path / "t.csv", films_named(*FOLDER))

    rows[0] = rows[0].replace("test", "train")
    calls = [read, lambda: read(trained=MODEL), probe]
    for call in calls:
        if is_refused:
            refused(
                call, f"column {re.escape(name)} looks like the patient", "rename it patient_id"
            )
        else:
            call()


def test_codes_for_missing_are_no_classes(folder, tmp_path):
    pairs = ("0 1 98 99", "0 1 8 9", "1 2 8 9", "0 1 7 8 9", "0 1 998 999", "0 1 2 66", "1 2 77 88")
    for codes in ("0 1 9", "0 1 2 99", "1 2 88", *pairs):
        rows = [f"film{k:02d},{codes.split()[k % len(codes.split())]}" for k in range(8)]
        refused(
            lambda rows=rows: read_rows(folder, tmp_path, "file,label", *rows), "missing: if it"
        )
    for first, last in ((0, 9), (1, 8), (6, 9), (0, 7)):
        codes = list(range(first, last + 1))
        rows = [f"film{k:02d},{codes[k % len(codes)]}" for k in range(2 * len(codes))]
        assert len(read_rows(folder, tmp_path, "file,label", *rows).labels) == len(codes)


def test_a_slip_in_a_column_of_a_model_is_refused_and_not_left_out(folder, tmp_path):
    rows = ["film00,1,0", "film01,0,O"]
    refused(
        lambda: read_rows(folder, tmp_path, "file,mass,nodule", *rows, trained=MODEL),
        "line 3: column nodule says 'O'",
    )


def test_two_labels_of_the_model_are_two_however_alike(folder, tmp_path):
    model = ("labels", ("effusion", "left effusion", "effusion?"))
    rows = ["film00,effusion", "film01,left effusion", "film02,effusion?", "film03,normal"]
    found = read_rows(folder, tmp_path, "file,label", *rows, trained=model)
    assert targets_of(found) == [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)]
    assert "count as negative for it: left effusion (1 films) for effusion" in said(found)


def test_no_finding_is_true_of_a_model_that_has_it_as_a_label(folder, tmp_path):
    model = ("labels", ("Mass", "No finding"))
    rows = ["film00,Mass", "film01,No Finding", "film02,normal", "film03,Hernia"]
    found = read_rows(folder, tmp_path, "file,label", *rows, trained=model)
    assert targets_of(found) == [(1, 0), (0, 1), (0, 1), (0, 0)]


def test_a_film_is_one_by_its_absolute_and_its_relative_path(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    film = next(folder.rglob("film00.png"))
    rows = ["film00.png,1,train", f"{film},1,test", "film01.png,0,train"]
    refused(
        lambda: read_rows(".", tmp_path, "file,label,split", *rows),
        "lines 2 and 3: .*film00.png stands twice, with a different split: keep one row",
    )


# ---------------------------------------------------------------- what would be a class of its own
IN_A_CELL = [  # the cells of a column; its labels and targets, or the words of the refusal
    (["Pneumonie", "Pneumonie links", "normal"], None, "line 3: .*'Pneumonie links' .1 ×. beside"),
    (["left pneumonia", "pneumonia", "normal"], None, "line 2: .*'left pneumonia' .1 ×. beside"),
    (["effusion", "small effusions", "normal"], None, "line 3: .*'small effusions'"),
    (["Erguss ohne Pneumonie", "Erguss", "normal"], None, "line 2: .*'Erguss ohne Pneumonie'"),
    (["rib fracture without effusion", "rib fracture"], None, "line 2: .*'rib fracture without"),
    (["Mass left not cystic", "Mass", "TB"], None, "line 2: .*'Mass left not cystic'"),
    (["Mass nicht vorhanden", "Mass"], ["Mass"], [(0,), (1,)]),
    (["TB negative", "TB", "Mass"], ["Mass", "TB", "TB negative"], None),
    (["pneumonia", "pneumonia|left pneumonia"], ["left pneumonia", "pneumonia"], [(0, 1), (1, 1)]),
    (["Pneumonie", "Ödem links"], ["Ödem links"], [(0,), (1,)]),
    (["(left) mass (small)", "normal"], ["(left) mass (small)"], [(1,), (0,)]),
    (['"mass (left, small)"', "normal"], ["mass (left, small)"], [(1,), (0,)]),
    (["(effusion; mass)", "mass", "normal"], ["effusion", "mass"], [(1, 1), (0, 1), (0, 0)]),
    (["(mass)", "mass", "mass", "normal"], None, "line 2: .*'.mass.' .1 ×. beside 'mass'"),
    (["effusion - mass", "mass", "effusion"], ["effusion", "mass"], [(1, 1), (0, 1), (1, 0)]),
    (["effusion • mass", "normal"], ["effusion • mass"], [(1,), (0,)]),
    (["effusion - mass", "mass", "normal"], None, "line 2: .*one finding or several"),
    (["1) mild", "2) severe", "0) none"], ["0) none", "1) mild", "2) severe"], None),
    (["mass (left; right)", "normal"], None, "line 2: .*'mass .left', half of a pair of brackets"),
    (['"mass, nodule)"', "normal"], None, "line 2: .*half of a pair of brackets and no class"),
    (["left", "left lower", "right"], ["left", "left lower", "right"], None),
    (["old TB", "TB", "TB", "normal"], None, "line 2: .*'old TB' .1 ×. beside 'TB'"),
    (["Pneumonie", "Pneumonie", "Z.n. Pneumonie"], None, "line 4: .*'Z.n. Pneumonie'"),
    (["old", "young", "young"], ["young"], [(0,), (1,), (1,)]),
    (["Pneumonie", "kein Erguss", "Erguss"], ["Erguss", "Pneumonie"], [(0, 1), (0, 0), (1, 0)]),
    (["mass; no nodule", "nodule", "normal"], ["mass", "nodule"], [(1, 0), (0, 1), (0, 0)]),
    (["Mass; sans fracture", "normal"], ["Mass"], [(1,), (0,)]),
    (["mit Drain", "ohne Drain"], ["mit Drain"], [(1,), (0,)]),
    (["no DR", "mild DR", "severe DR"], ["mild DR", "severe DR"], [(0, 0), (1, 0), (0, 1)]),
    (["Pneumonie", "kein Infiltrat"], None, "line 3: .*'kein Infiltrat', which no row finds"),
    (["Mass", "Mass|no mass"], None, "line 3: .*'no mass' beside 'Mass'"),
    (["Erguss", "Mass; keine Zunahme des Ergusses"], None, "line 3: .*something else than: no Er"),
    (
        ["pleural effusion; no mass", "edema; no effusion", "normal"],
        ["edema", "pleural effusion"],
        None,
    ),
    (["effusion", "edema; no pleural effusion"], None, "line 3: .*something else than: no effus"),
    (["Mass", '"no nodule, mass"', "nodule"], None, "line 3: .*is 'mass' denied as well"),
    (["No. 1", "No. 2"], ["No. 2"], [(0,), (1,)]),
    (["COVID pneumonia", "non-COVID pneumonia", "normal"], None, None),
    (["unremarkable", "keine Auffälligkeiten", "Erguss"], ["Erguss"], [(0,), (0,), (1,)]),
]


@pytest.mark.parametrize("cells, labels, outcome", IN_A_CELL)
def test_sides_denials_and_histories_are_no_classes_of_their_own(
    folder, tmp_path, cells, labels, outcome
):
    rows = [f"film{k:02d},{cell}" for k, cell in enumerate(cells)]

    def read():
        return read_rows(folder, tmp_path, "file,Befund", *rows)

    if isinstance(outcome, str):
        refused(read, outcome)
        return
    found = read()
    assert labels is None or list(found.labels) == labels
    assert outcome is None or targets_of(found) == outcome


@pytest.mark.parametrize(
    "cell",
    [
        "a) effusion, b) mass",
        "A. effusion b. mass",
        "i) effusion ii) mass",
        "1) effusion 2) mass",
        "1. effusion\n2. mass",
        "1.effusion, 2.mass",
        "(1) effusion; (2) mass",
        "#1 effusion #2 mass",
        "['1: effusion', '2: mass']",
        "① effusion ② mass",
        "- effusion - mass",
        "-effusion\n-mass",
        "effusion\n• mass",
        "* effusion",
    ],
)
def test_lists_with_numbers_and_bullets_are_refused(folder, tmp_path, cell):
    """Each was a class of its own, or several with their numbers."""
    for others in ([], ["effusion", "mass"]):
        rows = [f"film{k:02d},{name}" for k, name in enumerate(["normal", *others])]
        rows.append(f'film09,"{cell}"')
        refused(
            lambda rows=rows: read_rows(folder, tmp_path, "file,findings", *rows),
            f"line {len(rows) + 1}: .*list with numbers or dashes. Join several findings with .",
        )


def test_a_kind_of_a_class_is_warned_of_with_its_films(folder, tmp_path):
    cells = ["fracture", "rib fracture", "rib fracture", "fracture|rib fracture", "normal"]
    rows = [f"film{k:02d},{cell}" for k, cell in enumerate(cells)]
    found = read_rows(folder, tmp_path, "file,label", *rows)
    assert "warning: films of a kind count as negative for it: rib fracture (2 films)" in said(
        found
    )


# ---------------------------------------------------------------- patients, signs and views
def read_many(folder, tmp_path, header, cell, films=24, **kwargs):
    """Read rows of `films` films, whose cells are written from {0}: k, {1}: k // 2, {2}: k % 2."""
    rows = [f"film{k:02d},{k % 2},{cell.format(k, k // 2, k % 2)}" for k in range(films)]
    return read_rows(folder, tmp_path, f"file,label,{header}", *rows, **kwargs)


def test_a_column_of_stays_does_not_hide_the_patients(folder, tmp_path):
    header, cell = "Fall-Nr,Kennung", "{0},P{1:03d}"
    words = "every film has its own Fall-Nr, but column Kennung looks like the patient"
    refused(lambda: read_many(folder, tmp_path, header, cell), words)
    assert len(set(patients_of(read_many(folder, tmp_path, header, cell, films=20)))) == 20
    found = read_many(folder, tmp_path, "patient", "{0}")
    assert "column patient, another one for every film: if it numbers films or stays" in said(found)
    for header, cell in (("patient,scanner", "{0},S{2}"), ("patient,Kennung", "{1},P{0}")):
        assert "patients: column patient" in said(read_many(folder, tmp_path, header, cell))


def test_a_column_of_two_values_is_no_patient_when_films_must_be_divided(folder, tmp_path):
    refused(
        lambda: read_many(folder, tmp_path, "Patient", "stationaer{2}"),
        "column Patient tells too few patients .* .stationaer0, stationaer1.: if it says something",
    )
    read_many(folder, tmp_path, "Patient", "stationaer{2}", trained=("labels", ("label",)))


SPELT = [  # spellings of patients, how many these are
    ("P00001108 P-00001108 P_00001108 p00001108 P.00001108", 1),
    ("1-12 11-2", 2),
    ("1-12 112", 1),  # may be one: then they must not be divided
    ("P1 P11 P-2", 3),
    ("A-1-12 A-11-2 A-1-1", 3),
    ("1.2.840.1 1.2.84.01", 2),
    ("Meier-A MeierB", 2),
    ("P0118 P118 p-00118", 1),
    ("A-1-12 A112 A0112", 1),
]


@pytest.mark.parametrize("cells, patients", SPELT)
def test_spellings_of_a_patient_are_one_and_it_is_said(folder, tmp_path, cells, patients):
    rows = [f"film{k:02d},{k % 2},{cell}" for k, cell in enumerate(cells.split())]
    found = read_rows(folder, tmp_path, "file,label,patient", *rows)
    assert len(set(patients_of(found))) == patients
    assert ("spelt in several ways" in said(found)) == (patients == 1)


def test_plus_and_minus_are_yes_and_no_or_refused(folder, tmp_path):
    rows = ["film00,+", "film01,-", "film02,", "film03,+"]
    found = read_rows(folder, tmp_path, "file,label", *rows)
    assert targets_of(found) == [(1,), (0,), (1,)] and "+ is read as yes, - as no" in said(found)
    refused(
        lambda: read_rows(folder, tmp_path, "file,label", *rows, "film04,++"), "'.', a sign and no"
    )
    rows = ["film00,HIV+", "film01,HIV-"]
    assert read_rows(folder, tmp_path, "file,label", *rows).labels == ("HIV+",)


@pytest.mark.parametrize("name", ["view", "Projektion", "ViewPosition", "Frontal/Lateral"])
def test_lateral_films_are_counted(folder, tmp_path, name):
    rows = ["film00,1,PA", "film01,0,Lateral", "film02,0,LL", "film03,1,AP"]
    found = read_rows(folder, tmp_path, f"file,label,{name}", *rows)
    assert f"warning: 2 of 4 films are lateral, as column {name} says" in said(found)
    found = read_rows(folder, tmp_path, f"file,label,{name}", *rows[::3])
    assert "lateral" not in said(found)
    rows = ["film00,1,L", "film01,0,R"]  # a side of the body, as DICOM's (0020,0060) names it
    found = read_rows(folder, tmp_path, "file,label,ImageLaterality", *rows)
    assert "are lateral" not in said(found)


def test_a_small_table_of_a_models_own_classes_is_compared(folder, tmp_path):
    """A class of which it has one film, or a code whose neighbour it lacks, is one nevertheless."""
    codes = ("labels", tuple("0123456789"), "")
    rows = [f"film{k:02d},{code}" for k, code in enumerate("00077779")]
    found = read_rows(folder, tmp_path, "file,label", *rows, trained=codes)
    assert [target.index(1) for target in targets_of(found)] == [0, 0, 0, 7, 7, 7, 7, 9]
    rows[0] = "film00,-3"
    refused(lambda: read_rows(folder, tmp_path, "file,label", *rows, trained=codes), "line 2.*'-3'")
    names = ("Effusion", "Mass", "Edema", "Hernia", "Fibrosis", "Emphysema")
    rows = [f"film{k:02d},{name}" for k, name in enumerate([*names[:5], "normal"])]
    found = read_rows(folder, tmp_path, "file,label", *rows, trained=("labels", names, ""))
    assert [sum(target) for target in targets_of(found)] == [1, 1, 1, 1, 1, 0]


def test_rows_without_a_label_do_not_make_a_patient_column_doubtful(tmp_path):
    """Each of them has a patient of its own, but others have several films."""
    films = [f"f{k:02d}" for k in range(90)]
    splits = ("train", "val", "test")
    rows = [f"f{k:02d},{k % 2},{splits[k // 2 % 3]},Q{k // 2},P{k // 2}" for k in range(60)]
    rows += [f"f{k:02d},,train,Q{k},P{k}" for k in range(60, 90)]
    text = "\n".join(["filename,label,split,patient_id,case_code", *rows])
    labels = make_labels(tmp_path, text, *films)
    assert labels.patient_note == "patients: column patient_id" and labels.others[89] == "Q89"


def test_of_yes_and_no_and_a_slip_the_slip_is_named(folder, tmp_path):
    for cells, slip in ((["0", "1", "1", "0.5"], "0.5"), (["yes", "no", "yes", "ys"], "ys")):
        rows = [f"film{k:02d},{cell}" for k, cell in enumerate(cells)]
        refused(
            lambda rows=rows: read_rows(folder, tmp_path, "file,label", *rows),
            f"column label says {slip!r}, which is neither yes .1., no .0., unsure .-1. nor empty",
        )


# ---------------------------------------------------------------- what was passed over in silence
def test_a_second_column_of_diagnoses_is_refused_and_not_counted_as_negative(folder, tmp_path):
    header = "Dateiname,Diagnose,Nebendiagnose"
    rows = ["film00,Pneumonie,Erguss", "film01,normal,", "film02,Erguss,Pneumonie"]
    refused(
        lambda: read_rows(folder, tmp_path, header, *rows),
        "line 2: column Nebendiagnose says 'Erguss', a class of column Diagnose",
        "join both with . in one column, or say --column Diagnose",
    )
    found = read_rows(folder, tmp_path, header, *rows, column="Diagnose")
    assert targets_of(found) == [(0, 1), (0, 0), (1, 0)]
    agreeing = ["film00,a|b,B|A", "film01,a,a", "film02,b,", "film03,normal,c", "film04,,a"]
    found = read_rows(folder, tmp_path, header, *agreeing)
    assert targets_of(found) == [(1, 1), (1, 0), (0, 1), (0, 0)]
    codes = [f"film{k:02d},{k % 3},{2 * k % 3}" for k in range(6)]  # the age, say
    assert read_rows(folder, tmp_path, header, *codes).labels == ("0", "1", "2")


def test_every_column_that_is_not_learnt_is_named(folder, tmp_path):
    names = [f"c{k}" for k in range(23)]
    rows = [f"film{k:02d},{('Mass', 'normal')[k]}" + ",7" * 23 for k in range(2)]
    found = read_rows(folder, tmp_path, ",".join(["file,label", *names]), *rows)
    assert f"columns not learnt: {', '.join(names[:20])} and 3 more" in found.notes


def test_a_date_in_the_name_of_a_film_is_no_patient_of_nih(tmp_path):
    names = [f"202301{k // 2 + 10}_00{k % 2}.png" for k in range(8)]
    make_films(tmp_path / "films", names)
    rows = [f"{name},{k % 2}" for k, name in enumerate(names)]
    found = read_rows(tmp_path / "films", tmp_path, "file,label", *rows)
    assert "patients unknown" in said(found) and len(set(patients_of(found))) == 8


LOST_LETTERS = [  # label, patient, what is refused
    ("PÃ¤vermehrung", "p1", "line 2: column label says 'PÃ¤vermehrung': letters were lost"),
    ("Erg\ufffd", "p1", "line 2: column label .*: letters were lost"),
    ("normal", "Mâ€™Bo", "line 2: column patient says .*: letters were lost"),
    ("normal", "M?ller", "line 2: column patient says 'M.ller': letters were lost"),
    ("Erg?sse", "p1", "line 2: column label says 'Erg.sse': letters were lost"),
    ("????", "p1", "line 2: column label says .*: letters were lost"),
    ("LESÃO", "CONCEIÇÃO", None),
    ("PULMÃO (ÂNUS)", "Â", None),
    ("pneumonia?", "p1", None),
]


@pytest.mark.parametrize("label, patient, words", LOST_LETTERS)
def test_letters_that_were_lost_are_told(folder, tmp_path, label, patient, words):
    rows = [f"film00,{label},{patient}", "film01,mass,p2", "film02,normal,p3"]

    def read():
        return read_rows(folder, tmp_path, "file,label,patient", *rows)

    if words:
        refused(read, words, "save it as .CSV UTF-8.")
    else:
        assert label in read().labels and patient in patients_of(read())


def test_letters_lost_in_a_name_count_and_not_in_a_film_or_another_column(folder, tmp_path):
    rows = ["film00,1,what?no", "film01,0,"]
    refused(lambda: read_rows(folder, tmp_path, "file,ErgÃ¼sse,x", *rows), "column Erg.*: letters")
    assert read_rows(folder, tmp_path, "file,Ergüsse,x", *rows).labels == ("Ergüsse",)
    make_films(tmp_path / "films", ["MÃ¼ller?x.png"])
    found = read_rows(tmp_path / "films", tmp_path, "file,label", "MÃ¼ller?x.png,1")
    assert targets_of(found) == [(1,)]


def test_patients_as_excel_writes_them(folder, tmp_path):
    cells = ['"=""00118"""', "'00118", '="118"', "118", "A\u00ad1", "A1"]
    rows = [f"film{k:02d},{k % 2},{cell}" for k, cell in enumerate(cells)]
    found = read_rows(folder, tmp_path, "file,label,patient", *rows)
    assert patients_of(found) == ["118"] * 4 + ["A1"] * 2
    for cell, words in (
        ("1E+12", "a spreadsheet rounded the number"),
        ("1.000", "which may be a thousand or not"),
        ('"12,000"', "which may be a thousand or not"),
        ("dito", "a ditto: write the patient in every row"),
    ):
        refused(
            lambda cell=cell: read_rows(
                folder, tmp_path, "file,label,patient", *rows, f"film09,1,{cell}"
            ),
            f"line 8: column patient says .*{words}",
        )
    found = read_rows(folder, tmp_path, "file,label,patient", "film00,1,1E5", "film01,0,13.00")
    assert patients_of(found) == ["1E5", "13"]


def test_patients_in_merged_cells_are_not_taken_for_unknown(folder, tmp_path):
    def read(*cells):
        rows = [f"film{k:02d},{k % 2},{cell}" for k, cell in enumerate(cells)]
        return read_rows(folder, tmp_path, "file,label,patient", *rows)

    refused(lambda: read("a", "", "", "b", ""), "line 3: column patient .* 3 blanks .*merged cells")
    for cells in (("a", "", "b", "c"), ("a", "", "", "b", "b"), ("", "a", ""), ("a", "NA", "NA")):
        assert "warning: patients: column patient; " in said(read(*cells))


BESIDE = [  # cells of a column beside one of 0 and 1, what is refused
    ("x||x|", "column Erguss has 'x' and blanks: write 1 and 0"),
    ("ja (links)|nein|ja (rechts)|ja (links)", "line 2: column Erguss says 'ja .links.', which is"),
    ("yes|mild|severe|mild", "line 3: column Erguss says 'mild'"),
    ("Checked|Unchecked|Checked|", None),
    ("AFib|normal|AFib|SVT", ()),  # another question
    ("N|E|C|E", ()),
]


@pytest.mark.parametrize("cells, outcome", BESIDE)
def test_answers_in_another_code_beside_others_are_refused(folder, tmp_path, cells, outcome):
    rows = [f"film{k:02d},{k % 2},{cell}" for k, cell in enumerate(cells.split("|"))]

    def read(**kwargs):
        return read_rows(folder, tmp_path, "file,Mass,Erguss", *rows, **kwargs)

    if outcome:
        refused(read, outcome)
        assert read(column="Mass").labels == ("Mass",)
    else:
        assert read().labels == (("Mass", "Erguss") if outcome is None else ("Mass",))


def test_cells_that_excel_left_out_are_blank_but_in_the_last_row(folder, tmp_path):
    rows = ["film00,1,Mass", "film01,0", "film02", "film03,0,"]
    found = read_rows(folder, tmp_path, "file,A,B", *rows, column="A")
    assert targets_of(found) == [(1,), (0,), (0,)]
    assert "2 rows have fewer cells than the header (first: line 3)" in said(found)
    refused(
        lambda: read_rows(folder, tmp_path, "file,A,B", *rows, "film04,1"),
        "line 6: 2 cells where the header has 3: is the file cut off",
    )


@pytest.mark.parametrize(
    "header, cells, labels",
    [
        # A second reader, and why the film was taken, are no second diagnosis.
        ("reader1,reader2,label", ["TB,normal,normal", "TB,TB,TB"], ("TB",)),
        ("Indication,Befund", ["Erguss,normal", ",Erguss", ",Pneumonie"], ("Erguss", "Pneumonie")),
        # A column of no and kinds asks something else than the columns of 0 and 1.
        ("oxygen,mass,effusion", ["no,0,1", "nasal,1,0", "mask,0,0"], ("mass", "effusion")),
        ("printed,mass,effusion", ["x,0,1", ",1,0", "x,0,0"], ("mass", "effusion")),
        # PadChest's label, and names that may be classes of their own.
        ("Labels", ["['exclude']", "['pneumonia']", "['exclude', 'pneumonia']"], None),
        ("label", ["normal", "borderline", "enlarged"], ("borderline", "enlarged")),
        ("label", ["good", "poor quality", "moderate"], ("good", "moderate", "poor quality")),
        ("label", ["1", "3", "5", "7"], ("1", "3", "5", "7")),  # a scale with gaps
        # What nobody learns may be garbled.
        ("hospital,label", ["CharitÃ©,normal", "CharitÃ©,Mass"], ("Mass",)),
        ("valid flag,Mass", ["1,0", "0,1"], ("valid flag", "Mass")),
        (
            "site_id,label",
            [f"{1 + k % 7},{('normal', 'Mass')[k % 2]}" for k in range(10)],
            ("Mass",),
        ),
    ],
)
def test_what_a_careful_human_reads_without_doubt_is_not_refused(
    folder, tmp_path, header, cells, labels
):
    rows = [
        f'film{k:02d},"{c}"' if "[" in c else f"film{k:02d},{c}" for k, c in enumerate(2 * cells)
    ]
    found = read_rows(folder, tmp_path, f"filename,{header}", *rows[:10])
    assert found.labels == (labels or ("exclude", "pneumonia"))
