"""Weights in and out: the authors' checkpoints, timm's both ways, junk and malicious files.

The authors' conventions are restated here by slow equations (tests/plain.py).
"""

import argparse
import importlib.util
import json
import os
import pickle
import struct
import sys
from itertools import product
from unittest import mock

import numpy as np
import plain
import pytest
import torch
from worlds import TINY, make_batch, shaken, tensors

from augment import relative_coords
from model import SIZES, CheXWorld, ViT, take
from plumbing.checkpoint import BadCheckpoint, load_checkpoint
from plumbing.weights import (
    IMAGENET,
    find_origin,
    from_official,
    load_encoder,
    load_world,
    predictor_sizes,
    resized,
    start_world,
)

# The authors' networks, small.
SIZE = 32  # pixels
PATCH = 8
GRID = 4
DIM = 128
HEADS = 2
WIDTH = 96  # of the predictor
PREDICTOR_HEADS = 12


# ---------------------------------------------------------------- the authors' conventions
def official_state(seed=0, width=WIDTH):
    """A state dict with the authors' keys and shapes, random but for the fixed position tables."""
    rng = np.random.default_rng(seed)
    state = {}

    def layer(name, rows, cols):
        state[name + ".weight"] = rng.normal(size=(rows, cols)) / cols**0.5
        state[name + ".bias"] = rng.normal(size=rows) * 0.2

    def norm(name, dim):
        state[name + ".weight"] = 1 + 0.2 * rng.normal(size=dim)
        state[name + ".bias"] = 0.2 * rng.normal(size=dim)

    def blocks(name, dim):
        for block in (f"{name}.0", f"{name}.1"):
            norm(f"{block}.norm1", dim)
            norm(f"{block}.norm2", dim)
            layer(f"{block}.attn.qkv", 3 * dim, dim)
            layer(f"{block}.attn.proj", dim, dim)
            layer(f"{block}.mlp.fc1", 4 * dim, dim)
            layer(f"{block}.mlp.fc2", dim, 4 * dim)

    for part in ("encoder", "target_encoder"):
        state[f"{part}.patch_embed.proj.weight"] = rng.normal(size=(DIM, 3, PATCH, PATCH)) * 0.1
        state[f"{part}.patch_embed.proj.bias"] = rng.normal(size=DIM) * 0.2
        state[f"{part}.pos_embed"] = plain.mae_table(GRID, DIM)[None]
        blocks(f"{part}.blocks", DIM)
        norm(f"{part}.norm", DIM)
    layer("predictor.predictor_embed", width, DIM)
    layer("predictor.predictor_proj", DIM, width)
    state["predictor.mask_token"] = rng.normal(size=(1, 1, width))
    state["predictor.predictor_pos_embed"] = plain.mae_table(GRID, width)[None]
    blocks("predictor.predictor_blocks", width)
    norm("predictor.predictor_norm", width)
    for i, cols in ((0, width + 5), (2, width), (4, width)):
        layer(f"predictor.policy_net.{i}", width, cols)
    return {name: torch.from_numpy(array).float() for name, array in state.items()}


def official_encoder(grey, state, keep=None):
    """Theirs: the grey film as RGB, ImageNet-normalised. grey (H, W) → (K|N, D)"""
    channels = zip(*IMAGENET, strict=True)
    rgb = np.stack([(grey - mean) / std for mean, std in channels])
    return plain.vit(rgb, state, HEADS, keep)


def official_mask_coords(context_box, target_box, context_flip, target_flip):
    """Theirs: row = u + n Δ_i, col = v + n Δ_j, in raster order. → list of (row, col)

    Where a view is mirrored, the mirrored centre of the patch takes the place of v.
    """
    top, left, height, width = context_box
    di = (target_box[0] - top) / height
    dj = (target_box[1] - left) / width
    coords = []
    for u, v in product(range(GRID), range(GRID)):
        centre = GRID - (v + 0.5) if target_flip else v + 0.5
        col = centre + GRID * dj  # in the context crop before it is mirrored, from patch edges
        if context_flip:
            col = GRID - col
        coords.append((u + GRID * di, col - 0.5))
    return coords


def official_predictor(h, keep, coords, action, p):
    """Theirs, literally, for one image. h (K, D) → (N, D)

    Context tokens get MAE's table. Mask tokens get [sin, cos of the row, sin, cos of the column]
    (row half first) and five raw numbers of action.
    """
    half = p["mask_token"].size // 2
    context = plain.linear(h, p, "predictor_embed") + p["predictor_pos_embed"][0][keep]
    halves = [[plain.sincos_1d(row, half), plain.sincos_1d(col, half)] for row, col in coords]
    at = np.stack([np.concatenate(pair) for pair in halves])
    tokens = plain.policy(p["mask_token"][0] + at, np.append(action, 0.0), p, "policy_net")
    x = np.concatenate([context, tokens])
    for i in range(plain.depth_of(p, "predictor_blocks")):
        x = plain.block(x, p, f"predictor_blocks.{i}", PREDICTOR_HEADS)
    x = plain.layer_norm(x, p, "predictor_norm")[len(h) :]
    return plain.linear(x, p, "predictor_proj")


ACTIONS = [(1.0, 1.0, 1.0, 0.0), (0.7, 1.3, 1.8, 1.5), (1.2, 0.65, 0.55, 0.3)]


@pytest.mark.parametrize("width", [96, 48])
def test_authors_weights_compute_the_same_function(width):
    official = official_state(width=width)
    world = from_official(official, HEADS, PREDICTOR_HEADS)
    state = plain.arrays(official)
    encoder = plain.sub(state, "encoder.")
    target_encoder = plain.sub(state, "target_encoder.")
    predictor = plain.sub(state, "predictor.")
    rng = np.random.default_rng(1)
    films = rng.random((3, SIZE, SIZE))
    keep = np.stack([np.sort(rng.permutation(16)[:7]) for _ in range(3)])
    images = torch.from_numpy(films).float()[:, None]
    kept = torch.from_numpy(keep)
    target = np.stack([official_encoder(film, target_encoder) for film in films])
    h = np.stack([official_encoder(films[i], encoder, keep[i]) for i in range(3)])
    assert np.abs(world.target_encoder(images).numpy() - target).max() < 1e-4
    with torch.no_grad():
        ours = world.encoder(images, kept)
    assert np.abs(ours.numpy() - h).max() < 1e-4

    context_box = np.array([[10, 20, 100, 80], [3, 5, 90, 120], [0, 0, 64, 64.0]])
    target_box = np.array([[25, 0, 100, 80], [40, 61, 90, 120], [0, 0, 64, 64.0]])
    boxes = (torch.from_numpy(context_box), torch.from_numpy(target_box))
    for flips in ((False, False), (True, False), (False, True), (True, True)):
        truth = []
        for i in range(3):
            theirs = official_mask_coords(context_box[i], target_box[i], *flips)
            truth.append(official_predictor(h[i], keep[i], theirs, ACTIONS[i], predictor))
        truth = np.stack(truth)
        coords = relative_coords(*boxes, GRID, *(torch.tensor([flip] * 3) for flip in flips))
        with torch.no_grad():
            seen_at = world.own_coords[kept]
            guess = world.predictor(ours, seen_at, coords, torch.tensor(ACTIONS))
        assert np.abs(guess.numpy() - truth).max() < 1e-4 * max(1, np.abs(truth).max()), flips
    assert np.abs(truth).std() > 0.1  # the comparison is not of zeros


def test_mirrored_targets_of_the_same_box_run_backwards():
    box = np.array([3.0, 4, 50, 60])
    for flips in ((False, True), (True, False)):
        assert official_mask_coords(box, box, *flips)[:4] == [(0, 3), (0, 2), (0, 1), (0, 0)]


def test_authors_weights_still_differ_where_they_should():
    """The fold is no accident: without its swap of halves, predictions are far off."""
    official = official_state()
    world = from_official(official, HEADS, PREDICTOR_HEADS)
    images = torch.rand(1, 1, SIZE, SIZE)
    action = torch.tensor(ACTIONS[1:2])
    before = world.predict(images, action)
    with torch.no_grad():
        world.predictor.mask_token.copy_(official["predictor.mask_token"].flatten())
    assert (world.predict(images, action) - before).abs().max() > 1e-2


def test_authors_world_goes_on_training():
    world = from_official(official_state(), HEADS, PREDICTOR_HEADS)
    order = torch.stack([torch.randperm(16) for _ in range(2)])
    y, x = torch.rand(2, 2, 1, SIZE, SIZE)
    coords = torch.rand(2, 16, 2)
    losses, _ = world(y, x, order[:, :6], order[:, 8:], coords, torch.tensor(ACTIONS[:2]))
    losses["loss"].backward()
    for part in (world.encoder, world.predictor):
        assert all(p.grad is not None for p in part.parameters())
    assert not any(p.requires_grad for p in world.target_encoder.parameters())


# ---------------------------------------------------------------- files
def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.", "module._orig_mod.", "a."])
def test_authors_file(tmp_path, prefix):
    official = official_state()
    path = tmp_path / "chexworld_pretrained.tar"
    args = argparse.Namespace(lr=1e-3, data=["a", None], nested=argparse.Namespace(x=1))
    prefixed = {prefix + name: tensor for name, tensor in official.items()}
    torch.save({"model": prefixed, "epoch": 3, "args": args}, path)
    expected = from_official(official, HEADS, PREDICTOR_HEADS)
    world = load_world(path)
    assert world.config == expected.config
    assert same(world.state_dict(), expected.state_dict())
    assert same(load_encoder(path).state_dict(), expected.target_encoder.state_dict())
    assert same(load_encoder(path, "context").state_dict(), expected.encoder.state_dict())
    assert all(p.requires_grad for p in load_encoder(path).parameters())


def test_our_own_files(tmp_path):
    world = CheXWorld(**TINY)
    with torch.no_grad():
        world.target_encoder.norm.bias.add_(1)
    target = world.target_encoder
    run = tmp_path / "last.pt"
    encoder = tmp_path / "encoder.pt"
    torch.save({"world": world.state_dict(), "config": world.config, "step": 7}, run)
    torch.save({"encoder": target.state_dict(), "config": target.config}, encoder)
    loaded = load_world(run)
    assert loaded.config == world.config
    assert same(loaded.state_dict(), world.state_dict())
    assert same(load_encoder(run).state_dict(), target.state_dict())
    assert same(load_encoder(run, "context").state_dict(), world.encoder.state_dict())
    assert same(load_encoder(encoder).state_dict(), target.state_dict())
    with pytest.raises(BadCheckpoint, match="holds no predictor"):
        load_world(encoder)


class Evil:
    """Unpickled, it creates a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def saved(path, obj):
    torch.save(obj, path)


def resnet(path):
    weights = {"conv1.weight": torch.zeros(4, 3, 7, 7), "fc.bias": torch.zeros(3)}
    torch.save({"model": weights}, path)


def vit_with_a_hole(path):
    weights = official_state()
    holed = {name: weights[name] for name in weights if "blocks.1.attn" not in name}
    torch.save({"model": holed}, path)


def other_positions(path):
    zeros = {"predictor.predictor_pos_embed": torch.zeros(1, 16, WIDTH)}
    torch.save({"model": official_state() | zeros}, path)


def numpy_array(path):
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))


JUNK = {
    "missing": lambda path: None,
    "folder": lambda path: path.mkdir(),
    "empty": lambda path: path.write_bytes(b""),
    "four letters": lambda path: path.write_bytes(b"junk"),
    "a line": lambda path: path.write_bytes(b"junk\n"),
    "text": lambda path: path.write_text("these are not weights\n" * 50),
    "zeros": lambda path: path.write_bytes(bytes(4096)),
    "noise": lambda path: path.write_bytes(np.random.default_rng(0).bytes(4096)),
    "png": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100)),
    "zip": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)),
    "tensor": lambda path: saved(path, torch.zeros(3)),
    "list": lambda path: saved(path, [torch.zeros(3)]),
    "empty dict": lambda path: saved(path, {}),
    "model is a number": lambda path: saved(path, {"model": 3}),
    "model is a list": lambda path: saved(path, {"model": ["predictor.", "x"]}),
    "keys are numbers": lambda path: saved(path, {"model": {1: torch.zeros(2)}}),
    "numbers at the top": lambda path: saved(path, {1: torch.zeros(2)}),
    "world without config": lambda path: saved(path, {"world": {}}),
    "world is a number": lambda path: saved(path, {"world": 3, "config": TINY}),
    "world of another size": lambda path: saved(path, {"world": {}, "config": TINY}),
    "config that does not fit": lambda path: saved(path, {"encoder": {}, "config": dict(image=30)}),
    "unknown config": lambda path: saved(path, {"encoder": {}, "config": dict(colour="red")}),
    "a resnet": resnet,
    "a vit with a hole": vit_with_a_hole,
    "other positions": other_positions,
    "numpy array": numpy_array,
}


@pytest.mark.parametrize("load", [load_world, load_encoder])
@pytest.mark.parametrize("kind", JUNK)
def test_junk_is_one_line(tmp_path, kind, load):
    path = tmp_path / "weights.pt"
    JUNK[kind](path)
    with pytest.raises(BadCheckpoint) as error:
        load(path)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 400 + len(str(path))


def test_a_file_cut_anywhere_is_one_line(tmp_path):
    whole = tmp_path / "whole.pt"
    cut = tmp_path / "cut.pt"
    torch.save({"model": {"x": torch.zeros(300)}, "args": argparse.Namespace(a=1)}, whole)
    data = whole.read_bytes()
    for length in range(1, len(data), 97):
        cut.write_bytes(data[:length])
        with pytest.raises(BadCheckpoint):
            load_encoder(cut)


def test_random_bytes_never_raise_anything_else(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "noise.pt"
    for k in range(400):
        noise = rng.bytes(1 + k % 40)
        for content in (noise, noise[:8] + b"{" + noise[8:], noise[:2] + bytes(6) + b"{}" + noise):
            path.write_bytes(content)
            with pytest.raises(BadCheckpoint):
                load_encoder(path)


@pytest.mark.parametrize("how", ["whole", "in model", "in args", "legacy", "bare pickle"])
@pytest.mark.parametrize("load", [load_world, load_encoder])
def test_a_malicious_file_runs_nothing(tmp_path, how, load):
    path = tmp_path / "evil.tar"
    trap = tmp_path / "hacked"
    evil = Evil(trap)
    contents = {
        "whole": evil,
        "in model": {"model": {"encoder.x": evil}},
        "in args": {"model": official_state(), "args": argparse.Namespace(x=evil)},
        "legacy": {"model": {"encoder.x": evil}},
    }
    if how == "bare pickle":
        path.write_bytes(pickle.dumps(evil))
    else:
        is_zip = how != "legacy"
        torch.save(contents[how], path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(BadCheckpoint, match="nothing in it was run") as error:
        load(path)
    assert not trap.exists()
    assert "\n" not in str(error.value)


def test_the_trap_would_spring(tmp_path):
    """The malicious file is real: unpickled carelessly it does run its command."""
    pickle.loads(pickle.dumps(Evil(tmp_path / "hacked")))
    assert (tmp_path / "hacked").exists()


# ---------------------------------------------------------------- timm
TORCHVISION = [
    "torchvision",
    "torchvision.ops",
    "torchvision.ops.misc",
    "torchvision.transforms",
    "torchvision.transforms.functional",
    "torchvision.datasets",
    "torchvision.models",
    "torchvision.models.feature_extraction",
    "torchvision.utils",
]


@pytest.fixture(scope="module")
def timm():
    """timm, with a stand-in for torchvision where that is not installed.

    timm's vision transformers import torchvision and never use it.
    """
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    stand_ins = {}
    if importlib.util.find_spec("torchvision") is None:
        for name in TORCHVISION:
            stand_ins[name] = mock.MagicMock(__path__=[], __spec__=None)
    torch.manual_seed(0)  # imports what of torch looks for torchvision, too
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module("timm")
    finally:
        for name in stand_ins:
            del sys.modules[name]


@pytest.mark.slow
def test_timm_computes_the_same_features_from_our_vit_b(timm):
    torch.manual_seed(0)
    vit = ViT()  # ViT-B/16, 224
    settings = dict(in_chans=1, class_token=False, global_pool="avg", fc_norm=False, num_classes=0)
    theirs = timm.create_model("vit_base_patch16_224", **settings)
    theirs.eval().load_state_dict(vit.state_dict())
    images = torch.rand(1, 1, 224, 224)
    with torch.no_grad():
        assert (theirs((images - 0.5) / 0.25) - vit(images).mean(1)).abs().max() < 1e-5


def small_timm(timm, **kwargs):
    """A ViT-Ti of two blocks for 32 × 32 images, every weight shaken."""
    torch.manual_seed(1)
    size = dict(img_size=32, patch_size=8, depth=2, num_classes=0)
    model = timm.create_model("vit_tiny_patch16_224", **size, **kwargs).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


@pytest.mark.slow
def test_timm_there_and_back(timm, tmp_path):
    theirs = small_timm(timm, in_chans=1, class_token=False, global_pool="avg", fc_norm=False)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    vit = load_encoder(tmp_path / "timm.pth")
    images = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        assert (theirs((images - 0.5) / 0.25) - vit(images).mean(1)).abs().max() < 1e-5
    assert same(vit.state_dict(), theirs.state_dict())
    assert vit.config == dict(image=32, patch=8, dim=192, depth=2, heads=3)


@pytest.mark.slow
def test_timm_weights_in_rgb_fold_exactly(timm, tmp_path):
    theirs = small_timm(timm, class_token=False, global_pool="avg", fc_norm=False)
    prefixed = {"module." + name: tensor for name, tensor in theirs.state_dict().items()}
    torch.save(prefixed, tmp_path / "timm.pth")
    images = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        # timm's ViTs: three channels, mean and deviation 0.5.
        truth = theirs.forward_features((images.expand(-1, 3, -1, -1) - 0.5) / 0.5)
        assert (load_encoder(tmp_path / "timm.pth")(images) - truth).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "vit_small_patch16_224.dino",
        "vit_small_patch14_reg4_dinov2",
        "vit_small_patch14_dinov2",
        "deit3_small_patch16_224",
        "deit_tiny_distilled_patch16_224",
    ],
)
def test_tokens_and_layer_scale_compute_the_same_features_as_timm(timm, tmp_path, name):
    torch.manual_seed(1)
    theirs = timm.create_model(name, depth=2, num_classes=0, img_size=28, patch_size=7).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.05 * torch.randn_like(p))
    torch.save({"model": theirs.state_dict()}, tmp_path / "timm.pth")
    images = torch.rand(2, 1, 28, 28)
    mean, std = torch.tensor(IMAGENET).view(2, 3, 1, 1)
    with torch.no_grad():
        truth = theirs.forward_features((images.expand(-1, 3, -1, -1) - mean) / std)
        features = load_encoder(tmp_path / "timm.pth")(images)
    assert (features - truth[:, -16:]).abs().max() < 1e-4


@pytest.mark.slow
def test_timm_weights_with_a_class_head_expect_its_own_colours(timm, tmp_path):
    theirs = small_timm(timm)
    head = {"head.weight": torch.zeros(5, 192), "head.bias": torch.zeros(5)}
    torch.save({"model": theirs.state_dict() | head}, tmp_path / "timm.pth")
    images = torch.rand(2, 1, 32, 32)
    said = []
    with torch.no_grad():
        truth = theirs.forward_features((images.expand(-1, 3, -1, -1) - 0.5) / 0.5)[:, 1:]
        vit = load_encoder(tmp_path / "timm.pth", say=said.append)
    assert (vit(images) - truth).abs().max() < 1e-4
    assert "0.5" in said[0] and "left aside: model.head" in said[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, why",
    [
        ("beit_base_patch16_224", "BEiT"),
        ("swin_tiny_patch4_window7_224", "pos_embed"),
        ("vit_small_patch16_dinov3", "pos_embed"),
        ("vit_base_patch16_clip_224", "patch_embed.proj.bias"),
        ("resnet18", "patch_embed.proj.weight among"),
    ],
)
def test_networks_that_are_built_otherwise_are_refused_by_name(timm, tmp_path, name, why):
    path = tmp_path / "other.pth"
    depth = {} if name[:3] in ("swi", "res") else {"depth": 1}
    torch.save(timm.create_model(name, num_classes=0, **depth).state_dict(), path)
    with pytest.raises(BadCheckpoint, match=why) as error:
        load_encoder(path)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_timm_weights_without_a_final_norm_are_refused(timm, tmp_path):
    theirs = small_timm(timm, class_token=False, global_pool="avg")
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    with pytest.raises(BadCheckpoint, match="fc_norm=False"):
        load_encoder(tmp_path / "timm.pth")


# ---------------------------------------------------------------- other papers' files
RGB = 32  # px, four patches of 8 per side
CHEST = ([0.53] * 3, [0.26] * 3)  # as a preprocessor_config.json may say


def baseline_state(tokens=("cls_token",), dim=64, has_scale=False, positions=None, registers=3):
    """Random weights of a ViT of two blocks, under timm's names and as float32 tensors."""
    rng = np.random.default_rng(5)
    full = official_state()
    names = [name for name in full if name.startswith("encoder.")]
    shapes = {name.removeprefix("encoder."): full[name].shape for name in names}
    state = {}
    for name, shape in shapes.items():
        shape = [size * dim // DIM if size >= DIM else size for size in shape]
        fan = int(np.prod(shape[1:])) if len(shape) > 1 else 10
        state[name] = rng.normal(size=shape) / fan**0.5 + name.endswith("norm.weight")
    if positions is None:
        positions = rng.normal(size=(GRID * GRID + 1, dim))
    state["pos_embed"] = positions[None]
    for name in tokens:
        count = 1 if name == "cls_token" else registers
        state[name] = rng.normal(size=(1, count, dim))
    if has_scale:
        for block, k in product(range(2), (1, 2)):
            state[f"blocks.{block}.ls{k}.gamma"] = rng.normal(size=dim)
    return {name: torch.from_numpy(np.asarray(array)).float() for name, array in state.items()}


def baseline_features(grey, state, heads, rgb=IMAGENET):
    """The published forward pass, in words: float64, one image. grey (H, W) → patches (N, D)"""
    p = plain.arrays(state)
    channels = np.stack([(grey - mean) / std for mean, std in zip(*rgb, strict=True)])
    x = np.concatenate([p["cls_token"][0], plain.embed_patches(channels, p)]) + p["pos_embed"][0]
    registers = p.get("register_tokens", np.zeros((1, 0, x.shape[1])))[0]
    x = np.concatenate([x[:1], registers, x[1:]])
    for i in range(2):
        name = f"blocks.{i}"
        first = p.get(f"{name}.ls1.gamma", 1.0)
        second = p.get(f"{name}.ls2.gamma", 1.0)
        normed = plain.layer_norm(x, p, name + ".norm1")
        x = x + first * plain.attention(normed, p, name + ".attn", heads)
        # plain.block without attention: its own residual is taken off again.
        silent = p | {f"{name}.attn.proj.{k}": 0 * p[f"{name}.attn.proj.{k}"] for k in WB}
        x = x + second * (plain.block(x, silent, name, heads) - x)
    return plain.layer_norm(x, p, "norm")[-GRID * GRID :]


WB = ("weight", "bias")


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def decoder(dim=64):
    """What MAE's full checkpoint holds beside the encoder."""
    names = ["decoder_embed.weight", "decoder_blocks.0.attn.qkv.weight", "decoder_pred.bias"]
    return {name: torch.ones(4) for name in [*names, "decoder_pos_embed", "mask_token"]}


def moco_file(state):
    """MoCo-v3's .pth.tar: both encoders, their heads, the optimizer."""
    other = {name: tensor + 1 for name, tensor in state.items()}
    head = {"head.0.weight": torch.ones(3, 64), "head.1.running_mean": torch.ones(3)}
    model = prefixed("module.base_encoder.", state | head)
    model |= prefixed("module.momentum_encoder.", other | head)
    model |= {"module.predictor.0.weight": torch.ones(2, 2)}
    adam = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-3}]}
    return {"epoch": 300, "arch": "vit_base", "state_dict": model, "optimizer": adam, "scaler": {}}


def dino_file(state):
    """DINO's full checkpoint: a student that is wrapped, a teacher that is not."""
    head = {"head.mlp.0.weight": torch.ones(3, 64)}
    other = {name: tensor + 1 for name, tensor in state.items()}
    return {
        "student": prefixed("module.", prefixed("backbone.", other) | head),
        "teacher": prefixed("backbone.", state) | head,
        "epoch": 9,
        "args": argparse.Namespace(arch="vit_small", lr=np.float64(1e-3)),
        "dino_loss": {"center": torch.zeros(1, 3)},
    }


def hugging_face(state):
    """The names of Dinov2Model: query, key and value apart."""
    renamed = {}
    for name, tensor in state.items():
        for ours, theirs in (
            ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
            ("pos_embed", "embeddings.position_embeddings"),
            ("cls_token", "embeddings.cls_token"),
            ("register_tokens", "embeddings.register_tokens"),
            ("blocks.", "encoder.layer."),
            ("attn.proj", "attention.output.dense"),
            ("ls1.gamma", "layer_scale1.lambda1"),
            ("ls2.gamma", "layer_scale2.lambda1"),
        ):
            name = name.replace(ours, theirs)
        if name.startswith("norm."):
            name = "layer" + name
        if "attn.qkv" in name:
            for word, part in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[name.replace("attn.qkv", f"attention.attention.{word}")] = part.clone()
        else:
            renamed[name] = tensor
    return renamed | {"embeddings.mask_token": torch.zeros(1, 64)}


def chunked(state):
    """DINOv2's names while it trains: blocks in groups."""
    return {name.replace("blocks.", "blocks.0."): tensor for name, tensor in state.items()}


def write_safetensors(path, state):
    """Eight bytes of length, JSON, raw bytes: the format as published."""
    header = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, tensor in state.items():
        raw = tensor.numpy().tobytes()
        place = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": place}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


MAE_TABLE = np.concatenate([np.zeros((1, 64)), plain.mae_table(GRID, 64)])
PLAIN = baseline_state()
MAE = baseline_state(positions=MAE_TABLE)
DINOV2 = baseline_state(has_scale=True)
REGISTERS = baseline_state(("cls_token", "register_tokens"), has_scale=True)
LAYOUTS = {  # the file, the state that it holds
    "MoCo-v3": (moco_file(PLAIN), PLAIN),
    "DINO, full": (dino_file(PLAIN), PLAIN),
    "DINO, teacher alone": ({"teacher": prefixed("module.backbone.", PLAIN)}, PLAIN),
    "DINO, the bare ViT": (PLAIN, PLAIN),
    "MAE": ({"model": MAE}, MAE),
    "MAE with its decoder": ({"model": MAE | decoder(), "epoch": 799}, MAE),
    "DINOv2": (DINOV2 | {"mask_token": torch.zeros(1, 64)}, DINOV2),
    "DINOv2 with registers": (REGISTERS, REGISTERS),
    "DINOv2, training's teacher": ({"teacher": prefixed("backbone.", chunked(DINOV2))}, DINOV2),
    "Dinov2Model": (hugging_face(DINOV2), DINOV2),
    "Dinov2WithRegistersModel": (hugging_face(REGISTERS), REGISTERS),
    "half precision": ({"model": {k: v.bfloat16() for k, v in MAE.items()}}, None),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts_compute_the_published_features(tmp_path, layout):
    content, state = LAYOUTS[layout]
    if state is None:
        state = {name: tensor.float() for name, tensor in content["model"].items()}
    torch.save(content, tmp_path / "weights.pth")
    vit = load_encoder(tmp_path / "weights.pth").eval()
    films = np.random.default_rng(2).random((2, RGB, RGB))
    images = torch.from_numpy(films).float()[:, None]
    truth = np.stack([baseline_features(film, state, 1) for film in films])
    with torch.no_grad():
        assert np.abs(vit(images).numpy() - truth).max() < 1e-4
        keep = torch.arange(GRID * GRID).expand(2, -1)
        assert torch.allclose(vit(images, keep), vit(images), atol=1e-5)
    assert vit.config["tokens"] == 1 + 3 * ("register_tokens" in state)
    fixed = "MAE" in layout or layout == "half precision"
    assert isinstance(vit.pos_embed, torch.nn.Parameter) != fixed  # trained, as they were


def test_moco_v3_small_has_twelve_heads(tmp_path):
    """Its table of positions, columns and rows exchanged, tells it from others of its width."""
    grid = plain.grid(GRID)[:, ::-1]
    table = np.concatenate([np.zeros((1, 384)), plain.positions(grid, 384)])
    for heads, positions in ((12, table), (6, None)):
        state = baseline_state(dim=384, positions=positions)
        torch.save(moco_file(state), tmp_path / "moco.pth.tar")
        vit = load_encoder(tmp_path / "moco.pth.tar").eval()
        film = np.random.default_rng(2).random((RGB, RGB))
        with torch.no_grad():
            features = vit(torch.from_numpy(film).float()[None, None])[0].numpy()
        assert np.abs(features - baseline_features(film, state, heads)).max() < 1e-4


@pytest.mark.parametrize("layout", ["Dinov2Model", "DINOv2 with registers"])
def test_safetensors_with_their_colours_beside_them(tmp_path, layout):
    content, state = LAYOUTS[layout]
    path = tmp_path / "model.safetensors"
    write_safetensors(path, content)
    colours = {"image_mean": CHEST[0], "image_std": CHEST[1]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(colours))
    said = []
    vit = load_encoder(path, say=said.append)
    film = np.random.default_rng(2).random((RGB, RGB))
    with torch.no_grad():
        features = vit(torch.from_numpy(film).float()[None, None])[0].numpy()
    assert np.abs(features - baseline_features(film, state, 1, CHEST)).max() < 1e-4
    assert "mean [0.53, 0.53, 0.53] and std [0.26, 0.26, 0.26]" in said[0]
    assert ("left aside: mask_token" in said[0]) == (layout == "Dinov2Model")
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
    with torch.no_grad():
        features = load_encoder(path)(torch.from_numpy(film).float()[None, None])[0].numpy()
    assert np.abs(features - baseline_features(film, state, 4, CHEST)).max() < 1e-4
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadCheckpoint, match="cut short"):
        load_encoder(path)


WRAPPERS = ["module.", "_orig_mod.", "teacher.backbone.", "target_encoder.module.", "backbone."]
WRAPPERS += ["encoder.", "model.", "student.", "net.vit."]


@pytest.mark.parametrize("first", WRAPPERS)
@pytest.mark.parametrize("second", ["", *WRAPPERS])
def test_prefixes_in_any_order_are_taken_off(tmp_path, first, second):
    torch.save({"model": prefixed(first + second, MAE)}, tmp_path / "a.pth")
    torch.save({"model": MAE}, tmp_path / "b.pth")
    loaded = load_encoder(tmp_path / "a.pth").state_dict()
    assert same(loaded, load_encoder(tmp_path / "b.pth").state_dict())


def test_of_several_encoders_the_teacher_is_taken_and_named(tmp_path):
    said = []
    torch.save(dino_file(PLAIN), tmp_path / "dino.pth")
    load_encoder(tmp_path / "dino.pth", say=said.append)
    assert len(said) == 1
    assert "encoder: teacher.backbone" in said[0]
    for name in ("student.backbone", "student.head", "teacher.head"):
        assert name in said[0].split("left aside: ")[1]
    other = {name: tensor + 1 for name, tensor in PLAIN.items()}
    torch.save({"left": PLAIN, "right": other}, tmp_path / "two.pth")
    with pytest.raises(BadCheckpoint, match="several encoders, left., right."):
        load_encoder(tmp_path / "two.pth")


@pytest.mark.parametrize(
    "extra, why",
    [
        ({"blocks.0.attn.relative_position_bias_table": torch.ones(3)}, "BEiT"),
        ({"blocks.0.attn.q_norm.weight": torch.ones(64)}, "q_norm"),
        ({"blocks.1.mlp.fc1.weight": torch.ones(100, 64)}, "other shapes: blocks.1.mlp.fc1.weight"),
        ({"adapter.weight": torch.ones(3)}, "adapter.weight"),
        ({"module.norm.bias": torch.ones(64)}, "two tensors are called norm.bias"),
        ({"pos_embed": torch.ones(1, 20, 64)}, "20 positions"),
        ({"pos_embed": None}, "no pos_embed"),
        ({"cls_token": None}, "17 positions"),
        ({"norm.weight": None}, "fc_norm"),
        ({"blocks.1.attn.proj.bias": None}, "no such layers: blocks.1.attn.proj.bias"),
    ],
)
def test_nothing_unknown_is_left_out_without_a_word(tmp_path, extra, why):
    changed = PLAIN | extra
    state = {name: tensor for name, tensor in changed.items() if tensor is not None}
    torch.save({"model": state}, tmp_path / "odd.pth")
    with pytest.raises(BadCheckpoint, match=why) as error:
        load_encoder(tmp_path / "odd.pth")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("state", [MAE, PLAIN, REGISTERS])
def test_baselines_are_resized_with_all_that_is_theirs(tmp_path, state):
    torch.save({"model": state}, tmp_path / "weights.pth")
    vit = load_encoder(tmp_path / "weights.pth")
    assert same(resized(vit, RGB, 8).state_dict(), vit.state_dict())
    larger = resized(vit, 2 * RGB, 16, drop_path=0.2)
    film = torch.rand(1, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    with torch.no_grad():  # a film of flat patches, twice as large, in patches twice as large
        twice = film.repeat_interleave(2, 2).repeat_interleave(2, 3)
        assert (larger.eval()(twice) - vit.eval()(film)).abs().max() < 0.1
    finer = resized(vit, RGB, 4)
    assert finer.pos_embed.shape == (1, 64, 64)
    assert torch.equal(finer.tokens, vit.tokens)
    if state is MAE:
        middle = plain.positions([(0.25, 0.75)], 64)[0]  # of the second row, fourth column
        assert np.abs(finer.pos_embed[0, 8 + 2].detach().numpy() - middle).max() < 1e-5


# ---------------------------------------------------------------- what lies beside the tensors
class Scheduler:
    """A class that a checkpoint of somebody's program may hold."""


def test_harmless_things_beside_the_weights_are_read(tmp_path):
    beside = {
        "best": np.float64(0.91),
        "step": np.int32(7),
        "done": np.bool_(True),
        "name": np.str_("vit"),
        "random": np.random.RandomState(0).get_state(),
        "args": argparse.Namespace(lr=np.float32(0.5)),
        "kind": np.dtype("float32"),
    }
    torch.save({"model": MAE, **beside}, tmp_path / "a.pth")
    loaded = load_checkpoint(tmp_path / "a.pth")
    for name in ("best", "step", "done", "name", "args", "kind"):
        assert loaded[name] == beside[name], name
    assert np.array_equal(loaded["random"][1], beside["random"][1])
    load_encoder(tmp_path / "a.pth")


@pytest.mark.parametrize("core", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_scalars_of_numpy_1_and_2_are_read(tmp_path, core):
    """A pickle that asks for NumPy's function under the name that it has in that version."""
    path = tmp_path / "a.pth"
    torch.save({"model": MAE, "best": np.float64(0.91)}, path, _use_new_zipfile_serialization=False)
    ours = np.float64(0).__reduce__()[0].__module__.encode()
    path.write_bytes(path.read_bytes().replace(ours, core.encode()))
    assert load_checkpoint(path)["best"] == 0.91


@pytest.mark.parametrize(
    "thing, name", [(Scheduler(), "Scheduler"), (len, "len"), (torch.nn.Linear(2, 2), "Linear")]
)
def test_a_refusal_names_what_is_no_tensor(tmp_path, thing, name):
    torch.save({"model": MAE, "scheduler": thing}, tmp_path / "a.pth")
    with pytest.raises(BadCheckpoint, match=rf"holds a \S*{name}, which is not a tensor") as error:
        load_encoder(tmp_path / "a.pth")
    assert "\n" not in str(error.value)
    assert "weights_only=False" in str(error.value)  # what to do


# ---------------------------------------------------------------- where a pre-training starts
def losses_of(world, films=3, grid=4, side=32):
    batch = tensors(make_batch(films, grid, side))
    with torch.no_grad():
        losses, pooled = world.eval()(**batch)
    return torch.stack(list(losses.values())), pooled


def test_a_world_that_goes_on_predicts_at_its_first_step_what_it_predicted(tmp_path):
    """A run's world, whose encoders differ, and the authors'."""
    world = shaken(CheXWorld(**TINY))
    shaken(world.target_encoder, seed=1)
    ours = {"world": world.state_dict(), "config": world.config, "step": 7}
    for k, obj in enumerate((ours, {"model": official_state()})):
        path = tmp_path / f"{k}.pt"
        torch.save(obj, path)
        origin = find_origin(path, tmp_path / "out")
        assert origin.settings()["image"] == 32 and origin.steps_alone(32, 8, 100) == 0
        begun = start_world(origin, 32, 8, 0.0)
        loaded = load_world(path)
        for mine, theirs in zip(losses_of(begun), losses_of(loaded), strict=True):
            assert torch.equal(mine, theirs)
        assert not any(p.requires_grad for p in begun.target_encoder.parameters())
        assert all(p.requires_grad for p in begun.encoder.parameters())
        again = tmp_path / "again.pt"  # what it would save is read like any run
        torch.save({"world": begun.state_dict(), "config": begun.config, "step": 1}, again)
        assert same(load_world(again).state_dict(), loaded.state_dict())


@pytest.mark.parametrize("state", [MAE, PLAIN, REGISTERS])
def test_another_papers_encoder_begins_a_world(tmp_path, state):
    """With class token, registers, layer scale, learned positions: as targets and in part."""
    path = tmp_path / "weights.pth"
    torch.save({"model": state}, path)
    origin = find_origin(path, tmp_path / "out")
    assert origin.predictor is None and origin.steps_alone(RGB, 8, 100) == 10
    torch.manual_seed(0)
    world = start_world(origin, RGB, 8, 0.0)
    vit = load_encoder(path)
    film = torch.rand(2, 1, RGB, RGB)
    order = torch.stack([torch.randperm(16), torch.randperm(16)])
    with torch.no_grad():
        all_patches = vit(film)
        assert torch.equal(world.target_encoder(film), all_patches)
        seen = world.encoder(film, order)  # all, in another order: attention does not know orders
        assert (seen - take(all_patches, order)).abs().max() < 1e-4
    losses, _ = world(**tensors(make_batch(3, 4, RGB)))
    losses["loss"].backward()
    trained = [*world.encoder.parameters(), *world.predictor.parameters()]
    assert all(torch.isfinite(p.grad).all() for p in trained)
    torch.save({"world": world.state_dict(), "config": world.config, "step": 1}, tmp_path / "run")
    again = load_world(tmp_path / "run")
    assert same(again.state_dict(), world.state_dict())
    assert torch.equal(losses_of(again)[0], losses_of(world)[0])


def test_an_encoder_of_an_unusual_size_gets_the_predictor_of_the_next_narrower():
    for dim, sizes in ((64, "tiny"), (192, "tiny"), (384, "small"), (1280, "large")):
        names = ("predictor_dim", "predictor_depth", "predictor_heads")
        assert predictor_sizes(dim) == {name: SIZES[sizes][name] for name in names}
