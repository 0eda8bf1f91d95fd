"""What every script needs and no paper describes: command line, torchrun, precision, schedules, safe checkpoints, the log.

A leaf: imports none of our files. Nothing here knows what is being trained.
"""

import argparse
import contextlib
import dataclasses
import difflib
import math
import os
import sys
import threading
import time
import types
import typing
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


class UserError(Exception):
    """An error that the user can mend: one line that says what, where and what to do."""

    one_line = True


def run_script(function):
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
        raise UserError(
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
        raise UserError(
            f"--seed {config.seed}: must be 0 or more"
        )  # the keys of random numbers have no sign
    return config


# ------------------------------------------------------------------------------------------------ processes and precision
@dataclasses.dataclass
class Team:
    """The processes of one run: this one's rank, their number `world` (1 without torchrun), its device.

    hosts: a gloo group beside nccl, for small agreements that must not wait for the GPU.
    """

    rank: int
    world: int
    device: torch.device
    hosts: dist.ProcessGroup | None = None

    @property
    def lead(self):
        """True on the one rank that prints and writes files."""
        return self.rank == 0

    def say(self, *words):
        """Print on the lead rank only."""
        if self.lead:
            print(*words, flush=True)

    def wait(self):
        """Return when every rank has come here."""
        self.any(False)

    def any(self, value):
        """True on every rank when `value` is true on any: all ranks then decide alike."""
        if self.world == 1:
            return bool(value)
        vote = torch.tensor([int(value)])
        dist.all_reduce(vote, group=self.hosts)
        return bool(vote.item())

    def mean(self, tensor):
        """Mean of a tensor over the ranks, computed in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
            tensor /= self.world
        return tensor

    def leave(self):
        """Leave the group, so that torchrun sees a clean exit."""
        if self.world > 1:
            dist.barrier()
            dist.destroy_process_group()


def start_team(name="auto"):
    """Join torchrun's group where there is one: nccl on GPUs, gloo on CPUs. → Team

    name: auto, cpu, cuda (the local rank's GPU) or cuda:1. Raises UserError when it is not there.
    """
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = find_device(name, local_rank=int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world == 1:
        return Team(rank, world, device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Team(rank, world, device, hosts=dist.new_group(backend="gloo"))


def find_device(name, local_rank=0):
    """--device as the user wrote it → torch.device. Raises UserError when there is none such."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            "--device cuda, but this PyTorch sees no GPU: "
            "use --device cpu or install a CUDA build of torch"
        )
    if name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: wanted auto, cpu, cuda or cuda:1") from None
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(f"--device {device}, but this PyTorch sees {count} GPU(s)")
    return device


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


# ------------------------------------------------------------------------------------------------ the training step
def prepare_forward(model, compile, team):
    """Wrap a network for training: torch.compile as asked, DistributedDataParallel when there are several processes.

    compile: on, off or auto (on GPUs only). The wrapped network shares its parameters with `model`.
    """
    on_gpu = team.device.type == "cuda"
    if compile == "on" or (compile == "auto" and on_gpu):
        model = torch.compile(model)
    if team.world == 1:
        return model
    devices = [team.device] if on_gpu else None
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)


def no_sync(forward, is_last):
    """The context of one micro-batch: processes average their gradients only after the last one of a step."""
    if is_last or not isinstance(forward, DistributedDataParallel):
        return contextlib.nullcontext()
    return forward.no_sync()


def clip_and_step(model, optimizer, clip):
    """Shorten the gradient to a norm of at most `clip`, update the weights, clear the gradient. → norm before, on the device"""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


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


def leave_with_parent(_):
    """In a worker: end when the parent is killed. PyTorch's own watch does not see it while a film waits in a pipe that nobody reads."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
