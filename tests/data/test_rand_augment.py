"""RandAugment."""

from random import Random

import numpy as np
import pytest
from PIL import Image

from vissl_lite.data.rand_augment import OPERATIONS, RandAugment

ROWS, COLUMNS = np.mgrid[0:24, 0:30]
SQUARES = 10 * ((ROWS // 4 + COLUMNS // 4) % 2)
PHOTOGRAPH = np.stack(
    [4 * ROWS + 5 * COLUMNS + SQUARES, 8 * ROWS + 20 + SQUARES, 8 * COLUMNS + SQUARES], axis=2
).astype(np.uint8)
UNSIGNED = {"autocontrast", "equalize"}  # have no strength


def applied(name: str, strength: float) -> np.ndarray:
    return np.asarray(OPERATIONS[name](Image.fromarray(PHOTOGRAPH), strength))


@pytest.mark.parametrize("name", sorted(OPERATIONS.keys() - UNSIGNED - {"identity"}))
def test_an_operation_changes_a_photograph_with_its_strength(name: str) -> None:
    assert (applied(name, 0) == PHOTOGRAPH).all()
    weak, strong = (
        np.abs(applied(name, strength).astype(int) - PHOTOGRAPH).mean() for strength in (0.2, 1)
    )
    assert 0 <= weak < strong


@pytest.mark.parametrize(("name", "size"), [("translate_x", 30), ("translate_y", 24)])
def test_a_shift_is_a_share_of_the_side(name: str, size: int) -> None:
    moved = applied(name, 1 / 0.45 / size)  # one pixel
    axis = 1 if name == "translate_x" else 0
    pixels = PHOTOGRAPH[:, 1:] if axis else PHOTOGRAPH[1:]
    assert (np.delete(moved, -1, axis) == pixels).all()


def test_the_operations_depend_on_the_numbers_drawn_alone() -> None:
    step = RandAugment(9)
    views = [step(PHOTOGRAPH, Random(seed)) for seed in range(20)]
    again = [step(PHOTOGRAPH, Random(seed)) for seed in range(20)]
    assert all((a == b).all() for a, b in zip(views, again, strict=True))
    assert len({view.tobytes() for view in views}) > 15
    assert {view.shape for view in views} == {PHOTOGRAPH.shape}
