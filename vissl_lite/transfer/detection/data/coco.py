"""Reads boxes in the formats of COCO and Pascal VOC: from files to notes of each image.

The standard library's parsers and PyYAML are enough: `supervision` reads these formats and YOLO's
too, but brings a second OpenCV and stops with an assertion at the first dirty file.
"""

import math
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vissl_lite.data.boxes.mending import FLAT, Note, Repairs
from vissl_lite.data.file_tree import FileTree, split_below, split_of_file, split_of_path
from vissl_lite.data.json_file import read_json
from vissl_lite.data.text_file import read_bytes
from vissl_lite.errors import UserError

Corners = tuple[float, float, float, float]

MISSING_IMAGE = "image missing, or not the only one of its name, left out"
UNREADABLE_FILE = "file not readable, left out with the image"
_UNREADABLE_BOX = "box not readable, left out"
UNKNOWN_CLASS = "box of an unknown class, left out"

# Classes that a data set may name: more than in any that there is.
MOST_CLASSES = 100_000

# Size in bytes of the largest annotation file of one image.
LARGEST_FILE = 2**24


class Annotations(NamedTuple):
    """What annotation files say.

    Attributes:
        classes: names, in the order of their ids; sorted where there are no ids.
        notes: of each image.
        named: images that the files name, found or not.
    """

    classes: list[str]
    notes: list[Note]
    named: int


def missing_key(content: Any) -> str | None:
    """The key of COCO's format that a JSON file's content lacks, if any."""
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            return key
    return None


def read_coco(file: Path, split: str | None, tree: FileTree, repairs: Repairs) -> Annotations:
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
        size = (_number(one.get("height")), _number(one.get("width")))
        notes[identity] = None if image is None else Note(image, split, size, [], [], [])
    for one in content["annotations"]:
        box = _numbers(one.get("bbox")) if isinstance(one, dict) else None
        if box is None:
            repairs.add(_UNREADABLE_BOX, str(file))
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
            note.ignored.append(_number(one.get("iscrowd")) > 0)
    ids = sorted(categories, key=lambda one: (isinstance(one, str), one))
    kept = [note for note in notes.values() if note is not None]
    return Annotations([categories[one] for one in ids], kept, len(notes))


def _categories(file: Path, listed: list[Any], repairs: Repairs) -> dict[int | str, str]:
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


def _number(value: Any) -> float:
    """A number of a file; 0 if it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return 0.0


def read_voc(
    files: Sequence[tuple[str, str | None]], folder: Path, tree: FileTree, repairs: Repairs
) -> Annotations:
    """Read files in Pascal VOC's format (Everingham et al. 2010, development kit, section 8).

    VOC counts pixels from 1 and names the first and the last of a box, so that the left edge is
    ``xmin - 1``. Many tools write the same files with edges counted from 0: the 1 is taken off
    only if no annotation of the set has a coordinate of 0.

    Args:
        files: XML files relative to the folder, and the split of each, or None.
        folder: where they are.
        tree: where the images are. An image has the stem of its file, or the file's ``filename``.
        repairs: what was left out is counted here.
    """
    notes: list[Note] = []
    from_zero = False
    for path, split in files:
        file = str(folder / path)
        try:
            root = ET.fromstring(read_bytes(file, LARGEST_FILE))
        except (ET.ParseError, UserError, ValueError, LookupError):
            repairs.add(UNREADABLE_FILE, file)
            continue
        if root.tag != "annotation":
            repairs.add(UNREADABLE_FILE, file)
            continue
        split = split or split_of_path(path)
        image = tree.image(path[: -len(".xml")], split)
        if image is None:
            image = tree.image(root.findtext("filename", "").strip(), split)
        if image is None:
            repairs.add(MISSING_IMAGE, file)
            continue
        size = (_number(root.findtext("size/height")), _number(root.findtext("size/width")))
        note = Note(image, split or split_below(image, tree), size, [], [], [])
        notes.append(note)
        for one in root.iterfind("object"):
            name = one.findtext("name", "").strip()
            corners = _corners(one)
            if corners is None:
                repairs.add(_UNREADABLE_BOX, file)
            elif not name:
                repairs.add(UNKNOWN_CLASS, file)
            elif corners[0] == corners[2] or corners[1] == corners[3]:
                repairs.add(FLAT, file)  # here, as it would get an area below
            else:
                from_zero = from_zero or 0 in corners
                note.boxes.append(corners)
                note.names.append(name)
                note.ignored.append(_number(one.findtext("difficult")) > 0)
    if not from_zero:
        for note in notes:
            note.boxes[:] = [(x1 - 1, y1 - 1, x2, y2) for x1, y1, x2, y2 in note.boxes]
    return Annotations(sorted({n for note in notes for n in note.names}), notes, len(files))


def _corners(one: ET.Element) -> Corners | None:
    box = one.find("bndbox")
    try:
        if box is None:
            return None
        x1, y1, x2, y2 = (float(box.findtext(k, "")) for k in ("xmin", "ymin", "xmax", "ymax"))
    except ValueError:
        return None
    return x1, y1, x2, y2
