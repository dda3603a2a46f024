"""Mends what annotations say of boxes, and counts every repair: nothing is dropped in silence."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vissl_lite.data.headers import image_header
from vissl_lite.data.images import BROKEN_IMAGE
from vissl_lite.data.reading import reason
from vissl_lite.errors import brief
from vissl_lite.transfer.detection.data.annotations import SHARES, Note

# RepairLog of a kind that the log names one by one.
LOGGED = 100

log = logging.getLogger(__name__)

# In pixels. Thinner boxes lose their area to rounding in the float32 arithmetic of the views.
_THINNEST = 0.01

# In pixels. Boxes written as shares end this far outside their image by rounding alone.
_ROUNDING = 0.1

# Coordinates beyond this overflow float32 where they are multiplied.
LARGEST = 1e18

FLAT = "box without area, left out"
# The one kind that is no mistake.
BACKGROUND = "image without boxes, kept as background"


class RepairLog:
    """Counts what was repaired or left out.

    Attributes:
        counts: by kind, a phrase that begins with a noun: ``box without area, left out``.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._first: dict[str, str] = {}

    def add(self, kind: str, where: str, times: int | np.integer[Any] = 1) -> None:
        """Count a repair; ``where`` is the file that it concerns."""
        if times:
            if self.counts.get(kind, 0) < LOGGED:
                log.debug("%s: %s", kind, brief(where))
            self.counts[kind] = self.counts.get(kind, 0) + int(times)
            self._first.setdefault(kind, where)

    def report(self) -> None:
        """One line in the log for each kind."""
        for kind, count in self.counts.items():
            noun, _, rest = kind.partition(" ")
            plural = "" if count == 1 else "es" if noun == "box" else "s"
            level = logging.INFO if kind == BACKGROUND else logging.WARNING
            log.log(
                level, f"%d {noun}{plural} {rest}, the first in %s", count, brief(self._first[kind])
            )


def turn_boxes(boxes: np.ndarray, height: float, width: float, orientation: int) -> np.ndarray:
    """Boxes of an image as it is stored, turned as EXIF turns it to show it.

    Args:
        boxes: ``(N, 4)`` x1, y1, x2, y2.
        height: of the stored image, like the boxes.
        width: of the stored image, like the boxes.
        orientation: 5 to 8, which all swap height and width (EXIF 2.32, 4.6.4, tag 274).
    """
    x1, y1, x2, y2 = boxes.T
    if orientation in (6, 7):  # the stored top is on the right
        y1, y2 = height - y2, height - y1
    if orientation in (7, 8):  # the stored left is at the bottom
        x1, x2 = width - x2, width - x1
    return np.stack([y1, x1, y2, x2], axis=1)


def clean(
    notes: Sequence[Note], numbers: Mapping[str, int], repairs: RepairLog
) -> tuple[tuple[int, int], np.ndarray, np.ndarray, np.ndarray] | None:
    """The boxes of one image, cleaned.

    Args:
        notes: all that name this image.
        numbers: of the classes by name.
        repairs: what was done is counted here.

    Returns:
        Size (height, width), boxes, labels and ignored as in ``BoxedImage``; None if the image
        can't be read.
    """
    path = notes[0].image
    try:
        height, width, orientation = image_header(path)
    except BROKEN_IMAGE as error:
        log.debug("can't be read: %s (%s)", path, reason(error, path))
        repairs.add("image not readable, left out", path)
        return None
    repairs.add("annotation of an image that has one already, joined", path, len(notes) - 1)
    columns: list[np.ndarray] = []
    for note in notes:
        boxes = np.array(note.boxes, np.float64).reshape(-1, 4)
        labels = np.array([numbers[name] for name in note.names], np.float64)
        rows = np.column_stack([boxes, labels, np.array(note.ignored, np.float64)])
        rows = _upright(_finite(rows, path, repairs), path, repairs)
        with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is left out
            fitted = _fitted(rows[:, :4], note.size, (height, width), orientation, path, repairs)
        rows = _finite(np.column_stack([fitted, rows[:, 4:]]), path, repairs)
        columns.append(_inside(rows, height, width, path, repairs))
    unique = list(dict.fromkeys(map(tuple, np.concatenate(columns).tolist())))
    repairs.add("box given twice, left out", path, sum(map(len, columns)) - len(unique))
    if not unique:
        repairs.add(BACKGROUND, path)
    table = np.array(unique, np.float64).reshape(-1, 6)
    return (
        (height, width),
        table[:, :4].astype(np.float32),
        table[:, 4].astype(np.int64),
        table[:, 5].astype(bool),
    )


def _finite(rows: np.ndarray, path: str, repairs: RepairLog) -> np.ndarray:
    """Rows whose boxes are finite, also as float32."""
    finite = (np.abs(rows[:, :4]) < LARGEST).all(axis=1)
    repairs.add("box not finite, left out", path, np.count_nonzero(~finite))
    return rows[finite]


def _upright(rows: np.ndarray, path: str, repairs: RepairLog) -> np.ndarray:
    """Rows of which the first corner of the box is above and left of the second."""
    low, high = np.minimum(rows[:, :2], rows[:, 2:4]), np.maximum(rows[:, :2], rows[:, 2:4])
    swapped = (rows[:, :2] > rows[:, 2:4]).any(axis=1)
    repairs.add("box with swapped corners, put right", path, np.count_nonzero(swapped))
    return np.column_stack([low, high, rows[:, 4:]])


def _fitted(
    boxes: np.ndarray,
    noted: tuple[float, float],
    size: tuple[int, int],
    orientation: int,
    path: str,
    repairs: RepairLog,
) -> np.ndarray:
    """Boxes noted for an image of one size, for the size that it has."""
    height, width = size
    if noted == size:
        return boxes
    if noted == SHARES:
        return boxes * (width, height, width, height)
    if not (0 < noted[0] < np.inf and 0 < noted[1] < np.inf):
        repairs.add("size not noted, the file's taken", path)
        return boxes
    if noted == (width, height):
        if orientation == 1:  # many tools confuse the two, and few turn images
            repairs.add("size noted with height and width swapped, the file's taken", path)
            return boxes
        repairs.add("image noted as before the EXIF rotation, boxes turned", path)
        return turn_boxes(boxes, *noted, orientation)
    repairs.add("image noted in another size, boxes scaled", path)
    across, down = width / noted[1], height / noted[0]
    return boxes * (across, down, across, down)


def _inside(rows: np.ndarray, height: int, width: int, path: str, repairs: RepairLog) -> np.ndarray:
    """Rows whose boxes have an area inside the image, clipped to it."""
    boxes = rows[:, :4]
    flat = (boxes[:, 2:] - boxes[:, :2] < _THINNEST).any(axis=1)
    repairs.add(FLAT, path, np.count_nonzero(flat))
    rows, boxes = rows[~flat], boxes[~flat]
    # judged as they are kept, so that what is written and read again is judged the same
    clipped = np.clip(boxes, 0, (width, height, width, height)).astype(np.float32)
    outside = (clipped[:, 2:] - clipped[:, :2] < _THINNEST).any(axis=1)
    repairs.add("box outside the image, left out", path, np.count_nonzero(outside))
    past = (np.abs(clipped - boxes) > _ROUNDING).any(axis=1) & ~outside
    repairs.add("box past the edge of the image, clipped", path, np.count_nonzero(past))
    return np.column_stack([clipped, rows[:, 4:]])[~outside]
