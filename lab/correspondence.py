"""Correspondence: where in another film lies what is marked in this one? (Fig. 6)

    python -m lab.correspondence                                        # synthetic films
    python -m lab.correspondence --data FILMS --table lungs.csv --image 448
    python -m lab.correspondence --data FILMS --table points.csv --crop # where places tell little

The encoder sees the whole film. The feature of a pixel is the mean over a window of 2 × 2 patches
centred on it (RoI pooling), and the answer is the pixel whose feature is nearest, by L2 distance,
to that of the landmark in the reference film. Random weights, raw pixels and places alone stand
beside it. Places are (row, col) in fractions of the film's height and width, (0, 0) its top left.

Writes result.json (distance in percent of the film's width, PCK) and maps.png: heat maps.
"""

import dataclasses
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ImageDraw
from tqdm import tqdm

import augment
from lab import common
from lab.domain import GREEN
from plumbing import pictures
from plumbing.film import UnreadableFilm, read_mask
from plumbing.keys import RANDOM_CUT, numpy_rng
from plumbing.launch import UserError, flag, run_script
from plumbing.weights import load_encoder, resized

SIDE = 64  # of a heat map, px
# Those that a mask of both lungs shows; the patient's right is the image's left.
MASK_LANDMARKS = ("right_apex", "left_apex", "right_angle", "left_angle")


@dataclasses.dataclass
class Config(common.Common):
    table: str = flag(None, "CSV filename,NAME_row,NAME_col,… (px), or filename,mask (both lungs)")
    references: int = flag(5, "films with marked landmarks; each is used alone, then averaged")
    image: int = flag(None, "side of the films, px, any multiple of the patch [the encoder's]")
    crop: bool = flag(False, "cut the films at random, so that places alone tell less")


def main(argv=None):
    # ---- 1. Weights and films, as stored: the table counts their pixels.
    args, device = common.start(Config, __doc__, "correspondence", argv)
    encoder = load_encoder(args.weights, say=print)
    count = args.films + args.references
    films, table = common.open_set(args, 7 * count, side=0)
    if not table:
        raise UserError("--data needs --table CSV: landmarks (NAME_row, NAME_col) or lungs (mask)")
    numbers, places, shapes, names = read_landmarks(table, films, count)
    R = min(args.references, len(numbers) - 1)  # the first R films are the references
    kept = of_other_patients(common.patients_with(films, [table])[numbers], R, table)
    numbers, places, shapes = numbers[kept], places[kept], shapes[kept]
    overlap, _ = common.say_seen(args, {"to ask about": (films, numbers)}, table)
    size = args.image or encoder.image
    patch = encoder.patch
    if size % patch:
        raise UserError(f"--image {size} is not a multiple of the encoder's patches of {patch} px")

    # ---- 2. Cut the films, all of each or a random box, and move the landmarks with it.
    boxes = np.concatenate([np.zeros_like(shapes), shapes], 1)  # of whole films, (n, 4)
    if args.crop:
        rng = numpy_rng(RANDOM_CUT, args.seed)
        for k in range(R, len(boxes)):
            boxes[k] = box_around(rng, shapes[k], places[k])
    area_kept = float((boxes[R:, 2:].prod(1) / shapes[R:].prod(1)).mean())
    places = (places * shapes[:, None] - boxes[:, None, :2]) / boxes[:, None, 2:]
    shapes = boxes[:, 2:]
    cut = [augment.crop(films[i], box, size) for i, box in zip(numbers, boxes, strict=True)]
    images = augment.to_float(torch.from_numpy(np.stack(cut)))[:, None]  # (n, 1, size, size)

    # ---- 3. Answers by features, and by places alone.
    fresh = common.random_twin(encoder, args.seed)
    ways = {}
    for name, vit in (("pre-trained", encoder), ("random weights", fresh)):
        ways[name] = partial(dense, resized(vit, size, patch).to(device).eval(), side=SIDE)
    ways["raw pixels"] = partial(raw_windows, side=SIDE, grid=size // patch)
    found = {}  # (R, n, L, 2) each
    for name, way in ways.items():
        found[name] = find(way, images[:R], places[:R], images[R:], name)
    found["reference's place"] = np.broadcast_to(places[:R, None], found["raw pixels"].shape)
    found["mean place of all other films"] = mean_of_others(places)[None, R:]

    # ---- 4. Scores and pictures.
    scores = {name: score(f, places[R:], shapes[R:]) for name, f in found.items()}
    result = {"methods": scores, "references": R, "films": len(images) - R, "landmarks": names}
    result |= {"image": size, "patch": patch, "area_kept": area_kept, "overlap": overlap}
    shown = [0, *range(R, min(R + 5, len(images)))]
    page = maps_picture(ways["pre-trained"], images[shown], places[shown], names)
    common.finish(args, result, result_table(result, args.crop), maps=page)


def mean_of_others(places):
    """Mean place of each landmark over all films but the one asked about. (n, L, 2) → (n, L, 2)"""
    return (places.sum(0) - places) / (len(places) - 1)


def result_table(result, is_cut):
    """The result in words. → text"""
    area = f" cut at random to {result['area_kept']:.0%} of their area" if is_cut else ""
    rows = [["", "distance", "PCK@5", "PCK@10", *result["landmarks"]]]
    for name, row in result["methods"].items():
        values = [row["distance"], row["pck@5"], row["pck@10"], *row["distance_each"]]
        rows.append([name, *(f"{value:.1f}" for value in values)])
    return (
        f"correspondence, {result['references']} reference × {result['films']} films{area}, "
        f"{result['image']}² px in {result['patch']}² patches; "
        f"distance in % of the width, PCK in %\n{common.columns(rows)}"
    )


# ---------------------------------------------------------------- dense features
def window_weights(side, grid):
    """How much of each patch lies in the window around each pixel: two patches wide, cut at the
    film's edge. → (side, grid), rows sum to 1
    """
    pixel = torch.arange(side, dtype=torch.float64)
    centre = (pixel[:, None] + 0.5) * grid / side  # in patch widths from the edge
    patch = torch.arange(grid, dtype=torch.float64)
    end = torch.minimum(centre + 1, patch + 1)
    start = torch.maximum(centre - 1, patch)
    overlap = (end - start).clamp(min=0)
    return (overlap / overlap.sum(1, keepdim=True)).float()


def roi_pool(tokens, side):
    """Pool patch features into one per pixel, weighted by area. (B, N, D) → (B, side, side, D)"""
    grid = round(tokens.shape[1] ** 0.5)
    weights = window_weights(side, grid).to(tokens)
    return torch.einsum("ri,bijd,cj->brcd", weights, tokens.unflatten(1, (grid, grid)), weights)


@torch.no_grad()
def dense(encoder, images, side):
    """Features of whole films per pixel. (B, 1, H, W) → (B, side, side, D)"""
    device = next(encoder.parameters()).device
    return roi_pool(encoder(images.to(device)).float(), side)


def raw_windows(images, side, grid):
    """The baseline that knows nothing: the grey values of the same window around each pixel, which
    is k pixels wide. (B, 1, H, W) → (B, side, side, k²)
    """
    small = F.interpolate(images, (side, side), mode="bicubic", antialias=True, align_corners=False)
    k = 2 * (side // grid) + 1
    padded = F.pad(small, [k // 2] * 4, mode="replicate")
    return F.unfold(padded, k).unflatten(2, (side, side)).permute(0, 2, 3, 1)


# ---------------------------------------------------------------- find and score
def heat_maps(reference, places, test):
    """Distance of every pixel to each landmark of the reference film.

    reference (side, side, D), places (L, 2), test (B, side, side, D) → (B, L, side, side)
    """
    side = reference.shape[0]
    at = torch.as_tensor(np.clip(places * side, 0, side - 1)).long()
    wanted = reference[at[:, 0], at[:, 1]].expand(len(test), -1, -1)  # (B, L, D)
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cdist(wanted, test.flatten(1, 2), compute_mode=exact).unflatten(2, (side, side))


def nearest(maps):
    """The best place on each heat map. (..., side, side) → (..., 2) fractions"""
    side = maps.shape[-1]
    best = maps.flatten(-2).argmin(-1).cpu().numpy()
    return (np.stack([best // side, best % side], -1) + 0.5) / side


def find(way, references, places, tests, words="films", batch=8):
    """Look for each landmark of each reference film in each test film.

    way: images → dense features; places (R, L, 2) → (R, n, L, 2) fractions
    """
    known = way(references)
    found = []
    for part in tqdm(tests.split(batch), desc=words, leave=False):
        features = way(part)
        pairs = zip(known, places, strict=True)
        found.append(np.stack([nearest(heat_maps(k, p, features)) for k, p in pairs]))
    return np.concatenate(found, 1)


def score(found, true, shapes):
    """Judge found (R, n, L, 2) by true places (n, L, 2), films of shapes (n, 2) px.

    → mean distance in % of the width, also of each landmark; PCK: share within 5 and 10 %
    """
    away = (found - true) * shapes[:, None] / shapes[:, None, 1:]  # in units of the film's width
    away = 100 * np.linalg.norm(away, axis=-1)  # (R, n, L)
    return {
        "distance": float(away.mean()),
        "pck@5": float(100 * (away <= 5).mean()),
        "pck@10": float(100 * (away <= 10).mean()),
        "distance_each": [float(v) for v in away.mean((0, 1))],
    }


# ---------------------------------------------------------------- pictures
def maps_picture(way, images, places, names, cell=150):
    """Draw one row per landmark: the reference film, then test films under their heat map (bright =
    alike); cross = truth, ring = answer.
    """
    features = way(images)
    maps = heat_maps(features[0], places[0], features[1:])  # (B, L, side, side)
    answers = nearest(maps)
    films = [pictures.to_picture(image, cell) for image in pictures.to_grey(images)]
    rows = []
    for k in range(len(names)):
        row = [mark(films[0], places[0, k])]
        for b, film in enumerate(films[1:]):
            heat = pictures.heat(-maps[b, k].cpu().numpy())
            row.append(mark(pictures.overlay(film, heat, 0.45), places[1 + b, k], answers[b, k]))
        rows.append(row)
    titles = ["reference", *(f"film {i + 1}" for i in range(len(images) - 1))]
    row_titles = [name.replace("_", " ") for name in names]
    return pictures.grid(rows, column_titles=titles, row_titles=row_titles, cell=cell)


def mark(picture, true, answer=None):
    """Draw a cross at the true place and a ring at the answer; places are fractions (row, col)."""
    picture = picture.copy()
    draw = ImageDraw.Draw(picture)
    row, col = true * picture.size[::-1]
    draw.line([col - 6, row, col + 6, row], GREEN, 2)
    draw.line([col, row - 6, col, row + 6], GREEN, 2)
    if answer is not None:
        row, col = answer * picture.size[::-1]
        draw.ellipse([col - 6, row - 6, col + 6, row + 6], outline="white", width=2)
    return picture


# ---------------------------------------------------------------- where the landmarks truly are
def box_around(rng, shape, places, tries=100):
    """Draw a random box, 0.3 to 0.8 of the film's area, that holds all its landmarks; the whole
    film where none is found, as of landmarks at its edges. places (L, 2) fractions → (4,) px
    """
    for _ in range(tries):
        boxes, _ = augment.sample_boxes(rng, *shape, scale=(0.3, 0.8))
        inside = (places * shape - boxes[0, :2]) / boxes[0, 2:]
        if 0.02 < inside.min() and inside.max() < 0.98:
            return boxes[0]
    return np.array([0.0, 0.0, *shape])


def from_mask(mask):
    """Landmarks of a mask of both lungs: tips and outer lower corners, as MASK_LANDMARKS.

    bool (H, W) → (4, 2) fractions; None when a side is empty
    """
    if not mask.any():
        return None
    middle = round(mask.nonzero()[1].mean())
    if not mask[:, :middle].any() or not mask[:, middle:].any():
        return None
    right = lung_points(mask[:, :middle], 0, -1, mask.shape)
    left = lung_points(mask[:, middle:], middle, 1, mask.shape)
    return (np.array([right[0], left[0], right[1], left[1]]) + 0.5) / mask.shape


def lung_points(half, first_column, outward, shape):
    """Tip and outer lower corner of the lung in one half of a mask; outward: -1 left, 1 right.

    → [(row, col), (row, col)] px of the whole mask
    """
    height, width = shape
    rows, cols = half.nonzero()
    cols = cols + first_column
    is_tip = rows <= rows.min() + 0.01 * height  # a tip is a few rows, not one pixel
    corner = (rows / height + outward * cols / width).argmax()
    return [(rows[is_tip].mean(), cols[is_tip].mean()), (rows[corner], cols[corner])]


def read_landmarks(table, films, count):
    """Read the truth from a CSV: columns filename and either NAME_row, NAME_col (px of the film as
    stored) or mask (a picture of both lungs).

    At most `count` films, evenly from all that are there. → numbers of the films, places (n, L, 2)
    fractions, shapes (n, 2) px, names of the landmarks
    """
    rows = common.rows_of(table, films, said=lambda row: row)
    columns = list(rows[0][1])
    names = [column.removesuffix("_row") for column in columns if column.endswith("_row")]
    names = [name for name in names if f"{name}_col" in columns]
    if not names and "mask" not in columns:
        wanted = "columns NAME_row, NAME_col or mask"
        raise UserError(f"--table {table}: {wanted} are wanted, found {', '.join(columns)}")
    found = []
    for k in np.unique(common.evenly(np.arange(len(rows)), count)):
        i, row = rows[k]
        try:
            shape = films[i].shape
        except UnreadableFilm:
            continue
        places = landmarks_of(row, names, shape, table)
        if places is not None:
            found.append((i, places, shape))
    if len(found) < 2:
        few = f"{len(found)} of its films can be used"
        raise UserError(f"--table {table}: {few}; a reference film and one to test are needed")
    numbers, places, shapes = zip(*found, strict=True)
    names = names or list(MASK_LANDMARKS)
    return np.array(numbers), np.stack(places), np.array(shapes, float), names


def of_other_patients(patients, references, table):
    """The places of the references, which come first, and of all films but those of their patients:
    a point is easily found in another film of the same chest. patients (n,) → rising numbers
    """
    is_test = ~np.isin(patients, patients[:references])
    if not is_test.any():
        raise UserError(
            f"--table {table}: all its films are of the patients of the {references} reference "
            "films: others are needed to test, or fewer --references"
        )
    return np.append(np.arange(references), is_test.nonzero()[0])


def landmarks_of(row, names, shape, table):
    """Landmarks of one film from its row: by name, or from the mask. → (L, 2) fractions, or None"""
    first_cells = "the row of " + ", ".join(list(row.values())[:2])
    try:
        if names:
            pixels = [[float(row[f"{name}_row"]), float(row[f"{name}_col"])] for name in names]
            places = (np.array(pixels) + 0.5) / shape
        else:
            mask = read_mask(("file", Path(table).parent / row["mask"]), shape)
            places = from_mask(mask)
    except (UnreadableFilm, ValueError) as error:
        raise UserError(f"--table {table}: {first_cells} cannot be used: {error}") from None
    if places is not None and not ((places >= 0) & (places <= 1)).all():
        raise UserError(
            f"--table {table}: landmarks of {first_cells} lie outside its {shape[0]} × "
            f"{shape[1]} px; places count pixels of the film as stored"
        )
    return places


if __name__ == "__main__":
    run_script(main)
