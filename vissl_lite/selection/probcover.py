"""ProbCover: balls around the chosen images that hold as many images as possible.

Source: Yehuda et al. 2022 (arXiv 2205.11320, section 3), for low budgets. It is the greedy cover of
MaxHerding with balls instead of a smooth kernel, and depends more on the radius.
"""

import numpy as np
import torch
from torch import Tensor

from vissl_lite.selection.candidates import NOTHING_LABELLED, Candidates, Selection
from vissl_lite.selection.clusters import MAX_CLUSTERS, cluster
from vissl_lite.selection.coverage import (
    BLOCK,
    blocks,
    cover,
    greedy_cover,
    squared_distances,
    top_hat,
    unit_features,
)

# Share of the balls that are to hold images of one cluster only (section 4.1).
PURITY = 0.95


def probcover(
    features: np.ndarray,
    budget: int,
    labelled: np.ndarray = NOTHING_LABELLED,
    uncertainty: np.ndarray | None = None,
    seed: int = 0,
    candidates: Candidates | None = None,
    block: int = BLOCK,
) -> Selection:
    """Choose images whose balls cover most images; see the module and ``Method``.

    The paper clusters into as many clusters as there are classes. Their number is not known before
    the first label, so it is that of TypiClust: of the labelled images and those to be chosen.

    Args:
        features: ``(N, D)``.
        budget: Number of images to choose.
        labelled: ``(L,)`` indices.
        uncertainty: Not used.
        seed: Seed of k-means, and of the choice once all images are covered.
        candidates: What may be chosen.
        block: See ``coverage.blocks``.
    """
    candidates = candidates or Candidates(len(features), labelled)
    points = unit_features(features)
    clusters = max(2, min(len(labelled) + budget, MAX_CLUSTERS))
    radius = pure_radius(points, cluster(points.cpu().numpy(), clusters, seed), block)
    kernel = top_hat(radius)
    covered = cover(points, labelled, kernel, block)
    ones = points.new_ones(len(points))
    chosen, gains = greedy_cover(points, kernel, budget, candidates, covered, ones, seed, block)
    reasons = [
        f"{gain:.0f} images within {radius:.3f} that no image before covers" for gain in gains
    ]
    return Selection(np.array(chosen, np.int64), reasons)


def pure_radius(points: Tensor, clusters: np.ndarray, block: int = BLOCK) -> float:
    """The largest radius at which at least ``PURITY`` of the balls hold one cluster only.

    A ball is pure while its radius is at most the distance from its center to the nearest point of
    another cluster, so the radius is a quantile of these distances.

    Args:
        points: ``(N, D)`` unit vectors.
        clusters: ``(N,)`` cluster of each.
        block: See ``coverage.blocks``.
    """
    of = torch.from_numpy(clusters).to(points.device)
    nearest = []
    for rows in blocks(len(points), len(points), block):
        squared = squared_distances(points[rows], points)
        squared[of[rows, None] == of] = torch.inf
        nearest.append(squared.amin(dim=1))
    distances = torch.cat(nearest).sqrt().sort().values
    radius = float(distances[int((1 - PURITY) * len(distances) + 1e-9)])
    return min(radius, 2.0)  # the diameter of the sphere, if there is one cluster only
