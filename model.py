"""The networks of CheXWorld and its four losses. (Sec. 3, 4)

Dimension key:  B images · N = n² patches of a crop · K visible patches · M masked patches · D encoder width · d predictor width
                2B = both views of B films, view 1 first.  Coordinates are (row, col) in patch units, (0, 0) = centre of the top-left patch.
Images are float in [0, 1], (B, 1, H, W); token indices are long. Module names follow timm's ViT, so weights travel both ways.
"""

import argparse
import copy
import warnings
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute

#            encoder                               predictor (d, blocks, heads)
SIZES = {
    "tiny": dict(dim=128, depth=4, heads=4, predictor_dim=64, predictor_depth=2, predictor_heads=4),
    "small": dict(
        dim=384, depth=12, heads=6, predictor_dim=192, predictor_depth=6, predictor_heads=6
    ),
    "base": dict(
        dim=768, depth=12, heads=12, predictor_dim=384, predictor_depth=6, predictor_heads=12
    ),  # the paper's
    "large": dict(
        dim=1024, depth=24, heads=16, predictor_dim=384, predictor_depth=6, predictor_heads=12
    ),
}
MEAN, STD = (
    0.5,
    0.25,
)  # of a grey pixel: one pair for all sets, folded away exactly when weights come from elsewhere


def sincos(coords, dim):
    """Fixed 2-D sine-cosine positions, base 10000; fractional coordinates allowed (Sec. B.1). (..., 2) → (..., dim), column half first (as MAE)."""
    omega = 10000 ** -(
        torch.arange(dim // 4, device=coords.device, dtype=torch.float32) / (dim // 4)
    )
    row, col = (coords.float()[..., None, i] * omega for i in (0, 1))  # (..., dim / 4) each
    return torch.cat([col.sin(), col.cos(), row.sin(), row.cos()], -1)


def grid_coords(n, device=None):
    """(row, col) of n × n patches in raster order. → (N, 2)"""
    axis = torch.arange(n, dtype=torch.float32, device=device)
    return torch.cartesian_prod(axis, axis)


def take(tokens, index):
    """Select tokens by index. (B, N, D), (B, K) → (B, K, D)"""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def attend(q, k, v):
    """softmax(q kᵀ / √d) v. Fused (flash) everywhere but in bfloat16 on CPUs, where that kernel's backward pass takes three times as long as plain products."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):  # (B, L, D)
        B, L, D = x.shape
        q, k, v = (
            self.qkv(x).view(B, L, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        )  # (B, heads, L, D / heads) each
        x = attend(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, L, D))


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block; with probability `drop` in training an image skips each residual branch (drop path)."""

    def __init__(self, dim, heads, drop=0.0):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), Mlp(dim)
        self.drop = drop

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def drop_path(self, x):
        if not self.training or self.drop == 0.0:
            return x
        keep = torch.rand(len(x), 1, 1, device=x.device) >= self.drop
        return x * keep / (1 - self.drop)  # expectation unchanged


def run_blocks(blocks, x, save_memory=False):
    """Apply the blocks in turn; `save_memory` recomputes their activations in the backward pass instead of storing them."""
    for block in blocks:
        x = (
            recompute(block, x, use_reentrant=False)
            if save_memory and torch.is_grad_enabled()
            else block(x)
        )
    return x


def initialise(module):
    """Xavier-uniform weights, zero biases, as in MAE's ViT."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(
            module.weight.flatten(1) if module.weight.dim() == 4 else module.weight
        )
        nn.init.zeros_(module.bias)


class ViT(nn.Module):
    """f_θ: vision transformer without class token, fixed positions, final norm. Sees all patches or only those in `keep`."""

    def __init__(self, image=224, patch=16, dim=768, depth=12, heads=12, drop_path=0.0):
        super().__init__()
        if image % patch or dim % heads or dim % 4:
            raise ValueError(
                f"image {image} must be a multiple of patch {patch}, dim {dim} of heads {heads} and of 4"
            )
        self.image, self.patch, self.dim, self.grid, self.save_memory = (
            image,
            patch,
            dim,
            image // patch,
            False,
        )
        self.config = dict(image=image, patch=patch, dim=dim, depth=depth, heads=heads)
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(1, dim, patch, patch)
        self.register_buffer(
            "pos_embed", sincos(grid_coords(self.grid), dim)[None]
        )  # (1, N, D), never trained
        self.blocks = nn.ModuleList(
            Block(dim, heads, drop_path * i / max(1, depth - 1)) for i in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(initialise)

    def forward(self, images, keep=None):
        """(B, 1, H, W), keep (B, K) or None → (B, K|N, D), normed. Hidden patches are dropped before the projection: they cost nothing."""
        p = self.patch
        patches = (
            images.unfold(2, p, p).unfold(3, p, p).reshape(len(images), -1, p * p)
        )  # (B, N, p²)
        pos = self.pos_embed.expand(len(images), -1, -1)
        if keep is not None:
            patches, pos = take(patches, keep), take(pos, keep)  # (B, K, ·)
        proj = self.patch_embed.proj
        x = F.linear((patches - MEAN) / STD, proj.weight.flatten(1), proj.bias) + pos
        return self.norm(run_blocks(self.blocks, x, self.save_memory))

    def resized(self, image, patch, drop_path=0.0):
        """The same weights for another image size or patch: positions recomputed (the old grid's units, so anatomy keeps its place), kernel resampled."""
        new = ViT(**{**self.config, "image": image, "patch": patch}, drop_path=drop_path)
        state = self.state_dict()
        if new.grid != self.grid:
            state["pos_embed"] = self.positions(new.grid)
        if patch != self.patch:
            kernel = F.interpolate(
                state["patch_embed.proj.weight"], (patch, patch), mode="bicubic", antialias=True
            )
            state["patch_embed.proj.weight"] = (
                kernel * (self.patch / patch) ** 2
            )  # keeps the response to a constant
        new.load_state_dict(state)
        return new

    def positions(self, n):
        """This model's positions on an n × n grid over the same field: recomputed where they are the fixed table, resampled where learned (timm). → (1, n², D)"""
        if torch.allclose(
            self.pos_embed.cpu(), sincos(grid_coords(self.grid), self.dim)[None], atol=1e-4
        ):
            return sincos((grid_coords(n) + 0.5) * self.grid / n - 0.5, self.dim)[None]
        table = self.pos_embed.view(1, self.grid, self.grid, self.dim).permute(0, 3, 1, 2)
        return (
            F.interpolate(table, (n, n), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
        )


class Predictor(nn.Module):
    """g_φ with the policy network π: predicts target features at any coordinates, given context features and the action. (Eq. 2, 6, 8)"""

    def __init__(self, dim, width=384, depth=6, heads=12, raw_action=False):
        super().__init__()
        self.width, self.raw_action, self.save_memory = width, raw_action, False
        self.config = dict(width=width, depth=depth, heads=heads, raw_action=raw_action)
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.policy = nn.Sequential(
            nn.Linear(width + 4, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
        )
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.proj = nn.Linear(width, dim)
        self.apply(initialise)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, context, context_coords, target_coords, action):
        """context (B, K, D) at (B, K, 2), targets at (B, M, 2), action (B, 4) raw or None (π is fed zeros) → (B, M, D)"""
        h = self.embed(context) + sincos(context_coords, self.width)  # (B, K, d): h_x + p_x
        tokens = self.mask_token + sincos(target_coords, self.width)  # (B, M, d): m + PE(·)
        code = self.action_code(action) if action is not None else tokens.new_zeros(len(tokens), 4)
        code = code[:, None].expand(-1, tokens.shape[1], -1)
        tokens = self.policy(torch.cat([tokens, code], -1))  # Eq. (8): m_{a,p} = π(m + p, a)
        x = run_blocks(
            self.blocks, torch.cat([h.to(tokens.dtype), tokens], 1), self.save_memory
        )  # (B, K + M, d)
        return self.proj(self.norm(x[:, h.shape[1] :]))  # only the mask tokens leave

    def action_code(self, action):
        """What π sees of a: zero for the identity, (b - 1, c - 1, ln γ, σ); the authors' weights want it raw."""
        if self.raw_action:
            return action
        brightness, contrast, gamma, sigma = action.unbind(-1)
        return torch.stack([brightness - 1, contrast - 1, gamma.log(), sigma], -1)


class CheXWorld(nn.Module):
    """The world model: context encoder, its moving average as target encoder, predictor; four losses in one forward. (Sec. 4.4)

    tasks: any of local, global, domain; delta=False: the target's own grid instead of φ; action=False: π fed zeros, augmentation kept;
    unified=False: separate forward passes (Table 3).
    """

    def __init__(
        self,
        image=224,
        patch=16,
        dim=768,
        depth=12,
        heads=12,
        predictor_dim=384,
        predictor_depth=6,
        predictor_heads=12,
        tasks="local,global,domain",
        delta=True,
        action=True,
        unified=True,
        raw_action=False,
    ):
        super().__init__()
        self.config = dict(
            image=image,
            patch=patch,
            dim=dim,
            depth=depth,
            heads=heads,
            predictor_dim=predictor_dim,
            predictor_depth=predictor_depth,
            predictor_heads=predictor_heads,
            tasks=tasks,
            delta=delta,
            action=action,
            unified=unified,
            raw_action=raw_action,
        )
        self.tasks, self.delta, self.action, self.unified = (
            set(tasks.split(",")),
            delta,
            action,
            unified,
        )
        if not self.tasks or self.tasks - {"local", "global", "domain"}:
            raise ValueError(
                f"tasks must be some of local, global, domain, separated by commas; got {tasks!r}"
            )
        self.encoder = ViT(image, patch, dim, depth, heads)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.predictor = Predictor(dim, predictor_dim, predictor_depth, predictor_heads, raw_action)
        self.register_buffer("coords", grid_coords(self.encoder.grid), persistent=False)  # (N, 2)

    @torch.no_grad()
    def targets(self, images):
        """t = LayerNorm without affine of f_θ̄(y). (B, 1, H, W) → (B, N, D)"""
        features = self.target_encoder(images)
        return F.layer_norm(features.float(), features.shape[-1:])

    def predict(self, images, action=None):
        """The model's guess of the un-augmented targets of a whole view T_a(y), all patches: g(f_θ(x); a). (B, 1, H, W), (B, 4) → (B, N, D)"""
        at = self.coords.expand(len(images), -1, -1)
        return self.predictor(self.encoder(images), at, at, action)

    def forward(self, y, x, keep, masked, coords, action):
        """Both views of B films → dict of losses: l11, l22, l12, l21 (those of the chosen tasks), their mean `loss`; `features` = pooled targets (2B, D).

        y, x (2B, 1, H, W): targets and augmented contexts; keep (2B, K), masked (2B, M); coords (2B, N, 2): φ, where the *other* view's patches lie
        in this view's grid; action (2B, 4). Rows of view 1 first, then view 2.
        """
        t = self.targets(y)  # (2B, N, D)
        if not self.unified:
            return self.separate(t, y, x, keep, masked, coords, action)
        local, across, domain = (name in self.tasks for name in ("local", "global", "domain"))
        action = action if domain and self.action else None
        keep = keep if local else None  # masking belongs to the local task
        h = self.encoder(x if domain else y, keep)  # (2B, K, D)
        losses = {}
        if local or not across:
            losses |= self.within(t, h, keep, masked if local else None, action)
        if across:
            losses |= self.between(t, h, keep, coords, action)
        return self.total(losses, t)

    def within(self, t, h, keep, masked, action, names=("l11", "l22")):
        """Eq. (10), L_ii: predict the view's own masked patches (all when masked is None)."""
        at = self.coords.expand(len(h), -1, -1)
        guess = self.predictor(
            h,
            at if keep is None else take(at, keep),
            at if masked is None else take(at, masked),
            action,
        )
        return error(guess, t if masked is None else take(t, masked), names)

    def between(self, t, h, keep, coords, action):
        """Eq. (11), L_ij: predict every patch of the other view, at φ_{i→j}(u, v) in this view's grid (Eq. 5)."""
        at = self.coords.expand(len(h), -1, -1)
        guess = self.predictor(
            h, at if keep is None else take(at, keep), coords if self.delta else at, action
        )
        return error(guess, torch.cat(t.chunk(2)[::-1]), ("l12", "l21"))  # view i predicts view j

    def separate(self, t, y, x, keep, masked, coords, action):
        """Table 3, "not unified": local on an un-augmented masked crop, global on a whole pair, domain on a whole augmented crop; three forward passes."""
        losses = {}
        if "local" in self.tasks:
            losses |= self.within(t, self.encoder(y, keep), keep, masked, None)
        if "global" in self.tasks:
            losses |= self.between(t, self.encoder(y), None, coords, None)
        if "domain" in self.tasks:
            losses |= self.within(
                t, self.encoder(x), None, None, action if self.action else None, ("d11", "d22")
            )
        return self.total(losses, t)

    @staticmethod
    def total(losses, t):
        """Eq. (12), as the mean of its terms: the learning rate then does not depend on how many there are."""
        return losses | {"loss": torch.stack(list(losses.values())).mean(), "features": t.mean(1)}

    @torch.no_grad()
    def update_target(self, momentum):
        """θ̄ ← momentum · θ̄ + (1 - momentum) · θ"""
        torch._foreach_lerp_(
            list(self.target_encoder.parameters()), list(self.encoder.parameters()), 1 - momentum
        )


def error(guess, target, names):
    """Squared error, mean over tokens and width, of each view. (2B, M, D) twice → {name of view 1, name of view 2}"""
    each = (guess.float() - target).square().mean((1, 2)).view(2, -1).mean(1)
    return dict(zip(names, each))


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


class BadCheckpoint(ValueError):
    """Weights that cannot be used; the message is one line for the user."""

    one_line = True


UNFIT = (
    AttributeError,
    IndexError,
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
)  # what a wrong dict of weights can raise


def brief(error):
    """The first line of an error, after its name."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]


def bare(state):
    """A state dict without the prefix that DistributedDataParallel adds."""
    return {k.removeprefix("module."): v for k, v in state.items()}


def load_checkpoint(path):
    """A checkpoint file → its dict. Nothing is unpickled but tensors, plain containers and argparse.Namespace (the authors' file holds one)."""
    path = Path(path)
    if not path.is_file():
        raise BadCheckpoint(f"{path}: no such checkpoint file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # junk bytes can raise anything in an unpickler
        raise BadCheckpoint(
            f"{path}: not a checkpoint that can be loaded safely ({brief(error)}); nothing in it was run"
        ) from None
    if not isinstance(checkpoint, dict):
        raise BadCheckpoint(f"{path}: holds a {type(checkpoint).__name__}, not a dict of weights")
    return checkpoint


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
