"""Is a marker in the prediction? A linear probe asks, where a picture cannot tell. (Fig. 5)

    python -m lab.markers                                            # newest run, synthetic films
    python -m lab.markers --weights runs/films --data FILMS --patients patients.csv

A white letter, L or R, is burnt (in memory) at a random dark place of one block of a view. A linear
probe is asked whether a letter is there, and which, of patients that neither probe nor world model
knows. Its features are averaged over the whole block, as RCDM is told them, or over the spot alone,
the block's patches that the letter touches. There are three settings (their names are older than
the words kept and masked):

    hidden  the letter lies in a block of which no patch is kept
    half    half of it lies in such a block, half in patches that are kept
    seen    the context is another crop of the film, which keeps all patches of the letter

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
from lab.rcdm import RED, cut_question, observed, predicted, shade, training_mask
from model import CheXWorld
from plumbing import pictures
from plumbing.keys import MARKER_PLACE, MARKER_SPLIT, numpy_rng
from plumbing.launch import UserError, flag, run_script
from plumbing.metrics import auroc, bootstrap, linear_probe, weighted_auroc
from plumbing.pack import Films

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
MARGIN = 3  # px of a view between a letter in a block and what is kept: resizing spreads it by 2
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
    study, result = open_study(args, device)
    seeds = range(args.seed, args.seed + args.seeds)
    draws = [collect(study, args, seed, args.letter, look) for seed in seeds]
    hidden = np.concatenate([found["prediction"][found["setting"] == "hidden"] for found in draws])
    change = np.abs(np.diff(hidden, axis=1)).max()
    result["settings"] = {setting: judge(draws, setting, args.seed) for setting in SETTINGS}
    result["largest_change_of_a_hidden_prediction"] = float(change)
    page = examples_picture(study, args)
    title = (
        f"a burnt-in letter of {args.letter:g} of the view's side: test AUROC of a linear probe; "
        f"hidden: it changes no number of a prediction by more than {change:.1g}"
    )
    sources = [f"{words} ({pool})" for words in KINDS.values() for pool in POOLS]
    common.finish(args, result, result_table(title, result, sources), examples=page)


# ---------------------------------------------------------------- world model and films
class Study(NamedTuple):
    """A world model, and the films that it is asked about: their numbers and patients (n,)."""

    world: CheXWorld
    films: Films
    numbers: np.ndarray
    patients: np.ndarray


def open_study(args, device):
    """Load the world model, and choose films that it was not trained on, without those whose row in
    a table names a marker of their own.

    → Study, {what is written down of it: overlap says what the world model knows of the films}
    """
    world = common.load_predictions(args.weights).to(device).eval()
    patients = args.patients or common.run_of(args.weights).get("patients")
    films, table = common.open_set(args, 3 * args.films, patients=patients)
    numbers = common.named(args.table, films)
    learnt = common.known_from(args, films)
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
            f"{found} patients that the world model surely was not trained on: {LEAST} are the "
            "least; pre-train with a larger --holdout, or give --allow_seen"
        )
    overlap = common.seen_words(learnt, {"to ask about": is_seen[numbers]})
    print(f"{len(numbers)} films of {found} patients; {overlap}", flush=True)
    about = {name: getattr(args, name) for name in ("letter", "draws", "seeds")}
    about |= {"films": len(numbers), "patients": found, "overlap": overlap}
    return Study(world, films, numbers, patients[numbers]), about


# ---------------------------------------------------------------- a letter in a view
class Place(NamedTuple):
    """Where a letter is burnt into a film, and what the world model is asked.

    boxes (2, 4): context and target, px of the film. parts (2, 4): block and spot, as top, left,
    height, width in patches of the target. centre (row, col) and height of the letter, px of the
    film. keep (K,) and asked (M,): patches of the context that are kept, of the target that are
    asked for.
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
        unkept = np.array([], int) if setting == "seen" else numbers_of(block, grid)
        if not is_inside or not is_dark or np.isin(keep, unkept).any():
            continue
        spot = intersection(touched_patches(centre, half), block)
        asked = np.arange(grid * grid) if setting == "seen" else asked
        keep = with_patches(keep, np.setdiff1d(numbers_of(touched, grid), unkept), rng)
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
    return cut_question(film, place.boxes, place.parts, place.keep, place.asked, size, grid)


# ---------------------------------------------------------------- features and the probe
def collect(study, args, seed, size, look, batch=16):
    """Draw letters on all films, in all settings, and ask of each look(world, films, places).

    size: of the letter, as draw takes it. → {what `look` gives: (n, …); setting (n,); film (n,):
    which of study.numbers, and patient (n,): whose it is; draw (n,): the how many-th of the film}
    """
    shape = (study.world.encoder.image, study.world.encoder.grid)
    parts = []
    for first in tqdm(range(0, len(study.numbers), batch), desc=f"seed {seed}", leave=False):
        some = [study.films[int(i)] for i in study.numbers[first : first + batch]]
        rows = first + np.arange(len(some))
        for setting in SETTINGS:
            for k in range(args.draws):
                asked = zip(rows.tolist(), some, strict=True)
                places = [draw(setting, film, *shape, size, seed, k, row) for row, film in asked]
                part = look(study.world, some, places)
                about = {"setting": np.full(len(some), setting), "draw": np.full(len(some), k)}
                parts.append(part | about | {"film": rows})
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return found | {"patient": study.patients[found["film"]]}


def look(world, films, places):
    """Read features of block and spot of some films, with the letter and without.

    → {prediction, target (n, 2, 2, D): without and with letter, block and spot; place (n, 12);
    present, letter: (n,) of 0 and 1}
    """
    device = next(world.parameters()).device
    shape = (world.encoder.image, world.encoder.grid)
    pairs = list(zip(films, places, strict=True))
    found = {"prediction": [], "target": []}
    for version in (films, [burn(*pair) for pair in pairs]):
        items = [ask(film, place, *shape) for film, place in zip(version, places, strict=True)]
        item = default_collate(items)
        parts = (item["asked"], item["rectangles"])
        found["prediction"].append(predicted(world, item, device))
        found["target"].append(observed(world, item["target"], *parts, device))
    found = {name: torch.stack(pair, 1).cpu().numpy() for name, pair in found.items()}
    where = [np.append(place.parts / shape[1], place.boxes[1]) for place in places]
    found["place"] = np.array(where)
    found["present"] = np.array([place.is_present for place in places], float)
    found["letter"] = np.array([place.letter == "L" for place in places], float)
    return found


def judge(draws, setting, seed):
    """Answer both questions of one setting from every kind of features.

    draws: what collect found, per seed of `seed`, `seed` + 1, …
    → {kind and pool: {question: interval}}
    """
    draws = [common.select(found, found["setting"] == setting) for found in draws]
    result = {}
    for kind in KINDS:
        for pool in POOLS:
            intervals = {}
            for question in QUESTIONS:
                answers = []
                for s, found in enumerate(draws):
                    x = features_of(found, question, pool, kind)
                    answers.append(answer(x, found[question], found["patient"], seed + s))
                intervals[question] = interval(answers)
            result[f"{kind} {pool}"] = intervals
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

    answers: scores, labels, patients of every seed. → {percent, low, high, seeds: [AUROC of each]}
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
    bounds = {"low": float(low), "high": float(high)}
    return {"percent": float(np.mean(seeds)), **bounds, "seeds": seeds}


# ---------------------------------------------------------------- words and pictures
def result_table(title, result, sources, *more):
    """The result in words. → text

    title: what is measured; sources: the words for every source of result["settings"]; more: what
    the numbers after those of both questions are
    """
    rows = [["percent (95 % interval)", *QUESTIONS.values(), *more]]
    for setting, found in result["settings"].items():
        for words, values in zip(sources, found.values(), strict=True):
            cells = ["{percent:.1f} ({low:.1f}, {high:.1f})".format(**v) for v in values.values()]
            rows.append([f"{setting}: {words}", *cells])
    films = f"{result['films']} films, {result['seeds']} seeds; {result['overlap']}"
    return "\n".join([title, common.columns(rows), films])


def examples_picture(study, args):
    """Draw two films per setting: what the context shows, and the target with block and spot."""
    image = study.world.encoder.image
    grid = study.world.encoder.grid
    rows = []
    for setting in SETTINGS:
        row = []
        for j, i in enumerate(study.numbers[:2]):
            film = study.films[int(i)]
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
