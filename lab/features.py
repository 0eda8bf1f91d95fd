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

The films are worked through batch by batch, so that memory does not bound how many they are.
"""

import dataclasses
import functools
import math
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

from lab import common
from model import pool_cells
from plumbing.checkpoint import explain_writing, replace_with, write_csv
from plumbing.launch import UserError, flag, run_script
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
    with tempfile.TemporaryDirectory(dir=out, prefix=".features", ignore_cleanup_errors=True) as at:
        make = functools.partial(on_disk, Path(at))
        found, read, unreadable = common.map_films(
            by_encoder, films, numbers, encoder.image, make=make
        )
        names = [films.names[i] for i in read]
        files = write_files(out, names, **found)
        dim = found.pop("mean").shape[1]
        found.clear()  # Windows removes only files that nobody has open
    lines = [f"unreadable: {name}: {reason}" for name, reason in unreadable.items()]
    count = f"{len(names)} films, {len(unreadable)} unreadable; {dim} features each"
    lines.append(f"{count} in {', '.join(f'{out}/{file}' for file in files)}")
    result = {"films": len(names), "unreadable": unreadable, "features": dim}
    common.finish(args, result, "\n".join(lines))


def on_disk(folder: Path, name, shape, dtype):
    """Make an array in a file, since memory may not hold it. UserError on a full disk.

    Its place is taken at once: a disk that fills up later would kill the process without a word.
    """
    size = math.prod(shape) * dtype.itemsize
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"{folder}: {size / 1e9:.1f} GB are wanted, {free / 1e9:.1f} GB are free: "
            "make room there, or choose another --out"
        )
    with explain_writing(folder / name), open(folder / name, "wb") as file:
        if hasattr(os, "posix_fallocate"):  # not on macOS and Windows
            os.posix_fallocate(file.fileno(), 0, size)
    return np.memmap(folder / name, dtype, "r+", shape=shape)


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
