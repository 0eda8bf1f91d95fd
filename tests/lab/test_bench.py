"""The bench's counts against PyTorch's own counter, a hand-made roofline and known allocations; its commands as a user runs them."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import model
from lab import bench, meter
from plumbing import launch
from plumbing.film import fit, read_film

CPU = torch.device("cpu")
TEAM = launch.Team(0, 1, CPU)
TINY = "--size tiny --image 32 --patch 8 --batch 2 --device cpu"


def config(**more):
    return bench.settle(
        bench.Config(
            **{**dict(size="tiny", image=32, patch=8, batch=2, precision="float32"), **more}
        ),
        TEAM,
    )


def run(words, ok=True):
    done = subprocess.run(
        [sys.executable, "-m", *words.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("counts", [{}, dict(visible=5, masked=6, targets=7)])
def test_counted_flops_are_those_pytorch_counts(counts):
    step = meter.Step(config(**counts), TEAM)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step.forward(**step.batch)["loss"].backward()
    assert sum(p.flops for p in meter.count_parts(step.config)) == pytest.approx(
        counter.get_total_flops(), rel=1e-9
    )


def test_counted_parameters_are_those_of_the_model():
    for size in ("tiny", "small"):
        world = model.CheXWorld(32, 8, **model.SIZES[size])
        trained, encoder = meter.count_parameters(config(size=size))
        assert trained == sum(
            p.numel() for m in (world.encoder, world.predictor) for p in m.parameters()
        )
        assert encoder == sum(p.numel() for p in world.target_encoder.parameters())


def test_fewer_targets_are_the_first_ones_of_the_whole_loss():
    """The loss on 7 targets is what the full model gives when the others are cut from its guess."""
    step = meter.Step(config(targets=7), TEAM)
    world, b = step.world.eval(), step.batch
    t, h = world.targets(b["y"]), world.encoder(b["x"], b["keep"])
    at = world.coords.expand(len(h), -1, -1)
    for i, j, name in ((0, 1, "l12"), (1, 0, "l21")):
        rows = slice(2 * i, 2 * i + 2)
        guess = world.predictor(
            h[rows], model.take(at, b["keep"])[rows], b["coords"][rows, :7], b["action"][rows]
        )
        wanted = (guess - t[2 * j : 2 * j + 2, :7]).square().mean()
        assert world(**b)[name].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_a_made_up_batch_has_the_wanted_tokens():
    b = meter.made_up(config(visible=5, masked=6), CPU)
    assert (
        b["keep"].shape == (4, 5)
        and b["masked"].shape == (4, 6)
        and b["coords"].shape == (4, 16, 2)
    )
    assert all(
        len(set(k.tolist()) | set(m.tolist())) == 11 for k, m in zip(b["keep"], b["masked"])
    )  # disjoint


def test_roofline_by_hand():
    chip = meter.Chip("", peak=100.0, speed=10.0, memory=0.0, links=())
    assert (
        chip.seconds(meter.Part("", 1000.0, 50.0, 20.0)) == 10 + 2
    )  # arithmetic is slower than its memory: 10 s against 5
    assert chip.seconds(meter.Part("", 100.0, 50.0, 20.0)) == 5 + 2


def test_peak_memory_sees_what_lives_at_once():
    def both():
        a = torch.ones(1 << 20)
        return len(a) + len(torch.ones(1 << 19))

    def one_after_the_other():
        torch.ones(1 << 20)
        torch.ones(1 << 19)

    assert meter.peak_memory(both, CPU) == pytest.approx(6 << 20, rel=0.01)
    assert meter.peak_memory(one_after_the_other, CPU) == pytest.approx(4 << 20, rel=0.01)


def test_checkpointing_needs_less_memory_in_count_and_in_truth():
    step = meter.Step(config(batch=16, image=64), TEAM)
    full = meter.peak_memory(step, CPU)
    step.checkpointing(True)
    assert meter.peak_memory(step, CPU) < 0.7 * full
    assert meter.count_memory(step.config, True)[1] < 0.7 * meter.count_memory(step.config)[1]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_counted_memory_is_nearly_what_is_measured(precision):
    """It decides the micro-batch on a GPU, which fills 70 % by count: a quarter too low is still safe."""
    step = meter.Step(config(batch=16, image=64, precision=precision), TEAM)
    assert 0.8 < meter.peak_memory(step, CPU) / meter.count_memory(step.config)[1] < 1.3


def test_waits_are_counted_and_the_step_has_none():
    assert meter.waits(lambda: [torch.ones(1).item() for _ in range(3)], CPU) == 3
    assert meter.waits(lambda: torch.ones(3).nonzero(), CPU) == 1
    assert meter.waits(meter.Step(config(), TEAM), CPU) == 0


def test_pair_runs_both_in_turn():
    seen = []
    meter.pair(lambda: seen.append("off"), lambda: seen.append("on"), CPU, seconds=0)
    assert seen == ["off", "on"] * 4


def test_every_network_line_is_printed(monkeypatch, capsys):
    """The table's lines on a tiny network; compiling is left to the real run."""
    monkeypatch.setattr(
        bench, "pair", lambda off, on, device, seconds=0: meter.pair(off, on, device, 0)
    )
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    bench.encoder_lines(config(), CPU)
    bench.step_lines(config(), TEAM, {"float32": 1e11, "bfloat16": 1e11}, 1e10)
    bench.augment_lines(config(), CPU)
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in capsys.readouterr().out.splitlines()
    ]
    assert len(rows) == 15 and all(
        len(r) == 6 and float(r[1]) >= 0 and float(r[2]) >= 0 for r in rows
    )
    waits = next(r for r in rows if r[0].startswith("host waits"))
    assert float(waits[2]) == 0 < float(waits[1])


def test_index_line(tmp_path, capsys):
    bench.index_lines(tmp_path, count=400)
    name, off, on = capsys.readouterr().out.split("|")[1:4]
    assert (
        "400 films in 100 folders" in name
        and float(on) > 0
        and len(list(tmp_path.rglob("*.jpg"))) == 400
    )


def test_both_ways_of_decoding_give_the_same_film(tmp_path):
    """Else their ratio would mean nothing."""
    bench.write_film(tmp_path / "0.jpeg", 0, (1250, 1500))
    fast, plain = (
        fit(read_film(tmp_path / "0.jpeg", 320), 320),
        bench.plain_decode(tmp_path / "0.jpeg", 320),
    )
    assert Image.open(tmp_path / "0.jpeg").size == (1250, 1500) and fast.shape == plain.shape
    assert np.abs(fast.astype(int) - plain).mean() < 1


def test_step_prints_its_token_counts():
    said = run(
        f"lab.bench step {TINY} --visible 5 --masked 6 --targets 7 --steps 1 --threads 1"
    ).stdout
    assert "5 visible, 6 masked, 7 global targets of 16" in said and "1 threads" in said
    assert float(re.search(r"([\d.]+) films/s", said)[1]) > 0


def test_roofline_prints_every_chip_and_this_machine():
    said = run(f"lab.bench roofline {TINY} --steps 1").stdout
    assert all(f"\n{chip.name}, compiled" in said for chip in meter.CHIPS) and said.count(
        "all-reduce"
    ) == 2 * len(meter.CHIPS)
    predicted, measured = re.search(r"predicted ([\d.]+) ms .* measured ([\d.]+) ms", said).groups()
    assert float(predicted) > 0 and float(measured) > 0


@pytest.mark.parametrize(
    "words, says",
    [
        ("step --visible 10 --masked 10", "20: a view has only 16"),
        ("--sizes tiny", "did you mean --size"),
        ("stepp", "say step, roofline or scale"),
    ],
)
def test_errors_are_one_line(words, says):
    done = run(f"lab.bench {words} " + (TINY if "step " in words else ""), ok=False)
    assert says in done.stderr and len(done.stderr.strip().splitlines()) == 1
