"""The probes: kNN and a linear classifier on the frozen features of labelled images.

``probe``, ``compare`` and online evaluation all measure an encoder with ``evaluate_features``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import UserError
from vissl_lite.evaluation.features import extract
from vissl_lite.evaluation.knn import knn_predict
from vissl_lite.inference import check_outputs
from vissl_lite.transfer.classification.data import Part
from vissl_lite.transfer.classification.linear_head import fit_linear

ProbeName = Literal["knn", "linear"]
PROBES: tuple[ProbeName, ...] = ("knn", "linear")


@dataclass(frozen=True)
class LabelledFeatures:
    """Features of some labelled images.

    Attributes:
        by_layer: ``(N, D)`` float32 by layer; ``last`` is the encoder's output.
        labels: ``(N,)`` class indices.
        groups: ``(N,)`` group of each image, such as its patient; None for images that are all
            apart.
    """

    by_layer: dict[str, np.ndarray]
    labels: np.ndarray
    groups: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def of_layer(self, layer: str) -> tuple[np.ndarray, np.ndarray]:
        """Features of a layer, and labels. No images have features of no particular length."""
        features = self.by_layer[layer] if len(self) else np.empty((0, 1), np.float32)
        return features, self.labels


NO_FEATURES = LabelledFeatures({}, np.empty(0, np.int64))


@dataclass(frozen=True)
class ProbeScore:
    """Scores of a probe on images that it was not fitted to.

    Attributes:
        right: ``(M,)`` bool: which of them it classifies correctly.
        chosen: Hyperparameters chosen on held-out training images, such as ``{"penalty": 0.01}``.
        one_class: Index of the class that it predicts for all of them; None if there are several.
    """

    right: np.ndarray
    chosen: dict[str, float] = field(default_factory=dict)
    one_class: int | None = None

    @property
    def accuracy(self) -> float:
        """Share of the images that are classified correctly."""
        return float(self.right.mean())


def extract_part(
    encoder: Encoder,
    part: Part,
    layers: bool = False,
    progress: Callable[[int], None] | None = None,
    groups: np.ndarray | None = None,
) -> LabelledFeatures:
    """Features of one part of a labelled data set, without the images that can't be read.

    Args:
        encoder: Frozen encoder.
        part: Images and their classes; may be empty.
        layers: Also extract the features of every stage.
        progress: Called with the number of images done since the last call.
        groups: Group of each image; see ``LabelledDataset.groups``.

    Raises:
        UserError: None of the images can be read, or the features are not finite numbers.
    """
    if len(part) == 0:
        return NO_FEATURES
    by_layer, good = extract(encoder, part.paths, layers, progress)
    check_outputs(by_layer.values(), f"some of the {len(part.paths)} images")
    groups = None if groups is None else groups[good]
    return LabelledFeatures(by_layer, part.labels[good], groups)


def evaluate_features(
    probe: ProbeName,
    train: LabelledFeatures,
    test: LabelledFeatures,
    k: int = 20,
    temperature: float = 0.07,
    layer: str = "last",
) -> ProbeScore:
    """Fit a probe to training images, and score it on test images.

    The linear probe chooses its penalty by cross-validation of the training images, over groups if
    there are any. Test labels are
    only used to count.

    Args:
        probe: ``knn`` or ``linear``.
        train: Training images.
        test: Test images.
        k: Number of neighbors that vote.
        temperature: A neighbor of similarity s votes with weight exp(s / temperature).
        layer: Layer whose features are used.

    Raises:
        UserError: The training images are of one class only, for the linear probe.
    """
    (x_train, y_train), (x_test, y_test) = train.of_layer(layer), test.of_layer(layer)
    if probe == "linear":
        if len(np.unique(y_train)) < 2:
            raise UserError(
                "the training images that can be read are of one class only: a linear probe needs "
                "two or more"
            )
        classes = int(max(y_train.max(), y_test.max())) + 1
        head, chosen = fit_linear(x_train, y_train, classes, groups=train.groups)
        penalty = {} if chosen is None else {"penalty": chosen.penalty}
        return score_predictions(head.logits(x_test).argmax(axis=1), y_test, penalty)
    return score_predictions(knn_predict(x_train, y_train, x_test, k, temperature), y_test, {})


def score_predictions(
    predicted: np.ndarray, true: np.ndarray, chosen: dict[str, float]
) -> ProbeScore:
    """Score the predictions of a probe.

    Args:
        predicted: ``(M,)`` class indices.
        true: ``(M,)`` class indices.
        chosen: Hyperparameters that were chosen.
    """
    found = np.unique(predicted)
    one_class = int(found[0]) if len(found) == 1 and len(np.unique(true)) > 1 else None
    return ProbeScore(predicted == true, chosen, one_class)
