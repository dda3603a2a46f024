"""Learning rates of the encoder and of the heads over a run."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from vissl_lite.optim import OptimizerSettings, build_optimizer
from vissl_lite.training import schedule as schedule_module
from vissl_lite.training.schedule import Schedule


def falling(done: float) -> float:
    return (1 + math.cos(math.pi * done)) / 2


@pytest.mark.parametrize("length", [{"batches": 20}, {"seconds": 25.0}], ids=["counted", "timed"])
def test_the_encoder_warms_up_when_it_is_no_longer_frozen(
    length: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 20 steps, one per second, 4 train the heads alone. The run is resumed twice.

    Five seconds of a time budget pass before the first step.
    """
    clock = 5.0
    monkeypatch.setattr(schedule_module, "time", SimpleNamespace(monotonic=lambda: clock))
    encoder, head = nn.Linear(2, 2), nn.Linear(2, 1)
    settings = OptimizerSettings(lr=0.1, head_scale=10.0)
    optimizer = build_optimizer(nn.ModuleList([encoder, head]), settings, encoder)
    trainer: Any = SimpleNamespace(world_size=1, global_rank=0, optimizers=[optimizer])
    module: Any = SimpleNamespace()
    unused: Any = None
    schedule = Schedule(0.1, 0.25, 0, **length, started=0.0, freeze_share=0.2)
    rates: dict[int, list[float]] = {id(encoder.weight): [], id(head.weight): []}
    for step in range(20):
        if step in (2, 11):
            state = schedule.state_dict()
            schedule = Schedule(0.1, 0.25, 0, **length, freeze_share=0.2)
            schedule.load_state_dict(state)
        schedule.on_train_batch_start(trainer, module, unused, step)
        rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for parameter, found in rates.items():
            found.append(rate[parameter])
        assert rate[id(encoder.weight)] == rate[id(encoder.bias)] == schedule.current_lr
        assert rate[id(head.weight)] == rate[id(head.bias)]
        clock += 1
        schedule.on_train_batch_end(trainer, module, unused, unused, step)
    rising = [0.0, 0.25, 0.5, 0.75]  # over a quarter of the 16 steps that are left
    expected = [0.0] * 4 + rising + [falling((step - 8) / 12) for step in range(8, 20)]
    assert rates[id(encoder.weight)] == pytest.approx([0.1 * factor for factor in expected])
    # over a quarter of the 4 steps, which is the first one
    expected = [0.0, *(falling((step - 1) / 19) for step in range(1, 20))]
    assert rates[id(head.weight)] == pytest.approx(expected)


def test_without_a_frozen_phase_both_follow_one_curve() -> None:
    schedule = Schedule(0.1, 0.25, 0, batches=20)
    for schedule.fraction in (0.0, 0.1, 0.25, 0.7, 1.0):
        assert schedule.encoder_factor() == schedule.head_factor()
    assert schedule.warmup_end == 0.25


@pytest.mark.parametrize(("late", "warns"), [(9.0, False), (11.0, True)])
def test_a_start_that_takes_all_of_the_time_is_said(
    late: float, warns: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(schedule_module, "time", SimpleNamespace(monotonic=lambda: late))
    trainer: Any = SimpleNamespace(world_size=1, global_rank=0, optimizers=[])
    schedule = Schedule(0.1, 0.25, 0, seconds=10.0, started=0.0)
    unused: Any = None
    with caplog.at_level("WARNING"):
        schedule.on_train_batch_start(trainer, SimpleNamespace(), unused, 0)  # type: ignore[arg-type]
    assert ("leaves no time of --max_time" in caplog.text) == warns


def test_a_step_of_accumulated_batches_has_the_rate_of_its_start() -> None:
    trainer: Any = SimpleNamespace(world_size=1, global_rank=0, optimizers=[])
    unused: Any = None
    rates: dict[int, list[float]] = {}
    for accumulate in (1, 4):
        schedule = Schedule(0.1, 0.25, 0, batches=8 * accumulate, accumulate=accumulate)
        for batch in range(8 * accumulate):
            schedule.on_train_batch_start(trainer, SimpleNamespace(), unused, batch)  # type: ignore[arg-type]
            rates.setdefault(accumulate, []).append(schedule.current_lr)
            schedule.on_train_batch_end(trainer, unused, unused, unused, batch)
    assert rates[4] == [rate for rate in rates[1] for _ in range(4)]


def test_views_are_ordered_by_the_time_of_batches_with_waiting_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A batch takes 1 s after 3 s of waiting; an evaluation of 20 s in between does not count."""
    clock = 0.0
    monkeypatch.setattr(schedule_module, "time", SimpleNamespace(monotonic=lambda: clock))
    trainer: Any = SimpleNamespace(world_size=1, global_rank=0, optimizers=[])
    unused: Any = None
    schedule = Schedule(0.1, 0.25, 0, seconds=1000.0, started=0.0)
    for batch in range(40):
        clock += 3
        schedule.on_train_batch_start(trainer, SimpleNamespace(), unused, batch)  # type: ignore[arg-type]
        clock += 1
        schedule.on_train_batch_end(trainer, unused, unused, unused, batch)
        clock += 20 if batch == 30 else 0
        schedule.step_ended()
    # the fraction is that of the start of the last batch
    ahead = schedule.fraction_at(schedule.batches + 10) - schedule.fraction
    assert ahead == pytest.approx(11 * 4 / 1000, rel=0.01)
    resumed = Schedule(0.1, 0.25, 0, seconds=1000.0, started=clock)
    resumed.load_state_dict(schedule.state_dict())
    ahead = resumed.fraction_at(resumed.batches + 10) - resumed.fraction
    assert ahead == pytest.approx(10 * 4 / 1000, rel=0.01)


def test_a_budget_of_one_accumulated_step_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = 0.0
    monkeypatch.setattr(schedule_module, "time", SimpleNamespace(monotonic=lambda: clock))
    trainer: Any = SimpleNamespace(world_size=1, global_rank=0, optimizers=[])
    unused: Any = None
    schedule = Schedule(0.1, 0.25, 0, seconds=10.0, started=0.0, accumulate=8)
    while not getattr(trainer, "should_stop", False):
        schedule.on_train_batch_start(trainer, SimpleNamespace(), unused, 0)  # type: ignore[arg-type]
        clock += 2
        schedule.on_train_batch_end(trainer, unused, unused, unused, 0)
    schedule.on_train_end(trainer, unused)
    assert schedule.batches == 8
    assert "All of --max_time was one step of 8 accumulated batches" in caplog.text
