"""The eight downstream data sets as people have them on disk, and any folder with a CSV.

To add a ninth one, write a reader, give it a row in TASKS and test it on a small tree with its
lay-out: .github/CONTRIBUTING.md says how, step by step.

    splits = load_task("shenzhen", find_root("shenzhen"))
    splits.train[0]    # Example(path, truth, patient, mask); splits.notes says what was decided

The facts behind every reader are in docs/data.md.
"""

import math
import os
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from plumbing.film import EMPTY_MASK, UnreadableFilm, film_size, read_mask
from plumbing.findings import zeros_and_ones
from plumbing.folder import Index
from plumbing.launch import UserError
from plumbing.own_table import Row, read_own_table
from plumbing.splits import Example, Splits, complete, disjoint, warn_of_copies
from plumbing.table import Finder, as_path, read_list, read_table, require_columns, without_suffix
from plumbing.words import MISSING, NO, SPLITS, UNCERTAIN, YES, answer

# Labels, in the order of the official lists.
NIH = tuple(
    "Atelectasis Cardiomegaly Effusion Infiltration Mass Nodule Pneumonia Pneumothorax "
    "Consolidation Edema Emphysema Fibrosis Pleural_Thickening Hernia".split()
)
# Pleural effusion, not COPD as the paper's text says: docs/data.md.
VINDR = tuple(
    "Pleural effusion, Lung tumor, Pneumonia, Tuberculosis, Other diseases, No finding".split(", ")
)
CHEXPERT = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
UNCERTAIN_IS_POSITIVE = ("Atelectasis", "Edema")
RSNA = ("Normal", "No Lung Opacity / Not Normal", "Lung Opacity")
CHESTDR = tuple(
    "pleural_effusion nodule pneumonia cardiomegaly hilar_enlargement fracture_old fibrosis "
    "aortic_calcification tortuous_aorta thickened_pleura TB pneumothorax emphysema atelectasis "
    "calcification pulmonary_edema increased_lung_markings elevated_diaphragm "
    "consolidation".split()
)


# ---------------------------------------------------------------- what a reader returns
class Found(NamedTuple):
    """What a reader finds. A row without a patient is of a patient called like the film."""

    parts: dict[str, list[Row]]  # by split, or {"all": rows} where the set defines no test split
    notes: list[str] = []  # one line per decision
    depth: int = 1  # how many parts of a path tell two films apart
    kind: str | None = None  # where that of the task does not hold
    labels: tuple | None = None  # where those of the task do not hold
    drawn: bool = False  # whether the train rows are the set's own few-shot draw
    against: str = ""  # see findings.Goal


class Absent(Exception):
    """A file is missing without which a set cannot be read; load_task adds the expected tree."""


def find_file(index: Index, *names: str) -> Path:
    """The first file with one of these names; Absent when there is none."""
    files = index.files(*names)
    if not files:
        raise Absent("no " + " or ".join(names))
    return files[0]


def read_number(table: Path, line: dict, cell: str) -> float:
    """The number in a cell of a line, 0 where it is missing; spreadsheets may write 1,0.

    UserError that names the line when it is none.
    """
    if answer(cell) is MISSING:
        return 0.0
    try:
        return float(cell.replace(",", "."))
    except ValueError:
        first = next(iter(line.values()))
        raise UserError(f"{table}: {first}: {cell[:60]!r} is no number") from None


def rows_of_lists(lists: dict, patient_of: Callable | None = None) -> dict[str, list[Row]]:
    """Turn split lists that carry labels, {split: [(name, labels)]}, into {split: rows}.

    patient_of(name): the patient of a film; by default each film is its own.
    """
    parts = {}
    for split, films in lists.items():
        parts[split] = [
            Row(name, labels, patient_of and patient_of(name)) for name, labels in films
        ]
    return parts


def divide_rows(rows: dict[str, Row], lists: dict, table: Path, source: str) -> Found:
    """Divide the rows of a table, {name without suffix: row}, as lists without labels say.

    Without lists, all rows stay together. source: how the lists are called, for the note and for
    the UserError when they name a film without a row.
    """
    if not lists:
        return Found({"all": list(rows.values())})
    parts = {}
    for split, films in lists.items():
        names = [without_suffix(name) for name, _ in films]  # some releases write .png behind them
        unknown = [name for name in names if name not in rows]
        if unknown:
            raise UserError(
                f"{table}: {len(unknown)} films of {source} have no row, "
                f"the first: {', '.join(unknown[:3])}"
            )
        parts[split] = [rows[name] for name in names]
    return Found(parts, [f"split: {source}"])


# ---------------------------------------------------------------- classification
def read_shenzhen(index, shots):
    """Shenzhen: tuberculosis or not says the last digit of the name, CHNCXR_0327_1.png."""
    lists = index.lists("ShenzenCXR_{}_data.txt", "ShenzhenCXR_{}_data.txt")
    if lists:
        return Found(rows_of_lists(lists), ["split: ShenzenCXR_*_data.txt"])
    names = [path.rpartition("/")[2] for path in index.names]
    films = [name for name in names if re.fullmatch(r"CHNCXR_\d{4}_[01]\.png", name)]
    if not films:
        raise Absent("no CHNCXR_*.png")
    return Found({"all": [Row(name, (int(name[-5]),)) for name in films]})


def read_nih(index, shots):
    """ChestX-ray14: findings joined by |; a film is named after its patient, 00000001_000.png."""
    lists = index.lists("Xray14_{}_official.txt")
    if lists:
        return Found(rows_of_lists(lists, nih_patient), ["split: Xray14_*_official.txt"])
    table = find_file(index, "Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
    rows = {}
    for line in read_table(table, "Image Index", "Finding Labels"):
        name = line["Image Index"]
        findings = line["Finding Labels"].split("|")
        unknown = set(findings).difference(NIH, ["No Finding"])
        if unknown:
            raise UserError(f"{table}: {name}: {unknown.pop()!r} is no finding of ChestX-ray14")
        row = Row(name, zeros_and_ones(findings, NIH), nih_patient(name))
        rows[without_suffix(name)] = row
    files = dict(train=index.files("train_val_list.txt"), test=index.files("test_list.txt"))
    lists = {split: read_list(paths[0]) for split, paths in files.items() if paths}
    lists = lists if len(lists) == 2 else {}
    return divide_rows(rows, lists, table, "train_val_list.txt, test_list.txt")


def nih_patient(name):
    """Read the patient from the name of a film: 00000013_005.png is one of patient 00000013."""
    return name.split("_")[0]


def read_vindr(index, shots):
    """VinDr-CXR: three radiologists per training film; one who sees a finding is enough."""
    lists = index.lists("VinDrCXR_{}_pe_global_one.txt")
    if lists:
        return Found(rows_of_lists(lists), ["labels and test: VinDrCXR_*_pe_global_one.txt"])
    parts = {
        "train": read_vindr_table(find_file(index, "image_labels_train.csv")),
        "test": read_vindr_table(find_file(index, "image_labels_test.csv")),
    }
    notes = ["labels: positive when any radiologist says so", "test: image_labels_test.csv"]
    return Found(parts, notes)


def read_vindr_table(table) -> list[Row]:
    """Unite the lines of each film, one line per radiologist."""
    lines = read_table(table)
    header = list(lines[0]) if lines else []
    column_of = {label: label for label in VINDR}
    if "Other diseases" not in header:
        column_of["Other diseases"] = "Other disease"  # the test file writes it in the singular
    require_columns(table, header, ["image_id", *column_of.values()])
    findings = {}
    for line in lines:
        cells = {label: line[column] for label, column in column_of.items()}
        seen = [label for label, cell in cells.items() if read_number(table, line, cell) > 0]
        findings.setdefault(line["image_id"], set()).update(seen)
    return [Row(name, zeros_and_ones(found, VINDR)) for name, found in findings.items()]


def read_chexpert(index, shots):
    """CheXpert: the frontal films of train.csv and, to test on, of valid.csv."""
    parts = {}
    for split, name in (("train", "train.csv"), ("test", "valid.csv")):
        table = find_file(index, name)
        parts[split] = []
        for line in read_table(table, "Path", "Frontal/Lateral", *CHEXPERT):
            path = line["Path"]
            if path.count("/") < 2:
                raise UserError(f"{table}: Path {path!r} is not patient/study/view")
            if line["Frontal/Lateral"] == "Frontal":
                truth = chexpert_truth(table, line)
                parts[split].append(Row(path, truth, patient=path.split("/")[-3]))
    uncertain = " and ".join(UNCERTAIN_IS_POSITIVE)
    notes = [
        f"labels: uncertain is positive for {uncertain}, negative for the others",
        "test: valid.csv, frontal",
    ]
    # Three parts, patient/study/view, name a film; what stands before differs between releases.
    return Found(parts, notes, depth=3)


def chexpert_truth(table, line):
    """1 is positive, 0 and blank negative; -1 is uncertain and depends on the label."""
    truth = []
    for label in CHEXPERT:
        value = read_number(table, line, line[label])
        is_positive = value == 1 or (value == -1 and label in UNCERTAIN_IS_POSITIVE)
        truth.append(int(is_positive))
    return tuple(truth)


RSNA_LISTS = "RSNAPneumonia_{}.txt"


def read_rsna(index, shots):
    """RSNA pneumonia: one of three classes per film."""
    table = find_file(index, "stage_2_detailed_class_info.csv")
    rows = {}
    for line in read_table(table, "patientId", "class"):  # one line per box: up to four per film
        if line["class"] not in RSNA:
            raise UserError(f"{table}: class {line['class']!r} is none of {', '.join(RSNA)}")
        rows[line["patientId"]] = Row(line["patientId"], zeros_and_ones([line["class"]], RSNA))
    return divide_rows(rows, index.lists(RSNA_LISTS), table, RSNA_LISTS.format("*"))


def read_chestdr(index, shots):
    """ChestDR of MedFMC: 19 labels; where its K-shot lists lie, those of the first experiment."""
    patterns = ["{}_20.txt", "{}val.txt"]  # train_20.txt and val_20.txt; trainval.txt
    if shots:
        patterns.insert(0, f"chest_{shots}-shot_{{}}_exp1.txt")
    test = index.files("test_WithLabel.txt")
    for pattern in patterns:
        lists = index.lists(pattern, need=("train",))
        if lists and test:
            parts = rows_of_lists(lists | {"test": read_list(test[0])})
            notes = [f"split: {pattern.format('*')}, test_WithLabel.txt"]
            return Found(parts, notes, drawn="shot" in pattern)
    return Found({"all": read_chestdr_table(index)})


def read_chestdr_table(index) -> list[Row]:
    """The labels are the 19 columns after img_id, in the order of the lists; blank lines go."""
    table = find_file(index, "chestdr_published_19d.csv", "chest_train.csv")
    lines = read_table(table)
    header = list(lines[0]) if lines else []
    require_columns(table, header, ["img_id"])
    first = header.index("img_id") + 1
    rows = []
    for line in lines:
        cells = list(line.values())[first : first + len(CHESTDR)]
        if line["img_id"] and all(cells):
            truth = tuple(int(read_number(table, line, cell)) for cell in cells)
            rows.append(Row(line["img_id"], truth))
    return rows


# ---------------------------------------------------------------- segmentation
# All films of RSNA and SIIM have this size; on a shrunk copy masks are squeezed as its films are.
CANVAS = (1024, 1024)
CANVAS_NOTE = "masks: drawn on 1024 x 1024, the films' distributed size"


def read_rsna_seg(index, shots):
    """RSNA pneumonia: the mask of a film is the union of its boxes, empty for negative films."""
    table = find_file(index, "stage_2_train_labels.csv")
    boxes = {}  # film: [(x, y, width, height)]
    for line in read_table(table, "patientId", "x", "y", "width", "height", "Target"):
        of_film = boxes.setdefault(line["patientId"], [])
        if answer(line["Target"]) not in (YES, NO):
            raise UserError(
                f"{table}: {line['patientId']}: Target is {line['Target']!r}, neither 1 nor 0"
            )
        if answer(line["Target"]) == YES:
            cells = [line[key] for key in ("x", "y", "width", "height")]
            x, y, width, height = [read_number(table, line, cell) for cell in cells]
            is_outside = min(x, y, width, height) < 0 or max(x + width, y + height) > max(CANVAS)
            refuse_outside(table, line["patientId"], is_outside)
            of_film.append((x, y, width, height))
    rows = {}
    for name, of_film in boxes.items():
        rows[name] = Row(name, (), mask=("boxes", tuple(of_film), CANVAS))
    found = divide_rows(rows, index.lists(RSNA_LISTS), table, RSNA_LISTS.format("*"))
    return found._replace(notes=[*found.notes, CANVAS_NOTE])


def read_siim(index, shots):
    """SIIM-ACR pneumothorax: run lengths, several per film; stage 1's test films are the test."""
    table = find_file(index, "stage_2_train.csv", "train-rle.csv")
    runs = {}  # film: [run lengths]
    for line in read_table(table, "ImageId", "EncodedPixels"):
        of_film = runs.setdefault(line["ImageId"], [])
        text = line["EncodedPixels"]
        if answer(text) in (MISSING, UNCERTAIN):  # "-1": no pneumothorax
            continue
        if not re.fullmatch(r"\d+ +\d+( +\d+ +\d+)*", text):
            raise UserError(
                f"{table}: {line['ImageId']}: EncodedPixels are no pairs of run lengths: "
                f"{text[:40]!r}"
            )
        last_pixel = sum(map(int, text.split()))
        refuse_outside(table, line["ImageId"], last_pixel > math.prod(CANVAS))
        of_film.append(text)
    rows = [Row(name, (), mask=("rle", tuple(texts), CANVAS)) for name, texts in runs.items()]
    notes = [CANVAS_NOTE]
    several = sum(len(texts) > 1 for texts in runs.values())
    if several:
        notes.append(f"masks: {several} films have several rows, united")
    in_test = [path for path in index.names if "dicom-images-test/" in path]
    test_names = {without_suffix(path.rpartition("/")[2]) for path in in_test}
    test = [row for row in rows if row.name in test_names]
    if not test:
        return Found({"all": rows}, notes)
    train = [row for row in rows if row.name not in test_names]
    return Found({"train": train, "test": test}, [*notes, "test: dicom-images-test"])


def refuse_outside(table, name, is_outside):
    """UserError when an annotation reaches outside of the canvas that it was drawn on."""
    if is_outside:
        raise UserError(
            f"{table}: {name}: an annotation reaches outside 1024 x 1024 pixels: "
            "not the distributed CSV"
        )


# ---------------------------------------------------------------- a CSV of one's own
def read_csv(index, table, column=None, uncertain="ignore", trained=None):
    """A table of one's own, see own_table: its films are found below index.root, and its masks.

    column, uncertain, trained: as own_table.read_own_table takes them. With a trained model the
    table may lack labels and splits: without a column split, all rows are test films.
    """
    if not table or not Path(table).is_file():
        raise UserError(
            "--task csv needs --labels FILE.csv (columns filename, label); "
            + (f"{table} is no file" if table else "none was given")
        )
    own = read_own_table(table, column, uncertain, trained)
    own = own.to_test() if trained else own
    paths, notes = find_films(index, own)
    below = [
        path.relative_to(index.root) if path.is_relative_to(index.root) else path for path in paths
    ]
    patients, patient_note = own.name_patients([path.as_posix() for path in below])
    own.refuse_contradictions(paths, patients)
    masks = find_masks(index, own, paths)
    refuse_unfit_masks(own, paths, masks)
    parts = {}
    spelt = dict(zip(own.sheet.lines, own.sheet.cells.get(own.sheet.patient, ()), strict=False))
    for row, patient, mask, path in zip(own.rows, patients, masks, paths, strict=True):
        written = row.name, spelt.get(row.line, patient)
        film = row._replace(patient=patient, mask=mask, path=path, written=written)
        parts.setdefault(row.split or "all", []).append(film)
    if own.sheet.split and not trained and not {"train", "test"} <= set(parts):
        own.sheet.refuse(
            "the split must be train and test and perhaps val; "
            f"it says {', '.join(sorted(parts))} only"
        )
    notes = [*own.notes, *notes, patient_note]
    return Found(parts, notes, kind=own.goal.kind, labels=own.goal.labels, against=own.goal.against)


def every_film(index, kind, labels) -> Found:
    """All films below a folder, of which nothing is known, for a finished model to predict."""
    truth = () if kind == "mask" else (None,) * len(labels)
    if not index.unmasked:
        raise UserError(f"--data {index.root}: no film below it, so there is nothing to predict")
    rows = [Row(name, truth, name, path=index.root / name) for name in index.unmasked]
    notes = [f"test: all {len(rows)} films below the folder, of which no label is known"]
    return Found({"test": rows}, notes, kind=kind, labels=labels)


def find_films(index, own) -> tuple[list[Path], list[str]]:
    """Find the film of every row below index.root, or where an absolute path says → paths, notes.

    UserError with the count when films are not there.
    """
    films = index.unmasked
    numbers, notes = own.locate(films)
    paths = []
    absent = []
    for row, i in zip(own.rows, numbers, strict=True):
        below = index.root / films[i] if i >= 0 else None
        written = Path(row.name)
        is_elsewhere = written.is_absolute() and written.is_file()
        if is_elsewhere and not (below and below.samefile(written)):  # a film has one path only
            paths.append(written.resolve())
        elif below:
            paths.append(below)
        else:
            absent.append(f"{row.name} (line {row.line})")
    if absent:
        advice = "delete these rows, or point --data higher"
        advice = advice if paths else "is --data the right folder?"
        own.sheet.refuse(
            f"{len(absent)} of the {len(own.rows)} films are not below {index.root}, the first: "
            f"{', '.join(absent[:3])}: {advice}"
        )
    others = len(films) - len(set(paths))
    if others > 0 and own.goal.kind != "mask":
        notes.append(f"{others} films of the folder are in no row that is used here")
    return paths, notes


def find_masks(index, own, paths) -> list[tuple | None]:
    """Find the mask files of a table beside it or below --data; an empty name is an empty mask.

    paths: the films, none of which is a mask. UserError when a mask is not there or fits several.
    """
    films = {path.absolute() for path in paths}
    pictures = [name for name in index.films if index.root.absolute() / name not in films]
    places = Finder(pictures).find([row.mask or "" for row in own.rows])
    masks = []
    for row, place in zip(own.rows, places, strict=True):
        name = row.mask
        if not name:
            masks.append(None if name is None else EMPTY_MASK)
            continue
        beside = [Path(name)] if Path(name).is_absolute() else []
        beside += [folder / as_path(name) for folder in (own.sheet.path.parent, index.root)]
        # os.path has no error for a name that is too long, such as a polygon.
        found = [p for p in beside if os.path.isfile(p) and p.absolute() not in films]
        found = found[:1] or [index.root / pictures[i] for i in place.films]
        if len(found) != 1:
            what = f"fits {found[0]} and {found[1]}" if found else "is not there"
            (column,) = own.goal.columns
            raise UserError(
                f"{own.sheet.path}, line {row.line}: mask {name[:60]!r} {what} (column {column}): "
                f"pictures of masks are wanted, beside the table or below {index.root}: save each "
                "as PNG and write its name; columns of answers are learnt with --column NAME"
            )
        masks.append(("file", found[0]))
    return masks


def refuse_unfit_masks(own, paths, masks):
    """Look at every mask file, so that a run does not begin with masks that would be left out.

    UserError that names the row of the first that cannot be read or is not of its film's shape.
    """
    films = zip(own.rows, paths, masks, strict=True)
    files = [film for film in films if film[2] and film[2][0] == "file"]
    unfit = []
    for row, path, mask in tqdm(files, "masks", leave=False, disable=not files):
        try:
            shape = film_size(path)
        except UserError:
            shape = None  # what is wrong with the film is said when it is read
        try:
            read_mask(mask, shape)
        except UnreadableFilm as error:
            unfit.append(f"line {row.line}, {row.name}: {error}")
    if unfit:
        own.sheet.refuse(
            f"{len(unfit)} of {len(files)} masks cannot be used, the first: {unfit[0]}"
        )


# ---------------------------------------------------------------- the table of tasks
class Task(NamedTuple):
    """One row of TASKS."""

    reader: Callable  # (index, shots) → Found
    kind: str  # labels (BCE, mean AUROC), classes (cross entropy, accuracy) or mask (Dice + BCE)
    labels: tuple
    sizes: tuple[int, int, int]  # films in train, val and test; a draw keeps the proportions
    recipe: dict  # CLASSIFY or SEGMENT_RECIPE, and what differs from it
    paper: str  # its result in Tables 1 and 2, percent; "" for a set that the paper has not
    tree: str  # what --data should hold and where to get it: the error for an empty folder ends so


# Sec. B.3; the authors' code has epochs and batch for VinDr, epochs for CheXpert; the rest is ours.
# Sizes are those of the published lists; without any, validation takes 10 % of train (Sec. B.3).
# fmt: off
CLASSIFY = dict(
    lr=1e-4, weight_decay=0.05, layer_decay=0.75, drop_path=0.6,
    warmup=1, patience=15, epochs=50, batch=32, head="random", pool="mean",
)
SEGMENT_RECIPE = CLASSIFY | dict(lr=2e-4, layer_decay=0.8, drop_path=0.1)

TASKS = {
    "vindr": Task(
        read_vindr, "labels", VINDR, sizes=(13500, 1500, 3000), paper="95.24",
        recipe=CLASSIFY | dict(batch=256),
        tree="vindr-cxr/1.0.0/{train,test}/<id>.dicom and "
        "annotations/image_labels_{train,test}.csv, from physionet.org/content/vindr-cxr",
    ),
    "shenzhen": Task(
        read_shenzhen, "labels", ("tuberculosis",), sizes=(463, 65, 134), paper="98.88",
        recipe=CLASSIFY | dict(epochs=100),
        tree="ChinaSet_AllFiles/CXR_png/CHNCXR_0001_0.png ..., "
        "from data.lhncbc.nlm.nih.gov/public/Tuberculosis-Chest-X-ray-Datasets",
    ),
    "chestxray14": Task(
        read_nih, "labels", NIH, sizes=(75312, 11212, 25596), paper="83.58",
        recipe=CLASSIFY | dict(epochs=30, batch=256),
        tree="images*/00000001_000.png ..., Data_Entry_2017_v2020.csv, train_val_list.txt, "
        "test_list.txt, from nihcc.app.box.com/v/ChestXray-NIHCC",
    ),
    "rsna": Task(
        read_rsna, "classes", RSNA, sizes=(21295, 2680, 2709), paper="75.03",
        recipe=CLASSIFY | dict(epochs=30, batch=256),
        tree="stage_2_train_images/<id>.dcm and stage_2_detailed_class_info.csv, "
        "from kaggle.com/c/rsna-pneumonia-detection-challenge",
    ),
    "chexpert": Task(
        read_chexpert, "labels", CHEXPERT, sizes=(171924, 19103, 202), paper="89.63",
        recipe=CLASSIFY
        | dict(lr=1e-2, weight_decay=0.4, layer_decay=0.55, drop_path=0.1, epochs=1, batch=256),
        tree="CheXpert-v1.0[-small]/{train,valid}/patient*/study*/*.jpg, train.csv, valid.csv, "
        "from stanfordaimi.azurewebsites.net",
    ),
    "chestdr": Task(
        read_chestdr, "labels", CHESTDR, sizes=(783, 196, 1161), paper="64.60 / 75.19 / 76.40",
        recipe=CLASSIFY | dict(epochs=100),
        tree="MedFMC_train/chest/{images/*.png,chest_train.csv} from figshare (MedFMC) and "
        "chest_K-shot_*_exp1.txt from github.com/openmedlab/MedFM",
    ),
    "siim": Task(
        read_siim, "mask", ("pneumothorax",), sizes=(9608, 1067, 1372), paper="84.58",
        recipe=SEGMENT_RECIPE | dict(patch=8),  # as the authors' instructions have it
        tree="dicom-images-train/**/<ImageId>.dcm and stage_2_train.csv or train-rle.csv, "
        "from kaggle.com/c/siim-acr-pneumothorax-segmentation",
    ),
    "rsna_seg": Task(
        read_rsna_seg, "mask", ("opacity",), sizes=(21295, 2680, 2709), paper="79.02",
        recipe=SEGMENT_RECIPE | dict(patch=8),  # as the authors' instructions have it
        tree="stage_2_train_images/<id>.dcm and stage_2_train_labels.csv, "
        "from kaggle.com/c/rsna-pneumonia-detection-challenge",
    ),
    "csv": Task(
        read_csv, "labels", (), sizes=(72, 8, 20), paper="",
        recipe=CLASSIFY | dict(head="probe", pool="cells"),
        tree="a folder of films, and --labels FILE.csv with columns filename, label",
    ),
}
# fmt: on


# ---------------------------------------------------------------- from a name to films
def find_root(name: str, data: str | None = None) -> Path:
    """The folder of a task: --data, or $CXR/<task>, or ./data/<task>; both RSNA tasks share one."""
    parents = filter(None, [os.path.expanduser(os.environ.get("CXR", "")), "data"])
    names = dict.fromkeys([name, name.removesuffix("_seg")])
    tried = [Path(data)] if data else [Path(*parts) for parts in product(parents, names)]
    for folder in tried:
        if folder.is_dir():
            return folder
    if data and Path(data).is_file():
        what = "a pack is for pretrain.py" if Path(data).suffix == ".pack" else "this is a file"
        raise UserError(f"--data {data}: {what}: give the folder of the films")
    raise UserError(
        f"no folder {' or '.join(map(str, tried))} for task {name}: give --data DIR. "
        f"Expected: {TASKS[name].tree}"
    )


def load_task(
    name, root, table=None, shots=None, column=None, uncertain="ignore", trained=None
) -> Splits:
    """Read a task under `root`: every film's file is found, none is opened.

    table, column, uncertain, trained: of task csv (read_csv). shots: MedFM's own K-shot lists are
    taken where they lie there. UserError says what is missing, and where to get it.
    """
    task = TASKS[name]
    index = Index(root)
    try:
        if name == "csv" and trained and not table:
            found = every_film(index, *trained[:2])
        elif name == "csv":
            found = read_csv(index, table, column, uncertain, trained)
        else:
            found = task.reader(index, shots)
    except Absent as error:
        raise UserError(f"{root}: {error}. Expected for task {name}: {task.tree}") from None
    kind = found.kind or task.kind
    labels = found.labels or task.labels
    only_test = trained and "test" in found.parts
    wanted = ["test"] if only_test else found.parts
    parts = {split: examples_of(index, found, split, kind, labels) for split in wanted}
    drawn = []
    if name == "csv":  # what is drawn must not depend on how somebody sorted the rows
        parts = {split: sorted(films, key=lambda film: film.path) for split, films in parts.items()}
    if not only_test:
        parts, drawn = complete(parts, task.sizes, by_name=name == "csv")
    parts, dropped = disjoint(parts)
    empty = [split for split in (["test"] if trained else SPLITS) if not parts[split]]
    if empty:
        raise UserError(
            f"{root}: {' and '.join(empty)} is empty: too few films or patients for task {name}"
        )
    copies = warn_of_copies(parts) if name == "csv" and not trained else []
    notes = [*found.notes, *drawn, *dropped, *copies, *index.notes]
    how = dict(notes=notes, drawn=found.drawn, against=found.against)
    return Splits(name, kind, labels, **parts, **how)


def examples_of(index, found: Found, split: str, kind, labels) -> list[Example]:
    """The rows of a split as examples: with their files, which are looked for below index.root."""
    rows = found.parts[split]
    length = 0 if kind == "mask" else len(labels)
    for row in rows:
        if len(row.truth) != length:
            raise UserError(f"{index.root}: {row.name} has {len(row.truth)} labels, not {length}")
    paths = [row.path for row in rows]
    if None in paths:
        what = "the table of labels" if split == "all" else f"the {split} list"
        paths = index.find([row.name for row in rows], found.depth, what)
    return [
        Example(path, row.truth, row.patient or path.name, row.mask, row.written)
        for path, row in zip(paths, rows, strict=True)
    ]
