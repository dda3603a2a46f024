"""Reading of text files that may be damaged or malicious."""

import csv
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vissl_lite.data.reading import read_regular, reason
from vissl_lite.errors import UserError

# Size in bytes of the largest text file that is read unless told otherwise: a table of a large set.
MAX_TEXT_BYTES = 2**30


def read_bytes(file: str | Path, largest: int = MAX_TEXT_BYTES, name: str | None = None) -> bytes:
    """Read a file.

    Args:
        file: Only a regular file is read: of a pipe or a device the end may never come.
        largest: Size in bytes of the largest file that is read.
        name: Name of the file in errors; default its path.

    Raises:
        UserError: There is no such file, it is larger, or it can't be read.
    """
    name = str(file) if name is None else name
    try:
        return read_regular(file, largest)
    except (OSError, ValueError) as error:  # ValueError: it is larger, or its path has a NUL byte
        raise UserError(f"{name} can't be read: {reason(error, file)}") from None


def read_text(file: str | Path, largest: int = MAX_TEXT_BYTES, name: str | None = None) -> str:
    """Read a text file in UTF-8, with or without a byte order mark; see ``read_bytes``.

    Raises:
        UserError: It can't be read, or is in another encoding.
    """
    content = read_bytes(file, largest, name)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name or file} can't be read: it is not text in UTF-8 (byte {error.start})"
        ) from None


def write_paths(file: Path, paths: Iterable[str]) -> None:
    """Write paths, one per line; names that are not UTF-8 keep their bytes.

    A path with a line break, or one that begins with a quotation mark, is written as a JSON string.
    """
    quoted = (json.dumps(one) if "\n" in one or one.startswith('"') else one for one in paths)
    lines = "".join(f"{line}\n" for line in quoted)
    file.write_text(lines, encoding="utf-8", errors="surrogateescape")


def read_paths(file: Path) -> list[str]:
    """Read what ``write_paths`` has written.

    Raises:
        UserError: The file can't be read, or is damaged.
    """
    text = read_bytes(file).decode("utf-8", "surrogateescape")
    try:
        # str.splitlines would divide a name at further characters
        lines = text.split("\n")[:-1]
        return [str(json.loads(one)) if one.startswith('"') else one for one in lines]
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}") from None


@contextmanager
def csv_writer(file: Path) -> Iterator[Any]:
    """Write a CSV file in UTF-8 that keeps file names as they are on the disk.

    They are read back as they were with Python's ``open`` with ``errors="surrogateescape"``.

    Yields:
        A ``csv.writer``.
    """
    with file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as out:
        yield csv.writer(out)
