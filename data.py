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

    A film that cannot be read gives way to the next that can; `unreadable` and `reason` then tell of it. Keyed by (seed, epoch, i).
    """

    def __init__(self, films, size, seed, subset=None):
        self.films, self.size, self.seed = films, size, seed
        self.subset = np.arange(len(films)) if subset is None else np.asarray(subset)

    def __len__(self):
        return len(self.subset)

    def __getitem__(self, key):
        epoch, i = key
        film, replaced = self.read(i)
        rng = np.random.default_rng((VIEWS, self.seed, epoch, i))
        boxes, flips = augment.sample_boxes(rng, *film.shape)
        crops = [
            augment.crop(film, box, self.size, flip) for box, flip in zip(boxes, flips, strict=True)
        ]
        views = np.stack(crops)
        return {"views": views, "boxes": boxes.astype(np.float32), "flips": flips, **replaced}

    def read(self, i):
        """Film i, or the next readable one → (film, what read_or_next says of film i)."""
        _, film, replaced = read_or_next(self.films, self.subset, i)
        return film, replaced


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


# ------------------------------------------------------------------------------------------------ films that are kept, and films that cannot be read
class InMemory:
    """A small set of films: each is decoded once and then kept. It looks like the set behind it, names, patients and errors included."""

    def __init__(self, films):
        vars(self).update(vars(films))  # names, patients, …
        self.films = films
        self.decoded = {}  # {i: film, or the error that it raised}

    def __len__(self):
        return len(self.films)

    def __getitem__(self, i):
        if i not in self.decoded:
            self.decoded[i] = self.attempt(i)
        if isinstance(self.decoded[i], UnreadableFilm):
            raise self.decoded[i]
        return self.decoded[i]

    def attempt(self, i):
        """Film i, or the error that it raises."""
        try:
            return self.films[i]
        except UnreadableFilm as error:
            return error

    def decode_all(self):
        """Decode every film now, with threads and a progress bar."""
        numbers = range(len(self))
        with ThreadPoolExecutor() as pool:
            decoded = pool.map(self.attempt, numbers)
            bar = tqdm(decoded, "decode", len(self), unit=" films", leave=False, disable=None)
            self.decoded = dict(zip(numbers, bar, strict=True))


class UnreadableFilms:
    """Names each film that cannot be read, once and with the reason; more than one film and 1 % of all stop the run.

    reasons: {name: why it cannot be read}
    """

    def __init__(self, total):
        self.total = total
        self.reasons = {}

    def note(self, name, reason):
        """Note one film."""
        if name in self.reasons:
            return
        self.reasons[name] = reason
        tqdm.write(f"bad film, skipped ({len(self.reasons)} so far): {name}: {reason}")
        if len(self.reasons) > max(1, 0.01 * self.total):
            first = ", ".join(list(self.reasons)[:3])
            raise UserError(
                f"{len(self.reasons)} of {self.total} films cannot be read, more than 1 %: {first} …: "
                "python data.py check --data … names them all; mend them or take them away"
            )

    def note_batch(self, batch):
        """Note the films of a loaded batch that another one stands in for."""
        for name, reason in zip(batch["unreadable"], batch["reason"], strict=True):
            if name:
                self.note(name, reason)


def read_or_next(films, numbers, at, tries=100):
    """Film numbers[at], or, when it cannot be read, the next that can. → (its number, the film, {"unreadable": name, "reason": why})

    The names of the dict are those of numbers[at], and empty when that was readable. UserError when `tries` in a row are unreadable.
    """
    first_reason = ""
    tries = min(tries, len(numbers))
    for k in range(tries):
        number = int(numbers[(at + k) % len(numbers)])
        try:
            film = films[number]
        except UnreadableFilm as error:
            first_reason = first_reason or str(error)
            continue
        name = films.names[numbers[at]] if first_reason else ""
        return number, film, {"unreadable": name, "reason": first_reason}
    first = films.names[numbers[at]]
    raise UserError(
        f"{tries} films in a row cannot be read, from {first} on ({first_reason}): python data.py check --data … names them all"
    )


# ------------------------------------------------------------------------------------------------ examples of a downstream task
class TaskFilms:
    """films[i] → (film uint8 (H, W), mask bool (size, size) or None) of example i; raises UnreadableFilm.

    Films come at a short side of at most twice `size`, as the authors' 512 px for 224.
    """

    def __init__(self, examples, size):
        self.examples = examples
        self.size = size
        self.names = [str(example.path) for example in examples]

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, i):
        example = self.examples[i]
        film = read_film(example.path, 2 * self.size)
        if min(film.shape) > 2 * self.size:
            film = fit(film, 2 * self.size)
        if example.mask is None:
            return film, None
        try:
            mask = read_mask(example.mask, example.path)
        except (OSError, SyntaxError, UserError) as error:
            raise UnreadableFilm(f"its mask: {error}") from None
        return film, augment.mask_to(mask, self.size)


def open_examples(examples, size, in_memory):
    """The films of these examples, all decoded now and kept when `in_memory`, else decoded at every use."""
    films = TaskFilms(examples, size)
    if in_memory:
        films = InMemory(films)
        films.decode_all()
    return films


class TrainExamples(torch.utils.data.Dataset):
    """Item (epoch, i) → view uint8 (size, size) and goal, the target float (c,) or the mask float (size, size), both cut at random.

    A film that cannot be read gives way to the next that can; `unreadable` and `reason` then tell of it. Keyed by (seed, epoch, i).
    """

    def __init__(self, films, seed):
        self.films = films
        self.seed = seed

    def __getitem__(self, key):
        epoch, i = key
        size = self.films.size
        number, (film, mask), replaced = read_or_next(self.films, range(len(self.films)), i)
        rng = np.random.default_rng((TRAIN_VIEW, self.seed, epoch, i))
        if mask is None:
            view = augment.train_crop(film, rng, size)
            goal = self.films.examples[number].target
        else:
            view, goal = augment.shift_scale_flip(augment.whole_crop(film, size), mask, rng)
        return {"view": np.array(view), "goal": np.asarray(goal, np.float32), **replaced}


def test_views(film, size, ten=False):
    """The crops that a film is tested on: short side 256 (for size 224), then its centre crop, or ten. → uint8 (1 or 10, size, size)"""
    return augment.centre_crops(fit(film, round(size * 256 / 224)), size, ten)


class TestExamples(torch.utils.data.Dataset):
    """Item i → views uint8 (1 or 10, size, size), goal (target or mask, float) and index i.

    A film that cannot be read gives zeros, and its name and why under `unreadable` and `reason`, which else are empty.
    """

    def __init__(self, films, ten=False):
        self.films = films
        self.ten = ten

    def __len__(self):
        return len(self.films)

    def __getitem__(self, i):
        size = self.films.size
        example = self.films.examples[i]
        item = {"index": i, "unreadable": "", "reason": ""}
        try:
            film, mask = self.films[i]
        except UnreadableFilm as error:
            film = np.zeros((size, size), np.uint8)
            mask = None if example.mask is None else np.zeros((size, size), bool)
            item.update(unreadable=self.films.names[i], reason=str(error))
        if mask is None:
            views = test_views(film, size, self.ten)
            goal = example.target
        else:
            views = augment.whole_crop(film, size)[None]
            goal = mask
        return {"views": np.array(views), "goal": np.float32(goal), **item}


if __name__ == "__main__":
    run_script(command)
