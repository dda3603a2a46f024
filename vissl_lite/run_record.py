"""``run.json``: machine-readable status, environment and warnings of a run."""

import json
import math
import os
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import RLock
from typing import Any, Literal, get_args

from vissl_lite.data.atomic_file import write_atomically
from vissl_lite.data.json_file import read_json
from vissl_lite.errors import UserError

RUN = "run.json"
LARGEST_RECORD = 2**26  # Maximum size of run.json in bytes.

# Number of warnings per code that get a record of their own, also the maximum length of lists in
# their figures; and the maximum length of a text in characters.
RECORDS_PER_CODE, LONGEST_TEXT = 20, 2000

Status = Literal["running", "finished", "stopped", "failed"]


@dataclass
class WarningRecord:
    """A warning of a run.

    Attributes:
        code: Kind of warning, such as ``image.unreadable``, ``leak`` or ``features.collapsed``.
        message: Message, as in the log.
        figures: Values in the message by name, as text and numbers.
        count: Number of warnings that the record stands for. The first 20 of a code have one
            record each; all further ones share one record.
    """

    code: str
    message: str
    figures: dict[str, Any] = field(default_factory=dict)
    count: int = 1


@dataclass(frozen=True)
class RunRecord:
    """Content of ``run.json``.

    Attributes:
        command: Command that writes the run.
        status: Status of the run. A killed process leaves ``running`` with the lock released.
        reason: Why the run was stopped or failed, else None.
        started: Date and time of the (first) start in ISO 8601 with the time zone.
        seconds: Run time of the command when ``status`` was last written, summed over resumes.
            The time of a killed process since its last warning is not included.
        version: Version of vissl-lite.
        environment: Python, platform, host, package versions and device.
        warnings: Warnings in order, including those before a resume. Leaks have the code ``leak``.
        labelled: Summary of the labelled data, see ``summarize``; empty without labelled data.
    """

    command: str
    status: Status = "running"
    reason: str | None = None
    started: str = ""
    seconds: float = 0.0
    version: str = version("vissl-lite")
    environment: dict[str, Any] = field(default_factory=dict)
    warnings: list[WarningRecord] = field(default_factory=list)
    labelled: dict[str, Any] = field(default_factory=dict)

    def start(self) -> datetime | None:
        """Parse ``started``; None if it is not a valid date."""
        try:
            return datetime.fromisoformat(self.started).astimezone()
        except (ValueError, OverflowError, OSError):
            return None

    def write(self, folder: Path) -> None:
        """Write ``run.json`` atomically."""
        write_atomically(folder / RUN, json.dumps(asdict(self), indent=2) + "\n")


def read_record(folder: Path) -> RunRecord | None:
    """Read ``run.json``; None if the folder is not a run or the file is damaged."""
    try:
        content = read_json(folder / RUN, LARGEST_RECORD)
        known = {one.name: content[one.name] for one in fields(RunRecord)}
    except (UserError, LookupError, TypeError):
        return None
    if not isinstance(known["command"], str) or known["status"] not in get_args(Status):
        return None
    kinds = {
        "reason": str,
        "started": str,
        "seconds": int | float,
        "version": str,
        "environment": dict,
        "warnings": list,
        "labelled": dict,
    }
    known = {n: v for n, v in known.items() if n not in kinds or isinstance(v, kinds[n])}
    if not math.isfinite(known.get("seconds", 0.0)):
        del known["seconds"]
    known["warnings"] = [one for one in map(_read_warning, known.get("warnings", [])) if one]
    return RunRecord(**known)


def _read_warning(content: Any) -> WarningRecord | None:
    if not isinstance(content, dict):
        return None
    code, message = content.get("code"), content.get("message")
    figures, count = content.get("figures"), content.get("count")
    if not isinstance(code, str) or not isinstance(message, str) or not isinstance(figures, dict):
        return None
    return WarningRecord(code, message, figures, count) if type(count) is int else None


def environment() -> dict[str, Any]:
    """Describe the environment of a run: Python, machine, package versions and device."""
    versions = {}
    for package in ("torch", "timm", "lightning", "albumentations"):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        **versions,
        "device": device_name(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
    }


def device_name() -> str:
    """Name the device. GPUs are named only once CUDA is initialized, to avoid initializing it."""
    import torch

    if torch.backends.mps.is_available():
        return "Apple GPU"
    if not torch.cuda.is_available():
        return "CPU"
    count = torch.cuda.device_count()
    if not torch.cuda.is_initialized():
        return f"{count} x CUDA"
    names = [torch.cuda.get_device_name(number) for number in range(count)]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def _cpu() -> str:
    """Return the name of the processor."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(one for one in lines if one.startswith("model name")).partition(":")[2].strip()
    return platform.processor() or platform.machine()


class RunFile:
    """The ``run.json`` of an open run.

    Args:
        folder: Run folder, locked.
        record: Initial content.
    """

    def __init__(self, folder: Path, record: RunRecord) -> None:
        self.folder, self.record = folder, record
        self._earlier_seconds, self._started_at = record.seconds, time.monotonic()
        self._writing = RLock()  # Messages of data workers arrive on another thread.

    def write(self, status: Status = "running", reason: str | None = None) -> None:
        """Write the file with the current run time.

        Args:
            status: New status of the run.
            reason: Why the run ended, if it did not finish.
        """
        with self._writing:
            seconds = round(self._earlier_seconds + time.monotonic() - self._started_at, 1)
            self.record = replace(self.record, status=status, reason=reason, seconds=seconds)
            self.record.write(self.folder)

    def warn(self, code: str, message: str, figures: Mapping[str, Any]) -> None:
        """Record a warning; repeated identical messages are recorded once.

        The file is written immediately, so that a killed run keeps its warnings. After the first
        ``RECORDS_PER_CODE`` warnings of a code it is written only when their count has doubled.

        Args:
            code: Kind of warning.
            message: Text of the warning.
            figures: Values in the message by name.
        """
        with self._writing:
            alike = [one for one in self.record.warnings if one.code == code]
            message = message[:LONGEST_TEXT]
            if len(alike) <= RECORDS_PER_CODE:
                if any(one.message == message for one in alike):
                    return
                self.record.warnings.append(WarningRecord(code, message, _figures(figures)))
            else:
                alike[-1].count += 1
                if alike[-1].count.bit_count() > 1:  # Not a power of two.
                    return
            self.write()

    def describe(self, labelled: Mapping[str, Any]) -> None:
        """Record the summary of the labelled data."""
        with self._writing:
            self.record = replace(self.record, labelled=dict(labelled))
            self.write()


def _figures(values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert values for ``run.json``: tensors and NumPy scalars to numbers, others to text."""
    return {str(name): _figure(value) for name, value in values.items()}


def _figure(value: Any) -> Any:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, Mapping):
        return _figures(value)
    if isinstance(value, list | tuple):
        return [_figure(one) for one in value[:RECORDS_PER_CODE]]
    if not isinstance(value, str):
        with suppress(TypeError, ValueError, RuntimeError):
            number = float(value)
            if math.isfinite(number):
                return number
    return str(value)[:LONGEST_TEXT]
