"""How well chosen images cover all images, and the greedy choice of those that cover most.

An image is covered by the chosen image most similar to it; the coverage is the mean over all images
(generalized coverage, Bae et al. 2024, arXiv 2407.12212, section 3). All N x N similarities never
are in memory: they are computed in blocks. Of more than ``MAX_IMAGES`` images, those to cover and
those to choose from are random samples, which keeps the time from growing with the square.
"""

from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from vissl_lite.selection.candidates import Candidates

# Function from squared distances to similarities in [0, 1], of which nearer ones are larger. It may
# overwrite its argument: most of the time is spent on reading and writing these blocks.
Kernel: TypeAlias = Callable[[Tensor], Tensor]

# Similarities that are in memory at a time: 64 MiB of float32.
BLOCK = 2**24

# Candidates whose gains are computed again at a time.
TOP = 64

# Sizes of the random samples of images to cover and to choose from. The code of MaxHerding's
# authors samples 35,000. With 20,000, choosing 50 of 100,000 synthetic images took 19 s on a core
# for a coverage of 0.366; with 10,000, 5 s for 0.363; with 5,000, 1 s for 0.359.
MAX_IMAGES = 20_000

# The sample to choose from has at least so many images for each one to be chosen.
POOL = 4


def unit_features(features: np.ndarray) -> Tensor:
    """``(N, D)`` features scaled to length 1, float32, on the accelerator if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return F.normalize(torch.from_numpy(np.asarray(features, np.float32)).to(device), dim=1)


def squared_distances(one: Tensor, other: Tensor) -> Tensor:
    """``(A, B)`` squared distances between unit vectors ``(A, D)`` and ``(B, D)``."""
    return (one @ other.T).mul_(-2).add_(2).clamp_(min=0)


def gaussian(radius: float) -> Kernel:
    """``exp(-d^2 / radius^2)``, the kernel of MaxHerding."""
    return lambda squared: squared.div_(-(radius**2)).exp_()


def top_hat(radius: float) -> Kernel:
    """1 at distances below the radius, else 0: the balls of ProbCover."""
    return lambda squared: (squared < radius**2).float()


def blocks(rows: int, columns: int, block: int = BLOCK) -> Iterator[slice]:
    """Slices of the rows of a matrix with at most ``block`` entries each, or one row."""
    step = max(1, block // max(1, columns))
    return (slice(start, min(rows, start + step)) for start in range(0, rows, step))


def sample(among: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Random images. With the same seed, samples of different masks share what they can.

    Args:
        among: ``(N,)`` bool: which images may be in the sample.
        most: Maximum size; of at most so many images all are in it.
        seed: Seed of the sample.

    Returns:
        Indices, ascending.
    """
    order = np.random.default_rng(seed).permutation(len(among))
    return np.sort(order[among[order]][:most])


def squared_to_nearest(targets: Tensor, centers: Tensor, block: int = BLOCK) -> Tensor:
    """Squared distance of each point to the nearest of some centers.

    Args:
        targets: ``(M, D)`` unit vectors.
        centers: ``(L, D)`` unit vectors.
        block: See ``blocks``.

    Returns:
        ``(M,)``, infinite without a center.
    """
    nearest = targets.new_full((len(targets),), torch.inf)
    for rows in blocks(len(centers), len(targets), block):
        nearest = torch.minimum(nearest, squared_distances(centers[rows], targets).amin(dim=0))
    return nearest


def cover(targets: Tensor, centers: Tensor, kernel: Kernel, block: int = BLOCK) -> Tensor:
    """Similarity of each point to the most similar of those that cover.

    Args:
        targets: ``(M, D)`` unit vectors that are covered.
        centers: ``(L, D)`` unit vectors that cover.
        kernel: Similarity.
        block: See ``blocks``.

    Returns:
        ``(M,)``, zeros if nothing covers.
    """
    return kernel(squared_to_nearest(targets, centers, block))


def greedy_cover(
    points: Tensor,
    kernel: Kernel,
    budget: int,
    candidates: Candidates,
    targets: Tensor,
    covered: Tensor,
    weights: Tensor,
    seed: int = 0,
    most: int = MAX_IMAGES,
    block: int = BLOCK,
) -> tuple[list[int], list[float]]:
    """Choose points one after the other, each of which raises the weighted coverage most.

    The gain of a point never grows as others are chosen (the coverage is submodular), so a gain
    from an earlier step is an upper bound: only the points with the largest bounds are computed
    again (Minoux 1978, "Accelerated greedy algorithms"). The choice is that of computing all.

    Of more than ``most`` candidates a random sample is considered.

    Args:
        points: ``(N, D)`` unit vectors.
        kernel: Similarity.
        budget: Number of points to choose.
        candidates: What may be chosen; it is used up.
        targets: ``(M, D)`` unit vectors to cover: the points, or a ``sample`` of them.
        covered: ``(M,)`` similarity of each target to what covers it already.
        weights: ``(M,)`` weight of each target.
        seed: Seed of the sample.
        most: Maximum number of candidates that are considered, but ``POOL`` for each to be chosen.
        block: See ``blocks``.

    Returns:
        Indices, and the gain of each: the sum over targets of weight times increase. Fewer than
        the budget if no further candidate gains anything.
    """
    pool = sample(candidates.open, max(most, POOL * budget), seed)

    def gains_of(indices: np.ndarray) -> np.ndarray:
        found = np.empty(len(indices))
        for rows in blocks(len(indices), len(targets), block):
            some = points[torch.from_numpy(indices[rows])]
            increase = kernel(squared_distances(some, targets)).sub_(covered).clamp_(min=0)
            found[rows] = (increase @ weights).cpu().numpy()
        return found

    places = np.arange(len(pool))
    bounds = gains_of(pool)
    exact = np.ones(len(pool), bool)
    chosen: list[int] = []
    gains: list[float] = []
    while len(chosen) < budget and candidates.remaining:
        bounds[~candidates.open[pool]] = -np.inf
        while True:
            known = np.where(exact, bounds, -np.inf)
            best = int(known.argmax())
            ahead = (bounds > known[best]) | ((bounds == known[best]) & (places < best))
            stale = np.flatnonzero(ahead & ~exact & candidates.open[pool])
            if len(stale) == 0:
                break
            top = stale[np.argsort(-bounds[stale], kind="stable")[:TOP]]
            bounds[top] = gains_of(pool[top])
            exact[top] = True
        index, gain = int(pool[best]), float(bounds[best])
        if gain <= 0:
            break
        chosen.append(index)
        gains.append(gain)
        candidates.take(index)
        similarity = kernel(squared_distances(points[index : index + 1], targets))[0]
        covered = torch.maximum(covered, similarity)
        exact[:] = False
    return chosen, gains


def coverage_curve(
    targets: Tensor, centers: Tensor, kernel: Kernel, covered: Tensor
) -> list[float]:
    """Coverage after each of some points.

    Args:
        targets: ``(M, D)`` unit vectors that are covered.
        centers: ``(B, D)`` unit vectors that cover, in order.
        kernel: Similarity.
        covered: ``(M,)`` similarity of each target to what covers it before.

    Returns:
        B + 1 values from 0 to 1; the first is before the first point.
    """
    values = [float(covered.mean())]
    for rows in blocks(len(centers), len(covered)):
        for similarity in kernel(squared_distances(centers[rows], targets)):
            covered = torch.maximum(covered, similarity)
            values.append(float(covered.mean()))
    return values


def nearest_of(points: Tensor, indices: np.ndarray, block: int = BLOCK) -> np.ndarray:
    """``(N,)`` position in ``indices`` of the point that is nearest to each of N points.

    Args:
        points: ``(N, D)`` unit vectors.
        indices: ``(L,)`` points to choose from, at least one.
        block: See ``blocks``.
    """
    centers = points[torch.as_tensor(indices, device=points.device)]
    found = [
        squared_distances(points[rows], centers).argmin(dim=1)
        for rows in blocks(len(points), len(centers), block)
    ]
    return torch.cat(found).cpu().numpy()


def knee(values: list[float]) -> int:
    """Where a rising curve bends: from there on it rises more slowly than on the average.

    The point farthest above the line from the first to the last one (Satopaa et al. 2011, "Finding
    a 'kneedle' in a haystack", for a single knee without smoothing).

    Args:
        values: Values of the curve at equal steps.

    Returns:
        Index of the first such point.
    """
    line = np.linspace(values[0], values[-1], len(values))
    return int(np.argmax(np.asarray(values) - line))
