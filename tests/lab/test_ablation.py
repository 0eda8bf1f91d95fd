"""lab.ablation: Table 3 by hand, one ablated run, both grids with the real scripts."""

import csv
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from lab_for_tests import good, make_place, run  # noqa: F401 (place is a fixture)
from PIL import Image

from lab import ablation
from model import SIZES, ViT
from plumbing import checkpoint, launch
from plumbing.table import read_table

SHORT = "--size tiny --image 64 --patch 8 --batch 8 --epochs 1 --warmup 0 --device cpu"


def written_cells(config):
    """Results of three cells of Table 3, as pretrain.py and finetune.py write them."""
    domain = {name: {"recall@5": value} for name, value in DOMAIN.items()}
    shape = {"size": "tiny", "image": 64, "patch": 8, "no_action": False}
    for row, seed, value in (("local", 0, 60.0), ("local", 1, 70.0), ("full, no Δ", 0, 80.0)):
        here = ablation.folder(config, row, seed)
        scratch = {ablation.SCRATCH: 55.0 + seed, ablation.PIXELS: 58.0}
        probe = {"t": {"pre-trained": value, **scratch}}
        checkpoint.write_json(here / "result.json", {"probe": probe, "domain": domain})
        tasks = "local" if row == "local" else "local,global,domain"
        checkpoint.write_json(here / "config.json", {"tasks": tasks, **shape})
        checkpoint.write_json(here / "finetune_t" / "result.json", {"mean": value + 5})


DOMAIN = {"action": 30.0, "no_action": 20.0, "random": 8.0}


def test_ablation_table_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "run_grid", lambda *_: None)
    words = ["--out", str(tmp_path), "--seeds", "2", "--rows", "local;full, no Δ"]
    words += ["--data", "films", "--probe", "t.csv"]
    written_cells(ablation.Config(out=str(tmp_path)))
    ablation.main(words)
    result = json.loads((tmp_path / "result.json").read_text())
    local, no_delta = result["local"], result["full, no Δ"]
    assert np.isclose(local["probe t"]["mean"], 65)
    assert np.isclose(local["probe t"]["std"], np.std([60, 70], ddof=1))
    assert local["Recall@5"]["mean"] == 20  # it never saw an action
    assert no_delta["Recall@5"]["mean"] == 30
    assert local["10% t"]["seeds"] == [65, 75]
    scratch = result[ablation.SCRATCH]
    assert scratch["Recall@5"]["mean"] == 8 and scratch["probe t"]["seeds"] == [55, 56]
    assert set(result[ablation.PIXELS]) == {"probe t"}
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0].startswith("| | probe t | 10% t | Recall@5 |")
    assert lines[2].startswith("| local |") and "65.0 ± 7.1" in lines[2]
    assert lines[-1].endswith("candidates 8 × 8 brightness × contrast")
    assert lines[2].endswith("| 2 | 84.7 |") and lines[3].endswith("| 1 | 87.6 |")
    config = ablation.Config()
    assert len({ablation.folder(config, row, 0) for row in ablation.ROWS}) == len(ablation.ROWS)
    assert ablation.PAPER.keys() <= ablation.ROWS.keys()  # a row of one's own gets a dash


def save_encoder(path, seed=0):
    """Write the weights of a tiny encoder, for 16 px in patches of 8."""
    torch.manual_seed(seed)
    vit = ViT(16, 8, **{key: SIZES["tiny"][key] for key in ("dim", "depth", "heads")})
    saved = {"encoder": vit.state_dict(), "config": vit.config, "step": 1}
    checkpoint.save_atomic(saved, path)


COMPARE = "compare --data d --tables t --weights w".split()


@pytest.mark.parametrize(
    "words, says",
    [
        (["--rows", "locale"], "any of"),
        (["--seeds", "0"], "--seeds 0.*: must be above 0"),
        (["--probe", "a/t.csv,b/t.csv", "--data", "films"], "two tables of one name"),
        (["trian"], "say train or compare"),
        (["train", "--tasks", "locall"], "any of local,global,domain"),
        (["train", "--pixels", "1"], "only pretrain.py has it"),
        (["compare", "--data", "films"], "are needed"),
        (["compare", *"--data d --tables t --weights w --rows frozen".split()], "any of scratch"),
        (["compare", *"--data d --tables t --weights nowhere.pt".split()], "no such checkpoint"),
        ([*COMPARE, "--tables", "a/t.csv,b/t.csv"], "--tables .*two tables of one name"),
        ([*COMPARE, "--fractions", "0.5,1.5"], "--fractions 1.5: numbers above 0, at most 1,"),
        ([*COMPARE, "--fractions", "half"], "--fractions half: numbers above 0"),
        ([*COMPARE, "--shots", "10,,40"], "--shots : whole numbers above 0"),
        ([*COMPARE, "--shots", "0.5"], "--shots 0.5: whole numbers above 0"),
    ],
)
def test_mistakes_are_said_in_one_line(tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(launch.UserError, match=says) as error:
        ablation.main(words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "words, recipe",
    [("--data films", "paper"), ("", "demo"), ("--data films --recipe small", "small")],
)
def test_table_3_is_of_the_papers_recipe_and_of_features_alone(monkeypatch, words, recipe):
    called = []
    monkeypatch.setattr(ablation.pretrain, "main", lambda args, Model: called.append(args))
    ablation.main(["train", *words.split()])
    assert (called[0].recipe, called[0].pixels) == (recipe, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "switches, terms",
    [
        ("--tasks global,domain --no_delta --precision bfloat16", {"l12", "l21"}),
        ("--not_unified --no_action", {"l11", "l22", "l12", "l21", "d11", "d22"}),
    ],
)
def test_ablation_switches_train(place, tmp_path, switches, terms):
    out = tmp_path / "run"
    words = (
        f"train --data set/films {SHORT} {switches} --max_steps 2 --log_every 2 --holdout 1".split()
    )
    good(place, "ablation", *words, "--out", out)
    row = checkpoint.read_log(out / "log.csv")[-1]
    assert {name for name in row if re.fullmatch(r"[ld]\d\d", name) and row[name]} == terms
    assert 0 < float(row["loss"]) < 3
    saved = torch.load(out / "last.pt", weights_only=True)["config"]
    recipe = json.loads((out / "config.json").read_text())
    assert (saved["tasks"], saved["delta"]) == (recipe["tasks"], not recipe["no_delta"])
    refused = run(place, "ablation", *words, "--out", out, "--no_delta", "--tasks", "global")
    assert refused.returncode == 1 and "another recipe (tasks" in refused.stderr


@pytest.mark.slow
def test_ablation_runs_the_real_scripts_and_goes_on(place):
    words = ["ablation", "--out", "a", "--seeds", 1, "--rows", "full, not unified"]
    words += ["--data", "set/films", "--probe", "set/phantoms.csv", "--fraction", 0.5]
    words += ["--flags", f"{SHORT} --max_steps 1", "--finetune", "--max_steps 1 --epochs 1"]
    first = good(place, *words)
    assert "--not_unified" in first and "--weights none" in first
    assert first.count("--fraction 0.5") == 2
    result = json.loads((place / "a" / "result.json").read_text())
    columns = {"probe phantoms", "50% phantoms", "Recall@5", "RankMe"}
    assert set(result["full, not unified"]) == columns
    assert set(result[ablation.SCRATCH]) == columns - {"RankMe"}
    again = good(place, *words)
    assert "nothing left to run" in again and "lab.ablation train" not in again
    refused = run(place, *words, "--fraction", 0.2)
    assert refused.returncode == 1 and "fraction 0.5 → 0.2" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    (place / "a" / "random_initialisation" / "seed0" / "finetune_phantoms" / "result.json").unlink()
    assert "nothing left" not in good(place, *words)


def test_the_curve_over_films_per_class_by_hand(tmp_path, monkeypatch):
    """Means and dots of every row and draw; a cell that is not finished is left out."""
    drawn = {}
    monkeypatch.setattr(
        ablation.pictures,
        "curves",
        lambda lines, *_, dots, **more: drawn.update(lines=lines, dots=dots),
    )
    monkeypatch.setattr(ablation.pictures, "stack", lambda charts: charts)
    monkeypatch.setattr(ablation.pictures, "save_or_warn", lambda *_: None)
    out = tmp_path / "c"
    config = ablation.CompareConfig(
        "w", "d", "a/t.csv", str(out), shots="80,10", fractions="0.5", seeds=2
    )
    values = {("10", 0): 60.0, ("10", 1): 70.0, ("80", 0): 90.0}
    for (shots, draw), value in values.items():
        cell = out / "t" / f"{shots}_per_class" / "scratch" / f"draw{draw}"
        result = {"seeds": [value], "metric": "AUROC", "trained_on": [2 * int(shots)]}
        checkpoint.write_json(cell / "result.json", result)
    half = {"seeds": [75.0, 77.0], "metric": "AUROC", "trained_on": [200, 200]}
    checkpoint.write_json(out / "t" / "0.5" / "scratch" / "result.json", half)
    table = ablation.write_comparison(config, ["scratch", "pre-trained full"])
    columns = "t AUROC, 200 films | t AUROC, 80 films per class | t AUROC, 10 films per class"
    assert f"| | {columns} |" in table
    assert "| scratch | 76.0 ± 1.4 | 90.0 | 65.0 ± 7.1 |" in table
    assert "| pre-trained full | – | – | – |" in table
    assert drawn["lines"] == {"scratch": [(10, 80), (65.0, 90.0)], "pre-trained full": ([], [])}
    assert set(zip(*drawn["dots"]["scratch"], strict=True)) == {(10, 60.0), (10, 70.0), (80, 90.0)}


def write_seed(folder, metric, header, rows):
    """What finetune.py leaves of one seed, as far as the comparison reads it."""
    folder.mkdir(parents=True)
    checkpoint.write_json(folder / "result.json", {})
    checkpoint.write_json(folder.parent / "result.json", {"metric": metric})
    with (folder / "predictions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def test_films_whose_patient_nobody_knows_count_as_one_each(tmp_path):
    rows = [["a.png", "", 0.5, 1], ["b.png", "", 0.1, 0], ["c.png", "p", 0.2, 0]]
    write_seed(tmp_path / "seed0", "AUROC", ["film", "patient", "ill", "true_ill"], rows)
    assert ablation.read_judged(tmp_path / "seed0")[1] == ["a.png", "b.png", "p"]


def test_a_patient_in_two_spellings_is_one(tmp_path):
    """predictions.csv has film and patient as the user's table spells them."""
    spellings = ["P-01", "p01", "013", "13", "13.0"]
    rows = [[f"{k}.png", who, 0.5, k % 2] for k, who in enumerate(spellings)]
    write_seed(tmp_path / "seed0", "AUROC", ["film", "patient", "ill", "true_ill"], rows)
    assert ablation.read_judged(tmp_path / "seed0")[1] == ["p1"] * 2 + ["13"] * 3


@pytest.mark.parametrize("flag", ["fraction", "shots"])
def test_the_difference_from_scratch_is_paired(tmp_path, flag):
    """AUROC by counting pairs, mean of three seeds; the interval from a loop over redraws, of
    patients and of two seeds in each.
    """
    rng = np.random.default_rng(0)
    patients = np.arange(60) // 2
    truth = rng.integers(0, 2, 60)
    films = [f"{i}.png" for i in range(60)]
    config = ablation.CompareConfig("w", "d", "t.csv", str(tmp_path), seeds=3)
    column = ablation.Column("t.csv", flag, "10")
    chances = {}
    for row, skill in (("scratch", 0.2), ("pre-trained full", 1.5)):
        for k in range(3):
            chances[row, k] = truth * (skill + k / 2) + rng.normal(size=60)
            folders = ablation.compare_folders(config, row, column)
            here = folders[k % len(folders)] / f"seed{k}"
            header = ["film", "patient", "ill", "true_ill"]
            rows = zip(films, patients, chances[row, k], truth, strict=True)
            write_seed(here, "AUROC", header, rows)

    def mean_difference(drawn, seeds):
        ill, well = (drawn[truth[drawn] == value] for value in (1, 0))
        areas = {key: (x[ill][:, None] > x[well]).mean() for key, x in chances.items()}
        return 100 * np.mean([areas["pre-trained full", k] - areas["scratch", k] for k in seeds])

    words = ablation.from_scratch(config, "pre-trained full", column)
    value, low, high = map(float, re.findall(r"[-+]?\d+\.\d", words))
    assert value == pytest.approx(mean_difference(np.arange(60), range(3)), abs=0.051)
    redrawn = []
    for _ in range(1000):
        chosen = rng.integers(0, 30, 30)
        drawn = np.concatenate([[2 * p, 2 * p + 1] for p in chosen])
        redrawn.append(mean_difference(drawn, rng.integers(0, 3, 2)))
    assert (low, high) == pytest.approx(np.quantile(redrawn, (0.025, 0.975)), abs=2)
    assert words.endswith(", above") and low > 0
    (here / "result.json").unlink()
    assert ablation.from_scratch(config, "pre-trained full", column) == "–"


def test_a_cell_says_what_was_cut_and_which_seeds_lack(tmp_path):
    config = ablation.CompareConfig("w", "d", "t.csv", str(tmp_path), seeds=2)
    column = ablation.Column("t.csv", "fraction", "1")
    (here,) = ablation.compare_folders(config, "scratch", column)
    result = {"seeds": [70.0, 80.0, 99.0], "metric": "AUROC", "trained_on": [9, 9]}
    checkpoint.write_json(here / "result.json", result)  # of an earlier run with three seeds
    assert ablation.cell_text(ablation.read_cell(config, "scratch", column)) == "75.0 ± 7.1"
    checkpoint.write_json(here / "result.json", result | {"cut": [None, [5, 100]]})
    assert ablation.cell_text(ablation.read_cell(config, "scratch", column)) == "CUT 75.0 ± 7.1"
    assert ablation.cell_text(ablation.over_seeds([70.0, 80.0]), 3) == "75.0 ± 7.1 (2 of 3 seeds)"
    assert ablation.over_seeds([70.0])["std"] is None


def test_the_difference_of_masks_is_that_of_dice(tmp_path):
    config = ablation.CompareConfig("w", "d", "t.csv", str(tmp_path), seeds=1)
    column = ablation.Column("t.csv", "fraction", "1")
    for row, dice in (("scratch", [0.5, 0.7, 0.9, ""]), ("pre-trained full", [0.6, 0.8, 1.0, ""])):
        (cell,) = ablation.compare_folders(config, row, column)
        rows = [[f"{i}.png", f"p{i}", d, "" if d == "" else 1] for i, d in enumerate(dice)]
        write_seed(cell / "seed0", "Dice", ["film", "patient", "dice", "has_mask"], rows)
    words = ablation.from_scratch(config, "pre-trained full", column)
    assert words == "+10.0 (10.0 to 10.0), above"
    (cell,) = ablation.compare_folders(config, "scratch", column)
    for file in (cell / "seed0").iterdir():
        file.unlink()
    (cell / "seed0").rmdir()
    write_seed(cell / "seed0", "Dice", ["film", "patient", "dice", "has_mask"], rows[:2])
    assert ablation.from_scratch(config, "pre-trained full", column) == "–"  # other films


def test_every_seed_draws_its_own_films_alike_for_all_rows(tmp_path):
    path = tmp_path / "encoder.pt"
    save_encoder(path)
    config = ablation.CompareConfig(
        str(path), "d", "a/t.csv", str(tmp_path / "c"), shots="10", seeds=3, finetune="--pool cells"
    )
    (column,) = ablation.compare_columns(config)
    commands = {}
    for row in ablation.COMPARED.split(","):
        runs = list(ablation.compare_runs(config, row, column))
        commands[row] = [run.command[run.command.index("--shots") :] for run in runs]
        assert all(run.command[-2:] == ["--pool", "cells"] for run in runs)
        assert not any(run.is_finished() for run in runs)
        result = {"seeds": [60.0]}
        checkpoint.write_json(
            ablation.compare_folders(config, row, column)[1] / "result.json", result
        )
        assert [run.is_finished() for run in runs] == [False, True, False]
    for each in commands.values():
        wanted = [["--shots", "10", "--seed", f"{k}", "--draw", f"{k}"] for k in range(3)]
        assert [words[:6] for words in each] == wanted


def test_intervals_are_computed_once_and_means_are_kept_after_every_run(tmp_path, monkeypatch):
    """They take seconds per cell, and a grid has dozens of runs."""
    judged = []
    tables = []

    def finish(command):
        words = map(str, command)
        out = next(Path(word) for flag, word in itertools.pairwise(words) if flag == "--out")
        table = tmp_path / "c" / "table.md"
        tables.append(table.read_text() if table.is_file() else "")
        result = {"seeds": [60.0], "metric": "AUROC", "trained_on": [9, 9]}
        checkpoint.write_json(out / "result.json", result)

    monkeypatch.setattr(ablation, "run_and_wait", finish)
    monkeypatch.setattr(ablation, "from_scratch", lambda _, *cell: judged.append(cell) or "+1.0")
    save_encoder(tmp_path / "encoder.pt")
    words = ["compare", "--data", "d", "--tables", "a/t.csv,b/u.csv", "--seeds", "1"]
    words += ["--weights", str(tmp_path / "encoder.pt"), "--out", str(tmp_path / "c")]
    ablation.main([*words, "--rows", "scratch,pre-trained frozen", "--fractions", "1"])
    assert [table.count("60.0") for table in tables] == [0, 1, 2, 3]
    assert len(judged) == 2 and not any("minus scratch" in table for table in tables)
    table = (tmp_path / "c" / "table.md").read_text()
    assert table.count("60.0") == 4 and "| pre-trained frozen | +1.0 | +1.0 |" in table


def test_a_grid_knows_what_its_tables_held(tmp_path):
    """Others may come, and an older grid does not tell; a changed one is refused."""
    tables = []
    for name in "ab":
        tables.append(str(tmp_path / f"{name}.csv"))
        (tmp_path / f"{name}.csv").write_text("filename,label\n")
    grid = tmp_path / "compare.json"
    checkpoint.write_json(grid, {"data": "d"})
    for asked in (tables[:1], tables, tables[1:], [*tables, "none.csv"]):
        ablation.keep_recipe(grid, {"data": "d"}, asked)
    (tmp_path / "a.csv").write_text("filename,label\nf,1\n")
    ablation.keep_recipe(grid, {"data": "d"}, tables[1:])
    with pytest.raises(launch.UserError, match=r"another recipe \(content of a.csv \w+ → \w+\)"):
        ablation.keep_recipe(grid, {"data": "d"}, tables)
    with pytest.raises(launch.UserError, match=r"another recipe \(data d → e\)"):
        ablation.keep_recipe(grid, {"data": "e"}, tables[1:])
    with pytest.raises(launch.UserError, match="holds a comparison by lab.ablation: choose"):
        ablation.take_folder(tmp_path, "ablation.json")
    assert not (tmp_path / ".lock").exists()


@pytest.mark.slow
def test_compare_makes_the_table_and_goes_on(place):
    save_encoder(place / "encoder.pt")
    rows = read_table(place / "set" / "phantoms.csv", "filename", "label", "patient_id", "split")
    lines = [",".join(row.values()) for row in rows]
    (place / "set" / "labels.csv").write_text("\n".join([",".join(rows[0]), *lines]))
    words = ["ablation", "compare", "--weights", "encoder.pt", "--data", "set/films"]
    words += ["--tables", "set/labels.csv", "--fractions", "0.5", "--seeds", 2]
    words += ["--rows", "pre-trained frozen", "--out", "c", "--shots", "2"]
    words += ["--finetune", "--pool cells"]
    first = good(place, *words)
    cell = place / "c" / "labels" / "0.5" / "pre-trained-frozen" / "result.json"
    result = json.loads(cell.read_text())
    table = (place / "c" / "table.md").read_text()
    assert f"| pre-trained frozen | {result['mean']:.1f} ± {result['std']:.1f} |" in table
    assert "labels AUROC, 16 films" in table and table in first
    assert "labels AUROC, 2 films per class" in table
    for k in (0, 1):
        drawn = place / "c" / "labels" / "2_per_class" / "pre-trained-frozen" / f"draw{k}"
        result = json.loads((drawn / "result.json").read_text())
        assert result["shots"] == 2 and (drawn / f"seed{k}").is_dir()
    assert Image.open(place / "c" / "curve.png").size == (640, 320)
    again = good(place, *words)
    assert "nothing left to run" in again and "finetune.py" not in again
    assert (place / "c" / "table.md").read_text() == table
    assert len(json.loads(cell.read_text())["seeds"]) == 2
    table = place / "set" / "labels.csv"
    corrected = table.read_text().replace(",train", ",val", 1)
    table.write_text(corrected)
    refused = run(place, *words)
    assert refused.returncode == 1 and "another recipe (content of labels.csv" in refused.stderr
    save_encoder(place / "encoder.pt", seed=1)
    refused = run(place, *words)
    assert refused.returncode == 1 and "another recipe (weights" in refused.stderr


def test_rows_of_the_comparison_differ_in_weights_and_freezing(tmp_path):
    path = str(tmp_path / "encoder.pt")
    save_encoder(path)
    scratch = ["--weights", "none", "--size", "tiny", "--image", 16, "--patch", 8]
    assert ablation.weight_flags("scratch", path) == scratch
    assert ablation.weight_flags("random frozen", path) == [*scratch, "--freeze"]
    assert ablation.weight_flags("pre-trained frozen", path) == ["--weights", path, "--freeze"]
    assert ablation.weight_flags("pre-trained full", path) == ["--weights", path]
    odd = ViT(16, 8, dim=64, depth=1, heads=4)
    checkpoint.save_atomic({"encoder": odd.state_dict(), "config": odd.config}, path)
    with pytest.raises(launch.UserError, match="no --size has the shape"):
        ablation.weight_flags("scratch", path)
