"""What does the world model expect to see? RCDM paints its predictions. (Fig. 4; Sec. B.2)

    python -m lab.rcdm                      # the newest pre-training run below runs/ and its films
    python -m lab.rcdm --mode global --weights runs/pretrain/last.pt
    python -m lab.rcdm --learn nih_val.txt --show test_list.txt     # as in the paper
    python -m lab.rcdm --size 128 --channels 64 --steps 40000 --batch 32       # one GPU

RCDM is a diffusion model that paints from the average of predicted features. local: it paints each
of the four masked rectangles of a view, from the prediction of its patches. global: it paints the
whole second crop, from what the first one tells. The world model is frozen, is asked as in
pre-training (the same masks), and gets views that are neither mirrored nor changed by T_a.

No patient is in two of these: the films that the world model was trained on (the run's config.json
tells), those that the decoder learns from, and those that are shown. Without --learn and --show,
the films that the run left out are divided. --out receives config.json, log.csv, last.pt,
samples.png and result.json. The same command again resumes where the last one stopped.
"""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import default_collate
from tqdm import tqdm

import augment
from data import Batches, Views, open_films
from lab import common
from masks import TRIES, cover, sample_masks
from model import take
from plumbing import checkpoint, pictures
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

CODE = 512  # width of the projected prediction (Sec. B.2)
SHOWN = 160  # px of a view in the pictures
RED = "#e5383b"  # frame of what is painted (Fig. 4)


@dataclasses.dataclass
class Config:
    weights: str = flag(None, "last.pt of a run or the authors' file [newest run below runs/]")
    data: str = flag(None, "folder of films or .pack file [that of the run]")
    out: str = flag(None, "folder of the results [runs/rcdm-MODE]")
    mode: str = flag("local", "local: masked rectangles; global: other crop", ["local", "global"])
    learn: str = flag(
        None,
        "list (.txt) or CSV table of the films that the decoder learns from, of one with splits "
        "those of val [films that the run left out]",
    )
    show: str = flag(
        None, "the same of the films to show, those of test [other films that the run left out]"
    )
    allow_seen: bool = flag(
        False, "take films that the world model was trained on, too, and say so"
    )
    patients: str = flag(None, "CSV table filename,patient_id, as in pretrain.py [the run's]")
    size: int = flag(None, "side of what is painted, px [64 on a CPU, 128 on a GPU]")
    channels: int = flag(32, "width of the U-Net's first level")
    steps: int = flag(None, "steps; sets the schedules [1200 on a CPU, 40000 on a GPU]")
    batch: int = flag(None, "films per step [local 8, global 32; four times that on a GPU]")
    lr: float = flag(1e-3, "peak learning rate")
    films: int = flag(24, "patients to show, one film each, at least two")
    samples: int = flag(3, "paintings of the same prediction")
    ddim: int = flag(25, "steps of DDIM sampling")
    seed: int = flag(0, "of everything random but the run's hold-out")
    precision: str = flag("auto", "as in pretrain.py", ["auto", "float32", "bfloat16"])
    device: str = flag("auto", "auto, cpu, cuda, cuda:1 or mps")
    workers: int = flag(None, "loader processes [0 on a CPU, 8 on a GPU]")
    log_every: int = flag(20, "steps between rows of log.csv")
    save_every: int = flag(500, "steps between checkpoints")


# A run is resumed only with the same of these, the same world and the same films.
RECIPE = ("mode", "size", "channels", "steps", "batch", "lr", "seed", "precision")


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
        # Predictions differ little from their mean: a norm makes the differences count.
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
def training_mask(grid, *key):
    """Draw one mask of pre-training (Sec. 4.1) and tell its rectangles.

    key: of plumbing.keys. → rectangles (4, 4): top, left, height, width in patches; keep (K,) and
    masked (M,), as masks.sample_masks draws them
    """
    keep, masked = (drawn[0] for drawn in sample_masks(1, grid, torch_generator(*key)))
    # sample_masks draws the same numbers first, and uses the try with the smallest shortfall.
    u = torch.rand(TRIES, 4, 1, 4, generator=torch_generator(*key))
    each = cover(u, grid, area=(0.15, 0.2), aspect=(0.75, 1.5))  # (TRIES, 4, N)
    union = each.any(1)
    chosen = (union[:, masked].sum(1) - union[:, keep].sum(1)).argmax()
    each = each[chosen].view(4, grid, grid)
    rows = each.any(2).int()
    cols = each.any(1).int()
    return torch.stack([rows.argmax(1), cols.argmax(1), rows.sum(1), cols.sum(1)], 1), keep, masked


def cut_question(film, boxes, rectangles, keep, asked, size, grid):
    """Cut a question to the world model out of a film, as `predicted` takes it.

    boxes (2, 4): context and target, px; rectangles (R, 4), keep (K,), asked (M,): in patches
    """
    coords = augment.relative_coords(*torch.from_numpy(boxes[:, None]), grid)[0]
    return dict(
        context=np.array(augment.crop(film, boxes[0], size)),
        target=np.array(augment.crop(film, boxes[1], size)),
        keep=keep,
        asked=asked,
        coords=coords[asked],
        rectangles=rectangles,
    )


def boxes_of(rectangles, box, grid):
    """Rectangles (R, 4) of patches of a view as boxes of the film, where the view is `box`, px."""
    return rectangles.numpy() * (box[[2, 3, 2, 3]] / grid) + (*box[:2], 0, 0)


class Questions(Views):
    """Item (epoch, i): a question to the world model about film i, and the pixels of the answer.

    context, target uint8 (size, size). keep (K,): patches of the context that are kept. asked (M,):
    patches of the target that are asked for, coords (M, 2): where they lie in the context's grid.
    rectangles (R, 4): the parts to paint, in patches of the target. crops uint8 (R, pixels,
    pixels): those parts. M and R are as many patches as in pre-training and 4 (local), or N and 1
    (global).
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

    def layout(self, epoch, i, shape):
        """Draw where to cut and what to keep of film i, whose shape is (H, W).

        → boxes (2, 4) px of context and target, rectangles (R, 4), keep (K,), asked (M,)
        """
        key = (RCDM_PLACE, self.seed, epoch, i)
        boxes, _ = augment.sample_boxes(numpy_rng(*key), *shape)
        rectangles, keep, asked = training_mask(self.grid, *key)
        if self.mode == "local":
            return boxes[[0, 0]], rectangles, keep, asked
        n = self.grid
        return boxes, torch.tensor([[0, 0, n, n]]), keep, torch.arange(n * n)

    def ask(self, film, boxes, rectangles, *patches):
        """Cut a film as the layout says. → item"""
        parts = boxes_of(rectangles, boxes[1], self.grid)
        crops = np.stack([augment.crop(film, part, self.pixels) for part in parts])
        item = cut_question(film, boxes, rectangles, *patches, self.size, self.grid)
        return item | {"crops": crops}

    def elsewhere(self, i, j):
        """Item (0, i) asked of film j, at the same place: what the place alone tells."""
        film, _ = self.read(i)
        other, _ = self.read(j)
        boxes, *mask = self.layout(0, i, film.shape)
        scale = np.array(other.shape) / film.shape
        return self.ask(other, boxes * scale[[0, 1, 0, 1]], *mask)


def pool(features, asked, rectangles, grid):
    """Average the features of each rectangle's patches, as far as they were asked for.

    features (B, M, D) of the patches asked (B, M); rectangles (B, R, 4) → (B, R, D)
    """
    rectangles = rectangles.to(features.device)[..., None]
    top, left, height, width = rectangles.unbind(2)  # (B, R, 1) each
    row = asked.to(features.device)[:, None] // grid  # (B, 1, M)
    col = asked.to(features.device)[:, None] % grid
    inside = (row >= top) & (row < top + height) & (col >= left) & (col < left + width)
    return inside.float() @ features / inside.sum(2, keepdim=True).clamp(min=1)


@torch.no_grad()
def predicted(world, item, device):
    """What the decoder paints from: the prediction of the patches asked for, pooled per part.

    The action is the identity. → (B, R, D)
    """
    keep = item["keep"].to(device)
    grid = world.own_coords.expand(len(keep), -1, -1)
    context = world.encoder(augment.to_float(item["context"].to(device))[:, None], keep)
    action = torch.tensor(augment.IDENTITY, device=device).expand(len(keep), 4)
    guess = world.predictor(context, take(grid, keep), item["coords"].to(device), action)
    return pool(guess.float(), item["asked"], item["rectangles"], world.encoder.grid)


def observed(world, views, asked, rectangles, device):
    """Target features of the same patches of views uint8 (B, H, W), pooled per part. → (B, R, D)"""
    features = world.targets(augment.to_float(views.to(device))[:, None])
    features = take(features, asked.to(device))
    return pool(features, asked, rectangles, world.encoder.grid)


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


def shade(view, keep, grid):
    """A view uint8 (H, H) with the patches grey that are not kept, keep (K,)."""
    is_kept = np.zeros(grid * grid, np.uint8)
    is_kept[keep] = 1
    mask = Image.fromarray(is_kept.reshape(grid, grid))
    return np.where(mask.resize(view.shape, Image.Resampling.NEAREST), view, 110).astype(np.uint8)


def picture_row(item, paintings, grid):
    """One row of a picture: the context with all else grey, the target, and the target with
    the parts of each painting (R, p, p) pasted in.
    """
    rectangles = item["rectangles"].tolist()
    boxes = [[round(v * SHOWN / grid) for v in rectangle] for rectangle in rectangles]
    views = [item["target"]]
    views += [paste(item["target"], parts, rectangles, grid) for parts in paintings]
    framed = [pictures.draw_boxes(view, boxes, [RED] * len(boxes)) for view in views]
    return [shade(item["context"], item["keep"], grid), *framed]


def squared_error(item, painted):
    """Mean squared error of the grey values (0 to 1) of paintings (B, R, p, p) → (B,)"""
    return ((painted / 255.0 - item["crops"].numpy() / 255.0) ** 2).mean((1, 2, 3))


def measure(world, averaged, questions, args, footnote, device):
    """Paint films from the right prediction, from wrong ones, and from the truth's own features.

    → {name: numbers}, the picture of four films
    """
    count = len(questions)
    item = default_collate([questions[0, i] for i in range(count)])
    other = default_collate([questions.elsewhere(i, (i + 1) % count) for i in range(count)])
    told = predicted(world, item, device)
    conditions = {
        "prediction": told,
        "other, same place": predicted(world, other, device),
        "shuffled": told.roll(1, 0),
        "target features": observed(
            world, item["target"], item["asked"], item["rectangles"], device
        ),
    }
    paintings = {}
    errors = {}  # (B,): root of the mean squared error over the samples
    for name, condition in tqdm(conditions.items(), desc="painting", leave=False):
        samples = range(args.samples if name == "prediction" else 1)
        paintings[name] = [paint(averaged, condition, args, sample) for sample in samples]
        squares = [squared_error(item, painted) for painted in paintings[name]]
        errors[name] = np.sqrt(np.mean(squares, 0))
    samples = [f"sample {s + 1}" for s in range(args.samples)]
    versions = [version for some in paintings.values() for version in some]
    titles = ["target", *samples, *list(paintings)[1:]]
    table = {}
    for name, error in errors.items():
        table[name] = {
            "pixel_error": {"mean": float(error.mean()), "std": float(error.std())},
            "prediction_closer_percent": 100 * float((errors["prediction"] < error).mean()),
        }
    return table, picture(questions, versions, titles, footnote)


def picture(questions, versions, titles, footnote):
    """Draw four films: the context, the target and, in it, every version of the painted parts."""
    rows = []
    for i in range(min(4, len(questions))):
        film, _ = questions.read(i)
        item = cut_question(film, *questions.layout(0, i, film.shape), SHOWN, questions.grid)
        rows.append(picture_row(item, [version[i] for version in versions], questions.grid))
    titles = ["context", *titles]
    return pictures.grid(rows, column_titles=titles, cell=SHOWN, footnote=footnote)


# ---------------------------------------------------------------- the run
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
    if args.films < 2:
        raise UserError(f"--films {args.films}: at least 2 are wanted")
    if args.size < 16 or args.size % 8:
        raise UserError(f"--size {args.size}: a multiple of 8, at least 16 is wanted")
    return args


def choose_films(films, args, run, learnt):
    """Choose films for the decoder to learn from and films to show, of different patients.

    learnt: what common.trained_on says. One film per patient is shown; without --learn and --show,
    the decoder gets all other films that the world model was not trained on. → two arrays of
    numbers of films, and in words what the world model knows of them. Raises UserError when too few
    films are left.
    """
    probes = (run.get("probe") or "").split(",")
    tables = [table for table in (*probes, args.learn, args.show) if table]
    patients = common.patients_with(films, [table for table in tables if Path(table).is_file()])
    is_seen = common.seen_by(learnt, films, patients)
    is_trusted = learnt is None and args.learn and args.show
    is_usable = ~is_seen | bool(args.allow_seen or is_trusted)
    learn = common.named(args.learn, films, "val")
    show = common.named(args.show, films, "test")
    if args.learn and not args.show:
        show = show[~np.isin(patients[show], patients[learn])]
    order = numpy_rng(RCDM_SHOWN, args.seed).permutation(show[is_usable[show]])
    order = order[np.argsort(is_seen[order], kind="stable")]  # those it has not seen come first
    _, first = np.unique(patients[order], return_index=True)  # one film per patient
    first = order[np.sort(first)][: args.films]
    _, shown, _ = common.read_whole(films, first, 1)  # the readable ones
    taken = show if args.show else shown
    learn = learn[is_usable[learn] & ~np.isin(patients[learn], patients[taken])]
    if len(learn) < args.batch or len(shown) < 2:
        raise UserError(
            f"{len(learn)} films to learn from and {len(shown)} patients to show: --batch "
            f"{args.batch} and two are the least. Films that the world model was or may have been "
            "trained on do not count: pre-train with a larger --holdout or a --probe table, name "
            "other films by --learn and --show, or take those, too, by --allow_seen"
        )
    parts = {"to learn from": is_seen[learn], "to show": is_seen[shown]}
    return learn, shown, common.seen_words(learnt, parts)


def recipe_of(args, names):
    """Name what a resumed run must share: settings, world model and films to learn from."""
    recipe = {name: getattr(args, name) for name in RECIPE}
    world = checkpoint.digest(Path(args.weights).read_bytes())
    return recipe | {"world": world, "names": checkpoint.digest_of_names(names)}


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
    args = dataclasses.replace(args, weights=str(common.find_weights(args.weights)))
    run = common.run_of(args.weights)
    team = start_team(args.device)
    device = team.device
    args = fill_in(args, run, device)
    out = Path(args.out)
    checkpoint.refuse_other_program(out, checkpoint.DECODER)
    checkpoint.lock(out)

    # ---- 2. World model and films: those to learn from, and those to show.
    world = common.load_predictions(args.weights).to(device).eval().requires_grad_(False)
    films = open_films(args.data, out, side=max(320, 2 * args.size), patients=args.patients)
    learnt = common.trained_on(args.weights, films)
    train, shown, overlap = choose_films(films, args, run, learnt)
    shape = (world.encoder.image, world.encoder.grid)
    questions = Questions(films, *shape, args, train)
    held_out = Questions(films, *shape, args, shown)

    # ---- 3. Decoder, its moving average and the optimizer.
    torch.manual_seed(args.seed)
    decoder = Decoder(world.encoder.dim, args.channels).to(device)
    average = get_ema_multi_avg_fn(1 - 20 / max(100, args.steps))
    averaged = AveragedModel(decoder, multi_avg_fn=average, use_buffers=True).eval()
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=args.lr, fused=True)

    # ---- 4. Resume where an earlier run in the same folder stopped.
    recipe = recipe_of(args, [films.names[i] for i in train])
    parts = {"decoder": decoder, "averaged": averaged, "optimizer": optimizer}
    saved = checkpoint.resume(out / "last.pt", recipe, parts)
    start = saved["step"] if saved else 0
    checkpoint.write_json(out / "config.json", dataclasses.asdict(args))
    parameters = sum(p.numel() for p in decoder.parameters()) / 1e6
    print(
        f"world {args.weights}, films {args.data}: {len(train)} to learn from, "
        f"{len(shown)} to show; {args.mode}, {args.size}² px, U-Net of {parameters:.1f} M "
        f"parameters; steps {start} to {args.steps} on {device}; run in {out}\n{overlap}",
        flush=True,
    )

    # ---- 5. Train.
    log = checkpoint.Log(out / "log.csv", ["step", "images", "loss", "lr"], start)
    order = Batches(len(train), args.batch, args.batch, 0, 1, args.seed, start, args.steps)
    loader = Loader(questions, batch_sampler=order, num_workers=args.workers)
    bar = tqdm(loader, total=args.steps, initial=start, unit="step")
    warmup = max(1, args.steps // 50)
    losses = []
    with checkpoint.StopRequest() as stop:
        for step, item in enumerate(bar, start):
            lr = warmup_cosine(step, args.steps, warmup, args.lr, 0.0)
            optimizer.param_groups[0]["lr"] = lr
            losses.append(train_step(world, decoder, optimizer, item, step, args, device))
            averaged.update_parameters(decoder)
            done = step + 1
            if done % args.log_every == 0 or done == args.steps:
                mean = torch.stack(losses).mean().item()
                losses = []
                refuse_infinite(mean, done)
                images = done * item["crops"].shape[:2].numel()
                log.row(step=done, images=images, loss=mean, lr=lr)
                bar.set_postfix_str(f"loss {mean:.4f}")
            if done % args.save_every == 0 or done == args.steps or stop.requested:
                state = {name: part.state_dict() for name, part in parts.items()}
                checkpoint.save_atomic(state | {"recipe": recipe, "step": done}, out / "last.pt")
            if stop.requested:
                break
    if stop.requested:
        stop.end(team, f"step {done} in {out}")

    # ---- 6. Pictures and numbers of the films that were held out.
    numbers, page = measure(world, averaged, held_out, args, overlap, device)
    result = {
        "mode": args.mode,
        "size": args.size,
        "steps": args.steps,
        "films": len(shown),
        "shown": [films.names[i] for i in shown],
        "learnt_from": len(train),
        "overlap": overlap,
        "paintings": numbers,
    }
    common.finish(args, result, json.dumps(result, indent=1), samples=page)
    team.leave()


if __name__ == "__main__":
    run_script(main)
