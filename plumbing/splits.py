"""Which films are learnt from, chosen on and judged on, so that no patient is on two sides."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from plumbing.checkpoint import digest
from plumbing.film import read_mask
from plumbing.folder import in_threads
from plumbing.keys import DRAW_FRACTION, DRAW_SHOTS, DRAW_SPLIT, HOLD_OUT, numpy_rng
from plumbing.launch import UserError
from plumbing.table import key_of
from plumbing.words import SPLITS


# ---------------------------------------------------------------- pre-training
def hold_out_films(films, tables, holdout: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Divide the films into those to train on and those held out → (train, held), rising numbers.

    Held out are the test films of the label tables (`tables`, a list of Labels) or, without a
    table, `holdout` films drawn by `seed`, at most a tenth of all. Every other film of a patient
    who has a held-out film is left out of training as well: a model that has seen a patient's ribs
    is not judged on the same ribs.
    """
    patients = patients_of(films, tables)
    held = set()
    for table in tables:
        held |= set(table.where[(table.split == "test") & (table.where >= 0)].tolist())
    if not tables:
        order = numpy_rng(HOLD_OUT, seed).permutation(len(films))
        held = set(order[: min(holdout, len(films) // 10)].tolist())
    held_patients = {patients[i] for i in held}
    train = [i for i in range(len(films)) if patients[i] not in held_patients]
    if not train:
        raise UserError(
            "every film is held out: nothing is left to train on; lower --holdout or check --probe"
        )
    return np.array(train), np.array(sorted(held), dtype=int)


def patients_of(films, tables) -> list[str]:
    """Name the patient of every film: as its folder tells, else as a label table does."""
    patients = list(films.patients)
    for table in tables:
        names = set(table.names)
        told = [*zip(table.where, table.patients, strict=True), *table.others.items()]
        for i, patient in told:
            # A film under its own name has no known patient in the folder: the table may know one.
            is_unknown = i >= 0 and patients[i] == films.names[i]
            if is_unknown and patient not in names:
                patients[i] = patient
    return patients


# ---------------------------------------------------------------- downstream tasks
class Example(NamedTuple):
    """One film of a downstream task and what is to be predicted of it.

    truth: 0, 1 or None (not known) per label, () for segmentation. patient: where nobody knows it
    the film's own name, with suffix and perhaps folders. mask: as film.read_mask takes it.
    """

    path: Path
    truth: tuple
    patient: str
    mask: tuple | None = None
    written: tuple | None = None  # film and patient as the user's own table spells them

    @property
    def has_patient(self) -> bool:
        """Whether the patient is known."""
        own = Path(self.patient).parts
        return self.path.parts[-len(own) :] != own


@dataclass
class Splits:
    """The films of a task by split; notes: one line per decision that was taken on the way.

    kind: see benchmarks.Task. drawn: train is already the few-shot draw of the set's own lists.
    against: see findings.Goal.
    """

    task: str
    kind: str
    labels: tuple
    train: list[Example]
    val: list[Example]
    test: list[Example]
    notes: list[str] = field(default_factory=list)
    drawn: bool = False
    against: str = ""

    def counts(self) -> dict:
        """Count {split: {films, patients, positive: {label: films}}}; masks have no "positive".

        patients: None where that of no film is known.
        Where a label is not known of some films, these are counted under "unknown", as positive.
        """
        counts = {}
        for split in SPLITS:
            examples = getattr(self, split)
            patients = {example.patient for example in examples}
            is_unknown = examples and not any(example.has_patient for example in examples)
            count = None if is_unknown else len(patients)
            counts[split] = {"films": len(examples), "patients": count}
            if self.kind == "mask":
                continue
            tallies = [(name, tally(examples, k)) for k, name in enumerate(self.labels)]
            counts[split]["positive"] = {name: count[1] for name, count in tallies}
            unknown = {name: count[None] for name, count in tallies if count[None]}
            if unknown:
                counts[split]["unknown"] = unknown
        return counts


def tally(examples: list[Example], k: int) -> Counter:
    """Count of how many films label k holds (1), does not hold (0) and is not known (None)."""
    return Counter(example.truth[k] for example in examples)


def draw_patients(examples, count: int, by_name=False) -> tuple[list[Example], list[Example]]:
    """Take away about `count` films of whole patients, always the same. → (the rest, the taken)

    Patients are taken in the order of NumPy's permutation 42 of the patients in file order, until
    there are enough films. For VinDr, where every film is a patient, this is the validation split
    of the paper's code. by_name: in an order that depends on their names alone (`place_of`), so
    that few others change sides when films come or go.
    """
    films = Counter(example.patient for example in examples)
    patients = list(films)
    order = np.random.RandomState(42).permutation(len(patients))
    if by_name:
        called = Counter(key_of(example.path.name) for example in examples)
        places = {example.patient: place_of(example, called) for example in examples}
        order = sorted(range(len(patients)), key=lambda k: (places[patients[k]], patients[k]))
    taken = set()
    taken_films = 0
    for k in order:
        if taken_films < count:
            taken.add(patients[k])
            taken_films += films[patients[k]]
    rest = [example for example in examples if example.patient not in taken]
    return rest, [example for example in examples if example.patient in taken]


def place_of(example: Example, called: Counter) -> str:
    """The place of a film's patient in the order of a draw: a digest of the patient's name.

    Where the patient is not known, of the file's name, whatever its folder and suffix; of the path
    where several films are called so, for 1.png of every folder must not be drawn together. called:
    how many films bear each name.
    """
    name = key_of(example.path.name)
    if example.has_patient or called[name] > 1:
        name = key_of(example.patient)
    return digest(f"{DRAW_SPLIT} {name.casefold()}".encode(errors="surrogateescape"))


def complete(parts: dict, sizes: tuple, by_name=False) -> tuple[dict, list[str]]:
    """Draw the splits that a set does not define → (parts with all three, notes).

    parts: {"all": examples} or {"train": …, "test": …, perhaps "val": …}; sizes: the proportion of
    train, val and test. by_name: as draw_patients takes it.
    """
    has_patients = any(example.has_patient for part in parts.values() for example in part)
    how = f"by {'patient' if has_patients else 'film'}; "
    how += "few change sides when rows or columns change" if by_name else "always the same"
    train_size, val_size, test_size = sizes
    parts = dict(parts)
    notes = []
    if "all" in parts:
        everything = parts.pop("all")
        count = max(1, round(len(everything) * test_size / sum(sizes)))
        parts["train"], parts["test"] = draw_patients(everything, count, by_name)
        drawn = count_films(parts["test"])
        notes.append(f"test: the data name no test films; {drawn} are drawn {how}")
    if not parts.get("val"):
        count = max(1, round(len(parts["train"]) * val_size / (train_size + val_size)))
        parts["train"], parts["val"] = draw_patients(parts["train"], count, by_name)
        drawn = count_films(parts["val"])
        notes.append(f"val: {drawn} films held out of train {how}")
    return parts, notes


def count_films(examples: list[Example]) -> int:
    """Count the films of some rows, of which several may be of one film."""
    return len({example.path for example in examples})


def disjoint(parts: dict) -> tuple[dict, list[str]]:
    """Keep every film in one split only, test before train before val → (parts, notes).

    Repeated rows of a split count once. UserError when two rows of a film contradict each other, or
    when a patient has films in two splits.
    """
    kept = {}
    notes = []
    first = {}  # path: (split, example)
    home = {}  # patient: split
    for split in ("test", "train", "val"):
        kept[split] = []
        dropped = Counter()  # by the split that has them
        for example in parts.get(split, []):
            name = example.path.name
            if example.path in first:
                other, same = first[example.path]
                dropped[other] += 1
                if other == split and same._replace(written=example.written) != example:
                    raise UserError(
                        f"{name} stands twice in {split}, with different labels: keep one row"
                    )
                continue
            first[example.path] = split, example
            kept[split].append(example)
            other = home.setdefault(example.patient, split)
            if other != split:
                raise UserError(
                    f"patient {example.patient} has films in {other} and in {split} ({name}): "
                    "patients must not cross splits"
                )
        for other, films in dropped.items():
            what = f"films removed that are in {other} too"
            what = "repeated rows dropped" if other == split else what
            notes.append(f"{split}: {films} {what}")
    return kept, notes


def warn_of_copies(parts: dict) -> list[str]:
    """Warn when films of two splits are one file under two names, as in collections of sets.

    Alike are films of one size with the same 64 KB in their middle. Only films of a size that
    occurs twice are opened.
    """
    films = [(split, example.path) for split in parts for example in parts[split]]
    sizes = in_threads(size_of, [path for _, path in films])
    count = Counter(sizes)
    alike = {}
    for (split, path), size in zip(films, sizes, strict=True):
        if count[size] > 1:
            alike.setdefault((size, middle_of(path, size)), []).append((split, path))
    copies = [films for films in alike.values() if len({split for split, _ in films}) > 1]
    if not copies:
        return []
    first = " and ".join(f"{path.name} ({split})" for split, path in copies[0])
    return [
        f"warning: {len(copies)} films are in two splits under different names: {first}, ...: the "
        "test is not of new films alone; keep one row of each"
    ]


def size_of(path: Path) -> int:
    """The size of a file, bytes; -1 where it cannot be asked."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def middle_of(path: Path, size: int) -> str | Path:
    """The digest of 64 KB in the middle of a file; its path, which equals no other, on errors."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, (size - 65536) // 2))
            return digest(file.read(65536))
    except OSError:
        return path


def draw_few(examples, fraction=1.0, shots: int | None = None, draw=0) -> list[Example]:
    """Draw the few films of --fraction (a share of all) or --shots (so many per class).

    draw: another number draws other films. For --shots the films without any finding count as one
    more class, and a film that shows several findings counts for each of them; of segmentation the
    classes are the films that have a mask, and those whose mask is empty.
    """
    if shots is None:
        if fraction >= 1:
            return examples
        count = max(1, int(fraction * len(examples) + 1e-9))  # 0.29 · 100 is 28.999999999999996
        chosen = numpy_rng(DRAW_FRACTION, draw).choice(len(examples), count, replace=False)
    else:
        order = numpy_rng(DRAW_SHOTS, draw).permutation(len(examples))
        truth = [example.truth or (is_marked(example),) for example in examples]
        chosen = set()
        for k in range(len(truth[0])):
            positive = [i for i in order if truth[i][k]]
            chosen.update(positive[:shots])
        is_free = [all(value == 0 for value in row) for row in truth]
        without_finding = [i for i in order if is_free[i]]
        chosen.update(without_finding[:shots])
    return [examples[i] for i in sorted(chosen)]


def is_marked(example: Example) -> bool:
    """Whether a film of segmentation has a mask that is not empty."""
    kind, what, *_ = example.mask
    return bool(read_mask(example.mask).any()) if kind == "file" else bool(what)


LACK = {  # what a class suffers from that a split shows on all of its films, or on none
    "train": "it cannot be learnt",
    "val": "it does not count in model selection",
    "test": "it has no AUROC",
}
# Of exclusive classes the model is chosen, and judged, by the share of right guesses.
NEVER_SHOWN = LACK | {"val": "model selection sees only whether other films are taken for it"}


# So few films in the smaller class, and a percentile interval of an AUROC of 0.90 holds the true
# value in 92 % of the tests, with 5 films in 81 % and less (simulated).
NARROW = 20
FEW = {  # what it suffers from when they are fewer than 5
    "val": "which step is best is mostly luck",
    "test": "its AUROC is mostly luck",
}


def class_warnings(splits: Splits, which=SPLITS) -> list[str]:
    """One line for every class of which a split has no positive or no negative film, or few."""
    if splits.kind == "mask":
        return []
    lack = NEVER_SHOWN if splits.kind == "classes" else LACK
    lines = []
    for split in which:
        examples = getattr(splits, split)
        for k, name in enumerate(splits.labels):
            count = tally(examples, k)
            films, has = min((count[1], "with"), (count[0], "without"))
            only = f"{split} has only {films} films {has} {name}"
            if not (count[0] or count[1]):
                lines.append(f"of no film of {split} is {name} known: {lack[split]}")
            elif films == 0:
                missing = "negative" if count[1] else "positive"
                lines.append(f"{split} has no {missing} film of {name}: {lack[split]}")
            elif films < 5 and split in FEW:
                lines.append(f"{only}: {FEW[split]}")
            elif films < NARROW and split == "test":
                lines.append(f"{only}: the 95 % interval of its AUROC is too narrow")
    return [f"warning: {line}" for line in lines]
