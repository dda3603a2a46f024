import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from tests.data.formats.making import noise, npy
from vissl_lite.data.formats import RawImage, arrays, describe, read_raw


@pytest.mark.parametrize(
    ("shape", "frames", "size"),
    [
        ((20, 30), 1, (20, 30, 1)),
        ((20, 30, 4), 1, (20, 30, 4)),
        ((4, 20, 30), 1, (20, 30, 4)),
        ((16, 20, 16), 1, (16, 20, 16)),  # in doubt the last axis is the bands
        ((25, 20, 30), 25, (20, 30, 1)),
        ((5, 20, 30, 3), 5, (20, 30, 3)),
        ((5, 3, 20, 30), 5, (20, 30, 3)),
        ((3, 20, 30, 1), 3, (20, 30, 1)),
    ],
)
@pytest.mark.parametrize("name", ["a.npy", "a.npz", "fortran.npy"])
def test_axes(
    shape: tuple[int, ...], frames: int, size: tuple[int, int, int], name: str, tmp_path: Path
) -> None:
    array = noise(*shape, dtype=np.float32)
    file = tmp_path / name
    if name == "a.npz":
        np.savez_compressed(file, array)
    else:
        np.save(file, np.asfortranarray(array) if name == "fortran.npy" else array)
    found = describe(file)
    assert (found.frames, (found.height, found.width, found.bands)) == (frames, size)
    images = array if frames > 1 or len(shape) == 4 else array[None]
    for number, image in enumerate(images):
        image = image[..., None] if image.ndim == 2 else image
        image = image if image.shape == size else image.transpose(1, 2, 0)
        np.testing.assert_array_equal(read_raw(f"{file}#{number}").pixels, image)


def test_types(tmp_path: Path) -> None:
    for stored, read in (("bool", "uint8"), ("float16", "float32"), (">u2", "uint16")):
        file = tmp_path / "a.npy"
        np.save(file, noise(5, 6, high=2).astype(stored))
        raw = read_raw(file).pixels
        assert raw.dtype == describe(file).dtype == read
        assert raw.dtype.isnative
        np.testing.assert_array_equal(raw[..., 0], noise(5, 6, high=2))


def test_a_frame_alone_keeps_what_is_known_of_it(tmp_path: Path) -> None:
    image = RawImage(noise(5, 6, 2), -1.0, (40.0, 400.0), ("red", "nir"))
    data = arrays.encode(image)
    (tmp_path / "a.npz").write_bytes(data)
    raw = read_raw(tmp_path / "a.npz")
    np.testing.assert_array_equal(raw.pixels, image.pixels)
    assert raw[1:] == image[1:]
    assert arrays.encode(image) == data


def test_a_frame_alone_may_be_a_photograph_or_a_slice(tmp_path: Path) -> None:
    image = RawImage(noise(5, 6, 3, dtype=np.uint8, high=256))
    data = arrays.encode(image)
    for name, content in (
        ("plain", data),
        ("photo", arrays.encode(image, photograph=True)),
        ("slice", arrays.with_volume(data, "a/scan")),
    ):
        file = tmp_path / f"{name}.npz"
        file.write_bytes(content)
        np.testing.assert_array_equal(read_raw(file).pixels, image.pixels)
        found = describe(file)
        assert found.is_photograph == (name == "photo")
        assert found.volume == ("a/scan" if name == "slice" else None)


def test_a_frame_of_many_bands_is_no_stack(tmp_path: Path) -> None:
    image = RawImage(noise(20, 30, 40))
    (tmp_path / "a.npz").write_bytes(arrays.encode(image))
    np.testing.assert_array_equal(read_raw(tmp_path / "a.npz").pixels, image.pixels)
    assert describe(tmp_path / "a.npz").frames == 1


def test_the_array_of_an_archive(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    np.savez(file, labels=np.arange(5), images=noise(5, 20, 30, 1))
    assert describe(file).frames == 5
    np.savez(file, one=noise(20, 30), two=noise(20, 30))
    with pytest.raises(ValueError, match="it holds the arrays one, two"):
        describe(file)


# Hostile files


def header(text: str) -> bytes:
    return b"\x93NUMPY\x01\0" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    "data",
    [
        npy(np.array([[{}]], object)),
        npy(np.zeros((3, 3), complex)),
        npy(np.zeros((3, 3), "U5")),
        npy(np.zeros(30)),
        npy(np.zeros((0, 30))),
        npy(noise(20, 30))[:-1],
        header("{'descr': '<u2', 'fortran_order': False, 'shape': (100000, 100000), }\n"),
        header("{'descr': '<u2', 'fortran_order': False, 'shape': (1000000000, 9, 9, 3), }\n"),
        header("__import__('os').abort()"),
    ],
)
def test_what_is_no_image_is_broken(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("arr_0.npy", data)
    for name in ("a.npy", "a.npz"):
        for read in (describe, read_raw):
            with pytest.raises(ValueError, match=f"{name}: "):
                read(tmp_path / name)


def test_a_zip_bomb(tmp_path: Path) -> None:
    out = BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", npy(np.zeros((100, 100), np.uint8)) + bytes(1_000_000))
    data = bytearray(out.getvalue())
    at = data.index(b"PK\x01\x02") + 24  # its size, as the central directory has it
    data[at : at + 4] = (4_000_000_000).to_bytes(4, "little")
    (tmp_path / "a.npz").write_bytes(bytes(data))
    with pytest.raises(ValueError, match="contradict"):
        describe(tmp_path / "a.npz")
