"""``vissl-lite pretrain``: train an encoder on unlabelled images."""

import inspect
import json
import logging
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vissl_lite import __version__
from vissl_lite.data.images import find_images, suitable_size
from vissl_lite.data.labelled import load_labelled
from vissl_lite.data.stream import ViewDataset
from vissl_lite.encoder import Encoder, build_encoder
from vissl_lite.encoder_folder import load_encoder, load_weights, save_encoder
from vissl_lite.errors import UserError, check_count, check_positive, check_seed, did_you_mean
from vissl_lite.evaluation.watch import Watch
from vissl_lite.optim import OptimizerSettings, check_optimizer
from vissl_lite.pictures import plot_curves
from vissl_lite.pretext import pretext_class
from vissl_lite.pretext.base import About, PretextTask
from vissl_lite.run import (
    METRICS,
    RESULTS,
    MetricsFile,
    check_out,
    is_main_process,
    open_run,
    plain,
    resumed_config,
    write_results,
)
from vissl_lite.training.fit import fit
from vissl_lite.training.hardware import Hardware
from vissl_lite.training.pace import Pace
from vissl_lite.training.stream import StreamData

log = logging.getLogger(__name__)

CURVES = (
    "loss", "accuracy", "knn", "feature_std", "effective_rank", "lr", "images_per_second",
    "data_wait",
)  # fmt: skip


@dataclass(frozen=True)
class PretrainResult:
    """What pre-training made.

    Attributes:
        run: the folder that was written.
        encoder: the encoder folder in it.
        metrics: the last values of what was watched: ``loss``, ``feature_std``, ``effective_rank``,
            and ``knn`` where there were labels.
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
    init: str = "random",
    probe_data: str | None = None,
    optimizer: str | None = None,
    lr: float | None = None,
    base_lr: float | None = None,
    weight_decay: float | None = None,
    warmup: float = 0.1,
    seed: int = 0,
    precision: str = "auto",
    devices: int | str = "auto",
    num_nodes: int = 1,
    strategy: str = "auto",
    num_workers: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> PretrainResult:
    """Train an encoder on unlabelled images.

    Args:
        data: Folders (searched recursively, class folders ignored) or .txt files of paths.
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
        init: Where to start: random, pretrained (timm's weights), a run, an encoder folder, or a
            file with a timm state dict.
        probe_data: Labelled images to judge the encoder by while it trains (kNN, on validation
            images).
        optimizer: A timm optimizer; default the pretext's.
        lr: Peak learning rate; default the pretext's, scaled to the batch by its own rule.
        base_lr: The same for a batch of 256 images, as papers give it: it grows with the batch.
        weight_decay: Default the pretext's.
        warmup: Share of the training in which the learning rate rises.
        seed: Of everything random.
        precision: auto, or one of Lightning's such as 32-true or bf16-mixed.
        devices: How many devices to use, or auto.
        num_nodes: How many machines to use.
        strategy: Lightning's strategy, such as ddp.
        num_workers: Data workers a device; default by the cores there are.
        resume: Continue the run in --out; its own options are kept.
        overwrite: Replace the run in --out.

    Returns:
        Paths and last metrics.

    Raises:
        UserError: something that was given can't work; nothing is written then.
    """
    started = time.monotonic()
    config = plain(locals())
    del config["started"]
    config["data"] = [config["data"]] if isinstance(config["data"], str) else config["data"]
    config["pretext"] = whole_pretext(pretext)
    if resume:
        defaults = {n: p.default for n, p in inspect.signature(pretrain).parameters.items()}
        defaults["pretext"] = whole_pretext(defaults["pretext"])
        config = resumed_config(Path(out), config, defaults)
    check_out(Path(out), resume=resume, overwrite=overwrite)
    if resume and (Path(out) / RESULTS).is_file():
        return _finished(Path(out))

    options = _Options(**{k: v for k, v in config.items() if k in _Options.__annotations__})
    paths = find_images(options.data)
    size = min(options.batch_size or 128, len(paths))
    if options.batch_size is not None and options.batch_size > len(paths):
        raise UserError(f"--batch_size {options.batch_size} is larger than the data set: "
                        f"{len(paths)} images")  # fmt: skip
    if size < 2:
        raise UserError(f"{len(paths)} image can't train anything: two or more are needed")
    labelled = None
    if options.probe_data is not None:
        labelled = load_labelled(options.probe_data, options.seed, need_test=False)
    torch.manual_seed(options.seed)
    encoder = make_encoder(
        options.backbone, options.image_size, options.init, paths, options.pretext["name"]
    )
    task = options.task(encoder)
    task.upright = options.upright
    views = task.views()
    accumulate = options.accumulate_grad_batches
    task.optimizer_settings = options.optimizer_settings(task, size * accumulate)
    seconds = parse_time(options.max_time)
    epochs = options.epochs if options.epochs or seconds else 100
    hardware = Hardware(precision, devices, num_nodes, strategy, num_workers)

    config |= {"backbone": encoder.backbone, "image_size": encoder.image_size, "batch_size": size}
    with open_run(Path(out), config, resume=resume) as run:
        log.info(
            "%d images, %s on %s at %d pixels, batch %d, %s with %.2g",
            len(paths), options.pretext["name"], encoder.backbone, encoder.image_size, size,
            task.optimizer_settings.name, task.optimizer_settings.lr,
        )  # fmt: skip
        if accumulate > 1:
            log.info("%s", accumulation_note(task.about, size, accumulate))
        batches = None if epochs is None else epochs * (len(paths) // size)
        rate = task.optimizer_settings.lr
        pace = Pace(rate, options.warmup, options.seed, batches, seconds, started, accumulate)
        dataset = ViewDataset(paths, views, options.seed)
        stream = StreamData(dataset, size, epochs, pace, hardware.workers())
        watch = Watch(paths, labelled, stream, pace, options.seed)
        metrics = MetricsFile(run / METRICS) if is_main_process() else None
        trainer = fit(
            task, stream, pace, hardware, [watch], metrics, run / "checkpoints", resume,
            title=options.pretext["name"],
        )  # fmt: skip
        if not watch.last:  # resumed after the last step: nothing was trained
            watch.look(trainer, task)
        if not trainer.is_global_zero:
            return PretrainResult(run, run / "encoder", {}, pace.steps, pace.elapsed())
        assert metrics is not None
        about = {
            "version": __version__,
            "pretext": config["pretext"],
            "optimizer": vars(task.optimizer_settings),
            "data": options.data,
            "images": len(paths),
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
            {**({"loss": losses[-1]} if losses else {}), **watch.last},
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
                "images": len(paths),
                "collapsed": watch.collapsed,
            },
        )
        _say_what_next(result, options.probe_data)
    return result


@dataclass(frozen=True)
class _Options:
    """What shapes the run, checked. The same names as the parameters of ``pretrain``."""

    data: list[str]
    pretext: dict[str, Any]
    backbone: str | None
    image_size: int | None
    epochs: int | None
    max_time: str | int | None
    batch_size: int | None
    accumulate_grad_batches: int
    upright: bool
    init: str
    probe_data: str | None
    optimizer: str | None
    lr: float | None
    base_lr: float | None
    weight_decay: float | None
    warmup: float
    seed: int

    def __post_init__(self) -> None:
        for name in ("image_size", "epochs", "batch_size", "accumulate_grad_batches"):
            check_count(name, getattr(self, name))
        if self.epochs is not None and self.max_time is not None:
            raise UserError(
                "give --epochs or --max_time, not both (--epochs null takes back a --config's)"
            )
        if not 0 <= self.warmup < 1:
            raise UserError(f"--warmup {self.warmup} is not a share: it must be in [0, 1)")
        check_positive("lr", self.lr)
        check_positive("base_lr", self.base_lr)
        if self.lr is not None and self.base_lr is not None:
            raise UserError("give --lr or --base_lr, not both")
        check_seed(self.seed)
        if self.optimizer is not None:
            check_optimizer(self.optimizer)

    def task(self, encoder: Encoder) -> PretextTask:
        hyperparameters = {k: v for k, v in self.pretext.items() if k != "name"}
        return pretext_class(self.pretext["name"])(encoder, **hyperparameters)

    def optimizer_settings(self, task: PretextTask, batch_size: int) -> OptimizerSettings:
        """What trains the task; ``batch_size`` is that of an optimizer step."""
        own = task.optimizer_settings
        name = self.optimizer or own.name
        if name != own.name and self.lr is None and self.base_lr is None:
            raise UserError(
                f"--optimizer {name} needs an --lr: {task.about.name}'s {own.lr} is for {own.name}"
            )
        if self.base_lr is not None:  # linearly: the rule of the papers that give it so
            own = replace(own, lr=self.base_lr, scaling="linear")
        decay = own.weight_decay if self.weight_decay is None else self.weight_decay
        lr = self.lr or own.scaled_lr(batch_size)
        return replace(own, name=name, lr=lr, weight_decay=decay)


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


def parse_time(text: str | int | None) -> float | None:
    """Seconds from ``HH:MM:SS``, ``MM:SS``, seconds, or days as in ``1-00:00:00``.

    Raises:
        UserError: it is none of these, or not above 0.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(?:(?:(?:(\d+)[-:])?(\d+):)?(\d+):)?(\d+)", str(text).strip())
    if match is None:
        raise UserError(f"--max_time {text} is no time: give HH:MM:SS or seconds")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise UserError(f"--max_time {text} leaves no time")
    return float(total)


def make_encoder(
    backbone: str | None, image_size: int | None, init: str, paths: Sequence[str], pretext: str
) -> Encoder:
    """The encoder to start from.

    Args:
        backbone: a timm name; None for that of ``init``, or the default.
        image_size: side in pixels; None for that of ``init``, or what suits the images.
        init: ``random``, ``pretrained``, a run, an encoder folder, or a state dict file.
        paths: the images.
        pretext: which pretext the default has to suit.

    Raises:
        UserError: there is no such thing, or it is of another backbone.
    """
    if Path(init).is_dir():
        encoder = load_encoder(init)
        if backbone is not None and backbone.split(".")[0] != encoder.backbone:
            raise UserError(f"--init {init} is a {encoder.backbone}, not --backbone {backbone}")
        if image_size is not None:
            encoder.use_image_size(image_size)
        return encoder
    size = image_size or suitable_size(paths)
    name = backbone or default_backbone(pretext, size)
    if init in ("random", "pretrained"):
        return build_encoder(name, size, pretrained=init == "pretrained")
    if not Path(init).is_file():
        raise UserError(
            f"--init {init} does not exist: give random, pretrained, a run, an encoder folder or a "
            f"state dict file"
        )
    encoder = build_encoder(name, size)
    load_weights(encoder, Path(init))
    return encoder


def default_backbone(pretext: str, image_size: int) -> str:
    """A small backbone that suits a pretext.

    Args:
        pretext: its name.
        image_size: side in pixels.
    """
    if pretext_class(pretext).about.backbones in ("any", "CNN"):
        return "resnet18"
    return "vit_tiny_patch16_224" if image_size >= 64 else "vit_tiny_patch4_32"


def whole_pretext(pretext: str | Mapping[str, Any]) -> dict[str, Any]:
    """A pretext's name and all its hyperparameters, those not given with their defaults.

    Raises:
        UserError: the pretext or a hyperparameter is unknown.
    """
    given = dict(pretext) if isinstance(pretext, Mapping) else {"name": pretext}
    name = str(given.pop("name", "simclr"))
    parameters = inspect.signature(pretext_class(name)).parameters
    known = {p.name: p.default for p in parameters.values() if p.name != "encoder"}
    for one in given:
        if one not in known:
            raise UserError(f"unknown option --pretext.{one} of {name}: {did_you_mean(one, known)}")
    return {"name": name, **known, **given}


def _finished(out: Path) -> PretrainResult:
    """The result of a run that had nothing left to resume."""
    results = json.loads((out / RESULTS).read_text())
    names = ("loss", "feature_std", "effective_rank", "knn")
    metrics = {name: results[name] for name in names if name in results}
    return PretrainResult(out, out / "encoder", metrics, results["steps"], results["seconds"])


def _say_what_next(result: PretrainResult, labelled: str | None) -> None:
    log.info("The encoder is in %s. Load it with plain timm:", result.encoder)
    log.info('  timm.create_model("local-dir:%s", pretrained=True)', result.encoder)
    log.info("Next:")
    log.info(
        "  vissl-lite probe --encoder %s --data %s --out %s",
        result.run, labelled or "LABELLED", result.run.with_name(f"{result.run.name}-probe"),
    )  # fmt: skip
