"""Systems that we have not, simulated: no fork, no POSIX calls, a console of few letters, no ~.

Windows and macOS start helper processes anew ("spawn") and lack some calls of Linux. Text is not in
UTF-8 there unless one says so, and a console may lack letters that we print.
"""

import ast
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import finetune
import pretrain
from plumbing import phantom
from plumbing.benchmarks import find_root

# Python reads this file before every script, and before every helper process.
ELSEWHERE = """import multiprocessing, os, signal
multiprocessing.set_start_method("spawn")
for name in "sched_getaffinity fork forkpty killpg getpgid setsid getuid geteuid mkfifo".split():
    delattr(os, name)
for name in "SIGKILL SIGUSR1 SIGUSR2 SIGHUP SIGALRM pthread_sigmask pthread_kill".split():
    delattr(signal, name)
"""
SMALL = (
    "--size tiny --image 32 --patch 8 --batch 8 --epochs 2 --warmup 0.5 --log_every 1 "
    "--device cpu --workers 2 --max_steps 2"
).split()


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    phantom.write_phantoms(folder, 36, size=64, seed=5)
    return folder


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """The environment of a system without fork, whose text and console are not UTF-8."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "sitecustomize.py").write_text(ELSEWHERE)
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
        "PYTHONIOENCODING": "cp1252:strict",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "LC_ALL": "C",
        "USERNAME": "reader",
    }


def run(environment, *words, cwd=ROOT):
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, capture_output=True, env=environment, cwd=cwd)
    said = (done.stdout + done.stderr).decode("cp1252", "replace")
    assert done.returncode == 0, said
    return said


@pytest.mark.slow
def test_pretraining_and_packing_run_elsewhere(films, elsewhere, tmp_path):
    pack = tmp_path / "cxr.pack"
    words = ["data.py", "pack", "--data", films / "films", "--out", pack, "--workers", "2"]
    assert "36 films" in run(elsewhere, *words)
    said = run(elsewhere, "pretrain.py", "--data", pack, "--out", tmp_path / "run", *SMALL)
    assert "32² px" in said  # cp1252 has this letter …
    assert (tmp_path / "run" / "result.json").is_file()
    Image.open(tmp_path / "run" / "curve.png").load()


@pytest.mark.slow
def test_the_demo_and_finetuning_run_elsewhere(elsewhere, tmp_path):
    small = ["--phantoms", "40", *SMALL]
    run(elsewhere, "pretrain.py", "--out", tmp_path / "demo", *small)
    table = tmp_path / "table.csv"
    lines = (tmp_path / "demo" / "phantoms" / "phantoms.csv").read_text().splitlines()
    names = [line.split(",")[0] for line in lines[1:]]
    rows = [f"{name},{'é→θ' if k % 2 else 'normal'}" for k, name in enumerate(names)]
    table.write_text("\n".join(["filename,label", *rows]) + "\n", encoding="utf-8")
    words = "--task csv --epochs 1 --batch 8 --workers 2 --memory_gb 0 --device cpu".split()
    words += ["--head", "random"]
    words += ["--data", tmp_path / "demo" / "phantoms" / "films", "--labels", table]
    words += ["--weights", tmp_path / "demo", "--out", tmp_path / "tuned"]
    said = run(elsewhere, "finetune.py", *words)
    assert "é??" in said  # … but neither of these two
    predictions = tmp_path / "tuned" / "seed0" / "predictions.csv"
    assert "é→θ" in predictions.read_text(encoding="utf-8")


def test_the_folder_of_all_sets_may_begin_with_a_tilde(monkeypatch, tmp_path):
    (tmp_path / "sets" / "siim").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setenv("CXR", "~/sets")
    assert find_root("siim") == tmp_path / "sets" / "siim"


class NoFloat64(TorchDispatchMode):
    """Fails when an operation makes float64 on the device "meta", which stands for mps."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for each in torch.utils._pytree.tree_leaves(out):
            if isinstance(each, torch.Tensor) and each.device.type == "meta":
                assert each.dtype != torch.float64, f"{function} makes float64"
        return out


def test_a_training_step_makes_no_float64_which_apples_gpus_lack():
    args = pretrain.Config(size="tiny", image=32, patch=8, batch=4, micro=4, precision="float32")
    args.global_share = 1.0
    boxes = torch.tensor([[0.0, 0, 30, 30], [5, 5, 30, 30]]).expand(4, 2, 4)
    item = {"views": torch.zeros(4, 2, 32, 32, dtype=torch.uint8), "boxes": boxes}
    item["flips"] = torch.tensor([[True, False]] * 4)
    world = pretrain.CheXWorld(32, 8, **pretrain.SIZES["tiny"]).to("meta")
    task = dict(kind="mask", key=(0, 1), batch_positions=torch.arange(4), batch=4, device="meta")
    films = {"view": torch.zeros(4, 32, 32, dtype=torch.uint8), "truth": torch.zeros(4, 32, 32)}
    segmenter = finetune.Segmenter(world.encoder).to("meta")
    with NoFloat64():
        batch = pretrain.prepare(item, args, 0, torch.arange(4), torch.device("meta"))
        losses, pooled = world(**batch)
        losses["loss"].backward()
        world.update_target(0.9)
        images, goal = finetune.jitter_batch(films, **task)
        finetune.loss_of("mask", segmenter(images), goal).mean().backward()
    assert pooled.device.type == "meta"


def calls(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield node


def test_text_is_read_and_written_in_a_named_encoding():
    """Else a file written on one system could not be read on another."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("plumbing/*.py"), *ROOT.glob("lab/*.py")]:
        for call in calls(path):
            is_open = isinstance(call.func, ast.Name) and call.func.id == "open"
            is_text = getattr(call.func, "attr", "") in ("read_text", "write_text")
            is_text &= ast.unparse(call.func) != "checkpoint.write_text"
            mode = call.args[1].value if is_open and len(call.args) > 1 else "r"
            said = {keyword.arg for keyword in call.keywords} & {"encoding", None}
            if (is_open and "b" not in mode) or is_text:
                assert said, f"{path.name}:{call.lineno}: say encoding="
