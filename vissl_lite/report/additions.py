"""Pictures, a map of embeddings and the report, which commands add to their runs."""

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vissl_lite.data.image_reader import PHOTOGRAPHS, ImageReader
from vissl_lite.data.images import BROKEN_IMAGE, resize_and_crop
from vissl_lite.data.views import Views
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import UserError
from vissl_lite.evaluation.embedding import CHOSEN, MAP_IMAGES, make_map, map_of_features
from vissl_lite.faults import machine_error
from vissl_lite.plots import CELL, Picture, plot_grid, plot_neighbors
from vissl_lite.pretext.base import PretextTask
from vissl_lite.pretext.modules.visualization import draw_views, visualization_of
from vissl_lite.run import MAP
from vissl_lite.transfer.base import Scores, TrainedModel
from vissl_lite.transfer.dataset import LabelledDataset, spread
from vissl_lite.transfer.sources.parts import PARTS

if TYPE_CHECKING:  # importing all tasks takes a second, and pre-training has none
    from vissl_lite.transfer.tasks import AnyTask

log = logging.getLogger(__name__)

NEIGHBORS_SHOWN = 7

# Images of each part that are shown with their labels, and the side of their cells in pixels.
LABELS_SHOWN, LABELS_CELL = 6, 240

# Chosen images on the contact sheet and in a row of it.
SHEET, SHEET_ROW = 100, 10


def add_pretext(
    run: Path, task: PretextTask, paths: Sequence[str], views: Views, seed: int
) -> None:
    """Write pictures of the views and of the pretext's predictions into a run of ``pretrain``.

    A failure is logged as a warning; machine errors are raised.

    Args:
        run: Run folder, which gets ``views.png`` and, if the pretext has a visualization,
            ``pretext.png``.
        task: Trained pretext.
        paths: Training images.
        views: Views of the pretext.
        seed: Seed that selects the images.
    """
    try:
        draw_views(paths, views, seed, run / "views.png", task.encoder.reader)
        shown = visualization_of(task, paths, views, seed)
        if shown is not None:
            plot_grid(shown.rows, run / "pretext.png", shown.columns)
    except Exception as error:
        _warn_or_raise("the picture of the pretext", error)


def add_embeddings(
    run: Path,
    encoder: Encoder,
    paths: Sequence[str],
    labels: np.ndarray | None = None,
    classes: Sequence[str] = (),
    seed: int = 0,
    most: int = MAP_IMAGES,
) -> None:
    """Write a map of images and a picture of nearest neighbors into a run, for its report.

    A failure is logged as a warning; machine errors are raised.

    Args:
        run: Run folder, which gets ``map.npz`` and ``neighbors.png``.
        encoder: Encoder that computes the embeddings.
        paths: N image files.
        labels: Class indices ``(N,)``, if each image has one class.
        classes: Class names.
        seed: Seed that selects the images.
        most: Of more images than these, a sample is used.
    """
    try:
        image_map = make_map(encoder, paths, labels, classes, most, seed)
        image_map.save(run / MAP)
        count = min(NEIGHBORS_SHOWN, len(image_map.paths) - 1)
        if count < 1:
            return
        queries = np.linspace(0, len(image_map.paths) - 1, min(6, len(image_map.paths))).astype(int)
        shown = [[query, *image_map.neighbors[query, :count]] for query in queries]
        names = None
        if image_map.labels is not None:
            names = [[classes[image_map.labels[index]] for index in row] for row in shown]
        images = [
            [_thumbnail(image_map.paths[index], encoder.reader) for index in row] for row in shown
        ]
        similarities = image_map.similarities[queries, :count]
        plot_neighbors(images, similarities, run / "neighbors.png", names)
    except Exception as error:  # For example, features that are not finite.
        _warn_or_raise("the map of the embeddings", error)


def _thumbnail(path: str, reader: ImageReader) -> np.ndarray:
    return resize_and_crop(reader.read_picture(path, 96), 96)


def add_test_embeddings(run: Path, encoder: Encoder, data: LabelledDataset, seed: int) -> None:
    """Call ``add_embeddings`` for the test images of a labelled data set of any task."""
    labels = data.image_classes("test")
    add_embeddings(run, encoder, data.paths("test"), labels, data.classes, seed)


def add_test_pictures(
    run: Path, task: "AnyTask", model: TrainedModel, data: LabelledDataset, scores: Scores
) -> None:
    """Write pictures of test predictions into a run of ``finetune``.

    A failure is logged as a warning; machine errors are raised.

    Args:
        run: Run folder.
        task: Task of the run.
        model: Trained model.
        data: Labelled data with a test part.
        scores: Scores of the model on the test part.
    """
    try:
        task.visualize(model, data, scores, run)
    except Exception as error:  # the results of the training are still to be written
        _warn_or_raise("the pictures of the test images", error)


def add_label_pictures(run: Path, task: "AnyTask", data: LabelledDataset) -> None:
    """Write pictures of images with their labels, a row per part, into a run of ``check``.

    Missing or broken images are logged as a warning.

    Args:
        run: Run folder, which gets ``labels.png``.
        task: Task of the labels.
        data: Labelled data.
    """
    try:
        rows = []
        for part in PARTS:
            count = len(data.paths(part))
            chosen = spread(count, LABELS_SHOWN) if count else ()
            pictures = [task.labelled_picture(data, part, int(index)) for index in chosen]
            titled = [
                replace(one, caption=": ".join(filter(None, (part, one.caption))))
                for one in pictures
            ]
            rows += [titled] if titled else []
        plot_grid(rows, run / "labels.png", cell=LABELS_CELL)
    except (UserError, *BROKEN_IMAGE) as error:
        _warn_or_raise("the pictures of the labels", error)


def add_selection(
    run: Path,
    features: np.ndarray,
    paths: Sequence[str],
    labelled: np.ndarray,
    chosen: np.ndarray,
    seed: int = 0,
    reader: ImageReader = PHOTOGRAPHS,
) -> None:
    """Write a contact sheet of chosen images, and a map that marks them, into a run of ``select``.

    A failure is logged as a warning; machine errors are raised.

    Args:
        run: Run folder, which gets ``selected.png`` and ``map.npz``.
        features: ``(N, D)`` features of all images.
        paths: N image files.
        labelled: ``(N,)`` bool: which of them are labelled.
        chosen: ``(B,)`` indices of the chosen ones, in order.
        seed: Seed that selects the others on the map.
        reader: How the images are read.
    """
    try:
        sheet = [
            Picture(reader.read_picture(path, CELL), f"{rank} {os.path.basename(path)}")
            for rank, path in enumerate((paths[index] for index in chosen[:SHEET]), start=1)
        ]
        rows = [sheet[start : start + SHEET_ROW] for start in range(0, len(sheet), SHEET_ROW)]
        if rows:
            plot_grid(rows, run / "selected.png")
        labels = labelled.astype(np.int64)
        labels[chosen] = 2
        order = np.random.default_rng(seed).permutation(len(paths))
        shown = np.sort(
            np.concatenate([order[labels[order] == kind][:MAP_IMAGES] for kind in range(3)])
        )
        some = [paths[index] for index in shown]
        kinds = ("others", "labelled", CHOSEN)
        image_map = map_of_features(
            features[shown], some, labels[shown], kinds, seed, unfold=True, reader=reader
        )
        image_map.save(run / MAP)
    except Exception as error:
        _warn_or_raise("the picture or the map of the chosen images", error)


def add_report(run: Path) -> None:
    """Write the report of a run whose other files are complete.

    A failure is logged as a warning; machine errors are raised.

    Args:
        run: Run folder.
    """
    try:
        from vissl_lite.report.run_report import write_report

        log.info("The report is %s", write_report(run))
    except Exception as error:  # A failing report must not fail the run.
        _warn_or_raise("report.html", error)


def _warn_or_raise(what: str, error: Exception) -> None:
    """Log a failure as a warning, but raise machine errors such as a full disk."""
    if machine_error(error) is not None:
        raise error
    log.warning(
        "%(what)s can't be made: %(why)s",
        {"what": what, "why": repr(error)},
        extra={"code": "picture.failed"},
    )
    log.debug("why", exc_info=True)
