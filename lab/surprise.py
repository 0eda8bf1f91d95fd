"""Surprise: which films, and where in them, does the world model not believe?

Two questions a film, answered a patch: predict the whole from the whole under the identity action, and predict what a block hides from
everything around it, the block swept over the film. Reference films say what is usual at each place; a conformal p-value says how rare
a film's surprise is among them: the share of calibration films, the film itself included, that surprise at least as much.
"""

import csv
import dataclasses
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import augment
from data import open_films
from lab.common import (
    OTHER_PATIENTS,
    Common,
    evenly,
    find_weights,
    finish,
    named,
    pooled,
    read_whole,
    rows_of,
    run_command,
)
from model import take
from plumbing import phantom, pictures
from plumbing.checkpoint import write_text
from plumbing.launch import UserError, flag, run_script
from plumbing.metrics import auroc
from plumbing.table import NEGATIVE
from plumbing.weights import load_world

PLANTED = ("mirrored heart", "missing lung", "sideways", "inverted", "corner")


@dataclasses.dataclass
class Config(Common):
    films: int = flag(1000000, "at most so many films of --data, evenly from all")
    reference: str = flag(
        None, "folder of films that are as they should be [each half of --data judges the other]"
    )
    references: int = flag(
        400,
        "at most so many reference films, evenly from all; half say what is usual, half calibrate the p-values",
    )
    alpha: float = flag(
        0.05,
        "films with a p-value up to this are flagged: the share of good films flagged in error",
    )
    table: str = flag(
        None,
        "CSV filename,label (normal or what is wrong): AUROC of the surprise against simple baselines",
    )


def windows(grid, share=0.16):
    """Square blocks sweeping an n × n grid at half their side; each as a bool (W, N), True = hidden. Area share as in training (0.15 to 0.2)."""
    side = max(1, round(grid * share**0.5))
    starts = sorted({*range(0, grid - side, max(1, side // 2)), grid - side})
    hidden = torch.zeros(len(starts), len(starts), grid, grid, dtype=torch.bool)
    for r, top in enumerate(starts):
        for c, left in enumerate(starts):
            hidden[r, c, top : top + side, left : left + side] = True
    return hidden.flatten(0, 1).flatten(1)


@torch.no_grad()
def errors(world, images):
    """Squared prediction error a patch, mean over width. (B, 1, H, W) → whole (B, N), swept (B, N): the mean over the blocks that hide a patch."""
    device = next(world.parameters()).device
    images = images.to(device)
    identity = torch.tensor(augment.IDENTITY, device=device).expand(len(images), 4)
    truth = world.targets(images)
    whole = (world.predict(images, identity).float() - truth).square().mean(-1)
    swept, times = torch.zeros_like(whole), torch.zeros_like(whole[0])
    at = world.coords.expand(len(images), -1, -1)
    for hidden in windows(world.encoder.grid).to(device):
        keep, masked = (
            (~hidden).nonzero()[:, 0].expand(len(images), -1),
            hidden.nonzero()[:, 0].expand(len(images), -1),
        )
        guess = world.predictor(
            world.encoder(images, keep), take(at, keep), take(at, masked), identity
        )
        swept[:, hidden] += (guess.float() - truth[:, hidden]).square().mean(-1)
        times += hidden
    return whole.cpu().numpy(), (swept / times).cpu().numpy()


def watch(world, films, numbers, words, batch=32):
    """Errors of many films, batch by batch, and what the baselines look at.

    → ({whole, swept (n, N), features (n, D), pixels (n, 2)}, numbers of the readable films (n,), {bad film: reason})
    """
    parts, good, bad = [], [], {}
    for start in tqdm(range(0, len(numbers), batch), desc=words, leave=False):
        images, here, failed = read_whole(
            films, numbers[start : start + batch], world.encoder.image
        )
        bad |= failed
        if len(here):
            whole, swept = errors(world, images)
            parts.append(
                (
                    whole,
                    swept,
                    pooled(world.target_encoder, images).numpy(),
                    pixel_statistics(images),
                )
            )
            good.extend(here)
    if not good:
        raise UserError(
            f"none of {len(bad)} films of the {words} can be read; python data.py check --data … says why"
        )
    return (
        dict(
            zip(
                ("whole", "swept", "features", "pixels"),
                (np.concatenate(p).astype(float) for p in zip(*parts)),
            )
        ),
        np.array(good),
        bad,
    )


def unusual(fitting, found):
    """How far the logarithm of each patch's error lies above what the fitting films show at that patch, in units of their spread; median and
    quantiles, so that a few odd films among them do no harm. (m, N), (n, N) → z (n, N)"""
    logs = np.log(fitting + 1e-12)
    low, middle, high = np.quantile(logs, (0.16, 0.5, 0.84), axis=0)
    return (np.log(found + 1e-12) - middle) / ((high - low) / 2 + 1e-3)


def conformal_p(reference, scores):
    """p = (1 + number of calibration scores ≥ the film's) / (m + 1): P(p ≤ α) ≤ α for films like the m calibration films. (m,), (n,) → (n,)"""
    ordered = np.sort(np.asarray(reference, float))
    at_least = len(ordered) - np.searchsorted(ordered, np.asarray(scores, float), side="left")
    return (1 + at_least) / (len(ordered) + 1)


def knn_distance(fitting, features, k=5):
    """Mean Euclidean distance to the k nearest fitting films, dimensions standardised. (m, D), (n, D) → (n,)"""
    fitting, features = np.asarray(fitting, float), np.asarray(features, float)
    mean, std = fitting.mean(0), fitting.std(0) + 1e-9
    a, b = (torch.tensor((x - mean) / std) for x in (features, fitting))
    return torch.cdist(a, b).topk(min(k, len(b)), largest=False).values.mean(1).numpy()


def pixel_statistics(images):
    """The simplest description: mean and standard deviation of the grey values. (n, 1, H, W) → (n, 2)"""
    flat = images.flatten(1).double()
    return torch.stack([flat.mean(1), flat.std(1)], 1).numpy()


def mahalanobis(fitting, values):
    """Distance from the fitting films' mean in units of their spread. (m, d), (n, d) → (n,)"""
    spread = np.linalg.pinv(np.cov(fitting.T) + 1e-12 * np.eye(fitting.shape[1]))
    away = values - fitting.mean(0)
    return np.sqrt(np.einsum("nd,de,ne->n", away, spread, away))


def judge(fitting, calibration, films):
    """Three sets of films, each what watch found → {measure: (scores of the calibration films, scores of the films)}.

    `surprise` is the measure to use; its parts and the baselines stand beside it.
    """

    def scores(x):
        above = {
            key: np.square(np.maximum(unusual(fitting[key], x[key]), 0)).mean(1)
            for key in ("whole", "swept")
        }  # one very wrong place weighs
        return {
            "surprise": (above["whole"] + above["swept"]) / 2,
            "whole film alone": above["whole"],
            "swept blocks alone": above["swept"],
            "plain mean error": (x["whole"] + x["swept"]).mean(1),
            "nearest neighbours": knn_distance(fitting["features"], x["features"]),
            "pixel mean and std": mahalanobis(fitting["pixels"], x["pixels"]),
        }

    usual, found = scores(calibration), scores(films)
    return {name: (usual[name], found[name]) for name in found}


def fold(usual, found, rng):
    """Judge found films by usual ones, half of which fit and half calibrate. → {measure: (calibration scores, film scores, p-values)}, z (n, N)"""
    fit, calibrate = (
        {key: value[half] for key, value in usual.items()}
        for half in np.array_split(rng.permutation(len(usual["pixels"])), 2)
    )
    scores = {
        name: (reference, own, conformal_p(reference, own))
        for name, (reference, own) in judge(fit, calibrate, found).items()
    }
    return scores, np.mean([unusual(fit[key], found[key]) for key in ("whole", "swept")], 0)


def against_itself(found, rng):
    """Without reference films, each half of the films judges the other. The same as fold."""
    n = len(found["pixels"])
    halves = np.array_split(rng.permutation(n), 2)
    part = lambda rows: {key: value[rows] for key, value in found.items()}
    results = [fold(part(other), part(own), rng) for own, other in (halves, halves[::-1])]
    back = np.argsort(np.concatenate(halves))
    scores = {}
    for name in results[0][0]:
        reference, own, p = (
            np.concatenate([scores_[name][k] for scores_, _ in results]) for k in range(3)
        )
        scores[name] = (reference, own[back], p[back])
    return scores, np.concatenate([z for _, z in results])[back]


# ---------------------------------------------------------------- the command
def planted(folder, seed, count):
    """Synthetic films: reference/ as they come, archive/ the same with wrong ones among them (PLANTED). → their table"""
    folder = folder / f"phantoms_{count}_{seed}"
    table = folder / "archive.csv"
    if table.is_file():
        return table
    change = {
        "sideways": np.rot90,
        "inverted": lambda f: 255 - f,
        "corner": lambda f: f[: len(f) // 2, : len(f) // 2],
    }
    kinds = (
        ["reference"] * 2 * count
        + ["normal"] * count
        + [kind for kind in PLANTED for _ in range(count // 4)]
    )
    lines = ["filename,label"]
    for i, kind in enumerate(tqdm(kinds, desc="phantoms", leave=False)):
        film = phantom.make_phantom(
            OTHER_PATIENTS + seed, i, 128, anomaly=kind if kind in phantom.ANOMALIES else None
        )["film"]
        name = f"{'reference' if kind == 'reference' else 'archive'}/{i:05d}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pictures.save(
            Image.fromarray(np.ascontiguousarray(change.get(kind, np.asarray)(film))), folder / name
        )
        lines += [f"{i:05d}.png,{kind}"] if kind != "reference" else []
    write_text(table, "\n".join(lines) + "\n")
    return table


def command(config, device):
    """Which films does the world model not believe? Prediction error of each film and patch, calibrated on reference films: surprise.csv, a picture of
    the most and the least surprising films, and, where a table says what is wrong, AUROC against simple baselines."""
    world, out, rng = (
        load_world(find_weights(config)).to(device).eval(),
        Path(config.out),
        np.random.default_rng((9, config.seed)),
    )
    if not config.data:
        if config.table or config.reference:
            raise UserError("--table and --reference want --data, the films that they speak of")
        config.table = planted(out, config.seed, 100)
        config.data, config.reference = (
            str(config.table.with_name(part)) for part in ("archive", "reference")
        )
    films = open_films(config.data)
    numbers = evenly(named(config.table, films), config.films)
    good = open_films(config.reference) if config.reference else films
    references = evenly(np.arange(len(good)), config.references) if config.reference else numbers
    if len(references) < 40:
        raise UserError(
            f"{len(references)} reference films: fewer than 40 make no p-value; give a --reference folder with more"
        )
    found, numbers, bad = watch(world, films, numbers, "films")
    usual = watch(world, good, references, "reference films")[0] if config.reference else found
    if len(usual["pixels"]) < 40:
        raise UserError(
            f"{len(usual['pixels'])} of the reference films can be read: fewer than 40 make no p-value"
        )
    scores, z = fold(usual, found, rng) if config.reference else against_itself(found, rng)
    names = [films.names[i] for i in numbers]
    write_table(out / "surprise.csv", names, scores, bad)
    p = scores["surprise"][2]
    result = {
        "films": len(names),
        "unreadable": bad,
        "flagged": int((p <= config.alpha).sum()),
        "alpha": config.alpha,
    }
    labels = labels_of(config, films, numbers)
    result["auroc"] = separation(config, labels, scores)
    lines = [
        f"{len(names)} films: {result['flagged']} with p ≤ {config.alpha:g}, where {config.alpha * len(names):.0f} would be by chance; "
        f"{len(bad)} unreadable; every film in {out}/surprise.csv"
    ]
    if result["auroc"]:
        kinds = list(next(iter(result["auroc"].values())))
        lines += ["AUROC, percent" + " " * 12 + "  ".join(kinds)]
        lines += [
            f"  {name:24s}" + "  ".join(f"{row[kind]:{len(kind)}.1f}" for kind in kinds)
            for name, row in result["auroc"].items()
        ]
    order = np.argsort(-scores["surprise"][1], kind="stable")
    shown, titles, columns = (
        np.concatenate([order[:12], order[len(order) // 2 :][:6]]),
        [Path(name).stem[-20:] for name in names],
        6,
    )
    if (
        result["auroc"] and config.table
    ):  # of each kind the most surprising film, then the one in the middle
        last = np.argsort(
            [k.lower() in NEGATIVE for k in labels], kind="stable"
        )  # normal ones at the right
        kinds = [order[labels[order] == kind] for kind in dict.fromkeys(labels[last])][-6:]
        shown, columns = (
            np.array([each[0] for each in kinds] + [each[len(each) // 2] for each in kinds]),
            len(kinds),
        )
        titles = [f"{k}, {t}" if len(k + t) < 24 else k for k, t in zip(labels, titles)]
    finish(
        config,
        result,
        "\n".join(lines),
        surprise=page(
            films, numbers[shown], z[shown], p[shown], [titles[i] for i in shown], columns
        ),
    )


def write_table(path, names, scores, bad):
    """surprise.csv, the least believable film first: all measures, p-values of the surprise and of the baselines; unreadable films at the top."""
    keys = list(scores)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["film", "p", *keys, *(f"p of {key}" for key in keys[1:]), "note"])
    writer.writerows(
        [name, 0, *[""] * (2 * len(keys) - 1), f"unreadable: {reason}"]
        for name, reason in sorted(bad.items())
    )
    for i in np.argsort(-scores["surprise"][1], kind="stable"):
        numbers = [
            scores["surprise"][2][i],
            *(scores[key][1][i] for key in keys),
            *(scores[key][2][i] for key in keys[1:]),
        ]
        writer.writerow([names[i], *(f"{v:.4f}" for v in numbers), ""])
    write_text(path, buffer.getvalue())


def labels_of(config, films, numbers):
    """The table's word for each film; None without a table."""
    if not config.table:
        return None
    label = {i: row.get("label", "") for i, row in rows_of(config.table, films)}
    return np.array([label[i] for i in numbers])


def separation(config, labels, scores):
    """AUROC in percent of each measure: each kind of wrong films against the table's normal ones; without a table, all against the calibration films."""
    if labels is None:
        if not config.reference:
            return {}
        against = lambda usual, own: (
            100 * auroc(np.r_[own, usual], np.r_[np.ones(len(own)), np.zeros(len(usual))])
        )
        return {
            key: {"these films": against(usual, own)} for key, (usual, own, _) in scores.items()
        }
    normal = np.array([k.lower() in NEGATIVE for k in labels])
    kinds = {kind: labels == kind for kind in dict.fromkeys(labels[~normal])}
    if not normal.any() or not kinds:
        return {}
    kinds["all"] = ~normal
    return {
        key: {
            kind: 100 * auroc(own[normal | mask], mask[normal | mask])
            for kind, mask in kinds.items()
        }
        for key, (_, own, _) in scores.items()
    }


def page(films, numbers, z, p, titles, columns, cell=150):
    """Films, each above its map of surprise: dark = as usual there, bright = five spreads above."""
    rows, captions = [], []
    for start in range(0, len(numbers), columns):
        part = range(start, min(start + columns, len(numbers)))
        shown = [pictures.to_picture(films[int(numbers[k])], cell) for k in part]
        maps = [pictures.heat(z[k].reshape(round(z.shape[1] ** 0.5), -1), 0, 5) for k in part]
        rows += [shown, [pictures.overlay(film, each, 0.6) for film, each in zip(shown, maps)]]
        captions += [[titles[k] for k in part], [f"p = {p[k]:.3f}" for k in part]]
    return pictures.grid(rows, captions, cell=cell)


if __name__ == "__main__":
    run_script(lambda: run_command(Config, command, "surprise"))
