"""plumbing.folder"""

import itertools
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from plumbing.checkpoint import write_text
from plumbing.film import SUFFIXES, looks_like_film
from plumbing.launch import UserError
from plumbing.pack import Pack
from plumbing.table import SPLITS, read_list, read_table, without_suffix

MASK_FOLDER = re.compile(r"(^|[/_])(masks?|annotations?)(_\d+)?/", re.IGNORECASE)


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
                    table.setdefault(without_suffix("/".join(path.split("/")[-depth:])), []).append(
                        path
                    )
        return self.tails[depth]

    def _candidates(self, name, depth):
        """Files that `name` may mean: by its last `depth` parts; for depth 0 by as many of its parts as lead anywhere."""
        if depth == 0 and Path(name).is_file() and Path(name).is_absolute():
            return [name]
        parts = name.replace("\\", "/").removeprefix("./").split("/")
        for n in range(len(parts), 0, -1) if depth == 0 else [min(depth, len(parts))]:
            tail = "/".join(parts[-n:])
            found = self._tail(n).get(without_suffix(tail), [])
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
            raise UserError(
                f"{self.root}: {len(absent)} of the {len(names)} films named by {what} are not there, the first: {', '.join(absent[:3])}"
            )
        for several in found:
            if len(several) > 1:
                raise UserError(
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
            raise UserError(
                f"MIMIC-CXR-JPG without its mimic-cxr-2.0.0-{kind}.csv[.gz]: frontal training films cannot be told; expected {tree}"
            )
    train = {
        row["dicom_id"]
        for path in found["split"]
        for row in read_table(path, "dicom_id", "split")
        if row["split"] == "train"
    }
    wanted, known = {}, set()
    for row in itertools.chain(
        *(read_table(p, "dicom_id", "subject_id", "ViewPosition") for p in found["metadata"])
    ):
        film, subject, view = row["dicom_id"], row["subject_id"], row["ViewPosition"]
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
    for row in itertools.chain(
        *(read_table(p, "Path", "Frontal/Lateral") for p in tables if p.name == "train.csv")
    ):
        if named := NAMED["CheXpert"].search(row["Path"]):
            known.add(named[1])
            if row["Frontal/Lateral"] == "Frontal":
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
        raise UserError(
            f"{tables[0]}: ChestX-ray14 without train_val_list.txt: its test films cannot be told; expected {tree}"
        )
    stem = lambda name: name.strip().rsplit(".", 1)[0]
    patients = {
        stem(row["Image Index"]): row["Patient ID"]
        for row in itertools.chain(*(read_table(p, "Image Index", "Patient ID") for p in tables))
    }
    names, others = (
        {stem(line) for path in paths for line in path.read_text(errors="replace").split()}
        for paths in (chosen, tested)
    )
    wanted = {key: f"nih:{patients.get(key, key.split('_')[0]):0>8}" for key in names}
    return Listed("ChestX-ray14", wanted, names | others | patients.keys(), tree)


def choose_films(names, packed, sets):
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
    lines = [line for parts in zip(sets, found, left, twice) for line in report_set(*parts)]
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


def report_set(listed, found, left, twice):
    """Summary lines of one set; Stop when its lists name films of which none is there."""
    missing = sorted(listed.wanted.keys() - found)
    if missing and not found:
        raise UserError(
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
    names, patients, summary = choose_films([name for name in films if name], packed, sets)
    if not names and not packs:
        raise UserError(
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
