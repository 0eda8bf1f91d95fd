"""Two crops of a film, what happens to them, and where they lie in each other. (Sec. 4.2, 4.3, B.1)

    1. sample_boxes, crop    Two boxes of one size are cut out of a film and resized: views 1 and 2.
    2. apply_jitter          Brightness and contrast change, alike in both: the targets y₁ and y₂.
    3. apply_action          T_a changes each by its own action a: x₁ and x₂, for the contexts.
    4. relative_coords       φ tells where the patches of one view lie in the grid of the other.
    5. train_crop, …         What fine-tuning does instead.

The jitter shows the model every film in many exposures. Both views share it: if y₂ had a jitter of
its own, view 1 could not know it. The model is told T_a's action, and must undo it: it predicts the
view without T_a, so T_a is never applied to a target.

In parts 1 to 4, functions sample_* draw the random parameters; the others draw nothing.
Boxes are (top, left, height, width) in pixels of the film; a flip mirrors the view left to right.
Images on the device are float in [0, 1], (B, 1, H, W); every tone step clips to that range.
"""

import math

import numpy as np
import torch
from PIL import Image

from model import grid_coords

IDENTITY = (1.0, 1.0, 1.0, 0.0)  # the action that changes nothing
BLUR_MAX = 2.0  # the largest sigma, px (Sec. B.1)


# ---- 1. Crops, on the CPU


def sample_boxes(rng, height, width, scale=(0.3, 1.0), ratio=(3 / 4, 4 / 3)):
    """Draw two boxes of the same size in a film of height × width px, and two flips. (Sec. B.1)

    rng: NumPy generator. scale: range of the area as a fraction of the film's, uniform.
    ratio: range of width / height, log-uniform. Both boxes have the same size (as in the paper):
    the first of ten drawn sizes that fits the film, or, if none does, the largest box of an allowed
    ratio. → boxes (2, 4) float64, flips (2,) bool
    """
    area = height * width * (scale[0] + (scale[1] - scale[0]) * rng.random(10))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    width_by_height = np.exp(low + (high - low) * rng.random(10))
    box_width = np.sqrt(area * width_by_height)
    box_height = np.sqrt(area / width_by_height)
    fits = (box_width <= width) & (box_height <= height)
    if fits.any():
        first = fits.argmax()
        box_size = (box_height[first], box_width[first])
    else:
        # The largest box of an allowed ratio: as wide as the film, it is at most width / ratio[0]
        # high; as high as the film, it is at most height · ratio[1] wide.
        box_size = (min(height, width / ratio[0]), min(width, height * ratio[1]))
    room = np.array([height - box_size[0], width - box_size[1]])
    corners = rng.random((2, 2)) * room  # top and left of both boxes
    flips = rng.random(2) < 0.5
    return np.concatenate([corners, [box_size, box_size]], axis=1), flips


def crop(film, box, size, flip=False):
    """Cut a box out of a film and resize it to size × size px: bicubic, antialiased.

    film uint8 (H, W), box (4,) with fractional edges → uint8 (size, size)
    """
    top, left, height, width = (float(v) for v in box)
    right = min(left + width, film.shape[1])  # float rounding may overshoot the film by 1e-13
    bottom = min(top + height, film.shape[0])
    image = Image.fromarray(film).resize(
        (size, size), Image.Resampling.BICUBIC, box=(left, top, right, bottom)
    )
    view = np.asarray(image)
    return view[:, ::-1] if flip else view


def to_float(views):
    """Turn grey values 0 to 255 into 0 to 1. uint8 → float32, any shape"""
    return views.float() / 255


# ---- 2. and 3. Jitter and T_a: drawn on the CPU, applied on the device


def sample_jitter(batch, generator, p=0.8, span=(0.6, 1.4)):
    """Draw each film's brightness and contrast; (1, 1) with probability 1 - p. → (B, 2)"""
    u = torch.rand(batch, 3, generator=generator)
    factors = span[0] + (span[1] - span[0]) * u[:, :2]
    is_applied = u[:, 2:] < p
    return torch.where(is_applied, factors, torch.ones(2))


def sample_actions(batch, generator, p_tone=0.8, p_blur=0.2):
    """Draw actions a = (brightness, contrast, gamma, blur sigma in px). (Sec. B.1) → (B, 4)

    The three tone factors are applied together with probability p_tone; blur is applied with
    probability p_blur. What is not applied takes its value from IDENTITY.
    """
    u = torch.rand(batch, 6, generator=generator)
    scaled = scale_to_ranges(u[:, :4])
    tones = torch.where(u[:, 4:5] < p_tone, scaled[:, :3], torch.ones(3))
    sigma = torch.where(u[:, 5:6] < p_blur, scaled[:, 3:], torch.zeros(1))
    return torch.cat([tones, sigma], 1)


def scale_to_ranges(u):
    """Scale uniform numbers to the four ranges of an action. (B, 4) → (B, 4)"""
    brightness = 0.6 + 0.8 * u[:, 0]  # uniform in (0.6, 1.4)
    contrast = 0.6 + 0.8 * u[:, 1]
    gamma = 0.5 * 4.0 ** u[:, 2]  # log-uniform in (0.5, 2)
    sigma = 0.05 + (BLUR_MAX - 0.05) * u[:, 3]
    return torch.stack([brightness, contrast, gamma, sigma], 1)


def apply_jitter(views, jitter):
    """Change brightness and contrast of a film's two views alike. (B, 2, H, W), jitter (B, 2)

    The contrast is stretched about the mean of both views together.
    """
    return change_tone(views, jitter[:, 0], jitter[:, 1])


def apply_action(images, action):
    """Apply T_a (Eq. 9): brightness, contrast, gamma, then blur. (B, 1, H, W), action (B, 4)"""
    brightness, contrast, gamma, sigma = action.unbind(1)
    toned = change_tone(images, brightness, contrast) ** gamma.view(-1, 1, 1, 1)
    # Blur all images, and use the result where sigma > 0: choosing them first would make the CPU
    # wait for the GPU.
    is_blurred = sigma.view(-1, 1, 1, 1) > 0
    return torch.where(is_blurred, blur(toned, sigma), toned)


def change_tone(images, brightness, contrast):
    """Scale the grey values, then stretch them about the mean of each entry of the batch.

    images (B, ...), brightness (B,), contrast (B,) → (B, ...), bit-identical for factors of 1
    """
    shape = [-1] + [1] * (images.dim() - 1)
    brightness = brightness.view(shape)
    contrast = contrast.view(shape)
    images = (images * brightness).clamp(0, 1)
    mean = images.mean(dim=tuple(range(1, images.dim())), keepdim=True)
    return (images * contrast + mean * (1 - contrast)).clamp(0, 1)


def blur(images, sigma):
    """Blur each image by its own Gaussian, in two matrix products. (B, 1, H, W), sigma (B,) px"""
    height, width = images.shape[-2:]
    rows = gaussian_matrix(height, sigma)  # (B, H, H)
    cols = rows if width == height else gaussian_matrix(width, sigma)
    return (rows @ images[:, 0] @ cols.mT)[:, None]


def gaussian_matrix(size, sigma):
    """Make matrices whose row i holds the weights that blur pixel i; each row sums to 1.

    Weights are cut off at 3 × BLUR_MAX for every sigma. A sigma of 0 is raised to avoid dividing by
    zero; its result is not used. sigma (B,) px → (B, size, size)
    """
    pixel = torch.arange(size, device=sigma.device, dtype=torch.float32)
    squared = (pixel[:, None] - pixel[None]).square()
    weight = torch.exp(-squared / (2 * sigma.clamp(min=0.05).square().view(-1, 1, 1)))
    weight = weight * (squared <= (3 * BLUR_MAX) ** 2)
    return weight / weight.sum(-1, keepdim=True)


# ---- 4. Where one view lies in the other


def relative_coords(context_box, target_box, grid, context_flip=None, target_flip=None):
    """Follow each patch centre from the target view to the film, and on into the context view.

    This is φ of Eq. (4, 5). Without flips it equals (u, v) + n·Δ: (u, v) is the row and column of a
    patch, Δ the shift from the context's corner to the target's in fractions of the box size.
    Boxes (B, 4) px of the film, flips (B,) bool → (B, N, 2) (row, col) in patches of the context.
    """
    context_box = context_box[:, None].float()  # (B, 1, 4)
    target_box = target_box[:, None].float()
    centres = (grid_coords(grid, context_box.device) + 0.5) / grid  # (N, 2): fractions of a view
    in_target = mirror(centres.expand(len(target_box), -1, -1), target_flip)  # (B, N, 2)
    on_film = target_box[..., :2] + in_target * target_box[..., 2:]  # px
    in_context = mirror((on_film - context_box[..., :2]) / context_box[..., 2:], context_flip)
    return in_context * grid - 0.5  # (0, 0) is the centre of the first patch, as in model.py


def mirror(fractions, flip):
    """Mirror the column fractions of flipped views. (B, N, 2), flip (B,) bool or None"""
    if flip is None:
        return fractions
    row, col = fractions.unbind(-1)
    return torch.stack([row, torch.where(flip[:, None], 1 - col, col)], -1)


# ---- 5. Crops and jitter of fine-tuning (Sec. B.3)


def train_crop(film, rng, size):
    """Cut a random part out of a film, 40 to 100 % of its area, flipped or not. → (size, size)"""
    # Pre-training's draw; the second box is not used.
    boxes, flips = sample_boxes(rng, *film.shape, scale=(0.4, 1.0))
    return crop(film, boxes[0], size, flips[0])


def whole_crop(film, size):
    """Squeeze the whole film to a square. uint8 (H, W) → uint8 (size, size)"""
    return crop(film, (0, 0, *film.shape), size)


def squeeze_mask(mask, size):
    """Squeeze a mask as whole_crop squeezes its film, nearest pixel. bool (H, W) → (size, size)"""
    image = Image.fromarray(np.asarray(mask, np.uint8))
    return np.asarray(image.resize((size, size), Image.Resampling.NEAREST), bool)


def centre_crops(film, size, ten=False):
    """Cut the square out of the middle of a film whose sides are `size` px or more.

    ten: also the squares in the four corners, and all five flipped.
    uint8 (H, W) → uint8 (1 or 10, size, size)
    """
    max_top = film.shape[0] - size
    max_left = film.shape[1] - size
    corners = [(max_top // 2, max_left // 2)]
    if ten:
        corners += [(0, 0), (0, max_left), (max_top, 0), (max_top, max_left)]
    crops = np.stack([film[top : top + size, left : left + size] for top, left in corners])
    return np.concatenate([crops, crops[..., ::-1]]) if ten else crops


def jitter_for_segmentation(images, brightness, contrast):
    """Scale the grey values by `contrast` and add brightness - 1, where change_tone multiplies.

    images (B, H, W), brightness (B,), contrast (B,) → (B, H, W)
    """
    brightness = brightness.view(-1, 1, 1)
    return (images * contrast.view(-1, 1, 1) + brightness - 1).clamp(0, 1)


def shift_scale_turn_flip(film, mask, rng):
    """Move a film and its mask together; black comes in from outside.

    With probability ½ both are shifted by up to 1/16 of the side, scaled by up to 10 % and turned
    by up to 10°; with probability ½ both are flipped. film uint8, mask bool: (size, size) → same
    """
    side = len(film)
    centre = side / 2
    u_move, u_zoom, u_down, u_right, u_flip, u_turn = rng.random(6)  # uniform numbers
    if u_move < 0.5:
        zoom = 1 + 0.2 * (u_zoom - 0.5)
        down = (u_down - 0.5) * side / 8  # px of the input
        right = (u_right - 0.5) * side / 8
        angle = math.radians(20 * (u_turn - 0.5))
        # Pillow asks, for each output pixel p, which input pixel to show; so this is the inverse
        # motion: R (p - centre) / zoom + centre - shift.
        cos = math.cos(angle) / zoom
        sin = math.sin(angle) / zoom
        x_offset = centre - right - (cos + sin) * centre
        y_offset = centre - down - (cos - sin) * centre
        matrix = (cos, sin, x_offset, -sin, cos, y_offset)
        film = warp(film, matrix, Image.Resampling.BICUBIC)
        mask = warp(mask.astype(np.uint8), matrix, Image.Resampling.NEAREST).astype(bool)
    if u_flip < 0.5:
        film = film[:, ::-1]
        mask = mask[:, ::-1]
    return film, mask


def warp(pixels, matrix, resampling):
    """Warp so that matrix (a, …, f) maps output (x, y) to input (a x + b y + c, d x + e y + f)."""
    image = Image.fromarray(pixels)
    return np.asarray(image.transform(image.size, Image.Transform.AFFINE, matrix, resampling))
