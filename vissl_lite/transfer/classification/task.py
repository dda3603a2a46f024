"""The task classification."""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vissl_lite.data.images import read_image, suitable_size
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.inference import check_outputs, run_in_batches
from vissl_lite.plots import Picture, draw_caption, plot_confusion, plot_grid, plot_per_class
from vissl_lite.training.fit import NO_FILES, TrainingFiles
from vissl_lite.training.hardware import Hardware
from vissl_lite.transfer.base import Task
from vissl_lite.transfer.classification.data import LabelledImages, load_labelled
from vissl_lite.transfer.classification.discovery import find_labels
from vissl_lite.transfer.classification.metrics import TestScores
from vissl_lite.transfer.classification.model import (
    Classifier,
    class_logits,
    load_classifier,
    margin_uncertainty,
    save_classifier,
    score_classifier,
)
from vissl_lite.transfer.classification.options import ClassificationOptions, ClassifierSettings
from vissl_lite.transfer.classification.pseudo_labels import (
    held_out_logits,
    measure_confidence,
    read_pseudo_labels,
    write_pseudo_labels,
)
from vissl_lite.transfer.classification.training import (
    FEW_IMAGES,
    build_classifier,
    check_drop_path,
    check_settings,
    train_classifier,
    validate_classifier,
)
from vissl_lite.transfer.confidence import Confidence, Cutoff, HeldOut
from vissl_lite.transfer.dataset import KnownImages, spread
from vissl_lite.transfer.exporting import ExportModel, Normalization
from vissl_lite.transfer.finetuning import has_norms
from vissl_lite.transfer.prediction import Predictions, PseudoLabelled, growing_file
from vissl_lite.transfer.skeleton import TABLE_SKELETON, CocoContent, write_table_skeleton
from vissl_lite.transfer.sources.groups import named_groups
from vissl_lite.transfer.sources.parts import Split
from vissl_lite.transfer.sources.reading_log import ReadingLog

MAX_SHOWN = 16  # test images in the picture of predictions beside the truth


class Classification(Task[LabelledImages, Classifier, ClassifierSettings, TestScores]):
    """One class or several labels for each image; see ``train_classifier``."""

    name = "classification"
    options = ClassificationOptions
    settings = ClassifierSettings
    curves = ("loss", "val_loss", "val_top1", "val_map", "lr")
    takes_shots = True

    def load_data(
        self, source: str, settings: ClassifierSettings, complete: bool = True
    ) -> LabelledImages:
        return load_labelled(source, settings.seed, complete, multi_label=True, options=settings)

    def labelled_images(self, source: str, settings: ClassifierSettings) -> KnownImages:
        """Also of images that are too few to train on."""
        reading = ReadingLog(source)
        found = find_labels(Path(source), settings, reading)
        reading.report()
        named = {name for image in found.images for name in image.names}
        labels = [image.names[0] for image in found.images if len(image.names) == 1]
        return KnownImages(
            [image.path for image in found.images],
            sorted({*named, *found.classes}),
            labels if len(labels) == len(found.images) else None,
            bool({image.part for image in found.images} - {None, "train"}),
            frozenset(image.path for image in found.images if image.part == "test"),
            named_groups(reading),
        )

    def image_size(self, data: LabelledImages, settings: ClassifierSettings) -> int | None:
        return None if settings.pretrained else suitable_size(data.train.paths)

    def check(self, encoder: Encoder, data: LabelledImages, settings: ClassifierSettings) -> None:
        check_settings(settings, data, encoder.reader)
        check_drop_path(settings.drop_path, encoder)

    def metric_names(self, data: LabelledImages) -> tuple[str, ...]:
        return ("map" if data.multi_label else "top1", "calibrated_loss", "loss")

    def build(
        self, encoder: Encoder, data: LabelledImages, settings: ClassifierSettings
    ) -> Classifier:
        return build_classifier(encoder, data, settings)

    def starts_fitted(
        self, model: Classifier, data: LabelledImages, settings: ClassifierSettings
    ) -> bool:
        # The probe knows nothing of weights, neither of classes nor of images.
        weighted = settings.class_weights is not None or data.train.weights is not None
        return model.fitted and not weighted and not settings.balanced

    def variants(
        self, encoder: Encoder, data: LabelledImages, settings: ClassifierSettings
    ) -> Sequence[ClassifierSettings]:
        """With few images, BatchNorms as pre-training left them, and trained ones.

        Frozen ones are much better with ImageNet weights on small batches, and much worse with an
        encoder that was pre-trained for minutes (``benchmarks/accuracy/recipes.py``).
        """
        undecided = settings.pretrained and not settings.frozen and settings.frozen_norm is None
        if not undecided or not has_norms(encoder):
            return [settings]
        if len(data.train) >= FEW_IMAGES:  # folds may have fewer, and are trained like the model
            return [replace(settings, frozen_norm=False)]
        return [replace(settings, frozen_norm=frozen) for frozen in (True, False)]

    def train(
        self,
        model: Classifier,
        data: LabelledImages,
        settings: ClassifierSettings,
        hardware: Hardware | None = None,
        files: TrainingFiles = NO_FILES,
    ) -> None:
        train_classifier(model, data, settings, hardware, files)

    def validate(
        self, model: Classifier, data: LabelledImages, part: Split = "val"
    ) -> dict[str, float]:
        return validate_classifier(model, data.part(part), data.multi_label)

    def held_out(self, model: Classifier, data: LabelledImages) -> HeldOut:
        return held_out_logits(model, data)

    def confidence(self, held_out: HeldOut) -> Confidence | None:
        return measure_confidence(held_out)

    def pseudo_label(
        self, model: Classifier, cutoff: Cutoff, predictions: Predictions
    ) -> PseudoLabelled:
        return write_pseudo_labels(model, cutoff, predictions)

    def read_pseudo_labels(self, folder: Path, data: LabelledImages) -> LabelledImages:
        return read_pseudo_labels(folder, data)

    def evaluate(self, model: Classifier, data: LabelledImages) -> TestScores:
        return score_classifier(model, data)

    def save(self, model: Classifier, folder: Path, about: dict[str, Any]) -> None:
        save_classifier(model, folder, about)

    def load(self, folder: Path) -> Classifier:
        return load_classifier(folder)

    def visualize(
        self, model: Classifier, data: LabelledImages, scores: TestScores, run: Path
    ) -> None:
        if scores.confusion is not None:
            plot_confusion(scores.confusion, data.classes, run / "confusion.png")
        plot_per_class(scores.per_class, run / "per_class.png")
        part = data.test.take(spread(len(data.test), MAX_SHOWN))
        logits, good = class_logits(model, part.paths)
        part = part.take(np.flatnonzero(good))
        if data.multi_label:
            found, true = (logits > 0).numpy(), part.labels > 0
        else:
            found = np.eye(len(data.classes), dtype=bool)[logits.argmax(dim=1).numpy()]
            true = np.eye(len(data.classes), dtype=bool)[part.labels]
        words = [[_words(row, data.classes) for row in rows] for rows in (true, found)]
        captions = [
            true_word if true_word == found_word else f"{found_word} (true: {true_word})"
            for true_word, found_word in zip(*words, strict=True)
        ]
        pictures = [
            Picture(model.encoder.reader.read_picture(path, 256), caption, bool((a == b).all()))
            for path, caption, a, b in zip(part.paths, captions, true, found, strict=True)
        ]
        plot_grid([pictures[i : i + 8] for i in range(0, len(pictures), 8)], run / "test.png")

    def labelled_picture(self, data: LabelledImages, part: Split, index: int) -> Picture:
        one = data.part(part)
        label = one.labels[index]
        true = label > 0 if data.multi_label else np.eye(len(data.classes), dtype=bool)[label]
        return Picture(read_image(one.paths[index], 256), _words(true, data.classes))

    def predict(self, model: Classifier, predictions: Predictions) -> tuple[Path, int]:
        """Write one row per image: class and probability, or all probabilities."""
        file = predictions.run / "predictions.csv"
        with growing_file(file) as out:
            rows = csv.writer(out)
            if model.multi_label:
                rows.writerow(["path", "labels", *model.classes])
            else:
                rows.writerow(["path", "class", "probability"])
            numbers = count()

            def use(paths: list[str], outputs: list[Tensor]) -> None:
                check_outputs(
                    outputs, f"{paths[0]} or one of the {len(paths)} images from there on"
                )
                probabilities = torch.stack([model.probabilities(logits) for logits in outputs])
                for path, row in zip(paths, probabilities.mean(dim=0).numpy(), strict=True):
                    best = int(row.argmax())
                    if model.multi_label:
                        words = "|".join(
                            name for name, p in zip(model.classes, row, strict=True) if p >= 0.5
                        )
                        rows.writerow([path, words, *(f"{p:.4f}" for p in row)])
                    else:
                        words = f"{model.classes[best]} {row[best]:.2f}"
                        rows.writerow([path, model.classes[best], f"{row[best]:.4f}"])
                    drawn = partial(draw_caption, caption=words or "none")
                    predictions.draw(next(numbers), path, model.encoder.reader, drawn)
                out.flush()

            good = run_in_batches(
                model,
                lambda images: [model(turn.batch(images)) for turn in predictions.turns],
                model.encoder,
                predictions.paths,
                use,
                predictions.advance,
            )
        return file, int(good.sum())

    def uncertainty(
        self,
        model: Classifier,
        temperature: float,
        paths: Sequence[str],
        advance: Callable[[int], None],
    ) -> tuple[np.ndarray, np.ndarray]:
        """1 minus the margin of the two most probable classes; of several labels the mean."""
        logits, good = class_logits(model, paths, advance)
        check_outputs([logits], f"one of {len(paths)} images")
        # in float64, so that images that are nearly certain are still told apart
        probabilities = model.probabilities(logits.double() / temperature)
        return margin_uncertainty(probabilities, model.multi_label).numpy(), good

    def write_skeleton(
        self,
        paths: Sequence[str],
        classes: Sequence[str],
        folder: Path,
        groups: Mapping[str, str] | None = None,
        earlier: CocoContent | None = None,
    ) -> Path:
        return write_table_skeleton(folder / TABLE_SKELETON, paths, groups)

    def export_model(self, model: Classifier, folder: Path) -> ExportModel:
        encoder = model.encoder
        last = nn.Sigmoid() if model.multi_label else nn.Softmax(dim=1)
        layers = nn.Sequential(Normalization(encoder), model.network, last)
        about = {"classes": json.dumps(model.classes), "multi_label": json.dumps(model.multi_label)}
        size = (encoder.image_size, encoder.image_size)
        return ExportModel(layers, self.name, ("probabilities",), size, folder, about)


def _words(has: np.ndarray, classes: list[str]) -> str:
    return ", ".join(name for name, one in zip(classes, has, strict=True) if one) or "none"
