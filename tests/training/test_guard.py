"""What is said of a loss, and when it ends the run."""

import logging
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from vissl_lite.errors import UserError
from vissl_lite.training.guard import LossGuard
from vissl_lite.training.schedule import Schedule

STEPS = 400


def guard_of(losses: list[float], chance: float | None = None, accumulate: int = 1) -> LossGuard:
    """A whole run of such losses, looked at at every step."""
    pace = Schedule(0.1, 0.1, 0, batches=len(losses), accumulate=accumulate)
    guard = LossGuard(pace, 1, "simclr", chance)
    go_on(guard, losses)
    return guard


def go_on(guard: LossGuard, losses: list[float]) -> None:
    unused: Any = SimpleNamespace(world_size=1)
    for step, loss in enumerate(losses):
        guard.pace.fraction = step / len(losses)
        guard.pace.batches = step + 1
        outputs = {"loss": torch.tensor(loss / guard.pace.accumulate)}
        guard.on_train_batch_end(unused, unused, outputs, unused, step)


def falling(start: float, end: float) -> list[float]:
    noise = torch.randn(STEPS, generator=torch.Generator().manual_seed(0)) * abs(start) / 10
    return [end + (start - end) * math.exp(-i / 40) + float(noise[i]) for i in range(STEPS)]


@pytest.mark.parametrize(
    ("losses", "chance", "said"),
    [
        (falling(4.8, 2.0), 4.84, None),
        (falling(0.0, -0.9), None, None),
        ([0.2 + 8 * (1 - math.exp(-i / 20)) for i in range(STEPS)], None, None),  # a queue fills
        ([*falling(5, 2)[:300], 40.0, *falling(5, 2)[301:]], None, None),  # a single outlier
        ([4.84] * STEPS, 4.84, "simclr does no better than guessing: its loss is 4.84 after 20 %"),
        ([4.84] * STEPS, None, None),
        ([*falling(5, 2)[:200], *([30.0] * 200)], None, "rises instead of falling: it is"),
        ([i / 4 for i in range(STEPS)], None, "rises instead of falling"),
        ([-1 + i / 100 for i in range(STEPS)], None, "rises instead of falling"),
    ],
)
def test_warns_once_of_what_goes_wrong(
    losses: list[float],
    chance: float | None,
    said: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        guard_of(losses, chance)
    assert len(caplog.records) == (said is not None)
    if said:
        assert said in caplog.text
        assert "--lr" in caplog.text


def test_the_loss_of_accumulated_batches_is_compared_undivided(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        guard_of([4.84] * 4 * STEPS, 4.84, accumulate=4)
    assert "its loss is 4.84 after 20 %" in caplog.text


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_run(bad: float) -> None:
    with pytest.raises(UserError, match=r"after step 3 the loss is .*lower --lr \(it was 0\.1\)"):
        guard_of([1.0, 1.0, bad, 1.0])


def test_nothing_is_saved_after_the_loss_or_a_weight_went_wrong() -> None:
    unused: Any = SimpleNamespace(world_size=1)
    module: Any = nn.Linear(2, 2)
    guard = LossGuard(Schedule(0.1, 0.1, 0, batches=10), 50, "simclr")
    guard.on_save_checkpoint(unused, module, {})
    guard.on_train_batch_end(unused, module, {"loss": torch.tensor(1.0)}, unused, 0)
    guard.on_save_checkpoint(unused, module, {})
    module.weight.data[0, 0] = math.inf
    with pytest.raises(UserError, match="weights are no longer finite"):
        guard.on_save_checkpoint(unused, module, {})
    guard.pace.batches = 1  # not a step at which losses are looked at
    guard.on_train_batch_end(unused, module, {"loss": torch.tensor(math.nan)}, unused, 0)
    with pytest.raises(UserError, match="the loss is nan"):
        guard.on_save_checkpoint(unused, nn.Linear(2, 2), {})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="the loss is nan"):
        guard.on_train_end(unused, module)


def test_its_state_survives_a_resumed_run(caplog: pytest.LogCaptureFixture) -> None:
    guard = guard_of([4.84] * STEPS, 4.84)
    resumed = LossGuard(guard.pace, 1, "simclr", 4.84)
    resumed.load_state_dict(guard.state_dict())
    go_on(resumed, [4.84] * STEPS)
    assert len(caplog.records) == 1
