"""``vissl-lite predict``: use a fine-tuned model on a folder of images."""

import csv
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import blake2b
from itertools import count
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from PIL import Image
from torch import Tensor

from vissl_lite.data.images import BROKEN_IMAGE, find_images, read_image
from vissl_lite.data.reading import MAX_PIXELS, limit_pixels, reason
from vissl_lite.data.whole_file import whole_file
from vissl_lite.encoder import Normalize
from vissl_lite.errors import check_arguments, check_not_negative
from vissl_lite.inference import check_outputs, evaluating, report_broken, run_in_batches
from vissl_lite.pictures import class_colours, draw_boxes, draw_mask, draw_words
from vissl_lite.report.additions import add_report
from vissl_lite.run import check_out, open_run, write_results
from vissl_lite.session import session
from vissl_lite.training.progress import progress_bar
from vissl_lite.transfer.base import find_model
from vissl_lite.transfer.classification import LoadedClassifier, load_classifier
from vissl_lite.transfer.detection import load_detector
from vissl_lite.transfer.detector import Detections, Detector, detect_in_batches
from vissl_lite.transfer.segmentation import load_segmenter
from vissl_lite.transfer.segmenter import Segmenter, segment

log = logging.getLogger(__name__)

# What file systems allow a name, less ".png.part".
MOST_BYTES = 255 - 9


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

    @cached_property
    def common(self) -> str:
        """The innermost folder that holds all images."""
        return os.path.commonpath([os.path.dirname(os.path.abspath(p)) for p in self.paths])

    def place(self, path: str, kind: str) -> Path:
        """Where a picture for an image goes: below ``kind``, in folders like the image's own."""
        inside = Path(os.path.relpath(os.path.abspath(path), self.common))
        file = self.run / kind / inside.parent / file_name(inside.name)
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    def draw(self, number: int, path: str, drawn: Callable[[np.ndarray], np.ndarray]) -> None:
        """Write a picture, if this image is among the first ones that are to be drawn."""
        if number < self.pictures:
            try:
                image = read_image(path)
            except BROKEN_IMAGE as error:  # it was read a moment ago, but can have gone since
                log.warning("no picture of %(path)s (%(why)s)",
                            {"path": path, "why": reason(error, path)},
                            extra={"code": "picture.failed"})  # fmt: skip
                return
            with whole_file(self.place(path, "pictures")) as part:
                Image.fromarray(drawn(image)).save(part, "PNG")


def file_name(name: str) -> str:
    """The name of the PNG file for an image: its own with ``.png``.

    One that would be too long for a file system is cut, and gets a hash of the whole in its place.

    Args:
        name: of the image file.
    """
    whole = os.fsencode(name)
    if len(whole) <= MOST_BYTES:
        return f"{name}.png"
    digest = blake2b(whole, digest_size=8).hexdigest()
    # half a letter in UTF-8 would not be one
    start = whole[: MOST_BYTES - len(digest) - 1].decode("utf-8", "ignore")
    return f"{start}-{digest}.png"


@contextmanager
def _growing(file: Path) -> Iterator[TextIO]:
    """A text file that grows under the name ``FILE.part``, under which a failure leaves it.

    File names go into it as they are on the disk, UTF-8 or not.
    """
    part = file.with_name(f"{file.name}.part")
    try:
        with part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as out:
            yield out
    except BaseException:
        log.warning("what was predicted up to here is in %(file)s", {"file": part},
                    extra={"code": "predictions.partial"})  # fmt: skip
        raise
    os.replace(part, file)


@session()
def predict(
    model: str,
    data: list[str] | str,
    out: str,
    pictures: int = 0,
    max_pixels: int = MAX_PIXELS,
    overwrite: bool = False,
) -> PredictResult:
    """Use a fine-tuned model on images: classify them, find objects in them, or segment them.

    Writes predictions.csv for classification, predictions.json in COCO's format for detection, and
    for segmentation an index PNG for each image, below masks. They grow as predictions.csv.part and
    predictions.jsonl.part, which a failure leaves behind.

    File names that are not UTF-8 stand in predictions.csv as they are on the disk (Python reads
    them with errors="surrogateescape"), and in predictions.json with escapes of lone surrogates,
    which Python reads as the same names. A mask or picture has the name of its image and .png,
    unless that would be too long: then it is cut and ends in a hash, as the log says.

    Args:
        model: A run of finetune, or the model folder in it.
        data: Folders (searched recursively) or .txt files of paths.
        out: The run folder to write.
        pictures: Draw the predictions into so many of the images, below pictures.
        max_pixels: Skip images with more pixels (height times width): a small file may decode to
            billions. The default is what Pillow takes.
        overwrite: Replace the run in --out.

    Returns:
        Paths and the number of images.

    Raises:
        UserError: something that was given can't work; nothing is written then.
    """
    config = dict(locals())
    check_arguments(predict, config)
    limit_pixels(max_pixels)
    check_not_negative("pictures", pictures)
    check_out(Path(out), [("model", model), ("data", data)], overwrite=overwrite)
    folder, task = find_model(Path(model))
    load, use = _USES[task]
    loaded = load(folder)
    paths = find_images([data] if isinstance(data, str) else data)
    with open_run(Path(out), "predict", config) as run:
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
    file = job.run / "predictions.csv"
    with _growing(file) as out:
        rows = csv.writer(out)
        if loaded.multi_label:
            rows.writerow(["path", "labels", *loaded.classes])
        else:
            rows.writerow(["path", "class", "probability"])
        numbers = count()

        def use(paths: list[str], outputs: list[Tensor]) -> None:
            (logits,) = outputs
            check_outputs([logits], f"{paths[0]} or one of the {len(paths)} images from there on")
            shares = (logits.sigmoid() if loaded.multi_label else logits.softmax(dim=1)).numpy()
            for path, row in zip(paths, shares, strict=True):
                best = int(row.argmax())
                if loaded.multi_label:
                    chosen = [name for name, p in zip(loaded.classes, row, strict=True) if p >= 0.5]
                    words = "|".join(chosen)
                    rows.writerow([path, words, *(f"{p:.4f}" for p in row)])
                else:
                    words = f"{loaded.classes[best]} {row[best]:.2f}"
                    rows.writerow([path, loaded.classes[best], f"{row[best]:.4f}"])
                job.draw(next(numbers), path, partial(draw_words, words=words or "none"))
            out.flush()

        good = run_in_batches(
            loaded.model,
            lambda images: [loaded.model(images)],
            loaded.normalize,
            job.paths,
            loaded.image_size,
            use,
            job.advance,
        )
    return file, int(good.sum()), loaded.classes


def _detect(loaded: tuple[Detector, list[str]], job: _Job) -> tuple[Path, int, list[str]]:
    """COCO's format, with a score for each annotation; pictures show those above the threshold.

    It can't be written image by image, so that a line of JSON for each image comes first.
    """
    detector, classes = loaded
    file, lines = job.run / "predictions.json", job.run / "predictions.jsonl"
    with _growing(lines) as out:
        images, annotations = count(1), count(1)

        def use(paths: list[str], found: list[Detections], sizes: list[tuple[int, int]]) -> None:
            for path, one, (height, width) in zip(paths, found, sizes, strict=True):
                number = next(images)
                image = {"id": number, "file_name": path, "height": height, "width": width}
                boxes = [
                    {"id": next(annotations), "image_id": number, **_annotation(*box)}
                    for box in zip(one.boxes, one.scores, one.labels, strict=True)
                ]
                out.write(json.dumps({"image": image, "annotations": boxes}) + "\n")
                sure = one.scores >= detector.threshold
                drawn = partial(
                    draw_boxes,
                    boxes=one.boxes[sure],
                    labels=one.labels[sure],
                    classes=classes,
                    scores=one.scores[sure],
                )
                job.draw(number - 1, path, drawn)
            out.flush()

        good = detect_in_batches(detector, job.paths, use, job.advance)
    head = {
        "info": {
            "description": "vissl-lite predict",
            "threshold": detector.threshold,  # the score from which on F1 was best on validation
        },
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, start=1)],
    }
    _write_coco(file, head, lines)
    lines.unlink()
    return file, int(good.sum()), classes


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
        file: appears whole or not at all.
        head: what stands before the images and annotations.
        lines: a line of JSON with ``image`` and ``annotations`` for each image.
    """

    def entries(kind: str) -> Iterator[str]:
        with lines.open(encoding="utf-8") as written:
            for line in written:
                found = json.loads(line)
                yield from map(json.dumps, [found["image"]] if kind == "images" else found[kind])

    with whole_file(file) as part, part.open("w", encoding="utf-8") as out:
        out.write(json.dumps(head)[:-1])
        for kind in ("images", "annotations"):
            out.write(f', "{kind}": [')
            for number, entry in enumerate(entries(kind)):
                out.write(f", {entry}" if number else entry)
            out.write("]")
        out.write("}\n")


def _segment(loaded: tuple[Segmenter, list[str]], job: _Job) -> tuple[Path, int, list[str]]:
    """An index PNG for each image, in its own size, with a palette so that one sees it."""
    segmenter, classes = loaded
    normalize = Normalize(segmenter.encoder.mean, segmenter.encoder.std)
    size = segmenter.encoder.image_size
    palette = np.array(class_colours(len(classes)), np.uint8)
    palette[0] = 0
    faults: list[str | None] = []
    numbers = count()
    with evaluating(segmenter, normalize):
        for path in job.paths:
            job.advance(1)
            try:
                image = read_image(path)
            except BROKEN_IMAGE as error:
                faults.append(reason(error, path))
                continue
            shares = segment(segmenter, normalize, image, size)
            mask = np.asarray(shares.argmax(axis=0), np.uint8)
            picture = Image.fromarray(mask)
            picture.putpalette(palette.ravel().tolist())
            place = job.place(path, "masks")
            if place.name != f"{os.path.basename(path)}.png":
                log.info("the name is too long: the mask of %s is %s", path, place)
            with whole_file(place) as part:
                picture.save(part, "PNG")
            drawn = partial(draw_mask, mask=mask, classes=len(classes))
            job.draw(next(numbers), path, drawn)
            faults.append(None)
    good = report_broken(job.paths, faults)
    return job.run / "masks", int(good.sum()), classes


_USES: dict[str, tuple[Callable[[Path], Any], Callable[[Any, _Job], tuple[Path, int, list[str]]]]]
_USES = {
    "classification": (load_classifier, _classify),
    "detection": (load_detector, _detect),
    "segmentation": (load_segmenter, _segment),
}
