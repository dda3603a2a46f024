"""Classification: fine-tune an encoder, whole or frozen, on labelled images."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_confusion_matrix,
    multiclass_f1_score,
)

from vissl_lite.data.labelled import LabelledImages
from vissl_lite.data.stream import Batch, ViewDataset
from vissl_lite.data.views import Views, crop_decode_size, flip, random_crop
from vissl_lite.encoder import Encoder, Normalize
from vissl_lite.encoder_folder import load_model
from vissl_lite.errors import UserError
from vissl_lite.inference import run_over
from vissl_lite.optim import build_optimizer
from vissl_lite.run import MetricsFile
from vissl_lite.training.hardware import Hardware
from vissl_lite.transfer.base import Judgement, TransferSettings, train


@dataclass(frozen=True, kw_only=True)
class ClassifierSettings(TransferSettings):
    """How to train a classifier.

    Attributes:
        label_smoothing: share of the target that is spread over all classes (Szegedy et al. 2016).
        balanced: sample all classes equally often.
    """

    label_smoothing: float = 0.1
    balanced: bool = False


class Classifier(pl.LightningModule):
    """A timm model with a classifier, and how it is trained.

    Args:
        model: a timm model with K classes.
        normalize: for its images.
        labels: ``(N,)`` class indices of the training images.
        settings: how to train it.
    """

    def __init__(
        self, model: Any, normalize: Normalize, labels: np.ndarray, settings: ClassifierSettings
    ) -> None:
        super().__init__()
        self.model, self.normalize, self.settings = model, normalize, settings
        self.labels: Tensor
        self.register_buffer("labels", torch.from_numpy(labels), persistent=False)
        if settings.frozen:
            model.requires_grad_(False)
            model.get_classifier().requires_grad_(True)

    def train(self, mode: bool = True) -> "Classifier":
        super().train(mode)
        if self.settings.frozen:
            self.model.eval()  # a frozen encoder's norms and dropout stand still too
        return self

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits = self.model(self.normalize(batch.views[0])).float()
        target = self.labels[batch.indices]
        loss = F.cross_entropy(logits, target, label_smoothing=self.settings.label_smoothing)
        self.log("loss", loss.detach())
        return loss

    def configure_optimizers(self) -> Optimizer:
        return build_optimizer(self.model, self.settings.optimizer)


def classifier_views(size: int, smallest_crop: float, upright: bool) -> Views:
    """One training view: a random crop, perhaps flipped.

    Args:
        size: side in pixels.
        smallest_crop: smallest share of the image's area.
        upright: whether the images have an up; see ``flip``.
    """
    one = [random_crop(size, smallest_crop), flip(upright)]
    return Views([one], shortest=crop_decode_size(size, smallest_crop))


def train_classifier(
    encoder: Encoder,
    data: LabelledImages,
    settings: ClassifierSettings,
    hardware: Hardware | None = None,
    metrics: MetricsFile | None = None,
    title: str = "finetune",
) -> Any:
    """Fine-tune a copy of an encoder. The test part is not looked at.

    Args:
        encoder: left as it is.
        data: trained on ``train``; the weights with the best accuracy on ``val`` are kept, the
            last ones where ``val`` is empty.
        settings: how.
        hardware: where; default one device.
        metrics: where what is logged goes.
        title: of the progress bar.

    Returns:
        A timm model with a class for each of the data's.

    Raises:
        UserError: the batch is larger than the training part.
    """
    batch_size = settings.batch(len(data.train), usual=64)
    torch.manual_seed(settings.seed)  # the new classifier's weights
    model = copy.deepcopy(encoder).model
    model.reset_classifier(len(data.classes))
    normalize = Normalize(encoder.mean, encoder.std)
    task = Classifier(model, normalize, data.train.labels, settings)
    views = classifier_views(encoder.image_size, settings.smallest_crop, settings.upright)
    dataset = ViewDataset(data.train.paths, views, settings.seed)

    def judge() -> Judgement:
        logits, good = class_logits(model, normalize, data.val.paths, encoder.image_size)
        target = torch.from_numpy(data.val.labels[good])
        loss = float(F.cross_entropy(logits, target))
        accuracy = float((logits.argmax(dim=1) == target).float().mean())
        return Judgement((accuracy, -loss), {"val_top1": accuracy, "val_loss": loss})

    weights = None
    if settings.balanced:
        weights = 1 / np.bincount(data.train.labels)[data.train.labels]
    look = judge if len(data.val) else None
    train(task, model, dataset, batch_size, settings, look, hardware, metrics, title, weights)
    return model


def class_logits(
    model: Any, normalize: Normalize, paths: Sequence[str], size: int
) -> tuple[Tensor, np.ndarray]:
    """``(N, K)`` logits of the readable images, and ``(M,)`` bool: which of all M these are."""
    (logits,), good = run_over(model, lambda images: [model(images)], normalize, paths, size)
    return logits, good


@dataclass(frozen=True)
class TestScores:
    """How well a classifier does on the test part.

    Attributes:
        top1: share of images classified rightly.
        macro_f1: F1 averaged over classes, each counting alike.
        confusion: ``(K, K)`` images, by true class (row) and predicted class (column).
    """

    top1: float
    macro_f1: float
    confusion: np.ndarray


def score_classifier(model: Any, encoder: Encoder, data: LabelledImages) -> TestScores:
    """Score a model on the test part.

    Args:
        model: from ``train_classifier``.
        encoder: what it came from: knows how images go in.
        data: whose test part.
    """
    normalize = Normalize(encoder.mean, encoder.std)
    logits, good = class_logits(model, normalize, data.test.paths, encoder.image_size)
    target, classes = torch.from_numpy(data.test.labels[good]), len(data.classes)
    return TestScores(
        float(multiclass_accuracy(logits, target, classes, average="micro")),
        float(multiclass_f1_score(logits, target, classes, average="macro")),
        multiclass_confusion_matrix(logits, target, classes).numpy(),
    )


def load_classifier(folder: Path) -> tuple[nn.Module, Normalize, int, list[str]]:
    """Load a fine-tuned model.

    Args:
        folder: a run of ``finetune``, or the ``model`` folder in it.

    Returns:
        The model, how to normalise for it, the images' side in pixels, the names of the classes.

    Raises:
        UserError: there is no model, or it is damaged.
    """
    for inside in (folder / "model", folder):
        if (inside / "config.json").is_file():
            model, config = load_model(inside)
            names = config.get("label_names")
            if not names or model.num_classes != len(names):
                raise UserError(f"{inside} is no classifier: its config.json names no classes")
            saved = config["pretrained_cfg"]
            normalize = Normalize(tuple(saved["mean"]), tuple(saved["std"]))
            return model, normalize, int(saved["input_size"][-1]), list(names)
    raise UserError(f"no model at {folder}: give a run of finetune, or its model folder")
