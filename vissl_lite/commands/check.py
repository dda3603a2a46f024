"""``vissl-lite check``: show what is read of a labelled data set."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vissl_lite.commands.labelled import show_data
from vissl_lite.commands.leaks import guard
from vissl_lite.data.reading import MAX_PIXELS, limit_pixels
from vissl_lite.errors import UserError, check_count, check_seed
from vissl_lite.log import ConsoleHandler, logged_to
from vissl_lite.options import Options, StrPath, command
from vissl_lite.report.additions import add_label_pictures, add_report
from vissl_lite.run import check_out, console, open_run, write_results
from vissl_lite.transfer.classification.options import LabelOptions
from vissl_lite.transfer.dataset import LabelledDataset
from vissl_lite.transfer.options import AnnotationsOption
from vissl_lite.transfer.sources.opening import unpacked
from vissl_lite.transfer.tasks import TASKS, AnyTask, find_task, reading_settings

log = logging.getLogger(__name__)

# Tasks in the order in which they are tried: from the labels that say most to those that say least.
_ORDER = ("detection", "segmentation", "classification")


@dataclass(frozen=True)
class CheckResult:
    """What was read of a labelled data set.

    Attributes:
        task: Task that the labels are for.
        summary: Layout, parts, labels per class, and what was left out, as in ``run.json``.
        run: Run folder with the report; None without ``out``.
    """

    task: str
    summary: dict[str, Any]
    run: Path | None


@dataclass(frozen=True, kw_only=True)
class CheckOptions(Options, LabelOptions, AnnotationsOption):
    """Options of ``check``."""

    data: StrPath
    """Labelled images, in any layout that finetune reads; see docs/data.md."""
    task: str | None = None
    """Task: classification, detection or segmentation. Default: the one that the labels fit."""
    out: StrPath | None = None
    """Run folder to write, with a report that shows images with their labels. Default: none."""
    max_pixels: int = MAX_PIXELS
    """Skip images with more pixels (height times width) than this; a small file can decode to
    billions of pixels. The default is Pillow's limit."""
    seed: int = 0
    """Random seed of a validation part that is made where there is a test part."""
    overwrite: bool = False
    """Replace an existing run in --out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task is not None:
            self._set("task", find_task(self.task).name)
        check_seed(self.seed)
        check_count("class_level", self.class_level)


@command(CheckOptions)
def check(options: CheckOptions) -> CheckResult:
    """Print what is read of a labelled data set: parts, classes, and what is left out.

    All images are decoded, so unreadable ones and images in several parts are found. Nothing is
    trained.

    Returns:
        The task and the summary.

    Raises:
        UserError: An option is invalid, or the labels fit no task.
    """
    limit_pixels(options.max_pixels)
    out = None if options.out is None else Path(options.out)
    if out is not None:
        inputs = [(name, options.as_config().get(name)) for name in ("data", "annotations")]
        check_out(out, inputs, overwrite=options.overwrite)
    task, data = _read(options)
    data, leaks = guard(data, [], "warn", None if out is None else str(out))
    if out is None:
        with logged_to(ConsoleHandler(console, logging.INFO)):
            return CheckResult(task.name, show_data(data, leaks), None)
    with open_run(out, "check", options.as_config() | {"task": task.name}) as run:
        summary = show_data(data, leaks)
        data.write_split(run)
        leaks.write(run)
        write_results(
            run,
            {
                **{f"{part}_images": one["images"] for part, one in summary["parts"].items()},
                "classes": data.classes,
                **leaks.figures(),
            },
        )
        add_label_pictures(run, task, data)
        add_report(run)
    return CheckResult(task.name, summary, out)


def _read(options: CheckOptions) -> tuple[AnyTask, LabelledDataset]:
    """Read the data for the given task, or for the first of ``_ORDER`` that they fit."""
    source = os.fspath(options.data)
    if not os.path.exists(source):
        raise UserError(f"{source} does not exist")
    source = str(unpacked(Path(source)))
    order = [*_ORDER, *(name for name in TASKS if name not in _ORDER)]
    tried = {name: find_task(name) for name in ([options.task] if options.task else order)}
    fitting: list[tuple[AnyTask, LabelledDataset]] = []
    errors: dict[str, str] = {}
    for name, task in tried.items():
        try:
            fitting.append((task, task.load_data(source, reading_settings(task, options))))
        except UserError as error:
            if len(tried) == 1:
                raise
            errors[name] = str(error)
    if not fitting:
        reasons = "; ".join(
            f"as {name}: {error.removeprefix(f'{source}: ')}"
            for name, error in reversed(errors.items())
        )
        raise UserError(f"{source} fits no task: {reasons}")
    if len(tried) > 1:
        others = "".join(f"; they also fit --task {task.name}" for task, _ in fitting[1:])
        log.info("The labels are for --task %s%s", fitting[0][0].name, others)
    return fitting[0]
