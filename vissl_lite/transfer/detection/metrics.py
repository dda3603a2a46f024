"""Evaluation of detectors, and the choice of a score threshold."""

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
    """Metrics of a detector.

    Attributes:
        map: Mean average precision over IoU thresholds from 0.5 to 0.95, as COCO computes it.
        map_50: Mean average precision at IoU 0.5.
        per_class: ``{"ap": ...}`` by class name. Classes without a box are omitted.
        found: Detections of each readable image.
        images: The readable images.
    """

    map: float
    map_50: float
    per_class: dict[str, dict[str, float]]
    found: list[Detections]
    images: list[BoxedImage]
    right: None = None  # correctness is not defined per image

    @property
    def metrics(self) -> dict[str, float]:
        """The values of ``map`` and ``map_50``."""
        return {"map": self.map, "map_50": self.map_50}


def score_detector(
    detector: Detector,
    part: Sequence[BoxedImage],
    progress: Callable[[int], None] | None = None,
) -> DetectionScores:
    """Evaluate a detector on images with boxes.

    Args:
        detector: Detector to evaluate.
        part: Images with their boxes. Unreadable ones are skipped and logged.
        progress: Called with the number of images processed since the last call.

    Raises:
        UserError: If no image can be read.
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
    """Find the score threshold with the best F1 at IoU 0.5.

    Args:
        found: Detections of each image, sorted by descending score.
        images: Images with their true boxes.

    Returns:
        Minimum score of the boxes to keep; 0.5 if no detection is correct.
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
                overlap[:, best] = 0  # each true box matches only once
            scores.append(float(score))
            right.append(hit)
    if not any(right):
        return 0.5
    order = np.argsort(-np.array(scores), kind="stable")
    hits = np.cumsum(np.array(right)[order])
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + wanted)
    return float(np.array(scores)[order][f1.argmax()])
