"""Masks from shapes: COCO's polygons and RLE, YOLO's polygons, LabelMe's shapes."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from vissl_lite.data.json_file import read_json
from vissl_lite.data.text_file import read_text
from vissl_lite.data.yaml_file import read_yaml
from vissl_lite.errors import UserError
from vissl_lite.transfer.segmentation.mask_source import (
    IGNORE_INDEX,
    RELATIVE_SIZE,
    MaskSource,
)
from vissl_lite.transfer.segmentation.mask_values import BACKGROUND
from vissl_lite.transfer.sources.file_tree import FileTree, part_below
from vissl_lite.transfer.sources.parts import Split, part_of_file, part_of_name, part_of_path
from vissl_lite.transfer.sources.reading_log import MISSING_IMAGE, ReadingLog
from vissl_lite.transfer.sources.shapes import (
    Shape,
    coco_shape,
    labelme_shape,
    outline_of,
    parse_id,
    positive_number,
)
from vissl_lite.transfer.sources.yolo import (
    data_yaml,
    has_names,
    holds,
    images_at,
    names_file,
    read_names,
    split_places,
)

_UNREADABLE = "object without a polygon or RLE that can be read, left out"
_UNKNOWN_CLASS = "object of an unknown class, left out"
_DAMAGED = "file not readable, left out"

# Size in bytes of the largest text file of one image.
_MAX_TEXT_BYTES = 2**26

_Contents = Iterable[tuple[Path, Any]]  # JSON files with what they hold


class DrawnImage(NamedTuple):
    """An image and its shapes.

    Attributes:
        image: Path of the image file.
        part: Part that the annotations name.
        file: File of the shapes.
        size: Height and width in the coordinates of the shapes; zeros if unknown.
        shapes: Class name and the shape of each object.
    """

    image: str
    part: Split | None
    file: str
    size: tuple[float, float]
    shapes: list[tuple[str, Shape]]


class Drawn(NamedTuple):
    """The images of a data set with shapes.

    Attributes:
        images: Images that were found.
        classes: Class names in the order of their ids; sorted by name if there are no ids.
        num_boxes: Number of objects that have a box only.
    """

    images: list[DrawnImage]
    classes: list[str]
    num_boxes: int


def read_shapes(tree: FileTree, labels: FileTree, log: ReadingLog) -> Drawn | None:
    """Read the shapes in a folder, if there are any.

    Args:
        tree: Folder of the images.
        labels: Folder of the files of shapes.
        log: Gets the layout and counts what is left out.

    Returns:
        The images; None if there are neither JSON files nor YOLO's text files.

    Raises:
        UserError: A file is damaged.
    """
    files = iter([labels.folder / path for path in labels.ending(".json")])
    damaged: list[tuple[Path, UserError]] = []
    for file in files:  # each file is parsed once, as they may be large
        try:
            content = read_json(file)
        except UserError as error:
            damaged.append((file, error))
            continue
        kind = _kind(content)
        if kind == "LabelMe":  # a file for each image
            for one, _ in damaged:
                log.add(_DAMAGED, str(one))
            return _read_labelme(chain([(file, content)], _readable(files, log)), tree, log)
        if damaged:
            raise damaged[0][1]
        if kind == "COCO":
            rest = ((file, read_json(file)) for file in files)
            return _read_coco(chain([(file, content)], rest), tree, log)
    if damaged:
        raise damaged[0][1]
    return _read_yolo(tree, labels, log)


def _readable(files: Iterable[Path], log: ReadingLog) -> Iterator[tuple[Path, Any]]:
    """The files with what they hold, without damaged ones."""
    for file in files:
        try:
            yield file, read_json(file)
        except UserError:
            log.add(_DAMAGED, str(file))


def _kind(content: Any) -> str | None:
    if not isinstance(content, dict):
        return None
    if all(isinstance(content.get(key), list) for key in ("images", "annotations")):
        return "COCO"
    return "LabelMe" if isinstance(content.get("shapes"), list) else None


def with_classes(drawn: Drawn) -> tuple[list[tuple[MaskSource, tuple[int, ...]]], list[str]]:
    """Number the classes: 0 is the background, then those that occur in the order of their ids.

    Returns:
        For each image its mask and the classes of its shapes and the background; and the names.

    Raises:
        UserError: There are too many classes.
    """
    used = {name for one in drawn.images for name, _ in one.shapes}
    objects = [name for name in drawn.classes if name in used and name.lower() not in BACKGROUND]
    names = ["background", *objects]
    if len(names) > IGNORE_INDEX:
        raise UserError(f"{drawn.images[0].file} has {len(objects)} classes, more than 254")
    numbers = {name: number for number, name in enumerate(names)}
    masks = []
    for one in drawn.images:
        shapes = tuple((numbers.get(name, 0), shape) for name, shape in one.shapes)
        mask = MaskSource((one.file,), shapes=shapes, image=one.image, size=one.size)
        masks.append((mask, tuple(sorted({0, *(number for number, _ in shapes)}))))
    return masks, names


# COCO


def read_coco_file(file: Path, tree: FileTree, log: ReadingLog) -> Drawn:
    """Read polygons and RLE from one file in COCO's format.

    Raises:
        UserError: The file is not JSON, or not in COCO's format.
    """
    content = read_json(file)
    if _kind(content) != "COCO":
        raise UserError(f"{file} is not in COCO's format: it lacks the lists images, annotations")
    return _read_coco([(file, content)], tree, log)


def _read_coco(contents: _Contents, tree: FileTree, log: ReadingLog) -> Drawn:
    log.layout = "COCO polygons"
    found: dict[str, DrawnImage] = {}
    classes: dict[str, Any] = {}
    boxes = 0
    for file, content in contents:
        if _kind(content) != "COCO":
            log.add("file that is not in COCO's format, left out", str(file))
            continue
        part = _part_of_annotations(file, tree)
        categories = _categories(content.get("categories"))
        classes.update(dict.fromkeys(categories.values()))
        by_id: dict[int | str, DrawnImage | None] = {}  # None for missing images
        for one in content["images"]:
            name = one.get("file_name") if isinstance(one, dict) else None
            identity = parse_id(one.get("id")) if isinstance(one, dict) else None
            if not isinstance(name, str) or not name or identity is None:
                log.add("image without a file name or an id, left out", str(file))
                continue
            image = tree.image(name, part)
            if image is None:
                log.add(MISSING_IMAGE, name)
                by_id.setdefault(identity, None)
                continue
            log.add_group(image, one.get("group"))
            size = (positive_number(one.get("height")), positive_number(one.get("width")))
            own = part or part_below(image, tree)
            fresh = DrawnImage(image, own, str(file), size, [])
            if own is not None:
                log.origins[own] = file.name
            by_id[identity] = found.setdefault(image, fresh)
        for one in content["annotations"]:
            if not isinstance(one, dict):
                log.add(_UNREADABLE, str(file))
                continue
            identity = parse_id(one.get("image_id"))
            if identity is None or identity not in by_id:
                log.add("object of an image not listed, left out", str(file))
                continue
            drawn = by_id[identity]
            if drawn is None:
                continue
            name = categories.get(parse_id(one.get("category_id")))
            shape = coco_shape(one.get("segmentation"), drawn.size)
            if shape is None and one.get("bbox") and not one.get("segmentation"):
                boxes += 1
            elif shape is None:
                log.add(_UNREADABLE, str(file))
            elif name is None:
                log.add(_UNKNOWN_CLASS, str(file))
            else:
                drawn.shapes.append((name, shape))
        log.tables.append(str(file))
    return Drawn(list(found.values()), list(classes), boxes)


def _part_of_annotations(file: Path, tree: FileTree) -> Split | None:
    if file.is_relative_to(tree.folder):
        return part_of_file(file.relative_to(tree.folder).as_posix())
    return part_of_file(file.name)


def _categories(listed: Any) -> dict[int | str | None, str]:
    """Class names by id, in the order of ids."""
    rows = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    rows.sort(key=lambda one: (positive_number(one.get("id")), str(one.get("id"))))
    return {parse_id(one.get("id")): str(one.get("name", one.get("id"))).strip() for one in rows}


# LabelMe


def _read_labelme(contents: _Contents, tree: FileTree, log: ReadingLog) -> Drawn:
    log.layout = "LabelMe polygons"
    images: dict[str, DrawnImage] = {}
    for file, content in contents:
        log.tables.append(str(file))
        if _kind(content) != "LabelMe":
            log.add("file without shapes, left out", str(file))
            continue
        name = content.get("imagePath")
        near = (
            file.relative_to(tree.folder) if file.is_relative_to(tree.folder) else Path(file.name)
        )
        part = part_of_path(near.as_posix())
        own = os.path.basename(name.replace("\\", "/")) if isinstance(name, str) else ""
        image = None
        for one in (file.with_name(own) if own else file, *_named_like(file)):
            if image is None and one != file and one.is_file():
                image = str(one)
        image = image or tree.image(near.with_suffix("").as_posix(), part)
        image = image or (tree.image(own, part) if own else None)
        if image is None or image in images:
            log.add(MISSING_IMAGE, str(file))
            continue
        size = (
            positive_number(content.get("imageHeight")),
            positive_number(content.get("imageWidth")),
        )
        shapes = []
        for shape in content["shapes"]:
            drawn = labelme_shape(shape) if isinstance(shape, dict) else None
            if drawn is None:
                log.add(_UNREADABLE, str(file))
                continue
            shapes.append((str(shape.get("label")).strip(), drawn))
        images[image] = DrawnImage(image, part or part_below(image, tree), str(file), size, shapes)
    found = list(images.values())
    classes = sorted({name for one in found for name, _ in one.shapes})
    return Drawn(found, classes, 0)


def _named_like(file: Path) -> list[Path]:
    return [
        file.with_suffix(suffix) for suffix in (".jpg", ".png", ".jpeg", ".JPG", ".tif", ".bmp")
    ]


# YOLO


def _read_yolo(tree: FileTree, labels: FileTree, log: ReadingLog) -> Drawn | None:
    texts = [path for path in labels.ending(".txt") if not _is_list(path)]
    if not texts:
        return None
    log.layout = "YOLO polygons"
    names, given = _yolo_names([labels, tree]), _yolo_parts([labels, tree], tree)
    images: list[DrawnImage] = []
    largest = -1
    boxes = 0
    matched = set()
    for path in texts:
        file = labels.absolute(path)
        part = part_of_path(path)
        image = tree.image(path[: -len(".txt")], part)
        if image is None or image in matched:
            log.add(MISSING_IMAGE, file)
            continue
        matched.add(image)
        if given and os.path.realpath(image) not in given:
            log.add("image that no part in the YAML file names, left out", image)
            continue
        shapes = []
        for line in read_text(file, _MAX_TEXT_BYTES).splitlines():
            words = line.split()
            if not words:
                continue
            boxes += len(words) in (5, 6)
            try:
                values = [float(word) for word in words[1:]]
                number = int(float(words[0]))
            except (ValueError, OverflowError):
                values, number = [], -1
            outline = outline_of(values)
            if outline is None or not 0 <= number < IGNORE_INDEX:
                if len(words) not in (5, 6):
                    log.add(_UNREADABLE, file)
                continue
            largest = max(largest, number)
            shapes.append((str(number), Shape((outline,))))
        own = given.get(os.path.realpath(image)) or part or part_below(image, tree)
        images.append(DrawnImage(image, own, file, RELATIVE_SIZE, shapes))
        if own is not None:
            log.origins.setdefault(own, "a YAML file" if given else "folder names")
    for path in tree.images:
        if tree.absolute(path) not in matched:
            log.add("image without a text file, left out", path)
    named = {str(n): names.get(n, str(n)) for n in range(max([largest, *names]) + 1)}
    images = [
        one._replace(shapes=[(named[number], shape) for number, shape in one.shapes])
        for one in images
    ]
    return Drawn(images, list(dict.fromkeys(named.values())), boxes) if images else None


def _is_list(path: str) -> bool:
    name = os.path.splitext(os.path.basename(path))[0].lower()
    known = name in ("labels", "obj_names", "readme", "license", "notes", "labelmap")
    known = known or has_names(path) or name.startswith("readme")
    return known or part_of_name(name) is not None


def _yaml_files(trees: Sequence[FileTree]) -> Iterator[tuple[Path, FileTree]]:
    """YAML files in a tree or above it, and the tree."""
    for tree in trees:
        places = [tree.folder / path for path in tree.ending(".yaml", ".yml")]
        places += [tree.folder.parent / "data.yaml", tree.folder.parent / "dataset.yaml"]
        yield from ((file, tree) for file in places if file.is_file())


def _yolo_names(trees: Sequence[FileTree]) -> dict[int, str]:
    """Class names by number, from a YAML file or one such as classes.txt; see ``names_file``."""
    for file, _ in _yaml_files(trees):
        content = read_yaml(file)
        listed = content.get("names") if isinstance(content, dict) else None
        if isinstance(listed, list):
            return {number: str(name) for number, name in enumerate(listed[:IGNORE_INDEX])}
        if isinstance(listed, dict):
            keys = {str(key): str(name) for key, name in listed.items()}
            return {n: keys[str(n)] for n in range(IGNORE_INDEX) if str(n) in keys}
    named = next((one for tree in trees if (one := names_file(tree)) is not None), None)
    return {} if named is None else {int(key): name for key, name in read_names(named).items()}


def _yolo_parts(trees: Sequence[FileTree], images: FileTree) -> dict[str, Split]:
    """The part of each image, by its real path, as a ``data.yaml`` says; empty without one.

    A file that names training images which do not exist says nothing, as it was written for another
    machine; so do one that names the folder of everything, and one of other images.
    """
    own = {os.path.realpath(images.absolute(path)) for path in images.images}
    for file, tree in _yaml_files(trees):
        content = data_yaml(file)
        if content is None:
            continue
        parts: dict[str, Split] = {}
        for split, _, place in split_places(file, content):
            if place is None or holds(place, file.parent):
                continue
            with suppress(UserError):  # an empty folder
                found = images_at(place, tree, split, ReadingLog(str(place)))
                parts.update((os.path.realpath(path), split) for path in found)
        if "train" in parts.values() and not own.isdisjoint(parts):
            return parts
    return {}
