"""What does a training step show the model? No weights are needed.

    python -m lab.views                                        # synthetic films
    python -m lab.views --data FILMS --image 224 --patch 16

Writes result.json and views.png, one row per film of the batch that pretrain.py makes of these
films: two crops, their domain transitions T_a, and what the masks leave as context.
"""

import dataclasses

import pretrain
from data import Views
from lab import common
from plumbing.launch import UserError, flag, run_script


@dataclasses.dataclass
class Config(common.AboutFilms):
    films: int = flag(4, "films to show")
    image: int = flag(128, "side of the crops, px")
    patch: int = flag(16, "side of a patch, px")


def main(argv=None):
    args, _ = common.start(Config, __doc__, "views", argv)
    if args.image % args.patch:
        raise UserError(f"--image {args.image} is not a multiple of --patch {args.patch}")
    films, _ = common.open_set(args, 20)
    numbers = common.evenly(common.named(args.table, films), args.films)
    views = Views(films, args.image, args.seed, numbers)
    count = len(numbers)
    shape = dict(image=args.image, patch=args.patch, batch=count)
    settings = pretrain.Config(**shape, seed=args.seed, global_share=1.0)
    page = pretrain.draw_views(views, settings, count)
    words = f"{count} films as a training step shows them"
    common.finish(args, {"films": count}, words, views=page)


if __name__ == "__main__":
    run_script(main)
