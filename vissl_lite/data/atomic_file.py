"""Atomic writing of files, and checks of output paths."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vissl_lite.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: there, nothing keeps two processes apart
    fcntl = None  # type: ignore[assignment]

# Bytes that a name and a path may have, so that there is room for suffixes and files within.
LONGEST_NAME, LONGEST = 240, 3800


@contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces a file atomically on success.

    Args:
        file: File to write; its folder is created if it is missing.

    Yields:
        What to write.

    Raises:
        UserError: Another process is writing the same file.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.part")
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another process is writing {file}: wait for it") from None
            except OSError:  # a file system without locks
                pass
        try:
            yield part
            os.replace(part, file)
        finally:
            part.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def write_atomically(file: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(file) as part:
        part.write_text(text, encoding="utf-8")


def check_place(out: Path) -> None:
    """Raise a UserError if a file or folder cannot be created there. Nothing is changed.

    Args:
        out: Path to create, with all missing folders.
    """
    if len(os.fsencode(out.absolute())) > LONGEST or len(os.fsencode(out.name)) > LONGEST_NAME:
        raise UserError(
            f"{out} is too long a name: give one of at most {LONGEST_NAME} bytes, and "
            f"{LONGEST} with its folders"
        )
    parent = next(p for p in (out, *out.absolute().parents) if p.exists())
    if parent.is_file() and parent == out:
        parent = parent.absolute().parent
    if not parent.is_dir():
        raise UserError(f"{out} can't be made: {parent} is a file")
    if not os.access(parent, os.W_OK):
        raise UserError(f"{out} can't be written: no permission in {parent}")
