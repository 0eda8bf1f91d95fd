"""The bookkeeping of one seed of fine-tuning."""

import dataclasses
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import finetune
from plumbing import checkpoint
from plumbing.launch import Team, UserError
from plumbing.seedrun import (
    Best,
    begin_or_finished,
    choose_out,
    choose_weights,
    count_steps,
    fit_to_model,
    recipe_of,
    remember,
    share_batch,
    warn_of_known_films,
)
from plumbing.splits import Example, Splits


def test_newest_pretraining_run_is_found_and_kept_on_resume(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    args = finetune.Config(task="csv")
    with pytest.raises(UserError, match="no pre-training run"):
        choose_weights(args, out)
    (tmp_path / "runs" / "demo" / "phantoms").mkdir(parents=True)
    checkpoint.write_text("runs/demo/encoder.pt", "")
    with pytest.raises(
        UserError, match="of real films .* --weights runs/demo if you mean the demo"
    ):
        choose_weights(args, out)
    assert checkpoint.newest_run() == Path("runs/demo/encoder.pt")  # the lab may look at it
    for k, name in enumerate(("new", "old")):
        checkpoint.write_text(f"runs/{name}/encoder.pt", "")
        os.utime(f"runs/{name}/encoder.pt", (1000 - k, 1000 - k))
    newest = Path("runs/new/encoder.pt")
    reason = "newest pre-training run under runs/"
    assert choose_weights(args, out) == (newest, reason)
    checkpoint.write_json(out / "seed0" / "config.json", {"weights": "runs/old/encoder.pt"})
    weights, why = choose_weights(args, out)
    assert weights == Path("runs/old/encoder.pt") and why.startswith(f"as in the run in {out}")
    for begun, others in (("none", True), ("runs/old/encoder.pt", True), (str(newest), False)):
        checkpoint.write_json(out / "seed0" / "config.json", {"weights": begun})
        assert ("not the newest, runs/new/encoder.pt" in choose_weights(args, out)[1]) == others


def test_a_tie_on_validation_goes_to_the_lower_loss():
    best = Best()
    assert best.update(80.0, 0.6, 5)
    assert best == Best(value=80.0, loss=0.6, step=5, stale=0)
    assert not best.update(80.0, 0.7, 6)
    assert best == Best(value=80.0, loss=0.6, step=5, stale=1)
    assert best.update(80.0, 0.5, 7)
    assert best == Best(value=80.0, loss=0.5, step=7, stale=0)


def test_an_undefined_validation_counts_as_0_but_is_not_0():
    best = Best()
    assert best.update(None, 0.6, 1) and str(best) == "undefined at step 1"
    assert not best.update(0.0, 0.7, 2) and best.value is None
    assert best.update(0.0, 0.5, 3) and str(best) == "0.00 at step 3"


def test_fewer_films_than_processes_are_refused():
    args = SimpleNamespace(batch=32, micro=None, freeze=False, epochs=10, max_steps=None)
    args.is_cut = True
    share_batch(args, 3, 8)
    with pytest.raises(UserError, match="3 training films are fewer than the 8 processes: start"):
        count_steps(args, "labels", 3)
    args.batch = 32
    share_batch(args, 3, 2)
    assert count_steps(args, "labels", 3).total == 10


def test_masks_of_another_spelling_are_fitted_to_the_model(tmp_path):
    masked = Example(tmp_path / "a.png", (), "p1", ("runs", ""))
    splits = Splits("siim", "mask", ("pneumothorax",), [], [], [masked], [])
    saved = {"kind": "mask", "labels": ["Pneumothorax"]}
    fitted, unknown = fit_to_model(splits, saved, "best.pt")
    assert fitted.labels == ("Pneumothorax",) and fitted.test == [masked] and not unknown


def test_names_that_many_films_bear_recognise_none(tmp_path):
    def write(*names):
        for name in names:
            checkpoint.write_text(tmp_path / name, name)
        return [Example(tmp_path / name, (0,), name.split("/")[1]) for name in names]

    saved = remember(write("old/p1/view1.png", "old/p2/view1.png", "old/p3/only.png"))
    assert len(saved["learnt_names"]) == 1
    saved["learnt_patients"] = ["other"]
    assert warn_of_known_films(write("new/p14/view1.png"), saved) == []
    (note,) = warn_of_known_films(write("new/p14/only.jpg"), saved)
    assert note.startswith("warning: 1 of these 1 films have the names of films")


def test_the_patient_of_a_column_is_that_of_the_films_name(tmp_path):
    saved = remember([Example(tmp_path / "a.png", (0,), "13"), Example(tmp_path / "b", (0,), "p1")])
    for patient, is_known in (("00000013", True), ("P1", True), ("130", False)):
        notes = warn_of_known_films([Example(tmp_path / "c.png", (0,), patient)], saved)
        assert is_known == ("1 of these 1 films have the patient ids" in "".join(notes))


def test_a_corrected_table_is_another_run_wherever_it_was_corrected(tmp_path):
    films = {}
    for split in ("train", "val", "test"):
        films[split] = [Example(Path(f"/a/{split}{k}.png"), (k % 2,), f"p{k}") for k in range(4)]
    vit = torch.nn.Linear(1, 1)
    team = Team(0, 1, torch.device("cpu"))
    begin_or_finished(tmp_path / "seed0", recipe_of({}, None, vit, ["mass"], films), 5, team)
    moved = {
        split: [film._replace(path=Path("/b") / film.path.name) for film in examples]
        for split, examples in films.items()
    }
    begin_or_finished(tmp_path / "seed0", recipe_of({}, None, vit, ["mass"], moved), 5, team)
    for split in ("train", "val", "test"):
        first, *rest = films[split]
        for other in (
            [first._replace(truth=(1,)), *rest],
            [first._replace(truth=(None,)), *rest],
            [first._replace(patient="p1"), *rest],
            [first._replace(mask=("file", Path("/a/mask.png"))), *rest],
            rest,
        ):
            changed = recipe_of({}, None, vit, ["mass"], films | {split: other})
            why = "another recipe .films_and_labels .* --out.* its table named other films"
            with pytest.raises(UserError, match=why):
                begin_or_finished(tmp_path / "seed0", changed, 5, team)
    for labels in (["nodule"], ["mass", "nodule"]):
        with pytest.raises(UserError, match="another recipe .films_and_labels"):
            begin_or_finished(tmp_path / "seed0", recipe_of({}, None, vit, labels, films), 5, team)


def test_a_run_whose_settings_are_gone_does_not_go_on_with_others(tmp_path):
    seed = tmp_path / "seed0"
    team = Team(0, 1, torch.device("cpu"))
    recipe = dict(lr=1, weights="none")
    assert begin_or_finished(seed, recipe, 5, team) is None
    (seed / "last.pt").write_bytes(b"")
    assert begin_or_finished(seed, recipe, 5, team) is None
    (seed / "config.json").unlink()
    with pytest.raises(UserError, match="without its config.json"):
        begin_or_finished(seed, recipe | {"lr": 2}, 5, team)
    assert not (seed / "config.json").exists()


def test_seeds_of_one_folder_share_recipe_and_weights(tmp_path):
    """They share a result.json, too, which that of another recipe would write over."""
    team = Team(0, 1, torch.device("cpu"))
    recipe = dict(lr=1, weights="runs/old/encoder.pt")
    assert begin_or_finished(tmp_path / "seed0", recipe, 5, team) is None
    args = finetune.Config(task="csv", seed=3)
    assert choose_weights(args, tmp_path)[0] == Path("runs/old/encoder.pt")
    with pytest.raises(UserError, match="seed0 holds .* recipe .lr 1 → 2.: choose another --out"):
        begin_or_finished(tmp_path / "seed3", recipe | {"lr": 2}, 5, team)
    assert not (tmp_path / "seed3").exists()
    assert begin_or_finished(tmp_path / "seed3", recipe, 5, team) is None


def test_a_seed_is_refused_beside_others_with_what_differs_and_how_to_keep_it(tmp_path):
    """On another machine precision and batch change though no flag did."""
    team = Team(0, 1, torch.device("cpu"))
    recipe = dict(batch=24, precision="bfloat16", lr=1)
    begin_or_finished(tmp_path / "seed0", recipe, 5, team)
    beside = "choose another --out, or give its settings: the seeds of one folder share a recipe"
    for name, value, change, advice in (
        ("batch", 20, "batch 24 → 20", "batch: .*give --batch 24, and start .* divides 24$"),
        ("precision", "float32", "precision bfloat16 → float32", "give --precision bfloat16$"),
        ("lr", 2, "lr 1 → 2", "share a recipe and a result$"),
    ):
        with pytest.raises(UserError, match=f"seed0 .*{change}.: {beside}") as refused:
            begin_or_finished(tmp_path / "seed1", recipe | {name: value}, 5, team)
        assert re.search(advice, str(refused.value))
        with pytest.raises(UserError, match=f"{change}.: choose another --out, or delete it"):
            begin_or_finished(tmp_path / "seed0", recipe | {name: value}, 5, team)


def test_training_and_test_do_not_write_over_each_other(tmp_path):
    train = finetune.Config(task="csv", out=str(tmp_path))
    test = dataclasses.replace(train, eval=True, weights="best.pt")
    assert choose_out(train) == choose_out(test) == tmp_path
    checkpoint.write_json(tmp_path / "result.json", {"task": "csv"})
    assert choose_out(train) == tmp_path
    with pytest.raises(UserError, match=f"{tmp_path} holds a fine-tuning: choose another --out$"):
        choose_out(test)
    (tmp_path / "predictions.csv").touch()
    assert choose_out(test) == tmp_path
    with pytest.raises(UserError, match="holds a test by finetune.py --eval: choose another"):
        choose_out(train)
    checkpoint.write_json(tmp_path / "seed0" / "config.json", {"task": "csv"})
    for args in (train, test):
        args.out = str(tmp_path / "seed0")
        with pytest.raises(UserError, match=f"holds one seed of the fine-tuning in {tmp_path}: "):
            choose_out(args)
