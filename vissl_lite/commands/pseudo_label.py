"""``vissl-lite pseudo-label``: write the confident predictions of a model as a data set."""

import logging
import math
import os
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

from vissl_lite.commands.excluded import without_excluded
from vissl_lite.data.fingerprints import find_matches, read_fingerprints
from vissl_lite.data.image_survey import ImageSettings, override
from vissl_lite.data.images import find_images
from vissl_lite.data.reading import MAX_PIXELS, limit_pixels, slice_along
from vissl_lite.data.text_file import write_paths
from vissl_lite.errors import UserError, check_not_negative, check_positive_share, check_share
from vissl_lite.options import Options, Paths, StrPath, command, flatten, path_list
from vissl_lite.report.additions import add_report
from vissl_lite.run import beside, check_out, open_run, read_config, write_results
from vissl_lite.run_folder import RUN_CONFIG
from vissl_lite.training.progress import progress_bar
from vissl_lite.transfer.base import TrainedModel
from vissl_lite.transfer.confidence import Confidence, Cutoff
from vissl_lite.transfer.prediction import Predictions
from vissl_lite.transfer.tasks import AnyTask, find_model
from vissl_lite.transfer.trained_on import load_trained_on, save_trained_on

log = logging.getLogger(__name__)

MinConfidence: TypeAlias = float | Literal["auto"]

# File in the data set that lists all images that were given, labelled or not.
UNLABELLED = "unlabelled.txt"

# Options of finetune, beside those of tasks and of reading, that decide which labels are used and
# which model is trained, with their defaults.
REPEATED = {
    "fraction": None,
    "shots": None,
    "seed": 0,
    "leaks": "warn",
    "refit": None,
    "frozen": False,
    "image_size": None,
    "upright": True,
}


@dataclass(frozen=True)
class PseudoLabelResult:
    """Result of ``pseudo_label``.

    Attributes:
        run: Folder of the data set.
        labels: File of the labels in it.
        images: Number of images that were read.
        labelled: By class, the number of images in which it occurs; for detection the number of its
            boxes.
        min_confidence: Confidence from which predictions were taken.
    """

    run: Path
    labels: Path
    images: int
    labelled: dict[str, int]
    min_confidence: float

    def __fspath__(self) -> str:
        return str(self.run)


@dataclass(frozen=True, kw_only=True)
class PseudoLabelOptions(Options, ImageSettings):
    """Options of ``pseudo-label``."""

    model: StrPath
    """A run of finetune, or the model folder in it."""
    data: Paths
    """Folders of unlabelled images (searched recursively) or .txt files of paths."""
    out: StrPath
    """Folder of the data set to write, for --pseudo_labels of finetune."""
    exclude: Paths | None = None
    """Images that are not to be labelled, such as those that are not usable: tables (.csv) with a
    column path. Near-duplicates of them are left out, too."""
    min_confidence: MinConfidence = "auto"
    """Take predictions of at least this calibrated probability, or score of a box. auto: the lowest
    one that has the precision --min_precision on labelled images that were not trained on, and not
    below what was observed there."""
    min_precision: float = 0.95
    """Share of the predictions that must be right, for --min_confidence auto."""
    pictures: int = 0
    """Number of images to save with their pseudo-labels drawn in (in the folder pictures)."""
    max_pixels: int = MAX_PIXELS
    """Skip images with more pixels (height times width) than this; a small file can decode to
    billions of pixels. The default is Pillow's limit."""
    overwrite: bool = False
    """Replace an existing run in --out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_images()
        if self.min_confidence != "auto":
            check_share("min_confidence", self.min_confidence)
        check_positive_share("min_precision", self.min_precision)
        check_not_negative("pictures", self.pictures)


@command(PseudoLabelOptions)
def pseudo_label(options: PseudoLabelOptions) -> PseudoLabelResult:
    """Write the confident predictions of a fine-tuned model for unlabelled images as a data set.

    Give the data set to finetune with --pseudo_labels, beside the true labels. Images are not
    copied. trained_on.txt lists the images that the model was trained on, which finetune must not
    test on.

    Classification: pseudo_labels.csv with path, label and confidence; with several labels per
    image, an image is taken if every class is certain, present or absent. Detection:
    pseudo_labels.json in COCO format with the boxes of images in which no box is uncertain, since
    a box that is missed would be trained to be background. Segmentation: masks in which uncertain
    pixels are ignored (255), and pseudo_labels.csv with their paths.

    With --min_confidence auto, the precision is measured on the validation images of finetune; it
    must be at least --min_precision with 95 % confidence (one-sided). If there are too few images
    for that, the observed precision decides, and a warning says so. A class whose own observed
    precision on ten or more images is too low has a higher confidence, or is left out.

    Returns:
        Paths and numbers of labels.

    Raises:
        UserError: An option is invalid, or no confidence has the precision; nothing is written
            then.
    """
    limit_pixels(options.max_pixels)
    model, sources = os.fspath(options.model), path_list(options.data)
    check_out(Path(options.out), [("model", model), ("data", sources)], overwrite=options.overwrite)
    task, folder = find_model(Path(model))
    loaded: TrainedModel = task.load(folder)
    cutoff = choose_cutoff(
        Confidence.load(folder), options.min_confidence, options.min_precision, str(folder)
    )
    trained_on = load_trained_on(folder)
    encoder = loaded.encoder
    slice_along(encoder.reader.axis if options.axis is None else options.axis)
    pool = find_images(sources)
    paths = pool if options.exclude is None else _without(pool, path_list(options.exclude))
    encoder.reader = override(encoder.reader, paths, options)
    with open_run(Path(options.out), "pseudo-label", options.as_config()) as run:
        report_cutoff(cutoff, options.min_confidence, options.min_precision, loaded.classes)
        with progress_bar() as bar:
            shown = bar.add_task("pseudo-label", total=len(paths), info="")
            todo = Predictions(paths, run, options.pictures, partial(bar.advance, shown))
            found = task.pseudo_label(loaded, cutoff, todo)
        write_paths(run / UNLABELLED, [str(Path(path).absolute()) for path in paths])
        if trained_on is not None:
            save_trained_on(run, trained_on)
        known = len(set(map(os.path.abspath, found.paths)).intersection(trained_on or ()))
        labelled = dict(zip(loaded.classes, found.counts.tolist(), strict=True))
        results = {
            "task": task.name,
            "images": found.images,
            "skipped": len(paths) - found.images,
            **({} if options.exclude is None else {"excluded": len(pool) - len(paths)}),
            "labelled_images": len(found.paths),
            "trained_on_images": known,
            "labelled": labelled,
            "classes": loaded.classes,
            **cutoff_figures(cutoff, loaded.classes),
        }
        write_results(run, results)
        missing = [name for name, number in labelled.items() if not number]
        if missing:
            log.warning(
                "no prediction of these classes is confident enough: %(classes)s",
                {"classes": ", ".join(missing)},
                extra={"code": "pseudo_labels.no_class"},
            )
        log.info(
            "%d of %d images that were read have pseudo-labels%s: %s",
            len(found.paths),
            found.images,
            f" (the model was trained on {known} of them)" if known else "",
            found.file,
        )
        if found.paths:
            log.info("Next:")
            log.info("  %s", _next_command(task, folder.parent, run))
        add_report(run)
    return PseudoLabelResult(run, found.file, found.images, labelled, cutoff.value)


def _without(pool: list[str], tables: Sequence[str]) -> list[str]:
    """The images that no table names, and that are not near-duplicates of such images.

    Raises:
        UserError: A table can't be read, or no image is left.
    """
    usable, excluded = without_excluded(pool, tables)
    with progress_bar() as bar:
        shown = bar.add_task("near-duplicates", total=len(usable) + len(excluded), info="")
        # Those that can't be read are reported when they are predicted; of excluded ones that is a
        # usual reason.
        unusable, _ = read_fingerprints(excluded, partial(bar.advance, shown))
        prints, _ = read_fingerprints(usable, partial(bar.advance, shown))
    copies = {match.path for match in find_matches(prints, unusable)}
    kept = [path for path in usable if path not in copies]
    if not kept:
        raise UserError(
            f"--exclude leaves none of the {len(pool)} images of --data: it names "
            f"{len(pool) - len(usable)}, and {len(copies)} are near-duplicates of these"
        )
    log.info(
        "Left out by --exclude: %d images that it names, and %d near-duplicates of them",
        len(pool) - len(usable),
        len(copies),
    )
    return kept


def _next_command(task: AnyTask, trained: Path, run: Path) -> str:
    """The command that trains with the pseudo-labels.

    Args:
        task: Task of the labels.
        trained: Run folder of ``finetune``. Its encoder and data are given again, and those of its
            options that decide which labels are used and which model is trained.
        run: Data set of the pseudo-labels.
    """
    before: dict[str, Any] = {}
    if (trained / RUN_CONFIG).is_file():
        with suppress(UserError):  # it is damaged, and the labels are written
            before = read_config(trained)
    encoder, data = before.get("encoder") or "ENCODER", before.get("data") or "LABELLED"
    words = ["vissl-lite", "finetune", "--task", task.name, "--encoder", encoder, "--data", data]
    own = {one.name: one.default for one in (*fields(task.options), *fields(ImageSettings))}
    defaults = own | REPEATED
    changed = {
        name: before[name]
        for name, default in defaults.items()
        if name in before and before[name] != default
    }
    for name, value in flatten(changed).items():
        words += [f"--{name}", str(value).lower() if isinstance(value, bool) else value]
    words += ["--pseudo_labels", run, "--out", beside(run, "model")]
    return shlex.join(map(str, words))


def choose_cutoff(
    confidence: Confidence | None, min_confidence: MinConfidence, min_precision: float, model: str
) -> Cutoff:
    """The confidence from which predictions are taken as labels.

    Args:
        confidence: What is known of the model; None if nothing is.
        min_confidence: ``auto``, or the smallest confidence.
        min_precision: Share of the predictions that must be right, for ``auto``.
        model: The model, for messages.

    Raises:
        UserError: There is none.
    """
    if min_confidence == "auto":
        if confidence is None:
            raise UserError(
                f"{model} does not say how often its confident predictions are right, since "
                f"finetune has held out no labels for it: give a number with --min_confidence"
            )
        return confidence.choose(min_precision)
    if confidence is None:
        return Cutoff(min_confidence, 1.0, 0, 0, float("nan"), 0.0)
    return confidence.at(min_confidence)


def report_cutoff(
    cutoff: Cutoff, min_confidence: MinConfidence, min_precision: float, classes: Sequence[str]
) -> None:
    """Log how precise predictions of a confidence are, and on how many labels that rests."""
    if not cutoff.images:
        log.warning(
            "It is not known how often predictions of a confidence of %(value)g are right: no "
            "held-out image has one",
            {"value": cutoff.value},
            extra={"code": "pseudo_labels.unknown_precision"},
        )
        return
    words = (
        f"Predictions of a confidence of at least {cutoff.value:g} are right in "
        f"{cutoff.precision:.1%} of {cutoff.predictions:,} cases on {cutoff.images:,} held-out "
        f"images (with 95 % confidence in at least {cutoff.lower_bound:.1%})"
    )
    if min_confidence == "auto" and cutoff.lower_bound < min_precision:
        log.warning(
            "%(words)s: too few images to be sure of a precision of %(wanted)g",
            {"words": words, "wanted": min_precision},
            extra={"code": "pseudo_labels.few_labels"},
        )
    else:
        log.info("%s", words)
    for label, value in cutoff.raised.items():
        if value < math.inf:
            log.info(
                "Those of the class %s are right less often: they are taken from a confidence of "
                "%g on",
                classes[label],
                value,
            )
        else:
            log.warning(
                "no prediction of the class %(name)s is taken: at no confidence are enough of them "
                "right on held-out images",
                {"name": classes[label]},
                extra={"code": "pseudo_labels.class_left_out"},
            )


def cutoff_figures(cutoff: Cutoff, classes: Sequence[str]) -> dict[str, Any]:
    """Figures for ``results.json``; a class that is left out has no confidence (null)."""
    known = cutoff.predictions > 0
    return {
        "min_confidence": cutoff.value,
        "min_confidence_of_classes": {
            classes[label]: value if value < math.inf else None
            for label, value in cutoff.raised.items()
        },
        "temperature": cutoff.temperature,
        "precision": cutoff.precision if known else None,
        "precision_lower_bound": cutoff.lower_bound if known else None,
        "held_out_images": cutoff.images,
        "held_out_predictions": cutoff.predictions,
    }
