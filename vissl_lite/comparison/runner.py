"""Run a comparison encoder by encoder, and store each finished run."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

from vissl_lite.comparison.amounts import Amount
from vissl_lite.comparison.options import as_list
from vissl_lite.comparison.plan import Plan
from vissl_lite.comparison.protocols import (
    Features,
    Protocol,
    Score,
    evaluate_frozen,
    finetune_best,
)
from vissl_lite.comparison.simulation import Selector, SimulatedLabelling
from vissl_lite.comparison.store import Cell, Store, digest_names, digest_weights
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.encoders.folder import is_untrained
from vissl_lite.training.hardware import Hardware
from vissl_lite.training.progress import progress_bar
from vissl_lite.transfer.dataset import LabelledDataset

log = logging.getLogger(__name__)

# Candidate learning rates of fine-tuning.
DEFAULT_LEARNING_RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)


class Runner:
    """Run the cells of an encoder, or of a way to choose images, that are not in the store.

    Args:
        plan: Plan of the comparison.
        data: Labelled data set.
        amounts: Amounts of labels; empty with a simulation.
        store: Store of finished cells.
        hardware: Devices and precision of fine-tuning.
        simulation: The labelling to simulate, if ways to choose images are compared.
    """

    def __init__(
        self,
        plan: Plan,
        data: LabelledDataset,
        amounts: Sequence[Amount],
        store: Store,
        hardware: Hardware,
        simulation: SimulatedLabelling[LabelledDataset] | None = None,
    ) -> None:
        self.plan, self.data, self.store, self.hardware = plan, data, store, hardware
        self.simulation = simulation
        self.amounts = list(simulation.labels) if simulation else [one.name for one in amounts]
        self.subsets = {
            (amount.name, seed): amount.subsample(data, seed)
            for amount in amounts
            for seed in plan.options.all_seeds()
        }
        self._features: Features | None = None
        self._features_depend_on: tuple[Any, ...] = ()  # weights, and how images are read

    def run(self, arm: str, protocols: Sequence[Protocol]) -> dict[Cell, Score]:
        """Scores of all cells of an encoder, or of a way to choose images.

        Args:
            arm: Encoder, as given by the user, or the name of the way.
            protocols: Protocols to evaluate it with.
        """
        name = self.plan.encoders[0] if self.simulation else arm
        scores: dict[Cell, Score] = {}
        # Scores of other seeds that drew the same labels, by protocol, labels and weights.
        reusable: dict[tuple[str, str, str], Score] = {}
        for seed in self.plan.options.all_seeds():
            encoder = self.plan.load(name, seed, self.data)
            weights = digest_weights(encoder)
            depend_on = (weights, *self._beside_weights(encoder).values())
            if depend_on != self._features_depend_on:
                self._features_depend_on, self._features = depend_on, None
            for protocol in protocols:
                for amount in self.amounts:
                    cell = Cell(arm, protocol, amount, seed)
                    subset = self._subset(cell, name, encoder)
                    inputs = self._inputs(subset, encoder, weights)
                    key = (protocol, inputs["labels"], weights)
                    score = self.store.load(cell, inputs)
                    if score is None and key in reusable:
                        score = reusable[key]
                        self.store.save(cell, score, inputs)
                    if score is None:
                        if protocol == "finetune":
                            score = self._finetune(cell, name, encoder, subset)
                        else:
                            features = self._features_of(name, encoder)
                            used = subset.for_probes(self.plan.options.refit)
                            score = evaluate_frozen(protocol, features, used, self.plan.options.k)
                        self.store.save(cell, score, inputs)
                    if protocol != "finetune":  # fine-tuning depends on the seed as well
                        reusable[key] = score
                    scores[cell] = score
                    log.info("%s, %s, %s, seed %d: %.3f", arm, protocol, amount, seed, score.value)
        return scores

    def _subset(self, cell: Cell, name: str, encoder: Encoder) -> LabelledDataset:
        """The data set with the labels of a cell."""
        if self.simulation is None:
            return self.subsets[cell.amount, cell.seed]
        budget = self.simulation.labels[cell.amount].train
        features = self._features_of(name, encoder).of(self.simulation.paths)
        return self.simulation.subset(cast(Selector, cell.encoder), budget, cell.seed, features)

    def _inputs(self, subset: LabelledDataset, encoder: Encoder, weights: str) -> dict[str, Any]:
        """Inputs of a cell. A stored score is valid only if they are the same."""
        return {
            "weights": weights,
            "labels": digest_names(subset.identity()),
            **self._beside_weights(encoder),
            "layers": self.plan.options.layers,
            "refit": self.plan.options.refit,
        }

    @staticmethod
    def _beside_weights(encoder: Encoder) -> dict[str, Any]:
        """What encoders with the same weights can differ in."""
        return {
            "backbone": encoder.backbone,
            "model_args": encoder.model_args,
            "image_size": encoder.image_size,
            "mean": list(encoder.mean),
            "std": list(encoder.std),
            "images": encoder.reader.as_dict(),
        }

    def _features_of(self, name: str, encoder: Encoder) -> Features:
        if self._features is None:
            subsets = [self.simulation.data] if self.simulation else list(self.subsets.values())
            used: dict[str, None] = {}
            for subset in subsets:
                used |= dict.fromkeys([*subset.paths("train"), *subset.paths("val")])
            paths = [*used, *self.data.paths("test")]
            with progress_bar() as bar:
                task = bar.add_task("features", total=len(paths), info=name)
                layers = self.plan.options.layers
                self._features = Features(encoder, paths, layers, partial(bar.advance, task))
        return self._features

    def _finetune(self, cell: Cell, name: str, encoder: Encoder, subset: LabelledDataset) -> Score:
        rates = sorted(as_list(self.plan.options.lr) or DEFAULT_LEARNING_RATES)
        untrained = is_untrained(name)
        settings = self.plan.options.settings(seed=cell.seed, untrained=untrained)
        return finetune_best(
            encoder, self.plan.task, subset, settings, rates, self.hardware, self.store.path(cell)
        )
