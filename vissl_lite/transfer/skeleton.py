"""Files of images without labels, which people or labelling tools fill."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from vissl_lite.data.atomic_file import write_atomically
from vissl_lite.data.formats import image_size
from vissl_lite.data.images import BROKEN_IMAGE
from vissl_lite.data.json_file import read_json
from vissl_lite.data.text_file import csv_writer, read_bytes
from vissl_lite.errors import UserError
from vissl_lite.transfer.sources.file_tree import MASK_FOLDERS, FileTree
from vissl_lite.transfer.sources.parts import part_of_file
from vissl_lite.transfer.sources.shapes import COCO_LISTS, category_name, missing_key, parse_id

TABLE_SKELETON, COCO_SKELETON = "to_label.csv", "to_label.json"

TABLE_HEADERS = (["path", "label"], ["path", "label", "group"])

# A file in COCO's format: lists of images, annotations and categories, and perhaps other keys.
CocoContent: TypeAlias = Mapping[str, Any]

# The key of COCO's format for notes, and in it a hash that tells whether labels were added.
_INFO, _HASH = "info", "sha256"


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


def read_coco_labels(labelled: Path, annotations: Path | None = None) -> CocoContent | None:
    """The images of a file in COCO's format with their labels, for ``write_coco_skeleton``.

    Args:
        labelled: The file; with ``annotations`` the folder of its images.
        annotations: The file, if it is apart from the images.

    Returns:
        Content of the file, with absolute names of the images that are found; None if it is not in
        this format.

    Raises:
        UserError: It is not JSON.
    """
    file = annotations or labelled
    if file.suffix.lower() != ".json" or not file.is_file():
        return None
    content = read_json(file)
    if missing_key(content) is not None:
        return None
    lists = {key: [one for one in content[key] if isinstance(one, dict)] for key in COCO_LISTS}
    folder = file.parent
    if annotations is not None:
        folder = labelled
    elif folder.name.lower() in MASK_FOLDERS:
        folder = folder.parent
    tree, part = FileTree(folder), part_of_file(file.name)
    images = []
    for one in lists["images"]:
        name = one.get("file_name") or one.get("coco_url")
        found = tree.image(name, part) if isinstance(name, str) and name else None
        images.append(one if found is None else {**one, "file_name": os.path.abspath(found)})
    return {**content, **lists, "images": images}


def write_coco_skeleton(
    file: Path,
    paths: Sequence[str],
    classes: Sequence[str],
    earlier: CocoContent | None = None,
) -> Path:
    """Write a file in COCO's format with images that have no annotations.

    Args:
        file: JSON file to write.
        paths: Image files. Those that are gone are left out.
        classes: Names of the categories; may be empty.
        earlier: Images with annotations, which the file begins with, and their categories, from
            ``read_coco_labels``. Images and categories are added to them, with larger ids.
    """
    content = {key: list((earlier or {}).get(key, ())) for key in COCO_LISTS}
    images, categories = content["images"], content["categories"]
    for number, path in enumerate(paths, start=_next_id(images)):
        try:
            height, width = image_size(path)
        except BROKEN_IMAGE:  # it was read a moment ago, but can have gone since
            continue
        images.append({"id": number, "file_name": path, "height": height, "width": width})
    known = {category_name(one) for one in categories}
    new = [name for name in classes if name not in known]
    numbered = enumerate(new, start=_next_id(categories))
    categories += [{"id": number, "name": name} for number, name in numbered]
    before = (earlier or {}).get(_INFO)
    info = before if isinstance(before, dict) else {"description": "images to label, by vissl-lite"}
    whole = {**(earlier or {}), _INFO: {**info, _HASH: _hash(content)}, **content}
    write_atomically(file, _as_json(whole))
    return file


def _as_json(content: CocoContent) -> str:
    """JSON with a line for each image, annotation and category."""
    parts = []
    for key, value in content.items():
        if key in COCO_LISTS and value:
            lines = ",\n".join(map(json.dumps, value))
            parts.append(f"{json.dumps(key)}: [\n{lines}\n]")
        else:
            parts.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{" + ",\n".join(parts) + "}\n"


def _next_id(items: Sequence[Mapping[str, Any]]) -> int:
    """The number after the largest id; 1 if there is none."""
    ids = [parse_id(one.get("id")) for one in items]
    return 1 + max((one for one in ids if isinstance(one, int)), default=0)


def _hash(content: CocoContent) -> str:
    """Hash of images, annotations and categories, however they are formatted."""
    text = json.dumps([content[key] for key in COCO_LISTS], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def filled_skeleton(folder: Path) -> Path | None:
    """The file in a folder that somebody has changed since it was written; None if there is none.

    Spreadsheets save tables with other separators, encodings and headers, and a tool may write a
    file that is not JSON: whatever is not an unchanged skeleton may hold new labels.
    """
    unchanged = {TABLE_SKELETON: _is_empty_table, COCO_SKELETON: _is_unchanged_coco}
    for name, check in unchanged.items():
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


def _is_unchanged_coco(file: Path) -> bool:
    try:
        content = read_json(file)
    except UserError:
        return False
    if missing_key(content) is not None or not isinstance(content.get(_INFO), dict):
        return False
    return bool(content[_INFO].get(_HASH) == _hash(content))
