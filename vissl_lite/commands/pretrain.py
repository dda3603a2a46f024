"""``vissl-lite pretrain``: train an encoder on unlabelled images."""

import logging
import os
import shlex
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import timm
import torch

from vissl_lite import __version__
from vissl_lite.commands.labelled import show_data
from vissl_lite.commands.leaks import trained_on
from vissl_lite.commands.pretrain_data import TrainingImages, find_training_images
from vissl_lite.commands.pretrain_options import PretrainOptions
from vissl_lite.commands.pretrain_setup import (
    PRETRAINED_LR_FACTOR,
    check_hardware,
    dropped_tokens,
    length_factor,
    long_run_defaults,
    make_encoder,
    make_task,
    optimizer_settings,
    run_length,
    short_run_defaults,
    uses_small_views,
)
from vissl_lite.data.cache import CachePlan, forks_workers, plan_cache
from vissl_lite.data.fingerprints import Fingerprints
from vissl_lite.data.image_reader import ImageReader
from vissl_lite.data.image_survey import ImageSet
from vissl_lite.data.path_list import PathList
from vissl_lite.data.reading import limit_pixels
from vissl_lite.data.views import Views
from vissl_lite.encoders import backbones
from vissl_lite.encoders.encoder import open_residual_branches
from vissl_lite.encoders.folder import choose_slice_axis, save_encoder
from vissl_lite.encoders.lora import merge_adapters
from vissl_lite.errors import UserError
from vissl_lite.evaluation.adaptation_monitor import AdaptationMonitor
from vissl_lite.evaluation.embedding import MAP_IMAGES
from vissl_lite.evaluation.online import (
    ONLINE_METRICS,
    EncoderMetrics,
    OnlineEvaluation,
    open_measures,
)
from vissl_lite.leakage.callback import FingerprintCallback
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
    say_finished,
    write_results,
)
from vissl_lite.training.fit import TrainingFiles, fit
from vissl_lite.training.freezing import ALL_PARTS, FrozenParts, train_only
from vissl_lite.training.hardware import Hardware, check_batch_size
from vissl_lite.training.loggers import logger_names, make_loggers
from vissl_lite.training.open_schedule import OpenSchedule
from vissl_lite.training.progress import Forecast
from vissl_lite.training.resizing import (
    INITIAL_SIDE,
    SHARES,
    ProgressiveResizing,
    resolution_at,
    resolution_of,
)
from vissl_lite.training.schedule import Schedule
from vissl_lite.training.stream import StreamData
from vissl_lite.training.token_drop import TokenDrop, dropped_at
from vissl_lite.transfer.classification.data import LabelledImages, load_labelled

log = logging.getLogger(__name__)

# Share of the time of a run that its map of embeddings may take, where that is enough for these.
MAP_SHARE, MIN_MAP_IMAGES = 0.03, 100

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
    "token_drop",
    "images_per_second",
    "data_wait",
)


@dataclass(frozen=True)
class PretrainResult:
    """Result of pre-training.

    Attributes:
        run: Run folder.
        encoder: Encoder folder inside the run folder.
        metrics: Last values of ``loss``, ``feature_std``, ``effective_rank``, ``alignment``,
            ``uniformity``, and with labelled images of ``knn`` and ``linear``.
        steps: Number of optimizer steps.
        seconds: Duration of the training.
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
    """Everything a run needs, prepared before anything is written.

    Attributes:
        options: Options, with what they leave open filled in: backbone, sizes, hyperparameters,
            ``progressive_resizing``, ``token_drop``.
        hardware: Devices and precision.
        images: Training images.
        labelled: Labelled images for the online evaluation; None for none.
        task: Pretext task.
        views: Views of each image.
        batch_size: Number of images per batch, over all devices.
        cache: Plan of the cache of decoded images; None without a cache.
        fingerprints: Fingerprints of the images that the initial weights, or a teacher, were
            trained on; None if they are unknown.
        short_run: Hyperparameters that differ from their defaults because the run is short.
        long_run: Those that do because it is long.
    """

    options: PretrainOptions
    hardware: Hardware
    images: TrainingImages
    labelled: LabelledImages | None
    task: PretextTask
    views: Views
    batch_size: int
    cache: CachePlan | None
    fingerprints: Fingerprints | None
    short_run: dict[str, float]
    long_run: dict[str, float]


@command(PretrainOptions)
def pretrain(options: PretrainOptions) -> PretrainResult:
    """Train an encoder on unlabelled images.

    Returns:
        Paths and final metrics.

    Raises:
        UserError: An option is invalid (nothing is written then), or the loss is not finite.
    """
    started = time.monotonic()
    out = Path(options.out)
    inputs = [(name, getattr(options, name)) for name in ("data", "probe_data")]
    inputs += options.sources.items()
    # A job script may pass --resume every time, also for a finished run.
    resume = check_out(out, inputs, options.resume, options.overwrite, "pretrain")
    if resume:
        options = options.resumed(read_config(out))
        if is_finished(out):
            say_finished(out)
            return _finished(out)
    training = _prepare(options, resume)
    with open_run(out, "pretrain", training.options.as_config(), resume) as run:
        return _train(training, run, resume, started)


def _prepare(options: PretrainOptions, resume: bool) -> _Training:
    """Read the data and build the network; raise a UserError if they do not fit together."""
    limit_pixels(options.max_pixels)
    choose_slice_axis(options.axis, *options.sources.values())
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
    size = choose_batch_size(options.batch_size, count, hardware.processes())
    labelled = None
    if options.probe_data is not None:
        # with a test part that is set aside: the one that probe finds with its default options
        labelled = load_labelled(os.fspath(options.probe_data), options.seed)
        if not len(labelled.val):
            raise UserError(
                f"--probe_data {options.probe_data} has no validation images, and each class has a "
                f"single training image, so that none can be held out"
            )
    torch.manual_seed(options.seed)
    encoder = make_encoder(
        options.backbone,
        options.image_size,
        options.encoder,
        ImageSet(images.paths, options),
        options.pretext_name,
    )
    if images.shards is not None and encoder.reader.scope == "volume":
        raise UserError(
            "the volumes are on scales of their own, and shards hold single images: give the files "
            "themselves, or a --value_range for all"
        )
    train_only(encoder, options.trained_parts)
    short_run = short_run_defaults(options, count)
    long_run = long_run_defaults(options, count, size * options.accumulate_grad_batches)
    options = options.with_hyperparameters({**short_run, **long_run})
    # papers of long runs with large batches start them at zero, as timm does
    if not options.pretrained and run_length(options, count) < 1:
        open_residual_branches(encoder)
    task = make_task(options, encoder)
    check_hardware(hardware, task)
    if task.info.orientation and not options.upright:
        log.warning(
            "%(pretext)s predicts how images are turned, which --upright false says can't be seen: "
            "their views are not turned. Another pretext suits such images better",
            {"pretext": options.pretext_name},
            extra={"code": "pretext.orientation"},
        )
    if images.shards is not None and task.reads_files:
        raise UserError(
            f"{options.pretext_name} reads images before the training, and shards are read "
            f"sequentially: give the files themselves, or leave out --pretext.fixed_views"
        )
    views = task.views(options.upright)
    task.optimizer_settings = optimizer_settings(
        options, task, size * options.accumulate_grad_batches, count
    )
    cache = None
    if options.cache:
        cache = _cache_plan(options, images.paths, views, hardware, encoder.reader)
    fingerprints: Fingerprints | None = None
    for source in filter(os.path.isdir, options.sources.values()):
        # Read now: with --overwrite, the folder may be deleted before the training.
        seen = trained_on(source)
        if seen is not None:
            fingerprints = seen if fingerprints is None else fingerprints.join(seen)
    options = options.replace(
        backbone=options.backbone or encoder.backbone,
        train=options.trained_parts,
        image_size=encoder.image_size,
        batch_size=size,
        progressive_resizing=uses_small_views(options, task, count // size),
    )
    options = options.replace(token_drop=dropped_tokens(options, task, count // size))
    return _Training(
        options,
        hardware,
        images,
        labelled,
        task,
        views,
        size,
        cache,
        fingerprints,
        short_run,
        long_run,
    )


def choose_batch_size(given: int | None, images: int, processes: int) -> int:
    """Images per batch over all processes.

    Args:
        given: That of ``--batch_size``; None for 128, or all images if there are fewer, rounded
            down to a multiple of ``processes``.
        images: Number of training images.
        processes: Number of training processes, each of which gets an equal share of a batch.

    Raises:
        UserError: There is no such batch.
    """
    if given is not None and given > images:
        raise UserError(f"--batch_size {given} is larger than the data set: {images} images")
    check_batch_size(given, processes)
    if given == 1:
        raise UserError("--batch_size 1 is too small: pre-training needs at least 2")
    size = given or min(max(128, processes), images) // processes * processes
    if size < 2:
        needed = "two images" if processes <= 2 else f"{processes} images, one per device"
        raise UserError(f"pre-training needs at least {needed}, found {images}")
    return size


def _train(training: _Training, run: Path, resume: bool, started: float) -> PretrainResult:
    options, hardware, images = training.options, training.hardware, training.images
    task, labelled, size = training.task, training.labelled, training.batch_size
    count, views, accumulate = len(images), training.views, options.accumulate_grad_batches
    settings = task.optimizer_settings
    log.info(
        "%d images, %s on %s at %d pixels, batch size %d, %s with learning rate %.2g",
        count,
        options.pretext_name,
        options.backbone,
        options.image_size,
        size,
        settings.name,
        settings.lr,
    )
    for name, value in training.short_run.items():
        log.info("The run is short: --pretext.%s is %s by default", name, str(value).lower())
    for name, value in training.long_run.items():
        log.info("The run is long: --pretext.%s is %s by default", name, value)
    factor = length_factor(options, task, count)
    if factor < 0.995:
        log.info(
            "The run is long: the learning rate is %.2g times that of a short one; --lr sets it",
            factor,
        )
    if options.moves_pretrained:
        log.info(
            "The weights are pre-trained: the learning rate is %s; layer decay is %.3g",
            f"{PRETRAINED_LR_FACTOR:g} times that of the heads, the default for random weights"
            if options.default_rate
            else "the one that was given",
            settings.layer_decay,
        )
    if task.encoder.adapted_inputs:
        log.info(
            "The weights are for other bands: %s, adapted to those of the images, is trained "
            "whatever --train says, and without layer decay",
            ", ".join(sorted(task.encoder.adapted_inputs)),
        )
    if labelled is not None:
        show_data(labelled)
    if accumulate > 1:
        log.info("%s", accumulation_note(task.info, size, accumulate))
    epochs = options.max_epochs
    batches = None if epochs is None else epochs * (count // size)
    schedule: Schedule
    if options.open_ended:
        assert batches is not None
        schedule = OpenSchedule(
            settings.lr,
            options.warmup,
            options.seed,
            batches,
            count // size,
            open_measures(labelled is not None),
            started,
            accumulate,
            options.frozen_share,
        )
    else:
        schedule = Schedule(
            settings.lr,
            options.warmup,
            options.seed,
            batches,
            options.seconds,
            started,
            accumulate,
            options.frozen_share,
        )
    cache = None if training.cache is None else training.cache.open(run, maker=is_main_process())
    images.keep_sample(run)
    paths = images.paths
    reader, smaller, resolution = task.encoder.reader, [], None
    if options.progressive_resizing:
        fitting = task.encoder.fitting_size
        log.info(
            "Views start at %d pixels and grow to their full side; --progressive_resizing false "
            "keeps one size",
            fitting(task.encoder.image_size * INITIAL_SIDE),
        )
        smaller = [views.resized(share, fitting) for share in SHARES[1:]]
        resolution = partial(resolution_of, schedule=schedule)
    dataset = images.source(views, options.seed, cache, reader, smaller)
    task.prepare(dataset, run)
    stream = StreamData(dataset, size, epochs, schedule, hardware.workers(), None, resolution)
    compute = EncoderMetrics(paths, labelled, options.seed, options.upright)
    online = OnlineEvaluation(
        compute,
        stream,
        schedule,
        stop_on_collapse=options.on_collapse == "stop",
    )
    dropped = options.token_drop
    assert dropped is not None  # ``_prepare`` has decided
    callbacks = [
        Forecast(stream, schedule, partial(batch_cost, options, dropped), lambda: online.seconds),
        online,
        FingerprintCallback(run, stream, schedule, training.fingerprints),
    ]
    adaptation = AdaptationMonitor(compute, online, schedule, task.encoder, options.trained_parts)
    if options.pretrained:
        callbacks.append(adaptation)
    if options.progressive_resizing:
        callbacks.append(ProgressiveResizing(schedule, task.encoder, stream.sides))
    if dropped:
        log.info(
            "The encoder is trained without %.0f %% of the patches of a view, in the last tenth of "
            "the run with all; --token_drop 0 keeps all",
            100 * dropped,
        )
        callbacks.append(TokenDrop(schedule, task.encoder, dropped))
    if options.frozen_share or options.trained_parts != ALL_PARTS:
        callbacks.append(FrozenParts(schedule, task.encoder))
    metrics = MetricsFile(run / METRICS) if is_main_process() else None
    trainer = fit(
        task,
        stream,
        schedule,
        hardware,
        callbacks,
        TrainingFiles(metrics, run / CHECKPOINTS, resume),
        title=options.pretext_name,
        loggers=make_loggers(logger_names(options.logger), run),
        chance_loss=task.chance_loss(size),
    )
    if cache is not None and trainer.is_global_zero:
        cache.remove()
    online.finish(trainer, task)  # also evaluates a run that was resumed after its last step
    adaptation.finish()
    task = task.unsharded()
    encoder, spent = run / "encoder", schedule.elapsed()
    if not trainer.is_global_zero:
        return PretrainResult(run, encoder, {}, schedule.steps, spent)
    assert metrics is not None
    about = {
        "version": __version__,
        "pretext": options.pretext,
        "optimizer": vars(settings),
        "data": options.data,
        "images": count,
        "step": schedule.steps,
        "seed": options.seed,
    }
    trained = merge_adapters(task.trained_encoder())
    save_encoder(trained, encoder, about)
    spent = schedule.elapsed()
    plot_curves(metrics, CURVES, run / "curves.png")
    losses = metrics.series("loss")[1]
    last = {"loss": losses[-1]} if losses else {}
    result = PretrainResult(run, encoder, last | online.metrics, schedule.steps, spent)
    results = {
        **result.metrics,
        **({"before": adaptation.before} if adaptation.before else {}),
        "steps": result.steps,
        "epochs": schedule.batches / stream.batches_per_epoch,
        "seconds": round(result.seconds, 1),
        "images": count,
        "evaluation_share": round(online.share, 4),
        "collapsed": online.collapsed,
        "stopped": _stopped(online, schedule),
        "warnings": logged_warnings(run),
    }
    write_results(run, results)
    _log_next_steps(result, task.encoder.backbone, options.probe_data)
    add_pretext(run, task, paths, views, options.seed)
    most = images_on_map(spent, compute.seconds_per_image)
    if labelled is None:
        add_embeddings(run, trained, paths, seed=options.seed, most=most)
    else:
        part = labelled.val
        add_embeddings(run, trained, part.paths, part.labels, labelled.classes, most=most)
    add_report(run)
    return result


def images_on_map(spent: float, seconds_per_image: float) -> int:
    """Largest number of images on the map of a run.

    Args:
        spent: Seconds of training.
        seconds_per_image: Seconds in which the encoder embeds an image; 0 if that is not known, as
            in a process that only resumed a complete run.
    """
    if not seconds_per_image:
        return MAP_IMAGES
    return min(max(int(MAP_SHARE * spent / seconds_per_image), MIN_MAP_IMAGES), MAP_IMAGES)


def _stopped(online: OnlineEvaluation, schedule: Schedule) -> str | None:
    """Why a run ended before the length that was given; None if it did not."""
    if online.stopped:
        return "collapsed"
    plateaued = isinstance(schedule, OpenSchedule) and schedule.plateaued
    return "plateau" if plateaued else None


def batch_cost(options: PretrainOptions, dropped: float, fraction: float) -> float:
    """Relative time of a batch at a fraction of the run: about that of its number of pixels.

    Args:
        options: Options of the run.
        dropped: Share of the patches that a ViT is trained without at first.
        fraction: Share of the run that is done, in [0, 1].
    """
    pixels = SHARES[resolution_at(fraction)] ** 2 if options.progressive_resizing else 1.0
    return pixels * (1 - dropped_at(fraction, dropped))


def _cache_plan(
    options: PretrainOptions,
    paths: PathList,
    views: Views,
    hardware: Hardware,
    reader: ImageReader,
) -> CachePlan:
    """Plan the cache of ``--cache``; raise a UserError if it is not possible."""
    if hardware.num_nodes > 1:
        raise UserError(
            f"--cache is for one machine, not for --num_nodes {hardware.num_nodes}: leave it out"
        )
    shareable = hardware.one_process() and forks_workers(hardware.workers())
    return plan_cache(paths, views.shortest, Path(options.out), shareable, reader)


def accumulation_note(info: PretextInfo, batch_size: int, accumulate: int) -> str:
    """Log message about gradient accumulation and its limits.

    Args:
        info: Description of the pretext.
        batch_size: Number of images per batch.
        accumulate: Number of batches per optimizer step.
    """
    note = f"each optimizer step uses {accumulate} batches of {batch_size} images"
    if info.batch_loss == "negatives":
        note += (
            f"; this does not add negatives: of these images, {info.name} compares one only with "
            f"the {batch_size - 1} others of its own batch"
        )
    elif info.batch_loss == "statistics":
        note += f"; the statistics in the loss of {info.name} are those of {batch_size} images"
    return note


def _finished(out: Path) -> PretrainResult:
    """Result of a run that is finished already."""
    results = read_results(out, "steps", "seconds")
    names = ("loss", *ONLINE_METRICS)
    metrics = {name: results[name] for name in names if name in results}
    return PretrainResult(out, out / "encoder", metrics, results["steps"], results["seconds"])


def loading_code(encoder: Path, backbone: str) -> list[str]:
    """Lines of Python that load an encoder folder with timm.

    Args:
        encoder: Encoder folder.
        backbone: Name of its architecture. One that this package adds to timm needs an import.
    """
    ours = timm.model_entrypoint(backbone).__module__ == backbones.__name__
    lines = ["import timm", *([f"import {backbones.__name__}"] if ours else [])]
    return [*lines, f"timm.create_model({f'local-dir:{encoder}'!r}, pretrained=True)"]


def _log_next_steps(result: PretrainResult, backbone: str, labelled: StrPath | None) -> None:
    log.info("The encoder is in %s. Load it in Python with timm:", result.encoder)
    for line in loading_code(result.encoder, backbone):
        log.info("  %s", line)
    log.info("Next:")
    log.info(
        "  vissl-lite probe --encoder %s --data %s --out %s",
        *(shlex.quote(str(one)) for one in (result.run, labelled or "LABELLED")),
        shlex.quote(str(beside(result.run, "probe"))),
    )
