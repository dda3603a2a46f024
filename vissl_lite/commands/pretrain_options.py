"""Options of ``vissl-lite pretrain``: checked, with what they stand for."""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vissl_lite.data.images import suitable_size
from vissl_lite.encoder import Encoder, build_encoder
from vissl_lite.encoder_folder import load_encoder, load_weights
from vissl_lite.errors import (
    UserError,
    brief,
    check_count,
    check_hyperparameters,
    check_image_size,
    check_positive,
    check_seed,
    check_warmup,
    did_you_mean,
)
from vissl_lite.optim import LARGEST_RATE, OptimizerSettings, check_optimizer, check_rates
from vissl_lite.pretext import PRETEXTS, pretext_class
from vissl_lite.pretext.base import PretextTask
from vissl_lite.training.loggers import logger_names
from vissl_lite.training.resizing import SMALLEST

LONGEST_DAYS = 3650  # of training
LARGEST_STEP = 100_000  # batches


@dataclass(frozen=True)
class Options:
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
    progressive_resizing: bool
    init: str
    probe_data: str | None
    optimizer: str | None
    lr: float | None
    base_lr: float | None
    weight_decay: float | None
    warmup: float
    on_collapse: str
    logger: list[str] | str | None
    cache: bool
    seed: int

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            check_count(name, getattr(self, name))
        check_count("accumulate_grad_batches", self.accumulate_grad_batches, LARGEST_STEP)
        check_image_size(self.image_size)
        parse_time(self.max_time)
        if self.epochs is not None and self.max_time is not None:
            raise UserError(
                "give --epochs or --max_time, not both (--epochs null takes back a --config's)"
            )
        check_warmup("warmup", self.warmup)
        check_rates(self.lr, self.weight_decay)
        check_positive("base_lr", self.base_lr, LARGEST_RATE)
        if self.lr is not None and self.base_lr is not None:
            raise UserError("give --lr or --base_lr, not both")
        check_seed(self.seed)
        if self.on_collapse not in ("warn", "stop"):
            raise UserError(f"--on_collapse {self.on_collapse} is neither warn nor stop")
        logger_names(self.logger)
        if self.optimizer is not None:
            check_optimizer(self.optimizer)

    def task(self, encoder: Encoder) -> PretextTask:
        hyperparameters = {k: v for k, v in self.pretext.items() if k != "name"}
        task = pretext_class(self.pretext["name"])(encoder, **hyperparameters)
        if self.progressive_resizing:
            _check_resizing(task)
        return task

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


def _check_resizing(task: PretextTask) -> None:
    if not task.about.any_size:
        able = ", ".join(name for name, made in PRETEXTS.items() if made.about.any_size)
        raise UserError(
            f"--progressive_resizing: the views of {task.about.name} can't change their size; "
            f"those of {able} can"
        )
    encoder = task.encoder
    try:
        encoder.check_image_size(encoder.fitting_size(encoder.image_size * SMALLEST))
    except UserError as error:
        raise UserError(f"--progressive_resizing: {error}") from None


def parse_time(text: str | int | None) -> float | None:
    """Seconds from ``HH:MM:SS``, ``MM:SS``, seconds, or days as in ``1-00:00:00``.

    Raises:
        UserError: it is none of these, not above 0, or longer than ten years.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(?:(?:(?:(\d+)[-:])?(\d+):)?(\d+):)?(\d+)", str(text).strip())
    if match is None:
        raise UserError(f"--max_time {brief(text)} is no time: give HH:MM:SS or seconds")
    if len(match[0]) > 20:
        raise UserError(f"--max_time {brief(text)} is longer than {LONGEST_DAYS} days")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise UserError(f"--max_time {text} leaves no time")
    if total > LONGEST_DAYS * 24 * 60 * 60:
        raise UserError(f"--max_time {text} is longer than {LONGEST_DAYS} days")
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
    check_hyperparameters(pretext_class(name), given)
    return {"name": name, **known, **given}
