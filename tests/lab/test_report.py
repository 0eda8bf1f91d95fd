"""The closing table: linear probes against scikit-learn, and on films with known labels."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lab_for_tests import TINY, Films, noise
from PIL import Image
from sklearn.metrics import roc_auc_score

from lab import common, report
from model import CheXWorld
from plumbing import metrics, own_table


def make_labels(tmp_path, text):
    (tmp_path / "table.csv").write_text(text)
    return own_table.Labels(tmp_path / "table.csv")


class Corner(torch.nn.Module):
    """An "encoder" whose features are the grey values of four patches; `blank` makes it blind."""

    def __init__(self, blank=False):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.blank = blank

    def forward(self, images):
        features = torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)
        return (0 * features if self.blank else features)[:, None]


@pytest.mark.slow
def test_probe_table_reads_the_right_films_and_splits(tmp_path):
    """Class "bright" is written into a corner; an unreadable film and an absent one are left out; a
    blind encoder scores 50."""
    rng = np.random.default_rng(0)
    films = {}
    lines = ["filename,label,split", "absent.png,bright,train"]
    for i in range(90):
        bright = i % 2
        split = ("train", "train", "val", "test", "test")[i // 2 % 5]
        film = rng.integers(90, 110, (64, 64)).astype(np.uint8)
        film[:32, :32] += np.uint8(40 * bright)
        films[f"x/{i}.png"] = film if i != 5 else None
        lines.append(f"{i}.png,{'bright' if bright else 'normal'},{split}")
    order = list(films)
    rng.shuffle(order)
    films = Films({name: films[name] for name in order})
    labels = make_labels(tmp_path, "\n".join(lines) + "\n")
    scores = report.probe_table(labels, films, {"corner": Corner(), "blind": Corner(True)}, 32)
    assert list(scores) == ["corner", "blind", "raw 64² pixels"]
    assert scores["corner"] == 100 and scores["blind"] == 50 and scores["raw 64² pixels"] > 95


def test_probe_of_noise_is_scored_on_the_test_split_alone(tmp_path):
    """Random labels: fitting train is easy, test must stay near chance, and equals scikit-learn's
    AUROC of the same scores."""
    films = Films({f"{i}.png": noise(i, (64, 64)) for i in range(120)})
    split = np.repeat(["train", "val", "test"], [40, 20, 60])
    y = np.random.default_rng(3).integers(0, 2, 120)
    lines = [f"{i}.png,{'x' if y[i] else 'normal'},{split[i]}\n" for i in range(120)]
    labels = make_labels(tmp_path, "filename,label,split\n" + "".join(lines))
    score = report.probe_table(labels, films, {"corner": Corner()}, 32)["corner"]
    images, _, _ = common.read_whole(films, np.arange(120), 32)
    x = Corner()(images)[:, 0].detach().numpy()
    guess = metrics.linear_probe(x[:40], y[:40, None], x[40:60], y[40:60, None], x[60:])
    truth = roc_auc_score(y[split == "test"], guess[:, 0])
    assert score == pytest.approx(100 * truth) and 30 < score < 70


@pytest.mark.slow
def test_the_closing_table_is_printed_and_written(tmp_path, capsys):
    torch.manual_seed(0)
    world = CheXWorld(**TINY)
    films = Films({f"{i}.png": noise(i) if i != 4 else None for i in range(40)})
    split = ["train", "val", "test"]
    lines = [f"{i}.png,{'x' if i // 3 % 2 else 'normal'},{split[i % 3]}\n" for i in range(40)]
    labels = make_labels(tmp_path, "filename,label,split\n" + "".join(lines))
    (tmp_path / "log.csv").write_text("step,l11,l22,l12,l21,rankme\n1,1,2,3,4,\n2,1,2,3,4,5\n")
    args = SimpleNamespace(seed=0, image=64)
    report.closing(args, tmp_path, world, films, np.array([3, 4]), [labels], "cpu")
    words = capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["domain"]["images"] == 1  # the other film cannot be read
    assert set(result["probe"]["table"]) == {
        "pre-trained",
        "random initialisation",
        "raw 64² pixels",
    }
    for way in ("action", "no_action", "random"):
        assert f"Recall@5 {result['domain'][way]['recall@5']:6.2f}" in words
    for name, value in result["probe"]["table"].items():
        assert f"{name:22s}  {value:6.2f}" in words
    assert Image.open(tmp_path / "curve.png").height > 600
    report.closing(args, tmp_path, world, films, np.array([], int), [], "cpu")
    assert json.loads((tmp_path / "result.json").read_text()) == {"domain": {}, "probe": {}}
