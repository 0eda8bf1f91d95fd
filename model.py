"""The networks of CheXWorld and its four losses. (Sec. 3, 4)

Sec., Eq. and Table always refer to the paper.

Dimension key
    B   films                          2B   both views of B films: the rows of view 1, then view 2
    R   rows of any batch              L    tokens of any sequence
    N   patches of a view, n² of them in an n × n grid; P: pixels of a patch
    K   patches kept: the context      M    patches masked; both stay the same through a run
    J   patches asked for of the other view: all N, unless --global_share is below 1
    D   width of the encoder           d    width of the predictor
Coordinates are (row, col) in units of patches; (0, 0) is the centre of a view's top-left patch.
Images are float in [0, 1], (R, 1, H, W). Modules are named as in timm's ViT, so weights can be
exchanged with timm.
"""

import copy
import itertools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute

# fmt: off
SIZES = {
    "tiny": dict(dim=128, depth=4, heads=4,
                 predictor_dim=64, predictor_depth=2, predictor_heads=4),
    "small": dict(dim=384, depth=12, heads=6,
                  predictor_dim=192, predictor_depth=6, predictor_heads=6),
    "base": dict(dim=768, depth=12, heads=12,  # the paper's
                 predictor_dim=384, predictor_depth=6, predictor_heads=12),
    "large": dict(dim=1024, depth=24, heads=16,
                  predictor_dim=384, predictor_depth=6, predictor_heads=12),
}
# fmt: on

# Grey values are normalised with this mean and standard deviation, for all sets alike. Weights that
# were trained with other numbers are converted exactly (plumbing/weights.py).
MEAN = 0.5
STD = 0.25


# ---- Parts that encoder and predictor share


def sincos(coords, dim):
    """Encode positions by fixed sines and cosines; fractional coordinates are allowed. (Sec. B.1)

    coords (..., 2) → (..., dim): as in MAE the first half holds the column, the second the row.
    """
    exponent = torch.arange(dim // 4, device=coords.device, dtype=torch.float32) / (dim // 4)
    frequency = 10000**-exponent  # (dim / 4,)
    row = coords[..., 0:1].float() * frequency  # (..., dim / 4)
    col = coords[..., 1:2].float() * frequency
    return torch.cat([col.sin(), col.cos(), row.sin(), row.cos()], -1)


def grid_coords(n, device=None):
    """List the coordinates of n × n patches, row by row. → (n², 2)"""
    axis = torch.arange(n, dtype=torch.float32, device=device)
    return torch.cartesian_prod(axis, axis)


def take(tokens, index):
    """Pick tokens by patch index; with index None return all. (R, N, D), (R, K) → (R, K, D)"""
    if index is None:
        return tokens
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def attend(q, k, v):
    """Compute softmax(q kᵀ / √w) v with PyTorch's fused kernel, except where it is slow.

    All arguments and the result are (R, heads, L, w): w is the width of a head.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # On CPUs the fused kernel's backward pass in bfloat16 is slower than plain products.
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        return scores.softmax(-1).to(v.dtype) @ v  # autocast makes the softmax float32
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention. (R, L, D) → (R, L, D)"""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        R, L, D = x.shape
        qkv = self.qkv(x).view(R, L, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (R, heads, L, D / heads) each
        x = attend(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(R, L, D))


class Mlp(nn.Module):
    """Two linear layers with a hidden width of 4 · D. (R, L, D) → (R, L, D)"""

    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block. (R, L, D) → (R, L, D)

    drop: the probability of drop path, that is, of an image skipping a branch. drop_noise (R, 2):
    one number from 0 to 1 per image and branch; without it nothing is skipped.
    """

    def __init__(self, dim, heads, drop=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)
        self.drop = drop

    def forward(self, x, drop_noise=None):
        x = x + self.drop_path(self.attn(self.norm1(x)), drop_noise, branch=0)
        return x + self.drop_path(self.mlp(self.norm2(x)), drop_noise, branch=1)

    def drop_path(self, x, drop_noise, branch):
        if drop_noise is None or self.drop == 0.0:
            return x
        stays = drop_noise[:, branch, None, None] >= self.drop  # (R, 1, 1)
        return x * stays / (1 - self.drop)  # the expectation stays what it was


def run_blocks(blocks, x, save_memory=False, drop_noise=None):
    """Apply the blocks in turn.

    save_memory: do not store their activations but compute them again in the backward pass.
    drop_noise (R, blocks, 2): each block gets its part.
    """
    for k, block in enumerate(blocks):
        block_noise = None if drop_noise is None else drop_noise[:, k]
        if save_memory and torch.is_grad_enabled():
            x = recompute(block, x, block_noise, use_reentrant=False)
        else:
            x = block(x, block_noise)
    return x


def initialise(module):
    """Start a layer with Xavier-uniform weights and zero biases, as MAE's ViT does."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.flatten(1))  # fills the weight in place
        nn.init.zeros_(module.bias)


# ---- The encoder


def cut_patches(images, patch):
    """Cut images into patches of patch × patch px, row by row. (R, 1, H, W) → (R, N, P = patch²)"""
    patches = images.unfold(2, patch, patch).unfold(3, patch, patch)  # (R, 1, n, n, patch, patch)
    return patches.reshape(len(images), -1, patch**2)


class ViT(nn.Module):
    """The encoder f_θ: a vision transformer without class token, fixed positions, a final norm."""

    def __init__(self, image=224, patch=16, dim=768, depth=12, heads=12, drop_path=0.0):
        super().__init__()
        if image % patch or dim % heads or dim % 4:
            raise ValueError(
                f"image {image} must be a multiple of patch {patch}, "
                f"dim {dim} a multiple of heads {heads} and of 4"
            )
        self.config = dict(image=image, patch=patch, dim=dim, depth=depth, heads=heads)
        self.image = image  # the side of an image, px
        self.patch = patch  # the side of a patch, px
        self.dim = dim
        self.grid = image // patch  # n: patches per side
        self.save_memory = False
        self.patch_embed = nn.Module()  # a container, for timm's name patch_embed.proj
        self.patch_embed.proj = nn.Conv2d(1, dim, patch, patch)  # not called: `embed` reads it
        positions = sincos(grid_coords(self.grid), dim)[None]  # (1, N, D), fixed
        self.register_buffer("pos_embed", positions)  # saved, since timm's checkpoints hold it
        drops = [drop_path * i / max(1, depth - 1) for i in range(depth)]  # linear over depth
        self.blocks = nn.ModuleList(Block(dim, heads, drop) for drop in drops)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(initialise)

    def forward(self, images, keep=None, drop_noise=None):
        """Make a feature of every patch of the images, or only of those in `keep`.

        images (R, 1, H, W), keep (R, K) indices or None → (R, K or N, D). The other patches are
        dropped before the first layer, so the encoder does not pay for them.
        drop_noise (R, blocks, 2): numbers from 0 to 1 for drop path; without it nothing is skipped.
        """
        x = self.embed(images, keep)
        return self.norm(run_blocks(self.blocks, x, self.save_memory, drop_noise))

    def embed(self, images, keep=None):
        """Make a token of every patch, or of those in `keep`: its pixels, and where it lies."""
        patches = cut_patches(images, self.patch)  # (R, N, P)
        positions = self.pos_embed.expand(len(images), -1, -1)  # (R, N, D)
        if keep is not None:
            patches = take(patches, keep)  # (R, K, P)
            positions = take(positions, keep)  # (R, K, D)
        kernel = self.patch_embed.proj.weight.flatten(1)  # (D, P): the convolution as one product
        return F.linear((patches - MEAN) / STD, kernel, self.patch_embed.proj.bias) + positions


# ---- The predictor with the policy network


class Predictor(nn.Module):
    """The predictor g with its policy network π: from context features to target features.

    It predicts at any coordinates, and is told the action that changed the context. (Eq. 2, 6, 8)
    "Policy network" is the paper's name for the MLP that mixes the action into the mask tokens.
    pixel_outputs: width of a second output for each patch; 0: there is none, as in the paper.
    """

    def __init__(self, dim, width=384, depth=6, heads=12, pixel_outputs=0):
        super().__init__()
        self.width = width
        self.save_memory = False
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
        if pixel_outputs:  # made last: all else gets the same random numbers with or without it
            self.pixel_head = nn.Linear(width, pixel_outputs)
            initialise(self.pixel_head)

    def forward(self, context, context_coords, target_coords, action):
        """Predict the target features at `target_coords`; arguments as below. → (R, T, D)"""
        return self.proj(self.tokens(context, context_coords, target_coords, action))

    def tokens(self, context, context_coords, target_coords, action):
        """Predict tokens of the predictor's own width d, for `proj` or the pixel head to read.

        context (R, K, D): features of patches at context_coords (R, K, 2); target_coords (R, T, 2):
        T places asked for; action (R, 4): brightness, contrast, gamma, blur sigma, as
        augment.sample_actions draws it; None says that nothing was changed → (R, T, d)
        """
        context = self.embed(context) + sincos(context_coords, self.width)  # (R, K, d)
        # Eq. (8), m_{a,p} = π(m + p, a): the mask token m with the position p of its place, mixed
        # with action a. Context tokens get no action: only the mask tokens must know what to undo.
        mask_tokens = self.mask_token + sincos(target_coords, self.width)  # (R, T, d): m + p
        if action is None:
            code = mask_tokens.new_zeros(len(mask_tokens), 4)  # the code of "nothing was changed"
        else:
            code = self.action_code(action)  # (R, 4)
        codes = code[:, None].expand(-1, mask_tokens.shape[1], -1)  # (R, T, 4)
        mask_tokens = self.policy(torch.cat([mask_tokens, codes], -1))  # (R, T, d): m_{a,p}
        # Under autocast the policy returns bfloat16 but `context` is float32: cast to the narrower,
        # which is faster.
        tokens = torch.cat([context.to(mask_tokens.dtype), mask_tokens], 1)  # (R, K + T, d)
        tokens = run_blocks(self.blocks, tokens, self.save_memory)
        return self.norm(tokens[:, context.shape[1] :])  # only the mask tokens leave

    def action_code(self, action):
        """Encode an action so that one that changes nothing becomes zeros. (R, 4) → (R, 4)

        Gamma is drawn log-uniformly, so its logarithm is spread evenly about 0.
        """
        brightness, contrast, gamma, sigma = action.unbind(-1)
        return torch.stack([brightness - 1, contrast - 1, gamma.log(), sigma], -1)


# ---- The world model


class CheXWorld(nn.Module):
    """The world model: encoder f_θ, target encoder f_θ̄, predictor; θ̄ is θ averaged over time.

    pixels: how much a second loss, on pixels, counts: its weight W; 0 (no such loss) is the paper.
    """

    LOSSES = ("l11", "l22", "l12", "l21")  # names of the losses on features

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
        pixels=0.0,
    ):
        super().__init__()
        self.encoder = ViT(image, patch, dim, depth, heads)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        outputs = patch**2 if pixels else 0  # of the pixel head
        self.predictor = Predictor(dim, predictor_dim, predictor_depth, predictor_heads, outputs)
        own_coords = grid_coords(self.encoder.grid)
        self.register_buffer("own_coords", own_coords, persistent=False)  # (N, 2)
        self.config = self.encoder.config | dict(
            predictor_dim=predictor_dim,
            predictor_depth=predictor_depth,
            predictor_heads=predictor_heads,
        )
        self.pixel_weight = pixels
        self.loss_names = (*self.LOSSES, "pixels") if pixels else self.LOSSES
        if pixels:
            self.config["pixels"] = pixels

    def forward(self, y, x, keep, masked, coords, action, asked=None):
        """Compute the four losses of both views of B films.

        y (2B, 1, H, W): target images.  x (2B, 1, H, W): the same views after T_a.
        keep (2B, K): patches of x that make the context.  masked (2B, M): patches of y to predict.
        coords (2B, N, 2): φ, Eq. (5); row r: where the *other* view's patches lie in view r's grid.
        action (2B, 4): what T_a did to x: brightness, contrast, gamma, blur sigma.
        asked (2B, J): patches of the other view to predict; None: all, as in the paper.
        → losses {l11, l22, l12, l21, loss}: l12 is view 1's error in predicting view 2;
        → target features averaged over patches (2B, D): alike for all films if f_θ has collapsed
        """
        own_coords = self.own_coords.expand(len(y), -1, -1)  # (2B, N, 2)
        kept_coords = take(own_coords, keep)
        target = self.targets(y)  # (2B, N, D): f_θ̄ of all patches of y
        context = self.encoder(x, keep)  # (2B, K, D): f_θ of the kept patches of x = T_a(y)

        # Local + domain, Eq. (10): each view predicts its masked patches as they were before T_a.
        own_tokens = self.predictor.tokens(context, kept_coords, take(own_coords, masked), action)
        l11, l22 = error_per_view(self.predictor.proj(own_tokens), take(target, masked))

        # Global + domain, Eq. (11): each view predicts every patch of the other view, at φ.
        other_tokens = self.predictor.tokens(context, kept_coords, take(coords, asked), action)
        other_target = take(swap_views(target), asked)  # row r: target of the other view
        l12, l21 = error_per_view(self.predictor.proj(other_tokens), other_target)

        loss = (l11 + l22 + l12 + l21) / 4  # means, as in the authors' code; the paper sums
        losses = dict(l11=l11, l22=l22, l12=l12, l21=l21, loss=loss)
        if self.pixel_weight:  # not the paper's: replaces `loss`, adds `pixels`
            losses |= self.mix_in_pixels(loss, y, masked, asked, own_tokens, other_tokens)
        return losses, target.mean(1)

    def mix_in_pixels(self, loss, y, masked, asked, own_tokens, other_tokens):
        """Predict the target's pixels, too, from the predictor's tokens of both questions.

        loss: of features. → {loss: (1 - W) · loss + W · pixels, pixels: the mean of four terms}
        """
        head = self.predictor.pixel_head
        target = pixel_targets(y, self.encoder.patch)  # (2B, N, P)
        # (2,) each: of the view's own masked patches, as in l11 and l22, and of the other view.
        within = error_per_view(head(own_tokens), take(target, masked))
        between = error_per_view(head(other_tokens), take(swap_views(target), asked))
        pixel_loss = (within.mean() + between.mean()) / 2
        mixed = (1 - self.pixel_weight) * loss + self.pixel_weight * pixel_loss
        return dict(loss=mixed, pixels=pixel_loss)

    @torch.no_grad()
    def targets(self, images):
        """Compute what is to be predicted: f_θ̄(y), layer-normed without weights. → (R, N, D)

        Without that norm, the learnt scale of the encoder's last norm would scale the loss.
        """
        features = self.target_encoder(images)
        return F.layer_norm(features.float(), features.shape[-1:])

    @torch.no_grad()
    def update_target(self, momentum):
        """Let the target encoder follow slowly: θ̄ ← momentum · θ̄ + (1 - momentum) · θ."""
        averaged = list(self.target_encoder.parameters())
        trained = list(self.encoder.parameters())
        torch._foreach_lerp_(averaged, trained, 1 - momentum)  # one call for all tensors

    def predict(self, images, action=None):
        """Predict all patches of views whose every patch is context: the domain test. (Eq. 13)

        images (R, 1, H, W), action (R, 4): what was done to them, None for nothing → (R, N, D)
        """
        own_coords = self.own_coords.expand(len(images), -1, -1)
        return self.predictor(self.encoder(images), own_coords, own_coords, action)


def error_per_view(guess, target):
    """Squared error of each view, averaged over films, tokens and width. (2B, M, D) twice → (2,)"""
    error = (guess.float() - target).square().mean((1, 2))  # (2B,)
    return error.view(2, -1).mean(1)  # rows 0 to B-1 are view 1


def pixel_targets(images, patch):
    """Give every patch mean 0 and standard deviation 1: the pixels that MAE predicts. → (R, N, P)

    norm_pix_loss of MAE (He et al., CVPR 2022); the variance divides by P - 1, as theirs does.
    """
    pixels = (cut_patches(images, patch) - MEAN) / STD
    variance, mean = torch.var_mean(pixels, -1, keepdim=True)
    return (pixels - mean) / (variance + 1e-6).sqrt()


def swap_views(both):
    """Put the rows of view 2 before those of view 1. (2B, ...) → (2B, ...)"""
    view1, view2 = both.chunk(2)
    return torch.cat([view2, view1])


# ---- Heads for fine-tuning (Sec. B.3)


CELLS = 4  # a film is pooled in CELLS × CELLS cells


def pool_cells(tokens):
    """Average the tokens in each of 4 × 4 cells of the film. (B, N, D) → (B, 16, D), row by row

    A cell is the patches that touch it: where 4 does not divide the grid, neighbours share some.
    """
    n = math.isqrt(tokens.shape[1])
    maps = tokens.unflatten(1, (n, n))  # (B, n, n, D)
    # First and last patch of each cell, along one side.
    spans = [slice(k * n // CELLS, math.ceil((k + 1) * n / CELLS)) for k in range(CELLS)]
    cells = [maps[:, rows, cols].mean((1, 2)) for rows, cols in itertools.product(spans, spans)]
    return torch.stack(cells, 1)


class Classifier(nn.Module):
    """Pool the output tokens, then one linear layer. (B, 1, H, W) → logits (B, classes)

    pool: "mean" averages all tokens, as in the paper; "cells" averages each of 4 × 4 cells and
    joins the 16 means, so that the layer can tell what lies where.
    """

    def __init__(self, vit, classes, pool="mean"):
        super().__init__()
        self.vit = vit
        self.pool = pool
        parts = CELLS**2 if pool == "cells" else 1
        self.head = nn.Linear(parts * vit.dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def features(self, images, drop_noise=None):
        """Pool the output tokens. (B, 1, H, W) → (B, D), or (B, 16 D) of cells"""
        tokens = self.vit(images, drop_noise=drop_noise)  # (B, N, D)
        return pool_cells(tokens).flatten(1) if self.pool == "cells" else tokens.mean(1)

    def forward(self, images, drop_noise=None):
        return self.head(self.features(images, drop_noise))


def group_norm(channels):
    """Make a layer norm over channels and pixels; a batch norm would depend on the batch size."""
    return nn.GroupNorm(1, channels)


class SimpleFPN(nn.Module):
    """Make maps of strides 2, 4, 8, 16 px from the ViT's one map (Li et al. 2022).

    The ViT's map is doubled or halved in size until its stride is as near as possible to the wanted
    one; each time the channels are halved, but not below `channels`. (B, D, n, n) → four maps
    """

    STRIDES = (2, 4, 8, 16)

    def __init__(self, dim, patch, channels):
        super().__init__()
        self.levels = nn.ModuleList()
        for stride, out_channels in zip(self.STRIDES, channels, strict=True):
            doublings = round(math.log2(patch / stride))  # below 0: halvings
            layers = []
            width = dim
            for _ in range(abs(doublings)):
                narrower = max(out_channels, width // 2)
                if doublings > 0:
                    layers.append(nn.ConvTranspose2d(width, narrower, 2, stride=2))
                else:
                    layers.append(nn.Conv2d(width, narrower, 3, stride=2, padding=1))
                layers += [group_norm(narrower), nn.GELU()]
                width = narrower
            layers += [nn.Conv2d(width, out_channels, 1), group_norm(out_channels)]
            self.levels.append(nn.Sequential(*layers))

    def forward(self, x):
        return [level(x) for level in self.levels]


def two_convolutions(inputs, outputs):
    """Make a stage of the usual U-Net: 3 × 3 convolution, norm and GELU, twice."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        group_norm(outputs),
        nn.GELU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        group_norm(outputs),
        nn.GELU(),
    )


class Segmenter(nn.Module):
    """SimpleFPN, then a U-Net decoder from coarse to fine. (B, 1, H, W) → logits (B, H, W)

    stages: channels of the decoder's four stages, as in the paper, at strides 1, 2, 4, 8. A stage's
    input joins the coarser map (2 × channels) and a skip map of its own stride (channels). The skip
    map is the ViT's, or at stride 1 the film's pixels, which keep edges exact.
    """

    def __init__(self, vit, stages=(8, 16, 32, 64)):
        super().__init__()
        self.vit = vit
        self.pixels = two_convolutions(1, stages[0])  # stage that reads the film's pixels
        self.fpn = SimpleFPN(vit.dim, vit.patch, [2 * channels for channels in stages])
        self.decoder = nn.ModuleList(
            two_convolutions(3 * channels, channels) for channels in stages
        )
        self.head = nn.Conv2d(stages[0], 1, 1)

    def forward(self, images, drop_noise=None):
        n = self.vit.grid
        tokens = self.vit(images, drop_noise=drop_noise)  # (B, N, D)
        maps = self.fpn(tokens.transpose(1, 2).reshape(len(images), -1, n, n))
        x = maps.pop()  # stride 16; the loop takes it to 8, 4, 2 and 1
        skips = [self.pixels((images - MEAN) / STD), *maps]
        for skip, stage in zip(reversed(skips), reversed(self.decoder), strict=True):
            x = F.interpolate(x, skip.shape[-2:], mode="bilinear", align_corners=False)
            x = stage(torch.cat([skip, x], 1))
        return self.head(x)[:, 0]
