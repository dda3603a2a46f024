"""Files of images without labels, which people or labelling tools fill."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from vissl_lite.data.atomic_file import write_atomically
from vissl_lite.data.formats import image_size
from vissl_lite.data.images import BROKEN_IMAGE
from vissl_lite.data.json_file import read_json
from vissl_lite.data.text_file import csv_writer, read_bytes
from vissl_lite.errors import UserError

TABLE_SKELETON, COCO_SKELETON = "to_label.csv", "to_label.json"

TABLE_HEADERS = (["path", "label"], ["path", "label", "group"])


def write_table_skeleton(
    file: Path, paths: Sequence[str], groups: Mapping[str, str] | None = None
) -> Path:
    """Write a table with the columns ``path`` and ``label``, which is empty.

    ``finetune`` leaves out rows whose label is still empty, and divides no group.

    Args:
        file: CSV file to write.
        paths: Image files.
        groups: Groups of images that have one, for a column ``group``; None for no such column.
    """
    with csv_writer(file) as rows:
        rows.writerow(TABLE_HEADERS[groups is not None])
        more = [[] if groups is None else [groups.get(path, "")] for path in paths]
        rows.writerows([path, "", *one] for path, one in zip(paths, more, strict=True))
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
    """The file in a folder that somebody has changed since it was written; None if there is none.

    Spreadsheets save tables with other separators, encodings and headers, and a tool may write a
    file that is not JSON: whatever is not an empty skeleton may hold labels.
    """
    empty = {TABLE_SKELETON: _is_empty_table, COCO_SKELETON: _is_empty_coco}
    for name, check in empty.items():
        if (folder / name).exists() and not check(folder / name):
            return folder / name
    return None


def _is_empty_table(file: Path) -> bool:
    try:
        text = read_bytes(file).decode("utf-8", "surrogateescape")
        header, *rows = csv.reader(io.StringIO(text, newline=""))
    except (UserError, csv.Error, ValueError):  # ValueError: it has no rows
        return False
    return header in TABLE_HEADERS and all(len(row) > 1 and row[1] == "" for row in rows)


def _is_empty_coco(file: Path) -> bool:
    try:
        content = read_json(file)
    except UserError:
        return False
    if not isinstance(content, dict) or set(content) != {"images", "annotations", "categories"}:
        return False
    own = {"id", "file_name", "height", "width"}
    return content["annotations"] == [] and all(set(one) == own for one in content["images"])
