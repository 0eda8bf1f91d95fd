"""From files to batches. (Sec. A.1)

The films of any folder, two crops of a film for pre-training, and the examples of a downstream
task. What is drawn never depends on the number of workers or processes.

    python data.py check --data DIR                  # what is there; what cannot be read, and why
    python data.py pack --data DIR --out cxr.pack    # decode once; training then maps the file

MIMIC-CXR-JPG, CheXpert and ChestX-ray14 are recognised by the tables that come with them (*.csv,
train_val_list.txt), which may lie anywhere below DIR. Of these sets only frontal training films are
taken. Everything else below DIR that looks like a film is taken, and so are films in *.pack files.

`films` below is always a `Films` (plumbing/pack.py): films[i] is film i, decoded, uint8 (H, W);
films.names and films.patients have one entry per film, films.summary are lines to print.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import augment
from plumbing.film import UnreadableFilm, fit, read_mask, read_shrunk
from plumbing.folder import Index, choose_films
from plumbing.keys import ORDER, TRAIN_VIEW, VIEWS, numpy_rng
from plumbing.launch import Loader, UserError, count_cpus, flag, parse, run_script
from plumbing.own_table import read_patient_table
from plumbing.pack import Films, InMemory, Pack, check_and_report, pack_and_report, path_of_pack


# ---------------------------------------------------------------- films
def open_films(root, out=None, side=320, patients=None, mimic_all=False, without=None) -> Films:
    """All films below the folder `root`, or in the packed file `root` → Films.

    out: the run's folder, which must not lie below `root`.
    side: the short side to which larger films are shrunk, px.
    patients: CSV (filename, patient_id); without it each film of your own counts as a patient.
    mimic_all: take MIMIC's validation and test films, too.
    without: a packed file to pass over, because it will be written anew. No film: UserError.
    """
    root = Path(root).expanduser()
    with_suffix = Path(f"{root}.pack")
    if not root.exists() and with_suffix.is_file():  # `data.py pack --out cxr` writes cxr.pack
        root = with_suffix
    if root.is_file():
        pack = Pack(root)
        films = Films(root.parent, patient_of={}, packs=[pack], side=side, summary=[pack.summary])
        return set_patients(films, patients)
    if not root.is_dir():
        raise UserError(f"--data {root}: no such folder or packed file")
    refuse_own_pictures(root, out)
    index = Index(root)
    names = [name for name in index.names if name.endswith(".pack")]
    if without:
        names = [name for name in names if (root / name).resolve() != Path(without).resolve()]
    packs = {name: Pack(root / name) for name in names}
    patient_of, links, summary = choose_films(index, packs, mimic_all)
    if not patient_of and not packs:
        found = "; ".join(summary) or "none looks like a film"
        raise UserError(
            f"--data {root}: no films to train on below it ({len(index.names):,} files; {found})"
        )
    summary += index.notes + [pack.summary for pack in packs.values()]
    films = Films(root, patient_of, list(packs.values()), side, summary, links)
    return set_patients(films, patients)


def set_patients(films: Films, table) -> Films:
    """Set films.patients from a CSV (filename, patient_id), if there is one. → the same films"""
    if table:
        patient_of, note = read_patient_table(table, films.names)
        named = zip(films.names, films.patients, strict=True)
        films.patients = [patient_of.get(name, old) for name, old in named]
        films.summary.append(note)
    return films


def refuse_own_pictures(root: Path, out):
    """UserError if the run's folder `out` lies in `root`: its pictures would be read as films."""
    if out and Path(out).resolve().is_relative_to(root.resolve()):
        raise UserError(
            f"--out {out} lies in --data {root}, where its pictures would count as films: "
            "choose another --out"
        )


def read_or_next(films, indices, place: int, tries: int = 100):
    """Read the film indices[place] or, if it cannot be read, the next of `indices` that can.

    → (index, film, report). report is {"unreadable": name, "reason": why}, both of indices[place]
    if it could not be read, else both "". UserError when `tries` films in a row cannot be read.
    """
    first_name = films.names[indices[place]]
    first_reason = ""
    tries = min(tries, len(indices))
    for k in range(tries):
        index = int(indices[(place + k) % len(indices)])
        try:
            film = films[index]
        except UnreadableFilm as error:
            first_reason = first_reason or str(error)
            continue
        return index, film, {"unreadable": first_name if k else "", "reason": first_reason}
    raise UserError(
        f"{tries} films in a row cannot be read, from {first_name} on ({first_reason}): "
        "python data.py check --data … names them all"
    )


# ---------------------------------------------------------------- pre-training
class Views(torch.utils.data.Dataset):
    """Item (epoch, i) → two crops of film i and where they lie.

    The crops are drawn by random numbers that depend on (seed, epoch, i) only. views uint8
    (2, size, size), boxes float32 (2, 4) px, flips bool (2,) and the report of read_or_next.
    subset: indices of the films to take; film i is then films[subset[i]].
    """

    def __init__(self, films, size, seed, subset=None):
        self.films = films
        self.size = size
        self.seed = seed
        self.subset = np.arange(len(films)) if subset is None else np.asarray(subset)

    def __len__(self):
        return len(self.subset)

    def __getitem__(self, key):
        epoch, i = key
        film, report = self.read(i)
        boxes, flips = augment.sample_boxes(numpy_rng(VIEWS, self.seed, epoch, i), *film.shape)
        views = np.stack([augment.crop(film, boxes[k], self.size, flips[k]) for k in (0, 1)])
        return {"views": views, "boxes": boxes.astype(np.float32), "flips": flips, **report}

    def read(self, i):
        """Read the film of item i, or the next that can be read. → (film, read_or_next's report)"""
        _, film, report = read_or_next(self.films, self.subset, i)
        return film, report


class Batches:
    """Batch sampler: the lists of (epoch, i) that one process loads, step after step.

    Every epoch shuffles the n films and drops the incomplete last batch. A step takes the next
    batch of that order. Process `rank` has an equal, contiguous share of the batch, and loads it in
    micro-batches of `micro` films, as many as fit into memory. So neither the number of processes,
    nor `micro`, nor a restart changes which films a step uses.
    Yields the micro-batches of steps `start_step` to `steps` - 1, or of one epoch if steps is None.
    """

    def __init__(self, n, batch, micro, rank, processes, seed, start_step=0, steps=None):
        if n < batch:
            raise UserError(
                f"{n} films are fewer than one batch of {batch}: lower --batch or add films"
            )
        if batch % (micro * processes):
            raise UserError(
                f"batch {batch} is not a multiple of micro-batch {micro} × {processes} processes: "
                "change --batch"
            )
        self.n = n
        self.batch = batch
        self.micro = micro
        self.rank = rank
        self.share = batch // processes  # films of this process
        self.seed = seed
        self.start_step = start_step
        self.steps_per_epoch = n // batch
        self.steps = self.steps_per_epoch if steps is None else steps

    def __len__(self):
        return max(0, self.steps - self.start_step) * (self.share // self.micro)

    def __iter__(self):
        shuffled_epoch = None  # `order` is the order of this epoch
        for step in range(self.start_step, self.steps):
            epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
            if epoch != shuffled_epoch:
                order = numpy_rng(ORDER, self.seed, epoch).permutation(self.n)
                shuffled_epoch = epoch
            first = step_of_epoch * self.batch + self.rank * self.share
            for start in range(first, first + self.share, self.micro):
                yield [(epoch, int(i)) for i in order[start : start + self.micro]]


def make_loader(dataset, args, team, workers, seed, start, end):
    """Load micro-batches of `dataset`, Views or TrainExamples, for one process of a launch.Team."""
    n = len(dataset)
    batches = Batches(n, args.batch, args.micro, team.rank, team.size, seed, start, steps=end)
    pin = team.device.type == "cuda"
    return Loader(dataset, batch_sampler=batches, num_workers=workers, pin_memory=pin)


# ---------------------------------------------------------------- examples of a downstream task
class TaskFilms:
    """films[i] → (film uint8 (H, W), mask bool (size, size) or None) of example i.

    examples: a list of plumbing.splits.Example; `mask` is None where nothing is to be segmented.
    Films come at a short side of at most 2 · size px. Raises UnreadableFilm when a film or its mask
    cannot be read.
    """

    def __init__(self, examples, size):
        self.examples = examples
        self.size = size
        self.names = [str(example.path) for example in examples]

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, i):
        example = self.examples[i]
        film = read_shrunk(example.path, 2 * self.size)
        if example.mask is None:
            return film, None
        mask = read_mask(example.mask, film.shape)
        return film, augment.squeeze_mask(mask, self.size)


def open_examples(examples, size: int, in_memory: bool):
    """Open the films of some examples: decode all now and keep them, or decode at every use.

    Decoding before the loader processes start lets these share the memory.
    """
    films = TaskFilms(examples, size)
    if in_memory:
        films = InMemory(films)
        films.decode_all()
    return films


class TrainExamples(torch.utils.data.Dataset):
    """Item (epoch, i) → a view of film i and what to predict of it.

    The view is drawn by random numbers that depend on (seed, epoch, i) only. view uint8
    (size, size); truth float32: the labels (c,), or the mask (size, size), moved as the film is.
    """

    def __init__(self, films, seed):
        self.films = films
        self.seed = seed

    def __len__(self):
        return len(self.films)

    def __getitem__(self, key):
        epoch, i = key
        size = self.films.size
        index, (film, mask), report = read_or_next(self.films, range(len(self.films)), i)
        rng = numpy_rng(TRAIN_VIEW, self.seed, epoch, i)
        if mask is None:
            view = augment.train_crop(film, rng, size)
            truth = self.films.examples[index].truth
        else:
            view, truth = augment.shift_scale_turn_flip(augment.whole_crop(film, size), mask, rng)
        # A copy of the view, for torch refuses the negative strides of a flipped one.
        return {"view": np.array(view), "truth": np.asarray(truth, np.float32), **report}


def eval_views(film, size: int, ten=False):
    """Cut out the centre crop that a film is judged by, or ten crops. → (1 or 10, size, size)"""
    resized = fit(film, round(size * 256 / 224))  # its short side: 256 px for a size of 224
    return augment.centre_crops(resized, size, ten)


class EvalExamples(torch.utils.data.Dataset):
    """Item i → what to predict of film i, and from which crops of it.

    views uint8 (1 or 10, size, size), truth as in TrainExamples, index i. A film that cannot be
    read gives black views, its name under `unreadable` and why under `reason` (both else "");
    finetune's `predict` then drops it.
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
            views = eval_views(film, size, self.ten)
            truth = example.truth
        else:
            views = augment.whole_crop(film, size)[None]
            truth = mask
        return {"views": np.array(views), "truth": np.float32(truth), **item}


# ---------------------------------------------------------------- python data.py check|pack
@dataclass
class Config:
    data: str = flag(None, "folder of films, any mix of sets and sub-folders, or a packed file")
    out: str = flag("cxr.pack", "pack: the file to write")
    side: int = flag(320, "pack: short side in px; larger films are shrunk, 0 keeps them")
    workers: int = flag(count_cpus(), "reading processes")
    patients: str = flag(None, "CSV with columns filename,patient_id for films of your own")
    mimic_all: bool = flag(False, "take MIMIC's validation and test films, too")


def main():
    """Check or pack the films, as the first word of the command line says."""
    word, *flags = sys.argv[1:] or [""]
    flags = [word] if word in ("-h", "--help") else flags
    args = parse(Config, __doc__, flags, prog="data.py check|pack")
    if word not in ("check", "pack") or not args.data:
        raise UserError(
            "say what to do with which films: python data.py check --data DIR, "
            "or python data.py pack --data DIR --out cxr.pack"
        )
    out = path_of_pack(args.out) if word == "pack" else None
    if 0 < args.side < 16:
        raise UserError(f"--side {args.side}: at least 16, or 0 to keep the films' own size")
    if out and Path(args.data).resolve() == out.resolve():
        raise UserError(f"--out {out} is --data itself: it is packed already")
    choice = dict(patients=args.patients, mimic_all=args.mimic_all, without=out)
    films = open_films(args.data, None, args.side, **choice)
    print("\n".join(films.summary))
    if word == "check":
        check_and_report(films, args.workers)
    else:
        pack_and_report(films, out, args.workers)


if __name__ == "__main__":
    run_script(main)
