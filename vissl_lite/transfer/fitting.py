"""Fine-tuning from labels to a finished model: choose hyperparameters, then use all labels.

What is chosen (the learning rate, if several are given, whether BatchNorms are frozen, and how much
of the change by the training is kept) is chosen on images that the models have not been trained on.
Then a model is trained with it on all labels.
"""

import logging
import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Generic

from torch import Tensor

from vissl_lite.data.atomic_file import atomic_write
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import DivergedError, UserError, did_you_mean
from vissl_lite.metrics_file import MetricsFile
from vissl_lite.run import CHECKPOINTS, METRICS, is_main_process
from vissl_lite.training.fit import NO_FILES, TrainingFiles
from vissl_lite.training.hardware import Hardware
from vissl_lite.training.processes import of_main_process
from vissl_lite.transfer.base import DatasetT, ModelT, ScoresT, SettingsT, Task
from vissl_lite.transfer.confidence import Confidence, HeldOut
from vissl_lite.transfer.sources.groups import groups_of_others

log = logging.getLogger(__name__)

# With fewer validation images than this, hyperparameters are chosen by cross-validation.
FEW_VALIDATION_IMAGES = 100
FOLDS = 3

# With at least this many, they are chosen by the task's main metric, and not by the loss: that of
# overfitted models is high also where they are right most often.
MANY_VALIDATION_IMAGES = 1000

# Shares of the change by the training that are tried. 0 is the model before its first step.
SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)


@dataclass(frozen=True)
class FitFiles:
    """Files of all trainings of a model.

    Attributes:
        folder: Folder of the files of metrics and of checkpoints; None for no files.
        checkpoints: Whether checkpoints are written.
        resume: Whether to continue from them.
    """

    folder: Path | None = None
    checkpoints: bool = False
    resume: bool = False

    def of_training(self, metrics: str, checkpoints: str) -> TrainingFiles:
        """Files of one training.

        Args:
            metrics: Name of the file of its metrics; empty for none.
            checkpoints: Subfolder for its checkpoints; empty for the folder itself.
        """
        if self.folder is None:
            return NO_FILES
        logged = bool(metrics) and is_main_process()
        if logged and not self.resume:
            (self.folder / metrics).unlink(missing_ok=True)
        return TrainingFiles(
            MetricsFile(self.folder / metrics) if logged else None,
            self.folder / CHECKPOINTS / checkpoints if self.checkpoints else None,
            self.resume,
        )

    def use_curve(self, metrics: str) -> None:
        """Copy the metrics of one of several trainings, if there are, to ``metrics.csv``."""
        if self.folder is not None and is_main_process() and (self.folder / metrics).is_file():
            with atomic_write(self.folder / METRICS) as part:
                shutil.copyfile(self.folder / metrics, part)


NO_FIT_FILES = FitFiles()


@dataclass(frozen=True)
class Candidate:
    """What can be chosen, and its validation metrics.

    Attributes:
        lr: Learning rate.
        share: Share of the change by the training that is kept: 1 for the trained weights, 0 for
            those before the first step, which are a linear probe, and in between an interpolation
            (WiSE-FT, Wortsman et al. 2022, eq. 1).
        metrics: Mean validation metrics, by name.
        frozen_norm: Whether BatchNorms were frozen; None where that was not to be chosen.
    """

    lr: float
    share: float
    metrics: dict[str, float]
    frozen_norm: bool | None = None

    def as_dict(self) -> dict[str, float]:
        """What was chosen, for ``results.json``."""
        norm = {} if self.frozen_norm is None else {"frozen_norm": self.frozen_norm}
        return {"lr": self.lr, "tuned_share": self.share, **norm}


@dataclass(frozen=True)
class FittedModel(Generic[ModelT]):
    """A model that is ready to be used, and how it was made.

    Attributes:
        model: The model.
        chosen: What was chosen; without metrics where no image was left to choose by.
        candidates: All candidates, in the order in which they were tried.
        train_images: Number of images that the model is trained on.
        val_images: Number of images that the candidates were evaluated on.
        folds: Number of folds of the cross-validation; 1 for a validation part.
        refit: Whether the model was trained on training and validation images together.
        train_metrics: Metrics of the model on its training images.
        confidence: What the confidence of predictions is worth, by images that models of these
            settings were not trained on; None without such images.
        monitor: Validation metric that the candidates were compared by.
        added: Number of pseudo-labelled images that the model is also trained on.
    """

    model: ModelT
    chosen: Candidate
    candidates: list[Candidate]
    train_images: int
    val_images: int
    folds: int
    refit: bool
    train_metrics: dict[str, float]
    confidence: Confidence | None
    monitor: str
    added: int = 0

    def describe(self) -> str:
        """What was chosen by which labels, and which labels the model is trained on."""
        trained = f"trained on {self.train_images:,} images"
        if self.added:
            trained += f" and {self.added:,} pseudo-labelled ones"
        if not self.candidates:
            return f"The model is {trained}; no images were left to choose anything by."
        by = f"the {self.monitor} of {self.val_images:,} validation images"
        if self.folds > 1:
            by = (
                f"the {self.monitor} in {self.folds}-fold cross-validation of "
                f"{self.val_images:,} images"
            )
        what = {1.0: "the trained weights", 0.0: "the linear probe, without the training"}.get(
            self.chosen.share, f"{self.chosen.share:.0%} of the way from the probe to the training"
        )
        values = ", ".join(f"{name} {value:.3f}" for name, value in self.chosen.metrics.items())
        included = ", those included" if self.refit else ""
        norms = {None: "", True: "BatchNorm frozen, ", False: "BatchNorm trained, "}
        return (
            f"By {by}: learning rate {self.chosen.lr:g}, {norms[self.chosen.frozen_norm]}{what} "
            f"({values}). The model is {trained}{included}."
        )

    def as_dict(self) -> dict[str, Any]:
        """Content for ``results.json``."""
        return {
            "chosen": self.chosen.as_dict(),
            "val": self.chosen.metrics,
            "train": self.train_metrics,
            "monitor": self.monitor,
            "candidates": [{**one.as_dict(), **one.metrics} for one in self.candidates],
            "train_images": self.train_images,
            "val_images": self.val_images,
            "folds": self.folds,
            "refit": self.refit,
        }


@dataclass(frozen=True)
class _Trained(Generic[ModelT]):
    """A trained model, with its weights before the first step if they are a candidate."""

    model: ModelT
    start: dict[str, Tensor] | None
    end: dict[str, Tensor]

    def use(self, share: float) -> None:
        """Give the model a share of the change by the training."""
        if self.start is not None:
            weights = {
                name: tensor.lerp(self.end[name], share) if tensor.is_floating_point() else tensor
                for name, tensor in self.start.items()
            }
            self.model.load_state_dict(weights)


class _Fitting(Generic[DatasetT, ModelT, SettingsT, ScoresT]):
    """Trainings of one model with the same labels; see ``fit_model``."""

    def __init__(
        self,
        task: Task[DatasetT, ModelT, SettingsT, ScoresT],
        encoder: Encoder,
        hardware: Hardware | None,
        monitor: str,
        added: DatasetT | None,
    ) -> None:
        self.task, self.encoder = task, encoder
        self.hardware, self.monitor, self.added = hardware, monitor, added
        self.groups: list[frozenset[str]] = []  # of the added images, if there are any groups
        if added is not None and added.reading.groups:
            self.groups = groups_of_others(added.paths("train"), added.reading)
        self.candidates: list[Candidate] = []
        self.diverged: DivergedError | None = None  # the last of them
        self.best: Candidate | None = None
        self.settings: SettingsT | None = None  # of the best candidate, but for the rate
        self.model: _Trained[ModelT] | None = None  # of the first round, with the best rate
        self.held_out: list[HeldOut] = []  # of the best candidate in each round, if there are many

    def train(
        self, settings: SettingsT, data: DatasetT, rate: float, files: TrainingFiles
    ) -> _Trained[ModelT]:
        """Train a model on the training part and the added images.

        Those of the groups that are held out, as each is in one fold, are left out.
        """
        if self.added is not None:
            held_out = data.groups("val") if self.groups else None
            names = set() if held_out is None else set(held_out.tolist())
            kept = [i for i, groups in enumerate(self.groups) if names.isdisjoint(groups)]
            data = data.with_train(self.added.take({"train": kept}) if names else self.added)
        # A fold may have fewer images than a batch; it stays a multiple of the devices.
        processes = 1 if self.hardware is None else self.hardware.processes()
        most = max(processes, len(data.train) // processes * processes)
        size = settings.batch_size
        settings = replace(
            settings,
            optimizer=replace(settings.optimizer, lr=rate),
            batch_size=size and min(size, most),
        )
        model = self.task.build(self.encoder, data, settings)
        fitted = self.task.starts_fitted(model, data, settings)
        start = deepcopy(model.state_dict()) if fitted else None
        self.task.train(model, data, settings, self.hardware, files)
        return _Trained(model, start, deepcopy(model.state_dict()) if fitted else {})

    def evaluate(
        self,
        settings: SettingsT,
        rate: float,
        rounds: Sequence[DatasetT],
        files: Sequence[TrainingFiles],
        norm: bool | None,
    ) -> tuple[float, ...]:
        """Train in each round and add the candidates with these settings and learning rate.

        Returns:
            Rank of the best of them; larger is better.

        Raises:
            DivergedError: A training has diverged; no candidate is added.
        """
        found: dict[float, list[tuple[dict[str, float], int]]] = {}  # metrics and images of rounds
        held_out: dict[float, list[HeldOut]] = {}
        first: _Trained[ModelT] | None = None
        for data, some in zip(rounds, files, strict=True):
            trained = self.train(settings, data, rate, some)
            first = first or trained
            for share in (1.0,) if trained.start is None else SHARES:
                trained.use(share)
                metrics = self.task.validate(trained.model, data)
                found.setdefault(share, []).append((metrics, len(data.val)))
                if len(rounds) > 1:  # the models of the other folds are not kept
                    predicted = self.task.held_out(trained.model, data)
                    held_out.setdefault(share, []).extend([predicted] if predicted else [])
            trained.use(1.0)
        # Where a round has no fitted probe, shares but the whole were not evaluated on all images.
        added = of_main_process(
            [
                Candidate(rate, share, mean_metrics(parts), norm)
                for share, parts in found.items()
                if len(parts) == len(rounds)
            ]
        )
        self.candidates += added
        best = max(added, key=self.rank)
        if self.best is None or self.rank(best) > self.rank(self.best):
            self.best, self.model, self.settings = best, first, settings
            self.held_out = held_out.get(best.share, [])
        return self.rank(best)

    def give_up(self, rate: float, error: DivergedError) -> tuple[float, ...]:
        """Say that a training has diverged, and rank its learning rate below all others."""
        self.diverged = error
        log.warning(
            "The learning rate %(lr)g can't be chosen: the training with it has diverged",
            {"lr": rate, "why": str(error)},
            extra={"code": "candidate.diverged"},
        )
        return (-math.inf,)

    def rank(self, candidate: Candidate) -> tuple[float, ...]:
        """See ``rank_metrics``."""
        return rank_metrics(candidate.metrics, self.monitor)

    def confidence(self, model: ModelT, data: DatasetT) -> Confidence | None:
        """The confidence of the best candidate.

        Args:
            model: Its model of the first round.
            data: Data of the first round.
        """
        held_out = self.held_out
        if not held_out:
            predicted = self.task.held_out(model, data)
            held_out = [predicted] if predicted is not None else []
        return self.task.confidence(HeldOut.joined(held_out)) if held_out else None


def rank_metrics(metrics: Mapping[str, float], monitor: str) -> tuple[float, ...]:
    """By the monitored metric, then by the others; larger is better."""
    return tuple(_rank(name, metrics.get(name, math.nan)) for name in (monitor, *metrics))


def _rank(name: str, value: float) -> float:
    """A metric, of which larger is better; not a number is worst, as of a diverged training."""
    if math.isnan(value):
        return -math.inf
    return -value if is_loss(name) else value


def is_loss(name: str) -> bool:
    """Whether smaller values of a metric are better."""
    return name.endswith("loss")


def fit_model(
    task: Task[DatasetT, ModelT, SettingsT, ScoresT],
    encoder: Encoder,
    data: DatasetT,
    settings: SettingsT,
    rates: Sequence[float] = (),
    hardware: Hardware | None = None,
    files: FitFiles = NO_FIT_FILES,
    added: DatasetT | None = None,
) -> FittedModel[ModelT]:
    """Fine-tune a copy of an encoder: choose hyperparameters, then train on all labels.

    Args:
        task: Task to fine-tune for.
        encoder: Encoder to start from; it is left as it is.
        data: Labelled images; the test part is not used.
        settings: Settings of the trainings; ``seconds`` is divided between them.
        rates: Candidate learning rates, ascending; default the one of the settings. Other settings
            that are to be chosen (``Task.variants``) are chosen with the middle one.
        hardware: Hardware to train on; default one device.
        files: Files for metrics and checkpoints.
        added: Data set whose training part, such as of pseudo-labels, every model is also trained
            on. Nothing is chosen by it.

    Raises:
        UserError: Settings do not suit the data, or the training diverges, of several all.
    """
    rates = list(rates) or [settings.optimizer.lr]
    refit = data.refits(settings.refit) and len(data.val) > 0
    rounds = [data]
    if refit and len(data.val) < FEW_VALIDATION_IMAGES and (len(rates) > 1 or settings.pretrained):
        rounds = data.folds(FOLDS, settings.seed)
    middle = rates[len(rates) // 2]
    variants = task.variants(encoder, data, settings) if len(data.val) else [settings]
    tried = len(rates) + len(variants) - 1
    if settings.seconds is not None:
        trainings = len(rounds) * (most_climbed(len(rates)) + len(variants) - 1)
        each = settings.seconds / (trainings + refit if len(data.val) else 1)
        variants = [replace(one, seconds=each) for one in variants]
    fitting = _Fitting(task, encoder, hardware, monitor_of(task, data, settings.monitor), added)

    @cache
    def score(rate: float, number: int) -> tuple[float, ...]:
        variant = variants[number]
        norm = variant.frozen_norm if len(variants) > 1 else None
        name = _name(rate, norm)
        stages = []
        for turn in range(len(rounds)):
            metrics = METRICS if tried == 1 else f"{name}.csv"
            folder = f"{name}-{turn + 1}" if refit or tried > 1 else ""
            stages.append(files.of_training(metrics if turn == 0 else "", folder))
        try:
            return fitting.evaluate(variant, rate, rounds, stages, norm)
        except DivergedError as error:
            return fitting.give_up(rate, error)

    if len(data.val):
        best = max(range(len(variants)), key=lambda number: score(middle, number))
        climb(lambda rate: score(rate, best), rates)
        if fitting.best is None and fitting.diverged is not None:
            raise fitting.diverged
    chosen = fitting.best or Candidate(middle, 1.0, {})
    files.use_curve(f"{_name(chosen.lr, chosen.frozen_norm)}.csv")
    trained, everything, confidence = fitting.model, data, None
    if trained is not None:
        trained.use(chosen.share)
        task.calibrate(trained.model, rounds[0])
        confidence = fitting.confidence(trained.model, rounds[0])
    if trained is None or refit:
        everything = data.merged() if refit else data
        stage = files.of_training("refit.csv" if refit else METRICS, "")
        final = fitting.train(fitting.settings or variants[0], everything, chosen.lr, stage)
        final.use(chosen.share)
        task.calibrate(final.model, everything, None if trained is None else trained.model)
        trained = final
    return FittedModel(
        trained.model,
        chosen,
        fitting.candidates,
        len(everything.train),
        sum(len(one.val) for one in rounds),
        len(rounds),
        refit,
        task.validate(trained.model, everything, "train"),
        confidence,
        fitting.monitor,
        0 if added is None else len(added.train),
    )


def _name(rate: float, frozen_norm: bool | None) -> str:
    """Name of the files of a training by which something is chosen."""
    norms = {None: "", True: "-frozen_norm", False: "-trained_norm"}
    return f"lr-{rate:g}{norms[frozen_norm]}"


def mean_metrics(parts: Sequence[tuple[Mapping[str, float], int]]) -> dict[str, float]:
    """Means of metrics over the images of several parts.

    Args:
        parts: Metrics and number of images of each. A metric that a part lacks, such as the average
            precision of classes of which it has no image, is the mean over the others.
    """
    sums: dict[str, float] = defaultdict(float)
    images: dict[str, int] = defaultdict(int)
    for metrics, count in parts:
        for name, value in metrics.items():
            sums[name] += value * count
            images[name] += count
    return {name: total / images[name] for name, total in sums.items()}


def most_climbed(count: int) -> int:
    """Number of rates that ``climb`` scores at most: the middle, its neighbors, and a side."""
    return 1 + min(count - 1, 2) + max(0, count // 2 - 1)


def climb(score: Callable[[float], tuple[float, ...]], rates: Sequence[float]) -> None:
    """Score learning rates from the middle one upwards or downwards, until none is better.

    Args:
        score: Function from a learning rate to its rank; called once for a rate.
        rates: Candidates, ascending.
    """
    ranks: dict[int, tuple[float, ...]] = {}

    def rank(index: int) -> tuple[float, ...]:
        if index not in ranks:
            ranks[index] = score(rates[index])
        return ranks[index]

    at = len(rates) // 2
    while True:
        neighbors = [index for index in (at - 1, at + 1) if 0 <= index < len(rates)]
        best = max([at, *neighbors], key=rank)
        if best == at:
            return
        at = best


def monitor_of(
    task: Task[DatasetT, ModelT, SettingsT, ScoresT], data: DatasetT, monitor: str | None
) -> str:
    """The validation metric to choose by.

    Args:
        task: Task of the data.
        data: Labelled images.
        monitor: Name, with or without ``val_``; None for the main metric, or with fewer than
            1,000 validation images for the first loss, if the task has one: it differs between
            candidates also where few images do not tell their accuracies apart.

    Raises:
        UserError: The task has no such metric.
    """
    names = task.metric_names(data)
    if monitor is None:
        many = len(data.val) >= MANY_VALIDATION_IMAGES
        return names[0] if many else next(filter(is_loss, names), names[0])
    name = monitor.lower().removeprefix("val_")
    if name not in names:
        raise UserError(f"--monitor {monitor}: {did_you_mean(name, names)}")
    return name
