"""The classifier, a timm model with named classes, and its model folder."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vissl_lite.encoders.config import ENCODER_CONFIG
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.encoders.folder import load_model, save_model
from vissl_lite.errors import UserError
from vissl_lite.inference import predict_images
from vissl_lite.transfer.classification.data import LabelledImages
from vissl_lite.transfer.classification.metrics import (
    TestScores,
    mean_average_precision,
    score_one,
    score_several,
)
from vissl_lite.transfer.finetuning import TransferModel, model_folder
from vissl_lite.transfer.jackknife import pseudo_values


class Classifier(TransferModel):
    """A timm model with a classifier, and what is needed to use it.

    Args:
        encoder: Becomes a part of it, and its timm model gets a new classifier if it has none for
            these classes.
        classes: K names.
        multi_label: Whether an image may have several: the probability of each is then the sigmoid
            of its logit, else all of them are a softmax.

    Attributes:
        fitted: Whether the last layer is fitted to labels before the training.
    """

    encoder: Encoder

    def __init__(self, encoder: Encoder, classes: Sequence[str], multi_label: bool = False) -> None:
        super().__init__()
        self.encoder, self.classes, self.multi_label = encoder, list(classes), multi_label
        self.fitted = False
        if self.network.num_classes != len(self.classes):
            self.network.reset_classifier(len(self.classes))

    @property
    def network(self) -> Any:
        """The timm model."""
        return self.encoder.model

    def forward(self, images: Tensor) -> Tensor:
        """``(B, K)`` logits of normalized images."""
        logits: Tensor = self.network(images)
        return logits

    def probabilities(self, logits: Tensor) -> Tensor:
        """``(B, K)`` probabilities of logits."""
        return logits.sigmoid() if self.multi_label else logits.softmax(dim=1)


def pooled_features(classifier: Classifier, paths: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Input of the last layer, ``(N, D)``, for the readable images, and ``(M,)`` bool: which."""
    network, encoder = classifier.network, classifier.encoder

    def compute(images: Tensor) -> list[Tensor]:
        return [network.forward_head(network.forward_features(images), pre_logits=True)]

    (features,), good = predict_images(classifier, compute, encoder, paths)
    return features.numpy(), good


def class_logits(
    classifier: Classifier, paths: Sequence[str], progress: Callable[[int], None] | None = None
) -> tuple[Tensor, np.ndarray]:
    """``(N, K)`` logits of the readable images, and ``(M,)`` bool: which of all M these are."""
    (logits,), good = predict_images(
        classifier,
        lambda images: [classifier(images)],
        classifier.encoder,
        paths,
        progress,
    )
    return logits, good


def margin_uncertainty(probabilities: Tensor, multi_label: bool) -> Tensor:
    """1 minus the difference of the two largest probabilities (Scheffer et al. 2001).

    Args:
        probabilities: ``(N, K)``.
        multi_label: Whether an image may have several labels: each class is then a decision between
            yes and no, and the mean over classes is taken.

    Returns:
        ``(N,)`` from 0 to 1.
    """
    if multi_label:
        return 1 - (2 * probabilities - 1).abs().mean(dim=1)
    if probabilities.shape[1] == 1:
        return torch.zeros(len(probabilities))
    first, second = probabilities.topk(2, dim=1).values.unbind(dim=1)
    return 1 - (first - second)


def score_classifier(classifier: Classifier, data: LabelledImages) -> TestScores:
    """Score a classifier on the test part.

    Args:
        classifier: Classifier from ``train_classifier``.
        data: Labelled images; the test part is used.
    """
    logits, good = class_logits(classifier, data.test.paths)
    target = torch.from_numpy(data.test.labels[good])
    if not data.multi_label:
        return score_one(logits, target, data.classes)
    scores, units = score_several(logits, target, data.classes), data.sampling_units()
    assert units is not None
    per_image = pseudo_values(
        lambda kept: mean_average_precision(logits[kept], target[kept]), units[good]
    )
    return replace(scores, per_image=per_image)


def save_classifier(classifier: Classifier, folder: Path, about: dict[str, Any]) -> None:
    """Write a model folder in timm's format.

    Args:
        classifier: Classifier to save.
        folder: Folder to write; created if it is missing.
        about: Record of the training.
    """
    about = {**about, "multi_label": classifier.multi_label}
    save_model(classifier.encoder, folder, about, classifier.classes)


def load_classifier(source: Path) -> Classifier:
    """Load a folder written by ``save_classifier``.

    Args:
        source: A run of ``finetune``, or the ``model`` folder in it.

    Raises:
        UserError: There is no classifier, or it is damaged.
    """
    folder = model_folder(source)
    if not (folder / ENCODER_CONFIG).is_file():
        raise UserError(f"{folder} holds no classifier")
    encoder, config = load_model(folder)
    names, about = config.get("label_names"), config.get("vissl_lite", {})
    if names is None or encoder.model.num_classes != len(names):
        raise UserError(f"{folder} is not a classifier: its config.json names no classes")
    multi_label = about.get("multi_label", False)
    if not isinstance(multi_label, bool):
        raise UserError(
            f"{folder / ENCODER_CONFIG} is damaged: multi_label is neither true nor false"
        )
    return Classifier(encoder, names, multi_label)
