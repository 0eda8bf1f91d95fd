"""What a fine-tuning run says of its films, and how a finished model is tested on others."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from plumbing import results
from plumbing.benchmarks import TASKS


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


def test_it_is_said_whose_recipe_it_is():
    """Published: for VinDr epochs and batch, for CheXpert the epoch alone, else neither."""
    said = {task: results.whose_recipe(task) for task in TASKS}
    assert "epochs and batch are those of the authors' code" in said["vindr"]
    assert "one epoch is the authors' code's, the batch is ours" in said["chexpert"]
    for task in set(said) - {"vindr", "chexpert", "csv"}:
        assert said[task] == "The recipe is the paper's, but for epochs and batch, which are ours."
    assert "epochs, batch and --head are ours" in said["csv"]
