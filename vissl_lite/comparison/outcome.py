"""Outcome of a comparison: metrics, differences and verdicts, as JSON, CSV and plots."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from vissl_lite.comparison.amounts import LabelCount
from vissl_lite.comparison.protocols import Score
from vissl_lite.comparison.statistics import (
    Difference,
    Runs,
    Verdict,
    difference,
    equivalent_labels,
)
from vissl_lite.comparison.store import Cell
from vissl_lite.plots import plot_bars, verbatim

PROTOCOL_WORDS = {"knn": "kNN", "linear": "linear", "finetune": "fine-tuned"}
METRIC_WORDS = {"top1": "top-1 accuracy", "map": "mAP", "map_50": "mAP50", "miou": "mIoU"}


@dataclass(frozen=True)
class ComparedEncoder:
    """Comparison of one encoder with the baseline under one protocol.

    Attributes:
        by_amount: Difference for each amount of labels, by name.
        overall: Difference averaged over amounts; the verdict is based on it.
        equivalent_labels: Number of labels, training and validation together, with which the
            baseline reaches the same metric, and whether it is exact (otherwise the baseline needs
            more), for each amount with the verdict ``helped``.
        sentence: Verdict as a sentence.
    """

    by_amount: dict[str, Difference]
    overall: Difference
    equivalent_labels: dict[str, tuple[float, bool]]
    sentence: str

    @property
    def verdict(self) -> Verdict:
        """Verdict on the encoder."""
        return self.overall.verdict


class Outcome:
    """All scores of a comparison, and the conclusions from them.

    Args:
        scores: Score of every cell.
        encoders: Names of the encoders; ``scores`` must have all their cells.
        protocols: Protocols, in order; the last one decides the verdict of the comparison.
        labels: Numbers of training and validation labels of each amount, by name.
        seeds: Seeds of the draws of labels.
        baseline: Name of the encoder that the others are compared with.
        metric: Name of the metric of each protocol.
        groups: ``(M,)`` group of each test image; None for images that are all apart.
        units: ``(M,)`` groups or blocks of test images, over which intervals are taken; default
            ``groups``.
        with_it: What labels of an encoder, and of the baseline, are called in a sentence on how
            many of them are equal.
    """

    def __init__(
        self,
        scores: Mapping[Cell, Score],
        encoders: Sequence[str],
        protocols: Sequence[str],
        labels: Mapping[str, LabelCount],
        seeds: Sequence[int],
        baseline: str,
        metric: Mapping[str, str],
        groups: np.ndarray | None = None,
        units: np.ndarray | None = None,
        with_it: tuple[str, str] = ("with it", "without"),
    ) -> None:
        self.with_it = with_it
        self.scores, self.encoders, self.protocols = scores, encoders, protocols
        self.labels, self.seeds, self.baseline, self.metric = labels, seeds, baseline, metric
        self.groups, self.units = groups, groups if units is None else units
        self.compared = {
            protocol: {
                encoder: self._compare(encoder, protocol)
                for encoder in encoders
                if encoder != baseline
            }
            for protocol in protocols
        }

    def runs(self, encoder: str, protocol: str, amount: str) -> Runs:
        """Runs of an encoder with one amount of labels."""
        scores = [self.scores[Cell(encoder, protocol, amount, seed)] for seed in self.seeds]
        parts = [score.per_image for score in scores if score.per_image is not None]
        per_image = np.stack(parts) if len(parts) == len(scores) else None
        return Runs(np.array([score.value for score in scores]), per_image)

    def by_part(self, encoder: str, protocol: str, amount: str) -> dict[str, float]:
        """Mean metric on training, held-out and test images, ``train``, ``val`` and ``test``.

        Args:
            encoder: Name of the encoder.
            protocol: Protocol; a frozen encoder has no metric on its training images.
            amount: Amount of labels.

        Returns:
            The means over seeds; empty if the metric is not known for the training images.
        """
        scores = [self.scores[Cell(encoder, protocol, amount, seed)] for seed in self.seeds]
        name = self.metric[protocol]
        means = {
            part: float(np.mean([score.metrics[f"{part}_{name}"] for score in scores]))
            for part in ("train", "val")
            if all(f"{part}_{name}" in score.metrics for score in scores)
        }
        return {**means, "test": self.runs(encoder, protocol, amount).mean} if means else {}

    @property
    def main(self) -> ComparedEncoder:
        """The first encoder that is not the baseline, under the last protocol."""
        return next(iter(self.compared[self.protocols[-1]].values()))

    @property
    def verdict(self) -> Verdict:
        """Verdict on the first encoder that is not the baseline, under the last protocol."""
        return self.main.verdict

    def _compare(self, encoder: str, protocol: str) -> ComparedEncoder:
        ours = {amount: self.runs(encoder, protocol, amount) for amount in self.labels}
        theirs = {amount: self.runs(self.baseline, protocol, amount) for amount in self.labels}
        by_amount = {
            name: difference([ours[name]], [theirs[name]], groups=self.units)
            for name in self.labels
        }
        overall = difference(list(ours.values()), list(theirs.values()), groups=self.units)
        counts = [count.total for count in self.labels.values()]
        curve = [runs.mean for runs in theirs.values()]
        equivalent = {}
        for name, found in by_amount.items():
            equal = equivalent_labels(counts, curve, ours[name].mean)
            # The monotone curve can lie above the baseline's own metric at this amount.
            if found.verdict == "helped" and equal and equal[0] >= self.labels[name].total:
                equivalent[name] = equal
        words = self._sentence(encoder, protocol, by_amount, overall, equivalent)
        return ComparedEncoder(by_amount, overall, equivalent, words)

    def _sentence(
        self,
        encoder: str,
        protocol: str,
        by_amount: Mapping[str, Difference],
        overall: Difference,
        equivalent: Mapping[str, tuple[float, bool]],
    ) -> str:
        what = {
            "helped": "helped",
            "hurt": "hurt",
            "no difference": "made no difference that these seeds can show",
        }[overall.verdict]
        exceptions = []
        for verdict in ("helped", "hurt"):
            at = [name for name, one in by_amount.items() if one.verdict == verdict]
            if at and verdict != overall.verdict:
                exceptions.append(f"{verdict} at {', '.join(at)}")
        if exceptions:
            what = f"{' and '.join(exceptions)}, but {what} on average"
        over = f"averaged over {len(by_amount)} amounts of labels, " if len(by_amount) > 1 else ""
        interval = "no interval can be given"
        if overall.low is not None:
            interval = f"95 % interval {overall.interval}"
        words = (
            f"{encoder} {what}: {self._in_words(protocol)} {overall.mean:+.3f} against "
            f"{self.baseline} ({over}{interval}, "
            f"{self._seeds(encoder, protocol, overall)}{self._over_groups(protocol)})."
        )
        # Only for the smallest such amount, where pre-training matters most.
        for name, (equal, exact) in list(equivalent.items())[:1]:
            count = self.labels[name]
            rest = (
                f"equal about {equal:,.0f}"
                if exact
                else f"are at least as good as the {equal:,.0f}"
            )
            words += f" {count} {self.with_it[0]} {rest} {self.with_it[1]}."
        return words

    def _in_words(self, protocol: str) -> str:
        """A protocol and its metric, such as ``fine-tuned top-1 accuracy``."""
        metric = self.metric[protocol]
        return f"{PROTOCOL_WORDS[protocol]} {METRIC_WORDS.get(metric, metric)}"

    def _seeds(self, encoder: str, protocol: str, overall: Difference) -> str:
        """The number of seeds in words, and whether none of them made a difference."""
        number = len(self.seeds)
        runs = [
            self.runs(name, protocol, amount).values
            for name in (encoder, self.baseline)
            for amount in self.labels
        ]
        if number > 1 and all(np.ptp(values) == 0 for values in runs):
            same = f"{number} seeds, which all gave the same"
            return same if overall.low is None else f"{same}: it covers the test images alone"
        return f"{number} seeds"

    def _over_groups(self, protocol: str) -> str:
        """The number of groups that the intervals cover, in words; empty if they cover none."""
        runs = [self.runs(self.baseline, protocol, amount) for amount in self.labels]
        if self.groups is None or any(one.per_image is None for one in runs):
            return ""
        count = len(np.unique(self.groups))
        return f", {count} groups of test images" if count > 1 else ", one group of test images"

    def sentences(self) -> list[str]:
        """Verdict on every encoder under every protocol, as sentences."""
        return [
            one.sentence for by_encoder in self.compared.values() for one in by_encoder.values()
        ]

    def as_dict(self) -> dict[str, Any]:
        """Content of ``results.json``."""
        protocols = {}
        for protocol, by_encoder in self.compared.items():
            protocols[protocol] = {
                "metric": self.metric[protocol],
                "amounts": list(self.labels),
                "arms": {
                    encoder: self._runs_as_dict(encoder, protocol) for encoder in self.encoders
                },
                "differences": {
                    encoder: {"overall": vars(one.overall)}
                    | {name: vars(found) for name, found in one.by_amount.items()}
                    for encoder, one in by_encoder.items()
                },
                "labels_worth": {
                    encoder: {
                        name: {"labels": self.labels[name].total, "equal": equal, "exact": exact}
                        for name, (equal, exact) in one.equivalent_labels.items()
                    }
                    for encoder, one in by_encoder.items()
                },
                "verdicts": {
                    encoder: {"verdict": one.verdict, "sentence": one.sentence}
                    for encoder, one in by_encoder.items()
                },
            }
            layers = {encoder: self._layers(encoder, protocol) for encoder in self.encoders}
            if any(layers.values()):
                protocols[protocol]["layers"] = layers
        main = self.protocols[-1]
        return {
            "arms": protocols[main]["arms"],
            "verdict": self.verdict,
            "difference": vars(self.main.overall),
            "sentences": self.sentences(),
            "baseline": self.baseline,
            **({} if self.groups is None else {"test_groups": len(np.unique(self.groups))}),
            "labels": {name: count.total for name, count in self.labels.items()},
            "train_labels": {name: count.train for name, count in self.labels.items()},
            "val_labels": {name: count.val for name, count in self.labels.items()},
            "seeds": list(self.seeds),
            "protocols": protocols,
        }

    def _runs_as_dict(self, encoder: str, protocol: str) -> dict[str, Any]:
        by_amount = {}
        for amount, count in self.labels.items():
            runs = self.runs(encoder, protocol, amount)
            by_amount[amount] = {
                "mean": runs.mean,
                "std": runs.std,
                "runs": runs.values.tolist(),
                "labels": count.total,
                "train_labels": count.train,
                "val_labels": count.val,
                "by_part": self.by_part(encoder, protocol, amount),
            }
        return by_amount

    def _layers(self, encoder: str, protocol: str) -> dict[str, dict[str, float]]:
        """Mean accuracy over seeds, by stage and amount."""
        stages: dict[str, dict[str, float]] = {}
        for amount in self.labels:
            cells = [Cell(encoder, protocol, amount, seed) for seed in self.seeds]
            for stage in self.scores[cells[0]].layers:
                values = [self.scores[cell].layers[stage] for cell in cells]
                stages.setdefault(stage, {})[amount] = float(np.mean(values))
        return stages

    def write_csv(self, file: Path) -> None:
        """Write one row per run."""
        with file.open("w", newline="", encoding="utf-8") as out:
            rows = csv.writer(out)
            columns = ("arm", "protocol", "amount", "train_labels", "val_labels", "seed")
            rows.writerow([*columns, "metric", "value", "chosen"])
            for protocol in self.protocols:
                for encoder in self.encoders:
                    for amount, count in self.labels.items():
                        for seed in self.seeds:
                            score = self.scores[Cell(encoder, protocol, amount, seed)]
                            chosen = " ".join(f"{k}={v:g}" for k, v in score.chosen.items())
                            rows.writerow(
                                [
                                    encoder,
                                    protocol,
                                    amount,
                                    count.train,
                                    count.val,
                                    seed,
                                    self.metric[protocol],
                                    score.value,
                                    chosen,
                                ]
                            )

    def plot(self, file: Path) -> None:
        """Plot the metrics: bars for one amount of labels, else curves over the number of labels.

        Args:
            file: PNG file to write.
        """
        figure = self._bars() if len(self.labels) == 1 else self._curves()
        figure.savefig(file, dpi=110)

    def _bars(self) -> Figure:
        """Bar plot of means with a dot for each seed, grouped by protocol."""
        ((amount, count),) = self.labels.items()
        values = {
            f"{protocol}: {self.metric[protocol]}": {
                encoder: self.runs(encoder, protocol, amount).values.tolist()
                for encoder in self.encoders
            }
            for protocol in self.protocols
        }
        figure = Figure(figsize=(8, 4.6), layout="constrained")
        title = f"test images, {count} ({amount}), {len(self.seeds)} seeds"
        plot_bars(figure.subplots(), values, title)
        return figure

    def _curves(self) -> Figure:
        """Curves over the number of labels, one panel per protocol, with bands of one std."""
        columns = len(self.protocols)
        figure = Figure(figsize=(1.0 + 4.6 * columns, 4.6), layout="constrained")
        panels = figure.subplots(1, columns, squeeze=False)[0]
        counts = [count.total for count in self.labels.values()]
        ticks = [f"{one.short}\n{name}" for name, one in self.labels.items()]
        for axes, protocol in zip(panels, self.protocols, strict=True):
            lines = []
            for encoder in self.encoders:
                runs = [self.runs(encoder, protocol, amount) for amount in self.labels]
                mean = np.array([one.mean for one in runs])
                std = np.array([one.std for one in runs])
                style = "--" if encoder == self.baseline else "-"
                (line,) = axes.plot(counts, mean, style, marker="o", markersize=4)
                lines.append(line)
                axes.fill_between(counts, mean - std, mean + std, color=line.get_color(), alpha=0.2)
            axes.set_xscale("log")
            axes.set_xticks(counts, ticks)
            axes.minorticks_off()
            axes.set_title(f"{protocol}: test {self.metric[protocol]}")
            axes.set_xlabel("labels")
            axes.grid(alpha=0.3)
        names = [verbatim(encoder) for encoder in self.encoders]
        figure.legend(lines, names, loc="outside lower center", ncols=1 if columns < 2 else 2)
        return figure
