"""Discovery of the annotation files of a detection data set, their format and their splits."""

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from vissl_lite.data.images import EXTENSIONS
from vissl_lite.data.json_file import read_json
from vissl_lite.data.text_file import read_text
from vissl_lite.errors import UserError, brief
from vissl_lite.transfer.detection.data.annotations import Annotations
from vissl_lite.transfer.detection.data.coco import missing_key, read_coco
from vissl_lite.transfer.detection.data.voc import read_voc
from vissl_lite.transfer.detection.data.yolo import data_yaml, label_files, read_labels, read_yolo
from vissl_lite.transfer.sources.file_tree import FileTree
from vissl_lite.transfer.sources.parts import (
    PARTS,
    VAL_NAMES,
    part_of_file,
    part_of_name,
    part_of_path,
)
from vissl_lite.transfer.sources.reading_log import ReadingLog

_LAYOUTS = (
    "COCO (annotations/train.json, or train/_annotations.coco.json), Pascal VOC "
    "(Annotations/*.xml and JPEGImages) or YOLO (data.yaml, images and labels)"
)

# Besides instances_train2017.json, COCO has files of the same split without boxes.
_NO_BOXES = ("captions", "panoptic", "stuff", "image_info")


class _Layout(NamedTuple):
    """A layout found in a folder, and the function that reads it."""

    name: str
    has_splits: bool
    read: Callable[[ReadingLog], Annotations]


def read_annotations(source: Path, annotations: Path | None, repairs: ReadingLog) -> Annotations:
    """Detect the format of the annotations and read them; see ``load_boxes``."""
    for path in (source, annotations):
        if path is not None and not os.path.exists(path):  # False for invalid names, too
            raise UserError(f"{brief(path)} does not exist")
    if annotations is not None:
        if not source.is_dir():
            raise UserError(f"{source} is not a folder of images, which --annotations needs")
        return _read_given(FileTree(source), annotations, repairs)
    if source.is_file() and source.suffix.lower() == ".json":
        within = source.parent.name.lower() == "annotations"
        return read_coco(source, None, FileTree(source.parents[1 if within else 0]), repairs)
    if source.is_file() and source.suffix.lower() in (".yaml", ".yml"):
        content = data_yaml(source)
        if content is None:
            raise UserError(f"{source} is not YOLO's data.yaml: it has no train, or no names")
        return read_yolo(source, content, repairs)
    if not source.is_dir():
        raise UserError(f"{source} holds no boxes: give a folder, a .json or a .yaml file")
    tree = FileTree(source)
    others = [one for one in (_find_voc(tree, tree), _find_yolo(tree)) if one]
    coco = _find_coco(tree, tree, required=not others)
    return _choose_layout([coco, *others] if coco else others, tree).read(repairs)


def _read_given(images: FileTree, annotations: Path, repairs: ReadingLog) -> Annotations:
    """Read the file or folder given with ``--annotations``."""
    if annotations.is_file():
        if annotations.suffix.lower() != ".json":
            raise UserError(f"--annotations {annotations} is neither a .json file nor a folder")
        return read_coco(annotations, None, images, repairs)
    tree = FileTree(annotations)
    layouts = [
        one for one in (_find_coco(tree, images, required=True), _find_voc(tree, images)) if one
    ]
    if not layouts and label_files(tree):
        return read_labels(tree, images, repairs)
    if not layouts:
        raise UserError(
            f"--annotations {annotations} holds no .json (COCO), .xml (VOC) or .txt (YOLO) files"
        )
    return _choose_layout(layouts, tree).read(repairs)


def _choose_layout(layouts: list[_Layout], tree: FileTree) -> _Layout:
    """Return the only layout, or the only one with splits."""
    if not layouts:
        raise UserError(
            f"{tree.folder} holds no boxes in a known layout: {_LAYOUTS} would "
            f"work, or give the annotations with --annotations"
        )
    with_splits = [one for one in layouts if one.has_splits]
    if len(with_splits) == 1:
        return with_splits[0]
    if len(layouts) > 1:
        raise UserError(
            f"{tree.folder} holds boxes in the formats of {layouts[0].name} and "
            f"{layouts[1].name}: choose with --annotations FILE or FOLDER"
        )
    return layouts[0]


# COCO


def _find_coco(tree: FileTree, images: FileTree, required: bool) -> _Layout | None:
    """Find JSON files at the top, in ``annotations``, or in a folder of each split.

    Args:
        tree: Folder of the annotations.
        images: Folder of the images.
        required: Whether a JSON file in another format is an error; else it is not a layout.
    """
    paths = []
    for path in tree.ending(".json"):
        folder = path.rpartition("/")[0]
        if not folder or folder.lower() == "annotations" or part_of_name(folder):
            paths.append(path)
    paths = (
        [path for path in paths if "instances" in path]
        or [path for path in paths if not any(word in path for word in _NO_BOXES)]
        or paths
    )
    by_split: dict[str | None, list[str]] = defaultdict(list)
    for path in paths:
        by_split[part_of_file(path)].append(path)
    splits = [split for split in PARTS if split in by_split]
    files: list[tuple[str | None, Path]]
    if not paths:
        return None
    if "train" not in splits and len(splits) > 1:
        raise UserError(
            f"{tree.folder} has annotations of {' and '.join(splits)}, but none of train: "
            f"add train.json"
        )
    if "train" in splits:
        files = [(split, _choose_json(tree.folder, by_split[split])) for split in splits]
    else:
        files = [(None, _choose_json(tree.folder, paths))]
    if not required and any(missing_key(read_json(file)) is not None for _, file in files):
        return None
    return _Layout("COCO", "train" in splits, partial(_read_coco, files, images))


def _choose_json(folder: Path, paths: Sequence[str]) -> Path:
    """Return the only one of several JSON files that is in COCO's format."""
    if len(paths) > 1:
        good = [path for path in paths if missing_key(read_json(folder / path)) is None]
        if len(good) > 1:
            raise UserError(
                f"{folder} holds several files of the same split, {good[0]} and "
                f"{good[1]}: choose with --annotations FILE"
            )
        paths = good or paths
    return folder / paths[0]


def _read_coco(
    files: Sequence[tuple[str | None, Path]], images: FileTree, repairs: ReadingLog
) -> Annotations:
    parts = [read_coco(file, split, images, repairs) for split, file in files]
    classes = [name for part in parts for name in part.classes]
    annotated = [image for part in parts for image in part.images]
    return Annotations(classes, annotated, sum(part.num_listed for part in parts))


# Pascal VOC


def _find_voc(tree: FileTree, images: FileTree) -> _Layout | None:
    """Find XML files, with splits in ``ImageSets/Main`` or in the names of folders."""
    paths = tree.ending(".xml")
    if not paths:
        return None
    sets = _image_sets(images.folder) or _image_sets(tree.folder.parent)
    if not sets:
        has_splits = any(part_of_path(path) == "train" for path in paths)
        files: list[tuple[str, str | None]] = [(path, None) for path in paths]
        return _Layout("Pascal VOC", has_splits, partial(read_voc, files, tree.folder, images))
    by_stem = {Path(path).stem: path for path in paths}

    def read(repairs: ReadingLog) -> Annotations:
        chosen = []
        for split, stems in sets.items():
            for stem in stems:
                if stem in by_stem:
                    chosen.append((by_stem[stem], split))
                else:
                    repairs.add("image without an annotation file, left out", stem)
        return read_voc(chosen, tree.folder, images, repairs)

    return _Layout("Pascal VOC", "train" in sets, read)


def _image_sets(folder: Path) -> dict[str | None, list[str]]:
    """Stems listed in ``ImageSets/Main`` by split; by None for a lone ``trainval.txt``."""
    sets: dict[str | None, list[str]] = {}
    for name in ("train", *VAL_NAMES, "test", "trainval"):
        file = folder / "ImageSets" / "Main" / f"{name}.txt"
        if not file.is_file():
            continue
        # some tools write paths or file names instead of stems
        names = (
            line.strip().replace("\\", "/").rpartition("/")[2]
            for line in read_text(file).splitlines()
        )
        stems = [Path(n).stem if n.lower().endswith(tuple(EXTENSIONS)) else n for n in names if n]
        sets["val" if name in VAL_NAMES else name] = stems
    trainval = sets.pop("trainval", None)
    if trainval is not None and "train" not in sets:
        others = {stem for stems in sets.values() for stem in stems}
        sets["train" if sets else None] = [stem for stem in trainval if stem not in others]
    return sets


# YOLO


def _find_yolo(tree: FileTree) -> _Layout | None:
    """Find a ``data.yaml`` at the top of the folder."""
    files = [tree.folder / path for path in tree.ending(".yaml", ".yml") if "/" not in path]
    found = [(file, content) for file in files if (content := data_yaml(file)) is not None]
    if len(found) > 1:
        raise UserError(
            f"{tree.folder} holds several data sets, {found[0][0].name} and "
            f"{found[1][0].name}: give one of these files"
        )
    if not found:
        return None
    file, content = found[0]
    return _Layout("YOLO", True, partial(read_yolo, file, content))
