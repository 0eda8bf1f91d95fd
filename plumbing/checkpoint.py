"""plumbing.checkpoint"""

import argparse
import contextlib
import csv
import json
import os
import signal
import warnings
from pathlib import Path

import torch

from plumbing.launch import UserError


class BadCheckpoint(UserError, ValueError):
    """Weights that cannot be used; the message is one line for the user."""


UNFIT = (
    AttributeError,
    IndexError,
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
)  # what a wrong dict of weights can raise


def brief(error):
    """The first line of an error, after its name."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]


def load_checkpoint(path):
    """A checkpoint file → its dict. Nothing is unpickled but tensors, plain containers and argparse.Namespace (the authors' file holds one)."""
    path = Path(path)
    if not path.is_file():
        raise BadCheckpoint(f"{path}: no such checkpoint file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # junk bytes can raise anything in an unpickler
        raise BadCheckpoint(
            f"{path}: not a checkpoint that can be loaded safely ({brief(error)}); nothing in it was run"
        ) from None
    if not isinstance(checkpoint, dict):
        raise BadCheckpoint(f"{path}: holds a {type(checkpoint).__name__}, not a dict of weights")
    return checkpoint


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
        raise UserError(
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


# ------------------------------------------------------------------------------------------------ runs that go on
class StopRequest:
    """`requested` becomes true on SIGTERM (a pre-empted job): the loop then saves and ends after its step."""

    def __init__(self):
        self.requested = False
        signal.signal(signal.SIGTERM, self._request)

    def _request(self, *_):
        self.requested = True


def newest_run(file="encoder.pt", root="runs"):
    """Find the newest pre-training run below `root`: a folder that holds encoder.pt. → path of `file` in it, or None"""
    found = [path for path in Path(root).rglob(file) if path.with_name("encoder.pt").is_file()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def refuse_other_recipe(folder, saved, recipe):
    """Raise UserError, naming old and new value, when the run in `folder` was started with other settings than `recipe`."""
    keys = [*recipe, *(key for key in saved if key not in recipe)]
    changed = [
        f"{key} {saved.get(key)} → {recipe.get(key)}"
        for key in keys
        if saved.get(key) != recipe.get(key)
    ]
    if changed:
        raise UserError(
            f"{folder} holds a run with another recipe ({'; '.join(changed)}): "
            "choose another --out, or delete it to start anew"
        )


def resume(path, recipe, parts):
    """Load the state of an interrupted run into `parts` {name: module or optimizer}. → what was saved, or None without a file

    recipe: settings that must not have changed (None: the caller has compared them). Raises UserError.
    """
    path = Path(path)
    if not path.is_file():
        return None
    saved = load_checkpoint(path)
    wanted = {"step", *parts} if recipe is None else {"step", "recipe", *parts}
    if not wanted <= saved.keys():
        raise UserError(
            f"{path} is not a checkpoint of this program: move it away or choose another --out"
        )
    if recipe is not None:
        refuse_other_recipe(path.parent, saved["recipe"], recipe)
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return saved


def remove_leftovers(folder):
    """Delete the temporary files of a run that was killed while it wrote into `folder`."""
    for path in Path(folder).glob(".*.tmp"):
        path.unlink(missing_ok=True)
