"""Which part of the method helps, and does pre-training help at all?

    python -m lab.ablation                    # Table 3 in miniature, on synthetic films: hours
    python -m lab.ablation --data /cxr --probe labels.csv --flags "--recipe small" --seeds 3
    python -m lab.ablation train --tasks local,domain --no_delta --data /cxr    # one ablated run
    python -m lab.ablation compare --weights runs/pretrain/encoder.pt --data FILMS --tables a.csv

Without a word: one pre-training run per row and seed, linear probes, and fine-tuning on a tenth of
the films; two rows without pre-training stand below. train takes pretrain.py's flags and Table 3's
switches. compare fine-tunes on your own tables: from scratch, frozen and in full, with all and with
few films; --shots 10,20,40,80 also draws the curve over films per class, curve.png. Every run has
its own folder below --out, which also receives table.md; once all have finished, that of compare
ends with the differences from scratch on the same test films, each with a 95 % interval over test
patients and seeds. The same command again resumes: what is finished is not run again. Without a
word --out also receives result.json.
"""

import dataclasses
import functools
import itertools
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import pretrain
from lab.domain import GRID
from lab.probe import bounds, in_percent, word
from model import SIZES, CheXWorld, error_per_view, swap_views, take
from plumbing import checkpoint, launch, metrics, phantom, pictures, results
from plumbing.keys import SEED_DRAWS, numpy_rng
from plumbing.launch import UserError, flag, parse, run_script
from plumbing.own_table import refuse_twins
from plumbing.table import read_table
from plumbing.weights import load_encoder
from plumbing.words import patient_keys, patient_of

FINETUNE = Path(__file__).parents[1] / "finetune.py"
TASKS = ("local", "global", "domain")


# ---------------------------------------------------------------- the switches of Table 3
class AblatedCheXWorld(CheXWorld):
    """CheXWorld with the switches of Table 3; with all of them at their defaults it is CheXWorld.

    tasks: some of "local,global,domain". Without local nothing is masked; without domain the
    context is the plain view and π is told nothing.
    delta: False does not tell where the other view lies (its own grid instead of φ).
    action: False tells π nothing, while the augmentation stays.
    unified: False asks each task in a forward pass of its own.
    """

    LOSSES = ("l11", "l22", "l12", "l21", "d11", "d22")  # d: domain alone, when not unified

    def __init__(
        self, *args, tasks="local,global,domain", delta=True, action=True, unified=True, **sizes
    ):
        super().__init__(*args, **sizes)
        self.tasks = set(tasks.split(","))
        if self.tasks - set(TASKS):
            raise ValueError(f"tasks must be some of local, global, domain; got {tasks!r}")
        self.delta = delta
        self.action = action
        self.unified = unified
        self.config |= dict(tasks=tasks, delta=delta, action=action, unified=unified)

    def forward(self, y, x, keep, masked, coords, action, asked=None):
        """Compute the losses of the chosen tasks; arguments and result as in CheXWorld.forward."""
        target = self.targets(y)  # (2B, N, D)
        every = torch.arange(len(self.own_coords), device=y.device).expand(len(y), -1)  # (2B, N)
        if not self.action:
            action = None
        ask = self.together if self.unified else self.apart
        losses = ask(target, y, x, keep, masked, every, coords, action, asked)
        losses["loss"] = torch.stack(list(losses.values())).mean()
        return losses, target.mean(1)

    def together(self, target, y, x, keep, masked, every, coords, action, asked):
        """One encoding of each context serves all tasks, as in the paper."""
        if "domain" not in self.tasks:
            x = y
            action = None
        if "local" not in self.tasks:
            keep = masked = every
        context = self.encoder(x, keep)
        losses = {}
        if "local" in self.tasks or "global" not in self.tasks:
            losses["l11"], losses["l22"] = self.within(target, context, keep, masked, action)
        if "global" in self.tasks:
            between = self.between(target, context, keep, coords, action, asked)
            losses["l12"], losses["l21"] = between
        return losses

    def apart(self, target, y, x, keep, masked, every, coords, action, asked):
        """Each task encodes a context of its own: local a masked view, global a whole one, both
        plain; domain a whole view after T_a."""
        losses = {}
        if "local" in self.tasks:
            context = self.encoder(y, keep)
            losses["l11"], losses["l22"] = self.within(target, context, keep, masked, None)
        if "global" in self.tasks:
            context = self.encoder(y)
            between = self.between(target, context, every, coords, None, asked)
            losses["l12"], losses["l21"] = between
        if "domain" in self.tasks:
            context = self.encoder(x)
            losses["d11"], losses["d22"] = self.within(target, context, every, every, action)
        return losses

    def within(self, target, context, keep, masked, action):
        """Eq. (10): each view predicts its own masked patches. → (2,), one loss per view"""
        grid = self.own_coords.expand(len(context), -1, -1)
        guess = self.predictor(context, take(grid, keep), take(grid, masked), action)
        return error_per_view(guess, take(target, masked))

    def between(self, target, context, keep, coords, action, asked):
        """Eq. (11): each view predicts the other one's patches. → (2,), one loss per view"""
        grid = self.own_coords.expand(len(context), -1, -1)
        wanted_at = take(coords if self.delta else grid, asked)
        guess = self.predictor(context, take(grid, keep), wanted_at, action)
        return error_per_view(guess, take(swap_views(target), asked))


@dataclasses.dataclass
class TrainConfig(pretrain.Config):
    recipe: str = flag(
        None,
        "as in pretrain.py, whatever the number of films [paper; demo without --data]",
        ["paper", "small", "demo"],
    )
    out: str = flag("runs/ablated", "folder of the run")
    tasks: str = flag("local,global,domain", "world modelling tasks, any subset (Table 3)")
    no_delta: bool = flag(False, "do not tell the relative position Δ: the view's own grid, not φ")
    no_action: bool = flag(False, "do not tell the policy network the action a; T_a stays")
    not_unified: bool = flag(False, "a separate forward pass for each task")


def train(args: TrainConfig) -> None:
    """Pre-train one ablated world: pretrain.py with the switches of Table 3."""
    if not set(args.tasks.split(",")) <= set(TASKS):
        raise UserError(f"--tasks {args.tasks}: any of {','.join(TASKS)}, joined by commas")
    for name in ("pixels", "weights"):
        if getattr(args, name):
            raise UserError(f"--{name}: only pretrain.py has it, which knows no switch of Table 3")
    Model = functools.partial(
        AblatedCheXWorld,
        tasks=args.tasks,
        delta=not args.no_delta,
        action=not args.no_action,
        unified=not args.not_unified,
    )
    recipe = args.recipe or ("paper" if args.data else "demo")
    pretrain.main(dataclasses.replace(args, recipe=recipe, pixels=0.0), Model)


# ---------------------------------------------------------------- a grid of runs
class Run(NamedTuple):
    """One command of a grid. title: what the user reads. is_finished: whether it need not run."""

    title: str
    command: list[str]
    is_finished: Callable[[], bool]


def run_grid(runs: Iterable[Run], write_table: Callable[[], str]) -> None:
    """Start the runs of a grid that have not finished, one after the other.

    A generator of runs looks what is finished when it comes to it. The table is written after every
    run. Raises UserError when a run fails.
    """
    is_complete = True
    for run in runs:
        if run.is_finished():
            continue
        is_complete = False
        print(f"\n{run.title}\n{shlex.join(run.command)}", flush=True)
        if run_and_wait(run.command) or not run.is_finished():
            raise UserError(
                f"{run.title} did not finish (above); what is done is kept, this command resumes"
            )
        write_table()
    if is_complete:
        print("nothing left to run")


def run_and_wait(command: list[str]) -> int:
    """Run a command; asked to end, wait until it has saved. → its exit code"""
    process = subprocess.Popen(command)
    try:
        return process.wait()
    except KeyboardInterrupt:  # SIGTERM and its like, too
        process.terminate()  # where the signal came to this process alone
        process.wait()
        raise


def take_folder(out, grid: str) -> None:
    """Lock the folder of a grid before anything is drawn into it. UserError when it is in use, or
    holds what another program has written.

    grid: the file that says what its runs rest on, see checkpoint.GRIDS
    """
    checkpoint.refuse_other_program(out, checkpoint.GRIDS[grid])
    checkpoint.lock(out)


def keep_recipe(path: Path, recipe: dict, tables: list[str]) -> None:
    """Write down what all runs of a grid rest on. UserError when the folder holds another grid.

    tables: CSVs, of which others may come later. Of each the content is compared, so that numbers
    of a table are not taken for those of a corrected one.
    """
    recipe = {key: str(value) for key, value in recipe.items()}
    contents = {}
    for table in map(Path, tables):
        if table.is_file():  # else the first run says so
            contents[f"content of {table.name}"] = checkpoint.digest(table.read_bytes())
    saved = checkpoint.read_json(path)
    if saved:
        known = {name: saved.pop(name) for name in list(saved) if name.startswith("content of ")}
        shared = known.keys() & contents.keys()
        now = recipe | {name: contents[name] for name in shared}
        checkpoint.refuse_other_recipe(path.parent, saved | {n: known[n] for n in shared}, now)
        contents = known | contents
    checkpoint.write_json(path, recipe | contents)


def finetune_command(data, table, out, flags) -> list[str]:
    """The command that fine-tunes on one table of labels or masks."""
    words = [sys.executable, FINETUNE, "--task", "csv", "--data", data, "--labels", table]
    return [str(word) for word in [*words, "--out", out, *flags]]


def over_seeds(values: list[float]) -> dict:
    """Mean and standard deviation over the seeds of a cell; of one seed the latter is None."""
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "seeds": values}


def cell_text(cell: dict | None, seeds: int | None = None) -> str:
    """A cell as it stands in the table; a dash where there is none.

    seeds: those of its row, to tell where some have no value here.
    """
    if not cell:
        return "–"
    count = len(cell["seeds"])
    spread = f" ± {cell['std']:.1f}" if count > 1 else ""
    lacking = f" ({count} of {seeds} seeds)" if seeds and count < seeds else ""
    cut = "CUT " if cell.get("is_cut") else ""
    return f"{cut}{cell['mean']:.1f}{spread}{lacking}"


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table; the first row holds the titles."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows)


def choose_rows(asked: str, known: Iterable[str], separator: str) -> list[str]:
    """The rows that --rows asks for. UserError on an unknown one."""
    rows = [row.strip() for row in asked.split(separator)]
    for row in rows:
        if row not in known:
            raise UserError(f"--rows {row!r}: any of {separator.join(known)}")
    return rows


# ---------------------------------------------------------------- Table 3 in miniature
ROWS = {  # in the order of the paper's table: flags of `lab.ablation train`
    "local": ["--tasks", "local"],
    "local + global": ["--tasks", "local,global"],
    "local + domain": ["--tasks", "local,domain"],
    "full": [],
    "full, not unified": ["--not_unified"],
    "full, no action": ["--no_action"],
    "full, no Δ": ["--no_delta"],
}
# AUROC on VinDr with 1 % of the labels (Table 3). Partly a guess: our copy does not show which
# switch rows 5 to 7 miss nor the pair of row 2. Sec. 5.3 says that Δ untold costs most.
PAPER = {
    "local": 84.71,
    "local + global": 88.31,
    "local + domain": 89.73,
    "full": 90.53,
    "full, not unified": 89.12,
    "full, no action": 89.91,
    "full, no Δ": 87.60,
}
SCRATCH = "random initialisation"
PIXELS = "raw 64² pixels"
SMALL = (  # some minutes per run on one core
    "--size tiny --image 96 --patch 16 --batch 16 --epochs 15 --warmup 1 --lr 1.5e-3 --ema 0.99"
)


@dataclasses.dataclass
class Config:
    data: str = flag(None, "folder of films [2,000 synthetic ones, drawn once into --out]")
    probe: str = flag(
        None, "CSV tables to probe and fine-tune on, as in pretrain.py [phantoms' own]"
    )
    patients: str = flag(None, "CSV filename,patient_id, as in pretrain.py")
    out: str = flag("runs/ablation", "folder of the runs and the table")
    seeds: int = flag(3, "seeds of every row")
    rows: str = flag(";".join(ROWS), "rows of the table, joined by semicolons")
    flags: str = flag(SMALL, "flags for every pre-training run, in quotes")
    fraction: float = flag(0.1, "share of the training films to fine-tune on; 0 = no fine-tuning")
    finetune: str = flag("", "more flags for every run of finetune.py, in quotes")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1 or mps")


def rows_of(config: Config) -> list[str]:
    """The wanted rows of the table."""
    return choose_rows(config.rows, ROWS, ";")


def tables_of(config: Config) -> list[str]:
    """The tables of labels to probe and, unless --fraction is 0, to fine-tune on."""
    return config.probe.split(",") if config.probe else []


def folder(config: Config, row: str, seed: int) -> Path:
    """Where the runs of one row and seed live."""
    name = row.replace(" + ", "-").replace(", ", "-").replace(" ", "_").replace("Δ", "delta")
    return Path(config.out) / name / f"seed{seed}"


def stand_in(config: Config, seed: int) -> Path:
    """The run from which the rows without pre-training take shape and probes: the first row's."""
    return folder(config, rows_of(config)[0], seed)


def is_pretrained(config: Config, path: Path) -> bool:
    """Whether a pre-training run has finished and has probed every table."""
    probed = checkpoint.read_json(path / "result.json").get("probe")
    return probed is not None and all(Path(table).stem in probed for table in tables_of(config))


def table3_runs(config: Config) -> Iterable[Run]:
    """Every run of the grid, all rows of one seed before the next seed."""
    for seed in range(config.seeds):
        for row in rows_of(config):
            yield pretraining(config, row, seed)
            encoder = folder(config, row, seed) / "encoder.pt"
            yield from finetunings(config, row, seed, ["--weights", encoder])
        recipe = checkpoint.read_json(stand_in(config, seed) / "config.json")
        scratch = ["--weights", "none", "--size", recipe["size"]]
        scratch += ["--image", recipe["image"], "--patch", recipe["patch"]]
        yield from finetunings(config, SCRATCH, seed, scratch)


def pretraining(config: Config, row: str, seed: int) -> Run:
    """The pre-training run of one row and seed."""
    out = folder(config, row, seed)
    words = [sys.executable, "-m", "lab.ablation", "train", *ROWS[row], "--out", str(out)]
    words += ["--data", config.data, "--seed", str(seed), "--device", config.device]
    if config.probe:
        words += ["--probe", config.probe]
    if config.patients:
        words += ["--patients", config.patients]
    words += shlex.split(config.flags)
    return Run(f"{row}, seed {seed}", words, lambda: is_pretrained(config, out))


def finetunings(config: Config, row: str, seed: int, weights: list) -> Iterable[Run]:
    """The fine-tuning runs of one row and seed, one per table."""
    if not config.fraction:
        return
    flags = ["--fraction", config.fraction, "--seed", seed, "--device", config.device]
    flags += [*weights, *shlex.split(config.finetune)]
    for table in tables_of(config):
        out = folder(config, row, seed) / f"finetune_{Path(table).stem}"
        command = finetune_command(config.data, table, out, flags)
        title = f"{row}, seed {seed}, fine-tuned on {Path(table).stem}"
        yield Run(title, command, (out / "result.json").is_file)


def read_numbers(config: Config, row: str, seed: int) -> dict[str, float]:
    """The numbers of one row and seed, percent → {column: value}; {} while it is not pre-trained.

    What is undefined is left out. The rows without pre-training take theirs from the first row's
    run.
    """
    has_run = row in ROWS
    source = folder(config, row, seed) if has_run else stand_in(config, seed)
    if not is_pretrained(config, source):
        return {}
    result = checkpoint.read_json(source / "result.json")
    way = "pre-trained" if has_run else row
    numbers = {f"probe {table}": scores[way] for table, scores in result["probe"].items()}
    for table in map(Path, tables_of(config)):
        here = folder(config, row, seed) / f"finetune_{table.stem}"
        tuned = checkpoint.read_json(here / "result.json")
        if tuned:
            numbers[f"{config.fraction:.0%} {table.stem}"] = tuned["mean"]
    if result["domain"] and row != PIXELS:
        way = domain_row(source) if has_run else "random"
        numbers["Recall@5"] = result["domain"][way]["recall@5"]
    log = checkpoint.read_log(source / "log.csv")
    if has_run and log:
        numbers["RankMe"] = float(log[-1]["rankme"])
    return {column: value for column, value in numbers.items() if value is not None}


def domain_row(source: Path) -> str:
    """Which line of the domain test counts: a world that was never told an action is asked without.

    Its policy network took the identity for zeros all along.
    """
    recipe = checkpoint.read_json(source / "config.json")
    is_told = "domain" in recipe["tasks"] and not recipe["no_action"]
    return "action" if is_told else "no_action"


def write_table3(config: Config) -> str:
    """Write table.md and result.json of what is finished. → the table

    Mean ± standard deviation over the finished seeds of each row, and their number.
    """
    numbers = {}
    for row in [*rows_of(config), SCRATCH, PIXELS]:
        each = [read_numbers(config, row, seed) for seed in range(config.seeds)]
        numbers[row] = list(filter(None, each))
    columns = {}  # in the order of the first row that has them
    for found in itertools.chain(*numbers.values()):
        columns |= dict.fromkeys(found)
    result = {}
    for row, each in numbers.items():
        values = {column: [n[column] for n in each if column in n] for column in columns}
        result[row] = {column: over_seeds(v) for column, v in values.items() if v}
    lines = [["", *columns, "seeds", "paper, VinDr 1 % (order partly a guess)"]]
    for row, cells in result.items():
        shown = [cell_text(cells.get(column), len(numbers[row])) for column in columns]
        paper = f"{PAPER[row]:.1f}" if row in PAPER else "–"
        lines.append([row, *shown, str(len(numbers[row])), paper])
    words = f"{markdown(lines)}\n\nRecall@5: domain sensitivity test, candidates {GRID}"
    checkpoint.write_text(Path(config.out) / "table.md", words + "\n")
    checkpoint.write_json(Path(config.out) / "result.json", result)
    return words


def table3(config: Config) -> None:
    """Run Table 3 in miniature: every row with every seed, then print the table."""
    rows_of(config)
    if not 0 <= config.fraction <= 1:
        raise UserError(f"--fraction {config.fraction}: a share from 0 to 1 is wanted")
    take_folder(config.out, "ablation.json")
    if not config.data:
        made = Path(config.out) / "phantoms"
        if not (made / "phantoms.csv").is_file():
            phantom.write_phantoms(made, 2000, size=128)
        table = str(made / "phantoms.csv")
        config = dataclasses.replace(config, data=str(made / "films"), probe=table)
    refuse_twins("--probe", tables_of(config))
    keys = ("data", "probe", "patients", "flags", "fraction", "finetune")
    recipe = {key: getattr(config, key) for key in keys}
    keep_recipe(Path(config.out) / "ablation.json", recipe, tables_of(config))
    run_grid(table3_runs(config), lambda: write_table3(config))
    words = write_table3(config)
    print(f"\n{words}\n\nmean ± standard deviation over the seeds: {config.out}/table.md, ", end="")
    print(f"{config.out}/result.json")


# ---------------------------------------------------------------- did pre-training help?
COMPARED = "scratch,random frozen,pre-trained frozen,pre-trained full"


class Column(NamedTuple):
    """A column of the comparison: a table, and how many of its training films are used.

    flag: fraction, a share of the films, alike for all seeds; or shots, films per class, drawn anew
    for every seed, alike for all rows. value: as the user wrote it.
    """

    table: str
    flag: str
    value: str

    @property
    def words(self) -> str:
        """The column in words, for the user."""
        if self.flag == "shots":
            return f"{Path(self.table).stem}, {self.value} films per class"
        return f"{Path(self.table).stem}, {100 * float(self.value):g} % of train"


@dataclasses.dataclass
class CompareConfig:
    weights: str = flag(None, "encoder.pt of the pre-training run to judge")
    data: str = flag(None, "folder of the films")
    tables: str = flag(None, "CSV tables, each as finetune.py --labels wants it, joined by commas")
    out: str = flag("runs/compare", "folder of the runs")
    fractions: str = flag(None, "shares of the training films, joined by commas [1,0.1]")
    shots: str = flag(
        None,
        "films per class, joined by commas, such as 10,20,40,80: a curve over them, instead of "
        "--fractions or beside it; each seed draws its own films",
    )
    seeds: int = flag(3, "seeds of every cell")
    rows: str = flag(COMPARED, "rows of the table, any subset")
    finetune: str = flag("", "more flags for every run of finetune.py, in quotes")


def weight_flags(row: str, weights: str) -> list[str]:
    """The flags of finetune.py that make a row of the comparison: whose weights, frozen or not."""
    shape = load_encoder(weights).config
    flags = ["--freeze"] if row.endswith("frozen") else []
    if row.startswith("pre-trained"):
        return ["--weights", weights, *flags]
    named = ("dim", "depth", "heads")
    fitting = [n for n, size in SIZES.items() if all(size[k] == shape[k] for k in named)]
    if not fitting:
        raise UserError(
            f"{weights}: no --size has the shape of this encoder, "
            "so it cannot be trained from scratch beside it"
        )
    scratch = ["--weights", "none", "--size", fitting[0]]
    return [*scratch, "--image", shape["image"], "--patch", shape["patch"], *flags]


def numbers_in(flag: str, text: str | None, kind: type, most: int) -> list[str]:
    """The numbers that a flag joins by commas, as they stand there. UserError on any other word."""
    parts = text.split(",") if text else []
    for part in parts:
        try:
            is_fit = 0 < kind(part) <= most
        except ValueError:
            is_fit = False
        if not is_fit:
            numbers = "whole numbers" if kind is int else "numbers"
            raise UserError(f"--{flag} {part}: {numbers} above 0, at most {most:,}, are wanted")
    return parts


def compare_columns(config: CompareConfig) -> list[Column]:
    """The columns of the comparison. UserError when a number of films makes no sense."""
    fractions = config.fractions
    if fractions is None and not config.shots:
        fractions = "1,0.1"
    parts = [("fraction", part) for part in numbers_in("fractions", fractions, float, 1)]
    parts += [("shots", part) for part in numbers_in("shots", config.shots, int, 10**6)]
    tables = config.tables.split(",")
    refuse_twins("--tables", tables)
    return [Column(table, *part) for table in tables for part in parts]


def compare_folders(config: CompareConfig, row: str, column: Column) -> list[Path]:
    """Where the runs of one cell of the comparison live: one for all seeds, or one per draw."""
    here = Path(config.out) / Path(column.table).stem
    name = row.replace(" ", "-")
    if column.flag == "fraction":
        return [here / column.value / name]
    return [here / f"{column.value}_per_class" / name / f"draw{k}" for k in range(config.seeds)]


def compare_runs(config: CompareConfig, row: str, column: Column) -> Iterable[Run]:
    """One cell of the comparison: finetune.py with all seeds, or once per draw."""
    more = [*weight_flags(row, config.weights), *shlex.split(config.finetune)]
    for k, out in enumerate(compare_folders(config, row, column)):
        seeds = config.seeds if column.flag == "fraction" else 1
        seed = ["--seeds", seeds] if column.flag == "fraction" else ["--seed", k, "--draw", k]
        films = [f"--{column.flag}", column.value]
        command = finetune_command(config.data, column.table, out, [*films, *seed, *more])

        def is_finished(out=out, seeds=seeds):
            return len(checkpoint.read_json(out / "result.json").get("seeds", [])) >= seeds

        yield Run(f"{column.words}, {row}", command, is_finished)


def read_cell(config: CompareConfig, row: str, column: Column) -> dict | None:
    """Mean, deviation and value of every seed of a cell, None while nothing of it is finished."""
    folders = compare_folders(config, row, column)
    results = [checkpoint.read_json(out / "result.json") for out in folders]
    results = list(filter(None, results))
    values = [value for result in results for value in result["seeds"]][: config.seeds]
    if not values or None in values:
        return None
    is_cut = any(any(result.get("cut", [])) for result in results)  # by --max_steps
    about = {"metric": results[0]["metric"], "films": results[0]["trained_on"][0]}
    return over_seeds(values) | about | {"is_cut": is_cut}


def read_judged(folder: Path) -> tuple:
    """Read what a finished seed of finetune.py predicted of its test films. folder: the seed's.

    → films, patients, and what results.measure takes: kind, table, targets
    """
    metric = checkpoint.read_json(folder.parent / "result.json")["metric"]
    kind = next(kind for kind, name in results.METRIC.items() if name == metric)
    rows = read_table(folder / "predictions.csv")
    films = [row.pop("film") for row in rows]
    # As in the user's table, where one patient may be spelt in several ways.
    keys = patient_keys([patient_of(row.pop("patient")) for row in rows])
    patients = [key or film for key, film in zip(keys, films, strict=True)]
    values = np.array([[float(cell or "nan") for cell in row.values()] for row in rows])
    if kind == "mask":  # its columns are Dice and whether there is a mask; the loss is not kept
        return films, patients, kind, np.column_stack([values, values[:, 0]]), None
    return films, patients, kind, *np.split(values, 2, axis=1)


def from_scratch(config: CompareConfig, row: str, column: Column) -> str:
    """How far a row lies above scratch on the same test films, and a 95 % interval, in words.

    The difference is the mean over the seeds, each beside the same seed (and draw of films) of
    scratch. The interval is over test patients and seeds: in each redraw the patients are drawn
    anew, for both rows and all seeds alike, and of k seeds k - 1 are drawn with replacement, which
    spreads their mean as much as other seeds would (Rao and Wu, 1988). A dash while something is
    missing.
    """
    judged = {}
    for name in (row, "scratch"):
        folders = compare_folders(config, name, column)  # one for all seeds, or one per seed
        seeds = [folders[k % len(folders)] / f"seed{k}" for k in range(config.seeds)]
        if not all((seed / "result.json").is_file() for seed in seeds):
            return "–"
        judged[name] = [read_judged(seed) for seed in seeds]
    films, patients, *_ = judged[row][0]
    if any(one[0] != films for one in itertools.chain(*judged.values())):
        return "–"  # some seeds could not read all films

    def differences(weights):
        """Weights (n, draws) of the films → (seeds, draws)"""
        values = {
            name: np.stack([results.measure(*about, weights)[:, 0] for _, _, *about in seeds])
            for name, seeds in judged.items()
        }
        return values[row] - values["scratch"]

    rng = numpy_rng(SEED_DRAWS)

    def statistic(weights):
        found = differences(weights)
        chosen = rng.integers(len(found), size=(max(1, len(found) - 1), found.shape[1]))
        return np.take_along_axis(found, chosen, 0).mean(0)[:, None]

    exact = differences(np.ones((len(films), 1))).mean()
    value, interval = in_percent([exact, *metrics.bootstrap(statistic, patients)[0]])
    if interval is None:
        return "–" if value is None else f"{value:+.1f}"
    return f"{value:+.1f} ({bounds(interval)}), {word(interval)}"


def write_comparison(config: CompareConfig, rows: list[str], has_differences=False) -> str:
    """Write table.md of what is finished, and with --shots curve.png. → the text of table.md

    has_differences: whether the second table is made, whose intervals take a while.
    """
    columns = compare_columns(config)
    titles = {column: "–" for column in columns}
    cells = {row: {column: read_cell(config, row, column) for column in columns} for row in rows}
    for column in columns:
        cell = next((cells[row][column] for row in rows if cells[row][column]), None)
        if cell:
            is_shots = column.flag == "shots"
            films = f"{column.value} films per class" if is_shots else f"{cell['films']} films"
            titles[column] = f"{Path(column.table).stem} {cell['metric']}, {films}"
    lines = [[row, *(cell_text(cell) for cell in cells[row].values())] for row in rows]
    words = markdown([["", *titles.values()], *lines])
    if has_differences and "scratch" in rows and len(rows) > 1:
        lines = [["minus scratch", *titles.values()]]
        for row in rows:
            if row != "scratch":
                lines.append([row, *(from_scratch(config, row, column) for column in columns)])
        over = "test patients and seeds" if config.seeds > 1 else "test patients, of one seed"
        words += f"\n\n{markdown(lines)}\n\n95 % intervals over {over}"
    checkpoint.write_text(Path(config.out) / "table.md", words + "\n")
    if config.shots:
        charts = [draw_curve(table, cells) for table in config.tables.split(",")]
        pictures.save_or_warn(pictures.stack(charts), Path(config.out) / "curve.png")
    return words


def draw_curve(table: str, cells: dict):
    """Draw the metric against films per class: a line through the means, every seed a dot."""
    lines = {}
    dots = {}
    metric = ""
    for row, columns in cells.items():
        means = []
        values = []
        for column, cell in columns.items():
            if column.flag == "shots" and column.table == table and cell:
                films = int(column.value)
                means.append((films, cell["mean"]))
                values += [(films, value) for value in cell["seeds"]]
                metric = cell["metric"]
        lines[row] = list(zip(*sorted(means), strict=True)) or ([], [])
        dots[row] = list(zip(*values, strict=True)) or ([], [])
    title = f"{Path(table).stem}: {metric}"
    return pictures.curves(lines, title, "films per class", "percent", dots=dots, room=0.35)


def compare(config: CompareConfig) -> None:
    """Fine-tune every row on every table, with few and with all films; print the table."""
    if not (config.weights and config.data and config.tables):
        raise UserError("--weights, --data and --tables are needed; --help says more")
    rows = choose_rows(config.rows, COMPARED.split(","), ",")
    runs = []
    for column in compare_columns(config):
        for row in rows:
            runs += compare_runs(config, row, column)
    take_folder(config.out, "compare.json")
    recipe = {"weights": checkpoint.digest(Path(config.weights).read_bytes()), "data": config.data}
    if config.finetune:
        recipe["finetune"] = config.finetune
    keep_recipe(Path(config.out) / "compare.json", recipe, config.tables.split(","))
    run_grid(runs, lambda: write_comparison(config, rows))
    words = write_comparison(config, rows, has_differences=True)
    spread = f"mean ± standard deviation over {config.seeds} seeds"
    print(f"\n{words}\n\n{spread}; test films, percent: {config.out}/table.md")
    if config.shots:
        print(f"against films per class: {config.out}/curve.png")


def main(argv=None):
    """Run one of the three commands; argv: the command line without the program."""
    argv = list(sys.argv[1:] if argv is None else argv)
    has_word = argv and not argv[0].startswith("-")
    word = argv.pop(0) if has_word else ""
    commands = {"": (Config, table3), "train": (TrainConfig, train)}
    commands["compare"] = (CompareConfig, compare)
    if word not in commands:
        raise UserError(f"lab.ablation {word}: say train or compare, or nothing for Table 3")
    Flags, run = commands[word]
    doc = __doc__
    if word == "train":
        doc += "\n" + launch.table_of_recipes(pretrain.RECIPES, pretrain.NEWER_DEFAULTS)
    run(parse(Flags, doc, argv, prog=f"python -m lab.ablation {word}".strip()))


if __name__ == "__main__":
    run_script(main)
