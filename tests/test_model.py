"""Networks and losses against tests/plain.py, their slow float64 re-statement.

Positions, attention, the policy (Eq. 8), the losses (Eq. 10–12), the moving average, gradients.
"""

import numpy as np
import plain
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate
from worlds import TINY, make_batch, shaken, tensors

from model import (
    SIZES,
    CheXWorld,
    Classifier,
    Segmenter,
    SimpleFPN,
    ViT,
    attend,
    grid_coords,
    pixel_targets,
    pool_cells,
    sincos,
)
from plumbing.weights import resized


def world_of():
    return shaken(CheXWorld(**TINY))


# ---------------------------------------------------------------- positions and ViT
PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 0.04)]


@pytest.mark.parametrize("dtype,close", PRECISIONS)
def test_attention_and_its_gradients_in_every_precision(dtype, close):
    """Against softmax(q kᵀ / √d) v and its derivative, written out in NumPy.

    Each precision takes its own way.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    drawn = [torch.randn(2, 3, 5, 4, generator=generator).to(dtype) for generator in generators]
    Q, K, V, U = (x.double().numpy() for x in drawn)  # U: the gradient that comes from above
    score = np.exp(Q @ K.swapaxes(-1, -2) / 2)
    weight = score / score.sum(-1, keepdims=True)
    of_weight = U @ V.swapaxes(-1, -2)
    of_row = (U * (weight @ V)).sum(-1, keepdims=True)
    of_score = weight * (of_weight - of_row) / 2

    q, k, v = (x.requires_grad_() for x in drawn[:3])
    out = attend(q, k, v)
    out.backward(drawn[3])
    pairs = (
        (out, weight @ V),
        (q.grad, of_score @ K),
        (k.grad, of_score.swapaxes(-1, -2) @ Q),
        (v.grad, weight.swapaxes(-1, -2) @ U),
    )
    for got, true in pairs:
        assert got.dtype == dtype
        difference = np.abs(got.detach().double().numpy() - true).max()
        assert difference < close * np.abs(true).max()


@pytest.mark.parametrize("n, dim", [(14, 768), (4, 32), (7, 24)])
def test_sincos_is_maes_table(n, dim):
    table = sincos(grid_coords(n), dim).numpy()
    assert np.abs(table - plain.mae_table(n, dim)).max() < 2e-6
    assert np.array_equal(grid_coords(n).numpy(), plain.grid(n))


def test_sincos_of_fractional_and_negative_coordinates():
    coords = np.array([[0.25, -3.5], [17.125, 6.75], [-9.0, 2.5]])
    code = sincos(torch.tensor(coords), 40).numpy()
    assert np.abs(code - plain.positions(coords, 40)).max() < 2e-6
    assert sincos(torch.zeros(2, 5, 3, 2), 8).shape == (2, 5, 3, 8)


def test_column_comes_first():
    moved_right = sincos(torch.tensor([[0.0, 1.0]]), 8)[0].tolist()
    by_hand = [np.sin(1), np.sin(0.01), np.cos(1), np.cos(0.01)]
    assert moved_right[:4] == pytest.approx(by_hand)
    assert moved_right[4:] == [0, 0, 1, 1]


def test_vit_equals_the_slow_one_with_and_without_keep():
    vit = shaken(ViT(32, 8, 32, 3, 4)).double()
    batch = make_batch()
    images = torch.from_numpy(batch["y"])
    keep = torch.from_numpy(batch["keep"])
    state = plain.arrays(vit)
    normed = plain.normalised(batch["y"])
    all_tokens = np.stack([plain.vit(image, state, 4) for image in normed])
    seen = zip(normed, batch["keep"], strict=True)
    kept_tokens = np.stack([plain.vit(image, state, 4, kept) for image, kept in seen])
    assert np.abs(vit(images).detach().numpy() - all_tokens).max() < 1e-9
    assert np.abs(vit(images, keep).detach().numpy() - kept_tokens).max() < 1e-9


def test_patches_that_are_not_kept_have_no_influence_and_order_is_kept():
    vit = shaken(ViT(32, 8, 32, 2, 4))
    keep = torch.tensor([[3, 0, 10, 7]])
    images = torch.rand(1, 1, 32, 32)
    other = torch.rand(1, 1, 32, 32)
    for k in keep[0].tolist():
        row, col = divmod(k, 4)
        rows = slice(8 * row, 8 * row + 8)
        cols = slice(8 * col, 8 * col + 8)
        other[..., rows, cols] = images[..., rows, cols]
    assert torch.equal(vit(images, keep), vit(other, keep))
    assert not torch.allclose(vit(images), vit(other), atol=1e-2)
    order = [2, 0, 3, 1]
    assert torch.allclose(vit(images, keep[:, order]), vit(images, keep)[:, order], atol=1e-5)
    assert torch.allclose(vit(images, torch.arange(16)[None]), vit(images), atol=1e-6)


@pytest.mark.parametrize("bad", [dict(image=30), dict(dim=30), dict(dim=36, heads=5)])
def test_sizes_that_do_not_fit_are_refused(bad):
    good = dict(image=32, patch=8, dim=32, depth=1, heads=4)
    with pytest.raises(ValueError, match="multiple"):
        ViT(**(good | bad))


def test_sizes_table_is_the_papers():
    assert SIZES["base"] == dict(
        dim=768, depth=12, heads=12, predictor_dim=384, predictor_depth=6, predictor_heads=12
    )
    patch_embedding = 256 * 768 + 768
    two_norms = 4 * 768
    attention = 768 * 2304 + 2304 + 768 * 768 + 768
    mlp = 2 * 768 * 3072 + 3072 + 768
    last_norm = 2 * 768
    by_hand = patch_embedding + (two_norms + attention + mlp) + last_norm
    vit = ViT(depth=1)  # 224 × 224, patch 16, width 768 are the defaults
    assert sum(p.numel() for p in vit.parameters()) == by_hand


def test_drop_path_drops_whole_images_and_keeps_the_mean():
    vit = shaken(ViT(16, 8, 32, 2, 4, drop_path=0.5))
    assert [block.drop for block in vit.blocks] == [0.0, 0.5]
    block = vit.blocks[1]
    x = torch.rand(1, 4, 32).expand(4000, -1, -1)
    drop_noise = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0))
    for branch in (0, 1):
        factor = block.drop_path(x, drop_noise, branch) / x
        assert torch.equal(factor[:, 0, 0] > 0, drop_noise[:, branch] >= 0.5)
        assert torch.equal(factor.unique(), torch.tensor([0.0, 2.0]))
        assert (factor == factor[:, :1, :1]).all()
        assert factor.mean().item() == pytest.approx(1, abs=0.06)
    assert torch.equal(block.drop_path(x, None, 0), x)


def test_each_image_goes_its_own_way_through_the_blocks():
    vit = shaken(ViT(16, 8, 32, 3, 4, drop_path=0.5))
    images = torch.rand(4, 1, 16, 16)
    drop_noise = torch.rand(4, 3, 2)
    drop_noise[0] = 1.0  # skips nothing, and what is kept grows
    drop_noise[1, 1:] = 0.0  # skips both branches of all blocks but the first, which skips none
    together = vit(images, drop_noise=drop_noise)
    for k in range(4):
        alone = vit(images[k : k + 1], drop_noise=drop_noise[k : k + 1])
        assert torch.allclose(together[k : k + 1], alone, atol=1e-5)
    vit.blocks = vit.blocks[:1]
    assert torch.allclose(together[1:2], vit(images[1:2]), atol=1e-5)


# ---------------------------------------------------------------- the four losses
@pytest.mark.parametrize("asked", [None, 7])
def test_losses_equal_the_plain_equations(asked):
    world = world_of()
    batch = make_batch(asked=asked)
    truth = plain.losses(plain.arrays(world), batch, world.config)
    single, _ = world(**tensors(batch))
    double, _ = world.double()(**tensors(batch, torch.float64))
    assert set(truth) == set(double) == {*CheXWorld.LOSSES, "loss"}
    for name, value in truth.items():
        assert double[name].item() == pytest.approx(value, rel=1e-6), name
        assert single[name].item() == pytest.approx(value, rel=5e-6), name


def test_the_four_terms_are_there_and_differ():
    terms, _ = world_of()(**tensors(make_batch()))
    assert list(terms) == ["l11", "l22", "l12", "l21", "loss"]
    four = [terms[name].item() for name in ("l11", "l22", "l12", "l21")]
    assert len({round(value, 5) for value in four}) == 4
    assert terms["loss"].item() == pytest.approx(sum(four) / 4, rel=1e-6)


def test_to_be_asked_of_all_patches_is_the_whole_loss_to_the_last_bit():
    batch = tensors(make_batch())
    world = world_of()
    every = torch.arange(16).expand(6, -1)
    for name, value in world(**batch)[0].items():
        assert torch.equal(world(**batch, asked=every)[0][name], value)


@pytest.mark.parametrize("blocks, close", [(0, 1e-6), (2, 0.15)])
def test_halves_that_complete_each_other_have_the_whole_loss_on_average(blocks, close):
    """Exactly where mask tokens do not see each other, else nearly: fewer of them are company."""
    world = shaken(CheXWorld(**(TINY | dict(predictor_depth=blocks)))).double()
    batch = make_batch(asked=16)
    order = torch.from_numpy(batch.pop("asked"))  # (2B, 16): all patches, in a random order
    batch = tensors(batch, torch.float64)
    whole, _ = world(**batch)
    halves = [world(**batch, asked=half)[0] for half in order.chunk(2, 1)]
    for name in ("l12", "l21"):
        mean = (halves[0][name] + halves[1][name]) / 2
        assert mean.item() == pytest.approx(whole[name].item(), rel=close)
        assert halves[0][name].item() != pytest.approx(whole[name].item(), rel=1e-3)
    for name in ("l11", "l22"):
        assert torch.equal(halves[0][name], whole[name])


def test_losses_in_bfloat16_are_nearly_those_in_float32():
    world = world_of()
    batch = tensors(make_batch())
    with torch.autocast("cpu", torch.bfloat16):
        low, _ = world(**batch)
    high, _ = world(**batch)
    assert all(low[k].item() == pytest.approx(high[k].item(), rel=0.02) for k in high)


def test_features_are_pooled_targets_of_both_views():
    world = world_of()
    batch = make_batch()
    state = plain.sub(plain.arrays(world), "target_encoder.")
    tokens = [plain.vit(image, state, 4) for image in plain.normalised(batch["y"])]
    truth = plain.layer_norm(np.stack(tokens), eps=1e-5)
    targets = world.targets(torch.from_numpy(batch["y"]).float()).numpy()
    _, pooled = world(**tensors(batch))
    assert np.abs(targets - truth).max() < 1e-4
    assert np.abs(pooled.detach().numpy() - truth.mean(1)).max() < 1e-4


def test_predict_equals_the_plain_predictor_with_and_without_action():
    world = world_of()
    batch = make_batch()
    state = plain.arrays(world)
    encoder = plain.sub(state, "encoder.")
    predictor = plain.sub(state, "predictor.")
    own = plain.grid(4)
    contexts = [plain.vit(x, encoder, 4) for x in plain.normalised(batch["x"])]
    images = torch.from_numpy(batch["x"]).float()
    nothing = [None] * len(contexts)
    for told, actions in (
        (batch["action"], torch.from_numpy(batch["action"]).float()),
        (nothing, None),
    ):
        truth = []
        for h, action in zip(contexts, told, strict=True):
            code = plain.policy_input(action)
            truth.append(plain.predictor(h, own, own, code, predictor, 2))
        guess = world.predict(images, actions).detach().numpy()
        assert np.abs(guess - np.stack(truth)).max() < 2e-4


def test_the_identity_action_is_what_the_policy_sees_without_action():
    world = world_of()
    images = torch.rand(2, 1, 32, 32)
    identity = torch.tensor([[1.0, 1, 1, 0]]).expand(2, 4)
    assert torch.equal(world.predict(images, identity), world.predict(images, None))


# ---------------------------------------------------------------- the pixel baseline
def test_pixel_targets_are_maes():
    images = make_batch()["y"]
    images[0, 0, :8, :8] = 0  # a black corner: no grey value to divide by
    truth = np.stack([plain.normalised_patches(image, 8) for image in plain.normalised(images)])
    assert np.abs(pixel_targets(torch.from_numpy(images), 8).numpy() - truth).max() < 1e-9
    assert (truth[0, 0] == 0).all() and abs(truth[0, 1].std(ddof=1) - 1) < 1e-3


@pytest.mark.parametrize("weight, asked", [(0.3, None), (1, None), (0.3, 7)])
def test_the_pixel_loss_equals_the_plain_equations(weight, asked):
    world = shaken(CheXWorld(**TINY, pixels=weight))
    batch = make_batch(asked=asked)
    state = plain.arrays(world)
    features = plain.losses(state, batch, world.config)
    pixels = plain.pixel_loss(state, batch, world.config)
    terms, _ = world.double()(**tensors(batch, torch.float64))
    assert list(terms) == ["l11", "l22", "l12", "l21", "loss", "pixels"]
    assert terms["pixels"].item() == pytest.approx(pixels, rel=1e-6)
    mixed = (1 - weight) * features["loss"] + weight * pixels
    assert terms["loss"].item() == pytest.approx(mixed, rel=1e-6)
    for name in CheXWorld.LOSSES:
        assert terms[name].item() == pytest.approx(features[name], rel=1e-6)


def test_without_pixels_there_is_no_second_head_and_with_it_all_else_starts_alike():
    worlds = []
    for weight in (0.0, 0.5, 1.0):
        torch.manual_seed(0)
        worlds.append(CheXWorld(**TINY, pixels=weight))
    paper, *others = worlds
    assert "pixels" not in paper.config and paper.loss_names == CheXWorld.LOSSES
    assert not any("pixel" in name for name in paper.state_dict())
    for world in others:
        state = world.state_dict()
        assert set(state) - set(paper.state_dict()) == {
            "predictor.pixel_head.weight",
            "predictor.pixel_head.bias",
        }
        assert all(torch.equal(v, state[k]) for k, v in paper.state_dict().items())
        assert world.loss_names == (*CheXWorld.LOSSES, "pixels")
        assert world.config == paper.config | {"pixels": world.pixel_weight}
        again = CheXWorld(**world.config)
        again.load_state_dict(state)


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_gradients_of_the_pixel_loss_reach_every_weight_that_counts(weight):
    """With W = 1 the head of the features has a gradient of zero: DistributedDataParallel waits
    for every weight's gradient."""
    world = shaken(CheXWorld(**TINY, pixels=weight))
    losses, _ = world(**tensors(make_batch()))
    losses["loss"].backward()
    for name, p in world.named_parameters():
        if p.requires_grad:
            is_idle = weight == 1 and name.startswith("predictor.proj")
            assert (p.grad.abs().max() == 0) if is_idle else (p.grad.abs().max() > 1e-8), name
        else:
            assert name.startswith("target_encoder.") and p.grad is None


def test_with_weight_1_the_model_learns_the_pixels_of_a_batch():
    torch.manual_seed(0)
    world = CheXWorld(**TINY, pixels=1.0)
    batch = tensors(make_batch(films=2))
    smooth = interpolate(torch.rand(4, 1, 5, 5), (32, 32), mode="bicubic").clamp(0, 1)
    batch |= {"y": smooth, "x": smooth}
    optimizer = torch.optim.AdamW([p for p in world.parameters() if p.requires_grad], lr=3e-3)
    course = []
    for _ in range(80):
        losses, _ = world(**batch)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        course.append(losses["pixels"].item())
    assert course[0] > 0.9  # 1 is what a guess of zeros costs
    assert course[-1] < 0.7


# ---------------------------------------------------------------- learning
def test_gradients_reach_encoder_and_predictor_and_never_the_target():
    world = world_of()
    losses, _ = world(**tensors(make_batch()))
    losses["loss"].backward()
    for name, p in [*world.encoder.named_parameters(), *world.predictor.named_parameters()]:
        assert p.grad is not None, name
        assert p.grad.abs().max() > 1e-7, name
    for name, p in world.target_encoder.named_parameters():
        assert p.grad is None, name
        assert not p.requires_grad, name
    trained = {id(p) for p in world.parameters() if p.requires_grad}
    expected = [*world.encoder.parameters(), *world.predictor.parameters()]
    assert trained == {id(p) for p in expected}


def test_a_gradient_step_goes_down_as_the_gradient_says():
    """Directional derivative of the plain float64 loss against autograd.

    The whole chain, from the embeddings to the policy, is differentiated.
    """
    world = world_of().double()
    batch = make_batch(films=1)
    losses, _ = world(**tensors(batch, torch.float64))
    losses["loss"].backward()
    before = plain.arrays(world)
    grad = {name: p.grad.numpy() for name, p in world.named_parameters() if p.requires_grad}
    size = np.sqrt(sum((g**2).sum() for g in grad.values()))

    def loss_after(step):
        moved = {name: before[name] + step * g / size for name, g in grad.items()}
        return plain.losses(before | moved, batch, world.config)["loss"]

    step = 1e-5
    slope = (loss_after(step) - loss_after(-step)) / (2 * step)
    assert slope == pytest.approx(size, rel=1e-4)


def test_recomputing_activations_changes_no_gradient():
    world = world_of()
    batch = tensors(make_batch())
    trained = [p for p in world.parameters() if p.requires_grad]
    losses, _ = world(**batch)
    losses["loss"].backward()
    kept = [p.grad.clone() for p in trained]
    world.zero_grad()
    world.encoder.save_memory = True
    world.predictor.save_memory = True
    losses, _ = world(**batch)
    losses["loss"].backward()
    recomputed = [p.grad for p in trained]
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


def test_target_starts_as_a_copy_of_its_own_and_follows_as_a_moving_average():
    world = CheXWorld(**TINY)
    pairs = zip(world.encoder.parameters(), world.target_encoder.parameters(), strict=True)
    for own, target in pairs:
        assert torch.equal(own, target)
        assert own.data_ptr() != target.data_ptr()
    shaken(world, seed=3)
    theta = plain.arrays(world.encoder)
    bar = plain.arrays(world.target_encoder)
    predictor = plain.arrays(world.predictor)
    world.update_target(0.9)
    for name, value in plain.arrays(world.target_encoder).items():
        assert np.abs(value - (0.9 * bar[name] + 0.1 * theta[name])).max() < 1e-6, name
    assert all(np.array_equal(v, theta[k]) for k, v in plain.arrays(world.encoder).items())
    assert all(np.array_equal(v, predictor[k]) for k, v in plain.arrays(world.predictor).items())
    before = plain.arrays(world.target_encoder)
    world.update_target(1.0)
    for name, value in plain.arrays(world.target_encoder).items():
        assert np.array_equal(value, before[name]), name
    world.update_target(0.0)
    for name, value in plain.arrays(world.target_encoder).items():
        assert np.abs(value - theta[name]).max() < 1e-6, name


# ---------------------------------------------------------------- other sizes
def test_resized_keeps_anatomy_in_its_place():
    """Twice the image with the same patch: new patch k lies at (k + 1/2) / 2 - 1/2 of the old grid.

    The weights stay the same.
    """
    vit = shaken(ViT(32, 8, 32, 2, 4))
    new = resized(vit, 64, 8)
    at = (plain.grid(8) + 0.5) / 2 - 0.5
    assert np.abs(new.pos_embed[0].numpy() - plain.positions(at, 32)).max() < 2e-6
    pairs = zip(vit.parameters(), new.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert new.config["image"] == 64
    same = resized(vit, 32, 8, drop_path=0.3)
    assert all(torch.equal(v, same.state_dict()[k]) for k, v in vit.state_dict().items())
    assert same.blocks[-1].drop == 0.3


@pytest.mark.parametrize("image, patch", [(64, 16), (16, 4), (48, 12)])
def test_resized_to_another_patch_gives_a_scaled_film_nearly_the_same_features(image, patch):
    torch.manual_seed(0)  # the bounds hold for most draws, not for all
    vit = shaken(ViT(32, 8, 32, 2, 4))
    with torch.no_grad():  # kernels without detail, as trained ones
        smooth = interpolate(torch.randn(32, 1, 3, 3), (8, 8), mode="bicubic")
        vit.patch_embed.proj.weight.copy_(smooth / 8)
    new = resized(vit, image, patch)
    film = interpolate(torch.rand(4, 1, 5, 5), (192, 192), mode="bicubic").clamp(0, 1)
    small = interpolate(film, (32, 32), mode="area")
    large = interpolate(film, (image, image), mode="area")
    difference = (vit(small) - new(large)).square().mean() / vit(small).square().mean()
    assert difference < 0.01
    response = vit.patch_embed.proj.weight.sum((1, 2, 3))  # to a constant
    new_response = resized(vit, image, patch).patch_embed.proj.weight.sum((1, 2, 3))
    assert torch.allclose(new_response, response, rtol=0.02, atol=0.1)


def test_resized_resamples_learned_positions():
    vit = ViT(32, 8, 32, 1, 4)
    coords = grid_coords(4)
    learned = torch.cat([coords, coords.square()] * 8, -1)  # linear and square in row and column
    vit.pos_embed.copy_(learned[None])
    at = torch.from_numpy((plain.grid(8) + 0.5) / 2 - 0.5).float()
    inner = ((at >= 0.7) & (at <= 2.3)).all(1)
    assert torch.allclose(resized(vit, 64, 8).pos_embed[0, inner, :2], at[inner], atol=0.1)


# ---------------------------------------------------------------- heads of fine-tuning
def small_vit(image=32, patch=8, depth=2):
    torch.manual_seed(0)
    return ViT(image, patch, dim=16, depth=depth, heads=2)


def test_classifier_is_the_mean_token_through_a_linear_layer():
    model = Classifier(small_vit(), 3)
    images = torch.rand(2, 1, 32, 32)
    tokens = model.vit(images)
    means = [sum(tokens[b, k] for k in range(16)) / 16 for b in range(2)]
    by_hand = torch.stack(means) @ model.head.weight.T + model.head.bias
    assert torch.allclose(model(images), by_hand, atol=1e-5)


@pytest.mark.parametrize("grid", [1, 3, 4, 6, 7, 14, 16])
def test_cells_are_torchs_adaptive_average(grid):
    """Also where 4 does not divide the grid, or is more than the grid has."""
    tokens = torch.randn(2, grid**2, 8, requires_grad=True)
    maps = tokens.mT.unflatten(2, (grid, grid))
    expected = torch.nn.functional.adaptive_avg_pool2d(maps, 4).flatten(2).mT
    assert torch.allclose(pool_cells(tokens), expected, atol=1e-6)
    weights = torch.randn_like(expected)
    (own,) = torch.autograd.grad((pool_cells(tokens) * weights).sum(), tokens)
    (torchs,) = torch.autograd.grad((expected * weights).sum(), tokens)
    assert torch.allclose(own, torchs, atol=1e-5)


def test_a_classifier_of_cells_tells_where_something_lies():
    model = Classifier(small_vit(64), 2, "cells")
    images = torch.rand(3, 1, 64, 64)
    tokens = model.vit(images).unflatten(1, (8, 8))
    logits = model.head.bias.expand(3, 2)
    weight = model.head.weight.view(2, 4, 4, 16)
    for row in range(4):
        for col in range(4):
            part = tokens[:, 2 * row : 2 * row + 2, 2 * col : 2 * col + 2]
            logits = logits + part.mean((1, 2)) @ weight[:, row, col].T
    assert torch.allclose(model(images), logits, atol=1e-5)


@pytest.mark.parametrize("image, patch", [(64, 16), (64, 8), (64, 4), (56, 8), (224, 32)])
def test_fpn_has_strides_2_to_16_and_the_segmenter_one_logit_per_pixel(image, patch):
    vit = small_vit(image, patch, depth=1)
    maps = SimpleFPN(16, patch, (16, 32, 64, 128))(torch.rand(1, 16, vit.grid, vit.grid))
    for stride, channels, x in zip((2, 4, 8, 16), (16, 32, 64, 128), maps, strict=True):
        assert x.shape[1] == channels
        assert abs(x.shape[-1] - image / stride) < 1  # odd maps round up
    model = Segmenter(vit)
    stages = [(block[0].in_channels, block[3].out_channels) for block in model.decoder]
    assert stages == [(8 + 16, 8), (16 + 32, 16), (32 + 64, 32), (64 + 128, 64)]
    out = model(torch.rand(2, 1, image, image))
    assert out.shape == (2, image, image)
    out.square().mean().backward()
    for name, parameter in model.named_parameters():
        if name != "vit.pos_embed":
            assert parameter.grad is not None
            assert parameter.grad.abs().sum() > 0


def dice_after_training(images, masks, lr, steps):
    """Train a small Segmenter on images (B, 1, H, W). → its Dice on them"""
    model = Segmenter(small_vit())
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for _ in range(steps):
        loss = binary_cross_entropy_with_logits(model(images), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    guess = model(images) > 0
    overlap = 2 * (guess & (masks > 0)).sum()
    return overlap / (guess.sum() + masks.sum())


@pytest.mark.slow
def test_segmenter_learns_lines_of_one_pixel():
    """Only a path from the pixels themselves can: a patch has 8 px, the ViT's finest map 2."""
    torch.manual_seed(0)
    masks = torch.zeros(8, 32, 32)
    for k in range(8):
        masks[k, 3 + k, 4:28] = 1
        masks[k, 4:28, 20 - k] = 1
    images = masks[:, None] * 0.5 + torch.rand(8, 1, 32, 32) * 0.3
    assert dice_after_training(images, masks, lr=5e-3, steps=60) > 0.9


@pytest.mark.slow
def test_segmenter_learns_a_bright_square():
    torch.manual_seed(0)
    images = torch.rand(8, 1, 32, 32) * 0.3
    masks = torch.zeros(8, 32, 32)
    for k in range(8):
        images[k, 0, 4 + k : 16 + k, 6:20] += 0.6
        masks[k, 4 + k : 16 + k, 6:20] = 1
    assert dice_after_training(images, masks, lr=3e-3, steps=80) > 0.85
