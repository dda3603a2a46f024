"""Encoder, pretext task, optimizer and defaults of a run of ``vissl-lite pretrain``."""

import math
import os
from dataclasses import replace
from pathlib import Path

import torch
from timm.models import VisionTransformer

from vissl_lite.commands.pretrain_options import PretrainOptions
from vissl_lite.data.image_survey import ImageSet
from vissl_lite.data.images import suitable_size
from vissl_lite.encoders.encoder import (
    Encoder,
    build_encoder,
    patch_multiple,
)
from vissl_lite.encoders.folder import encoder_for, encoder_from_file, fitting_size, made_here
from vissl_lite.errors import UserError
from vissl_lite.optim import (
    OptimizerSettings,
    check_has_betas,
    check_layer_decay,
    default_layer_decay,
)
from vissl_lite.options import StrPath
from vissl_lite.pretext import PRETEXTS, pretext_class
from vissl_lite.pretext.base import BACKBONE_KINDS, PretextTask
from vissl_lite.pretext.modules.ema import has_teacher
from vissl_lite.pretext.modules.positions import fix_positions
from vissl_lite.training.hardware import Hardware
from vissl_lite.training.resizing import INITIAL_SIDE, SHARES

# Factor on the default learning rates of the pretexts, which are for random weights, for encoders
# with pre-trained ones. The heads are random in any case. A choice that was not measured on several
# data sets.
PRETRAINED_LR_FACTOR = 0.1

# On CIFAR-10 the gain was half as large with 64,000 images (eight minutes of one core) as with
# 17,000; longer runs were not measured, and it is expected to vanish at about this length.
SHORT_RUN_IMAGES, SHORT_RUN_SECONDS = 250_000, 30 * 60

# The pretexts with a lower learning rate in long runs have that of their paper from so many images
# on: 100 epochs of ImageNet. In between it falls with the logarithm of the number of images, which
# was not measured.
LONG_RUN_IMAGES = 128_000_000

# Runs of at least so many steps or seconds are long enough to begin with small views, of a side of
# at least so many pixels, and with a part of the patches. (Views of fewer than 32 pixels have not
# been measured.)
MIN_PHASES_STEPS, MIN_PHASES_SECONDS, MIN_RESIZED_SIDE = 200, 60, 32

# Patches that a view has left at least where some are dropped by default. (Fewer have not been
# measured.)
MIN_PATCHES = 4


def make_encoder(
    backbone: str | None,
    image_size: int | None,
    source: StrPath | None,
    images: ImageSet,
    pretext: str,
) -> Encoder:
    """Build or load the encoder that the training starts from.

    Args:
        backbone: timm name; None for the backbone of ``source``, or the default.
        image_size: Side in pixels; None for that of the run or encoder folder ``source``, or, of
            other weights, one that suits the images.
        source: A run, an encoder folder, ``timm:NAME``, ``random:NAME``, or a state dict file; None
            for random weights.
        images: Training images.
        pretext: Name of the pretext, which decides the default backbone.

    Raises:
        UserError: ``source`` does not exist, or has another backbone than ``backbone``.
    """
    if source is None or Path(source).is_file():
        size = image_size or suitable_size(images.paths)
        name = backbone or default_backbone(pretext, size)
        size = image_size or patch_multiple(name, size)
        if source is not None:
            return encoder_from_file(Path(source), name, size, images)
        return build_encoder(name, size, reader=images.reader)
    source = os.fspath(source)
    if Path(source).is_dir():
        if image_size is None and not made_here(source):  # as for its name, such as timm:NAME
            image_size = fitting_size(source, suitable_size(images.paths))
        encoder = encoder_for(source, image_size, images)
    elif source.startswith(("timm:", "random:")):
        name = source.partition(":")[2]
        size = image_size or patch_multiple(name, suitable_size(images.paths))
        encoder = build_encoder(name, size, source.startswith("timm:"), images.reader)
    else:
        raise UserError(
            f"no encoder at {source}: give a run, an encoder folder, timm:NAME, random:NAME or a "
            f"state dict file"
        )
    if backbone is not None and backbone.split(".")[0] != encoder.backbone:
        raise UserError(f"--encoder {source} is a {encoder.backbone}, not --backbone {backbone}")
    return encoder


def default_backbone(pretext: str, image_size: int) -> str:
    """Name of a small backbone that works with a pretext.

    Args:
        pretext: Name of the pretext.
        image_size: Side in pixels.
    """
    if pretext_class(pretext).info.backbones in ("any", "CNN"):
        return "resnet18"
    return "vit_tiny_patch16_224" if image_size >= 64 else "vit_tiny_patch4_32"


def make_task(options: PretrainOptions, encoder: Encoder) -> PretextTask:
    """Build the pretext task around an encoder."""
    cls = pretext_class(options.pretext_name)
    if not options.pretrained and cls.info.fixed_positions:
        fix_positions(encoder)
    task = cls(encoder, **options.hyperparameters)
    if options.progressive_resizing:
        _check_resizing(task)
    if options.token_drop:
        _check_token_drop(task)
    if options.ema is not None:
        task.average_encoder(options.ema)
    return task


def check_hardware(hardware: Hardware, task: PretextTask) -> None:
    """Raise a UserError if a task can't be trained with a precision, or gains nothing compiled."""
    precision = hardware.precision
    if precision in ("16-true", "bf16-true") and has_teacher(task):
        raise UserError(
            f"--precision {precision}: a step changes the moving average of the weights in "
            f"{task.info.name} by less than these numbers can show, so that it would stand still: "
            f"give --precision {precision.removesuffix('true')}mixed"
        )
    if hardware.compile and not task.info.compiles:
        raise UserError(f"--compile: it makes {task.info.name} no faster: leave it out")


def short_run_defaults(options: PretrainOptions, images: int) -> dict[str, float]:
    """Hyperparameters of the pretext that a short run has instead of their defaults.

    A run is short if it sees at most ``SHORT_RUN_IMAGES`` or, without a GPU, ends within
    ``SHORT_RUN_SECONDS``; runs from pre-trained weights, or of open length, never are.

    Args:
        options: Options of the run.
        images: Number of training images.

    Returns:
        Those of ``PretextInfo.short_run`` that the options leave to their default.
    """
    if options.pretrained or options.open_ended:
        return {}
    epochs, seconds = options.max_epochs, options.seconds
    few = epochs is not None and epochs * images <= SHORT_RUN_IMAGES
    soon = seconds is not None and seconds <= SHORT_RUN_SECONDS
    if not few and (not soon or torch.cuda.is_available()):
        return {}
    given = options.hyperparameters
    better = pretext_class(options.pretext_name).info.short_run
    return {name: value for name, value in better.items() if given[name] is None}


def long_run_defaults(options: PretrainOptions, images: int, batch_size: int) -> dict[str, float]:
    """Momentum of the teacher in a long run of ``--epochs`` instead of its default.

    1 - momentum falls geometrically from its value in short runs to that in long ones; see
    ``long_share``. The latter is in proportion to batches that are larger than those that the
    pretext's is for, so that the teacher averages over as many images (Busbridge et al. 2023, "How
    to Scale Your EMA", arXiv 2307.13813). Runs from pre-trained weights, of open length or with a
    time budget keep the default.

    Args:
        options: Options of the run.
        images: Number of training images.
        batch_size: Number of images per optimizer step.

    Returns:
        ``momentum``, if the pretext has one that depends on the length and the options leave it to
        its default; else nothing.
    """
    bounds, share = pretext_class(options.pretext_name).info.momentum, run_length(options, images)
    if bounds is None or options.hyperparameters["momentum"] is not None:
        return {}
    short, long = 1 - bounds[0], 1 - bounds[1]
    long = min(short, long * max(1.0, batch_size / bounds[2]))
    return {"momentum": round(1 - short ** (1 - share) * long**share, 5)} if share else {}


def uses_small_views(options: PretrainOptions, task: PretextTask, batches_per_epoch: int) -> bool:
    """Whether the views start small and grow, by ``--progressive_resizing`` or its default."""
    if options.progressive_resizing is not None:
        return options.progressive_resizing
    if options.pretrained:  # not measured
        return False
    if task.info.encoders and not task.reads_files:  # a teacher that sees views gains no speed
        return False
    side = task.encoder.image_size
    crop = task.encoder.fitting_size((task.views().smallest_crop or side) * INITIAL_SIDE)
    if min(side * INITIAL_SIDE, crop) < MIN_RESIZED_SIDE:
        return False
    if not _has_phases(options, batches_per_epoch):
        return False
    try:
        _check_resizing(task)  # runs the encoder once
    except UserError:
        return False
    return True


def dropped_tokens(options: PretrainOptions, task: PretextTask, batches_per_epoch: int) -> float:
    """Share of the patch tokens to drop at first, by ``--token_drop`` or its default.

    Args:
        options: Options of the run, with ``progressive_resizing``.
        task: Task to train.
        batches_per_epoch: Batches per epoch.
    """
    if options.token_drop is not None:
        return options.token_drop
    share, encoder = task.info.token_drop or 0.0, task.encoder
    if not share or options.pretrained or not _has_phases(options, batches_per_epoch):
        return 0.0
    try:
        _check_token_drop(task)
    except UserError:
        return 0.0
    assert encoder.patch_size is not None  # as all ViTs have
    side = encoder.image_size
    if options.progressive_resizing:
        side = encoder.fitting_size(side * INITIAL_SIDE)
    kept = int((1 - share) * (side // encoder.patch_size) ** 2)
    return share if kept >= MIN_PATCHES else 0.0


def _has_phases(options: PretrainOptions, batches_per_epoch: int) -> bool:
    """Whether the run is long enough to begin with less of each image than it ends with."""
    if options.max_epochs is None:
        return (options.seconds or 0) >= MIN_PHASES_SECONDS
    steps = options.max_epochs * batches_per_epoch // options.accumulate_grad_batches
    return steps >= MIN_PHASES_STEPS


def length_factor(options: PretrainOptions, task: PretextTask, images: int) -> float:
    """Factor on the default learning rate because of the length of the run.

    1 with a time budget or an open end, as the number of images that the run will see is not
    known, and from pre-trained weights, whose default rate is lower anyway.

    Args:
        options: Options of the run.
        task: Task to train.
        images: Number of training images.
    """
    if not options.default_rate:
        return 1.0
    return float(task.info.long_run_lr ** run_length(options, images))


def run_length(options: PretrainOptions, images: int) -> float:
    """``long_share`` of a run; 0 where the defaults of short runs apply to any length.

    Args:
        options: Options of the run.
        images: Number of training images.
    """
    epochs = options.max_epochs
    if options.pretrained or options.open_ended or epochs is None:
        return 0.0
    return long_share(epochs * images)


def long_share(images: int) -> float:
    """Position of a run between a short one (0) and a long one (1), on a logarithmic scale.

    Args:
        images: Number of images that it sees, repeated ones included.
    """
    share = math.log(max(images, 1) / SHORT_RUN_IMAGES)
    return min(1.0, max(0.0, share / math.log(LONG_RUN_IMAGES / SHORT_RUN_IMAGES)))


def optimizer_settings(
    options: PretrainOptions, task: PretextTask, batch_size: int, images: int
) -> OptimizerSettings:
    """Optimizer settings for a task.

    Args:
        options: Options of the run.
        task: Task to train.
        batch_size: Number of images per step.
        images: Number of training images.

    Raises:
        UserError: The options do not go together.
    """
    settings = task.optimizer_settings
    name = options.optimizer or settings.name
    if name != settings.name and options.default_rate:
        raise UserError(
            f"--optimizer {name} needs an --lr: the default {settings.lr} of {task.info.name} "
            f"is for {settings.name}"
        )
    if options.base_lr is not None:  # papers that give a base rate scale it linearly
        settings = replace(settings, lr=options.base_lr, scaling="linear")
    if options.weight_decay is not None:
        settings = replace(settings, weight_decay=options.weight_decay, weight_decay_end=None)
    if options.weight_decay_end is not None:
        settings = replace(settings, weight_decay_end=options.weight_decay_end)
    if options.clip_norm is not None:
        settings = replace(settings, clip_norm=options.clip_norm)
    betas = settings.betas if name == settings.name else None
    if options.betas is not None:
        check_has_betas(name)
        betas = (options.betas[0], options.betas[1])
    lr, head_scale = options.lr or settings.scaled_lr(batch_size), 1.0
    lr *= length_factor(options, task, images)
    if options.default_rate and options.moves_pretrained:
        lr, head_scale = lr * PRETRAINED_LR_FACTOR, 1 / PRETRAINED_LR_FACTOR
    layer_decay = options.layer_decay
    if layer_decay is None:
        layer_decay = default_layer_decay(task.encoder.model) if options.moves_pretrained else 1.0
    check_layer_decay(task.encoder.model, layer_decay)
    return replace(
        settings,
        name=name,
        lr=lr,
        layer_decay=layer_decay,
        betas=betas,
        head_scale=head_scale,
    )


def _check_resizing(task: PretextTask) -> None:
    if not task.info.any_size:
        supported = ", ".join(name for name, cls in PRETEXTS.items() if cls.info.any_size)
        raise UserError(
            f"--progressive_resizing: the views of {task.info.name} can't change their size; "
            f"those of {supported} can"
        )
    encoder = task.encoder
    sides = {encoder.image_size, task.views().smallest_crop or encoder.image_size}
    try:
        for size in {encoder.fitting_size(side * share) for side in sides for share in SHARES}:
            encoder.check_image_size(size)
    except UserError as error:
        raise UserError(f"--progressive_resizing: {error}") from None


def _check_token_drop(task: PretextTask) -> None:
    if task.info.token_drop is None:
        supported = ", ".join(
            name for name, cls in PRETEXTS.items() if cls.info.token_drop is not None
        )
        raise UserError(
            f"--token_drop: {task.info.name} needs all tokens of its views; "
            f"{supported} can be trained without some"
        )
    if not isinstance(task.encoder.model, VisionTransformer):
        kind, examples = BACKBONE_KINDS["ViT"]
        raise UserError(
            f"--token_drop needs {kind}, which {task.encoder.backbone} is not: "
            f"try one of {examples}, or leave it out"
        )
