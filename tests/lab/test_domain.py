"""Domain sensitivity test against a slow loop, and with models whose answers are known."""

import json
from itertools import combinations, product

import numpy as np
import pytest
import torch
from lab_for_tests import good, make_place  # noqa: F401 (place is a fixture)
from PIL import Image
from scipy.stats import qmc
from worlds import TINY

import augment
from lab import domain
from model import CheXWorld
from plumbing.keys import DOMAIN_TEST, torch_generator


# ---------------------------------------------------------------- errors of one film
@pytest.fixture(scope="module")
def world():
    torch.manual_seed(0)
    return CheXWorld(**TINY).eval()


def test_the_grid_covers_the_range_of_the_jitter_evenly():
    candidates = domain.grid_candidates().numpy().round(5)
    axis = [round(np.float32(0.6 + 0.8 * k / 7), 5) for k in range(8)]
    assert sorted(map(tuple, candidates[:, :2])) == sorted(product(axis, axis))
    assert (candidates[:, 2:] == (1, 0)).all()  # gamma 1, no blur


def test_the_second_set_spreads_over_all_four_ranges():
    """64 distinct points; each parameter takes the 64 evenly spaced values of its range, each once,
    and each pair of parameters has one point in every cell of an 8 × 8 grid."""
    candidates = domain.sobol_candidates().double().numpy()
    lowest = np.array([0.6, 0.6, np.log(0.5), 0.05])
    highest = np.array([1.4, 1.4, np.log(2), 2])
    candidates[:, 2] = np.log(candidates[:, 2])
    share = (candidates - lowest) / (highest - lowest)  # of each range
    assert np.allclose(np.sort(share, 0), (np.arange(64) + 0.5)[:, None] / 64, atol=1e-5)
    for pair in combinations(range(4), 2):
        cells = np.floor(8 * share[:, pair]).astype(int)
        assert len(set(map(tuple, cells))) == 64
    again = domain.sobol_candidates()
    assert torch.equal(again, domain.sobol_candidates())
    known = qmc.Sobol(4, scramble=False).random(64) + 0.5 / 64  # SciPy's own table of directions
    assert np.abs(share - known).max() < 1e-5


def test_the_candidates_know_nothing_of_the_actions():
    """Candidates are the same for every film and seed; the actions between target and context are
    drawn by seed and film, and are the same for both sets of candidates."""
    told = []

    class Spy(Oracle):
        def predictor(self, images, context_coords, target_coords, action):
            told.append(action)
            return super().predictor(images, context_coords, target_coords, action)

    domain.domain_test(Spy(), torch.rand(2, 1, 16, 16), seed=3, has_second_set=True)
    grid = told[0], told[2]  # told the action; every other call is told the identity
    four = told[4], told[6]
    for film in range(2):
        drawn = augment.sample_actions(64, torch_generator(DOMAIN_TEST, 3, film))
        assert torch.equal(grid[film], drawn) and torch.equal(four[film], drawn)
    assert not torch.equal(grid[0], grid[1])


def blurred(film, sigma):
    """Gaussian of 6 px to either side; its weights inside the film sum to 1."""
    pixel = np.arange(film.shape[-1])
    apart = pixel[:, None] - pixel[None]
    weight = np.exp(-(apart**2) / (2 * sigma**2)) * (abs(apart) <= 6)
    weight /= weight.sum(1, keepdims=True)
    return torch.tensor(weight @ film[0, 0].double().numpy() @ weight.T).float()[None, None]


CANDIDATES = [domain.grid_candidates(3), domain.sobol_candidates(8)]


@pytest.mark.parametrize("candidates", CANDIDATES, ids=["grid", "four parameters"])
@pytest.mark.parametrize("told", [True, False])
def test_domain_errors_equal_a_slow_loop(world, told, candidates):
    """Eq. (13): y_j is the film after candidate j, x_i = T_{a_i}(y_i), error = distance over all
    patches and features, in float64."""
    image = torch.rand(1, 1, 32, 32)
    count = len(candidates)
    actions = augment.sample_actions(count, torch_generator(1))
    out = domain.domain_errors(world, image, actions, candidates)[0 if told else 1]
    y = []
    for brightness, contrast, gamma, sigma in candidates.tolist():
        film = (image * brightness).clamp(0, 1)
        film = ((film - film.mean()) * contrast + film.mean()).clamp(0, 1) ** gamma
        if sigma > 0:
            film = blurred(film, sigma)
        y.append(film)
    identity = torch.tensor([augment.IDENTITY])
    truth = np.zeros((count, count))
    for i in range(count):
        x = augment.apply_action(y[i], actions[i][None])
        guess = world.predict(x, actions[i][None] if told else identity).detach().double().numpy()
        for j in range(count):
            truth[i, j] = np.sqrt(((guess - world.targets(y[j]).double().numpy()) ** 2).sum())
    assert np.abs(out.detach().numpy() - truth).max() < 1e-3 * truth.max()


@pytest.mark.parametrize("candidates", [domain.grid_candidates(8), domain.sobol_candidates(64)])
def test_domain_errors_of_64_candidates_rank_as_in_float64(world, candidates):
    """64 rows make torch.cdist use its matrix product: the near ties of a fresh model must still
    fall as exact arithmetic has them."""
    image = torch.rand(1, 1, 32, 32)
    actions = augment.sample_actions(64, torch_generator(2))
    out = domain.domain_errors(world, image, actions, candidates)[0].double()
    y = domain.change(image, candidates)
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
    result = domain.domain_test(Oracle(), images, has_second_set=True)
    assert result["images"] == 2 and result["candidates"] == 64
    assert result["action"]["recall@1"] > 75  # blurred fifth: cannot be undone
    assert result["no_action"]["recall@1"] < 50 < result["action"]["recall@1"]
    assert result["random"] == {"recall@1": 100 / 64, "recall@3": 300 / 64, "recall@5": 500 / 64}
    for row in (result["action"], result["no_action"]):
        assert row["recall@1"] <= row["recall@3"] <= row["recall@5"] <= 100
    four = result.pop("four_parameters")
    assert domain.domain_test(Oracle(), images) == result
    assert domain.domain_test(Oracle(), images, seed=1) != result
    assert four["images"] == 2 and four["candidates"] == 64
    assert four["action"]["recall@1"] > 1.3 * four["no_action"]["recall@1"]
    assert result["random"] == four["random"]


def test_the_interval_is_that_of_a_loop_over_redraws_of_the_films():
    rng = np.random.default_rng(0)
    films = rng.uniform(0, 100, (40, 3))
    means = [films[rng.integers(40, size=40)].mean(0) for _ in range(4000)]
    expected = np.quantile(means, (0.025, 0.975), axis=0).T
    assert np.abs(np.array(domain.redraw(films)) - expected).max() < 1.0
    assert domain.redraw(films[:2]) == [None, None, None]


class Blind(Oracle):
    def predictor(self, images, context_coords, target_coords, action):
        return torch.zeros(len(images), images[0].numel(), 1)

    def targets(self, images):
        return torch.ones(len(images), images[0].numel(), 1)


def test_a_model_that_says_the_same_of_everything_scores_chance():
    result = domain.domain_test(Blind(), torch.rand(2, 1, 16, 16), has_second_set=True)
    for part in (result, result["four_parameters"]):
        assert part["action"] == pytest.approx(part["random"])
        assert part["no_action"] == pytest.approx(part["random"])


# ---------------------------------------------------------------- as a user runs it
@pytest.mark.slow
def test_domain(place):
    words = good(place, "domain", "--data", "set/films", "--films", 3, "--out", "d")
    result = json.loads((place / "d" / "result.json").read_text())
    assert result["images"] == 3 and result["candidates"] == 64
    assert result["overlap"] in words and result["overlap"].startswith("nobody can tell")
    assert set(result["action"]) == {"recall@1", "recall@3", "recall@5"}
    for way in ("with the action", "without the action", "chance"):
        assert words.count(way) == 2
    assert f"3 films × 64 candidates: {result['candidates_vary']}\n" in words
    four = result["four_parameters"]
    assert result["candidates_vary"] == "8 × 8 brightness × contrast"
    assert f"candidates: {four['candidates_vary']}\n" in words
    for part in (result, four):
        for k in (1, 3, 5):
            assert f"Recall@{k} {part['action'][f'recall@{k}']:6.2f}" in words
        low, high = part["intervals"]["action"]["recall@5"]
        assert f"Recall@5 {part['action']['recall@5']:6.2f} ({low:.1f} to {high:.1f})" in words
    assert Image.open(place / "d" / "errors.png").width > 600
    assert Image.open(place / "d" / "choices.png").width > 900
