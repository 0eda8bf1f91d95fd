"""What a run leaves on disk, and how it is resumed: atomic files, locks, checkpoints, log.csv."""

import argparse
import contextlib
import csv
import hashlib
import json
import os
import platform
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from plumbing import launch
from plumbing.launch import UserError

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None


# ---- Files: readers see the old one or the new one, never half
@contextlib.contextmanager
def explain_writing(path):
    """Turn what the system says against writing `path` into a UserError."""
    try:
        yield
    except OSError as error:
        advice = "is the folder there, and may you write into it?"
        if error.errno in launch.FULL:
            advice = "make room there; the same command then resumes from what was saved before"
        words = error.strerror or str(error)
        raise UserError(f"{path} cannot be written: {words}: {advice}") from None


@contextlib.contextmanager
def go_on_without(what: str):
    """Only warn when `what` cannot be written: a run does not end for want of it."""
    try:
        yield
    except UserError as error:
        tqdm.write(f"warning: going on without {what}: {error}")


def replace_with(path, write, sync=True):
    """Call write(temporary file name), then rename that file to `path`. Raises UserError.

    sync: wait until the bytes are on the disk, so that even a power cut leaves a whole file.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with explain_writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            if sync:
                with open(temporary, "rb+") as file:  # Windows flushes only what is open to write
                    os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def save_atomic(obj, path):
    """torch.save, atomically."""

    def write(temporary):
        with open(temporary, "wb") as file:  # given a name, PyTorch would hide the system's reason
            try:
                torch.save(obj, file)
            except RuntimeError as error:  # raised while it handles what the system said
                raise error.__context__ or error from None

    replace_with(path, write)


# How our text files are written; what is no UTF-8, in a file name, is spelt \\udcf6.
UTF8 = {"encoding": "utf-8", "errors": "backslashreplace", "newline": "\n"}


def write_text(path, text: str):
    """Write a text file in UTF-8, atomically."""
    replace_with(path, lambda file: Path(file).write_text(text, **UTF8))


def write_csv(path, header, rows):
    """Write a CSV file in UTF-8, atomically, row by row."""

    def write(temporary):
        with open(temporary, "w", **UTF8) as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(header)
            table.writerows(rows)

    replace_with(path, write)


def write_json(path, obj):
    """Write indented JSON, atomically."""
    write_text(path, json.dumps(obj, indent=2) + "\n")


def read_json(path) -> dict:
    """Read what a run wrote by write_json; {} where there is no file. UserError: it is damaged."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        content = brief(error)
    if not isinstance(content, dict):
        raise UserError(
            f"{path} is damaged ({str(content)[:80]}): restore it, or choose another folder"
        )
    return content


def remove_leftovers(folder):
    """Delete the temporary files of a run that was killed while it wrote into `folder`."""
    for path in Path(folder).glob(".*.tmp"):
        path.unlink(missing_ok=True)


# ---- One run per folder
held_locks = {}  # {path: open file} of the locks that this process has, until it ends


def lock(folder):
    """Keep a folder for this run; clear it of what a killed run left half-written.

    A folder that this makes goes again when the run is refused before it has written anything.
    UserError when another run is at work in it.
    """
    folder = Path(folder).absolute()
    if not folder.exists():
        launch.at_end.callback(remove_if_empty, folder)
    claim(folder / ".lock", folder)
    remove_leftovers(folder)


def remove_if_empty(folder: Path):
    """Remove a folder that holds nothing but the lock of this process."""
    with contextlib.suppress(OSError):  # Windows removes no open file
        if os.listdir(folder) == [".lock"] and folder / ".lock" in held_locks:
            (folder / ".lock").unlink()
            held_locks.pop(folder / ".lock").close()  # a later run of this process locks it anew
            folder.rmdir()


def claim(path, what):
    """Keep `what`, a folder or file, for this process by the system's lock on the file `path`.

    The system frees it when the process ends, however it ends; the file stays. What that says is
    only for the message: UserError, before anything else is touched, when another process has it.
    """
    path = Path(path).absolute()
    if path in held_locks:  # one run after the other in one process
        return
    with explain_writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", **UTF8)
        if not lock_file(file):
            file.close()
            owner = path.read_text(encoding="utf-8", errors="replace") or "another process"
            raise UserError(
                f"{what} is in use by {owner}: wait for its end or choose another --out"
            )
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            file.close()  # its owner has ended and removed it since it was opened
            return claim(path, what)
        held_locks[path] = file
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}")
        file.flush()


def lock_file(file) -> bool:
    """Lock an open file → False when another process has it. Some disks have no locks: then True"""
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a forked process does not inherit it
        else:  # Windows locks bytes against reading, too: one far behind the text
            os.lseek(file.fileno(), 2**30, os.SEEK_SET)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        tqdm.write(f"warning: {file.name} cannot be locked ({error.strerror}): start one run only")
    return True


# ---- Checkpoints
class BadCheckpoint(UserError, ValueError):
    """A file of weights that cannot be used."""


# What a dict that holds the wrong weights can raise while it is taken apart.
UNFIT = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def brief(error: Exception) -> str:
    """Shorten an error to its name and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]


# Harmless things that people's checkpoints hold beside tensors: the authors' file a Namespace, many
# a best score or a random state of NumPy, which names its functions by version 1 or 2.
HARMLESS = [argparse.Namespace, np.dtype, np.ndarray]
HARMLESS += {type(np.dtype(code)) for code in np.typecodes["All"]}
for thing in (np.float64(0), np.zeros(1)):
    make = thing.__reduce__()[0]
    HARMLESS += [(make, f"numpy{core}.multiarray.{make.__name__}") for core in (".core", "._core")]


def load_checkpoint(path, mmap=False) -> dict:
    """Load a checkpoint or a .safetensors file, running nothing in it. Raises BadCheckpoint.

    Only tensors, plain containers and what is HARMLESS are made. mmap: a tensor of a checkpoint of
    ours is read from disk once it is used, for those who ask for a few numbers beside them.
    """
    path = Path(path)
    if not path.is_file():
        what = "a folder, not a checkpoint" if path.is_dir() else "no such checkpoint file"
        raise BadCheckpoint(f"{path}: {what}")
    try:
        with open(path, "rb") as file:
            is_safetensors = file.read(9)[8:] == b"{"  # eight bytes of length, then JSON
        if is_safetensors:
            return read_safetensors(path)
        with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # junk bytes can raise anything in an unpickler
        raise BadCheckpoint(f"{path}: {why_not_loaded(error)}; nothing in it was run") from None
    if not isinstance(checkpoint, dict):
        raise BadCheckpoint(f"{path}: holds a {type(checkpoint).__name__}, not a dict of weights")
    return checkpoint


def why_not_loaded(error: Exception) -> str:
    """Tell what a checkpoint holds that is no tensor, out of PyTorch's page about it."""
    page = str(error)
    foreign = re.search(r"GLOBAL (\S+)", page)
    if foreign:
        reason = (
            f"it holds a {foreign[1][:80]}, which is not a tensor; "
            "if you trust it, load it with weights_only=False and save its state_dict alone"
        )
    else:
        unpickling = page.partition("WeightsUnpickler error: ")[2]
        reason = (unpickling or brief(error)).partition("\n")[0][:160]
        reason = reason.strip() or "it is cut short, or none"
    return f"not a checkpoint that can be loaded safely ({reason})"


def read_safetensors(path: Path) -> dict:
    """Read {name: tensor} from a .safetensors file.

    The format: the length of the header as eight bytes, little-endian; the header, JSON {name:
    {dtype, shape, data_offsets}}; then the tensors' bytes, to which the offsets refer.
    """
    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16}
    kinds |= {"BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8}
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        data = bytearray(content[start + first : start + last])
        if len(data) < last - first:
            raise ValueError(f"cut short: {name} is not whole")
        tensors[name] = torch.frombuffer(data, dtype=kinds[entry["dtype"]]).view(entry["shape"])
    return tensors


def newest_run(root="runs", with_demo=True) -> Path | None:
    """Find encoder.pt of the newest pre-training run below `root`; the demo's holds phantoms."""
    found = Path(root).rglob("encoder.pt")
    if not with_demo:
        found = (path for path in found if not (path.parent / "phantoms").is_dir())
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def weights_in(path) -> Path:
    """The weights of a run's folder: last.pt, since it holds all, else encoder.pt; or the file."""
    path = Path(path)
    if not path.is_dir():
        return path
    for file in (path / "last.pt", path / "encoder.pt"):
        if file.is_file():
            return file
    raise UserError(
        f"--weights {path}: holds neither last.pt nor encoder.pt: give the folder of a "
        "pre-training run (pretrain.py --out), or a file of weights"
    )


def warn_of_unfinished(weights: Path) -> list[str]:
    """Warn when the weights are of a pre-training of ours that has not ended. → one line or none"""
    last = weights.with_name("last.pt")
    if weights.name not in ("encoder.pt", "last.pt") or not last.is_file():
        return []
    try:
        saved = load_checkpoint(last, mmap=True)
        recipe = saved["recipe"]
        total = recipe["epochs"] * (recipe["films"] // recipe["batch"])
    except (UserError, KeyError, TypeError):  # damaged, or of another program
        return []
    step = saved.get("step", total)
    if step >= total:
        return []
    return [
        f"warning: {weights} is of a pre-training that stopped at step {step:,} of {total:,}: its "
        "command resumes it; choose other weights by --weights"
    ]


# ---- One program per folder
TRAINING = "a pre-training"
TUNING = "a fine-tuning"
TEST = "a test by finetune.py --eval"
DECODER = "a decoder of lab.rcdm"
ANALYSIS = "an analysis of the lab"
# Of lab.ablation, by the file that says what its runs rest on.
GRIDS = {
    "ablation.json": "a Table 3 of lab.ablation",
    "compare.json": "a comparison by lab.ablation",
}


def contents_of(folder) -> str:
    """Say what a folder holds, by the keys that only one program writes; "" for no results."""
    folder = Path(folder)
    config = read_json(folder / "config.json")
    result = read_json(folder / "result.json")
    if "task" in config:
        return f"one seed of the fine-tuning in {folder.parent}"
    for name, grid in GRIDS.items():
        if (folder / name).is_file():
            return grid
    if "task" in result and (folder / "predictions.csv").is_file():
        return TEST
    if "task" in result or any(folder.glob("seed*/best.pt")):
        return TUNING
    if "mode" in config:
        return DECODER
    if "settings" in result:
        return ANALYSIS
    if config:
        return TRAINING
    return "a result of another program or version" if result else ""


def refuse_other_program(folder, own: str):
    """UserError when a folder holds anything but `own`: its files would be written over."""
    contents = contents_of(folder)
    if contents not in ("", own):
        raise UserError(f"{folder} holds {contents}: choose another --out")


# ---- Runs that are resumed
def digest(content: bytes) -> str:
    """Fingerprint what a run depends on: weights, films, labels."""
    return hashlib.sha256(content).hexdigest()[:16]


def digest_of_names(names: list[str]) -> str:
    """Fingerprint the names of films, which need not be UTF-8."""
    return digest("\n".join(names).encode(errors="surrogateescape"))


# What a fingerprint in a recipe stands for, which tells a reader nothing itself.
FINGERPRINTED = {
    "names": "other films to learn from, by --data, --patients, --probe, --holdout or --learn"
}


def refuse_other_recipe(
    folder, saved: dict, recipe: dict, or_else=", or delete it to start anew", why=None, of=None
):
    """Raise UserError when the run in `folder` was started with another recipe than `recipe`.

    A recipe is {setting: value} of all that a run's numbers depend on; saved: the old run's.
    or_else: what can be done but for choosing another folder. why: {setting: the reason why it may
    differ though nobody has changed it, with {old} for the old value}. of: the folder whose
    result.json tells the old run's command [folder].
    """
    settings = dict.fromkeys([*recipe, *saved])  # each once, in order
    changed = [name for name in settings if saved.get(name) != recipe.get(name)]
    if not changed:
        return
    old, new = (
        {name: "not given" if run.get(name) is None else run[name] for name in changed}
        for run in (saved, recipe)
    )
    differences = [FINGERPRINTED.get(name, f"{name} {old[name]} → {new[name]}") for name in changed]
    reasons = [
        f". {name}: {reason.format(old=old[name])}"
        for name, reason in (why or {}).items()
        if name in changed
    ]
    command = read_json(Path(of or folder) / "result.json").get("made_with", {}).get("command")
    raise UserError(
        f"{folder} holds a run with another recipe ({'; '.join(differences)}): "
        f"choose another --out{or_else}{''.join(reasons)}"
        + (f". Its command was: {command}" if command else "")
    )


def sources(**paths) -> dict:
    """Say of what a result is, by whole paths without links, None where one was not given.

    What is no path may be several, joined by commas.
    """
    whole = {}
    for name, path in paths.items():
        each = [path] if not path or os.path.exists(path) else str(path).split(",")
        whole[name] = path and ",".join(str(Path(part).resolve()) for part in each)
    return whole


def made_with() -> dict:
    """Say with what a result was made: command, time, versions, and the commit where git tells."""
    root = Path(__file__).resolve().parents[1]
    commit = ""
    if (root / ".git").exists():
        ask = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        with contextlib.suppress(OSError):
            commit = subprocess.run(ask, cwd=root, capture_output=True, text=True).stdout.strip()
    return {
        "command": shlex.join(sys.argv),
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "commit": commit or None,
    }


def refuse_other_result(folder, about: dict):
    """Raise UserError when result.json in `folder` is not about the same films and weights.

    about: as `sources` gives it, and as result.json holds it; older ones do not tell.
    """
    saved = read_json(Path(folder) / "result.json")
    if "data" in saved:
        # A whole training may lie there: nobody should delete that to write a result.
        refuse_other_recipe(folder, {name: saved.get(name) for name in about}, about, or_else="")


def load_last(path, wanted: set) -> dict:
    """Load the last.pt of a run, which must hold `wanted`. UserError: what to do else."""
    try:
        saved = load_checkpoint(path)
    except BadCheckpoint as error:
        raise BadCheckpoint(f"{error}; move it away to start anew") from None
    is_ours = wanted <= saved.keys() and isinstance(saved.get("recipe", {}), dict)
    step = saved.get("step")
    if not is_ours or not isinstance(step, int) or step < 0:
        raise UserError(
            f"{path} is not a checkpoint of this program: move it away or choose another --out"
        )
    return saved


def resume(path, recipe: dict | None, parts: dict) -> dict | None:
    """Load the state of an interrupted run into `parts`, {name: module or optimizer}.

    recipe: what must not have changed; None when the caller has compared it. Raises UserError.
    → all that was saved, or None when there is no file
    """
    path = Path(path)
    if not path.exists():
        return None
    wanted = {*parts}
    if recipe is not None:
        wanted.add("recipe")
    saved = load_last(path, wanted)
    if recipe is not None:
        refuse_other_recipe(path.parent, saved["recipe"], recipe)
    for name, part in parts.items():
        try:
            part.load_state_dict(saved[name])
        except UNFIT:  # of a module, of an optimizer
            raise UserError(
                f"{path} holds another network than today's, perhaps an earlier version's: "
                "choose another --out, or delete it to start anew"
            ) from None
    return saved


def resume_run(folder: Path, recipe: dict, parts: dict, team) -> int:
    """Load last.pt, where an earlier run in `folder` stopped. → steps done before, 0 for none

    recipe, parts: see resume. UserError also where last.pt is gone, or not all processes find it.
    """
    saved = resume(folder / "last.pt", recipe, parts)
    if saved is None and (folder / "encoder.pt").exists():
        raise UserError(
            f"{folder}/encoder.pt is of a run whose last.pt is gone: this run would write over it; "
            "choose another --out, or move it away"
        )
    start = saved["step"] if saved else 0
    if set(team.gather_objects(start)) != {start}:
        raise UserError(
            f"--out {folder} must lie on a disk that all nodes share: "
            "they do not find the same last.pt there"
        )
    return start


class StopRequest:
    """Within it, a signal to end only makes `requested` true: the loop then saves and ends.

    Ctrl-C counts as a signal; pressed again, it ends the script at once.
    """

    def __init__(self):
        self.requested = 0  # the signal's number
        self.handlers = {}

    def __enter__(self):
        for number in launch.ENDING:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup makes it
                self.handlers[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *_error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def note(self, number, _frame):
        """Handle a signal."""
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        self.requested = self.requested or number

    def end(self, team, where: str):
        """Say that the run is saved, and end the script: with exit code 0, after Ctrl-C 130."""
        name = signal.Signals(self.requested).name if self.requested else "a signal elsewhere"
        team.say(f"{name}: saved at {where}; the same command resumes from there")
        team.leave()
        sys.exit(128 + signal.SIGINT if self.requested == signal.SIGINT else 0)


# ---- log.csv
class Log:
    """log.csv, one row per logged step, of `batch` films. Opened again at `step`, it drops the rows
    after it.
    """

    def __init__(self, path, columns, step: int = 0, batch: int = 1):
        self.path = Path(path)
        self.columns = list(columns)
        self.batch = batch
        self.last_step = step
        self.last_time = time.perf_counter()
        kept = self.read_until(step) if step else []
        lines = [",".join(self.columns)]
        for row in kept:
            lines.append(",".join(row.get(column, "") for column in self.columns))
        write_text(path, "\n".join(lines) + "\n")

    def read_until(self, step: int) -> list[dict]:
        """The rows up to `step` of an earlier log; one that was edited is kept beside, too."""
        rows = read_log(self.path)
        count = self.path.read_bytes().count(b"\n") - 1 if self.path.is_file() else 0
        if len(rows) < count:
            aside = self.path.with_name(f"log-before-step-{step + 1}.csv")
            with explain_writing(aside):
                os.replace(self.path, aside)
            lost = count - len(rows)
            tqdm.write(f"warning: {lost} rows of {self.path} cannot be read; {aside} keeps them")
        return [row for row in rows if float(row["step"]) <= step]

    def speed(self, step: int) -> tuple[float, float]:
        """Films per second since the last call, and how many seconds that is."""
        now = time.perf_counter()
        seconds = now - self.last_time
        films = (step - self.last_step) * self.batch
        self.last_step = step
        self.last_time = now
        return films / seconds, seconds

    def row(self, step: int, **values):
        """Append the row of a step; floats with six significant digits."""
        values = {"step": step, "images": step * self.batch} | values
        cells = []
        for column in self.columns:
            value = values[column]
            cells.append(f"{value:.6g}" if isinstance(value, float) else str(value))
        with go_on_without(f"the row of step {step}"), explain_writing(self.path):
            size = self.path.stat().st_size if self.path.is_file() else 0
            try:
                # closed again: every row is on disk at once
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(",".join(cells) + "\n")
            except OSError:
                with contextlib.suppress(OSError):
                    os.truncate(self.path, size)  # half a row would spoil the next one
                raise


def read_log(path) -> list[dict]:
    """Read a log.csv into {column: text} per row; a last row cut by a crash is left out.

    So are rows that somebody has made unreadable; a mark that Excel puts before the first is none.
    """
    if not Path(path).is_file():
        return []
    text = Path(path).read_text(encoding="utf-8-sig", errors="replace")
    whole_lines = text[: text.rfind("\n") + 1].splitlines()
    rows = []
    for row in csv.DictReader(whole_lines):
        # DictReader files surplus cells under None and fills missing ones with None.
        is_whole = None not in row and None not in row.values()
        if is_whole and row.get("step", "").isdecimal():
            rows.append(row)
    return rows
