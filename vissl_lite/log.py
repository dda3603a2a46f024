"""Where a command's messages go: to the console, and to ``log.txt`` and ``run.json`` of its run.

Every module logs to a logger below ``vissl_lite``, as usual. A warning has a code for its kind, and
its figures by name, which ``run.json`` keeps as data::

    log.warning("skipped: %(path)s (%(why)s)", {"path": path, "why": why},
                extra={"code": "image.unreadable"})

Importing the package sets up nothing. While a command runs, its messages are not passed on to the
handlers of the root logger; when it ends, the logger ``vissl_lite`` is as it was before.
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

# Messages before there is a run that are kept at most; older ones are dropped.
KEPT = 10_000

# The code of a warning that gives none.
NO_CODE = "other"


class _Early(logging.Handler):
    """Keeps what is logged before there is a run, such as what was cleaned in the data."""

    def __init__(self) -> None:
        super().__init__()
        self.records: deque[logging.LogRecord] = deque(maxlen=KEPT)

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


_early: list[_Early] = []  # of each command that runs, the innermost last


@contextmanager
def command_log() -> Iterator[None]:
    """Keep what a command logs until it has a run, or a console, to log to."""
    early = _Early()
    with _logs_as_a_command():
        _early.append(early)
        log.addHandler(early)
        try:
            yield
        finally:
            log.removeHandler(early)
            _early.remove(early)


@contextmanager
def logged_to(*handlers: logging.Handler) -> Iterator[None]:
    """Log to handlers, first what the command has logged so far. They are closed at the end."""
    with _logs_as_a_command():
        for handler in handlers:
            log.addHandler(handler)
        for early in _early[-1:]:
            log.removeHandler(early)
            for record in early.records:
                for handler in handlers:
                    if record.levelno >= handler.level:
                        handler.handle(record)
            early.records.clear()
        try:
            yield
        finally:
            for handler in handlers:
                log.removeHandler(handler)
                handler.close()


@contextmanager
def logged_to_run(run: RunFile, console: Console) -> Iterator[None]:
    """Log to ``log.txt`` and ``run.json`` of a run, what ended it included, and to the console.

    Args:
        run: The open run.
        console: Where to show messages.
    """
    file = LogFile(run.folder / "log.txt")
    with logged_to(file, _Records(run), ConsoleHandler(console, logging.INFO)):
        try:
            yield
        except (UserError, KeyboardInterrupt, Terminated) as error:
            log.debug("stopped: %s", str(error) or "interrupted (Ctrl-C)")
            raise
        except Exception:
            file.handle(_record_of_exception())
            raise


@contextmanager
def _logs_as_a_command() -> Iterator[None]:
    level, propagate = log.level, log.propagate
    log.setLevel(logging.DEBUG)
    log.propagate = False
    try:
        yield
    finally:
        log.setLevel(level)
        log.propagate = propagate


class LogFile(logging.FileHandler):
    """``log.txt``. Where it can't be written, as on a full disk, the run itself says so.

    Args:
        file: Appended to where it exists.
    """

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


class ConsoleHandler(logging.Handler):
    """Prints above a progress bar, and leaves long lines (commands, paths) whole.

    Args:
        console: Where to print.
        level: The lowest level that is shown.
    """

    def __init__(self, console: Console, level: int) -> None:
        super().__init__(level)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        if hasattr(record, "shown"):  # by the handler of a command around this one
            return
        record.shown = True
        style = "yellow" if record.levelno >= logging.WARNING else None
        self.console.print(
            printable(record.getMessage()),
            style=style,
            soft_wrap=True,
            markup=False,
            highlight=False,
        )


class _Records(logging.Handler):
    """Writes warnings into ``run.json``."""

    def __init__(self, run: RunFile) -> None:
        super().__init__(logging.WARNING)
        self.run = run

    def emit(self, record: logging.LogRecord) -> None:
        figures = record.args if isinstance(record.args, Mapping) else {}
        with suppress(OSError):  # of a full disk, the error that ends the run tells
            self.run.warn(getattr(record, "code", NO_CODE), printable(record.getMessage()), figures)


class _Formatter(logging.Formatter):
    """An entry takes a line, whatever the files are called that it names."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return printable(super().formatMessage(record))


def _record_of_exception() -> logging.LogRecord:
    return log.makeRecord(
        log.name, logging.ERROR, __file__, 0, "stopped by an error", (), sys.exc_info()
    )
