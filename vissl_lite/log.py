"""Logging of a command: to the console, and to ``log.txt`` and ``run.json`` of its run.

Every module logs to a logger below ``vissl_lite``. A warning has a code for its kind and named
values, which ``run.json`` stores as data::

    log.warning("skipped: %(path)s (%(why)s)", {"path": path, "why": why},
                extra={"code": "image.unreadable"})

The summary of labelled data is stored with ``extra={"labelled": summary}``.

Importing the package configures no logging. While a command runs, its messages are not propagated
to the handlers of the root logger; afterwards the logger ``vissl_lite`` is restored.
"""

import logging
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console

from vissl_lite.data.reading import printable
from vissl_lite.errors import Terminated, UserError
from vissl_lite.run_record import RunFile

log = logging.getLogger("vissl_lite")

# Maximum number of messages that are buffered before the run is opened; older ones are dropped.
BUFFER_SIZE = 10_000

# Code of warnings that are logged without one.
DEFAULT_CODE = "other"


class _Buffer(logging.Handler):
    """Buffer messages that are logged before the run is opened, such as those on data cleaning."""

    def __init__(self) -> None:
        super().__init__()
        self.records: deque[logging.LogRecord] = deque(maxlen=BUFFER_SIZE)

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


_buffers: list[_Buffer] = []  # One for each running command, the innermost last.


@contextmanager
def command_log() -> Iterator[None]:
    """Buffer the messages of a command until its run or the console is ready."""
    buffer = _Buffer()
    with _command_level():
        _buffers.append(buffer)
        log.addHandler(buffer)
        try:
            yield
        finally:
            log.removeHandler(buffer)
            _buffers.remove(buffer)


@contextmanager
def logged_to(*handlers: logging.Handler) -> Iterator[None]:
    """Log to handlers, starting with the buffered messages; close the handlers at the end."""
    with _command_level():
        for handler in handlers:
            log.addHandler(handler)
        for buffer in _buffers[-1:]:
            log.removeHandler(buffer)
            for record in buffer.records:
                for handler in handlers:
                    if record.levelno >= handler.level:
                        handler.handle(record)
            buffer.records.clear()
        try:
            yield
        finally:
            for handler in handlers:
                log.removeHandler(handler)
                handler.close()


@contextmanager
def logged_to_run(run: RunFile, console: Console) -> Iterator[None]:
    """Log to ``log.txt`` and ``run.json`` of a run and to the console; also log why it stopped.

    Args:
        run: The open run.
        console: Console for messages of level INFO and above.
    """
    file = LogFile(run.folder / "log.txt")
    with logged_to(file, _RunRecords(run), ConsoleHandler(console, logging.INFO)):
        try:
            yield
        except (UserError, KeyboardInterrupt, Terminated) as error:
            log.debug("stopped: %s", str(error) or "interrupted (Ctrl-C)")
            raise
        except Exception:
            file.handle(_exception_record())
            raise


@contextmanager
def _command_level() -> Iterator[None]:
    level, propagate = log.level, log.propagate
    log.setLevel(logging.DEBUG)
    log.propagate = False
    try:
        yield
    finally:
        log.setLevel(level)
        log.propagate = propagate


class LogFile(logging.FileHandler):
    """Handler for ``log.txt``. Ignores write errors such as a full disk, which end the run anyway.

    Args:
        file: Log file. An existing file is appended to.
    """

    def __init__(self, file: Path) -> None:
        # File names are not necessarily valid UTF-8.
        super().__init__(file, encoding="utf-8", errors="backslashreplace")
        self.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s"))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):  # Closing flushes the buffer.
            super().close()


class ConsoleHandler(logging.Handler):
    """Print messages above the progress bar, without breaking long lines (commands, paths).

    Args:
        console: Console to print to.
        level: Lowest level that is printed.
    """

    def __init__(self, console: Console, level: int) -> None:
        super().__init__(level)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        if hasattr(record, "printed"):  # By the handler of an outer command.
            return
        record.printed = True
        style = "yellow" if record.levelno >= logging.WARNING else None
        self.console.print(
            printable(record.getMessage()),
            style=style,
            soft_wrap=True,
            markup=False,
            highlight=False,
        )


class _RunRecords(logging.Handler):
    """Write warnings and summaries of labelled data to ``run.json``."""

    def __init__(self, run: RunFile) -> None:
        super().__init__(logging.INFO)
        self.run = run

    def emit(self, record: logging.LogRecord) -> None:
        if hasattr(record, "labelled"):
            with suppress(OSError):
                self.run.describe(record.labelled)
        if record.levelno < logging.WARNING:
            return
        figures = record.args if isinstance(record.args, Mapping) else {}
        code = getattr(record, "code", DEFAULT_CODE)
        with suppress(OSError):  # A full disk is reported by the error that ends the run.
            self.run.warn(code, printable(record.getMessage()), figures)


class _Formatter(logging.Formatter):
    """Format each record as one line, also if it contains file names with newlines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return printable(super().formatMessage(record))


def _exception_record() -> logging.LogRecord:
    return log.makeRecord(
        log.name, logging.ERROR, __file__, 0, "stopped by an error", (), sys.exc_info()
    )
