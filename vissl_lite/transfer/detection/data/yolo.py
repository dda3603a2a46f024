"""Reads boxes in YOLO's format, which has no paper: docs.ultralytics.com/datasets/detect.

A ``data.yaml`` names the classes and where the images of each split are; beside every folder
``images`` there is one ``labels`` with a text file for each image.
"""

import os
from pathlib import Path
from typing import Any

from vissl_lite.data.images import find_images
from vissl_lite.data.text_file import read_text
from vissl_lite.data.yaml_file import read_yaml
from vissl_lite.errors import UserError, brief
from vissl_lite.transfer.detection.data.annotations import (
    LARGEST_FILE,
    MISSING_IMAGE,
    MOST_CLASSES,
    SHARES,
    UNKNOWN_CLASS,
    UNREADABLE_FILE,
    Annotations,
    Note,
)
from vissl_lite.transfer.detection.data.cleaning import RepairLog
from vissl_lite.transfer.sources import VAL_NAMES, FileTree, split_below, split_of_path

_KEYS = {"train": ("train",), "val": VAL_NAMES, "test": ("test",)}
_CLASSES = "classes.txt"


def data_yaml(file: Path) -> dict[str, Any] | None:
    """The content of a ``data.yaml``; None if the file is another YAML file.

    Raises:
        UserError: it is no YAML; see ``read_yaml``.
    """
    content = read_yaml(file)
    if not isinstance(content, dict) or not ("names" in content or "nc" in content):
        return None
    return content if any(key in content for key in ("train", *VAL_NAMES)) else None


def read_yolo(file: Path, content: dict[str, Any], repairs: RepairLog) -> Annotations:
    """Read the data set of a ``data.yaml``.

    Args:
        file: it; paths are relative to it, to its folder's parent, or to its ``path`` seen from
            either. Roboflow's ``../train/images`` is meant as ``train/images``.
        content: of it.
        repairs: what was left out is counted here.

    Raises:
        UserError: it has no train images, or its names are no list or mapping.
    """
    names = _class_names(file, content.get("names"))
    tree = FileTree(file.parent)
    images: dict[tuple[str, str], None] = {}  # path and split, in order
    folders = True  # whether all images are given by folders
    for split, keys in _KEYS.items():
        value: Any = next((content[key] for key in keys if content.get(key)), [])
        for entry in value if isinstance(value, list) else [value]:
            place = _place(file.parent, str(content.get("path") or ""), str(entry))
            if place is None and split == "train":
                raise UserError(f"{file} names {brief(entry)} for train, which does not exist")
            if place is None:
                repairs.add(f"folder of {split} images missing, left out", str(entry))
                continue
            folders = folders and place.is_dir()
            paths = find_images([place]) if place.is_dir() else _listed(place, tree, split, repairs)
            images.update(((path, split), None) for path in paths)
    notes, labels = [], set()
    for path, split in images:
        label = _label_file(path)
        labels.add(label)
        # an image without a label file is background, as is one whose file is empty
        empty = Note(path, split, SHARES, [], [], [])
        note = _read_file(label, path, split, repairs) if os.path.isfile(label) else empty
        if note is not None:
            notes.append(note)
    # a list may leave out images on purpose, a folder does not
    for folder in sorted({os.path.dirname(label) for label in labels}) if folders else ():
        if "labels" in Path(folder).parts and os.path.isdir(folder):
            there = {os.path.join(folder, name) for name in os.listdir(folder)}
            for lone in sorted(there - labels):
                if lone.endswith(".txt") and not lone.endswith(_CLASSES):
                    repairs.add(MISSING_IMAGE, lone)
    return _named(notes, names, len(images), repairs)


def read_labels(labels: FileTree, images: FileTree, repairs: RepairLog) -> Annotations:
    """Read a folder of label files, which have the stems of their images; see ``load_boxes``.

    Args:
        labels: the folder; a ``classes.txt`` there or beside the images names the classes.
        images: where the images are. One without a label file is background.
        repairs: what was left out is counted here.
    """
    names = None
    for folder in (labels.folder, images.folder):
        if names is None and (folder / _CLASSES).is_file():
            lines = enumerate(read_text(folder / _CLASSES).splitlines())
            names = {str(i): line.strip() for i, line in lines if line.strip()}
    notes: list[Note] = []
    seen = set()
    for path in label_files(labels):
        file = os.path.join(labels.folder, path)
        split = split_of_path(path)
        image = images.image(path[: -len(".txt")], split)
        if image is None:
            repairs.add(MISSING_IMAGE, file)
            continue
        seen.add(image)
        note = _read_file(file, image, split or split_below(image, images), repairs)
        if note is not None:
            notes.append(note)
    for path in images.images:
        image = os.path.join(images.folder, path)
        if image not in seen:
            notes.append(Note(image, split_of_path(path), SHARES, [], [], []))
    return _named(notes, names, len(images.images), repairs)


def label_files(tree: FileTree) -> list[str]:
    """The label files in a folder, relative to it."""
    return [path for path in tree.ending(".txt") if Path(path).name != _CLASSES]


def _class_names(file: Path, names: Any) -> dict[str, str] | None:
    """Names by id; None where the file gives a number of classes only."""
    if names is None:
        return None
    if isinstance(names, list):
        names = dict(enumerate(names))
    try:
        by_id = {str(int(key)): name for key, name in names.items()}
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise UserError(f"{file}: names must be a list, or a mapping from ids to names") from None
    if len(by_id) > MOST_CLASSES:
        raise UserError(f"{file} names {len(by_id)} classes, more than {MOST_CLASSES}")
    for name in by_id.values():
        if not isinstance(name, str | int | float):
            raise UserError(f"{file}: the name {brief(name)} of a class is no text")
    return {key: str(name) for key, name in by_id.items()}


def _place(folder: Path, root: str, entry: str) -> Path | None:
    """The folder or list that an entry of a ``data.yaml`` means; None if there is none."""
    entry = entry.replace("\\", "/")
    below = entry
    while below.startswith("../"):
        below = below[3:]
    for base in (folder / root, folder.parent / root, folder, folder.parent):
        for name in (below, entry):
            if os.path.exists(base / name):
                return base / name
    return None


def _listed(file: Path, tree: FileTree, split: str, repairs: RepairLog) -> list[str]:
    """The images in a text file of paths, which are relative to it or to the data set."""
    paths = []
    for line in filter(None, map(str.strip, read_text(file).splitlines())):
        beside = file.parent / line
        path = str(beside) if os.path.isfile(beside) else tree.image(line, split)
        if path is None:
            repairs.add(MISSING_IMAGE, line)
        else:
            paths.append(path)
    return paths


def _label_file(image: str) -> str:
    """Where the labels of an image are: in ``labels`` for ``images``, or else beside it."""
    beside = os.path.splitext(image)[0] + ".txt"
    parts = Path(beside).parts
    places = [i for i, part in enumerate(parts[:-1]) if part.lower() == "images"]
    if not places:
        return beside
    at = places[-1]
    sister = os.path.join(*parts[:at], "labels", *parts[at + 1 :])
    return beside if not os.path.isfile(sister) and os.path.isfile(beside) else sister


def _read_file(file: str, image: str, split: str | None, repairs: RepairLog) -> Note | None:
    """Read the ``.txt`` file of one image in YOLO's format: ``class cx cy w h``, in shares.

    Lines with more numbers are polygons (``class x y x y x y ...``), of which the bounding box is
    taken. The classes of the note are still ids.

    Returns:
        None if the file is not a text file.
    """
    note = Note(image, split, SHARES, [], [], [])
    try:
        lines = read_text(file, LARGEST_FILE).splitlines()
    except UserError:
        repairs.add(UNREADABLE_FILE, file)
        return None
    for line in lines:
        words = line.split()
        if not words:
            continue
        try:
            kind, *values = map(float, words)
            number = int(kind)
        except (ValueError, OverflowError):
            number, kind, values = -1, -1.0, []
        if kind < 0 or kind != number or len(values) not in (4, *range(6, len(values) + 1, 2)):
            repairs.add("line not readable, left out", file)
            continue
        if len(values) == 4:
            x, y, width, height = values
            box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        else:
            across, down = values[::2], values[1::2]
            box = (min(across), min(down), max(across), max(down))
        note.boxes.append(box)
        note.names.append(str(number))
        note.ignored.append(False)
    return note


def _named(
    notes: list[Note], names: dict[str, str] | None, named: int, repairs: RepairLog
) -> Annotations:
    """Put the names of classes in the place of YOLO's ids.

    Args:
        notes: with ids.
        names: by id; None to keep the ids as names.
        named: see ``Annotations``.
        repairs: boxes without a name are left out and counted here.
    """
    if names is None:
        found = sorted({number for note in notes for number in note.names}, key=int)
        return Annotations(found, notes, named)
    good: list[Note] = []
    for note in notes:
        known = [i for i, number in enumerate(note.names) if number in names]
        repairs.add(UNKNOWN_CLASS, note.image, len(note.names) - len(known))
        good.append(
            note._replace(
                boxes=[note.boxes[i] for i in known],
                names=[names[note.names[i]] for i in known],
                ignored=[note.ignored[i] for i in known],
            )
        )
    return Annotations([names[number] for number in sorted(names, key=int)], good, named)
