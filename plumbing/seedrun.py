"""The run of one seed of fine-tuning on disk: config.json, log.csv, last.pt, best.pt, result.json.

config.json says with what the seed began, so that it goes on with nothing else. last.pt holds all
that is needed to go on, best.pt the model that was best on validation, which is then tested.
"""

import dataclasses
import hashlib
import json
import math
import time
from pathlib import Path

import torch

from plumbing.checkpoint import Log, refuse_other_recipe, resume, save_atomic, write_json


def recipe_of(settings: dict, weights: Path | None, vit, examples) -> dict:
    """List what must stay the same when a seed goes on.

    settings: the flags that change its numbers; the weights and the training films by fingerprint.
    """
    weight_bytes = b""
    if weights:
        weight_bytes = b"".join(p.detach().cpu().numpy().tobytes() for p in vit.parameters())
    films = [(str(e.path.name), e.target, e.mask and e.mask[0]) for e in examples]
    return settings | {
        "weights": str(weights or "none"),
        "weights_are": hashlib.sha256(weight_bytes).hexdigest()[:16],
        "films_are": hashlib.sha256(repr(films).encode()).hexdigest()[:16],
        "films": len(films),
    }


@dataclasses.dataclass
class Best:
    """The best validation so far, and how many there were since."""

    value: float = -1.0  # the metric, percent
    loss: float = math.inf
    step: int = 0
    stale: int = 0  # validations without a new best

    def update(self, value: float, loss: float, step: int) -> bool:
        """Note a validation. → True if it is the best: a higher metric, or the same, lower loss"""
        value = 0.0 if math.isnan(value) else float(value)  # NaN: no class has an AUROC
        is_best = (value, -loss) > (self.value, -self.loss)
        if is_best:
            self.value = value
            self.loss = float(loss)
            self.step = step
        self.stale = 0 if is_best else self.stale + 1
        return is_best

    def __str__(self):
        return f"{self.value:.2f} at step {self.step}"


@dataclasses.dataclass
class SeedRun:
    """One seed in training.

    steps: finetune.Steps. about: what best.pt says beside the weights, such as the recipe.
    """

    seed: int
    folder: Path
    steps: tuple
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    about: dict
    step: int = 0  # steps done
    best: Best = dataclasses.field(default_factory=Best)

    def resume(self):
        """Go on from last.pt when there is one."""
        parts = {"finetuned": self.model, "optimizer": self.optimizer}
        saved = resume(self.folder / "last.pt", None, parts)
        if saved:
            self.step = saved["step"]
            self.best = Best(**saved["best"])

    def save(self):
        """Write last.pt."""
        state = {
            "finetuned": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "best": dataclasses.asdict(self.best),
        }
        save_atomic(state, self.folder / "last.pt")

    def save_best(self):
        """Write best.pt."""
        state = {"finetuned": self.model.state_dict(), **self.about, "step": self.step}
        save_atomic(state, self.folder / "best.pt")


def keep_recipe(folder: Path, recipe: dict):
    """Write config.json. UserError when the folder holds a run with another recipe."""
    path = folder / "config.json"
    if path.is_file():
        refuse_other_recipe(folder, json.loads(path.read_text()), recipe)
    write_json(path, recipe)


def finished_result(folder: Path, end: int) -> dict | None:
    """The result of a seed that is over, or that has come to step `end`; else None."""
    path = folder / "result.json"
    if not path.is_file():
        return None
    result = json.loads(path.read_text())
    return result if result["over"] or result["steps"] >= end else None


class SeedLog(Log):
    """log.csv of a seed. Films per second count from one row to the next."""

    COLUMNS = ["step", "epoch", "images", "loss", "lr", "val", "val_loss", "images_per_s"]

    def __init__(self, run: SeedRun, batch: int):
        super().__init__(run.folder / "log.csv", self.COLUMNS, run.step)
        self.run = run
        self.batch = batch
        self.last_step = run.step
        self.last_time = time.perf_counter()

    def row(self, **values):
        """Write the row of step run.step."""
        step = self.run.step
        now = time.perf_counter()
        rate = (step - self.last_step) * self.batch / (now - self.last_time)
        super().row(step=step, images=step * self.batch, images_per_s=rate, **values)
        self.last_step = step
        self.last_time = now
