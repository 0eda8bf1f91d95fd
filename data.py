"""Images in: any folder of films → two views of one film, the same whatever the number of workers and ranks.

    python data.py check --data DIR                            # what is there, what was recognised, which films are bad and why
    python data.py pack  --data DIR --out cxr.pack --side 320  # decode once; training then maps the file into memory
"""
import os
from pathlib import Path

import numpy as np
import torch

from augment import crop, sample_boxes
from films import BadFilm, fit, read_film, sniff
from runtime import Stop

FILM_SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".tif", ".tiff", ".gif", ".bmp", ".jp2", ".dcm", ".dicom", ".dic"}
VIEWS, BATCHES = 1, 2                           # first word of each random key: NumPy pads keys with zeros, so (s, e) alone would equal (s, e, 0)


class Films:
    """films[i] → uint8 (H, W), short side at most `side` (0 = as stored); raises BadFilm. `names` are paths below the root, `patients` who."""

    def __init__(self, root, names, patients, side, summary):
        self.root, self.names, self.patients, self.side, self.summary = Path(root), names, patients, side, summary

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        film = read_film(self.root / self.names[i], self.side)
        return fit(film, self.side) if 0 < self.side < min(film.shape) else film


def walk(root):
    """Every file and folder below `root`, hidden ones left out → (sorted file paths relative to it, {folder: mtime in ns})."""
    files, folders, todo, seen = [], {}, [""], set()
    while todo:
        folder = todo.pop()
        try:
            stat = os.stat(os.path.join(root, folder))
            if (stat.st_dev, stat.st_ino) in seen:                 # a link back up
                continue
            with os.scandir(os.path.join(root, folder)) as entries:
                below = [(e.name, e.is_dir()) for e in entries if not e.name.startswith(".")]
        except PermissionError:                                    # lost+found of a mounted disk
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders[folder] = stat.st_mtime_ns
        for name, is_folder in below:
            (todo if is_folder else files).append(f"{folder}/{name}" if folder else name)
    return sorted(files), folders


def looks_like_film(root, name):
    """By suffix; a file without one, or with a number for one as DICOM UIDs have, by its first bytes."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix[1:] and not suffix[1:].isdigit():
        return suffix in FILM_SUFFIXES
    if os.path.basename(name) == "DICOMDIR":
        return False
    try:
        with open(os.path.join(root, name), "rb") as file:
            return bool(sniff(file.read(132)))
    except OSError:
        return False


def open_films(root, cache_dir=None, side=320, patients=None):
    """All films below the folder `root` → Films. Raises Stop when there is nothing."""
    root = Path(root).expanduser()
    if not root.is_dir():
        raise Stop(f"--data {root}: no such folder")
    files, _ = walk(root)
    names = [name for name in files if looks_like_film(root, name)]
    if not names:
        raise Stop(f"--data {root}: no films in it ({len(files)} other files)")
    return Films(root, names, names, side, [f"{root}: {len(names)} films"])


class Views(torch.utils.data.Dataset):
    """Item (epoch, i) → two crops of film i and where they lie: views uint8 (2, size, size), boxes float32 (2, 4) px, flips bool (2,).

    A film that cannot be read gives way to the next that can; `bad` is then its number in `films`, else -1. Depends on (seed, epoch, i) only.
    """

    def __init__(self, films, size, seed, subset=None):
        self.films, self.size, self.seed = films, size, seed
        self.subset = np.arange(len(films)) if subset is None else np.asarray(subset)

    def __len__(self):
        return len(self.subset)

    def __getitem__(self, key):
        epoch, i = key
        film, bad = self.read(i)
        boxes, flips = sample_boxes(np.random.default_rng((VIEWS, self.seed, epoch, i)), *film.shape)
        views = np.stack([crop(film, box, self.size, flip) for box, flip in zip(boxes, flips)])
        return {"views": views, "boxes": boxes.astype(np.float32), "flips": flips, "bad": bad}

    def read(self, i, tries=100):
        """Film i, or the next readable one → (film, -1 or the number of the bad one)."""
        first = int(self.subset[i])
        for k in range(min(tries, len(self))):
            try:
                return self.films[int(self.subset[(i + k) % len(self)])], first if k else -1
            except BadFilm as error:
                reason = error
        raise Stop(f"{tries} films in a row cannot be read, from {self.films.names[first]} on ({reason}): run python data.py check")


class Batches:
    """Batch sampler: yields the list of (epoch, i) of every micro-batch of this rank, from `start_step` up to `steps`.

    Step s is a slice of `batch` places of the epochs' permutations of n, each cut to whole batches; a rank owns a contiguous share of
    it and takes that in micro-batches. So rank, world, micro and resuming never change which film lies at which place of which step.
    """

    def __init__(self, n, batch, micro, rank, world, seed, start_step=0, steps=None):
        if n < batch:
            raise Stop(f"{n} films are fewer than one batch of {batch}: lower --batch or add films")
        if batch % (micro * world):
            raise Stop(f"batch {batch} is not a multiple of micro-batch {micro} × {world} processes: change --batch")
        self.n, self.batch, self.micro, self.rank, self.world, self.seed = n, batch, micro, rank, world, seed
        self.start_step, self.steps, self.steps_per_epoch = start_step, steps, n // batch

    def __len__(self):
        return max(0, self.steps - self.start_step) * (self.batch // self.world // self.micro)

    def __iter__(self):
        share, drawn = self.batch // self.world, None
        for step in range(self.start_step, self.steps):
            epoch, place = divmod(step, self.steps_per_epoch)
            if epoch != drawn:
                order, drawn = np.random.default_rng((BATCHES, self.seed, epoch)).permutation(self.n), epoch
            first = place * self.batch + self.rank * share
            for start in range(first, first + share, self.micro):
                yield [(epoch, int(i)) for i in order[start:start + self.micro]]
