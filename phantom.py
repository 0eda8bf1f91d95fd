"""Synthetic frontal chest radiographs with ground truth: labels, lung and heart masks, landmarks, scanner domain.

    python phantom.py --out phantoms --count 2000                    # 2,000 films of 256 x 256, masks and phantoms.csv
    python phantom.py --out phantoms --count 2000 --size 128 --workers 2

Each tissue is a map of X-ray attenuation, drawn from smooth outlines that vary by patient; the maps add up along the ray, as
in a real radiograph, and a scanner's tone curve turns the sum into grey. Outlines live in the patient's frame: x to the
image's right (the patient's left), 0 at the spine, y down, one unit = the film's side. Arrays of points are (n, 2) of (x, y).
"""
import argparse
import csv
import multiprocessing
import os
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

FINDINGS = ("effusion", "cardiomegaly", "nodule", "pneumothorax", "consolidation")
LANDMARKS = ("aortic_arch", "right_hilum", "left_ventricle", "clavicle")
ANOMALIES = (None, "mirrored heart", "missing lung")
HEALTHY, SICK_RATE = 0.4, 0.28            # share of normal patients; chance of each finding in the others, at least one

# one row a scanner: tone (centre, steepness), unsharp mask, blur (px at 256), noise, border (grey or None), chance of a marker, of leads
DOMAINS = (
    dict(name="film",     centre=0.45, steep=3.2, sharpen=0.0, blur=0.80, noise=0.006, border=None, marker=0.5, leads=0.1),
    dict(name="digital",  centre=0.50, steep=3.4, sharpen=0.4, blur=0.55, noise=0.003, border=None, marker=0.7, leads=0.1),
    dict(name="bright",   centre=0.30, steep=3.6, sharpen=0.2, blur=0.65, noise=0.003, border=0.02, marker=0.8, leads=0.1),
    dict(name="contrast", centre=0.58, steep=4.2, sharpen=0.3, blur=0.60, noise=0.004, border=0.03, marker=0.6, leads=0.1),
    dict(name="portable", centre=0.42, steep=2.6, sharpen=0.0, blur=1.10, noise=0.010, border=0.98, marker=0.9, leads=0.7),
    dict(name="flat",     centre=0.60, steep=1.9, sharpen=0.3, blur=0.75, noise=0.003, border=None, marker=0.3, leads=0.1),
)


# ---------------------------------------------------------------- drawing

def spline(points, steps=8):
    """Catmull-Rom curve through points (k, 2), ends included: ((k - 1) * steps + 1, 2)."""
    p = np.asarray(points, float)
    p = np.concatenate([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
    t = np.arange(steps)[:, None, None] / steps
    a, b, c, d = p[:-3], p[1:-2], p[2:-1], p[3:]
    q = b + t / 2 * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    return np.concatenate([q.transpose(1, 0, 2).reshape(-1, 2), p[-2:-1]])


class Sheet:
    """A film-sized drawing sheet at twice the resolution; maps the patient's frame to pixels by the film's pose."""

    def __init__(self, size, pose):
        self.size, self.pose = size, pose

    def place(self, points):
        """Patient frame (..., 2) of (x, y) → fractions of the film's side (..., 2)."""
        angle, zoom, dx, dy = self.pose
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        return (np.asarray(points) - (0, 0.5)) @ turn * zoom + (0.5 + dx, 0.5 + dy)

    def draw(self, *shapes):
        """Shapes (kind "area" or "line", points (n, 2) or (k, n, 2), grey 0..1, line width) painted in order → float32 (size, size)."""
        canvas = 2 * self.size
        image = Image.new("L", (canvas, canvas))
        pen = ImageDraw.Draw(image)
        for kind, points, grey, width in shapes:
            points = np.asarray(points)
            flat = (self.place(points) * canvas - 0.5).reshape(-1, 2 * points.shape[-2]).tolist()
            pixels = width * canvas                               # below a pixel, thin lines get fainter instead
            for xy in flat:
                if kind == "area":
                    pen.polygon(xy, fill=int(255 * grey))
                else:
                    pen.line(xy, fill=int(255 * grey * min(1, pixels)), width=max(1, round(pixels)))
        return np.multiply(image.reduce(2), 1 / 255, dtype=np.float32)

    def blur(self, layer, radius):
        """Gaussian blur, radius in units of the film's side; wide blurs run on a coarser copy, which costs nothing visible."""
        image, pixels = Image.fromarray((layer * 255 + 0.5).astype(np.uint8)), radius * self.size
        if pixels < 6:
            return np.multiply(image.filter(ImageFilter.GaussianBlur(pixels)), 1 / 255, dtype=np.float32)
        small = image.reduce(4).filter(ImageFilter.GaussianBlur(pixels / 4))
        return np.asarray(Image.fromarray(np.asarray(small, np.float32)).resize(image.size, Image.BICUBIC)) / 255


def cloud(rng, size, *grids):
    """Smooth random field (size, size): per grid, structures of size/grid pixels and unit variance, coarsest grid first."""
    field = Image.new("F", (1, 1))
    for grid in grids:
        coarse = np.asarray(field.resize((grid, grid), Image.BICUBIC))
        field = Image.fromarray(coarse + rng.standard_normal((grid, grid), np.float32))
    return np.asarray(field.resize((size, size), Image.BICUBIC))


# ---------------------------------------------------------------- anatomy: outlines in the patient's frame

def make_patient(rng, enlarged):
    """Shape parameters of one patient, and the findings' sides and places, which stay through all films."""
    u = rng.uniform
    p = dict(width=u(0.34, 0.40), apex=u(0.10, 0.16), base=u(0.68, 0.77), lean=u(-0.012, 0.012), woman=rng.random() < 0.5,
             fat=u(0.03, 0.11), rib_drop=u(0.20, 0.30), rib_gap=u(0.064, 0.074), rib_width=u(0.011, 0.0145), knob=u(0.05, 0.075),
             arms=u(0.0, 0.09), bubble=u(0.2, 1.2), heart=u(0.98, 1.18), clavicle=u(-0.02, 0.02), bone=u(0.75, 1.25), breast=u(0.85, 1.25),
             thick=u(0.9, 1.12), dome=u(0.01, 0.05), angle=u(0.08, 0.13), mass=u(0.02, 0.08), bend=u(-0.012, 0.012), gut=u(0, 8))
    p["heart"] = u(1.38, 1.65) if enlarged else p["heart"]
    p["shape"] = rng.normal(0, 0.006, (64, 2))                   # small wobbles, shared out to the outlines' control points
    p["side"] = {name: int(rng.choice((-1, 1))) for name in FINDINGS}
    p["spot"] = {name: rng.uniform(0, 1, 2).tolist() for name in FINDINGS}
    p["trees"] = int(rng.integers(1 << 31))
    return p


WALL = np.array([(0.0, 0.36), (0.045, 0.58), (0.18, 0.79), (0.4, 0.92), (0.7, 0.99), (0.95, 1.0)])    # depth in the lung → half width


def lung_outline(p, side, breath):
    """Closed outline of one lung; side -1 = the patient's right, on the image's left. breath moves the diaphragm."""
    w, top = p["width"], p["apex"]
    base = p["base"] + breath + (p["dome"] if side > 0 else 0.0)      # the right dome stands higher: the liver is below it
    wobble = p["shape"][:20] if side > 0 else p["shape"][20:40]
    y = lambda f: top + f * (base - top)
    wall = np.array([(0.062, y(0.075))] + [(w * half, y(f)) for f, half in WALL] + [(0.975 * w, base + p["angle"])])
    dome = np.array([wall[-1], (0.86 * w, base + 0.3 * p["angle"]), (0.60 * w, base), (0.34 * w, base + 0.006), (0.05, base + 0.045)])
    middle = np.array([dome[-1], (0.045, y(0.75)), (0.05, y(0.45)), (0.042, y(0.22)), wall[0]])
    wall[2:-1] += wobble[:5] * 0.6
    dome[1:-1] += wobble[5:8] * 0.8
    outline = np.concatenate([spline(wall), spline(dome)[1:], spline(middle)[1:-1]])
    return outline * (side, 1) + (p["lean"], 0)


def heart_outline(p, breath):
    """Closed outline of the heart: right atrium, apex, left ventricle, pulmonary trunk; the apex lies at positive x."""
    points = np.array([(-0.045, 0.33), (-0.058, 0.44), (-0.088, 0.54), (-0.095, 0.62), (-0.075, 0.70), (-0.02, 0.745), (0.08, 0.765),
                       (0.165, 0.755), (0.205, 0.715), (0.2, 0.65), (0.178, 0.565), (0.132, 0.48), (0.085, 0.405), (0.05, 0.33)])
    points[1:-1] += p["shape"][40:52] * 0.7
    bottom = p["base"] + breath + 0.055
    bottom = p["base"] + breath + 0.055
    grow = 1 + (p["heart"] - 1) * np.clip((points[:, :1] * 0 + points[:, 1:] - 0.33) / 0.2, 0, 1)       # the great vessels' end keeps its width
    points = (points - (0, 0.765)) * np.concatenate([grow * p["width"] / 0.37, 0 * grow + (bottom - p["apex"]) / 0.62], 1) + (p["lean"], bottom)
    return spline(np.concatenate([points, points[:1]]))


def mediastinum_outline(p):
    """Closed outline of the great vessels: the superior vena cava on the right, the aortic knob bulging on the left."""
    k, y = p["knob"], p["apex"] + 0.17
    points = np.array([(-0.06, -0.2), (-0.04, 0.1), (-0.045, y), (-0.05, y + 0.12), (-0.04, 0.8), (0.05, 0.8), (0.045, y + 0.2), (0.75 * k, y + 0.08),
                       (0.95 * k, y + 0.04), (k, y), (0.88 * k, y - 0.035), (0.038, y - 0.065), (0.035, 0.1), (0.06, -0.2)])
    points[1:-1] += p["shape"][52:64] * 0.4
    return spline(points) + (p["lean"], 0)


def body_outlines(p):
    """Torso with neck and shoulders (one outline) and the two arms."""
    w, fat, lift = p["width"], p["fat"], p["arms"]
    half = np.array([(0.10, -0.3), (0.105, 0.0), (0.16, 0.055), (0.33, 0.085), (0.47, 0.13), (0.52, 0.25), (w + fat + 0.03, 0.4), (w + fat, 0.55),
                     (w + fat, 0.8), (w + fat + 0.02, 1.3)])
    side = spline(half)
    arm = spline([(0.40, 0.14), (0.5 + lift / 2, 0.15), (0.58 + lift, 0.4), (0.60 + 2 * lift, 0.8), (0.60 + 2 * lift, 1.3), (0.46 + 2 * lift, 1.3), (0.46 + 2 * lift, 0.8),
                  (0.44 + lift, 0.45), (0.40, 0.14)])
    return [np.concatenate([side, side[::-1] * (-1, 1)]), arm, arm * (-1, 1)]


# ---------------------------------------------------------------- layers of attenuation

def ribs(p, sheet):
    """Posterior and anterior ribs, (size, size): each rib is a tilted half ring in space, seen from the front."""
    back, front = [], []
    angle = np.linspace(0.10, 0.84 * np.pi, 40)
    half = np.minimum(angle, np.pi - angle)
    turn = (0.5 * np.sin(half) ** 2 + 0.5 * (1 - np.cos(half))) / 2
    turn = np.where(angle < np.pi / 2, turn, 1 - turn)           # 0 at the spine, 1/2 at the chest wall, 1 at the breastbone
    for i in range(11):
        start = p["apex"] - 0.045 + i * p["rib_gap"] + 0.5 * p["shape"][i, 1]
        drop = p["rib_drop"] * (0.45 + 0.55 * min(1, i / 5))
        reach = p["width"] * np.interp((start + drop / 2 - p["apex"]) / (p["base"] - p["apex"]), *WALL.T) - 0.003
        curve = np.stack([reach * np.sin(angle), start + drop * turn - 0.012 * np.sin(np.minimum(2 * angle, np.pi))], 1)
        slope = np.gradient(curve, axis=0)
        normal = slope[:, ::-1] * (-1, 1) / np.linalg.norm(slope, axis=1, keepdims=True) * p["rib_width"]
        for shapes, part, thick, grey in ((back, slice(0, 24), 1.0, 1.0), (front, slice(19, 30 + 2 * min(i, 4)), 1.15, 0.45))[:2 if i < 8 else 1]:
            edges = np.stack([curve[part] + normal[part] * thick, (curve[part] - normal[part] * thick)[::-1]])
            edges = np.concatenate([edges, edges * (-1, 1)]) + (p["lean"], 0)                        # both sides of the body
            shapes += [("area", edges.reshape(2, -1, 2), 0.55 * grey, 0), ("line", edges, 0.85 * grey, 0.0035)]
    return sheet.draw(*back) + sheet.draw(*front)


def shoulder_bones(p, sheet):
    """Clavicles, shoulder blades and humeral heads, (size, size); and the middle of the right clavicle (2,)."""
    y = p["apex"] + p["clavicle"]
    clavicle = spline([(0.03, y + 0.07), (0.10, y + 0.05), (0.18, y + 0.012), (0.27, y - 0.03), (0.37, y - 0.04)])
    blade = spline([(0.335, y + 0.02), (0.39, y + 0.01), (0.43, y + 0.04), (0.425, y + 0.11), (0.405, y + 0.2), (0.385, y + 0.33), (0.365, y + 0.345), (0.35, y + 0.25),
                    (0.335, y + 0.1), (0.335, y + 0.02)])
    ridge = spline([(0.34, y + 0.055), (0.39, y + 0.03), (0.44, y - 0.02), (0.47, y - 0.03)])
    humerus = spline([(0.44, y + 0.02), (0.48, y - 0.005), (0.52, y + 0.03), (0.53, y + 0.1), (0.56, y + 0.3), (0.62, y + 0.9), (0.56, y + 0.9), (0.50, y + 0.3), (0.46, y + 0.1), (0.44, y + 0.02)])
    both = lambda line: np.stack([line * (side, 1) + (p["lean"], 0) for side in (-1, 1)])
    shapes = [("area", both(blade), 0.12, 0), ("line", both(blade[22:50]), 0.3, 0.006), ("line", both(ridge), 0.4, 0.012), ("area", both(humerus), 0.45, 0),
              ("line", both(humerus), 0.6, 0.005), ("line", both(clavicle), 0.8, 0.024), ("line", both(clavicle), 0.6, 0.016)]
    return sheet.draw(*shapes), clavicle[16] * (-1, 1) + (p["lean"], 0)


def spine(p, sheet):
    """Vertebral column, (size, size): bodies, end plates, pedicles and spinous processes, growing downwards."""
    tops = np.cumsum(0.036 * 1.04 ** np.arange(23)) - 0.2
    box = np.array([(-1, 0.06), (1, 0.06), (0.88, 0.45), (1, 0.84), (-1, 0.84), (-0.88, 0.45), (-1, 0.06)])
    scale = np.stack([0.030 + 0.012 * tops, np.gradient(tops)], 1)[:, None]
    middle = np.stack([p["lean"] + p["bend"] * np.sin(6 * tops), tops], 1)
    put = lambda points: np.asarray(points) * scale + middle[:, None]
    column = np.concatenate([middle - scale[:, 0] * (1, 0), (middle + scale[:, 0] * (1, 0))[::-1]])
    ovals = [put([(s * 0.6, 0.2), (s * 0.6, 0.5)]) for s in (-1, 1)]
    return sheet.draw(("area", column, 0.4, 0), ("area", put(box), 0.6, 0), ("line", put(box), 0.72, 0.004), *[("line", oval, 0.85, 0.011) for oval in ovals],
                      *[("line", oval, 0.65, 0.005) for oval in ovals], ("line", put([(0, 0.4), (0.06, 1.0)]), 0.8, 0.006))


def vessel_tree(p, sheet, hila):
    """Pulmonary vessels branching outwards from the two hila, (size, size)."""
    rng, shapes = np.random.default_rng(p["trees"]), []
    for side, hilum in zip((-1, 1), hila):
        angle = np.array([-1.3, -0.85, -0.3, 0.3, 0.75, 1.05, 1.4]) + rng.normal(0, 0.15, 7)
        start = hilum + np.stack([rng.normal(0, 0.008, 7), 0.03 * np.sin(angle)], 1)
        width, length = rng.uniform(0.009, 0.014, 7), rng.uniform(0.05, 0.1, 7)
        artery = spline(np.array([(-0.02, -0.05), (0.005, -0.02), (0.012, 0.02), (0.02, 0.06), (0.03, 0.11)]) * (side, 1) + hilum)
        shapes += [("line", artery[9:], 0.8, 0.016), ("line", artery[:20], 0.9, 0.024)]
        for level in range(5):
            bends = [angle + rng.normal(0, 0.3, len(angle)) for _ in range(2)] + [angle]
            steps = [length[:, None] / 3 * np.stack([side * np.cos(bend), np.sin(bend)], 1) for bend in bends]
            line = start[:, None] + np.cumsum([0 * start] + steps, 0).transpose(1, 0, 2)
            shapes += [("line", part, 0.95 - 0.13 * level, w) for part, w in zip(np.array_split(line, 3), sorted(width)[::len(width) // 3])]
            split = rng.uniform(0.1, 0.6, (2, len(angle))) * np.array([[1], [-1]])
            angle, start, width = (angle + split).ravel(), np.tile(line[:, -1], (2, 1)), np.tile(width * 0.66, 2)
            length = rng.uniform(0.03, 0.075, len(angle))
    return sheet.draw(*shapes[::-1])


def soft_tissue(p, sheet, breath):
    """Torso, arms, belly and breasts, less the gas in windpipe and gut: attenuation if the lungs held no air, (size, size)."""
    torso, *arms = body_outlines(p)
    body, limbs = sheet.draw(("area", torso, 1, 0)), sheet.draw(("area", arms, 1, 0))
    depth = (np.arange(sheet.size, dtype=np.float32)[:, None] + 0.5) / sheet.size
    skin = np.sqrt(np.clip(2.2 * sheet.blur(np.maximum(body, limbs), 0.035) - 1.05, 0, 1))   # thickness falls to nothing at the skin
    tissue = np.maximum(body * (0.05 + 0.2 * skin + (0.40 + 0.22 * depth) * sheet.blur(body, 0.11)), limbs * (0.08 + 0.28 * skin))
    middle = np.array([p["lean"], p["base"] + breath])
    belly = spline([(-0.6, 1.5), (-0.4, 0.09), (-0.19, 0.0), (0.0, 0.07), (0.2, 0.03), (0.4, 0.11), (0.6, 1.5)]) + middle
    core = np.array([(-0.08, -0.5), (0.08, -0.5), (0.17, 0.1), (-0.12, 0.1)]) + middle
    tissue += 0.22 * body * sheet.blur(sheet.draw(("area", core, 0.35, 0), ("area", belly, 1, 0)), 0.04)
    if p["woman"]:
        oval = ellipse(0.18, 0.20) * p["breast"] + (0.6 * p["width"], p["base"] - 0.01)
        breasts = sheet.draw(("area", oval, 1, 0)) + sheet.draw(("area", oval * (-1, 1), 1, 0))
        tissue += p["mass"] * breasts * np.clip((depth - p["base"] + 0.2) / 0.3, 0, 1)
    return tissue * p["thick"] - 0.15 * sheet.blur(sheet.draw(*gas(p, middle)), 0.005)


def ellipse(across, down):
    """Closed outline (40, 2) around (0, 0) with these half axes."""
    turn = np.linspace(0, 2 * np.pi, 40)
    return np.stack([across * np.cos(turn), down * np.sin(turn)], 1)


def gas(p, middle):
    """Shapes of the air outside the lungs: windpipe and main bronchi, gas bubble of the stomach on its fluid, gut."""
    rng, fork = np.random.default_rng(p["trees"] + 2), p["apex"] + 0.22
    bubble = np.minimum(ellipse(0.075, 0.05), (1, 0.02)) * p["bubble"] + middle + (0.16, 0.10)
    tubes = [([(0, -0.3), (0, 0.1), (-0.01, fork)], 0.5, 0.036), ([(-0.01, fork - 0.01), (-0.035, fork + 0.03), (-0.07, fork + 0.07)], 0.3, 0.022),
             ([(-0.01, fork - 0.01), (0.03, fork + 0.03), (0.075, fork + 0.06)], 0.3, 0.020)]
    shapes = [("line", spline(line) + (p["lean"], 0), grey, width) for line, grey, width in tubes] + [("area", bubble, 1, 0)]
    for _ in range(int(p["gut"])):
        loop = ellipse(*rng.uniform(0.012, 0.04, 2)) + middle + (rng.uniform(-0.1, 0.3), rng.uniform(0.16, 0.3))
        shapes += [("area", loop, rng.uniform(0.2, 0.6), 0)]
    return shapes


def leads(rng, sheet):
    """Cables and electrodes over the chest of a bedside film, (size, size)."""
    shapes = []
    for side in (-1, 1):
        pad = np.array([side * rng.uniform(0.1, 0.3), rng.uniform(0.15, 0.7)])
        cable = spline([pad, pad + rng.normal(0, 0.08, 2), (rng.uniform(-0.2, 0.2), rng.uniform(0.6, 0.9)), (side * 0.5, rng.uniform(0.7, 1.1))])
        shapes += [("line", cable, 0.7, 0.004), ("area", ellipse(0.013, 0.013) + pad, 1, 0)]
    return sheet.draw(*shapes)


# ---------------------------------------------------------------- findings

def coordinates(sheet):
    """Patient-frame x and y of every pixel, two (size, size) arrays: the inverse of Sheet.place."""
    angle, zoom, dx, dy = sheet.pose
    u = (np.arange(sheet.size, dtype=np.float32) + 0.5) / sheet.size
    a, b, cos, sin = (u[None] - 0.5 - dx) / zoom, (u[:, None] - 0.5 - dy) / zoom, float(np.cos(angle)), float(np.sin(angle))
    return a * cos + b * sin, 0.5 - a * sin + b * cos


def step(x, width):
    """Smooth 0 → 1 step around 0 of the given width."""
    return np.clip(x / width + 0.5, 0, 1)


def add_findings(names, p, rng, sheet, lungs, heart, breath):
    """Air that is lost (0..1), extra attenuation, and the share of vessels and lung texture left, each (size, size)."""
    x, y = coordinates(sheet)
    x = x - p["lean"]
    lost, extra, lung_left = np.zeros((3, sheet.size, sheet.size), np.float32)
    lung_left += 1
    amount = dict(zip(FINDINGS, rng.uniform(0.3, 1, len(FINDINGS)).tolist()))     # drawn for all: one finding never moves another
    texture = cloud(np.random.default_rng(p["trees"] + 1), sheet.size, 7, 24) if names else 0
    w, base = p["width"], p["base"] + breath
    for name in names:
        side, size, (along, up) = p["side"][name], amount[name], p["spot"][name]
        out = x * side / w                                               # 0 at the spine, 1 at the chest wall
        if name == "effusion":                                           # fluid with a meniscus that climbs the chest wall
            level = base + 0.07 - 0.15 * size - 0.16 * np.clip(out - 0.4, 0, 1) ** 2 + (0.035 if side > 0 else 0)
            lost = np.maximum(lost, step(y - level, 0.05) * (out > 0))
        elif name == "pneumothorax":                                     # air outside the visceral pleura: no vessels, thin bright line
            edge = 1 - (0.10 + 0.22 * size) * (1.2 - 0.9 * np.clip((y - p["apex"]) / (base - p["apex"]), 0, 1))
            edge = edge * np.sqrt(np.clip((y - p["apex"] - 0.05 * size) / 0.25, 0, 1))
            gone = step(out - edge, 0.006) * (out > 0)
            lung_left = lung_left * (1 - gone)
            extra += 0.07 * np.exp(-((out - edge) / 0.008) ** 2) * (out > 0.1) - 0.05 * gone + 0.02 * (out > 0) * (1 - gone)
        elif name == "nodule":
            centre, radius = nodule_place(p, breath), 0.014 + 0.022 * size
            lump = np.clip(1 - ((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / radius ** 2 * (1 + 0.12 * texture), 0, 1)
            extra += (0.06 + 0.08 * size) * np.sqrt(lump)
        elif name == "consolidation":
            cx, cy = side * w * (0.45 + 0.3 * along), p["apex"] + (0.25 + 0.55 * up) * (base - p["apex"])
            reach = ((x - cx) / (0.06 + 0.07 * size)) ** 2 + ((y - cy) / (0.06 + 0.09 * size)) ** 2
            lost = np.maximum(lost, (0.35 + 0.35 * size) * step(0.7 - reach + 0.7 * texture, 1.8) * step(1.5 - reach, 1.5) * (out > 0))
    return lost, extra, lung_left


def nodule_place(p, breath):
    """Centre (x, y) of the patient's nodule: in the outer half of a lung, clear of the heart, the apex and the dome."""
    side, (along, up) = p["side"]["nodule"], p["spot"]["nodule"]
    base = p["base"] + breath
    y = p["apex"] + (0.25 + 0.5 * up) * (base - p["apex"])
    return np.array([side * p["width"] * (0.58 + 0.22 * along), y])


# ---------------------------------------------------------------- the film

def expose(attenuation, domain, rng, sheet):
    """Attenuation map → grey values 0..1: unsharp mask, tone curve (Hurter-Driffield), blur, noise, collimation."""
    scale = sheet.size / 256
    centre, steep = domain["centre"] + rng.normal(0, 0.06), domain["steep"] * rng.uniform(0.75, 1.2)
    if domain["sharpen"]:
        local = sheet.blur(np.clip(attenuation / 1.6, 0, 1), 0.04) * 1.6
        attenuation = attenuation + domain["sharpen"] * (attenuation - local)
    grey = 1 / (1 + np.exp(-steep * (attenuation - centre)))
    low, high = 1 / (1 + float(np.exp(steep * centre))), 1 / (1 + float(np.exp(-steep * (1.3 - centre))))
    grey = np.clip((grey - low) / (high - low), 0, 1)
    grey = rng.uniform(0.0, 0.08) + rng.uniform(0.80, 0.92) * grey
    grey = sheet.blur(grey, domain["blur"] * rng.uniform(0.7, 1.3) / 256)
    grain = rng.standard_normal(grey.shape, np.float32)
    return grey + domain["noise"] * min(1.0, scale) * rng.uniform(0.5, 1.2) * grain * (0.4 + 0.6 * grey)


def stamp(grey, domain, rng):
    """Collimation border and the burned-in L or R; → film 0..1 and the marker's box (top, left, height, width) or None."""
    size = len(grey)
    if domain["border"] is not None:
        for edge in (grey, grey[::-1], grey.T, grey.T[::-1]):
            depth = int(size * max(0, rng.uniform(-0.04, 0.05)))
            edge[:depth] = domain["border"]
    if rng.random() >= domain["marker"]:
        return grey, None
    letter, tall = rng.choice(("L", "R")), rng.uniform(0.035, 0.06)
    top, left = rng.uniform(0.03, 0.15), (rng.uniform(0.84, 0.9) if letter == "L" else rng.uniform(0.05, 0.12))
    strokes = {"L": [[(0, 0), (0, 1), (0.6, 1)]], "R": [[(0, 1), (0, 0), (0.5, 0.05), (0.6, 0.28), (0.5, 0.5), (0, 0.52)], [(0.25, 0.52), (0.62, 1)]]}
    image = Image.new("L", (2 * size, 2 * size))
    for stroke in strokes[letter]:
        points = (np.array(stroke) * tall + (left, top)) * 2 * size
        ImageDraw.Draw(image).line(points.ravel().tolist(), fill=240, width=max(1, round(0.018 * size)))
    ink = np.asarray(image.reduce(2), np.float32) / 255
    return np.maximum(grey, ink), tuple(round(v * size) for v in (top, left, tall, 0.62 * tall))


def diagnose(rng):
    """Findings of one patient: none in 40 %, else each by chance, at least one → tuple of names."""
    if rng.random() < HEALTHY:
        return ()
    found = ()
    while not found:
        found = tuple(name for name in FINDINGS if rng.random() < SICK_RATE)
    return found


def make_phantom(seed, index, size=256, anomaly=None, findings=None):
    """Film `index` of the phantoms of `seed` → dict, always the same: film uint8 (size, size), labels (5,) of FINDINGS, lungs and
    heart bool (size, size), landmarks (4, 2) of (row, col) in pixels, domain int, marker box or None, patient int. Every other
    patient has two films. anomaly plants wrong anatomy; findings (names) replaces the drawn ones, nothing else changes."""
    if anomaly not in ANOMALIES:
        raise ValueError(f"anomaly {anomaly!r} is unknown; choose one of {ANOMALIES}")
    patient = index * 2 // 3
    names = diagnose(np.random.default_rng((seed, patient, 0))) if findings is None else tuple(findings)
    p = make_patient(np.random.default_rng((seed, patient, 1)), "cardiomegaly" in names)
    rng = np.random.default_rng((seed, index, 2))
    number, breath = int(rng.integers(len(DOMAINS))), rng.uniform(-0.03, 0.02)
    sheet = Sheet(size, (rng.normal(0, 0.03), rng.uniform(0.92, 1.15), rng.normal(0, 0.02), rng.uniform(-0.02, 0.05)))
    attenuation, lungs, heart, points = build(p, names, anomaly, breath, sheet, rng)
    domain = DOMAINS[number]
    if rng.random() < domain["leads"]:
        attenuation += 0.12 * leads(rng, sheet)
    grey, marker = stamp(expose(attenuation, domain, rng, sheet), domain, rng)
    landmarks = sheet.place(points)[:, ::-1] * size - 0.5
    return dict(film=(np.clip(grey, 0, 1) * 255 + 0.5).astype(np.uint8), labels=np.array([int(name in names) for name in FINDINGS]), lungs=lungs, heart=heart,
                landmarks=landmarks, domain=number, marker=marker, patient=patient)


def build(p, names, anomaly, breath, sheet, rng):
    """Add up all tissues → attenuation (size, size), lung and heart masks, landmarks (4, 2) in the patient's frame."""
    mirror = (-1 if anomaly == "mirrored heart" else 1, 1)
    heart_line, chest_line = heart_outline(p, breath) * mirror, mediastinum_outline(p) * mirror
    sides = [lung_outline(p, s, breath) for s in (-1, 1) if not (anomaly == "missing lung" and s == p["side"]["effusion"])]
    lung, heart, chest = (sheet.draw(*[("area", line, 1, 0) for line in lines]) for lines in (sides, [heart_line], [chest_line]))
    hila = np.array([(-0.075, p["apex"] + 0.29), (0.075, p["apex"] + 0.27)]) + (p["lean"], 0)
    round_heart, round_lung = sheet.blur(heart, 0.028), sheet.blur(lung, 0.04)
    solid = np.maximum(np.sqrt(np.clip(2 * round_heart - 0.9, 0, 1)) * heart, 0.9 * chest)
    lost, extra, lung_left = add_findings(names, p, rng, sheet, lung, heart, breath)
    air = lung * (0.35 + 0.65 * round_lung) * (1 - 0.9 * solid) * (1 - lost)
    vessels = vessel_tree(p, sheet, hila) * lung_left * lung * (1 - 0.7 * solid) * (1 - 0.7 * lost)
    bones, clavicle = shoulder_bones(p, sheet)
    body = soft_tissue(p, sheet, breath)
    sharp = (1 - 0.5 * solid) * (0.35 + 0.65 * round_lung)                # behind heart and liver scatter hides detail
    attenuation = (body * (1 + 0.03 * cloud(rng, sheet.size, 5)) - 0.40 * air + 0.10 * round_heart + 0.03 * chest
                   + p["bone"] * (0.075 * sharp * ribs(p, sheet) + 0.14 * bones + 0.08 * spine(p, sheet)) * np.clip(4 * body - 0.2, 0, 1)
                   + 0.07 * vessels + extra * lung + 0.01 * air * lung_left * cloud(rng, sheet.size, 24, 64))
    knob = np.array([0.55 * p["knob"], p["apex"] + 0.17]) * mirror + (p["lean"], 0)
    ventricle = 0.75 * heart_line[np.argmax(heart_line[:, 0] * mirror[0])] + 0.25 * heart_line.mean(0)
    return attenuation, (lung * (1 - np.maximum(heart, chest))) > 0.5, heart > 0.5, np.stack([knob, hila[0], ventricle, clavicle])


# ---------------------------------------------------------------- files

def split_of(seed, patient):
    """train, val or test (70 / 10 / 20 %), fixed by the patient."""
    draw = np.random.default_rng((seed, patient, 3)).random()
    return "train" if draw < 0.7 else "val" if draw < 0.8 else "test"


def save_png(path, array):
    """Write an 8-bit image so that a reader never sees half a file."""
    part = path.with_name(path.name + f".{os.getpid()}.part")
    Image.fromarray(array).save(part, format="PNG")
    os.replace(part, path)


def write_one(folder, size, seed, index):
    """Make film `index`, write film and lung mask → its row of phantoms.csv (dict)."""
    item, name = make_phantom(seed, index, size), f"phantom_{index:06d}.png"
    save_png(folder / "films" / name, item["film"])
    save_png(folder / "masks" / name, item["lungs"].astype(np.uint8) * 255)
    save_png(folder / "hearts" / name, item["heart"].astype(np.uint8) * 255)
    label = "|".join(f for f, here in zip(FINDINGS, item["labels"]) if here) or "normal"
    row = dict(filename=name, label=label, patient_id=f"p{item['patient']:06d}", split=split_of(seed, item["patient"]), mask=f"masks/{name}", heart=f"hearts/{name}")
    for landmark, (r, c) in zip(LANDMARKS, item["landmarks"]):
        row[f"{landmark}_row"], row[f"{landmark}_col"] = f"{r:.2f}", f"{c:.2f}"
    return row | dict(domain=item["domain"], marker="" if item["marker"] is None else "|".join(map(str, item["marker"])))


def write_phantoms(folder, count, size=256, seed=0, workers=1):
    """Write films/, masks/ (lungs), hearts/ and, last, phantoms.csv (split by patient) → path of the CSV. Same files for any workers."""
    folder = Path(folder)
    for part in ("films", "masks", "hearts"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    make = partial(write_one, folder, size, seed)
    if workers > 1:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            rows = list(tqdm(pool.imap(make, range(count), chunksize=16), total=count, desc="phantoms", unit="film"))
    else:
        rows = [make(i) for i in tqdm(range(count), desc="phantoms", unit="film")]
    part = folder / f"phantoms.csv.{os.getpid()}.part"
    with open(part, "w", newline="") as file:
        table = csv.DictWriter(file, rows[0].keys())
        table.writeheader()
        table.writerows(rows)
    os.replace(part, folder / "phantoms.csv")
    return folder / "phantoms.csv"


def main():
    """Command line: write a folder of phantoms."""
    parser = argparse.ArgumentParser(description="Write synthetic chest radiographs with ground truth (films/, masks/, hearts/, phantoms.csv).")
    parser.add_argument("--out", default="phantoms", help="folder to write; point --data of the other scripts at its films/ (default: phantoms)")
    parser.add_argument("--count", type=int, default=2000, help="number of films; two films in three share a patient with another (default: 2000)")
    parser.add_argument("--size", type=int, default=256, help="side of a film in pixels, 64 to 512 (default: 256)")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another population of patients (default: 0)")
    parser.add_argument("--workers", type=int, default=1, help="processes; the files do not depend on it (default: 1)")
    args = parser.parse_args()
    if not 64 <= args.size <= 512 or args.count < 1 or args.workers < 1 or args.seed < 0:
        parser.error("--size must be 64 to 512, --count and --workers at least 1, --seed at least 0")
    print("wrote", write_phantoms(args.out, args.count, args.size, args.seed, args.workers))


if __name__ == "__main__":
    main()
