"""Mutated image files through all that reads images: an array, or one of ``BROKEN_IMAGE``.

Run in a process of its own, which has a limit on its memory: ``python -m tests.faults.fuzz_images
EXAMPLES``. Nothing but the last line is printed if all is well.
"""

import gzip
import importlib
import os
import resource
import sys
import time
import warnings
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

from tests.data.formats import making
from vissl_lite.data.formats import RawImage, arrays, image_header, image_size
from vissl_lite.data.images import BROKEN_IMAGE, read_image
from vissl_lite.data.reading import limit_pixels
from vissl_lite.errors import UserError
from vissl_lite.transfer.segmentation.mask_source import read_mask

# What an image may take here: a GiB holds no image of the default limit with its copies.
PIXELS, SECONDS, MEMORY = 4_000_000, 1.0, 1 << 30

# The first bytes hold the sizes: most mutations go there.
HEADER = 256


def seeds() -> list[bytes]:
    """A small file of each kind."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "camera"
    rgb, rgba = Image.fromarray(pixels[..., :3]), Image.fromarray(pixels)
    kinds: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (rgb, "JPEG", {"exif": exif, "icc_profile": bytes(300)}),
        (rgb, "JPEG", {"progressive": True}),
        (rgb.convert("CMYK"), "JPEG", {}),
        (rgb.convert("L"), "JPEG", {}),
        (rgb, "PNG", {"exif": exif}),
        (rgba, "PNG", {}),
        (rgb.quantize(8), "PNG", {"transparency": 0}),
        (Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), "PNG", {}),
        (rgb.convert("1"), "PNG", {}),
        (rgb.quantize(8), "GIF", {"save_all": True, "append_images": [rgb.quantize(4)]}),
        (rgb, "TIFF", {"exif": exif}),
        (rgb, "TIFF", {"compression": "tiff_lzw"}),
        (rgb, "TIFF", {"compression": "jpeg"}),
        (rgba, "TIFF", {"compression": "tiff_adobe_deflate"}),
        (Image.fromarray(pixels[..., 0].astype(np.float32)), "TIFF", {}),
        (rgb, "TIFF", {"big_tiff": True}),
        (rgb, "WEBP", {"exif": exif}),
        (rgba, "WEBP", {"lossless": True}),
        (rgb, "WEBP", {"save_all": True, "append_images": [rgba]}),
        (rgb, "BMP", {}),
        (rgb.quantize(8), "BMP", {}),
        (rgb, "AVIF", {}),
        (rgb, "JPEG2000", {}),
        (rgba, "JPEG2000", {"no_jp2": True}),
        (rgb, "PPM", {}),
        (rgb.convert("1"), "PPM", {}),
    ]
    files = []
    for image, kind, options in kinds:
        out = BytesIO()
        image.save(out, kind, **options)
        files.append(out.getvalue())
    # 16-bit color, which Pillow does not know, in strips
    written, coded = cv2.imencode(".tif", pixels[..., :3].astype(np.uint16) * 257)
    assert written
    pgm = b"P5 40 24 4095\n" + (pixels[..., 0].astype(">u2") * 16).tobytes()
    deep = pixels.astype(np.uint16) * 16
    gray = deep[..., 0]
    others = [
        making.tiff(deep.astype(np.int16)),
        making.tiff(np.concatenate([deep, deep], axis=2), compression="zlib", predictor=2),
        making.tiff(
            deep.transpose(2, 0, 1), planarconfig="separate", tile=(16, 16), compression="lzw"
        ),
        making.tiff(np.stack([gray] * 3), imagej=True),
        making.dicom(gray, WindowCenter=900, WindowWidth=1000, RescaleSlope=2, RescaleIntercept=-1),
        making.dicom(np.stack([gray] * 2), RLELossless),
        making.dicom(gray, JPEGLSLossless),
        making.dicom(pixels[..., 0].copy(), JPEG2000Lossless),
        making.nifti(np.stack([gray.T] * 3, axis=2)),
        gzip.compress(making.nifti(np.stack([gray.T] * 3, axis=2))),
        making.npy(deep),
        arrays.encode(RawImage(deep[..., :3], 0.0, (100.0, 50.0))),
    ]
    return [*files, coded.tobytes(), pgm, *others]


@st.composite
def mutated(draw: st.DrawFn, files: list[bytes]) -> bytes:
    """A file of which some bytes are others, missing, twice there, or all by chance."""
    data = bytearray(draw(st.sampled_from(files)))
    how = draw(st.integers(0, 9))
    if how == 0:
        return bytes(data[: draw(st.integers(0, len(data)))])
    if how == 1:  # a signature, then anything
        return bytes(data[: draw(st.integers(2, 40))]) + draw(st.binary(max_size=400))
    for _ in range(draw(st.integers(1, 6))):
        near = draw(st.booleans())
        at = draw(st.integers(0, min(HEADER, len(data) - 1) if near else len(data) - 1))
        value = draw(st.sampled_from([b"\0", b"\xff", b"\x7f", b"\x80", b"\xff\xff", b"\0\0\0\0",
                                      b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f",
                                      b"\xff\xd8", b"\xff\xc0"]) | st.binary(min_size=1, max_size=8)
                     )  # fmt: skip
        data[at : at + (0 if how == 2 else len(value))] = value
    if how == 3:
        del data[draw(st.integers(0, len(data))) :]
    return bytes(data)


def main(examples: int) -> int:
    limit_pixels(PIXELS)
    files = seeds()
    for name in ("gdcm", "imagecodecs", "openjpeg", "pylibjpeg"):
        with suppress(ImportError):  # a damaged file may be the first to need a decoder
            importlib.import_module(name)
    with TemporaryDirectory() as place:
        file = Path(place) / "a.jpg"
        for data in files:  # the good ones are read, and all libraries are loaded
            file.write_bytes(data)
            assert read_image(file).shape in ((24, 40, 3), (40, 24, 3))
            image_size(str(file))
        with open("/proc/self/statm") as status:
            taken = int(status.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
        seen = {"read": 0, "broken": 0}
        slowest = 0.0

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @seed(0)
        @given(mutated(files))
        def check(data: bytes) -> None:
            nonlocal slowest
            file.write_bytes(data)
            for read in (read_image, image_size, image_header, read_mask):
                started = time.monotonic()
                try:
                    found = read(str(file))
                except BROKEN_IMAGE:
                    seen["broken"] += 1
                except UserError:
                    assert read is read_mask
                else:
                    seen["read"] += 1
                    if read is read_image:
                        assert found.dtype == np.uint8
                        assert found.ndim == 3
                        assert found.shape[2] == 3
                        assert 0 < found.shape[0] * found.shape[1] <= PIXELS
                taken = time.monotonic() - started
                slowest = max(slowest, taken)
                assert taken < SECONDS, f"{read.__name__} took {taken:.2f} s"

        check()
    print(f"{examples} files: {seen}, {slowest:.2f} s at most")
    return 0


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main(int(sys.argv[1])))
