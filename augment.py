"""Two crops of a film, their relative coordinates, and the domain transitions T_a. (Sec. 4.2, 4.3, B.1)

Sampling and applying are apart: sample_* draw parameters from a generator, everything else is a pure function of
(images, parameters). Boxes are (top, left, height, width) in pixels of the unflipped film; a flip mirrors the crop.
Images on the device are float in [0, 1], (B, 1, H, W); every tone step clips back into [0, 1], as 8-bit images do.
"""

import math

import numpy as np
import torch
from PIL import Image

IDENTITY = (
    1.0,
    1.0,
    1.0,
    0.0,
)  # the action that changes nothing: brightness, contrast, gamma, blur sigma


BLUR_MAX = 2.0  # px (Sec. B.1)


# ------------------------------------------------------------------------------------------------ crops, on the CPU
def sample_boxes(rng, height, width, scale=(0.3, 1.0), ratio=(3 / 4, 4 / 3)):
    """Two boxes of the same size, placed independently, and two independent flips. (Sec. B.1)

    rng: NumPy generator. height, width: the film's, px. → boxes (2, 4) float64, flips (2,) bool.
    Box 1 is tried ten times (area fraction uniform, aspect log-uniform); a film too narrow for all ten gives the largest box it holds.
    """
    u = rng.random(26)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[:10])
    aspect = np.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * u[10:20])
    w, h = np.sqrt(area * aspect), np.sqrt(area / aspect)
    fits = (w <= width) & (h <= height)
    k = int(fits.argmax())
    if fits[k]:
        h, w = h[k], w[k]
    else:
        h, w = min(height, width / ratio[0]), min(width, height * ratio[1])
    place = u[20:24].reshape(2, 2) * (height - h, width - w)
    return np.concatenate([place, np.broadcast_to((h, w), (2, 2))], axis=1), u[24:26] < 0.5


def crop(film, box, size, flip=False):
    """Cut `box` out of a film and resize it to (size, size): bicubic, antialiased, fractional edges. uint8 (H, W) → uint8 (size, size)."""
    top, left, height, width = (float(v) for v in box)
    right, bottom = (
        min(left + width, film.shape[1]),
        min(top + height, film.shape[0]),
    )  # float rounding may overshoot by 1e-13
    out = np.asarray(
        Image.fromarray(film).resize(
            (size, size), Image.Resampling.BICUBIC, box=(left, top, right, bottom)
        )
    )
    return out[:, ::-1] if flip else out


def to_float(views):
    """uint8 (..., H, W) from the loader → float32 in [0, 1]."""
    return views.float() / 255


# ------------------------------------------------------------------------------------------------ crops of fine-tuning
def train_crop(film, rng, size):
    """A random part of a film for training: area fraction 0.4 to 1, then a flip. uint8 (H, W) → uint8 (size, size)"""
    boxes, flips = sample_boxes(rng, *film.shape, scale=(0.4, 1.0))
    return crop(film, boxes[0], size, flips[0])


def whole_crop(film, size):
    """The whole film squeezed to a square. uint8 (H, W) → uint8 (size, size)"""
    return crop(film, (0, 0, *film.shape), size)


def mask_to(mask, size):
    """A mask squeezed to a square as whole_crop squeezes its film, nearest pixel. bool (H, W) → bool (size, size)"""
    image = Image.fromarray(np.asarray(mask, np.uint8))
    return np.asarray(image.resize((size, size), Image.Resampling.NEAREST), bool)


def centre_crops(film, size, ten=False):
    """The square in the middle of a film; ten: also those in its four corners, and all five flipped.

    uint8 (H, W), no side below `size` → uint8 (1 or 10, size, size)
    """
    down = film.shape[0] - size
    right = film.shape[1] - size
    corners = [(down // 2, right // 2)]
    if ten:
        corners += [(0, 0), (0, right), (down, 0), (down, right)]
    crops = np.stack([film[top : top + size, left : left + size] for top, left in corners])
    return np.concatenate([crops, crops[..., ::-1]]) if ten else crops


def shift_scale_flip(film, mask, rng):
    """Move a film and its mask together: shift by up to a sixteenth and scale by up to a tenth (p = 0.5), flip (p = 0.5).

    film uint8, mask bool, both (size, size) → the same; black comes in from outside.
    """
    size = len(film)
    u = rng.random(5)
    if u[0] < 0.5:
        zoom = 1 + 0.2 * (u[1] - 0.5)
        shift = (u[2:4] - 0.5) * size / 8  # (down, right), px
        top, left = (
            size / 2 - size / (2 * zoom) - shift
        )  # output pixel p shows p / zoom + (top, left)
        matrix = (1 / zoom, 0, left, 0, 1 / zoom, top)
        film = warp(film, matrix, Image.Resampling.BICUBIC)
        mask = warp(mask.astype(np.uint8), matrix, Image.Resampling.NEAREST).astype(bool)
    return (film[:, ::-1], mask[:, ::-1]) if u[4] < 0.5 else (film, mask)


def warp(pixels, matrix, resampling):
    """Pillow's affine transform of a uint8 (size, size) picture: output (x, y) shows input (ax + by + c, dx + ey + f)."""
    image = Image.fromarray(pixels)
    return np.asarray(image.transform(image.size, Image.Transform.AFFINE, matrix, resampling))


# ------------------------------------------------------------------------------------------------ geometry
def grid_coords(grid, device=None):
    """(row, col) of the n × n patches in raster order, patch units: (0, 0) is the centre of the top-left patch. → (N, 2)"""
    axis = torch.arange(grid, dtype=torch.float32, device=device)
    return torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)


def relative_coords(context_box, target_box, grid, context_flip=None, target_flip=None):
    """Where the target's patches lie in the context's patch grid: φ of Eq. (4, 5), flips included. Boxes (B, 4), flips (B,) → (B, N, 2).

    Without flips and with equal sizes this is n·Δ + (u, v). With flips, the patch centre is first mapped to film pixels.
    """
    context_box, target_box = context_box[:, None].float(), target_box[:, None].float()  # (B, 1, 4)
    at = (grid_coords(grid, context_box.device) + 0.5) / grid  # (N, 2) fractions of the target crop
    at = mirror(at.expand(len(target_box), -1, -1), target_flip)
    pixel = target_box[..., :2] + at * target_box[..., 2:]  # (B, N, 2) film pixels
    inside = mirror(
        (pixel - context_box[..., :2]) / context_box[..., 2:], context_flip
    )  # fractions of the context crop
    return inside * grid - 0.5


def mirror(fractions, flip):
    """Mirror the column fraction of the flipped items. (B, N, 2), (B,) bool or None → (B, N, 2)"""
    if flip is None:
        return fractions
    row, col = fractions.unbind(-1)
    return torch.stack([row, torch.where(flip[:, None], 1 - col, col)], -1)


# ------------------------------------------------------------------------------------------------ tone, on the device
def sample_jitter(batch, generator, p=0.8, span=(0.6, 1.4)):
    """Brightness and contrast of the target, one pair a film, shared by both views; (1, 1) with probability 1 - p. → (B, 2)"""
    u = torch.rand(batch, 3, generator=generator)
    factors = span[0] + (span[1] - span[0]) * u[:, :2]
    return torch.where(u[:, 2:] < p, factors, torch.ones(2))


def sample_actions(batch, generator, p_tone=0.8, p_blur=0.2):
    """Actions a ∈ R⁴ = (brightness, contrast, gamma, blur sigma in px), Sec. B.1; parts that are not applied are the identity. → (B, 4)"""
    u = torch.rand(batch, 6, generator=generator)
    tone = torch.stack(
        [0.6 + 0.8 * u[:, 0], 0.6 + 0.8 * u[:, 1], 0.5 * 4.0 ** u[:, 2]], 1
    )  # gamma log-uniform in (0.5, 2)
    blur = 0.05 + (BLUR_MAX - 0.05) * u[:, 3:4]
    return torch.cat(
        [
            torch.where(u[:, 4:5] < p_tone, tone, torch.ones(3)),
            torch.where(u[:, 5:6] < p_blur, blur, torch.zeros(1)),
        ],
        1,
    )


def tone(images, brightness, contrast):
    """Scale the grey values, then stretch them about their mean; both clip. images (B, ...), factors (B,)."""
    shape = (-1,) + (1,) * (images.dim() - 1)
    images = (images * brightness.view(shape)).clamp(0, 1)
    mean = images.mean(dim=tuple(range(1, images.dim())), keepdim=True)
    return (images * contrast.view(shape) + mean * (1 - contrast.view(shape))).clamp(
        0, 1
    )  # factors of 1 change no bit


def apply_jitter(views, jitter):
    """The same jitter on both views of a film, stretched about the pair's common mean: else x₁ → y₂ is not predictable. (B, 2, H, W), (B, 2)"""
    return tone(views, jitter[:, 0], jitter[:, 1])


def apply_action(images, action):
    """T_a (Eq. 9): brightness, contrast, gamma, then Gaussian blur. images (B, 1, H, W), action (B, 4) → (B, 1, H, W)"""
    brightness, contrast, gamma, sigma = action.unbind(1)
    toned = tone(images, brightness, contrast) ** gamma.view(-1, 1, 1, 1)
    return torch.where(sigma.view(-1, 1, 1, 1) > 0, blur(toned, sigma), toned)


def blur(images, sigma):
    """Gaussian blur with one sigma (px) an image, as two products with banded matrices; rows renormalised at the border. (B, 1, H, W), (B,)"""
    height, width = images.shape[-2:]
    rows = gaussian_matrix(height, sigma)
    cols = rows if width == height else gaussian_matrix(width, sigma)
    return (rows @ images[:, 0] @ cols.mT)[:, None]


def gaussian_matrix(size, sigma):
    """(B, size, size): row i holds the weights that blur pixel i, cut at the radius of 3 × the largest sigma."""
    at = torch.arange(size, device=sigma.device, dtype=torch.float32)
    distance = (at[:, None] - at[None]).square()
    weight = torch.exp(-distance / (2 * sigma.clamp(min=0.05).square().view(-1, 1, 1)))
    weight = weight * (distance <= (3 * BLUR_MAX) ** 2)
    return weight / weight.sum(-1, keepdim=True)
