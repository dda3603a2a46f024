"""MaxHerding, and Uncertainty Herding with a model: one objective for the first and later rounds.

MaxHerding (Bae et al. 2024, arXiv 2407.12212, algorithm 1) chooses the images that cover all others
best. Uncertainty Herding (Bae et al. 2025, arXiv 2412.20644, algorithm 1) weights the coverage of
each image by how uncertain the model is of it, and narrows the kernel as labels become dense: to
the smallest distance between two labelled images. With few labels that is representative sampling,
with many it becomes uncertainty sampling. Once all uncertain images are covered, as they soon are
if a detector is certain of most, MaxHerding chooses the rest, and chance once all are covered. Of
more than ``coverage.MAX_IMAGES`` images, random samples are considered, as in the code of the
authors, BorealisAI/uherding.
"""

import numpy as np
import torch
from torch import Tensor

from vissl_lite.selection.candidates import NOTHING_LABELLED, Candidates, Selection
from vissl_lite.selection.coverage import (
    BLOCK,
    MAX_IMAGES,
    blocks,
    cover,
    gaussian,
    greedy_cover,
    sample,
    squared_distances,
    unit_features,
)
from vissl_lite.selection.uniform import uniform

# Radius of the kernel on features of length 1, as in the code of the authors.
RADIUS = 1.0

# Images nearer than this show the same in float32; they do not narrow the kernel.
SAME = 1e-3


def herding(
    features: np.ndarray,
    budget: int,
    labelled: np.ndarray = NOTHING_LABELLED,
    uncertainty: np.ndarray | None = None,
    seed: int = 0,
    candidates: Candidates | None = None,
    most: int = MAX_IMAGES,
    block: int = BLOCK,
) -> Selection:
    """Choose the images that cover all others best; see the module and ``Method``.

    Args:
        features: ``(N, D)``.
        budget: Number of images to choose.
        labelled: ``(L,)`` indices.
        uncertainty: ``(N,)`` weight of each image; without it the method is MaxHerding.
        seed: Seed of the samples, and of the choice once all images are covered entirely.
        candidates: What may be chosen.
        most: Size of the samples of images to cover and to choose from, see ``greedy_cover``.
        block: See ``coverage.blocks``.
    """
    candidates = candidates or Candidates(len(features), labelled)
    points = unit_features(features)
    if uncertainty is None:
        radius, weights = RADIUS, points.new_ones(len(points))
    else:
        # two labelled images of one picture, such as frames of a video, would narrow it to nothing
        radius = adapted_radius(points, candidates.distinct, block)
        weights = torch.from_numpy(np.array(uncertainty, np.float32)).to(points.device)  # a copy
        weights[labelled] = 0
    kernel = gaussian(radius)
    among = sample(weights.cpu().numpy() > 0, most, seed)
    targets, weights = points[among], weights[among]
    covered = cover(targets, points[labelled], kernel, block)
    chosen, gains = greedy_cover(
        points, kernel, budget, candidates, targets, covered, weights, seed, most, block
    )
    total = max(float(weights.sum()), 1e-12)
    what = "" if uncertainty is None else " of uncertain images"
    reasons = [f"raises the coverage{what} by {gain / total:.4f}" for gain in gains]
    found, missing = Selection(np.array(chosen, np.int64), reasons), budget - len(chosen)
    if missing == 0:
        return found
    taken = np.concatenate([labelled, found.indices])
    if uncertainty is None:
        return found.then(uniform(features, missing, taken, seed=seed, candidates=candidates))
    return found.then(
        herding(features, missing, taken, seed=seed, candidates=candidates, most=most, block=block)
    )


def adapted_radius(points: Tensor, labelled: np.ndarray, block: int = BLOCK) -> float:
    """Radius of the kernel in Uncertainty Herding: the smallest distance of two labelled images.

    Args:
        points: ``(N, D)`` unit vectors.
        labelled: ``(L,)`` indices.
        block: See ``coverage.blocks``.

    Returns:
        The radius; that of MaxHerding if no two labelled images differ.
    """
    centers = points[labelled]
    smallest = float("inf")
    for rows in blocks(len(centers), len(centers), block):
        squared = squared_distances(centers[rows], centers)
        apart = squared[squared > SAME**2]
        if len(apart):
            smallest = min(smallest, float(apart.min()))
    return smallest**0.5 if smallest < float("inf") else RADIUS
