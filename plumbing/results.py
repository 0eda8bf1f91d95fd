"""What a fine-tuning run says and writes: split, recipe, predictions.csv, cases.png, result.json.

A row is what finetune.predict says of one film: the logits (c,) or, for segmentation, (Dice, 1 if
there is a true mask, loss).
"""

import csv
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from plumbing import metrics, pictures
from plumbing.benchmarks import TASKS
from plumbing.checkpoint import write_json, write_text
from plumbing.launch import UserError
from plumbing.splits import Splits, class_warnings, tally

METRIC = {"labels": "AUROC", "classes": "accuracy", "mask": "Dice"}  # by kind of task


def describe_weights(weights: Path | None, why: str, shape: dict) -> str:
    """Tell what the encoder starts from. shape: its image, patch, dim and depth."""
    line = f"weights: {weights or 'none'} ({why}): ViT {shape['dim']} × {shape['depth']}"
    if weights:
        line += f", pre-trained at {shape['image']} px in {shape['patch']} px patches"
    return line


def describe_task(root: Path, splits: Splits) -> str:
    """Tell what is to be predicted of how many films, what was decided, and what to beware of."""
    metric = METRIC[splits.kind]
    lines = [f"data: {root}, task {splits.task}: {metric} of {', '.join(splits.labels)}"]
    for split, counts in splits.counts().items():
        line = f"{split}: {counts['films']} films of {counts['patients']} patients"
        unknown = counts.get("unknown", {})
        positive = []
        for name, films in counts.get("positive", {}).items():
            not_known = f" and {unknown[name]} unknown" if name in unknown else ""
            positive.append(f"{name} {films}{not_known}")
        if positive:
            line += f" ({', '.join(positive)})"
        lines.append(line)
    return "\n  ".join([*lines, *splits.notes, *class_warnings(splits)])


def refuse_untestable(splits: Splits):
    """UserError, before anything is trained, when the test films cannot give a number."""
    labels = [] if splits.kind == "mask" else splits.labels
    counts = [tally(splits.test, k) for k in range(len(labels))]
    if counts and not any(count[0] and count[1] for count in counts):
        raise UserError(
            f"no class has positive and negative films among the {len(splits.test)} test films: "
            "AUROC is undefined; choose another split"
        )


def describe_draw(splits: Splits, drawn: list, seed: int) -> str:
    """Tell how many training films a seed draws, and what these cannot teach."""
    line = f"seed {seed}: {len(drawn)} of the {len(splits.train)} training films drawn"
    return "\n  ".join([line, *class_warnings(replace(splits, train=drawn), ["train"])])


def describe_recipe(args, films: int, steps, reasons: list[str]) -> str:
    """Tell what will be trained on how many films, and why so. steps: finetune.Steps."""
    input_size = f"{films} films, {args.image} px in {args.patch} px patches"
    if steps.total == 0:
        return f"recipe: linear probe on {input_size}, encoder frozen, penalty chosen on validation"
    frozen = ", encoder frozen" if args.freeze else ""
    recipe = (
        f"recipe: {input_size}{frozen}, {args.epochs} epochs = {steps.total} steps "
        f"of {args.batch}, {args.head} head, lr {args.lr:g}, weight decay {args.weight_decay:g}, "
        f"layer decay {args.layer_decay:g}, drop path {args.drop_path:g}, {args.precision}; "
        f"validation every {steps.between_validations} steps, "
        f"stop after {args.patience} without a new best"
    )
    return "\n  ".join([recipe, *reasons])


def judge(kind: str, labels, table, targets) -> tuple[float, dict]:
    """Judge the rows of finetune.predict. → (the task's metric, {class: AUROC}), percent

    table: the rows (n, c), or (n, 3) of masks. targets (n, c): 0, 1, or NaN: not known. A class
    without positives or without negatives has no AUROC (None) and counts in no mean. The Dice is
    also given over the films that have a mask, for where most have none an empty guess is right.
    """
    if kind == "mask":
        dice, has_mask, _ = table.T
        per_class = {"all films": 100 * float(dice.mean()), "films with a mask": None}
        if has_mask.any():
            per_class["films with a mask"] = 100 * float(dice[has_mask > 0].mean())
        return 100 * dice.mean(), per_class
    value, areas = metrics.mean_auroc(table, targets)
    if kind == "classes":
        value = metrics.accuracy(table, targets.argmax(1))
    percent = [None if np.isnan(area) else 100 * area for area in areas]
    return 100 * value, dict(zip(labels, percent, strict=True))


def write_predictions(folder: Path, task, rows: dict):
    """Write predictions.csv: film, class, label, score (logit), per test film and class.

    label: 0 or 1, empty when it is not known.

    Segmentation: label says whether the film has a true mask, score is its Dice.
    """
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(("film", "class", "label", "score"))
    for i, row in rows.items():
        example = task.films["test"].examples[i]
        targets = example.target
        scores = row
        if task.kind == "mask":
            targets = [int(row[1])]
            scores = [row[0]]
        for name, target, score in zip(task.labels, targets, scores, strict=True):
            table.writerow((example.path.name, name, target, f"{score:.6g}"))
    write_text(folder / "predictions.csv", text.getvalue())


@torch.no_grad()
def draw_cases(folder: Path, model, test_examples, rows: dict, device):
    """Draw cases.png: the test films of the best, the median and the worst Dice, in this order.

    Beside every film its true mask is tinted green and the predicted one red, so that what both
    hold is yellow.
    """
    by_dice = sorted(rows, key=lambda i: -rows[i][0])
    images = []
    captions = []
    for i in (by_dice[0], by_dice[len(by_dice) // 2], by_dice[-1]):
        item = test_examples[i]
        film = item["views"]  # (1, H, W)
        guess = model(torch.from_numpy(film)[:, None].to(device) / 255) > 0
        tinted = np.repeat(film[0, ..., None] * 0.6, 3, axis=2)
        tinted[..., 0] += 100 * guess[0].cpu().numpy()
        tinted[..., 1] += 100 * item["goal"]
        images.append([film[0], tinted.clip(0, 255).astype(np.uint8)])
        name = test_examples.films.examples[i].path.name[:40]
        captions.append([name, f"Dice {100 * rows[i][0]:.1f}"])
    columns = ["film", "green truth, red prediction"]
    page = pictures.grid(images, captions, columns, ["best", "median", "worst"], cell=256)
    pictures.save_or_warn(page, folder / "cases.png")


def summarise(out: Path, args, splits: Splits, weights, results: list[dict], team):
    """Write result.json of all seeds and print its numbers, the metric last."""
    values = [result["value"] for result in results]
    std = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    per_class = {}
    for name in results[0]["per_class"]:
        each = [result["per_class"][name] for result in results]
        per_class[name] = None if None in each else float(np.mean(each))
    unreadable = set().union(*[result["bad"] for result in results])
    summary = {
        "task": args.task,
        "metric": METRIC[splits.kind],
        "mean": float(np.mean(values)),
        "std": std,
        "seeds": values,
        "per_class": per_class,
        "split": splits.counts(),
        "notes": splits.notes,
        "weights": str(weights or "none"),
        "freeze": args.freeze,
        "fraction": args.fraction,
        "shots": args.shots,
        "trained_on": [result["films"] for result in results],
        "bad": sorted(unreadable),
    }
    if team.lead:
        write_json(out / "result.json", summary)
    for name, value in per_class.items():
        undefined = "undefined: test lacks its positives or negatives"
        team.say(f"  {name:32s} {undefined if value is None else f'{value:6.2f}'}")
    paper = TASKS[args.task].paper
    beside = f" (paper {paper})" if paper else ""
    spread = f" ± {std:.2f} % over {len(values)} seeds" if len(values) > 1 else " %, one seed"
    metric = METRIC[splits.kind]
    team.say(f"test {metric} {summary['mean']:.2f}{spread}{beside}: {out}/result.json")
