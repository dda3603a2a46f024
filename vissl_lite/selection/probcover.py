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
    MAX_IMAGES,
    blocks,
    cover,
    greedy_cover,
    sample,
    squared_distances,
    top_hat,
    unit_features,
)
from vissl_lite.selection.uniform import uniform

# Share of the balls that are to hold images of one cluster only (section 4.1).
PURITY = 0.95


def probcover(
    features: np.ndarray,
    budget: int,
    labelled: np.ndarray = NOTHING_LABELLED,
    uncertainty: np.ndarray | None = None,
    seed: int = 0,
    candidates: Candidates | None = None,
    most: int = MAX_IMAGES,
    block: int = BLOCK,
) -> Selection:
    """Choose images whose balls cover most images; see the module and ``Method``.

    The paper clusters into as many clusters as there are classes. Their number is not known before
    the first label, so it is that of TypiClust: of the labelled images and those to be chosen.
    Of very many images, a random sample is clustered and covered.

    Args:
        features: ``(N, D)``.
        budget: Number of images to choose.
        labelled: ``(L,)`` indices.
        uncertainty: Not used.
        seed: Seed of k-means, of the samples, and of the choice once all images are covered.
        candidates: What may be chosen.
        most: Size of the samples of images to cover and to choose from, see ``greedy_cover``.
        block: See ``coverage.blocks``.
    """
    candidates = candidates or Candidates(len(features), labelled)
    points = unit_features(features)
    clusters = max(2, min(len(labelled) + budget, MAX_CLUSTERS))
    targets = points[sample(np.ones(len(points), bool), most, seed)]
    radius = pure_radius(targets, cluster(targets.cpu().numpy(), clusters, seed), block)
    kernel = top_hat(radius)
    covered = cover(targets, points[labelled], kernel, block)
    ones = targets.new_ones(len(targets))
    chosen, gains = greedy_cover(
        points, kernel, budget, candidates, targets, covered, ones, seed, most, block
    )
    what = "images" if len(targets) == len(points) else f"of {len(targets)} sampled images"
    reasons = [
        f"{gain:.0f} {what} within {radius:.3f} that no image before covers" for gain in gains
    ]
    found, missing = Selection(np.array(chosen, np.int64), reasons), budget - len(chosen)
    taken = np.concatenate([labelled, found.indices])
    return found.then(uniform(features, missing, taken, seed=seed, candidates=candidates))


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
