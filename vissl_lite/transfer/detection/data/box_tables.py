"""Reader for boxes in tables: a row for each box, as OpenImages and many Kaggle data sets have."""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from vissl_lite.errors import UserError, brief
from vissl_lite.transfer.detection.data.annotations import (
    RELATIVE_SIZE,
    UNREADABLE_BOX,
    Annotations,
    Corners,
    ImageAnnotation,
    to_number,
)
from vissl_lite.transfer.options import SourceOptions
from vissl_lite.transfer.sources.file_tree import FileTree
from vissl_lite.transfer.sources.parts import Split
from vissl_lite.transfer.sources.reading_log import ReadingLog
from vissl_lite.transfer.sources.tables import (
    ImageFinder,
    Table,
    find_images_of,
    groups_of_rows,
    parts_by_folder,
    parts_of_rows,
    path_column,
    read_table,
)

# Columns of corners and of sizes, by their usual (normalized) names.
_LEFT = ("xmin", "x_min", "x1", "left", "bbox_x1", "bbox_xmin", "min_x", "xtl")
_TOP = ("ymin", "y_min", "y1", "top", "bbox_y1", "bbox_ymin", "min_y", "ytl")
_RIGHT = ("xmax", "x_max", "x2", "right", "bbox_x2", "bbox_xmax", "max_x", "xbr")
_BOTTOM = ("ymax", "y_max", "y2", "bottom", "bbox_y2", "bbox_ymax", "max_y", "ybr")
_X, _Y = ("x", "bbox_x", "box_x", *_LEFT), ("y", "bbox_y", "box_y", *_TOP)
_W = ("w", "bbox_width", "box_width", "bbox_w", "box_w", "width")
_H = ("h", "bbox_height", "box_height", "bbox_h", "box_h", "height")
_BOX = ("bbox", "box", "boundingbox", "bounding_box")
CLASS_COLUMNS = ("class", "label", "labelname", "class_name", "label_name", "name", "category",
                 "class_id", "category_id", "species", "target")  # fmt: skip

# Name of the only class where a table names none.
ONE_CLASS = "object"

# Relative coordinates may leave the image a little.
_MAX_RELATIVE = 1.05


class BoxTable(NamedTuple):
    """A table of boxes.

    Attributes:
        table: Its cells.
        image: Column of the image.
        corners: Columns of x1, y1, x2, y2, or of x, y, width, height; or one column of a list;
            empty if the boxes are in a column ``objects``.
        sizes: Whether the last two are width and height.
        label: Column of the class; None if there is one class only.
        part: Part of rows that name none.
    """

    table: Table
    image: str
    corners: tuple[str, ...]
    sizes: bool
    label: str | None
    part: Split | None


def find_box_table(
    file: Path, part: Split | None, images: FileTree, options: SourceOptions
) -> BoxTable | None:
    """Read a table if it has columns of images and of boxes, else return None.

    Args:
        file: CSV file or a relative of it.
        part: Part of rows that name none.
        images: Folder of the images.
        options: Names of columns, and the folder of the images.

    Raises:
        UserError: A column that an option names is missing.
    """
    finder = ImageFinder(file.parent, options.image_root, images)
    known = (*_LEFT, *_BOX, *CLASS_COLUMNS)
    try:
        table = read_table(file, finder.is_image, known)
    except UserError:
        return None
    if table.columns == [str(number) for number in range(1, 7)]:  # RetinaNet's, without a header
        return BoxTable(table, "1", ("2", "3", "4", "5"), False, "6", part)
    image = path_column(table, finder, options)
    corners = [table.column(names) for names in (_LEFT, _TOP, _RIGHT, _BOTTOM)]
    sizes = False
    if None in corners:
        corners, sizes = [table.column(names) for names in (_X, _Y, _W, _H)], True
    if None in corners:
        corners = [table.column(_BOX)]
    if corners == [None] and "objects" in table.columns:
        corners = []
    if image is None or None in corners:
        return None
    label = table.column(CLASS_COLUMNS)
    if options.label_column is not None:
        label = table.given_column("label_column", options.label_column)
    found = tuple(one for one in corners if one is not None)
    return BoxTable(table, image, found, sizes, label, part)


def read_box_tables(
    tables: Sequence[BoxTable],
    names: dict[str, str],
    images: FileTree,
    options: SourceOptions,
    repairs: ReadingLog,
) -> Annotations:
    """Read tables of boxes.

    Boxes are relative to the size of the image if no coordinate of their table is above 1, else in
    pixels; ``width`` and ``height`` beside corners are the size of the annotated image. A row
    without coordinates is an image without boxes.

    Args:
        tables: Results of ``find_box_table``.
        names: Names of classes by what the tables have, as in OpenImages' ``class-descriptions``.
        images: Folder of the images.
        options: Names of columns, and the folder of the images.
        repairs: Log to add repairs to.

    Raises:
        UserError: Most images are missing.
    """
    annotations: dict[tuple[str, Split | None], ImageAnnotation] = {}
    listed = 0
    for one in tables:
        parts = [part or one.part for part in parts_of_rows(one.table, options, repairs)]
        finder = ImageFinder(one.table.file.parent, options.image_root, images)
        paths = find_images_of(one.table, one.image, parts, finder, repairs)
        parts = parts_by_folder(parts, paths, finder)
        groups_of_rows(one.table, paths, {one.image, one.label, *one.corners}, repairs)
        listed += len(set(one.table.cells(one.image)))
        boxes = [_boxes_of(row, one) for row in one.table.rows]
        highest = max((max(map(abs, box)) for some in boxes for box, _ in some or ()), default=2)
        relative = highest <= _MAX_RELATIVE
        for path, part, row, some in zip(paths, parts, one.table.rows, boxes, strict=True):
            if path is None:
                continue
            size = RELATIVE_SIZE if relative else _size(row, one)
            new = ImageAnnotation(path, part, size, [], [], [], [])
            annotation = annotations.setdefault((path, part), new)
            if some is None:
                repairs.add(UNREADABLE_BOX, f"{one.table.file}: {brief(path)}")
                continue
            for box, name in some:
                annotation.add(box, names.get(name, name))
    found = list(annotations.values())
    return Annotations(sorted({name for one in found for name in one.names}), found, listed)


def _size(row: dict[str, str], of: BoxTable) -> tuple[float, float]:
    """Height and width of the annotated image; zeros if the table does not have them."""
    width, height = of.table.column(["width"]), of.table.column(["height"])
    if width is None or height is None or width in of.corners:
        return 0.0, 0.0
    return to_number(row.get(height)), to_number(row.get(width))


def _boxes_of(row: dict[str, str], of: BoxTable) -> list[tuple[Corners, str]] | None:
    """The boxes and names of a row; None if its coordinates can't be read."""
    if not of.corners:
        return _objects(row.get("objects") or "")
    name = (row.get(of.label) or "").strip() if of.label is not None else ONE_CLASS
    cells = [(row.get(column) or "").strip() for column in of.corners]
    if not any(cells):
        return []  # an image without boxes
    try:
        if len(cells) == 1:
            values = [float(value) for value in cells[0].strip("[]() ").replace(",", " ").split()]
        else:
            values = list(map(float, cells))
        a, b, c, d = values
    except ValueError:
        return None
    if not name:
        return None
    sizes = of.sizes or len(cells) == 1
    return [((a, b, a + c, b + d) if sizes else (a, b, c, d), name)]


def _objects(cell: str) -> list[tuple[Corners, str]] | None:
    """The boxes of Hugging Face's column ``objects``: ``{"bbox": [[x, y, w, h]], ...}``."""
    content: Any = None
    with suppress(ValueError, RecursionError):
        content = json.loads(cell)
    try:
        boxes = content["bbox"]
        names = next(content[key] for key in ("categories", "category", "label") if key in content)
        return [
            ((x, y, x + width, y + height), str(name))
            for (x, y, width, height), name in zip(boxes, names, strict=True)
        ]
    except (TypeError, ValueError, LookupError, StopIteration):
        return None


def class_descriptions(file: Path) -> dict[str, str]:
    """Names by label of OpenImages' ``class-descriptions`` table, which has two columns."""
    with suppress(UserError):
        table = read_table(file, lambda cell: cell.startswith("/m/"))
        first, second = table.columns[:2]
        return dict(zip(table.cells(first), table.cells(second), strict=True))
    return {}
