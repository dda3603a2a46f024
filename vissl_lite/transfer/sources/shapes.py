"""Shapes of objects, as COCO, YOLO and LabelMe describe them: polygons and run lengths."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import cv2
import numpy as np

from vissl_lite.data.reading import max_pixels
from vissl_lite.transfer.sources.run_lengths import mask_of_runs, runs_of_text, text_of_runs

# Lists that a file in COCO's format has.
COCO_LISTS = ("images", "annotations", "categories")

# Binary places of a coordinate that is rasterized.
_SHIFT = 4

# Larger coordinates overflow the integers of OpenCV.
_MAX_COORDINATE = 2**20

# Points of the outline of a circle of LabelMe.
_CIRCLE = 64


class Shape(NamedTuple):
    """The pixels of an object.

    Attributes:
        outlines: Polygons whose union is the object; each float32 x1, y1, x2, y2 and so on.
        runs: Instead, uint32 lengths of runs of pixels outside and inside the object in turn, in
            column-major order, as in COCO's RLE.
    """

    outlines: tuple[bytes, ...] = ()
    runs: bytes = b""

    @property
    def area(self) -> float:
        """Area in the coordinates of the shape; overlaps of polygons count twice."""
        outlined = sum(cv2.contourArea(points_of(outline)) for outline in self.outlines)
        return float(self.run_lengths()[1::2].sum(dtype=np.int64)) + outlined

    def run_lengths(self) -> np.ndarray:
        """The runs as numbers, ``(N,)`` uint32; empty for polygons."""
        return np.frombuffer(self.runs, np.uint32)


def points_of(outline: bytes) -> np.ndarray:
    """The corners of a polygon, ``(N, 2)`` float32 of x and y."""
    return np.frombuffer(outline, np.float32).reshape(-1, 2)


def outline_of(values: Any) -> bytes | None:
    """The points of a polygon from a list of x and y in turn; None if it is none."""
    if not isinstance(values, list) or len(values) < 6 or len(values) % 2:
        return None
    try:
        points = np.array(values, np.float64)
    except (TypeError, ValueError, OverflowError):
        return None
    if points.ndim != 1 or not np.isfinite(points).all():
        return None
    return np.clip(points, -1e9, 1e9).astype(np.float32).tobytes()


def coco_shape(segmentation: Any, size: tuple[float, float]) -> Shape | None:
    """The shape of an annotation in COCO's format.

    Args:
        segmentation: Its ``segmentation``: a list of polygons, or run lengths with their size, as
            numbers or as text.
        size: Height and width of the image, which run lengths must have.

    Returns:
        The shape; None if there is none that can be read.
    """
    if isinstance(segmentation, list):
        outlines = [outline for one in segmentation if (outline := outline_of(one)) is not None]
        return Shape(tuple(outlines)) if outlines else None
    if not isinstance(segmentation, dict):
        return None
    own, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(own, list) or tuple(map(positive_number, own)) != size:
        return None
    if isinstance(counts, str):
        counts = runs_of_text(counts)
    pixels = int(size[0]) * int(size[1])
    if not isinstance(counts, list) or not 0 < pixels <= max_pixels():
        return None
    if not all(type(count) is int and 0 <= count <= pixels for count in counts):
        return None
    rest = pixels - sum(counts)
    if rest < 0 or not any(counts[1::2]):
        return None
    if rest:  # the last may be missing
        counts = [*counts, *([rest] if len(counts) % 2 == 0 else [0, rest])]
    return Shape(runs=np.array(counts, np.uint32).tobytes())


def as_coco(shape: Shape, size: tuple[int, int]) -> list[list[float]] | dict[str, Any]:
    """The ``segmentation`` of an annotation in COCO's format; the inverse of ``coco_shape``.

    Args:
        shape: Polygons or run lengths.
        size: Height and width of the image.

    Returns:
        Polygons, or compressed run lengths.
    """
    if shape.runs:
        return {"size": list(size), "counts": text_of_runs(shape.run_lengths())}
    return [np.frombuffer(outline, np.float32).tolist() for outline in shape.outlines]


def labelme_shape(shape: dict[str, Any]) -> Shape | None:
    """A polygon, rectangle or circle of LabelMe; None if the shape is another or can't be read."""
    points, kind = shape.get("points"), shape.get("shape_type") or "polygon"
    if not isinstance(points, list) or not all(isinstance(p, list) and len(p) == 2 for p in points):
        return None
    flat = [value for point in points for value in point]
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in flat):
        return None
    if kind == "rectangle" and len(points) == 2:
        (x1, y1), (x2, y2) = points
        flat = [x1, y1, x2, y1, x2, y2, x1, y2]
    elif kind == "circle" and len(points) == 2:
        (x, y), (x2, y2) = points
        radius, angles = math.hypot(x2 - x, y2 - y), np.linspace(0, 2 * np.pi, _CIRCLE, False)
        ring = np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], axis=1)
        flat = ring.ravel().tolist()
    elif kind != "polygon":
        return None
    outline = outline_of(flat)
    return None if outline is None else Shape((outline,))


def positive_number(value: Any) -> float:
    """Convert a value from a file to a positive number below 1e9; 0 if it is none."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return number if math.isfinite(number) and 0 < number < 1e9 else 0.0


def parse_id(value: Any) -> int | str | None:
    """Normalize an id, as some tools write the same id as a number and as text."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(value)
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None


def missing_key(content: Any) -> str | None:
    """Return the first key of COCO's format that the content of a JSON file lacks, or None."""
    for key in COCO_LISTS:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            return key
    return None


def category_name(category: Mapping[str, Any]) -> str:
    """Name of a category in COCO's format; its id if it has no name."""
    name = category.get("name")
    if not isinstance(name, str | int | float):
        name = parse_id(category.get("id"))
    return str(name).strip()


def draw_shape(mask: np.ndarray, shape: Shape, size: tuple[float, float], value: int = 1) -> None:
    """Draw a shape into a mask.

    Args:
        mask: ``(H, W)`` uint8.
        shape: Shape to draw.
        size: Height and width of the image in the coordinates of the shape; zeros if they are those
            of the mask. Those of run lengths are integers.
        value: Value of its pixels.
    """
    scale = np.array([1.0, 1.0])
    if min(size) > 0:
        scale = np.array([mask.shape[1] / size[1], mask.shape[0] / size[0]])
    if shape.runs:
        inside = mask_of_runs(shape.run_lengths(), (int(size[0]), int(size[1])))
        if inside.shape != mask.shape:
            how = cv2.INTER_AREA if inside.size > mask.size else cv2.INTER_NEAREST_EXACT
            inside = cv2.resize(inside * np.uint8(255), mask.shape[::-1], interpolation=how) >= 128
        mask[inside > 0] = value
    for outline in shape.outlines:
        _fill(mask, np.clip(points_of(outline) * scale, -_MAX_COORDINATE, _MAX_COORDINATE), value)


def _fill(mask: np.ndarray, points: np.ndarray, value: int) -> None:
    """Set the pixels whose centers a polygon holds (by the even-odd rule), as pycocotools does.

    OpenCV's ``fillPoly`` also sets those that the outline touches, which makes a square of 4 x 4
    pixels one of 5 x 5. It draws only what is too thin to hold a center.

    Args:
        mask: ``(H, W)`` uint8.
        points: Corners ``(N, 2)`` of x and y, in which integers are the edges of pixels.
        value: Value to set.
    """
    height, width = mask.shape
    left, top = np.clip(np.floor(points.min(axis=0)), 0, (width, height)).astype(int)
    right, bottom = np.clip(np.ceil(points.max(axis=0)), 0, (width, height)).astype(int)
    if right <= left or bottom <= top:
        return
    start, end = points, np.roll(points, -1, axis=0)
    # rows whose centers an edge crosses: from `first` up to, but without `last`
    low, high = np.minimum(start[:, 1], end[:, 1]), np.maximum(start[:, 1], end[:, 1])
    first = np.clip(np.ceil(low - 0.5), top, bottom).astype(int)
    last = np.clip(np.ceil(high - 0.5), top, bottom).astype(int)
    counts = last - first
    edge = np.repeat(np.arange(len(points)), counts)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts) + first[edge]
    slope = (end - start)[edge]
    crossing = start[edge, 0] + (row + 0.5 - start[edge, 1]) * slope[:, 0] / slope[:, 1]
    column = np.clip(np.ceil(crossing - 0.5), left, right).astype(int)
    steps = np.zeros((bottom - top, right - left + 1), np.uint8)
    np.bitwise_xor.at(steps, (row - top, column - left), 1)
    inside = np.bitwise_xor.accumulate(steps, axis=1)[:, :-1] > 0
    if inside.any():
        mask[top:bottom, left:right][inside] = value
    else:
        fixed = np.round((points - 0.5) * (1 << _SHIFT)).astype(np.int32)
        cv2.fillPoly(mask, [fixed], (value,), shift=_SHIFT)
