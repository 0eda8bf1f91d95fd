"""The networks of CheXWorld and its four losses. (Sec. 3, 4)

Dimension key:  B images · N = n² patches of a crop · K visible patches · M masked patches · D encoder width · d predictor width
                2B = both views of B films, view 1 first.  Coordinates are (row, col) in patch units, (0, 0) = centre of the top-left patch.
Images are float in [0, 1], (B, 1, H, W); token indices are long. Module names follow timm's ViT, so weights travel both ways.
"""

import copy
import math

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


class Classifier(nn.Module):
    """Mean over all output tokens, then one linear layer. forward: (B, 1, H, W) → logits (B, c)."""

    def __init__(self, vit, classes):
        super().__init__()
        self.vit, self.head = vit, nn.Linear(vit.dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def features(self, images):
        """(B, 1, H, W) → (B, D)"""
        return self.vit(images).mean(1)

    def forward(self, images):
        return self.head(self.features(images))


def norm(channels):
    """Layer norm over channels and pixels: the same in training and test, whatever the batch."""
    return nn.GroupNorm(1, channels)


class SimpleFPN(nn.Module):
    """Maps of strides 4, 8, 16, 32 from the ViT's last one, by strided (de)convolutions of factor 2 (Li et al. 2022). (B, D, n, n) → four maps."""

    def __init__(self, dim, patch, channels):
        super().__init__()
        self.levels = nn.ModuleList()
        for stride, out in zip((4, 8, 16, 32), channels):
            doublings, layers, width = round(math.log2(patch / stride)), [], dim
            for _ in range(abs(doublings)):
                narrow = max(out, width // 2)
                resize = (
                    nn.ConvTranspose2d(width, narrow, 2, 2)
                    if doublings > 0
                    else nn.Conv2d(width, narrow, 3, 2, 1)
                )
                layers, width = [*layers, resize, norm(narrow), nn.GELU()], narrow
            self.levels.append(nn.Sequential(*layers, nn.Conv2d(width, out, 1), norm(out)))

    def forward(self, x):
        return [level(x) for level in self.levels]


class Segmenter(nn.Module):
    """SimpleFPN, then a U-Net decoder of 8, 16, 32, 64 channels from fine to coarse. forward: (B, 1, H, W) → logits (B, H, W)."""

    def __init__(self, vit, channels=(8, 16, 32, 64)):
        super().__init__()
        self.vit, self.fpn = vit, SimpleFPN(vit.dim, vit.patch, channels)
        self.decoder = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(fine + coarse, fine, 3, padding=1),
                norm(fine),
                nn.GELU(),
                nn.Conv2d(fine, fine, 3, padding=1),
                norm(fine),
                nn.GELU(),
            )
            for fine, coarse in zip(channels, channels[1:])
        )
        self.head = nn.Conv2d(channels[0], 1, 1)

    def forward(self, images):
        tokens, n = self.vit(images), self.vit.grid  # (B, N, D)
        skips = self.fpn(tokens.transpose(1, 2).reshape(len(images), -1, n, n))
        x = skips.pop()
        for skip, block in zip(reversed(skips), reversed(self.decoder)):
            up = F.interpolate(x, skip.shape[-2:], mode="bilinear", align_corners=False)
            x = block(torch.cat([skip, up], 1))
        return F.interpolate(self.head(x), images.shape[-2:], mode="bilinear", align_corners=False)[
            :, 0
        ]
