"""Images in: any folder of films → two views of one film, the same whatever the number of workers and ranks.

    python data.py check --data DIR                            # what is there, what was recognised, which films are bad and why
    python data.py pack  --data DIR --out cxr.pack --side 320  # decode once; training then maps the file into memory

MIMIC-CXR-JPG, CheXpert and ChestX-ray14 are recognised by their lists, wherever these lie below DIR; of them only frontal training
films are taken. Everything else below DIR that looks like a film is taken too, and so is what packed files (*.pack) hold.
"""

import itertools
import os
import sys
import time
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import augment
from plumbing.film import UnreadableFilm, fit, read_film, read_mask
from plumbing.folder import cached_index, make_index
from plumbing.keys import ORDER, TRAIN_VIEW, VIEWS
from plumbing.launch import UserError, flag, parse, run_script
from plumbing.pack import Pack, attempts, pack_films
from plumbing.table import match, read_table


class Films:
    """films[i] → uint8 (H, W), short side at most `side` (0 = as stored); raises UnreadableFilm. Packed films are views of the mapped file.

    names: paths below the root; patients: who; summary: lines that say what was recognised.
    """

    def __init__(self, root, names, patients, packs, side, summary):
        self.root, self.files, self.packs, self.side, self.summary = (
            str(root),
            len(names),
            packs,
            side,
            summary,
        )
        self.names = list(itertools.chain(names, *(p.names for p in packs)))
        self.patients = list(itertools.chain(patients, *(p.patients for p in packs)))
        self.starts = list(itertools.accumulate((len(p) for p in packs), initial=self.files))

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        if i >= self.files:
            k = bisect_right(self.starts, i) - 1
            return self.packs[k][i - self.starts[k]]
        film = read_film(f"{self.root}/{self.names[i]}", self.side)
        return fit(film, self.side) if 0 < self.side < min(film.shape) else film

    def verified(self, i):
        """films[i]; a packed one is compared with its checksum first."""
        k = bisect_right(self.starts, i) - 1
        return self[i] if i < self.files else self.packs[k].verified(i - self.starts[k])


def open_films(root, cache_dir=None, side=320, patients=None, mimic_all=False):
    """All films below the folder `root`, or in the packed file `root` → Films. Raises Stop when there is nothing.

    cache_dir: where the index is kept. patients: CSV (filename, patient_id) for films of other folders, whose patient is else their name.
    mimic_all: MIMIC's own validation and test films, too.
    """
    root = Path(root).expanduser()
    if root.is_file() and root.suffix == ".pack":
        pack = Pack(root)
        return Films(root.parent, [], [], [pack], side, [pack.told])
    if not root.is_dir():
        raise UserError(f"--data {root}: no such folder or packed file")
    index = (
        cached_index(root, Path(cache_dir) / "films.json", mimic_all)
        if cache_dir
        else make_index(root, mimic_all)
    )
    known = index["patients"]
    if patients:
        rows = read_table(patients, "filename", "patient_id")
        table = {row["filename"]: row["patient_id"] for row in rows if row["patient_id"]}
        known = [table.get(row, old) for row, old in zip(match(index["names"], table), known)]
    return Films(
        root,
        index["names"],
        known,
        [Pack(root / name) for name in index["packs"]],
        side,
        index["summary"],
    )


class Views(torch.utils.data.Dataset):
    """Item (epoch, i) → two crops of film i and where they lie: views uint8 (2, size, size), boxes float32 (2, 4) px, flips bool (2,).

    A film that cannot be read gives way to the next that can; `bad` is then its number in `films`, else -1. Keyed by (seed, epoch, i).
    """

    def __init__(self, films, size, seed, subset=None):
        self.films, self.size, self.seed = films, size, seed
        self.subset = np.arange(len(films)) if subset is None else np.asarray(subset)

    def __len__(self):
        return len(self.subset)

    def __getitem__(self, key):
        epoch, i = key
        film, bad = self.read(i)
        boxes, flips = augment.sample_boxes(
            np.random.default_rng((VIEWS, self.seed, epoch, i)), *film.shape
        )
        views = np.stack(
            [augment.crop(film, box, self.size, flip) for box, flip in zip(boxes, flips)]
        )
        return {"views": views, "boxes": boxes.astype(np.float32), "flips": flips, "bad": bad}

    def read(self, i, tries=100):
        """Film i, or the next readable one → (film, -1 or the number of the bad one)."""
        first = int(self.subset[i])
        for k in range(min(tries, len(self))):
            try:
                return self.films[int(self.subset[(i + k) % len(self)])], first if k else -1
            except UnreadableFilm as error:
                reason = error
        where = f"{min(tries, len(self))} films in a row cannot be read, from {self.films.names[first]} on ({reason})"
        raise UserError(f"{where}: python data.py check --data … names them all")


class Batches:
    """Batch sampler: yields the list of (epoch, i) of every micro-batch of this rank, from `start_step` until `steps` (default: one epoch).

    Step s is a slice of `batch` places of the epochs' permutations of n, each cut to whole batches; a rank owns a contiguous share of
    it and takes that in micro-batches. So rank, world, micro and resuming never change which film lies at which place of which step.
    """

    def __init__(self, n, batch, micro, rank, world, seed, start_step=0, steps=None):
        if n < batch:
            raise UserError(
                f"{n} films are fewer than one batch of {batch}: lower --batch or add films"
            )
        if batch % (micro * world):
            raise UserError(
                f"batch {batch} is not a multiple of micro-batch {micro} × {world} processes: change --batch"
            )
        self.n, self.batch, self.micro, self.rank, self.world, self.seed = (
            n,
            batch,
            micro,
            rank,
            world,
            seed,
        )
        self.start_step, self.steps, self.steps_per_epoch = (
            start_step,
            n // batch if steps is None else steps,
            n // batch,
        )

    def __len__(self):
        return max(0, self.steps - self.start_step) * (self.batch // self.world // self.micro)

    def __iter__(self):
        share, drawn = self.batch // self.world, None
        for step in range(self.start_step, self.steps):
            epoch, place = divmod(step, self.steps_per_epoch)
            if epoch != drawn:
                order, drawn = (
                    np.random.default_rng((ORDER, self.seed, epoch)).permutation(self.n),
                    epoch,
                )
            first = place * self.batch + self.rank * share
            for start in range(first, first + share, self.micro):
                yield [(epoch, int(i)) for i in order[start : start + self.micro]]


# ------------------------------------------------------------------------------------------------ commands
@dataclass
class Config:
    data: str | None = flag(
        None, "folder of films, any mix of sets and sub-folders, or a packed file"
    )
    out: str = flag("cxr.pack", "pack: the file to write")
    side: int = flag(320, "pack: short side in px; larger films are shrunk, 0 keeps them")
    workers: int = flag(len(os.sched_getaffinity(0)), "reading processes")
    patients: str | None = flag(None, "CSV with columns filename,patient_id for films of your own")
    mimic_all: bool = flag(False, "take MIMIC's validation and test films, too")


def check(films, workers):
    """Read every film; name the bad ones with their reasons."""
    began, bad = time.time(), 0
    for i, (film, reason) in enumerate(attempts(films, 0, workers, "check")):
        if film is None:
            tqdm.write(f"bad: {films.names[i]}: {reason}")
            bad += 1
    print(
        f"{len(films) - bad:,} of {len(films):,} films can be read, {bad:,} bad ({bad / len(films):.2%}); "
        f"{len(films) / (time.time() - began):.0f} films/s with {workers} workers"
    )
    if bad > 0.01 * len(films):
        print(
            "more than 1 % bad: pretrain.py would stop; move the files named above away, or mend them"
        )


def pack(films, out, workers):
    """Pack the films, unless that is done; say how fast, how big, and which were left out."""
    began = time.time()
    done = Path(out).exists()
    packed = Pack(out) if done else pack_films(films, out, workers)
    for name, reason in packed.bad:
        print(f"bad, left out: {name}: {reason}")
    rate = (
        "already there"
        if done
        else f"{len(films) / (time.time() - began):.0f} films/s with {workers} workers"
    )
    print(
        f"{out}: {len(packed):,} films, short side {packed.side}, {Path(out).stat().st_size:,} bytes, checksums verified; {rate}"
    )


def command():
    """check or pack, as the first word of the command line says."""
    word, argv = (sys.argv[1:2] or ["?"])[0], sys.argv[2:]
    config = parse(
        Config, __doc__, ["--help"] if word in ("-h", "--help") else argv, prog=f"data.py {word}"
    )
    if word not in ("check", "pack") or not config.data:
        raise UserError(
            "say what to do with which films: python data.py check --data DIR, or python data.py pack --data DIR --out cxr.pack"
        )
    films = open_films(
        config.data, side=config.side, patients=config.patients, mimic_all=config.mimic_all
    )
    print("\n".join(films.summary))
    check(films, config.workers) if word == "check" else pack(films, config.out, config.workers)


# ------------------------------------------------------------------------------------------------ sets of films
class InMemory:
    """A small set, each film decoded once and then kept. Same names, patients and errors as the set behind it."""

    def __init__(self, films):
        self.films, self.kept, self.names, self.patients = films, {}, films.names, films.patients

    def __len__(self):
        return len(self.films)

    def __getitem__(self, i):
        if i not in self.kept:
            try:
                self.kept[i] = self.films[i]
            except UnreadableFilm as error:
                self.kept[i] = error
        if isinstance(self.kept[i], UnreadableFilm):
            raise self.kept[i]
        return self.kept[i]


class UnreadableFilms_:
    """Names and counts what the loader replaced; more than 1 % of the films bad stops the run."""

    def __init__(self, films):
        self.films, self.seen = films, set()

    def note(self, numbers):
        """numbers (b,): -1 or the number of a film that could not be read."""
        for i in set(numbers[numbers >= 0].tolist()) - self.seen:
            self.seen.add(i)
            print(f"bad film, skipped ({len(self.seen)} so far): {self.films.names[i]}", flush=True)
        if len(self.seen) > 0.01 * len(self.films):
            names = ", ".join(self.films.names[i] for i in sorted(self.seen)[:5])
            raise UserError(
                f"{len(self.seen)} of {len(self.films)} films cannot be read, more than 1 %: {names} … run python data.py check --data … for all, with reasons"
            )


def mask_to(mask, size):
    """bool (H, W) → bool (size, size), nearest pixel: the whole film squeezed to a square, as the film itself (DATASETS.md section 9)."""
    return np.asarray(
        Image.fromarray(np.asarray(mask, np.uint8)).resize((size, size), Image.Resampling.NEAREST),
        bool,
    )


def train_crop(film, rng, size):
    """Random resized crop, area fraction 0.4 to 1, and flip. uint8 (H, W) → (size, size)"""
    boxes, flips = augment.sample_boxes(rng, *film.shape, scale=(0.4, 1.0))
    return augment.crop(film, boxes[0], size, flips[0])


def test_views(film, size, ten=False):
    """Short side 256 (for size 224), centre crop; ten: also the four corners, and all five flipped. uint8 (H, W) → (1 or 10, size, size)"""
    film = fit(film, round(size * 256 / 224))
    down, right = film.shape[0] - size, film.shape[1] - size
    corners = [(down // 2, right // 2)] + (
        [(0, 0), (0, right), (down, 0), (down, right)] if ten else []
    )
    views = [film[y : y + size, x : x + size] for y, x in corners]
    return np.stack(views + [v[:, ::-1] for v in views] if ten else views)


def shift_scale_flip(film, mask, rng):
    """Shift by up to a sixteenth, scale by up to a tenth (p = 0.5), flip (p = 0.5): film and mask together, both (size, size); black comes in."""
    size, u = len(film), rng.random(5)
    if u[0] < 0.5:
        zoom, shift = 1 + 0.2 * (u[1] - 0.5), (u[2:4] - 0.5) * size / 8
        start = (
            size / 2 - size / (2 * zoom) - shift
        )  # output pixel p shows input pixel p / zoom + start
        matrix = (1 / zoom, 0, start[1], 0, 1 / zoom, start[0])
        film = np.asarray(
            Image.fromarray(film).transform(
                (size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC
            )
        )
        mask = np.asarray(
            Image.fromarray(mask.astype(np.uint8)).transform(
                (size, size), Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST
            ),
            bool,
        )
    return (film[:, ::-1], mask[:, ::-1]) if u[4] < 0.5 else (film, mask)


class TaskFilms:
    """films[i] → (film uint8, mask bool (size, size) or None) of case i; raises UnreadableFilm. Films come at a short side of at most twice `size`
    (the authors' 512 for 224). kept: a dict that holds decoded films by path, filled now by threads; None = decode at every use."""

    def __init__(self, cases, size, kept=None):
        self.cases, self.size, self.kept = cases, size, kept
        new = [] if kept is None else [i for i, c in enumerate(cases) if c.path not in kept]
        with ThreadPoolExecutor() as pool:
            read = tqdm(
                pool.map(self._attempt, new),
                "decode",
                len(new),
                unit=" films",
                leave=False,
                disable=None if new else True,
            )
            for i, item in zip(new, read):
                kept[cases[i].path] = item

    def __len__(self):
        return len(self.cases)

    def _attempt(self, i):
        case = self.cases[i]
        try:
            film = read_film(case.path, 2 * self.size)
            mask = None if case.mask is None else mask_to(read_mask(case), self.size)
            return (fit(film, 2 * self.size) if min(film.shape) > 2 * self.size else film), mask
        except UnreadableFilm as error:
            return error
        except (OSError, SyntaxError, UserError) as error:  # of the mask
            return UnreadableFilm(f"its mask: {error}")

    def __getitem__(self, i):
        item = self._attempt(i) if self.kept is None else self.kept[self.cases[i].path]
        if isinstance(item, UnreadableFilm):
            raise item
        return item


class TrainExamples(torch.utils.data.Dataset):
    """Item (epoch, i) → view uint8 (size, size), goal: target float (c,) or mask (size, size); bad: i when film i gave way to the next readable
    one, else -1."""

    def __init__(self, films, seed):
        self.films, self.seed = films, seed

    def __getitem__(self, at):
        epoch, i = at
        for k in range(len(self.films)):
            j = (i + k) % len(self.films)
            try:
                film, mask = self.films[j]
                break
            except UnreadableFilm as error:
                reason = error
        else:
            raise UserError(f"no training film can be read, the last one because: {reason}")
        rng, size = np.random.default_rng((TRAIN_VIEW, self.seed, epoch, i)), self.films.size
        if mask is None:
            view, goal = train_crop(film, rng, size), np.float32(self.films.cases[j].target)
        else:
            view, goal = shift_scale_flip(augment.crop(film, (0, 0, *film.shape), size), mask, rng)
        return {"view": np.array(view), "goal": np.asarray(goal, np.float32), "bad": i if k else -1}


class TestExamples(torch.utils.data.Dataset):
    """Item i → views uint8 (1 or 10, size, size), target or mask, good = False (and zeros) when the film cannot be read."""

    def __init__(self, films, ten=False):
        self.films, self.ten = films, ten

    def __len__(self):
        return len(self.films)

    def __getitem__(self, i):
        size, case = self.films.size, self.films.cases[i]
        try:
            film, mask = self.films[i]
            views = (
                test_views(film, size, self.ten)
                if mask is None
                else augment.crop(film, (0, 0, *film.shape), size)[None]
            )
        except UnreadableFilm:
            goal = case.target if case.mask is None else np.zeros((size, size))
            return {
                "views": np.zeros(
                    (10 if self.ten and case.mask is None else 1, size, size), np.uint8
                ),
                "goal": np.float32(goal),
                "index": i,
                "good": False,
            }
        return {
            "views": np.array(views),
            "goal": np.float32(case.target if mask is None else mask),
            "index": i,
            "good": True,
        }


class UnreadableFilms:
    """Names and counts the films that cannot be read; more than one film and 1 % of them stop the run."""

    def __init__(self, total):
        self.total, self.names = total, {}

    def note(self, films, indices):
        """films: a Films; indices: of cases in it that were found bad."""
        for i in indices:
            path = str(films.cases[i].path)
            if path not in self.names:
                try:
                    films[i]
                    self.names[path] = "unreadable once"
                except UnreadableFilm as error:
                    self.names[path] = str(error)
                tqdm.write(f"bad film, skipped: {path}: {self.names[path]}")
        if len(self.names) > max(1, 0.01 * self.total):
            first = ", ".join(list(self.names)[:3])
            raise UserError(
                f"{len(self.names)} of {self.total} films cannot be read, more than 1 %: {first}; mend them or take them out of the list"
            )


if __name__ == "__main__":
    run_script(command)
