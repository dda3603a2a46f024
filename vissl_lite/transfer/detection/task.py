"""The detection task of the commands."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from vissl_lite.data.atomic_file import atomic_write
from vissl_lite.data.images import read_image, suitable_size
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import UserError
from vissl_lite.plots import Picture, class_colors, draw_boxes, plot_grid, plot_per_class
from vissl_lite.training.fit import NO_FILES, TrainingFiles
from vissl_lite.training.hardware import Hardware
from vissl_lite.transfer.base import Task
from vissl_lite.transfer.confidence import Confidence, Cutoff, HeldOut
from vissl_lite.transfer.dataset import sample, spread
from vissl_lite.transfer.detection.data import BoxedImage, LabelledBoxes, load_boxes
from vissl_lite.transfer.detection.export import ONNX_TRANSLATIONS, ExportableDetector
from vissl_lite.transfer.detection.metrics import DetectionScores, score_detector
from vissl_lite.transfer.detection.model import (
    LARGEST_MAX_BOXES,
    Detections,
    Detector,
    detect_in_batches,
    fit_into,
    load_detector,
    save_detector,
)
from vissl_lite.transfer.detection.options import DetectionOptions, DetectorSettings
from vissl_lite.transfer.detection.pseudo_labels import (
    held_out_boxes,
    measure_confidence,
    read_pseudo_labels,
    write_pseudo_labels,
)
from vissl_lite.transfer.detection.training import (
    build_detector,
    check_rescaling,
    choose_threshold,
    train_detector,
    validate_detector,
)
from vissl_lite.transfer.exporting import ExportModel, Normalization
from vissl_lite.transfer.prediction import Predictions, PseudoLabelled, growing_file
from vissl_lite.transfer.pyramid import report_use, shrunk
from vissl_lite.transfer.sources.parts import Split
from vissl_lite.transfer.sources.shapes import as_coco

log = logging.getLogger(__name__)

MAX_SHOWN = 8  # test images in the figure of predictions and ground truth


class Detection(Task[LabelledBoxes, Detector, DetectorSettings, DetectionScores]):
    """Object detection; see ``train_detector``."""

    name = "detection"
    options = DetectionOptions
    settings = DetectorSettings
    curves = ("loss", "val_mask_map", "val_mask_map_50", "val_map", "val_map_50", "lr")

    def load_data(
        self, source: str, settings: DetectorSettings, complete: bool = True
    ) -> LabelledBoxes:
        with_shapes = settings.detector == "mask_rcnn"
        return load_boxes(
            source, settings.annotations, settings.seed, complete, settings, with_shapes
        )

    def image_size(self, data: LabelledBoxes, settings: DetectorSettings) -> int | None:
        return suitable_size(data.paths("train"), side=max, most=416)

    def check(self, encoder: Encoder, data: LabelledBoxes, settings: DetectorSettings) -> None:
        if settings.multi_scale:
            check_rescaling(encoder)
        boxes = [int((~one.ignored).sum()) for one in data.train]
        crowded = [count for count in boxes if count > LARGEST_MAX_BOXES]
        if crowded:
            log.warning(
                "%(images)d training images have more than %(most)d boxes, up to %(boxes)d: a "
                "detector returns at most %(most)d for an image, so smaller images, such as tiles, "
                "would be better",
                {"images": len(crowded), "most": LARGEST_MAX_BOXES, "boxes": max(crowded)},
                extra={"code": "data.many_boxes"},
            )

    def report_use(self, encoder: Encoder, source: str) -> None:
        report_use(encoder, source)

    def metric_names(self, data: LabelledBoxes) -> tuple[str, ...]:
        masks = ("mask_map", "mask_map_50") if data.with_shapes else ()
        return (*masks, "map", "map_50")

    def build(self, encoder: Encoder, data: LabelledBoxes, settings: DetectorSettings) -> Detector:
        return build_detector(encoder, data, settings)

    def train(
        self,
        model: Detector,
        data: LabelledBoxes,
        settings: DetectorSettings,
        hardware: Hardware | None = None,
        files: TrainingFiles = NO_FILES,
    ) -> None:
        train_detector(model, data, settings, hardware, files)

    def validate(
        self, model: Detector, data: LabelledBoxes, part: Split = "val"
    ) -> dict[str, float]:
        return validate_detector(model, sample(data.part(part)))

    def calibrate(self, model: Detector, data: LabelledBoxes, like: Detector | None = None) -> None:
        if like is None:
            choose_threshold(model, data)
        else:
            model.threshold = like.threshold

    def held_out(self, model: Detector, data: LabelledBoxes) -> HeldOut:
        return held_out_boxes(model, data)

    def confidence(self, held_out: HeldOut) -> Confidence | None:
        return measure_confidence(held_out)

    def pseudo_label(
        self, model: Detector, cutoff: Cutoff, predictions: Predictions
    ) -> PseudoLabelled:
        return write_pseudo_labels(model, cutoff, predictions)

    def read_pseudo_labels(self, folder: Path, data: LabelledBoxes) -> LabelledBoxes:
        return read_pseudo_labels(folder, data)

    def evaluate(self, model: Detector, data: LabelledBoxes) -> DetectionScores:
        return score_detector(model, data.test, units=data.sampling_units())

    def save(self, model: Detector, folder: Path, about: dict[str, Any]) -> None:
        save_detector(model, folder, about)

    def load(self, folder: Path) -> Detector:
        return load_detector(folder)

    def visualize(
        self, model: Detector, data: LabelledBoxes, scores: DetectionScores, run: Path
    ) -> None:
        classes = data.classes
        rows = []
        for index in spread(len(scores.images), MAX_SHOWN):
            truth, found = scores.images[index], scores.found[index]
            image = model.encoder.reader.read_picture(truth.path)
            sure = found.scores >= model.threshold
            drawn = draw_boxes(
                image,
                found.boxes[sure],
                found.labels[sure],
                classes,
                found.scores[sure],
                found.drawn(sure, truth.size),
            )
            rows.append(
                [Picture(shrunk(_draw_truth(image, truth, classes))), Picture(shrunk(drawn))]
            )
        colors = dict(zip(classes, class_colors(len(classes)), strict=True))
        columns = ("truth", f"prediction\n{shown_boxes(model)}")
        plot_grid(rows, run / "test.png", columns, colors, cell=320)
        plot_per_class(scores.per_class, run / "per_class.png")

    def labelled_picture(self, data: LabelledBoxes, part: Split, index: int) -> Picture:
        one = data.part(part)[index]
        image = read_image(one.path)
        counts = np.bincount(one.labels, minlength=len(data.classes))
        words = [f"{counts[n]} {data.classes[n]}" for n in np.flatnonzero(counts)]
        drawn = _draw_truth(image, one, data.classes)
        return Picture(shrunk(drawn), ", ".join(words) or "no boxes")

    def check_turns(self, model: Detector) -> None:
        if model.kind == "mask_rcnn":
            raise UserError(
                "--tta does not merge the masks of mask_rcnn: leave it out, or train another "
                "--detector for boxes"
            )

    def predict(self, model: Detector, predictions: Predictions) -> tuple[Path, int]:
        """Write predictions in COCO's format, with a score for each annotation.

        With a mask head each has a ``segmentation``, too, in compressed run lengths, whose pixels
        are its ``area``. Pictures show the objects above the threshold. As a COCO file can't be
        written image by image, the predictions first go to a JSON Lines file.
        """
        if predictions.pictures:
            log.info("The pictures show boxes of %s", shown_boxes(model))
        file, lines = predictions.run / "predictions.json", predictions.run / "predictions.jsonl"
        with growing_file(lines) as out:
            images, annotations = count(1), count(1)

            def use(
                paths: list[str], found: list[Detections], sizes: list[tuple[int, int]]
            ) -> None:
                for path, one, (height, width) in zip(paths, found, sizes, strict=True):
                    number = next(images)
                    image = {"id": number, "file_name": path, "height": height, "width": width}
                    boxes = [
                        {"id": next(annotations), "image_id": number, **_annotation(*box)}
                        for box in zip(one.boxes, one.scores, one.labels, strict=True)
                    ]
                    for box, mask in zip(boxes, one.masks or (), strict=False):
                        area = int(mask.area)
                        box |= {"area": area, "segmentation": as_coco(mask, (height, width))}
                    out.write(json.dumps({"image": image, "annotations": boxes}) + "\n")
                    sure = one.scores >= model.threshold
                    drawn = partial(
                        draw_boxes,
                        boxes=one.boxes[sure],
                        labels=one.labels[sure],
                        classes=model.classes,
                        scores=one.scores[sure],
                        masks=one.drawn(sure, (height, width)),
                    )
                    predictions.draw(number - 1, path, model.encoder.reader, drawn)
                out.flush()

            good = detect_in_batches(
                model, predictions.paths, use, predictions.advance, turns=predictions.turns
            )
        head = {
            "info": {
                "description": "vissl-lite predict",
                "threshold": model.threshold,  # score of the best F1 on the validation images
            },
            "categories": [
                {"id": i, "name": name} for i, name in enumerate(model.classes, start=1)
            ],
        }
        _write_coco(file, head, lines)
        lines.unlink()
        return file, int(good.sum())

    def uncertainty(
        self,
        model: Detector,
        temperature: float,
        paths: Sequence[str],
        advance: Callable[[int], None],
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sum over boxes of 1 minus the margin between object and no object.

        Scores of boxes are not calibrated: ``temperature`` is 1.

        Source: Brust et al. 2019 (arXiv 1809.09875): a measure per box, summed over the boxes of an
        image. An image without boxes is certain.
        """
        sums: list[float] = []

        def add(_: list[str], found: list[Detections], __: list[tuple[int, int]]) -> None:
            sums.extend(float((1 - np.abs(2 * one.scores - 1)).sum()) for one in found)

        # batch by batch, as the masks of all images would not fit into the memory
        good = detect_in_batches(model, paths, add, advance)
        return np.array(sums, np.float32), good

    def export_model(self, model: Detector, folder: Path) -> ExportModel:
        layers = nn.Sequential(
            Normalization(model.encoder), ExportableDetector(model), nn.Identity()
        )
        about = {"classes": json.dumps(model.classes), "threshold": str(model.threshold)}
        masks = ("masks",) if model.kind == "mask_rcnn" else ()
        return ExportModel(
            layers,
            self.name,
            ("boxes", "scores", "labels", *masks),
            model.canvas,
            None,
            about,
            fixed_size="a detector has the image size that it was trained at",
            prepare=lambda image, size: fit_into(image, size)[0],
            preparation="fitted into {size} pixels, at the upper left, on gray",
            translations=ONNX_TRANSLATIONS,
        )


def _draw_truth(image: np.ndarray, truth: BoxedImage, classes: list[str]) -> np.ndarray:
    drawn = (truth.mask(i) if there else None for i, there in enumerate(truth.has_shape))
    return draw_boxes(image, truth.boxes, truth.labels, classes, masks=drawn)


def shown_boxes(model: Detector) -> str:
    """Which of its boxes the pictures of a detector show, for titles and the log."""
    return f"confidence ≥ {model.threshold:.2f} (best F1)"


def _annotation(box: np.ndarray, score: float, label: int) -> dict[str, Any]:
    x1, y1, x2, y2 = (round(float(value), 2) for value in box)
    return {
        "category_id": int(label) + 1,
        "bbox": [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)],
        "area": round((x2 - x1) * (y2 - y1), 2),
        "iscrowd": 0,
        "score": round(float(score), 4),
    }


def _write_coco(file: Path, head: dict[str, Any], lines: Path) -> None:
    """Write a file in COCO's format without holding all of it in memory.

    Args:
        file: File to write. The write is atomic.
        head: Entries that precede the images and annotations.
        lines: JSON Lines file with ``image`` and ``annotations`` of each image.
    """

    def entries(kind: str) -> Iterator[str]:
        with lines.open(encoding="utf-8") as written:
            for line in written:
                found = json.loads(line)
                yield from map(json.dumps, [found["image"]] if kind == "images" else found[kind])

    with atomic_write(file) as part, part.open("w", encoding="utf-8") as out:
        out.write(json.dumps(head)[:-1])
        for kind in ("images", "annotations"):
            out.write(f', "{kind}": [')
            for number, entry in enumerate(entries(kind)):
                out.write(f", {entry}" if number else entry)
            out.write("]")
        out.write("}\n")
