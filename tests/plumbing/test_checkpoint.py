"""Atomic files, the log after a crash, the newest run, another recipe, resuming, SIGTERM."""

import contextlib
import errno
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from plumbing import checkpoint, launch
from plumbing.checkpoint import Log, StopRequest, read_log, save_atomic, write_json, write_text
from plumbing.launch import UserError

try:
    import resource  # not on Windows
except ImportError:
    resource = None

ALONE = launch.Team(0, 1, torch.device("cpu"))


@pytest.fixture
def full_disk():
    """full_disk(bytes): within it no file of this process can become longer."""

    @contextlib.contextmanager
    def limit(size=20_000):
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)

    return limit


# ---- Files
def test_save_atomic_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "deep" / "last.pt"
    save_atomic({"step": 1, "x": torch.arange(3)}, path)
    assert torch.equal(torch.load(path, weights_only=True)["x"], torch.arange(3))
    with pytest.raises(Exception, match="pickle"):
        save_atomic({"step": 2, "x": lambda: 0}, path)  # cannot be pickled
    assert torch.load(path, weights_only=True)["step"] == 1
    assert os.listdir(path.parent) == ["last.pt"]


def test_readers_never_see_half_a_file(tmp_path):
    path = tmp_path / "a.txt"
    seen = []
    write_text(path, "old")

    def slowly(file):
        Path(file).write_text("ne")
        seen.append(path.read_text())
        Path(file).write_text("new")

    checkpoint.replace_with(path, slowly)
    assert seen == ["old"] and path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


def test_json(tmp_path):
    write_json(tmp_path / "r.json", {"b": 1.5, "a": [1]})
    assert (tmp_path / "r.json").read_text() == '{\n  "b": 1.5,\n  "a": [\n    1\n  ]\n}\n'


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for write in (lambda p: write_text(p, "x"), lambda p: save_atomic({}, p)):
        with pytest.raises(UserError, match="cannot be written") as error:
            write(tmp_path / "file" / "out" / "last.pt")
        assert "\n" not in str(error.value)


@pytest.mark.skipif(resource is None, reason="Windows cannot limit the size of files")
def test_a_full_disk_is_named_and_the_old_file_stays(tmp_path, full_disk):
    tensor = torch.arange(100_000)
    save_atomic({"x": tensor}, tmp_path / "last.pt")
    write_text(tmp_path / "a.txt", "old")
    with full_disk():
        for write in (
            lambda: save_atomic({"x": tensor + 1}, tmp_path / "last.pt"),
            lambda: write_text(tmp_path / "a.txt", "x" * 100_000),
        ):
            with pytest.raises(UserError, match="cannot be written: File too large: make room"):
                write()
    assert torch.equal(torch.load(tmp_path / "last.pt", weights_only=True)["x"], tensor)
    assert (tmp_path / "a.txt").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "last.pt"]


@pytest.mark.skipif(resource is None, reason="Windows cannot limit the size of files")
def test_a_run_goes_on_without_rows_that_a_full_disk_refuses(tmp_path, full_disk, capsys):
    log = Log(tmp_path / "log.csv", ["step", "note"])
    log.row(step=1, note="x")
    with full_disk(16):  # in the midst of the row
        log.row(step=2, note="y")
    assert "going on without the row of step 2: " in capsys.readouterr().out
    log.row(step=3, note="")
    assert [row["step"] for row in read_log(tmp_path / "log.csv")] == ["1", "3"]


def test_a_run_goes_on_without_a_picture(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with checkpoint.go_on_without("the picture"):
        write_text(tmp_path / "file" / "views.png", "")
    assert "warning: going on without the picture: " in capsys.readouterr().out


def test_leftovers_of_a_killed_run_are_removed_and_nothing_else(tmp_path):
    for name in (".last.pt.123.tmp", ".log.csv.4.tmp", "last.pt", ".hidden"):
        (tmp_path / name).write_text("")
    checkpoint.remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden", "last.pt"]
    checkpoint.remove_leftovers(tmp_path / "nowhere")


# ---- One run per folder
OTHER = """import sys, time
from plumbing import checkpoint, launch
def main():
    checkpoint.lock(sys.argv[1])
    print("here", flush=True)
    if len(sys.argv) > 2:
        raise launch.UserError("stop")
    time.sleep(600)
launch.run_script(main)
"""


def start_other(folder, *more):
    """Another process that locks the folder; None when it is refused."""
    words = [sys.executable, "-c", OTHER, str(folder), *more]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(words, **pipes)
    if process.stdout.readline() == "here\n":
        return process, ""
    return process, process.communicate()[1]


@pytest.mark.slow
def test_a_folder_in_use_is_refused_until_its_run_ends(tmp_path):
    out = tmp_path / "deep" / "run"
    first, _ = start_other(out)
    second, said = start_other(out)
    assert second.returncode == 1 and said.startswith(f"error: {out} is in use by process ")
    assert f"process {first.pid} on" in said and said.count("\n") == 1
    with pytest.raises(UserError, match=f"{out} is in use by process {first.pid} on .* --out"):
        checkpoint.lock(out)
    assert os.listdir(out) == [".lock"]  # refused before anything was touched
    first.terminate()
    assert first.wait() == 143 and not out.exists()  # it made the folder and wrote nothing
    third, _ = start_other(out)
    third.kill()
    third.wait()
    fourth, _ = start_other(out, "UserError")
    assert fourth.wait() == 1 and os.listdir(out) == [".lock"]


def test_only_a_folder_with_nothing_but_ones_own_lock_is_removed(tmp_path):
    for content, owner in ((["config.json"], True), ([], False), ([], True)):
        folder = tmp_path / "new"
        checkpoint.lock(folder)
        for name in content:
            (folder / name).write_text("")
        if not owner:
            forget(folder / ".lock")
        checkpoint.remove_if_empty(folder)
        assert folder.exists() == (content != [] or not owner)
        if owner and folder.exists():
            forget(folder / ".lock")
            (folder / "config.json").unlink()


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_taken_on_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "new" / ".lock"
    lock_file = checkpoint.lock_file

    def remove_first(file):
        monkeypatch.setattr(checkpoint, "lock_file", lock_file)
        path.unlink()
        path.parent.rmdir()
        return lock_file(file)

    monkeypatch.setattr(checkpoint, "lock_file", remove_first)
    checkpoint.lock(path.parent)
    assert os.path.samestat(os.fstat(checkpoint.held_locks[path].fileno()), os.stat(path))


def forget(path):
    """Free a lock as the end of its process does."""
    checkpoint.held_locks.pop(path).close()


def test_the_lock_of_a_run_that_is_gone_counts_for_nothing_whatever_it_says(tmp_path):
    path = tmp_path / ".lock"
    for content in ("", "process 1 on moon since ever", "\0[" * 99):
        path.write_text(content)
        checkpoint.lock(tmp_path)
        checkpoint.lock(tmp_path)  # one run after the other in one process
        forget(path)
        assert path.read_text().startswith(f"process {os.getpid()} on ")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no fork")
def test_a_forked_process_does_not_keep_the_lock(tmp_path):
    fork = multiprocessing.get_context("fork")
    checkpoint.lock(tmp_path)
    child = fork.Process(target=time.sleep, args=[600])
    child.start()
    forget(tmp_path / ".lock")
    other, said = start_other(tmp_path)
    other.kill()
    child.kill()
    child.join()
    assert not said


def test_a_disk_without_locks_is_warned_of(tmp_path, monkeypatch, capsys):
    def lockf(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(checkpoint, "fcntl", SimpleNamespace(lockf=lockf, LOCK_EX=2, LOCK_NB=4))
    checkpoint.lock(tmp_path)
    assert ".lock cannot be locked (No locks available)" in capsys.readouterr().out
    forget(tmp_path / ".lock")


def test_windows_locks_a_byte_behind_the_text(tmp_path, monkeypatch):
    """As the manual of msvcrt.locking has it: from the file's position on, OSError when locked."""
    locked = []

    def locking(number, mode, count):
        place = (os.lseek(number, 0, os.SEEK_CUR), mode, count)
        if place in locked:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        locked.append(place)

    monkeypatch.setattr(checkpoint, "fcntl", None)
    calls = SimpleNamespace(LK_NBLCK=2, locking=locking)
    monkeypatch.setattr(checkpoint, "msvcrt", calls, raising=False)
    path = tmp_path / "it.lock"
    checkpoint.claim(path, "it")
    words = path.read_text()
    assert len(words) < 300 and locked == [(2**30, 2, 1)]
    forget(path)
    with pytest.raises(UserError, match=f"it is in use by {re.escape(words)}: wait"):
        checkpoint.claim(path, "it")


# ---- Checkpoints
def test_the_newest_run_is_the_last_written_folder_with_an_encoder(tmp_path):
    assert checkpoint.newest_run(tmp_path / "none") is None
    assert checkpoint.newest_run(tmp_path) is None
    names = ["old/encoder.pt", "old/last.pt", "deep/new/encoder.pt", "deep/new/last.pt"]
    names += ["tuned/seed0/last.pt"]  # fine-tuned: no encoder.pt, so no pre-training run
    for second, name in enumerate(names):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        os.utime(path, (second, second))
    assert checkpoint.newest_run(tmp_path) == tmp_path / "deep/new/encoder.pt"
    os.utime(tmp_path / "old/encoder.pt", (99, 99))
    assert checkpoint.newest_run(tmp_path) == tmp_path / "old/encoder.pt"


def test_another_recipe_is_refused_with_old_and_new():
    checkpoint.refuse_other_recipe("runs/a", {"lr": 1.0, "seed": 0}, {"seed": 0, "lr": 1.0})
    with pytest.raises(UserError) as error:
        checkpoint.refuse_other_recipe(
            "runs/a", {"lr": 1.0, "seed": 0, "tasks": "local"}, {"lr": 2.0, "seed": 0, "clip": 1.0}
        )
    assert str(error.value) == (
        "runs/a holds a run with another recipe (lr 1.0 → 2.0; clip not given → 1.0; "
        "tasks local → not given): choose another --out, or delete it to start anew"
    )
    with pytest.raises(UserError, match="films 2 → 3; other films to learn from, by --data"):
        checkpoint.refuse_other_recipe("a", {"films": 2, "names": "a1"}, {"films": 3, "names": "b"})


def test_the_refusal_tells_the_old_command(tmp_path):
    checkpoint.write_json(tmp_path / "result.json", {"made_with": {"command": "finetune.py --a 1"}})
    changed = {"size": "tiny"}, {"size": None}
    for folder, of in ((tmp_path, None), (tmp_path / "seed0", tmp_path)):
        with pytest.raises(UserError, match=r"\. Its command was: finetune.py --a 1$"):
            checkpoint.refuse_other_recipe(folder, *changed, of=of)
    with pytest.raises(UserError, match="start anew$"):  # the folder above is of another program
        checkpoint.refuse_other_recipe(tmp_path / "decoder", *changed)


def trained(steps):
    """A small layer and its optimizer after some steps."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for _ in range(steps):
        layer(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"layer": layer, "optimizer": optimizer}


def test_a_run_goes_on_with_all_its_parts(tmp_path):
    path = tmp_path / "last.pt"
    fresh = trained(0)
    assert checkpoint.resume(path, {"lr": 0.1}, fresh) is None
    states = {name: part.state_dict() for name, part in trained(3).items()}
    save_atomic(states | {"step": 3, "recipe": {"lr": 0.1}, "best": 7}, path)
    for recipe in ({"lr": 0.1}, None):
        fresh = trained(0)
        saved = checkpoint.resume(path, recipe, fresh)
        assert (saved["step"], saved["best"]) == (3, 7)
        assert torch.equal(fresh["layer"].weight, states["layer"]["weight"])
        assert fresh["optimizer"].state_dict()["state"][0]["step"] == 3
    with pytest.raises(UserError, match="another recipe .lr 0.1 → 0.2"):
        checkpoint.resume(path, {"lr": 0.2}, fresh)


def test_weights_whose_last_pt_is_gone_are_not_written_over(tmp_path):
    team = launch.Team(0, 1, torch.device("cpu"))
    assert checkpoint.resume_run(tmp_path, {}, {}, team) == 0
    (tmp_path / "encoder.pt").write_bytes(b"of an hour of training")
    with pytest.raises(UserError, match="encoder.pt is of a run whose last.pt is gone"):
        checkpoint.resume_run(tmp_path, {}, {}, team)
    save_atomic({"step": 7, "recipe": {}}, tmp_path / "last.pt")
    assert checkpoint.resume_run(tmp_path, {}, {}, team) == 7


@pytest.mark.parametrize("missing", ["layer", "step", "recipe"])
def test_a_checkpoint_of_another_program_is_refused(tmp_path, missing):
    saved = {"layer": {}, "step": 3, "recipe": {}}
    del saved[missing]
    save_atomic(saved, tmp_path / "last.pt")
    with pytest.raises(UserError, match="last.pt is not a checkpoint of this program"):
        checkpoint.resume(tmp_path / "last.pt", {}, {"layer": torch.nn.Linear(2, 2)})
    other = {"layer": torch.nn.Linear(2, 3).state_dict(), "step": 1}
    save_atomic(other, tmp_path / "last.pt")
    with pytest.raises(UserError, match="holds another network than today's") as error:
        checkpoint.resume(tmp_path / "last.pt", None, {"layer": torch.nn.Linear(2, 2)})
    assert "\n" not in str(error.value)


def test_junk_is_a_users_error_and_a_value_error(tmp_path):
    (tmp_path / "junk.pt").write_bytes(b"junk")
    for kind in (UserError, ValueError):
        with pytest.raises(kind, match="junk.pt: not a checkpoint that can be loaded safely"):
            checkpoint.load_checkpoint(tmp_path / "junk.pt")


def test_signals_only_set_a_flag_and_a_second_ctrl_c_ends_at_once():
    for number in launch.ENDING:
        before = signal.getsignal(number)
        with StopRequest() as stop:
            assert not stop.requested
            signal.raise_signal(number)
            assert stop.requested == number
            signal.raise_signal(signal.SIGTERM)
            assert stop.requested == number
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
                time.sleep(60)
        assert signal.getsignal(number) == before


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows")
def test_a_signal_that_nohup_has_silenced_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


# ---- log.csv
def test_log_rows_and_reading(tmp_path):
    path = tmp_path / "run" / "log.csv"
    log = Log(path, ["step", "loss", "note"])
    log.row(step=1, loss=1 / 3, note="", unused=5)
    log.row(step=2, loss=1e-9, note="x")
    # Each row is on disk at once.
    assert path.read_text() == "step,loss,note\n1,0.333333,\n2,1e-09,x\n"
    rows = [
        {"step": "1", "loss": "0.333333", "note": ""},
        {"step": "2", "loss": "1e-09", "note": "x"},
    ]
    assert read_log(path) == rows
    with pytest.raises(KeyError):
        log.row(step=3, loss=1.0)
    assert read_log(tmp_path / "none.csv") == []


def test_log_drops_what_came_after_the_resumed_step(tmp_path):
    path = tmp_path / "log.csv"
    log = Log(path, ["step", "loss"])
    for step in range(1, 9):
        log.row(step=step, loss=step / 8)
    log = Log(path, ["step", "loss", "new"], step=5)
    log.row(step=6, loss=0.5, new=1)
    kept = "1,0.125,\n2,0.25,\n3,0.375,\n4,0.5,\n5,0.625,\n"
    assert path.read_text() == f"step,loss,new\n{kept}6,0.5,1\n"
    Log(path, ["step", "loss"])
    assert path.read_text() == "step,loss\n"  # from the start: nothing stays


@pytest.mark.parametrize("torn", ["9", "9,", "9,0.123,4", "9,0.123,", ",,", "\x00\x00\x00"])
def test_a_torn_last_row_is_left_out(tmp_path, torn):
    """Every way in which a crash can cut the row "9,0.123,45\\n", its last number included."""
    path = tmp_path / "log.csv"
    path.write_text("step,loss,wait\n7,0.5,1\n8,0.25,2\n" + torn)
    assert [row["step"] for row in read_log(path)] == ["7", "8"]
    Log(path, ["step", "loss", "wait"], step=9).row(step=9, loss=1.0, wait=3)
    assert path.read_text() == "step,loss,wait\n7,0.5,1\n8,0.25,2\n9,1,3\n"


@pytest.mark.parametrize("kind", ["bom", "semicolons", "latin1", "utf16", "a word", "no header"])
def test_a_log_that_was_edited_is_never_lost(tmp_path, capsys, kind):
    path = tmp_path / "log.csv"
    text = "step,loss\n1,0.5\n2,0.25\n"
    changed = {
        "bom": b"\xef\xbb\xbf" + text.encode(),
        "semicolons": text.replace(",", ";").encode(),
        "latin1": text.encode() + b"3,\xe9;0\n",
        "utf16": text.encode("utf-16"),
        "a word": text.encode() + b"sum,0.75\n",
        "no header": text.partition("\n")[2].encode(),
    }[kind]
    path.write_bytes(changed)
    Log(path, ["step", "loss"], step=2).row(step=3, loss=0.125)
    rows = {"bom": 2, "latin1": 2, "a word": 2}.get(kind, 0)
    assert [row["step"] for row in read_log(path)] == ["1", "2"][:rows] + ["3"]
    aside = tmp_path / "log-before-step-3.csv"
    if kind in ("bom", "latin1"):
        assert not aside.exists()  # nothing is lost
    else:
        assert aside.read_bytes() == changed
        assert str(aside) in "".join(capsys.readouterr())


@pytest.mark.parametrize("content", ['{"a":', "[]", "", "\x00", "[" * 100_000, "7"])
def test_damaged_settings_are_one_line(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="config.json is damaged") as error:
        checkpoint.read_json(tmp_path / "config.json")
    assert "\n" not in str(error.value)
    assert checkpoint.read_json(tmp_path / "none.json") == {}


ODD = [("step", "x"), ("step", 1.5), ("step", -1), ("step", None), ("recipe", None)]
ODD += [("recipe", [1]), ("world", None), ("world", {"a": 1}), ("optimizer", None)]
ODD += [("optimizer", {}), ("optimizer", {"state": {0: 1}, "param_groups": [{"params": [0]}]})]


@pytest.mark.parametrize("name, value", ODD)
def test_a_checkpoint_with_odd_content_is_one_line(tmp_path, name, value):
    world = torch.nn.Linear(2, 2)
    parts = {"world": world, "optimizer": torch.optim.AdamW(world.parameters())}
    whole = {part: parts[part].state_dict() for part in parts} | {"step": 3, "recipe": {}}
    save_atomic(whole, tmp_path / "last.pt")
    assert checkpoint.resume(tmp_path / "last.pt", {}, parts)["step"] == 3
    save_atomic(whole | {name: value}, tmp_path / "last.pt")
    with pytest.raises(UserError, match="choose another --out"):
        checkpoint.resume(tmp_path / "last.pt", {}, parts)


def test_a_folder_in_place_of_a_checkpoint_is_refused_before_training(tmp_path):
    (tmp_path / "last.pt").mkdir()
    with pytest.raises(UserError, match="last.pt: a folder, not a checkpoint"):
        checkpoint.resume(tmp_path / "last.pt", {}, {})


def test_a_checkpoint_of_one_byte_has_a_reason(tmp_path):
    (tmp_path / "last.pt").write_bytes(b"x")
    with pytest.raises(UserError, match="safely .it is cut short, or none."):
        checkpoint.load_checkpoint(tmp_path / "last.pt")


def test_a_result_of_other_films_is_not_written_over(tmp_path):
    about = checkpoint.sources(data=tmp_path / "x", labels=None, weights="a.pt")
    assert about == {
        "data": f"{tmp_path}/x",
        "labels": None,
        "weights": str(Path("a.pt").absolute()),
    }
    (tmp_path / "a,b").touch()  # one path where it is there, else two
    both = checkpoint.sources(one=tmp_path / "a,b", two=f"{tmp_path}/a,{tmp_path}/b/../c")
    assert both == {"one": f"{tmp_path}/a,b", "two": f"{tmp_path}/a,{tmp_path}/c"}
    checkpoint.refuse_other_result(tmp_path, about)  # there is none
    checkpoint.write_json(tmp_path / "result.json", {"weights": "a.pt"})
    checkpoint.refuse_other_result(tmp_path, about)  # an older one does not tell
    checkpoint.write_json(tmp_path / "result.json", about | {"mean": 80})
    checkpoint.refuse_other_result(tmp_path, about)
    (tmp_path / "link").symlink_to(tmp_path / "x")  # another way to the same films
    for way in ("link", "y/../x"):
        again = checkpoint.sources(data=tmp_path / way, labels=None, weights="a.pt")
        checkpoint.refuse_other_result(tmp_path, again)
    for name in about:
        with pytest.raises(UserError, match=f"{name} .* choose another --out$"):
            checkpoint.refuse_other_result(tmp_path, about | {name: "other"})


def test_a_result_says_with_what_it_was_made(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--data", "my films"])
    made = checkpoint.made_with()
    assert made["command"] == "finetune.py --data 'my films'"
    assert made["torch"] == torch.__version__ and made["time"][:2] == "20"
    root = Path(checkpoint.__file__).parents[1]
    ask = ["git", "rev-parse", "HEAD"]
    if (root / ".git").exists():
        assert subprocess.check_output(ask, cwd=root, text=True).strip() in made["commit"]
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(checkpoint, "__file__", "/nowhere/plumbing/checkpoint.py")
    assert checkpoint.made_with()["commit"] is None  # no .git there, and git is not asked


def test_of_weights_of_a_run_that_has_not_ended_the_step_is_said(tmp_path):
    recipe = {"epochs": 20, "films": 41, "batch": 8}  # 5 steps per epoch
    for step, lines in ((6, 1), (100, 0)):
        checkpoint.save_atomic({"step": step, "recipe": recipe}, tmp_path / "last.pt")
        for name in ("encoder.pt", "last.pt"):
            said = checkpoint.warn_of_unfinished(tmp_path / name)
            assert len(said) == lines
            assert all("pre-training that stopped at step 6 of 100: " in line for line in said)
    assert checkpoint.warn_of_unfinished(tmp_path / "authors.tar") == []
    (tmp_path / "last.pt").write_bytes(b"junk")
    assert checkpoint.warn_of_unfinished(tmp_path / "encoder.pt") == []


@pytest.mark.parametrize(
    "contents, files",
    [
        ("", {}),
        ("a pre-training", {"config.json": {"ema": 0.99}}),
        ("a pre-training", {"config.json": {"ema": 0.99}, "result.json": {"domain": {}}}),
        ("a fine-tuning", {"result.json": {"task": "csv"}}),
        ("a fine-tuning", {"seed0/best.pt": {}}),
        ("a decoder of lab.rcdm", {"config.json": {"mode": "local"}}),
        (
            "a decoder of lab.rcdm",
            {"config.json": {"mode": "local"}, "result.json": {"settings": {}}},
        ),
        ("an analysis of the lab", {"result.json": {"settings": {}}}),
        ("a Table 3 of lab.ablation", {"ablation.json": {}, "result.json": {"rows": {}}}),
        ("a comparison by lab.ablation", {"compare.json": {}}),
        ("a result of another program or version", {"result.json": {"films": 4}}),
    ],
)
def test_a_folder_is_known_by_what_is_in_it_and_kept_for_its_program(tmp_path, contents, files):
    for name, content in files.items():
        checkpoint.write_json(tmp_path / name, content)
    assert checkpoint.contents_of(tmp_path) == contents
    checkpoint.refuse_other_program(tmp_path, contents)
    if contents:
        with pytest.raises(UserError, match=f"{tmp_path} holds {contents}: choose another --out$"):
            checkpoint.refuse_other_program(tmp_path, "another")
