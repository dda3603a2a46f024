"""Reader for box annotations in COCO's format.

The readers use the standard library and PyYAML. `supervision` also reads this format, VOC's and
YOLO's, but installs a second OpenCV and fails with an assertion at the first invalid file.
"""

import math
from pathlib import Path
from typing import Any

from vissl_lite.data.json_file import read_json
from vissl_lite.errors import UserError
from vissl_lite.transfer.detection.data.annotations import (
    MAX_CLASSES,
    UNKNOWN_CLASS,
    UNREADABLE_BOX,
    Annotations,
    ImageAnnotation,
    to_number,
)
from vissl_lite.transfer.sources.file_tree import FileTree
from vissl_lite.transfer.sources.parts import Split, part_of_file
from vissl_lite.transfer.sources.reading_log import MISSING_IMAGE, ReadingLog


def missing_key(content: Any) -> str | None:
    """Return the first key of COCO's format that the content of a JSON file lacks, or None."""
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            return key
    return None


def read_coco(file: Path, split: Split | None, tree: FileTree, repairs: ReadingLog) -> Annotations:
    """Read a file in COCO's format (cocodataset.org, "Data format", object detection).

    Args:
        file: JSON file.
        split: Split of its images; None if they are to be split.
        tree: Folder of the images.
        repairs: Log to add repairs to.

    Raises:
        UserError: If the file is not JSON, or lacks a key of the format.
    """
    content = read_json(file)
    key = missing_key(content)
    if key is not None:
        raise UserError(f"{file} is not in COCO's format: it has no list {key!r}")
    categories = _read_categories(file, content["categories"], repairs)
    annotations: dict[int | str, ImageAnnotation | None] = {}  # None for missing images
    for one in content["images"]:
        one = one if isinstance(one, dict) else {}
        name, identity = one.get("file_name") or one.get("coco_url"), _parse_id(one.get("id"))
        if not (name and isinstance(name, str)) or identity is None:
            repairs.add("image without a file name or an id, left out", str(file))
            continue
        if identity in annotations:
            repairs.add("image with the id of another, left out", name)
            continue
        image = tree.image(name, split or part_of_file(file.name))
        if image is None:
            repairs.add(MISSING_IMAGE, name)
        size = (to_number(one.get("height")), to_number(one.get("width")))
        annotations[identity] = (
            None if image is None else ImageAnnotation(image, split, size, [], [], [])
        )
    for one in content["annotations"]:
        box = _parse_box(one.get("bbox")) if isinstance(one, dict) else None
        if box is None:
            repairs.add(UNREADABLE_BOX, str(file))
            continue
        (x, y, width, height), identity = box, _parse_id(one.get("image_id"))
        if identity is None or identity not in annotations:
            repairs.add("box of an image not listed, left out", str(file))
            continue
        annotation, category = annotations[identity], _parse_id(one.get("category_id"))
        if annotation is not None and (category is None or category not in categories):
            repairs.add(UNKNOWN_CLASS, annotation.image)
        elif annotation is not None and category is not None:
            annotation.boxes.append((x, y, x + width, y + height))
            annotation.names.append(categories[category])
            annotation.ignored.append(to_number(one.get("iscrowd")) > 0)
    ids = sorted(categories, key=lambda one: (isinstance(one, str), one))
    kept = [annotation for annotation in annotations.values() if annotation is not None]
    return Annotations([categories[one] for one in ids], kept, len(annotations))


def _read_categories(file: Path, listed: list[Any], repairs: ReadingLog) -> dict[int | str, str]:
    """Class names by id."""
    if len(listed) > MAX_CLASSES:
        raise UserError(f"{file} lists {len(listed)} categories, more than {MAX_CLASSES}")
    names: dict[int | str, str] = {}
    for one in listed:
        identity = _parse_id(one.get("id")) if isinstance(one, dict) else None
        if identity is None:
            repairs.add("category without an id, left out", str(file))
            continue
        name = one.get("name", identity)
        if not isinstance(name, str | int | float):
            repairs.add("category whose name is not text, named by its id", str(file))
            name = identity
        if identity in names:
            repairs.add("category with the id of another, left out", f"{file}: {name}")
            continue
        names[identity] = str(name).strip()
    return names


def _parse_id(value: Any) -> int | str | None:
    """Normalize an id, as some tools write the same id as a number and as text."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(value)
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None


def _parse_box(box: Any) -> tuple[float, float, float, float] | None:
    """The four numbers of a box, which may be not finite; None if it is not four numbers."""
    if not isinstance(box, list) or len(box) != 4 or any(isinstance(one, bool) for one in box):
        return None
    try:
        x, y, width, height = map(float, box)
    except (TypeError, ValueError):
        return None
    return x, y, width, height
