"""The table that says whether pre-training helped: from scratch, frozen and fully fine-tuned, on your own tables, with all and with few training films.

    python compare.py --weights runs/pretrain/encoder.pt --data FILMS --tables a.csv,b.csv --seeds 3

Every cell is one run of finetune.py in its own folder under --out. The same command goes on where the last one stopped. Writes table.md.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

from model import SIZES
from plumbing.checkpoint import write_text
from plumbing.launch import UserError, flag, parse, run_script
from plumbing.weights import load_encoder


@dataclasses.dataclass
class Config:
    weights: str = flag(None, "encoder.pt of the pre-training run to judge")
    data: str = flag(None, "folder of the films")
    tables: str = flag(
        None,
        "CSV tables (filename,label or filename,mask; see finetune.py --labels), joined by commas",
    )
    out: str = flag("runs/compare", "folder of the runs")
    fractions: str = flag("1,0.1", "shares of the training films, joined by commas")
    seeds: int = flag(3, "seeds of every cell")
    rows: str = flag(
        "scratch,random frozen,pre-trained frozen,pre-trained full", "rows of the table, any subset"
    )


def flags_of(row, weights, shape):
    """The flags of finetune.py that make a row: whose weights, frozen or not."""
    size = next(
        (
            name
            for name, s in SIZES.items()
            if (s["dim"], s["depth"], s["heads"]) == (shape["dim"], shape["depth"], shape["heads"])
        ),
        None,
    )
    if size is None:
        raise UserError(
            f"{weights}: no --size has the shape of this encoder, so it cannot be trained from scratch beside it"
        )
    scratch = [
        "--weights",
        "none",
        "--size",
        size,
        "--image",
        str(shape["image"]),
        "--patch",
        str(shape["patch"]),
    ]
    return (["--weights", str(weights)] if row.startswith("pre-trained") else scratch) + (
        ["--freeze"] if row.endswith("frozen") else []
    )


def main():
    config = parse(Config, __doc__)
    if not (config.weights and config.data and config.tables):
        raise UserError("--weights, --data and --tables are needed; python compare.py --help")
    shape, out, results = load_encoder(config.weights).config, Path(config.out), {}
    columns = [
        (table, fraction)
        for table in config.tables.split(",")
        for fraction in config.fractions.split(",")
    ]
    rows = config.rows.split(",")
    unknown = set(rows) - set(Config.rows.split(","))
    if unknown:
        raise UserError(f"--rows {unknown.pop()!r}: any of {Config.rows}")
    for table, fraction in columns:
        for row in rows:
            folder = out / Path(table).stem / fraction / row.replace(" ", "-")
            command = [
                sys.executable,
                str(Path(__file__).parents[1] / "finetune.py"),
                "--task",
                "csv",
                "--data",
                config.data,
                "--labels",
                table,
                "--out",
                str(folder),
                "--fraction",
                fraction,
                "--seeds",
                str(config.seeds),
                *flags_of(row, config.weights, shape),
            ]
            print(f"\n{Path(table).stem}, {100 * float(fraction):g} % of train, {row}", flush=True)
            if subprocess.run(command).returncode:
                raise UserError(
                    f"{' '.join(command)} failed; the cells before it are kept, the same command goes on"
                )
            results[table, fraction, row] = json.loads((folder / "result.json").read_text())
    titles = [
        f"{Path(t).stem} {results[t, f, rows[0]]['metric']}, {results[t, f, rows[0]]['trained_on'][0]} films"
        for t, f in columns
    ]
    lines = ["| |" + "|".join(f" {t} " for t in titles) + "|", "|---" * (len(titles) + 1) + "|"]
    lines += [
        "| "
        + row
        + " |"
        + "|".join(
            f" {results[t, f, row]['mean']:.1f} ± {results[t, f, row]['std']:.1f} "
            for t, f in columns
        )
        + "|"
        for row in rows
    ]
    write_text(out / "table.md", "\n".join(lines) + "\n")
    print(
        "\n"
        + "\n".join(lines)
        + f"\n\nmean ± standard deviation over {config.seeds} seeds, test films, percent: {out}/table.md"
    )


if __name__ == "__main__":
    run_script(main)
