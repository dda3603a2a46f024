"""What may be chosen, and what was chosen."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from vissl_lite.data.fingerprints import Fingerprints, find_matches, repeats, similar_to

NOTHING_LABELLED = np.empty(0, np.int64)


@dataclass(frozen=True)
class Selection:
    """Images to label.

    Attributes:
        indices: ``(B,)`` int64, the most useful image first. Fewer than the budget if no more
            images may be chosen.
        reasons: Why each of them was chosen, as a phrase.
    """

    indices: np.ndarray
    reasons: list[str]

    def then(self, later: "Selection") -> "Selection":
        """This one, followed by another one."""
        indices = np.concatenate([self.indices, later.indices])
        return Selection(indices, [*self.reasons, *later.reasons])


class Candidates:
    """The images that may still be chosen. A selection uses it up: make one for each.

    Args:
        images: Number of images.
        labelled: ``(L,)`` indices of the images that have a label already.
        prints: Fingerprints of all images. Of images that show the same picture at most one is
            chosen, and none of a picture that is labelled. None if that is not checked.
        groups: ``(N,)`` group of each image, such as its patient.
        per_group: Maximum number of images of a group, labelled ones included; None for any.
        excluded: Fingerprints of other images, such as those that are not usable: none that shows
            the same picture as one of them is chosen, if ``prints`` are given.

    Attributes:
        open: ``(N,)`` bool: which images may be chosen.
    """

    def __init__(
        self,
        images: int,
        labelled: np.ndarray = NOTHING_LABELLED,
        prints: Fingerprints | None = None,
        groups: np.ndarray | None = None,
        per_group: int | None = None,
        excluded: Fingerprints | None = None,
    ) -> None:
        self.open = np.ones(images, bool)
        self.open[labelled] = False
        self._labelled = labelled
        self._prints, self._left = prints, np.empty(0, np.int64)
        if prints is not None:
            bank = prints.take(labelled)
            bank = bank if excluded is None else bank.append(excluded)
            known = {match.path for match in find_matches(prints, bank)} if len(bank) else set()
            self.open &= [path not in known for path in prints.paths]
        if groups is None or per_group is None:
            self._groups = None
        else:
            names, self._groups = np.unique(groups, return_inverse=True)
            taken = np.bincount(self._groups[labelled], minlength=len(names))
            self._left = per_group - taken
            self.open &= self._left[self._groups] > 0

    def copy(self) -> "Candidates":
        """Candidates with the same images open; a selection from them leaves these as they are."""
        other = copy(self)
        other.open, other._left = self.open.copy(), self._left.copy()
        return other

    def among(self, indices: np.ndarray) -> "Candidates":
        """Candidates for ``in_order`` among ``(M,)`` images only, by their places in ``indices``.

        These stay as they are. Looking for near-duplicates takes less time than among all images.
        """
        other = self.copy()
        other.open = self.open[indices]
        other._prints = None if self._prints is None else self._prints.take(indices)
        other._groups = None if self._groups is None else self._groups[indices]
        return other

    @cached_property
    def distinct(self) -> np.ndarray:
        """``(K,)`` indices of labelled images, one of each picture; few methods need them."""
        if self._prints is None:
            return self._labelled
        repeated = repeats(self._prints.take(self._labelled))
        return self._labelled[[self._prints.paths[i] not in repeated for i in self._labelled]]

    @property
    def remaining(self) -> int:
        """Number of images that may be chosen. Not the length: without any it would be false."""
        return int(self.open.sum())

    def take(self, index: int) -> None:
        """Choose an image: it and those that it rules out may not be chosen any more."""
        self.open[index] = False
        if self._prints is not None:
            self.open[similar_to(self._prints, index)] = False
        if self._groups is not None:
            group = self._groups[index]
            self._left[group] -= 1
            if self._left[group] <= 0:
                self.open[self._groups == group] = False


class Method(Protocol):
    """A method of choosing images to label."""

    def __call__(
        self,
        features: np.ndarray,
        budget: int,
        labelled: np.ndarray = NOTHING_LABELLED,
        uncertainty: np.ndarray | None = None,
        seed: int = 0,
        candidates: Candidates | None = None,
    ) -> Selection:
        """Choose images.

        Args:
            features: ``(N, D)`` finite features of all images, labelled ones included.
            budget: Number of images to choose.
            labelled: ``(L,)`` indices of the images that have a label already.
            uncertainty: ``(N,)`` how uncertain a model is of each image, at least 0; None without a
                model.
            seed: Seed of what is random. The same one gives the same choice.
            candidates: What may be chosen; it is used up. Default: all but the labelled images.

        Raises:
            UserError: The method needs the uncertainty of a model, and there is none.
        """


def in_order(order: Sequence[int] | np.ndarray, budget: int, candidates: Candidates) -> list[int]:
    """The first images of an order that may be chosen, each of which may rule out later ones.

    Args:
        order: Indices of images, the best first.
        budget: Maximum number to choose.
        candidates: What may be chosen; it is used up.
    """
    chosen: list[int] = []
    for index in map(int, order):
        if len(chosen) == budget:
            break
        if candidates.open[index]:
            candidates.take(index)
            chosen.append(index)
    return chosen
