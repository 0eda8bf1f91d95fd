"""Block masks for a whole batch at once. (Sec. 4.1, B.1)

Four rectangles, each of 15 to 20 % of a view's area and of aspect 0.75 to 1.5, are drawn: the
patches in their union are hidden. The context is one square block of 75 to 100 % of the area,
without the hidden patches.

These areas vary from view to view, but a batch wants the same number of tokens for every view: K
patches that are seen and M that are predicted, fixed for a whole training. So each view draws eight
masks and keeps the one that falls short of K and M by the fewest patches (the first of equals). A
surplus is dropped *at random*; what is lacking is taken at random from the other patches. To drop
the last ones in raster order, as the authors' code does, would leave the bottom of the film, with
its costophrenic angles, almost never predicted.

What this costs, of 196 patches (tests/test_masks.py measures it):
- On average 7 hidden patches are not predicted, and 10 patches of the context are not seen.
- One view in ten lacks patches. In all, 0.3 % of the predicted patches lie outside the rectangles
  (none of them is seen), and 0.3 % of the seen ones outside the context.
- Large squares lack fewer patches, so they are kept more often: on average they cover 0.95 of the
  view (0.88 as drawn), and each corner of a view is seen in 61 % of the views (43 %).
"""

import torch

TRIES = 8  # masks drawn per view, of which the best fitting is kept


def mask_sizes(grid, seen_share=80 / 196, masked_share=92 / 196):
    """Tell how many patches of an n × n grid are seen and predicted. → (K, M)

    Of 196, a drawn mask gives 84 seen and 94 hidden patches on average, the best of eight 90 and
    99. We ask for fewer, so that few views lack any.
    """
    return round(seen_share * grid * grid), round(masked_share * grid * grid)


def sample_masks(batch, grid, generator=None, rows=None):
    """Draw which patches each of `batch` views sees and which it predicts.

    Numbers are drawn for the whole (global) batch and only then cut to `rows`, so every rank gets
    for its own R views what a single process would have got.
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

    union = blocks(rectangles, grid, area=(0.15, 0.2), aspect=(0.75, 1.5))  # (R, TRIES, N)
    inside = blocks(square, grid, area=(0.75, 1.0))
    hidden, seen = least_lacking(union, inside & ~union, grid)  # (R, N) each

    # One sort picks both. No patch is hidden and seen, so seen ones score 0 to 1, those that are
    # neither 1 to 2, hidden ones 2 to 3; within each group the order is random. The first K are
    # kept, the last M masked: a surplus stays in the middle, and the middle fills what is lacking.
    score = order + 1 + hidden.float() - seen.float()
    ranked = score.argsort(dim=1, stable=True)  # stable: ties fall alike on every rank
    keep_count, mask_count = mask_sizes(grid)
    keep = ranked[:, :keep_count].sort(1).values
    masked = ranked[:, -mask_count:].sort(1).values
    return keep, masked


def sample_asked(batch, grid, share, generator=None, rows=None):
    """Draw of which patches of the other view each of `batch` views is asked, any as likely.

    share: of the n² patches. Numbers are drawn and cut as in sample_masks. → (R, J), raster order
    """
    order = torch.rand(batch, grid * grid, generator=generator)
    if rows is not None:
        order = order[rows]
    count = max(1, round(share * grid * grid))
    return order.argsort(dim=1, stable=True)[:, :count].sort(1).values


def least_lacking(hidden, seen, grid):
    """Keep each view's mask that lacks the fewest patches. Both (R, TRIES, N) → both (R, N)"""
    keep_count, mask_count = mask_sizes(grid)
    lacks_hidden = (mask_count - hidden.sum(-1)).clamp(min=0)
    lacks_seen = (keep_count - seen.sum(-1)).clamp(min=0)
    best = (lacks_hidden + lacks_seen).argmin(1)  # (R,): the first drawn, where several fit alike
    row = torch.arange(len(best), device=best.device)
    return hidden[row, best], seen[row, best]


def blocks(u, grid, area, aspect=None):
    """Cover a grid with random rectangles: True on every patch that any of them covers.

    u (..., blocks, 3 or 4): uniform numbers for area, top, left and, unless the blocks are squares,
    aspect. area: range of the fraction of the grid. aspect: range of height / width, log-uniform.
    Sides are whole patches; every place where a block fits is equally likely. → (..., N) bool
    """
    size = (area[0] + (area[1] - area[0]) * u[..., 0]) * grid * grid  # in patches
    height_by_width = torch.ones_like(size)
    if aspect is not None:
        height_by_width = aspect[0] * (aspect[1] / aspect[0]) ** u[..., 3]
    height = (size * height_by_width).sqrt().round().clamp(1, grid)
    width = (size / height_by_width).sqrt().round().clamp(1, grid)
    in_row = covered(u[..., 1], height, grid)  # (..., blocks, n)
    in_col = covered(u[..., 2], width, grid)
    count = in_row.mT @ in_col  # (..., n, n): how many blocks cover each patch
    return (count > 0.5).flatten(-2)  # whole numbers, as floats


def covered(u, length, grid):
    """Mark `length` patches in a row, from a random start. u, length (...) → (..., n) of 0 and 1"""
    start = (u * (grid - length + 1)).floor()[..., None]
    patch = torch.arange(grid, device=u.device)
    return ((patch >= start) & (patch < start + length[..., None])).float()
