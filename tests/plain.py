"""The networks and losses a second time, as slow plain equations in float64 NumPy: what test_model.py and test_weights.py compare with.

Nothing is imported from the program; weights come as a dict of float64 arrays under timm's names.
"""

import numpy as np
from scipy.special import erf


def arrays(module_or_state):
    """State dict (or module) → dict of float64 arrays."""
    state = module_or_state if isinstance(module_or_state, dict) else module_or_state.state_dict()
    return {k: v.detach().double().numpy() for k, v in state.items()}


def sub(state, prefix):
    return {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}


def mae_table(n, dim):
    """MAE's get_2d_sincos_pos_embed in words: column half first, each half sines then cosines. → (n², dim)"""
    table = np.zeros((n * n, dim))
    for row in range(n):
        for col in range(n):
            table[row * n + col] = np.concatenate(
                [sincos_1d(col, dim // 2), sincos_1d(row, dim // 2)]
            )
    return table


def sincos_1d(position, width):
    """Sines then cosines of one coordinate at width / 2 frequencies from 1 down towards 1 / 10000. → (width,)"""
    values = [position / 10000 ** (k / (width / 2)) for k in range(width // 2)]
    return np.array([np.sin(v) for v in values] + [np.cos(v) for v in values])


def positions(coords, dim):
    """(L, 2) row, col → (L, dim), column half first."""
    return np.stack(
        [np.concatenate([sincos_1d(c, dim // 2), sincos_1d(r, dim // 2)]) for r, c in coords]
    )


def grid(n):
    return np.array([(r, c) for r in range(n) for c in range(n)], float)


def linear(x, state, name):
    return x @ state[name + ".weight"].T + state[name + ".bias"]


def layer_norm(x, state=None, name=None, eps=1e-6):
    mean = x.mean(-1, keepdims=True)
    x = (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + eps)
    return x if state is None else x * state[name + ".weight"] + state[name + ".bias"]


def attention(x, state, name, heads):
    """One sequence (L, D), one head after another."""
    width = x.shape[1] // heads
    q, k, v = np.split(linear(x, state, name + ".qkv"), 3, axis=1)
    out = []
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        scores = q[:, part] @ k[:, part].T / np.sqrt(width)
        scores = np.exp(scores - scores.max(1, keepdims=True))
        out.append(scores / scores.sum(1, keepdims=True) @ v[:, part])
    return linear(np.concatenate(out, 1), state, name + ".proj")


def block(x, state, name, heads):
    """Pre-norm transformer block with exact GELU."""
    x = x + attention(layer_norm(x, state, name + ".norm1"), state, name + ".attn", heads)
    hidden = linear(layer_norm(x, state, name + ".norm2"), state, name + ".mlp.fc1")
    return x + linear(hidden * 0.5 * (1 + erf(hidden / np.sqrt(2))), state, name + ".mlp.fc2")


def depth_of(state, name):
    return 1 + max(int(k.split(".")[1]) for k in state if k.startswith(name + "."))


def embed_patches(channels, state):
    """Image (C, H, W), normalised → one token per patch in raster order (N, D), by dot products with the kernel."""
    kernel, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    p, n = kernel.shape[-1], channels.shape[-1] // kernel.shape[-1]
    return np.stack(
        [
            np.tensordot(kernel, channels[:, r * p : (r + 1) * p, c * p : (c + 1) * p], 3) + bias
            for r in range(n)
            for c in range(n)
        ]
    )


def vit(channels, state, heads, keep=None):
    """ViT of one normalised image (C, H, W): embed every patch, add its position, forget the hidden ones, blocks, norm. → (K|N, D)"""
    x = embed_patches(channels, state) + state["pos_embed"][0]
    x = x if keep is None else x[keep]
    for i in range(depth_of(state, "blocks")):
        x = block(x, state, f"blocks.{i}", heads)
    return layer_norm(x, state, "norm")


def policy(tokens, code, state, name):
    """Eq. (8): three linear layers, ReLU between, of each token beside the action."""
    x = np.concatenate([tokens, np.broadcast_to(code, (len(tokens), len(code)))], 1)
    x = np.maximum(linear(x, state, name + ".0"), 0)
    x = np.maximum(linear(x, state, name + ".2"), 0)
    return linear(x, state, name + ".4")


def predictor(h, context_coords, target_coords, code, state, heads):
    """Our g_φ for one image: h (K, D) at (K, 2), targets (M, 2), code (4,) what π sees of the action. → (M, D)"""
    width = state["mask_token"].size
    context = linear(h, state, "embed") + positions(context_coords, width)
    tokens = policy(state["mask_token"] + positions(target_coords, width), code, state, "policy")
    x = np.concatenate([context, tokens])
    for i in range(depth_of(state, "blocks")):
        x = block(x, state, f"blocks.{i}", heads)
    return linear(layer_norm(x[len(h) :], state, "norm"), state, "proj")


def losses(state, batch, config):
    """Eq. (10)–(12) and Table 3's switches, view by view. state of a CheXWorld, batch of arrays, its config → dict of means."""
    encoder, target, g = (
        sub(state, name + ".") for name in ("encoder", "target_encoder", "predictor")
    )
    y, x = (
        (batch[k].astype(float) - 0.5) / 0.25 for k in ("y", "x")
    )  # the program's one mean and deviation
    n, films, tasks = (
        config["image"] // config["patch"],
        len(y) // 2,
        config.get("tasks", "local,global,domain").split(","),
    )
    own, terms = grid(n), {}

    def term(name, h, seen, at, action, goal):
        code = np.zeros(4)
        if action is not None:
            code = np.array([action[0] - 1, action[1] - 1, np.log(action[2]), action[3]])
        guess = predictor(h, own[seen], at, code, g, config["predictor_heads"])
        terms.setdefault(name, []).append(((guess - goal) ** 2).mean())

    for k in range(2 * films):
        view, other = (
            k // films,
            (k + films) % (2 * films),
        )  # k = film k % films, seen in view 1 or 2
        t_own, t_other = (
            layer_norm(vit(y[j], target, config["heads"]), eps=1e-5) for j in (k, other)
        )
        keep, masked, every = batch["keep"][k], batch["masked"][k], np.arange(n * n)
        phi = batch["coords"][k] if config.get("delta", True) else own
        action = batch["action"][k] if config.get("action", True) else None
        within, between, alone = (
            f"l{view + 1}{view + 1}",
            f"l{view + 1}{2 - view}",
            f"d{view + 1}{view + 1}",
        )
        if config.get("unified", True):
            seen = keep if "local" in tasks else every
            h = vit(x[k] if "domain" in tasks else y[k], encoder, config["heads"], seen)
            action = action if "domain" in tasks else None
            if "local" in tasks:
                term(within, h, seen, own[masked], action, t_own[masked])
            if "global" in tasks:
                term(between, h, seen, phi, action, t_other)
            if tasks == ["domain"]:
                term(within, h, seen, own, action, t_own)
        else:
            if "local" in tasks:
                term(
                    within,
                    vit(y[k], encoder, config["heads"], keep),
                    keep,
                    own[masked],
                    None,
                    t_own[masked],
                )
            if "global" in tasks:
                term(between, vit(y[k], encoder, config["heads"]), every, phi, None, t_other)
            if "domain" in tasks:
                term(alone, vit(x[k], encoder, config["heads"]), every, own, action, t_own)
    means = {name: np.mean(values) for name, values in terms.items()}
    return means | {"loss": np.mean(list(means.values()))}
