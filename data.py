"""Images in: any folder of films → two views of one film, the same whatever the number of workers and ranks.

    python data.py check --data DIR                            # what is there, what was recognised, which films are bad and why
    python data.py pack  --data DIR --out cxr.pack --side 320  # decode once; training then maps the file into memory

MIMIC-CXR-JPG, CheXpert and ChestX-ray14 are recognised by their lists, wherever these lie below DIR; of them only frontal training
films are taken. Everything else below DIR that looks like a film is taken too, and so is what packed files (*.pack) hold.
"""

import csv
import gzip
import itertools
import json
import os
import re
import sys
import time
import zlib
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from augment import crop, sample_boxes
from films import BadFilm, Pack, attempts, fit, looks_like_film, pack_films, read_film
from runtime import Stop, flag, main, parse, write_text

VIEWS, BATCHES = (
    1,
    2,
)  # first word of each random key: NumPy pads keys with zeros, so (s, e) would equal (s, e, 0)
MIMIC_BAD = frozenset(
    """
    0518c887-b80608ca-830de2d5-89acf0e2-bd3ec900 03b2e67c-70631ff8-685825fb-6c989456-621ca64d 786d69d0-08d16a2c-dd260165-682e66e9-acf7e942
    1d0bafd0-72c92e4c-addb1c57-40008638-b9ec8584 f55a5fe2-395fc452-4e6b63d9-3341534a-ebb882d5 14a5423b-9989fc33-123ce6f1-4cc7ca9a-9a3d2179
    9c42d877-dfa63a03-a1f2eb8c-127c60c3-b20b7e01 996fb121-fab58dd2-7521fd7e-f9f3133c-bc202556 56b8afd3-5f6d4419-8699d79e-6913a2bd-35a08557
    93020995-6b84ca33-2e41e00d-5d6e3bee-87cfe5c6 f57b4a53-5fecd631-2fe14e8a-f4780ee0-b8471007 d496943d-153ec9a5-c6dfe4c0-4fb9e57f-675596eb
    46b02f13-69fb7e49-321880e4-80584065-c1f57b50 422689b1-40e06ae8-d6151ff3-2780c186-6bd67271 8385a8ad-ad5e02a8-8e1fa7f3-d822c648-2a41a205
    e180a7b6-684946d6-fe1782de-45ed1033-1a6f8a51 f5f82c2f-e99a7a06-6ecc9991-072adb2f-497dae52 6d54a492-7aade003-a238dc5c-019ccdd2-05661649
    2b5edbbf-116df0e3-d0fea755-fabd7b85-cbb19d84 db9511e3-ee0359ab-489c3556-4a9b2277-c0bf0369 87495016-a6efd89e-a3697ec7-89a81d53-627a2e13
    810a8e3b-2cf85e71-7ed0b3d3-531b6b68-24a5ca89 a9f0620b-6e256cbd-a7f66357-2fe78c8a-49caac26
""".split()
)  # unusable films of MIMIC-CXR that the authors drop
NAMED = {
    "MIMIC-CXR-JPG": re.compile(
        r"(?:^|/)([0-9a-f]{8}(?:-[0-9a-f]{8}){4})\.\w+$"
    ),  # a set's film: its key is group 1
    "CheXpert": re.compile(r"(patient\d+/study\d+/view\d+_[a-z]+)\.\w+$"),
    "ChestX-ray14": re.compile(r"(?:^|/)(\d{8}_\d{3})\.\w+$"),
}


# ------------------------------------------------------------------------------------------------ the three sets, by their lists
class Listed(NamedTuple):
    """What the lists of one set say: films wanted {key: patient}, keys of all films they mention, how the set should look on disk."""

    title: str
    wanted: dict
    known: set
    tree: str

    def key(self, name):
        """The key of a film file of this set, else None."""
        named = NAMED[self.title].search(name)
        key = named[1] if named else os.path.splitext(os.path.basename(name))[0]
        return key if named or key in self.known else None


def rows(path, *columns):
    """The named columns of a .csv or .csv.gz, row by row."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(
            path, "rt", newline="", encoding="utf-8-sig"
        ) as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            if lacking := [c for c in columns if c not in header]:
                raise Stop(
                    f"{path}: no column {lacking[0]!r} in its header {','.join(header)[:200]!r}"
                )
            at = [header.index(c) for c in columns]
            yield from (tuple(row[k].strip() for k in at) for row in reader if len(row) > max(at))
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, csv.Error) as error:
        raise Stop(f"{path}: cannot be read as a table ({error})") from None


def list_mimic(lists, every_split):
    """MIMIC-CXR-JPG: ViewPosition exactly AP or PA, training split unless `every_split`, without the bad ones."""
    tree = "mimic-cxr-jpg/{files/p10/p10000032/s50414267/<dicom_id>.jpg, mimic-cxr-2.0.0-{metadata,split}.csv.gz} from physionet.org"
    found = {
        kind: [p for p in lists if re.fullmatch(rf"mimic-cxr-[\d.]+-{kind}\.csv(\.gz)?", p.name)]
        for kind in ("metadata", "split", "chexpert", "negbio")
    }
    if not any(found.values()):
        return None
    for kind in ("metadata",) if every_split else ("metadata", "split"):
        if not found[kind]:
            raise Stop(
                f"MIMIC-CXR-JPG without its mimic-cxr-2.0.0-{kind}.csv[.gz]: frontal training films cannot be told; expected {tree}"
            )
    train = {
        film
        for path in found["split"]
        for film, split in rows(path, "dicom_id", "split")
        if split == "train"
    }
    wanted, known = {}, set()
    for film, subject, view in itertools.chain(
        *(rows(p, "dicom_id", "subject_id", "ViewPosition") for p in found["metadata"])
    ):
        known.add(film)
        if view in ("AP", "PA") and (every_split or film in train) and film not in MIMIC_BAD:
            wanted[film] = f"mimic:{subject}"
    return Listed("MIMIC-CXR-JPG", wanted, known, tree)


def list_chexpert(lists, _):
    """CheXpert, any of its five layouts: frontal films of train.csv. A film is known by patient/study/view, whatever folders lie above."""
    tree = "CheXpert-v1.0[-small]/{train/patient00001/study1/view1_frontal.jpg, valid/…, train.csv} from stanfordmlgroup.github.io"
    tables = []
    for path in (
        p
        for p in lists
        if p.name in ("train.csv", "valid.csv", "val_labels.csv", "test_labels.csv")
    ):
        with open(path, errors="replace") as file:  # other sets have a train.csv, too
            if file.readline().startswith(("Path,", "\ufeffPath,")) and re.search(
                r"patient\d+/study", file.readline()
            ):
                tables.append(path)
    if not tables:
        return None
    wanted, known = {}, set()
    for film, side in itertools.chain(
        *(rows(p, "Path", "Frontal/Lateral") for p in tables if p.name == "train.csv")
    ):
        if named := NAMED["CheXpert"].search(film):
            known.add(named[1])
            if side == "Frontal":
                wanted[named[1]] = f"chexpert:{named[1].split('/')[0]}"
    return Listed("CheXpert", wanted, known, tree)


def list_nih(lists, _):
    """NIH ChestX-ray14: the films of train_val_list.txt (all are frontal). Patients from Data_Entry_2017*.csv, else from the names."""
    tree = "{images_001/images/00000001_000.png, …, Data_Entry_2017.csv, train_val_list.txt} from nihcc.app.box.com"
    tables = [p for p in lists if re.fullmatch(r"Data_Entry_2017.*\.csv", p.name)]
    chosen, tested = (
        [p for p in lists if p.name == f"{part}_list.txt"] for part in ("train_val", "test")
    )
    if not tables and not chosen:
        return None
    if not chosen:
        raise Stop(
            f"{tables[0]}: ChestX-ray14 without train_val_list.txt: its test films cannot be told; expected {tree}"
        )
    stem = lambda name: name.strip().rsplit(".", 1)[0]
    patients = {
        stem(film): who
        for film, who in itertools.chain(*(rows(p, "Image Index", "Patient ID") for p in tables))
    }
    names, others = (
        {stem(line) for path in paths for line in path.read_text(errors="replace").split()}
        for paths in (chosen, tested)
    )
    wanted = {key: f"nih:{patients.get(key, key.split('_')[0]):0>8}" for key in names}
    return Listed("ChestX-ray14", wanted, names | others | patients.keys(), tree)


def choose(names, packed, sets):
    """Which film files to take: those a list wants, and those that belong to no set → (names, patients, summary lines).

    packed: names of films that packed files hold; a set's film that is there counts as found.
    """
    taken, others, found, left, twice = (
        [],
        [],
        [set() for _ in sets],
        [0] * len(sets),
        [0] * len(sets),
    )
    for s, listed in enumerate(sets):
        found[s].update(key for key in map(listed.key, packed) if key in listed.wanted)
    for name in names:
        s, key = next(
            ((s, key) for s, listed in enumerate(sets) if (key := listed.key(name))), (None, None)
        )
        if s is None:
            taken.append((name, name))
            others.append(name)
        elif key not in sets[s].wanted:
            left[s] += 1
        elif key in found[s]:
            twice[s] += 1
        else:
            found[s].add(key)
            taken.append((name, sets[s].wanted[key]))
    lines = [line for parts in zip(sets, found, left, twice) for line in report(*parts)]
    if others:
        folders = {os.path.dirname(name) for name in others}
        lines.append(
            f"{'other films' if sets else 'films'}: {len(others):,} in {len(folders):,} folder{'s' * (len(folders) > 1)}"
        )
    for title, pattern in NAMED.items():
        if alike := sum(pattern.search(name) is not None for name in others):
            lines.append(
                f"warning: {alike:,} films are named as in {title}, whose lists are not here: its test films are trained on, too"
            )
    return [name for name, _ in taken], [who for _, who in taken], lines


def report(listed, found, left, twice):
    """Summary lines of one set; Stop when its lists name films of which none is there."""
    missing = sorted(listed.wanted.keys() - found)
    if missing and not found:
        raise Stop(
            f"{listed.title}: none of the {len(missing):,} films in its lists (first {missing[0]}) is there; expected {listed.tree}"
        )
    line = f"{listed.title}: {len(found):,} frontal training films of {len({listed.wanted[key] for key in found}):,} patients"
    line += f"; {left:,} left out (lateral, validation, test, bad or unlisted)" if left else ""
    yield line + (f"; {twice:,} second copies left out" if twice else "")
    if missing:
        yield f"warning: {listed.title}: {len(missing):,} of {len(listed.wanted):,} listed films not there, first {', '.join(missing[:3])}"


# ------------------------------------------------------------------------------------------------ folders → films
def threaded(function, items):
    """[function(item) for item in items] by 16 threads: on a cold disk or over a network, waiting is what looking costs."""
    parts = [items[k : k + 100] for k in range(0, len(items), 100)]
    with ThreadPoolExecutor(16) as pool:
        return list(
            itertools.chain(*pool.map(lambda part: [function(item) for item in part], parts))
        )


def look(folder):
    """One folder → ((device, inode) or None when it may not be read, mtime in ns, sorted [(name, is a folder)] without hidden ones)."""
    try:
        stat = os.stat(folder)
        with os.scandir(folder) as entries:
            return (
                (stat.st_dev, stat.st_ino),
                stat.st_mtime_ns,
                sorted((e.name, e.is_dir()) for e in entries if e.name[0] != "."),
            )
    except (PermissionError, FileNotFoundError):  # lost+found of a mounted disk, say
        return None, 0, []


def walk(root):
    """Every file and folder below `root` → (sorted file paths relative to it, {folder: mtime in ns})."""
    files, folders, seen, level = [], {}, {None}, [""]
    while level:
        looked, below = threaded(look, [os.path.join(root, folder) for folder in level]), []
        for folder, (identity, mtime, entries) in zip(level, looked):
            if identity in seen:  # a link back up
                continue
            seen.add(identity)
            folders[folder] = mtime
            for name, is_folder in entries:
                (below if is_folder else files).append(f"{folder}/{name}" if folder else name)
        level = below
    return sorted(files), folders


def make_index(root, every_split):
    """Look through `root` → dict of names, patients, packs, summary, and the state of the folders and lists that this rests on."""
    files, folders = walk(root)
    lists = [
        name
        for name in files
        if name.endswith((".csv", ".csv.gz", "_list.txt")) and os.path.isfile(root / name)
    ]
    packs = {name: Pack(root / name) for name in files if name.endswith(".pack")}
    packed = {
        f"{above}{name}"
        for path, pack in packs.items()
        for name in pack.names
        for above in (
            "",
            f"{os.path.dirname(path)}/",
            os.path.join(os.path.dirname(path), pack.folder, ""),
        )
    }
    sets = [
        s
        for s in (
            read([root / p for p in lists], every_split)
            for read in (list_mimic, list_chexpert, list_nih)
        )
        if s
    ]
    films = threaded(
        lambda name: name if name not in packed and looks_like_film(f"{root}/{name}") else None,
        files,
    )
    names, patients, summary = choose([name for name in films if name], packed, sets)
    if not names and not packs:
        raise Stop(
            f"--data {root}: no films to train on below it ({len(files):,} files; {'; '.join(summary) or 'none looks like a film'})"
        )
    summary += [pack.told for pack in packs.values()]
    return {
        "names": names,
        "patients": patients,
        "packs": list(packs),
        "summary": summary,
        "folders": folders,
        "lists": {name: stamp(f"{root}/{name}") for name in [*lists, *packs]},
    }


def stamp(path):
    """[size, mtime in ns] of a file or folder; [0, 0] when it is gone."""
    try:
        stat = os.stat(path)
        return [stat.st_size, stat.st_mtime_ns]
    except OSError:
        return [0, 0]


def cached_index(root, cache, every_split):
    """make_index, kept in `cache` until a folder below `root`, a list or an option changes (a folder's mtime moves with its entries)."""
    options = ["1", str(root.resolve()), every_split]
    try:
        index = json.loads(cache.read_text())
        if index["options"] == options and all(
            stamp(f"{root}/{name}") == old for name, old in index["lists"].items()
        ):
            if list(index["folders"].values()) == [
                now[1] for now in threaded(stamp, [f"{root}/{name}" for name in index["folders"]])
            ]:
                return index
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no cache, or one from another version: look again
    index = {"options": options, **make_index(root, every_split)}
    write_text(cache, json.dumps(index))
    return index


class Films:
    """films[i] → uint8 (H, W), short side at most `side` (0 = as stored); raises BadFilm. Packed films are views of the mapped file.

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
        raise Stop(f"--data {root}: no such folder or packed file")
    index = (
        cached_index(root, Path(cache_dir) / "films.json", mimic_all)
        if cache_dir
        else make_index(root, mimic_all)
    )
    known = index["patients"]
    if patients:
        table = dict(rows(Path(patients), "filename", "patient_id"))
        known = [table.get(row, old) for row, old in zip(match(index["names"], table), known)]
    return Films(
        root,
        index["names"],
        known,
        [Pack(root / name) for name in index["packs"]],
        side,
        index["summary"],
    )


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
        boxes, flips = sample_boxes(
            np.random.default_rng((VIEWS, self.seed, epoch, i)), *film.shape
        )
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
        where = f"{min(tries, len(self))} films in a row cannot be read, from {self.films.names[first]} on ({reason})"
        raise Stop(f"{where}: python data.py check --data … names them all")


class Batches:
    """Batch sampler: yields the list of (epoch, i) of every micro-batch of this rank, from `start_step` until `steps` (default: one epoch).

    Step s is a slice of `batch` places of the epochs' permutations of n, each cut to whole batches; a rank owns a contiguous share of
    it and takes that in micro-batches. So rank, world, micro and resuming never change which film lies at which place of which step.
    """

    def __init__(self, n, batch, micro, rank, world, seed, start_step=0, steps=None):
        if n < batch:
            raise Stop(f"{n} films are fewer than one batch of {batch}: lower --batch or add films")
        if batch % (micro * world):
            raise Stop(
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
                    np.random.default_rng((BATCHES, self.seed, epoch)).permutation(self.n),
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
        raise Stop(
            "say what to do with which films: python data.py check --data DIR, or python data.py pack --data DIR --out cxr.pack"
        )
    films = open_films(
        config.data, side=config.side, patients=config.patients, mimic_all=config.mimic_all
    )
    print("\n".join(films.summary))
    check(films, config.workers) if word == "check" else pack(films, config.out, config.workers)


if __name__ == "__main__":
    main(command)
