"""Leak guard of ``probe``, ``finetune`` and ``compare``, which runs before any training."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from vissl_lite.data.fingerprints import Fingerprints, read_fingerprints
from vissl_lite.errors import UserError
from vissl_lite.leakage.groups import check_groups
from vissl_lite.leakage.matching import (
    LEAKS,
    Leaks,
    Policy,
    check_leaks,
    folders_of,
    seen_by,
)
from vissl_lite.training.progress import progress_bar
from vissl_lite.transfer.base import DatasetT
from vissl_lite.transfer.sources.groups import groups_of_others
from vissl_lite.transfer.sources.parts import PARTS
from vissl_lite.transfer.trained_on import load_trained_on

log = logging.getLogger(__name__)


def guard(
    data: DatasetT, encoders: Sequence[str], leaks: Policy, out: str | None
) -> tuple[DatasetT, Leaks]:
    """Look for test and validation images, and groups of them, in pre-training and training.

    Images that can't be read are detected here as well. They are logged and removed, so that they
    are neither counted nor drawn as labels of a comparison.

    Args:
        data: Labelled data set of any task.
        encoders: Encoders, as given by the user.
        leaks: What to do about leaks; see ``check_leaks``.
        out: Run folder, named in messages; None if there is none. Nothing is written to it.

    Returns:
        The data set without excluded and unreadable images, and the leaks that were found.

    Raises:
        UserError: Leaks were found and are an error; no test images are left; or all images of a
            part, or all training images of a class, are unreadable.
    """
    parts: dict[str, list[str]] = {name: data.paths(name) for name in PARTS}
    pretrained_on = {encoder: trained_on(encoder) for encoder in encoders}
    with progress_bar() as bar:
        task = bar.add_task("leaks", total=sum(map(len, parts.values())), info="")
        file = None if out is None else Path(out) / LEAKS
        found = check_leaks(parts, pretrained_on, leaks, file, lambda n: bar.advance(task, n))
    names = {part: data.groups(part) for part in PARTS}
    groups: dict[str, np.ndarray] = {
        part: of_part for part, of_part in names.items() if of_part is not None
    }
    if groups:
        pretrained = {
            encoder: frozenset().union(*groups_of_others(seen.paths, data.reading))
            for encoder, seen in pretrained_on.items()
            if seen is not None
        }
        shared = check_groups(groups, data.reading.grouped_by, leaks, pretrained)
        left_out = {part: set(paths) for part, paths in found.left_out.items()}
        for part, indices in shared.left_out.items():
            left_out[part].update(parts[part][i] for i in indices)
        gone = left_out["test"] | set(found.broken["test"])
        if shared.left_out and gone.issuperset(parts["test"]):
            raise UserError(
                f"--leaks exclude leaves no test image: {found.count} are leaks, and others are of "
                f"{shared.total} groups with images in several parts or in what the encoder saw"
            )
        found = replace(found, left_out=left_out, groups=shared.total)
    if any(found.left_out.values()) or any(found.broken.values()):
        data = data.without(found.left_out, found.broken)
    return data, found


def trained_on(encoder: str) -> Fingerprints | None:
    """Fingerprints of the images that an encoder was trained on, if they are known.

    Those of pre-training, and the labelled images that a fine-tuned model has seen, of which a
    warning is logged.
    """
    seen = seen_by(encoder)
    listed = labelled_for(encoder)
    if not listed:
        return seen
    log.warning(
        "%(encoder)s was trained with the true labels of %(images)d images, perhaps of "
        "validation images too: what it reaches is not what pre-training alone reaches",
        {"encoder": encoder, "images": len(listed)},
        extra={"code": "encoder.supervised"},
    )
    prints, broken = read_fingerprints(listed)
    if broken:
        log.warning(
            "%(gone)d of them can't be read, the first %(first)s: it can't be checked that "
            "they are not test images",
            {"gone": len(broken), "first": broken[0].path},
            extra={"code": "leak.unchecked"},
        )
    return prints if seen is None else seen.join(prints)


def labelled_for(encoder: str) -> list[str]:
    """Images with true labels that an encoder was trained on, as far as they are known."""
    listed = map(load_trained_on, folders_of(encoder))
    return next((one for one in listed if one is not None), [])
