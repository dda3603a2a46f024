"""Fine-tuning for any task: settings, training loop, early stopping, model folders."""

import copy
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import save_file
from torch import Tensor, nn

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
from vissl_lite.optim import OptimizerSettings
from vissl_lite.training.fit import NO_FILES, TrainingFiles, fit
from vissl_lite.training.hardware import Hardware
from vissl_lite.training.schedule import Schedule
from vissl_lite.training.stream import StreamData

log = logging.getLogger(__name__)

# Number of evaluations on the validation part during a training.
EVALUATIONS = 25

HEAD, HEAD_WEIGHTS = "head.json", "head.safetensors"
MAX_HEAD_BYTES = 16 * 2**20  # bytes of head.json

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class TransferSettings:
    """Settings of fine-tuning for any task.

    Attributes:
        frozen: Train the head alone, on the encoder as it is.
        epochs: None for as many as make 1,000 steps, between 10 and 100.
        batch_size: None for the task's own, or a quarter of the images where they are few.
        optimizer: Name, peak learning rate, weight decay, layer-wise decay.
        warmup: Share of the training in which the learning rate rises.
        patience: Stop after so many evaluations on the validation part without a better metric;
            there are 25 looks in a training. None never stops early.
        min_crop_scale: Smallest share of the image's area in a training view.
        upright: Whether the images have an up; without one they are turned and flipped.
        seed: Seed of everything random.
        pretrained: Whether the encoder's weights are more than random ones.
    """

    frozen: bool = False
    epochs: int | None = None
    batch_size: int | None = None
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    warmup: float = 0.1
    patience: int | None = 10
    min_crop_scale: float = 0.35
    upright: bool = True
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
        return self.batch_size or max(min(usual, images // 4), min(8, images))


class EvalResult(NamedTuple):
    """Result of an evaluation on the validation part.

    Attributes:
        rank: Larger is better; the first number decides, the others where it is equal.
        values: Values to log, by name.
    """

    rank: tuple[float, ...]
    values: dict[str, float]


class BestWeights(Callback):
    """Evaluate on the validation part at intervals, keep the best weights and stop early.

    Args:
        model: Model to keep the weights of.
        evaluate: Function that evaluates the validation part.
        schedule: Schedule of the training.
        every: Batches between two evaluations; one more follows the last batch.
        patience: See ``TransferSettings``.
    """

    def __init__(
        self,
        model: nn.Module,
        evaluate: Callable[[], EvalResult],
        schedule: Schedule,
        every: int,
        patience: int | None,
    ) -> None:
        self.model, self.evaluate, self.schedule = model, evaluate, schedule
        self.every, self.patience = every, patience
        self.best: tuple[float, ...] = ()
        self.weights: dict[str, Tensor] = {}
        self._since_best = 0

    def state_dict(self) -> dict[str, Any]:
        return {"best": list(self.best), "weights": self.weights, "since_best": self._since_best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        own, weights = self.model.state_dict(), state_dict["weights"]
        shapes = {name: one.shape for name, one in weights.items() if isinstance(one, Tensor)}
        if weights and shapes != {name: one.shape for name, one in own.items()}:
            raise UserError("the best weights in the checkpoint are damaged, or of another model")
        self.best, self.weights = tuple(state_dict["best"]), weights
        self._since_best = state_dict["since_best"]

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        if self.schedule.batches % self.every and self.schedule.batches != self.schedule.total:
            return
        seen = self.evaluate()
        for logger in trainer.loggers:
            logger.log_metrics(seen.values, step=self.schedule.batches - 1)
        self._since_best = 0 if seen.rank[:1] > self.best[:1] else self._since_best + 1
        if seen.rank > self.best:
            self.best = tuple(map(float, seen.rank))
            self.weights = copy.deepcopy(self.model.state_dict())
        if self.patience is not None and self._since_best >= self.patience:
            trainer.should_stop = True


def train(
    task: pl.LightningModule,
    model: nn.Module,
    dataset: KeyedDataset,
    batch_size: int,
    settings: TransferSettings,
    evaluate: Callable[[], EvalResult] | None,
    hardware: Hardware | None = None,
    files: TrainingFiles = NO_FILES,
    title: str = "finetune",
    weights: np.ndarray | None = None,
) -> None:
    """Train a model; it holds the weights with the best validation metric afterwards.

    Args:
        task: Module with ``training_step`` and ``configure_optimizers``.
        model: Model in the module; it is on the CPU afterwards.
        dataset: The training images.
        batch_size: Images per step.
        settings: Settings of the training.
        evaluate: Function that evaluates the validation part; None to keep the last weights.
        hardware: Hardware to train on; default one device.
        files: Files for metrics and checkpoints; a checkpoint holds the best weights so far, too.
        title: Title of the progress bar.
        weights: Sampling weights; see ``StreamSampler``.
    """
    per_epoch = len(dataset) // batch_size
    epochs = settings.epochs or min(100, max(10, math.ceil(1000 / per_epoch)))
    total = epochs * per_epoch
    schedule = Schedule(settings.optimizer.lr, settings.warmup, settings.seed, total)
    hardware = hardware or Hardware(devices=1)
    stream = StreamData(dataset, batch_size, epochs, schedule, hardware.workers(), weights)
    best = None
    if evaluate is not None:
        every = max(per_epoch, math.ceil(total / EVALUATIONS))
        best = BestWeights(model, evaluate, schedule, every, settings.patience)
    fit(task, stream, schedule, hardware, [best] if best else [], files, title=title)
    if best and best.weights:
        model.load_state_dict(best.weights)
    model.cpu()


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
