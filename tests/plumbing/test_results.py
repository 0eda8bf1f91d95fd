"""What a fine-tuning run says of its films, and how a finished model is tested on others."""

import csv
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from plumbing import results
from plumbing.benchmarks import TASKS
from plumbing.metrics import bootstrap
from plumbing.splits import Example


def test_judgement_of_three_classes_leaves_unread_films_out():
    rng = np.random.default_rng(0)
    rows = {i: rng.normal(size=3) for i in (0, 1, 2, 4, 5, 6, 8)}  # 3 and 7 could not be read
    targets = np.array([np.eye(3)[i % 3] for i in rows])
    table = np.stack(list(rows.values()))
    value, per_class = results.judge("classes", "abc", table, targets)
    assert value == pytest.approx(100 * np.mean([row.argmax() == i % 3 for i, row in rows.items()]))
    is_b = [i % 3 == 1 for i in rows]
    area = roc_auc_score(is_b, [row[1] for row in rows.values()])
    assert per_class["b"] == pytest.approx(100 * area)


def test_the_interval_of_a_mean_is_over_the_same_classes_in_every_draw():
    rng = np.random.default_rng(0)
    targets = np.zeros((60, 2))
    targets[:30, 0] = 1
    targets[5, 1] = 1  # a third of the draws lack it
    table = rng.standard_normal((60, 2)) + 3 * targets * [1, -1]
    patients = np.arange(60)
    bounds = bootstrap(partial(results.measure, "labels", table, targets), patients)
    assert np.isnan(bounds[0]).all() and np.isnan(bounds[2]).all()
    assert bounds[1, 0] > 0.9
    targets[5:25, 1] = 1
    low, high = bootstrap(partial(results.measure, "labels", table, targets), patients)[0]
    means = []
    for _ in range(1000):
        i = rng.integers(60, size=60)
        means.append(np.mean([roc_auc_score(targets[i, k], table[i, k]) for k in (0, 1)]))
    assert (low, high) == pytest.approx(np.quantile(means, (0.025, 0.975)), abs=0.02)
    targets[:, 1] = np.nan  # not known at all: the mean is over the other
    value, per_class = results.judge("labels", "ab", table, targets)
    assert value == per_class["a"] and per_class["b"] is None


def test_predictions_keep_the_order_of_very_sure_films(tmp_path):
    logits = np.linspace(20, 34, 50, dtype=np.float32)  # all of them are 1.00000000 to 9 digits
    examples = [Example(Path(f"{k}.png"), (k % 2,), f"p{k}") for k in range(50)]
    films = {"test": SimpleNamespace(examples=examples)}
    task = SimpleNamespace(kind="labels", labels=("a",), root=Path("/"), films=films)
    results.write_predictions(tmp_path, task, {k: logits[k : k + 1] for k in range(50)})
    read = results.read_predictions(tmp_path, task)
    probability = 1 / (1 + np.exp(-logits.astype(float)))
    assert np.allclose([read[k] for k in range(50)], probability[:, None], atol=1e-15)
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    written = [float(row["a"]) for row in rows]
    assert np.array_equal(np.argsort(written), np.arange(50)) and len(set(written)) == 50


def test_it_is_said_whose_recipe_it_is():
    """Published: for VinDr epochs and batch, for CheXpert the epoch alone, else neither."""
    said = {task: results.whose_recipe(task) for task in TASKS}
    assert "epochs and batch are those of the authors' code" in said["vindr"]
    assert "one epoch is the authors' code's, the batch is ours" in said["chexpert"]
    for task in set(said) - {"vindr", "chexpert", "csv"}:
        assert said[task] == "The recipe is the paper's, but for epochs and batch, which are ours."
    assert "epochs, batch, --head and --pool are ours" in said["csv"]


def test_it_is_said_why_there_is_no_interval():
    assert results.with_interval(91.2, None, 2) == "91.20 % (no interval: 2 test patients)"
    assert results.with_interval(91.2, None, 9).endswith(
        "9 test patients with too few positives or negatives)"
    )
    assert results.with_interval(100, [100, 100], 56).startswith("100.00 % (no interval: all ")
    assert results.with_interval(91.2, [88, 94.1], 9) == "91.20 % (95 % interval 88.00 to 94.10)"


def test_it_is_said_of_which_labels_a_mean_is():
    said = [
        results.metric_of("labels", dict(zip("abcd", values, strict=False)))
        for values in ([90], [90, 80, 70, 60], [90, None, 70, None], [None, 80, None, None])
    ]
    assert said == [
        "AUROC",
        "AUROC, mean of 4 labels,",
        "AUROC, mean of the 2 of 4 labels that can be judged,",
        "AUROC of b alone, the only one of 4 that can be judged,",
    ]
    assert results.metric_of("mask", {"all films": 1, "films with a mask": None}) == "Dice"
    assert results.metric_of("labels", {"a": None, "b": None}) == "AUROC"
