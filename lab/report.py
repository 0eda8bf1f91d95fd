"""lab.report"""

import numpy as np
import torch

from lab.common import pooled, readable, whole
from lab.domain import domain_test
from model import ViT
from plumbing import pictures
from plumbing.checkpoint import read_log, write_json
from plumbing.metrics import linear_probe, mean_auroc
from plumbing.monitor import LOSSES


def closing(config, out, world, films, held, tables, device):
    """The closing table on held-out films: domain sensitivity test with and without the action, linear probes against random features and raw pixels."""
    world.eval()
    result = {"domain": {}, "probe": {}}
    held = readable(films, held[np.linspace(0, len(held) - 1, min(50, len(held))).astype(int)])
    if len(held):
        result["domain"] = domain_test(world, whole(films, held, config.image), progress=True)
        print(
            f"\nheld-out films: domain sensitivity test, {len(held)} films × {result['domain']['candidates']} candidates (Table 4), percent"
        )
        for name, label in (
            ("action", "with the action"),
            ("no_action", "without"),
            ("random", "chance"),
        ):
            print(
                f"  {label:22s}"
                + "".join(
                    f"  Recall@{k} {result['domain'][name][f'recall@{k}']:6.2f}" for k in (1, 3, 5)
                )
            )
    write_json(out / "result.json", result)
    torch.manual_seed(config.seed)
    fresh = ViT(**world.encoder.config).to(device).eval()
    for table in tables:
        scores = probe_table(
            table,
            films,
            {"pre-trained": world.target_encoder, "random initialisation": fresh},
            config.image,
        )
        result["probe"][table.path.stem] = scores
        print(
            f"linear probe on {table.path.stem} ({', '.join(table.classes)}), test AUROC, percent"
        )
        for name, value in scores.items():
            print(f"  {name:22s}  {value:6.2f}")
    write_json(out / "result.json", result)
    rows = read_log(out / "log.csv")
    read = lambda key: (
        [float(r["step"]) for r in rows if r[key]],
        [float(r[key]) for r in rows if r[key]],
    )
    losses = pictures.curves(
        {n: read(n) for n in LOSSES if read(n)[0]}, "loss terms", "step", "squared error"
    )
    pictures.save(
        pictures.stack(
            [
                losses,
                pictures.curves(
                    {"RankMe": read("rankme")},
                    "RankMe of the pooled target features",
                    "step",
                    "effective rank",
                ),
            ]
        ),
        out / "curve.png",
    )
    print(
        f"curves {out}/curve.png, views {out}/views.png, weights {out}/encoder.pt, all numbers {out}/result.json"
    )


def probe_table(labels, films, encoders, size):
    """Linear-probe AUROC (percent, mean over classes) on the test split for each {name: ViT}, and of raw 64 × 64 pixels. → {name: AUROC}"""
    where = labels.locate(films)
    keep = np.isin(where, readable(films, where[where >= 0]))
    where, y, split = where[keep], labels.y[keep], labels.split[keep]
    fit, val, test = (split == "train", split == "val", split == "test")
    images = whole(films, where, size)
    features = {name: pooled(encoder, images).numpy() for name, encoder in encoders.items()}
    features["raw 64² pixels"] = whole(films, where, 64).flatten(1).numpy()
    score = lambda x: mean_auroc(linear_probe(x[fit], y[fit], x[val], y[val], x[test]), y[test])[0]
    return {name: 100 * score(x) for name, x in features.items()}
