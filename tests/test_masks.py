"""Block masks: sizes, disjointness, shares of a batch, even coverage against a slow untruncated sampler, and what the fixed sizes cost."""

import functools
import math
import random

import numpy as np
import pytest
import torch

import masks
from masks import blocks, mask_sizes, sample_masks

GRIDS = [8, 14, 16]


def draw(batch, grid, seed=0, **kwargs):
    return sample_masks(batch, grid, torch.Generator().manual_seed(seed), **kwargs)


def frequency(indices, grid):
    """How often each patch is chosen. (B, K) → (n, n)"""
    return np.bincount(indices.flatten().numpy(), minlength=grid * grid).reshape(grid, grid) / len(
        indices
    )


@pytest.mark.parametrize("grid", GRIDS)
def test_sizes_disjoint_ascending(grid):
    K, M = mask_sizes(grid)
    keep, masked = draw(500, grid)
    assert (
        keep.shape == (500, K)
        and masked.shape == (500, M)
        and keep.dtype == masked.dtype == torch.long
    )
    both = torch.cat([keep, masked], 1).sort(1).values
    assert (
        (both[:, 1:] > both[:, :-1]).all() and both.min() >= 0 and both.max() < grid * grid
    )  # no patch twice
    assert (keep[:, 1:] > keep[:, :-1]).all() and (masked[:, 1:] > masked[:, :-1]).all()


def test_sizes_near_the_papers():
    assert mask_sizes(14) == (80, 92)
    for grid in GRIDS:
        K, M = mask_sizes(grid)
        assert K / grid**2 == pytest.approx(80 / 196, abs=0.01) and M / grid**2 == pytest.approx(
            92 / 196, abs=0.01
        )


def test_same_generator_same_masks_and_images_differ():
    a, b, c = draw(50, 14), draw(50, 14), draw(50, 14, seed=1)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and not torch.equal(a[1], c[1])
    assert len({tuple(m) for m in a[1].tolist()}) == 50


@pytest.mark.parametrize("rows", [[0], [3, 17, 5], list(range(16, 32)), list(range(32))])
def test_a_share_of_the_batch_is_the_batchs_share(rows):
    keep, masked = draw(32, 14)
    some = draw(32, 14, rows=torch.tensor(rows))
    assert torch.equal(some[0], keep[rows]) and torch.equal(some[1], masked[rows])


def slow_sample(grid, rng):
    """METHOD.md's recipe untrimmed, by loops: hidden = union of four rectangles, seen = a square block less the hidden. → two sets"""

    def rectangle(scale, aspect):
        area, ratio = (
            rng.uniform(*scale) * grid * grid,
            math.exp(rng.uniform(*map(math.log, aspect))),
        )
        h, w = (min(grid, max(1, round(math.sqrt(v)))) for v in (area * ratio, area / ratio))
        top, left = rng.randint(0, grid - h), rng.randint(0, grid - w)
        return {r * grid + c for r in range(top, top + h) for c in range(left, left + w)}

    hidden = set().union(*(rectangle((0.15, 0.2), (0.75, 1.5)) for _ in range(4)))
    return hidden, rectangle((0.75, 1.0), (1.0, 1.0)) - hidden


@functools.lru_cache
def slow_frequency(grid, count=2500):
    rng, hidden, seen = random.Random(0), np.zeros(grid * grid), np.zeros(grid * grid)
    for _ in range(count):
        for table, chosen in zip((hidden, seen), slow_sample(grid, rng)):
            table[list(chosen)] += 1
    return [t.reshape(grid, grid) / count for t in (hidden, seen)]


def test_untruncated_means_are_the_papers():
    hidden, seen = slow_frequency(14)
    assert hidden.sum() == pytest.approx(94, abs=2) and seen.sum() == pytest.approx(84, abs=2)


@pytest.mark.parametrize("grid, corner", [(8, 0.22), (14, 0.24), (16, 0.24)])
def test_coverage_is_even(grid, corner):
    """No raster order: opposite edges agree. Each patch is hidden as often as in the slow recipe, scaled to M; seen too, but for
    corners, since the best of eight favours large squares: 0.61 against 0.43 on 14 × 14."""
    for indices, truth, most in zip(draw(8000, grid)[::-1], slow_frequency(grid), (0.08, corner)):
        share = frequency(indices, grid)
        for edge, opposite in (
            (share[0], share[-1]),
            (share[:, 0], share[:, -1]),
            (share[:2], share[-2:]),
        ):
            assert abs(edge.mean() - opposite.mean()) < 0.02
        assert (
            np.abs(share - share[::-1]).max() < 0.04 and np.abs(share - share[:, ::-1]).max() < 0.04
        )
        assert np.abs(share - truth * indices.shape[1] / truth.sum()).max() < most


def watched(monkeypatch, grid, batch=2000):
    """sample_masks with the rectangles it drew: → keep, masked (B, N) bool, unions and squares (B, tries, N) bool."""
    seen = []
    monkeypatch.setattr(masks, "blocks", lambda *a, **k: seen.append(blocks(*a, **k)) or seen[-1])
    chosen = [
        torch.zeros(batch, grid * grid, dtype=torch.bool).scatter_(1, i, True)
        for i in draw(batch, grid)
    ]
    return *chosen, *seen


def best_try(keep, masked, unions, squares):
    """The drawn mask that an image kept: its union holds most of what is predicted, its context of what is seen. → (B, N) bool twice"""
    contexts = squares & ~unions
    best = ((masked[:, None] & unions).sum(-1) + (keep[:, None] & contexts).sum(-1)).argmax(1)
    return (table[torch.arange(len(best)), best] for table in (unions, contexts))


@pytest.mark.parametrize("grid", GRIDS)
def test_what_the_constant_size_costs(monkeypatch, grid):
    """Predicted patches lie in one union of four blocks, seen ones in its context, but for 0.3 %; nine images in ten break no rule."""
    keep, masked, unions, squares = watched(monkeypatch, grid)
    union, context = best_try(keep, masked, unions, squares)
    for chosen, within in ((masked, union), (keep, context)):
        astray = (chosen & ~within).sum(1)
        assert astray.sum() / chosen.sum() < 0.005 and (astray == 0).float().mean() > 0.87
    assert (keep & union).sum() < 0.001 * keep.sum()  # what was to be hidden is all but never seen
    # 0.0505 of 64 patches over 24,000 masks, before and after the draws got their names.
    assert (union & ~masked).sum(1).float().mean() < 0.053 * grid**2
    assert (context & ~keep).sum(1).float().mean() < 0.075 * grid**2
    assert squares.float().mean() == pytest.approx(0.88, abs=0.01)


def test_patches_left_out_of_the_union_are_chosen_at_random(monkeypatch):
    """Of a union larger than M, first and last patches in raster order are dropped equally often."""
    keep, masked, *drawn = watched(monkeypatch, 14, 4000)
    union, _ = best_try(keep, masked, *drawn)
    rows = ((masked & ~union).sum(1) == 0) & (union.sum(1) > 95)
    place = (union.cumsum(1) - 1) / (
        union.sum(1, keepdim=True) - 1
    )  # 0 = first of the union, 1 = last
    dropped = place[rows][(union & ~masked)[rows]]
    assert rows.sum() > 300 and dropped.mean().item() == pytest.approx(0.5, abs=0.03)
    assert np.histogram(dropped.numpy(), 4, (0, 1))[0] / len(dropped) == pytest.approx(
        [0.25] * 4, abs=0.04
    )


@pytest.mark.parametrize("grid", [8, 14])
def test_one_block_is_a_rectangle_of_the_asked_area_and_aspect(grid):
    u = torch.rand(3000, 1, 4, generator=torch.Generator().manual_seed(0))
    drawn, areas, ratios, starts = (
        blocks(u, grid, (0.15, 0.2), (0.75, 1.5)).view(-1, grid, grid),
        [],
        [],
        [],
    )
    for one in drawn.numpy():
        rows, cols = np.flatnonzero(one.any(1)), np.flatnonzero(one.any(0))
        assert one[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1].all() and one.sum() == len(
            rows
        ) * len(cols)
        (
            areas.append(one.mean()),
            ratios.append(len(rows) / len(cols)),
            starts.append(rows[0] / (grid - len(rows))),
        )
    assert (
        np.mean(areas) == pytest.approx(0.175, rel=0.04)
        and min(areas) > 0.15 - 0.6 / grid
        and max(areas) < 0.2 + 0.6 / grid
    )
    assert np.exp(np.mean(np.log(ratios))) == pytest.approx(math.sqrt(0.75 * 1.5), rel=0.03)
    assert (
        min(ratios) > 0.5 and max(ratios) < 2.1 and np.mean(starts) == pytest.approx(0.5, abs=0.02)
    )
    assert {0.0, 1.0} <= set(starts)  # both edges are reached


def test_one_drawn_block_by_hand():
    """Area 0.175 · 64 = 11.2, ratio 1.5^0 · ... : u = (1/2, 0.99, 0, log share of ratio 1) → 3 × 3 in the bottom-left corner."""
    level = math.log(1 / 0.75) / math.log(1.5 / 0.75)
    block = blocks(torch.tensor([[0.5, 0.99, 0.0, level]]), 8, (0.15, 0.2), (0.75, 1.5)).view(8, 8)
    by_hand = torch.zeros(8, 8, dtype=torch.bool)
    by_hand[5:, :3] = True
    assert torch.equal(block, by_hand)
