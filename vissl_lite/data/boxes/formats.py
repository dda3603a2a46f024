"""Reads boxes in the formats of COCO and Pascal VOC: from files to notes of each image.

The standard library's parsers and PyYAML are enough: `supervision` reads these formats and YOLO's
too, but brings a second OpenCV and stops with an assertion at the first dirty file.
"""

import json
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vissl_lite.data.boxes.mending import FLAT, Note, Repairs
from vissl_lite.data.file_tree import FileTree, split_below, split_of_file, split_of_path
from vissl_lite.errors import UserError

Corners = tuple[float, float, float, float]

MISSING_IMAGE = "image missing, or not the only one of its name, left out"
UNREADABLE_FILE = "file not readable, left out with the image"
_UNREADABLE_BOX = "box not readable, left out"
UNKNOWN_CLASS = "box of an unknown class, left out"


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


def read_json(file: Path) -> Any:
    """The content of a JSON file; `UserError` if it can't be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} can't be read as JSON: {error}") from None


def read_lines(file: Path) -> list[str]:
    """The lines of a text file; `UserError` if it can't be read."""
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} can't be read as text: {error}") from None


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
    categories = {
        _identity(one["id"]): str(one.get("name", one["id"])).strip()
        for one in content["categories"]
        if isinstance(one, dict) and "id" in one
    }
    notes: dict[int | str, Note | None] = {}  # None: the image is left out
    for one in content["images"]:
        name = one.get("file_name") or one.get("coco_url") if isinstance(one, dict) else None
        if not name or one.get("id") is None:
            repairs.add("image without a file name or an id, left out", str(file))
            continue
        identity = _identity(one["id"])
        if identity in notes:
            repairs.add("image with the id of another, left out", str(name))
            continue
        image = tree.image(str(name), split or split_of_file(file.name))
        if image is None:
            repairs.add(MISSING_IMAGE, str(name))
        size = (_number(one.get("height")), _number(one.get("width")))
        notes[identity] = None if image is None else Note(image, split, size, [], [], [])
    for one in content["annotations"]:
        try:
            identity = _identity(one["image_id"])
            x, y, width, height = map(float, one["bbox"])
        except (LookupError, TypeError, ValueError):
            repairs.add(_UNREADABLE_BOX, str(file))
            continue
        if identity not in notes:
            repairs.add("box of an image not listed, left out", str(file))
            continue
        note, category = notes[identity], _identity(one.get("category_id"))
        if note is not None and category not in categories:
            repairs.add(UNKNOWN_CLASS, note.image)
        elif note is not None:
            note.boxes.append((x, y, x + width, y + height))
            note.names.append(categories[category])
            note.ignored.append(_number(one.get("iscrowd")) > 0)
    ids = sorted(categories, key=lambda one: (isinstance(one, str), one))
    kept = [note for note in notes.values() if note is not None]
    return Annotations([categories[one] for one in ids], kept, len(notes))


def _identity(value: Any) -> int | str:
    """An id of a file; some tools write numbers as text in one place and not in the other."""
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return str(value)


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
            root = ET.parse(file).getroot()
        except (ET.ParseError, OSError, ValueError, LookupError):
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
