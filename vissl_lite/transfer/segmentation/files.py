"""Where images and their masks lie on the disk: two folders, or a CSV file."""

from collections.abc import Iterable
from pathlib import Path

from vissl_lite.data.images import find_images
from vissl_lite.data.text_file import read_text
from vissl_lite.errors import UserError, brief
from vissl_lite.transfer.sources import (
    VAL_NAMES,
    cells,
    check_files,
    need_rows,
    read_rows,
    split_in_three,
    splits,
)

IMAGE_FOLDERS = ("images", "JPEGImages", "labelled")
MASK_FOLDERS = ("masks", "labels", "annotations", "gt", "SegmentationClass")

_SUFFIXES = ("_mask", "-mask", "_label", "_gt")

Pairs = list[tuple[str, str]]  # (image file, mask file)
Parts = dict[str, Pairs]  # train, val, test


def read_two_folders(images: Path, masks: Path) -> Parts:
    """Pairs from a folder of images and one of masks, each with train/, val/, test/ or neither.

    Args:
        images: may also be a folder that holds ``images/``.
        masks: that of the masks.

    Raises:
        UserError: an image without its mask or the other way round.
    """
    return _pair_parts(_first(images, IMAGE_FOLDERS) or images, masks)


def _first(folder: Path, names: Iterable[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_dir()), None)


def _split_folders(folder: Path) -> dict[str, Path]:
    """The subfolders train, val and test, as far as they are there; none without train."""
    if not (folder / "train").is_dir():
        return {}
    found = {
        "train": folder / "train",
        "val": _first(folder, VAL_NAMES),
        "test": _first(folder, ["test"]),
    }
    return {name: path for name, path in found.items() if path is not None}


def read_folder(folder: Path) -> Parts:
    """Pairs from a folder that holds both images and masks; ``load_masks`` says in which forms.

    Raises:
        UserError: there are none, or an image without its mask or the other way round.
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
            raise UserError(f"{part} lacks its images/ or its masks/")
        parts[name] = _pair(_by_key(images), _by_key(masks), images, masks)
    if not parts["train"]:
        raise UserError(
            f"{folder} holds no images with masks: expected images/ and masks/ in it or in its "
            f"train/; or give the folder of images with --data and that of masks with --annotations"
        )
    return parts


def _pair_parts(images: Path, masks: Path) -> Parts:
    ours, theirs = _split_folders(images), _split_folders(masks)
    if not ours and not theirs:
        return split_in_three(_pair(_by_key(images), _by_key(masks), images, masks))
    parts: Parts = {"train": [], "val": [], "test": []}
    for name in ours | theirs:
        here, there = ours.get(name, images / name), theirs.get(name, masks / name)
        parts[name] = _pair(_by_key(here), _by_key(there), here, there)
    return parts


def _read_voc(folder: Path, lists: Path) -> Parts:
    """Pascal VOC: the lists say which of many images have a mask, and its part."""
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
    """The images in a folder, by path below it without suffix."""
    found: dict[str, str] = {}
    for path in find_images([folder]):
        key = Path(path).relative_to(folder).with_suffix("").as_posix()
        if key in found:
            raise UserError(f"{found[key]} and {path} have one name: which of them is it?")
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
    bare = [path for key, path in images.items() if key not in masks]
    stray = [path for key, path in masks.items() if key not in images]
    if bare or stray:
        if bare:
            fault = (
                f"{len(bare)} of {len(images)} images in {image_folder} have no mask in "
                f"{mask_folder}, the first {bare[0]}"
            )
        else:
            fault = (
                f"{len(stray)} of {len(masks)} masks in {mask_folder} have no image in "
                f"{image_folder}, the first {stray[0]}"
            )
        remedy = "a mask is named as its image, as images/a/1.jpg and masks/a/1.png"
        if 2 * (len(images) - len(bare)) > max(len(images), len(masks)):
            remedy = "remove them, or add what they lack"
        raise UserError(f"{fault}: {remedy}")
    return [(path, masks[key]) for key, path in images.items()]


def read_csv(file: Path) -> Parts:
    """Pairs from a CSV file with the columns ``path``, ``mask`` and optionally ``split``.

    Raises:
        UserError: the file can't be read, lacks a column or a value, or names missing files.
    """
    columns, rows = read_rows(file)
    for name in ("path", "mask"):
        if name not in columns:
            raise UserError(f"{file} has no column {name}: it has {brief(', '.join(columns))}")
        cells(file, rows, name)
    need_rows(file, rows)
    rows.sort(key=lambda row: row["path"])  # the split must not depend on the order of rows
    pairs = [(str(file.parent / row["path"]), str(file.parent / row["mask"])) for row in rows]
    check_files(file, [path for pair in pairs for path in pair])
    if "split" not in columns:
        return split_in_three(pairs)
    parts: Parts = {"train": [], "val": [], "test": []}
    for pair, part in zip(pairs, splits(file, rows), strict=True):
        parts[part].append(pair)
    return parts
