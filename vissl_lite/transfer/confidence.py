"""Confidence of predictions: its calibration, and the precision that it stands for.

Both are measured on predictions for labelled images that the models were not trained on. They
decide which predictions for unlabelled images are taken as labels.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from scipy.optimize import minimize_scalar
from torch import Tensor

from vissl_lite.data.atomic_file import write_atomically
from vissl_lite.data.json_file import read_json
from vissl_lite.errors import UserError

LossFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]

# Logarithms of the smallest and the largest temperature.
TEMPERATURES = (-3.0, 3.0)

# File in a model folder.
CONFIDENCE = "confidence.json"

MAX_CONFIDENCE_BYTES = 2**24

# Confidences whose precision is measured.
CUTOFFS = (*(step / 100 for step in range(100)), 0.995, 0.999)

# Quantile of the normal distribution of a one-sided bound that holds with 95 % confidence.
Z_95 = 1.6449

# With fewer held-out images above a confidence, its observed precision says nothing.
MIN_IMAGES = 10

# Numbers of predictions, of right ones and of their images at each cutoff.
Counts: TypeAlias = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class HeldOut:
    """Predictions of models for labelled images that they were not trained on.

    Attributes:
        outputs: ``(N, ...)`` outputs of a model, as its task understands them.
        target: ``(N, ...)`` the truth of them.
        images: ``(N,)`` str: the image of each, or its group, such as the patient.
    """

    outputs: Tensor
    target: Tensor
    images: np.ndarray

    @classmethod
    def joined(cls, several: Sequence["HeldOut"]) -> Self:
        """The predictions of all folds of a cross-validation."""
        return cls(
            torch.cat([one.outputs for one in several]),
            torch.cat([one.target for one in several]),
            np.concatenate([one.images for one in several]),
        )


@dataclass(frozen=True)
class Cutoff:
    """The confidence from which predictions are taken as labels.

    Attributes:
        value: The smallest confidence that is taken of any class.
        temperature: Divisor of the logits, see ``Confidence``.
        predictions: Number of held-out predictions of at least this confidence.
        images: Number of held-out images, or groups of them, that these are of.
        precision: Share of these predictions that are right; nan without any.
        lower_bound: Bound above which the precision is with 95 % confidence, see ``wilson``.
        raised: Higher values of some classes, by index; infinite for a class of which nothing is
            taken. (The counts above are those without them.)
    """

    value: float
    temperature: float
    predictions: int
    images: int
    precision: float
    lower_bound: float
    raised: Mapping[int, float] = field(default_factory=dict)

    def of(self, labels: np.ndarray) -> np.ndarray:
        """The smallest confidence that is taken of each of some classes, an array of their shape.

        Args:
            labels: Class indices.
        """
        limits = np.full(labels.shape, self.value)
        for label, value in self.raised.items():
            limits[labels == label] = value
        return limits


@dataclass(frozen=True)
class Confidence:
    """How often predictions of a confidence are right, on images that were not trained on.

    Attributes:
        of: What is predicted: ``images``, ``boxes`` or ``pixels``.
        temperature: Logits are divided by it before they become probabilities (temperature
            scaling, Guo et al. 2017, section 4.2); 1 where that is of no use.
        predictions: For each of ``CUTOFFS``, the number of predictions of at least this confidence.
        right: The number of these that are right.
        images: The number of images, or groups of them, that these are of.
        by_class: The same for the predictions of single classes, by index, of those with enough
            images to judge; without any where a prediction is of several classes.
    """

    of: str
    temperature: float
    predictions: tuple[int, ...]
    right: tuple[int, ...]
    images: tuple[int, ...]
    by_class: Mapping[int, Counts] = field(default_factory=dict)

    @classmethod
    def measured(
        cls,
        of: str,
        confidence: np.ndarray,
        right: np.ndarray,
        images: np.ndarray,
        temperature: float,
        labels: np.ndarray | None = None,
    ) -> Self:
        """Count the predictions at each cutoff.

        Args:
            of: What is predicted.
            confidence: ``(N,)`` in [0, 1].
            right: ``(N,)`` bool.
            images: ``(N,)`` str: the image, or group, of each prediction.
            temperature: Divisor of the logits that the confidences are of.
            labels: ``(N,)`` predicted classes; None where each prediction is of several.
        """
        images = np.unique(images, return_inverse=True)[1]  # numbers are compared faster than texts
        by_class = {}
        for label in () if labels is None else np.unique(labels).tolist():
            its = labels == label
            if len(np.unique(images[its])) >= MIN_IMAGES:
                by_class[label] = _counted(confidence[its], right[its], images[its])
        return cls(of, temperature, *_counted(confidence, right, images), by_class)

    def at(self, value: float) -> Cutoff:
        """A confidence of the user's choice, and what is known of it.

        Args:
            value: Between 0 and 1. Its precision is that of the next smaller one of ``CUTOFFS``.
        """
        return self._cutoff(int(np.searchsorted(CUTOFFS, value, side="right")) - 1, value)

    def choose(self, min_precision: float) -> Cutoff:
        """The lowest confidence whose precision is large enough.

        That it is large enough is judged by the lower bound of the precision, from high confidences
        to low ones, until one fails: so the bound of the last one that passes holds with 95 %
        confidence, although several were tried (a fixed sequence of tests; Bauer 1991, "Multiple
        testing in clinical trials"). The first one has twice as many images as would do if all
        predictions were right, or as many. If it fails, or held-out images are fewer, the lowest
        confidence with an observed precision that is large enough, of at least ten images, is
        chosen; ``Cutoff.lower_bound`` is then less than what was asked for.

        Of the cutoffs with the same held-out predictions it is the highest: nothing is known of
        predictions that are less confident than all held-out ones.

        A precision over all classes may be that of the frequent ones. A class whose own observed
        precision is too low there, of at least ten images, has the lowest higher confidence where
        it is not, or none of its predictions are taken.

        Args:
            min_precision: Share of the predictions that must be right.

        Raises:
            UserError: No confidence has this precision.
        """
        found = [self._cutoff(number, value) for number, value in enumerate(CUTOFFS)]
        proven, failed = _proven(found, min_precision)
        enough = [one for one in found if one.images >= MIN_IMAGES]
        seen = [one for one in enough if one.precision >= min_precision]
        if proven or seen:
            least = (proven or seen)[0].predictions
            chosen = max(
                (one for one in found if one.predictions == least), key=lambda one: one.value
            )
            if not proven:
                chosen = replace(chosen, lower_bound=min(chosen.lower_bound, failed))
            return replace(chosen, raised=self._raised(chosen.value, min_precision))
        if not enough:
            raise UserError(
                f"--min_precision {min_precision:g} can't be judged by {self.images[0]} held-out "
                f"images, fewer than {MIN_IMAGES}: give a number with --min_confidence"
            )
        best = max(enough, key=lambda one: one.precision)
        raise UserError(
            f"no confidence has the precision {min_precision:g} on {self.images[0]} held-out "
            f"images; the best is {best.precision:.3f} from a confidence of {best.value:g} on: "
            f"give a lower --min_precision, or a number with --min_confidence"
        )

    def _raised(self, value: float, min_precision: float) -> dict[int, float]:
        """Confidences of the classes that need a higher one than ``value``; see ``choose``."""
        raised = {}
        for label, (predictions, right, images) in self.by_class.items():
            here = CUTOFFS.index(value)
            good = [
                images[n] >= MIN_IMAGES and right[n] >= min_precision * predictions[n]
                for n in range(len(CUTOFFS))
            ]
            if images[here] < MIN_IMAGES or good[here]:
                continue
            lowest = next((n for n in range(here, len(CUTOFFS)) if good[n]), None)
            raised[label] = math.inf
            if lowest is not None:
                same = (
                    n for n in range(lowest, len(CUTOFFS)) if predictions[n] == predictions[lowest]
                )
                raised[label] = CUTOFFS[max(same)]
        return raised

    def _cutoff(self, number: int, value: float) -> Cutoff:
        predictions, right, images = (
            counts[number] for counts in (self.predictions, self.right, self.images)
        )
        precision = right / predictions if predictions else math.nan
        bound = wilson(precision, images) if predictions else 0.0
        return Cutoff(value, self.temperature, predictions, images, precision, bound)

    def save(self, folder: Path) -> None:
        """Write ``confidence.json`` into a model folder."""
        write_atomically(folder / CONFIDENCE, json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Confidence | None":
        """Read what ``save`` has written.

        Args:
            folder: The model folder.

        Returns:
            None for a model without held-out predictions.

        Raises:
            UserError: The file is damaged.
        """
        file = folder / CONFIDENCE
        if not file.is_file():
            return None
        found = read_json(file, MAX_CONFIDENCE_BYTES)
        counts = ("predictions", "right", "images")
        good = (
            isinstance(found, dict)
            and found.keys() == {"of", "temperature", "by_class", *counts}
            and isinstance(found["of"], str)
            and isinstance(found["temperature"], int | float)
            and 0 < found["temperature"] < math.inf
            and all(_are_counts(found[name]) for name in counts)
            and isinstance(found["by_class"], dict)
            and all(
                label.isdecimal()
                and isinstance(three, list)
                and len(three) == len(counts)
                and all(_are_counts(one) for one in three)
                for label, three in found["by_class"].items()
            )
        )
        if not good:
            raise UserError(f"{file} is damaged: it holds no counts of held-out predictions")
        by_class = {
            int(label): (tuple(three[0]), tuple(three[1]), tuple(three[2]))
            for label, three in found["by_class"].items()
        }
        predictions, right, images = (tuple(found[name]) for name in counts)
        temperature = float(found["temperature"])
        return cls(found["of"], temperature, predictions, right, images, by_class)


def _counted(confidence: np.ndarray, right: np.ndarray, images: np.ndarray) -> Counts:
    """Count predictions, right ones and images at each of ``CUTOFFS``; see ``measured``."""
    predictions, hits, apart = [], [], []
    for cutoff in CUTOFFS:
        sure = confidence >= cutoff
        predictions.append(int(sure.sum()))
        hits.append(int(right[sure].sum()))
        apart.append(len(np.unique(images[sure])))
    return tuple(predictions), tuple(hits), tuple(apart)


def _proven(found: Sequence[Cutoff], min_precision: float) -> tuple[list[Cutoff], float]:
    """The cutoffs that pass, ascending, and the bound of the first one; see ``choose``."""
    needed = next(
        (count for count in range(1, found[0].images + 1) if wilson(1, count) >= min_precision),
        None,
    )
    if needed is None:
        return [], math.inf
    first = max(
        number for number, one in enumerate(found) if one.images >= min(2 * needed, found[0].images)
    )
    passed: list[Cutoff] = []
    for one in reversed(found[: first + 1]):
        if one.lower_bound < min_precision:
            break
        passed.insert(0, one)
    return passed, found[first].lower_bound


def _are_counts(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) == len(CUTOFFS)
        and all(type(value) is int and value >= 0 for value in values)
    )


def wilson(share: float, count: int) -> float:
    """Lower bound of a share with 95 % confidence, one-sided.

    Pixels of one image, as boxes of one image, are right or wrong together. All of them count as
    one observation, which makes the bound lower than it had to be.

    Source: the score interval of Wilson 1927, "Probable inference, the law of succession, and
    statistical inference".

    Args:
        share: Observed share.
        count: Number of observations, at least 1.
    """
    square = Z_95**2 / count
    center = share + square / 2
    half = Z_95 * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return (center - half) / (1 + square)


def fit_temperature(logits: Tensor, target: Tensor, loss: LossFunction) -> tuple[float, float]:
    """The temperature at which a loss is smallest, and this loss.

    Source: temperature scaling (Guo et al. 2017, section 4.2).

    Args:
        logits: ``(N, K)``, finite.
        target: Target of the loss.
        loss: Function of logits and target.
    """

    def at(log_temperature: float) -> float:
        return float(loss(logits / math.exp(log_temperature), target))

    found = minimize_scalar(at, bounds=TEMPERATURES, method="bounded")
    return math.exp(float(found.x)), float(found.fun)


def calibrated(logits: Tensor, target: Tensor, images: int) -> float:
    """The temperature of held-out logits that confidences are measured with.

    If all predictions are right, the cross-entropy is smallest at temperature 0, where all are
    certain. So the true class has the probability (N + 1) / (N + 2) instead of 1, as if one of N
    images more were wrong.

    Source: Platt 1999, "Probabilistic outputs for support vector machines", section 2.2.

    Args:
        logits: ``(M, K)`` float64, finite.
        target: ``(M,)`` classes, or ``(M, K)`` whether an image has each of several labels.
        images: Number N of images, or of groups of them.
    """
    if target.ndim == 2:
        smooth = (target.double() * images + 1) / (images + 2)
        return fit_temperature(logits, smooth, F.binary_cross_entropy_with_logits)[0]
    classes = logits.shape[1]
    share = min(1.0, classes / max(1, classes - 1) / (images + 2))  # torch's is over all classes
    return fit_temperature(logits, target, partial(F.cross_entropy, label_smoothing=share))[0]
