"""The files below a folder, and the search for the image that an annotation or a row means."""

import os
import unicodedata
from collections import defaultdict
from functools import cached_property
from pathlib import Path

from vissl_lite.data.formats import is_image_path, split_suffix
from vissl_lite.data.images import EXTENSIONS, expand_frames, image_names, walk
from vissl_lite.transfer.sources.parts import Split, part_of_name, part_of_path

# Usual names of the folders of images, and of those of masks or annotations, in lower case.
IMAGE_FOLDERS = frozenset(
    """image images img imgs img_dir jpegimages labelled leftimg8bit photos pictures""".split()
)
MASK_FOLDERS = frozenset(
    """ann_dir annotation annotations ground_truth groundtruth gt gtfine label labels mask masks
    segmentation segmentationclass segmentationobject""".split()
)

# Files that file managers leave behind.
LITTER = frozenset({"thumbs.db", "desktop.ini", "icon\r"})


class FileTree:
    """The files below a folder, listed when first asked for; hidden ones are left out.

    Args:
        folder: Searched recursively; links to folders are followed, each folder once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def files(self) -> list[str]:
        """All paths, relative to the folder, with forward slashes, sorted."""
        paths = (Path(path).relative_to(self.folder).as_posix() for path in walk(self.folder))
        return sorted(path for path in paths if path.rpartition("/")[2].lower() not in LITTER)

    def ending(self, *suffixes: str) -> list[str]:
        """The files with one of these suffixes, in lower case and with a dot."""
        return [path for path in self.files if path.lower().endswith(suffixes)]

    @cached_property
    def image_files(self) -> list[str]:
        """The files that are images; see ``image_names``."""
        folders: dict[str, list[str]] = {}
        for path in self.files:
            folder, _, name = path.rpartition("/")
            folders.setdefault(folder, []).append(name)
        chosen = {
            f"{folder}/{name}" if folder else name
            for folder, names in folders.items()
            for name in image_names(os.path.join(self.folder, folder), names)
        }
        return [path for path in self.files if path in chosen]

    @cached_property
    def images(self) -> list[str]:
        """The images; files of several are replaced by their frames; see ``expand_frames``."""
        start = os.path.join(self.folder, "")
        found = expand_frames([start + path for path in self.image_files])
        return [path.removeprefix(start) for path in found]

    @cached_property
    def others(self) -> list[str]:
        """The files that are not images."""
        images = set(self.image_files)
        return [path for path in self.files if path not in images]

    def absolute(self, path: str) -> str:
        """The path of a file of the tree."""
        return os.path.join(self.folder, path)

    @cached_property
    def _by_stem(self) -> dict[str, list[str]]:
        """Image files by stem and by ``folder/stem``, composed (NFC)."""
        images = defaultdict(list)
        for path in self.images:
            stem = composed(split_suffix(path)[0])
            for depth in (1, 2):
                key = "/".join(stem.split("/")[-depth:])
                images[key].append(path)
                if key == stem:
                    break
        return dict(images)

    def _ending(self, key: str, suffix: str) -> list[str]:
        """Image files by stem or ``folder/stem``, and by suffix if it is not empty."""
        return [
            path
            for path in self._by_stem.get(key, ())
            if split_suffix(path)[1] == suffix or not suffix
        ]

    @cached_property
    def _folders(self) -> set[str]:
        """Names of the folders that hold images, composed (NFC)."""
        return {composed(os.path.basename(os.path.dirname(path))) for path in self.images}

    def image(self, name: str, part: Split | None = None) -> str | None:
        """The image file of an annotation.

        Of several files with the name, the one is taken that shares most folders with it, then one
        in a folder of the part, then one in a folder of images, such as ``images``, then the one
        least deep. A file in a folder of another part is not taken. Neither is one in another
        folder than the name says, if the tree has images in a folder of that name. Composed and
        decomposed characters are the same: names from a Mac may have ü as u and a diaeresis.

        Args:
            name: A path, absolute or not, perhaps of another machine; or one without its suffix.
            part: Train, val or test, where known.

        Returns:
            Its path, or None if there is none, or several that are equally near.
        """
        exact = os.path.join(self.folder, name)
        if (os.path.isabs(name) or "\\" in name) and is_image_path(exact):
            return exact
        name = name.replace("\\", "/")
        if os.path.isabs(name) and is_image_path(name):
            return name
        parts = [part for part in composed(name).split("/") if part not in ("", ".", "..")]
        if not parts:
            return None
        stem, suffix = split_suffix(parts[-1])
        if suffix.lower() not in EXTENSIONS:  # a stem, in which there may be dots
            stem, suffix = parts[-1], ""
        stems = [*parts[:-1], stem]
        found = self._ending("/".join(stems[-2:]), suffix)
        if not found and (len(stems) == 1 or stems[-2] not in self._folders):
            found = self._ending(stem, suffix)
        ranked = []
        for path in found:
            own = composed(split_suffix(path)[0]).split("/")
            shared = 0
            while shared < min(len(own), len(stems)) and own[-shared - 1] == stems[-shared - 1]:
                shared += 1
            rest = own[: len(own) - shared]
            named = {part_of_name(folder) for folder in rest} - {None}
            if part is not None and named and part not in named:
                continue
            pictures = any(folder.lower() in IMAGE_FOLDERS for folder in own[:-1])
            ranked.append(((shared, part in named, pictures, -len(own)), path))
        ranked.sort(reverse=True)
        if not ranked or (len(ranked) > 1 and ranked[0][0] == ranked[1][0]):
            return None
        return os.path.join(self.folder, ranked[0][1])


def composed(name: str) -> str:
    """A name in Unicode's normal form C."""
    return unicodedata.normalize("NFC", name)


def part_below(image: str, tree: FileTree) -> Split | None:
    """The part that a folder between a tree's and an image names."""
    if not Path(image).is_relative_to(tree.folder):
        return None
    return part_of_path(Path(image).relative_to(tree.folder).as_posix())
