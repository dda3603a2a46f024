"""Paths that name a frame, and all that finds and reads them."""

import gzip
import logging
from pathlib import Path

import numpy as np
import pytest

import vissl_lite
from tests.data.formats.making import dataset, dicom, nifti, noise, npy, saved, tiff
from vissl_lite.data.cache import plan_cache
from vissl_lite.data.fingerprints import fingerprints_of
from vissl_lite.data.formats import (
    image_size,
    read_raw,
    read_raw_content,
    split_path,
    split_suffix,
)
from vissl_lite.data.images import decode_image, find_images, read_content, read_image
from vissl_lite.data.reading import pixel_limit, slice_along
from vissl_lite.data.shards.index import find_shards
from vissl_lite.data.shards.stream import read_images
from vissl_lite.errors import UserError
from vissl_lite.transfer.sources.file_tree import FileTree


def test_splitting(tmp_path: Path) -> None:
    assert split_path("a/scan.nii.gz#17") == ("a/scan.nii.gz", 17)
    for path in ("a.tif", "a#b.tif", "a.tif#", "a.tif#-1", "a.tif#x", "#3", "a.tif#1234567890"):
        assert split_path(path) == (path, None)
    odd = tmp_path / "a.png#3"
    odd.write_bytes(b"")
    assert split_path(odd) == (str(odd), None)
    assert split_suffix("a/scan.nii.gz#17") == ("a/scan#17", ".nii.gz")
    assert split_suffix("a.b/c.TIF") == ("a.b/c", ".TIF")


@pytest.fixture
def volume(tmp_path: Path) -> str:
    """A folder with a photograph and a volume of three slices, which differ."""
    (tmp_path / "photo.tif").write_bytes(tiff(noise(9, 8, dtype=np.uint8, high=256)))
    voxels = noise(40, 30, 3) * np.array([1, 0, 1], np.uint16)
    voxels[:20, :, 1] = 500
    voxels[..., 2] = voxels[::-1, :, 2] // 2 + np.arange(40, dtype=np.uint16)[:, None] * 100
    (tmp_path / "scan.nii.gz").write_bytes(gzip.compress(nifti(voxels)))
    return str(tmp_path)


def test_slices_are_found_and_read(volume: str) -> None:
    slices = [f"{volume}/scan.nii.gz#{number}" for number in range(3)]
    paths = [f"{volume}/photo.tif", *slices]
    assert find_images([volume]) == paths
    with pixel_limit():
        slice_along(1)
        assert len(find_images([volume])) == 31
    assert find_images([f"{volume}/scan.nii.gz"]) == slices
    assert find_images([slices[1]]) == slices[1:2]
    Path(volume, "list.txt").write_text("scan.nii.gz#2\nphoto.tif\n")
    assert find_images([f"{volume}/list.txt"]) == [slices[2], paths[0]]
    Path(volume, "list.txt").write_text("gone.nii.gz#2\n")
    with pytest.raises(UserError, match="names 1 missing files"):
        find_images([f"{volume}/list.txt"])
    assert image_size(slices[1]) == (30, 40)
    tree = FileTree(Path(volume))
    assert [tree.absolute(path) for path in tree.images] == paths
    assert tree.image("scan#1") == tree.image("scan.nii.gz#1") == slices[1]
    assert tree.image("scan.nii.gz#7") is None


def test_slices_have_contents_fingerprints_and_sizes(volume: str, tmp_path: Path) -> None:
    slices = [f"{volume}/scan.nii.gz#{number}" for number in range(3)]
    for path in slices:
        alone = decode_image(read_content(path), path)
        np.testing.assert_array_equal(alone, read_image(path))
    prints = fingerprints_of([*slices, f"{volume}/gone.nii.gz#1"])
    assert prints.paths == slices
    assert len({one.tobytes() for one in prints.exact}) == 3
    plan = plan_cache(slices, 16, tmp_path, True)
    assert plan.wholes.tolist() == [[30, 40]] * 3


def test_shards_hold_slices_and_arrays_with_their_values(
    volume: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    Path(volume, "arrays").mkdir()
    Path(volume, "arrays", "x.npy").write_bytes(npy(noise(20, 30, 2)))
    out = tmp_path_factory.mktemp("shards")
    paths = find_images([volume])
    vissl_lite.shard(data=volume, out=str(out))
    shards = find_shards([str(out)])
    assert shards is not None
    found = {one.name: one.data for one in read_images(shards, np.arange(5))}
    assert sorted(name.rpartition("!")[2] for name in found) == [
        "arrays/x.frame.npz",
        "photo.tif",
        *(f"scan#{number}.frame.npz" for number in range(3)),
    ]
    for path in paths[1:]:
        stem = split_suffix(path)[0].removeprefix(f"{volume}/")
        data = next(data for name, data in found.items() if name.endswith(f"{stem}.frame.npz"))
        np.testing.assert_array_equal(read_raw_content(data, path).pixels, read_raw(path).pixels)


def test_a_dicom_series_is_sorted_and_other_objects_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    positions = {"IM1": 20, "IM2": -10, "IM3": 5, "1.2.840.4": 7}
    for name, position in positions.items():
        content = dicom(
            noise(8, 9),
            ImagePositionPatient=[0, 0, position],
            ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
            SeriesInstanceUID="1.9" if name == "IM3" else "1.8",
        )
        (tmp_path / name).write_bytes(content)
    report = dataset(noise(8, 9))
    for name in ("PixelData", "Rows", "Columns"):
        del report[name]
    (tmp_path / "IM0").write_bytes(saved(report))
    (tmp_path / "README").write_text("no image")
    with caplog.at_level(logging.WARNING):
        found = [Path(path).name for path in find_images([tmp_path])]
    assert found == ["IM2", "1.2.840.4", "IM1", "IM3"]
    assert "left out, as DICOM objects without an image: 1" in caplog.text
    tree = FileTree(tmp_path)
    assert tree.images == found
    assert tree.others == ["README"]
    (tmp_path / "photo.png").write_bytes(b"")  # beside other images nothing is looked for
    assert find_images([tmp_path]) == [str(tmp_path / "photo.png")]


def test_arrays_are_found_where_there_are_no_other_images(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for folder in ("a", "b"):
        (tmp_path / folder / "x.npy").write_bytes(npy(noise(3, 20, 30, 2)))
    (tmp_path / "b" / "photo.jpg").write_bytes(b"")
    expected = [*(f"a/x.npy#{number}" for number in range(3)), "b/photo.jpg"]
    assert find_images([tmp_path]) == [str(tmp_path / path) for path in expected]


def test_broken_files_stay_to_be_counted(tmp_path: Path) -> None:
    for name in ("a.dcm", "b.nii.gz", "c.tif"):
        (tmp_path / name).write_bytes(b"broken")
    assert len(find_images([tmp_path])) == 3
