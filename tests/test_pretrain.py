"""The real script, run as a user runs it: ranks, micro-batches, workers, crashes and bad input change nothing but what they must."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import pretrain
from lab import bench
from plumbing import launch, phantom

SMALL = "--size tiny --image 32 --patch 8 --batch 8 --epochs 2 --warmup 0.5 --lr 2e-4 --ema 0.9 --log_every 1 --save_every 1000 --device cpu --precision float32 --holdout 4".split()


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    phantom.write_phantoms(folder, 36, size=64, seed=5)
    return folder


def command(data, out, *more, ranks=1):
    launch = (
        [sys.executable]
        if ranks == 1
        else [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc_per_node={ranks}",
            "--master_port",
            str(29500 + os.getpid() % 500),
        ]
    )
    return [
        *launch,
        str(ROOT / "pretrain.py"),
        "--data",
        str(data),
        "--out",
        str(out),
        *SMALL,
        *more,
    ]


def run(*args, ok=True, **kwargs):
    done = subprocess.run(command(*args, **kwargs), capture_output=True, text=True, timeout=240)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done


def weights(out):
    return torch.load(out / "last.pt", weights_only=True)["world"]


def log(out):
    return list(csv.DictReader(open(out / "log.csv")))


def largest_difference(a, b):
    return max((x.float() - b[k].float()).abs().max().item() for k, x in a.items())


@pytest.fixture(scope="module")
def reference(films, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "one"
    run(films / "films", out)
    return out


def test_writes_everything_the_contract_names(reference):
    assert {
        "config.json",
        "log.csv",
        "last.pt",
        "encoder.pt",
        "curve.png",
        "views.png",
        "result.json",
    } <= {p.name for p in reference.iterdir()}
    rows = log(reference)
    assert [int(r["step"]) for r in rows] == list(
        range(1, 9)
    )  # 36 - 3 held-out films: 4 steps an epoch, 2 epochs
    assert set(
        "step,epoch,images,loss,l11,l22,l12,l21,lr,momentum,feature_std,rankme,images_per_s,data_wait".split(
            ","
        )
    ) <= set(rows[0])
    for r in rows:
        assert float(r["loss"]) == pytest.approx(
            np.mean([float(r[k]) for k in ("l11", "l22", "l12", "l21")]), rel=1e-4
        )
    result = json.loads((reference / "result.json").read_text())
    assert result["domain"]["random"]["recall@1"] == pytest.approx(100 / 64)
    assert Image.open(reference / "views.png").size[0] > 300


def test_two_ranks_equal_one_process(films, reference, tmp_path):
    run(films / "films", tmp_path / "two", ranks=2)
    assert largest_difference(weights(reference), weights(tmp_path / "two")) < 1e-5
    for a, b in zip(log(reference), log(tmp_path / "two"), strict=True):
        for key in ("loss", "l11", "l22", "l12", "l21", "feature_std", "rankme"):
            assert float(a[key]) == pytest.approx(float(b[key]), rel=1e-4), key


def test_two_ranks_with_accumulation_and_micro_batches(films, reference, tmp_path):
    run(films / "films", tmp_path / "accumulated", "--micro", "2", ranks=2)
    assert largest_difference(weights(reference), weights(tmp_path / "accumulated")) < 1e-5


def test_worker_count_changes_nothing(films, reference, tmp_path):
    run(films / "films", tmp_path / "workers", "--workers", "2")
    assert largest_difference(weights(reference), weights(tmp_path / "workers")) == 0


def test_three_steps_and_the_rest_equal_all_at_once(films, reference, tmp_path):
    run(films / "films", tmp_path / "parts", "--max_steps", "3")
    assert "going on at step 3" in run(films / "films", tmp_path / "parts").stdout
    assert largest_difference(weights(reference), weights(tmp_path / "parts")) == 0
    assert [r["step"] for r in log(tmp_path / "parts")] == [r["step"] for r in log(reference)]


def started(films, out, steps, *more):
    """The script in the background, once its log holds `steps` rows."""
    process = subprocess.Popen(
        command(films / "films", out, *more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.time() + 120
    while (
        not (out / "log.csv").is_file() or len((out / "log.csv").read_text().splitlines()) <= steps
    ):
        assert time.time() < deadline and process.poll() is None, (
            "the run ended or hung before it could be interrupted"
        )
        time.sleep(0.01)
    return process


def test_kill_nine_and_the_same_command_again(films, tmp_path):
    more = ("--save_every", "2", "--epochs", "10")  # 40 steps; killed somewhere after the fifth
    run(films / "films", tmp_path / "whole", *more)
    process = started(films, tmp_path / "killed", 5, *more)
    process.kill()
    process.wait()
    run(films / "films", tmp_path / "killed", *more)
    assert largest_difference(weights(tmp_path / "whole"), weights(tmp_path / "killed")) == 0
    same = [
        {k: v for k, v in r.items() if k not in ("images_per_s", "data_wait")}
        for r in log(tmp_path / "whole")
    ]
    assert same == [
        {k: v for k, v in r.items() if k not in ("images_per_s", "data_wait")}
        for r in log(tmp_path / "killed")
    ]
    assert len(same) == 40


def test_sigterm_saves_and_the_same_command_goes_on(films, tmp_path):
    more = ("--epochs", "30")
    process = started(films, tmp_path / "run", 3, *more)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "SIGTERM: saved at step" in said
    step = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"]
    assert 3 <= step < 120
    assert (
        f"going on at step {step}"
        in run(films / "films", tmp_path / "run", *more, "--max_steps", str(step + 2)).stdout
    )


@pytest.mark.parametrize(
    "switch, terms",
    [
        (("--tasks", "local"), {"l11", "l22"}),
        (("--tasks", "global,domain", "--no_delta"), {"l12", "l21"}),
        (("--not_unified",), {"l11", "l22", "l12", "l21", "d11", "d22"}),
        (("--no_action", "--precision", "bfloat16"), {"l11", "l22", "l12", "l21"}),
    ],
)
def test_ablation_switches_train(films, tmp_path, switch, terms):
    run(films / "films", tmp_path / "run", *switch, "--max_steps", "2")
    row = log(tmp_path / "run")[-1]
    assert {k for k in row if re.fullmatch(r"[ld]\d\d", k) and row[k]} == terms
    assert 0 < float(row["loss"]) < 3


def refused(done, *words):
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (
        len(errors) == 1
        and done.stderr.strip().splitlines()[-1] == errors[0]
        and all(w in errors[0] for w in words)
    ), done.stderr


def test_bad_input_is_one_clear_line(films, reference, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(run(tmp_path / "nowhere", tmp_path / "o", ok=False), "nowhere")
    refused(run(tmp_path / "empty", tmp_path / "o", ok=False), "empty")
    refused(
        run(films / "films", tmp_path / "o", "--lrr", "1", ok=False), "--lrr", "did you mean --lr?"
    )
    refused(run(films / "films", tmp_path / "o", "--patch", "7", ok=False), "--patch 7")
    refused(run(films / "films", tmp_path / "o", "--tasks", "locall", ok=False), "locall")
    refused(run(films / "films", tmp_path / "o", "--batch", "4096", ok=False), "4096")
    refused(
        run(films / "films", tmp_path / "o", "--probe", str(tmp_path / "none.csv"), ok=False),
        "none.csv",
    )
    refused(
        run(films / "films", reference, "--lr", "5e-4", ok=False),
        "another recipe",
        "lr 0.0002 → 0.0005",
    )


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_junk_and_malicious_checkpoints_run_nothing(films, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "last.pt").write_bytes(b"junk" * 100)
    refused(run(films / "films", out, ok=False), "last.pt")
    torch.save({"world": Evil(tmp_path / "hacked")}, out / "last.pt")
    refused(run(films / "films", out, ok=False), "last.pt")
    assert not (tmp_path / "hacked").exists()


def test_one_bad_film_is_named_and_skipped_many_stop(tmp_path):
    films = tmp_path / "films"
    films.mkdir()
    rng = np.random.default_rng(0)
    for i in range(128):
        Image.fromarray(rng.integers(0, 255, (40, 40), np.uint8)).save(films / f"film{i:03d}.png")
    (films / "film007.png").write_bytes(b"")
    more = ("--epochs", "1", "--holdout", "0")
    said = run(films, tmp_path / "run", *more).stdout
    assert said.count("bad film, skipped (1 so far): film007.png") == 1
    (films / "film008.png").write_bytes(b"broken too")
    refused(
        run(films, tmp_path / "stopped", *more, ok=False),
        "more than 1 %",
        "film007.png",
        "film008.png",
    )


def test_an_infinite_loss_stops_and_leaves_the_last_good_checkpoint(films, tmp_path):
    done = run(
        films / "films",
        tmp_path / "run",
        "--lr",
        "1e30",
        "--warmup",
        "0",
        "--save_every",
        "1",
        ok=False,
    )
    refused_line = done.stderr.strip().splitlines()[-1]
    assert (
        "NaN or infinite" in refused_line
        and "--lr" in refused_line
        and "Traceback" not in done.stderr
    )
    if (tmp_path / "run" / "last.pt").is_file():
        assert all(torch.isfinite(v).all() for v in weights(tmp_path / "run").values())


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
        ),
    ],
)
def test_the_host_never_waits_while_a_batch_is_prepared(device):
    """Else a GPU would stand idle between steps."""
    config, device = pretrain.Config(image=32, patch=8, batch=4, seed=0), torch.device(device)
    boxes = torch.tensor([[0.0, 0, 30, 30], [5, 5, 30, 30]]).expand(2, 2, 4).contiguous()
    item = {
        "views": torch.randint(0, 255, (2, 2, 32, 32), dtype=torch.uint8),
        "boxes": boxes,
        "flips": torch.tensor([[True, False]] * 2),
    }
    item = {k: v.pin_memory() if device.type == "cuda" else v for k, v in item.items()}
    assert (
        bench.count_waits(
            lambda: pretrain.prepare(item, config, 0, torch.arange(2), device), device
        )
        == 0
    )


def test_what_fits_into_a_gpu():
    """By count: 64 films of ViT-B in 24 GB, a rank's whole share of the paper's batch in 80 GB; more with checkpointing, fewer of larger networks."""
    films = lambda memory, **changes: pretrain.gpu_limit(
        pretrain.Config(
            **{**dict(image=224, patch=16, size="base", precision="bfloat16"), **changes}
        ),
        memory,
    )
    assert 64 <= films(24e9) < 128 and films(80e9) >= 256 and films(24e9, checkpointing=True) >= 256
    assert films(80e9, not_unified=True) < films(80e9) / 3 and films(80e9, tasks="global") < films(
        80e9
    )
    assert films(24e9, size="large") < 64 < films(24e9, size="small") and films(1e9) == 1
    assert (
        pretrain.micro_batch(pretrain.Config(batch=96), launch.Team(0, 1, torch.device("cpu")))
        == 48
    )
