"""Domain sensitivity test against a slow loop, and with models whose answers are known."""

import json

import numpy as np
import pytest
import torch
from lab_for_tests import good, make_place  # noqa: F401 (place is a fixture)
from PIL import Image

import augment
from lab import domain
from model import CheXWorld
from plumbing.keys import torch_generator

TINY = dict(
    image=32,
    patch=8,
    dim=32,
    depth=2,
    heads=4,
    predictor_dim=24,
    predictor_depth=1,
    predictor_heads=2,
)


# ---------------------------------------------------------------- errors of one film
@pytest.fixture(scope="module")
def world():
    torch.manual_seed(0)
    return CheXWorld(**TINY).eval()


@pytest.mark.parametrize("told", [True, False])
def test_domain_errors_equal_a_slow_loop(world, told):
    """Eq. (13): y_j by candidate j's tone, x_i = T_{a_i}(y_i), error = distance over all patches
    and features, in float64."""
    image = torch.rand(1, 1, 32, 32)
    candidates = domain.domain_candidates(3)
    actions = augment.sample_actions(9, torch_generator(1))
    out = domain.domain_errors(world, image, actions, candidates)[0 if told else 1]
    y = [augment.tone(image, c[None, 0], c[None, 1]) for c in candidates]
    identity = torch.tensor([augment.IDENTITY])
    truth = np.zeros((9, 9))
    for i in range(9):
        x = augment.apply_action(y[i], actions[i][None])
        guess = world.predict(x, actions[i][None] if told else identity).detach().double().numpy()
        for j in range(9):
            truth[i, j] = np.sqrt(((guess - world.targets(y[j]).double().numpy()) ** 2).sum())
    assert np.abs(out.detach().numpy() - truth).max() < 1e-3


def test_domain_errors_of_64_candidates_rank_as_in_float64(world):
    """64 rows make torch.cdist use its matrix product: the near ties of a fresh model must still
    fall as exact arithmetic has them."""
    image = torch.rand(1, 1, 32, 32)
    candidates = domain.domain_candidates(8)
    actions = augment.sample_actions(64, torch_generator(2))
    out = domain.domain_errors(world, image, actions, candidates)[0].double()
    y = augment.tone(image.expand(64, -1, -1, -1), candidates[:, 0], candidates[:, 1])
    with torch.no_grad():
        guess = world.predict(augment.apply_action(y, actions), actions).double().flatten(1)
        goal = world.targets(y).double().flatten(1)
    truth = (goal[None] - guess[:, None]).square().sum(-1).sqrt()
    assert (out - truth).abs().max() < 1e-4 * truth.max()
    ranks = [domain.rank_of_truth(errors.numpy()) for errors in (out, truth)]
    assert abs(ranks[0] - ranks[1]).max() <= 1


def test_rank_of_truth_counts_from_one():
    errors = np.array([[0.0, 1, 2], [1, 2, 3], [1, 0, 2]])
    assert domain.rank_of_truth(errors).tolist() == [1, 2, 3]


# ---------------------------------------------------------------- models whose answers are known
class Oracle(torch.nn.Module):
    """Knows the tone by heart: undoes the action when told of it, else takes the augmented image
    for the target."""

    def __init__(self):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.own_coords = torch.zeros(256, 2)

    def encoder(self, images):
        return images

    def targets(self, images):
        return images.flatten(1)[..., None]

    def predictor(self, images, context_coords, target_coords, action):
        brightness = action[:, 0].view(-1, 1, 1, 1)
        contrast = action[:, 1].view(-1, 1, 1, 1)
        images = images ** (1 / action[:, 2].view(-1, 1, 1, 1))
        mean = images.mean((1, 2, 3), keepdim=True)
        return ((mean + (images - mean) / contrast) / brightness).flatten(1)[..., None]


def test_an_oracle_finds_every_candidate_only_when_told():
    images = 0.4 + 0.1 * torch.rand(2, 1, 16, 16)  # nothing clips, so the action can be undone
    result = domain.domain_test(Oracle(), images)
    assert result["images"] == 2 and result["candidates"] == 64
    assert result["action"]["recall@1"] > 75  # blurred fifth: cannot be undone
    assert result["no_action"]["recall@1"] < 50 < result["action"]["recall@1"]
    assert result["random"] == {"recall@1": 100 / 64, "recall@3": 300 / 64, "recall@5": 500 / 64}
    for row in (result["action"], result["no_action"]):
        assert row["recall@1"] <= row["recall@3"] <= row["recall@5"] <= 100
    assert domain.domain_test(Oracle(), images) == result
    assert domain.domain_test(Oracle(), images, seed=1) != result


class Blind(Oracle):
    def predictor(self, images, context_coords, target_coords, action):
        return torch.zeros(len(images), images[0].numel(), 1)

    def targets(self, images):
        return torch.ones(len(images), images[0].numel(), 1)


def test_a_model_that_says_the_same_of_everything_scores_chance():
    result = domain.domain_test(Blind(), torch.rand(2, 1, 16, 16))
    assert result["action"] == pytest.approx(result["random"])
    assert result["no_action"] == pytest.approx(result["random"])


class Perfect(torch.nn.Module):
    """A world whose prediction is the truth, hidden patches and domain included: the features are
    the un-augmented grey values, looked up."""

    def __init__(self, grid=4):
        super().__init__()
        self.grid = grid
        self.own_coords = torch.zeros(grid**2, 2)
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.told = None

    def encoder(self, images):
        return images

    def targets(self, images):
        p = images.shape[-1] // self.grid
        return images.unfold(2, p, p).unfold(3, p, p).reshape(len(images), self.grid**2, -1)

    def predictor(self, h, context_coords, target_coords, action):
        return self.targets(self.told)


def test_a_perfect_world_recalls_everything_and_one_blind_to_the_film_nothing(monkeypatch):
    world = Perfect()
    images = torch.rand(2, 1, 16, 16)

    def remember(y, action):
        world.told = y
        return y * 0

    monkeypatch.setattr(augment, "apply_action", remember)
    perfect = domain.domain_test(world, images)
    assert perfect["action"]["recall@1"] > 99 and perfect["random"]["recall@1"] == 100 / 64
    monkeypatch.setattr(world, "predictor", lambda h, *_: torch.zeros(len(h), 16, 16))
    blind = domain.domain_test(world, images)
    assert blind["action"]["recall@5"] < 30 and blind["action"] == blind["no_action"]


# ---------------------------------------------------------------- as a user runs it
@pytest.mark.slow
def test_domain(place):
    words = good(place, "domain", "--data", "set/films", "--films", 3, "--out", "d")
    result = json.loads((place / "d" / "result.json").read_text())
    assert result["images"] == 3 and result["candidates"] == 64
    assert set(result["action"]) == {"recall@1", "recall@3", "recall@5"}
    assert "with the action" in words
    assert Image.open(place / "d" / "errors.png").width > 600
    assert Image.open(place / "d" / "choices.png").width > 900
