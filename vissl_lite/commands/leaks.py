"""The leak guard as ``probe``, ``finetune`` and ``compare`` use it, before anything is trained."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vissl_lite.data.labelled import LabelledImages, has_both
from vissl_lite.data.leaks import LEAKS, Leaks, Policy, check_leaks, paths_of, seen_by, without
from vissl_lite.errors import UserError
from vissl_lite.training.progress import progress_bar


def guard(data: Any, encoders: Sequence[str], leaks: Policy, out: str) -> tuple[Any, Leaks]:
    """Check a labelled data set against what encoders were pre-trained on, and against itself.

    Args:
        data: ``LabelledImages``, ``LabelledBoxes`` or ``LabelledMasks``.
        encoders: as the user gave them.
        leaks: what to do about it; see ``check_leaks``.
        out: the run folder; nothing is written yet.

    Returns:
        The data, without the images that are to be left out; and what was found.

    Raises:
        UserError: leaks are an error, or nothing is left to judge by.
    """
    parts = {name: paths_of(getattr(data, name)) for name in ("train", "val", "test")}
    seen = {encoder: seen_by(encoder) for encoder in encoders}
    with progress_bar() as bar:
        task = bar.add_task("leaks", total=sum(map(len, parts.values())), info="")
        found = check_leaks(parts, seen, leaks, Path(out) / LEAKS, lambda n: bar.advance(task, n))
    if not any(found.left_out.values()):
        return data, found
    left = {name: without(getattr(data, name), gone) for name, gone in found.left_out.items()}
    data = replace(data, **left)
    several = isinstance(data, LabelledImages) and data.multi_label
    if several and not has_both(data.test.labels).any():
        raise UserError(
            "--leaks exclude leaves no class that some test images have and some have not, so that "
            "no score can be given: more test images are needed"
        )
    return data, found
