"""NIfTI volumes, ``.nii`` and ``.nii.gz``, as slices along an axis.

A volume is turned to the closest canonical orientation (axes to the right, to the front and
upwards), as ``nibabel.as_closest_canonical`` does. In a slice the first of the other two axes runs
to the right and the second upwards: ``np.rot90`` of the slice.
Format: NIfTI-1.1 and NIfTI-2, https://nifti.nimh.nih.gov.
"""

import gzip
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

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
    missing_extra,
    native,
    rescale,
    rescaled_dtype,
    volumes,
)
from vissl_lite.data.reading import slice_axis

_HEADER_1, _HEADER_2 = 348, 540  # bytes
_GZIP = b"\x1f\x8b"
_MAX_BANDS = 1024  # in the dimensions behind the third

# Spacings count as equal if they differ by less than this share.
_EQUAL_SPACING = 1e-3


def is_nifti(start: bytes) -> bool:
    """Whether a file begins as a NIfTI volume, compressed or not."""
    if start[:2] == _GZIP:
        try:
            start = zlib.decompressobj(31).decompress(start, _HEADER_1)
        except zlib.error:
            return False
    return start[344:348] == b"n+1\0" or start[4:12] == b"n+2\0\r\n\x1a\n"


class _Header(NamedTuple):
    """Header of a volume.

    Attributes:
        shape: As stored: three dimensions, then bands if there are several.
        dtype: As stored.
        offset: Where the voxels begin, in bytes.
        affine: ``(4, 4)``.
        orientation: ``(3, 2)`` as nibabel has it: the canonical axis of each stored one, and
            whether it is turned (-1) or not.
        spacing: Voxel size along the canonical axes, in mm.
        slope: Factor of the values.
        intercept: Summand.
        words: Description in the header.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    affine: np.ndarray
    orientation: np.ndarray
    spacing: tuple[float, float, float]
    slope: float
    intercept: float
    words: str

    @property
    def sides(self) -> tuple[int, ...]:
        """Number of voxels along the canonical axes."""
        axes = self.orientation[:, 0].astype(int).tolist()
        return tuple(self.shape[axes.index(axis)] for axis in range(3))

    @property
    def bands(self) -> int:
        in_voxel = len(self.dtype.names) if self.dtype.names else 1
        return math.prod(self.shape[3:]) * in_voxel

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """The dtype of one band as stored."""
        return np.dtype(np.uint8) if self.dtype.names else self.dtype

    @property
    def out_dtype(self) -> np.dtype[np.generic]:
        """The dtype of rescaled values."""
        dtype = self.stored_dtype
        if self.slope == 1 and self.intercept == 0:
            return native(np.empty(0, dtype)).dtype
        if dtype.kind not in "iu" or dtype.itemsize > 4:
            return np.dtype(np.float32)
        info = np.iinfo(dtype)
        return rescaled_dtype(int(info.min), int(info.max), self.slope, self.intercept)

    @property
    def axis(self) -> int:
        """The canonical axis of the slices, by default that of the largest spacing."""
        chosen = slice_axis()
        if chosen is not None:
            return chosen
        largest = max(self.spacing) * (1 - _EQUAL_SPACING)
        return max(axis for axis in range(3) if self.spacing[axis] >= largest)


def _header(source: Source) -> _Header:
    """Read the header; it is kept, as each slice needs it."""
    return volumes.get(
        source.key and ("nifti header", *source.key), lambda: (_read_header(source), 4096)
    )


def _read_header(source: Source) -> _Header:
    try:
        import nibabel as nib
    except ImportError:
        raise missing_extra(source.path, "nibabel", "nifti") from None
    zipped = source.start[:2] == _GZIP
    start = source.start
    if zipped:
        with converting(source.path):
            start = zlib.decompressobj(31).decompress(start, _HEADER_2)
    with converting(source.path):
        first = start[:4]
        is_second = 540 in (int.from_bytes(first, "little"), int.from_bytes(first, "big"))
        kind, length = (nib.Nifti2Header, _HEADER_2) if is_second else (nib.Nifti1Header, _HEADER_1)
        if len(start) < length:
            raise ValueError("cut short")
        header = kind(start[:length], check=False)
        shape = tuple(int(side) for side in header.get_data_shape())
        dtype = header.get_data_dtype()
        offset = int(header.get_data_offset())
        slope, intercept = header.get_slope_inter()
        affine = np.array(header.get_best_affine())
        words = bytes(header["descrip"]).split(b"\0")[0].decode("latin-1").strip()
    if len(shape) < 2 or any(side < 1 for side in shape) or math.prod(shape[3:]) > _MAX_BANDS:
        raise ValueError(f"{source.path}: a volume of shape {shape} can't be read as slices")
    shape = (*shape, 1)[:3] if len(shape) == 2 else shape
    check_bytes(math.prod(shape) * dtype.itemsize, source.path)
    known = dtype.names is not None or (dtype.kind in "uif" and dtype.itemsize <= 8)
    if not known or offset < length:
        raise ValueError(f"{source.path}: voxels of {dtype} at byte {offset} can't be read")
    most = source.size * (MAX_DEFLATE_RATIO if zipped else 1)
    if offset + math.prod(shape) * dtype.itemsize > most:
        raise ValueError(f"{source.path}: cut short")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        affine = np.eye(4)
    with converting(source.path):
        orientation = nib.orientations.io_orientation(affine)
    if np.isnan(orientation).any():
        orientation = np.array([[0, 1], [1, 1], [2, 1]], float)
    lengths = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    axes = orientation[:, 0].astype(int).tolist()
    spacing = tuple(float(lengths[axes.index(axis)]) for axis in range(3))
    if slope is None or not math.isfinite(slope) or not math.isfinite(intercept or 0.0):
        slope, intercept = 1.0, 0.0
    return _Header(
        shape,
        dtype,
        offset,
        affine,
        orientation,
        spacing,  # type: ignore[arg-type]
        float(slope),
        float(intercept or 0.0),
        words,
    )


def _plane(header: _Header, path: str) -> tuple[int, int, int, int]:
    """The axis, and the number of slices, height and width along it."""
    along = header.axis
    right, up = (one for one in range(3) if one != along)
    sides = header.sides
    check_size(sides[up], sides[right], header.bands, header.stored_dtype.itemsize, path)
    return along, sides[along], sides[up], sides[right]


class Layout(NamedTuple):
    """How a volume is stored and sliced.

    Attributes:
        orientation: Directions of the stored axes, such as ``LPS``.
        axis: Axis of the slices, counted in the canonical orientation.
        place: ``(4, 4)`` affine of the volume in the canonical orientation.
    """

    orientation: str
    axis: int
    place: np.ndarray

    def matches(self, other: "Layout") -> bool:
        """Whether slices of the same number show the same places, as far as the headers tell.

        Volumes that are stored alike are taken to: many masks lack the place of their image.
        """
        if self.axis != other.axis:
            return False
        voxel = np.abs(self.place[:3, :3]).max()
        alike = np.allclose(self.place, other.place, rtol=0, atol=voxel / 2)
        return self.orientation == other.orientation or alike

    def __str__(self) -> str:
        return f"{self.orientation}, slices along axis {self.axis}"


def layout(source: Source) -> Layout:
    """How a volume is stored and sliced."""
    import nibabel as nib

    header = _header(source)
    letters = "".join(nib.orientations.ornt2axcodes(header.orientation))
    to_stored = nib.orientations.inv_ornt_aff(header.orientation, header.shape[:3])
    return Layout(letters, header.axis, header.affine @ to_stored)


def describe(source: Source) -> Description:
    """Describe a volume by its header."""
    header = _header(source)
    along, frames, height, width = _plane(header, source.path)
    right, up = (one for one in range(3) if one != along)
    spacing = header.spacing
    return Description(
        "NIfTI",
        frames,
        height,
        width,
        header.bands,
        header.out_dtype.name,
        ("red", "green", "blue", "alpha")[: header.bands] if header.dtype.names else (),
        spacing=(spacing[up], spacing[right], spacing[along]),
        group=source.path,
        volume=source.path,
        acquisition={
            **({"series": header.words} if header.words else {}),
            "bit depth": str(8 * header.stored_dtype.itemsize),
            "size": f"{width} x {height}",
        },
        # the first slice of a volume often shows nothing
        default_frame=frames // 2,
    )


def read(source: Source, frame: int) -> RawImage:
    """Read a slice."""
    header = _header(source)
    along, frames, _, _ = _plane(header, source.path)
    check_frame(frame, frames, source.path)
    volume = volumes.get(source.key and ("nifti", *source.key), lambda: _canonical(source, header))
    pixels = np.rot90(volume.take(frame, axis=along))
    values = rescale(native(pixels), header.slope, header.intercept, header.out_dtype)
    return RawImage(np.ascontiguousarray(values))


def _canonical(source: Source, header: _Header) -> tuple[np.ndarray, int]:
    """The volume ``(X, Y, Z, C)`` as stored but in canonical orientation, and its bytes."""
    import nibabel as nib

    count = math.prod(header.shape) * header.dtype.itemsize
    if source.start[:2] == _GZIP:
        source.file.seek(0)
        # no more than the header says, whatever else the file decompresses to
        with converting(source.path), gzip.GzipFile(fileobj=source.file) as file:
            data = file.read(header.offset + count)[header.offset :]
    else:
        data = source.read(header.offset, count)
    if len(data) < count:
        raise ValueError(f"{source.path}: cut short")
    volume = np.frombuffer(data, header.dtype).reshape(header.shape, order="F")
    if header.dtype.names:
        volume = np.stack([volume[name] for name in header.dtype.names], axis=-1)
    volume = volume.reshape(*header.shape[:3], header.bands, order="F")
    with converting(source.path):
        return nib.orientations.apply_orientation(volume, header.orientation), count


def write_masks(path: str, masks: Mapping[int, np.ndarray], file: Path) -> None:
    """Write masks of the slices of a volume as a NIfTI volume at the same place in space.

    Args:
        path: The volume that the masks are of; its affine, shape and orientation are kept.
        masks: ``(H, W)`` uint8 by the number of the slice; others are filled with 0.
        file: File to write; compressed.
    """
    import nibabel as nib

    with Source(path) as source:
        header = _header(source)
        start = source.start
    along = header.axis
    volume = np.zeros(header.sides, np.uint8)
    for number, mask in masks.items():
        place: list[slice | int] = [slice(None)] * 3
        place[along] = number
        volume[tuple(place)] = np.rot90(mask, -1)
    canonical = nib.orientations.axcodes2ornt("RAS")
    back = nib.orientations.ornt_transform(canonical, header.orientation)
    stored = nib.orientations.apply_orientation(volume, back).reshape(header.shape[:3])
    if start[:2] == _GZIP:
        start = zlib.decompressobj(31).decompress(start, _HEADER_2)
    # of NIfTI-1, the codes of the affine and the units of the voxels are kept, too
    first = start[344:348] == b"n+1\0"
    original = nib.Nifti1Header(start[:_HEADER_1], check=False) if first else None
    image = nib.Nifti1Image(stored, header.affine, original)
    image.header.set_data_dtype(np.uint8)
    image.header.set_slope_inter(1, 0)
    image.header["descrip"] = b"classes"
    file.write_bytes(gzip.compress(image.to_bytes(), mtime=0))
