"""The jackknife: how a metric that is not a mean over images depends on the choice of images."""

from collections.abc import Callable

import numpy as np

# Images are left out in so many blocks at most: enough for an interval, few enough to be fast.
MAX_BLOCKS = 50


def jackknife_blocks(images: int, groups: np.ndarray | None = None) -> np.ndarray:
    """Blocks of images that are left out together.

    Args:
        images: Number of images N.
        groups: ``(N,)`` group of each image, such as its patient, which no block divides; None for
            images that are all apart.

    Returns:
        ``(N,)`` int64 block of each image, from 0. Each image or group is its own block if there
        are at most ``MAX_BLOCKS``; otherwise they are drawn at random, always in the same way.
    """
    names = np.arange(images) if groups is None else np.unique(groups, return_inverse=True)[1]
    count = len(np.unique(names))
    if count <= MAX_BLOCKS:
        return names
    return np.random.default_rng(0).permutation(count)[names] % MAX_BLOCKS


def pseudo_values(metric: Callable[[np.ndarray], float], blocks: np.ndarray) -> np.ndarray | None:
    """Jackknife pseudo-values, whose variation is that of the metric from sample to sample.

    Delete-a-group jackknife for blocks of different sizes: Busing, Meijer & van der Leeden 1999,
    "Delete-m jackknife for unequal m". The interval of a mean over blocks of these values is that
    of the metric.

    Args:
        metric: Function from the ascending indices of some images to the metric on them.
        blocks: ``(N,)`` block of each image.

    Returns:
        ``(N,)`` float64, equal within a block; None if there is one block only, or if the metric is
        not defined without one of them.
    """
    names, numbers, sizes = np.unique(blocks, return_inverse=True, return_counts=True)
    if len(names) < 2:
        return None
    whole = metric(np.arange(len(blocks)))
    without = np.array([metric(np.flatnonzero(numbers != one)) for one in range(len(names))])
    share = len(blocks) / sizes
    values: np.ndarray = share * whole - (share - 1) * without
    return values[numbers] if np.isfinite(values).all() else None
