"""``vissl-lite runs``: the runs below a folder, with what came out of them."""

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
from vissl_lite.run_folder import CONFIG, is_locked
from vissl_lite.run_record import RUN, RunRecord, read_record

log = logging.getLogger(__name__)

State = Literal["running", "finished", "stopped", "failed", "killed", "damaged"]

# The figure that stands for a run of a command: the first one that there is. A name that ends in a
# dot takes the first figure below it.
MAIN = {
    "pretrain": ("linear", "knn", "loss"),
    "probe": ("linear", "knn"),
    "finetune": ("test.",),
    "demo": ("scores.fine-tuned.pre-trained", "scores."),
    "predict": ("images",),
}

# Figures of which less is better, by the end of their names.
LESS = ("loss", "seconds", "leaks", "skipped")

# Results that are figures by class: too many to sort by.
BY_CLASS = frozenset({"per_class"})


@dataclass(frozen=True, kw_only=False)
class RunsOptions(Options):
    """Options of ``runs``."""

    folder: StrPath = "."
    """The folder to look in, with all folders below it."""
    sort: str | None = None
    """Sort by a figure of the results, such as linear, top1, test.top1, loss or seconds: the best
    first, runs without it last. Default: the newest first."""


@dataclass(frozen=True)
class RunSummary:
    """A run, in short.

    Attributes:
        path: Its folder.
        command: What wrote it; empty where ``run.json`` is damaged.
        status: As in ``run.json``, but ``killed`` for one that is said to be running and that no
            process holds, and ``damaged`` where ``run.json`` cannot be read.
        reason: Why it was stopped or has failed; or which of its files is damaged.
        started: When; None if that is not known.
        seconds: How long it took, or has been running; None if that is not known.
        figure: Its main figure as text, such as ``linear 0.812``; empty if there is none.
        figures: All figures of its results, by name; nested ones are joined by dots.
    """

    path: Path
    command: str
    status: State
    reason: str | None
    started: datetime | None
    seconds: float | None
    figure: str
    figures: dict[str, float]


@command(RunsOptions)
def runs(options: RunsOptions) -> list[RunSummary]:
    """List the runs below a folder: command, status, start, duration and main figure.

    Folders that cannot be read are passed over with a warning. Links to folders are followed.

    Returns:
        The runs, in the order in which they are shown.

    Raises:
        UserError: There is no such folder, or no run in it has the figure to sort by.
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
    """The run folders below a folder, itself included.

    In a run only the folders right below it are looked at, where ``demo`` keeps another one. Links
    are followed, each folder once; hidden folders are left out.

    Args:
        folder: Where to look.
        unreadable: Gets the folders that cannot be read.
    """
    seen: set[tuple[int, int]] = set()
    ahead = [(str(folder), False)]  # paths, and whether they lie in a run
    while ahead:
        path, inside = ahead.pop()
        try:
            about = os.stat(path)
            if (about.st_dev, about.st_ino) in seen:
                continue
            seen.add((about.st_dev, about.st_ino))
            is_run = _is_run(Path(path))
            if is_run:
                yield Path(path)
            elif inside:
                continue
            with os.scandir(path) as entries:
                below = [one.path for one in entries if one.name[0] != "." and one.is_dir()]
        except OSError:
            unreadable.append(path)
            continue
        ahead += [(one, is_run) for one in sorted(below, reverse=True)]


def _is_run(folder: Path) -> bool:
    """Whether a folder is a run, also one whose ``run.json`` is damaged."""
    if not (folder / RUN).is_file():
        return False
    return read_record(folder) is not None or (folder / CONFIG).is_file()


def summarize(folder: Path) -> RunSummary:
    """A run in short, as far as its files can be read."""
    record = read_record(folder)
    results, damaged = _results(folder)
    if record is None:
        return RunSummary(
            folder,
            "",
            "damaged",
            f"{RUN} is damaged, or of another version",
            None,
            None,
            "",
            results,
        )
    status: State = record.status
    started, seconds = record.start(), record.seconds
    if status == "running" and not is_locked(folder):
        status = "killed"
    spent: float | None = seconds
    if status == "running" and started is not None:
        spent = max(seconds, (datetime.now(UTC) - started).total_seconds())
    elif status == "killed":
        spent = None
    if spent is not None:
        results.setdefault("seconds", spent)
    reason = record.reason or (f"{RESULTS} is damaged" if damaged else None)
    figure = main_figure(record, results, folder)
    return RunSummary(folder, record.command, status, reason, started, spent, figure, results)


def _results(folder: Path) -> tuple[dict[str, float], bool]:
    """The figures of ``results.json``, and whether that is damaged."""
    if not (folder / RESULTS).is_file():
        return {}, False
    try:
        content = read_json(folder / RESULTS, LARGEST_RESULTS)
    except UserError:
        return {}, True
    if not isinstance(content, dict):
        return {}, True
    return figures_of({k: v for k, v in content.items() if k not in BY_CLASS}), False


def figures_of(results: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers in nested results, by names joined by dots; of a list of numbers the mean."""
    found: dict[str, float] = {}
    for name, value in results.items():
        if isinstance(value, Mapping):
            found |= figures_of(value, f"{prefix}{name}.")
            continue
        values = value if isinstance(value, list) else [value]
        if values and all(type(one) in (int, float) for one in values):
            mean = sum(map(float, values)) / len(values)
            if math.isfinite(mean):
                found[f"{prefix}{name}"] = mean
    return found


def main_figure(record: RunRecord, figures: Mapping[str, float], folder: Path) -> str:
    """The figure that stands for a run, with its name; of a comparison the verdict."""
    if record.command == "compare":
        return _verdict(folder, figures)
    for wanted in MAIN.get(record.command, ()):
        for name, value in figures.items():
            if name == wanted or (wanted.endswith(".") and name.startswith(wanted)):
                return f"{name.rpartition('.')[2]} {value:.4g}"
    return ""


def _verdict(folder: Path, figures: Mapping[str, float]) -> str:
    try:
        content = read_json(folder / RESULTS, LARGEST_RESULTS)
    except UserError:
        return ""
    verdict = content.get("verdict") if isinstance(content, dict) else None
    if not isinstance(verdict, str):
        return ""
    overall = [value for name, value in figures.items() if name.endswith(".overall.mean")]
    return f"{verdict} ({max(overall, key=abs):+.3f})" if overall else verdict


def _sorted(found: list[RunSummary], figure: str) -> list[RunSummary]:
    """The best first, those without the figure last."""
    known = {name for one in found for name in one.figures}
    name = next((name for name in (figure, f"test.{figure}") if name in known), None)
    if name is None:
        raise UserError(f"no run has the figure {figure}: {_there_is(figure, known)}")
    sign = 1 if name.endswith(LESS) else -1
    return sorted(found, key=lambda one: sign * one.figures.get(name, sign * math.inf))


def _there_is(figure: str, known: set[str]) -> str:
    """The figures that runs have: those that are meant perhaps, or the plainest ones."""
    close = did_you_mean(figure, known)
    if len(known) <= 12 or close.startswith("did"):
        return close if known else "no run has any"
    named = sorted(known, key=lambda name: (name.count("."), name))[:12]
    return f"there are {', '.join(named)} and {len(known) - len(named)} more"


def _print(found: list[RunSummary], folder: Path, sort: str | None) -> None:
    console = Console(width=None if sys.stdout.isatty() else 240)
    if not found:
        console.print(f"no runs below {printable(str(folder))}", markup=False, highlight=False)
        return
    table = Table(box=None)
    for title in ("run", "command", "status", "started", "took", "main figure"):
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
            one.figure or one.reason or "",
        ]
        if sort is not None:
            value = one.figures.get(sort, one.figures.get(f"test.{sort}"))
            cells.append("" if value is None else f"{value:.4g}")
        table.add_row(*(printable(cell).replace("[", r"\[") for cell in cells))
    console.print(table)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
