"""A table of one's own: film, label or mask, patient and split of each row that counts.

finetune.py --task csv and the linear probes (Labels) read it alike. What is to be learnt is found
out in findings.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from plumbing.findings import Goal, goal_of_model, read_goal
from plumbing.launch import UserError
from plumbing.table import Finder, Sheet, as_path, without_suffix
from plumbing.words import LATERAL, NO, SPLITS, YES, looks_like_patient, tells, word_of

MANY = 20  # films, of which a patient has several or the column tells something else

# Where three sets write the patient into the path of a film; group 1 is the patient.
PATIENT_IN_NAME = {
    "CheXpert's patient00001/study1": re.compile(r"(?:^|/)(patient\d+)/study\d+/"),
    "MIMIC's p10000032/s50414267": re.compile(r"(?:^|/)(p\d{8})/s\d+/"),
    "NIH's 00000013_005": re.compile(r"(?:^|/)(000[0-3]\d{4})_\d{3}(?:\.\w+)?$"),  # up to 00030805
}


# ---------------------------------------------------------------- patients
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
    names = sheet.cells[sheet.film]
    if not sheet.patient:
        sheet.refuse(f"no column patient_id; its columns are {', '.join(sheet.cells)}")
    patients = sheet.patients()
    found = {}
    for row, place in enumerate(Finder(films).find_one(names, path, sheet.lines)):
        for i in place.films:
            if found.setdefault(films[i], patients[row]) != patients[row]:
                sheet.refuse(f"{names[row]} has another patient in a row above", row)
    known = {film: patient for film, patient in found.items() if patient}
    if not found:
        sheet.refuse(f"none of its {len(names)} films is there (first: {names[0]})")
    absent = len(set(names)) - len(found)
    note = f"patients: {path} knows those of {len(known):,} of {len(films):,} films"
    return known, note + (f"; {absent:,} of its films are not there" if absent > 0 else "")


# ---------------------------------------------------------------- the table
class Row(NamedTuple):
    """What a table or a list says of one film. What it does not say is None."""

    name: str  # as written
    truth: tuple | None  # 0, 1 or None (not known) per label, () of masks; None: nothing is known
    patient: str | None = None
    mask: str | tuple | None = None  # a file's name, "" for an empty one; or as film.read_mask asks
    split: str | None = None
    line: int = 0  # where it stands in the file
    path: Path | None = None  # of the film, where it was found already
    written: tuple | None = None  # film and patient as the user's own table spells them


@dataclass
class OwnTable:
    """A table whose columns are understood.

    rows: those of which something is known; unknown: the others, which tell patients.
    """

    sheet: Sheet
    goal: Goal
    notes: list[str]
    rows: list[Row]
    unknown: list[Row]

    def to_test(self) -> "OwnTable":
        """The rows that a finished model is tested on: of split test, else all.

        UserError when the table has a column of splits that names no test.
        """
        rows = [row for row in self.rows if row.split == "test"]
        note = f"test: the {len(rows)} rows of split test, of {len(self.rows)} rows"
        if not self.sheet.split:
            rows = [row._replace(split="test") for row in self.rows]
            note = f"test: all {len(rows)} rows, for the table has no splits"
        if not rows:
            said = ", ".join(sorted({row.split for row in self.rows}))
            self.sheet.refuse(
                f"no row of split test, it says {said}: without the column all rows are tested"
            )
        return replace(self, rows=rows, notes=[*self.notes, note])

    def locate(self, films) -> tuple[np.ndarray, list[str]]:
        """Find the film of every row: its number in `films`, a list of paths; -1: not there. (n,)

        UserError when a row fits several films. Notes: what does not fit quite as it is written.
        """
        found = []
        odd = {}  # {how films differ from what is written: [which]}
        names = [row.name for row in self.rows]
        places = Finder(films).find_one(names, self.sheet.path, [row.line for row in self.rows])
        for name, place in zip(names, places, strict=True):
            found.append(place.films[0] if place.films else -1)
            if not place.films:
                continue
            film = films[found[-1]]
            real = film.rpartition("/")[2]
            written = as_path(name).rpartition("/")[2]
            if place.is_elsewhere:
                odd.setdefault("in other folders than they say", []).append(f"{name} is {film}")
            elif without_suffix(written) != without_suffix(real):
                how = "with other small and large letters"
                odd.setdefault(how, []).append(f"{name} is {real}")
            elif written not in (real, without_suffix(real)):
                odd.setdefault("with another suffix", []).append(f"{name} is {real}")
        notes = [f"{len(which)} films {how}: {which[0]}" for how, which in odd.items()]
        return np.array(found, int), notes

    def name_patients(self, names) -> tuple[list[str], str]:
        """Name the patient of every row as the table says, else as the names of the films do.

        names: the paths of the films. A film whose patient nobody knows counts as a patient of its
        own. UserError when a column that is not read seems to tell, or the column tells too few.
        → patients, a note that says how they are known
        """
        told = [row.patient for row in self.rows]
        every = [row.patient for row in (*self.rows, *self.unknown) if row.patient]
        note = f"patients: column {self.sheet.patient}"
        if not self.sheet.patient:
            told, note = patients_in_names([row.name for row in self.rows])
            if told is None:
                told, note = patients_in_names(names)
            if told is None:
                self.refuse_likely_patient()
        elif None in told:
            note = (
                f"warning: {note}; {told.count(None)} films have none and count as one each, "
                "though they may be anyone's: films of one patient may lie on both sides of a split"
            )
        elif len(set(every)) == len(every) > MANY:
            self.refuse_likely_patient(f"every film has its own {self.sheet.patient}, but ")
            note += (
                ", another one for every film: if it numbers films or stays, films of one patient "
                "may lie on both sides of a split"
            )
        patients = [who or name for who, name in zip(told or names, names, strict=True)]
        are_few = self.sheet.patient and len(set(patients)) < 3
        if are_few and len(self.rows) > MANY and not self.rows[0].split:
            said = ", ".join(sorted(set(patients)))
            self.sheet.refuse(
                f"column {self.sheet.patient} tells too few patients for train, val and test "
                f"({said}): if it says something else, rename it"
            )
        return patients, note

    def refuse_likely_patient(self, why=""):
        """UserError when a column that is not read seems to say who the patients are."""
        for name in self.sheet.others:
            if name not in self.goal.columns and looks_like_patient(name, self.sheet.cells[name]):
                self.sheet.refuse(
                    f"{why}column {name} looks like the patient, who must not cross splits: rename "
                    "it patient_id or, if it says something else, delete the column"
                )

    def refuse_contradictions(self, located, patients):
        """UserError when two rows of one film say different things, or a patient has films in two
        splits. located: the film of each row.
        """
        path = self.sheet.path
        first = {}  # {film: (its first row, what that says)}
        home = {}  # {patient: the first row of theirs}
        for row, film, patient in zip(self.rows, located, patients, strict=True):
            said = dict(label=row.truth, patient=patient, split=row.split, mask=row.mask)
            other, said_before = first.setdefault(film, (row, said))
            if said != said_before:
                what = " and ".join(name for name in said if said[name] != said_before[name])
                raise UserError(
                    f"{path}, lines {other.line} and {row.line}: {row.name} stands twice, with a "
                    f"different {what}: keep one row (several findings in one cell are joined "
                    "with |)"
                )
            other = home.setdefault(patient, row)
            if other.split != row.split:
                raise UserError(
                    f"{path}, lines {other.line} and {row.line}: patient {patient} has films "
                    f"in {other.split} and in {row.split}: patients must not cross splits"
                )


def read_own_table(
    path, column=None, uncertain="ignore", trained=None, can_be_mask=True
) -> OwnTable:
    """Read a table of one's own: film, label or mask, and perhaps patient and split of each row.

    column: what to learn (--column); None: what the table offers, see findings.read_goal.
    uncertain: what -1 counts as: ignore, positive or negative. can_be_mask: whether a column of
    masks may be it. trained: (kind, labels, against) of a model to be tested: its labels are looked
    for, every row is kept, and labels may be absent.
    """
    sheet = Sheet(path)
    split = sheet.split
    if trained:
        goal = goal_of_model(sheet, column, uncertain, *trained)
    else:
        goal = read_goal(sheet, column, uncertain, can_be_mask)
    learnt = [] if goal.kind == "mask" else goal.columns
    sheet.refuse_garbled(filter(None, [*learnt, sheet.patient, split]))
    nothing = [None] * len(sheet.lines)
    patients = sheet.patients()
    films = sheet.cells[sheet.film]
    said = films, goal.truth, patients, goal.masks or nothing, sheet.splits(), sheet.lines
    rows = [Row(*cells) for cells in zip(*said, strict=True)]
    known = [row for row in rows if row.truth is not None]
    unknown = [row for row in rows if row.truth is None]
    if not known:
        sheet.refuse("nothing is known of any row: all is missing or uncertain")
    notes = [*goal.notes, *sheet.notes]
    if unknown:
        first = f"line {unknown[0].line}, {unknown[0].name}"
        notes.append(
            f"left out: {len(unknown)} of {len(rows)} rows, where nothing is known (first: {first})"
        )
    notes.append(f"split: column {split}" if split else "split: none in the CSV")
    notes += warn_of_lateral(sheet, goal)
    return OwnTable(sheet, goal, notes, known, unknown)


def warn_of_lateral(sheet: Sheet, goal: Goal) -> list[str]:
    """Warn of columns of the view, unless they are learnt, that say lateral of some films."""
    notes = []
    for name in set(sheet.others).difference(goal.columns):
        rows = [row for row, cell in enumerate(sheet.cells[name]) if word_of(cell) in LATERAL]
        if rows and tells(name, "view"):
            first = f"first: line {sheet.lines[rows[0]]}, {sheet.cells[sheet.film][rows[0]]}"
            notes.append(
                f"warning: {len(rows)} of {len(sheet.lines)} films are lateral, as column {name} "
                f"says ({first}), and count like the others: what is pre-trained here saw frontal "
                "films only; delete these rows"
            )
    return notes


# ---------------------------------------------------------------- linear probes
def refuse_twins(flag: str, paths: list[str]):
    """UserError when two tables of a flag have one name, by which results know them."""
    if len({Path(path).stem for path in paths}) < len(paths):
        raise UserError(f"{flag} {','.join(paths)}: two tables of one name; rename one")


def locate_or_follow(table: OwnTable, films) -> tuple[np.ndarray, list[str]]:
    """Find the film of every row as OwnTable.locate does; a link that was left out of the films is
    the film it leads to, which must not be trained on if the table holds the link out.
    """
    where, notes = table.locate(films.names)
    absent = np.flatnonzero(where < 0)
    if films.links and len(absent):
        links = list(films.links)
        found, _ = replace(table, rows=[table.rows[row] for row in absent]).locate(links)
        number = {name: i for i, name in enumerate(films.names)}
        for row, k in zip(absent, found, strict=True):
            # A set's lists may have left out what the link leads to.
            where[row] = number.get(films.links[links[k]], -1) if k >= 0 else -1
    return where, notes


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
            self.refuse("no such file; a CSV with the columns filename,label,split is wanted")
        table = read_own_table(self.path, can_be_mask=False)
        if table.goal.kind == "mask":
            self.refuse("no column label, which a probe needs")
        if not table.sheet.split:
            self.refuse(
                "no column split, which a probe needs: say train, val or test in every row, and in "
                "all rows of a patient the same"
            )
        self.classes = list(table.goal.labels)
        self.names = [row.name for row in table.rows]
        self.y = np.array([row.truth for row in table.rows], float)
        self.split = np.array([row.split for row in table.rows])
        self.notes = [*table.notes]
        self.place(table, films)

    def refuse(self, message: str):
        """Raise UserError about the table."""
        raise UserError(f"probe table {self.path}: {message}")

    def place(self, table: OwnTable, films):
        """Find the films and patients of the rows, as __init__ says."""
        where, odd = locate_or_follow(table, films)
        located = [
            films.names[i] if i >= 0 else as_path(name)
            for i, name in zip(where, self.names, strict=True)
        ]
        self.patients, self.patient_note = table.name_patients(located)
        self.take_patients(films.patients, where, located)
        table.refuse_contradictions(located, self.patients)
        absent = np.flatnonzero(where < 0)
        if len(absent) == len(where):
            self.refuse(f"none of its {len(where)} films is in the data (first: {self.names[0]})")
        self.notes += odd
        if len(absent):
            first = self.names[absent[0]]
            self.notes.append(f"{len(absent)} of {len(where)} films are not there: {first}, ...")
        is_repeated = where >= 0
        is_repeated[np.unique(where, return_index=True)[1]] = False  # the first row of each film
        if is_repeated.any():
            self.notes.append(f"{is_repeated.sum()} repeated rows dropped")
        self.where = np.where(is_repeated, -1, where)
        where, _ = locate_or_follow(replace(table, rows=table.unknown), films)
        there = [row for row, i in zip(table.unknown, where, strict=True) if i >= 0]
        where = where[where >= 0]
        told, _ = replace(table, rows=there).name_patients([films.names[i] for i in where])
        self.others = dict(zip(where, told, strict=True))

    def take_patients(self, known: list[str], where, located):
        """Where the table names no patient, take that of the film: of --patients, a pack or a set's
        lists. where: number of each row's film, -1: not there; located: its path.
        """
        taken = 0
        for row, (i, film) in enumerate(zip(where, located, strict=True)):
            if i >= 0 and self.patients[row] == film != known[i]:
                self.patients[row] = known[i]
                taken += 1
        if taken:
            self.patient_note = (
                f"patients: those of {taken} of {len(where)} rows are taken from --patients, a "
                "pack or the set's lists, as the table names none"
            )

    def complete(self) -> "Labels":
        """The table itself, when a probe can be fitted, chosen and tested on it.

        UserError when a split has no film, or no class has positive and negative films to learn
        from and to test on.
        """
        y_of = {split: self.y[(self.split == split) & (self.where >= 0)] for split in SPLITS}
        lacking = [split for split in SPLITS if not len(y_of[split])]
        if lacking:
            self.refuse(f"no film of split {' and '.join(lacking)}")
        for split in ("train", "test"):
            y = y_of[split]
            if not ((y == YES).any(0) & (y == NO).any(0)).any():
                self.refuse(
                    f"no class of {', '.join(self.classes)} has positive and negative films in "
                    f"{split}"
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
