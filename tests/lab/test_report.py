"""Domain test, probe and label tables against brute force, with models whose answers are known."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

import augment
from lab import common, domain, report
from model import CheXWorld, ViT
from plumbing import metrics, table
from plumbing.film import UnreadableFilm
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


class Films:
    """A list of arrays under names; None cannot be read."""

    def __init__(self, films):
        self.names, self.films = list(films), list(films.values())

    def __len__(self):
        return len(self.films)

    def __getitem__(self, i):
        if self.films[i] is None:
            raise UnreadableFilm("broken")
        return self.films[i]


def noise(seed, shape=(40, 50)):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_whole_squeezes_films_to_squares():
    films = Films({"a": noise(0), "b": noise(1, (64, 48))})
    out = common.whole(films, np.array([1, 0]), 32)
    assert (
        out.shape == (2, 1, 32, 32)
        and out.dtype == torch.float32
        and 0 <= out.min()
        and out.max() <= 1
    )
    for image, film in zip(out, (films[1], films[0])):
        assert np.array_equal(
            (255 * image[0]).round().numpy(),
            np.asarray(Image.fromarray(film).resize((32, 32), Image.BICUBIC)),
        )


def test_pooled_is_the_mean_token_whatever_the_batch():
    torch.manual_seed(0)
    vit, images = ViT(32, 8, 32, 1, 4), torch.rand(5, 1, 32, 32)
    by_hand = torch.stack([sum(vit(image[None])[0, k] for k in range(16)) / 16 for image in images])
    for batch in (1, 2, 128):
        out = common.pooled(vit, images, batch)
        assert torch.allclose(out, by_hand, atol=1e-5) and not out.requires_grad


# ------------------------------------------------------------------------------------------------ domain sensitivity test
@pytest.fixture(scope="module")
def world():
    torch.manual_seed(0)
    return CheXWorld(**TINY).eval()


@pytest.mark.parametrize("told", [True, False])
def test_domain_errors_equal_a_slow_loop(world, told):
    """Eq. (13): y_j by candidate j's tone, x_i = T_{a_i}(y_i), error = distance over all patches and features, in float64."""
    image, candidates, actions = (
        torch.rand(1, 1, 32, 32),
        domain.domain_candidates(3),
        augment.sample_actions(9, torch_generator(1)),
    )
    out = domain.domain_errors(world, image, actions, candidates)[0 if told else 1]
    y = [augment.tone(image, c[None, 0], c[None, 1]) for c in candidates]
    truth = np.zeros((9, 9))
    for i in range(9):
        x = augment.apply_action(y[i], actions[i][None])
        guess = (
            world.predict(x, actions[i][None] if told else torch.tensor([augment.IDENTITY]))
            .detach()
            .double()
            .numpy()
        )
        for j in range(9):
            truth[i, j] = np.sqrt(((guess - world.targets(y[j]).double().numpy()) ** 2).sum())
    assert np.abs(out.detach().numpy() - truth).max() < 1e-3


def test_domain_errors_of_64_candidates_rank_as_in_float64(world):
    """64 rows make torch.cdist use its matrix product: the near ties of a fresh model must still fall as exact arithmetic has them."""
    image, candidates, actions = (
        torch.rand(1, 1, 32, 32),
        domain.domain_candidates(8),
        augment.sample_actions(64, torch_generator(2)),
    )
    out = domain.domain_errors(world, image, actions, candidates)[0].double()
    y = augment.tone(image.expand(64, -1, -1, -1), candidates[:, 0], candidates[:, 1])
    with torch.no_grad():
        guess, goal = (
            world.predict(augment.apply_action(y, actions), actions).double().flatten(1),
            world.targets(y).double().flatten(1),
        )
    truth = (goal[None] - guess[:, None]).square().sum(-1).sqrt()
    assert (out - truth).abs().max() < 1e-4 * truth.max()
    rank = lambda e: (e < e.diagonal()[:, None]).sum(1)
    assert (rank(out) - rank(truth)).abs().max() <= 1


class Oracle(torch.nn.Module):
    """Knows the tone by heart: undoes the action when told of it, else takes the augmented image for the target."""

    def __init__(self):
        super().__init__()
        self.anchor, self.coords = torch.nn.Parameter(torch.zeros(1)), torch.zeros(256, 2)

    def encoder(self, images):
        return images

    def targets(self, images):
        return images.flatten(1)[..., None]

    def predictor(self, images, context_coords, target_coords, action):
        brightness, contrast = action[:, 0].view(-1, 1, 1, 1), action[:, 1].view(-1, 1, 1, 1)
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
    assert (
        domain.domain_test(Oracle(), images)
        == result
        != domain.domain_test(Oracle(), images, seed=1)
    )


class Blind(Oracle):
    def predictor(self, images, context_coords, target_coords, action):
        return torch.zeros(len(images), images[0].numel(), 1)

    def targets(self, images):
        return torch.ones(len(images), images[0].numel(), 1)


def test_a_model_that_says_the_same_of_everything_scores_chance():
    result = domain.domain_test(Blind(), torch.rand(2, 1, 16, 16))
    assert result["action"] == pytest.approx(result["random"]) and result[
        "no_action"
    ] == pytest.approx(result["random"])


# ---------------------------------------------------------------- the linear probe
def make_labels(tmp_path, text, name="table.csv"):
    (tmp_path / name).write_text(text)
    return table.Labels(tmp_path / name)


def test_readable():
    films = Films({"a": noise(0), "b": None, "c": noise(1)})
    assert (
        common.readable(films, np.array([2, 1, 0])).tolist() == [2, 0]
        and common.readable(films, np.array([1])).tolist() == []
    )


class Corner(torch.nn.Module):
    """An "encoder" whose features are the grey values of four patches; `blank` makes it blind."""

    def __init__(self, blank=False):
        super().__init__()
        self.anchor, self.blank = torch.nn.Parameter(torch.zeros(1)), blank

    def forward(self, images):
        features = torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)
        return (0 * features if self.blank else features)[:, None]


def test_probe_table_reads_the_right_films_and_splits(tmp_path):
    """Class "bright" is written into a corner; a bad film and an absent one are left out; a blind encoder scores 50."""
    rng, films, lines = np.random.default_rng(0), {}, ["filename,label,split"]
    for i in range(90):
        bright, split = i % 2, ("train", "train", "val", "test", "test")[i // 2 % 5]
        film = rng.integers(90, 110, (64, 64)).astype(np.uint8)
        film[:32, :32] += np.uint8(40 * bright)
        films[f"x/{i}.png"] = film if i != 5 else None
        lines.append(f"{i}.png,{'bright' if bright else 'normal'},{split}")
    lines.insert(1, "absent.png,bright,train")
    order = list(films)
    rng.shuffle(order)
    films = Films({name: films[name] for name in order})
    labels = make_labels(tmp_path, "\n".join(lines) + "\n")
    scores = report.probe_table(labels, films, {"corner": Corner(), "blind": Corner(True)}, 32)
    assert list(scores) == ["corner", "blind", "raw 64² pixels"]
    assert scores["corner"] == 100 and scores["blind"] == 50 and scores["raw 64² pixels"] > 95


def test_probe_of_noise_is_scored_on_the_test_split_alone(tmp_path):
    """Random labels: fitting train is easy, test must stay near chance, and equals scikit-learn's AUROC of the same scores."""
    films = Films({f"{i}.png": noise(i, (64, 64)) for i in range(120)})
    rng = np.random.default_rng(3)
    split = np.repeat(["train", "val", "test"], [40, 20, 60])
    y = rng.integers(0, 2, 120)
    labels = make_labels(
        tmp_path,
        "filename,label,split\n"
        + "".join(f"{i}.png,{'x' if y[i] else 'normal'},{split[i]}\n" for i in range(120)),
    )
    score = report.probe_table(labels, films, {"corner": Corner()}, 32)["corner"]
    x = Corner()(common.whole(films, np.arange(120), 32))[:, 0].detach().numpy()
    truth = roc_auc_score(
        y[split == "test"],
        metrics.linear_probe(x[:40], y[:40, None], x[40:60], y[40:60, None], x[60:])[:, 0],
    )
    assert score == pytest.approx(100 * truth) and 30 < score < 70
