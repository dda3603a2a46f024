"""The leak guard as ``probe``, ``finetune`` and ``compare`` use it, before anything is trained."""

from collections.abc import Sequence
from pathlib import Path

from vissl_lite.leakage.matching import LEAKS, Leaks, Policy, check_leaks, seen_by
from vissl_lite.training.progress import progress_bar
from vissl_lite.transfer.base import PARTS, DatasetT


def guard(
    data: DatasetT, encoders: Sequence[str], leaks: Policy, out: str
) -> tuple[DatasetT, Leaks]:
    """Check a labelled data set against what encoders were pre-trained on, and against itself.

    Images that can't be read are found by that, and left out: they are named in the log, and
    neither counted nor drawn among the few labels of a comparison.

    Args:
        data: a labelled data set of any task.
        encoders: as the user gave them.
        leaks: what to do about it; see ``check_leaks``.
        out: the run folder; nothing is written yet.

    Returns:
        The data, without the images that are to be left out; and what was found.

    Raises:
        UserError: leaks are an error, or nothing is left to judge by; a part, or the training
            images of a class, can't be read.
    """
    parts: dict[str, list[str]] = {name: data.paths(name) for name in PARTS}
    seen = {encoder: seen_by(encoder) for encoder in encoders}
    with progress_bar() as bar:
        task = bar.add_task("leaks", total=sum(map(len, parts.values())), info="")
        found = check_leaks(parts, seen, leaks, Path(out) / LEAKS, lambda n: bar.advance(task, n))
    if any(found.left_out.values()) or any(found.broken.values()):
        data = data.without(found.left_out, found.broken)
    return data, found
