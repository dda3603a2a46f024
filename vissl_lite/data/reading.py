"""Opening of user files: regular files only, and no more pixels than allowed.

A pipe in a folder of images would be waited for and a device read until the memory is full. A file
of two kilobytes may decode to billions of pixels: its header is asked before anything is decoded.
"""

import errno
import logging
import os
import stat
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from vissl_lite.errors import UserError
from vissl_lite.faults import machine_error

log = logging.getLogger(__name__)

# Where Pillow refuses an image by default, at twice its ``MAX_IMAGE_PIXELS``: 1.5 GB in memory as
# 8-bit RGB with the copies that decoding makes.
MAX_PIXELS = 178_956_970

# Where OpenCV refuses one (``OPENCV_IO_MAX_IMAGE_PIXELS``).
_OPENCV_PIXELS = 1 << 30

# An image file may hold so many bytes for each pixel that is allowed, as four channels of 32 bits
# have, and some more: what else is in a file, such as the video of a phone's moving picture.
_BYTES_PER_PIXEL, _OTHER_BYTES = 16, 64 << 20

# Loggers of the libraries that decode images.
_DECODER_LOGGERS = ("PIL", "tifffile", "pydicom", "nibabel.global")

# Files that can't be read which are named one by one.
NAMED = 20

_max_pixels = MAX_PIXELS

_slice_axis: int | None = None

# What the system lacks counts as no flag. A terminal must not become this process's own.
_FLAGS = os.O_RDONLY
for _name in ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"):
    _FLAGS |= getattr(os, _name, 0)


# What opening a file says of the machine: not that file is broken, no file could be opened.
_NOT_THE_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class Broken(NamedTuple):
    """A file that cannot be read, and the reason."""

    path: str
    why: str


def limit_pixels(most: int) -> None:
    """Set the maximum number of pixels per image in this process, for Pillow too.

    ``WorkerLoader`` gives the limit to its data workers, however they are started.

    Args:
        most: Height times width, as the file's header has them, from 1 to 2**30.

    Raises:
        UserError: It is out of range.
    """
    global _max_pixels
    if not 1 <= most <= _OPENCV_PIXELS:
        raise UserError(
            f"--max_pixels {most} must be from 1 to {_OPENCV_PIXELS}, which is all that OpenCV "
            f"decodes"
        )
    _max_pixels = Image.MAX_IMAGE_PIXELS = most


def max_pixels() -> int:
    """The maximum number of pixels per image; see ``limit_pixels``."""
    return _max_pixels


def max_bytes() -> int:
    """The maximum number of bytes of an image file, and of what may be decompressed from one."""
    return _BYTES_PER_PIXEL * _max_pixels + _OTHER_BYTES


def slice_along(axis: int | None) -> None:
    """Set the axis of the slices of volumes in this process, which paths such as ``a.nii#5`` mean.

    ``WorkerLoader`` gives it to its data workers.

    Args:
        axis: 0 from left to right, 1 from back to front, 2 upwards; None for the one along which
            the slices of a volume are farthest apart.
    """
    global _slice_axis
    _slice_axis = axis


def slice_axis() -> int | None:
    """The axis of the slices of volumes; see ``slice_along``."""
    return _slice_axis


@contextmanager
def pixel_limit() -> Iterator[None]:
    """Restore the settings of ``limit_pixels`` and ``slice_along`` after a block."""
    global _max_pixels
    before, pillows, axis = _max_pixels, Image.MAX_IMAGE_PIXELS, _slice_axis
    try:
        yield
    finally:
        _max_pixels, Image.MAX_IMAGE_PIXELS = before, pillows
        slice_along(axis)


def silence_decoders() -> Callable[[], None]:
    """Keep decoders from printing messages about broken images, which are logged here.

    OpenCV is left alone where it is not loaded, and where ``OPENCV_LOG_LEVEL`` is set.

    Returns:
        What undoes it.
    """
    loggers = [logging.getLogger(name) for name in _DECODER_LOGGERS]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.CRITICAL + 1)
    before = list(warnings.filters)
    warnings.filterwarnings("ignore", module=r"(pydicom|nibabel|tifffile)\b")
    added = [one for one in warnings.filters if one not in before]
    opencv = sys.modules.get("cv2")
    logs = None if "OPENCV_LOG_LEVEL" in os.environ or opencv is None else opencv.utils.logging
    opencv_level = logs and logs.setLogLevel(logs.LOG_LEVEL_SILENT)

    def restore() -> None:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for one in added:
            with suppress(ValueError):
                warnings.filters.remove(one)  # type: ignore[attr-defined]
        if logs is not None:
            logs.setLogLevel(opencv_level)

    return restore


def check_pixels(height: int, width: int, path: str | Path) -> None:
    """Raise a ValueError if an image of this size must not be decoded.

    Args:
        height: Height in pixels, from the file's header.
        width: Likewise.
        path: Named in the error.
    """
    if height < 1 or width < 1:
        raise ValueError(f"{path}: {width} x {height} pixels")
    if height * width > _max_pixels:
        raise ValueError(f"{path}: {height * width} pixels, more than --max_pixels {_max_pixels}")


def _open(path: str | Path) -> tuple[int, int]:
    """A file descriptor and the file's size in bytes.

    Raises:
        OSError: It is missing, or not a regular file.
        MachineError: No file can be opened now.
    """
    # without O_NONBLOCK, opening a pipe would wait for who writes to it
    try:
        descriptor = os.open(path, _FLAGS)
    except OSError as error:
        fault = machine_error(error) if error.errno in _NOT_THE_FILES else None
        raise fault or error from None
    about = os.fstat(descriptor)  # not of the path: what lies there can be replaced
    if not stat.S_ISREG(about.st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return descriptor, about.st_size


def open_regular(path: str | Path) -> BufferedReader:
    """Open a regular file for reading, without blocking on pipes or devices.

    Raises:
        OSError: It is missing, or a folder, a pipe, a device or a socket.
    """
    return open(_open(path)[0], "rb")


def read_regular(path: str | Path, largest: int | None = None) -> bytes:
    """Read the bytes of a regular file.

    Args:
        path: Only a regular file is read: of a pipe or a device the end may never come.
        largest: Size in bytes of the largest file that is read; default what an image of
            ``max_pixels`` can have.

    Raises:
        OSError: See ``open_regular``.
        ValueError: The file is larger.
    """
    descriptor, size = _open(path)
    try:
        most, why = largest, ""
        if most is None:
            most = max_bytes()
            why = f" for --max_pixels {_max_pixels}"
        if size > most:
            raise ValueError(f"{path}: {size} bytes, more than the {most}{why}")
        data = os.read(descriptor, size)
        while len(data) < size:  # a call gives 2 GB at most, and the file may have been cut since
            more = os.read(descriptor, size - len(data))
            if not more:
                break
            data += more
        return data
    finally:
        os.close(descriptor)


def printable(text: str) -> str:
    """Text in one line without control characters, for messages that name a file.

    What is not printable, such as a newline or a mark that turns the direction of writing, becomes
    an escape sequence, and so do bytes that are not UTF-8 (lone surrogates).
    """
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def reason(error: Exception, path: str | Path) -> str:
    """The reason why a file cannot be read, in a few words.

    Args:
        error: One of ``BROKEN_IMAGE``.
        path: The file, which the words need not name again.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    words = getattr(error, "err", None) or str(error)  # OpenCV's begins with its version
    for name in (path, str(path).rpartition("#")[0]):  # with and without the number of a frame
        words = words.removeprefix(f"{name}: ")
    return words.split("\n")[0] or type(error).__name__


def report_skipped(broken: Sequence[Broken]) -> None:
    """Log the skipped files with their reasons: the first ones and the number of others."""
    for number, one in enumerate(broken):
        level = logging.WARNING if number < NAMED else logging.DEBUG
        log.log(
            level,
            "skipped, can't be read: %(path)s (%(why)s)",
            one._asdict(),
            extra={"code": "image.unreadable"},
        )
    if len(broken) > NAMED:
        log.warning(
            "skipped, can't be read: %(files)d more files",
            {"files": len(broken) - NAMED},
            extra={"code": "image.unreadable"},
        )
