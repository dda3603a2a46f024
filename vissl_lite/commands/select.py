"""``vissl-lite select``: choose which images to label next."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vissl_lite.commands.embed import encoder_for_images
from vissl_lite.commands.excluded import without_excluded
from vissl_lite.commands.select_images import (
    BY_UNCERTAINTY,
    check_known,
    check_probe_labels,
    check_uncertainty,
    groups_of_probe,
    joined,
    named_groups,
    probe_uncertainty,
    read_images,
)
from vissl_lite.commands.select_page import MAX_PAGE_IMAGES, classes_by_path, own_ranges, write_page
from vissl_lite.data.image_survey import ImageSettings, override
from vissl_lite.data.images import find_images
from vissl_lite.data.reading import MAX_PIXELS, limit_pixels
from vissl_lite.data.text_file import csv_writer
from vissl_lite.encoders.folder import choose_slice_axis
from vissl_lite.errors import UserError, check_count, check_image_size, check_seed
from vissl_lite.options import Options, Paths, StrPath, command, path_list
from vissl_lite.report.additions import SHEET, add_report, add_selection
from vissl_lite.run import check_out, open_run, write_results
from vissl_lite.selection import METHODS, Candidates, Selection
from vissl_lite.selection.coverage import MAX_IMAGES, nearest_of, unit_features
from vissl_lite.selection.estimate import estimate_coverage
from vissl_lite.transfer.base import TrainedModel
from vissl_lite.transfer.classification.options import LabelOptions
from vissl_lite.transfer.confidence import Confidence
from vissl_lite.transfer.dataset import KnownImages
from vissl_lite.transfer.options import AnnotationsOption
from vissl_lite.transfer.skeleton import COCO_SKELETON, filled_skeleton, read_coco_labels
from vissl_lite.transfer.sources.groups import default_group, find_groups, group_names
from vissl_lite.transfer.sources.opening import unpacked
from vissl_lite.transfer.sources.reading_log import ReadingLog
from vissl_lite.transfer.tasks import AnyTask, find_model, find_task, reading_settings

log = logging.getLogger(__name__)

# Table of the chosen images in the run folder, and the page in which they are labelled.
SELECTED, LABEL_PAGE = "selected.csv", "label.html"


@dataclass(frozen=True)
class SelectResult:
    """Images to label.

    Attributes:
        run: Run folder.
        selected: Table of the images in it, ``selected.csv``.
        paths: Absolute paths of the images, the most useful first.
    """

    run: Path
    selected: Path
    paths: list[str]

    def __fspath__(self) -> str:
        return str(self.run)


@dataclass(frozen=True, kw_only=True)
class SelectOptions(Options, ImageSettings, LabelOptions, AnnotationsOption):
    """Options of ``select``."""

    encoder: StrPath
    """A run, an encoder folder, timm:NAME (pre-trained weights) or random:NAME (untrained)."""
    data: Paths
    """Images to choose from: folders (searched recursively) or .txt files of paths. Labelled ones
    may be among them."""
    budget: int
    """Number of images to choose."""
    out: StrPath
    """Run folder to write."""
    method: Literal[
        "herding", "typiclust", "probcover", "margin", "dropquery", "k_center", "random"
    ] = "herding"
    """How to choose: herding (the images that cover all others best; with --model those that cover
    uncertain images best), typiclust (typical images of the largest clusters), probcover (balls
    around images), margin (the images that --model is most uncertain of), dropquery (typical images
    among those of which a linear probe on --labelled is uncertain), k_center (the farthest images),
    or random."""
    labelled: StrPath | None = None
    """What is labelled already, in any layout that finetune reads. These images, and others of the
    same pictures, are not chosen, and what they cover counts as covered."""
    exclude: Paths | None = None
    """Images that are not to be chosen, nor others of the same pictures, such as those that are not
    usable: tables (.csv) with a column path."""
    model: StrPath | None = None
    """A run of finetune, whose uncertainty counts with --method herding and margin."""
    annotations: StrPath | None = None
    """Where the boxes or masks are, if --labelled is the folder of the images alone."""
    task: str | None = None
    """Task of the labels: classification, detection or segmentation. Default: that of --model, or
    classification."""
    per_group: int | None = None
    """Maximum number of images of each group, such as a patient, labelled ones included. Default:
    no limit."""
    group_by: str | None = None
    """Regular expression on the path of an image below --data or --labelled, for --per_group.
    Images for which its first group (or, without one, all that it matches) is the same belong
    together. Default: by a column such as patient_id of the table of --labelled, the volume of
    slices, or the patient of DICOM files."""
    image_size: int | None = None
    """Side length of the input in pixels. Default: that of the encoder, or for random:NAME that of
    the images."""
    max_pixels: int = MAX_PIXELS
    """Skip images with more pixels (height times width) than this; a small file can decode to
    billions of pixels. The default is Pillow's limit."""
    seed: int = 0
    """Seed of what is random in the method."""
    overwrite: bool = False
    """Replace an existing run in --out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_images()
        for name in ("budget", "per_group", "class_level"):
            check_count(name, getattr(self, name))
        check_image_size(self.image_size)
        check_seed(self.seed)
        if self.task is not None:
            self._set("task", find_task(self.task).name)
        if self.method == "margin" and self.model is None:
            raise UserError("--method margin needs a model: give --model with a run of finetune")
        if self.method == "dropquery" and self.model is not None:
            raise UserError(
                "--method dropquery fits a linear probe to --labelled: leave out --model"
            )
        if self.group_by is not None and self.per_group is None:
            raise UserError("--group_by is for --per_group, which is not given")
        reading = {one.name for one in (*fields(LabelOptions), *fields(AnnotationsOption))}
        for name in sorted((reading - {"group_by"}).intersection(self.given)):
            if self.labelled is None and self.given[name] is not None:
                raise UserError(f"--{name} is for reading --labelled, which is not given")


@command(SelectOptions)
def select(options: SelectOptions) -> SelectResult:
    """Choose which images of a folder to label, by the features of an encoder.

    The first images to label are chosen by what they cover. Later choices know the images that are
    labelled (--labelled) and how uncertain a model is of each image (--model). Of near-duplicates
    one is chosen.

    Writes selected.csv (rank, path, reason, number of images that are nearest to it), to_label.csv
    (path and an empty column label) for classification or to_label.json (COCO without annotations
    of the chosen images; if --labelled is a file in COCO's format, it begins with its images and
    their annotations) for other tasks, and report.html with the chosen images, a map, and the
    coverage at each budget.
    Where each image has one class, label.html is a page for labelling up to 1,000 of them in a
    browser; it saves the CSV that finetune reads.

    Returns:
        The paths of the chosen images.

    Raises:
        UserError: An option is invalid, and nothing is written; or no image is left to choose.
    """
    limit_pixels(options.max_pixels)
    model_folder = None if options.model is None else find_model(Path(options.model))[1]
    choose_slice_axis(options.axis, options.encoder, model_folder)
    out, sources = Path(options.out), path_list(options.data)
    config = options.as_config()
    names = ("encoder", "data", "labelled", "annotations", "model")
    check_out(out, [(name, config.get(name)) for name in names], overwrite=options.overwrite)
    filled = filled_skeleton(out)
    if filled is not None:
        raise UserError(
            f"{filled} was changed since it was written, for example by adding labels, which "
            f"--overwrite would delete: move it elsewhere, or give another --out"
        )
    task, model, temperature = _find_task(options)
    pool, excluded = without_excluded(find_images(sources), path_list(options.exclude or []))
    labelled = _read_labels(options, task, model)
    if options.method == "dropquery" and options.labelled is not None:
        check_probe_labels(labelled.labels)
    # of the model first, as its annotations are numbered
    known_to_model = [] if model is None else model.classes
    classes = list(dict.fromkeys([*known_to_model, *labelled.classes]))
    paths = joined(pool, labelled.paths)
    known = set(map(os.path.abspath, labelled.paths))
    grouping = _groups(paths, options, labelled)
    earlier = None
    if options.labelled is not None and not labelled.parts_given:
        place = None if options.annotations is None else Path(options.annotations)
        earlier = read_coco_labels(Path(options.labelled), place)
    _check_budget(options, paths, known, grouping)
    if model_folder is not None:
        check_known(model_folder, pool, known)
    encoder = encoder_for_images(os.fspath(options.encoder), options.image_size, paths, options)
    if model is not None and options.method not in BY_UNCERTAINTY:
        log.warning(
            "--method %(method)s does not use the uncertainty of --model, which is only written to "
            "%(table)s: herding and margin use it",
            {"method": options.method, "table": SELECTED},
            extra={"code": "selection.unused_model"},
        )
    if model is not None:
        model.encoder.reader = override(model.encoder.reader, paths, options)
    with open_run(out, "select", config) as run:
        images = read_images(paths, excluded, encoder, task, model, temperature)
        prints, features, uncertainty = images.prints, images.features, images.uncertainty
        absolute = [os.path.abspath(path) for path in prints.paths]
        has_label = np.array([path in known for path in absolute])
        labelled_at = np.flatnonzero(has_label)
        groups = None if grouping is None else group_names(prints.paths, grouping)
        candidates = Candidates(
            len(prints), labelled_at, prints, groups, options.per_group, images.excluded
        )
        before, open_before = candidates.copy(), candidates.remaining
        if open_before == 0:
            raise UserError(
                "no image is left to choose: all without a label show the same as labelled or "
                "excluded ones, are of groups with enough images, or can't be read"
            )
        if len(prints) > MAX_IMAGES:
            log.info(
                "Of %d images, the coverage is estimated on a random sample of %d; herding and "
                "probcover choose from a sample too",
                len(prints),
                MAX_IMAGES,
            )
        if options.method == "dropquery" and options.labelled is not None:
            known_classes = classes_by_path(labelled)
            learned = np.array([i for i in labelled_at if absolute[i] in known_classes])
            known_names = [known_classes[absolute[i]] for i in learned]
            of = groups_of_probe([prints.paths[i] for i in learned], labelled, grouping)
            uncertainty = probe_uncertainty(features, learned, known_names, options.seed, of)
        used = uncertainty
        if model is not None and uncertainty is not None and options.method in BY_UNCERTAINTY:
            same = check_uncertainty(uncertainty[candidates.open], options.method)
            used = None if same and options.method == "herding" else uncertainty
        method = METHODS[options.method]
        selection = method(features, options.budget, labelled_at, used, options.seed, candidates)
        chosen = selection.indices
        if len(chosen) < options.budget:
            log.warning(
                "%(chosen)d images are chosen instead of %(budget)d: all others show the same as "
                "labelled, excluded or chosen ones, are of groups with enough images, or can't be "
                "read",
                {"chosen": len(chosen), "budget": options.budget},
                extra={"code": "selection.short"},
            )
        in_pool = set(map(os.path.abspath, pool))
        counted = np.array([path in in_pool for path in absolute])
        coverage = estimate_coverage(
            features, labelled_at, chosen, counted, options.seed, candidates, before
        )
        covers = _covers(features, labelled_at, chosen, counted)
        _write_table(run / SELECTED, absolute, selection, covers, uncertainty)
        # Only those of an expression: finetune finds patients and volumes in the files itself.
        written = None
        if grouping is not None and options.group_by is not None:
            written = {os.path.abspath(path): group for path, group in grouping.items()}
        new = [absolute[i] for i in chosen]
        skeleton = task.write_skeleton(new, classes, run, written, earlier)
        if skeleton.name == COCO_SKELETON and options.labelled is not None:
            _say_what_it_holds(skeleton, earlier is not None, labelled.parts_given)
        sheet = new[:SHEET]
        results: dict[str, Any] = {
            "method": options.method,
            "task": task.name,
            "chosen": len(chosen),
            "images": int(counted.sum()),
            "labelled": len(labelled_at),
            "sheet": {"pictures": len(sheet), "own_range": own_ranges(encoder.reader, sheet)},
            "ruled_out": len(prints) - len(labelled_at) - open_before,
            "coverage": {
                "selected": coverage.values[: len(chosen) + 1],
                "continued": coverage.values[len(chosen) :],
                "random": coverage.random,
                "knee": coverage.knee,
            },
        }
        write_results(run, results)
        page = labelled.labels is not None and len(chosen) <= MAX_PAGE_IMAGES
        if labelled.labels is not None and not page:
            log.warning(
                "No %(page)s is written: the page would hold the pictures of %(images)d images; "
                "label them in portions with --budget %(most)d, or fill in %(skeleton)s",
                {
                    "page": LABEL_PAGE, "images": len(chosen), "most": MAX_PAGE_IMAGES,
                    "skeleton": skeleton.name,
                },
                extra={"code": "selection.large_page"},
            )  # fmt: skip
        if page:
            write_page(
                run / LABEL_PAGE,
                absolute,
                features,
                chosen,
                labelled,
                labelled_at,
                classes,
                written,
                encoder.reader,
            )
        log.info(
            "%d of %d images are chosen by %s; coverage %.3f before, %.3f with them (%.3f with a "
            "random choice)",
            len(chosen),
            results["images"],
            options.method,
            coverage.values[0],
            coverage.values[len(chosen)],
            coverage.random[len(chosen)],
        )
        if coverage.knee:
            log.info(
                "The knee of the coverage curve is at %d chosen image%s: each further one adds "
                "less than the average one",
                coverage.knee,
                "s" * (coverage.knee > 1),
            )
        log.info("Written: %s, %s", run / SELECTED, skeleton)
        if page:
            log.info("Label the images in a browser: %s", run / LABEL_PAGE)
        add_selection(run, features, absolute, has_label, chosen, options.seed, encoder.reader)
        add_report(run)
    return SelectResult(out, out / SELECTED, [absolute[i] for i in chosen])


def _find_task(options: SelectOptions) -> tuple[AnyTask, TrainedModel | None, float]:
    """The task, the model if one is given, and the temperature of its logits."""
    if options.model is None:
        return find_task(options.task or "classification"), None, 1.0
    task, folder = find_model(Path(options.model))
    if options.task not in (None, task.name):
        raise UserError(
            f"--task {options.task}: the model {options.model} is of --task {task.name}"
        )
    model: TrainedModel = task.load(folder)
    confidence = Confidence.load(folder)
    return task, model, 1.0 if confidence is None else confidence.temperature


def _read_labels(options: SelectOptions, task: AnyTask, model: TrainedModel | None) -> KnownImages:
    """The labelled images of all parts; their classes if each has one, also for the model."""
    one_class = task.takes_shots and not getattr(model, "multi_label", False)
    if options.labelled is None:
        return KnownImages([], [], [] if one_class else None)
    source = Path(options.labelled)
    if not source.exists():
        raise UserError(f"--labelled {source} does not exist")
    # groups are those of all images, and splits do not matter
    settings = reading_settings(task, options.replace(group_by=None, per_group=None))
    found: KnownImages = task.labelled_images(str(unpacked(source)), settings)
    return found if one_class else replace(found, labels=None)


def _say_what_it_holds(skeleton: Path, joined: bool, parts_given: bool) -> None:
    """Log whether a file to label holds the labels so far.

    Args:
        skeleton: File in COCO's format.
        joined: Whether it does.
        parts_given: Whether --labelled has a validation or test part.
    """
    if joined:
        log.info("%s begins with the images of --labelled and their annotations", skeleton.name)
        return
    why = "has a validation or test part" if parts_given else "is not one file in COCO's format"
    log.info("%s has the new images only, since --labelled %s", skeleton.name, why)


def _groups(
    paths: Sequence[str], options: SelectOptions, labelled: KnownImages
) -> dict[str, str] | None:
    """Groups of images by path, for --per_group.

    Args:
        paths: All images.
        options: Options of the command.
        labelled: Labelled images; their source may name groups, also of images without a label.
    """
    if options.per_group is None:
        return None
    sources = path_list(options.data)
    named = named_groups(paths, labelled)
    if named and options.group_by is None:
        # other slices of a volume, which the table need not have, are of the same group
        of_files = {path: group for path in paths if (group := default_group(path)) is not None}
        names = {of_files[path]: group for path, group in named.items() if path in of_files}
        named = {path: names.get(group, group) for path, group in of_files.items()} | named
        if len(named) < len(paths):
            log.info(
                "%d of %d images have a group, by --labelled or their files: each of the others is "
                "a group of its own",
                len(named),
                len(paths),
            )
        return named
    reading = ReadingLog(source=", ".join(sources))
    if options.labelled is not None:
        sources = [*sources, os.fspath(options.labelled)]
    places = [unpacked(Path(one)) for one in sources]
    found = find_groups(paths, places, options.group_by, reading)
    if found is None and options.group_by is None and not reading.groups:
        raise UserError(
            f"--per_group {options.per_group}: the images are not of volumes or patients, and "
            f"--labelled names no groups: give --group_by with a regular expression that finds the "
            f"group in a path"
        )
    for note in reading.notes:
        log.info(note)
    return reading.groups


def _check_budget(
    options: SelectOptions, paths: Sequence[str], known: set[str], grouping: dict[str, str] | None
) -> None:
    """Raise a UserError if there are fewer images to choose from than the budget."""
    has_label = np.array([os.path.abspath(path) in known for path in paths])
    left, why = int((~has_label).sum()), "images without a label"
    if options.exclude is not None:
        why += " that --exclude does not name"
    names = None if grouping is None else group_names(paths, grouping)
    if names is not None and options.per_group is not None:
        _, group = np.unique(names, return_inverse=True)
        free = np.bincount(group[~has_label], minlength=group.max() + 1)
        room = options.per_group - np.bincount(group[has_label], minlength=len(free))
        left = int(np.minimum(free, room.clip(min=0)).sum())
        why += f" within --per_group {options.per_group}"
    if options.budget > left:
        raise UserError(
            f"--budget {options.budget}: there are {left} {why}"
            + (f"; give at most {left}" if left else "")
        )


def _covers(
    features: np.ndarray, labelled: np.ndarray, chosen: np.ndarray, counted: np.ndarray
) -> np.ndarray:
    """Number of images to which each chosen one is nearer than any other chosen or labelled one."""
    nearest = nearest_of(unit_features(features), np.concatenate([chosen, labelled]))
    return np.bincount(nearest[counted], minlength=len(chosen) + len(labelled))[: len(chosen)]


def _write_table(
    file: Path,
    paths: Sequence[str],
    selection: Selection,
    covers: np.ndarray,
    uncertainty: np.ndarray | None,
) -> None:
    with csv_writer(file) as rows:
        more = [] if uncertainty is None else ["uncertainty"]
        rows.writerow(["rank", "path", "reason", "covers", *more])
        for rank, index in enumerate(map(int, selection.indices), start=1):
            row = [rank, paths[index], selection.reasons[rank - 1], covers[rank - 1]]
            rows.writerow(row if uncertainty is None else [*row, f"{uncertainty[index]:.4f}"])
