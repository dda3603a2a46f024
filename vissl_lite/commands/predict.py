"""``vissl-lite predict``: apply a fine-tuned model to a folder of images."""

import logging
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vissl_lite.data.image_survey import ImageSettings, override
from vissl_lite.data.images import find_images
from vissl_lite.data.reading import MAX_PIXELS, limit_pixels, slice_along
from vissl_lite.data.turns import UNTURNED, Turn, turns_for
from vissl_lite.errors import check_not_negative
from vissl_lite.options import Options, Paths, StrPath, command, path_list
from vissl_lite.report.additions import add_report
from vissl_lite.run import check_out, open_run, write_results
from vissl_lite.training.progress import progress_bar
from vissl_lite.transfer.base import TrainedModel
from vissl_lite.transfer.finetuning import read_upright
from vissl_lite.transfer.prediction import Predictions
from vissl_lite.transfer.tasks import find_model

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PredictResult:
    """Result of prediction.

    Attributes:
        run: Run folder.
        predictions: Predictions in it: ``predictions.csv`` for classification, ``predictions.json``
            for detection, the folder ``masks`` for segmentation.
        images: Number of images that were read.
    """

    run: Path
    predictions: Path
    images: int


@dataclass(frozen=True, kw_only=True)
class PredictOptions(Options, ImageSettings):
    """Options of ``predict``."""

    model: StrPath
    """A run of finetune, or the model folder in it."""
    data: Paths
    """Folders of images (searched recursively) or .txt files of paths."""
    out: StrPath
    """Run folder to write."""
    tta: bool = False
    """Test-time augmentation: average the predictions over flips of each image: left and right, or
    all eight flips and quarter turns if the model was trained with --upright false. Takes two or
    eight times as long."""
    pictures: int = 0
    """Number of images to save with their predictions drawn in (in the folder pictures)."""
    max_pixels: int = MAX_PIXELS
    """Skip images with more pixels (height times width) than this; a small file can decode to
    billions of pixels. The default is Pillow's limit."""
    overwrite: bool = False
    """Replace an existing run in --out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_images()


@command(PredictOptions)
def predict(options: PredictOptions) -> PredictResult:
    """Apply a fine-tuned model to images: classify them, detect objects, or segment them.

    The task is that of the model: one that was fine-tuned with --task detection detects objects.
    Images are read as the training images were: the same bands, value ranges and slices. --bands,
    --window, --value_range, --axis and --nodata are for images that are stored in another way.

    With --tta, predictions for the flips and turns of an image are mapped back and averaged: the
    probabilities of classes, those of the classes of every pixel, or boxes with their scores.

    Writes predictions.csv for classification, predictions.json in COCO format for detection, and
    for segmentation one indexed PNG per image in the folder masks (of a NIfTI volume a NIfTI file,
    of a GeoTIFF a GeoTIFF). While running, predictions are written to predictions.csv.part or
    predictions.jsonl.part, which remain after a failure.

    File names that are not UTF-8 are written to predictions.csv byte for byte (read it in Python
    with errors="surrogateescape"), and to predictions.json as escaped lone surrogates, which Python
    decodes to the same names. Masks and pictures are named after their image with .png appended;
    names that would be too long are shortened and end in a hash, which is logged.

    Returns:
        Paths and number of images.

    Raises:
        UserError: An option is invalid; nothing is written then.
    """
    limit_pixels(options.max_pixels)
    check_not_negative("pictures", options.pictures)
    model, sources = os.fspath(options.model), path_list(options.data)
    check_out(Path(options.out), [("model", model), ("data", sources)], overwrite=options.overwrite)
    task, folder = find_model(Path(model))
    loaded: TrainedModel = task.load(folder)
    turns: tuple[Turn, ...] = UNTURNED
    if options.tta:
        task.check_turns(loaded)
        turns = turns_for(read_upright(folder))
    encoder = loaded.encoder
    slice_along(encoder.reader.axis if options.axis is None else options.axis)
    paths = find_images(sources)
    encoder.reader = override(encoder.reader, paths, options)
    with open_run(Path(options.out), "predict", options.as_config()) as run:
        with progress_bar() as bar:
            shown = bar.add_task("predict", total=len(paths), info="")
            advance = partial(bar.advance, shown)
            todo = Predictions(paths, run, options.pictures, advance, turns)
            file, images = task.predict(loaded, todo)
        results = {
            "task": task.name,
            "images": images,
            "skipped": len(paths) - images,
            "classes": loaded.classes,
            "tta": options.tta,
        }
        write_results(run, results)
        log.info("%d images, %s: %s", images, task.name, file)
        if options.pictures:
            log.info("Pictures with predictions: %s", run / "pictures")
        add_report(run)
    return PredictResult(run, file, images)
