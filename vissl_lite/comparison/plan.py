"""What is compared: the arms, the labels, the protocols, all checked before anything is run."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
from vissl_lite.transfer.classification.data import LabelledImages, load_labelled
from vissl_lite.transfer.detection.data import load_boxes
from vissl_lite.transfer.finetuning import Task, TaskName, make_task
from vissl_lite.transfer.segmentation.data import load_masks

# Draws of labels; each is a training.
LARGEST_SEEDS = 10_000

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What is compared, checked. The same names as the parameters of ``compare``."""

    encoder: list[str]
    data: str
    task: TaskName
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
        if self.annotations is not None and self.task == "classification":
            raise UserError("--annotations is for --task detection or segmentation")
        if self.detector is not None and self.task != "detection":
            raise UserError(f"--detector is for --task detection, not for {self.task}")
        if self.shots is not None and self.task != "classification":
            raise UserError(f"--shots is for --task classification: give --fractions for "
                            f"{self.task}")  # fmt: skip

    def all_seeds(self) -> list[int]:
        return list(range(self.seed, self.seed + self.seeds))

    def load_data(self) -> Any:
        if self.task == "classification":
            return load_labelled(self.data, self.seed, multi_label=True)
        load = load_boxes if self.task == "detection" else load_masks
        return load(self.data, self.annotations, self.seed)

    def choose_protocols(self, data: Any) -> list[Protocol]:
        frozen = isinstance(data, LabelledImages) and not data.multi_label
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

    def choose_amounts(self, data: Any) -> tuple[list[Amount], dict[str, int]]:
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
        self, arms: Sequence[str], basis: str, data: Any
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

    def load(self, arm: str, seed: int, data: Any) -> Encoder:
        """An arm's encoder; the seed is of an untrained one's weights."""
        size = self.image_size
        if size is None and (arm.startswith("random:") or self.task != "classification"):
            size = self.make_task(data, 1e-3, 0, True).image_size()
        torch.manual_seed(seed)
        return encoder_for(arm, size)

    def figure(self, data: Any) -> str:
        """The name of the figure that fine-tuning is compared by."""
        return self.make_task(data, 1e-3, 0, True).chosen_by.removeprefix("val_")

    def make_task(self, data: Any, rate: float, seed: int, untrained: bool) -> Task:
        """Fine-tuning on some labels, with ``finetune``'s own settings but for the rate."""
        decay = 1.0 if untrained else 0.75
        few = self.batch_size is not None and self.batch_size < 8
        return make_task(
            data,
            epochs=self.epochs,
            batch_size=self.batch_size,
            optimizer=OptimizerSettings("adamw", rate, 0.05, decay),
            upright=self.upright,
            seed=seed,
            **({"kind": self.detector or "faster_rcnn"} if self.task == "detection" else {}),
            **({} if self.task == "classification" else {"frozen_norm": few and not untrained}),
        )
