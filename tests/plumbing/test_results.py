"""What a fine-tuning run says of its films, and how a finished model is tested on others."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from plumbing import results


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
