from typing import Self

import pytest
import torch
from timm.layers import DropPath

from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.errors import UserError
from vissl_lite.pretext.modules.ema import (
    TeacherSchedule,
    ema_update,
    has_teacher,
    make_teacher,
    momentum_after,
)


def test_follow_moves_parameters_by_the_momentum_and_leaves_buffers() -> None:
    student = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    teacher = make_teacher(student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    student(torch.randn(8, 3))
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    ema_update(teacher, student, 0.75)
    for name, parameter in teacher.named_parameters():
        expected = 0.75 * before[name] + 0.25 * student.get_parameter(name)
        torch.testing.assert_close(parameter, expected)
    assert (teacher[1].running_mean == 0).all()


def test_a_teacher_has_neither_dropout_nor_stochastic_depth() -> None:
    student = build_encoder("test_vit", 32).model
    student.drop_rate = 0.5  # as of GhostNet, before its classifier
    student.blocks[0].drop_path1 = DropPath(0.5)
    student.pos_drop = torch.nn.Dropout(0.5)
    teacher, images = make_teacher(student).train(), torch.randn(4, 3, 32, 32)
    assert not torch.equal(student.train()(images), student(images))
    assert torch.equal(teacher(images), teacher(images))
    assert torch.equal(teacher(images), student.eval()(images))


def test_statistics_of_norms_follow_if_asked_for() -> None:
    student = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    teacher = make_teacher(student)
    student(torch.randn(8, 3))
    ema_update(teacher, student, 0.75, norms=True)
    torch.testing.assert_close(teacher[1].running_mean, 0.25 * student[1].running_mean)
    expected = 0.75 + 0.25 * student[1].running_var
    torch.testing.assert_close(teacher[1].running_var, expected)
    assert teacher[1].num_batches_tracked == 0


def test_what_a_teacher_keeps_of_its_weights_is_computed_anew() -> None:
    """timm's LeViT keeps its attention biases in evaluation mode until it is trained again."""

    class Keeping(torch.nn.Linear):
        kept: torch.Tensor | None = None

        def train(self, mode: bool = True) -> Self:
            self.kept = None if mode else self.kept
            return super().train(mode)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            self.kept = 2 * self.weight if self.kept is None else self.kept
            return input @ self.kept.T

    student = Keeping(2, 2)
    teacher = make_teacher(student).eval()
    teacher(torch.ones(1, 2))
    with torch.no_grad():
        student.weight.zero_()
    ema_update(teacher, student, 0.0)
    assert (teacher(torch.ones(1, 2)) == 0).all()
    assert not teacher.training


def test_a_teacher_in_a_module_is_found() -> None:
    student = torch.nn.Linear(2, 2)
    assert not has_teacher(torch.nn.ModuleList([student]))
    assert has_teacher(torch.nn.ModuleList([student, make_teacher(student)]))


def test_an_average_is_over_a_ninth_of_the_steps_so_far() -> None:
    values = [momentum_after(steps) for steps in range(2000)]
    assert values[0] == 0.1
    assert (values[170], values[890]) == pytest.approx((0.95, 0.99), abs=1e-4)
    weight = 1.0  # of the initial weights
    for momentum in values:
        weight *= momentum
    assert weight < 1e-12
    assert 1 / (1 - values[-1]) == pytest.approx(2000 / 9, rel=0.01)


def test_a_copied_encoder_is_one_of_its_own() -> None:
    encoder = build_encoder("test_resnet", 32)
    teacher = make_teacher(encoder)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(teacher.eval()(images), encoder.eval()(images))
    with torch.no_grad():
        next(encoder.parameters()).add_(1.0)
    assert not torch.equal(next(teacher.parameters()), next(encoder.parameters()))
    assert teacher.state_dict().keys() == encoder.state_dict().keys()


@pytest.mark.parametrize(
    ("progress", "momentum", "temperature"),
    [(0.0, 0.6, 0.04), (0.15, 0.6218, 0.055), (0.3, 0.6824, 0.07), (0.5, 0.8, 0.07), (1, 1, 0.07)],
)
def test_a_teachers_momentum_rises_to_1_and_its_temperature_warms_up(
    progress: float, momentum: float, temperature: float
) -> None:
    schedule = TeacherSchedule(0.6, 0.04, 0.07, warmup=0.3)
    assert schedule.momentum_at(progress) == pytest.approx(momentum, abs=1e-4)
    assert schedule.temperature_at(progress) == pytest.approx(temperature)


def test_a_schedule_out_of_range_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match=r"--pretext.momentum 1.5 must be in \[0, 1\]"):
        TeacherSchedule(1.5, 0.04, 0.07, 0.3)
    with pytest.raises(UserError, match=r"--pretext.teacher_temperature 0 must be above 0"):
        TeacherSchedule(0.9, 0.04, 0, 0.3)
