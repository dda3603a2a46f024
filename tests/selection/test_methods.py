"""Each method against a slow literal version on a few dozen points."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from tests.conftest import trying
from vissl_lite.errors import UserError
from vissl_lite.selection import METHODS, Candidates
from vissl_lite.selection.coverage import (
    coverage_curve,
    gaussian,
    knee,
    nearest_of,
    sample,
    unit_features,
)
from vissl_lite.selection.dropquery import changed_by_dropout, dropquery
from vissl_lite.selection.herding import adapted_radius, herding
from vissl_lite.selection.k_center import k_center
from vissl_lite.selection.probcover import probcover, pure_radius
from vissl_lite.selection.typiclust import typiclust

LABELLED = np.array([3, 17, 40])


def points(count: int = 60, seed: int = 0) -> np.ndarray:
    """Features around six centers, of lengths that must not matter."""
    random = np.random.default_rng(seed)
    centers = random.normal(size=(6, 8))
    features = centers[random.integers(0, 6, count)] + 0.3 * random.normal(size=(count, 8))
    return (features * random.uniform(0.5, 3, (count, 1))).astype(np.float32)


def distances(features: np.ndarray) -> np.ndarray:
    unit = features.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    return np.linalg.norm(unit[:, None] - unit[None], axis=2)


def greedy(kernel: np.ndarray, budget: int, labelled: np.ndarray, weights: np.ndarray) -> list[int]:
    """Computes the coverage with each image that could be added, anew at each step."""
    chosen = labelled.tolist()
    for _ in range(budget):
        coverage = [
            -1.0 if i in chosen else float((weights * kernel[[*chosen, i]].max(axis=0)).sum())
            for i in range(len(kernel))
        ]
        chosen.append(int(np.argmax(np.round(coverage, 6))))
    return chosen[len(labelled) :]


@pytest.mark.parametrize("labelled", [LABELLED[:0], LABELLED])
def test_herding_raises_the_coverage_most_at_each_step(labelled: np.ndarray) -> None:
    features = points()
    expected = greedy(np.exp(-(distances(features) ** 2)), 12, labelled, np.ones(60))
    assert herding(features, 12, labelled).indices.tolist() == expected


def test_uncertainty_herding_weights_images_and_narrows_the_kernel() -> None:
    features = points()
    uncertainty = np.random.default_rng(1).uniform(size=60).astype(np.float32)
    before = uncertainty.copy()
    between = distances(features)[np.ix_(LABELLED, LABELLED)]
    radius = between[between > 0].min()
    assert adapted_radius(unit_features(features), LABELLED) == pytest.approx(radius, rel=1e-4)
    weights = uncertainty.copy()
    weights[LABELLED] = 0
    kernel = np.exp(-(distances(features) ** 2) / radius**2)
    found = herding(features, 12, LABELLED, uncertainty).indices.tolist()
    assert found == greedy(kernel, 12, LABELLED, weights)
    assert found != herding(features, 12, LABELLED).indices.tolist()
    np.testing.assert_array_equal(uncertainty, before)


def test_typiclust_takes_the_most_typical_of_the_largest_clusters_without_a_label() -> None:
    features = points(80)
    unit = unit_features(features).numpy()
    of = KMeans(11, random_state=0).fit_predict(unit)
    apart, taken, expected = distances(features), set(LABELLED.tolist()), []
    labels = {name: sum(of[i] == name for i in LABELLED) for name in range(11)}
    for _ in range(8):
        sizes = {name: int((of == name).sum()) for name in range(11)}
        large = [name for name in range(11) if sizes[name] > 5]
        name = min(large, key=lambda one: (labels[one], -sizes[one], one))
        inside = [i for i in range(80) if of[i] == name and i not in taken]
        count = min(20, len(inside) // 2)
        means = [np.sort(apart[i, [j for j in inside if j != i]])[:count].mean() for i in inside]
        expected.append(inside[int(np.argmin(means))])
        labels[name] += 1
        taken.add(expected[-1])
    assert typiclust(features, 8, LABELLED).indices.tolist() == expected


def test_probcover_covers_most_with_balls_of_which_95_percent_are_pure() -> None:
    features = points(80)
    apart = distances(features)
    of = KMeans(9, random_state=0).fit_predict(unit_features(features).numpy())
    radius = pure_radius(unit_features(features), of)

    def purity(at: float) -> float:
        return float(np.mean([len({*of[row < at]}) <= 1 for row in apart]))

    assert purity(radius - 1e-4) >= 0.95 > purity(radius + 1e-4)
    found = probcover(features, 6, LABELLED)
    assert found.indices.tolist() == greedy((apart < radius) * 1.0, 6, LABELLED, np.ones(80))


def test_probcover_goes_on_when_all_is_covered() -> None:
    found = probcover(np.ones((12, 3), np.float32), 5)
    assert len(set(found.indices.tolist())) == 5
    assert found.reasons[0].startswith("12 images")
    assert found.reasons[1:] == ["random"] * 4


def test_herding_covers_all_images_once_the_uncertain_ones_are_covered() -> None:
    features = np.repeat(np.eye(20, dtype=np.float32), 3, axis=0)  # 20 pictures, each three times
    uncertainty = np.zeros(60, np.float32)
    uncertainty[[0, 1, 30]] = 1
    found = herding(features, 22, uncertainty=uncertainty)
    assert {index // 3 for index in found.indices[:2].tolist()} == {0, 10}
    assert {index // 3 for index in found.indices[:20].tolist()} == set(range(20))
    assert found.reasons[1].startswith("raises the coverage of uncertain images by 0.")
    assert found.reasons[2].startswith("raises the coverage by 0.0")
    assert found.reasons[20:] == ["random"] * 2


def test_k_center_takes_the_farthest() -> None:
    features = points()
    apart, chosen = distances(features), LABELLED.tolist()
    for _ in range(10):
        chosen.append(int(apart[chosen].min(axis=0).argmax()))
    assert k_center(features, 10, LABELLED).indices.tolist() == chosen[3:]
    assert len(set(k_center(features, 10).indices.tolist())) == 10


def test_margin_takes_the_most_uncertain_and_needs_a_model() -> None:
    uncertainty = np.array([0.1, 0.9, 0.5, 0.9, 0.2])
    found = METHODS["margin"](np.zeros((5, 2)), 3, np.array([1]), uncertainty)
    assert found.indices.tolist() == [3, 2, 4]
    with pytest.raises(UserError, match="--model with a run of finetune"):
        METHODS["margin"](np.zeros((5, 2)), 3)


def test_margin_draws_among_equally_uncertain_images() -> None:
    uncertainty = np.repeat([0, 0.5, 0], [20, 1, 19])
    chosen = [METHODS["margin"](np.zeros((40, 2)), 6, uncertainty=uncertainty, seed=s).indices
              for s in (0, 0, 1)]  # fmt: skip
    assert chosen[0].tolist() == chosen[1].tolist() != chosen[2].tolist()
    assert [one[0] for one in chosen] == [20, 20, 20]
    for one in chosen:
        assert len(set(one.tolist())) == 6
        assert one.max() > 20 > one.min()


@pytest.mark.parametrize("first_round", [False, True])
def test_dropquery_takes_the_centers_of_clusters_of_uncertain_images(first_round: bool) -> None:
    features = points(80)
    unit = unit_features(features).numpy()
    uncertainty = np.random.default_rng(3).integers(0, 4, 80) / 3  # of three masks
    left = [
        i for i in range(80) if i not in LABELLED and (first_round or uncertainty[i] in (2 / 3, 1))
    ]
    found = KMeans(8, random_state=0).fit(unit[left])
    expected = {}
    for number, center in enumerate(found.cluster_centers_):
        inside = [i for i, of in zip(left, found.labels_, strict=True) if of == number]
        nearest = min(inside, key=lambda i: np.linalg.norm(unit[i] - center))
        expected[nearest] = len(inside)
    chosen = dropquery(features, 8, LABELLED, None if first_round else uncertainty).indices
    assert {*chosen.tolist()} == {*expected}
    sizes = [expected[i] for i in chosen]
    assert sizes == sorted(sizes, reverse=True)


def test_dropquery_takes_others_only_if_no_uncertain_image_is_left() -> None:
    uncertainty = np.zeros(60)
    uncertainty[10:20] = 1
    candidates = Candidates(60, groups=np.arange(60) % 5, per_group=2)
    assert {*dropquery(points(), 8, uncertainty=uncertainty).indices} < {*range(10, 20)}
    found = dropquery(points(), 14, uncertainty=uncertainty, seed=1)
    assert {*found.indices[:10]} == {*range(10, 20)}
    assert found.reasons[10:] == ["random, as no more images are uncertain"] * 4
    assert {*found.indices[10:]} != {*dropquery(points(), 14, uncertainty=uncertainty).indices[10:]}
    found = dropquery(points(), 10, uncertainty=uncertainty, candidates=candidates)
    assert {*found.indices} == {*range(10, 20)}  # although clusters are ruled out by groups


def test_dropout_drops_three_quarters_and_scales_the_others_by_four() -> None:
    features = np.ones((4000, 2), np.float32)
    # the first feature decides: above the threshold it is class 1
    for threshold, share in ((0.5, 0.75), (3.5, 0.25), (4.5, 0.0), (-0.5, 0.0)):
        changed = changed_by_dropout(
            lambda x, at=threshold: np.stack([np.full(len(x), at), x[:, 0]], axis=1), features, 5
        )
        assert {*np.round(3 * changed, 4)} <= {0, 1, 2, 3}
        assert changed.mean() == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("name", METHODS)
def test_all_methods_repeat_themselves_and_choose_nothing_twice(name: str) -> None:
    uncertainty = np.random.default_rng(2).uniform(size=60)
    for labelled in (LABELLED[:0], LABELLED):
        one, other = (METHODS[name](points(), 20, labelled, uncertainty, seed=4) for _ in range(2))
        assert one.indices.tolist() == other.indices.tolist()
        assert len({*one.indices.tolist(), *labelled.tolist()}) == 20 + len(labelled)
        assert len(one.reasons) == 20


@pytest.mark.parametrize("name", METHODS)
def test_all_methods_stop_when_nothing_may_be_chosen(name: str) -> None:
    groups = np.arange(60) % 7
    candidates = Candidates(60, LABELLED, groups=groups, per_group=1)
    found = METHODS[name](points(), 20, LABELLED, np.ones(60), 0, candidates)
    assert sorted(groups[found.indices].tolist()) == [0, 1, 2, 4, 6]  # 3 and 5 are labelled


@pytest.mark.parametrize("name", METHODS)
def test_images_that_are_ruled_out_stay_out_also_if_all_are(name: str) -> None:
    features, ruled_out = points(5), Candidates(5)
    ruled_out.open[:] = False
    found = METHODS[name](features, 3, uncertainty=np.ones(5), candidates=ruled_out)
    assert (found.indices.tolist(), found.reasons) == ([], [])


@pytest.mark.parametrize("method", [herding, typiclust, probcover, k_center])
def test_blocks_of_any_size_give_the_same(method: Callable) -> None:
    small = partial(method, points(), 10, LABELLED, block=130)
    assert small().indices.tolist() == method(points(), 10, LABELLED).indices.tolist()


def test_samples_of_many_images_are_chosen_from_nearly_as_well_as_all() -> None:
    features = points(2000)
    unit = unit_features(features).numpy()
    kernel = np.exp(2 * unit @ unit.T - 2)

    def coverage(labelled: np.ndarray, most: int) -> float:
        chosen = herding(features, 6, labelled, seed=1, most=most).indices
        return float(kernel[[*labelled, *chosen]].max(axis=0).mean())

    for labelled in (LABELLED[:0], np.arange(5)):
        best = coverage(labelled, 2000)
        at_random = kernel[[*labelled, *range(100, 106)]].max(axis=0).mean()
        assert best >= coverage(labelled, 500) > best - 0.2 * (best - at_random)
    exact, sampled = (probcover(features, 6, most=most) for most in (2000, 500))
    assert len(set(exact.indices.tolist())) == len(set(sampled.indices.tolist())) == 6
    assert "of 500 sampled images within" in sampled.reasons[0]
    first = typiclust(features, 6, large=2000).indices[0]
    assert typiclust(features, 6, large=100).indices[0] != first


@pytest.mark.parametrize(
    "method",
    [partial(herding, most=50), partial(probcover, most=50), partial(typiclust, large=20)],
)
def test_sampled_choices_repeat_themselves_and_know_what_may_be_chosen(method: Callable) -> None:
    features, labelled = points(400), np.arange(390)
    one, other = (method(features, 8, labelled, seed=3).indices for _ in range(2))
    assert one.tolist() == other.tolist()
    assert len(set(one.tolist())) == 8
    assert one.min() >= 390
    spread = [method(features, 8, LABELLED, seed=seed).indices.tolist() for seed in (3, 4)]
    assert spread[0] != spread[1]
    assert not {*spread[0], *spread[1]} & {*LABELLED.tolist()}
    groups = np.arange(400) % 40
    candidates = Candidates(400, LABELLED, groups=groups, per_group=1)
    found = method(features, 40, LABELLED, None, 0, candidates).indices
    assert sorted({*groups[found], *groups[LABELLED]}) == list(range(40))
    assert len(found) == len({*groups[found]})


def test_samples_share_what_they_can() -> None:
    every = sample(np.ones(50, bool), 20, seed=2)
    even = sample(np.arange(50) % 2 == 0, 20, seed=2)
    assert len(set(every.tolist())) == 20
    assert {i for i in every.tolist() if i % 2 == 0} <= set(even.tolist())
    assert not (even % 2).any()
    assert sample(np.arange(50) < 7, 20, seed=2).tolist() == list(range(7))


def test_coverage_and_its_knee() -> None:
    features = points()
    kernel = np.exp(-(distances(features) ** 2))
    order, unit = np.array([5, 9, 30]), unit_features(features)
    curve = coverage_curve(unit[:40], unit[order], gaussian(1.0), torch.zeros(40))
    expected = [0.0, *(kernel[order[: n + 1]].max(axis=0)[:40].mean() for n in range(3))]
    assert curve == pytest.approx(expected, abs=1e-5)
    nearest = distances(features)[order].argmin(axis=0)
    assert nearest_of(unit, order, block=50).tolist() == nearest.tolist()
    for values, bend in (([0, 5, 8, 9, 9.5, 10], 2), ([0, 1, 2, 3], 0)):
        with trying(values):
            assert knee(values) == bend
