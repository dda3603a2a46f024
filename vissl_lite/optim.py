"""Optimizers (timm's) and the learning-rate schedule."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, Literal

import timm.optim
import torch
from timm.models import group_parameters
from torch import nn
from torch.amp import GradScaler
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from vissl_lite.errors import (
    UserError,
    canonical_name,
    check_not_negative,
    check_positive,
    did_you_mean,
)

# Of a learning rate and a weight decay. Papers have up to 20 and so; float32 steps with 1e30 are
# not finite.
LARGEST_RATE = 1e6

# Layer-wise decay of a plain ViT by default.
VIT_LAYER_DECAY = 0.75


@dataclass(frozen=True)
class OptimizerSettings:
    """Settings of the optimizer.

    Attributes:
        name: A timm optimizer, such as ``adamw``, ``sgd`` or ``lars``.
        lr: Peak learning rate of the encoder.
        head_scale: Factor on the learning rate of all other parameters, such as heads.
        weight_decay: Weight decay of matrices and kernels; biases and norms have none.
        layer_decay: Factor on the learning rate from one layer to the one below it (BEiT, Bao et
            al. 2021); 1 trains all layers alike. None for 0.75 in plain ViTs, as in BEiT and MAE,
            and 1 in other networks.
        scaling: Scaling of the learning rate with the batch: ``linear`` (Goyal et al. 2017),
            ``sqrt`` (Malladi et al. 2022, for Adam) or ``none``.
        clip_norm: Largest norm of the gradient; 0 does not clip it.
        weight_decay_end: Weight decay at the end of the run, reached along half a cosine (DINO,
            Caron et al. 2021); None keeps it constant.
        betas: Decay rates of Adam's averages of the gradient and of its square; None for those of
            timm's optimizer, mostly (0.9, 0.999).
    """

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    layer_decay: float | None = 1.0
    scaling: Literal["linear", "sqrt", "none"] = "linear"
    clip_norm: float = 0.0
    weight_decay_end: float | None = None
    betas: tuple[float, float] | None = None
    head_scale: float = 1.0

    def scaled_lr(self, batch_size: int) -> float:
        """Scale a learning rate for 256 images to another batch size.

        Args:
            batch_size: Images an optimizer step, over all devices and accumulated batches.
        """
        return (
            self.lr * (batch_size / 256) ** {"linear": 1.0, "sqrt": 0.5, "none": 0.0}[self.scaling]
        )


def canonical_optimizer(name: str) -> str:
    """Return timm's name of an optimizer, which may be given in any case.

    Raises:
        UserError: If timm does not have it.
    """
    known = timm.optim.list_optimizers()
    found = canonical_name(name, known)
    if found not in known:
        raise UserError(f"unknown optimizer {name}: {did_you_mean(name, known)}")
    if found == "adahessian":
        raise UserError("--optimizer adahessian needs second derivatives, which are not computed")
    return found


def check_has_betas(name: str) -> None:
    """Raise a UserError if an optimizer has no betas."""
    if not timm.optim.get_optimizer_info(name).has_betas:
        raise UserError(f"--betas: {name} has none; adamw, adam and lamb have")


def check_rates(lr: float | None, weight_decay: float | None) -> None:
    """Raise a UserError for a learning rate or a weight decay that is out of range."""
    check_positive("lr", lr, LARGEST_RATE)
    check_not_negative("weight_decay", weight_decay, LARGEST_RATE)


def build_optimizer(
    module: nn.Module,
    settings: OptimizerSettings,
    encoder: nn.Module | None = None,
    constant: nn.Module | None = None,
    full_rate: Collection[str] = (),
) -> Optimizer:
    """Build the optimizer of a module's trainable parameters.

    Biases, norms, and what a timm model lists in ``no_weight_decay``, such as position embeddings,
    do not decay.

    Args:
        module: Module to optimize.
        settings: Settings of the optimizer.
        encoder: The timm model in the module that ``layer_decay`` applies to; default the module
            itself. ``head_scale`` applies to all other parameters.
        constant: Part of the module that keeps the peak learning rate during the whole run.
        full_rate: Names of parameters of the encoder that ``layer_decay`` does not apply to, such
            as ``Encoder.adapted_inputs``, whose filters are new however early their layer is;
            default none.

    Returns:
        An optimizer. ``set_lr`` and ``set_weight_decay`` follow the entries ``lr_scale``,
        ``in_encoder``, ``constant_lr`` and ``weight_decay_range`` of its parameter groups.
    """
    inner = module if encoder is None else encoder
    scales = _layer_scales(inner, settings.layer_decay)
    scales.update(dict.fromkeys(full_rate, 1.0))
    undecayed = _without_decay(module)
    kept = set() if constant is None else {id(parameter) for parameter in constant.parameters()}
    groups: dict[tuple[float, bool, bool, bool], list[nn.Parameter]] = {}
    known = {id(parameter): name for name, parameter in inner.named_parameters()}
    for parameter in module.parameters():
        if not parameter.requires_grad:
            continue
        name = known.get(id(parameter))
        scale = settings.head_scale if name is None else scales.get(name, 1.0)
        decayed = parameter.ndim > 1 and id(parameter) not in undecayed
        kind = (scale, decayed, name is not None, id(parameter) in kept)
        groups.setdefault(kind, []).append(parameter)
    decay, end = settings.weight_decay, settings.weight_decay_end
    rising = {} if end is None else {"weight_decay_range": (decay, end)}
    optimizer: Optimizer = timm.optim.create_optimizer_v2(
        [
            {
                "params": parameters,
                "lr_scale": scale,
                "in_encoder": in_encoder,
                "constant_lr": constant_lr,
                "decayed": decayed,
                "weight_decay": decay if decayed else 0.0,
                **(rising if decayed else {}),
            }
            for (scale, decayed, in_encoder, constant_lr), parameters in groups.items()
        ],
        opt=settings.name,
        lr=settings.lr,
        momentum=0.9,
        **({} if settings.betas is None else {"betas": settings.betas}),
        **_own_clipping(settings),
        **_fused(settings.name, module),
    )
    if isinstance(optimizer, SGD) and optimizer.defaults["fused"]:
        _start_momentum(optimizer)
    return optimizer


def _start_momentum(optimizer: SGD) -> None:
    """Give all parameters a momentum of zero, from which the first step is as without one.

    The fused kernel takes the first step of all parameters to be the same one, and fails on a
    parameter that gets its first gradient later, such as a last layer that is frozen at first.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            momentum = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            optimizer.state[parameter]["momentum_buffer"] = momentum


def default_layer_decay(model: nn.Module) -> float:
    """Layer-wise decay for pre-trained weights of a timm model; see ``OptimizerSettings``."""
    plain = hasattr(model, "patch_embed") and hasattr(model, "blocks")
    return VIT_LAYER_DECAY if plain else 1.0


def layer_matcher(model: nn.Module) -> Any:
    """How timm groups the parameters of a model into layers; None where it does not say."""
    matcher = getattr(model, "group_matcher", None)
    try:
        return None if matcher is None else matcher(coarse=True)
    except (AssertionError, NotImplementedError):  # as of RDNet
        return None


def check_layer_decay(model: nn.Module, decay: float | None) -> None:
    """Raise a UserError if timm does not say which layers a model has, and these matter."""
    _layer_scales(model, decay)


def _layer_scales(model: nn.Module, decay: float | None) -> dict[str, float]:
    """Factor on the learning rate of each parameter of a timm model; empty for 1.

    A layer is a block of a plain ViT, and a stage of a convolutional or hierarchical network, whose
    blocks differ in number: a ResNet-50 and a ResNet-18 have the same six layers.
    """
    if decay is None:
        decay = default_layer_decay(model)
    if decay == 1:
        return {}
    matcher = layer_matcher(model)
    if matcher is None:
        raise UserError("--layer_decay: timm does not say which layers this backbone has")
    layers = group_parameters(model, matcher, reverse=True)
    last = max(layers.values())
    return {name: decay ** (last - layer) for name, layer in layers.items()}


def _without_decay(module: nn.Module) -> set[int]:
    """The ``id`` of each parameter that a timm model in the module excludes from weight decay."""
    found: set[int] = set()
    for model in module.modules():
        listed = getattr(model, "no_weight_decay", None)
        patterns = listed() if callable(listed) else ()
        for name, parameter in model.named_parameters() if patterns else ():
            if any(fnmatch(name, pattern) for pattern in patterns):
                found.add(id(parameter))
    return found


def _own_clipping(settings: OptimizerSettings) -> dict[str, None]:
    """Options that switch off LAMB's own clipping of gradients at a norm of 1.

    Without ``clip_norm`` it stays, as it is part of the optimizer (You et al. 2020).
    """
    kind = timm.optim.get_optimizer_class(settings.name, bind_defaults=False)
    return {"max_grad_norm": None} if kind is timm.optim.Lamb and settings.clip_norm else {}


def _fused(name: str, module: nn.Module) -> dict[str, bool]:
    """Options for the fused kernels of torch's own optimizers.

    A step of ``resnet18`` on one core: AdamW 98 to 22 ms, SGD 95 to 14 ms. For a network in parts
    (``--strategy fsdp``) torch has none of SGD's.
    """
    able: tuple[type[Optimizer], ...] = (AdamW, Adam, SGD)
    if any(isinstance(weight, DTensor) for weight in module.parameters()):
        able = (AdamW, Adam)
    fits = timm.optim.get_optimizer_class(name, bind_defaults=False) in able
    return {"fused": True} if fits else {}


def clip_gradients(
    module: nn.Module, max_norm: float, optimizer: Optimizer, scaler: GradScaler | None
) -> None:
    """Clip the gradients of a module to a norm.

    Args:
        module: Module with gradients.
        max_norm: Largest norm of all gradients together.
        optimizer: Optimizer that is about to step.
        scaler: What has scaled the loss, with float16. A fused optimizer takes the scale out of the
            gradients as it steps, and Lightning leaves that to it: too late for what is clipped.
    """
    if scaler is not None and optimizer.defaults.get("fused"):
        scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(module.parameters(), max_norm)


def set_lr(optimizer: Optimizer, lr: float, head_lr: float | None = None) -> None:
    """Set the learning rate of all groups, times their ``lr_scale`` (layer decay, ``head_scale``).

    Groups with ``constant_lr`` keep the rate that the optimizer was built with, times ``lr_scale``.

    Args:
        optimizer: Optimizer by ``build_optimizer``.
        lr: Learning rate of the encoder.
        head_lr: Learning rate of all other parameters; default the same.
    """
    head_lr = lr if head_lr is None else head_lr
    for group in optimizer.param_groups:
        rate = lr if group.get("in_encoder", True) else head_lr
        if group.get("constant_lr"):
            rate = optimizer.defaults["lr"]
        group["lr"] = rate * group.get("lr_scale", 1.0)


def set_weight_decay(optimizer: Optimizer, progress: float) -> None:
    """Set the weight decay of the groups whose ``weight_decay_range`` says that it changes.

    Args:
        optimizer: Optimizer by ``build_optimizer``.
        progress: Completed fraction of the run, in [0, 1].
    """
    for group in optimizer.param_groups:
        if "weight_decay_range" in group:
            start, end = group["weight_decay_range"]
            group["weight_decay"] = cosine_schedule(start, end, progress)


def cosine_with_warmup(fraction: float, warmup: float) -> float:
    """Factor of the peak learning rate: a linear warm-up, then half a cosine to 0.

    SGDR (Loshchilov & Hutter 2017, eq. 5) without restarts.

    Args:
        fraction: Fraction of the training that is done, in [0, 1].
        warmup: Share of the training in which the rate rises, in [0, 1).
    """
    if fraction < warmup:
        return fraction / warmup
    return cosine_schedule(1.0, 0.0, min(1.0, (fraction - warmup) / (1 - warmup)))


def warmed_up(start: float, end: float, share: float, progress: float) -> float:
    """A line from ``start`` to ``end`` over the first part of the way, then ``end``.

    Args:
        start: Value at progress 0.
        end: Value from progress ``share`` on.
        share: Share of the way that the line takes, in [0, 1].
        progress: Share of the way, in [0, 1].
    """
    return end if progress >= share else start + (end - start) * progress / share


def cosine_schedule(start: float, end: float, progress: float) -> float:
    """Half a cosine from ``start`` to ``end``.

    Args:
        start: Value at progress 0.
        end: Value at progress 1.
        progress: Share of the way, in [0, 1].
    """
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
