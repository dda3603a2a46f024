"""The images that ``select`` chooses from: features, groups, and how uncertain a model is."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vissl_lite.data.fingerprints import Fingerprints, read_fingerprints
from vissl_lite.data.reading import report_skipped
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import UserError
from vissl_lite.evaluation.features import extract
from vissl_lite.inference import check_outputs
from vissl_lite.selection.dropquery import changed_by_dropout
from vissl_lite.training.progress import progress_bar
from vissl_lite.transfer.base import TrainedModel
from vissl_lite.transfer.classification.linear_head import fit_linear
from vissl_lite.transfer.dataset import KnownImages
from vissl_lite.transfer.sources.groups import find_groups, group_names
from vissl_lite.transfer.sources.reading_log import ReadingLog
from vissl_lite.transfer.tasks import AnyTask
from vissl_lite.transfer.trained_on import load_trained_on

log = logging.getLogger(__name__)

# Methods that use the uncertainty of a model, and how they choose where it is all the same.
BY_UNCERTAINTY = {"herding": "as without a model", "margin": "at random"}


@dataclass(frozen=True)
class SelectImages:
    """All readable images: those to choose from, and labelled ones.

    Attributes:
        prints: Fingerprints, with the paths.
        excluded: Fingerprints of the images that --exclude names.
        features: ``(N, D)``.
        uncertainty: ``(N,)`` of the model; None without one.
    """

    prints: Fingerprints
    excluded: Fingerprints
    features: np.ndarray
    uncertainty: np.ndarray | None


def check_known(model_folder: Path, pool: Sequence[str], known: set[str]) -> None:
    """Warn of images that a model was trained on and that --labelled does not name.

    Args:
        model_folder: Folder of the model.
        pool: Images to choose from.
        known: Absolute paths of the labelled images.
    """
    trained_on = set(load_trained_on(model_folder) or [])
    unnamed = trained_on.intersection(map(os.path.abspath, pool)) - known
    if unnamed:
        log.warning(
            "%(images)d images of --data are among those that --model was trained on, and count as "
            "not labelled: give what is labelled as --labelled",
            {"images": len(unnamed)},
            extra={"code": "selection.labelled_unknown"},
        )


def check_uncertainty(uncertainty: np.ndarray, method: str) -> bool:
    """Whether a model is equally uncertain of all images that may be chosen, which is warned of.

    Args:
        uncertainty: ``(N,)`` of these images.
        method: Name of the method.
    """
    same = len(uncertainty) > 1 and bool(uncertainty.min() == uncertainty.max())
    if same:
        log.warning(
            "--model has the same uncertainty, %(uncertainty).3f, for all %(images)d images to "
            "choose from, as a detector that finds nothing in them: the images are chosen %(how)s. "
            "Train the model on more labels, or for longer",
            {
                "uncertainty": float(uncertainty[0]),
                "images": len(uncertainty),
                "how": BY_UNCERTAINTY[method],
            },
            extra={"code": "selection.same_uncertainty"},
        )
    return same


def joined(pool: Sequence[str], labelled: Sequence[str]) -> list[str]:
    """All images; of one that is in both, the path in the pool."""
    by_place = {os.path.abspath(path): path for path in (*labelled, *pool)}
    return list(by_place.values())


def named_groups(paths: Sequence[str], labelled: KnownImages) -> dict[str, str]:
    """The groups by path of those images that have one in the source of the labels."""
    known = {os.path.abspath(path): group for path, group in labelled.groups.items()}
    return {path: known[place] for path in paths if (place := os.path.abspath(path)) in known}


def groups_of_probe(
    paths: Sequence[str], labelled: KnownImages, grouping: dict[str, str] | None
) -> np.ndarray | None:
    """Groups of the labelled images, as ``finetune`` finds them: no fold of a probe divides one.

    Args:
        paths: L labelled images.
        labelled: Labelled images, with the groups that their source names.
        grouping: Groups for --per_group, if it was given.

    Returns:
        ``(L,)`` str; None if all images are apart.
    """
    if grouping is None:
        reading = ReadingLog(source="", groups=named_groups(paths, labelled))
        find_groups(paths, [], None, reading)
        grouping = reading.groups
    return group_names(paths, grouping)


def read_images(
    paths: Sequence[str],
    excluded: Sequence[str],
    encoder: Encoder,
    task: AnyTask,
    model: TrainedModel | None,
    temperature: float,
) -> SelectImages:
    """Fingerprints, features and uncertainty of all images that can be read.

    Args:
        paths: Images to choose from, and labelled ones.
        excluded: Images that are not to be chosen; some may be gone or broken.
        encoder: Encoder of the features.
        task: Task of the labels.
        model: Model of the uncertainty; None for none.
        temperature: Temperature of its logits.

    Raises:
        UserError: No image can be read.
    """
    with progress_bar() as bar:

        def advance(name: str, total: int) -> Any:
            return partial(bar.advance, bar.add_task(name, total=total, info=""))

        prints, broken = read_fingerprints(paths, advance("near-duplicates", len(paths)))
        report_skipped(broken)
        ruled_out, _ = read_fingerprints(excluded)
        if len(prints) == 0:
            raise UserError(
                f"none of {len(paths)} images can be read, the first {broken[0].path} "
                f"({broken[0].why})"
            )
        layers, good = extract(encoder, prints.paths, False, advance("features", len(prints)))
        features = layers["last"]
        check_outputs([features], f"some of the {len(features)} images")
        prints = prints.take(np.flatnonzero(good))
        if model is None:
            return SelectImages(prints, ruled_out, features, None)
        uncertainty, good = task.uncertainty(
            model, temperature, prints.paths, advance("uncertainty", len(prints))
        )
        prints = prints.take(np.flatnonzero(good))
        return SelectImages(prints, ruled_out, features[good], uncertainty)


def check_probe_labels(names: list[str] | None) -> None:
    """Raise a UserError if no linear probe can be fitted to these classes of images."""
    if names is None:
        raise UserError("--method dropquery needs --labelled with one class for each image")
    if len(set(names)) < 2:
        raise UserError(
            f"--method dropquery needs readable images of at least two classes in --labelled, "
            f"which has {len(set(names))}: label more, or choose with --method herding"
        )


def probe_uncertainty(
    features: np.ndarray,
    labelled: np.ndarray,
    names: list[str],
    seed: int,
    groups: np.ndarray | None,
) -> np.ndarray:
    """Share of dropout masks that change the class by a linear probe, for DropQuery.

    Args:
        features: ``(N, D)`` of all images.
        labelled: ``(L,)`` indices of the labelled images.
        names: L names of their classes.
        seed: Seed of the folds and masks.
        groups: ``(L,)`` groups of the labelled images, which no fold divides; None without any.

    Raises:
        UserError: The labelled images that can be read are of fewer than two classes.
    """
    check_probe_labels(names)
    classes, numbers = np.unique(names, return_inverse=True)
    head, _ = fit_linear(features[labelled], numbers, len(classes), seed, groups)
    return changed_by_dropout(head.logits, features, seed)
