"""Training on pseudo-labels beside true labels, and whether that helped."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vissl_lite.commands.pseudo_label import (
    UNLABELLED,
    MinConfidence,
    choose_cutoff,
    report_cutoff,
)
from vissl_lite.comparison.statistics import Difference, Runs, difference
from vissl_lite.data.fingerprints import Fingerprints, find_matches, read_fingerprints
from vissl_lite.data.image_survey import ImageSettings, override
from vissl_lite.data.reading import report_skipped
from vissl_lite.data.text_file import read_paths
from vissl_lite.errors import DivergedError, MachineError, OutOfMemoryError, UserError
from vissl_lite.run import read_config
from vissl_lite.run_folder import RUN_CONFIG
from vissl_lite.training.progress import progress_bar
from vissl_lite.transfer.base import Scores, TrainedModel
from vissl_lite.transfer.dataset import LabelledDataset
from vissl_lite.transfer.fitting import FittedModel, rank_metrics
from vissl_lite.transfer.prediction import Predictions
from vissl_lite.transfer.sources.groups import groups_of_others
from vissl_lite.transfer.sources.parts import Split
from vissl_lite.transfer.tasks import AnyTask
from vissl_lite.transfer.trained_on import load_trained_on

log = logging.getLogger(__name__)


# Folder in a run that has a subfolder for each round.
ROUNDS = "rounds"

# From so many times the steps on, a longer training may be why pseudo-labels help.
MUCH_LONGER = 1.25


@dataclass(frozen=True)
class Unlabelled:
    """What ``pseudo-label`` was given, so that images can be labelled again.

    Attributes:
        paths: All images, labelled or not.
        min_confidence, min_precision: See ``choose_cutoff``.
        reading: How they are stored, where that differs from the training images.
    """

    paths: list[str]
    min_confidence: MinConfidence
    min_precision: float
    reading: ImageSettings


@dataclass(frozen=True)
class PseudoLabels:
    """Pseudo-labelled images.

    Attributes:
        data: Its training part has the images; the others are empty.
        left_out: Number of images that were left out, by the part of the true labels in which they
            are, too, or images of the same group.
        prints: Fingerprints of the images of ``data``.
    """

    data: LabelledDataset
    left_out: dict[str, int]
    prints: Fingerprints


@dataclass(frozen=True)
class Labeller:
    """The model that made pseudo-labels.

    Attributes:
        trained_on: Images that it was trained on, as far as the data set lists them.
        others: How many of them are not among the labelled images, neither as files nor as copies.
    """

    trained_on: list[str]
    others: int


@dataclass(frozen=True)
class Round:
    """A training, the first without pseudo-labels.

    Attributes:
        fitted: The model.
        scores: Its test scores.
        left_out: See ``PseudoLabels``; empty for the first training.
        prints: Fingerprints of the pseudo-labelled images; None for the first training.
    """

    fitted: FittedModel[TrainedModel]
    scores: Scores
    left_out: dict[str, int]
    prints: Fingerprints | None = None


def check_same_reading(folder: Path, settings: ImageSettings) -> None:
    """Raise a UserError if pseudo-labelled images were read otherwise than a training reads them.

    Args:
        folder: Folder of the data set of ``pseudo-label``.
        settings: Options of the training, which reads all of its images in the same way.
    """
    if not (folder / RUN_CONFIG).is_file():
        return
    options = read_config(folder)
    for one in fields(ImageSettings):
        before, now = options.get(one.name), getattr(settings, one.name)
        if before is not None and before != now:
            raise UserError(
                f"the images of {folder} were read with --{one.name} {before}, and all images of a "
                f"training are read in the same way: give finetune --{one.name} {before} as well "
                f"if this suits the labelled images, or leave the pseudo-labels out"
            )


def load_pseudo_labels(task: AnyTask, folder: Path, data: LabelledDataset) -> PseudoLabels:
    """Read pseudo-labels, without images that have a true label or would leak.

    Images that are in the validation or test part as well, to all appearance, are left out, as are
    those of the same groups, such as patients. So are those of the training part: their true label
    is better, and each of these is held out once in a cross-validation.

    Args:
        task: Task of the data.
        folder: Folder of the data set of ``pseudo-label``.
        data: Labelled images.

    Raises:
        UserError: The data set can't be read, or no image is left.
    """
    if not _are_there(folder):
        raise UserError(
            f"no pseudo-labels at {folder}: give a folder that vissl-lite pseudo-label has written"
        )
    found: LabelledDataset = task.read_pseudo_labels(folder, data)
    paths = found.paths("train")
    if not paths:
        raise UserError(
            f"{folder} has no pseudo-labels, since no prediction was confident enough: give "
            f"pseudo-label a lower --min_confidence"
        )
    prints, broken = read_fingerprints(paths)
    report_skipped(broken)
    gone = {one.path for one in broken}
    groups = groups_of_others(paths, data.reading)
    left_out: dict[str, int] = {}
    parts: tuple[Split, ...] = ("test", "val", "train")
    for part in parts:
        bank, _ = read_fingerprints(data.paths(part))
        same = {match.path for match in find_matches(prints, bank)}
        of_part = data.groups(part)
        if of_part is not None and part != "train":
            names = set(of_part.tolist())
            same |= {
                path
                for path, of_path in zip(paths, groups, strict=True)
                if not names.isdisjoint(of_path)
            }
        left_out[part] = len(same - gone)
        gone |= same
    if left_out["test"] or left_out["val"]:
        log.warning(
            "Pseudo-labelled images that are left out, since they or images of their groups are in "
            "the test part (%(test)d) or in the validation part (%(val)d)",
            left_out,
            extra={"code": "pseudo_labels.leak"},
        )
    if left_out["train"]:
        log.info("Pseudo-labelled images with a true label, left out: %d", left_out["train"])
    kept = [index for index, path in enumerate(paths) if path not in gone]
    if not kept:
        raise UserError(
            f"none of the {len(paths)} pseudo-labelled images in {folder} is left: "
            f"{len(broken)} can't be read, and the others have a true label or are in the test "
            f"or validation part"
        )
    used = np.array([path not in gone for path in prints.paths])
    return PseudoLabels(found.take({"train": kept}), left_out, prints.take(np.flatnonzero(used)))


def _are_there(folder: Path) -> bool:
    """Whether a folder has pseudo-labels, which get their name when they are complete."""
    return any(not file.name.endswith(".part") for file in folder.glob("pseudo_labels.*"))


def check_labeller(folder: Path, data: LabelledDataset, known_before: Sequence[str]) -> Labeller:
    """Check that the model that made pseudo-labels was not trained on what is a test image now.

    Its predictions are right for images like those that it was trained on. A model that learns from
    them is better on these images than it will be on new ones. A warning is logged if it was
    trained on labels that ``data`` do not have, such as those that ``--fraction`` leaves out.

    Args:
        folder: Folder of the data set of ``pseudo-label``.
        data: Labelled images.
        known_before: Images whose labels the encoder was trained with before.

    Raises:
        UserError: Test images, or copies of their files, are among them.
    """
    listed = load_trained_on(folder)
    if listed is None:
        log.warning(
            "%(folder)s does not say what the model that made the pseudo-labels was trained on: "
            "it can't be checked that no test image is among these images",
            {"folder": str(folder)},
            extra={"code": "pseudo_labels.unchecked"},
        )
        return Labeller([], 0)
    test = {os.path.abspath(path): path for path in data.paths("test")}
    training: tuple[Split, ...] = ("train", "val")
    known = [path for part in training for path in data.paths(part)] + list(known_before)
    others = set(listed).difference(map(os.path.abspath, known))
    leaks = {test[path] for path in others if path in test}
    if others and not leaks:
        prints, broken = read_fingerprints(sorted(others))
        if broken:
            log.warning(
                "%(gone)d of %(images)d images that the model that made the pseudo-labels was "
                "trained on can't be read, the first %(first)s: it can't be checked that they are "
                "not copies of test images",
                {"gone": len(broken), "images": len(listed), "first": broken[0].path},
                extra={"code": "pseudo_labels.unchecked"},
            )
        # Near-duplicates are a matter of the data set, of which the leak guard warns.
        leaks = _copies(read_fingerprints(data.paths("test"))[0], prints)
        others = set(prints.paths) - _copies(prints, read_fingerprints(known)[0])
    if leaks:
        raise UserError(
            f"the model that made the pseudo-labels in {folder} was trained on {len(leaks)} of "
            f"{len(test)} test images, perhaps since the test part is made anew when labels are "
            f"added: train a model on these labels and make the pseudo-labels again, or give the "
            f"same --data, --test_fold and --group_by as for that model, or a test part that it "
            f"was not trained on"
        )
    if others:
        log.warning(
            "The model that made the pseudo-labels was trained on the true labels of %(others)d "
            "images that this training does not have: a gain by pseudo-labels may come from them. "
            "Give it the same --data, and the same --fraction or --shots with the same --seed, to "
            "see what pseudo-labels gain",
            {"others": len(others)},
            extra={"code": "pseudo_labels.more_labels"},
        )
    return Labeller(listed, len(others))


def _copies(images: Fingerprints, bank: Fingerprints) -> set[str]:
    """Paths of the images whose files are among those of the bank, byte for byte."""
    return {match.path for match in find_matches(images, bank) if match.kind == "exact"}


def read_unlabelled(folder: Path) -> Unlabelled:
    """Read what ``pseudo-label`` was given.

    Args:
        folder: Folder of its data set.

    Raises:
        UserError: The data set was not written by it, or is damaged.
    """
    config = read_config(folder)
    try:
        min_confidence, min_precision = config["min_confidence"], float(config["min_precision"])
        if min_confidence != "auto":
            min_confidence = float(min_confidence)
        names = [field.name for field in fields(ImageSettings)]
        reading = ImageSettings(**{name: config[name] for name in names})
        reading.check_images()
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"--rounds needs a data set of pseudo-label, which {folder} is not"
        ) from None
    return Unlabelled(read_paths(folder / UNLABELLED), min_confidence, min_precision, reading)


def self_train(
    task: AnyTask,
    data: LabelledDataset,
    pseudo_labels: PseudoLabels,
    unlabelled: Unlabelled | None,
    rounds: int,
    run: Path,
    fit: Callable[[LabelledDataset | None, int], FittedModel[TrainedModel]],
    resume: bool = False,
) -> list[Round]:
    """Train without pseudo-labels, then with them, for some rounds.

    From the second round on, the images that were given to ``pseudo-label`` are labelled by the
    model of the round before.

    Args:
        task: Task of the data.
        data: Labelled images.
        pseudo_labels: Pseudo-labels of the first round.
        unlabelled: What is labelled in further rounds; None if there are none.
        rounds: Number of trainings with pseudo-labels. There are fewer if the confident predictions
            of a model are not precise enough for another one, or if one fails.
        run: Run folder, which gets the pseudo-labels of later rounds.
        fit: Function from the pseudo-labelled images, and the number of the round, to a model.
        resume: Whether pseudo-labels of later rounds that are in the run folder are used.

    Returns:
        The training without pseudo-labels, then those with them.
    """
    fitted = fit(None, 0)
    done = [Round(fitted, task.evaluate(fitted.model, data), {})]
    for number in range(1, rounds + 1):
        if number > 1 and unlabelled is not None:
            folder = run / ROUNDS / str(number)
            try:
                # Labels that a training began with must stay: other hardware may give others.
                if not (resume and _are_there(folder)):
                    _label_again(task, data, fitted, unlabelled, folder)
                pseudo_labels = load_pseudo_labels(task, folder, data)
            except MachineError:
                raise
            except UserError as error:
                _stop(number, error)
                break
        try:
            fitted = fit(pseudo_labels.data, number)
        except (DivergedError, OutOfMemoryError) as error:  # others end the run, to be resumed
            _stop(number, error)
            break
        scores = task.evaluate(fitted.model, data)
        done.append(Round(fitted, scores, pseudo_labels.left_out, pseudo_labels.prints))
    return done


def _stop(number: int, error: UserError) -> None:
    """Say why there is no further round; the models of the rounds before are not lost."""
    log.warning(
        "There is no round %(number)d: %(why)s",
        {"number": number, "why": str(error)},
        extra={"code": "pseudo_labels.stopped"},
    )


def _label_again(
    task: AnyTask,
    data: LabelledDataset,
    fitted: FittedModel[TrainedModel],
    unlabelled: Unlabelled,
    folder: Path,
) -> None:
    """Label images with a model, which is left as it is."""
    cutoff = choose_cutoff(
        fitted.confidence, unlabelled.min_confidence, unlabelled.min_precision, "the model"
    )
    report_cutoff(cutoff, unlabelled.min_confidence, unlabelled.min_precision, data.classes)
    folder.mkdir(parents=True, exist_ok=True)
    encoder = fitted.model.encoder
    own = encoder.reader
    encoder.reader = override(own, unlabelled.paths, unlabelled.reading)
    try:
        with progress_bar() as bar:
            shown = bar.add_task("pseudo-label", total=len(unlabelled.paths), info="")
            todo = Predictions(unlabelled.paths, folder, 0, partial(bar.advance, shown))
            task.pseudo_label(fitted.model, cutoff, todo)
    finally:
        encoder.reader = own


def best_round(rounds: Sequence[Round], monitor: str) -> int:
    """Number of the round whose model is the best on validation images.

    Args:
        rounds: The trainings.
        monitor: Validation metric to choose by.

    Returns:
        Of equal ones the first; that without pseudo-labels if there are no validation images.
    """
    ranks = [rank_metrics(one.fitted.chosen.metrics, monitor) for one in rounds]
    return ranks.index(max(ranks))


def outcome(
    rounds: Sequence[Round],
    kept: int,
    monitor: str,
    data: LabelledDataset,
    others: int,
    steps: Sequence[int],
) -> dict[str, Any]:
    """Whether pseudo-labels helped, for ``results.json``.

    Each model with them is compared with the one without on the same test images. The difference
    has a 95 % interval, unless some can't be read. It covers the choice of test images, not the
    randomness of training, as there is one training each. The verdict is on the model that is kept,
    or on the last one if that without pseudo-labels is.

    Args:
        rounds: The trainings.
        kept: Number of the round whose model is kept.
        monitor: Validation metric that was chosen by.
        data: Labelled images.
        others: Number of labels of the model that made the first pseudo-labels which ``data`` do
            not have.
        steps: Number of steps of each training.

    Returns:
        ``rounds`` with the number of pseudo-labelled images, the number of steps, validation and
        test metrics of each, and, of those with pseudo-labels, the ``difference`` with its interval
        if there is one and its ``verdict`` (``helped``, ``no difference``, ``hurt``, or ``unknown``
        without an interval); ``kept``, ``monitor``, ``metric``; ``judged``, the number of the round
        that ``difference`` and ``verdict`` are of; ``more_labels``, which is ``others``; and all of
        it in a ``sentence``.
    """
    metric = next(iter(rounds[0].scores.metrics))
    before = rounds[0].scores.metrics[metric]
    figures: list[dict[str, Any]] = []
    for number, one in enumerate(rounds):
        figures.append(
            {
                "pseudo_labelled": one.fitted.added,
                "steps": steps[number],
                "left_out": one.left_out,
                "val": one.fitted.chosen.metrics,
                "test": one.scores.metrics,
            }
        )
        if number == 0:
            continue
        found, verdict = {"mean": one.scores.metrics[metric] - before}, "unknown"
        gap = _paired(rounds[0].scores, one.scores, data)
        if gap is not None and gap.low is not None and gap.high is not None:
            found |= {"low": gap.low, "high": gap.high}
            verdict = gap.verdict
        figures[-1] |= {"difference": found, "verdict": verdict}
    judged = kept or len(rounds) - 1
    result = {
        "kept": kept,
        "monitor": monitor,
        "metric": metric,
        "judged": judged,
        "difference": figures[judged]["difference"],
        "verdict": figures[judged]["verdict"],
        "more_labels": others,
    }
    return {"rounds": figures, **result, "sentence": _sentence(figures, result)}


def _sentence(rounds: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> str:
    """Whether pseudo-labels helped, in words."""
    said = {
        "helped": "on these test images they helped, in one training each",
        "hurt": "on these test images they hurt, in one training each",
        "no difference": "the test images do not show that they helped",
        "unknown": "whether that is more than chance, one training each does not tell",
    }
    metric, found, judged = result["metric"], result["difference"], rounds[result["judged"]]
    interval = ""
    if "low" in found:
        low, high = found["low"], found["high"]
        interval = f", 95 % interval over the test images {low:+.3f} to {high:+.3f}"
    of_round = f" (round {result['judged']})" if len(rounds) > 2 else ""
    keeps = f"of round {result['kept']}" if result["kept"] else "without them"
    more = ""
    if result["more_labels"]:
        more = (
            f" The model that made the pseudo-labels knew {result['more_labels']:,} more true "
            f"labels, from which a gain may come."
        )
    longer = judged["steps"] / max(1, rounds[0]["steps"])
    if longer > MUCH_LONGER:
        more += (
            f" With them the training had {judged['steps']:,} steps instead of "
            f"{rounds[0]['steps']:,}, from which a gain may come, too: --max_time gives both the "
            f"same time."
        )
    return (
        f"Pseudo-labels of {judged['pseudo_labelled']:,} images{of_round}: test {metric} "
        f"{rounds[0]['test'][metric]:.3f} without them, {judged['test'][metric]:.3f} with them "
        f"({found['mean']:+.3f}{interval}): {said[result['verdict']]}. "
        f"Kept, by validation {result['monitor']}, is the model {keeps}.{more}"
    )


def _paired(first: Scores, last: Scores, data: LabelledDataset) -> Difference | None:
    """Difference of the main metrics of two models on the same images; None without an interval."""
    after, before = _as_runs(last, data), _as_runs(first, data)
    if after is None or before is None:
        return None
    return difference([after], [before], groups=data.sampling_units())


def _as_runs(scores: Scores, data: LabelledDataset) -> Runs | None:
    """The main metric of a model; None without the part of each test image in it."""
    if scores.per_image is None or len(scores.per_image) < len(data.test):
        return None
    return Runs(np.array([next(iter(scores.metrics.values()))]), scores.per_image[None])
