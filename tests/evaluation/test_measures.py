"""Measures without labels, against what they are defined to be, pair by pair."""

import math

import numpy as np
import pytest

from vissl_lite.evaluation.measures import alignment, effective_rank, feature_std, uniformity


def some(seed: int, images: int = 12, size: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(images, size)).astype(np.float32)


def unit(vector: np.ndarray) -> list[float]:
    length = math.sqrt(sum(float(value) ** 2 for value in vector))
    return [float(value) / length for value in vector]


def squared_distance(one: np.ndarray, other: np.ndarray) -> float:
    return sum((a - b) ** 2 for a, b in zip(unit(one), unit(other), strict=True))


def test_feature_std_is_one_for_features_spread_over_the_sphere() -> None:
    features = np.random.default_rng(0).normal(size=(4000, 32))
    assert feature_std(features) == pytest.approx(1, abs=0.02)
    assert feature_std(7 * features) == pytest.approx(feature_std(features))


def test_effective_rank_counts_equal_directions() -> None:
    features = np.zeros((50, 20))
    features[:10, :10] = np.eye(10)
    assert effective_rank(features) == pytest.approx(10, abs=0.01)


def test_alignment_is_the_mean_squared_distance_of_two_views() -> None:
    one, other = some(1), some(2)
    literal = [squared_distance(a, b) for a, b in zip(one, other, strict=True)]
    assert alignment(one, other) == pytest.approx(sum(literal) / len(literal), rel=1e-5)
    assert alignment(one, 3 * one) == pytest.approx(0, abs=1e-6)
    assert alignment(one, -one) == pytest.approx(4, rel=1e-5)


def test_uniformity_is_the_logarithm_of_the_mean_potential_of_all_pairs() -> None:
    features = some(3)
    literal = [
        math.exp(-2 * squared_distance(features[i], features[j]))
        for i in range(len(features))
        for j in range(i)
    ]
    assert uniformity(features) == pytest.approx(math.log(sum(literal) / len(literal)), rel=1e-5)
    assert uniformity(np.ones((8, 5))) == pytest.approx(0, abs=1e-6)
    assert uniformity(some(4, 500, 300)) == pytest.approx(-4, abs=0.1)


def test_features_that_are_no_numbers_give_none() -> None:
    features = some(5)
    features[3, 2] = np.nan
    for value in (feature_std(features), effective_rank(features), uniformity(features)):
        assert math.isnan(value)
    assert math.isnan(alignment(features, some(6)))
    assert math.isnan(uniformity(some(7, images=1)))
