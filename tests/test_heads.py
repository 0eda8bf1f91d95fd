"""Heads: shapes at every stride, gradients, frozen encoders, and layer decay against a table written by hand."""

import pytest
import torch

from finetune import layer_groups
from model import Classifier, Segmenter, SimpleFPN, ViT


def tiny(image=32, patch=8, depth=2):
    torch.manual_seed(0)
    return ViT(image, patch, dim=16, depth=depth, heads=2)


def test_classifier_is_the_mean_token_through_a_linear_layer():
    model = Classifier(tiny(), 3)
    images = torch.rand(2, 1, 32, 32)
    tokens = model.vit(images)
    by_hand = (
        torch.stack([sum(tokens[b, k] for k in range(16)) / 16 for b in range(2)])
        @ model.head.weight.T
        + model.head.bias
    )
    assert torch.allclose(model(images), by_hand, atol=1e-5)


@pytest.mark.parametrize("image, patch", [(64, 16), (64, 8), (64, 4), (56, 8), (224, 32)])
def test_fpn_has_strides_4_to_32_and_the_segmenter_one_logit_a_pixel(image, patch):
    vit = tiny(image, patch, depth=1)
    maps = SimpleFPN(16, patch, (8, 16, 32, 64))(torch.rand(1, 16, vit.grid, vit.grid))
    for stride, channels, x in zip((4, 8, 16, 32), (8, 16, 32, 64), maps):
        assert x.shape[1] == channels and abs(x.shape[-1] - image / stride) < 1  # odd maps round up
    model = Segmenter(vit)
    out = model(torch.rand(2, 1, image, image))
    assert out.shape == (2, image, image)
    out.square().mean().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0
        for n, p in model.named_parameters()
        if n != "vit.pos_embed"
    )


def test_segmenter_learns_a_bright_square():
    torch.manual_seed(0)
    images, masks = torch.rand(8, 1, 32, 32) * 0.3, torch.zeros(8, 32, 32)
    for k in range(8):
        images[k, 0, 4 + k : 16 + k, 6:20] += 0.6
        masks[k, 4 + k : 16 + k, 6:20] = 1
    model = Segmenter(tiny())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(images), masks)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    guess = model(images) > 0
    assert 2 * (guess & (masks > 0)).sum() / (guess.sum() + masks.sum()) > 0.85


# decay 0.5, two blocks: layer 0 → 0.5³, layer 1 → 0.5², layer 2 → 0.5, norm and head → 1; matrices decay, vectors do not
BY_HAND = {
    "vit.patch_embed.proj.weight": (0.125, 0.05),
    "vit.patch_embed.proj.bias": (0.125, 0.0),
    "vit.blocks.0.norm1.weight": (0.25, 0.0),
    "vit.blocks.0.norm1.bias": (0.25, 0.0),
    "vit.blocks.0.attn.qkv.weight": (0.25, 0.05),
    "vit.blocks.0.attn.qkv.bias": (0.25, 0.0),
    "vit.blocks.0.attn.proj.weight": (0.25, 0.05),
    "vit.blocks.0.attn.proj.bias": (0.25, 0.0),
    "vit.blocks.0.norm2.weight": (0.25, 0.0),
    "vit.blocks.0.norm2.bias": (0.25, 0.0),
    "vit.blocks.0.mlp.fc1.weight": (0.25, 0.05),
    "vit.blocks.0.mlp.fc1.bias": (0.25, 0.0),
    "vit.blocks.0.mlp.fc2.weight": (0.25, 0.05),
    "vit.blocks.0.mlp.fc2.bias": (0.25, 0.0),
    "vit.blocks.1.norm1.weight": (0.5, 0.0),
    "vit.blocks.1.norm1.bias": (0.5, 0.0),
    "vit.blocks.1.attn.qkv.weight": (0.5, 0.05),
    "vit.blocks.1.attn.qkv.bias": (0.5, 0.0),
    "vit.blocks.1.attn.proj.weight": (0.5, 0.05),
    "vit.blocks.1.attn.proj.bias": (0.5, 0.0),
    "vit.blocks.1.norm2.weight": (0.5, 0.0),
    "vit.blocks.1.norm2.bias": (0.5, 0.0),
    "vit.blocks.1.mlp.fc1.weight": (0.5, 0.05),
    "vit.blocks.1.mlp.fc1.bias": (0.5, 0.0),
    "vit.blocks.1.mlp.fc2.weight": (0.5, 0.05),
    "vit.blocks.1.mlp.fc2.bias": (0.5, 0.0),
    "vit.norm.weight": (1.0, 0.0),
    "vit.norm.bias": (1.0, 0.0),
    "head.weight": (1.0, 0.05),
    "head.bias": (1.0, 0.0),
}


def test_layer_decay_is_the_table_written_by_hand():
    model = Classifier(tiny(), 2)
    names = {id(p): n for n, p in model.named_parameters()}
    got = {
        names[id(p)]: (g["scale"], g["weight_decay"])
        for g in layer_groups(model, 0.05, 0.5)
        for p in g["params"]
    }
    assert got == {n: (pytest.approx(s), d) for n, (s, d) in BY_HAND.items()}


def test_frozen_parameters_are_in_no_group_and_fpn_learns_at_full_rate():
    model = Segmenter(tiny())
    model.vit.requires_grad_(False)
    groups = layer_groups(model, 0.05, 0.5)
    assert {g["scale"] for g in groups} == {1.0}
    assert {id(p) for g in groups for p in g["params"]} == {
        id(p) for n, p in model.named_parameters() if not n.startswith("vit.")
    }
