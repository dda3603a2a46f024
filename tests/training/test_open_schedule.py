"""A run of open length ends when it stops improving, resumed or not."""

import logging
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vissl_lite.training.open_schedule import (
    COOLDOWN,
    MIN_EVALUATIONS,
    OpenSchedule,
    improvement,
)

PER_EPOCH, EPOCHS = 20, 100
LIMIT = PER_EPOCH * EPOCHS


def make(measures: tuple[str, ...] = ("knn",), **settings: Any) -> OpenSchedule:
    return OpenSchedule(1.0, 0.1, 0, LIMIT, PER_EPOCH, measures, started=0.0, **settings)


def saturating(batches: float) -> Callable[[int], float]:
    """A measure that approaches 0.5 within a few times so many batches."""
    return lambda batch: 0.5 - 0.4 * math.exp(-batch / batches)


def train(
    schedule: OpenSchedule,
    measure: Callable[[int], float | dict[str, float] | None],
    until: int | None = None,
) -> tuple[list[float], list[float]]:
    """Learning rates and progress of all steps, up to a batch."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.0)
    trainer: Any = SimpleNamespace(
        world_size=1, global_rank=0, optimizers=[optimizer], should_stop=False
    )
    module: Any = SimpleNamespace(progress=0.0)
    unused: Any = None

    def evaluate() -> None:
        found = measure(schedule.batches)
        schedule.evaluated({"knn": found} if isinstance(found, float) else found)

    schedule.on_train_start(trainer, module)
    if schedule.batches == 0:
        evaluate()
    rates, progress = [], []
    while not trainer.should_stop and schedule.batches != until:
        schedule.on_train_batch_start(trainer, module, unused, 0)
        rates.append(optimizer.param_groups[0]["lr"])
        progress.append(module.progress)
        schedule.on_train_batch_end(trainer, module, unused, unused, 0)
        if schedule.evaluation_due and not trainer.should_stop:
            evaluate()
    if trainer.should_stop:
        schedule.on_train_end(trainer, module)
    return rates, progress


def test_a_run_that_saturates_ends_early(caplog: pytest.LogCaptureFixture) -> None:
    schedule = make()
    with caplog.at_level(logging.INFO):
        rates, progress = train(schedule, saturating(60))
    start = schedule.cooldown_start
    assert start is not None
    assert schedule.plateaued
    assert 200 < start < 500
    assert len(rates) == schedule.total == math.ceil((1 + COOLDOWN) * start)
    warmup = 100  # a tenth of 1000 steps, which are more than ten epochs
    assert rates[0] == 0
    assert rates[warmup // 2] == pytest.approx(0.5)
    assert set(rates[warmup : start + 1]) == {1.0}
    assert rates[(start + len(rates)) // 2] == pytest.approx(0.5, abs=0.02)
    assert rates[-1] < 1e-3
    assert progress[start] == start / LIMIT
    assert all(np.diff(progress) > 0)
    assert progress[-1] > 0.999
    first, begins, ended = caplog.messages
    assert "ends when knn has stopped improving, after 100.0 epochs at most" in first
    assert "rises until epoch 5.0" in first
    assert f"The cool-down begins in epoch {start / PER_EPOCH:.1f}: knn was 0.4" in begins
    assert f"until epoch {len(rates) / PER_EPOCH:.1f}, in which the run ends" in begins
    assert f"ended by itself after {len(rates) / PER_EPOCH:.1f} epochs" in ended


@pytest.mark.slow
def test_a_slower_measure_makes_a_longer_run() -> None:
    lengths = []
    for batches in (20, 60, 120):
        schedule = make()
        lengths.append(len(train(schedule, saturating(batches))[0]))
    assert lengths[0] < lengths[1] < lengths[2] < LIMIT


@pytest.mark.slow
def test_a_run_that_keeps_improving_ends_at_the_limit(caplog: pytest.LogCaptureFixture) -> None:
    schedule = make()
    with caplog.at_level(logging.INFO):
        rates, progress = train(schedule, lambda batch: math.log(1 + batch))
    assert len(rates) == LIMIT
    assert schedule.cooldown_start == LIMIT * 0.8
    assert not schedule.plateaued
    assert rates[-1] < 1e-4
    assert progress[-1] > 0.9999
    assert "the limit of 100.0 epochs is near" in caplog.messages[1]
    assert len(caplog.messages) == 2


def test_one_of_two_measures_that_still_improves_is_enough() -> None:
    schedule = make(("rank", "sum"))
    train(schedule, lambda batch: {"rank": 5.0, "sum": math.log(1 + batch)}, until=900)
    assert schedule.cooldown_start is None
    schedule = make(("rank", "sum"))
    train(schedule, lambda batch: {"rank": 5.0, "sum": saturating(60)(batch)}, until=900)
    assert schedule.plateaued


def test_while_the_encoder_is_frozen_its_measures_do_not_count() -> None:
    """They are constant. The run ends as one that begins when the encoder is trained."""
    frozen, plain = make(freeze_share=0.2), make()
    rates, _ = train(frozen, lambda batch: saturating(60)(max(0, batch - 400)))
    expected, _ = train(plain, saturating(60))
    start = plain.cooldown_start
    assert start is not None
    assert frozen.cooldown_start == 400 + start
    assert rates[: 400 + start] == pytest.approx([0.0] * 400 + expected[:start])


def test_heads_warm_up_while_the_encoder_is_frozen() -> None:
    schedule = make(freeze_share=0.2)
    factors = []
    for schedule.batches in (0, 20, 40, 400, 450, 500):
        schedule.fraction = schedule.progress()
        factors.append((schedule.encoder_factor(), schedule.head_factor()))
    encoder, heads = zip(*factors, strict=True)
    assert encoder == pytest.approx((0, 0, 0, 0, 0.5, 1))
    assert heads == pytest.approx((0, 0.5, 1, 1, 1, 1))


def test_noise_is_no_improvement() -> None:
    random = np.random.default_rng(0)
    for _ in range(3):
        schedule = make()
        train(schedule, lambda batch: saturating(40)(batch) + float(random.normal(0, 0.02)))
        assert schedule.plateaued


@pytest.mark.slow
def test_failed_evaluations_end_nothing() -> None:
    for bad in (None, math.nan):
        schedule = make()
        train(schedule, lambda batch, bad=bad: bad if batch > 100 else 0.1, until=900)
        assert schedule.cooldown_start is None


@pytest.mark.parametrize("share", [0.3, 0.9, 1.1])
def test_an_interrupted_run_ends_like_an_undisturbed_one(share: float) -> None:
    """Interrupted before, at the end of, and within the cool-down."""
    whole = make()
    whole.min_spacing = 15
    rates, progress = train(whole, saturating(60))
    assert whole.cooldown_start is not None
    first = make()
    first.min_spacing = 15
    until = int(share * whole.cooldown_start)
    before = train(first, saturating(60), until)
    resumed = make()
    resumed.load_state_dict(first.state_dict())
    after = train(resumed, saturating(60))
    assert before[0] + after[0] == rates
    assert before[1] + after[1] == progress
    assert resumed.plateaued
    kept = resumed.state_dict() | {"elapsed": 0}
    assert kept == whole.state_dict() | {"elapsed": 0}


def test_whole_steps_of_several_batches() -> None:
    schedule = make(accumulate=7)
    rates, _ = train(schedule, saturating(60))
    assert len(rates) % 7 == 0


def test_a_warmup_that_outlasts_the_run_does_not_jump() -> None:
    schedule = OpenSchedule(1.0, 0.99, 0, 100, 10, ["knn"], started=0.0)
    rates, _ = train(schedule, saturating(60))
    assert len(rates) == 100
    assert np.abs(np.diff(rates)).max() < 0.12


def test_what_is_far_back_is_forgotten() -> None:
    """A measure that is high at first, falls, and rises again."""
    batches = list(range(0, 101, 2))
    scores = [10.0 if batch < 20 else batch / 20 for batch in batches]
    course = improvement(batches, scores)
    assert course is not None
    assert course.improved
    course = improvement(batches, [-score for score in scores])
    assert course is not None
    assert not course.improved


def test_too_few_evaluations_tell_nothing() -> None:
    assert improvement([], []) is None
    assert improvement([0, 50, 100], [0.1, 0.1, 0.1]) is None
    late = range(80, 80 + MIN_EVALUATIONS)
    assert improvement([30, 40, 50, *late], [0.1] * (3 + MIN_EVALUATIONS)) is not None


def test_warmup_of_ten_epochs_where_they_are_long() -> None:
    schedule = OpenSchedule(1.0, 0.1, 0, 100 * 500, 500, ["knn"])
    assert schedule.warmup * 100 == pytest.approx(1)  # epochs
