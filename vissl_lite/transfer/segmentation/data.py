"""Segmentation data sets: images with masks or shapes, and splitting."""

import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
from PIL import Image

from vissl_lite.data.formats import file_of, image_header
from vissl_lite.data.images import BROKEN_IMAGE
from vissl_lite.data.reading import reason
from vissl_lite.data.text_file import csv_writer, read_text
from vissl_lite.errors import UserError, brief
from vissl_lite.options import StrPath
from vissl_lite.transfer.dataset import ListDataset
from vissl_lite.transfer.options import DEFAULT_SOURCE, SourceOptions
from vissl_lite.transfer.segmentation.mask_files import (
    Parts,
    masks_beside,
    read_csv,
    read_folder,
    read_two_folders,
)
from vissl_lite.transfer.segmentation.mask_source import MaskSource
from vissl_lite.transfer.segmentation.mask_values import ColorTable, number_classes
from vissl_lite.transfer.segmentation.polygons import (
    Drawn,
    read_coco_file,
    read_shapes,
    with_classes,
)
from vissl_lite.transfer.sources.file_tree import FileTree
from vissl_lite.transfer.sources.groups import find_groups
from vissl_lite.transfer.sources.opening import unpacked
from vissl_lite.transfer.sources.parts import (
    PARTS,
    Split,
    complete_parts,
    part_of_name,
    rarest_classes,
)
from vissl_lite.transfer.sources.reading_log import ReadingLog, count_endings
from vissl_lite.transfer.sources.tables import TABLES, check_fold

log = logging.getLogger(__name__)

_NAME_FILES = ("classes.txt", "labels.txt")
_COLOR_FILES = ("class_dict.csv", "labelmap.txt")

# A color in class_dict.csv (name,r,g,b) or in CVAT's labelmap.txt (name:r,g,b:parts:actions).
_COLOR_LINE = re.compile(
    r"^\s*(?P<name>[^:#]+?)\s*[,;:\t]\s*(\d+)\s*[,;\t]\s*(\d+)\s*[,;\t]\s*(\d+)\b"
)


@dataclass(frozen=True)
class MaskedImage:
    """An image and its mask.

    Attributes:
        path: Path of the image file.
        mask: Where its mask comes from.
        classes: Indices of the classes that occur in the mask.
    """

    path: str
    mask: MaskSource
    classes: tuple[int, ...] = ()


@dataclass(frozen=True)
class LabelledMasks(ListDataset[MaskedImage]):
    """Segmentation data set: class names in the order of their indices, and three splits.

    ``test`` is empty only if missing parts were not made; ``val`` also with one training image.
    """

    def class_counts(self, part: Split) -> np.ndarray:
        """Number of images in which each class occurs, ``(K,)`` int64."""
        occurring = [number for one in self.part(part) for number in one.classes]
        return np.bincount(np.array(occurring, np.int64), minlength=len(self.classes))

    def identity(self) -> list[str]:
        """Of files of masks the names and sizes are in it: reading them all would take minutes."""
        digest = blake2b(digest_size=16)
        for name in PARTS:
            for one in self.part(name):
                files = dict.fromkeys(map(file_of, one.mask.files))  # of slices, their volumes
                sizes = [os.stat(file).st_size for file in files]
                digest.update(repr((one.mask, one.classes, sizes)).encode())
        return [*super().identity(), digest.hexdigest()]

    def write_split(self, run: Path) -> None:
        self.write(run / "split.csv")

    def write(self, file: Path) -> None:
        """Write the splits, and groups if there are any, to a CSV file for ``load_masks``.

        The class names are written to ``classes.txt`` next to it. Masks that are not files of class
        indices are written as such to ``split_masks/``.

        Raises:
            UserError: A mask can't be read.
        """
        folder, groups = file.with_name("split_masks"), self.reading.groups
        number = 0
        with csv_writer(file) as rows:
            rows.writerow(["path", "mask", *(["group"] if groups else []), "split"])
            for name in PARTS:
                for one in self.part(name):
                    mask = Path(one.mask.file).absolute()
                    if not one.mask.is_plain:
                        mask = folder.absolute() / f"{number:06}.png"
                        number += 1
                        folder.mkdir(exist_ok=True)
                        try:
                            Image.fromarray(one.mask.read()).save(mask)
                        except BROKEN_IMAGE as error:  # readable when the data set was loaded
                            drawn = one.mask.file
                            why = reason(error, drawn)
                            raise UserError(f"the mask {drawn} can't be read ({why})") from None
                    group = [groups.get(one.path, "")] if groups else []
                    rows.writerow([Path(one.path).absolute(), mask, *group, name])
        text = "".join(f"{name}\n" for name in self.classes)
        file.with_name(_NAME_FILES[0]).write_text(text, encoding="utf-8")


def load_masks(
    source: StrPath,
    annotations: StrPath | None = None,
    seed: int = 0,
    complete: bool = True,
    options: SourceOptions = DEFAULT_SOURCE,
) -> LabelledMasks:
    """Read a segmentation data set and check all of its masks.

    Images and masks are paired by their names: those of folders are the same but for the words for
    images, masks and parts (``images/train/a`` and ``masks/train/a``), and those of files but for
    endings such as ``_mask``, ``-label`` or ``_gt``. docs/data.md lists the layouts.

    The values in masks are class indices, and 255 is ignored; except for masks of 0 and 255 alone,
    of a few gray levels, and of colors, each of which is a class. The class names are the lines of
    ``classes.txt`` or ``labels.txt``, or stand with their colors in ``class_dict.csv`` or
    ``labelmap.txt``. If there is exactly one name too few, ``background`` is added as the first.
    Without names, two classes are named ``background`` and ``foreground``, and more by their values
    or colors.

    Args:
        source: Folder of images with masks, or with shapes in COCO's, YOLO's or LabelMe's format;
            or a table with a column ``path`` and one ``mask``, and optionally ``split``, with paths
            relative to the file; or an archive of these.
        annotations: Folder of the masks or shapes, or COCO's JSON file, if ``source`` is the folder
            of the images.
        seed: Seed for holding out validation images, if there are none.
        complete: Whether missing validation and test parts are made.
        options: How a table is read.

    Returns:
        The data set. Images without a mask and masks without an image are left out and counted.
        Missing parts are made if ``complete``, see ``complete_parts``.

    Raises:
        UserError: There are no images with masks, most do not pair, a mask differs in size from its
            image, can't be read, is smoothed, or has a value that is neither a class nor 255; or
            there is only one class.
    """
    source = Path(source)
    place = None if annotations is None else Path(annotations)
    for path in (source, place):
        if path is not None and not os.path.exists(path):
            raise UserError(f"{brief(path)} does not exist")
    reading = ReadingLog(str(source))
    source = unpacked(source)
    # one tree, so that the folder is listed once
    tree = FileTree(source.parent if place is None and source.is_file() else source)
    found: Parts | Drawn
    folders = [source, source.parent]
    if place is not None:
        found = _read_annotations(tree, place, reading)
        folders = [source, place, place.parent, source.parent]
    elif source.is_dir():
        found, beside = _read_folder(tree, reading)
        folders += [beside, beside.parent] if beside is not None else []
    elif source.suffix.lower() in TABLES and source.is_file():
        found = read_csv(source, options, reading)
        folders = [source.parent]
    elif source.suffix.lower() == ".json" and source.is_file():
        found = read_coco_file(source, tree, reading)
        folders = []
    else:
        raise UserError(f"{source} is neither a folder with images and masks nor a table")
    check_fold(options, reading)
    if isinstance(found, Drawn):
        images, names = _of_shapes(found, reading)
    else:
        images, names = _of_files(found, tree, folders, reading)
    paths = [one.path for some in images.values() for one in some]
    groups = find_groups(paths, [source], options.group_by, reading)
    made = complete_parts(images, _rarest_classes, False, seed, reading, groups, complete)
    present = {number for one in made["train"] for number in one.classes}
    if complete and len(present) < 2:
        raise UserError(
            f"the training masks of {source} hold {len(present)} class: two or more are needed"
        )
    reading.report()
    return LabelledMasks(names, made["train"], made["val"], made["test"], reading)


def _rarest_classes(images: Sequence[MaskedImage]) -> np.ndarray:
    return rarest_classes([one.classes for one in images])


def _read_annotations(tree: FileTree, place: Path, reading: ReadingLog) -> Parts | Drawn:
    """Read a folder of images and one of masks or shapes, or a JSON file."""
    if place.is_file():
        if place.suffix.lower() != ".json":
            raise UserError(
                f"--annotations {place} is neither a folder of masks nor a .json file in COCO's "
                f"format"
            )
        return read_coco_file(place, tree, reading)
    labels = FileTree(place)
    if not labels.images:
        drawn = read_shapes(tree, labels, reading)
        if drawn is not None:
            return drawn
        found = count_endings(labels.files) if labels.files else "no files"
        raise UserError(f"--annotations {place} holds neither masks nor polygons, but {found}")
    return read_two_folders(tree, labels, reading)


def _read_folder(tree: FileTree, reading: ReadingLog) -> tuple[Parts | Drawn, Path | None]:
    """Read a folder: images with masks or shapes in it, or with masks beside it."""
    parts = read_folder(tree, reading) if tree.images else {}
    if parts:
        return parts, None
    beside = masks_beside(tree.folder) if tree.images else None
    if beside is not None and FileTree(beside).images:
        reading.note(f"The masks are read from {beside}")
        return read_two_folders(tree, FileTree(beside), reading), beside
    drawn = read_shapes(tree, tree, reading) if tree.images else None
    if drawn is not None and any(one.shapes for one in drawn.images):
        return drawn, None
    raise UserError(_no_masks(tree, drawn))


def _no_masks(tree: FileTree, drawn: Drawn | None) -> str:
    """Why a folder can't be used, and the way on."""
    folder = tree.folder
    if not tree.images:
        found = count_endings(tree.files) if tree.files else "no files"
        return (
            f"{folder} holds no images that can be read, but {found}: expected images/ and masks/ "
            f"in it"
        )
    has = f"{folder} has {len(tree.images)} images, but no masks"
    if (drawn is not None and drawn.num_boxes) or tree.ending(".xml"):
        others = count_endings(tree.ending(".json", ".xml", ".txt", ".yaml"))
        return (
            f"{has} or polygons: with boxes in {others} it looks like a detection data set: give "
            f"--task detection"
        )
    names = {
        name
        for path in tree.images
        for name in path.split("/")[-2:-1]
        if part_of_name(name) is None
    }
    if len(names) > 1:
        return (
            f"{has}: with the folders {brief(', '.join(sorted(names)))} it looks like a "
            f"classification data set: give --task classification"
        )
    tables = [path for path in tree.files if path.lower().endswith(TABLES)]
    if tables:
        return (
            f"{has}: if {tables[0]} names the classes of images, give --task classification; if it "
            f"names their masks, give it with --data"
        )
    others = f" (beside them, {count_endings(tree.others)})" if tree.others else ""
    return (
        f"{has}{others}: expected images/ and masks/ in it, or the folder of masks with "
        f"--annotations"
    )


def _of_shapes(
    found: Drawn, reading: ReadingLog
) -> tuple[dict[Split | None, list[MaskedImage]], list[str]]:
    if not any(one.shapes for one in found.images):
        boxes = f"{found.num_boxes} boxes, but " if found.num_boxes else ""
        way = ": give --task detection" if found.num_boxes else ""
        raise UserError(
            f"{reading.source} has {boxes}no polygons for {len(found.images)} images{way}"
        )
    reading.add("box without a polygon, left out", reading.source, found.num_boxes)
    with ThreadPoolExecutor(4) as pool:
        readable = list(pool.map(_is_readable, (one.image for one in found.images)))
    for one, good in zip(found.images, readable, strict=True):
        if not good:
            reading.add("image not readable, left out", one.image)
    kept = [one for one, good in zip(found.images, readable, strict=True) if good]
    found = found._replace(images=kept)
    masks, names = with_classes(found)
    images: dict[Split | None, list[MaskedImage]] = {}
    pairs = sorted(zip(found.images, masks, strict=True), key=lambda pair: pair[0].image)
    for one, (mask, classes) in pairs:
        images.setdefault(one.part, []).append(MaskedImage(one.image, mask, classes))
    reading.note("Polygons are drawn as masks: 0 is the background, smaller objects on larger ones")
    return images, names


def _is_readable(image: str) -> bool:
    try:
        image_header(image)
    except BROKEN_IMAGE:
        return False
    return True


def _of_files(
    parts: Parts, tree: FileTree, folders: Sequence[Path], reading: ReadingLog
) -> tuple[dict[Split | None, list[MaskedImage]], list[str]]:
    names = _read_names(_named_files(folders, tree, _NAME_FILES))
    table = _read_colors(_named_files(folders, tree, _COLOR_FILES))
    pairs = [pair for part in parts.values() for pair in part]
    voc = any("segmentationclass" in file.lower() for _, masks in pairs for file in masks[:1])
    found, names = number_classes(reading.source, pairs, names, table, voc, reading)
    rows = iter(found)
    images = {
        part: [MaskedImage(image, *row) for (image, _), row in zip(members, rows, strict=False)]
        for part, members in parts.items()
    }
    return images, names


def _named_files(folders: Sequence[Path], tree: FileTree, names: Sequence[str]) -> list[Path]:
    """Files of these names in the folders themselves, then anywhere in the tree."""
    files = [folder / name for folder in folders for name in names]
    inner = [path for path in tree.others if path.rpartition("/")[2] in names]
    files += [tree.folder / path for path in sorted(inner, key=lambda path: path.count("/"))]
    return [file for file in dict.fromkeys(files) if file.is_file()]


def _read_names(files: Sequence[Path]) -> list[str] | None:
    if not files:
        return None
    file = files[0]
    names = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    duplicates = [name for name, count in Counter(names).items() if count > 1]
    if duplicates:
        raise UserError(f"{file} names the class {brief(duplicates[0])} twice")
    # the file of the sample data lists only the objects, some of which may not occur in the masks
    return ["background", *names] if file.with_name("sample.json").is_file() else names


def _read_colors(files: Sequence[Path]) -> ColorTable | None:
    for file in files:
        colors: dict[int, str] = {}
        for line in read_text(file).splitlines():
            match = _COLOR_LINE.match(line)
            color = [int(match[n]) for n in (2, 3, 4)] if match else []
            if match and max(color) <= 255:
                colors[color[0] << 16 | color[1] << 8 | color[2]] = match["name"].strip('"')
        if colors:
            return ColorTable(str(file), colors)
    return None
