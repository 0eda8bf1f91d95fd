"""Weights in and out: our own runs, the authors' file, timm's ViTs; another image or patch size."""

from pathlib import Path

import torch
import torch.nn.functional as F

from model import MEAN, STD, CheXWorld, Predictor, ViT, grid_coords, sincos
from plumbing.checkpoint import UNFIT, BadCheckpoint, brief, load_checkpoint

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std of R, G, B
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # what timm's own ViTs expect
# Runs before version 0.2 hold these settings of Table 3 in every checkpoint; a full run holds
# the values below, an ablated one others.
FULL_RUN = {"tasks": "local,global,domain", "delta": True, "action": True, "unified": True}


# ---- Files → networks


def load_world(path: str | Path) -> CheXWorld:
    """Load a world model with its predictor: a run's last.pt, or the authors' pre-trained file.

    Raises BadCheckpoint, also for a run of lab/ablation.py, which loads its own.
    """
    checkpoint = load_checkpoint(path)
    try:
        if "world" in checkpoint:
            world = make_world(checkpoint["config"], path)
            world.load_state_dict(checkpoint["world"])
            return world
        state = without_prefix(checkpoint.get("model", {}))
        if any(name.startswith("predictor.") for name in state):
            width = state["encoder.patch_embed.proj.weight"].shape[0]
            return from_official(state, heads=width // 64)
    except BadCheckpoint:
        raise
    except UNFIT as error:
        raise BadCheckpoint(f"{path}: weights that do not fit CheXWorld ({brief(error)})") from None
    raise BadCheckpoint(
        f"{path}: holds no predictor, which is needed here: "
        "give a run's last.pt or the authors' pre-trained file"
    )


def make_world(config: dict, path: str | Path) -> CheXWorld:
    """Make the network that a checkpoint's config describes; refuse one with Table 3's switches."""
    switched = [f"{k} {config[k]}" for k, full in FULL_RUN.items() if config.get(k, full) != full]
    if switched:
        raise BadCheckpoint(
            f"{path}: an ablated run ({', '.join(switched)}); only python -m lab.ablation loads it"
        )
    sizes = {k: v for k, v in config.items() if k not in FULL_RUN}
    is_official = sizes.pop("raw_action", False)
    world = CheXWorld(**sizes)
    return use_official_predictor(world) if is_official else world


def load_encoder(path: str | Path, which: str = "target") -> ViT:
    """Load an encoder: encoder.pt or last.pt of a run, the authors' file, or a timm ViT's weights.

    which: "target" (what the paper fine-tunes, Sec. B.3) or "context". Raises BadCheckpoint.
    """
    checkpoint = load_checkpoint(path)
    model = checkpoint.get("model")
    if isinstance(model, dict) and any("predictor." in str(name) for name in model):
        world = load_world(path)
        encoder = world.target_encoder if which == "target" else world.encoder
        return encoder.requires_grad_(True)
    try:
        if "world" in checkpoint:
            prefix = "target_encoder." if which == "target" else "encoder."
            return make_vit(checkpoint["config"], part_of(checkpoint["world"], prefix))
        if "encoder" in checkpoint:
            return make_vit(checkpoint["config"], checkpoint["encoder"])
        return vit_from(without_prefix(checkpoint.get("model", checkpoint)), rgb=HALF)
    except UNFIT as error:
        raise BadCheckpoint(f"{path}: these weights do not fit a ViT ({brief(error)})") from None


def make_vit(config: dict, state: dict) -> ViT:
    """Make a ViT of a checkpoint's config (other keys are left aside) with these weights."""
    vit = ViT(**{k: config[k] for k in ("image", "patch", "dim", "depth", "heads")})
    vit.load_state_dict(state)
    return vit


def part_of(state: dict, prefix: str) -> dict:
    """Pick the weights of one module out of a state dict, its prefix taken off."""
    return {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}


def without_prefix(state: dict) -> dict:
    """Take off the prefix that DistributedDataParallel adds."""
    return {k.removeprefix("module."): v for k, v in state.items()}


def depth_of(state: dict, prefix: str = "blocks.") -> int:
    """Count the blocks in a state dict."""
    return 1 + max(int(k[len(prefix) :].split(".")[0]) for k in state if k.startswith(prefix))


# ---- timm's ViTs


def vit_from(state: dict, heads: int | None = None, rgb: tuple = IMAGENET) -> ViT:
    """Turn a state dict with timm's names into a ViT.

    heads: timm's 64 channels each when None. A kernel for RGB, normalised by `rgb`, is folded to
    grey exactly. A class token is dropped: the features then agree with timm's only approximately.
    """
    kernel = state["patch_embed.proj.weight"]  # (D, 1 or 3, p, p)
    dim, patch = kernel.shape[0], kernel.shape[-1]
    grid = int(state["pos_embed"].shape[1] ** 0.5)
    vit = ViT(grid * patch, patch, dim, depth_of(state), heads or dim // 64)
    ours = vit.state_dict()
    unknown = [k for k in state if k.startswith(("blocks.", "norm_pre.")) and k not in ours]
    if unknown:
        raise ValueError(f"this ViT has layers that ours has not: {unknown[0]}")
    if "norm.weight" not in state:  # timm's average-pool models call it fc_norm
        raise ValueError("no final norm (norm.weight) among the weights; export with fc_norm=False")
    converted = {k: v for k, v in state.items() if k in ours}
    converted["pos_embed"] = state["pos_embed"][:, -grid * grid :]  # without the class token's
    if kernel.shape[1] == 3:
        kernel, bias = fold_rgb(kernel, state["patch_embed.proj.bias"], rgb)
        converted |= {"patch_embed.proj.weight": kernel, "patch_embed.proj.bias": bias}
    vit.load_state_dict(converted)
    return vit


def to_timm(vit: ViT) -> dict:
    """Export a ViT as a state dict for timm.

    For timm.create_model("vit_base_patch16_224", in_chans=1, class_token=False, num_classes=0,
    global_pool="avg", fc_norm=False), which then expects grey values (x - MEAN) / STD.
    """
    return {k: v.clone() for k, v in vit.state_dict().items()}


def fold_rgb(weight, bias, rgb: tuple = IMAGENET) -> tuple:
    """Fold a kernel for normalised RGB into the kernel for our grey values, exactly on grey images.

    weight (D, 3, p, p), bias (D,), rgb: mean and std per channel → (D, 1, p, p), (D,)
    Grey g enters channel c as (g - m_c) / s_c, and our network as v = (g - MEAN) / STD. So
        Σ_c W_c (g - m_c) / s_c  =  [STD · Σ_c W_c / s_c] v  +  Σ_c W_c (MEAN - m_c) / s_c.
    """
    means = torch.tensor(rgb[0], dtype=torch.float64).view(1, -1, 1, 1)
    stds = torch.tensor(rgb[1], dtype=torch.float64).view(1, -1, 1, 1)
    scaled = weight.double() / stds
    folded = STD * scaled.sum(1, keepdim=True)
    shift = (scaled * (MEAN - means)).sum((1, 2, 3))
    return folded.to(weight.dtype), (bias.double() + shift).to(weight.dtype)


# ---- The authors' file


class OfficialPredictor(Predictor):
    """The authors' predictor, whose policy network takes the action as it is drawn."""

    def action_code(self, action):
        return action


def use_official_predictor(world: CheXWorld) -> CheXWorld:
    """Give a new world the authors' predictor; its config keeps that for the next load."""
    sizes = ("dim", "predictor_dim", "predictor_depth", "predictor_heads")
    world.predictor = OfficialPredictor(*[world.config[size] for size in sizes])
    world.config["raw_action"] = True
    return world


def from_official(state_dict: dict, heads: int, predictor_heads: int = 12) -> CheXWorld:
    """Turn the authors' checkpoint (its "model" dict) into a world that computes the same function.

    heads: of the encoder, 12 for ViT-B. Raises ValueError when these are not the authors' weights.
    """
    theirs = part_of(state_dict, "predictor.")
    encoder = vit_from(part_of(state_dict, "encoder."), heads)
    target_encoder = vit_from(part_of(state_dict, "target_encoder."), heads)
    width = theirs["predictor_embed.weight"].shape[0]
    table = sincos(grid_coords(encoder.grid), width)[None]
    if not torch.allclose(theirs["predictor_pos_embed"].float(), table, atol=1e-4):
        raise ValueError("predictor_pos_embed is not the sine-cosine table of the authors' weights")
    world = CheXWorld(
        **encoder.config,
        predictor_dim=width,
        predictor_depth=depth_of(theirs, "predictor_blocks."),
        predictor_heads=predictor_heads,
    )
    use_official_predictor(world)
    world.encoder = encoder
    world.target_encoder = target_encoder.requires_grad_(False)
    world.predictor.load_state_dict(official_predictor(theirs, width))
    return world


def official_predictor(theirs: dict, width: int) -> dict:
    """Rename and rearrange the authors' predictor weights for ours.

    Their mask tokens hold the two halves of a position in the other order than their context
    tokens. With P the permutation that swaps the halves, and a₅ = (a, 0) their five-part action:
        theirs   W [m + P·PE; a₅] + b
        ours     W' [m' + PE; a] + b
    They agree for m' = Pᵀ m, W' = W with its first d columns permuted by P and its last one left
    out, since it only ever multiplies zero.
    """
    ours = {"policy_net": "policy"}
    ours |= {f"predictor_{module}": module for module in ("embed", "blocks", "norm", "proj")}
    state = {}
    for name, value in theirs.items():
        module, _, rest = name.partition(".")
        if module in ours:
            state[f"{ours[module]}.{rest}"] = value
    swap = torch.arange(width).roll(width // 2)  # P as an index
    first = theirs["policy_net.0.weight"]  # (d, d + 5)
    for_position = first[:, :width][:, swap]
    for_action = first[:, width : width + 4]
    state["policy.0.weight"] = torch.cat([for_position, for_action], 1)
    state["mask_token"] = theirs["mask_token"].flatten()[swap]
    return state


# ---- Another image or patch size


def resized(vit: ViT, image: int, patch: int, drop_path: float = 0.0) -> ViT:
    """Copy a ViT for another image or patch size, in px.

    The new grid covers the same field of view: a patch in the middle of the film keeps the position
    code of the middle. The kernel is resampled so that it answers a constant image as before.
    """
    new = ViT(**vit.config | {"image": image, "patch": patch}, drop_path=drop_path)
    state = vit.state_dict()
    if new.grid != vit.grid:
        state["pos_embed"] = resized_positions(vit, new.grid)
    if patch != vit.patch:
        kernel = state["patch_embed.proj.weight"]
        kernel = F.interpolate(kernel, (patch, patch), mode="bicubic", antialias=True)
        state["patch_embed.proj.weight"] = kernel * (vit.patch / patch) ** 2
    new.load_state_dict(state)
    return new


def resized_positions(vit: ViT, n: int) -> torch.Tensor:
    """Make a ViT's position codes for an n × n grid over the same field of view. → (1, n², D)

    The fixed table is computed anew at fractional coordinates; learned codes (timm) are resampled.
    """
    table = sincos(grid_coords(vit.grid), vit.dim)[None]
    if torch.allclose(vit.pos_embed.cpu(), table, atol=1e-4):
        coords = (grid_coords(n) + 0.5) * vit.grid / n - 0.5  # in patches of the old grid
        return sincos(coords, vit.dim)[None]
    codes = vit.pos_embed.view(1, vit.grid, vit.grid, vit.dim).permute(0, 3, 1, 2)
    codes = F.interpolate(codes, (n, n), mode="bicubic", antialias=True)
    return codes.flatten(2).transpose(1, 2)
