"""Table 3's switches against tests/plain.py: subsets of tasks, no Δ, no action, not unified."""

import plain
import pytest
import torch
from worlds import TINY, make_batch, shaken, tensors

from lab.ablation import AblatedCheXWorld
from model import CheXWorld
from plumbing.checkpoint import BadCheckpoint, save_atomic
from plumbing.weights import load_encoder, load_world

SUBSETS = ["local", "global", "domain", "local,global", "local,domain", "global,domain"]
SWITCHES = [
    dict(),
    *(dict(tasks=tasks) for tasks in SUBSETS),
    dict(delta=False),
    dict(action=False),
    dict(unified=False),
    dict(unified=False, tasks="global,domain", action=False),
    dict(unified=False, delta=False),
]


def label(changes):
    """Name a case by its switches."""
    return ",".join(f"{name}={value}" for name, value in changes.items()) or "all"


def world_of(**changes):
    return shaken(AblatedCheXWorld(**TINY, **changes))


@pytest.mark.parametrize("changes", SWITCHES, ids=label)
@pytest.mark.parametrize("asked", [None, 7])
def test_losses_equal_the_plain_equations(changes, asked):
    world = world_of(**changes)
    batch = make_batch(asked=asked)
    truth = plain.losses(plain.arrays(world), batch, world.config)
    single, _ = world(**tensors(batch))
    double, _ = world.double()(**tensors(batch, torch.float64))
    assert set(truth) == set(double) <= {*AblatedCheXWorld.LOSSES, "loss"}
    for name, value in truth.items():
        assert double[name].item() == pytest.approx(value, rel=1e-6), name
        assert single[name].item() == pytest.approx(value, rel=5e-6), name


def test_without_switches_it_is_chexworld():
    batch = tensors(make_batch())
    full, pooled = shaken(CheXWorld(**TINY))(**batch)
    same, also_pooled = world_of()(**batch)
    assert list(full) == list(same)
    assert torch.equal(pooled, also_pooled)
    assert all(torch.equal(full[name], same[name]) for name in CheXWorld.LOSSES)


@pytest.mark.parametrize("tasks", ["", "locall", "local,,global"])
def test_unknown_tasks_are_refused(tasks):
    with pytest.raises(ValueError, match="tasks"):
        AblatedCheXWorld(**TINY, tasks=tasks)


@pytest.mark.parametrize("changes", SWITCHES[1:], ids=str)
def test_gradients_reach_every_weight_in_each_ablation(changes):
    world = world_of(**changes)
    losses, _ = world(**tensors(make_batch()))
    losses["loss"].backward()
    for name, parameter in world.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("changes", [dict(tasks="local,domain"), dict(delta=False)], ids=str)
def test_an_ablated_run_is_no_world_for_others_but_its_encoder_is_like_any(tmp_path, changes):
    world = world_of(**changes)
    path = tmp_path / "last.pt"
    save_atomic({"world": world.state_dict(), "config": world.config, "step": 7}, path)
    with pytest.raises(BadCheckpoint, match="last.pt: an ablated run .* of python -m lab.ablation"):
        load_world(path)
    images = torch.rand(2, 1, 32, 32)
    assert torch.equal(load_encoder(path)(images), world.target_encoder(images))


def test_a_run_with_all_switches_at_their_defaults_is_a_full_run(tmp_path):
    world = world_of()
    path = tmp_path / "last.pt"
    save_atomic({"world": world.state_dict(), "config": world.config}, path)
    assert type(load_world(path)) is CheXWorld
