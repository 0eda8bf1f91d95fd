"""lab.views"""

import dataclasses

import numpy as np
import torch

import augment
from lab.common import Common, evenly, finish, named, open_set, run_command
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
    shown, all_boxes, all_flips, steps = [], [], [], []
    for i in evenly(named(config.table, films), config.films):
        film = films[int(i)]
        generator = torch_generator(config.seed, int(i))
        rng = np.random.default_rng((config.seed, int(i)))
        boxes, flips = augment.sample_boxes(rng, *film.shape)
        crops = np.stack([augment.crop(film, box, size, flip) for box, flip in zip(boxes, flips)])
        both = augment.to_float(torch.from_numpy(crops))[None]  # (1, 2, H, W)
        jitter = augment.sample_jitter(1, generator)
        y = augment.apply_jitter(both, jitter)[0][:, None]  # (2, 1, H, W)
        action = augment.sample_actions(2, generator)  # (2, 4)
        x = augment.apply_action(y, action)
        keep, masked = sample_masks(2, size // patch, generator)  # (2, K), (2, M)
        shown.append(film)
        all_boxes.append(boxes)
        all_flips.append(flips)
        steps.append({"y": y, "x": x, "keep": keep, "masked": masked, "action": action})
    batch = {  # view 1 of every film first, then view 2, as in training
        key: torch.stack([step[key] for step in steps], 1).flatten(0, 1) for key in steps[0]
    }
    finish(
        config,
        {"films": len(shown), "image": size, "patch": patch},
        f"{len(shown)} films as a training step sees them",
        views=pictures.views_picture(shown, all_boxes, all_flips, batch, patch),
    )


if __name__ == "__main__":
    run_script(lambda: run_command(Config, command, "views"))
