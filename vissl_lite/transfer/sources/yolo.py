"""What data sets in YOLO's format say in ``data.yaml`` and beside it (docs.ultralytics.com)."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vissl_lite.data.images import find_images
from vissl_lite.data.text_file import read_text
from vissl_lite.data.yaml_file import read_yaml
from vissl_lite.transfer.sources.file_tree import FileTree
from vissl_lite.transfer.sources.parts import VAL_NAMES, Split
from vissl_lite.transfer.sources.reading_log import MISSING_IMAGE, ReadingLog

# Keys of each part in a data.yaml.
SPLIT_KEYS: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "val": VAL_NAMES,
    "test": ("test",),
}

# Files that name a class on each line, as tools write them, and their suffix for Darknet.
NAME_FILES = ("classes.txt", "predefined_classes.txt", "class_names.txt", "_darknet.labels")
_NAMES_SUFFIX = ".names"


def data_yaml(file: Path) -> dict[str, Any] | None:
    """Read a ``data.yaml``; None if the file is another YAML file.

    Raises:
        UserError: If the file is not YAML; see ``read_yaml``.
    """
    content = read_yaml(file)
    if not isinstance(content, dict) or not ("names" in content or "nc" in content):
        return None
    return content if any(key in content for key in ("train", *VAL_NAMES)) else None


def split_places(file: Path, content: dict[str, Any]) -> Iterator[tuple[Split, str, Path | None]]:
    """The entries of each part in a ``data.yaml``, and the folder or list of each if it exists.

    Args:
        file: The ``data.yaml``.
        content: What it holds.
    """
    root = str(content.get("path") or "")
    for split, keys in SPLIT_KEYS.items():
        value: Any = next((content[key] for key in keys if content.get(key)), [])
        for entry in map(str, value if isinstance(value, list) else [value]):
            yield split, entry, resolve_entry(file.parent, root, entry)


def images_at(place: Path, tree: FileTree, split: Split, log: ReadingLog) -> list[str]:
    """The images in a folder, or those that a text file lists.

    Raises:
        UserError: There are none in the folder, or the file can't be read.
    """
    return find_images([place]) if place.is_dir() else read_list(place, tree, split, log)


def resolve_entry(folder: Path, root: str, entry: str) -> Path | None:
    """The existing folder or list file that an entry of a ``data.yaml`` refers to, or None."""
    entry = entry.replace("\\", "/")
    below = entry
    while below.startswith("../"):
        below = below[3:]
    for base in (folder / root, folder.parent / root, folder, folder.parent):
        for name in (below, entry, below.rpartition("/")[2]):
            if name and os.path.exists(base / name):
                return base / name
    return None


def read_list(file: Path, tree: FileTree, split: Split, log: ReadingLog) -> list[str]:
    """Read a text file of image paths, relative to it or to the data set."""
    paths = []
    for line in filter(None, map(str.strip, read_text(file).splitlines())):
        beside = file.parent / line
        path = str(beside) if os.path.isfile(beside) else tree.image(line, split)
        if path is None:
            log.add(MISSING_IMAGE, line)
        else:
            paths.append(path)
    return paths


def holds(folder: Path, other: Path) -> bool:
    """Whether a folder is above another, as the root of the file system is."""
    real = other.resolve()
    return folder.is_dir() and folder.resolve() in real.parents


def has_names(path: str) -> bool:
    """Whether a file lists names of classes, such as ``classes.txt`` or ``obj.names``."""
    name = path.rpartition("/")[2].lower()
    return name.endswith((*NAME_FILES, _NAMES_SUFFIX))


def names_file(tree: FileTree) -> Path | None:
    """The file of class names in a folder; the least deep of several."""
    found = [path for path in tree.others if has_names(path)]
    return Path(tree.absolute(min(found, key=lambda path: path.count("/")))) if found else None


def read_names(file: Path) -> dict[str, str]:
    """Class names by the number of their line, from 0; of empty lines none."""
    lines = enumerate(read_text(file).splitlines())
    return {str(number): line.strip() for number, line in lines if line.strip()}
