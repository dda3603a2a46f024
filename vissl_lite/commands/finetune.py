"""``vissl-lite finetune``: train a classifier, a detector or a segmenter on labelled images."""

import inspect
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table

from vissl_lite import __version__
from vissl_lite.commands.leaks import guard
from vissl_lite.data.boxes import load_boxes, take_boxes
from vissl_lite.data.labelled import load_labelled, take_labels
from vissl_lite.data.masks import load_masks, take_masks
from vissl_lite.data.reading import MAX_PIXELS, limit_pixels
from vissl_lite.encoder_folder import encoder_for, load_encoder
from vissl_lite.errors import (
    UserError,
    check_arguments,
    check_count,
    check_image_size,
    check_positive_share,
    check_seed,
    check_warmup,
)
from vissl_lite.metrics_file import MetricsFile
from vissl_lite.optim import OptimizerSettings, check_optimizer, check_rates
from vissl_lite.pictures import plot_curves
from vissl_lite.report.additions import add_report, add_test_embeddings, add_test_pictures
from vissl_lite.run import (
    CHECKPOINTS,
    METRICS,
    beside,
    check_out,
    console,
    is_finished,
    open_run,
    plain,
    read_results,
    resumed_config,
    write_results,
)
from vissl_lite.session import session
from vissl_lite.training.fit import TrainingFiles
from vissl_lite.training.hardware import Hardware
from vissl_lite.transfer.classification import ClassifierSettings, check_settings
from vissl_lite.transfer.detection import DetectorSettings, check_rescaling
from vissl_lite.transfer.pyramid import report_use
from vissl_lite.transfer.segmentation import SegmenterSettings, weigh_classes
from vissl_lite.transfer.tasks import Classification, Detection, Scores, Segmentation, Task

log = logging.getLogger(__name__)

TaskName = Literal["classification", "detection", "segmentation"]

# Options that mean something for some tasks alone.
_ONLY_FOR = {
    "annotations": ("detection", "segmentation"),
    "detector": ("detection",),
    "multi_scale": ("detection",),
    "frozen_norm": ("detection", "segmentation"),
    "shots": ("classification",),
    "label_smoothing": ("classification",),
    "balanced": ("classification",),
    "class_weights": ("classification", "segmentation"),
}


@dataclass(frozen=True)
class FinetuneResult:
    """What fine-tuning made.

    Attributes:
        run: the folder that was written.
        model: the model folder in it.
        test: figures on the test part: ``top1`` and ``macro_f1``, with several labels an image
            ``map``, ``auroc`` and ``macro_f1``; for detection ``map`` and ``map_50``; for
            segmentation ``miou``, ``dice`` and ``accuracy``.
        per_class: by class name, then by figure.
    """

    run: Path
    model: Path
    test: dict[str, float]
    per_class: dict[str, dict[str, float]]


@session()
def finetune(
    data: str,
    out: str,
    encoder: str = "random:resnet18",
    task: TaskName = "classification",
    annotations: str | None = None,
    detector: Literal["fcos", "retinanet", "faster_rcnn"] | None = None,
    multi_scale: bool = False,
    frozen: bool = False,
    frozen_norm: bool | None = None,
    fraction: float | None = None,
    shots: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    image_size: int | None = None,
    optimizer: str = "adamw",
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    layer_decay: float | None = None,
    warmup: float = 0.1,
    label_smoothing: float | None = None,
    balanced: bool = False,
    class_weights: Literal["balanced"] | dict[str, float] | None = None,
    patience: int | None = 10,
    smallest_crop: float = 0.35,
    upright: bool = True,
    leaks: Literal["warn", "exclude", "error"] = "warn",
    max_pixels: int = MAX_PIXELS,
    seed: int = 0,
    precision: str = "auto",
    num_workers: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> FinetuneResult:
    """Train a classifier, a detector or a segmenter, from an encoder or from nothing.

    Args:
        data: Labelled images. Classification: train/<class> and test/<class> folders, plain class
            folders, or a .csv file, with a column a class or several labels in one if an image may
            have several. Detection: a folder with COCO .json, Pascal VOC .xml or YOLO .txt
            annotations. Segmentation: a folder with images/ and masks/, or a .csv file. Or the
            folder of the images alone, see --annotations.
        out: The run folder to write.
        encoder: A run, an encoder folder, timm:NAME (pre-trained weights) or random:NAME
            (untrained: training from scratch).
        task: What to learn.
        annotations: Where the boxes or masks are, if --data is the folder of the images alone.
        detector: Which detector; default faster_rcnn, which learns fastest from few images.
        multi_scale: Resize each training batch by 0.75 to 1.25 times, for detection.
        frozen: Train the head alone and leave the encoder as it is.
        frozen_norm: Leave the encoder's BatchNorms as they are, for detection and segmentation;
            default where a batch has fewer than 8 images, which is too few for them; never for
            random:NAME.
        fraction: Use this share of the training and validation labels.
        shots: Use this many training and validation labels a class.
        epochs: Default as many as make 1,000 steps, between 10 and 100.
        batch_size: Default 64 for classification and 8 else, or a quarter of the images where they
            are few.
        image_size: Side in pixels. Default for classification the encoder's, or for random:NAME
            that of the images; for detection the images' longer side, at most 416; for segmentation
            their shorter side, at most 224: larger images are segmented in overlapping windows.
        optimizer: A timm optimizer.
        lr: Peak learning rate.
        weight_decay: On weight matrices and kernels.
        layer_decay: Factor on the learning rate from one layer to the one below; default 0.75, or
            1 for random:NAME.
        warmup: Share of the training in which the learning rate rises.
        label_smoothing: Share of the target that is spread over all classes; default 0.1.
        balanced: Sample all classes equally often.
        class_weights: What classes weigh in the loss: balanced, or a weight for each name.
        patience: Stop after so many of the 25 looks at the validation images without a better
            figure; null never stops early.
        smallest_crop: Smallest share of the image's area in a training view.
        upright: Whether the images have an up; without one, as from a microscope, training views
            are turned and flipped in all directions.
        leaks: What to do about test images that were seen in pre-training or are in the training
            part too: warn, exclude them, or stop with an error.
        max_pixels: Skip images with more pixels (height times width): a small file may decode to
            billions. The default is what Pillow takes.
        seed: Of everything random, the part of the labels included.
        precision: auto, or one of Lightning's such as 32-true or bf16-mixed.
        num_workers: Data workers; default by the cores there are.
        resume: Continue the run in --out from its last checkpoint, if there is one; its own options
            are kept.
        overwrite: Replace the run in --out.

    Returns:
        Paths and test metrics.

    Raises:
        UserError: something that was given can't work; nothing is written then.
    """
    config = plain(locals())
    check_arguments(finetune, config)
    inputs = [(name, config[name]) for name in ("data", "annotations", "encoder")]
    resume = check_out(Path(out), inputs, resume, overwrite, "finetune")
    if resume:
        defaults = {n: p.default for n, p in inspect.signature(finetune).parameters.items()}
        own = resumed_config(Path(out), config, defaults)
        if is_finished(Path(out)):
            return _finished(Path(out))
        if own != config:  # options that were left out, from Python
            return finetune(**own)
    for name, tasks in _ONLY_FOR.items():
        if config[name] not in (None, False) and task not in tasks:
            raise UserError(f"--{name} is for --task {' or '.join(tasks)}, not for {task}")
    limit_pixels(max_pixels)
    check_optimizer(optimizer)
    check_warmup("warmup", warmup)
    check_warmup("label_smoothing", label_smoothing)
    check_positive_share("fraction", fraction)
    check_positive_share("layer_decay", layer_decay)
    check_positive_share("smallest_crop", smallest_crop)
    check_image_size(image_size)
    check_rates(lr, weight_decay)
    for name in ("epochs", "batch_size", "patience", "shots"):
        check_count(name, config[name])
    check_seed(seed)
    hardware = Hardware(precision, devices=1, num_workers=num_workers)
    hardware.check()
    from_scratch = encoder.startswith("random:")
    if layer_decay is None:
        layer_decay = 1.0 if from_scratch else 0.75
    common: dict[str, Any] = {
        "frozen": frozen,
        "epochs": epochs,
        "batch_size": batch_size,
        "optimizer": OptimizerSettings(optimizer, lr, weight_decay, layer_decay),
        "warmup": warmup,
        "patience": patience,
        "smallest_crop": smallest_crop,
        "upright": upright,
        "seed": seed,
    }
    few = batch_size is not None and batch_size < 8
    still = few and not from_scratch if frozen_norm is None else frozen_norm
    transfer: Task
    if task == "classification":
        labelled = load_labelled(data, seed, multi_label=True)
        smoothing = 0.1 if label_smoothing is None else label_smoothing
        classifier = ClassifierSettings(
            **common, label_smoothing=smoothing, balanced=balanced, class_weights=class_weights
        )
        labelled = take_labels(labelled, fraction, shots, seed)
        check_settings(classifier, labelled)
        transfer = Classification(labelled, classifier)
    elif task == "detection":
        boxes = take_boxes(load_boxes(data, annotations, seed), fraction, seed)
        kind = detector or "faster_rcnn"
        detection = DetectorSettings(
            **common, kind=kind, frozen_norm=still, multi_scale=multi_scale
        )
        transfer = Detection(boxes, detection)
    else:
        masks = take_masks(load_masks(data, annotations, seed), fraction, seed)
        segmenter = SegmenterSettings(**common, class_weights=class_weights, frozen_norm=still)
        if class_weights != "balanced":  # which can't be wrong, and takes reading every mask
            weigh_classes(masks, class_weights)
        transfer = Segmentation(masks, segmenter)
    transfer.settings.batch(len(transfer.data.train), usual=1)  # before anything is written
    if image_size is None and (from_scratch or task != "classification"):
        image_size = transfer.image_size()
    torch.manual_seed(seed)
    start = encoder_for(encoder, image_size)
    if multi_scale:
        check_rescaling(start)
    transfer.data, found = guard(transfer.data, [encoder], leaks, out)
    with open_run(Path(out), "finetune", config, resume) as run:
        transfer.write_split(run)
        found.write(run)
        log.info(
            "%d training, %d validation, %d test images of %d classes; %s at %d pixels",
            len(transfer.data.train), len(transfer.data.val), len(transfer.data.test),
            len(transfer.data.classes), start.backbone, start.image_size,
        )  # fmt: skip
        if task != "classification":
            report_use(start, encoder)
        metrics = MetricsFile(run / METRICS)
        files = TrainingFiles(metrics, run / CHECKPOINTS, resume)
        model = transfer.train(start, hardware, files)
        about = {"version": __version__, "task": task, "encoder": encoder, "data": data}
        transfer.save(model, start, run / "model", about)  # first: the test images may have gone
        scores = transfer.score(model, start)
        add_test_pictures(run, transfer, model, start, scores)
        plot_curves(metrics, transfer.curves, run / "curves.png")
        best = max(metrics.series(transfer.chosen_by)[1], default=None)
        results = {
            "test": scores.metrics,
            "per_class": scores.per_class,
            "val": {transfer.chosen_by.removeprefix("val_"): best},
            "train_images": len(transfer.data.train),
            "val_images": len(transfer.data.val),
            "test_images": len(transfer.data.test),
            "classes": transfer.data.classes,
            **found.figures(),
        }
        write_results(run, results)
        _tell(transfer, scores, encoder, run)
        add_test_embeddings(run, load_encoder(run / "model"), transfer.data, seed)
        add_report(run)
    return FinetuneResult(run, run / "model", scores.metrics, scores.per_class)


def _finished(out: Path) -> FinetuneResult:
    """The result of a run that had nothing left to resume."""
    results = read_results(out, "test", "per_class")
    return FinetuneResult(out, out / "model", results["test"], results["per_class"])


def _tell(transfer: Task, scores: Scores, encoder: str, run: Path) -> None:
    console.print(f"fine-tuned from {encoder}", highlight=False, soft_wrap=True)
    table = Table("test images", *scores.metrics)
    table.add_row(str(len(transfer.data.test)), *(f"{x:.3f}" for x in scores.metrics.values()))
    console.print(table)
    if 1 < len(scores.per_class) <= 30:
        measures = list(next(iter(scores.per_class.values())))
        by_class = Table("class", *measures)
        for name, row in scores.per_class.items():
            by_class.add_row(name, *(f"{row[measure]:.3f}" for measure in measures))
        console.print(by_class)
    log.info("The model is in %s, test predictions in %s", run / "model", run / "test.png")
    log.info("Next:")
    log.info("  vissl-lite predict --model %s --data FOLDER --out %s", run,
             beside(run, "predictions"))  # fmt: skip
