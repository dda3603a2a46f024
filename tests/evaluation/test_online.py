"""What a look sees, what it costs, and what it says."""

import logging
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vissl_lite.data.images import find_images
from vissl_lite.data.labelled import LabelledImages, Part, load_labelled
from vissl_lite.encoder import Encoder, build_encoder
from vissl_lite.evaluation.measures import effective_rank, feature_std
from vissl_lite.evaluation.watch import (
    COLLAPSED_RANK,
    COLLAPSED_STD,
    LEAST,
    MEASURES,
    MOST,
    TIME_SHARE,
    Watch,
)
from vissl_lite.training.pace import Pace

BATCH_SIZE = 8


def trainer() -> Any:
    return SimpleNamespace(
        is_global_zero=True,
        loggers=[],
        world_size=1,
        should_stop=False,
        strategy=SimpleNamespace(barrier=lambda: None),
        optimizers=[],
        global_rank=0,
    )


class Task(nn.Module):
    """As much of a pretext as is watched."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def trained_encoder(self) -> nn.Module:
        return self.encoder

    def whole(self) -> "Task":
        return self


def make_watch(
    paths: list[str],
    labelled: LabelledImages | None = None,
    pace: Pace | None = None,
    **options: Any,
) -> Watch:
    data = SimpleNamespace(batches_per_epoch=100, batch_size=BATCH_SIZE)
    return Watch(paths, labelled, data, pace or Pace(0.1, 0.1, 0, batches=10), 0, **options)  # type: ignore[arg-type]


def look(watch: Watch, encoder: Encoder) -> dict[str, float]:
    watch.look(trainer(), Task(encoder))
    return watch.last


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


def test_a_look_gives_every_measure_and_is_the_same_twice(
    photos: Path, labelled: Path, encoder: Encoder
) -> None:
    paths = find_images([photos])
    data = load_labelled(labelled, 0, need_test=False)
    first = look(make_watch(paths, data), encoder)
    assert first == look(make_watch(paths, data), encoder)
    assert tuple(first) == MEASURES
    assert first["alignment"] > 0
    assert first["linear"] == 1  # colours tell the classes apart


def test_the_untrained_encoder_is_looked_at_after_the_first_step(photos: Path) -> None:
    paths = find_images([photos])
    encoder = build_encoder("test_resnet", 32)
    untrained = look(make_watch(paths), encoder)
    watch, running = make_watch(paths), trainer()
    task: Any = Task(encoder)
    watch.on_train_start(running, task)
    assert not watch.looked
    for parameter in encoder.parameters():
        parameter.data.mul_(1.1)
    watch.pace.batches = 1
    watch.on_train_batch_end(running, task, None, Any, 0)  # type: ignore[arg-type]
    assert watch.last == untrained
    watch.on_train_end(running, task)
    assert watch.last != untrained


def test_a_look_changes_nothing_about_the_training(photos: Path, encoder: Encoder) -> None:
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    encoder.train()
    look(make_watch(find_images([photos])), encoder)
    assert encoder.training
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_test_images_stay_unseen_and_validation_images_are_never_learnt_from(
    photos: Path, labelled: Path, encoder: Encoder
) -> None:
    data = load_labelled(labelled, 0)
    unseen = Part(["/nowhere.png"] * 5, np.zeros(5, np.int64))
    wrong = Part(data.val.paths, (data.val.labels + 1) % 3)
    paths = find_images([photos])
    right = look(make_watch(paths, LabelledImages(data.classes, data.train, data.val, unseen)),
                 encoder)  # fmt: skip
    mislabelled = look(make_watch(paths, LabelledImages(data.classes, data.train, wrong, unseen)),
                       encoder)  # fmt: skip
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
    seen = LabelledImages(data.classes, train, val, data.test)
    watch = make_watch([broken[2], *find_images([photos])], seen)
    with caplog.at_level(logging.WARNING):
        look(watch, encoder)
        values = look(watch, encoder)
    for path in broken:
        assert caplog.text.count(path) == 1
    assert (values["knn"], values["linear"]) == (1, 1)  # labels went with their images


def test_labels_of_one_class_give_no_linear_accuracy(
    photos: Path, labelled: Path, encoder: Encoder
) -> None:
    data = load_labelled(labelled, 0)
    one = data.train.take(np.flatnonzero(data.train.labels == 0))
    values = look(make_watch(find_images([photos]), LabelledImages(data.classes, one, data.val,
                                                                  data.test)), encoder)  # fmt: skip
    assert "linear" not in values
    assert 0 < values["knn"] < 1


def test_two_images_are_enough(photos: Path, encoder: Encoder) -> None:
    assert np.isfinite(list(look(make_watch(find_images([photos])[:2]), encoder).values())).all()


@pytest.mark.parametrize("budget", ["epochs", "time"])
@pytest.mark.parametrize("seconds_an_image", [1e-6, 1e-4, 1e-3])
@pytest.mark.parametrize("seconds", [60, 600])
def test_watching_stays_within_its_share(
    budget: str, seconds_an_image: float, seconds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run on a clock of our own, of 1000 steps; a look takes as long as it has images."""
    clock = 0.0
    looks: list[float] = []
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    steps = 1000
    step = seconds / steps
    time_budget = seconds if budget == "time" else None
    pace = Pace(0.1, 0.1, 0, None if time_budget else steps, time_budget)
    part = Part(["some.png"] * 6000, np.zeros(6000, np.int64))
    watch = make_watch(["some.png"] * 1000, LabelledImages(["a", "b"], part, part, part), pace)

    def measure(encoder: Any) -> None:
        nonlocal clock
        clock += seconds_an_image * (3 * watch._sizes[0] + watch._sizes[1] + watch._sizes[2])
        watch._forward = step / BATCH_SIZE / 6  # a step of two views is six passes
        watch.last = {"feature_std": 1.0, "effective_rank": 10.0}
        looks.append(clock)

    monkeypatch.setattr(watch, "_measure", measure)
    monkeypatch.setattr(watch, "_features_of_views", lambda encoder, count: [])
    running, module, batch = trainer(), Task(nn.Identity()), SimpleNamespace(broken=[])
    watch.on_train_start(running, module)  # type: ignore[arg-type]
    while not running.should_stop and pace.batches < steps:
        pace.on_train_batch_start(running, module, batch, 0)  # type: ignore[arg-type]
        clock += step
        pace.on_train_batch_end(running, module, None, batch, 0)  # type: ignore[arg-type]
        watch.on_train_batch_end(running, module, None, batch, 0)  # type: ignore[arg-type]
    watch.on_train_end(running, module)  # type: ignore[arg-type]
    assert watch.share <= TIME_SHARE * 1.05 or watch._sizes == LEAST
    if budget == "time":
        assert clock == pytest.approx(seconds, abs=2 * step)
    if seconds_an_image == 1e-6:
        assert watch._sizes == MOST
        assert 80 <= len(looks) <= 105  # cheap, but nobody needs more
    if seconds_an_image == 1e-4:
        assert len(looks) > 6
        between = np.diff(looks[2:-1])  # the last one comes at the end
        assert between.max() < 1.5 * between.min() + 5 * step
    resumed = make_watch([], None, pace)
    resumed.load_state_dict(watch.state_dict())
    assert resumed.share == watch.share
    assert resumed._sizes == watch._sizes
