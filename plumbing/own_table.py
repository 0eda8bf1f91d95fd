"""A table of one's own: film, label or mask, patient and split of each row that counts.

finetune.py --task csv and the linear probes (Labels) read it alike. What is to be learnt is found
out in findings.
"""

import re
from collections import Counter
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np

from plumbing.findings import (
    LABEL,
    MASK,
    SHEET_ERROR,
    Goal,
    Sheet,
    answer_or_negative,
    read_answers,
    read_findings,
    read_goal,
    read_masks,
    target_of,
)
from plumbing.launch import UserError
from plumbing.splits import Example, tally
from plumbing.table import (
    MISSING,
    NO,
    OTHER,
    SPLITS,
    YES,
    Finder,
    answer,
    as_path,
    is_negative,
    plain,
    without_suffix,
)

# What columns are called, as table.plain writes it; the first that is there counts.
PATIENT = (
    "patientid patient subjectid subject patientnumber patientno patid pid mrn personid "
    "participantid participant"
).split()
PATIENT += map(
    "".join,
    product(
        "patient patienten pat subject person participant".split(),
        "nr num number nummer no key uid code name identifier index".split(),
    ),
)
PATIENT = tuple(dict.fromkeys(PATIENT))
NOBODY = ("anonymous", "anonymized", "anonymised", "anon", "unnamed")
SPLIT = "split set fold subset partition".split()
SPLIT_WORDS = dict.fromkeys("train training tr".split(), "train")
SPLIT_WORDS |= dict.fromkeys("val valid validate validation dev development".split(), "val")
SPLIT_WORDS |= dict.fromkeys("test testing tst".split(), "test")

# Where three sets write the patient into the path of a film; group 1 is the patient.
PATIENT_IN_NAME = {
    "CheXpert's patient00001/study1": re.compile(r"(?:^|/)(patient\d+)/study\d+/"),
    "MIMIC's p10000032/s50414267": re.compile(r"(?:^|/)(p\d{8})/s\d+/"),
    "NIH's 00000013_005": re.compile(r"(?:^|/)(\d{8})_\d{3}(?:\.\w+)?$"),
}


# ---------------------------------------------------------------- patients and splits
def read_patients(sheet: Sheet, column: str) -> list[str | None]:
    """Read the patient of every row, None where the cell says nobody ('nan', blank, anonymous).

    '013', '13' and Excel's '13.0' are one patient, and so are 'P1' and 'p1'.
    """
    first = {}
    patients = []
    for row, cell in enumerate(sheet.cells[column]):
        if answer(cell) is MISSING or plain(cell) in NOBODY:
            patients.append(None)
            continue
        if SHEET_ERROR.fullmatch(cell):
            sheet.refuse(row, f"column {column} says {cell}, an error of the spreadsheet")
        if re.fullmatch(r"\d[.,]\d+[eE]\+?\d+", cell):
            sheet.refuse(row, f"column {column} says {cell}: a spreadsheet rounded the number")
        is_number = re.fullmatch(r"0*(\d+)([.,]0*)?", cell)
        key = is_number[1] if is_number else cell.casefold()
        patients.append(first.setdefault(key, is_number[1] if is_number else cell))
    return patients


def patients_in_names(names) -> tuple[list[str] | None, str]:
    """Read the patients from the names of films, where all are named as in one of three sets.

    → patients, None where the names do not tell; a note that says so
    """
    for style, pattern in PATIENT_IN_NAME.items():
        found = [pattern.search(as_path(name)) for name in names]
        if all(found):
            return [match[1] for match in found], f"patients: as the names say, {style}"
        count = sum(map(bool, found))
        if 2 * count > len(found):
            return None, (
                f"patients: no column patient_id, so every film counts as one, although {count} of "
                f"{len(found)} films are named like {style}"
            )
    return None, (
        "patients: no column patient_id, so every film counts as one: films of one patient may lie "
        "on both sides of a split"
    )


def read_patient_table(path, films: list[str]) -> tuple[dict[str, str], str]:
    """Read whose films are, a table of films and patients → {film: patient}; how many it knows.

    films: their paths. UserError when a row fits several films, a film has two patients, or no film
    of the table is there.
    """
    sheet = Sheet(path)
    names = sheet.cells[sheet.film_column()]
    column = sheet.column(PATIENT, "patient")
    if not column:
        raise UserError(f"{path}: no column patient_id; its columns are {', '.join(sheet.cells)}")
    patients = read_patients(sheet, column)
    found = {}
    for row, place in enumerate(Finder(films).find_one(names, path, sheet.lines)):
        for i in place.films:
            if found.setdefault(films[i], patients[row]) != patients[row]:
                sheet.refuse(row, f"{names[row]} has another patient in a row above")
    known = {film: patient for film, patient in found.items() if patient}
    if not found:
        raise UserError(f"{path}: none of its {len(names)} films is there (first: {names[0]})")
    absent = len(set(names)) - len(found)
    note = f"patients: {path} knows those of {len(known):,} of {len(films):,} films"
    return known, note + (f"; {absent:,} of its films are not there" if absent > 0 else "")


def split_column(sheet: Sheet, taken) -> str | None:
    """The column of splits: of a usual name, else the one whose cells say train, val or test.

    None without any. UserError when several columns say so, or a column such as is_test does: else
    other films would be tested than the table means.
    """
    column = sheet.column(SPLIT, "split")
    if column:
        return column
    found = []
    for name, cells in sheet.cells.items():
        if name in taken:
            continue
        if SPLIT_WORDS.get(plain(name).removeprefix("is")) and plain(name).startswith("is"):
            raise UserError(
                f"{sheet.path}: column {name}: write a column split that says train, val or test"
            )
        said = {SPLIT_WORDS.get(plain(cell)) for cell in cells}
        if None not in said and len(said) > 1:
            found.append(name)
    if len(found) > 1:
        raise UserError(
            f"{sheet.path}: {' and '.join(found)} may both be the column of the split: "
            "rename or delete one"
        )
    return found[0] if found else None


def read_splits(sheet: Sheet, column: str) -> list[str]:
    """Read the split of every row. UserError when a cell names none."""
    splits = []
    for row, cell in enumerate(sheet.cells[column]):
        split = SPLIT_WORDS.get(plain(cell))
        if not split:
            sheet.refuse(row, f"column {column} must say {', '.join(SPLITS)}, not {cell!r}")
        splits.append(split)
    return splits


# ---------------------------------------------------------------- the table
@dataclass
class OwnTable:
    """A table whose columns are understood.

    Row by row: films as written; targets: 0, 1 or None (not known) per label, () of masks; masks:
    names of files, "" for an empty one; patients and splits, None where the table has no such
    column; lines: where a row stands in the file. against: see Goal.
    """

    path: Path
    kind: str
    labels: tuple
    notes: list[str]
    patient_column: str | None
    films: list[str]
    targets: list[tuple | None]
    masks: list[str | None] | None
    patients: list[str | None] | None
    splits: list[str] | None
    lines: list[int]
    against: str = ""
    unknown: "OwnTable | None" = None  # the rows that were left out: they tell patients

    def known(self) -> "OwnTable":
        """The table without the rows of which nothing is known. UserError when none is left."""
        rows = [row for row, target in enumerate(self.targets) if target is not None]
        rest = [row for row, target in enumerate(self.targets) if target is None]
        if not rows:
            raise UserError(
                f"{self.path}: nothing is known of any row: all is missing or uncertain"
            )
        return replace(self.take(rows), unknown=self.take(rest))

    def to_test(self) -> "OwnTable":
        """The rows that a finished model is tested on: of split test, else all.

        UserError when the table has a column of splits that names no test.
        """
        if not self.splits:
            note = f"test: all {len(self.films)} rows, for the table has no splits"
            return replace(self, splits=["test"] * len(self.films), notes=[*self.notes, note])
        rows = [row for row, split in enumerate(self.splits) if split == "test"]
        if not rows:
            raise UserError(
                f"{self.path}: no row of split test, it says {', '.join(sorted(set(self.splits)))}:"
                " without the column all rows are tested"
            )
        note = f"test: the {len(rows)} rows of split test, of {len(self.films)} rows"
        return replace(self.take(rows), notes=[*self.notes, note])

    def take(self, rows: list[int]) -> "OwnTable":
        """The table with these rows only."""
        kept = {}
        for name in ("films", "targets", "masks", "patients", "splits", "lines"):
            values = getattr(self, name)
            kept[name] = values and [values[row] for row in rows]
        return replace(self, **kept)

    def locate(self, films) -> tuple[np.ndarray, list[str]]:
        """Find the film of every row: its number in `films`, a list of paths; -1: not there. (n,)

        UserError when a row fits several films. Notes: what does not fit quite as it is written.
        """
        found = []
        odd = {}  # {how films differ from what is written: [which]}
        places = Finder(films).find_one(self.films, self.path, self.lines)
        for name, place in zip(self.films, places, strict=True):
            found.append(place.films[0] if place.films else -1)
            if not place.films:
                continue
            film = films[found[-1]]
            real = film.rpartition("/")[2]
            if place.is_elsewhere:
                odd.setdefault("in other folders than they say", []).append(f"{name} is {film}")
            elif how_spelt(name, real):
                odd.setdefault(how_spelt(name, real), []).append(f"{name} is {real}")
        notes = [f"{len(names)} films {how}: {names[0]}" for how, names in odd.items() if names]
        return np.array(found, int), notes

    def name_patients(self, names) -> tuple[list[str], str]:
        """Name the patient of every row as the table says, else as the names of the films do.

        names: the paths of the films. A film whose patient nobody knows is its own. → patients,
        a note that says how they are known
        """
        told = self.patients
        note = f"patients: column {self.patient_column}"
        if told and None in told:
            note += f"; {told.count(None)} films have none and count as one each"
        if told is None:
            told, note = patients_in_names(self.films)
        if told is None:
            told, note = patients_in_names(names)
        return [who or name for who, name in zip(told or names, names, strict=True)], note

    def refuse_contradictions(self, located, patients):
        """UserError when two rows of one film say different things, or a patient has films in two
        splits. located: the film of each row.
        """
        first = {}
        home = {}  # patient: row
        splits = self.splits or [None] * len(self.films)
        masks = self.masks or [None] * len(self.films)
        rows = zip(located, self.targets, patients, splits, masks, strict=True)
        for row, (film, *said) in enumerate(rows):
            before, said_before = first.setdefault(film, (row, said))
            if said != said_before:
                differ = zip(("label", "patient", "split", "mask"), said, said_before, strict=True)
                what = " and ".join(name for name, one, other in differ if one != other)
                raise UserError(
                    f"{self.path}, lines {self.lines[before]} and {self.lines[row]}: "
                    f"{self.films[row]} stands twice, with a different {what}: keep one row "
                    "(several findings in one cell are joined with |)"
                )
            other = home.setdefault(patients[row], row)
            if splits[other] != splits[row]:
                raise UserError(
                    f"{self.path}, lines {self.lines[other]} and {self.lines[row]}: patient "
                    f"{patients[row]} has films in {splits[other]} and in {splits[row]}: patients "
                    "must not cross splits"
                )


def how_spelt(name: str, real: str) -> str:
    """Say how a row's name of a film differs from the file's name; "" where it does not."""
    written = as_path(name).rpartition("/")[2]
    if without_suffix(written) != without_suffix(real):
        return "with other small and large letters"
    return "" if written in (real, without_suffix(real)) else "with another suffix"


def read_own_table(
    path, column=None, uncertain="ignore", trained=None, can_be_mask=True
) -> OwnTable:
    """Read a table of one's own: film, label or mask, and perhaps patient and split of each row.

    column: what to learn, where that is not what is wanted. uncertain: what -1 counts as: ignore,
    positive or negative. trained: (kind, labels, against) of a model to be tested; its labels are
    looked for, every row is kept, and labels may be absent.
    """
    sheet = Sheet(path)
    film = sheet.film_column()
    taken = {film: "the film"}
    patient = sheet.column(PATIENT, "patient")
    split = split_column(sheet, {film, patient})
    taken |= {name: what for name, what in ((patient, "the patient"), (split, "the split")) if name}
    if trained:
        goal = goal_of_model(sheet, column, taken, uncertain, *trained)
    else:
        goal = read_goal(sheet, column, taken, uncertain, can_be_mask)
    films = sheet.cells[film]
    splits = read_splits(sheet, split) if split else None
    patients = read_patients(sheet, patient) if patient else None
    notes = [*goal.notes, *sheet.notes, *left_out(sheet, films, goal)]
    notes.append(f"split: column {split}" if split else "split: none in the CSV")
    return OwnTable(
        path=sheet.path,
        kind=goal.kind,
        labels=goal.labels,
        notes=notes,
        patient_column=patient,
        films=films,
        targets=goal.targets,
        masks=goal.masks,
        patients=patients,
        splits=splits,
        lines=sheet.lines,
        against=goal.against,
    ).known()


def left_out(sheet: Sheet, films, goal: Goal) -> list[str]:
    """Say how many rows are left out because nothing is known of them."""
    rows = [row for row, target in enumerate(goal.targets) if target is None]
    if not rows:
        return []
    first = f"line {sheet.lines[rows[0]]}, {films[rows[0]]}"
    return [f"left out: {len(rows)} of {len(films)} rows, where nothing is known (first: {first})"]


# ---------------------------------------------------------------- a table for a trained model
def goal_of_model(sheet, asked, taken, uncertain, kind, labels, against="") -> Goal:
    """Find the labels of a trained model in a table: columns that are called like them, else the
    column of labels or `asked`. What the table does not tell is not known (None).
    """
    if kind == "mask":
        return masks_of_model(sheet, asked, taken, labels)
    columns = {} if asked else columns_of_labels(sheet, taken, labels)
    column = sheet.asked_columns(asked, taken)[0] if asked else sheet.column(LABEL, "label")
    unknown = (None,) * len(labels)
    if columns:
        goal = read_answers(sheet, list(columns.values()), uncertain)
        values = [row and dict(zip(columns, row, strict=True)) for row in goal.targets]
        targets = [tuple(v.get(label) for label in labels) if v else unknown for v in values]
        if kind == "classes":  # exactly one holds, else which is not known
            is_one = [row.count(YES) == 1 or None in row for row in targets]
            targets = [row if one else unknown for row, one in zip(targets, is_one, strict=True)]
        absent = [label for label in labels if label not in columns]
        notes = goal.notes + ([f"not in the table: {', '.join(absent)}"] if absent else [])
        notes += not_compared(sheet, {*taken, *columns.values()})
    elif column is None:
        targets = [unknown] * len(sheet.lines)
        notes = [f"labels: no column label or {', '.join(labels)}: nothing to compare with"]
        notes += not_compared(sheet, taken)
    elif is_answer_to(labels, sheet.cells[column]):
        goal = read_answers(sheet, [column], uncertain)
        targets = [row or unknown for row in goal.targets]
        notes = goal.notes
    else:
        findings, notes = read_findings(sheet, column, uncertain)
        targets, more = match_findings(sheet, column, findings, kind, labels, against)
        notes = notes + more
    return Goal(kind, tuple(labels), targets, None, notes)


def is_answer_to(labels, cells) -> bool:
    """Whether a column answers yes or no to a model's one label. Where the label is a number, one
    of two codes such as 1 and 2, it does not: 1 would be its no.
    """
    is_code = len(labels) == 1 and labels[0].isdecimal()
    return len(labels) == 1 and not is_code and OTHER not in map(answer_or_negative, cells)


def not_compared(sheet, taken) -> list[str]:
    """Name the columns that a model's labels are not compared with, in a note if there are any."""
    rest = [name for name in sheet.cells if name not in taken]
    return [f"columns not compared: {', '.join(rest)}"] if rest else []


def columns_of_labels(sheet, taken, labels) -> dict[str, str]:
    """The columns that are called like labels, {label: column}.

    A column called label or class is none when it holds other names than yes and no.
    """
    found = {label: sheet.column([plain(label)], "label") for label in labels}
    return {
        label: column
        for label, column in found.items()
        if column
        and column not in taken
        and (plain(column) not in LABEL or OTHER not in map(answer, sheet.cells[column]))
    }


def match_findings(sheet, column, findings, kind, labels, against) -> tuple[list[tuple], list[str]]:
    """Compare the findings of each row with a model's labels → targets, notes.

    Names that the model does not know count as none of its labels; UserError when it knows none. Of
    classes that exclude each other (kind classes, or a label and the class that it was learnt
    `against`) a row must have one, else it is not known. "No finding" is a label where the model
    has it.
    """
    healthy = {label for label in labels if is_negative(label)}
    both = [*labels, against] if against else labels
    label_of = {plain(label): label for label in both}
    count = Counter(name for found in findings if found for name in found)
    others = {name: films for name, films in count.items() if plain(name) not in label_of}
    if count and len(others) == len(count):
        raise UserError(
            f"{sheet.path}: column {column} names {', '.join(list(others)[:5])}, but none of what "
            f"the model was trained for: {', '.join(labels)}; --column NAME says what to compare"
        )
    targets = []
    for found in findings:
        known = {label_of.get(plain(name)) for name in found or healthy} - {None}
        is_known = found is not None and (len(known) == 1 or (kind == "labels" and not against))
        targets.append(target_of(known, labels) if is_known else (None,) * len(labels))
    words = ", ".join(f"{name} {films}" for name, films in others.items())
    notes = [f"none of the model's labels: {words}"] if others else []
    if against:
        neither = targets.count((None,))
        notes.append(f"neither {labels[0]} nor {against}, hence not judged: {neither} rows")
    return targets, notes


def masks_of_model(sheet, asked, taken, labels) -> Goal:
    """The masks to compare those of a trained model with; None where the table names none."""
    column = sheet.asked_columns(asked, taken)[0] if asked else sheet.column(MASK, "mask")
    targets = [()] * len(sheet.lines)
    if column is None:
        masks = [None] * len(sheet.lines)
        return Goal("mask", tuple(labels), targets, masks, ["masks: no column mask"])
    return read_masks(sheet, column)._replace(labels=tuple(labels), targets=targets)


# ---------------------------------------------------------------- linear probes
def refuse_twins(flag: str, paths: list[str]):
    """UserError when two tables of a flag have one name, by which results know them."""
    if len({Path(path).stem for path in paths}) < len(paths):
        raise UserError(f"{flag} {','.join(paths)}: two tables of one name; rename one")


class Labels:
    """The table of a linear probe: a table of one's own with labels and a column split.

    classes: their names. Row by row: names, y (n, classes) of 0, 1 and NaN (not known), split (n,),
    patients. others: {film: patient} of rows without a label. notes: what was decided and left out.
    """

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(
                f"probe table {path}: no such file; "
                "a CSV with the columns filename,label,split is wanted"
            )
        self.table = read_own_table(self.path, can_be_mask=False)
        if self.table.kind == "mask" or not self.table.splits:
            lacks = "label" if self.table.kind == "mask" else "split"
            raise UserError(f"probe table {path}: no column {lacks}, which a probe needs")
        self.names = self.table.films
        self.classes = list(self.table.labels)
        self.y = np.array(self.table.targets, float)
        self.split = np.array(self.table.splits)
        self.notes = self.table.notes
        self.located = None, None
        self.others = {}
        self.check(list(map(as_path, self.names)), self.names)

    def check(self, located, names):
        """Name the patients by the films' paths `names`, where the table does not. UserError when
        rows of a film (`located`) contradict each other, or a patient is in two splits.
        """
        self.patients, self.patient_note = self.table.name_patients(names)
        self.table.refuse_contradictions(located, self.patients)

    def by_split(self, rows) -> dict[str, list[Example]]:
        """Some rows as examples, {split: examples}."""
        parts = {split: [] for split in SPLITS}
        for row in rows:
            example = Example(Path(self.names[row]), self.table.targets[row], self.patients[row])
            parts[self.table.splits[row]].append(example)
        return parts

    def complete(self, films) -> "Labels":
        """The table itself, when a probe of these films can be fitted, chosen and tested on it.

        UserError when a split has no film, or no class has positive and negative films to learn
        from and to test on. Rows whose films are not there are counted in the notes.
        """
        parts = self.by_split(np.flatnonzero(self.locate(films) >= 0))
        lacking = [split for split in SPLITS if not parts[split]]
        if lacking:
            raise UserError(f"probe table {self.path}: no film of split {' and '.join(lacking)}")
        for split in ("train", "test"):
            counts = [tally(parts[split], k) for k in range(len(self.classes))]
            if not any(count[YES] and count[NO] for count in counts):
                raise UserError(
                    f"probe table {self.path}: no class of {', '.join(self.classes)} has positive "
                    f"and negative films in {split}"
                )
        return self

    def locate(self, films) -> np.ndarray:
        """Find each row's film: its number in `films`, -1 where it is not there. (n,)

        UserError when none is there, when a row fits two films, as view1_frontal.jpg would, or when
        two rows of a film contradict each other; of equal rows the first counts.
        """
        known, found = self.located
        if known is films:
            return found
        found, odd = self.table.locate(films.names)
        absent = np.flatnonzero(found < 0)
        if len(absent) == len(found):
            raise UserError(
                f"probe table {self.path}: none of its {len(found)} films is in the data "
                f"(first: {self.names[0]})"
            )
        self.notes = [*self.table.notes, *odd]
        if len(absent):
            first = self.names[absent[0]]
            self.notes.append(f"{len(absent)} of {len(found)} films are not there: {first}, ...")
        names = list(self.names)
        for row in np.flatnonzero(found >= 0):
            names[row] = films.names[found[row]]
        self.check(names, names)
        _, first = np.unique(found, return_index=True)
        is_repeated = (found >= 0) & ~np.isin(np.arange(len(found)), first)
        if is_repeated.any():
            self.notes.append(f"{is_repeated.sum()} repeated rows dropped")
        found = np.where(is_repeated, -1, found)
        where, _ = self.table.unknown.locate(films.names)
        paths = [films.names[i] for i in where if i >= 0]
        rest = self.table.unknown.take(np.flatnonzero(where >= 0))
        self.others = dict(zip(where[where >= 0], rest.name_patients(paths)[0], strict=True))
        self.located = films, found
        return found

    def describe(self) -> str:
        """Say what was decided and left out."""
        title = f"probe table {self.path.name}: {', '.join(self.classes)}"
        return "\n  ".join([title, *self.notes, self.patient_note])


def open_tables(probe: str | None, films, team) -> list[Labels]:
    """Read the label tables of --probe, joined by commas, and say what counts.

    UserError when one cannot be used with these films.
    """
    paths = probe.split(",") if probe else []
    refuse_twins("--probe", paths)
    tables = []
    for path in paths:
        tables.append(Labels(path).complete(films))
        team.say(tables[-1].describe())
    return tables
