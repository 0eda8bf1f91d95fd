"""Numbers that judge a model: AUROC, accuracy, Dice, Recall@k, measures of collapse, linear probe.

Every function takes NumPy arrays or torch tensors (any device) and computes in float64, on the CPU
but for `spectrum`.
Results are fractions, not percent.
"""

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

L2_GRID = tuple(np.logspace(-3, 3, 7))  # strengths of the probe's penalty, as 1 / C in scikit-learn
L2_FALLBACK = 1.0  # where validation cannot choose because it lacks a class


def to_array(values) -> np.ndarray:
    """Array or tensor → float64 NumPy array on the CPU."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
    return np.asarray(values, dtype=np.float64)


# ---------------------------------------------------------------- downstream tasks
def auroc(scores, labels) -> float:
    """Area under the ROC curve: the share of (positive, negative) pairs ranked rightly, a tie half.

    scores (n,), labels (n,) of 0 and 1; films whose label is not known (nan) are left out. nan when
    one class is absent or a score is nan.
    """
    labels = to_array(labels)
    is_known = ~np.isnan(labels)
    scores = to_array(scores)[is_known]
    is_positive = labels[is_known] > 0.5
    positives = is_positive.sum()
    negatives = (~is_positive).sum()
    if not positives or not negatives or np.isnan(scores).any():
        return float("nan")
    # Every set of equal scores gets the mean of its ranks, which are counted from 1.
    _, group, count = np.unique(scores, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(count) - (count - 1) / 2
    rank_sum = mean_rank[group][is_positive].sum()
    pairs_won = rank_sum - positives * (positives + 1) / 2  # a rank counts other positives, too
    return float(pairs_won / (positives * negatives))


def mean_auroc(scores, labels) -> tuple[float, list[float]]:
    """Unweighted mean AUROC over the classes that have positives and negatives, and all c values.

    scores (n, c), labels (n, c) of 0 and 1, nan: not known. The values are nan where undefined.
    """
    columns = zip(to_array(scores).T, to_array(labels).T, strict=True)
    values = [auroc(score, label) for score, label in columns]
    defined = [value for value in values if not np.isnan(value)]
    return (float(np.mean(defined)) if defined else float("nan")), values


def accuracy(logits, labels) -> float:
    """Share of rows whose largest logit (n, c) is the label (n,)."""
    return float((to_array(logits).argmax(1) == to_array(labels)).mean())


def dice(prediction, truth) -> float:
    """Overlap of two masks (H, W), 2 |A ∩ B| / (|A| + |B|).

    Empty against empty is 1 and anything against empty 0, as in the authors' code.
    """
    prediction = to_array(prediction) > 0.5
    truth = to_array(truth) > 0.5
    total = prediction.sum() + truth.sum()
    return float(2 * (prediction & truth).sum() / total) if total else 1.0


# ---------------------------------------------------------------- pre-training
def recall_at_k(errors, ks=(1, 3, 5)) -> dict[int, float]:
    """Share of predictions whose true candidate is among the k best (Table 4) → {k: share}

    errors (n, n): row i holds prediction i's error against every candidate, column i the true one.
    Ties are broken evenly, so that equal errors score chance, k / n.
    """
    errors = to_array(errors)
    true = np.diag(errors)[:, None]
    smaller = (errors < true).sum(1)
    equal = (errors == true).sum(1)  # counts the true candidate itself
    recall = {}
    for k in ks:
        places_left = (k - smaller) / np.maximum(equal, 1)
        recall[k] = float(np.clip(places_left, 0, 1).mean())
    return recall


def feature_std(features) -> float:
    """Standard deviation of features (n, d) over films, mean over d; 0: all films look the same."""
    with np.errstate(invalid="ignore"):  # nan where a feature is not finite
        return float(to_array(features).std(0).mean())


def spectrum(features) -> np.ndarray:
    """Singular values of features (n, d), largest first, summing to 1; nan of nan or infinity.

    They are the roots of the eigenvalues of the smaller Gram matrix, which is made where the
    features are: exact to 1e-8 of the largest, and far quicker than a singular value decomposition.
    """
    if not isinstance(features, torch.Tensor):
        features = torch.from_numpy(to_array(features))
    if features.device.type == "mps":  # has no float64
        features = features.cpu()
    x = features.detach().double()
    if not x.isfinite().all():
        return np.full(min(x.shape), np.nan)
    gram = x.mT @ x if x.shape[0] > x.shape[1] else x @ x.mT
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0).cpu().numpy()
    return values / max(values.sum(), 1e-12)


def rankme(features) -> float:
    """Effective rank of features (n, d): exp of their spectrum's entropy (RankMe, 2023, Eq. 1)."""
    share = spectrum(features) + 1e-7
    return float(np.exp(-(share * np.log(share)).sum()))


# ---------------------------------------------------------------- linear probe
def column_scale(train) -> tuple[np.ndarray, np.ndarray]:
    """Mean and 1 / standard deviation of each column of train (n, d); 0 where it is constant."""
    train = to_array(train)
    mean = train.mean(0)
    std = train.std(0)
    varies = std > 1e-9 * (1 + np.abs(mean))
    return mean, np.where(varies, 1 / np.maximum(std, 1e-300), 0.0)


def fit_logistic(x, y, l2, start=None) -> torch.Tensor:
    """Logistic regression of y (n,) on x (n, d) by full-batch L-BFGS → (d + 1,) weights, bias last.

    Minimises the sum of the log losses + l2 / 2 · |w|²; the bias is not penalised.
    """
    weights = torch.zeros(x.shape[1] + 1, dtype=torch.float64) if start is None else start.clone()
    weights.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=300,
        history_size=20,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        logits = x @ weights[:-1] + weights[-1]
        penalty = l2 / (2 * len(y)) * weights[:-1].square().sum()
        loss = binary_cross_entropy_with_logits(logits, y) + penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def fit_best_logistic(train_x, train_y, val_x, val_y) -> np.ndarray:
    """Logistic regression of one label at the strength of L2 that is best on validation.

    The strengths are tried from strong to weak, each fit starting from the last. Where validation
    lacks a class, L2_FALLBACK is taken. Films whose label is not known (nan) are left out; where it
    is known of none, nothing is learnt. → weights (d + 1,)
    """
    is_known = ~train_y.isnan()
    train_x = train_x[is_known]
    train_y = train_y[is_known]
    is_known = ~np.isnan(val_y)
    val_x = val_x[is_known]
    val_y = val_y[is_known]
    if not len(train_y):
        return np.zeros(train_x.shape[1] + 1)
    if np.isnan(auroc(np.zeros(len(val_y)), val_y)):
        return fit_logistic(train_x, train_y, L2_FALLBACK).numpy()
    weights = None
    best = None
    best_auroc = -1.0
    for l2 in sorted(L2_GRID, reverse=True):
        weights = fit_logistic(train_x, train_y, l2, weights)
        value = auroc(val_x @ weights[:-1], val_y)
        if value > best_auroc:  # a tie keeps the stronger penalty
            best = weights
            best_auroc = value
    return best.numpy()


def fit_probe(train_x, train_y, val_x, val_y) -> tuple[np.ndarray, np.ndarray]:
    """Fit a linear probe: features standardised by train, one logistic regression per label.

    train_x, val_x (n, d); labels (n,) or (n, c) of 0, 1 and nan (not known); every label gets its
    own strength of L2.
    → weight (d, c), bias (c,): the logits of raw features are x @ weight + bias
    """
    train_y = to_array(train_y).reshape(len(train_y), -1)
    val_y = to_array(val_y).reshape(len(val_y), -1)
    mean, scale = column_scale(train_x)
    train = (to_array(train_x) - mean) * scale
    val = (to_array(val_x) - mean) * scale
    # With more dimensions than films the solution lies in the span of the films: rotating the
    # features into it is exact, and fast.
    basis = np.eye(train.shape[1])
    if train.shape[1] > len(train):
        basis = np.linalg.svd(train, full_matrices=False)[2].T
    train = torch.from_numpy(np.ascontiguousarray(train @ basis))
    val = torch.from_numpy(np.ascontiguousarray(val @ basis))
    columns = []
    for label, val_label in zip(train_y.T, val_y.T, strict=True):
        columns.append(fit_best_logistic(train, torch.tensor(label), val, val_label))
    fitted = np.stack(columns, 1)  # (d + 1, c)
    weight = scale[:, None] * (basis @ fitted[:-1])
    return weight, fitted[-1] - mean @ weight


def linear_probe(train_x, train_y, val_x, val_y, test_x) -> np.ndarray:
    """Logits of test_x (m, d) by a probe of train and val: (m,) or (m, c), as the labels are."""
    weight, bias = fit_probe(train_x, train_y, val_x, val_y)
    scores = to_array(test_x) @ weight + bias
    return scores[:, 0] if np.ndim(train_y) == 1 else scores
