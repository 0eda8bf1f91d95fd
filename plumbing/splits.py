"""plumbing.splits"""

from dataclasses import dataclass, field

import numpy as np

from plumbing.launch import UserError
from plumbing.table import SPLITS


def split_films(films, tables, config):
    """Training films and held-out ones, no patient on both sides. Test films of the probe tables are held out, else `holdout` films. → (train, held)"""
    patients = list(films.patients)
    held = set()
    for table in tables:
        where = table.locate(films)
        for i, patient in zip(where, table.patients):
            if (
                i >= 0 and patients[i] == films.names[i] and patient not in table.names
            ):  # the folder knew nobody: the table may
                patients[i] = patient
        held |= {int(i) for i in where[(table.split == "test") & (where >= 0)]}
    if not tables:
        order = np.random.default_rng((3, config.seed)).permutation(len(films))
        held = {int(i) for i in order[: min(config.holdout, len(films) // 10)]}
    away = {patients[i] for i in held}
    train = [i for i in range(len(films)) if patients[i] not in away]
    if not train:
        raise UserError(
            "every film is held out: nothing is left to train on; lower --holdout or check --probe"
        )
    if len(train) < config.batch:
        raise UserError(
            f"{len(train)} films to train on are fewer than one batch: lower --batch {config.batch} or add films"
        )
    return np.array(train), np.array(sorted(held), dtype=int)


@dataclass
class Splits:
    """The films of a task by split, and what was decided on the way. drawn: train is already the few-shot draw."""

    task: str
    kind: str
    labels: tuple
    train: list
    val: list
    test: list
    notes: list = field(default_factory=list)
    drawn: bool = False

    def counts(self):
        """{split: {films, patients, positive: {label: films}}}; for segmentation without positive (masks are read later)."""
        out = {}
        for split in SPLITS:
            cases = getattr(self, split)
            out[split] = {"films": len(cases), "patients": len({c.patient for c in cases})}
            if self.kind != "mask":
                out[split]["positive"] = {
                    name: int(sum(c.target[k] for c in cases)) for k, name in enumerate(self.labels)
                }
        return out


def hold_out(cases, count):
    """Cases → (the rest, about `count` cases of whole patients): a fixed draw, permutation 42 of the patients in file order as in the paper's VinDr split."""
    films = {}
    for c in cases:
        films[c.patient] = films.get(c.patient, 0) + 1
    patients, out, taken = list(films), set(), 0
    for p in np.random.RandomState(42).permutation(len(patients)):
        if taken >= count:
            break
        out.add(patients[p])
        taken += films[patients[p]]
    return [c for c in cases if c.patient not in out], [c for c in cases if c.patient in out]


def complete(parts, sizes):
    """Draw the splits that the set does not define, in the proportion of sizes (train, val, test). → parts, notes"""
    notes, parts = [], dict(parts)
    if "all" in parts:
        everything = parts.pop("all")
        parts["train"], parts["test"] = hold_out(
            everything, max(1, round(len(everything) * sizes[2] / sum(sizes)))
        )
        notes.append(
            f"test: no official lists beside the data; {len(parts['test'])} films drawn by patient, always the same"
        )
    if not parts.get("val"):
        parts["train"], parts["val"] = hold_out(
            parts["train"], max(1, round(len(parts["train"]) * sizes[1] / (sizes[0] + sizes[1])))
        )
        notes.append(
            f"val: {len(parts['val'])} films held out of train by patient, always the same"
        )
    return parts, notes


def disjoint(parts):
    """Drop repeated films: inside a split, in val what train holds, in both what test holds; Stop when rows contradict or a
    patient crosses. → parts, notes"""
    out, notes, home, patients = {}, [], {}, {}
    for split in ("test", "train", "val"):
        unique = {}
        for c in parts.get(split, []):
            if unique.setdefault(c.path, c) != c:
                raise UserError(
                    f"{c.path.name} stands twice in {split}, with different labels: keep one row"
                )
        repeated = len(parts.get(split, [])) - len(unique)
        notes += [f"{split}: {repeated} repeated rows dropped"] * bool(repeated)
        shared = {other: sum(home.get(p) == other for p in unique) for other in out}
        notes += [
            f"{split}: {n} films removed that are in {other} too"
            for other, n in shared.items()
            if n
        ]
        out[split] = [c for p, c in unique.items() if p not in home]
        home |= {p: split for p in unique if p not in home}
        for c in out[split]:
            if patients.setdefault(c.patient, split) != split:
                raise UserError(
                    f"patient {c.patient} has films in {patients[c.patient]} and in {split} ({c.path.name}): patients must not cross splits"
                )
    return out, notes


def draw_few(cases, fraction=1.0, shots=None, seed=0):
    """Training cases for --fraction (that share of the films) or --shots (that many films of every class, 'none' counting as one), torch_generator by seed."""
    if shots is None:
        count = max(1, int(fraction * len(cases)))
        return (
            cases
            if fraction >= 1
            else [
                cases[i]
                for i in sorted(
                    np.random.default_rng((seed, 7)).choice(len(cases), count, replace=False)
                )
            ]
        )
    order, chosen, classes = (
        np.random.default_rng((seed, 8)).permutation(len(cases)),
        set(),
        len(cases[0].target),
    )
    for k in range(classes + 1):
        chosen |= set(
            [i for i in order if (cases[i].target[k] if k < classes else not any(cases[i].target))][
                :shots
            ]
        )
    return [cases[i] for i in sorted(chosen)]


def class_warnings(splits, which=SPLITS):
    """One line for every class that cannot be learnt or judged because a split lacks its positives or negatives."""
    lines, why = (
        [],
        {
            "train": "it cannot be learnt",
            "val": "it does not count in model selection",
            "test": "it has no AUROC",
        },
    )
    for split in which:
        cases = getattr(splits, split)
        for k, name in enumerate(splits.labels if splits.kind != "mask" else ()):
            positive = sum(c.target[k] for c in cases)
            if positive in (0, len(cases)):
                lines.append(
                    f"warning: {split} has no {'negative' if positive else 'positive'} film of {name}: {why[split]}"
                )
    return lines
