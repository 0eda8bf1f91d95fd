"""Metrics against scikit-learn, brute force and closed forms."""

import statistics
import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import confusion_matrix, f1_score, log_loss, roc_auc_score, roc_curve
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict
from sklearn.preprocessing import StandardScaler

from plumbing import metrics


def blobs(n, d, seed, shift=0.7):
    """Features (n, d) of very different scales, the first of which tells the label a little."""
    rng = np.random.default_rng(seed)
    y = (rng.random(n) < 0.4).astype(float)
    x = rng.normal(size=(n, d)) * rng.uniform(0.1, 30, d) + 5
    x[:, 0] += shift * y * x[:, 0].std()
    return x, y


@pytest.mark.parametrize("levels", [3, 10, 10**6])
def test_auroc_is_scikit_learns_ties_included(levels):
    rng = np.random.default_rng(levels)
    for _ in range(20):
        labels = np.r_[0, 1, rng.integers(0, 2, 48)]
        scores = np.round(rng.random(50) * levels)
        truth = pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
        assert metrics.auroc(scores, labels) == truth
        assert metrics.auroc(torch.tensor(scores), torch.tensor(labels)) == truth


def test_auroc_without_one_class_is_nan():
    assert np.isnan(metrics.auroc([0.1, 0.2], [1, 1]))
    assert np.isnan(metrics.auroc([0.1, 0.2], [0, 0]))
    assert np.isnan(metrics.auroc([0.1, float("nan"), 0.3], [0, 1, 1]))


@pytest.mark.parametrize("levels", [4, 1000])
def test_roc_curve_is_scikit_learns_and_youden_is_the_best_of_all_thresholds(levels):
    rng = np.random.default_rng(levels)
    labels = rng.integers(0, 2, 60).astype(float)
    scores = (rng.integers(0, levels, 60) + labels * levels // 3) / levels
    false_alarms, hits, from_here = roc_curve(labels, scores, drop_intermediate=False)
    labels_with_gap = np.append(labels, np.nan)
    curve = metrics.roc_curve(np.append(scores, 0.123), labels_with_gap)
    for ours, theirs in zip(curve, (from_here, hits, 1 - false_alarms), strict=True):
        assert ours == pytest.approx(theirs[::-1])

    def rates(threshold):
        called = scores >= threshold
        return called[labels == 1].mean(), 1 - called[labels == 0].mean()

    chosen = metrics.youden_threshold(np.append(scores, 0.123), labels_with_gap)
    best = max(sum(rates(threshold)) for threshold in [*scores, np.inf])
    assert sum(rates(chosen)) == pytest.approx(best)
    equals = [t for t in scores if sum(rates(t)) == pytest.approx(best)]
    assert rates(chosen) == rates(min(equals))
    assert chosen not in scores


def test_a_threshold_lies_in_the_gap_and_is_none_without_both_classes():
    assert metrics.youden_threshold([0.1, 0.2, 0.6, 0.9], [0, 0, 1, 1]) == pytest.approx(0.4)
    assert metrics.youden_threshold([0.9, 0.6, 0.2, 0.1], [0, 0, 1, 1]) == 0.1  # all are called
    assert metrics.youden_threshold([0.5, 0.5], [0, 1]) == 0.5
    for labels in ([1, 1], [0, 0], [np.nan, 1], [np.nan, np.nan]):
        assert metrics.youden_threshold([0.1, 0.2], labels) is None
    assert metrics.youden_threshold([0.1, np.nan], [0, 1]) is None


def test_shares_of_right_calls_are_those_of_the_confusion_matrix_of_repeated_rows():
    rng = np.random.default_rng(0)
    calls = rng.integers(0, 2, (50, 3)).astype(float)
    truth = rng.integers(0, 2, (50, 3)).astype(float)
    truth[rng.random((50, 3)) < 0.2] = np.nan
    calls[:, 2] = np.nan  # it has no threshold
    weights = rng.integers(0, 4, (50, 5)).astype(float)
    shares = metrics.call_shares(calls, truth, weights)
    assert shares.shape == (5, 3, 4) and np.isnan(shares[:, 2]).all()
    for draw, k in np.ndindex(5, 2):
        rows = np.repeat(np.arange(50), weights[:, draw].astype(int))
        rows = rows[~np.isnan(truth[rows, k])]
        (tn, fp), (fn, tp) = confusion_matrix(truth[rows, k], calls[rows, k])
        expected = tp / (tp + fn), tn / (tn + fp), tp / (tp + fp), tn / (tn + fn)
        assert shares[draw, k] == pytest.approx(expected)
    nobody = metrics.call_shares(calls[:, :1] * 0, truth[:, :1], weights[:, :1])[0, 0]
    assert nobody[:2].tolist() == [0, 1] and np.isnan(nobody[2])  # none is called: no PPV


def test_weighted_auroc_is_that_of_repeated_rows():
    rng = np.random.default_rng(6)
    scores = np.round(rng.random(40) * 12)
    labels = np.where(rng.random(40) < 0.1, np.nan, rng.integers(0, 2, 40))
    weights = rng.integers(0, 4, (40, 7)).astype(float)
    weights[:, 6] = labels == 0  # no positive
    areas = metrics.weighted_auroc(scores, labels, weights)
    for k in range(6):
        rows = np.repeat(np.arange(40), weights[:, k].astype(int))
        rows = rows[~np.isnan(labels[rows])]
        assert areas[k] == pytest.approx(roc_auc_score(labels[rows], scores[rows]))
    assert np.isnan(areas[6])


def test_bootstrap_draws_patients_with_all_their_films():
    rng = np.random.default_rng(7)
    effect = rng.normal(size=30)
    patients = np.repeat(np.arange(30), 4)
    values = np.repeat(effect, 4) + 0.01 * rng.normal(size=120)

    def mean(weights):
        return (values @ weights / weights.sum(0))[:, None]

    low, high = metrics.bootstrap(mean, [f"p{k}" for k in patients])[0]
    slow = []
    for _ in range(4000):
        drawn = rng.integers(0, 30, 30)
        slow.append(np.concatenate([values[patients == k] for k in drawn]).mean())
    assert (low, high) == pytest.approx(np.percentile(slow, [2.5, 97.5]), abs=0.04)
    assert metrics.bootstrap(mean, patients)[0] == pytest.approx([low, high], abs=0.04)
    each_alone = metrics.bootstrap(mean, np.arange(120))[0]
    assert each_alone[1] - each_alone[0] < 0.7 * (high - low)  # films are no patients


def test_bootstrap_gives_no_interval_where_draws_lack_a_class_or_patients():
    def share(weights):
        labels = np.arange(50) < 2
        positives = weights[labels].sum(0)
        return np.where(positives > 0, positives, np.nan)[:, None]

    assert np.isnan(metrics.bootstrap(share, np.arange(50))).all()  # 13 % of draws lack both
    assert np.isnan(metrics.bootstrap(lambda w: w.sum(0)[:, None], [0, 1] * 25)).all()


def test_dice_is_the_f1_of_pixels_and_decides_empty_masks():
    rng = np.random.default_rng(2)
    for _ in range(10):
        a = rng.random((7, 9)) < 0.4
        b = rng.random((7, 9)) < 0.4
        assert metrics.dice(a, b) == pytest.approx(f1_score(b.ravel(), a.ravel()))
    empty = np.zeros((4, 4), bool)
    full = np.ones((4, 4), bool)
    assert metrics.dice(empty, empty) == 1.0
    assert metrics.dice(full, empty) == metrics.dice(empty, full) == 0.0


def test_recall_at_k_is_a_sort_and_equal_errors_are_chance():
    errors = np.random.default_rng(3).random((40, 40))
    errors[np.arange(30), np.arange(30)] *= 0.1
    ranks = [list(np.argsort(row)).index(i) for i, row in enumerate(errors)]
    got = metrics.recall_at_k(errors, ks=(1, 3, 5))
    assert got == {k: pytest.approx(np.mean([r < k for r in ranks])) for k in (1, 3, 5)}
    assert metrics.recall_at_k(np.ones((64, 64)))[3] == pytest.approx(3 / 64)
    assert np.isnan(metrics.recall_at_k(np.full((64, 64), np.nan))[3])  # it was 1
    tied = [[0.0, 0.0], [0.0, 1.0]]  # row 0: a tie for first place; row 1: second
    assert metrics.recall_at_k(tied, ks=(1, 2)) == {1: 0.25, 2: 1.0}


def test_collapse_measures_have_their_closed_forms():
    q = np.linalg.qr(np.random.default_rng(4).normal(size=(50, 8)))[0]
    assert metrics.rankme(q) == pytest.approx(8, rel=1e-4)  # equal singular values: full rank
    assert metrics.rankme(np.outer(np.arange(1, 20), np.ones(8))) == pytest.approx(1, abs=1e-3)
    values = np.array([4.0, 3, 2, 1])
    p = values / 10
    effective = np.exp(-(p * np.log(p)).sum())
    assert metrics.rankme(q[:, :4] * values) == pytest.approx(effective, rel=1e-3)
    assert metrics.spectrum(q[:, :4] * values) == pytest.approx(p)
    assert metrics.feature_std(np.ones((5, 3))) == 0
    assert metrics.feature_std([[0.0, 0.0], [2.0, 4.0]]) == pytest.approx(1.5)


@pytest.mark.parametrize("shape", [(40, 200), (200, 40), (300, 64)])
@pytest.mark.parametrize("kind", ["even", "steep", "rank 3", "one feature", "nothing"])
def test_the_spectrum_is_that_of_a_singular_value_decomposition(shape, kind):
    rng = np.random.default_rng(5)
    x = rng.normal(size=shape) + 3
    if kind == "steep":
        x *= np.logspace(0, -9, shape[1])
    elif kind == "rank 3":
        x = rng.normal(size=(shape[0], 3)) @ rng.normal(size=(3, shape[1]))
    elif kind == "one feature":
        x[:, 1:] = 0
    elif kind == "nothing":
        x[:] = 0
    truth = np.linalg.svd(x, compute_uv=False)
    truth = truth / max(truth.sum(), 1e-12)
    for values in (x, torch.tensor(x)):
        assert np.allclose(metrics.spectrum(values), truth, atol=1e-6)
    entropy = -((truth + 1e-7) * np.log(truth + 1e-7)).sum()
    assert metrics.rankme(x) == pytest.approx(np.exp(entropy), rel=1e-4)


@pytest.mark.parametrize("d", [5, 300])  # 300 > 120 films: the rotated branch
def test_linear_probe_is_scikit_learns_regression_at_the_strength_validation_likes(d):
    train, y = blobs(120, d, 0)
    val, val_y = blobs(80, d, 1)
    test, test_y = blobs(60, d, 2)
    scaler = StandardScaler().fit(train)
    best = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for l2 in sorted(metrics.L2_GRID, reverse=True):
            model = LogisticRegression(C=1 / l2, max_iter=20000, tol=1e-10)
            model.fit(scaler.transform(train), y)
            value = log_loss(val_y, model.predict_proba(scaler.transform(val)))
            if best is None or value < best[0] - 1e-12:
                best = value, model.decision_function(scaler.transform(test))
    scores = metrics.linear_probe(train, y, val, val_y, test)
    assert np.allclose(scores, best[1], atol=2e-3 * np.abs(best[1]).max())
    assert metrics.auroc(scores, test_y) == pytest.approx(roc_auc_score(test_y, best[1]), abs=2e-3)


def test_linear_probe_takes_many_labels_and_a_validation_set_without_a_class():
    train, y = blobs(90, 6, 0)
    val, val_y = blobs(50, 6, 1)
    test, _ = blobs(40, 6, 2)
    labels = np.stack([y, 1 - y], 1)
    both = metrics.linear_probe(train, labels, val, np.stack([val_y, 1 - val_y], 1), test)
    assert both.shape == (40, 2) and np.allclose(both[:, 0], -both[:, 1], atol=1e-4)
    assert np.allclose(both[:, 0], metrics.linear_probe(train, y, val, val_y, test))
    scaler = StandardScaler().fit(train)
    model = LogisticRegression(C=1 / metrics.L2_FALLBACK, tol=1e-10, max_iter=5000)
    model.fit(scaler.transform(train), y)
    fixed = model.decision_function(scaler.transform(test))
    assert np.allclose(metrics.linear_probe(train, y, val, np.zeros(50), test), fixed, atol=1e-3)


def test_films_whose_label_is_not_known_count_neither_in_the_probe_nor_in_its_auroc():
    train, y = blobs(90, 6, 0)
    val, val_y = blobs(50, 6, 1)
    test, test_y = blobs(40, 6, 2)
    hidden = np.arange(90) % 3 == 0
    labels = np.stack([np.where(hidden, np.nan, y), y], 1)
    val_labels = np.stack([np.where(np.arange(50) < 9, np.nan, val_y), np.full(50, np.nan)], 1)
    weight, bias = metrics.fit_probe(train, labels, val, val_labels)
    scaler = StandardScaler().fit(train)  # by all films, as a label that is not known has features
    best = None
    for l2 in sorted(metrics.L2_GRID, reverse=True):
        model = LogisticRegression(C=1 / l2, tol=1e-10, max_iter=5000)
        model.fit(scaler.transform(train[~hidden]), y[~hidden])
        value = log_loss(val_y[9:], model.predict_proba(scaler.transform(val[9:])))
        if best is None or value < best[0] - 1e-12:
            best = value, model.coef_[0]
    assert np.allclose(weight[:, 0] * scaler.scale_, best[1], atol=1e-4)
    scores = test @ weight + bias
    known = np.arange(40) % 2 == 0
    truth = np.stack([np.where(known, test_y, np.nan), np.full(40, np.nan)], 1)
    area = metrics.auroc(scores[:, 0], truth[:, 0])
    assert area == pytest.approx(roc_auc_score(test_y[known], scores[known, 0]))
    assert np.isnan(metrics.auroc(scores[:, 1], truth[:, 1]))
    nothing = metrics.linear_probe(train, np.full(90, np.nan), val, val_y, test)
    assert (nothing == 0).all()


def test_many_regressions_at_once_are_scikit_learns_one_by_one():
    """Rare and common labels, unknown ones, separable ones; strong, weak and hardly any penalty."""
    x, y = blobs(150, 12, 3)
    separable = (x[:, 1] > np.median(x[:, 1])).astype(float)
    rare = (np.arange(150) % 30 == 0).astype(float)
    unknown = np.where(np.arange(150) < 40, np.nan, y)
    labels = torch.tensor(np.stack([y, separable, rare, unknown], 1))
    features = metrics.Standardised(x)
    for l2 in (100.0, 1.0, 1e-3):
        fitted = metrics.fit_logistic(features, labels, torch.full((4,), l2, dtype=torch.float64))
        weight, bias = features.for_raw(fitted)
        scaler = StandardScaler().fit(x)
        for k, label in enumerate(labels.T.numpy()):
            known = ~np.isnan(label)
            solver = dict(solver="newton-cholesky", max_iter=1000, tol=1e-12)
            model = LogisticRegression(C=1 / l2, **solver)
            model.fit(scaler.transform(x[known]), label[known])
            assert np.allclose(weight[:, k] * scaler.scale_, model.coef_[0], rtol=1e-5, atol=1e-6)
            logits = model.decision_function(scaler.transform(x))
            assert np.allclose(x @ weight[:, k].numpy() + bias[k].item(), logits, rtol=1e-5)


def test_a_probe_of_features_that_are_not_finite_is_nan_not_a_traceback():
    train, y = blobs(60, 4, 0)
    train[3, 1] = np.inf
    assert np.isnan(metrics.linear_probe(train, y, train, y, train)).all()


def test_constant_features_do_not_break_the_probe():
    train, y = blobs(60, 4, 0)
    train[:, 2] = 1e6
    assert np.isfinite(metrics.linear_probe(train, y, train, y, train)).all()


# ---------------------------------------------------------------- the probe that judges encoders
def of_patients(n):
    """Patients with one to four films each, mixed up. (n,)"""
    rng = np.random.default_rng(n)
    of = np.repeat(np.arange(n), rng.integers(1, 5, n))[:n]
    return np.array([f"p{k}" for k in rng.permutation(of)])


def by_scikit_learn(x, y, patients, new_x):
    """Ridge at the penalty that errs least with each patient left out, by fitting them all."""
    scaler = StandardScaler().fit(x)
    x = scaler.transform(x)
    errors = []
    for penalty in metrics.RIDGE_GRID:
        model = Ridge(alpha=penalty * x.shape[1], solver="svd")
        guess = cross_val_predict(model, x, y, groups=patients, cv=LeaveOneGroupOut())
        errors.append(np.square(guess - y).sum())
    best = metrics.RIDGE_GRID[int(np.argmin(errors))]
    model = Ridge(alpha=best * x.shape[1], solver="svd").fit(x, y)
    return model.predict(scaler.transform(new_x)) - y.mean()


@pytest.mark.parametrize("d", [4, 200])  # 200 > 90 films
def test_ridge_scores_are_scikit_learns_with_each_patient_left_out(d):
    x, y = blobs(60, d, 0)
    other = (x[:, 1] + 5 * np.random.default_rng(8).normal(size=60) > 5).astype(float)
    new, _ = blobs(40, d, 1)
    patients = of_patients(60)
    unknown = np.where(np.arange(60) % 4 == 0, np.nan, other)
    scores = metrics.ridge_scores(x, np.stack([y, other, unknown], 1), patients, new)
    known = ~np.isnan(unknown)
    for column, label in zip(scores.T[:2], (y, other), strict=True):
        assert np.allclose(column, by_scikit_learn(x, label, patients, new), atol=1e-6)
    expected = by_scikit_learn(x[known], other[known], patients[known], new)
    assert np.allclose(scores[:, 2], expected, atol=1e-6)


def test_ridge_scores_are_undefined_where_nothing_can_be_learnt():
    x, y = blobs(60, 4, 0)
    labels = np.stack([y, np.zeros(60), np.full(60, np.nan)], 1)
    scores = metrics.ridge_scores(x, labels, of_patients(60), x)
    assert np.isfinite(scores[:, 0]).all() and np.isnan(scores[:, 1:]).all()
    assert np.isnan(metrics.ridge_scores(x, labels, np.full(60, "one"), x)).all()
    blind = metrics.ridge_scores(np.full((60, 4), 7.0), labels, of_patients(60), x)
    assert (blind[:, 0] == 0).all()
    x[3, 1] = np.inf
    assert np.isnan(metrics.ridge_scores(x, labels, of_patients(60), x[:2])).all()


def test_cross_validation_keeps_a_patients_films_together():
    """Features that name the patient, whose films have one label: they teach nothing of others."""
    patients = np.repeat(np.arange(60), 3)
    y = np.random.default_rng(0).permutation(np.arange(60) % 2)[patients].astype(float)[:, None]
    names = np.eye(60)[patients]
    scores = metrics.cross_validated(names, y, patients)
    assert 25 < 100 * metrics.auroc(scores[:, 0], y[:, 0]) < 75
    scores = metrics.cross_validated(names, y, np.arange(180))  # films as patients: known by heart
    assert metrics.auroc(scores[:, 0], y[:, 0]) > 0.95


def test_cross_validated_scores_are_of_fits_to_the_other_parts():
    x, y = blobs(40, 5, 2)
    patients = of_patients(40)
    expected = np.zeros(40)
    names = np.unique(patients)
    for repeat in range(2):
        part = metrics.numpy_rng(metrics.PROBE_FOLDS, repeat).permutation(len(names)) % 2
        part = np.array([part[list(names).index(name)] for name in patients])
        for k in range(2):
            fit = part != k
            of_fit = by_scikit_learn(x[fit], y[fit], patients[fit], x[fit])
            guess = by_scikit_learn(x[fit], y[fit], patients[fit], x[~fit])
            expected[~fit] += guess / of_fit.std() / 2
    scores = metrics.cross_validated(x, y[:, None], patients, folds=2, repeats=2)[:, 0]
    assert np.allclose(scores, expected, atol=1e-6)
    assert (
        metrics.cross_validated(np.ones((40, 3)), y[:, None], patients).any() == 0
    )  # no intercept


def test_cross_validation_of_features_that_know_nothing_is_at_chance():
    """Scores of five fits, pooled without a common scale, came to 0.468 on these films."""
    rng = np.random.default_rng(0)
    areas = []
    for _ in range(100):
        x = rng.normal(size=(60, 10))
        y = (rng.random(60) < 0.5).astype(float)
        scores = metrics.cross_validated(x, y[:, None], np.arange(60), repeats=1)
        areas.append(metrics.auroc(scores[:, 0], y))
    assert np.mean(areas) == pytest.approx(0.5, abs=0.03)


def normal_scores(rng, patients, effects):
    """Labels, and a score per effect that tells them apart by so many deviations. Films of one
    patient are alike.
    """
    y = rng.integers(0, 2, patients.max() + 1)[patients].astype(float)
    shared = rng.normal(size=(patients.max() + 1, len(effects)))[patients]
    noise = np.sqrt(0.5) * (shared + rng.normal(size=shared.shape))
    return y[:, None], y[:, None] * effects + noise


def test_the_intervals_hold_the_truth_19_times_of_20():
    """Of 200 test sets: the true AUROC of a normal score, and the true difference of two."""
    rng = np.random.default_rng(1)
    patients = np.repeat(np.arange(70), 2)
    normal = statistics.NormalDist()
    truth = {name: normal.cdf(effect / 2**0.5) for name, effect in (("a", 1.2), ("b", 0.6))}
    inside = np.zeros(2)
    for _ in range(200):
        y, scores = normal_scores(rng, patients, [1.2, 0.6])
        both = {"a": scores[:, :1], "b": scores[:, 1:]}
        values, differences = metrics.compare_auroc(both, y, patients, [("a", "b")])
        inside[0] += values["a"][1] <= truth["a"] <= values["a"][2]
        _, low, high = differences["a", "b"]
        inside[1] += low <= truth["a"] - truth["b"] <= high
    assert (
        (inside > 178) & (inside <= 199)
    ).all()  # 190 expected; less of the percentile bootstrap


def test_a_mean_over_labels_is_over_the_same_ones_in_every_draw():
    rng = np.random.default_rng(3)
    y = np.zeros((60, 3))
    y[:30, 0] = 1
    y[:20, 1] = 1
    scores = rng.normal(size=y.shape) + y
    both = {"a": scores, "b": -scores}
    values, differences = metrics.compare_auroc(both, y, np.arange(60), [("a", "b")])
    areas = [roc_auc_score(y[:, k], scores[:, k]) for k in (0, 1)]  # nobody has the third
    assert values["a"][0] == pytest.approx(np.mean(areas)) and values["a"][1] < values["a"][0]
    y[5, 2] = 1  # one has it, hence a third of the draws do not
    values, differences = metrics.compare_auroc(both, y, np.arange(60), [("a", "b")])
    areas.append(roc_auc_score(y[:, 2], scores[:, 2]))
    assert values["a"][0] == pytest.approx(np.mean(areas))
    assert np.isnan(values["a"][1:]).all() and np.isnan(differences["a", "b"][1:]).all()


def test_models_are_compared_over_the_labels_that_all_of_them_can_be_judged_on():
    """A probe that had no positive film of a label to learn from has no score of it."""
    rng = np.random.default_rng(3)
    y, scores = normal_scores(rng, np.arange(200), [1.0, 0.0])
    y = np.repeat(y, 2, 1)
    probe = scores.copy()
    probe[:, 1] = np.nan
    broken = np.full_like(scores, np.nan)  # of features that are not finite
    sets = {"model": scores, "probe": probe, "broken": broken}
    values, differences = metrics.compare_auroc(sets, y, np.arange(200), [("model", "probe")])
    first = pytest.approx(roc_auc_score(y[:, 0], scores[:, 0]))
    assert values["model"][0] == values["probe"][0] == first
    assert differences["model", "probe"] == [0, 0, 0]
    assert np.isnan(values["broken"]).all()


def test_a_difference_is_paired():
    rng = np.random.default_rng(2)
    patients = np.arange(150)
    y, scores = normal_scores(rng, patients, [1.0])
    alike = scores + 0.1 * rng.normal(size=scores.shape)
    sets = {
        "one": scores,
        "same": scores.copy(),
        "alike": alike,
        "noise": rng.normal(size=(150, 1)),
    }
    pairs = [("one", "same"), ("one", "alike"), ("one", "noise")]
    values, differences = metrics.compare_auroc(sets, y, patients, pairs)
    assert values["one"][0] == pytest.approx(roc_auc_score(y, scores))
    assert differences["one", "same"] == [0, 0, 0]
    _, low, high = differences["one", "alike"]
    assert high - low < 0.4 * (values["one"][2] - values["one"][1])
    value, low, high = differences["one", "noise"]
    assert value == pytest.approx(values["one"][0] - values["noise"][0]) and 0 < low < value < high
