"""Metrics of classifiers, on validation images during training and on test images."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    binary_f1_score,
    multiclass_accuracy,
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
)

from vissl_lite.transfer.classification.data import has_both
from vissl_lite.transfer.confidence import LossFunction, fit_temperature

log = logging.getLogger(__name__)


def evaluate_one(logits: Tensor, target: Tensor) -> dict[str, float]:
    """Accuracy and loss of images with one class each.

    Args:
        logits: ``(N, K)``.
        target: ``(N,)`` class indices.

    Returns:
        ``top1``, ``loss`` and ``calibrated_loss``; see ``calibrated_loss``.
    """
    accuracy = float((logits.argmax(dim=1) == target).float().mean())
    return {"top1": accuracy, **_losses(logits, target, F.cross_entropy)}


def evaluate_several(logits: Tensor, target: Tensor) -> dict[str, float]:
    """Mean average precision and loss of images with several labels.

    Args:
        logits: ``(N, K)``.
        target: ``(N, K)`` of 0 and 1.

    Returns:
        ``map``, ``loss`` and ``calibrated_loss``; only the losses if no class can be ranked.
    """
    losses = _losses(logits.double(), target.double(), F.binary_cross_entropy_with_logits)
    ranked = np.flatnonzero(has_both(target.numpy())).tolist()
    if not ranked:
        return losses
    # one class at a time: torchmetrics' multi-label functions refuse a single class
    score = logits.double().sigmoid()
    mean = _mean([binary_average_precision(score[:, k], target[:, k]) for k in ranked])
    return {"map": mean, **losses}


def _losses(logits: Tensor, target: Tensor, loss: LossFunction) -> dict[str, float]:
    return {
        "loss": float(loss(logits, target)),
        "calibrated_loss": calibrated_loss(logits, target, loss),
    }


def calibrated_loss(logits: Tensor, target: Tensor, loss: LossFunction) -> float:
    """The loss at the temperature that suits the images best.

    Models are chosen by it. Training makes a model overconfident, for which the plain loss punishes
    it also where more images are classified correctly; of few images, their accuracy is too coarse.

    Args:
        logits: ``(N, K)``.
        target: Target of the loss.
        loss: Function of logits and target.
    """
    if not logits.isfinite().all():
        return math.nan
    return fit_temperature(logits, target, loss)[1]


@dataclass(frozen=True)
class TestScores:
    """Scores of a classifier on the test part.

    Attributes:
        metrics: Metrics by name. With one class per image: ``top1`` (share classified rightly) and
            ``macro_f1``; with several labels ``map`` (mean average precision), ``auroc`` and
            ``macro_f1`` (at a probability of one half), nan without a class to score. Means over
            classes count each alike.
        per_class: Metrics by class name: ``precision``, ``recall``, ``f1``; with several labels
            ``ap``, ``auroc``, ``f1`` of the classes that some test images have and some have not,
            which are those that the means are over.
        confusion: ``(K, K)`` images, by true class (row) and predicted class (column); None with
            several labels.
        per_image: ``(N,)`` bool: which images are classified correctly; with several labels
            jackknife pseudo-values of ``map``.
    """

    metrics: dict[str, float]
    per_class: dict[str, dict[str, float]]
    confusion: np.ndarray | None = None
    per_image: np.ndarray | None = None

    @property
    def top1(self) -> float:
        """Fraction of images that are classified correctly."""
        return self.metrics["top1"]

    @property
    def macro_f1(self) -> float:
        """Unweighted mean of F1 over classes."""
        return self.metrics["macro_f1"]


def score_one(logits: Tensor, target: Tensor, classes: Sequence[str]) -> TestScores:
    """Score images with one class each.

    Args:
        logits: ``(N, K)``.
        target: ``(N,)`` class indices.
        classes: K names.
    """
    count = len(classes)
    predicted = logits.argmax(dim=1).unique()
    if len(predicted) == 1 and len(target.unique()) > 1:
        log.warning(
            "all %(images)d test images are classified as %(class)s",
            {"images": len(target), "class": classes[int(predicted)]},
            extra={"code": "prediction.one_class"},
        )
    each = {
        "precision": multiclass_precision(logits, target, count, average="none"),
        "recall": multiclass_recall(logits, target, count, average="none"),
        "f1": multiclass_f1_score(logits, target, count, average="none"),
    }
    metrics = {
        "top1": float(multiclass_accuracy(logits, target, count, average="micro")),
        "macro_f1": float(multiclass_f1_score(logits, target, count, average="macro")),
    }
    confusion = multiclass_confusion_matrix(logits, target, count).numpy()
    right = (logits.argmax(dim=1) == target).numpy()
    return TestScores(metrics, _by_class(each, classes), confusion, right)


def score_several(logits: Tensor, target: Tensor, classes: Sequence[str]) -> TestScores:
    """Score images with several labels, without classes that all images or none have.

    Args:
        logits: ``(N, K)``.
        target: ``(N, K)`` of 0 and 1.
        classes: K names.
    """
    scored = has_both(target.numpy())
    names = np.array(classes)
    if not scored.all():
        log.warning(
            "left out of the scores, as all test images or none have it: %(classes)s",
            {"classes": ", ".join(names[~scored])},
            extra={"code": "class.not_scored"},
        )
    pairs = [(logits[:, k].double().sigmoid(), target[:, k]) for k in np.flatnonzero(scored)]
    each = {
        "ap": [binary_average_precision(*pair) for pair in pairs],
        "auroc": [binary_auroc(*pair) for pair in pairs],
        "f1": [binary_f1_score(*pair) for pair in pairs],
    }
    means = {"map": _mean(each["ap"]), "auroc": _mean(each["auroc"]), "macro_f1": _mean(each["f1"])}
    return TestScores(means, _by_class(each, names[scored].tolist()))


def mean_average_precision(logits: Tensor, target: Tensor) -> float:
    """Mean average precision over the classes that some images have and some have not.

    Args:
        logits: ``(N, K)``.
        target: ``(N, K)`` of 0 and 1.
    """
    scored = np.flatnonzero(has_both(target.numpy()))
    probabilities = logits.double().sigmoid()
    return _mean([binary_average_precision(probabilities[:, k], target[:, k]) for k in scored])


def _by_class(
    each: Mapping[str, Sequence[Tensor] | Tensor], classes: Sequence[str]
) -> dict[str, dict[str, float]]:
    return {
        name: {measure: float(values[row]) for measure, values in each.items()}
        for row, name in enumerate(classes)
    }


def _mean(values: Sequence[Tensor]) -> float:
    return float(torch.stack(list(values)).mean()) if values else math.nan
