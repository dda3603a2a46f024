"""The coverage at each budget."""

import numpy as np
import pytest

from tests.selection.test_methods import LABELLED, distances, points
from vissl_lite.selection.candidates import Candidates
from vissl_lite.selection.estimate import estimate_coverage
from vissl_lite.selection.herding import herding
from vissl_lite.selection.uniform import uniform


def test_the_selection_is_continued_by_herding() -> None:
    features = points()
    chosen = np.array([0, 1, 2])
    found = estimate_coverage(features, LABELLED, chosen, np.ones(60, bool))
    kernel = np.exp(-(distances(features) ** 2))
    order = [*LABELLED, *chosen, *herding(features, 3, np.array([*LABELLED, *chosen])).indices]
    expected = [kernel[order[:count]].max(axis=0).mean() for count in range(3, 10)]
    assert found.values == pytest.approx(expected, abs=1e-5)
    assert len(found.random) == 7
    assert found.random[0] == pytest.approx(found.values[0])
    line = np.linspace(expected[0], expected[-1], 7)
    assert found.knee == int(np.argmax(np.array(expected) - line))


def test_of_many_images_the_coverage_is_estimated() -> None:
    features = points(2000)
    of_all = (features, LABELLED, np.array([0, 1, 2]), np.arange(2000) % 3 > 0)
    exact = estimate_coverage(*of_all)
    sampled, again, other = (estimate_coverage(*of_all, seed=seed, most=400) for seed in (0, 0, 1))
    assert sampled.values == pytest.approx(exact.values, abs=0.02)
    assert sampled.random == pytest.approx(exact.random, abs=0.02)
    assert sampled == again
    assert sampled.values != exact.values != other.values


def test_it_is_continued_within_groups() -> None:
    features = points()
    groups = np.arange(60) % 4
    candidates = Candidates(60, LABELLED, groups=groups, per_group=2)
    chosen = herding(features, 3, LABELLED, candidates=candidates).indices
    left = candidates.remaining
    found = estimate_coverage(features, LABELLED, chosen, np.ones(60, bool), candidates=candidates)
    assert left > 0
    assert candidates.remaining == 0
    assert len(found.values) == 1 + 4 * 2 - len(LABELLED)
    assert len(found.random) == len(found.values)


def test_random_orders_are_drawn_from_what_might_be_chosen_before() -> None:
    features = points()
    groups = (np.arange(60) >= 2).astype(int)  # 58 of them are in one group
    before = Candidates(60, LABELLED[:0], groups=groups, per_group=2)
    chosen = np.array([0, 1, 2, 3])
    found = estimate_coverage(
        features, LABELLED[:0], chosen, np.ones(60, bool), seed=4, before=before
    )
    assert before.remaining == 60  # left as it was
    kernel = np.exp(-(distances(features) ** 2))
    expected = np.zeros((3, 9))
    for number in range(3):
        candidates = Candidates(60, LABELLED[:0], groups=groups, per_group=2)
        order = uniform(features, 8, seed=4 + number, candidates=candidates).indices
        assert len(order) == 4
        curve = [0.0, *(kernel[order[: count + 1]].max(axis=0).mean() for count in range(4))]
        expected[number] = curve + curve[-1:] * 4  # no more images may be chosen
    assert found.random == pytest.approx(expected.mean(axis=0).tolist(), abs=1e-5)


def test_the_first_label_of_all_is_no_bend() -> None:
    features = points()
    found = estimate_coverage(features, LABELLED[:0], np.arange(10), np.ones(60, bool))
    assert found.values[0] == 0
    assert found.knee >= 1


def test_a_curve_that_does_not_flatten_has_no_knee() -> None:
    features = np.eye(12, dtype=np.float32)[np.repeat(np.arange(12), np.arange(1, 13))]
    at = np.cumsum(np.arange(12))  # one of each kind, the rarest first
    for labelled, chosen in ((at[:1], at[1:4]), (at[:0], at[:4])):
        found = estimate_coverage(features, labelled, chosen, np.ones(len(features), bool))
        assert np.diff(found.values)[-1] > np.diff(found.values)[1]
        assert found.knee == 0
