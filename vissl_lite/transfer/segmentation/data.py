"""Segmentation data sets: reading folders or a CSV file of images and masks, and splitting."""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np

from vissl_lite.data.headers import image_size, opened_image
from vissl_lite.data.images import BROKEN_IMAGE
from vissl_lite.data.reading import read_regular, reason
from vissl_lite.data.text_file import csv_writer, read_text
from vissl_lite.errors import UserError, brief
from vissl_lite.options import StrPath
from vissl_lite.transfer.base import ListDataset
from vissl_lite.transfer.options import DEFAULT_SOURCE, SourceOptions
from vissl_lite.transfer.segmentation.files import (
    MASK_FOLDERS,
    Parts,
    read_csv,
    read_folder,
    read_two_folders,
)
from vissl_lite.transfer.sources.parts import Split, complete_parts, rarest_classes
from vissl_lite.transfer.sources.reading_log import ReadingLog
from vissl_lite.transfer.sources.tables import TABLES

log = logging.getLogger(__name__)

# Mask value of pixels that are excluded from training and evaluation.
IGNORE_INDEX = 255

_NAME_FILES = ("classes.txt", "labels.txt")
_BACKGROUND = ("background", "bg", "void", "none", "unlabelled", "unlabeled")


@dataclass(frozen=True)
class MaskedImage:
    """An image and its mask.

    Attributes:
        path: Path of the image file.
        mask: Path of the mask file.
        binary: Whether 255 in the mask is the second class; see ``read_mask``.
        classes: Indices of the classes that occur in the mask.
    """

    path: str
    mask: str
    binary: bool = False
    classes: tuple[int, ...] = ()


@dataclass(frozen=True)
class LabelledMasks(ListDataset[MaskedImage]):
    """Segmentation data set: class names in the order of their indices, and three splits.

    ``test`` may be empty only if ``need_test`` is False.
    """

    def class_counts(self, part: Split) -> np.ndarray:
        """Number of images in which each class occurs, ``(K,)`` int64."""
        occurring = [number for one in self.part(part) for number in one.classes]
        return np.bincount(np.array(occurring, np.int64), minlength=len(self.classes))

    def write_split(self, run: Path) -> None:
        self.write(run / "split.csv")

    def write(self, file: Path) -> None:
        """Write the splits to a CSV file that ``load_masks`` can read again.

        The class names are written to ``classes.txt`` next to it.
        """
        with csv_writer(file) as rows:
            rows.writerow(["path", "mask", "split"])
            for name in ("train", "val", "test"):
                for one in getattr(self, name):
                    rows.writerow([Path(one.path).absolute(), Path(one.mask).absolute(), name])
        text = "".join(f"{name}\n" for name in self.classes)
        file.with_name(_NAME_FILES[0]).write_text(text, encoding="utf-8")


def load_masks(
    source: StrPath,
    annotations: StrPath | None = None,
    seed: int = 0,
    need_test: bool = True,
    options: SourceOptions = DEFAULT_SOURCE,
) -> LabelledMasks:
    """Read a segmentation data set and check all of its masks.

    An image and its mask have the same relative path except for the suffix, and for ``_mask``,
    ``-mask``, ``_label`` or ``_gt`` at the end of the mask's name. The class names are the lines of
    ``classes.txt`` or ``labels.txt``, in one of the folders or next to it. If the file has exactly
    one name too few, ``background`` is added as the first class. Without such a file, two classes
    are named ``background`` and ``foreground``, and more classes by their numbers.

    Args:
        source: Folder with ``images/`` and ``masks/`` (or ``labels/``, ``annotations/``, ``gt/``),
            each with ``train/``, ``val/`` and ``test/`` if there are splits; or with
            ``train/images/``, ``train/masks/`` and so on; or in Pascal VOC's layout
            (``JPEGImages/``, ``SegmentationClass/``, ``ImageSets/Segmentation/``); or the sample
            data; or a CSV file with the columns ``path`` and ``mask``, and optionally ``split``,
            with paths relative to the file. Data without splits are split 60/20/20 into train, val
            and test; without validation images, 20 % of the training images are held out.
        annotations: Folder of the masks, if ``source`` is the folder of the images.
        seed: Seed for holding out validation images, if there are none.
        need_test: Whether a missing test part is made.
        options: How a table is read.

    Returns:
        The data set.

    Raises:
        UserError: If there are no images, an image has no mask or a mask no image, a mask differs
            in size from its image, is in color, or has a value that is neither a class nor 255,
            there is only one class, or there are no test images.
    """
    source = Path(source)
    masks = None if annotations is None else Path(annotations)
    for path in (source, masks):
        if path is not None and not os.path.exists(path):
            raise UserError(f"{brief(path)} does not exist")
    reading = ReadingLog(str(source), layout="images and masks")
    if masks is not None:
        parts = read_two_folders(source, masks)
        name_folders = [source, masks, masks.parent, source.parent]
    elif source.is_dir():
        parts = read_folder(source)
        name_folders = [source, *(source / name for name in MASK_FOLDERS)]
    elif source.suffix.lower() in TABLES and source.is_file():
        parts = read_csv(source, options, reading)
        name_folders = [source.parent]
    else:
        raise UserError(f"{source} is neither a folder with images and masks nor a table")
    images, names = _with_classes(source, parts, _read_names(name_folders))
    made = complete_parts(images, _rarest_classes, False, seed, reading, need_test)
    present = {number for one in made["train"] for number in one.classes}
    if len(present) < 2:
        raise UserError(
            f"the training masks of {source} hold {len(present)} class: two or more are needed"
        )
    reading.report()
    return LabelledMasks(names, made["train"], made["val"], made["test"], reading)


def _rarest_classes(images: Sequence[MaskedImage]) -> np.ndarray:
    return rarest_classes([one.classes for one in images])


def read_mask(path: str | Path, binary: bool = False) -> np.ndarray:
    """Read the class indices of a mask. Palette images give their indices, not their colors.

    Args:
        path: Gray or palette image of up to 16 bits, or an image with three equal channels. White
            pixels of a 1-bit image count as 255.
        binary: Whether 255 is the second class, as in data sets whose masks hold only 0 and 255.

    Returns:
        Class indices ``(H, W)`` uint8; 255 is ignored.

    Raises:
        UserError: If the mask holds colors or values above 255, or is a JPEG file.
        OSError, ValueError, SyntaxError: If the file is missing, broken, or has too many pixels
            (``BROKEN_IMAGE``).
    """
    with opened_image(BytesIO(read_regular(path)), path) as image:
        if image.format == "JPEG":
            raise UserError(
                f"the mask {path} is a JPEG file, whose compression changes the class "
                f"numbers: save masks as PNG"
            )
        mode, values = image.mode, np.asarray(image)
    if mode in ("LA", "PA", "RGBA"):
        values = values[..., :-1]
    if values.ndim == 3:
        if (values != values[..., :1]).any():
            raise UserError(
                f"the mask {path} holds colors ({mode}): convert each color to its "
                f"class number, 0, 1, 2 and so on, in one gray channel"
            )
        values = values[..., 0]
    if values.dtype == bool:
        return values * np.uint8(1 if binary else 255)
    if not np.issubdtype(values.dtype, np.integer) or values.min() < 0 or values.max() > 255:
        raise UserError(
            f"the mask {path} holds values from {values.min()} to {values.max()}: "
            f"expected class numbers below 255, and 255 to ignore"
        )
    mask = np.array(values, np.uint8)  # a copy: Pillow's is read-only
    return np.minimum(mask, 1) if binary else mask


def _read_names(folders: list[Path]) -> list[str] | None:
    files = [folder / name for folder in folders for name in _NAME_FILES]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return None
    names = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    duplicates = [name for name, count in Counter(names).items() if count > 1]
    if duplicates:
        raise UserError(f"{file} names the class {brief(duplicates[0])} twice")
    # the file of the sample data lists only the objects, some of which may not occur in the masks
    return ["background", *names] if file.with_name("sample.json").is_file() else names


def _with_classes(
    source: Path, parts: Parts, names: list[str] | None
) -> tuple[dict[Split | None, list[MaskedImage]], list[str]]:
    """Collect the values of all masks, and derive the classes from them."""
    pairs = [pair for part in parts.values() for pair in part]
    with ThreadPoolExecutor(4) as pool:
        occurring = np.stack(list(pool.map(_occurring_values, pairs)))
    used = set(np.flatnonzero(occurring.any(axis=0)).tolist())
    binary = used == {0, IGNORE_INDEX}
    if binary:
        log.info("The masks of %s hold only 0 and 255: 255 is used as the second class", source)
        occurring[:, 1], occurring[:, IGNORE_INDEX] = occurring[:, IGNORE_INDEX], False
    values_of_all = np.flatnonzero(occurring[:, :IGNORE_INDEX].any(axis=0))
    if not len(values_of_all):
        raise UserError(f"the masks of {source} hold no class: two or more are needed")
    largest = int(values_of_all[-1])
    if names is None:
        numbers = [str(index) for index in range(largest + 1)]
        names = ["background", "foreground"] if largest == 1 else numbers
        if 2 * len(values_of_all) <= largest:
            log.warning(
                "Only %(occurring)d of the values up to %(largest)d occur in the masks of "
                "%(source)s: if they are gray levels and not class numbers, renumber "
                "them",
                {"occurring": len(values_of_all), "largest": largest, "source": source},
                extra={"code": "mask.values"},
            )
    elif len(names) == largest and names[0].lower() not in _BACKGROUND:
        names = ["background", *names]
    for (_, mask), values in zip(pairs, occurring, strict=True):
        invalid = np.flatnonzero(values[len(names) : IGNORE_INDEX])
        if len(invalid):
            raise UserError(
                f"the mask {mask} holds {len(names) + invalid[0]}, which is neither "
                f"a class (0 to {len(names) - 1}) nor 255 (ignored)"
            )
    rows = iter(occurring)
    images = {
        part: [
            MaskedImage(
                image,
                mask,
                binary,
                tuple(np.flatnonzero(values[:IGNORE_INDEX]).tolist()),
            )
            for (image, mask), values in zip(pairs, rows, strict=False)
        ]
        for part, pairs in parts.items()
    }
    return images, names


def _occurring_values(pair: tuple[str, str]) -> np.ndarray:
    """Which of the 256 values occur in a mask. Raises a UserError if it does not fit its image."""
    path, file = pair
    try:
        mask = read_mask(file)
    except BROKEN_IMAGE as error:
        raise UserError(
            f"the mask {file} can't be read ({reason(error, file)}): repair it, or "
            f"remove it together with {path}"
        ) from None
    height, width = mask.shape
    size = _image_size(path)
    if size is not None and size != (height, width):
        raise UserError(
            f"the mask {file} has {width} x {height} pixels, its image "
            f"{path} has {size[1]} x {size[0]} after its EXIF rotation"
        )
    counts = cv2.calcHist([mask], [0], None, [256], [0, 256])
    return np.asarray(counts).ravel() > 0


def _image_size(path: str) -> tuple[int, int] | None:
    """Height and width after EXIF rotation, from the header; None for images that can't be read."""
    try:
        return image_size(path)
    except BROKEN_IMAGE:
        return None
