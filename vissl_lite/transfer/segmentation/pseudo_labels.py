"""Pseudo-labels of segmentation: masks in which uncertain pixels are ignored."""

import csv
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vissl_lite.data.atomic_file import atomic_write
from vissl_lite.data.formats import image_header
from vissl_lite.data.images import BROKEN_IMAGE
from vissl_lite.data.reading import reason
from vissl_lite.data.text_file import read_text
from vissl_lite.errors import UserError, did_you_mean
from vissl_lite.inference import inference_mode, report_broken
from vissl_lite.plots import draw_mask
from vissl_lite.transfer.confidence import Confidence, Cutoff, HeldOut, calibrated
from vissl_lite.transfer.dataset import sample
from vissl_lite.transfer.prediction import Predictions, PseudoLabelled, growing_file
from vissl_lite.transfer.segmentation.data import LabelledMasks, MaskedImage
from vissl_lite.transfer.segmentation.mask_source import IGNORE_INDEX, MaskSource, read_mask
from vissl_lite.transfer.segmentation.model import Segmenter, segment
from vissl_lite.transfer.sources.groups import group_names
from vissl_lite.transfer.sources.tables import read_table

TABLE, CLASSES = "pseudo_labels.csv", "classes.txt"

# Held-out images, and pixels of each, that confidence is measured on.
HELD_OUT_IMAGES, HELD_OUT_PIXELS = 500, 500


def held_out_pixels(segmenter: Segmenter, data: LabelledMasks) -> HeldOut:
    """Log-probabilities ``(N, K)`` and classes of pixels drawn from the validation images."""
    part = sample(data.val, HELD_OUT_IMAGES)
    groups = group_names([one.path for one in part], data.reading.groups)
    random = np.random.default_rng(0)
    outputs = [torch.empty(0, len(segmenter.classes))]
    targets = [np.empty(0, np.int64)]
    images: list[str] = []
    with inference_mode(segmenter):
        for index, one in enumerate(part):
            try:
                image, mask = segmenter.encoder.reader.read(one.path), one.mask.read()
            except BROKEN_IMAGE:  # which has been logged when the metrics were computed
                continue
            valid = np.flatnonzero(mask != IGNORE_INDEX)
            chosen = random.permutation(valid)[:HELD_OUT_PIXELS]
            found = segment(segmenter, image).reshape(len(segmenter.classes), -1)
            outputs.append(log_probabilities(torch.from_numpy(found[:, chosen].T.copy())))
            targets.append(mask.ravel()[chosen].astype(np.int64))
            images += [one.path if groups is None else str(groups[index])] * len(chosen)
    target = torch.from_numpy(np.concatenate(targets))
    return HeldOut(torch.cat(outputs), target, np.array(images, dtype=str))


def log_probabilities(probabilities: Tensor) -> Tensor:
    """Finite logarithms of probabilities, which a temperature divides as it does logits."""
    return probabilities.clamp_min(1e-8).log()


def measure_confidence(held_out: HeldOut) -> Confidence | None:
    """Fit a temperature to held-out pixels, and count which are right.

    Args:
        held_out: See ``held_out_pixels``.

    Returns:
        None without pixels.
    """
    logits, target = held_out.outputs.double(), held_out.target
    if not len(target):
        return None
    temperature = calibrated(logits, target, len(np.unique(held_out.images)))
    confidence, best = (logits / temperature).softmax(dim=1).max(dim=1)
    right = (best == target).numpy()
    return Confidence.measured(
        "pixels", confidence.numpy(), right, held_out.images, temperature, best.numpy()
    )


def confident_mask(probabilities: np.ndarray, cutoff: Cutoff) -> np.ndarray:
    """The class of each confident pixel, and 255 for the others.

    Args:
        probabilities: ``(K, H, W)`` float32.
        cutoff: Which pixels are confident.

    Returns:
        ``(H, W)`` uint8.
    """
    logits = log_probabilities(torch.from_numpy(probabilities))
    confidence, best = (logits / cutoff.temperature).softmax(dim=0).max(dim=0)
    sure = confidence.numpy() >= cutoff.of(best.numpy())
    return np.where(sure, best.numpy(), IGNORE_INDEX).astype(np.uint8)


def write_pseudo_labels(
    segmenter: Segmenter, cutoff: Cutoff, predictions: Predictions
) -> PseudoLabelled:
    """Write a PNG of class indices per image, and ``pseudo_labels.csv`` with their paths.

    Images without a confident pixel are left out. ``classes.txt`` has the names of the classes.

    Args:
        segmenter: Model that predicts.
        cutoff: Which pixels are labelled.
        predictions: The images, and the folder to write to.
    """
    classes = segmenter.classes
    counts, numbers = np.zeros(len(classes), np.int64), count()
    faults: list[str | None] = []
    written: list[str] = []
    file = predictions.run / TABLE
    with growing_file(file) as out, inference_mode(segmenter):
        rows = csv.writer(out)
        rows.writerow(["path", "mask", "labelled_share"])
        for path in predictions.paths:
            predictions.advance(1)
            try:
                image = segmenter.encoder.reader.read(path)
            except BROKEN_IMAGE as error:
                faults.append(reason(error, path))
                continue
            faults.append(None)
            mask = confident_mask(segment(segmenter, image), cutoff)
            sure = mask != IGNORE_INDEX
            if not sure.any():
                continue
            counts[np.unique(mask[sure])] += 1
            place = predictions.place(path, "masks")
            with atomic_write(place) as part:
                Image.fromarray(mask).save(part, "PNG")
            inside = place.relative_to(predictions.run).as_posix()
            written.append(str(Path(path).absolute()))
            rows.writerow([written[-1], inside, f"{sure.mean():.4f}"])
            drawn = partial(draw_mask, mask=mask, classes=len(classes))
            predictions.draw(next(numbers), path, segmenter.encoder.reader, drawn)
    names = "".join(f"{name}\n" for name in classes)
    (predictions.run / CLASSES).write_text(names, encoding="utf-8")
    good = report_broken(predictions.paths, faults)
    return PseudoLabelled(file, int(good.sum()), written, counts)


def read_pseudo_labels(folder: Path, data: LabelledMasks) -> LabelledMasks:
    """Read ``pseudo_labels.csv`` and the masks that it names.

    Args:
        folder: Folder of the table. Relative paths in it start there.
        data: Labelled images, whose classes count. The same classes in another order are mapped.

    Raises:
        UserError: There is no table or no class names, a class is unknown, or a mask can't be read,
            has another size than its image, or a value that is not a class.
    """
    file = folder / TABLE
    names = read_text(folder / CLASSES).splitlines()
    for name in names:
        if name not in data.classes:
            raise UserError(
                f"{folder / CLASSES}: the data have no class {name!r}: "
                f"{did_you_mean(name, data.classes)}"
            )
    levels = np.full(256, IGNORE_INDEX, np.uint8)
    levels[: len(names)] = [data.classes.index(name) for name in names]
    known = {*range(len(names)), IGNORE_INDEX}
    table = read_table(file, is_image=lambda cell: False, may_be_empty=True)  # with a header
    for column in ("path", "mask"):
        if column not in table.columns:
            raise UserError(f"{file} has no column {column}")
    images = []
    for row in table.rows:
        path, place = (str(folder.absolute() / (row.get(name) or "")) for name in ("path", "mask"))
        try:
            mask = read_mask(place)
        except BROKEN_IMAGE as error:
            raise UserError(f"the mask {place} can't be read ({reason(error, place)})") from None
        values = set(np.unique(mask).tolist())
        if not values <= known:
            raise UserError(f"the mask {place} has the value {max(values - known)}, no class")
        try:
            height, width, _ = image_header(path)
        except BROKEN_IMAGE:  # which the leak guard finds and leaves out
            height, width = mask.shape
        if {height, width} != set(mask.shape):  # turned on its side, if its EXIF record says so
            raise UserError(f"the mask {place} has another size than its image {path}")
        occurring = tuple(sorted(int(levels[value]) for value in values - {IGNORE_INDEX}))
        images.append(MaskedImage(path, MaskSource((place,), levels.tobytes()), occurring))
    return LabelledMasks(data.classes, images, [], [], data.reading)
