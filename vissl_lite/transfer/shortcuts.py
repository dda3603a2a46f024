"""Shortcuts: attributes of the acquisition that predict the labels without looking at the content.

Where the images of one class come from one camera, a model can learn the camera.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import bdtrc

from vissl_lite.data.acquisition import acquisition
from vissl_lite.transfer.dataset import LabelledDataset
from vissl_lite.transfer.sources.parts import fold_numbers

log = logging.getLogger(__name__)

# Number of training images whose headers are read at most.
MAX_HEADERS = 2000

FOLDS = 5

# Of the images that always predicting the largest class gets wrong, the share that an attribute
# must get right.
MIN_GAIN = 0.2

# Probability of a warning about attributes that are random.
MAX_CHANCE = 0.001


class Shortcut(NamedTuple):
    """An attribute that predicts the labels.

    Attributes:
        attribute: Name of the attribute.
        accuracy: Share of held-out images for whose value of the attribute their class is the most
            frequent one among the other images.
        majority: Share of the largest class.
    """

    attribute: str
    accuracy: float
    majority: float


def find_shortcuts(
    attributes: Sequence[Mapping[str, str]], labels: np.ndarray, groups: np.ndarray | None = None
) -> list[Shortcut]:
    """Find attributes that predict the labels better than the largest class does.

    Better means by a fifth of the errors, and by more than chance: images that are predicted
    correctly are compared with a binomial distribution, each group of images being one trial.

    Args:
        attributes: Values of each of N images by name; missing ones count as a value.
        labels: ``(N,)`` class indices.
        groups: ``(N,)`` group of each image, such as its patient; None for images that are all
            apart.

    Returns:
        The shortcuts, the best first.
    """
    if len(labels) < 2:
        return []
    names = sorted({name for one in attributes for name in one})
    numbers = np.arange(len(labels))
    if groups is not None:
        numbers = np.unique(groups, return_inverse=True)[1]
    weights = 1 / np.bincount(numbers)[numbers]
    trials = int(numbers.max()) + 1
    folds = fold_numbers(labels, min(FOLDS, trials), 0, groups)
    chance = np.bincount(labels, weights).max() / trials
    majority = float(np.bincount(labels).max() / len(labels))
    found = []
    for name in names:
        right = _predicted([one.get(name, "") for one in attributes], labels, folds)
        # the probability of as many groups or more, rounded down, if it were chance (binomial)
        probability = bdtrc(np.floor((right * weights).sum()) - 1, trials, chance)
        gain = right.mean() - majority
        if gain >= MIN_GAIN * (1 - majority) > 0 and probability < MAX_CHANCE / len(names):
            found.append(Shortcut(name, float(right.mean()), majority))
    return sorted(found, key=lambda one: -one.accuracy)


def _predicted(values: Sequence[str], labels: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Which images have the most frequent class of their value in the other folds, ``(N,)`` bool.

    Where the value does not occur there, or classes are equally frequent, the more frequent class
    of all images counts.
    """
    numbers = np.unique(np.array(values), return_inverse=True)[1]
    right = np.zeros(len(labels), bool)
    for fold in range(int(folds.max()) + 1):
        inside, outside = folds != fold, folds == fold
        counts = np.zeros((int(numbers.max()) + 1, int(labels.max()) + 1))
        np.add.at(counts, (numbers[inside], labels[inside]), 1)
        overall = np.bincount(labels[inside], minlength=counts.shape[1]) / (len(labels) + 1)
        right[outside] = (counts + overall).argmax(axis=1)[numbers[outside]] == labels[outside]
    return right


def warn_of_shortcuts(data: LabelledDataset) -> None:
    """Log a warning if attributes of the training images predict their classes.

    Args:
        data: Labelled images; nothing is done unless each has one class.
    """
    labels, groups, paths = data.image_classes("train"), data.groups("train"), data.paths("train")
    if labels is None:
        return
    chosen = np.sort(np.random.default_rng(0).permutation(len(paths))[:MAX_HEADERS])
    found = find_shortcuts(
        [acquisition(paths[i]) for i in chosen],
        labels[chosen],
        None if groups is None else groups[chosen],
    )
    if found:
        others = [f", the {one.attribute} that of {_percent(one.accuracy)}" for one in found[1:]]
        log.warning(
            "The %(attribute)s alone predicts the class of %(accuracy)s of the training images"
            "%(others)s; the largest class has %(majority)s. A model may learn how the images were "
            "made instead of what they show.",
            {
                "attribute": found[0].attribute,
                "accuracy": _percent(found[0].accuracy),
                "others": "".join(others),
                "majority": _percent(found[0].majority),
                "attributes": {one.attribute: one.accuracy for one in found},
            },
            extra={"code": "data.shortcut"},
        )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
