"""Discovery of the annotation files of a detection data set, their format and their parts."""

import os
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from vissl_lite.data.json_file import read_json
from vissl_lite.data.text_file import read_bytes
from vissl_lite.errors import UserError, brief
from vissl_lite.transfer.detection.data.annotations import Annotations
from vissl_lite.transfer.detection.data.box_tables import (
    class_descriptions,
    find_box_table,
    read_box_tables,
)
from vissl_lite.transfer.detection.data.coco import read_coco
from vissl_lite.transfer.detection.data.cvat import read_cvat
from vissl_lite.transfer.detection.data.labelme import (
    MAX_LABELME_BYTES,
    is_labelme,
    read_labelme,
)
from vissl_lite.transfer.detection.data.voc import read_voc
from vissl_lite.transfer.detection.data.yolo import (
    darknet_data,
    label_files,
    looks_like_labels,
    read_labels,
    read_yolo,
)
from vissl_lite.transfer.options import SourceOptions
from vissl_lite.transfer.sources.file_tree import IMAGE_FOLDERS, MASK_FOLDERS, FileTree
from vissl_lite.transfer.sources.parts import (
    PARTS,
    Split,
    part_of_file,
    part_of_name,
    part_of_path,
)
from vissl_lite.transfer.sources.reading_log import ReadingLog, count_endings
from vissl_lite.transfer.sources.shapes import missing_key
from vissl_lite.transfer.sources.tables import TABLES
from vissl_lite.transfer.sources.voc_lists import listed_images
from vissl_lite.transfer.sources.yolo import data_yaml

# Folder of Pascal VOC's lists of the images of each part.
_LISTS = "ImageSets/Main"

# Besides instances_train2017.json, COCO has files of the same part without boxes.
_NO_BOXES = ("captions", "panoptic", "stuff", "image_info")

# Number of files of which there is one for each image that are read to tell their format.
_SAMPLE = 3

# Deepest folder of tables.
_TABLE_DEPTH = 2


class _Layout(NamedTuple):
    """A layout found in a folder, and the function that reads it."""

    name: str
    has_parts: bool
    read: Callable[[ReadingLog], Annotations]


class _Source(NamedTuple):
    """Where annotations and images are.

    Attributes:
        tree: Folder of the annotations.
        images: Folder of the images.
        options: How tables are read.
        with_shapes: Whether shapes are read, too.
    """

    tree: FileTree
    images: FileTree
    options: SourceOptions
    with_shapes: bool


def read_annotations(
    source: Path,
    annotations: Path | None,
    options: SourceOptions,
    log: ReadingLog,
    with_shapes: bool,
) -> Annotations:
    """Detect the format of the annotations and read them; see ``load_boxes``."""
    for path in (source, annotations):
        if path is not None and not os.path.exists(path):  # False for invalid names, too
            raise UserError(f"{brief(path)} does not exist")
    if annotations is not None:
        if not source.is_dir():
            raise UserError(f"{source} is not a folder of images, which --annotations needs")
        images = FileTree(source)
        tree = images if annotations == source else FileTree(annotations)
        if annotations.is_file():
            return _read_file(annotations, FileTree(source), options, log, with_shapes)
        layout = _find_layout(_Source(tree, images, options, with_shapes))
        if layout is None:
            raise UserError(
                f"--annotations {annotations} holds no boxes in a known format, but "
                f"{count_endings(tree.files) if tree.files else 'no files'}"
            )
    elif source.is_file():
        return _read_file(source, None, options, log, with_shapes)
    else:
        tree = _inner(FileTree(source))
        layout = _find_layout(_Source(tree, tree, options, with_shapes))
        if layout is None and source.name.lower() in IMAGE_FOLDERS | MASK_FOLDERS:
            above = FileTree(source.parent)
            layout = _find_layout(_Source(above, above, options, with_shapes))
            if layout is not None:
                log.note(
                    f"{source} has no annotations: those beside it, in {source.parent}, are read"
                )
        if layout is None:
            raise UserError(_no_boxes(tree))
    log.layout = layout.name
    return layout.read(log)


def _read_file(
    file: Path,
    images: FileTree | None,
    options: SourceOptions,
    log: ReadingLog,
    with_shapes: bool,
) -> Annotations:
    """Read a file of annotations; unless given, the images are in or beside its folder."""
    folder = file.parent
    if images is None:
        images = FileTree(folder.parent if folder.name.lower() in MASK_FOLDERS else folder)
    suffix = file.suffix.lower()
    if suffix == ".json":
        log.layout = "COCO"
        return read_coco(file, read_json(file), None, images, log, with_shapes)
    if suffix == ".xml":
        log.layout = "CVAT"
        return read_cvat(file, images, log, with_shapes)
    if suffix in (".yaml", ".yml", ".data"):
        content = darknet_data(file) if suffix == ".data" else data_yaml(file)
        if content is None:
            raise UserError(f"{file} is not YOLO's data.yaml: it has no train, or no names")
        log.layout = f"YOLO ({file.name})"
        return read_yolo(file, content, log, with_shapes)
    table = find_box_table(file, None, images, options) if suffix in TABLES else None
    if table is None:
        raise UserError(
            f"{file} holds no boxes in a known format: give a folder, a .json (COCO), .yaml (YOLO) "
            f"or .xml (CVAT) file, or a table with columns such as filename, xmin, ymin, xmax, "
            f"ymax, class"
        )
    log.layout = f"table {file.name}"
    return read_box_tables([table], {}, images, options, log)


def _inner(tree: FileTree) -> FileTree:
    """The only folder with files in a folder, as VOCdevkit/VOC2012; else the folder itself."""
    while True:
        tops = {path.partition("/")[0] for path in tree.files if "/" in path}
        loose = [path for path in tree.files if "/" not in path]
        (only,) = tops if len(tops) == 1 else (None,)
        if only is None or part_of_name(only) or only.lower() in IMAGE_FOLDERS | MASK_FOLDERS:
            return tree
        if any(
            path.lower().endswith((".json", ".xml", ".yaml", ".yml", *TABLES)) for path in loose
        ):
            return tree
        tree = FileTree(tree.folder / only)


def _find_layout(source: _Source) -> _Layout | None:
    """The layout of the annotations: the only one, or the only one with parts.

    Raises:
        UserError: Several fit.
    """
    exact = [_find_yolo(source), _find_coco(source), _find_voc(source)]
    layouts = [one for one in exact if one is not None]
    if not layouts:
        rarer = (_find_darknet, _find_cvat, _find_labelme, _find_tables, _find_labels)
        return next((found for find in rarer if (found := find(source)) is not None), None)
    with_parts = [one for one in layouts if one.has_parts]
    if len(with_parts) == 1:
        return with_parts[0]
    if len(layouts) > 1:
        raise UserError(
            f"{source.tree.folder} holds boxes in the formats of {layouts[0].name} and "
            f"{layouts[1].name}: choose with --annotations FILE or FOLDER"
        )
    return layouts[0]


def _no_boxes(tree: FileTree) -> str:
    """Why a folder can't be used, and the way on."""
    found = count_endings(tree.files) if tree.files else "no files"
    text = f"{tree.folder} holds no boxes in a known format, but {found}"
    for path in tree.ending(".json")[:_SAMPLE]:
        with suppress(UserError):
            key = missing_key(read_json(Path(tree.absolute(path))))
            text += f" ({path} is not in COCO's format: it has no list {key!r})"
            break
    folders = {part.lower() for path in tree.images for part in path.split("/")[:-1]}
    if folders & MASK_FOLDERS:
        masks = sorted(folders & MASK_FOLDERS)[0]
        return f"{text}: with images in {masks}/ it looks like masks: give --task segmentation"
    if len(folders - IMAGE_FOLDERS) > 1 and not tree.ending(".json", ".xml", ".txt", ".csv"):
        return f"{text}: it looks like class folders: give --task classification"
    return (
        f"{text}: COCO (annotations/train.json), Pascal VOC (Annotations/*.xml), YOLO (data.yaml, "
        f"or images/ and labels/), LabelMe, CVAT or a table of boxes would work; or give the "
        f"annotations with --annotations"
    )


# COCO


class _CocoFile(NamedTuple):
    """A JSON file in COCO's format: its part, path and content, which is parsed once."""

    part: Split | None
    file: Path
    content: Any


def _find_coco(source: _Source) -> _Layout | None:
    """Find JSON files at the top, in a folder of annotations, or in a folder of each part."""
    tree = source.tree
    paths = []
    for path in tree.ending(".json"):
        folders = path.lower().split("/")[:-1]
        if all(name in MASK_FOLDERS or part_of_name(name) for name in folders):
            paths.append(path)
    paths = (
        [path for path in paths if "instances" in path]
        or [path for path in paths if not any(word in path for word in _NO_BOXES)]
        or paths
    )
    by_part: dict[Split | None, list[str]] = defaultdict(list)
    for path in paths:
        by_part[part_of_file(path)].append(path)
    parts = [part for part in PARTS if part in by_part]
    images = {os.path.splitext(path)[0] for path in tree.images}
    if not paths or all(os.path.splitext(path)[0] in images for path in paths):
        return None  # or a file for each image
    if "train" not in parts and len(parts) > 1:
        raise UserError(
            f"{tree.folder} has annotations of {' and '.join(parts)}, but none of train: "
            f"add train.json"
        )
    wanted = {part: by_part[part] for part in parts} if "train" in parts else {None: paths}
    found = [
        _CocoFile(part, *chosen)
        for part, several in wanted.items()
        if (chosen := _choose_json(tree.folder, several)) is not None
    ]
    if not found:
        return None
    return _Layout("COCO", "train" in parts, partial(_read_coco, found, source))


def _choose_json(folder: Path, paths: Sequence[str]) -> tuple[Path, Any] | None:
    """The only JSON file that is in COCO's format, and its content; None if there is none.

    Raises:
        UserError: There are several, or the only file is not JSON.
    """
    chosen: tuple[str, Any] | None = None
    for path in paths:
        content = read_json(folder / path)
        if missing_key(content) is not None:
            continue
        if chosen is not None:
            raise UserError(
                f"{folder} holds several files of the same part, {chosen[0]} and "
                f"{path}: choose with --annotations FILE"
            )
        chosen = path, content
    return None if chosen is None else (folder / chosen[0], chosen[1])


def _read_coco(files: Sequence[_CocoFile], source: _Source, log: ReadingLog) -> Annotations:
    several = [
        read_coco(one.file, one.content, one.part, source.images, log, source.with_shapes)
        for one in files
    ]
    named = {one.part: f"{one.file.parent.name}/{one.file.name}" for one in files}
    log.origins.update({str(part): name for part, name in named.items() if part is not None})
    classes = [name for one in several for name in one.classes]
    annotated = [image for one in several for image in one.images]
    used = {name for image in annotated for name in image.names}
    parents = frozenset[str]().union(*(one.parents for one in several))
    unused = [name for name in dict.fromkeys(classes) if name in parents and name not in used]
    if unused and used:  # as Roboflow writes it
        log.note(f"Left out as a class, being a category of others without boxes: {unused[0]}")
        classes = [name for name in classes if name not in unused]
    return Annotations(classes, annotated, sum(one.num_listed for one in several))


# Pascal VOC


def _find_voc(source: _Source) -> _Layout | None:
    """Find XML files of images, with parts in ``ImageSets/Main`` or in the names of folders."""
    tree = source.tree
    paths = tree.ending(".xml")
    if not paths or _root_tag(tree, paths) == "annotations":
        return None
    sets = listed_images(source.images.folder / _LISTS) or listed_images(
        tree.folder.parent / _LISTS
    )
    if not sets:
        has_parts = any(part_of_path(path) == "train" for path in paths)
        files: list[tuple[str, Split | None]] = [(path, None) for path in paths]
        return _Layout("Pascal VOC", has_parts, partial(_read_voc, files, source))
    by_stem = {Path(path).stem: path for path in paths}

    def read(log: ReadingLog) -> Annotations:
        chosen = []
        for part, stems in sets.items():
            if part is not None:
                log.origins[part] = f"ImageSets/Main, {part}"
            for name in stems:
                stem = name.rpartition("/")[2]
                if stem in by_stem:
                    chosen.append((by_stem[stem], part))
                else:
                    log.add("image without an annotation file, left out", stem)
        return _read_voc(chosen, source, log)

    return _Layout("Pascal VOC", "train" in sets, read)


def _read_voc(
    files: Sequence[tuple[str, Split | None]], source: _Source, log: ReadingLog
) -> Annotations:
    return read_voc(files, source.tree.folder, source.images, log)


def _root_tag(tree: FileTree, paths: Sequence[str]) -> str:
    """The root element of the first XML file that can be read."""
    for path in paths[:_SAMPLE]:
        with suppress(UserError, ET.ParseError, ValueError, LookupError):
            return ET.fromstring(read_bytes(tree.absolute(path))).tag
    return ""


# YOLO


def _find_yolo(source: _Source) -> _Layout | None:
    """Find a ``data.yaml`` at the top of the folder."""
    folder = source.tree.folder
    files = [folder / path for path in source.tree.ending(".yaml", ".yml") if "/" not in path]
    found = [(file, content) for file in files if (content := data_yaml(file)) is not None]
    if len(found) > 1:
        raise UserError(
            f"{folder} holds several data sets, {found[0][0].name} and "
            f"{found[1][0].name}: give one of these files"
        )
    if not found:
        return None
    file, content = found[0]
    read = partial(read_yolo, file, content, with_shapes=source.with_shapes)
    return _Layout(f"YOLO ({file.name})", True, read)


def _find_darknet(source: _Source) -> _Layout | None:
    """Find Darknet's ``obj.data`` at the top of the folder, as CVAT writes it."""
    for path in source.tree.ending(".data"):
        file = source.tree.folder / path
        content = None
        with suppress(UserError):
            content = darknet_data(file) if "/" not in path else None
        if content is not None:
            read = partial(read_yolo, file, content, with_shapes=source.with_shapes)
            return _Layout(f"YOLO ({file.name})", True, read)
    return None


def _find_labels(source: _Source) -> _Layout | None:
    """Find text files with the names of images."""
    images = {Path(path).stem for path in source.images.images}
    files = [path for path in label_files(source.tree) if Path(path).stem in images]
    sample = [source.tree.absolute(path) for path in files[:_SAMPLE]]
    # in a folder that was given for annotations, they may be damaged
    if not files or (source.tree is source.images and not any(map(looks_like_labels, sample))):
        return None
    has_parts = any(part_of_path(path) == "train" for path in files)
    read = partial(read_labels, source.tree, source.images, with_shapes=source.with_shapes)
    return _Layout("YOLO labels", has_parts, read)


# Rarer formats


def _find_cvat(source: _Source) -> _Layout | None:
    """Find CVAT's ``annotations.xml``."""
    paths = source.tree.ending(".xml")
    if not paths or _root_tag(source.tree, paths) != "annotations":
        return None
    if len(paths) > 1:
        raise UserError(
            f"{source.tree.folder} holds several files of CVAT, {paths[0]} and {paths[1]}: choose "
            f"with --annotations FILE"
        )
    file = source.tree.folder / paths[0]
    read = partial(read_cvat, file, source.images, with_shapes=source.with_shapes)
    return _Layout("CVAT", False, read)


def _find_labelme(source: _Source) -> _Layout | None:
    """Find JSON files with shapes, one for each image."""
    paths = source.tree.ending(".json")
    for path in paths[:_SAMPLE]:
        with suppress(UserError):
            if is_labelme(read_json(source.tree.folder / path, MAX_LABELME_BYTES)):
                trees = source.tree, source.images
                read = partial(read_labelme, paths, *trees, with_shapes=source.with_shapes)
                return _Layout("LabelMe", any(part_of_path(one) == "train" for one in paths), read)
    return None


def _find_tables(source: _Source) -> _Layout | None:
    """Find tables with columns of boxes, one for each part or one in all."""
    tree = source.tree
    paths = [path for path in tree.ending(*TABLES) if path.count("/") <= _TABLE_DEPTH]
    # of text files in folders there may be one for each image
    paths = [path for path in paths if "/" not in path or not path.lower().endswith(".txt")]
    found = [
        table
        for path in paths
        if (
            table := find_box_table(
                tree.folder / path, part_of_file(path), source.images, source.options
            )
        )
        is not None
    ]
    if not found:
        return None
    if any(table.part == "train" for table in found):
        found = [table for table in found if table.part is not None]
    else:
        found = [max(found, key=lambda table: len(table.table.rows))]
    names: dict[str, str] = {}
    for path in paths:
        if "class-descriptions" in path.lower():
            names |= class_descriptions(tree.folder / path)
    files = ", ".join(dict.fromkeys(table.table.file.name for table in found))
    has_parts = any(table.part == "train" for table in found)

    def read(log: ReadingLog) -> Annotations:
        log.origins.update({str(one.part): one.table.file.name for one in found if one.part})
        return read_box_tables(found, names, source.images, source.options, log)

    return _Layout(f"table {files}", has_parts, read)
