"""The features of films, for a program of your own.

    python -m lab.features --weights runs/pretrain --data FILMS --out features

Each film is seen whole, squeezed to a square. Writes one row per film, as

    features.npz   names (n,), mean (n, D): over all patches, cells (n, 16, D): over each of 4 × 4
                   cells in raster order, a cell being the patches that touch it
    features.csv   filename, then the D numbers of the mean
    result.json    how many films, and the unreadable ones, which have no row, with their reasons

    features = numpy.load("features/features.npz")
"""

import dataclasses
import functools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from lab import common
from plumbing.checkpoint import replace_with
from plumbing.launch import flag, run_script
from plumbing.weights import load_encoder

CELLS = 4  # per side


@dataclasses.dataclass
class Config(common.Common):
    films: int = flag(1000000, "at most so many films, evenly from all")


def main(argv=None):
    args, device = common.start(Config, __doc__, "features", argv)
    encoder = load_encoder(common.find_weights(args.weights), say=print).to(device).eval()
    films, _ = common.open_set(args, 20)
    numbers = common.evenly(common.named(args.table, films), args.films)
    describe_these = functools.partial(describe, encoder)
    found, read, unreadable = common.describe_films(describe_these, films, numbers, encoder.image)
    names = [films.names[i] for i in read]
    mean = found["mean"]
    out = Path(args.out)
    replace_with(out / "features.npz", lambda path: write_npz(path, names, found))
    header = ["filename", *(f"f{k}" for k in range(mean.shape[1]))]
    rows = ([name, *(f"{v:.7g}" for v in row)] for name, row in zip(names, mean, strict=True))
    common.write_csv(out / "features.csv", header, rows)
    lines = [f"unreadable: {name}: {reason}" for name, reason in unreadable.items()]
    count = f"{len(names)} films, {len(unreadable)} unreadable; {mean.shape[1]} features each"
    lines.append(f"{count} in {out}/features.npz and {out}/features.csv")
    result = {"films": len(names), "unreadable": unreadable, "features": mean.shape[1]}
    common.finish(args, result, "\n".join(lines))


@torch.no_grad()
def describe(encoder, images):
    """Mean of the patch features over the film, and over each of 4 × 4 cells of it.

    images (B, 1, H, W) → {mean (B, D), cells (B, 16, D)} float32 NumPy
    """
    tokens = encoder(images.to(next(encoder.parameters()).device)).float()  # (B, N, D)
    maps = tokens.mT.unflatten(2, (encoder.grid, encoder.grid))  # (B, D, n, n)
    cells = F.adaptive_avg_pool2d(maps, CELLS).flatten(2).mT  # (B, 16, D)
    return {"mean": tokens.mean(1).cpu().numpy(), "cells": cells.cpu().numpy()}


def write_npz(path, names, found):
    """Write the arrays to a file of exactly this name."""
    with open(path, "wb") as file:
        np.savez(file, names=np.array(names), **found)


if __name__ == "__main__":
    run_script(main)
