"""Small files that would decode to gigabytes, of all formats, and the limit that stops them."""

import os
import resource
import struct
import subprocess
import sys
import traceback
import zlib
from contextlib import suppress
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image

from vissl_lite.cli import main
from vissl_lite.data import reading
from vissl_lite.data.formats import image_size
from vissl_lite.data.images import BROKEN_IMAGE, read_image, resize_and_crop
from vissl_lite.data.reading import MAX_PIXELS, limit_pixels
from vissl_lite.data.workers import WorkerLoader

SIDE = 50_000


@pytest.fixture(autouse=True)
def usual_limit() -> Any:
    yield
    limit_pixels(MAX_PIXELS)


def saved(kind: str, mode: str = "RGB", **options: Any) -> bytes:
    out = BytesIO()
    Image.new("RGB", (16, 24), (200, 40, 20)).convert(mode).save(out, kind, **options)
    return out.getvalue()


def jpeg(width: int, height: int, marker: bytes = b"\xff\xc0", **options: Any) -> bytes:
    data = saved("JPEG", **options)
    at = data.index(marker)
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


def chunk(name: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
    )


def png(width: int, height: int, depth: int = 8, kind: int = 2, more: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    palette = chunk(b"PLTE", bytes(768)) if kind == 3 else b""
    pixels = chunk(b"IDAT", zlib.compress(bytes(100_000)))
    head = chunk(b"IHDR", header)
    return b"\x89PNG\r\n\x1a\n" + head + more + palette + pixels + chunk(b"IEND", b"")


def tiff(width: int, height: int, code: str = "I", **tags: int) -> bytes:
    """A TIFF without any pixels, whose compression is LZW."""
    known = {"bits": 258, "samples": 277, "rows": 278, "tile_width": 322, "tile_height": 323,
             "offsets": 324, "counts": 325}  # fmt: skip
    entries = {256: width, 257: height, 258: 8, 259: 5, 262: 1, 273: 8, 277: 1, 278: height, 279: 9}
    entries |= {known[name]: value for name, value in tags.items()}
    body = b"".join(
        struct.pack(f"<HH{code}", tag, 4 if code == "I" else 16, 1) + struct.pack(f"<{code}", value)
        for tag, value in sorted(entries.items())
    )
    if code == "Q":
        return b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, len(entries)) + body + bytes(8)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4)


def gif(width: int, height: int, left: int = 0) -> bytes:
    """A GIF; with ``left`` it is its frame that is large, and not its screen."""
    data = bytearray(saved("GIF", "P"))
    at = data.index(b"\x2c\0\0\0\0")
    if left:
        data[at + 1 : at + 5] = struct.pack("<HH", left, left)
        width = height = 10
    data[6:10] = struct.pack("<HH", width, height)
    data[at + 5 : at + 9] = struct.pack("<HH", width, height)
    return bytes(data)


def bmp(width: int, height: int) -> bytes:
    data = saved("BMP")
    return data[:18] + struct.pack("<ii", width, height) + data[26:]


def webp(width: int, height: int, kind: bytes) -> bytes:
    if kind == b"VP8X":
        flags = struct.pack("<I", 0x02)  # an animation: its canvas is made when it is opened
        sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        body = b"VP8X" + struct.pack("<I", 10) + flags + sides
        body += b"ANIM" + struct.pack("<I", 6) + bytes(6)
        frame = saved("WEBP")[12:]
        head = bytes(6) + (15).to_bytes(3, "little") + (23).to_bytes(3, "little") + bytes(4)
        body += b"ANMF" + struct.pack("<I", len(head + frame)) + head + frame
        return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body
    data = bytearray(saved("WEBP", lossless=kind == b"VP8L"))
    assert data[12:16] == kind
    if kind == b"VP8 ":
        data[26:30] = struct.pack("<HH", width, height)
    else:
        rest = int.from_bytes(data[21:25], "little") & ~0xFFFFFFF
        data[21:25] = (rest | (height - 1) << 14 | (width - 1)).to_bytes(4, "little")
    return bytes(data)


def avif(width: int, height: int) -> bytes:
    data = saved("AVIF")
    at = data.index(b"ispe")
    return data[: at + 8] + struct.pack(">II", width, height) + data[at + 16 :]


def jpeg_2000(width: int, height: int, **options: Any) -> bytes:
    data = saved("JPEG2000", **options)
    at = data.index(b"\xff\x4f\xff\x51") + 8
    return data[:at] + struct.pack(">II", width, height) + data[at + 8 :]


BOMBS = {
    "jpeg": jpeg(65_500, 65_500),
    "gray jpeg": jpeg(65_500, 65_500, mode="L"),
    "progressive jpeg": jpeg(65_500, 65_500, b"\xff\xc2", progressive=True),
    "cmyk jpeg": jpeg(65_500, 65_500, mode="CMYK"),
    # libjpeg passes over fill bytes and over what is between markers
    "jpeg with fill bytes": jpeg(SIDE, SIDE).replace(b"\xff\xc0", b"\xff\xff\xff\xc0", 1),
    "jpeg with bytes between markers": jpeg(SIDE, SIDE).replace(b"\xff\xc0", b"junk\xff\xc0", 1),
    "jpeg with markers that have no length": jpeg(SIDE, SIDE).replace(
        b"\xff\xc0", b"\xff\xd0\xff\x01\xff\xc0", 1
    ),
    "png": png(SIDE, SIDE),
    "gray png": png(30_000, 30_000, kind=0),
    "png with alpha": png(SIDE, SIDE, kind=6),
    "png with a palette": png(SIDE, SIDE, kind=3),
    "16-bit png": png(SIDE, SIDE, depth=16),
    "16-bit gray png": png(SIDE, SIDE, depth=16, kind=0),
    "black and white png": png(SIDE, SIDE, depth=1, kind=0),
    "png of one row": png(2**31 - 1, 1),
    "tiff": tiff(SIDE, SIDE),
    "bigtiff": tiff(SIDE, SIDE, "Q"),
    "16-bit color tiff": tiff(SIDE, SIDE, bits=16, samples=3),
    "tiff of one tile": tiff(10, 10, tile_width=SIDE, tile_height=SIDE, offsets=8, counts=9),
    "gif": gif(SIDE, SIDE),
    "gif with a large frame": gif(10, 10, left=SIDE),
    "bmp": bmp(SIDE, SIDE),
    "webp": webp(16_383, 16_383, b"VP8 "),
    "lossless webp": webp(16_383, 16_383, b"VP8L"),
    "animated webp": webp(1 << 16, 1 << 15, b"VP8X"),
    "avif": avif(15_000, 15_000),  # libavif has a limit of its own
    "jpeg 2000": jpeg_2000(SIDE, SIDE),
    "jpeg 2000 codestream": jpeg_2000(SIDE, SIDE, no_jp2=True),
    "ppm": b"P6 50000 50000 255\n" + bytes(1000),
    "12-bit pgm": b"P5 50000 50000 4095\n" + bytes(1000),
    "plain pbm": b"P1 50000 50000\n" + b"1 " * 1000,
}

IN_LITTLE_MEMORY = """
import os, resource, sys, time
from pathlib import Path
from vissl_lite.data.formats import image_header
from vissl_lite.data.fingerprints import fingerprints_of
from vissl_lite.data.formats import image_size
from vissl_lite.data.images import BROKEN_IMAGE, read_image
from vissl_lite.transfer.segmentation.mask_source import read_mask
from vissl_lite.errors import UserError
from PIL import Image
Image.init()
files = sorted(map(str, Path(sys.argv[1]).iterdir()))
few = [read_image(sys.argv[2]), image_size(sys.argv[2]), fingerprints_of([sys.argv[2]])]
taken = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (taken + (200 << 20),) * 2)
for file in files:
    for read in (read_image, image_size, image_header, read_mask):
        started = time.monotonic()
        try:
            read(file)
        except UserError as error:
            assert read is read_mask and "JPEG" in str(error), (file, error)
        except BROKEN_IMAGE as error:
            unknown = read is read_mask and "no image of a format" in str(error)
            assert unknown or "--max_pixels 178956970" in str(error), (file, error)
        else:
            raise AssertionError(f"{read.__name__} has read {file}")
        assert time.monotonic() - started < 1, (file, read)
assert len(fingerprints_of(files)) == 0
print("well", len(files))
"""


@pytest.mark.slow
def test_no_bomb_takes_more_than_200_megabytes_or_a_second(tmp_path: Path) -> None:
    (tmp_path / "bombs").mkdir()
    for name, data in BOMBS.items():
        assert len(data) < 10_000
        (tmp_path / "bombs" / f"{name}.jpg").write_bytes(data)
    good = tmp_path / "good.png"
    good.write_bytes(saved("PNG"))
    command = [sys.executable, "-c", IN_LITTLE_MEMORY, tmp_path / "bombs", good]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == f"well {len(BOMBS)}\n", done.stderr


CHUNKS = (
    chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(100 << 20))),
    chunk(b"iCCP", b"key\0\0" + zlib.compress(bytes(100 << 20))),
    b"".join([chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(1 << 20)))] * 100),
)


@pytest.mark.slow
def test_chunks_of_a_png_that_grow_when_they_are_unpacked(tmp_path: Path) -> None:
    """A fork has a limit on its memory: the process itself must go on."""
    files = []
    for number, (kind, more) in enumerate(product((2, 6), CHUNKS)):
        files.append(tmp_path / f"{number}.png")
        files[-1].write_bytes(png(16, 16, kind=kind, more=more))
    read_image(files[0])  # what reading loads is loaded
    child = os.fork()
    if not child:
        try:
            taken = int(Path("/proc/self/statm").read_text().split()[0])
            limit = taken * os.sysconf("SC_PAGE_SIZE") + (200 << 20)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            for file in files:
                with suppress(*BROKEN_IMAGE):
                    assert read_image(file).shape == (16, 16, 3)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.slow
def test_random_files_give_an_array_or_are_broken() -> None:
    """Within a second and a gibibyte each."""
    examples = 300
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.fuzz_images", str(examples)],
        capture_output=True, text=True, errors="replace", timeout=1200,
        cwd=Path(__file__).parents[2], env={**os.environ, "OPENCV_LOG_LEVEL": "OFF"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    assert f"{examples} files: " in done.stdout


# The limit


def test_an_image_at_the_limit_is_read_and_one_beyond_it_is_not(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "a.bmp", "a.gif", "a.webp", "a.tif"):
        Image.new("RGB", (30, 20)).save(tmp_path / name)
        limit_pixels(600)
        assert read_image(tmp_path / name).shape == (20, 30, 3)
        limit_pixels(599)
        message = "600 pixels, more than --max_pixels 599"
        with pytest.raises(ValueError, match=message):
            read_image(tmp_path / name)
        with pytest.raises(ValueError, match=message):
            image_size(str(tmp_path / name))


def test_a_reduced_jpeg_counts_as_it_is_stored(tmp_path: Path) -> None:
    Image.new("RGB", (160, 160)).save(tmp_path / "a.jpg")
    limit_pixels(160 * 160 - 1)
    with pytest.raises(ValueError, match="25600 pixels, more than"):
        read_image(tmp_path / "a.jpg", shortest=10)


def test_images_without_a_side_are_broken(tmp_path: Path) -> None:
    for name, data in (("a", jpeg(0, 10)), ("b", jpeg(10, 0)), ("c", png(0, 5))):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=" x "):
            read_image(tmp_path / name)


def test_a_limit_that_is_none(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for most in (0, -5, 2**30 + 1):
        assert main(["embed", "--encoder", "random:test_resnet", "--data", str(tmp_path), "--out",
                     str(tmp_path / "a.npz"), "--max_pixels", str(most)]) == 2  # fmt: skip
        assert f"--max_pixels {most} must be from 1 to 1073741824" in capsys.readouterr().err


@pytest.mark.parametrize("shape", [(1, 100_000), (100_000, 1)])
def test_a_line_of_pixels_does_not_grow_to_billions(shape: tuple[int, int]) -> None:
    line = np.zeros((*shape, 3), np.uint8)
    line[shape[0] // 2 - 1 : shape[0] // 2 + 1, shape[1] // 2 - 1 : shape[1] // 2 + 1] = 200
    image = resize_and_crop(line, 224)
    assert image.shape == (224, 224, 3)
    assert image.max() == 200


def test_a_long_image_is_resized_as_before() -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 300, 3), dtype=np.uint8)
    whole = cv2.resize(image, (960, 64), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(resize_and_crop(image, 64), whole[:, 448:512])


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_the_limit_reaches_data_workers(method: str, tmp_path: Path) -> None:
    limit_pixels(1234)
    loader = WorkerLoader(Limits(), max, 1, multiprocessing_context=method)
    assert [int(limit) for limit in loader] == [1234]


class Limits:
    """A data set of the limit that a worker has."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        return reading.max_pixels()


@pytest.mark.slow
def test_a_run_keeps_its_limit(photos: Path, tmp_path: Path) -> None:
    words = ["pretrain", "--data", photos, "--backbone", "test_resnet", "--image_size", 32,
             "--epochs", 1, "--num_workers", 1, "--max_pixels", 5000, "--out", tmp_path / "run",
             "--logger", "none"]  # fmt: skip
    Image.new("RGB", (80, 80)).save(photos / "large.png")
    try:
        assert main([str(word) for word in words]) == 0
    finally:
        (photos / "large.png").unlink()
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["max_pixels"] == 5000
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "large.png (6400 pixels, more than --max_pixels 5000)" in log
