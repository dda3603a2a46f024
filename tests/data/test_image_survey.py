from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from vissl_lite.data import image_survey
from vissl_lite.data.image_reader import PHOTOGRAPHS
from vissl_lite.data.image_survey import NO_SETTINGS, ImageSettings, override, survey, table
from vissl_lite.errors import UserError


def arrays(folder: Path, scales: list[float], bands: int = 2, frames: int = 0) -> list[str]:
    """Arrays of uniform values from 0 to their scale."""
    random, paths = np.random.default_rng(0), []
    for number, scale in enumerate(scales):
        shape = (frames, 12, 12, bands) if frames else (12, 12, bands)
        np.save(folder / f"{number}.npy", (random.random(shape) * scale).astype(np.float32))
        file = str(folder / f"{number}.npy")
        paths += [f"{file}#{k}" for k in range(frames)] if frames else [file]
    return paths


def test_photographs_need_no_reader(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((8, 8, 3), np.uint8))
    cv2.imwrite(str(tmp_path / "b.png"), np.zeros((8, 8), np.uint8))
    cv2.imwrite(str(tmp_path / "c.tif"), np.zeros((8, 8, 3), np.uint8))
    paths = [f"{tmp_path}/{name}" for name in ("a.png", "b.png", "c.tif")]
    assert survey(paths[2:], NO_SETTINGS) is PHOTOGRAPHS
    assert survey(paths, NO_SETTINGS) is PHOTOGRAPHS
    cv2.imwrite(str(tmp_path / "deep.png"), np.zeros((8, 8), np.uint16))
    assert survey([*paths, f"{tmp_path}/deep.png"], NO_SETTINGS) is PHOTOGRAPHS
    assert survey(paths[:1], ImageSettings(bands="2")).bands == (1,)


def test_ranges_and_statistics_of_a_data_set(tmp_path: Path) -> None:
    found = survey(arrays(tmp_path, [100.0] * 8), NO_SETTINGS)
    assert found.bands == (0, 1)
    assert found.scope == "dataset"
    assert found.low == pytest.approx((0, 0), abs=1)
    assert found.high == pytest.approx((100, 100), abs=1)
    assert found.mean == pytest.approx((0.5, 0.5), abs=0.05)
    assert found.std == pytest.approx((12**-0.5,) * 2, abs=0.05)
    assert len(table(found)) == 4


def test_sixteen_bits(tmp_path: Path) -> None:
    """A set whose maxima lie around 4,095 is on one scale; see the audit of 16-bit images."""
    random = np.random.default_rng(0)
    for number, largest in enumerate((4000, 4094, 4096, 4200)):
        pixels = random.integers(0, largest, (16, 16), np.uint16)
        cv2.imwrite(str(tmp_path / f"{number}.png"), pixels)
    paths = [f"{tmp_path}/{number}.png" for number in range(4)]
    found = survey(paths, NO_SETTINGS)
    assert found.bands == (0,)
    means = [found.read(path).mean() / 65535 for path in paths]
    assert means == pytest.approx([0.5] * 4, abs=0.05)


def test_volumes_on_their_own_scales_are_found(tmp_path: Path) -> None:
    scales = [1.0, 200.0, 5.0, 1e5]
    found = survey(arrays(tmp_path, scales, 1, frames=4), NO_SETTINGS)
    assert found.scope == "volume"
    assert found.mean == pytest.approx((0.5,), abs=0.05)
    together = ImageSettings(value_range="percentile")
    assert survey(arrays(tmp_path, scales, 1, frames=4), together).scope == "dataset"
    alike = survey(arrays(tmp_path, [90.0, 100.0, 110.0], 1, frames=4), NO_SETTINGS)
    assert alike.scope == "dataset"


def test_empty_slices_are_no_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The outer slices of a skull-stripped volume are empty, and few slices of each are drawn."""
    monkeypatch.setattr(image_survey, "SAMPLE", 8)
    paths = []
    for number in range(8):
        values = np.random.default_rng(number).random((40, 12, 12, 1)).astype(np.float32)
        values[:16] = values[24:] = 0
        np.save(tmp_path / f"{number}.npy", values)
        paths += [f"{tmp_path}/{number}.npy#{k}" for k in range(40)]
    assert survey(paths, NO_SETTINGS).scope == "dataset"


def test_missing_data_is_found(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((16, 16, 1)).astype(np.float32) * 50
    values[:3] = -9999
    np.save(tmp_path / "a.npy", values)
    found = survey([f"{tmp_path}/a.npy"], NO_SETTINGS)
    assert found.nodata == -9999
    assert found.low[0] >= 0


@pytest.mark.parametrize("settings", [NO_SETTINGS, ImageSettings(value_range="image")])
def test_missing_data_is_left_out_of_the_statistics(
    tmp_path: Path, settings: ImageSettings
) -> None:
    random, paths = np.random.default_rng(0), []
    for number, scale in enumerate((1.0, 200.0, 5.0, 1e5)):
        values = (random.random((4, 16, 16, 1)) ** 4 * scale).astype(np.float32)
        values[:, :8] = np.nan
        np.save(tmp_path / f"{number}.npy", values)
        paths += [f"{tmp_path}/{number}.npy#{k}" for k in range(4)]
    found = survey(paths, settings)
    assert found.scope in ("volume", "image")
    assert found.mean == pytest.approx((0.2,), abs=0.03)  # of x^4 for uniform x


@pytest.mark.parametrize(
    ("settings", "low", "high"),
    [
        (ImageSettings(window="lung"), -1350, 150),
        (ImageSettings(window="40,80"), 0, 80),
        (ImageSettings(value_range="-5,20"), -5, 20),
        (ImageSettings(value_range="dtype"), 0, 1),
    ],
)
def test_given_ranges(tmp_path: Path, settings: ImageSettings, low: float, high: float) -> None:
    found = survey(arrays(tmp_path, [100.0], 1), settings)
    assert (found.low, found.high) == ((low,), (high,))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"bands": "0,1"}, "from 1"),
        ({"bands": "red"}, "neither all nor numbers"),
        ({"window": "lungs"}, "lung"),
        ({"window": "1,0"}, "width must be above 0"),
        ({"value_range": "5,5"}, "below the second"),
        ({"value_range": "5"}, "LOW,HIGH"),
        ({"window": "lung", "value_range": "0,1"}, "not both"),
        ({"axis": 3}, "--axis 3"),
    ],
)
def test_wrong_options(given: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        ImageSettings(**given).check_images()  # type: ignore[arg-type]


def test_a_model_reads_images_that_are_stored_in_another_way(tmp_path: Path) -> None:
    known = survey(arrays(tmp_path, [100.0], 2), NO_SETTINGS)
    (tmp_path / "new").mkdir()
    paths = arrays(tmp_path / "new", [1.0], 4)
    assert override(known, paths, NO_SETTINGS) == known
    moved = override(known, paths, ImageSettings(bands="4,1", nodata=7.0))
    assert (moved.bands, moved.nodata, moved.high) == ((3, 0), 7.0, known.high)
    scaled = override(known, paths, ImageSettings(bands="4,1", value_range="percentile"))
    assert scaled.high == pytest.approx((1.0, 1.0), abs=0.05)
    assert (scaled.mean, scaled.std) == (known.mean, known.std)
    with pytest.raises(UserError, match="the model needs 2 bands"):
        override(known, paths, ImageSettings(bands="all"))
    with pytest.raises(UserError, match="trained on photographs"):
        override(PHOTOGRAPHS, paths, ImageSettings(bands="4,1"))


@pytest.mark.parametrize(
    ("given", "nodata"),
    [
        ({"value_range": "0,1"}, 3.0),
        ({"window": "0.5,1"}, 3.0),
        ({"bands": "2,1"}, 3.0),
        ({"value_range": "0,1", "nodata": 7.0}, 7.0),
    ],
)
def test_a_model_keeps_its_value_for_missing_data(
    given: dict[str, Any], nodata: float, tmp_path: Path
) -> None:
    known = survey(arrays(tmp_path, [1.0]), ImageSettings(nodata=3.0))
    found = override(known, [f"{tmp_path}/0.npy"], ImageSettings(**given))
    assert found.nodata == nodata


def test_options_of_a_command_are_not_made_again(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Options(ImageSettings):
        def __post_init__(self) -> None:
            assert self.bands is None

    known = survey(arrays(tmp_path, [1.0]), NO_SETTINGS)
    assert override(known, [f"{tmp_path}/0.npy"], Options(nodata=7.0)).nodata == 7


def test_bands_of_images_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_text("no image")
    with pytest.raises(UserError, match="none of the images that were looked at can be read"):
        survey([f"{tmp_path}/a.tif"], ImageSettings(bands="1"))


def test_the_histogram_is_of_scaled_values(tmp_path: Path) -> None:
    values = np.full((16, 16, 1), 10, np.uint16)
    values[:4] = 900
    np.save(tmp_path / "a.npy", values)
    found = survey([f"{tmp_path}/a.npy"], ImageSettings(value_range="0,1000"))
    (shares,) = found.histogram
    assert {i: share for i, share in enumerate(shares) if share} == {0: 0.75, 28: 0.25}


def test_different_numbers_of_bands(tmp_path: Path) -> None:
    paths = arrays(tmp_path, [1.0, 1.0])
    np.save(tmp_path / "1.npy", np.zeros((12, 12, 5), np.float32))
    with pytest.raises(UserError, match=r"has 2 bands and .* has 5: give --bands .*1,2"):
        survey(paths, NO_SETTINGS)
    assert survey(paths, ImageSettings(bands="2,1")).bands == (1, 0)
    with pytest.raises(UserError, match=r"--bands 3: .*0.npy has 2 bands"):
        survey(paths, ImageSettings(bands="3"))


def test_more_bands_than_opencv_resizes(tmp_path: Path) -> None:
    (path,) = arrays(tmp_path, [1.0])
    assert survey([path], ImageSettings(bands=",".join(["1"] * 128))).channels == 128
    with pytest.raises(UserError, match=r"0.npy: 129 bands are too many.*choose some with --bands"):
        survey([path], ImageSettings(bands=",".join(["1"] * 129)))
