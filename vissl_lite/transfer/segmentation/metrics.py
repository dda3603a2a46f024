"""Evaluation of segmenters."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from vissl_lite.data.image_reader import ImageReader, volume_of
from vissl_lite.data.images import BROKEN_IMAGE
from vissl_lite.data.reading import reason
from vissl_lite.inference import inference_mode, report_broken
from vissl_lite.transfer.jackknife import pseudo_values
from vissl_lite.transfer.segmentation.data import MaskedImage
from vissl_lite.transfer.segmentation.mask_source import IGNORE_INDEX
from vissl_lite.transfer.segmentation.model import (
    Segmenter,
    resize_probabilities,
    segment_all,
    segmentation_loss,
)

IMAGES_PER_BATCH = 8  # read in parallel

# Probabilities of the images that are segmented together at most: 256 MB. Large images are
# segmented one by one.
MOST_PROBABILITIES = 1 << 26


@dataclass(frozen=True)
class SegmentationScores:
    """Metrics of a segmenter on a split.

    Attributes:
        miou: Mean intersection over union of the classes that occur in truth or prediction.
        dice: Mean Dice coefficient of the same classes.
        accuracy: Fraction of correctly classified pixels.
        loss: Mean of the unweighted ``segmentation_loss`` over images.
        per_class: ``iou`` and ``dice`` by class name, for the same classes. Of slices of volumes
            also ``volume_dice``, the mean over volumes, and ``volume_dice_std``.
        confusion: Number of pixels ``(K, K)`` by true class (row) and predicted class (column).
        volume_dice: Mean of ``volume_dice`` over all classes but the first, the background; None
            if there are no volumes.
        per_image: ``(N,)`` jackknife pseudo-values of ``miou``; None if they were not asked for.
    """

    miou: float
    dice: float
    accuracy: float
    loss: float
    per_class: dict[str, dict[str, float]]
    confusion: np.ndarray
    volume_dice: float | None = None
    per_image: np.ndarray | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """The values of ``miou``, ``dice`` and ``accuracy``, of volumes also ``volume_dice``."""
        metrics = {"miou": self.miou, "dice": self.dice, "accuracy": self.accuracy}
        return metrics if self.volume_dice is None else metrics | {"volume_dice": self.volume_dice}


def score_confusion(
    confusion: np.ndarray,
    classes: Sequence[str],
    loss: float,
    volumes: Sequence[np.ndarray] = (),
) -> SegmentationScores:
    """Compute metrics from the confusion matrix of a split; see ``SegmentationScores``.

    Args:
        confusion: ``(K, K)`` pixels.
        classes: K names.
        loss: Mean loss.
        volumes: The confusion matrix of each volume.
    """
    right = np.diag(confusion).astype(float)
    either = confusion.sum(axis=0) + confusion.sum(
        axis=1
    )  # pixels in truth plus pixels in prediction
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
    volume_dice = _add_volumes(per_class, classes, volumes)
    return SegmentationScores(miou, dice, accuracy, loss, per_class, confusion, volume_dice)


def mean_iou(hits: np.ndarray, either: np.ndarray) -> float:
    """Mean intersection over union of the classes that occur.

    Args:
        hits: ``(K,)`` pixels that have the class in truth and prediction.
        either: ``(K,)`` pixels in truth plus pixels in prediction.
    """
    occurs = either > 0
    return float((hits[occurs] / (either - hits)[occurs]).mean()) if occurs.any() else 0.0


def _add_volumes(
    per_class: dict[str, dict[str, float]], classes: Sequence[str], volumes: Sequence[np.ndarray]
) -> float | None:
    """Add the Dice coefficients of volumes to those of each class; return their mean."""
    means = []
    for number, name in enumerate(classes):
        found = []
        for confusion in volumes:
            total = confusion[number].sum() + confusion[:, number].sum()
            if total:
                found.append(2 * float(confusion[number, number]) / float(total))
        if found:
            std = float(np.std(found, ddof=1)) if len(found) > 1 else 0.0
            per_class[name] |= {"volume_dice": float(np.mean(found)), "volume_dice_std": std}
            if number:
                means.append(float(np.mean(found)))
    return float(np.mean(means)) if means else None


def _segmented(
    segmenter: Segmenter, images: Sequence[np.ndarray], device: torch.device
) -> Iterator[Tensor]:
    """The probabilities of each image, of as many at once as ``MOST_PROBABILITIES`` allows."""
    together: list[np.ndarray] = []
    for image in images:
        pixels = sum(one.shape[0] * one.shape[1] for one in [*together, image])
        if together and pixels * len(segmenter.classes) > MOST_PROBABILITIES:
            yield from segment_all(segmenter, together, device)
            together = []
        together.append(image)
    if together:
        yield from segment_all(segmenter, together, device)


def score_segmenter(
    segmenter: Segmenter,
    part: Sequence[MaskedImage],
    progress: Callable[[int], None] | None = None,
    units: np.ndarray | None = None,
) -> SegmentationScores:
    """Evaluate a segmenter at the resolution of the masks.

    Args:
        segmenter: Segmenter. It is moved to the accelerator, if there is one, and back afterwards.
        part: Images and masks. Unreadable ones are skipped and logged.
        progress: Called with the number of images processed since the last call.
        units: ``(N,)`` blocks of images for ``per_image``; None for none.

    Raises:
        UserError: If no image can be read.
    """
    classes = segmenter.classes
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    volumes: dict[str, np.ndarray] = {}
    losses: list[float] = []
    pixels: list[np.ndarray] = []  # of each image: hits, and those in truth plus prediction
    faults: list[str | None] = []
    with inference_mode(segmenter) as device:
        for pairs in _read(part, segmenter.encoder.reader):
            paths = [one.path for one in part[len(faults) : len(faults) + len(pairs)]]
            good = [p for p, pair in zip(paths, pairs, strict=True) if not isinstance(pair, str)]
            faults += [pair if isinstance(pair, str) else None for pair in pairs]
            found = [pair for pair in pairs if not isinstance(pair, str)]
            segmented = _segmented(segmenter, [image for image, _ in found], device)
            for path, (_, mask), one in zip(good, found, segmented, strict=True):
                target = torch.from_numpy(mask).to(device).long()
                logits = resize_probabilities(one, *mask.shape).clamp_min(1e-8).log()
                losses.append(float(segmentation_loss(logits[None], target[None])))
                counts = multiclass_confusion_matrix(
                    logits.argmax(dim=0),
                    target,
                    len(classes),
                    ignore_index=IGNORE_INDEX,
                    validate_args=False,
                )
                of_image = counts.cpu().numpy()
                confusion += of_image
                if units is not None:
                    either = of_image.sum(axis=0) + of_image.sum(axis=1)
                    pixels.append(np.stack([np.diag(of_image), either]))
                volume = volume_of(path)
                if volume is not None:
                    volumes[volume] = volumes.get(volume, 0) + of_image
            if progress is not None:
                progress(len(pairs))
    report_broken([one.path for one in part], faults)
    scores = score_confusion(confusion, classes, float(np.mean(losses)), list(volumes.values()))
    if units is None:
        return scores
    counted = np.stack(pixels)
    blocks = units[[fault is None for fault in faults]]
    per_image = pseudo_values(lambda kept: mean_iou(*counted[kept].sum(axis=0)), blocks)
    return replace(scores, per_image=per_image)


def _read(
    part: Sequence[MaskedImage], reader: ImageReader
) -> Iterator[list[tuple[np.ndarray, np.ndarray] | str]]:
    """Yield batches of images and masks, or of the reason why they can't be read."""

    def read(one: MaskedImage) -> tuple[np.ndarray, np.ndarray] | str:
        try:
            image = reader.read(one.path)
        except BROKEN_IMAGE as error:
            return reason(error, one.path)
        try:
            return image, one.mask.read()
        except BROKEN_IMAGE as error:
            return f"its mask {one.mask.file}: {reason(error, one.mask.file)}"

    with ThreadPoolExecutor(4) as pool:
        for start in range(0, len(part), IMAGES_PER_BATCH):
            yield list(pool.map(read, part[start : start + IMAGES_PER_BATCH]))
