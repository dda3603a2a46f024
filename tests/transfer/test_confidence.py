"""The precision of confident predictions, and the confidence that is chosen by it."""

import json
import math
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from scipy.stats import binomtest

from vissl_lite.errors import UserError
from vissl_lite.transfer.confidence import (
    CONFIDENCE,
    CUTOFFS,
    Confidence,
    calibrated,
    fit_temperature,
    wilson,
)


@pytest.mark.parametrize(("right", "count"), [(0, 5), (7, 9), (60, 60), (951, 1000)])
def test_the_bound_is_wilsons_interval(right: int, count: int) -> None:
    test = binomtest(right, count, alternative="greater")
    expected = test.proportion_ci(0.95, method="wilson").low
    assert wilson(right / count, count) == pytest.approx(expected, abs=1e-4)


def measured(
    confidences: list[float],
    right: list[bool],
    images: list[str] | None = None,
    labels: list[int] | None = None,
) -> Confidence:
    names = images or [str(i) for i in range(len(right))]
    return Confidence.measured(
        "images",
        np.array(confidences),
        np.array(right),
        np.array(names),
        1.5,
        None if labels is None else np.array(labels),
    )


def test_predictions_are_counted_from_each_confidence_on() -> None:
    random = np.random.default_rng(0)
    confidences, right = random.random(50), random.random(50) < 0.5
    images = [str(n) for n in random.integers(0, 9, 50)]
    found = measured(confidences.tolist(), right.tolist(), images)
    for number, cutoff in enumerate(CUTOFFS):
        sure = [i for i in range(50) if confidences[i] >= cutoff]
        assert found.predictions[number] == len(sure)
        assert found.right[number] == sum(bool(right[i]) for i in sure)
        assert found.images[number] == len({images[i] for i in sure})
    at = found.at(0.333)
    assert (at.value, at.predictions, at.temperature) == (0.333, found.predictions[33], 1.5)


def test_the_lowest_confidence_is_chosen_whose_precision_is_certain() -> None:
    # from 0.5 on 80 of 100 are right, from 0.7 on 80 of 80
    found = measured([0.7] * 80 + [0.5] * 20, [True] * 80 + [False] * 20)
    assert found.choose(0.9).value == 0.7  # the first that leaves out those of 0.5
    assert found.choose(0.9).lower_bound == wilson(1, 80) > 0.9
    assert found.choose(0.7).value == 0.5


def test_no_confidence_below_those_that_were_held_out_is_chosen() -> None:
    # 0.83 is taken and not 0, although no prediction is wrong
    chosen = measured([0.999, 0.95, 0.837, 0.9] * 3, [True] * 12).choose(0.95)
    assert (chosen.value, chosen.predictions) == (0.83, 12)
    assert measured([1.0] * 60, [True] * 60).choose(0.95).value == CUTOFFS[-1]


def test_a_precision_that_is_too_low_everywhere_is_rarely_proven() -> None:
    """Although many confidences are tried: about one time in twenty, as 95 % confidence has it."""
    random, wrong = np.random.default_rng(0), 0
    for _ in range(200):
        confidences, right = random.random(400), random.random(400) < 0.949
        with suppress(UserError):  # not even as observed
            chosen = measured(confidences.tolist(), right.tolist()).choose(0.95)
            wrong += chosen.lower_bound >= 0.95
    assert 2 <= wrong <= 20


def test_confidences_below_one_that_fails_are_not_tried() -> None:
    # of the most confident 120 one in ten is wrong, of all 1,000 one in 83
    confidences = [0.9] * 120 + [0.5] * 880
    right = [False] * 12 + [True] * 988
    chosen = measured(confidences, right).choose(0.95)
    assert (chosen.value, chosen.precision) == (0.5, 0.988)
    assert chosen.lower_bound == wilson(0.9, 120) < 0.95  # observed, but not proven
    assert (
        measured(confidences, [True] * 120 + [False] * 12 + [True] * 868).choose(0.95).value == 0.5
    )


@pytest.mark.parametrize(
    ("confidence", "raised"),
    [(0.7, {1: 0.9}), (0.95, {1: math.inf})],
    ids=["higher", "left out"],
)
def test_a_rare_class_with_many_errors_has_a_confidence_of_its_own(
    confidence: float, raised: dict[int, float]
) -> None:
    # class 0: 200 of 200 right; class 1: 12 wrong, and 12 right ones of 0.9; class 2: 4 of 8 wrong
    confidences = [0.7] * 200 + [confidence] * 12 + [0.9] * 12 + [0.7] * 8
    right = [True] * 200 + [False] * 12 + [True] * 12 + [True, False] * 4
    labels = [0] * 200 + [1] * 24 + [2] * 8
    chosen = measured(confidences, right, labels=labels).choose(0.85)
    assert chosen.value == 0.7
    assert chosen.raised == raised  # too little is known of class 2
    expected = [0.7, next(iter(raised.values())), 0.7]
    assert chosen.of(np.array([0, 1, 2])).tolist() == expected
    assert measured(confidences, right).choose(0.85).raised == {}
    assert measured(confidences, right, labels=labels).at(0.5).raised == {}


def test_with_few_images_the_observed_precision_decides() -> None:
    found = measured([0.7] * 20 + [0.5] * 5, [True] * 20 + [False] * 5)
    chosen = found.choose(0.95)
    assert chosen.value == 0.7
    assert chosen.precision == 1
    assert chosen.lower_bound < 0.95  # which the command warns of
    with pytest.raises(UserError, match="can't be judged by 9 held-out images"):
        measured([0.7] * 9, [True] * 9).choose(0.95)
    # all boxes of an image count as one observation
    with pytest.raises(UserError, match="can't be judged by 2 held-out images"):
        measured([0.7] * 90, [True] * 90, ["a", "b"] * 45).choose(0.95)
    with pytest.raises(UserError, match=r"the best is 0\.800 from a confidence of 0 on"):
        measured([0.7] * 20, [True] * 16 + [False] * 4).choose(0.95)


@pytest.mark.parametrize("several", [False, True])
def test_predictions_that_are_all_right_are_not_all_certain(several: bool) -> None:
    labels = torch.arange(60) % 2
    target = F.one_hot(labels, 2)
    gaps = torch.linspace(1, 5, 60, dtype=torch.float64)[:, None]
    temperature = calibrated((target - 0.5) * gaps, target if several else labels, 60)
    confidence = (gaps / (2 if several else 1) / temperature).sigmoid()
    assert confidence.max() < 0.9999
    assert 0.7 < confidence.min() < 0.95
    # but with a wrong one the temperature is about that without smoothing
    labels[0] = 1
    plain, _ = fit_temperature((target - 0.5) * gaps, labels, F.cross_entropy)
    assert calibrated((target - 0.5) * gaps, labels, 6000) == pytest.approx(plain, rel=0.1)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    assert Confidence.load(tmp_path) is None
    found = measured([0.7] * 20, [True] * 20, labels=[3] * 20)
    assert set(found.by_class) == {3}
    found.save(tmp_path)
    assert Confidence.load(tmp_path) == found
    content = json.loads((tmp_path / CONFIDENCE).read_text())
    classes = [("by_class", {name: value}) for name, value in (("3", [[1]]), ("a", [[0]] * 3))]
    for name, value in (
        ("right", [1, 2]),
        ("temperature", 0),
        ("temperature", None),
        ("of", 3),
        *classes,
    ):
        (tmp_path / CONFIDENCE).write_text(json.dumps({**content, name: value}))
        with pytest.raises(UserError, match="is damaged"):
            Confidence.load(tmp_path)
