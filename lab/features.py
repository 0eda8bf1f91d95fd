"""The features of films, for a program of your own.

    python -m lab.features --weights runs/pretrain --data FILMS --out features

Each film is read whole, squeezed to a square. Writes one row per film, as

    features.npz   names (n,), mean (n, D): over all patches, cells (n, 16, D): over each of 4 × 4
                   cells in raster order, a cell being the patches that touch it
    features.csv   filename, then the D numbers of the mean: f0, f1, ...
    cells.csv      filename, then the 16 D numbers of the cells: c0_f0, c0_f1, ...; only where these
                   are at most 100 million numbers (a gigabyte)
    result.json    of which films and weights, how many films, and the unreadable ones, which have
                   no row, with their reasons

    features = numpy.load("features/features.npz")

All is held in memory until it is written: of a ViT-Base 52 kB per film. What would not fit is
refused after the first films.
"""

import dataclasses
import functools
from pathlib import Path

import numpy as np
import torch

from lab import common
from model import pool_cells
from plumbing.checkpoint import replace_with, write_csv
from plumbing.launch import flag, run_script
from plumbing.weights import load_encoder

LARGEST_CSV = 100_000_000  # numbers; more are for programs, which read features.npz


@dataclasses.dataclass
class Config(common.Common):
    films: int = flag(1000000, "at most so many films, evenly from all")


def main(argv=None):
    args, device = common.start(Config, __doc__, "features", argv)
    encoder = load_encoder(args.weights, say=print).to(device).eval()
    films, _ = common.open_set(args, 20)
    numbers = common.evenly(common.named(args.table, films), args.films)
    out = Path(args.out)
    by_encoder = functools.partial(pool_features, encoder)
    found, read, unreadable = common.map_films(by_encoder, films, numbers, encoder.image)
    names = [films.names[i] for i in read]
    files = write_files(out, names, **found)
    lines = [f"unreadable: {name}: {reason}" for name, reason in unreadable.items()]
    count = f"{len(names)} films, {len(unreadable)} unreadable; {encoder.dim} features each"
    lines.append(f"{count} in {', '.join(f'{out}/{file}' for file in files)}")
    result = {"films": len(names), "unreadable": unreadable, "features": encoder.dim}
    common.finish(args, result, "\n".join(lines))


def write_files(out: Path, names, mean, cells) -> list[str]:
    """Write features.npz, features.csv and, unless it grew too large, cells.csv. → their names"""
    replace_with(out / "features.npz", lambda path: write_npz(path, names, mean, cells))
    count, parts, dim = cells.shape
    tables = {"features.csv": ([f"f{k}" for k in range(dim)], mean)}
    if cells.size <= LARGEST_CSV:
        columns = [f"c{part}_f{k}" for part in range(parts) for k in range(dim)]
        tables["cells.csv"] = columns, cells.reshape(count, -1)
    else:
        (out / "cells.csv").unlink(missing_ok=True)  # of other films
        print(f"no cells.csv, which would hold {cells.size:,} numbers: features.npz has them")
    for file, (columns, table) in tables.items():
        rows = ([name, *(f"{v:.7g}" for v in row)] for name, row in zip(names, table, strict=True))
        write_csv(out / file, ["filename", *columns], rows)
    return ["features.npz", *tables]


@torch.no_grad()
def pool_features(encoder, images):
    """Mean of the patch features over the film, and over each of 4 × 4 cells of it.

    images (B, 1, H, W) → {mean (B, D), cells (B, 16, D)} float32 NumPy
    """
    tokens = encoder(images.to(next(encoder.parameters()).device)).float()  # (B, N, D)
    return {"mean": tokens.mean(1).cpu().numpy(), "cells": pool_cells(tokens).cpu().numpy()}


def write_npz(path, names, mean, cells):
    """Write the arrays to a file of exactly this name."""
    with open(path, "wb") as file:
        np.savez(file, names=np.array(names), mean=mean, cells=cells)


if __name__ == "__main__":
    run_script(main)
