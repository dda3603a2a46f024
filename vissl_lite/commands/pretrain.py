"""``vissl-lite pretrain``: train an encoder on unlabelled images."""

import inspect
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from vissl_lite import __version__
from vissl_lite.commands.pretrain_data import find_training_images
from vissl_lite.commands.pretrain_options import Options, make_encoder, parse_time, whole_pretext
from vissl_lite.commands.report import add_embeddings, add_pretext, add_report
from vissl_lite.data.cache import CachePlan, forks_workers, plan_cache
from vissl_lite.data.labelled import load_labelled
from vissl_lite.data.leaks import seen_by
from vissl_lite.data.path_list import PathList
from vissl_lite.data.reading import MAX_PIXELS, limit_pixels
from vissl_lite.data.views import Views
from vissl_lite.encoder_folder import save_encoder
from vissl_lite.errors import UserError, check_arguments
from vissl_lite.evaluation.online import ONLINE_METRICS, EncoderMetrics, OnlineEvaluation
from vissl_lite.pictures import plot_curves
from vissl_lite.pretext.base import About
from vissl_lite.run import (
    CHECKPOINTS,
    METRICS,
    MetricsFile,
    beside,
    check_out,
    is_finished,
    is_main_process,
    logged_warnings,
    open_run,
    plain,
    read_results,
    resumed_config,
    write_results,
)
from vissl_lite.training.fit import TrainingFiles, fit
from vissl_lite.training.hardware import Hardware
from vissl_lite.training.loggers import logger_names, make_loggers
from vissl_lite.training.pace import Pace
from vissl_lite.training.seen import KeepFingerprints
from vissl_lite.training.stream import StreamData

log = logging.getLogger(__name__)

CURVES = (
    "loss", "accuracy", "knn", "linear", "feature_std", "effective_rank", "alignment",
    "uniformity", "lr", "view_size", "images_per_second", "data_wait",
)  # fmt: skip


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


def pretrain(
    data: list[str] | str,
    out: str,
    pretext: str | dict[str, Any] = "simclr",
    backbone: str | None = None,
    image_size: int | None = None,
    epochs: int | None = None,
    max_time: str | int | None = None,
    batch_size: int | None = None,
    accumulate_grad_batches: int = 1,
    upright: bool = True,
    progressive_resizing: bool = False,
    init: str = "random",
    probe_data: str | None = None,
    optimizer: str | None = None,
    lr: float | None = None,
    base_lr: float | None = None,
    weight_decay: float | None = None,
    warmup: float = 0.1,
    on_collapse: Literal["warn", "stop"] = "warn",
    logger: list[str] | str | None = None,
    cache: bool = False,
    max_pixels: int = MAX_PIXELS,
    seed: int = 0,
    precision: str = "auto",
    devices: int | str = "auto",
    num_nodes: int = 1,
    strategy: str = "auto",
    num_workers: int | None = None,
    compile: bool = False,
    resume: bool = False,
    overwrite: bool = False,
) -> PretrainResult:
    """Train an encoder on unlabelled images.

    Args:
        data: Folders (searched recursively, class folders ignored) or .txt files of paths; or
            shards, on a disk or behind URLs, such as "train-{000000..000099}.tar".
        out: The run folder to write.
        pretext: The pretext task; its hyperparameters as --pretext.NAME (in Python and YAML a
            mapping of name and hyperparameters).
        backbone: A timm architecture; default that of --init, or resnet18, for pretexts of
            transformers vit_tiny_patch16_224 (below 64 pixels vit_tiny_patch4_32).
        image_size: Side in pixels; default that of --init, or of the images, at most 224.
        epochs: Times that every image is seen; default 100 without --max_time.
        max_time: Time budget, as HH:MM:SS or seconds; the schedule ends when it ends.
        batch_size: Images that go through the network together, over all devices; default 128, or
            all if there are fewer.
        accumulate_grad_batches: Batches an optimizer step: for a larger step than the memory holds.
            Pretexts that compare the images of a batch get no more of them to compare.
        upright: Whether the images have an up. Without one, as from a microscope or a satellite,
            views are turned and flipped in all directions.
        progressive_resizing: Train on views of half the side for the first half of the run, then on
            larger ones, and on whole ones in the last fifth: about half the time an epoch.
        init: Where to start: random, pretrained (timm's weights), a run, an encoder folder, or a
            file with a timm state dict.
        probe_data: Labelled images to judge the encoder by while it trains (kNN and a linear probe,
            on validation images).
        optimizer: A timm optimizer; default the pretext's.
        lr: Peak learning rate; default the pretext's, scaled to the batch by its own rule.
        base_lr: The same for a batch of 256 images, as papers give it: it grows with the batch.
        weight_decay: Default the pretext's.
        warmup: Share of the training in which the learning rate rises.
        on_collapse: What to do when all images get nearly the same features: warn, or stop.
        logger: Where curves go beside metrics.csv: tensorboard, wandb, mlflow, or none; default
            tensorboard where it is installed.
        cache: Keep decoded images, down-sized as far as the smallest crop allows, for later epochs:
            in memory where they fit into half of what is free, else in one file in the run's folder
            as long as it trains.
        max_pixels: Skip images with more pixels (height times width): a small file may decode to
            billions. The default is what Pillow takes.
        seed: Of everything random.
        precision: auto, or one of Lightning's such as 32-true or bf16-mixed.
        devices: How many devices of each machine to use, or auto.
        num_nodes: How many machines to use (see docs/scaling.md).
        strategy: auto, ddp, fsdp for networks that are too large for a device (each then keeps a
            share of the weights), or another of Lightning's.
        num_workers: Data workers a device; default by the cores there are.
        compile: Train the encoder through torch.compile: the first step takes a minute or more,
            later ones less time on most GPUs. It needs Triton, or a C++ compiler without a GPU.
        resume: Continue the run in --out, if there is one; its own options are kept.
        overwrite: Replace the run in --out.

    Returns:
        Paths and last metrics.

    Raises:
        UserError: something that was given can't work, and nothing is written then; or the loss is
            no longer a number.
    """
    started = time.monotonic()
    check_arguments(pretrain, locals())
    config = plain(locals())
    del config["started"]
    config["data"] = [config["data"]] if isinstance(config["data"], str) else config["data"]
    config["pretext"] = whole_pretext(pretext)
    inputs = [(name, config[name]) for name in ("data", "init", "probe_data")]
    # a job's script may always ask to resume
    resume = check_out(Path(out), inputs, resume, overwrite, "pretrain")
    if resume:
        defaults = {n: p.default for n, p in inspect.signature(pretrain).parameters.items()}
        defaults["pretext"] = whole_pretext(defaults["pretext"])
        config = resumed_config(Path(out), config, defaults)
        check_arguments(pretrain, config)
        config["pretext"] = whole_pretext(config["pretext"])
        if is_finished(Path(out)):
            return _finished(Path(out))
    limit_pixels(config["max_pixels"])

    options = Options(**{k: v for k, v in config.items() if k in Options.__annotations__})
    hardware = Hardware(precision, devices, num_nodes, strategy, num_workers, compile)
    hardware.check()
    images = find_training_images(options, Path(out), resume)
    paths, count = images.paths, len(images)
    size = min(options.batch_size or 128, count)
    if options.batch_size is not None and options.batch_size > count:
        raise UserError(f"--batch_size {options.batch_size} is larger than the data set: "
                        f"{count} images")  # fmt: skip
    if size < 2:
        raise UserError(f"{count} image can't train anything: two or more are needed")
    labelled = None
    if options.probe_data is not None:
        labelled = load_labelled(options.probe_data, options.seed, need_test=False)
    torch.manual_seed(options.seed)
    encoder = make_encoder(
        options.backbone, options.image_size, options.init, paths, options.pretext["name"]
    )
    task = options.task(encoder)
    views = task.views()
    accumulate = options.accumulate_grad_batches
    task.optimizer_settings = options.optimizer_settings(task, size * accumulate)
    seconds = parse_time(options.max_time)
    epochs = options.epochs if options.epochs or seconds else 100
    plan = _cache_plan(options, paths, views, Path(out), hardware) if options.cache else None

    before = (
        seen_by(options.init) if Path(options.init).is_dir() else None
    )  # --overwrite may end it
    config |= {"backbone": encoder.backbone, "image_size": encoder.image_size, "batch_size": size}
    with open_run(Path(out), "pretrain", config, resume) as run:
        log.info(
            "%d images, %s on %s at %d pixels, batch %d, %s with %.2g",
            count, options.pretext["name"], encoder.backbone, encoder.image_size, size,
            task.optimizer_settings.name, task.optimizer_settings.lr,
        )  # fmt: skip
        if accumulate > 1:
            log.info("%s", accumulation_note(task.about, size, accumulate))
        batches = None if epochs is None else epochs * (count // size)
        rate = task.optimizer_settings.lr
        pace = Pace(rate, options.warmup, options.seed, batches, seconds, started, accumulate)
        kept = None if plan is None else plan.open(run, maker=is_main_process())
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
        keep = KeepFingerprints(run, stream, pace, before)
        metrics = MetricsFile(run / METRICS) if is_main_process() else None
        trainer = fit(
            task, stream, pace, hardware, [online, keep],
            TrainingFiles(metrics, run / CHECKPOINTS, resume), title=options.pretext["name"],
            loggers=make_loggers(logger_names(options.logger), run),
            chance_loss=task.chance_loss(size),
        )  # fmt: skip
        if kept is not None and trainer.is_global_zero:
            kept.remove()
        online.finish(trainer, task)  # resumed after the last step: nothing was trained
        task = task.whole()
        if not trainer.is_global_zero:
            return PretrainResult(run, run / "encoder", {}, pace.steps, pace.elapsed())
        assert metrics is not None
        about = {
            "version": __version__,
            "pretext": config["pretext"],
            "optimizer": vars(task.optimizer_settings),
            "data": options.data,
            "images": count,
            "step": pace.steps,
            "seed": options.seed,
        }
        save_encoder(task.trained_encoder(), run / "encoder", about)
        seconds_spent = pace.elapsed()
        plot_curves(metrics, CURVES, run / "curves.png")
        losses = metrics.series("loss")[1]
        result = PretrainResult(
            run,
            run / "encoder",
            {**({"loss": losses[-1]} if losses else {}), **online.metrics},
            pace.steps,
            seconds_spent,
        )
        write_results(
            run,
            {
                **result.metrics,
                "steps": result.steps,
                "epochs": pace.batches / stream.batches_per_epoch,
                "seconds": round(result.seconds, 1),
                "images": count,
                "evaluation_share": round(online.share, 4),
                "collapsed": online.collapsed,
                "stopped": "collapsed" if online.stopped else None,
                "warnings": logged_warnings(run),
            },
        )
        _say_what_next(result, options.probe_data)
        add_pretext(run, task, paths, views, options.seed)
        if labelled is None:
            add_embeddings(run, task.trained_encoder(), paths, seed=options.seed)
        else:
            part = labelled.val
            add_embeddings(run, task.trained_encoder(), part.paths, part.labels, labelled.classes)
        add_report(run)
    return result


def _cache_plan(
    options: Options, paths: PathList, views: Views, out: Path, hardware: Hardware
) -> CachePlan:
    """Where ``--cache`` keeps what; a UserError where it can't."""
    if hardware.num_nodes > 1:
        raise UserError(
            f"--cache is for one machine, not for --num_nodes {hardware.num_nodes}: leave it out"
        )
    shareable = hardware.one_process() and forks_workers(hardware.workers())
    return plan_cache(paths, views.shortest, out, shareable)


def accumulation_note(about: About, batch_size: int, accumulate: int) -> str:
    """What accumulating gradients does and does not.

    Args:
        about: the pretext.
        batch_size: images that go through the network together.
        accumulate: batches an optimizer step.
    """
    note = f"an optimizer step sees {accumulate} batches of {batch_size} images"
    if about.negatives:
        note += (
            f"; that adds no negatives: {about.name} compares an image with the {batch_size - 1} "
            f"others of its own batch only"
        )
    return note


def _finished(out: Path) -> PretrainResult:
    """The result of a run that had nothing left to resume."""
    results = read_results(out, "steps", "seconds")
    names = ("loss", *ONLINE_METRICS)
    metrics = {name: results[name] for name in names if name in results}
    return PretrainResult(out, out / "encoder", metrics, results["steps"], results["seconds"])


def _say_what_next(result: PretrainResult, labelled: str | None) -> None:
    log.info("The encoder is in %s. Load it with plain timm:", result.encoder)
    log.info('  timm.create_model("local-dir:%s", pretrained=True)', result.encoder)
    log.info("Next:")
    log.info(
        "  vissl-lite probe --encoder %s --data %s --out %s",
        result.run, labelled or "LABELLED", beside(result.run, "probe"),
    )  # fmt: skip
