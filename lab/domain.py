"""lab.domain"""

import numpy as np
import torch
from tqdm import tqdm

import augment
from lab.common import Common, find_weights, finish, grey, open_set, run_command, some_films
from plumbing import pictures
from plumbing.keys import torch_generator
from plumbing.launch import run_script
from plumbing.metrics import recall_at_k
from plumbing.weights import load_world

GREEN = "#37d67a"


# ------------------------------------------------------------------------------------------------ domain
def command(config, device):
    """Domain sensitivity test (Table 4) on held-out films, the error matrices of one film, and what the model chose."""
    world = load_world(find_weights(config)).to(device).eval()
    films, table = open_set(config, 7 * config.films)
    images = some_films(films, table, config.films, world.encoder.image)
    result = domain_test(world, images, config.seed, progress=True)
    lines = [
        f"domain sensitivity test, {len(images)} films × {result['candidates']} candidates (Table 4), percent"
    ]
    for key, words in (
        ("action", "with the action"),
        ("no_action", "without"),
        ("random", "chance"),
    ):
        lines.append(
            f"  {words:18s}"
            + "".join(f"  Recall@{k} {result[key][f'recall@{k}']:6.2f}" for k in (1, 3, 5))
        )
    candidates = domain_candidates()
    actions = augment.sample_actions(
        len(candidates), torch_generator(config.seed, 0)
    )  # those of film 0 in domain_test
    matrices = [
        errors.cpu().numpy() for errors in domain_errors(world, images[:1], actions, candidates)
    ]
    finish(
        config,
        result,
        "\n".join(lines),
        choices=choices_picture(images[0], actions, candidates, *matrices),
        errors=errors_picture(*matrices),
    )


def errors_picture(told, untold):
    """Both error matrices, each row from its smallest (dark) to its largest (bright) error: a dark diagonal is what one hopes for."""
    scaled = [
        (e - e.min(1, keepdims=True)) / np.ptp(e, axis=1, keepdims=True).clip(1e-12)
        for e in (told, untold)
    ]
    captions = [["row: prediction i, column: candidate j", "dark = small error"]]
    return pictures.grid(
        [[pictures.heat(e, 0, 1) for e in scaled]],
        captions,
        ["told the action", "not told"],
        cell=5 * len(told),
    )


def choices_picture(image, actions, candidates, told, untold, shown=5):
    """Three contexts of one film (best, middle, worst rank of the truth), each with its truth and the candidates closest to the prediction."""
    rank = lambda errors: (errors < np.diag(errors)[:, None]).sum(1) + 1
    ranks, ranks_untold, rows, captions = rank(told), rank(untold), [], []
    y = augment.tone(image.expand(len(candidates), -1, -1, -1), candidates[:, 0], candidates[:, 1])
    x = augment.apply_action(y, actions)
    order = np.argsort(ranks, kind="stable")
    for i in order[[0, len(order) // 2, -1]]:
        best = np.argsort(told[i], kind="stable")[:shown]
        side = image.shape[-1]
        outlined = [
            pictures.draw_boxes(grey(y[j]), [(0, 0, side, side)], [GREEN]) if j == i else grey(y[j])
            for j in best
        ]
        rows.append([grey(x[i]), grey(y[i]), *outlined])
        b, c, g, s = actions[i].tolist()
        captions.append(
            [
                f"b {b:.2f} c {c:.2f} g {g:.2f} blur {s:.1f}",
                f"rank {ranks[i]}, untold {ranks_untold[i]}",
                *(f"{told[i, j]:.2f}" for j in best),
            ]
        )
    titles = ["context x", "its truth y", *(f"choice {k + 1}" for k in range(shown))]
    return pictures.grid(rows, captions, titles, cell=150)


@torch.no_grad()
def domain_errors(world, image, actions, candidates):
    """Eq. (13) for one film: error of the prediction from x_i = T_{a_i}(y_i) against every candidate y_j, all patches. image (1, 1, H, W) → two (n, n):
    told the action, told the identity."""
    device = next(world.parameters()).device
    image, actions, candidates = (v.to(device) for v in (image, actions, candidates))
    y = augment.tone(image.expand(len(candidates), -1, -1, -1), candidates[:, 0], candidates[:, 1])
    h, truth, at = (
        world.encoder(augment.apply_action(y, actions)),
        world.targets(y).flatten(1),
        world.coords.expand(len(actions), -1, -1),
    )
    identity = torch.tensor(augment.IDENTITY, device=device).expand(len(actions), 4)
    return [
        torch.cdist(world.predictor(h, at, at, told).float().flatten(1), truth)
        for told in (actions, identity)
    ]


def domain_test(world, images, seed=0, side=8, progress=False):
    """Domain sensitivity test (Table 4): 64 candidates evenly over the range, Recall@1/3/5 in percent with the action, without it, and of chance.

    images (n, 1, H, W). "Without" = the same model told the identity action. → the dict that analyze domain writes.
    """
    candidates, recalls = domain_candidates(side), {"action": [], "no_action": []}
    for k, image in enumerate(tqdm(images, desc="domain test", disable=not progress, leave=False)):
        actions = augment.sample_actions(len(candidates), torch_generator(seed, k))
        for each, errors in zip(
            recalls.values(), domain_errors(world, image[None], actions, candidates)
        ):
            each.append(recall_at_k(errors))
    result = {
        name: {f"recall@{k}": 100 * float(np.mean([r[k] for r in each])) for k in (1, 3, 5)}
        for name, each in recalls.items()
    }
    chance = {f"recall@{k}": 100 * k / len(candidates) for k in (1, 3, 5)}
    return result | {"random": chance, "images": len(images), "candidates": len(candidates)}


def domain_candidates(side=8, span=(0.6, 1.4)):
    """side² target jitters (brightness, contrast) spread evenly over the training range, for the domain sensitivity test (Sec. B.2). → (n, 2)"""
    axis = torch.linspace(span[0], span[1], side)
    return torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)


if __name__ == "__main__":
    run_script(lambda: run_command(Common, command, "domain"))
