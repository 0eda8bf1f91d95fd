"""Numbers that judge a model: AUROC, Dice, intervals, Recall@k, collapse, linear probes.

AUROC, Dice, Recall@k and the spectrum take NumPy arrays or torch tensors of any device, the others
arrays or tensors of the CPU. All compute in float64; results are fractions, not percent.
"""

import numpy as np
import torch
from torch.nn.functional import softplus

from plumbing.keys import BOOTSTRAP, PROBE_FOLDS, numpy_rng

L2_GRID = tuple(np.logspace(-3, 3, 7))  # strengths of the probe's penalty, as 1 / C in scikit-learn
L2_FALLBACK = 1.0  # where validation cannot choose because it lacks a class
RIDGE_GRID = tuple(np.logspace(4, -3, 15))  # penalties of the judging probe, per feature


def to_array(values) -> np.ndarray:
    """Array or tensor → float64 NumPy array on the CPU."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
    return np.asarray(values, dtype=np.float64)


# ---------------------------------------------------------------- downstream tasks
def auroc(scores, truth) -> float:
    """Area under the ROC curve: the share of (positive, negative) pairs ranked rightly, a tie half.

    scores (n,), truth (n,) of 0 and 1; films whose label is not known (nan) are left out. nan when
    one class is absent or a score is nan.
    """
    return float(weighted_auroc(scores, truth, np.ones((len(scores), 1)))[0])


def weighted_auroc(scores, truth, weights) -> np.ndarray:
    """AUROC when row i counts weights[i] times, for every column of weights (n, k). → (k,)

    scores and truth (n,) as auroc takes them.
    """
    scores = to_array(scores)
    truth = to_array(truth)
    areas = np.full(weights.shape[1], np.nan)
    if np.isnan(scores[~np.isnan(truth)]).any():
        return areas
    positives = np.flatnonzero(truth > 0.5)
    negatives = np.flatnonzero(truth <= 0.5)
    negatives = negatives[np.argsort(scores[negatives])]
    # How much lies among the lowest 0, 1, ... negatives: (negatives + 1, k).
    amount = np.zeros((len(negatives) + 1, len(areas)))
    np.cumsum(weights[negatives], axis=0, out=amount[1:])
    below = amount[np.searchsorted(scores[negatives], scores[positives], "left")]
    not_above = amount[np.searchsorted(scores[negatives], scores[positives], "right")]
    positive_weights = weights[positives]
    pairs_won = (positive_weights * (below + not_above)).sum(0) / 2  # a tie is half won
    pairs = positive_weights.sum(0) * amount[-1]
    return np.divide(pairs_won, pairs, out=areas, where=pairs > 0)


def mean_auroc(scores, truth, weights) -> tuple[np.ndarray, np.ndarray]:
    """AUROC of every label, and their mean, when row i counts weights[i] times.

    scores, truth (n, c), weights (n, k). The mean is always over the same labels, those that have
    an AUROC when every row counts once: in a draw that lacks a class of one of them it is nan. Over
    whatever a draw happens to have, the interval of the mean would be one of different questions.
    → mean (k,), areas (k, c); nan where undefined
    """
    columns = list(zip(to_array(scores).T, to_array(truth).T, strict=True))
    areas = np.stack([weighted_auroc(*column, weights) for column in columns], 1)
    is_defined = has_auroc(scores, truth)
    if not is_defined.any():
        return np.full(len(areas), np.nan), areas
    return areas[:, is_defined].mean(1), areas


def has_auroc(scores, truth) -> np.ndarray:
    """Tell which labels have an AUROC. scores, truth (n, c) → (c,) bool"""
    columns = zip(to_array(scores).T, to_array(truth).T, strict=True)
    return np.array([not np.isnan(auroc(*column)) for column in columns])


def roc_curve(scores, truth) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute sensitivity and specificity at every threshold.

    scores (n,), truth (n,) as auroc takes them. → thresholds (t,), rising: every score that
    occurs, and infinity; sensitivity (t,) and specificity (t,) of `score >= threshold`. All are
    empty where the AUROC is undefined.
    """
    if np.isnan(auroc(scores, truth)):
        return np.zeros(0), np.zeros(0), np.zeros(0)
    truth = to_array(truth)
    scores = to_array(scores)
    positives = np.sort(scores[truth > 0.5])
    negatives = np.sort(scores[truth <= 0.5])
    thresholds = np.append(np.union1d(positives, negatives), np.inf)
    missed = np.searchsorted(positives, thresholds, "left")
    spared = np.searchsorted(negatives, thresholds, "left")
    return thresholds, 1 - missed / len(positives), spared / len(negatives)


def youden_threshold(scores, truth) -> float | None:
    """Choose the threshold with the highest sensitivity + specificity - 1, Youden's J.

    scores (n,), truth (n,) as auroc takes them. Of equals it is the lowest, the most sensitive. It
    lies halfway to the next lower score: a film a little below those that count as positive still
    does. None where the AUROC is undefined.
    """
    thresholds, sensitivity, specificity = roc_curve(scores, truth)
    if not len(thresholds):
        return None
    best = int((sensitivity + specificity).round(9).argmax())  # the first of equals
    return float(thresholds[[max(0, best - 1), best]].mean())


def call_shares(calls, truth, weights) -> np.ndarray:
    """Compute sensitivity, specificity, positive and negative predictive value of yes or no.

    calls, truth (n, c) of 0, 1 and nan (not called, not known: the film does not count). Row i
    counts weights[i] times, for every column of weights (n, k). → (k, c, 4); nan where undefined
    """
    is_known = ~np.isnan(calls) & ~np.isnan(truth)
    shares = []
    for side, value in ((truth, 1), (truth, 0), (calls, 1), (calls, 0)):
        counts = is_known & (side == value)
        with np.errstate(invalid="ignore"):  # 0 of 0 is nan
            shares.append(weights.T @ (counts & (calls == truth)) / (weights.T @ counts))
    return np.stack(shares, -1)


def dice(prediction, truth) -> float:
    """Overlap of two masks (H, W), 2 |A ∩ B| / (|A| + |B|).

    Empty against empty is 1 and anything against empty 0, as in the authors' code.
    """
    prediction = to_array(prediction) > 0.5
    truth = to_array(truth) > 0.5
    total = prediction.sum() + truth.sum()
    return float(2 * (prediction & truth).sum() / total) if total else 1.0


def bootstrap(statistic, patients, draws: int = 1000) -> np.ndarray:
    """Say within which bounds 95 % of the values lie when the patients are drawn anew.

    The percentile bootstrap: as many patients as there are, drawn with replacement, each with all
    films. The draws are always the same, so that models can be compared on them.
    statistic(weights (n, k)) → (k, c): its values when row i counts weights[i] times, for k draws.
    patients (n,): whose row it is. → (c, 2); nan with fewer than three patients, and where more
    than one draw in 20 has no value because it lacks a class.
    """
    _, patient_of_row = np.unique(np.asarray(patients, str), return_inverse=True)
    count = int(patient_of_row.max()) + 1
    rng = numpy_rng(BOOTSTRAP)
    at_once = max(1, min(draws, 2_000_000 // len(patient_of_row)))  # bounds the memory
    values = []
    for start in range(0, draws, at_once):
        times_drawn = np.zeros((count, min(at_once, draws - start)))
        for column in times_drawn.T:
            column[:] = np.bincount(rng.integers(count, size=count), minlength=count)
        values.append(statistic(times_drawn[patient_of_row]))
    values = np.concatenate(values)  # (draws, c)
    bounds = np.full((values.shape[1], 2), np.nan)
    for column, bound in zip(values.T, bounds, strict=True):
        defined = column[~np.isnan(column)]
        if count >= 3 and len(defined) >= 0.95 * draws:
            bound[:] = np.quantile(defined, (0.025, 0.975))
    return bounds


def compare_auroc(scores: dict, truth, patients, pairs=()) -> tuple[dict, dict]:
    """Judge several models on the same films: AUROC, mean over the labels, and how sure it is.

    scores: {model: (n, c)}, truth (n, c) of 0, 1 and nan, patients (n,). pairs: of models to be
    compared, whose difference has an interval of its own: the redraws are the same for both, so
    that what makes a film hard for both cancels out. The mean is over the labels of which every
    model has an AUROC, but for models that have none at all.
    → {model: (value, low, high)}, {(one, other): (difference, low, high)}; nan where undefined
    """
    names = list(scores)
    defined = [has_auroc(each, truth) for each in scores.values()]
    defined = [labels for labels in defined if labels.any()]
    shared = np.all(defined, 0)
    if defined and shared.any():
        truth = to_array(truth)[:, shared]
        scores = {name: to_array(each)[:, shared] for name, each in scores.items()}

    def statistic(weights):
        values = {name: mean_auroc(scores[name], truth, weights)[0] for name in names}
        values |= {(one, other): values[one] - values[other] for one, other in pairs}
        return np.stack(list(values.values()), 1)

    exact = statistic(np.ones((len(truth), 1)))[0]
    rows = np.column_stack([exact, bootstrap(statistic, patients)]).tolist()
    differences = dict(zip(pairs, rows[len(names) :], strict=True))
    return dict(zip(names, rows[: len(names)], strict=True)), differences


# ---------------------------------------------------------------- pre-training
def recall_at_k(errors, ks=(1, 3, 5)) -> dict[int, float]:
    """Share of predictions whose true candidate is among the k best (Table 4) → {k: share}

    errors (n, n): row i holds prediction i's error against every candidate, column i the true one.
    Ties are broken evenly, so that equal errors score chance, k / n. nan where an error is nan.
    """
    errors = to_array(errors)
    if np.isnan(errors).any():
        return dict.fromkeys(ks, float("nan"))
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
class Standardised:
    """Features (n, d), each scaled to mean 0 and deviation 1, turned onto their main directions.

    With more dimensions than films there are only n directions, k in all: the solution lies in the
    span of the films. The n × k numbers are never made: every product goes through the raw
    features, block by block, so that 100,000 films take little more memory than their features.
    Weights (k + 1, c) of c regressions have the bias last. squares (k + 1,): sums of the squares.
    """

    def __init__(self, features):
        features = torch.as_tensor(features).detach().cpu()
        self.features = features
        self.mean = sum(block.sum(0) for (block,) in self.blocks()) / len(features)
        squared = sum((block - self.mean).square().sum(0) for (block,) in self.blocks())
        deviation = (squared / len(features)).sqrt()
        varies = deviation > 1e-9 * (1 + self.mean.abs())
        self.scale = torch.where(varies, 1 / deviation.clamp(min=1e-300), 0.0)
        self.basis, squares = self.directions()
        self.squares = torch.cat([squares, torch.tensor([float(len(features))])])

    def blocks(self, *others):
        """Yield (features in float64, others...) of 4,096 films at a time."""
        for features, *rest in zip(*(x.split(4096) for x in (self.features, *others)), strict=True):
            yield features.double(), *rest

    def directions(self):
        """The right singular vectors (d, k) of the scaled features, their squared values (k,)."""
        count, dim = self.features.shape
        if dim > count:
            x = (self.features.double() - self.mean) * self.scale
            squares, turned = torch.linalg.eigh(x @ x.mT)  # far quicker than a decomposition of x
            is_real = squares > 1e-10 * squares.max()
            squares = squares[is_real]
            return x.mT @ (turned[:, is_real] / squares.sqrt()), squares
        gram = torch.zeros(dim, dim, dtype=torch.float64)
        for (block,) in self.blocks():
            x = (block - self.mean) * self.scale
            gram += x.mT @ x
        squares, basis = torch.linalg.eigh(gram)
        return basis, squares.clamp(min=0)

    def coordinates(self, rows):
        """Films of these numbers, along the main directions. → (len(rows), k)"""
        return ((self.features[rows].double() - self.mean) * self.scale) @ self.basis

    def for_raw(self, weights):
        """Turn weights (k + 1, c) into those of the raw features. → weight (d, c), bias (c,)"""
        weight = self.scale[:, None] * (self.basis @ weights[:-1])
        return weight, weights[-1] - self.mean @ weight

    def logits(self, weights):
        """The logits (n, c) of all films."""
        weight, bias = self.for_raw(weights)
        return torch.cat([block @ weight + bias for (block,) in self.blocks()])

    def gradient(self, residual):
        """Sum residual (n, c) times feature over the films. → (k + 1, c)"""
        raw = sum(block.mT @ rows for block, rows in self.blocks(residual))
        return self.turn(raw, residual.sum(0))

    def hessian(self, curvature, weights):
        """Multiply weights by c Hessians, films counting as their curvature (n, c). → (k + 1, c)"""
        weight, bias = self.for_raw(weights)
        raw = 0
        total = 0
        for block, rows in self.blocks(curvature):
            change = rows * (block @ weight + bias)
            raw = raw + block.mT @ change
            total = total + change.sum(0)
        return self.turn(raw, total)

    def turn(self, raw, total):
        """Turn a gradient of raw weights (d, c) and bias (c,) into one of weights. → (k + 1, c)"""
        centred = raw - self.mean[:, None] * total
        return torch.cat([self.basis.mT @ (self.scale[:, None] * centred), total[None]])


def fit_logistic(x: Standardised, y, l2) -> torch.Tensor:
    """Fit c logistic regressions at once, so that they share the products. → (k + 1, c), bias last

    Minimises, for each column of y (n, c) of 0, 1 and nan (not known: no loss), the sum of the log
    losses + l2 / 2 · |w|², l2 (c,); the bias is not penalised. By Newton's method, until a step
    gains less than 1e-15 per film.
    """
    penalty = l2.repeat(len(x.squares), 1)
    penalty[-1] = 0
    weights = torch.zeros_like(penalty)
    logits = torch.zeros_like(y)
    fitted = torch.zeros_like(penalty)
    columns = torch.arange(len(l2))  # those that have not converged
    for _ in range(100):
        share = logits.sigmoid()
        gradient = x.gradient((share - y).nan_to_num(0)) + penalty * weights
        curvature = share * (1 - share) * ~y.isnan()
        step = newton_step(x, curvature, gradient, penalty)
        gain = -(gradient * step).sum(0)
        change = x.logits(step)
        size = step_size((y, logits, weights, penalty), step, change, gain)
        weights = weights + size * step
        logits = logits + size * change
        fitted[:, columns] = weights
        going_on = gain > 1e-15 * len(y)
        if not going_on.any():
            break
        columns = columns[going_on]
        y = y[:, going_on]
        penalty = penalty[:, going_on]
        weights = weights[:, going_on]
        logits = logits[:, going_on]
    return fitted


def newton_step(x: Standardised, curvature, gradient, penalty):
    """Solve Hessian · step = -gradient (k + 1, c) by conjugate gradients, the nearer to the optimum
    the more exactly. They take few turns, since in the main directions the Hessian is almost
    diagonal: the squares, times the mean curvature.
    """
    diagonal = curvature.mean(0) * x.squares[:, None] + penalty
    scaling = 1 / diagonal.clamp(min=1e-10)
    step = torch.zeros_like(gradient)
    residual = -gradient
    direction = scaling * residual
    norm = (residual * direction).sum(0)
    goal = norm * (norm / len(curvature)).sqrt().clamp(max=0.01)
    for _ in range(200):
        going_on = norm > goal
        if not going_on.any():
            break
        image = x.hessian(curvature, direction) + penalty * direction
        length = torch.where(going_on, norm / (direction * image).sum(0), 0.0)
        step += length * direction
        residual = residual - length * image
        new_norm = (residual * scaling * residual).sum(0)
        turn = torch.where(norm > 0, new_norm / norm, 0.0)
        direction = scaling * residual + turn * direction
        norm = new_norm
    return step


def step_size(state, step, change, gain):
    """Halve the steps (k + 1, c) that do not lower the loss as they should. → their sizes (c,)

    state: y, logits, weights and penalty of fit_logistic; change (n, c): of the logits.
    """
    y, logits, weights, penalty = state

    def loss(size):
        z = logits + size * change
        squares = (penalty * (weights + size * step).square()).sum(0)
        return (softplus(z, threshold=40) - y * z).nansum(0) + squares / 2

    size = torch.ones_like(gain)
    before = loss(torch.zeros_like(gain))
    for _ in range(50):
        wanted = before - 1e-4 * size * gain + 1e-12 * before.abs()
        is_long = loss(size) > wanted
        if not is_long.any():
            break
        size[is_long] /= 2
    return size


def fit_probe(train_x, train_y, val_x, val_y) -> tuple[np.ndarray, np.ndarray]:
    """Fit a linear probe: features standardised by train, one logistic regression per label.

    train_x, val_x (n, d); labels (n,) or (n, c) of 0, 1 and nan (not known). Every label gets the
    strength of L2 with the least loss on validation, of equals the strongest; L2_FALLBACK where
    validation lacks a class. The loss swings less than the AUROC, which counts few pairs where
    films are few. Features that are not finite teach nothing: nan.
    → weight (d, c), bias (c,): the logits of raw features are x @ weight + bias
    """
    train_y = torch.from_numpy(to_array(train_y).reshape(len(train_y), -1))
    val_y = to_array(val_y).reshape(len(val_y), -1)
    count = train_y.shape[1]
    if not torch.as_tensor(train_x).isfinite().all():
        return np.full((np.shape(train_x)[1], count), np.nan), np.full(count, np.nan)
    strengths = sorted(L2_GRID, reverse=True)
    x = Standardised(train_x)
    l2 = torch.tensor(strengths, dtype=torch.float64).repeat_interleave(count)
    fitted = x.for_raw(fit_logistic(x, train_y.repeat(1, len(strengths)), l2))
    weight, bias = (values.unflatten(-1, (len(strengths), count)).numpy() for values in fitted)
    best = []
    for label in range(count):
        truth = val_y[:, label, None]  # (m, 1)
        logits = to_array(val_x) @ weight[:, :, label] + bias[:, label]  # (m, strengths)
        losses = np.logaddexp(0, logits) - truth * logits  # cross entropy of every film
        has_both = np.nanmin(truth, initial=1) < np.nanmax(truth, initial=0)
        chosen = int(np.nansum(losses, 0).argmin()) if has_both else strengths.index(L2_FALLBACK)
        best.append(chosen)
    labels = range(count)
    return weight[:, best, labels], bias[best, labels]


def linear_probe(train_x, train_y, val_x, val_y, test_x) -> np.ndarray:
    """Logits of test_x (m, d) by a probe of train and val: (m,) or (m, c), as the labels are."""
    weight, bias = fit_probe(train_x, train_y, val_x, val_y)
    scores = to_array(test_x) @ weight + bias
    return scores[:, 0] if np.ndim(train_y) == 1 else scores


# ---------------------------------------------------------------- the probe that judges encoders
def ridge_scores(x, y, patients, new_x) -> np.ndarray:
    """Score new films by one ridge regression per label, fitted to other films.

    x (n, d) is standardised by its own mean and deviation; y (n, c) of 0, 1 and nan (not known: the
    film does not count); patients (n,): whose film it is. Every label gets that penalty of
    RIDGE_GRID × d which errs least, in squares, when each patient is left out in turn; of equals
    the strongest.
    → (m, c) for new_x (m, d): how far above the average film of x. nan for a label that lacks a
    class, for features that are not finite, and where fewer than two patients are known
    """
    y = to_array(y)
    x = torch.as_tensor(x)
    new_x = torch.as_tensor(new_x)
    patients = np.asarray(patients)
    scores = np.full((len(new_x), y.shape[1]), np.nan)
    if not (x.isfinite().all() and new_x.isfinite().all()):
        return scores
    patterns, pattern_of = np.unique(~np.isnan(y.T), axis=0, return_inverse=True)
    pattern_of = pattern_of.ravel()  # NumPy 2.0 gives it an axis more
    for number, is_known in enumerate(patterns):  # labels that are known of the same films
        known = y[is_known]
        has_both = (known == 1).any(0) & (known == 0).any(0)
        labels = np.flatnonzero((pattern_of == number) & has_both)
        if len(labels) and len(set(patients[is_known])) > 1:
            fit = Standardised(x if is_known.all() else x[is_known])
            weight = solve_ridge(fit, torch.from_numpy(known[:, labels]), patients[is_known])
            parts = [(part.double() - fit.mean) @ weight for part in new_x.split(4096)]
            scores[:, labels] = torch.cat(parts).numpy()
    return scores


def solve_ridge(x: Standardised, y, patients) -> torch.Tensor:
    """Weights (d, c) of the raw features, for y (n, c) of 0 and 1, each at its best penalty."""
    residual = y - y.mean(0)
    aim = x.gradient(residual)[:-1]  # (k, c)
    penalties = torch.tensor(RIDGE_GRID) * x.features.shape[1]
    shrink = 1 / (x.squares[:-1, None] + penalties)  # (k, penalties); aim × shrink: the solution
    best = left_out_errors(x, residual, aim, shrink, patients).argmin(0)  # (c,)
    weight, _ = x.for_raw(torch.cat([aim * shrink[:, best], torch.zeros(1, y.shape[1])]))
    return weight


def left_out_errors(x: Standardised, residual, aim, shrink, patients) -> torch.Tensor:
    """Sum the squared errors of each patient's films under the fit to all others. → (penalties, c)

    Nothing is fitted anew: if H is the matrix that turns labels into fitted ones, and r the
    residuals of the fit to all, then the films p of a patient who is left out err by
    (I - H_pp)⁻¹ r_p.
    """
    _, patient_of, films_of = np.unique(patients, return_inverse=True, return_counts=True)
    by_patient = np.argsort(patient_of, kind="stable")
    groups = np.split(by_patient, np.cumsum(films_of)[:-1])
    errors = torch.zeros(shrink.shape[1], residual.shape[1], dtype=torch.float64)
    for size in set(films_of.tolist()):
        rows = np.stack([group for group in groups if len(group) == size])  # (patients, size)
        for part in torch.from_numpy(rows).split(max(1, 4096 // size)):
            z = x.coordinates(part.flatten()).unflatten(0, part.shape)  # (patients, size, k)
            for total, factor in zip(errors, shrink.T, strict=True):
                shrunk = z * factor
                hat = shrunk @ z.mT + 1 / len(residual)
                error = residual[part] - shrunk @ aim
                left_out = torch.linalg.solve(torch.eye(size, dtype=hat.dtype) - hat, error)
                total += left_out.square().sum((0, 1))
    return errors


def cross_validated(x, y, patients, folds: int = 5, repeats: int = 4) -> np.ndarray:
    """Score every film by `ridge_scores` of other patients: `folds` parts, each in turn left out.

    x (n, d), y (n, c), patients (n,). Each fit has a penalty of its own and so scores on a scale of
    its own: they are divided by their deviation over the films of the fit. Without that, features
    that know nothing come to an AUROC of 0.45 to 0.47, not 0.50: a fit whose films happen to teach
    much has large scores, and of the films left out the opposite is then true.
    → (n, c), mean over `repeats` divisions of the patients, always the same ones; nan where a label
    lacks a class in what remains
    """
    y = to_array(y)
    patients = np.asarray(patients, str)
    names, patient_of = np.unique(patients, return_inverse=True)
    scores = np.zeros((repeats, *y.shape))
    for repeat, row in enumerate(scores):
        part_of = (numpy_rng(PROBE_FOLDS, repeat).permutation(len(names)) % folds)[patient_of]
        for part in range(folds):
            out = part_of == part
            of_all = ridge_scores(x[~out], y[~out], patients[~out], x)
            deviation = of_all[~out].std(0)
            row[out] = of_all[out] / np.where(deviation > 0, deviation, 1)
    return scores.mean(0)
