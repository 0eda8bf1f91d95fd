"""Weights in and out: the authors' checkpoints, timm's both ways, junk and malicious files.

The authors' conventions are restated here by slow equations (tests/plain.py).
"""

import argparse
import importlib.util
import os
import pickle
import sys
from itertools import product
from unittest import mock

import numpy as np
import plain
import pytest
import torch

from augment import relative_coords
from model import CheXWorld, ViT
from plumbing.checkpoint import BadCheckpoint
from plumbing.weights import IMAGENET, from_official, load_encoder, load_world, to_timm

TINY = dict(
    image=32,
    patch=8,
    dim=32,
    depth=1,
    heads=4,
    predictor_dim=24,
    predictor_depth=1,
    predictor_heads=2,
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


@pytest.mark.parametrize("prefix", ["", "module."])
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
    assert error.value.one_line
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
        path.write_bytes(rng.bytes(1 + k % 40))
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
    theirs.eval().load_state_dict(to_timm(vit))
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
    assert same(to_timm(vit), theirs.state_dict())
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
def test_timm_weights_with_a_class_token_load(timm, tmp_path):
    theirs = small_timm(timm)
    head = {"head.weight": torch.zeros(5, 192), "head.bias": torch.zeros(5)}
    torch.save({"model": theirs.state_dict() | head}, tmp_path / "timm.pth")
    vit = load_encoder(tmp_path / "timm.pth")
    state = plain.arrays(theirs.state_dict())
    images = torch.rand(1, 1, 32, 32)
    rgb = np.repeat((images[0].double().numpy() - 0.5) / 0.5, 3, 0)
    # The first position is that of the class token.
    x = plain.embed_patches(rgb, state) + state["pos_embed"][0, 1:]
    for i in range(2):
        x = plain.block(x, state, f"blocks.{i}", 3)
    truth = plain.layer_norm(x, state, "norm")
    assert np.abs(vit(images)[0].detach().numpy() - truth).max() < 1e-4


@pytest.mark.slow
def test_timm_weights_without_a_final_norm_are_refused(timm, tmp_path):
    theirs = small_timm(timm, class_token=False, global_pool="avg")
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    with pytest.raises(BadCheckpoint, match="fc_norm=False"):
        load_encoder(tmp_path / "timm.pth")
