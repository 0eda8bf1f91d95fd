"""The eight downstream sets as people have them on disk, and any folder with a CSV: films, targets, splits, recipe.

    splits = tasks.load("shenzhen", tasks.find_root("shenzhen"))
    splits.train[0]                # Example(path, target, patient, mask);   splits.notes says what was decided, splits.counts() what came out

Facts and decisions behind every reader: DATASETS.md (its section 0 is the list). Sub-folders are found by looking, not by configuration.
"""

import os
import re
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np

from plumbing.film import SUFFIXES, film_size
from plumbing.folder import Index
from plumbing.launch import UserError
from plumbing.splits import Example, Splits, complete, disjoint
from plumbing.table import (
    NEGATIVE,
    SPLITS,
    number,
    read_list,
    read_table,
    require_columns,
    without_suffix,
)

NIH = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
)


VINDR = (
    "Pleural effusion",
    "Lung tumor",
    "Pneumonia",
    "Tuberculosis",
    "Other diseases",
    "No finding",
)  # not COPD: DATASETS.md section 4


CHEXPERT = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")


UNCERTAIN_IS_POSITIVE = ("Atelectasis", "Edema")


RSNA = ("Normal", "No Lung Opacity / Not Normal", "Lung Opacity")


CHESTDR = (
    "pleural_effusion",
    "nodule",
    "pneumonia",
    "cardiomegaly",
    "hilar_enlargement",
    "fracture_old",
    "fibrosis",
    "aortic_calcification",
    "tortuous_aorta",
    "thickened_pleura",
    "TB",
    "pneumothorax",
    "emphysema",
    "atelectasis",
    "calcification",
    "pulmonary_edema",
    "increased_lung_markings",
    "elevated_diaphragm",
    "consolidation",
)


class Task(NamedTuple):
    """One row of the table. kind: labels (BCE, mean AUROC), classes (cross entropy, accuracy), mask (Dice + BCE, Dice). sizes: films in the
    official train, val, test. paper: Tables 1 and 2, percent. tree: what --data should hold and where to get it."""

    reader: Callable
    kind: str
    labels: tuple
    sizes: tuple
    recipe: dict
    paper: str
    tree: str


class Absent(Exception):
    """A reader does not find the files that it needs; `load` turns it into the expected tree."""


class Found(NamedTuple):
    """What a reader returns: {split or "all": rows (name, target, patient, mask)}, remarks, and where the defaults of the table do not hold:
    the path parts that tell two films apart, kind, labels; drawn: the few-shot lists were used."""

    parts: dict
    notes: list = []
    depth: int = 1
    kind: str | None = None
    labels: tuple | None = None
    drawn: bool = False


def _file(index, *names):
    """The first file with one of these names; Absent when there is none."""
    files = index.files(*names)
    if not files:
        raise Absent("no " + " or ".join(names))
    return files[0]


def _rows(parts, patient=lambda name: name):
    """{split: [(name, numbers)]} → {split: [(name, target, patient, mask)]}."""
    return {
        split: [(name, numbers, patient(name), None) for name, numbers in rows]
        for split, rows in parts.items()
    }


def _choose(films, parts, table, lists):
    """{split: names} → {split: [films[name]]}; Stop when a list names a film without a row in the table."""
    unknown = [n for names in parts.values() for n in names if n not in films]
    if unknown:
        raise UserError(
            f"{table}: {len(unknown)} films of {lists} have no row, the first: {', '.join(unknown[:3])}"
        )
    return {split: [films[n] for n in names] for split, names in parts.items()}


def _shenzhen(index, shots):
    listed = index.lists("ShenzenCXR_{}_data.txt", "ShenzhenCXR_{}_data.txt")
    if listed:
        return Found(_rows(listed), ["split: ShenzenCXR_*_data.txt"])
    names = [n.rpartition("/")[2] for n in index.names]
    films = [(n, (int(n[-5]),)) for n in names if re.fullmatch(r"CHNCXR_\d{4}_[01]\.png", n)]
    if not films:
        raise Absent("no CHNCXR_*.png")
    return Found(_rows({"all": films}))


def _nih_patient(name):
    return name.split("_")[0]


def _chestxray14(index, shots):
    listed = index.lists("Xray14_{}_official.txt")
    if listed:
        return Found(_rows(listed, _nih_patient), ["split: Xray14_*_official.txt"])
    table = _file(index, "Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
    findings = {
        r["Image Index"]: r["Finding Labels"].split("|")
        for r in read_table(table, "Image Index", "Finding Labels")
    }
    films = {
        name: (name, tuple(int(label in found) for label in NIH))
        for name, found in findings.items()
    }
    official = [index.files(f) for f in ("train_val_list.txt", "test_list.txt")]
    if not all(official):
        return Found(_rows({"all": list(films.values())}, _nih_patient))
    parts = {
        split: [n for n, _ in read_list(path[0])]
        for split, path in zip(("train", "test"), official)
    }
    return Found(
        _rows(_choose(films, parts, table, "train_val_list.txt, test_list.txt"), _nih_patient),
        ["test: test_list.txt"],
    )


def _vindr(index, shots):
    listed = index.lists("VinDrCXR_{}_pe_global_one.txt")
    if listed:
        return Found(_rows(listed), ["labels and test: VinDrCXR_*_pe_global_one.txt"])
    parts = {}
    for split in ("train", "test"):
        votes = {}
        table = _file(index, f"image_labels_{split}.csv")
        rows = read_table(table)
        wanted = ["image_id", *(v for v in VINDR if v != "Other diseases")]
        require_columns(table, rows[0] if rows else [], wanted)
        for row in rows:
            row.setdefault(
                "Other diseases", row.get("Other disease", "")
            )  # the test file writes it in the singular
            votes.setdefault(row["image_id"], []).append(
                [number(row[label]) > 0 for label in VINDR]
            )
        parts[split] = [
            (name, tuple(int(v) for v in np.any(rows, axis=0))) for name, rows in votes.items()
        ]
    return Found(
        _rows(parts),
        ["labels: positive when any radiologist says so", "test: image_labels_test.csv"],
    )


def _chexpert(index, shots):
    parts = {}
    for split, name in (("train", "train.csv"), ("test", "valid.csv")):
        rows = [
            r
            for r in read_table(_file(index, name), "Path", "Frontal/Lateral", *CHEXPERT)
            if r["Frontal/Lateral"] == "Frontal"
        ]
        limit = {label: (1, -1) if label in UNCERTAIN_IS_POSITIVE else (1,) for label in CHEXPERT}
        parts[split] = [
            (r["Path"], tuple(int(number(r[label]) in limit[label]) for label in CHEXPERT))
            for r in rows
        ]
    notes = [
        "labels: uncertain is positive for "
        + " and ".join(UNCERTAIN_IS_POSITIVE)
        + ", negative for the others",
        "test: valid.csv, frontal",
    ]
    return Found(
        _rows(parts, lambda name: name.split("/")[-3]), notes, depth=3
    )  # patient/study/view: the prefix differs between releases


def _rsna_split(index, rows, table, notes=()):
    """rows {id: row} → Found by RSNAPneumonia_*.txt, with or without .png in them, or all rows."""
    listed = index.lists("RSNAPneumonia_{}.txt")
    parts = {split: [without_suffix(n) for n, _ in names] for split, names in listed.items()} or {
        "all": list(rows)
    }
    return Found(
        _choose(rows, parts, table, "RSNAPneumonia_*.txt"),
        ["split: RSNAPneumonia_*.txt"] * bool(listed) + list(notes),
    )


def _rsna(index, shots):
    table = _file(index, "stage_2_detailed_class_info.csv")
    classes = {
        r["patientId"]: r["class"] for r in read_table(table, "patientId", "class")
    }  # one row a box: a film has up to four
    strange = set(classes.values()) - set(RSNA)
    if strange:
        raise UserError(f"{table}: class {sorted(strange)[0]!r} is none of {', '.join(RSNA)}")
    return _rsna_split(
        index,
        {n: (n, tuple(int(c == name) for name in RSNA), n, None) for n, c in classes.items()},
        table,
    )


def choose_canvas(index, name, too_small):
    """→ (canvas, notes): None, the film's own size, unless the annotations do not fit into it: then a shrunk copy of the 1024 × 1024 originals.
    too_small(height, width) says whether any annotation reaches beyond; `name` is any film of the set."""
    height, width = film_size(index.find([name], what="the annotations")[0])
    if not too_small(height, width):
        return None, []
    if too_small(1024, 1024):
        raise UserError(
            f"{index.root}: annotations reach outside 1024 x 1024 pixels: not the distributed CSV"
        )
    return (1024, 1024), [
        f"masks: the films are {width} x {height}, the annotations were drawn on 1024 x 1024 and are scaled"
    ]


def _rsna_seg(index, shots):
    table, boxes = _file(index, "stage_2_train_labels.csv"), {}
    for row in read_table(table, "patientId", "x", "y", "width", "height", "Target"):
        box = tuple(number(row[k]) for k in ("x", "y", "width", "height"))
        boxes.setdefault(row["patientId"], []).extend([box] if row["Target"] == "1" else [])
    right, bottom = [
        max(edge)
        for edge in zip((0, 0), *((x + w, y + h) for rows in boxes.values() for x, y, w, h in rows))
    ]
    canvas, notes = choose_canvas(
        index, next(iter(boxes)), lambda height, width: right > width or bottom > height
    )
    return _rsna_split(
        index,
        {n: (n, (), n, ("boxes", tuple(rows), canvas)) for n, rows in boxes.items()},
        table,
        notes,
    )


def _siim(index, shots):
    table, runs = _file(index, "stage_2_train.csv", "train-rle.csv"), {}
    for row in read_table(table, "ImageId", "EncodedPixels"):  # several rows a film: their union
        runs.setdefault(row["ImageId"], []).extend(
            [row["EncodedPixels"]] if row["EncodedPixels"] not in ("-1", "") else []
        )
    last = max((sum(map(int, r.split())) for rows in runs.values() for r in rows), default=0)
    canvas, notes = choose_canvas(
        index, next(iter(runs)), lambda height, width: last > height * width
    )
    rows = [(n, (), n, ("rle", tuple(r), canvas)) for n, r in runs.items()]
    several = sum(len(r) > 1 for r in runs.values())
    notes += [f"masks: {several} films have several rows, united"] * bool(several)
    tested = {
        without_suffix(n.rpartition("/")[2]) for n in index.names if "dicom-images-test/" in n
    } & set(runs)
    if not tested:
        return Found({"all": rows}, notes)
    parts = {
        "train": [r for r in rows if r[0] not in tested],
        "test": [r for r in rows if r[0] in tested],
    }
    return Found(parts, notes + ["test: dicom-images-test"])


def _chestdr(index, shots):
    test = index.files("test_WithLabel.txt")
    for pattern in [f"chest_{shots}-shot_{{}}_exp1.txt"] * bool(shots) + ["{}_20.txt", "{}val.txt"]:
        listed = index.lists(pattern, need=("train",))
        if listed and test:
            parts = listed | {"test": read_list(test[0])}
            return Found(
                _rows(parts),
                [f"split: {pattern.format('*')}, test_WithLabel.txt"],
                drawn="shot" in pattern,
            )
    films, table = [], _file(index, "chestdr_published_19d.csv", "chest_train.csv")
    rows = read_table(table)
    require_columns(table, rows[0] if rows else [], ["img_id"])
    for row in rows:
        at = list(row).index("img_id")
        films.append(
            (row["img_id"], list(row.values())[at + 1 : at + 1 + len(CHESTDR)])
        )  # the 19 columns after the name, in the order of the lists
    return Found(
        _rows(
            {
                "all": [
                    (n, tuple(int(number(x)) for x in cells))
                    for n, cells in films
                    if n and all(cells)
                ]
            }
        )
    )


def read_csv(index, table, column=None):
    """--labels FILE.csv → Found: filename, then label ('a', 'a|b', 'normal'), or one 0/1 column a label, or mask (a file) → segmentation;
    optional patient_id, split. column: the column to learn, where that order (mask, label, 0/1) is not what is wanted."""
    if not table or not Path(table).is_file():
        raise UserError(
            f"--task csv needs --labels FILE.csv (columns filename, label); {table or 'none given'} is no file"
        )
    table = Path(table)
    rows = read_table(table) or [{}]
    names = {h.lower(): h for h in rows[0]}
    film, patient, split = (
        next((names[n] for n in aliases if n in names), None)
        for aliases in (
            ("filename", "image_filename", "file", "image", "path", "image index"),
            ("patient_id", "patient"),
            ("split",),
        )
    )
    target = column or next(
        (
            names[n]
            for n in ("mask", "mask_file", "label", "labels", "finding labels")
            if n in names
        ),
        None,
    )
    if not film or (column and column not in rows[0]):
        raise UserError(
            f"{table}: no column {column if film else 'filename'}; its columns are {', '.join(rows[0]) or 'none, or no row follows'}"
        )
    masked = bool(target) and any(Path(r[target]).suffix.lower() in SUFFIXES for r in rows)
    if masked:
        labels, targets, masks = (
            (column or "mask",),
            [()] * len(rows),
            _csv_masks(index, table, [r[target] for r in rows]),
        )
    else:
        labels, targets = _csv_labels(
            table, rows, target, [h for h in rows[0] if h not in (film, patient, split)]
        )
        masks = [None] * len(rows)
    parts, alias = {}, {"valid": "val", "validation": "val", "validate": "val", "training": "train"}
    for row, goal, mask in zip(rows, targets, masks):
        part = row[split].lower() if split else "all"
        parts.setdefault(alias.get(part, part), []).append(
            (row[film], goal, (patient and row[patient]) or row[film], mask)
        )
    if split and not {"train", "test"} <= set(parts) <= set(SPLITS):
        raise UserError(
            f"{table}: column split must name train, test and perhaps val; it says {', '.join(sorted(map(repr, parts)))}"
        )
    notes = [
        f"labels: column {target}" if target else "labels: " + ", ".join(labels),
        f"split: {'column split' if split else 'none in the CSV'}",
    ]
    notes += [] if patient else ["patients: no column patient_id, so every film counts as one"]
    return Found(parts, notes, 0, "mask" if masked else "labels", labels)


def _csv_labels(table, rows, target, others):
    """→ (label names, targets): from one column of names, or from every column that holds only 0 and 1."""
    if not target:
        labels = [h for h in others if {r[h] for r in rows} <= {"0", "1", "0.0", "1.0", ""}]
        if not labels:
            raise UserError(
                f"{table}: no column label, mask, or of 0 and 1; --column NAME says which one to learn"
            )
        return tuple(labels), [tuple(int(number(r[h])) for h in labels) for r in rows]
    if {r[target] for r in rows} <= {"0", "1", "0.0", "1.0"}:
        return (target,), [(int(number(r[target])),) for r in rows]
    found = [
        {x.strip() for x in r[target].split("|") if x.strip().lower() not in NEGATIVE} for r in rows
    ]
    labels = sorted(set().union(*found))
    if len(labels) == 2 and all(len(f) == 1 for f in found):
        labels = labels[1:]  # two exclusive names are one question; the second is its "yes"
    if not labels:
        raise UserError(
            f"{table}: column {target} names no class beside {', '.join(NEGATIVE[:-1])}"
        )
    return tuple(labels), [tuple(int(label in f) for label in labels) for f in found]


def _csv_masks(index, table, names):
    """Mask files beside the CSV, under --data, or anywhere there by name; an empty cell is an empty mask."""
    out, absent, by_name = [], [], {n.rpartition("/")[2]: n for n in index.names}
    for name in names:
        places = [
            p
            for p in (
                table.parent / name,
                index.root / name,
                index.root / by_name.get(Path(name).name, name),
            )
            if p.is_file()
        ]
        out.append(("file", places[0]) if name and places else ("boxes", (), None))
        absent += [name] if name and not places else []
    if absent:
        raise UserError(
            f"{table}: {len(absent)} of the {len(names)} masks are not there, the first: {', '.join(absent[:3])}"
        )
    return out


def find_root(name, data=None):
    """Folder of a task: --data, or $CXR/<task>, or ./data/<task>; the two RSNA tasks share one."""
    tried = (
        [Path(data)]
        if data
        else [
            Path(p) / n
            for p in (os.environ.get("CXR"), "data")
            if p
            for n in dict.fromkeys((name, name.removesuffix("_seg")))
        ]
    )
    folder = next((f for f in tried if f.is_dir()), None)
    if folder is None:
        raise UserError(
            f"no folder {' or '.join(map(str, tried))} for task {name}: give --data DIR. Expected: {TASKS[name].tree}"
        )
    return folder


def load_task(name, root, table=None, shots=None, column=None, cache=None):
    """Read task `name` under `root` → Splits, every film's file found, none opened. table, column: of task csv (read_csv). cache: text file for the index.
    shots: MedFM's own K-shot lists where they lie there (else draw() does it). Stop says which files are missing and where to get them."""
    task, index = TASKS[name], Index(root, cache)
    try:
        found = read_csv(index, table, column) if name == "csv" else task.reader(index, shots)
    except Absent as error:
        raise UserError(f"{root}: {error}. Expected for task {name}: {task.tree}") from None
    kind, labels = found.kind or task.kind, found.labels or task.labels
    for row in (r for rows in found.parts.values() for r in rows):
        if len(row[1]) != (0 if kind == "mask" else len(labels)):
            raise UserError(f"{root}: {row[0]} has {len(row[1])} labels, not {len(labels)}")
    paths = {
        split: index.find([r[0] for r in rows], found.depth, f"the {split} list")
        for split, rows in found.parts.items()
    }
    cases = {
        split: [Example(path, *row[1:]) for path, row in zip(paths[split], rows)]
        for split, rows in found.parts.items()
    }
    parts, drew = complete(cases, task.sizes)
    parts, dropped = disjoint(parts)
    if not all(parts.values()):
        raise UserError(
            f"{root}: {' and '.join(s for s in SPLITS if not parts[s])} is empty: too few films or patients for task {name}"
        )
    return Splits(
        name,
        kind,
        labels,
        parts["train"],
        parts["val"],
        parts["test"],
        found.notes + drew + dropped,
        found.drawn,
    )


CLASSIFY = dict(
    lr=1e-4,
    weight_decay=0.05,
    layer_decay=0.75,
    drop_path=0.6,
    warmup=1,
    patience=15,
    epochs=50,
    batch=32,
    head="random",
)


SEGMENT = dict(
    lr=2e-4,
    weight_decay=0.05,
    layer_decay=0.8,
    drop_path=0.1,
    warmup=1,
    patience=15,
    epochs=50,
    batch=32,
    head="random",
)


TASKS = {
    "vindr": Task(
        _vindr,
        "labels",
        VINDR,
        (13500, 1500, 3000),
        CLASSIFY | dict(batch=256),
        "95.24",
        "vindr-cxr/1.0.0/{train,test}/<id>.dicom and annotations/image_labels_{train,test}.csv, from physionet.org/content/vindr-cxr",
    ),
    "shenzhen": Task(
        _shenzhen,
        "labels",
        ("tuberculosis",),
        (463, 65, 134),
        CLASSIFY | dict(epochs=100),
        "98.88",
        "ChinaSet_AllFiles/CXR_png/CHNCXR_0001_0.png ..., from data.lhncbc.nlm.nih.gov/public/Tuberculosis-Chest-X-ray-Datasets",
    ),
    "chestxray14": Task(
        _chestxray14,
        "labels",
        NIH,
        (75312, 11212, 25596),
        CLASSIFY | dict(epochs=30, batch=256),
        "83.58",
        "images*/00000001_000.png ..., Data_Entry_2017_v2020.csv, train_val_list.txt, test_list.txt, from nihcc.app.box.com/v/ChestXray-NIHCC",
    ),
    "rsna": Task(
        _rsna,
        "classes",
        RSNA,
        (21295, 2680, 2709),
        CLASSIFY | dict(epochs=30, batch=256),
        "75.03",
        "stage_2_train_images/<id>.dcm and stage_2_detailed_class_info.csv, from kaggle.com/c/rsna-pneumonia-detection-challenge",
    ),
    "chexpert": Task(
        _chexpert,
        "labels",
        CHEXPERT,
        (171924, 19103, 202),
        CLASSIFY
        | dict(lr=1e-2, weight_decay=0.4, layer_decay=0.55, drop_path=0.1, epochs=1, batch=256),
        "89.63",
        "CheXpert-v1.0[-small]/{train,valid}/patient*/study*/*.jpg, train.csv, valid.csv, from stanfordaimi.azurewebsites.net",
    ),
    "chestdr": Task(
        _chestdr,
        "labels",
        CHESTDR,
        (783, 196, 1161),
        CLASSIFY | dict(epochs=100),
        "64.60 / 75.19 / 76.40",
        "MedFMC_train/chest/{images/*.png,chest_train.csv} from figshare (MedFMC) and chest_K-shot_*_exp1.txt from github.com/openmedlab/MedFM",
    ),
    "siim": Task(
        _siim,
        "mask",
        ("pneumothorax",),
        (9303, 1372, 1372),
        SEGMENT,
        "84.58",
        "dicom-images-train/**/<ImageId>.dcm and stage_2_train.csv or train-rle.csv, from kaggle.com/c/siim-acr-pneumothorax-segmentation",
    ),
    "rsna_seg": Task(
        _rsna_seg,
        "mask",
        ("opacity",),
        (21295, 2680, 2709),
        SEGMENT,
        "79.02",
        "stage_2_train_images/<id>.dcm and stage_2_train_labels.csv, from kaggle.com/c/rsna-pneumonia-detection-challenge",
    ),
    "csv": Task(
        read_csv,
        "labels",
        (),
        (70, 10, 20),
        CLASSIFY | dict(head="probe"),
        "",
        "a folder of films, and --labels FILE.csv with columns filename, label",
    ),
}
