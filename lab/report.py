"""The closing tables of a training: how good did it become, and against what?

Not a program: the last act of pretrain.py and of finetune.py. Of a pre-training it writes
result.json (domain sensitivity test and linear probes, in percent) and curve.png into the folder of
the run, and prints both tables; beside a fine-tuned model it judges linear probes of the same
films. It also tells finetune.py whether pre-training saw the films that it will be tested on.
"""

import itertools
import time

import numpy as np
from torch.utils.data import ConcatDataset

from lab.common import (
    evenly,
    random_twin,
    read_whole,
    run_of,
    seen_by,
    seen_words,
    trained_on,
)
from lab.domain import domain_test, result_table
from lab.probe import (
    CELLS,
    MANY_FILMS,
    PIXELS,
    RANDOM,
    features_of_set,
    judge,
    judge_tables,
    judged_words,
    pairs_of,
    patients_words,
    table_of,
)
from plumbing import pictures
from plumbing.checkpoint import made_with, read_log, write_json
from plumbing.launch import UserError
from plumbing.metrics import ridge_scores
from plumbing.pack import Films
from plumbing.results import name_of

SEEN = "pre-training saw no test film; it saw all others, without labels"
CONTINUED = "this run saw no test film, all others without labels; what --weights saw is unknown"
PRETRAINED = "pre-trained"
MODEL = "the model"
START = "starting encoder"
DOMAIN_FILMS = 50  # at most so many held-out films in the domain sensitivity test


def judge_on_held_out(args, out, world, films, held, tables):
    """Judge a trained CheXWorld on films it has not seen: by the domain sensitivity test, and by
    linear probes against random weights and raw pixels.

    args: those of pretrain.py; held: numbers of the held-out films; tables: the Labels to probe.
    """
    world.eval()
    log = read_log(out / "log.csv")
    result = {"step": int(log[-1]["step"]) if log else None}  # None: the disk took no log
    result |= {"domain": domain_part(world, films, held), "probe": {}, "probe_intervals": {}}
    result["made_with"] = made_with()
    write_json(out / "result.json", result)  # kept when a probe fails or is interrupted
    encoder = world.target_encoder
    encoders = {PRETRAINED: encoder, RANDOM: random_twin(encoder, args.seed)}
    seen = CONTINUED if args.weights else SEEN
    for table, judged in judge_tables(tables, films, encoders, args.image):
        result["probe"][table.path.stem] = judged["test"]["values"]
        result["probe_intervals"][table.path.stem] = judged
        result.setdefault("notes", {})[table.path.stem] = table.notes
        print(judged_words(table, judged, seen))
    write_json(out / "result.json", result)
    curves = curves_picture(log, world.loss_names)
    pictures.save_or_warn(curves, out / "curve.png")
    print(
        f"curves {out}/curve.png, views {out}/views.png, weights {out}/encoder.pt, "
        f"all numbers {out}/result.json"
    )


def domain_part(world, films, held):
    """Run and print the domain sensitivity test on held-out films. → its result, {} without any"""
    if world.pixel_weight == 1:
        print("\nno domain sensitivity test: --pixels 1 trains no prediction of features")
        return {}
    images, _, unreadable = read_whole(films, evenly(held, DOMAIN_FILMS), world.encoder.image)
    for name, reason in unreadable.items():
        print(f"bad film, left out of the domain test: {name}: {reason}")
    if not len(images):
        return {}
    result = domain_test(world, images)
    print(f"\nheld-out films: {result_table(result)}")
    return result


def column(rows, key):
    """A column of log.csv where it is filled. → (steps, values)"""
    filled = [row for row in rows if row.get(key)]
    return [float(row["step"]) for row in filled], [float(row[key]) for row in filled]


def curves_picture(rows, losses):
    """Draw the losses of these names, and RankMe, of a log against its steps."""
    losses = {name: column(rows, name) for name in losses}
    losses = {name: curve for name, curve in losses.items() if curve[0]}
    rank = {"RankMe": column(rows, "rankme")}
    title = "RankMe of the pooled target features"
    return pictures.stack(
        [
            pictures.curves(losses, "loss terms", "step", "squared error"),
            pictures.curves(rank, title, "step", "effective rank"),
        ]
    )


# ---------------------------------------------------------------- a fine-tuned model
def seen_in_pretraining(weights, root, examples) -> list[str]:
    """Say how many test films, or their patients, the pre-training of the weights saw unlabelled.

    examples: the test films, which are compared by their names below `root`, --data.
    → one line, and a warning where some were seen
    """
    films = Films(root, {name_of(film.path, root): film.patient for film in examples}, [], 0, [])
    try:
        learnt = trained_on(weights, films, of_all=False)
        run = run_of(weights)
    except UserError:  # a damaged last.pt or config.json; the weights may be good all the same
        learnt = None
    is_seen = seen_by(learnt, films, np.array(films.patients))
    words = seen_words(learnt, {"of test": is_seen})
    if learnt is None:
        return [words]
    if run.get("weights"):
        words += "; what its --weights saw is unknown"
    if not is_seen.any():
        return [words]
    return [
        words,
        "warning: new films may be harder than test films that pre-training saw. Give the table of "
        "labels a column split and pre-train with --probe TABLE, which leaves out its test films "
        "and all films of their patients",
    ]


class Together(ConcatDataset):
    """The films of a task's splits, {split: films}, one after the other, without their masks."""

    def __init__(self, films: dict):
        super().__init__([films[split] for split in ("train", "val", "test")])
        self.examples = list(itertools.chain(*(part.examples for part in self.datasets)))
        self.names = list(itertools.chain(*(part.names for part in self.datasets)))

    def __getitem__(self, number):
        film, _ = super().__getitem__(number)
        return film


def why_not_beside(kind: str, films: dict, is_over: bool, out) -> str | None:
    """Say why a model is not judged by `beside`: None where it is, "" where no word is needed.

    is_over: whether all seeds have ended their training; out: folder with films.csv
    """
    if kind == "mask":
        return ""
    if sum(map(len, films.values())) > MANY_FILMS:
        return (
            f"of more than {MANY_FILMS:,} films no linear probes are made beside the model; they "
            f"take: python -m lab.probe --weights FILE --data FOLDER --table {out}/films.csv"
        )
    if not is_over:
        return "linear probes beside the model are made when the training is over"
    return None


def beside(films, seed_scores, vit, is_random: bool, seed: int, pool: str, are_few=False) -> dict:
    """Judge a fine-tuned model beside linear probes of the films that it has learnt from.

    films: {"train", "val", "test"}; seed_scores, for each seed {number of the test film: (c,)};
    vit: the encoder that fine-tuning started from; is_random: whether its weights are random; seed:
    of the random twin that is judged beside it when they are not; pool: what the model sees of the
    tokens, mean or cells; are_few: whether train was cut down, as by --shots. The probes are those
    of lab.probe, of train and, unless these are few, of val, judged on the films of test that all
    could read. The model's AUROC is the mean over its seeds, and so is its difference to others.
    → what lab.probe.judge says
    """
    start = time.perf_counter()
    encoders = {RANDOM: vit}
    if not is_random:
        encoders = {START: vit, RANDOM: random_twin(vit, seed)}
    together = Together(films)
    everything = np.arange(len(together))
    features, read = features_of_set(together, everything, encoders, vit.image, "films")

    first = len(together) - len(films["test"])  # number of the first test film
    tested = [first + i for i in set.intersection(*map(set, seed_scores))]
    is_fit = read < (len(films["train"]) if are_few else first)
    is_test = np.isin(read, tested)
    y = np.array([together.examples[i].truth for i in read], float)  # (n, c)
    patients = np.array([together.examples[i].patient for i in read])
    scores = {MODEL: np.array([[rows[i - first] for rows in seed_scores] for i in read[is_test]])}
    for name, x in features.items():
        probe = ridge_scores(x[is_fit], y[is_fit], patients[is_fit], x[is_test])  # (m, c)
        scores[name] = np.repeat(probe[:, None], len(seed_scores), 1)  # (m, seeds, c)
    # The seeds count as further labels, over which judge takes the mean.
    truth = np.repeat(y[is_test][:, None], len(seed_scores), 1)
    scores = {name: rows.reshape(len(truth), -1) for name, rows in scores.items()}
    untrained = RANDOM + CELLS if pool == "cells" else RANDOM  # under the model's own kind of head
    pairs = [(MODEL, other) for other in (untrained, *PIXELS)] + pairs_of(list(encoders))
    judged = judge(scores, truth.reshape(len(truth), -1), patients[is_test], pairs)
    if not any(film.has_patient for film in films["test"].examples):
        judged["patients"] = None
    fitted_to = f"the {is_fit.sum():,} films of {'train' if are_few else 'train and val'}"
    print(beside_words(judged, fitted_to, is_random, time.perf_counter() - start), flush=True)
    return judged


def beside_words(judged: dict, fitted_to: str, is_random: bool, seconds: float) -> str:
    """The result of `beside` in words.

    fitted_to: the films that the probes learnt from; is_random: whether the model began with random
    weights.
    """
    began = "random weights" if is_random else "the weights of the starting encoder"
    (untrained,) = judged["differences"][MODEL].keys() - set(PIXELS)
    return (
        f"beside the model: linear probes of {fitted_to}, judged on "
        f"{judged['films']:,} of test; {patients_words(judged)} ({seconds:.0f} s)\n"
        f"{table_of(judged)}\n"
        f"The model began with {began} and learnt from train; val chose its step or its penalty. "
        f"It is compared with '{untrained}'. The probes are ridge regressions of {fitted_to}."
    )
