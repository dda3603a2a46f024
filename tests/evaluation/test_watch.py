import numpy as np
import pytest

from vissl_lite.evaluation.watch import (
    COLLAPSED_RANK,
    COLLAPSED_STD,
    effective_rank,
    feature_std,
)


def test_feature_std_is_one_for_features_spread_over_the_sphere() -> None:
    features = np.random.default_rng(0).normal(size=(4000, 32))
    assert feature_std(features) == pytest.approx(1, abs=0.02)
    assert feature_std(7 * features) == pytest.approx(feature_std(features))


def test_effective_rank_counts_equal_directions() -> None:
    features = np.zeros((50, 20))
    features[:10, :10] = np.eye(10)
    assert effective_rank(features) == pytest.approx(10, abs=0.01)


def test_a_collapse_shows_in_both() -> None:
    random = np.random.default_rng(0)
    one = random.normal(size=(1, 64)) + 1e-4 * random.normal(size=(256, 64))
    assert feature_std(one) < COLLAPSED_STD
    assert effective_rank(one) < COLLAPSED_RANK


def test_healthy_features_are_not_called_collapsed() -> None:
    features = np.abs(np.random.default_rng(0).normal(size=(256, 64)))  # after a ReLU
    assert feature_std(features) > 5 * COLLAPSED_STD
    assert effective_rank(features) > 5 * COLLAPSED_RANK
