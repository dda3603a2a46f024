"""Pseudo-labels of classification: confident predictions as a table of images and classes."""

import csv
import math
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from vissl_lite.errors import UserError, brief, did_you_mean
from vissl_lite.inference import check_outputs, run_in_batches
from vissl_lite.plots import draw_caption
from vissl_lite.transfer.classification.data import LabelledImages, Part
from vissl_lite.transfer.classification.model import Classifier, class_logits
from vissl_lite.transfer.confidence import Confidence, Cutoff, HeldOut, calibrated
from vissl_lite.transfer.dataset import MAX_VALIDATION_IMAGES, spread
from vissl_lite.transfer.prediction import Predictions, PseudoLabelled, growing_file
from vissl_lite.transfer.sources.tables import read_table

TABLE = "pseudo_labels.csv"

# Separator of several labels in a cell.
SEPARATOR = "|"


def held_out_logits(classifier: Classifier, data: LabelledImages) -> HeldOut:
    """Logits ``(N, K)`` and labels of the validation images, of more than 5,000 evenly spread."""
    chosen = spread(len(data.val), MAX_VALIDATION_IMAGES)
    part, groups = data.val.take(chosen), data.groups("val")
    logits, good = class_logits(classifier, part.paths)
    images = np.array(part.paths) if groups is None else groups[chosen]
    return HeldOut(logits, torch.from_numpy(part.labels[good]), images[good])


def measure_confidence(held_out: HeldOut) -> Confidence | None:
    """Fit a temperature to held-out logits, and count which predictions are right.

    Args:
        held_out: See ``held_out_logits``.

    Returns:
        None if logits are not finite.
    """
    logits, target = held_out.outputs.double(), held_out.target
    if not logits.isfinite().all():
        return None
    temperature = calibrated(logits, target, len(np.unique(held_out.images)))
    truth = F.one_hot(target, logits.shape[1]) if target.ndim == 1 else target
    confidence, found = confident_labels(logits / temperature, target.ndim == 2)
    right = (found == truth).all(dim=1).numpy()
    labels = found.argmax(dim=1).numpy() if target.ndim == 1 else None
    return Confidence.measured(
        "images", confidence.numpy(), right, held_out.images, temperature, labels
    )


def confident_labels(logits: Tensor, multi_label: bool) -> tuple[Tensor, Tensor]:
    """Labels of images and the confidence that all of them are right.

    Args:
        logits: ``(N, K)``, divided by the temperature.
        multi_label: Whether an image may have several labels or none. It enters a data set whole,
            so that its confidence is that of the class that is the least certain, present or
            absent.

    Returns:
        ``(N,)`` confidences and ``(N, K)`` int64 labels of 0 and 1.
    """
    if multi_label:
        present = logits.sigmoid()
        return torch.maximum(present, 1 - present).amin(dim=1), (present >= 0.5).long()
    confidence, best = logits.softmax(dim=1).max(dim=1)
    return confidence, F.one_hot(best, logits.shape[1])


def write_pseudo_labels(
    classifier: Classifier, cutoff: Cutoff, predictions: Predictions
) -> PseudoLabelled:
    """Write ``pseudo_labels.csv`` with ``path``, ``label`` (or ``labels``) and ``confidence``.

    Args:
        classifier: Model that predicts.
        cutoff: Which images are labelled.
        predictions: The images, and the folder to write to.

    Raises:
        UserError: A class of several has the separator in its name, or outputs are not finite.
    """
    classes, multi_label = classifier.classes, classifier.multi_label
    for name in classes:
        if multi_label and SEPARATOR in name:
            raise UserError(f"the class {name!r} has a {SEPARATOR} in its name: rename it")
    file = predictions.run / TABLE
    counts, numbers = np.zeros(len(classes), np.int64), count()
    written: list[str] = []
    with growing_file(file) as out:
        rows = csv.writer(out)
        rows.writerow(["path", "labels" if multi_label else "label", "confidence"])

        def use(paths: list[str], outputs: list[Tensor]) -> None:
            check_outputs(outputs, f"{paths[0]} or one of the {len(paths)} images from there on")
            confidences, labels = confident_labels(outputs[0] / cutoff.temperature, multi_label)
            limits = cutoff.of(labels.argmax(dim=1).numpy())  # of several labels all alike
            for path, confidence, limit, row in zip(
                paths, confidences.tolist(), limits.tolist(), labels.numpy(), strict=True
            ):
                if confidence < limit:
                    continue
                counts[:] += row
                names = SEPARATOR.join(classes[i] for i in np.flatnonzero(row))
                written.append(str(Path(path).absolute()))
                rows.writerow([written[-1], names, f"{confidence:.4f}"])
                caption = f"{names or 'none'} {confidence:.2f}"
                drawn = partial(draw_caption, caption=caption)
                predictions.draw(next(numbers), path, classifier.encoder.reader, drawn)
            out.flush()

        good = run_in_batches(
            classifier,
            lambda images: [classifier(images)],
            classifier.encoder,
            predictions.paths,
            use,
            predictions.advance,
        )
    return PseudoLabelled(file, int(good.sum()), written, counts)


def read_pseudo_labels(folder: Path, data: LabelledImages) -> LabelledImages:
    """Read ``pseudo_labels.csv``.

    Args:
        folder: Folder of the table. Relative paths in it start there. A column ``weight``, if there
            is one, holds the weight of each image in the training loss; true labels have 1.
        data: Labelled images, whose classes count.

    Raises:
        UserError: There is no table, it lacks a column, or a row has an unknown class or a weight
            that is no positive number.
    """
    file = folder / TABLE
    table = read_table(file, is_image=lambda cell: False, may_be_empty=True)  # with a header
    column = "labels" if data.multi_label else "label"
    for name in ("path", column):
        if name not in table.columns:
            raise UserError(
                f"{file} has no column {name}: it must be written by a model for "
                f"{'several labels' if data.multi_label else 'one class'} per image"
            )
    weighted = "weight" in table.columns
    numbers = {name: index for index, name in enumerate(data.classes)}
    paths: list[str] = []
    labels: list[np.ndarray] = []
    weights: list[float] = []
    for line, row in enumerate(table.rows, start=2):
        label = row.get(column) or ""
        names = [name for name in label.split(SEPARATOR) if name] if data.multi_label else [label]
        for name in names:
            if name not in numbers:
                raise UserError(
                    f"{file}, line {line}: the data have no class {name!r}: "
                    f"{did_you_mean(name, data.classes)}"
                )
        paths.append(str(folder.absolute() / (row.get("path") or "")))
        labels.append(np.bincount([numbers[name] for name in names], minlength=len(numbers)))
        if weighted:
            weights.append(_weight(row.get("weight"), f"{file}, line {line}"))
    known = np.array(labels, np.int64).reshape(len(paths), len(numbers))
    part = Part(
        paths,
        known if data.multi_label else known.argmax(axis=1),
        np.array(weights, np.float32) if weighted else None,
    )
    none = data.train.take(np.empty(0, np.int64))
    return replace(data, train=part, val=none, test=none)


def _weight(text: str | None, place: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UserError(f"{place}: the weight {brief(text or '')!r} is no positive number")
    return value
