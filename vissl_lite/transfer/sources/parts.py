"""The parts of a labelled data set: their names, and those that are made where none are given."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

import numpy as np

from vissl_lite.errors import UserError, check_positive_share
from vissl_lite.transfer.sources.reading_log import ReadingLog

Split = Literal["train", "val", "test"]
PARTS: tuple[Split, ...] = ("train", "val", "test")

T = TypeVar("T")

# Names of parts

VAL_NAMES = ("val", "valid", "validation", "dev")

_WORDS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "trainval": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}

# Words that say nothing beside the name of a part, as in train_images or Training_Set.
_FILLERS = frozenset(
    """annotation annotations data dataset gt image images img imgs label labeled labelled labels
    mask masks mini obj seg set split stage""".split()
)


def words_of(name: str) -> list[str]:
    """The words of a name in lower case: ``TrainImages_2`` has ``train`` and ``images``."""
    return [word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", name)]


def part_of_name(name: str) -> Split | None:
    """The part that the name of a folder or file means, or None.

    ``train2017``, ``Training_Set``, ``test_images``, ``TrainImages`` and ``valid`` are names of
    parts; ``test tube`` is not.

    Args:
        name: Name without its suffix.
    """
    words = words_of(name)
    named = [_WORDS[word] for word in words if word in _WORDS]
    others = [word for word in words if word not in _WORDS and word not in _FILLERS]
    return named[0] if len(set(named)) == 1 and not others else None


def part_of_path(path: str) -> Split | None:
    """The part named by one of a file's folders, or None; inner folders first."""
    named = (part_of_name(part) for part in reversed(path.split("/")[:-1]))
    return next(filter(None, named), None)


def part_of_file(path: str) -> Split | None:
    """The part in a file's name, as in ``instances_val2017.json``, or in its folders' names."""
    words = re.findall("[a-z]+", Path(path).stem.lower())
    named = (_WORDS.get(word) for word in words)
    return next(filter(None, named), None) or part_of_path(path)


# Parts that are made

# Share of the images that goes to validation and to test where the data name no such part.
VAL_SHARE = TEST_SHARE = 0.2


def complete_parts(
    given: Mapping[Split | None, Sequence[T]],
    strata: Callable[[Sequence[T]], np.ndarray],
    exclusive: bool,
    seed: int,
    log: ReadingLog,
    groups: Callable[[Sequence[T]], np.ndarray] | None = None,
    complete: bool = True,
) -> dict[Split, list[T]]:
    """Make the parts that are not given; images of a given part never move to another.

    Without any part, 60 % of the images are for training, 20 % for validation and 20 % for testing.
    With a validation but no test part, the given validation part becomes the test part. A missing
    validation part is 20 % of the training images.

    Args:
        given: Items by part, and by None those without a part; each in an order that does not
            depend on the machine.
        strata: Function to a stratum ``(N,)`` int64 for each of N items.
        exclusive: Whether a stratum is the only class of its items: each class with two or more
            items then has one in every part that is made from it.
        seed: Seed of a validation part that is made where a test part is given. A test part that
            is made, and a validation part with it, stay the same from run to run.
        log: Gets the origins of the parts, and the sentence on them.
        groups: Function to the group ``(N,)`` of each of N items; no group is divided. None for
            items that are all apart.
        complete: Whether missing parts are made; otherwise they stay empty, and images without a
            part count as training images.

    Raises:
        UserError: There are no images to train on, or too few or too few groups to make a test
            part.
    """
    divide = _Division(strata, exclusive, groups)
    parts = {name: list(given.get(name, ())) for name in PARTS}
    unnamed = list(given.get(None, ()))
    held_out = "20 % of the training images"
    if not complete:
        parts["train"] += unnamed
    elif any(parts.values()) and unnamed:
        log.add("image without a part, left out", str(unnamed[0]), len(unnamed))
    elif unnamed:
        parts["train"] = unnamed
    if not parts["train"] and (complete or not any(parts.values())):
        found = " and ".join(name for name in PARTS if parts[name])
        if not found:
            raise UserError(f"{log.source} has no labelled images that can be used")
        raise UserError(
            f"{log.source} has no training images, only {found}: add a part train, or leave the "
            f"names of parts away to have the images split"
        )
    origins: dict[str, str] = {n: log.origins.get(n, "as given") for n in PARTS if parts[n]}
    together = ", no group in two parts" if groups else ""
    how = f"stratified by class{together}, seed 0"
    if not complete:
        log.origins = origins
        return {name: parts[name] for name in PARTS}
    if not parts["test"] and not parts["val"]:
        everything = parts["train"]
        _check_groups(everything, groups, log)
        rest, test = divide(everything, TEST_SHARE, 0)
        rest, val = divide(rest, VAL_SHARE / (1 - TEST_SHARE), 1)
        parts = {"train": rest, "val": val, "test": test}
        origins = {"train": "60 %", "val": "20 %", "test": "20 %"}
        log.val_from_train = True
        what = "No test or validation part was found" if not unnamed else "No parts were found"
        log.split = (
            f"{what}: the images are divided at random into {len(rest)} for training, {len(val)} "
            f"for validation and {len(test)} for testing ({how})."
        )
        if not test and groups:
            raise UserError(
                f"{log.source}: each group ({log.grouped_by}) is the only one of some class, so "
                f"that none can be held out: add groups, or give parts of your own"
            )
        if not test or len(everything) < len(PARTS):
            raise UserError(
                f"{log.source} has {len(everything)} images, too few to train, validate and test: "
                f"three or more are needed"
            )
    elif not parts["test"]:
        parts["test"], parts["val"] = parts["val"], []
        origins["test"] = f"validation part, {origins.pop('val')}"
        log.split = "No test part was found: the given validation part is the test part."
    if not parts["val"]:
        parts["train"], parts["val"] = divide(parts["train"], VAL_SHARE, seed)
        origins["val"] = f"{held_out}, seed {seed}"
        log.val_from_train = True
        if not log.split:
            log.split = "No validation part was found."
        if groups and not parts["val"]:
            log.split += (
                f" None can be made of the training images without dividing a group "
                f"({log.grouped_by})."
            )
        else:
            log.split += (
                f" {len(parts['val'])} of the training images, chosen at random and stratified by "
                f"class{together} (seed {seed}), are the validation part."
            )
    log.origins = origins
    return {name: parts[name] for name in PARTS}


def _check_groups(
    items: Sequence[T], groups: Callable[[Sequence[T]], np.ndarray] | None, log: ReadingLog
) -> None:
    """Raise a UserError if there are fewer groups than parts."""
    count = len(PARTS) if groups is None else len(np.unique(groups(items)))
    if count < len(PARTS) <= len(items):
        raise UserError(
            f"{log.source} has {len(items)} images in {count} group{'s' * (count > 1)} "
            f"({log.grouped_by}), too few to train, validate and test without dividing one: add "
            f"groups, or give parts of your own"
        )


@dataclass(frozen=True)
class _Division(Generic[T]):
    """Division of items by ``complete_parts``, whose arguments these are."""

    strata: Callable[[Sequence[T]], np.ndarray]
    exclusive: bool
    groups: Callable[[Sequence[T]], np.ndarray] | None

    def __call__(self, items: Sequence[T], share: float, seed: int) -> tuple[list[T], list[T]]:
        """Split a stratified share off; both results keep the order of the items."""
        held = np.zeros(len(items), bool)
        if items and self.groups is not None:
            groups = self.groups(items)
            held[hold_out_groups(self.strata(items), groups, self.exclusive, share, seed)] = True
        elif items:
            choose = hold_out_of_each if self.exclusive else hold_out_of_all
            held[choose(self.strata(items), share, seed)] = True
        pairs = list(zip(items, held.tolist(), strict=True))
        return [one for one, out in pairs if not out], [one for one, out in pairs if out]


def shuffled_classes(labels: np.ndarray, seed: int) -> list[np.ndarray]:
    """The indices of each class, shuffled.

    Args:
        labels: ``(N,)`` class of each item.
        seed: Seed of the order.
    """
    order = np.argsort(labels, kind="stable")
    numbers, begins = np.unique(labels[order], return_index=True)
    return [
        np.random.default_rng((seed, int(number))).permutation(members)
        for number, members in zip(numbers, np.split(order, begins)[1:], strict=True)
    ]


def hold_out_of_each(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Indices of a share of each class: at least one item of two or more.

    Args:
        labels: ``(N,)`` class of each item.
        share: Share to hold out.
        seed: Seed of the choice.
    """
    held = [
        members[: max(1, round(len(members) * share)) if len(members) > 1 else 0]
        for members in shuffled_classes(labels, seed)
    ]
    return np.concatenate([np.empty(0, np.int64), *held])


def hold_out_of_all(strata: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Indices of a share of all items, at least one of two, proportional to the strata.

    A systematic sample (Cochran 1977, "Sampling Techniques", chapter 8) from the shuffled items in
    the order of their strata.

    Args:
        strata: ``(N,)`` stratum of each item.
        share: Share to hold out.
        seed: Seed of the choice.
    """
    count = max(1, round(len(strata) * share)) if len(strata) > 1 else 0
    if not count:
        return np.empty(0, np.int64)
    random = np.random.default_rng((seed, 1))
    order = random.permutation(len(strata))
    order = order[np.argsort(strata[order], kind="stable")]
    steps = (np.arange(count) + random.random()) * (len(strata) / count)
    return order[steps.astype(np.int64)]


def hold_out_groups(
    strata: np.ndarray, groups: np.ndarray, exclusive: bool, share: float, seed: int
) -> np.ndarray:
    """Indices of about a share of the items, in whole groups, stratified as well as that allows.

    It is the fold of a cross-validation over groups that leaves the most strata to the rest, then
    has the most strata itself, then is nearest to the share of each stratum.

    Args:
        strata: ``(N,)`` stratum of each item.
        groups: ``(N,)`` group of each item.
        exclusive: Whether a stratum is the only class of its items: a group that alone has a class
            is then not held out.
        share: Share to hold out.
        seed: Seed of the choice.
    """
    groups = np.unique(groups, return_inverse=True)[1]
    free = np.arange(len(groups))
    if exclusive:
        pairs = np.unique(np.stack([strata, groups], axis=1), axis=0)
        numbers, counts = np.unique(pairs[:, 0], return_counts=True)
        alone = pairs[np.isin(pairs[:, 0], numbers[counts == 1]), 1]
        free = np.flatnonzero(~np.isin(groups, alone))
    if not len(free) or groups.max() == 0:
        return np.empty(0, np.int64)
    folds = _folds_of_groups(strata[free], groups[free], max(2, round(1 / share)), seed)
    strata = np.unique(strata, return_inverse=True)[1]
    total = np.bincount(strata)

    def rank(fold: int) -> tuple[float, ...]:
        held = np.bincount(strata[free[folds == fold]], minlength=len(total))
        unlike = float(np.abs(held - share * total).sum())
        return int((held == total).sum()), -int((held > 0).sum()), unlike

    return free[folds == min(range(int(folds.max()) + 1), key=rank)]


def _folds_of_groups(strata: np.ndarray, groups: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Folds of a cross-validation over groups, of similar size and with similar strata.

    One group after another, the largest first, goes to the fold in which the variances over folds
    of the shares of all strata, and of all items, grow least. It is the rule of scikit-learn's
    StratifiedGroupKFold, which takes minutes for 100,000 images.

    Args:
        strata: ``(N,)`` stratum of each item.
        groups: ``(N,)`` group of each item.
        count: Number of folds; there are no more than groups.
        seed: Seed of the choice.

    Returns:
        ``(N,)`` fold of each item, from 0; none is empty.
    """
    numbers, sizes = np.unique(groups, return_inverse=True, return_counts=True)[1:]
    strata, totals = np.unique(strata, return_inverse=True, return_counts=True)[1:]
    order = np.random.default_rng((seed, 4)).permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]
    members = np.split(np.argsort(numbers, kind="stable"), np.cumsum(sizes)[:-1])
    shares = np.zeros((min(count, len(sizes)), len(totals)))  # of each stratum in each fold
    filled = np.zeros(len(shares))
    folds = np.empty(len(groups), np.int64)
    for group in order:
        own = strata[members[group]]
        # Adding g to one of several numbers n changes the sum of their squares by 2 n g + g^2.
        growth = (shares[:, own] / totals[own]).sum(axis=1) + filled * sizes[group] / len(groups)
        fold = int(growth.argmin())
        np.add.at(shares[fold], own, 1 / totals[own])
        filled[fold] += sizes[group] / len(groups)
        folds[members[group]] = fold
    return folds


def fold_numbers(
    strata: np.ndarray, count: int, seed: int, groups: np.ndarray | None = None
) -> np.ndarray:
    """Folds of a stratified cross-validation.

    Args:
        strata: ``(N,)`` stratum of each item.
        count: Number of folds.
        seed: Seed of the choice.
        groups: ``(N,)`` group of each item; no group is divided, and there are no more folds than
            groups. None for items that are all apart.

    Returns:
        ``(N,)`` number of the fold that each item is held out in, from 0.
    """
    if groups is not None:
        return _folds_of_groups(strata, groups, count, seed)
    random = np.random.default_rng((seed, 3))
    order = random.permutation(len(strata))
    order = order[np.argsort(strata[order], kind="stable")]
    folds = np.empty(len(strata), np.int64)
    folds[order] = (
        np.arange(len(strata)) % count
    )  # an item of each stratum to one fold after another
    return folds


def rarest_classes(classes: Sequence[Collection[int]]) -> np.ndarray:
    """A stratum for each image that may have several classes or none.

    Args:
        classes: Classes of each image.

    Returns:
        ``(N,)`` int64: of the classes of an image the one that the fewest images have; -1 for an
        image without any.
    """
    counts = Counter(number for one in classes for number in set(one))
    rarest = [min(set(one), key=lambda n: (counts[n], n), default=-1) for one in classes]
    return np.array(rarest, np.int64)


def take_share(
    count: int, fraction: float | None, seed: int, groups: np.ndarray | None = None
) -> list[int]:
    """Indices of a seeded fraction of items, at least one, ascending.

    Smaller fractions are nested in larger ones.

    Args:
        count: Number of items N.
        fraction: Share in (0, 1]; None takes all.
        seed: Seed of the choice.
        groups: ``(N,)`` group of each item, of which whole ones are taken; None for items that are
            all apart.

    Raises:
        UserError: The share is out of range.
    """
    check_positive_share("fraction", fraction)
    if fraction is None:
        return list(range(count))
    if groups is not None:
        return draw_groups(np.zeros(count, np.int64), groups, fraction, seed).tolist()
    order = np.random.default_rng((seed, 2)).permutation(count)
    return sorted(order[: max(1, round(count * fraction))].tolist())


def draw_groups(strata: np.ndarray, groups: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Indices of whole groups with about a fraction of each stratum, ascending.

    Of the groups in a random order, each stratum takes as many of its own as come nearest to its
    share, at least one. Smaller fractions are therefore nested in larger ones.

    Args:
        strata: ``(N,)`` stratum of each item.
        groups: ``(N,)`` group of each item.
        fraction: Share in (0, 1].
        seed: Seed of the choice.
    """
    names, numbers = np.unique(groups, return_inverse=True)
    place = np.random.default_rng((seed, 5)).permutation(len(names))[numbers]
    drawn: set[int] = set()
    for stratum in np.unique(strata):
        own, sizes = np.unique(place[strata == stratum], return_counts=True)
        reached = np.cumsum(sizes)
        drawn.update(own[: int(np.abs(reached - fraction * reached[-1]).argmin()) + 1].tolist())
    return np.flatnonzero(np.isin(place, list(drawn)))
