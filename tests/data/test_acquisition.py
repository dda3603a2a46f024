from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vissl_lite.data.acquisition import acquisition


@pytest.mark.parametrize(
    ("pixels", "name", "values"),
    [
        (np.zeros((4, 6, 3), np.uint8), "a.png", ("6 x 4", "PNG", "RGB")),
        (np.zeros((4, 6), np.uint16), "a.tif", ("16", "6 x 4")),
        (np.zeros((5, 5), np.uint8), "a.jpg", ("5 x 5", "JPEG", "L")),
    ],
)
def test_what_a_file_says(
    pixels: np.ndarray, name: str, values: tuple[str, ...], tmp_path: Path
) -> None:
    Image.fromarray(pixels).save(tmp_path / name)
    assert tuple(acquisition(str(tmp_path / name)).values()) == values


def test_a_file_that_can_not_be_read_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    assert acquisition(str(tmp_path / "a.png")) == {}
    assert acquisition(str(tmp_path / "missing.png")) == {}
