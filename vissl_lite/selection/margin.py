"""Margin sampling: the images that a model is most uncertain of."""

import numpy as np

from vissl_lite.errors import UserError
from vissl_lite.selection.candidates import NOTHING_LABELLED, Candidates, Selection, in_order


def margin(
    features: np.ndarray,
    budget: int,
    labelled: np.ndarray = NOTHING_LABELLED,
    uncertainty: np.ndarray | None = None,
    seed: int = 0,
    candidates: Candidates | None = None,
) -> Selection:
    """Choose the most uncertain images; see ``Method``.

    Uncertainty is 1 minus the difference of the two largest probabilities (Scheffer et al. 2001,
    "Active hidden Markov models for information extraction"). Nothing keeps images of one choice
    apart, and with few labels random images are often better (arXiv 2202.02794, figure 1).

    Args:
        features: ``(N, D)``, of which only the number matters.
        budget: Number of images to choose.
        labelled: ``(L,)`` indices.
        uncertainty: ``(N,)``.
        seed: Seed of the order of equally uncertain images.
        candidates: What may be chosen.

    Raises:
        UserError: There is no uncertainty.
    """
    if uncertainty is None:
        raise UserError("--method margin needs a model: give --model with a run of finetune")
    # The order of the paths would choose one folder or patient, where a detector finds no boxes.
    shuffled = np.random.default_rng(seed).permutation(len(features))
    order = shuffled[np.argsort(-np.asarray(uncertainty)[shuffled], kind="stable")]
    chosen = in_order(order, budget, candidates or Candidates(len(features), labelled))
    return Selection(
        np.array(chosen, np.int64), [f"uncertainty {uncertainty[index]:.3f}" for index in chosen]
    )
