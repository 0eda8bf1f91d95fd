"""What every script needs: errors, signals, flags, processes, precision, the step, schedules.

Nothing here knows what is being trained, and nothing here imports another of our files.
"""

import argparse
import atexit
import contextlib
import dataclasses
import datetime
import difflib
import errno
import inspect
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


# ---- Errors, signals and how a script ends
class UserError(Exception):
    """An error that the user can mend: one line that says what, where and what to do."""


# A cluster's order to end and Slurm's early warning (--signal=USR1@120), Ctrl-C, a closed terminal.
ENDING = ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP")
ENDING = [getattr(signal, name) for name in ENDING if hasattr(signal, name)]  # Windows has two
at_end = contextlib.ExitStack()  # what is left to do when a script ends, however it ends
FULL = {errno.ENOSPC, errno.EFBIG} | {getattr(errno, "EDQUOT", errno.ENOSPC)}  # a disk, a quota


class Console:
    """stdout or stderr of a script that goes on when nobody can read it: a closed pipe, a full
    disk. error: what the system then said first. A letter that it lacks becomes a question mark:
    Windows' cp1252 has no →, ≥ or θ.
    """

    def __init__(self, stream):
        if hasattr(stream, "reconfigure"):  # not where a program or a test has put its own
            stream.reconfigure(errors="replace")
        self.stream = stream
        self.error = None

    def write(self, text):
        """Write, or drop what cannot be written."""
        return self.attempt(self.stream.write, text)

    def flush(self):
        """Flush, or forget it."""
        self.attempt(self.stream.flush)

    def attempt(self, do, *words):
        """Call do(*words); note the error where it fails."""
        try:
            return do(*words)
        except OSError as error:
            self.error = self.error or error

    def __getattr__(self, name):
        return getattr(self.stream, name)


def run_script(main):
    """Run a script's `main`; what the user can understand becomes one line and an exit code.

    1 after an error; 128 + its number after a signal, 130 for Ctrl-C and 143 for SIGTERM.
    """
    consoles = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(Console, consoles)
    catch_signals()
    try:
        code = exit_code_of(main)
    finally:
        end_children()
        at_end.close()
        sys.stdout.flush()
        lost = sys.stdout.error
        if not lost and not sys.stderr.error:  # else Python would stumble over what is left
            sys.stdout, sys.stderr = consoles
    if lost and not code:
        print(f"error: not all could be printed: {lost.strerror}", file=sys.stderr, flush=True)
        code = 1
    if code and dist.is_initialized():
        os._exit(code)  # at once: the other processes wait for this one in a collective
    if code:
        sys.exit(code)


def exit_code_of(main) -> int:
    """Call `main` and say in one line why it ended before its time. → exit code"""
    try:
        main()
    except (UserError, RuntimeError, OSError, MemoryError) as error:
        line = in_one_line(error)
        if not line:
            raise
        print(f"error: {line}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt as end:
        number = signal.Signals(*end.args or [signal.SIGINT])
        print(f"{number.name}: ended; what was saved is kept", file=sys.stderr, flush=True)
        return 128 + number  # as the shell counts
    return 0


# What gloo and nccl say when the process at the other end is gone.
LOST_RANK = ("Connection closed by peer", "Connection reset by peer", "remote process exited")


def in_one_line(error: Exception) -> str:
    """Say in one line what the user can mend; "" for what is a mistake of ours."""
    text = str(error)
    if isinstance(error, UserError) and text.startswith("Caught "):  # PyTorch's wrapper around it
        text = text.strip().splitlines()[-1].partition(": ")[2]
    if isinstance(error, UserError):
        return text
    if isinstance(error, OSError) and error.errno in FULL:
        return f"{error.filename or 'a file'} cannot be written: {error.strerror}: make room there"
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return (
            "the GPU's memory is full: lower --micro, add pretrain.py's --checkpointing, or use "
            "--device cpu"
        )
    if isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate" in text:
        return "the machine's memory is full: fewer films, a smaller --batch or --micro take less"
    if any(words in text for words in LOST_RANK):
        return (
            "another process of this run has ended, as its own lines say, or was killed: "
            "the same command resumes from what was saved"
        )
    shared_memory = ("killed by signal: Bus error", "shared memory", "write to file </torch")
    if any(words in text for words in shared_memory):
        return (
            "the loader processes' shared memory (/dev/shm) is full: start again with --workers 0 "
            "or fewer, or give more (docker run --shm-size=8g, or --ipc=host)"
        )
    if isinstance(error, BrokenExecutor) or text.startswith("DataLoader worker (pid"):
        return (
            "a helper process was killed, most likely because the machine's memory is full: "
            "the same command resumes from what was saved; --workers 0 or fewer take less memory"
        )
    return ""


def catch_signals():
    """Let SIGTERM and its like end the script as Ctrl-C does, so that nothing is left behind.

    Ranks other than the first have nothing to clear and may wait in a collective: they end at once.
    """
    if int(os.environ.get("RANK", 0)) > 0:
        return
    for number in ENDING:
        if signal.getsignal(number) == signal.SIG_DFL:  # not what nohup has made it ignore
            signal.signal(number, stop_here)


def stop_here(number, _frame):
    """Handle a signal where nothing is to be saved."""
    raise KeyboardInterrupt(number)


def begin_worker(_worker_id=None):
    """Begin a helper process, of a Loader or of a pool: it outlives signals, but not its parent.

    A signal to the whole group reaches it, too, but only the parent knows when to end. PyTorch's
    own watch does not see a dead parent while a film waits in a pipe that nobody reads any more.
    """
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def signals_held():
    """Hold signals back for a moment: processes begun in it are never without begin_worker."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    from multiprocessing import resource_tracker  # Windows has none

    resource_tracker.ensure_running()  # its start would let signals through
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def helper_pool(workers: int) -> ProcessPoolExecutor:
    """Make a pool of helper processes, which say so when one of them is killed.

    They are spawned, which is safe where torch's threads already run.
    """
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(min(workers, 61), context, begin_worker)  # Windows: 61 at most


def end_children():
    """Kill the helper processes that are left. They only read; asked to end, they would not."""
    children = multiprocessing.active_children()
    if children and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler calls it an error
    for child in children:
        child.kill()


atexit.register(at_end.close)
atexit.register(end_children)  # after PyTorch's own end and before Python waits for them


class Loader(torch.utils.data.DataLoader):
    """PyTorch's DataLoader with processes that a signal to the whole group does not kill."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, worker_init_fn=begin_worker, **kwargs)

    def __iter__(self):
        with signals_held():
            return super().__iter__()


# ---- Command line
def flag(default, help: str, choices: list | None = None):
    """Declare a dataclass field that is also a command-line flag; None: the script decides."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclasses.dataclass
class TrainFlags:
    """The flags that pretrain.py and finetune.py share. --help shows them after a script's own."""

    max_steps: int = flag(None, "stop early after this many steps, without changing any schedule")
    micro: int = flag(
        None,
        "films per forward pass of one GPU, at most; gradients are accumulated until --batch is "
        "reached, so only memory and speed depend on it [128; to pre-train on a CPU 64]",
    )
    min_lr: float = flag(1e-6, "learning rate at the end of its cosine")
    clip: float = flag(1.0, "largest gradient norm; a longer gradient is shortened to it")
    precision: str = flag(
        "auto",
        "of the forward pass; auto = bfloat16 on GPUs and CPUs that multiply it natively, "
        "else float32",
        ["auto", "float32", "bfloat16"],
    )
    compile: str = flag(
        "auto", "torch.compile; auto = on a GPU, for 3,000 steps or more", ["auto", "on", "off"]
    )
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, or mps (Apple's GPUs, untested)")
    workers: int = flag(
        None,
        "loader processes [8 per GPU; on a CPU 0, in pretrain.py 1 unless films fit in memory]",
    )


class Parser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors that suggest the flag which was meant."""

    def error(self, message):
        suggestion = ""
        if "unrecognized" in message:
            known = [name for action in self._actions for name in action.option_strings]
            unknown = [word.split("=")[0] for word in message.split() if word.startswith("-")]
            near = difflib.get_close_matches(unknown[0], known, 1) if unknown else []
            suggestion = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"{message}{suggestion}; {self.prog} --help lists all flags")


def parse(Config, doc: str, argv: list[str] | None = None, prog: str | None = None):
    """Read the command line into an instance of the dataclass `Config`.

    Every field made by `flag` is a flag of its name. A bool is a switch; any other field takes one
    value of its type. Fields without `flag` are the script's own.
    """
    parser = Parser(
        prog=prog or Path(sys.argv[0]).name,
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    shared = {field.name for field in dataclasses.fields(TrainFlags)}
    own_first = sorted(dataclasses.fields(Config), key=lambda field: field.name in shared)
    for field in own_first:
        if "help" in field.metadata:
            add_flag(parser, field)
    values = vars(parser.parse_args(argv))
    args = Config(**{name: expand_home(value) for name, value in values.items()})
    for field in own_first:
        if getattr(args, field.name) != field.default:
            refuse_senseless(field.name, getattr(args, field.name))
    return args


def table_of_recipes(recipes: dict, usual: dict) -> str:
    """Lay out recipes, {name: {setting: value}}, as a table for --help. → text

    usual: the values of settings that no recipe need name; "paper" names all others.
    """
    settings = list(recipes["paper"] | usual)
    rows = [["[recipe]", *settings]]
    for name, recipe in recipes.items():
        values = usual | recipe
        rows.append([name, *(f"{values.get(setting, '–')}" for setting in settings)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = (map(str.ljust, row, widths) for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in padded) + "\n"


# Numbers that must lie above 0, and the most that one may be; all others are 0 or more.
POSITIVE = set("lr clip layer_decay image patch batch micro epochs patience seeds shots".split())
POSITIVE |= set("steps max_steps log_every save_every draws samples ddim channels".split())
POSITIVE |= {"phantoms", "count", "global_share"}
MOST = dict(ema=1, global_share=1, pixels=1, layer_decay=1, drop_path=1, workers=1024)


def refuse_senseless(name: str, value):
    """Raise UserError when no program can do anything sensible with the flag's value."""
    if value == "":
        raise UserError(
            f"--{name} is empty, as a shell variable that is not set: give a value, or leave it out"
        )
    if not isinstance(value, (int, float)):
        return
    most = MOST.get(name, 2**62)  # random numbers are keyed by 64 bits
    if math.isnan(value) or not 0 <= value <= most:
        limit = f"{most} at most" if value > most else "0 or more"
        raise UserError(f"--{name} {value}: must be {limit}")
    if name in POSITIVE and value == 0:
        raise UserError(f"--{name} {value}: must be above 0")


def expand_home(value):
    """Put the home folder for a leading ~, as a shell does for `--data ~/cxr`, not `--data=~/cxr`.

    Of tables joined by commas each. Only paths begin so; other values stay as they are.
    """
    if not isinstance(value, str):
        return value
    return ",".join(os.path.expanduser(part) for part in value.split(","))


def add_flag(parser, field):
    """Add one field of a Config to the parser."""
    help = field.metadata["help"].replace("%", "%%")
    if field.type is bool:
        parser.add_argument(f"--{field.name}", action="store_true", help=help)
        return
    if field.default is not None:
        help += f" [{field.default}]".replace("%", "%%")
    choices = field.metadata["choices"]
    value = dict(type=field.type, choices=choices, default=field.default)
    metavar = None if choices else field.type.__name__.upper()
    parser.add_argument(f"--{field.name}", **value, metavar=metavar, help=help)


# ---- Processes, devices, precision
# How long ranks wait for one that works alone: it lists or packs films on a slow disk, or makes the
# closing table. A rank that dies is noticed at once, one that hangs in a step by nccl's own limit.
PATIENCE = datetime.timedelta(days=7)


@dataclasses.dataclass
class Team:
    """The processes that train together, seen from one of them.

    rank: this one's number. size: how many there are, 1 without torchrun. device: this one's.
    hosts: a gloo group beside nccl, for small agreements that must not wait for the GPU, and for
    waiting while one rank works alone, which may take longer than nccl's ten minutes.
    """

    rank: int
    size: int
    device: torch.device
    hosts: dist.ProcessGroup | None = None

    @property
    def lead(self) -> bool:
        """True on the one rank that prints and writes files."""
        return self.rank == 0

    def say(self, *words):
        """Print on the lead rank only."""
        if self.lead:
            print(*words, flush=True)

    def wait(self):
        """Return when every rank has come here, be it after hours (PATIENCE)."""
        self.any(False)

    def any(self, value) -> bool:
        """True on every rank when `value` is true on any: all ranks then decide alike."""
        if self.size == 1:
            return bool(value)
        vote = torch.tensor([int(value)])
        dist.all_reduce(vote, group=self.hosts)
        return bool(vote.item())

    def mean(self, tensor):
        """Average a tensor over the ranks, in place, and return it."""
        if self.size > 1:
            dist.all_reduce(tensor)
            tensor /= self.size
        return tensor

    def gather_objects(self, value) -> list:
        """The values of all ranks, in their order, on every rank; of any kind that pickles."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.hosts)
        return values

    def leave(self):
        """End the run: leave the group when every rank is done, so torchrun sees a clean exit."""
        if self.size > 1:
            self.wait()
            dist.destroy_process_group()


def start_team(name: str = "auto") -> Team:
    """Join torchrun's processes where there are any: by nccl on GPUs, by gloo on CPUs.

    name: auto, cpu, cuda (the local rank's GPU), cuda:1 or mps. Raises UserError when it is not
    there. auto never takes mps, which nobody has tested.
    """
    rank = int(os.environ.get("RANK", 0))
    size = int(os.environ.get("WORLD_SIZE", 1))
    device = find_device(name, local_rank=int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if size == 1:
        return Team(rank, size, device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Team(rank, size, device, hosts=dist.new_group(backend="gloo", timeout=PATIENCE))


def find_device(name: str, local_rank: int = 0) -> torch.device:
    """Turn --device into a torch.device. Raises UserError when this machine has none such."""
    there = {"cpu": 1, "mps": int(torch.backends.mps.is_available())}
    # device_count alone also counts GPUs whose driver is too old for this PyTorch.
    there["cuda"] = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if there["cuda"] else "cpu"
    try:
        device = torch.device(f"cuda:{local_rank}" if name == "cuda" else name)
    except RuntimeError:
        device = torch.device("meta")  # where nothing is computed
    if (device.index or 0) >= there.get(device.type, 0):
        advice = "auto, cpu, cuda, cuda:1 or mps is wanted"
        if device.type == "cuda" and not there["cuda"]:
            advice = "install a CUDA build of torch that fits the driver, or use --device cpu"
        elif device.type == "cuda":
            advice = f"process {local_rank} asks for {device}: start fewer, or choose another GPU"
        elif device.type == "mps":
            advice = "use --device cpu"
        raise UserError(
            f"--device {name}: this PyTorch sees {there['cuda']} NVIDIA or AMD GPU(s) and "
            f"{there['mps']} of Apple's: {advice}"
        )
    return device


def count_cpus() -> int:
    """Count the CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux: what a job or container was given
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def count_memory() -> float:
    """Count the bytes of memory that this process may use; infinite where the system tells none."""
    limits = []
    if hasattr(os, "sysconf"):  # not on Windows
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for file in ("memory.max", "memory/memory.limit_in_bytes"):  # Linux: of a container
        with contextlib.suppress(OSError, ValueError):  # "max" is no limit
            limits.append(int(Path("/sys/fs/cgroup", file).read_text(encoding="ascii")))
    return min(limits, default=math.inf)


def warn_of_cpu(team: Team, films: int, advice: str) -> list[str]:
    """Warn, on a CPU, how long a ViT-Base takes to learn from so many films. → a line, or none"""
    if team.device.type != "cpu":
        return []
    return [
        "warning: two CPU cores train ViT-Base on about 1.1 films per second: that is up to "
        f"{films / 1.1 / 3600:,.1f} hours; {advice}"
    ]


def choose_precision(name: str, device: torch.device) -> str:
    """Settle --precision: auto is bfloat16 where the hardware multiplies it, else float32."""
    if name != "auto":
        return name
    if device.type == "cuda":  # V100 and T4 only emulate it
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # a CPU without these instructions emulates it, slower than float32; mps is untested
        ask = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        has_bfloat16 = device.type == "cpu" and ask is not None and ask()
    return "bfloat16" if has_bfloat16 else "float32"


def autocast(device: torch.device, precision: str):
    """Return the context in which a forward pass runs in `precision`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def send(tensor, device):
    """Copy a CPU tensor to the device; a GPU fetches it itself while the host goes on."""
    device = torch.device(device)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


# ---- The training step
# Compiling takes half a minute to a minute, which a ViT-Base earns back in 2,000 steps of 128 films
# (docs/speed.md), and a smaller network later.
COMPILED_FROM = 3_000


def prepare_forward(model, compile: str, team: Team, steps: int = COMPILED_FROM):
    """Wrap a network for training: torch.compile; DistributedDataParallel for several processes.

    compile: on, off or auto (on a GPU, when a run has COMPILED_FROM steps or more). steps: of the
    whole run, so that it is compiled, and rounds, in the same way when it is resumed. The wrapped
    network shares its parameters with `model`.
    """
    on_gpu = team.device.type == "cuda"
    if compile == "on" or (compile == "auto" and on_gpu and steps >= COMPILED_FROM):
        model = torch.compile(model)
    if team.size == 1:
        return model
    team.wait()  # for a rank that opens its films longer than the others
    devices = [team.device] if on_gpu else None
    # No buffer ever changes: to send them before every forward pass would be work for nothing.
    known = inspect.signature(DistributedDataParallel).parameters
    switch = "forward_sync_buffers"  # so called since torch 2.13, which warns of the old name
    if switch not in known:
        switch = "broadcast_buffers"
    return DistributedDataParallel(model, device_ids=devices, **{switch: False})


def averaging_gradients(forward, only_if: bool):
    """Return the context of a backward pass: ranks average their gradients only if `only_if`."""
    if only_if or not isinstance(forward, DistributedDataParallel):
        return contextlib.nullcontext()
    return forward.no_sync()


def clip_and_step(model, optimizer, clip: float):
    """Shorten the gradient to a norm of at most `clip`, update the weights, clear the gradient.

    → the norm before, a tensor on the device
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def largest_divisor(number: int, limit: int) -> int:
    """The largest whole number up to `limit` that divides `number`."""
    return max(size for size in range(1, min(limit, number) + 1) if number % size == 0)


def fit_to_machine(args, team: Team):
    """Fill in the settings that depend on the machine: precision and micro-batch. → a new Config

    micro becomes the largest number of films up to --micro that divides this rank's share of batch.
    """
    if args.batch % team.size:
        raise UserError(f"--batch {args.batch} is not a multiple of the {team.size} processes")
    share = args.batch // team.size
    limit = args.micro or (128 if team.device.type == "cuda" else 64)
    micro = largest_divisor(share, limit)
    precision = choose_precision(args.precision, team.device)
    return dataclasses.replace(args, precision=precision, micro=micro)


# ---- Schedules
def warmup_cosine(step: int, total: int, warmup: int, peak: float, floor: float) -> float:
    """Rise linearly over `warmup` steps to `peak`, then fall on a cosine to `floor` at `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return cosine(step - warmup, total - warmup, peak, floor)


def cosine(step: int, total: int, start: float, end: float) -> float:
    """Go from `start` at step 0 to `end` at `total` along half a cosine. (Sec. B.1: momentum)"""
    progress = min(1.0, step / max(1, total))
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))
