"""Command line, errors as one line, devices and precision, agreement of processes, schedules."""

import dataclasses
import errno
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from plumbing import launch
from plumbing.launch import UserError, cosine, flag, parse, warmup_cosine


# ---- Command line
@dataclasses.dataclass
class Config:
    data: str = flag(None, "a folder")
    lr: float = flag(2e-4, "learning rate, 100 % of it")
    max_steps: int = flag(None, "stop early")
    size: str = flag("tiny", "network", ["tiny", "base"])
    no_action: bool = flag(False, "ablation")
    derived: int = 7


def test_defaults_and_values():
    assert parse(Config, "", []) == Config() == Config(None, 2e-4, None, "tiny", False, 7)
    words = "--data /x --lr 1e-3 --max_steps=5 --size base --no_action"
    given = parse(Config, "", words.split())
    assert given == Config("/x", 1e-3, 5, "base", True, 7)
    assert (type(given.lr), type(given.max_steps)) == (float, int)


def test_a_leading_tilde_is_the_home_folder_in_every_flag(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("USERPROFILE", "/home/ada")
    for words, path in {
        "--data=~/x": "/home/ada/x",
        "--data ~/x": "/home/ada/x",
        "--data=~": "/home/ada",
        "--data=~/a.csv,~/b~.csv,c.csv": "/home/ada/a.csv,/home/ada/b~.csv,c.csv",
        "--data=x/~y": "x/~y",
        "--data=none": "none",
    }.items():
        assert parse(Config, "", words.split()).data == path


WRONG = {
    "--lrr 1": ["--lrr", "did you mean --lr?"],
    "--lrr=1": ["--lrr", "did you mean --lr?"],
    "--max-steps 3": ["did you mean --max_steps?"],
    "--no_actoin": ["did you mean --no_action?"],
    "--lr 1 --dta x --size base": ["did you mean --data?"],
    "--zzz": ["--zzz"],
    "stray": ["stray"],
    "--max 3": ["did you mean --max_steps?"],
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
    assert "\n" not in message and "train.py --help" in message, message
    assert all(word in message for word in words), message
    assert ("did you mean" in message) == any("did you mean" in word for word in words)


def test_a_rank_that_lost_another_says_so_in_one_line(tmp_path):
    """As when the first is refused while the second waits for it. It leaves no lock behind."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from plumbing import checkpoint\n"
        "from plumbing.launch import UserError, run_script, start_team\n"
        "def main():\n"
        "    team = start_team('cpu')\n"
        "    if team.lead:\n"
        "        checkpoint.lock(sys.argv[1])\n"
        "        raise UserError('refused')\n"
        "    team.wait()\n"
        "run_script(main)\n"
    )
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*words, script, tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode != 0 and "error: refused" in done.stderr
    assert not (tmp_path / "out").exists()
    assert "RuntimeError" not in done.stderr, done.stderr


SENSELESS = {
    "--lr nan": "0 or more",
    "--lr inf": "at most",
    "--lr -1": "0 or more",
    "--lr 0": "above 0",
    "--max_steps -1": "0 or more",
    "--max_steps 0": "above 0",
    "--max_steps 99999999999999999999": "at most",
    "--ema 2": "1 at most",
    "--ema nan": "0 or more",
    "--workers 1000000": "1024 at most",
    "--data=": "is empty",
}


@pytest.mark.parametrize("words, reason", SENSELESS.items())
def test_values_that_no_program_can_use(words, reason):
    fields = [("ema", float, flag(None, "momentum")), ("workers", int, flag(None, "helpers"))]
    Wider = dataclasses.make_dataclass("Wider", fields, bases=(Config,))
    with pytest.raises(UserError, match=re.escape(words.split("=")[0].split()[0])) as error:
        parse(Wider, "", words.split())
    assert reason in str(error.value) and "\n" not in str(error.value)


FULL = {
    "error: the machine's memory is full": MemoryError("no"),
    "error: the machine's": RuntimeError(
        "[enforce] DefaultCPUAllocator: can't allocate memory: you"
    ),
    "error: the GPU's memory is full": torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to"),
}


@pytest.mark.parametrize("words", FULL)
def test_full_memory_is_one_line(words, capfd):
    def main():
        raise FULL[words]

    with pytest.raises(SystemExit):
        launch.run_script(main)
    said = capfd.readouterr().err
    assert said.startswith(words) and said.count("\n") == 1


def test_help_shows_the_doc_every_flag_and_its_default(capsys):
    with pytest.raises(SystemExit) as end:
        parse(Config, "Train a thing.\n\n    python train.py   # 50 % faster", ["--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0
    doc = "    python train.py   # 50 % faster"
    for words in (doc, "--max_steps INT", "[0.0002]", "100 % of it"):
        assert words in said
    assert "derived" not in said and "[None]" not in said and "[False]" not in said


@pytest.mark.slow
def test_flags_of_every_training_come_after_a_scripts_own(capsys):
    @dataclasses.dataclass
    class Training(launch.TrainFlags):
        films: int = flag(3, "films per step")

    with pytest.raises(SystemExit):
        parse(Training, "Train.", ["--help"])
    said = capsys.readouterr().out
    assert said.index("--films INT") < said.index("--max_steps INT")
    args = parse(Training, "Train.", ["--clip", "2"])
    assert (args.films, args.clip, args.micro) == (3, 2.0, None)


@pytest.mark.slow
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
        [sys.executable, "-c", body], capture_output=True, text=True, env=variables
    )
    first, second, *_, last = done.stderr.strip().splitlines()
    assert first.startswith("error: ") and "junk.pt" in first
    assert second.startswith("Traceback") and last.startswith("IndexError") and done.returncode == 1


def test_main_in_process(capsys):
    def stop():
        raise UserError("--data x: no such folder")

    def interrupt():
        raise KeyboardInterrupt

    def terminate():
        signal.raise_signal(signal.SIGTERM)
        time.sleep(60)

    for function, code in ((stop, 1), (interrupt, 130), (terminate, 143)):
        with pytest.raises(SystemExit) as end:
            launch.run_script(function)
        assert end.value.code == code
    said = capsys.readouterr().err.splitlines()
    kept = "ended; what was saved is kept"
    assert said == ["error: --data x: no such folder", f"SIGINT: {kept}", f"SIGTERM: {kept}"]
    assert launch.run_script(lambda: None) is None
    with pytest.raises(ZeroDivisionError):
        launch.run_script(lambda: 1 / 0)


def test_what_a_helper_process_met_is_one_line_and_its_bugs_are_not(capfd):
    class Films(torch.utils.data.Dataset):
        def __init__(self, error):
            self.error = error

        def __len__(self):
            return 4

        def __getitem__(self, i):
            raise self.error

    def read(error):
        list(launch.Loader(Films(error), num_workers=1))

    with pytest.raises(SystemExit):
        launch.run_script(lambda: read(UserError("4 films: cannot be read")))
    assert capfd.readouterr().err == "error: 4 films: cannot be read\n"
    with pytest.raises(ZeroDivisionError, match="Original Traceback"):
        launch.run_script(lambda: read(ZeroDivisionError("ours")))


def test_a_killed_helper_process_is_one_line(capfd):
    class Films(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(SystemExit):
        launch.run_script(lambda: list(launch.Loader(Films(), num_workers=1)))
    said = capfd.readouterr().err
    assert said.startswith("error: a helper process was killed") and said.count("\n") == 1
    assert "--workers 0" in said
    with pytest.raises(SystemExit), launch.helper_pool(2) as pool:
        launch.run_script(lambda: list(pool.map(signal.raise_signal, [signal.SIGKILL])))


@pytest.mark.parametrize(
    "message",
    [
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
        "dataloader's workers are out of shared memory. Please try to raise your limit.",
        "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback:\nRuntimeError: "
        "unable to write to file </torch_12_34_0>: No space left on device (28)",
        "unable to allocate shared memory(shm) for file </torch_1>: Resource unavailable",
    ],
)
def test_full_shared_memory_names_the_flags_that_help(message, capfd):
    def fail():
        raise RuntimeError(message)

    with pytest.raises(SystemExit):
        launch.run_script(fail)
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    for word in ("/dev/shm", "--workers 0", "--shm-size", "--ipc=host"):
        assert word in said


def test_a_full_disk_in_any_place_is_one_line(capfd):
    def fill():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere/file")

    with pytest.raises(SystemExit):
        launch.run_script(fill)
    assert capfd.readouterr().err.startswith("error: somewhere/file cannot be written: No space")
    with pytest.raises(FileNotFoundError):
        launch.run_script(lambda: open("/nowhere/at/all"))


SPEAK = """import sys
from plumbing.launch import run_script
def main():
    for stream in (sys.stdout, sys.stderr, sys.stdout):
        print("word", file=stream, flush=True)
    open("done", "w").close()
run_script(main)
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("stream", ["stdout", "stderr", "pipe"])
def test_a_console_that_cannot_be_written_ends_no_script(tmp_path, stream):
    read, write = os.pipe()
    os.close(read)
    with open("/dev/full", "w") as full, os.fdopen(write, "w") as closed:
        streams = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        streams |= {"stdout": closed} if stream == "pipe" else {stream: full}
        done = subprocess.run([sys.executable, "-c", SPEAK], cwd=tmp_path, text=True, **streams)
    assert (tmp_path / "done").exists()
    if stream == "stderr":
        assert done.returncode == 0
    else:
        assert done.returncode == 1
        first, last = done.stderr.splitlines()
        assert first == "word" and last.startswith("error: not all could be printed: ")


# ---- Processes and precision
@pytest.mark.parametrize(
    "device",
    ["gpu", "cpuu", "", "cuda:x", "meta"]
    + ([] if torch.cuda.is_available() else ["cuda", "cuda:1"]),
)
def test_a_device_that_is_not_there(device):
    with pytest.raises(UserError, match="--device") as error:
        launch.start_team(device)
    assert "\n" not in str(error.value)


def test_a_gpu_that_is_not_there_comes_with_advice(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # the driver is too old for PyTorch
    assert launch.find_device("auto").type == "cpu"
    with pytest.raises(UserError, match="sees 0 .*: install a CUDA build of torch .* --device cpu"):
        launch.find_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="sees 1 .*: process 1 asks for cuda:1: start fewer"):
        launch.find_device("cuda", local_rank=1)


def test_apples_gpu_is_taken_when_asked_for_and_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="^--device mps: .* sees 0 NVIDIA or AMD .* 0 of Apple"):
        launch.start_team("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert launch.start_team("mps").device == torch.device("mps")
    assert launch.start_team("auto").device == torch.device("cpu")  # nobody has tested it
    assert launch.choose_precision("auto", torch.device("mps")) == "float32"


def test_a_team_of_one(monkeypatch, capsys):
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(key, raising=False)
    team = launch.start_team("cpu")
    assert (team.rank, team.size, team.device, team.lead) == (0, 1, torch.device("cpu"), True)
    team.say("one", 2)
    launch.Team(1, 2, team.device).say("silent")
    assert capsys.readouterr().out == "one 2\n"
    assert team.any(3) is True and team.any(0) is False
    assert torch.equal(team.mean(torch.tensor([2.0])), torch.tensor([2.0]))
    assert team.gather_objects("rows") == ["rows"]
    team.leave()


def test_precision():
    cpu = torch.device("cpu")
    for name in ("float32", "bfloat16"):
        assert launch.choose_precision(name, cpu) == name
    if Path("/proc/cpuinfo").is_file():
        is_native = "avx512_bf16" in Path("/proc/cpuinfo").read_text()
        chosen = launch.choose_precision("auto", cpu)
        assert chosen == ("bfloat16" if is_native else "float32")
    x = torch.ones(4, 4)
    with launch.autocast(cpu, "bfloat16"):
        assert (x @ x).dtype == torch.bfloat16
    with launch.autocast(cpu, "float32"):
        assert (x @ x).dtype == torch.float32


@pytest.mark.parametrize(
    "capability, chosen",
    [((6, 1), "float32"), ((7, 0), "float32"), ((7, 5), "float32")]
    + [((8, 0), "bfloat16"), ((8, 9), "bfloat16"), ((12, 0), "bfloat16")],
)
def test_gpus_that_only_emulate_bfloat16_get_float32(monkeypatch, capability, chosen):
    """V100 is 7.0, T4 and RTX 20 are 7.5; PyTorch says of them all that bfloat16 is supported."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    about = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device=None: about)
    assert launch.choose_precision("auto", torch.device("cuda:0")) == chosen
    assert launch.choose_precision("bfloat16", torch.device("cuda:0")) == "bfloat16"


# ---- The training step
def test_the_gradient_is_clipped_then_used_then_cleared():
    layer = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(layer.weight)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer(torch.tensor([[3.0, 4.0]])).sum().backward()
    norm = launch.clip_and_step(layer, optimizer, clip=1.0)
    assert norm.item() == pytest.approx(5)
    assert layer.weight.tolist()[0] == pytest.approx([-0.6, -0.8], rel=1e-4)
    assert layer.weight.grad is None


@pytest.mark.slow
def test_one_process_without_compile_is_the_model_itself():
    team = launch.Team(0, 1, torch.device("cpu"))
    layer = torch.nn.Linear(2, 2)
    for compile in ("auto", "off"):
        assert launch.prepare_forward(layer, compile, team) is layer
    compiled = launch.prepare_forward(layer, "on", team)
    assert compiled is not layer and next(compiled.parameters()) is layer.weight
    with launch.averaging_gradients(layer, only_if=False):
        pass


def test_only_a_long_run_on_a_gpu_is_compiled_unasked():
    layer = torch.nn.Linear(2, 2)
    gpu = launch.Team(0, 1, torch.device("cuda"))  # nothing is computed there
    assert launch.prepare_forward(layer, "auto", gpu, 2_999) is layer
    assert launch.prepare_forward(layer, "auto", gpu, 3_000) is not layer
    assert launch.prepare_forward(layer, "on", gpu, 10) is not layer


@dataclasses.dataclass
class Batch:
    batch: int
    micro: int | None = None
    precision: str = "float32"


@pytest.mark.parametrize(
    "batch, micro, world, kind, films",
    [
        (96, None, 1, "cpu", 48),  # the largest divisor up to 64
        (2048, None, 8, "cuda", 128),
        (2048, None, 1, "cuda", 128),
        (16, None, 1, "cpu", 16),
        (8, 3, 2, "cpu", 2),
        (7, 4, 1, "cpu", 1),
    ],
)
def test_micro_batches_divide_the_share(batch, micro, world, kind, films):
    team = launch.Team(0, world, torch.device(kind))
    assert launch.fit_to_machine(Batch(batch, micro), team) == Batch(batch, films)


def test_a_batch_that_the_processes_cannot_share():
    with pytest.raises(UserError, match="--batch 9 is not a multiple of the 2 processes"):
        launch.fit_to_machine(Batch(9), launch.Team(0, 2, torch.device("cpu")))


# ---- Schedules
def test_learning_rate_against_a_table():
    """Peak 8, floor 0, 4 warm-up steps of 12: 2 4 6 8, then half a cosine over 8 steps."""
    table = [2, 4, 6, 8] + [4 * (1 + math.cos(math.pi * k / 8)) for k in range(8)] + [0, 0]
    rates = [warmup_cosine(step, 12, 4, 8.0, 0.0) for step in range(14)]
    assert rates == pytest.approx(table, abs=1e-12)
    assert warmup_cosine(8, 12, 4, 8.0, 0.0) == pytest.approx(4)
    assert warmup_cosine(8, 12, 4, 8.0, 2.0) == pytest.approx(5)
    assert warmup_cosine(0, 10, 0, 1.0, 0.0) == 1.0 and warmup_cosine(0, 1, 1, 1.0, 0.0) == 1.0
    assert warmup_cosine(5, 3, 3, 1.0, 0.1) == pytest.approx(0.1)


def test_momentum_against_a_table():
    """0.996 → 1 (Sec. B.1): after a quarter 0.996 + 0.004 (1 - cos 45°) / 2, half way 0.998."""
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


# ---- Two processes
def two_processes(script, folder):
    """Run a script as two gloo ranks with torchrun's variables. → processes, what they said"""
    (folder / "two.py").write_text(script)
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    variables |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        variables["MASTER_PORT"] = str(free.getsockname()[1])
    team = [
        subprocess.Popen(
            [sys.executable, "-W", "always", folder / "two.py", folder],
            env=variables | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    return team, [process.communicate() for process in team]


TWO = """import sys, torch
from plumbing import launch
from plumbing.checkpoint import write_text
def main():
    team = launch.start_team("cpu")
    rank = team.rank
    mean = team.mean(torch.tensor([1.0 + 2 * rank])).item()
    told = team.any(rank == 1), team.any(False)
    rows = team.gather_objects([rank])
    layer = torch.nn.Linear(1, 1, bias=False)
    forward = launch.prepare_forward(layer, "off", team)
    gradients = []
    for is_last in (False, True):
        with launch.averaging_gradients(forward, only_if=is_last):
            forward(torch.tensor([[1.0 + 2 * rank]])).sum().backward()
        gradients.append(layer.weight.grad.item())
    team.say("only once")
    seen = f"{team.size} {mean} {told} {rows} {gradients}"
    write_text(f"{sys.argv[1]}/{rank}.txt", seen)
    team.wait()
    if rank == 1:
        raise launch.UserError("rank 1 stops")
launch.run_script(main)
"""


@pytest.mark.slow
def test_two_processes_agree_and_average(tmp_path):
    """An error ends its own rank in one line, and no library warns of what we ask of it."""
    team, [(said, wrong), (silent, stop)] = two_processes(TWO, tmp_path)
    assert [process.returncode for process in team] == [0, 1], wrong + stop
    assert said == "only once\n" and silent == ""
    assert "error: rank 1 stops" in stop.splitlines() and "Traceback" not in stop
    assert "FutureWarning" not in wrong + stop, wrong + stop
    told = "2 2.0 (True, False) [[0], [1]]"
    # The first micro-batch stays on its rank: 1 and 3. The second ends in the mean of the sums.
    assert (tmp_path / "0.txt").read_text() == f"{told} [1.0, 4.0]"
    assert (tmp_path / "1.txt").read_text() == f"{told} [3.0, 4.0]"


PATIENT = """import datetime, time, torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout
from plumbing import launch
def main():
    limits = []
    new_group = dist.new_group
    def noted(*args, timeout=None, **kwargs):
        limits.append(timeout)
        return new_group(*args, timeout=timeout, **kwargs)
    dist.new_group = noted
    team = launch.start_team("cpu")
    assert limits[0] >= datetime.timedelta(days=1)  # gloo's own limit is half an hour
    team.mean(torch.ones(1))
    wrap = lambda: launch.prepare_forward(torch.nn.Linear(1, 1), "off", team)
    wrap()  # what it imports takes a busy machine longer than the limit that follows
    _set_pg_timeout(datetime.timedelta(seconds=5))  # as nccl's ten minutes, but short
    for wait in (lambda: team.gather_objects(["rows"]), wrap, team.leave):
        if team.lead:
            time.sleep(7)  # it lists films, writes files, makes the closing table ...
        wait()
    print("left")
launch.run_script(main)
"""


@pytest.mark.slow
def test_ranks_wait_longer_for_one_that_works_alone_than_their_collectives_may_take(tmp_path):
    team, said = two_processes(PATIENT, tmp_path)
    assert [process.returncode for process in team] == [0, 0], said
    assert [out for out, _ in said] == ["left\n", "left\n"]
