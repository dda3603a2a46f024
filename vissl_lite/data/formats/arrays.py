"""NumPy files: ``.npy`` and ``.npz``. Nothing is ever unpickled.

Of an array of three axes, an axis of at most ``MAX_BANDS`` is the bands: the last one, or else the
first one. Without such an axis it is a stack of images of one band. Four axes are a stack, whose
images follow the same rule.
"""

import math
import zipfile
from io import BytesIO
from typing import BinaryIO, NamedTuple

import numpy as np

from vissl_lite.data.formats.common import (
    MAX_DEFLATE_RATIO,
    Description,
    RawImage,
    Source,
    check_bytes,
    check_frame,
    check_size,
    converting,
    native,
    volumes,
)

# An axis of at most this length is the bands: Sentinel-2 has 13.
MAX_BANDS = 16

# Names of the array of pixels in an ``.npz`` file that holds several arrays.
_NAMES = ("pixels", "image", "images", "img", "imgs", "data", "x")

# Names of arrays beside ``pixels`` that say that its last axis holds the bands, however many, that
# it is a photograph, and of which volume it is a slice.
_BANDS_LAST = "bands_last"
_PHOTOGRAPH, _VOLUME = "vissl_lite_photograph", "vissl_lite_volume"

_NPY = b"\x93NUMPY"
_HEADER_BYTES = 1 << 16
_MAX_MEMBERS = 1000


def is_npy(start: bytes) -> bool:
    """Whether a file begins as an ``.npy`` file."""
    return start[:6] == _NPY


def is_npz(start: bytes) -> bool:
    """Whether a file begins as a ZIP archive whose first member is an array."""
    length = int.from_bytes(start[26:28], "little")
    return start[:4] == b"PK\x03\x04" and start[30 : 30 + length].endswith(b".npy")


class _Header(NamedTuple):
    """Header of an array.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        fortran: Whether its first axis runs fastest.
        offset: Where its values begin, in bytes.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    fortran: bool
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _Layout(NamedTuple):
    """Which axes of an array are what.

    Attributes:
        stack: Whether the first axis counts images.
        bands: Axis of the bands of one image: 0, 2, or None.
        frames: Number of images.
        size: Height, width and number of bands of one.
    """

    stack: bool
    bands: int | None
    frames: int
    size: tuple[int, int, int]


def _header(file: BinaryIO, path: str) -> _Header:
    """Read the header at the beginning of an ``.npy`` file; refuses objects."""
    data = file.read(_HEADER_BYTES)
    opened = BytesIO(data)
    with converting(path):
        version = np.lib.format.read_magic(opened)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, dtype = read(opened)
    if dtype.hasobject or dtype.kind not in "buif" or dtype.itemsize > 8:
        raise ValueError(f"{path}: an array of {dtype} is not an image")
    if any(side < 0 for side in shape):
        raise ValueError(f"{path}: an array of shape {shape}")
    return _Header(shape, dtype, fortran, opened.tell())


def _layout(header: _Header, path: str, bands_last: bool = False) -> _Layout:
    shape = header.shape
    if bands_last and len(shape) == 3:
        layout = _Layout(False, 2, 1, shape)
    elif len(shape) == 2:
        layout = _Layout(False, None, 1, (shape[0], shape[1], 1))
    elif len(shape) == 3 and not {shape[0], shape[2]} & set(range(1, MAX_BANDS + 1)):
        layout = _Layout(True, None, shape[0], (shape[1], shape[2], 1))
    elif len(shape) in (3, 4):
        one = shape[-3:]
        bands = 2 if one[2] <= MAX_BANDS else 0
        if one[bands] > MAX_BANDS:
            raise ValueError(f"{path}: no axis of {shape} is at most {MAX_BANDS}, as bands are")
        height, width = (one[0], one[1]) if bands == 2 else (one[1], one[2])
        frames = shape[0] if len(shape) == 4 else 1
        layout = _Layout(len(shape) == 4, bands, frames, (height, width, one[bands]))
    else:
        raise ValueError(f"{path}: an array of shape {shape} is not an image or a stack of images")
    if not layout.frames or not layout.size[2]:
        raise ValueError(f"{path}: an array of shape {shape} is empty")
    check_size(*layout.size, header.dtype.itemsize, path)
    return layout


class _Opened(NamedTuple):
    """An array file whose header has been read.

    Attributes:
        header: Header of the array of pixels.
        layout: Its layout.
        member: Name in an ``.npz`` file.
        nodata: Value of pixels without data.
        window: Center and width.
        band_names: Names of the bands.
        photograph: Whether it was a photograph in its own file.
        volume: Volume that it is a slice of.
    """

    header: _Header
    layout: _Layout
    member: str | None = None
    nodata: float | None = None
    window: tuple[float, float] | None = None
    band_names: tuple[str, ...] = ()
    photograph: bool = False
    volume: str | None = None


def _open(source: Source) -> _Opened:
    if is_npy(source.start):
        source.file.seek(0)
        header = _header(source.file, source.path)
        layout = _layout(header, source.path)
        if header.offset + header.nbytes > source.size:
            raise ValueError(f"{source.path}: cut short")
        return _Opened(header, layout)
    with converting(source.path), zipfile.ZipFile(source.file) as archive:
        members = {
            one.filename.removesuffix(".npy"): one
            for one in archive.infolist()[:_MAX_MEMBERS]
            if one.filename.endswith(".npy")
        }
        names = [name for name in _NAMES if name in members] or list(members)
        if len(names) != 1 and names[:1] != ["pixels"]:
            raise ValueError(
                f"it holds the arrays {', '.join(names)[:100]}: name the one of the images 'images'"
            )
        name = names[0]
        about = members[name]
        with archive.open(about) as file:
            header = _header(file, source.path)  # type: ignore[arg-type]
        if (
            header.offset + header.nbytes > about.file_size
            or about.file_size > MAX_DEFLATE_RATIO * about.compress_size + 1000
            or about.compress_size > source.size
        ):
            raise ValueError("its sizes contradict each other")

        def small(key: str) -> np.ndarray | None:
            one = members.get(key)
            if name != "pixels" or one is None or one.file_size > _HEADER_BYTES:
                return None
            return np.lib.format.read_array(BytesIO(archive.read(one)), allow_pickle=False)

        nodata, window, bands = small("nodata"), small("window"), small("band_names")
        volume = small(_VOLUME)
        return _Opened(
            header,
            _layout(header, source.path, name == "pixels" and _BANDS_LAST in members),
            name,
            None if nodata is None else float(nodata),
            None if window is None else (float(window[0]), float(window[1])),
            () if bands is None else tuple(map(str, bands)),
            name == "pixels" and _PHOTOGRAPH in members,
            None if volume is None else str(volume),
        )


def describe(source: Source) -> Description:
    """Describe an array file by its header."""
    opened = _open(source)
    header, layout = opened.header, opened.layout
    height, width, bands = layout.size
    dtype = native(np.empty(0, header.dtype)).dtype
    return Description(
        "photograph" if opened.photograph else "array",
        layout.frames,
        height,
        width,
        bands,
        dtype.name,
        opened.band_names,
        opened.nodata,
        group=source.path if layout.stack else None,
        volume=source.path if layout.stack else opened.volume,
        acquisition={"bit depth": str(8 * dtype.itemsize), "size": f"{width} x {height}"},
    )


def read(source: Source, frame: int) -> RawImage:
    """Read an image of an array file; of an uncompressed stack, no more than that one."""
    opened = _open(source)
    header, layout = opened.header, opened.layout
    check_frame(frame, layout.frames, source.path)
    if opened.member is None and layout.stack and not header.fortran:
        size = header.nbytes // layout.frames
        data = source.read(header.offset + frame * size, size)
        pixels = np.frombuffer(data, header.dtype).reshape(header.shape[1:])
    else:
        whole = volumes.get(
            source.key and ("array", *source.key), lambda: _whole(source, header, opened.member)
        )
        pixels = whole[frame] if layout.stack else whole
    if layout.bands is None:
        pixels = pixels[..., None]
    elif layout.bands == 0:
        pixels = np.moveaxis(pixels, 0, 2)
    return RawImage(
        native(np.ascontiguousarray(pixels)), opened.nodata, opened.window, opened.band_names
    )


def _whole(source: Source, header: _Header, member: str | None) -> tuple[np.ndarray, int]:
    """The whole array, and its number of bytes."""
    check_bytes(header.nbytes, source.path)
    if member is None:
        data = source.read(header.offset, header.nbytes)
    else:
        with converting(source.path), zipfile.ZipFile(source.file) as archive:
            with archive.open(member + ".npy") as file:
                data = file.read(header.offset + header.nbytes)[header.offset :]
            if len(data) < header.nbytes:
                raise ValueError("cut short")
    order = "F" if header.fortran else "C"
    return np.frombuffer(data, header.dtype).reshape(header.shape, order=order), header.nbytes  # type: ignore[call-overload]


def encode(image: RawImage, photograph: bool = False) -> bytes:
    """Write one raw image as an ``.npz`` file of its own, uncompressed.

    The bytes depend on the image and on what it is alone: they hold no time.

    Args:
        image: The image.
        photograph: Whether it is to be described as a photograph.

    Returns:
        The content of a file that ``read`` reads.
    """
    arrays: dict[str, np.ndarray] = {"pixels": image.pixels}
    if image.pixels.shape[2] > MAX_BANDS:
        arrays[_BANDS_LAST] = np.array(True)
    if photograph:
        arrays[_PHOTOGRAPH] = np.array(True)
    if image.nodata is not None:
        arrays["nodata"] = np.array(image.nodata)
    if image.window is not None:
        arrays["window"] = np.array(image.window)
    if image.band_names:
        arrays["band_names"] = np.array(image.band_names)
    out = BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, array in arrays.items():
            _add(archive, name, array)
    return out.getvalue()


def _add(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    part = BytesIO()
    np.lib.format.write_array(part, np.asarray(array, order="C"), allow_pickle=False)
    archive.writestr(zipfile.ZipInfo(f"{name}.npy"), part.getbuffer())


def with_volume(data: bytes, volume: str) -> bytes:
    """Name the volume of an image, as ``describe`` then does.

    It is not stored in shards: equal slices have equal bytes there, whatever their file is called.

    Args:
        data: Result of ``encode``.
        volume: Name of the volume.
    """
    out = BytesIO(data)
    with converting(volume), zipfile.ZipFile(out, "a") as archive:
        _add(archive, _VOLUME, np.array(volume))
    return out.getvalue()
