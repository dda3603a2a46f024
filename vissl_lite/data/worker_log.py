"""What a data worker logs is logged by the process that started it: it has the log and the bar."""

import logging
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from threading import Thread

# What a pipe takes at once or not at all: the lines of several workers do not mix.
_AT_ONCE = 4000

log = logging.getLogger("vissl_lite")


class WorkerLog:
    """The log of a loader's workers. It ends with the loader and its workers."""

    def __init__(self) -> None:
        receiver, self._sender = Pipe(duplex=False)
        Thread(target=_say, args=(receiver,), name="worker log", daemon=True).start()

    def attach(self) -> None:
        """In a worker: send what is logged from now on."""
        log.handlers = [_Sender(self._sender)]
        log.propagate = False


class _Sender(logging.Handler):
    def __init__(self, sender: "Connection[bytes, bytes]") -> None:
        super().__init__(logging.INFO)
        self._sender = sender

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage().encode(errors="backslashreplace")
        with suppress(OSError):  # nobody listens any more
            self._sender.send_bytes(b"%d %s" % (record.levelno, text[:_AT_ONCE]))


def _say(receiver: "Connection[bytes, bytes]") -> None:
    with suppress(EOFError, OSError):
        while True:
            level, _, text = receiver.recv_bytes().partition(b" ")
            log.log(int(level), "%s", text.decode(errors="replace"))
