"""What online evaluation sees, what it costs, and what it says."""

import logging
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vissl_lite.data.images import find_images
from vissl_lite.encoders.encoder import Encoder, build_encoder
from vissl_lite.evaluation.measures import effective_rank, feature_std
from vissl_lite.evaluation.online import (
    COLLAPSED_RANK,
    COLLAPSED_STD,
    MAX_IMAGES,
    MIN_IMAGES,
    ONLINE_METRICS,
    QUICK_IMAGES,
    QUICK_SECONDS,
    TIME_SHARE,
    WARM_UP_IMAGES,
    EncoderMetrics,
    ImageCounts,
    OnlineEvaluation,
)
from vissl_lite.training.open_schedule import OpenSchedule
from vissl_lite.training.schedule import Schedule
from vissl_lite.transfer.classification.data import LabelledImages, Part, load_labelled
from vissl_lite.transfer.sources.reading_log import ReadingLog

READING = ReadingLog("data")

BATCH_SIZE = 8


def trainer() -> Any:
    return SimpleNamespace(
        is_global_zero=True,
        loggers=[],
        world_size=1,
        should_stop=False,
        strategy=SimpleNamespace(broadcast=lambda value: value),
        optimizers=[],
        global_rank=0,
    )


class Task(nn.Module):
    """As much of a pretext as is evaluated."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def trained_encoder(self) -> nn.Module:
        return self.encoder

    def unsharded(self) -> "Task":
        return self


def online(
    paths: list[str], labelled: LabelledImages | None = None, schedule: Schedule | None = None
) -> OnlineEvaluation:
    data: Any = SimpleNamespace(batches_per_epoch=100, batch_size=BATCH_SIZE)
    compute = EncoderMetrics(paths, labelled, seed=0, upright=True)
    return OnlineEvaluation(compute, data, schedule or Schedule(0.1, 0.1, 0, batches=10))


def evaluate(evaluation: OnlineEvaluation, encoder: Encoder) -> dict[str, float]:
    evaluation.evaluate(trainer(), Task(encoder))  # type: ignore[arg-type]
    return evaluation.metrics


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    return build_encoder("test_resnet", 32)


def test_a_collapse_shows_in_spread_and_rank() -> None:
    random = np.random.default_rng(0)
    one = random.normal(size=(1, 64)) + 1e-4 * random.normal(size=(256, 64))
    assert feature_std(one) < COLLAPSED_STD
    assert effective_rank(one) < COLLAPSED_RANK


def test_healthy_features_are_not_called_collapsed() -> None:
    features = np.abs(np.random.default_rng(0).normal(size=(256, 64)))  # after a ReLU
    assert feature_std(features) > 5 * COLLAPSED_STD
    assert effective_rank(features) > 5 * COLLAPSED_RANK


@pytest.mark.slow
def test_an_evaluation_gives_every_metric_and_is_the_same_twice(
    photos: Path, labelled: Path, encoder: Encoder
) -> None:
    paths = find_images([photos])
    data = load_labelled(labelled, 0)
    first = evaluate(online(paths, data), encoder)
    assert first == evaluate(online(paths, data), encoder)
    assert tuple(first) == ONLINE_METRICS
    assert first["alignment"] > 0
    assert first["linear"] == 1  # colors tell the classes apart


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_an_encoder_of_another_precision_is_evaluated_in_it(
    dtype: torch.dtype, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with ``--precision 64-true``, on a CPU that has instructions for bf16."""
    monkeypatch.setattr("vissl_lite.inference.cpu_gains_from_bf16", lambda: True)
    encoder = build_encoder("test_resnet", 32).to(dtype)
    assert evaluate(online(find_images([photos])), encoder)["effective_rank"] > 1


def test_the_untrained_and_the_trained_encoder_are_evaluated(photos: Path) -> None:
    encoder = build_encoder("test_resnet", 32)
    evaluation, running, task = online(find_images([photos])), trainer(), Task(encoder)
    evaluation.on_train_start(running, task)  # type: ignore[arg-type]
    untrained = evaluation.metrics
    assert untrained
    for parameter in encoder.parameters():
        parameter.data.mul_(1.1)
    evaluation._schedule.batches = 10
    evaluation.on_train_end(running, task)  # type: ignore[arg-type]
    trained = evaluation.metrics
    assert trained != untrained
    evaluation.finish(running, task)  # type: ignore[arg-type]
    assert evaluation.metrics is trained  # it has been evaluated since the last step


def test_an_evaluation_changes_nothing_about_the_training(photos: Path, encoder: Encoder) -> None:
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    encoder.train()
    evaluate(online(find_images([photos])), encoder)
    assert encoder.training
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_test_images_stay_unseen_and_validation_images_are_never_learned_from(
    photos: Path, labelled: Path, encoder: Encoder
) -> None:
    data = load_labelled(labelled, 0)
    unseen = Part(["/nowhere.png"] * 5, np.zeros(5, np.int64))
    wrong = Part(data.val.paths, (data.val.labels + 1) % 3)
    paths = find_images([photos])
    right = evaluate(
        online(
            paths,
            LabelledImages(data.classes, data.train, data.val, unseen, READING),
        ),
        encoder,
    )
    mislabelled = evaluate(
        online(
            paths,
            LabelledImages(data.classes, data.train, wrong, unseen, READING),
        ),
        encoder,
    )
    assert (right["knn"], right["linear"]) == (1, 1)
    assert (mislabelled["knn"], mislabelled["linear"]) == (0, 0)


def test_broken_images_are_named_once(
    photos: Path, labelled: Path, encoder: Encoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = load_labelled(labelled, 0)
    broken = [str(tmp_path / f"broken{index}.jpg") for index in range(3)]
    for path in broken:
        Path(path).write_bytes(b"not an image")
    train = Part([broken[0], *data.train.paths], np.array([2, *data.train.labels]))
    val = Part([*data.val.paths, broken[1]], np.array([*data.val.labels, 2]))
    seen = LabelledImages(data.classes, train, val, data.test, READING)
    evaluation = online([broken[2], *find_images([photos])], seen)
    with caplog.at_level(logging.WARNING):
        evaluate(evaluation, encoder)
        values = evaluate(evaluation, encoder)
    for path in broken:
        assert caplog.text.count(path) == 1
    assert (values["knn"], values["linear"]) == (1, 1)  # labels went with their images


def test_broken_images_among_the_first_do_not_end_the_run(
    photos: Path, encoder: Encoder, tmp_path: Path
) -> None:
    """Whether too many are broken shows in training, on all images."""
    broken = [str(tmp_path / f"broken{index}.jpg") for index in range(9)]
    for path in broken:
        Path(path).write_bytes(b"not an image")
    images = [*broken, *find_images([photos])]
    values = evaluate(online(images), encoder)
    assert np.isfinite(list(values.values())).all()


def test_where_the_images_have_gone_there_are_no_metrics_of_an_earlier_encoder(
    photos: Path, encoder: Encoder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copies = [shutil.copy(path, tmp_path) for path in find_images([photos])]
    evaluation = online(copies)
    assert evaluate(evaluation, encoder)
    for path in copies:
        Path(path).unlink()
    assert evaluate(evaluation, encoder) == {}
    assert "evaluation.failed" in [getattr(record, "code", "") for record in caplog.records]


def test_labels_of_one_class_give_no_linear_accuracy(
    photos: Path, labelled: Path, encoder: Encoder
) -> None:
    data = load_labelled(labelled, 0)
    one = data.train.take(np.flatnonzero(data.train.labels == 0))
    values = evaluate(
        online(
            find_images([photos]),
            LabelledImages(data.classes, one, data.val, data.test, READING),
        ),
        encoder,
    )
    assert "linear" not in values
    assert 0 < values["knn"] < 1


def test_two_images_are_enough(photos: Path, encoder: Encoder) -> None:
    assert np.isfinite(list(evaluate(online(find_images([photos])[:2]), encoder).values())).all()


class Clock:
    """A clock that only the passes of images through the encoder move.

    Args:
        monkeypatch: Undoes what is patched.
        seconds: Duration of a pass.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
        self.now, self.seconds = 0.0, seconds
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        self.evaluations: list[float] = []  # when each ended
        monkeypatch.setattr(EncoderMetrics, "warm_up", self.warm_up)
        monkeypatch.setattr(EncoderMetrics, "__call__", self.measure)

    def warm_up(self, encoder: Any) -> None:
        self.now += self.seconds * WARM_UP_IMAGES

    def measure(self, encoder: Any, counts: ImageCounts) -> dict[str, float]:
        self.now += self.seconds * (3 * counts.unlabelled + counts.train + counts.val)
        self.evaluations.append(self.now)
        return {"feature_std": 1.0, "effective_rank": 10.0, "alignment": 1.0, "uniformity": -1.0}


@pytest.mark.parametrize(
    ("seconds_per_pass", "images", "waiting"),
    [(0.1, QUICK_IMAGES, 10.4), (0.01, 64, QUICK_SECONDS + 0.08), (1e-4, 256, 0.1)],
)
def test_the_first_step_waits_for_seconds(
    seconds_per_pass: float, images: int, waiting: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of a day, whose 2 % would do for any number of images. Two seconds are not enough for
    100 images after the first 32: runs that use 64 can be compared with each other.
    """
    clock = Clock(monkeypatch, seconds_per_pass)
    evaluation = online(["some.png"] * 1000, None, Schedule(0.1, 0.1, 0, None, 86400))
    evaluate(evaluation, nn.Identity())  # type: ignore[arg-type]
    assert evaluation.counts == ImageCounts(images, 0, 0)
    assert clock.now <= waiting + 1e-6


def test_labels_and_an_open_end_are_worth_waiting_for(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch, 0.01)
    part = Part(["some.png"] * 6000, np.zeros(6000, np.int64))
    data = LabelledImages(["a", "b"], part, part, part, READING)
    labelled = online(["some.png"] * 1000, data, Schedule(0.1, 0.1, 0, None, 86400))
    evaluate(labelled, nn.Identity())  # type: ignore[arg-type]
    assert labelled.counts == MAX_IMAGES
    ends_itself = online(["some.png"] * 1000, None, OpenSchedule(0.1, 0.1, 0, 10**6, 100, ()))
    evaluate(ends_itself, nn.Identity())  # type: ignore[arg-type]
    assert ends_itself.counts is not None
    assert ends_itself.counts.unlabelled >= MIN_IMAGES.unlabelled


@pytest.mark.slow
@pytest.mark.parametrize(
    ("budget", "seconds_an_image", "seconds"),
    [("epochs", 1e-6, 60), ("epochs", 1e-3, 600), ("time", 1e-4, 60), ("time", 1e-3, 600)],
)
def test_evaluation_stays_within_its_share(
    budget: str, seconds_an_image: float, seconds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run on a clock of our own, of 1000 steps; an evaluation takes as long as it has images."""
    clock = Clock(monkeypatch, seconds_an_image)
    steps = 1000
    step = seconds / steps
    time_budget = seconds if budget == "time" else None
    schedule = Schedule(0.1, 0.1, 0, None if time_budget else steps, time_budget)
    part = Part(["some.png"] * 6000, np.zeros(6000, np.int64))
    data = LabelledImages(["a", "b"], part, part, part, READING)
    evaluation = online(["some.png"] * 1000, data, schedule)
    # a step of two views is six passes
    evaluation._compute.seconds_per_image = step / BATCH_SIZE / 6
    running, module, batch = trainer(), Task(nn.Identity()), SimpleNamespace(broken=[])
    evaluation.on_train_start(running, module)  # type: ignore[arg-type]
    while not running.should_stop and schedule.batches < steps:
        schedule.on_train_batch_start(running, module, batch, 0)  # type: ignore[arg-type]
        clock.now += step
        schedule.on_train_batch_end(running, module, None, batch, 0)  # type: ignore[arg-type]
        evaluation.on_train_batch_end(running, module, None, batch, 0)  # type: ignore[arg-type]
    evaluation.on_train_end(running, module)  # type: ignore[arg-type]
    counts = ImageCounts(*evaluation.state_dict()["counts"])
    assert evaluation.share <= TIME_SHARE * 1.05 or counts == MIN_IMAGES
    if budget == "time":
        assert clock.now == pytest.approx(seconds, abs=2 * step)
    if seconds_an_image == 1e-6:
        assert counts == MAX_IMAGES
        assert 80 <= len(clock.evaluations) <= 105  # cheap, but nobody needs more
    if seconds_an_image == 1e-4:
        assert len(clock.evaluations) > 6
        between = np.diff(clock.evaluations[2:-1])  # the last one comes at the end
        assert between.max() < 1.5 * between.min() + 5 * step
    resumed = online([], None, schedule)
    resumed.load_state_dict(evaluation.state_dict())
    assert resumed.share == evaluation.share
    assert resumed.state_dict() == evaluation.state_dict()
