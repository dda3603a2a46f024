"""Evaluation of detectors, and the choice of a score threshold."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import box_iou

from vissl_lite.transfer.detection.data import BoxedImage
from vissl_lite.transfer.detection.model import Detections, Detector, detect
from vissl_lite.transfer.sources.run_lengths import runs_of_mask, text_of_runs
from vissl_lite.transfer.sources.shapes import as_coco


@dataclass(frozen=True)
class DetectionScores:
    """Metrics of a detector.

    Attributes:
        map: Mean average precision over IoU thresholds from 0.5 to 0.95, as COCO computes it.
        map_50: Mean average precision at IoU 0.5.
        per_class: ``{"ap": ...}`` by class name. Classes without a box are omitted.
        found: Detections of each readable image.
        images: The readable images.
        mask_map: Mean average precision of masks over IoU thresholds from 0.5 to 0.95, as COCO
            computes it; None without a mask head. ``per_class`` then has ``mask_ap``, too.
        mask_map_50: Mean average precision of masks at IoU 0.5.
    """

    map: float
    map_50: float
    per_class: dict[str, dict[str, float]]
    found: list[Detections]
    images: list[BoxedImage]
    mask_map: float | None = None
    mask_map_50: float | None = None
    right: None = None  # correctness is not defined per image

    @property
    def metrics(self) -> dict[str, float]:
        """``map`` and ``map_50``, of a mask head after ``mask_map`` and ``mask_map_50``."""
        boxes = {"map": self.map, "map_50": self.map_50}
        if self.mask_map is None or self.mask_map_50 is None:
            return boxes
        return {"mask_map": self.mask_map, "mask_map_50": self.mask_map_50, **boxes}


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
    mask_map = mask_map_50 = None
    if any(one.masks is not None for one in found):
        by_class, mask_map_50 = mask_precision(found, images, len(detector.classes))
        known = by_class[by_class >= 0]
        mask_map = float(known.mean()) if len(known) else 0.0
        for name, precision in zip(detector.classes, by_class.tolist(), strict=True):
            if name in per_class and precision >= 0:
                per_class[name] = {"mask_ap": precision, **per_class[name]}
    return DetectionScores(
        max(0.0, float(values["map"])),
        max(0.0, float(values["map_50"])),
        per_class,
        found,
        images,
        mask_map,
        mask_map_50,
    )


def mask_precision(
    found: Sequence[Detections], images: Sequence[BoxedImage], classes: int
) -> tuple[np.ndarray, float]:
    """Average precision of masks, as COCO computes it.

    Masks are compared as run lengths at the size of the image. Objects without a shape are ignored:
    what is found in their box counts neither for nor against the detector.

    Args:
        found: Detections of each image, with masks.
        images: Images with their shapes.
        classes: Number of classes K.

    Returns:
        Mean over IoU thresholds from 0.5 to 0.95 of each class, ``(K,)``, -1 for a class without
        objects; and the mean over classes at IoU 0.5.
    """
    listed: list[dict[str, object]] = []
    truth: list[dict[str, object]] = []
    results: list[dict[str, object]] = []
    for number, (one, image) in enumerate(zip(found, images, strict=True), start=1):
        height, width = image.size
        listed.append({"id": number, "height": height, "width": width})
        drawn = image.has_shape
        for index, label in enumerate(image.labels.tolist()):
            box = image.boxes[index]
            if drawn[index]:
                runs = runs_of_mask(image.mask(index) > 0)
            else:
                left, top = np.floor(box[:2]).astype(int)
                right, bottom = np.ceil(box[2:]).astype(int)
                inside = np.ones((bottom - top, right - left), bool)
                runs = runs_of_mask(inside, (left, top), image.size)
            segmentation = {"size": [height, width], "counts": text_of_runs(runs)}
            truth.append(
                {
                    "id": len(truth) + 1,
                    "image_id": number,
                    "category_id": label,
                    "segmentation": segmentation,
                    "area": int(runs[1::2].sum()),
                    "bbox": [0, 0, width, height],  # not used for masks, but required
                    "iscrowd": int(image.ignored[index] or not drawn[index]),
                }
            )
        for label, score, mask in zip(
            one.labels.tolist(), one.scores.tolist(), one.masks or (), strict=True
        ):
            results.append(
                {
                    "image_id": number,
                    "category_id": label,
                    "segmentation": as_coco(mask, image.size),
                    "score": score,
                }
            )
    content = {
        "images": listed,
        "annotations": truth,
        "categories": [{"id": label, "name": str(label)} for label in range(classes)],
    }
    coco = COCO(content)
    evaluation = COCOeval_faster(coco, coco.loadRes(results), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    # thresholds, recalls, classes, all areas, up to 100 detections
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    by_class = precision.mean(axis=(0, 1))  # -1 throughout for a class without objects
    at_50 = precision[0].mean(axis=0)[by_class >= 0]
    return by_class, float(at_50.mean()) if len(at_50) else 0.0


def match_boxes(
    found: Sequence[Detections], images: Sequence[BoxedImage]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find which boxes are right: of the class of a true box, at IoU 0.5, which no better box has.

    As in COCO's evaluation, other boxes that lie at least half in an ignored one of their class are
    neither right nor wrong.

    Args:
        found: Detections of each image, sorted by descending score.
        images: Images with their true boxes.

    Returns:
        Scores ``(N,)`` float64, ``(N,)`` bool, whether they are right, and ``(N,)`` int64, the
        index of the image, of the boxes that count in all images, in their order.
    """
    scores, right, numbers = [], [], []
    for number, (one, image) in enumerate(zip(found, images, strict=True)):
        same = one.labels[:, None] == image.labels[None]
        overlap = box_iou(torch.from_numpy(one.boxes), torch.from_numpy(image.boxes)).numpy()
        overlap = np.where(same & ~image.ignored, overlap, 0)
        covered = _covered_share(one.boxes, image.boxes) >= 0.5
        beside = (covered & same & image.ignored).any(axis=1)
        for row, score, may_be_ignored in zip(overlap, one.scores, beside, strict=True):
            best = int(row.argmax()) if len(row) else 0
            hit = len(row) > 0 and row[best] >= 0.5
            if hit:
                overlap[:, best] = 0  # each true box matches only once
            elif may_be_ignored:
                continue
            scores.append(float(score))
            right.append(bool(hit))
            numbers.append(number)
    return np.array(scores, np.float64), np.array(right, bool), np.array(numbers, np.int64)


def _covered_share(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Share of the area of each of N boxes that lies in each of M others, ``(N, M)``."""
    sides = np.minimum(boxes[:, None, 2:], others[:, 2:]) - np.maximum(
        boxes[:, None, :2], others[:, :2]
    )
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return np.asarray(sides.clip(min=0).prod(axis=2) / areas[:, None].clip(min=1e-9))


def best_threshold(found: Sequence[Detections], images: Sequence[BoxedImage]) -> float:
    """Find the score threshold with the best F1 at IoU 0.5.

    Args:
        found: Detections of each image, sorted by descending score.
        images: Images with their true boxes.

    Returns:
        Minimum score of the boxes to keep; 0.5 if no detection is correct.
    """
    scores, right, _ = match_boxes(found, images)
    wanted = sum(int((~image.ignored).sum()) for image in images)
    if not right.any():
        return 0.5
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(right[order])
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + wanted)
    return float(scores[order][f1.argmax()])
