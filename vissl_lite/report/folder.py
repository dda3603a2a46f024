"""Read a run folder for its report, as far as its files are readable.

The report is based on the machine-readable files ``run.json``, ``config.yaml``, ``results.json``
and ``metrics.csv``. The end of ``log.txt`` is only quoted.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vissl_lite.data.json_file import read_json
from vissl_lite.data.yaml_file import read_yaml
from vissl_lite.errors import UserError
from vissl_lite.metrics_file import read_metrics
from vissl_lite.run import LARGEST_RESULTS, LOG, METRICS, RESULTS
from vissl_lite.run_folder import RUN_CONFIG, is_locked
from vissl_lite.run_record import RUN, RunRecord, read_record

# Number of log lines that are quoted, and number of bytes at the end of the log that are read.
LOG_LINES, LOG_BYTES = 30, 2**16


@dataclass
class RunFolder:
    """Content of a run folder.

    Attributes:
        folder: Run folder.
        record: Content of ``run.json``; None if it cannot be read.
        config: Options of the run; empty if they cannot be read.
        results: Content of ``results.json``; None if the run has not finished or it cannot be
            read.
        metrics: Steps and values of each metric by name.
        log: Last lines of the log.
        unreadable: A message for each damaged file that is left out.
    """

    folder: Path
    record: RunRecord | None = None
    config: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] | None = None
    metrics: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    @property
    def command(self) -> str:
        """The command that wrote the run; empty if it is unknown."""
        return "" if self.record is None else self.record.command

    @property
    def figures(self) -> dict[str, Any]:
        """The results; empty if there are none."""
        return self.results or {}

    def has(self, name: str) -> bool:
        """Whether the run folder contains a file of this name."""
        return (self.folder / name).is_file()

    def is_open(self) -> bool:
        """Whether this or another process is writing to the run."""
        return (
            self.record is not None and self.record.status == "running" and is_locked(self.folder)
        )


def read_run(folder: Path) -> RunFolder:
    """Read a run folder. Attributes of missing or damaged files stay empty.

    Args:
        folder: Run folder of any command; the run need not have finished.
    """
    run = RunFolder(folder, read_record(folder))
    if run.record is None and run.has(RUN):
        run.unreadable.append(f"{RUN} is damaged and left out.")
    run.config = _mapping(run, RUN_CONFIG, read_yaml) or {}
    run.results = _mapping(run, RESULTS, lambda file: read_json(file, LARGEST_RESULTS))
    if run.has(METRICS):
        _read_metrics(run)
    if run.has(LOG):
        run.log = _last_lines(folder / LOG)
    return run


def _mapping(run: RunFolder, name: str, read: Callable[[Path], Any]) -> dict[str, Any] | None:
    if not run.has(name):
        return None
    try:
        content = read(run.folder / name)
    except UserError:
        content = None
    if isinstance(content, dict):
        return {str(key): value for key, value in content.items()}
    run.unreadable.append(f"{name} is damaged and left out.")
    return None


def _last_lines(file: Path) -> list[str]:
    """Return the last lines of a text file; empty if it cannot be read."""
    try:
        with file.open("rb") as opened:
            start = max(0, opened.seek(0, 2) - LOG_BYTES)
            opened.seek(start)
            lines = opened.read(LOG_BYTES).decode(errors="replace").splitlines()
    except OSError:
        return []
    return lines[start > 0 :][-LOG_LINES:]  # The first line may be incomplete.


def _read_metrics(run: RunFolder) -> None:
    names, rows, left_out = read_metrics(run.folder / METRICS)
    for row in rows:
        for name in names:
            if name in row and name != "step":
                steps, series = run.metrics.setdefault(name, ([], []))
                steps.append(row["step"])
                series.append(row[name] if math.isfinite(row[name]) else math.nan)
    if not run.metrics:
        run.unreadable.append(f"{METRICS} can't be read: there are no curves.")
    elif left_out:
        run.unreadable.append(f"{left_out} damaged rows of {METRICS} are left out.")
