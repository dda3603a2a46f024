"""Runs a comparison encoder by encoder, and keeps each finished run."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from vissl_lite.comparison.amounts import Amount
from vissl_lite.comparison.options import listed
from vissl_lite.comparison.plan import Plan
from vissl_lite.comparison.protocols import (
    Features,
    Protocol,
    Score,
    evaluate_frozen,
    finetune_best,
)
from vissl_lite.comparison.store import Cell, Store, digest_weights, digest_words
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.training.hardware import Hardware
from vissl_lite.training.progress import progress_bar
from vissl_lite.transfer.base import LabelledDataset

log = logging.getLogger(__name__)

# Learning rates of fine-tuning that the validation part chooses from.
RATES = (3e-4, 1e-3, 3e-3)


class Runner:
    """Runs the cells of an encoder that no earlier run has finished."""

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
        self.parts = {
            (amount.name, seed): amount.of(data, seed)
            for amount in amounts
            for seed in plan.options.all_seeds()
        }

    def run(self, name: str, protocols: Sequence[Protocol]) -> dict[Cell, Score]:
        """All scores of the encoder of this name."""
        scores: dict[Cell, Score] = {}
        same: dict[tuple[str, str, str], Score] = {}  # what other seeds gave with the same labels
        features: Features | None = None
        weights = ""
        for seed in self.plan.options.all_seeds():
            encoder = self.plan.load(name, seed, self.data)
            if digest_weights(encoder) != weights:  # the first seed, or an untrained encoder
                weights, features = digest_weights(encoder), None
            for protocol in protocols:
                for amount in self.amounts:
                    cell = Cell(name, protocol, amount.name, seed)
                    some = self.parts[amount.name, seed]
                    about = self._about(some, encoder, weights)
                    key = (protocol, about["labels"], weights)
                    score = self.store.load(cell, about)
                    if score is None and key in same:
                        score = same[key]
                        self.store.keep(cell, score, about)
                    if score is None:
                        if protocol == "finetune":
                            score = self._finetune(cell, encoder, some, scores)
                        else:
                            features = features or self._features(name, encoder)
                            score = evaluate_frozen(protocol, features, some, self.plan.options.k)
                        self.store.keep(cell, score, about)
                    if protocol != "finetune":  # which has a seed of its own
                        same[key] = score
                    scores[cell] = score
                    log.info(
                        "%s, %s, %s, seed %d: %.3f", name, protocol, amount.name, seed, score.value
                    )
        return scores

    def _about(self, some: LabelledDataset, encoder: Encoder, weights: str) -> dict[str, Any]:
        """What must be the same for an earlier run of a cell to count."""
        return {
            "weights": weights,
            "labels": digest_words(some.identity()),
            "image_size": encoder.image_size,
            "layers": self.plan.options.layers,
        }

    def _features(self, name: str, encoder: Encoder) -> Features:
        used: dict[str, None] = {}
        for some in self.parts.values():
            used |= dict.fromkeys([*some.paths("train"), *some.paths("val")])
        paths = [*used, *self.data.paths("test")]
        with progress_bar() as bar:
            task = bar.add_task("features", total=len(paths), info=name)
            return Features(encoder, paths, self.plan.options.layers, partial(bar.advance, task))

    def _finetune(
        self, cell: Cell, encoder: Encoder, some: LabelledDataset, scores: Mapping[Cell, Score]
    ) -> Score:
        rates: Sequence[float] = listed(self.plan.options.lr) or RATES
        first = Cell(cell.encoder, cell.protocol, cell.amount, self.plan.options.seed)
        if first in scores:  # chosen with the first seed, for the others too
            rates = [scores[first].chosen["lr"]]
        elif len(some.val) == 0:
            rates = [sorted(rates)[len(rates) // 2]]  # nothing to choose by
        untrained = cell.encoder.startswith("random:")
        make = partial(self.plan.options.settings, seed=cell.seed, untrained=untrained)
        return finetune_best(
            encoder, self.plan.task, some, make, rates, self.hardware, self.store.place(cell)
        )
