"""Reading of classes from folders or from file names."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from vissl_lite.data.text_file import read_text
from vissl_lite.errors import UserError, brief
from vissl_lite.transfer.classification.labels import FoundImage, FoundLabels
from vissl_lite.transfer.classification.options import LabelOptions
from vissl_lite.transfer.sources.file_tree import IMAGE_FOLDERS, MASK_FOLDERS, FileTree
from vissl_lite.transfer.sources.parts import Split, part_of_name, part_of_path
from vissl_lite.transfer.sources.reading_log import ReadingLog
from vissl_lite.transfer.sources.tables import is_utf8

NO_CLASS = "image outside the class folders, left out"

# A folder with one of these words in its name holds images of any class.
_CONTAINER_WORDS = frozenset({"images", "imgs", "pictures", "photos", "jpegs"})

# Folders around a list of the images of a part, as in food-101/meta/train.txt.
_LIST_DEPTH = 2

# Share of the lines of a list of images that must name one.
_MOSTLY = 0.9

# What often separates the class from a number in a file name, see ``suggested_regex``.
_COMMON_REGEXES = (r"^(.+?)[ _.-]*\(?\d+\)?\.\w+$", r"^([^_]+)_", r"^([A-Za-z]+)")


class _Image(NamedTuple):
    """An image of the tree: its path, the folders that may be classes, and its part."""

    path: str
    folders: tuple[str, ...]
    part: Split | None = None


def read_class_folders(tree: FileTree, options: LabelOptions, log: ReadingLog) -> FoundLabels:
    """Read classes from the names of folders, or with ``label_regex`` from those of files.

    Folders of parts are recognized at the top (``Training/<class>/``) and inside the classes
    (``<class>/train/``); folders that hold everything else are passed through.

    Args:
        tree: Files of the data set.
        options: Level of the class folders, or the regular expression.
        log: Gets the layout, the origins of parts, and what is left out.

    Returns:
        Labels; empty if there are no class folders, or no file name matches.

    Raises:
        UserError: The regular expression is invalid, or there is no such level.
    """
    if options.label_regex is not None:
        return _from_names(tree, options.label_regex, log)
    images = _strip_parts([_Image(path, tuple(path.split("/")[:-1])) for path in tree.images], log)
    images = _without_masks(images, log)
    depth = max((len(one.folders) for one in images), default=0)
    if depth == 0:
        return FoundLabels([])
    level = options.class_level or 1
    if level > depth:
        raise UserError(
            f"--class_level {level}: the class folders of {log.source} have "
            f"{depth} level{'s' if depth > 1 else ''}"
        )
    names = _level_names(images, level)
    if set(names.values()) and all(map(_is_container, names.values())):
        return FoundLabels([])
    names = {one: name for one, name in names.items() if not _is_container(name)}
    for one in images:
        if one not in names:
            log.add(NO_CLASS, tree.absolute(one.path))
    copies = _copies(names, level)
    for one in [one for one, name in names.items() if name in copies]:
        log.add("image in a second copy of the class folders, left out", tree.absolute(one.path))
        del names[one]
    if depth > 1 and len(images) > 1:
        counts = [
            f"{n} gives {len(set(_level_names(images, n).values()))} classes"
            for n in range(1, depth + 1)
        ]
        log.note(
            f"The class folders are nested: --class_level {', '.join(counts)}; {level} is used"
        )
    for name in sorted(set(names.values())):
        if not is_utf8(name):  # it goes into models, tables and pictures
            raise UserError(
                f"{log.source}: the class folder {name!a} has a name that is not UTF-8: rename it"
            )
    _note_empty_folders(tree, log)
    log.layout = "class folders"
    if all(one.part is None for one in images):
        parts = _listed_parts(tree, log)
        names = {one._replace(part=parts.get(one.path)): name for one, name in names.items()}
    found = [FoundImage(tree.absolute(one.path), (name,), one.part) for one, name in names.items()]
    return FoundLabels(found)


def _copies(names: Mapping[_Image, str], level: int) -> set[str]:
    """Classes whose folders have the names of other classes, as in ``cell_images/cell_images/``."""
    inner: dict[str, set[str]] = defaultdict(set)
    for one, name in names.items():
        inner[name].add(one.folders[level] if len(one.folders) > level else "")
    classes = set(inner)
    return {name for name, below in inner.items() if len(below) > 1 and below <= classes - {name}}


def _without_masks(images: list[_Image], log: ReadingLog) -> list[_Image]:
    """Leave out masks beside the images of a class, as in ``<class>/images``, ``<class>/masks``."""
    holding = {
        one.folders[:level]
        for one in images
        for level, name in enumerate(one.folders)
        if level > 0 and name.lower() in IMAGE_FOLDERS
    }
    kept = []
    for one in images:
        levels = [i for i, name in enumerate(one.folders) if name.lower() in MASK_FOLDERS]
        if any(one.folders[:level] in holding for level in levels):
            log.add("mask beside the images of a class, left out", one.path)
        else:
            kept.append(one)
    return kept


def _from_names(tree: FileTree, regex: str, log: ReadingLog) -> FoundLabels:
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise UserError(
            f"--label_regex {brief(regex)} is not a regular expression: {error}"
        ) from None
    if pattern.groups != 1:
        raise UserError(
            f"--label_regex {brief(regex)} has {pattern.groups} groups: one, in parentheses, is "
            f"the class, as in '^(.+)_[0-9]+'"
        )
    found = []
    for path in tree.images:
        match = pattern.search(os.path.basename(path))
        if match is None or not match[1]:
            log.add("file name without a match of --label_regex, left out", path)
        else:
            part = part_of_path(path)
            if part is not None:
                log.origins.setdefault(part, "folder names")
            found.append(FoundImage(tree.absolute(path), (match[1],), part))
    if not found:
        raise UserError(
            f"--label_regex {brief(regex)} matches none of the {len(tree.images)} file names in "
            f"{log.source}, the first {brief(os.path.basename(tree.images[0]))}"
        )
    log.layout, log.label = "file names", f"--label_regex {regex}"
    return FoundLabels(found)


def suggested_regex(names: Sequence[str]) -> tuple[str, list[str]] | None:
    """A regular expression that finds classes in file names, and these; None if none does."""
    for regex in _COMMON_REGEXES:
        matches = [re.search(regex, name) for name in names]
        classes = Counter(match[1] for match in matches if match and match[1])
        total = sum(classes.values())
        if 2 <= len(classes) <= total / 3 and total > 0.9 * len(names):
            return regex, sorted(classes)
    return None


def _strip_parts(images: list[_Image], log: ReadingLog) -> list[_Image]:
    """Find the folders of parts, and drop them and those that wrap everything."""
    while True:
        parts = _parts_at(images, 0)
        if parts is not None:
            return _with_parts(images, parts, log)
        outer = _wrapper(images)
        if outer is None:
            break
        images = [one._replace(folders=one.folders[1:]) for one in images]
    # parts inside the classes
    depth = max((len(one.folders) for one in images), default=0)
    for level in range(depth - 1, 0, -1):
        inner = _parts_at(images, level)
        if inner is not None:
            log.origins.update({part: f"<class>/{name}/" for name, part in inner.items()})
            return [
                one._replace(
                    folders=one.folders[:level] + one.folders[level + 1 :],
                    part=inner[one.folders[level]],
                )
                for one in images
                if len(one.folders) > level
            ]
    return images


def _parts_at(images: Sequence[_Image], level: int) -> dict[str, Split] | None:
    """The parts that the folders at a level name, by folder; None if they are something else."""
    names = {one.folders[level] for one in images if len(one.folders) > level}
    parts = {name: part for name in names if (part := part_of_name(name)) is not None}
    if "train" not in parts.values() and not (len(names) > 1 and len(parts) == len(names)):
        return None
    if level > 0:
        return parts if len(parts) == len(names) else None
    # A class may have the name of a part: then it holds no classes, or most others are no parts.
    below = any(len(one.folders) > 1 for one in images if one.folders and one.folders[0] in parts)
    others = len(names) - len(parts)
    if others > len(parts) or (others and not below):
        return None
    return parts


def _with_parts(images: list[_Image], parts: dict[str, Split], log: ReadingLog) -> list[_Image]:
    inside: dict[Split, list[_Image]] = defaultdict(list)
    for one in images:
        part = parts.get(one.folders[0]) if one.folders else None
        if part is None:
            log.add("image outside the folders of parts, left out", one.path)
        else:
            inside[part].append(one._replace(folders=one.folders[1:], part=part))
    for name, part in sorted(parts.items()):
        both = log.origins.get(part)
        log.origins[part] = f"{both}, {name}/" if both else f"{name}/"
    for part, members in inside.items():  # as in seg_train/seg_train/<class>
        while (outer := _wrapper(members)) is not None:
            if part_of_name(outer) is None and not _is_container(outer):
                break
            members = [one._replace(folders=one.folders[1:]) for one in members]
        inside[part] = members
    images = [one for members in inside.values() for one in members]
    while (outer := _wrapper(images)) is not None:
        images = [one._replace(folders=one.folders[1:]) for one in images]
    return images


def _wrapper(images: Sequence[_Image]) -> str | None:
    """The folder that holds nearly all images, if it has folders of images in it."""
    firsts = Counter(one.folders[0] for one in images if one.folders)
    deeper = sum(len(one.folders) > 1 for one in images)
    if len(firsts) != 1 or 2 * deeper <= len(images):
        return None
    return next(iter(firsts))


def _listed_parts(tree: FileTree, log: ReadingLog) -> dict[str, Split]:
    """The part of each image that text files such as ``meta/train.txt`` list; empty without any."""
    lists: dict[Split, list[str]] = defaultdict(list)
    for path in tree.ending(".txt"):
        part = part_of_name(Path(path).stem)
        if part is not None and path.count("/") <= _LIST_DEPTH:
            lists[part].append(path)
    if "train" not in lists or any(len(paths) > 1 for paths in lists.values()):
        return {}
    parts: dict[str, Split] = {}
    for part, (path,) in lists.items():
        lines = [line.strip() for line in read_text(tree.absolute(path)).splitlines()]
        images = [tree.image(line) for line in lines if line]
        found = [os.path.relpath(image, tree.folder) for image in images if image is not None]
        if len(found) < _MOSTLY * len(images):
            return {}
        parts |= dict.fromkeys((one.replace(os.sep, "/") for one in found), part)
        log.origins[part] = path
        log.tables.append(tree.absolute(path))
    return parts


def _level_names(images: Sequence[_Image], level: int) -> dict[_Image, str]:
    """The class of each image at a level; with the folders above it where that is ambiguous."""
    parents: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    deep = [one for one in images if len(one.folders) >= level]
    for one in deep:
        parents[one.folders[level - 1]].add(one.folders[: level - 1])
    return {
        one: one.folders[level - 1]
        if len(parents[one.folders[level - 1]]) == 1
        else "/".join(one.folders[:level])
        for one in deep
    }


def _is_container(name: str) -> bool:
    """Whether a folder of this name holds images or masks rather than a class."""
    if name.lower() in IMAGE_FOLDERS | MASK_FOLDERS:
        return True
    return not _CONTAINER_WORDS.isdisjoint(re.findall("[a-z]+", name.lower()))


def _note_empty_folders(tree: FileTree, log: ReadingLog) -> None:
    """Note folders without images beside those that hold images."""
    holding = {Path(path).parent for path in tree.images}
    holding |= {above for folder in holding for above in folder.parents}
    empty = []
    for place in sorted({folder.parent for folder in holding if folder != Path(".")}):
        for entry in sorted(os.scandir(tree.folder / place), key=lambda one: one.name):
            if entry.is_dir() and not entry.name.startswith((".", "__")):
                folder = place / entry.name
                empty += [folder.as_posix()] if folder not in holding else []
    if empty:
        log.note(f"Folders without images, skipped: {brief(', '.join(empty))}")
