"""Plan of a comparison: encoders, amounts of labels and protocols."""

import logging
import os
from collections.abc import Mapping, Sequence

import torch

from vissl_lite.comparison.amounts import Amount, LabelCount, make_amounts
from vissl_lite.comparison.options import CompareOptions, as_list
from vissl_lite.comparison.protocols import Protocol
from vissl_lite.comparison.simulation import FIRST_ROUND, SimulatedLabelling
from vissl_lite.data.fingerprints import Fingerprints, repeats
from vissl_lite.data.image_survey import ImageSet
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.encoders.folder import encoder_for, fitting_size, is_untrained
from vissl_lite.errors import (
    UserError,
    WeightsUnavailableError,
)
from vissl_lite.options import path_list
from vissl_lite.transfer.dataset import LabelledDataset
from vissl_lite.transfer.tasks import find_task

log = logging.getLogger(__name__)


class Plan:
    """Plan of a comparison, derived from its options.

    Args:
        options: Options of the comparison.
    """

    def __init__(self, options: CompareOptions) -> None:
        self.options = options
        self.task = find_task(options.task)
        self.encoders = path_list(options.encoder)
        self.images: ImageSet | None = None  # of the training part

    def load_data(self) -> LabelledDataset:
        source = os.fspath(self.options.data)
        data: LabelledDataset = self.task.load_data(source, self.options.settings())
        return data

    def choose_protocols(self, data: LabelledDataset) -> list[Protocol]:
        has_classes = data.image_classes("train") is not None
        chosen: list[Protocol] | None = as_list(self.options.protocols)
        wanted: list[Protocol] = list(
            dict.fromkeys(chosen or (["knn", "linear"] if has_classes else ["finetune"]))
        )
        if not has_classes and wanted != ["finetune"]:
            raise UserError(
                "--protocols knn and linear need one class per image: give --protocols finetune"
            )
        if self.options.layers and wanted == ["finetune"]:
            raise UserError("--layers requires --protocols knn or linear")
        return wanted

    def choose_encoders(self) -> tuple[list[str], str]:
        """Names of all encoders, or ways to choose images, and the name of the baseline."""
        if self.options.selection:
            return list(self.options.selectors()), "random"
        baseline = None if self.options.baseline is None else os.fspath(self.options.baseline)
        if baseline is None:
            baseline = next(filter(is_untrained, self.encoders), None)
        if baseline is None:
            first = self.encoders[0]
            name = first.removeprefix("timm:")
            if not first.startswith("timm:"):
                name = encoder_for(first, None).backbone
            baseline = f"random:{name.split('.')[0]}"
        encoders = self.encoders if baseline in self.encoders else [*self.encoders, baseline]
        if len(encoders) < 2:
            raise UserError(f"nothing to compare {baseline} with: give at least two encoders")
        return encoders, baseline

    def choose_amounts(self, data: LabelledDataset) -> tuple[list[Amount], dict[str, LabelCount]]:
        """Amounts of labels, without duplicates, and the numbers of labels of each.

        Where whole groups are drawn, seeds have different numbers of labels: the means count. An
        amount that a seed can't draw, such as images without any boxes, is left out.

        Raises:
            UserError: No amount is left.
        """
        seeds = self.options.all_seeds()
        amounts: list[Amount] = []
        labels: dict[str, LabelCount] = {}
        reasons: list[UserError] = []
        for amount in make_amounts(as_list(self.options.fractions), as_list(self.options.shots)):
            drawn = []
            try:
                for seed in seeds:
                    drawn.append(amount.subsample(data, seed))
            except UserError as error:
                reasons.append(error)
                log.warning(
                    "left out: %(amount)s: with seed %(seed)d, %(why)s",
                    {"amount": amount.name, "seed": seeds[len(drawn)], "why": str(error)},
                    extra={"code": "amount.left_out"},
                )
                continue
            train, val = (
                round(sum(map(len, parts)) / len(seeds))
                for parts in ([one.train for one in drawn], [one.val for one in drawn])
            )
            count = LabelCount(train, val)
            if count.total in [one.total for one in labels.values()]:
                log.info(
                    "left out: %s, as many labels as another amount",
                    amount.name,
                )
                continue
            amounts.append(amount)
            labels[amount.name] = count
        if not amounts:
            raise reasons[0]
        return amounts, labels

    def load_encoders(
        self, encoders: Sequence[str], baseline: str, data: LabelledDataset
    ) -> tuple[list[str], dict[str, str]]:
        """Try to load each encoder: those that load, and why the others are not available."""
        found, left_out, backbones = [], {}, {}
        for name in encoders:
            try:
                backbones[name] = self.load(name, self.options.seed, data).backbone
                found.append(name)
            except WeightsUnavailableError as error:
                left_out[name] = str(error)
        if baseline in left_out:
            raise UserError(f"the baseline is not available: {left_out[baseline]}")
        if len(found) < 2:
            raise UserError(
                f"nothing is left to compare with {baseline}: {next(iter(left_out.values()))}"
            )
        for name in found:
            if is_untrained(baseline) and backbones[name] != backbones[baseline]:
                log.warning(
                    "%(encoder)s is a %(backbone)s, and the baseline a %(other)s: their difference "
                    "is that of two architectures as well, not of pre-training alone",
                    {
                        "encoder": name,
                        "backbone": backbones[name],
                        "other": backbones[baseline],
                    },
                    extra={"code": "baseline.backbone"},
                )
        return found, left_out

    def load(self, name: str, seed: int, data: LabelledDataset) -> Encoder:
        """Load an encoder; ``seed`` determines the weights of an untrained one."""
        size = self.options.image_size or self._default_size(name, data)
        torch.manual_seed(seed)
        if self.images is None:
            self.images = ImageSet(data.paths("train"), self.options)
        return encoder_for(name, size, self.images)

    def _default_size(self, name: str, data: LabelledDataset) -> int | None:
        """Image size of an encoder, rounded to its patches; None for its own.

        Where pre-trained encoders keep their own, an untrained one gets that of the first of them,
        so that its images have no more pixels, or fewer, than those it is compared with.
        """
        pretrained = [one for one in self.encoders if not is_untrained(one)]
        size = self.task.image_size(data, self.options.settings(untrained=not pretrained))
        if size is not None or not is_untrained(name):
            return fitting_size(name, size)
        for one in pretrained:
            try:
                return fitting_size(name, encoder_for(one, None).image_size)
            except WeightsUnavailableError:  # left out of the comparison
                continue
        size = self.task.image_size(data, self.options.settings(untrained=True))
        return fitting_size(name, size)

    def simulate(
        self, data: LabelledDataset, prints: Mapping[str, Fingerprints]
    ) -> SimulatedLabelling[LabelledDataset] | None:
        """The labelling to simulate, if ways to choose images are compared.

        Args:
            data: Labelled images.
            prints: Fingerprints of the images, by part.
        """
        if not self.options.selection:
            return None
        probed = [name for name in self.options.selectors() if name in FIRST_ROUND]
        if probed and data.image_classes("train") is None:
            raise UserError(f"--selection {probed[0]} needs one class per image")
        repeated = repeats(prints["train"].append(prints["val"]))
        return SimulatedLabelling(data, self.options.all_budgets(), repeated)

    def trained_on(self, data: LabelledDataset) -> str:
        """Which labels all protocols train on, and which they choose by, as a sentence."""
        if self.options.selection:
            return (
                f"All protocols are trained on all labels of a budget, from {self.encoders[0]}; "
                f"what is chosen for them is chosen on labels that were held out of a training "
                f"before, or on a validation part of your own."
            )
        if data.refits(self.options.refit):
            return (
                "All protocols are trained on training and validation labels together; what is "
                "chosen for them is chosen on labels that were held out of a training before."
            )
        return (
            "All protocols are trained on the training labels alone; the learning rate of finetune "
            "is chosen on the validation labels, and the penalty of linear by cross-validation."
        )

    def finetune_metric(self, data: LabelledDataset) -> str:
        """Name of the metric that fine-tuned encoders are compared by."""
        name: str = self.task.metric_names(data)[0]
        return name
