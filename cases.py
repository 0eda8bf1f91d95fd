"""Cases of a downstream task → what the model sees (crops, views, masks that move with their film), and back: loss, predictions, judgement.

Randomness is keyed by (seed, epoch, index); which worker or rank reads a film changes nothing.
"""

import csv
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import pictures
import runtime
from augment import crop, sample_boxes, sample_jitter, to_float, tone
from data import BadFilm, fit, read_film
from listing import read_mask
from metrics import accuracy, dice, fit_probe, mean_auroc
from runtime import Stop

TRAIN_VIEW, JITTER = 5, 6  # first words of the random keys, as in data.py


def mask_to(mask, size):
    """bool (H, W) → bool (size, size), nearest pixel: the whole film squeezed to a square, as the film itself (DATASETS.md section 9)."""
    return np.asarray(
        Image.fromarray(np.asarray(mask, np.uint8)).resize((size, size), Image.Resampling.NEAREST),
        bool,
    )


def train_crop(film, rng, size):
    """Random resized crop, area fraction 0.4 to 1, and flip. uint8 (H, W) → (size, size)"""
    boxes, flips = sample_boxes(rng, *film.shape, scale=(0.4, 1.0))
    return crop(film, boxes[0], size, flips[0])


def test_views(film, size, ten=False):
    """Short side 256 (for size 224), centre crop; ten: also the four corners, and all five flipped. uint8 (H, W) → (1 or 10, size, size)"""
    film = fit(film, round(size * 256 / 224))
    down, right = film.shape[0] - size, film.shape[1] - size
    corners = [(down // 2, right // 2)] + (
        [(0, 0), (0, right), (down, 0), (down, right)] if ten else []
    )
    views = [film[y : y + size, x : x + size] for y, x in corners]
    return np.stack(views + [v[:, ::-1] for v in views] if ten else views)


def shift_scale_flip(film, mask, rng):
    """Shift by up to a sixteenth, scale by up to a tenth (p = 0.5), flip (p = 0.5): film and mask together, both (size, size); black comes in."""
    size, u = len(film), rng.random(5)
    if u[0] < 0.5:
        zoom, shift = 1 + 0.2 * (u[1] - 0.5), (u[2:4] - 0.5) * size / 8
        start = (
            size / 2 - size / (2 * zoom) - shift
        )  # output pixel p shows input pixel p / zoom + start
        matrix = (1 / zoom, 0, start[1], 0, 1 / zoom, start[0])
        film = np.asarray(
            Image.fromarray(film).transform(
                (size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC
            )
        )
        mask = np.asarray(
            Image.fromarray(mask.astype(np.uint8)).transform(
                (size, size), Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST
            ),
            bool,
        )
    return (film[:, ::-1], mask[:, ::-1]) if u[4] < 0.5 else (film, mask)


class Films:
    """films[i] → (film uint8, mask bool (size, size) or None) of case i; raises BadFilm. Films come at a short side of at most twice `size`
    (the authors' 512 for 224). kept: a dict that holds decoded films by path, filled now by threads; None = decode at every use."""

    def __init__(self, cases, size, kept=None):
        self.cases, self.size, self.kept = cases, size, kept
        new = [] if kept is None else [i for i, c in enumerate(cases) if c.path not in kept]
        with ThreadPoolExecutor() as pool:
            read = tqdm(
                pool.map(self._attempt, new),
                "decode",
                len(new),
                unit=" films",
                leave=False,
                disable=None if new else True,
            )
            for i, item in zip(new, read):
                kept[cases[i].path] = item

    def __len__(self):
        return len(self.cases)

    def _attempt(self, i):
        case = self.cases[i]
        try:
            film = read_film(case.path, 2 * self.size)
            mask = None if case.mask is None else mask_to(read_mask(case), self.size)
            return (fit(film, 2 * self.size) if min(film.shape) > 2 * self.size else film), mask
        except BadFilm as error:
            return error
        except (OSError, SyntaxError, Stop) as error:  # of the mask
            return BadFilm(f"its mask: {error}")

    def __getitem__(self, i):
        item = self._attempt(i) if self.kept is None else self.kept[self.cases[i].path]
        if isinstance(item, BadFilm):
            raise item
        return item


class Train(torch.utils.data.Dataset):
    """Item (epoch, i) → view uint8 (size, size), goal: target float (c,) or mask (size, size); bad: i when film i gave way to the next readable
    one, else -1."""

    def __init__(self, films, seed):
        self.films, self.seed = films, seed

    def __getitem__(self, at):
        epoch, i = at
        for k in range(len(self.films)):
            j = (i + k) % len(self.films)
            try:
                film, mask = self.films[j]
                break
            except BadFilm as error:
                reason = error
        else:
            raise Stop(f"no training film can be read, the last one because: {reason}")
        rng, size = np.random.default_rng((TRAIN_VIEW, self.seed, epoch, i)), self.films.size
        if mask is None:
            view, goal = train_crop(film, rng, size), np.float32(self.films.cases[j].target)
        else:
            view, goal = shift_scale_flip(crop(film, (0, 0, *film.shape), size), mask, rng)
        return {"view": np.array(view), "goal": np.asarray(goal, np.float32), "bad": i if k else -1}


class Test(torch.utils.data.Dataset):
    """Item i → views uint8 (1 or 10, size, size), target or mask, good = False (and zeros) when the film cannot be read."""

    def __init__(self, films, ten=False):
        self.films, self.ten = films, ten

    def __len__(self):
        return len(self.films)

    def __getitem__(self, i):
        size, case = self.films.size, self.films.cases[i]
        try:
            film, mask = self.films[i]
            views = (
                test_views(film, size, self.ten)
                if mask is None
                else crop(film, (0, 0, *film.shape), size)[None]
            )
        except BadFilm:
            goal = case.target if case.mask is None else np.zeros((size, size))
            return {
                "views": np.zeros(
                    (10 if self.ten and case.mask is None else 1, size, size), np.uint8
                ),
                "goal": np.float32(goal),
                "index": i,
                "good": False,
            }
        return {
            "views": np.array(views),
            "goal": np.float32(case.target if mask is None else mask),
            "index": i,
            "good": True,
        }


class Bad:
    """Names and counts the films that cannot be read; more than one film and 1 % of them stop the run."""

    def __init__(self, total):
        self.total, self.names = total, {}

    def note(self, films, indices):
        """films: a Films; indices: of cases in it that were found bad."""
        for i in indices:
            path = str(films.cases[i].path)
            if path not in self.names:
                try:
                    films[i]
                    self.names[path] = "unreadable once"
                except BadFilm as error:
                    self.names[path] = str(error)
                tqdm.write(f"bad film, skipped: {path}: {self.names[path]}")
        if len(self.names) > max(1, 0.01 * self.total):
            first = ", ".join(list(self.names)[:3])
            raise Stop(
                f"{len(self.names)} of {self.total} films cannot be read, more than 1 %: {first}; mend them or take them out of the list"
            )


# ---------------------------------------------------------------- loss, prediction, judgement
def loss_of(kind, logits, goal):
    """Per film: labels → binary cross entropy, mean over classes; classes → cross entropy; mask → cross entropy + 1 - Dice, 1 : 1. → (B,)"""
    if kind == "classes":
        return F.cross_entropy(logits.float(), goal, reduction="none")
    bce = (
        F.binary_cross_entropy_with_logits(logits.float(), goal, reduction="none")
        .flatten(1)
        .mean(1)
    )
    if kind == "labels":
        return bce
    p, t = logits.float().sigmoid().flatten(1), goal.flatten(1)
    return bce + 1 - (2 * (p * t).sum(1) + 1e-5) / (p.sum(1) + t.sum(1) + 1e-5)


def prepare(item, kind, seed, step, places, batch, device):
    """A loaded micro-batch → images (b, 1, H, W) with brightness and contrast in 0.8 … 1.2, goal. Keyed by (seed, step, place in the batch)."""
    jitter = sample_jitter(
        batch, runtime.keyed(JITTER, seed, step), 0.8 if kind == "mask" else 1.0, (0.8, 1.2)
    )[places].to(device)
    images = to_float(item["view"].to(device, non_blocking=True))
    return tone(images, jitter[:, 0], jitter[:, 1])[:, None], item["goal"].to(
        device, non_blocking=True
    )


@torch.no_grad()
def predict(forward, kind, films, config, team, bad, ten=False):
    """{i: row} for every readable case: what forward gives, mean over its crops (c,); kind mask: (Dice, 1 if truth has any pixel, loss)."""
    mine, rows, broken = (
        torch.utils.data.Subset(Test(films, ten), range(team.rank, len(films), team.world)),
        {},
        [],
    )
    size, workers = (
        max(1, config.micro // (10 if ten else 1)),
        config.workers if films.kept is None else 0,
    )
    loader = torch.utils.data.DataLoader(mine, batch_size=size, num_workers=workers)
    for item in loader:
        views = to_float(item["views"].to(team.device))  # (b, v, H, W)
        with runtime.autocast(team.device, config.precision):
            out = forward(views.flatten(0, 1)[:, None]).float()
        if kind == "mask":
            goal = item["goal"].to(team.device)
            losses, guess, truth = (
                loss_of(kind, out, goal).cpu(),
                (out > 0).cpu().numpy(),
                item["goal"].numpy() > 0.5,
            )
            out = [
                np.array([dice(g, t), t.any(), loss])
                for g, t, loss in zip(guess, truth, losses.tolist())
            ]
        else:
            out = out.view(*views.shape[:2], -1).mean(1).cpu().numpy()
        for i, good, row in zip(item["index"].tolist(), item["good"].tolist(), out):
            rows.update({i: row}) if good else broken.append(i)
    if team.world > 1:
        parts = [None] * team.world
        dist.all_gather_object(parts, (rows, broken))
        rows, broken = (
            {i: r for p, _ in parts for i, r in p.items()},
            [i for _, b in parts for i in b],
        )
    bad.note(films, sorted(broken))
    return dict(sorted(rows.items()))


def goals(films, rows):
    """Targets (n, c) of the predicted cases, in their order."""
    return np.array([films.cases[i].target for i in rows], float)


def judge(kind, labels, films, rows):
    """→ (metric in percent, loss, {class: AUROC in percent or None}); a class without positives or negatives counts in no mean."""
    table = np.stack(list(rows.values()))
    percent = lambda x: None if np.isnan(x) else 100 * float(x)
    if kind == "mask":
        some = table[table[:, 1] > 0, 0]
        each = {
            "all films": percent(table[:, 0].mean()),
            "films with a mask": percent(some.mean() if len(some) else np.nan),
        }
        return 100 * table[:, 0].mean(), table[:, 2].mean(), each
    truth = goals(films, rows)
    mean, each = mean_auroc(table, truth)
    loss = (
        loss_of(kind, torch.tensor(table), torch.tensor(truth, dtype=torch.float32)).mean().item()
    )
    return (
        100 * (accuracy(table, truth.argmax(1)) if kind == "classes" else mean),
        loss,
        dict(zip(labels, map(percent, each))),
    )


def solve_head(model, films, config, team, bad):
    """The linear probe: logistic regression on frozen features of un-augmented films, its penalty chosen on validation, written into the head."""
    x, y = {}, {}
    model.eval()  # no drop path
    for split in ("train", "val"):
        rows = predict(model.features, "labels", films[split], config, team, bad)
        x[split], y[split] = np.stack(list(rows.values())), goals(films[split], rows)
    weight, bias = fit_probe(x["train"], y["train"], x["val"], y["val"])
    with torch.no_grad():
        model.head.weight.copy_(torch.from_numpy(weight.T))
        model.head.bias.copy_(torch.from_numpy(bias))


def write_predictions(path, kind, labels, films, rows):
    """predictions.csv: film, class, label (0/1; mask: does it have one), score (logit; mask: Dice), one row a film and class."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(("film", "class", "label", "score"))
    for i, row in rows.items():
        case = films.cases[i]
        pairs = (
            [(labels[0], int(row[1]), row[0])] if kind == "mask" else zip(labels, case.target, row)
        )
        table.writerows(
            (case.path.name, name, label, f"{score:.6g}") for name, label, score in pairs
        )
    runtime.write_text(path, text.getvalue())


@torch.no_grad()
def write_picture(path, model, films, rows, device):
    """cases.png: best, median and worst film by Dice, with truth in green, the prediction in red and what both hold in yellow beside it."""
    order, pictures_of, captions = sorted(rows, key=lambda i: -rows[i][0]), [], []
    for i in (order[0], order[len(order) // 2], order[-1]):
        item = Test(films)[i]
        guess = (
            (model(to_float(torch.from_numpy(item["views"]))[:, None].to(device)) > 0)[0]
            .cpu()
            .numpy()
        )
        tint = np.repeat(item["views"][0][..., None] * 0.6, 3, 2)
        tint[..., 0] += 100 * guess
        tint[..., 1] += 100 * item["goal"]
        pictures_of.append([item["views"][0], tint.clip(0, 255).astype(np.uint8)])
        captions.append([films.cases[i].path.name[:40], f"Dice {100 * rows[i][0]:.1f}"])
    titles = ["film", "green truth, red prediction"]
    pictures.save(
        pictures.grid(pictures_of, captions, titles, ["best", "median", "worst"], cell=256), path
    )
