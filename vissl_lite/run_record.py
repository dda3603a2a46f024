"""``run.json``: what a run says about itself, for programs to read."""

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
LARGEST_RECORD = 2**26  # bytes of run.json

# Warnings of a kind that get a record each in run.json; letters of a text in it.
EXAMPLES, LONGEST_TEXT = 20, 2000

Status = Literal["running", "finished", "stopped", "failed"]


@dataclass
class WarningRecord:
    """Something that a run warned of.

    Attributes:
        code: The kind of warning, such as ``image.unreadable``, ``leak`` or ``features.collapsed``.
        message: The same words as in the log.
        figures: What the message is made of, by name, as text and numbers.
        count: How many warnings the record stands for: the first 20 of a kind have one each, all
            further ones share another.
    """

    code: str
    message: str
    figures: dict[str, Any] = field(default_factory=dict)
    count: int = 1


@dataclass(frozen=True)
class RunRecord:
    """What ``run.json`` says about a run.

    Attributes:
        command: The command that writes it.
        status: ``running`` also for a process that was killed: its lock is free then.
        reason: Why the run was stopped or has failed; else None.
        started: Date and time of the (first) start, ISO 8601 with the time zone.
        seconds: How long the command ran until ``status`` was written. A run that is resumed adds
            up; what a killed process has spent since its last warning is not known.
        version: The version of vissl-lite.
        environment: Python, platform, host, versions of packages, and the device.
        warnings: In the order in which they came, also from before a resume. Leaks have the code
            ``leak``.
    """

    command: str
    status: Status = "running"
    reason: str | None = None
    started: str = ""
    seconds: float = 0.0
    version: str = version("vissl-lite")
    environment: dict[str, Any] = field(default_factory=dict)
    warnings: list[WarningRecord] = field(default_factory=list)

    def start(self) -> datetime | None:
        """When the run started; None if that cannot be read."""
        try:
            return datetime.fromisoformat(self.started).astimezone()
        except (ValueError, OverflowError, OSError):
            return None

    def write(self, folder: Path) -> None:
        """Write ``run.json``; it appears whole or not at all."""
        write_atomically(folder / RUN, json.dumps(asdict(self), indent=2) + "\n")


def read_record(folder: Path) -> RunRecord | None:
    """What a run says about itself; None if the folder is not a run."""
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
    """What a run depends on beside its options: Python, the machine, packages, the device."""
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
    """What is computed on. GPUs are named once they are in use: asking would put them into it."""
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
    """The name of the processor."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(one for one in lines if one.startswith("model name")).partition(":")[2].strip()
    return platform.processor() or platform.machine()


class RunFile:
    """``run.json`` of a run that is open.

    Args:
        folder: The run, locked.
        record: What it says at first.
    """

    def __init__(self, folder: Path, record: RunRecord) -> None:
        self.folder, self.record = folder, record
        self._before, self._begun = record.seconds, time.monotonic()
        self._writing = RLock()  # what data workers log comes from a thread

    def write(self, status: Status = "running", reason: str | None = None) -> None:
        """Write it as it stands.

        Args:
            status: Of the run from now on.
            reason: Why it ended, if it did not finish.
        """
        with self._writing:
            seconds = round(self._before + time.monotonic() - self._begun, 1)
            self.record = replace(self.record, status=status, reason=reason, seconds=seconds)
            self.record.write(self.folder)

    def warn(self, code: str, message: str, figures: Mapping[str, Any]) -> None:
        """Keep a warning; the same words again count once.

        It is written at once, so that a run that is killed has it; of very many of a kind, only the
        first ones, and then each time that their number has doubled.

        Args:
            code: The kind.
            message: The words.
            figures: What they are made of.
        """
        with self._writing:
            alike = [one for one in self.record.warnings if one.code == code]
            message = message[:LONGEST_TEXT]
            if len(alike) <= EXAMPLES:
                if any(one.message == message for one in alike):
                    return
                self.record.warnings.append(WarningRecord(code, message, _figures(figures)))
            else:
                alike[-1].count += 1
                if alike[-1].count.bit_count() > 1:  # no power of two
                    return
            self.write()


def _figures(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as ``run.json`` takes them; tensors and NumPy's numbers as numbers, others as text."""
    return {str(name): _figure(value) for name, value in values.items()}


def _figure(value: Any) -> Any:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, Mapping):
        return _figures(value)
    if isinstance(value, list | tuple):
        return [_figure(one) for one in value[:EXAMPLES]]
    if not isinstance(value, str):
        with suppress(TypeError, ValueError, RuntimeError):
            number = float(value)
            if math.isfinite(number):
                return number
    return str(value)[:LONGEST_TEXT]
