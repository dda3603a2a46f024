"""Protocols of a comparison: how an encoder is evaluated with a subset of the labels.

``knn`` and ``linear`` evaluate the frozen encoder on features that are computed once; ``finetune``
trains a copy of it. All are trained on the same labels. Hyperparameters (the penalty of the linear
probe, the learning rate of fine-tuning) are chosen on labels that are held out of a training: the
validation part, or folds of all labels. Test labels are used for scoring only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np

from vissl_lite.data.formats import is_image_path
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import UserError
from vissl_lite.evaluation.features import extract
from vissl_lite.evaluation.probe import LabelledFeatures, ProbeName, evaluate_features
from vissl_lite.inference import check_outputs
from vissl_lite.training.hardware import Hardware
from vissl_lite.transfer.base import Scores
from vissl_lite.transfer.dataset import LabelledDataset
from vissl_lite.transfer.finetuning import TransferSettings
from vissl_lite.transfer.fitting import FitFiles, fit_model
from vissl_lite.transfer.sources.parts import Split
from vissl_lite.transfer.tasks import AnyTask

Protocol = Literal["knn", "linear", "finetune"]


@dataclass(frozen=True)
class Score:
    """Result of one run of a protocol.

    Attributes:
        value: Test metric that encoders are compared by.
        metrics: All test metrics, by name.
        chosen: Hyperparameters chosen on labels held out of a training, such as
            ``{"penalty": 0.01}``.
        per_image: ``(M,)`` part of each test image in ``value``; see ``Scores``.
        layers: Accuracy by stage, for frozen encoders and if requested.
    """

    value: float
    metrics: dict[str, float]
    chosen: dict[str, float] = field(default_factory=dict)
    per_image: np.ndarray | None = None
    layers: dict[str, float] = field(default_factory=dict)


class Features:
    """Features of many images, computed once for all subsets of them.

    Args:
        encoder: Frozen encoder.
        paths: Paths of the images.
        layers: Also compute the features of every stage.
        progress: Called with the number of images processed since the last call.

    Raises:
        UserError: An image can't be read, or the features are not finite. Unreadable images are
            excluded earlier; one that becomes unreadable later is an error, as all encoders must be
            evaluated on the same images.
    """

    def __init__(
        self,
        encoder: Encoder,
        paths: Sequence[str],
        layers: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.by_layer, good = extract(encoder, paths, layers, progress)
        if not good.all():
            _raise_missing([path for path, fine in zip(paths, good, strict=True) if not fine])
        check_outputs(self.by_layer.values(), f"some of the {len(paths)} images")
        self._row = {path: row for row, path in enumerate(paths)}

    def of(self, paths: Sequence[str]) -> np.ndarray:
        """``(N, D)`` features of the last layer of some of the images."""
        return self.by_layer["last"][[self._row[path] for path in paths]]

    def select(self, data: LabelledDataset, part: Split) -> LabelledFeatures:
        """Features and labels of one part of a data set."""
        rows = [self._row[path] for path in data.paths(part)]
        labels = data.image_classes(part)
        assert labels is not None  # Plan.choose_protocols ensures it
        by_layer = {layer: features[rows] for layer, features in self.by_layer.items()}
        return LabelledFeatures(by_layer, labels, data.groups(part))


def _raise_missing(paths: Sequence[str]) -> NoReturn:
    raise UserError(
        f"{len(paths)} images can no longer be read, the first {paths[0]}: all encoders are "
        f"compared on the same images; restore them and continue with --resume"
    )


def evaluate_frozen(
    protocol: ProbeName, features: Features, data: LabelledDataset, k: int = 20
) -> Score:
    """Evaluate kNN or a linear probe with a subset of the labels; see ``evaluate_features``.

    Args:
        protocol: ``knn`` or ``linear``.
        features: Features of the images of all parts of the data.
        data: Data set with the labels to use; the probe is fitted to the training part.
        k: Number of neighbors that vote.
    """
    train, test = features.select(data, "train"), features.select(data, "test")
    if len(np.unique(train.labels)) < 2:
        # A few images that were chosen may be of one class. Any probe then always predicts it.
        protocol = "knn"
    scores = {
        layer: evaluate_features(protocol, train, test, k, layer=layer)
        for layer in features.by_layer
    }
    last = scores.pop("last")
    layers = {layer: score.accuracy for layer, score in scores.items()}
    return Score(last.accuracy, {"accuracy": last.accuracy}, last.chosen, last.right, layers)


def finetune_best(
    encoder: Encoder,
    task: AnyTask,
    data: LabelledDataset,
    settings: TransferSettings,
    rates: Sequence[float],
    hardware: Hardware,
    curves: Path,
) -> Score:
    """Fine-tune an encoder with hyperparameters chosen for it, and score it on the test images.

    Args:
        encoder: Encoder to start from; it is not changed.
        task: Task to fine-tune for.
        data: Labelled data set.
        settings: Training settings.
        rates: Candidate learning rates.
        hardware: Devices and precision.
        curves: Folder for the metrics of each training.
    """
    curves.mkdir(parents=True, exist_ok=True)
    fitted = fit_model(task, encoder, data, settings, rates, hardware, FitFiles(curves))
    scores: Scores = task.evaluate(fitted.model, data)
    per_image, test = scores.per_image, data.paths("test")
    if per_image is not None and len(per_image) < len(test):
        _raise_missing([path for path in test if not is_image_path(path)] or test)
    name = task.metric_names(data)[0]
    parts = {"train": fitted.train_metrics, "val": fitted.chosen.metrics}
    metrics = scores.metrics | {
        f"{part}_{name}": found[name] for part, found in parts.items() if name in found
    }
    chosen = {name: float(value) for name, value in fitted.chosen.as_dict().items()}
    return Score(scores.metrics[name], metrics, chosen, per_image)
