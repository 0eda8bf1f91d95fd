"""The networks and losses a second time, as slow plain equations in float64 NumPy.

Tests of the model, of its weights and of the ablations compare with them. Nothing is imported from
the program; weights come as a dict of float64 arrays under timm's names.
"""

from types import SimpleNamespace

import numpy as np
from scipy.special import erf


def arrays(module_or_state):
    """State dict (or module) → dict of float64 arrays."""
    state = module_or_state
    if not isinstance(state, dict):
        state = state.state_dict()
    return {k: v.detach().double().numpy() for k, v in state.items()}


def sub(state, prefix):
    """The entries under a prefix, without it."""
    return {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}


# ---------------------------------------------------------------- positions


def sincos_1d(position, width):
    """Sines, then cosines, of one coordinate at width / 2 frequencies from 1 towards 1 / 10000."""
    values = np.array([position / 10000 ** (k / (width / 2)) for k in range(width // 2)])
    return np.concatenate([np.sin(values), np.cos(values)])  # (width,)


def position(row, col, dim):
    """Sine-cosine code of one place, column half first. → (dim,)"""
    return np.concatenate([sincos_1d(col, dim // 2), sincos_1d(row, dim // 2)])


def positions(coords, dim):
    """(L, 2) row, col → (L, dim)"""
    return np.stack([position(row, col, dim) for row, col in coords])


def grid(n):
    """Row and column of every patch in raster order. → (n², 2)"""
    return np.array([divmod(k, n) for k in range(n * n)], float)


def mae_table(n, dim):
    """MAE's get_2d_sincos_pos_embed in words: sines and cosines of the whole grid. → (n², dim)"""
    return positions(grid(n), dim)


# ---------------------------------------------------------------- layers
def linear(x, state, name):
    return x @ state[name + ".weight"].T + state[name + ".bias"]


def layer_norm(x, state=None, name=None, eps=1e-6):
    """Normalise the last axis; without a state, no weight and no bias."""
    centred = x - x.mean(-1, keepdims=True)
    x = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    if state is None:
        return x
    return x * state[name + ".weight"] + state[name + ".bias"]


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
    activated = hidden * 0.5 * (1 + erf(hidden / np.sqrt(2)))
    return x + linear(activated, state, name + ".mlp.fc2")


def depth_of(state, name):
    """How many blocks stand under a name."""
    return 1 + max(int(k.split(".")[1]) for k in state if k.startswith(name + "."))


# ---------------------------------------------------------------- networks
def embed_patches(channels, state):
    """One token per patch, in raster order, by dot products with the kernel.

    channels (C, H, W): the normalised image → (N, D)
    """
    kernel = state["patch_embed.proj.weight"]
    bias = state["patch_embed.proj.bias"]
    p = kernel.shape[-1]
    n = channels.shape[-1] // p
    tokens = []
    for k in range(n * n):
        r, c = divmod(k, n)
        patch = channels[:, r * p : (r + 1) * p, c * p : (c + 1) * p]
        tokens.append(np.tensordot(kernel, patch, 3) + bias)
    return np.stack(tokens)


def vit(channels, state, heads, keep=None):
    """ViT of one normalised image: embed, add positions, drop what is not kept, blocks, norm.

    channels (C, H, W), keep: indices of the K patches kept, or None for all → (K|N, D)
    """
    x = embed_patches(channels, state) + state["pos_embed"][0]
    if keep is not None:
        x = x[keep]
    for i in range(depth_of(state, "blocks")):
        x = block(x, state, f"blocks.{i}", heads)
    return layer_norm(x, state, "norm")


def policy(tokens, code, state, name):
    """Eq. (8): three linear layers, ReLU between, of each token beside the action."""
    x = np.concatenate([tokens, np.broadcast_to(code, (len(tokens), len(code)))], 1)
    x = np.maximum(linear(x, state, name + ".0"), 0)
    x = np.maximum(linear(x, state, name + ".2"), 0)
    return linear(x, state, name + ".4")


def policy_input(action):
    """What π sees of an action: zeros for the identity, and where it is told nothing. → (4,)"""
    if action is None:
        return np.zeros(4)
    brightness, contrast, gamma, blur = action
    return np.array([brightness - 1, contrast - 1, np.log(gamma), blur])


def predictor(h, context_coords, target_coords, code, state, heads, head="proj"):
    """Our g_φ for one image: what it says of the target patches.

    h (K, D) at context_coords (K, 2); target_coords (M, 2); code (4,): policy_input;
    head: proj for features, pixel_head for pixels → (M, D or p²)
    """
    width = state["mask_token"].size
    context = linear(h, state, "embed") + positions(context_coords, width)
    tokens = policy(state["mask_token"] + positions(target_coords, width), code, state, "policy")
    x = np.concatenate([context, tokens])
    for i in range(depth_of(state, "blocks")):
        x = block(x, state, f"blocks.{i}", heads)
    return linear(layer_norm(x[len(h) :], state, "norm"), state, head)


# ---------------------------------------------------------------- losses
def normalised(images):
    """The program's one mean and deviation."""
    return (images.astype(float) - 0.5) / 0.25


def losses(state, batch, config):
    """Eq. (10)–(12) with Table 3's switches, one view after the other.

    state: of a CheXWorld; batch: of arrays; config: the world's → {term: mean error}, and "loss"
    """
    encoder = sub(state, "encoder.")
    guesser = sub(state, "predictor.")
    own_coords = grid(config["image"] // config["patch"])

    def encode(image, keep=None):
        return vit(image, encoder, config["heads"], keep)

    def error(h, kept, at, action, goal):
        code = policy_input(action)
        guess = predictor(h, own_coords[kept], at, code, guesser, config["predictor_heads"])
        return ((guess - goal) ** 2).mean()

    tasks = config.get("tasks", "local,global,domain").split(",")
    errors_of = unified_errors if config.get("unified", True) else separate_errors
    terms = {}
    for k in range(len(batch["y"])):
        view = one_view(k, state, batch, config)
        for name, value in errors_of(view, tasks, encode, error).items():
            terms.setdefault(name, []).append(value)
    means = {name: np.mean(values) for name, values in terms.items()}
    return means | {"loss": np.mean(list(means.values()))}


def normalised_patches(image, p):
    """What MAE predicts: each patch less its mean, over its standard deviation (of n - 1).

    image (1, H, W), as the network sees it → (N, p²)
    """
    n = image.shape[-1] // p
    patches = []
    for k in range(n * n):
        r, c = divmod(k, n)
        patch = image[0, r * p : (r + 1) * p, c * p : (c + 1) * p].ravel()
        variance = ((patch - patch.mean()) ** 2).sum() / (p * p - 1)
        patches.append((patch - patch.mean()) / np.sqrt(variance + 1e-6))
    return np.stack(patches)


def pixel_loss(state, batch, config):
    """The four terms of Eq. (10, 11) with normalised pixels instead of features. → their mean"""
    films = len(batch["y"]) // 2
    own = grid(config["image"] // config["patch"])
    encoder, guesser = sub(state, "encoder."), sub(state, "predictor.")
    goals = [normalised_patches(normalised(image), config["patch"]) for image in batch["y"]]
    errors = []
    for k in range(2 * films):
        kept, masked = batch["keep"][k], batch["masked"][k]
        h = vit(normalised(batch["x"][k]), encoder, config["heads"], kept)
        code = policy_input(batch["action"][k])
        asked = asked_of(k, batch)
        other = goals[(k + films) % (2 * films)][asked]
        for at, goal in ((own[masked], goals[k][masked]), (batch["coords"][k][asked], other)):
            heads = config["predictor_heads"]
            guess = predictor(h, own[kept], at, code, guesser, heads, "pixel_head")
            errors.append(((guess - goal) ** 2).mean())
    return np.mean(errors)


def asked_of(k, batch):
    """Which patches of the other view are asked of view k: all, unless some are named."""
    every = np.arange(len(batch["coords"][k]))
    return batch["asked"][k] if "asked" in batch else every


def one_view(k, state, batch, config):
    """What the losses need of view k, which is film k % films, met for the first or second time.

    The names of its terms: `within` the view, `between` both, and domain `alone`.
    """
    films = len(batch["y"]) // 2
    first_or_second = 1 + k // films
    own_coords = grid(config["image"] // config["patch"])
    asked = asked_of(k, batch)

    def target(j):
        tokens = vit(normalised(batch["y"][j]), sub(state, "target_encoder."), config["heads"])
        return layer_norm(tokens, eps=1e-5)

    return SimpleNamespace(
        y=normalised(batch["y"][k]),
        x=normalised(batch["x"][k]),
        keep=batch["keep"][k],
        masked=batch["masked"][k],
        every=np.arange(len(own_coords)),
        own=own_coords,
        phi=(batch["coords"][k] if config.get("delta", True) else own_coords)[asked],
        action=batch["action"][k] if config.get("action", True) else None,
        target=target(k),
        other_target=target((k + films) % (2 * films))[asked],
        within=f"l{first_or_second}{first_or_second}",
        between=f"l{first_or_second}{3 - first_or_second}",
        alone=f"d{first_or_second}{first_or_second}",
    )


def unified_errors(view, tasks, encode, error):
    """One encoding of the view answers every question asked. → {term: error}"""
    has_domain = "domain" in tasks
    kept = view.keep if "local" in tasks else view.every
    h = encode(view.x if has_domain else view.y, kept)
    action = view.action if has_domain else None
    errors = {}
    if "local" in tasks:
        at = view.own[view.masked]
        errors[view.within] = error(h, kept, at, action, view.target[view.masked])
    if "global" in tasks:
        errors[view.between] = error(h, kept, view.phi, action, view.other_target)
    if tasks == ["domain"]:
        errors[view.within] = error(h, kept, view.own, action, view.target)
    return errors


def separate_errors(view, tasks, encode, error):
    """Each question has an encoding of its own. → {term: error}"""
    every = view.every
    errors = {}
    if "local" in tasks:
        h = encode(view.y, view.keep)
        at = view.own[view.masked]
        errors[view.within] = error(h, view.keep, at, None, view.target[view.masked])
    if "global" in tasks:
        errors[view.between] = error(encode(view.y), every, view.phi, None, view.other_target)
    if "domain" in tasks:
        errors[view.alone] = error(encode(view.x), every, view.own, view.action, view.target)
    return errors
