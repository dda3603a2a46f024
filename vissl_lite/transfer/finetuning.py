"""Fine-tuning for any task: settings, training loop, model folders."""

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vissl_lite.data.atomic_file import write_atomically
from vissl_lite.data.json_file import read_json
from vissl_lite.data.stream import Batch, KeyedDataset
from vissl_lite.encoders.config import (
    BUILD_ERRORS,
    ENCODER_CONFIG,
    checked_names,
    read_model_config,
)
from vissl_lite.encoders.encoder import Encoder, first_line
from vissl_lite.encoders.folder import load_encoder, load_tensors, read_weights, save_encoder
from vissl_lite.errors import UserError
from vissl_lite.optim import OptimizerSettings, build_optimizer, clip_gradients
from vissl_lite.training.fit import NO_FILES, TrainingFiles, fit
from vissl_lite.training.hardware import Hardware
from vissl_lite.training.schedule import Schedule
from vissl_lite.training.stream import StreamData

log = logging.getLogger(__name__)

# Number of evaluations on the validation part during a training, for its curve.
EVALUATIONS = 10

# Length of a training by default, in steps, and its least length in epochs.
STEPS, MIN_EPOCHS = 1000, 10

# Largest norm of the gradient: single batches of few images would otherwise move the weights far.
CLIP_NORM = 3.0

HEAD, HEAD_WEIGHTS = "head.json", "head.safetensors"
MAX_HEAD_BYTES = 16 * 2**20  # bytes of head.json

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def finetune_optimizer(
    untrained: bool,
    name: str = "adamw",
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    layer_decay: float | None = None,
) -> OptimizerSettings:
    """Settings of the optimizer of fine-tuning.

    Args:
        untrained: Whether the encoder is untrained.
        name: A timm optimizer.
        lr: Peak learning rate.
        weight_decay: Weight decay of matrices and kernels.
        layer_decay: Factor on the learning rate from one layer to the one below it; None for the
            default of ``OptimizerSettings``, or 1 for an untrained encoder.
    """
    if layer_decay is None and untrained:
        layer_decay = 1.0
    return OptimizerSettings(name, lr, weight_decay, layer_decay, clip_norm=CLIP_NORM)


@dataclass(frozen=True, kw_only=True)
class TransferSettings:
    """Settings of fine-tuning for any task.

    Attributes:
        frozen: Train the head alone, on the encoder as it is.
        epochs: None for as many as make 1,000 steps, at least 10.
        seconds: Time budget of all trainings together, instead of a number of epochs.
        batch_size: None for the task's own, or where images are few a twelfth of them, at least 8.
        optimizer: Name, peak learning rate, weight decay, layer-wise decay, largest gradient.
        ema: Decay of an exponential moving average of the weights, which is then the trained model;
            None for the weights of the last step.
        warmup: Share of the training in which the learning rate rises.
        min_crop_scale: Smallest share of the image's area in a training view. None for the task's
            own.
        upright: Whether the images have an up; without one they are turned and flipped.
        frozen_norm: Leave the encoder's BatchNorms as they are. None does so for a pre-trained
            encoder where images or batches are few, see ``freezes_norms``.
        refit: Train on training and validation images together once the hyperparameters are
            chosen. None does so where the validation part was taken out of the training images.
        monitor: Validation metric to choose by; None for the task's own.
        seed: Seed of everything random.
        pretrained: Whether the encoder's weights are more than random ones.
    """

    frozen: bool = False
    epochs: int | None = None
    seconds: float | None = None
    batch_size: int | None = None
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    ema: float | None = None
    warmup: float = 0.1
    min_crop_scale: float | None = None
    upright: bool = True
    frozen_norm: bool | None = None
    refit: bool | None = None
    monitor: str | None = None
    seed: int = 0
    pretrained: bool = False

    def batch(self, images: int, usual: int) -> int:
        """The batch size for a training part.

        Args:
            images: Number of training images.
            usual: The task's own batch size.

        Raises:
            UserError: What was asked for is larger than the training part.
        """
        if self.batch_size is not None and self.batch_size > images:
            raise UserError(
                f"--batch_size {self.batch_size} is larger than the training part: {images} images"
            )
        return self.batch_size or max(min(usual, images // 12), min(8, images))

    def freezes_norms(self, few: bool) -> bool:
        """Whether the BatchNorms of the encoder are frozen; those of an untrained one never are.

        Args:
            few: Whether images or batches are too few for statistics of their own.
        """
        return self.pretrained and (few if self.frozen_norm is None else self.frozen_norm)


def has_norms(encoder: nn.Module) -> bool:
    """Whether an encoder has BatchNorms."""
    return any(isinstance(module, _BatchNorm) for module in encoder.modules())


def freeze_norms(encoder: nn.Module) -> None:
    """Freeze the BatchNorms of an encoder, because images or batches are few.

    Their statistics and their affine parameters stay as pre-training left them (He et al. 2017,
    Mask R-CNN). To be called after each ``train()``.
    """
    for module in encoder.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
            module.requires_grad_(False)


class TransferModel(nn.Module):
    """A model with an ``encoder`` in it."""

    if TYPE_CHECKING:  # an attribute of one model, a property of another

        @property
        def encoder(self) -> Encoder: ...


TransferModelT = TypeVar("TransferModelT", bound=TransferModel)
SettingsT = TypeVar("SettingsT", bound=TransferSettings)


def _ema(decay: float) -> Callable[[Any, Any, Any], None]:
    """Update of a moving average whose decay grows to ``decay``: min(d, (1 + n) / (10 + n)) after n
    steps, as in TensorFlow's ``ExponentialMovingAverage``, so that the first weights are forgotten.
    """

    def update(average: Any, current: Any, steps: Any) -> None:
        n = int(steps)
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(average, current, steps)

    return update


class TransferModule(pl.LightningModule, Generic[TransferModelT, SettingsT]):
    """Base of the Lightning modules of fine-tuning: frozen parts, optimizer, clipped gradients, and
    a moving average of the weights.

    Args:
        model: Model to train.
        settings: Settings of the training.
        few: Whether images or batches are too few for BatchNorm statistics of their own.
    """

    def __init__(self, model: TransferModelT, settings: SettingsT, few: bool) -> None:
        super().__init__()
        self.model, self.settings = model, settings
        self.freezes_norms = settings.freezes_norms(few)
        if settings.frozen:
            model.encoder.requires_grad_(False)
        self.average: AveragedModel | None = None
        if settings.ema is not None:
            self.average = AveragedModel(
                model, multi_avg_fn=_ema(settings.ema), use_buffers=True
            ).requires_grad_(False)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        # Not at the end of the batch: callbacks that save and evaluate come before that hook.
        super().optimizer_step(*args, **kwargs)
        if self.average is not None:
            self.average.update_parameters(self.model)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Have the averaged weights in the model meanwhile, if there are any."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def keep_average(self) -> None:
        """Leave the averaged weights in the model, if there are any."""
        self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        if self.average is None:
            return
        networks = self.model, self.average.module
        pairs = zip(*(chain(one.parameters(), one.buffers()) for one in networks), strict=True)
        for current, averaged in pairs:
            kept = current.clone()
            current.copy_(averaged)
            averaged.copy_(kept)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.settings.frozen:
            self.model.encoder.eval()  # its norms and its dropout do not change either
        elif self.freezes_norms:
            freeze_norms(self.model.encoder)
        return self

    def configure_optimizers(self) -> Optimizer:
        encoder = self.model.encoder
        return build_optimizer(
            self.model,
            self.settings.optimizer,
            encoder.model,
            full_rate=encoder.adapted_inputs,
        )

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if largest := self.settings.optimizer.clip_norm:
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            clip_gradients(self, largest, optimizer, scaler)


class ValidationCurve(Callback):
    """Log metrics of the validation part at intervals.

    Args:
        validate: Function that evaluates the validation part.
        schedule: Schedule of the training.
    """

    def __init__(self, validate: Callable[[], Mapping[str, float]], schedule: Schedule) -> None:
        self.validate, self.schedule = validate, schedule
        self._done = 0

    def state_dict(self) -> dict[str, Any]:
        return {"done": self._done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._done = state_dict["done"]

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        assert isinstance(module, TransferModule)
        due = int(self.schedule.progress() * EVALUATIONS + 1e-9)
        if due <= self._done or not trainer.is_global_zero:
            return
        self._done = due
        with module.averaged():
            values = {f"val_{name}": value for name, value in self.validate().items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=self.schedule.batches - 1)


def train(
    task: TransferModule[Any, Any],
    model: nn.Module,
    dataset: KeyedDataset,
    batch_size: int,
    settings: TransferSettings,
    validate: Callable[[], Mapping[str, float]] | None,
    hardware: Hardware | None = None,
    files: TrainingFiles = NO_FILES,
    weights: np.ndarray | None = None,
) -> None:
    """Train a model; it holds the weights of the last step afterwards, or their moving average.

    The learning rate falls to zero along a cosine, so that the last weights are the ones to keep:
    the best of several on few validation images would be chosen by chance.

    Args:
        task: Module with a ``training_step``.
        model: Model in the module; it is on the CPU afterwards.
        dataset: The training images.
        batch_size: Images per step.
        settings: Settings of the training.
        validate: Function that evaluates the validation part, for the curve; None without one.
        hardware: Hardware to train on; default one device.
        files: Files for metrics and checkpoints.
        weights: Sampling weights; see ``StreamSampler``.
    """
    hardware = hardware or Hardware(devices=1)
    if settings.batch_size is None:  # a multiple of the number of devices
        batch_size = max(1, batch_size // hardware.processes()) * hardware.processes()
    per_epoch = len(dataset) // batch_size
    epochs = settings.epochs or max(MIN_EPOCHS, math.ceil(STEPS / per_epoch))
    rate, seconds = settings.optimizer.lr, settings.seconds
    schedule = Schedule(
        rate, settings.warmup, settings.seed, None if seconds else epochs * per_epoch, seconds
    )
    stream = StreamData(
        dataset, batch_size, None if seconds else epochs, schedule, hardware.workers(), weights
    )
    callbacks = [] if validate is None else [ValidationCurve(validate, schedule)]
    fit(task, stream, schedule, hardware, callbacks, files, title="finetune")
    task.cpu()
    task.keep_average()


def save_with_head(model: nn.Module, encoder: Encoder, folder: Path, about: dict[str, Any]) -> None:
    """Write a model as ``encoder/`` in timm's format and a head.

    Args:
        model: Holds the encoder somewhere; all its other tensors are the head's.
        encoder: Encoder of the model.
        folder: The model folder.
        about: Record from which the head can be built again: ``task``, ``classes`` and so on.
    """
    save_encoder(encoder, folder / "encoder", about)
    inside = _prefix(model, encoder)
    head = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if not name.startswith(inside)
    }
    save_file(head, folder / HEAD_WEIGHTS)
    write_atomically(folder / HEAD, json.dumps(about, indent=2) + "\n")


def load_with_head(
    source: Path, task: str, build: Callable[[Encoder, dict[str, Any]], ModuleT]
) -> tuple[ModuleT, dict[str, Any]]:
    """Load a folder written by ``save_with_head``.

    Args:
        source: A run of ``finetune``, or the ``model`` folder in it.
        task: Task that the model must be for.
        build: Makes the model from the encoder and the content of ``head.json``.

    Returns:
        The model and the content of ``head.json``.

    Raises:
        UserError: There is no model for this task, or it is damaged.
    """
    folder = model_folder(source)
    about = read_head(folder)
    if about is None or about["task"] != task:
        raise UserError(
            f"{folder} is a model for {about['task'] if about else 'classification'}, "
            f"not for {task}"
        )
    encoder = load_encoder(folder / "encoder")
    weights = read_weights(folder / HEAD_WEIGHTS)
    try:
        # Built on the meta device first, to check that the file holds the tensors of the head.
        with torch.device("meta"):
            drawn = build(encoder, about)
        _compare(drawn, encoder, weights, folder)
        model = build(encoder, about)
    except BUILD_ERRORS as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else first_line(error)
        raise UserError(f"{folder / HEAD} is damaged: {reason}") from None
    load_tensors(model, weights, str(folder / HEAD_WEIGHTS))
    return model, about


def read_head(folder: Path) -> dict[str, Any] | None:
    """Read ``head.json`` and check its classes; None for a folder in timm's format.

    Args:
        folder: The model folder.

    Raises:
        UserError: It is damaged.
    """
    file = folder / HEAD
    if not file.is_file():
        return None
    about = read_json(file, largest=MAX_HEAD_BYTES)
    if not isinstance(about, dict):
        raise UserError(f"{file} is damaged: it holds no mapping")
    if not isinstance(about.get("task"), str):
        raise UserError(f"{file} is damaged: it names no task")
    try:
        checked_names(about.get("classes"), "classes")
    except TypeError as error:
        raise UserError(f"{file} is damaged: {error}") from None
    return about


def read_upright(folder: Path) -> bool:
    """Read whether the images that a model was trained on have an up.

    Args:
        folder: The model folder.

    Returns:
        True as well for a model that was not trained by ``finetune``, which does not record it.

    Raises:
        UserError: The record is damaged.
    """
    about = read_head(folder)
    file = folder / (ENCODER_CONFIG if about is None else HEAD)
    if about is None:
        about = read_model_config(file).get("vissl_lite", {})
    upright = about.get("upright", True)
    if not isinstance(upright, bool):
        raise UserError(f"{file} is damaged: upright is neither true nor false")
    return upright


def _compare(
    drawn: nn.Module, encoder: Encoder, weights: Mapping[str, Tensor], folder: Path
) -> None:
    """Raise a UserError if the weights do not fit the model without its encoder."""
    inside = _prefix(drawn, encoder)
    own = {
        name: tensor.shape
        for name, tensor in drawn.state_dict().items()
        if not name.startswith(inside)
    }
    for name in sorted(own.keys() | weights.keys()):
        if name not in own or name not in weights or own[name] != weights[name].shape:
            raise UserError(f"{folder} is damaged: its weights do not fit, as {name}")


def _prefix(model: nn.Module, encoder: Encoder) -> str:
    return next(f"{name}." for name, module in model.named_modules() if module is encoder)


def model_folder(source: Path) -> Path:
    """The folder of a fine-tuned model.

    Args:
        source: A run of ``finetune``, or the ``model`` folder in it.

    Raises:
        UserError: There is no model.
    """
    for folder in (source / "model", source):
        if (folder / HEAD).is_file() or (folder / ENCODER_CONFIG).is_file():
            return folder
    raise UserError(f"no model at {source}: give a run of finetune, or its model folder")
