import gzip
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from tests.data.formats.making import nifti, noise
from vissl_lite.data.formats import describe, read_raw, write_masks
from vissl_lite.data.reading import pixel_limit, slice_along
from vissl_lite.errors import UserError

VOXELS = noise(6, 7, 8, dtype=np.int16, low=-1000, high=1000)


def write(data: bytes, folder: Path, name: str = "a.nii") -> str:
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return str(folder / name)


@pytest.fixture
def sliced(axis: int | None) -> Iterator[None]:
    """Slices are taken along an axis."""
    with pixel_limit():
        slice_along(axis)
        yield


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("axis", [None, 0, 1, 2])
@pytest.mark.usefixtures("sliced")
def test_slices_along_each_axis(name: str, axis: int | None, tmp_path: Path) -> None:
    file = write(nifti(VOXELS), tmp_path, name)
    along = 2 if axis is None else axis
    found = describe(file)
    assert found.frames == VOXELS.shape[along]
    for number in (0, found.frames - 1):
        raw = read_raw(f"{file}#{number}").pixels
        np.testing.assert_array_equal(raw[..., 0], np.rot90(VOXELS.take(number, along)))
        assert raw.shape == (found.height, found.width, found.bands)
        assert raw.dtype == found.dtype == "int16"
    middle = read_raw(file).pixels
    np.testing.assert_array_equal(middle, read_raw(f"{file}#{found.frames // 2}").pixels)


def test_the_default_axis_is_that_of_the_largest_spacing(tmp_path: Path) -> None:
    file = write(nifti(VOXELS, np.diag([1, 5, 2, 1])), tmp_path)
    found = describe(f"{file}#3")
    assert (found.frames, found.spacing) == (7, (2.0, 1.0, 5.0))
    assert (found.group, found.volume, found.position) == (file, file, 3.0)


def test_other_orientations_become_canonical(tmp_path: Path) -> None:
    affine = np.array([[0, 0, -2, 9], [3, 0, 0, 1], [0, -1, 0, 5], [0, 0, 0, 1]], float)
    file = write(nifti(VOXELS, affine), tmp_path)
    canonical = np.asarray(nib.as_closest_canonical(nib.load(file)).dataobj)
    for number in range(canonical.shape[1]):  # 3 mm from back to front
        expected = np.rot90(canonical[:, number])
        np.testing.assert_array_equal(read_raw(f"{file}#{number}").pixels[..., 0], expected)


@pytest.mark.parametrize(
    ("slope", "intercept", "dtype"), [(1, -1024, "int32"), (0.5, 3, "float32"), (0, 0, "int16")]
)
def test_rescaling(slope: float, intercept: float, dtype: str, tmp_path: Path) -> None:
    file = write(nifti(VOXELS, scl_slope=slope, scl_inter=intercept), tmp_path)
    raw = read_raw(f"{file}#2").pixels
    assert raw.dtype == describe(file).dtype == dtype
    expected = np.rot90(np.asarray(nib.load(file).dataobj)[..., 2])
    np.testing.assert_allclose(raw[..., 0], expected)


def test_a_fourth_dimension_and_colors_are_bands(tmp_path: Path) -> None:
    many = noise(4, 5, 6, 3, dtype=np.float32)
    file = write(nifti(many), tmp_path)
    np.testing.assert_array_equal(read_raw(f"{file}#1").pixels, np.rot90(many[:, :, 1]))
    assert describe(file).bands == 3
    rgb = np.zeros((4, 5, 6), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    rgb["G"] = noise(4, 5, 6, dtype=np.uint8, high=256)
    file = write(nifti(rgb), tmp_path)
    raw = read_raw(f"{file}#5")
    np.testing.assert_array_equal(raw.pixels[..., 1], np.rot90(rgb["G"][..., 5]))
    assert raw.pixels.shape[2] == describe(file).bands == 3


def test_a_volume_is_decompressed_once_for_its_slices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    original = gzip.GzipFile

    def count(*args: Any, **options: Any) -> gzip.GzipFile:
        opened.append(args)
        return original(*args, **options)

    file = write(nifti(VOXELS), tmp_path, "b.nii.gz")
    monkeypatch.setattr("vissl_lite.data.formats.nifti.gzip.GzipFile", count)
    for number in range(8):
        read_raw(f"{file}#{number}")
    assert len(opened) == 1
    write(nifti(VOXELS[:, ::-1] + 1), tmp_path, "b.nii.gz")  # another volume of that name
    np.testing.assert_array_equal(
        read_raw(f"{file}#0").pixels[..., 0], np.rot90(VOXELS[:, ::-1, 0] + 1)
    )


def test_a_missing_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(UserError, match=r'needs nibabel.*pip install "vissl-lite\[nifti\]"'):
        read_raw(write(nifti(VOXELS), tmp_path, "c.nii.gz"))


# Hostile files


def test_a_bomb_is_decompressed_as_far_as_its_header_says(tmp_path: Path) -> None:
    file = tmp_path / "a.nii.gz"
    file.write_bytes(gzip.compress(nifti(VOXELS) + bytes(10_000_000)))
    assert read_raw(f"{file}#7").pixels.shape == (7, 6, 1)


@pytest.mark.parametrize(
    ("dim", "message"),
    [
        ([3, 30000, 30000, 30000, 1, 1, 1, 1], "more than"),
        ([3, 30000, 30000, 1, 1, 1, 1, 1], "more than --max_pixels|cut short"),
        ([3, 600, 700, 800, 1, 1, 1, 1], "cut short"),
        ([3, -5, 7, 8, 1, 1, 1, 1], "shape"),
        ([5, 2, 2, 2, 30000, 30000, 1, 1], "shape"),
    ],
)
def test_absurd_dimensions(dim: list[int], message: str, tmp_path: Path) -> None:
    for name in ("d.nii", "d.nii.gz"):
        file = write(nifti(VOXELS, dim=dim), tmp_path, name)
        for read in (describe, read_raw):
            with pytest.raises(ValueError, match=message):
                read(file)


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.usefixtures("sliced")
def test_masks_are_written_at_the_place_of_their_volume(tmp_path: Path, axis: int | None) -> None:
    """Turned and mirrored as it may be: each slice of the masks is that of the volume."""
    affine = np.array([[0, 2, 0, 5], [-1, 0, 0, 7], [0, 0, 3, -9], [0, 0, 0, 1]], float)
    values = np.random.default_rng(0).integers(0, 5, (4, 5, 6)).astype(np.int16)
    image = nib.Nifti1Image(values, affine)
    image.header.set_xyzt_units("mm")
    path = str(tmp_path / "scan.nii.gz")
    nib.save(image, path)
    count = describe(path).frames
    masks = {n: read_raw(f"{path}#{n}").pixels[..., 0].astype(np.uint8) for n in range(count)}
    file = write_masks(path, masks, tmp_path / "out" / "scan.nii.gz")
    assert file == tmp_path / "out" / "scan.nii.gz"
    written = nib.load(file)
    assert (np.asarray(written.dataobj) == values).all()
    assert np.allclose(written.affine, affine)
    assert written.header.get_xyzt_units()[0] == "mm"
    assert written.get_data_dtype() == np.uint8
    masks.pop(1)
    fewer = write_masks(path, masks, tmp_path / "out" / "fewer.nii.gz")
    assert not read_raw(f"{fewer}#1").pixels.any()
