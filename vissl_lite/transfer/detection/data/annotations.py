"""Annotations as the readers of all formats return them, and as ``clean`` takes them."""

from typing import Any, NamedTuple

from vissl_lite.transfer.sources.parts import Split
from vissl_lite.transfer.sources.shapes import Shape

UNREADABLE_FILE = "file not readable, left out with the image"
UNREADABLE_BOX = "box not readable, left out"
UNREADABLE_SHAPE = "shape not readable, the box kept"
UNKNOWN_CLASS = "box of an unknown class, left out"

# Maximum number of classes in a data set, far above that of any public one.
MAX_CLASSES = 100_000

# Maximum size in bytes of the annotation file of one image.
MAX_FILE_SIZE = 2**24

# Image size of annotations whose boxes are relative to width and height, as in YOLO's format.
RELATIVE_SIZE = (1.0, 1.0)


Corners = tuple[float, float, float, float]  # x1, y1, x2, y2


class ImageAnnotation(NamedTuple):
    """Annotation of one image.

    Attributes:
        image: Path of the image file.
        split: ``train``, ``val`` or ``test``; None if the annotations name no splits.
        size: Height and width of the image in the coordinates of the boxes; zeros if unknown.
        boxes: Corners x1, y1, x2, y2 of each box.
        names: Class name of each box.
        ignored: COCO's ``iscrowd`` or VOC's ``difficult`` of each box.
        shapes: Polygons or run lengths of each object in the coordinates of the boxes; None for
            those that have a box only, and for all unless shapes are asked for.
    """

    image: str
    split: Split | None
    size: tuple[float, float]
    boxes: list[Corners]
    names: list[str]
    ignored: list[bool]
    shapes: list[Shape | None]

    def add(
        self, box: Corners, name: str, ignored: bool = False, shape: Shape | None = None
    ) -> None:
        """Add an object."""
        self.boxes.append(box)
        self.names.append(name)
        self.ignored.append(ignored)
        self.shapes.append(shape)


class Annotations(NamedTuple):
    """Annotations of a data set.

    Attributes:
        classes: Class names in the order of their ids; sorted by name if there are no ids.
        images: Annotation of each image that was found.
        num_listed: Number of images that the files list, including missing ones.
        parents: Names of COCO's supercategories.
    """

    classes: list[str]
    images: list[ImageAnnotation]
    num_listed: int
    parents: frozenset[str] = frozenset()


def enclosing_box(points: Any) -> Corners | None:
    """The smallest box around points ``[[x, y], ...]``; None if they are not pairs of numbers."""
    try:
        pairs = [(float(x), float(y)) for x, y in points]
    except (TypeError, ValueError):
        return None
    if not pairs:
        return None
    xs, ys = zip(*pairs, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def to_number(value: Any) -> float:
    """Convert a value from a file to float; 0 if it is not a number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return 0.0
