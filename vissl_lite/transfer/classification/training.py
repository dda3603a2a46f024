"""Classification: fine-tune an encoder, whole or frozen, on labelled images.

An image has one class, or any number of them (multi-label): the data say which.
"""

import copy
import logging
import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from vissl_lite.data.image_reader import ImageReader
from vissl_lite.data.rand_augment import RandAugment
from vissl_lite.data.stream import Batch, ViewDataset
from vissl_lite.data.views import Views, color_jitter, crop_decode_size, flip, random_crop
from vissl_lite.encoders.drop_path import drop_path_rates, set_drop_path
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import UserError, did_you_mean
from vissl_lite.training.fit import NO_FILES, TrainingFiles
from vissl_lite.training.hardware import Hardware
from vissl_lite.transfer.classification.data import LabelledImages, Part
from vissl_lite.transfer.classification.linear_head import fit_linear
from vissl_lite.transfer.classification.metrics import (
    evaluate_one,
    evaluate_several,
)
from vissl_lite.transfer.classification.mixing import mix
from vissl_lite.transfer.classification.model import Classifier, class_logits, pooled_features
from vissl_lite.transfer.classification.options import ClassifierSettings
from vissl_lite.transfer.dataset import MAX_VALIDATION_IMAGES, spread
from vissl_lite.transfer.finetuning import TransferModule, train

log = logging.getLogger(__name__)

# Bounds of a class's balanced positive weight: beyond them a few images decide every step.
MIN_POSITIVE_WEIGHT, MAX_POSITIVE_WEIGHT = 0.1, 100.0

# With fewer training images, frozen BatchNorms of a pre-trained encoder are tried, too.
FEW_IMAGES = 1000

# Smallest share of the area of an image in a training view: better than 0.35, or as good, where
# ``benchmarks/accuracy/recipes.py`` compares them.
MIN_CROP_SCALE = 0.6

# Images that the head is fitted to before the training.
MAX_HEAD_IMAGES = 20_000


def check_settings(settings: ClassifierSettings, data: LabelledImages, reader: ImageReader) -> None:
    """Raise a UserError if settings do not suit the data.

    Args:
        settings: Settings of the training.
        data: Labelled images.
        reader: How the images are read.
    """
    if settings.rand_augment and reader.bands is not None:
        raise UserError(
            "--rand_augment has operations for 8-bit RGB images alone, and these are read as "
            f"{reader.channels} bands: leave it out"
        )
    if settings.balanced and data.multi_label:
        raise UserError(
            "--balanced samples images by their one class, but here an image has "
            "several labels: give --class_weights balanced"
        )
    loss_weights(settings.class_weights, data)


def loss_weights(chosen: str | dict[str, float] | None, data: LabelledImages) -> Tensor:
    """Weight of each class in the loss.

    With one class an image a weight multiplies the loss of the images of the class; ``balanced``
    is one over the number of its training images. Only ratios count: the mean over the training
    images is 1, which leaves the learning rate its meaning.

    With several labels per image it multiplies the loss of having the class, not that of having it
    not; ``balanced`` is the training images without the class over those with it, between 0.1 and
    100.

    Args:
        chosen: ``balanced``, or weights by class name (1 for classes not named); None for 1.
        data: Data whose training part is counted.

    Returns:
        ``(K,)``.

    Raises:
        UserError: An unknown word or class name, or a weight that is not positive.
    """
    labels, count = data.train.labels, len(data.classes)
    if isinstance(chosen, dict):
        chosen = {str(name): weight for name, weight in chosen.items()}  # YAML reads 0 as a number
        for name, weight in chosen.items():
            if name not in data.classes:
                raise UserError(
                    f"--class_weights: unknown class {name}: {did_you_mean(name, data.classes)}"
                )
            if not 0 < weight < math.inf:
                raise UserError(f"--class_weights: {weight} for {name} must be above 0 and finite")
        weights = np.array([chosen.get(name, 1.0) for name in data.classes])
    elif chosen is None:
        weights = np.ones(count)
    elif chosen != "balanced":
        raise UserError(f"--class_weights {chosen}: give balanced, or a weight for each class name")
    elif data.multi_label:
        have = labels.sum(axis=0)
        weights = (len(labels) - have) / np.maximum(have, 1)
        weights = np.clip(weights, MIN_POSITIVE_WEIGHT, MAX_POSITIVE_WEIGHT)
    else:
        weights = 1 / np.maximum(np.bincount(labels, minlength=count), 1)
    if not data.multi_label:
        weights = weights / weights[labels].mean()
    return torch.from_numpy(weights).float()


def one_label_loss(
    logits: Tensor,
    target: Tensor,
    weights: Tensor,
    smoothing: float,
    image_weights: Tensor | float = 1.0,
) -> Tensor:
    """Cross-entropy, each image weighted by its class and by itself.

    Args:
        logits: ``(B, K)``.
        target: ``(B, K)`` probabilities of the classes: one-hot, or those of mixed images.
        weights: ``(K,)``.
        smoothing: Share of the target that is spread over all classes.
        image_weights: ``(B,)``, or the same for all.
    """
    losses = F.cross_entropy(logits, target, label_smoothing=smoothing, reduction="none")
    return ((target @ weights) * losses * image_weights).mean()


def several_labels_loss(
    logits: Tensor,
    target: Tensor,
    weights: Tensor,
    smoothing: float,
    image_weights: Tensor | float = 1.0,
) -> Tensor:
    """Binary cross-entropy, averaged over images and classes.

    Args:
        logits: ``(B, K)``.
        target: ``(B, K)`` of 0 and 1, or in between for mixed images.
        weights: ``(K,)``, on the side of the loss that asks for the class.
        smoothing: Label smoothing s; targets are s / 2 and 1 - s / 2.
        image_weights: ``(B,)``, or the same for all.
    """
    soft = target * (1 - smoothing) + smoothing / 2
    losses = F.binary_cross_entropy_with_logits(logits, soft, pos_weight=weights, reduction="none")
    return (losses.mean(dim=1) * image_weights).mean()


class ClassifierTraining(TransferModule[Classifier, ClassifierSettings]):
    """Lightning module that trains a classifier.

    Args:
        classifier: Classifier with K classes.
        data: Labelled images; the training part is used.
        settings: Settings of the training.
    """

    def __init__(
        self, classifier: Classifier, data: LabelledImages, settings: ClassifierSettings
    ) -> None:
        super().__init__(classifier, settings, few=len(data.train) < FEW_IMAGES)
        self.loss = several_labels_loss if data.multi_label else one_label_loss
        self.labels: Tensor
        self.weights: Tensor
        self.image_weights: Tensor
        weights = loss_weights(settings.class_weights, data)
        self.register_buffer("labels", torch.from_numpy(data.train.labels), persistent=False)
        self.register_buffer("weights", weights, persistent=False)
        image_weights = torch.from_numpy(data.train.image_weights())
        self.register_buffer("image_weights", image_weights, persistent=False)
        set_drop_path(classifier.encoder, settings.drop_path)
        if settings.frozen:
            heads = classifier.network.get_classifier()
            for head in heads if isinstance(heads, tuple) else (heads,):  # two of a distilled model
                head.requires_grad_(True)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images = self.model.encoder.normalize(batch.views[0])
        target = self.labels[batch.indices]
        if target.ndim == 1:
            target = F.one_hot(target, len(self.weights))
        # the weight of an image is mixed in the same ratio as its label
        weight = self.image_weights[batch.indices, None]
        both = torch.cat([target.float(), weight], dim=1)
        images, both = mix(images, both, self.settings.mixup, self.settings.cutmix)
        target, weight = both[:, :-1], both[:, -1]
        logits = self.model(images).float()
        loss = self.loss(logits, target, self.weights, self.settings.label_smoothing, weight)
        self.log("loss", loss.detach())
        return loss


def check_drop_path(rate: float, encoder: Encoder) -> None:
    """Raise a UserError if timm has no stochastic depth for an encoder.

    Args:
        rate: See ``set_drop_path``.
        encoder: Encoder to be trained.
    """
    if rate and not drop_path_rates(encoder, rate):
        raise UserError(
            f"--drop_path {rate:g}: timm has no stochastic depth for {encoder.backbone}; leave it "
            f"out"
        )


def classifier_views(
    size: int, min_crop_scale: float, upright: bool, color: float = 0.0, rand_augment: float = 0.0
) -> Views:
    """One training view: a random crop, perhaps flipped, with changed colors.

    Args:
        size: Side in pixels.
        min_crop_scale: Smallest share of the image's area.
        upright: Whether the images have an up; see ``flip``.
        color: Strength of the color jitter; see ``color_distortion``.
        rand_augment: Magnitude of ``RandAugment``; 0 for none.
    """
    one = [random_crop(size, min_crop_scale), flip(upright)]
    if rand_augment:
        one.append(RandAugment(rand_augment))
    if color:
        one.append(color_jitter(color))
    return Views([one], shortest=crop_decode_size(size, min_crop_scale))


def build_classifier(
    encoder: Encoder, data: LabelledImages, settings: ClassifierSettings
) -> Classifier:
    """A classifier on a copy of an encoder, to be trained.

    On a pre-trained encoder its head is a linear probe that is fitted to the training images, so
    that the training does not distort the features for the sake of a random head (LP-FT, Kumar et
    al. 2022).

    Args:
        encoder: Left as it is.
        data: Labelled images; the training part is used.
        settings: Settings of the training.
    """
    torch.manual_seed(settings.seed)  # the new classifier's weights
    classifier = Classifier(copy.deepcopy(encoder), data.classes, data.multi_label)
    if settings.pretrained:
        classifier.fitted = _fit_classifier(classifier, data, settings.seed)
    return classifier


def _fit_classifier(classifier: Classifier, data: LabelledImages, seed: int) -> bool:
    """Fit the last layer to the training images; False if it is no plain linear layer."""
    layer, encoder = classifier.network.get_classifier(), classifier.encoder
    if not isinstance(layer, nn.Linear) or layer.in_features != encoder.num_features:
        return False
    paths, labels, groups = data.train.paths, data.train.labels, data.groups("train")
    if len(paths) > MAX_HEAD_IMAGES:
        chosen = np.sort(np.random.default_rng(seed).permutation(len(paths))[:MAX_HEAD_IMAGES])
        paths, labels = [paths[i] for i in chosen], labels[chosen]
        groups = None if groups is None else groups[chosen]
    features, good = pooled_features(classifier, paths)
    if not np.isfinite(features).all() or len(np.unique(labels[good], axis=0)) < 2:
        return False
    groups = None if groups is None else groups[good]
    head, _ = fit_linear(features, labels[good], len(data.classes), seed, groups)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(head.weight))
        layer.bias.copy_(torch.from_numpy(head.bias))
    return True


def train_classifier(
    classifier: Classifier,
    data: LabelledImages,
    settings: ClassifierSettings,
    hardware: Hardware | None = None,
    files: TrainingFiles = NO_FILES,
) -> None:
    """Train a classifier from ``build_classifier``. The test part is not used.

    Args:
        classifier: Holds the weights of the last step afterwards.
        data: Trained on ``train``; ``val``, unless it is empty, is evaluated for the curve.
        settings: Settings of the training.
        hardware: Hardware to train on; default one device.
        files: Files for metrics and checkpoints.

    Raises:
        UserError: The batch is larger than the training part, or settings do not suit the data.
    """
    check_settings(settings, data, classifier.encoder.reader)
    if data.multi_label:
        _warn_of_constant_classes(data)
    batch_size = settings.batch(len(data.train), usual=64)
    training = ClassifierTraining(classifier, data, settings)
    size = classifier.encoder.image_size
    views = classifier_views(
        size,
        settings.min_crop_scale or MIN_CROP_SCALE,
        settings.upright,
        settings.color,
        settings.rand_augment,
    )
    reader = classifier.encoder.reader
    dataset = ViewDataset(data.train.paths, views, settings.seed, reader=reader)
    weights = None
    if settings.balanced:
        weights = 1 / np.bincount(data.train.labels)[data.train.labels]
    curve = None
    if len(data.val):
        curve = partial(validate_classifier, classifier, data.val, data.multi_label)
    train(training, classifier, dataset, batch_size, settings, curve, hardware, files, weights)


def validate_classifier(classifier: Classifier, part: Part, multi_label: bool) -> dict[str, float]:
    """Metrics of a classifier on some images; see ``evaluate_one`` and ``evaluate_several``.

    Args:
        classifier: Classifier to evaluate.
        part: Images and labels; of more than 5,000 images as many are used, evenly spread.
        multi_label: Whether images may have several labels.
    """
    part = part.take(spread(len(part), MAX_VALIDATION_IMAGES))
    logits, good = class_logits(classifier, part.paths)
    target = torch.from_numpy(part.labels[good])
    return (evaluate_several if multi_label else evaluate_one)(logits, target)


def _warn_of_constant_classes(data: LabelledImages) -> None:
    labels = data.train.labels
    for what, which in (("no", ~labels.any(axis=0)), ("every", labels.all(axis=0))):
        if which.any():
            log.warning(
                "can't be learned, as %(which)s training image has it: %(classes)s",
                {"which": what, "classes": ", ".join(np.array(data.classes)[which])},
                extra={"code": "class.constant"},
            )
