"""What lies below a folder: one walk, films by name, the lists of three sets."""

import errno
import functools
import itertools
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from plumbing.film import looks_like_film
from plumbing.launch import UserError
from plumbing.table import Finder, as_path, read_list, read_table, tail_of

# Folders of thumbnails and deleted files that macOS, Windows and network disks leave behind.
NO_FILMS = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information"}

MASK_FOLDER = re.compile(r"(^|[/_])(masks?|annotations?)(_\d+)?/", re.IGNORECASE)


# ---------------------------------------------------------------- the walk
def in_threads(function, items: list) -> list:
    """Call function(item) for every item with 16 threads; the results come in the items' order.

    On a cold disk or over a network, nearly all the time of looking at files is waiting. Items are
    handed over by the hundred, since handing over costs as much as a look at a file in memory.
    """
    parts = [items[k : k + 100] for k in range(0, len(items), 100)]
    with ThreadPoolExecutor(16) as pool:
        results = pool.map(lambda part: [function(item) for item in part], parts)
        return list(itertools.chain.from_iterable(results))


def kind_of(entry: os.DirEntry) -> str:
    """'folder', 'file', 'link' to a file, or why an entry is none of these. Only links cost a look
    at the disk.
    """
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "link" if entry.is_symlink() else "file"
        return "link that leads nowhere" if entry.is_symlink() else "pipe, socket or device"
    except OSError as error:
        is_loop = error.errno == errno.ELOOP
        return "link to itself" if is_loop else f"cannot be looked at: {error.strerror}"


def look(folder: str):
    """Look into one folder → (identity, [(name, kind)]).

    Hidden entries and what systems leave behind (NO_FILMS) are left out. The identity is device and
    inode; of a folder that cannot be read, as lost+found on a mounted disk, it is the reason.
    """
    kinds = []
    try:
        stat = os.stat(folder)
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and entry.name not in NO_FILMS:
                    kinds.append((entry.name, kind_of(entry)))
    except OSError as error:
        return f"folder cannot be read: {error.strerror}", []
    return (stat.st_dev, stat.st_ino), sorted(kinds)


def walk(root):
    """Look through all folders below `root`, level by level.

    → (sorted paths of the files, those of them that are links, {path: why it was skipped}), all
    relative to root.
    """
    root = Path(root).absolute()
    files = []
    links = []
    skipped = {}
    seen = set()
    level = [""]
    while level:
        next_level = []
        looks = in_threads(look, [f"{root}/{folder}" for folder in level])
        for folder, (identity, entries) in zip(level, looks, strict=True):
            if identity in seen:  # a link leads back up
                continue
            if isinstance(identity, str):
                skipped[folder or "."] = identity
                continue
            seen.add(identity)
            for name, kind in entries:
                path = f"{folder}/{name}" if folder else name
                if kind == "folder":
                    next_level.append(path)
                elif kind in ("file", "link"):
                    files.append(path)
                    if kind == "link":
                        links.append(path)
                else:
                    skipped[path] = kind
        level = next_level
    return sorted(files), sorted(links), skipped


def is_film_or_why(path: str) -> bool | str:
    """Whether a file looks like a film, or why it cannot be looked at."""
    try:
        return looks_like_film(path)
    except OSError as error:
        return f"cannot be looked at: {error.strerror}"


def describe(skipped: dict[str, str], names: list[str]) -> list[str]:
    """One line for every reason why entries were skipped, and on odd names, with the first five."""
    kinds = {}
    for name, why in skipped.items():
        kinds.setdefault(f"skipped, {why}", []).append(name)
    odd = [name for name in names if re.search(r"[\ud800-\udfff]", name)]
    if odd:  # of an old system or a foreign archive
        kinds["read, though their names are not UTF-8"] = odd
    lines = []
    for kind, found in sorted(kinds.items()):
        more = ", …" if len(found) > 5 else ""
        lines.append(f"{kind}: {len(found):,}: {', '.join(found[:5])}{more}")
    return lines


# ---------------------------------------------------------------- files and films by name
class Index:
    """The files below a folder, but for hidden ones, found by name.

    names: sorted paths relative to `root`; links: those of them that are links; films: those of
    them that look like films; unmasked: the films that lie in no folder of masks or annotations;
    notes: lines on what was skipped or is odd.
    """

    def __init__(self, root):
        self.root = Path(root)
        files, self.links, skipped = walk(self.root)
        kinds = in_threads(is_film_or_why, [f"{self.root}/{name}" for name in files])
        kind_of_file = dict(zip(files, kinds, strict=True))
        self.films = [name for name in files if kind_of_file[name] is True]
        skipped |= {name: why for name, why in kind_of_file.items() if isinstance(why, str)}
        self.names = [name for name in files if name not in skipped]
        self.notes = describe(skipped, self.names)
        self.unmasked = [name for name in self.films if not MASK_FOLDER.search(name)]
        self.finder = Finder(self.unmasked)

    def second_names(self) -> dict[str, str]:
        """Find the links to a film that is here under another name, too → {link: that name}."""
        links = set(self.links).intersection(self.films)
        if not links:
            return {}
        real_folder = functools.cache(os.path.realpath)
        first = {}  # {real path: the first film that lies there}
        second = {}
        for name in sorted(self.films, key=lambda name: (name in links, name)):
            path = f"{self.root}/{name}"
            folder, base = os.path.split(path)
            real = os.path.realpath(path) if name in links else f"{real_folder(folder)}/{base}"
            if first.setdefault(real, name) != name:
                second[name] = first[real]
        return second

    def files(self, *names: str) -> list[Path]:
        """Paths of the files with one of these names, in the order of the names."""
        found = []
        for name in names:
            found += [self.root / path for path in self.names if os.path.basename(path) == name]
        return found

    def find(self, names, depth: int = 1, what: str = "the lists") -> list[Path]:
        """Find the film of every name, with or without suffix, by its last `depth` parts.

        UserError with the count when a film is absent, or when a name fits several. what: who names
        the films, for the message.
        """
        found = [self.finder.ending(tail_of(as_path(name), depth)) for name in names]
        absent = [name for name, films in zip(names, found, strict=True) if not films]
        if absent:
            raise UserError(
                f"{self.root}: {len(absent)} of the {len(names)} films named by {what} are not "
                f"there, the first: {', '.join(absent[:3])}"
            )
        for films in found:
            if len(films) > 1:
                first, second = (self.unmasked[i] for i in films[:2])
                raise UserError(
                    f"{self.root}: one film name, several files ({first}, {second}): "
                    "point --data at one copy, or write the path in the list"
                )
        return [self.root / self.unmasked[i] for i, *_ in found]

    def lists(self, *patterns: str, need=("train", "test")) -> dict:
        """Read split lists such as 'Xray14_{}_official.txt' → {split: [(name, numbers)]}.

        {} stands for train, val or valid, and test. Empty unless all of `need` are there.
        """
        parts = {}
        words = (("train", "train"), ("val", "val"), ("val", "valid"), ("test", "test"))
        for split, word in words:
            paths = self.files(*[pattern.format(word) for pattern in patterns])
            if paths and split not in parts:
                parts[split] = read_list(paths[0])
        return parts if set(need) <= set(parts) else {}


# ---------------------------------------------------------------- the three sets, by their lists
# How a set names its films (TREE shows one of each); group 1 is the key by which its lists know a
# film, whatever folders lie above and whether it is a JPEG or a DICOM.
FILM_NAME = {
    "MIMIC-CXR-JPG": re.compile(r"(?:^|/)([0-9a-f]{8}(?:-[0-9a-f]{8}){4})\.\w+$"),  # dicom_id
    "CheXpert": re.compile(r"(patient\d+/study\d+/view\d+_[a-z]+)\.\w+$"),  # from the patient on
    "ChestX-ray14": re.compile(r"(?:^|/)(\d{8}_\d{3})\.\w+$"),  # the number
}

# How a set lies on disk, for messages.
TREE = {
    "MIMIC-CXR-JPG": "mimic-cxr-jpg/{files/p10/p10000032/s50414267/<dicom_id>.jpg, "
    "mimic-cxr-2.0.0-{metadata,split}.csv.gz} from physionet.org",
    "CheXpert": "CheXpert-v1.0[-small]/{train/patient00001/study1/view1_frontal.jpg, valid/…, "
    "train.csv} from stanfordmlgroup.github.io",
    "ChestX-ray14": "{images_001/images/00000001_000.png, …, Data_Entry_2017.csv, "
    "train_val_list.txt} from nihcc.app.box.com",
}

# Films of MIMIC-CXR that cannot be used; the authors leave them out.
# fmt: off
MIMIC_BAD = frozenset("""
    0518c887-b80608ca-830de2d5-89acf0e2-bd3ec900 03b2e67c-70631ff8-685825fb-6c989456-621ca64d
    786d69d0-08d16a2c-dd260165-682e66e9-acf7e942 1d0bafd0-72c92e4c-addb1c57-40008638-b9ec8584
    f55a5fe2-395fc452-4e6b63d9-3341534a-ebb882d5 14a5423b-9989fc33-123ce6f1-4cc7ca9a-9a3d2179
    9c42d877-dfa63a03-a1f2eb8c-127c60c3-b20b7e01 996fb121-fab58dd2-7521fd7e-f9f3133c-bc202556
    56b8afd3-5f6d4419-8699d79e-6913a2bd-35a08557 93020995-6b84ca33-2e41e00d-5d6e3bee-87cfe5c6
    f57b4a53-5fecd631-2fe14e8a-f4780ee0-b8471007 d496943d-153ec9a5-c6dfe4c0-4fb9e57f-675596eb
    46b02f13-69fb7e49-321880e4-80584065-c1f57b50 422689b1-40e06ae8-d6151ff3-2780c186-6bd67271
    8385a8ad-ad5e02a8-8e1fa7f3-d822c648-2a41a205 e180a7b6-684946d6-fe1782de-45ed1033-1a6f8a51
    f5f82c2f-e99a7a06-6ecc9991-072adb2f-497dae52 6d54a492-7aade003-a238dc5c-019ccdd2-05661649
    2b5edbbf-116df0e3-d0fea755-fabd7b85-cbb19d84 db9511e3-ee0359ab-489c3556-4a9b2277-c0bf0369
    87495016-a6efd89e-a3697ec7-89a81d53-627a2e13 810a8e3b-2cf85e71-7ed0b3d3-531b6b68-24a5ca89
    a9f0620b-6e256cbd-a7f66357-2fe78c8a-49caac26
""".split())
# fmt: on


@dataclass
class FilmSet:
    """One of the three sets as its lists describe it, and how much of it was found."""

    title: str
    wanted: dict[str, str]  # frontal training films: {key: patient}
    mentioned: set[str]  # keys of all films that the lists name
    found: set[str] = field(default_factory=set)  # keys of wanted films that are there
    left_out: int = 0  # files of films that are not wanted
    second_copies: int = 0

    def key(self, name: str) -> str | None:
        """The key of a film file of this set; None for a file that does not belong to it."""
        match = FILM_NAME[self.title].search(name)
        if match:
            return match[1]
        stem = os.path.splitext(os.path.basename(name))[0]
        return stem if stem in self.mentioned else None

    def takes(self, key: str) -> bool:
        """Whether to train on the next file with this key: a wanted film, and its first copy."""
        if key not in self.wanted:
            self.left_out += 1
            return False
        if key in self.found:
            self.second_copies += 1
            return False
        self.found.add(key)
        return True

    def report(self) -> list[str]:
        """Say what was found. UserError when the lists name films of which none is there."""
        missing = sorted(self.wanted.keys() - self.found)
        if missing and not self.found:
            raise UserError(
                f"{self.title}: none of the {len(missing):,} films in its lists (first "
                f"{missing[0]}) is there; expected {TREE[self.title]}"
            )
        patients = len({self.wanted[key] for key in self.found})
        line = f"{self.title}: {len(self.found):,} frontal training films of {patients:,} patients"
        if self.left_out:
            line += f"; {self.left_out:,} left out (lateral, validation, test, bad or unlisted)"
        if self.second_copies:
            line += f"; {self.second_copies:,} second copies left out"
        lines = [line]
        if missing:
            lines.append(
                f"warning: {self.title}: {len(missing):,} of {len(self.wanted):,} listed films not "
                f"there, first {', '.join(missing[:3])}"
            )
        return lines


def read_rows(paths: list[Path], *columns: str) -> list[dict[str, str]]:
    """The rows of several tables, one after the other."""
    return list(itertools.chain.from_iterable(read_table(path, *columns) for path in paths))


def list_mimic(lists: list[Path], mimic_all: bool) -> FilmSet | None:
    """MIMIC-CXR-JPG: films whose ViewPosition is exactly AP or PA.

    Of the training split, unless `mimic_all`.
    """
    title = "MIMIC-CXR-JPG"

    def tables(kind):
        return [p for p in lists if re.fullmatch(rf"mimic-cxr-[\d.]+-{kind}\.csv(\.gz)?", p.name)]

    if not tables("(metadata|split|chexpert|negbio)"):
        return None
    for kind in ["metadata"] if mimic_all else ["metadata", "split"]:
        if not tables(kind):
            raise UserError(
                f"{title} without its mimic-cxr-2.0.0-{kind}.csv[.gz]: frontal training films "
                f"cannot be told; expected {TREE[title]}"
            )
    splits = read_rows(tables("split"), "dicom_id", "split")
    train = {row["dicom_id"] for row in splits if row["split"] == "train"}
    wanted = {}
    mentioned = set()
    for row in read_rows(tables("metadata"), "dicom_id", "subject_id", "ViewPosition"):
        film = row["dicom_id"]
        mentioned.add(film)
        is_frontal = row["ViewPosition"] in ("AP", "PA")
        if is_frontal and (mimic_all or film in train) and film not in MIMIC_BAD:
            wanted[film] = f"mimic:{row['subject_id']}"
    return FilmSet(title, wanted, mentioned)


def list_chexpert(lists: list[Path]) -> FilmSet | None:
    """CheXpert in any of its five layouts: the frontal films of train.csv."""
    title = "CheXpert"
    names = ("train.csv", "valid.csv", "val_labels.csv", "test_labels.csv")
    tables = [path for path in lists if path.name in names and is_chexpert_table(path)]
    if not tables:
        return None
    wanted = {}
    mentioned = set()
    train = [path for path in tables if path.name == "train.csv"]
    for row in read_rows(train, "Path", "Frontal/Lateral"):
        match = FILM_NAME[title].search(row["Path"])
        if match:
            key = match[1]
            mentioned.add(key)
            if row["Frontal/Lateral"] == "Frontal":
                wanted[key] = f"chexpert:{key.split('/')[0]}"
    return FilmSet(title, wanted, mentioned)


def is_chexpert_table(path: Path) -> bool:
    """By the first two lines of a table: other sets have a train.csv, too."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        header = file.readline()
        first_row = file.readline()
    return header.startswith("Path,") and re.search(r"patient\d+/study", first_row) is not None


def list_nih(lists: list[Path]) -> FilmSet | None:
    """ChestX-ray14: the films of train_val_list.txt; all are frontal.

    Patients come from Data_Entry_2017*.csv, else from the names of the films.
    """
    title = "ChestX-ray14"
    tables = [path for path in lists if re.fullmatch(r"Data_Entry_2017.*\.csv", path.name)]
    train_lists = [path for path in lists if path.name == "train_val_list.txt"]
    test_lists = [path for path in lists if path.name == "test_list.txt"]
    if not tables and not train_lists:
        return None
    if not train_lists:
        raise UserError(
            f"{tables[0]}: {title} without train_val_list.txt: its test films cannot be told; "
            f"expected {TREE[title]}"
        )
    patient_of = {}
    for row in read_rows(tables, "Image Index", "Patient ID"):
        patient_of[os.path.splitext(row["Image Index"])[0]] = row["Patient ID"]
    train = read_stems(train_lists)
    wanted = {}
    for key in train:
        patient = patient_of.get(key, key.split("_")[0])
        wanted[key] = f"nih:{patient:0>8}"
    return FilmSet(title, wanted, train | read_stems(test_lists) | patient_of.keys())


def read_stems(paths: list[Path]) -> set[str]:
    """The names of the films in some split lists, without suffix."""
    films = itertools.chain.from_iterable(map(read_list, paths))
    return {os.path.splitext(name)[0] for name, _ in films}


# ---------------------------------------------------------------- which films to train on
def choose_films(index: Index, packs: dict, mimic_all: bool = False):
    """Choose the films to train on: those that a set's lists want, and those that belong to no set.

    packs: {path below the root: Pack}; what they hold is there and not taken a second time. Nor are
    links to films: a film held out under one name must not be trained on under another.
    → ({film: patient}, {link left out: the film it leads to}, lines that say what was recognised).
    A film of no set is its own patient.
    """
    is_list = (".csv", ".csv.gz", "_list.txt")
    lists = [index.root / name for name in index.names if name.endswith(is_list)]
    sets = [list_mimic(lists, mimic_all), list_chexpert(lists), list_nih(lists)]
    sets = [film_set for film_set in sets if film_set]
    refuse_twice_packed(packs)
    packed = set().union(*[packed_paths(path, pack) for path, pack in packs.items()])
    for film_set in sets:
        keys = {film_set.key(name) for name in packed}
        film_set.found |= keys & film_set.wanted.keys()

    patients = {}
    others = []
    second_names = index.second_names()
    links = {}
    for name in index.films:
        if name in packed:
            continue
        film_set, key = owner(name, sets)
        if film_set is None and name in second_names:
            links[name] = second_names[name]
        elif film_set is None:
            others.append(name)
            patients[name] = name
        elif film_set.takes(key):
            patients[name] = film_set.wanted[key]
    summary = []
    for film_set in sets:
        summary += film_set.report()
    summary += report_others(others, bool(sets))
    if links:
        summary.append(f"{len(links):,} links left out: their films are here under other names")
    return patients, links, summary


def refuse_twice_packed(packs: dict):
    """UserError when two packs hold the same film: one file, as its name, size and time tell and,
    of packs with one --side, its pixels.
    """
    first = {}  # {name, size and time of a file: (its pack, the side and checksum there)}
    twice = []
    for path, pack in packs.items():
        # The states of unreadable films come after those of the films.
        for name, state, checksum in zip(pack.names, pack.states, pack.checksums, strict=False):
            if not state:  # packed by an earlier version
                continue
            key = (os.path.basename(name), *state)
            other, side, pixels = first.setdefault(key, (path, pack.side, checksum))
            if other != path and (side != pack.side or pixels == checksum):
                twice.append((other, path, name))
    if twice:
        one, other, name = twice[0]
        raise UserError(
            f"{one} and {other} both hold {name}, and {len(twice):,} films are in two packs: these "
            "would count twice; move one of the packs away, or give it alone as --data"
        )


def packed_paths(path: str, pack) -> set[str]:
    """Where the films of a pack may lie as files as well.

    A pack knows them by their paths below the folder that was packed; that may be the root, the
    folder that the pack lies in, or one beside the pack.
    """
    folder = os.path.dirname(path)
    paths = set(pack.names)
    for place in (folder, f"{folder}/{pack.folder}" if folder else pack.folder):
        paths.update(f"{place}/{name}" for name in pack.names)
    return paths


def owner(name: str, sets: list[FilmSet]) -> tuple[FilmSet | None, str | None]:
    """The set that a film file belongs to and its key there; (None, None) for a film of no set."""
    for film_set in sets:
        key = film_set.key(name)
        if key:
            return film_set, key
    return None, None


def report_others(others: list[str], has_sets: bool) -> list[str]:
    """Say how many films belong to no set, and warn of those that are named like a set's."""
    if not others:
        return []
    folders = {os.path.dirname(name) for name in others}
    what = "other films" if has_sets else "films"
    plural = "" if len(folders) == 1 else "s"
    lines = [f"{what}: {len(others):,} in {len(folders):,} folder{plural}"]
    for title, pattern in FILM_NAME.items():
        alike = sum(pattern.search(name) is not None for name in others)
        if alike:
            lines.append(
                f"warning: {alike:,} films are named as in {title}, whose lists are not here: its "
                "test films are trained on, too"
            )
    return lines
