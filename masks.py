"""Block masks for a whole batch at once. (Sec. 4.1, B.1)

The mask M of a view is the union of four rectangles, each of area fraction (0.15, 0.2) and aspect (0.75, 1.5); the
context is its complement, cut to one square block of area fraction (0.75, 1). Kernels want static shapes, so the number
of visible patches K and of predicted patches M stays the same for a whole training. Of eight drawn masks an image keeps
the one whose union and context come closest to holding M and K patches, and then predicts M patches of the union *at
random* and sees K patches of the context *at random*: never in raster order, which would blind the model to the
costophrenic angles. What this costs (tests/test_masks.py measures it):
- the union's other patches (7 of 196 on average) are hidden and not predicted, the context's other patches (10) not seen;
- where even the best of eight falls short (one image in ten), the missing patches are taken at random from the rest: 0.3 %
  of the predicted patches lie outside the union, 0.3 % of the seen ones outside the context;
- the best of eight favours large squares (mean area 0.95, drawn 0.88): a crop's corners are seen in 61 % of images, not 43 %.
"""

import torch


def mask_sizes(grid, visible=80 / 196, masked=92 / 196):
    """K and M for an n × n grid: near the means 84 and 94 of 196 that the untruncated recipe gives. → (K, M)"""
    return round(visible * grid * grid), round(masked * grid * grid)


def sample_masks(batch, grid, generator=None, rows=None, device=None, tries=8):
    """Disjoint patch indices: keep (R, K), masked (R, M), long, for `rows` of a batch (all of them when None).

    Numbers are drawn for the whole (global) batch and only then cut to `rows`, so a rank computes its own share and
    still gets what one process would have got. Ascending order within a row.
    """
    keep_count, mask_count = mask_sizes(grid)
    u = torch.rand(batch, tries * 19 + grid * grid, generator=generator)
    u = u if rows is None else u[rows]
    on_gpu = device is not None and torch.device(device).type == "cuda"
    u = (
        u.pin_memory().to(device, non_blocking=True) if on_gpu else u.to(device)
    )  # by way of pinned memory the host does not wait
    sizes, order = u[:, : tries * 19].view(-1, tries, 19), u[:, tries * 19 :]
    hidden = blocks(
        sizes[..., :16].unflatten(-1, (4, 4)), grid, (0.15, 0.2), (0.75, 1.5)
    )  # (R, tries, N) union of four
    inside = blocks(
        sizes[..., None, 16:], grid, (0.75, 1.0), (1.0, 1.0)
    )  # (R, tries, N) the square
    seen = inside & ~hidden
    short = (mask_count - hidden.sum(-1)).clamp(min=0) + (keep_count - seen.sum(-1)).clamp(min=0)
    best = short.argmin(1)[:, None, None].expand(
        -1, 1, grid * grid
    )  # the first of the best: unbiased
    hidden, seen = hidden.gather(1, best)[:, 0], seen.gather(1, best)[:, 0]
    # One sort settles everything: hidden patches score 2 to 3, seen ones 0 to 1, those outside both 1 to 2, at random within.
    ranked = (order + 1 + hidden.float() - seen.float()).argsort(
        dim=1, stable=True
    )  # stable: a tie falls alike in every share of the batch
    return ranked[:, :keep_count].sort(1).values, ranked[:, -mask_count:].sort(1).values


def blocks(u, grid, scale, aspect):
    """Union of random rectangles. u (..., blocks, 3 or 4) uniform: area, top, left, aspect → (..., N) bool.

    Sides are rounded to whole patches and kept below the grid's; the position is uniform over all that fit.
    """
    area = (scale[0] + (scale[1] - scale[0]) * u[..., 0]) * grid * grid
    ratio = (
        aspect[0] * (aspect[1] / aspect[0]) ** u[..., -1]
        if aspect[0] < aspect[1]
        else torch.ones_like(area)
    )  # height / width, log-uniform
    height = (area * ratio).sqrt().round().clamp(1, grid)
    width = (area / ratio).sqrt().round().clamp(1, grid)
    rows = span(u[..., 1], height, grid)  # (..., blocks, n)
    cols = span(u[..., 2], width, grid)
    return (rows.mT @ cols).flatten(-2) > 0.5  # counts of covering blocks, as one product


def span(u, length, grid):
    """1 on the `length` patches from a start that is uniform over all places that fit, else 0. (...) → (..., n) float"""
    start = (u * (grid - length + 1)).floor()[..., None]
    at = torch.arange(grid, device=u.device)
    return ((at >= start) & (at < start + length[..., None])).float()
