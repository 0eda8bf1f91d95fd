"""Every signal once, to the process or to its whole group: the run is saved, and resumes."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

from plumbing import phantom
from plumbing.checkpoint import read_log

pytestmark = pytest.mark.slow
NETWORK = ["--size", "tiny", "--image", "32", "--patch", "8", "--device", "cpu", "--batch", "8"]
PRETRAIN = ["--epochs", "60", "--warmup", "0.5", "--lr", "2e-4", "--ema", "0.9", "--log_every", "1"]
PRETRAIN += ["--precision", "float32", "--holdout", "4", "--save_every", "100000"]
FINETUNE = ["--weights", "none", "--epochs", "60", "--lr", "2e-3", "--log_every", "1"]
FINETUNE += ["--patience", "1000", "--save_every", "100000", "--precision", "float32"]


@pytest.fixture(scope="module", name="films")
def draw_films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    phantom.write_phantoms(folder, 40, size=64, seed=5)
    rows = ["filename,label,split"]
    for k, path in enumerate(sorted((folder / "films").glob("*.png"))):
        split = "test" if k % 5 == 0 else "val" if k % 5 == 1 else "train"
        rows.append(f"{path.name},{'odd' if k // 5 % 2 else 'normal'},{split}")
    (folder / "labels.csv").write_text("\n".join(rows))
    return folder


def command(program, films, out, *more, ranks=1):
    words = [sys.executable]
    if ranks > 1:
        words += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
    words += [str(ROOT / f"{program}.py"), "--data", str(films / "films"), "--out", str(out)]
    if program == "finetune":
        words += ["--task", "csv", "--labels", str(films / "labels.csv"), *FINETUNE]
    else:
        words += PRETRAIN
    return [*words, *NETWORK, *map(str, more)]


def folder_of(program, out):
    return out / "seed0" if program == "finetune" else out


def start(words):
    """Start a program in a process group of its own."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(words, start_new_session=True, **pipes)


def wait_for(process, path, is_ready=lambda path: path.exists()):
    while not is_ready(path):
        if process.poll() is not None:
            raise AssertionError(process.communicate()[0])
        time.sleep(0.02)


def has_rows(path):
    return len(read_log(path)) >= 3


def finished(words):
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rows_of(folder):
    speed = ("images_per_s", "data_wait")
    return [
        {k: v for k, v in row.items() if k not in speed} for row in read_log(folder / "log.csv")
    ]


ALL = [
    (program, ranks, workers, to_group)
    for program in ("pretrain", "finetune")
    for ranks, workers, to_group in ((1, 0, True), (1, 2, False), (1, 2, True), (2, 2, True))
]


@pytest.mark.parametrize("program, ranks, workers, to_group", ALL)
def test_sigterm_saves_and_the_run_goes_on(films, tmp_path, program, ranks, workers, to_group):
    out = tmp_path / "run"
    folder = folder_of(program, out)
    more = ["--workers", workers]
    if program == "finetune":
        more += ["--memory_gb", "0"]
    process = start(command(program, films, out, *more, ranks=ranks))
    wait_for(process, folder / "log.csv", has_rows)
    if to_group:
        os.killpg(process.pid, signal.SIGTERM)
    else:
        process.send_signal(signal.SIGTERM)
    said, _ = process.communicate()
    print(said)
    assert "SIGTERM: saved at step" in said
    if ranks == 1:  # torchrun has its own words for a signal
        assert process.returncode == 0 and "Traceback" not in said and "error" not in said
    step = torch.load(folder / "last.pt", weights_only=True)["step"]
    assert step >= 3
    again = finished(command(program, films, out, *more, "--max_steps", step + 2, ranks=ranks))
    assert f"resuming at step {step}" in again
    assert [int(row["step"]) for row in rows_of(folder)] == list(range(1, step + 3))
