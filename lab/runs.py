"""Pre-training runs side by side: what each recipe ended with, its seeds together.

    python -m lab.runs --runs "runs/small_*,runs/paper_*"

Runs whose settings differ in nothing but the seed are one row of the table. A row is named by the
settings that differ between the rows. It shows Recall@5 of the domain sensitivity test with and
without the action, and for every probed table the AUROC of the mean and of the cells, as mean ±
standard deviation over the seeds. Random weights and raw pixels, which every run judges beside
itself, are rows of their own, and so are runs that --max_steps has cut or that have not ended:
their numbers are called CUT. Where a run has judged all films of a table, cross-validated, that
figure is shown (lab.probe says when), else the one of its test films. Runs of other films or other
tables are not told apart: compare them in calls of their own.

Writes table.md, and runs.csv with every single number, its interval and its seed: also those of
test films that the table does not show, and the differences (column "minus": from what).
"""

import dataclasses
import glob
from pathlib import Path

from lab.ablation import cell_text, markdown, over_seeds
from lab.domain import WAYS
from lab.probe import CELLS, PIXELS, RANDOM
from lab.report import PRETRAINED
from plumbing.checkpoint import read_json, read_log, write_csv, write_text
from plumbing.launch import UserError, flag, parse, run_script

COLUMNS = ("run", "setting", "seed", "what", "films", "features", "minus", "value", "low", "high")
# What may differ between runs of one recipe: where they and their films lie, the seed, what changes
# no number, and --max_steps, of which cut_words tells.
NOT_THE_RECIPE = {"out", "seed", "data", "probe", "device", "workers", "micro"}
NOT_THE_RECIPE |= {"log_every", "save_every", "checkpointing", "compile", "max_steps"}


@dataclasses.dataclass
class Config:
    runs: str = flag("runs/*", "folders of runs, joined by commas; * and ? stand for any name")
    out: str = flag("runs/compared", "folder of table.md and runs.csv")


def main(argv=None):
    args = parse(Config, __doc__, argv, prog="python -m lab.runs")
    runs = find_runs(args.runs)
    configs = {run: read_json(run / "config.json") for run in runs}
    settings = name_settings(configs)
    for run in runs:
        settings[run] += cut_words(run, configs[run])
    rows = [row for run in runs for row in rows_of_run(run, settings[run])]
    table = lay_out(rows)
    write_csv(Path(args.out) / "runs.csv", COLUMNS, [list(row.values()) for row in rows])
    write_text(Path(args.out) / "table.md", table + "\n")
    print(table)
    print(f"\n{len(runs)} runs: {args.out}/table.md, every number in {args.out}/runs.csv")


def find_runs(patterns: str) -> list[Path]:
    """Find the finished runs that the patterns name. UserError when there is none."""
    found = [path for pattern in patterns.split(",") for path in sorted(glob.glob(pattern))]
    runs = [Path(path) for path in dict.fromkeys(found)]
    finished = [run for run in runs if read_json(run / "result.json").get("domain") is not None]
    for run in runs:
        if run not in finished:
            print(f"left out: {run}, which holds no result.json of a finished pre-training")
    if not finished:
        raise UserError(f"--runs {patterns}: no finished run of pretrain.py there")
    return finished


def name_settings(configs: dict[Path, dict]) -> dict[Path, str]:
    """Name every run by the settings in which the runs differ, such as "batch 8, lr 0.001"."""
    keys = dict.fromkeys(key for config in configs.values() for key in config)
    telling = []
    for key in keys:
        values = {repr(config.get(key)) for config in configs.values()}
        if key not in NOT_THE_RECIPE and len(values) > 1:
            telling.append(key)
    names = {}
    for run, config in configs.items():
        words = [f"{key} {config.get(key)}" for key in telling]
        names[run] = ", ".join(words) or "all alike"
    return names


def cut_words(run: Path, config: dict) -> str:
    """Say that a run was judged before the end of its schedule; "" where it was not.

    It may have been resumed since: then its log has come further than its result.json.
    """
    log = read_log(run / "log.csv")
    last = log[-1] if log else {}
    if not last.get("epoch"):
        return ""
    step = int(last["step"])
    total = config["epochs"] * round(step / float(last["epoch"]))
    judged = read_json(run / "result.json").get("step") or step  # older ones do not tell
    return f", CUT at step {judged:,} of {total:,}" if judged < total else ""


def rows_of_run(run: Path, setting: str) -> list[dict]:
    """Every number that a run ended with, one row each."""
    result = read_json(run / "result.json")
    found = []  # what, on which films, of which features, minus which, value, interval
    domain = result["domain"]
    for way in ("action", "no_action"):
        if way in domain:
            interval = domain.get("intervals", {}).get(way, {}).get("recall@5")  # older: none
            found.append(("Recall@5", "", WAYS[way], "", domain[way]["recall@5"], interval))
    for table, parts in result.get("probe_intervals", {}).items():
        for films, judged in parts.items():
            found += [(table, films, *numbers) for numbers in numbers_of(judged)]
    log = read_log(run / "log.csv")
    for column in ("loss", "rankme", "images"):
        values = [row[column] for row in log if row.get(column)]
        if values:
            found.append((column, "", "at the end", "", float(values[-1]), None))
    seed = read_json(run / "config.json")["seed"]
    rows = []
    for *cells, interval in found:
        cells = (run.name, setting, seed, *cells, *(interval or ("", "")))
        rows.append(dict(zip(COLUMNS, cells, strict=True)))
    return rows


def numbers_of(judged: dict):
    """What lab.probe.judge says. → (features, minus which, value, interval) of every number"""
    for features, value in judged["values"].items():
        yield features, "", value, judged["intervals"][features]
        for other, told in judged.get("differences", {}).get(features, {}).items():
            yield features, other, told["difference"], told["interval"]


def lay_out(rows: list[dict]) -> str:
    """Lay the numbers out: one line per setting, below those of random weights and raw pixels."""
    rows = shown(rows)
    tables = list(dict.fromkeys(row["what"] for row in rows if row["films"]))
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    small, large = PIXELS
    lines = [["", "seeds", *(f"{table}, mean / cells" for table in tables), "Recall@5"]]
    # Every run judges pixels and random weights beside itself: equal ones are one measurement.
    pixels = {(row["what"], row["features"], row["value"]): row for row in rows}.values()
    pixels = [pair(pixels, table, small, large) for table in tables]
    lines.append([f"{small} / {large}", "–", *pixels, "–"])
    random = [row for row in rows if row["features"] in (RANDOM, RANDOM + CELLS)]
    for shape in dict.fromkeys(shape_of(row["setting"]) for row in random):
        own = [row for row in random if shape_of(row["setting"]) == shape]
        own = {(row["what"], row["features"], row["seed"]): row for row in own}.values()
        seeds = count_seeds(own)
        cells = [pair(own, table, RANDOM, RANDOM + CELLS, seeds=seeds) for table in tables]
        lines.append([", ".join(filter(None, (RANDOM, shape))), str(seeds), *cells, "–"])
    for setting in settings:
        own = [row for row in rows if row["setting"] == setting]
        seeds = count_seeds(own)
        probes = [pair(own, table, PRETRAINED, PRETRAINED + CELLS, seeds=seeds) for table in tables]
        recall = pair(own, "Recall@5", WAYS["action"], WAYS["no_action"], seeds=seeds)
        lines.append([setting, str(seeds), *probes, recall])
    return markdown(lines)


def shown(rows: list[dict]) -> list[dict]:
    """The numbers that the table shows: no differences, and of a run that has judged all films of a
    table not those of its test films.
    """

    def table_of(row):
        return row["run"], row["setting"], row["seed"], row["what"]

    has_all = {table_of(row) for row in rows if row["films"] == "all"}
    own = [row for row in rows if not row["minus"]]
    return [row for row in own if row["films"] != "test" or table_of(row) not in has_all]


def shape_of(setting: str) -> str:
    """The part of a setting that tells the network and its input: each has random weights of its
    own.
    """
    parts = [part for part in setting.split(", ") if part.startswith(("size ", "image ", "patch "))]
    return ", ".join(parts)


def pair(rows: list[dict], what: str, *features: str, seeds: int | None = None) -> str:
    """Two numbers of one table as they stand in a cell, each over the seeds that have it.

    seeds: those of the row, to tell where some have no number, or an undefined one (None).
    """
    texts = []
    for name in features:
        chosen = [row for row in rows if (row["what"], row["features"]) == (what, name)]
        values = [row["value"] for row in chosen if row["value"] is not None]
        texts.append(cell_text(over_seeds(values) if values else None, seeds))
    return " / ".join(texts)


def count_seeds(rows) -> int:
    """How many seeds these numbers are of."""
    return len({row["seed"] for row in rows})


if __name__ == "__main__":
    run_script(main)
