"""Momentum teachers: copies of a network that follow it slowly and get no gradient."""

import copy
import math
from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def frozen_copy(student: Module) -> Module:
    """A copy that gets no gradient. It stays in training mode: its BatchNorms see its own batches.

    Args:
        student: what to copy.
    """
    teacher = copy.deepcopy(student)
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    return teacher


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move a teacher's parameters towards the student's: t = m t + (1 - m) s (MoCo, eq. 2).

    Args:
        teacher: a ``frozen_copy`` of the student. Its buffers are its own.
        student: of the same structure.
        momentum: m, in [0, 1].
    """
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)


def cosine(start: float, end: float, progress: float) -> float:
    """From ``start`` to ``end`` along half a cosine (BYOL, Grill et al. 2020, section 3.3).

    Args:
        start: value at progress 0.
        end: value at progress 1.
        progress: share of the training that is done, in [0, 1].
    """
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
