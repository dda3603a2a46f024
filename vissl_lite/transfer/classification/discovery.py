"""Discovery of the labels of a classification data set: class folders, file names or tables."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from vissl_lite.errors import UserError, brief
from vissl_lite.transfer.classification.folders import read_class_folders, suggested_regex
from vissl_lite.transfer.classification.labels import FoundLabels
from vissl_lite.transfer.classification.options import LabelOptions
from vissl_lite.transfer.classification.tables import METADATA, read_label_table, read_tables_of
from vissl_lite.transfer.sources.file_tree import MASK_FOLDERS, FileTree
from vissl_lite.transfer.sources.parts import part_of_name, part_of_path
from vissl_lite.transfer.sources.reading_log import ReadingLog, count_endings
from vissl_lite.transfer.sources.tables import TABLES

# Folders with fewer images each than this may be patients rather than classes, if they are many.
_FEW_IMAGES, _MANY_CLASSES = 4, 5

# Endings of tables that are hardly anything else.
_SURE_TABLES = (".csv", ".tsv", ".jsonl")


def find_labels(source: Path, options: LabelOptions, reading: ReadingLog) -> FoundLabels:
    """Find the images and labels of a folder or a table; see ``load_labelled``.

    Args:
        source: An existing folder or file.
        options: Columns, levels of folders, and so on.
        reading: Gets the layout, what is left out, and what looks wrong.

    Raises:
        UserError: There are no labels, or they can't be read.
    """
    if not source.is_dir():
        if source.suffix.lower() not in TABLES:
            raise UserError(
                f"{source} is neither a folder nor a table: give class folders or one of "
                f"{' '.join(TABLES)}"
            )
        return read_label_table(source, options, reading, part_of_name(source.stem))
    _warn_of_siblings(source, reading)
    tree = FileTree(source)
    described = any(path.rpartition("/")[2].lower() in METADATA for path in tree.others)
    of_tables = ("label_column", "path_column", "image_root", "test_fold")
    chosen = next((name for name in of_tables if getattr(options, name) is not None), None)
    tables_first = described or chosen is not None
    found = read_tables_of(tree, options, reading) if tables_first else FoundLabels([])
    if chosen is not None and not found.images:
        raise UserError(
            f"--{chosen} is for a table of labels, and {source} has none that can be used"
            f"{how_read(reading)}"
        )
    found = found if found.images else read_class_folders(tree, options, reading)
    # no classes, or a folder of all images
    if not tables_first and len({one.names for one in found.images}) < 2:
        tables = read_tables_of(tree, options, reading)
        found = tables if tables.images else found
    if not found.images:
        raise UserError(_no_labels(tree) + how_read(reading))
    if reading.layout == "class folders" and len({one.names for one in found.images}) == 1:
        suggestion = _regex_suggestion(tree)
        if suggestion:
            reading.note(suggestion)
    others = [path for path in tree.others if tree.absolute(path) not in reading.tables]
    if others:
        text = f"Files not read: {count_endings(others)}"
        if len(others) >= len(tree.images):
            reading.warn(
                "data.unread", f"{text}, beside {len(tree.images)} images: are they images, too?"
            )
        else:
            reading.note(text)
    if reading.layout == "class folders":
        _warn_of_tables(found, others, reading)
    return found


def _warn_of_siblings(source: Path, reading: ReadingLog) -> None:
    """Warn where one part of a data set is given, and others lie beside it."""
    folder = source.resolve()
    if part_of_name(folder.name) != "train":
        return
    others: list[str] = []
    with suppress(OSError):  # the folder above may not be readable
        beside = [one.name for one in folder.parent.iterdir() if one.is_dir() and one != folder]
        others = sorted(name for name in beside if part_of_name(name) is not None)
    if others:
        reading.warn(
            "data.part",
            f"Only {source} is read: to use {' and '.join(others)} beside it, give {folder.parent}",
        )


def _warn_of_tables(found: FoundLabels, unread: Sequence[str], reading: ReadingLog) -> None:
    """Warn where folders look like patients rather than classes, and there are unread tables."""
    classes = len({one.names for one in found.images})
    tables = [path for path in unread if path.lower().endswith(_SURE_TABLES)]
    if classes >= _MANY_CLASSES and len(found.images) < _FEW_IMAGES * classes and tables:
        reading.warn(
            "data.class_names",
            f"{len(found.images)} images have {classes} classes, and tables are not read: if the "
            f"folders are patients or the like, give the table with --data, such as "
            f"{Path(reading.source) / tables[0]}",
        )


def how_read(reading: ReadingLog) -> str:
    """The notes on how the data were read, in parentheses, for the end of an error."""
    return f" ({'; '.join(reading.notes)})" if reading.notes else ""


def _no_labels(tree: FileTree) -> str:
    """Why a folder can't be used, and the way on."""
    folder = tree.folder
    if not tree.images:
        found = count_endings(tree.files) if tree.files else "no files"
        return f"{folder} holds no images that can be read, but {found}"
    folders = {name.lower() for path in tree.images for name in path.split("/")[:-1]}
    labels = [path for path in tree.others if path.lower().endswith((".xml", ".json", ".yaml"))]
    stems = {Path(path).stem for path in tree.images}
    texts = [path for path in tree.ending(".txt") if Path(path).stem in stems]
    suggestion = _regex_suggestion(tree)
    has = f"{folder} has {len(tree.images)} images, but no class folders and no table of labels"
    if folders & MASK_FOLDERS:
        masks = sorted(folders & MASK_FOLDERS)[0]
        text = (
            f"{has}: with {masks}/ it looks like a segmentation data set: give --task segmentation"
        )
        return "; or ".join(filter(None, (text, suggestion)))
    if labels or texts:
        found = count_endings([*labels, *texts])
        text = f"{has}: with {found} it looks like a detection data set: give --task detection"
        return "; or ".join(filter(None, (text, suggestion)))
    if suggestion:
        return f"{has}: {suggestion}"
    return f"{has}: put the images of each class into a folder, or give a .csv file with --data"


def _regex_suggestion(tree: FileTree) -> str:
    """A phrase on a regular expression that finds classes in the file names; empty if none does."""
    images = [
        path
        for path in tree.images
        if MASK_FOLDERS.isdisjoint(part.lower() for part in path.split("/")[:-1])
    ]
    training = [path for path in images if part_of_path(path) == "train"]
    suggested = suggested_regex([os.path.basename(path) for path in training or images])
    if suggested is None:
        return ""
    regex, classes = suggested
    return (
        f"if the class is in the file names, --label_regex '{regex}' would find {len(classes)} "
        f"classes, such as {brief(', '.join(classes[:4]))}"
    )
