"""AVIF, JPEG 2000, the PPM family and HEIC."""

import base64
import struct
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vissl_lite.data import headers
from vissl_lite.data.formats import image_size
from vissl_lite.data.images import find_images, read_image
from vissl_lite.data.reading import MAX_PIXELS, limit_pixels

RED, BLUE = (200, 40, 20), (30, 60, 220)

# 32 x 48 pixels, the left half RED and the right half BLUE, as x265 writes them.
HEIC = base64.b64decode(
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAX1tZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAA"
    "AAAAAAAAAAACJpbG9jAAAAAERAAAEAAQAAAAABoQABAAAAAAAAAKoAAAAjaWluZgAAAAAAAQAAABVpbmZlAgAAAAAB"
    "AABodmMxAAAAAA5waXRtAAAAAAABAAAA/WlwcnAAAADdaXBjbwAAAHZodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADw"
    "NgAAEAGEABDAH//wNwAAADAJAAAAMAAAMAHroCQGEAAQAqQgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbq5Ka5uAhoMCAA"
    "AAMDIAAAAwAhYgABAAZEAcFzwIkAAAATY29scm5jbHgAAQANAAaAAAAAFGlzcGUAAAAAAAAAQAAAAEAAAAAoY2xhcA"
    "AAADAAAAABAAAAIAAAAAH////wAAAAAv///+AAAAACAAAAEHBpeGkAAAAAAwgICAAAABhpcG1hAAAAAAAAAAEAAQWB"
    "AgMFhAAAALJtZGF0AAAApigBrwY4Wve238Vgf//3/z6H9F/AIfBJN+YZ778/SP/8U2ijysCXpOsV64grNU7/A8wvl+"
    "Bu/uSL/g95/bMB9Tdhz2xVIeChY95/apNuhsajZh4282k2xO8yUFUaHHWgY8Yjw2IQMvwrEGcaZ8ht7CzKGXFafA+e"
    "Iq+q39bb3zHtoALJkz8i3IUfskv2VPw8kCrlAE1JbJNxZZtEmesUfPrbm7q/03A="
)


def halves() -> Image.Image:
    image = np.empty((32, 48, 3), np.uint8)
    image[:, :24], image[:, 24:] = RED, BLUE
    return Image.fromarray(image)


def saved(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    out = BytesIO()
    halves().convert(mode).save(out, kind, **options)
    return out.getvalue()


FILES = {
    "a.avif": saved("AVIF", quality=95),
    "a.jp2": saved("JPEG2000"),
    "b.jp2": saved("JPEG2000", "RGBA"),
    "a.j2k": saved("JPEG2000", no_jp2=True),
    "a.jpx": saved("JPEG2000"),
    "a.ppm": saved("PPM"),
    "a.pnm": saved("PPM"),
    "plain.ppm": b"P3 48 32 255 " + b" ".join(b"%d" % v for v in np.asarray(halves()).ravel()),
    "a.heic": HEIC,
    "a.heif": HEIC,
}


def write(data: bytes, file: Path) -> Path:
    file.write_bytes(data)
    return file


@pytest.mark.parametrize("name", FILES)
def test_each_format_is_found_and_read(name: str, tmp_path: Path) -> None:
    file = write(FILES[name], tmp_path / name)
    assert find_images([tmp_path]) == [str(file)]
    image = read_image(file)
    assert image.dtype == np.uint8
    assert image.shape == (32, 48, 3)
    assert image_size(str(file)) == (32, 48)
    off = np.abs(image.astype(int) - np.asarray(halves()))[:, [2, 10, 40, 46]]
    assert off.max() < 25


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_cut_short_are_broken(name: str, tmp_path: Path) -> None:
    data = FILES[name]
    for length in (20, len(data) // 2, len(data) - 10):
        file = write(data[:length], tmp_path / name)
        with pytest.raises((OSError, ValueError, SyntaxError)):
            read_image(file)


@pytest.mark.parametrize("name", FILES)
def test_the_limit_on_pixels(name: str, tmp_path: Path) -> None:
    file = write(FILES[name], tmp_path / name)
    limit_pixels(32 * 48 - 1)
    try:
        for read in (read_image, image_size):
            with pytest.raises(ValueError, match="pixels, more than --max_pixels 1535"):
                read(str(file))
    finally:
        limit_pixels(MAX_PIXELS)


def test_orientation_of_an_avif(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = write(saved("AVIF", exif=exif), tmp_path / "a.avif")
    assert read_image(file).shape == (48, 32, 3)
    assert image_size(str(file)) == (48, 32)


def test_black_and_white(tmp_path: Path) -> None:
    file = write(b"P1 3 2 1 0 1  0 1 0", tmp_path / "a.pbm")
    expected = [[0, 255, 0], [255, 0, 255]]
    np.testing.assert_array_equal(read_image(file)[..., 0], expected)


@pytest.mark.parametrize(
    ("largest", "values", "expected"),
    [
        (65535, [0, 65535], [0, 255]),  # more than 8 bits are stretched
        (65535, [160, 4080], [0, 255]),
        (4095, [16, 32], [0, 255]),
        (1, [0, 1], [0, 255]),
        (100, [50, 100], [128, 255]),
    ],
)
@pytest.mark.parametrize("kind", [5, 6])
def test_other_largest_values(
    kind: int, largest: int, values: list[int], expected: list[int], tmp_path: Path
) -> None:
    pixels = np.repeat(np.array(values, ">u2" if largest > 255 else "u1"), 3 if kind == 6 else 1)
    head = b"P%d # by hand\n2\n# more\n1 %d\n" % (kind, largest)
    file = write(head + pixels.tobytes(), tmp_path / "a.pnm")
    np.testing.assert_array_equal(read_image(file)[0], np.repeat([expected], 3, 0).T)
    assert image_size(str(file)) == (1, 2)
    write(head + pixels.tobytes()[:-1], file)
    with pytest.raises(ValueError, match="cut short"):
        read_image(file)


# Files whose parts contradict each other


def siz(data: bytes, at: int, *values: int) -> bytes:
    """A JPEG 2000 file with other values in its marker SIZ, from the number ``at`` on."""
    start = data.index(b"\xff\x4f\xff\x51") + 8 + 4 * at
    return data[:start] + struct.pack(f">{len(values)}I", *values) + data[start + 4 * len(values) :]


@pytest.mark.parametrize("name", ["a.jp2", "a.j2k"])
def test_a_codestream_that_is_larger_than_its_header_says(name: str, tmp_path: Path) -> None:
    for change, message in (
        ((0, 50_000, 50_000), "2500000000 pixels, more than"),
        ((4, 0, 0), "its tiles have no size"),
        ((0, 9_000, 9_000, 0, 0, 1, 1), "81000000 tiles"),
    ):
        file = write(siz(FILES[name], *change), tmp_path / name)
        for read in (read_image, image_size):
            with pytest.raises(ValueError, match=message):
                read(str(file))


def test_a_heic_that_shows_a_small_part_of_a_large_image(tmp_path: Path) -> None:
    at = HEIC.index(b"ispe") + 8
    file = write(
        HEIC[:at] + struct.pack(">II", 15_000, 15_000) + HEIC[at + 8 :], tmp_path / "a.heic"
    )
    for read in (read_image, image_size):
        with pytest.raises(ValueError, match="225000000 pixels, more than"):
            read(str(file))


def test_heic_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    headers._knows_heif.cache_clear()
    try:
        file = write(HEIC, tmp_path / "a.heic")
        for read in (read_image, image_size):
            with pytest.raises(ValueError, match=r"pip install 'vissl-lite\[heic\]'"):
                read(str(file))
    finally:
        headers._knows_heif.cache_clear()


def test_what_macos_adds_to_archives_is_left_out(tmp_path: Path) -> None:
    for name in ("__MACOSX/a/._1.png", "__MACOSX/2.png", "a/__MACOSX/3.png", "a/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert find_images([tmp_path]) == [str(tmp_path / "a/1.png")]
