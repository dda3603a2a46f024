"""The parts of a labelled data set: their names, and those that are made where none are given."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar

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
    need_test: bool = True,
    need_val: bool = True,
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
        seed: Seed of a validation part that is made. The test part does not depend on it, so that
            it stays the same from run to run.
        log: Gets the origins of the parts, and the sentence on them.
        need_test: Whether a missing test part is made.
        need_val: Whether a missing validation part is made.

    Raises:
        UserError: There are no images to train on, or too few to make a test part.
    """
    parts = {name: list(given.get(name, ())) for name in PARTS}
    unnamed = list(given.get(None, ()))
    held_out = "20 % of the training images"
    if any(parts.values()) and unnamed:
        log.add("image without a part, left out", str(unnamed[0]), len(unnamed))
    elif unnamed:
        parts["train"] = unnamed
    if not parts["train"]:
        found = " and ".join(name for name in PARTS if parts[name])
        if not found:
            raise UserError(f"{log.source} has no labelled images that can be used")
        raise UserError(
            f"{log.source} has no training images, only {found}: add a part train, or leave the "
            f"names of parts away to have the images split"
        )
    origins: dict[str, str] = {n: log.origins.get(n, "as given") for n in PARTS if parts[n]}
    how = "stratified by class, seed 0"
    if not parts["test"] and not parts["val"] and need_test:
        everything = parts["train"]
        rest, test = _divide(everything, strata, exclusive, TEST_SHARE, 0)
        rest, val = _divide(rest, strata, exclusive, VAL_SHARE / (1 - TEST_SHARE), 1)
        parts = {"train": rest, "val": val, "test": test}
        origins = {"train": "60 %", "val": "20 %", "test": "20 %"}
        log.val_from_train = True
        what = "No test or validation part was found" if not unnamed else "No parts were found"
        log.split = (
            f"{what}: the images are divided at random into {len(rest)} for training, {len(val)} "
            f"for validation and {len(test)} for testing ({how})."
        )
        if not test or len(everything) < len(PARTS):
            raise UserError(
                f"{log.source} has {len(everything)} images, too few to train, validate and test: "
                f"three or more are needed"
            )
    elif not parts["test"] and need_test:
        parts["test"], parts["val"] = parts["val"], []
        origins["test"] = f"validation part, {origins.pop('val')}"
        log.split = "No test part was found: the given validation part is the test part."
    if not parts["val"] and need_val:
        parts["train"], parts["val"] = _divide(parts["train"], strata, exclusive, VAL_SHARE, seed)
        origins["val"] = f"{held_out}, seed {seed}"
        log.val_from_train = True
        if not log.split:
            log.split = "No validation part was found."
        log.split += (
            f" {len(parts['val'])} of the training images, chosen at random and stratified by "
            f"class (seed {seed}), are the validation part."
        )
    log.origins = origins
    return {name: parts[name] for name in PARTS}


def _divide(
    items: Sequence[T],
    strata: Callable[[Sequence[T]], np.ndarray],
    exclusive: bool,
    share: float,
    seed: int,
) -> tuple[list[T], list[T]]:
    """Split a stratified share off; both results keep the order of the items."""
    choose = hold_out_of_each if exclusive else hold_out_of_all
    held = np.zeros(len(items), bool)
    if items:
        held[choose(strata(items), share, seed)] = True
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


def fold_numbers(strata: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Folds of a stratified cross-validation.

    Args:
        strata: ``(N,)`` stratum of each item.
        count: Number of folds.
        seed: Seed of the choice.

    Returns:
        ``(N,)`` number of the fold that each item is held out in, from 0.
    """
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


def take_share(items: Sequence[T], fraction: float | None, seed: int) -> list[T]:
    """A seeded fraction of the items, at least one; smaller fractions are nested in larger ones.

    Args:
        items: All items.
        fraction: Share in (0, 1]; None takes all.
        seed: Seed of the choice.

    Raises:
        UserError: The share is out of range.
    """
    if fraction is None:
        return list(items)
    check_positive_share("fraction", fraction)
    order = np.random.default_rng((seed, 2)).permutation(len(items))
    return [items[i] for i in np.sort(order[: max(1, round(len(items) * fraction))])]
