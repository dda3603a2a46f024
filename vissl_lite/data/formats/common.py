"""What the formats share: paths of frames, descriptions, raw images, sources, decoded volumes."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np

from vissl_lite.data.reading import check_pixels, max_bytes, open_regular
from vissl_lite.errors import UserError

T = TypeVar("T")

# Suffixes by family. ``.nii.gz`` is the only one of two parts.
TIFF_SUFFIXES = frozenset({".tif", ".tiff"})
DICOM_SUFFIXES = frozenset({".dcm", ".dicom", ".ima"})
NIFTI_SUFFIXES = frozenset({".nii", ".nii.gz"})
ARRAY_SUFFIXES = frozenset({".npy", ".npz"})

# Suffix of a raw image in a shard, where other arrays may stand beside images.
FRAME_SUFFIX = ".frame.npz"

# Deflate compresses at most about 1032 times (zlib's technical details).
MAX_DEFLATE_RATIO = 1040

# Digits of a frame's number at most.
_MAX_DIGITS = 9

# Numbers of the bands of gray and of colored photographs.
_PHOTOGRAPH_BANDS = (1, 3)


class RawImage(NamedTuple):
    """One image with its values as the file means them.

    Attributes:
        pixels: ``(H, W, C)``, uint8, uint16, int16, int32, float32 or another dtype of numbers.
        nodata: Value of pixels that hold no data; None if the file names none. NaN is never data.
        window: Center and width of the range of values to show, in the units of ``pixels``; None
            if the file names none.
        band_names: Names of the C bands in lower case, where known; else empty.
    """

    pixels: np.ndarray
    nodata: float | None = None
    window: tuple[float, float] | None = None
    band_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Description:
    """What the header of an image file says.

    Attributes:
        format: ``photograph``, ``TIFF``, ``DICOM``, ``NIfTI`` or ``array``.
        frames: Number of pages, slices or frames.
        height: Height of one in pixels, as ``read_raw`` returns it.
        width: Width of one in pixels.
        bands: Number of bands.
        dtype: Name of the NumPy dtype that ``read_raw`` returns.
        band_names: Names of the bands in lower case, where known; else empty.
        nodata: Value of pixels that hold no data.
        spacing: Distance between rows, columns and, where there are several, slices, in mm.
        group: What must not be divided between training and test: DICOM's PatientID, else
            StudyInstanceUID; the file, where it holds several images; None if unknown.
        volume: DICOM's SeriesInstanceUID; the file, where it holds several images; else None.
        position: Position in the volume: of a DICOM along the normal of the slice, in mm, or its
            InstanceNumber; of a frame, its number.
        acquisition: How the image was made, such as ``maker``, ``model``, ``series``,
            ``bit depth`` and ``size``.
        default_frame: Frame that is read if the path names none.
    """

    format: str
    frames: int
    height: int
    width: int
    bands: int
    dtype: str
    band_names: tuple[str, ...] = ()
    nodata: float | None = None
    spacing: tuple[float, ...] | None = None
    group: str | None = None
    volume: str | None = None
    position: float | None = None
    acquisition: Mapping[str, str] = field(default_factory=dict)
    default_frame: int = 0

    @property
    def is_photograph(self) -> bool:
        """Whether an image is of 8 bits, gray or in color, in a format for such."""
        usual = self.format in ("photograph", "TIFF")
        return usual and self.dtype == "uint8" and self.bands in _PHOTOGRAPH_BANDS


class NoImageError(ValueError):
    """A valid file that holds no image, such as a DICOMDIR or a structured report."""


class Source:
    """An image file on the disk, or its content in memory.

    A context manager that closes the file.

    Args:
        path: The file, without the number of a frame.
        data: Its content; None reads the file.

    Attributes:
        path: The file, named in errors.
        file: Open file.
        size: Number of bytes.
        key: Identifies the content, for ``volumes``; None for data in memory.

    Raises:
        OSError: The file is missing, or not a regular file.
    """

    def __init__(self, path: str, data: bytes | None = None) -> None:
        self.path = path
        self.file: BinaryIO
        self.key: tuple[str, int, int] | None = None
        if data is None:
            self.file = open_regular(path)
            about = os.fstat(self.file.fileno())
            self.size, self.key = about.st_size, (path, about.st_size, about.st_mtime_ns)
        else:
            self.file, self.size = BytesIO(data), len(data)

    @cached_property
    def start(self) -> bytes:
        """The first 4096 bytes."""
        self.file.seek(0)
        return self.file.read(4096)

    def read(self, at: int, length: int) -> bytes:
        """Read exactly so many bytes.

        Raises:
            ValueError: The file ends before.
        """
        if at < 0 or length < 0 or at + length > self.size:
            raise ValueError(f"{self.path}: cut short")
        self.file.seek(at)
        data = self.file.read(length)
        if len(data) < length:
            raise ValueError(f"{self.path}: cut short")
        return data

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def split_path(path: str | Path) -> tuple[str, int | None]:
    """Split the number of a slice, page or frame off a path.

    ``scan.nii.gz#17`` is slice 17, from 0, of ``scan.nii.gz``. A file whose own name ends like that
    wins.

    Args:
        path: The path.

    Returns:
        The file, and the number; None if the path names no frame.
    """
    path = os.fspath(path)
    file, mark, number = path.rpartition("#")
    if not mark or not file or not (number.isascii() and number.isdigit()):
        return path, None
    if len(number) > _MAX_DIGITS or os.path.lexists(path):
        return path, None
    return file, int(number)


def file_of(path: str | Path) -> str:
    """The file of a path that may name a frame; see ``split_path``."""
    return split_path(path)[0]


def is_image_path(path: str | Path) -> bool:
    """Whether the file of a path exists that may name a frame; the frame is not looked for."""
    return os.path.isfile(split_path(path)[0])


def split_suffix(path: str) -> tuple[str, str]:
    """Split the suffix off a path; the number of a frame stays with the stem.

    ``a/scan.nii.gz#17`` gives ``a/scan#17`` and ``.nii.gz``: a slice and its mask have equal stems.
    """
    file, mark, number = path.rpartition("#")
    if not mark or not (number.isascii() and number.isdigit()):
        file, mark, number = path, "", ""
    if file.lower().endswith(".nii.gz"):
        stem, suffix = file[:-7], file[-7:]
    else:
        stem, suffix = os.path.splitext(file)
    return stem + mark + number, suffix


def is_photograph_path(path: str | Path) -> bool:
    """Whether the suffix of a path is of a format for photographs, or of TIFF."""
    suffix = split_suffix(os.fspath(path))[1].lower()
    return bool(suffix) and suffix not in DICOM_SUFFIXES | NIFTI_SUFFIXES | ARRAY_SUFFIXES


def missing_extra(path: str, library: str, extra: str) -> UserError:
    """The error for a file that needs a library which is not installed."""
    return UserError(
        f'{path} needs {library}, which is not installed: pip install "vissl-lite[{extra}]"'
    )


def check_frame(number: int, frames: int, path: str) -> None:
    """Raise a ValueError if a file has no frame of this number."""
    if not 0 <= number < frames:
        raise ValueError(f"{path}: it has {frames} frames, numbered from 0, and none is {number}")


def check_size(height: int, width: int, bands: int, itemsize: int, path: str) -> None:
    """Raise a ValueError if an image of this size must not be decoded; see ``check_pixels``."""
    check_pixels(height, width, path)
    check_bytes(height * width * max(1, bands) * itemsize, path)


def check_bytes(count: int, path: str) -> None:
    """Raise a ValueError if so many bytes must not be decoded."""
    if count > max_bytes():
        raise ValueError(f"{path}: it would take {count} bytes, more than {max_bytes()}")


@contextmanager
def converting(path: str) -> Iterator[None]:
    """Turn whatever a library raises about a file into a ValueError.

    Only calls of libraries belong into the block: an error of our own would be hidden.
    """
    try:
        yield
    except (UserError, OSError, NoImageError):
        raise
    except Exception as error:  # libraries raise nearly anything on a broken file
        text = str(error).removeprefix(f"{path}: ") or type(error).__name__
        raise ValueError(f"{path}: {text[:300]}") from None


# Values


def rescaled_dtype(low: int, high: int, slope: float, intercept: float) -> np.dtype[np.generic]:
    """The dtype of integers after a linear rescaling, as the header alone says.

    Args:
        low: Smallest value that can be stored.
        high: Largest value that can be stored.
        slope: Factor.
        intercept: Summand.

    Returns:
        The smallest of uint8, uint16, int16 and int32 that holds all results, if they are
        integers; else float32.
    """
    if not (slope.is_integer() and intercept.is_integer()):
        return np.dtype(np.float32)
    ends = sorted((low * slope + intercept, high * slope + intercept))
    for dtype in (np.uint8, np.uint16, np.int16, np.int32):
        info = np.iinfo(dtype)
        if info.min <= ends[0] and ends[1] <= info.max:
            return np.dtype(dtype)
    return np.dtype(np.float32)


def rescale(
    values: np.ndarray, slope: float, intercept: float, dtype: np.dtype[np.generic]
) -> np.ndarray:
    """Multiply and add, exactly for a dtype of integers; see ``rescaled_dtype``."""
    if slope == 1 and intercept == 0:
        return values.astype(dtype, copy=False)
    if dtype.kind == "f":
        return (values * np.float64(slope) + intercept).astype(dtype)
    return (values.astype(np.int64) * int(slope) + int(intercept)).astype(dtype)


def native(values: np.ndarray) -> np.ndarray:
    """Values in the byte order of the machine; bool becomes uint8 and float16 float32."""
    if values.dtype == np.bool_:
        return values.astype(np.uint8)
    if values.dtype == np.float16:
        return values.astype(np.float32)
    return values.astype(values.dtype.newbyteorder("="), copy=False)


# Decoded volumes

# Bytes of decoded volumes that a process keeps; one volume is kept, however large.
_CACHE_BYTES = 256 << 20


class VolumeCache:
    """The decoded volumes that were used last, limited in bytes; one per process.

    Slices of one volume follow one another in many readings, and each would decompress it anew.
    Threads that need the same volume wait for the first of them.

    Args:
        most: Bytes that are kept; the last volume is kept even if it is larger.
    """

    def __init__(self, most: int = _CACHE_BYTES) -> None:
        self.most = most
        self.clear()

    def clear(self) -> None:
        """Forget all volumes."""
        self._lock = threading.Lock()
        self._making: dict[object, threading.Lock] = {}
        self._kept: OrderedDict[object, tuple[object, int]] = OrderedDict()

    def peek(self, key: object | None) -> Any:
        """A volume that is there; else None."""
        with self._lock:
            return self._kept.get(key, (None, 0))[0]

    def get(self, key: object | None, make: Callable[[], tuple[T, int]]) -> T:
        """A volume, decoded if it is not there.

        Args:
            key: Identifies it; None decodes it without keeping it.
            make: Decodes it; returns it and its number of bytes.
        """
        if key is None:
            return make()[0]
        with self._lock:
            making = self._making.setdefault(key, threading.Lock())
        try:
            with making:
                with self._lock:
                    if key in self._kept:
                        self._kept.move_to_end(key)
                        return self._kept[key][0]  # type: ignore[return-value]
                value, size = make()
                with self._lock:
                    self._kept[key] = value, size
                    total = sum(size for _, size in self._kept.values())
                    while total > self.most and len(self._kept) > 1:
                        total -= self._kept.popitem(last=False)[1][1]
                return value
        finally:
            with self._lock:
                self._making.pop(key, None)


volumes = VolumeCache()
if hasattr(os, "register_at_fork"):  # another thread may hold a lock in that moment
    os.register_at_fork(after_in_child=volumes.clear)
