"""How good did a pre-training become? Its closing table, on films that it held out.

Not a program: the last act of pretrain.py. It writes result.json (domain sensitivity test and
linear probes, in percent) and curve.png into the folder of the run, and prints both tables.
"""

import numpy as np
import torch
from tqdm import tqdm

from lab.common import describe_films, evenly, pooled, read_whole
from lab.domain import domain_test, result_table
from model import ViT
from plumbing import pictures
from plumbing.checkpoint import read_log, write_json
from plumbing.metrics import linear_probe, mean_auroc

DOMAIN_FILMS = 50  # at most so many held-out films in the domain sensitivity test


def closing(args, out, world, films, held, tables, device):
    """Judge a trained CheXWorld on films it has not seen: by the domain sensitivity test, and by
    linear probes against random weights and raw pixels.

    args: those of pretrain.py; held: numbers of the held-out films; tables: the Labels to probe.
    """
    world.eval()
    result = {"domain": domain_part(world, films, held), "probe": {}}
    write_json(out / "result.json", result)  # kept when a probe fails or is interrupted
    torch.manual_seed(args.seed)
    fresh = ViT(**world.encoder.config).to(device).eval()
    encoders = {"pre-trained": world.target_encoder, "random initialisation": fresh}
    for table in tables:
        scores = probe_table(table, films, encoders, args.image)
        result["probe"][table.path.stem] = scores
        result.setdefault("notes", {})[table.path.stem] = table.notes
        print(probe_words(table, scores))
    write_json(out / "result.json", result)
    curves = curves_picture(read_log(out / "log.csv"), world.LOSSES)
    pictures.save_or_warn(curves, out / "curve.png")
    print(
        f"curves {out}/curve.png, views {out}/views.png, weights {out}/encoder.pt, "
        f"all numbers {out}/result.json"
    )


def domain_part(world, films, held):
    """Run and print the domain sensitivity test on held-out films. → its result, {} without any"""
    if world.pixels == 1:
        print("\nno domain sensitivity test: --pixels 1 trains no prediction of features")
        return {}
    images, _, _ = read_whole(films, evenly(held, DOMAIN_FILMS), world.encoder.image)
    if not len(images):
        return {}
    result = domain_test(world, images)
    print(f"\nheld-out films: {result_table(result)}")
    return result


def probe_table(labels, films, encoders, size):
    """Ask how much a linear probe finds in the pooled features of each {name: ViT}, and in raw
    pixels. → {name: AUROC on the test split, percent, mean over classes}
    """
    where = labels.locate(films)
    present = where[where >= 0]
    words = f"films of {labels.path.stem}"
    print(f"linear probe on {labels.path.stem}: {len(present):,} films", flush=True)

    def describe(images):
        return {name: pooled(encoder, images).numpy() for name, encoder in encoders.items()}

    def flat(images):
        return {"raw 64² pixels": images.flatten(1).numpy()}

    features, read, _ = describe_films(describe, films, present, size, words, batch=128)
    features |= describe_films(flat, films, read, 64, words)[0]
    keep = np.isin(where, read)
    y = labels.y[keep]
    split = labels.split[keep]
    bar = tqdm(features.items(), "probes", unit=" probe", leave=False)
    return {name: probe_auroc(x, y, split) for name, x in bar}


def probe_auroc(x, y, split):
    """Fit on train, choose on val, score on test. x (n, D), y (n, classes), split (n,) → percent

    None when no class has positive and negative films to be tested on.
    """
    fit = split == "train"
    val = split == "val"
    test = split == "test"
    scores = linear_probe(x[fit], y[fit], x[val], y[val], x[test])
    value = 100 * mean_auroc(scores, y[test])[0]
    return None if np.isnan(value) else value


def probe_words(table, scores):
    """The result of probe_table in words. → text"""
    title = f"linear probe on {table.path.stem} ({', '.join(table.classes)}), test AUROC, percent"
    lines = [title]
    for name, value in scores.items():
        lines.append(f"  {name:22s}  " + ("undefined" if value is None else f"{value:6.2f}"))
    return "\n".join(lines)


def column(rows, key):
    """A column of log.csv where it is filled. → (steps, values)"""
    filled = [row for row in rows if row.get(key)]
    return [float(row["step"]) for row in filled], [float(row[key]) for row in filled]


def curves_picture(rows, losses):
    """Draw the losses of these names, and RankMe, of a log against its steps."""
    losses = {name: column(rows, name) for name in losses}
    losses = {name: curve for name, curve in losses.items() if curve[0]}
    rank = {"RankMe": column(rows, "rankme")}
    title = "RankMe of the pooled target features"
    return pictures.stack(
        [
            pictures.curves(losses, "loss terms", "step", "squared error"),
            pictures.curves(rank, title, "step", "effective rank"),
        ]
    )
