"""Losses as pure functions, and the gathering across processes that some of them need."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
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


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross-entropy (SimCLR, Chen et al. 2020, eq. 1).

    Every embedding has to find the other view of its image among all other embeddings of both
    views, those of other processes included. The mean of the processes' losses is the loss of the
    joined batch, and so is its gradient.

    Args:
        z1: ``(B, D)`` embeddings of the first views; need not be normalised.
        z2: ``(B, D)`` of the second views.
        temperature: above 0.

    Returns:
        A scalar, the mean over this process's 2 B embeddings. Computed in float32.
    """
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = F.normalize(z1.float(), dim=1), F.normalize(z2.float(), dim=1)
        rank, size = len(z1) * world()[0], len(z1)
        others = torch.cat([gather(z1), gather(z2)])
        total = len(others) // 2
        own = torch.arange(size, device=z1.device) + rank
        similarity = torch.cat([z1, z2]) @ others.T / temperature
        itself = torch.cat([own, own + total])
        partner = torch.cat([own + total, own])
        similarity = similarity.scatter(1, itself[:, None], float("-inf"))
        return F.cross_entropy(similarity, partner)
