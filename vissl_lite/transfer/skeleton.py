"""Files of images without labels, which people or labelling tools fill."""

import csv
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from vissl_lite.data.atomic_file import write_atomically
from vissl_lite.data.formats import image_size
from vissl_lite.data.images import BROKEN_IMAGE
from vissl_lite.data.json_file import read_json
from vissl_lite.data.text_file import csv_writer, read_text
from vissl_lite.errors import UserError

TABLE_SKELETON, COCO_SKELETON = "to_label.csv", "to_label.json"


def write_table_skeleton(file: Path, paths: Sequence[str]) -> Path:
    """Write a table with the columns ``path`` and ``label``, which is empty.

    ``finetune`` leaves out rows whose label is still empty.

    Args:
        file: CSV file to write.
        paths: Image files.
    """
    with csv_writer(file) as rows:
        rows.writerow(["path", "label"])
        rows.writerows([path, ""] for path in paths)
    return file


def write_coco_skeleton(file: Path, paths: Sequence[str], classes: Sequence[str]) -> Path:
    """Write a file in COCO's format with images and categories, and without annotations.

    Args:
        file: JSON file to write.
        paths: Image files. Those that are gone are left out.
        classes: Names of the categories; may be empty.
    """
    images = []
    for number, path in enumerate(paths, start=1):
        try:
            height, width = image_size(path)
        except BROKEN_IMAGE:  # it was read a moment ago, but can have gone since
            continue
        images.append({"id": number, "file_name": path, "height": height, "width": width})
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, start=1)]
    content = {"images": images, "annotations": [], "categories": categories}
    write_atomically(file, json.dumps(content, indent=1) + "\n")
    return file


def filled_skeleton(folder: Path) -> Path | None:
    """The file in a folder that somebody has added labels to; None if there is none."""
    table, annotated = folder / TABLE_SKELETON, folder / COCO_SKELETON
    with suppress(OSError, UserError, csv.Error):
        rows = csv.DictReader(read_text(table).splitlines())
        if any((row.get("label") or "").strip() for row in rows):
            return table
    with suppress(OSError, UserError):
        content = read_json(annotated)
        if isinstance(content, dict) and content.get("annotations"):
            return annotated
    return None
