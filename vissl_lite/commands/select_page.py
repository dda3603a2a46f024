"""The page of ``select`` in which a person labels the chosen images."""

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from vissl_lite.data.image_reader import ImageReader
from vissl_lite.data.images import BROKEN_IMAGE
from vissl_lite.evaluation.embedding import nearest
from vissl_lite.evaluation.knn import nearest_neighbors
from vissl_lite.report.label_page import LabelImage, LabelledNeighbor, write_label_page
from vissl_lite.transfer.dataset import KnownImages

log = logging.getLogger(__name__)

# Browsers are slow with larger pages: a thousand photographs take about 40 MB.
MAX_PAGE_IMAGES = 1000

# Labelled images that the page shows beside each chosen one, and other chosen ones that it knows to
# be similar: the nearest of those labelled meanwhile are shown, too.
NEIGHBORS, SIMILAR = 5, 10


def classes_by_path(labelled: KnownImages) -> dict[str, str]:
    """Class of each labelled image that is not for testing, by absolute path."""
    pairs = zip(labelled.paths, labelled.labels or (), strict=labelled.labels is not None)
    return {os.path.abspath(path): name for path, name in pairs if path not in labelled.test}


def write_page(
    file: Path,
    paths: Sequence[str],
    features: np.ndarray,
    chosen: np.ndarray,
    labelled: KnownImages,
    labelled_at: np.ndarray,
    classes: Sequence[str],
    groups: Mapping[str, str] | None,
    reader: ImageReader,
) -> None:
    """Write the page in which a person labels the chosen images.

    Args:
        file: HTML file to write.
        paths: Absolute paths of all images.
        features: ``(N, D)`` of all images.
        chosen: Indices of the chosen images.
        labelled: Labelled images, of one class each.
        labelled_at: Indices of those that can be read.
        classes: Names of the classes.
        groups: Groups of all images by an expression; None without one.
        reader: How the images are read.
    """
    class_of = classes_by_path(labelled)
    labelled_at = np.array([i for i in labelled_at if paths[i] in class_of], dtype=int)
    neighbors: list[list[LabelledNeighbor]] = [[] for _ in chosen]
    if len(labelled_at):
        found = nearest_neighbors(features[labelled_at], features[chosen], NEIGHBORS)
        neighbors = [
            [
                LabelledNeighbor(paths[i], class_of[paths[i]], similarity)
                for i, similarity in zip(labelled_at[near], similarities.tolist(), strict=True)
            ]
            for near, similarities in zip(*found, strict=True)
        ]
    similar = [
        [(paths[i], one) for i, one in zip(chosen[near], similarities.tolist(), strict=True)]
        for near, similarities in zip(*nearest(features[chosen], SIMILAR), strict=True)
    ]
    images = [
        LabelImage(paths[index], near, others)
        for index, near, others in zip(chosen, neighbors, similar, strict=True)
    ]
    # A table with all labels would mix training and test images that are kept apart, and has the
    # groups of a column for some images alone.
    separate = labelled.parts_given or (bool(labelled.groups) and groups is None)
    before = [] if separate else [*class_of.items()]
    if separate and class_of:
        log.info(
            "The table that %s saves has the new labels only, since the known ones have %s",
            file.name,
            "a validation or test part" if labelled.parts_given else "groups",
        )
    title = f"{len(images)} images to label"
    write_label_page(file, images, classes, title, before, groups, reader)


def own_ranges(reader: ImageReader, paths: Sequence[str]) -> int:
    """Number of images whose pictures have a range of values of their own."""
    count = 0
    for path in paths:
        with suppress(*BROKEN_IMAGE):  # it was read a moment ago, but can have gone since
            count += reader.has_own_range(path)
    return count
