"""What commands add to their runs, and what becomes of failures."""

import errno
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vissl_lite.data.image_reader import ImageReader
from vissl_lite.evaluation.embedding import ImageMap
from vissl_lite.plots import CELL
from vissl_lite.report.additions import add_selection, add_test_pictures


def test_pictures_that_fail_do_not_end_a_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def visualize(*_: object) -> None:
        raise KeyError("mask_ap")

    nothing: Any = None
    task: Any = SimpleNamespace(visualize=visualize)
    add_test_pictures(tmp_path, task, nothing, nothing, nothing)
    assert "the pictures of the test images can't be made: KeyError('mask_ap')" in caplog.text


def test_a_full_disk_ends_it(tmp_path: Path) -> None:
    def visualize(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    nothing: Any = None
    task: Any = SimpleNamespace(visualize=visualize)
    with pytest.raises(OSError, match="no space left"):
        add_test_pictures(tmp_path, task, nothing, nothing, nothing)


def test_chosen_images_are_as_bright_as_the_reader_has_them(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 1000, (24, 24), np.uint16)
    paths = [str(tmp_path / f"{name}.tif") for name in ("dark", "bright")]
    for path, offset in zip(paths, (0, 50_000), strict=True):
        Image.fromarray(noise + np.uint16(offset)).save(path)
    reader = ImageReader(bands=(0,), low=(0.0,), high=(60_000.0,), mean=(0.5,), std=(0.2,))
    features = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    add_selection(tmp_path, features, paths, np.zeros(2, bool), np.array([0, 1]), 0, reader)
    sheet = np.asarray(Image.open(tmp_path / "selected.png").convert("L")).astype(int)
    dark, bright = sheet[CELL // 2, CELL // 2], sheet[CELL // 2, -CELL // 2]
    assert bright > dark + 150
    thumbnails = ImageMap.load(tmp_path / "map.npz").thumbnails
    dark, bright = (np.asarray(Image.open(BytesIO(one))).mean() for one in thumbnails)
    assert bright > dark + 150
