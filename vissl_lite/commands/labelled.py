"""What was read of labelled data, shown by the commands that use them before any training."""

import logging
from dataclasses import fields
from typing import Any

from vissl_lite.leakage.matching import Leaks
from vissl_lite.log import ConsoleHandler, logged_to
from vissl_lite.options import Options
from vissl_lite.run import console
from vissl_lite.transfer.dataset import LabelledDataset
from vissl_lite.transfer.finetuning import TransferSettings
from vissl_lite.transfer.shortcuts import warn_of_shortcuts
from vissl_lite.transfer.summary import summarize, table_of
from vissl_lite.transfer.tasks import AnyTask, check_given

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


def reading_settings(task: AnyTask, options: Options) -> TransferSettings:
    """Settings for reading labels, of a command that does not train.

    Args:
        task: Task of the labels.
        options: Has options for reading labels among its attributes.

    Raises:
        UserError: An option belongs to another task.
    """
    check_given(task, options.given)
    names = {one.name for one in fields(task.settings)} & {one.name for one in fields(options)}
    settings: TransferSettings = task.settings(**{one: getattr(options, one) for one in names})
    return settings


def dry_run(data: LabelledDataset, leaks: Leaks) -> None:
    """Print what was logged so far, and the table, without a run."""
    with logged_to(ConsoleHandler(console, logging.INFO)):
        show_data(data, leaks)
        log.info("Nothing was trained or written (--dry_run)")
