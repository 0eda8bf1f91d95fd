"""Command line, errors as one line, schedules against a table, the log after a crash, atomic files, SIGTERM, torch_generator randomness."""

import dataclasses
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from plumbing import checkpoint, launch
from plumbing.checkpoint import Log, StopRequest, read_log, save_atomic, write_json, write_text
from plumbing.keys import torch_generator
from plumbing.launch import UserError, cosine, flag, parse, warmup_cosine


# ------------------------------------------------------------------------------------------------ command line
@dataclasses.dataclass
class Config:
    data: str = flag(None, "a folder")
    lr: float = flag(2e-4, "learning rate, 100 % of it")
    max_steps: int = flag(None, "stop early")
    size: str = flag("tiny", "network", ["tiny", "base"])
    optional: int | None = flag(None, "either")
    no_action: bool = flag(False, "ablation")
    derived: int = 7


def test_defaults_and_values():
    assert parse(Config, "", []) == Config() == Config(None, 2e-4, None, "tiny", None, False, 7)
    given = parse(
        Config, "", "--data /x --lr 1e-3 --max_steps=5 --size base --optional 3 --no_action".split()
    )
    assert given == Config("/x", 1e-3, 5, "base", 3, True, 7)
    assert (
        isinstance(given.lr, float)
        and isinstance(given.max_steps, int)
        and isinstance(given.optional, int)
    )


WRONG = {
    "--lrr 1": ["--lrr", "did you mean --lr?"],
    "--lrr=1": ["--lrr", "did you mean --lr?"],
    "--max-steps 3": ["did you mean --max_steps?"],
    "--no_actoin": ["did you mean --no_action?"],
    "--lr 1 --dta x --size base": ["did you mean --data?"],
    "--zzz": ["--zzz"],
    "stray": ["stray"],
    "--max 3": ["--max"],
    "--max_steps three": ["--max_steps", "three"],
    "--lr": ["--lr", "expected one argument"],
    "--size huge": ["--size", "huge", "tiny", "base"],
    "--no_action=1": ["--no_action"],
    "--derived 3": ["--derived"],
}


@pytest.mark.parametrize("argv, words", WRONG.items())
def test_a_wrong_flag_is_one_line(argv, words):
    with pytest.raises(UserError) as error:
        parse(Config, "", argv.split(), prog="train.py")
    message = str(error.value)
    assert (
        "\n" not in message and "train.py --help" in message and all(w in message for w in words)
    ), message


def test_a_negative_seed_is_refused_as_every_script_keys_its_numbers_by_it():
    Seeded = dataclasses.make_dataclass("Seeded", [("seed", int, flag(None, "of everything"))])
    assert [parse(Seeded, "", a.split()).seed for a in ("", "--seed 0", "--seed 3")] == [None, 0, 3]
    with pytest.raises(UserError, match="--seed -1: must be 0 or more"):
        parse(Seeded, "", ["--seed", "-1"])
    with pytest.raises(ValueError):
        torch_generator(4, -1)


def test_nothing_is_suggested_for_a_stranger():
    with pytest.raises(UserError) as error:
        parse(Config, "", ["--quux", "1"])
    assert "did you mean" not in str(error.value)


def test_help_shows_the_doc_every_flag_and_its_default(capsys):
    with pytest.raises(SystemExit) as end:
        parse(Config, "Train a thing.\n\n    python train.py   # 50 % faster", ["--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0
    assert all(
        w in said
        for w in (
            "    python train.py   # 50 % faster",
            "--max_steps INT",
            "[0.0002]",
            "100 % of it",
        )
    )
    assert "derived" not in said and "[None]" not in said and "[False]" not in said


def test_main_turns_a_users_error_into_one_line_and_leaves_bugs_alone(tmp_path):
    (tmp_path / "junk.pt").write_bytes(b"junk")
    body = f"""from plumbing import launch, weights
try:
    launch.run_script(lambda: weights.load_world({str(tmp_path / "junk.pt")!r}))
except SystemExit as end:
    assert end.code == 1
launch.run_script(lambda: [][3])"""
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", body], capture_output=True, text=True, timeout=300, env=variables
    )
    first, second, *_, last = done.stderr.strip().splitlines()
    assert first.startswith("error: ") and "junk.pt" in first
    assert second.startswith("Traceback") and last.startswith("IndexError") and done.returncode == 1


def test_main_in_process(capsys):
    def stop():
        raise UserError("--data x: no such folder")

    def interrupt():
        raise KeyboardInterrupt

    for function, code in ((stop, 1), (interrupt, 130)):
        with pytest.raises(SystemExit) as end:
            launch.run_script(function)
        assert end.value.code == code
    assert capsys.readouterr().err == "error: --data x: no such folder\n"
    assert launch.run_script(lambda: None) is None
    with pytest.raises(ZeroDivisionError):
        launch.run_script(lambda: 1 / 0)


# ------------------------------------------------------------------------------------------------ processes and precision
@pytest.mark.parametrize(
    "device",
    ["gpu", "cpuu", "", "cuda:x"] + ([] if torch.cuda.is_available() else ["cuda", "cuda:1"]),
)
def test_a_device_that_is_not_there(device):
    with pytest.raises(UserError, match="--device") as error:
        launch.start_team(device)
    assert "\n" not in str(error.value)


def test_a_team_of_one(monkeypatch, capsys):
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(key, raising=False)
    team = launch.start_team("cpu")
    assert (team.rank, team.world, team.device, team.lead) == (0, 1, torch.device("cpu"), True)
    team.say("one", 2)
    launch.Team(1, 2, team.device).say("silent")
    assert capsys.readouterr().out == "one 2\n"
    assert team.any(3) is True and team.any(0) is False
    assert torch.equal(team.mean(torch.tensor([2.0])), torch.tensor([2.0]))
    team.leave()


def test_precision():
    cpu = torch.device("cpu")
    assert [launch.choose_precision(name, cpu) for name in ("float32", "bfloat16")] == [
        "float32",
        "bfloat16",
    ]
    if Path("/proc/cpuinfo").is_file():
        assert launch.choose_precision("auto", cpu) == (
            "bfloat16" if "avx512_bf16" in Path("/proc/cpuinfo").read_text() else "float32"
        )
    x = torch.ones(4, 4)
    with launch.autocast(cpu, "bfloat16"):
        assert (x @ x).dtype == torch.bfloat16
    with launch.autocast(cpu, "float32"):
        assert (x @ x).dtype == torch.float32


def test_keyed_depends_on_the_whole_key_and_nothing_else():
    draw = lambda *key: torch.rand(4, generator=torch_generator(*key)).tolist()
    torch.manual_seed(1)
    first = draw(4, 0, 17)
    torch.manual_seed(2)
    assert draw(4, 0, 17) == first
    keys = [(a, b, c) for a in range(4) for b in range(4) for c in range(4)]
    assert len({tuple(draw(*k)) for k in keys}) == len(keys)


# ------------------------------------------------------------------------------------------------ schedules
def test_learning_rate_against_a_table():
    """Peak 8, floor 0, 4 warm-up steps of 12: 2 4 6 8, then half a cosine over 8 steps."""
    table = [2, 4, 6, 8] + [4 * (1 + math.cos(math.pi * k / 8)) for k in range(8)] + [0, 0]
    assert [warmup_cosine(s, 12, 4, 8.0, 0.0) for s in range(14)] == pytest.approx(table, abs=1e-12)
    assert warmup_cosine(8, 12, 4, 8.0, 0.0) == pytest.approx(4) and warmup_cosine(
        8, 12, 4, 8.0, 2.0
    ) == pytest.approx(5)
    assert warmup_cosine(0, 10, 0, 1.0, 0.0) == 1.0 and warmup_cosine(0, 1, 1, 1.0, 0.0) == 1.0
    assert warmup_cosine(5, 3, 3, 1.0, 0.1) == pytest.approx(0.1)


def test_momentum_against_a_table():
    """0.996 → 1 (Sec. B.1): a quarter of the way 0.996 + 0.004 (1 - cos 45°) / 2, half way 0.998."""
    table = {
        0: 0.996,
        25: 0.996 + 0.002 * (1 - math.sqrt(0.5)),
        50: 0.998,
        75: 0.998 + 0.002 * math.sqrt(0.5),
        100: 1.0,
        130: 1.0,
    }
    assert {s: cosine(s, 100, 0.996, 1.0) for s in table} == pytest.approx(table, abs=1e-12)
    values = [cosine(s, 100, 0.996, 1.0) for s in range(101)]
    assert values == sorted(values) and cosine(0, 0, 0.9, 1.0) == pytest.approx(0.9)


# ------------------------------------------------------------------------------------------------ files
def test_log_rows_and_reading(tmp_path):
    log = Log(tmp_path / "run" / "log.csv", ["step", "loss", "note"])
    log.row(step=1, loss=1 / 3, note="", unused=5)
    log.row(step=2, loss=1e-9, note="x")
    assert (
        tmp_path / "run" / "log.csv"
    ).read_text() == "step,loss,note\n1,0.333333,\n2,1e-09,x\n"  # each row is on disk at once
    rows = [
        {"step": "1", "loss": "0.333333", "note": ""},
        {"step": "2", "loss": "1e-09", "note": "x"},
    ]
    assert read_log(tmp_path / "run" / "log.csv") == rows
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
    assert (
        path.read_text()
        == "step,loss,new\n1,0.125,\n2,0.25,\n3,0.375,\n4,0.5,\n5,0.625,\n6,0.5,1\n"
    )
    Log(path, ["step", "loss"])
    assert path.read_text() == "step,loss\n"  # from the start: nothing stays


@pytest.mark.parametrize("torn", ["9", "9,", "9,0.123,4", "9,0.123,", ",,", "\x00\x00\x00"])
def test_a_torn_last_row_is_left_out(tmp_path, torn):
    """Every way in which a crash can cut the row "9,0.123,45\\n", its last number included."""
    path = tmp_path / "log.csv"
    path.write_text("step,loss,wait\n7,0.5,1\n8,0.25,2\n" + torn)
    assert [r["step"] for r in read_log(path)] == ["7", "8"]
    Log(path, ["step", "loss", "wait"], step=9).row(step=9, loss=1.0, wait=3)
    assert path.read_text() == "step,loss,wait\n7,0.5,1\n8,0.25,2\n9,1,3\n"


def test_save_atomic_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "deep" / "last.pt"
    save_atomic({"step": 1, "x": torch.arange(3)}, path)
    assert torch.equal(torch.load(path, weights_only=True)["x"], torch.arange(3))
    with pytest.raises(Exception):
        save_atomic({"step": 2, "x": lambda: 0}, path)  # cannot be pickled
    assert torch.load(path, weights_only=True)["step"] == 1 and os.listdir(path.parent) == [
        "last.pt"
    ]


def test_readers_never_see_half_a_file(tmp_path):
    path, seen = tmp_path / "a.txt", []
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
    if Path("/dev/full").exists():
        with pytest.raises(UserError, match="cannot be written: No space left"):
            checkpoint.replace_with(
                tmp_path / "x", lambda _: open("/dev/full", "w").write("x" * 100000)
            )


def test_sigterm_only_sets_a_flag():
    before = signal.getsignal(signal.SIGTERM)
    try:
        asked = StopRequest()
        assert not asked.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.requested
    finally:
        signal.signal(signal.SIGTERM, before)


def test_mean_over_ranks_and_agreement_of_two_processes(tmp_path):
    """Two gloo ranks with torchrun's variables: reduce_mean averages, any_rank is true on both when one asks, an error ends its rank."""
    (tmp_path / "two.py").write_text("""import sys, torch
from plumbing import launch
from plumbing.checkpoint import write_text
def main():
    team = launch.start_team("cpu")
    mean = team.mean(torch.tensor([1.0 + 2 * team.rank])).item()
    asked = team.any(team.rank == 1), team.any(False)
    team.say("only once")
    write_text(f"{sys.argv[1]}/{team.rank}.txt", f"{team.world} {mean} {asked}")
    team.wait()
    if team.rank == 1:
        raise launch.UserError("rank 1 stops")
launch.run_script(main)
""")
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(29000 + os.getpid() % 400),
    }
    command = [sys.executable, tmp_path / "two.py", tmp_path]
    start = lambda rank: subprocess.Popen(
        command,
        env=variables | {"RANK": rank, "LOCAL_RANK": rank},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    team = [start("0"), start("1")]
    (said, wrong), (silent, stop) = (process.communicate(timeout=300) for process in team)
    assert [process.returncode for process in team] == [0, 1], wrong + stop
    assert (
        said == "only once\n"
        and silent == ""
        and "error: rank 1 stops" in stop.splitlines()
        and "Traceback" not in stop
    )
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in "01"] == ["2 2.0 (True, False)"] * 2
