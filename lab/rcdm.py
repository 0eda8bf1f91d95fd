"""See what the world model predicts: RCDM, a diffusion model that paints from the average-pooled predictor output. (Fig. 4, 5; Sec. B.2)

    python rcdm.py                                                      # laptop: the newest pre-training run under runs/ and its films
    python rcdm.py --mode global --weights runs/pretrain/last.pt --data /cxr        # the other crop, from what the context crop tells
    python rcdm.py --artefacts                                          # Fig. 5: a letter burnt into a hidden block: is it painted?
    python rcdm.py --size 128 --channels 64 --steps 40000 --batch 32    # one GPU

local: each of the four rectangles hidden from a view is painted from the pooled prediction of its own patches; global: the second crop is
painted whole. The world model is frozen and sees plain, unmirrored views; what is shown comes from patients never learnt from. The same command
again goes on where the last one stopped. --out receives config.json, log.csv, last.pt, samples.png, result.json and artefacts.png.
"""

import dataclasses
import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

import augment
from data import Batches, Views, open_films
from lab.common import readable
from masks import blocks, mask_sizes
from model import grid_coords, take
from plumbing import pictures
from plumbing.checkpoint import Log, load_checkpoint, save_atomic, write_json
from plumbing.keys import torch_generator
from plumbing.launch import (
    UserError,
    autocast,
    choose_precision,
    flag,
    parse,
    run_script,
    start_team,
    warmup_cosine,
)
from plumbing.table import Labels
from plumbing.weights import load_world

PLACE, NOISE, PAINT = 20, 21, 22  # first words of the random keys


CODE = 512  # width of the projected prediction (Sec. B.2)


SHOWN, RED = 160, "#e5383b"  # px of a view in the pictures, colour of what is painted (Fig. 4)


summary = lambda values: {"mean": float(np.mean(values)), "std": float(np.std(values))}


KEPT = (
    "mode",
    "size",
    "channels",
    "steps",
    "batch",
    "lr",
    "seed",
    "precision",
)  # a run is continued only with the same of these, world and films


@dataclasses.dataclass
class Config:
    weights: str = flag(
        None,
        "last.pt of a pre-training run or the authors' file, predictor included [the newest run under runs/]",
    )
    data: str = flag(None, "folder of films or .pack file [that of the run that made the weights]")
    out: str = flag(None, "folder of the run [runs/rcdm-MODE]")
    mode: str = flag(
        "local",
        "local: the four hidden rectangles of a view; global: the other crop",
        ["local", "global"],
    )
    artefacts: bool = flag(
        False,
        "with --mode local: burn a letter into a hidden block and see whether it is painted (Fig. 5)",
    )
    split: str = flag(
        None,
        "CSV tables filename,label,split joined by commas: only their test films are shown [the run's --probe, else a draw]",
    )
    patients: str = flag(
        None,
        "CSV table filename,patient_id, so that no patient of a shown film is learnt from [the run's]",
    )
    size: int = flag(
        None, "side of the painted pictures, px, a multiple of 8 [64 on a CPU, 128 on a GPU]"
    )
    channels: int = flag(32, "width of the U-Net's first level")
    steps: int = flag(
        None, "steps of the whole training; sets the schedules [1200 on a CPU, 40000 on a GPU]"
    )
    max_steps: int = flag(None, "stop early after this many steps, without changing the schedules")
    batch: int = flag(
        None,
        "films a step, in local mode with four rectangles each [8 local, 32 global; four times that on a GPU]",
    )
    lr: float = flag(1e-3, "peak learning rate")
    films: int = flag(24, "held-out films for numbers and pictures, at least two")
    samples: int = flag(3, "paintings of the same prediction")
    ddim: int = flag(25, "steps of DDIM sampling")
    seed: int = flag(0, "of everything random")
    precision: str = flag(
        "auto",
        "auto = bfloat16 on GPUs and on CPUs that multiply it natively",
        ["auto", "float32", "bfloat16"],
    )
    device: str = flag("auto", "auto, cpu, cuda or cuda:1")
    workers: int = flag(None, "loader processes [0 on a CPU, 8 on a GPU]")
    log_every: int = flag(20, "steps between rows of log.csv")
    save_every: int = flag(500, "steps between checkpoints")


# ------------------------------------------------------------------------------------------------ diffusion
# Time t runs from 0 (picture) to 1 (noise). With the cosine schedule every step is a rotation by φ = t π / 2:
#     x_t = cos φ · x + sin φ · ε        v = cos φ · ε - sin φ · x        x = cos φ · x_t - sin φ · v
def noised(x, t, noise):
    """The forward process (Ho et al. 2020, Eq. 4) and what the network shall answer, v (Salimans & Ho 2022). x (n, 1, S, S) in [-1, 1], t (n,) → x_t, v"""
    angle = t.view(-1, 1, 1, 1) * math.pi / 2
    return angle.cos() * x + angle.sin() * noise, angle.cos() * noise - angle.sin() * x


@torch.no_grad()
def ddim(answer, noise, steps):
    """Deterministic sampling (Song et al. 2021, Eq. 12) from x_1 = noise; answer(x_t, t (n,)) → v is the network. → pictures in [-1, 1]"""
    x, times = noise, torch.linspace(1, 0, steps + 1, device=noise.device)
    for now, then in zip(times, times[1:]):
        angle = now * math.pi / 2
        clean = (angle.cos() * x - angle.sin() * answer(x, now.expand(len(x)))).clamp(-1, 1)
        x, _ = noised(
            clean, then, (x - angle.cos() * clean) / angle.sin()
        )  # with the noise that belongs to the clipped picture
    return x


# ------------------------------------------------------------------------------------------------ network
class ConditionalNorm(nn.Module):
    """Batch norm whose scale and shift are linear in the code of the prediction (de Vries et al. 2017). (n, C, h, w), (n, CODE) → (n, C, h, w)"""

    def __init__(self, channels):
        super().__init__()
        self.norm, self.affine = (
            nn.BatchNorm2d(channels, affine=False),
            nn.Linear(CODE, 2 * channels),
        )
        nn.init.zeros_(self.affine.weight)

    def forward(self, x, code):
        scale, shift = self.affine(code)[..., None, None].chunk(2, 1)
        return self.norm(x) * (1 + scale) + shift


class Residual(nn.Module):
    """Two convolutions, each behind a conditional norm; the time enters between them."""

    def __init__(self, inside, outside):
        super().__init__()
        self.norm1, self.conv1 = ConditionalNorm(inside), nn.Conv2d(inside, outside, 3, padding=1)
        self.norm2, self.conv2 = ConditionalNorm(outside), nn.Conv2d(outside, outside, 3, padding=1)
        self.time, self.skip = nn.Linear(128, outside), nn.Conv2d(inside, outside, 1)
        nn.init.zeros_(self.conv2.weight)  # starts as its skip

    def forward(self, x, time, code):
        h = self.conv1(F.silu(self.norm1(x, code))) + self.time(time)[..., None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h, code)))


class Decoder(nn.Module):
    """U-Net on cells of 2 × 2 px: a half, a quarter and an eighth of the side, with 1, 2 and 4 × c channels. dim: width of the predictions."""

    def __init__(self, dim, c):
        super().__init__()
        self.project = nn.Sequential(
            nn.BatchNorm1d(dim, affine=False), nn.Linear(dim, CODE)
        )  # predictions differ little from their mean
        self.time = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU())
        self.stem, self.head = nn.Conv2d(4, c, 3, padding=1), nn.Conv2d(c, 4, 3, padding=1)
        self.down = nn.ModuleList([Residual(c, c), Residual(c, 2 * c), Residual(2 * c, 4 * c)])
        self.middle = Residual(4 * c, 4 * c)
        self.up = nn.ModuleList(
            [Residual(8 * c, 4 * c), Residual(6 * c, 2 * c), Residual(3 * c, c)]
        )

    def forward(self, x, t, condition):
        """x_t (n, 1, S, S), t (n,), pooled prediction (n, D) → v (n, 1, S, S)"""
        code = self.project(condition)  # (n, CODE)
        angle = 1000 * t[:, None] * 10000 ** -(torch.arange(32, device=t.device) / 32)
        time = self.time(torch.cat([angle.sin(), angle.cos()], 1))
        x, kept = self.stem(F.pixel_unshuffle(x, 2)), []  # (n, c, S/2, S/2)
        for k, block in enumerate(self.down):
            x = block(F.avg_pool2d(x, 2) if k else x, time, code)
            kept.append(x)
        x = self.middle(x, time, code)
        for k, block in enumerate(self.up):
            x = block(
                torch.cat([F.interpolate(x, scale_factor=2.0) if k else x, kept.pop()], 1),
                time,
                code,
            )
        return F.pixel_shuffle(self.head(F.silu(x)), 2)


# ------------------------------------------------------------------------------------------------ films → questions to the world model
def hide(grid, generator, corner=None, tries=8):
    """Four rectangles to hide (Sec. 4.1) and as many visible patches as in pre-training: the draw that leaves the fewest patches over.
    corner 0, 1: the first lies top left, top right. → rectangles (4, 4) of top, left, height, width in patches; keep (K,)"""
    count, u = mask_sizes(grid)[0], torch.rand(tries, 4, 1, 4, generator=generator)
    if corner is not None:
        u[:, 0, 0, 1:3] = torch.tensor([0.0, 0.999 * corner])
    each = blocks(u, grid, (0.15, 0.2), (0.75, 1.5))  # (tries, 4, N)
    spare = (~each.any(1)).sum(1) - count
    each = each[torch.where(spare < 0, grid**2 - spare, spare).argmin()]  # (4, N)
    rows, cols = (each.view(4, grid, grid).any(axis) for axis in (2, 1))
    order = torch.rand(grid**2, generator=generator) + each.any(0)  # hidden patches come last
    return torch.stack(
        [rows.int().argmax(1), cols.int().argmax(1), rows.sum(1), cols.sum(1)], 1
    ), order.argsort()[:count].sort().values


class Pairs(Views):
    """Item (epoch, i), torch_generator with the seed: a question to the world model about film i, and the pixels of the answer.
    context, target uint8 (size, size); keep (K,) visible patches; coords (N, 2): where the target's patches lie in the context's grid;
    rectangles (R, 4): the parts to paint, in patches of the target; crops uint8 (R, pixels, pixels), those parts. R = 4 (local) or 1 (global)."""

    def __init__(self, films, size, grid, config, subset):
        super().__init__(films, size, config.seed, subset)
        self.grid, self.mode, self.pixels = grid, config.mode, config.size

    def __getitem__(self, key):
        film, replaced = self.read(key[1])
        return self.ask(film, *self.place(*key, film.shape)) | replaced

    def place(self, epoch, i, shape, corner=None):
        """Boxes (2, 4) px on a film of this shape (the whole film when a corner is wanted), rectangles (4, 4), visible patches (K,)."""
        boxes, _ = augment.sample_boxes(np.random.default_rng((PLACE, self.seed, epoch, i)), *shape)
        return boxes if corner is None else np.array([(0.0, 0.0, *shape)] * 2), *hide(
            self.grid, torch_generator(PLACE, self.seed, epoch, i), corner
        )

    def ask(self, film, boxes, rectangles, keep, size=None):
        """Cut a film at a place → item; views of another size for pictures."""
        n, coords, box = self.grid, grid_coords(self.grid), boxes[0]
        if self.mode == "global":
            coords, box = augment.relative_coords(*torch.from_numpy(boxes[:, None]), n)[0], boxes[1]
            rectangles, keep = torch.tensor([[0, 0, n, n]]), torch.arange(n * n)
        parts = rectangles.numpy() * box[[2, 3, 2, 3]] / n + (
            *box[:2],
            0,
            0,
        )  # patches → film pixels
        context, target = (
            np.array(augment.crop(film, b, size or self.size)) for b in (boxes[0], box)
        )
        return dict(
            context=context,
            target=target,
            keep=keep,
            coords=coords,
            rectangles=rectangles,
            crops=np.stack([augment.crop(film, part, self.pixels) for part in parts]),
        )

    def elsewhere(self, i, j):
        """Item (0, i) asked of film j at the place of film i: what the place alone tells."""
        (film, _), (other, _) = self.read(i), self.read(j)
        boxes, *rest = self.place(0, i, film.shape)
        return self.ask(other, boxes * (np.array(other.shape) / film.shape)[[0, 1, 0, 1]], *rest)


def pool(features, rectangles):
    """Average the patches of each rectangle. (B, N, D), (B, R, 4) → (B, R, D)"""
    at = torch.arange(math.isqrt(features.shape[1]), device=features.device)
    top, left, height, width = rectangles.to(features.device)[..., None].unbind(2)  # (B, R, 1) each
    rows, cols = (
        (at >= first) & (at < first + length) for first, length in ((top, height), (left, width))
    )
    return (
        (rows[..., None] & cols[..., None, :]).flatten(2) / (height * width) @ features
    )  # (B, R, N) @ (B, N, D)


@torch.no_grad()
def predicted(world, item, device):
    """What the decoder paints from: the prediction at all patches of the target, pooled over each part; the action is the identity. → (B, R, D)"""
    keep, at = item["keep"].to(device), world.coords.expand(len(item["keep"]), -1, -1)
    h = world.encoder(augment.to_float(item["context"].to(device))[:, None], keep)
    told = torch.tensor(augment.IDENTITY, device=device).expand(len(h), 4)
    guess = world.predictor(h, take(at, keep), item["coords"].to(device), told)  # (B, N, D)
    return pool(guess.float(), item["rectangles"])


def observed(world, views, rectangles, device):
    """Target features of views uint8 (B, H, W), pooled over each part. → (B, R, D)"""
    return pool(world.targets(augment.to_float(views.to(device))[:, None]), rectangles)


# ------------------------------------------------------------------------------------------------ pictures and numbers
def paste(view, parts, rectangles, grid):
    """Put parts (uint8) onto their rectangles of a view uint8 (H, H). → uint8 (H, H)"""
    view = view.copy()
    for part, rectangle in zip(parts, rectangles):
        top, left, height, width = (round(int(v) * len(view) / grid) for v in rectangle)
        view[top : top + height, left : left + width] = np.asarray(
            Image.fromarray(part).resize((width, height), Image.Resampling.BICUBIC)
        )
    return view


def row_of(view, versions, grid, count=4):
    """One row of a picture: the context with the hidden parts grey, the target, each version's first `count` parts pasted in."""
    rectangles = view["rectangles"][:count].tolist()
    boxes = [[round(v * SHOWN / grid) for v in r] for r in rectangles]
    grey = [np.full((8, 8), 110, np.uint8)] * (
        4 if len(view["rectangles"]) > 1 else 0
    )  # global mode hides nothing
    pasted = [
        view["target"],
        *(paste(view["target"], parts, rectangles, grid) for parts in versions),
    ]
    return [
        paste(view["context"], grey, view["rectangles"], grid),
        *(pictures.draw_boxes(p, boxes, [RED] * len(boxes)) for p in pasted),
    ]


def paint(averaged, conditions, config, sample=0):
    """Paint from (B, R, D) predictions; the noise depends on (seed, sample) alone. → uint8 (B, R, size, size)"""
    flat, shape = conditions.flatten(0, 1), (*conditions.shape[:2], config.size, config.size)
    noise = torch.randn(
        len(flat), 1, *shape[2:], generator=torch_generator(PAINT, config.seed, sample)
    ).to(flat.device)
    with autocast(flat.device, config.precision):
        done = [
            ddim(lambda x, t: averaged(x, t, told).float(), start, config.ddim)
            for told, start in zip(flat.split(128), noise.split(128))
        ]
    return ((torch.cat(done) + 1) * 127.5).round().byte().view(shape).cpu().numpy()


def distances(world, item, painted, grid, device):
    """How far paintings (B, R, p, p) are from the truth: squared error of grey values (0 to 1) and of pooled target features. → (B,), (B,)"""
    pixel = ((painted / 255.0 - item["crops"].numpy() / 255.0) ** 2).mean((1, 2, 3))
    true, rectangles = (
        observed(world, item["target"], item["rectangles"], device),
        item["rectangles"].flatten(0, 1),
    )
    views = (
        item["target"].repeat_interleave(true.shape[1], 0).numpy()
    )  # one part at a time, the rest of the view as it is
    pasted = [
        paste(view, [part], [r], grid)
        for view, part, r in zip(views, painted.reshape(-1, *painted.shape[2:]), rectangles)
    ]
    seen = observed(world, torch.from_numpy(np.stack(pasted)), rectangles[:, None], device).view_as(
        true
    )
    return pixel, (seen - true).square().mean((1, 2)).cpu().numpy()


def measure(world, averaged, pairs, config, device):
    """Paint held-out films from the right prediction, from wrong ones and from the truth's own features; samples.png. → {name: numbers}"""
    n, grid = len(pairs), pairs.grid
    item, other = (
        default_collate(list(items))
        for items in (
            (pairs[0, i] for i in range(n)),
            (pairs.elsewhere(i, (i + 1) % n) for i in range(n)),
        )
    )
    told = predicted(world, item, device)
    conditions = {
        "prediction": told,
        "other, same place": predicted(world, other, device),
        "shuffled": told.roll(1, 0),
        "target features": observed(world, item["target"], item["rectangles"], device),
    }
    table, versions, right = {}, [], {}
    for name, condition in tqdm(conditions.items(), desc="painting", leave=False):
        painted = [
            paint(averaged, condition, config, s)
            for s in range(config.samples if name == "prediction" else 1)
        ]
        pixel, feature = errors = np.sqrt(
            np.mean([distances(world, item, p, grid, device) for p in painted], 0)
        )  # (2, B)
        table[name] = {
            "pixel_error": summary(pixel),
            "feature_distance": summary(feature),
            "prediction_closer_percent": dict(
                zip(
                    ("pixel", "feature"),
                    (100 * (right.setdefault("errors", errors) < errors).mean(1)).tolist(),
                )
            ),
        }
        versions += painted
    films = [pairs.read(i)[0] for i in range(min(4, n))]
    rows = [
        row_of(
            pairs.ask(film, *pairs.place(0, i, film.shape), SHOWN), [p[i] for p in versions], grid
        )
        for i, film in enumerate(films)
    ]
    titles = [
        "context",
        "target",
        *(f"sample {s + 1}" for s in range(config.samples)),
        *list(table)[1:],
    ]
    pictures.save(
        pictures.grid(rows, column_titles=titles, cell=SHOWN), Path(config.out) / "samples.png"
    )
    return table


def burn(film, corner):
    """Burn an R (corner 0) or an L (1) into the upper left or right, where technicians place it. uint8 (H, W) → uint8 (H, W)"""
    picture, (height, width) = Image.fromarray(film), film.shape
    ink = (
        245
        if film[: height // 5, slice(-width // 5, None) if corner else slice(width // 5)].mean()
        < 150
        else 10
    )
    ImageDraw.Draw(picture).text(
        (width * (0.1, 0.9)[corner], 0.1 * height),
        "RL"[corner],
        ink,
        pictures.font(round(0.13 * min(film.shape))),
        anchor="mm",
    )
    return np.asarray(picture)


def strength(painted, clean, burnt):
    """How much of the letter a painting holds: contrast of the letter's shape within its box; 0 as without, 1 as burnt. uint8 (p, p) each"""
    letter = burnt.astype(float) - clean
    rows, cols = (np.flatnonzero(np.abs(letter).max(axis) > 10) for axis in (1, 0))
    box = np.s_[max(0, rows[0] - 2) : rows[-1] + 3, max(0, cols[0] - 2) : cols[-1] + 3]
    shape = letter[box] - letter[box].mean()
    return float(((painted.astype(float) - clean)[box] * shape).sum() / (letter[box] * shape).sum())


def artefacts(world, averaged, pairs, config, device):
    """Fig. 5: a letter lies in a hidden corner block; is it painted from the prediction, and from the block's own features? artefacts.png → numbers"""
    films = [pairs.read(i)[0] for i in range(len(pairs))]
    places, marked = zip(
        *((pairs.place(0, i, film.shape, i % 2), burn(film, i % 2)) for i, film in enumerate(films))
    )
    clean, burnt = (
        default_collate([pairs.ask(film, *place) for film, place in zip(some, places)])
        for some in (films, marked)
    )
    told, (without, with_letter) = (
        predicted(world, burnt, device),
        (observed(world, x["target"], x["rectangles"], device) for x in (clean, burnt)),
    )
    table, versions = {}, []
    for name, condition in (
        ("prediction", told),
        ("features with letter", with_letter),
        ("features without", without),
    ):
        versions.append(paint(averaged, condition[:, :1], config))
        table[name] = summary(
            [
                strength(*each)
                for each in zip(
                    versions[-1][:, 0], clean["crops"][:, 0].numpy(), burnt["crops"][:, 0].numpy()
                )
            ]
        )
    rows = [
        row_of(pairs.ask(marked[i], *places[i], SHOWN), [p[i] for p in versions], pairs.grid, 1)
        for i in range(min(4, len(films)))
    ]
    pictures.save(
        pictures.grid(rows, column_titles=["context", "with letter", *table], cell=SHOWN),
        Path(config.out) / "artefacts.png",
    )
    nearer = (told - without)[:, 0].square().sum(-1) < (told - with_letter)[:, 0].square().sum(-1)
    return {
        "letter_painted": table,
        "prediction_nearer_to_features_without_percent": 100 * nearer.float().mean().item(),
    }


# ------------------------------------------------------------------------------------------------ run
def choose(config):
    """Fill what the user left open: newest weights, the films and tables of their run, sizes for the device. Refuse what cannot work. → device, folder"""
    if config.artefacts and config.mode != "local":
        raise UserError("--artefacts looks at hidden blocks: it wants --mode local")
    found = sorted(
        (p for p in Path("runs").rglob("last.pt") if (p.parent / "encoder.pt").is_file()),
        key=os.path.getmtime,
    )
    if not (config.weights or found):
        raise UserError(
            "no pre-training run (last.pt beside encoder.pt) under runs/: run pretrain.py, or give --weights FILE"
        )
    config.weights = config.weights or str(found[-1])
    beside = Path(config.weights).parent / "config.json"
    run = (
        json.loads(beside.read_text())
        if config.data is None and beside.is_file()
        else {"data": config.data}
    )
    if not run.get("data"):
        raise UserError(f"--data: a folder of films is wanted, for {beside} names none")
    config.data, config.patients = run["data"], config.patients or run.get("patients")
    config.split = (
        config.split
        or run.get("probe")
        or next(map(str, Path(run["data"]).parent.glob("phantoms.csv")), None)
    )
    gpu = (device := start_team(config.device).device).type == "cuda"
    config.precision = choose_precision(config.precision, device)
    for key, value in dict(
        out=f"runs/rcdm-{config.mode}",
        size=128 if gpu else 64,
        steps=40000 if gpu else 1200,
        workers=8 if gpu else 0,
        batch=(8 if config.mode == "local" else 32) * (4 if gpu else 1),
    ).items():
        setattr(config, key, value if getattr(config, key) is None else getattr(config, key))
    for key, low in dict(
        channels=1, steps=1, batch=1, films=2, samples=1, ddim=1, log_every=1, save_every=1, size=16
    ).items():
        if getattr(config, key) < low or key == "size" and config.size % 8:
            raise UserError(
                f"--{key} {getattr(config, key)}: {'a multiple of 8, ' * (key == 'size')}at least {low} is wanted"
            )
    return device, Path(config.out)


def split_films(films, config):
    """Films to learn from and films to show: no patient in both, one shown film a patient; those that pretrain.py holds out. → (train, shown)"""
    patients, held = list(films.patients), set()
    for table in (Labels(path) for path in config.split.split(",")) if config.split else ():
        for i, patient, part in zip(table.locate(films), table.patients, table.split):
            if i >= 0 and patients[i] == films.names[i]:  # the folder knew nobody: the table may
                patients[i] = patient
            held |= {int(i)} if i >= 0 and part == "test" else set()
    if not config.split:
        held = set(
            np.random.default_rng((3, config.seed))
            .permutation(len(films))[: max(2, min(50, len(films) // 10))]
            .tolist()
        )
    away = {patients[i]: i for i in sorted(held)}  # patient → one film
    train = [i for i in range(len(films)) if patients[i] not in away]
    shown = readable(
        films,
        np.random.default_rng((PLACE, config.seed)).permutation(list(away.values()))[
            : config.films
        ],
    )
    if len(train) < config.batch or len(shown) < 2:
        raise UserError(
            f"{len(train)} films to learn from and {len(shown)} patients to show: --batch {config.batch} and two are the least"
        )
    return np.array(train), shown


def resume(path, recipe, learning):
    """Continue from last.pt when there is one; a changed recipe is refused. → step to go on with"""
    saved = load_checkpoint(path) if path.is_file() else {"step": 0, "recipe": recipe}
    changed = [
        f"{k} {saved.get('recipe', {}).get(k)} → {v}"
        for k, v in recipe.items()
        if saved.get("recipe", {}).get(k) != v
    ]
    if changed:
        raise UserError(
            f"{path.parent} holds a run with another recipe ({'; '.join(changed)}): choose another --out, or delete it to start anew"
        )
    for name, part in learning.items() if saved["step"] else ():
        part.load_state_dict(saved[name])
    return saved["step"]


def main():
    config = parse(Config, __doc__)
    device, out = choose(config)

    # data, world model
    world = load_world(config.weights).to(device).eval().requires_grad_(False)
    films = open_films(config.data, out, side=max(320, 2 * config.size), patients=config.patients)
    train, shown = split_films(films, config)
    pairs, held = (
        Pairs(films, world.encoder.image, world.encoder.grid, config, part)
        for part in (train, shown)
    )

    # decoder, optimizer, resume
    torch.manual_seed(config.seed)
    decoder = Decoder(world.encoder.dim, config.channels).to(device)
    averaged = AveragedModel(
        decoder,
        multi_avg_fn=get_ema_multi_avg_fn(1 - 20 / max(100, config.steps)),
        use_buffers=True,
    ).eval()
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=config.lr, fused=True)
    sums = {
        "world": Path(config.weights).read_bytes(),
        "names": "\n".join(films.names[i] for i in train).encode(),
    }
    recipe = {k: getattr(config, k) for k in KEPT} | {
        k: hashlib.sha256(v).hexdigest()[:16] for k, v in sums.items()
    }
    learning = {"decoder": decoder, "averaged": averaged, "optimizer": optimizer}
    start, end = (
        resume(out / "last.pt", recipe, learning),
        min(config.steps, config.max_steps or config.steps),
    )
    write_json(out / "config.json", dataclasses.asdict(config))
    print(
        f"world {config.weights}, films {config.data}: {len(train)} to learn from, {len(shown)} to show; {config.mode}, {config.size}² px, U-Net of "
        f"{sum(p.numel() for p in decoder.parameters()) / 1e6:.1f} M parameters; steps {start} to {end} of {config.steps} on {device}; run in {out}",
        flush=True,
    )

    # loop
    log, losses = Log(out / "log.csv", ["step", "images", "loss", "lr"], start), []
    loader = DataLoader(
        pairs,
        batch_sampler=Batches(
            len(train), config.batch, config.batch, 0, 1, config.seed, start, end
        ),
        num_workers=config.workers,
    )
    for step, item in enumerate(
        bar := tqdm(loader, total=max(start, end), initial=start, unit="step"), start
    ):
        lr = optimizer.param_groups[0]["lr"] = warmup_cosine(
            step, config.steps, max(1, config.steps // 50), config.lr, 0.0
        )
        x, generator = (
            item["crops"].to(device).flatten(0, 1)[:, None] / 127.5 - 1,
            torch_generator(NOISE, config.seed, step),
        )  # (B·R, 1, size, size)
        t = (
            (
                torch.rand((), generator=generator)
                + torch.randperm(len(x), generator=generator) / len(x)
            )
            % 1
        ).to(device)  # even over the batch
        noisy, v = noised(x, t, torch.randn(x.shape, generator=generator).to(device))
        told = predicted(world, item, device).flatten(0, 1)  # in float32, as for the pictures
        with autocast(device, config.precision):
            loss = F.mse_loss(decoder(noisy, t, told).float(), v)
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        averaged.update_parameters(decoder)
        losses.append(loss.detach())
        if (done := step + 1) % config.log_every == 0 or done == end:
            mean, losses = torch.stack(losses).mean().item(), []
            if not math.isfinite(mean):
                raise UserError(
                    f"the loss became NaN or infinite before step {done}: start again with a lower --lr"
                )
            log.row(step=done, images=done * len(x), loss=mean, lr=lr)
            bar.set_postfix_str(f"loss {mean:.4f}")
        if done % config.save_every == 0 or done == end:
            save_atomic(
                {k: v.state_dict() for k, v in learning.items()} | {"recipe": recipe, "step": done},
                out / "last.pt",
            )

    # pictures and numbers of films never learnt from
    result = {
        "mode": config.mode,
        "size": config.size,
        "steps": max(start, end),
        "films": len(shown),
        "paintings": measure(world, averaged, held, config, device),
    }
    if config.artefacts:
        result["artefacts"] = artefacts(world, averaged, held, config, device)
    write_json(out / "result.json", result)
    print(json.dumps(result, indent=1), f"pictures and numbers: {out}", sep="\n")


if __name__ == "__main__":
    run_script(main)
