"""k-center: the image farthest from all that are labelled or chosen.

Source: Sener & Savarese 2018 (arXiv 1708.00489, algorithm 1), the greedy 2-approximation of
Gonzalez 1985. It is drawn to outliers, which is a weakness with few labels.
"""

import numpy as np
import torch

from vissl_lite.selection.candidates import NOTHING_LABELLED, Candidates, Selection
from vissl_lite.selection.coverage import (
    BLOCK,
    squared_distances,
    squared_to_nearest,
    unit_features,
)


def k_center(
    features: np.ndarray,
    budget: int,
    labelled: np.ndarray = NOTHING_LABELLED,
    uncertainty: np.ndarray | None = None,
    seed: int = 0,
    candidates: Candidates | None = None,
    block: int = BLOCK,
) -> Selection:
    """Choose the farthest image again and again; see ``Method``.

    Args:
        features: ``(N, D)``.
        budget: Number of images to choose.
        labelled: ``(L,)`` indices.
        uncertainty: Not used.
        seed: Chooses the first image if none is labelled.
        candidates: What may be chosen.
        block: See ``coverage.blocks``.
    """
    candidates = candidates or Candidates(len(features), labelled)
    points = unit_features(features)
    nearest = squared_to_nearest(points, points[labelled], block)
    chosen: list[int] = []
    reasons: list[str] = []
    while len(chosen) < budget and candidates.remaining:
        if not chosen and len(labelled) == 0:
            index = int(np.random.default_rng(seed).choice(np.flatnonzero(candidates.open)))
            reasons.append("the first one, at random")
        else:
            far = nearest.cpu().numpy()
            index = int(np.where(candidates.open, far, -1).argmax())
            reasons.append(f"distance {far[index] ** 0.5:.3f} from all before")
        candidates.take(index)
        chosen.append(index)
        distances = squared_distances(points[index : index + 1], points)[0]
        nearest = torch.minimum(nearest, distances)
    return Selection(np.array(chosen, np.int64), reasons)
