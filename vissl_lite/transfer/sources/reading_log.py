"""Record of how a labelled data set was read, for the log, ``run.json`` and the report."""

import logging
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from vissl_lite.errors import brief

log = logging.getLogger(__name__)

# Maximum number of items of one kind that are logged individually.
MAX_LOGGED = 100

# Maximum number of file endings that are named in a message.
_MAX_ENDINGS = 6

# The only kind that is neither left out nor corrected, and not logged as a warning.
BACKGROUND = "image without boxes, kept as background"

MISSING_IMAGE = "image missing, or not the only one of its name, left out"


@dataclass
class ReadingLog:
    """How a labelled data set was read, and what was left out or corrected.

    Attributes:
        source: Path that was read, for messages.
        layout: Layout that was found, such as ``class folders`` or ``COCO``.
        label: Where the labels come from, such as ``column 'dx'``; empty if it goes without saying.
        counts: Number of items that were left out or corrected, by kind: a phrase that begins with
            a noun, such as ``box without area, left out``.
        notes: Sentences on how the data were read.
        warnings: Code and sentence of what looks wrong.
        origins: Where each part (train, val, test) comes from.
        tables: Files of labels that were read.
        groups: Group of each labelled image that belongs to others, such as those of a patient.
        groups_of_unlabelled: Groups of other images of a table, by a column.
        grouped_by: Where the groups come from, such as ``column patient_id``; may be empty.
        group_by: The regular expression that takes groups from paths, if one was given.
        split: Sentence on the parts that were made because they were not given; may be empty.
        val_from_train: Whether the validation part was taken out of the training images.
        folded: Whether the test part is a fold of a table.
    """

    source: str
    layout: str = ""
    label: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[tuple[str, str]] = field(default_factory=list)
    origins: dict[str, str] = field(default_factory=dict)
    tables: list[str] = field(default_factory=list)
    groups: dict[str, str] = field(default_factory=dict)
    groups_of_unlabelled: dict[str, str] = field(default_factory=dict)
    grouped_by: str = ""
    group_by: str | None = None
    split: str = ""
    val_from_train: bool = False
    folded: bool = False
    _first: dict[str, str] = field(default_factory=dict)

    def with_val_from_train(self) -> "ReadingLog":
        """A copy for a data set whose validation part is taken out of its training images."""
        return replace(self, val_from_train=True)

    def add(self, kind: str, where: str, times: int | np.integer[Any] = 1) -> None:
        """Count an item that was left out or corrected, in the file ``where``."""
        if times:
            if self.counts.get(kind, 0) < MAX_LOGGED:
                log.debug("%s: %s", kind, brief(where))
            self.counts[kind] = self.counts.get(kind, 0) + int(times)
            self._first.setdefault(kind, where)

    def add_group(self, image: str, group: object) -> None:
        """Add the group of an image that COCO's format names, if it is text or a number."""
        if isinstance(group, str | int) and str(group).strip():
            self.groups[image], self.grouped_by = str(group).strip(), "key group"

    def note(self, text: str) -> None:
        """Add a sentence on how the data were read; repetitions are dropped."""
        if text not in self.notes:
            self.notes.append(text)

    def warn(self, code: str, text: str) -> None:
        """Add a warning about what looks wrong.

        Args:
            code: Kind of warning in ``run.json``, such as ``data.class_names``.
            text: One sentence.
        """
        if (code, text) not in self.warnings:
            self.warnings.append((code, text))

    def absorb(self, other: "ReadingLog") -> None:
        """Add what another reading of the same data set found, but for its layout."""
        for kind, count in other.counts.items():
            self.add(kind, other._first[kind], count)
        for text in other.notes:
            self.note(text)
        for code, text in other.warnings:
            self.warn(code, text)
        self.origins |= other.origins
        self.tables += other.tables
        self.groups |= other.groups
        self.grouped_by = other.grouped_by or self.grouped_by
        self.label = other.label or self.label
        self.folded |= other.folded

    def left_out(self) -> list[str]:
        """Phrases with the count and the first file of each kind."""
        return [
            f"{_counted(count, kind)}, the first in {brief(self._first[kind])}"
            for kind, count in self.counts.items()
        ]

    def report(self) -> None:
        """Log warnings, notes, the sentence on parts, and what was left out or corrected."""
        for code, text in self.warnings:
            log.warning("%s", text, extra={"code": code})
        for text in (*self.notes, self.split):
            if text:
                log.info("%s", text)
        for kind, phrase in zip(self.counts, self.left_out(), strict=True):
            level = logging.INFO if kind == BACKGROUND else logging.WARNING
            log.log(level, "%s", phrase, extra={"code": "data.left_out"})

    def as_dict(self) -> dict[str, Any]:
        """Content for ``run.json``."""
        return {
            "source": self.source,
            "layout": self.layout,
            "label": self.label,
            "grouped_by": self.grouped_by,
            "split": self.split,
            "origins": dict(self.origins),
            "notes": list(self.notes),
            "left_out": dict(self.counts),
        }


def _counted(count: int, kind: str) -> str:
    noun, _, rest = kind.partition(" ")
    plural = "" if count == 1 else "es" if noun in ("box", "class") else "s"
    return f"{count:,} {noun}{plural} {rest}"


def count_endings(paths: list[str]) -> str:
    """Count files by their ending, most frequent first, such as ``12 .txt, 3 .npy``."""
    endings = Counter(_ending(path) for path in paths)
    words = [f"{count:,} {ending}" for ending, count in endings.most_common(_MAX_ENDINGS)]
    rest = len(endings) - len(words)
    return ", ".join(words) + (f" and {rest} other endings" if rest > 0 else "")


def _ending(path: str) -> str:
    name = path.rpartition("/")[2]
    stem, dot, ending = name.rpartition(".")
    return f".{ending.lower()}" if dot and stem and len(ending) <= 10 else "without ending"
