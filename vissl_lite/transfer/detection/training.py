"""Fine-tuning of an encoder into a detector on images with boxes."""

import copy
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from vissl_lite.data.image_reader import PHOTOGRAPHS, ImageReader
from vissl_lite.data.images import resize
from vissl_lite.data.labeled_views import BoxView, InstanceView, box_pipeline
from vissl_lite.data.stream import Batch, Item, KeyedDataset
from vissl_lite.data.views import padding_value
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import UserError
from vissl_lite.training.fit import NO_FILES, TrainingFiles
from vissl_lite.training.hardware import Hardware
from vissl_lite.transfer.detection.anchors import choose_anchor_scale
from vissl_lite.transfer.detection.data import BoxedImage, LabelledBoxes
from vissl_lite.transfer.detection.metrics import best_threshold, score_detector
from vissl_lite.transfer.detection.model import Detector, choose_canvas, choose_max_boxes
from vissl_lite.transfer.detection.options import DetectorSettings
from vissl_lite.transfer.finetuning import train
from vissl_lite.transfer.pyramid import PyramidTraining, freeze_unused

# Smallest share of the area of an image in a training view.
MIN_CROP_SCALE = 0.35


class DetectorTraining(PyramidTraining[Detector, DetectorSettings]):
    """Lightning module that trains a detector."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images = self.model.encoder.normalize(batch.views[0])
        stretch, width = torch.ones(4, device=images.device), images.shape[-1]
        if self.settings.multi_scale:
            images, stretch = rescale_batch(images)
        targets = []
        for boxes, labels, *masks in batch.targets:
            target = {"boxes": boxes * stretch, "labels": labels}
            if masks:
                bits, drawn = masks
                unpacked = unpack_masks(bits, width)
                target |= {"masks": resize_masks(unpacked, images.shape[-2:]), "drawn": drawn}
            targets.append(target)
        losses = self.model.losses(images, targets)
        loss = torch.stack(list(losses.values())).sum()
        self.log("loss", loss.detach())
        return loss


def rescale_batch(images: Tensor) -> tuple[Tensor, Tensor]:
    """Resize a batch by a random factor from 0.75 to 1.25, to sides that are multiples of 32.

    Args:
        images: Images ``(B, C, H, W)``.

    Returns:
        Images ``(B, C, h, w)`` and the factors ``(4,)`` by which to multiply boxes x1, y1, x2, y2.
    """
    scale = 0.75 + 0.5 * float(torch.rand(()))
    before = images.shape[-2:]
    after = [max(32, round(side * scale / 32) * 32) for side in before]
    images = F.interpolate(images, after, mode="bilinear", antialias=scale < 1)
    y, x = (new / old for new, old in zip(after, before, strict=True))
    return images, torch.tensor([x, y, x, y], device=images.device)


def unpack_masks(bits: Tensor, width: int) -> Tensor:
    """Unpack masks that ``numpy.packbits`` has packed along their rows, to travel to the device.

    Args:
        bits: ``(N, H, ceil(width / 8))`` uint8.
        width: Width of the masks in pixels.

    Returns:
        Masks ``(N, H, width)`` bool.
    """
    places = torch.arange(7, -1, -1, device=bits.device, dtype=torch.uint8)
    unpacked = (bits[..., None] >> places & 1).flatten(2)
    return unpacked[..., :width] > 0


def resize_masks(masks: Tensor, size: Sequence[int]) -> Tensor:
    """Resize masks ``(N, H, W)`` bool to a height and width; a pixel half covered is inside."""
    if masks.shape[-2:] == tuple(size):
        return masks
    if not len(masks):
        return masks.new_zeros((0, *size))
    resized = F.interpolate(masks[None].float(), list(size), mode="bilinear", antialias=True)
    return resized[0] >= 0.5


def check_rescaling(encoder: Encoder) -> None:
    """Raise a UserError if an encoder accepts only images of its own size."""
    other = encoder.image_size + 32
    try:
        encoder.stage_shapes(other, other)
    except (AssertionError, RuntimeError, ValueError):
        raise UserError(
            f"--multi_scale does not work with {encoder.backbone}, which has a fixed image size"
        ) from None


class BoxDataset(KeyedDataset):
    """Dataset of training views of images and their boxes.

    Args:
        images: Images with their boxes. Ignored boxes are left out.
        canvas: Height and width of a view in pixels.
        settings: Provides ``detector``, ``min_crop_scale``, ``upright`` and ``seed``.
        reader: How the images are read.
    """

    def __init__(
        self,
        images: Sequence[BoxedImage],
        canvas: tuple[int, int],
        settings: DetectorSettings,
        reader: ImageReader = PHOTOGRAPHS,
    ) -> None:
        super().__init__([image.path for image in images], settings.seed)
        self.images, self.canvas, self.reader = images, canvas, reader
        fill = padding_value(reader.dtype)
        scale = settings.min_crop_scale or MIN_CROP_SCALE
        steps = box_pipeline(canvas, scale, settings.upright, fill)
        self.view = BoxView(steps)
        self.instances = InstanceView(steps) if settings.detector == "mask_rcnn" else None
        self.shortest = round(min(canvas) * scale**-0.5)

    def item(self, epoch: int, index: int, resolution: int = 0) -> Item:
        """Return a view of one image, with boxes ``(N, 4)`` and labels ``(N,)`` as the target.

        For Mask R-CNN also with masks, packed as bits along their rows, and ``(N,)`` bool, which
        objects have a mask.
        """
        truth = self.images[index]
        image = self.reader.read(truth.path, self.shortest)
        kept = ~truth.ignored
        if self.instances is not None:
            return self._item_with_masks(self.instances, epoch, index, image)
        boxes = _scaled_boxes(truth, image)[kept]
        view, boxes, labels = self.view(image, boxes, truth.labels[kept], self.seed, epoch, index)
        large = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(axis=1)
        target = torch.from_numpy(boxes[large]), torch.from_numpy(labels[large])
        return Item([view], index, [], target)

    def _item_with_masks(
        self, view: InstanceView, epoch: int, index: int, image: np.ndarray
    ) -> Item:
        truth = self.images[index]
        scale = min(new / old for new, old in zip(self.canvas, image.shape, strict=False))
        if scale < 1:  # as the view does first; masks of many objects are then small from the start
            height, width = (max(1, round(side * scale)) for side in image.shape[:2])
            image = resize(image, (height, width))
        size = image.shape[0], image.shape[1]
        kept = np.flatnonzero(~truth.ignored)
        drawn = truth.has_shape[kept]
        masks = [truth.mask(number, size) for number in kept[drawn]]
        boxes = _scaled_boxes(truth, image)[kept]
        stacked = np.stack(masks) if masks else np.empty((0, *size), np.uint8)
        made, boxes, pixels, numbers = view(image, boxes, stacked, drawn, self.seed, epoch, index)
        large = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(axis=1)
        numbers = numbers[large]
        target = (
            torch.from_numpy(boxes[large]),
            torch.from_numpy(truth.labels[kept][numbers]),
            torch.from_numpy(np.packbits(pixels[large], axis=-1)),
            torch.from_numpy(drawn[numbers]),
        )
        return Item([made], index, [], target)


def _scaled_boxes(truth: BoxedImage, image: np.ndarray) -> np.ndarray:
    """The boxes of an image in pixels of a reduced one, whose sides are rounded one by one."""
    height, width = np.divide(image.shape[:2], truth.size)
    return (truth.boxes * (width, height, width, height)).astype(np.float32)


def build_detector(encoder: Encoder, data: LabelledBoxes, settings: DetectorSettings) -> Detector:
    """A detector on a copy of an encoder, with a random head.

    Args:
        encoder: Left as it is.
        data: Data set; the training images determine the canvas, the size of the anchors, and how
            many boxes are returned for an image at most.
        settings: The seed determines the weights of the head.
    """
    canvas = choose_canvas(data.train, encoder)
    anchor_scale = choose_anchor_scale(data.train, settings.detector, canvas, encoder)
    max_boxes = choose_max_boxes(data.train)
    torch.manual_seed(settings.seed)
    own = copy.deepcopy(encoder)
    detector = Detector(own, data.classes, settings.detector, canvas, anchor_scale, max_boxes)
    freeze_unused(own, detector.net.backbone.pyramid)
    return detector


def train_detector(
    detector: Detector,
    data: LabelledBoxes,
    settings: DetectorSettings,
    hardware: Hardware | None = None,
    files: TrainingFiles = NO_FILES,
) -> None:
    """Train a detector. The test images are not used.

    Args:
        detector: Holds the weights of the last step afterwards.
        data: Data set; ``val``, unless it is empty, is evaluated for the curve.
        settings: Training settings.
        hardware: Devices and precision; one device by default.
        files: Files for metrics and checkpoints.

    Raises:
        UserError: If the batch is larger than the training split.
    """
    batch_size = settings.batch(len(data.train), usual=8)
    task = DetectorTraining(detector, settings, batch_size)
    dataset = BoxDataset(data.train, detector.canvas, settings, detector.encoder.reader)
    curve = partial(validate_detector, detector, data.val) if data.val else None
    train(task, detector, dataset, batch_size, settings, curve, hardware, files)


def validate_detector(detector: Detector, part: Sequence[BoxedImage]) -> dict[str, float]:
    """Metrics of a detector on some images; see ``DetectionScores.metrics``.

    Args:
        detector: Detector to evaluate.
        part: Images with boxes.
    """
    return score_detector(detector, part).metrics


def choose_threshold(detector: Detector, data: LabelledBoxes) -> None:
    """Set the score threshold of a detector to that of the best F1 on the validation images.

    Args:
        detector: Trained detector.
        data: Data set; the training images are used if there are no validation images.
    """
    scores = score_detector(detector, data.val or data.train)
    detector.threshold = best_threshold(scores.found, scores.images)
