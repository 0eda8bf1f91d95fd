"""Small world models with random weights, and batches for them, for the tests of the losses."""

import numpy as np
import plain
import torch

TINY = dict(
    image=32,
    patch=8,
    dim=32,
    depth=2,
    heads=4,
    predictor_dim=24,
    predictor_depth=2,
    predictor_heads=2,
)


def shaken(module, seed=0):
    """Every parameter random, biases and norms too, so that none can be left out unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and "weight" in name:
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(0.3 * noise)
            else:
                fan_in = parameter[0].numel()
                parameter.copy_(noise * fan_in**-0.5)
    return module


def make_batch(films=3, n=4, side=32, seed=0, asked=None):
    """Both views of some films: images, masks, coordinates and actions.

    keep and masked are disjoint, coordinates fractional; the first action is the identity.
    asked: of how many patches of the other view each view is asked; None: of all.
    """
    rng = np.random.default_rng(seed)
    orders = np.stack([rng.permutation(n * n) for _ in range(2 * films)])
    action = rng.uniform((0.6, 0.6, 0.5, 0), (1.4, 1.4, 2, 2), (2 * films, 4))
    action[0] = (1, 1, 1, 0)
    coords = plain.grid(n) + rng.uniform(-2, 2, (2 * films, 1, 2))
    y, x = rng.random((2, 2 * films, 1, side, side))
    batch = dict(y=y, x=x, keep=orders[:, :6], masked=orders[:, 9:], coords=coords, action=action)
    if asked:
        batch["asked"] = np.stack([rng.permutation(n * n)[:asked] for _ in range(2 * films)])
    return batch


def tensors(batch, dtype=torch.float32):
    """The same batch as tensors: numbers of one precision, indices as they are."""
    converted = {}
    for name, array in batch.items():
        tensor = torch.from_numpy(array)
        converted[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return converted
