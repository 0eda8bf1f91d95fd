"""What does the world model expect to see? RCDM paints its predictions. (Fig. 4, 5; Sec. B.2)

    python -m lab.rcdm                      # the newest pre-training run below runs/ and its films
    python -m lab.rcdm --mode global --weights runs/pretrain/last.pt
    python -m lab.rcdm --artefacts          # Fig. 5: is a letter in a hidden block painted?
    python -m lab.rcdm --size 128 --channels 64 --steps 40000 --batch 32       # one GPU

RCDM is a diffusion model that paints from the average of predicted features. local: it paints each
of the four rectangles that are hidden from a view, from the prediction of its own patches.
global: it paints the whole second crop, from what the first one tells. The world model is frozen
and sees views that are neither mirrored nor changed by T_a.

The films that are shown were held out when the world model was trained: seed, holdout, tables and
patients are read from the run's config.json. The decoder does not learn from their patients either.
--out receives config.json, log.csv, last.pt, samples.png, result.json and artefacts.png. The same
command again goes on where the last one stopped.
"""

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import default_collate
from tqdm import tqdm

import augment
from data import Batches, Views, open_films
from lab.common import find_weights, load_predictions, read_whole
from masks import blocks, mask_sizes
from model import grid_coords, take
from plumbing import pictures
from plumbing.checkpoint import Log, StopRequest, lock, resume, save_atomic, write_json
from plumbing.keys import RCDM_NOISE, RCDM_PAINT, RCDM_PLACE, RCDM_SHOWN, numpy_rng, torch_generator
from plumbing.launch import (
    Loader,
    UserError,
    autocast,
    choose_precision,
    clip_and_step,
    flag,
    parse,
    run_script,
    start_team,
    warmup_cosine,
)
from plumbing.own_table import Labels
from plumbing.splits import hold_out_films, patients_of
from plumbing.table import Finder

CODE = 512  # width of the projected prediction (Sec. B.2)
SHOWN = 160  # px of a view in the pictures
RED = "#e5383b"  # frame of what is painted (Fig. 4)


@dataclasses.dataclass
class Config:
    weights: str = flag(None, "last.pt of a run or the authors' file [newest run below runs/]")
    data: str = flag(None, "folder of films or .pack file [that of the run]")
    out: str = flag(None, "folder of the results [runs/rcdm-MODE]")
    mode: str = flag("local", "local: hidden rectangles; global: other crop", ["local", "global"])
    artefacts: bool = flag(False, "local: burn a letter into a hidden block: is it painted?")
    split: str = flag(None, "CSV tables filename,label,split: show their test films [the run's]")
    patients: str = flag(None, "CSV table filename,patient_id, as in pretrain.py [the run's]")
    size: int = flag(None, "side of what is painted, px [64 on a CPU, 128 on a GPU]")
    channels: int = flag(32, "width of the U-Net's first level")
    steps: int = flag(None, "steps; sets the schedules [1200 on a CPU, 40000 on a GPU]")
    max_steps: int = flag(None, "stop early after this many steps, without changing the schedules")
    batch: int = flag(None, "films per step [local 8, global 32; four times that on a GPU]")
    lr: float = flag(1e-3, "peak learning rate")
    films: int = flag(24, "held-out films for numbers and pictures, at least two")
    samples: int = flag(3, "paintings of the same prediction")
    ddim: int = flag(25, "steps of DDIM sampling")
    seed: int = flag(0, "of everything random but the run's hold-out")
    precision: str = flag("auto", "as in pretrain.py", ["auto", "float32", "bfloat16"])
    device: str = flag("auto", "auto, cpu, cuda, cuda:1 or mps")
    workers: int = flag(None, "loader processes [0 on a CPU, 8 on a GPU]")
    log_every: int = flag(20, "steps between rows of log.csv")
    save_every: int = flag(500, "steps between checkpoints")


# A run goes on only with the same of these, the same world and the same films.
RECIPE = ("mode", "size", "channels", "steps", "batch", "lr", "seed", "precision")
LEAST = dict(channels=1, steps=1, batch=1, films=2, samples=1, ddim=1, log_every=1, save_every=1)


# ---------------------------------------------------------------- diffusion
# Time t runs from 0 (picture) to 1 (noise). With the cosine schedule every step is a rotation by
# φ = t π / 2:
#     x_t = cos φ · x + sin φ · ε      v = cos φ · ε - sin φ · x      x = cos φ · x_t - sin φ · v
def noised(x, t, noise):
    """Mix pictures with noise, and tell what the network shall answer. → x_t, v

    x (n, 1, S, S) in [-1, 1], t (n,). x_t: Ho et al. 2020, Eq. 4; v: Salimans & Ho 2022.
    """
    angle = t.view(-1, 1, 1, 1) * math.pi / 2
    return angle.cos() * x + angle.sin() * noise, angle.cos() * noise - angle.sin() * x


@torch.no_grad()
def ddim(answer, noise, steps):
    """Paint from noise without further chance (Song et al. 2021, Eq. 12). → pictures in [-1, 1]

    answer(x_t, t (n,)) → v is the network.
    """
    x = noise
    times = torch.linspace(1, 0, steps + 1, device=noise.device)
    for now, then in zip(times[:-1], times[1:], strict=True):
        angle = now * math.pi / 2
        v = answer(x, now.expand(len(x)))
        clean = (angle.cos() * x - angle.sin() * v).clamp(-1, 1)
        noise = (x - angle.cos() * clean) / angle.sin()  # that belongs to the clipped picture
        x, _ = noised(clean, then, noise)
    return x


# ---------------------------------------------------------------- network
class ConditionalNorm(nn.Module):
    """Batch norm whose scale and shift are linear in the code (de Vries et al. 2017)."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.affine = nn.Linear(CODE, 2 * channels)
        nn.init.zeros_(self.affine.weight)

    def forward(self, x, code):  # (n, C, h, w), (n, CODE) → (n, C, h, w)
        scale, shift = self.affine(code)[..., None, None].chunk(2, 1)
        return self.norm(x) * (1 + scale) + shift


class Residual(nn.Module):
    """Two convolutions, each behind a conditional norm; the time enters between them."""

    def __init__(self, inside, outside):
        super().__init__()
        self.norm1 = ConditionalNorm(inside)
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1)
        self.norm2 = ConditionalNorm(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1)
        self.time = nn.Linear(128, outside)
        self.skip = nn.Conv2d(inside, outside, 1)
        nn.init.zeros_(self.conv2.weight)  # starts as its skip

    def forward(self, x, time, code):
        h = self.conv1(F.silu(self.norm1(x, code))) + self.time(time)[..., None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h, code)))


class Decoder(nn.Module):
    """U-Net on cells of 2 × 2 px, at a half, a quarter and an eighth of the picture's side.

    dim: width of the predictions. c: channels of the first level; the others have 2c and 4c.
    """

    def __init__(self, dim, c):
        super().__init__()
        # Predictions differ little from their mean: a norm makes the differences visible.
        self.project = nn.Sequential(nn.BatchNorm1d(dim, affine=False), nn.Linear(dim, CODE))
        self.time = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU())
        self.stem = nn.Conv2d(4, c, 3, padding=1)
        self.head = nn.Conv2d(c, 4, 3, padding=1)
        self.down = nn.ModuleList([Residual(c, c), Residual(c, 2 * c), Residual(2 * c, 4 * c)])
        self.middle = Residual(4 * c, 4 * c)
        upward = [Residual(8 * c, 4 * c), Residual(6 * c, 2 * c), Residual(3 * c, c)]
        self.up = nn.ModuleList(upward)

    def forward(self, x, t, condition):
        """x_t (n, 1, S, S), t (n,), pooled prediction (n, D) → v (n, 1, S, S)"""
        code = self.project(condition)  # (n, CODE)
        angle = 1000 * t[:, None] * 10000 ** -(torch.arange(32, device=t.device) / 32)
        time = self.time(torch.cat([angle.sin(), angle.cos()], 1))  # (n, 128)
        x = self.stem(F.pixel_unshuffle(x, 2))  # (n, c, S/2, S/2)
        kept = []
        for level, block in enumerate(self.down):
            x = block(F.avg_pool2d(x, 2) if level else x, time, code)
            kept.append(x)
        x = self.middle(x, time, code)
        for level, block in enumerate(self.up):
            if level:
                x = F.interpolate(x, scale_factor=2.0)
            x = block(torch.cat([x, kept.pop()], 1), time, code)
        return F.pixel_shuffle(self.head(F.silu(x)), 2)


# ---------------------------------------------------------------- questions to the world model
def hide(grid, generator, corner=None):
    """Draw four rectangles to hide (Sec. 4.1) and as many visible patches as in pre-training.

    Of eight draws, the one that leaves the fewest patches over. corner: 0 and 1 put the first
    rectangle top left and top right.
    → rectangles (4, 4): top, left, height, width in patches; keep (K,): the visible patches
    """
    count, _ = mask_sizes(grid)
    u = torch.rand(8, 4, 1, 4, generator=generator)
    if corner is not None:
        u[:, 0, 0, 1:3] = torch.tensor([0.0, 0.999 * corner])  # position of the first rectangle
    each = blocks(u, grid, area=(0.15, 0.2), aspect=(0.75, 1.5))  # (8, 4, N)
    spare = (~each.any(1)).sum(1) - count
    each = each[torch.where(spare < 0, grid**2 - spare, spare).argmin()]  # (4, N)
    rows = each.view(4, grid, grid).any(2).int()
    cols = each.view(4, grid, grid).any(1).int()
    rectangles = torch.stack([rows.argmax(1), cols.argmax(1), rows.sum(1), cols.sum(1)], 1)
    order = torch.rand(grid**2, generator=generator) + each.any(0)  # hidden patches come last
    return rectangles, order.argsort()[:count].sort().values


class Questions(Views):
    """Item (epoch, i): a question to the world model about film i, and the pixels of the answer.

    context, target uint8 (size, size). keep (K,): the visible patches. coords (N, 2): where the
    target's patches lie in the context's grid. rectangles (R, 4): the parts to paint, in patches of
    the target. crops uint8 (R, pixels, pixels): those parts. R is 4 (local) or 1 (global).
    """

    def __init__(self, films, size, grid, args, subset):
        super().__init__(films, size, args.seed, subset)
        self.grid = grid
        self.mode = args.mode
        self.pixels = args.size

    def __getitem__(self, key):
        epoch, i = key
        film, replaced = self.read(i)
        return self.ask(film, *self.layout(epoch, i, film.shape)) | replaced

    def layout(self, epoch, i, shape, corner=None):
        """Draw where to cut and what to hide on film i, whose shape is (H, W).

        → boxes (2, 4) px (the whole film when a corner is wanted), rectangles (4, 4), keep (K,)
        """
        boxes, _ = augment.sample_boxes(numpy_rng(RCDM_PLACE, self.seed, epoch, i), *shape)
        if corner is not None:
            boxes = np.array([(0.0, 0.0, *shape)] * 2)
        generator = torch_generator(RCDM_PLACE, self.seed, epoch, i)
        return boxes, *hide(self.grid, generator, corner)

    def ask(self, film, boxes, rectangles, keep, size=None):
        """Cut a film as the layout says → item. size: of the views, for pictures."""
        n = self.grid
        coords = grid_coords(n)
        target_box = boxes[0]
        if self.mode == "global":
            coords = augment.relative_coords(*torch.from_numpy(boxes[:, None]), n)[0]
            target_box = boxes[1]
            rectangles = torch.tensor([[0, 0, n, n]])
            keep = torch.arange(n * n)
        scale = target_box[[2, 3, 2, 3]] / n  # patches → film pixels
        parts = rectangles.numpy() * scale + (*target_box[:2], 0, 0)
        size = size or self.size
        return dict(
            context=np.array(augment.crop(film, boxes[0], size)),
            target=np.array(augment.crop(film, target_box, size)),
            keep=keep,
            coords=coords,
            rectangles=rectangles,
            crops=np.stack([augment.crop(film, part, self.pixels) for part in parts]),
        )

    def elsewhere(self, i, j):
        """Item (0, i) asked of film j, at the same place: what the place alone tells."""
        film, _ = self.read(i)
        other, _ = self.read(j)
        boxes, rectangles, keep = self.layout(0, i, film.shape)
        scale = np.array(other.shape) / film.shape
        return self.ask(other, boxes * scale[[0, 1, 0, 1]], rectangles, keep)


def pool(features, rectangles):
    """Average the patches of each rectangle. (B, N, D), (B, R, 4) → (B, R, D)"""
    at = torch.arange(math.isqrt(features.shape[1]), device=features.device)
    top, left, height, width = rectangles.to(features.device)[..., None].unbind(2)  # (B, R, 1)
    rows = (at >= top) & (at < top + height)  # (B, R, n)
    cols = (at >= left) & (at < left + width)
    inside = (rows[..., None] & cols[..., None, :]).flatten(2)  # (B, R, N)
    return inside / (height * width) @ features


@torch.no_grad()
def predicted(world, item, device):
    """What the decoder paints from: the prediction at all patches, pooled per part. → (B, R, D)

    The action is the identity.
    """
    keep = item["keep"].to(device)
    grid = world.own_coords.expand(len(keep), -1, -1)
    context = world.encoder(augment.to_float(item["context"].to(device))[:, None], keep)
    action = torch.tensor(augment.IDENTITY, device=device).expand(len(keep), 4)
    guess = world.predictor(context, take(grid, keep), item["coords"].to(device), action)
    return pool(guess.float(), item["rectangles"])


def observed(world, views, rectangles, device):
    """Target features of views uint8 (B, H, W), pooled per part. → (B, R, D)"""
    return pool(world.targets(augment.to_float(views.to(device))[:, None]), rectangles)


# ---------------------------------------------------------------- pictures and numbers
def paint(averaged, conditions, args, sample=0):
    """Paint from predictions (B, R, D). → uint8 (B, R, size, size)

    The noise depends on (seed, sample) alone.
    """
    told = conditions.flatten(0, 1)  # (B·R, D)
    generator = torch_generator(RCDM_PAINT, args.seed, sample)
    noise = torch.randn(len(told), 1, args.size, args.size, generator=generator)
    with autocast(told.device, args.precision):
        done = ddim(lambda x, t: averaged(x, t, told).float(), noise.to(told.device), args.ddim)
    grey = ((done + 1) * 127.5).round().byte()
    return grey.view(*conditions.shape[:2], args.size, args.size).cpu().numpy()


def paste(view, parts, rectangles, grid):
    """Put parts (uint8) onto their rectangles of a view uint8 (H, H). → uint8 (H, H)"""
    view = view.copy()
    for part, rectangle in zip(parts, rectangles, strict=False):
        top, left, height, width = (round(int(v) * len(view) / grid) for v in rectangle)
        part = Image.fromarray(part).resize((width, height), Image.Resampling.BICUBIC)
        view[top : top + height, left : left + width] = np.asarray(part)
    return view


def picture_row(item, paintings, grid):
    """One row of a picture: the context with hidden parts grey, the target, and the target with the
    parts of each painting (R or fewer, p, p) pasted in.
    """
    rectangles = item["rectangles"][: len(paintings[0])].tolist()
    boxes = [[round(v * SHOWN / grid) for v in rectangle] for rectangle in rectangles]
    is_hidden = len(item["rectangles"]) > 1  # global mode hides nothing
    grey = [np.full((8, 8), 110, np.uint8)] * 4 if is_hidden else []
    views = [item["target"]]
    views += [paste(item["target"], parts, rectangles, grid) for parts in paintings]
    framed = [pictures.draw_boxes(view, boxes, [RED] * len(boxes)) for view in views]
    return [paste(item["context"], grey, item["rectangles"], grid), *framed]


def distances(world, item, painted, grid, device):
    """How far paintings (B, R, p, p) are from the truth. → (B,), (B,)

    Squared error of grey values (0 to 1), and of pooled target features.
    """
    pixel = ((painted / 255.0 - item["crops"].numpy() / 255.0) ** 2).mean((1, 2, 3))
    rectangles = item["rectangles"].flatten(0, 1)  # (B·R, 4)
    true = observed(world, item["target"], item["rectangles"], device)  # (B, R, D)
    # One part at a time is pasted in; the rest of the view stays as it is.
    views = item["target"].repeat_interleave(true.shape[1], 0).numpy()
    parts = painted.reshape(-1, *painted.shape[2:])
    triples = zip(views, parts, rectangles, strict=True)
    pasted = np.stack([paste(view, [part], [where], grid) for view, part, where in triples])
    seen = observed(world, torch.from_numpy(pasted), rectangles[:, None], device).view_as(true)
    return pixel, (seen - true).square().mean((1, 2)).cpu().numpy()


def summary(values):
    """Mean and standard deviation of some numbers, for result.json."""
    return {"mean": float(np.mean(values)), "std": float(np.std(values))}


def measure(world, averaged, questions, args, device):
    """Paint held-out films from the right prediction, from wrong ones, and from the truth's own
    features; write samples.png. → {name: numbers}
    """
    count = len(questions)
    item = default_collate([questions[0, i] for i in range(count)])
    other = default_collate([questions.elsewhere(i, (i + 1) % count) for i in range(count)])
    told = predicted(world, item, device)
    conditions = {
        "prediction": told,
        "other, same place": predicted(world, other, device),
        "shuffled": told.roll(1, 0),
        "target features": observed(world, item["target"], item["rectangles"], device),
    }
    paintings = {}
    errors = {}  # (2, B): of pixels and of features
    for name, condition in tqdm(conditions.items(), desc="painting", leave=False):
        samples = range(args.samples if name == "prediction" else 1)
        paintings[name] = [paint(averaged, condition, args, sample) for sample in samples]
        squares = [distances(world, item, p, questions.grid, device) for p in paintings[name]]
        errors[name] = np.sqrt(np.mean(squares, 0))
    samples = [f"sample {s + 1}" for s in range(args.samples)]
    versions = [version for some in paintings.values() for version in some]
    films = [questions.read(i)[0] for i in range(count)]
    layouts = [questions.layout(0, i, film.shape) for i, film in enumerate(films)]
    page = picture(questions, films, layouts, versions, ["target", *samples, *list(paintings)[1:]])
    pictures.save(page, Path(args.out) / "samples.png")
    table = {}
    for name, (pixel, feature) in errors.items():
        closer = 100 * (errors["prediction"] < errors[name]).mean(1)
        table[name] = {
            "pixel_error": summary(pixel),
            "feature_distance": summary(feature),
            "prediction_closer_percent": {"pixel": closer[0], "feature": closer[1]},
        }
    return table


def picture(questions, films, layouts, versions, titles):
    """Draw four films: the context, the target and, in it, every version of the painted parts."""
    rows = []
    for i in range(min(4, len(films))):
        item = questions.ask(films[i], *layouts[i], size=SHOWN)
        rows.append(picture_row(item, [version[i] for version in versions], questions.grid))
    return pictures.grid(rows, column_titles=["context", *titles], cell=SHOWN)


def burn(film, corner):
    """Burn an R (corner 0) or an L (1) into the upper left or right, where technicians place it.

    uint8 (H, W) → uint8 (H, W)
    """
    picture = Image.fromarray(film)
    height, width = film.shape
    side = slice(-width // 5, None) if corner else slice(width // 5)
    ink = 245 if film[: height // 5, side].mean() < 150 else 10
    place = (width * (0.1, 0.9)[corner], 0.1 * height)
    font = pictures.font(round(0.13 * min(film.shape)))
    ImageDraw.Draw(picture).text(place, "RL"[corner], ink, font, anchor="mm")
    return np.asarray(picture)


def strength(painted, clean, burnt):
    """How much of the letter a painting holds: 0 as without it, 1 as burnt. uint8 (p, p) each

    It is the contrast of the letter's shape within its box.
    """
    letter = burnt.astype(float) - clean
    rows = np.flatnonzero(np.abs(letter).max(1) > 10)
    cols = np.flatnonzero(np.abs(letter).max(0) > 10)
    box = np.s_[max(0, rows[0] - 2) : rows[-1] + 3, max(0, cols[0] - 2) : cols[-1] + 3]
    shape = letter[box] - letter[box].mean()
    return float(((painted.astype(float) - clean)[box] * shape).sum() / (letter[box] * shape).sum())


def artefacts(world, averaged, questions, args, device):
    """Fig. 5: is a letter in a hidden corner painted from the prediction, and from the features of
    the block itself? Writes artefacts.png. → numbers
    """
    films = [questions.read(i)[0] for i in range(len(questions))]
    layouts = [questions.layout(0, i, film.shape, i % 2) for i, film in enumerate(films)]
    marked = [burn(film, i % 2) for i, film in enumerate(films)]

    def ask_all(some):
        pairs = zip(some, layouts, strict=True)
        return default_collate([questions.ask(film, *layout) for film, layout in pairs])

    clean = ask_all(films)
    burnt = ask_all(marked)
    conditions = {
        "prediction": predicted(world, burnt, device),
        "features with letter": observed(world, burnt["target"], burnt["rectangles"], device),
        "features without": observed(world, clean["target"], clean["rectangles"], device),
    }
    # The letter lies in the first rectangle.
    conditions = {name: condition[:, :1] for name, condition in conditions.items()}
    versions = {name: paint(averaged, told, args) for name, told in conditions.items()}
    before = clean["crops"][:, 0].numpy()
    after = burnt["crops"][:, 0].numpy()
    table = {}
    for name, painted in versions.items():
        triples = zip(painted[:, 0], before, after, strict=True)
        table[name] = summary([strength(*triple) for triple in triples])
    titles = ["with letter", *table]
    page = picture(questions, marked, layouts, list(versions.values()), titles)
    pictures.save(page, Path(args.out) / "artefacts.png")
    told, with_letter, without = (condition[:, 0] for condition in conditions.values())  # (B, D)
    distance = (told - without).square().sum(-1)
    is_nearer = distance < (told - with_letter).square().sum(-1)
    percent = 100 * is_nearer.float().mean().item()
    return {"letter_painted": table, "prediction_nearer_to_features_without_percent": percent}


# ---------------------------------------------------------------- the run
def run_of(weights):
    """The settings of the run that made the weights, from config.json beside them; {} without."""
    path = Path(weights).parent / "config.json"
    if not path.is_file():
        return {}
    run = json.loads(path.read_text(encoding="utf-8"))
    phantoms = Path(run["out"]) / "phantoms"
    if run["probe"] is None and Path(run["data"]) == phantoms / "films":
        run["probe"] = str(phantoms / "phantoms.csv")  # version 0.1 did not write down the demo's
    return run


def fill_in(args, run, device):
    """Fill in every setting that the user left open. → a new Config

    run: settings of the run that made the weights. Raises UserError when a setting cannot work.
    """
    is_gpu = device.type == "cuda"
    defaults = dict(
        data=run.get("data"),
        patients=run.get("patients"),
        out=f"runs/rcdm-{args.mode}",
        size=128 if is_gpu else 64,
        steps=40000 if is_gpu else 1200,
        workers=8 if is_gpu else 0,
        batch=(8 if args.mode == "local" else 32) * (4 if is_gpu else 1),
    )
    left_open = {name: value for name, value in defaults.items() if getattr(args, name) is None}
    precision = choose_precision(args.precision, device)
    args = dataclasses.replace(args, precision=precision, **left_open)
    if not args.data:
        raise UserError(f"--data: a folder of films is wanted; none is named beside {args.weights}")
    for name, least in LEAST.items():
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: at least {least} is wanted")
    if args.size < 16 or args.size % 8:
        raise UserError(f"--size {args.size}: a multiple of 8, at least 16 is wanted")
    return args


def tables_of(paths):
    """The label tables of a flag: CSV files joined by commas, or None."""
    return [Labels(path) for path in paths.split(",")] if paths else []


def choose_films(films, args, run):
    """Choose films to learn from and films to show. → (train, shown), numbers of films

    Both by pretrain.py's rule of hold-out and by the settings of the run that made the weights, so
    the world model has learnt from no film that is shown. No patient is on both sides, and one film
    per patient is shown. Raises UserError when too few films are left.
    """
    seed = run.get("seed", args.seed)
    holdout = run.get("holdout", 50)
    # Of other films than the run's, its tables know nothing.
    finder = Finder(films.names)
    run_tables = [
        table
        for table in tables_of(run.get("probe"))
        if any(place.films for place in finder.find(table.names))
    ]
    tables = tables_of(args.split) or run_tables
    train, held = hold_out_films(films, tables, holdout, seed)
    is_own = run and Path(args.data).resolve() == Path(run["data"]).resolve()
    if args.split and is_own:  # the run may have learnt from the test films of another table
        learnt, _ = hold_out_films(films, run_tables, holdout, seed)
        held = np.setdiff1d(held, learnt)
    patients = patients_of(films, tables, [table.locate(films) for table in tables])
    one_each = list({patients[i]: i for i in held}.values())
    order = numpy_rng(RCDM_SHOWN, args.seed).permutation(one_each)
    _, shown, _ = read_whole(films, order[: args.films], 1)  # those that can be read
    if len(train) < args.batch or len(shown) < 2:
        raise UserError(
            f"{len(train)} films to learn from and {len(shown)} patients to show: "
            f"--batch {args.batch} and two are the least"
        )
    return train, shown


def recipe_of(args, names):
    """Name all that must stay when a run goes on: settings, world model and films to learn from."""
    sources = {
        "world": Path(args.weights).read_bytes(),
        "names": "\n".join(names).encode(errors="surrogateescape"),
    }
    digests = {name: hashlib.sha256(data).hexdigest()[:16] for name, data in sources.items()}
    return {name: getattr(args, name) for name in RECIPE} | digests


def train_step(world, decoder, optimizer, item, step, args, device):
    """Let the decoder tell picture and noise apart, once. → the loss, still on the device"""
    x = item["crops"].to(device).flatten(0, 1)[:, None] / 127.5 - 1  # (B·R, 1, size, size)
    generator = torch_generator(RCDM_NOISE, args.seed, step)
    offset = torch.rand((), generator=generator)
    # The times are spread evenly over the batch.
    t = ((offset + torch.randperm(len(x), generator=generator) / len(x)) % 1).to(device)
    noise = torch.randn(x.shape, generator=generator).to(device)
    noisy, v = noised(x, t, noise)
    told = predicted(world, item, device).flatten(0, 1)  # in float32, as for the pictures
    with autocast(device, args.precision):
        loss = F.mse_loss(decoder(noisy, t, told).float(), v)
    loss.backward()
    clip_and_step(decoder, optimizer, 1.0)
    return loss.detach()


def refuse_infinite(loss: float, done: int):
    """Raise UserError when the mean loss of the last steps is not a number."""
    if not math.isfinite(loss):
        raise UserError(
            f"the loss became NaN or infinite before step {done}: start again with a lower --lr"
        )


def main(argv=None):
    """Train a decoder for the predictions of one world model, then paint held-out films."""
    # ---- 1. Settings: what the user gave, over what the run that made the weights tells.
    args = parse(Config, __doc__, argv, prog="python -m lab.rcdm")
    if args.artefacts and args.mode != "local":
        raise UserError("--artefacts looks at hidden blocks: it wants --mode local")
    args = dataclasses.replace(args, weights=str(find_weights(args.weights)))
    run = run_of(args.weights)
    team = start_team(args.device)
    device = team.device
    args = fill_in(args, run, device)
    out = Path(args.out)
    lock(out)

    # ---- 2. World model and films: those to learn from, and those to show.
    world = load_predictions(args.weights).to(device).eval().requires_grad_(False)
    films = open_films(args.data, out, side=max(320, 2 * args.size), patients=args.patients)
    train, shown = choose_films(films, args, run)
    shape = (world.encoder.image, world.encoder.grid)
    questions = Questions(films, *shape, args, train)
    held_out = Questions(films, *shape, args, shown)

    # ---- 3. Decoder, its moving average and the optimizer.
    torch.manual_seed(args.seed)
    decoder = Decoder(world.encoder.dim, args.channels).to(device)
    average = get_ema_multi_avg_fn(1 - 20 / max(100, args.steps))
    averaged = AveragedModel(decoder, multi_avg_fn=average, use_buffers=True).eval()
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=args.lr, fused=True)

    # ---- 4. Go on where an earlier run in the same folder stopped.
    recipe = recipe_of(args, [films.names[i] for i in train])
    parts = {"decoder": decoder, "averaged": averaged, "optimizer": optimizer}
    saved = resume(out / "last.pt", recipe, parts)
    start = saved["step"] if saved else 0
    end = min(args.steps, args.max_steps or args.steps)
    write_json(out / "config.json", dataclasses.asdict(args))
    parameters = sum(p.numel() for p in decoder.parameters()) / 1e6
    print(
        f"world {args.weights}, films {args.data}: {len(train)} to learn from, "
        f"{len(shown)} to show; {args.mode}, {args.size}² px, U-Net of {parameters:.1f} M "
        f"parameters; steps {start} to {end} of {args.steps} on {device}; run in {out}",
        flush=True,
    )

    # ---- 5. Train.
    log = Log(out / "log.csv", ["step", "images", "loss", "lr"], start)
    order = Batches(len(train), args.batch, args.batch, 0, 1, args.seed, start, end)
    loader = Loader(questions, batch_sampler=order, num_workers=args.workers)
    bar = tqdm(loader, total=max(start, end), initial=start, unit="step")
    warmup = max(1, args.steps // 50)
    losses = []
    with StopRequest() as stop:
        for step, item in enumerate(bar, start):
            lr = warmup_cosine(step, args.steps, warmup, args.lr, 0.0)
            optimizer.param_groups[0]["lr"] = lr
            losses.append(train_step(world, decoder, optimizer, item, step, args, device))
            averaged.update_parameters(decoder)
            done = step + 1
            if done % args.log_every == 0 or done == end:
                mean = torch.stack(losses).mean().item()
                losses = []
                refuse_infinite(mean, done)
                images = done * item["crops"].shape[:2].numel()
                log.row(step=done, images=images, loss=mean, lr=lr)
                bar.set_postfix_str(f"loss {mean:.4f}")
            if done % args.save_every == 0 or done == end or stop.requested:
                state = {name: part.state_dict() for name, part in parts.items()}
                save_atomic(state | {"recipe": recipe, "step": done}, out / "last.pt")
            if stop.requested:
                break
    if stop.requested:
        stop.end(team, f"step {done} in {out}")

    # ---- 6. Pictures and numbers of the films that were held out.
    result = {
        "mode": args.mode,
        "size": args.size,
        "steps": max(start, end),
        "films": len(shown),
        "shown": [films.names[i] for i in shown],
        "paintings": measure(world, averaged, held_out, args, device),
    }
    if args.artefacts:
        result["artefacts"] = artefacts(world, averaged, held_out, args, device)
    write_json(out / "result.json", result)
    print(json.dumps(result, indent=1), f"pictures and numbers: {out}", sep="\n")
    team.leave()


if __name__ == "__main__":
    run_script(main)
