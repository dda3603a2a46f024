"""The protocols of a comparison: how an encoder is judged with some labels. Test labels only count.

``knn`` and ``linear`` judge the frozen encoder, from features that are computed once; ``finetune``
trains a copy of it. What is swept (the linear probe's penalty, the learning rate of fine-tuning) is
chosen on the validation part.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np

from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import UserError
from vissl_lite.evaluation.features import extract
from vissl_lite.evaluation.probe import LabelledFeatures, ProbeName, evaluate_features
from vissl_lite.inference import check_outputs
from vissl_lite.metrics_file import MetricsFile
from vissl_lite.training.fit import TrainingFiles
from vissl_lite.training.hardware import Hardware
from vissl_lite.transfer.base import PARTS, LabelledDataset, Scores, Split, TrainedModel
from vissl_lite.transfer.finetuning import TransferSettings
from vissl_lite.transfer.tasks import AnyTask

Protocol = Literal["knn", "linear", "finetune"]


@dataclass(frozen=True)
class Score:
    """What one run of a protocol gave.

    Attributes:
        value: the figure that is compared, on the test part.
        metrics: all figures on the test part, by name.
        chosen: what the validation part chose, such as ``{"penalty": 0.01}``.
        right: ``(M,)`` bool: which test images were classified rightly, where that is the figure.
        layers: for frozen protocols, accuracy by stage, if asked for.
    """

    value: float
    metrics: dict[str, float]
    chosen: dict[str, float] = field(default_factory=dict)
    right: np.ndarray | None = None
    layers: dict[str, float] = field(default_factory=dict)


class Features:
    """The features of many images, for data sets that are parts of them.

    Args:
        encoder: whose, frozen.
        paths: the images.
        layers: those of every stage too.
        progress: called with the number of images done since the last call.

    Raises:
        UserError: an image can't be read, or the features are no finite numbers. Images that never
            could be read are left out before: one encoder must not be judged without an image that
            others are judged by.
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
            _gone([path for path, fine in zip(paths, good, strict=True) if not fine])
        check_outputs(self.by_layer.values(), f"some of the {len(paths)} images")
        self._row = {path: row for row, path in enumerate(paths)}

    def of(self, data: LabelledDataset, part: Split) -> LabelledFeatures:
        """Those of the images of a part."""
        rows = [self._row[path] for path in data.paths(part)]
        labels = data.image_classes(part)
        assert labels is not None  # else the protocol is refused
        return LabelledFeatures({k: v[rows] for k, v in self.by_layer.items()}, labels)


def _gone(paths: Sequence[str]) -> NoReturn:
    raise UserError(
        f"{len(paths)} images that could be read can't be any more, the first {paths[0]}: encoders "
        f"are compared on the same images; bring them back, and --resume goes on"
    )


def evaluate_frozen(
    protocol: ProbeName, features: Features, data: LabelledDataset, k: int = 20
) -> Score:
    """kNN or a linear probe with some of the labels; see ``evaluate_features``.

    Args:
        protocol: Which of the two.
        features: Features of the images of all parts of the data.
        data: Data set with the labels that may be used.
        k: Number of neighbors that vote.
    """
    train, val, test = (features.of(data, part) for part in PARTS)
    scores = {
        layer: evaluate_features(protocol, train, val, test, k, layer=layer)
        for layer in features.by_layer
    }
    last = scores.pop("last")
    layers = {layer: score.accuracy for layer, score in scores.items()}
    return Score(last.accuracy, {"accuracy": last.accuracy}, last.chosen, last.right, layers)


def finetune_best(
    encoder: Encoder,
    task: AnyTask,
    data: LabelledDataset,
    make_settings: Callable[[float], TransferSettings],
    rates: Sequence[float],
    hardware: Hardware,
    curves: Path,
) -> Score:
    """Fine-tune with each learning rate; score the one that the validation part finds best.

    Args:
        encoder: left as it is.
        task: what is learned.
        data: from which labels.
        make_settings: the settings with a learning rate.
        rates: learning rates; one alone is not swept.
        hardware: where.
        curves: folder for the metrics of each training.
    """
    curves.mkdir(parents=True, exist_ok=True)
    metric = task.validation_metric(data)
    best: tuple[float, float, TrainedModel] | None = None
    for rate in rates:
        file = curves / f"lr-{rate:g}.csv"
        file.unlink(missing_ok=True)  # of a run that was cut off
        metrics = MetricsFile(file)
        model: TrainedModel = task.train(
            encoder, data, make_settings(rate), hardware, TrainingFiles(metrics)
        )
        seen = [value for value in metrics.series(metric)[1] if math.isfinite(value)]
        val = max(seen, default=-math.inf)
        if best is None or val > best[0]:
            best = val, rate, model
    assert best is not None
    _, rate, model = best
    scores: Scores = task.evaluate(model, data)
    name = metric.removeprefix("val_")
    right, test = scores.right, data.paths("test")
    if right is not None and len(right) < len(test):
        _gone([path for path in test if not Path(path).is_file()] or test)
    return Score(scores.metrics[name], scores.metrics, {"lr": rate}, right)
