"""Speed and time left, also of a resumed run."""

import logging
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vissl_lite.training.progress import ProgressBar
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
    schedule.load_state_dict({"batches": resumed_at, "elapsed": resumed_at / 2, "ended": False})
    bar = ProgressBar("simclr", SimpleNamespace(batch_size=64, batches_per_epoch=100), schedule)  # type: ignore[arg-type]
    unused: Any = SimpleNamespace(world_size=1, optimizers=[], global_rank=0)
    bar.on_train_start(unused, unused)
    with caplog.at_level(logging.INFO):
        for _ in range(100):
            schedule.on_train_batch_start(unused, unused, unused, 0)
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
