import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from tests.data.formats.making import dataset, dicom, noise, saved
from vissl_lite.data.formats import NoImageError, describe, read_raw
from vissl_lite.errors import UserError


def write(data: bytes, folder: Path, name: str = "a.dcm") -> str:
    (folder / name).write_bytes(data)
    return str(folder / name)


@pytest.mark.parametrize("syntax", [None, RLELossless, JPEGLSLossless, JPEG2000Lossless])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_compressions(syntax: str | None, dtype: str, tmp_path: Path) -> None:
    pixels = noise(24, 40, dtype=dtype, high=256 if dtype == "uint8" else 4096)
    file = write(dicom(pixels, syntax), tmp_path)
    raw = read_raw(file).pixels
    np.testing.assert_array_equal(raw[..., 0], pixels)
    assert raw.dtype == describe(file).dtype == dtype


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_other_encodings(syntax: str, tmp_path: Path) -> None:
    pixels = noise(24, 40)
    stored = pixels.astype(">u2") if syntax == ExplicitVRBigEndian else pixels
    one = dataset(stored, RescaleIntercept=-1024, RescaleSlope=1)
    one.file_meta.TransferSyntaxUID = syntax
    file = write(saved(one), tmp_path)
    np.testing.assert_array_equal(read_raw(file).pixels[..., 0], pixels.astype(np.int32) - 1024)


def test_bits_stored_sign_and_overlay(tmp_path: Path) -> None:
    values = noise(8, 9, dtype=np.int16, low=-2048, high=2048)
    stored = (values & 0x0FFF) | 0x5000  # an overlay in the upper bits
    file = write(dicom(stored.astype(np.int16), BitsStored=12), tmp_path)
    np.testing.assert_array_equal(read_raw(file).pixels[..., 0], values)


@pytest.mark.parametrize(
    ("slope", "intercept", "dtype"),
    [(1, -1024, "int32"), (2, 0, "int32"), (0.5, 0, "float32"), (1, 0, "uint16")],
)
def test_rescaling(slope: float, intercept: float, dtype: str, tmp_path: Path) -> None:
    pixels = noise(8, 9, high=65536)
    file = write(dicom(pixels, RescaleSlope=slope, RescaleIntercept=intercept), tmp_path)
    raw = read_raw(file).pixels
    assert raw.dtype == describe(file).dtype == dtype
    np.testing.assert_array_equal(raw[..., 0], pixels * float(slope) + intercept)


def test_twelve_bits_with_hounsfield_units_are_int16(tmp_path: Path) -> None:
    file = write(
        dicom(noise(8, 9), BitsStored=12, RescaleSlope=1, RescaleIntercept=-1024), tmp_path
    )
    assert read_raw(file).pixels.dtype == describe(file).dtype == "int16"


def test_monochrome1_is_inverted_with_its_window_and_padding(tmp_path: Path) -> None:
    pixels = noise(8, 9)
    options = {"RescaleSlope": 1, "RescaleIntercept": -100, "PixelPaddingValue": 4000}
    plain = read_raw(
        write(dicom(pixels, BitsStored=12, WindowCenter=900, WindowWidth=50, **options), tmp_path)
    )
    other = read_raw(
        write(
            dicom(
                4095 - pixels, BitsStored=12, PhotometricInterpretation="MONOCHROME1",
                WindowCenter=4095 - 200 - 900, WindowWidth=50,
                **options | {"PixelPaddingValue": 95},
            ),
            tmp_path, "b.dcm",
        )
    )  # fmt: skip
    np.testing.assert_array_equal(other.pixels, plain.pixels)
    assert plain.window == other.window == (900.0, 50.0)
    assert plain.nodata == other.nodata == 3900.0


def test_a_modality_table(tmp_path: Path) -> None:
    table = Dataset()
    table.LUTDescriptor, table.ModalityLUTType = [4, 0, 16], "US"
    table.LUTData = np.array([7, 500, 9, 60000], np.uint16).tobytes()
    table["LUTData"].VR = "OW"
    pixels = np.array([[0, 1, 2, 3]] * 2, np.uint16)
    file = write(dicom(pixels, ModalityLUTSequence=Sequence([table])), tmp_path)
    np.testing.assert_array_equal(read_raw(file).pixels[0, :, 0], [7, 500, 9, 60000])


def test_color_and_palette(tmp_path: Path) -> None:
    color = noise(8, 9, 3, dtype=np.uint8, high=256)
    file = write(dicom(color), tmp_path)
    np.testing.assert_array_equal(read_raw(file).pixels, color)
    assert describe(file).bands == 3
    ramp = np.arange(256, dtype=np.uint8)
    palette: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for number, name in enumerate(("Red", "Green", "Blue")):
        palette[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 8]
        palette[f"{name}PaletteColorLookupTableData"] = np.roll(ramp, number).tobytes()
    indices = color[..., 0].copy()
    raw = read_raw(write(dicom(indices, **palette), tmp_path)).pixels
    np.testing.assert_array_equal(raw, np.stack([indices, indices - 1, indices - 2], axis=2))


@pytest.mark.parametrize("syntax", [None, RLELossless])
def test_frames(syntax: str | None, tmp_path: Path) -> None:
    stack = noise(3, 8, 9)
    file = write(dicom(stack, syntax), tmp_path)
    assert (describe(file).frames, describe(f"{file}#1").position) == (3, 1.0)
    for number in range(3):
        np.testing.assert_array_equal(read_raw(f"{file}#{number}").pixels[..., 0], stack[number])


def test_a_deflated_file(tmp_path: Path) -> None:
    one = dataset(noise(8, 9))
    one.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    file = write(saved(one), tmp_path)
    np.testing.assert_array_equal(read_raw(file).pixels[..., 0], noise(8, 9))


def test_what_the_header_says(tmp_path: Path) -> None:
    file = write(
        dicom(
            noise(8, 9), SeriesDescription="T1", PixelSpacing=[0.5, 0.75], SpacingBetweenSlices=6,
            ImagePositionPatient=[1, 2, -30], ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
        ),
        tmp_path, "scan",
    )  # fmt: skip
    found = describe(file)
    assert (found.group, found.volume, found.position) == ("P1", "1.2.3.4", -30.0)
    assert found.spacing == (0.5, 0.75, 6.0)
    assert found.acquisition["maker"] == "Maker"
    assert found.acquisition["series"] == "T1"
    assert found.acquisition["bit depth"] == "16"
    anonymous = write(dicom(noise(8, 9), PatientID=""), tmp_path)
    assert describe(anonymous).group == "1.2.3"


def test_a_data_set_without_preamble(tmp_path: Path) -> None:
    content = dicom(noise(8, 9))
    start = content.index(b"\x08\x00\x16\x00")  # behind the file meta information
    file = write(content[start:], tmp_path)
    np.testing.assert_array_equal(read_raw(file).pixels[..., 0], noise(8, 9))


def test_objects_without_pixels(tmp_path: Path) -> None:
    one = dataset(noise(8, 9))
    for name in ("PixelData", "Rows", "Columns"):
        del one[name]
    with pytest.raises(NoImageError, match="without pixels"):
        describe(write(saved(one), tmp_path))


def test_a_missing_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(dicom(noise(8, 9)), tmp_path)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UserError, match=r'needs pydicom.*pip install "vissl-lite\[dicom\]"'):
        read_raw(file)


# Hostile files


def test_a_billion_frames(tmp_path: Path) -> None:
    for syntax in (None, RLELossless):
        one = dataset(noise(8, 9))
        if syntax is not None:
            one.compress(syntax)
        one.NumberOfFrames = 10**9
        with pytest.raises(ValueError, match="1000000000 frames"):
            describe(write(saved(one), tmp_path))


def test_a_deflated_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vissl_lite.data.formats.dicom.max_bytes", lambda: 1 << 20)
    monkeypatch.setattr("vissl_lite.data.formats.common.max_bytes", lambda: 1 << 20)
    one = dataset(noise(8, 9))
    one.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    content = saved(one)
    start = content.index(b"1.2.840.10008.1.2.1.99") + 22
    while content[start : start + 2] == b"\x02\0" or content[start : start + 1] == b"\0":
        start += (
            1
            if content[start] == 0
            else 8 + int.from_bytes(content[start + 6 : start + 8], "little")
        )
    bomb = zlib.compressobj(wbits=-15)
    data = content[:start] + bomb.compress(bytes(2 << 20)) + bomb.flush()
    with pytest.raises(ValueError, match="more than 1048576"):
        describe(write(data, tmp_path))


def test_a_codestream_larger_than_its_header_says(tmp_path: Path) -> None:
    content = bytearray(dicom(noise(24, 40, dtype=np.uint8, high=256), JPEG2000Lossless))
    at = content.index(b"\xff\x4f\xff\x51") + 8
    content[at : at + 8] = (60_000).to_bytes(4, "big") * 2
    with pytest.raises(ValueError, match="60000 x 60000"):
        read_raw(write(bytes(content), tmp_path))
