"""Cleaning of box annotations. Every repair is counted and logged."""

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from vissl_lite.data.headers import image_header
from vissl_lite.data.images import BROKEN_IMAGE
from vissl_lite.data.reading import reason
from vissl_lite.transfer.detection.data.annotations import RELATIVE_SIZE, ImageAnnotation
from vissl_lite.transfer.sources.reading_log import BACKGROUND, ReadingLog

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


def clean(
    annotations: Sequence[ImageAnnotation], class_indices: Mapping[str, int], repairs: ReadingLog
) -> tuple[tuple[int, int], np.ndarray, np.ndarray, np.ndarray] | None:
    """Clean the boxes of one image.

    Args:
        annotations: All annotations of this image.
        class_indices: Class indices by name.
        repairs: Log to add repairs to.

    Returns:
        Size (height, width), boxes, labels and ignored as in ``BoxedImage``; None if the image
        can't be read.
    """
    path = annotations[0].image
    try:
        height, width, orientation = image_header(path)
    except BROKEN_IMAGE as error:
        log.debug("can't be read: %s (%s)", path, reason(error, path))
        repairs.add("image not readable, left out", path)
        return None
    repairs.add("annotation of an image that has one already, merged", path, len(annotations) - 1)
    tables: list[np.ndarray] = []
    for annotation in annotations:
        boxes = np.array(annotation.boxes, np.float64).reshape(-1, 4)
        labels = np.array([class_indices[name] for name in annotation.names], np.float64)
        rows = np.column_stack([boxes, labels, np.array(annotation.ignored, np.float64)])
        rows = _order_corners(_drop_non_finite(rows, path, repairs), path, repairs)
        with np.errstate(over="ignore", invalid="ignore"):  # such boxes are dropped below
            scaled = _scale_to_image(
                rows[:, :4], annotation.size, (height, width), orientation, path, repairs
            )
        rows = _drop_non_finite(np.column_stack([scaled, rows[:, 4:]]), path, repairs)
        tables.append(_clip_to_image(rows, height, width, path, repairs))
    unique = list(dict.fromkeys(map(tuple, np.concatenate(tables).tolist())))
    repairs.add("box given twice, left out", path, sum(map(len, tables)) - len(unique))
    if not unique:
        repairs.add(BACKGROUND, path)
    table = np.array(unique, np.float64).reshape(-1, 6)
    return (
        (height, width),
        table[:, :4].astype(np.float32),
        table[:, 4].astype(np.int64),
        table[:, 5].astype(bool),
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


def _scale_to_image(
    boxes: np.ndarray,
    annotated_size: tuple[float, float],
    size: tuple[int, int],
    orientation: int,
    path: str,
    repairs: ReadingLog,
) -> np.ndarray:
    """Convert boxes from the coordinates of the annotated image size to those of the actual one."""
    height, width = size
    if annotated_size == size:
        return boxes
    if annotated_size == RELATIVE_SIZE:
        return boxes * (width, height, width, height)
    if not all(0 < side < np.inf for side in annotated_size):
        repairs.add("size not given, read from the image", path)
        return boxes
    if annotated_size == (width, height):
        if orientation == 1:  # many tools swap the two, and few rotate images
            repairs.add("size with height and width swapped, read from the image", path)
            return boxes
        repairs.add("image annotated before its EXIF rotation, boxes rotated", path)
        return rotate_boxes(boxes, *annotated_size, orientation)
    repairs.add("image annotated at another size, boxes scaled", path)
    scale_x, scale_y = width / annotated_size[1], height / annotated_size[0]
    return boxes * (scale_x, scale_y, scale_x, scale_y)


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
