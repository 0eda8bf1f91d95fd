"""Masks for a whole batch of views at once. (Sec. 4.1, B.1)

A mask is four rectangles, each of 15 to 20 % of a view's area and of aspect 0.75 to 1.5, and one
square of 75 to 100 % of it. Patches in a rectangle are *covered*; the square's others are *open*.

Their numbers vary from mask to mask, but a batch wants the same number of tokens of every view: K
patches are *kept* as the context, M are *masked* and predicted, fixed for a whole training. So each
view draws eight masks and takes the one that lacks the fewest patches: covered ones for M, open
ones for K (the first of equals). A surplus is dropped *at random*; what is lacking is taken at
random from the other patches. To drop the last ones in raster order, as the authors' code does,
would leave the bottom of the film, with its costophrenic angles, almost never predicted.

What this costs, of 196 patches (tests/test_masks.py measures it):
- On average 7 covered patches are not masked, and 10 open ones are not kept.
- One view in ten lacks patches. In all, 0.3 % of the masked patches are not covered (none of them
  is kept), and 0.3 % of the kept ones not open.
- Large squares lack fewer patches, so they are taken more often: on average they fill 0.95 of the
  view (0.88 as drawn), and each corner of a view is kept in 61 % of the views (43 %).
"""

import torch

TRIES = 8  # masks drawn per view, of which the best fitting is taken


def mask_sizes(grid, kept_share=80 / 196, masked_share=92 / 196):
    """Tell how many patches of an n × n grid are kept and masked. → (K, M)

    Of 196, a drawn mask leaves 84 open and covers 94 on average, the best of eight 90 and 99. We
    ask for fewer, so that few views lack any.
    """
    return round(kept_share * grid * grid), round(masked_share * grid * grid)


def sample_masks(batch, grid, generator=None, rows=None):
    """Draw which patches each of `batch` views keeps as its context and which are masked.

    rows: the R views of this process; None: all. Numbers are drawn for the batch of all processes
    and only then cut to these, so each process gets what a single one would have got.
    → keep (R, K), masked (R, M): patch indices, disjoint, in raster order
    """
    # Uniform numbers for each view of the batch: four rectangles, one square, an order of patches.
    rectangles = torch.rand(batch, TRIES, 4, 4, generator=generator)  # area, top, left, aspect
    square = torch.rand(batch, TRIES, 1, 3, generator=generator)  # area, top, left
    order = torch.rand(batch, grid * grid, generator=generator)
    if rows is not None:
        rectangles = rectangles[rows]
        square = square[rows]
        order = order[rows]

    covered = cover(rectangles, grid, area=(0.15, 0.2), aspect=(0.75, 1.5))  # (R, TRIES, N)
    in_square = cover(square, grid, area=(0.75, 1.0))
    covered, is_open = least_lacking(covered, in_square & ~covered, grid)  # (R, N) each

    # One sort picks both. No patch is covered and open, so open ones score 0 to 1, those that are
    # neither 1 to 2, covered ones 2 to 3; within each group the order is random. The first K are
    # kept, the last M masked: a surplus stays in the middle, and the middle fills what is lacking.
    score = order + 1 + covered.float() - is_open.float()
    ranked = score.argsort(dim=1, stable=True)  # stable: ties fall alike in every process
    keep_count, mask_count = mask_sizes(grid)
    keep = ranked[:, :keep_count].sort(1).values
    masked = ranked[:, -mask_count:].sort(1).values
    return keep, masked


def sample_asked(batch, grid, share, generator=None, rows=None):
    """Draw which patches of the other view each of `batch` views is asked for, any as likely.

    share: of the n² patches. rows: as in sample_masks. → asked (R, J), in raster order
    """
    order = torch.rand(batch, grid * grid, generator=generator)
    if rows is not None:
        order = order[rows]
    count = max(1, round(share * grid * grid))
    return order.argsort(dim=1, stable=True)[:, :count].sort(1).values


def least_lacking(covered, is_open, grid):
    """Take each view's mask that lacks the fewest patches. Both (R, TRIES, N) → both (R, N)"""
    keep_count, mask_count = mask_sizes(grid)
    lacks_covered = (mask_count - covered.sum(-1)).clamp(min=0)
    lacks_open = (keep_count - is_open.sum(-1)).clamp(min=0)
    best = (lacks_covered + lacks_open).argmin(1)  # (R,): the first, where several fit alike
    row = torch.arange(len(best), device=best.device)
    return covered[row, best], is_open[row, best]


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
    in_row = place(u[..., 1], height, grid)  # (..., rectangles, n)
    in_col = place(u[..., 2], width, grid)
    count = in_row.mT @ in_col  # (..., n, n): how many rectangles cover each patch
    return (count > 0.5).flatten(-2)  # whole numbers, as floats


def place(u, length, grid):
    """Mark `length` patches in a row, from a random start. u, length (...) → (..., n) of 0 and 1"""
    start = (u * (grid - length + 1)).floor()[..., None]
    patch = torch.arange(grid, device=u.device)
    return ((patch >= start) & (patch < start + length[..., None])).float()
