import logging

import pytest
import torch

from vissl_lite.pretext.modules.chance_monitor import ChanceMonitor


def watch(monitor: ChanceMonitor, accuracies: list[float]) -> None:
    """A whole run of such accuracies."""
    for step, accuracy in enumerate(accuracies):
        monitor.update(torch.tensor(accuracy), step / len(accuracies))


@pytest.mark.parametrize(
    ("accuracies", "warning"),
    [
        ([0.25] * 400, "rotation barely exceeds chance on these images: accuracy 25 %"),
        ([0.27, 0.23] * 200, "barely exceeds chance"),
        ([1.0] * 400, "rotation is solved early"),
        ([0.25] * 40 + [0.6] * 360, None),
        ([0.25] * 60 + [1.0] * 340, "rotation is solved early (accuracy 99 % after"),
        ([0.4] * 400, None),
        ([0.3 + 0.7 * step / 400 for step in range(400)], None),
    ],
)
def test_warns_once_of_no_signal_and_of_one_that_is_too_easy(
    accuracies: list[float], warning: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        watch(ChanceMonitor("rotation", 1 / 4), accuracies)
    assert len(caplog.records) == (warning is not None)
    if warning:
        assert warning in caplog.text


def test_a_hard_task_of_many_classes_may_take_its_time(caplog: pytest.LogCaptureFixture) -> None:
    watch(ChanceMonitor("jigsaw", 1 / 100), [0.02] * 400)
    assert not caplog.records


def test_its_state_survives_a_resumed_run(caplog: pytest.LogCaptureFixture) -> None:
    monitor = ChanceMonitor("rotation", 1 / 4)
    watch(monitor, [0.25] * 400)
    resumed = ChanceMonitor("rotation", 1 / 4)
    resumed.load_state_dict(monitor.state_dict())
    watch(resumed, [0.25] * 400)
    assert len(caplog.records) == 1
