"""Exchange between the processes of a distributed run: gathering with gradients, and broadcast."""

from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor

ValueT = TypeVar("ValueT")


class _Gather(torch.autograd.Function):
    """Gather a tensor over all processes; gradients of all processes are summed."""

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
    """The rank of this process and the number of processes; (0, 1) if not distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(tensor: Tensor) -> Tensor:
    """Concatenate a tensor over all processes, with gradients.

    Args:
        tensor: ``(B, ...)``, of the same shape in every process.

    Returns:
        ``(B * world, ...)``, in the order of ranks; the tensor itself in a single process.
    """
    return _Gather.apply(tensor) if world()[1] > 1 else tensor


def of_main_process(value: ValueT) -> ValueT:
    """The value that the main process has, for decisions that all processes must take alike.

    Args:
        value: This process's value, which can be pickled.
    """
    if world()[1] == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def trainer_of(module: pl.LightningModule) -> Any:
    """The trainer of a module; None outside of a training."""
    try:
        return module.trainer
    except RuntimeError:  # Lightning's only way to say so
        return None
