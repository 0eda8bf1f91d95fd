"""Masks: sizes, shares of a batch, coverage, and what the fixed sizes cost.

Coverage is compared with a slow sampler that draws by loops and drops no patch.
"""

import functools
import math
import random
from itertools import product

import numpy as np
import pytest
import torch

import masks
from masks import cover, mask_sizes, sample_asked, sample_masks

GRIDS = [8, 14, 16]


def draw(batch, grid, seed=0, **kwargs):
    return sample_masks(batch, grid, torch.Generator().manual_seed(seed), **kwargs)


def draw_asked(batch, grid, share, seed=0, **kwargs):
    return sample_asked(batch, grid, share, torch.Generator().manual_seed(seed), **kwargs)


def frequency(indices, grid):
    """How often each patch is chosen. (B, K) → (n, n)"""
    counts = np.bincount(indices.flatten().numpy(), minlength=grid * grid)
    return counts.reshape(grid, grid) / len(indices)


# ---------------------------------------------------------------- sizes and shares
@pytest.mark.parametrize("grid", GRIDS)
def test_sizes_disjoint_ascending(grid):
    K, M = mask_sizes(grid)
    keep, masked = draw(500, grid)
    assert keep.shape == (500, K)
    assert masked.shape == (500, M)
    assert keep.dtype == masked.dtype == torch.long
    both = torch.cat([keep, masked], 1).sort(1).values
    assert (both[:, 1:] > both[:, :-1]).all()  # no patch twice
    assert both.min() >= 0
    assert both.max() < grid * grid
    assert (keep[:, 1:] > keep[:, :-1]).all()
    assert (masked[:, 1:] > masked[:, :-1]).all()


def test_sizes_near_the_papers():
    assert mask_sizes(14) == (80, 92)
    for grid in GRIDS:
        K, M = mask_sizes(grid)
        assert K / grid**2 == pytest.approx(80 / 196, abs=0.01)
        assert M / grid**2 == pytest.approx(92 / 196, abs=0.01)


def test_same_generator_same_masks_and_images_differ():
    keep, masked = draw(50, 14)
    same_keep, same_masked = draw(50, 14)
    _, other_masked = draw(50, 14, seed=1)
    assert torch.equal(keep, same_keep)
    assert torch.equal(masked, same_masked)
    assert not torch.equal(masked, other_masked)
    assert len({tuple(indices) for indices in masked.tolist()}) == 50


@pytest.mark.parametrize("rows", [[0], [3, 17, 5], list(range(16, 32)), list(range(32))])
def test_a_share_of_the_batch_is_the_batchs_share(rows):
    keep, masked = draw(32, 14)
    some_keep, some_masked = draw(32, 14, rows=torch.tensor(rows))
    assert torch.equal(some_keep, keep[rows])
    assert torch.equal(some_masked, masked[rows])
    asked = draw_asked(32, 14, 0.5)
    assert torch.equal(draw_asked(32, 14, 0.5, rows=torch.tensor(rows)), asked[rows])


@pytest.mark.parametrize("share, count", [(0.5, 32), (0.3, 19), (1e-6, 1), (1.0, 64)])
def test_every_patch_and_every_pair_is_asked_for_equally_often(share, count):
    asked = draw_asked(4000, 8, share)
    assert asked.shape == (4000, count)
    assert (asked[:, 1:] > asked[:, :-1]).all()  # no patch twice
    is_asked = torch.zeros(4000, 64).scatter_(1, asked, 1.0)
    each = is_asked.mean(0)
    pairs = (is_asked.T @ is_asked / 4000)[~torch.eye(64, dtype=torch.bool)]
    both = count * (count - 1) / (64 * 63)
    assert (each - count / 64).abs().max() < 5 * (0.25 / 4000) ** 0.5
    assert (pairs - both).abs().max() < 5 * (0.25 / 4000) ** 0.5


# ---------------------------------------------------------------- coverage
def slow_rectangle(grid, rng, scale, aspect):
    """The patches of one random rectangle, as a set of indices."""
    area = rng.uniform(*scale) * grid * grid
    ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
    h = min(grid, max(1, round(math.sqrt(area * ratio))))
    w = min(grid, max(1, round(math.sqrt(area / ratio))))
    top = rng.randint(0, grid - h)
    left = rng.randint(0, grid - w)
    return {r * grid + c for r, c in product(range(top, top + h), range(left, left + w))}


def slow_sample(grid, rng):
    """The recipe of Sec. 4.1 by loops, nothing dropped to fit a size. → covered, open: two sets"""
    rectangles = [slow_rectangle(grid, rng, (0.15, 0.2), (0.75, 1.5)) for _ in range(4)]
    covered = set().union(*rectangles)
    square = slow_rectangle(grid, rng, (0.75, 1.0), (1.0, 1.0))
    return covered, square - covered


@functools.lru_cache
def slow_frequency(grid, count=2500):
    """How often the slow sampler covers and leaves open each patch. → both (n, n)"""
    rng = random.Random(0)
    often_covered = np.zeros(grid * grid)
    often_open = np.zeros(grid * grid)
    for _ in range(count):
        covered, is_open = slow_sample(grid, rng)
        often_covered[list(covered)] += 1
        often_open[list(is_open)] += 1
    return [often.reshape(grid, grid) / count for often in (often_covered, often_open)]


def test_untruncated_means_are_the_papers():
    covered, is_open = slow_frequency(14)
    assert covered.sum() == pytest.approx(94, abs=2)
    assert is_open.sum() == pytest.approx(82.3, abs=1)


@pytest.mark.parametrize("grid, corner", [(8, 0.22), (14, 0.24), (16, 0.24)])
def test_coverage_is_even(grid, corner):
    """Opposite edges agree: no raster order. Each patch is masked as often as by the slow sampler.

    Shares are scaled to M and K. Patches are also kept as often, but for the corners, since the
    best of eight favours large squares: 0.61 against 0.41 on 14 × 14.
    """
    keep, masked = draw(8000, grid)
    slow_covered, slow_open = slow_frequency(grid)
    for indices, truth, most in ((masked, slow_covered, 0.08), (keep, slow_open, corner)):
        share = frequency(indices, grid)
        opposites = (
            (share[0], share[-1]),
            (share[:, 0], share[:, -1]),
            (share[:2], share[-2:]),
        )
        for edge, opposite in opposites:
            assert abs(edge.mean() - opposite.mean()) < 0.02
        assert np.abs(share - share[::-1]).max() < 0.04
        assert np.abs(share - share[:, ::-1]).max() < 0.04
        expected = truth * indices.shape[1] / truth.sum()
        assert np.abs(share - expected).max() < most


# ---------------------------------------------------------------- what the fixed sizes cost
def as_table(indices, grid):
    """Indices (B, K) → (B, N) bool."""
    table = torch.zeros(len(indices), grid * grid, dtype=torch.bool)
    return table.scatter_(1, indices, True)


def watched(monkeypatch, grid, batch=2000):
    """Draw masks and record what they were chosen from.

    → keep, masked (B, N) bool; unions of rectangles and squares (B, tries, N) bool
    """
    drawn = []

    def recorded(*args, **kwargs):
        drawn.append(cover(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(masks, "cover", recorded)
    keep, masked = draw(batch, grid)
    unions, squares = drawn
    return as_table(keep, grid), as_table(masked, grid), unions, squares


def best_try(keep, masked, unions, squares):
    """The union and the context that a view kept, of all that it drew. → (B, N) bool twice

    They hold most of what is masked and of what is kept.
    """
    contexts = squares & ~unions
    masked_inside = (masked[:, None] & unions).sum(-1)
    kept_inside = (keep[:, None] & contexts).sum(-1)
    best = (masked_inside + kept_inside).argmax(1)
    rows = torch.arange(len(best))
    return unions[rows, best], contexts[rows, best]


@pytest.mark.parametrize("grid", GRIDS)
def test_what_the_constant_size_costs(monkeypatch, grid):
    """Masked patches lie in a union of four rectangles, kept ones in its context, but for 0.3 %.

    Nine views in ten have enough of the one, nine in ten enough of the other, five in six both.
    """
    keep, masked, unions, squares = watched(monkeypatch, grid)
    union, context = best_try(keep, masked, unions, squares)
    is_short = torch.zeros(len(keep), dtype=torch.bool)
    for chosen, within in ((masked, union), (keep, context)):
        astray = (chosen & ~within).sum(1)
        assert astray.sum() / chosen.sum() < 0.005
        assert (astray == 0).float().mean() > 0.87
        is_short |= astray > 0
    assert is_short.float().mean() < 0.2
    assert (keep & union).sum() < 0.001 * keep.sum()  # what was covered is all but never kept
    # 0.0505 of 64 patches over 24,000 masks, before and after the draws got their names.
    assert (union & ~masked).sum(1).float().mean() < 0.053 * grid**2
    assert (context & ~keep).sum(1).float().mean() < 0.075 * grid**2
    assert squares.float().mean() == pytest.approx(0.88, abs=0.01)


def test_patches_left_out_of_the_union_are_chosen_at_random(monkeypatch):
    """Of a union larger than M, the first and last patches are dropped equally often."""
    keep, masked, unions, squares = watched(monkeypatch, 14, 4000)
    union, _ = best_try(keep, masked, unions, squares)
    is_inside = (masked & ~union).sum(1) == 0
    rows = is_inside & (union.sum(1) > 95)
    # The rank of each patch in its union: 0 = the first, 1 = the last.
    rank = (union.cumsum(1) - 1) / (union.sum(1, keepdim=True) - 1)
    dropped = rank[rows][(union & ~masked)[rows]]
    assert rows.sum() > 300
    assert dropped.mean().item() == pytest.approx(0.5, abs=0.03)
    counts, _ = np.histogram(dropped.numpy(), 4, (0, 1))
    assert counts / len(dropped) == pytest.approx([0.25] * 4, abs=0.04)


# ---------------------------------------------------------------- one rectangle
@pytest.mark.parametrize("grid", [8, 14])
def test_one_rectangle_has_the_area_and_aspect_that_were_asked_for(grid):
    u = torch.rand(3000, 1, 4, generator=torch.Generator().manual_seed(0))
    drawn = cover(u, grid, (0.15, 0.2), (0.75, 1.5)).view(-1, grid, grid)
    areas = []
    ratios = []
    starts = []
    for one in drawn.numpy():
        rows = np.flatnonzero(one.any(1))
        cols = np.flatnonzero(one.any(0))
        assert one[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1].all()
        assert one.sum() == len(rows) * len(cols)
        areas.append(one.mean())
        ratios.append(len(rows) / len(cols))
        starts.append(rows[0] / (grid - len(rows)))
    assert np.mean(areas) == pytest.approx(0.175, rel=0.04)
    assert min(areas) > 0.15 - 0.6 / grid
    assert max(areas) < 0.2 + 0.6 / grid
    assert np.exp(np.mean(np.log(ratios))) == pytest.approx(math.sqrt(0.75 * 1.5), rel=0.03)
    assert min(ratios) > 0.5
    assert max(ratios) < 2.1
    assert np.mean(starts) == pytest.approx(0.5, abs=0.02)
    assert {0.0, 1.0} <= set(starts)  # both edges are reached


def test_one_drawn_rectangle_by_hand():
    """Area 0.175 · 64 = 11.2 and ratio 1 give 3 × 3; the last start and the first: bottom left."""
    ratio_1 = math.log(1 / 0.75) / math.log(1.5 / 0.75)  # where it lies in the log range
    u = torch.tensor([[0.5, 0.99, 0.0, ratio_1]])
    drawn = cover(u, 8, (0.15, 0.2), (0.75, 1.5)).view(8, 8)
    by_hand = torch.zeros(8, 8, dtype=torch.bool)
    by_hand[5:, :3] = True
    assert torch.equal(drawn, by_hand)
