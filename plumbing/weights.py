"""Weights in and out: our own runs, the authors' file, other papers' ViTs; resized ViTs.

Of a checkpoint only the names and shapes of its tensors are trusted. An encoder lies wherever a
patch embedding does, whatever stands before its name (`module.`, `teacher.backbone.` ...). Names
that a ViT of ours cannot use are refused by name, but for heads and decoders.

Our names are timm's: vit.state_dict() fits timm.create_model("vit_base_patch16_224", in_chans=1,
class_token=False, num_classes=0, global_pool="avg", fc_norm=False), which then expects grey values
(x - MEAN) / STD.
"""

import contextlib
import copy
import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import (
    MEAN,
    SIZES,
    STD,
    Block,
    CheXWorld,
    Predictor,
    ViT,
    grid_coords,
    run_blocks,
    sincos,
)
from plumbing.checkpoint import (
    UNFIT,
    BadCheckpoint,
    brief,
    digest,
    load_checkpoint,
    load_last,
    read_json,
    weights_in,
)
from plumbing.launch import UserError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std of R, G, B
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # what timm's own ViTs expect
# Runs before version 0.2 hold these settings of Table 3 in every checkpoint; a full run holds
# the values below, an ablated one others.
FULL_RUN = {"tasks": "local,global,domain", "delta": True, "action": True, "unified": True}
VIT_SIZES = ("image", "patch", "dim", "depth", "heads")
BASELINE_SIZES = ("tokens", "has_scale", "learns_positions")  # see BaselineViT
ALONE = 0.1  # of all steps, a new predictor learns while the encoders it was given stand still


# ---- Files → networks
def load_world(path: str | Path) -> CheXWorld:
    """Load a world model with its predictor: a run's last.pt, or the authors' pre-trained file.

    Raises BadCheckpoint, also for a run of lab/ablation.py.
    """
    world = world_in(load_checkpoint(path), path)
    if world is None:
        raise BadCheckpoint(
            f"{path}: holds no predictor, which is needed here: "
            "give a run's last.pt or the authors' pre-trained file"
        )
    return world


def world_in(checkpoint: dict, path: str | Path) -> CheXWorld | None:
    """Make the world model that a checkpoint holds; None where it has no predictor."""
    with explain_unfit(path, "CheXWorld"):
        if "world" in checkpoint:
            world = make_world(checkpoint["config"], path)
            world.load_state_dict(checkpoint["world"])
            return world
        tensors = tensors_in(checkpoint)
        roots = roots_of(tensors, [OFFICIAL])
        if not roots:
            return None
        state = part_of(tensors, roots[0])
        width = state["encoder.patch_embed.proj.weight"].shape[0]
        return from_official(state, heads=width // 64)


@contextlib.contextmanager
def explain_unfit(path: str | Path, network: str):
    """Turn what the weights of another network raise while they are read into a BadCheckpoint."""
    try:
        yield
    except BadCheckpoint:
        raise
    except UNFIT as error:
        reason = str(error) if isinstance(error, Unlike) else brief(error)
        raise BadCheckpoint(f"{path}: weights that do not fit {network} ({reason})") from None


def make_world(config: dict, path: str | Path) -> CheXWorld:
    """Make the network that a checkpoint's config describes; refuse one with Table 3's switches."""
    switched = [f"{k} {config[k]}" for k, full in FULL_RUN.items() if config.get(k, full) != full]
    if switched:
        raise BadCheckpoint(
            f"{path}: an ablated run ({', '.join(switched)}) of python -m lab.ablation, whose own "
            "closing table alone judges its predictions; its encoder.pt serves all programs"
        )
    sizes = {k: v for k, v in config.items() if k not in FULL_RUN}
    is_official = sizes.pop("raw_action", False)
    extras = {name: sizes.pop(name) for name in BASELINE_SIZES if name in sizes}
    world = CheXWorld(**sizes)
    if extras:
        world.encoder = make_vit(config)
        world.target_encoder = copy.deepcopy(world.encoder).requires_grad_(False)
        world.config |= extras
    return use_official_predictor(world) if is_official else world


def load_encoder(
    path: str | Path, which: str = "target", say: Callable[[str], None] | None = None
) -> ViT:
    """Load an encoder: of a run, of the authors' file, or of another paper's ViT.

    which: "target" (what the paper fine-tunes, Sec. B.3) or "context", where a file holds both.
    say: is told, in a line, what was taken of a file of others, and what was left aside.
    Raises BadCheckpoint.
    """
    checkpoint = load_checkpoint(path)
    world = None if "world" in checkpoint else world_in(checkpoint, path)
    if world is not None:
        encoder = world.target_encoder if which == "target" else world.encoder
        return encoder.requires_grad_(True)
    with explain_unfit(path, "a ViT"):
        tensors = tensors_in(checkpoint)
        root = choose_root(roots_of(tensors, PATCH_EMBEDDING), tensors, which)
        state = part_of(tensors, root)
        config = checkpoint.get("config")
        if isinstance(config, dict) and config.keys() >= set(VIT_SIZES):
            return fill(make_vit(config), state)
        beside = settings_beside(Path(path))
        rgb, colours = normalisation(beside, state)
        vit = vit_from(state, beside.get("num_attention_heads"), rgb)
    if say:
        say(describe_origin(root, tensors, f"{vit.config['heads']} heads, {colours}"))
    return vit


def make_vit(config: dict, drop_path: float = 0.0) -> ViT:
    """Make the encoder that a checkpoint's config describes; other keys are left aside."""
    sizes = {name: config[name] for name in VIT_SIZES}
    extras = {name: config[name] for name in BASELINE_SIZES if name in config}
    kind = BaselineViT if extras else ViT
    return kind(**sizes, **extras, drop_path=drop_path)


class Unlike(ValueError):
    """Weights of a network that ours is not; the message is a sentence for the user."""


# ---- What lies in a file
# The last part of a name that tells where a network begins.
OFFICIAL = "predictor.policy_net.0.weight"
PATCH_EMBEDDING = ["patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight"]
WRAPPERS = {"module", "_orig_mod"}  # what DistributedDataParallel and torch.compile add
# Which of several encoders is taken, by a word of its name. MoCo-v3's authors fine-tune its
# base_encoder, not the momentum_encoder.
TARGETS = "base_encoder teacher target_encoder target model_ema ema state_dict_ema".split()
CONTEXTS = "base_encoder student context_encoder encoder model state_dict".split()
# First words of names that an encoder does not need: heads, decoders, what training left.
ASIDE = "head head_dist fc classifier pooler pre_logits mask_token decoder projector".split()
ASIDE += "predictor dino_head ibot_head optimizer".split()


def tensors_in(checkpoint: dict) -> dict:
    """List all tensors of nested dicts by dotted names, without what wrappers add to these."""
    tensors = {}
    for key, value in checkpoint.items():
        if isinstance(value, dict):
            inside = tensors_in(value)
        else:
            inside = {"": value} if isinstance(value, torch.Tensor) else {}
        for name, tensor in inside.items():
            parts = [part for part in f"{key}.{name}".split(".") if part not in {"", *WRAPPERS}]
            if ".".join(parts) in tensors:
                raise Unlike(f"two tensors are called {'.'.join(parts)}")
            tensors[".".join(parts)] = tensor
    return tensors


def roots_of(tensors: dict, endings: list[str]) -> list[str]:
    """List what stands before such an ending in the names: "" or "teacher.backbone.", say."""
    roots = []
    for name in tensors:
        for ending in endings:
            root = name.removesuffix(ending)
            if name.endswith(ending) and (root == "" or root.endswith(".")):
                roots.append(root)
    return roots


def choose_root(roots: list[str], tensors: dict, which: str) -> str:
    """Choose one of a file's encoders. Raises Unlike when it holds none, or cannot tell."""
    if not roots:
        first = ", ".join(list(tensors)[:3]) or "none"
        raise Unlike(f"no {PATCH_EMBEDDING[0]} among its {len(tensors)} tensors: {first}")
    if len(roots) == 1:
        return roots[0]
    for word in TARGETS if which == "target" else CONTEXTS:
        named = [root for root in roots if word in root.split(".")]
        if len(named) == 1:
            return named[0]
    raise Unlike(f"several encoders, {', '.join(roots[:4])}: save the one you want alone")


def part_of(state: dict, prefix: str) -> dict:
    """Pick the weights of one module out of a state dict, its prefix taken off."""
    return {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}


def depth_of(state: dict, prefix: str = "blocks.") -> int:
    """Count the blocks in a state dict."""
    return 1 + max(int(k[len(prefix) :].split(".")[0]) for k in state if k.startswith(prefix))


def is_aside(name: str) -> bool:
    """Tell whether a name is that of a head or a decoder, which an encoder does without."""
    first = name.removeprefix("embeddings.").split(".")[0]
    return first in ASIDE or first.startswith("decoder_")


def describe_origin(root: str, tensors: dict, decisions: str) -> str:
    """Tell which tensors of a file were taken, what was decided, what was left aside."""
    depth = max(1, root.count("."))
    aside = []
    for name in tensors:
        if not name.startswith(root):
            aside.append(".".join(name.split(".")[:depth]))
        elif is_aside(name[len(root) :]):
            aside.append(root + name[len(root) :].removeprefix("embeddings.").split(".")[0])
    line = f"encoder: {root.rstrip('.') or 'the whole file'}; {decisions}"
    aside = sorted(set(aside))
    if aside:
        line += f"; left aside: {', '.join(aside[:8])}{' ...' if aside[8:] else ''}"
    return line


# ---- Other papers' ViTs
class ScaledBlock(Block):
    """A block whose two branches are scaled per channel, as in DINOv2 (layer scale)."""

    def __init__(self, dim, heads, drop=0.0):
        super().__init__(dim, heads, drop)
        self.ls1 = nn.Module()  # containers, for timm's names ls1.gamma and ls2.gamma
        self.ls2 = nn.Module()
        self.ls1.gamma = nn.Parameter(torch.ones(dim))
        self.ls2.gamma = nn.Parameter(torch.ones(dim))

    def drop_path(self, x, drop_noise, branch):
        scale = (self.ls1, self.ls2)[branch].gamma
        return super().drop_path(scale * x, drop_noise, branch)


class BaselineViT(ViT):
    """A ViT as MoCo-v3, DINO, MAE and DINOv2 pre-train it. (B, 1, H, W) → patches (B, N, D)

    tokens: class token and registers, which take part in attention and are then left out, since
    our heads look at patches. Their positions are added to them once, when weights are loaded.
    has_scale: see ScaledBlock. learns_positions: positions are trained, as they were.
    """

    def __init__(self, *sizes, tokens=1, has_scale=False, learns_positions=False, **more_sizes):
        super().__init__(*sizes, **more_sizes)
        extras = dict(tokens=tokens, has_scale=has_scale, learns_positions=learns_positions)
        self.config |= extras
        self.tokens = nn.Parameter(torch.zeros(1, tokens, self.dim))
        if has_scale:
            heads = self.config["heads"]
            self.blocks = nn.ModuleList(ScaledBlock(self.dim, heads, b.drop) for b in self.blocks)
        if learns_positions:
            positions = self.pos_embed
            del self.pos_embed
            self.pos_embed = nn.Parameter(positions)

    def forward(self, images, keep=None, drop_noise=None):
        """As in ViT: all patches, or those in `keep`; drop_noise is for drop path."""
        x = self.embed(images, keep)
        tokens = self.tokens.expand(len(x), -1, -1)
        x = torch.cat([tokens, x], 1)
        x = run_blocks(self.blocks, x, self.save_memory, drop_noise)
        return self.norm(x[:, tokens.shape[1] :])


def vit_from(state: dict, heads: int | None = None, rgb: tuple = IMAGENET) -> ViT:
    """Turn a state dict with timm's, DINOv2's or Hugging Face's names into a ViT.

    heads: as usual for the width when None. A kernel for RGB, normalised by `rgb`, is folded to
    grey exactly. Raises ValueError when our ViT would not compute the same features.
    """
    state = with_timm_names(state)
    refuse_other_kinds(state)
    kernel = state["patch_embed.proj.weight"]  # (D, 1 or 3, p, p)
    dim, _, _, patch = kernel.shape
    names = ("cls_token", "dist_token", "register_tokens", "reg_token")
    tokens = torch.cat([torch.zeros(1, 0, dim), *[state.pop(k) for k in names if k in state]], 1)
    state["pos_embed"], tokens, grid = part_positions(state["pos_embed"], tokens)
    axes = axes_of_table(state["pos_embed"], grid)
    config = dict(image=grid * patch, patch=patch, dim=dim, depth=depth_of(state))
    config["heads"] = heads or usual_heads(dim, is_moco=axes == (1, 0))
    has_scale = "blocks.0.ls1.gamma" in state
    if tokens.numel() or has_scale:
        state["tokens"] = tokens
        config |= dict(tokens=tokens.shape[1], has_scale=has_scale, learns_positions=axes is None)
    if kernel.shape[1] == 3:
        folded = fold_rgb(kernel, state["patch_embed.proj.bias"], rgb)
        state["patch_embed.proj.weight"], state["patch_embed.proj.bias"] = folded
    return fill(make_vit(config), {name: t for name, t in state.items() if not is_aside(name)})


def fill(vit: ViT, state: dict) -> ViT:
    """Load the weights into a ViT. Raises Unlike with the name that is not as it must be."""
    ours = vit.state_dict()
    for names, what in (
        ([name for name in state if name not in ours], "layers that ours has not"),
        ([name for name in ours if name not in state], "no such layers"),
        ([k for k in state if k in ours and state[k].shape != ours[k].shape], "other shapes"),
    ):
        if names:
            raise Unlike(f"{what}: {', '.join(names[:3])}")
    vit.load_state_dict(state)
    return vit


# Hugging Face's names (ViTModel, ViTMAE, Dinov2Model), and blocks in groups as DINOv2 trains them.
RENAME = {
    r"^embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
    r"^embeddings\.position_embeddings$": "pos_embed",
    r"^embeddings\.": "",
    r"^encoder\.layer\.": "blocks.",
    r"\.attention\.attention\.": ".attn.",
    r"\.attention\.output\.dense\.": ".attn.proj.",
    r"\.intermediate\.dense\.": ".mlp.fc1.",
    r"\.output\.dense\.": ".mlp.fc2.",
    r"\.layernorm_before\.": ".norm1.",
    r"\.layernorm_after\.": ".norm2.",
    r"\.layer_scale(\d)\.lambda1$": r".ls\1.gamma",
    r"^layernorm\.": "norm.",
    r"^blocks\.\d+\.(\d+)\.": r"blocks.\1.",
}


def with_timm_names(state: dict) -> dict:
    """Rename the tensors of a ViT as timm does; query, key and value become one tensor."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in RENAME.items():
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor.float()
    for name in [name for name in renamed if ".attn.query." in name]:
        parts = [renamed.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        renamed[name.replace("query", "qkv")] = torch.cat(parts)
    return renamed


def refuse_other_kinds(state: dict):
    """Raise Unlike for ViTs that are built otherwise, and say what to do."""
    biased = [name for name in state if "relative_position" in name]
    if any(name.startswith(("blocks.", "rel_pos_bias.", "encoder.")) for name in biased):
        raise Unlike(
            "BEiT's: its positions are a bias on attention, which ours has not; "
            "take DINO, MAE, MoCo-v3 or RAD-DINO, or fine-tune it with its authors' code"
        )
    if "norm.weight" not in state:  # timm's average-pool models call it fc_norm
        raise Unlike("no final norm (norm.weight) among the weights; export with fc_norm=False")
    for name in ("pos_embed", "patch_embed.proj.bias"):
        if name not in state:
            raise Unlike(f"no {name} among the weights: another kind of network")


def part_positions(positions, tokens) -> tuple:
    """Part the codes of patches from those of class token and registers, which are added to these.

    positions (1, n² + 0, 1 or T, D), tokens (1, T, D) → (1, n², D), (1, T, D), n
    """
    total = positions.shape[1]
    count = tokens.shape[1]
    for extra in sorted({0, min(1, count), count}):
        grid = math.isqrt(total - extra)
        if grid**2 == total - extra:
            tokens = tokens.clone()
            tokens[:, :extra] += positions[:, :extra]
            return positions[:, extra:], tokens, grid
    raise Unlike(f"pos_embed holds {total} positions, which with {count} tokens is no square")


def usual_heads(dim: int, is_moco: bool) -> int:
    """The heads of ViTs of this width. MoCo-v3's ViT-S has 12, all others of its width 6."""
    if is_moco and dim == 384:
        return 12
    huge = {1280: 16, 1408: 16, 1664: 16}  # ViT-H, ViT-g and ViT-G have wider ones
    return huge.get(dim, max(1, dim // 64))


def settings_beside(path: Path) -> dict:
    """Read what the folders of Hugging Face and timm say of the weights in them. → {} elsewhere"""
    settings = {}
    for name in ("config.json", "preprocessor_config.json"):
        file = path.with_name(name)
        if file.is_file():
            saved = read_json(file)
            settings |= saved | saved.get("pretrained_cfg", {})
    return settings


def normalisation(beside: dict, state: dict) -> tuple:
    """Find the mean and deviation of R, G, B that weights were trained with. → (them, words)

    beside: see settings_beside. Without them, timm's own ViTs, which have a class head or no class
    token, take 0.5, and the papers' take ImageNet's.
    """
    if any(k.endswith("proj.weight") and v.shape[1:2] == (1,) for k, v in state.items()):
        return IMAGENET, "grey as ours"
    mean = beside.get("image_mean", beside.get("mean"))
    std = beside.get("image_std", beside.get("std"))
    if mean and std:
        return (mean, std), f"colours folded to grey, mean {mean} and std {std} as the file beside"
    if "head.weight" in state or not any("cls_token" in name for name in state):
        return HALF, "colours folded to grey, mean and std 0.5 as timm's"
    return IMAGENET, "colours folded to grey, mean and std of ImageNet"


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
    new = make_vit(vit.config | {"image": image, "patch": patch}, drop_path)
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

    A fixed table is computed anew at fractional coordinates; learned codes are resampled.
    """
    axes = axes_of_table(vit.pos_embed.detach().cpu(), vit.grid)
    if axes:
        coords = (grid_coords(n) + 0.5) * vit.grid / n - 0.5  # in patches of the old grid
        return sincos(coords[:, axes], vit.dim)[None]
    codes = vit.pos_embed.view(1, vit.grid, vit.grid, vit.dim).permute(0, 3, 1, 2)
    codes = F.interpolate(codes, (n, n), mode="bicubic", antialias=True)
    return codes.flatten(2).transpose(1, 2)


def axes_of_table(positions: torch.Tensor, grid: int) -> tuple | None:
    """Tell whose fixed table these codes are, by the order of its coordinates. (1, n², D)

    → (0, 1) for MAE's and ours, (1, 0) for MoCo-v3's, which has columns and rows exchanged; None
    for learned codes
    """
    for axes in ((0, 1), (1, 0)):
        table = sincos(grid_coords(grid)[:, axes], positions.shape[-1])[None]
        if torch.allclose(positions, table, atol=5e-3):  # as exact as half precision
            return axes
    return None


# ---- Where a pre-training starts
@dataclasses.dataclass
class Origin:
    """The weights that a pre-training starts from: a whole world's, or those of an encoder alone.

    digest: fingerprint of the file. config: of the world, but for what flags decide. words: what
    the file is. notes: further lines for the user. encoder, target: None when the run resumes from
    its own last.pt. predictor: None when it is new.
    """

    path: Path
    digest: str
    config: dict
    words: str
    notes: list[str] = dataclasses.field(default_factory=list)
    encoder: ViT | None = None
    target: ViT | None = None
    predictor: Predictor | None = None

    def settings(self) -> dict:
        """Name the settings that come from the file unless flags say otherwise."""
        shape = {name: self.config[name] for name in ("dim", "depth", "heads")}
        size = f"{shape['dim']} × {shape['depth']}"
        for name, sizes in SIZES.items():
            if shape.items() <= sizes.items():
                size = name
        return dict(size=size, image=self.config["image"], patch=self.config["patch"])

    def refuse_contradicting(self, size: str, patch: int, pixels: float):
        """Raise UserError when --size, --patch or --pixels contradict the file."""
        own = self.settings()
        if self.encoder is None:  # a resumed run compares its whole recipe
            return
        if size != own["size"]:
            raise UserError(f"--size {size}: {self.path} is {own['size']}; leave --size out")
        had = self.config.get("pixels", 0.0)
        if self.predictor and (pixels != had or (pixels and patch != own["patch"])):
            raise UserError(
                f"--pixels {pixels:g} in patches of {patch} px: {self.path} was trained with "
                f"--pixels {had:g} in patches of {own['patch']} px, and its predictor fits no "
                "other; give these, or start from its encoder.pt"
            )

    def steps_alone(self, image: int, patch: int, total: int) -> int:
        """Count the steps in which the predictor learns alone, so that it spoils no encoder: while
        it is new, or knows only the places of another grid. total: steps of the training
        """
        own_grid = self.config["image"] // self.config["patch"]
        is_ready = self.predictor is not None and image // patch == own_grid
        return 0 if is_ready else round(ALONE * total)

    def describe(self, image: int, patch: int, total: int) -> str:
        """Tell what is taken from the file and what is new. Arguments: see steps_alone."""
        lines = [f"weights {self.path}: {self.words}", *self.notes]
        if self.encoder is None:
            return "\n".join(lines)
        own = self.settings()
        taken = "encoders and predictor" if self.predictor else "both encoders"
        new = "the optimizer" if self.predictor else "the predictor and the optimizer"
        lines.append(f"taken: {taken}; new: {new}")
        if (image, patch) != (own["image"], own["patch"]):
            lines.append(
                f"resampled from {own['image']}² px in {own['patch']}² patches "
                f"to {image}² px in {patch}² patches"
            )
        alone = self.steps_alone(image, patch, total)
        if alone:
            lines.append(f"the predictor learns alone for the first {alone} of {total} steps")
        return "\n".join(lines)


def find_origin(weights: str | None, out: str | Path, recipe: str | None = None) -> Origin | None:
    """Read the weights that a pre-training in the folder `out` starts from; None without any.

    weights: a file, or the folder of a run. Once there is a last.pt in `out`, the run resumes from
    that, and the file is only compared with the one that it began from. recipe: what --recipe says,
    which does not go with weights. Raises UserError.
    """
    if weights is None:
        return None
    if recipe:
        raise UserError(
            f"--recipe {recipe} and --weights: with weights the recipe is that for "
            "continuing; leave --recipe out, other flags override it"
        )
    last = Path(out) / "last.pt"
    if last.is_file():
        return begun_origin(Path(weights), last)
    path = weights_in(weights)
    if not path.is_file():
        raise UserError(f"--weights {path}: no such file")
    return new_origin(path)


def new_origin(path: Path) -> Origin:
    """Load a run's or the authors' world, or else an encoder, to start a run from."""
    checkpoint = load_checkpoint(path)
    about = dict(path=path, digest=digest(path.read_bytes()))
    world = world_in(checkpoint, path)
    if world is not None:
        parts = dict(encoder=world.encoder, target=world.target_encoder, predictor=world.predictor)
        return Origin(**about, config=world.config, words="a whole world", **parts)
    notes = []
    vit = load_encoder(path, say=notes.append)
    words = "an encoder alone"
    if "finetuned" in checkpoint:
        words = "the encoder of a fine-tuned model, which has learnt from labels; its head is left"
    config = vit.config | predictor_sizes(vit.dim)
    return Origin(**about, config=config, words=words, notes=notes, encoder=vit, target=vit)


def predictor_sizes(dim: int) -> dict:
    """Choose the predictor for an encoder of this width: that of the next narrower of our sizes."""
    fitting = [sizes for sizes in SIZES.values() if sizes["dim"] <= dim] or [SIZES["tiny"]]
    sizes = max(fitting, key=lambda sizes: sizes["dim"])
    return {name: value for name, value in sizes.items() if name.startswith("predictor_")}


def begun_origin(path: Path, last: Path) -> Origin:
    """Compare a file, or a folder's, with the weights that the run of `last` began from.

    The run resumes from `last`.
    """
    with contextlib.suppress(UserError):  # the folder may have been emptied since
        path = weights_in(path)
    saved = load_last(last, {"recipe", "config"})
    began_from = saved["recipe"].get("weights", "none")
    is_there = path.is_file()
    now = digest(path.read_bytes()) if is_there else began_from
    if began_from == "none":
        raise UserError(
            f"{last.parent} holds a run that did not start from --weights: "
            "choose another --out, or delete it to start anew"
        )
    if now != began_from:
        raise UserError(
            f"--weights {path} is not the file that the run in {last.parent} started from "
            f"(SHA-256 {now}, then {began_from}): give that one, or another --out"
        )
    words = "this run started from it, and resumes from its own last.pt"
    if not is_there:
        words = f"no longer there; not needed, the run resumes from {last}"
    return Origin(path, began_from, saved["config"], words)


def start_world(origin: Origin, image: int, patch: int, pixels: float) -> CheXWorld:
    """Make the world that a pre-training starts with. image, patch: of its views, in px

    What the file has not is new, from torch's random numbers. Positions of another grid are
    resampled, so that the encoders see as before. The predictor counts places in patches and has to
    learn another grid (Origin.steps_alone).
    """
    flags = dict(image=image, patch=patch, pixels=pixels)
    world = make_world(origin.config | flags, origin.path)
    if origin.encoder is not None:
        world.encoder = resized(origin.encoder, image, patch)
        world.target_encoder = resized(origin.target, image, patch).requires_grad_(False)
    if origin.predictor is not None:
        world.predictor.load_state_dict(origin.predictor.state_dict())
    return world
