import numpy as np

from vissl_lite.evaluation.linear import PENALTIES, linear_probe


def clouds(count: int, seed: int, noise: float, size: int = 20):
    """Features of three classes around three corners; the other dimensions are noise."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, count)
    features = noise * random.normal(size=(count, size))
    features[np.arange(count), labels] += 1
    return features.astype(np.float32), labels


def test_learns_what_is_linearly_there() -> None:
    test, y_test = clouds(200, 2, 0.15)
    fitted = linear_probe(clouds(100, 0, 0.15), clouds(60, 1, 0.15), test)
    assert (fitted.test_predictions == y_test).mean() > 0.97
    assert fitted.penalty in PENALTIES


def test_the_penalty_is_the_one_that_is_best_on_validation_data() -> None:
    """Few noisy images in many dimensions: a weak penalty overfits, and validation shows it."""
    train, val = clouds(30, 0, 1.0, size=200), clouds(300, 1, 1.0, size=200)
    noisy = linear_probe(train, val, val[0])
    clean = linear_probe(clouds(3000, 0, 0.5, 10), clouds(300, 1, 0.5, 10), val[0][:, :10])
    assert noisy.penalty > clean.penalty
    assert noisy.val_accuracy is not None


def test_works_without_validation_images() -> None:
    test, y_test = clouds(100, 2, 0.1)
    nothing = np.empty((0, 20), np.float32), np.empty(0, np.int64)
    fitted = linear_probe(clouds(30, 0, 0.1), nothing, test)
    assert fitted.val_accuracy is None
    assert (fitted.test_predictions == y_test).mean() > 0.95
