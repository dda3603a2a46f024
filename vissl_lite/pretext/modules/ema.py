"""Momentum teachers: exponential moving averages of a network."""

import copy
from typing import TypeVar

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

Module = TypeVar("Module", bound=nn.Module)


def make_teacher(student: Module) -> Module:
    """Copy a network without gradients.

    The copy stays in training mode: its BatchNorms use the statistics of its own batches.

    Args:
        student: Network to copy.
    """
    teacher = copy.deepcopy(student)
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    return teacher


def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Update the parameters of a teacher: t = m t + (1 - m) s (MoCo, eq. 2).

    Args:
        teacher: Copy of the student by ``make_teacher``; its buffers are not updated.
        student: Network of the same structure.
        momentum: M, in [0, 1].
    """
    update = get_ema_multi_avg_fn(momentum)
    update(list(teacher.parameters()), list(student.parameters()), None)


@torch.no_grad()
def average_buffers(average: nn.Module, network: nn.Module, momentum: float) -> None:
    """Update the buffers of a moving average that is never trained itself.

    Its BatchNorms see no batches, so their running statistics are averaged like its parameters.

    Args:
        average: Copy of the network by ``make_teacher``.
        network: Network of the same structure.
        momentum: M, in [0, 1].
    """
    for mean, value in zip(average.buffers(), network.buffers(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(value, 1 - momentum)
        else:
            mean.copy_(value)
