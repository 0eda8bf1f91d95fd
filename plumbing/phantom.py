"""Synthetic frontal chest radiographs with ground truth: findings, lung and heart masks, landmarks, scanner domain.

    python phantom.py --out phantoms --count 2000                           # 2,000 films of 256 x 256, masks and phantoms.csv
    python phantom.py --out phantoms --count 2000 --size 128 --workers 2

Each tissue is a map of X-ray attenuation, drawn from smooth outlines that vary by patient; the maps add up along the ray, as in a
real radiograph, and a scanner's tone curve turns the sum into grey. Outlines live in the patient's frame: x to the image's right
(the patient's left), 0 at the spine, y down, one unit = the film's side. Points are (n, 2) of (x, y); layers float32 (size, size).
"""

import argparse
import multiprocessing
import os
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

FINDINGS = ("effusion", "cardiomegaly", "nodule", "pneumothorax", "consolidation")


LANDMARKS = (
    "aortic_arch",
    "right_hilum",
    "left_ventricle",
    "clavicle",
)  # the clavicle is the right one, in its middle


ANOMALIES = (None, "mirrored heart", "missing lung")


HEALTHY, SICK = (
    0.4,
    0.28,
)  # share of normal patients; chance of each finding in the others, who have at least one


# one row a scanner: tone (centre, steepness), unsharp mask, blur (px at 256), noise, border (grey or None), chance of a marker
DOMAINS = (
    dict(
        name="film",
        centre=0.45,
        steep=3.2,
        sharpen=0.0,
        blur=0.80,
        noise=0.006,
        border=None,
        marker=0.5,
    ),
    dict(
        name="digital",
        centre=0.50,
        steep=3.4,
        sharpen=0.4,
        blur=0.55,
        noise=0.003,
        border=None,
        marker=0.7,
    ),
    dict(
        name="bright",
        centre=0.30,
        steep=3.6,
        sharpen=0.2,
        blur=0.65,
        noise=0.003,
        border=0.02,
        marker=0.8,
    ),
    dict(
        name="contrast",
        centre=0.58,
        steep=4.2,
        sharpen=0.3,
        blur=0.60,
        noise=0.004,
        border=0.03,
        marker=0.6,
    ),
    dict(
        name="portable",
        centre=0.42,
        steep=2.6,
        sharpen=0.0,
        blur=0.95,
        noise=0.010,
        border=0.98,
        marker=0.9,
    ),
    dict(
        name="flat",
        centre=0.60,
        steep=1.9,
        sharpen=0.3,
        blur=0.75,
        noise=0.003,
        border=None,
        marker=0.3,
    ),
)


def spline(points, steps=8):
    """Catmull-Rom curve through points (k, 2), ends included → ((k - 1) * steps + 1, 2)."""
    p = np.asarray(points, float)
    p = np.concatenate([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
    t = np.arange(steps)[:, None, None] / steps
    a, b, c, d = p[:-3], p[1:-2], p[2:-1], p[3:]
    curve = b + t / 2 * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    return np.concatenate([curve.transpose(1, 0, 2).reshape(-1, 2), p[-2:-1]])


def ellipse(across, down):
    """Closed outline (40, 2) around (0, 0) with these half axes."""
    turn = np.linspace(0, 2 * np.pi, 40)
    return np.stack([across * np.cos(turn), down * np.sin(turn)], 1)


class Sheet:
    """Drawing sheet of one film, drawn at twice the resolution; pose = (angle, zoom, dx, dy) puts the patient on it."""

    def __init__(self, size, pose):
        self.size, self.pose = size, pose

    def place(self, points):
        """Patient frame (..., 2) of (x, y) → fractions of the film's side (..., 2)."""
        angle, zoom, dx, dy = self.pose
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        return (np.asarray(points) - (0, 0.5)) @ turn * zoom + (0.5 + dx, 0.5 + dy)

    def coordinates(self):
        """Patient-frame x and y of every pixel, two layers: the inverse of place."""
        angle, zoom, dx, dy = self.pose
        u, cos, sin = (
            (np.arange(self.size, dtype=np.float32) + 0.5) / self.size,
            float(np.cos(angle)),
            float(np.sin(angle)),
        )
        a, b = (u[None] - 0.5 - dx) / zoom, (u[:, None] - 0.5 - dy) / zoom
        return a * cos + b * sin, 0.5 - a * sin + b * cos

    def draw(self, *shapes):
        """Shapes (points (n, 2) or (k, n, 2), grey 0..1, line width or None = filled), painted in order → layer."""
        canvas = 2 * self.size
        image = Image.new("L", (canvas, canvas))
        pen = ImageDraw.Draw(image)
        for points, grey, width in shapes:
            flat = (
                (self.place(points) * canvas - 0.5).reshape(-1, 2 * np.shape(points)[-2]).tolist()
            )
            pixels = canvas * (width or 1)
            for xy in flat:
                if width is None:
                    pen.polygon(xy, fill=int(255 * grey))
                else:  # below a pixel, lines get fainter instead of thinner
                    pen.line(xy, fill=int(255 * grey * min(1, pixels)), width=max(1, round(pixels)))
        return np.multiply(image.reduce(2), 1 / 255, dtype=np.float32)

    def blur(self, layer, radius):
        """Gaussian blur of a layer in 0..1, radius in units of the film's side; wide ones run on a coarse copy: same look, less time."""
        image, pixels = Image.fromarray((layer * 255 + 0.5).astype(np.uint8)), radius * self.size
        if pixels < 6:
            return np.multiply(
                image.filter(ImageFilter.GaussianBlur(pixels)), 1 / 255, dtype=np.float32
            )
        coarse = np.asarray(
            image.reduce(4).filter(ImageFilter.GaussianBlur(pixels / 4)), np.float32
        )
        return np.asarray(Image.fromarray(coarse / 255).resize(image.size, Image.BICUBIC))


def cloud(rng, size, *grids):
    """Smooth random layer: the sum over grids of unit noise with structures of size / grid pixels; coarsest grid first."""
    field = Image.new("F", (1, 1))
    for grid in grids:
        field = Image.fromarray(
            np.asarray(field.resize((grid, grid), Image.BICUBIC))
            + rng.standard_normal((grid, grid), np.float32)
        )
    return np.asarray(field.resize((size, size), Image.BICUBIC))


WALL = np.array(
    [(0.0, 0.36), (0.045, 0.58), (0.18, 0.79), (0.4, 0.92), (0.7, 0.99), (0.95, 1.0)]
)  # depth in the lung → half width


def make_patient(rng, enlarged):
    """Shape parameters of one patient, with side and place of each finding: they stay through all films. enlarged: a big heart."""
    u = rng.uniform
    p = dict(
        width=u(0.34, 0.40),
        apex=u(0.10, 0.16),
        base=u(0.68, 0.77),
        lean=u(-0.012, 0.012),
        fat=u(0.04, 0.13),
        thick=u(0.9, 1.12),
        rib_drop=u(0.20, 0.30),
        rib_gap=u(0.064, 0.074),
        rib_width=u(0.011, 0.0145),
        bone=u(0.75, 1.25),
        bend=u(-0.012, 0.012),
        knob=u(0.05, 0.075),
        arms=u(0.0, 0.09),
        clavicle=u(-0.02, 0.02),
        dome=u(0.01, 0.05),
        angle=u(0.08, 0.13),
        gut=u(0, 8),
        bubble=u(0.2, 1.2),
        woman=u(0, 1) < 0.5,
        breast=u(0.85, 1.25),
        mass=u(0.02, 0.08),
    )
    p["heart"] = (u(0.95, 1.13), u(1.26, 1.58))[
        enlarged
    ]  # both drawn: what follows is the same for either
    p["shape"] = rng.normal(
        0, 0.006, (64, 2)
    )  # wobbles, shared out to the outlines' control points
    p["side"] = {name: int(rng.choice((-1, 1))) for name in FINDINGS}
    p["side"]["nodule"] = -p["side"]["pneumothorax"]  # never in the air around a collapsed lung
    p["spot"] = {name: rng.uniform(0, 1, 2).tolist() for name in FINDINGS}
    p["trees"] = int(rng.integers(1 << 31))
    return p


def lung_outline(p, side, breath):
    """Closed outline of one lung; side -1 = the patient's right, on the image's left. breath lowers the diaphragm."""
    w, top = p["width"], p["apex"]
    base = (
        p["base"] + breath + (p["dome"] if side > 0 else 0)
    )  # the right dome stands higher: the liver is below it
    wobble = p["shape"][:8] if side > 0 else p["shape"][20:28]
    y = lambda depth: top + depth * (base - top)
    wall = np.array(
        [
            (0.062, y(0.075)),
            *((w * half, y(depth)) for depth, half in WALL),
            (0.975 * w, base + p["angle"]),
        ]
    )
    dome = np.array(
        [
            wall[-1],
            (0.86 * w, base + 0.3 * p["angle"]),
            (0.60 * w, base),
            (0.34 * w, base + 0.006),
            (0.05, base + 0.045),
        ]
    )
    middle = np.array([dome[-1], (0.045, y(0.75)), (0.05, y(0.45)), (0.042, y(0.22)), wall[0]])
    wall[2:-1] += wobble[:5] * 0.6
    dome[1:-1] += wobble[5:] * 0.8
    return np.concatenate([spline(wall), spline(dome)[1:], spline(middle)[1:-1]]) * (side, 1) + (
        p["lean"],
        0,
    )


def heart_outline(p, breath):
    """Closed outline of the heart: right atrium, apex, left ventricle, pulmonary trunk; the apex lies at positive x."""
    points = np.array(
        [
            (-0.045, 0.33),
            (-0.058, 0.44),
            (-0.088, 0.54),
            (-0.095, 0.62),
            (-0.075, 0.70),
            (-0.02, 0.745),
            (0.08, 0.765),
            (0.165, 0.755),
            (0.205, 0.715),
            (0.2, 0.65),
            (0.178, 0.565),
            (0.132, 0.48),
            (0.085, 0.405),
            (0.05, 0.33),
        ]
    )
    points[1:-1] += p["shape"][40:52] * 0.7
    (x, y), bottom = points.T, p["base"] + breath + 0.055
    grow = 1 + (p["heart"] - 1) * np.clip(
        (y - 0.33) / 0.2, 0, 1
    )  # the end at the great vessels keeps its width
    points = np.stack(
        [
            x * grow * p["width"] / 0.37 + p["lean"],
            bottom + (y - 0.765) * (bottom - p["apex"]) / 0.62,
        ],
        1,
    )
    return spline(np.concatenate([points, points[:1]]))


def mediastinum_outline(p):
    """Closed outline of the great vessels: the superior vena cava on the right, the aortic knob bulging on the left."""
    k, y = p["knob"], p["apex"] + 0.17
    points = np.array(
        [
            (-0.06, -0.2),
            (-0.04, 0),
            (-0.045, y),
            (-0.05, y + 0.12),
            (-0.04, 0.8),
            (0.05, 0.8),
            (0.045, y + 0.2),
            (0.75 * k, y + 0.08),
            (k, y + 0.03),
            (k, y),
            (0.85 * k, y - 0.04),
            (0.038, y - 0.065),
            (0.04, 0),
            (0.06, -0.2),
        ]
    )
    points[1:-1] += p["shape"][52:64] * 0.4
    return spline(points) + (p["lean"], 0)


def body_outlines(p):
    """Torso with neck and shoulders (n, 2) and the two arms (2, m, 2)."""
    flank, lift = p["width"] + p["fat"], p["arms"]
    side = spline(
        [
            (0.10, -0.3),
            (0.105, 0),
            (0.16, 0.055),
            (0.33, 0.085),
            (0.47, 0.13),
            (0.52, 0.25),
            (flank + 0.03, 0.4),
            (flank, 1.3),
        ]
    )
    arm = np.array(
        [
            (0.40, 0.14),
            (0.50, 0.15),
            (0.58, 0.4),
            (0.60, 0.8),
            (0.6, 1.3),
            (0.46, 1.3),
            (0.46, 0.8),
            (0.44, 0.45),
            (0.4, 0.14),
        ]
    )
    arm = spline(arm + np.array([0, 0.5, 1, 2, 2, 2, 2, 1, 0])[:, None] * (lift, 0))
    return np.concatenate([side, side[::-1] * (-1, 1)]), np.stack([arm, arm * (-1, 1)])


def ribs(p, sheet):
    """Layer of posterior and anterior ribs: each rib is a tilted half ring in space, seen from the front."""
    angle, number = np.linspace(0.10, 0.84 * np.pi, 40), np.arange(11)[:, None]
    turn = (np.sin(angle) ** 2 + 1 - np.abs(np.cos(angle))) / 4
    turn = np.where(
        angle < np.pi / 2, turn, 1 - turn
    )  # 0 at the spine, 1/2 at the chest wall, 1 at the breastbone
    start, drop = (
        p["apex"] - 0.045 + number * p["rib_gap"] + 0.5 * p["shape"][:11, 1:],
        p["rib_drop"] * np.minimum(1, 0.45 + 0.11 * number),
    )
    reach = (
        p["width"] * np.interp((start + drop / 2 - p["apex"]) / (p["base"] - p["apex"]), *WALL.T)
        - 0.003
    )
    curve = np.stack(
        [reach * np.sin(angle), start + drop * turn - 0.012 * np.sin(np.minimum(2 * angle, np.pi))],
        2,
    )  # (11, 40, 2)
    slope = np.gradient(curve, axis=1)
    normal = (
        slope[..., ::-1] * (-1, 1) / np.linalg.norm(slope, axis=2, keepdims=True) * p["rib_width"]
    )
    layers = []
    for part, thick, grey in (
        (np.s_[:, :24], 1.0, 1.0),
        (np.s_[:8, 19:36], 1.15, 0.45),
    ):  # behind; in front, until cartilage follows
        edges = np.stack(
            [curve[part] + normal[part] * thick, (curve[part] - normal[part] * thick)[:, ::-1]], 1
        )
        edges = np.concatenate([edges, edges * (-1, 1)]) + (p["lean"], 0)  # both sides of the body
        marrow, cortex = edges.reshape(len(edges), -1, 2), edges.reshape(-1, *edges.shape[2:])
        layers.append(sheet.draw((marrow, 0.5 * grey, None), (cortex, 0.95 * grey, 0.003)))
    return sum(layers)


def shoulder_bones(p, sheet):
    """Layer of clavicles, shoulder blades and upper arm bones; and the middle of the right clavicle (2,)."""
    clavicle, blade, humerus = (
        spline(line) + (0, p["apex"] + p["clavicle"])
        for line in (
            [(0.03, 0.07), (0.10, 0.05), (0.18, 0.012), (0.27, -0.03), (0.37, -0.04)],
            [
                (0.335, 0.02),
                (0.39, 0.01),
                (0.43, 0.04),
                (0.425, 0.11),
                (0.405, 0.2),
                (0.385, 0.33),
                (0.35, 0.25),
                (0.335, 0.1),
                (0.335, 0.02),
            ],
            [
                (0.44, 0.02),
                (0.48, -0.005),
                (0.52, 0.03),
                (0.56, 0.3),
                (0.62, 0.9),
                (0.56, 0.9),
                (0.50, 0.3),
                (0.46, 0.1),
                (0.44, 0.02),
            ],
        )
    )
    both = lambda line: np.stack([line * (side, 1) + (p["lean"], 0) for side in (-1, 1)])
    shapes = [
        (both(blade), 0.12, None),
        (both(blade[22:50]), 0.3, 0.006),
        (both(humerus), 0.45, None),
        (both(humerus), 0.6, 0.005),
        (both(clavicle), 0.8, 0.024),
        (both(clavicle), 0.6, 0.016),
    ]
    return sheet.draw(*shapes), both(clavicle)[0, 16]


def spine(p, sheet):
    """Layer of the vertebral column: bodies, end plates, pedicles and spinous processes, growing downwards."""
    tops = np.cumsum(0.036 * 1.04 ** np.arange(23)) - 0.2
    scale = np.stack([0.030 + 0.012 * tops, np.gradient(tops)], 1)
    middle = np.stack([p["lean"] + p["bend"] * np.sin(6 * tops), tops], 1)
    put = lambda points: np.asarray(points) * scale[:, None] + middle[:, None]
    body = put(
        [(-1, 0.06), (1, 0.06), (0.88, 0.45), (1, 0.84), (-1, 0.84), (-0.88, 0.45), (-1, 0.06)]
    )
    pedicles = np.concatenate([put([(side * 0.6, 0.2), (side * 0.6, 0.5)]) for side in (-1, 1)])
    column = np.concatenate([middle - scale * (1, 0), (middle + scale * (1, 0))[::-1]])
    return sheet.draw(
        (column, 0.4, None),
        (body, 0.6, None),
        (body, 0.72, 0.004),
        (pedicles, 0.85, 0.011),
        (pedicles, 0.65, 0.005),
        (put([(0, 0.4), (0.06, 1.0)]), 0.8, 0.006),
    )


def vessel_tree(p, sheet, hila):
    """Layer of the pulmonary vessels: an artery at each hilum (2, 2), branches that fork five times and thin out."""
    rng, shapes = np.random.default_rng(p["trees"]), []
    for side, hilum in zip((-1, 1), hila):
        artery = (
            spline([(-0.02, -0.05), (0.005, -0.02), (0.012, 0.02), (0.02, 0.06), (0.03, 0.11)])
            * (side, 1)
            + hilum
        )
        shapes += [(artery[9:], 0.8, 0.016), (artery[:20], 0.9, 0.024)]
        angle = np.array([-1.3, -0.85, -0.3, 0.3, 0.75, 1.05, 1.4]) + rng.normal(0, 0.15, 7)
        start, length = (
            hilum + np.stack([rng.normal(0, 0.008, 7), 0.03 * np.sin(angle)], 1),
            rng.uniform(0.05, 0.1, 7),
        )
        for level in range(5):
            bend = angle + rng.normal(0, 0.3, (3, len(angle)))
            steps = length[:, None] / 3 * np.stack([side * np.cos(bend), np.sin(bend)], 2)
            line = np.concatenate([start[None], start + np.cumsum(steps, 0)])
            shapes.append((line.transpose(1, 0, 2), 0.95 - 0.13 * level, 0.0115 * 0.66**level))
            angle = np.concatenate(
                [
                    angle + rng.uniform(0.1, 0.6, len(angle)),
                    angle - rng.uniform(0.1, 0.6, len(angle)),
                ]
            )
            start, length = np.tile(line[-1], (2, 1)), rng.uniform(0.03, 0.075, len(angle))
    return sheet.draw(*shapes[::-1])  # the thick ones last, over the fine ones


def soft_tissue(p, sheet, breath):
    """Layer of torso, arms, belly and breasts less the gas in windpipe and gut, as if the lungs held no air; and the torso's mask."""
    torso, arms = body_outlines(p)
    body, limbs = sheet.draw((torso, 1, None)), sheet.draw((arms, 1, None))
    depth = (np.arange(sheet.size, dtype=np.float32)[:, None] + 0.5) / sheet.size
    skin = np.sqrt(
        np.clip(2.2 * sheet.blur(np.maximum(body, limbs), 0.035) - 1.05, 0, 1)
    )  # thickness falls to nothing at the skin
    tissue = np.maximum(
        body * (0.05 + 0.2 * skin + (0.40 + 0.22 * depth) * sheet.blur(body, 0.11)),
        limbs * (0.08 + 0.28 * skin),
    )
    middle = np.array([p["lean"], p["base"] + breath])
    belly = (
        spline(
            [
                (-0.6, 1.5),
                (-0.4, 0.09),
                (-0.19, 0.0),
                (0.0, 0.07),
                (0.2, 0.03),
                (0.4, 0.11),
                (0.6, 1.5),
            ]
        )
        + middle
    )
    core = np.array([(-0.08, -0.5), (0.08, -0.5), (0.17, 0.1), (-0.12, 0.1)]) + middle
    tissue += 0.22 * body * sheet.blur(sheet.draw((core, 0.35, None), (belly, 1, None)), 0.04)
    if p["woman"]:
        oval = ellipse(0.18, 0.20) * p["breast"] + (0.6 * p["width"], p["base"] - 0.01)
        tissue += (
            p["mass"]
            * sheet.draw(([oval, oval * (-1, 1)], 1, None))
            * np.clip((depth - p["base"] + 0.2) / 0.3, 0, 1)
        )
    return tissue * p["thick"] - 0.15 * sheet.blur(sheet.draw(*gas(p, middle)), 0.005), body


def gas(p, middle):
    """Shapes of the air outside the lungs: windpipe and main bronchi, the stomach's bubble on its fluid, gut."""
    rng, fork = np.random.default_rng((p["trees"], 1)), (p["lean"] - 0.01, p["apex"] + 0.22)
    tubes = (
        ([(0.01, -0.6), (0.01, -0.12), (0, 0)], 0.036),
        ([(0, -0.01), (-0.025, 0.03), (-0.06, 0.07)], 0.022),
        ([(0, -0.01), (0.04, 0.03), (0.085, 0.06)], 0.020),
    )
    bubble = np.minimum(ellipse(0.075, 0.05), (1, 0.02)) * p["bubble"] + middle + (0.16, 0.10)
    loops = [
        ellipse(*rng.uniform(0.012, 0.04, 2)) + middle + rng.uniform((-0.1, 0.16), (0.3, 0.3))
        for _ in range(int(p["gut"]))
    ]
    return (
        [(spline(line) + fork, 0.4, width) for line, width in tubes]
        + [(bubble, 1, None)]
        + [(loop, 0.4, None) for loop in loops]
    )


def add_findings(names, p, rng, sheet, breath):
    """Three layers (plain numbers if healthy): the share of air lost, extra attenuation, the share of the lung still expanded."""
    amounts = rng.uniform(
        0.3, 1, len(FINDINGS)
    ).tolist()  # drawn for all: one finding never moves another
    if not names:
        return 0.0, 0.0, 1.0
    x, y = sheet.coordinates()
    x, top, base, w = x - p["lean"], p["apex"], p["base"] + breath, p["width"]
    step = lambda edge, width: np.clip(edge / width + 0.5, 0, 1)  # a ramp from 0 to 1
    lost, extra, expanded = np.zeros_like(x), np.zeros_like(x), np.ones_like(x)
    texture = cloud(np.random.default_rng((p["trees"], 2)), sheet.size, 7, 24)
    for name in names:
        amount, side, (along, up) = amounts[FINDINGS.index(name)], p["side"][name], p["spot"][name]
        out, here = (
            x * side / w,
            x * side > 0,
        )  # 0 at the spine, 1 at the chest wall; this half of the chest
        away = lambda cx, cy, rx, ry: (
            ((out - cx) * w / rx) ** 2 + ((y - top - cy * (base - top)) / ry) ** 2
        )
        if name == "effusion":  # fluid, its meniscus climbing the chest wall
            level = (
                base
                + (p["dome"] if side > 0 else 0)
                + 0.07
                - 0.15 * amount
                - 0.25 * np.clip(out - 0.4, 0, 1) ** 2
            )
            lost = np.maximum(lost, step(y - level, 0.05) * here)
        elif name == "nodule":  # a ball, clear of the heart, the apex and the dome
            radius, high = (
                0.014 + 0.022 * amount,
                0.3 if side > 0 else 0.5,
            )  # on the left the heart reaches far out below
            ball = 1 - away(0.52 + 0.2 * along, 0.2 + high * up, radius, radius) * (
                1 + 0.1 * texture
            )
            extra += (0.07 + 0.08 * amount) * np.sqrt(np.clip(ball, 0, 1))
        elif (
            name == "pneumothorax"
        ):  # air outside the visceral pleura: no vessels, a thin bright line
            pleura = 1 - (0.10 + 0.22 * amount) * (
                1.2 - 0.9 * np.clip((y - top) / (base - top), 0, 1)
            )
            pleura *= np.sqrt(np.clip((y - top - 0.05 * amount) / 0.25, 0, 1))
            empty = step(out - pleura, 0.006) * here
            expanded = expanded * (1 - empty)
            extra += (
                0.055 * np.exp(-(((out - pleura) / 0.008) ** 2)) * (out > 0.1)
                - 0.035 * empty
                + 0.015 * here * (1 - empty)
            )
        elif name == "consolidation":  # patchy loss of air around a centre
            far = away(
                0.45 + 0.3 * along, 0.25 + 0.55 * up, 0.06 + 0.07 * amount, 0.06 + 0.09 * amount
            )
            lost = np.maximum(
                lost,
                (0.35 + 0.35 * amount)
                * step(0.8 - far + 0.45 * texture, 1.8)
                * step(1.5 - far, 1.5)
                * here,
            )
    return lost, extra, expanded


def build(p, names, anomaly, breath, sheet, rng):
    """Add up all tissues → attenuation layer, masks of lungs and heart (bool), landmarks (4, 2) in the patient's frame."""
    mirror = (-1 if anomaly == "mirrored heart" else 1, 1)
    heart_line, chest_line = heart_outline(p, breath) * mirror, mediastinum_outline(p) * mirror
    sides = [
        lung_outline(p, side, breath)
        for side in (-1, 1)
        if anomaly != "missing lung" or side != p["side"]["effusion"]
    ]
    lung, heart, chest = (
        sheet.draw(*[(line, 1, None) for line in lines])
        for lines in (sides, [heart_line], [chest_line])
    )
    hila = np.array([(p["lean"] - 0.075, p["apex"] + 0.29), (p["lean"] + 0.075, p["apex"] + 0.27)])
    whole = np.maximum(heart, chest)
    round_whole, round_lung = sheet.blur(whole, 0.024), sheet.blur(lung, 0.04)
    solid = (
        np.sqrt(np.clip(2.1 * round_whole - 0.95, 0, 1)) * whole
    )  # share of the ray in heart or vessels: little at their edge
    lost, extra, expanded = add_findings(names, p, rng, sheet, breath)
    air = (
        lung * (0.35 + 0.65 * round_lung) * (1 - 0.9 * solid) * (1 - lost)
    )  # lungs thin out towards their edges
    vessels = vessel_tree(p, sheet, hila) * expanded * lung * (1 - 0.7 * solid) * (1 - 0.7 * lost)
    sharp = (1 - 0.5 * solid) * (
        0.35 + 0.65 * round_lung
    )  # scatter hides ribs behind heart and liver
    coarse = soft_tissue(p, Sheet(sheet.size // 2, sheet.pose), breath)  # nothing in it is sharp
    tissue, body = (
        np.asarray(Image.fromarray(layer).resize(heart.shape, Image.BICUBIC)) for layer in coarse
    )
    bones, clavicle = shoulder_bones(p, sheet)
    bones = (
        p["bone"]
        * (0.075 * sharp * ribs(p, sheet) + 0.17 * bones + 0.08 * spine(p, sheet))
        * np.clip(4 * body - 0.2, 0, 1)
    )
    attenuation = (
        tissue * (1 + 0.03 * cloud(rng, sheet.size, 5))
        - 0.38 * air
        + 0.12 * round_whole
        + bones
        + 0.07 * vessels
        + extra * lung
        + 0.01 * air * expanded * cloud(rng, sheet.size, 24, 64)
    )
    knob = np.array([0.55 * p["knob"], p["apex"] + 0.17]) * mirror + (p["lean"], 0)
    ventricle = 0.75 * heart_line[np.argmax(heart_line[:, 0] * mirror[0])] + 0.25 * heart_line.mean(
        0
    )
    return (
        attenuation,
        lung * (1 - whole) > 0.5,
        heart > 0.5,
        np.stack([knob, hila[0], ventricle, clavicle]),
    )


def expose(attenuation, domain, rng, sheet):
    """Attenuation → grey 0..1: unsharp mask, the sigmoid of film (Hurter and Driffield's curve), blur, noise."""
    centre, steep = domain["centre"] + rng.normal(0, 0.06), domain["steep"] * rng.uniform(0.75, 1.2)
    if domain["sharpen"]:
        attenuation = attenuation + domain["sharpen"] * (
            attenuation - 1.6 * sheet.blur(np.clip(attenuation / 1.6, 0, 1), 0.04)
        )
    curve = lambda a: 1 / (1 + np.exp(steep * (centre - a)))
    low, high = float(curve(0.0)), float(curve(1.3))
    grey = rng.uniform(0.0, 0.08) + rng.uniform(0.80, 0.92) * np.clip(
        (curve(attenuation) - low) / (high - low), 0, 1
    )
    grey = sheet.blur(grey, domain["blur"] * rng.uniform(0.7, 1.3) / 256)
    sigma = (
        domain["noise"] * rng.uniform(0.5, 1.2) * min(1.0, sheet.size / 256)
    )  # a small film averages the noise away
    return grey + sigma * rng.standard_normal(grey.shape, np.float32) * (0.4 + 0.6 * grey)


def stamp(grey, domain, rng):
    """Collimation border and burned-in L or R, as likely on any patient → film 0..1; the letter's (top, left, height, width) or None."""
    size = len(grey)
    if domain["border"] is not None:
        for edge in (grey, grey[::-1], grey.T, grey.T[::-1]):
            edge[: int(size * max(0, rng.uniform(-0.04, 0.05)))] = domain["border"]
    if rng.random() >= domain["marker"]:
        return grey, None
    letter, tall = rng.choice(("L", "R")), rng.uniform(0.035, 0.06)
    top, left = (
        rng.uniform(0.03, 0.15),
        rng.uniform(0.84, 0.9) if letter == "L" else rng.uniform(0.05, 0.12),
    )
    stroke = (
        [(0, 0), (0, 1), (0.6, 1)]
        if letter == "L"
        else [(0, 1), (0, 0), (0.5, 0.05), (0.6, 0.28), (0.5, 0.5), (0, 0.5), (0.6, 1)]
    )
    flat = Sheet(
        size, (0, 1, -0.5, 0)
    )  # the letter stays upright on the film whatever the patient does
    ink = flat.draw((np.array(stroke) * tall + (left, top), 0.94, 0.012))
    return np.maximum(grey, ink), tuple(round(v * size) for v in (top, left, tall, 0.62 * tall))


def make_phantom(seed, index, size=256, anomaly=None, findings=None):
    """Film `index` of population `seed`, always the same → dict: film uint8 (size, size); labels (5,) 0/1 of FINDINGS; lungs, heart bool
    (size, size), the visible lung fields (fluid or collapse included) and the heart; landmarks (4, 2) of (row, col), pixels; domain int;
    marker box or None; patient int (every other one has two films). anomaly plants wrong anatomy, findings replaces the drawn names."""
    if anomaly not in ANOMALIES:
        raise ValueError(f"anomaly {anomaly!r} is unknown; choose one of {ANOMALIES}")
    if not set(findings or ()) <= set(FINDINGS):
        raise ValueError(f"findings {findings!r} are not all among {FINDINGS}")
    patient = index * 2 // 3
    rng, names = np.random.default_rng((seed, patient, 0)), tuple(findings or ())
    sick = findings is None and rng.random() >= HEALTHY
    while sick and not names:
        names = tuple(name for name in FINDINGS if rng.random() < SICK)
    p = make_patient(np.random.default_rng((seed, patient, 1)), "cardiomegaly" in names)
    if anomaly == "missing lung":  # nothing can be found in it
        names = tuple(
            name
            for name in names
            if name == "cardiomegaly" or p["side"][name] != p["side"]["effusion"]
        )
    rng = np.random.default_rng((seed, index, 2))
    number, breath = int(rng.integers(len(DOMAINS))), rng.uniform(-0.03, 0.02)
    sheet = Sheet(
        size,
        (
            rng.normal(0, 0.03),
            rng.uniform(0.94, 1.16),
            rng.normal(0, 0.02),
            rng.uniform(-0.01, 0.06),
        ),
    )
    attenuation, lungs, heart, points = build(p, names, anomaly, breath, sheet, rng)
    grey, marker = stamp(
        expose(attenuation, DOMAINS[number], rng, sheet),
        DOMAINS[number],
        np.random.default_rng((seed, index, 4)),
    )
    film, labels = (
        (np.clip(grey, 0, 1) * 255 + 0.5).astype(np.uint8),
        np.array([int(name in names) for name in FINDINGS]),
    )
    return dict(
        film=film,
        labels=labels,
        lungs=lungs,
        heart=heart,
        landmarks=sheet.place(points)[:, ::-1] * size - 0.5,
        domain=number,
        marker=marker,
        patient=patient,
    )


def save(path, write):
    """write(part) into a temporary file, then rename it: no reader ever sees half a file."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    write(part)
    os.replace(part, path)


def write_one(folder, size, seed, index):
    """Make film `index`, write its images → its row of phantoms.csv (dict). The patient decides the split: 70 / 10 / 20 %."""
    item, name = make_phantom(seed, index, size), f"phantom_{index:06d}.png"
    for kind, image in (
        ("films", item["film"]),
        ("masks", item["lungs"]),
        ("hearts", item["heart"]),
    ):
        image = Image.fromarray(image if kind == "films" else image * np.uint8(255))
        save(folder / kind / name, partial(image.save, format="PNG"))
    draw = np.random.default_rng((seed, item["patient"], 3)).random()
    split = "train" if draw < 0.7 else "val" if draw < 0.8 else "test"
    label = "|".join(finding for finding, here in zip(FINDINGS, item["labels"]) if here) or "normal"
    row = dict(
        filename=name,
        label=label,
        patient_id=f"p{item['patient']:06d}",
        split=split,
        mask=f"masks/{name}",
        heart=f"hearts/{name}",
    )
    for landmark, (r, c) in zip(LANDMARKS, item["landmarks"]):
        row |= {f"{landmark}_row": f"{r:.2f}", f"{landmark}_col": f"{c:.2f}"}
    return row | dict(domain=item["domain"], marker="|".join(map(str, item["marker"] or ())))


def write_phantoms(folder, count, size=256, seed=0, workers=1):
    """Write films/, masks/ (lungs), hearts/ and last phantoms.csv → path of the CSV. Any workers, same files."""
    folder = Path(folder)
    for part in ("films", "masks", "hearts"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    make, bar = (
        partial(write_one, folder, size, seed),
        partial(tqdm, total=count, desc="phantoms", unit="film"),
    )
    if workers > 1:
        with multiprocessing.get_context("spawn").Pool(
            workers
        ) as pool:  # spawn: safe where torch threads already run
            rows = list(bar(pool.imap(make, range(count), chunksize=16)))
    else:
        rows = list(bar(map(make, range(count))))
    lines = [
        ",".join(map(str, line)) for line in (rows[0], *(row.values() for row in rows))
    ]  # no value holds a comma
    save(folder / "phantoms.csv", lambda part: part.write_text("\n".join(lines) + "\n"))
    return folder / "phantoms.csv"


def main():
    """Command line: write a folder of phantoms."""
    parser = argparse.ArgumentParser(
        description="Synthetic chest radiographs with ground truth: films/, masks/, hearts/, phantoms.csv."
    )
    parser.add_argument(
        "--out",
        default="phantoms",
        help="folder to write; give its films/ to --data of other scripts (default: phantoms)",
    )
    parser.add_argument(
        "--count",
        type=int,
        default=2000,
        help="films to make; every other patient has two (default: 2000)",
    )
    parser.add_argument(
        "--size",
        type=int,
        default=256,
        help="side of a film in pixels, 64 to 512; same anatomy (default: 256)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="another seed is another population of patients (default: 0)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        help="processes; the files do not depend on it (default: 1)",
    )
    args = parser.parse_args()
    if not 64 <= args.size <= 512 or args.count < 1 or args.workers < 1 or args.seed < 0:
        parser.error(
            "--size must be 64 to 512, --count and --workers at least 1, --seed at least 0"
        )
    print("wrote", write_phantoms(args.out, args.count, args.size, args.seed, args.workers))


if __name__ == "__main__":
    main()
