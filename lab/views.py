"""lab.views"""

import dataclasses

import numpy as np
import torch

import augment
from lab.common import Common, evenly, finish, grey, named, open_set, run_command
from masks import sample_masks
from plumbing import pictures
from plumbing.keys import torch_generator
from plumbing.launch import UserError, flag, run_script


@dataclasses.dataclass
class Config(Common):
    films: int = flag(4, "films to show")
    image: int = flag(None, "side of the crops, px [128]")
    patch: int = flag(None, "side of a patch, px [16]")


# ------------------------------------------------------------------------------------------------ views
def command(config, device):
    """What the model is shown: two crops of a film, their domain transitions, the mask, what is left as context. No weights needed."""
    size, patch = config.image or 128, config.patch or 16
    if size % patch:
        raise UserError(f"--image {size} is not a multiple of --patch {patch}")
    films, _ = open_set(config, 20)
    rows, captions, grid = [], [], size // patch
    for i in evenly(named(config.table, films), config.films):
        film, generator, rng = (
            films[int(i)],
            torch_generator(config.seed, int(i)),
            np.random.default_rng((config.seed, int(i))),
        )
        boxes, flips = augment.sample_boxes(rng, *film.shape)
        crops = np.stack([augment.crop(film, box, size, flip) for box, flip in zip(boxes, flips)])
        both = augment.to_float(torch.from_numpy(crops))[None]  # (1, 2, H, W)
        y = augment.apply_jitter(both, augment.sample_jitter(1, generator))[0][
            :, None
        ]  # (2, 1, H, W)
        actions = augment.sample_actions(2, generator)
        x = augment.apply_action(y, actions)
        keep, masked = sample_masks(2, grid, generator)
        rows.append([pictures.draw_boxes(film, boxes, ["#ffb000", "#4cc9f0"])])
        captions.append([", ".join(f"view {v + 1} mirrored" for v in (0, 1) if flips[v])])
        for v in (0, 1):
            b, c, g, s = actions[v].tolist()
            rows[-1] += [grey(y[v]), grey(x[v]), tokens_picture(x[v], keep[v], masked[v], patch)]
            captions[-1] += [
                None,
                f"b {b:.2f} c {c:.2f} g {g:.2f} blur {s:.1f}",
                f"{len(keep[v])} seen, {len(masked[v])} asked",
            ]
    titles = [
        "film, boxes 1 and 2",
        *(f"{what} {v}" for v in (1, 2) for what in ("target y", "T_a(y)", "context x")),
    ]
    words = f"{len(rows)} films as a training step sees them; red: hidden and asked for, black: hidden only"
    finish(
        config,
        {"films": len(rows), "image": size, "patch": patch},
        words,
        views=pictures.grid(rows, captions, titles, cell=170),
    )


def tokens_picture(image, keep, masked, patch):
    """A context: patches in `keep` as they are, those in `masked` red, the rest nearly black. (1, H, W), (K,), (M,) → uint8 (H, W, 3)"""
    grid = image.shape[-1] // patch
    kind = (
        torch.zeros(grid * grid, dtype=torch.long)
        .scatter(0, keep, 1)
        .scatter(0, masked, 2)
        .view(grid, grid)
    )
    kind = kind.repeat_interleave(patch, 0).repeat_interleave(patch, 1).numpy()[..., None]
    shown = grey(image)[..., None].repeat(3, 2)
    return np.where(
        kind == 1,
        shown,
        np.where(kind == 2, shown // 6 + np.array([120, 30, 30], np.uint8), shown // 6),
    ).astype(np.uint8)


if __name__ == "__main__":
    run_script(lambda: run_command(Config, command, "views"))
