"""plumbing.table"""

import csv
import gzip
import itertools
import re
import zlib
from pathlib import Path

import numpy as np

from plumbing.film import IMAGE_SUFFIXES
from plumbing.launch import UserError

SPLITS = ("train", "val", "test")


def without_suffix(name):
    """Path → the same without an image suffix; other dots stay (ChestDR and SIIM names hold dots)."""
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and "." + suffix.lower() in IMAGE_SUFFIXES else name


def read_list(path):
    """Lines 'name 0 1 0', 'name,1', 'name 0,0,1' or 'name' → [(name, (0, 1, 0))]; blank lines and CRLF are fine."""
    try:
        words = [
            re.split(r"[\s,]+", line.strip())
            for line in path.read_text(encoding="utf-8-sig").splitlines()
            if line.strip()
        ]
        return [(w[0], tuple(int(float(x)) for x in w[1:] if x)) for w in words]
    except ValueError:
        raise UserError(f"{path}: not a split list of lines 'name 0 1 ...'") from None


def read_table(path, *columns):
    """CSV → list of dicts; spaces around names and values dropped (SIIM's header), surplus fields too (NIH's commas). Stop unless `columns` are there."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, skipinitialspace=True)
            header = [h.strip() for h in rows.fieldnames or []]
            table = [
                {k.strip(): (v or "").strip() for k, v in row.items() if k is not None}
                for row in rows
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"{path}: cannot be read as a table ({error}); save it as CSV, UTF-8, with commas"
        ) from None
    absent = [c for c in columns if c not in header]
    if absent:
        raise UserError(
            f"{path}: no column {', '.join(absent)}; its columns are {', '.join(header)}"
        )
    return table


def number(text):
    """Cell of a label column → float, blank and text → 0."""
    try:
        value = float(text or 0)
    except ValueError:
        return 0.0
    return value if value == value else 0.0  # 'nan'


def read_columns(path, *columns):
    """The named columns of a .csv or .csv.gz, row by row."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(
            path, "rt", newline="", encoding="utf-8-sig"
        ) as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            if lacking := [c for c in columns if c not in header]:
                raise UserError(
                    f"{path}: no column {lacking[0]!r} in its header {','.join(header)[:200]!r}"
                )
            at = [header.index(c) for c in columns]
            yield from (tuple(row[k].strip() for k in at) for row in reader if len(row) > max(at))
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a table ({error})") from None


def match(names, listed):
    """For each path of `names` the path of `listed` that is its tail or whose tail it is, by whole parts; else None."""
    tails = lambda path: itertools.accumulate(
        reversed(path.split("/")), lambda tail, part: f"{part}/{tail}"
    )
    exact = {path.replace("\\", "/").removeprefix("./"): path for path in listed}
    longer = {tail: original for path, original in exact.items() for tail in tails(path)}
    return [
        longer.get(name) or next((exact[t] for t in tails(name) if t in exact), None)
        for name in names
    ]


NEGATIVE = {"", "normal", "no finding", "none", "negative", "0"}


SPLITS = ("train", "val", "test")


class Labels:
    """A CSV `filename,label[,patient_id][,split]`: label is one class or several joined by | ("normal" = none of them).

    names, y (n, classes) 0/1, classes, split (n,) of train/val/test, patients.
    """

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(
                f"--probe {path}: no such file; a CSV with the columns filename,label,split is wanted"
            )
        with open(self.path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        if not rows or not {"filename", "label", "split"} <= rows[0].keys():
            raise UserError(
                f"--probe {path}: the columns filename, label and split are wanted, found {', '.join(rows[0]) if rows else 'nothing'}"
            )
        for line, r in enumerate(rows, 2):
            if (
                not r["filename"]
                or r["label"] is None
                or (r["split"] or "").strip().lower() not in SPLITS
            ):
                raise UserError(
                    f"--probe {path}, line {line}: a filename, a label and a split of {', '.join(SPLITS)} are wanted, found {','.join(map(str, r.values()))[:120]}"
                )
        self.names = [r["filename"].strip() for r in rows]
        parts = [{p.strip() for p in r["label"].split("|")} for r in rows]
        self.classes = sorted({p for each in parts for p in each if p.lower() not in NEGATIVE})
        self.y = np.array([[c in each for c in self.classes] for each in parts], dtype=float)
        self.split = np.array([r["split"].strip().lower() for r in rows])
        self.patients = [r.get("patient_id") or r["filename"] for r in rows]

    def complete(self):
        """Itself, when a probe can be fitted, chosen and tested on it; else Stop."""
        if not self.classes or set(SPLITS) - set(self.split):
            raise UserError(
                f"--probe {self.path}: films of all three splits ({', '.join(SPLITS)}) and a class beside normal are wanted; "
                f"found {', '.join(sorted(set(self.split)))}; {', '.join(self.classes) or 'no class'}"
            )
        return self

    def locate(self, films):
        """Row → number of its film in `films` by path tail, -1 where it is missing; Stop when none is there, or when a row fits two."""
        where = {}
        for i, name in enumerate(match(films.names, self.names)):
            if name is None:
                continue
            if name in where:  # CheXpert calls every film view1_frontal.jpg
                raise UserError(
                    f"--probe {self.path}: {name} fits both {films.names[where[name]]} and {films.names[i]}: write more of the path"
                )
            where[name] = i
        found = np.array([where.get(name, -1) for name in self.names])
        if (found < 0).all():
            raise UserError(
                f"--probe {self.path}: none of its {len(found)} films is in the data (first: {self.names[0]})"
            )
        return found


NO_FINDING = (
    "normal",
    "no finding",
    "no_finding",
    "none",
    "negative",
    "",
)  # csv labels that mean: none of the classes
