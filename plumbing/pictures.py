"""Pictures of arrays: grids with captions, curves, heat maps. PIL and NumPy only; a leaf.

Images are uint8 (H, W) or (H, W, 3), or PIL pictures; text is legible at 100 %.
"""

import io
import math
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, PALE, COLOURS = (
    "#1b1b1f",
    "#d8d8dc",
    ["#3b6fb6", "#d1495b", "#3a9d5d", "#e09f3e", "#7d5ba6", "#5c6b73"],
)


VIEW_COLOURS = ["#ffb000", "#4cc9f0"]  # of the boxes of view 1 and view 2


HEAT = np.array(
    [
        [0, 0, 4],
        [40, 11, 84],
        [101, 21, 110],
        [159, 42, 99],
        [212, 72, 66],
        [245, 125, 21],
        [250, 193, 39],
        [252, 255, 164],
    ],
    float,
)  # dark → bright, even steps of lightness


def font(size=13):
    """Pillow's own scalable face."""
    return ImageFont.load_default(size=size)


def to_picture(image, cell=None):
    """Array or picture → RGB picture; with `cell`, scaled so that its longer side is `cell` px."""
    picture = (
        image if isinstance(image, Image.Image) else Image.fromarray(np.ascontiguousarray(image))
    )
    picture = picture.convert("RGB")
    if cell:
        scale = cell / max(picture.size)
        size = tuple(max(1, round(s * scale)) for s in picture.size)
        picture = picture.resize(
            size, Image.Resampling.NEAREST if scale > 3 else Image.Resampling.BICUBIC
        )
    return picture


def grid(rows, captions=None, column_titles=None, row_titles=None, cell=160, gap=8, footnote=None):
    """rows: lists of images (None = empty place); captions: the same shape, a line below each image. → white page"""
    columns = max(len(r) for r in rows)
    left = 0 if not row_titles else gap + max(round(font().getlength(t)) for t in row_titles)
    top, line = 22 if column_titles else 0, 18 if captions else 0
    page = Image.new(
        "RGB",
        (
            left + columns * (cell + gap) + gap,
            top + len(rows) * (cell + line + gap) + gap + (20 if footnote else 0),
        ),
        "white",
    )
    draw = ImageDraw.Draw(page)
    if footnote:
        draw.text((left + gap, page.height - 6), footnote, INK, font(), anchor="ls")
    for c, title in enumerate(column_titles or []):
        draw.text((left + gap + c * (cell + gap) + cell / 2, 5), title, INK, font(), anchor="ma")
    for r, row in enumerate(rows):
        y = top + gap + r * (cell + line + gap)
        if row_titles:
            draw.text((gap, y + cell / 2), row_titles[r], INK, font(), anchor="lm")
        for c, image in enumerate(row):
            if image is None:
                continue
            x, picture = left + gap + c * (cell + gap), to_picture(image, cell)
            page.paste(picture, (x + (cell - picture.width) // 2, y + (cell - picture.height) // 2))
            if captions and captions[r][c]:
                draw.text((x + cell / 2, y + cell + 2), captions[r][c], INK, font(12), anchor="ma")
    return page


def ticks(low, high, count=5):
    """Round numbers from low to high, about `count` of them: steps of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / count or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    return [
        k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def curves(series, title, x_label, y_label, size=(640, 320), log_y=False):
    """series: {name: (x, y)} → line chart with axes, round ticks and a legend; drawn at four times the size, then reduced."""
    change = (
        (lambda v: np.log10(np.maximum(np.asarray(v, float), 1e-12)))
        if log_y
        else (lambda v: np.asarray(v, float))
    )
    xs, ys = (
        np.concatenate([np.asarray(x, float) for x, _ in series.values()]),
        np.concatenate([change(y) for _, y in series.values()]),
    )
    good = np.isfinite(ys)
    (x0, x1), (y0, y1) = (xs.min(), xs.max()), (ys[good].min(), ys[good].max())
    y0 = min(y0, 0.0) if not log_y and y0 < 0.5 * y1 else y0
    x1, y1 = x1 if x1 > x0 else x0 + 1, y1 + 0.05 * (y1 - y0) if y1 > y0 else y0 + 1
    scale, box = 4, (58, 34, size[0] - 16, size[1] - 44)
    place = lambda x, y: (
        scale * (box[0] + (x - x0) / (x1 - x0) * (box[2] - box[0])),
        scale * (box[3] - (y - y0) / (y1 - y0) * (box[3] - box[1])),
    )
    page = Image.new("RGB", (size[0] * scale, size[1] * scale), "white")
    draw = ImageDraw.Draw(page)
    text = lambda xy, words, size_, anchor, colour=INK: draw.text(
        xy, words, colour, font(size_ * scale), anchor=anchor
    )
    for v in ticks(y0, y1):
        draw.line([place(x0, v), place(x1, v)], PALE, scale)
        text(
            (place(x0, v)[0] - 6 * scale, place(x0, v)[1]),
            f"{10**v:g}" if log_y else f"{v:g}",
            12,
            "rm",
        )
    for v in ticks(x0, x1, 6):
        text((place(v, y0)[0], place(v, y0)[1] + 5 * scale), f"{v:g}", 12, "ma")
    draw.line([place(x0, y1), place(x0, y0), place(x1, y0)], INK, scale)
    text((box[0] * scale, 10 * scale), f"{title}  ({y_label} by {x_label})", 13, "la")
    for k, (name, (x, y)) in enumerate(series.items()):
        points = [place(a, b) for a, b in zip(np.asarray(x, float), change(y)) if np.isfinite(b)]
        draw.line(points, COLOURS[k % len(COLOURS)], round(1.6 * scale), joint="curve")
        if len(series) > 1:
            text(
                ((box[2] - 8) * scale, (box[1] + 4 + 16 * k) * scale),
                name,
                13,
                "ra",
                COLOURS[k % len(COLOURS)],
            )
    return page.resize(size, Image.Resampling.LANCZOS)


def heat(array, low=None, high=None):
    """(H, W) → RGB uint8: dark is `low` (the smallest value by default), bright is `high`."""
    array = np.asarray(array, float)
    low, high = np.nanmin(array) if low is None else low, np.nanmax(array) if high is None else high
    at = np.clip((np.nan_to_num(array, nan=low) - low) / ((high - low) or 1), 0, 1) * (
        len(HEAT) - 1
    )
    below = np.minimum(at.astype(int), len(HEAT) - 2)
    return (
        (HEAT[below] + (at - below)[..., None] * (HEAT[below + 1] - HEAT[below]))
        .round()
        .astype(np.uint8)
    )


def overlay(image, heated, alpha=0.5):
    """Blend a heat map (RGB) over a grey image, scaled to it. → picture"""
    base = to_picture(image)
    return Image.blend(base, to_picture(heated).resize(base.size, Image.Resampling.BICUBIC), alpha)


def draw_boxes(image, boxes, colours):
    """Outline boxes (top, left, height, width) px on an image. → picture"""
    picture = to_picture(image)
    width = max(1, round(max(picture.size) / 90))
    for (top, left, height, wide), colour in zip(boxes, colours):
        ImageDraw.Draw(picture).rectangle(
            [left, top, left + wide - 1, top + height - 1], outline=colour, width=width
        )
    return picture


def views_picture(films, boxes, flips, batch, patch):
    """Draw what a training step shows the model: one row per film, both of its views in turn.

    films: b images uint8 (H, W); boxes (b, 2, 4) of (top, left, height, width), px; flips (b, 2);
    batch: what CheXWorld.forward takes (y, x, keep, masked, action): view 1 of all films, then view 2.
    """
    targets = to_grey(batch["y"])
    augmented = to_grey(batch["x"])
    keep = np.asarray(batch["keep"])
    masked = np.asarray(batch["masked"])
    rows = []
    captions = []
    for i, film in enumerate(films):
        mirrored = " and ".join(str(v + 1) for v in (0, 1) if flips[i][v])
        row = [draw_boxes(film, np.asarray(boxes[i]), VIEW_COLOURS)]
        words = [f"mirrored: {mirrored}" if mirrored else None]
        for k in (i, i + len(films)):  # the film's view 1, then its view 2
            row += [targets[k], augmented[k], hide(augmented[k], keep[k], masked[k], patch)]
            bright, contrast, gamma, blur = np.asarray(batch["action"][k]).tolist()
            action = f"b {bright:.2f} c {contrast:.2f} g {gamma:.2f} blur {blur:.1f}"
            words += [None, action, f"{len(keep[k])} seen, {len(masked[k])} asked"]
        rows.append(row)
        captions.append(words)
    titles = ["film, boxes 1 and 2"]
    for v in (1, 2):
        titles += [f"target y{v}", f"x{v} = T_a(y{v})", f"context of x{v}"]
    footnote = (
        "Boxes: view 1 amber, view 2 blue. Context: red patches are hidden and asked for, "
        "black ones only hidden."
    )
    return grid(rows, captions, titles, cell=170, footnote=footnote)


def hide(image, keep, masked, patch):
    """Paint a context's hidden patches: red where the predictor is asked, nearly black elsewhere.

    image uint8 (H, H); keep (K,) and masked (M,): numbers of the seen and of the asked patches.
    → uint8 (H, H, 3)
    """
    side = len(image) // patch
    kind = np.zeros(side * side, np.uint8)  # 0 only hidden, 1 seen, 2 hidden and asked for
    kind[keep] = 1
    kind[masked] = 2
    kind = kind.reshape(side, side).repeat(patch, 0).repeat(patch, 1)
    painted = np.where(kind == 1, image, image // 6)[..., None].repeat(3, 2)
    painted[kind == 2] += np.array([120, 30, 30], np.uint8)
    return painted


def to_grey(images):
    """Float images (n, 1, H, W) in [0, 1], NumPy or a tensor on the CPU → uint8 (n, H, W)."""
    return (255 * np.clip(np.asarray(images)[:, 0], 0, 1)).round().astype(np.uint8)


def stack(pictures, gap=8):
    """Pictures one below the other on white."""
    page = Image.new(
        "RGB",
        (max(p.width for p in pictures), sum(p.height + gap for p in pictures) - gap),
        "white",
    )
    y = 0
    for picture in pictures:
        page.paste(picture, (0, y))
        y += picture.height + gap
    return page


def save(picture, path):
    """Write a PNG atomically; a palette picture stays one."""
    path, data = Path(path), io.BytesIO()
    picture = picture if getattr(picture, "mode", None) == "P" else to_picture(picture)
    picture.save(data, "PNG", optimize=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data.getvalue())
    os.replace(temporary, path)
