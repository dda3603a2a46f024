"""``vissl-lite finetune``: train a classifier, a detector or a segmenter on labelled images."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from rich.table import Table

from vissl_lite import __version__
from vissl_lite.commands.labelled import dry_run, show_data
from vissl_lite.commands.leaks import guard, labelled_for
from vissl_lite.commands.self_training import (
    ROUNDS,
    Labeller,
    Round,
    best_round,
    check_labeller,
    check_same_reading,
    load_pseudo_labels,
    outcome,
    read_unlabelled,
    self_train,
)
from vissl_lite.data.image_survey import ImageSet, ImageSettings
from vissl_lite.data.reading import MAX_PIXELS, limit_pixels
from vissl_lite.encoders.folder import (
    choose_slice_axis,
    encoder_for,
    fitting_size,
    is_untrained,
    load_encoder,
)
from vissl_lite.errors import (
    MOST_EPOCHS,
    UserError,
    check_count,
    check_image_size,
    check_positive_share,
    check_seed,
    check_warmup,
)
from vissl_lite.leakage.matching import FINGERPRINTS, seen_by
from vissl_lite.metrics_file import MetricsFile, read_metrics
from vissl_lite.optim import canonical_optimizer, check_rates
from vissl_lite.options import Options, StrPath, command, parse_time
from vissl_lite.plots import metrics_of_classes, plot_curves
from vissl_lite.report.additions import add_report, add_test_embeddings, add_test_pictures
from vissl_lite.run import (
    METRICS,
    beside,
    check_out,
    console,
    is_finished,
    is_main_process,
    open_run,
    read_config,
    read_results,
    say_finished,
    write_results,
)
from vissl_lite.training.hardware import Hardware, check_batch_size
from vissl_lite.transfer.base import Scores, TrainedModel
from vissl_lite.transfer.dataset import LabelledDataset
from vissl_lite.transfer.finetuning import TransferSettings, finetune_optimizer
from vissl_lite.transfer.fitting import FitFiles, FittedModel, fit_model, monitor_of
from vissl_lite.transfer.tasks import AllTaskOptions, check_given, find_task, without_others
from vissl_lite.transfer.trained_on import save_trained_on

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinetuneResult:
    """Result of fine-tuning.

    Attributes:
        run: Run folder.
        model: Model folder inside the run folder.
        test: Metrics on the test images: ``top1`` and ``macro_f1``, with several labels per image
            ``map``, ``auroc`` and ``macro_f1``; for detection ``map`` and ``map_50``, with masks
            before them ``mask_map`` and ``mask_map_50``; for segmentation ``miou``, ``dice`` and
            ``accuracy``.
        per_class: Metrics per class, by class name and metric.
    """

    run: Path
    model: Path
    test: dict[str, float]
    per_class: dict[str, dict[str, float]]

    def __fspath__(self) -> str:
        return str(self.run)


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(Options, ImageSettings, AllTaskOptions):
    """Options of ``finetune``. Options that only some tasks have are inherited."""

    data: StrPath
    """Labelled images: a folder or a file in one of the usual layouts; docs/data.md lists them.
    Classification: class folders, with or without train/, val/ and test/, or a table (.csv, .tsv,
    .jsonl) of images and labels. Detection: COCO .json, Pascal VOC .xml, YOLO .txt and others.
    Segmentation: images and masks, or polygons. With --annotations: only the folder of the
    images."""
    out: StrPath
    """Run folder to write."""
    encoder: StrPath = "random:resnet18"
    """A run, an encoder folder, timm:NAME (pre-trained weights) or random:NAME (untrained, to train
    from scratch)."""
    task: str = "classification"
    """Task: classification, detection or segmentation."""
    frozen: bool = False
    """Train only the head and keep the encoder frozen."""
    pseudo_labels: StrPath | None = None
    """Data set of pseudo-label, to train on beside the true labels. A model without it is trained
    as well, both are tested, and the better one on validation images is kept."""
    rounds: int = 1
    """Number of trainings with --pseudo_labels. From the second one on, the model of the one before
    labels the images of pseudo-label again."""
    fraction: float | None = None
    """Use this fraction of the training and validation labels."""
    shots: int | None = None
    """Use this many training and validation labels per class."""
    epochs: int | None = None
    """Number of epochs. Default: as many as give 1,000 steps, but at least 10."""
    max_time: str | int | None = None
    """Time budget of all trainings together, as HH:MM:SS or in seconds, instead of --epochs."""
    batch_size: int | None = None
    """Number of images per batch. Default: 64 for classification and 8 for other tasks, or a
    twelfth of the training images, at least 8, if they are few."""
    image_size: int | None = None
    """Side length of the input in pixels. Default for classification: that of the encoder, or for
    random:NAME that of the images; for detection: the longer side of the images, at most 416; for
    segmentation: their shorter side, at most 224 (images more than 1.5 times as large are segmented
    in overlapping windows at their own scale). These are rounded to the patches of a ViT."""
    optimizer: str = "adamw"
    """timm optimizer."""
    lr: Sequence[float] | float = 1e-3
    """Peak learning rate. Of several, such as 0.0003 0.001 0.003, the best is chosen on labels that
    are held out, starting from the middle one; each takes a training."""
    weight_decay: float = 0.05
    """Weight decay of weight matrices and convolution kernels."""
    layer_decay: float | None = None
    """Factor by which the learning rate decreases from each layer (a block of a ViT, a stage of
    other backbones) to the one below it, but for a first layer that is adapted to several other
    bands (see docs/formats.md). Default: 0.75 for plain ViTs, 1 (no decrease) for other backbones
    and random:NAME."""
    warmup: float = 0.1
    """Fraction of the training used for learning rate warmup."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights, such as 0.99, which is then the model.
    Default: the weights of the last step."""
    frozen_norm: bool | None = None
    """Keep the BatchNorm layers of a pre-trained encoder as they are. Default: in classification
    with fewer than 1,000 training images both are tried and the better one on held-out labels is
    chosen; true in other tasks with batches of fewer than 8; else false."""
    refit: bool | None = None
    """Train on training and validation labels together once the hyperparameters are chosen.
    Default: true if the validation part was taken out of the training labels, false for a
    validation part of your own."""
    monitor: str | None = None
    """Validation metric to choose by. Default: top1 for classification (several labels per image:
    map), miou for segmentation, and with fewer than 1,000 validation images calibrated_loss (the
    loss after temperature scaling) and loss; map for detection (mask_map with --detector
    mask_rcnn). Also dice, map_50 or mask_map_50."""
    min_crop_scale: float | None = None
    """Smallest fraction of the image area that a random training crop covers. Default: 0.6 in
    classification, 0.35 in detection and segmentation."""
    upright: bool = True
    """Whether the images have a natural orientation (default true). Give --upright false for images
    without one, such as microscopy images: training images are then also rotated and flipped in all
    directions. They are mirrored, left for right, in any case."""
    leaks: Literal["warn", "exclude", "error"] = "warn"
    """What to do about test images that were used in pre-training or are also among the training
    images: warn, exclude them, or stop with an error."""
    max_pixels: int = MAX_PIXELS
    """Skip images with more pixels (height times width) than this; a small file can decode to
    billions of pixels. The default is Pillow's limit."""
    seed: int = 0
    """Random seed, also of the choice of labels."""
    precision: str = "auto"
    """Floating-point precision: auto, or one of Lightning's, such as 32-true or bf16-mixed."""
    devices: int | str = 1
    """Number of devices to use, or auto for all."""
    strategy: Literal["auto", "ddp"] = "auto"
    """Strategy for training on several devices: auto or ddp."""
    num_workers: int | None = None
    """Number of data loading workers per device. Default: 1 on a CPU, which computes beside them;
    with GPUs, chosen from the number of CPU cores."""
    dry_run: bool = False
    """Only print what is read of the data, and write nothing."""
    resume: bool = False
    """Continue the run in --out from its last checkpoint, if there is one, with the options it was
    started with."""
    overwrite: bool = False
    """Replace an existing run in --out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_images()
        self._set("task", find_task(self.task).name)
        self._set("optimizer", canonical_optimizer(self.optimizer))
        check_warmup("warmup", self.warmup)
        check_warmup("ema", self.ema)
        for name in ("fraction", "layer_decay", "min_crop_scale"):
            check_positive_share(name, getattr(self, name))
        check_image_size(self.image_size)
        if isinstance(self.lr, list | tuple):
            self._set("lr", sorted(self.lr) if len(self.lr) > 1 else self.lr[0])
        for rate in self.rates:
            check_rates(rate, self.weight_decay)
        check_count("epochs", self.epochs, MOST_EPOCHS)
        for name in ("batch_size", "shots", "class_level", "rounds"):
            check_count(name, getattr(self, name))
        check_seed(self.seed)
        if self.epochs is not None and parse_time(self.max_time) is not None:
            raise UserError("give --epochs or --max_time, not both")
        if self.frozen_norm and self.from_scratch:
            raise UserError(
                f"--frozen_norm true keeps the BatchNorms of a pre-trained encoder, which "
                f"{self.encoder} is not: leave it out"
            )
        if self.rounds > 1 and self.pseudo_labels is None:
            raise UserError(f"--rounds {self.rounds} needs --pseudo_labels")
        if self.rounds > 1 and self.devices != 1:
            raise UserError("--rounds above 1 label images on one device: give --devices 1")

    @property
    def rates(self) -> list[float]:
        """Candidate learning rates, ascending."""
        return self.lr if isinstance(self.lr, list) else [cast(float, self.lr)]

    @property
    def from_scratch(self) -> bool:
        """Whether the encoder is untrained."""
        return is_untrained(self.encoder)

    def as_config(self) -> dict[str, Any]:
        return without_others(find_task(self.task), super().as_config())

    def settings(self) -> TransferSettings:
        """Training settings for the task."""
        optimizer = finetune_optimizer(
            self.from_scratch, self.optimizer, self.rates[0], self.weight_decay, self.layer_decay
        )
        settings: TransferSettings = find_task(self.task).make_settings(
            self,
            frozen=self.frozen,
            epochs=self.epochs,
            batch_size=self.batch_size,
            seconds=parse_time(self.max_time),
            optimizer=optimizer,
            warmup=self.warmup,
            ema=self.ema,
            frozen_norm=self.frozen_norm,
            refit=self.refit,
            monitor=self.monitor,
            min_crop_scale=self.min_crop_scale,
            upright=self.upright,
            seed=self.seed,
            pretrained=not self.from_scratch,
        )
        return settings


@command(FinetuneOptions)
def finetune(options: FinetuneOptions) -> FinetuneResult:
    """Fine-tune an encoder as a classifier, detector or segmenter, or train one from scratch.

    The option task chooses which: classification (the default), detection or segmentation.

    Returns:
        Paths and test metrics.

    Raises:
        UserError: An option is invalid; nothing is written then.
    """
    config = options.as_config()
    inputs = [
        (name, config.get(name)) for name in ("data", "annotations", "encoder", "pseudo_labels")
    ]
    out = Path(options.out)
    resume = check_out(out, inputs, options.resume, options.overwrite, "finetune")
    if resume:
        options = options.resumed(read_config(out))
        config = options.as_config()
        if is_finished(out):
            say_finished(out)
            return _finished(out)
    task = find_task(options.task)
    check_given(task, options.given)
    limit_pixels(options.max_pixels)
    choose_slice_axis(options.axis, options.encoder)
    hardware = Hardware(
        options.precision,
        options.devices,
        strategy=options.strategy,
        num_workers=options.num_workers,
    )
    hardware.check()
    data, encoder = os.fspath(options.data), os.fspath(options.encoder)
    settings, image_size = options.settings(), options.image_size
    if options.pseudo_labels is not None and settings.seconds is not None:
        settings = replace(settings, seconds=settings.seconds / (options.rounds + 1))
    labelled: LabelledDataset = task.load_data(data, settings)
    labelled = labelled.subsample(options.fraction, options.shots, options.seed)
    # checks of the batch size before anything is written
    settings.batch(len(labelled.train), usual=1)
    _check_devices(hardware.processes(), settings.batch_size, len(labelled.train))
    if image_size is None:
        image_size = fitting_size(encoder, task.image_size(labelled, settings))
    _warn_of_sides(labelled.classes)
    torch.manual_seed(options.seed)
    start = encoder_for(encoder, image_size, ImageSet(labelled.paths("train"), options))
    task.check(start, labelled, settings)
    monitor_of(task, labelled, settings.monitor)
    labelled, leaks = guard(
        labelled, [encoder], options.leaks, None if options.dry_run else str(out)
    )
    # read now: with --overwrite, the folder may be deleted
    pretrained_on, trained_before = seen_by(encoder), labelled_for(encoder)
    pseudo_labels, unlabelled = None, None
    labeller = Labeller([], 0)
    if options.pseudo_labels is not None:
        folder = Path(options.pseudo_labels)
        check_same_reading(folder, options)
        labeller = check_labeller(folder, labelled, trained_before)
        pseudo_labels = load_pseudo_labels(task, folder, labelled)
        unlabelled = read_unlabelled(folder) if options.rounds > 1 else None
    if options.dry_run:
        dry_run(labelled, leaks)
        return FinetuneResult(out, out / "model", {}, {})
    with open_run(out, "finetune", config, resume) as run:
        if is_main_process():
            show_data(labelled, leaks)
            labelled.write_split(run)
            leaks.write(run)
            log.info("%s at %d pixels", start.backbone, start.image_size)
            task.report_use(start, encoder)

        def fit(added: LabelledDataset | None, number: int) -> FittedModel[TrainedModel]:
            place = run if pseudo_labels is None else run / ROUNDS / str(number)
            place.mkdir(parents=True, exist_ok=True)
            files = FitFiles(place, checkpoints=True, resume=resume)
            return fit_model(task, start, labelled, settings, options.rates, hardware, files, added)

        rounds: list[Round] = []
        helped: dict[str, Any] = {}
        if pseudo_labels is None:
            fitted = fit(None, 0)
        else:
            rounds = self_train(
                task, labelled, pseudo_labels, unlabelled, options.rounds, run, fit, resume
            )
            monitor = monitor_of(task, labelled, settings.monitor)
            kept = best_round(rounds, monitor)
            fitted = rounds[kept].fitted
            FitFiles(run).use_curve(f"{ROUNDS}/{kept}/{METRICS}")
            if len(rounds) > 1:
                steps = [_steps(run / ROUNDS / str(number)) for number in range(len(rounds))]
                compared = outcome(rounds, kept, monitor, labelled, labeller.others, steps)
                helped = {"pseudo_labels": compared}
        model: TrainedModel = fitted.model
        if not is_main_process():
            return FinetuneResult(run, run / "model", {}, {})
        log.info("%s", fitted.describe())
        about = {
            "version": __version__,
            "task": task.name,
            "encoder": encoder,
            "data": data,
            "upright": settings.upright,  # for ``predict --tta``
        }
        task.save(model, run / "model", about)  # before evaluating, which may fail
        if fitted.confidence is not None:
            fitted.confidence.save(run / "model")
        trained_on = (labelled.merged() if fitted.refit else labelled).paths("train")
        # Pseudo-labels pass on what the model that made them was trained on.
        indirectly = labeller.trained_on if fitted.added else []
        save_trained_on(run / "model", [*trained_before, *trained_on, *indirectly])
        added = rounds[kept].prints if rounds else None
        if added is not None:
            pretrained_on = added if pretrained_on is None else pretrained_on.join(added)
        if pretrained_on is not None:
            pretrained_on.save(run / "model" / FINGERPRINTS)
        scores: Scores = rounds[kept].scores if rounds else task.evaluate(model, labelled)
        add_test_pictures(run, task, model, labelled, scores)
        plot_curves(MetricsFile(run / METRICS), task.curves, run / "curves.png")
        results = {
            "test": scores.metrics,
            **_majority(labelled),
            "per_class": scores.per_class,
            **fitted.as_dict(),
            **helped,
            "trained_on": fitted.describe(),
            "test_images": len(labelled.test),
            "classes": labelled.classes,
            **leaks.figures(),
        }
        write_results(run, results)
        _print_results(labelled, scores, fitted, encoder, run)
        for one in helped.values():
            log.info("%s", one["sentence"])
        add_test_embeddings(run, load_encoder(run / "model"), labelled, options.seed)
        add_report(run)
    return FinetuneResult(run, run / "model", scores.metrics, scores.per_class)


def _check_devices(processes: int, batch_size: int | None, images: int) -> None:
    """Raise a UserError if a batch can't be divided by the devices."""
    check_batch_size(batch_size, processes)
    if images < processes:
        raise UserError(
            f"there are {images} training images, fewer than {processes} devices: give a lower "
            f"--devices"
        )


def _steps(folder: Path) -> int:
    """Number of steps of the training that wrote the metrics in a folder; 0 without any."""
    return 1 + max((int(row["step"]) for row in read_metrics(folder / METRICS)[1]), default=-1)


def _finished(out: Path) -> FinetuneResult:
    """Result of a run that is finished already."""
    results = read_results(out, "test", "per_class")
    return FinetuneResult(out, out / "model", results["test"], results["per_class"])


def _majority(data: LabelledDataset) -> dict[str, float]:
    """Baseline of the accuracy, where each image has one class."""
    share = data.majority()
    return {} if share is None else {"majority": share}


def _warn_of_sides(classes: Sequence[str]) -> None:
    """Warn of classes that mirrored images do not tell apart."""
    lower = {name.lower() for name in classes}
    left = [name for name in sorted(lower) if "left" in name]
    sides = [name for name in left if name.replace("left", "right") in lower]
    if sides:
        log.warning(
            "Training images are mirrored, so that the class %(left)s is learned from images of "
            "%(right)s too: give both the same class, and tell them apart by their place",
            {"left": sides[0], "right": sides[0].replace("left", "right")},
            extra={"code": "data.sides"},
        )


def _print_results(
    data: LabelledDataset,
    scores: Scores,
    fitted: FittedModel[TrainedModel],
    encoder: str,
    run: Path,
) -> None:
    console.print(f"fine-tuned from {encoder}", highlight=False, soft_wrap=True)
    parts = {
        "training (trained on)": (fitted.train_images, fitted.train_metrics),
        "validation (held out)": (fitted.val_images, fitted.chosen.metrics),
        "test": (len(data.test), scores.metrics),
    }
    names = list(dict.fromkeys(name for _, found in parts.values() for name in found))
    table = Table("images", "number", *names)
    for part, (images, found) in parts.items():
        cells = (f"{found[name]:.3f}" if name in found else "" for name in names)
        table.add_row(part, f"{images:,}", *cells)
    console.print(table)
    for share in _majority(data).values():
        console.print(
            f"always predicting the most frequent class: top1 {share:.3f}",
            highlight=False,
            soft_wrap=True,
        )
    if 1 < len(scores.per_class) <= 30:
        names = metrics_of_classes(scores.per_class)
        by_class = Table("class", *names)
        for label, row in scores.per_class.items():
            by_class.add_row(label, *(f"{row[name]:.3f}" if name in row else "" for name in names))
        console.print(by_class)
    log.info("The model is in %s, test predictions in %s", run / "model", run / "test.png")
    log.info("Next:")
    log.info(
        "  vissl-lite predict --model %s --data FOLDER --out %s", run, beside(run, "predictions")
    )
