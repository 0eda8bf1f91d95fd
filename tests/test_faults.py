"""Whatever fails while a run writes, or kills its helpers: nothing that was trained is lost.

Every file that the programs write is refused once; every signal is sent once. The run goes on or
ends in one line, last.pt loads, and the same command ends as if nothing had happened.
"""

import builtins
import contextlib
import errno
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from proc import children_of, needs_proc

import finetune
import pretrain
from plumbing import launch, phantom
from plumbing.checkpoint import read_json, read_log
from plumbing.launch import UserError

pytestmark = pytest.mark.slow
NETWORK = "--size tiny --image 32 --patch 8 --device cpu --precision float32 --log_every 1"
PRETRAIN = f"{NETWORK} --batch 8 --epochs 1 --warmup 0.5 --lr 2e-4 --ema 0.9 --holdout 4"
FINETUNE = f"{NETWORK} --task csv --column mask --weights none --batch 8 --epochs 3 --lr 2e-3"
FILES = {
    "pretrain": ("config.json log.csv last.pt encoder.pt result.json views.png curve.png "
                 ".lock").split(),
    "finetune": ("seed0/config.json seed0/log.csv seed0/last.pt seed0/best.pt seed0/result.json "
                 "seed0/predictions.csv seed0/cases.png films.csv result.json "
                 ".lock").split(),
}  # fmt: skip
DISPENSABLE = {"views.png", "curve.png", "seed0/cases.png"}
CASES = [(program, file) for program, files in FILES.items() for file in files]


@pytest.fixture(scope="module", name="films")
def draw_films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    phantom.write_phantoms(folder, 36, size=64, seed=5)
    return folder


def words_of(program, films, out):
    """The flags of a short run."""
    words = ["--data", str(films / "films"), "--out", str(out), "--save_every", "1"]
    if program == "pretrain":
        return [*words, *PRETRAIN.split()]
    return [*words, "--labels", str(films / "phantoms.csv"), *FINETUNE.split()]


def run(program, films, out):
    """A short run in this process."""
    words = words_of(program, films, out)
    if program == "pretrain":
        pretrain.main(launch.parse(pretrain.Config, "", words))
        return
    old_argv = sys.argv
    sys.argv = ["finetune.py", *words]
    try:
        finetune.main()
    finally:
        sys.argv = old_argv


@pytest.fixture(scope="module", name="undisturbed")
def run_undisturbed(films, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    for program in FILES:
        run(program, films, folder / program)
    return folder


class Full:
    """A file on a full disk."""

    def __init__(self, file):
        self.file = file

    def write(self, _content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        self.file.close()


@contextlib.contextmanager
def refused(path, how, allowed):
    """Within it, `path` cannot be written after it was written `allowed` times."""
    really_open = io.open
    times = []

    def opened(file, mode="r", *args, **kwargs):
        name = Path(file) if isinstance(file, (str, Path)) else Path("?")
        temporary = re.fullmatch(r"\.(.+)\.\d+\.tmp", name.name)
        written = name.with_name(temporary[1]) if temporary else name
        if written != path or not set(mode) & set("wax"):
            return really_open(file, mode, *args, **kwargs)
        times.append(1)
        if len(times) <= allowed:
            return really_open(file, mode, *args, **kwargs)
        if how == "denied":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return Full(really_open(file, mode, *args, **kwargs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", opened)
        patch.setattr(io, "open", opened)
        yield times
    assert len(times) > allowed, f"{path} was never refused"


def same_end(program, films, out, undisturbed):
    """Run the same command again: it must end as the undisturbed run did."""
    run(program, films, out)
    speed = ("images_per_s", "data_wait")
    folder = "seed0" if program == "finetune" else "."
    logs = [
        [
            {k: v for k, v in row.items() if k not in speed}
            for row in read_log(end / folder / "log.csv")
        ]
        for end in (out, undisturbed / program)
    ]
    assert logs[0] == logs[1]
    results = [read_json(end / "result.json") for end in (out, undisturbed / program)]
    for result in results:
        assert result.pop("made_with")["time"]
    assert results[0] == results[1]
    name = "seed0/best.pt" if program == "finetune" else "encoder.pt"
    ours, theirs = (
        torch.load(end / name, weights_only=True) for end in (out, undisturbed / program)
    )
    assert ours["step"] == theirs["step"]
    weights = "finetuned" if program == "finetune" else "encoder"
    assert all(torch.equal(w, theirs[weights][key]) for key, w in ours[weights].items())
    written = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert written == set(FILES[program]) - {"seed0/last.pt"}  # taken away at the end


@pytest.mark.parametrize("how", ["full", "denied"])
@pytest.mark.parametrize("program, file", CASES)
def test_a_file_that_cannot_be_written(films, undisturbed, tmp_path, capsys, program, file, how):
    out = tmp_path / "run"
    allowed = 1 if file.endswith(".pt") else 0
    if file == "encoder.pt":
        allowed = 3  # last.pt of the last step is there; only encoder.pt is of the step before
    error = None
    with refused(out / file, how, allowed):
        try:
            run(program, films, out)
        except UserError as reason:
            error = str(reason)
    reason = {"full": "No space left on device: make room", "denied": "Permission denied"}[how]
    said = error or "".join(capsys.readouterr())
    assert f"{file} cannot be written: {reason}" in said and "\n" not in (error or "")
    assert (error is None) == (file in DISPENSABLE)
    assert not list(out.rglob("*.tmp"))
    last = out / ("seed0/last.pt" if program == "finetune" else "last.pt")
    if allowed:
        assert torch.load(last, weights_only=True)["step"] >= 1
    if file in DISPENSABLE:
        (out / file).write_text("")  # what comes only once
    same_end(program, films, out, undisturbed)


@pytest.mark.parametrize("how", ["full", "denied"])
def test_a_run_goes_on_without_rows_of_the_log(films, undisturbed, tmp_path, how, capsys):
    """The log itself is there; from its second row on it cannot be written."""
    out = tmp_path / "run"
    with refused(out / "log.csv", how, 2):
        run("pretrain", films, out)
    assert "going on without the row of step 2: " in "".join(capsys.readouterr())
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 4
    assert len(read_log(out / "log.csv")) == 1


# ---- Killed helpers, signals at every place
def start(program, *words):
    """Start a script in a process group of its own."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    command = [sys.executable, str(ROOT / f"{program}.py"), *map(str, words)]
    return subprocess.Popen(command, start_new_session=True, **pipes)


def wait_for(process, is_ready):
    while not is_ready():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


@needs_proc
@pytest.mark.parametrize("program", ["pretrain", "finetune"])
def test_a_killed_loader_process(films, tmp_path, program):
    out = tmp_path / "run"
    words = [*words_of(program, films, out), "--epochs", 300, "--workers", 2, "--patience", 999]
    words = words[:-2] if program == "pretrain" else [*words, "--memory_gb", 0]
    log = out / ("seed0" if program == "finetune" else "") / "log.csv"
    process = start(program, *words)
    wait_for(process, lambda: len(read_log(log)) >= 3)
    workers = [
        pid
        for pid in children_of(process)
        if b"tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(workers[0], signal.SIGKILL)
    said, _ = process.communicate()
    assert process.returncode == 1 and "Traceback" not in said, said
    assert "error: a helper process was killed" in said.splitlines()[-1], said
    step = torch.load(log.with_name("last.pt"), weights_only=True)["step"]
    again = start(program, *words, "--max_steps", step + 1)
    assert f"resuming at step {step}" in again.communicate()[0]
    assert again.returncode == 0


@pytest.mark.parametrize("number", launch.ENDING, ids=lambda number: number.name)
def test_every_signal_saves(films, tmp_path, number):
    out = tmp_path / "run"
    words = [*words_of("pretrain", films, out), "--epochs", 300, "--save_every", 100000]
    process = start("pretrain", *words)
    wait_for(process, lambda: len(read_log(out / "log.csv")) >= 3)
    os.killpg(process.pid, number)
    said, _ = process.communicate()
    assert f"{number.name}: saved at step" in said and "Traceback" not in said
    assert process.returncode == (130 if number == signal.SIGINT else 0)
    assert torch.load(out / "last.pt", weights_only=True)["step"] >= 3


def test_a_signal_while_phantoms_are_drawn(tmp_path):
    out = tmp_path / "run"
    process = start("pretrain", "--out", out, "--device", "cpu")
    wait_for(process, lambda: len(list(out.glob("phantoms/films/*"))) > 3)
    os.killpg(process.pid, signal.SIGTERM)
    said, _ = process.communicate()  # the pipe closes when the last helper is gone
    assert process.returncode == 143 and "Traceback" not in said
    assert said.splitlines()[-1] == "SIGTERM: ended; what was saved is kept"
    assert sorted(os.listdir(out)) == [".lock", "phantoms"]


def test_a_validation_under_way_is_finished_before_the_run_ends(films, undisturbed, tmp_path):
    """The signal comes while the first batch of a validation is judged."""
    out = tmp_path / "run"
    really_predict = finetune.predict
    calls = []

    def predict(forward, task, split, *rest, **more):
        calls.append(split)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return really_predict(forward, task, split, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "predict", predict)
        with pytest.raises(SystemExit) as end:
            run("finetune", films, out)
    assert end.value.code == 0
    saved = torch.load(out / "seed0" / "last.pt", weights_only=True)
    judged = [row for row in read_log(out / "seed0" / "log.csv") if row["val"]]
    assert int(judged[-1]["step"]) == saved["step"] and len(judged) == len(calls) == 2
    same_end("finetune", films, out, undisturbed)


def test_a_second_start_touches_nothing(films, tmp_path):
    out = tmp_path / "run"
    words = [*words_of("pretrain", films, out), "--epochs", 300]
    first = start("pretrain", *words)
    wait_for(first, lambda: len(read_log(out / "log.csv")) >= 1)
    (out / ".last.pt.1.tmp").write_text("being written")
    second = start("pretrain", *words)
    said, _ = second.communicate()
    assert second.returncode == 1 and said.startswith(f"error: {out} is in use by process ")
    assert said.count("\n") == 1 and (out / ".last.pt.1.tmp").exists()
    third = start("finetune", *words_of("finetune", films, out))
    assert f"{out} holds a pre-training" in third.communicate()[0]  # in use or not
    first.terminate()
    assert "saved at step" in first.communicate()[0] and first.returncode == 0


@pytest.mark.parametrize("program", ["pretrain", "finetune"])
@pytest.mark.parametrize("size", [0, 1000])
def test_a_last_checkpoint_that_is_cut_short(films, undisturbed, tmp_path, program, size):
    out = tmp_path / "run"
    folder = "seed0" if program == "finetune" else "."
    last = out / folder / "last.pt"
    last.parent.mkdir(parents=True)
    shutil.copy(undisturbed / program / folder / "config.json", last.parent)
    last.write_bytes(b"PK" + bytes(size) if size else b"")
    with pytest.raises(UserError, match="last.pt: .*move it away to start anew") as error:
        run(program, films, out)
    assert "\n" not in str(error.value)


LIMITED = """import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot limit the size of files")
def test_a_pack_on_a_full_disk_goes_on_when_there_is_room(films, tmp_path):
    pytest.importorskip("resource")
    out = tmp_path / "films.pack"
    words = [str(ROOT / "data.py"), "pack", "--data", films / "films", "--out", out, "--workers", 0]
    words = [*map(str, words)]
    full = subprocess.run([sys.executable, "-c", LIMITED, *words], capture_output=True, text=True)
    line = full.stderr.strip().splitlines()[-1]
    assert full.returncode == 1 and "Traceback" not in full.stderr, full.stderr
    assert "films.pack" in line and "cannot be written: File too large: make room" in line
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert done.returncode == 0 and "36 films" in done.stdout, done.stdout + done.stderr
    assert sorted(os.listdir(tmp_path)) == [".films.pack.lock", "films.pack"]
