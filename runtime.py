"""What every script needs and no paper describes: command line, torchrun, precision, schedules, safe checkpoints, the log.

A leaf: imports none of our files. Nothing here knows what is being trained.
"""

import argparse
import contextlib
import csv
import dataclasses
import difflib
import json
import math
import os
import signal
import sys
import types
import typing
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist


class Stop(Exception):
    """An error that the user can mend: one line that says what, where and what to do."""

    one_line = True


def main(function):
    """Run a script's main; a Stop (or any error marked `one_line`) becomes one line on stderr and exit code 1, Ctrl-C exit code 130."""
    try:
        function()
    except Exception as stop:
        if not getattr(stop, "one_line", False):
            raise
        print(f"error: {stop}", file=sys.stderr, flush=True)
        os._exit(1) if dist.is_initialized() else sys.exit(
            1
        )  # with peers waiting in a collective, leave at once
    except KeyboardInterrupt:
        sys.exit(130)


# ------------------------------------------------------------------------------------------------ command line
def flag(default, help, choices=None):
    """A dataclass field that is also a command-line flag; `None` as default means that the data decides."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


class Parser(argparse.ArgumentParser):
    def error(self, message):
        known = [o for action in self._actions for o in action.option_strings]
        unknown = (
            [word.split("=")[0] for word in message.split() if word.startswith("-")]
            if "unrecognized" in message
            else []
        )
        near = difflib.get_close_matches(unknown[0], known, 1) if unknown else []
        raise Stop(
            f"{message}{f' (did you mean {near[0]}?)' if near else ''}; {self.prog} --help lists all flags"
        )


def parse(Config, doc, argv=None, prog=None):
    """Dataclass → command line → dataclass. Booleans become switches; every other field takes a value of its type."""
    parser = Parser(
        prog=prog or Path(sys.argv[0]).name,
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for field in dataclasses.fields(Config):
        if "help" not in field.metadata:  # derived by the script, not given by the user
            continue
        kinds = [t for t in typing.get_args(field.type) if t is not types.NoneType] or [field.type]
        shown = "" if field.default is None or field.type is bool else f" [{field.default}]"
        options = (
            {"action": "store_true"}
            if field.type is bool
            else {"type": kinds[0], "choices": field.metadata["choices"]}
        )
        if field.type is not bool and not field.metadata["choices"]:
            options["metavar"] = kinds[0].__name__.upper()
        parser.add_argument(
            f"--{field.name}",
            default=field.default,
            help=(field.metadata["help"] + shown).replace("%", "%%"),
            **options,
        )
    config = Config(**vars(parser.parse_args(argv)))
    if (getattr(config, "seed", None) or 0) < 0:
        raise Stop(
            f"--seed {config.seed}: must be 0 or more"
        )  # the keys of random numbers have no sign
    return config


# ------------------------------------------------------------------------------------------------ processes and precision
@dataclasses.dataclass
class Team:
    """The processes of one run: rank and world as torchrun gives them (0 of 1 without), this one's device."""

    rank: int
    world: int
    device: torch.device

    @property
    def lead(self):
        return self.rank == 0

    def say(self, *words):
        if self.lead:
            print(*words, flush=True)


def start_team(device="auto"):
    """Join the torchrun group when there is one: nccl on GPUs, gloo on CPUs. → Team"""
    rank, world, local = (
        int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise Stop(
            "--device cuda, but this PyTorch sees no GPU: use --device cpu or install a CUDA build of torch"
        )
    if device == "cuda":
        device = f"cuda:{local}"
    try:
        device = torch.device(device)
    except RuntimeError:
        raise Stop(f"--device {device}: wanted auto, cpu, cuda or cuda:1") from None
    if device.type == "cuda":
        if device.index >= torch.cuda.device_count():
            raise Stop(
                f"--device {device}, but this PyTorch sees {torch.cuda.device_count()} GPU(s)"
            )
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Team(rank, world, device)


def end_team(team):
    """Leave the group, so that torchrun sees a clean exit."""
    if team.world > 1:
        dist.barrier()
        dist.destroy_process_group()


def host_group(team):
    """A gloo group beside nccl: small agreements between hosts that must not wait for the GPU. None for one process."""
    return dist.new_group(backend="gloo") if team.world > 1 else None


def any_rank(value, team, group):
    """True on every rank when `value` is true on any: all ranks then take the same decision at the same step."""
    if team.world == 1:
        return bool(value)
    vote = torch.tensor([int(value)])
    dist.all_reduce(vote, group=group)
    return bool(vote.item())


def reduce_mean(tensor, team):
    """Mean of a tensor over the ranks (in place for one process)."""
    if team.world > 1:
        dist.all_reduce(tensor)
        tensor /= team.world
    return tensor


def choose_precision(name, device):
    """'auto' → bfloat16 on GPUs and CPUs that multiply it natively, else float32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    native = getattr(
        torch.cpu, "_is_avx512_bf16_supported", bool
    )()  # else emulated, and slower than float32
    return "bfloat16" if native else "float32"


def autocast(device, precision):
    """The context in which the forward pass runs."""
    return (
        torch.autocast(device.type, torch.bfloat16)
        if precision == "bfloat16"
        else contextlib.nullcontext()
    )


def send(tensor, device):
    """A tensor made on the CPU → on the device, by way of pinned memory on a GPU, so that the host does not wait for it."""
    device = torch.device(device)
    return (
        tensor.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else tensor.to(device)
    )


def keyed(*key):
    """A torch generator (on the CPU) that depends on the integers of `key`, 0 or more, and nothing else."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------ schedules
def warmup_cosine(step, total, warmup, peak, floor):
    """Linear warm-up over `warmup` steps to `peak`, then cosine to `floor` at step `total`. Pure function of the step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def cosine(step, total, start, end):
    """From `start` at step 0 to `end` at step `total` along half a cosine (Sec. B.1: the EMA momentum)."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, total))))


# ------------------------------------------------------------------------------------------------ files
def replace_with(path, write):
    """Call write(temporary file name) and rename it to `path`: readers see the old file or the new one, never half."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (
        OSError,
        RuntimeError,
    ) as error:  # a file for a folder, no permission; torch.save calls a full disk a RuntimeError
        raise Stop(
            f"{path} cannot be written: {getattr(error, 'strerror', None) or str(error).splitlines()[0]}"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def save_atomic(obj, path):
    """torch.save, atomically."""
    replace_with(path, lambda file: torch.save(obj, file))


def write_text(path, text):
    """Write a text file, atomically."""
    replace_with(path, lambda file: Path(file).write_text(text))


def write_json(path, obj):
    """Write indented JSON, atomically."""
    write_text(path, json.dumps(obj, indent=2) + "\n")


class Log:
    """log.csv: one row a logged step. Opening it again at `step` drops the rows after it, so no step appears twice."""

    def __init__(self, path, columns, step=0):
        self.path, self.columns = Path(path), columns
        rows = [r for r in read_log(path) if int(float(r["step"])) <= step] if step else []
        lines = [",".join(columns)] + [",".join(r.get(c, "") for c in columns) for r in rows]
        write_text(path, "\n".join(lines) + "\n")
        self.file = open(path, "a", buffering=1)

    def row(self, **values):
        """Append one row; floats with six significant digits."""
        self.file.write(
            ",".join(
                f"{v:.6g}" if isinstance(v, float) else str(v)
                for v in (values[c] for c in self.columns)
            )
            + "\n"
        )


def read_log(path):
    """Rows of a log.csv as dicts of strings; a last row cut by a crash is left out."""
    if not Path(path).is_file():
        return []
    text = Path(path).read_text()
    rows = list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))
    return [
        r for r in rows if None not in r and None not in r.values() and r.get("step", "").strip()
    ]


class Preempted:
    """SIGTERM (a pre-empted job) sets a flag that the loop reads at the end of a step."""

    def __init__(self):
        self.asked = False
        signal.signal(signal.SIGTERM, self.ask)

    def ask(self, *_):
        self.asked = True
