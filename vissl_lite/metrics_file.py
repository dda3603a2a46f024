"""``metrics.csv``: what a training logs, a row for each logged step."""

import csv
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vissl_lite.data.atomic_file import atomic_write

log = logging.getLogger(__name__)


class MetricsFile:
    """``metrics.csv``: a row for each logged step, a column for each metric.

    Rows are appended; where one that is written changes, or a column is new, the whole file is
    written beside the old one, which it then replaces.

    Args:
        file: appended to where it exists. A last line that was cut off is dropped.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows: list[dict[str, Any]] = []
        self.columns: list[str] = ["step", "seconds"]
        self._written = 0  # rows in the file
        self._stale = True  # whether the file has to be written anew
        self._started = time.monotonic()
        if file.exists():
            self.columns, self.rows, damaged = read_metrics(file)
            if damaged:
                log.warning(
                    "%(rows)d damaged rows of %(file)s are left out",
                    {"rows": damaged, "file": str(file)},
                    extra={"code": "metrics.damaged"},
                )
            if self.rows:
                self._started -= self.rows[-1]["seconds"]

    def forget_after(self, step: int) -> None:
        """Drop rows of later steps: a resumed run does them again."""
        self.rows = [row for row in self.rows if row["step"] <= step]
        self._written, self._stale = 0, True

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add values to the row of a step."""
        if not self.rows or self.rows[-1]["step"] != step:
            self.rows.append({"step": step})
        row = self.rows[-1]
        if all(name in row and row[name] == value for name, value in values.items()):
            return
        row["seconds"] = round(time.monotonic() - self._started, 2)
        row.update(values)
        new = [name for name in values if name not in self.columns]
        self.columns += new
        if new or len(self.rows) <= self._written:
            self._stale = True

    def flush(self, final: bool = False) -> None:
        """Write what is new; the last row stays open for more values unless this is final."""
        done = len(self.rows) if final else max(self._written, len(self.rows) - 1)
        if self._stale:
            with (
                atomic_write(self.file) as part,
                part.open("w", newline="", encoding="utf-8") as out,
            ):
                writer = csv.DictWriter(out, self.columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows(self.rows[:done])
        elif done > self._written:
            with self.file.open("a", newline="", encoding="utf-8") as out:
                writer = csv.DictWriter(out, self.columns, lineterminator="\n")
                writer.writerows(self.rows[self._written : done])
        self._written, self._stale = done, False

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """The steps and values of one metric."""
        points = [(row["step"], row[name]) for row in self.rows if name in row]
        return [step for step, _ in points], [value for _, value in points]


def read_metrics(file: Path) -> tuple[list[str], list[dict[str, Any]], int]:
    """Read ``metrics.csv``, row by row: a damaged one spoils no other.

    Returns:
        The columns; the rows, without empty cells; and how many rows are damaged and left out, at
        least 1 where nothing can be read. A last row that is cut off, as when a run was killed, is
        left out too, and does not count.
    """
    columns, rows, damaged = ["step", "seconds"], list[dict[str, Any]](), 0
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
        reader = csv.reader(text[: text.rfind("\n") + 1].splitlines())
        names = next(reader, columns)
        if not {"step", "seconds"} <= set(names) or len(set(names)) < len(names):
            return columns, [], 1
        for cells in reader:
            try:
                if len(cells) != len(names):
                    raise ValueError("a row of another length")
                row = {k: _number(v) for k, v in zip(names, cells, strict=True) if v}
                if not math.isfinite(row["seconds"]) or int(row["step"]) != row["step"]:
                    raise ValueError("no time or step")
                rows.append(row)
            except (ValueError, LookupError, OverflowError):
                damaged += 1
        return names, rows, damaged
    except (OSError, csv.Error):
        return columns, [], 1


def _number(text: str) -> float | int:
    value = float(text)
    return int(value) if value.is_integer() and "." not in text else value
