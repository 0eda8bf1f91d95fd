"""Crops, geometry and tone against independent references: NumPy resampling, films whose grey values are coordinates, PIL, SciPy, loops."""

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from scipy.ndimage import gaussian_filter

import augment
from augment import (
    apply_action,
    apply_jitter,
    crop,
    relative_coords,
    sample_actions,
    sample_boxes,
    sample_jitter,
    to_float,
)
from lab import domain


def smooth_film(height, width, seed=0):
    """Noise on a gradient, away from black and white so that no overshoot is clipped."""
    rng = np.random.default_rng(seed)
    film = (
        90
        + 60 * np.linspace(0, 1, width)[None] * np.linspace(1, 0.3, height)[:, None]
        + rng.normal(0, 12, (height, width))
    )
    return film.clip(60, 190).round().astype(np.uint8)


# ------------------------------------------------------------------------------------------------ crops
def cubic(x, a=-0.5):
    x = np.abs(x)
    return np.where(
        x < 1,
        (a + 2) * x**3 - (a + 3) * x**2 + 1,
        np.where(x < 2, a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a, 0),
    )


def resampling_matrix(length, start, extent, size):
    """Row i: weights of the film's pixels for output pixel i; the kernel widens with the reduction (antialiasing)."""
    scale = extent / size
    centre = start + (np.arange(size)[:, None] + 0.5) * scale
    weight = cubic((np.arange(length)[None] + 0.5 - centre) / max(scale, 1))
    return weight / weight.sum(1, keepdims=True)


CROPS = [
    ((90, 120), (0, 0, 90, 120), 32),
    ((90, 120), (10.3, 20.7, 70.2, 66.6), 32),
    ((90, 120), (33.25, 41.5, 20.5, 24.1), 64),
    ((200, 150), (0.4, 0.2, 199.1, 149.5), 56),
    ((64, 64), (0, 0, 64, 64), 64),
    ((300, 280), (12, 7, 256, 240), 16),
]


@pytest.mark.parametrize("shape, box, size", CROPS)
@pytest.mark.parametrize("flip", [False, True])
def test_crop_is_antialiased_bicubic(shape, box, size, flip):
    film, (top, left, height, width) = smooth_film(*shape), box
    truth = (
        resampling_matrix(shape[0], top, height, size)
        @ film
        @ resampling_matrix(shape[1], left, width, size).T
    )
    out = crop(film, box, size, flip)
    assert out.shape == (size, size) and out.dtype == np.uint8
    assert (
        np.abs(out - (truth[:, ::-1] if flip else truth)).max() < 1.6
    )  # two roundings to grey levels
    assert out.astype(float).mean() == pytest.approx(truth.mean(), abs=0.3)


def test_crop_of_everything_at_its_own_size_is_the_film():
    film = np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)
    assert np.array_equal(crop(film, (0, 0, 40, 40), 40), film) and np.array_equal(
        crop(film, (0, 0, 40, 40), 40, True), film[:, ::-1]
    )


def test_boxes_that_overshoot_by_rounding_are_cropped():
    film = smooth_film(70, 50)
    crop(film, (0.1 + 0.2, 0.3, 70 - 0.3 + 1e-13, 50 - 0.3 + 1e-13), 16)


# ------------------------------------------------------------------------------------------------ boxes
def rejection_sample(height, width, count):
    """The recipe by a loop: draw area and aspect until the box fits (ten tries suffice for these films). → areas, log aspects"""
    rng, out = random.Random(1), []
    while len(out) < count:
        area, aspect = (
            rng.uniform(0.3, 1) * height * width,
            math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3))),
        )
        w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if w <= width and h <= height:
            out.append((area / height / width, math.log(aspect)))
    return np.array(out).T


QUANTILES = np.linspace(0.05, 0.95, 10)


@pytest.mark.parametrize("height, width", [(320, 320), (320, 390)])
def test_boxes_follow_the_recipe(height, width):
    rng = np.random.default_rng(0)
    boxes, flips = map(np.stack, zip(*(sample_boxes(rng, height, width) for _ in range(4000))))
    assert boxes.shape == (4000, 2, 4) and flips.dtype == bool
    top, left, h, w = np.moveaxis(boxes, -1, 0)
    assert (h[:, 0] == h[:, 1]).all() and (w[:, 0] == w[:, 1]).all()  # same height and width
    assert (
        (top >= 0).all()
        and (left >= 0).all()
        and (top + h <= height + 1e-9).all()
        and (left + w <= width + 1e-9).all()
    )
    area, aspect = (h * w / height / width)[:, 0], np.log(w / h)[:, 0]
    assert (
        area.min() >= 0.3 - 1e-9
        and area.max() <= 1
        and np.exp(np.abs(aspect).max()) <= 4 / 3 + 1e-9
    )
    for ours, truth in zip((area, aspect), rejection_sample(height, width, 8000)):
        assert np.abs(np.quantile(ours, QUANTILES) - np.quantile(truth, QUANTILES)).max() < 0.025
    rows, cols = top / (height - h), left / (width - w)  # places as fractions of the room
    for place in (rows[:, 0], rows[:, 1], cols[:, 0], cols[:, 1]):
        assert np.abs(np.quantile(place, QUANTILES) - QUANTILES).max() < 0.035
    assert (
        np.abs(np.corrcoef(np.concatenate([rows, cols, flips], 1).T) - np.eye(6)).max() < 0.06
    )  # independent of each other
    assert flips.mean(0) == pytest.approx([0.5, 0.5], abs=0.03)


@pytest.mark.parametrize(
    "height, width, h, w", [(1000, 100, 400 / 3, 100), (100, 1000, 100, 400 / 3)]
)
def test_a_strip_gives_the_largest_box_it_holds(height, width, h, w):
    boxes, _ = sample_boxes(np.random.default_rng(0), height, width)
    assert boxes[:, 2:] == pytest.approx(np.array([[h, w]] * 2))
    assert (boxes[:, :2] >= 0).all() and (
        boxes[:, :2] + boxes[:, 2:] <= (height + 1e-9, width + 1e-9)
    ).all()


# ------------------------------------------------------------------------------------------------ geometry
def test_relative_coords_are_equations_4_and_5():
    """Without flips, equal sizes: φ(u, v) = (n (top_j - top_i) / height + u, n (left_j - left_i) / width + v)."""
    n, context, target = 14, [[10.0, 20, 100, 80]], [[35.0, 4, 100, 80]]
    out = relative_coords(torch.tensor(context), torch.tensor(target), n)
    assert out.shape == (1, 196, 2)
    for k in range(196):
        u, v = divmod(k, n)
        assert out[0, k].tolist() == pytest.approx([n * 25 / 100 + u, n * -16 / 80 + v], abs=1e-4)


def test_a_view_seen_from_itself_is_its_own_grid_mirrored_or_not():
    box = torch.tensor([[7.0, 9, 60, 44]])
    own = np.array([(u, v) for u in range(8) for v in range(8)], float)
    yes, no = torch.tensor([True]), torch.tensor([False])
    for flips, truth in (
        ((None, None), own),
        ((yes, yes), own),
        ((no, yes), own * (1, -1) + (0, 7)),
        ((yes, no), own * (1, -1) + (0, 7)),
    ):
        assert np.abs(relative_coords(box, box, 8, *flips)[0].numpy() - truth).max() < 1e-5


def centres(view, n):
    """Mean of each patch of a ramp = the film coordinate at its centre. → (n²,)"""
    return view.reshape(n, view.shape[0] // n, n, -1).mean((1, 3)).flatten()


@pytest.mark.parametrize("context_flip", [False, True])
@pytest.mark.parametrize("target_flip", [False, True])
@pytest.mark.parametrize(
    "boxes",
    [
        ((5, 10, 120, 140), (60, 50, 120, 140)),
        ((30.5, 2.25, 150, 90), (0, 80.75, 150, 90)),
        ((0, 0, 200, 200), (40, 60, 80, 100)),
    ],
)
def test_relative_coords_against_films_that_know_where_they_are(boxes, context_flip, target_flip):
    """The film's grey value is its row (or column): cut both views, read off where each target patch lies on the film, find that
    place in the context."""
    n, size, (context, target) = 8, 64, boxes
    both = (torch.tensor([b], dtype=torch.float64) for b in boxes)
    out = relative_coords(*both, n, torch.tensor([context_flip]), torch.tensor([target_flip]))[
        0
    ].numpy()
    film = np.broadcast_to(np.arange(200, dtype=np.uint8), (200, 200))
    for axis, ramp in enumerate((np.ascontiguousarray(film.T), np.ascontiguousarray(film))):
        seen = centres(
            crop(ramp, target, size, target_flip).astype(float), n
        )  # film coordinate of each target patch
        along = (
            centres(crop(ramp, context, size, context_flip).astype(float), n)
            .reshape(n, n)
            .mean(1 - axis)
        )
        slope, start = np.polyfit(
            along[1:-1], np.arange(n)[1:-1], 1
        )  # context patch ← film coordinate, beyond its borders too
        assert (
            np.abs(out[:, axis] - (slope * seen + start)).max() < 0.2
        )  # grey levels are whole, patches 11 px and more
        assert np.corrcoef(out[:, axis], seen)[0, 1] * (-1 if axis and context_flip else 1) > 0.999


def test_relative_coords_of_a_batch_are_those_of_its_items():
    rng = np.random.default_rng(0)
    context, target = (torch.from_numpy(rng.uniform(10, 100, (6, 4))) for _ in range(2))
    flips = torch.tensor([[0, 1, 0, 1, 0, 1], [0, 0, 1, 1, 0, 1]]).bool()
    whole = relative_coords(context, target, 5, *flips)
    for k in range(6):
        (t, l, h, w), (tt, tl, th, tw) = context[k].tolist(), target[k].tolist()
        for p in range(25):
            u, v = divmod(p, 5)
            x = (4 - v if flips[1, k] else v) + 0.5
            row, col = tt + th * (u + 0.5) / 5, tl + tw * x / 5  # film pixels
            r, c = 5 * (row - t) / h, 5 * (col - l) / w
            assert whole[k, p].tolist() == pytest.approx(
                [r - 0.5, (5 - c if flips[0, k] else c) - 0.5], abs=1e-3
            )


# ------------------------------------------------------------------------------------------------ tone
def films(count=1, height=48, width=48, seed=0):
    grey = np.random.default_rng(seed).integers(0, 256, (count, 1, height, width), dtype=np.uint8)
    return np.stack(
        [
            [gaussian_filter(image[0].astype(float), 1.5).clip(0, 255).round()]
            for image in grey * 1.0
        ]
    ).astype(np.uint8)


def action(*values):
    return torch.tensor([values], dtype=torch.float32)


def test_the_identity_changes_no_bit():
    images = torch.rand(3, 1, 40, 40)
    assert torch.equal(apply_action(images, torch.tensor(augment.IDENTITY).expand(3, 4)), images)
    views = torch.rand(2, 2, 40, 40)
    assert torch.equal(apply_jitter(views, torch.ones(2, 2)), views)


@pytest.mark.parametrize("factor", [0.6, 0.85, 1.2, 1.4])
def test_brightness_is_pils(factor):
    grey = films() // 2 + 110  # factor 1.4 clips at white
    truth = np.asarray(ImageEnhance.Brightness(Image.fromarray(grey[0, 0])).enhance(factor))
    ours = (
        255 * apply_action(to_float(torch.from_numpy(grey)), action(factor, 1, 1, 0))[0, 0].numpy()
    )
    assert np.abs(ours - truth).max() < 1.01  # PIL cuts to whole grey levels
    if factor > 1.3:
        assert ours.max() == pytest.approx(255)


@pytest.mark.parametrize("factor", [0.6, 0.85, 1.2, 1.4])
def test_contrast_is_pils(factor):
    grey = films(seed=1)
    truth = np.asarray(ImageEnhance.Contrast(Image.fromarray(grey[0, 0])).enhance(factor))
    ours = (
        255 * apply_action(to_float(torch.from_numpy(grey)), action(1, factor, 1, 0))[0, 0].numpy()
    )
    assert np.abs(ours - truth).max() < 1.3  # and takes a whole number as the mean


@pytest.mark.parametrize("gamma", [0.5, 0.8, 1.5, 2.0])
def test_gamma(gamma):
    images = torch.rand(1, 1, 20, 20)
    images[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    assert (
        np.abs(
            apply_action(images, action(1, 1, gamma, 0)).numpy()
            - images.numpy().astype(float) ** gamma
        ).max()
        < 1e-6
    )


@pytest.mark.parametrize("sigma", [0.05, 0.3, 0.8, 1.5, 2.0])
@pytest.mark.parametrize("shape", [(48, 48), (40, 56)])
def test_blur_is_a_gaussian_renormalised_at_the_border(sigma, shape):
    images = torch.rand(1, 1, *shape)
    blur = lambda x: gaussian_filter(
        x, sigma, mode="constant", truncate=6.01 / sigma
    )  # radius of 6 px for every sigma
    truth = blur(images[0, 0].double().numpy()) / blur(np.ones(shape))
    ours = apply_action(images, action(1, 1, 1, sigma))[0, 0].numpy()
    assert np.abs(ours - truth).max() < 1e-5
    assert (
        np.abs(ours[8:-8, 8:-8] - gaussian_filter(images[0, 0].numpy(), sigma)[8:-8, 8:-8]).max()
        < 2e-3
    )  # SciPy's own radius, interior


def test_the_parts_follow_one_another_and_each_image_has_its_own():
    grey, rng = films(4), np.random.default_rng(0)
    actions = np.stack(
        [
            rng.uniform(0.6, 1.4, 4),
            rng.uniform(0.6, 1.4, 4),
            rng.uniform(0.5, 2, 4),
            [0, 0.7, 2, 1.1],
        ],
        1,
    )
    ours = apply_action(to_float(torch.from_numpy(grey)), torch.from_numpy(actions).float()).numpy()
    for image, (b, c, g, s), out in zip(grey[:, 0] / 255, actions, ours[:, 0]):
        x = np.minimum(image * b, 1)
        x = np.clip(x.mean() + c * (x - x.mean()), 0, 1) ** g
        if s:
            blur = lambda x: gaussian_filter(x, s, mode="constant", truncate=6.01 / s)
            x = blur(x) / blur(np.ones_like(x))
        assert np.abs(out - x).max() < 1e-5
    assert ours.min() >= 0 and ours.max() <= 1


def test_jitter_is_shared_by_both_views():
    """One tone curve a film: equal grey values stay equal across its views, and the pair's common mean is the pivot."""
    views, jitter = (
        to_float(torch.from_numpy(films(6, seed=2).reshape(3, 2, 48, 48))),
        torch.tensor([[0.8, 1.3], [1.0, 1.0], [1.2, 0.7]]),
    )
    views[:, 1] = views[:, 1] * 0.5  # views of different means
    out = apply_jitter(views, jitter)
    for k in range(3):
        b, c = jitter[k].tolist()
        x = np.minimum(views[k].double().numpy() * b, 1)
        assert np.abs(out[k].numpy() - np.clip(x.mean() + c * (x - x.mean()), 0, 1)).max() < 1e-6
        curve = {}
        for before, after in zip(views[k].flatten().tolist(), out[k].flatten().tolist()):
            assert curve.setdefault(before, after) == after


def uniform(values, low, high):
    """Quantiles of a uniform law, and nothing outside."""
    assert low <= values.min() and values.max() <= high
    assert np.abs((np.quantile(values, QUANTILES) - low) / (high - low) - QUANTILES).max() < 0.02


def test_actions_follow_the_recipe():
    a = sample_actions(20000, torch.Generator().manual_seed(0)).double().numpy()
    assert a.shape == (20000, 4)
    toned, blurred = (a[:, :3] != 1).any(1), a[:, 3] > 0
    assert toned.mean() == pytest.approx(0.8, abs=0.012) and blurred.mean() == pytest.approx(
        0.2, abs=0.012
    )
    assert (toned & blurred).mean() == pytest.approx(0.16, abs=0.012)  # independent
    assert (a[toned][:, :3] != 1).all(1).mean() > 0.999 and (
        a[~toned][:, :3] == 1
    ).all()  # the three tones go together
    (
        uniform(a[toned, 0], 0.6, 1.4),
        uniform(a[toned, 1], 0.6, 1.4),
        uniform(np.log(a[toned, 2]), math.log(0.5), math.log(2)),
    )
    assert a[blurred, 3].min() > 0.05 and a[blurred, 3].max() <= 2
    assert np.abs(np.corrcoef(a[toned].T) - np.eye(4)).max() < 0.03
    uniform(a[blurred, 3], 0.05, 2)


def test_jitter_follows_the_recipe():
    j = sample_jitter(20000, torch.Generator().manual_seed(0)).double().numpy()
    applied = (j != 1).any(1)
    assert j.shape == (20000, 2) and applied.mean() == pytest.approx(0.8, abs=0.012)
    uniform(j[applied, 0], 0.6, 1.4), uniform(j[applied, 1], 0.6, 1.4)
    assert abs(np.corrcoef(j[applied].T)[0, 1]) < 0.03


def test_same_generator_same_numbers():
    for sample in (sample_actions, sample_jitter):
        a, b, c = (sample(10, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
        assert torch.equal(a, b) and not torch.equal(a, c)


def test_candidates_cover_the_range_evenly():
    c = domain.domain_candidates().numpy()
    axis = [0.6 + 0.8 * k / 7 for k in range(8)]
    assert sorted(map(tuple, c.round(5))) == sorted(
        (round(np.float32(b), 5), round(np.float32(d), 5)) for b in axis for d in axis
    )
