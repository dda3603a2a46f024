"""All files under a folder, listed once: annotations of many thousand images name them anyhow."""

import os
import re
from collections import defaultdict
from functools import cached_property
from pathlib import Path

from vissl_lite.data.images import EXTENSIONS, walk
from vissl_lite.data.splits import VAL_NAMES

SPLITS = ("train", "val", "test")

_WORDS = {
    **dict.fromkeys(("train", "training", "trainval"), "train"),
    **dict.fromkeys(VAL_NAMES, "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_IMAGE_FOLDERS = frozenset({"images", "image", "imgs", "img", "jpegimages"})


def split_of_folder(name: str) -> str | None:
    """The split that a folder's name is, such as ``train2017`` or ``valid``; else None."""
    return _WORDS.get(re.sub(r"[\d_-]+$", "", name.lower()))


def split_of_path(path: str) -> str | None:
    """The split that one of a file's folders names; else None."""
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
        folder: searched recursively; links to folders are followed, each folder once.
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
        """The image file that an annotation means.

        Of several files with the name, the one is taken that shares most folders with it, then one
        in a folder of the split, then one in a folder of images, such as ``images``, then the one
        least deep. A file in the folder of another split is none, where the split has its own.

        Args:
            name: a path, absolute or not, perhaps of another machine; or one without its suffix.
            split: train, val or test, where known.

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
