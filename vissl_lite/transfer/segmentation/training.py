"""Semantic segmentation: a class for every pixel, from an encoder and a feature pyramid."""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vissl_lite.data.images import BROKEN_IMAGE, read_image
from vissl_lite.data.labeled_views import MaskView, mask_pipeline
from vissl_lite.data.reading import reason
from vissl_lite.data.stream import Batch, Item, KeyedDataset
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import UserError, did_you_mean
from vissl_lite.training.fit import NO_FILES, TrainingFiles
from vissl_lite.training.hardware import Hardware
from vissl_lite.transfer.finetuning import EvalResult, train
from vissl_lite.transfer.pyramid import PyramidTraining
from vissl_lite.transfer.segmentation.data import LabelledMasks, MaskedImage, read_mask
from vissl_lite.transfer.segmentation.metrics import score_segmenter
from vissl_lite.transfer.segmentation.model import Segmenter, at_own_scale, segmentation_loss
from vissl_lite.transfer.segmentation.options import SegmenterSettings


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
                raise UserError(
                    f"--class_weights names the unknown class {name}: "
                    f"{did_you_mean(name, data.classes)}"
                )
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
            raise UserError(
                f"the mask {one.mask} can't be read ({reason(error, one.mask)})"
            ) from None
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
            MaskView(mask_pipeline(size, settings.min_crop_scale, settings.upright, own_scale))
            for own_scale in (False, True)
        )

    def item(self, epoch: int, index: int) -> Item:
        """Two views of one image: itself, and its mask as a picture of one channel."""
        one = self.images[index]
        image, mask = read_image(one.path), read_mask(one.mask, one.binary)
        made = self.own_scale if at_own_scale(image, self.size) else self.whole
        view, mask = made(image, mask, self.seed, epoch, index)
        return Item([view, mask[..., None]], index, [])


class SegmenterTraining(PyramidTraining[Segmenter, SegmenterSettings]):
    """How a segmenter is trained."""

    def __init__(
        self, segmenter: Segmenter, weights: Tensor | None, settings: SegmenterSettings
    ) -> None:
        super().__init__(segmenter, settings)
        self.weights: Tensor | None
        self.register_buffer("weights", weights, persistent=False)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, masks = batch.views
        logits = self.model(self.model.encoder.normalize(images))
        loss = segmentation_loss(logits, masks[:, 0], self.weights)
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
    segmenter = Segmenter(copy.deepcopy(encoder), data.classes)
    task = SegmenterTraining(segmenter, weights, settings)
    dataset = MaskDataset(data.train, encoder.image_size, settings)

    def evaluate() -> EvalResult:
        scores = score_segmenter(segmenter, data.val)
        values = {"val_miou": scores.miou, "val_dice": scores.dice, "val_loss": scores.loss}
        return EvalResult((scores.miou, -scores.loss), values)

    look = evaluate if data.val else None
    train(task, segmenter, dataset, batch_size, settings, look, hardware, files, title)
    return segmenter
