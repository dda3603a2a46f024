from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import prepared
from vissl_lite.data.stream import Batch
from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.pretext import PRETEXTS, pretext_class
from vissl_lite.pretext.base import PretextTask
from vissl_lite.pretext.byol import BYOL
from vissl_lite.training.schedule import Schedule
from vissl_lite.training.token_drop import TokenDrop, dropped_at


def test_tokens_are_dropped_until_the_last_tenth() -> None:
    shares = [dropped_at(progress / 100, 0.5) for progress in range(101)]
    assert shares == [0.5] * 80 + [0.25] * 10 + [0.0] * 11


class Steps:
    """Steps of a training in which tokens are dropped, with the numbers of tokens they used."""

    def __init__(self, task: PretextTask, share: float, total: int = 10) -> None:
        self.task, self.schedule = task, Schedule(0.1, 0.0, 0, batches=total)
        self.callback = TokenDrop(self.schedule, task.encoder, share)
        self.trainer: Any = SimpleNamespace(world_size=1, global_rank=0, optimizers=[])
        self.logged: list[float] = []
        task.log = lambda name, value: self.logged.append(value)  # type: ignore[method-assign]
        self.callback.on_fit_start(self.trainer, task)

    def start(self, number: int, views: list[Tensor]) -> None:
        batch: Any = SimpleNamespace(views=views)
        self.schedule.batches = number
        for callback in (self.schedule, self.callback):
            callback.on_train_batch_start(self.trainer, self.task, batch, 0)


def tokens_seen(encoder: nn.Module) -> list[int]:
    """List that gets the number of tokens at the first block of each pass from now on."""
    seen: list[int] = []
    first = encoder.model.blocks[0]  # type: ignore[union-attr, index]
    first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))  # type: ignore[union-attr]
    return seen


def test_the_student_sees_some_tokens_the_teacher_and_the_evaluation_all() -> None:
    task = BYOL(build_encoder("vit_slim_patch4_32", 32))  # 64 patches
    prefix = task.encoder.model.num_prefix_tokens
    steps = Steps(task, share=0.75)
    student, teacher = tokens_seen(task.encoder), tokens_seen(task.teacher_encoder)
    views = [torch.randn(2, 3, 32, 32) for _ in range(2)]
    for number in (0, 1, 8, 9):  # the first is a whole one, to try out the memory
        steps.start(number, views)
        task.loss(views)
    assert student == [prefix + count for count in (64, 16, 40, 64)]
    assert teacher == [prefix + 64] * 4
    assert steps.logged == [0.0, 0.75, 0.375, 0.0]
    steps.start(1, views)
    task.eval()
    task.encoder(views[0])
    assert student[-1] == prefix + 64


def test_short_runs_do_not_begin_with_a_whole_step() -> None:
    steps = Steps(BYOL(build_encoder("vit_slim_patch4_32", 32)), share=0.5)
    steps.schedule.total, steps.schedule.seconds = None, 599.0
    steps.start(0, [torch.randn(2, 3, 32, 32)])
    assert steps.logged == [0.5]


def test_local_crops_keep_all_tokens() -> None:
    encoder = build_encoder("vit_slim_patch4_32", 32)
    task = BYOL(encoder)
    steps, seen = Steps(task, share=0.5), tokens_seen(encoder)
    views = [torch.randn(2, 3, side, side) for side in (32, 32, 16)]
    steps.start(1, views)
    for view in views:
        encoder(view)
    prefix = encoder.model.num_prefix_tokens
    assert seen == [prefix + count for count in (32, 32, 16)]


def test_a_step_drops_the_same_tokens_when_it_is_repeated_and_others_in_the_next() -> None:
    encoder = build_encoder("vit_slim_patch4_32", 32)
    steps, images = Steps(BYOL(encoder), share=0.5), [torch.randn(2, 3, 32, 32)]
    outputs = []
    for number in (1, 2, 1):
        steps.start(number, images)
        with torch.no_grad():
            outputs.append(encoder(images[0]))
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.allclose(outputs[0], outputs[1])


def test_nothing_of_it_is_in_the_weights_or_stays_in_the_model() -> None:
    encoder = build_encoder("vit_slim_patch4_32", 32)
    before, names = str(encoder), list(encoder.state_dict())
    task = BYOL(encoder)
    steps = Steps(task, share=0.5)
    assert list(encoder.state_dict()) == names
    steps.callback.on_fit_end(steps.trainer, task)
    assert str(encoder) == before
    seen = tokens_seen(encoder)
    encoder(torch.randn(2, 3, 32, 32))
    assert seen == [64 + encoder.model.num_prefix_tokens]
    assert not encoder._forward_pre_hooks


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name, cls in PRETEXTS.items() if cls.info.token_drop is not None]
)
def test_pretexts_that_take_it_learn_from_some_tokens(name: str) -> None:
    torch.manual_seed(0)
    task = prepared(pretext_class(name)(build_encoder("vit_slim_patch4_32", 32)), images=4)
    steps, seen = Steps(task, share=0.5), tokens_seen(task.encoder)
    views = [torch.randint(256, (4, 3, 32, 32)) for _ in range(len(task.views()))]
    steps.start(1, views)
    loss = task.training_step(Batch(views, torch.arange(4), [], []), 0)
    loss.backward()
    assert loss.isfinite()
    assert set(seen) == {32 + task.encoder.model.num_prefix_tokens}
    assert all(p.grad is not None for p in task.parameters() if p.requires_grad)
