"""Reader for box annotations in YOLO's format (docs.ultralytics.com/datasets/detect).

A ``data.yaml`` names the classes and the locations of the images of each split. Next to each
folder ``images`` there is a folder ``labels`` with a text file for each image.
"""

import math
import os
from pathlib import Path
from typing import Any

from vissl_lite.data.text_file import read_text
from vissl_lite.errors import UserError, brief
from vissl_lite.transfer.detection.data.annotations import (
    MAX_CLASSES,
    MAX_FILE_SIZE,
    RELATIVE_SIZE,
    UNKNOWN_CLASS,
    UNREADABLE_FILE,
    Annotations,
    ImageAnnotation,
)
from vissl_lite.transfer.sources.file_tree import FileTree, part_below
from vissl_lite.transfer.sources.parts import Split, part_of_path
from vissl_lite.transfer.sources.reading_log import MISSING_IMAGE, ReadingLog
from vissl_lite.transfer.sources.shapes import Shape, outline_of
from vissl_lite.transfer.sources.yolo import (
    has_names,
    holds,
    images_at,
    names_file,
    read_names,
    resolve_entry,
    split_places,
)


def darknet_data(file: Path) -> dict[str, Any] | None:
    """Read Darknet's ``obj.data``, lines of ``key = value``; None if the file is another one."""
    pairs = [line.partition("=") for line in read_text(file).splitlines() if "=" in line]
    content = {key.strip(): value.strip() for key, _, value in pairs}
    return content if "names" in content and "train" in content else None


def read_yolo(
    file: Path, content: dict[str, Any], repairs: ReadingLog, with_shapes: bool = False
) -> Annotations:
    """Read the data set of a ``data.yaml``.

    Args:
        file: Path of the ``data.yaml``. Its paths are relative to its folder, to the parent of
            that, or to its ``path`` below either. Roboflow's ``../train/images`` means
            ``train/images``.
        content: Content of the file.
        repairs: Log to add repairs to.
        with_shapes: Whether polygons are read as such.

    Raises:
        UserError: If the train images do not exist, or ``names`` is neither a list nor a mapping.
    """
    tree = FileTree(file.parent)
    names = _class_names(file, _listed_names(file, content.get("names"), tree))
    images: dict[tuple[str, Split], None] = {}  # path and split, in order
    folders_only = True  # whether no entry is a list of paths
    for split, entry, place in split_places(file, content):
        if place is not None and holds(place, file.parent):
            raise UserError(
                f"{file} names {brief(entry)} for {split}, a folder that holds the whole data "
                f"set: name the folder of the images"
            )
        if place is None and split == "train":
            raise UserError(f"{file} names {brief(entry)} for train, which does not exist")
        if place is None:
            repairs.add(f"folder of {split} images missing, left out", entry)
            continue
        folders_only = folders_only and place.is_dir()
        found = images_at(place, tree, split, repairs)
        images.update(((path, split), None) for path in found)
    annotations, labels = [], set()
    for path, split in images:
        label = _label_file(path)
        labels.add(label)
        # images without a label file are background, like those with an empty one
        empty = ImageAnnotation(path, split, RELATIVE_SIZE, [], [], [], [])
        annotation = (
            _read_label_file(label, path, split, repairs, with_shapes)
            if os.path.isfile(label)
            else empty
        )
        if annotation is not None:
            annotations.append(annotation)
    # lists may omit images on purpose, so check for labels without image only in folders
    for folder in sorted({os.path.dirname(label) for label in labels}) if folders_only else ():
        if "labels" in Path(folder).parts and os.path.isdir(folder):
            there = {os.path.join(folder, name) for name in os.listdir(folder)}
            for lone in sorted(there - labels):
                if lone.endswith(".txt") and not has_names(lone):
                    repairs.add(MISSING_IMAGE, lone)
    return _replace_ids(annotations, names, len(images), repairs)


def read_labels(
    labels: FileTree, images: FileTree, repairs: ReadingLog, with_shapes: bool = False
) -> Annotations:
    """Read a folder of label files that are named like their images; see ``load_boxes``.

    Args:
        labels: Folder of the label files. A ``classes.txt``, ``obj.names`` or the like in it, or in
            the folder of the images, names the classes.
        images: Folder of the images. Those without a label file are background.
        repairs: Log to add repairs to.
        with_shapes: Whether polygons are read as such.
    """
    listed = names_file(labels) or names_file(images)
    names = None if listed is None else read_names(listed)
    repairs.label = "class numbers" if listed is None else f"names in {listed.name}"
    if listed is None:
        repairs.warn(
            "data.class_names",
            f"{labels.folder} has no classes.txt that names the classes: they have numbers",
        )
    annotations: list[ImageAnnotation] = []
    matched = set()
    for path in label_files(labels):
        file = os.path.join(labels.folder, path)
        split = part_of_path(path)
        image = images.image(path[: -len(".txt")], split)
        if image is None:
            repairs.add(MISSING_IMAGE, file)
            continue
        matched.add(image)
        part = split or part_below(image, images)
        annotation = _read_label_file(file, image, part, repairs, with_shapes)
        if annotation is not None:
            annotations.append(annotation)
    for path in images.images:
        image = os.path.join(images.folder, path)
        if image not in matched:
            annotations.append(
                ImageAnnotation(image, part_of_path(path), RELATIVE_SIZE, [], [], [], [])
            )
    return _replace_ids(annotations, names, len(images.images), repairs)


def label_files(tree: FileTree) -> list[str]:
    """The files in a folder that are named like an image and may be YOLO's, relative to it."""
    return [path for path in tree.ending(".txt") if not has_names(path)]


def looks_like_labels(file: str | Path) -> bool:
    """Whether the first line of a text file is one of YOLO's, or there is none."""
    try:
        lines = read_text(file, MAX_FILE_SIZE).splitlines()
        words = next((line.split() for line in lines if line.strip()), ["0"] * 5)
        return len(words) >= 5 and all(math.isfinite(float(word)) for word in words)
    except (UserError, ValueError):
        return False


def _listed_names(file: Path, names: Any, tree: FileTree) -> Any:
    """The names of a ``data.yaml``, which may be in another file."""
    if isinstance(names, str):
        place = resolve_entry(file.parent, "", names)
        if place is None or not place.is_file():
            raise UserError(
                f"{file} names {brief(names)} for the class names: there is no such file"
            )
        return read_names(place)
    other = names_file(tree) if names is None else None
    return names if other is None else read_names(other)


def _class_names(file: Path, names: Any) -> dict[str, str] | None:
    """Class names by id; None if the file gives only the number of classes."""
    if names is None:
        return None
    if isinstance(names, list):
        names = dict(enumerate(names))
    try:
        by_id = {str(int(key)): name for key, name in names.items()}
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise UserError(f"{file}: names must be a list, or a mapping from ids to names") from None
    if len(by_id) > MAX_CLASSES:
        raise UserError(f"{file} names {len(by_id)} classes, more than {MAX_CLASSES}")
    for name in by_id.values():
        if not isinstance(name, str | int | float):
            raise UserError(f"{file}: the class name {brief(name)} is not text")
    return {key: str(name) for key, name in by_id.items()}


def _label_file(image: str) -> str:
    """Path of the label file of an image: in ``labels`` instead of ``images``, or next to it."""
    beside = os.path.splitext(image)[0] + ".txt"
    parts = Path(beside).parts
    places = [i for i, part in enumerate(parts[:-1]) if part.lower() == "images"]
    if not places:
        return beside
    at = places[-1]
    in_labels = os.path.join(*parts[:at], "labels", *parts[at + 1 :])
    return beside if not os.path.isfile(in_labels) and os.path.isfile(beside) else in_labels


def _read_label_file(
    file: str, image: str, split: Split | None, repairs: ReadingLog, with_shapes: bool
) -> ImageAnnotation | None:
    """Read the label file of one image: lines of ``class cx cy w h``, relative to its size.

    Lines with more numbers are polygons (``class x y x y x y ...``) and give their bounding boxes,
    and with ``with_shapes`` themselves.
    The class names of the result are still ids.

    Returns:
        The annotation; None if the file is not a text file.
    """
    annotation = ImageAnnotation(image, split, RELATIVE_SIZE, [], [], [], [])
    try:
        lines = read_text(file, MAX_FILE_SIZE).splitlines()
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
        outline = None
        if len(values) == 4:
            x, y, width, height = values
            box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        else:
            xs, ys = values[::2], values[1::2]
            box = (min(xs), min(ys), max(xs), max(ys))
            outline = outline_of(values) if with_shapes else None
        shape = None if outline is None else Shape((outline,))
        annotation.add(box, str(number), shape=shape)
    return annotation


def _replace_ids(
    annotations: list[ImageAnnotation],
    names: dict[str, str] | None,
    num_listed: int,
    repairs: ReadingLog,
) -> Annotations:
    """Replace class ids by class names.

    Args:
        annotations: Annotations with ids as class names.
        names: Class names by id; None to keep the ids as names.
        num_listed: See ``Annotations``.
        repairs: Log to add boxes of unknown classes to, which are left out.
    """
    if names is None:
        found = sorted(
            {number for annotation in annotations for number in annotation.names}, key=int
        )
        return Annotations(found, annotations, num_listed)
    good: list[ImageAnnotation] = []
    for annotation in annotations:
        known = [i for i, number in enumerate(annotation.names) if number in names]
        repairs.add(UNKNOWN_CLASS, annotation.image, len(annotation.names) - len(known))
        good.append(
            annotation._replace(
                boxes=[annotation.boxes[i] for i in known],
                names=[names[annotation.names[i]] for i in known],
                ignored=[annotation.ignored[i] for i in known],
                shapes=[annotation.shapes[i] for i in known],
            )
        )
    return Annotations([names[number] for number in sorted(names, key=int)], good, num_listed)
