"""DICOM images (PS3.5, PS3.10), read by pydicom.

Values are those after the modality LUT or rescaling (PS3.3, C.11.1), in Hounsfield units for
example. MONOCHROME1 is inverted, palettes and YBR become RGB. The window of a file is reported and
not applied.
"""

import math
import zlib
from collections.abc import Sequence
from io import BytesIO
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from vissl_lite.data.formats.common import (
    DICOM_SUFFIXES,
    Description,
    NoImageError,
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
from vissl_lite.data.headers import codestream_size
from vissl_lite.data.reading import max_bytes

# The prefix stands behind a preamble of 128 bytes (PS3.10, 7.1).
PREFIX_END = 132
_PREFIX = b"DICM"

_DEFLATED = "1.2.840.10008.1.2.1.99"
_EXPLICIT = "1.2.840.10008.1.2.1"
_RLE = "1.2.840.10008.1.2.5"
_DICOMDIR = "1.2.840.10008.1.3.10"
_PIXELS = {(0x7FE0, 0x0008): 32, (0x7FE0, 0x0009): 64, (0x7FE0, 0x0010): 0}
_UNDEFINED = 0xFFFFFFFF
_MAX_META = 100  # elements of the file meta information
_ITEM_BYTES = 8  # of the header of a fragment

_TAGS = [
    "SOPClassUID", "Modality", "Manufacturer", "ManufacturerModelName", "SeriesDescription",
    "PatientID", "StudyInstanceUID", "SeriesInstanceUID", "InstanceNumber", "ProtocolName",
    "ImagePositionPatient", "ImageOrientationPatient", "SliceThickness", "SpacingBetweenSlices",
    "SequenceName", "MagneticFieldStrength", "KVP", "BodyPartExamined", "ViewPosition",
    "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "Rows",
    "Columns", "PixelSpacing", "ImagerPixelSpacing", "BitsAllocated", "BitsStored", "HighBit",
    "PixelRepresentation", "PixelPaddingValue", "WindowCenter", "WindowWidth", "RescaleSlope",
    "RescaleIntercept", "ModalityLUTSequence", "RedPaletteColorLookupTableDescriptor",
    "GreenPaletteColorLookupTableDescriptor", "BluePaletteColorLookupTableDescriptor",
    "RedPaletteColorLookupTableData", "GreenPaletteColorLookupTableData",
    "BluePaletteColorLookupTableData", "SegmentedRedPaletteColorLookupTableData",
    "SegmentedGreenPaletteColorLookupTableData", "SegmentedBluePaletteColorLookupTableData",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
    "ExtendedOffsetTable", "ExtendedOffsetTableLengths",
]  # fmt: skip

# Attributes that become the acquisition, by its keys.
_ACQUISITION = {
    "modality": "Modality",
    "maker": "Manufacturer",
    "model": "ManufacturerModelName",
    "series": "SeriesDescription",
    "protocol": "ProtocolName",
    "sequence": "SequenceName",
    "field strength": "MagneticFieldStrength",
    "kVp": "KVP",
    "body part": "BodyPartExamined",
    "view": "ViewPosition",
    "slice thickness": "SliceThickness",
}


def is_dicom(start: bytes) -> bool:
    """Whether a file begins as a DICOM file."""
    return start[128:PREFIX_END] == _PREFIX


def may_be_dicom(start: bytes, name: str) -> bool:
    """Whether a file may be a DICOM data set without preamble, by its name and first group."""
    named = any(name.lower().endswith(suffix) for suffix in DICOM_SUFFIXES)
    return named and start[:2] in (b"\x08\0", b"\x02\0")


class _Header(NamedTuple):
    """Header of a DICOM image.

    Attributes:
        dataset: Its attributes.
        inflated: Content of the file with its data set decompressed, if that is deflated.
        syntax: UID of the transfer syntax.
        frames: Number of frames.
        size: Height, width and number of samples.
        bits: Number of bits that are allocated and stored.
        signed: Whether values are stored in two's complement.
        float_bits: 32 or 64 if pixels are floating-point numbers; else 0.
        pixels_at: Where the pixels begin, in bytes.
        pixel_bytes: Number of their bytes; None if they are compressed.
        big_endian: Byte order of the pixels.
    """

    dataset: Any
    inflated: bytes | None
    syntax: str
    frames: int
    size: tuple[int, int, int]
    bits: tuple[int, int]
    signed: bool
    float_bits: int
    pixels_at: int
    pixel_bytes: int | None
    big_endian: bool

    def open(self, source: Source) -> BinaryIO:
        """The file that the pixels are read from."""
        return source.file if self.inflated is None else BytesIO(self.inflated)

    @property
    def photometric(self) -> str:
        return str(_get(self.dataset, "PhotometricInterpretation", ""))

    @property
    def bounds(self) -> tuple[int, int]:
        """The smallest and the largest value that can be stored."""
        stored = self.bits[1]
        half = 1 << (stored - 1)
        return (-half, half - 1) if self.signed else (0, 2 * half - 1)


def _get(dataset: Any, name: str, default: Any = None) -> Any:
    value = dataset.get(name, default)
    return default if value is None or value == "" else value


def _real(value: Any, default: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return default
    return number if math.isfinite(number) else default


def _header(source: Source) -> _Header:
    """Read the header; that of a file of many frames is kept."""
    key = source.key and ("dicom", *source.key)
    kept: _Header | None = volumes.peek(key)
    if kept is not None:
        return kept
    header = _read_header(source)
    if header.frames == 1:
        return header
    # the size of Python's objects is estimated
    return volumes.get(key, lambda: (header, 10 * header.pixels_at))


def _read_header(source: Source) -> _Header:
    try:
        import pydicom
    except ImportError:
        raise missing_extra(source.path, "pydicom", "dicom") from None
    forced = not is_dicom(source.start)
    with converting(source.path):
        file, inflated = source.file, None
        meta = _FileMeta("", "", 0) if forced else _file_meta(source)
        size = source.size
        if meta.syntax == _DEFLATED:
            inflated = _inflated(source, meta.end)
            file, size = BytesIO(inflated), len(inflated)
        if meta.kind == _DICOMDIR:
            raise NoImageError(f"{source.path}: a DICOMDIR holds no image")
        file.seek(0)
        dataset = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=_TAGS, force=forced)
        pixels_at = file.tell()
        big = dataset.original_encoding[1] is False
        start = file.read(12)
        order = "big" if big else "little"
        tag = (int.from_bytes(start[:2], order), int.from_bytes(start[2:4], order))  # type: ignore[arg-type]
        float_bits = _PIXELS.get(tag)
        if float_bits is None:
            if not forced and "Rows" in dataset:
                raise ValueError("cut short, or without pixels")
            raise NoImageError(f"{source.path}: a DICOM object without pixels")
        height, width = int(_get(dataset, "Rows", 0)), int(_get(dataset, "Columns", 0))
        samples = int(_get(dataset, "SamplesPerPixel", 1))
        frames = int(_get(dataset, "NumberOfFrames", 1))
        allocated = float_bits or int(_get(dataset, "BitsAllocated", 0))
        stored = float_bits or int(_get(dataset, "BitsStored", allocated))
        signed = bool(int(_get(dataset, "PixelRepresentation", 0)))
        if samples not in (1, 3) or not 0 < stored <= allocated <= 64 or frames < 1:
            raise ValueError(
                f"{frames} frames of {samples} samples of {stored} in {allocated} bits"
            )
    itemsize = max(1, allocated // 8)
    check_size(height, width, samples, itemsize, source.path)
    explicit = start[4:6] in (b"OB", b"OW", b"OF", b"OD", b"UN")
    length = int.from_bytes(start[8:12] if explicit else start[4:8], order)  # type: ignore[arg-type]
    pixels_at += 12 if explicit else 8
    # every frame takes a fragment with a header of its own, or all its bits
    least = _ITEM_BYTES if length == _UNDEFINED else height * width * samples * allocated // 8
    if frames * least > size:
        raise ValueError(f"{source.path}: cut short: {frames} frames in {size} bytes")
    return _Header(
        dataset,
        inflated,
        meta.syntax,
        frames,
        (height, width, samples),
        (allocated, stored),
        signed,
        float_bits,
        pixels_at,
        None if length == _UNDEFINED else min(length, size - pixels_at),
        big,
    )


class _FileMeta(NamedTuple):
    """The file meta information, group 2.

    Attributes:
        syntax: UID of the transfer syntax.
        kind: UID of the class of what is stored.
        end: Where the data set begins, in bytes.
    """

    syntax: str
    kind: str
    end: int


def _file_meta(source: Source) -> _FileMeta:
    """Read the file meta information by hand: what follows may be a bomb (PS3.10, 7.1)."""
    at, found = PREFIX_END, {}
    for _ in range(_MAX_META):
        head = source.read(at, min(12, source.size - at))
        if head[:2] != b"\x02\0" or len(head) < 8:
            break
        long = head[4:6] in (b"OB", b"OW", b"UN", b"SQ", b"UT", b"UC", b"UR")
        start = at + (12 if long else 8)
        length = int.from_bytes(head[8:12] if long else head[6:8], "little")
        number = int.from_bytes(head[2:4], "little")
        if number in (0x0002, 0x0010):
            found[number] = source.read(start, length).rstrip(b"\0 ").decode("ascii", "replace")
        at = start + length
    return _FileMeta(found.get(0x0010, ""), found.get(0x0002, ""), at)


def _inflated(source: Source, at: int) -> bytes:
    """A deflated file with its data set decompressed, no larger than allowed (PS3.5, A.5).

    Args:
        source: The file.
        at: Where the data set begins.
    """
    from pydicom.dataset import FileMetaDataset
    from pydicom.filewriter import write_file_meta_info
    from pydicom.uid import UID

    reader = zlib.decompressobj(-zlib.MAX_WBITS)
    most = max_bytes()
    content = reader.decompress(source.read(at, source.size - at), most + 1)
    check_bytes(len(content), source.path)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = UID(_EXPLICIT)
    out = BytesIO()
    out.write(bytes(128) + _PREFIX)
    write_file_meta_info(out, meta, enforce_standard=False)
    out.write(content)
    return out.getvalue()


# Functional groups of multi-frame objects (PS3.3, C.7.6.16)


def _macro(dataset: Any, frame: int, sequence: str) -> Any | None:
    """An item of a functional group, shared by all frames or of one frame."""
    for groups, at in (
        ("SharedFunctionalGroupsSequence", 0),
        ("PerFrameFunctionalGroupsSequence", frame),
    ):
        items = _get(dataset, groups) or ()
        if at < len(items):
            found = _get(items[at], sequence)
            if found:
                return found[0]
    return None


def _scale(dataset: Any, frame: int) -> tuple[float, float]:
    """Slope and intercept of a frame."""
    item = _macro(dataset, frame, "PixelValueTransformationSequence")
    item = dataset if item is None or "RescaleSlope" not in item else item
    slope = _real(_get(item, "RescaleSlope"), 1.0)
    return slope or 1.0, _real(_get(item, "RescaleIntercept"), 0.0)


def _window(dataset: Any, frame: int) -> tuple[float, float] | None:
    """Center and width of the first window of a frame."""
    item = _macro(dataset, frame, "FrameVOILUTSequence")
    item = dataset if item is None else item

    def first(name: str) -> float:
        value = _get(item, name)
        if isinstance(value, Sequence) and not isinstance(value, str):
            value = value[0] if value else None
        return _real(value, math.nan)

    center, width = first("WindowCenter"), first("WindowWidth")
    return (center, width) if width > 0 and not math.isnan(center) else None


def _numbers(value: Any, count: int) -> tuple[float, ...] | None:
    """So many finite numbers; None if there are others."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != count:
        return None
    numbers = tuple(_real(one, math.nan) for one in value)
    return None if any(map(math.isnan, numbers)) else numbers


def _spacing(dataset: Any) -> tuple[float, ...] | None:
    measures = _macro(dataset, 0, "PixelMeasuresSequence")
    item = dataset if measures is None else measures
    sides = _numbers(_get(item, "PixelSpacing"), 2)
    sides = sides or _numbers(_get(dataset, "ImagerPixelSpacing"), 2)
    if sides is None:
        return None
    between = _real(_get(item, "SpacingBetweenSlices", _get(item, "SliceThickness")), 0.0)
    return (*sides, between) if between > 0 else sides


def _position(dataset: Any) -> float | None:
    """The position along the normal of the slice (PS3.3, C.7.6.2.1.1), else InstanceNumber."""
    place = _numbers(_get(dataset, "ImagePositionPatient"), 3)
    sides = _numbers(_get(dataset, "ImageOrientationPatient"), 6)
    if place is not None and sides is not None:
        return float(np.cross(sides[:3], sides[3:]) @ np.array(place))
    number = _real(_get(dataset, "InstanceNumber"), math.nan)
    return None if math.isnan(number) else number


def _dtype(header: _Header) -> np.dtype[np.generic]:
    """The dtype of the values that are returned, by the header alone."""
    dataset = header.dataset
    if header.float_bits:
        return np.dtype(np.float32 if header.float_bits == 32 else np.float64)
    if header.photometric == "PALETTE COLOR":
        descriptor = _get(dataset, "RedPaletteColorLookupTableDescriptor", (0, 0, 8))
        return np.dtype(np.uint8 if int(descriptor[2]) <= 8 else np.uint16)
    if header.size[2] == 3:
        return np.dtype(np.uint8 if header.bits[0] <= 8 else np.uint16)
    if _get(dataset, "ModalityLUTSequence"):
        return np.dtype(np.uint16)
    scales = {_scale(dataset, frame) for frame in range(min(header.frames, 10_000))}
    dtypes = [rescaled_dtype(*header.bounds, *scale) for scale in scales]
    return np.result_type(*dtypes)


def describe(source: Source) -> Description:
    """Describe a file by its attributes.

    Raises:
        NoImageError: It is a DICOM object without pixels.
    """
    header = _header(source)
    dataset = header.dataset
    with converting(source.path):
        height, width, samples = header.size
        color = samples == 3 or header.photometric == "PALETTE COLOR"
        acquisition = {
            key: str(value).strip()
            for key, name in _ACQUISITION.items()
            if (value := _get(dataset, name)) is not None
        }
        acquisition |= {"bit depth": str(header.bits[1]), "size": f"{width} x {height}"}
        patient = str(_get(dataset, "PatientID", "")).strip()
        study = str(_get(dataset, "StudyInstanceUID", "")).strip()
        series = str(_get(dataset, "SeriesInstanceUID", "")).strip()
        several = source.path if header.frames > 1 else None
        return Description(
            "DICOM",
            header.frames,
            height,
            width,
            3 if color else 1,
            _dtype(header).name,
            ("red", "green", "blue") if color else (),
            None if color else _padding(header, 0),
            _spacing(dataset),
            patient or study or several,
            series or several,
            _position(dataset),
            {key: value for key, value in acquisition.items() if value},
        )


def _padding(header: _Header, frame: int) -> float | None:
    """The value of pixels outside of the image (PS3.3, C.7.5.1.1.2), as it is returned."""
    value = _get(header.dataset, "PixelPaddingValue")
    if value is None or _get(header.dataset, "ModalityLUTSequence"):
        return None
    stored = int(value)
    if header.signed and stored > header.bounds[1]:  # read as unsigned
        stored -= 1 << header.bits[1]
    slope, intercept = _scale(header.dataset, frame)
    found = stored * slope + intercept
    return _mirror(header, slope, intercept) - found if _is_inverted(header) else found


def _is_inverted(header: _Header) -> bool:
    return header.photometric == "MONOCHROME1" and not header.float_bits


def _mirror(header: _Header, slope: float, intercept: float) -> float:
    """The sum of a value and of the one that it is inverted to."""
    low, high = header.bounds
    return (low + high) * slope + 2 * intercept


def read(source: Source, frame: int) -> RawImage:
    """Read a frame.

    Raises:
        NoImageError: It is a DICOM object without pixels.
    """
    header = _header(source)
    check_frame(frame, header.frames, source.path)
    with converting(source.path):
        dtype = _dtype(header)
        pixels = _decoded(source, header, frame)
        if pixels.shape[:2] != header.size[:2]:
            raise ValueError(f"its pixels have the shape {pixels.shape}")
        if pixels.ndim == 3:
            return RawImage(
                np.ascontiguousarray(native(pixels)[..., :3]),
                None,
                None,
                ("red", "green", "blue"),
            )
        window = _window(header.dataset, frame)
        slope, intercept = _scale(header.dataset, frame)
        if _get(header.dataset, "ModalityLUTSequence"):
            from pydicom.pixels import apply_modality_lut

            values = native(np.asarray(apply_modality_lut(pixels, header.dataset)))
            values = values.astype(dtype)
        elif header.float_bits:
            values = native(pixels)
        else:
            values = rescale(_without_overlays(native(pixels), header), slope, intercept, dtype)
        if _is_inverted(header):
            mirror = _mirror(header, slope, intercept)
            if _get(header.dataset, "ModalityLUTSequence"):
                table = header.dataset.ModalityLUTSequence[0]
                mirror = float((1 << int(table.LUTDescriptor[2])) - 1)
            if dtype.kind == "f":
                values = (mirror - values).astype(dtype)
            else:
                values = (int(mirror) - values.astype(np.int64)).astype(dtype)
            window = window and (mirror - window[0], window[1])
        return RawImage(np.ascontiguousarray(values[..., None]), _padding(header, frame), window)


def _decoded(source: Source, header: _Header, frame: int) -> np.ndarray:
    """``(H, W)`` or ``(H, W, 3)`` of a frame; only its own bytes are read."""
    from pydicom.pixels import apply_color_lut, pixel_array

    height, width, samples = header.size
    file = header.open(source)
    size = height * width * header.bits[0] // 8
    # the usual case by hand: pydicom would parse the file anew
    if samples == 1 and header.bits[0] in (8, 16, 32, 64) and header.pixel_bytes is not None:
        if (frame + 1) * size > header.pixel_bytes:
            raise ValueError("cut short")
        file.seek(header.pixels_at + frame * size)
        kind = "f" if header.float_bits else "i" if header.signed else "u"
        dtype = np.dtype(f"{'>' if header.big_endian else '<'}{kind}{header.bits[0] // 8}")
        pixels = np.frombuffer(file.read(size), dtype).reshape(height, width)
    else:
        _check_codestream(source, header, frame)
        file.seek(0)
        options: dict[str, Any] = {} if header.syntax else {"transfer_syntax_uid": _syntax(header)}
        pixels = pixel_array(file, index=frame, **options)
    if header.photometric == "PALETTE COLOR":
        return np.asarray(apply_color_lut(pixels, header.dataset))
    return pixels


def _syntax(header: _Header) -> str:
    """The transfer syntax of a file that does not name it."""
    implicit, little = header.dataset.original_encoding
    if implicit:
        return "1.2.840.10008.1.2"
    return _EXPLICIT if little else "1.2.840.10008.1.2.2"


def _without_overlays(pixels: np.ndarray, header: _Header) -> np.ndarray:
    """Clear the bits above those that are stored, which older files use for overlays."""
    stored = header.bits[1]
    high = int(_get(header.dataset, "HighBit", stored - 1))
    unused = 8 * pixels.dtype.itemsize - stored
    if pixels.dtype.kind not in "iu" or unused <= 0 or high != stored - 1:
        return pixels
    signed = np.dtype(f"{'i' if header.signed else 'u'}{pixels.dtype.itemsize}")
    return (pixels.astype(signed, copy=False) << unused) >> unused


def _check_codestream(source: Source, header: _Header, frame: int) -> None:
    """Check the size that a compressed frame states itself: a decoder makes room for it."""
    from pydicom.encaps import get_frame
    from pydicom.pixels import get_decoder
    from pydicom.uid import UID

    if not header.syntax or header.syntax == _RLE or not UID(header.syntax).is_encapsulated:
        return
    decoder = get_decoder(UID(header.syntax))
    if not decoder.is_available:
        name = UID(header.syntax).name
        raise missing_extra(source.path, f"a decoder of {name}", "dicom")
    file = header.open(source)
    file.seek(header.pixels_at)
    data = get_frame(file, frame, number_of_frames=header.frames)
    size = codestream_size(data)
    if size is not None and size != header.size[:2]:
        raise ValueError(f"{source.path}: a frame of {size[1]} x {size[0]} pixels in its header")
