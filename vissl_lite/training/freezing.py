"""Freezing: which weights of a pre-trained encoder are trained, and from when on."""

import logging
import re
from collections.abc import Iterator

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from timm.models import group_parameters
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from vissl_lite.data.stream import Batch
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.encoders.lora import adapters, add_adapters
from vissl_lite.errors import UserError, brief
from vissl_lite.optim import layer_matcher
from vissl_lite.training.schedule import Schedule

log = logging.getLogger(__name__)

ALL_PARTS = "all"


def check_parts(parts: str) -> None:
    """Raise a UserError if ``parts`` is not a value of ``--train``; see ``select_parameters``."""
    if not re.fullmatch(r"all|norms|attn_proj|(blocks|lora):[1-9]\d{0,3}", parts):
        raise UserError(
            f"--train {brief(parts)} is not all, blocks:N (such as blocks:2), norms, attn_proj or "
            f"lora:RANK (such as lora:16)"
        )


def lora_rank(parts: str) -> int | None:
    """Rank of the low-rank adapters that a value of ``--train`` asks for; None for other values."""
    return int(parts.removeprefix("lora:")) if parts.startswith("lora:") else None


def select_parameters(encoder: Encoder, parts: str) -> set[str]:
    """Names of the parameters of an encoder's timm model that ``--train`` selects.

    Args:
        encoder: Encoder to train.
        parts: ``all``; ``blocks:N`` for the last N blocks of a ViT, or stages of another backbone,
            and what follows them; ``norms`` for the scales and shifts of normalization layers
            (LN-Tune, Basu et al. 2023, arXiv 2304.01917); ``attn_proj`` for the output projections
            of attention layers (APLA, Sorkhei et al. 2025, arXiv 2503.11335); or ``lora:RANK`` for
            the low-rank adapters that ``add_adapters`` has added.

    Raises:
        UserError: The backbone has no such parameters.
    """
    model = encoder.model
    names = [name for name, _ in model.named_parameters()]
    if parts == ALL_PARTS:
        return set(names)
    if parts == "norms":
        found = {
            f"{place}.{name}"
            for place, module in model.named_modules()
            if _is_norm(module)
            for name, _ in module.named_parameters(recurse=False)
        }
        kind = "normalization layers with weights"
    elif parts == "attn_proj":
        found = {name for name in names if re.search(r"(^|\.)attn\.proj\.(weight|bias)$", name)}
        kind = "attention layers with an output projection as in a ViT"
    elif lora_rank(parts):
        found = {
            f"{place}.{name}"
            for place, adapter in adapters(model)
            for name, _ in adapter.named_parameters()
        }
        kind = "low-rank adapters"
    else:
        found = _last_blocks(encoder, int(parts.removeprefix("blocks:")))
        kind = "blocks or stages that timm tells apart"
    if not found:
        raise UserError(
            f"--train {parts}: {encoder.backbone} has no {kind}; --train all trains all of it"
        )
    return found


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalization layer by its name, unlike a block without any."""
    name = type(module).__name__.lower()
    return "norm" in name and "normfree" not in name


def _last_blocks(encoder: Encoder, count: int) -> set[str]:
    """Parameters of the last blocks, by the layers that layer-wise decay is based on as well."""
    model = encoder.model
    matcher = layer_matcher(model)
    if not isinstance(matcher, dict) or not matcher.get("blocks"):
        return set()
    layers = group_parameters(model, matcher, reverse=True)
    patterns = matcher["blocks"]
    patterns = [patterns] if isinstance(patterns, str) else [pattern for pattern, _ in patterns]
    # A number in the pattern is that of a block; other patterns are of what follows the blocks.
    numbered = [pattern for pattern in patterns if re.compile(pattern).groups]
    blocks = sorted(
        {layers[name] for name in layers if any(re.match(one, name) for one in numbered)}
    )
    if count > len(blocks):
        raise UserError(
            f"--train blocks:{count}: {encoder.backbone} has {len(blocks)} blocks or stages; "
            f"--train all trains all of them"
        )
    first = blocks[-count]
    return {name for name, layer in layers.items() if layer >= first}


def train_only(encoder: Encoder, parts: str) -> None:
    """Leave all parameters of an encoder but those of ``select_parameters`` without gradients.

    Parameters in ``Encoder.adapted_inputs`` are trained whatever ``parts`` is: a frozen network
    would not tell the bands apart whose filters are the same.

    For ``lora:RANK``, low-rank adapters are added first. Call it before a pretext copies the
    encoder, so that its momentum teachers have the same parameters. A parameter that is frozen
    already stays so.

    Args:
        encoder: Encoder to train.
        parts: Value of ``--train``.

    Raises:
        UserError: The backbone has no such parameters.
    """
    rank = lora_rank(parts)
    if rank is not None:
        add_adapters(encoder, rank)
    chosen = select_parameters(encoder, parts) | encoder.adapted_inputs
    for name, parameter in encoder.model.named_parameters():
        if name not in chosen:
            parameter.requires_grad_(False)


class FrozenParts(Callback):
    """Train the heads alone at first, and keep the BatchNorms of frozen parts as they are.

    Random heads send random gradients into pre-trained weights (Kumar et al. 2022, arXiv
    2202.10054, on fine-tuning), so the encoder waits for them. BatchNorms of frozen parts use and
    keep their running statistics, in the encoder as in a pretext's momentum teachers, which have
    the same frozen parts. ``Encoder.adapted_inputs`` wait like the rest of the encoder: their
    filters are means or repetitions of pre-trained ones. The state follows from the schedule, so
    nothing is kept for a resumed run.

    Args:
        schedule: Schedule of the run, whose ``freeze_share`` says how long the heads are alone.
        encoder: Encoder to train, after ``train_only``.
    """

    def __init__(self, schedule: Schedule, encoder: Encoder) -> None:
        self.schedule, self.encoder = schedule, encoder
        self._heads_only: bool | None = None  # None before the first step

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        weights = list(self.encoder.parameters())
        trained = sum(one.numel() for one in weights if one.requires_grad)
        total = sum(one.numel() for one in weights)
        log.info("%.3g %% of the weights of the encoder are trained", 100 * trained / total)
        if self.schedule.freeze_share:
            log.info(
                "In the first %.3g %% of the run the heads of the pretext are trained alone; "
                "--freeze_share 0 trains the encoder from the start",
                100 * self.schedule.freeze_share,
            )

    def on_train_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        heads_only = self.schedule.encoder_frozen
        if heads_only == self._heads_only:
            return
        self._heads_only = heads_only
        module.train()  # a pretext may keep a teacher in evaluation mode
        norms = dict(_batch_norms(self.encoder))
        for one in module.modules():
            if isinstance(one, Encoder):  # the encoder, or a teacher of it
                for name, norm in _batch_norms(one):
                    if heads_only or _is_frozen(norms[name]):
                        norm.eval()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        # Without a gradient, an optimizer does not change a weight or its state. (The gradients are
        # computed all the same: DistributedDataParallel waits for those that it was told of.)
        if self._heads_only:
            for parameter in self.encoder.parameters():
                parameter.grad = None


def _batch_norms(encoder: Encoder) -> Iterator[tuple[str, _BatchNorm]]:
    for name, module in encoder.model.named_modules():
        if isinstance(module, _BatchNorm):
            yield name, module


def _is_frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters(recurse=False))
    return bool(parameters) and not any(one.requires_grad for one in parameters)
