"""Evaluation of an encoder while it trains: metrics with and without labels, collapse."""

import logging
import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from vissl_lite.data.stream import Batch, ViewDataset, collate
from vissl_lite.data.views import Views, crop_decode_size, distorted_crop
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import MachineError, UserError
from vissl_lite.evaluation.features import extract
from vissl_lite.evaluation.measures import alignment, effective_rank, feature_std, uniformity
from vissl_lite.evaluation.probe import LabelledFeatures, evaluate_features
from vissl_lite.inference import inference_mode
from vissl_lite.training.open_schedule import OpenSchedule
from vissl_lite.training.schedule import Schedule
from vissl_lite.training.stream import StreamData
from vissl_lite.transfer.classification.data import LabelledImages, Part
from vissl_lite.transfer.sources.groups import group_names

log = logging.getLogger(__name__)

# Share of the training time that all evaluations together may take, and the number of evaluations
# that it has to suffice for; the first one may cost twice, see ``OnlineEvaluation._first``.
TIME_SHARE, PLANNED_EVALUATIONS = 0.02, 8

# The same for a run of open length, of its limit, which it may end long before.
OPEN_TIME_SHARE, OPEN_PLANNED_EVALUATIONS = 0.05, 200

# Evaluations between the first and the last at most: more make no better curve.
MAX_EVALUATIONS = 100

# Labelled images of each class to fit the probes to, at least.
MIN_PER_CLASS = 5

# Images whose views are made and passed through the encoder together: few, to save memory.
VIEWS_BATCH_SIZE = 32

# Smallest share of an image's area in the two views that alignment compares: the default of SimCLR.
MIN_CROP_SCALE = 0.2

# Below these values the features hardly distinguish images. An untrained ResNet-18 has a deviation
# of about 0.2 and a rank in the tens; a collapsed one has a deviation of 0.
COLLAPSED_STD, COLLAPSED_RANK = 0.02, 1.05

# Metrics of an evaluation; the last two require labels.
ONLINE_METRICS = ("feature_std", "effective_rank", "alignment", "uniformity", "knn", "linear")


def open_measures(labelled: bool) -> tuple[str, ...]:
    """Names of the measures that end a run of open length.

    Without labels there are two, as neither tells alone: RankMe (Garrido et al. 2023, arXiv
    2210.02885), and the sum that contrastive losses lower (Wang & Isola 2020, arXiv 2005.10242).

    Args:
        labelled: Whether there are labelled images.
    """
    return ("knn",) if labelled else ("effective_rank", "-(alignment + uniformity)")


def open_scores(metrics: dict[str, float]) -> dict[str, float]:
    """Values of ``open_measures``, of which higher ones are better.

    Args:
        metrics: Metrics of an evaluation.
    """
    if "knn" in metrics:
        return {"knn": metrics["knn"]}
    rank, total = metrics["effective_rank"], metrics["alignment"] + metrics["uniformity"]
    return dict(zip(open_measures(labelled=False), (rank, -total), strict=True))


class ImageCounts(NamedTuple):
    """Number of images in an evaluation.

    Attributes:
        unlabelled: Training images, for the metrics without labels.
        train: Labelled images that the probes are fitted to.
        val: Labelled images that the probes are scored on.
    """

    unlabelled: int
    train: int
    val: int

    def at_most(self, others: "ImageCounts") -> "ImageCounts":
        """The element-wise minimum."""
        return ImageCounts(*map(min, self, others))


# Fewer would show noise instead of a trend.
MIN_IMAGES, MAX_IMAGES = ImageCounts(64, 200, 100), ImageCounts(256, 5000, 1000)

# Images that suffice where metrics neither compare labels nor end the run: they show a collapse.
# The first step waits for the evaluation before it, which uses more only within these seconds.
QUICK_IMAGES, QUICK_SECONDS = 32, 3.0

# Blank images of the pass that is not timed, as the first one is slow.
WARM_UP_IMAGES = 8


class EncoderMetrics:
    """Compute the metrics of an encoder, always on the same images and views.

    Alignment is that of two crops as SimCLR makes them, whatever the pretext, so that it can be
    compared across pretexts.

    Args:
        paths: Training images.
        labelled: Probes are fitted to its training images and scored on its validation images; its
            test images are not used.
        seed: Chooses the images and views.
        upright: Whether the images have an up.

    Attributes:
        fewest: Images that an evaluation should use at least.
        most: Images that there are, up to ``MAX_IMAGES``.
        seconds_per_image: How long the encoder took for an image at the last call.
    """

    def __init__(
        self, paths: Sequence[str], labelled: LabelledImages | None, seed: int, upright: bool
    ) -> None:
        random = np.random.default_rng(seed)
        chosen = random.permutation(len(paths))[: MAX_IMAGES.unlabelled]
        self._unlabelled = Part([paths[i] for i in chosen], np.zeros(len(chosen), np.int64))
        self._train = self._val = Part([], np.empty(0, np.int64))
        fewest = MIN_IMAGES
        if labelled is not None:
            self._train = _sample(labelled.train, MAX_IMAGES.train, random)
            self._val = _sample(labelled.val, MAX_IMAGES.val, random)
            of_classes = MIN_PER_CLASS * len(labelled.classes)
            fewest = fewest._replace(train=max(fewest.train, of_classes))
        self.most = ImageCounts(len(self._unlabelled), len(self._train), len(self._val))
        self.fewest = fewest.at_most(self.most)
        self._groups = {} if labelled is None else labelled.reading.groups
        self._seed, self._upright = seed, upright
        self.seconds_per_image = 0.0

    def __call__(self, encoder: Encoder, counts: ImageCounts) -> dict[str, float]:
        """``ONLINE_METRICS`` of an encoder, by name.

        Args:
            encoder: Encoder, which is left as it is.
            counts: Images to use. Those that can't be read are left out, for later calls too.

        Raises:
            UserError: None of the images can be read.
        """
        metrics = self.spread(encoder, counts.unlabelled)
        one, other = self.embed_views(encoder, counts.unlabelled)
        metrics["alignment"] = alignment(one, other)
        if len(self._val):
            metrics |= self._accuracies(encoder, counts)
        return {name: metrics[name] for name in ONLINE_METRICS if name in metrics}

    def warm_up(self, encoder: Encoder) -> None:
        """Pass ``WARM_UP_IMAGES`` blank images through an encoder, which is left as it is."""
        shape = (WARM_UP_IMAGES, encoder.reader.channels, encoder.image_size, encoder.image_size)
        blank = torch.zeros(shape, dtype=torch.uint8)
        with inference_mode(encoder) as device:
            encoder(encoder.normalize(blank.to(device, memory_format=torch.channels_last)))

    def spread(self, encoder: Encoder, count: int) -> dict[str, float]:
        """``feature_std``, ``effective_rank`` and ``uniformity`` of unlabelled images.

        Args:
            encoder: Encoder, which is left as it is.
            count: Number of images.
        """
        features, self._unlabelled = _extract(encoder, self._unlabelled, count)
        return {
            "feature_std": feature_std(features),
            "effective_rank": effective_rank(features),
            "uniformity": uniformity(features),
        }

    def embed_views(self, encoder: Encoder, count: int) -> list[np.ndarray]:
        """Features of two views of each unlabelled image, ``(N, D)`` each; always the same views.

        Args:
            encoder: Encoder, which is left as it is.
            count: Number of images N.
        """
        paths = self._unlabelled.paths[:count]
        size = encoder.image_size
        crop = distorted_crop(size, MIN_CROP_SCALE, upright=self._upright)
        views = Views([crop, crop], crop_decode_size(size, MIN_CROP_SCALE))
        images = ViewDataset(paths, views, self._seed, reader=encoder.reader)
        features: list[list[Tensor]] = [[], []]
        seconds = 0.0
        with inference_mode(encoder) as device:
            for start in range(0, len(paths), VIEWS_BATCH_SIZE):
                some = range(start, min(start + VIEWS_BATCH_SIZE, len(paths)))
                batch = collate([images[0, index] for index in some]).views
                started = time.monotonic()
                for view, found in zip(batch, features, strict=True):
                    view = view.to(device, memory_format=torch.channels_last)
                    found.append(encoder(encoder.normalize(view)).float().cpu())
                seconds += time.monotonic() - started
        self.seconds_per_image = seconds / (2 * len(paths))
        return [torch.cat(parts).numpy() for parts in features]

    def _accuracies(self, encoder: Encoder, counts: ImageCounts) -> dict[str, float]:
        """Accuracies of kNN and a linear probe on validation images."""
        x_train, self._train = _extract(encoder, self._train, counts.train)
        x_val, self._val = _extract(encoder, self._val, counts.val)
        groups = group_names(self._train.paths[: len(x_train)], self._groups)
        train = LabelledFeatures({"last": x_train}, self._train.labels[: len(x_train)], groups)
        val = LabelledFeatures({"last": x_val}, self._val.labels[: len(x_val)])
        accuracies = {"knn": evaluate_features("knn", train, val).accuracy}
        # a fit to features that are not finite, or to one class, would fail
        finite = np.isfinite(x_train).all() and np.isfinite(x_val).all()
        if finite and len(np.unique(train.labels)) > 1:
            accuracies["linear"] = evaluate_features("linear", train, val).accuracy
        return accuracies


class OnlineEvaluation(Callback):
    """Log metrics of the encoder during training, in about 2 % of the training time.

    Evaluates before the first step, at the end, and in between as often as its share of the time
    allows. Where an evaluation would cost too much of it, it uses fewer images. A run of open
    length is evaluated when its ``OpenSchedule`` asks for it, in at most about 5 % of the time.

    Args:
        compute: Computes the metrics.
        data: Training stream.
        schedule: Schedule of the run.
        stop_on_collapse: End the run at the first evaluation after the warm-up that shows a
            collapse.

    Attributes:
        metrics: Values of the last evaluation, by name.
        counts: Images in an evaluation; None before the first one.
        collapsed: Whether they showed a collapse.
        stopped: Whether that ended the run.
        seconds: Duration of all evaluations so far.
    """

    def __init__(
        self,
        compute: EncoderMetrics,
        data: StreamData,
        schedule: Schedule,
        stop_on_collapse: bool = False,
    ) -> None:
        self._compute, self._data, self._schedule = compute, data, schedule
        self._open = schedule if isinstance(schedule, OpenSchedule) else None
        self._stop_on_collapse = stop_on_collapse
        self.metrics: dict[str, float] = {}
        self.collapsed = self.stopped = False
        self.counts: ImageCounts | None = None
        self._at: int | None = None  # batches before the last evaluation in this process
        self._fraction = 0.0  # share of the run before the last evaluation
        self.seconds = 0.0
        self._first_cost = self._cost = 0.0  # seconds of the first evaluation, of one like the last

    @property
    def share(self) -> float:
        """Fraction of the training time spent on evaluations so far."""
        return self.seconds / max(self._schedule.elapsed(), 1e-9)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self._schedule.batches == 0:
            self.evaluate(trainer, module)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        # after whole optimizer steps only: the run may end here, and would lose gradients
        steps = max(1, self._data.batches_per_epoch // 20 // self._schedule.accumulate)
        between = self._schedule.batches % (steps * self._schedule.accumulate)
        if between or trainer.should_stop or self._schedule.batches == self._schedule.total:
            return
        if not trainer.strategy.broadcast(self._is_due()):
            return
        self.evaluate(trainer, module)
        if (
            self._stop_on_collapse
            and self.collapsed
            and self._schedule.fraction >= self._schedule.warmup_end
        ):
            log.warning(
                "The run ends here, as --on_collapse stop asks for.",
                extra={"code": "training.ended"},
            )
            self.stopped = trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.finish(trainer, module)
        log.info("Online evaluation took %.1f %% of the time.", 100 * self.share)

    def finish(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Evaluate the encoder unless it has been evaluated since the last step."""
        if self._at != self._schedule.batches:
            self.evaluate(trainer, module)

    def _is_due(self) -> bool:
        """Whether enough of the time that the first and last evaluation leave has accumulated."""
        if self._open is not None:
            return self._open.evaluation_due
        if self._schedule.fraction < self._fraction + 1 / MAX_EVALUATIONS:
            return False
        total = self._schedule.seconds or self._schedule.elapsed() / self._schedule.fraction
        between = TIME_SHARE * total - self._first_cost - self._cost
        return self.seconds - self._first_cost + self._cost <= between * self._schedule.fraction

    def evaluate(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Compute and log the metrics now. All processes have to call it; the main one computes.

        Args:
            trainer: Trainer of the run, with its loggers.
            module: Pretext task.

        Raises:
            UserError: At the first evaluation, none of the images can be read.
        """
        started = time.monotonic()
        first = self.counts is None
        self._at, self._fraction = self._schedule.batches, self._schedule.fraction
        scores: dict[str, float] | None = None
        whole: Any = module.unsharded()  # type: ignore[operator]
        if trainer.is_global_zero:
            encoder: Encoder = whole.trained_encoder()
            try:
                if self.counts is None:
                    self._first(encoder)
                else:
                    self.metrics = self._compute(encoder, self.counts)
                for logger in trainer.loggers:
                    logger.log_metrics(self.metrics, step=max(0, self._schedule.steps - 1))
                self._check_collapse()
                if self._open is not None:
                    scores = open_scores(self.metrics)
            except UserError as error:  # the images have gone: what was learned is still there
                self.metrics = {}  # the last ones are of an earlier encoder
                if first or isinstance(error, MachineError):
                    raise
                log.warning(
                    "The encoder can't be evaluated: %(why)s",
                    {"why": error},
                    extra={"code": "evaluation.failed"},
                )
        seconds = time.monotonic() - started
        self.seconds += seconds
        if first:
            self._first_cost = seconds
        else:
            self._cost = seconds
        self.counts, self.collapsed, self._cost = trainer.strategy.broadcast(
            (self.counts, self.collapsed, self._cost)
        )
        self._schedule.reserve = self._cost  # the last evaluation is part of a time budget too
        if self._open is not None:
            scores, self._open.min_spacing = trainer.strategy.broadcast(
                (scores, self._open.min_spacing)
            )
            self._open.evaluated(scores)

    def _first(self, encoder: Encoder) -> None:
        """Evaluate with the fewest images, then with as many as the time allows."""
        fewest, most_seconds = self._compute.fewest, math.inf
        if self._open is None and not fewest.val:
            fewest = fewest._replace(unlabelled=min(fewest.unlabelled, QUICK_IMAGES))
            most_seconds = QUICK_SECONDS
        self._compute.warm_up(encoder)
        self._timed(encoder, fewest)
        total = self._schedule.seconds
        # No step has been timed: one costs three passes through the encoder at least.
        step = 3 * self._compute.seconds_per_image * self._data.batch_size
        if total is None:
            assert self._schedule.total is not None
            total = step * self._schedule.total
        share, planned = TIME_SHARE, PLANNED_EVALUATIONS
        if self._open is not None:
            share, planned = OPEN_TIME_SHARE, OPEN_PLANNED_EVALUATIONS
        factor = share * total / planned / self._cost
        affordable = min(factor, most_seconds / self._cost - 1)
        if affordable > 1:
            more = ImageCounts(*(int(affordable * count) for count in fewest))
            # a power of two, so that runs use the same number and can be compared
            unlabelled = max(fewest.unlabelled, 1 << (more.unlabelled.bit_length() - 1))
            more = more._replace(unlabelled=unlabelled).at_most(self._compute.most)
            if more != fewest:
                self._timed(encoder, more)
        assert self.counts is not None
        unlabelled, train, val = self.counts
        labels = f", {train} labelled to fit to, {val} to score" if val else ""
        log.info("Evaluating the encoder takes %.2f s: %d images%s", self._cost, unlabelled, labels)
        if factor < 1:
            log.info(
                "The run is short: evaluations are rare and use few images, to take about %.0f %% "
                "of the time.",
                100 * share,
            )
        if self._open is not None:
            self._open.min_spacing = math.ceil(self._cost / max(share * step, 1e-9))

    def _timed(self, encoder: Encoder, counts: ImageCounts) -> None:
        started = time.monotonic()
        self.counts, self.metrics = counts, self._compute(encoder, counts)
        self._cost = time.monotonic() - started

    def _check_collapse(self) -> None:
        std, rank = self.metrics["feature_std"], self.metrics["effective_rank"]
        diverged = not np.isfinite(std)
        bad = bool(self._at) and (diverged or std < COLLAPSED_STD or rank < COLLAPSED_RANK)
        if bad and not self.collapsed and diverged:
            log.warning(
                "The training has diverged: the features are no longer finite numbers. Try a lower "
                "--lr or a longer --warmup.",
                extra={"code": "features.diverged"},
            )
        elif bad and not self.collapsed:
            log.warning(
                "The encoder has collapsed: it gives nearly the same features for all images "
                "(feature_std %(feature_std).3f, effective_rank %(effective_rank).1f). Try a lower "
                "--lr, a longer --warmup, a larger --batch_size, or another pretext.",
                {"feature_std": std, "effective_rank": rank},
                extra={"code": "features.collapsed"},
            )
        self.collapsed = bad

    def state_dict(self) -> dict[str, Any]:
        return {
            "counts": list(self.counts or ()),
            "seconds": [self.seconds, self._first_cost, self._cost],
            "collapsed": self.collapsed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        counts = state_dict["counts"]
        self.counts = ImageCounts(*counts) if counts else None
        self.seconds, self._first_cost, self._cost = state_dict["seconds"]
        self.collapsed = state_dict["collapsed"]
        ended_early = self._schedule.ended and self._schedule.batches != self._schedule.total
        self.stopped = self._stop_on_collapse and self.collapsed and ended_early
        self._schedule.reserve = self._cost


def _sample(part: Part, most: int, random: np.random.Generator) -> Part:
    """Images of a part in random order, so that its first ones are a fair sample too."""
    order = random.permutation(len(part))[:most]
    return Part([part.paths[i] for i in order], part.labels[order])


def _extract(encoder: Encoder, part: Part, count: int) -> tuple[np.ndarray, Part]:
    """Features of the first images of a part, and the part without those that can't be read."""
    features, good = extract(encoder, part.paths[:count])
    kept = np.ones(len(part), bool)
    kept[: len(good)] = good
    return features["last"], part.take(np.flatnonzero(kept))
