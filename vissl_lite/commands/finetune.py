"""``vissl-lite finetune``: train a classifier on labelled images."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.table import Table

from vissl_lite import __version__
from vissl_lite.commands.probe import encoder_for
from vissl_lite.data.labelled import load_labelled, take_labels
from vissl_lite.encoder_folder import save_model
from vissl_lite.errors import UserError, check_count, check_positive, check_seed
from vissl_lite.optim import OptimizerSettings, check_optimizer
from vissl_lite.pictures import plot_confusion, plot_curves
from vissl_lite.run import METRICS, MetricsFile, check_out, console, open_run, write_results
from vissl_lite.training.hardware import Hardware
from vissl_lite.transfer.classification import (
    ClassifierSettings,
    score_classifier,
    train_classifier,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinetuneResult:
    """What fine-tuning made.

    Attributes:
        run: the folder that was written.
        model: the model folder in it.
        test: ``top1`` and ``macro_f1`` on the test part.
    """

    run: Path
    model: Path
    test: dict[str, float]


def finetune(
    data: str,
    out: str,
    encoder: str = "random:resnet18",
    task: Literal["classification"] = "classification",
    frozen: bool = False,
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
    label_smoothing: float = 0.1,
    balanced: bool = False,
    patience: int | None = 10,
    smallest_crop: float = 0.35,
    upright: bool = True,
    seed: int = 0,
    precision: str = "auto",
    num_workers: int | None = None,
    overwrite: bool = False,
) -> FinetuneResult:
    """Train a classifier on labelled images, from an encoder or from nothing.

    Args:
        data: Labelled images: train/<class> and test/<class> folders, plain class folders, or a
            .csv file.
        out: The run folder to write.
        encoder: A run, an encoder folder, timm:NAME (pre-trained weights) or random:NAME
            (untrained: training from scratch).
        task: What to learn.
        frozen: Train the classifier alone and leave the encoder as it is.
        fraction: Use this share of the training and validation labels.
        shots: Use this many training and validation labels a class.
        epochs: Default as many as make 1,000 steps, between 10 and 100.
        batch_size: Default 64, or a quarter of the images where they are few.
        image_size: Side in pixels; default the encoder's, or for random:NAME that of the images.
        optimizer: A timm optimizer.
        lr: Peak learning rate.
        weight_decay: On weight matrices and kernels.
        layer_decay: Factor on the learning rate from one layer to the one below; default 0.75, or
            1 for random:NAME.
        warmup: Share of the training in which the learning rate rises.
        label_smoothing: Share of the target that is spread over all classes.
        balanced: Sample all classes equally often.
        patience: Stop after so many of the 25 looks at the validation images without a better
            accuracy; null never stops early.
        smallest_crop: Smallest share of the image's area in a training view.
        upright: Whether the images have an up; without one, as from a microscope, training views
            are turned and flipped in all directions.
        seed: Of everything random, the part of the labels included.
        precision: auto, or one of Lightning's such as 32-true or bf16-mixed.
        num_workers: Data workers; default by the cores there are.
        overwrite: Replace the run in --out.

    Returns:
        Paths and test metrics.

    Raises:
        UserError: something that was given can't work; nothing is written then.
    """
    config = dict(locals())
    check_optimizer(optimizer)
    for name, share in (("warmup", warmup), ("label_smoothing", label_smoothing)):
        if not 0 <= share < 1:
            raise UserError(f"--{name} {share} is not a share: it must be in [0, 1)")
    for name, number in (("epochs", epochs), ("batch_size", batch_size), ("patience", patience)):
        check_count(name, number)
    check_positive("lr", lr)
    check_seed(seed)
    if not 0 < smallest_crop <= 1:
        raise UserError(f"--smallest_crop {smallest_crop} is not a share: above 0, at most 1")
    check_out(Path(out), overwrite=overwrite)
    labelled = take_labels(load_labelled(data, seed), fraction, shots, seed)
    if batch_size is not None and batch_size > len(labelled.train):
        raise UserError(f"--batch_size {batch_size} is larger than the training part: "
                        f"{len(labelled.train)} images")  # fmt: skip
    torch.manual_seed(seed)
    start = encoder_for(encoder, image_size, labelled)
    if layer_decay is None:
        layer_decay = 1.0 if encoder.startswith("random:") else 0.75
    settings = ClassifierSettings(
        frozen=frozen,
        epochs=epochs,
        batch_size=batch_size,
        optimizer=OptimizerSettings(optimizer, lr, weight_decay, layer_decay),
        warmup=warmup,
        label_smoothing=label_smoothing,
        balanced=balanced,
        patience=patience,
        smallest_crop=smallest_crop,
        upright=upright,
        seed=seed,
    )
    with open_run(Path(out), config) as run:
        labelled.write(run / "split.csv")
        log.info(
            "%d training, %d validation, %d test images of %d classes; %s at %d pixels",
            len(labelled.train), len(labelled.val), len(labelled.test), len(labelled.classes),
            start.backbone, start.image_size,
        )  # fmt: skip
        metrics = MetricsFile(run / METRICS)
        hardware = Hardware(precision, devices=1, num_workers=num_workers)
        model = train_classifier(start, labelled, settings, hardware, metrics)
        scores = score_classifier(model, start, labelled)
        about = {"version": __version__, "task": task, "encoder": encoder, "data": data}
        extra = {"label_names": labelled.classes, "vissl_lite": about}
        save_model(model, run / "model", start.model_args, start.image_size, extra)
        plot_confusion(scores.confusion, labelled.classes, run / "confusion.png")
        plot_curves(metrics, ("loss", "val_loss", "val_top1", "lr"), run / "curves.png")
        test = {"top1": scores.top1, "macro_f1": scores.macro_f1}
        results = {
            "test": test,
            "val": {"top1": max(metrics.series("val_top1")[1], default=None)},
            "train_images": len(labelled.train),
            "val_images": len(labelled.val),
            "test_images": len(labelled.test),
            "classes": labelled.classes,
        }
        write_results(run, results)
        console.print(f"fine-tuned from {encoder}", highlight=False, soft_wrap=True)
        table = Table("test images", "top-1", "macro F1")
        table.add_row(str(len(labelled.test)), f"{scores.top1:.3f}", f"{scores.macro_f1:.3f}")
        console.print(table)
        log.info("The model is in %s, the confusion matrix in %s",
                 run / "model", run / "confusion.png")  # fmt: skip
        log.info("Next:")
        log.info("  vissl-lite predict --model %s --data FOLDER --out %s", run,
                 run.with_name(f"{run.name}-predictions"))  # fmt: skip
    return FinetuneResult(run, run / "model", test)
