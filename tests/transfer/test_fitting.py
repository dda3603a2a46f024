"""Choosing hyperparameters on held-out labels, then training on all of them.

The task here has no network: its model is one number, which training moves.
"""

from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from vissl_lite.errors import DivergedError, UserError
from vissl_lite.transfer.classification.data import LabelledImages, Part
from vissl_lite.transfer.finetuning import TransferSettings, finetune_optimizer
from vissl_lite.transfer.fitting import climb, fit_model, mean_metrics, monitor_of, most_climbed
from vissl_lite.transfer.sources.parts import PARTS
from vissl_lite.transfer.sources.reading_log import ReadingLog


def data_of(train: int, val: int, made: bool = True) -> LabelledImages:
    """Data of two classes; ``made`` says that the validation part was taken from training."""

    def part(name: str, count: int) -> Part:
        return Part([f"{name}{i}" for i in range(count)], np.arange(count) % 2)

    parts = part("train", train), part("val", val), part("test", 4)
    return LabelledImages(["a", "b"], *parts, ReadingLog("data", val_from_train=made))


@dataclass
class Number:
    """A model of one weight."""

    value: Tensor
    threshold: float = 0.0

    def state_dict(self) -> dict[str, Tensor]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.value = state["value"].clone()


class Guess:
    """Start at 0; a training moves the value by 1000 times the learning rate.

    The validation loss is best at 1.5, and the metric ``near`` at 0.5.
    """

    def __init__(self, fitted: bool = True) -> None:
        self.fitted = fitted
        self.trained: list[tuple[int, float]] = []
        self.validated: list[list[str]] = []

    def metric_names(self, data: LabelledImages) -> tuple[str, ...]:
        return ("near", "loss")

    def held_out(self, model: Number, data: LabelledImages) -> None:
        pass

    def build(self, encoder: object, data: LabelledImages, settings: TransferSettings) -> Number:
        return Number(torch.zeros(()))

    def starts_fitted(self, *given: Any) -> bool:
        return self.fitted

    def variants(self, *given: Any) -> list[TransferSettings]:
        return [given[-1]]

    def train(
        self, model: Number, data: LabelledImages, settings: TransferSettings, *rest: object
    ) -> None:
        assert settings.batch_size is None or settings.batch_size <= len(data.train)
        self.trained.append((len(data.train), settings.optimizer.lr))
        model.value = model.value + 1000 * settings.optimizer.lr

    def validate(self, model: Number, data: LabelledImages, part: str = "val") -> dict[str, float]:
        if part == "val":
            self.validated.append(data.val.paths)
        value = float(model.value)
        return {"near": -abs(value - 0.5), "loss": abs(value - 1.5)}

    def calibrate(self, model: Number, data: LabelledImages, like: Number | None = None) -> None:
        model.threshold = len(data.val) if like is None else like.threshold


def fit(task: Guess, data: LabelledImages, *rates: float, **settings: Any) -> Any:
    settings = {"optimizer": finetune_optimizer(True, lr=2e-3), "pretrained": True, **settings}
    chosen = TransferSettings(**settings)
    return fit_model(cast(Any, task), cast(Any, None), data, chosen, rates)


def test_many_validation_labels_choose_then_all_labels_are_trained_on() -> None:
    task = Guess()
    fitted = fit(task, data_of(300, 100))
    assert task.trained == [(300, 2e-3), (400, 2e-3)]
    assert fitted.chosen.share == 0.75
    assert float(fitted.model.value) == pytest.approx(1.5)
    assert (fitted.train_images, fitted.val_images, fitted.folds) == (400, 100, 1)
    assert fitted.refit
    assert fitted.model.threshold == 100  # of the model that has not seen the validation images
    assert "75% of the way" in fitted.describe()
    assert fitted.describe().startswith("By the loss of 100 validation images")


def test_few_validation_labels_choose_by_cross_validation() -> None:
    task = Guess()
    fitted = fit(task, data_of(20, 10))
    assert task.trained == [(20, 2e-3)] * 3 + [(30, 2e-3)]
    assert (fitted.folds, fitted.val_images) == (3, 30)
    held_out = {tuple(paths) for paths in task.validated}
    assert sorted(path for paths in held_out for path in paths) == sorted(
        data_of(20, 10).train.paths + data_of(20, 10).val.paths
    )


def test_a_validation_part_of_ones_own_is_not_trained_on() -> None:
    task = Guess()
    fitted = fit(task, data_of(20, 10, made=False))
    assert task.trained == [(20, 2e-3)]
    assert not fitted.refit
    assert float(fitted.model.value) == pytest.approx(1.5)
    assert fit(Guess(), data_of(20, 10, made=False), refit=True).train_images == 30
    assert fit(Guess(), data_of(20, 10), refit=False).train_images == 20


def test_a_model_before_its_first_step_is_a_candidate_only_if_it_is_fitted() -> None:
    """A training that makes the model worse is not used."""
    away = finetune_optimizer(True, lr=-1e-3)
    assert fit(Guess(), data_of(20, 100), optimizer=away).chosen.share == 0
    random = fit(Guess(fitted=False), data_of(20, 100), optimizer=away)
    assert random.chosen.share == 1
    assert float(random.model.value) == pytest.approx(-1)


def test_a_share_is_a_candidate_only_if_every_round_has_a_fitted_probe() -> None:
    """A probe can't be fitted where a fold leaves one class; the others must not gain by it."""

    class Partly(Guess):
        def starts_fitted(self, *given: Any) -> bool:
            return len(self.trained) != 1

    task = Partly()
    fitted = fit(task, data_of(20, 10))
    assert [(one.share, one.metrics) for one in fitted.candidates] == [
        (1.0, {"near": pytest.approx(-1.5), "loss": pytest.approx(0.5)})
    ]
    assert fitted.chosen.share == 1.0


def test_a_metric_that_a_round_lacks_is_the_mean_over_the_others() -> None:
    parts = [({"map": 0.8, "loss": 1.0}, 10), ({"loss": 4.0}, 20)]
    assert mean_metrics(parts) == {"map": 0.8, "loss": pytest.approx(3.0)}


def test_the_learning_rate_is_chosen_with_the_rest() -> None:
    task = Guess(fitted=False)
    fitted = fit(task, data_of(20, 100), 1e-4, 5e-4, 1e-3, 1.4e-3, 4e-3)
    assert fitted.chosen.lr == 1.4e-3
    assert task.trained[-1] == (120, 1.4e-3)
    near = fit(Guess(fitted=False), data_of(20, 100), 1e-4, 5e-4, 1e-3, monitor="val_near")
    assert near.chosen.lr == 5e-4


def test_frozen_norms_are_chosen_with_the_middle_rate() -> None:
    class Norms(Guess):
        def variants(self, *given: Any) -> list[TransferSettings]:
            return [replace(given[-1], frozen_norm=frozen) for frozen in (True, False)]

        def train(self, model: Number, data: Any, settings: TransferSettings, *rest: Any) -> None:
            super().train(model, data, settings)
            if settings.frozen_norm:
                model.value = model.value - 5  # far from the best

    task = Norms()
    fitted = fit(task, data_of(300, 100), 1e-4, 1e-3, 2e-3)
    assert (fitted.chosen.lr, fitted.chosen.frozen_norm) == (2e-3, False)
    assert [(lr, images) for images, lr in task.trained] == [
        (1e-3, 300), (1e-3, 300), (1e-4, 300), (2e-3, 300), (2e-3, 400)
    ]  # fmt: skip
    assert "BatchNorm trained" in fitted.describe()


def test_without_validation_images_nothing_is_chosen() -> None:
    task = Guess()
    fitted = fit(task, data_of(20, 0))
    assert task.trained == [(20, 2e-3)]
    assert (fitted.chosen.share, fitted.chosen.metrics, fitted.val_images) == (1.0, {}, 0)
    assert "no images were left" in fitted.describe()
    assert fit(Guess(), data_of(20, 0), 1e-4, 3e-4, 1e-3).chosen.lr == 3e-4


def test_added_images_of_a_group_do_not_train_where_the_group_is_held_out() -> None:
    seen: list[tuple[set[str], set[str]]] = []

    class Noting(Guess):
        def train(self, model: Number, data: LabelledImages, *rest: Any) -> None:
            super().train(model, data, *rest)
            seen.append(tuple({path.split("-")[0] for path in data.paths(p)} for p in PARTS[:2]))

    def part(name: str, *numbers: int) -> Part:
        paths = [f"p{number}-{name}{i}" for number in numbers for i in range(2)]
        return Part(paths, np.arange(len(paths)) % 2)

    parts = part("train", 0, 1, 2, 3), part("val", 4, 5), part("test", 6)
    groups = {path: path.split("-")[0] for one in parts for path in one.paths}
    reading = ReadingLog("data", groups=groups, group_by="p[0-9]", val_from_train=True)
    data = LabelledImages(["a", "b"], *parts, reading)
    none = data.test.take(np.empty(0, np.int64))
    added = replace(data, train=part("more", *range(6), 7), val=none, test=none)
    settings = TransferSettings(optimizer=finetune_optimizer(True, lr=2e-3), pretrained=True)
    fitted = fit_model(cast(Any, Noting()), cast(Any, None), data, settings, added=cast(Any, added))
    assert fitted.folds == 3
    assert all(not train & val for train, val in seen)
    assert [len(train) for train, _ in seen] == [5, 5, 5, 7]  # and all in the last training
    assert (fitted.train_images, fitted.added) == (12, 14)


def test_a_batch_that_fits_all_labels_fits_the_folds() -> None:
    assert fit(Guess(), data_of(6, 6), batch_size=12).train_images == 12


@pytest.mark.parametrize("best", range(5))
def test_climbing_finds_the_top_of_one_hill(best: int) -> None:
    tried: list[float] = []

    def score(rate: float) -> tuple[float]:
        tried.append(rate)
        return (-abs(rate - best),)

    climb(score, range(5))
    assert best in tried
    assert len(tried) == len(set(tried)) <= most_climbed(5) == 4


@pytest.mark.parametrize("count", range(1, 9))
def test_no_more_rates_are_tried_than_the_time_is_divided_by(count: int) -> None:
    def tried(best: int) -> int:
        ranks = {}

        def score(rate: float) -> tuple[float]:
            ranks[rate] = (-abs(rate - best),)
            return ranks[rate]

        climb(score, range(count))
        return len(ranks)

    assert max(map(tried, range(count))) == most_climbed(count)


def test_monitors() -> None:
    task = cast(Any, Guess())
    assert monitor_of(task, data_of(2, 999), None) == "loss"
    assert monitor_of(task, data_of(2, 1000), None) == "near"
    assert monitor_of(task, data_of(2, 2), "val_Near") == "near"
    with pytest.raises(UserError, match=r"--monitor val_los.*loss"):
        monitor_of(task, data_of(2, 2), "val_los")


def test_a_time_budget_is_for_all_trainings_together() -> None:
    seconds = []

    class Timed(Guess):
        def train(
            self, model: Number, data: LabelledImages, settings: TransferSettings, *rest: object
        ) -> None:
            seconds.append(settings.seconds)

    fit(Timed(), data_of(20, 10), seconds=60.0)
    assert seconds == [15.0] * 4
    seconds.clear()
    fit(Timed(), data_of(300, 100), 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, seconds=60.0)
    assert set(seconds) == {12.0}  # at most four of the five rates, and all labels
    seconds.clear()
    fit(Timed(), data_of(20, 10), seconds=60.0, pretrained=False)
    assert seconds == [30.0] * 2  # nothing to choose: one held-out part, for its metrics
    seconds.clear()
    fit(Timed(), data_of(20, 0), 1e-4, 1e-3, 1e-2, seconds=60.0)
    assert seconds == [60.0]  # no images to choose a rate by: one training


def test_a_training_that_diverged_is_not_chosen() -> None:
    class Diverging(Guess):
        def validate(
            self, model: Number, data: LabelledImages, part: str = "val"
        ) -> dict[str, float]:
            found = super().validate(model, data, part)
            return {k: float("nan") if float(model.value) > 1.2 else v for k, v in found.items()}

    fitted = fit(Diverging(fitted=False), data_of(20, 100), 5e-4, 1e-3, 2e-3)
    assert fitted.chosen.lr == 1e-3


def test_a_training_that_can_not_go_on_is_not_chosen_and_alone_an_error() -> None:
    class Stopping(Guess):
        def train(
            self, model: Number, data: LabelledImages, settings: TransferSettings, *rest: object
        ) -> None:
            super().train(model, data, settings, *rest)
            if settings.optimizer.lr > 1.2e-3:
                raise DivergedError(f"the loss at {settings.optimizer.lr:g} is nan")

    fitted = fit(Stopping(), data_of(20, 10), 5e-4, 1e-3, 2e-3)
    assert fitted.chosen.lr == 1e-3
    assert {one.lr for one in fitted.candidates} == {5e-4, 1e-3}
    assert fit(Stopping(), data_of(20, 100), 1e-3, 2e-3).chosen.lr == 1e-3  # from the upper one
    for rates in ((2e-3,), (2e-3, 3e-3)):
        with pytest.raises(DivergedError, match="is nan"):
            fit(Stopping(), data_of(20, 10), *rates)
