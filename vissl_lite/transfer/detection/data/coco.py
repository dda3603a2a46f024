"""Reads boxes in COCO's format.

The standard library's parsers and PyYAML are enough: `supervision` reads this format, VOC's and
YOLO's too, but brings a second OpenCV and stops with an assertion at the first dirty file.
"""

import math
from pathlib import Path
from typing import Any

from vissl_lite.data.json_file import read_json
from vissl_lite.errors import UserError
from vissl_lite.transfer.detection.data.annotations import (
    MISSING_IMAGE,
    MOST_CLASSES,
    UNKNOWN_CLASS,
    UNREADABLE_BOX,
    Annotations,
    Note,
    to_number,
)
from vissl_lite.transfer.detection.data.cleaning import RepairLog
from vissl_lite.transfer.sources import FileTree, split_of_file


def missing_key(content: Any) -> str | None:
    """The key of COCO's format that a JSON file's content lacks, if any."""
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            return key
    return None


def read_coco(file: Path, split: str | None, tree: FileTree, repairs: RepairLog) -> Annotations:
    """Read a file in COCO's format (cocodataset.org, "Data format", object detection).

    Args:
        file: the JSON file.
        split: which it is; None for a file that is to be split.
        tree: where its images are.
        repairs: what was left out is counted here.

    Raises:
        UserError: it is no JSON, or lacks a key of the format.
    """
    content = read_json(file)
    key = missing_key(content)
    if key is not None:
        raise UserError(f"{file} is not in COCO's format: it has no list {key!r}")
    categories = _categories(file, content["categories"], repairs)
    notes: dict[int | str, Note | None] = {}  # None: the image is left out
    for one in content["images"]:
        one = one if isinstance(one, dict) else {}
        name, identity = one.get("file_name") or one.get("coco_url"), _identity(one.get("id"))
        if not (name and isinstance(name, str)) or identity is None:
            repairs.add("image without a file name or an id, left out", str(file))
            continue
        if identity in notes:
            repairs.add("image with the id of another, left out", name)
            continue
        image = tree.image(name, split or split_of_file(file.name))
        if image is None:
            repairs.add(MISSING_IMAGE, name)
        size = (to_number(one.get("height")), to_number(one.get("width")))
        notes[identity] = None if image is None else Note(image, split, size, [], [], [])
    for one in content["annotations"]:
        box = _numbers(one.get("bbox")) if isinstance(one, dict) else None
        if box is None:
            repairs.add(UNREADABLE_BOX, str(file))
            continue
        (x, y, width, height), identity = box, _identity(one.get("image_id"))
        if identity is None or identity not in notes:
            repairs.add("box of an image not listed, left out", str(file))
            continue
        note, category = notes[identity], _identity(one.get("category_id"))
        if note is not None and (category is None or category not in categories):
            repairs.add(UNKNOWN_CLASS, note.image)
        elif note is not None and category is not None:
            note.boxes.append((x, y, x + width, y + height))
            note.names.append(categories[category])
            note.ignored.append(to_number(one.get("iscrowd")) > 0)
    ids = sorted(categories, key=lambda one: (isinstance(one, str), one))
    kept = [note for note in notes.values() if note is not None]
    return Annotations([categories[one] for one in ids], kept, len(notes))


def _categories(file: Path, listed: list[Any], repairs: RepairLog) -> dict[int | str, str]:
    """The names of the classes by their ids."""
    if len(listed) > MOST_CLASSES:
        raise UserError(f"{file} lists {len(listed)} categories, more than {MOST_CLASSES}")
    names: dict[int | str, str] = {}
    for one in listed:
        identity = _identity(one.get("id")) if isinstance(one, dict) else None
        if identity is None:
            repairs.add("category without an id, left out", str(file))
            continue
        name = one.get("name", identity)
        if not isinstance(name, str | int | float):
            repairs.add("category whose name is no text, named by its id", str(file))
            name = identity
        if identity in names:
            repairs.add("category with the id of another, left out", f"{file}: {name}")
            continue
        names[identity] = str(name).strip()
    return names


def _identity(value: Any) -> int | str | None:
    """An id of a file; some tools write numbers as text in one place and not in the other."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(value)
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None


def _numbers(box: Any) -> tuple[float, float, float, float] | None:
    """The four numbers of a box; None if they are none. They need not be finite."""
    if not isinstance(box, list) or len(box) != 4 or any(isinstance(one, bool) for one in box):
        return None
    try:
        x, y, width, height = map(float, box)
    except (TypeError, ValueError):
        return None
    return x, y, width, height
