"""Networks and losses against tests/plain.py, a slow float64 re-statement: positions, attention, Eq. 8, 10–12, ablations, EMA, gradients."""

import numpy as np
import plain
import pytest
import torch
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
    sincos,
)
from plumbing.weights import resized


def world_of():
    return shaken(CheXWorld(**TINY))


# ------------------------------------------------------------------------------------------------ positions and ViT
@pytest.mark.parametrize(
    "dtype,close", [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 0.04)]
)
def test_attention_and_its_gradients_in_every_precision(dtype, close):
    """Against softmax(q kᵀ / √d) v and its derivative, written out in NumPy: each precision takes its own way."""
    q, k, v, up = (
        torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(s)) for s in range(4)
    )
    Q, K, V, U = (x.to(dtype).double().numpy() for x in (q, k, v, up))
    score = np.exp(Q @ K.swapaxes(-1, -2) / 2)
    weight = score / score.sum(-1, keepdims=True)
    inner = weight * (U @ V.swapaxes(-1, -2) - (U * (weight @ V)).sum(-1, keepdims=True)) / 2
    q, k, v = (x.to(dtype).requires_grad_() for x in (q, k, v))
    out = attend(q, k, v)
    out.backward(up.to(dtype))
    for got, true in (
        (out, weight @ V),
        (q.grad, inner @ K),
        (k.grad, inner.swapaxes(-1, -2) @ Q),
        (v.grad, weight.swapaxes(-1, -2) @ U),
    ):
        assert (
            got.dtype == dtype
            and np.abs(got.detach().double().numpy() - true).max() < close * np.abs(true).max()
        )


@pytest.mark.parametrize("n, dim", [(14, 768), (4, 32), (7, 24)])
def test_sincos_is_maes_table(n, dim):
    assert np.abs(sincos(grid_coords(n), dim).numpy() - plain.mae_table(n, dim)).max() < 2e-6
    assert np.array_equal(grid_coords(n).numpy(), plain.grid(n))


def test_sincos_of_fractional_and_negative_coordinates():
    coords = np.array([[0.25, -3.5], [17.125, 6.75], [-9.0, 2.5]])
    assert (
        np.abs(sincos(torch.tensor(coords), 40).numpy() - plain.positions(coords, 40)).max() < 2e-6
    )
    assert sincos(torch.zeros(2, 5, 3, 2), 8).shape == (2, 5, 3, 8)


def test_column_comes_first():
    moved_right = sincos(torch.tensor([[0.0, 1.0]]), 8)[0].tolist()
    assert moved_right[:4] == pytest.approx(
        [np.sin(1), np.sin(0.01), np.cos(1), np.cos(0.01)]
    ) and moved_right[4:] == [0, 0, 1, 1]


def test_vit_equals_the_slow_one_with_and_without_keep():
    vit = shaken(ViT(32, 8, 32, 3, 4)).double()
    batch = make_batch()
    images, keep = torch.from_numpy(batch["y"]), torch.from_numpy(batch["keep"])
    state = plain.arrays(vit)
    for guess, kept in ((vit(images), [None] * 6), (vit(images, keep), batch["keep"])):
        truth = np.stack(
            [plain.vit((image - 0.5) / 0.25, state, 4, k) for image, k in zip(batch["y"], kept)]
        )
        assert np.abs(guess.detach().numpy() - truth).max() < 1e-9


def test_hidden_patches_have_no_influence_and_order_is_kept():
    vit, keep = shaken(ViT(32, 8, 32, 2, 4)), torch.tensor([[3, 0, 10, 7]])
    images = torch.rand(1, 1, 32, 32)
    other = torch.rand(1, 1, 32, 32)
    for k in keep[0].tolist():
        r, c = 8 * (k // 4), 8 * (k % 4)
        other[..., r : r + 8, c : c + 8] = images[..., r : r + 8, c : c + 8]
    assert torch.equal(vit(images, keep), vit(other, keep)) and not torch.allclose(
        vit(images), vit(other), atol=1e-2
    )
    assert torch.allclose(
        vit(images, keep[:, [2, 0, 3, 1]]), vit(images, keep)[:, [2, 0, 3, 1]], atol=1e-5
    )
    assert torch.allclose(vit(images, torch.arange(16)[None]), vit(images), atol=1e-6)


@pytest.mark.parametrize("bad", [dict(image=30), dict(dim=30), dict(dim=36, heads=5)])
def test_sizes_that_do_not_fit_are_refused(bad):
    with pytest.raises(ValueError, match="multiple"):
        ViT(**{**dict(image=32, patch=8, dim=32, depth=1, heads=4), **bad})


def test_sizes_table_is_the_papers():
    assert SIZES["base"] == dict(
        dim=768, depth=12, heads=12, predictor_dim=384, predictor_depth=6, predictor_heads=12
    )
    by_hand = (
        (256 * 768 + 768)
        + (4 * 768 + 768 * 2304 + 2304 + 768 * 768 + 768 + 2 * 768 * 3072 + 3072 + 768)
        + 2 * 768
    )
    assert (
        sum(p.numel() for p in ViT(depth=1).parameters()) == by_hand
    )  # 224², patch 16, width 768 are the defaults


def test_drop_path_drops_whole_images_and_keeps_the_mean():
    vit = shaken(ViT(16, 8, 32, 2, 4, drop_path=0.5)).train()
    assert [block.drop for block in vit.blocks] == [0.0, 0.5]
    block, x = vit.blocks[1], torch.rand(1, 4, 32).expand(4000, -1, -1)
    kept = block.drop_path(x)
    factor = kept / x
    assert (
        torch.equal(factor.unique(), torch.tensor([0.0, 2.0]))
        and (factor == factor[:, :1, :1]).all()
    )
    assert factor.mean().item() == pytest.approx(1, abs=0.06)
    assert torch.equal(vit.eval().blocks[1].drop_path(x), x)


# ------------------------------------------------------------------------------------------------ the four losses
def test_losses_equal_the_plain_equations():
    world = world_of()
    batch = make_batch()
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
    assert len({round(terms[k].item(), 5) for k in ("l11", "l22", "l12", "l21")}) == 4
    assert terms["loss"].item() == pytest.approx(
        sum(terms[k].item() for k in ("l11", "l22", "l12", "l21")) / 4, rel=1e-6
    )


def test_losses_in_bfloat16_are_nearly_those_in_float32():
    world, batch = world_of(), tensors(make_batch())
    with torch.autocast("cpu", torch.bfloat16):
        low, _ = world(**batch)
    high, _ = world(**batch)
    assert all(low[k].item() == pytest.approx(high[k].item(), rel=0.02) for k in high)


def test_features_are_pooled_targets_of_both_views():
    world, batch = world_of(), make_batch()
    state = plain.sub(plain.arrays(world), "target_encoder.")
    truth = np.stack(
        [plain.layer_norm(plain.vit((y - 0.5) / 0.25, state, 4), eps=1e-5) for y in batch["y"]]
    )
    assert np.abs(world.targets(torch.from_numpy(batch["y"]).float()).numpy() - truth).max() < 1e-4
    assert np.abs(world(**tensors(batch))[1].detach().numpy() - truth.mean(1)).max() < 1e-4


def test_predict_equals_the_plain_predictor_with_and_without_action():
    world, batch = world_of(), make_batch()
    state = plain.arrays(world)
    images, action = torch.from_numpy(batch["x"]).float(), torch.from_numpy(batch["action"]).float()
    own = plain.grid(4)
    for told in (True, False):
        truth = []
        for x, a in zip(batch["x"], batch["action"]):
            code = np.array([a[0] - 1, a[1] - 1, np.log(a[2]), a[3]]) if told else np.zeros(4)
            h = plain.vit((x - 0.5) / 0.25, plain.sub(state, "encoder."), 4)
            truth.append(plain.predictor(h, own, own, code, plain.sub(state, "predictor."), 2))
        assert (
            np.abs(
                world.predict(images, action if told else None).detach().numpy() - np.stack(truth)
            ).max()
            < 2e-4
        )


def test_the_identity_action_is_what_the_policy_sees_without_action():
    world, images = world_of(), torch.rand(2, 1, 32, 32)
    assert torch.equal(
        world.predict(images, torch.tensor([[1.0, 1, 1, 0]]).expand(2, 4)),
        world.predict(images, None),
    )


# ------------------------------------------------------------------------------------------------ learning
def test_gradients_reach_encoder_and_predictor_and_never_the_target():
    world = world_of()
    world(**tensors(make_batch()))[0]["loss"].backward()
    for name, p in [*world.encoder.named_parameters(), *world.predictor.named_parameters()]:
        assert p.grad is not None and p.grad.abs().max() > 1e-7, name
    assert all(p.grad is None and not p.requires_grad for p in world.target_encoder.parameters())
    trained = {id(p) for p in world.parameters() if p.requires_grad}
    assert trained == {
        id(p) for part in (world.encoder, world.predictor) for p in part.parameters()
    }


def test_a_gradient_step_goes_down_as_the_gradient_says():
    """Directional derivative of the plain float64 loss against autograd: the whole chain, embeddings to policy, is differentiated."""
    world, batch = world_of().double(), make_batch(films=1)
    world(**tensors(batch, torch.float64))[0]["loss"].backward()
    step, before = 1e-5, plain.arrays(world)
    grad = {n: p.grad.numpy() for n, p in world.named_parameters() if p.requires_grad}
    size = np.sqrt(sum((g**2).sum() for g in grad.values()))
    shifted = lambda by: {k: v + by * grad[k] / size if k in grad else v for k, v in before.items()}
    moved = lambda sign: plain.losses(shifted(sign * step), batch, world.config)["loss"]
    assert (moved(1) - moved(-1)) / (2 * step) == pytest.approx(size, rel=1e-4)


def test_recomputing_activations_changes_no_gradient():
    world, batch = world_of(), tensors(make_batch())
    world(**batch)[0]["loss"].backward()
    plainly = [p.grad.clone() for p in world.parameters() if p.requires_grad]
    world.zero_grad()
    world.encoder.save_memory = world.predictor.save_memory = True
    world(**batch)[0]["loss"].backward()
    assert all(
        torch.equal(a, p.grad)
        for a, p in zip(plainly, (p for p in world.parameters() if p.requires_grad), strict=True)
    )


def test_target_starts_as_a_copy_of_its_own_and_follows_as_a_moving_average():
    world = CheXWorld(**TINY)
    pairs = zip(world.encoder.parameters(), world.target_encoder.parameters(), strict=True)
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in pairs)
    shaken(world, seed=3)
    theta, bar, others = (
        plain.arrays(m) for m in (world.encoder, world.target_encoder, world.predictor)
    )
    world.update_target(0.9)
    for name, value in plain.arrays(world.target_encoder).items():
        assert np.abs(value - (0.9 * bar[name] + 0.1 * theta[name])).max() < 1e-6, name
    assert all(np.array_equal(v, theta[k]) for k, v in plain.arrays(world.encoder).items())
    assert all(np.array_equal(v, others[k]) for k, v in plain.arrays(world.predictor).items())
    before = plain.arrays(world.target_encoder)
    world.update_target(1.0)
    assert all(np.array_equal(v, before[k]) for k, v in plain.arrays(world.target_encoder).items())
    world.update_target(0.0)
    assert all(
        np.abs(v - theta[k]).max() < 1e-6 for k, v in plain.arrays(world.target_encoder).items()
    )


# ------------------------------------------------------------------------------------------------ other sizes
def test_resized_keeps_anatomy_in_its_place():
    """Twice the image with the same patch: new patch k lies at (k + 1/2) / 2 - 1/2 of the old grid; weights are the same."""
    vit = shaken(ViT(32, 8, 32, 2, 4))
    new = resized(vit, 64, 8)
    at = (plain.grid(8) + 0.5) / 2 - 0.5
    assert np.abs(new.pos_embed[0].numpy() - plain.positions(at, 32)).max() < 2e-6
    assert (
        all(torch.equal(a, b) for a, b in zip(vit.parameters(), new.parameters(), strict=True))
        and new.config["image"] == 64
    )
    same = resized(vit, 32, 8, drop_path=0.3)
    assert (
        all(torch.equal(v, same.state_dict()[k]) for k, v in vit.state_dict().items())
        and same.blocks[-1].drop == 0.3
    )


@pytest.mark.parametrize("image, patch", [(64, 16), (16, 4), (48, 12)])
def test_resized_to_another_patch_gives_a_scaled_film_nearly_the_same_features(image, patch):
    torch.manual_seed(0)  # the bounds hold for most draws, not for all
    vit = shaken(ViT(32, 8, 32, 2, 4))
    with torch.no_grad():
        smooth = torch.nn.functional.interpolate(
            torch.randn(32, 1, 3, 3), (8, 8), mode="bicubic"
        )  # kernels without detail, as trained ones
        vit.patch_embed.proj.weight.copy_(smooth / 8)
    new, film = (
        resized(vit, image, patch),
        torch.nn.functional.interpolate(torch.rand(4, 1, 5, 5), (192, 192), mode="bicubic").clamp(
            0, 1
        ),
    )
    small, large = (torch.nn.functional.interpolate(film, (s, s), mode="area") for s in (32, image))
    difference = (vit(small) - new(large)).square().mean() / vit(small).square().mean()
    assert difference < 0.01
    grey = resized(vit, image, patch).patch_embed.proj.weight.sum((1, 2, 3))
    assert torch.allclose(
        grey, vit.patch_embed.proj.weight.sum((1, 2, 3)), rtol=0.02, atol=0.1
    )  # the response to a constant


def test_resized_resamples_learned_positions():
    vit = ViT(32, 8, 32, 1, 4)
    vit.pos_embed.copy_(
        torch.cat([grid_coords(4), grid_coords(4).square()] * 8, -1)[None]
    )  # "learned": linear and square in row, col
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


@pytest.mark.parametrize("image, patch", [(64, 16), (64, 8), (64, 4), (56, 8), (224, 32)])
def test_fpn_has_strides_4_to_32_and_the_segmenter_one_logit_per_pixel(image, patch):
    vit = small_vit(image, patch, depth=1)
    maps = SimpleFPN(16, patch, (8, 16, 32, 64))(torch.rand(1, 16, vit.grid, vit.grid))
    for stride, channels, x in zip((4, 8, 16, 32), (8, 16, 32, 64), maps, strict=True):
        assert x.shape[1] == channels
        assert abs(x.shape[-1] - image / stride) < 1  # odd maps round up
    model = Segmenter(vit)
    out = model(torch.rand(2, 1, image, image))
    assert out.shape == (2, image, image)
    out.square().mean().backward()
    for name, parameter in model.named_parameters():
        if name != "vit.pos_embed":
            assert parameter.grad is not None
            assert parameter.grad.abs().sum() > 0


@pytest.mark.slow
def test_segmenter_learns_a_bright_square():
    torch.manual_seed(0)
    images = torch.rand(8, 1, 32, 32) * 0.3
    masks = torch.zeros(8, 32, 32)
    for k in range(8):
        images[k, 0, 4 + k : 16 + k, 6:20] += 0.6
        masks[k, 4 + k : 16 + k, 6:20] = 1
    model = Segmenter(small_vit())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(images), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    guess = model(images) > 0
    overlap = 2 * (guess & (masks > 0)).sum()
    assert overlap / (guess.sum() + masks.sum()) > 0.85
