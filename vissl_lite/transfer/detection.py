"""Detection: fine-tune an encoder into a detector, on images with boxes."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import box_iou

from vissl_lite.data.boxes import BoxedImage, LabelledBoxes
from vissl_lite.data.images import read_image
from vissl_lite.data.labeled_views import BoxView, box_pipeline
from vissl_lite.data.stream import Batch, Item, KeyedDataset
from vissl_lite.encoder import Encoder
from vissl_lite.errors import UserError
from vissl_lite.training.fit import NO_FILES, TrainingFiles
from vissl_lite.training.hardware import Hardware
from vissl_lite.transfer.base import (
    Judgement,
    load_with_head,
    save_with_head,
    train,
)
from vissl_lite.transfer.detector import Detections, Detector, Kind, choose_canvas, detect
from vissl_lite.transfer.pyramid import PyramidSettings, PyramidTask


@dataclass(frozen=True, kw_only=True)
class DetectorSettings(PyramidSettings):
    """How to train a detector.

    Attributes:
        kind: which of torchvision's detectors.
        multi_scale: resize each batch, by 0.75 to 1.25 times (YOLO9000, Redmon & Farhadi 2017,
            section 2). The average step costs a little more.
    """

    multi_scale: bool = False
    kind: Kind = "faster_rcnn"


class _DetectorTask(PyramidTask):
    """A detector, and how it is trained."""

    settings: DetectorSettings

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images = self.normalize(batch.views[0])
        stretch = torch.ones(4, device=images.device)
        if self.settings.multi_scale:
            images, stretch = rescaled(images)
        targets = [{"boxes": boxes * stretch, "labels": labels} for boxes, labels in batch.targets]
        losses = self.model.losses(images, targets)
        loss = torch.stack(list(losses.values())).sum()
        self.log("loss", loss.detach())
        return loss


def rescaled(images: Tensor) -> tuple[Tensor, Tensor]:
    """A batch at a random scale from 0.75 to 1.25, its sides multiples of 32 as before.

    Args:
        images: ``(B, C, H, W)``.

    Returns:
        ``(B, C, h, w)`` and ``(4,)``: what boxes (x1, y1, x2, y2) are to be multiplied with.
    """
    scale = 0.75 + 0.5 * float(torch.rand(()))
    before = images.shape[-2:]
    after = [max(32, round(side * scale / 32) * 32) for side in before]
    images = F.interpolate(images, after, mode="bilinear", antialias=scale < 1)
    y, x = (new / old for new, old in zip(after, before, strict=True))
    return images, torch.tensor([x, y, x, y], device=images.device)


def check_rescaling(encoder: Encoder) -> None:
    """Raise a UserError if an encoder takes images of its own size alone."""
    other = encoder.image_size + 32
    try:
        encoder.stage_shapes(other, other)
    except (AssertionError, RuntimeError, ValueError):
        raise UserError(
            f"--multi_scale is not for {encoder.backbone}, which takes images of one size"
        ) from None


class BoxDataset(KeyedDataset):
    """Decodes images and makes their training views, boxes included.

    Args:
        images: with their boxes; the ignored ones are left out.
        canvas: height and width of a view.
        settings: smallest crop, whether images have an up, seed.
    """

    def __init__(
        self, images: Sequence[BoxedImage], canvas: tuple[int, int], settings: DetectorSettings
    ) -> None:
        super().__init__([image.path for image in images], settings.seed)
        self.images = images
        self.view = BoxView(box_pipeline(canvas, settings.smallest_crop, settings.upright))
        self.shortest = round(min(canvas) * settings.smallest_crop**-0.5)

    def item(self, epoch: int, index: int) -> Item:
        """A view of one image; its target is ``(N, 4)`` boxes and ``(N,)`` labels."""
        truth = self.images[index]
        image = read_image(truth.path, self.shortest)
        kept = ~truth.ignored
        boxes = truth.boxes[kept] * (image.shape[1] / truth.size[1])
        view, boxes, labels = self.view(image, boxes, truth.labels[kept], self.seed, epoch, index)
        large = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(axis=1)
        target = torch.from_numpy(boxes[large]), torch.from_numpy(labels[large])
        return Item([view], index, [], target)


@dataclass(frozen=True)
class DetectionScores:
    """How well a detector does.

    Attributes:
        map: mean average precision over IoU thresholds from 0.5 to 0.95, as COCO computes it.
        map_50: at IoU 0.5.
        per_class: by class name, ``{"ap": ...}``; classes without a box are left out.
        found: for each readable image what was found.
        images: these images.
    """

    map: float
    map_50: float
    per_class: dict[str, dict[str, float]]
    found: list[Detections]
    images: list[BoxedImage]

    @property
    def metrics(self) -> dict[str, float]:
        """``map`` and ``map_50``."""
        return {"map": self.map, "map_50": self.map_50}


def score_detector(
    detector: Detector,
    part: Sequence[BoxedImage],
    classes: Sequence[str],
    progress: Callable[[int], None] | None = None,
) -> DetectionScores:
    """Score a detector on images with boxes.

    Args:
        detector: from ``train_detector``.
        part: the images.
        classes: their names.
        progress: called with the number of images done since the last call.
    """
    found, good = detect(detector, [image.path for image in part], progress)
    images = [image for image, fine in zip(part, good, strict=True) if fine]
    metric = MeanAveragePrecision(class_metrics=True, backend="faster_coco_eval")
    metric.warn_on_many_detections = False
    metric.update(
        [
            {
                "boxes": torch.from_numpy(one.boxes),
                "scores": torch.from_numpy(one.scores),
                "labels": torch.from_numpy(one.labels),
            }
            for one in found
        ],
        [
            {
                "boxes": torch.from_numpy(image.boxes),
                "labels": torch.from_numpy(image.labels),
                "iscrowd": torch.from_numpy(image.ignored.astype(np.int64)),
            }
            for image in images
        ],
    )
    values = metric.compute()
    numbers, precisions = values["classes"].reshape(-1), values["map_per_class"].reshape(-1)
    per_class = {
        classes[int(number)]: {"ap": float(precision)}
        for number, precision in zip(numbers, precisions, strict=True)
        if precision >= 0
    }
    return DetectionScores(
        max(0.0, float(values["map"])),
        max(0.0, float(values["map_50"])),
        per_class,
        found,
        images,
    )


def best_threshold(found: Sequence[Detections], images: Sequence[BoxedImage]) -> float:
    """The score from which on to believe boxes, so that F1 is best at IoU 0.5.

    Args:
        found: for each image, best first.
        images: the truth.

    Returns:
        The score; 0.5 where nothing is found rightly.
    """
    scores, right, wanted = [], [], 0
    for one, image in zip(found, images, strict=True):
        truth, labels = image.boxes[~image.ignored], image.labels[~image.ignored]
        wanted += len(truth)
        overlap = box_iou(torch.from_numpy(one.boxes), torch.from_numpy(truth)).numpy()
        overlap[one.labels[:, None] != labels[None]] = 0
        for row, score in zip(overlap, one.scores, strict=True):
            best = int(row.argmax()) if len(row) else 0
            hit = len(row) > 0 and row[best] >= 0.5
            if hit:
                overlap[:, best] = 0  # each true box is found once
            scores.append(float(score))
            right.append(hit)
    if not any(right):
        return 0.5
    order = np.argsort(-np.array(scores), kind="stable")
    hits = np.cumsum(np.array(right)[order])
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + wanted)
    return float(np.array(scores)[order][f1.argmax()])


def train_detector(
    encoder: Encoder,
    data: LabelledBoxes,
    settings: DetectorSettings,
    hardware: Hardware | None = None,
    files: TrainingFiles = NO_FILES,
    title: str = "finetune",
) -> Detector:
    """Fine-tune a copy of an encoder into a detector. The test part is not looked at.

    Args:
        encoder: left as it is.
        data: trained on ``train``; the weights with the best mean average precision on ``val`` are
            kept, the last ones where ``val`` is empty.
        settings: how.
        hardware: where; default one device.
        files: where metrics and checkpoints go.
        title: of the progress bar.

    Raises:
        UserError: the batch is larger than the training part.
    """
    batch_size = settings.batch(len(data.train), usual=8)
    canvas = choose_canvas(data.train, encoder)
    torch.manual_seed(settings.seed)  # the new head's weights
    detector = Detector(copy.deepcopy(encoder), len(data.classes), settings.kind, canvas)
    task = _DetectorTask(detector, settings)

    def judge() -> Judgement:
        scores = score_detector(detector, data.val, data.classes)
        values = {"val_map": scores.map, "val_map_50": scores.map_50}
        return Judgement((scores.map, scores.map_50), values)

    look = judge if data.val else None
    dataset = BoxDataset(data.train, canvas, settings)
    train(task, detector, dataset, batch_size, settings, look, hardware, files, title)
    judged = score_detector(detector, data.val or data.train, data.classes)
    detector.threshold = best_threshold(judged.found, judged.images)
    return detector


def save_detector(
    detector: Detector,
    folder: Path,
    classes: Sequence[str],
    about: dict[str, Any],
) -> None:
    """Write a model folder; see ``save_with_head``.

    Args:
        detector: from ``train_detector``.
        folder: where.
        classes: their names.
        about: more to say.
    """
    what = {
        "task": "detection",
        "classes": list(classes),
        "detector": detector.kind,
        "canvas": list(detector.canvas),
        "threshold": detector.threshold,
    }
    save_with_head(detector, detector.encoder, folder, {**what, **about})


def load_detector(folder: Path) -> tuple[Detector, list[str]]:
    """Load what ``save_detector`` wrote.

    Args:
        folder: a run of ``finetune``, or the ``model`` folder in it.

    Returns:
        The detector and the names of its classes.

    Raises:
        UserError: there is no detector, or it is damaged.
    """

    def build(encoder: Encoder, about: dict[str, Any]) -> Detector:
        kind, canvas, threshold = about["detector"], about["canvas"], about["threshold"]
        if kind not in get_args(Kind):
            raise ValueError(f"unknown detector {str(kind)[:60]!r}")
        if not isinstance(canvas, list) or len(canvas) != 2:
            raise ValueError("the canvas is no height and width")
        most = encoder.image_size + 32  # ``choose_canvas`` rounds up to steps of 32
        if not all(type(side) is int and 1 <= side <= most for side in canvas):
            raise ValueError(f"the sides of the canvas are not from 1 to {most} pixels")
        if not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
            raise ValueError("the threshold is no number from 0 to 1")
        encoder.stage_shapes(*canvas)
        detector = Detector(encoder, len(about["classes"]), kind, (canvas[0], canvas[1]))
        detector.threshold = float(threshold)
        return detector

    detector, about = load_with_head(folder, "detection", build)
    return detector, list(about["classes"])
