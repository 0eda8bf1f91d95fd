"""Is a marker painted from the prediction, by a decoder that can paint it? (Fig. 5, the picture)

    python -m lab.letters                                            # newest run, synthetic films
    python -m lab.letters --weights runs/films --data FILMS --patients patients.csv

Fig. 5 shows masked regions painted without the marker that was in them. That says something of the
prediction only if the decoder would paint a marker that it is told of. So a large letter, a third
of the view tall, is burnt (in memory) into one block of half of all views, and two decoders learn
to paint the same blocks: the first from the target's own pooled features, which hold the
letter (the ceiling), the second from the prediction. Both then paint blocks of patients that
neither decoders nor world model know, in the three settings of lab.markers. The first decoder,
which has learnt from features that tell whether there is a letter, is also told the prediction.

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

import augment
from data import Batches
from lab import common, markers
from lab.rcdm import boxes_of, picture_row
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
SIDE = 32  # of a painted block, px
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


def main(argv=None):
    """Paint blocks with and without a letter from what one world model says of them."""
    args, device = common.start(Config, __doc__, "letters", argv)
    if not 0.1 <= args.letter <= 0.4:
        raise UserError(f"--letter {args.letter}: a share from 0.1 to 0.4 is wanted")
    study, result = markers.open_study(args, device)
    size = args.letter * np.array([1, NARROW])
    answers = []
    for seed in range(args.seed, args.seed + args.seeds):
        found = markers.collect(study, args, seed, size, look)
        is_test = hold_out(found["patient"], seed)
        taught = common.select(found, ~is_test)
        asked = common.select(found, is_test)
        decoders = {kind: teach(taught, kind, seed, device) for kind in ("target", "prediction")}
        answers.append({s: answer(decoders, taught, asked, s, seed) for s in markers.SETTINGS})
        if seed == args.seed:
            page = examples_picture(decoders, asked, study, size, seed)
    result["settings"] = {s: judge([found[s] for found in answers]) for s in markers.SETTINGS}
    title = f"a letter of {args.letter:g} of the view's side, read off blocks: AUROC"
    words = markers.result_table(title, result, WORDS, "brightness")
    common.finish(args, result, words, paintings=page)


def hold_out(patients, seed):
    """Choose the rows of a third of the patients, to be painted. patients (n,) → (n,) bool"""
    order = numpy_rng(MARKER_SPLIT, seed).permutation(np.unique(patients))
    return np.isin(patients, order[: len(order) // 3])


def look(world, films, places):
    """Read features and pixels of the blocks of some films, one place on each.

    → {prediction, target (n, D): features of the block; clean (n, D): the prediction from the film
    without letter; crop uint8 (n, SIDE, SIDE): the block; strokes uint8 (n, 2, SIDE, SIDE): where
    ink of an R would be, and of an L; present, letter (n,) of 0 and 1}
    """
    told = markers.look(world, films, places)
    crops = []
    strokes = []
    for film, place in zip(films, places, strict=True):
        box = boxes_of(place.parts[:1], place.boxes[1], world.encoder.grid)[0]
        shown = markers.burn(film, place) if place.is_present else film
        crops.append(augment.crop(shown, box, SIDE))
        both = [place._replace(letter=letter) for letter in markers.LETTERS]
        inked = [markers.burn(np.zeros_like(film), one) for one in both]
        strokes.append([augment.crop(ink, box, SIDE) for ink in inked])
    found = {kind: markers.features_of(told, "present", "block", kind) for kind in PROBED}
    found |= {"present": told["present"], "letter": told["letter"]}
    return found | {"crop": np.array(crops), "strokes": np.array(strokes)}


# ---------------------------------------------------------------- decoders and their paintings
def teach(taught, kind, seed, device):
    """Train a decoder to paint blocks from features of this kind: least squares."""
    told = taught[kind]  # (n, D)
    crops = taught["crop"]  # uint8 (n, SIDE, SIDE)
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
def paint(decoders, asked, source):
    """Paint blocks as PAINTED says. → uint8 (n, SIDE, SIDE)"""
    kind, told = PAINTED[source]
    decoder = decoders[kind]
    device = next(decoder.parameters()).device
    pixels = decoder(torch.from_numpy(asked[told]).to(device))
    grey = (255 * pixels.clamp(0, 1)).round().byte()
    return grey.view(asked["crop"].shape).cpu().numpy()


def answer(decoders, taught, asked, setting, seed):
    """Probe the features of the test patients' blocks, paint them, and read what is painted.

    taught, asked: blocks as collect finds them, of other patients. → asked in this setting, with
    there and which (n, sources): how much speaks for a letter, and for an L
    """
    taught = common.select(taught, taught["setting"] == setting)
    asked = common.select(asked, asked["setting"] == setting)
    reads = [probe(taught, asked, kind, seed) for kind in PROBED]
    for source in BLOCKS:
        blocks = asked["crop"] if source == "truth" else paint(decoders, asked, source)
        reads.append(read(blocks, asked["strokes"], asked["letter"]))
    there, which = np.transpose(reads, (1, 2, 0))
    return asked | {"there": there, "which": which}


def probe(taught, asked, kind, seed):
    """Ask features of one setting by linear probes, one per question. → there, which (n,)"""
    is_val = hold_out(taught["patient"], seed)
    scores = []
    for question in markers.QUESTIONS:
        # Which letter it is can be learnt only where there is one.
        is_in = (taught["present"] == 1) | (question == "present")
        parts = []
        for part in (is_in & ~is_val, is_in & is_val):
            parts += [taught[kind][part], taught[question][part]]
        scores.append(linear_probe(*parts, asked[kind]))
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
def judge(seeds):
    """Judge all sources of one setting. seeds: what answer gave, per seed.

    → {source: {present, letter: interval of the AUROC; share: of blocks, as share_painted says}}
    """
    inked = [common.select(found, found["present"] == 1) for found in seeds]
    result = {}
    for s, source in enumerate(SOURCES):
        there = [(found["there"][:, s], found["present"], found["patient"]) for found in seeds]
        which = [(found["which"][:, s], found["letter"], found["patient"]) for found in inked]
        result[source] = {"present": markers.interval(there), "letter": markers.interval(which)}
        if source in BLOCKS:
            result[source]["share"] = share_painted(seeds, s)
    return result


def share_painted(seeds, source):
    """How much a letter brightens its strokes, percent of what it does in the true pixels.

    source: its number. → {percent, low, high}
    """
    parts = [(found["there"], found["present"], found["patient"]) for found in seeds]
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


def examples_picture(decoders, asked, study, size, seed):
    """Draw two views with a letter per setting: context, target, and its block as painted."""
    image = study.world.encoder.image
    grid = study.world.encoder.grid
    is_inked = asked["present"] == 1
    rows = [np.flatnonzero(is_inked & (asked["setting"] == s))[:2] for s in markers.SETTINGS]
    some = common.select(asked, np.concatenate(rows))
    versions = [paint(decoders, some, source) for source in PAINTED]
    page = []
    for k, setting in enumerate(some["setting"].tolist()):
        film = study.films[int(study.numbers[some["film"][k]])]
        key = (seed, int(some["draw"][k]), int(some["film"][k]))
        place = markers.draw(setting, film, image, grid, size, *key)
        item = markers.ask(markers.burn(film, place), place, markers.SHOWN, grid)
        item["rectangles"] = place.parts[:1]
        page.append(picture_row(item, [version[k : k + 1] for version in versions], grid))
    names = some["setting"].tolist()
    return pictures.grid(page, column_titles=TITLES, row_titles=names, cell=markers.SHOWN)


if __name__ == "__main__":
    run_script(main)
