"""Does the world model use the action? The domain sensitivity test. (Sec. B.2, Eq. 13, Table 4)

    python -m lab.domain                                     # newest run, synthetic films
    python -m lab.domain --weights runs/pretrain --data FILMS

A held-out film is changed in 64 ways, evenly spread: the candidates. Each candidate is augmented
with a random action; from the augmented film and the action the model predicts the features of the
candidate it came from. Recall@k is the share of predictions that have their own candidate among the
k nearest. The same model told nothing, and chance, stand beside it.

The paper samples "64 augmentation parameters evenly from a predefined range" and does not say which
(Sec. B.2). So there are two sets of candidates: a grid of 8 × 8 brightness and contrast factors,
which is how targets look in training, and 64 points spread over brightness, contrast, gamma and
blur. No target has another gamma or a blur in training: the second set asks for more. The closing
table of pretrain.py has the grid alone.

Writes result.json; of the grid also choices.png: what the model chose for three contexts of one
film, and errors.png: the error of each of its 64 predictions against every candidate.
"""

import numpy as np
import torch
from tqdm import tqdm

import augment
from lab import common
from lab.probe import bounds
from plumbing import pictures
from plumbing.keys import DOMAIN_TEST, torch_generator
from plumbing.launch import run_script
from plumbing.metrics import bootstrap, recall_at_k

GREEN = "#37d67a"
KS = (1, 3, 5)  # of Recall@k
WAYS = {"action": "with the action", "no_action": "without the action", "random": "chance"}


def main(argv=None):
    args, device = common.start(common.Common, __doc__, "domain", argv)
    world = common.load_predictions(args.weights).to(device).eval()
    films, table = common.open_set(args, 7 * args.films)  # a fifth, by patient, is the test split
    numbers = common.evenly(common.named(table, films), args.films)
    images, read, _ = common.read_whole(films, numbers, world.encoder.image)
    common.require_readable(read)
    overlap, _ = common.say_seen(args, {"to ask about": (films, read)}, table)
    result = domain_test(world, images, args.seed, has_second_set=True) | {"overlap": overlap}
    candidates = grid_candidates()
    actions = film_actions(len(candidates), args.seed, 0)
    both = domain_errors(world, images[:1], actions, candidates)
    told, untold = (errors.cpu().numpy() for errors in both)
    common.finish(
        args,
        result,
        result_table(result),
        choices=choices_picture(images[0], actions, candidates, told, untold),
        errors=errors_picture(told, untold),
    )


# ---------------------------------------------------------------- the test
def grid_candidates(side=8):
    """side² brightness and contrast factors over the range of the target's jitter. → (side², 4)"""
    axis = torch.linspace(0.6, 1.4, side)
    factors = torch.cartesian_prod(axis, axis)
    rest = torch.tensor(augment.IDENTITY[2:]).expand(len(factors), 2)
    return torch.cat([factors, rest], 1)


def sobol_candidates(count=64):
    """Spread points evenly over the ranges of all four parts of an action. → (count, 4)

    Sobol's sequence: when count is a power of two, each part takes `count` evenly spaced values,
    each of them once. count is 64 in the paper.
    """
    points = torch.quasirandom.SobolEngine(4).draw(count)  # not scrambled: always the same
    return augment.scale_to_ranges(points + 0.5 / count)


# Two sets of candidates; a candidate is an action that makes a target of the film.
GRID = "8 × 8 brightness × contrast"
FOUR = "64 Sobol points of brightness, contrast, gamma and blur"


def film_actions(count, seed, film):
    """The random actions of a film, by its place in the test, one per candidate. → (count, 4)"""
    return augment.sample_actions(count, torch_generator(DOMAIN_TEST, seed, film))


def change(image, candidates):
    """Make the candidates of a film. (1, 1, H, W), (n, 4) → (n, 1, H, W)"""
    return augment.apply_action(image.expand(len(candidates), -1, -1, -1), candidates)


@torch.no_grad()
def domain_errors(world, image, actions, candidates):
    """Compare what the model predicts with every candidate, for one film. (Eq. 13)

    Candidate y_j is the film after action j of `candidates`; prediction i starts from
    x_i = T_{a_i}(y_i), where `actions` holds a_i; the error is the distance over all patches.
    image (1, 1, H, W), actions (n, 4), candidates (n, 4) → two (n, n): the model is told the
    action, or the identity.
    """
    device = next(world.parameters()).device
    image = image.to(device)
    actions = actions.to(device)
    y = change(image, candidates.to(device))  # (n, 1, H, W)
    context = world.encoder(augment.apply_action(y, actions))  # (n, N, D)
    truth = world.targets(y).flatten(1)  # (n, N · D)
    at = world.own_coords.expand(len(actions), -1, -1)  # (n, N, 2)
    identity = torch.tensor(augment.IDENTITY, device=device).expand(len(actions), 4)
    errors = []
    for told in (actions, identity):
        guess = world.predictor(context, at, at, told).float().flatten(1)
        errors.append(torch.cdist(guess, truth))
    return errors


def domain_test(world, images, seed=0, has_second_set=False):
    """Domain sensitivity test of films (n, 1, H, W). (Table 4)

    → {action, no_action, random: {recall@1, recall@3, recall@5: percent}, intervals, images,
    candidates, candidates_vary} with the grid of candidates, and, if asked for, the same with the
    second set below four_parameters; no_action is the same model told the identity, random is
    chance. intervals {action, no_action: {recall@1, …: [low, high]}} hold 95 % of the redraws of
    the films; None with fewer than three films.
    """
    result = recalls(world, images, seed, grid_candidates(), GRID)
    if has_second_set:
        result["four_parameters"] = recalls(world, images, seed, sobol_candidates(), FOUR)
    return result


def recalls(world, images, seed, candidates, words):
    """Domain sensitivity test with one set of candidates, called `words`. → as in domain_test"""
    found = {"action": [], "no_action": []}
    for k, image in enumerate(tqdm(images, desc=f"domain test, {words}", leave=False)):
        actions = film_actions(len(candidates), seed, k)
        told, untold = domain_errors(world, image[None], actions, candidates)
        found["action"].append(list(recall_at_k(told, KS).values()))
        found["no_action"].append(list(recall_at_k(untold, KS).values()))
    result = {}
    intervals = {}
    for way, films in found.items():
        films = 100 * np.array(films)  # (films, ks)
        result[way] = by_k(films.mean(0).tolist())
        intervals[way] = by_k(redraw(films))
    result["random"] = by_k([100 * k / len(candidates) for k in KS])
    sizes = {"images": len(images), "candidates": len(candidates)}
    return result | {"intervals": intervals} | sizes | {"candidates_vary": words}


def redraw(films):
    """The 95 % interval of each mean over films (n, c). → c of [low, high], or of None"""
    rows = bootstrap(lambda times: times.T @ films / times.sum(0)[:, None], range(len(films)))
    return [None if np.isnan(row).any() else row.tolist() for row in rows]


def by_k(numbers):
    """Name numbers, one for each of KS."""
    return {f"recall@{k}": number for k, number in zip(KS, numbers, strict=True)}


def result_table(result):
    """The result of domain_test in words. → text"""
    lines = ["domain sensitivity test (Table 4), percent; in brackets the 95 % interval over films"]
    parts = [result, result["four_parameters"]] if "four_parameters" in result else [result]
    for part in parts:
        count = f"{part['images']} films × {part['candidates']} candidates"
        lines.append(f"{count}: {part['candidates_vary']}")
        for way, words in WAYS.items():
            numbers = [f"Recall@{k} {part[way][f'recall@{k}']:6.2f}" for k in KS]
            interval = part["intervals"].get(way, {}).get(f"recall@{KS[-1]}")
            brackets = f" ({bounds(interval)})" if interval else ""
            lines.append("  ".join([f"  {words:22s}", *numbers]) + brackets)
    return "\n".join(lines)


# ---------------------------------------------------------------- pictures
def errors_picture(told, untold):
    """Draw both error matrices, each row from its smallest (dark) to its largest (bright) error: a
    dark diagonal is what one hopes for.
    """
    maps = []
    for errors in (told, untold):
        spread = np.ptp(errors, axis=1, keepdims=True).clip(1e-12)
        scaled = (errors - errors.min(1, keepdims=True)) / spread
        maps.append(pictures.heat(scaled, 0, 1))
    captions = ["row: prediction i, column: candidate j", "dark = small error"]
    titles = ["told the action", "not told"]
    return pictures.grid([maps], [captions], titles, cell=5 * len(told))


def rank_of_truth(errors):
    """The place, from 1, of each prediction's own candidate. (n, n) → (n,)"""
    return (errors < np.diag(errors)[:, None]).sum(1) + 1


def choices_picture(image, actions, candidates, told, untold, count=5):
    """Draw three contexts of one film (best, middle, worst rank of the truth), each with its truth
    and the candidates closest to the prediction; the truth is outlined.
    """
    y = change(image[None], candidates)
    contexts = pictures.to_grey(augment.apply_action(y, actions))
    truths = pictures.to_grey(y)
    whole = (0, 0, *truths.shape[1:])  # a box around all of it
    ranks = rank_of_truth(told)
    ranks_untold = rank_of_truth(untold)
    order = np.argsort(ranks, kind="stable")
    rows = []
    captions = []
    for i in order[[0, len(order) // 2, -1]]:
        row = [contexts[i], truths[i]]
        bright, contrast, gamma, blur = actions[i].tolist()
        words = [
            f"b {bright:.2f} c {contrast:.2f} g {gamma:.2f} blur {blur:.1f}",
            f"rank {ranks[i]}, untold {ranks_untold[i]}",
        ]
        for j in np.argsort(told[i], kind="stable")[:count]:
            is_true = j == i
            row.append(pictures.draw_boxes(truths[j], [whole], [GREEN]) if is_true else truths[j])
            words.append(f"{told[i, j]:.2f}")
        rows.append(row)
        captions.append(words)
    titles = ["context x", "its truth y", *(f"choice {k + 1}" for k in range(count))]
    return pictures.grid(rows, captions, titles, cell=150)


if __name__ == "__main__":
    run_script(main)
