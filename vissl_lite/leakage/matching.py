"""Leak check: find evaluation images that an encoder or its head was trained on."""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from vissl_lite.data.fingerprints import Fingerprints, find_matches, read_fingerprints
from vissl_lite.data.reading import report_skipped
from vissl_lite.data.text_file import csv_writer
from vissl_lite.encoders.folder import is_untrained
from vissl_lite.errors import UserError

log = logging.getLogger(__name__)

# Files in a run folder: fingerprints of the training images, and the list of leaks.
FINGERPRINTS, LEAKS = "fingerprints.npz", "leaks.csv"

Policy = Literal["warn", "exclude", "error"]

# Phrases for messages
_PLACES = {
    "pretraining": "among the images that the encoder was trained on",
    "train": "in the training part",
    "val": "in the validation part",
}


class Leak(NamedTuple):
    """An evaluation image and its match in the training data.

    Attributes:
        part: Part of the evaluation image, ``test`` or ``val``.
        path: Evaluation image file.
        where: ``pretraining`` (images that the encoder was trained on, those of a fine-tuning
            included), or the labeled part ``train`` or ``val``.
        encoder: Encoder that was trained on the image; empty for a labeled part.
        twin: Matching file.
        kind: ``exact`` (the same bytes) or ``similar`` (visually near-identical).
        similarity: Similarity of the images; 1 for an exact match.
    """

    part: str
    path: str
    where: str
    encoder: str
    twin: str
    kind: str
    similarity: float


@dataclass(frozen=True)
class Leaks:
    """Result of a leak check.

    Attributes:
        found: Leaks, test images first. Includes validation images that the encoder was trained on
            without labels, which is harmless: pre-training often uses all images but the test part.
        left_out: Files to exclude, by part; empty unless the policy is ``exclude``.
        broken: Unreadable files and the reasons, by part. They are also logged.
        prints: Fingerprints of the readable images, by part.
        groups: Number of groups, such as patients, with images in several parts.
    """

    found: list[Leak]
    left_out: dict[str, set[str]]
    broken: dict[str, dict[str, str]]
    prints: dict[str, Fingerprints]
    groups: int = 0

    @property
    def count(self) -> int:
        """Number of leaked test images, including excluded ones."""
        return self.count_of(*{leak.encoder for leak in self.found})

    def count_of(self, *encoders: str) -> int:
        """Number of leaked test images for some encoders; labeled parts count for all of them."""
        at = ("", *encoders)
        return len({one.path for one in self.found if one.part == "test" and one.encoder in at})

    def figures(self) -> dict[str, Any]:
        """Numbers of leaks and excluded images for ``results.json``."""
        gone = {part: len(paths) for part, paths in self.left_out.items()}
        return {
            "leaks": self.count,
            **({"leaking_groups": self.groups} if self.groups else {}),
            **({"leaks_left_out": gone} if any(gone.values()) else {}),
        }

    def write(self, folder: Path) -> None:
        """Write ``leaks.csv`` to a run folder if there are leaks."""
        if not self.found:
            return
        with csv_writer(folder / LEAKS) as rows:
            rows.writerow(Leak._fields)
            rows.writerows(self.found)


def folders_of(encoder: str) -> list[Path]:
    """Folders that may say what an encoder was trained on: it, and the run or model around it."""
    folder = Path(encoder)
    return [folder, folder.parent] if folder.name == "encoder" else [folder]


def seen_by(encoder: str) -> Fingerprints | None:
    """Load the fingerprints of the images that an encoder was trained on without true labels.

    These are images of pre-training, and those that a fine-tuned model had pseudo-labels of.

    Args:
        encoder: A run, or the encoder or model folder in it; other sources have no fingerprints.

    Returns:
        The fingerprints, or None if there are none.

    Raises:
        UserError: If the file is damaged.
    """
    for run in folders_of(encoder):
        if (run / FINGERPRINTS).is_file():
            return Fingerprints.load(run / FINGERPRINTS)
    if not is_untrained(encoder):
        log.debug("training images of %s are unknown: no check for leaks", encoder)
    return None


def check_leaks(
    parts: Mapping[str, Sequence[str]],
    seen: Mapping[str, Fingerprints | None],
    leaks: Policy,
    listed: Path | None,
    progress: Callable[[int], None] | None = None,
) -> Leaks:
    """Find test and validation images that encoders were trained on, or in the training part.

    Test images are also searched for in the validation part, which selects the model.

    Args:
        parts: Image files of the parts ``train``, ``val`` and ``test``; each may be empty.
        seen: Fingerprints of the images that each encoder was trained on; None if unknown.
        leaks: ``warn`` logs a warning; ``error`` raises; ``exclude`` leaves out test images that
            an encoder was trained on or that are in the training part, and validation images that
            are in the training or the test part.
        listed: File that will list the leaks, for messages; None if there will be none.
        progress: Called with the number of images processed since the last call.

    Raises:
        UserError: If there are leaks and the policy is ``error``, or no test image is left.
    """
    prints, broken = {}, {}
    for name in ("train", "val", "test"):
        prints[name], skipped = read_fingerprints(parts[name], progress)
        report_skipped(skipped)
        broken[name] = dict(skipped)
    banks = [("pretraining", name, bank) for name, bank in seen.items() if bank is not None]
    found = []
    for part in ("test", "val"):
        labelled = [("train", "", prints["train"])]
        if part == "test":
            labelled.append(("val", "", prints["val"]))
        for where, encoder, bank in (*banks, *labelled):
            found += [
                Leak(part, match.path, where, encoder, match.twin, match.kind, match.similarity)
                for match in find_matches(prints[part], bank)
            ]
    result = Leaks(found, {"test": set(), "val": set()}, broken, prints)
    usual = {leak.path for leak in found if (leak.part, leak.where) == ("val", "pretraining")}
    harm = [leak for leak in found if (leak.part, leak.where) != ("val", "pretraining")]
    if usual:
        log.info(
            "Validation images among the images that the encoder was trained on, as is usual: %d",
            len(usual),
        )
    if not harm:
        return result
    first = harm[0]
    where = f", the first {first.path} ({first.twin})"
    if listed is not None:
        where = f". They are listed in {listed}; --leaks exclude leaves them out."
    if leaks == "error":
        raise UserError(
            f"{_in_words(harm)}, the first {first.path} ({first.twin}): --leaks exclude leaves "
            f"them out, --leaks warn goes on"
        )
    if leaks == "exclude":
        result = Leaks(found, _left_out(harm, prints), broken, prints)
        if (result.left_out["test"] | broken["test"].keys()).issuperset(parts["test"]):
            raise UserError(f"--leaks exclude leaves no test image: {_in_words(harm)}")
        log.warning(
            "Leaks: %(words)s. Left out: %(test_left_out)d test and %(val_left_out)d validation "
            "images%(listed)s.",
            {
                "words": _in_words(harm),
                "leaks": _counted(harm),
                "test_left_out": len(result.left_out["test"]),
                "val_left_out": len(result.left_out["val"]),
                "listed": "" if listed is None else f"; all are listed in {listed}",
            },
            extra={"code": "leak"},
        )
    else:
        log.warning(
            "Leaks: %(words)s%(listed)s",
            {"words": _in_words(harm), "leaks": _counted(harm), "listed": where},
            extra={"code": "leak"},
        )
    return result


def _left_out(harm: Sequence[Leak], prints: Mapping[str, Fingerprints]) -> dict[str, set[str]]:
    """Files to exclude. Of a test and validation pair, the validation image is excluded."""
    test = {leak.path for leak in harm if leak.part == "test" and leak.where != "val"}
    val = {leak.path for leak in harm if leak.part == "val"}
    val |= {match.path for match in find_matches(prints["val"], prints["test"])}
    return {"test": test, "val": val}


def _counted(harm: Sequence[Leak]) -> list[dict[str, Any]]:
    """Count leaked images by part, place and kind for ``run.json``."""
    kinds: dict[tuple[str, str], dict[str, str]] = {}
    for leak in harm:  # Several encoders may have seen the same image
        by_path = kinds.setdefault((leak.part, leak.where), {})
        by_path[leak.path] = min(leak.kind, by_path.get(leak.path, leak.kind))
    return [
        {"part": part, "where": where, "kind": kind, "count": count}
        for (part, where), by_path in kinds.items()
        for kind, count in sorted(Counter(by_path.values()).items())
    ]


def _in_words(harm: Sequence[Leak]) -> str:
    """Summarize leaks, such as ``2 test images are in the training part``."""
    places: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in _counted(harm):
        places.setdefault((one["part"], one["where"]), []).append(one)
    words = []
    for (part, where), counted in places.items():
        count = sum(one["count"] for one in counted)
        name = "validation" if part == "val" else part
        are = "image is" if count == 1 else "images are"
        how = ", ".join(f"{one['count']} {one['kind']}" for one in counted)
        words.append(f"{count} {name} {are} {_PLACES[where]} ({how})")
    return "; ".join(words)


def paths_of(part: Any) -> list[str]:
    """Image files of a part of a labeled data set of any task."""
    return part.paths if hasattr(part, "paths") else [str(one.path) for one in part]


def without(part: Any, left_out: Collection[str]) -> Any:
    """Copy of a part of a labeled data set of any task, without some image files."""
    kept = [i for i, path in enumerate(paths_of(part)) if path not in left_out]
    return part.take(np.array(kept, np.int64)) if hasattr(part, "take") else [part[i] for i in kept]
