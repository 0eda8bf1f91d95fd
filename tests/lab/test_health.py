"""Health: the measures of variety by brute force, the verdicts, and the program."""

import json

import numpy as np
import pytest
from lab_for_tests import good, make_place  # noqa: F401 (place is a fixture)

from lab import health


def test_variety_knows_collapse():
    rng = np.random.default_rng(0)
    same = health.variety(np.ones((50, 8)) + 1e-4 * rng.standard_normal((50, 8)))
    free = health.variety(rng.standard_normal((50, 8)))
    assert same["rankme"] < 1.1 and free["rankme"] > 7
    assert health.verdict(same, free).startswith("collapsed")
    assert health.verdict(free, free).startswith("not collapsed")
    some = health.variety(rng.standard_normal((50, 8)) * [9, 9, 1, 0, 0, 0, 0, 0])
    assert 2 < some["rankme"] < 3 and health.verdict(some, free).startswith("suspicious")


def test_mean_cosine_is_that_of_all_pairs():
    brute = np.random.default_rng(1).standard_normal((6, 3))
    unit = brute / np.linalg.norm(brute, axis=1, keepdims=True)
    cosines = [unit[i] @ unit[j] for i, j in np.ndindex(6, 6) if i != j]
    assert np.isclose(health.variety(brute)["mean_cosine"], np.mean(cosines))


@pytest.mark.slow
def test_health(place):
    words = good(place, "health", "--data", "set/films", "--films", 40, "--out", "h")
    result = json.loads((place / "h" / "result.json").read_text())
    assert result["films"] == 40
    assert {"target encoder", "context encoder", "random initialisation"} <= set(result)
    assert f"verdict: {result['verdict']}" in words and (place / "h" / "health.png").is_file()
