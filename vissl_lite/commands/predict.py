"""``vissl-lite predict``: use a fine-tuned model on a folder of images."""

import logging
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vissl_lite.data.images import find_images
from vissl_lite.data.reading import MAX_PIXELS, limit_pixels
from vissl_lite.errors import check_not_negative
from vissl_lite.options import Options, Paths, StrPath, command, path_list
from vissl_lite.report.additions import add_report
from vissl_lite.run import check_out, open_run, write_results
from vissl_lite.training.progress import progress_bar
from vissl_lite.transfer.base import TrainedModel
from vissl_lite.transfer.prediction import Predictions
from vissl_lite.transfer.tasks import find_model

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


@dataclass(frozen=True, kw_only=True)
class PredictOptions(Options):
    """Options of ``predict``."""

    model: StrPath
    """A run of finetune, or the model folder in it."""
    data: Paths
    """Folders (searched recursively) or .txt files of paths."""
    out: StrPath
    """The run folder to write."""
    pictures: int = 0
    """Draw the predictions into so many of the images, below pictures."""
    max_pixels: int = MAX_PIXELS
    """Skip images with more pixels (height times width): a small file may decode to billions. The
    default is what Pillow takes."""
    overwrite: bool = False
    """Replace the run in --out."""


@command(PredictOptions)
def predict(options: PredictOptions) -> PredictResult:
    """Use a fine-tuned model on images: classify them, find objects in them, or segment them.

    Writes predictions.csv for classification, predictions.json in COCO's format for detection, and
    for segmentation an index PNG for each image, below masks. They grow as predictions.csv.part and
    predictions.jsonl.part, which a failure leaves behind.

    File names that are not UTF-8 stand in predictions.csv as they are on the disk (Python reads
    them with errors="surrogateescape"), and in predictions.json with escapes of lone surrogates,
    which Python reads as the same names. A mask or picture has the name of its image and .png,
    unless that would be too long: then it is cut and ends in a hash, as the log says.

    Returns:
        Paths and the number of images.

    Raises:
        UserError: something that was given can't work; nothing is written then.
    """
    limit_pixels(options.max_pixels)
    check_not_negative("pictures", options.pictures)
    model, sources = os.fspath(options.model), path_list(options.data)
    check_out(Path(options.out), [("model", model), ("data", sources)], overwrite=options.overwrite)
    task, folder = find_model(Path(model))
    loaded: TrainedModel = task.load(folder)
    paths = find_images(sources)
    with open_run(Path(options.out), "predict", options.as_config()) as run:
        with progress_bar() as bar:
            shown = bar.add_task("predict", total=len(paths), info="")
            todo = Predictions(paths, run, options.pictures, partial(bar.advance, shown))
            file, images = task.predict(loaded, todo)
        results = {
            "task": task.name,
            "images": images,
            "skipped": len(paths) - images,
            "classes": loaded.classes,
        }
        write_results(run, results)
        log.info("%d images, %s: %s", images, task.name, file)
        if options.pictures:
            log.info("Pictures of it: %s", run / "pictures")
        add_report(run)
    return PredictResult(run, file, images)
