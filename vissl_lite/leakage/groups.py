"""Leak check for groups: patients, scenes or volumes in several parts, or in pre-training."""

import logging
from collections.abc import Mapping, Set
from typing import NamedTuple

import numpy as np

from vissl_lite.errors import UserError, brief
from vissl_lite.leakage.matching import Policy

log = logging.getLogger(__name__)

_TITLES = {"train": "training", "val": "validation", "test": "test"}


class SharedGroups(NamedTuple):
    """Result of ``check_groups``.

    Attributes:
        total: Number of groups with images in several parts, or test images of which others were
            pre-trained on.
        left_out: Indices of the images to exclude, by part; empty unless the policy is ``exclude``.
    """

    total: int
    left_out: dict[str, list[int]]


def check_groups(
    groups: Mapping[str, np.ndarray],
    grouped_by: str,
    leaks: Policy,
    pretrained: Mapping[str, Set[str]] | None = None,
) -> SharedGroups:
    """Find groups with images in several parts, and test groups that an encoder was trained on.

    Args:
        groups: Group ``(N,)`` of each image of the parts ``train``, ``val`` and ``test``.
        grouped_by: Where the groups come from, such as ``column patient_id``, for messages.
        leaks: ``warn`` logs a warning; ``error`` raises; ``exclude`` leaves out test images of
            groups in the training part or in pre-training, and validation images of groups in the
            training part or among the test images that are left.
        pretrained: Groups of the images that each encoder was trained on.

    Raises:
        UserError: There are such groups and the policy is ``error``.
    """
    train, val, test = (set(groups[part].tolist()) for part in ("train", "val", "test"))
    pairs = {("train", "test"): train & test, ("train", "val"): train & val}
    pairs["val", "test"] = val & test
    seen = {encoder: names & test for encoder, names in (pretrained or {}).items()}
    shared = set().union(*pairs.values(), *seen.values())
    if not shared:
        return SharedGroups(0, {})
    words = "; ".join(
        [
            *(
                _in_words(f"the {_TITLES[one]} part", other, found)
                for (one, other), found in pairs.items()
                if found
            ),
            *(
                _in_words(f"the training images of {brief(encoder)}", "test", found)
                for encoder, found in seen.items()
                if found
            ),
        ]
    )
    words = f"{words} (groups: {brief(grouped_by)})"
    if leaks == "error":
        raise UserError(f"{words}: --leaks exclude leaves them out, --leaks warn goes on")
    if leaks == "warn":
        log.warning(
            "Leaks: %(words)s. --leaks exclude leaves their test and validation images out.",
            {"words": words, "groups": len(shared)},
            extra={"code": "leak"},
        )
        return SharedGroups(len(shared), {})
    gone_test = set().union(train & test, *seen.values())
    gone = {"test": gone_test, "val": (train | (test - gone_test)) & val}
    left_out = {
        part: np.flatnonzero([group in names for group in groups[part].tolist()]).tolist()
        for part, names in gone.items()
    }
    log.warning(
        "Leaks: %(words)s. Left out: %(test_left_out)d test and %(val_left_out)d validation images "
        "of these groups.",
        {
            "words": words,
            "groups": len(shared),
            "test_left_out": len(left_out["test"]),
            "val_left_out": len(left_out["val"]),
        },
        extra={"code": "leak"},
    )
    return SharedGroups(len(shared), left_out)


def _in_words(place: str, part: str, shared: Set[str]) -> str:
    """Such as ``2 groups are in the training part and the test part, the first p01``."""
    are = "group is" if len(shared) == 1 else "groups are"
    return (
        f"{len(shared)} {are} in {place} and the {_TITLES[part]} part, the first "
        f"{brief(min(shared))}"
    )
