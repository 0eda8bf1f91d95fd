"""How good did a pre-training become? Its closing table, on films that it held out.

Not a program: the last act of pretrain.py. It writes result.json (domain sensitivity test and
linear probes, in percent) and curve.png into the folder of the run, and prints both tables.
"""

import torch

from lab.common import evenly, read_whole
from lab.domain import domain_test, result_table
from lab.probe import RANDOM, judge_tables, judged_words
from plumbing import pictures
from plumbing.checkpoint import read_log, write_json
from plumbing.weights import make_vit

SEEN = "films of test were not seen in pre-training; all others were, unlabelled"
CONTINUED = "this run saw all but the films of test, unlabelled; what --weights had seen is unknown"
DOMAIN_FILMS = 50  # at most so many held-out films in the domain sensitivity test


def closing(args, out, world, films, held, tables, device):
    """Judge a trained CheXWorld on films it has not seen: by the domain sensitivity test, and by
    linear probes against random weights and raw pixels.

    args: those of pretrain.py; held: numbers of the held-out films; tables: the Labels to probe.
    """
    world.eval()
    result = {"domain": domain_part(world, films, held), "probe": {}, "probe_intervals": {}}
    write_json(out / "result.json", result)  # kept when a probe fails or is interrupted
    torch.manual_seed(args.seed)
    fresh = make_vit(world.encoder.config).to(device).eval()
    encoders = {"pre-trained": world.target_encoder, RANDOM: fresh}
    seen = CONTINUED if args.weights else SEEN
    for table, judged in judge_tables(tables, films, encoders, args.image):
        result["probe"][table.path.stem] = judged["test"]["values"]
        result["probe_intervals"][table.path.stem] = judged
        result.setdefault("notes", {})[table.path.stem] = table.notes
        print(judged_words(table, judged, seen))
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
