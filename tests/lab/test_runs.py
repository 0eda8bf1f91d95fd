"""lab.runs: a table of runs equals what their result.json files say, worked out by hand."""

import csv
import statistics

import pytest

from lab import runs
from plumbing.checkpoint import read_json, write_json, write_text
from plumbing.launch import UserError

AUROC = {  # batch and seed of a run: AUROC of the mean and of the cells
    (8, 0): (80.0, 85.0),
    (8, 1): (83.0, 84.0),
    (32, 0): (77.0, 82.5),
}
RANDOM = {0: (70.0, 79.0), 1: (72.0, 78.0)}  # by seed: random weights know no batch


def write_run(folder, batch, seed):
    """The files of a finished run that lab.runs reads."""
    mean, cells = AUROC[batch, seed]
    values = {
        "pre-trained": mean,
        "pre-trained, cells": cells,
        "random initialisation": RANDOM[seed][0],
        "random initialisation, cells": RANDOM[seed][1],
        "raw 8² pixels": 81.0,
        "raw 64² pixels": 81.5,
    }
    judged = {"values": values, "intervals": {name: [v - 5, v + 5] for name, v in values.items()}}
    told = {"difference": cells - 81.5, "interval": [-1.0, 4.0], "word": "level with"}
    judged["differences"] = {"pre-trained, cells": {"raw 64² pixels": told}}
    worse = {name: value - 20 for name, value in values.items()}
    of_test = {"values": worse, "intervals": {name: [v, v] for name, v in worse.items()}}
    of_test["differences"] = {}
    domain = {"action": {"recall@5": 50.0 + seed}, "no_action": {"recall@5": 25.0}}
    domain["intervals"] = {"action": {"recall@5": [45.0, 55.0]}, "no_action": {"recall@5": None}}
    result = {"domain": domain, "probe_intervals": {"sex": {"test": of_test, "all": judged}}}
    write_json(folder / "result.json", result)
    config = {"batch": batch, "seed": seed, "out": str(folder), "epochs": 2, "max_steps": None}
    write_json(folder / "config.json", config)
    write_text(folder / "log.csv", "step,epoch,loss,rankme\n1,0.333333,0.5,3\n6,2,0.25,\n")


@pytest.fixture(name="compared")
def compare(tmp_path, capsys):
    for batch, seed in AUROC:
        write_run(tmp_path / f"b{batch}_{seed}", batch, seed)
    (tmp_path / "b_unfinished").mkdir()
    runs.main(["--runs", f"{tmp_path}/b*", "--out", str(tmp_path / "out")])
    return tmp_path / "out", capsys.readouterr().out


def test_the_table(compared):
    """One line per batch; the seeds of one batch are averaged, baselines once per seed."""
    folder, said = compared
    lines = (folder / "table.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "| | seeds | sex, mean / cells | Recall@5 |"
    assert lines[2] == "| raw 8² pixels / raw 64² pixels | – | 81.0 / 81.5 | – |"
    spread = statistics.stdev([70, 72]), statistics.stdev([79, 78])
    expected = "71.0 ± {:.1f} / 78.5 ± {:.1f}".format(*spread)
    assert lines[3] == f"| random initialisation | 2 | {expected} | – |"
    assert lines[4] == "| batch 32 | 1 | 77.0 / 82.5 | 50.0 / 25.0 |"
    spread = statistics.stdev([80, 83]), statistics.stdev([85, 84])
    expected = "81.5 ± {:.1f} / 84.5 ± {:.1f}".format(*spread)
    assert lines[5] == f"| batch 8 | 2 | {expected} | 50.5 ± 0.7 / 25.0 ± 0.0 |"
    assert lines[2] in said and "left out" in said and "b_unfinished" in said


def test_every_number_is_in_the_csv(compared):
    folder, _ = compared
    with open(folder / "runs.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * (6 + 6 + 1 + 2 + 2)  # all, test, difference, Recall@5, loss and RankMe
    own = [list(row.values())[3:] for row in rows if row["run"] == "b8_1"]
    cells = "pre-trained, cells"
    assert ["sex", "all", cells, "", "84.0", "79.0", "89.0"] in own
    assert ["sex", "all", cells, "raw 64² pixels", "2.5", "-1.0", "4.0"] in own
    assert ["sex", "test", cells, "", "64.0", "64.0", "64.0"] in own
    assert ["Recall@5", "", "with the action", "", "51.0", "45.0", "55.0"] in own
    assert ["Recall@5", "", "without the action", "", "25.0", "", ""] in own
    ends = {row["what"]: row["value"] for row in rows if row["features"] == "at the end"}
    assert ends == {"loss": "0.25", "rankme": "3.0"}


def test_a_run_that_was_cut_is_no_seed_of_those_that_were_not(tmp_path, capsys):
    write_run(tmp_path / "whole", 8, 0)
    write_run(tmp_path / "cut", 8, 1)
    write_text(tmp_path / "cut" / "log.csv", "step,epoch,loss,rankme\n4,1.33333,0.5,3\n")
    config = read_json(tmp_path / "cut" / "config.json")
    write_json(tmp_path / "cut" / "config.json", config | {"max_steps": 4})
    runs.main(["--runs", f"{tmp_path}/*", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "| all alike, CUT at step 4 of 6 | 1 | 83.0 / 84.0 |" in said
    assert "| all alike | 1 | 80.0 / 85.0 |" in said
    assert "CUT at step 4 of 6" in (tmp_path / "out" / "runs.csv").read_text(encoding="utf-8")


def test_a_run_that_was_resumed_since_it_was_judged_is_cut(tmp_path, capsys):
    """Its log has come to the end, its result.json not yet."""
    write_run(tmp_path / "a", 8, 0)
    result = read_json(tmp_path / "a" / "result.json")
    for step, words in ((3, "| all alike, CUT at step 3 of 6 | 1 |"), (6, "| all alike | 1 |")):
        write_json(tmp_path / "a" / "result.json", result | {"step": step})
        runs.main(["--runs", f"{tmp_path}/a", "--out", str(tmp_path / "out")])
        assert words in capsys.readouterr().out


def test_a_seed_without_probes_is_told(tmp_path, capsys):
    """As when a run was killed while it probed."""
    write_run(tmp_path / "a", 8, 0)
    write_run(tmp_path / "b", 8, 1)
    result = read_json(tmp_path / "b" / "result.json")
    write_json(tmp_path / "b" / "result.json", result | {"probe_intervals": {}})
    runs.main(["--runs", f"{tmp_path}/*", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "| all alike | 2 | 80.0 (1 of 2 seeds) / 85.0 (1 of 2 seeds) | 50.5 ± 0.7 /" in said


def test_random_weights_count_once_per_seed_and_network(tmp_path, capsys, monkeypatch):
    """Also where two seeds happen to agree, and not with those of another patch."""
    monkeypatch.setitem(RANDOM, 1, (70.0, 79.0))
    for name, batch, seed, patch in (("a", 8, 0, 16), ("b", 8, 1, 16), ("c", 32, 0, 8)):
        write_run(tmp_path / name, batch, seed)
        config = read_json(tmp_path / name / "config.json") | {"patch": patch}
        write_json(tmp_path / name / "config.json", config)
    result = read_json(tmp_path / "c" / "result.json")
    result["probe_intervals"]["sex"]["all"]["values"]["random initialisation"] = 60.0
    write_json(tmp_path / "c" / "result.json", result)
    runs.main(["--runs", f"{tmp_path}/*", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "| random initialisation, patch 16 | 2 | 70.0 ± 0.0 / 79.0 ± 0.0 | – |" in said
    assert "| random initialisation, patch 8 | 1 | 60.0 / 79.0 | – |" in said


def test_an_undefined_number_is_a_dash(tmp_path, capsys):
    """As where redraws of the patients lack the few who have a finding, or all test films do."""
    write_run(tmp_path / "a", 8, 0)
    result = read_json(tmp_path / "a" / "result.json")
    judged = result["probe_intervals"]["sex"]["all"]
    judged["values"]["raw 8² pixels"] = None
    judged["intervals"]["raw 8² pixels"] = None
    judged["intervals"]["raw 64² pixels"] = None
    write_json(tmp_path / "a" / "result.json", result)
    runs.main(["--runs", f"{tmp_path}/a", "--out", str(tmp_path / "out")])
    assert "| raw 8² pixels / raw 64² pixels | – | – / 81.5 | – |" in capsys.readouterr().out
    written = (tmp_path / "out" / "runs.csv").read_text(encoding="utf-8")
    assert "a,all alike,0,sex,all,raw 8² pixels,,,,\n" in written
    assert "a,all alike,0,sex,all,raw 64² pixels,,81.5,,\n" in written


def test_without_a_finished_run(tmp_path):
    with pytest.raises(UserError, match="no finished run"):
        runs.main(["--runs", f"{tmp_path}/*", "--out", str(tmp_path / "out")])
