"""What a fine-tuning run says and writes: split, recipe, predictions, curves, cases, result.json.

A row is what finetune.predict says of one film: the logits (c,) or, for segmentation, (Dice, 1 if
the true mask is not empty, loss).
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from plumbing import metrics, pictures
from plumbing.benchmarks import TASKS
from plumbing.checkpoint import made_with, replace_with, write_csv, write_json
from plumbing.film import film_size
from plumbing.launch import UserError
from plumbing.splits import Splits, class_warnings, is_marked, tally
from plumbing.table import read_cells
from plumbing.words import SPLITS, has_other_role, is_called, plain

METRIC = {"labels": "AUROC", "classes": "accuracy", "mask": "Dice"}  # by kind of task
SHARES = ("sensitivity", "specificity", "PPV", "NPV")  # as metrics.call_shares orders them
PUBLISHED = {  # tasks whose epochs are published
    "vindr": "What is left open is the paper's; epochs and batch are those of the authors' code.",
    "chexpert": "What is left open is the paper's; one epoch is the authors' code's, the batch is "
    "ours.",
}


def describe_weights(weights: Path | None, why: str, shape: dict, trained="pre-trained") -> str:
    """Tell what the encoder starts from. shape: its image, patch, dim and depth."""
    line = f"weights: {weights or 'none'} ({why}): ViT {shape['dim']} × {shape['depth']}"
    if weights:
        line += f", {trained} at {shape['image']} px in {shape['patch']} px patches"
    return line


def describe_task(root: Path, splits: Splits) -> str:
    """Tell what is to be predicted of how many films, what was decided, and what to beware of."""
    metric = METRIC[splits.kind]
    lines = [f"data: {root}, task {splits.task}: {metric} of {', '.join(splits.labels)}"]
    asked = []
    for split, counts in splits.counts().items():
        if not counts["films"]:  # a finished model is only tested
            continue
        is_labelled = not is_unlabelled(counts)
        if is_labelled:
            asked.append(split)
        line = f"{split}: {counts['films']} films of {counts['patients']} patients"
        if counts["patients"] is None:
            line = f"{split}: {counts['films']} films, patients unknown: every film counts as one"
        unknown = counts.get("unknown", {})
        positive = []
        for name, films in counts.get("positive", {}).items():
            not_known = f" and {unknown[name]} unknown" if name in unknown else ""
            positive.append(f"{name} {films}{not_known}")
        if is_labelled:
            line += f" ({', '.join(positive)})"
        lines.append(line)
    notes = [*splits.notes, *class_warnings(splits, asked)]
    notes.sort(key=lambda note: note.startswith("warning"))  # at the end, where they are seen
    return "\n  ".join([*lines, *notes])


def is_unlabelled(counts: dict) -> bool:
    """Whether no label is known of any film of a split; of masks, which have none, True.

    counts: those of one split, as Splits.counts gives them.
    """
    unknown = counts.get("unknown", {})
    return all(unknown.get(name) == counts["films"] for name in counts.get("positive", {}))


def refuse_untestable(splits: Splits, drawn: list):
    """UserError, before anything is trained, when the drawn training films can teach nothing, or
    the test films cannot give a number.
    """
    if splits.kind == "mask":
        if any(map(is_marked, drawn)):
            return
        raise UserError(
            f"none of the {len(drawn)} training films has a mask that is not empty: nothing can be "
            "learnt; draw others (--draw) or more, or choose another split"
        )
    for what, examples in (("training", drawn), ("test", splits.test)):
        counts = [tally(examples, k) for k in range(len(splits.labels))]
        if not any(count[0] and count[1] for count in counts):
            then = "nothing can be measured; choose another split"
            if what == "training":
                then = "nothing can be learnt; choose another split"
                if len(drawn) < len(splits.train):
                    then = "nothing can be learnt; draw others (--draw) or more"
            raise UserError(
                f"no class has positive and negative films among the {len(examples)} {what} films: "
                f"{then}"
            )


def is_fewer_than_published(splits: Splits) -> bool:
    """Whether a set of the paper gives only its few-shot lists to train on, or less than 90 % of
    the paper's training films.
    """
    task = TASKS[splits.task]
    return splits.drawn or bool(task.paper and len(splits.train) < 0.9 * task.sizes[0])


def describe_draw(splits: Splits, drawn: list) -> str:
    """Tell how many training films are drawn, and what these cannot teach."""
    line = f"drawn: {len(drawn)} of the {len(splits.train)} training films, for all seeds"
    return "\n  ".join([line, *class_warnings(replace(splits, train=drawn), ["train"])])


def write_films(out: Path, splits: Splits, root: Path):
    """Write films.csv: every film with its patient, its split and its label, as they were read.

    It is itself a table for --labels and for pretrain.py --probe, which keep these splits. label is
    the class of exclusive classes; else every class is a column of 1, 0 or, where nothing is known,
    nothing, called "class Pathology" where Pathology alone would be read as something else than one
    of several classes. Masks are left out.
    """
    names = {"labels": splits.labels, "classes": ["label"], "mask": []}[splits.kind]
    if len(names) > 1 or not any(is_called(name, "label") for name in names):
        names = [f"class {name}" if has_other_role(name) else name for name in names]
    lines = []
    for split in SPLITS:
        for example in getattr(splits, split):
            cells = example.truth
            if splits.kind == "classes":
                cells = [splits.labels[example.truth.index(1)]]
            film, patient = spelling_of(example, root)
            lines.append([film, patient, split, *cells])
    write_csv(out / "films.csv", ["filename", "patient_id", "split", *names], lines)


def whose_recipe(task: str) -> str:
    """Say how much of a task's recipe is the paper's."""
    if not TASKS[task].paper:
        return "What is left open is as in the paper's tasks, but for epochs, batch, head and pool."
    ours = "What is left open is the paper's, but for epochs and batch, which are ours."
    return PUBLISHED.get(task, ours)


def describe_recipe(args, kind: str, films: int, steps, reasons: list[str]) -> str:
    """Tell what will be trained on how many films, and why so. steps: seedrun.Steps."""
    input_size = f"{films} films, {args.image} px in {args.patch} px patches"
    if steps.total == 0:
        return (
            f"recipe: linear probe of the {args.pool} on {input_size}, encoder frozen, penalty "
            "chosen on validation"
        )
    frozen = ", encoder frozen" if args.freeze else ""
    pooled = "" if kind == "mask" else f" on the {args.pool}"
    recipe = (
        f"recipe: {input_size}{frozen}, {args.epochs} epochs = {steps.total} steps "
        f"of {args.batch}, {args.head} head{pooled}, lr {args.lr:g}, "
        f"weight decay {args.weight_decay:g}, layer decay {args.layer_decay:g}, "
        f"drop path {args.drop_path:g}, {args.precision}; "
        f"validation every {steps.between_validations} steps, "
        f"stop after {args.patience} without a new best"
    )
    return "\n  ".join([recipe, *reasons])


def measure(kind: str, scores, truth, weights) -> np.ndarray:
    """Compute a task's metric and its parts when film i counts weights[i] times, as fractions.

    scores, truth: as judge takes them. weights (n, k): k times as many results.
    → (k, 1 + parts): the metric; then the AUROC of each class or, of masks, the mean Dice over all
    films and over those that have a mask. nan where undefined.
    """
    if kind == "mask":
        is_known = ~np.isnan(scores[:, 0])
        dice, has_mask, _ = scores[is_known].T
        means = [weighted_mean(dice, weights[is_known])]
        means.append(weighted_mean(dice, weights[is_known] * has_mask[:, None]))
        return np.stack([means[0], *means], 1)
    value, areas = metrics.mean_auroc(scores, truth, weights)
    if kind == "classes":
        is_known = ~np.isnan(truth).any(1)
        is_right = scores[is_known].argmax(1) == truth[is_known].argmax(1)
        value = weighted_mean(is_right, weights[is_known])
    return np.column_stack([value, areas])


def weighted_mean(values, weights) -> np.ndarray:
    """Mean of values (n,) by each column of weights (n, k); nan where these are all 0. → (k,)"""
    total = weights.sum(0)
    return np.divide(values @ weights, total, out=np.full(len(total), np.nan), where=total > 0)


def parts_of(kind: str, labels) -> tuple:
    """Name the parts of a task's metric, in the order of `measure`."""
    return ("all films", "films with a mask") if kind == "mask" else tuple(labels)


def percent(value: float) -> float | None:
    """Turn a fraction into percent; None, JSON's null, where it is undefined (nan)."""
    return None if np.isnan(value) else 100 * float(value)


def judge(kind: str, labels, scores, truth) -> tuple[float | None, dict]:
    """Judge what was predicted of n films. → (the task's metric, {class: AUROC}), percent

    scores (n, c): the higher, the more likely the class; of masks the rows (n, 3). truth (n, c): 0,
    1, or NaN: not known. A class without positives or without negatives has no AUROC (None) and
    counts in no mean. The Dice is also given over the films that have a mask, for where most have
    none an empty guess is right.
    """
    value, *parts = map(percent, measure(kind, scores, truth, np.ones((len(scores), 1)))[0])
    return value, dict(zip(parts_of(kind, labels), parts, strict=True))


def log_odds(kind: str, logits) -> np.ndarray:
    """The logarithm of p / (1 - p) of every class, logits (n, c) → (n, c), by which AUROC orders
    films: of two films that both have p = 1.0000 in floating point it still knows the higher.
    """
    if kind == "labels":
        return logits
    logits = torch.as_tensor(logits, dtype=torch.float64)
    is_own = torch.eye(logits.shape[1], dtype=torch.bool)
    others = logits[:, None].masked_fill(is_own, -torch.inf).logsumexp(2)
    return (logits - others).numpy()


def operating_points(task, scores, truth, examples, thresholds) -> dict:
    """Count how often a model's yes or no to each class is right, film by film.

    scores (n, c): probabilities of these examples, at or above thresholds (c,) yes; of a label
    without a threshold (None) nothing is said. truth: as judge takes them.
    → {class: {threshold; films, patients: [with it, without it]; of SHARES: [value, low, high] of
    its interval, percent, None where undefined}}
    """
    least = np.array(thresholds, float)
    calls = np.where(np.isnan(least), np.nan, scores >= least)

    def shares(weights):
        return metrics.call_shares(calls, truth, weights).reshape(weights.shape[1], -1)

    patients = np.array([example.patient for example in examples])
    is_told = any(example.has_patient for example in examples)
    exact = shares(np.ones((len(scores), 1)))[0]
    rows = np.column_stack([exact, metrics.bootstrap(shares, patients)])  # (4 c, 3)
    points = {}
    for k, name in enumerate(task.labels):
        ill, well = (patients[truth[:, k] == value] for value in (1, 0))
        points[name] = {"threshold": thresholds[k], "films": [len(ill), len(well)]}
        points[name]["patients"] = [len({*ill}), len({*well} - {*ill})] if is_told else None
        for share, row in zip(SHARES, rows[4 * k : 4 * k + 4], strict=True):
            points[name][share] = [percent(value) for value in row]
    return points


def judge_test(task, rows: dict, truth, thresholds) -> dict:
    """Judge the test films as `judge` does, and say how sure that is. → a part of result.json

    interval, per_class_interval: [low, high], between which 95 % of the values lie when the
    patients of the test films are drawn anew; None where that is undefined. thresholds (c,): from
    which probability on a class counts as present; without any, no operating_points.
    """
    scores = np.stack(list(rows.values()))
    points = None
    examples = [task.films["test"].examples[i] for i in rows]
    if thresholds:
        likely = probabilities(task.kind, scores)
        points = operating_points(task, likely, truth, examples, thresholds)
    if task.kind != "mask":
        scores = log_odds(task.kind, scores)
    patients = [example.patient for example in examples]
    value, per_class = judge(task.kind, task.labels, scores, truth)
    bounds = metrics.bootstrap(partial(measure, task.kind, scores, truth), patients)
    intervals = [None if np.isnan(pair).any() else (100 * pair).tolist() for pair in bounds]
    return {
        "value": value,
        "interval": intervals[0],
        "per_class": per_class,
        "per_class_interval": dict(zip(per_class, intervals[1:], strict=True)),
        "operating_points": points,
        "tested_on": len(rows),
    }


def with_interval(value: float | None, interval, patients: int | None = None) -> str:
    """Write a result and its 95 % interval: '91.20 % (95 % interval 88.00 to 94.10)'.

    patients: how many the test films have, to tell why there is no interval; see metrics.bootstrap.
    """
    if value is None:
        return "undefined"
    words = f"{value:.2f} %"
    if interval and interval[0] == interval[1]:
        words += " (no interval: all redraws of these patients say the same; others may differ)"
    elif interval:
        words += f" (95 % interval {interval[0]:.2f} to {interval[1]:.2f})"
    elif patients:
        why = ", among them too few with it or without it" if patients >= 3 else ""
        words += f" (no interval: {patients} test patients{why})"
    return words


def metric_of(kind: str, per_class: dict) -> str:
    """Name a task's metric and, where it is a mean over labels, over which of them.

    per_class: {label: its AUROC, None where it has none}
    """
    judged = [name for name, value in per_class.items() if value is not None]
    if kind != "labels" or len(per_class) == 1 or not judged:
        return METRIC[kind]
    if len(judged) == 1:
        return f"AUROC of {judged[0]} alone, the only one of {len(per_class)} that can be judged,"
    if len(judged) < len(per_class):
        return f"AUROC, mean of the {len(judged)} of {len(per_class)} labels that can be judged,"
    return f"AUROC, mean of {len(judged)} labels,"


def write_predictions(folder: Path, task, rows: dict):
    """Write predictions.csv: a line per test film that could be read.

    film and patient as spelling_of has them, the probability of each class, and in true_<class>
    what is true where it is known. Of segmentation: dice, and has_mask, 1 with a true mask.
    """
    columns = ["dice", "has_mask"]
    if task.kind != "mask":
        taken = ("film", "patient")
        columns = [f"class {name}" if plain(name) in taken else name for name in task.labels]
        columns += [f"true_{name}" for name in task.labels]
    lines = []
    for i, row in rows.items():
        example = task.films["test"].examples[i]
        if task.kind == "mask":
            cells = ["", ""] if i in task.without_truth else [f"{row[0]:.6g}", f"{row[1]:.0f}"]
        else:
            # csv writes all digits, without which films near 1 would tie, and None, what is not
            # known, as an empty cell.
            cells = [*probabilities(task.kind, row).tolist(), *example.truth]
        lines.append([*spelling_of(example, task.root), *cells])
    write_csv(folder / "predictions.csv", ["film", "patient", *columns], lines)


def read_predictions(folder: Path, task) -> dict:
    """Read what `write_predictions` wrote of a classifier. → {number of the test film: (c,)}"""
    examples = task.films["test"].examples
    # Version 0.2 wrote paths below --data.
    number_of = {name_of(example.path, task.root): i for i, example in enumerate(examples)}
    number_of |= {spelling_of(example, task.root)[0]: i for i, example in enumerate(examples)}
    rows = {}
    for _, cells in read_cells(folder / "predictions.csv")[1]:
        rows[number_of[cells[0]]] = np.array(cells[2 : 2 + len(task.labels)], float)
    return rows


def write_roc(folder: Path, task, rows: dict, truth, points: dict | None):
    """Write roc.csv and roc.png: sensitivity and specificity from every probability on.

    truth: as judge takes them; points: as operating_points gives them, drawn as dots.
    """
    scores = probabilities(task.kind, np.stack(list(rows.values())))
    lines = []
    drawn = {}
    dots = {}
    for name, column, known in zip(task.labels, scores.T, truth.T, strict=True):
        thresholds, sensitivity, specificity = metrics.roc_curve(column, known)
        if not len(thresholds):
            continue
        curve = np.column_stack([thresholds, sensitivity, specificity])
        lines += [[name, *point] for point in curve.tolist()]
        drawn[name] = 100 - 100 * specificity, 100 * sensitivity
        if points and points[name]["specificity"][0] is not None:
            dots[name] = [100 - points[name]["specificity"][0]], [points[name]["sensitivity"][0]]
    if lines:
        write_csv(folder / "roc.csv", ["class", "threshold", *SHARES[:2]], lines)
        axes = "100 - specificity, percent", "sensitivity, percent"
        drawn[pictures.CHANCE] = [0, 100], [0, 100]
        page = pictures.curves(drawn, "ROC, test films", *axes, dots, room=0, size=(480, 480))
        pictures.save_or_warn(page, folder / "roc.png")


def name_of(path: Path, root: Path) -> str:
    """Name a film by its path below --data, or by the whole path when it lies elsewhere."""
    name = path.relative_to(root) if path.is_relative_to(root) else path
    return name.as_posix().encode(errors="surrogateescape").decode(errors="backslashreplace")


def spelling_of(example, root: Path) -> tuple[str, str]:
    """Write film and patient as the user's table does, so that predictions can be joined to it, or
    else the film's path below --data. The patient is "" where nobody knows it.
    """
    film, patient = example.written or (name_of(example.path, root), example.patient)
    return film, patient if example.has_patient else ""


def probabilities(kind: str, logits) -> np.ndarray:
    """Turn logits (..., c) into the probability of every class. (..., c)"""
    logits = torch.as_tensor(logits, dtype=torch.float64)
    if kind == "classes":  # exactly one holds
        return logits.softmax(-1).numpy()
    return logits.sigmoid().numpy()


@torch.no_grad()
def draw_cases(folder: Path, model, test_examples, rows: dict, device):
    """Draw cases.png: the test films of the best, the median and the worst Dice, in this order.

    Beside every film its true mask is tinted green and the predicted one red, so that what both
    hold is yellow.
    """
    by_dice = sorted((i for i in rows if rows[i][0] >= 0), key=lambda i: -rows[i][0])
    if not by_dice:  # no true mask is known
        return
    images = []
    captions = []
    for i in (by_dice[0], by_dice[len(by_dice) // 2], by_dice[-1]):
        item = test_examples[i]
        film = item["views"]  # (1, H, W)
        guess = model(torch.from_numpy(film)[:, None].to(device) / 255) > 0
        tinted = np.repeat(film[0, ..., None] * 0.6, 3, axis=2)
        tinted[..., 0] += 100 * guess[0].cpu().numpy()
        tinted[..., 1] += 100 * item["truth"]
        images.append([film[0], tinted.clip(0, 255).astype(np.uint8)])
        name = test_examples.films.examples[i].path.name[:40]
        captions.append([name, f"Dice {100 * rows[i][0]:.1f}"])
    columns = ["film", "green truth, red prediction"]
    page = pictures.grid(images, captions, columns, ["best", "median", "worst"], cell=256)
    pictures.save_or_warn(page, folder / "cases.png")


@torch.no_grad()
def write_masks(folder: Path, task, test_examples, model, team):
    """Write what the model outlines on each test film: masks/<film>.png, of the film's size."""
    root = task.root
    for i in range(team.rank, len(test_examples), team.size):
        item = test_examples[i]
        if item["unreadable"]:
            continue
        example = task.films["test"].examples[i]
        guess = model(torch.from_numpy(item["views"])[:, None].to(team.device) / 255) > 0
        height, width = film_size(example.path)
        white = np.uint8(255) * guess[0].cpu().numpy()
        mask = Image.fromarray(white).resize((width, height), Image.Resampling.NEAREST)
        name = name_of(example.path, root).lstrip("/").removesuffix(".png")
        save = partial(mask.save, format="PNG")
        replace_with(folder / "masks" / f"{name}.png", save, sync=False)


def summarise(out: Path, recipe: dict, splits: Splits, weights, results: list[dict], team) -> dict:
    """Write result.json of all seeds. recipe: the flags of the training, but data and labels, which
    are those of the test. → what it holds
    """
    values = [result["value"] for result in results]
    mean, std = mean_and_std(values)
    per_class = {}
    for name in results[0]["per_class"]:
        per_class[name] = mean_and_std([result["per_class"][name] for result in results])[0]
    unreadable = set().union(*[result["bad"] for result in results])
    summary = {
        "task": splits.task,
        "data": recipe.get("data"),
        "labels": recipe.get("labels"),
        "metric": METRIC[splits.kind],
        "metric_of": metric_of(splits.kind, per_class),
        "mean": mean,
        "std": std,
        "seeds": values,
        "intervals": [result.get("interval") for result in results],  # version 0.2 had none
        "per_class": per_class,
        "per_class_intervals": [result.get("per_class_interval") for result in results],
        "operating_points": [result.get("operating_points") for result in results],
        "split": splits.counts(),
        "notes": splits.notes,
        "weights": str(weights or "none"),
        "freeze": recipe.get("freeze"),
        "fraction": recipe.get("fraction"),
        "shots": recipe.get("shots"),
        "cut": [cut_of(result) for result in results],
        "trained_on": [result["films"] for result in results],
        "tested_on": [result.get("tested_on") for result in results],
        "bad": sorted(unreadable),
        "made_with": made_with(),
    }
    if team.lead:
        write_json(out / "result.json", summary)
    return summary


def conclude(out: Path, summary: dict, team):
    """Print what `summarise` has written, the metric last, or where the predictions are."""
    words = "\n".join(describe_summary(summary)) + f": {out}/result.json"
    if summary["mean"] is None and is_unlabelled(summary["split"]["test"]):
        words = f"no labels: predictions only, in {out}/predictions.csv"
        if summary["metric"] == METRIC["mask"]:
            words = f"no masks to compare with: predictions only, in {out}/masks"
    if team.lead:
        print(words, flush=True)


def describe_summary(summary: dict) -> list[str]:
    """Tell what is in result.json, the metric last; intervals of classes only of a single seed."""
    values = summary["seeds"]
    is_probe = summary["freeze"] and summary["metric"] != METRIC["mask"]
    are_same = bool(is_probe and summary["weights"] != "none")  # nothing depends on the seed
    has_one_seed = len(values) == 1 or are_same
    intervals = summary["per_class_intervals"][0] if has_one_seed else None
    test = summary["split"]["test"]
    patients = (test["patients"] or test["films"]) if intervals else None
    points = summary["operating_points"][: 1 if has_one_seed else None]
    part = "Dice" if summary["metric"] == METRIC["mask"] else "AUROC"
    lines = [f"test {part} in detail:"] if summary["per_class"] else []
    for name, value in summary["per_class"].items():
        words = with_interval(value, intervals and intervals[name], patients)
        lines.append(f"  {name:32s} {words}")
        if None not in points:
            lines += describe_point([seed[name] for seed in points])
    paper = TASKS[summary["task"]].paper
    beside = f" (paper {paper})" if paper else ""
    if summary["mean"] is None:
        words = "undefined (predictions.csv holds what was predicted)"
    elif has_one_seed:
        words = with_interval(summary["mean"], summary["intervals"][0], patients)
        others = f"; all {len(values)} seeds are the same linear probe, one is enough"
        words += others if len(values) > 1 else ", one seed"
    else:
        words = f"{summary['mean']:.2f} ± {summary['std']:.2f} % over {len(values)} seeds; the "
        words += f"first alone {with_interval(values[0], summary['intervals'][0])}"
    cut = [f"CUT at step {step} of {total}, " for step, total in filter(None, summary["cut"])]
    return [*lines, f"{''.join(cut[:1])}test {summary['metric_of']} {words}{beside}"]


def cut_of(result: dict) -> list[int] | None:
    """Where --max_steps cut a seed: [step, steps of the whole schedule]; None: it is finished."""
    return None if result.get("over", True) else [result["steps"], result.get("steps_in_all", "?")]


def describe_point(points: list[dict]) -> list[str]:
    """Tell how often the yes or no to a class is right: points, of every seed, of it alone."""
    films = points[0]["films"]
    if not sum(films):
        return []
    counts = f"    {films[0]} films with it, {films[1]} without"
    if points[0]["patients"]:
        ill, well = points[0]["patients"]
        counts += f"; {ill} patients have it on a film, {well} on none"
    thresholds = [point["threshold"] for point in points]
    if None in thresholds:
        return [f"{counts}; no threshold, as val has no film with it, or none without"]
    ends = dict.fromkeys(f"{value:.3g}" for value in (min(thresholds), max(thresholds)))
    shares = [f"{share} {share_words([point[share] for point in points])}" for share in SHARES]
    prevalence = f"at prevalence {100 * films[0] / sum(films):.1f}"
    return [
        f"{counts}; yes from {', by seed to '.join(ends)} on, chosen on val; percent:",
        f"    {', '.join(shares)} {prevalence}",
    ]


def share_words(values: list) -> str:
    """Write one of SHARES, percent: [value, low, high] of every seed."""
    mean, std = mean_and_std([value for value, *_ in values])
    if mean is None:
        return "undefined"
    if len(values) > 1:
        return f"{mean:.1f} ± {std:.1f}"
    low, high = values[0][1:]
    return f"{mean:.1f}" + (f" ({low:.1f} to {high:.1f})" if low != high else " (no interval)")


def mean_and_std(values: list) -> tuple[float | None, float | None]:
    """Mean and standard deviation over the seeds: None when a seed has no value, or is alone."""
    if None in values:
        return None, None
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return float(np.mean(values)), std
