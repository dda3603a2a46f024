"""What a comparison found: figures, differences, verdicts in words, as JSON, CSV and a picture."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from vissl_lite.comparison.protocols import Score
from vissl_lite.comparison.statistics import Difference, Runs, Verdict, difference, labels_worth
from vissl_lite.comparison.store import Cell
from vissl_lite.plots import plot_bars


@dataclass(frozen=True)
class ComparedEncoder:
    """How one encoder did under one protocol, against the baseline.

    Attributes:
        by_amount: the difference with each amount of labels, by name.
        overall: averaged over amounts: what the verdict is of.
        worth: by amount, how many labels give the baseline the same figure, and whether that is
            exact (else it needs more); for amounts where the encoder is better beyond doubt.
        sentence: the verdict in words.
    """

    by_amount: dict[str, Difference]
    overall: Difference
    worth: dict[str, tuple[float, bool]]
    sentence: str

    @property
    def verdict(self) -> Verdict:
        """What the encoder's pre-training did."""
        return self.overall.verdict


class Outcome:
    """All scores of a comparison, and what they say.

    Args:
        scores: of every cell.
        encoders: their names; those with a cell missing are not for this class.
        protocols: in the order asked for; the last one's verdict is the comparison's.
        labels: by the name of each amount, how many labels it is (training and validation).
        seeds: of the labels.
        baseline: the encoder that others are held against.
        metric: by protocol, the name of the figure.
    """

    def __init__(
        self,
        scores: Mapping[Cell, Score],
        encoders: Sequence[str],
        protocols: Sequence[str],
        labels: Mapping[str, int],
        seeds: Sequence[int],
        baseline: str,
        metric: Mapping[str, str],
    ) -> None:
        self.scores, self.encoders, self.protocols = scores, encoders, protocols
        self.labels, self.seeds, self.baseline, self.metric = labels, seeds, baseline, metric
        self.compared = {
            protocol: {
                encoder: self._compare(encoder, protocol)
                for encoder in encoders
                if encoder != baseline
            }
            for protocol in protocols
        }

    def runs(self, encoder: str, protocol: str, amount: str) -> Runs:
        """An encoder's figures with one amount of labels."""
        scores = [self.scores[Cell(encoder, protocol, amount, seed)] for seed in self.seeds]
        rights = [score.right for score in scores if score.right is not None]
        right = np.stack(rights) if len(rights) == len(scores) else None
        return Runs(np.array([score.value for score in scores]), right)

    @property
    def verdict(self) -> Verdict:
        """Of the first encoder that is not the baseline, under the last protocol."""
        return next(iter(self.compared[self.protocols[-1]].values())).verdict

    def _compare(self, encoder: str, protocol: str) -> ComparedEncoder:
        ours = {amount: self.runs(encoder, protocol, amount) for amount in self.labels}
        theirs = {amount: self.runs(self.baseline, protocol, amount) for amount in self.labels}
        by_amount = {name: difference([ours[name]], [theirs[name]]) for name in self.labels}
        overall = difference(list(ours.values()), list(theirs.values()))
        counts, curve = list(self.labels.values()), [runs.mean for runs in theirs.values()]
        worth = {}
        for name, found in by_amount.items():
            equal = labels_worth(counts, curve, ours[name].mean)
            if found.verdict == "helped" and equal is not None:
                worth[name] = equal
        words = self._sentence(encoder, protocol, by_amount, overall, worth)
        return ComparedEncoder(by_amount, overall, worth, words)

    def _sentence(
        self,
        encoder: str,
        protocol: str,
        by_amount: Mapping[str, Difference],
        overall: Difference,
        worth: Mapping[str, tuple[float, bool]],
    ) -> str:
        what = {
            "helped": "helped",
            "hurt": "hurt",
            "no difference": "made no difference that these seeds can show",
        }[overall.verdict]
        over = f"averaged over {len(by_amount)} amounts of labels, " if len(by_amount) > 1 else ""
        words = (
            f"{encoder} {what}: {protocol} {self.metric[protocol]} {overall.mean:+.3f} against "
            f"{self.baseline} ({over}95 % interval {overall.low:+.3f} to {overall.high:+.3f}, "
            f"{len(self.seeds)} seeds)."
        )
        for verdict in ("helped", "hurt"):
            at = [name for name, one in by_amount.items() if one.verdict == verdict]
            if at and verdict != overall.verdict:
                words += f" At {', '.join(at)} it {verdict}."
        # the fewest labels are where it matters most
        for name, (equal, exact) in list(worth.items())[:1]:
            count = self.labels[name]
            rest = f"equal about {equal:.0f}" if exact else f"are better than all {equal:.0f}"
            words += f" {count} labels with it {rest} without."
        return words

    def sentences(self) -> list[str]:
        """The verdict on every encoder under every protocol, in words."""
        return [
            one.sentence for by_encoder in self.compared.values() for one in by_encoder.values()
        ]

    def as_dict(self) -> dict[str, Any]:
        """For ``results.json``."""
        protocols = {}
        for protocol, by_encoder in self.compared.items():
            protocols[protocol] = {
                "metric": self.metric[protocol],
                "amounts": list(self.labels),
                "arms": {encoder: self._figures(encoder, protocol) for encoder in self.encoders},
                "differences": {
                    encoder: {"overall": vars(one.overall)}
                    | {name: vars(found) for name, found in one.by_amount.items()}
                    for encoder, one in by_encoder.items()
                },
                "labels_worth": {
                    encoder: {
                        name: {"labels": self.labels[name], "equal": equal, "exact": exact}
                        for name, (equal, exact) in one.worth.items()
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
            "sentences": self.sentences(),
            "baseline": self.baseline,
            "labels": dict(self.labels),
            "seeds": list(self.seeds),
            "protocols": protocols,
        }

    def _figures(self, encoder: str, protocol: str) -> dict[str, Any]:
        figures = {}
        for amount, count in self.labels.items():
            runs = self.runs(encoder, protocol, amount)
            figures[amount] = {
                "mean": runs.mean,
                "std": runs.std,
                "runs": runs.values.tolist(),
                "labels": count,
            }
        return figures

    def _layers(self, encoder: str, protocol: str) -> dict[str, dict[str, float]]:
        """By stage and amount: means over seeds."""
        stages: dict[str, dict[str, float]] = {}
        for amount in self.labels:
            cells = [Cell(encoder, protocol, amount, seed) for seed in self.seeds]
            for stage in self.scores[cells[0]].layers:
                values = [self.scores[cell].layers[stage] for cell in cells]
                stages.setdefault(stage, {})[amount] = float(np.mean(values))
        return stages

    def write_csv(self, file: Path) -> None:
        """A row for every run."""
        with file.open("w", newline="", encoding="utf-8") as out:
            rows = csv.writer(out)
            rows.writerow(
                ["arm", "protocol", "amount", "labels", "seed", "metric", "value", "chosen"]
            )
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
                                    count,
                                    seed,
                                    self.metric[protocol],
                                    score.value,
                                    chosen,
                                ]
                            )

    def plot(self, file: Path) -> None:
        """Plot the figures, for one amount of labels as bars, else over the number of labels.

        Args:
            file: PNG file to write.
        """
        figure = self._bars() if len(self.labels) == 1 else self._curves()
        figure.savefig(file, dpi=110)

    def _bars(self) -> Figure:
        """Bars of means with a dot for every seed, grouped by protocol."""
        ((amount, count),) = self.labels.items()
        values = {
            f"{protocol}: {self.metric[protocol]}": {
                encoder: self.runs(encoder, protocol, amount).values.tolist()
                for encoder in self.encoders
            }
            for protocol in self.protocols
        }
        figure = Figure(figsize=(8, 4.6), layout="constrained")
        title = f"test images, {count} labels ({amount}), {len(self.seeds)} seeds"
        plot_bars(figure.subplots(), values, title)
        return figure

    def _curves(self) -> Figure:
        """Curves over the number of labels with bands of one standard deviation, by protocol."""
        wide = len(self.protocols)
        figure = Figure(figsize=(1.0 + 4.6 * wide, 4.6), layout="constrained")
        panels = figure.subplots(1, wide, squeeze=False)[0]
        counts = list(self.labels.values())
        for axes, protocol in zip(panels, self.protocols, strict=True):
            for encoder in self.encoders:
                runs = [self.runs(encoder, protocol, amount) for amount in self.labels]
                mean = np.array([one.mean for one in runs])
                std = np.array([one.std for one in runs])
                style = "--" if encoder == self.baseline else "-"
                (line,) = axes.plot(counts, mean, style, marker="o", markersize=4, label=encoder)
                axes.fill_between(counts, mean - std, mean + std, color=line.get_color(), alpha=0.2)
            axes.set_xscale("log")
            axes.set_xticks(counts, [f"{count}\n{name}" for name, count in self.labels.items()])
            axes.minorticks_off()
            axes.set_title(f"{protocol}: test {self.metric[protocol]}")
            axes.set_xlabel("labels")
            axes.grid(alpha=0.3)
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=1 if wide < 2 else 2)
        return figure
