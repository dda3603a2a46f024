"""Random choice, which every other method has to beat."""

import numpy as np

from vissl_lite.selection.candidates import NOTHING_LABELLED, Candidates, Selection, in_order


def uniform(
    features: np.ndarray,
    budget: int,
    labelled: np.ndarray = NOTHING_LABELLED,
    uncertainty: np.ndarray | None = None,
    seed: int = 0,
    candidates: Candidates | None = None,
) -> Selection:
    """Choose images at random; see ``Method``.

    Args:
        features: ``(N, D)``, of which only the number matters.
        budget: Number of images to choose.
        labelled: ``(L,)`` indices.
        uncertainty: Not used.
        seed: Seed of the choice. A smaller budget chooses the first images of a larger one.
        candidates: What may be chosen.
    """
    order = np.random.default_rng(seed).permutation(len(features))
    chosen = in_order(order, budget, candidates or Candidates(len(features), labelled))
    return Selection(np.array(chosen, np.int64), ["random"] * len(chosen))
