"""Which films, and where in them, does the world model not believe?

    python -m lab.surprise                                             # synthetic films, some wrong
    python -m lab.surprise --data ARCHIVE --reference GOOD_FILMS
    python -m lab.surprise --data ARCHIVE --table labels.csv           # also AUROC per kind

We ask two questions about every film and answer them for every patch: the model predicts the whole
film from the whole film under the identity action, and it predicts the patches of a masked block,
which sweeps over the film, from all others. Reference films say what error is usual at each place.
A conformal p-value says how rare a film's surprise is among them: the share of calibration films,
the film itself included, that surprise at least as much.

Writes surprise.csv (every film, the least believable first), surprise.png (films above their maps
of surprise) and result.json.
"""

import dataclasses
import functools
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import augment
from data import open_films
from lab import common
from lab.features import pool_features
from model import take
from plumbing import phantom, pictures
from plumbing.checkpoint import write_csv
from plumbing.findings import merge_spellings
from plumbing.keys import SURPRISE, numpy_rng
from plumbing.launch import UserError, flag, run_script
from plumbing.metrics import auroc
from plumbing.table import Sheet
from plumbing.words import NO, answer, is_unsaid

PLANTED = ("mirrored heart", "missing lung", "sideways", "inverted", "corner")  # kinds of wrong
UNLIKE = (
    "p holds for films that pre-training knows as well as it knows the reference films: it errs "
    "less on films that it has seen, and others surprise by being new"
)
REFERENCES = 400  # at most so many good films are looked at: half of them fit, half calibrate
FEWEST = 40  # of them, or of films without any


@dataclasses.dataclass
class Config(common.Common):
    films: int = flag(1000000, "at most so many films of --data, evenly from all")
    reference: str = flag(None, "folder of good films [each half of --data judges the other]")
    alpha: float = flag(0.05, "flag films with p up to this: the share of good films flagged too")
    table: str = flag(None, "CSV filename,label (normal, or what is wrong): AUROC of the surprise")


def main(argv=None):
    args, device = common.start(Config, __doc__, "surprise", argv)
    world = common.load_predictions(args.weights).to(device).eval()
    data, reference, table = (args.data, args.reference, args.table) if args.data else planted(args)

    # ---- 1. Errors of all films.
    films = open_films(data)
    numbers = common.evenly(common.named(table, films), args.films)
    watch_these = functools.partial(watch, world)
    size = world.encoder.image
    found, numbers, unreadable = common.map_films(watch_these, films, numbers, size)

    # ---- 2. Scores and p-values, by films that say what is usual.
    rng = numpy_rng(SURPRISE, args.seed)
    parts = {"to judge": (films, numbers)}
    if reference:
        good = open_films(reference)
        references = common.evenly(np.arange(len(good)), REFERENCES)
        words = "reference films"
        usual, read, _ = common.map_films(watch_these, good, references, size, words)
        require_enough(read, words)
        parts["reference films"] = good, read
        scores, p, z, calibrating = fold(usual, found, rng)
    else:
        require_enough(numbers, "films")
        scores, p, z, calibrating = against_itself(found, rng)

    overlap, known = common.say_seen(args, parts, table)
    if max(known) - min(known) > 0.1:
        print(f"warning: {UNLIKE}", flush=True)
        overlap += f"; {UNLIKE}"

    # ---- 3. Table, result and picture.
    names = [films.names[i] for i in numbers]
    write_table(Path(args.out) / "surprise.csv", names, p, scores, unreadable)
    labels = labels_of(table, films, numbers) if table else None
    result = {
        "films": len(names),
        "unreadable": unreadable,
        "flagged": int((p <= args.alpha).sum()),
        "alpha": args.alpha,
        "calibrating": calibrating,
        "overlap": overlap,
        "auroc": separation(labels, scores) if table else {},
    }
    by_kind = labels if result["auroc"] else None
    shown, titles, columns = choose_shown(names, by_kind, scores["surprise"])
    page = films_page(films, numbers[shown], z[shown], p[shown], titles, columns)
    common.finish(args, result, result_words(result, args.out), surprise=page)


def require_enough(read, what):
    """UserError when too few films can be read to say what is usual."""
    if len(read) < FEWEST:
        advice = f"fewer than {FEWEST} make no p-value; give a --reference folder with more"
        raise UserError(f"{len(read)} {what} can be read: {advice}")


# ---------------------------------------------------------------- errors of the world model
def windows(grid, share=0.16):
    """Square blocks as large as in training (area 0.15 to 0.2), which sweep an n × n grid in steps
    of half their side. → bool (W, N), True = masked
    """
    side = max(1, round(grid * share**0.5))
    starts = sorted({*range(0, grid - side, max(1, side // 2)), grid - side})
    masked = torch.zeros(len(starts), len(starts), grid, grid, dtype=torch.bool)
    for r, top in enumerate(starts):
        for c, left in enumerate(starts):
            masked[r, c, top : top + side, left : left + side] = True
    return masked.flatten(0, 1).flatten(1)


@torch.no_grad()
def errors(world, images):
    """Squared prediction error per patch, mean over width. (B, 1, H, W)

    → whole (B, N): all is kept; swept (B, N): the mean over the blocks that mask a patch
    """
    device = next(world.parameters()).device
    images = images.to(device)
    identity = torch.tensor(augment.IDENTITY, device=device).expand(len(images), 4)
    truth = world.targets(images)  # (B, N, D)
    whole = (world.predict(images, identity).float() - truth).square().mean(-1)
    swept = torch.zeros_like(whole)
    times = torch.zeros_like(whole[0])
    at = world.own_coords.expand(len(images), -1, -1)
    for block in windows(world.encoder.grid).to(device):
        keep = (~block).nonzero()[:, 0].expand(len(images), -1)  # (B, K)
        masked = block.nonzero()[:, 0].expand(len(images), -1)  # (B, M)
        context = world.encoder(images, keep)
        guess = world.predictor(context, take(at, keep), take(at, masked), identity)
        swept[:, block] += (guess.float() - truth[:, block]).square().mean(-1)
        times += block
    return whole.cpu().numpy(), (swept / times).cpu().numpy()


def watch(world, images):
    """What is judged of films, and what the baselines look at. (B, 1, H, W)

    → {whole, swept (B, N), features (B, D), pixels (B, 2)}
    """
    whole, swept = errors(world, images)
    flat = images.flatten(1).double()
    found = {
        "whole": whole,
        "swept": swept,
        "features": pool_features(world.target_encoder, images)["mean"],
        "pixels": torch.stack([flat.mean(1), flat.std(1)], 1).numpy(),  # the simplest description
    }
    return {key: value.astype(float) for key, value in found.items()}


# ---------------------------------------------------------------- scores
def unusual(fitting, found):
    """How far the logarithm of each patch's error lies above what the fitting films show there, in
    units of their spread; by quantiles, which a few odd films among them do not move.

    fitting (m, N), found (n, N) → z (n, N)
    """
    low, middle, high = np.quantile(np.log(fitting + 1e-12), (0.16, 0.5, 0.84), axis=0)
    return (np.log(found + 1e-12) - middle) / ((high - low) / 2 + 1e-3)


def conformal_p(reference, scores):
    """p = (1 + number of calibration scores ≥ the film's) / (m + 1), so that P(p ≤ α) ≤ α for films
    like the m calibration films. (m,), (n,) → (n,)
    """
    ordered = np.sort(np.asarray(reference, float))
    at_least = len(ordered) - np.searchsorted(ordered, np.asarray(scores, float), side="left")
    return (1 + at_least) / (len(ordered) + 1)


def knn_distance(fitting, features, k=5):
    """Mean distance to the k nearest fitting films, standardised. (m, D), (n, D) → (n,)"""
    mean = fitting.mean(0)
    std = fitting.std(0) + 1e-9
    near = torch.tensor((fitting - mean) / std)
    asked = torch.tensor((features - mean) / std)
    distances = torch.cdist(asked, near).topk(min(k, len(near)), largest=False).values
    return distances.mean(1).numpy()


def mahalanobis(fitting, values):
    """Distance from the fitting films' mean in units of their spread. (m, d), (n, d) → (n,)"""
    spread = np.linalg.pinv(np.cov(fitting.T) + 1e-12 * np.eye(fitting.shape[1]))
    away = values - fitting.mean(0)
    return np.sqrt(np.einsum("nd,de,ne->n", away, spread, away))


def judge(fitting, films):
    """Score films by all measures, given what fitting films show; both as `watch` gives them.

    → {measure: (n,)}: `surprise` is the one to use, the others are baselines
    """
    above = []
    for key in ("whole", "swept"):
        z = np.maximum(unusual(fitting[key], films[key]), 0)
        above.append(np.square(z).mean(1))  # squared, so that one very wrong place weighs more
    return {
        "surprise": np.mean(above, 0),
        "plain mean error": (films["whole"] + films["swept"]).mean(1),
        "nearest neighbours": knn_distance(fitting["features"], films["features"]),
        "pixel mean and std": mahalanobis(fitting["pixels"], films["pixels"]),
    }


def fold(usual, found, rng):
    """Judge found films by usual ones, half of which fit and half calibrate.

    → {measure: scores of the films (n,)}, p of their surprise (n,), z (n, N), how many calibrate
    """
    first, second = np.array_split(rng.permutation(len(usual["pixels"])), 2)
    fitting = common.select(usual, first)
    calibration = judge(fitting, common.select(usual, second))
    scores = judge(fitting, found)
    p = conformal_p(calibration["surprise"], scores["surprise"])
    z = [unusual(fitting[key], found[key]) for key in ("whole", "swept")]
    return scores, p, np.mean(z, 0), len(second)


def against_itself(found, rng):
    """Without reference films, each half of the films judges the other. Returns what fold does, of
    the calibrating films the larger number.
    """
    halves = np.array_split(rng.permutation(len(found["pixels"])), 2)
    back = np.argsort(np.concatenate(halves))  # from the order of the halves to that of the films
    one, other = (common.select(found, half) for half in halves)
    first, *rest, count = fold(other, one, rng)
    second, *more, other_count = fold(one, other, rng)
    scores = {name: np.concatenate([first[name], second[name]])[back] for name in first}
    p, z = (np.concatenate(pair)[back] for pair in zip(rest, more, strict=True))
    return scores, p, z, max(count, other_count)


# ---------------------------------------------------------------- films and their labels
def planted(args, count=100):
    """Draw synthetic films: reference/ as they come, archive/ the same with wrong ones among them
    (PLANTED). → archive, reference, the table of the archive
    """
    if args.table or args.reference:
        raise UserError("--table and --reference want --data, the films that they speak of")
    folder = Path(args.out) / f"phantoms_{count}_{args.seed}"
    archive = folder / "archive"
    reference = folder / "reference"
    table = folder / "archive.csv"
    if table.is_file():
        return archive, reference, table
    archive.mkdir(parents=True, exist_ok=True)
    reference.mkdir(exist_ok=True)
    kinds = ["reference"] * (2 * count) + ["normal"] * count
    for kind in PLANTED:
        kinds += [kind] * (count // 4)
    rows = []
    for i, kind in enumerate(tqdm(kinds, desc="phantoms", leave=False)):
        name = f"{i:05d}.png"
        if kind != "reference":
            rows.append([name, kind])
        path = (reference if kind == "reference" else archive) / name
        pictures.save(Image.fromarray(planted_film(args.seed, i, kind)), path)
    write_csv(table, ["filename", "label"], rows)  # last: with it the films are complete
    return archive, reference, table


def planted_film(seed, i, kind):
    """Phantom i, with what this kind of wrong film does to it. → uint8 (H, W)"""
    anomaly = kind if kind in phantom.ANOMALIES else None
    film = phantom.make_phantom(common.OTHER_PATIENTS + seed, i, 128, anomaly=anomaly)["film"]
    if kind == "sideways":
        film = np.rot90(film)
    if kind == "inverted":
        film = 255 - film
    if kind == "corner":
        film = film[: len(film) // 2, : len(film) // 2]
    return np.ascontiguousarray(film)


def labels_of(table, films, numbers):
    """What the table says of each film: "normal", what is wrong, or "" where nothing is said or it
    is uncertain. → (n,)
    """
    sheet = Sheet(table)
    column = sheet.column("label")
    if not column:
        print(f"table {table}: no column label, so no AUROC", flush=True)
        return np.array([""] * len(numbers))
    cells = dict(common.rows_of(table, films, lambda row: row[column]))
    named = [None if is_unsaid(cells[i][column]) else [cells[i][column]] for i in numbers]
    words = [[] if cell and answer(cell[0]) == NO else cell for cell in named]
    found, _ = merge_spellings(words)  # Mass and mass are one kind
    return np.array(["" if kinds is None else "".join(kinds) or "normal" for kinds in found])


def separation(labels, scores):
    """How well each measure tells wrong films of each kind, and of all, from the normal ones.

    → {measure: {kind: AUROC in percent}}, {} where there is nothing to compare
    """
    normal = labels == "normal"
    is_wrong = ~normal & (labels != "")
    if not is_wrong.any() or not normal.any():
        return {}
    kinds = {kind: labels == kind for kind in dict.fromkeys(labels[is_wrong])}
    kinds["all"] = is_wrong
    result = {}
    for measure, values in scores.items():
        result[measure] = {}
        for kind, mask in kinds.items():
            judged = normal | mask
            result[measure][kind] = 100 * auroc(values[judged], mask[judged])
    return result


# ---------------------------------------------------------------- table, words and picture
def write_table(path, names, p, scores, unreadable):
    """Write surprise.csv, the least believable film first: p and all measures; unreadable films at
    the top.
    """
    columns = {"p": p, **scores}
    blanks = [""] * len(scores)
    rows = [[name, 0, *blanks, f"unreadable: {why}"] for name, why in sorted(unreadable.items())]
    for i in np.argsort(-scores["surprise"], kind="stable"):
        rows.append([names[i], *(f"{values[i]:.4f}" for values in columns.values()), ""])
    write_csv(path, ["film", *columns, "note"], rows)


def result_words(result, out):
    """The result in words. → text"""
    alpha = result["alpha"]
    count = result["films"]
    calibrating = result["calibrating"]
    by_chance = f"where {alpha * count:.0f} would be by chance"
    flagged = f"{result['flagged']} with p ≤ {alpha:g}, {by_chance}"
    if alpha * (calibrating + 1) < 1 - 1e-9:
        flagged = (
            f"none can have p ≤ {alpha:g}: {calibrating} films calibrate, so that no p is below "
            f"{1 / (calibrating + 1):.2g}; give more films (of --reference) or a higher --alpha"
        )
    words = (
        f"{count} films: {flagged}; {len(result['unreadable'])} unreadable; "
        f"every film in {out}/surprise.csv"
    )
    if not result["auroc"]:
        return words
    rows = [["AUROC, percent", *result["auroc"]["surprise"]]]
    for measure, kinds in result["auroc"].items():
        rows.append([measure, *(f"{value:.1f}" for value in kinds.values())])
    return f"{words}\n{common.columns(rows)}"


def choose_shown(names, labels, surprise):
    """Choose the films of the picture: the twelve most surprising ones and six about the middle;
    with labels, of each kind the most surprising film and, below it, the one in the middle.

    → their places in `names`, their titles, the number of columns
    """
    order = np.argsort(-surprise, kind="stable")
    titles = [Path(name).stem[-20:] for name in names]
    if labels is None:
        shown = np.concatenate([order[:12], order[len(order) // 2 :][:6]])
        return shown, [titles[i] for i in shown], 6
    last = np.argsort(labels == "normal", kind="stable")  # normal ones come last, at the right
    kinds = [order[labels[order] == kind] for kind in dict.fromkeys(labels[last])][-6:]
    shown = [films[0] for films in kinds] + [films[len(films) // 2] for films in kinds]
    words = []
    for i in shown:
        is_short = len(labels[i] + titles[i]) < 24
        words.append(f"{labels[i]}, {titles[i]}" if is_short else labels[i])
    return np.array(shown), words, len(kinds)


def films_page(films, numbers, z, p, titles, columns, cell=150):
    """Draw films above their maps of surprise: dark = as usual there, bright = five spreads above.

    numbers, p (n,), z (n, N)
    """
    side = math.isqrt(z.shape[1])
    shown = [pictures.to_picture(films[int(i)], cell) for i in numbers]
    maps = []
    for film, each in zip(shown, z, strict=True):
        maps.append(pictures.overlay(film, pictures.heat(each.reshape(side, side), 0, 5), 0.6))
    rows = []
    captions = []
    for first in range(0, len(shown), columns):
        part = slice(first, first + columns)
        rows += [shown[part], maps[part]]
        captions += [titles[part], [f"p = {value:.3f}" for value in p[part]]]
    return pictures.grid(rows, captions, cell=cell)


if __name__ == "__main__":
    run_script(main)
