from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import IFDRational

from vissl_lite.data.formats import image_size
from vissl_lite.data.headers import jpeg_header
from vissl_lite.data.images import BROKEN_IMAGE, read_image


def noise(height: int = 30, width: int = 50) -> Image.Image:
    random = np.random.default_rng(0)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("orientation", "order"), [*((number, b"MM") for number in range(10)), (1, b"II"), (6, b"II")]
)
def test_the_size_of_a_jpeg_is_that_of_the_image_as_it_is_shown(
    orientation: int, order: bytes, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif.endian = ">" if order == b"MM" else "<"
    exif[0x010F], exif[0x011A], exif[0x0112] = "a camera", IFDRational(72), orientation
    file = tmp_path / "a.jpg"
    noise().save(file, exif=exif)
    assert order in file.read_bytes()[:60]
    assert image_size(str(file)) == read_image(file).shape[:2]


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("a.jpg", "RGB", {"progressive": True}),
        ("a.jpg", "L", {}),
        ("a.jpg", "CMYK", {}),
        ("a.jpg", "RGB", {"icc_profile": bytes(9000)}),  # the size comes late
        ("a.png", "RGB", {}),
        ("a.png", "P", {}),
        ("a.png", "RGBA", {}),
        ("a.gif", "P", {}),
        ("a.webp", "RGB", {}),
        ("a.bmp", "RGB", {}),
        ("a.tif", "RGB", {}),
    ],
)
def test_the_size_of_each_format(
    name: str, mode: str, options: dict[str, Any], tmp_path: Path
) -> None:
    noise().convert(mode).save(tmp_path / name, **options)
    assert image_size(str(tmp_path / name)) == (30, 50) == read_image(tmp_path / name).shape[:2]


def test_sixteen_bits(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    assert cv2.imwrite(str(file), np.full((30, 50), 40000, np.uint16))
    assert image_size(str(file)) == (30, 50)


@pytest.mark.parametrize("suffix", [".webp", ".tif", ".png"])
def test_other_formats_lie_on_their_side_too(suffix: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = tmp_path / f"a{suffix}"
    noise().save(file, exif=exif)
    assert image_size(str(file)) == read_image(file).shape[:2] == (50, 30)


@pytest.mark.parametrize("content", [b"", b"no picture", b"\xff\xd8\xff", b"\xff\xd8" + bytes(99)])
def test_what_is_broken_has_no_size(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    file.write_bytes(content)
    with pytest.raises(BROKEN_IMAGE):
        image_size(str(file))
    with pytest.raises(BROKEN_IMAGE):
        image_size(str(tmp_path / "gone.jpg"))


def test_any_bytes_after_the_start_of_exif_data_do_no_harm() -> None:
    random = np.random.default_rng(0)
    frame = b"\xff\xc0\x00\x11\x08\x00\x1e\x00\x32\x03" + bytes(20)
    for _ in range(200):
        junk = b"Exif\0\0" + random.bytes(int(random.integers(0, 60)))
        data = b"\xff\xd8\xff\xe1" + (len(junk) + 2).to_bytes(2, "big") + junk + frame
        header = jpeg_header(data)
        assert header is not None
        assert {header.height, header.width} == {30, 50}
