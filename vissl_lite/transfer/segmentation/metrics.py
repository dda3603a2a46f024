"""How well a segmenter does."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torchmetrics.functional.classification import multiclass_confusion_matrix

from vissl_lite.data.images import BROKEN_IMAGE, read_image
from vissl_lite.data.reading import reason
from vissl_lite.inference import inference_mode, report_broken
from vissl_lite.transfer.segmentation.data import IGNORE, MaskedImage, read_mask
from vissl_lite.transfer.segmentation.model import (
    Segmenter,
    enlarge,
    segment_all,
    segmentation_loss,
)

IMAGES = 8  # that are read at a time


@dataclass(frozen=True)
class SegmentationScores:
    """How well a segmenter does on a part.

    Attributes:
        miou: intersection over union, the mean over the classes that occur in truth or prediction.
        dice: Dice coefficient, likewise.
        accuracy: share of pixels that are classified rightly.
        loss: ``segmentation_loss`` with equal weights, the mean over images.
        per_class: ``iou`` and ``dice`` by the names of those classes.
        confusion: ``(K, K)`` pixels, by true class (row) and predicted class (column).
    """

    miou: float
    dice: float
    accuracy: float
    loss: float
    per_class: dict[str, dict[str, float]]
    confusion: np.ndarray
    right: None = None  # images are not what is counted

    @property
    def metrics(self) -> dict[str, float]:
        """``miou``, ``dice`` and ``accuracy``."""
        return {"miou": self.miou, "dice": self.dice, "accuracy": self.accuracy}


def score_confusion(
    confusion: np.ndarray, classes: Sequence[str], loss: float
) -> SegmentationScores:
    """Scores from a confusion matrix over a whole part; see ``SegmentationScores``."""
    right = np.diag(confusion).astype(float)
    either = confusion.sum(axis=0) + confusion.sum(axis=1)  # truth plus prediction
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
    return SegmentationScores(miou, dice, accuracy, loss, per_class, confusion)


def score_segmenter(
    segmenter: Segmenter,
    part: Sequence[MaskedImage],
    progress: Callable[[int], None] | None = None,
) -> SegmentationScores:
    """Score a segmenter at the masks' own resolution.

    Args:
        segmenter: put on the accelerator if there is one, and back afterwards.
        part: images and masks; those that can't be read are left out, and named in the log.
        progress: called with the number of images done since the last call.

    Raises:
        UserError: no image can be read.
    """
    classes = segmenter.classes
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    losses: list[float] = []
    faults: list[str | None] = []
    with inference_mode(segmenter) as device:
        for pairs in _read(part):
            faults += [pair if isinstance(pair, str) else None for pair in pairs]
            found = [pair for pair in pairs if not isinstance(pair, str)]
            images = [image for image, _ in found]
            shares = segment_all(segmenter, images, device)
            for (_, mask), share in zip(found, shares, strict=True):
                target = torch.from_numpy(mask).to(device).long()
                logits = enlarge(share, *mask.shape).clamp_min(1e-8).log()
                losses.append(float(segmentation_loss(logits[None], target[None])))
                counts = multiclass_confusion_matrix(
                    logits.argmax(dim=0),
                    target,
                    len(classes),
                    ignore_index=IGNORE,
                    validate_args=False,
                )
                confusion += counts.cpu().numpy()
            if progress is not None:
                progress(len(pairs))
    report_broken([one.path for one in part], faults)
    return score_confusion(confusion, classes, float(np.mean(losses)))


def _read(
    part: Sequence[MaskedImage],
) -> Iterator[list[tuple[np.ndarray, np.ndarray] | str]]:
    """Images and masks, some at a time; for those that can't be read, why."""

    def read(one: MaskedImage) -> tuple[np.ndarray, np.ndarray] | str:
        try:
            image = read_image(one.path)
        except BROKEN_IMAGE as error:
            return reason(error, one.path)
        try:
            return image, read_mask(one.mask, one.binary)
        except BROKEN_IMAGE as error:
            return f"its mask {one.mask}: {reason(error, one.mask)}"

    with ThreadPoolExecutor(4) as pool:
        for start in range(0, len(part), IMAGES):
            yield list(pool.map(read, part[start : start + IMAGES]))
