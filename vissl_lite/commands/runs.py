"""``vissl-lite runs``: list the runs below a folder with their main metrics."""

import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from vissl_lite.data.json_file import read_json
from vissl_lite.data.reading import printable
from vissl_lite.errors import UserError, did_you_mean
from vissl_lite.options import Options, StrPath, command
from vissl_lite.run import LARGEST_RESULTS, RESULTS, logged_to_console
from vissl_lite.run_folder import RUN_CONFIG, is_locked
from vissl_lite.run_record import RUN, RunRecord, read_record

log = logging.getLogger(__name__)

State = Literal["running", "finished", "stopped", "failed", "killed", "damaged"]

# Main metric of each command: the first of these names that the results contain. A name that ends
# in a dot stands for the first metric below it.
MAIN_METRICS = {
    "pretrain": ("linear", "knn", "loss"),
    "probe": ("linear", "knn"),
    "finetune": ("test.",),
    "demo": ("scores.fine-tuned.pre-trained", "scores."),
    "predict": ("images",),
    "pseudo-label": ("labelled_images",),
    "select": ("chosen",),
}

# Endings of the names of metrics for which lower is better.
LOWER_IS_BETTER = ("loss", "seconds", "leaks", "skipped", "alignment", "uniformity")

# Results with metrics per class, which are not offered for sorting.
PER_CLASS = frozenset({"per_class"})


@dataclass(frozen=True, kw_only=False)
class RunsOptions(Options):
    """Options of ``runs``."""

    folder: StrPath = "."
    """Folder to search for runs, including its subfolders."""
    sort: str | None = None
    """Metric to sort by, such as linear, top1, test.top1, loss or seconds: best runs first, runs
    without it last. Default: newest runs first."""


@dataclass(frozen=True)
class RunSummary:
    """Summary of a run.

    Attributes:
        path: Run folder.
        command: Command that wrote it; empty if ``run.json`` is damaged.
        status: Status from ``run.json``, except ``killed`` if it is ``running`` there but no
            process has locked the run, and ``damaged`` if ``run.json`` can't be read.
        reason: Why the run was stopped or failed, or which of its files is damaged; else None.
        started: Start time; None if unknown.
        seconds: Duration, up to now for a running one; None if unknown.
        metric: Main metric as text, such as ``linear 0.812``; empty if there is none.
        metrics: All metrics of the results, by name; names of nested ones are joined by dots.
    """

    path: Path
    command: str
    status: State
    reason: str | None
    started: datetime | None
    seconds: float | None
    metric: str
    metrics: dict[str, float]


@command(RunsOptions)
def runs(options: RunsOptions) -> list[RunSummary]:
    """List the runs below a folder: command, status, start, duration and main metric.

    Folders that can't be read are skipped with a warning. Symbolic links to folders are followed.

    Returns:
        The runs, in the order in which they are shown.

    Raises:
        UserError: The folder does not exist, or no run in it has the metric to sort by.
    """
    folder = Path(options.folder)
    if not folder.is_dir():
        raise UserError(f"no folder {options.folder}: give one that holds runs")
    unreadable: list[str] = []
    found = [summarize(path) for path in find_runs(folder, unreadable)]
    with logged_to_console():
        if unreadable:
            log.warning(
                "folders that can't be read: %(folders)d, the first %(first)s",
                {"folders": len(unreadable), "first": unreadable[0]},
                extra={"code": "folder.unreadable"},
            )
    oldest = datetime.min.replace(tzinfo=UTC)
    found.sort(key=lambda one: str(one.path))
    found.sort(key=lambda one: one.started or oldest, reverse=True)
    if options.sort is not None:
        found = _sorted(found, options.sort)
    _print(found, folder, options.sort)
    return found


def find_runs(folder: Path, unreadable: list[str]) -> Iterator[Path]:
    """Yield the run folders below a folder, including the folder itself.

    Inside a run, only its direct subfolders are searched, as ``demo`` writes runs there. Symbolic
    links are followed, each folder is visited once, and hidden folders are skipped.

    Args:
        folder: Folder to search.
        unreadable: List to which folders that can't be read are appended.
    """
    visited: set[tuple[int, int]] = set()
    pending = [(str(folder), False)]  # path, and whether it is inside a run
    while pending:
        path, inside = pending.pop()
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            is_run = _is_run(Path(path))
            if is_run:
                yield Path(path)
            elif inside:
                continue
            with os.scandir(path) as entries:
                subfolders = [one.path for one in entries if one.name[0] != "." and one.is_dir()]
        except OSError:
            unreadable.append(path)
            continue
        pending += [(one, is_run) for one in sorted(subfolders, reverse=True)]


def _is_run(folder: Path) -> bool:
    """Whether a folder is a run, possibly one with a damaged ``run.json``."""
    if not (folder / RUN).is_file():
        return False
    return read_record(folder) is not None or (folder / RUN_CONFIG).is_file()


def summarize(folder: Path) -> RunSummary:
    """Summarize a run from those of its files that can be read."""
    record = read_record(folder)
    results, damaged = _results(folder)
    if record is None:
        return RunSummary(
            folder,
            "",
            "damaged",
            f"{RUN} is damaged, or written by another version",
            None,
            None,
            "",
            results,
        )
    status: State = record.status
    started, seconds = record.start(), record.seconds
    if status == "running" and not is_locked(folder):
        status = "killed"
    duration: float | None = seconds
    if status == "running" and started is not None:
        duration = max(seconds, (datetime.now(UTC) - started).total_seconds())
    elif status == "killed":
        duration = None
    if duration is not None:
        results.setdefault("seconds", duration)
    reason = record.reason or (f"{RESULTS} is damaged" if damaged else None)
    metric = main_metric(record, results, folder)
    return RunSummary(folder, record.command, status, reason, started, duration, metric, results)


def _results(folder: Path) -> tuple[dict[str, float], bool]:
    """Metrics in ``results.json``, and whether the file is damaged."""
    if not (folder / RESULTS).is_file():
        return {}, False
    try:
        content = read_json(folder / RESULTS, LARGEST_RESULTS)
    except UserError:
        return {}, True
    if not isinstance(content, dict):
        return {}, True
    return flatten_metrics({k: v for k, v in content.items() if k not in PER_CLASS}), False


def flatten_metrics(results: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers in nested results, by names joined by dots; the mean of a list of numbers."""
    found: dict[str, float] = {}
    for name, value in results.items():
        if isinstance(value, Mapping):
            found |= flatten_metrics(value, f"{prefix}{name}.")
            continue
        values = value if isinstance(value, list) else [value]
        if values and all(type(one) in (int, float) for one in values):
            mean = sum(map(float, values)) / len(values)
            if math.isfinite(mean):
                found[f"{prefix}{name}"] = mean
    return found


def main_metric(record: RunRecord, metrics: Mapping[str, float], folder: Path) -> str:
    """Main metric of a run, with its name; for a comparison the verdict."""
    if record.command == "compare":
        return _verdict(folder, metrics)
    for wanted in MAIN_METRICS.get(record.command, ()):
        for name, value in metrics.items():
            if name == wanted or (wanted.endswith(".") and name.startswith(wanted)):
                return f"{name.rpartition('.')[2]} {value:.4g}"
    return ""


def _verdict(folder: Path, metrics: Mapping[str, float]) -> str:
    try:
        content = read_json(folder / RESULTS, LARGEST_RESULTS)
    except UserError:
        return ""
    verdict = content.get("verdict") if isinstance(content, dict) else None
    if not isinstance(verdict, str):
        return ""
    difference = metrics.get("difference.mean")
    return verdict if difference is None else f"{verdict} ({difference:+.3f})"


def _sorted(found: list[RunSummary], metric: str) -> list[RunSummary]:
    """Sort runs by a metric: the best first, those without it last."""
    known = {name for one in found for name in one.metrics}
    name = next((name for name in (metric, f"test.{metric}") if name in known), None)
    if name is None:
        raise UserError(f"no run has the metric {metric}: {_suggest_metrics(metric, known)}")
    sign = 1 if name.endswith(LOWER_IS_BETTER) else -1
    return sorted(found, key=lambda one: sign * one.metrics.get(name, sign * math.inf))


def _suggest_metrics(metric: str, known: set[str]) -> str:
    """Suggest similar names, or list the least nested ones."""
    close = did_you_mean(metric, known)
    if len(known) <= 12 or close.startswith("did"):
        return close if known else "no run has any metrics"
    named = sorted(known, key=lambda name: (name.count("."), name))[:12]
    return f"there are {', '.join(named)} and {len(known) - len(named)} more"


def _print(found: list[RunSummary], folder: Path, sort: str | None) -> None:
    console = Console(width=None if sys.stdout.isatty() else 240)
    if not found:
        console.print(f"no runs below {printable(str(folder))}", markup=False, highlight=False)
        return
    table = Table(box=None)
    for title in ("run", "command", "status", "started", "duration", "main metric"):
        table.add_column(title, overflow="fold")
    if sort is not None:
        table.add_column(sort, overflow="fold")
    for one in found:
        started = "" if one.started is None else f"{one.started:%Y-%m-%d %H:%M}"
        cells = [
            str(one.path),
            one.command,
            one.status,
            started,
            _duration(one.seconds),
            one.metric or one.reason or "",
        ]
        if sort is not None:
            value = one.metrics.get(sort, one.metrics.get(f"test.{sort}"))
            cells.append("" if value is None else f"{value:.4g}")
        table.add_row(*(printable(cell).replace("[", r"\[") for cell in cells))
    console.print(table)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
