"""What is said about pre-trained weights before a training, and when they have become worse."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vissl_lite.data.images import find_images
from vissl_lite.encoders.encoder import Encoder, build_encoder
from vissl_lite.evaluation.adaptation_monitor import AdaptationMonitor, describe_spread
from vissl_lite.evaluation.online import EncoderMetrics, ImageCounts
from vissl_lite.training.schedule import Schedule


@pytest.mark.parametrize(
    ("uniformity", "rank", "said"),
    [
        (-2.0, 50.0, "may serve without further training"),
        (-0.5, 10.0, "there is much to adapt"),
        (-2.0, 10.0, "The two measures disagree"),
        (-0.5, 50.0, "The two measures disagree"),
    ],
)
def test_the_spread_is_compared_with_that_of_random_weights(
    uniformity: float, rank: float, said: str
) -> None:
    before = {"uniformity": uniformity, "effective_rank": rank}
    message = describe_spread(before, {"uniformity": -1.0, "effective_rank": 20.0}, 64)
    assert said in message
    assert f"uniformity {uniformity:.2f} (random weights -1.00" in message
    assert f"effective rank {rank:.1f} (random weights 20.0)" in message
    assert "64 training images" in message
    assert "weak hint" in message


def test_random_weights_are_those_of_an_untrained_encoder(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Encoder] = []
    given: Any = monitor(photos, online(SPREAD))
    monkeypatch.setattr(given, "_encoder", build_encoder("resnet10t", 32))
    monkeypatch.setattr(
        given._compute, "spread", lambda encoder, images: measured.append(encoder) or SPREAD
    )
    given.on_train_start(
        SimpleNamespace(is_global_zero=True), SimpleNamespace(device=torch.device("cpu"))
    )
    branch = measured[0].model.get_parameter("layer1.0.bn2.weight")
    assert (branch == 0.5).all()


def monitor(photos: Path, online: Any, batches: int = 0, train: str = "all") -> AdaptationMonitor:
    schedule = Schedule(0.1, 0.1, 0, batches=10)
    schedule.batches = batches
    compute = EncoderMetrics(find_images([photos]), None, seed=0, upright=True)
    encoder = build_encoder("test_resnet", 32)
    return AdaptationMonitor(compute, online, schedule, encoder, train)


def online(metrics: dict[str, float]) -> Any:
    return SimpleNamespace(metrics=metrics, counts=ImageCounts(24, 200, 100))


SPREAD = {"uniformity": -1.0, "effective_rank": 20.0}


@pytest.mark.parametrize(
    ("before", "after", "warns"),
    [(0.8, 0.9, False), (0.8, 0.78, False), (0.8, 0.74, True), (1, 0.99, False), (1, 0.97, True)],
)
def test_a_fall_by_more_than_a_standard_error_is_a_warning(
    before: float, after: float, warns: bool, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # of 100 images: a standard error of 0.04 at 0.8, and of 0.013 at 1
    evaluation = online({**SPREAD, "knn": before})
    one = monitor(photos, evaluation)
    one.before = evaluation.metrics
    evaluation.metrics = {**SPREAD, "knn": after}
    with caplog.at_level(logging.INFO, "vissl_lite"):
        one.finish()
    assert f"{before:.3f} before the training" in caplog.text
    codes = [getattr(record, "code", None) for record in caplog.records]
    assert ("features.forgotten" in codes) == warns
    assert ("--train blocks:2" in caplog.text) == warns


def test_the_parts_that_are_trained_are_not_advised(
    photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evaluation = online({**SPREAD, "knn": 0.8})
    one = monitor(photos, evaluation, train="blocks:2")
    one.before, evaluation.metrics = evaluation.metrics, {**SPREAD, "knn": 0.5}
    one.finish()
    assert "may serve better; or try a lower --lr or a shorter run" in caplog.text


def test_what_was_measured_before_survives_a_resume_and_is_not_measured_again(
    photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer: Any = SimpleNamespace(is_global_zero=True)
    module: Any = SimpleNamespace(device=torch.device("cpu"))
    first = monitor(photos, online({**SPREAD, "knn": 0.8}))
    with caplog.at_level(logging.INFO, "vissl_lite"):
        first.on_train_start(trainer, module)
    assert "Features of 24 training images: uniformity -1.00" in caplog.text
    resumed = monitor(photos, online({}), batches=5)
    resumed.load_state_dict(first.state_dict())
    caplog.clear()
    resumed.on_train_start(trainer, module)
    assert not caplog.records
    assert resumed.before == {**SPREAD, "knn": 0.8}
