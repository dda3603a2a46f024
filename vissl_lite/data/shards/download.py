"""Read from a URL or a command, with a limit of the waiting time.

HTTP and similar protocols use ``curl``, which knows the proxies, certificates and passwords of the
machine; it is started with a list of arguments, never through a shell. Other schemes are opened by
WebDataset's ``gopen``.

The waiting time grows by the time spent waiting and shrinks by ``1 / SLOWEST`` seconds for every
new byte. This covers servers that stall, are too slow, are unreachable or drop connections. Time
between reads does not count.
"""

import io
import logging
import os
import select
import time
from contextlib import suppress
from http.client import responses
from subprocess import DEVNULL, PIPE, Popen, TimeoutExpired
from typing import IO, Protocol

log = logging.getLogger(__name__)

# Maximum waiting time in seconds for a server, and for a command, which may need time to prepare
# its output; and seconds after which a warning is logged
PATIENCE, COMMAND_PATIENCE, WARN_AFTER = 30.0, 300.0, 5.0

# Minimum bytes per second; a slower server counts as stalled
SLOWEST = 10_000

# Seconds without a byte after which an established connection counts as lost and is reopened
MAX_SILENCE = 10.0

# Seconds to wait before each retry; starts over after a new byte
PAUSES = (1.0, 2.0, 4.0, 8.0)

# Connection timeout of curl in seconds, and the polling interval, which limits the time counted per
# wait: a suspended process has not waited for the server.
_CONNECT, _TICK = 10, 0.5

BUFFER = 1 << 18

# Schemes opened with curl
CURL_SCHEMES = ("http", "https", "ftps", "sftp", "scp")

# Exit codes of curl (its manual, section "Exit codes") without and with a chance to retry
_HOPELESS = {
    1: "the server does not speak the protocol of the URL",
    3: "it is not a URL",
    8: "the server does not speak the protocol of the URL",
    47: "the server redirects without end",
    51: "the server's certificate is not trusted",
    60: "the server's certificate is not trusted",
    67: "the server refuses the login",
    78: "the server does not have it",
}
_UNREACHABLE = {
    5: "the proxy is unknown",
    6: "the host is unknown",
    7: "there is no connection",
}
_LOST = {
    18: "the connection was lost",
    28: "the server does not answer",
    35: "there is no secure connection",
    52: "the connection was lost",
    55: "the connection was lost",
    56: "the connection was lost",
    92: "the connection was lost",
}
_SILENT = "the server sends nothing"
_HTTP_ERROR, _NO_RANGES, _BEHIND_THE_END = 22, 33, 416
_PASSING = (408, 425, 429, 500, 502, 503, 504)


class DownloadError(OSError):
    """A URL can't be read, or not to its end; the message is the reason."""


class Readable(Protocol):
    """Protocol of a byte stream whose ``read`` returns fewer bytes only at the end."""

    def read(self, size: int, /) -> bytes:
        """Return the next bytes."""


def scheme(url: str) -> str:
    """Scheme of a URL, such as ``http``; ``pipe`` for a command."""
    return url.partition(":")[0].lower()


def open_url(url: str, persistent: bool = True) -> "io.BufferedReader":
    """Open a URL, or the output of a command after ``pipe:``, for sequential reading.

    Reading may raise a ``DownloadError``.

    Args:
        url: URL or command.
        persistent: Also retry if the host is unknown or unreachable, or the command fails.
    """
    return io.BufferedReader(_Download(url, persistent), BUFFER)


def fetch(url: str, most: int) -> bytes:
    """Read the whole content of a URL.

    Args:
        url: URL or command.
        most: Maximum number of bytes.

    Raises:
        DownloadError: If it can't be read to its end, or is larger.
    """
    with open_url(url, persistent=False) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise DownloadError(f"it is larger than {most >> 20} MiB")
    return content


class _Download(io.RawIOBase):
    """Raw stream that resumes lost connections, by a range request or by skipping bytes."""

    def __init__(self, url: str, persistent: bool) -> None:
        self.url, self._persistent = url, persistent
        self._curl = scheme(url) in CURL_SCHEMES
        self._patience = PATIENCE if self._curl else COMMAND_PATIENCE
        self._at = self._skip = 0  # Bytes received, and bytes to skip after a restart
        self._ranges, self._flowing = True, False
        self._waited, self._warned, self._tries = 0.0, False, 0
        self._why = _SILENT if self._curl else "the command writes nothing"
        self._process: Popen[bytes] | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "memoryview[int]", /) -> int:  # type: ignore[override]
        while True:
            process = self._process or self._start()
            assert process.stdout is not None
            if not self._wait_for(process.stdout):
                self._stop()
                self._pause(_SILENT)
                continue
            data = os.read(process.stdout.fileno(), len(buffer))
            if not data:
                if self._ended(process):
                    return 0
                continue
            self._flowing = True
            again = min(len(data), self._skip)
            self._skip -= again
            new = len(data) - again
            if new:
                self._at += new
                self._tries = 0
                self._waited = max(0.0, self._waited - new / SLOWEST)
                buffer[:new] = data[again:]
                return new

    def close(self) -> None:
        self._stop()
        super().close()

    def _start(self) -> "Popen[bytes]":
        self._flowing = False
        self._skip = 0 if self._curl and self._ranges else self._at
        try:
            if self._curl:
                command = _curl(self.url, self._at - self._skip)
                self._process = Popen(command, stdin=DEVNULL, stdout=PIPE, stderr=PIPE)
            else:
                from webdataset.gopen import gopen

                self._opened = gopen(self.url)  # Kept alive: ends the command when collected
                self._process = self._opened.proc
        except FileNotFoundError as error:
            program = error.filename or scheme(self.url)
            raise DownloadError(f"{program} is not installed, which opens it") from None
        assert self._process is not None
        return self._process

    def _wait_for(self, file: IO[bytes]) -> bool:
        """Wait for data or the end; return False if the connection seems lost."""
        if not hasattr(select, "poll"):  # Windows can't poll pipes
            return True
        ready = select.poll()
        ready.register(file, select.POLLIN)
        quiet = 0.0
        while True:
            start = time.monotonic()
            came = ready.poll(1000 * _TICK)
            waited = min(time.monotonic() - start, 2 * _TICK)
            self._count_waiting(waited)
            quiet += waited
            if came:
                return True
            if quiet > MAX_SILENCE and self._curl and self._flowing:
                return False

    def _count_waiting(self, seconds: float) -> None:
        self._waited += seconds
        if self._waited > self._patience:
            raise DownloadError(f"{self._state()}, given up after {self._patience:.0f} s")
        if self._waited > WARN_AFTER and not self._warned:
            self._warned = True
            left = self._patience - self._waited
            log.warning(
                "waiting for %(url)s: %(state)s; given up in %(seconds).0f s at most",
                {"url": self.url, "state": self._state(), "seconds": left},
                extra={"code": "download.waiting"},
            )

    def _state(self) -> str:
        slow = self._at and not self._tries
        return f"fewer than {SLOWEST} bytes per second come" if slow else self._why

    def _ended(self, process: "Popen[bytes]") -> bool:
        """Return True at the end of the data and False to retry; raise other errors."""
        with suppress(TimeoutExpired):
            process.wait(_CONNECT)
        status, answer = process.returncode, b""
        if process.stderr is not None and status is not None:
            answer = process.stderr.read()[-3:]
        self._stop()
        code = int(answer) if answer.isdigit() else 0  # HTTP status
        if not status or (code == _BEHIND_THE_END and self._at):
            if self._skip:
                raise DownloadError("it is shorter than it was")
            return True
        if self._curl and status == _NO_RANGES and self._ranges:
            self._ranges = False  # Restart from the beginning
            return False
        why, again = self._reason(status, code)
        if not again:
            raise DownloadError(why)
        self._pause(why)
        return False

    def _pause(self, why: str) -> None:
        """Wait before the next retry; raise if none is left."""
        if self._tries == len(PAUSES):
            raise DownloadError(why)
        self._why = why
        end = time.monotonic() + PAUSES[self._tries]
        self._tries += 1
        while (left := min(end - time.monotonic(), _TICK)) > 0:
            time.sleep(left)
            self._count_waiting(left)

    def _reason(self, status: int, code: int) -> tuple[str, bool]:
        """Describe an exit status, and whether a retry may help."""
        if not self._curl:
            program = "the command" if scheme(self.url) == "pipe" else scheme(self.url)
            return f"{program} ended with {status}", self._persistent
        if status == _HTTP_ERROR and code:
            return f"the server answers {code} {responses.get(code, '')}".strip(), code in _PASSING
        if status in _HOPELESS:
            return _HOPELESS[status], False
        if status in _UNREACHABLE:
            return _UNREACHABLE[status], self._persistent
        return _LOST.get(status, f"curl ended with {status}"), status in _LOST or status < 0

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        for file in (process.stdout, process.stderr):
            if file is not None:
                file.close()
        process.kill()  # Data workers block SIGTERM
        process.wait()


def _curl(url: str, start: int) -> list[str]:
    """Build the curl command that reads a URL from some byte on."""
    command = ["curl", "--silent", "--no-buffer", "--fail", "--globoff"]
    command += ["--location", "--max-redirs", "10"]
    command += ["--proto", f"={','.join(CURL_SCHEMES)}", "--proto-redir", "=http,https"]
    # The speed limit ends curl if its parent was killed. It may also end it while the parent is not
    # reading; then it is restarted.
    command += ["--connect-timeout", str(_CONNECT), "--speed-limit", "1", "--speed-time", "300"]
    command += ["--write-out", "%{stderr}%{http_code}"]
    if start:
        command += ["--continue-at", str(start)]
    return [*command, "--url", url]
