"""Simulated labelling: what a method of selection would have had labelled, of a labelled set.

A budget is a round. What was labelled before stays labelled, and the next images are chosen knowing
it; methods that need the uncertainty of a model get that of a linear probe fitted to those labels.
"""

import logging
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Generic, Literal, get_args

import numpy as np
import torch

from vissl_lite.comparison.amounts import LabelCount
from vissl_lite.data.text_file import csv_writer
from vissl_lite.errors import UserError
from vissl_lite.selection import METHODS
from vissl_lite.selection.dropquery import changed_by_dropout
from vissl_lite.transfer.base import DatasetT
from vissl_lite.transfer.classification.linear_head import fit_linear
from vissl_lite.transfer.classification.model import margin_uncertainty
from vissl_lite.transfer.sources.parts import hold_out_groups

log = logging.getLogger(__name__)

Selector = Literal[
    "random",
    "herding",
    "uncertainty_herding",
    "typiclust",
    "probcover",
    "k_center",
    "margin",
    "dropquery",
]
NAMES: tuple[Selector, ...] = get_args(Selector)

# Those that choose by the uncertainty of a model, and what they are in the first round without one.
FIRST_ROUND = {"margin": "random", "uncertainty_herding": "herding", "dropquery": "dropquery"}

# Share of the images that each seed chooses from. Methods that draw nothing would otherwise choose
# the same images with every seed, as if their result could not have been another one.
POOL_SHARE = 0.8


class SimulatedLabelling(Generic[DatasetT]):
    """Choices of methods from the training images of a data set.

    Args:
        data: Labelled images. A validation part that was taken out of the training images is added
            to them; one of the user's own stays as it is, and its labels are not counted.
        budgets: Numbers of images to label, ascending.
        repeated: Files that show the same picture as another one. No method chooses them, as
            ``select`` chooses one of near-duplicates.

    Attributes:
        data: The images to choose from are its training part.
        labels: Numbers of labels at each budget that there are enough images for, by name.

    Raises:
        UserError: There are fewer images to choose from than the smallest budget.
    """

    def __init__(
        self, data: DatasetT, budgets: Sequence[int], repeated: Collection[str] = ()
    ) -> None:
        self.own_val = not data.refits(None) and len(data.val) > 0
        self.data = data if self.own_val else data.merged()
        everything = len(self.data.train)
        self.data = self.data.without({"train": repeated}, {})
        if left := everything - len(self.data.train):
            log.info("Training images that show the same picture as another one: %d", left)
        size = round(POOL_SHARE * len(self.data.train))
        self.size = size
        self.budgets = [budget for budget in budgets if budget <= size]
        if not self.budgets:
            raise UserError(
                f"--budgets {budgets[0]} is more than there is to choose from: each seed has "
                f"{POOL_SHARE:.0%} of {len(self.data.train):,} training images, which is {size:,}"
            )
        if left_out := budgets[len(self.budgets) :]:
            log.info(
                "left out: budgets of %s, since each seed has %d images to choose from",
                ", ".join(map(str, left_out)),
                size,
            )
        self.labels = {f"{budget:,} images": LabelCount(budget, 0) for budget in self.budgets}
        self._chosen: dict[tuple[str, int], np.ndarray] = {}

    @cached_property
    def paths(self) -> list[str]:
        """The images to choose from, of all seeds."""
        return self.data.paths("train")

    def subset(self, method: Selector, budget: int, seed: int, features: np.ndarray) -> DatasetT:
        """The data set with the labels that a method has at a budget.

        Args:
            method: Method of selection.
            budget: One of ``budgets``.
            seed: Seed of the pool and of what the method draws.
            features: ``(N, D)`` features of ``paths``.

        Returns:
            A copy of the data set. Without a validation part of the user's own, a third of the
            images are its validation part, drawn at random; in whole groups if there are any.
        """
        chosen = self._rounds(method, seed, features)[:budget]
        subset = self.data.take({"train": sorted(chosen)})
        if self.own_val:
            return subset
        groups = subset.groups("train")
        if groups is not None:
            alike = np.zeros(budget, np.int64)  # no strata
            held = hold_out_groups(alike, groups, exclusive=False, share=1 / 3, seed=seed)
            return subset.hold_out(np.sort(held).tolist())
        shuffled = np.random.default_rng(seed).permutation(chosen)
        held = np.searchsorted(sorted(chosen), np.sort(shuffled[: budget // 3]))
        return subset.hold_out(held.tolist())

    def write_csv(self, file: Path) -> None:
        """Write what was chosen: method, seed, rank and path, for the largest budget."""
        with csv_writer(file) as rows:
            rows.writerow(["method", "seed", "rank", "path"])
            for (method, seed), chosen in self._chosen.items():
                for rank, index in enumerate(chosen, start=1):
                    rows.writerow([method, seed, rank, self.paths[index]])

    def _rounds(self, method: Selector, seed: int, features: np.ndarray) -> np.ndarray:
        """Indices of the images that a method has labelled at the largest budget, in its order."""
        if (method, seed) not in self._chosen:
            pool = np.random.default_rng(seed).permutation(len(features))[: self.size]
            points = features[pool]
            labelled = np.empty(0, np.int64)
            for budget in self.budgets:
                name, uncertainty = str(method), None
                if method in FIRST_ROUND:
                    uncertainty = self._uncertainty(method, points, pool, labelled, seed)
                    name = FIRST_ROUND[method] if uncertainty is None else method
                choose = METHODS[name.removeprefix("uncertainty_")]
                more = choose(
                    points,
                    budget - len(labelled),
                    labelled=labelled,
                    uncertainty=uncertainty,
                    seed=seed,
                )
                labelled = np.concatenate([labelled, more.indices])
            self._chosen[method, seed] = pool[labelled]
        return self._chosen[method, seed]

    def _uncertainty(
        self,
        method: Selector,
        points: np.ndarray,
        pool: np.ndarray,
        labelled: np.ndarray,
        seed: int,
    ) -> np.ndarray | None:
        """Uncertainty of a linear probe; None where the labels are of fewer than two classes."""
        classes = self.data.image_classes("train")
        assert classes is not None  # ``Plan.simulate`` ensures it
        known = classes[pool[labelled]]
        if len(np.unique(known)) < 2:
            return None
        groups = self.data.groups("train")
        groups = None if groups is None else groups[pool[labelled]]
        head, _ = fit_linear(points[labelled], known, len(self.data.classes), seed, groups)
        if method == "dropquery":
            return changed_by_dropout(head.logits, points, seed)
        probabilities = torch.from_numpy(head.logits(points)).softmax(dim=1)
        return margin_uncertainty(probabilities, multi_label=False).numpy()
