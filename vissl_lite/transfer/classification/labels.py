"""What the readers of folders and tables find: images, their classes and parts."""

from collections.abc import Sequence
from typing import NamedTuple

from vissl_lite.transfer.sources.parts import Split


class FoundImage(NamedTuple):
    """An image and its label.

    Attributes:
        path: Image file.
        names: Names of its classes: one, unless the data are multi-label.
        part: Train, val or test; None where nothing is said.
    """

    path: str
    names: tuple[str, ...]
    part: Split | None = None


class FoundLabels(NamedTuple):
    """Labels found in class folders or a table.

    Attributes:
        images: Images with their labels.
        multi_label: Whether an image may have several classes, or none.
        classes: Names that are known without an image, from a header.
    """

    images: list[FoundImage]
    multi_label: bool = False
    classes: Sequence[str] = ()
