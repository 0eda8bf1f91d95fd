"""lab.health"""

import dataclasses

import numpy as np
import torch

from lab.common import Common, find_weights, finish, open_set, pooled, run_command, some_films
from lab.report import probe_table
from model import ViT
from plumbing import pictures
from plumbing.checkpoint import load_checkpoint, read_log
from plumbing.launch import UserError, flag, run_script
from plumbing.metrics import feature_std, rankme, spectrum
from plumbing.table import Labels
from plumbing.weights import load_encoder


@dataclasses.dataclass
class Config(Common):
    films: int = flag(400, "films to look at, evenly from all")
    table: str = flag(
        None, "CSV filename,label,split: a linear probe against random weights and raw pixels"
    )


# ------------------------------------------------------------------------------------------------ health
def command(config, device):
    """Is the encoder collapsed? Variety of its pooled features against the same network with random weights; a linear probe where labels are known."""
    path = find_weights(config)
    encoder = load_encoder(path)
    torch.manual_seed(config.seed)
    encoders = {"target encoder": encoder, "random weights": ViT(**encoder.config)}
    if "world" in load_checkpoint(path):
        encoders["context encoder"] = load_encoder(path, "context")
    broken = [
        name
        for name, vit in encoders.items()
        if not all(torch.isfinite(p).all() for p in vit.parameters())
    ]
    if broken:
        raise UserError(
            f"{path}: the {broken[0]} holds NaN or infinite weights: go back to an older checkpoint, lower --lr or train in float32"
        )
    encoders = {name: vit.to(device).eval() for name, vit in encoders.items()}
    films, table = open_set(config, 3 * config.films)
    images = some_films(films, None, config.films, encoder.image)
    features = {name: pooled(vit, images).numpy() for name, vit in encoders.items()}
    result = {"films": len(images), **{name: variety(f) for name, f in features.items()}}
    lines = [
        f"{len(images)} films, pooled features of {encoder.dim} dimensions",
        f"  {'':18s}{'std':>8s}{'RankMe':>8s}{'mean cosine':>13s}{'first direction':>17s}",
    ]
    for name in encoders:
        row = result[name]
        lines.append(
            f"  {name:18s}{row['feature_std']:8.3f}{row['rankme']:8.2f}{row['mean_cosine']:13.3f}{row['first_direction']:16.1%}"
        )
    if table:
        labels = Labels(table).complete()
        result["probe"] = probe_table(labels, films, encoders, encoder.image)
        lines += [f"linear probe on {labels.path.stem}, test AUROC, percent"] + [
            f"  {n:18s}{v:8.2f}" for n, v in result["probe"].items()
        ]
    result["verdict"] = verdict(
        result["target encoder"], result["random weights"], result.get("probe")
    )
    lines += ["verdict: " + result["verdict"]]
    values = {
        name: (v := spectrum(f - f.mean(0)))[v > 1e-6] for name, f in features.items()
    }  # centring takes one direction away
    pages = [
        pictures.curves(
            {name: (np.arange(1, 1 + len(v)), v) for name, v in values.items()},
            "Singular values of the centred features",
            "direction",
            "share",
            log_y=True,
        )
    ]
    rows = [r for r in read_log(path.with_name("log.csv")) if r.get("loss") and r.get("rankme")]
    if len(rows) > 1:
        read = lambda key: ([float(r["step"]) for r in rows], [float(r[key]) for r in rows])
        for key, name, unit in (
            ("loss", "Loss", "squared error"),
            ("rankme", "RankMe", "effective rank"),
        ):
            pages.append(pictures.curves({name: read(key)}, f"{name} in training", "step", unit))
    finish(config, result, "\n".join(lines), health=pictures.stack(pages))


def variety(features):
    """How different the films look to an encoder: std, RankMe, mean cosine between two films, share of the first centred direction. (n, D) → dict"""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)
    n = len(unit)
    cosine = (np.square(unit.sum(0)).sum() - n) / max(
        1, n * (n - 1)
    )  # mean over all pairs of different films
    return {
        "feature_std": feature_std(features),
        "rankme": rankme(features),
        "mean_cosine": float(cosine),
        "first_direction": float(spectrum(features - features.mean(0))[0]),
    }


def verdict(own, fresh, probe):
    """One sentence for a worried user."""
    if own["feature_std"] < 0.02 or own["rankme"] < 1.5:
        return "collapsed: the encoder says nearly the same of every film. Train again with a lower --lr, a higher --ema or a longer --warmup"
    if probe and probe["target encoder"] < probe["random weights"] - 1:
        return "not collapsed, yet it knows less than random weights do: too short a training, or films unlike those of the table"
    if own["rankme"] < fresh["rankme"] and own["feature_std"] < fresh["feature_std"]:
        return "suspicious: less variety than random weights have. Normal in the first tenth of a training; later, lower --lr or raise --ema"
    more = probe and probe["target encoder"] > probe["random weights"]
    return "healthy: films differ in many directions" + (
        ", and a probe finds more than in random weights" if more else ""
    )


if __name__ == "__main__":
    run_script(lambda: run_command(Config, command, "health"))
