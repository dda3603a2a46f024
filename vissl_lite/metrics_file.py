"""``metrics.csv``: the metrics that are logged during training, one row per logged step."""

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
    """``metrics.csv``, with one row per logged step and one column per metric.

    Rows are appended. If a written row changes or a column is added, the whole file is rewritten
    and replaced atomically.

    Args:
        file: CSV file. An existing file is appended to; a truncated last line is dropped.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows: list[dict[str, Any]] = []
        self.columns: list[str] = ["step", "seconds"]
        self._written = 0  # Number of rows in the file.
        self._stale = True  # Whether the file has to be rewritten.
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

    def drop_after(self, step: int) -> None:
        """Drop rows of later steps, which a resumed run computes again."""
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
        """Write new rows. The last row stays open for more values unless ``final`` is true."""
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
        """Return the steps and values of one metric."""
        points = [(row["step"], row[name]) for row in self.rows if name in row]
        return [step for step, _ in points], [value for _, value in points]


def read_metrics(file: Path) -> tuple[list[str], list[dict[str, Any]], int]:
    """Read ``metrics.csv`` row by row, leaving out damaged rows.

    Returns:
        The columns; the rows, without empty cells; and the number of damaged rows, at least 1 if
        the file cannot be read. A truncated last row, as a killed run leaves it, is left out but
        not counted.
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
                    raise ValueError("wrong number of cells")
                row = {k: _number(v) for k, v in zip(names, cells, strict=True) if v}
                if not math.isfinite(row["seconds"]) or int(row["step"]) != row["step"]:
                    raise ValueError("invalid time or step")
                rows.append(row)
            except (ValueError, LookupError, OverflowError):
                damaged += 1
        return names, rows, damaged
    except (OSError, csv.Error):
        return columns, [], 1


def _number(text: str) -> float | int:
    value = float(text)
    return int(value) if value.is_integer() and "." not in text else value
