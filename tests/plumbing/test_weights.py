"""Weights in and out: the authors' checkpoints against a slow re-statement of their conventions, timm both ways, junk and malicious files."""

import argparse
import importlib.util
import os
import pickle
import sys
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
SIZE, PATCH, DIM, HEADS, WIDTH, PREDICTOR_HEADS, GRID = 32, 8, 128, 2, 96, 12, 4


# ------------------------------------------------------------------------------------------------ the authors' conventions
def official_state(seed=0, width=WIDTH):
    """A state dict with the authors' keys and shapes, random but for the fixed position tables."""
    rng = np.random.default_rng(seed)
    state = {}

    def layer(name, rows, cols):
        state[name + ".weight"], state[name + ".bias"] = (
            rng.normal(size=(rows, cols)) / cols**0.5,
            rng.normal(size=rows) * 0.2,
        )

    def norm(name, dim):
        state[name + ".weight"], state[name + ".bias"] = (
            1 + 0.2 * rng.normal(size=dim),
            0.2 * rng.normal(size=dim),
        )

    def blocks(name, depth, dim):
        for i in range(depth):
            norm(f"{name}.{i}.norm1", dim), norm(f"{name}.{i}.norm2", dim)
            layer(f"{name}.{i}.attn.qkv", 3 * dim, dim), layer(f"{name}.{i}.attn.proj", dim, dim)
            layer(f"{name}.{i}.mlp.fc1", 4 * dim, dim), layer(f"{name}.{i}.mlp.fc2", dim, 4 * dim)

    for part in ("encoder", "target_encoder"):
        state[f"{part}.patch_embed.proj.weight"] = rng.normal(size=(DIM, 3, PATCH, PATCH)) * 0.1
        state[f"{part}.patch_embed.proj.bias"] = rng.normal(size=DIM) * 0.2
        state[f"{part}.pos_embed"] = plain.mae_table(GRID, DIM)[None]
        blocks(f"{part}.blocks", 2, DIM), norm(f"{part}.norm", DIM)
    layer("predictor.predictor_embed", width, DIM), layer("predictor.predictor_proj", DIM, width)
    state["predictor.mask_token"] = rng.normal(size=(1, 1, width))
    state["predictor.predictor_pos_embed"] = plain.mae_table(GRID, width)[None]
    blocks("predictor.predictor_blocks", 2, width), norm("predictor.predictor_norm", width)
    for i, cols in ((0, width + 5), (2, width), (4, width)):
        layer(f"predictor.policy_net.{i}", width, cols)
    return {k: torch.from_numpy(v).float() for k, v in state.items()}


def official_encoder(grey, state, keep=None):
    """Theirs: the grey film as RGB, ImageNet-normalised. grey (H, W) → (K|N, D)"""
    rgb = np.stack([(grey - mean) / std for mean, std in zip(*IMAGENET)])
    return plain.vit(rgb, state, HEADS, keep)


def official_mask_coords(context_box, target_box, context_flip, target_flip):
    """row = u + n Δ_i, col = v + n Δ_j; where a view is mirrored, the mirrored centre takes the place of v. → list of (row, col)"""
    top, left, height, width = context_box
    di, dj = (target_box[0] - top) / height, (target_box[1] - left) / width
    out = []
    for u in range(GRID):
        for v in range(GRID):
            col = (
                GRID - (v + 0.5) if target_flip else v + 0.5
            ) + GRID * dj  # in the unmirrored context crop, patch edges
            out.append((u + GRID * di, (GRID - col if context_flip else col) - 0.5))
    return out


def official_predictor(h, keep, coords, action, p):
    """Theirs, literally: context tokens get MAE's table, mask tokens [sin, cos of the row, sin, cos of the column] (row half
    first) and five raw numbers of action."""
    width = p["mask_token"].size
    context = plain.linear(h, p, "predictor_embed") + p["predictor_pos_embed"][0][keep]
    at = np.stack(
        [
            np.concatenate([plain.sincos_1d(row, width // 2), plain.sincos_1d(col, width // 2)])
            for row, col in coords
        ]
    )
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
    world, state = from_official(official, HEADS, PREDICTOR_HEADS), plain.arrays(official)
    rng = np.random.default_rng(1)
    films, keep = (
        rng.random((3, SIZE, SIZE)),
        np.stack([np.sort(rng.permutation(16)[:7]) for _ in range(3)]),
    )
    images = torch.from_numpy(films).float()[:, None]
    target = np.stack([official_encoder(f, plain.sub(state, "target_encoder.")) for f in films])
    h = np.stack(
        [official_encoder(f, plain.sub(state, "encoder."), k) for f, k in zip(films, keep)]
    )
    assert np.abs(world.target_encoder(images).numpy() - target).max() < 1e-4
    with torch.no_grad():
        ours = world.encoder(images, torch.from_numpy(keep))
    assert np.abs(ours.numpy() - h).max() < 1e-4

    context_box = np.array([[10, 20, 100, 80], [3, 5, 90, 120], [0, 0, 64, 64.0]])
    target_box = np.array([[25, 0, 100, 80], [40, 61, 90, 120], [0, 0, 64, 64.0]])
    for flips in ((False, False), (True, False), (False, True), (True, True)):
        context_flip, target_flip = (torch.tensor([f] * 3) for f in flips)
        coords = relative_coords(
            torch.from_numpy(context_box),
            torch.from_numpy(target_box),
            GRID,
            context_flip,
            target_flip,
        )
        theirs = [official_mask_coords(c, t, *flips) for c, t in zip(context_box, target_box)]
        truth = np.stack(
            [
                official_predictor(
                    h[i], keep[i], theirs[i], ACTIONS[i], plain.sub(state, "predictor.")
                )
                for i in range(3)
            ]
        )
        with torch.no_grad():
            guess = world.predictor(
                ours, world.own_coords[torch.from_numpy(keep)], coords, torch.tensor(ACTIONS)
            )
        assert np.abs(guess.numpy() - truth).max() < 1e-4 * max(1, np.abs(truth).max()), flips
    assert np.abs(truth).std() > 0.1  # the comparison is not of zeros


def test_mirrored_targets_of_the_same_box_run_backwards():
    box = np.array([3.0, 4, 50, 60])
    for flips in ((False, True), (True, False)):
        assert official_mask_coords(box, box, *flips)[:4] == [(0, 3), (0, 2), (0, 1), (0, 0)]


def test_authors_weights_still_differ_where_they_should():
    """The fold is no accident: without the swap of halves the same comparison fails by orders of magnitude."""
    official = official_state()
    world, images, action = (
        from_official(official, HEADS, PREDICTOR_HEADS),
        torch.rand(1, 1, SIZE, SIZE),
        torch.tensor(ACTIONS[1:2]),
    )
    before = world.predict(images, action)
    with torch.no_grad():
        world.predictor.mask_token.copy_(official["predictor.mask_token"].flatten())
    assert (world.predict(images, action) - before).abs().max() > 1e-2


def test_authors_world_goes_on_training():
    world = from_official(official_state(), HEADS, PREDICTOR_HEADS)
    order = torch.stack([torch.randperm(16) for _ in range(2)])
    y, x = torch.rand(2, 2, 1, SIZE, SIZE)
    world(
        y,
        x,
        order[:, :6],
        order[:, 8:],
        coords=torch.rand(2, 16, 2),
        action=torch.tensor(ACTIONS[:2]),
    )[0]["loss"].backward()
    assert all(
        p.grad is not None for p in [*world.encoder.parameters(), *world.predictor.parameters()]
    )
    assert not any(p.requires_grad for p in world.target_encoder.parameters())


# ------------------------------------------------------------------------------------------------ files
def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.mark.parametrize("prefix", ["", "module."])
def test_authors_file(tmp_path, prefix):
    official, path = official_state(), tmp_path / "chexworld_pretrained.tar"
    args = argparse.Namespace(lr=1e-3, data=["a", None], nested=argparse.Namespace(x=1))
    torch.save(
        {"model": {prefix + k: v for k, v in official.items()}, "epoch": 3, "args": args}, path
    )
    expected = from_official(official, HEADS, PREDICTOR_HEADS)
    world = load_world(path)
    assert world.config == expected.config and same(world.state_dict(), expected.state_dict())
    assert same(load_encoder(path).state_dict(), expected.target_encoder.state_dict())
    assert same(load_encoder(path, "context").state_dict(), expected.encoder.state_dict())
    assert all(p.requires_grad for p in load_encoder(path).parameters())


def test_our_own_files(tmp_path):
    world = CheXWorld(**TINY)
    with torch.no_grad():
        world.target_encoder.norm.bias.add_(1)
    torch.save(
        {"world": world.state_dict(), "config": world.config, "step": 7}, tmp_path / "last.pt"
    )
    torch.save(
        {"encoder": world.target_encoder.state_dict(), "config": world.target_encoder.config},
        tmp_path / "encoder.pt",
    )
    loaded = load_world(tmp_path / "last.pt")
    assert loaded.config == world.config and same(loaded.state_dict(), world.state_dict())
    assert same(load_encoder(tmp_path / "last.pt").state_dict(), world.target_encoder.state_dict())
    assert same(
        load_encoder(tmp_path / "last.pt", "context").state_dict(), world.encoder.state_dict()
    )
    assert same(
        load_encoder(tmp_path / "encoder.pt").state_dict(), world.target_encoder.state_dict()
    )
    with pytest.raises(BadCheckpoint, match="holds no predictor"):
        load_world(tmp_path / "encoder.pt")


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def saved(path, obj, **kwargs):
    torch.save(obj, path, **kwargs)


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
    "a resnet": lambda path: saved(
        path, {"model": {"conv1.weight": torch.zeros(4, 3, 7, 7), "fc.bias": torch.zeros(3)}}
    ),
    "a vit with a hole": lambda path: saved(
        path, {"model": {k: v for k, v in official_state().items() if "blocks.1.attn" not in k}}
    ),
    "other positions": lambda path: saved(
        path,
        {"model": official_state() | {"predictor.predictor_pos_embed": torch.zeros(1, 16, WIDTH)}},
    ),
    "numpy array": lambda path: np.save(open(path, "wb"), np.zeros(3)),
}


@pytest.mark.parametrize("load", [load_world, load_encoder])
@pytest.mark.parametrize("kind", JUNK)
def test_junk_is_one_line(tmp_path, kind, load):
    path = tmp_path / "weights.pt"
    JUNK[kind](path)
    with pytest.raises(BadCheckpoint) as error:
        load(path)
    message = str(error.value)
    assert (
        error.value.one_line
        and str(path) in message
        and "\n" not in message
        and len(message) < 400 + len(str(path))
    )


def test_a_file_cut_anywhere_is_one_line(tmp_path):
    whole, cut = tmp_path / "whole.pt", tmp_path / "cut.pt"
    torch.save({"model": {"x": torch.zeros(300)}, "args": argparse.Namespace(a=1)}, whole)
    data = whole.read_bytes()
    for length in range(1, len(data), 97):
        cut.write_bytes(data[:length])
        with pytest.raises(BadCheckpoint):
            load_encoder(cut)


def test_random_bytes_never_raise_anything_else(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "noise.pt"
    for k in range(400):
        path.write_bytes(rng.bytes(1 + k % 40))
        with pytest.raises(BadCheckpoint):
            load_encoder(path)


@pytest.mark.parametrize("how", ["whole", "in model", "in args", "legacy", "bare pickle"])
@pytest.mark.parametrize("load", [load_world, load_encoder])
def test_a_malicious_file_runs_nothing(tmp_path, how, load):
    path, trap = tmp_path / "evil.tar", tmp_path / "hacked"
    evil = Evil(trap)
    if how == "bare pickle":
        path.write_bytes(pickle.dumps(evil))
    else:
        files = {
            "whole": evil,
            "in args": {"model": official_state(), "args": argparse.Namespace(x=evil)},
        }
        torch.save(
            files.get(how, {"model": {"encoder.x": evil}}),
            path,
            _use_new_zipfile_serialization=how != "legacy",
        )
    with pytest.raises(BadCheckpoint, match="nothing in it was run") as error:
        load(path)
    assert not trap.exists() and "\n" not in str(error.value)


def test_the_trap_would_spring(tmp_path):
    """The malicious file is real: unpickled carelessly it does run its command."""
    pickle.loads(pickle.dumps(Evil(tmp_path / "hacked")))
    assert (tmp_path / "hacked").exists()


# ------------------------------------------------------------------------------------------------ timm
@pytest.fixture(scope="module")
def timm():
    """timm, with a stand-in for torchvision (which its vision transformers import and never use) where that is not installed."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    parts = "ops ops.misc transforms transforms.functional datasets models models.feature_extraction utils".split()
    names = ["torchvision", *(f"torchvision.{part}" for part in parts)]
    stand_ins = (
        {}
        if importlib.util.find_spec("torchvision")
        else {name: mock.MagicMock(__path__=[], __spec__=None) for name in names}
    )
    torch.manual_seed(0)  # imports what of torch looks for torchvision, too
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module("timm")
    finally:
        for name in stand_ins:
            del sys.modules[name]


def test_timm_computes_the_same_features_from_our_vit_b(timm):
    torch.manual_seed(0)
    vit = ViT()  # ViT-B/16, 224
    theirs = timm.create_model(
        "vit_base_patch16_224",
        in_chans=1,
        class_token=False,
        global_pool="avg",
        fc_norm=False,
        num_classes=0,
    )
    theirs.eval().load_state_dict(to_timm(vit))
    images = torch.rand(1, 1, 224, 224)
    with torch.no_grad():
        assert (theirs((images - 0.5) / 0.25) - vit(images).mean(1)).abs().max() < 1e-5


def small_timm(timm, **kwargs):
    torch.manual_seed(1)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=0, **kwargs
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def test_timm_there_and_back(timm, tmp_path):
    theirs = small_timm(timm, in_chans=1, class_token=False, global_pool="avg", fc_norm=False)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    vit, images = load_encoder(tmp_path / "timm.pth"), torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        assert (theirs((images - 0.5) / 0.25) - vit(images).mean(1)).abs().max() < 1e-5
    assert same(to_timm(vit), theirs.state_dict())
    assert vit.config == dict(image=32, patch=8, dim=192, depth=2, heads=3)


def test_timm_weights_in_rgb_fold_exactly(timm, tmp_path):
    theirs = small_timm(timm, class_token=False, global_pool="avg", fc_norm=False)
    torch.save({"module." + k: v for k, v in theirs.state_dict().items()}, tmp_path / "timm.pth")
    images = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        truth = theirs.forward_features(
            (images.expand(-1, 3, -1, -1) - 0.5) / 0.5
        )  # timm's ViTs: mean and deviation 0.5
        assert (load_encoder(tmp_path / "timm.pth")(images) - truth).abs().max() < 1e-4


def test_timm_weights_with_a_class_token_load(timm, tmp_path):
    theirs = small_timm(timm)
    torch.save(
        {
            "model": theirs.state_dict()
            | {"head.weight": torch.zeros(5, 192), "head.bias": torch.zeros(5)}
        },
        tmp_path / "timm.pth",
    )
    vit, state = load_encoder(tmp_path / "timm.pth"), plain.arrays(theirs.state_dict())
    images = torch.rand(1, 1, 32, 32)
    rgb = np.repeat((images[0].double().numpy() - 0.5) / 0.5, 3, 0)
    x = (
        plain.embed_patches(rgb, state) + state["pos_embed"][0, 1:]
    )  # the class position is the first
    for i in range(2):
        x = plain.block(x, state, f"blocks.{i}", 3)
    assert np.abs(vit(images)[0].detach().numpy() - plain.layer_norm(x, state, "norm")).max() < 1e-4


def test_timm_weights_without_a_final_norm_are_refused(timm, tmp_path):
    torch.save(
        small_timm(timm, class_token=False, global_pool="avg").state_dict(), tmp_path / "timm.pth"
    )
    with pytest.raises(BadCheckpoint, match="fc_norm=False"):
        load_encoder(tmp_path / "timm.pth")
