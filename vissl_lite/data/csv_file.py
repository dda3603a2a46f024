"""Tables of images in a CSV file: what all forms of them have in common."""

import csv
import os
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

from vissl_lite.data.splits import VAL_NAMES
from vissl_lite.data.text_file import read_bytes
from vissl_lite.errors import UserError, brief

MOST_COLUMNS = 10_000

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
        UserError: it can't be read, is not UTF-8 but for names of files, or has a column twice or
            too many of them.
    """
    text = read_bytes(file).decode("utf-8-sig", "surrogateescape")
    reader = csv.DictReader(StringIO(text, newline=""), strict=True)
    try:
        columns = list(reader.fieldnames or [])
        if len(columns) > MOST_COLUMNS:
            raise UserError(f"{file} has {len(columns)} columns, more than {MOST_COLUMNS}")
        twice = [name for name, count in Counter(columns).items() if count > 1 and name.strip()]
        if twice:
            raise UserError(f"{file} has the column {brief(twice[0])} twice")
        rows = list(reader)
    except csv.Error as error:
        line = reader.line_num
        raise UserError(f"{file} can't be read as a CSV file: {error} (line {line})") from None
    others = [name for name in columns if name not in PATH_COLUMNS]
    words = [*columns, *(row[name] or "" for row in rows for name in others)]
    if not is_utf8("".join(words)):
        raise UserError(f"{file} can't be read: it is not text in UTF-8")
    return columns, rows


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
            raise UserError(f"{file} has a row whose {column} is missing: {brief(row)}")
    return [row[column] for row in rows]


def check_files(file: Path, paths: Collection[str]) -> None:
    """Raise a UserError if files that a CSV file names are missing."""
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise UserError(f"{file} names {len(missing)} missing files, the first {brief(missing[0])}")


def splits(file: Path, rows: Rows) -> list[str]:
    """The column split: train, val or test for each row.

    Raises:
        UserError: it says something else, or there are no training images.
    """
    names = ["val" if row["split"] in VAL_NAMES else row["split"] for row in rows]
    unknown = [name for name in names if name not in ("train", "val", "test")]
    if unknown:
        raise UserError(f"{file}: the split {brief(repr(unknown[0]))} is none of train, val, test")
    if "train" not in names:
        raise UserError(f"{file} has no training images (split train)")
    return names
