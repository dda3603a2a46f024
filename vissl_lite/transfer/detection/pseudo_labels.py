"""Pseudo-labels of detection: images whose boxes are all confident, in COCO's format."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch

from vissl_lite.data.atomic_file import write_atomically
from vissl_lite.data.json_file import read_json
from vissl_lite.errors import UserError, did_you_mean
from vissl_lite.plots import draw_boxes
from vissl_lite.transfer.confidence import Confidence, Cutoff, HeldOut
from vissl_lite.transfer.dataset import sample
from vissl_lite.transfer.detection.data import BoxedImage, LabelledBoxes, as_coco_content
from vissl_lite.transfer.detection.data.cleaning import clean
from vissl_lite.transfer.detection.data.coco import read_coco
from vissl_lite.transfer.detection.metrics import match_boxes
from vissl_lite.transfer.detection.model import Detections, Detector, detect, detect_in_batches
from vissl_lite.transfer.prediction import Predictions, PseudoLabelled
from vissl_lite.transfer.sources.file_tree import FileTree
from vissl_lite.transfer.sources.groups import group_names
from vissl_lite.transfer.sources.reading_log import ReadingLog

ANNOTATIONS = "pseudo_labels.json"


def held_out_boxes(detector: Detector, data: LabelledBoxes) -> HeldOut:
    """Scores and classes ``(N, 2)`` of the boxes in the validation images, and which are right.

    Those of ignored objects are left out; see ``match_boxes``.
    """
    part = sample(data.val)
    found, good = detect(detector, [image.path for image in part])
    images = [image for image, fine in zip(part, good, strict=True) if fine]
    scores, right, numbers, labels = match_boxes(found, images)
    paths = [one.path for one in images]
    groups = group_names(paths, data.reading.groups)
    names = np.array(paths) if groups is None else groups
    outputs = torch.from_numpy(np.stack([scores, labels], axis=1))
    return HeldOut(outputs, torch.from_numpy(right), names[numbers])


def measure_confidence(held_out: HeldOut) -> Confidence:
    """Count the right boxes; see ``match_boxes``.

    Scores need no temperature: their order, which it would not change, is all that is used.
    """
    scores, labels = held_out.outputs.numpy().T
    right = held_out.target.numpy()
    return Confidence.measured(
        "boxes", scores, right, held_out.images, 1.0, labels.astype(np.int64)
    )


def confident_boxes(found: Detections, cutoff: Cutoff, shown: float) -> np.ndarray | None:
    """Which boxes of an image are labels.

    An image enters a data set whole: what has no box in it is trained to be background. It is
    therefore left out if any box is uncertain, which is one that would be shown to a user, but is
    not confident enough to be a label.

    Args:
        found: Boxes of the image.
        cutoff: Scores from which a box is a label.
        shown: Score from which boxes are shown, ``Detector.threshold``.

    Returns:
        ``(N,)`` bool; None if the image is left out, or has no such box.
    """
    sure = found.scores >= cutoff.of(found.labels)
    uncertain = (found.scores >= shown) & ~sure
    return None if uncertain.any() or not sure.any() else sure


def write_pseudo_labels(
    detector: Detector, cutoff: Cutoff, predictions: Predictions
) -> PseudoLabelled:
    """Write ``pseudo_labels.json`` in COCO's format, with a score for each annotation.

    Args:
        detector: Model that predicts.
        cutoff: Which boxes are labels.
        predictions: The images, and the folder to write to.
    """
    images: list[BoxedImage] = []
    scores: list[float] = []

    def use(paths: list[str], found: list[Detections], sizes: list[tuple[int, int]]) -> None:
        for path, one, size in zip(paths, found, sizes, strict=True):
            sure = confident_boxes(one, cutoff, detector.threshold)
            if sure is None:
                continue
            labels = one.labels[sure]
            masks = [mask for mask, kept in zip(one.masks or (), sure, strict=False) if kept]
            ignored = np.zeros(len(labels), bool)
            images.append(BoxedImage(path, size, one.boxes[sure], labels, ignored, tuple(masks)))
            scores.extend(one.scores[sure].tolist())
            drawn = partial(
                draw_boxes,
                boxes=one.boxes[sure],
                labels=labels,
                classes=detector.classes,
                scores=one.scores[sure],
                masks=one.drawn(sure, size),
            )
            predictions.draw(len(images) - 1, path, detector.encoder.reader, drawn)

    good = detect_in_batches(detector, predictions.paths, use, predictions.advance)
    content = as_coco_content(detector.classes, images, {})
    for annotation, score in zip(content["annotations"], scores, strict=True):
        annotation["score"] = round(score, 4)
    file = predictions.run / ANNOTATIONS
    write_atomically(file, json.dumps(content) + "\n")
    labels = np.concatenate([np.empty(0, np.int64), *(one.labels for one in images)])
    return PseudoLabelled(
        file,
        int(good.sum()),
        [str(Path(one.path).absolute()) for one in images],
        np.bincount(labels, minlength=len(detector.classes)),
    )


def read_pseudo_labels(folder: Path, data: LabelledBoxes) -> LabelledBoxes:
    """Read ``pseudo_labels.json``.

    Args:
        folder: Folder of the file.
        data: Labelled images, whose classes count.

    Raises:
        UserError: There is no such file, it is damaged, or a box has an unknown class.
    """
    file = folder / ANNOTATIONS
    reading = ReadingLog(str(file))
    tree = FileTree(folder)
    found = read_coco(file, read_json(file), None, tree, reading, data.with_shapes)
    numbers = {name: index for index, name in enumerate(data.classes)}
    images = []
    for one in found.images:
        for name in one.names:
            if name not in numbers:
                raise UserError(
                    f"{file}: the data have no class {name!r}: {did_you_mean(name, data.classes)}"
                )
        cleaned = clean([one], numbers, reading)
        if cleaned is not None:
            images.append(BoxedImage(one.image, *cleaned))
    reading.report()
    return LabelledBoxes(data.classes, images, [], [], data.reading, data.with_shapes)
