"""Is a marker painted from the prediction, by a decoder that can paint it? (Fig. 5, the picture)

    python -m lab.letters                                            # newest run, synthetic films
    python -m lab.letters --weights runs/films --data FILMS --patients patients.csv

Fig. 5 shows hidden regions painted without the marker that was in them. That says something of the
prediction only if the decoder would paint a marker that it is told of. So a large letter, a third
of the view tall, is burnt (in memory) into one block of half of all views, and two decoders learn
to paint the same blocks: the first from the target's own pooled features, which have seen the
letter (the ceiling), the second from the prediction. Both then paint blocks of patients that
neither decoders nor world model know, in the three settings of lab.markers. The first decoder, for
which a letter is either there or not, is also told the prediction.

A decoder is a small network that paints the *mean* of all blocks that fit the features: of a letter
that they do not tell, a shadow that is the same with and without it. (RCDM, lab.rcdm, paints one of
these blocks by chance, and takes twenty times as long to learn it.) A linear probe says beside it
what the features hold. A painting is read without a network: grey values within the letter's true
strokes against the rest of the block say whether it is there, those within an L's strokes against
an R's say which; the same is read off the true pixels. Writes result.json and paintings.png.
Intervals: 95 %, bootstrap over patients.
"""

import dataclasses

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import augment
from data import Batches
from lab import common, markers
from lab.rcdm import picture_row
from plumbing import pictures
from plumbing.keys import MARKER_SPLIT, numpy_rng
from plumbing.launch import UserError, flag, run_script, warmup_cosine
from plumbing.metrics import bootstrap, linear_probe

PROBED = {  # features that a linear probe is asked about
    "target": "probe of the target's features",
    "prediction": "probe of the prediction",
    "clean": "the same, film without letter",
}
PAINTED = {  # the decoder that learnt from these features, told those
    "ceiling": ("target", "target"),
    "prediction": ("prediction", "prediction"),
    "clean": ("prediction", "clean"),
    "translated": ("target", "prediction"),
}
BLOCKS = {  # what is read off pixels
    "truth": "true pixels",
    "ceiling": "painted from the target's features",
    "prediction": "painted from the prediction",
    "clean": "the same, film without letter",
    "translated": "the prediction, by the first decoder",
}
SOURCES = [*(f"probe of {kind}" for kind in PROBED), *BLOCKS]
WORDS = [*PROBED.values(), *BLOCKS.values()]
TITLES = ("context", "target", "ceiling", "prediction", "no letter in film", "first decoder")
NARROW = 0.75  # no letter is wider than this, as a share of its height
WIDTH = 256  # of a decoder's two hidden layers
EPOCHS = 15
BATCH = 64
LR = 2e-3


@dataclasses.dataclass
class Config(markers.Config):
    films: int = flag(600, "films to look at, evenly from all that have no marker by the table")
    letter: float = flag(0.33, "height of the letter, as a share of the view's side")
    draws: int = flag(4, "letters per film, setting and seed")
    seeds: int = flag(1, "times that letters, patients and decoders are drawn anew")
    size: int = flag(32, "side of a painted block, px")


def main(argv=None):
    """Paint blocks with and without a letter from what one world model says of them."""
    args, device = common.start(Config, __doc__, "letters", argv)
    if not 0.1 <= args.letter <= 0.4:
        raise UserError(f"--letter {args.letter}: a share from 0.1 to 0.4 is wanted")
    if not 8 <= args.size <= 128:
        raise UserError(f"--size {args.size}: 8 to 128 px are wanted")
    world, films, numbers, patients, result = markers.open_all(args, device)
    seeds = []
    for seed in range(args.seed, args.seed + args.seeds):
        own = dataclasses.replace(args, seed=seed)
        found = collect(world, films, numbers, own, device)
        found["patient"] = patients[found["film"]]
        is_test = hold_out(found["patient"], seed)
        taught, asked = ({k: v[is_in] for k, v in found.items()} for is_in in (~is_test, is_test))
        decoders = {
            kind: teach(taught[kind], taught["crop"], seed, device)
            for kind in ("target", "prediction")
        }
        seeds.append(answer(decoders, taught, asked, seed, device))
        if seed == args.seed:
            page = examples_picture(decoders, asked, films, numbers, world.encoder.grid, device)
    result |= {name: getattr(args, name) for name in ("letter", "draws", "seeds", "size")}
    result["settings"] = {setting: judge(seeds, setting) for setting in markers.SETTINGS}
    common.finish(args, result, result_table(result), paintings=page)


def hold_out(patients, seed):
    """Choose the rows of a third of the patients, to be painted. patients (n,) → (n,) bool"""
    order = numpy_rng(MARKER_SPLIT, seed).permutation(np.unique(patients))
    return np.isin(patients, order[: len(order) // 3])


# ---------------------------------------------------------------- questions
def collect(world, films, numbers, args, device, batch=16):
    """Draw letters on all films in all settings, and describe their blocks.

    → {prediction, target (n, D): features of the block; clean (n, D): the prediction from the film
    without letter; crop uint8 (n, size, size): the block; strokes uint8 (n, 2, size, size): where
    ink of an R would be, and of an L; present, letter (n,) of 0 and 1; setting (n,); film (n,):
    which of `numbers`; place (n,)}
    """
    shape = (world.encoder.image, world.encoder.grid)
    letter = args.letter * np.array([1, NARROW])
    parts = []
    for first in tqdm(range(0, len(numbers), batch), desc="letters", leave=False):
        some = [films[int(i)] for i in numbers[first : first + batch]]
        for setting in markers.SETTINGS:
            for k in range(args.draws):
                key = (*shape, letter, args.seed, k)
                drawn = [markers.draw(setting, f, *key, first + j) for j, f in enumerate(some)]
                part = describe(world, some, drawn, args.size, device)
                part["setting"] = np.full(len(some), setting)
                parts.append(part | {"film": first + np.arange(len(some))})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def describe(world, films, places, size, device):
    """What collect finds, for some films and one place on each."""
    told = markers.describe(world, films, places, device)
    row = np.arange(len(films))
    version = told["present"].astype(int)
    found = {kind: told[kind][row, version, 0] for kind in ("prediction", "target")}
    found |= {"clean": told["prediction"][:, 0, 0], "crop": [], "strokes": []}
    for film, place in zip(films, places, strict=True):
        box = block_box(place, world.encoder.grid)
        shown = markers.burn(film, place) if place.is_present else film
        found["crop"].append(augment.crop(shown, box, size))
        both = [place._replace(letter=letter) for letter in markers.LETTERS]
        inked = [markers.burn(np.zeros_like(film), one) for one in both]
        found["strokes"].append([augment.crop(ink, box, size) for ink in inked])
    found["place"] = np.empty(len(places), object)
    found["place"][:] = places
    found |= {name: told[name] for name in ("present", "letter")}
    return {name: np.asarray(values) for name, values in found.items()}


def block_box(place, grid):
    """The block that is painted, as a box of the film: top, left, height, width in px. → (4,)"""
    box = place.boxes[1]
    return place.parts[0].numpy() * box[[2, 3, 2, 3]] / grid + (*box[:2], 0, 0)


# ---------------------------------------------------------------- decoders and their paintings
def teach(told, crops, seed, device):
    """Train a decoder to paint crops uint8 (n, size, size) from features (n, D): least squares."""
    torch.manual_seed(seed)
    decoder = nn.Sequential(
        nn.BatchNorm1d(told.shape[1], affine=False),  # features differ little from their mean
        nn.Linear(told.shape[1], WIDTH),
        nn.GELU(),
        nn.Linear(WIDTH, WIDTH),
        nn.GELU(),
        nn.Linear(WIDTH, crops[0].size),
    ).to(device)
    optimizer = torch.optim.AdamW(decoder.parameters(), weight_decay=0.05)
    told = torch.from_numpy(told).to(device)
    pixels = augment.to_float(torch.from_numpy(crops).to(device)).flatten(1)  # (n, size²)
    batch = min(BATCH, len(crops))
    steps = EPOCHS * (len(crops) // batch)
    order = Batches(len(crops), batch, batch, 0, 1, seed, 0, steps)
    for step, keys in enumerate(order):
        rows = [i for _, i in keys]
        optimizer.param_groups[0]["lr"] = warmup_cosine(step, steps, max(1, steps // 10), LR, 0.0)
        optimizer.zero_grad()
        F.mse_loss(decoder(told[rows]), pixels[rows]).backward()
        optimizer.step()
    return decoder.eval()


@torch.no_grad()
def paint(decoders, asked, source, device):
    """Paint blocks as PAINTED says. → uint8 (n, size, size)"""
    decoder, kind = PAINTED[source]
    pixels = decoders[decoder](torch.from_numpy(asked[kind]).to(device))
    grey = (255 * pixels.clamp(0, 1)).round().byte()
    return grey.view(asked["crop"].shape).cpu().numpy()


def answer(decoders, taught, asked, seed, device):
    """Probe the features of the test patients' blocks, paint them, and read what is painted.

    → asked, with there and which (n, sources): how much speaks for a letter, and for an L
    """
    reads = [probe(taught, asked, kind, seed) for kind in PROBED]
    for source in BLOCKS:
        blocks = asked["crop"] if source == "truth" else paint(decoders, asked, source, device)
        reads.append(read(blocks, asked["strokes"], asked["letter"]))
    there, which = np.transpose(reads, (1, 2, 0))
    return asked | {"there": there, "which": which}


def probe(taught, asked, kind, seed):
    """Ask features by linear probes, one per setting and question. → there, which (n,)

    taught, asked: blocks as collect finds them, of other patients.
    """
    scores = np.zeros((2, len(asked["film"])))
    is_val = hold_out(taught["patient"], seed)
    for setting in markers.SETTINGS:
        test = asked["setting"] == setting
        for question, name in enumerate(markers.QUESTIONS):
            # Which letter it is can be learnt only where there is one.
            is_in = (taught["setting"] == setting) & (
                (name == "present") | (taught["present"] == 1)
            )
            parts = []
            for part in (is_in & ~is_val, is_in & is_val):
                parts += [taught[kind][part], taught[name][part]]
            scores[question, test] = linear_probe(*parts, asked[kind][test])
    return scores


def read(blocks, strokes, letter):
    """Read a letter off blocks, in grey values.

    blocks uint8 (n, s, s); strokes uint8 (n, 2, s, s): ink of an R and of an L; letter (n,): 1 is L
    → there (n,): mean within the letter's strokes minus mean of the rest; which (n,): mean within
    what an L has and an R has not, minus mean within what an R has and an L has not
    """
    ink_r, ink_l = (strokes / markers.INK).clip(0, 1).swapaxes(0, 1)
    ink = np.where(letter[:, None, None] == 1, ink_l, ink_r)

    def mean(weights):
        return (blocks * weights).sum((1, 2)) / np.maximum(weights.sum((1, 2)), 1e-6)

    return mean(ink) - mean(1 - ink), mean(ink_l * (1 - ink_r)) - mean(ink_r * (1 - ink_l))


# ---------------------------------------------------------------- words and pictures
def judge(seeds, setting):
    """Judge all sources of one setting. seeds: what answer gave, per seed.

    → {source: {present, letter: interval of the AUROC; share: of blocks, as share_painted says}}
    """
    chosen = [{k: v[found["setting"] == setting] for k, v in found.items()} for found in seeds]
    inked = [{k: v[found["present"] == 1] for k, v in found.items()} for found in chosen]
    result = {}
    for s, source in enumerate(SOURCES):
        there = [(found["there"][:, s], found["present"], found["patient"]) for found in chosen]
        which = [(found["which"][:, s], found["letter"], found["patient"]) for found in inked]
        result[source] = {"present": markers.interval(there), "letter": markers.interval(which)}
        if source in BLOCKS:
            result[source]["share"] = share_painted(chosen, s)
    return result


def share_painted(chosen, source):
    """How much a letter brightens its strokes, percent of what it does in the true pixels.

    source: its number. → {percent, low, high}
    """
    parts = [(found["there"], found["present"], found["patient"]) for found in chosen]
    there, present, patients = (np.concatenate(part) for part in zip(*parts, strict=True))

    def rise(values, weights):
        """Mean with letter minus mean without. (n,), (n, k) → (k,)"""
        inked = weights * present[:, None]
        clean = weights - inked
        return values @ inked / inked.sum(0) - values @ clean / clean.sum(0)

    def share(weights):
        with np.errstate(invalid="ignore"):  # a draw without letters has no share
            rises = [rise(there[:, column], weights) for column in (source, SOURCES.index("truth"))]
            return 100 * (rises[0] / rises[1])[:, None]

    low, high = bootstrap(share, patients)[0]
    percent = share(np.ones((len(there), 1)))[0, 0]
    return {"percent": float(percent), "low": float(low), "high": float(high)}


def result_table(result):
    """The result in words. → text"""
    lines = [
        f"a letter of {result['letter']:g} of the view's side, read off blocks: AUROC, and share "
        f"of its brightness, percent (95 % interval); {result['films']} films, "
        f"{result['seeds']} seeds",
        f"  {'':8s}{'':36s}{'there?':20s}{'L or R?':20s}brightness",
    ]
    for setting, sources in result["settings"].items():
        for title, found in zip(WORDS, sources.values(), strict=True):
            cells = [(found[name]["auroc"], found[name]) for name in markers.QUESTIONS]
            if "share" in found:
                cells.append((found["share"]["percent"], found["share"]))
            words = [f"{value:4.1f} ({c['low']:.1f}, {c['high']:.1f})" for value, c in cells]
            line = f"  {setting:8s}{title:36s}" + "".join(f"{w:20s}" for w in words)
            lines.append(line.rstrip())
    return "\n".join([*lines, result["overlap"]])


def examples_picture(decoders, asked, films, numbers, grid, device):
    """Draw two views with a letter per setting: context, target, and its block as painted."""
    is_inked = asked["present"] == 1
    rows = [np.flatnonzero(is_inked & (asked["setting"] == s))[:2] for s in markers.SETTINGS]
    some = {name: values[np.concatenate(rows)] for name, values in asked.items()}
    versions = [paint(decoders, some, source, device) for source in PAINTED]
    page = []
    for k, place in enumerate(some["place"]):
        film = markers.burn(films[int(numbers[some["film"][k]])], place)
        item = markers.ask(film, place, markers.SHOWN, grid)
        item["rectangles"] = place.parts[:1]
        page.append(picture_row(item, [version[k : k + 1] for version in versions], grid))
    names = some["setting"].tolist()
    return pictures.grid(page, column_titles=TITLES, row_titles=names, cell=markers.SHOWN)


if __name__ == "__main__":
    run_script(main)
