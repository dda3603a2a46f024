"""``vissl-lite pretrain``: train an encoder on unlabelled images."""

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from vissl_lite import __version__
from vissl_lite.commands.pretrain_data import TrainingImages, find_training_images
from vissl_lite.commands.pretrain_options import PretrainOptions, make_encoder, parse_time
from vissl_lite.data.cache import CachePlan, forks_workers, plan_cache
from vissl_lite.data.fingerprints import Fingerprints
from vissl_lite.data.path_list import PathList
from vissl_lite.data.reading import limit_pixels
from vissl_lite.data.views import Views
from vissl_lite.encoders.folder import save_encoder
from vissl_lite.errors import UserError
from vissl_lite.evaluation.online import ONLINE_METRICS, EncoderMetrics, OnlineEvaluation
from vissl_lite.leakage.callback import FingerprintCallback
from vissl_lite.leakage.matching import seen_by
from vissl_lite.metrics_file import MetricsFile
from vissl_lite.options import StrPath, command
from vissl_lite.plots import plot_curves
from vissl_lite.pretext.base import PretextInfo, PretextTask
from vissl_lite.report.additions import add_embeddings, add_pretext, add_report
from vissl_lite.run import (
    CHECKPOINTS,
    METRICS,
    beside,
    check_out,
    is_finished,
    is_main_process,
    logged_warnings,
    open_run,
    read_config,
    read_results,
    write_results,
)
from vissl_lite.training.fit import TrainingFiles, fit
from vissl_lite.training.hardware import Hardware
from vissl_lite.training.loggers import logger_names, make_loggers
from vissl_lite.training.resizing import ProgressiveResizing
from vissl_lite.training.schedule import Schedule
from vissl_lite.training.stream import StreamData
from vissl_lite.transfer.classification.data import LabelledImages, load_labelled

log = logging.getLogger(__name__)

CURVES = (
    "loss",
    "accuracy",
    "knn",
    "linear",
    "feature_std",
    "effective_rank",
    "alignment",
    "uniformity",
    "lr",
    "view_size",
    "images_per_second",
    "data_wait",
)


@dataclass(frozen=True)
class PretrainResult:
    """What pre-training made.

    Attributes:
        run: the folder that was written.
        encoder: the encoder folder in it.
        metrics: the last values of ``loss``, ``feature_std``, ``effective_rank``,
            ``alignment``, ``uniformity``, and ``knn`` and ``linear`` where there were labels.
        steps: optimizer steps.
        seconds: of training.
    """

    run: Path
    encoder: Path
    metrics: dict[str, float]
    steps: int
    seconds: float

    def __fspath__(self) -> str:
        return str(self.run)


@dataclass(frozen=True)
class _Training:
    """What a run trains, on what and how: all that is made before anything is written.

    Attributes:
        options: With the backbone, image size and batch size that follow from the data.
        hardware: Where to compute.
        images: What it trains on.
        labelled: What the encoder is evaluated by while it trains.
        task: The pretext.
        views: What it trains on of each image.
        batch_size: Images that go through the network together.
        cache: Where decoded images are kept.
        seen: Fingerprints of what the starting point was trained on.
    """

    options: PretrainOptions
    hardware: Hardware
    images: TrainingImages
    labelled: LabelledImages | None
    task: PretextTask
    views: Views
    batch_size: int
    cache: CachePlan | None
    seen: Fingerprints | None


@command(PretrainOptions)
def pretrain(options: PretrainOptions) -> PretrainResult:
    """Train an encoder on unlabelled images.

    Returns:
        Paths and last metrics.

    Raises:
        UserError: An option cannot be right, and nothing is written then; or the loss is no longer
            a number.
    """
    started = time.monotonic()
    out = Path(options.out)
    inputs = [(name, getattr(options, name)) for name in ("data", "init", "probe_data")]
    # a job's script may always ask to resume
    resume = check_out(out, inputs, options.resume, options.overwrite, "pretrain")
    if resume:
        options = options.resumed(read_config(out))
        if is_finished(out):
            return _finished(out)
    training = _prepare(options, resume)
    with open_run(out, "pretrain", training.options.as_config(), resume) as run:
        return _train(training, run, resume, started)


def _prepare(options: PretrainOptions, resume: bool) -> _Training:
    """Read the data and build the network; a UserError where these do not fit together."""
    limit_pixels(options.max_pixels)
    hardware = Hardware(
        options.precision,
        options.devices,
        options.num_nodes,
        options.strategy,
        options.num_workers,
        options.compile,
    )
    hardware.check()
    images = find_training_images(options, Path(options.out), resume)
    count = len(images)
    size = min(options.batch_size or 128, count)
    if options.batch_size is not None and options.batch_size > count:
        raise UserError(
            f"--batch_size {options.batch_size} is larger than the data set: {count} images"
        )
    if size < 2:
        raise UserError(f"{count} image can't train anything: two or more are needed")
    labelled = None
    if options.probe_data is not None:
        labelled = load_labelled(os.fspath(options.probe_data), options.seed, need_test=False)
    torch.manual_seed(options.seed)
    encoder = make_encoder(
        options.backbone, options.image_size, options.init, images.paths, options.pretext_name
    )
    task = options.task(encoder)
    views = task.views(options.upright)
    task.optimizer_settings = options.optimizer_settings(
        task, size * options.accumulate_grad_batches
    )
    cache = _cache_plan(options, images.paths, views, hardware) if options.cache else None
    init = os.fspath(options.init)
    seen = seen_by(init) if Path(init).is_dir() else None  # --overwrite may end it
    options = options.replace(
        backbone=encoder.backbone, image_size=encoder.image_size, batch_size=size
    )
    return _Training(options, hardware, images, labelled, task, views, size, cache, seen)


def _train(training: _Training, run: Path, resume: bool, started: float) -> PretrainResult:
    options, hardware, images = training.options, training.hardware, training.images
    task, labelled, size = training.task, training.labelled, training.batch_size
    count, views, accumulate = len(images), training.views, options.accumulate_grad_batches
    settings = task.optimizer_settings
    log.info(
        "%d images, %s on %s at %d pixels, batch %d, %s with %.2g",
        count,
        options.pretext_name,
        options.backbone,
        options.image_size,
        size,
        settings.name,
        settings.lr,
    )
    if accumulate > 1:
        log.info("%s", accumulation_note(task.info, size, accumulate))
    seconds = parse_time(options.max_time)
    epochs = options.epochs if options.epochs or seconds else 100
    batches = None if epochs is None else epochs * (count // size)
    pace = Schedule(
        settings.lr, options.warmup, options.seed, batches, seconds, started, accumulate
    )
    kept = None if training.cache is None else training.cache.open(run, maker=is_main_process())
    images.keep(run)
    paths = images.paths
    dataset = images.source(views, options.seed, kept)
    stream = StreamData(dataset, size, epochs, pace, hardware.workers())
    online = OnlineEvaluation(
        EncoderMetrics(paths, labelled, options.seed, options.upright),
        stream,
        pace,
        stop_on_collapse=options.on_collapse == "stop",
    )
    callbacks = [online, FingerprintCallback(run, stream, pace, training.seen)]
    if options.progressive_resizing:
        callbacks.append(ProgressiveResizing(pace, task.encoder))
    metrics = MetricsFile(run / METRICS) if is_main_process() else None
    trainer = fit(
        task,
        stream,
        pace,
        hardware,
        callbacks,
        TrainingFiles(metrics, run / CHECKPOINTS, resume),
        title=options.pretext_name,
        loggers=make_loggers(logger_names(options.logger), run),
        chance_loss=task.chance_loss(size),
    )
    if kept is not None and trainer.is_global_zero:
        kept.remove()
    online.finish(trainer, task)  # resumed after the last step: nothing was trained
    task = task.unsharded()
    encoder, spent = run / "encoder", pace.elapsed()
    if not trainer.is_global_zero:
        return PretrainResult(run, encoder, {}, pace.steps, spent)
    assert metrics is not None
    about = {
        "version": __version__,
        "pretext": options.pretext,
        "optimizer": vars(settings),
        "data": options.data,
        "images": count,
        "step": pace.steps,
        "seed": options.seed,
    }
    save_encoder(task.trained_encoder(), encoder, about)
    spent = pace.elapsed()
    plot_curves(metrics, CURVES, run / "curves.png")
    losses = metrics.series("loss")[1]
    last = {"loss": losses[-1]} if losses else {}
    result = PretrainResult(run, encoder, last | online.metrics, pace.steps, spent)
    results = {
        **result.metrics,
        "steps": result.steps,
        "epochs": pace.batches / stream.batches_per_epoch,
        "seconds": round(result.seconds, 1),
        "images": count,
        "evaluation_share": round(online.share, 4),
        "collapsed": online.collapsed,
        "stopped": "collapsed" if online.stopped else None,
        "warnings": logged_warnings(run),
    }
    write_results(run, results)
    _log_next_steps(result, options.probe_data)
    add_pretext(run, task, paths, views, options.seed)
    if labelled is None:
        add_embeddings(run, task.trained_encoder(), paths, seed=options.seed)
    else:
        part = labelled.val
        add_embeddings(run, task.trained_encoder(), part.paths, part.labels, labelled.classes)
    add_report(run)
    return result


def _cache_plan(
    options: PretrainOptions, paths: PathList, views: Views, hardware: Hardware
) -> CachePlan:
    """Where ``--cache`` keeps what; a UserError where it can't."""
    if hardware.num_nodes > 1:
        raise UserError(
            f"--cache is for one machine, not for --num_nodes {hardware.num_nodes}: leave it out"
        )
    shareable = hardware.one_process() and forks_workers(hardware.workers())
    return plan_cache(paths, views.shortest, Path(options.out), shareable)


def accumulation_note(info: PretextInfo, batch_size: int, accumulate: int) -> str:
    """What accumulating gradients does and does not.

    Args:
        info: the pretext.
        batch_size: images that go through the network together.
        accumulate: batches an optimizer step.
    """
    note = f"an optimizer step sees {accumulate} batches of {batch_size} images"
    if info.negatives:
        note += (
            f"; that adds no negatives: {info.name} compares an image with the {batch_size - 1} "
            f"others of its own batch only"
        )
    return note


def _finished(out: Path) -> PretrainResult:
    """The result of a run that had nothing left to resume."""
    results = read_results(out, "steps", "seconds")
    names = ("loss", *ONLINE_METRICS)
    metrics = {name: results[name] for name in names if name in results}
    return PretrainResult(out, out / "encoder", metrics, results["steps"], results["seconds"])


def _log_next_steps(result: PretrainResult, labelled: StrPath | None) -> None:
    log.info("The encoder is in %s. Load it with plain timm:", result.encoder)
    log.info('  timm.create_model("local-dir:%s", pretrained=True)', result.encoder)
    log.info("Next:")
    log.info(
        "  vissl-lite probe --encoder %s --data %s --out %s",
        result.run,
        labelled or "LABELLED",
        beside(result.run, "probe"),
    )
