"""Data reading that all tasks share: folder and split names, CSV files, file trees."""

import csv
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import TypeVar

import numpy as np

from vissl_lite.data.images import EXTENSIONS, walk
from vissl_lite.data.text_file import read_bytes
from vissl_lite.errors import UserError, brief, check_positive_share

SPLITS = ("train", "val", "test")

VAL_NAMES = ("val", "valid", "validation")

# Splits by chance

# Share of the images that goes to validation and to test where the data name no such part.
VAL_SHARE = TEST_SHARE = 0.2

T = TypeVar("T")


def split_in_three(items: Sequence[T]) -> dict[str, list[T]]:
    """60 % train, 20 % val, 20 % test, in the order given; at least one in each of three or more.

    It does not follow the run's seed: the test part must stay the test part from run to run.

    Args:
        items: Sorted in a way that does not depend on the machine.
    """
    order = np.random.default_rng(0).permutation(len(items))
    held = max(1, round(len(items) * TEST_SHARE)) if len(items) > 2 else 0
    return {
        "train": [items[i] for i in np.sort(order[2 * held :])],
        "val": [items[i] for i in np.sort(order[held : 2 * held])],
        "test": [items[i] for i in np.sort(order[:held])],
    }


def hold_out(items: Sequence[T], seed: int) -> tuple[list[T], list[T]]:
    """Split a validation part off the training part; return the rest and the part."""
    order = np.random.default_rng((seed, 1)).permutation(len(items))
    held = max(1, round(len(items) * VAL_SHARE)) if len(items) > 1 else 0
    return [items[i] for i in np.sort(order[held:])], [items[i] for i in np.sort(order[:held])]


def take_share(items: Sequence[T], fraction: float | None, seed: int) -> list[T]:
    """A seeded fraction of the items, at least one; smaller fractions are nested in larger ones.

    Args:
        items: All items.
        fraction: Share in (0, 1]; None takes all.
        seed: Seed of the choice.

    Raises:
        UserError: The share is out of range.
    """
    if fraction is None:
        return list(items)
    check_positive_share("fraction", fraction)
    order = np.random.default_rng((seed, 2)).permutation(len(items))
    return [items[i] for i in np.sort(order[: max(1, round(len(items) * fraction))])]


# Tables of images in a CSV file

MAX_COLUMNS = 10_000

Rows = list[dict[str, str]]

# Columns that name files; these need not be UTF-8.
PATH_COLUMNS = ("path", "image", "file", "filename", "mask")


def read_rows(file: Path) -> tuple[list[str], Rows]:
    """Read the columns and rows of a CSV file.

    Raises:
        UserError: It can't be read, is not UTF-8 but for names of files, or has a column twice or
            too many of them.
    """
    text = read_bytes(file).decode("utf-8-sig", "surrogateescape")
    reader = csv.DictReader(StringIO(text, newline=""), strict=True)
    try:
        columns = list(reader.fieldnames or [])
        if len(columns) > MAX_COLUMNS:
            raise UserError(f"{file} has {len(columns)} columns, more than {MAX_COLUMNS}")
        twice = [name for name, count in Counter(columns).items() if count > 1 and name.strip()]
        if twice:
            raise UserError(f"{file} has the column {brief(twice[0])} twice")
        rows = list(reader)
    except csv.Error as error:
        line = reader.line_num
        raise UserError(f"{file} can't be read as a CSV file: {error} (line {line})") from None
    others = [name for name in columns if name not in PATH_COLUMNS]
    words = [*columns, *(row[name] or "" for row in rows for name in others)]
    if not is_utf8("".join(words)):
        raise UserError(f"{file} can't be read: it is not text in UTF-8")
    return columns, rows


def is_utf8(text: str) -> bool:
    """Whether text can be written in UTF-8; names of files need not be, see PEP 383."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def need_rows(file: Path, rows: Rows) -> None:
    """Raise a UserError if a CSV file has no rows."""
    if not rows:
        raise UserError(f"{file} has no rows")


def cells(file: Path, rows: Rows, column: str, may_be_empty: bool = False) -> list[str]:
    """A column; a row that is cut short is an error, and so is an empty cell unless allowed."""
    for row in rows:
        if row[column] is None or not (row[column] or may_be_empty):
            raise UserError(f"{file} has a row whose {column} is missing: {brief(row)}")
    return [row[column] for row in rows]


def check_files(file: Path, paths: Collection[str]) -> None:
    """Raise a UserError if files that a CSV file names are missing."""
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise UserError(f"{file} names {len(missing)} missing files, the first {brief(missing[0])}")


def splits(file: Path, rows: Rows) -> list[str]:
    """The column split: train, val or test for each row.

    Raises:
        UserError: It says something else, or there are no training images.
    """
    names = ["val" if row["split"] in VAL_NAMES else row["split"] for row in rows]
    unknown = [name for name in names if name not in ("train", "val", "test")]
    if unknown:
        raise UserError(f"{file}: the split {brief(repr(unknown[0]))} is none of train, val, test")
    if "train" not in names:
        raise UserError(f"{file} has no training images (split train)")
    return names


# Folders

_WORDS = {
    **dict.fromkeys(("train", "training", "trainval"), "train"),
    **dict.fromkeys(VAL_NAMES, "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_IMAGE_FOLDERS = frozenset({"images", "image", "imgs", "img", "jpegimages"})


def split_of_folder(name: str) -> str | None:
    """The split that a folder name stands for, such as ``train2017`` or ``valid``, or None."""
    return _WORDS.get(re.sub(r"[\d_-]+$", "", name.lower()))


def split_of_path(path: str) -> str | None:
    """The split named by one of a file's folders, or None."""
    named = (split_of_folder(part) for part in reversed(path.split("/")[:-1]))
    return next(filter(None, named), None)


def split_of_file(path: str) -> str | None:
    """The split in a file's name, as in ``instances_val2017.json``, or in its folders' names."""
    words = re.findall("[a-z]+", Path(path).stem.lower())
    named = (_WORDS.get(word) for word in words)
    return next(filter(None, named), None) or split_of_path(path)


class FileTree:
    """The files under a folder, listed when first asked for; hidden ones are left out.

    Args:
        folder: Searched recursively; links to folders are followed, each folder once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def files(self) -> list[str]:
        """All paths, relative to the folder, with forward slashes, sorted."""
        return sorted(Path(path).relative_to(self.folder).as_posix() for path in walk(self.folder))

    def ending(self, *suffixes: str) -> list[str]:
        """The files with one of these suffixes, in lower case and with a dot."""
        return [path for path in self.files if path.lower().endswith(suffixes)]

    @cached_property
    def images(self) -> list[str]:
        """The image files."""
        return self.ending(*EXTENSIONS)

    @cached_property
    def _by_stem(self) -> dict[str, list[str]]:
        """Image files by stem and by ``folder/stem``."""
        images = defaultdict(list)
        for path in self.images:
            stem = os.path.splitext(path)[0]
            for depth in (1, 2):
                key = "/".join(stem.split("/")[-depth:])
                images[key].append(path)
                if key == stem:
                    break
        return dict(images)

    def _ending(self, key: str, suffix: str) -> list[str]:
        """Image files by stem or ``folder/stem``, and by suffix if it is not empty."""
        return [path for path in self._by_stem.get(key, ()) if path.endswith(suffix)]

    @cached_property
    def _splits(self) -> set[str | None]:
        """The splits that folders of images name."""
        folders = {os.path.dirname(path) for path in self.images}
        return {split_of_path(f"{folder}/") for folder in folders}

    def image(self, name: str, split: str | None = None) -> str | None:
        """The image file of an annotation.

        Of several files with the name, the one is taken that shares most folders with it, then one
        in a folder of the split, then one in a folder of images, such as ``images``, then the one
        least deep. A file in the folder of another split is none, where the split has its own.

        Args:
            name: A path, absolute or not, perhaps of another machine; or one without its suffix.
            split: Train, val or test, where known.

        Returns:
            Its path, or None if there is none, or several that are equally near.
        """
        exact = os.path.join(self.folder, name)
        if (os.path.isabs(name) or "\\" in name) and os.path.isfile(exact):
            return exact
        name = name.replace("\\", "/")
        if os.path.isabs(name) and os.path.isfile(name):
            return name
        parts = [part for part in name.split("/") if part not in ("", ".", "..")]
        if not parts:
            return None
        stem, suffix = os.path.splitext(parts[-1])
        if suffix.lower() not in EXTENSIONS:  # a stem, in which there may be dots
            stem, suffix = parts[-1], ""
        stems = [*parts[:-1], stem]
        ranked = []
        for path in self._ending("/".join(stems[-2:]), suffix) or self._ending(stem, suffix):
            own = os.path.splitext(path)[0].split("/")
            shared = 0
            while shared < min(len(own), len(stems)) and own[-shared - 1] == stems[-shared - 1]:
                shared += 1
            rest = own[: len(own) - shared]
            splits = {split_of_folder(part) for part in rest} - {None}
            if split is not None and splits and split not in splits and split in self._splits:
                continue
            pictures = any(part.lower() in _IMAGE_FOLDERS for part in own[:-1])
            ranked.append(((shared, split in splits, pictures, -len(own)), path))
        ranked.sort(reverse=True)
        if not ranked or (len(ranked) > 1 and ranked[0][0] == ranked[1][0]):
            return None
        return os.path.join(self.folder, ranked[0][1])


def split_below(image: str, tree: FileTree) -> str | None:
    """The split that a folder between a tree's and an image names."""
    if not Path(image).is_relative_to(tree.folder):
        return None
    return split_of_path(Path(image).relative_to(tree.folder).as_posix())
