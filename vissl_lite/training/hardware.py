"""Where and how to compute: devices, precision, data workers."""

import os
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Hardware:
    """Where and how to compute; Lightning's names and meanings.

    Attributes:
        precision: ``auto``, or a precision of Lightning such as ``32-true`` or ``bf16-mixed``.
        devices: number of devices, or ``auto``.
        num_nodes: number of machines.
        strategy: ``auto``, ``ddp`` and so on.
        num_workers: data workers a device; None decides by the cores there are.
    """

    precision: str = "auto"
    devices: int | str = "auto"
    num_nodes: int = 1
    strategy: str = "auto"
    num_workers: int | None = None

    def workers(self) -> int:
        """Data workers for each device.

        A worker feeds several hundred images a second; beside a training step on the CPU itself,
        one is enough, and more take cores away from it.
        """
        if self.num_workers is not None:
            return self.num_workers
        if not torch.cuda.is_available():
            return 1
        return max(1, min(16, _cores() // max(1, torch.cuda.device_count())))


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def choose_precision(precision: str, model: nn.Module) -> str:
    """The precision for ``auto``: bf16 where it is faster.

    On CPUs with bf16 instructions that is so for plain convolutions and transformers (ResNet-18 at
    224 pixels: 2.0 times as fast as float32), not for depthwise convolutions (MobileNet,
    EfficientNet, ConvNeXt: no gain).
    """
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
    depthwise = any(
        isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1 for m in model.modules()
    )
    return "bf16-mixed" if cpu_has_bf16() and not depthwise else "32-true"


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware (AVX512-BF16, AMX)."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # a torch without oneDNN
        return False
