"""The leak guard as ``probe``, ``finetune`` and ``compare`` use it, before anything is trained."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vissl_lite.data.leaks import LEAKS, Leaks, Policy, check_leaks, paths_of, seen_by, without
from vissl_lite.errors import UserError
from vissl_lite.training.progress import progress_bar
from vissl_lite.transfer.classification.data import LabelledImages, has_both
from vissl_lite.transfer.detection.data import LabelledBoxes


def guard(data: Any, encoders: Sequence[str], leaks: Policy, out: str) -> tuple[Any, Leaks]:
    """Check a labelled data set against what encoders were pre-trained on, and against itself.

    Images that can't be read are found by that, and left out: they are named in the log, and
    neither counted nor drawn among the few labels of a comparison.

    Args:
        data: ``LabelledImages``, ``LabelledBoxes`` or ``LabelledMasks``.
        encoders: as the user gave them.
        leaks: what to do about it; see ``check_leaks``.
        out: the run folder; nothing is written yet.

    Returns:
        The data, without the images that are to be left out; and what was found.

    Raises:
        UserError: leaks are an error, or nothing is left to judge by; a part, or the training
            images of a class, can't be read.
    """
    parts = {name: paths_of(getattr(data, name)) for name in ("train", "val", "test")}
    seen = {encoder: seen_by(encoder) for encoder in encoders}
    with progress_bar() as bar:
        task = bar.add_task("leaks", total=sum(map(len, parts.values())), info="")
        found = check_leaks(parts, seen, leaks, Path(out) / LEAKS, lambda n: bar.advance(task, n))
    _check_readable(data, parts, found.broken)
    gone = {name: {*found.left_out.get(name, ()), *found.broken[name]} for name in parts}
    if not any(gone.values()):
        return data, found
    data = replace(data, **{name: without(getattr(data, name), gone[name]) for name in parts})
    several = isinstance(data, LabelledImages) and data.multi_label
    if several and not has_both(data.test.labels).any():
        cause = "--leaks exclude leaves" if found.left_out["test"] else "what can be read has"
        raise UserError(
            f"{cause} no class that some test images have and some have not, so that no score can "
            f"be given: more test images are needed"
        )
    if isinstance(data, LabelledBoxes) and all(one.ignored.all() for one in data.train):
        path, why = next(iter(found.broken["train"].items()))
        raise UserError(f"no training image with boxes can be read, the first {path} ({why})")
    return data, found


def _check_readable(
    data: Any, parts: Mapping[str, Sequence[str]], broken: Mapping[str, Mapping[str, str]]
) -> None:
    """Raise a UserError if too much can't be read: a part, or the training images of a class."""
    for name, paths in parts.items():
        if paths and len(broken[name]) == len(set(paths)):
            raise UserError(f"none of {len(paths)} {name} images can be read, the first "
                            f"{paths[0]} ({broken[name][paths[0]]})")  # fmt: skip
    if isinstance(data, LabelledImages) and not data.multi_label:
        for number, label in enumerate(data.classes):
            paths = [
                parts["train"][i] for i in np.flatnonzero(data.train.labels == number).tolist()
            ]
            if paths and broken["train"].keys() >= set(paths):
                raise UserError(f"none of {len(paths)} training images of the class {label} can be "
                                f"read, the first {paths[0]} ({broken['train'][paths[0]]})"
                                )  # fmt: skip
