"""The fine-tuning script on small drawn films: learning, the report, resuming, two processes, errors; its parts against slow references."""

import csv
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from sklearn.metrics import log_loss, roc_auc_score

import augment
import data
import finetune
from model import Classifier, ViT
from plumbing import benchmarks, checkpoint, launch
from plumbing.film import fit
from plumbing.splits import Example

TINY = ["--weights", "none", "--size", "tiny", "--image", "32", "--patch", "8", "--device", "cpu"]
SHORT = ["--batch", "8", "--epochs", "6", "--lr", "2e-3", "--log_every", "2", "--drop_path", "0.1"]


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """40 noise films, every other one with a bright square; a table with labels and one with the squares as masks."""
    root = tmp_path_factory.mktemp("films")
    rng, rows = np.random.default_rng(0), ["filename,label,patient_id,split"]
    squares = ["filename,mask"]
    for k in range(40):
        film, mask = rng.integers(60, 140, (48, 40), dtype=np.uint8), np.zeros((48, 40), np.uint8)
        if k % 2:
            y, x = rng.integers(6, 20, 2)
            mask[y : y + 18, x : x + 16] = 255
            film[mask > 0] += 90
        Image.fromarray(film).save(root / f"{k:02d}.png")
        Image.fromarray(mask).save(root / f"{k:02d}_mask.png")
        rows.append(
            f"{k:02d}.png,{'square' if k % 2 else 'normal'},p{k},{'train' if k < 24 else 'val' if k < 32 else 'test'}"
        )
        squares.append(f"{k:02d}.png,{k:02d}_mask.png" if k % 2 else f"{k:02d}.png,")
    (root / "labels.csv").write_text("\n".join(rows))
    (root / "squares.csv").write_text("\n".join(squares))
    return root


def go(films, out, *flags, table="labels.csv", base=TINY):
    """finetune.py in this process. → (result, what it printed)"""
    argv = [
        "finetune.py",
        "--task",
        "csv",
        "--data",
        str(films),
        "--labels",
        str(films / table),
        "--out",
        str(out),
        *base,
        *SHORT,
        *flags,
    ]
    old, sys.argv = sys.argv, argv
    handler = signal.getsignal(signal.SIGTERM)
    try:
        finetune.main()
    finally:
        sys.argv = old
        signal.signal(signal.SIGTERM, handler)
    return json.loads((Path(out) / "result.json").read_text())


def shell(*argv, launcher=(sys.executable,), **options):
    return subprocess.run(
        [*launcher, "finetune.py", *map(str, argv)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )


def weights(out, seed=0):
    return torch.load(Path(out) / f"seed{seed}" / "best.pt", weights_only=True)["finetuned"]


def same(a, b, atol=0.0):
    return a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=atol, rtol=0) for k in a)


# ---------------------------------------------------------------- whole runs


def test_two_seeds_learn_report_and_are_not_trained_again(films, tmp_path, capsys):
    result = go(films, tmp_path, "--seeds", "2", "--ten_crop")
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("weights: none (from scratch, as asked)") and said[1].startswith(
        f"data: {films}, task csv: AUROC of square"
    )
    assert "train: 24 films of 24 patients (square 12)" in said[2] and any(
        line.startswith("recipe: 24 films, 32 px in 8 px patches, 6 epochs = 18 steps of 8")
        for line in said
    )
    assert said[-1].startswith("test AUROC") and said[-1].endswith(f"{tmp_path}/result.json")
    assert (
        result["metric"] == "AUROC"
        and len(result["seeds"]) == 2
        and result["mean"] > 90
        and result["std"] == pytest.approx(np.std(result["seeds"], ddof=1))
    )
    assert result["split"]["test"] == {
        "films": 8,
        "patients": 8,
        "positive": {"square": 4},
    } and result["per_class"]["square"] == pytest.approx(result["mean"])
    for seed in (0, 1):
        rows = list(csv.DictReader(open(tmp_path / f"seed{seed}" / "predictions.csv")))
        assert [r["film"] for r in rows] == [f"{k}.png" for k in range(32, 40)] and all(
            r["class"] == "square" for r in rows
        )
        auroc = 100 * roc_auc_score(
            [int(r["label"]) for r in rows], [float(r["score"]) for r in rows]
        )
        assert auroc == pytest.approx(result["seeds"][seed])
    steps = [int(r["step"]) for r in csv.DictReader(open(tmp_path / "seed0" / "log.csv"))]
    assert (
        steps == sorted(set(steps))
        and not (tmp_path / "seed0" / "last.pt").exists()
        and not same(weights(tmp_path, 0), weights(tmp_path, 1))
    )
    before = (tmp_path / "seed0" / "best.pt").stat().st_mtime_ns
    assert (
        go(films, tmp_path, "--seeds", "2", "--ten_crop") == result
        and (tmp_path / "seed0" / "best.pt").stat().st_mtime_ns == before
    )
    with pytest.raises(launch.UserError, match="another recipe .*lr 0.002 → 0.1"):
        go(films, tmp_path, "--seeds", "2", "--ten_crop", "--lr", "0.1")


def test_eval_gives_the_same_number_again(films, tmp_path):
    result = go(films, tmp_path)
    base = ["--weights", str(tmp_path / "seed0" / "best.pt"), "--device", "cpu", "--eval"]
    again = go(films, tmp_path / "again", base=base)
    assert (
        again["seeds"] == pytest.approx(result["seeds"])
        and (tmp_path / "again" / "predictions.csv").read_text()
        == (tmp_path / "seed0" / "predictions.csv").read_text()
    )
    with pytest.raises(
        launch.UserError, match=r"trained for square \(labels\), the data asks for mask"
    ):
        go(films, tmp_path / "wrong", base=base, table="squares.csv")


def test_stopped_runs_go_on_to_the_same_weights(films, tmp_path):
    go(films, tmp_path / "whole")
    part = go(films, tmp_path / "parts", "--max_steps", "7", "--save_every", "3")
    assert part["trained_on"] == [24] and (tmp_path / "parts" / "seed0" / "last.pt").exists()
    go(films, tmp_path / "parts", "--max_steps", "11")
    go(films, tmp_path / "parts")
    rows = [
        [
            (r["step"], r["loss"], r["val"])
            for r in csv.DictReader(open(tmp_path / out / "seed0" / "log.csv"))
        ]
        for out in ("whole", "parts")
    ]
    steps = [r[0] for r in rows[1]]
    assert (
        len(steps) == len(set(steps)) and len(rows[0]) >= 9 and set(rows[0]) <= set(rows[1])
    )  # the stops add validations, change nothing else
    assert not (tmp_path / "parts" / "seed0" / "last.pt").exists()


def test_sigterm_saves_and_the_same_command_ends_bit_equal(films, tmp_path):
    argv = [
        "--task",
        "csv",
        "--data",
        films,
        "--labels",
        films / "labels.csv",
        *TINY,
        *SHORT,
        "--epochs",
        "10",
        "--save_every",
        "1",
    ]
    process = subprocess.Popen(
        [sys.executable, "finetune.py", *map(str, argv), "--out", tmp_path / "killed"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    last = tmp_path / "killed" / "seed0" / "last.pt"
    while process.poll() is None and not last.exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert (
        "the same command goes on from there" in process.communicate(timeout=60)[0]
        and process.returncode == 0
        and last.exists()
    )
    go(films, tmp_path / "killed", "--epochs", "10", "--save_every", "1")
    go(films, tmp_path / "whole", "--epochs", "10", "--save_every", "1")
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    logs = [
        [
            (r["step"], r["loss"], r["lr"], r["val"])
            for r in csv.DictReader(open(tmp_path / out / "seed0" / "log.csv"))
        ]
        for out in ("killed", "whole")
    ]
    assert logs[0] == logs[1]


def test_two_processes_train_as_one(films, tmp_path):
    argv = [
        "--task",
        "csv",
        "--data",
        films,
        "--labels",
        films / "labels.csv",
        *TINY,
        *SHORT,
        "--drop_path",
        "0",
        "--epochs",
        "2",
        "--precision",
        "float32",
    ]
    done = shell(
        *argv,
        "--out",
        tmp_path / "two",
        launcher=(
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            "--master_port=29611",
        ),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("weights: none") == 1 and done.stdout.count("result.json") == 1
    one = go(
        films,
        tmp_path / "one",
        "--drop_path",
        "0",
        "--epochs",
        "2",
        "--precision",
        "float32",
        "--micro",
        "2",
    )  # micro-batches too
    two, single = weights(tmp_path / "two"), weights(tmp_path / "one")
    for state in (
        two,
        single,
    ):  # a bias on the keys changes no attention: its gradient is noise, which Adam scales up
        for name in [n for n in state if n.endswith("qkv.bias")]:
            state[name][128:256] = 0
    assert same(two, single, atol=1e-5)
    assert json.loads((tmp_path / "two" / "result.json").read_text())["mean"] == pytest.approx(
        one["mean"]
    )


def test_segmentation_learns_and_draws_its_cases(films, tmp_path):
    result = go(
        films, tmp_path, "--epochs", "40", "--lr", "4e-3", "--batch", "14", table="squares.csv"
    )
    rows = list(csv.DictReader(open(tmp_path / "seed0" / "predictions.csv")))
    some = [100 * float(r["score"]) for r in rows if r["label"] == "1"]
    assert (
        result["metric"] == "Dice"
        and result["per_class"]["films with a mask"] == pytest.approx(np.mean(some), abs=1e-3)
        and np.mean(some) > 60
    )
    assert result["mean"] == pytest.approx(
        np.mean([100 * float(r["score"]) for r in rows]), abs=1e-3
    )
    picture = np.asarray(Image.open(tmp_path / "seed0" / "cases.png")).astype(int)
    assert (
        min(picture.shape[:2]) > 2 * 256
        and ((picture[..., 0] + picture[..., 1]) / 2 - picture[..., 2] > 40).any()
    )  # somewhere yellow: both agree


def test_linear_probe_leaves_the_encoder_alone_and_takes_a_pretrained_one(films, tmp_path):
    vit = ViT(64, 8, dim=32, depth=2, heads=2)
    checkpoint.save_atomic(
        {"encoder": vit.state_dict(), "config": vit.config, "step": 1}, tmp_path / "encoder.pt"
    )
    base = ["--weights", str(tmp_path), "--device", "cpu", "--image", "32"]
    result = go(films, tmp_path / "out", "--freeze", base=base)
    assert result["mean"] > 75 and result["freeze"]
    kept = weights(tmp_path / "out")
    assert all(torch.equal(kept[f"vit.{n}"], p) for n, p in vit.named_parameters())
    assert kept["vit.pos_embed"].shape == (1, 16, 32)
    masked = go(
        films, tmp_path / "masks", "--freeze", "--epochs", "1", base=base, table="squares.csv"
    )
    kept = weights(tmp_path / "masks")
    assert masked["metric"] == "Dice" and all(
        torch.equal(kept[f"vit.{n}"], p) for n, p in vit.named_parameters()
    )


def test_newest_pretraining_run_is_found_and_kept_on_resume(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = finetune.Config(task="csv")
    with pytest.raises(launch.UserError, match="no pre-training run"):
        finetune.choose_weights(config, tmp_path / "out")
    for k, name in enumerate(("new", "old")):
        checkpoint.write_text(f"runs/{name}/encoder.pt", "")
        os.utime(f"runs/{name}/encoder.pt", (1000 - k, 1000 - k))
    assert finetune.choose_weights(config, tmp_path / "out") == (
        Path("runs/new/encoder.pt"),
        "newest pre-training run under runs/",
    )
    checkpoint.write_json(
        tmp_path / "out" / "seed0" / "config.json", {"weights": "runs/old/encoder.pt"}
    )
    assert finetune.choose_weights(config, tmp_path / "out")[0] == Path("runs/old/encoder.pt")


def test_fraction_and_shots_are_drawn_by_seed(films, tmp_path, capsys):
    result = go(films, tmp_path / "a", "--fraction", "0.25", "--seeds", "2", "--epochs", "1")
    assert (
        result["trained_on"] == [6, 6]
        and "seed 1: 6 of the 24 training films drawn" in capsys.readouterr().out
    )
    films_of = [
        json.loads((tmp_path / "a" / f"seed{k}" / "config.json").read_text())["films_are"]
        for k in (0, 1)
    ]
    assert films_of[0] != films_of[1]
    assert go(films, tmp_path / "b", "--shots", "3", "--epochs", "1")["trained_on"] == [6]


def test_unreadable_films_are_named_and_skipped_and_many_stop(films, tmp_path, capsys):
    rows = (films / "labels.csv").read_text().splitlines()
    table = tmp_path / "bad.csv"
    (films / "broken.png").write_bytes(b"\x89PNG broken")
    table.write_text("\n".join(rows + ["broken.png,square,x,test"]))
    result = go(films, tmp_path / "one", "--epochs", "1", table=table)
    assert (
        result["bad"] == [str(films / "broken.png")]
        and len((tmp_path / "one" / "seed0" / "predictions.csv").read_text().splitlines()) == 9
    )
    assert "bad film, skipped" in "".join(capsys.readouterr())
    (films / "empty.png").write_bytes(b"")
    table.write_text("\n".join(rows + ["broken.png,square,x,train", "empty.png,normal,y,train"]))
    with pytest.raises(launch.UserError, match="2 of 42 films cannot be read, more than 1 %"):
        go(films, tmp_path / "two", table=table)


def test_a_class_without_positives_in_validation_is_said_and_left_out(films, tmp_path, capsys):
    rows = (films / "labels.csv").read_text().splitlines()
    table = tmp_path / "rare.csv"
    table.write_text(
        "\n".join(
            [rows[0]]
            + [
                r.replace(",square", ",square|rare", 1) if r.startswith(("01", "33")) else r
                for r in rows[1:]
            ]
        )
    )
    result = go(films, tmp_path / "out", "--epochs", "1", table=table)
    said = capsys.readouterr().out
    assert (
        "warning: val has no positive film of rare: it does not count in model selection" in said
        and result["per_class"]["rare"] is not None
    )
    table.write_text(
        "\n".join(
            [rows[0]]
            + [r.replace(",normal", ",square") if r.endswith("test") else r for r in rows[1:]]
        )
    )
    with pytest.raises(launch.UserError, match="AUROC is undefined"):
        go(films, tmp_path / "undefined", table=table)


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--task", "siim", "--data", "/nowhere", "--weights", "none"],
            "error: no folder /nowhere for task siim",
        ),
        (["--task", "csv", "--wieghts=x"], "did you mean --weights"),
        (["--task", "csv", "--eval"], "error: --eval needs --weights FILE"),
        (
            ["--task", "shenzhen", "--data", ".", "--weights", "tests/conftest.py"],
            "no CHNCXR_*.png. Expected for task shenzhen: ChinaSet_AllFiles",
        ),
    ],
)
def test_errors_are_one_line(flags, message):
    done = shell(*flags)
    assert (
        done.returncode == 1
        and message in done.stderr
        and "Traceback" not in done.stderr
        and done.stderr.count("\n") == 1
    )


def test_junk_weights_are_refused_by_name(films, tmp_path):
    junk = tmp_path / "junk.pt"
    junk.write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    with pytest.raises(
        Exception, match="junk.pt: not a checkpoint that can be loaded safely"
    ) as error:
        go(films, tmp_path / "out", base=["--weights", str(junk)])
    assert error.value.one_line and not Path("owned").exists()


# ---------------------------------------------------------------- parts


def test_every_flag_is_read():
    source = (ROOT / "finetune.py").read_text()
    used = set(re.findall(r"(?:config|asked)\.(\w+)", source)) | set(
        re.findall(r'settled\["(\w+)"\]', source)
    )
    assert {f.name for f in dataclasses.fields(finetune.Config)} <= used
    assert finetune.FREE <= {f.name for f in dataclasses.fields(finetune.Config)}


def test_settled_recipes_are_the_papers_where_published():
    team, base, tiny = (
        launch.Team(0, 1, torch.device("cpu")),
        dict(image=224, patch=16, dim=768),
        dict(image=64, patch=8, dim=128),
    )
    settle = lambda films, shape=base, kind="labels", **flags: finetune.settle(
        finetune.Config(**flags), kind, shape, films, team
    )[0]
    vindr = settle(13500, task="vindr")
    assert (
        vindr.lr,
        vindr.weight_decay,
        vindr.layer_decay,
        vindr.drop_path,
        vindr.epochs,
        vindr.warmup,
        vindr.batch,
        vindr.patience,
    ) == (1e-4, 0.05, 0.75, 0.6, 50, 1, 256, 15)
    chexpert = settle(171924, task="chexpert")
    assert (
        chexpert.lr,
        chexpert.weight_decay,
        chexpert.layer_decay,
        chexpert.drop_path,
        chexpert.epochs,
        chexpert.warmup,
    ) == (1e-2, 0.4, 0.55, 0.1, 1, 0.1)
    siim = settle(9303, kind="mask", task="siim")
    assert (siim.lr, siim.layer_decay, siim.drop_path) == (2e-4, 0.8, 0.1)
    assert (
        settle(40).epochs == 300 and settle(40).batch == 32 and settle(40, epochs=3).epochs == 3
    )  # few films: more epochs, unless told
    assert (
        settle(19).batch == 19
        and settle(403, tiny).drop_path == 0.1
        and settle(403, tiny, drop_path=0.0).drop_path == 0.0
    )
    assert settle(1000, batch=300).micro == 100  # the largest divisor up to 128


def test_losses_are_their_formulas():
    logits, goal = torch.randn(4, 3), (torch.rand(4, 3) < 0.5).float()
    p = logits.sigmoid().numpy()
    slow = [
        np.mean(
            [
                log_loss([int(t)], [[1 - float(q), float(q)]], labels=[0, 1])
                for t, q in zip(goal[b].numpy(), p[b])
            ]
        )
        for b in range(4)
    ]
    assert finetune.loss_of("labels", logits, goal).tolist() == pytest.approx(slow, abs=1e-5)
    one = torch.eye(3)[[0, 2, 1, 1]]
    assert finetune.loss_of("classes", logits, one).tolist() == pytest.approx(
        [
            log_loss([k], [logits[b].double().softmax(0).numpy()], labels=[0, 1, 2])
            for b, k in enumerate((0, 2, 1, 1))
        ],
        abs=1e-5,
    )
    masks, truth = torch.randn(2, 5, 5), torch.zeros(2, 5, 5)
    truth[0, 1:3] = 1
    q = masks.sigmoid().numpy()
    for b, loss in enumerate(finetune.loss_of("mask", masks, truth).tolist()):
        t = truth[b].numpy()
        bce = -np.mean(t * np.log(q[b]) + (1 - t) * np.log(1 - q[b]))
        assert loss == pytest.approx(
            bce + 1 - (2 * (t * q[b]).sum() + 1e-5) / (t.sum() + q[b].sum() + 1e-5), abs=1e-5
        )


def test_judgement_of_three_classes_and_of_masks():
    films = type(
        "Films",
        (),
        {
            "examples": [
                Example(Path(str(k)), tuple(np.eye(3, dtype=int)[k % 3]), str(k)) for k in range(9)
            ]
        },
    )
    rng = np.random.default_rng(0)
    rows = {i: rng.normal(size=3) for i in (0, 1, 2, 4, 5, 6, 8)}  # 3 and 7 could not be read
    value, _, per_class = finetune.judge("classes", "abc", films, rows)
    assert value == pytest.approx(100 * np.mean([row.argmax() == i % 3 for i, row in rows.items()]))
    assert per_class["b"] == pytest.approx(
        100 * roc_auc_score([i % 3 == 1 for i in rows], [r[1] for r in rows.values()])
    )
    value, loss, each = finetune.judge(
        "mask", "m", None, {0: np.array([1.0, 0, 0.5]), 1: np.array([0.5, 1, 0.7])}
    )
    assert (value, each["all films"], each["films with a mask"]) == (
        75,
        75,
        50,
    ) and loss == pytest.approx(0.6)
    assert (
        finetune.judge("mask", "m", None, {0: np.array([1.0, 0, 0.5])})[2]["films with a mask"]
        is None
    )


def test_a_tie_on_validation_goes_to_the_lower_loss():
    best = finetune.judged(
        {"value": -1.0, "loss": float("inf"), "step": 0, "stale": 0}, 80.0, 0.6, 5
    )
    assert best == {"value": 80.0, "loss": 0.6, "step": 5, "stale": 0}
    assert finetune.judged(best, 80.0, 0.5, 6)["step"] == 6 and finetune.judged(
        best, 80.0, 0.7, 6
    ) == {**best, "stale": 1}
    assert finetune.judged(best, float("nan"), 0.1, 6)["stale"] == 1


def test_test_views_are_resize_and_centre_crop_and_ten_crops():
    film = np.random.default_rng(0).integers(0, 256, (100, 140), dtype=np.uint8)
    small = fit(film, 64)  # 256 / 224 of 56
    assert np.array_equal(data.test_views(film, 56), small[None, 4:60, 17:73])
    ten = data.test_views(film, 56, ten=True)
    corners = [
        small[4:60, 17:73],
        small[:56, :56],
        small[:56, -56:],
        small[-56:, :56],
        small[-56:, -56:],
    ]
    assert np.array_equal(ten, np.stack(corners + [c[:, ::-1] for c in corners]))


def test_film_and_mask_move_together():
    film = np.zeros((64, 64), np.uint8)
    film[20:40, 10:30] = 255
    moved = 0
    for k in range(20):
        out, mask = augment.shift_scale_flip(film, film > 0, np.random.default_rng(k))
        again, _ = augment.shift_scale_flip(film, film > 0, np.random.default_rng(k))
        assert (
            np.array_equal(out, again) and ((out > 127) != mask).sum() <= 84
        )  # a pixel along the square's edge
        moved += not np.array_equal(out, film)
    assert moved > 10


def test_training_views_depend_on_seed_epoch_and_index_only(films):
    splits = benchmarks.load_task("csv", films, films / "labels.csv")
    kept, lazy = (data.open_examples(splits.train, 32, keep) for keep in (True, False))
    item = lambda f, seed, epoch, i: data.TrainExamples(f, seed)[epoch, i]["view"]
    assert np.array_equal(item(kept, 0, 1, 2), item(lazy, 0, 1, 2))
    assert not any(
        np.array_equal(item(kept, 0, 1, 2), item(kept, *other)) for other in ((1, 1, 2), (0, 2, 2))
    )
    whole = {
        "view": torch.stack([torch.from_numpy(item(kept, 0, 0, i)) for i in range(8)]),
        "goal": torch.zeros(8, 1),
    }
    half = {k: v[4:] for k, v in whole.items()}
    a = finetune.prepare(whole, "labels", 0, 3, torch.arange(8), 8, "cpu")[0]
    b = finetune.prepare(half, "labels", 0, 3, torch.arange(4, 8), 8, "cpu")[0]
    assert torch.equal(a[4:], b) and a.shape == (8, 1, 32, 32)


def test_solved_head_is_the_probe_of_pooled_features(films):
    splits = benchmarks.load_task("csv", films, films / "labels.csv")
    sets = {s: data.open_examples(getattr(splits, s), 32, True) for s in ("train", "val", "test")}
    model = Classifier(ViT(32, 8, dim=16, depth=1, heads=2), 1).eval()
    team, config = (
        launch.Team(0, 1, torch.device("cpu")),
        finetune.Config(micro=5, workers=0, precision="float32"),
    )
    finetune.solve_head(model, sets, config, team, data.UnreadableFilms(40))
    pooled = {}
    with torch.no_grad():
        for s, f in sets.items():
            views = (
                torch.stack(
                    [torch.from_numpy(data.test_views(f[i][0], 32)) for i in range(len(f))]
                ).float()
                / 255
            )
            pooled[s] = model.vit(views).mean(1)
    y = {s: [c.target[0] for c in f.examples] for s, f in sets.items()}
    from plumbing.metrics import linear_probe

    expected = linear_probe(pooled["train"], y["train"], pooled["val"], y["val"], pooled["test"])
    rows = finetune.predict(model, "labels", sets["test"], config, team, data.UnreadableFilms(40))
    assert np.concatenate(list(rows.values())) == pytest.approx(
        expected, abs=1e-2 * np.abs(expected).max()
    )
