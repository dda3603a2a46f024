"""How well a detector does, and from which score on to believe it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import box_iou

from vissl_lite.transfer.detection.data import BoxedImage
from vissl_lite.transfer.detection.model import Detections, Detector, detect


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
    right: None = None  # images are not what is counted

    @property
    def metrics(self) -> dict[str, float]:
        """``map`` and ``map_50``."""
        return {"map": self.map, "map_50": self.map_50}


def score_detector(
    detector: Detector,
    part: Sequence[BoxedImage],
    progress: Callable[[int], None] | None = None,
) -> DetectionScores:
    """Score a detector on images with boxes.

    Args:
        detector: from ``train_detector``.
        part: the images.
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
        detector.classes[int(number)]: {"ap": float(precision)}
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
