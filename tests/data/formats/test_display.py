from pathlib import Path

import numpy as np
import pytest

from tests.data.formats.making import dicom, noise, tiff
from vissl_lite.data.formats import RawImage, to_rgb
from vissl_lite.data.images import read_image


def test_eight_bits_stay_as_they_are() -> None:
    pixels = noise(5, 6, 5, dtype=np.uint8, high=256)
    names = ("coastal", "blue", "green", "red", "nir")
    np.testing.assert_array_equal(to_rgb(RawImage(pixels, None, None, names)), pixels[..., 3:0:-1])
    np.testing.assert_array_equal(to_rgb(RawImage(pixels)), pixels[..., :3])
    two = to_rgb(RawImage(pixels[..., :2]))
    np.testing.assert_array_equal(two, np.repeat(pixels[..., :1], 3, axis=2))


def test_a_color_that_has_the_value_of_missing_data_in_a_band_is_kept() -> None:
    pixels = np.array([[[255, 250, 245], [255, 255, 255]]], np.uint8)
    assert to_rgb(RawImage(pixels, 255.0)).tolist() == [[[255, 250, 245], [0, 0, 0]]]


def test_bands_are_stretched_each_on_its_own_and_without_nodata() -> None:
    ramp = np.linspace(0, 1000, 100 * 100, dtype=np.float32).reshape(100, 100)
    pixels = np.stack([ramp, 10 * ramp - 5, ramp, ramp], axis=2)
    pixels[0, 0] = -9999.0
    shown = to_rgb(RawImage(pixels, -9999.0))
    np.testing.assert_allclose(shown[..., 0], shown[..., 1], atol=1)
    assert shown[0, 0].tolist() == [0, 0, 0]
    assert int(shown[50, 0, 0]) in (127, 128)
    assert int(shown[2, 0, 0]) in (2, 3)  # were -9999 in it, this were 255 / 2


def test_a_window_is_used(tmp_path: Path) -> None:
    pixels = np.array([[-200, -160, 41, 240, 3000]] * 2, np.int16)
    file = tmp_path / "a.dcm"
    file.write_bytes(dicom(pixels, WindowCenter=40, WindowWidth=400))
    assert read_image(file)[0, :, 0].tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_images_of_one_value_and_of_no_data(dtype: str, tmp_path: Path) -> None:
    file = tmp_path / "a.tif"
    file.write_bytes(tiff(np.full((5, 6), 7, dtype)))
    assert read_image(file).shape == (5, 6, 3)
    empty = np.full((5, 6, 1), np.nan, np.float32)
    assert not to_rgb(RawImage(empty)).any()
