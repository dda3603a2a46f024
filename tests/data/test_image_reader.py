import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from tests.data.formats.making import dicom, noise
from vissl_lite.data.formats import RawImage
from vissl_lite.data.image_reader import PHOTOGRAPHS, ImageReader, volume_range
from vissl_lite.data.images import read_image
from vissl_lite.data.stream import ViewDataset
from vissl_lite.data.views import Views, distorted_crop


def reader(bands: int = 2, **given: Any) -> ImageReader:
    values: dict[str, Any] = {
        "bands": tuple(range(bands)), "low": (0.0,) * bands, "high": (100.0,) * bands,
        "mean": (0.5,) * bands, "std": (0.25,) * bands,
    }  # fmt: skip
    return ImageReader(**values | given)


def test_photographs_are_read_as_before(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), pixels)
    assert (PHOTOGRAPHS.read(tmp_path / "a.png") == read_image(tmp_path / "a.png")).all()
    assert (PHOTOGRAPHS.channels, PHOTOGRAPHS.max_value) == (3, 255)


def test_bands_are_scaled_from_their_ranges() -> None:
    one = replace(reader(low=(-10.0, 0.0), high=(10.0, 1000.0)), bands=(2, 0))
    pixels = np.array([[[500, 7, 0], [-5, 7, 20], [2000, 7, -30]]], np.int16)
    scaled = one.scale(RawImage(pixels), "a.tif")
    assert scaled.dtype == np.uint16
    expected = np.array([[[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]]])
    assert scaled / 65535 == pytest.approx(expected, abs=1e-5)
    within = np.clip(pixels[..., [2, 0]], [-10, 0], [10, 1000])
    assert one.to_units(scaled) == pytest.approx(within, abs=0.01)


def test_pixels_without_data_get_the_mean() -> None:
    one = reader(1, mean=(0.25,), nodata=-9999.0)
    pixels = np.array([[[-9999.0], [np.nan], [100.0]]], np.float32)
    scaled = one.scale(RawImage(pixels), "a.tif")[..., 0] / 65535
    assert scaled.tolist() == [pytest.approx([0.25, 0.25, 1.0], abs=1e-4)]
    by_file = reader(1, mean=(0.25,)).scale(RawImage(pixels[:, ::2], nodata=100.0), "a.tif")
    assert (by_file[0, 1] / 65535).tolist() == pytest.approx([0.25], abs=1e-4)


def test_a_missing_band_makes_an_image_broken() -> None:
    with pytest.raises(ValueError, match=r"a.tif: it has 1 bands, and band 2 is needed"):
        reader().scale(RawImage(np.zeros((2, 2, 1), np.uint16)), "a.tif")


def test_a_range_of_each_volume(tmp_path: Path) -> None:
    """Volumes on scales of their own look alike; all slices of one share its range."""
    values = np.random.default_rng(0).random((6, 8, 8, 1)).astype(np.float32)
    values[0] /= 2
    for name, factor in (("a", 1.0), ("b", 500.0)):
        np.save(tmp_path / f"{name}.npy", values * factor)
    one = reader(1, scope="volume", low=(), high=())
    low, high = volume_range(one, f"{tmp_path}/b.npy#1")
    assert low[0] < 5
    assert 480 < high[0] <= 500
    dark, light = (one.read(f"{tmp_path}/a.npy#{number}") for number in (0, 1))
    assert dark.mean() < 0.6 * light.mean()
    assert one.read(f"{tmp_path}/b.npy#0").mean() == pytest.approx(dark.mean(), rel=1e-3)


def test_a_volume_that_is_replaced_has_another_range(tmp_path: Path) -> None:
    one = reader(1, scope="volume", low=(), high=())
    stack, series = tmp_path / "a.npy", tmp_path / "series"
    series.mkdir()
    for factor in (1, 50):
        np.save(stack, noise(6, 8, 8, 1, high=100) * factor)
        os.utime(stack, (factor, factor))
        for number in range(2):
            (series / f"{number}.dcm").write_bytes(dicom(noise(8, 8, high=100) * factor))
        os.utime(series, (factor, factor))
        for path in (f"{stack}#1", f"{series}/0.dcm"):
            assert volume_range(one, path).high[0] == pytest.approx(99 * factor, rel=0.02)


def test_multi_frame_files_of_one_series_have_ranges_of_their_own(tmp_path: Path) -> None:
    for name, factor in (("a", 1), ("b", 10)):
        (tmp_path / f"{name}.dcm").write_bytes(dicom(noise(4, 8, 8, high=400) * factor))
    one = reader(1, scope="volume", low=(), high=())
    highest = [volume_range(one, f"{tmp_path}/{name}.dcm#1")[1][0] for name in "ab"]
    assert highest[1] == pytest.approx(10 * highest[0], rel=1e-3)


def test_a_range_of_each_image_or_its_window() -> None:
    by_image = reader(1, scope="image", low=(), high=())
    pixels = np.linspace(-50, 50, 100, dtype=np.float32).reshape(10, 10, 1)
    ends = (by_image.scale(RawImage(pixels), "a"), by_image.scale(RawImage(3 * pixels), "b"))
    assert (ends[0] == ends[1]).all()
    assert (ends[0].min(), ends[0].max()) == (0, 65535)
    windowed = reader(1, scope="image", low=(), high=(), use_window=True)
    shown = windowed.scale(RawImage(pixels, window=(0.0, 20.0)), "a")
    assert ((shown > 0) & (shown < 65535)).mean() == pytest.approx(0.2, abs=0.01)


def test_units_are_told_in_words() -> None:
    assert PHOTOGRAPHS.units() == "uint8 RGB as decoded"
    assert reader().units() == "float32, bands 1, 2 in the units of the files, missing data NaN"
    assert reader(nodata=-9999.0).units().endswith(", missing data NaN or -9999")
    volume = reader(low=(), high=(), scope="volume", nodata=-9999.0).units()
    assert volume.endswith("from the percentiles 0.1 to 99.9 of its volume, missing data NaN")
    window = reader(low=(), high=(), scope="image", use_window=True).units()
    assert "from the window that its file names, else from the percentiles" in window


def test_it_knows_which_pictures_have_a_range_of_their_own(tmp_path: Path) -> None:
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    own = {"a.png": False, "b.tif": False, "c.npy": False, "d.png": True, "e.tif": True}
    for name in own:
        values = pixels if name[0] < "d" else pixels.astype(np.uint16) * 100
        if name == "c.npy":
            np.save(tmp_path / name, values)
        else:
            cv2.imwrite(str(tmp_path / name), values)
    scan = np.arange(64, dtype=np.int16).reshape(8, 8)
    (tmp_path / "f.dcm").write_bytes(dicom(scan))
    own["f.dcm"] = True
    assert {name: PHOTOGRAPHS.has_own_range(tmp_path / name) for name in own} == own
    path = tmp_path / "e.tif"
    assert not reader(1).has_own_range(path)
    for given in ({"scope": "volume"}, {"scope": "image"}, {"use_window": True}):
        assert reader(1, **given).has_own_range(path)
    assert (reader(1, high=(25_500.0,)).read_picture(path) == pixels[..., None]).all()


def test_pictures_show_colors_or_gray() -> None:
    image = np.zeros((2, 2, 4), np.uint16)
    image[..., 1], image[..., 3] = 65535, 257
    named = reader(4, names=("nir", "blue", "green", "red"))
    assert named.picture(image)[0, 0].tolist() == [1, 0, 255]
    assert reader(4).picture(image)[0, 0].tolist() == [0, 255, 0]
    assert reader(1).picture(image[..., 3:])[0, 0].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "given",
    [{}, {"scope": "volume", "low": (), "high": ()}, {"names": ("a", "b"), "nodata": 0.0},
     {"axis": 1, "use_window": True}, {"histogram": ((0.5, 0.5) * 16, (0.0, 1.0) * 16)}],
)  # fmt: skip
def test_a_reader_is_written_and_read(given: dict[str, Any]) -> None:
    one = reader(2, **given)
    content = json.loads(json.dumps(one.as_dict()))
    found = ImageReader.from_dict(content, list(one.mean), list(one.std))
    assert (found, found.histogram) == (one, one.histogram)
    assert ImageReader.from_dict(PHOTOGRAPHS.as_dict(), [0.5] * 3, [0.2] * 3) == PHOTOGRAPHS


@pytest.mark.parametrize(
    "change",
    [{"bands": [0, 1]}, {"bands": [1]}, {"bands": "all"}, {"scope": "patient"}, {"low": [0]},
     {"low": [0, 200]}, {"high": [1, float("inf")]}, {"axis": True}, {"names": [1]},
     {"nodata": "no"}, {"histogram": [[0.5] * 32]}, {"histogram": [[1.0], [1.0]]}],
)  # fmt: skip
def test_a_damaged_reader_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        ImageReader.from_dict(reader().as_dict() | change, [0.5, 0.5], [0.2, 0.2])


def test_views_of_bands(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 100, (40, 48, 5)).astype(np.uint16)
    np.save(tmp_path / "a.npy", values)
    crop = distorted_crop(16, 0.3, color=1.0, solarize=0.5, upright=False)
    views = Views([crop, crop], 16)
    dataset = ViewDataset([f"{tmp_path}/a.npy"], views, 0, reader=reader(5))
    item = dataset.item(0, 0)
    assert [(view.shape, view.dtype) for view in item.views] == [((16, 16, 5), np.uint16)] * 2
    assert item.fingerprint is not None
    assert all((a == b).all() for a, b in zip(item.views, dataset.item(0, 0).views, strict=True))
