"""Momentum teachers: exponential moving averages of a network."""

import copy
from typing import TypeVar

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
