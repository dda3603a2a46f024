"""Pseudo-values of metrics that are not means over images."""

import numpy as np
import pytest

from vissl_lite.comparison.statistics import Runs, difference
from vissl_lite.transfer.jackknife import MAX_BLOCKS, jackknife_blocks, pseudo_values


def test_few_images_or_groups_are_blocks_of_their_own() -> None:
    assert jackknife_blocks(3).tolist() == [0, 1, 2]
    assert jackknife_blocks(4, np.array(["b", "a", "b", "c"])).tolist() == [1, 0, 1, 2]


def test_many_groups_are_drawn_into_blocks_of_similar_size_and_stay_whole() -> None:
    groups = np.repeat([f"patient {number}" for number in range(3 * MAX_BLOCKS)], 2)
    blocks = jackknife_blocks(len(groups), groups)
    assert (blocks[::2] == blocks[1::2]).all()
    assert np.bincount(blocks).tolist() == [6] * MAX_BLOCKS
    assert (blocks == jackknife_blocks(len(groups), groups)).all()
    assert (np.diff(blocks[::2]) != 1).any()  # not in the order of the images


def test_pseudo_values_of_a_mean_are_the_means_of_the_blocks() -> None:
    values, blocks = np.array([0.1, 0.9, 0.4, 0.8, 0.3]), np.array([0, 1, 0, 2, 2])
    found = pseudo_values(lambda kept: float(values[kept].mean()), blocks)
    assert found == pytest.approx([0.25, 0.9, 0.25, 0.55, 0.55])
    single = pseudo_values(lambda kept: float(values[kept].mean()), np.arange(5))
    assert single == pytest.approx(values)


def test_one_block_has_none_and_an_undefined_metric_neither() -> None:
    assert pseudo_values(lambda kept: 1.0, np.zeros(4, int)) is None
    assert pseudo_values(lambda kept: 1.0 if 0 in kept else np.nan, np.arange(4)) is None


@pytest.mark.slow
def test_intervals_of_a_ratio_cover_the_truth_as_often_as_they_say() -> None:
    """As in a mean intersection over union, sums are divided; 130 images in blocks."""
    random = np.random.default_rng(0)

    def drawn(images: int) -> np.ndarray:
        """Hits of two models, and sizes, of each image."""
        sizes = random.lognormal(0, 1, images)
        hard = random.normal(0, 0.1, images)
        shares = [np.clip(mean + hard + random.normal(0, 0.1, images), 0, 1) for mean in (0.6, 0.5)]
        return np.stack([shares[0] * sizes, shares[1] * sizes, sizes])

    many = drawn(2_000_000).sum(axis=1)
    truth, covered, trials = (many[0] - many[1]) / many[2], 0, 300
    for _ in range(trials):
        sample = drawn(130)
        blocks, runs = jackknife_blocks(130), []
        for model in (0, 1):
            sums = sample[[model, 2]]
            parts = pseudo_values(lambda kept, s=sums: np.divide(*s[:, kept].sum(axis=1)), blocks)
            assert parts is not None
            runs.append(Runs(np.array([np.divide(*sums.sum(axis=1))]), parts[None]))
        found = difference([runs[0]], [runs[1]], groups=blocks)
        covered += found.low <= truth <= found.high
    assert 0.91 < covered / trials < 0.98
