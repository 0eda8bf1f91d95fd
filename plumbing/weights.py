"""plumbing.weights"""

import torch

from model import MEAN, STD, CheXWorld, ViT, grid_coords, sincos
from plumbing.checkpoint import UNFIT, BadCheckpoint, brief, load_checkpoint

# ------------------------------------------------------------------------------------------------ weights in and out
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def fold_rgb(weight, bias, mean=MEAN, std=STD, rgb=IMAGENET):
    """A kernel for normalised RGB → the kernel for our grey pixels that gives the same output on a grey image. (D, 3, p, p), (D,) → (D, 1, p, p), (D,)

    Grey g enters every channel as (g - m_c) / s_c and ours as v = (g - m) / s, so  Σ_c W_c (g - m_c) / s_c = [s Σ_c W_c / s_c] v + Σ_c W_c (m - m_c) / s_c.
    """
    m, s = (torch.tensor(v[: weight.shape[1]], dtype=torch.float64).view(1, -1, 1, 1) for v in rgb)
    scaled = weight.double() / s
    return (std * scaled.sum(1, keepdim=True)).to(weight.dtype), (
        bias.double() + (scaled * (mean - m)).sum((1, 2, 3))
    ).to(weight.dtype)


def vit_from(state, heads=None, rgb=IMAGENET):
    """A state dict with timm's names → ViT. RGB kernels are folded to grey; a class token is dropped (timm's then agree only approximately)."""
    weight, pos = state["patch_embed.proj.weight"], state["pos_embed"]
    depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
    dim, patch = weight.shape[0], weight.shape[-1]
    pos = pos[:, pos.shape[1] - int(pos.shape[1] ** 0.5) ** 2 :]  # class position off
    vit = ViT(int(pos.shape[1] ** 0.5) * patch, patch, dim, depth, heads or dim // 64)
    left = [
        k for k in state if k.startswith(("blocks.", "norm_pre.")) and k not in vit.state_dict()
    ]
    if left:
        raise ValueError(f"this ViT has layers that ours has not: {left[0]}")
    state = {k: v for k, v in state.items() if k in vit.state_dict()} | {"pos_embed": pos}
    if "norm.weight" not in state:  # timm's average-pool models call it fc_norm
        raise ValueError(
            "the state dict has no final norm (norm.weight); export it with fc_norm=False"
        )
    if weight.shape[1] == 3:
        state["patch_embed.proj.weight"], state["patch_embed.proj.bias"] = fold_rgb(
            weight, state["patch_embed.proj.bias"], rgb=rgb
        )
    vit.load_state_dict(state)
    return vit


def to_timm(vit):
    """ViT → state dict of timm.create_model('vit_base_patch16_224', in_chans=1, class_token=False, global_pool='avg', fc_norm=False, num_classes=0),
    which expects (x - MEAN) / STD."""
    return {k: v.clone() for k, v in vit.state_dict().items()}


def from_official(state_dict, heads, predictor_heads=None):
    """The authors' checkpoint 'model' dict → CheXWorld that computes the same function on grey images. heads: of encoder and predictor (12 and 12 for ViT-B).

    Theirs, with P the permutation that swaps the two halves of a position:  π₁(m + P·PE, a₅) = W [m + P·PE; a₅] + b,  a₅ = (a, 0).
    Ours:  W' [m' + PE; a] + b.  Equal for  m' = Pᵀ m,  W'[:, :d] = W[:, :d] P (columns permuted),  W'[:, d:] = W[:, d:d+4] (the fifth action is always zero).
    """
    part = lambda prefix: {
        k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)
    }
    encoder, target, p = (part(name) for name in ("encoder.", "target_encoder.", "predictor."))
    online = vit_from(encoder, heads)
    width = p["predictor_embed.weight"].shape[0]
    if not torch.allclose(
        p["predictor_pos_embed"].float(), sincos(grid_coords(online.grid), width)[None], atol=1e-4
    ):
        raise ValueError(
            "predictor_pos_embed is not the fixed sine-cosine table: these are not the authors' weights"
        )
    depth = 1 + max(int(k.split(".")[1]) for k in p if k.startswith("predictor_blocks."))
    world = CheXWorld(
        **online.config,
        predictor_dim=width,
        predictor_depth=depth,
        predictor_heads=predictor_heads or 12,
        raw_action=True,
    )
    world.encoder, world.target_encoder = online, vit_from(target, heads).requires_grad_(False)
    swap = torch.arange(width).roll(width // 2)  # P as an index: halves exchanged
    first = p["policy_net.0.weight"]
    names = {
        "predictor_embed": "embed",
        "predictor_blocks": "blocks",
        "predictor_norm": "norm",
        "predictor_proj": "proj",
        "policy_net": "policy",
    }
    state = {
        names[k.split(".")[0]] + k[len(k.split(".")[0]) :]: v
        for k, v in p.items()
        if k.split(".")[0] in names
    }
    state["mask_token"] = p["mask_token"].flatten()[swap]
    state["policy.0.weight"] = torch.cat(
        [first[:, :width][:, swap], first[:, width : width + 4]], 1
    )
    world.predictor.load_state_dict(state)
    return world


def bare(state):
    """A state dict without the prefix that DistributedDataParallel adds."""
    return {k.removeprefix("module."): v for k, v in state.items()}


def load_world(path):
    """last.pt of a run, or the authors' pre-trained file → CheXWorld, predictor included."""
    checkpoint = load_checkpoint(path)
    try:
        if "world" in checkpoint:
            world = CheXWorld(**checkpoint["config"])
            world.load_state_dict(checkpoint["world"])
            return world
        state = bare(checkpoint.get("model", {}))
        if any(k.startswith("predictor.") for k in state):
            return from_official(state, state["encoder.patch_embed.proj.weight"].shape[0] // 64)
    except UNFIT as error:
        raise BadCheckpoint(
            f"{path}: these weights do not fit CheXWorld ({brief(error)})"
        ) from None
    raise BadCheckpoint(
        f"{path}: holds no predictor, which is needed here: give a run's last.pt or the authors' pre-trained file"
    )


def load_encoder(path, which="target"):
    """encoder.pt or last.pt of a run, the authors' file, or a timm ViT state dict → ViT. which: 'target' (default, Sec. B.3) or 'context'."""
    checkpoint = load_checkpoint(path)
    model = checkpoint.get("model")
    if (
        "world" in checkpoint
        or isinstance(model, dict)
        and any("predictor." in str(k) for k in model)
    ):
        world = load_world(path)
        return (world.target_encoder if which == "target" else world.encoder).requires_grad_(True)
    try:
        if "encoder" not in checkpoint:
            return vit_from(
                bare(checkpoint.get("model", checkpoint)), rgb=((0.5,) * 3, (0.5,) * 3)
            )  # timm's ViTs expect mean 0.5, std 0.5
        vit = ViT(**checkpoint["config"])
        vit.load_state_dict(checkpoint["encoder"])
        return vit
    except UNFIT as error:
        raise BadCheckpoint(f"{path}: these weights do not fit a ViT ({brief(error)})") from None
