"""Table 3 in miniature: the world modelling tasks one by one, without Δ, without the action, not unified; several seeds of each.

Every cell is one run of pretrain.py in its own folder and, for each table of labels, one of finetune.py on a tenth of the training films.
What is finished is not run again, what was interrupted goes on. Two rows without pre-training stand below.
"""

import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from lab.common import run_command
from model import CheXWorld, error, swap_views, take
from plumbing import phantom
from plumbing.checkpoint import (
    UNFIT,
    BadCheckpoint,
    brief,
    load_checkpoint,
    read_log,
    write_json,
    write_text,
)
from plumbing.launch import UserError, flag, run_script

ROWS = {  # in the order of the paper's table
    "local": ["--tasks", "local"],
    "local + global": ["--tasks", "local,global"],
    "local + domain": ["--tasks", "local,domain"],
    "full": [],
    "full, not unified": ["--not_unified"],
    "full, no action": ["--no_action"],
    "full, no Δ": ["--no_delta"],
}
# VinDr at 1 % (Table 3). The scan lost which tick is missing in rows 5 to 7 and which pair stands in row 2; read from Sec. 5.3: hiding Δ costs most.


PAPER = dict(zip(ROWS, (84.71, 88.31, 89.73, 90.53, 89.12, 89.91, 87.60)))


SCRATCH, PIXELS = "random initialisation", "raw 64² pixels"


SMALL = "--size tiny --image 96 --patch 16 --batch 16 --epochs 15 --warmup 1 --lr 1.5e-3 --ema 0.99"  # three minutes a run on one core


class AblatedCheXWorld(CheXWorld):
    """CheXWorld with the switches of Table 3; with all of them at their defaults it is CheXWorld.

    tasks: some of "local,global,domain". Without local nothing is masked; without domain the
    context is the plain view and π is told nothing.
    delta: False hides where the other view lies (its own grid instead of φ).
    action: False tells π nothing, while the augmentation stays.
    unified: False asks each task in a forward pass of its own.
    """

    LOSSES = ("l11", "l22", "l12", "l21", "d11", "d22")  # d: domain alone, when not unified

    def __init__(
        self, *args, tasks="local,global,domain", delta=True, action=True, unified=True, **sizes
    ):
        super().__init__(*args, **sizes)
        self.tasks = set(tasks.split(","))
        if self.tasks - {"local", "global", "domain"}:
            raise ValueError(f"tasks must be some of local, global, domain; got {tasks!r}")
        self.delta = delta
        self.action = action
        self.unified = unified
        self.config |= dict(tasks=tasks, delta=delta, action=action, unified=unified)

    def forward(self, y, x, keep, masked, coords, action):
        """Compute the losses of the chosen tasks; arguments and result as in CheXWorld.forward."""
        target = self.targets(y)  # (2B, N, D)
        if self.unified:
            losses = self.together(target, y, x, keep, masked, coords, action)
        else:
            losses = self.apart(target, y, x, keep, masked, coords, action)
        losses["loss"] = torch.stack(list(losses.values())).mean()
        return losses, target.mean(1)

    def together(self, target, y, x, keep, masked, coords, action):
        """One encoding of each context serves all tasks, as in the paper."""
        if "domain" not in self.tasks:
            x = y
        if "domain" not in self.tasks or not self.action:
            action = None
        if "local" not in self.tasks:
            keep = masked = None
        context = self.encoder(x, keep)
        losses = {}
        if "local" in self.tasks or "global" not in self.tasks:
            l11, l22 = self.within(target, context, keep, masked, action)
            losses |= dict(l11=l11, l22=l22)
        if "global" in self.tasks:
            l12, l21 = self.between(target, context, keep, coords, action)
            losses |= dict(l12=l12, l21=l21)
        return losses

    def apart(self, target, y, x, keep, masked, coords, action):
        """Each task encodes its own context: local a masked view, global a whole one, both plain;
        domain a whole view after T_a."""
        losses = {}
        if "local" in self.tasks:
            l11, l22 = self.within(target, self.encoder(y, keep), keep, masked, None)
            losses |= dict(l11=l11, l22=l22)
        if "global" in self.tasks:
            l12, l21 = self.between(target, self.encoder(y), None, coords, None)
            losses |= dict(l12=l12, l21=l21)
        if "domain" in self.tasks:
            told = action if self.action else None
            d11, d22 = self.within(target, self.encoder(x), None, None, told)
            losses |= dict(d11=d11, d22=d22)
        return losses

    def within(self, target, context, keep, masked, action):
        """Eq. (10): each view predicts its own masked patches, or all of them when masked is None."""
        grid = self.coords.expand(len(context), -1, -1)
        seen_at = grid if keep is None else take(grid, keep)
        wanted_at = grid if masked is None else take(grid, masked)
        guess = self.predictor(context, seen_at, wanted_at, action)
        return error(guess, target if masked is None else take(target, masked))

    def between(self, target, context, keep, coords, action):
        """Eq. (11): each view predicts every patch of the other view, at φ, or at its own grid."""
        grid = self.coords.expand(len(context), -1, -1)
        seen_at = grid if keep is None else take(grid, keep)
        wanted_at = coords if self.delta else grid
        guess = self.predictor(context, seen_at, wanted_at, action)
        return error(guess, swap_views(target))


def load_ablated(path: str | Path) -> AblatedCheXWorld:
    """Load the world of a run with Table 3's switches. Raises BadCheckpoint."""
    checkpoint = load_checkpoint(path)
    try:
        config = {k: v for k, v in checkpoint["config"].items() if k != "raw_action"}
        world = AblatedCheXWorld(**config)
        world.load_state_dict(checkpoint["world"])
    except UNFIT as error:
        raise BadCheckpoint(f"{path}: not a run of lab.ablation ({brief(error)})") from None
    return world


@dataclasses.dataclass
class Config:
    data: str = flag(None, "folder of films [2,000 synthetic ones, drawn once into --out]")
    probe: str = flag(
        None,
        "CSV tables filename,label,patient_id,split joined by commas: linear probe and fine-tuning [the synthetic films' own]",
    )
    patients: str = flag(None, "CSV filename,patient_id, as in pretrain.py")
    out: str = flag(None, "folder of the runs and the table [runs/ablation]")
    seeds: int = flag(3, "seeds of every row")
    rows: str = flag(";".join(ROWS), "rows of the table, joined by semicolons")
    flags: str = flag(SMALL, "flags for every run of pretrain.py, in quotes")
    fraction: float = flag(
        0.1, "share of the training films that finetune.py gets; 0 = no fine-tuning"
    )
    finetune: str = flag("", "more flags for every run of finetune.py, in quotes")
    device: str = flag("auto", "auto, cpu, cuda or cuda:1")
    table_only: bool = flag(False, "run nothing: the table of what is finished")


def folder(config, row, seed):
    """Where the runs of one cell live."""
    name = row.replace(" + ", "-").replace(", ", "-").replace(" ", "_").replace("Δ", "delta")
    return Path(config.out) / name / f"seed{seed}"


def stand_in(config, seed):
    """The cell from which the rows without pre-training take their shape and numbers: the first row's."""
    return folder(config, config.rows.split(";")[0].strip(), seed)


def tables(config):
    """The tables of labels to probe and, unless --fraction is 0, to fine-tune on."""
    return config.probe.split(",") if config.probe else []


def same_recipe(config):
    """Keep what the cells rest on in ablation.json; Stop when --out holds another table."""
    path, recipe = (
        Path(config.out) / "ablation.json",
        {
            k: str(getattr(config, k))
            for k in ("data", "probe", "patients", "flags", "fraction", "finetune")
        },
    )
    old = json.loads(path.read_text()) if path.is_file() else recipe
    if changed := [f"{k} {old.get(k)} → {v}" for k, v in recipe.items() if old.get(k) != v]:
        raise UserError(
            f"{config.out} holds a table made otherwise ({'; '.join(changed)}): choose another --out"
        )
    if len({Path(p).stem for p in tables(config)}) < len(tables(config)):
        raise UserError(f"--probe {config.probe}: two tables of one name; rename one")
    write_json(path, recipe)


def finished(path, config):
    """Whether a result.json is there and, of a pre-training run, holds the probe of every table."""
    probes = json.loads(path.read_text()).get("probe") if path.is_file() else {}
    return path.is_file() and (
        probes is None or {Path(p).stem for p in tables(config)} <= probes.keys()
    )


def runs(config, row, seed):
    """The commands of one cell: [(result.json that tells it is finished, words)]"""
    here, script = (
        folder(config, row, seed),
        lambda name: [sys.executable, str(Path(__file__).parents[1] / name)],
    )
    same = ["--data", str(config.data), "--seed", str(seed), "--device", config.device]
    told = [
        word
        for name in ("probe", "patients")
        if getattr(config, name)
        for word in (f"--{name}", getattr(config, name))
    ]
    weights = ["--weights", str(here / "encoder.pt")]
    made = [
        (
            here / "result.json",
            [
                *script("pretrain.py"),
                "--out",
                str(here),
                *same,
                *told,
                *ROWS.get(row, []),
                *shlex.split(config.flags),
            ],
        )
    ]
    if row == SCRATCH:
        made, recipe = [], json.loads((stand_in(config, seed) / "config.json").read_text())
        weights = [
            "--weights",
            "none",
            *(
                word
                for key in ("size", "image", "patch")
                for word in (f"--{key}", str(recipe[key]))
            ),
        ]
    for path in tables(config) if config.fraction else []:
        to = here / f"finetune_{Path(path).stem}"
        made.append(
            (
                to / "result.json",
                [
                    *script("finetune.py"),
                    "--task",
                    "csv",
                    "--labels",
                    path,
                    "--column",
                    "label",
                    "--out",
                    str(to),
                    "--fraction",
                    str(config.fraction),
                    *same,
                    *weights,
                    *shlex.split(config.finetune),
                ],
            )
        )
    return made


def read(config, row, seed):
    """The numbers of one cell, percent → {column: value}; {} while its pre-training (that of the first row, for the rows without any) is unfinished.

    A world that never saw an action is asked without one (the identity, which its policy network took for zeros all along).
    """
    own = row not in (SCRATCH, PIXELS)
    here = folder(config, row, seed) if own else stand_in(config, seed)
    if not finished(here / "result.json", config):
        return {}
    result, recipe = (
        json.loads((here / name).read_text()) for name in ("result.json", "config.json")
    )
    numbers = {
        f"probe {table}": each["pre-trained" if own else row]
        for table, each in result["probe"].items()
    }
    if result["domain"] and row != PIXELS:
        told = "domain" in recipe["tasks"] and not recipe["no_action"]
        numbers["Recall@5"] = result["domain"][
            "random" if not own else "action" if told else "no_action"
        ]["recall@5"]
    for path in folder(config, row, seed).glob("finetune_*/result.json"):
        numbers[f"{config.fraction:.0%} {path.parent.name.removeprefix('finetune_')}"] = json.loads(
            path.read_text()
        )["mean"]
    log = read_log(here / "log.csv") if own else []
    return numbers | ({"RankMe": float(log[-1]["rankme"])} if log else {})


def table(config, rows):
    """Markdown: mean ± standard deviation over the finished seeds of each row, and their number; and the same as a dict."""
    cells = {
        row: [n for seed in range(config.seeds) if (n := read(config, row, seed))]
        for row in [*rows, SCRATCH, PIXELS]
    }
    kind = lambda column: (
        not column.startswith("probe "),
        "% " not in column,
        column,
    )  # probes, then fine-tuning, then the rest
    columns = sorted(
        {column for each in cells.values() for run in each for column in run}, key=kind
    )
    describe = lambda v: {
        "mean": float(np.mean(v)),
        "std": float(np.std(v, ddof=1)) if len(v) > 1 else 0.0,
        "seeds": v,
    }
    result = {
        row: {c: describe(v) for c in columns if (v := [r[c] for r in each if c in r])}
        for row, each in cells.items()
    }
    lines = [
        "| |"
        + "|".join(f" {c} " for c in columns)
        + "| seeds | paper, VinDr 1 % (order partly a guess) |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for row, numbers in result.items():
        shown = [
            f"{numbers[c]['mean']:.1f}"
            + f" ± {numbers[c]['std']:.1f}" * (len(numbers[c]["seeds"]) > 1)
            if c in numbers
            else "–"
            for c in columns
        ]
        lines.append(
            "| "
            + " | ".join(
                [row, *shown, str(len(cells[row])), f"{PAPER[row]:.1f}" if row in PAPER else "–"]
            )
            + " |"
        )
    whole = [row for row in rows if set(result[row]) == set(columns)]
    if len(whole) == len(ROWS):
        alike = [
            f"{agreement([result[r][c]['mean'] for r in whole], [PAPER[r] for r in whole]):+.2f}"
            for c in columns
        ]
        lines.append("| *rank correlation with the paper* | " + " | ".join(alike) + " | | |")
    return "\n".join(lines), result


def agreement(values, others):
    """Spearman's rank correlation of two lists without ties, -1 to 1: 1 = the same order."""
    ranks = [np.argsort(np.argsort(v)) for v in (values, others)]
    return float(np.corrcoef(ranks)[0, 1])


def command(config, device):
    """Table 3 in miniature: run pretrain.py and finetune.py once a row and seed, resumable, and write table.md and result.json of the closing numbers."""
    rows = [row.strip() for row in config.rows.split(";")]
    if unknown := set(rows) - set(ROWS):
        raise UserError(f"--rows {unknown.pop()!r}: any of {'; '.join(ROWS)}")
    if config.seeds < 1 or not 0 <= config.fraction <= 1:
        raise UserError(
            f"--seeds {config.seeds}, --fraction {config.fraction}: at least 1 seed, and a share from 0 to 1, are wanted"
        )
    if not config.data:
        made = Path(config.out) / "phantoms"
        if not (made / "phantoms.csv").is_file():
            phantom.write_phantoms(made, 2000, size=128)
        config.data, config.probe = str(made / "films"), str(made / "phantoms.csv")
    same_recipe(config)
    left = None
    for seed in range(config.seeds):  # a whole table of one seed first
        for row in [*rows, SCRATCH]:
            if config.table_only or row == SCRATCH and not (tables(config) and config.fraction):
                continue
            for done, words in runs(config, row, seed):
                if finished(done, config):
                    continue
                left = [
                    f"{r}, seed {s}"
                    for s in range(config.seeds)
                    for r in rows
                    if not finished(folder(config, r, s) / "result.json", config)
                ]
                print(
                    f"\n{row}, seed {seed}; pre-training left: {'; '.join(left) or 'none'}\n{shlex.join(words)}",
                    flush=True,
                )
                if subprocess.run(words).returncode:
                    raise UserError(
                        f"{row}, seed {seed} failed (above); finished runs are kept, the same command goes on"
                    )
                write(config, rows)
    print(
        ("" if left is not None else "nothing left to run\n")
        + "\n"
        + write(config, rows)
        + f"\n\nmean ± standard deviation over the seeds: {config.out}/table.md, {config.out}/result.json"
    )


def write(config, rows):
    """table.md and result.json of what is finished. → the table"""
    words, result = table(config, rows)
    write_text(Path(config.out) / "table.md", words + "\n")
    write_json(Path(config.out) / "result.json", result)
    return words


if __name__ == "__main__":
    run_script(lambda: run_command(Config, command, "ablation"))
