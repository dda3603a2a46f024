"""What commands add to their runs for people to look at: pictures, a map, and the report."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vissl_lite.data.images import BROKEN_IMAGE, read_image, resize_and_crop
from vissl_lite.data.views import Views
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import UserError
from vissl_lite.evaluation.embedding import make_map
from vissl_lite.faults import machine_error
from vissl_lite.plots import plot_grid, plot_neighbors
from vissl_lite.pretext.base import PretextTask
from vissl_lite.pretext.modules.visualization import draw_views, visualization_of
from vissl_lite.run import MAP
from vissl_lite.transfer.base import LabelledDataset, Scores, TrainedModel
from vissl_lite.transfer.tasks import AnyTask

log = logging.getLogger(__name__)

NEIGHBORS_SHOWN = 7


def add_pretext(
    run: Path, task: PretextTask, paths: Sequence[str], views: Views, seed: int
) -> None:
    """Leave pictures of the views, and of the pretext at work, in a run of ``pretrain``.

    A failure is a warning and no more, but for faults of the machine.

    Args:
        run: the folder; gets views.png and, where there is something to see, pretext.png.
        task: the pretext, trained.
        paths: the training images.
        views: the pretext's.
        seed: chooses the images.
    """
    try:
        draw_views(paths, views, seed, run / "views.png")
        shown = visualization_of(task, paths, views, seed)
        if shown is not None:
            plot_grid(shown.rows, run / "pretext.png", shown.columns)
    except Exception as error:
        _warn("the picture of the pretext", error)


def add_embeddings(
    run: Path,
    encoder: Encoder,
    paths: Sequence[str],
    labels: np.ndarray | None = None,
    classes: Sequence[str] = (),
    seed: int = 0,
) -> None:
    """Leave a map of images and their nearest neighbors in a run, for its report.

    A failure is a warning and no more, but for faults of the machine.

    Args:
        run: the folder; gets map.npz and neighbors.png.
        encoder: whose embeddings.
        paths: N image files, of which up to 1,000 are shown.
        labels: ``(N,)`` class indices, where each image has one.
        classes: their names.
        seed: chooses the images.
    """
    try:
        image_map = make_map(encoder, paths, labels, classes, seed=seed)
        image_map.save(run / MAP)
        count = min(NEIGHBORS_SHOWN, len(image_map.paths) - 1)
        if count < 1:
            return
        queries = np.linspace(0, len(image_map.paths) - 1, min(6, len(image_map.paths))).astype(int)
        shown = [[query, *image_map.neighbors[query, :count]] for query in queries]
        names = None
        if image_map.labels is not None:
            names = [[classes[image_map.labels[index]] for index in row] for row in shown]
        images = [[_small(image_map.paths[index]) for index in row] for row in shown]
        similarities = image_map.similarities[queries, :count]
        plot_neighbors(images, similarities, run / "neighbors.png", names)
    except Exception as error:  # such as features that are no numbers
        _warn("the map of the embeddings", error)


def _small(path: str) -> np.ndarray:
    return resize_and_crop(read_image(path, 96), 96)


def add_test_embeddings(run: Path, encoder: Encoder, data: LabelledDataset, seed: int) -> None:
    """The same of the test images of labelled data, of whatever task."""
    labels = data.image_classes("test")
    add_embeddings(run, encoder, data.paths("test"), labels, data.classes, seed)


def add_test_pictures(
    run: Path, task: AnyTask, model: TrainedModel, data: LabelledDataset, scores: Scores
) -> None:
    """Leave pictures of test predictions in a run of ``finetune``.

    Images that have gone are a warning and no more.

    Args:
        run: the folder.
        task: of the run.
        model: what it has trained.
        data: with the test part.
        scores: of the model on the test part.
    """
    try:
        task.visualize(model, data, scores, run)
    except (UserError, *BROKEN_IMAGE) as error:
        _warn("the pictures of the test images", error)


def add_report(run: Path) -> None:
    """Write the report of a run that has done its work.

    A failure is a warning and no more, but for faults of the machine.

    Args:
        run: the folder, with all its other files written.
    """
    try:
        from vissl_lite.report.run_report import write_report

        log.info("The report is %s", write_report(run))
    except Exception as error:  # whatever it is: it must not cost the run
        _warn("report.html", error)


def _warn(what: str, error: Exception) -> None:
    """Say that something can't be made; a fault of the machine, such as a full disk, is raised."""
    if machine_error(error) is not None:
        raise error
    log.warning(
        "%(what)s can't be made: %(why)s",
        {"what": what, "why": repr(error)},
        extra={"code": "picture.failed"},
    )
    log.debug("why", exc_info=True)
