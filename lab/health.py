"""Is the encoder collapsed? How various its features are, against the same network with random
weights.

    python -m lab.health                                     # newest run, synthetic films
    python -m lab.health --weights encoder.pt --data FILMS

The pooled features of many films should spread in many directions. A collapsed encoder says nearly
the same of every film: small standard deviation, RankMe near 1, mean cosine near 1. Whether the
features know anything is asked by lab.probe.

Writes result.json (with a verdict in words) and health.png: the spectrum, and the run's own curves.
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch

from lab import common
from lab.features import pool_features
from lab.probe import RANDOM
from lab.report import curves_picture
from plumbing import pictures
from plumbing.checkpoint import load_checkpoint, read_log
from plumbing.launch import UserError, flag, run_script
from plumbing.metrics import feature_std, rankme, spectrum
from plumbing.weights import load_encoder

COLLAPSED = """collapsed: the encoder says nearly the same of every film. \
Train again with a lower --lr, a higher --ema or a longer --warmup"""
SUSPICIOUS = """suspicious: less than half the variety (RankMe) that random weights have. \
Normal in the first tenth of a training; later, lower --lr or raise --ema"""
HEALTHY = "not collapsed: films differ in many directions; what they tell is asked by lab.probe"


@dataclasses.dataclass
class Config(common.Common):
    films: int = flag(400, "films to look at, evenly from all")


def main(argv=None):
    args, device = common.start(Config, __doc__, "health", argv)
    encoders = load_encoders(args.weights, args.seed)
    size = encoders["target encoder"].image
    encoders = {name: vit.to(device).eval() for name, vit in encoders.items()}
    films, _ = common.open_set(args, args.films)
    numbers = common.evenly(common.named(args.table, films), args.films)

    def means(images):
        return {name: pool_features(vit, images)["mean"] for name, vit in encoders.items()}

    features, read, _ = common.map_films(means, films, numbers, size)
    rows = {name: variety(values) for name, values in features.items()}
    said = verdict(rows["target encoder"], rows[RANDOM])
    words = (
        f"{len(read)} films, pooled features of {encoders['target encoder'].dim} dimensions\n"
        f"{variety_table(rows)}\nverdict: {said}"
    )
    page = health_picture(features, read_log(Path(args.weights).with_name("log.csv")))
    common.finish(args, {"films": len(read), **rows, "verdict": said}, words, health=page)


def load_encoders(path, seed):
    """Load the encoders of a checkpoint, and the same network with random weights beside them.

    → {name: ViT}. UserError when one of them holds NaN or infinite weights.
    """
    encoder = load_encoder(path, say=print)
    encoders = {"target encoder": encoder, RANDOM: common.random_twin(encoder, seed)}
    if "world" in load_checkpoint(path):
        encoders["context encoder"] = load_encoder(path, "context")
    for name, vit in encoders.items():
        if not all(torch.isfinite(p).all() for p in vit.parameters()):
            advice = "go back to an older checkpoint, lower --lr or train in float32"
            raise UserError(f"{path}: the {name} holds NaN or infinite weights: {advice}")
    return encoders


# ---------------------------------------------------------------- variety
def variety(features):
    """Measure how different the films look to an encoder. (n, D) → feature_std, rankme, mean cosine
    between two films, share of the first direction of the centred features
    """
    unit = features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)
    n = len(unit)
    pairs = n * (n - 1)  # of different films; the sum over all pairs also holds n cosines of 1
    cosine = (np.square(unit.sum(0)).sum() - n) / max(1, pairs)
    return {
        "feature_std": feature_std(features),
        "rankme": rankme(features),
        "mean_cosine": float(cosine),
        "first_direction": float(spectrum(features - features.mean(0))[0]),
    }


def variety_table(rows):
    """The measures of {encoder: variety} in words. → text"""
    lines = [["", "std", "RankMe", "mean cosine", "first direction"]]
    for name, row in rows.items():
        lines.append([name, *(f"{value:.3f}" for value in row.values())])
    return common.columns(lines)


def verdict(own, fresh):
    """Say in one sentence what a worried user should think and do.

    own, fresh: variety of the encoder and of random weights
    """
    if own["feature_std"] < 0.02 or own["rankme"] < 1.5:
        return COLLAPSED
    # Encoders whose probe stood above that of random weights had 0.7 and more of their RankMe, and
    # 0.6 of their std; one that stood below had 0.3, one that was level 0.4 (docs/results.md).
    if own["rankme"] < fresh["rankme"] / 2:
        return SUSPICIOUS
    return HEALTHY


# ---------------------------------------------------------------- picture
def health_picture(features, log):
    """Draw the spectrum of each encoder's features, and loss and RankMe of the run's log."""
    values = {}
    for name, each in features.items():
        share = spectrum(each - each.mean(0))
        share = share[share > 1e-6]  # centring takes one direction away
        values[name] = (np.arange(1, 1 + len(share)), np.log10(share))
    title = "Singular values of the centred features"
    pages = [pictures.curves(values, title, "direction", "log10 of the share")]
    rows = [row for row in log if row.get("loss") and row.get("rankme")]
    if len(rows) > 1:
        pages.append(curves_picture(rows, ["loss"]))
    return pictures.stack(pages)


if __name__ == "__main__":
    run_script(main)
