"""Files that are cut short or damaged; ``tests/faults/fuzz_images.py`` tries thousands."""

import gzip
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from pydicom.uid import JPEGLSLossless, RLELossless

from tests.data.formats.making import dicom, nifti, noise, npy, tiff
from vissl_lite.data.formats import describe, read_raw
from vissl_lite.data.images import BROKEN_IMAGE, read_image

STACK = noise(24, 20, 4, dtype=np.int16)
FILES = {
    "plain.tif": tiff(STACK),
    "zlib.tif": tiff(STACK, compression="zlib", tile=(16, 16)),
    "plain.dcm": dicom(STACK[..., 0].copy()),
    "rle.dcm": dicom(STACK[..., 0].astype(np.uint16), RLELossless),
    "jls.dcm": dicom(STACK[..., 0].astype(np.uint16), JPEGLSLossless),
    "a.nii": nifti(STACK),
    "a.nii.gz": gzip.compress(nifti(STACK)),
    "a.npy": npy(STACK),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_short_is_broken(name: str, tmp_path: Path) -> None:
    file, data = tmp_path / name, FILES[name]
    for length in (0, 3, 8, 130, 200, len(data) // 2, len(data) - 20):
        file.write_bytes(data[:length])
        with pytest.raises(BROKEN_IMAGE):
            read_image(file)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_gives_an_image_or_is_broken(name: str, tmp_path: Path) -> None:
    file, random = tmp_path / name, np.random.default_rng(0)
    for _ in range(25):
        data = bytearray(FILES[name])
        for at in random.integers(0, min(len(data), 400), 3):
            data[at] = random.integers(256)
        file.write_bytes(bytes(data))
        for read in (describe, read_raw, read_image):
            with suppress(*BROKEN_IMAGE):
                read(file)


def test_a_tag_of_two_billion_strips(tmp_path: Path) -> None:
    data = bytearray(tiff(STACK))
    at = data.index((273).to_bytes(2, "little"), 8)  # StripOffsets
    data[at + 4 : at + 8] = (1 << 31).to_bytes(4, "little")
    (tmp_path / "a.tif").write_bytes(bytes(data))
    with pytest.raises(ValueError, match="tag 273 has 2147483648 values"):
        read_raw(tmp_path / "a.tif")
