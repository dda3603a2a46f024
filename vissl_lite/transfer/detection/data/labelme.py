"""Reader for boxes in LabelMe's format: a JSON file with shapes for each image."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vissl_lite.data.json_file import read_json
from vissl_lite.errors import UserError
from vissl_lite.transfer.detection.data.annotations import (
    UNKNOWN_CLASS,
    UNREADABLE_BOX,
    UNREADABLE_FILE,
    Annotations,
    Corners,
    ImageAnnotation,
    enclosing_box,
    to_number,
)
from vissl_lite.transfer.sources.file_tree import FileTree, part_below
from vissl_lite.transfer.sources.parts import part_of_path
from vissl_lite.transfer.sources.reading_log import MISSING_IMAGE, ReadingLog
from vissl_lite.transfer.sources.shapes import labelme_shape

# Size in bytes of the largest file, which may have the image in it.
MAX_LABELME_BYTES = 2**27


def is_labelme(content: Any) -> bool:
    """Whether the content of a JSON file is in LabelMe's format."""
    return isinstance(content, dict) and isinstance(content.get("shapes"), list)


def read_labelme(
    files: Sequence[str],
    tree: FileTree,
    images: FileTree,
    repairs: ReadingLog,
    with_shapes: bool = False,
) -> Annotations:
    """Read files of LabelMe (github.com/wkentaro/labelme); all shapes become boxes around them.

    Args:
        files: JSON files, relative to the tree.
        tree: Folder of the files.
        images: Folder of the images. An image has the stem of its file, or is its ``imagePath``.
        repairs: Log to add repairs to.
        with_shapes: Whether polygons, rectangles and circles are read, too.
    """
    annotations: list[ImageAnnotation] = []
    for path in files:
        file = tree.absolute(path)
        try:
            content = read_json(Path(file), MAX_LABELME_BYTES)
        except UserError:
            repairs.add(UNREADABLE_FILE, file)
            continue
        if not is_labelme(content):
            continue
        part = part_of_path(path)
        named = content.get("imagePath")
        image = images.image(os.path.splitext(path)[0], part)
        if image is None and isinstance(named, str):
            image = images.image(named, part)
        if image is None:
            repairs.add(MISSING_IMAGE, file)
            continue
        size = (to_number(content.get("imageHeight")), to_number(content.get("imageWidth")))
        annotation = ImageAnnotation(image, part or part_below(image, images), size, [], [], [], [])
        annotations.append(annotation)
        for shape in content["shapes"]:
            shape = shape if isinstance(shape, dict) else {}
            box, name = _box(shape), shape.get("label")
            if box is None:
                repairs.add(UNREADABLE_BOX, file)
            elif not isinstance(name, str) or not name.strip():
                repairs.add(UNKNOWN_CLASS, file)
            else:
                outline = labelme_shape(shape) if with_shapes else None
                annotation.add(box, name.strip(), shape=outline)
    names = sorted({name for one in annotations for name in one.names})
    return Annotations(names, annotations, len(files))


def _box(shape: dict[str, Any]) -> Corners | None:
    """The box around a shape; None if its points are not numbers."""
    box = enclosing_box(shape.get("points"))
    if box is None or shape.get("shape_type") != "circle":
        return box
    (x, y), (edge_x, edge_y) = shape["points"][0], shape["points"][-1]
    radius = math.hypot(edge_x - x, edge_y - y)
    return x - radius, y - radius, x + radius, y + radius
