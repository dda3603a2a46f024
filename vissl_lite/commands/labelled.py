"""What was read of labelled data, shown by the commands that use them before any training."""

import logging
from typing import Any

from vissl_lite.leakage.matching import Leaks
from vissl_lite.log import ConsoleHandler, logged_to
from vissl_lite.run import console
from vissl_lite.transfer.dataset import LabelledDataset
from vissl_lite.transfer.shortcuts import warn_of_shortcuts
from vissl_lite.transfer.summary import summarize, table_of

log = logging.getLogger(__name__)

UNREADABLE = "image that can't be read, left out"


def show_data(data: LabelledDataset, leaks: Leaks | None = None) -> dict[str, Any]:
    """Log a table of a labelled data set, and record it in the ``run.json`` of an open run.

    Attributes of the files that predict the classes are warned of.

    Args:
        data: The data without unreadable images.
        leaks: Result of the leak guard, which has found these; None if it was not run.

    Returns:
        The summary that is recorded.
    """
    for paths in leaks.broken.values() if leaks is not None else ():
        data.reading.add(UNREADABLE, next(iter(paths), ""), len(paths))
    summary = summarize(data)
    for number, line in enumerate(table_of(summary)):
        log.info("%s", line, extra={} if number else {"labelled": summary})
    warn_of_shortcuts(data)
    return summary


def dry_run(data: LabelledDataset, leaks: Leaks) -> None:
    """Print what was logged so far, and the table, without a run."""
    with logged_to(ConsoleHandler(console, logging.INFO)):
        show_data(data, leaks)
        log.info("Nothing was trained or written (--dry_run)")
