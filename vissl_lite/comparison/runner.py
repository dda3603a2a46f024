"""Run a comparison encoder by encoder, and store each finished run."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

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
from vissl_lite.comparison.store import Cell, Store, digest_names, digest_weights
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.training.hardware import Hardware
from vissl_lite.training.progress import progress_bar
from vissl_lite.transfer.base import LabelledDataset

log = logging.getLogger(__name__)

# Candidate learning rates of fine-tuning.
DEFAULT_LEARNING_RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)


class Runner:
    """Run the cells of an encoder that are not in the store.

    Args:
        plan: Plan of the comparison.
        data: Labelled data set.
        amounts: Amounts of labels.
        store: Store of finished cells.
        hardware: Devices and precision of fine-tuning.
    """

    def __init__(
        self,
        plan: Plan,
        data: LabelledDataset,
        amounts: Sequence[Amount],
        store: Store,
        hardware: Hardware,
    ) -> None:
        self.plan, self.data, self.amounts = plan, data, amounts
        self.store, self.hardware = store, hardware
        self.subsets = {
            (amount.name, seed): amount.subsample(data, seed)
            for amount in amounts
            for seed in plan.options.all_seeds()
        }

    def run(self, name: str, protocols: Sequence[Protocol]) -> dict[Cell, Score]:
        """Scores of all cells of an encoder.

        Args:
            name: Encoder, as given by the user.
            protocols: Protocols to evaluate it with.
        """
        scores: dict[Cell, Score] = {}
        # Scores of other seeds that drew the same labels, by protocol, labels and weights.
        reusable: dict[tuple[str, str, str], Score] = {}
        features: Features | None = None
        weights = ""
        for seed in self.plan.options.all_seeds():
            encoder = self.plan.load(name, seed, self.data)
            if digest_weights(encoder) != weights:  # for the first seed and untrained encoders
                weights, features = digest_weights(encoder), None
            for protocol in protocols:
                for amount in self.amounts:
                    cell = Cell(name, protocol, amount.name, seed)
                    subset = self.subsets[amount.name, seed]
                    inputs = self._inputs(subset, encoder, weights)
                    key = (protocol, inputs["labels"], weights)
                    score = self.store.load(cell, inputs)
                    if score is None and key in reusable:
                        score = reusable[key]
                        self.store.save(cell, score, inputs)
                    if score is None:
                        if protocol == "finetune":
                            score = self._finetune(cell, encoder, subset)
                        else:
                            features = features or self._features(name, encoder)
                            used = subset.for_probes(self.plan.options.refit)
                            score = evaluate_frozen(protocol, features, used, self.plan.options.k)
                        self.store.save(cell, score, inputs)
                    if protocol != "finetune":  # fine-tuning depends on the seed as well
                        reusable[key] = score
                    scores[cell] = score
                    log.info(
                        "%s, %s, %s, seed %d: %.3f", name, protocol, amount.name, seed, score.value
                    )
        return scores

    def _inputs(self, subset: LabelledDataset, encoder: Encoder, weights: str) -> dict[str, Any]:
        """Inputs of a cell. A stored score is valid only if they are the same."""
        return {
            "weights": weights,
            "labels": digest_names(subset.identity()),
            "image_size": encoder.image_size,
            "images": encoder.reader.as_dict(),
            "layers": self.plan.options.layers,
            "refit": self.plan.options.refit,
        }

    def _features(self, name: str, encoder: Encoder) -> Features:
        used: dict[str, None] = {}
        for subset in self.subsets.values():
            used |= dict.fromkeys([*subset.paths("train"), *subset.paths("val")])
        paths = [*used, *self.data.paths("test")]
        with progress_bar() as bar:
            task = bar.add_task("features", total=len(paths), info=name)
            return Features(encoder, paths, self.plan.options.layers, partial(bar.advance, task))

    def _finetune(self, cell: Cell, encoder: Encoder, subset: LabelledDataset) -> Score:
        rates = sorted(as_list(self.plan.options.lr) or DEFAULT_LEARNING_RATES)
        untrained = cell.encoder.startswith("random:")
        settings = self.plan.options.settings(seed=cell.seed, untrained=untrained)
        return finetune_best(
            encoder, self.plan.task, subset, settings, rates, self.hardware, self.store.path(cell)
        )
