"""What is compared: the arms, the labels, the protocols, all checked before anything is run."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Literal

import torch

from vissl_lite.comparison.amounts import Amount, make_amounts
from vissl_lite.comparison.protocols import Protocol
from vissl_lite.encoder import Encoder
from vissl_lite.encoder_folder import encoder_for
from vissl_lite.errors import (
    UserError,
    WeightsUnavailableError,
    check_count,
    check_image_size,
    check_seed,
)
from vissl_lite.optim import OptimizerSettings, check_rates
from vissl_lite.transfer.base import LabelledDataset
from vissl_lite.transfer.finetuning import TransferSettings
from vissl_lite.transfer.tasks import check_given, find_task

# Draws of labels; each is a training.
LARGEST_SEEDS = 10_000

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What is compared, checked. The same names as the parameters of ``compare``."""

    encoder: list[str]
    data: str
    task: str
    protocols: list[Protocol] | None
    fractions: list[float] | None
    shots: list[int] | None
    seeds: int
    baseline: str | None
    layers: bool
    annotations: str | None
    detector: Literal["fcos", "retinanet", "faster_rcnn"] | None
    k: int
    lr: list[float] | None
    epochs: int | None
    batch_size: int | None
    image_size: int | None
    upright: bool
    seed: int

    def __post_init__(self) -> None:
        if self.seeds < 3:
            raise UserError(f"--seeds {self.seeds} must be at least 3: fewer show no spread")
        check_count("seeds", self.seeds, LARGEST_SEEDS)
        for name in ("k", "epochs", "batch_size"):
            check_count(name, getattr(self, name))
        check_image_size(self.image_size)
        for rate in self.lr or ():
            check_rates(rate, None)
        make_amounts(self.fractions, self.shots)
        check_seed(self.seed, self.seeds - 1)
        twice = [name for name in self.encoder if self.encoder.count(name) > 1]
        if twice:
            raise UserError(f"--encoder {twice[0]} is given twice")
        names = ("annotations", "detector", "shots")
        check_given(find_task(self.task), [n for n in names if getattr(self, n) is not None])

    def all_seeds(self) -> list[int]:
        return list(range(self.seed, self.seed + self.seeds))

    def load_data(self) -> LabelledDataset:
        data: LabelledDataset = find_task(self.task).load_data(self.data, self.settings())
        return data

    def choose_protocols(self, data: LabelledDataset) -> list[Protocol]:
        frozen = data.image_classes("train") is not None
        wanted: list[Protocol] = list(
            dict.fromkeys(self.protocols or (["knn", "linear"] if frozen else ["finetune"]))
        )
        if not frozen and wanted != ["finetune"]:
            raise UserError(
                "--protocols knn and linear need one class an image: give --protocols finetune"
            )
        if self.layers and wanted == ["finetune"]:
            raise UserError("--layers goes with --protocols knn and linear: fine-tuning trains all")
        return wanted

    def choose_arms(self) -> tuple[list[str], str]:
        """All arms, and the one that others are held against."""
        basis = self.baseline
        if basis is None:
            basis = next((name for name in self.encoder if name.startswith("random:")), None)
        if basis is None:
            first = self.encoder[0]
            name = first.removeprefix("timm:")
            if not first.startswith("timm:"):
                name = encoder_for(first, None).backbone
            basis = f"random:{name.split('.')[0]}"
        arms = self.encoder if basis in self.encoder else [*self.encoder, basis]
        if len(arms) < 2:
            raise UserError(f"nothing to compare {basis} with: give two encoders or more")
        return arms, basis

    def choose_amounts(self, data: LabelledDataset) -> tuple[list[Amount], dict[str, int]]:
        """The amounts of labels that differ, and how many labels each is."""
        amounts: list[Amount] = []
        labels: dict[str, int] = {}
        for amount in make_amounts(self.fractions, self.shots):
            some = amount.of(data, self.seed)
            count = len(some.train) + len(some.val)
            if count in labels.values():
                log.info("%s of the labels are as many as the amount before: left out", amount.name)
                continue
            amounts.append(amount)
            labels[amount.name] = count
        return amounts, labels

    def try_arms(
        self, arms: Sequence[str], basis: str, data: LabelledDataset
    ) -> tuple[list[str], dict[str, str]]:
        """The arms that can be had, and why the others can't."""
        found, left_out = [], {}
        for name in arms:
            try:
                self.load(name, self.seed, data)
                found.append(name)
            except WeightsUnavailableError as error:
                left_out[name] = str(error)
        if basis in left_out:
            raise UserError(f"the baseline can't be had: {left_out[basis]}")
        if len(found) < 2:
            raise UserError(f"nothing is left to compare with {basis}: "
                            f"{next(iter(left_out.values()))}")  # fmt: skip
        return found, left_out

    def load(self, arm: str, seed: int, data: LabelledDataset) -> Encoder:
        """An arm's encoder; the seed is of an untrained one's weights."""
        size, untrained = self.image_size, arm.startswith("random:")
        if size is None:
            settings = self.settings(untrained=untrained)
            size = find_task(self.task).image_size(data, settings)
        torch.manual_seed(seed)
        return encoder_for(arm, size)

    def figure(self, data: LabelledDataset) -> str:
        """The name of the figure that fine-tuning is compared by."""
        return find_task(self.task).validation_metric(data).removeprefix("val_")

    def settings(
        self, rate: float = 1e-3, seed: int | None = None, untrained: bool = True
    ) -> TransferSettings:
        """``finetune``'s own settings but for the rate."""
        given = {"annotations": self.annotations, "detector": self.detector}
        task = find_task(self.task)
        own = {field.name: field.default for field in fields(task.options)}
        own |= {name: value for name, value in given.items() if value is not None}
        settings: TransferSettings = task.make_settings(
            SimpleNamespace(**own),
            epochs=self.epochs,
            batch_size=self.batch_size,
            optimizer=OptimizerSettings("adamw", rate, 0.05, 1.0 if untrained else 0.75),
            upright=self.upright,
            seed=self.seed if seed is None else seed,
            pretrained=not untrained,
        )
        return settings
