"""lab.bench: FLOPs against a formula, known allocations and waits, every command."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import model
from lab import bench
from plumbing import launch
from plumbing.film import fit, read_film

CPU = torch.device("cpu")
TEAM = launch.Team(0, 1, CPU)
TINY = "--size tiny --image 32 --patch 8 --batch 2 --device cpu"


def config(**more):
    tiny = dict(size="tiny", image=32, patch=8, batch=2, precision="float32")
    return bench.fill_in(bench.Config(**{**tiny, **more}), TEAM)


def rows_printed(capsys):
    """The cells of every row that the table printed."""
    lines = capsys.readouterr().out.splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def run(words):
    command = [sys.executable, "-m", *words.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def flops_by_formula(config):
    """FLOPs of the matrix products of one film's share of a step.

    A backward pass counts as two forward ones, as one where it ends at the pixels.
    """
    shape = model.SIZES[config.size]
    D = shape["dim"]
    d = shape["predictor_dim"]
    N = (config.image // config.patch) ** 2
    K = config.visible

    def blocks(tokens, dim, depth):
        # Per token: 24 D² in qkv, projection and MLP; 4 L D in the two products of attention.
        return depth * tokens * (24 * dim * dim + 4 * tokens * dim)

    def predictor(asked):
        ends = 2 * D * d * (K + asked)  # into the predictor's width and out of it
        policy = 2 * asked * ((d + 4) * d + 2 * d * d)
        return ends + policy + blocks(K + asked, d, shape["predictor_depth"])

    embedding = (2 * K + N) * 2 * config.patch**2 * D
    encoders = 3 * blocks(K, D, shape["depth"]) + blocks(N, D, shape["depth"])
    predictions = 3 * predictor(config.masked) + 3 * predictor(config.targets)
    return 2 * (embedding + encoders + predictions)


@pytest.mark.slow
@pytest.mark.parametrize("counts", [{}, dict(visible=5, masked=6, targets=7)])
def test_counted_flops_are_those_of_the_formula(counts):
    asked = config(checkpointing=True, **counts)
    assert bench.count_flops(asked) == pytest.approx(flops_by_formula(asked), rel=1e-9)


def test_a_made_up_batch_has_the_wanted_tokens():
    b = bench.made_up_batch(config(visible=5, masked=6, targets=7), CPU)
    assert b["keep"].shape == (4, 5)
    assert b["masked"].shape == (4, 6)
    assert b["coords"].shape == (4, 16, 2)
    assert b["asked"].shape == (4, 7)
    for keep, masked in zip(b["keep"].tolist(), b["masked"].tolist(), strict=True):
        assert len(set(keep) | set(masked)) == 11  # disjoint


def test_peak_memory_sees_what_lives_at_once():
    def both():
        a = torch.ones(1 << 20)
        return len(a) + len(torch.ones(1 << 19))

    def one_after_the_other():
        torch.ones(1 << 20)
        torch.ones(1 << 19)

    assert bench.peak_memory(both, CPU) == pytest.approx(6 << 20, rel=0.01)
    assert bench.peak_memory(one_after_the_other, CPU) == pytest.approx(4 << 20, rel=0.01)


@pytest.mark.slow
def test_checkpointing_needs_less_memory():
    large = config(batch=16, image=64)
    full = bench.peak_memory(bench.Step(large, TEAM), CPU)
    assert bench.peak_memory(bench.Step(large, TEAM, checkpointing=True), CPU) < 0.7 * full


def test_waits_are_counted_and_the_step_has_none():
    assert bench.count_waits(lambda: [torch.ones(1).item() for _ in range(3)], CPU) == 3
    assert bench.count_waits(lambda: torch.ones(3).nonzero(), CPU) == 1
    assert bench.count_waits(bench.Step(config(), TEAM), CPU) == 0


def test_pair_runs_both_in_turn():
    seen = []
    bench.pair(lambda: seen.append("off"), lambda: seen.append("on"), CPU, seconds=0)
    assert seen == ["off", "on"] * 4


@pytest.mark.slow
def test_every_network_row_is_printed(tmp_path, monkeypatch, capsys):
    """The table's rows on a tiny network; compiling is left to the real run."""
    pair = bench.pair
    monkeypatch.setattr(bench, "pair", lambda off, on, device, seconds=0: pair(off, on, device, 0))
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    machine = bench.Bench(config(), TEAM, tmp_path)
    for rows in bench.NETWORK_ROWS:
        rows(machine)
    rows = rows_printed(capsys)
    assert len(rows) == 11 and all(len(row) == 6 for row in rows)
    assert all(float(row[1]) >= 0 and float(row[2]) >= 0 for row in rows)
    waits = next(row for row in rows if row[0].startswith("host waits"))
    assert float(waits[2]) == 0 < float(waits[1])


def test_crop_and_jpeg_rows(tmp_path, monkeypatch, capsys):
    def once(off, on, device):
        off()
        on()
        return 2.0, 1.0

    monkeypatch.setattr(bench, "pair", once)
    machine = bench.Bench(config(), TEAM, tmp_path)
    bench.crop_row(machine, count=2)
    bench.jpeg_row(machine, count=1)
    assert [row[1:3] for row in rows_printed(capsys)] == [["1", "2"], ["0.5", "1"]]


def test_both_ways_of_decoding_give_the_same_film(tmp_path):
    """Else their ratio would mean nothing."""
    path = tmp_path / "0.jpeg"
    bench.write_film(path, 0, (1250, 1500))
    fast = fit(read_film(path, 320), 320)
    plain = bench.plain_decode(path, 320)
    assert Image.open(path).size == (1250, 1500) and fast.shape == plain.shape
    assert np.abs(fast.astype(int) - plain).mean() < 1


@pytest.mark.slow
def test_step_prints_its_token_counts():
    counts = "--visible 5 --masked 6 --targets 7"
    said = run(f"lab.bench step {TINY} {counts} --steps 1").stdout
    assert "5 kept, 6 masked, 7 global targets of 16" in said
    assert float(re.search(r"([\d.]+) films/s", said)[1]) > 0
    gflop = bench.count_flops(config(visible=5, masked=6, targets=7)) / 1e9
    assert f"{gflop:.2f} GFLOP per film" in said
    assert float(re.search(r"([\d.]+)% of the matmul peak", said)[1]) > 0


@pytest.mark.parametrize(
    "words, says",
    [
        (f"step {TINY} --visible 10 --masked 10", "20: a view has only 16"),
        (f"step {TINY} --targets 17", "17: a view has only 16"),
        ("--sizes tiny", "did you mean --size"),
        ("stepp", "unrecognized arguments: stepp"),
    ],
)
def test_errors_are_one_line(words, says):
    with pytest.raises(launch.UserError, match=says) as error:
        bench.main(words.split())
    assert "\n" not in str(error.value)
