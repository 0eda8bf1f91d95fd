"""Is a marker in the prediction? A linear probe asks, where a picture cannot tell. (Fig. 5)

    python -m lab.markers                                            # newest run, synthetic films
    python -m lab.markers --weights runs/films --data FILMS --patients patients.csv

A white letter, L or R, is burnt (in memory) at a random dark place of one block of a view. A linear
probe is asked whether a letter is there, and which, of patients that neither probe nor world model
knows. Its features are averaged over the whole block, as RCDM is told them, or over the spot alone,
the block's patches that the letter touches. Three settings:

    hidden  the letter lies in a block that is hidden from the context
    half    half of it lies in such a block, half in patches that the context sees
    seen    the context is another crop of the film, in which all of it is visible

and four kinds of features: the prediction; the target's own (the ceiling: what could be known); and
two floors, the prediction from the same film without any letter, and the place alone. In `hidden`
no prediction can depend on the letter: it shows that nothing leaks, and what chance looks like.

Writes result.json and examples.png. Intervals: 95 %, bootstrap over patients; every seed draws
places, letters and the probe's patients anew.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import default_collate
from tqdm import tqdm

import augment
from lab import common
from lab.rcdm import RED, observed, predicted, shade, training_mask
from plumbing import pictures
from plumbing.keys import MARKER_PLACE, MARKER_SPLIT, numpy_rng
from plumbing.launch import UserError, flag, run_script
from plumbing.metrics import auroc, bootstrap, linear_probe, weighted_auroc

SETTINGS = ("hidden", "half", "seen")
QUESTIONS = {"present": "there?", "letter": "L or R?"}
POOLS = ("block", "spot")
KINDS = {
    "prediction": "prediction",
    "target": "target's own features",
    "clean": "prediction without letter",
    "place": "place alone",
}
LETTERS = "RL"
INK = 250  # grey value of a letter: lead keeps a film white
DARK = 150  # grey value below which the place of a letter must be
AMBER = pictures.VIEW_COLOURS[0]  # frame of the spot
SHOWN = 160  # px of a view in the picture
MARGIN = 3  # px of a view between a hidden letter and what is seen: resizing spreads it by two
LEAST = 20  # patients without whom no probe is fitted


@dataclasses.dataclass
class Config(common.Common):
    films: int = flag(400, "films to look at, evenly from all that have no marker by the table")
    patients: str = flag(None, "CSV table filename,patient_id for films of your own [the run's]")
    allow_seen: bool = flag(False, "take films that the world model was trained on, and say so")
    letter: float = flag(0.2, "height of the letter, as a share of the view's side")
    draws: int = flag(3, "letters per film and seed")
    seeds: int = flag(3, "times that letters and the probe's patients are drawn anew")


def main(argv=None):
    """Ask the prediction of one world model for burnt-in markers."""
    args, device = common.start(Config, __doc__, "markers", argv)
    if not 0.02 <= args.letter <= 0.25:
        raise UserError(f"--letter {args.letter}: a share from 0.02 to 0.25 is wanted")
    world, films, numbers, patients, result = open_all(args, device)
    draws = [collect(world, films, numbers, args, args.seed + s, device) for s in range(args.seeds)]
    result |= {"letter": args.letter, "seeds": args.seeds, "draws": args.draws, "auroc": {}}
    for setting in SETTINGS:
        result["auroc"][setting] = judge([draw[setting] for draw in draws], patients, args.seed)
    hidden = [draw["hidden"] for draw in draws]
    changes = [np.abs(np.diff(found["prediction"], axis=1)).max() for found in hidden]
    result["largest_change_of_a_hidden_prediction"] = float(max(changes))
    page = examples_picture(films, numbers, args, world.encoder.image, world.encoder.grid)
    common.finish(args, result, result_table(result), examples=page)


# ---------------------------------------------------------------- world model and films
def open_all(args, device):
    """Load the world model, and choose the films that it is asked about.

    → world, films, numbers (n,), patients (n,), {films, patients: how many; overlap: in words what
    the world knows of them}
    """
    weights = common.find_weights(args.weights)
    world = common.load_predictions(weights).to(device).eval()
    films, numbers, patients, words = choose_films(args, weights)
    about = {"films": len(numbers), "patients": len(set(patients)), "overlap": words}
    print(f"{about['films']} films of {about['patients']} patients. {words}", flush=True)
    return world, films, numbers, patients, about


def choose_films(args, weights):
    """Choose films that the world model was not trained on, without those whose row in a table
    names a marker of their own. → films, numbers (n,), patients (n,), in words what it knows of
    them
    """
    patients = args.patients or common.run_of(weights).get("patients")
    films, table = common.open_set(args, 3 * args.films, patients=patients)
    numbers = np.arange(len(films))
    learnt = (set(), set())  # of the synthetic patients, none
    if args.data:
        numbers = common.named(args.table, films)
        learnt = common.trained_on(weights, films)
    if learnt is None and not args.allow_seen:
        raise UserError(
            f"nobody can tell which films {weights} was trained on: --allow_seen takes all; "
            "without --data, synthetic ones are taken"
        )
    rows = common.rows_of(table, films, split=None) if table else []
    has_marker = [i for i, row in rows if row.get("marker")]
    numbers = np.setdiff1d(numbers, has_marker)
    patients = common.patients_with(films, [table] if table else [])
    is_seen = common.seen_by(learnt, films, patients)
    if not args.allow_seen:
        numbers = numbers[~is_seen[numbers]]
    _, numbers, _ = common.read_whole(films, common.evenly(numbers, args.films), 1)
    found = len(set(patients[numbers]))
    if found < LEAST:
        raise UserError(
            f"{found} patients that the world model was not trained on: {LEAST} are the least; "
            "pre-train with a larger --holdout, or give --allow_seen"
        )
    words = "The world model was trained on none of these patients."
    if learnt is None:
        words = "Nobody can tell whether the world model was trained on these films."
    elif is_seen[numbers].any():
        words = f"The world model was trained on patients of {is_seen[numbers].sum()} of these."
    return films, numbers, patients[numbers], words


# ---------------------------------------------------------------- a letter in a view
class Place(NamedTuple):
    """Where a letter is burnt into a film, and what the world model is asked.

    boxes (2, 4): context and target, px of the film. parts (2, 4): block and spot, as top, left,
    height, width in patches of the target. centre (row, col) and height of the letter, px of the
    film. keep (K,) and asked (M,): patches that are seen of the context, and asked for.
    """

    boxes: np.ndarray
    parts: torch.Tensor
    centre: np.ndarray
    height: float
    letter: str
    is_present: bool
    keep: torch.Tensor
    asked: torch.Tensor


def draw(setting, film, image, grid, size, *key):
    """Draw a question about a letter on a film. → Place

    image, grid: side of a view, px and patches. size: of the letter, in view sides; two numbers are
    its height and the most of its width. key: integers.
    Letter and presence depend on nothing else, so that neither place nor film can tell them. Views
    and masks are those of pre-training, drawn again until the setting holds.
    """
    for attempt in range(10000):
        at = (MARKER_PLACE, *key, SETTINGS.index(setting), attempt)
        rng = numpy_rng(*at)
        boxes, _ = augment.sample_boxes(rng, *film.shape)
        rectangles, keep, asked = training_mask(grid, *at)
        block = rectangles[0].numpy()
        if setting != "seen":
            boxes = boxes[[0, 0]]  # the view is asked about itself
        centre = centre_of_letter(setting, rng, block, size * grid, MARGIN * grid / image)
        if centre is None:
            continue
        half = size * grid / 2
        on_film = boxes[1, :2] + centre / grid * boxes[1, 2:]
        in_context = (on_film - boxes[0, :2]) / boxes[0, 2:] * grid
        is_inside = (in_context >= half).all() and (in_context <= grid - half).all()
        height = np.max(size) * boxes[1, 2:].min()
        is_dark = attempt > 300 or window(film, on_film, height).mean() < DARK
        touched = touched_patches(in_context, half)  # of the context
        hidden = np.array([], int) if setting == "seen" else numbers_of(block, grid)
        if not is_inside or not is_dark or np.isin(keep, hidden).any():
            continue
        spot = intersection(touched_patches(centre, half), block)
        asked = np.arange(grid * grid) if setting == "seen" else asked
        keep = with_patches(keep, np.setdiff1d(numbers_of(touched, grid), hidden), rng)
        asked = with_patches(asked, numbers_of(spot, grid), rng)
        letter = LETTERS[rng.integers(2)]
        is_present = bool(rng.integers(2))
        parts = torch.from_numpy(np.stack([block, spot]))
        return Place(boxes, parts, on_film, height, letter, is_present, keep, asked)
    raise UserError(f"--letter {np.max(size)}: no block of a view has room for it")


def centre_of_letter(setting, rng, block, size, margin):
    """Draw where in a block a letter lies; all in patches. → (row, col), None without room"""
    room = block[2:] - size - 2 * margin
    centre = block[:2] + size / 2 + margin + rng.random(2) * room
    if setting == "half":  # the middle of the letter lies on an edge of the block
        edge = rng.integers(4)
        centre[edge % 2] = block[edge % 2] + (edge // 2) * block[2 + edge % 2]
    return None if (room < 0).any() else centre


def touched_patches(centre, half):
    """The patches that a letter touches. → top, left, height, width (4,)"""
    first = np.floor(centre - half).astype(int)
    return np.append(first, np.ceil(centre + half).astype(int) - first)


def intersection(a, b):
    """What two rectangles (top, left, height, width) have in common."""
    first = np.maximum(a[:2], b[:2])
    return np.append(first, np.minimum(a[:2] + a[2:], b[:2] + b[2:]) - first)


def numbers_of(rectangle, grid):
    """The numbers of a rectangle's patches."""
    top, left, height, width = rectangle
    rows = np.arange(top, top + height)[:, None]
    return (rows * grid + np.arange(left, left + width)).flatten()


def with_patches(chosen, wanted, rng):
    """As many chosen patches as before, the wanted ones among them. → rising numbers, a tensor"""
    others = rng.permutation(np.setdiff1d(chosen, wanted))
    return torch.from_numpy(np.sort(np.append(wanted, others[: len(chosen) - len(wanted)])))


def window(film, centre, side):
    """A square around a place of the film, as far as it lies on it."""
    first = np.maximum(0, np.round(centre - side / 2)).astype(int)
    last = first + max(1, round(side))
    return film[first[0] : last[0], first[1] : last[1]]


def burn(film, place):
    """Burn the letter into a film. uint8 (H, W) → uint8 (H, W)"""
    row, col = place.centre
    _, top, _, bottom = pictures.font(100).getbbox(place.letter)
    font = pictures.font(100 * place.height / (bottom - top))
    left, top, right, bottom = font.getbbox(place.letter)
    page = Image.fromarray(film)
    corner = (col - (left + right) / 2, row - (top + bottom) / 2)
    ImageDraw.Draw(page).text(corner, place.letter, INK, font)
    return np.asarray(page)


def ask(film, place, size, grid):
    """Cut a film into a question for rcdm.predicted. → item; context, target uint8 (size, size)"""
    coords = augment.relative_coords(*torch.from_numpy(place.boxes[:, None]), grid)[0]
    return dict(
        context=np.array(augment.crop(film, place.boxes[0], size)),
        target=np.array(augment.crop(film, place.boxes[1], size)),
        keep=place.keep,
        asked=place.asked,
        coords=coords[place.asked],
        rectangles=place.parts,
    )


# ---------------------------------------------------------------- features and the probe
def collect(world, films, numbers, args, seed, device, batch=16):
    """Draw questions about every film and describe block and spot, with the letter and without.

    → {setting: {prediction, target: (n, 2, 2, D): without and with letter, block and spot;
    place (n, 12); present, letter: (n,) of 0 and 1; film (n,): which of `numbers`}}
    """
    found = {setting: [] for setting in SETTINGS}
    for first in tqdm(range(0, len(numbers), batch), desc=f"seed {seed}", leave=False):
        some = [films[int(i)] for i in numbers[first : first + batch]]
        for setting in SETTINGS:
            for k in range(args.draws):
                key = (world.encoder.image, world.encoder.grid, args.letter, seed, k)
                places = [draw(setting, film, *key, first + j) for j, film in enumerate(some)]
                part = describe(world, some, places, device)
                found[setting].append(part | {"film": first + np.arange(len(some))})
    joined = {}
    for setting, parts in found.items():
        joined[setting] = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    return joined


def describe(world, films, places, device):
    """The features of collect for some films and one place on each."""
    shape = (world.encoder.image, world.encoder.grid)
    pairs = list(zip(films, places, strict=True))
    found = {"prediction": [], "target": []}
    for version in ([burn(*pair) for pair in pairs], films):
        items = [ask(film, place, *shape) for film, place in zip(version, places, strict=True)]
        item = default_collate(items)
        parts = (item["asked"], item["rectangles"])
        found["prediction"].insert(0, predicted(world, item, device))
        found["target"].insert(0, observed(world, item["target"], *parts, device))
    found = {name: torch.stack(pair, 1).cpu().numpy() for name, pair in found.items()}
    where = [np.append(place.parts / shape[1], place.boxes[1]) for place in places]
    found["place"] = np.array(where)
    found["present"] = np.array([place.is_present for place in places], float)
    found["letter"] = np.array([place.letter == "L" for place in places], float)
    return found


def judge(draws, patients, seed):
    """Answer both questions of one setting from every kind of features.

    draws: what collect found, per seed of `seed`, `seed` + 1, …; patients: of the films that it
    looked at. → {question: {pool: {kind: interval}}}
    """
    result = {question: {pool: {} for pool in POOLS} for question in QUESTIONS}
    for question in QUESTIONS:
        for pool in POOLS:
            for kind in KINDS:
                answers = []
                for s, found in enumerate(draws):
                    x = features_of(found, question, pool, kind)
                    answers.append(answer(x, found[question], patients[found["film"]], seed + s))
                result[question][pool][kind] = interval(answers)
    return result


def features_of(found, question, pool, kind):
    """The features that a probe is given. → (n, D)

    To tell whether a letter is there, half of the films have one; to tell which, all have.
    """
    if kind == "place":
        return found["place"]
    if kind == "clean":
        return found["prediction"][:, 0, POOLS.index(pool)]
    has_letter = found["present"].astype(int) if question == "present" else 1
    return found[kind][np.arange(len(found[kind])), has_letter, POOLS.index(pool)]


def answer(x, y, patients, seed):
    """Fit a probe on half of the patients and ask it about the others. → scores, y, patients"""
    order = numpy_rng(MARKER_SPLIT, seed).permutation(np.unique(patients))
    taught = len(order) // 2
    chosen = taught // 5  # on these the strength of the penalty is chosen
    val = np.isin(patients, order[:chosen])
    train = np.isin(patients, order[chosen:taught])
    test = np.isin(patients, order[taught:])
    return linear_probe(x[train], y[train], x[val], y[val], x[test]), y[test], patients[test]


def interval(answers):
    """Mean AUROC over seeds, percent, and its 95 % interval: patients are drawn again, the same for
    all seeds.

    answers: scores, labels, patients of every seed. → {auroc, low, high, seeds: [AUROC of each]}
    """
    films_of = [len(patients) for _, _, patients in answers]

    def mean(weights):
        """Weights of the films of all seeds in a row (n, k) → (k, 1)"""
        parts = np.split(weights, np.cumsum(films_of)[:-1])
        pairs = zip(answers, parts, strict=True)
        values = [weighted_auroc(scores, labels, part) for (scores, labels, _), part in pairs]
        return np.mean(values, 0)[:, None]

    low, high = 100 * bootstrap(mean, np.concatenate([patients for _, _, patients in answers]))[0]
    seeds = [100 * auroc(scores, labels) for scores, labels, _ in answers]
    return {"auroc": float(np.mean(seeds)), "low": float(low), "high": float(high), "seeds": seeds}


# ---------------------------------------------------------------- words and pictures
def result_table(result):
    """The result in words. → text"""
    lines = [
        f"a burnt-in letter of {result['letter']:g} of the view's side: test AUROC of a linear "
        f"probe, percent (95 % interval); {result['films']} films, {result['seeds']} seeds"
    ]
    columns = [(question, pool) for question in QUESTIONS for pool in POOLS]
    heads = [f"{QUESTIONS[question]} ({pool})" for question, pool in columns]
    lines.append(f"  {'':8s}{'features':28s}" + "".join(f"{head:20s}" for head in heads))
    for setting, found in result["auroc"].items():
        for kind, title in KINDS.items():
            cells = [found[question][pool][kind] for question, pool in columns]
            words = [f"{c['auroc']:4.1f} ({c['low']:.1f}, {c['high']:.1f})" for c in cells]
            lines.append(f"  {setting:8s}{title:28s}" + "".join(f"{w:20s}" for w in words))
    change = result["largest_change_of_a_hidden_prediction"]
    lines.append(f"hidden: a letter changes no number of a prediction by more than {change:.1g}")
    return "\n".join([*lines, result["overlap"]])


def examples_picture(films, numbers, args, image, grid):
    """Draw two films per setting: what the context shows, and the target with block and spot."""
    rows = []
    for setting in SETTINGS:
        row = []
        for j, i in enumerate(numbers[:2]):
            film = films[int(i)]
            place = draw(setting, film, image, grid, args.letter, args.seed, 0, j)
            item = ask(burn(film, place), place, SHOWN, grid)
            frames = [[round(v * SHOWN / grid) for v in part.tolist()] for part in place.parts]
            row.append(shade(item["context"], place.keep, grid))
            row.append(pictures.draw_boxes(item["target"], frames, [RED, AMBER]))
        rows.append(row)
    titles = ["context", "target: block, spot"] * 2
    return pictures.grid(rows, column_titles=titles, row_titles=list(SETTINGS), cell=SHOWN)


if __name__ == "__main__":
    run_script(main)
