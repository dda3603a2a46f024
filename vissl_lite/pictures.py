"""Pictures of curves and tables, drawn with matplotlib on its own canvas (no display needed)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vissl_lite.run import MetricsFile


def plot_curves(metrics: MetricsFile, names: Sequence[str], file: Path) -> None:
    """A panel for each metric that was logged, over steps.

    Args:
        metrics: the run's.
        names: which metrics, in this order; those without values are left out.
        file: the PNG to write.
    """
    known = [name for name in names if metrics.series(name)[1]]
    columns = min(3, max(1, len(known)))
    rows = -(-len(known) // columns) or 1
    figure = Figure(figsize=(4.2 * columns, 2.8 * rows), layout="constrained")
    for index, name in enumerate(known):
        axes = figure.add_subplot(rows, columns, index + 1)
        steps, values = metrics.series(name)
        axes.plot(steps, values, marker="." if len(values) < 30 else "")
        axes.set_title(name.replace("_", " "))
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=100)


def plot_confusion(counts: np.ndarray, classes: Sequence[str], file: Path) -> None:
    """A confusion matrix.

    Args:
        counts: ``(K, K)`` images, by true class (row) and predicted class (column).
        classes: K names.
        file: the PNG to write.
    """
    size = min(14.0, 2.5 + 0.42 * len(classes))
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    axes = figure.add_subplot()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_xticks(range(len(classes)), classes, rotation=90)
    axes.set_yticks(range(len(classes)), classes)
    if len(classes) <= 20:
        for row, column in np.ndindex(*counts.shape):
            if counts[row, column]:
                axes.text(
                    column,
                    row,
                    str(counts[row, column]),
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if shares[row, column] > 0.5 else "black",
                )
    figure.savefig(file, dpi=100)


def plot_bars(axes: Axes, values: Mapping[str, Mapping[str, Sequence[float]]], title: str) -> None:
    """Grouped bars of means, with a dot for every seed.

    Args:
        axes: to draw in.
        values: by group (a label under the axis), then by arm (a colour): one value a seed.
        title: of the panel.
    """
    arms = list(next(iter(values.values())))
    width = 0.8 / len(arms)
    for index, arm in enumerate(arms):
        at = np.arange(len(values)) + (index - (len(arms) - 1) / 2) * width
        runs = [group[arm] for group in values.values()]
        axes.bar(at, [float(np.mean(r)) for r in runs], width * 0.95, label=arm, alpha=0.75)
        for x, dots in zip(at, runs, strict=True):
            axes.plot([x] * len(dots), dots, "k.", markersize=4)
    axes.set_xticks(range(len(values)), list(values))
    axes.set_ylim(0, 1)
    axes.set_title(title)
    axes.grid(alpha=0.3, axis="y")
    axes.legend()
