"""``vissl-lite predict``: use a fine-tuned model on a folder of images."""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vissl_lite.commands.report import add_report
from vissl_lite.data.images import find_images
from vissl_lite.data.reading import MAX_PIXELS, limit_pixels
from vissl_lite.errors import check_arguments, check_not_negative
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
    task, folder = find_model(Path(model))
    loaded: TrainedModel = task.load(folder)
    paths = find_images([data] if isinstance(data, str) else data)
    with open_run(Path(out), "predict", config) as run:
        with progress_bar() as bar:
            shown = bar.add_task("predict", total=len(paths), info="")
            todo = Predictions(paths, run, pictures, partial(bar.advance, shown))
            file, images = task.predict(loaded, todo)
        results = {
            "task": task.name,
            "images": images,
            "skipped": len(paths) - images,
            "classes": loaded.classes,
        }
        write_results(run, results)
        log.info("%d images, %s: %s", images, task.name, file)
        if pictures:
            log.info("Pictures of it: %s", run / "pictures")
        add_report(run)
    return PredictResult(run, file, images)
