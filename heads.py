"""Heads on a pre-trained encoder: mean-pooled linear classifier, SimpleFPN + U-Net segmenter, and their layer-decayed parameter groups. (Sec. B.3)

Dimension key:  B images · N = n² patches · D encoder width · c classes · stride: film pixels a feature-map pixel
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


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


def layer_groups(model, weight_decay, layer_decay):
    """AdamW parameter groups {params, weight_decay, scale}: layer k of a ViT of L blocks learns at scale = layer_decay^(L + 1 - k); patch
    embedding k = 0, block i k = i + 1, final norm and head k = L + 1. Vectors (biases, norms) do not decay; frozen parameters are left out."""
    depth, groups = len(model.vit.blocks), {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        parts = name.split(".")
        layer = (
            0
            if parts[:2] == ["vit", "patch_embed"]
            else int(parts[2]) + 1
            if parts[:2] == ["vit", "blocks"]
            else depth + 1
        )
        decay = weight_decay if parameter.dim() > 1 else 0.0
        group = groups.setdefault(
            (layer, decay),
            {"params": [], "weight_decay": decay, "scale": layer_decay ** (depth + 1 - layer)},
        )
        group["params"].append(parameter)
    return list(groups.values())
