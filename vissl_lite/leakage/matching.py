"""The leak guard: are judged images among those that an encoder or its head was trained on?"""

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
from vissl_lite.errors import UserError

log = logging.getLogger(__name__)

# The file with the fingerprints of the images that a run has trained on, in its folder; the list
# of what was found.
FINGERPRINTS, LEAKS = "fingerprints.npz", "leaks.csv"

Policy = Literal["warn", "exclude", "error"]

# The names of places in a sentence.
_PLACES = {
    "pretraining": "among the pre-training images",
    "train": "in the training part",
    "val": "in the validation part",
}


class Leak(NamedTuple):
    """A judged image and where it was seen before.

    Attributes:
        part: The judged part, test or val.
        path: The judged file.
        where: ``pretraining``, or the labelled part ``train`` or ``val``.
        encoder: Encoder whose pre-training used the image; empty for a labelled part.
        twin: The file there.
        kind: ``exact`` (the same bytes) or ``similar`` (the same picture to all appearance).
        similarity: 1 for an exact one.
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
    """What was found.

    Attributes:
        found: Test images first. Validation images among the pre-training images are in it too,
            though they are no harm: often all but the test part is pre-trained on, unlabelled.
        left_out: Files not to be used, by part; empty unless asked for.
        broken: Unreadable files and the reasons, by part. They are named in the log.
    """

    found: list[Leak]
    left_out: dict[str, set[str]]
    broken: dict[str, dict[str, str]]

    @property
    def count(self) -> int:
        """How many test images were seen before, those that are left out included."""
        return self.count_of(*{leak.encoder for leak in self.found})

    def count_of(self, *encoders: str) -> int:
        """The same for some of several encoders; what is among the labels counts for all."""
        at = ("", *encoders)
        return len({one.path for one in self.found if one.part == "test" and one.encoder in at})

    def figures(self) -> dict[str, Any]:
        """For ``results.json``: how many there are, and how many images were left out."""
        gone = {part: len(paths) for part, paths in self.left_out.items()}
        return {"leaks": self.count, **({"leaks_left_out": gone} if any(gone.values()) else {})}

    def write(self, folder: Path) -> None:
        """Write ``leaks.csv`` into a run, if anything was found."""
        if not self.found:
            return
        with csv_writer(folder / LEAKS) as rows:
            rows.writerow(Leak._fields)
            rows.writerows(self.found)


def seen_by(encoder: str) -> Fingerprints | None:
    """The fingerprints of the images that an encoder was pre-trained on.

    Args:
        encoder: A run, or the encoder folder in it; anything else has none.

    Returns:
        None where they were not kept.

    Raises:
        UserError: The file is damaged.
    """
    folder = Path(encoder)
    for run in (folder, *([folder.parent] if folder.name == "encoder" else [])):
        if (run / FINGERPRINTS).is_file():
            return Fingerprints.load(run / FINGERPRINTS)
    if not encoder.startswith("random:"):
        log.debug("what %s was pre-trained on is not known: no leak can be looked for", encoder)
    return None


def check_leaks(
    parts: Mapping[str, Sequence[str]],
    seen: Mapping[str, Fingerprints | None],
    leaks: Policy,
    listed: Path,
    progress: Callable[[int], None] | None = None,
) -> Leaks:
    """Look for test and validation images among the pre-training images and the training part.

    Test images are looked for in the validation part, too: it chooses.

    Args:
        parts: Image files of the parts ``train``, ``val`` and ``test``; each may be empty.
        seen: Images that each encoder was pre-trained on, if known.
        leaks: ``warn`` says what was found; ``error`` refuses to go on; ``exclude`` leaves out test
            images that were seen in pre-training or are in the training part, and validation images
            that are in the training or the test part.
        listed: The file that the found ones will be listed in, to be named.
        progress: Called with the number of images done since the last call.

    Raises:
        UserError: There are leaks and they are an error, or no test image would be left.
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
    result = Leaks(found, {"test": set(), "val": set()}, broken)
    usual = {leak.path for leak in found if (leak.part, leak.where) == ("val", "pretraining")}
    harm = [leak for leak in found if (leak.part, leak.where) != ("val", "pretraining")]
    if usual:
        log.info("Validation images among the pre-training images, as is usual: %d", len(usual))
    if not harm:
        return result
    if leaks == "error":
        first = harm[0]
        raise UserError(
            f"{_in_words(harm)}, the first {first.path} ({first.twin}): --leaks exclude leaves "
            f"them out, --leaks warn goes on"
        )
    if leaks == "exclude":
        result = Leaks(found, _left_out(harm, prints), broken)
        if result.left_out["test"].issuperset(parts["test"]):
            raise UserError(f"--leaks exclude leaves no test image: {_in_words(harm)}")
        log.warning(
            "Leaks: %(words)s. Left out: %(test_left_out)d test and %(val_left_out)d validation "
            "images; all are listed in %(listed)s.",
            {
                "words": _in_words(harm),
                "leaks": _counted(harm),
                "test_left_out": len(result.left_out["test"]),
                "val_left_out": len(result.left_out["val"]),
                "listed": listed,
            },
            extra={"code": "leak"},
        )
    else:
        log.warning(
            "Leaks: %(words)s. They are listed in %(listed)s; --leaks exclude leaves them out.",
            {"words": _in_words(harm), "leaks": _counted(harm), "listed": listed},
            extra={"code": "leak"},
        )
    return result


def _left_out(harm: Sequence[Leak], prints: Mapping[str, Fingerprints]) -> dict[str, set[str]]:
    """A test image whose twin is in the validation part stays: the twin goes."""
    test = {leak.path for leak in harm if leak.part == "test" and leak.where != "val"}
    val = {leak.path for leak in harm if leak.part == "val"}
    val |= {match.path for match in find_matches(prints["val"], prints["test"])}
    return {"test": test, "val": val}


def _counted(harm: Sequence[Leak]) -> list[dict[str, Any]]:
    """How many images of which part are where, by kind, for the run's ``run.json``."""
    kinds: dict[tuple[str, str], dict[str, str]] = {}
    for leak in harm:  # one image may have been seen by several encoders
        by_path = kinds.setdefault((leak.part, leak.where), {})
        by_path[leak.path] = min(leak.kind, by_path.get(leak.path, leak.kind))
    return [
        {"part": part, "where": where, "kind": kind, "count": count}
        for (part, where), by_path in kinds.items()
        for kind, count in sorted(Counter(by_path.values()).items())
    ]


def _in_words(harm: Sequence[Leak]) -> str:
    """How many of which part are where, such as ``2 test images are in the training part``."""
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
    """The image files of a part of a labelled data set, of whatever task."""
    return part.paths if hasattr(part, "paths") else [str(one.path) for one in part]


def without(part: Any, left_out: Collection[str]) -> Any:
    """A part of a labelled data set, of whatever task, without some image files."""
    kept = [i for i, path in enumerate(paths_of(part)) if path not in left_out]
    return part.take(np.array(kept, np.int64)) if hasattr(part, "take") else [part[i] for i in kept]
