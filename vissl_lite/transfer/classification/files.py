"""Reading of labels from class folders or CSV files."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vissl_lite.data.images import find_images
from vissl_lite.errors import UserError, brief
from vissl_lite.transfer.sources import (
    VAL_NAMES,
    Rows,
    cells,
    check_files,
    is_utf8,
    need_rows,
    read_rows,
    splits,
)

_PATH_COLUMNS = ("path", "image", "file", "filename")
_LABEL_COLUMNS = ("label", "class")

# What stands between names: in a column labels; in a column label, where a comma may be part of
# a name (a column class is never divided).
SEPARATORS, LABEL_SEPARATORS = "[|;,]", "[|;]"

# Cells of a column that stands for a class; pandas writes 1.0 where other cells are empty.
_YES, _NO = frozenset({"1", "1.0", "true"}), frozenset({"0", "0.0", "false", ""})


class FoundLabels(NamedTuple):
    """Labels found in class folders or a CSV file.

    Attributes:
        images: Path, and the names of the classes: one, unless this is multi-label.
        splits: Train, val or test for each image; None where nothing is said.
        multi_label: Whether an image may have several classes, or none.
        classes: Names that are known without an image, from the header.
        note: Message about how the labels were read.
    """

    images: list[tuple[str, tuple[str, ...]]]
    splits: list[str] | None = None
    multi_label: bool = False
    classes: Sequence[str] = ()
    note: str = ""


class _Column(NamedTuple):
    """The labels of the rows of a CSV file; the rest as in ``FoundLabels``."""

    names: list[tuple[str, ...]]
    multi_label: bool = False
    classes: Sequence[str] = ()
    note: str = ""


def read_folder(folder: Path) -> FoundLabels:
    """Read labels from ``train/<class>/*`` (with ``test/``, optionally ``val/``) or ``<class>/*``.

    Raises:
        UserError: There are no class folders, or one has no images.
    """
    if not (folder / "train").is_dir():
        return FoundLabels(_class_folders(folder))
    val = next((folder / name for name in VAL_NAMES if (folder / name).is_dir()), folder / "val")
    images, splits = [], []
    for name, part in (("train", folder / "train"), ("val", val), ("test", folder / "test")):
        found = _class_folders(part) if part.is_dir() else []
        images += found
        splits += [name] * len(found)
    return FoundLabels(images, splits)


def _class_folders(folder: Path) -> list[tuple[str, tuple[str, ...]]]:
    classes = sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    if not classes:
        raise UserError(f"{folder} has no class folders: expected {folder}/<class>/*.jpg")
    for one in classes:
        if not is_utf8(one.name):  # it goes into models, tables and pictures
            raise UserError(
                f"{folder}: the class folder {one.name!a} has a name that is not UTF-8: rename it"
            )
    return [(path, (one.name,)) for one in classes for path in find_images([one])]


def read_csv(file: Path) -> FoundLabels:
    """Read labels from a CSV file; see ``load_labelled`` for the forms.

    Returns:
        The images sorted by path, so that no split depends on the order of rows.

    Raises:
        UserError: The file can't be read, lacks a column or a value, or names missing files.
    """
    columns, rows = read_rows(file)
    path = next((name for name in _PATH_COLUMNS if name in columns), None)
    if path is None:
        raise UserError(
            f"{file} has no column {' or '.join(_PATH_COLUMNS)}: it has {brief(', '.join(columns))}"
        )
    need_rows(file, rows)
    cells(file, rows, path)
    rows.sort(key=lambda row: row[path])
    labels = _labels(file, columns, rows, path)
    paths = [str(file.parent / row[path]) for row in rows]
    check_files(file, paths)
    parts = splits(file, rows) if "split" in columns else None
    images = list(zip(paths, labels.names, strict=True))
    return FoundLabels(images, parts, labels.multi_label, labels.classes, labels.note)


def _labels(file: Path, columns: list[str], rows: Rows, path: str) -> _Column:
    one = next((name for name in _LABEL_COLUMNS if name in columns), None)
    if one is not None:
        found = cells(file, rows, one)
        divided = next((cell for cell in found if re.search(LABEL_SEPARATORS, cell)), None)
        if one == "class" or divided is None:
            return _Column([(cell,) for cell in found])
        note = (
            f"{file}: {brief(repr(divided))} is read as several labels of one image; call the "
            f"column class to have names taken as they stand"
        )
        return _Column([_divide(cell, LABEL_SEPARATORS) for cell in found], True, note=note)
    if "labels" in columns:
        found = cells(file, rows, "labels", may_be_empty=True)
        return _Column([_divide(cell, SEPARATORS) for cell in found], True)
    return _class_columns(file, columns, rows, path)


def _divide(cell: str, separators: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in re.split(separators, cell) if name.strip())


def _class_columns(file: Path, columns: list[str], rows: Rows, path: str) -> _Column:
    """Labels from one column of 0 and 1 per class.

    Columns without any 0 or 1, such as notes, are left out; in one that holds something else
    beside them a label may have gone wrong, so that is an error.
    """
    has: dict[str, list[bool]] = {}
    left_out = []
    for column in columns:
        if column in (path, "split") or not column.strip():  # pandas' row numbers have no name
            continue
        found = [cell.strip().lower() for cell in cells(file, rows, column, may_be_empty=True)]
        odd = [cell for cell in found if cell not in _YES | _NO]
        if not odd:
            has[column.strip()] = [cell in _YES for cell in found]
        elif any(cell and cell in _YES | _NO for cell in found):
            raise UserError(
                f"{file}: the column {brief(column)} has {brief(repr(odd[0]))} beside "
                f"0 and 1; without a column label or labels, the column of a class "
                f"holds 0 or 1, and other columns neither"
            )
        else:
            left_out.append(column)
    if not has:
        raise UserError(
            f"{file} has no column {' or '.join(_LABEL_COLUMNS)}: it has "
            f"{brief(', '.join(columns))}; for several labels per image give a column "
            f"labels, or one of 0 and 1 for each class"
        )
    names = [tuple(name for name in has if has[name][row]) for row in range(len(rows))]
    note = ""
    if left_out:
        note = f"{file}: left out, as no 0 or 1 is in them: {brief(', '.join(left_out))}"
    return _Column(names, True, list(has), note)
