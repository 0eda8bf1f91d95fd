"""Numbers that judge a model: AUROC, accuracy, Dice, Recall@k, collapse measures, linear probe and nearest neighbours.

Every function takes NumPy arrays or torch tensors (any device) and computes in float64 on the CPU. Fractions, not percent.
"""

import numpy as np
import torch

L2_GRID = tuple(np.logspace(-3, 3, 7))  # strengths of the probe's penalty, as 1 / C in scikit-learn


L2_FALLBACK = 1.0  # where validation cannot choose because it lacks a class


def _array(values):
    """Array or tensor → float64 NumPy array on the CPU."""
    values = values.detach().cpu() if isinstance(values, torch.Tensor) else values
    return np.asarray(values, dtype=np.float64)


def auroc(scores, labels):
    """Area under the ROC curve in 0..1 of scores (n,) against labels (n,) 0/1: the share of (positive, negative) pairs ranked
    rightly, a tie counting half. nan when one class is absent."""
    scores, positive = _array(scores), _array(labels) > 0.5
    positives, negatives = positive.sum(), (~positive).sum()
    if not positives or not negatives or np.isnan(scores).any():
        return float("nan")
    _, group, count = np.unique(scores, return_inverse=True, return_counts=True)
    midrank = np.cumsum(count) - (count - 1) / 2  # mean rank, from 1, of each set of equal scores
    above = midrank[group][positive].sum() - positives * (positives + 1) / 2
    return float(above / (positives * negatives))


def mean_auroc(scores, labels):
    """scores (n, c), labels (n, c) 0/1 → (unweighted mean over the classes that have both kinds, list of c values, nan where undefined)."""
    scores, labels = _array(scores), _array(labels)
    each = [auroc(s, t) for s, t in zip(scores.T, labels.T)]
    defined = [a for a in each if not np.isnan(a)]
    return (float(np.mean(defined)) if defined else float("nan")), each


def accuracy(logits, labels):
    """Share of rows whose largest logit (n, c) is the label (n,)."""
    return float((_array(logits).argmax(1) == _array(labels)).mean())


def dice(prediction, truth):
    """2 |A ∩ B| / (|A| + |B|) of two boolean masks (H, W); empty against empty is 1, anything against empty 0 (DATASETS.md section 9)."""
    prediction, truth = _array(prediction) > 0.5, _array(truth) > 0.5
    total = prediction.sum() + truth.sum()
    return float(2 * (prediction & truth).sum() / total) if total else 1.0


def recall_at_k(errors, ks=(1, 3, 5)):
    """errors (n, n): row i holds prediction i's error against every candidate, column i being the true one (METHOD.md, domain sensitivity).
    → {k: share of rows whose true candidate is among the k smallest}; ties are broken evenly, so equal errors score chance, k / n."""
    errors = _array(errors)
    true = np.diag(errors)[:, None]
    smaller, equal = (
        (errors < true).sum(1),
        (errors == true).sum(1),
    )  # equal counts the true candidate itself
    return {k: float(np.clip((k - smaller) / np.maximum(equal, 1), 0, 1).mean()) for k in ks}


def feature_std(features):
    """Mean over dimensions of the standard deviation over the n rows of features (n, d): 0 when the encoder says the same of every film."""
    return float(_array(features).std(0).mean())


def spectrum(features):
    """Singular values of features (n, d), largest first, summing to 1."""
    values = np.linalg.svd(_array(features), compute_uv=False)
    return values / max(values.sum(), 1e-12)


def rankme(features):
    """Effective rank in 1..min(n, d): exp of the entropy of the normalised singular values (Garrido et al. 2023, Eq. 1)."""
    share = spectrum(features) + 1e-7
    return float(np.exp(-(share * np.log(share)).sum()))


def _scaling(train):
    """Mean and 1 / standard deviation of the columns of train (n, d); 0 for constant columns, which thereby drop out."""
    train = _array(train)
    mean, std = train.mean(0), train.std(0)
    return mean, np.where(std > 1e-9 * (1 + np.abs(mean)), 1 / np.maximum(std, 1e-300), 0.0)


def _fit_logistic(x, y, l2, start=None):
    """Weights (d + 1,), bias last and unpenalised, minimising sum of log losses + l2 / 2 · |w|² for labels y (n,); full batch L-BFGS."""
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
        loss = (
            torch.nn.functional.binary_cross_entropy_with_logits(logits, y)
            + l2 / (2 * len(y)) * weights[:-1].square().sum()
        )
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def _fit_one(train_x, y, val_x, val_y):
    """Weights (d + 1,) of one binary label: one fit per strength, strong to weak, each starting from the last; best on validation wins."""
    best, best_auroc, weights = None, -1.0, None
    can_choose = not np.isnan(auroc(np.zeros(len(val_y)), val_y))
    for l2 in sorted(L2_GRID, reverse=True) if can_choose else [L2_FALLBACK]:
        weights = _fit_logistic(train_x, y, l2, weights)
        value = auroc(val_x @ weights[:-1], val_y) if can_choose else 0.0
        if value > best_auroc:  # a tie keeps the stronger penalty
            best, best_auroc = weights, value
    return best.numpy()


def fit_probe(train_x, train_y, val_x, val_y):
    """Logistic regression on train_x (n, d), standardised by train; labels (n,) or, one regression a column, (n, c). The L2 strength is chosen
    per label by validation AUROC (L2_FALLBACK where validation lacks a class). → weight (d, c), bias (c,): logits of raw features are x @ weight + bias."""
    train_y, val_y = (y.reshape(len(y), -1) for y in (_array(train_y), _array(val_y)))
    mean, scale = _scaling(train_x)
    train, val = ((_array(x) - mean) * scale for x in (train_x, val_x))
    basis = np.eye(train.shape[1])
    if (
        train.shape[1] > len(train)
    ):  # more dimensions than films: the solution lies in their span, so rotate into it (exact, and fast)
        basis = np.linalg.svd(train, full_matrices=False)[2].T
    train, val = (torch.from_numpy(np.ascontiguousarray(x @ basis)) for x in (train, val))
    fitted = np.stack(
        [_fit_one(train, torch.tensor(y), val, v) for y, v in zip(train_y.T, val_y.T)], 1
    )  # (d + 1, c)
    weight = scale[:, None] * (basis @ fitted[:-1])
    return weight, fitted[-1] - mean @ weight


def linear_probe(train_x, train_y, val_x, val_y, test_x):
    """Logits of test_x (m, d) by fit_probe on the other two; labels (n,) or (n, c) → (m,) or (m, c)."""
    weight, bias = fit_probe(train_x, train_y, val_x, val_y)
    scores = _array(test_x) @ weight + bias
    return scores[:, 0] if np.ndim(train_y) == 1 else scores


def knn_scores(train_x, train_y, test_x, k=20):
    """Mean label of the k nearest training rows by cosine similarity of standardised features; labels (n,) or (n, c) → (m,) or (m, c)."""
    mean, scale = _scaling(train_x)
    train, test = ((_array(x) - mean) * scale for x in (train_x, test_x))
    train, test = (
        x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (train, test)
    )
    nearest = np.argsort(-(test @ train.T), axis=1, kind="stable")[:, :k]
    return _array(train_y)[nearest].mean(1)
