"""Fine-tuning of an encoder into a segmenter on images with masks."""

import copy
import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from vissl_lite.data.image_reader import PHOTOGRAPHS, ImageReader
from vissl_lite.data.images import BROKEN_IMAGE
from vissl_lite.data.labeled_views import MaskView, mask_pipeline
from vissl_lite.data.reading import reason
from vissl_lite.data.stream import Batch, Item, KeyedDataset
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import UserError, did_you_mean
from vissl_lite.training.fit import NO_FILES, TrainingFiles
from vissl_lite.training.hardware import Hardware
from vissl_lite.transfer.finetuning import train
from vissl_lite.transfer.pyramid import PyramidTraining, freeze_unused
from vissl_lite.transfer.segmentation.data import LabelledMasks, MaskedImage
from vissl_lite.transfer.segmentation.metrics import score_segmenter
from vissl_lite.transfer.segmentation.model import Segmenter, keeps_own_scale, segmentation_loss
from vissl_lite.transfer.segmentation.options import SegmenterSettings

# Smallest share of the area of an image in a training view.
MIN_CROP_SCALE = 0.35


def weigh_classes(
    data: LabelledMasks, class_weights: str | dict[str, float] | None
) -> Tensor | None:
    """Compute the class weights of the loss.

    ``balanced`` gives each class a weight inverse to its number of pixels in the training masks:
    1 for a class of average frequency, clipped to [0.1, 10]. Classes that do not occur get 1.

    Args:
        data: Data set, of which the class names and training masks are used.
        class_weights: See ``SegmenterSettings``.

    Returns:
        Weights ``(K,)`` float32; None for equal weights.

    Raises:
        UserError: If a class is unknown, a weight is not above 0 and finite, or a mask can't be
            read.
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
            if not 0 < weight < math.inf:
                raise UserError(
                    f"--class_weights gives {name} {weight}: it must be above 0 and finite"
                )
        return torch.tensor([float(class_weights.get(name, 1)) for name in data.classes])
    if class_weights != "balanced":
        raise UserError(f"--class_weights {class_weights} is neither balanced nor weights by name")
    pixels = np.zeros(256, np.int64)
    for one in data.train:
        try:
            mask = one.mask.read()
        except BROKEN_IMAGE as error:  # readable when the data set was loaded
            raise UserError(
                f"the mask {one.mask.file} can't be read ({reason(error, one.mask.file)})"
            ) from None
        pixels += np.bincount(mask.ravel(), minlength=256)
    pixels = pixels[:count]
    average = pixels.sum() / max(1, np.count_nonzero(pixels))
    weights = np.where(pixels > 0, np.clip(average / np.maximum(pixels, 1), 0.1, 10), 1)
    return torch.from_numpy(weights.astype(np.float32))


class MaskDataset(KeyedDataset):
    """Dataset of training views of images and their masks.

    Args:
        images: Images with their masks.
        size: Side of a view in pixels.
        settings: Provides ``min_crop_scale``, ``upright`` and ``seed``.
        reader: How the images are read.
    """

    def __init__(
        self,
        images: Sequence[MaskedImage],
        size: int,
        settings: SegmenterSettings,
        reader: ImageReader = PHOTOGRAPHS,
    ) -> None:
        super().__init__([image.path for image in images], settings.seed)
        self.images, self.size, self.reader = images, size, reader
        scale = settings.min_crop_scale or MIN_CROP_SCALE
        self.resized_view, self.own_scale_view = (
            MaskView(mask_pipeline(size, scale, settings.upright, own_scale))
            for own_scale in (False, True)
        )

    def item(self, epoch: int, index: int, resolution: int = 0) -> Item:
        """Return a view of one image, and the same view of its mask as a one-channel image."""
        one = self.images[index]
        image, mask = self.reader.read(one.path), one.mask.read()
        large = keeps_own_scale(image, self.size)
        make_view = self.own_scale_view if large else self.resized_view
        view, mask = make_view(image, mask, self.seed, epoch, index)
        return Item([view, mask[..., None]], index, [])


class SegmenterTraining(PyramidTraining[Segmenter, SegmenterSettings]):
    """Lightning module that trains a segmenter."""

    def __init__(
        self,
        segmenter: Segmenter,
        weights: Tensor | None,
        settings: SegmenterSettings,
        batch_size: int,
    ) -> None:
        super().__init__(segmenter, settings, batch_size)
        self.weights: Tensor | None
        self.register_buffer("weights", weights, persistent=False)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, masks = batch.views
        logits = self.model(self.model.encoder.normalize(images))
        loss = segmentation_loss(logits, masks[:, 0], self.weights)
        self.log("loss", loss.detach())
        return loss


def build_segmenter(
    encoder: Encoder, data: LabelledMasks, settings: SegmenterSettings
) -> Segmenter:
    """A segmenter on a copy of an encoder, with a random head.

    Args:
        encoder: Left as it is.
        data: Data set with the classes.
        settings: The seed determines the weights of the head.
    """
    torch.manual_seed(settings.seed)
    segmenter = Segmenter(copy.deepcopy(encoder), data.classes)
    freeze_unused(segmenter.encoder, segmenter.pyramid)
    return segmenter


def train_segmenter(
    segmenter: Segmenter,
    data: LabelledMasks,
    settings: SegmenterSettings,
    hardware: Hardware | None = None,
    files: TrainingFiles = NO_FILES,
) -> None:
    """Train a segmenter. The test images are not used.

    Args:
        segmenter: Holds the weights of the last step afterwards.
        data: Data set; ``val``, unless it is empty, is evaluated for the curve.
        settings: Training settings.
        hardware: Devices and precision; one device by default.
        files: Files for metrics and checkpoints.

    Raises:
        UserError: If the batch is larger than the training split, or the class weights are invalid.
    """
    batch_size = settings.batch(len(data.train), usual=8)
    weights = weigh_classes(data, settings.class_weights)
    task = SegmenterTraining(segmenter, weights, settings, batch_size)
    encoder = segmenter.encoder
    dataset = MaskDataset(data.train, encoder.image_size, settings, encoder.reader)
    curve = partial(validate_segmenter, segmenter, data.val) if data.val else None
    train(task, segmenter, dataset, batch_size, settings, curve, hardware, files)


def validate_segmenter(segmenter: Segmenter, part: Sequence[MaskedImage]) -> dict[str, float]:
    """Mean IoU, mean Dice and loss on some images: ``miou``, ``dice`` and ``loss``.

    Args:
        segmenter: Segmenter to evaluate.
        part: Images with masks.
    """
    scores = score_segmenter(segmenter, part)
    return {"miou": scores.miou, "dice": scores.dice, "loss": scores.loss}
