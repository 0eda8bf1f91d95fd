"""Masks for a whole batch of views at once. (Sec. 4.1, B.1)

A mask is four rectangles, each of 15 to 20 % of a view's area and of aspect 0.75 to 1.5, and one
square of 75 to 100 % of it. Patches in any rectangle are *covered*; patches in the square and in no
rectangle are *open*.

These counts differ from mask to mask, but all views of a batch must give equally many tokens: K
*kept* patches (the context) and M *masked* ones (to predict), fixed for a run. So each view draws
eight masks and uses the one with the smallest shortfall, counted in covered patches missing to M
and open ones missing to K. Extra patches are dropped *at random*; missing ones are taken at random
from the rest. The authors' code drops the last in raster order, which would almost never predict
the bottom of the film, where the costophrenic angles lie. What our choice costs is told in
docs/method.md.
"""

import torch

TRIES = 8  # masks drawn per view, of which the one with the smallest shortfall is used


def mask_sizes(grid, kept_share=80 / 196, masked_share=92 / 196):
    """Tell how many patches are kept and masked; grid is n, the patches per side. → (K, M)

    An average mask of 14 × 14 has 82 open and 94 covered patches, the chosen one of eight 90 and
    99. K = 80 and M = 92 lie below, so that five views in six need no filling up.
    """
    return round(kept_share * grid * grid), round(masked_share * grid * grid)


def sample_masks(batch, grid, generator=None, rows=slice(None)):
    """Draw which patches each of `batch` views keeps as its context and which are masked.

    rows (R,): indices in the batch of this process's views; all by default. Numbers are drawn for
    the batch of all processes and then indexed, so each view gets what a single process gives it.
    → keep (R, K), masked (R, M): patch indices, disjoint, in raster order
    """
    # Uniform numbers: the third axis lists the rectangles of a mask, the last axis describes one.
    rectangles = torch.rand(batch, TRIES, 4, 4, generator=generator)  # area, top, left, aspect
    square = torch.rand(batch, TRIES, 1, 3, generator=generator)  # area, top, left
    noise = torch.rand(batch, grid * grid, generator=generator)  # decides between equal patches

    tried_covered = cover(rectangles[rows], grid, area=(0.15, 0.2), aspect=(0.75, 1.5))
    tried_open = cover(square[rows], grid, area=(0.75, 1.0)) & ~tried_covered  # (R, TRIES, N)
    covered, is_open = smallest_shortfall(tried_covered, tried_open, grid)  # (R, N) each

    # Sorted by score: open patches (0 to 1), then neither open nor covered (1 to 2), then covered
    # (2 to 3). The first K are kept, the last M masked. Extra open or covered patches stay unused
    # in between; missing ones come from there.
    score = noise[rows] + 1 + covered.float() - is_open.float()
    ranked = score.argsort(dim=1, stable=True)  # stable: ties fall alike in every process
    keep_count, mask_count = mask_sizes(grid)
    keep = ranked[:, :keep_count].sort(1).values
    masked = ranked[:, -mask_count:].sort(1).values
    return keep, masked


def sample_asked(batch, grid, share, generator=None, rows=slice(None)):
    """Draw which patches of the other view each of `batch` views is asked for, all equally likely.

    share: of the n² patches. rows: as in sample_masks. → asked (R, J), in raster order
    """
    noise = torch.rand(batch, grid * grid, generator=generator)[rows]
    count = max(1, round(share * grid * grid))
    return noise.argsort(dim=1, stable=True)[:, :count].sort(1).values


def smallest_shortfall(tried_covered, tried_open, grid):
    """Choose each view's mask that misses the fewest patches. Both (R, TRIES, N) → both (R, N)"""
    keep_count, mask_count = mask_sizes(grid)
    missing_covered = (mask_count - tried_covered.sum(-1)).clamp(min=0)
    missing_open = (keep_count - tried_open.sum(-1)).clamp(min=0)
    best = (missing_covered + missing_open).argmin(1)  # (R,): the first of equals
    view = torch.arange(len(best), device=best.device)
    return tried_covered[view, best], tried_open[view, best]


def cover(u, grid, area, aspect=None):
    """Cover a grid with random rectangles: True on every patch that any of them covers.

    u (..., rectangles, 3 or 4): uniform numbers for area, top, left and, unless they are squares,
    aspect. area: range of the fraction of the grid. aspect: range of height / width, log-uniform.
    Sides are whole patches; every place where a rectangle fits is equally likely. → (..., N) bool
    """
    size = (area[0] + (area[1] - area[0]) * u[..., 0]) * grid * grid  # in patches
    height_by_width = torch.ones_like(size)
    if aspect is not None:
        height_by_width = aspect[0] * (aspect[1] / aspect[0]) ** u[..., 3]
    height = (size * height_by_width).sqrt().round().clamp(1, grid)
    width = (size / height_by_width).sqrt().round().clamp(1, grid)
    in_row = mark_segment(u[..., 1], height, grid)  # (..., rectangles, n)
    in_col = mark_segment(u[..., 2], width, grid)
    # A rectangle is the outer product of its rows and columns; the product adds up all of them.
    count = in_row.mT @ in_col  # (..., n, n): how many rectangles cover each patch
    return (count > 0.5).flatten(-2)  # counts are floats, so compare with 0.5


def mark_segment(u, length, grid):
    """Mark `length` patches of a line from a random start. u, length (...) → (..., n) of 0 and 1"""
    start = (u * (grid - length + 1)).floor()[..., None]
    patch = torch.arange(grid, device=u.device)
    return ((patch >= start) & (patch < start + length[..., None])).float()
