"""Classification, detection and segmentation behind one interface, as fine-tuning wants them."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import cv2
import numpy as np

from vissl_lite.data.images import read_image, suitable_size
from vissl_lite.encoder import Encoder, Normalize
from vissl_lite.encoder_folder import save_model
from vissl_lite.pictures import (
    class_colours,
    draw_boxes,
    draw_mask,
    plot_confusion,
    plot_per_class,
    plot_pictures,
    plot_titled,
)
from vissl_lite.training.fit import TrainingFiles
from vissl_lite.training.hardware import Hardware
from vissl_lite.transfer.classification.data import LabelledImages
from vissl_lite.transfer.classification.training import (
    ClassifierSettings,
    class_logits,
    score_classifier,
    train_classifier,
)
from vissl_lite.transfer.detection.data import LabelledBoxes
from vissl_lite.transfer.detection.training import (
    DetectorSettings,
    save_detector,
    score_detector,
    train_detector,
)
from vissl_lite.transfer.finetuning import TransferSettings
from vissl_lite.transfer.segmentation.data import LabelledMasks, read_mask
from vissl_lite.transfer.segmentation.model import segment
from vissl_lite.transfer.segmentation.training import (
    SegmenterSettings,
    save_segmenter,
    score_segmenter,
    train_segmenter,
)

TaskName = Literal["classification", "detection", "segmentation"]

SHOWN = 8  # test images in the picture of predictions beside the truth
LARGEST = 1024  # longer side in pixels of one of them


class Scores(Protocol):
    """How well a model does on the test part.

    Attributes:
        metrics: by name; the first one is the task's usual figure.
        per_class: by class, then by name.
    """

    @property
    def metrics(self) -> dict[str, float]: ...

    @property
    def per_class(self) -> dict[str, dict[str, float]]: ...


class Task(ABC):
    """A labelled data set and how to learn from it.

    Attributes:
        curves: what is drawn of the training.
        chosen_by: the validation figure that chooses the weights.
        data: with ``classes``, ``train``, ``val`` and ``test``.
        settings: how to train.
    """

    curves: ClassVar[tuple[str, ...]]
    chosen_by: ClassVar[str]
    data: Any
    settings: TransferSettings

    @abstractmethod
    def image_size(self) -> int:
        """A side in pixels that suits the images where nothing else is asked for."""

    @abstractmethod
    def write_split(self, run: Path) -> None:
        """Write down which image is in which part, to be given as ``--data`` again."""

    @abstractmethod
    def train(self, encoder: Encoder, hardware: Hardware, files: TrainingFiles) -> Any:
        """A model trained on the training part, chosen on the validation part."""

    @abstractmethod
    def score(self, model: Any, encoder: Encoder) -> Scores:
        """The model on the test part."""

    @abstractmethod
    def save(self, model: Any, encoder: Encoder, folder: Path, about: dict[str, Any]) -> None:
        """Write the model folder."""

    @abstractmethod
    def draw(self, model: Any, encoder: Encoder, scores: Any, run: Path) -> None:
        """Draw test predictions beside the truth (``test.png``) and the figures by class."""


class Classification(Task):
    """One class or several labels for each image; see ``train_classifier``."""

    curves = ("loss", "val_loss", "val_top1", "val_map", "lr")

    def __init__(self, data: LabelledImages, settings: ClassifierSettings) -> None:
        self.data = data
        self.settings: ClassifierSettings = settings
        self.chosen_by = "val_map" if data.multi_label else "val_top1"  # type: ignore[misc]

    def image_size(self) -> int:
        return suitable_size(self.data.train.paths)

    def write_split(self, run: Path) -> None:
        self.data.write(run / "split.csv")

    def train(self, encoder: Encoder, hardware: Hardware, files: TrainingFiles) -> Any:
        return train_classifier(encoder, self.data, self.settings, hardware, files)

    def score(self, model: Any, encoder: Encoder) -> Scores:
        return score_classifier(model, encoder, self.data)

    def save(self, model: Any, encoder: Encoder, folder: Path, about: dict[str, Any]) -> None:
        about = {**about, "multi_label": self.data.multi_label}
        extra = {"label_names": self.data.classes, "vissl_lite": about}
        save_model(model, folder, encoder.model_args, encoder.image_size, extra)

    def draw(self, model: Any, encoder: Encoder, scores: Any, run: Path) -> None:
        if scores.confusion is not None:
            plot_confusion(scores.confusion, self.data.classes, run / "confusion.png")
        plot_per_class(scores.per_class, run / "per_class.png")
        some = spread(len(self.data.test), 2 * SHOWN)
        part = self.data.test.take(some)
        normalize = Normalize(encoder.mean, encoder.std)
        logits, good = class_logits(model, normalize, part.paths, encoder.image_size)
        part = part.take(np.flatnonzero(good))
        if self.data.multi_label:
            found, true = (logits > 0).numpy(), part.labels > 0
        else:
            found = np.eye(len(self.data.classes), dtype=bool)[logits.argmax(dim=1).numpy()]
            true = np.eye(len(self.data.classes), dtype=bool)[part.labels]
        words = [[self._words(row) for row in rows] for rows in (true, found)]
        titles = [
            true_word if true_word == found_word else f"{found_word}\n(true: {true_word})"
            for true_word, found_word in zip(*words, strict=True)
        ]
        images = [read_image(path, 256) for path in part.paths]
        right = [bool((a == b).all()) for a, b in zip(true, found, strict=True)]
        plot_titled(images, titles, right, run / "test.png")

    def _words(self, has: np.ndarray) -> str:
        return ", ".join(name for name, one in zip(self.data.classes, has, strict=True) if one) or (
            "none"
        )


class Detection(Task):
    """Boxes of objects; see ``train_detector``."""

    curves = ("loss", "val_map", "val_map_50", "lr")
    chosen_by = "val_map"

    def __init__(self, data: LabelledBoxes, settings: DetectorSettings) -> None:
        self.data = data
        self.settings: DetectorSettings = settings

    def image_size(self) -> int:
        return suitable_size([image.path for image in self.data.train], side=max, most=416)

    def write_split(self, run: Path) -> None:
        self.data.write(run / "split")

    def train(self, encoder: Encoder, hardware: Hardware, files: TrainingFiles) -> Any:
        return train_detector(encoder, self.data, self.settings, hardware, files)

    def score(self, model: Any, encoder: Encoder) -> Scores:
        return score_detector(model, self.data.test, self.data.classes)

    def save(self, model: Any, encoder: Encoder, folder: Path, about: dict[str, Any]) -> None:
        save_detector(model, folder, self.data.classes, about)

    def draw(self, model: Any, encoder: Encoder, scores: Any, run: Path) -> None:
        classes = self.data.classes
        rows = []
        for index in spread(len(scores.images), SHOWN):
            truth, found = scores.images[index], scores.found[index]
            image = read_image(truth.path)
            sure = found.scores >= model.threshold
            rows.append(
                [
                    _shrunk(draw_boxes(image, truth.boxes, truth.labels, classes)),
                    _shrunk(
                        draw_boxes(
                            image,
                            found.boxes[sure],
                            found.labels[sure],
                            classes,
                            found.scores[sure],
                        )
                    ),
                ]
            )
        colours = dict(zip(classes, class_colours(len(classes)), strict=True))
        plot_pictures(rows, ("truth", "prediction"), run / "test.png", colours)
        plot_per_class(scores.per_class, run / "per_class.png")


class Segmentation(Task):
    """A class for every pixel; see ``train_segmenter``."""

    curves = ("loss", "val_loss", "val_miou", "val_dice", "lr")
    chosen_by = "val_miou"

    def __init__(self, data: LabelledMasks, settings: SegmenterSettings) -> None:
        self.data = data
        self.settings: SegmenterSettings = settings

    def image_size(self) -> int:
        return suitable_size([image.path for image in self.data.train])

    def write_split(self, run: Path) -> None:
        self.data.write(run / "split.csv")

    def train(self, encoder: Encoder, hardware: Hardware, files: TrainingFiles) -> Any:
        return train_segmenter(encoder, self.data, self.settings, hardware, files)

    def score(self, model: Any, encoder: Encoder) -> Scores:
        return score_segmenter(model, self.data.test, self.data.classes)

    def save(self, model: Any, encoder: Encoder, folder: Path, about: dict[str, Any]) -> None:
        save_segmenter(model, folder, self.data.classes, about)

    def draw(self, model: Any, encoder: Encoder, scores: Any, run: Path) -> None:
        classes = self.data.classes
        normalize = Normalize(encoder.mean, encoder.std)
        rows = []
        for index in spread(len(self.data.test), SHOWN):
            one = self.data.test[index]
            image = read_image(one.path)
            truth = read_mask(one.mask, one.binary)
            found = segment(model, normalize, image, encoder.image_size).argmax(axis=0)
            rows.append(
                [
                    _shrunk(image),
                    _shrunk(draw_mask(image, truth, len(classes))),
                    _shrunk(draw_mask(image, found, len(classes))),
                ]
            )
        colours = dict(zip(classes, class_colours(len(classes)), strict=True))
        del colours[classes[0]]  # which is left clear
        plot_pictures(rows, ("image", "truth", "prediction"), run / "test.png", colours)
        plot_per_class(scores.per_class, run / "per_class.png")
        plot_confusion(scores.confusion, classes, run / "confusion.png", "pixels")


def _shrunk(image: np.ndarray) -> np.ndarray:
    """An image no larger than a figure shows it: all of a figure's are in memory together."""
    factor = max(image.shape[:2]) / LARGEST
    if factor <= 1:
        return image
    height, width = (max(1, round(side / factor)) for side in image.shape[:2])
    return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA))


def spread(images: int, wanted: int) -> np.ndarray:
    """Indices of up to so many images, evenly spread."""
    return np.unique(np.linspace(0, images - 1, min(images, wanted)).round().astype(int))


def make_task(data: Any, **settings: Any) -> Task:
    """The task that a labelled data set is for.

    Args:
        data: ``LabelledImages``, ``LabelledBoxes`` or ``LabelledMasks``.
        settings: of ``ClassifierSettings``, ``DetectorSettings`` or ``SegmenterSettings``.
    """
    if isinstance(data, LabelledBoxes):
        return Detection(data, DetectorSettings(**settings))
    if isinstance(data, LabelledMasks):
        return Segmentation(data, SegmenterSettings(**settings))
    return Classification(data, ClassifierSettings(**settings))
