"""The stick for encoders: films with planted findings, against scikit-learn, and the program."""

import json

import numpy as np
import pytest
import torch
from lab_for_tests import Films, good, make_place, noise  # noqa: F401 (place is a fixture)
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score

from lab import common, probe
from plumbing import metrics, own_table
from plumbing.launch import UserError

BLIND = probe.RANDOM  # whom all others are compared with


class Corner(torch.nn.Module):
    """An "encoder" whose patches are the mean grey values of the film's quarters, as often as there
    are `copies`; `blank` makes it blind.
    """

    grid = 2

    def __init__(self, blank=False, copies=1):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.blank = blank
        self.copies = copies

    def forward(self, images):
        features = torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)
        return (0 * features if self.blank else features)[:, :, None].repeat(1, 1, self.copies)


def make_labels(tmp_path, lines, films):
    (tmp_path / "table.csv").write_text(
        "filename,label,patient_id,split\n" + "\n".join(lines) + "\n"
    )
    return own_table.Labels(tmp_path / "table.csv", films)


def judge_one(labels, films, encoders):
    _, judged = next(probe.judge_tables([labels], films, encoders, 32))
    return judged


def planted(tmp_path, count, step):
    """Films with a brighter corner (by `step` of 256) and a darker opposite one, so that the mean
    tells nothing; two per patient, one unreadable, one absent. → Films, Labels
    """
    rng = np.random.default_rng(0)
    films = {}
    lines = ["absent.png,bright,q,train"]
    for i in range(count):
        bright = i // 2 % 2
        split = ("train", "train", "val", "test", "test")[i // 4 % 5]
        film = rng.integers(90, 110, (64, 64)).astype(np.uint8)
        film[:32, :32] += np.uint8(step * bright)
        film[32:, 32:] -= np.uint8(step * bright)
        films[f"x/{i}.png"] = film if i != 5 else None
        lines.append(f"{i}.png,{'bright' if bright else 'normal'},p{i // 2},{split}")
    order = list(films)
    rng.shuffle(order)
    films = Films({name: films[name] for name in order})
    return films, make_labels(tmp_path, lines, films)


def test_a_planted_finding_is_above_random_and_a_blind_encoder_below_pixels(tmp_path, capsys):
    films, labels = planted(tmp_path, 120, 40)
    encoders = {"corner": Corner(), BLIND: Corner(True)}
    judged = judge_one(labels, films, encoders)
    test, every = judged["test"], judged["all"]
    assert test["films"] == 48 and test["patients"] == 24
    assert every["films"] == 119 and every["patients"] == 60
    for part in (test, every):
        assert part["values"]["corner, cells"] == 100 and part["values"]["raw 8² pixels"] > 95
        assert part["values"][BLIND] == part["values"][BLIND + probe.CELLS] == 50
        told = part["differences"]["corner, cells"]
        above = told[BLIND + probe.CELLS]
        assert above["word"] == "above" and above["difference"] == 50
        pixels = [name for name in told if name in probe.PIXELS]
        assert len(pixels) == 1 and told[pixels[0]]["word"] == "level with"
        assert part["differences"]["corner"][BLIND]["word"] == "level with"
        assert part["differences"][BLIND][pixels[0]]["word"] == "below"
        low, high = part["intervals"]["corner"]
        assert low < part["values"]["corner"] < high
    words = probe.judged_words(labels, judged, "seen by nobody")
    line = next(line for line in words.splitlines() if "corner, cells" in line)
    (blind,) = [line for line in words.splitlines()[:8] if line.startswith(f"  {BLIND}  ")]
    assert "50.0    no interval" in blind  # of 50 to 50
    assert "100.0    no interval" in line and "above (+50.0, +50.0 to +50.0)" in line
    assert "seen by nobody" in words and "48 test films" in words
    assert "a probe fitted to other patients; 60 patients" in words
    labels.patients = [films.names[i] for i in labels.where]  # as where no table names them
    judged = judge_one(labels, films, {BLIND: Corner(True)})
    words = probe.judged_words(labels, judged, "")
    assert "a probe fitted to other films; patients unknown: every film counts as one" in words
    assert judged["all"]["patients"] is None


def test_random_labels_are_level_and_scored_on_films_of_test_alone(tmp_path):
    """Fitting train is easy, test must stay near chance, and equals scikit-learn's AUROC."""
    films = Films({f"{i}.png": noise(i, (64, 64)) for i in range(120)})
    split = np.repeat(["train", "val", "test"], [40, 20, 60])
    y = np.random.default_rng(3).integers(0, 2, 120)
    labels = [f"{i}.png,{'x' if y[i] else 'normal'},p{i},{split[i]}" for i in range(120)]
    labels = make_labels(tmp_path, labels, films)
    encoders = {"corner": Corner(), BLIND: Corner(True)}
    judged = judge_one(labels, films, encoders)["test"]
    images, _, _ = common.read_whole(films, np.arange(120), 32)
    x = Corner()(images).mean(1).detach().numpy()
    guess = metrics.ridge_scores(x[:60], y[:60, None], np.arange(60), x[60:])
    value = judged["values"]["corner"]
    assert value == pytest.approx(100 * roc_auc_score(y[60:], guess[:, 0])) and 30 < value < 70
    assert judged["differences"]["corner"][BLIND]["word"] == "level with"


def test_every_finding_of_a_table_is_judged_alone_beside_the_mean():
    """One finding is in the features, one is not, and one has no positive test film."""
    rng = np.random.default_rng(4)
    y = rng.integers(0, 2, (150, 3)).astype(float)
    is_test = np.arange(150) >= 60
    y[is_test, 2] = 0
    patients = np.arange(150)
    x = rng.normal(size=(150, 6))
    x[:, 0] += 2 * y[:, 0]
    features = dict.fromkeys([BLIND, *probe.PIXELS], rng.normal(size=(150, 4))) | {"encoder": x}
    findings = ["mass", "nodule", "rib"]
    part = probe.judge_table(features, y, patients, is_test, [], findings)["test"]
    told = [part["findings"][finding]["encoder"] for finding in findings]
    guess = metrics.ridge_scores(x[:60], y[:60], patients[:60], x[60:])
    areas = [100 * roc_auc_score(y[60:, k], guess[:, k]) for k in (0, 1)]
    assert [one["value"] for one in told[:2]] == pytest.approx(areas)
    assert part["values"]["encoder"] == pytest.approx(np.mean(areas))
    assert told[0]["interval"][0] > 80 and told[1]["interval"][0] < 50 < told[1]["interval"][1]
    assert told[2] == {"value": None, "interval": None}
    alone = probe.judge_table(features, y[:, :1], patients, is_test, [], findings[:1])["test"]
    assert "findings" not in alone and alone["values"]["encoder"] == pytest.approx(areas[0])
    assert alone["intervals"]["encoder"] == told[0]["interval"]


def test_many_films_are_cast_onto_main_directions_and_keep_what_they_tell(tmp_path, monkeypatch):
    films, labels = planted(tmp_path, 120, 40)
    monkeypatch.setattr(probe, "MANY_FILMS", 100)
    monkeypatch.setattr(probe, "NUMBERS", 24)
    encoders = {"corner": Corner(copies=3), BLIND: Corner(True, 3)}
    features, read = probe.features_of_set(films, np.arange(120), encoders, 32, "films")
    assert features["corner, cells"].shape[1] <= 24 and features["corner"].shape == (119, 3)
    assert features["raw 64² pixels"].shape == (119, 24)
    pixels = features["raw 64² pixels"]
    sample, _, _ = common.read_whole(films, common.evenly(np.arange(120), 48), 64)
    expected = PCA(24, svd_solver="full").fit(sample.flatten(1).numpy())
    images, _, _ = common.read_whole(films, read, 64)
    expected = np.abs(expected.transform(images.flatten(1).numpy()))
    assert np.allclose(np.sort(np.abs(pixels).mean(0)), np.sort(expected.mean(0)), rtol=1e-3)
    again, _ = probe.features_of_set(films, np.arange(120), encoders, 32, "films")
    assert all(np.array_equal(again[name], features[name]) for name in features)
    judged = judge_one(labels, films, encoders)
    assert list(judged) == ["test"] and judged["test"]["values"]["corner, cells"] > 95


def test_how_many_films_the_encoder_saw_is_said(tmp_path):
    """By film and by patient; b2.png, another film of b.png's patient, was in pre-training."""
    films = Films({f"{name}.png": noise(0) for name in ("a", "b", "b2", "c", "d")})
    lines = ["a.png,x,p,train", "b.png,normal,q,train", "c.png,x,r,val", "d.png,normal,s,test"]
    labels = make_labels(tmp_path, lines, films)
    learnt = {"b2.png", "c.png"}, {"q", "r"}
    words = probe.seen_words(learnt, labels, films)
    assert ": 0 of 1 of test, 2 of 3 of train and val, by name" in words
    # A patient of whom pre-training knew nothing but the film.
    assert common.seen_by(({"a.png"}, {"a.png"}), films, list("vvwxy")).tolist()[:3] == [1, 1, 0]
    assert "nobody can tell" in probe.seen_words(None, labels, films)
    assert common.trained_on(tmp_path / "vit.pth", films) is None


@pytest.mark.slow
def test_the_program_judges_on_several_tables(place):
    lines = (place / "set" / "phantoms.csv").read_text()
    (place / "again.csv").write_text(lines)
    tables = "set/phantoms.csv,again.csv"
    flags = ("--weights", "runs/tiny/encoder.pt", "--data", "set/films", "--table", tables)
    words = good(place, "probe", *flags, "--out", "judged")
    assert "nobody can tell" in words  # this run has no config.json
    result = json.loads((place / "judged" / "result.json").read_text())
    one, other = result["tables"].values()
    assert one == other and one["test"]["values"].keys() == one["all"]["values"].keys()
    assert list(one["all"]["values"])[:4] == [
        "encoder",
        "encoder, cells",
        "random initialisation",
        "random initialisation, cells",
    ]
    assert words.count("better raw pixels (difference, its interval)") == 4
    own = ["--weights", str(place / "runs/tiny/encoder.pt"), "--data", str(place / "set/films")]
    with pytest.raises(UserError, match="--data needs --table"):
        probe.main([*own, "--out", str(place / "without_table")])
