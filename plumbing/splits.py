"""Which films are learnt from, chosen on and judged on, so that no patient is on two sides."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from plumbing.checkpoint import digest
from plumbing.folder import in_threads
from plumbing.keys import DRAW_FRACTION, DRAW_SHOTS, HOLD_OUT, numpy_rng
from plumbing.launch import UserError
from plumbing.table import SPLITS


# ---------------------------------------------------------------- pre-training
def hold_out_films(films, tables, holdout: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Divide the films into those to train on and those held out → (train, held), rising numbers.

    Held out are the test films of the label tables (`tables`, a list of Labels) or, without a
    table, `holdout` films drawn by `seed`, at most a tenth of all. Every other film of a patient
    who has a held-out film is left out of training as well: a model that has seen a patient's ribs
    is not judged on the same ribs.
    """
    located = [table.locate(films) for table in tables]
    patients = patients_of(films, tables, located)
    held = set()
    for table, where in zip(tables, located, strict=True):
        held |= set(where[(table.split == "test") & (where >= 0)].tolist())
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


def patients_of(films, tables, located) -> list[str]:
    """Name the patient of every film: as its folder tells, else as a label table does.

    located: for every table where the films of its rows are, as Labels.locate says.
    """
    patients = list(films.patients)
    for table, where in zip(tables, located, strict=True):
        names = set(table.names)
        told = [*zip(where, table.patients, strict=True), *table.others.items()]
        for i, patient in told:
            # A film under its own name has no known patient in the folder: the table may know one.
            is_unknown = i >= 0 and patients[i] == films.names[i]
            if is_unknown and patient not in names:
                patients[i] = patient
    return patients


# ---------------------------------------------------------------- downstream tasks
class Example(NamedTuple):
    """One film of a downstream task and what is to be predicted of it.

    target: 0, 1 or None (not known) per label, () for segmentation. mask: as film.read_mask takes
    it.
    """

    path: Path
    target: tuple
    patient: str
    mask: tuple | None = None


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

        Where a label is not known of some films, these are counted under "unknown", as positive.
        """
        counts = {}
        for split in SPLITS:
            examples = getattr(self, split)
            patients = {example.patient for example in examples}
            counts[split] = {"films": len(examples), "patients": len(patients)}
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
    return Counter(example.target[k] for example in examples)


def draw_patients(examples: list[Example], count: int) -> tuple[list[Example], list[Example]]:
    """Take away about `count` films of whole patients, always the same. → (the rest, the taken)

    Patients are taken in the order of NumPy's permutation 42 of the patients in file order, until
    there are enough films. For VinDr, where every film is a patient, this is the validation split
    of the paper's code.
    """
    films = Counter(example.patient for example in examples)
    patients = list(films)
    taken = set()
    taken_films = 0
    for k in np.random.RandomState(42).permutation(len(patients)):
        if taken_films < count:
            taken.add(patients[k])
            taken_films += films[patients[k]]
    rest = [example for example in examples if example.patient not in taken]
    return rest, [example for example in examples if example.patient in taken]


def complete(parts: dict, sizes: tuple) -> tuple[dict, list[str]]:
    """Draw the splits that a set does not define → (parts with all three, notes).

    parts: {"all": examples} or {"train": …, "test": …, perhaps "val": …}; sizes: the proportion of
    train, val and test.
    """
    train_size, val_size, test_size = sizes
    parts = dict(parts)
    notes = []
    if "all" in parts:
        everything = parts.pop("all")
        count = max(1, round(len(everything) * test_size / sum(sizes)))
        parts["train"], parts["test"] = draw_patients(everything, count)
        notes.append(
            f"test: the data name no test films; {len(parts['test'])} are drawn by patient, "
            "always the same"
        )
    if not parts.get("val"):
        count = max(1, round(len(parts["train"]) * val_size / (train_size + val_size)))
        parts["train"], parts["val"] = draw_patients(parts["train"], count)
        notes.append(
            f"val: {len(parts['val'])} films held out of train by patient, always the same"
        )
    return parts, notes


def disjoint(parts: dict) -> tuple[dict, list[str]]:
    """Keep every film in one split only, test before train before val → (parts, notes).

    Repeated rows of a split count once. UserError when two rows of a film contradict each other, or
    when a patient has films in two splits.
    """
    kept = {}
    notes = []
    home = {}  # path: the split that keeps it
    for split in ("test", "train", "val"):
        examples = parts.get(split, [])
        unique = unite_repeated(examples, split)
        if len(unique) < len(examples):
            notes.append(f"{split}: {len(examples) - len(unique)} repeated rows dropped")
        for other in kept:
            shared = sum(home.get(path) == other for path in unique)
            if shared:
                notes.append(f"{split}: {shared} films removed that are in {other} too")
        kept[split] = [example for path, example in unique.items() if path not in home]
        for example in kept[split]:
            home[example.path] = split
    refuse_shared_patients(kept)
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
    return [f"warning: {len(copies)} films are in two splits under different names: {first}, ..."]


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


def unite_repeated(examples: list[Example], split: str) -> dict[Path, Example]:
    """The examples by path, each once; UserError when a film has two different labels."""
    unique = {}
    for example in examples:
        first = unique.setdefault(example.path, example)
        if first != example:
            raise UserError(
                f"{example.path.name} stands twice in {split}, with different labels: keep one row"
            )
    return unique


def refuse_shared_patients(parts: dict):
    """UserError when a patient has films in more than one split."""
    home = {}  # patient: split
    for split, examples in parts.items():
        for example in examples:
            other = home.setdefault(example.patient, split)
            if other != split:
                raise UserError(
                    f"patient {example.patient} has films in {other} and in {split} "
                    f"({example.path.name}): patients must not cross splits"
                )


def draw_few(examples, fraction=1.0, shots: int | None = None, draw=0) -> list[Example]:
    """Draw the few films of --fraction (a share of all) or --shots (so many per class).

    draw: another number draws other films. For --shots the films without any finding count as one
    more class, and a film that shows several findings counts for each of them.
    """
    if shots is None:
        if fraction >= 1:
            return examples
        count = max(1, int(fraction * len(examples)))
        chosen = numpy_rng(DRAW_FRACTION, draw).choice(len(examples), count, replace=False)
    else:
        order = numpy_rng(DRAW_SHOTS, draw).permutation(len(examples))
        chosen = set()
        for k in range(len(examples[0].target)):
            positive = [i for i in order if examples[i].target[k]]
            chosen.update(positive[:shots])
        is_free = [all(value == 0 for value in example.target) for example in examples]
        without_finding = [i for i in order if is_free[i]]
        chosen.update(without_finding[:shots])
    return [examples[i] for i in sorted(chosen)]


LACK = {  # what a class suffers from that a split shows on all of its films, or on none
    "train": "it cannot be learnt",
    "val": "it does not count in model selection",
    "test": "it has no AUROC",
}


def class_warnings(splits: Splits, which=SPLITS) -> list[str]:
    """One line for every class of which a split has no positive or no negative film."""
    if splits.kind == "mask":
        return []
    lines = []
    for split in which:
        examples = getattr(splits, split)
        for k, name in enumerate(splits.labels):
            count = tally(examples, k)
            if count[0] and count[1]:
                continue
            missing = "negative" if count[1] else "positive"
            lines.append(f"warning: {split} has no {missing} film of {name}: {LACK[split]}")
    return lines
