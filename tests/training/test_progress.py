"""Speed and time left, also of a resumed run."""

import logging
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vissl_lite.training.progress import (
    FORECAST_BATCHES,
    SKIPPED_BATCHES,
    Forecast,
    ProgressBar,
)
from vissl_lite.training.schedule import Schedule


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["epochs", "time"])
@pytest.mark.parametrize("resumed_at", [0, 500])
def test_speed_and_time_left(
    budget: str,
    resumed_at: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Half a second a step of 64 images, 1000 steps: 128 images per second, resumed or not."""
    clock = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    schedule = Schedule(
        0.1, 0.1, 0, 1000 if budget == "epochs" else None, 500 if budget == "time" else None
    )
    schedule.load_state_dict(
        {
            "batches": resumed_at,
            "elapsed": resumed_at / 2,
            "begun": 0.0,
            "step_seconds": 0.5,
            "ended": False,
        }
    )
    bar = ProgressBar("simclr", SimpleNamespace(batch_size=64, batches_per_epoch=100), schedule)  # type: ignore[arg-type]
    unused: Any = SimpleNamespace(world_size=1, optimizers=[], global_rank=0)
    bar.on_train_start(unused, unused)
    clock += 0 if budget == "time" else 60  # an evaluation before the first batch
    with caplog.at_level(logging.INFO):
        for _ in range(100):
            schedule.on_train_batch_start(unused, unused, unused, 0)
            bar.on_train_batch_start(unused, unused, unused, 0)
            clock += 0.5
            schedule.on_train_batch_end(unused, unused, unused, unused, 0)
            bar.on_train_batch_end(unused, unused, {"loss": torch.tensor(1.0)}, unused, 0)
    bar.on_train_end(unused, unused)
    last = caplog.messages[-1]
    done = (resumed_at + 80) / 10  # said every 20 seconds
    assert f"{done - 0.1:3.0f} %" in last
    assert f"epoch {done / 10 + 0.1:.1f}" in last or f"epoch {done / 10:.1f}" in last
    assert "128 images/s" in last
    hours, minutes, seconds = last.split("  ")[-1].removesuffix(" left").split(":")
    left = 3600 * int(hours) + 60 * int(minutes) + int(seconds)
    assert left == pytest.approx(500 - resumed_at / 2 - 40, abs=6)


def forecast(
    schedule: Schedule,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    cost: Callable[[float], float] = lambda fraction: 1.0,
    batch_seconds: float = 0.5,
) -> list[str]:
    """Messages in 40 batches of 64 images, the first two of which take a minute more.

    After the sixth an evaluation takes ten seconds.
    """
    clock, paused, said_after = schedule.started, 0.0, 0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    monkeypatch.setattr("vissl_lite.training.progress.peak_memory", lambda device: 3 * 2**29)
    data: Any = SimpleNamespace(batch_size=64, batches_per_epoch=100)
    callback = Forecast(data, schedule, cost, lambda: paused)
    unused: Any = SimpleNamespace(
        world_size=1, optimizers=[], global_rank=0, device=torch.device("cpu")
    )
    callback.on_train_start(unused, unused)
    with caplog.at_level(logging.INFO):
        for batch in range(40):
            schedule.on_train_batch_start(unused, unused, unused, batch)
            clock += batch_seconds + 60 * (batch < SKIPPED_BATCHES)
            schedule.on_train_batch_end(unused, unused, unused, unused, batch)
            callback.on_train_batch_end(unused, unused, unused, unused, batch)
            said_after = said_after or (batch + 1 if caplog.messages else 0)
            if batch == 5:
                clock, paused = clock + 10, paused + 10
    assert said_after == SKIPPED_BATCHES + (FORECAST_BATCHES if batch_seconds < 2 else 1)
    return caplog.messages


def test_forecast_of_epochs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With the first two batches and the evaluation, 12 of 1000 batches take 136 seconds."""
    schedule = Schedule(0.1, 0.1, 0, batches=1000, started=0.0)
    [message] = forecast(schedule, monkeypatch, caplog)
    assert "128 images per second: 10 epochs take about 0:10:30, expected end 2" in message
    assert message.endswith("; peak memory so far 1.50 GiB")


def test_forecast_of_a_time_budget(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    schedule = Schedule(0.1, 0.1, 0, seconds=636, started=0.0)
    [message] = forecast(schedule, monkeypatch, caplog)
    assert "128 images per second: about 10.1 epochs in 0:10:36, expected end 2" in message


def test_forecast_knows_that_later_batches_are_slower(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Batches of the second half take three times as long: 2 * 1000 * 0.5 seconds, about."""
    schedule = Schedule(0.1, 0.1, 0, batches=10_000, started=0.0)
    [message] = forecast(schedule, monkeypatch, caplog, lambda f: 3.0 if f > 0.5 else 1.0)
    assert "100 epochs take about 2:4" in message


def test_forecast_says_that_later_batches_need_more_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Longer runs have tried the largest batch first."""

    def cost(fraction: float) -> float:
        return 4.0 if fraction > 0.5 else 1.0

    for seconds, end in (
        (500, "so far 1.50 GiB, more with the larger batches to come"),
        (700, "so far 1.50 GiB"),
    ):
        caplog.clear()
        [message] = forecast(
            Schedule(0.1, 0.1, 0, seconds=seconds, started=0.0), monkeypatch, caplog, cost
        )
        assert message.endswith(end)


def test_forecast_says_that_a_frozen_encoder_will_need_more_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    schedule = Schedule(0.1, 0.1, 0, batches=1000, started=0.0, freeze_share=0.05)
    [message] = forecast(schedule, monkeypatch, caplog)
    assert message.endswith("so far 1.50 GiB, more when the encoder is trained")


def test_forecast_of_a_resumed_run_is_of_what_is_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    schedule = Schedule(0.1, 0.1, 0, batches=1000, started=0.0)
    schedule.load_state_dict(
        {"batches": 889, "elapsed": 1000.0, "begun": 0.0, "step_seconds": 0.5, "ended": False}
    )
    [message] = forecast(schedule, monkeypatch, caplog)
    assert "10 epochs take about 0:19:46" in message  # 1000 + 136 + 50


def test_forecast_of_slow_batches_comes_after_twenty_seconds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    schedule = Schedule(0.1, 0.1, 0, batches=10**15, started=0.0)  # ends after the year 9999
    [message] = forecast(schedule, monkeypatch, caplog, batch_seconds=30)
    assert message.startswith("2.13 images per second: ")
    assert "expected end" not in message
