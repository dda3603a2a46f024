"""What a comparison may say: paired differences with intervals, verdicts, what labels are worth."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import norm, t
from sklearn.isotonic import IsotonicRegression

Verdict = Literal["helped", "no difference", "hurt"]


@dataclass(frozen=True)
class Runs:
    """One encoder with one amount of labels, over seeds.

    Attributes:
        values: ``(S,)`` figures on the test part, larger is better, one a seed.
        right: ``(S, M)`` bool: which of the M test images were classified rightly, so that
            ``values`` are its means over images; None where the figure is no such mean.
    """

    values: np.ndarray
    right: np.ndarray | None = None

    @property
    def mean(self) -> float:
        """Over seeds."""
        return float(self.values.mean())

    @property
    def std(self) -> float:
        """Over seeds, of a sample; 0 for one seed."""
        return float(self.values.std(ddof=1)) if len(self.values) > 1 else 0.0


@dataclass(frozen=True)
class Difference:
    """A mean paired difference and its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> Verdict:
        """Which side of zero the interval is on."""
        return "helped" if self.low > 0 else "hurt" if self.high < 0 else "no difference"


def difference(
    encoder: Sequence[Runs], baseline: Sequence[Runs], confidence: float = 0.95
) -> Difference:
    """How much better an encoder is than the baseline, averaged over amounts of labels.

    Runs of one seed have the same labels in both encoders: differences are taken seed by seed, and
    image by image. Two things make them vary. Other seeds give other labels (and other weights of
    an untrained encoder): Student's t interval over the seeds. Other test images would have given
    another figure, and all seeds share those there are: the normal interval over the images'
    differences, each averaged over seeds. Half-widths are added in squares, which makes the
    interval a little too wide, as seeds vary by their test images too. Without ``right`` the
    interval is of the seeds alone.

    Args:
        encoder: for each amount of labels, the encoder's runs.
        baseline: likewise; the same seeds and test images.
        confidence: of the interval.
    """
    by_seed = np.mean([a.values - b.values for a, b in zip(encoder, baseline, strict=True)], axis=0)
    tail = (1 + confidence) / 2
    half = 0.0
    if len(by_seed) > 1:
        half = t.ppf(tail, len(by_seed) - 1) * by_seed.std(ddof=1) / np.sqrt(len(by_seed))
    pairs = [
        (a.right.astype(np.float64) - b.right).mean(axis=0)
        for a, b in zip(encoder, baseline, strict=True)
        if a.right is not None and b.right is not None
    ]
    if len(pairs) == len(encoder) and len(pairs[0]) > 1:
        by_image = np.mean(pairs, axis=0)
        sampling = norm.ppf(tail) * by_image.std(ddof=1) / np.sqrt(len(by_image))
        half = float(np.hypot(half, sampling))
    mean = float(by_seed.mean())
    return Difference(mean, mean - half, mean + half)


def labels_worth(
    labels: Sequence[float], baseline: Sequence[float], value: float
) -> tuple[float, bool] | None:
    """How many labels the baseline needs to be as good as an encoder.

    The baseline's curve is made monotone (isotonic regression) and read between its points,
    straight over the logarithm of the labels; it is never continued beyond them.

    Args:
        labels: ``(A,)`` numbers of labels, rising.
        baseline: ``(A,)`` the baseline's figures with so many.
        value: the encoder's figure.

    Returns:
        The number of labels, and whether it is exact; else the baseline needs more than that many,
        the most there are. None where already the fewest labels give the baseline a better figure,
        or there is but one amount.
    """
    if len(labels) < 2:
        return None
    x = np.log(np.asarray(labels, np.float64))
    curve = IsotonicRegression().fit_transform(x, np.asarray(baseline, np.float64))
    if value < curve[0]:
        return None
    if value > curve[-1]:
        return float(labels[-1]), False
    above = int(np.argmax(curve >= value))  # where it is reached first
    if above == 0:
        return float(labels[0]), True
    share = (value - curve[above - 1]) / (curve[above] - curve[above - 1])
    return float(np.exp(x[above - 1] + share * (x[above] - x[above - 1]))), True
