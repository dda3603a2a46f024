"""The linear probe: multinomial logistic regression on frozen features."""

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vissl_lite.errors import UserError

# scikit-learn itself is imported where it is used: a training without labels starts without it.
if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

# Candidates for the L2 penalty on the mean loss: lambda in mean(loss) + lambda / 2 * |weights|^2.
PENALTIES = tuple(10.0**power for power in (0, -1, -2, -3, -4, -5, -6))

DEFAULT_PENALTY = 0.01


@dataclass(frozen=True)
class LinearProbe:
    """A fitted linear probe.

    Attributes:
        penalty: The L2 penalty that did best on the validation part.
        val_accuracy: There, with that penalty; None where there are no validation images.
        test_predictions: ``(M,)`` class indices.
    """

    penalty: float
    val_accuracy: float | None
    test_predictions: np.ndarray


def linear_probe(
    train: tuple[np.ndarray, np.ndarray],
    val: tuple[np.ndarray, np.ndarray],
    test: np.ndarray,
) -> LinearProbe:
    """Fit on the training part, choose the penalty on the validation part, then refit on both.

    Features are standardized by the training part. The test part is predicted once, at the end.

    Args:
        train: ``(N, D)`` features and ``(N,)`` class indices.
        val: Likewise; may be empty where labels are too few: then the penalty is 0.01.
        test: ``(M, D)`` features; their labels never arrive here.

    Raises:
        UserError: The training images are of one class only, as when those of the others have
            gone.
    """
    if len(np.unique(train[1])) < 2:
        raise UserError(
            "the training images that can be read are of one class only: a linear "
            "probe needs two or more"
        )
    from sklearn.linear_model import LogisticRegression

    mean, scale = train[0].mean(axis=0), train[0].std(axis=0) + 1e-6

    def standardize(features: np.ndarray) -> np.ndarray:
        return ((features - mean) / scale).astype(np.float32)

    x = standardize(train[0])
    if len(val[1]) == 0:
        model = _fit(LogisticRegression(max_iter=300, tol=1e-3), DEFAULT_PENALTY, x, train[1])
        return LinearProbe(DEFAULT_PENALTY, None, model.predict(standardize(test)))
    x_val = standardize(val[0])
    best, best_accuracy = PENALTIES[0], -1.0
    model = LogisticRegression(max_iter=300, tol=1e-3, warm_start=True)
    for penalty in PENALTIES:  # strong to weak: each solution is a start close to the next
        accuracy = float((_fit(model, penalty, x, train[1]).predict(x_val) == val[1]).mean())
        if accuracy > best_accuracy:
            best, best_accuracy = penalty, accuracy
    x, y = np.concatenate([x, x_val]), np.concatenate([train[1], val[1]])
    if set(y) != set(train[1]):  # no start for it: it has other classes
        model = LogisticRegression(max_iter=300, tol=1e-3)
    return LinearProbe(best, best_accuracy, _fit(model, best, x, y).predict(standardize(test)))


def _fit(
    model: "LogisticRegression", penalty: float, x: np.ndarray, y: np.ndarray
) -> "LogisticRegression":
    from sklearn.exceptions import ConvergenceWarning

    model.C = 1 / (penalty * len(x))  # scikit-learn weighs the sum of the losses
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # accuracy settles long before
        warnings.filterwarnings("ignore", "The number of unique classes")  # one label per class
        return model.fit(x, y)
