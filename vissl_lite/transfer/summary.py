"""Summary of a labelled data set: its parts, classes and what was left out, as data and as text."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vissl_lite.transfer.dataset import LabelledDataset
from vissl_lite.transfer.sources.parts import PARTS

# Number of classes whose labels are counted in the table.
SHOWN_CLASSES = 10

# Number of classes whose labels are counted in run.json.
MAX_CLASSES = 1000

PART_TITLES = {"train": "training", "val": "validation", "test": "test"}


def summarize(data: LabelledDataset) -> dict[str, Any]:
    """Summarize a data set for ``run.json``.

    Returns:
        The content of its ``ReadingLog``, ``num_classes``, and ``parts``: for each part ``images``,
        ``groups`` (number of groups, 0 if there are none), ``from`` (where it comes from) and
        ``classes`` (number of labels by class).
    """
    parts = {}
    for part in PARTS:
        counts, groups = data.class_counts(part).tolist(), data.groups(part)
        by_class = dict(zip(data.classes[:MAX_CLASSES], counts, strict=False))
        parts[part] = {
            "images": len(data.paths(part)),
            "groups": 0 if groups is None else len(np.unique(groups)),
            "from": data.reading.origins.get(part, ""),
            "classes": by_class,
        }
    return {**data.reading.as_dict(), "num_classes": len(data.classes), "parts": parts}


def rows_of(summary: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Part, number of images, origin, and number of labels by class, for each part."""
    rows = []
    for part, title in PART_TITLES.items():
        one = summary["parts"][part]
        counts = list(one["classes"].items())
        words = [f"{name} {count:,}" for name, count in counts[:SHOWN_CLASSES]]
        more = summary["num_classes"] - len(words)
        labels = ", ".join(words) + (
            f", and {more} more class{'es' * (more > 1)}" if more > 0 else ""
        )
        groups = one.get("groups", 0)
        images = f"{one['images']:,}" + (f" in {groups:,} group{'s' * (groups > 1)}" * (groups > 0))
        rows.append((title, images, one["from"], labels if one["images"] else ""))
    return rows


def title_of(summary: Mapping[str, Any]) -> str:
    """The source, the layout, and where the labels and groups come from, in one line."""
    label = f", label: {summary['label']}" if summary["label"] else ""
    label += f", groups: {summary['grouped_by']}" if summary.get("grouped_by") else ""
    classes = summary["num_classes"]
    words = f"{classes} class{'es' if classes != 1 else ''}"
    return f"{summary['source']}: {summary['layout'] or 'labelled images'}{label}; {words}"


def table_of(summary: Mapping[str, Any]) -> list[str]:
    """The summary as lines of text, with aligned columns."""
    rows = [("part", "images", "from", "labels per class"), *rows_of(summary)]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [title_of(summary)]
    for part, images, origin, labels in rows:
        cells = [part.ljust(widths[0]), images.rjust(widths[1]), origin.ljust(widths[2]), labels]
        lines.append(f"  {'  '.join(cells)}".rstrip())
    return lines
