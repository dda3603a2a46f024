"""Linear classifiers on frozen features: the linear probe, and the head that fine-tuning starts at.

They are logistic regressions: multinomial where each image has one class, one for each class where
an image may have several.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from vissl_lite.transfer.sources.parts import fold_numbers, rarest_classes

# Candidates for the L2 penalty on the mean loss, from strong to weak.
PENALTIES = tuple(10.0**power for power in (0, -0.5, -1, -1.5, -2, -2.5, -3, -4, -5))

# So many in a row that are worse than the best end the search: weak ones take most of its time.
MAX_WORSE = 2

# Where each class has one image, so that none can be held out.
DEFAULT_PENALTY = 0.01

# Folds of the cross-validation; with more images than this, one of the folds is held out.
MAX_FOLDS, MANY = 5, 2000

# Of L-BFGS: more change no prediction.
MAX_ITERATIONS, GRADIENT_TOLERANCE = 300, 1e-4

# Indices of images to fit to, and of images to score on.
Fold = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class LinearHead:
    """A fitted linear classifier.

    Attributes:
        weight: ``(K, D)`` float32, for features as they are: their standardization is folded in.
        bias: ``(K,)`` float32.
    """

    weight: np.ndarray
    bias: np.ndarray

    def logits(self, features: np.ndarray) -> np.ndarray:
        """``(N, K)`` logits of ``(N, D)`` features."""
        return np.asarray(features @ self.weight.T + self.bias)


class ChosenPenalty(NamedTuple):
    """A penalty, and its scores on the held-out images.

    Attributes:
        penalty: lambda in mean(loss) + lambda / 2 * |weights|^2.
        loss: Mean loss of an image.
        accuracy: Share of the images that are classified correctly; with several labels per image,
            share of the labels.
    """

    penalty: float
    loss: float
    accuracy: float


def fit_linear(
    features: np.ndarray,
    labels: np.ndarray,
    classes: int,
    seed: int = 0,
    groups: np.ndarray | None = None,
) -> tuple[LinearHead, ChosenPenalty | None]:
    """Choose the penalty by cross-validation, then fit a linear classifier to all images.

    Args:
        features: ``(N, D)``.
        labels: See ``fit_head``.
        classes: Number of classes K.
        seed: Seed of the folds.
        groups: See ``make_folds``.

    Returns:
        The classifier, and the penalty with its scores; None for the default penalty, where no
        class has two images.
    """
    folds = make_folds(labels, seed, groups)
    chosen = choose_penalty(features, labels, classes, folds) if folds else None
    penalty = chosen.penalty if chosen else DEFAULT_PENALTY
    return fit_head(features, labels, classes, penalty), chosen


def make_folds(labels: np.ndarray, seed: int, groups: np.ndarray | None = None) -> list[Fold]:
    """Folds of a cross-validation, stratified by class.

    Args:
        labels: See ``fit_head``.
        seed: Seed of the folds.
        groups: ``(N,)`` group of each image, such as its patient; no fold divides one. None for
            images that are all apart.

    Returns:
        Up to five; one of more than 2,000 images; none where most classes have one image, or
        images of one group only.
    """
    several = labels.ndim == 2
    strata = rarest_classes([np.flatnonzero(row).tolist() for row in labels]) if several else labels
    apart = strata
    if groups is not None:  # images of a group count once in each class
        numbers = np.unique(groups, return_inverse=True)[1]
        apart = np.unique(np.stack([strata, numbers], axis=1), axis=0)[:, 0]
    count = min(MAX_FOLDS, int(np.median(np.unique(apart, return_counts=True)[1])))
    if count < 2:
        return []
    numbers = fold_numbers(strata, MAX_FOLDS if len(labels) > MANY else count, seed, groups)
    held_out = range(1 if len(labels) > MANY else int(numbers.max()) + 1)
    return [(np.flatnonzero(numbers != n), np.flatnonzero(numbers == n)) for n in held_out]


def fit_head(
    features: np.ndarray, labels: np.ndarray, classes: int, penalty: float = DEFAULT_PENALTY
) -> LinearHead:
    """Fit a linear classifier with an L2 penalty.

    Features are centered and divided by their standard deviation, or by the mean one of all
    features where theirs is smaller.

    Args:
        features: ``(N, D)``.
        labels: ``(N,)`` class indices, or ``(N, K)`` of 0 and 1 with several labels per image.
        classes: Number of classes K. Those that no image has get a low logit.
        penalty: lambda in mean(loss) + lambda / 2 * |weights|^2.
    """
    return _Regression(features, labels, classes).fit(penalty)


def choose_penalty(
    features: np.ndarray, labels: np.ndarray, classes: int, folds: Sequence[Fold]
) -> ChosenPenalty:
    """Choose the penalty with the smallest loss on the held-out images of all folds.

    The loss differs between penalties also where the accuracies on few images are equal. Penalties
    are tried from strong to weak until two in a row are worse than the best.

    Args:
        features: ``(N, D)``.
        labels: See ``fit_head``.
        classes: Number of classes K.
        folds: Indices of images to fit to, and of images to score on.
    """
    held_out = sum(len(outside) for _, outside in folds)
    regressions = [_Regression(features[inside], labels[inside], classes) for inside, _ in folds]
    best, worse = ChosenPenalty(PENALTIES[0], math.inf, 0.0), 0
    for penalty in PENALTIES:  # each solution is a start close to the next
        loss = accuracy = 0.0
        for regression, (_, outside) in zip(regressions, folds, strict=True):
            logits = regression.fit(penalty).logits(features[outside])
            losses, correct = _scores(logits, labels[outside])
            loss += float(losses.sum()) / held_out
            accuracy += float(correct.sum()) / held_out
        if loss < best.loss:
            best, worse = ChosenPenalty(penalty, loss, accuracy), 0
            continue
        worse += 1
        if worse == MAX_WORSE:
            break
    return best


class _Regression:
    """Logistic regression on some images, for one penalty after the other.

    Args:
        features: ``(N, D)``.
        labels: See ``fit_head``.
        classes: Number of classes K.
    """

    def __init__(self, features: np.ndarray, labels: np.ndarray, classes: int) -> None:
        self.labels = labels
        self.mean = features.mean(axis=0, dtype=np.float64)
        scale = features.std(axis=0, dtype=np.float64)
        # A rectified feature that is zero in almost all images would otherwise outweigh all others
        # in the few images in which it is not.
        self.scale = np.maximum(scale, scale.mean() + 1e-6)
        x = ((features - self.mean) / self.scale).astype(np.float32)
        self.basis: np.ndarray | None = None
        if x.shape[0] < x.shape[1]:
            # The weights lie in the span of the images, which has fewer dimensions.
            self.basis = np.linalg.svd(x, full_matrices=False)[2]
            x = x @ self.basis.T
        self.x = x
        self.solution = np.zeros((classes, x.shape[1] + 1))

    def fit(self, penalty: float) -> LinearHead:
        """Minimize the loss by L-BFGS, starting at the solution for the last penalty."""
        shape = self.solution.shape

        def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
            weight, bias = np.split(flat.reshape(shape), [-1], axis=1)
            logits = (weight.astype(np.float32) @ self.x.T) + bias.astype(np.float32)
            loss, slope = _loss_and_slope(logits, self.labels)
            gradient = np.concatenate(
                [slope @ self.x + penalty * weight, slope.sum(axis=1, keepdims=True)], axis=1
            )
            return loss + float(penalty / 2 * np.square(weight).sum()), gradient.ravel()

        found = minimize(
            objective,
            self.solution.ravel(),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": MAX_ITERATIONS, "gtol": GRADIENT_TOLERANCE, "ftol": 1e-7},
        )
        self.solution = found.x.reshape(shape)
        weight, bias = self.solution[:, :-1], self.solution[:, -1]
        if self.basis is not None:
            weight = weight @ self.basis
        weight = weight / self.scale
        return LinearHead(weight.astype(np.float32), (bias - weight @ self.mean).astype(np.float32))


def _loss_and_slope(logits: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean loss of an image, and its ``(K, N)`` gradient with respect to the logits.

    Args:
        logits: ``(K, N)``: NumPy reduces over few classes several times faster in this layout.
        labels: ``(N,)`` or ``(N, K)``.
    """
    if labels.ndim == 1:
        losses, slope = _cross_entropy(logits, labels)
        slope[labels, np.arange(len(labels))] -= 1
    else:
        losses, slope = _binary_cross_entropy(logits, labels.T), expit(logits) - labels.T
    return float(losses.mean(dtype=np.float64)), (slope / len(labels)).astype(np.float32)


def _scores(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Loss of each image, summed over labels, and the share of it that is correct; ``(N,)``."""
    if labels.ndim == 1:
        losses, _ = _cross_entropy(logits.T, labels)
        return losses, (logits.argmax(axis=1) == labels).astype(float)
    losses = _binary_cross_entropy(logits.T, labels.T)
    return losses, ((logits > 0) == (labels > 0)).mean(axis=1)


def _cross_entropy(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``(N,)`` cross-entropy and ``(K, N)`` probabilities of ``(K, N)`` logits."""
    shifted = logits - logits.max(axis=0)
    exponentials = np.exp(shifted)
    totals = exponentials.sum(axis=0)
    return np.log(totals) - shifted[labels, np.arange(len(labels))], exponentials / totals


def _binary_cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """``(N,)`` binary cross-entropies, summed over labels, of ``(K, N)`` logits and labels."""
    return np.asarray((np.logaddexp(0, logits) - labels * logits).sum(axis=0))
