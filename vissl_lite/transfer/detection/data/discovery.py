"""Finds the annotations of a detection data set: which files, in which format, of which split."""

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
from vissl_lite.transfer.detection.data.cleaning import RepairLog
from vissl_lite.transfer.detection.data.coco import missing_key, read_coco
from vissl_lite.transfer.detection.data.voc import read_voc
from vissl_lite.transfer.detection.data.yolo import data_yaml, label_files, read_labels, read_yolo
from vissl_lite.transfer.sources import (
    SPLITS,
    VAL_NAMES,
    FileTree,
    split_of_file,
    split_of_folder,
    split_of_path,
)

_LAYOUTS = (
    "COCO (annotations/train.json, or train/_annotations.coco.json), Pascal VOC "
    "(Annotations/*.xml and JPEGImages) or YOLO (data.yaml, images and labels)"
)

# Beside instances_train2017.json COCO has files of the same split that hold no boxes.
_NO_BOXES = ("captions", "panoptic", "stuff", "image_info")


class _Layout(NamedTuple):
    """A format that a folder may hold, and what reads it."""

    name: str
    has_splits: bool
    read: Callable[[RepairLog], Annotations]


def read_annotations(source: Path, annotations: Path | None, repairs: RepairLog) -> Annotations:
    """Recognize and read; see ``load_boxes`` for what and for the errors."""
    for path in (source, annotations):
        if path is not None and not os.path.exists(path):  # which takes any name for a question
            raise UserError(f"{brief(path)} does not exist")
    if annotations is not None:
        if not source.is_dir():
            raise UserError(f"{source} is no folder of images, which --annotations goes with")
        return _given(FileTree(source), annotations, repairs)
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
    others = [one for one in (_voc(tree, tree), _yolo(tree)) if one]
    coco = _coco(tree, tree, sure=not others)
    return _only([coco, *others] if coco else others, tree).read(repairs)


def _given(images: FileTree, annotations: Path, repairs: RepairLog) -> Annotations:
    """Read what ``--annotations`` names."""
    if annotations.is_file():
        if annotations.suffix.lower() != ".json":
            raise UserError(f"--annotations {annotations} is neither a .json file nor a folder")
        return read_coco(annotations, None, images, repairs)
    tree = FileTree(annotations)
    layouts = [one for one in (_coco(tree, images, sure=True), _voc(tree, images)) if one]
    if not layouts and label_files(tree):
        return read_labels(tree, images, repairs)
    if not layouts:
        raise UserError(
            f"--annotations {annotations} holds no .json (COCO), .xml (VOC) or .txt (YOLO) files"
        )
    return _only(layouts, tree).read(repairs)


def _only(layouts: list[_Layout], tree: FileTree) -> _Layout:
    """The one layout, or the one that names splits."""
    if not layouts:
        raise UserError(
            f"{tree.folder} holds no boxes in a layout that is known: {_LAYOUTS} would "
            f"work, or name the annotations with --annotations"
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


def _coco(tree: FileTree, images: FileTree, sure: bool) -> _Layout | None:
    """The layout of JSON files: at the top, in ``annotations``, or in a folder of each split.

    Args:
        tree: of the annotations.
        images: of the images.
        sure: whether a file in another format is a mistake, and not just another file.
    """
    paths = []
    for path in tree.ending(".json"):
        folder = path.rpartition("/")[0]
        if not folder or folder.lower() == "annotations" or split_of_folder(folder):
            paths.append(path)
    paths = (
        [path for path in paths if "instances" in path]
        or [path for path in paths if not any(word in path for word in _NO_BOXES)]
        or paths
    )
    by_split: dict[str | None, list[str]] = defaultdict(list)
    for path in paths:
        by_split[split_of_file(path)].append(path)
    named = [split for split in SPLITS if split in by_split]
    files: list[tuple[str | None, Path]]
    if not paths:
        return None
    if "train" not in named and len(named) > 1:
        raise UserError(
            f"{tree.folder} has annotations of {' and '.join(named)}, none of train: add train.json"
        )
    if "train" in named:
        files = [(split, _one_file(tree.folder, by_split[split])) for split in named]
    else:
        files = [(None, _one_file(tree.folder, paths))]
    if not sure and any(missing_key(read_json(file)) is not None for _, file in files):
        return None
    return _Layout("COCO", "train" in named, partial(_read_coco, files, images))


def _one_file(folder: Path, paths: Sequence[str]) -> Path:
    """The one of several JSON files that is in COCO's format."""
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
    files: Sequence[tuple[str | None, Path]], images: FileTree, repairs: RepairLog
) -> Annotations:
    parts = [read_coco(file, split, images, repairs) for split, file in files]
    classes = [name for part in parts for name in part.classes]
    notes = [note for part in parts for note in part.notes]
    return Annotations(classes, notes, sum(part.named for part in parts))


# Pascal VOC


def _voc(tree: FileTree, images: FileTree) -> _Layout | None:
    """The layout of XML files, with splits in ``ImageSets/Main`` or in the folders' names."""
    paths = tree.ending(".xml")
    if not paths:
        return None
    sets = _image_sets(images.folder) or _image_sets(tree.folder.parent)
    if not sets:
        has_splits = any(split_of_path(path) == "train" for path in paths)
        files: list[tuple[str, str | None]] = [(path, None) for path in paths]
        return _Layout("Pascal VOC", has_splits, partial(read_voc, files, tree.folder, images))
    by_stem = {Path(path).stem: path for path in paths}

    def read(repairs: RepairLog) -> Annotations:
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
    """The stems that ``ImageSets/Main`` lists for each split; for None, if it names none."""
    sets: dict[str | None, list[str]] = {}
    for name in ("train", *VAL_NAMES, "test", "trainval"):
        file = folder / "ImageSets" / "Main" / f"{name}.txt"
        if not file.is_file():
            continue
        # some tools write paths or suffixes
        names = (
            line.strip().replace("\\", "/").rpartition("/")[2]
            for line in read_text(file).splitlines()
        )
        stems = [Path(n).stem if n.lower().endswith(tuple(EXTENSIONS)) else n for n in names if n]
        sets["val" if name in VAL_NAMES else name] = stems
    whole = sets.pop("trainval", None)
    if whole is not None and "train" not in sets:
        others = {stem for stems in sets.values() for stem in stems}
        sets["train" if sets else None] = [stem for stem in whole if stem not in others]
    return sets


# YOLO


def _yolo(tree: FileTree) -> _Layout | None:
    """The layout of a YAML file at the top."""
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
