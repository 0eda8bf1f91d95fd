"""Crops, geometry and tone against independent references.

These are resampling in NumPy, films whose grey values are coordinates, PIL, SciPy and loops.
"""

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
    scale_to_ranges,
    to_float,
)


def smooth_film(height, width, seed=0):
    """Noise on a gradient, away from black and white so that no overshoot is clipped."""
    rng = np.random.default_rng(seed)
    gradient = 60 * np.linspace(0, 1, width)[None] * np.linspace(1, 0.3, height)[:, None]
    film = 90 + gradient + rng.normal(0, 12, (height, width))
    return film.clip(60, 190).round().astype(np.uint8)


# ---------------------------------------------------------------- crops
def cubic(x, a=-0.5):
    """The bicubic kernel: one polynomial up to 1, another up to 2, nothing beyond."""
    x = np.abs(x)
    inner = (a + 2) * x**3 - (a + 3) * x**2 + 1
    outer = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.select([x < 1, x < 2], [inner, outer], 0)


def resampling_matrix(length, start, extent, size):
    """Row i: weights of the film's pixels for output pixel i. → (size, length)

    The kernel widens with the reduction (antialiasing).
    """
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
    film = smooth_film(*shape)
    top, left, height, width = box
    down = resampling_matrix(shape[0], top, height, size)
    across = resampling_matrix(shape[1], left, width, size)
    truth = down @ film @ across.T
    if flip:
        truth = truth[:, ::-1]
    out = crop(film, box, size, flip)
    assert out.shape == (size, size)
    assert out.dtype == np.uint8
    assert np.abs(out - truth).max() < 1.6  # two roundings to grey levels
    assert out.astype(float).mean() == pytest.approx(truth.mean(), abs=0.3)


def test_crop_of_everything_at_its_own_size_is_the_film():
    film = np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)
    everything = (0, 0, 40, 40)
    assert np.array_equal(crop(film, everything, 40), film)
    assert np.array_equal(crop(film, everything, 40, True), film[:, ::-1])


def test_boxes_that_overshoot_by_rounding_are_cropped():
    film = smooth_film(70, 50)
    crop(film, (0.1 + 0.2, 0.3, 70 - 0.3 + 1e-13, 50 - 0.3 + 1e-13), 16)


# ---------------------------------------------------------------- boxes
def rejection_sample(height, width, count):
    """The recipe by a loop: draw area and aspect until the box fits. → areas, log aspects

    Ten tries, as the program makes, suffice for these films.
    """
    rng = random.Random(1)
    accepted = []
    while len(accepted) < count:
        area = rng.uniform(0.3, 1) * height * width
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w = math.sqrt(area * aspect)
        h = math.sqrt(area / aspect)
        if w <= width and h <= height:
            accepted.append((area / height / width, math.log(aspect)))
    return np.array(accepted).T


QUANTILES = np.linspace(0.05, 0.95, 10)


@pytest.mark.parametrize("height, width", [(320, 320), (320, 390)])
def test_boxes_follow_the_recipe(height, width):
    rng = np.random.default_rng(0)
    drawn = [sample_boxes(rng, height, width) for _ in range(4000)]
    boxes = np.stack([pair for pair, _ in drawn])
    flips = np.stack([mirrored for _, mirrored in drawn])
    assert boxes.shape == (4000, 2, 4)
    assert flips.dtype == bool
    top, left, h, w = np.moveaxis(boxes, -1, 0)
    assert (h[:, 0] == h[:, 1]).all()  # both views have the same height
    assert (w[:, 0] == w[:, 1]).all()
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + h <= height + 1e-9).all()
    assert (left + w <= width + 1e-9).all()

    area = (h * w / height / width)[:, 0]
    aspect = np.log(w / h)[:, 0]
    assert area.min() >= 0.3 - 1e-9
    assert area.max() <= 1
    assert np.exp(np.abs(aspect).max()) <= 4 / 3 + 1e-9
    slow_area, slow_aspect = rejection_sample(height, width, 8000)
    for ours, truth in ((area, slow_area), (aspect, slow_aspect)):
        assert np.abs(np.quantile(ours, QUANTILES) - np.quantile(truth, QUANTILES)).max() < 0.025

    rows = top / (height - h)  # starts as fractions of the room there is
    cols = left / (width - w)
    for start in (rows[:, 0], rows[:, 1], cols[:, 0], cols[:, 1]):
        assert np.abs(np.quantile(start, QUANTILES) - QUANTILES).max() < 0.035
    correlation = np.corrcoef(np.concatenate([rows, cols, flips], 1).T)
    assert np.abs(correlation - np.eye(6)).max() < 0.06  # independent of each other
    assert flips.mean(0) == pytest.approx([0.5, 0.5], abs=0.03)


STRIPS = [(1000, 100, 400 / 3, 100), (100, 1000, 100, 400 / 3)]


@pytest.mark.parametrize("height, width, h, w", STRIPS)
def test_a_strip_gives_the_largest_box_it_holds(height, width, h, w):
    boxes, _ = sample_boxes(np.random.default_rng(0), height, width)
    assert boxes[:, 2:] == pytest.approx(np.array([[h, w]] * 2))
    start = boxes[:, :2]
    end = start + boxes[:, 2:]
    assert (start >= 0).all()
    assert (end <= (height + 1e-9, width + 1e-9)).all()


# ---------------------------------------------------------------- geometry
def test_relative_coords_are_equations_4_and_5():
    """Without flips, boxes of equal size: Δ in patches, added to the patch's own place.

    φ(u, v) = (n (top_j - top_i) / height + u, n (left_j - left_i) / width + v)
    """
    n = 14
    context = torch.tensor([[10.0, 20, 100, 80]])
    target = torch.tensor([[35.0, 4, 100, 80]])
    out = relative_coords(context, target, n)
    assert out.shape == (1, 196, 2)
    for k in range(196):
        u, v = divmod(k, n)
        assert out[0, k].tolist() == pytest.approx([n * 25 / 100 + u, n * -16 / 80 + v], abs=1e-4)


def test_a_view_seen_from_itself_is_its_own_grid_mirrored_or_not():
    box = torch.tensor([[7.0, 9, 60, 44]])
    own = np.array([divmod(k, 8) for k in range(64)], float)
    mirrored = own * (1, -1) + (0, 7)
    yes, no = torch.tensor([True]), torch.tensor([False])
    cases = (
        ((None, None), own),
        ((yes, yes), own),
        ((no, yes), mirrored),
        ((yes, no), mirrored),
    )
    for flips, truth in cases:
        coords = relative_coords(box, box, 8, *flips)[0].numpy()
        assert np.abs(coords - truth).max() < 1e-5


def centres(view, n):
    """Mean of each patch of a ramp = the film coordinate at its centre. → (n²,)"""
    return view.reshape(n, view.shape[0] // n, n, -1).mean((1, 3)).flatten()


PAIRS = [
    ((5, 10, 120, 140), (60, 50, 120, 140)),
    ((30.5, 2.25, 150, 90), (0, 80.75, 150, 90)),
    ((0, 0, 200, 200), (40, 60, 80, 100)),
]


@pytest.mark.parametrize("context_flip", [False, True])
@pytest.mark.parametrize("target_flip", [False, True])
@pytest.mark.parametrize("boxes", PAIRS)
def test_relative_coords_against_films_that_know_where_they_are(boxes, context_flip, target_flip):
    """The grey value of a film is its row (or column), so views tell where they were cut.

    Read off where each target patch lies on the film, and find that place in the context.
    """
    n, size = 8, 64
    context, target = boxes
    out = relative_coords(
        torch.tensor([context], dtype=torch.float64),
        torch.tensor([target], dtype=torch.float64),
        n,
        torch.tensor([context_flip]),
        torch.tensor([target_flip]),
    )[0].numpy()
    columns = np.ascontiguousarray(np.broadcast_to(np.arange(200, dtype=np.uint8), (200, 200)))
    rows = np.ascontiguousarray(columns.T)
    for axis, ramp in enumerate((rows, columns)):
        target_view = crop(ramp, target, size, target_flip).astype(float)
        context_view = crop(ramp, context, size, context_flip).astype(float)
        seen = centres(target_view, n)  # film coordinate of each target patch
        along = centres(context_view, n).reshape(n, n).mean(1 - axis)
        # Context patch as a line of the film coordinate, so beyond the context's borders, too.
        slope, start = np.polyfit(along[1:-1], np.arange(n)[1:-1], 1)
        # Grey levels are whole numbers, patches are 11 px and more.
        assert np.abs(out[:, axis] - (slope * seen + start)).max() < 0.2
        runs_backwards = axis == 1 and context_flip
        sign = -1 if runs_backwards else 1
        assert np.corrcoef(out[:, axis], seen)[0, 1] * sign > 0.999


def slow_coords(u, v, context, target, context_flip, target_flip, n):
    """Where patch (u, v) of the target lies on the grid of the context, by way of film pixels."""
    top, left, height, width = target
    across = (n - 1 - v if target_flip else v) + 0.5
    row = top + height * (u + 0.5) / n  # film pixels
    col = left + width * across / n
    top, left, height, width = context
    r = n * (row - top) / height
    c = n * (col - left) / width
    if context_flip:
        c = n - c
    return [r - 0.5, c - 0.5]


def test_relative_coords_of_a_batch_are_those_of_its_items():
    rng = np.random.default_rng(0)
    context, target = (torch.from_numpy(rng.uniform(10, 100, (6, 4))) for _ in range(2))
    flips = torch.tensor([[0, 1, 0, 1, 0, 1], [0, 0, 1, 1, 0, 1]]).bool()
    whole = relative_coords(context, target, 5, *flips)
    for k in range(6):
        for patch in range(25):
            u, v = divmod(patch, 5)
            truth = slow_coords(u, v, context[k].tolist(), target[k].tolist(), *flips[:, k], 5)
            assert whole[k, patch].tolist() == pytest.approx(truth, abs=1e-3)


# ---------------------------------------------------------------- tone
def films(count=1, height=48, width=48, seed=0):
    """Blurred noise. → (count, 1, height, width) uint8"""
    grey = np.random.default_rng(seed).integers(0, 256, (count, 1, height, width), dtype=np.uint8)
    blurred = [gaussian_filter(image[0].astype(float), 1.5) for image in grey]
    return np.stack(blurred)[:, None].clip(0, 255).round().astype(np.uint8)


def action(*values):
    return torch.tensor([values], dtype=torch.float32)


def acted_on(grey, *values):
    """The first of uint8 films after an action, in grey levels from 0 to 255. → (H, W)"""
    out = apply_action(to_float(torch.from_numpy(grey)), action(*values))
    return 255 * out[0, 0].numpy()


def slow_tone(image, brightness, contrast):
    """Brightness, then contrast about the mean, both cut to [0, 1]."""
    x = np.minimum(image * brightness, 1)
    return np.clip(x.mean() + contrast * (x - x.mean()), 0, 1)


def slow_blur(image, sigma):
    """A Gaussian of radius 6 px for every sigma, renormalised at the border."""
    settings = dict(mode="constant", truncate=6.01 / sigma)
    weight = gaussian_filter(np.ones(image.shape), sigma, **settings)
    return gaussian_filter(image, sigma, **settings) / weight


def test_the_identity_changes_no_bit():
    images = torch.rand(3, 1, 40, 40)
    assert torch.equal(apply_action(images, torch.tensor(augment.IDENTITY).expand(3, 4)), images)
    views = torch.rand(2, 2, 40, 40)
    assert torch.equal(apply_jitter(views, torch.ones(2, 2)), views)


@pytest.mark.parametrize("factor", [0.6, 0.85, 1.2, 1.4])
def test_brightness_is_pils(factor):
    grey = films() // 2 + 110  # factor 1.4 clips at white
    truth = np.asarray(ImageEnhance.Brightness(Image.fromarray(grey[0, 0])).enhance(factor))
    ours = acted_on(grey, factor, 1, 1, 0)
    assert np.abs(ours - truth).max() < 1.01  # PIL cuts to whole grey levels
    if factor > 1.3:
        assert ours.max() == pytest.approx(255)


@pytest.mark.parametrize("factor", [0.6, 0.85, 1.2, 1.4])
def test_contrast_is_pils(factor):
    grey = films(seed=1)
    truth = np.asarray(ImageEnhance.Contrast(Image.fromarray(grey[0, 0])).enhance(factor))
    ours = acted_on(grey, 1, factor, 1, 0)
    assert np.abs(ours - truth).max() < 1.3  # and takes a whole number as the mean


@pytest.mark.parametrize("gamma", [0.5, 0.8, 1.5, 2.0])
def test_gamma(gamma):
    images = torch.rand(1, 1, 20, 20)
    images[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    truth = images.numpy().astype(float) ** gamma
    ours = apply_action(images, action(1, 1, gamma, 0)).numpy()
    assert np.abs(ours - truth).max() < 1e-6


@pytest.mark.parametrize("sigma", [0.05, 0.3, 0.8, 1.5, 2.0])
@pytest.mark.parametrize("shape", [(48, 48), (40, 56)])
def test_blur_is_a_gaussian_renormalised_at_the_border(sigma, shape):
    images = torch.rand(1, 1, *shape)
    truth = slow_blur(images[0, 0].double().numpy(), sigma)
    ours = apply_action(images, action(1, 1, 1, sigma))[0, 0].numpy()
    assert np.abs(ours - truth).max() < 1e-5
    interior = (slice(8, -8), slice(8, -8))
    scipys = gaussian_filter(images[0, 0].numpy(), sigma)  # with SciPy's own radius
    assert np.abs(ours[interior] - scipys[interior]).max() < 2e-3


def test_the_parts_follow_one_another_and_each_image_has_its_own():
    grey = films(4)
    rng = np.random.default_rng(0)
    brightness = rng.uniform(0.6, 1.4, 4)
    contrast = rng.uniform(0.6, 1.4, 4)
    gamma = rng.uniform(0.5, 2, 4)
    sigma = [0, 0.7, 2, 1.1]
    actions = np.stack([brightness, contrast, gamma, sigma], 1)
    ours = apply_action(to_float(torch.from_numpy(grey)), torch.from_numpy(actions).float()).numpy()
    for image, (b, c, g, s), out in zip(grey[:, 0] / 255, actions, ours[:, 0], strict=True):
        truth = slow_tone(image, b, c) ** g
        if s:
            truth = slow_blur(truth, s)
        assert np.abs(out - truth).max() < 1e-5
    assert ours.min() >= 0
    assert ours.max() <= 1


def test_jitter_is_shared_by_both_views():
    """One tone curve per film: equal grey values stay equal across its views.

    The pivot is the pair's common mean.
    """
    views = to_float(torch.from_numpy(films(6, seed=2).reshape(3, 2, 48, 48)))
    views[:, 1] = views[:, 1] * 0.5  # views of different means
    jitter = torch.tensor([[0.8, 1.3], [1.0, 1.0], [1.2, 0.7]])
    out = apply_jitter(views, jitter)
    for k in range(3):
        truth = slow_tone(views[k].double().numpy(), *jitter[k].tolist())
        assert np.abs(out[k].numpy() - truth).max() < 1e-6
        curve = {}
        pairs = zip(views[k].flatten().tolist(), out[k].flatten().tolist(), strict=True)
        for before, after in pairs:
            assert curve.setdefault(before, after) == after


def assert_uniform(values, low, high):
    """Quantiles of a uniform law, and nothing outside."""
    assert low <= values.min()
    assert values.max() <= high
    quantiles = (np.quantile(values, QUANTILES) - low) / (high - low)
    assert np.abs(quantiles - QUANTILES).max() < 0.02


def test_actions_follow_the_recipe():
    actions = sample_actions(20000, torch.Generator().manual_seed(0)).double().numpy()
    assert actions.shape == (20000, 4)
    tone = actions[:, :3]  # brightness, contrast, gamma
    blur = actions[:, 3]
    is_toned = (tone != 1).any(1)
    is_blurred = blur > 0
    assert is_toned.mean() == pytest.approx(0.8, abs=0.012)
    assert is_blurred.mean() == pytest.approx(0.2, abs=0.012)
    assert (is_toned & is_blurred).mean() == pytest.approx(0.16, abs=0.012)  # independent
    assert (tone[is_toned] != 1).all(1).mean() > 0.999  # the three go together
    assert (tone[~is_toned] == 1).all()
    assert_uniform(tone[is_toned, 0], 0.6, 1.4)
    assert_uniform(tone[is_toned, 1], 0.6, 1.4)
    assert_uniform(np.log(tone[is_toned, 2]), math.log(0.5), math.log(2))
    assert blur[is_blurred].min() > 0.05
    assert blur[is_blurred].max() <= 2
    assert np.abs(np.corrcoef(actions[is_toned].T) - np.eye(4)).max() < 0.03
    assert_uniform(blur[is_blurred], 0.05, 2)


def test_jitter_follows_the_recipe():
    jitter = sample_jitter(20000, torch.Generator().manual_seed(0)).double().numpy()
    assert jitter.shape == (20000, 2)
    is_applied = (jitter != 1).any(1)
    assert is_applied.mean() == pytest.approx(0.8, abs=0.012)
    assert_uniform(jitter[is_applied, 0], 0.6, 1.4)
    assert_uniform(jitter[is_applied, 1], 0.6, 1.4)
    assert abs(np.corrcoef(jitter[is_applied].T)[0, 1]) < 0.03


def test_same_generator_same_numbers():
    for sample in (sample_actions, sample_jitter):
        first, again, other = (
            sample(10, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_actions_are_placed_over_the_papers_ranges():
    """Sec. B.1: brightness, contrast uniform in (0.6, 1.4), gamma log-uniform in (0.5, 2), blur
    uniform in (0.05, 2)."""
    u = np.random.default_rng(0).random((50, 4))
    truth = np.stack(
        [
            0.6 + (1.4 - 0.6) * u[:, 0],
            0.6 + (1.4 - 0.6) * u[:, 1],
            np.exp(np.log(0.5) + (np.log(2) - np.log(0.5)) * u[:, 2]),
            0.05 + (2 - 0.05) * u[:, 3],
        ],
        1,
    )
    assert np.abs(scale_to_ranges(torch.from_numpy(u)).numpy() - truth).max() < 1e-6
