"""Correspondence (Fig. 6): where in another film lies what is marked in this one? Dense features, heat maps, landmarks and how well they are found.

Features of the whole film, one a patch; a pixel's feature is the mean over a window of 2 × 2 patches centred on it (RoI pooling); the
answer is the pixel whose feature is nearest, by L2 distance, to that of the landmark in the reference film. Places are (row, col) in
fractions of the film's height and width, (0, 0) = its top-left corner.
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

import augment
from lab.common import Common, find_weights, finish, grey, open_set, rows_of, run_command
from lab.domain import GREEN
from model import ViT
from plumbing import pictures
from plumbing.film import UnreadableFilm
from plumbing.launch import UserError, flag, run_script
from plumbing.weights import load_encoder, resized


@dataclasses.dataclass
class Config(Common):
    table: str = flag(
        None,
        "CSV with filename and NAME_row, NAME_col (px), or filename and mask (both lungs: tips and lower corners are derived)",
    )
    references: int = flag(
        5, "films in which the landmarks are marked; each is used alone, results are averaged"
    )
    image: int = flag(
        None, "side of the films, px; other sizes than the encoder's are allowed [the encoder's]"
    )
    patch: int = flag(None, "side of a patch, px [the encoder's]")
    side: int = flag(64, "side of the heat maps, px")
    crop: bool = flag(
        False,
        "cut the films at random, all landmarks inside: the closer these lie together, the less their places alone tell",
    )


# ------------------------------------------------------------------------------------------------ correspondence
def command(config, device):
    """Landmarks of reference films found in others by nearest features (Fig. 6), against random weights, raw pixels and places alone."""
    encoder = load_encoder(find_weights(config))
    films, table = open_set(
        config, 7 * (config.films + config.references), side=0
    )  # as stored: the table counts its pixels
    if not table:
        raise UserError(
            "correspondence on --data needs --table CSV with landmarks (NAME_row, NAME_col) or lung masks (mask)"
        )
    numbers, places, shapes, names = read_landmarks(table, films, config.films + config.references)
    size, patch, R = (
        config.image or encoder.image,
        config.patch or encoder.patch,
        min(config.references, len(numbers) - 1),
    )
    if size % patch:
        raise UserError(f"--image {size} is not a multiple of --patch {patch}")
    rng, boxes = np.random.default_rng((10, config.seed)), [(0.0, 0.0, *shape) for shape in shapes]
    if config.crop:
        boxes[R:] = [box_around(rng, shape, place) for shape, place in zip(shapes[R:], places[R:])]
    boxes = np.array(boxes)
    kept = float((boxes[R:, 2:].prod(1) / shapes[R:].prod(1)).mean())
    places, shapes = (
        (places * shapes[:, None] - boxes[:, None, :2]) / boxes[:, None, 2:],
        boxes[:, 2:],
    )
    images = augment.to_float(
        torch.from_numpy(
            np.stack([augment.crop(films[int(i)], box, size) for i, box in zip(numbers, boxes)])
        )
    )[:, None]
    torch.manual_seed(config.seed)
    fresh = ViT(**encoder.config)
    pair = {
        name: resized(vit, size, patch).to(device).eval()
        for name, vit in (("pre-trained", encoder), ("random weights", fresh))
    }
    ways = {name: lambda x, vit=vit: dense(vit, x, config.side) for name, vit in pair.items()}
    ways["raw pixels"] = lambda x: raw_windows(x, config.side, size // patch)
    found = {
        name: find(way, images[:R], places[:R], images[R:], name) for name, way in ways.items()
    }  # (R, n, L, 2) each
    found["reference's place"] = np.broadcast_to(places[:R, None], found["raw pixels"].shape)
    others = (places.sum(0) - places[R:]) / (
        len(places) - 1
    )  # mean over all films but the one asked about
    found["mean place of all other films"] = others[None]
    result = {name: score(f, places[R:], shapes[R:]) for name, f in found.items()}
    lines = [
        f"correspondence, {R} reference × {len(images) - R} films{f' cut at random to {kept:.0%} of their area' * config.crop}, {size}² px in {patch}² patches; distance in % of the width, PCK in %",
        f"  {'':30s}distance  PCK@5  PCK@10   " + "  ".join(names),
    ]
    for name, row in result.items():
        each = "  ".join(f"{v:{len(n)}.1f}" for v, n in zip(row["distance_each"], names))
        lines.append(
            f"  {name:30s}{row['distance']:8.1f}{row['pck@5']:7.1f}{row['pck@10']:8.1f}   {each}"
        )
    shown = [0, *range(R, min(R + 5, len(images)))]
    page = maps_picture(ways["pre-trained"], images[shown], places[shown], names)
    result = {
        "methods": result,
        "references": R,
        "films": len(images) - R,
        "landmarks": names,
        "image": size,
        "patch": patch,
        "area_kept": kept,
    }
    finish(config, result, "\n".join(lines), maps=page)


def maps_picture(way, images, places, names, cell=150):
    """One row a landmark: the reference film, then test films under their heat map (bright = alike); cross = truth, ring = answer."""
    features = way(images)
    maps = heat_maps(features[0], places[0], features[1:])  # (B, L, side, side)
    answers, rows = nearest(maps), []
    films = [pictures.to_picture(grey(image), cell) for image in images]
    for k in range(len(names)):
        row = [mark(films[0], places[0, k], None)]
        for film, each, true, answer in zip(
            films[1:], maps[:, k].cpu().numpy(), places[1:, k], answers[:, k]
        ):
            row.append(mark(pictures.overlay(film, pictures.heat(-each), 0.45), true, answer))
        rows.append(row)
    titles = ["reference", *(f"film {i + 1}" for i in range(len(images) - 1))]
    return pictures.grid(
        rows, column_titles=titles, row_titles=[n.replace("_", " ") for n in names], cell=cell
    )


def mark(picture, true, answer, size=6):
    """A cross at the true place and a ring at the answer; places are fractions (row, col)."""
    picture = picture.copy()
    draw, (width, height) = ImageDraw.Draw(picture), picture.size
    row, col = true[0] * height, true[1] * width
    for line in ([col - size, row, col + size, row], [col, row - size, col, row + size]):
        draw.line(line, GREEN, 2)
    if answer is not None:
        row, col = answer[0] * height, answer[1] * width
        draw.ellipse([col - size, row - size, col + size, row + size], outline="white", width=2)
    return picture


MASK_LANDMARKS = (
    "right_apex",
    "left_apex",
    "right_angle",
    "left_angle",
)  # the patient's right is the image's left


# ---------------------------------------------------------------- dense features
def window_weights(side, grid):
    """(side, grid): how much of each patch lies in the window of two patches' width around each pixel's centre, cut at the film's edge; rows sum to 1."""
    centre = (
        (torch.arange(side, dtype=torch.float64) + 0.5) * grid / side
    )  # in patch widths from the edge
    patch = torch.arange(grid, dtype=torch.float64)
    overlap = torch.minimum(centre[:, None] + 1, patch + 1) - torch.maximum(
        centre[:, None] - 1, patch
    )
    overlap = overlap.clamp(min=0)
    return (overlap / overlap.sum(1, keepdim=True)).float()


def roi_pool(tokens, side):
    """Patch features → a feature for each pixel of a side × side film, by exact area-weighted RoI pooling. (B, N, D) → (B, side, side, D)"""
    grid = round(tokens.shape[1] ** 0.5)
    weights = window_weights(side, grid).to(tokens)
    return torch.einsum("ri,bijd,cj->brcd", weights, tokens.unflatten(1, (grid, grid)), weights)


@torch.no_grad()
def dense(encoder, images, side):
    """Features of whole films a pixel. (B, 1, H, W) → (B, side, side, D)"""
    return roi_pool(encoder(images.to(next(encoder.parameters()).device)).float(), side)


def raw_windows(images, side, grid):
    """The baseline that knows nothing: the grey values of the same window around each pixel. (B, 1, H, W) → (B, side, side, k²), k = 2 patches"""
    small = F.interpolate(images, (side, side), mode="bicubic", antialias=True, align_corners=False)
    k = 2 * (side // grid) + 1
    return (
        F.unfold(F.pad(small, [k // 2] * 4, mode="replicate"), k)
        .unflatten(2, (side, side))
        .permute(0, 2, 3, 1)
    )


def heat_maps(reference, places, test):
    """Distance of every pixel to each landmark of the reference film. (side, side, D), (L, 2), (B, side, side, D) → (B, L, side, side)"""
    side = reference.shape[0]
    at = torch.as_tensor(np.clip(places * side, 0, side - 1)).long()
    wanted = reference[at[:, 0], at[:, 1]]  # (L, D)
    return torch.cdist(
        wanted.expand(len(test), -1, -1),
        test.flatten(1, 2),
        compute_mode="donot_use_mm_for_euclid_dist",
    ).unflatten(2, (side, side))


def find(way, references, places, tests, words="films", batch=8):
    """Look for each landmark of each reference film in each test film. way: images → dense features; places (R, L, 2) → (R, n, L, 2) fractions"""
    known, found = way(references), []
    for part in tqdm(tests.split(batch), desc=words, leave=False):
        features = way(part)
        found.append(np.stack([nearest(heat_maps(k, p, features)) for k, p in zip(known, places)]))
    return np.concatenate(found, 1)


def nearest(maps):
    """The best place on each heat map. (..., side, side) → (..., 2) fractions"""
    side = maps.shape[-1]
    best = maps.flatten(-2).argmin(-1).cpu().numpy()
    return (np.stack([best // side, best % side], -1) + 0.5) / side


def score(found, true, shapes):
    """Found (R, n, L, 2) against true places (n, L, 2), films of shapes (n, 2) px → mean distance in % of the width; PCK: share within 5, 10 %."""
    away = (found - true) * shapes[:, None] / shapes[:, None, 1:]  # in units of the film's width
    away = 100 * np.linalg.norm(away, axis=-1)  # (R, n, L)
    return {
        "distance": float(away.mean()),
        "pck@5": float(100 * (away <= 5).mean()),
        "pck@10": float(100 * (away <= 10).mean()),
        "distance_each": [float(v) for v in away.mean((0, 1))],
    }


# ---------------------------------------------------------------- where the landmarks truly are
def box_around(rng, shape, places, tries=100):
    """A random box, 0.3 to 0.8 of the film's area, that holds all its landmarks; the whole film where none is found, as of landmarks
    that lie at its edges. places (L, 2) fractions → (4,) px"""
    for _ in range(tries):
        box = augment.sample_boxes(rng, *shape, scale=(0.3, 0.8))[0][0]
        inside = (places * shape - box[:2]) / box[2:]
        if 0.02 < inside.min() and inside.max() < 0.98:
            return box
    return np.array([0.0, 0.0, *shape])


def from_mask(mask):
    """Landmarks of a mask of both lungs: tips and outer lower corners. bool (H, W) → (4, 2) fractions; None when a side is empty."""
    height, width = mask.shape
    columns = mask.any(0).nonzero()[0]
    if not len(columns):
        return None
    middle = round(float(mask.nonzero()[1].mean()))
    points = []
    for outward, (start, stop) in ((-1, (0, middle)), (1, (middle, width))):
        rows, cols = mask[:, start:stop].nonzero()
        if not len(rows):
            return None
        top = rows <= rows.min() + 0.01 * height  # a tip is a few rows, not one pixel
        corner = (rows / height + outward * (cols + start) / width).argmax()
        points.append(
            [(rows[top].mean(), cols[top].mean() + start), (rows[corner], cols[corner] + start)]
        )
    (right_top, right_low), (left_top, left_low) = points
    return (np.array([right_top, left_top, right_low, left_low]) + 0.5) / (height, width)


def read_landmarks(table, films, count):
    """Truth from a CSV: columns filename and either <name>_row, <name>_col (px of the film as stored) or mask (a picture of both lungs).

    At most `count` films, evenly from all that are there. → (numbers of the films, places (n, L, 2) fractions, shapes (n, 2) px, names of the landmarks)
    """
    rows = rows_of(table, films)
    columns = list(rows[0][1])
    names = [c[:-4] for c in columns if c.endswith("_row") and c[:-4] + "_col" in columns]
    if not names and "mask" not in columns:
        raise UserError(
            f"--table {table}: columns NAME_row, NAME_col or mask are wanted, found {', '.join(columns)}"
        )
    found = []
    for k in sorted({*np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)}):
        i, row = rows[k]
        try:
            shape = films[i].shape
        except UnreadableFilm:
            continue
        try:
            if names:
                places = (
                    np.array([[float(row[f"{n}_row"]), float(row[f"{n}_col"])] for n in names])
                    + 0.5
                ) / shape
            else:
                places = from_mask(
                    np.asarray(Image.open(Path(table).parent / row["mask"]).convert("L")) > 127
                )
        except (OSError, ValueError) as error:
            raise UserError(
                f"--table {table}: the row of {row['filename']} cannot be used: {error}"
            ) from None
        if places is not None and places.max() > 1:
            raise UserError(
                f"--table {table}: landmarks of {row['filename']} lie outside its {shape[0]} × {shape[1]} px; places count pixels of the film as stored"
            )
        if places is not None:
            found.append((i, places, shape))
    if len(found) < 2:
        raise UserError(
            f"--table {table}: {len(found)} of its films can be used; a reference film and one to test are needed"
        )
    numbers, places, shapes = zip(*found)
    return (
        np.array(numbers),
        np.stack(places),
        np.array(shapes, float),
        names or list(MASK_LANDMARKS),
    )


if __name__ == "__main__":
    run_script(lambda: run_command(Config, command, "correspondence"))
