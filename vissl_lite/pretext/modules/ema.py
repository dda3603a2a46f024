"""Momentum teachers: exponential moving averages of a network."""

import copy
from typing import TypeVar

from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

Module = TypeVar("Module", bound=nn.Module)


def make_teacher(student: Module) -> Module:
    """Copy a network without gradients.

    Its BatchNorms use the statistics of its own batches as long as it is in training mode.

    Args:
        student: Network to copy.
    """
    teacher = copy.deepcopy(student)
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    return teacher


def ema_update(
    teacher: nn.Module, student: nn.Module, momentum: float, norms: bool = False
) -> None:
    """Update the parameters of a teacher: t = m t + (1 - m) s (MoCo, eq. 2).

    Args:
        teacher: Copy of the student by ``make_teacher``.
        student: Network of the same structure.
        momentum: M, in [0, 1].
        norms: Whether the running statistics of BatchNorms are updated in the same way, for a
            teacher in evaluation mode (EMAN, Cai et al. 2021, arXiv 2101.08482, eq. 7). Without
            it, buffers are left alone.
    """
    update = get_ema_multi_avg_fn(momentum)
    update(list(teacher.parameters()), list(student.parameters()), None)
    if norms:
        statistics = [
            [one for one in network.buffers() if one.is_floating_point()]
            for network in (teacher, student)
        ]
        if statistics[0]:
            update(*statistics, None)
