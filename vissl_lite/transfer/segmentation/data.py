"""Images with masks for semantic segmentation: folders or a CSV file, and their splits."""

import logging
import os
from collections import Counter
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
from vissl_lite.transfer.segmentation.files import (
    MASK_FOLDERS,
    Parts,
    read_csv,
    read_folder,
    read_two_folders,
)
from vissl_lite.transfer.sources import hold_out

log = logging.getLogger(__name__)

# The value of pixels that are neither trained on nor judged.
IGNORE = 255

_NAME_FILES = ("classes.txt", "labels.txt")
_BACKGROUND = ("background", "bg", "void", "none", "unlabelled", "unlabeled")


@dataclass(frozen=True)
class MaskedImage:
    """An image and its mask.

    Attributes:
        path: the image file.
        mask: the mask file.
        binary: whether 255 in the mask is the second class; see ``read_mask``.
    """

    path: str
    mask: str
    binary: bool = False


@dataclass(frozen=True)
class LabelledMasks(ListDataset[MaskedImage]):
    """Classes, in the order of their indices, and the three parts.

    ``test`` is empty only where the caller asked for no test part.
    """

    def write_split(self, run: Path) -> None:
        self.write(run / "split.csv")

    def write(self, file: Path) -> None:
        """Write down the splits: a CSV file that can be given as ``--data`` again.

        The names of the classes stand in ``classes.txt`` beside it.
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
) -> LabelledMasks:
    """Read a segmentation data set, and every mask of it once.

    An image and its mask have the same path below their folders but for the suffix, and for
    ``_mask``, ``-mask``, ``_label`` or ``_gt`` at the end of the mask's name. The names of the
    classes are the lines of ``classes.txt`` or ``labels.txt``, beside or in one of the folders; a
    file that has exactly one name too few leaves out the background. Without such a file they are
    ``background`` and ``foreground``, or with more classes the numbers.

    Args:
        source: a folder with ``images/`` and ``masks/`` (or ``labels/``, ``annotations/``,
            ``gt/``), each with ``train/``, ``val/`` and ``test/`` if there are splits; or with
            ``train/images/``, ``train/masks/`` and so on; or as Pascal VOC has it
            (``JPEGImages/``, ``SegmentationClass/``, ``ImageSets/Segmentation/``); or the sample
            data; or a CSV file with the columns ``path`` and ``mask``, and optionally ``split``,
            paths relative to the file. Without splits 60 % train, 20 % evaluate while training and
            20 % test; without a validation part, 20 % of the training part becomes one.
        annotations: the folder of masks, where ``source`` is the folder of images.
        seed: of the validation part, if one is made.
        need_test: whether missing test images are an error.

    Raises:
        UserError: nothing there, an image without its mask or the other way round, a mask of
            another size than its image, in color, or with a value that is neither a class nor
            255; one class only; no test images.
    """
    source = Path(source)
    masks = None if annotations is None else Path(annotations)
    for path in (source, masks):
        if path is not None and not os.path.exists(path):
            raise UserError(f"{brief(path)} does not exist")
    if masks is not None:
        parts = read_two_folders(source, masks)
        beside = [source, masks, masks.parent, source.parent]
    elif source.is_dir():
        parts = read_folder(source)
        beside = [source, *(source / name for name in MASK_FOLDERS)]
    elif source.suffix.lower() == ".csv" and source.is_file():
        parts = read_csv(source)
        beside = [source.parent]
    else:
        raise UserError(f"{source} is neither a folder with images and masks nor a .csv file")
    if not parts["train"]:
        raise UserError(f"{source} has no training images: three or more are needed to split them")
    if need_test and not parts["test"]:
        raise UserError(
            f"{source} has no test images: add a test part beside train, or give images and masks "
            f"without splits to have them split"
        )
    if not parts["val"]:
        parts["train"], parts["val"] = hold_out(parts["train"], seed)
    return _with_classes(source, parts, _read_names(beside))


def read_mask(path: str | Path, binary: bool = False) -> np.ndarray:
    """Read a mask: the numbers that stand in the file, a palette's colors left aside.

    Args:
        path: gray or palette image of up to 16 bits, or one whose three channels are equal. What
            is white in an image of one bit counts as 255.
        binary: the data set's masks hold 0 and 255 alone: 255 is the second class.

    Returns:
        ``(H, W)`` uint8: class indices; 255 is ignored.

    Raises:
        UserError: it holds colors, values above 255, or what JPEG's compression left of them.
        OSError, ValueError, SyntaxError: the file is missing, broken, or has more pixels than are
            allowed (``BROKEN_IMAGE``).
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
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{file} names the class {brief(twice[0])} twice")
    # the sample data's file lists the objects, even where there are too few images to show it
    return ["background", *names] if file.with_name("sample.json").is_file() else names


def _with_classes(source: Path, parts: Parts, names: list[str] | None) -> LabelledMasks:
    """Look through all masks for their values, and find the classes that these mean."""
    pairs = [pair for part in parts.values() for pair in part]
    with ThreadPoolExecutor(4) as pool:
        seen = np.stack(list(pool.map(_values, pairs)))
    used = set(np.flatnonzero(seen.any(axis=0)).tolist())
    binary = used == {0, IGNORE}
    if binary:
        log.info("The masks of %s hold 0 and 255 alone: 255 is taken for the second class", source)
        seen[:, 1], seen[:, IGNORE] = seen[:, IGNORE], False
    known = np.flatnonzero(seen[: len(parts["train"]), :IGNORE].any(axis=0))
    if len(known) < 2:
        raise UserError(
            f"the training masks of {source} hold {len(known)} class: two or more are needed"
        )
    largest = int(known[-1])
    if names is None:
        numbers = [str(index) for index in range(largest + 1)]
        names = ["background", "foreground"] if largest == 1 else numbers
        if 2 * len(known) <= largest:
            log.warning(
                "Only %(occurring)d of the values up to %(largest)d occur in the masks of "
                "%(source)s: if they are shades of gray and no class numbers, renumber "
                "them",
                {"occurring": len(known), "largest": largest, "source": source},
                extra={"code": "mask.values"},
            )
    elif len(names) == largest and names[0].lower() not in _BACKGROUND:
        names = ["background", *names]
    for (_, mask), values in zip(pairs, seen, strict=True):
        wrong = np.flatnonzero(values[len(names) : IGNORE])
        if len(wrong):
            raise UserError(
                f"the mask {mask} holds {len(names) + wrong[0]}, which is neither "
                f"a class (0 to {len(names) - 1}) nor 255 (ignored)"
            )
    train, val, test = (
        [MaskedImage(image, mask, binary) for image, mask in parts[name]]
        for name in ("train", "val", "test")
    )
    return LabelledMasks(names, train, val, test)


def _values(pair: tuple[str, str]) -> np.ndarray:
    """Which of the 256 values a mask holds; an error if it is no mask of its image."""
    path, file = pair
    try:
        mask = read_mask(file)
    except BROKEN_IMAGE as error:
        raise UserError(
            f"the mask {file} can't be read ({reason(error, file)}): clean it, or "
            f"remove it together with {path}"
        ) from None
    height, width = mask.shape
    size = _image_size(path)
    if size is not None and size != (height, width):
        raise UserError(
            f"the mask {file} has {width} x {height} pixels, its image "
            f"{path} {size[1]} x {size[0]} as it is shown"
        )
    counts = cv2.calcHist([mask], [0], None, [256], [0, 256])
    return np.asarray(counts).ravel() > 0


def _image_size(path: str) -> tuple[int, int] | None:
    """Height and width as shown, from the header; None if it is broken, which training skips."""
    try:
        return image_size(path)
    except BROKEN_IMAGE:
        return None
