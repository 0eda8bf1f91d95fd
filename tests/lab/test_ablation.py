"""Ablation: its table by hand, its rank correlation against SciPy, the grid with the real scripts."""

import json

import numpy as np
import pytest
from lab_for_tests import good, make_place, run  # noqa: F401 (place is a fixture)
from scipy import stats

from lab import ablation
from plumbing import checkpoint


def test_ablation_table_by_hand(tmp_path):
    config = ablation.Config(
        out=str(tmp_path),
        seeds=2,
        rows="local;full, no Δ",
        data="films",
        probe="t.csv",
        table_only=True,
    )
    for row, seed, value in (("local", 0, 60.0), ("local", 1, 70.0), ("full, no Δ", 0, 80.0)):
        here = ablation.folder(config, row, seed)
        checkpoint.write_json(
            here / "result.json",
            {
                "probe": {
                    "t": {
                        "pre-trained": value,
                        ablation.SCRATCH: 55.0 + seed,
                        ablation.PIXELS: 58.0,
                    }
                },
                "domain": {
                    "action": {"recall@5": 30.0},
                    "no_action": {"recall@5": 20.0},
                    "random": {"recall@5": 8.0},
                },
            },
        )
        checkpoint.write_json(
            here / "config.json",
            {
                "tasks": "local" if row == "local" else "local,global,domain",
                "no_action": False,
                "size": "tiny",
                "image": 64,
                "patch": 8,
            },
        )
        checkpoint.write_json(here / "finetune_t" / "result.json", {"mean": value + 5})
    ablation.command(config, None)
    result = json.loads((tmp_path / "result.json").read_text())
    assert np.isclose(result["local"]["probe t"]["mean"], 65) and np.isclose(
        result["local"]["probe t"]["std"], np.std([60, 70], ddof=1)
    )
    assert (
        result["local"]["Recall@5"]["mean"] == 20 and result["full, no Δ"]["Recall@5"]["mean"] == 30
    )  # the first never saw an action
    assert (
        result["local"]["10% t"]["seeds"] == [65, 75]
        and result[ablation.SCRATCH]["Recall@5"]["mean"] == 8
    )
    assert result[ablation.SCRATCH]["probe t"]["seeds"] == [55, 56] and set(
        result[ablation.PIXELS]
    ) == {"probe t"}
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert (
        lines[0].startswith("| | probe t | 10% t | Recall@5 |")
        and lines[2].startswith("| local |")
        and "65.0 ± 7.1" in lines[2]
    )
    assert lines[2].endswith("| 2 | 84.7 |") and lines[3].endswith("| 1 | 87.6 |")
    assert len({ablation.folder(config, row, 0) for row in ablation.ROWS}) == len(ablation.ROWS)


def test_rank_correlation_is_scipys():
    a, b = np.random.default_rng(0).permutation(7), np.random.default_rng(1).random(7)
    assert np.isclose(ablation.agreement(a, b), stats.spearmanr(a, b).statistic)


def test_a_wrong_row_is_said_in_one_line(place):
    refused = run(place, "ablation", "--rows", "locale", "--out", "x")
    assert refused.returncode == 1 and "any of" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


@pytest.mark.slow
def test_ablation_runs_the_real_scripts_and_goes_on(place):
    flags = "--size tiny --image 64 --patch 8 --batch 8 --epochs 1 --warmup 0 --max_steps 1"
    words = [
        "ablation",
        "--out",
        "a",
        "--seeds",
        1,
        "--rows",
        "full, not unified",
        "--data",
        "set/films",
        "--probe",
        "set/phantoms.csv",
        "--flags",
        flags,
        "--fraction",
        0.5,
        "--finetune",
        "--max_steps 1 --epochs 1",
    ]
    first = good(place, *words)
    assert (
        "--not_unified" in first
        and "--weights none" in first
        and first.count("--fraction 0.5") == 2
    )
    result = json.loads((place / "a" / "result.json").read_text())
    columns = {"probe phantoms", "50% phantoms", "Recall@5", "RankMe"}
    assert set(result["full, not unified"]) == columns and set(
        result[ablation.SCRATCH]
    ) == columns - {"RankMe"}
    again = good(place, *words)
    assert "nothing left to run" in again and "pretrain.py" not in again
    refused = run(place, *words, "--fraction", 0.2)
    assert (
        refused.returncode == 1
        and "fraction 0.5 → 0.2" in refused.stderr
        and len(refused.stderr.splitlines()) == 1
    )
    (place / "a" / "random_initialisation" / "seed0" / "finetune_phantoms" / "result.json").unlink()
    assert "nothing left" not in good(place, *words)
