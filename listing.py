"""What a folder and its lists say, before any film is opened: names → files, lists and tables → rows, annotations → masks.

Used by tasks.py for the downstream sets. Nothing here knows a data set by name.
"""

import csv
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data import walk
from runtime import Stop, write_text

SUFFIXES = {".png", ".jpg", ".jpeg", ".dcm", ".dicom", ".webp", ".tif", ".tiff", ".bmp", ".gif"}
SPLITS = ("train", "val", "test")
MASK_FOLDER = re.compile(r"(^|[/_])(masks?|annotations?)(_\d+)?/", re.IGNORECASE)


class Case(NamedTuple):
    """One film: file, target (c,) of 0/1 (empty for segmentation), patient, mask for read_mask: ("file", path), ("rle", rows, canvas) or
    ("boxes", rows, canvas); canvas (height, width), None = the film's own size in pixels."""

    path: Path
    target: tuple
    patient: str
    mask: tuple | None = None


def key(name):
    """Path → the same without an image suffix; other dots stay (ChestDR and SIIM names hold dots)."""
    stem, dot, suffix = name.rpartition(".")
    return stem if dot and "." + suffix.lower() in SUFFIXES else name


class Index:
    """Every file under root but hidden ones, walked once and kept in the text file `cache`; films are found by name or path tail, with or without suffix."""

    def __init__(self, root, cache=None):
        self.root, self.cache = Path(root), cache and Path(cache)
        lines = self.cache.read_text().splitlines() if self.cache and self.cache.is_file() else []
        self.fresh = lines[:1] != [str(self.root.resolve())]
        self.names = self._walk() if self.fresh else lines[1:]
        self.tails = {}

    def _walk(self):
        names, _ = walk(self.root)
        if self.cache:
            write_text(self.cache, "\n".join([str(self.root.resolve()), *names]) + "\n")
        return names

    def files(self, *names):
        """Paths of the files with one of these names, in the order of the names."""
        return [
            self.root / path
            for name in names
            for path in self.names
            if path.rpartition("/")[2] == name
        ]

    def _tail(self, depth):
        """{last `depth` parts without suffix: [relative paths]} of all images outside mask folders."""
        if depth not in self.tails:
            self.tails[depth] = table = {}
            for path in self.names:
                if Path(path).suffix.lower() in SUFFIXES and not MASK_FOLDER.search(path):
                    table.setdefault(key("/".join(path.split("/")[-depth:])), []).append(path)
        return self.tails[depth]

    def _candidates(self, name, depth):
        """Files that `name` may mean: by its last `depth` parts; for depth 0 by as many of its parts as lead anywhere."""
        if depth == 0 and Path(name).is_file() and Path(name).is_absolute():
            return [name]
        parts = name.replace("\\", "/").removeprefix("./").split("/")
        for n in range(len(parts), 0, -1) if depth == 0 else [min(depth, len(parts))]:
            tail = "/".join(parts[-n:])
            found = self._tail(n).get(key(tail), [])
            for closer in (
                [p for p in found if p == tail],
                [p for p in found if ("/" + p).endswith("/" + tail)],
                found,
            ):
                if closer:
                    return closer
        return []

    def find(self, names, depth=1, what="the lists"):
        """Image paths of names, compared by their last `depth` parts (0: as written); Stop with the count when any is absent or ambiguous."""
        found = [self._candidates(n, depth) for n in names]
        if not self.fresh and any(
            len(f) != 1 for f in found
        ):  # the folder may have changed since the cache was written
            self.names, self.tails, self.fresh = self._walk(), {}, True
            return self.find(names, depth, what)
        absent = [n for n, f in zip(names, found) if not f]
        if absent:
            raise Stop(
                f"{self.root}: {len(absent)} of the {len(names)} films named by {what} are not there, the first: {', '.join(absent[:3])}"
            )
        for several in found:
            if len(several) > 1:
                raise Stop(
                    f"{self.root}: one film name, several files ({several[0]}, {several[1]}): point --data at one copy, or write the path in the list"
                )
        return [self.root / f[0] for f in found]

    def lists(self, *patterns, need=("train", "test")):
        """Split lists like 'Xray14_{}_official.txt' → {split: [(name, numbers)]}, {} unless the needed ones are there."""
        parts = {}
        for split, words in zip(SPLITS, (["train"], ["val", "valid"], ["test"])):
            for path in self.files(*(p.format(w) for p in patterns for w in words))[:1]:
                parts[split] = read_list(path)
        return parts if set(need) <= set(parts) else {}


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
        raise Stop(f"{path}: not a split list of lines 'name 0 1 ...'") from None


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
        raise Stop(
            f"{path}: cannot be read as a table ({error}); save it as CSV, UTF-8, with commas"
        ) from None
    absent = [c for c in columns if c not in header]
    if absent:
        raise Stop(f"{path}: no column {', '.join(absent)}; its columns are {', '.join(header)}")
    return table


def number(text):
    """Cell of a label column → float, blank and text → 0."""
    try:
        value = float(text or 0)
    except ValueError:
        return 0.0
    return value if value == value else 0.0  # 'nan'


# ---------------------------------------------------------------- masks


def film_size(path):
    """(height, width) in pixels from the header alone; Stop when there is none."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except OSError:
        pass
    try:
        import pydicom

        header = pydicom.dcmread(path, stop_before_pixels=True, force=True)
        return int(header.Rows), int(header.Columns)
    except ImportError:
        raise Stop('DICOM needs a reader: pip install "pydicom>=3"') from None
    except Exception as error:  # a broken file may raise anything
        raise Stop(f"{path}: no image size in its header ({error})") from None


def choose_canvas(index, name, too_small):
    """→ (canvas, notes): None, the film's own size, unless the annotations do not fit into it: then a shrunk copy of the 1024 × 1024 originals.
    too_small(height, width) says whether any annotation reaches beyond; `name` is any film of the set."""
    height, width = film_size(index.find([name], what="the annotations")[0])
    if not too_small(height, width):
        return None, []
    if too_small(1024, 1024):
        raise Stop(
            f"{index.root}: annotations reach outside 1024 x 1024 pixels: not the distributed CSV"
        )
    return (1024, 1024), [
        f"masks: the films are {width} x {height}, the annotations were drawn on 1024 x 1024 and are scaled"
    ]


def decode_rle(text, height, width):
    """SIIM's run lengths → bool (height, width): (gap since the last run's end, length) pairs over columns, top to bottom."""
    flat, at = np.zeros(height * width, bool), 0
    numbers = [int(x) for x in text.split()]
    for gap, length in zip(numbers[::2], numbers[1::2]):
        flat[at + gap : at + gap + length] = True
        at += gap + length
    if at > height * width:
        raise Stop(f"run lengths reach pixel {at}, the film has {height * width}")
    return flat.reshape(width, height).T


def encode_rle(mask):
    """bool (H, W) → SIIM's run lengths, '-1' when empty; the inverse of decode_rle."""
    edges = np.flatnonzero(np.diff(np.r_[0, np.asarray(mask, np.int8).T.ravel(), 0]))
    gaps, lengths = edges[::2] - np.r_[0, edges[1:-1:2]], edges[1::2] - edges[::2]
    return " ".join(f"{g} {n}" for g, n in zip(gaps, lengths)) or "-1"


def read_mask(case):
    """The mask of a Case → bool (H, W) on its own canvas, to be resized together with the film. Grey masks count from half their maximum."""
    kind, what, *canvas = case.mask
    if kind == "file":
        gray = np.asarray(Image.open(what).convert("L"))
        return gray > gray.max() / 2
    height, width = canvas[0] or film_size(case.path)
    mask = np.zeros((height, width), bool)
    for item in what:
        if kind == "rle":
            mask |= decode_rle(item, height, width)
        else:
            x, y, w, h = item
            mask[int(y) : int(y + h), int(x) : int(x + w)] = True
    return mask
