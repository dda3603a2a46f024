"""TypiClust: the most typical image of each of the largest clusters without a label.

Source: Hacohen et al. 2022 (arXiv 2202.02794, section 3.2), for low budgets. Values as in the code
of the authors, avihu111/TypiClust; typicality is the inverse of the mean distance, as in the paper.
"""

import numpy as np
import torch
from torch import Tensor

from vissl_lite.selection.candidates import NOTHING_LABELLED, Candidates, Selection
from vissl_lite.selection.clusters import MAX_CLUSTERS, cluster
from vissl_lite.selection.coverage import BLOCK, blocks, squared_distances, unit_features

# Maximum number of neighbors whose mean distance is taken.
NEIGHBORS = 20

# Clusters of at most so many images are outliers: they come last.
SMALL = 5

# Of a cluster of more images than this, a random sample is looked at: typicality takes the
# distances of all pairs.
LARGE = 5000


def typiclust(
    features: np.ndarray,
    budget: int,
    labelled: np.ndarray = NOTHING_LABELLED,
    uncertainty: np.ndarray | None = None,
    seed: int = 0,
    candidates: Candidates | None = None,
    large: int = LARGE,
    block: int = BLOCK,
) -> Selection:
    """Choose typical images of large clusters; see the module and ``Method``.

    There are as many clusters as images are labelled or to be chosen, at most ``MAX_CLUSTERS``.

    Args:
        features: ``(N, D)``.
        budget: Number of images to choose.
        labelled: ``(L,)`` indices.
        uncertainty: Not used.
        seed: Seed of k-means, and of the samples of large clusters.
        candidates: What may be chosen.
        large: Maximum number of images of a cluster that are looked at.
        block: See ``coverage.blocks``.
    """
    candidates = candidates or Candidates(len(features), labelled)
    points = unit_features(features)
    clusters = min(len(labelled) + budget, MAX_CLUSTERS)
    of = cluster(points.cpu().numpy(), clusters, seed)
    sizes = np.bincount(of)
    has = np.bincount(of[labelled], minlength=len(sizes))
    used = np.zeros(len(of), bool)
    used[labelled] = True
    shuffled = np.random.default_rng(seed).permutation(len(of))
    chosen: list[int] = []
    reasons: list[str] = []
    while len(chosen) < budget and candidates.remaining:
        # numbers of what is small, of labels, and of images: the cluster with the first triple
        left = np.unique(of[candidates.open])
        name = min(left, key=lambda one: (sizes[one] <= SMALL, has[one], -sizes[one]))
        inside = shuffled[(of == name)[shuffled] & ~used[shuffled]]
        # those that may be chosen first: one of them is chosen
        ahead = np.argsort(~candidates.open[inside], kind="stable")
        inside = np.sort(inside[ahead[:large]])
        typical = typicality(points[inside], block)
        typical[~candidates.open[inside]] = -1
        index = int(inside[typical.argmax()])
        reasons.append(
            f"typicality {typical.max():.2f} in cluster {name + 1} of {len(sizes)} "
            f"({sizes[name]} images, {has[name]} labelled or chosen before)"
        )
        has[name] += 1
        used[index] = True
        candidates.take(index)
        chosen.append(index)
    return Selection(np.array(chosen, np.int64), reasons)


def typicality(points: Tensor, block: int = BLOCK) -> np.ndarray:
    """Inverse of the mean distance to the nearest neighbors, ``(N,)``.

    Args:
        points: ``(N, D)`` unit vectors of one cluster. At most half of them count as neighbors.
        block: See ``coverage.blocks``.
    """
    neighbors = min(NEIGHBORS, len(points) // 2)
    if neighbors == 0:
        return np.zeros(len(points))
    means = []
    for rows in blocks(len(points), len(points), block):
        squared = squared_distances(points[rows], points)
        squared[torch.arange(len(squared)), torch.arange(rows.start, rows.stop)] = torch.inf
        means.append(squared.topk(neighbors, largest=False).values.sqrt().mean(dim=1))
    return 1 / (torch.cat(means).double().cpu().numpy() + 1e-5)
