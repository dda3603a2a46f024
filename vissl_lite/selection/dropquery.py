"""DropQuery: typical images among those whose predicted class dropout changes.

Source: Gupte et al. 2024 (arXiv 2401.14555), for a linear classifier on frozen features. Its first
round, without labels, chooses from all images. Values are those of the paper. The code of the
authors, sanketx/AL-foundation-models, takes images that one mask changes where candidates are few;
here those are taken that most masks change, as in the paper.
"""

from collections.abc import Callable

import numpy as np

from vissl_lite.selection.candidates import NOTHING_LABELLED, Candidates, Selection, in_order
from vissl_lite.selection.clusters import cluster
from vissl_lite.selection.coverage import unit_features

# Dropout masks of each image, and the probability that a feature is dropped.
MASKS, DROPOUT = 3, 0.75


def dropquery(
    features: np.ndarray,
    budget: int,
    labelled: np.ndarray = NOTHING_LABELLED,
    uncertainty: np.ndarray | None = None,
    seed: int = 0,
    candidates: Candidates | None = None,
) -> Selection:
    """Choose the image nearest to each center of as many clusters as the budget; see ``Method``.

    Clustered are the images of which more than half of the masks change the prediction. If these
    are too few, the others are chosen at random.

    Args:
        features: ``(N, D)``.
        budget: Number of images to choose.
        labelled: ``(L,)`` indices.
        uncertainty: ``(N,)`` from ``changed_by_dropout``; without it all images are clustered.
        seed: Seed of k-means and of the random choice.
        candidates: What may be chosen.
    """
    candidates = candidates or Candidates(len(features), labelled)
    points = unit_features(features).cpu().numpy()
    uncertain = np.ones(len(points), bool) if uncertainty is None else uncertainty > 0.5
    what = "" if uncertainty is None else " uncertain"
    chosen: list[int] = []
    reasons: list[str] = []
    while len(chosen) < budget:
        # again where chosen images have ruled out whole clusters, as near-duplicates do
        left = np.flatnonzero(candidates.open & uncertain)
        if len(left) == 0:
            break
        for inside in _clusters(points, left, budget - len(chosen), seed):
            found = in_order(inside, 1, candidates)
            chosen += found
            reasons += [f"center of a cluster of {len(inside)}{what} images"] * len(found)
    order = np.random.default_rng(seed).permutation(len(points))
    rest = in_order(order, budget - len(chosen), candidates)
    return Selection(
        np.array(chosen + rest, np.int64),
        reasons + ["random, as no more images are uncertain"] * len(rest),
    )


def _clusters(points: np.ndarray, left: np.ndarray, count: int, seed: int) -> list[np.ndarray]:
    """Indices of the images in each cluster, nearest to the center first; large clusters first.

    Args:
        points: ``(N, D)`` unit vectors.
        left: Indices of those to cluster.
        count: Maximum number of clusters.
        seed: Seed of k-means.
    """
    of = cluster(points[left], count, seed)
    found = []
    for name in np.unique(of):
        inside = left[of == name]
        distances = np.linalg.norm(points[inside] - points[inside].mean(axis=0), axis=1)
        found.append(inside[np.argsort(distances, kind="stable")])
    return sorted(found, key=len, reverse=True)


def changed_by_dropout(
    logits: Callable[[np.ndarray], np.ndarray], features: np.ndarray, seed: int = 0
) -> np.ndarray:
    """Share of dropout masks that change the class that a classifier predicts.

    Args:
        logits: The classifier, from ``(N, D)`` features to ``(N, K)`` logits.
        features: ``(N, D)``, of which each mask drops 75 % (0) and scales the others by 4.
        seed: Seed of the masks.

    Returns:
        ``(N,)`` float32.
    """
    random = np.random.default_rng(seed)
    predicted = logits(features).argmax(axis=1)
    changes = np.zeros(len(features), np.float32)
    for _ in range(MASKS):
        kept = random.random(features.shape, np.float32) >= DROPOUT
        changes += logits(features * kept / np.float32(1 - DROPOUT)).argmax(axis=1) != predicted
    return changes / MASKS
