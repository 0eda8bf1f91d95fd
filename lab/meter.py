"""Bytes of a training step, counted: only until pretrain.py has a plain --micro."""

from types import SimpleNamespace

import torch

from model import SIZES, CheXWorld

KEPT = {"float32": 64, "bfloat16": 44}


def count_parameters(config):
    """Numbers that are trained, and numbers in one encoder."""
    with torch.device("meta"):
        world = CheXWorld(config.image, config.patch, **SIZES[config.size])
    return sum(p.numel() for p in world.parameters() if p.requires_grad), sum(
        p.numel() for p in world.encoder.parameters()
    )


def passes(config, tasks="local,global,domain", unified=True):
    """Tokens of a view in each forward pass that is trained: ([of the context encoder], [of the predictor])."""
    N, K, M = (config.image // config.patch) ** 2, config.visible, config.masked
    asked = {"local": (K, K + M), "global": (N, N + config.targets), "domain": (N, 2 * N)}
    tasks = set(tasks.split(","))
    if not unified:
        return [asked[t][0] for t in tasks], [asked[t][1] for t in tasks]
    K = K if "local" in tasks else N  # nothing is hidden without the local task
    return [K], [K + M] * ("local" in tasks) + [K + config.targets] * ("global" in tasks) or [2 * N]


def count_memory(config, checkpointing=False, tokens=None):
    """Bytes at the peak of a step → (weights, moments, gradients, moving average; what is kept for the backward pass). tokens: of `passes`."""
    s, V, kept = SIZES[config.size], 2 * config.batch, KEPT[config.precision]
    trained, encoder = count_parameters(config)
    seen, asked = tokens or passes(config)
    stacks = [(L, s["dim"], s["depth"]) for L in seen] + [
        (L, s["predictor_dim"], s["predictor_depth"]) for L in asked
    ]
    if checkpointing:  # each block's input, and all of one block
        activations = sum(4 * L * D * depth for L, D, depth in stacks) + max(
            kept * L * D for L, D, _ in stacks
        )
    else:
        activations = sum(kept * L * D * depth for L, D, depth in stacks)
    return 16 * trained + 4 * encoder + (
        2 * trained if config.precision == "bfloat16" else 0
    ), V * activations


def fitting(config, memory, checkpointing=False, tokens=None):
    """Films in one forward pass whose counted memory fills at most 70 % of a GPU with so many bytes (the count is a sixth too low, with
    checkpointing nearly a half: then 50 %). config.batch does not count."""
    fixed, film = count_memory(
        SimpleNamespace(**{**vars(config), "batch": 1}), checkpointing, tokens
    )
    return max(1, int(((0.5 if checkpointing else 0.7) * memory - fixed) / film))
