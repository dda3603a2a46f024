"""Reader for boxes in the XML format "CVAT for images"."""

import math
import xml.etree.ElementTree as ET
from pathlib import Path

from vissl_lite.data.text_file import read_bytes
from vissl_lite.errors import UserError
from vissl_lite.transfer.detection.data.annotations import (
    UNKNOWN_CLASS,
    UNREADABLE_BOX,
    Annotations,
    Corners,
    ImageAnnotation,
    enclosing_box,
    to_number,
)
from vissl_lite.transfer.sources.file_tree import FileTree, part_below
from vissl_lite.transfer.sources.parts import part_of_name
from vissl_lite.transfer.sources.reading_log import MISSING_IMAGE, ReadingLog
from vissl_lite.transfer.sources.shapes import Shape, outline_of

# Shapes that have boxes around them.
_SHAPES = ("box", "polygon", "polyline", "ellipse", "mask")


def read_cvat(
    file: Path, images: FileTree, repairs: ReadingLog, with_shapes: bool = False
) -> Annotations:
    """Read a file of CVAT (docs.cvat.ai, "CVAT for images 1.1"); shapes become boxes around them.

    Args:
        file: XML file.
        images: Folder of the images.
        repairs: Log to add repairs to.
        with_shapes: Whether polygons are read, too.

    Raises:
        UserError: The file can't be read.
    """
    try:
        root = ET.fromstring(read_bytes(file))
    except (ET.ParseError, ValueError, LookupError) as error:
        raise UserError(f"{file} can't be read as XML: {error}") from None
    annotations: list[ImageAnnotation] = []
    listed = root.findall("image")
    for one in listed:
        name, part = one.get("name", ""), part_of_name(one.get("subset", ""))
        image = images.image(name, part)
        if image is None:
            repairs.add(MISSING_IMAGE, name or str(file))
            continue
        size = (to_number(one.get("height")), to_number(one.get("width")))
        annotation = ImageAnnotation(image, part or part_below(image, images), size, [], [], [], [])
        annotations.append(annotation)
        for shape in one:
            if shape.tag not in _SHAPES:
                continue
            box, label = _box(shape), (shape.get("label") or "").strip()
            if box is None:
                repairs.add(UNREADABLE_BOX, name)
            elif not label:
                repairs.add(UNKNOWN_CLASS, name)
            else:
                is_drawn = with_shapes and shape.tag == "polygon"
                annotation.add(box, label, shape=_polygon(shape) if is_drawn else None)
    used = {name for one in annotations for name in one.names}
    declared = [label.findtext("name", "").strip() for label in root.iter("label")]
    known = dict.fromkeys(name for name in declared if name)
    return Annotations([*known, *sorted(used - set(known))], annotations, len(listed))


def _points(shape: ET.Element) -> list[tuple[float, float]]:
    """The points of a shape, written as ``x,y;x,y``.

    Raises:
        ValueError: If they are not pairs of numbers.
    """
    pairs = [pair.split(",") for pair in shape.get("points", "").split(";")]
    return [(float(x), float(y)) for x, y in pairs]


def _polygon(shape: ET.Element) -> Shape | None:
    """The shape of a polygon whose points can be read; None if it has fewer than three."""
    outline = outline_of([value for point in _points(shape) for value in point])
    return None if outline is None else Shape((outline,))


def _box(shape: ET.Element) -> Corners | None:
    """The box around a shape; None if its coordinates are not numbers."""

    def numbers(*keys: str) -> tuple[float, ...]:
        return tuple(float(shape.get(key, "")) for key in keys)

    try:
        if shape.tag == "box":
            x1, y1, x2, y2 = numbers("xtl", "ytl", "xbr", "ybr")
        elif shape.tag == "ellipse":
            x, y, rx, ry = numbers("cx", "cy", "rx", "ry")
            x1, y1, x2, y2 = x - rx, y - ry, x + rx, y + ry
        elif shape.tag == "mask":
            x1, y1, width, height = numbers("left", "top", "width", "height")
            x2, y2 = x1 + width, y1 + height
        else:
            return enclosing_box(_points(shape))
        angle = math.radians(float(shape.get("rotation", 0)))
    except ValueError:
        return None
    if not angle:
        return x1, y1, x2, y2
    return _turned((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, angle, shape.tag == "ellipse")


def _turned(
    x: float, y: float, width: float, height: float, angle: float, round_shape: bool
) -> Corners:
    """The box around a rectangle, or an ellipse, that is turned about its center by ``angle``."""
    cos, sin = abs(math.cos(angle)), abs(math.sin(angle))
    total = math.hypot if round_shape else lambda one, other: one + other
    half_width = total(width * cos, height * sin) / 2
    half_height = total(width * sin, height * cos) / 2
    return x - half_width, y - half_height, x + half_width, y + half_height
