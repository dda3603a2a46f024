"""Reader for box annotations in Pascal VOC's format."""

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

from vissl_lite.data.text_file import read_bytes
from vissl_lite.errors import UserError
from vissl_lite.transfer.detection.data.annotations import (
    MAX_FILE_SIZE,
    UNKNOWN_CLASS,
    UNREADABLE_BOX,
    UNREADABLE_FILE,
    Annotations,
    Corners,
    ImageAnnotation,
    to_number,
)
from vissl_lite.transfer.detection.data.cleaning import NO_AREA
from vissl_lite.transfer.sources.file_tree import FileTree, part_below
from vissl_lite.transfer.sources.parts import Split, part_of_path
from vissl_lite.transfer.sources.reading_log import MISSING_IMAGE, ReadingLog


def read_voc(
    files: Sequence[tuple[str, Split | None]], folder: Path, tree: FileTree, repairs: ReadingLog
) -> Annotations:
    """Read files in Pascal VOC's format (Everingham et al. 2010, development kit, section 8).

    VOC counts pixels from 1 and gives the first and the last pixel of a box, so that the left edge
    is ``xmin - 1``. Many tools write edges counted from 0 instead: 1 is subtracted only if no
    annotation of the data set has a coordinate of 0.

    Args:
        files: XML files relative to the folder, each with its split or None.
        folder: Folder of the XML files.
        tree: Folder of the images. An image has the stem of its XML file, or is its ``filename``.
        repairs: Log to add repairs to.
    """
    annotations: list[ImageAnnotation] = []
    from_zero = False
    for path, split in files:
        file = str(folder / path)
        try:
            root = ET.fromstring(read_bytes(file, MAX_FILE_SIZE))
        except (ET.ParseError, UserError, ValueError, LookupError):
            repairs.add(UNREADABLE_FILE, file)
            continue
        if root.tag != "annotation":
            repairs.add(UNREADABLE_FILE, file)
            continue
        split = split or part_of_path(path)
        image = tree.image(path[: -len(".xml")], split)
        if image is None:
            image = tree.image(root.findtext("filename", "").strip(), split)
        if image is None:
            repairs.add(MISSING_IMAGE, file)
            continue
        size = (to_number(root.findtext("size/height")), to_number(root.findtext("size/width")))
        annotation = ImageAnnotation(image, split or part_below(image, tree), size, [], [], [], [])
        annotations.append(annotation)
        for one in root.iterfind("object"):
            name = one.findtext("name", "").strip()
            corners = _parse_corners(one)
            if corners is None:
                repairs.add(UNREADABLE_BOX, file)
            elif not name:
                repairs.add(UNKNOWN_CLASS, file)
            elif corners[0] == corners[2] or corners[1] == corners[3]:
                repairs.add(NO_AREA, file)  # subtracting 1 below would give it an area
            else:
                from_zero = from_zero or 0 in corners
                annotation.add(corners, name, to_number(one.findtext("difficult")) > 0)
    if not from_zero:
        for annotation in annotations:
            annotation.boxes[:] = [(x1 - 1, y1 - 1, x2, y2) for x1, y1, x2, y2 in annotation.boxes]
    return Annotations(
        sorted({n for annotation in annotations for n in annotation.names}), annotations, len(files)
    )


def _parse_corners(one: ET.Element) -> Corners | None:
    box = one.find("bndbox")
    try:
        if box is None:
            return None
        x1, y1, x2, y2 = (float(box.findtext(k, "")) for k in ("xmin", "ymin", "xmax", "ymax"))
    except ValueError:
        return None
    return x1, y1, x2, y2
