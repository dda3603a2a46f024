"""``vissl-lite predict``: use a fine-tuned model on a folder of images."""

import csv
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vissl_lite.commands.report import add_report
from vissl_lite.data.images import BROKEN_IMAGE, find_images, read_image
from vissl_lite.encoder import Normalize
from vissl_lite.errors import check_arguments, check_not_negative
from vissl_lite.inference import evaluating, report_broken, run_over
from vissl_lite.pictures import class_colours, draw_boxes, draw_mask, draw_words
from vissl_lite.run import check_out, open_run, write_atomically, write_results
from vissl_lite.training.progress import progress_bar
from vissl_lite.transfer.base import find_model
from vissl_lite.transfer.classification import LoadedClassifier, load_classifier
from vissl_lite.transfer.detection import load_detector
from vissl_lite.transfer.detector import Detector, detect
from vissl_lite.transfer.segmentation import load_segmenter
from vissl_lite.transfer.segmenter import Segmenter, segment

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PredictResult:
    """What predicting wrote.

    Attributes:
        run: the folder.
        predictions: in it, ``predictions.csv`` for classification, ``predictions.json`` for
            detection, the folder ``masks`` for segmentation.
        images: how many images were read.
    """

    run: Path
    predictions: Path
    images: int


@dataclass(frozen=True)
class _Job:
    """What is to be done, and where it goes."""

    paths: list[str]
    run: Path
    pictures: int
    advance: Callable[[int], None]

    def place(self, path: str, kind: str) -> Path:
        """Where a picture for an image goes: below ``kind``, in folders like the image's own."""
        common = os.path.commonpath([os.path.dirname(os.path.abspath(p)) for p in self.paths])
        inside = Path(os.path.relpath(os.path.abspath(path), common))
        file = self.run / kind / inside.parent / f"{inside.name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    def draw(self, number: int, path: str, drawn: Callable[[np.ndarray], np.ndarray]) -> None:
        """Write a picture, if this image is among the first ones that are to be drawn."""
        if number < self.pictures:
            picture = drawn(read_image(path))
            Image.fromarray(picture).save(self.place(path, "pictures"))


def predict(
    model: str, data: list[str] | str, out: str, pictures: int = 0, overwrite: bool = False
) -> PredictResult:
    """Use a fine-tuned model on images: classify them, find objects in them, or segment them.

    Writes predictions.csv for classification, predictions.json in COCO's format for detection, and
    for segmentation an index PNG for each image, below masks.

    Args:
        model: A run of finetune, or the model folder in it.
        data: Folders (searched recursively) or .txt files of paths.
        out: The run folder to write.
        pictures: Draw the predictions into so many of the images, below pictures.
        overwrite: Replace the run in --out.

    Returns:
        Paths and the number of images.

    Raises:
        UserError: something that was given can't work; nothing is written then.
    """
    config = dict(locals())
    check_arguments(predict, config)
    check_not_negative("pictures", pictures)
    check_out(Path(out), overwrite=overwrite)
    folder, task = find_model(Path(model))
    load, use = _USES[task]
    loaded = load(folder)
    paths = find_images([data] if isinstance(data, str) else data)
    with open_run(Path(out), config) as run:
        with progress_bar() as bar:
            shown = bar.add_task("predict", total=len(paths), info="")
            job = _Job(paths, run, pictures, lambda images: bar.advance(shown, images))
            file, images, classes = use(loaded, job)
        results = {
            "task": task,
            "images": images,
            "skipped": len(paths) - images,
            "classes": classes,
        }
        write_results(run, results)
        log.info("%d images, %s: %s", images, task, file)
        if pictures:
            log.info("Pictures of it: %s", run / "pictures")
        add_report(run)
    return PredictResult(run, file, images)


def _classify(loaded: LoadedClassifier, job: _Job) -> tuple[Path, int, list[str]]:
    """A row for each image: its class and probability; or, with several labels, all of them."""
    (logits,), good = run_over(
        loaded.model,
        lambda images: [loaded.model(images)],
        loaded.normalize,
        job.paths,
        loaded.image_size,
        job.advance,
    )
    shares = (logits.sigmoid() if loaded.multi_label else logits.softmax(dim=1)).numpy()
    file = job.run / "predictions.csv"
    read = [path for path, fine in zip(job.paths, good, strict=True) if fine]
    with file.open("w", newline="", encoding="utf-8") as opened:
        rows = csv.writer(opened)
        if loaded.multi_label:
            rows.writerow(["path", "labels", *loaded.classes])
        else:
            rows.writerow(["path", "class", "probability"])
        for number, (path, row) in enumerate(zip(read, shares, strict=True)):
            best = int(row.argmax())
            if loaded.multi_label:
                chosen = [name for name, p in zip(loaded.classes, row, strict=True) if p >= 0.5]
                words = "|".join(chosen)
                rows.writerow([path, words, *(f"{p:.4f}" for p in row)])
            else:
                words = f"{loaded.classes[best]} {row[best]:.2f}"
                rows.writerow([path, loaded.classes[best], f"{row[best]:.4f}"])
            job.draw(number, path, partial(draw_words, words=words or "none"))
    return file, len(read), loaded.classes


def _detect(loaded: tuple[Detector, list[str]], job: _Job) -> tuple[Path, int, list[str]]:
    """COCO's format, with a score for each annotation; pictures show those above the threshold."""
    detector, classes = loaded
    found, sizes, good = detect(detector, job.paths, job.advance)
    read = [path for path, fine in zip(job.paths, good, strict=True) if fine]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (path, one, (height, width)) in enumerate(zip(read, found, sizes, strict=True)):
        images.append({"id": number + 1, "file_name": path, "height": height, "width": width})
        for box, score, label in zip(one.boxes, one.scores, one.labels, strict=True):
            x1, y1, x2, y2 = (round(float(value), 2) for value in box)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number + 1,
                    "category_id": int(label) + 1,
                    "bbox": [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)],
                    "area": round((x2 - x1) * (y2 - y1), 2),
                    "iscrowd": 0,
                    "score": round(float(score), 4),
                }
            )
        sure = one.scores >= detector.threshold
        drawn = partial(
            draw_boxes,
            boxes=one.boxes[sure],
            labels=one.labels[sure],
            classes=classes,
            scores=one.scores[sure],
        )
        job.draw(number, path, drawn)
    content = {
        "info": {
            "description": "vissl-lite predict",
            "threshold": detector.threshold,  # the score from which on F1 was best on validation
        },
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, start=1)],
    }
    file = job.run / "predictions.json"
    write_atomically(file, json.dumps(content) + "\n")
    return file, len(read), classes


def _segment(loaded: tuple[Segmenter, list[str]], job: _Job) -> tuple[Path, int, list[str]]:
    """An index PNG for each image, in its own size, with a palette so that one sees it."""
    segmenter, classes = loaded
    normalize = Normalize(segmenter.encoder.mean, segmenter.encoder.std)
    size = segmenter.encoder.image_size
    palette = np.array(class_colours(len(classes)), np.uint8)
    palette[0] = 0
    good = np.zeros(len(job.paths), dtype=bool)
    with evaluating(segmenter, normalize):
        for index, path in enumerate(job.paths):
            job.advance(1)
            try:
                image = read_image(path)
            except BROKEN_IMAGE:
                continue
            shares = segment(segmenter, normalize, image, size)
            mask = np.asarray(shares.argmax(axis=0), np.uint8)
            picture = Image.fromarray(mask)
            picture.putpalette(palette.ravel().tolist())
            picture.save(job.place(path, "masks"))
            job.draw(int(good.sum()), path, partial(draw_mask, mask=mask, classes=len(classes)))
            good[index] = True
    report_broken(job.paths, good)
    return job.run / "masks", int(good.sum()), classes


_USES: dict[str, tuple[Callable[[Path], Any], Callable[[Any, _Job], tuple[Path, int, list[str]]]]]
_USES = {
    "classification": (load_classifier, _classify),
    "detection": (load_detector, _detect),
    "segmentation": (load_segmenter, _segment),
}
