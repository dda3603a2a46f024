"""Blocks of the report of ``select``: coverage by budget, and why images were chosen."""

import csv
from typing import Any

from markupsafe import Markup

from vissl_lite.report.charts import coverage
from vissl_lite.report.folder import RunFolder
from vissl_lite.report.page import Block, render

# Table that ``select`` writes, and number of its rows that are shown.
SELECTED, LISTED = "selected.csv", 100


def coverage_by_budget(run: RunFolder) -> list[Block]:
    """Return a chart of the coverage for a run of ``select``; nothing for other commands."""
    found = run.figures.get("coverage")
    if run.command != "select" or found is None:
        return []
    try:
        selected, continued, at_random = (
            [float(value) for value in found[name]] for name in ("selected", "continued", "random")
        )
        knee = int(found["knee"])
    except (LookupError, TypeError, ValueError):
        run.unreadable.append("The coverage in results.json is damaged and left out.")
        return []
    lines: dict[str, tuple[int, list[float]]] = {"chosen images": (0, selected)}
    if len(continued) > 1:
        lines["chosen next"] = (len(selected) - 1, continued)
    lines["random images"] = (0, at_random)
    note = (
        "Coverage: the mean over all images of the similarity, from 0 to 1, to the most similar "
        "image that is labelled or chosen. It is an estimate of how much is represented, not of "
        "accuracy."
    )
    if knee:
        note += (
            f" The dashed line is the knee: beyond {knee} image{'s' * (knee > 1)}, each further "
            "one adds less than the average one in this range. If the curve is nearly straight, it "
            "means little."
        )
    return [Block("Coverage by number of images", coverage(lines, knee), note)]


def chosen_images(run: RunFolder) -> list[Block]:
    """Return the table of chosen images, folded, of a run of ``select``."""
    if run.command != "select" or not run.has(SELECTED):
        return []
    names = {"rank": "rank", "path": "image", "reason": "reason", "covers": "nearest to"}
    try:
        with (run.folder / SELECTED).open(newline="", encoding="utf-8", errors="replace") as file:
            found: list[list[Any]] = [
                [row[name] or "" for name in names] for row in csv.DictReader(file)
            ]
    except (OSError, KeyError, csv.Error):
        run.unreadable.append(f"{SELECTED} is damaged and left out.")
        return []
    table = render("table", columns=list(names.values()), rows=found[:LISTED])
    count = f"{len(found):,} image{'s' * (len(found) != 1)}"
    shown = f"The first {LISTED} of {count}" if len(found) > LISTED else count
    html = Markup("<details><summary>{}</summary>{}</details>").format(shown, table)
    note = "Nearest to: the number of images to which no other chosen or labelled one is as near."
    return [Block("Reasons", html, note)]
