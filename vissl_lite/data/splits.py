"""Splits of data whose images can't be sorted by one class each: by chance, and seeded."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from vissl_lite.errors import check_positive_share

# Share of the images that goes to validation and to test where the data name no such part.
VAL_SHARE = TEST_SHARE = 0.2

VAL_NAMES = ("val", "valid", "validation")

T = TypeVar("T")


def split_in_three(items: Sequence[T]) -> dict[str, list[T]]:
    """60 % train, 20 % val, 20 % test, in the order given; at least one in each of three or more.

    It does not follow the run's seed: the test part must stay the test part from run to run.

    Args:
        items: sorted in a way that does not depend on the machine.
    """
    order = np.random.default_rng(0).permutation(len(items))
    held = max(1, round(len(items) * TEST_SHARE)) if len(items) > 2 else 0
    return {
        "train": [items[i] for i in np.sort(order[2 * held :])],
        "val": [items[i] for i in np.sort(order[held : 2 * held])],
        "test": [items[i] for i in np.sort(order[:held])],
    }


def hold_out(items: Sequence[T], seed: int) -> tuple[list[T], list[T]]:
    """A validation part taken out of the training part: what is left, and the part."""
    order = np.random.default_rng((seed, 1)).permutation(len(items))
    held = max(1, round(len(items) * VAL_SHARE)) if len(items) > 1 else 0
    return [items[i] for i in np.sort(order[held:])], [items[i] for i in np.sort(order[:held])]


def take_share(items: Sequence[T], fraction: float | None, seed: int) -> list[T]:
    """A seeded share of the items, at least one; a smaller share is contained in a larger one.

    Args:
        items: the whole.
        fraction: share in (0, 1]; None takes all.
        seed: which ones.

    Raises:
        UserError: the share is out of range.
    """
    if fraction is None:
        return list(items)
    check_positive_share("fraction", fraction)
    order = np.random.default_rng((seed, 2)).permutation(len(items))
    return [items[i] for i in np.sort(order[: max(1, round(len(items) * fraction))])]
