"""What annotation files say, in whatever format: the readers make it, ``clean`` takes it."""

from typing import Any, NamedTuple

MISSING_IMAGE = "image missing, or not the only one of its name, left out"
UNREADABLE_FILE = "file not readable, left out with the image"
UNREADABLE_BOX = "box not readable, left out"
UNKNOWN_CLASS = "box of an unknown class, left out"

# Classes that a data set may name: more than in any that there is.
MOST_CLASSES = 100_000

# Size in bytes of the largest annotation file of one image.
LARGEST_FILE = 2**24

# The size of the image in notes whose boxes are shares of its width and height, as in YOLO's files.
SHARES = (1.0, 1.0)


class Note(NamedTuple):
    """What an annotation file says of an image.

    Attributes:
        image: path of the file.
        split: train, val or test; None where the annotations name no splits.
        size: height and width of the image in the coordinates of the boxes; zeros where not said.
        boxes: x1, y1, x2, y2 of each.
        names: the class of each.
        ignored: COCO's ``iscrowd`` or VOC's ``difficult`` of each.
    """

    image: str
    split: str | None
    size: tuple[float, float]
    boxes: list[tuple[float, float, float, float]]
    names: list[str]
    ignored: list[bool]


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


def to_number(value: Any) -> float:
    """A number of a file; 0 if it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return 0.0
