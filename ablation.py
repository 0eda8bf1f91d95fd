"""Table 3 in miniature: the world modelling tasks one by one, without Δ, without the action, not unified; several seeds of each.

Every cell is one run of pretrain.py with its own folder; what is finished is not run again, what was interrupted goes on.
"""
import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

import runtime
from runtime import Stop, flag

ROWS = {
    "local": ["--tasks", "local"],
    "global": ["--tasks", "global"],
    "domain": ["--tasks", "domain"],
    "local + global": ["--tasks", "local,global"],
    "local + domain": ["--tasks", "local,domain"],
    "full": [],
    "full, no Δ": ["--no_delta"],
    "full, no action": ["--no_action"],
    "full, not unified": ["--not_unified"],
}


@dataclasses.dataclass
class Config:
    out: str = flag(None, "folder of the runs and the table [runs/ablation]")
    seeds: int = flag(3, "seeds of every row")
    rows: str = flag(";".join(ROWS), "rows of the table, joined by semicolons")
    flags: str = flag("", "flags for every run of pretrain.py, in quotes: \"--data FILMS --probe TABLE.csv --size tiny --epochs 20\" [the demo]")
    device: str = flag("auto", "auto, cpu, cuda or cuda:1")
    table_only: bool = flag(False, "run nothing: the table of what is finished")


def folder(config, row, seed):
    """Where the run of one cell lives."""
    name = row.replace(" + ", "-").replace(", ", "-").replace(" ", "_").replace("Δ", "delta")
    return Path(config.out) / name / f"seed{seed}"


def read(path):
    """The closing numbers of a finished run, percent → {column: value}; None while it is unfinished.

    A world that never saw an action is asked without one (the identity, which its policy network took for zeros all along).
    """
    if not (path / "result.json").is_file():
        return None
    result = json.loads((path / "result.json").read_text())
    numbers = {f"probe {table}": row["pre-trained"] for table, row in result["probe"].items()}
    if result["domain"]:
        recipe = json.loads((path / "config.json").read_text())
        told = "domain" in recipe["tasks"] and not recipe["no_action"]
        numbers["Recall@5"] = result["domain"]["action" if told else "no_action"]["recall@5"]
    log = runtime.read_log(path / "log.csv")
    return numbers | ({"RankMe": float(log[-1]["rankme"])} if log else {})


def table(config, rows):
    """Markdown: mean ± standard deviation over the finished seeds of each row, and their number; and the same as a dict."""
    cells = {row: [n for seed in range(config.seeds) if (n := read(folder(config, row, seed)))] for row in rows}
    columns = list(dict.fromkeys(column for runs in cells.values() for run in runs for column in run))
    describe = lambda v: {"mean": float(np.mean(v)), "std": float(np.std(v, ddof=1)) if len(v) > 1 else 0.0, "seeds": v}
    result = {row: {c: describe(v) for c in columns if (v := [r[c] for r in runs if c in r])} for row, runs in cells.items()}
    lines = ["| |" + "|".join(f" {c} " for c in columns) + "| seeds |", "|---" * (len(columns) + 2) + "|"]
    for row, numbers in result.items():
        shown = [f"{numbers[c]['mean']:.1f} ± {numbers[c]['std']:.1f}" if c in numbers else "–" for c in columns]
        lines.append("| " + " | ".join([row, *shown, str(len(cells[row]))]) + " |")
    return "\n".join(lines), result


def command(config, device):
    """Run pretrain.py once a row and seed, resumable, and write table.md and result.json of the closing numbers."""
    rows = [row.strip() for row in config.rows.split(";")]
    if unknown := set(rows) - set(ROWS):
        raise Stop(f"--rows {unknown.pop()!r}: any of {'; '.join(ROWS)}")
    if config.seeds < 1:
        raise Stop(f"--seeds {config.seeds}: at least 1")
    cells = [(row, seed) for seed in range(config.seeds) for row in rows]                         # a whole table of one seed first
    left = [cell for cell in cells if read(folder(config, *cell)) is None]
    words = ", left: " + "; ".join(f"{row} (seed {seed})" for row, seed in left) if left else ""
    print(f"{len(cells) - len(left)} of {len(cells)} runs finished{words}", flush=True)
    for k, (row, seed) in enumerate([] if config.table_only else left):
        run = [sys.executable, str(Path(__file__).with_name("pretrain.py")), "--out", str(folder(config, row, seed)), "--seed", str(seed),
               "--device", config.device, *ROWS[row], *shlex.split(config.flags)]
        print(f"\nrun {k + 1} of {len(left)}: {row}, seed {seed}\n{shlex.join(run)}", flush=True)
        if subprocess.run(run).returncode:
            raise Stop(f"{row}, seed {seed} failed (above); finished runs are kept, the same command goes on")
        write(config, rows)
    print("\n" + write(config, rows) + f"\n\nmean ± standard deviation over the seeds: {config.out}/table.md, {config.out}/result.json")


def write(config, rows):
    """table.md and result.json of what is finished. → the table"""
    words, result = table(config, rows)
    runtime.write_text(Path(config.out) / "table.md", words + "\n")
    runtime.write_json(Path(config.out) / "result.json", result)
    return words
