"""How much of all images is covered at each budget, and where more labels stop to pay."""

from dataclasses import dataclass

import numpy as np

from vissl_lite.selection.candidates import Candidates, in_order
from vissl_lite.selection.coverage import (
    MAX_IMAGES,
    cover,
    coverage_curve,
    gaussian,
    greedy_cover,
    knee,
    sample,
    unit_features,
)
from vissl_lite.selection.herding import RADIUS

# Random orders whose mean the curve of a random choice is.
RANDOM_ORDERS = 3


@dataclass(frozen=True)
class CoverageEstimate:
    """Coverage after each image, with the kernel of MaxHerding, from 0 to 1.

    Attributes:
        values: 2 B + 1 values or fewer: before the first image, after each of the B chosen ones,
            and after each further one, as ``herding`` would choose it from what is left.
        random: As many values for images in random order. Where near-duplicates and groups leave
            fewer of them than chosen ones, the last value is repeated.
        knee: Number of images from which on a further one adds less than the average one; 0 if
            the curve does not bend that way.
    """

    values: list[float]
    random: list[float]
    knee: int


def estimate_coverage(
    features: np.ndarray,
    labelled: np.ndarray,
    chosen: np.ndarray,
    counted: np.ndarray,
    seed: int = 0,
    candidates: Candidates | None = None,
    before: Candidates | None = None,
    most: int = MAX_IMAGES,
) -> CoverageEstimate:
    """Compute the coverage at each budget up to twice that of a selection.

    Of more than ``most`` images it is estimated: by the mean over a random sample.

    Args:
        features: ``(N, D)`` of all images, labelled ones included.
        labelled: ``(L,)`` indices of the images that have a label already.
        chosen: ``(B,)`` indices of the selection, in order.
        counted: ``(N,)`` bool: which images the coverage is the mean of.
        seed: Seed of the random orders and of the samples.
        candidates: What may be chosen after the selection; it is used up. Default: all but the
            labelled and chosen images.
        before: What might be chosen before the selection, for the random orders; it is left as it
            is. Default: all but the labelled images.
        most: Size of the samples, see ``greedy_cover``.
    """
    points, kernel = unit_features(features), gaussian(RADIUS)
    taken = np.concatenate([labelled, chosen])
    targets = points[sample(np.ones(len(points), bool), most, seed)]
    further, _ = greedy_cover(
        points,
        kernel,
        len(chosen),
        candidates or Candidates(len(points), taken),
        targets,
        cover(targets, points[taken], kernel),
        targets.new_ones(len(targets)),
        seed,
        most,
    )
    order = np.concatenate([chosen, np.array(further, np.int64)])
    shown = points[sample(counted, most, seed)]
    covered = cover(shown, points[labelled], kernel)
    values = coverage_curve(shown, points[order], kernel, covered)
    before = before or Candidates(len(points), labelled)
    curves = []
    for number in range(RANDOM_ORDERS):
        one = _at_random(before, len(order), seed + number)
        curve = coverage_curve(shown, points[one], kernel, covered)
        curves.append(curve + curve[-1:] * (len(values) - len(curve)))
    # The first label of all covers much; the bend is looked for after it.
    skipped = 1 if len(labelled) == 0 and len(values) > 2 else 0
    bend = knee(values[skipped:])
    at_random_mean = np.mean(curves, axis=0).tolist()
    return CoverageEstimate(values, at_random_mean, skipped + bend if bend else 0)


def _at_random(candidates: Candidates, budget: int, seed: int) -> np.ndarray:
    """The choice of ``uniform``, which leaves the candidates as they are.

    Args:
        candidates: What may be chosen.
        budget: Maximum number to choose.
        seed: Seed of the choice.

    Returns:
        Indices of the chosen images.
    """
    order = np.random.default_rng(seed).permutation(len(candidates.open))
    order = order[candidates.open[order]]
    first = 2 * budget
    while True:
        some = order[:first]
        chosen = in_order(range(len(some)), budget, candidates.among(some))
        if len(chosen) == budget or len(some) == len(order):
            return some[chosen]
        first *= 4
