"""Reader for box annotations in COCO's format.

The readers of all formats use the standard library and PyYAML. `supervision` also reads this
format, VOC's and YOLO's, but installs a second OpenCV and fails with an assertion at the first
invalid file. `datumaro` reads more formats, but brings many dependencies for what is three small
files here.
"""

from pathlib import Path
from typing import Any

import numpy as np

from vissl_lite.errors import UserError
from vissl_lite.transfer.detection.data.annotations import (
    MAX_CLASSES,
    UNKNOWN_CLASS,
    UNREADABLE_BOX,
    UNREADABLE_SHAPE,
    Annotations,
    Corners,
    ImageAnnotation,
    enclosing_box,
    to_number,
)
from vissl_lite.transfer.sources.file_tree import FileTree, part_below
from vissl_lite.transfer.sources.parts import Split, part_of_file
from vissl_lite.transfer.sources.reading_log import MISSING_IMAGE, ReadingLog
from vissl_lite.transfer.sources.run_lengths import runs_of_text
from vissl_lite.transfer.sources.shapes import category_name, coco_shape, missing_key, parse_id


def read_coco(
    file: Path,
    content: Any,
    split: Split | None,
    tree: FileTree,
    repairs: ReadingLog,
    with_shapes: bool = False,
) -> Annotations:
    """Read a file in COCO's format (cocodataset.org, "Data format", object detection).

    Args:
        file: JSON file, for messages.
        content: Its content.
        split: Split of its images; None if they are to be split.
        tree: Folder of the images.
        repairs: Log to add repairs to.
        with_shapes: Whether polygons and run lengths are read.

    Raises:
        UserError: If the content lacks a key of the format.
    """
    key = missing_key(content)
    if key is not None:
        raise UserError(f"{file} is not in COCO's format: it has no list {key!r}")
    categories = _read_categories(file, content["categories"], repairs)
    annotations: dict[int | str, ImageAnnotation | None] = {}  # None for missing images
    for one in content["images"]:
        one = one if isinstance(one, dict) else {}
        name, identity = one.get("file_name") or one.get("coco_url"), parse_id(one.get("id"))
        if not (name and isinstance(name, str)) or identity is None:
            repairs.add("image without a file name or an id, left out", str(file))
            continue
        if identity in annotations:
            repairs.add("image with the id of another, left out", name)
            continue
        image = tree.image(name, split or part_of_file(file.name))
        if image is None:
            repairs.add(MISSING_IMAGE, name)
        else:
            repairs.add_group(image, one.get("group"))
        size = (to_number(one.get("height")), to_number(one.get("width")))
        annotations[identity] = (
            None
            if image is None
            else ImageAnnotation(image, split or part_below(image, tree), size, [], [], [], [])
        )
    for one in content["annotations"]:
        box = _parse_box(one) if isinstance(one, dict) else None
        if box is None:
            repairs.add(UNREADABLE_BOX, str(file))
            continue
        (x, y, width, height), identity = box, parse_id(one.get("image_id"))
        if identity is None or identity not in annotations:
            repairs.add("box of an image not listed, left out", str(file))
            continue
        annotation, category = annotations[identity], parse_id(one.get("category_id"))
        if annotation is not None and (category is None or category not in categories):
            repairs.add(UNKNOWN_CLASS, annotation.image)
        elif annotation is not None and category is not None:
            ignored = to_number(one.get("iscrowd")) > 0
            shape = None
            if with_shapes and one.get("segmentation"):
                shape = coco_shape(one["segmentation"], annotation.size)
                repairs.add(UNREADABLE_SHAPE, annotation.image, shape is None)
            annotation.add((x, y, x + width, y + height), categories[category], ignored, shape)
    ids = sorted(categories, key=lambda one: (isinstance(one, str), one))
    kept = [annotation for annotation in annotations.values() if annotation is not None]
    parents = {one.get("supercategory") for one in content["categories"] if isinstance(one, dict)}
    return Annotations(
        [categories[one] for one in ids],
        kept,
        len(annotations),
        frozenset(name.strip() for name in parents if isinstance(name, str)),
    )


def _read_categories(file: Path, listed: list[Any], repairs: ReadingLog) -> dict[int | str, str]:
    """Class names by id."""
    if len(listed) > MAX_CLASSES:
        raise UserError(f"{file} lists {len(listed)} categories, more than {MAX_CLASSES}")
    names: dict[int | str, str] = {}
    for one in listed:
        identity = parse_id(one.get("id")) if isinstance(one, dict) else None
        if identity is None:
            repairs.add("category without an id, left out", str(file))
            continue
        if not isinstance(one.get("name", identity), str | int | float):
            repairs.add("category whose name is not text, named by its id", str(file))
        name = category_name(one)
        if identity in names:
            repairs.add("category with the id of another, left out", f"{file}: {name}")
            continue
        names[identity] = name
    return names


def _parse_box(annotation: dict[str, Any]) -> Corners | None:
    """The x, y, width and height of an annotation, which may be not finite.

    They follow from the polygons or the run-length encoding where there is no box.

    Returns:
        The numbers; None if the annotation has no four of them.
    """
    box = annotation.get("bbox")
    if not box and annotation.get("segmentation"):
        corners = _box_of_segmentation(annotation["segmentation"])
        if corners is None:
            return None
        return corners[0], corners[1], corners[2] - corners[0], corners[3] - corners[1]
    if not isinstance(box, list) or len(box) != 4 or any(isinstance(one, bool) for one in box):
        return None
    try:
        x, y, width, height = map(float, box)
    except (TypeError, ValueError):
        return None
    return x, y, width, height


def _box_of_segmentation(segmentation: Any) -> Corners | None:
    """The box around polygons, ``[[x, y, x, y, ...], ...]``, or around run lengths."""
    if isinstance(segmentation, dict):
        return box_of_runs(segmentation.get("counts"), segmentation.get("size"))
    if not isinstance(segmentation, list):
        return None
    rings = [ring for ring in segmentation if isinstance(ring, list) and len(ring) % 2 == 0]
    points = [pair for ring in rings for pair in zip(ring[::2], ring[1::2], strict=True)]
    return enclosing_box(points)


def box_of_runs(counts: Any, size: Any) -> Corners | None:
    """The box around a mask in COCO's run-length encoding.

    Runs of background and foreground alternate, column by column.

    Args:
        counts: Lengths of the runs, as a list or as text.
        size: Height and width of the mask.
    """
    if isinstance(counts, str):
        counts = runs_of_text(counts)
    try:
        height = int(size[0])
        runs = np.array(counts, np.int64)
    except (TypeError, ValueError, LookupError, OverflowError):
        return None
    if height < 1 or runs.ndim != 1 or (runs < 0).any():
        return None
    ends = np.cumsum(runs)
    starts, lasts = (ends - runs)[1::2], ends[1::2] - 1
    filled = lasts >= starts
    starts, lasts = starts[filled], lasts[filled]
    if not len(starts):
        return 0.0, 0.0, 0.0, 0.0
    left, right = starts // height, lasts // height
    across = left != right  # a run over several columns touches the upper and the lower edge
    top = np.where(across, 0, starts % height).min()
    bottom = np.where(across, height - 1, lasts % height).max()
    return float(left.min()), float(top), float(right.max() + 1), float(bottom + 1)
