"""Output of predictions: files that grow image by image, and pictures."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import TextIO

import numpy as np
from PIL import Image

from vissl_lite.data.atomic_file import atomic_write
from vissl_lite.data.image_reader import ImageReader
from vissl_lite.data.images import BROKEN_IMAGE
from vissl_lite.data.reading import reason
from vissl_lite.data.turns import UNTURNED, Turn

log = logging.getLogger(__name__)

# What file systems allow a name, less ".png.part".
MAX_NAME_BYTES = 255 - 9


def file_name(name: str) -> str:
    """The name of the PNG file for an image: its own with ``.png``.

    One that would be too long for a file system is cut, and gets a hash of the whole in its place.

    Args:
        name: Name of the image file.
    """
    whole = os.fsencode(name)
    if len(whole) <= MAX_NAME_BYTES:
        return f"{name}.png"
    digest = blake2b(whole, digest_size=8).hexdigest()
    # A character must not be cut in the middle of its UTF-8 bytes.
    start = whole[: MAX_NAME_BYTES - len(digest) - 1].decode("utf-8", "ignore")
    return f"{start}-{digest}.png"


@dataclass(frozen=True)
class Predictions:
    """Images to predict for, and the output folder.

    Attributes:
        paths: The image files.
        run: Run folder.
        pictures: Number of images to draw.
        advance: Called with the number of images done since the last call.
        turns: Flips and turns of an image to average its predictions over.
    """

    paths: list[str]
    run: Path
    pictures: int
    advance: Callable[[int], None]
    turns: tuple[Turn, ...] = UNTURNED

    @cached_property
    def common(self) -> str:
        """The innermost folder that holds all images."""
        return os.path.commonpath([os.path.dirname(os.path.abspath(p)) for p in self.paths])

    def place(self, path: str, kind: str, name: Callable[[str], str] = file_name) -> Path:
        """Path of the output for an image: below ``kind``, in subfolders like the image's.

        Args:
            path: The image file.
            kind: Folder in the run.
            name: Function from the name of the image to that of the output; default a PNG.
        """
        inside = Path(os.path.relpath(os.path.abspath(path), self.common))
        file = self.run / kind / inside.parent / name(inside.name)
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    def draw(
        self,
        number: int,
        path: str,
        reader: ImageReader,
        drawn: Callable[[np.ndarray], np.ndarray],
    ) -> None:
        """Write a picture if the image is among the first ``pictures`` ones.

        Args:
            number: Number of the image, from 0.
            path: The file; may name a frame.
            reader: How it is read.
            drawn: Function that draws the predictions into ``(H, W, 3)`` uint8.
        """
        if number < self.pictures:
            try:
                image = reader.read_picture(path)
            except BROKEN_IMAGE as error:  # it was read a moment ago, but can have gone since
                log.warning(
                    "no picture of %(path)s (%(why)s)",
                    {"path": path, "why": reason(error, path)},
                    extra={"code": "picture.failed"},
                )
                return
            with atomic_write(self.place(path, "pictures")) as part:
                Image.fromarray(drawn(image)).save(part, "PNG")


@dataclass(frozen=True)
class PseudoLabelled:
    """The pseudo-labels that a task has written.

    Attributes:
        file: File of the labels.
        images: Number of images that could be read.
        paths: Absolute paths of the images that the file has, those without any class included.
        counts: ``(K,)`` int64, number of these images in which each class occurs; of boxes, number
            of boxes of each class.
    """

    file: Path
    images: int
    paths: list[str]
    counts: np.ndarray


@contextmanager
def growing_file(file: Path) -> Iterator[TextIO]:
    """Open a text file that is named ``FILE.part`` until it is complete.

    File names go into it as they are on the disk, UTF-8 or not.
    """
    part = file.with_name(f"{file.name}.part")
    try:
        with part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as out:
            yield out
    except BaseException:
        log.warning(
            "what was predicted up to here is in %(file)s",
            {"file": part},
            extra={"code": "predictions.partial"},
        )
        raise
    os.replace(part, file)
