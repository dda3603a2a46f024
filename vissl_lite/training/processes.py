"""The processes of a distributed run, as one: joining their tensors, with gradient."""

from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    """All processes' tensors, joined; the gradient comes back from all of them."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)  # every process's loss depends on this process's tensor
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def world() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) outside distributed training."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(tensor: Tensor) -> Tensor:
    """Join a tensor over all processes, with gradient.

    Args:
        tensor: ``(B, ...)``, of the same shape in every process.

    Returns:
        ``(B * world, ...)``, in the order of ranks; the tensor itself in a single process.
    """
    return _Gather.apply(tensor) if world()[1] > 1 else tensor


def trainer_of(module: pl.LightningModule) -> Any:
    """The trainer that runs a module; None outside a training."""
    try:
        return module.trainer
    except RuntimeError:  # Lightning's only way to say so
        return None
