"""Sources of masks: files of class numbers, gray levels or colors, and shapes."""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from vissl_lite.data import formats
from vissl_lite.data.formats import image_header, is_photograph_path, split_path
from vissl_lite.data.headers import ON_ITS_SIDE, opened_image, orientation, turned
from vissl_lite.data.reading import check_pixels, read_regular
from vissl_lite.errors import UserError
from vissl_lite.transfer.sources.shapes import Shape, draw_shape

# Mask value of pixels that are excluded from training and evaluation.
IGNORE_INDEX = 255

# Size of shapes whose coordinates are relative to width and height, as in YOLO's format.
RELATIVE_SIZE = (1.0, 1.0)


@dataclass(frozen=True)
class MaskSource:
    """The mask of an image.

    Attributes:
        files: Mask files, of which there may be several for a binary mask: the union counts. With
            shapes, the file that they stand in.
        levels: 256 bytes: the class index of each gray value; None if values are class indices.
        colors: RGB colors (as ``65536 R + 256 G + B``) with their class indices, sorted; None if
            masks are gray.
        shapes: Class index and shape of each object, on a background of class 0, smaller objects
            over larger ones.
        image: Image of the shapes.
        size: Height and width of the image in the coordinates of the shapes.
    """

    files: tuple[str, ...]
    levels: bytes | None = None
    colors: tuple[tuple[int, int], ...] | None = None
    shapes: tuple[tuple[int, Shape], ...] | None = None
    image: str = ""
    size: tuple[float, float] = RELATIVE_SIZE

    @property
    def file(self) -> str:
        """The first file, for messages."""
        return self.files[0]

    @property
    def is_plain(self) -> bool:
        """Whether the mask is one file of class indices."""
        mapped = (self.levels, self.colors, self.shapes)
        return len(self.files) == 1 and all(one is None for one in mapped)

    def read(self) -> np.ndarray:
        """Read the class indices.

        Returns:
            Class indices ``(H, W)`` uint8; 255 is ignored.

        Raises:
            UserError: See ``read_mask``; or the mask holds a color without a class.
            OSError, ValueError, SyntaxError: A file is missing, broken, or has too many pixels
                (``BROKEN_IMAGE``).
        """
        if self.shapes is not None:
            return _rasterize(self.shapes, self.size, self.image)
        mask = self._read(self.files[0])
        for file in self.files[1:]:
            other = self._read(file)
            if other.shape != mask.shape:
                raise ValueError(f"{file} differs in size from {self.files[0]}")
            mask = np.maximum(mask, other)
        return mask

    def _read(self, file: str) -> np.ndarray:
        if self.colors is not None:
            return _class_of_colors(read_colors(file), self.colors, file)
        mask = read_mask(file)
        return mask if self.levels is None else number_levels(mask, self.levels)


def number_levels(mask: np.ndarray, levels: bytes) -> np.ndarray:
    """Replace each gray value by its class index.

    Args:
        mask: ``(H, W)`` uint8.
        levels: Class index of each of the 256 values.
    """
    return np.asarray(cv2.LUT(mask, np.frombuffer(levels, np.uint8)))


def _class_of_colors(
    codes: np.ndarray, colors: tuple[tuple[int, int], ...], file: str
) -> np.ndarray:
    known, numbers = np.array(colors, np.uint32).T
    values, lengths = color_runs(codes)
    places = np.minimum(np.searchsorted(known, values), len(known) - 1)
    unknown = known[places] != values
    if unknown.any():
        color = int(values[unknown][0])
        raise UserError(f"the mask {file} holds the color {color_name(color)}, which has no class")
    return np.repeat(numbers.astype(np.uint8)[places], lengths).reshape(codes.shape)


def color_runs(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Runs of one color in row-major order, of which masks have few.

    Args:
        codes: Colors ``(H, W)`` from ``read_colors``.

    Returns:
        Color and length of each run.
    """
    flat = codes.ravel()
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    return flat[starts], np.diff(starts, append=len(flat))


def color_name(code: int) -> str:
    """A color as in HTML, such as ``#ff0000`` for red."""
    return f"#{code:06x}"


def read_colors(path: str | Path) -> np.ndarray:
    """Read the colors of a mask, turned as its EXIF data say.

    Returns:
        ``65536 R + 256 G + B`` ``(H, W)`` uint32.

    Raises:
        UserError: If the mask is a JPEG, AVIF or HEIC file.
        OSError, ValueError, SyntaxError: See ``MaskSource.read``.
    """
    with opened_image(BytesIO(read_regular(path)), path) as image:
        _refuse_lossy(image, path)
        image.load()  # by which a TIFF is turned; what it leaves to be turned is turned here
        turn = orientation(image)
        if image.mode.startswith("I"):  # 16 bits, which Pillow would clip
            codes = np.asarray(image).astype(np.uint32) * np.uint32(0x010101)
        else:
            codes = color_codes(np.asarray(image.convert("RGB")))
    return np.ascontiguousarray(turned(codes, turn))


def color_codes(channels: np.ndarray) -> np.ndarray:
    """Colors ``65536 R + 256 G + B`` ``(H, W)`` uint32 of ``(H, W, 3)`` uint8."""
    red, green, blue = (channels[..., n].astype(np.uint32) for n in range(3))
    return np.asarray(red << 16 | green << 8 | blue)


# Formats whose compression changes values, by Pillow's names.
_LOSSY = {"JPEG": "JPEG", "MPO": "JPEG", "AVIF": "AVIF", "HEIF": "HEIC"}


def _refuse_lossy(image: Image.Image, path: str | Path) -> None:
    if image.format in _LOSSY:
        raise UserError(
            f"the mask {path} is in the format {_LOSSY[image.format]}, whose compression changes "
            f"class numbers: save masks as PNG"
        )


class RawMask(NamedTuple):
    """A mask as it is stored.

    Attributes:
        values: Gray values or palette indices ``(H, W)``, or colors ``(H, W, 3)``.
        palette: Whether values are indices into a palette.
    """

    values: np.ndarray
    palette: bool


def read_raw(path: str | Path) -> RawMask:
    """Read a mask file as it is, turned as its EXIF data say; three equal channels are made one.

    Args:
        path: Gray, palette or color image, a slice of a NIfTI volume such as ``mask.nii.gz#17``, or
            an array of whole numbers. White pixels of a 1-bit image count as 255.

    Raises:
        UserError: If the mask is a JPEG, AVIF or HEIC file, or holds values that are no uint8.
        OSError, ValueError, SyntaxError: If the file is missing, broken, or has too many pixels
            (``BROKEN_IMAGE``).
    """
    mode = ""
    if split_path(path)[1] is not None or not is_photograph_path(path):
        values = formats.read_raw(path).pixels
        if values.dtype.kind == "f" and (values == np.rint(values)).all():
            values = values.astype(np.int64)
    else:
        with opened_image(BytesIO(read_regular(path)), path) as image:
            _refuse_lossy(image, path)
            image.load()  # see ``read_colors``
            turn = orientation(image)
            if image.mode == "CMYK":
                image = image.convert("RGB")
            mode, values = image.mode, turned(np.asarray(image), turn)
        if mode in ("LA", "PA", "RGBA"):
            values = values[..., :-1]
    if values.ndim == 3:
        first = values[..., 0]
        if all(np.array_equal(first, values[..., n]) for n in range(1, values.shape[-1])):
            values = first
    if values.dtype == bool:
        values = values * np.uint8(255)
    if not np.issubdtype(values.dtype, np.integer) or values.min() < 0 or values.max() > 255:
        raise UserError(
            f"the mask {path} holds values from {values.min()} to {values.max()}: "
            f"expected class numbers below 255, and 255 to ignore"
        )
    return RawMask(np.array(values, np.uint8), mode in ("P", "PA"))  # a copy: Pillow's is read-only


def read_mask(path: str | Path) -> np.ndarray:
    """Read the class indices of a mask. Palette images give their indices, not their colors.

    Args:
        path: Gray or palette image of up to 16 bits, or an image with three equal channels. White
            pixels of a 1-bit image count as 255.

    Returns:
        Class indices ``(H, W)`` uint8; 255 is ignored.

    Raises:
        UserError: If the mask holds colors or values above 255, or is a JPEG, AVIF or HEIC file.
        OSError, ValueError, SyntaxError: If the file is missing, broken, or has too many pixels
            (``BROKEN_IMAGE``).
    """
    values = read_raw(path).values
    if values.ndim == 3:
        raise UserError(
            f"the mask {path} holds colors: convert each color to its class number, 0, 1, 2 and "
            f"so on, in one gray channel"
        )
    return values


def _rasterize(
    shapes: tuple[tuple[int, Shape], ...], size: tuple[float, float], image: str
) -> np.ndarray:
    """Draw shapes at the size of the image after its EXIF rotation."""
    height, width, orientation = image_header(image)
    # Shapes drawn on the stored image are turned with it.
    stored = size == (width, height) and width != height and orientation in ON_ITS_SIDE
    if stored:
        height, width = width, height
    check_pixels(height, width, image)
    mask = np.zeros((height, width), np.uint8)
    for number, shape in sorted(shapes, key=lambda one: one[1].area, reverse=True):
        draw_shape(mask, shape, size, number)
    return np.ascontiguousarray(turned(mask, orientation) if stored else mask)
