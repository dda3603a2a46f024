"""Momentum teachers: exponential moving averages of a network."""

import copy
from dataclasses import dataclass
from typing import TypeVar

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.optim.swa_utils import get_ema_multi_avg_fn

from vissl_lite.encoders.drop_path import remove_drop_path
from vissl_lite.errors import check_positive, check_share
from vissl_lite.optim import cosine_schedule, warmed_up

Module = TypeVar("Module", bound=nn.Module)

# Attribute of the copies that ``make_teacher`` makes.
_MARK = "is_momentum_teacher"


def make_teacher(student: Module) -> Module:
    """Copy a network without gradients, dropout and stochastic depth.

    Some backbones of timm have stochastic depth or dropout by default, such as Swin Transformers.
    BatchNorms of the copy use the statistics of its own batches as long as it is in training mode.

    Args:
        student: Network to copy.
    """
    teacher = copy.deepcopy(student)
    vars(teacher)[_MARK] = True
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    remove_drop_path(teacher)
    for module in teacher.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        elif "drop_rate" in vars(module):  # of timm's models, before their classifier
            vars(module)["drop_rate"] = 0.0
        elif "aug_active" in vars(module):  # random scales of rotary positions, as in Sapiens 2
            vars(module)["aug_active"] = False
    return teacher


def has_teacher(module: nn.Module) -> bool:
    """Whether a module, or one in it, is a copy by ``make_teacher``."""
    return any(_MARK in vars(one) for one in module.modules())


def ema_update(
    teacher: nn.Module, student: nn.Module, momentum: float, norms: bool = False
) -> None:
    """Update the parameters of a teacher: t = m t + (1 - m) s (MoCo, eq. 2).

    Args:
        teacher: Copy of the student by ``make_teacher``.
        student: Network of the same structure.
        momentum: m, in [0, 1].
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
    if not teacher.training:
        # LeViT and others keep what they have computed from weights in evaluation mode.
        teacher.train().eval()


def momentum_after(steps: int) -> float:
    """Largest momentum of an average after a number of optimizer steps: (1 + n) / (10 + n).

    The average is then over about the last ninth of the steps: it forgets the initial weights soon,
    and short runs have a teacher that follows within tens of steps. It is 0.95 after 170 steps,
    0.99 after 890 and 0.996 after 2,240. As in TensorFlow's ``ExponentialMovingAverage``.

    Self-distilling pretexts, whose teacher must not follow too quickly, do without: with it, the
    linear accuracy of ``dino`` after two minutes on CIFAR-10 was 0.228 instead of 0.263.

    Args:
        steps: Number of optimizer steps, from 0.
    """
    return (1 + steps) / (10 + steps)


@dataclass(frozen=True)
class TeacherSchedule:
    """Momentum and softmax temperature of a self-distilling teacher over a run.

    Caron et al. 2021 (DINO), arXiv 2104.14294, section 3.3.

    Attributes:
        momentum: Initial momentum, in [0, 1]; increases to 1 along a cosine.
        warm_temperature: Initial softmax temperature, above 0.
        temperature: Softmax temperature after the warm-up, above 0.
        warmup: Fraction of the run in which the temperature goes from one to the other in a line.

    Raises:
        UserError: If one is out of range, by the name of its hyperparameter.
    """

    momentum: float
    warm_temperature: float
    temperature: float
    warmup: float

    def __post_init__(self) -> None:
        check_share("pretext.momentum", self.momentum)
        check_positive("pretext.warm_teacher_temperature", self.warm_temperature)
        check_positive("pretext.teacher_temperature", self.temperature)
        check_share("pretext.temperature_warmup", self.warmup)

    def momentum_at(self, progress: float) -> float:
        """Momentum after a fraction of the run, ``progress`` in [0, 1]."""
        return cosine_schedule(self.momentum, 1, progress)

    def temperature_at(self, progress: float) -> float:
        """Softmax temperature after a fraction of the run, ``progress`` in [0, 1]."""
        return warmed_up(self.warm_temperature, self.temperature, self.warmup, progress)
