"""The one reader of CSV files, the words that mean "no finding", and which row is of which film."""

import csv
import gzip
import re
import zlib
from pathlib import Path

import numpy as np

from plumbing.film import SUFFIXES
from plumbing.launch import UserError

SPLITS = ("train", "val", "test")

# Labels that name no finding, in lower case. A film with one of these is negative for every class.
NEGATIVE = ("normal", "no finding", "no_finding", "none", "negative", "0", "")


# ---------------------------------------------------------------- files
def read_table(path, *columns: str, missing="") -> list[dict[str, str]]:
    """Read a CSV file (.csv, or .csv.gz) with a header line into one {column: text} per row.

    Spaces around names and values are dropped, and so are empty lines and fields beyond the header
    (the rows of NIH's table end with a comma); cells that a row lacks are `missing`. With `columns`
    given, only these are kept. UserError when the file is no such table or lacks a column.
    """
    path = Path(path)
    open_text = gzip.open if path.suffix == ".gz" else open
    try:
        with open_text(path, "rt", newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file, skipinitialspace=True)
            header = [name.strip() for name in next(lines, [])]
            require_columns(path, header, columns)
            rows = []
            for line in filter(None, lines):
                row = dict.fromkeys(header, missing)
                row.update(zip(header, map(str.strip, line), strict=False))
                rows.append({name: row[name] for name in columns or header})
            return rows
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, csv.Error) as error:
        raise UserError(
            f"{path}: cannot be read as a table ({error}); save it as CSV, UTF-8, with commas"
        ) from None


def require_columns(path, header, wanted):
    """UserError that names the file, the missing columns and those that are there."""
    absent = [name for name in wanted if name not in header]
    if absent:
        raise UserError(
            f"{path}: no column {', '.join(absent)}; its columns are {', '.join(header) or 'none'}"
        )


def read_list(path: Path) -> list[tuple[str, tuple[int, ...]]]:
    """Read a split list, a film and its labels per line: 'name 0 1 0', 'name,1' or 'name' alone.

    Blank lines and Windows line ends are fine. → [(name, (0, 1, 0))]
    """
    films = []
    try:
        for line in path.read_text(encoding="utf-8-sig").splitlines():
            if line.strip():
                name, *labels = re.split(r"[\s,]+", line.strip())
                films.append((name, tuple(int(float(label)) for label in labels if label)))
    except ValueError:
        raise UserError(f"{path}: not a split list of lines 'name 0 1 ...'") from None
    return films


# ---------------------------------------------------------------- cells
def number(text: str) -> float:
    """The number in a label cell; blank, 'nan' and words count as 0."""
    try:
        value = float(text or 0)
    except ValueError:
        return 0.0
    return 0.0 if np.isnan(value) else value


def read_findings(cells: list[str]) -> tuple[list[str], list[set[str]]]:
    """Split label cells like 'effusion|mass' into names, without 'normal' and the like (NEGATIVE).

    → all classes, sorted; the set of findings of each cell
    """
    findings = []
    for cell in cells:
        names = {name.strip() for name in cell.split("|")}
        findings.append({name for name in names if name.lower() not in NEGATIVE})
    return sorted(set().union(*findings)), findings


# ---------------------------------------------------------------- paths
def without_suffix(name: str) -> str:
    """The name without its image suffix; other dots stay: ChestDR and SIIM have them in names."""
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and "." + suffix.lower() in SUFFIXES else name


def tails(path: str) -> list[str]:
    """The ends of a path, folder by folder, shortest first: 'a/b/c' → ['c', 'b/c', 'a/b/c']."""
    parts = path.split("/")
    return ["/".join(parts[k:]) for k in reversed(range(len(parts)))]


def match(names, listed) -> list[str | None]:
    """Find for each film of `names` its row among the paths `listed`; None where it has none.

    They match when one path ends with the other, by whole folders (`train/p1/a.png` and `a.png`).
    """
    as_written = {path.replace("\\", "/").removeprefix("./"): path for path in listed}
    by_tail = {}  # the rows whose path is the longer one
    for path, row in as_written.items():
        for tail in tails(path):
            by_tail[tail] = row
    found = []
    for name in names:
        row = by_tail.get(name)
        if row is None:  # the film's path is the longer one
            row = next((as_written[tail] for tail in tails(name) if tail in as_written), None)
        found.append(row)
    return found


# ---------------------------------------------------------------- labels
class Labels:
    """The table of a linear probe: a CSV `filename,label,split` and perhaps `patient_id`.

    A label is one class or several joined by |; "normal" (or another word of NEGATIVE) means none.
    classes: their names. Row by row: names, y (n, classes) of 0 and 1, split (n,), patients.
    """

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(
                f"--probe {path}: no such file; "
                "a CSV with the columns filename,label,split is wanted"
            )
        rows = read_table(self.path, missing=None)
        self.check(rows)
        self.names = [row["filename"] for row in rows]
        self.classes, findings = read_findings([row["label"] for row in rows])
        targets = [[name in found for name in self.classes] for found in findings]
        self.y = np.array(targets, dtype=float)
        self.split = np.array([row["split"].lower() for row in rows])
        self.patients = [row.get("patient_id") or row["filename"] for row in rows]

    def check(self, rows):
        """UserError when a column is absent, or a row is cut off or lacks a filename or a split."""
        if not rows or not {"filename", "label", "split"} <= rows[0].keys():
            found = ", ".join(rows[0]) if rows else "nothing"
            raise UserError(
                f"--probe {self.path}: columns filename, label and split are wanted, found {found}"
            )
        for line, row in enumerate(rows, start=2):
            is_cut_off = row["label"] is None or row["split"] is None
            if is_cut_off or not row["filename"] or row["split"].lower() not in SPLITS:
                found = ",".join(cell or "" for cell in row.values())[:120]
                raise UserError(
                    f"--probe {self.path}, line {line}: a filename, a label and a split of "
                    f"{', '.join(SPLITS)} are wanted, found {found}"
                )

    def complete(self) -> "Labels":
        """The table itself, when a probe can be fitted, chosen and tested on it; else UserError."""
        if not self.classes or set(SPLITS) - set(self.split):
            raise UserError(
                f"--probe {self.path}: films of all three splits ({', '.join(SPLITS)}) and a class "
                f"beside normal are wanted; found {', '.join(sorted(set(self.split)))}; "
                f"{', '.join(self.classes) or 'no class'}"
            )
        return self

    def locate(self, films) -> np.ndarray:
        """Find each row's film: its number in `films`, -1 where it is not there. (n,)

        UserError when none is there, or when a row fits two films, as view1_frontal.jpg would.
        """
        where = {}
        for i, name in enumerate(match(films.names, self.names)):
            if name in where:
                raise UserError(
                    f"--probe {self.path}: {name} fits both {films.names[where[name]]} and "
                    f"{films.names[i]}: write more of the path"
                )
            if name is not None:
                where[name] = i
        found = np.array([where.get(name, -1) for name in self.names])
        if (found < 0).all():
            raise UserError(
                f"--probe {self.path}: none of its {len(found)} films is in the data "
                f"(first: {self.names[0]})"
            )
        return found
