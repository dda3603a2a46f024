import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from vissl_lite.transfer.classification.linear_head import (
    DEFAULT_PENALTY,
    PENALTIES,
    choose_penalty,
    fit_head,
    fit_linear,
    make_folds,
)


def clouds(count: int, seed: int, noise: float, size: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Features of three classes around three corners; the other dimensions are noise."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, count)
    features = noise * random.normal(size=(count, size))
    features[np.arange(count), labels] += 1
    return features.astype(np.float32), labels


@pytest.mark.parametrize("images", [30, 300])  # fewer and more than there are features
def test_equals_a_logistic_regression_on_standardized_features(images: int) -> None:
    x, y = clouds(images, 0, 0.5, size=50)
    scale = np.maximum(x.std(axis=0), x.std(axis=0).mean())
    slow = LogisticRegression(C=1 / (0.1 * images), tol=1e-8, max_iter=5000)
    slow.fit((x - x.mean(axis=0)) / scale, y)
    test, _ = clouds(40, 1, 0.5, size=50)
    expected = slow.decision_function((test - x.mean(axis=0)) / scale)
    found = fit_head(x, y, 3, 0.1).logits(test)
    centered = found - found.mean(axis=1, keepdims=True)  # only differences of logits count
    np.testing.assert_allclose(centered, expected, atol=0.02)


def test_learns_what_is_linearly_there() -> None:
    test, y_test = clouds(200, 2, 0.15)
    head, chosen = fit_linear(*clouds(150, 0, 0.15), classes=3)
    assert (head.logits(test).argmax(axis=1) == y_test).mean() > 0.97
    assert chosen is not None
    assert chosen.accuracy > 0.95


def test_noisy_features_get_a_stronger_penalty() -> None:
    """Few noisy images in many dimensions: a weak penalty overfits, and held-out images show it."""
    _, noisy = fit_linear(*clouds(60, 0, 1.0, size=200), classes=3)
    _, clean = fit_linear(*clouds(1500, 0, 0.5, size=10), classes=3)
    assert noisy is not None
    assert clean is not None
    assert PENALTIES[0] >= noisy.penalty > clean.penalty


def test_the_penalty_is_the_best_of_all() -> None:
    """The search ends before the weakest ones, which take the longest and are worse."""
    x, y = clouds(100, 0, 0.6, size=60)
    folds = make_folds(y, 0)
    losses = {}
    for penalty in PENALTIES:
        losses[penalty] = 0.0
        for inside, outside in folds:
            logits = fit_head(x[inside], y[inside], 3, penalty).logits(x[outside])
            exponentials = np.exp(logits.astype(np.float64))
            right = exponentials[np.arange(len(outside)), y[outside]]
            losses[penalty] -= np.log(right / exponentials.sum(axis=1)).sum() / len(y)
    chosen = choose_penalty(x, y, 3, folds)
    best = min(losses, key=losses.__getitem__)
    assert chosen.penalty == best not in (PENALTIES[0], PENALTIES[-1])
    assert chosen.loss == pytest.approx(losses[best], rel=0.01)


def test_one_image_of_each_class_cannot_choose() -> None:
    head, chosen = fit_linear(np.eye(3, 20, dtype=np.float32), np.arange(3), 3)
    assert chosen is None
    fixed = fit_head(np.eye(3, 20, dtype=np.float32), np.arange(3), 3, DEFAULT_PENALTY)
    np.testing.assert_array_equal(head.weight, fixed.weight)
    assert head.logits(np.eye(3, 20)).argmax(axis=1).tolist() == [0, 1, 2]


def test_features_that_are_almost_dead_do_not_decide() -> None:
    """Rectified features that are zero in all training images but one, and large in test images."""
    x, y = clouds(60, 0, 0.3)
    test, y_test = clouds(300, 1, 0.3)
    random = np.random.default_rng(2)
    rare = np.zeros((60, 40), np.float32)
    rare[0] = 1e-3
    x = np.concatenate([x, rare], axis=1)
    alive = np.float32(random.random((300, 40)) < 0.3) * 0.5
    head, _ = fit_linear(x, y, 3)
    assert (head.logits(np.concatenate([test, alive], axis=1)).argmax(1) == y_test).mean() > 0.9


def test_a_class_without_images_is_not_predicted() -> None:
    x, y = clouds(90, 0, 0.2)
    head = fit_head(x[y > 0], y[y > 0], 3)
    assert set(head.logits(x).argmax(axis=1)) == {1, 2}


def test_several_labels_per_image_are_regressions_of_their_own() -> None:
    x, y = clouds(300, 0, 0.3)
    labels = np.stack([y == 0, y != 1, np.ones(300, bool)], axis=1).astype(np.int64)
    head, chosen = fit_linear(x, labels, 3)
    assert chosen is not None
    right = ((head.logits(x) > 0) == labels).mean(axis=0)
    assert right.min() > 0.95
    one = fit_head(x, labels, 3, 0.1)
    alone = fit_head(x, labels[:, :1], 1, 0.1)
    np.testing.assert_allclose(one.logits(x)[:, :1], alone.logits(x), atol=0.02)
