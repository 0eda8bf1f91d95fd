"""Draw synthetic frontal chest radiographs with their ground truth: the films of the demo.

    python -m plumbing.phantom --out phantoms --count 2000              # films of 256 × 256 px
    python -m plumbing.phantom --out phantoms --size 128 --workers 2

The folder receives films/, masks/ (lungs), hearts/ and phantoms.csv.

Every tissue is a map of how much X-ray it absorbs, drawn from smooth outlines that vary by patient.
The maps add up along the ray, as in a real radiograph; a scanner's tone curve makes the sum grey.

Outlines live in the patient's frame: x to the image's right, 0 at the spine; y down; the unit is a
film's side. Points are (n, 2) of (x, y); a layer is float32 (size, size); `p` is what make_patient
returns. Left and right are the patient's: side +1 is the left, on the image's right.
"""

import dataclasses
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from plumbing import keys, launch
from plumbing.checkpoint import replace_with, write_csv
from plumbing.launch import UserError, flag, helper_pool, parse, run_script, signals_held

FINDINGS = ("effusion", "cardiomegaly", "nodule", "pneumothorax", "consolidation")
LANDMARKS = ("aortic_arch", "right_hilum", "left_ventricle", "clavicle")  # clavicle: right, middle
ANOMALIES = (None, "mirrored heart", "missing lung")
HEALTHY = 0.4  # share of patients without a finding
SICK = 0.28  # chance of each finding in the others, who have at least one


class Scanner(NamedTuple):
    """How one scanner shows a patient."""

    name: str
    centre: float  # of the tone curve: the attenuation that becomes middle grey
    steepness: float  # of the tone curve
    sharpen: float  # strength of the unsharp mask
    blur: float  # px on a film of 256 px
    noise: float  # standard deviation, of a grey range of 1
    border: float | None  # grey of the collimated edge
    marker: float  # chance of a burned-in L or R


# fmt: off
DOMAINS = (
    #                   centre  steep  sharpen  blur  noise  border  marker
    Scanner("film",       0.45,  3.2,   0.0,   0.80,  0.006,  None,   0.5),
    Scanner("digital",    0.50,  3.4,   0.4,   0.55,  0.003,  None,   0.7),
    Scanner("bright",     0.30,  3.6,   0.2,   0.65,  0.003,  0.02,   0.8),
    Scanner("contrast",   0.58,  4.2,   0.3,   0.60,  0.004,  0.03,   0.6),
    Scanner("portable",   0.42,  2.6,   0.0,   0.95,  0.010,  0.98,   0.9),
    Scanner("flat",       0.60,  1.9,   0.3,   0.75,  0.003,  None,   0.3),
)
# fmt: on


# ---------------------------------------------------------------------------------- drawing tools
def spline(points, steps: int = 8) -> np.ndarray:
    """Draw a smooth curve through points (k, 2), ends included. → ((k - 1) * steps + 1, 2)

    The Catmull-Rom spline: at each point it runs parallel to the line between the neighbours.
    """
    p = np.asarray(points, float)
    p = np.concatenate([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
    t = np.arange(steps)[:, None, None] / steps
    a, b, c, d = p[:-3], p[1:-2], p[2:-1], p[3:]
    curve = b + t / 2 * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    return np.concatenate([curve.transpose(1, 0, 2).reshape(-1, 2), p[-2:-1]])


def ellipse(across: float, down: float) -> np.ndarray:
    """A closed outline (40, 2) around (0, 0) with these half axes."""
    turn = np.linspace(0, 2 * np.pi, 40)
    return np.stack([across * np.cos(turn), down * np.sin(turn)], 1)


def cloud(rng, size: int, *grids: int) -> np.ndarray:
    """A smooth random layer: unit noise on each grid, the coarsest first, added up.

    A grid of g × g numbers gives structures of size / g pixels.
    """
    field = Image.new("F", (1, 1))
    for grid in grids:
        smooth = np.asarray(field.resize((grid, grid), Image.BICUBIC))
        field = Image.fromarray(smooth + rng.standard_normal((grid, grid), np.float32))
    return np.asarray(field.resize((size, size), Image.BICUBIC))


def ramp(distance: np.ndarray, width: float) -> np.ndarray:
    """An edge of this width, at distance 0: 0 on the negative side, 1 on the positive one."""
    return np.clip(distance / width + 0.5, 0, 1)


class Sheet:
    """The drawing sheet of one film. Shapes are drawn at twice its resolution and then reduced.

    pose: how the patient stands before the detector: turned by an angle (radians), zoomed, shifted
    by dx and dy.
    """

    def __init__(self, size: int, pose: tuple[float, float, float, float]):
        self.size = size
        self.pose = pose

    def place(self, points) -> np.ndarray:
        """Patient's frame (..., 2) of (x, y) → fractions of the film's side (..., 2)."""
        angle, zoom, dx, dy = self.pose
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        return (np.asarray(points) - (0, 0.5)) @ turn * zoom + (0.5 + dx, 0.5 + dy)

    def coordinates(self) -> tuple[np.ndarray, np.ndarray]:
        """x and y of every pixel in the patient's frame, as two layers: the inverse of place."""
        angle, zoom, dx, dy = self.pose
        cos = float(np.cos(angle))
        sin = float(np.sin(angle))
        centre = (np.arange(self.size, dtype=np.float32) + 0.5) / self.size  # of each pixel
        across = (centre[None] - 0.5 - dx) / zoom
        down = (centre[:, None] - 0.5 - dy) / zoom
        return across * cos + down * sin, 0.5 - across * sin + down * cos

    def draw(self, *shapes) -> np.ndarray:
        """Paint shapes in order, the later ones over the earlier ones. → layer

        A shape: (points (n, 2), or (k, n, 2) for k alike; grey 0..1; line width, None = filled).
        """
        canvas = 2 * self.size
        image = Image.new("L", (canvas, canvas))
        pen = ImageDraw.Draw(image)
        for points, grey, width in shapes:
            corners = 2 * np.shape(points)[-2]
            pixels = canvas * (width or 1)
            for xy in (self.place(points) * canvas - 0.5).reshape(-1, corners).tolist():
                if width is None:
                    pen.polygon(xy, fill=int(255 * grey))
                else:  # below a pixel, lines get fainter instead of thinner
                    ink = int(255 * grey * min(1, pixels))
                    pen.line(xy, fill=ink, width=max(1, round(pixels)))
        return np.multiply(image.reduce(2), 1 / 255, dtype=np.float32)

    def fill(self, *outlines) -> np.ndarray:
        """Fill closed outlines with 1. → layer"""
        return self.draw(*[(outline, 1, None) for outline in outlines])

    def blur(self, layer: np.ndarray, radius: float) -> np.ndarray:
        """Blur a layer in 0..1 by a Gaussian; radius in units of the film's side. → layer

        A wide blur runs on a copy of a quarter of the size: it looks the same and takes less time.
        """
        image = Image.fromarray((layer * 255 + 0.5).astype(np.uint8))
        pixels = radius * self.size
        if pixels < 6:
            blurred = image.filter(ImageFilter.GaussianBlur(pixels))
            return np.multiply(blurred, 1 / 255, dtype=np.float32)
        coarse = image.reduce(4).filter(ImageFilter.GaussianBlur(pixels / 4))
        coarse = Image.fromarray(np.asarray(coarse, np.float32) / 255)
        return np.asarray(coarse.resize(image.size, Image.BICUBIC))


# ------------------------------------------------------------------------------------ the patient
# Smallest and largest value of each number that describes a patient; lengths in film sides.
# The order decides what is drawn: a new number goes to the end.
SHAPE = dict(
    width=(0.34, 0.40),  # of a lung, from the spine to the chest wall
    apex=(0.10, 0.16),  # y of the top of the lungs
    base=(0.68, 0.77),  # y of the right dome of the diaphragm
    lean=(-0.012, 0.012),  # x of everything in the middle
    fat=(0.04, 0.13),  # between ribs and skin
    thick=(0.9, 1.12),  # how much all soft tissue absorbs
    rib_drop=(0.20, 0.30),  # from a rib's end at the spine to its end at the breastbone
    rib_gap=(0.064, 0.074),  # from one rib to the next
    rib_width=(0.011, 0.0145),
    bone=(0.75, 1.25),  # how much all bone absorbs
    bend=(-0.012, 0.012),  # of the spine
    knob=(0.05, 0.075),  # how far the aortic arch bulges
    arms=(0.0, 0.09),  # how far the arms are held off
    clavicle=(-0.02, 0.02),  # y of the shoulders, added to the apex
    dome=(0.01, 0.05),  # how much lower the left dome stands: the liver is below the right one
    angle=(0.08, 0.13),  # from the dome down to the costophrenic angle
    gut=(0, 8),  # loops of gut with gas
    bubble=(0.2, 1.2),  # size of the stomach's bubble
    woman=(0, 1),  # breasts are drawn below 0.5
    breast=(0.85, 1.25),  # size
    mass=(0.02, 0.08),  # how much a breast absorbs
)
HEART = (0.95, 1.13)  # width of a normal heart
BIG_HEART = (1.26, 1.58)  # with cardiomegaly


def make_patient(rng, is_enlarged: bool) -> SimpleNamespace:
    """Draw what stays through all films of a patient: the shape, side and place of each finding.

    is_enlarged: the patient has a big heart.
    """
    p = SimpleNamespace(**{name: rng.uniform(*span) for name, span in SHAPE.items()})
    normal_heart = rng.uniform(*HEART)
    big_heart = rng.uniform(*BIG_HEART)  # both are drawn, so that what follows is alike for either
    p.heart = big_heart if is_enlarged else normal_heart
    # Shifts of control points: 0–7 left lung, 20–27 right, 40–51 heart, 52–63 vessels; ribs 0–10.
    p.wobble = rng.normal(0, 0.006, (64, 2))
    p.side = {name: int(rng.choice((-1, 1))) for name in FINDINGS}
    p.side["nodule"] = -p.side["pneumothorax"]  # never in the air around a collapsed lung
    p.spot = {name: rng.uniform(0, 1, 2).tolist() for name in FINDINGS}
    p.trees = int(rng.integers(1 << 31))  # the random key of vessels, gas, nodules and texture
    rng = keys.numpy_rng(p.trees, keys.PHANTOM_NODULES)
    p.spot["nodule"] = rng.uniform(0, 1, (rng.integers(1, 4), 3)).tolist()
    return p


# fmt: off
WALL = np.array([  # (depth in the lung, half width)
    (0.0, 0.36), (0.045, 0.58), (0.18, 0.79), (0.4, 0.92), (0.7, 0.99), (0.95, 1.0),
])
HEART_LINE = np.array([  # down the right atrium to the apex, up the left ventricle
    (-0.045, 0.33), (-0.058, 0.44), (-0.088, 0.54), (-0.095, 0.62), (-0.075, 0.70), (-0.02, 0.745),
    (0.08, 0.765), (0.165, 0.755), (0.205, 0.715), (0.2, 0.65), (0.178, 0.565), (0.132, 0.48),
    (0.085, 0.405), (0.05, 0.33),
])
TORSO = [  # the left side, from the neck over the shoulder to the armpit; the flank follows
    (0.10, -0.3), (0.105, 0), (0.16, 0.055), (0.33, 0.085), (0.47, 0.13), (0.52, 0.25),
]
ARM = np.array([
    (0.40, 0.14), (0.50, 0.15), (0.58, 0.4), (0.60, 0.8), (0.6, 1.3), (0.46, 1.3), (0.46, 0.8),
    (0.44, 0.45), (0.4, 0.14),
])
ARM_LIFT = np.array([0, 0.5, 1, 2, 2, 2, 2, 1, 0])  # how far each point moves with p.arms
CLAVICLE = [(0.03, 0.07), (0.10, 0.05), (0.18, 0.012), (0.27, -0.03), (0.37, -0.04)]
SHOULDER_BLADE = [
    (0.335, 0.02), (0.39, 0.01), (0.43, 0.04), (0.425, 0.11), (0.405, 0.2), (0.385, 0.33),
    (0.35, 0.25), (0.335, 0.1), (0.335, 0.02),
]
HUMERUS = [
    (0.44, 0.02), (0.48, -0.005), (0.52, 0.03), (0.56, 0.3), (0.62, 0.9), (0.56, 0.9), (0.50, 0.3),
    (0.46, 0.1), (0.44, 0.02),
]
VERTEBRA = [  # in widths from the middle, in heights from the upper end plate
    (-1, 0.06), (1, 0.06), (0.88, 0.45), (1, 0.84), (-1, 0.84), (-0.88, 0.45), (-1, 0.06),
]
BELLY = [(-0.6, 1.5), (-0.4, 0.09), (-0.19, 0.0), (0.0, 0.07), (0.2, 0.03), (0.4, 0.11), (0.6, 1.5)]
CORE = [(-0.08, -0.5), (0.08, -0.5), (0.17, 0.1), (-0.12, 0.1)]  # what lies before the spine
ARTERY = [(-0.02, -0.05), (0.005, -0.02), (0.012, 0.02), (0.02, 0.06), (0.03, 0.11)]
AIRWAYS = (  # (line from the fork of the windpipe, width): windpipe, right and left main bronchus
    ([(0.01, -0.6), (0.01, -0.12), (0, 0)], 0.036),
    ([(0, -0.01), (-0.025, 0.03), (-0.06, 0.07)], 0.022),
    ([(0, -0.01), (0.04, 0.03), (0.085, 0.06)], 0.020),
)
LETTERS = {  # strokes of a marker, one unit tall
    "L": [(0, 0), (0, 1), (0.6, 1)],
    "R": [(0, 1), (0, 0), (0.5, 0.05), (0.6, 0.28), (0.5, 0.5), (0, 0.5), (0.6, 1)],
}
# fmt: on


# ------------------------------------------------------------------------------ outlines and layers
def lung_outline(p, side: int, breath: float) -> np.ndarray:
    """The closed outline of one lung. breath lowers the diaphragm."""
    w = p.width
    base = p.base + breath
    if side > 0:
        base += p.dome
    wobble = p.wobble[:8] if side > 0 else p.wobble[20:28]

    def y(depth):
        return p.apex + depth * (base - p.apex)

    wall = [(w * half, y(depth)) for depth, half in WALL]
    wall = np.array([(0.062, y(0.075)), *wall, (0.975 * w, base + p.angle)])
    outer = (0.86 * w, base + 0.3 * p.angle)
    dome = np.array(
        [wall[-1], outer, (0.60 * w, base), (0.34 * w, base + 0.006), (0.05, base + 0.045)]
    )
    middle = np.array([dome[-1], (0.045, y(0.75)), (0.05, y(0.45)), (0.042, y(0.22)), wall[0]])
    wall[2:-1] += wobble[:5] * 0.6
    dome[1:-1] += wobble[5:] * 0.8
    outline = np.concatenate([spline(wall), spline(dome)[1:], spline(middle)[1:-1]])
    return outline * (side, 1) + (p.lean, 0)


def heart_outline(p, breath: float) -> np.ndarray:
    """The closed outline of the heart; its apex lies at positive x."""
    points = HEART_LINE.copy()
    points[1:-1] += p.wobble[40:52] * 0.7
    x, y = points.T
    bottom = p.base + breath + 0.055
    below_vessels = np.clip((y - 0.33) / 0.2, 0, 1)  # the end at the great vessels keeps its width
    grow = 1 + (p.heart - 1) * below_vessels
    x = x * grow * p.width / 0.37 + p.lean
    y = bottom + (y - 0.765) * (bottom - p.apex) / 0.62
    points = np.stack([x, y], 1)
    return spline(np.concatenate([points, points[:1]]))


def vessels_outline(p) -> np.ndarray:
    """The closed outline of the great vessels: the vena cava, and the aorta's arch on the left."""
    k = p.knob
    y = p.apex + 0.17
    right = [(-0.06, -0.2), (-0.04, 0), (-0.045, y), (-0.05, y + 0.12), (-0.04, 0.8)]
    left = [(0.05, 0.8), (0.045, y + 0.2), (0.75 * k, y + 0.08), (k, y + 0.03), (k, y)]
    left += [(0.85 * k, y - 0.04), (0.038, y - 0.065), (0.04, 0), (0.06, -0.2)]
    points = np.array(right + left)
    points[1:-1] += p.wobble[52:64] * 0.4
    return spline(points) + (p.lean, 0)


def ribs(p, sheet: Sheet) -> np.ndarray:
    """The layer of the ribs: each is a tilted half ring in space, seen from the front."""
    angle = np.linspace(0.10, 0.84 * np.pi, 40)  # around the chest, from spine to breastbone
    number = np.arange(11)[:, None]
    fall = (np.sin(angle) ** 2 + 1 - np.abs(np.cos(angle))) / 4
    fall = np.where(angle < np.pi / 2, fall, 1 - fall)  # 0 at the spine, 1/2 at the chest wall, 1
    start = p.apex - 0.045 + number * p.rib_gap + 0.5 * p.wobble[:11, 1:]
    drop = p.rib_drop * np.minimum(1, 0.45 + 0.11 * number)
    depth = (start + drop / 2 - p.apex) / (p.base - p.apex)
    reach = p.width * np.interp(depth, *WALL.T) - 0.003
    rise = 0.012 * np.sin(np.minimum(2 * angle, np.pi))  # behind, a rib first climbs
    curve = np.stack([reach * np.sin(angle), start + drop * fall - rise], 2)  # (11, 40, 2)
    slope = np.gradient(curve, axis=1)
    length = np.linalg.norm(slope, axis=2, keepdims=True)
    normal = slope[..., ::-1] * (-1, 1) / length * p.rib_width

    def part(middle, normal, grey):
        edges = np.stack([middle + normal, (middle - normal)[:, ::-1]], 1)
        edges = np.concatenate([edges, edges * (-1, 1)]) + (p.lean, 0)  # (2n, 2, points, 2)
        marrow = edges.reshape(len(edges), -1, 2)
        cortex = edges.reshape(-1, *edges.shape[2:])
        return sheet.draw((marrow, 0.5 * grey, None), (cortex, 0.95 * grey, 0.003))

    behind = part(curve[:, :24], normal[:, :24], 1.0)
    before = part(curve[:8, 19:36], normal[:8, 19:36] * 1.15, 0.45)  # until cartilage follows
    return behind + before


def shoulder_bones(p, sheet: Sheet) -> tuple[np.ndarray, np.ndarray]:
    """The layer of clavicles, shoulder blades, upper arms; and the right clavicle's middle (2,)."""

    def both_sides(line):
        line = spline(line) + (0, p.apex + p.clavicle)
        return np.stack([line * (side, 1) + (p.lean, 0) for side in (-1, 1)])

    clavicle = both_sides(CLAVICLE)
    blade = both_sides(SHOULDER_BLADE)
    humerus = both_sides(HUMERUS)
    layer = sheet.draw(
        (blade, 0.12, None),
        (blade[:, 22:50], 0.3, 0.006),  # its edge along the ribs is the one that is seen
        (humerus, 0.45, None),
        (humerus, 0.6, 0.005),
        (clavicle, 0.8, 0.024),
        (clavicle, 0.6, 0.016),
    )
    return layer, clavicle[0, 16]


def spine(p, sheet: Sheet) -> np.ndarray:
    """The layer of the spine: bodies, pedicles and spinous processes of 23 vertebrae."""
    tops = np.cumsum(0.036 * 1.04 ** np.arange(23)) - 0.2
    scale = np.stack([0.030 + 0.012 * tops, np.gradient(tops)], 1)
    middle = np.stack([p.lean + p.bend * np.sin(6 * tops), tops], 1)

    def each(points):  # of one vertebra (n, 2) → of all (23, n, 2)
        return np.asarray(points) * scale[:, None] + middle[:, None]

    body = each(VERTEBRA)
    pedicles = np.concatenate([each([(x, 0.2), (x, 0.5)]) for x in (-0.6, 0.6)])
    processes = each([(0, 0.4), (0.06, 1.0)])
    column = np.concatenate([middle - scale * (1, 0), (middle + scale * (1, 0))[::-1]])
    return sheet.draw(
        (column, 0.4, None),
        (body, 0.6, None),
        (body, 0.72, 0.004),
        (pedicles, 0.85, 0.011),
        (pedicles, 0.65, 0.005),
        (processes, 0.8, 0.006),
    )


def vessel_tree(p, sheet: Sheet, hila: np.ndarray) -> np.ndarray:
    """The layer of the lungs' vessels: at each hilum (2, 2) an artery and branches that fork."""
    rng = keys.numpy_rng(p.trees)
    shapes = []
    for side, hilum in zip((-1, 1), hila, strict=True):
        artery = spline(ARTERY) * (side, 1) + hilum
        shapes += [(artery[9:], 0.8, 0.016), (artery[:20], 0.9, 0.024)]
        angle = np.array([-1.3, -0.85, -0.3, 0.3, 0.75, 1.05, 1.4]) + rng.normal(0, 0.15, 7)
        start = hilum + np.stack([rng.normal(0, 0.008, 7), 0.03 * np.sin(angle)], 1)
        length = rng.uniform(0.05, 0.1, 7)
        for level in range(5):
            count = len(angle)
            bend = angle + rng.normal(0, 0.3, (3, count))
            steps = length[:, None] / 3 * np.stack([side * np.cos(bend), np.sin(bend)], 2)
            line = np.concatenate([start[None], start + np.cumsum(steps, 0)])  # (4, count, 2)
            shapes.append((line.transpose(1, 0, 2), 0.95 - 0.13 * level, 0.0115 * 0.66**level))
            upper = angle + rng.uniform(0.1, 0.6, count)
            lower = angle - rng.uniform(0.1, 0.6, count)
            angle = np.concatenate([upper, lower])
            start = np.tile(line[-1], (2, 1))
            length = rng.uniform(0.03, 0.075, 2 * count)
    return sheet.draw(*shapes[::-1])  # the thick ones last, over the fine ones


def soft_tissue(p, sheet: Sheet, breath: float) -> tuple[np.ndarray, np.ndarray]:
    """The layer of torso, arms, belly and breasts, without air in the lungs; the torso's mask."""
    flank = p.width + p.fat
    half = spline([*TORSO, (flank + 0.03, 0.4), (flank, 1.3)])
    arm = spline(ARM + ARM_LIFT[:, None] * (p.arms, 0))
    body = sheet.fill(np.concatenate([half, half[::-1] * (-1, 1)]))
    limbs = sheet.fill([arm, arm * (-1, 1)])
    near_skin = sheet.blur(np.maximum(body, limbs), 0.035)
    skin = np.sqrt(np.clip(2.2 * near_skin - 1.05, 0, 1))  # thickness falls to nothing at the skin
    y = (np.arange(sheet.size, dtype=np.float32)[:, None] + 0.5) / sheet.size  # down the film
    trunk = body * (0.05 + 0.2 * skin + (0.40 + 0.22 * y) * sheet.blur(body, 0.11))
    tissue = np.maximum(trunk, limbs * (0.08 + 0.28 * skin))

    diaphragm = np.array([p.lean, p.base + breath])
    belly = spline(BELLY) + diaphragm
    core = np.array(CORE) + diaphragm
    tissue += 0.22 * body * sheet.blur(sheet.draw((core, 0.35, None), (belly, 1, None)), 0.04)
    if p.woman < 0.5:
        oval = ellipse(0.18, 0.20) * p.breast + (0.6 * p.width, p.base - 0.01)
        breasts = sheet.fill([oval, oval * (-1, 1)])
        tissue += p.mass * breasts * np.clip((y - p.base + 0.2) / 0.3, 0, 1)
    air = sheet.draw(*gas(p, diaphragm))
    return tissue * p.thick - 0.15 * sheet.blur(air, 0.005), body


def gas(p, diaphragm: np.ndarray) -> list:
    """Shapes of the air outside the lungs: windpipe and main bronchi, the stomach's bubble, gut."""
    rng = keys.numpy_rng(p.trees, keys.PHANTOM_GAS)
    fork = (p.lean - 0.01, p.apex + 0.22)
    shapes = [(spline(line) + fork, 0.4, width) for line, width in AIRWAYS]
    bubble = np.minimum(ellipse(0.075, 0.05), (1, 0.02))  # flat below: it floats on fluid
    shapes.append((bubble * p.bubble + diaphragm + (0.16, 0.10), 1, None))
    for _ in range(int(p.gut)):
        loop = ellipse(*rng.uniform(0.012, 0.04, 2)) + diaphragm
        shapes.append((loop + rng.uniform((-0.1, 0.16), (0.3, 0.3)), 0.4, None))
    return shapes


# --------------------------------------------------------------------------------------- findings
class HalfChest:
    """The half of the chest in which a finding lies: where each pixel is, in its own measures.

    out: 0 at the spine, 1 at the chest wall, negative in the other half; y: down the patient, from
    `top` (the apex of the lungs) to `base` (the diaphragm); here: True in this half.
    """

    def __init__(self, p, sheet: Sheet, breath: float, side: int):
        x, self.y = sheet.coordinates()
        x = x - p.lean
        self.out = x * side / p.width
        self.here = x * side > 0
        self.is_left = side > 0
        self.width = p.width
        self.top = p.apex
        self.base = p.base + breath
        self.dome = p.dome if self.is_left else 0

    def distance(self, out: float, down: float, across: float, tall: float) -> np.ndarray:
        """Squared distance from (out, down): 1 on an ellipse with half axes across and tall."""
        x = (self.out - out) * self.width / across
        y = (self.y - self.top - down * (self.base - self.top)) / tall
        return x**2 + y**2


# A finding takes its half of the chest, an amount 0.3..1, a spot (along, up) 0..1, a texture. It
# returns three layers, or 0: the share of air lost, extra attenuation, the share of lung collapsed.
def effusion(half, amount, spot, texture):
    """Fluid; its surface climbs the chest wall."""
    wall = np.clip(half.out - 0.4, 0, 1)
    level = half.base + half.dome + 0.07 - 0.15 * amount - 0.25 * wall**2
    return ramp(half.y - level, 0.05) * half.here, 0.0, 0.0


def nodule(half, amount, spots, texture):
    """One to three balls, clear of the heart, the apex and the dome; spots: (along, up, size)."""
    high = 0.55 if not half.is_left else 0.35  # on the left the heart reaches far out below
    dense = np.zeros_like(texture)
    for along, up, large in spots:
        radius = 0.020 + 0.006 * amount + 0.013 * large
        down = 0.16 + high * up
        out = (0.5 + 0.36 * along) * np.interp(down, *WALL.T)
        ball = 1 - half.distance(out, down, radius, radius) * (1 + 0.1 * texture)
        dense = np.maximum(dense, np.sqrt(np.clip(ball, 0, 1)))
    return 0.0, (0.18 + 0.08 * amount) * dense, 0.0


def pneumothorax(half, amount, spot, texture):
    """Air without vessels between chest wall and lung, whose surface is a thin bright line."""
    depth = np.clip((half.y - half.top) / (half.base - half.top), 0, 1)
    surface = 1 - (0.14 + 0.24 * amount) * (1.2 - 0.9 * depth)
    surface *= np.sqrt(np.clip((half.y - half.top - 0.05 * amount) / 0.25, 0, 1))
    empty = ramp(half.out - surface, 0.006) * half.here
    line = 0.10 * np.exp(-(((half.out - surface) / 0.018) ** 2)) * (half.out > 0.1)
    denser = 0.03 * half.here * (1 - empty)  # the rest of the lung, with less air
    return 0.0, line - 0.07 * empty + denser, empty


def consolidation(half, amount, spot, texture):
    """A patchy loss of air around a centre."""
    along, up = spot
    across = 0.06 + 0.07 * amount
    tall = 0.06 + 0.09 * amount
    away = half.distance(0.5 + 0.3 * along, 0.22 + 0.55 * up, across, tall)
    patchy = ramp(0.8 - away + 0.45 * texture, 1.8) * ramp(1.5 - away, 1.5)
    return (0.5 + 0.3 * amount) * patchy * half.here, 0.0, 0.0


# Cardiomegaly is in the patient's shape.
PAINTERS = {each.__name__: each for each in (effusion, nodule, pneumothorax, consolidation)}


def add_findings(names, p, rng, sheet: Sheet, breath: float):
    """Three layers: the share of air lost, extra attenuation, the share of lung still expanded."""
    amounts = rng.uniform(0.3, 1, len(FINDINGS)).tolist()  # all: one finding never moves another
    lost = np.zeros((sheet.size, sheet.size), np.float32)
    extra = np.zeros_like(lost)
    expanded = np.ones_like(lost)
    texture = cloud(keys.numpy_rng(p.trees, keys.PHANTOM_TEXTURE), sheet.size, 7, 24)
    for name in names:
        if name not in PAINTERS:
            continue
        half = HalfChest(p, sheet, breath, p.side[name])
        amount = amounts[FINDINGS.index(name)]
        airless, dense, collapsed = PAINTERS[name](half, amount, p.spot[name], texture)
        lost = np.maximum(lost, airless)
        extra += dense
        expanded *= 1 - collapsed
    return lost, extra, expanded


# --------------------------------------------------------------------------------------- the film
def build(p, names, anomaly, breath: float, sheet: Sheet, rng):
    """Add up all tissues → attenuation (a layer); lungs, heart (bool); landmarks (4, 2) of x, y."""
    mirror = np.array((-1 if anomaly == "mirrored heart" else 1, 1))
    missing = p.side["effusion"] if anomaly == "missing lung" else None
    lung = sheet.fill(*[lung_outline(p, side, breath) for side in (-1, 1) if side != missing])
    heart_line = heart_outline(p, breath) * mirror
    heart = sheet.fill(heart_line)
    whole = np.maximum(heart, sheet.fill(vessels_outline(p) * mirror))
    round_whole = sheet.blur(whole, 0.024)
    round_lung = 0.35 + 0.65 * sheet.blur(lung, 0.04)  # lungs thin out towards their edges
    solid = np.sqrt(np.clip(2.1 * round_whole - 0.95, 0, 1)) * whole  # the ray's share in the heart

    hila = np.array([(p.lean - 0.075, p.apex + 0.29), (p.lean + 0.075, p.apex + 0.27)])
    lost, extra, expanded = add_findings(names, p, rng, sheet, breath)
    air = lung * round_lung * (1 - 0.9 * solid) * (1 - lost)
    vessels = vessel_tree(p, sheet, hila) * expanded * lung * (1 - 0.7 * solid) * (1 - 0.7 * lost)

    half = Sheet(sheet.size // 2, sheet.pose)  # nothing in soft tissue is sharp
    coarse = [Image.fromarray(layer) for layer in soft_tissue(p, half, breath)]
    tissue, body = [np.asarray(each.resize(heart.shape, Image.BICUBIC)) for each in coarse]
    sharp = (1 - 0.5 * solid) * round_lung  # scatter hides ribs behind heart and liver
    shoulders, clavicle = shoulder_bones(p, sheet)
    bones = p.bone * (0.075 * sharp * ribs(p, sheet) + 0.17 * shoulders + 0.08 * spine(p, sheet))
    bones = bones * np.clip(4 * body - 0.2, 0, 1)

    uneven = tissue * (1 + 0.03 * cloud(rng, sheet.size, 5))
    grain = 0.01 * air * expanded * cloud(rng, sheet.size, 24, 64)
    attenuation = uneven - 0.38 * air + 0.12 * round_whole + bones + 0.07 * vessels
    attenuation = attenuation + extra * lung + grain

    arch = np.array([0.55 * p.knob, p.apex + 0.17]) * mirror + (p.lean, 0)
    outermost = heart_line[np.argmax(heart_line[:, 0] * mirror[0])]
    ventricle = 0.75 * outermost + 0.25 * heart_line.mean(0)
    landmarks = np.stack([arch, hila[0], ventricle, clavicle])
    return attenuation, lung * (1 - whole) > 0.5, heart > 0.5, landmarks


def expose(attenuation: np.ndarray, scanner: Scanner, rng, sheet: Sheet) -> np.ndarray:
    """Attenuation → grey 0..1: unsharp mask, film's sigmoid (Hurter and Driffield), blur, noise."""
    centre = scanner.centre + rng.normal(0, 0.06)
    steepness = scanner.steepness * rng.uniform(0.75, 1.2)

    def tone(a):
        return 1 / (1 + np.exp(steepness * (centre - a)))

    if scanner.sharpen:
        smooth = 1.6 * sheet.blur(np.clip(attenuation / 1.6, 0, 1), 0.04)
        attenuation = attenuation + scanner.sharpen * (attenuation - smooth)
    low = float(tone(0.0))
    high = float(tone(1.3))
    exposed = np.clip((tone(attenuation) - low) / (high - low), 0, 1)
    grey = rng.uniform(0.0, 0.08) + rng.uniform(0.80, 0.92) * exposed
    grey = sheet.blur(grey, scanner.blur * rng.uniform(0.7, 1.3) / 256)
    sigma = scanner.noise * rng.uniform(0.5, 1.2)
    sigma = sigma * min(1.0, sheet.size / 256)  # a small film averages the noise away
    return grey + sigma * rng.standard_normal(grey.shape, np.float32) * (0.4 + 0.6 * grey)


def stamp(grey: np.ndarray, scanner: Scanner, rng):
    """Add the collimated edge and a burned-in L or R, as likely on any patient.

    → film 0..1; the letter's box (top, left, height, width), px, or None
    """
    size = len(grey)
    grey = grey.copy()
    if scanner.border is not None:
        for from_edge in (grey, grey[::-1], grey.T, grey.T[::-1]):
            width = int(size * max(0, rng.uniform(-0.04, 0.05)))
            from_edge[:width] = scanner.border
    if rng.random() >= scanner.marker:
        return grey, None
    letter = rng.choice(("L", "R"))
    tall = rng.uniform(0.035, 0.06)
    top = rng.uniform(0.03, 0.15)
    left = rng.uniform(0.84, 0.9) if letter == "L" else rng.uniform(0.05, 0.12)
    upright = Sheet(size, (0, 1, -0.5, 0))  # the letter is the film's, not the patient's
    stroke = np.array(LETTERS[letter]) * tall + (left, top)
    ink = upright.draw((stroke, 0.94, 0.012))
    box = tuple(round(v * size) for v in (top, left, tall, 0.62 * tall))
    return np.maximum(grey, ink), box


def draw_findings(seed: int, patient: int) -> tuple[str, ...]:
    """Draw what a patient has: nothing (HEALTHY of them), or at least one finding."""
    rng = keys.numpy_rng(seed, patient, keys.PHANTOM_LABELS)
    names = ()
    if rng.random() >= HEALTHY:
        while not names:
            names = tuple(name for name in FINDINGS if rng.random() < SICK)
    return names


def draw_pose(rng) -> tuple[float, float, float, float]:
    """Draw how a patient stands before the film. → angle, zoom, shift to the right and down"""
    angle = rng.normal(0, 0.03)
    zoom = rng.uniform(0.94, 1.16)
    dx = rng.normal(0, 0.02)
    dy = rng.uniform(-0.01, 0.06)
    return angle, zoom, dx, dy


def make_phantom(seed: int, index: int, size: int = 256, anomaly=None, findings=None) -> dict:
    """Make film `index` of population `seed`, which is always the same.

    anomaly: plant wrong anatomy; findings: names that replace the drawn ones. → a dict of
    film: uint8 (size, size)
    labels: (5,), 0 or 1 for each of FINDINGS
    lungs, heart: bool (size, size); the lung fields include fluid and collapse
    landmarks: (4, 2) of (row, col), px, in the order of LANDMARKS
    domain: the scanner's number in DOMAINS
    marker: the letter's box (top, left, height, width), px, or None
    patient: a number; every other patient has two films
    """
    if anomaly not in ANOMALIES:
        raise ValueError(f"anomaly {anomaly!r} is unknown; choose one of {ANOMALIES}")
    if not set(findings or ()) <= set(FINDINGS):
        raise ValueError(f"findings {findings!r} are not all among {FINDINGS}")
    patient = index * 2 // 3
    names = draw_findings(seed, patient) if findings is None else tuple(findings)
    p = make_patient(keys.numpy_rng(seed, patient, keys.PHANTOM_SHAPE), "cardiomegaly" in names)
    if anomaly == "missing lung":  # nothing can be found in it
        gone = [f for f in PAINTERS if p.side[f] == p.side["effusion"]]
        names = tuple(name for name in names if name not in gone)

    rng = keys.numpy_rng(seed, index, keys.PHANTOM_FILM)
    domain = int(rng.integers(len(DOMAINS)))
    breath = rng.uniform(-0.03, 0.02)
    sheet = Sheet(size, draw_pose(rng))
    attenuation, lungs, heart, landmarks = build(p, names, anomaly, breath, sheet, rng)
    grey = expose(attenuation, DOMAINS[domain], rng, sheet)
    grey, marker = stamp(grey, DOMAINS[domain], keys.numpy_rng(seed, index, keys.PHANTOM_MARKER))
    return dict(
        film=(np.clip(grey, 0, 1) * 255 + 0.5).astype(np.uint8),
        labels=np.array([int(name in names) for name in FINDINGS]),
        lungs=lungs,
        heart=heart,
        landmarks=sheet.place(landmarks)[:, ::-1] * size - 0.5,
        domain=domain,
        marker=marker,
        patient=patient,
    )


# --------------------------------------------------------------------------------------- the files
def split_of(seed: int, patient: int) -> str:
    """Draw the split of a patient: 70 % train, 10 % val, 20 % test."""
    draw = keys.numpy_rng(seed, patient, keys.PHANTOM_SPLIT).random()
    if draw < 0.7:
        return "train"
    return "val" if draw < 0.8 else "test"


def write_one(folder: Path, size: int, seed: int, index: int) -> dict:
    """Make film `index` and write its images. → its row of phantoms.csv"""
    item = make_phantom(seed, index, size)
    name = f"phantom_{index:06d}.png"
    white = np.uint8(255)
    images = [item["film"], item["lungs"] * white, item["heart"] * white]
    for kind, image in zip(("films", "masks", "hearts"), images, strict=True):
        write = partial(Image.fromarray(image).save, format="PNG")
        replace_with(folder / kind / name, write, sync=False)  # the table, written last, is synced
    found = [finding for finding, has in zip(FINDINGS, item["labels"], strict=True) if has]
    row = dict(
        filename=name,
        label="|".join(found) or "normal",
        patient_id=f"p{item['patient']:06d}",
        split=split_of(seed, item["patient"]),
        mask=f"masks/{name}",
        heart=f"hearts/{name}",
    )
    for landmark, (r, c) in zip(LANDMARKS, item["landmarks"], strict=True):
        row[f"{landmark}_row"] = f"{r:.2f}"
        row[f"{landmark}_col"] = f"{c:.2f}"
    row["domain"] = item["domain"]
    row["marker"] = "|".join(map(str, item["marker"] or ()))
    return row


def write_phantoms(folder, count: int, size: int = 256, seed: int = 0, workers: int = 1) -> Path:
    """Write films/, masks/ (lungs), hearts/ and, last, phantoms.csv. → path of the CSV

    Any number of workers writes the same files.
    """
    folder = Path(folder)
    for path in folder.glob("*/phantom_*.png"):  # of an earlier drawing of more films
        if path.stem.removeprefix("phantom_") >= f"{count:06d}":
            path.unlink()
    make = partial(write_one, folder, size, seed)
    progress = partial(tqdm, total=count, desc="phantoms", unit="film")
    if workers > 1:
        with helper_pool(workers) as pool:
            with signals_held():
                drawn = pool.map(make, range(count), chunksize=16)
            rows = list(progress(drawn))
    else:
        rows = list(progress(map(make, range(count))))
    write_csv(folder / "phantoms.csv", rows[0], [row.values() for row in rows])
    return folder / "phantoms.csv"


def draw_demo(args, image: int, team):
    """Draw the demo's films and a table of their labels, once. → a Config that names them

    image: side of a training crop in px. The films are PNG files, so the demo reads them as any
    other run does. Raises UserError when other phantoms lie there.
    """
    folder = Path(args.out) / "phantoms"
    table = folder / "phantoms.csv"
    size = max(128, image * 3 // 2)
    has_begun = (Path(args.out) / "last.pt").exists()  # then the recipe is compared later
    if table.is_file():
        films = sorted(folder.glob("films/phantom_*.png"))
        is_same = len(films) == args.phantoms
        if not is_same or not (has_begun or was_drawn_with(films[0], size, args.seed)):
            raise UserError(
                f"{folder} holds phantoms of another --phantoms, --seed or --image: "
                "choose another --out, or delete the folder"
            )
    elif team.lead:
        team.say(f"demo: drawing {args.phantoms} synthetic films into {folder}")
        write_phantoms(folder, args.phantoms, size, args.seed, launch.count_cpus())
    team.wait()  # until the lead has drawn them
    return dataclasses.replace(args, data=str(folder / "films"), probe=args.probe or str(table))


def was_drawn_with(path, size: int, seed: int) -> bool:
    """Whether a file is the first film of this size from this seed."""
    try:
        return np.array_equal(Image.open(path), make_phantom(seed, 0, size)["film"])
    except OSError:
        return False


# ------------------------------------------------------------------------------------- command line
@dataclasses.dataclass
class Config:
    out: str = flag("phantoms", "folder to write; give its films/ to --data of other scripts")
    count: int = flag(2000, "films to make; every other patient has two")
    size: int = flag(256, "side of a film in pixels, 64 to 512; the same anatomy at any size")
    seed: int = flag(0, "another seed is another population of patients")
    workers: int = flag(1, "processes; the files do not depend on it")


def main(argv=None):
    """Write a folder of phantoms."""
    args = parse(Config, __doc__, argv, prog="python -m plumbing.phantom")
    if not 64 <= args.size <= 512:
        raise UserError(f"--size {args.size}: must be 64 to 512")
    path = write_phantoms(args.out, args.count, args.size, args.seed, args.workers)
    print(f"wrote {path}")


if __name__ == "__main__":
    run_script(main)
