"""How much does an encoder know? Judged beside random weights and raw pixels, with intervals.

    python -m lab.probe --weights encoder.pt --data FILMS --table pneumonia.csv,sex.csv
    python -m lab.probe                                  # newest run, synthetic films

A linear probe is fitted to the features of the films with labels: to their mean over all patches,
and to 4 × 4 cells of the film, which keep what lies where. The same probe gets the same network
with random weights, and raw pixels at two sizes. It is a ridge regression of standardised features;
its penalty is chosen within the films of train and val, each patient left out in turn; the films of
test give the AUROC. Where those are few, all films are judged, too, each by a probe of other
patients. The 95 % interval is over patients, and two sets of features are compared on the same
redraws of patients: above or below is said where the interval of their difference leaves out 0.

Writes result.json. The AUROC is the mean over the findings of a table; where it has several, each
stands there, too, with an interval of its own.
"""

import dataclasses
import functools
import itertools

import numpy as np
import torch
import torch.nn.functional as F

from lab import common
from lab.features import pool_features
from plumbing.launch import UserError, flag, run_script
from plumbing.metrics import compare_auroc, cross_validated, ridge_scores
from plumbing.own_table import Labels, refuse_twins
from plumbing.results import percent
from plumbing.splits import patients_of
from plumbing.weights import load_encoder

RANDOM = "random initialisation"
PIXELS = {"raw 8² pixels": 8, "raw 64² pixels": 64}
CELLS = ", cells"  # follows the encoder's name; its name alone stands for the mean
FEW_TEST_FILMS = 300  # with fewer, the cross-validated figure stands beside the test split's
MANY_FILMS = 3000  # more get NUMBERS numbers each at most
NUMBERS = 1024


@dataclasses.dataclass
class Config(common.Common):
    table: str = flag(None, "CSVs filename,label,split joined by commas [that of synthetic films]")
    films: int = flag(1000, "synthetic films to draw where no --data is given")


def main(argv=None):
    args, device = common.start(Config, __doc__, "probe", argv)
    encoder = load_encoder(args.weights, say=print).to(device).eval()
    encoders = {"encoder": encoder, RANDOM: common.random_twin(encoder, args.seed)}
    films, tables = common.open_set(args, args.films)
    if not tables:
        raise UserError("--data needs --table FILE.csv, which says what to probe for")
    paths = str(tables).split(",")
    refuse_twins("--table", paths)
    tables = [Labels(path, films).complete() for path in paths]
    result = {"tables": {}}
    learnt = common.known_from(args, films)
    for table, judged in judge_tables(tables, films, encoders, encoder.image):
        seen = seen_words(learnt, table, films)
        result["tables"][table.path.stem] = {"seen": seen, **judged, "notes": table.notes}
        print(judged_words(table, judged, seen) + "\n", flush=True)
    common.finish(args, result, f"{len(tables)} tables judged")


def seen_words(learnt, table: Labels, films) -> str:
    """Say how many films of a table, or other films of their patients, were in pre-training.

    learnt: what common.trained_on says
    """
    is_there = table.where >= 0
    patients = patients_of(films, [table])
    is_seen = common.seen_by(learnt, films, patients)[table.where[is_there]]
    is_test = table.split[is_there] == "test"
    return common.seen_words(
        learnt, {"of test": is_seen[is_test], "of train and val": is_seen[~is_test]}
    )


# ---------------------------------------------------------------- features
def judge_tables(tables: list[Labels], films, encoders: dict, size: int):
    """Ask how much linear probes find in the features of each {name: ViT}, and in raw pixels.

    size: pixels of the encoders' side. One of the encoders is RANDOM. The films of all tables are
    read once.
    Yields (table, {"test": judged, "all": judged}), as `judge` gives it: of the films of test, and,
    where these are few, of all films, cross-validated.
    """
    if not tables:
        return
    present = np.unique(np.concatenate([table.where for table in tables]))
    present = present[present >= 0]
    words = f"films of {', '.join(table.path.stem for table in tables)}"
    print(f"linear probes: {len(present):,} {words}", flush=True)
    features, read = features_of_set(films, present, encoders, size, words)
    row_of = {film: row for row, film in enumerate(read)}
    pairs = pairs_of(list(encoders))
    for table in tables:
        kept = np.flatnonzero([film in row_of for film in table.where])  # there, and readable
        rows = [row_of[film] for film in table.where[kept]]
        patients = np.array(table.patients)[kept]
        about = table.y[kept], patients, table.split[kept] == "test"
        own = {name: x[rows] for name, x in features.items()}
        judged = judge_table(own, *about, pairs, table.classes)
        if all(patients == np.array(films.names)[table.where[kept]]):
            judged = {part: result | {"patients": None} for part, result in judged.items()}
        yield table, judged


def judge_table(features: dict, y, patients, is_test, pairs, findings) -> dict:
    """Fit and judge the probes of one table, whose films have these {name: features (n, d)}.

    findings: the names of the columns of y (n, c)
    """
    fit = ~is_test
    scores = {
        name: ridge_scores(x[fit], y[fit], patients[fit], x[is_test])
        for name, x in features.items()
    }
    parts = {"test": (scores, y[is_test], patients[is_test])}
    if is_test.sum() < FEW_TEST_FILMS and len(y) <= MANY_FILMS:
        scores = {name: cross_validated(x, y, patients) for name, x in features.items()}
        parts["all"] = (scores, y, patients)
    judged = {}
    for part, films in parts.items():
        judged[part] = judge(*films, pairs)
        if len(findings) > 1:
            judged[part]["findings"] = judge_each(*films, findings)
    return judged


def features_of_set(films, numbers, encoders, size, words):
    """Features of films by every encoder, and their pixels. → {name: (n, d)}, numbers read (n,)

    More than MANY_FILMS get at most NUMBERS numbers each, so that all fit into memory: the
    main directions of a sample of the films, whatever their labels.
    """
    if len(numbers) <= MANY_FILMS:
        return features_in(films, numbers, encoders, size, {}, words)
    some = common.evenly(numbers, 2 * NUMBERS)
    sample, _ = features_in(films, some, encoders, size, {}, f"a sample of the {words}")
    wide = {name: x for name, x in sample.items() if x.shape[1] > NUMBERS}
    print(f"cast onto {NUMBERS:,} main directions: {', '.join(wide)}", flush=True)
    casts = {name: main_directions(x) for name, x in wide.items()}
    return features_in(films, numbers, encoders, size, casts, words)


def features_in(films, numbers, encoders, size, casts, words):
    """The same, of few films or as casts, {name: (mean, directions)}, say."""

    def cast(features):
        for name in features.keys() & casts.keys():
            mean, directions = casts[name]
            features[name] = (features[name] - mean) @ directions
        return features

    def by_encoders(images):
        found = {}
        for name, encoder in encoders.items():
            each = pool_features(encoder, images)
            found[name] = each["mean"]
            found[name + CELLS] = each["cells"].reshape(len(images), -1)
        return cast(found)

    def by_pixels(images):
        shrink = functools.partial(F.interpolate, mode="bilinear", antialias=True)
        sides = PIXELS.items()
        return cast({name: shrink(images, (side, side)).flatten(1).numpy() for name, side in sides})

    features, read, _ = common.map_films(by_encoders, films, numbers, size, words, batch=128)
    largest = max(PIXELS.values())
    pixels, _, _ = common.map_films(by_pixels, films, read, largest, words, batch=128)
    return features | pixels, read


def main_directions(features):
    """The mean (d,) of features (n, d), and the NUMBERS directions (d, k) of most variance."""
    mean = features.mean(0)
    x = torch.from_numpy(features - mean).double()
    squares, turned = torch.linalg.eigh(x @ x.mT)  # the least first
    kept = squares > 1e-10 * squares.max()
    kept[:-NUMBERS] = False
    return mean, (x.mT @ (turned[:, kept] / squares[kept].sqrt())).float().numpy()


# ---------------------------------------------------------------- values, differences, words
def pairs_of(encoders: list) -> list[tuple]:
    """Who is compared with whom: every encoder with random weights, and all with pixels."""
    pairs = []
    for name, pooling in itertools.product(encoders, ("", CELLS)):
        others = list(PIXELS) if name == RANDOM else [RANDOM + pooling, *PIXELS]
        pairs += [(name + pooling, other) for other in others]
    return pairs


def judge(scores: dict, truth, patients, pairs) -> dict:
    """Judge scores {features: (n, c)} of films, and compare pairs of them. → what is written down

    films, patients: how many; the caller sets patients to None where nobody knows them. values
    {features: percent}, intervals {features: [low, high]}; differences {features: {other:
    {difference, interval, word}}}, where of the sets of pixels only the better one is kept. None
    where something is undefined.
    """
    values, differences = compare_auroc(scores, truth, patients, pairs)
    best = max(PIXELS, key=lambda name: np.nan_to_num(values[name][0]))
    kept = {}
    for (one, other), row in differences.items():
        if other not in PIXELS or other == best:
            value, interval = in_percent(row)
            told = {"difference": value, "interval": interval, "word": word(interval)}
            kept.setdefault(one, {})[other] = told
    rows = {name: in_percent(row) for name, row in values.items()}
    return {
        "films": len(truth),
        "patients": len(set(patients)),
        "values": {name: value for name, (value, _) in rows.items()},
        "intervals": {name: interval for name, (_, interval) in rows.items()},
        "differences": kept,
    }


def judge_each(scores: dict, truth, patients, findings) -> dict:
    """Judge every finding alone. → {finding: {features: {value, interval}}}, as `judge` has them"""
    judged = {}
    for k, finding in enumerate(findings):
        alone = {name: each[:, [k]] for name, each in scores.items()}
        values, _ = compare_auroc(alone, truth[:, [k]], patients)
        rows = {name: in_percent(row) for name, row in values.items()}
        judged[finding] = {name: {"value": v, "interval": i} for name, (v, i) in rows.items()}
    return judged


def in_percent(row):
    """(value, low, high) → value in percent, [low, high] in percent; None where undefined."""
    value, low, high = map(percent, row)
    return value, None if low is None else [low, high]


def word(interval) -> str:
    """Say what an interval of a difference means: above, level with, below, or unknown."""
    if interval is None:
        return "unknown"
    if interval[0] > 0:
        return "above"
    return "below" if interval[1] < 0 else "level with"


def judged_words(table: Labels, judged: dict, seen: str) -> str:
    """The result of a table in words. seen: what the encoders know of these films."""
    lines = [f"linear probe on {table.path.stem} ({', '.join(table.classes)}); {seen}"]
    words = {
        "test": "test films, judged by a probe fitted to train and val",
        "all": "films, all that have labels, each judged by a probe fitted to other ",
    }
    words["all"] += "films" if judged["test"]["patients"] is None else "patients"
    for part, result in judged.items():
        lines.append(f"{result['films']:,} {words[part]}; {patients_words(result)}")
        lines.append(table_of(result))
    return "\n".join(lines)


def patients_words(judged: dict) -> str:
    """Say how many patients were judged, or that nobody knows them."""
    if judged["patients"] is None:
        return "patients unknown: every film counts as one"
    return f"{judged['patients']:,} patients"


def table_of(result: dict) -> str:
    """The table of what `judge` says, a line per set of features."""
    heads = ["", "AUROC %", "95 % interval"]
    heads += [
        f"{other} (difference, its interval)" for other in ("random weights", "better raw pixels")
    ]
    return common.columns([heads, *(cells_of(result, name) for name in result["values"])])


def cells_of(result: dict, name: str) -> list[str]:
    """Name, value, interval and comparisons of one set of features, in words."""
    value = result["values"][name]
    against = {"random": "", "raw": ""}
    for other, told in result["differences"].get(name, {}).items():
        difference = "" if told["difference"] is None else f"{told['difference']:+.1f}, "
        words = f"{told['word']} ({difference}{bounds(told['interval'], '+')})"
        against["raw" if other in PIXELS else "random"] = words
    shown = "undefined" if value is None else f"{value:.1f}"
    # Where all redraws say the same, as of films told apart without error, that tells of no others.
    interval = result["intervals"][name]
    interval = interval if interval and interval[0] < interval[1] else None
    return [name, shown, bounds(interval), *against.values()]


def bounds(interval, sign="") -> str:
    """Write an interval: '78.1 to 89.9'."""
    return " to ".join(f"{bound:{sign}.1f}" for bound in interval) if interval else "no interval"


if __name__ == "__main__":
    run_script(main)
