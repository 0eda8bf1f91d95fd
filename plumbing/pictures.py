"""Pictures of arrays: grids with captions, curves, heat maps, the views of a training step.

Images are uint8 (H, W) or (H, W, 3), or PIL pictures. Text is legible at 100 %.
"""

import math
from functools import partial

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from plumbing.checkpoint import go_on_without, replace_with

INK = "#1b1b1f"
PALE = "#d8d8dc"
GREY = "#8c8c92"
COLOURS = ["#3b6fb6", "#d1495b", "#3a9d5d", "#e09f3e", "#7d5ba6", "#5c6b73"]  # of curves
CHANCE = "chance"  # the line that a guess would give: grey
VIEW_COLOURS = ["#ffb000", "#4cc9f0"]  # of the boxes of view 1 and view 2

# fmt: off
HEAT = np.array([  # dark → bright, in even steps of lightness
    (0, 0, 4), (40, 11, 84), (101, 21, 110), (159, 42, 99),
    (212, 72, 66), (245, 125, 21), (250, 193, 39), (252, 255, 164),
], float)
# fmt: on


# ----------------------------------------------------------------------------------------- images
def font(size: int = 13):
    """Pillow's own scalable face."""
    return ImageFont.load_default(size=size)


def to_picture(image, cell: int | None = None) -> Image.Image:
    """An array or a picture as RGB picture; with `cell`, its longer side becomes `cell` px."""
    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.ascontiguousarray(image))
    picture = image.convert("RGB")
    if cell:
        scale = cell / max(picture.size)
        size = tuple(max(1, round(side * scale)) for side in picture.size)
        smooth = Image.Resampling.BICUBIC if scale <= 3 else Image.Resampling.NEAREST
        picture = picture.resize(size, smooth)
    return picture


def to_grey(images) -> np.ndarray:
    """Float images (n, 1, H, W) in [0, 1], NumPy or a tensor on the CPU → uint8 (n, H, W)."""
    return (255 * np.clip(np.asarray(images)[:, 0], 0, 1)).round().astype(np.uint8)


def heat(array, low=None, high=None) -> np.ndarray:
    """Colour a map (H, W): `low` (its smallest value) is dark, `high` bright. → uint8 (H, W, 3)"""
    values = np.asarray(array, float)
    low = np.nanmin(values) if low is None else low
    high = np.nanmax(values) if high is None else high
    share = (np.nan_to_num(values, nan=low) - low) / ((high - low) or 1)
    at = np.clip(share, 0, 1) * (len(HEAT) - 1)  # between which two colours
    below = np.minimum(at.astype(int), len(HEAT) - 2)
    step = HEAT[below + 1] - HEAT[below]
    return (HEAT[below] + (at - below)[..., None] * step).round().astype(np.uint8)


def overlay(image, heated, alpha: float = 0.5) -> Image.Image:
    """Blend a heat map (RGB) over a grey image, scaled to it."""
    base = to_picture(image)
    return Image.blend(base, to_picture(heated).resize(base.size, Image.Resampling.BICUBIC), alpha)


def draw_boxes(image, boxes, colours) -> Image.Image:
    """Outline boxes (top, left, height, width), px, on a copy of an image."""
    picture = to_picture(image)
    pen = ImageDraw.Draw(picture)
    line = max(1, round(max(picture.size) / 90))
    for (top, left, height, width), colour in zip(boxes, colours, strict=False):
        corners = [left, top, left + width - 1, top + height - 1]
        pen.rectangle(corners, outline=colour, width=line)
    return picture


# ------------------------------------------------------------------------------------------ pages
def grid(rows, captions=None, column_titles=None, row_titles=None, cell=160, footnote=None):
    """Lay out rows of images (None = an empty place) on a white page. → Image

    captions: the same shape as rows, a line below each image; footnote: a line below all.
    """
    gap = 8
    columns = max(len(row) for row in rows)
    left = max((gap + round(font().getlength(title)) for title in row_titles or []), default=0)
    top = 22 if column_titles else 0
    below = 18 if captions else 0
    foot = 20 if footnote else 0
    width = left + columns * (cell + gap) + gap
    height = top + len(rows) * (cell + below + gap) + gap + foot
    page = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(page)
    if footnote:
        pen.text((left + gap, height - 6), footnote, INK, font(), anchor="ls")
    for c, title in enumerate(column_titles or []):
        pen.text((left + gap + c * (cell + gap) + cell / 2, 5), title, INK, font(), anchor="ma")
    for r, row in enumerate(rows):
        y = top + gap + r * (cell + below + gap)
        if row_titles:
            pen.text((gap, y + cell / 2), row_titles[r], INK, font(), anchor="lm")
        for c, image in enumerate(row):
            if image is None:
                continue
            x = left + gap + c * (cell + gap)
            picture = to_picture(image, cell)
            page.paste(picture, (x + (cell - picture.width) // 2, y + (cell - picture.height) // 2))
            if captions and captions[r][c]:
                pen.text((x + cell / 2, y + cell + 2), captions[r][c], INK, font(12), anchor="ma")
    return page


def stack(pictures, gap: int = 8) -> Image.Image:
    """Put pictures one below the other on white."""
    tops = np.cumsum([0] + [picture.height + gap for picture in pictures]).tolist()
    width = max(picture.width for picture in pictures)
    page = Image.new("RGB", (width, tops[-1] - gap), "white")
    for picture, top in zip(pictures, tops, strict=False):
        page.paste(picture, (0, top))
    return page


def save(picture, path):
    """Write a PNG atomically; a picture with a palette keeps it."""
    if getattr(picture, "mode", None) != "P":
        picture = to_picture(picture)
    replace_with(path, partial(picture.save, format="PNG", optimize=True))


def save_or_warn(picture, path):
    """Save a picture without which a run goes on, as where the disk is full."""
    with go_on_without("the picture"):
        save(picture, path)


# ----------------------------------------------------------------------------------------- curves
def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from low to high, in steps of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / count or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


class Axes:
    """The frame of a line chart: where a point lies on the page, and how to write there.

    It is drawn at four times the size, and reduced in the end: Pillow does not smooth lines itself.
    """

    SCALE = 4

    def __init__(self, size, xs, ys):
        self.left, self.top, self.right, self.bottom = 58, 34, size[0] - 16, size[1] - 44
        self.x0, self.x1 = xs.min(), xs.max()
        self.y0, self.y1 = ys.min(), ys.max()
        if self.y0 < 0.5 * self.y1:  # not far from it: the axis begins at 0
            self.y0 = min(self.y0, 0.0)
        if self.x1 <= self.x0:
            self.x1 = self.x0 + 1
        room = 0.05 * (self.y1 - self.y0)
        self.y1 = self.y1 + room if self.y1 > self.y0 else self.y0 + 1
        self.size = size
        self.page = Image.new("RGB", (size[0] * self.SCALE, size[1] * self.SCALE), "white")
        self.pen = ImageDraw.Draw(self.page)

    def place(self, x, y):
        """Values → px on the finished page."""
        across = (x - self.x0) / (self.x1 - self.x0)
        up = (y - self.y0) / (self.y1 - self.y0)
        left = self.left + across * (self.right - self.left)
        return left, self.bottom - up * (self.bottom - self.top)

    def line(self, points, colour, width=1.0):
        """Connect points of (x, y), in values."""
        pixels = [tuple(self.SCALE * at for at in self.place(x, y)) for x, y in points]
        if len(pixels) == 1:
            radius = 1.5 * width * self.SCALE
            left, top = pixels[0]
            self.pen.ellipse([left - radius, top - radius, left + radius, top + radius], colour)
        if len(pixels) > 1:
            self.pen.line(pixels, colour, round(width * self.SCALE), joint="curve")

    def text(self, at, words, size, anchor, colour=INK):
        """Write at (left, top), px on the finished page."""
        at = tuple(self.SCALE * each for each in at)
        self.pen.text(at, words, colour, font(size * self.SCALE), anchor=anchor)

    def scales(self):
        """Draw both axes with their numbers."""
        for v in ticks(self.y0, self.y1):
            self.line([(self.x0, v), (self.x1, v)], PALE)
            left, height = self.place(self.x0, v)
            self.text((left - 6, height), f"{v:g}", 12, "rm")
        for v in ticks(self.x0, self.x1, 6):
            left, height = self.place(v, self.y0)
            self.text((left, height + 5), f"{v:g}", 12, "ma")
        self.line([(self.x0, self.y1), (self.x0, self.y0), (self.x1, self.y0)], INK)


def curves(series, title, x_label, y_label, dots=None, room=None, size=(640, 320)) -> Image.Image:
    """Draw a line chart of {name: (x, y)}, with axes, round ticks and a legend; NaN is left out.

    A single value is a dot; without any the chart is empty. dots: {name: (x, y)}, single values
    beside the line of that name. room: the legend stands at the foot, where so much of the lines'
    height is kept free for it, or else at the top. size: of the picture, px.
    """
    lines = {name: np.array(each, float).T for name, each in series.items()}  # (n, 2)
    single = {name: np.array(each, float).T for name, each in (dots or {}).items()}
    points = np.concatenate([np.zeros((0, 2)), *lines.values(), *single.values()])
    points = points[np.isfinite(points[:, 1])]
    if not len(points):
        points = np.zeros((1, 2))
    if room:
        points = np.vstack([points, points.min(0) - [0, room * np.ptp(points[:, 1])]])
    axes = Axes(size, *points.T)
    axes.scales()
    axes.text((axes.left, 1), title, 13, "la")
    axes.text((4, axes.top - 4), y_label, 12, "ls")
    axes.text((axes.right, size[1] - 6), x_label, 12, "rs")
    for k, (name, line) in enumerate(lines.items()):
        colour = GREY if name == CHANCE else COLOURS[k % len(COLOURS)]
        axes.line(line[np.isfinite(line[:, 1])], colour, width=1.6)
        for point in single.get(name, ()):
            axes.line([point], colour, width=1.4)
        if len(lines) > 1:
            first = axes.top + 4 if room is None else axes.bottom - 16 * len(lines) - 8
            axes.text((axes.right - 8, first + 16 * k), name, 13, "ra", colour)
    return axes.page.resize(axes.size, Image.Resampling.LANCZOS)


# -------------------------------------------------------------------------------------- the views
def views_picture(films, boxes, flips, batch, patch):
    """Draw what a training step shows the model: one row per film, both of its views in turn.

    films: b images uint8 (H, W); boxes (b, 2, 4) of (top, left, height, width), px; flips (b, 2);
    batch: what CheXWorld.forward takes (y, x, keep, masked, action), view 1 of all films first.
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
            row += [targets[k], augmented[k], context_of(augmented[k], keep[k], masked[k], patch)]
            bright, contrast, gamma, blur = np.asarray(batch["action"][k]).tolist()
            action = f"b {bright:.2f} c {contrast:.2f} g {gamma:.2f} blur {blur:.1f}"
            words += [None, action, f"{len(keep[k])} kept, {len(masked[k])} masked"]
        rows.append(row)
        captions.append(words)
    titles = ["film, boxes 1 and 2"]
    for v in (1, 2):
        titles += [f"target y{v}", f"x{v} = T_a(y{v})", f"context of x{v}"]
    footnote = "Boxes: view 1 amber, view 2 blue. Context: the patches kept; red ones are masked "
    footnote += "(to be predicted), black ones neither kept nor masked."
    return grid(rows, captions, titles, cell=170, footnote=footnote)


def context_of(image, keep, masked, patch):
    """Paint over what is not kept as context: masked patches red, all others nearly black.

    image uint8 (H, H); keep (K,) and masked (M,): patch indices → uint8 (H, H, 3)
    """
    side = len(image) // patch
    kind = np.zeros(side * side, np.uint8)  # 0 neither, 1 kept, 2 masked
    kind[keep] = 1
    kind[masked] = 2
    kind = kind.reshape(side, side).repeat(patch, 0).repeat(patch, 1)
    painted = np.where(kind == 1, image, image // 6)[..., None].repeat(3, 2)
    painted[kind == 2] += np.array([120, 30, 30], np.uint8)
    return painted
