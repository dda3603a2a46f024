"""Statistics of a comparison: paired differences, confidence intervals, equivalent labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import norm, t
from sklearn.isotonic import IsotonicRegression

Verdict = Literal["helped", "no difference", "hurt"]


@dataclass(frozen=True)
class Runs:
    """Runs of one encoder with one amount of labels, over S seeds.

    Attributes:
        values: ``(S,)`` test metric of each seed; larger is better.
        per_image: ``(S, M)`` part of each of the M test images in ``values``: for accuracy whether
            it was classified correctly, for other metrics jackknife pseudo-values; None if there is
            neither.
    """

    values: np.ndarray
    per_image: np.ndarray | None = None

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return float(self.values.mean())

    @property
    def std(self) -> float:
        """Sample standard deviation over seeds; 0 for one seed."""
        return float(self.values.std(ddof=1)) if len(self.values) > 1 else 0.0


@dataclass(frozen=True)
class Difference:
    """Mean paired difference and its 95 % confidence interval.

    Attributes:
        mean: The difference.
        low, high: Ends of the interval; None if nothing was varied, so that there is none.
    """

    mean: float
    low: float | None
    high: float | None

    @property
    def verdict(self) -> Verdict:
        """``helped`` or ``hurt`` if there is an interval without zero, else ``no difference``."""
        if self.low is None or self.high is None:
            return "no difference"
        return "helped" if self.low > 0 else "hurt" if self.high < 0 else "no difference"

    @property
    def interval(self) -> str:
        """The interval in words."""
        if self.low is None or self.high is None:
            return "no interval"
        return f"{self.low:+.3f} to {self.high:+.3f}"


def difference(
    encoder: Sequence[Runs],
    baseline: Sequence[Runs],
    confidence: float = 0.95,
    groups: np.ndarray | None = None,
) -> Difference:
    """Difference between an encoder and the baseline, averaged over amounts of labels.

    Runs with the same seed use the same labels for both encoders, so differences are taken per seed
    and per image. The interval covers two sources of variation. Seeds differ in their labels (and
    in the weights of an untrained encoder): Student's t interval over seeds. The test images are a
    sample that all seeds share: normal interval over the per-image differences, averaged over
    seeds. Where images come in groups, such as those of a patient, the groups are the sample:
    Student's t interval over them, from the linearized variance of a mean over clusters of
    different sizes (ratio-to-size estimate, Cochran 1977, "Sampling Techniques", chapter 9A);
    likewise over the blocks of a jackknife. The half-widths are added in quadrature, which makes
    the interval slightly too wide, as the differences between seeds depend on the test images too.
    Without ``per_image``, only the variation over seeds is covered.

    Args:
        encoder: Runs of the encoder, for each amount of labels.
        baseline: Runs of the baseline, with the same amounts, seeds and test images.
        confidence: Confidence level of the interval.
        groups: ``(M,)`` group or block of each test image; None for images that are all apart. If
            all are in one group, only the variation over seeds is covered.

    Returns:
        The difference. It has no interval if neither source varies: one seed, or seeds that all
        gave the same difference, without ``per_image`` or with a single image or group.
    """
    by_seed = np.mean([a.values - b.values for a, b in zip(encoder, baseline, strict=True)], axis=0)
    tail = (1 + confidence) / 2
    half, covered = 0.0, bool(np.ptp(by_seed) > 1e-9)  # more than rounding
    if len(by_seed) > 1:
        half = t.ppf(tail, len(by_seed) - 1) * by_seed.std(ddof=1) / np.sqrt(len(by_seed))
    pairs = [
        (a.per_image.astype(np.float64) - b.per_image).mean(axis=0)
        for a, b in zip(encoder, baseline, strict=True)
        if a.per_image is not None and b.per_image is not None
    ]
    if len(pairs) == len(encoder):
        over_images = np.mean(pairs, axis=0)
        covered |= (len(over_images) if groups is None else len(np.unique(groups))) > 1
        half = float(np.hypot(half, _sampling(over_images, tail, groups)))
    mean = float(by_seed.mean())
    return Difference(mean, mean - half, mean + half) if covered else Difference(mean, None, None)


def _sampling(values: np.ndarray, tail: float, groups: np.ndarray | None) -> float:
    """Half-width of the interval of a mean over images or groups of images; 0 for a single one."""
    sums = values - values.mean()
    if groups is not None:
        sums = np.bincount(np.unique(groups, return_inverse=True)[1], weights=sums)
    count = len(sums)
    if count < 2:
        return 0.0
    error = np.sqrt(count / (count - 1) * np.square(sums).sum()) / len(values)
    return float(error * (norm.ppf(tail) if groups is None else t.ppf(tail, count - 1)))


def equivalent_labels(
    labels: Sequence[float], baseline: Sequence[float], value: float
) -> tuple[float, bool] | None:
    """Number of labels that the baseline needs to match an encoder.

    The curve of the baseline is made monotone by isotonic regression and interpolated linearly over
    the logarithm of the number of labels. It is never extrapolated.

    Args:
        labels: ``(A,)`` numbers of labels, ascending.
        baseline: ``(A,)`` metric of the baseline with each number of labels.
        value: Metric of the encoder.

    Returns:
        The number of labels, and whether it is exact. If not exact, the baseline needs more than
        this number, which is the largest one measured. None if the baseline is better already with
        the fewest labels, or if there is only one amount.
    """
    if len(labels) < 2:
        return None
    x = np.log(np.asarray(labels, np.float64))
    curve = IsotonicRegression().fit_transform(x, np.asarray(baseline, np.float64))
    if value < curve[0]:
        return None
    if value > curve[-1]:
        return float(labels[-1]), False
    above = int(np.argmax(curve >= value))  # first point that reaches the value
    if above == 0:
        return float(labels[0]), True
    fraction = (value - curve[above - 1]) / (curve[above] - curve[above - 1])
    return float(np.exp(x[above - 1] + fraction * (x[above] - x[above - 1]))), True
