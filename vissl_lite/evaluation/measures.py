"""Metrics of features without labels.

``docs/watching.md`` says which of them tells what, and for which pretext it can be trusted.
"""

import numpy as np


def unit_vectors(features: np.ndarray) -> np.ndarray:
    """Scale features to length 1, ``(N, D)``; zero vectors stay zero."""
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.maximum(norms, 1e-12)


def feature_std(features: np.ndarray) -> float:
    """Standard deviation of features on the unit sphere (SimSiam, Chen & He 2021, section 4.1).

    Args:
        features: ``(N, D)``.

    Returns:
        The standard deviation of the normalized features, averaged over dimensions and scaled by
        the square root of D: 0 if all are equal, 1 if they are spread evenly.
    """
    return float(unit_vectors(features).std(axis=0).mean() * np.sqrt(features.shape[1]))


def effective_rank(features: np.ndarray) -> float:
    """Effective rank of features (RankMe, Garrido et al. 2023, eq. 1).

    Args:
        features: ``(N, D)``.

    Returns:
        The exponential of the entropy of the normalized singular values, between 1 and min(N, D).
        Not a number if a feature is none.
    """
    if not np.isfinite(features).all():
        return float("nan")
    values = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    shares = values / max(values.sum(), 1e-300) + 1e-7
    return float(np.exp(-(shares * np.log(shares)).sum()))


def alignment(one: np.ndarray, other: np.ndarray) -> float:
    """Mean squared distance of two views of an image (Wang & Isola 2020, section 4.1, alpha = 2).

    Args:
        one: ``(N, D)`` features of first views.
        other: ``(N, D)`` features of second views of the same images.

    Returns:
        The mean squared distance of normalized features: 0 if views agree, 2 if they have nothing
        to do with each other, at most 4.
    """
    return float(np.square(unit_vectors(one) - unit_vectors(other)).sum(axis=1).mean())


def uniformity(features: np.ndarray) -> float:
    """Uniformity of features on the unit sphere (Wang & Isola 2020, section 4.1, t = 2).

    Args:
        features: ``(N, D)``.

    Returns:
        The logarithm of the mean Gaussian potential over all pairs of different images: 0 if all
        features are equal, about -4 in many dimensions if they are spread evenly. Not a number
        for fewer than two images.
    """
    if len(features) < 2:
        return float("nan")
    unit = unit_vectors(features.astype(np.float64))
    squared = np.maximum(2 - 2 * unit @ unit.T, 0)
    pairs = np.exp(-2 * squared[np.triu_indices(len(unit), k=1)])
    return float(np.log(pairs.mean()))
