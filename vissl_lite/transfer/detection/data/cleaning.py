"""Cleaning of box annotations. Every repair is counted and logged."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from vissl_lite.data.formats import image_header
from vissl_lite.data.headers import ON_ITS_SIDE, turned
from vissl_lite.data.images import BROKEN_IMAGE
from vissl_lite.data.reading import reason
from vissl_lite.transfer.detection.data.annotations import RELATIVE_SIZE, ImageAnnotation
from vissl_lite.transfer.sources.reading_log import BACKGROUND, ReadingLog
from vissl_lite.transfer.sources.run_lengths import mask_of_runs, runs_of_mask
from vissl_lite.transfer.sources.shapes import Shape, points_of

log = logging.getLogger(__name__)

# In pixels. Thinner boxes may lose their area to float32 rounding in the views.
_MIN_SIDE = 0.01

# In pixels. Rounding of relative coordinates moves boxes at most this far out of the image.
_ROUNDING_TOLERANCE = 0.1

# Larger coordinates overflow float32 when multiplied.
MAX_COORDINATE = 1e18

NO_AREA = "box without area, left out"


def rotate_boxes(boxes: np.ndarray, height: float, width: float, orientation: int) -> np.ndarray:
    """Transform boxes from the stored image to the image after its EXIF rotation.

    Args:
        boxes: Boxes ``(N, 4)`` of x1, y1, x2, y2.
        height: Height of the stored image, in the unit of the boxes.
        width: Width of the stored image, in the unit of the boxes.
        orientation: EXIF orientation from 5 to 8, all of which swap height and width (EXIF 2.32,
            4.6.4, tag 274).
    """
    x1, y1, x2, y2 = boxes.T
    if orientation in (6, 7):  # the stored top is on the right
        y1, y2 = height - y2, height - y1
    if orientation in (7, 8):  # the stored left is at the bottom
        x1, x2 = width - x2, width - x1
    return np.stack([y1, x1, y2, x2], axis=1)


class CleanBoxes(NamedTuple):
    """Cleaned annotation of an image; see ``BoxedImage``."""

    size: tuple[int, int]
    boxes: np.ndarray
    labels: np.ndarray
    ignored: np.ndarray
    shapes: tuple[Shape | None, ...]


def clean(
    annotations: Sequence[ImageAnnotation], class_indices: Mapping[str, int], repairs: ReadingLog
) -> CleanBoxes | None:
    """Clean the boxes of one image.

    Args:
        annotations: All annotations of this image.
        class_indices: Class indices by name.
        repairs: Log to add repairs to.

    Returns:
        Objects in pixels of the image after its EXIF rotation; None if the image can't be read.
    """
    path = annotations[0].image
    try:
        height, width, orientation = image_header(path)
    except BROKEN_IMAGE as error:
        log.debug("can't be read: %s (%s)", path, reason(error, path))
        repairs.add("image not readable, left out", path)
        return None
    repairs.add("annotation of an image that has one already, merged", path, len(annotations) - 1)
    unique: dict[tuple[float, ...], Shape | None] = {}  # box, label and whether it is ignored
    total = 0
    for annotation in annotations:
        boxes = np.array(annotation.boxes, np.float64).reshape(-1, 4)
        labels = np.array([class_indices[name] for name in annotation.names], np.float64)
        ignored = np.array(annotation.ignored, np.float64)
        rows = np.column_stack([boxes, labels, ignored, np.arange(len(boxes))])
        rows = _order_corners(_drop_non_finite(rows, path, repairs), path, repairs)
        place = _placement(annotation.size, (height, width), orientation, path, repairs)
        with np.errstate(over="ignore", invalid="ignore"):  # such boxes are dropped below
            scaled = place(rows[:, :4])
        rows = _drop_non_finite(np.column_stack([scaled, rows[:, 4:]]), path, repairs)
        rows = _clip_to_image(rows, height, width, path, repairs)
        total += len(rows)
        for *key, number in rows.tolist():
            shape = annotation.shapes[int(number)]
            if unique.get(tuple(key)) is None:  # of two equal boxes the one with a shape
                unique[tuple(key)] = shape and _place_shape(
                    shape, annotation.size, (height, width), orientation, place
                )
    repairs.add("box given twice, left out", path, total - len(unique))
    if not unique:
        repairs.add(BACKGROUND, path)
    table = np.array(list(unique), np.float64).reshape(-1, 6)
    return CleanBoxes(
        (height, width),
        table[:, :4].astype(np.float32),
        table[:, 4].astype(np.int64),
        table[:, 5].astype(bool),
        tuple(unique.values()),
    )


def _drop_non_finite(rows: np.ndarray, path: str, repairs: ReadingLog) -> np.ndarray:
    """Keep the rows whose boxes are finite, also after conversion to float32."""
    finite = (np.abs(rows[:, :4]) < MAX_COORDINATE).all(axis=1)
    repairs.add("box not finite, left out", path, np.count_nonzero(~finite))
    return rows[finite]


def _order_corners(rows: np.ndarray, path: str, repairs: ReadingLog) -> np.ndarray:
    """Swap coordinates so that x1, y1 is the upper left corner."""
    low, high = np.minimum(rows[:, :2], rows[:, 2:4]), np.maximum(rows[:, :2], rows[:, 2:4])
    swapped = (rows[:, :2] > rows[:, 2:4]).any(axis=1)
    repairs.add("box with swapped corners, corrected", path, np.count_nonzero(swapped))
    return np.column_stack([low, high, rows[:, 4:]])


def _placement(
    annotated_size: tuple[float, float],
    size: tuple[int, int],
    orientation: int,
    path: str,
    repairs: ReadingLog,
) -> Callable[[np.ndarray], np.ndarray]:
    """Function from boxes in the coordinates of the annotated image size to those of the image."""
    height, width = size
    if annotated_size == size:
        return lambda boxes: boxes
    if annotated_size == RELATIVE_SIZE:
        return lambda boxes: boxes * (width, height, width, height)
    if not all(0 < side < np.inf for side in annotated_size):
        repairs.add("size not given, read from the image", path)
        return lambda boxes: boxes
    if annotated_size == (width, height):
        if orientation not in ON_ITS_SIDE:  # many tools swap the two
            repairs.add("size with height and width swapped, read from the image", path)
            return lambda boxes: boxes
        repairs.add("image annotated before its EXIF rotation, boxes rotated", path)
        return lambda boxes: rotate_boxes(boxes, *annotated_size, orientation)
    repairs.add("image annotated at another size, boxes scaled", path)
    scale_x, scale_y = width / annotated_size[1], height / annotated_size[0]
    return lambda boxes: boxes * (scale_x, scale_y, scale_x, scale_y)


def _place_shape(
    shape: Shape,
    annotated_size: tuple[float, float],
    size: tuple[int, int],
    orientation: int,
    place: Callable[[np.ndarray], np.ndarray],
) -> Shape:
    """Convert a shape to pixels of the image, as ``place`` converts boxes."""
    outlines = []
    for outline in shape.outlines:
        points = points_of(outline).astype(np.float64)
        placed = place(np.concatenate([points, points], axis=1))[:, :2]  # boxes without area
        outlines.append(placed.astype(np.float32).tobytes())
    if not shape.runs or annotated_size == size:
        return Shape(tuple(outlines), shape.runs)
    mask = mask_of_runs(shape.run_lengths(), (int(annotated_size[0]), int(annotated_size[1])))
    if annotated_size == size[::-1] and orientation in ON_ITS_SIDE:
        mask = turned(mask, orientation)
    if mask.shape != size:
        mask = cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    return Shape(tuple(outlines), runs_of_mask(mask > 0).tobytes())


def _clip_to_image(
    rows: np.ndarray, height: int, width: int, path: str, repairs: ReadingLog
) -> np.ndarray:
    """Clip boxes to the image, and drop those without area inside it."""
    boxes = rows[:, :4]
    no_area = (boxes[:, 2:] - boxes[:, :2] < _MIN_SIDE).any(axis=1)
    repairs.add(NO_AREA, path, np.count_nonzero(no_area))
    rows, boxes = rows[~no_area], boxes[~no_area]
    # check the float32 values that are kept, so that writing and reading gives the same boxes
    clipped = np.clip(boxes, 0, (width, height, width, height)).astype(np.float32)
    outside = (clipped[:, 2:] - clipped[:, :2] < _MIN_SIDE).any(axis=1)
    repairs.add("box outside the image, left out", path, np.count_nonzero(outside))
    clipped_off = (np.abs(clipped - boxes) > _ROUNDING_TOLERANCE).any(axis=1) & ~outside
    repairs.add("box past the edge of the image, clipped", path, np.count_nonzero(clipped_off))
    return np.column_stack([clipped, rows[:, 4:]])[~outside]
