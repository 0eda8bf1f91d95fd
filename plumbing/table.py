"""The one reader of CSV files: their cells, the roles of their columns, the film of a row."""

import csv
import functools
import gzip
import io
import re
import unicodedata
import zlib
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from plumbing.film import SUFFIXES
from plumbing.launch import UserError
from plumbing.words import (
    COLUMNS,
    GARBLED,
    LOST,
    MISSING,
    NO_NAMES,
    OTHER,
    SHEET_ERROR,
    SPLITS,
    YES,
    answer,
    column_key,
    flags_split,
    patient_keys,
    patient_of,
    plain,
    split_of,
    split_stem,
)

# How a number is kept as text in Excel: ="00118" or '00118.
EXCEL_TEXT = re.compile(r"""^(?:="([^"]*)"|'(\d[^']*))$""")
# How Excel's workbooks (new and old), Parquet files, web pages and JSON begin.
NO_TABLES = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0", b"PAR1", b"<", b"{", b"[")


# ---------------------------------------------------------------- files
def read_table(path, *columns: str) -> list[dict[str, str]]:
    """Read a CSV file with a header line into one {column: text} per row; see read_cells.

    Cells that a row lacks are blank. With `columns` given, only these are kept. UserError when the
    file lacks one.
    """
    header, lines = read_cells(path)
    require_columns(path, header, columns)
    blank = dict.fromkeys(header, "")
    rows = [blank | dict(zip(header, cells, strict=False)) for _, cells in lines]
    return [{name: row[name] for name in columns or header} for row in rows]


def read_cells(path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Read a table as programs and people save it → (column names, [(line number, cells)]).

    CSV with commas, semicolons, tabs or |, in UTF-8 or UTF-16, perhaps gzipped. Spaces around
    names and values are dropped, and so are rows without any content and empty cells beyond the
    header (the rows of NIH's table end with a comma). A row may lack its last cells. UserError when
    the file is no such table, or a cell belongs to no column.
    """
    text = read_text(Path(path))
    hint = re.match(r'"?sep=([,;\t|])"?[ \t]*(?=[\r\n])', text)  # for Excel, in a line of its own
    text = text[hint.end() :] if hint else text  # the line end stays, so that lines keep numbers
    separator = hint[1] if hint else find_separator(text)
    text = re.sub(f'" +(?=[{separator}\r\n])', '"', text)  # a space after a quotation mark
    lines = csv.reader(
        io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True
    )
    header = []
    rows = []
    line = 1
    try:
        for cells in lines:
            cells = list(map(str.strip, cells))
            if any(cell[:1] in ("=", "'") for cell in cells):
                cells = [EXCEL_TEXT.sub(r"\1\2", cell).strip() for cell in cells]
            if not header and any(cells):
                last = max(k for k, name in enumerate(cells) if name)
                header = cells[: last + 1]
                refuse_double_names(path, header)
            elif any(cells):
                if len(cells) > len(header) or "" in header:
                    refuse_strays(path, header, line, cells, not rows)
                rows.append((line, cells[: len(header)]))
            line = lines.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}, line {line}: cannot be read as a table ({error}): a quotation mark is not "
            "closed, or stands inside a cell"
        ) from None
    return header, rows


def read_text(path: Path) -> str:
    """Read a file of text: UTF-8 or UTF-16, zipped or not. UserError when it is something else."""
    try:
        data = path.read_bytes()
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read as a table ({reason})") from None
    advice = "save it as CSV, UTF-8"
    if data.removeprefix(b"\xef\xbb\xbf").startswith(NO_TABLES):
        raise UserError(
            f"{path}: cannot be read as a table: it is an Excel workbook, a web page, JSON or the "
            f"like; {advice}"
        )
    encoding = "utf-8-sig"
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    elif b"\0" in data[:2]:  # without a mark, the zero byte of the first letter tells the order
        encoding = "utf-16-be" if data[:1] == b"\0" else "utf-16-le"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        name = encoding.removesuffix("-sig").upper()
        raise UserError(
            f"{path}: cannot be read as a table: line {line} is no {name}; {advice}"
        ) from None
    text = re.sub("[\ufeff\u200b\u00ad]", "", text)  # invisible: marks, empty spaces, soft hyphens
    text = unicodedata.normalize("NFC", text)  # é as one letter, whoever wrote it
    if "\0" in text:
        raise UserError(f"{path}: cannot be read as a table: it holds zero bytes; {advice}")
    return text


def find_separator(text: str) -> str:
    """Find what stands between the cells: comma, semicolon or tab, the most frequent of the header;
    | where it has none of them.

    What stands between quotation marks does not count.
    """
    unquoted = re.sub('"[^"]*"', '""', text[:1_000_000])
    header = next(filter(str.strip, unquoted.splitlines()), "")
    separator = max(",;\t", key=header.count)
    return separator if separator in header or "|" not in header else "|"


def refuse_double_names(path, header):
    """UserError when the names of two columns differ in case, spaces and the like at most."""
    first = {}
    for name in filter(None, header):
        if plain(name) in first:
            raise UserError(
                f"{path}: two columns are called {first[plain(name)]} and {name}: rename or delete "
                "one"
            )
        first[plain(name)] = name


def refuse_strays(path, header, line, cells, is_first):
    """UserError when a cell stands beyond the header, or below an empty name but in column 1."""
    if is_first and len(header) == 1 and any(cells[1:]):
        raise UserError(
            f"{path}: the line {header[0][:60]!r} looks like a title, for line {line} has more "
            "cells: delete it"
        )
    for k, cell in enumerate(cells):
        has_name = k < len(header) and (header[k] or k == 0)  # pandas writes an index without name
        if cell and not has_name:
            raise UserError(
                f"{path}, line {line}: {cell[:60]!r} is in column {k + 1}, which the header does "
                "not name: put a cell with a comma in quotation marks, or name the column"
            )


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


# ---------------------------------------------------------------- columns and their roles
class Sheet:
    """A table by columns: cells {column: one per row}, lines: where each row stands in the file.

    film, patient and split: the columns of these roles, the last two None where there is none;
    others: the rest. notes: what was decided.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.notes = []
        header, rows = read_cells(path)
        if not rows:
            raise UserError(f"{path}: no row below its header ({', '.join(header) or 'empty'})")
        line, cells = rows[-1]
        if len(cells) < len(header):
            raise UserError(
                f"{path}, line {line}: {len(cells)} cells where the header has {len(header)}: "
                "is the file cut off?"
            )
        short = [line for line, cells in rows if len(cells) < len(header)]
        if short:  # Excel leaves blank cells out
            self.notes.append(
                f"{len(short)} rows have fewer cells than the header (first: line {short[0]}): "
                "those that they lack at their end are blank"
            )
        self.lines = [line for line, _ in rows]
        filled = ([*cells, *[""] * (len(header) - len(cells))] for _, cells in rows)
        columns = zip(*filled, strict=True)
        self.cells = {name: cells for name, cells in zip(header, columns, strict=True) if name}
        self.named = {plain(name): name for name in self.cells}
        self.read_signs()
        self.film = self.find_film()
        self.patient = self.column("patient")

    def read_signs(self):
        """Read + and - as yes and no where a column has no other sign or word."""
        signs = {"+": "yes", "-": "no", "\u2013": "no", "\u2212": "no"}
        for name, cells in self.cells.items():
            if "+" in cells and OTHER not in (answer(cell) for cell in cells if cell not in signs):
                self.cells[name] = tuple(signs.get(cell, cell) for cell in cells)
                self.notes.append(f"column {name}: + is read as yes, - as no")

    def refuse(self, message: str, row: int | None = None):
        """Raise UserError about the table, or about one row of it."""
        where = self.path if row is None else f"{self.path}, line {self.lines[row]}"
        raise UserError(f"{where}: {message}")

    def refuse_cell(self, column: str, row: int, why: str, word: str | None = None):
        """Raise UserError about what a cell says, or a word of it."""
        said = self.cells[column][row] if word is None else word
        self.refuse(f"column {column} says {said[:60]!r}{why}", row)

    def refuse_garbled(self, columns):
        """UserError on a cell or a name of these columns that lost letters."""
        why = 'letters were lost when the table was saved: save it as "CSV UTF-8" or correct it'
        for name in columns:
            if GARBLED.search(name):
                self.refuse(f"column {name}: {why}")
            cells = self.cells[name]
            garbled = {cell for cell in set(cells) if GARBLED.search(cell) or LOST.search(cell)}
            if garbled:
                self.refuse_cell(name, min(map(cells.index, garbled)), f": {why}")

    def column(self, role: str) -> str | None:
        """The column of a role by the first of its usual names that is there; None without any."""
        names = COLUMNS[role]
        fitting = [name for name in self.cells if column_key(name) in names]
        fitting.sort(key=lambda name: names.index(column_key(name)))
        if len(fitting) > 1:
            self.notes.append(f"{role}: column {fitting[0]}, not {', '.join(fitting[1:])}")
        return fitting[0] if fitting else None

    def answers(self, column: str) -> list:
        """What the cells of a column answer: YES, NO, UNCERTAIN, MISSING or OTHER."""
        return list(map(answer, self.cells[column]))

    def find_film(self) -> str:
        """Find the column of films. UserError when there is none, or a row names no film."""
        column = self.column("film")
        if not column and any(Path(name).suffix.lower() in SUFFIXES for name in self.cells):
            self.refuse(
                "its first row holds data: write the names of the columns above it, such as "
                "filename,label"
            )
        if not column:
            self.refuse(
                "no column filename (or file, image, path, Image Index, image_id, dicom_id ...); "
                f"its columns are {', '.join(self.cells)}"
            )
        answers = self.answers(column)
        if MISSING in answers:
            row = answers.index(MISSING)
            self.refuse(f"column {column} names no film ({self.cells[column][row]!r})", row)
        return column

    @functools.cached_property
    def split(self) -> str | None:
        """The column of splits: of a usual name, else the one of whose filled cells most say train,
        val or test, or something alike in a column of few kinds; `splits` refuses the others.

        UserError when several columns say so, or a column such as is_test does: else other films
        would be tested than the table means.
        """
        column = self.column("split")
        if column:
            return column
        found = []
        for name, cells in self.cells.items():
            if name in (self.film, self.patient):
                continue
            # Few columns come to the answers of their cells, which take time in a large table.
            answers = self.answers(name) if flags_split(name) else []
            if YES in answers and OTHER not in answers:
                self.refuse(
                    f"column {name}: write a column split that says train, val or test, or delete "
                    "the column if it means something else"
                )
            kinds = set(cells)
            told = {cell: split_stem(cell) if len(kinds) <= 7 else split_of(cell) for cell in kinds}
            said = list(filter(None, map(told.get, cells)))
            if len(set(said)) < 2:
                continue
            filled = len(cells) - self.answers(name).count(MISSING)  # a blank says nothing else
            if 2 * len(said) > filled and any(map(split_of, kinds)):
                found.append(name)
        if len(found) > 1:
            self.refuse(
                f"{' and '.join(found)} may both be the column of the split: rename or delete one"
            )
        return found[0] if found else None

    @functools.cached_property
    def others(self) -> list[str]:
        """The columns without these roles: one of them may say what is to be learnt."""
        return [name for name in self.cells if name not in (self.film, self.patient, self.split)]

    def patients(self) -> list[str | None]:
        """Read the patient of every row, as words.patient_of and patient_keys tell.

        None without such a column. UserError on what a spreadsheet spoilt.
        """
        column = self.patient
        if not column:
            return [None] * len(self.lines)
        patients = []
        for row, cell in enumerate(self.cells[column]):
            if SHEET_ERROR.fullmatch(cell):
                self.refuse_cell(column, row, ", an error of the spreadsheet")
            if re.fullmatch(r"\d([.,]\d+[eE]\+?|[eE]\+)\d+", cell):
                self.refuse_cell(column, row, ": a spreadsheet rounded the number")
            if re.fullmatch(r"[1-9]\d{0,2}[.,]000", cell):
                why = ", which may be a thousand or not: write the number without point or comma"
                self.refuse_cell(column, row, why)
            if NO_NAMES["a ditto"].fullmatch(cell):
                self.refuse_cell(column, row, ", a ditto: write the patient in every row")
            patients.append(patient_of(cell))
        self.refuse_merged(column)
        known = list(dict.fromkeys(filter(None, patients)))
        first = {}  # as the first row writes it
        for who, key in zip(known, patient_keys(known), strict=True):
            first.setdefault(key, []).append(who)
        one = {who: spellings[0] for spellings in first.values() for who in spellings}
        several = [found for found in first.values() if len(set(map(str.casefold, found))) > 1]
        if several:
            found = " and ".join(several[0])
            self.notes.append(
                f"patients: {len(several)} are spelt in several ways, such as {found}, taken as one"
            )
        return [one.get(who) for who in patients]

    def refuse_merged(self, column: str):
        """UserError when a patient seems to stand in the first of their rows only."""
        cells = self.cells[column]
        filled = list(filter(None, cells))
        blocks = sum(bool(cell) and not below for cell, below in pairwise(cells))
        is_once = len(set(filled)) == len(filled) <= 2 * cells.count("")
        if cells[0] and is_once and blocks > 1:
            self.refuse(
                f"column {column} names every patient once, with {cells.count('')} blanks below "
                "them: merged cells? Fill the column down, or write NA where nobody knows the "
                "patient",
                cells.index(""),
            )

    def splits(self) -> list[str | None]:
        """Read the split of every row, None without such a column. UserError when a cell names
        none.
        """
        if not self.split:
            return [None] * len(self.lines)
        splits = list(map(split_of, self.cells[self.split]))
        advice = "rename or delete the column if it means something else"
        must = f"column {self.split} must say {', '.join(SPLITS)}"
        if None in splits:
            row = splits.index(None)
            self.refuse(f"{must}, not {self.cells[self.split][row]!r}: {advice}", row)
        stems = sorted(set(map(split_stem, set(self.cells[self.split]))))
        if len(stems) > 1 and len(set(splits)) == 1:  # development and validation
            self.refuse(f"{must}; {' and '.join(stems)} both mean {splits[0]}: {advice}")
        return splits


# ---------------------------------------------------------------- paths
def without_suffix(name: str) -> str:
    """The name without its image suffix; other dots stay: ChestDR and SIIM have them in names."""
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and "." + suffix.lower() in SUFFIXES else name


class Place(NamedTuple):
    """Where the film of a row lies: the numbers of all films that it may mean."""

    films: list[int]
    is_elsewhere: bool = False  # found by its name alone: the row says another folder


class Finder:
    """Finds films, a list of paths, by what a table calls them.

    A row means a film when one path ends with the other, folder by folder, whatever the suffix and
    whether letters are large or small; \\ counts as /. What fits exactly goes before what does not.
    Where no folder fits, the name alone is enough if no other film and no other row has it, and if
    the row's folder is not there: no other row's film lies in one of that name.
    """

    def __init__(self, films):
        self.films = list(films)
        self.parts = [len(path.split("/")) for path in self.films]
        self.of_depth = {}  # {depth: {key of a tail: numbers of films}}

    def tails(self, depth: int) -> dict[str, list[int]]:
        """{the key of the last `depth` parts of a path: the films that end so}."""
        if depth not in self.of_depth:
            table = {}
            for i, path in enumerate(self.films):
                if self.parts[i] >= depth:
                    table.setdefault(key_of(tail_of(path, depth)), []).append(i)
            self.of_depth[depth] = table
        return self.of_depth[depth]

    def find(self, names) -> list[Place]:
        """Find the film of every row: none, one, or all that fit equally well."""
        places = [self.place(as_path(name)) for name in names]
        used = {i for place in places if not place.is_elsewhere for i in place.films}
        there = {folder_of(self.films[i]) for i in used}
        asked = Counter(place.films[0] for place in places if place.is_elsewhere)
        for row, place in enumerate(places):
            if not place.is_elsewhere:
                continue
            (film,) = place.films
            folder = folder_of(as_path(names[row]))
            is_lacking = folder in there and folder != folder_of(self.films[film])
            if film in used or asked[film] > 1 or is_lacking:
                places[row] = Place([])
        return places

    def find_one(self, names, table, lines) -> list[Place]:
        """The same, of a table's rows. UserError, with its line, when one fits several films."""
        places = self.find(names)
        for name, line, place in zip(names, lines, places, strict=True):
            if len(place.films) > 1:
                first, second = (self.films[i] for i in place.films[:2])
                raise UserError(
                    f"{table}, line {line}: {name} fits both {first} and {second}: write more of "
                    "the path"
                )
        return places

    def ending(self, path: str) -> list[int]:
        """The films whose path ends with `path`, folder by folder."""
        found = self.tails(path.count("/") + 1).get(key_of(path), [])
        return self.closest(found, path)

    def place(self, path: str) -> Place:
        """The films whose path ends with `path`, or with whose path `path` ends; without any, the
        one that has the most last parts in common with it.
        """
        alike = []
        depth = path.count("/") + 1
        for k in range(depth, 0, -1):
            tail = tail_of(path, k)
            found = self.tails(k).get(key_of(tail), [])
            whole = [i for i in found if k in (depth, self.parts[i])]
            if whole:
                return Place(self.closest(whole, tail))
            alike = alike or self.closest(found, tail)
        return Place(alike, is_elsewhere=True) if len(alike) == 1 else Place([])

    def closest(self, found: list[int], tail: str) -> list[int]:
        """Those that fit best: whole path, then name with suffix, then letters as written."""
        for fits in (
            lambda film: film == tail,
            lambda film: f"/{film}".endswith(f"/{tail}"),
            lambda film: f"/{film}".casefold().endswith(f"/{tail}".casefold()),
            lambda film: f"/{without_suffix(film)}".endswith(f"/{without_suffix(tail)}"),
        ):
            best = [i for i in found if fits(self.films[i])]
            if best:
                return best
        return found


def as_path(name: str) -> str:
    """A name as it stands in a table as a path with /: of a web address without what follows ?."""
    if "://" in name:
        name = name.partition("://")[2].partition("?")[0]
    parts = name.replace("\\", "/").split("/")
    return "/".join(part for part in parts if part not in ("", ".", ".."))


def folder_of(path: str) -> str:
    """The name of the folder that a film lies in, as names are compared; "" without any."""
    return key_of(path.rpartition("/")[0].rpartition("/")[2])


def tail_of(path: str, depth: int) -> str:
    """The last `depth` parts of a path."""
    return "/".join(path.rsplit("/", depth)[-depth:])


def key_of(tail: str) -> str:
    """What two spellings of a path have in common: no suffix, no case, composed letters."""
    return unicodedata.normalize("NFC", without_suffix(tail)).casefold()
