"""Reading of classes from tables: CSV and its relatives, alone or beside the images."""

import re
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from vissl_lite.errors import UserError, brief
from vissl_lite.transfer.classification.labels import FoundImage, FoundLabels
from vissl_lite.transfer.classification.options import LabelOptions
from vissl_lite.transfer.sources.file_tree import FileTree
from vissl_lite.transfer.sources.parts import PARTS, Split, part_of_file
from vissl_lite.transfer.sources.reading_log import ReadingLog
from vissl_lite.transfer.sources.tables import (
    MAX_LEFT_OUT,
    SPLIT_COLUMNS,
    TABLES,
    ImageFinder,
    Table,
    find_images_of,
    groups_of_rows,
    index_columns,
    is_utf8,
    normalized,
    parts_by_folder,
    parts_of_rows,
    path_column,
    read_table,
    without_short_rows,
    yes_or_no,
)

# Columns of one class for each image, and of any number of them, by their usual names.
LABEL_COLUMNS = tuple(
    """label class class_name label_name category category_name target species diagnosis dx
    y""".split()
)
MULTI_COLUMNS = ("labels", "tags", "classes", "finding_labels")

# What stands between names: in a column labels; in a column label, where a comma may be part of
# a name (a column class is never divided).
SEPARATORS, LABEL_SEPARATORS = "[|;,]", "[|;]"

# Column of the table of images that a person has marked in the page of ``select``.
NOT_USABLE = "not_usable"

# Columns that other tools write for weights of images in the loss.
WEIGHT_COLUMNS = ("weight", "weights", "sample_weight")

# Numbers with a fraction are classes if there are at most so many, and the user says that they are.
MANY_NUMBERS = 20

# Tables that belong to a folder of images by Hugging Face's convention.
METADATA = ("metadata.csv", "metadata.jsonl")

# Columns of tables of boxes.
_BOX_COLUMNS = ({"xmin", "xmax"}, {"x_min", "x_max"}, {"x1", "x2"}, {"bbox"}, {"objects"})

# Where the tables of a folder lie: at its top, or in a folder of a part or of annotations.
_TABLE_DEPTH = 2

# Share of the images that may have rows with different classes before these are taken for several
# labels of an image.
_MAX_CONFLICTS = 0.05

# Share of 0 and 1 in a column from which other cells are mistakes.
_MOSTLY = 0.9


class _Labels(NamedTuple):
    """The labels of the rows of a table, and their column; the rest as in ``FoundLabels``."""

    names: list[tuple[str, ...]]
    source: str
    multi_label: bool = False
    classes: Sequence[str] = ()
    column: str = ""


def read_tables_of(tree: FileTree, options: LabelOptions, log: ReadingLog) -> FoundLabels:
    """Read the tables in a folder of images, such as ``labels.csv`` or ``train/metadata.jsonl``.

    Tables without paths of these images or without labels are not used.

    Args:
        tree: Files of the data set.
        options: Names of columns, and the folder of the images.
        log: Gets the layout, what is left out, and why no table is usable.

    Returns:
        Labels; empty if no table is usable.
    """
    found: dict[Split | None, tuple[Path, FoundLabels, ReadingLog]] = {}
    refused: list[str] = []
    usable: list[Path] = []
    for path in tree.ending(*TABLES):
        if path.count("/") >= _TABLE_DEPTH or "submission" in path.lower():
            continue
        file, part = Path(tree.absolute(path)), part_of_file(path)
        tried = ReadingLog(log.source)
        try:
            labels = read_label_table(file, options, tried, part, tree)
        except UserError as error:
            refused += [str(error)] if path.lower().endswith((".csv", ".tsv", ".jsonl")) else []
            continue
        if labels.images:
            usable.append(file)
        if part not in found or len(labels.images) > len(found[part][1].images):
            found[part] = (file, labels, tried)
    if "train" in found:  # a table for each part
        found.pop(None, None)
    elif None in found:
        found = {None: found[None]}
    if not found:
        if refused:
            log.note(f"A table is not used: {refused[0]}")
        return FoundLabels([])
    used = [file for file, _, _ in found.values()]
    if unused := [file.name for file in usable if file not in used]:
        advice = "put all rows into one table" if None in found else "name the others after a part"
        log.warn(
            "data.unused_tables",
            f"One table of each part is used, {', '.join(file.name for file in used)}, and not "
            f"{', '.join(unused)}: {advice}, or move what should not be used",
        )
    for part, (file, _, tried) in found.items():
        if part is not None:
            tried.origins = {part: file.name}
        log.absorb(tried)
    several = [labels for _, labels, _ in found.values()]
    log.layout = " and ".join(dict.fromkeys(tried.layout for _, _, tried in found.values()))
    images, multi_label = _merge_rows(
        [image for labels in several for image in labels.images],
        any(labels.multi_label for labels in several),
        log,
    )
    return FoundLabels(
        images,
        multi_label,
        list(dict.fromkeys(name for labels in several for name in labels.classes)),
    )


def read_label_table(
    file: Path,
    options: LabelOptions,
    log: ReadingLog,
    part: Split | None = None,
    tree: FileTree | None = None,
) -> FoundLabels:
    """Read the labels of a table; see ``load_labelled`` for the forms.

    Args:
        file: A CSV file or a relative of it, see ``read_table``.
        options: Names of columns, and the folder of the images.
        log: Gets the layout, the column of the labels, and what is left out.
        part: Part of rows that name none.
        tree: Files to search for images that are not where the table says; default those below the
            folder of the table.

    Raises:
        UserError: The file can't be read, has no column of images or of labels, or most of its rows
            can't be used.
    """
    finder = ImageFinder(file.parent, options.image_root, tree)
    table = read_table(file, finder.is_image, (*LABEL_COLUMNS, *MULTI_COLUMNS, *SPLIT_COLUMNS))
    num_rows, table = len(table.rows), without_short_rows(table, log)
    _check_boxes(table, options)
    if {name.strip().lower() for name in table.columns} == {"path", NOT_USABLE}:
        raise UserError(
            f"{file} names images that are not usable, and has no labels: give it as --exclude of "
            f"select or pseudo-label"
        )
    column = path_column(table, finder, options)
    if column is None:
        raise UserError(
            f"{file} has no column of images: it has {brief(', '.join(table.columns))}; name it "
            f"with --path_column, and the folder of the images with --image_root"
        )
    parts = [one or part for one in parts_of_rows(table, options, log)]
    labels = _labels(table, column, options, log)
    paths = find_images_of(table, column, parts, finder, log)
    if not any(parts):
        parts = parts_by_folder(parts, paths, finder)
        log.origins.update({part: "folder names" for part in parts if part is not None})
    groups_of_rows(table, paths, {column, labels.column, *labels.classes}, log)
    for name in table.columns:
        if normalized(name) in WEIGHT_COLUMNS and name not in {labels.column, *labels.classes}:
            log.note(
                f"The column {brief(name)} of {table.file.name} is not used: only the table of "
                f"--pseudo_labels has weights of images"
            )
    images = []
    for path, names, in_part in zip(paths, labels.names, parts, strict=True):
        if path is not None and not names and not labels.multi_label:
            log.add("image without a label, left out", path)
        elif path is not None:
            images.append(FoundImage(path, names, in_part))
    if len(images) < (1 - MAX_LEFT_OUT) * num_rows:
        raise UserError(
            f"{file}: {num_rows - len(images)} of {num_rows} rows can't be used: "
            f"{'; '.join(log.left_out())}"
        )
    images, multi_label = _merge_rows(images, labels.multi_label, log)
    if not is_utf8("".join(name for one in images for name in one.names)):
        raise UserError(f"{file} can't be read: it is not text in UTF-8: save it as CSV UTF-8")
    form = f" ({table.form})" if table.form != "separated by commas" else ""
    log.layout = f"table {file.name}{form}, images in column {brief(column)}"
    log.label = labels.source
    log.tables.append(str(file))
    return FoundLabels(images, multi_label, labels.classes)


def _check_boxes(table: Table, options: LabelOptions) -> None:
    """Raise a UserError if the rows of a table are boxes, unless a column of labels is given."""
    names = {normalized(name) for name in table.columns}
    if options.label_column is None and any(names >= boxes for boxes in _BOX_COLUMNS):
        raise UserError(
            f"{table.file} has a row for each box: give --task detection, or --label_column to "
            f"classify whole images; it has {brief(', '.join(table.columns))}"
        )


def _labels(table: Table, path: str, options: LabelOptions, log: ReadingLog) -> _Labels:
    """Find the labels of a table and read them."""
    if options.label_column is not None:
        name = table.given_column("label_column", options.label_column)
        return _read_column(table, name, log, certain=True)
    named = [
        name
        for wanted in (*LABEL_COLUMNS, *MULTI_COLUMNS)
        for name in table.columns
        if normalized(name) == wanted and name != path
    ]
    filled = [name for name in named if any(table.cells(name))]
    if filled or named:
        chosen = (filled or named)[0]
        if len(filled) > 1:
            log.note(
                f"The column {brief(chosen)} of {table.file.name} is the label; --label_column "
                f"would take {brief(' or '.join(filled[1:]))}"
            )
        return _read_column(table, chosen, log)
    skipped = {path, *index_columns(table)}
    others = [
        name
        for name in table.columns
        if name not in skipped and normalized(name) not in SPLIT_COLUMNS
    ]
    one_hot = _class_columns(table, others, log) if len(others) > 1 else None
    if one_hot is not None:
        return one_hot
    if len(others) == 1 and len(set(table.cells(others[0]))) <= max(2, len(table.rows) // 2):
        return _read_column(table, others[0], log)
    raise UserError(
        f"{table.file} has no column of labels by a usual name, such as "
        f"{', '.join(LABEL_COLUMNS[:3])}: it has {brief(', '.join(table.columns))}; name one with "
        f"--label_column (for several labels per image give a column labels, or one of 0 and 1 "
        f"for each class)"
    )


def _read_column(table: Table, name: str, log: ReadingLog, certain: bool = False) -> _Labels:
    """Read a column of labels; ``certain`` if the user named it, as the page for labelling does."""
    cells = _whole_numbers(table.cells(name))
    _check_classes(table, name, cells, certain or normalized(name) == "class")
    source, kind = f"column {brief(name)}", normalized(name)
    if kind in MULTI_COLUMNS:
        separators = SEPARATORS
        if not any(re.search(SEPARATORS, cell) for cell in cells) and _are_words(cells):
            separators = r"\s"
        names = [_divide(cell, separators) for cell in cells]
        return _Labels(names, source, any(len(one) != 1 for one in names), column=name)
    divided = next((cell for cell in cells if re.search(LABEL_SEPARATORS, cell)), None)
    if kind != "label" or divided is None:
        return _Labels([(cell,) if cell else () for cell in cells], source, column=name)
    log.note(
        f"{table.file}: {brief(repr(divided))} is read as several labels of one image; call the "
        f"column class to have names taken as they stand"
    )
    return _Labels([_divide(cell, LABEL_SEPARATORS) for cell in cells], source, True, column=name)


def _divide(cell: str, separators: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in re.split(separators, cell) if name.strip())


def _are_words(cells: Sequence[str]) -> bool:
    """Whether cells are lists of words, as ``haze primary``: fewer words than combinations."""
    distinct = set(cells) - {""}
    words = {word for cell in distinct for word in cell.split()}
    return any(" " in cell for cell in distinct) and len(words) < len(distinct)


def _whole_numbers(cells: list[str]) -> list[str]:
    """Cells without ``.0``, which pandas writes where other cells of the column are empty."""
    if all(re.fullmatch(r"-?\d+\.0+|", cell) for cell in cells):
        return [cell.partition(".")[0] for cell in cells]
    return cells


def _check_classes(table: Table, name: str, cells: Sequence[str], certain: bool) -> None:
    """Raise a UserError if a column holds measurements or a different value for each image.

    If it is certain that the column holds classes, these may be few grades such as 1.5, or the
    images a few of many classes.
    """
    filled = [cell for cell in cells if cell]
    distinct = set(filled)
    numbers = []
    with suppress(ValueError):
        numbers = [float(cell) for cell in distinct]
    few = certain and len(distinct) <= MANY_NUMBERS
    if any(number % 1 for number in numbers) and not few:
        first = next(cell for cell in filled if float(cell) % 1)
        raise UserError(
            f"{table.file}: the column {brief(name)} holds numbers such as {first}, which is a "
            f"regression, and not offered: for classes, give another column with --label_column, "
            f"or names instead of numbers"
        )
    if len(distinct) == len(filled) > 10 and not certain:
        raise UserError(
            f"{table.file}: the column {brief(name)} has a different value for each of "
            f"{len(filled)} images, such as {brief(filled[0])}, so it does not seem to be a class: "
            f"give another column, or this one, with --label_column; it has "
            f"{brief(', '.join(table.columns))}"
        )


def _class_columns(table: Table, columns: Sequence[str], log: ReadingLog) -> _Labels | None:
    """Labels from one column of 0 and 1 per class; None if there are no such columns.

    Columns with other values, such as notes, are left out; but where nearly all are 0 or 1, a label
    may have gone wrong, so that is an error. If each image has exactly one class, the data are not
    multi-label.
    """
    has: dict[str, list[bool]] = {}
    left_out = []
    for column in columns:
        cells = table.cells(column)
        flags = yes_or_no(cells)
        if flags is not None:
            has[column] = flags
            continue
        plain = sum(yes_or_no([cell]) is not None for cell in cells)
        if plain > _MOSTLY * len(cells):
            odd = next(cell for cell in cells if cell and yes_or_no([cell]) is None)
            raise UserError(
                f"{table.file}: the column {brief(column)} has {brief(repr(odd))} beside 0 and 1; "
                f"without a column label or labels, the column of a class holds 0 or 1"
            )
        if {"0", "1", "-1"} <= {_whole(cell) for cell in cells}:
            log.warn(
                "data.labels",
                f"{table.file}: the column {brief(column)} holds -1 beside 0 and 1, as for "
                f"uncertain labels, and is left out: write 0, 1 or nothing instead of -1",
            )
        left_out.append(column)
    if not has:
        return None
    names = [tuple(name for name in has if has[name][row]) for row in range(len(table.rows))]
    if left_out:
        log.note(
            f"{table.file}: columns left out, as they are not 0 and 1: {brief(', '.join(left_out))}"
        )
    exclusive = all(len(one) == 1 for one in names)
    return _Labels(names, f"{len(has)} columns of 0 and 1", not exclusive, list(has))


def _whole(cell: str) -> str:
    """A whole number without ``.0``."""
    return cell.strip().removesuffix(".0")


def _merge_rows(
    images: Sequence[FoundImage], multi_label: bool, log: ReadingLog
) -> tuple[list[FoundImage], bool]:
    """Make one image of all rows of an image, sorted by path.

    Where more than a few images have rows with different classes, these are several labels.
    """
    rows: dict[str, list[FoundImage]] = defaultdict(list)
    for image in images:
        rows[image.path].append(image)
    sets = {path: {one.names for one in of} for path, of in rows.items()}
    conflicts = sum(len(names) > 1 for names in sets.values())
    several = multi_label or conflicts > _MAX_CONFLICTS * len(rows)
    if several and not multi_label:
        log.note(f"{conflicts} images have rows with different classes: read as several labels")
    merged = []
    for path in sorted(rows):
        of = rows[path]
        if len(sets[path]) > 1 and not several:
            log.add("image with rows of different classes, left out", path)
            continue
        if len({one.part for one in of}) == 1 < len(of) and len(sets[path]) == 1:
            log.add("row that repeats another, left out", path, len(of) - 1)
        parts = {one.part for one in of}
        if len(parts) > 1:
            log.add("image of several parts, left out of the first", path)
        names = tuple(dict.fromkeys(name for one in of for name in one.names))
        last = max(parts, key=(None, *PARTS).index)  # no test image is trained on
        merged.append(FoundImage(path, names, last))
    return merged, several
