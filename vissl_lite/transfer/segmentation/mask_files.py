"""Pairing of image and mask files, from the names of folders and files or from a table."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from vissl_lite.data.formats import split_suffix
from vissl_lite.data.images import EXTENSIONS
from vissl_lite.errors import UserError, brief
from vissl_lite.transfer.options import SourceOptions
from vissl_lite.transfer.sources.file_tree import IMAGE_FOLDERS, MASK_FOLDERS, FileTree, composed
from vissl_lite.transfer.sources.parts import (
    PARTS,
    Split,
    part_of_file,
    part_of_name,
    words_of,
)
from vissl_lite.transfer.sources.reading_log import ReadingLog
from vissl_lite.transfer.sources.tables import (
    ImageFinder,
    Table,
    find_images_of,
    groups_of_rows,
    parts_of_rows,
    path_column,
    read_table,
)
from vissl_lite.transfer.sources.voc_lists import listed_images

UNMASKED = "image without a mask, left out"
UNPAIRED = "mask without an image, left out"

_IMAGE_WORDS = frozenset("image images img imgs jpegs photo photos picture pictures".split())
_MASK_WORDS = frozenset(
    """anno annot annotation annotations gt groundtruth label labels mask masks seg segmentation
    segmentations truth""".split()
)

# What the names of masks and images may have beside what they share.
_MASK_ENDS = re.compile(
    r"[_-](?:gtFine_|gtCoarse_)?(?:masks?|labels?|seg|segmentation|gt|L|labelIds|labelTrainIds)"
    r"(?P<number>[_-]?\d+)?$",
    re.IGNORECASE,
)
_MASK_STARTS = re.compile("^(?:mask|label|seg|segmentation|gt)[_-]", re.IGNORECASE)
_IMAGE_ENDS = re.compile("[_-](?:leftImg8bit|image|img|sat|rgb)$", re.IGNORECASE)
_IMAGE_STARTS = re.compile("^(?:image|img)[_-]", re.IGNORECASE)

# Files beside the masks of class numbers of Cityscapes.
_CITYSCAPES_OTHERS = re.compile("_gt(?:Fine|Coarse)_(?:color|instance(?:Train)?Ids)$")

_FRAME = re.compile("(?:#[0-9]+)?$")  # of a slice or page

Pairs = list[tuple[str, tuple[str, ...]]]  # image file, mask files
Parts = dict[Split | None, Pairs]


class _File(NamedTuple):
    """An image file.

    Attributes:
        path: Its path.
        folders: Folders that name neither a part nor images or masks.
        stem: Name without its suffix.
        part: Part that a folder names.
        is_mask: Whether the folder is one of masks (True) or images (False), if it says so.
        named: The folder that names the part.
    """

    path: str
    folders: tuple[str, ...]
    stem: str
    part: Split | None
    is_mask: bool | None
    named: str = ""


def is_mask_folder(name: str) -> bool | None:
    """Whether a folder of this name holds masks; False if it holds images, None if unknown."""
    if name.lower() in MASK_FOLDERS:
        return True
    if name.lower() in IMAGE_FOLDERS:
        return False
    words = set(words_of(name))
    if words & _MASK_WORDS:
        return True
    return False if words & _IMAGE_WORDS else None


def read_folder(tree: FileTree, log: ReadingLog) -> Parts:
    """Pair the images and masks below a folder; see ``load_masks`` for the layouts.

    Args:
        tree: Files of the folder.
        log: Gets the layout and counts what is left out.

    Returns:
        Pairs by part; empty if there are no masks.

    Raises:
        UserError: Most images and masks do not pair.
    """
    lists = _voc_folders(tree)
    if lists:
        return _read_voc(tree, lists, log)
    files = _parse(tree)
    masks = [one for one in files if one.is_mask]
    images = [one for one in files if one.is_mask is False]
    images = images or [one for one in files if one.is_mask is None]
    if not images or not masks:
        return _pair_in_folder(files, log)
    if any(part.lower() == "segmentationclass" for one in masks for part in one.path.split(os.sep)):
        masks = [one for one in masks if "segmentationobject" not in one.path.lower()]
    log.layout = "images and masks"
    if any(one.stem.endswith("_leftImg8bit") for one in images):
        log.layout = "Cityscapes"
    return _pair(images, masks, log)


def read_two_folders(images: FileTree, masks: FileTree, log: ReadingLog) -> Parts:
    """Pair a folder of images, or one that holds such a folder, and a folder of masks.

    Raises:
        UserError: Most images and masks do not pair, or there are none.
    """
    log.layout = "images and masks"
    below = str(Path(masks.folder).absolute()) + os.sep
    found = [one for one in _parse(images) if not os.path.abspath(one.path).startswith(below)]
    pictures = [one for one in found if one.is_mask is False] or found
    drawn = _parse(masks)
    for tree, files in ((images, pictures), (masks, drawn)):
        if not files:
            raise UserError(f"no images found in {tree.folder}")
    return _pair(pictures, drawn, log)


def masks_beside(images: Path) -> Path | None:
    """The folder of masks beside a folder of images, such as ``masks/train`` of ``images/train``.

    Returns:
        Its path; None if there is none, or several.
    """
    place = images.absolute()
    for folder, rest in ((place, ""), (place.parent, place.name)):
        if is_mask_folder(folder.name) is not False and part_of_name(folder.name) is None:
            continue
        try:
            beside = sorted(one for one in folder.parent.iterdir() if one.is_dir())
        except OSError:
            continue
        found = [one / rest for one in beside if is_mask_folder(one.name) and (one / rest).is_dir()]
        of_part = [one for one in found if part_of_name(one.name) == part_of_name(folder.name)]
        found = of_part or found
        if len(found) == 1:
            return found[0]
    return None


def _parse(tree: FileTree) -> list[_File]:
    """The image files of a tree with what their folders say; common outer folders are dropped."""
    split = [path.split("/") for path in tree.images]
    common = 0
    while split and all(len(one) > common + 2 for one in split):
        if len({one[common] for one in split}) > 1:
            break
        common += 1
    files = []
    kept = common
    for path, steps in zip(tree.images, split, strict=True):
        part: Split | None = None
        is_mask: bool | None = None
        folders, named = [], ""
        for name in steps[kept:-1]:
            role = is_mask_folder(name)
            own = part_of_name(name)
            if own is None and role is not None:
                own = part_of_file(f"{name}.")
            if role is not None:
                is_mask = role
            if own is not None:
                part, named = own, name
            if role is None and own is None:
                folders.append(composed(name))
        if part is None:  # as in train/data/images and train/data/masks
            for name in steps[:kept]:
                part = part_of_name(name) or part
        stem = composed(split_suffix(steps[-1])[0])
        files.append(_File(tree.absolute(path), tuple(folders), stem, part, is_mask, named))
    return files


def _without(pattern: re.Pattern[str], stem: str) -> str:
    """A stem without what a pattern matches; the number of a slice or page stays behind it."""
    name, frame = _split_frame(stem)
    return pattern.sub("", name) + frame


def _split_frame(stem: str) -> tuple[str, str]:
    """A stem, and the number of a slice or page behind it, such as ``#17``; else empty."""
    name = _FRAME.sub("", stem)
    return name, stem[len(name) :]


def _pair_in_folder(files: Sequence[_File], log: ReadingLog) -> Parts:
    """Pair masks with the images of the same folder by the ends of their names."""
    there = {(one.folders, one.part, one.is_mask, one.stem) for one in files}

    def is_mask(one: _File) -> bool:
        stem, number = _split_frame(one.stem)
        bases = [_MASK_ENDS.sub("", stem), _MASK_STARTS.sub("", stem)]
        names = [f"{base}{end}{number}" for base in bases for end in ("", "_sat", "_image")]
        names += [f"image_{bases[1]}{number}", f"img_{bases[1]}{number}"]
        return any(
            name != one.stem and (one.folders, one.part, one.is_mask, name) in there
            for name in names
        )

    masks = [one for one in files if is_mask(one)]
    if not masks:
        return {}
    chosen = set(masks)
    log.layout = "images and masks in one folder"
    return _pair([one for one in files if one not in chosen], masks, log)


@dataclass
class _Index:
    """Images by part, folders and stem, and by fewer of these where that is unambiguous."""

    exact: dict[tuple[object, ...], _File] = field(default_factory=dict)
    loose: dict[str, list[_File]] = field(default_factory=lambda: defaultdict(list))

    def add(self, image: _File) -> None:
        key = (image.part, image.folders, image.stem)
        if key in self.exact:
            raise UserError(
                f"{self.exact[key].path} and {image.path} have the same name: remove one of them"
            )
        self.exact[key] = image
        self.loose[image.stem].append(image)

    def add_short_names(self, images: Iterable[_File]) -> None:
        for image in images:
            for pattern in (_IMAGE_ENDS, _IMAGE_STARTS):
                stem = _without(pattern, image.stem)
                if stem != image.stem:
                    self.exact.setdefault((image.part, image.folders, stem), image)
                    self.loose[stem].append(image)

    def find(self, mask: _File) -> _File | None:
        stems = list(
            dict.fromkeys(
                [
                    mask.stem,
                    _without(_MASK_ENDS, mask.stem),
                    _without(_MASK_STARTS, mask.stem),
                ]
            )
        )
        for stem in stems:
            if (mask.part, mask.folders, stem) in self.exact:
                return self.exact[mask.part, mask.folders, stem]
        for stem in stems:
            near = [
                one
                for one in self.loose.get(stem, ())
                if (mask.part is None or one.part in (None, mask.part))
                and (set(mask.folders) <= set(one.folders) or set(one.folders) <= set(mask.folders))
            ]
            if len(near) == 1:
                return near[0]
        return None


def _pair(images: Sequence[_File], masks: Sequence[_File], log: ReadingLog) -> Parts:
    index = _Index()
    for image in images:
        index.add(image)
    index.add_short_names(images)
    masks = [one for one in masks if not _CITYSCAPES_OTHERS.search(one.stem)]
    trained = {one.stem for one in masks if one.stem.endswith("_labelTrainIds")}
    ids = {one.removesuffix("_labelTrainIds") + "_labelIds" for one in trained}
    masks = [one for one in masks if one.stem not in ids]
    found: dict[_File, list[_File]] = defaultdict(list)
    lone: list[_File] = []
    for mask in masks:
        match = index.find(mask)
        if match is None:
            lone.append(mask)
        else:
            found[match].append(mask)
    lone = _adopt(images, lone, found)
    for image, several in found.items():
        if len(several) > 1 and not _are_numbered(several):
            raise UserError(f"{image.path} has two masks: {several[0].path} and {several[1].path}")
    unmasked = [one for one in images if one not in found]
    paired = len(masks) - len(lone)
    if 2 * paired < len(masks) and 2 * len(found) < len(images):
        raise UserError(
            f"{len(unmasked)} of {len(images)} images have no mask, the first {unmasked[0].path}, "
            f"and {len(lone)} of {len(masks)} masks have no image, the first {lone[0].path}: name "
            f"each mask like its image, as images/a/1.jpg and masks/a/1.png"
        )
    for one in unmasked:
        log.add(UNMASKED, one.path)
    for one in lone:
        log.add(UNPAIRED, one.path)
    if 2 * len(found) < len(images):
        log.warn(
            "data.unmasked",
            f"Only {len(found)} of {len(images)} images in {log.source} have a mask; the others "
            f"are left out",
        )
    parts: Parts = {}
    folders: dict[Split, list[str]] = defaultdict(list)
    for image in images:
        if image in found:
            own = found[image]
            part = image.part or own[0].part
            named = image.named or own[0].named
            if part is not None and named and f"{named}/" not in folders[part]:
                folders[part].append(f"{named}/")
            parts.setdefault(part, []).append((image.path, tuple(one.path for one in own)))
    log.origins.update({part: ", ".join(names) for part, names in folders.items() if names})
    return parts


def _adopt(
    images: Sequence[_File], lone: Sequence[_File], found: dict[_File, list[_File]]
) -> list[_File]:
    """Give masks to the only image of their folder, as in ``ID/images`` and ``ID/masks``."""
    by_folder: dict[tuple[object, ...], list[_File]] = defaultdict(list)
    for image in images:
        by_folder[image.part, image.folders].append(image)
    left = []
    adopting = {key for key, own in by_folder.items() if len(own) == 1 and own[0] not in found}
    for mask in lone:
        key = (mask.part, mask.folders)
        if mask.folders and key in adopting:
            found[by_folder[key][0]].append(mask)
        else:
            left.append(mask)
    return left


def _are_numbered(masks: Sequence[_File]) -> bool:
    """Whether the names say that masks are pieces of one: numbered, or of any name."""
    bases = {_without(_MASK_ENDS, one.stem) for one in masks}
    ends = [_MASK_ENDS.search(_split_frame(one.stem)[0]) for one in masks]
    numbered = sum(end is not None and end["number"] is not None for end in ends)
    if len(bases) == 1:
        return numbered >= len(masks) - 1 and all(end is not None for end in ends)
    return len(bases) == len(masks)


def _merge_rows(rows: Sequence[tuple[str, str, Split | None]], log: ReadingLog) -> Parts:
    """Make one pair of all rows of an image, with all of their masks, sorted by path.

    Args:
        rows: Image, mask and part.
        log: Counts rows that repeat another, and images of several parts.
    """
    masks: dict[str, set[str]] = defaultdict(set)
    named: dict[str, set[Split | None]] = defaultdict(set)
    for image, mask, part in rows:
        if mask in masks[image] and part in named[image]:
            log.add("row that repeats another, left out", image)
        masks[image].add(mask)
        named[image].add(part)
    parts: Parts = {}
    for image in sorted(masks):
        if len(named[image]) > 1:
            log.add("image of several parts, left out of the first", image)
        last = max(named[image], key=(None, *PARTS).index)  # no test image is trained on
        parts.setdefault(last, []).append((image, tuple(sorted(masks[image]))))
    return parts


# Pascal VOC


def _voc_folders(tree: FileTree) -> list[str]:
    """Folders with ``ImageSets/Segmentation``, relative to the tree; empty for its own."""
    ends = [re.search(r"^(.*?)/?ImageSets/Segmentation/\w+\.txt$", path) for path in tree.others]
    return sorted({end[1] for end in ends if end})


def _read_voc(tree: FileTree, folders: Sequence[str], log: ReadingLog) -> Parts:
    """Read Pascal VOC's layout, whose lists name the images with masks of each part."""
    log.layout = "Pascal VOC"
    rows: list[tuple[str, str, Split | None]] = []
    for folder in folders:
        root = tree.folder / folder
        images, masks = (_by_stem(root / name) for name in ("JPEGImages", "SegmentationClass"))
        lists = root / "ImageSets" / "Segmentation"
        for part, names in listed_images(lists).items():
            for name in sorted(set(names)):
                key = name if name in images else name.rpartition("/")[2]
                if key not in images or key not in masks:
                    kind = "without an image" if key not in images else "without a mask"
                    log.add(f"name {kind} in a list, left out", f"{lists}: {name}")
                    continue
                rows.append((images[key], masks[key], part))
            if names and part is not None:
                log.origins[part] = f"ImageSets/Segmentation, {part}"
    if not rows:
        raise UserError(
            f"the lists in {tree.folder / folders[0]}/ImageSets/Segmentation name no image in "
            f"JPEGImages/ with a mask in SegmentationClass/"
        )
    return _merge_rows(rows, log)


def _by_stem(folder: Path) -> dict[str, str]:
    if not folder.is_dir():
        return {}
    tree = FileTree(folder)
    return {split_suffix(path)[0]: tree.absolute(path) for path in tree.images}


# Tables

MASK_COLUMNS = (
    "mask", "masks", "mask_path", "mask_file", "mask_name", "label", "label_path", "annotation",
    "segmentation",
)  # fmt: skip


def _check_masks(table: Table, images: str, masks: str, finder: ImageFinder) -> None:
    """Raise a UserError if the column of masks holds classes or the images themselves."""
    paths = {finder.find(cell) for cell in table.cells(images)} - {None}
    cells = [cell for cell in table.cells(masks) if cell]
    named = [cell for cell in cells if split_suffix(cell)[1].lower() in EXTENSIONS]
    if any((path := finder.find(cell)) and path not in paths for cell in cells):
        return
    if cells and not named:
        values = brief(", ".join(list(dict.fromkeys(cells))[:4]))
        raise UserError(
            f"the column {brief(masks)} of {table.file} holds {values}, which "
            f"are not mask files: if they are classes of images, give --task classification; "
            f"otherwise name the column of masks with --label_column"
        )
    if named and any(finder.find(cell) in paths for cell in named):
        raise UserError(
            f"the column {brief(masks)} of {table.file} holds the images themselves: name the "
            f"column of masks with --label_column"
        )


def read_csv(file: Path, options: SourceOptions, log: ReadingLog) -> Parts:
    """Read pairs from a table with a column of images and one of masks, and optionally of parts.

    Args:
        file: CSV file or a relative of it; see ``read_table``. Rows of the same image are its
            masks, of which the union counts.
        options: Names of columns, and the folder of the images.
        log: Counts what is left out.

    Raises:
        UserError: If the file can't be read, lacks a column, or names mostly missing files.
    """
    finder = ImageFinder(file.parent, options.image_root)
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
    _check_masks(table, images, masks, finder)
    named = parts_of_rows(table, options, log)
    found = [find_images_of(table, column, named, finder, log) for column in (images, masks)]
    groups_of_rows(table, found[0], {images, masks}, log)
    rows = zip(*found, named, strict=True)
    parts = _merge_rows(
        [(i, m, part) for i, m, part in rows if i is not None and m is not None], log
    )
    log.layout = f"table {file.name} ({table.form})"
    log.label = f"column {masks}"
    return parts
