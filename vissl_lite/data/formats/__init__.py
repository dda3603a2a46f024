"""Reading of image files as they are: photographs, TIFF, DICOM, NIfTI and NumPy arrays.

The family of a file is chosen by its content. A path may name a slice, page or frame after ``#``,
counted from 0, as in ``scan.nii.gz#17``; see ``split_path``.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import UnidentifiedImageError

from vissl_lite.data.atomic_file import atomic_write
from vissl_lite.data.formats import arrays, dicom, nifti, photographs, tiff
from vissl_lite.data.formats.common import (
    DICOM_SUFFIXES,
    NIFTI_SUFFIXES,
    TIFF_SUFFIXES,
    Description,
    NoImageError,
    RawImage,
    Source,
    check_frame,
    file_of,
    is_image_path,
    is_photograph_path,
    split_path,
    split_suffix,
)
from vissl_lite.data.formats.display import to_rgb
from vissl_lite.data.headers import ImageHeader, image_header_of, is_tiff
from vissl_lite.data.reading import open_regular, read_regular

__all__ = [
    "DICOM_SUFFIXES",
    "Description",
    "NoImageError",
    "RawImage",
    "decode_reduced",
    "describe",
    "encode_frame",
    "file_of",
    "image_header",
    "image_size",
    "is_image_path",
    "is_photograph_path",
    "read_raw",
    "read_raw_content",
    "split_path",
    "split_suffix",
    "to_rgb",
    "write_masks",
]

# Cameras put a thumbnail of up to 64 KB before the size; most other files have it at the start.
_START = 4096


def describe(path: str | Path) -> Description:
    """Describe an image file by its header alone.

    Args:
        path: The file; may name a frame, whose number is then the position. Frames of a volume are
            slices along the axis of ``slice_along``.

    Raises:
        OSError, ValueError, SyntaxError: The file is missing, broken or too large
            (``BROKEN_IMAGE``); ``NoImageError`` if it holds no image.
        UserError: It needs a library that is not installed.
    """
    file, frame = split_path(path)
    with Source(file) as source:
        found = _family(source).describe(source)
    if frame is not None:
        check_frame(frame, found.frames, file)
    if found.frames > 1:
        number = found.default_frame if frame is None else frame
        return replace(found, position=float(number))
    return found


class _Family(NamedTuple):
    """How files of one family are described and read.

    Attributes:
        describe: Function from the file to its description.
        read: Function of the file, the number of the frame (None if the path names none) and a
            function that reads its whole content.
    """

    describe: Callable[[Source], Description]
    read: Callable[[Source, int | None, Callable[[], bytes]], RawImage]


def _family(source: Source) -> _Family:
    """The family of a file, by its content."""
    start = source.start
    if not photographs.is_usual(start):
        if is_tiff(start):
            return _Family(tiff.describe, lambda file, frame, _: _read_tiff(file, frame or 0))
        if dicom.is_dicom(start) or dicom.may_be_dicom(start, source.path):
            return _Family(dicom.describe, lambda file, frame, _: dicom.read(file, frame or 0))
        if nifti.is_nifti(start):
            return _Family(nifti.describe, _read_nifti)
        if arrays.is_npy(start) or arrays.is_npz(start):
            return _Family(arrays.describe, lambda file, frame, _: arrays.read(file, frame or 0))
    return _Family(photographs.describe, _read_photograph)


def read_raw(path: str | Path) -> RawImage:
    """Read an image with its values as they are stored, or as the file rescales them.

    Photographs of 8 bits are RGB. What a path without a number means: the first frame, and the
    middle slice of a NIfTI volume.

    Args:
        path: The file; may name a frame.

    Raises:
        OSError, ValueError, SyntaxError, cv2.error: See ``describe``.
        UserError: The file needs a library that is not installed.
    """
    file, frame = split_path(path)
    with Source(file) as source:
        return _family(source).read(source, frame, lambda: read_regular(file))


def _read_photograph(source: Source, frame: int | None, content: Callable[[], bytes]) -> RawImage:
    photographs.check_one_frame(frame, source.path)
    return photographs.read(content(), source.path)


def _read_nifti(source: Source, frame: int | None, content: Callable[[], bytes]) -> RawImage:
    return nifti.read(source, nifti.describe(source).default_frame if frame is None else frame)


def _read_tiff(source: Source, frame: int) -> RawImage:
    if tiff.is_photograph(source):
        page = tiff.photograph_page(source, frame)
        try:
            return photographs.read_page(source.file, source.path, page)
        except UnidentifiedImageError:  # a kind that Pillow does not know
            pass
    return tiff.read(source, frame)


def read_raw_content(data: bytes, path: str | Path) -> RawImage:
    """Read the content of an image file, such as that of a member of a shard; see ``read_raw``.

    Args:
        data: The file's bytes, or those of ``encode_frame``.
        path: Named in errors.
    """
    with Source(str(path), data) as source:
        return _family(source).read(source, None, lambda: data)


def decode_reduced(
    data: bytes, path: str | Path, times: Callable[[int, int], int]
) -> tuple[np.ndarray, tuple[int, int]]:
    """Decode the bytes of an image file to 8-bit RGB, a JPEG no larger than needed.

    Of several frames the one is decoded that ``read_raw`` takes. What is not a photograph is shown
    as ``to_rgb`` does.

    Args:
        data: The file's bytes, or those of ``encode_frame``.
        path: Named in errors.
        times: Function from the displayed height and width of the whole image: how many times as
            large as needed it is. It is asked before anything is decoded, and for a JPEG only.

    Returns:
        ``(H, W, 3)`` uint8, and the height and width of the whole image.
    """
    if photographs.is_usual(data):
        return photographs.decode(data, path, times)
    image = to_rgb(read_raw_content(data, path))
    return image, (image.shape[0], image.shape[1])


def encode_frame(path: str | Path) -> bytes:
    """A frame as the content of a file of its own, an uncompressed ``.npz``; see ``read_raw``."""
    return arrays.encode(read_raw(path), describe(path).is_photograph)


def write_masks(
    path: str, masks: Mapping[int, np.ndarray], place: Path, whole_name: bool = False
) -> Path | None:
    """Write predicted masks at the place in space or on the earth that their image has.

    Args:
        path: A NIfTI volume, or a GeoTIFF.
        masks: ``(H, W)`` uint8 by the number of the slice; 0 for a single image.
        place: File to write, with the name of the image.
        whole_name: Whether a suffix of the image that is not that of the file stays in the name.

    Returns:
        The file; None for an image that has no such place.
    """
    suffix = split_suffix(path)[1].lower()
    volume, tagged = suffix in NIFTI_SUFFIXES, suffix in TIFF_SUFFIXES
    stays = whole_name and suffix not in (".nii.gz", ".tif")
    name = place.name if stays else split_suffix(place.name)[0]
    if volume:
        file = place.with_name(f"{name}.nii.gz")
        with atomic_write(file) as part:
            nifti.write_masks(path, masks, part)
        return file
    tags = tiff.place_tags(path) if tagged and len(masks) == 1 else []
    if not tags:
        return None
    file = place.with_name(f"{name}.tif")
    with atomic_write(file) as part:
        tiff.write_mask(next(iter(masks.values())), tags, part)
    return file


def volume_layout(path: str | Path) -> nifti.Layout | None:
    """How the volume of a path is stored and sliced; None if it is not a NIfTI volume.

    Raises:
        OSError, ValueError: It can't be read (``BROKEN_IMAGE``).
    """
    file = file_of(path)
    if split_suffix(file)[1].lower() not in NIFTI_SUFFIXES:
        return None
    with Source(file) as source:
        return nifti.layout(source)


def image_size(path: str | Path) -> tuple[int, int]:
    """Height and width that an image file decodes to; see ``image_header``."""
    height, width, _ = image_header(path)
    return height, width


def image_header(path: str | Path) -> ImageHeader:
    """Height, width and orientation of an image file, without decoding it.

    Args:
        path: The file; may name a frame.

    Raises:
        OSError, ValueError, SyntaxError: It is missing, no image, or has more pixels than are
            allowed (``BROKEN_IMAGE``).
        UserError: It needs a library that is not installed.
    """
    file, frame = split_path(path)
    with open_regular(file) as opened:
        start = opened.read(_START)
        if frame is None and (photographs.is_usual(start) or is_tiff(start)):
            return image_header_of(opened, start, file)
    found = describe(path)
    return ImageHeader(found.height, found.width, 1)
