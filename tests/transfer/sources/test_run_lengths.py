import faster_coco_eval.core.mask as coco
import numpy as np
import pytest

from vissl_lite.transfer.sources.run_lengths import (
    mask_of_runs,
    runs_of_mask,
    runs_of_text,
    text_of_runs,
)


def random_mask(seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    shape = tuple(random.integers(1, 40, 2).tolist())
    return random.random(shape) < (0, 0.1, 0.5, 0.9, 1)[seed % 5]


@pytest.mark.parametrize("seed", range(20))
def test_runs_and_text_are_those_of_coco(seed: int) -> None:
    mask = random_mask(seed)
    runs = runs_of_mask(mask)
    expected = coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    assert text_of_runs(runs) == expected
    assert runs_of_text(expected) == runs.tolist()
    assert np.array_equal(mask_of_runs(runs, mask.shape), mask)


def test_long_runs() -> None:
    runs = np.array([3_000_000, 1, 5_000_000, 40, 0, 2, 5_000_000], np.uint32)
    assert runs_of_text(text_of_runs(runs)) == runs.tolist()


@pytest.mark.parametrize("seed", range(10))
def test_a_part_of_a_mask(seed: int) -> None:
    part = random_mask(seed)
    whole = np.zeros((50, 45), bool)
    column, row = (0, 0) if seed < 5 else (45 - part.shape[1], 50 - part.shape[0])
    whole[row : row + part.shape[0], column : column + part.shape[1]] = part
    runs = runs_of_mask(part, (column, row), whole.shape)
    assert np.array_equal(runs, runs_of_mask(whole))
