"""The segmentation task of the commands."""

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from vissl_lite.data.atomic_file import atomic_write
from vissl_lite.data.formats import file_of, split_path, split_suffix, write_masks
from vissl_lite.data.images import BROKEN_IMAGE, read_image, suitable_size
from vissl_lite.data.reading import reason
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.inference import inference_mode, report_broken
from vissl_lite.plots import (
    Picture,
    class_colors,
    draw_mask,
    plot_confusion,
    plot_grid,
    plot_per_class,
)
from vissl_lite.training.fit import NO_FILES, TrainingFiles
from vissl_lite.training.hardware import Hardware
from vissl_lite.transfer.base import Task
from vissl_lite.transfer.confidence import Confidence, Cutoff, HeldOut
from vissl_lite.transfer.dataset import sample, spread
from vissl_lite.transfer.exporting import ExportModel, Normalization
from vissl_lite.transfer.prediction import Predictions, PseudoLabelled
from vissl_lite.transfer.pyramid import report_use, shrunk
from vissl_lite.transfer.segmentation.data import LabelledMasks, load_masks
from vissl_lite.transfer.segmentation.mask_values import BACKGROUND
from vissl_lite.transfer.segmentation.metrics import SegmentationScores, score_segmenter
from vissl_lite.transfer.segmentation.model import (
    Segmenter,
    largest_resized,
    load_segmenter,
    save_segmenter,
    segment,
    segment_all,
)
from vissl_lite.transfer.segmentation.options import SegmentationOptions, SegmenterSettings
from vissl_lite.transfer.segmentation.pseudo_labels import (
    held_out_pixels,
    log_probabilities,
    measure_confidence,
    read_pseudo_labels,
    write_pseudo_labels,
)
from vissl_lite.transfer.segmentation.training import (
    build_segmenter,
    train_segmenter,
    validate_segmenter,
    weigh_classes,
)
from vissl_lite.transfer.skeleton import CocoContent
from vissl_lite.transfer.sources.parts import Split

log = logging.getLogger(__name__)

MAX_SHOWN = 8  # test images in the figure of predictions and ground truth


class Segmentation(Task[LabelledMasks, Segmenter, SegmenterSettings, SegmentationScores]):
    """Semantic segmentation; see ``train_segmenter``."""

    name = "segmentation"
    options = SegmentationOptions
    settings = SegmenterSettings
    curves = ("loss", "val_loss", "val_miou", "val_dice", "lr")

    def load_data(
        self, source: str, settings: SegmenterSettings, complete: bool = True
    ) -> LabelledMasks:
        return load_masks(source, settings.annotations, settings.seed, complete, settings)

    def image_size(self, data: LabelledMasks, settings: SegmenterSettings) -> int | None:
        return suitable_size(data.paths("train"))

    def check(self, encoder: Encoder, data: LabelledMasks, settings: SegmenterSettings) -> None:
        if settings.class_weights != "balanced":  # which is always valid, and slow to compute
            weigh_classes(data, settings.class_weights)

    def report_use(self, encoder: Encoder, source: str) -> None:
        report_use(encoder, source)

    def metric_names(self, data: LabelledMasks) -> tuple[str, ...]:
        return ("miou", "dice", "loss")

    def build(
        self, encoder: Encoder, data: LabelledMasks, settings: SegmenterSettings
    ) -> Segmenter:
        return build_segmenter(encoder, data, settings)

    def train(
        self,
        model: Segmenter,
        data: LabelledMasks,
        settings: SegmenterSettings,
        hardware: Hardware | None = None,
        files: TrainingFiles = NO_FILES,
    ) -> None:
        train_segmenter(model, data, settings, hardware, files)

    def validate(
        self, model: Segmenter, data: LabelledMasks, part: Split = "val"
    ) -> dict[str, float]:
        return validate_segmenter(model, sample(data.part(part)))

    def held_out(self, model: Segmenter, data: LabelledMasks) -> HeldOut:
        return held_out_pixels(model, data)

    def confidence(self, held_out: HeldOut) -> Confidence | None:
        return measure_confidence(held_out)

    def pseudo_label(
        self, model: Segmenter, cutoff: Cutoff, predictions: Predictions
    ) -> PseudoLabelled:
        return write_pseudo_labels(model, cutoff, predictions)

    def read_pseudo_labels(self, folder: Path, data: LabelledMasks) -> LabelledMasks:
        return read_pseudo_labels(folder, data)

    def evaluate(self, model: Segmenter, data: LabelledMasks) -> SegmentationScores:
        return score_segmenter(model, data.test, units=data.sampling_units())

    def save(self, model: Segmenter, folder: Path, about: dict[str, Any]) -> None:
        save_segmenter(model, folder, about)

    def load(self, folder: Path) -> Segmenter:
        return load_segmenter(folder)

    def visualize(
        self, model: Segmenter, data: LabelledMasks, scores: SegmentationScores, run: Path
    ) -> None:
        classes, reader = data.classes, model.encoder.reader
        rows = []
        for index in spread(len(data.test), MAX_SHOWN):
            one = data.test[index]
            values = reader.read(one.path)
            image = reader.picture(values)
            truth = one.mask.read()
            found = segment(model, values).argmax(axis=0)
            rows.append(
                [
                    Picture(shrunk(image)),
                    Picture(shrunk(draw_mask(image, truth, len(classes)))),
                    Picture(shrunk(draw_mask(image, found, len(classes)))),
                ]
            )
        colors = dict(zip(classes, class_colors(len(classes)), strict=True))
        del colors[classes[0]]  # which is drawn transparent
        plot_grid(rows, run / "test.png", ("image", "truth", "prediction"), colors, cell=320)
        plot_per_class(scores.per_class, run / "per_class.png")
        plot_confusion(scores.confusion, classes, run / "confusion.png", "pixels")

    def labelled_picture(self, data: LabelledMasks, part: Split, index: int) -> Picture:
        one = data.part(part)[index]
        mask = one.mask.read()
        words = ", ".join(data.classes[number] for number in one.classes if number)
        return Picture(shrunk(draw_mask(read_image(one.path), mask, len(data.classes))), words)

    def predict(self, model: Segmenter, predictions: Predictions) -> tuple[Path, int]:
        """Write a palette PNG of class indices for each image, at the size of the image.

        Of the slices of a NIfTI volume a NIfTI volume is written, with its affine, and of a GeoTIFF
        a GeoTIFF at its place.
        """
        reader, classes = model.encoder.reader, len(model.classes)
        faults: list[str | None] = []
        numbers = count()
        by_file: dict[str, list[str]] = {}  # its slices in a row, wherever a list has them
        for path in predictions.paths:
            by_file.setdefault(file_of(path), []).append(path)
        paths = [path for slices in by_file.values() for path in slices]
        # of files such as scan.nii and scan.nii.gz, which would have masks of the same name
        stems = Counter(split_suffix(os.path.abspath(file))[0] for file in by_file)
        masks: dict[str, np.ndarray] = {}  # of one file
        with inference_mode(model):
            for path, following in pairwise([*paths, ""]):
                predictions.advance(1)
                try:
                    image = reader.read(path)
                except BROKEN_IMAGE as error:
                    faults.append(reason(error, path))
                else:
                    faults.append(None)
                    found = segment(model, image, predictions.turns)
                    masks[path] = np.asarray(found.argmax(axis=0), np.uint8)
                    drawn = partial(draw_mask, mask=masks[path], classes=classes)
                    predictions.draw(next(numbers), path, reader, drawn)
                if masks and file_of(following) != file_of(path):
                    whole_name = stems[split_suffix(os.path.abspath(file_of(path)))[0]] > 1
                    _write_masks(masks, predictions, classes, whole_name)
                    masks = {}
        good = report_broken(paths, faults)
        return predictions.run / "masks", int(good.sum())

    def uncertainty(
        self,
        model: Segmenter,
        temperature: float,
        paths: Sequence[str],
        advance: Callable[[int], None],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mean over pixels of 1 minus the margin of the two most probable classes."""
        means: list[float] = []
        faults: list[str | None] = []
        with inference_mode(model) as device:
            for path in paths:
                advance(1)
                try:
                    image = model.encoder.reader.read(path)
                except BROKEN_IMAGE as error:
                    faults.append(reason(error, path))
                    continue
                faults.append(None)
                (found,) = segment_all(model, [image], device)
                probabilities = (log_probabilities(found) / temperature).softmax(dim=0)
                first, second = probabilities.topk(2, dim=0).values.unbind()
                means.append(float(1 - (first - second).mean()))
        return np.array(means, np.float32), report_broken(paths, faults)

    def write_skeleton(
        self,
        paths: Sequence[str],
        classes: Sequence[str],
        folder: Path,
        groups: Mapping[str, str] | None = None,
        earlier: CocoContent | None = None,
    ) -> Path:
        # the background has no objects
        has_background = bool(classes) and classes[0].lower() in (*BACKGROUND, "0")
        return super().write_skeleton(paths, classes[has_background:], folder, groups, earlier)

    def export_model(self, model: Segmenter, folder: Path) -> ExportModel:
        encoder = model.encoder
        layers = nn.Sequential(Normalization(encoder), model, nn.Softmax(dim=1))
        about = {"classes": json.dumps(model.classes)}
        # With windowed attention, as in Swin, exporting a free image size does not finish.
        windows = any(hasattr(module, "window_size") for module in encoder.modules())
        side = encoder.image_size
        scale = (
            f"the shorter side resized to {{size}} pixels if it has {largest_resized(side)} at most"
        )
        return ExportModel(
            layers,
            self.name,
            ("probabilities",),
            (side, side),
            None,
            about,
            any_size=not windows,
            preparation=scale,
        )


def _write_masks(
    masks: Mapping[str, np.ndarray], predictions: Predictions, classes: int, whole_name: bool
) -> None:
    """Write the masks of the images of one file, by path; see ``write_masks``."""
    file = file_of(next(iter(masks)))
    by_frame = {split_path(path)[1] or 0: mask for path, mask in masks.items()}
    place = predictions.place(file, "masks", str)
    if write_masks(file, by_frame, place, whole_name) is not None:
        return
    palette = np.array(class_colors(classes), np.uint8)
    palette[0] = 0
    for path, mask in masks.items():
        picture = Image.fromarray(mask)
        picture.putpalette(palette.ravel().tolist())
        place = predictions.place(path, "masks")
        if place.name != f"{os.path.basename(path)}.png":
            log.info("the file name is too long: the mask of %s is written to %s", path, place)
        with atomic_write(place) as part:
            picture.save(part, "PNG")
