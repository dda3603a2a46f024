"""What a command left in its run folder, as far as it can be read."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from vissl_lite.data.json_file import read_json
from vissl_lite.data.yaml_file import read_yaml
from vissl_lite.errors import UserError
from vissl_lite.run import LARGEST_RESULTS, LOG, METRICS, RESULTS, read_metrics
from vissl_lite.run_folder import CONFIG

LARGEST_LOG = 64 * 2**20  # letters of log.txt that are read

# An option that only this command has; the first one found in the configuration names it.
_TELLING = {
    "pretext": "pretrain",
    "protocols": "compare",
    "detector": "finetune",
    "temperature": "probe",
    "unlabelled": "demo",
    "model": "predict",
}

_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ ([A-Z]+) (.*)")


@dataclass
class Record:
    """An entry of the log.

    Attributes:
        time: when.
        level: as ``logging`` names it.
        message: may have several lines, as a traceback has.
    """

    time: datetime
    level: str
    message: str


@dataclass
class RunFolder:
    """A run, read.

    Attributes:
        folder: where.
        config: its options; empty if they can't be read.
        results: None where the run has not ended, or they can't be read.
        records: its log.
        metrics: by name, the steps and values of what was measured.
        unreadable: a sentence for each thing that is left out because it is damaged.
    """

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] | None = None
    records: list[Record] = field(default_factory=list)
    metrics: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)

    @property
    def command(self) -> str:
        """The verb that wrote the run; empty if its options do not tell."""
        return next((verb for option, verb in _TELLING.items() if option in self.config), "")

    @property
    def figures(self) -> dict[str, Any]:
        """The results, or nothing."""
        return self.results or {}

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return (self.folder / name).is_file()

    def started(self) -> datetime | None:
        """When the log begins."""
        return self.records[0].time if self.records else None

    def seconds(self) -> float | None:
        """From the first entry of the log to the last."""
        if len(self.records) < 2:
            return None
        return (self.records[-1].time - self.records[0].time).total_seconds()


def read_run(folder: Path) -> RunFolder:
    """Read a run folder; what is missing or damaged stays empty.

    Args:
        folder: of a run of any command, perhaps not ended.
    """
    run = RunFolder(folder)
    run.config = _mapping(run, CONFIG, read_yaml) or {}
    run.results = _mapping(run, RESULTS, lambda file: read_json(file, LARGEST_RESULTS))
    if run.has(LOG):
        try:
            with (folder / LOG).open(encoding="utf-8", errors="replace") as log:
                run.records = _read_log(log.read(LARGEST_LOG))
        except OSError:
            run.unreadable.append(f"{LOG} can't be read and is left out.")
        if not run.records and (folder / LOG).stat().st_size:
            run.unreadable.append(f"{LOG} is damaged and left out.")
    if run.has(METRICS):
        _read_metrics(run)
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


def _read_log(text: str) -> list[Record]:
    records: list[Record] = []
    more: dict[int, list[str]] = {}  # lines that follow an entry, as of a traceback
    for line in text.splitlines():
        match = _LINE.fullmatch(line)
        try:
            time = datetime.strptime(match[1], "%Y-%m-%d %H:%M:%S") if match else None
        except ValueError:  # digits, but no date
            time = None
        if match and time is not None:
            records.append(Record(time, match[2], match[3]))
        elif records:
            more.setdefault(len(records) - 1, []).append(line)
    for number, lines in more.items():
        records[number].message = "\n".join([records[number].message, *lines])
    return records


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
