"""Confidence of predictions: its calibration, and the precision that it stands for.

Both are measured on predictions for labelled images that the models were not trained on. They
decide which predictions for unlabelled images are taken as labels.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import torch
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

MAX_CONFIDENCE_BYTES = 2**20

# Confidences whose precision is measured.
CUTOFFS = (*(step / 100 for step in range(100)), 0.995, 0.999)

# Quantile of the normal distribution of a one-sided bound that holds with 95 % confidence.
Z_95 = 1.6449

# With fewer held-out images above a confidence, its observed precision says nothing.
MIN_IMAGES = 10


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
        value: The smallest confidence that is taken.
        temperature: Divisor of the logits, see ``Confidence``.
        predictions: Number of held-out predictions of at least this confidence.
        images: Number of held-out images, or groups of them, that these are of.
        precision: Share of these predictions that are right; nan without any.
        lower_bound: Bound above which the precision is with 95 % confidence, see ``wilson``.
    """

    value: float
    temperature: float
    predictions: int
    images: int
    precision: float
    lower_bound: float


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
    """

    of: str
    temperature: float
    predictions: tuple[int, ...]
    right: tuple[int, ...]
    images: tuple[int, ...]

    @classmethod
    def measured(
        cls,
        of: str,
        confidence: np.ndarray,
        right: np.ndarray,
        images: np.ndarray,
        temperature: float,
    ) -> Self:
        """Count the predictions at each cutoff.

        Args:
            of: What is predicted.
            confidence: ``(N,)`` in [0, 1].
            right: ``(N,)`` bool.
            images: ``(N,)`` str: the image, or group, of each prediction.
            temperature: Divisor of the logits that the confidences are of.
        """
        counts = []
        for cutoff in CUTOFFS:
            sure = confidence >= cutoff
            counts.append((int(sure.sum()), int(right[sure].sum()), len(np.unique(images[sure]))))
        predictions, hits, apart = zip(*counts, strict=True)
        return cls(of, temperature, predictions, hits, apart)

    def at(self, value: float) -> Cutoff:
        """A confidence of the user's choice, and what is known of it.

        Args:
            value: Between 0 and 1. Its precision is that of the next smaller one of ``CUTOFFS``.
        """
        return self._cutoff(int(np.searchsorted(CUTOFFS, value, side="right")) - 1, value)

    def choose(self, min_precision: float) -> Cutoff:
        """The lowest confidence whose precision is large enough.

        Of the cutoffs with the same held-out predictions it is the highest: nothing is known of
        predictions that are less confident than all held-out ones. That the precision is large
        enough is judged by the lower bound of the precision. If no confidence passes, as where
        held-out images are few, it is judged by the observed precision of at least ten images;
        ``Cutoff.lower_bound`` is then less than what was asked for.

        Args:
            min_precision: Share of the predictions that must be right.

        Raises:
            UserError: No confidence has this precision.
        """
        found = [self._cutoff(number, value) for number, value in enumerate(CUTOFFS)]
        proven = [one for one in found if one.lower_bound >= min_precision]
        enough = [one for one in found if one.images >= MIN_IMAGES]
        seen = [one for one in enough if one.precision >= min_precision]
        if proven or seen:
            least = (proven or seen)[0].predictions
            return max(
                (one for one in found if one.predictions == least), key=lambda one: one.value
            )
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
            and found.keys() == {"of", "temperature", *counts}
            and isinstance(found["of"], str)
            and isinstance(found["temperature"], int | float)
            and 0 < found["temperature"] < math.inf
            and all(_are_counts(found[name]) for name in counts)
        )
        if not good:
            raise UserError(f"{file} is damaged: it holds no counts of held-out predictions")
        return cls(
            found["of"], float(found["temperature"]), *(tuple(found[name]) for name in counts)
        )


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
