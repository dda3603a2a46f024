"""The run: the folder that a command writes, with what was asked, what came out, and the log."""

import csv
import json
import logging
import math
import os
import platform
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from vissl_lite.data.json_file import read_json
from vissl_lite.data.reading import printable
from vissl_lite.data.whole_file import whole_file, write_atomically
from vissl_lite.data.yaml_file import read_yaml
from vissl_lite.errors import MachineError, Terminated, UserError
from vissl_lite.faults import machine_error
from vissl_lite.run_folder import CONFIG, check_folder, read_record, written_by

log = logging.getLogger("vissl_lite")
console = Console(stderr=True)

RESULTS, METRICS, LOG = "results.json", "metrics.csv", "log.txt"
CHECKPOINTS, CHECKPOINT = "checkpoints", "last.ckpt"
MAP = "map.npz"

LARGEST_RESULTS = 64 * 2**20  # bytes of results.json

# Keeps what is logged before there is a run, such as what was mended in the data: it goes into the
# log once that is open.
_early = MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1)
log.addHandler(_early)
log.setLevel(logging.DEBUG)


def is_main_process() -> bool:
    """Whether this is the process that writes; Lightning, torchrun and SLURM start the others."""
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        if os.environ.get(name, "").isdigit():
            return os.environ[name] == "0"
    return True


def forget_log() -> None:
    """Forget what was logged outside of a run, by an earlier command in this process."""
    _early.buffer.clear()


def check_out(
    out: Path,
    inputs: Sequence[tuple[str, str | Sequence[str] | None]] = (),
    resume: bool = False,
    overwrite: bool = False,
    command: str | None = None,
) -> bool:
    """Refuse a folder that a run must not be written to; see ``check_folder``.

    Args:
        out: the folder.
        inputs: options and what they name, one or several; None is passed over.
        resume: whether to continue what is there.
        overwrite: whether to replace it.
        command: the one that writes, if it can continue a run.

    Returns:
        Whether there is a run to continue; else a new one begins.

    Raises:
        UserError: nothing is changed then.
    """
    forget_log()
    if not is_main_process():
        return resume and (out / CONFIG).is_file()
    named = [
        (option, one)
        for option, given in inputs
        for one in ([given] if isinstance(given, str) else given or ())
    ]
    return check_folder(out, named, resume, overwrite, command)


@contextmanager
def open_run(
    out: Path, command: str, config: Mapping[str, Any], resume: bool = False
) -> Iterator[Path]:
    """Make the folder a run (in place of an older one), write ``config.yaml``, keep the log.

    Args:
        out: checked by ``check_out`` before.
        command: who writes it.
        config: the parameters, enough to repeat the run.
        resume: keep what is there and append to it.

    Yields:
        The folder.

    Raises:
        UserError: another process writes to it.
        MachineError: the machine refused something, such as room on a full disk.
    """
    if not is_main_process():
        yield out
        return
    try:
        with written_by(command, out, resume), _kept_log(out):
            if not resume:
                write_config(out, config)
            packages = ("vissl-lite", "torch", "timm", "lightning", "albumentations")
            log.debug(
                "Python %s on %s; %s",
                platform.python_version(),
                platform.platform(),
                ", ".join(f"{name} {version(name)}" for name in packages),
            )
            yield out
    except (KeyboardInterrupt, Terminated) as error:
        error.add_note(_what_is_kept(command, out))
        raise
    except Exception as error:
        fault = None if _is_mistake(error) else machine_error(error, out)
        if fault is None:
            raise
        raise MachineError(f"{fault}; {_what_is_kept(command, out)}") from error


def is_finished(out: Path) -> bool:
    """Whether a run has come to its end, with all that it writes."""
    record = read_record(out)
    return record is not None and record.status == "finished" and (out / RESULTS).is_file()


def _is_mistake(error: Exception) -> bool:
    return isinstance(error, UserError) and not isinstance(error, MachineError)


def _what_is_kept(command: str, run: Path) -> str:
    """What a run that ended early leaves, and how to go on."""
    if command in ("pretrain", "finetune"):
        if (run / CHECKPOINTS / CHECKPOINT).is_file():
            return (f"the training up to its last checkpoint is kept in {run}: the same command "
                    f"with --resume continues it")  # fmt: skip
        return (f"no checkpoint of {run} was written yet: the same command with --resume starts "
                f"it again")  # fmt: skip
    if command == "compare":
        return (f"what has finished is kept in {run}: the same command with --resume continues "
                f"from there")  # fmt: skip
    return f"{run} is not finished: the same command with --overwrite starts again"


@contextmanager
def _kept_log(out: Path) -> Iterator[None]:
    """What is logged goes to ``log.txt``, with what ended the run, and to the console."""
    file = _LogFile(out / LOG)
    log.removeHandler(_early)
    log.addHandler(file)
    _log_to_console()
    _repeat_early()
    try:
        yield
    except (UserError, KeyboardInterrupt, Terminated) as error:
        log.debug("stopped: %s", str(error) or "interrupted (Ctrl-C)")
        raise
    except Exception:
        file.handle(_record_of_exception())
        raise
    finally:
        log.removeHandler(file)
        file.close()
        if not any(isinstance(handler, logging.FileHandler) for handler in log.handlers):
            log.addHandler(_early)


class _LogFile(logging.FileHandler):
    """``log.txt``. Where it can't be written, as on a full disk, the run itself says so."""

    def __init__(self, file: Path) -> None:
        # file names need not be UTF-8
        super().__init__(file, encoding="utf-8", errors="backslashreplace")
        self.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s"))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):  # it writes what it has kept
            super().close()


@contextmanager
def warned_at_once() -> Iterator[None]:
    """Warnings before there is a run are shown when they come, and go into its log later."""
    if not is_main_process():
        yield
        return
    handler = _ConsoleHandler(logging.WARNING)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


@contextmanager
def logged_to_console() -> Iterator[None]:
    """What is logged is shown at once: a command that writes a file has no run to log to."""
    log.removeHandler(_early)
    _log_to_console()
    _repeat_early()
    try:
        yield
    finally:
        log.addHandler(_early)


def _repeat_early() -> None:
    """Log what was logged before there was a place for it."""
    for record in _early.buffer:
        log.handle(record)
    _early.buffer.clear()


def beside(run: Path, suffix: str) -> Path:
    """A folder beside a run, to suggest for what comes next: ``runs/a-probe`` for ``runs/a``."""
    named = run if run.name else run.absolute()  # the current folder has no name of its own
    return named.with_name(f"{named.name}-{suffix}")


def write_config(out: Path, config: Mapping[str, Any]) -> None:
    """Write ``config.yaml``: the parameters, enough to repeat the run."""
    kept = {k: v for k, v in plain(config).items() if k not in ("resume", "overwrite")}
    write_atomically(out / CONFIG, yaml.safe_dump(kept, sort_keys=False))


def _record_of_exception() -> logging.LogRecord:
    return log.makeRecord(
        log.name, logging.ERROR, __file__, 0, "stopped by an error", (), sys.exc_info()
    )


class _Formatter(logging.Formatter):
    """An entry takes a line, whatever the files are called that it names."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return printable(super().formatMessage(record))


class _ConsoleHandler(logging.Handler):
    """Prints above a progress bar, and leaves long lines (commands, paths) whole."""

    def emit(self, record: logging.LogRecord) -> None:
        if hasattr(record, "shown"):
            return
        record.shown = True
        style = "yellow" if record.levelno >= logging.WARNING else None
        console.print(printable(record.getMessage()), style=style, soft_wrap=True, markup=False,
                      highlight=False)  # fmt: skip


def _log_to_console() -> None:
    log.setLevel(logging.DEBUG)
    log.propagate = False
    if not any(isinstance(handler, _ConsoleHandler) for handler in log.handlers):
        log.addHandler(_ConsoleHandler(logging.INFO))


def plain(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Paths as text and tuples as lists, so that parameters can be written down and compared."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        if isinstance(value, Mapping):
            return {name: plain(item) for name, item in value.items()}
        return value

    return {name: plain(value) for name, value in parameters.items()}


def read_config(out: Path) -> dict[str, Any]:
    """The parameters of a run.

    Raises:
        UserError: the folder holds no run, or its file is damaged.
    """
    file = out / CONFIG
    if not file.is_file():
        raise UserError(f"{out} holds no run to resume ({CONFIG} is missing)")
    content = read_yaml(file)
    if not isinstance(content, dict):
        raise UserError(f"{file} is damaged: it holds no parameters")
    return {str(name): value for name, value in content.items()}


def write_results(run: Path, results: Mapping[str, Any]) -> None:
    """Write ``results.json``."""
    write_atomically(run / RESULTS, json.dumps(results, indent=2) + "\n")


def read_results(run: Path, *needed: str) -> dict[str, Any]:
    """Read ``results.json``.

    Args:
        run: the folder.
        needed: what it has to hold.

    Raises:
        UserError: it is damaged.
    """
    found = read_json(run / RESULTS, LARGEST_RESULTS)
    if not isinstance(found, dict) or any(name not in found for name in needed):
        raise UserError(f"{run / RESULTS} is damaged: it does not hold {', '.join(needed)}")
    return found


def logged_warnings(run: Path) -> list[str]:
    """The warnings in the log of a run, those from before a resume too; each one once."""
    if not (run / LOG).is_file():
        return []
    text = (run / LOG).read_text(encoding="utf-8", errors="replace")
    return list(dict.fromkeys(re.findall(r"^\S+ \S+ WARNING (.+)$", text, re.MULTILINE)))


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
                log.warning("%d damaged rows of %s are left out", damaged, file)
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
                whole_file(self.file) as part,
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
