import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from tests.data.formats.making import noise, tiff
from vissl_lite.data import formats
from vissl_lite.data.formats import describe, image_size, read_raw, write_masks
from vissl_lite.errors import UserError

BANDS = noise(33, 47, 12, dtype=np.int16, low=-500, high=9000)


def write(data: bytes, file: Path) -> str:
    file.write_bytes(data)
    return str(file)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rowsperstrip": 5},
        {"byteorder": ">"},
        {"bigtiff": True},
        {"compression": "zlib", "predictor": 2},
        {"compression": "lzw", "rowsperstrip": 7},
        {"compression": "zstd"},
        {"tile": (16, 32)},
        {"tile": (16, 16), "compression": "zlib"},
    ],
)
@pytest.mark.parametrize("planar", [False, True])
def test_many_bands(options: dict[str, Any], planar: bool, tmp_path: Path) -> None:
    stored = BANDS.transpose(2, 0, 1) if planar else BANDS
    config = "separate" if planar else "contig"
    file = write(tiff(stored, planarconfig=config, **options), tmp_path / "a.tif")
    raw = read_raw(file)
    np.testing.assert_array_equal(raw.pixels, BANDS)
    assert raw.pixels.dtype == np.int16
    found = describe(file)
    assert (found.height, found.width, found.bands, found.dtype) == (33, 47, 12, "int16")
    assert found.frames == 1
    assert image_size(file) == (33, 47)


@pytest.mark.parametrize("dtype", ["uint16", "int32", "uint32", "float32", "float64", "int8"])
@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}])
def test_one_band_of_any_type(dtype: str, options: dict[str, Any], tmp_path: Path) -> None:
    pixels = noise(20, 30, dtype=dtype, high=100)
    file = write(tiff(pixels, **options), tmp_path / "a.tif")
    raw = read_raw(file).pixels
    np.testing.assert_array_equal(raw[..., 0], pixels)
    assert raw.dtype == describe(file).dtype == dtype


def test_packed_twelve_bits(tmp_path: Path) -> None:
    imagecodecs = pytest.importorskip("imagecodecs")
    values = noise(8, 16, high=4096)
    packed = imagecodecs.packints_encode(values, 12)
    made = tiff(np.frombuffer(packed, np.uint8).reshape(8, 24))
    # the tags are those of bytes: twice the bits and two thirds of the width make values of them
    with tifffile.TiffFile(write(made, tmp_path / "bytes.tif")) as file:
        tags = file.pages[0].tags
        data = bytearray(made)
        for code, value in ((256, 16), (258, 12)):
            at = tags[code].offset + 8
            data[at : at + 2] = value.to_bytes(2, "little")
    raw = read_raw(write(bytes(data), tmp_path / "a.tif"))
    np.testing.assert_array_equal(raw.pixels[..., 0], values)


def test_pages_are_frames_and_thumbnails_are_not(tmp_path: Path) -> None:
    stack = noise(3, 20, 30)
    file = tmp_path / "a.tif"
    with tifffile.TiffWriter(file) as out:
        for number, page in enumerate(stack):
            out.write(page, metadata=None, compression="zlib")
            if number == 0:
                out.write(page[::2, ::2], metadata=None, subfiletype=1)
    found = describe(f"{file}#2")
    assert (found.frames, found.position, found.group) == (3, 2.0, str(file))
    for number, page in enumerate(stack):
        np.testing.assert_array_equal(read_raw(f"{file}#{number}").pixels[..., 0], page)
    np.testing.assert_array_equal(read_raw(file).pixels[..., 0], stack[0])
    with pytest.raises(ValueError, match="3 frames, numbered from 0, and none is 3"):
        read_raw(f"{file}#3")


def test_eight_bit_pages_are_photographs(tmp_path: Path) -> None:
    first, second = (Image.fromarray(noise(9, 7, 3, dtype=np.uint8, high=256) // n) for n in (1, 2))
    first.save(tmp_path / "a.tif", save_all=True, append_images=[second])
    raw = read_raw(f"{tmp_path}/a.tif#1")
    np.testing.assert_array_equal(raw.pixels, np.asarray(second))
    assert describe(tmp_path / "a.tif").bands == 3


def test_a_page_is_read_without_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = [Image.fromarray(noise(9, 7, 3, dtype=np.uint8, high=256) // n) for n in (1, 2, 3)]
    file = tmp_path / "a.tif"
    for compression in (None, "tiff_lzw"):
        pages[0].save(file, save_all=True, append_images=pages[1:], compression=compression)
        monkeypatch.setattr(formats, "read_regular", lambda path: pytest.fail(f"{path} is read"))
        for number, page in enumerate(pages):
            np.testing.assert_array_equal(read_raw(f"{file}#{number}").pixels, np.asarray(page))


def test_an_eight_bit_stack_behind_one_page_has_all_its_images(tmp_path: Path) -> None:
    stack = noise(5, 9, 7, dtype=np.uint8, high=256)
    file = tmp_path / "a.tif"
    tifffile.imwrite(file, stack, imagej=True, truncate=True, metadata={"axes": "ZYX"})
    found = describe(file)
    assert (found.frames, found.bands, found.dtype) == (5, 1, "uint8")
    for number, image in enumerate(stack):
        np.testing.assert_array_equal(read_raw(f"{file}#{number}").pixels[..., 0], image)


@pytest.mark.parametrize("placed", [True, False])
def test_alpha_is_a_band_of_a_geotiff_alone(placed: bool, tmp_path: Path) -> None:
    """GDAL tags the fourth of four 8-bit bands as alpha, also if it is near infrared."""
    pixels = noise(9, 7, 4, dtype=np.uint8, high=256)
    tags = [(33550, 12, 3, (10.0, 10.0, 0.0), True), (34735, 3, 4, (1, 1, 0, 0), True)]
    data = tiff(pixels, photometric="rgb", extrasamples=[2], extratags=tags if placed else [])
    file = write(data, tmp_path / "a.tif")
    raw = read_raw(file)
    assert describe(file).bands == raw.pixels.shape[2] == (4 if placed else 3)
    if placed:
        np.testing.assert_array_equal(raw.pixels, pixels)
        assert raw.band_names == ("red", "green", "blue", "alpha")
    else:
        assert (raw.pixels >= 255 - pixels[..., 3:].astype(int)).all()  # laid over white


def test_four_bands_of_eight_bits_without_alpha_stay(tmp_path: Path) -> None:
    pixels = noise(9, 7, 4, dtype=np.uint8, high=256)
    file = write(tiff(pixels, photometric="rgb", extrasamples=[0]), tmp_path / "a.tif")
    raw = read_raw(file)
    np.testing.assert_array_equal(raw.pixels, pixels)
    assert raw.band_names == ("red", "green", "blue", "")


@pytest.mark.parametrize("kind", ["imagej", "ome"])
def test_channels_by_metadata_are_bands(kind: str, tmp_path: Path) -> None:
    stack = noise(4, 2, 20, 30)  # depth, channels
    options: dict[str, Any] = {"metadata": {"axes": "ZCYX", "spacing": 0.5, "unit": "um"}}
    if kind == "ome":
        options = {"metadata": {"axes": "ZCYX", "Channel": {"Name": ["DAPI", "GFP"]}}}
    file = tmp_path / ("a.ome.tif" if kind == "ome" else "a.tif")
    imagej = kind == "imagej"
    resolution = {"resolution": (10.0, 5.0)} if imagej else {}
    tifffile.imwrite(file, stack, imagej=imagej, ome=kind == "ome", **options, **resolution)
    found = describe(file)
    assert (found.frames, found.bands) == (4, 2)
    for number in range(4):
        raw = read_raw(f"{file}#{number}")
        np.testing.assert_array_equal(raw.pixels, stack[number].transpose(1, 2, 0))
    if imagej:
        assert found.spacing == pytest.approx((0.2e-3, 0.1e-3, 0.5e-3))
    else:
        assert found.band_names == ("dapi", "gfp")


def test_geotiff_nodata_and_band_names(tmp_path: Path) -> None:
    names = "".join(
        f'<Item name="DESCRIPTION" sample="{n}" role="description">{name}</Item>'
        for n, name in enumerate(["Red", "NIR"])
    )
    tags = [
        (42113, "s", 0, "-9999", True),
        (42112, "s", 0, f"<GDALMetadata>{names}</GDALMetadata>", True),
    ]
    pixels = BANDS[..., :2]
    file = write(tiff(pixels, extratags=tags), tmp_path / "a.tif")
    assert read_raw(file)[1:] == (-9999.0, None, ("red", "nir"))
    assert describe(file).nodata == -9999.0


def test_a_turned_and_a_white_is_zero_tiff(tmp_path: Path) -> None:
    pixels = noise(20, 30)
    turned = tiff(pixels, extratags=[(274, "H", 1, 6, True)])
    file = write(turned, tmp_path / "a.tif")
    np.testing.assert_array_equal(read_raw(file).pixels[..., 0], np.rot90(pixels, -1))
    assert image_size(file) == (30, 20)
    file = write(tiff(pixels, photometric="miniswhite"), tmp_path / "b.tif")
    np.testing.assert_array_equal(read_raw(file).pixels[..., 0], 65535 - pixels)


def test_without_tifffile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow and OpenCV read usual files, and other ones name the extra."""
    monkeypatch.setitem(sys.modules, "tifffile", None)
    gray, color = noise(20, 30), noise(20, 30, 3)
    for number, pixels in enumerate((gray, gray.astype(np.float32), color, BANDS)):
        plain = write(tiff(pixels), tmp_path / f"{number}.tif")
        np.testing.assert_array_equal(np.squeeze(read_raw(plain).pixels), pixels)
    for pixels in (gray, color):
        options = {"photometric": "rgb"} if pixels is color else {}
        file = write(tiff(pixels, compression="lzw", **options), tmp_path / "lzw.tif")
        np.testing.assert_array_equal(np.squeeze(read_raw(file).pixels), pixels)
    file = write(tiff(BANDS, compression="zlib"), tmp_path / "many.tif")
    with pytest.raises(
        UserError, match=r'many.tif needs tifffile.*pip install "vissl-lite\[tiff\]"'
    ):
        read_raw(file)


def test_a_mask_keeps_the_place_of_a_geotiff(tmp_path: Path) -> None:
    tags = [(33550, 12, 3, (10.0, 10.0, 0.0), True), (34735, 3, 4, (1, 1, 0, 0), True)]
    path = str(tmp_path / "scene.tif")
    tifffile.imwrite(path, np.zeros((4, 6, 5), np.int16), extratags=tags, planarconfig="contig")
    mask = np.arange(24, dtype=np.uint8).reshape(4, 6)
    file = write_masks(path, {0: mask}, tmp_path / "masks.tif")
    assert file is not None
    with tifffile.TiffFile(file) as written:
        page = written.pages[0]
        assert (page.asarray() == mask).all()
        assert page.tags[33550].value == (10.0, 10.0, 0.0)
        assert page.tags[34735].value == (1, 1, 0, 0)
    tifffile.imwrite(path, np.zeros((4, 6, 5), np.int16), planarconfig="contig")
    assert write_masks(path, {0: mask}, tmp_path / "none.tif") is None
