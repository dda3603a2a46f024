"""Forwarding of log messages from data workers to the main process."""

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from threading import Thread

# What a pipe takes at once or not at all: the lines of several workers do not mix.
_AT_ONCE = 4000

# Letters that fit into it, whichever they are.
_SURELY = 600

log = logging.getLogger("vissl_lite")


class WorkerLog:
    """Log messages of the workers of a loader."""

    def __init__(self) -> None:
        receiver, self._sender = Pipe(duplex=False)
        Thread(target=_say, args=(receiver,), name="worker log", daemon=True).start()

    def attach(self) -> None:
        """Forward log messages; called in a worker."""
        log.handlers = [_LogSender(self._sender)]
        log.propagate = False


class _LogSender(logging.Handler):
    def __init__(self, sender: "Connection[bytes, bytes]") -> None:
        super().__init__(logging.INFO)
        self._sender = sender

    def emit(self, record: logging.LogRecord) -> None:
        message, figures = record.getMessage(), {}
        if isinstance(record.args, Mapping):
            figures = {
                name: one if isinstance(one, int | float) else str(one)
                for name, one in record.args.items()
            }
        code = getattr(record, "code", None)
        for sent in ((message, figures), (message, {}), (message[:_SURELY], {})):
            text = json.dumps([record.levelno, code, *sent], ensure_ascii=False)
            content = text.encode(errors="backslashreplace")  # which JSON takes for what it was
            if len(content) <= _AT_ONCE:
                break
        with suppress(OSError):  # nobody listens any more
            self._sender.send_bytes(content)


def _say(receiver: "Connection[bytes, bytes]") -> None:
    with suppress(EOFError, OSError):
        while True:
            level, code, message, figures = json.loads(receiver.recv_bytes())
            extra = None if code is None else {"code": code}
            if figures:  # it has them already
                log.log(level, message.replace("%", "%%"), figures, extra=extra)
            else:
                log.log(level, "%s", message, extra=extra)
