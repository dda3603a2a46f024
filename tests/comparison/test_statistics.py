import numpy as np
import pytest
from scipy import stats

from vissl_lite.comparison.statistics import Difference, Runs, difference, equivalent_labels


def runs(values: list[float]) -> Runs:
    return Runs(np.array(values))


def test_over_seeds_alone_it_is_the_paired_t_interval() -> None:
    arm, baseline = [0.61, 0.66, 0.70, 0.64], [0.58, 0.60, 0.69, 0.57]
    found = difference([runs(arm)], [runs(baseline)])
    expected = stats.ttest_rel(arm, baseline).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.mean == pytest.approx(np.mean(arm) - np.mean(baseline))


def test_seeds_that_agree_leave_the_chance_of_the_test_images() -> None:
    random = np.random.default_rng(0)
    right = random.random((1, 400)) < 0.7
    other = random.random((1, 400)) < 0.6
    arm = Runs(np.repeat(right.mean(), 3), np.repeat(right, 3, axis=0))
    baseline = Runs(np.repeat(other.mean(), 3), np.repeat(other, 3, axis=0))
    found = difference([arm], [baseline])
    each = right[0].astype(float) - other[0]
    half = 1.959964 * each.std(ddof=1) / np.sqrt(400)
    assert found.high - found.mean == pytest.approx(half, rel=1e-5)
    # the same without pairs: images that are hard for both would widen it
    doubled = difference([arm], [arm])
    assert (doubled.low, doubled.high) == (0, 0)


def test_both_sources_add_in_squares_and_amounts_are_averaged() -> None:
    random = np.random.default_rng(1)

    def made(rate: float) -> Runs:
        right = random.random((3, 200)) < rate
        return Runs(right.mean(axis=1), right)

    arms, baselines = [made(0.7), made(0.9)], [made(0.5), made(0.6)]
    found = difference(arms, baselines)
    by_seed = (arms[0].values - baselines[0].values + arms[1].values - baselines[1].values) / 2
    seeds = difference([runs(by_seed.tolist())], [runs([0.0, 0.0, 0.0])])
    right = np.array([[one.per_image for one in both] for both in (arms, baselines)], float)
    each = (right[0] - right[1]).mean(axis=(0, 1))
    images = 1.959964 * each.std(ddof=1) / np.sqrt(200)
    assert found.mean == pytest.approx(by_seed.mean())
    assert (found.high - found.mean) ** 2 == pytest.approx(
        (seeds.high - seeds.mean) ** 2 + images**2, rel=1e-5
    )


def grouped(random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Groups of 1 to 8 images, and differences per image that are alike within a group."""
    groups = np.repeat(np.arange(count), random.integers(1, 9, count))
    shift = random.normal(0.05, 0.3, count)[groups]
    return groups, np.clip(np.round(shift + random.normal(0, 0.4, len(groups))), -1, 1)


def runs_of(difference: np.ndarray) -> tuple[Runs, Runs]:
    """Runs of two encoders, three seeds that agree, with these differences per image."""
    right = np.repeat([difference >= 0], 3, axis=0), np.repeat([difference <= 0], 3, axis=0)
    ours, theirs = (Runs(one.mean(axis=1), one) for one in right)
    return ours, theirs


def test_over_groups_it_agrees_with_a_slow_version() -> None:
    random = np.random.default_rng(4)
    groups, each = grouped(random, 30)
    ours, theirs = runs_of(each)
    found = difference([ours], [theirs], groups=np.array([f"p{g}" for g in groups]))
    total = 0.0
    for group in range(30):
        total += sum(each[i] - each.mean() for i in range(len(each)) if groups[i] == group) ** 2
    error = (30 / 29 * total) ** 0.5 / len(each)
    assert found.high - found.mean == pytest.approx(stats.t.ppf(0.975, 29) * error)
    # resampling whole groups gives the same standard error, but for chance and a factor 29 / 30
    means = []
    for _ in range(1000):
        drawn = random.integers(0, 30, 30)
        means.append(np.concatenate([each[groups == group] for group in drawn]).mean())
    assert np.std(means) == pytest.approx(error, rel=0.08)
    assert found.mean == pytest.approx(each.mean())


def test_groups_of_one_image_are_images_and_one_group_gives_no_interval() -> None:
    random = np.random.default_rng(5)
    each = random.integers(-1, 2, 4000).astype(float)
    ours, theirs = runs_of(each)
    plain = difference([ours], [theirs])
    alone = difference([ours], [theirs], groups=np.arange(4000))
    assert alone.high == pytest.approx(plain.high, rel=1e-3)  # t is nearly normal
    ours, theirs = runs_of(each + 0.5)
    assert difference([ours], [theirs]).verdict == "helped"
    one = difference([ours], [theirs], groups=np.zeros(4000, int))
    assert (one.low, one.high, one.verdict) == (None, None, "no difference")


@pytest.mark.slow
def test_the_interval_over_groups_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(6)
    truth = np.mean([grouped(random, 400)[1].mean() for _ in range(300)])
    covered = {True: 0, False: 0}
    for _ in range(400):
        groups, each = grouped(random, 15)
        ours, theirs = runs_of(each)
        for by_group in covered:
            found = difference([ours], [theirs], groups=groups if by_group else None)
            covered[by_group] += found.low <= truth <= found.high
    assert covered[True] / 400 > 0.91
    assert covered[False] / 400 < 0.85  # which is why


@pytest.mark.slow
def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Runs drawn with known accuracies: 95 % intervals hold the true difference about 95 times."""
    random = np.random.default_rng(2)
    covered, trials = 0, 300
    for _ in range(trials):
        hard = random.normal(size=120)  # images are hard for both arms alike
        shift = random.normal(0, 0.3, size=(2, 3, 1))  # seeds differ
        right = random.normal(size=(2, 3, 120)) < hard + shift + np.array([0.4, 0.0])[:, None, None]
        arm, baseline = (Runs(one.mean(axis=1), one) for one in right)
        # accuracy over all images there could be: P(noise - image - seed < bonus)
        spread = np.sqrt(1 + 1 + 0.09)
        truth = stats.norm.cdf(0.4 / spread) - stats.norm.cdf(0)
        found = difference([arm], [baseline])
        covered += found.low <= truth <= found.high
    assert covered / trials > 0.92


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.01, 0.2, "helped"), (-0.2, -0.01, "hurt"), (-0.01, 0.2, "no difference")],
)
def test_the_verdict_is_the_side_of_zero(low: float, high: float, verdict: str) -> None:
    assert Difference((low + high) / 2, low, high).verdict == verdict


def test_what_labels_are_worth() -> None:
    labels, curve = [10, 100, 1000], [0.2, 0.4, 0.8]
    assert equivalent_labels(labels, curve, 0.3) == (pytest.approx(10**1.5), True)
    assert equivalent_labels(labels, curve, 0.4) == (pytest.approx(100), True)
    assert equivalent_labels(labels, curve, 0.7) == (pytest.approx(10**2.75), True)
    assert equivalent_labels(labels, curve, 0.2) == (pytest.approx(10), True)
    assert equivalent_labels(labels, curve, 0.9) == (1000, False)  # more than the curve tells
    assert equivalent_labels(labels, curve, 0.1) is None
    assert equivalent_labels([10], [0.2], 0.3) is None  # one point is no curve


def test_a_curve_that_sags_is_made_monotone() -> None:
    found = equivalent_labels([10, 100, 1000], [0.3, 0.2, 0.6], 0.3)
    assert found is not None
    # the first two points become 0.25 each: 0.3 is reached after them
    assert 100 < found[0] < 1000
