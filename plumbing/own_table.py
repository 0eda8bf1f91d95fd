"""A table of one's own: film, label or mask, patient and split of each row that counts.

finetune.py --task csv and the linear probes (Labels) read it alike. What is to be learnt is found
out in findings.
"""

import re
from collections import Counter
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from plumbing.findings import (
    LABEL,
    MASK,
    SHEET_ERROR,
    Goal,
    Sheet,
    answer_or_negative,
    is_kind_of,
    is_same_in_doubt,
    is_slip,
    read_answers,
    read_findings,
    read_goal,
    read_masks,
    target_of,
    what_instead,
)
from plumbing.launch import UserError
from plumbing.table import (
    MISSING,
    NO,
    OTHER,
    SPLITS,
    YES,
    Finder,
    answer,
    as_path,
    column_key,
    is_negative,
    plain,
    whole_number,
    without_suffix,
)

# What columns are called, as table.column_key writes it; the first that is there counts.
PATIENT = "patientid patient subjectid subject patientnumber patientno patid pid mrn".split()
PERSON = "patient patienten pat subject person participant proband probanden paciente paziente"
PATIENT += map(
    "".join,
    product(
        PERSON.split(),
        "id nr num number nummer no key uid code name identifier index pseudonym".split(),
    ),
)
PATIENT += map(
    "".join,
    product(
        "id n no nr num numero number code codice nde node numerode numerodu".split(),
        "patient paciente paziente".split(),
    ),
)
PATIENT += "participant proband paciente paziente pat ipp nip pseudonym pseudoid".split()
PATIENT += "fallnummer fallnr fallid".split()  # a stay: better than nobody
PATIENT = tuple(dict.fromkeys(PATIENT))
# What else is called, or holds numbers, like a patient, by parts of its name; and what is not.
CALLED_PATIENT = re.compile("^pat(?!h|tern)|patient|pacient|pazient|proband|subject|participant")
CALLED_ID = re.compile("^id|id$|nr$|no$|num$|nummer|number|numero|code|key|pseudo|akte|case|fall")
OF_A_PATIENT = re.compile(
    "age|alter|sex|gender|geschl|weight|gewicht|height|gross|size|bmi|dos[ei]|position|orient|date|"
    "datum|time|zeit|birth|geb|type|status|history|race|ethnic|comment|kommentar|note|bemerk|diagn|"
    "idade|edad|^eta(del|$)|peso|poids|taille|talla|altura|estatura|year|jahr|monat|month"
)
OF_AN_EXAM = re.compile(
    "study|serie|accession|exam|untersuch|auftrag|order|image|film|bild|dicom|instance|acqui|slice|"
    "follow|visit|verlauf|icd|postal|zip|plz|phone|telef|device|scanner|serial|reader|report|room|"
    "operator|befund|radiolog|hospital|klinik|proto[ck]ol|[ck]assette|dete[ck]tor|"
    "zimmer|station|lo[ck]ali|^tnm|^ops|numberof"
)
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
        number = whole_number(cell)
        who = cell if number is None else str(number)
        patients.append(first.setdefault(who.casefold(), who))
    return patients


def looks_like_patient(column: str, cells) -> bool:
    """Whether a column of no known name seems to say whose films are: it is called like a patient,
    or holds codes such as P013, or numbers under a name such as 'Aktennr.', some of them again.

    Numbers alone do not tell: widths in px, doses and leucocytes are many and repeat, too.
    """
    key = column_key(column)
    said = [cell for cell in cells if answer(cell) is not MISSING]
    kinds = len({cell.casefold() for cell in said})
    if kinds < 5 or OF_A_PATIENT.search(key):
        return False
    are_numbers = None not in map(whole_number, said)
    if CALLED_PATIENT.search(key):
        is_text = max(len(cell.split()) for cell in said) > 3
        return are_numbers or not (is_text or all(map(what_instead, said)))
    are_codes = all(re.fullmatch(r"(?=.*\d)[^\W\d][\w-]*", cell) for cell in said)
    is_id = are_codes or (are_numbers and bool(CALLED_ID.search(key)))
    return is_id and len(said) / 3 < kinds < len(said) and not OF_AN_EXAM.search(key)


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
                "patients unknown: no column patient_id, so every film counts as one, although "
                f"{count} of {len(found)} films are named like {style}"
            )
    return None, (
        "patients unknown: no column patient_id, so every film counts as one: films of one patient "
        "may lie on both sides of a split"
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
class Row(NamedTuple):
    """What a table or a list says of one film. What it does not say is None."""

    name: str  # as written
    target: tuple | None  # 0, 1 or None (not known) per label, () of masks; None: nothing is known
    patient: str | None = None
    mask: str | tuple | None = None  # a file's name, "" for an empty one; or as film.read_mask asks
    split: str | None = None
    line: int = 0  # where it stands in the file
    path: Path | None = None  # of the film, where it was found already


@dataclass
class OwnTable:
    """A table whose columns are understood.

    rows: those of which something is known; unknown: the table of the others, which tell patients.
    likely_patient: a column that may be the patient, where none is for sure.
    """

    path: Path
    goal: Goal
    notes: list[str]
    patient_column: str | None
    has_splits: bool
    rows: list[Row]
    unknown: "OwnTable | None" = None
    likely_patient: str | None = None

    def to_test(self) -> "OwnTable":
        """The rows that a finished model is tested on: of split test, else all.

        UserError when the table has a column of splits that names no test.
        """
        rows = [row for row in self.rows if row.split == "test"]
        note = f"test: the {len(rows)} rows of split test, of {len(self.rows)} rows"
        if not self.has_splits:
            rows = [row._replace(split="test") for row in self.rows]
            note = f"test: all {len(rows)} rows, for the table has no splits"
        if not rows:
            said = ", ".join(sorted({row.split for row in self.rows}))
            raise UserError(
                f"{self.path}: no row of split test, it says {said}: without the column all rows "
                "are tested"
            )
        return replace(self, rows=rows, notes=[*self.notes, note])

    def locate(self, films) -> tuple[np.ndarray, list[str]]:
        """Find the film of every row: its number in `films`, a list of paths; -1: not there. (n,)

        UserError when a row fits several films. Notes: what does not fit quite as it is written.
        """
        found = []
        odd = {}  # {how films differ from what is written: [which]}
        names = [row.name for row in self.rows]
        places = Finder(films).find_one(names, self.path, [row.line for row in self.rows])
        for name, place in zip(names, places, strict=True):
            found.append(place.films[0] if place.films else -1)
            if not place.films:
                continue
            film = films[found[-1]]
            real = film.rpartition("/")[2]
            if place.is_elsewhere:
                odd.setdefault("in other folders than they say", []).append(f"{name} is {film}")
            elif how_spelt(name, real):
                odd.setdefault(how_spelt(name, real), []).append(f"{name} is {real}")
        notes = [f"{len(names)} films {how}: {names[0]}" for how, names in odd.items()]
        return np.array(found, int), notes

    def name_patients(self, names) -> tuple[list[str], str]:
        """Name the patient of every row as the table says, else as the names of the films do.

        names: the paths of the films. A film whose patient nobody knows is its own. UserError when
        a column seems to know. → patients, a note that says how they are known
        """
        told = [row.patient for row in self.rows]
        note = f"patients: column {self.patient_column}"
        if not self.patient_column:
            told, note = patients_in_names([row.name for row in self.rows])
            if told is None:
                told, note = patients_in_names(names)
            if told is None and self.likely_patient:
                raise UserError(
                    f"{self.path}: column {self.likely_patient} looks like the patient, who must "
                    "not cross splits: rename it patient_id or, if it says something else, delete "
                    "the column"
                )
        elif None in told:
            note += f"; {told.count(None)} films have none and count as one each"
        return [who or name for who, name in zip(told or names, names, strict=True)], note

    def refuse_contradictions(self, located, patients):
        """UserError when two rows of one film say different things, or a patient has films in two
        splits. located: the film of each row.
        """
        first = {}
        home = {}  # patient: row
        for row, film, patient in zip(self.rows, located, patients, strict=True):
            said = dict(label=row.target, patient=patient, split=row.split, mask=row.mask)
            other, said_before = first.setdefault(film, (row, said))
            if said != said_before:
                what = " and ".join(name for name in said if said[name] != said_before[name])
                raise UserError(
                    f"{self.path}, lines {other.line} and {row.line}: {row.name} stands twice, "
                    f"with a different {what}: keep one row (several findings in one cell are "
                    "joined with |)"
                )
            other = home.setdefault(patient, row)
            if other.split != row.split:
                raise UserError(
                    f"{self.path}, lines {other.line} and {row.line}: patient {patient} has films "
                    f"in {other.split} and in {row.split}: patients must not cross splits"
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
    patient = sheet.column(PATIENT, "patient")
    split = split_column(sheet, {film, patient})
    taken = {film: "the film", patient: "the patient", split: "the split"}  # perhaps None
    if trained:
        goal = goal_of_model(sheet, column, taken, uncertain, *trained)
    else:
        goal = read_goal(sheet, column, taken, uncertain, can_be_mask)
    nothing = [None] * len(sheet.lines)
    patients = read_patients(sheet, patient) if patient else nothing
    splits = read_splits(sheet, split) if split else nothing
    films = sheet.cells[film]
    said = films, goal.targets, patients, goal.masks or nothing, splits, sheet.lines
    rows = [Row(*cells) for cells in zip(*said, strict=True)]
    unknown = [row for row in rows if row.target is None]
    notes = [*goal.notes, *sheet.notes]
    if unknown:
        first = f"line {unknown[0].line}, {unknown[0].name}"
        notes.append(
            f"left out: {len(unknown)} of {len(rows)} rows, where nothing is known (first: {first})"
        )
    if len(unknown) == len(rows):
        raise UserError(f"{path}: nothing is known of any row: all is missing or uncertain")
    notes.append(f"split: column {split}" if split else "split: none in the CSV")
    likely = [name for name in goal.unused if looks_like_patient(name, sheet.cells[name])]
    rest = OwnTable(sheet.path, goal, notes, patient, split is not None, unknown)
    rest.likely_patient = likely[0] if likely else None
    return replace(rest, rows=[row for row in rows if row.target is not None], unknown=rest)


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
    # One of two codes such as 1 and 2 is no answer to the label "2": 1 would be its no.
    is_question = len(labels) == 1 and not labels[0].isdecimal()
    if not columns and column and is_question:
        if OTHER not in map(answer_or_negative, sheet.cells[column]):
            columns = {labels[0]: column}
    if columns:
        goal = read_answers(sheet, list(columns.values()), uncertain)
        values = [row and dict(zip(columns, row, strict=True)) for row in goal.targets]
        targets = [tuple(v.get(label) for label in labels) if v else unknown for v in values]
        if kind == "classes":  # exactly one holds, else which is not known
            is_one = [row.count(YES) == 1 or None in row for row in targets]
            targets = [row if one else unknown for row, one in zip(targets, is_one, strict=True)]
        absent = [label for label in labels if label not in columns]
        notes = goal.notes + ([f"not in the table: {', '.join(absent)}"] if absent else [])
    elif column:
        findings, notes = read_findings(sheet, column, uncertain)
        targets, more = match_findings(sheet, column, findings, kind, labels, against)
        notes = notes + more
    else:
        targets = [unknown] * len(sheet.lines)
        notes = [f"labels: no column label or {', '.join(labels)}: nothing to compare with"]
    used = {*taken, *(columns.values() or [column])}
    rest = [name for name in sheet.cells if name not in used]
    if rest:
        notes.append(f"columns not compared: {', '.join(rest)}")
    return Goal(kind, tuple(labels), targets, notes, unused=tuple(rest))


def columns_of_labels(sheet, taken, labels) -> dict[str, str]:
    """The columns that are called like labels, {label: column}.

    A column called label or class is none when it holds other names than yes and no.
    """
    found = {}
    for label in labels:
        column = sheet.named.get(plain(label))
        if column and column not in taken:
            if column_key(column) not in LABEL or OTHER not in map(answer, sheet.cells[column]):
                found[label] = column
    return found


def match_findings(sheet, column, findings, kind, labels, against) -> tuple[list[tuple], list[str]]:
    """Compare the findings of each row with a model's labels → targets, notes.

    Names that the model does not know count as none of its labels; UserError when it knows none, or
    one may be a label: in doubt (label?), with a slip of the pen, a kind of it (left label), or the
    kind that it belongs to. Of classes that exclude each other (kind classes, or a label and the
    class that it was learnt `against`) a row must have one, else it is not known. "No finding" is a
    label where the model has it.
    """
    both = [*labels, against] if against else labels
    healthy = {label for label in both if is_negative(label)}
    label_of = {plain(label): label for label in both}
    count = Counter(name for found in findings if found for name in found)
    others = {name: films for name, films in count.items() if plain(name) not in label_of}
    for name, label in product(others, both):
        is_kind = is_kind_of(name, label) or is_kind_of(label, name)
        if is_same_in_doubt(name, label) or is_slip(name, label) or is_kind:
            row = next(row for row, found in enumerate(findings) if name in (found or ()))
            sheet.refuse(
                row,
                f"column {column} says {name!r}, which may be the model's {label!r}: write that "
                "where it is meant, or nothing where it is not known; if it is something else, "
                f"make a column {label} of 0 and 1",
            )
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
    goal = Goal("mask", (), [], ["masks: no column mask"])
    goal = read_masks(sheet, column) if column else goal
    rest = tuple(name for name in sheet.cells if name not in taken and name != column)
    return goal._replace(labels=tuple(labels), targets=[()] * len(sheet.lines), unused=rest)


# ---------------------------------------------------------------- linear probes
def refuse_twins(flag: str, paths: list[str]):
    """UserError when two tables of a flag have one name, by which results know them."""
    if len({Path(path).stem for path in paths}) < len(paths):
        raise UserError(f"{flag} {','.join(paths)}: two tables of one name; rename one")


class Labels:
    """The table of a linear probe: a table of one's own with labels and a column split, of which
    some films are there.

    classes: their names. Row by row: names, y (n, classes) of 0, 1 and NaN (not known), split (n,),
    patients, where (n,): the number of the film in `films`, -1 where it is not there. others:
    {film: patient} of rows without a label. notes: what was decided and left out.
    """

    def __init__(self, path, films):
        """Read the table and find its films.

        UserError when no film is there, when a row fits two films, as view1_frontal.jpg would, or
        when two rows contradict each other; of equal rows the first counts.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(
                f"probe table {path}: no such file; "
                "a CSV with the columns filename,label,split is wanted"
            )
        table = read_own_table(self.path, can_be_mask=False)
        if table.goal.kind == "mask" or not table.has_splits:
            lacks = "label" if table.goal.kind == "mask" else "split"
            raise UserError(f"probe table {path}: no column {lacks}, which a probe needs")
        self.classes = list(table.goal.labels)
        self.names = [row.name for row in table.rows]
        self.y = np.array([row.target for row in table.rows], float)
        self.split = np.array([row.split for row in table.rows])
        self.notes = [*table.notes]
        self.place(table, films.names)

    def place(self, table: OwnTable, films: list[str]):
        """Find the films and patients of the rows, as __init__ says."""
        where, odd = table.locate(films)
        located = [
            films[i] if i >= 0 else as_path(name) for i, name in zip(where, self.names, strict=True)
        ]
        self.patients, self.patient_note = table.name_patients(located)
        table.refuse_contradictions(located, self.patients)
        absent = np.flatnonzero(where < 0)
        if len(absent) == len(where):
            raise UserError(
                f"probe table {self.path}: none of its {len(where)} films is in the data "
                f"(first: {self.names[0]})"
            )
        self.notes += odd
        if len(absent):
            first = self.names[absent[0]]
            self.notes.append(f"{len(absent)} of {len(where)} films are not there: {first}, ...")
        is_first = np.isin(np.arange(len(where)), np.unique(where, return_index=True)[1])
        is_repeated = (where >= 0) & ~is_first
        if is_repeated.any():
            self.notes.append(f"{is_repeated.sum()} repeated rows dropped")
        self.where = np.where(is_repeated, -1, where)
        where, _ = table.unknown.locate(films)
        rows = [row for row, i in zip(table.unknown.rows, where, strict=True) if i >= 0]
        where = where[where >= 0]
        told, _ = replace(table.unknown, rows=rows).name_patients([films[i] for i in where])
        self.others = dict(zip(where, told, strict=True))

    def complete(self) -> "Labels":
        """The table itself, when a probe can be fitted, chosen and tested on it.

        UserError when a split has no film, or no class has positive and negative films to learn
        from and to test on.
        """
        y_of = {split: self.y[(self.split == split) & (self.where >= 0)] for split in SPLITS}
        lacking = [split for split in SPLITS if not len(y_of[split])]
        if lacking:
            raise UserError(f"probe table {self.path}: no film of split {' and '.join(lacking)}")
        for split in ("train", "test"):
            y = y_of[split]
            if not ((y == YES).any(0) & (y == NO).any(0)).any():
                raise UserError(
                    f"probe table {self.path}: no class of {', '.join(self.classes)} has positive "
                    f"and negative films in {split}"
                )
        return self

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
        tables.append(Labels(path, films).complete())
        team.say(tables[-1].describe())
    return tables
