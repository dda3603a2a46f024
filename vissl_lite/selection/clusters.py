"""Clusters of features, by k-means."""

import warnings

import numpy as np

# Maximum number of clusters for methods that make one for each label, as in TypiClust.
MAX_CLUSTERS = 500

# With more clusters than this, k-means uses mini-batches of so many images, as TypiClust does; here
# also with more images than this.
MAX_EXACT, BATCH, MAX_EXACT_IMAGES = 50, 5000, 50_000


def cluster(points: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """Cluster of each point.

    Args:
        points: ``(N, D)``.
        clusters: Number of clusters; at most N are made.
        seed: Seed of the first centers.

    Returns:
        ``(N,)`` int, from 0; some clusters may be empty.
    """
    # here: importing scikit-learn's clustering takes a second
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning

    clusters = min(clusters, len(points))
    if clusters <= MAX_EXACT and len(points) <= MAX_EXACT_IMAGES:
        model = KMeans(clusters, random_state=seed)
    else:
        model = MiniBatchKMeans(clusters, batch_size=BATCH, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different points than clusters
        return np.asarray(model.fit_predict(points))
