"""``vissl-lite predict``: classify a folder of images."""

import csv
import logging
from dataclasses import dataclass
from pathlib import Path

from vissl_lite.data.images import find_images
from vissl_lite.inference import run_over
from vissl_lite.run import check_out, open_run, write_results
from vissl_lite.training.progress import progress_bar
from vissl_lite.transfer.classification import load_classifier

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PredictResult:
    """What predicting wrote.

    Attributes:
        run: the folder.
        predictions: the CSV file in it, with the columns path, class, probability.
        images: how many images were classified.
    """

    run: Path
    predictions: Path
    images: int


def predict(model: str, data: list[str] | str, out: str, overwrite: bool = False) -> PredictResult:
    """Classify images with a fine-tuned model.

    Args:
        model: A run of finetune, or the model folder in it.
        data: Folders (searched recursively) or .txt files of paths.
        out: The run folder to write; the predictions are in its predictions.csv.
        overwrite: Replace the run in --out.

    Returns:
        Paths and the number of images.

    Raises:
        UserError: something that was given can't work; nothing is written then.
    """
    config = dict(locals())
    check_out(Path(out), overwrite=overwrite)
    classifier, normalize, size, classes = load_classifier(Path(model))
    paths = find_images([data] if isinstance(data, str) else data)
    with open_run(Path(out), config) as run:
        with progress_bar() as bar:
            task = bar.add_task("predict", total=len(paths), info="")
            (logits,), good = run_over(
                classifier,
                lambda images: [classifier(images)],
                normalize,
                paths,
                size,
                lambda images: bar.advance(task, images),
            )
        probability, best = logits.softmax(dim=1).max(dim=1)
        file = run / "predictions.csv"
        with file.open("w", newline="", encoding="utf-8") as opened:
            rows = csv.writer(opened)
            rows.writerow(["path", "class", "probability"])
            read = [path for path, fine in zip(paths, good, strict=True) if fine]
            for path, index, share in zip(read, best.tolist(), probability.tolist(), strict=True):
                rows.writerow([path, classes[index], f"{share:.4f}"])
        results = {"images": len(read), "skipped": len(paths) - len(read), "classes": classes}
        write_results(run, results)
        log.info("%d images classified: %s", len(read), file)
    return PredictResult(run, file, len(read))
