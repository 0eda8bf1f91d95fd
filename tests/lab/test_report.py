"""The closing table: what is printed and what is written."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lab_for_tests import TINY, Films, noise
from PIL import Image
from sklearn.metrics import roc_auc_score

from lab import report
from model import CheXWorld, ViT
from plumbing import own_table
from plumbing.film import UnreadableFilm
from plumbing.metrics import ridge_scores
from plumbing.splits import Example


@pytest.mark.slow
def test_the_closing_table_is_printed_and_written(tmp_path, capsys):
    torch.manual_seed(0)
    world = CheXWorld(**TINY)
    films = Films({f"{i}.png": noise(i) if i != 4 else None for i in range(40)})
    split = ["train", "val", "test"]
    lines = [f"{i}.png,{'x' if i // 3 % 2 else 'normal'},{split[i % 3]}\n" for i in range(40)]
    (tmp_path / "table.csv").write_text("filename,label,split\n" + "".join(lines))
    labels = own_table.Labels(tmp_path / "table.csv", films)
    (tmp_path / "log.csv").write_text("step,l11,l22,l12,l21,rankme\n1,1,2,3,4,\n2,1,2,3,4,5\n")
    args = SimpleNamespace(seed=0, image=64, weights=None)
    report.judge_on_held_out(args, tmp_path, world, films, np.array([3, 4]), [labels])
    words = capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["domain"]["images"] == 1  # the other film cannot be read
    assert "bad film, left out of the domain test: 4.png: " in words
    assert {"pre-trained", "random initialisation", "raw 64² pixels"} < set(
        result["probe"]["table"]
    )
    part = result["probe_intervals"]["table"]["test"]
    assert part["values"] == result["probe"]["table"] and part["films"] == 13
    assert "pre-training saw no test film" in words
    for way in ("action", "no_action", "random"):
        assert f"Recall@5 {result['domain'][way]['recall@5']:6.2f}" in words
    for name, value in result["probe"]["table"].items():
        assert re.search(rf"\n  {re.escape(name)} +{value:.1f} ", words)
    assert Image.open(tmp_path / "curve.png").height > 600
    args.weights = "encoder.pt"
    report.judge_on_held_out(args, tmp_path, world, films, np.array([], int), [labels])
    words = capsys.readouterr().out
    assert "what --weights saw is unknown" in words and "pre-training saw" not in words
    report.judge_on_held_out(args, tmp_path, world, films, np.array([], int), [])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result.pop("made_with")["command"] and result.pop("step") == 2
    assert result == {"domain": {}, "probe": {}, "probe_intervals": {}}


class Part:
    """Films of one split of a task, as data.TaskFilms gives them."""

    def __init__(self, films, targets, first):
        patients = range(first, first + len(films))
        pairs = zip(targets, patients, strict=True)
        self.examples = [Example(Path(f"{p}.png"), tuple(t), f"p{p}") for t, p in pairs]
        self.names = [f"{p}.png" for p in patients]
        self.films = films

    def __len__(self):
        return len(self.films)

    def __getitem__(self, i):
        if self.films[i] is None:
            raise UnreadableFilm("broken")
        return self.films[i], None


@pytest.mark.parametrize("is_random", [True, False])
def test_a_fine_tuned_model_is_judged_beside_probes_of_the_same_films(capsys, is_random):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, (90, 2)).astype(float)
    films = rng.integers(0, 200, (90, 64, 64), dtype=np.uint8)
    films[:, :20, :20] += (30 * y[:, 0]).astype(np.uint8)[:, None, None]
    y[7, 1] = np.nan
    listed = [None if i in (4, 71) else film for i, film in enumerate(films)]
    parts = {
        "train": Part(listed[:40], y[:40], 0),
        "val": Part(listed[40:50], y[40:50], 40),
        "test": Part(listed[50:], y[50:], 50),
    }
    seeds = [{i: rng.normal(size=2) + y[50 + i] for i in range(40) if i != 21} for _ in range(3)]
    del seeds[1][30]  # a film that one seed has not read is left out everywhere
    vit = ViT(64, 16, dim=16, depth=1, heads=2)
    judged = report.beside(parts, seeds, vit, is_random, 0, "cells")
    assert (report.START in judged["values"]) != is_random
    assert judged["films"] == judged["patients"] == 38

    test = [i for i in range(50, 90) if i not in (71, 80)]
    areas = [roc_auc_score(y[test, k], [s[i - 50][k] for i in test]) for s in seeds for k in (0, 1)]
    assert judged["values"][report.MODEL] == pytest.approx(100 * np.mean(areas))
    fit = [i for i in range(50) if i != 4]
    x = films.reshape(90, -1).astype(np.float32) / 255
    probe = ridge_scores(x[fit], y[fit], np.array(fit), x[test])
    own = 100 * np.mean([roc_auc_score(y[test, k], probe[:, k]) for k in (0, 1)])
    assert judged["values"]["raw 64² pixels"] == pytest.approx(own, abs=0.3)
    (untrained, pixels), told = zip(*judged["differences"][report.MODEL].items(), strict=True)
    assert untrained == "random initialisation, cells" and pixels.startswith("raw ")
    values = judged["values"]
    own, *others = (values[name] for name in (report.MODEL, untrained, pixels))
    assert [each["difference"] for each in told] == pytest.approx([own - value for value in others])
    said = capsys.readouterr().out
    torch.rand(9)
    assert report.beside(parts, seeds, vit, is_random, 0, "cells") == judged
    few = report.beside(parts, seeds, vit, is_random, 0, "mean", are_few=True)
    probe = ridge_scores(x[fit[:39]], y[fit[:39]], np.array(fit[:39]), x[test])
    own = 100 * np.mean([roc_auc_score(y[test, k], probe[:, k]) for k in (0, 1)])
    assert few["values"]["raw 64² pixels"] == pytest.approx(own, abs=0.3)
    assert "linear probes of the 39 films of train, judged on 38" in capsys.readouterr().out
    assert "linear probes of the 49 films of train and val, judged on 38 of test" in said
    assert "random initialisation" in few["differences"][report.MODEL]
    assert ("The model began with random weights" in said) == is_random
    assert re.search(rf"\n  {report.MODEL} +{judged['values'][report.MODEL]:.1f} ", said)


def test_masks_and_many_films_are_not_judged_beside():
    films = {"train": range(2000), "val": range(500), "test": range(500)}
    assert report.why_not_beside("labels", films, True, "o") is None
    assert report.why_not_beside("classes", films, True, "o") is None
    assert report.why_not_beside("mask", films, True, "o") == ""
    assert "when the training is over" in report.why_not_beside("labels", films, False, "o")
    words = report.why_not_beside("labels", films | {"test": range(501)}, True, "o")
    assert words.startswith("of more than 3,000 films no") and words.endswith("o/films.csv")
