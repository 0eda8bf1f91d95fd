"""What a fine-tuning run says of its films, and how a finished model is tested on others."""

import csv
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import auc, roc_auc_score

from plumbing import results
from plumbing.benchmarks import TASKS, load_task
from plumbing.launch import UserError
from plumbing.metrics import bootstrap
from plumbing.splits import Example, Splits


def test_judgement_of_three_classes_leaves_unread_films_out():
    rng = np.random.default_rng(0)
    rows = {i: rng.normal(size=3) for i in (0, 1, 2, 4, 5, 6, 8)}  # 3 and 7 could not be read
    targets = np.array([np.eye(3)[i % 3] for i in rows])
    table = np.stack(list(rows.values()))
    value, per_class = results.judge("classes", "abc", table, targets)
    assert value == pytest.approx(100 * np.mean([row.argmax() == i % 3 for i, row in rows.items()]))
    is_b = [i % 3 == 1 for i in rows]
    area = roc_auc_score(is_b, [row[1] for row in rows.values()])
    assert per_class["b"] == pytest.approx(100 * area)


def test_the_interval_of_a_mean_is_over_the_same_classes_in_every_draw():
    rng = np.random.default_rng(0)
    targets = np.zeros((60, 2))
    targets[:30, 0] = 1
    targets[5, 1] = 1  # a third of the draws lack it
    table = rng.standard_normal((60, 2)) + 3 * targets * [1, -1]
    patients = np.arange(60)
    bounds = bootstrap(partial(results.measure, "labels", table, targets), patients)
    assert np.isnan(bounds[0]).all() and np.isnan(bounds[2]).all()
    assert bounds[1, 0] > 0.9
    targets[5:25, 1] = 1
    low, high = bootstrap(partial(results.measure, "labels", table, targets), patients)[0]
    means = []
    for _ in range(1000):
        i = rng.integers(60, size=60)
        means.append(np.mean([roc_auc_score(targets[i, k], table[i, k]) for k in (0, 1)]))
    assert (low, high) == pytest.approx(np.quantile(means, (0.025, 0.975)), abs=0.02)
    targets[:, 1] = np.nan  # not known at all: the mean is over the other
    value, per_class = results.judge("labels", "ab", table, targets)
    assert value == per_class["a"] and per_class["b"] is None


def test_predictions_keep_the_order_of_very_sure_films(tmp_path):
    logits = np.linspace(20, 34, 50, dtype=np.float32)  # all of them are 1.00000000 to 9 digits
    examples = [Example(Path(f"{k}.png"), (k % 2,), f"p{k}") for k in range(50)]
    films = {"test": SimpleNamespace(examples=examples)}
    task = SimpleNamespace(kind="labels", labels=("a",), root=Path("/"), films=films)
    results.write_predictions(tmp_path, task, {k: logits[k : k + 1] for k in range(50)})
    read = results.read_predictions(tmp_path, task)
    probability = 1 / (1 + np.exp(-logits.astype(float)))
    assert np.allclose([read[k] for k in range(50)], probability[:, None], atol=1e-15)
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    written = [float(row["a"]) for row in rows]
    assert np.array_equal(np.argsort(written), np.arange(50)) and len(set(written)) == 50


def test_predictions_spell_film_and_patient_as_the_table_does(tmp_path):
    """00001108 became 1108 and P001\\a became P001/a, so that no sheet could be joined to them."""
    (tmp_path / "P001").mkdir()
    names = [f"{k}.png" for k in range(8)]
    for name in names:
        Image.new("L", (8, 8)).save(tmp_path / "P001" / name)
    lines = [f"P001\\{name},{k % 2},{'' if k == 4 else f'0000{k}'}" for k, name in enumerate(names)]
    (tmp_path / "t.csv").write_text("\n".join(["file,a,patient_id", *lines]))
    trained = ("labels", ("a",), "")
    splits = load_task("csv", tmp_path, table=tmp_path / "t.csv", trained=trained)
    films = {"test": SimpleNamespace(examples=splits.test)}
    task = SimpleNamespace(kind="labels", labels=("a",), root=tmp_path, films=films)
    results.write_predictions(tmp_path, task, {k: np.float32([k]) for k in range(8)})
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    assert [row["film"] for row in rows] == [f"P001\\{name}" for name in names]
    assert [row["patient"] for row in rows] == ["" if k == 4 else f"0000{k}" for k in range(8)]
    assert splits.test[3].patient == "3" and set(results.read_predictions(tmp_path, task)) == {
        *range(8)
    }


@pytest.fixture
def clinic():
    """A task with two labels, 60 films of 30 patients, their scores and what is true of them."""
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 2, (60, 2)).astype(float)
    truth[:9, 1] = np.nan
    scores = np.clip(0.3 * truth.copy() + 0.7 * rng.random((60, 2)), 0, 1)
    scores[:9, 1] = 0.5
    examples = [Example(Path(f"{k}.png"), (), f"p{k % 30}") for k in range(60)]
    task = SimpleNamespace(kind="labels", labels=("a", "b"), films={})
    return task, scores, truth, examples


@pytest.mark.parametrize("kind", ["labels", "classes"])
def test_films_that_all_have_a_probability_of_one_are_still_ordered(kind):
    logits = np.random.default_rng(0).normal(size=(50, 3))
    odds = results.log_odds(kind, logits)
    likely = results.probabilities(kind, logits)
    assert odds == pytest.approx(np.log(likely / (1 - likely)))
    sure = np.array([[40.0, -1, -1], [50.0, -1, -1], [38.0, -1, -1]])
    assert (results.probabilities(kind, sure)[:, 0] == 1).all()
    truth = np.array([[1.0, 0, 0], [1, 0, 0], [0, 0, 1]])
    _, per_class = results.judge(kind, "abc", results.log_odds(kind, sure), truth)
    assert per_class["a"] == 100


def test_operating_points_are_counted_film_by_film_with_intervals_over_patients(clinic):
    task, scores, truth, examples = clinic
    points = results.operating_points(task, scores, truth, examples, [0.45, 0.6])
    for k, name in enumerate("ab"):
        called = scores[:, k] >= (0.45, 0.6)[k]
        ill = truth[:, k] == 1
        well = truth[:, k] == 0
        point = points[name]
        assert point["sensitivity"][0] == pytest.approx(100 * called[ill].mean())
        assert point["specificity"][0] == pytest.approx(100 - 100 * called[well].mean())
        assert point["PPV"][0] == pytest.approx(100 * ill[called & (ill | well)].mean())
        assert point["NPV"][0] == pytest.approx(100 * well[~called & (ill | well)].mean())
        assert point["films"] == [ill.sum(), well.sum()]
        patients = [{i % 30 for i in np.flatnonzero(side)} for side in (ill, well)]
        assert point["patients"] == [len(patients[0]), len(patients[1] - patients[0])]
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(2000):
        patients = rng.integers(30, size=30)
        films = np.concatenate([patients, patients + 30])
        called = scores[films, 0] >= 0.45
        drawn.append(100 * called[truth[films, 0] == 1].mean())
    bounds = np.percentile(drawn, [2.5, 97.5])
    assert points["a"]["sensitivity"][1:] == pytest.approx(bounds, abs=2.5)


def test_what_is_said_of_operating_points(clinic):
    task, scores, truth, examples = clinic
    points = results.operating_points(task, scores, truth, examples, [0.45, None])
    counts, shares = results.describe_point([points["a"]])
    sensitivity, low, high = points["a"]["sensitivity"]
    assert "yes from 0.45 on, chosen on val" in counts
    assert f"sensitivity {sensitivity:.1f} ({low:.1f} to {high:.1f}), specificity" in shares
    assert shares.endswith(f" at prevalence {100 * (truth[:, 0] == 1).mean():.1f}")
    (alone,) = results.describe_point([points["b"]])
    assert "no threshold" in alone and points["b"]["PPV"] == [None, None, None]
    other = results.operating_points(task, scores, truth, examples, [0.6, None])["a"]
    counts, shares = results.describe_point([points["a"], other])
    both = [sensitivity, other["sensitivity"][0]]
    assert "yes from 0.45, by seed to 0.6 on" in counts
    assert f"sensitivity {np.mean(both):.1f} ± {np.std(both, ddof=1):.1f}, " in shares
    perfect = results.operating_points(task, truth, truth, examples, [0.5, 0.5])["a"]
    assert "sensitivity 100.0 (no interval)" in results.describe_point([perfect])[1]
    truth[:] = np.nan
    unknown = results.operating_points(task, scores, truth, examples, [0.5, 0.5])
    assert results.describe_point([unknown["a"]]) == []


def test_roc_csv_holds_the_curve_whose_area_is_the_auroc(clinic, tmp_path):
    task, scores, truth, _ = clinic
    truth[:, 1] = 1  # no negative film, no curve
    logits = dict(enumerate(np.log(scores + 1e-9) - np.log(1 - scores + 1e-9)))
    results.write_roc(tmp_path, task, logits, truth, None)
    rows = list(csv.DictReader((tmp_path / "roc.csv").open()))
    assert {row["class"] for row in rows} == {"a"}
    false_alarms = [1 - float(row["specificity"]) for row in rows]
    area = auc(false_alarms, [float(row["sensitivity"]) for row in rows])
    assert area == pytest.approx(roc_auc_score(truth[:, 0], scores[:, 0]))
    row = rows[len(rows) // 2]
    hits = scores[truth[:, 0] == 1, 0] >= float(row["threshold"]) - 1e-7
    assert float(row["sensitivity"]) == pytest.approx(hits.mean())
    assert Image.open(tmp_path / "roc.png").size == (480, 480)
    results.write_roc(tmp_path / "none", task, logits, truth * np.nan, None)
    assert not (tmp_path / "none").exists()


def test_it_is_said_whose_recipe_it_is():
    """Published: for VinDr epochs and batch, for CheXpert the epoch alone, else neither."""
    said = {task: results.whose_recipe(task) for task in TASKS}
    assert "epochs and batch are those of the authors' code" in said["vindr"]
    assert "one epoch is the authors' code's, the batch is ours" in said["chexpert"]
    for task in set(said) - {"vindr", "chexpert", "csv"}:
        words = "What is left open is the paper's, but for epochs and batch, which are ours."
        assert said[task] == words
    assert "but for epochs, batch, head and pool" in said["csv"]


def test_it_is_said_why_there_is_no_interval():
    assert results.with_interval(91.2, None, 2) == "91.20 % (no interval: 2 test patients)"
    assert results.with_interval(91.2, None, 9).endswith(
        "9 test patients, among them too few with it or without it)"
    )
    assert results.with_interval(100, [100, 100], 56).startswith("100.00 % (no interval: all ")
    assert results.with_interval(91.2, [88, 94.1], 9) == "91.20 % (95 % interval 88.00 to 94.10)"


def test_seeds_that_are_one_probe_are_said_to_be_and_others_keep_an_interval():
    """Of a linear probe of given weights nothing depends on the seed."""
    seeds = [80.0, 84.0]
    summary = dict(task="csv", metric="AUROC", metric_of="AUROC", freeze=True, weights="encoder.pt")
    summary |= dict(seeds=[80.0] * 2, mean=80.0, std=0.0, intervals=[[65.8, 90.8]] * 2, cut=[None])
    summary |= dict(per_class={"a": 80.0}, per_class_intervals=[{"a": [65.8, 90.8]}] * 2)
    summary |= dict(operating_points=[None], split={"test": {"films": 9, "patients": 9}})
    *_, of_class, last = results.describe_summary(summary)
    assert of_class.endswith("a" + " " * 32 + "80.00 % (95 % interval 65.80 to 90.80)")
    assert "80.00 % (95 % interval 65.80 to 90.80); all 2 seeds are the same" in last
    for change in (dict(freeze=False), dict(weights="none"), dict(metric="Dice")):
        std = results.mean_and_std(seeds)[1]
        other = summary | dict(seeds=seeds, mean=82.0, std=std) | change
        last = results.describe_summary(other)[-1]
        assert "82.00 ± 2.83 % over 2 seeds; the first alone 80.00 % (95 % interval 65.80" in last
    assert results.mean_and_std([80.0]) == (80.0, None)  # one seed has no deviation


def test_drawn_films_that_teach_nothing_are_refused():
    def films(*values):
        return [Example(Path(f"{k}.png"), (v, 0), f"p{k}") for k, v in enumerate(values)]

    splits = Splits("csv", "labels", ("a", "b"), films(0, 1, 0), films(0, 1), films(0, 1))
    results.refuse_untestable(splits, splits.train)
    with pytest.raises(UserError, match="the 2 training films: nothing .*--draw"):
        results.refuse_untestable(splits, films(0, 0))
    with pytest.raises(UserError, match="the 2 training films: nothing .* another split"):
        results.refuse_untestable(replace(splits, train=films(1, 1)), films(1, 1))
    with pytest.raises(UserError, match="the 1 test films: nothing can be measured"):
        results.refuse_untestable(replace(splits, test=films(1)), splits.train)


def test_what_max_steps_cut_is_said_in_capitals():
    cut = results.cut_of({"over": False, "steps": 7, "steps_in_all": 18})
    summary = dict(task="csv", metric="AUROC", metric_of="AUROC", freeze=False, weights="none")
    summary |= dict(seeds=[80.0], mean=80.0, std=None, intervals=[None], cut=[cut], per_class={})
    summary |= dict(operating_points=[None], split={"test": {"films": 9, "patients": 9}})
    summary |= dict(per_class_intervals=[{}])
    assert results.describe_summary(summary)[-1].startswith("CUT at step 7 of 18, test AUROC 80.00")
    assert results.cut_of({"over": True, "steps": 7}) is results.cut_of({}) is None


def test_of_a_finished_model_it_is_said_that_it_was_fine_tuned_at_its_size():
    shape = dict(image=64, patch=16, dim=192, depth=4)
    said = results.describe_weights(Path("best.pt"), "as asked", shape, "fine-tuned")
    assert said.endswith("ViT 192 × 4, fine-tuned at 64 px in 16 px patches")


def test_it_is_said_of_which_labels_a_mean_is():
    said = [
        results.metric_of("labels", dict(zip("abcd", values, strict=False)))
        for values in ([90], [90, 80, 70, 60], [90, None, 70, None], [None, 80, None, None])
    ]
    assert said == [
        "AUROC",
        "AUROC, mean of 4 labels,",
        "AUROC, mean of the 2 of 4 labels that can be judged,",
        "AUROC of b alone, the only one of 4 that can be judged,",
    ]
    assert results.metric_of("mask", {"all films": 1, "films with a mask": None}) == "Dice"
    assert results.metric_of("labels", {"a": None, "b": None}) == "AUROC"


@pytest.mark.parametrize(
    "rows, labels",
    [
        (["Pathology", "Mass|Disease", "normal", "mask|split"], None),
        (["filename|patient id", "Segmentation", "normal", "Training"], None),
        (["Disease", "normal", "Disease", "normal"], ("Disease",)),
        (["mask", "normal", "mask", "normal"], ("class mask",)),
    ],
)
def test_films_csv_can_be_read_back_however_its_classes_are_called(tmp_path, rows, labels):
    lines = ["file,patient,split,label"]
    for k in range(12):
        Image.new("L", (4, 4), k).save(tmp_path / f"{k}.png")
        lines.append(f"{k}.png,P{k},{('train', 'val', 'test')[k // 4]},{rows[k % 4]}")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    first = load_task("csv", tmp_path, tmp_path / "t.csv")
    results.write_films(tmp_path, first, tmp_path)
    again = load_task("csv", tmp_path, tmp_path / "films.csv")
    assert [name.removeprefix("class ") for name in again.labels] == list(first.labels)
    assert labels is None or again.labels == labels
    for split in ("train", "val", "test"):
        films = [
            {(e.path, e.patient, tuple(e.truth)) for e in getattr(s, split)} for s in (first, again)
        ]
        assert films[0] == films[1]
