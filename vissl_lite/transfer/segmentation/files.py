"""Pairing of image and mask files, from folders or a CSV file."""

from collections.abc import Iterable
from pathlib import Path

from vissl_lite.data.images import find_images
from vissl_lite.data.text_file import read_text
from vissl_lite.errors import UserError, brief
from vissl_lite.transfer.options import SourceOptions
from vissl_lite.transfer.sources.parts import VAL_NAMES, Split
from vissl_lite.transfer.sources.reading_log import ReadingLog
from vissl_lite.transfer.sources.tables import (
    ImageFinder,
    find_images_of,
    parts_of_rows,
    path_column,
    read_table,
)

IMAGE_FOLDERS = ("images", "JPEGImages", "labelled")
MASK_FOLDERS = ("masks", "labels", "annotations", "gt", "SegmentationClass")

_SUFFIXES = ("_mask", "-mask", "_label", "_gt")

Pairs = list[tuple[str, str]]  # (image file, mask file)
Parts = dict[Split | None, Pairs]


def read_two_folders(images: Path, masks: Path) -> Parts:
    """Pair a folder of images and a folder of masks, both with or without split folders.

    Args:
        images: Folder of the images, or a folder that contains ``images/``.
        masks: Folder of the masks.

    Raises:
        UserError: If an image has no mask, or a mask no image.
    """
    return _pair_parts(_first(images, IMAGE_FOLDERS) or images, masks)


def _first(folder: Path, names: Iterable[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def _split_folders(folder: Path) -> dict[str, Path]:
    """Existing subfolders train, val and test; empty if there is no train."""
    if not (folder / "train").is_dir():
        return {}
    found = {
        "train": folder / "train",
        "val": _first(folder, VAL_NAMES),
        "test": _first(folder, ["test"]),
    }
    return {name: path for name, path in found.items() if path is not None}


def read_folder(folder: Path) -> Parts:
    """Pair images and masks in one folder; see ``load_masks`` for the layouts.

    Raises:
        UserError: If there are none, an image has no mask, or a mask no image.
    """
    lists = folder / "ImageSets" / "Segmentation"
    if lists.is_dir():
        return _read_voc(folder, lists)
    images, masks = _first(folder, IMAGE_FOLDERS), _first(folder, MASK_FOLDERS)
    if images and masks:
        return _pair_parts(images, masks)
    parts: Parts = {"train": [], "val": [], "test": []}
    for name, part in _split_folders(folder).items():
        images, masks = _first(part, IMAGE_FOLDERS), _first(part, MASK_FOLDERS)
        if not (images and masks):
            raise UserError(f"{part} lacks images/ or masks/")
        parts[name] = _pair(_by_key(images), _by_key(masks), images, masks)
    if not parts["train"]:
        raise UserError(
            f"{folder} holds no images with masks: expected images/ and masks/ in it or in its "
            f"train/; or give the folder of images with --data and that of masks with --annotations"
        )
    return parts


def _pair_parts(images: Path, masks: Path) -> Parts:
    image_splits, mask_splits = _split_folders(images), _split_folders(masks)
    if not image_splits and not mask_splits:
        return {None: _pair(_by_key(images), _by_key(masks), images, masks)}
    parts: Parts = {"train": [], "val": [], "test": []}
    for name in image_splits | mask_splits:
        image_folder = image_splits.get(name, images / name)
        mask_folder = mask_splits.get(name, masks / name)
        parts[name] = _pair(_by_key(image_folder), _by_key(mask_folder), image_folder, mask_folder)
    return parts


def _read_voc(folder: Path, lists: Path) -> Parts:
    """Read Pascal VOC's layout, whose lists name the images with masks of each split."""
    images, masks = _by_key(folder / "JPEGImages"), _by_key(folder / "SegmentationClass")
    parts: Parts = {"train": [], "val": [], "test": []}
    for name in parts:
        file = lists / f"{name}.txt"
        keys = read_text(file).split() if file.is_file() else []
        for kind, found in (("image", images), ("mask", masks)):
            missing = [key for key in keys if key not in found]
            if missing:
                raise UserError(
                    f"{file}: {len(missing)} of {len(keys)} names have no {kind}, the "
                    f"first {missing[0]}"
                )
        parts[name] = [(images[key], masks[key]) for key in sorted(keys)]
    return parts


def _by_key(folder: Path) -> dict[str, str]:
    """Images in a folder by their relative path without suffix."""
    found: dict[str, str] = {}
    for path in find_images([folder]):
        key = Path(path).relative_to(folder).with_suffix("").as_posix()
        if key in found:
            raise UserError(f"{found[key]} and {path} have the same name: remove one of them")
        found[key] = path
    return found


def _pair(
    images: dict[str, str], found: dict[str, str], image_folder: Path, mask_folder: Path
) -> Pairs:
    masks: dict[str, str] = {}
    for name, path in found.items():
        keys = [name, *(name.removesuffix(suffix) for suffix in _SUFFIXES)]
        key = next((key for key in keys if key in images), name)
        if key in masks:
            raise UserError(f"{images[key]} has two masks: {masks[key]} and {path}")
        masks[key] = path
    unmasked = [path for key, path in images.items() if key not in masks]
    unpaired = [path for key, path in masks.items() if key not in images]
    if unmasked or unpaired:
        if unmasked:
            problem = (
                f"{len(unmasked)} of {len(images)} images in {image_folder} have no mask in "
                f"{mask_folder}, the first {unmasked[0]}"
            )
        else:
            problem = (
                f"{len(unpaired)} of {len(masks)} masks in {mask_folder} have no image in "
                f"{image_folder}, the first {unpaired[0]}"
            )
        remedy = "name each mask like its image, as images/a/1.jpg and masks/a/1.png"
        if 2 * (len(images) - len(unmasked)) > max(len(images), len(masks)):
            remedy = f"remove them, or add the missing {'masks' if unmasked else 'images'}"
        raise UserError(f"{problem}: {remedy}")
    return [(path, masks[key]) for key, path in images.items()]


MASK_COLUMNS = ("mask", "mask_path", "mask_file", "label", "annotation", "segmentation")


def read_csv(file: Path, options: SourceOptions, log: ReadingLog) -> Parts:
    """Read pairs from a table with a column of images and one of masks, and optionally of parts.

    Args:
        file: CSV file or a relative of it; see ``read_table``.
        options: Names of columns, and the folder of the images.
        log: Counts what is left out.

    Raises:
        UserError: If the file can't be read, lacks a column, or names mostly missing files.
    """
    root = None if options.image_root is None else Path(options.image_root)
    finder = ImageFinder(file.parent, root)
    table = read_table(file, finder.is_image, MASK_COLUMNS)
    images = path_column(table, finder, options)
    masks = table.column(MASK_COLUMNS)
    if options.label_column is not None:
        masks = table.given_column("label_column", options.label_column)
    if images is None or masks is None:
        missing = "mask" if masks is None else "path"
        raise UserError(
            f"{file} has no column {missing}: it has {brief(', '.join(table.columns))}; name it "
            f"with --{'label' if masks is None else 'path'}_column"
        )
    named = parts_of_rows(table, options, log)
    found = [find_images_of(table, column, named, finder, log) for column in (images, masks)]
    parts: Parts = {}
    for image, mask, part in sorted(
        zip(*found, named, strict=True), key=lambda row: (row[0] or "", row[1] or "")
    ):
        if image is not None and mask is not None:
            parts.setdefault(part, []).append((image, mask))
    log.layout = f"table {file.name} ({table.form})"
    log.label = f"column {masks}"
    return parts
