"""Semantic segmentation: a class for every pixel, from an encoder and a feature pyramid."""

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from vissl_lite.data.images import BROKEN_IMAGE, read_image
from vissl_lite.data.labeled_views import MaskView, mask_pipeline
from vissl_lite.data.masks import IGNORE, LabelledMasks, MaskedImage, read_mask
from vissl_lite.data.reading import reason
from vissl_lite.data.stream import Batch, Item, KeyedDataset
from vissl_lite.encoder import Encoder, Normalize
from vissl_lite.errors import UserError, did_you_mean
from vissl_lite.inference import evaluating, report_broken
from vissl_lite.training.fit import NO_FILES, TrainingFiles
from vissl_lite.training.hardware import Hardware
from vissl_lite.transfer.base import (
    Judgement,
    load_with_head,
    save_with_head,
    train,
)
from vissl_lite.transfer.pyramid import PyramidSettings, PyramidTask
from vissl_lite.transfer.segmenter import (
    Segmenter,
    at_own_scale,
    enlarge,
    segment_all,
    segmentation_loss,
)

IMAGES = 8  # that are read at a time


@dataclass(frozen=True, kw_only=True)
class SegmenterSettings(PyramidSettings):
    """How to train a segmenter.

    Attributes:
        class_weights: weights of the classes in the loss, by name, 1 for those left out; or
            ``balanced``: by how rare a class's pixels are. None weighs all alike.
    """

    class_weights: str | dict[str, float] | None = None


def weigh_classes(
    data: LabelledMasks, class_weights: str | dict[str, float] | None
) -> Tensor | None:
    """The weights of the classes in the loss.

    ``balanced`` gives each class a weight inverse to its pixels in the training masks, 1 for one
    of average frequency, clipped to between 0.1 and 10; 1 for a class that does not occur.

    Args:
        data: names of the classes, training masks.
        class_weights: see ``SegmenterSettings``.

    Returns:
        ``(K,)`` float32; None where all weigh alike.

    Raises:
        UserError: a class is unknown, or a weight is not above 0.
    """
    if class_weights is None:
        return None
    count = len(data.classes)
    if isinstance(class_weights, dict):
        class_weights = {str(name): weight for name, weight in class_weights.items()}
        for name, weight in class_weights.items():
            if name not in data.classes:
                raise UserError(f"--class_weights names the unknown class {name}: "
                                f"{did_you_mean(name, data.classes)}")  # fmt: skip
            if not weight > 0:
                raise UserError(f"--class_weights gives {name} {weight}: it must be above 0")
        return torch.tensor([float(class_weights.get(name, 1)) for name in data.classes])
    if class_weights != "balanced":
        raise UserError(f"--class_weights {class_weights} is neither balanced nor weights by name")
    pixels = np.zeros(256, np.int64)
    for one in data.train:
        try:
            mask = read_mask(one.mask, one.binary)
        except BROKEN_IMAGE as error:  # it was read a moment ago
            raise UserError(f"the mask {one.mask} can't be read ({reason(error, one.mask)})"
                            ) from None  # fmt: skip
        pixels += np.bincount(mask.ravel(), minlength=256)
    pixels = pixels[:count]
    average = pixels.sum() / max(1, np.count_nonzero(pixels))
    weights = np.where(pixels > 0, np.clip(average / np.maximum(pixels, 1), 0.1, 10), 1)
    return torch.from_numpy(weights.astype(np.float32))


class MaskDataset(KeyedDataset):
    """Decodes images and their masks and makes training views of both.

    Args:
        images: with their masks.
        size: side of a view in pixels.
        settings: smallest crop, whether images have an up, seed.
    """

    def __init__(
        self, images: Sequence[MaskedImage], size: int, settings: SegmenterSettings
    ) -> None:
        super().__init__([image.path for image in images], settings.seed)
        self.images, self.size = images, size
        self.whole, self.own_scale = (
            MaskView(mask_pipeline(size, settings.smallest_crop, settings.upright, own_scale))
            for own_scale in (False, True)
        )

    def item(self, epoch: int, index: int) -> Item:
        """Two views of one image: itself, and its mask as a picture of one channel."""
        one = self.images[index]
        image, mask = read_image(one.path), read_mask(one.mask, one.binary)
        made = self.own_scale if at_own_scale(image, self.size) else self.whole
        view, mask = made(image, mask, self.seed, epoch, index)
        return Item([view, mask[..., None]], index, [])


class _SegmenterTask(PyramidTask):
    """A segmenter, and how it is trained."""

    def __init__(
        self, segmenter: Segmenter, weights: Tensor | None, settings: SegmenterSettings
    ) -> None:
        super().__init__(segmenter, settings)
        self.weights: Tensor | None
        self.register_buffer("weights", weights, persistent=False)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, masks = batch.views
        loss = segmentation_loss(self.model(self.normalize(images)), masks[:, 0], self.weights)
        self.log("loss", loss.detach())
        return loss


def train_segmenter(
    encoder: Encoder,
    data: LabelledMasks,
    settings: SegmenterSettings,
    hardware: Hardware | None = None,
    files: TrainingFiles = NO_FILES,
    title: str = "finetune",
) -> Segmenter:
    """Train a segmenter on a copy of an encoder. The test part is not looked at.

    Args:
        encoder: left as it is.
        data: trained on ``train``; the weights with the best mean IoU on ``val`` are kept, the
            last ones where ``val`` is empty.
        settings: how.
        hardware: where; default one device.
        files: where metrics and checkpoints go.
        title: of the progress bar.

    Raises:
        UserError: the batch is larger than the training part, or the class weights can't be.
    """
    batch_size = settings.batch(len(data.train), usual=8)
    weights = weigh_classes(data, settings.class_weights)
    torch.manual_seed(settings.seed)  # the new head's weights
    segmenter = Segmenter(copy.deepcopy(encoder), len(data.classes))
    task = _SegmenterTask(segmenter, weights, settings)
    dataset = MaskDataset(data.train, encoder.image_size, settings)

    def judge() -> Judgement:
        scores = score_segmenter(segmenter, data.val, data.classes)
        values = {"val_miou": scores.miou, "val_dice": scores.dice, "val_loss": scores.loss}
        return Judgement((scores.miou, -scores.loss), values)

    look = judge if data.val else None
    train(task, segmenter, dataset, batch_size, settings, look, hardware, files, title)
    return segmenter


@dataclass(frozen=True)
class SegmentationScores:
    """How well a segmenter does on a part.

    Attributes:
        miou: intersection over union, the mean over the classes that occur in truth or prediction.
        dice: Dice coefficient, likewise.
        accuracy: share of pixels that are classified rightly.
        loss: ``segmentation_loss`` with equal weights, the mean over images.
        per_class: ``iou`` and ``dice`` by the names of those classes.
        confusion: ``(K, K)`` pixels, by true class (row) and predicted class (column).
    """

    miou: float
    dice: float
    accuracy: float
    loss: float
    per_class: dict[str, dict[str, float]]
    confusion: np.ndarray

    @property
    def metrics(self) -> dict[str, float]:
        """``miou``, ``dice`` and ``accuracy``."""
        return {"miou": self.miou, "dice": self.dice, "accuracy": self.accuracy}


def score_confusion(
    confusion: np.ndarray, classes: Sequence[str], loss: float
) -> SegmentationScores:
    """Scores from a confusion matrix over a whole part; see ``SegmentationScores``."""
    right = np.diag(confusion).astype(float)
    either = confusion.sum(axis=0) + confusion.sum(axis=1)  # truth plus prediction
    per_class = {
        name: {"iou": hit / (total - hit), "dice": 2 * hit / total}
        for name, hit, total in zip(classes, right.tolist(), either.tolist(), strict=True)
        if total
    }
    miou, dice = (
        float(np.mean([scores[kind] for scores in per_class.values()])) if per_class else 0.0
        for kind in ("iou", "dice")
    )
    accuracy = float(right.sum() / max(1, confusion.sum()))
    return SegmentationScores(miou, dice, accuracy, loss, per_class, confusion)


def score_segmenter(
    segmenter: Segmenter,
    part: Sequence[MaskedImage],
    classes: Sequence[str],
    progress: Callable[[int], None] | None = None,
) -> SegmentationScores:
    """Score a segmenter at the masks' own resolution.

    Args:
        segmenter: put on the accelerator if there is one, and back afterwards.
        part: images and masks; those that can't be read are left out, and named in the log.
        classes: K names.
        progress: called with the number of images done since the last call.

    Raises:
        UserError: no image can be read.
    """
    size = segmenter.encoder.image_size
    normalize = Normalize(segmenter.encoder.mean, segmenter.encoder.std)
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    losses: list[float] = []
    faults: list[str | None] = []
    with evaluating(segmenter, normalize) as device:
        for pairs in _read(part):
            faults += [pair if isinstance(pair, str) else None for pair in pairs]
            found = [pair for pair in pairs if not isinstance(pair, str)]
            images = [image for image, _ in found]
            shares = segment_all(segmenter, normalize, images, size, device)
            for (_, mask), share in zip(found, shares, strict=True):
                target = torch.from_numpy(mask).to(device).long()
                logits = enlarge(share, *mask.shape).clamp_min(1e-8).log()
                losses.append(float(segmentation_loss(logits[None], target[None])))
                counts = multiclass_confusion_matrix(
                    logits.argmax(dim=0), target, len(classes), ignore_index=IGNORE,
                    validate_args=False,
                )  # fmt: skip
                confusion += counts.cpu().numpy()
            if progress is not None:
                progress(len(pairs))
    report_broken([one.path for one in part], faults)
    return score_confusion(confusion, classes, float(np.mean(losses)))


def _read(
    part: Sequence[MaskedImage],
) -> Iterator[list[tuple[np.ndarray, np.ndarray] | str]]:
    """Images and masks, some at a time; for those that can't be read, why."""

    def read(one: MaskedImage) -> tuple[np.ndarray, np.ndarray] | str:
        try:
            image = read_image(one.path)
        except BROKEN_IMAGE as error:
            return reason(error, one.path)
        try:
            return image, read_mask(one.mask, one.binary)
        except BROKEN_IMAGE as error:
            return f"its mask {one.mask}: {reason(error, one.mask)}"

    with ThreadPoolExecutor(4) as pool:
        for start in range(0, len(part), IMAGES):
            yield list(pool.map(read, part[start : start + IMAGES]))


def save_segmenter(
    segmenter: Segmenter, folder: Path, classes: Sequence[str], about: dict[str, Any]
) -> None:
    """Write a model folder: ``encoder/`` in timm's format, and the head.

    Args:
        segmenter: what to save.
        folder: where; made if missing.
        classes: K names.
        about: how it was trained.
    """
    head = {"task": "segmentation", "classes": list(classes), "channels": segmenter.channels}
    save_with_head(segmenter, segmenter.encoder, folder, {**about, **head})


def load_segmenter(folder: Path) -> tuple[Segmenter, list[str]]:
    """Load what ``save_segmenter`` wrote.

    Args:
        folder: a run of ``finetune``, or the ``model`` folder in it.

    Returns:
        The segmenter and the names of the classes.

    Raises:
        UserError: there is no segmenter, or it is damaged.
    """

    def build(encoder: Encoder, about: dict[str, Any]) -> Segmenter:
        channels = about["channels"]
        if type(channels) is not int or channels < 8 or channels % 8:
            raise ValueError("channels is no positive multiple of 8")
        return Segmenter(encoder, len(about["classes"]), channels)

    segmenter, about = load_with_head(folder, "segmentation", build)
    return segmenter, list(about["classes"])
