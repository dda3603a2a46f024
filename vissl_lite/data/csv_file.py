"""Tables of images in a CSV file: what all forms of them have in common."""

import csv
import io
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vissl_lite.data.reading import open_regular
from vissl_lite.data.splits import VAL_NAMES
from vissl_lite.errors import UserError

Rows = list[dict[str, str]]

# Columns that name files; these need not be UTF-8.
PATH_COLUMNS = ("path", "image", "file", "filename", "mask")


@contextmanager
def csv_writer(file: Path) -> Iterator[Any]:
    """Write a CSV file in UTF-8 into which names of files go as they are on the disk.

    ``read_rows`` gives them back, as does Python's ``open`` with ``errors="surrogateescape"``.

    Yields:
        A ``csv.writer``.
    """
    with file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as out:
        yield csv.writer(out)


def read_rows(file: Path) -> tuple[list[str], Rows]:
    """The columns and rows of a CSV file.

    Raises:
        UserError: it can't be read, or is not UTF-8 but for names of files.
    """
    try:
        with open_regular(file) as opened:
            content = opened.read()
        text = content.decode("utf-8-sig", "surrogateescape")
        reader = csv.DictReader(io.StringIO(text, newline=""))
        rows = list(reader)
        columns = list(reader.fieldnames or [])
        others = [name for name in columns if name not in PATH_COLUMNS]
        words = [*columns, *(row[name] or "" for row in rows for name in others)]
        if not is_utf8("".join(words)):
            content.decode("utf-8-sig")
        return columns, rows
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} can't be read as a CSV file: {error}") from None


def is_utf8(text: str) -> bool:
    """Whether text can be written in UTF-8; names of files need not be, see PEP 383."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def need_rows(file: Path, rows: Rows) -> None:
    """Raise a UserError if there is nothing but a header."""
    if not rows:
        raise UserError(f"{file} has no rows")


def cells(file: Path, rows: Rows, column: str, may_be_empty: bool = False) -> list[str]:
    """A column; a row that is cut short is an error, and so is an empty cell unless allowed."""
    for row in rows:
        if row[column] is None or not (row[column] or may_be_empty):
            raise UserError(f"{file} has a row whose {column} is missing: {row}")
    return [row[column] for row in rows]


def check_files(file: Path, paths: Collection[str]) -> None:
    """Raise a UserError if files that a CSV file names are missing."""
    missing = [path for path in paths if not Path(path).is_file()]
    if missing:
        raise UserError(f"{file} names {len(missing)} missing files, the first {missing[0]}")


def splits(file: Path, rows: Rows) -> list[str]:
    """The column split: train, val or test for each row.

    Raises:
        UserError: it says something else, or there are no training images.
    """
    names = ["val" if row["split"] in VAL_NAMES else row["split"] for row in rows]
    unknown = [name for name in names if name not in ("train", "val", "test")]
    if unknown:
        raise UserError(f"{file}: the split {unknown[0]!r} is none of train, val, test")
    if "train" not in names:
        raise UserError(f"{file} has no training images (split train)")
    return names
