"""Momentum teachers: copies of a network that follow it slowly and get no gradient."""

import copy
from typing import TypeVar

from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

Module = TypeVar("Module", bound=nn.Module)


def make_teacher(student: Module) -> Module:
    """A copy that gets no gradient. It stays in training mode: its BatchNorms see its own batches.

    Args:
        student: Module to copy.
    """
    teacher = copy.deepcopy(student)
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    return teacher


def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move a teacher's parameters towards the student's: t = m t + (1 - m) s (MoCo, eq. 2).

    Args:
        teacher: A ``make_teacher`` of the student. Its buffers are its own.
        student: Student of the same structure.
        momentum: M, in [0, 1].
    """
    update = get_ema_multi_avg_fn(momentum)
    update(list(teacher.parameters()), list(student.parameters()), None)
