"""Tables of images as text: CSV and its relatives, JSON Lines, and lists of paths and labels."""

import csv
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

from vissl_lite.data.formats import is_image_path, split_suffix
from vissl_lite.data.images import EXTENSIONS
from vissl_lite.data.text_file import read_bytes
from vissl_lite.errors import UserError, brief
from vissl_lite.options import StrPath
from vissl_lite.transfer.options import SourceOptions
from vissl_lite.transfer.sources.file_tree import FileTree, part_below
from vissl_lite.transfer.sources.parts import Split, part_of_name
from vissl_lite.transfer.sources.reading_log import MISSING_IMAGE, ReadingLog

# Suffixes of the files that ``read_table`` reads.
TABLES = (".csv", ".tsv", ".tab", ".jsonl", ".ndjson", ".txt", ".lst")

MAX_COLUMNS = 10_000

JSON_LINES = "JSON Lines"  # the form of such a table

# Largest share of the rows that may be unusable.
MAX_LEFT_OUT = 0.5

# Number of rows that are looked at to tell the separator and the columns apart.
_SAMPLE = 100

_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}

# Columns by their usual names, see ``normalized``; the first that is found counts.
PATH_COLUMNS = tuple(
    """path filepath file_path filepaths image_path img_path image_file file file_name filename
    image img images image_name img_name image_index image_id imageid id_code id""".split()
)
SPLIT_COLUMNS = tuple(
    "split set subset partition data_set dataset fold is_valid is_val is_test".split()
)

GROUP_COLUMNS = tuple(
    """group group_id patient patient_id patientid subject subject_id lesion_id slide_id scene_id
    volume_id case_id""".split()
)

_INDEX_COLUMNS = frozenset({"", "index", "unnamed_0"})

_YES, _NO = frozenset({"1", "1.0", "true", "yes"}), frozenset({"0", "0.0", "false", "no", ""})


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        file: File that it was read from.
        columns: Names of the columns; their numbers from 1 if the file has no header.
        rows: Cells by column.
        form: How the file was read, such as ``separated by tabs, without a header``.
    """

    file: Path
    columns: list[str]
    rows: list[dict[str, str]]
    form: str = ""

    def column(self, names: Sequence[str]) -> str | None:
        """The first column with one of these (normalized) names, or None."""
        found = {normalized(name): name for name in reversed(self.columns)}
        return next((found[name] for name in names if name in found), None)

    def given_column(self, option: str, name: str) -> str:
        """The column that an option names, in any case.

        Raises:
            UserError: There is none.
        """
        alike = [one for one in self.columns if one == name] or [
            one for one in self.columns if normalized(one) == normalized(name)
        ]
        if not alike:
            raise UserError(
                f"--{option} {brief(name)}: {self.file} has no such column, but "
                f"{brief(', '.join(self.columns))}"
            )
        return alike[0]

    def cells(self, column: str) -> list[str]:
        """The cells of a column without spaces around them; missing ones are empty."""
        return [(row.get(column) or "").strip() for row in self.rows]


def normalized(column: str) -> str:
    """The name of a column in lower case, with ``_`` for everything but letters and digits."""
    return re.sub(r"[\W_]+", "_", column.lower()).strip("_")


def read_table(
    file: Path,
    is_image: Callable[[str], bool],
    known: Collection[str] = (),
    may_be_empty: bool = False,
) -> Table:
    """Read a table; the separator and whether there is a header are found out.

    The separator is a comma, a semicolon or a tab; in text files (``.txt``, ``.lst``) also white
    space before the last word of each line. The first line is a header unless one of its cells
    names an image.

    Args:
        file: One of ``TABLES``; JSON Lines have an object on each line. Text is in UTF-8 or, with a
            byte order mark, UTF-16; names of files need not be.
        is_image: Function that tells whether a cell names an existing image.
        known: Further normalized names of columns, by which a header is recognized.
        may_be_empty: Whether a table without rows is no error.

    Raises:
        UserError: The file can't be read as a table, or has a column twice, or no rows.
    """
    content = read_bytes(file)
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        try:
            text = content.decode("utf-16")
        except UnicodeDecodeError:
            raise UserError(f"{file} can't be read: it is not text in UTF-16") from None
    else:
        text = content.decode("utf-8-sig", "surrogateescape")
    text = re.sub(r"\Asep=.\r?\n", "", text)  # as Excel writes it
    if "\0" in text:
        raise UserError(f"{file} can't be read as a table: it has NUL bytes")
    if file.suffix.lower() in (".jsonl", ".ndjson"):
        table = _read_json_lines(file, text)
    else:
        table = _read_separated(file, text, is_image, known)
    if len(table.columns) > MAX_COLUMNS:
        raise UserError(f"{file} has {len(table.columns)} columns, more than {MAX_COLUMNS}")
    twice = [name for name, count in Counter(table.columns).items() if count > 1 and name.strip()]
    if twice:
        raise UserError(f"{file} has the column {brief(twice[0])} twice")
    if not table.rows and not may_be_empty:
        raise UserError(f"{file} has no rows")
    return table


def _read_separated(
    file: Path, text: str, is_image: Callable[[str], bool], known: Collection[str]
) -> Table:
    separator = _separator(text, file)
    if separator == " ":
        lines: Iterator[list[str]] = iter([line.rsplit(None, 1) for line in text.splitlines()])
    else:
        lines = _parse(file, text, separator)
    rows = [row for row in lines if any(cell.strip() for cell in row)]
    first = rows[0] if rows else []
    names = {normalized(cell) for cell in first}
    header = bool(names.intersection([*PATH_COLUMNS, *known])) or not any(map(is_image, first))
    form = "separated by " + {**_SEPARATORS, " ": "white space"}[separator]
    if header:
        columns = [cell.strip() for cell in first]
        rows = rows[1:]
    else:
        columns = [str(number) for number in range(1, len(first) + 1)]
        form += ", without a header"
    return Table(file, columns, [dict(zip(columns, row, strict=False)) for row in rows], form)


def _separator(text: str, file: Path) -> str:
    """The separator that divides the first lines into the most columns, the same in each."""
    sample = "\n".join(text.split("\n", _SAMPLE)[:_SAMPLE])
    best, most = ",", 1
    for separator in _SEPARATORS:
        try:
            rows = [row for row in csv.reader(StringIO(sample), delimiter=separator) if row]
        except csv.Error:
            continue
        fewest = min(map(len, rows[:-1] or rows), default=0)
        if fewest > most:
            best, most = separator, fewest
    if most == 1 and file.suffix.lower() in (".txt", ".lst"):
        words = [len(line.split()) for line in sample.splitlines() if line.strip()]
        if words and min(words) > 1:
            return " "
    return best


def _parse(file: Path, text: str, separator: str) -> Iterator[list[str]]:
    reader = csv.reader(StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        yield from reader
    except csv.Error as error:
        line = reader.line_num
        raise UserError(f"{file} can't be read as a table: {error} (line {line})") from None


def _read_json_lines(file: Path, text: str) -> Table:
    columns: dict[str, None] = {}
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise UserError(f"{file} can't be read: line {number} is not a JSON object")
        row = {name: _as_text(value) for name, value in content.items()}
        rows.append(row)
        columns.update(dict.fromkeys(row))
    return Table(file, list(columns), rows, JSON_LINES)


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return "|".join(map(_as_text, value))
    if isinstance(value, bool | dict):
        return json.dumps(value)
    return str(value)


def is_utf8(text: str) -> bool:
    """Whether text can be written in UTF-8; names of files need not be, see PEP 383."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class ImageFinder:
    """Finds the images that the rows of a table name.

    Args:
        folder: Folder of the table, to which paths are relative.
        root: Folder of the images, if it is another one.
        tree: Files to search, if they are more than those below either folder.

    Raises:
        UserError: The folder of the images does not exist.
    """

    def __init__(
        self, folder: Path, root: StrPath | None = None, tree: FileTree | None = None
    ) -> None:
        self.folders = [folder]
        if root is not None:
            tree = FileTree(Path(root))
            if not tree.folder.is_dir():
                raise UserError(f"--image_root {brief(root)} is not a folder")
            self.folders.insert(0, tree.folder)
        self.tree = tree or FileTree(folder)
        self.folders += [self.tree.folder] if self.tree.folder not in self.folders else []

    def find(self, name: str, part: Split | None = None) -> str | None:
        """The path of an image, or None; see ``FileTree.image``."""
        return (self.named(name) or self.tree.image(name, part)) if name else None

    def named(self, name: str) -> str | None:
        """The path of an image that is where its name says, or None."""
        for folder in self.folders:
            for one in dict.fromkeys((name, name.replace("\\", "/"))):
                path = os.path.join(folder, one)
                if _is_file(path):
                    return path
        return None

    def is_image(self, cell: str) -> bool:
        """Whether a cell of a table names an existing image, or looks like the name of one."""
        cell = cell.strip()
        if not cell or len(cell) > 1000 or "\0" in cell:
            return False
        if split_suffix(cell)[1].lower() in EXTENSIONS:
            return True
        return self.find(cell) is not None


def _is_file(path: str) -> bool:
    try:
        return is_image_path(path)
    except ValueError:  # it has a NUL byte
        return False


def path_column(table: Table, finder: ImageFinder, options: SourceOptions) -> str | None:
    """The column that names the images: the one given, or by its usual name, or by its content.

    Returns:
        Its name; None if there is none.
    """
    if options.path_column is not None:
        return table.given_column("path_column", options.path_column)
    found = {normalized(name): name for name in reversed(table.columns)}
    named = [found[name] for name in PATH_COLUMNS if name in found]
    rows = table.rows[:_SAMPLE]
    others = [one for one in table.columns if one not in named]
    hits = {
        one: sum(finder.is_image(row.get(one) or "") for row in rows) for one in (*named, *others)
    }
    by_name = next((one for one in named if hits[one]), None)
    if by_name is not None:
        return by_name
    best = max(others, key=lambda one: hits[one], default=None)
    if best is not None and 2 * hits[best] > len(rows):
        return best
    return named[0] if named else None


def find_images_of(
    table: Table,
    column: str,
    parts: Sequence[Split | None],
    finder: ImageFinder,
    log: ReadingLog,
) -> list[str | None]:
    """The image of each row; None for those that are left out and counted.

    Args:
        table: Table of images.
        column: Column that names them.
        parts: Part of each row, where known.
        finder: Finds the files.
        log: Counts the missing ones.

    Raises:
        UserError: Most images are missing.
    """
    names = [row.get(column) or "" for row in table.rows]
    paths = [
        finder.find(name, part) or finder.find(name.strip(), part)
        for name, part in zip(names, parts, strict=True)
    ]
    meaning: dict[str, set[str]] = defaultdict(set)
    for name, path in zip(names, paths, strict=True):
        meaning[path or ""].add(name)
    for row, (name, path) in enumerate(zip(names, paths, strict=True)):
        # of several names for one image, only that counts under which it is found directly
        if path and len(meaning[path]) > 1 and finder.named(name.strip()) is None:
            paths[row] = None
    if not any(names):
        raise UserError(f"{table.file}: the column {brief(column)} is empty")
    missing = [n for n, path in zip(names, paths, strict=True) if path is None]
    if len(missing) > MAX_LEFT_OUT * len(names):
        raise UserError(
            f"{table.file} names {len(names)} images in the column {brief(column)}, of which "
            f"{len(missing)} do not exist, the first {brief(missing[0] or '(empty)')}: give the "
            f"folder of the images with --image_root, or another column with --path_column"
        )
    for name in missing:
        log.add(MISSING_IMAGE, name or f"{table.file} (empty cell)")
    return paths


def groups_of_rows(
    table: Table, paths: Sequence[str | None], taken: Collection[str | None], log: ReadingLog
) -> None:
    """Add the groups in a column such as ``group`` or ``patient_id`` to the log, if there is one.

    Args:
        table: Table of images.
        paths: Image of each row; None for those that are left out.
        taken: Columns that are something else, such as the label.
        log: Gets the group of each image whose cell is not empty.
    """
    names = [name for name in table.columns if name not in taken]
    column = replace(table, columns=names).column(GROUP_COLUMNS)
    if column is None:
        return
    log.grouped_by = f"column {brief(column)}"
    for path, cell in zip(paths, table.cells(column), strict=True):
        if path is not None and cell:
            log.groups.setdefault(path, cell)


def group_column(others: Collection[str]) -> str:
    """A name for a column of groups in a table with other columns."""
    return next(name for name in GROUP_COLUMNS if name not in map(normalized, others))


def without_short_rows(table: Table, log: ReadingLog) -> Table:
    """A copy of the table without rows that lack cells at their end, which are counted."""
    if table.form == JSON_LINES:  # where any key may be missing
        return table
    whole = [row for row in table.rows if len(row) == len(table.columns)]
    log.add("row that is cut short, left out", str(table.file), len(table.rows) - len(whole))
    return replace(table, rows=whole)


def index_columns(table: Table) -> list[str]:
    """Columns that only number the rows, as pandas writes them."""
    return [name for name in table.columns if normalized(name) in _INDEX_COLUMNS]


def yes_or_no(cells: Sequence[str]) -> list[bool] | None:
    """A column of 0 and 1, or of true and false, where an empty cell is no; None for another.

    A column of -1 and 1 alone is one, too.
    """
    lowered = [cell.strip().lower() for cell in cells]
    if set(lowered) == {"-1", "1"}:
        return [cell == "1" for cell in lowered]
    if not set(lowered) <= _YES | _NO or not _YES.intersection(lowered):
        return None if not set(lowered) <= _NO - {""} else [False] * len(lowered)
    return [cell in _YES for cell in lowered]


def parts_of_rows(table: Table, options: SourceOptions, log: ReadingLog) -> list[Split | None]:
    """The part of each row, from a column such as ``split``, ``is_valid`` or ``fold``.

    Returns:
        Parts; None for all rows if there is no such column, and for rows whose part is unknown.

    Raises:
        UserError: ``--test_fold`` is given and there is no such column or value.
    """
    named = [name for name in table.columns if normalized(name) in SPLIT_COLUMNS]
    if options.test_fold is not None:
        return _by_fold(table, options.test_fold, log)
    parts: list[Split | None] = [None] * len(table.rows)
    words: Split
    for name in named:
        kind, cells = normalized(name), table.cells(name)
        if kind.startswith("is_"):
            flags = yes_or_no(cells)
            if flags is None or not any(flags):
                continue
            words = "test" if kind == "is_test" else "val"
            parts = [
                words if flag else part or "train" for flag, part in zip(flags, parts, strict=True)
            ]
            parts = ["train" if part is None else part for part in parts]
            log.origins.update({"train": f"column {name}", words: f"column {name}"})
            continue
        found = [part_of_name(cell) for cell in cells]
        if not any(found):
            if kind == "fold":
                log.note(
                    f"The column {name} of {table.file} is not used: --test_fold "
                    f"{brief(cells[0])} would make one of its folds the test part"
                )
            elif kind == "split":
                raise UserError(
                    f"{table.file}: the split {brief(repr(cells[0]))} is none of train, val, test"
                )
            continue
        for cell, part in zip(cells, found, strict=True):
            if cell and part is None:
                log.warn(
                    "data.part",
                    f"{table.file}: the {name} {brief(repr(cell))} is none of train, val, test: "
                    f"its rows are left out",
                )
        log.origins.update({str(part): f"column {name}" for part in found if part is not None})
        return found
    return parts


def parts_by_folder(
    parts: list[Split | None], paths: Sequence[str | None], finder: ImageFinder
) -> list[Split | None]:
    """The parts of rows; if no row names one, those that folders of the images name."""
    if any(parts):
        return parts
    return [None if path is None else part_below(path, finder.tree) for path in paths]


def check_fold(options: SourceOptions, log: ReadingLog) -> None:
    """Raise a UserError if ``--test_fold`` was given and nothing that was read has folds."""
    if options.test_fold is not None and not log.folded:
        raise UserError(
            f"--test_fold {brief(options.test_fold)} is for a table with a column fold, and "
            f"{log.source} was read as {log.layout}: give the table as --data"
        )


def _by_fold(table: Table, fold: str, log: ReadingLog) -> list[Split | None]:
    name = table.column(["fold", "kfold", "folds", *SPLIT_COLUMNS])
    cells = [] if name is None else table.cells(name)
    plain = [cell.removesuffix(".0") for cell in cells]
    if name is None or fold not in plain:
        has = f"the folds {brief(', '.join(sorted(set(plain))))}" if name else "no column fold"
        raise UserError(f"--test_fold {brief(fold)}: {table.file} has {has}")
    log.origins.update({"train": f"other values of {name}", "test": f"{name} {fold}"})
    log.folded = True
    return ["test" if cell == fold else "train" for cell in plain]
