"""Evaluation of detectors, and the choice of a score threshold."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from torchvision.ops import box_iou

from vissl_lite.transfer.detection.data import BoxedImage
from vissl_lite.transfer.detection.model import MIN_MAX_BOXES, Detections, Detector, detect
from vissl_lite.transfer.jackknife import pseudo_values
from vissl_lite.transfer.sources.run_lengths import runs_of_mask, text_of_runs
from vissl_lite.transfer.sources.shapes import as_coco


@dataclass(frozen=True)
class DetectionScores:
    """Metrics of a detector.

    Attributes:
        map: Mean average precision over IoU thresholds from 0.5 to 0.95, as COCO computes it, but
            of all boxes that the detector returns: more than COCO's 100 in crowded images.
        map_50: Mean average precision at IoU 0.5.
        per_class: ``{"ap": ...}`` by class name. Classes without a box are omitted.
        found: Detections of each readable image.
        images: The readable images.
        mask_map: Mean average precision of masks over IoU thresholds from 0.5 to 0.95, as COCO
            computes it; None without a mask head. ``per_class`` then has ``mask_ap``, too.
        mask_map_50: Mean average precision of masks at IoU 0.5.
        evaluation: That of masks, or of boxes without a mask head.
        units: ``(N,)`` blocks of the images for ``per_image``; None for none.
    """

    map: float
    map_50: float
    per_class: dict[str, dict[str, float]]
    found: list[Detections]
    images: list[BoxedImage]
    mask_map: float | None = None
    mask_map_50: float | None = None
    evaluation: COCOeval_faster | None = None
    units: np.ndarray | None = None

    @cached_property
    def per_image(self) -> np.ndarray | None:
        """``(N,)`` jackknife pseudo-values of ``mask_map``, or ``map`` without a mask head.

        Computed when they are asked for, as each block takes an evaluation.
        """
        evaluation = self.evaluation
        if evaluation is None or self.units is None:
            return None
        return pseudo_values(
            lambda kept: mean_of_known(average_precision(evaluation, kept)[0]), self.units
        )

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
    units: np.ndarray | None = None,
) -> DetectionScores:
    """Evaluate a detector on images with boxes.

    Args:
        detector: Detector to evaluate.
        part: Images with their boxes. Unreadable ones are skipped and logged.
        progress: Called with the number of images processed since the last call.
        units: ``(N,)`` blocks of images for ``per_image``; None for none.

    Raises:
        UserError: If no image can be read.
    """
    found, good = detect(detector, [image.path for image in part], progress)
    images = [image for image, fine in zip(part, good, strict=True) if fine]
    names = detector.classes
    boxes = coco_evaluation(found, images, len(names), "bbox", detector.max_boxes)
    main, (by_class, map_50) = boxes, average_precision(boxes)
    per_class = {
        name: {"ap": precision}
        for name, precision in zip(names, by_class.tolist(), strict=True)
        if precision >= 0
    }
    mask_map = mask_map_50 = None
    if any(one.masks is not None for one in found):
        main = coco_evaluation(found, images, len(names), "segm", detector.max_boxes)
        of_masks, mask_map_50 = average_precision(main)
        mask_map = mean_of_known(of_masks)
        for name, precision in zip(names, of_masks.tolist(), strict=True):
            if name in per_class and precision >= 0:
                per_class[name] = {"mask_ap": precision, **per_class[name]}
    return DetectionScores(
        mean_of_known(by_class),
        map_50,
        per_class,
        found,
        images,
        mask_map,
        mask_map_50,
        main,
        None if units is None else units[good],
    )


def mean_of_known(by_class: np.ndarray) -> float:
    """Mean over classes of what is not -1; 0 if there is none."""
    known = by_class[by_class >= 0]
    return float(known.mean()) if len(known) else 0.0


def coco_evaluation(
    found: Sequence[Detections],
    images: Sequence[BoxedImage],
    classes: int,
    kind: Literal["bbox", "segm"],
    max_boxes: int = MIN_MAX_BOXES,
) -> COCOeval_faster:
    """Prepare an evaluation as COCO's; image N has the number N + 1.

    Masks are compared as run lengths at the size of the image. Objects without a shape are ignored:
    what is found in their box counts neither for nor against the detector.

    Args:
        found: Detections of each image; with masks for ``segm``.
        images: Images with their boxes, and with their shapes for ``segm``.
        classes: Number of classes K.
        kind: Whether boxes or masks are compared.
        max_boxes: Detections of an image and class that count, at most; 100 in COCO.
    """
    truth: list[dict[str, object]] = []
    results: list[dict[str, object]] = []
    for number, (one, image) in enumerate(zip(found, images, strict=True), start=1):
        drawn = image.has_shape
        for index, label in enumerate(image.labels.tolist()):
            about: dict[str, object] = {
                "id": len(truth) + 1,
                "image_id": number,
                "category_id": label,
            }
            box = image.boxes[index]
            left, top, width, height = _as_coco_box(box)
            shape: dict[str, object]
            if kind == "bbox":
                shape = {"bbox": [left, top, width, height], "area": width * height}
            else:
                runs = _runs_of_object(image, index, drawn[index])
                segmentation = {"size": list(image.size), "counts": text_of_runs(runs)}
                shape = {"segmentation": segmentation, "area": int(runs[1::2].sum())}
                shape["bbox"] = [left, top, width, height]  # not used, but required
            ignored = image.ignored[index] or (kind == "segm" and not drawn[index])
            truth.append({**about, **shape, "iscrowd": int(ignored)})
        labels, scores = one.labels.tolist(), one.scores.tolist()
        shapes: list[dict[str, object]] = (
            [{"bbox": _as_coco_box(box)} for box in one.boxes]
            if kind == "bbox"
            else [{"segmentation": as_coco(mask, image.size)} for mask in one.masks or ()]
        )
        results += [
            {"image_id": number, "category_id": label, "score": score, **shape}
            for label, score, shape in zip(labels, scores, shapes, strict=True)
        ]
    listed = [
        {"id": number, "height": image.size[0], "width": image.size[1]}
        for number, image in enumerate(images, start=1)
    ]
    categories = [{"id": label, "name": str(label)} for label in range(classes)]
    coco = COCO({"images": listed, "annotations": truth, "categories": categories})
    evaluation = COCOeval_faster(coco, coco.loadRes(results), kind)
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
    evaluation.params.maxDets = [max_boxes]
    return evaluation


def _as_coco_box(box: np.ndarray) -> list[float]:
    """Left, top, width and height of a box."""
    left, top, right, bottom = box.tolist()
    return [left, top, right - left, bottom - top]


def _runs_of_object(image: BoxedImage, index: int, drawn: bool) -> np.ndarray:
    """Run lengths of an object's mask, or of its box if it has no shape."""
    if drawn:
        return runs_of_mask(image.mask(index) > 0)
    left, top = np.floor(image.boxes[index][:2]).astype(int)
    right, bottom = np.ceil(image.boxes[index][2:]).astype(int)
    return runs_of_mask(np.ones((bottom - top, right - left), bool), (left, top), image.size)


def average_precision(
    evaluation: COCOeval_faster, images: np.ndarray | None = None
) -> tuple[np.ndarray, float]:
    """Average precision of objects of all sizes, as COCO computes it.

    Args:
        evaluation: See ``coco_evaluation``.
        images: Indices of the images to evaluate on. Default: all.

    Returns:
        Mean over IoU thresholds from 0.5 to 0.95 of each class, ``(K,)``, -1 for a class without
        objects; and the mean over classes at IoU 0.5, 0 without any object.
    """
    everything = evaluation.cocoGt.getImgIds()
    evaluation.params.imgIds = everything if images is None else (images + 1).tolist()
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # thresholds, recalls, classes
    by_class = precision.mean(axis=(0, 1))  # -1 throughout for a class without objects
    at_50 = precision[0].mean(axis=0)[by_class >= 0]
    return by_class, float(at_50.mean()) if len(at_50) else 0.0


def match_boxes(
    found: Sequence[Detections], images: Sequence[BoxedImage]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Find which boxes are right: of the class of a true box, at IoU 0.5, which no better box has.

    As in COCO's evaluation, other boxes that lie at least half in an ignored one of their class are
    neither right nor wrong.

    Args:
        found: Detections of each image, sorted by descending score.
        images: Images with their true boxes.

    Returns:
        Scores ``(N,)`` float64, ``(N,)`` bool, whether they are right, ``(N,)`` int64, the index of
        the image, and ``(N,)`` int64, the class, of the boxes that count in all images, in their
        order.
    """
    scores, right, numbers, labels = [], [], [], []
    for number, (one, image) in enumerate(zip(found, images, strict=True)):
        same = one.labels[:, None] == image.labels[None]
        overlap = box_iou(torch.from_numpy(one.boxes), torch.from_numpy(image.boxes)).numpy()
        overlap = np.where(same & ~image.ignored, overlap, 0)
        covered = _covered_share(one.boxes, image.boxes) >= 0.5
        beside = (covered & same & image.ignored).any(axis=1)
        boxes = zip(overlap, one.scores, one.labels, beside, strict=True)
        for row, score, label, may_be_ignored in boxes:
            best = int(row.argmax()) if len(row) else 0
            hit = len(row) > 0 and row[best] >= 0.5
            if hit:
                overlap[:, best] = 0  # each true box matches only once
            elif may_be_ignored:
                continue
            scores.append(float(score))
            right.append(bool(hit))
            numbers.append(number)
            labels.append(int(label))
    return (
        np.array(scores, np.float64),
        np.array(right, bool),
        np.array(numbers, np.int64),
        np.array(labels, np.int64),
    )


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
    scores, right, *_ = match_boxes(found, images)
    wanted = sum(int((~image.ignored).sum()) for image in images)
    if not right.any():
        return 0.5
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(right[order])
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + wanted)
    return float(scores[order][f1.argmax()])
