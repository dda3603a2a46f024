"""Interactive charts of what was measured."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from bokeh.models import ColumnDataSource, FactorRange, HoverTool, NumeralTickFormatter
from bokeh.plotting import figure

from vissl_lite.report.page import Block

# What each measure tells, in the order in which they are shown.
MEASURES = {
    "loss": "What the training lowers. It should fall, then level off; its height can't be compared"
    " between pretexts.",
    "accuracy": "How often the pretext's own question is answered rightly. Too easy or impossible"
    " teaches nothing.",
    "knn": "Accuracy on labelled validation images by a vote of their nearest neighbors: the most"
    " direct sign that the features become useful.",
    "linear": "Accuracy on labelled validation images of a linear classifier on the features.",
    "feature_std": "Spread of the features: near 1 is even, 0 means that all images look the same"
    " to the encoder (a collapse).",
    "effective_rank": "How many directions the features use (RankMe). Near 1 is a collapse.",
    "alignment": "Distance between the features of two views of an image: lower is closer.",
    "uniformity": "How evenly the features fill the sphere: lower is more even.",
    "lr": "The learning rate: it rises in the warm-up and falls to the end.",
    "view_size": "Side of the views in pixels.",
    "images_per_second": "Speed of the training.",
    "data_wait": "Share of the time spent waiting for images. Much above 0.1 asks for more workers"
    " or smaller files.",
}

# Columns that are no measure.
_COUNTERS = ("step", "epoch", "seconds")

# Points in a line at most: more can't be seen, and would make the file large.
POINTS = 600

# Seen on white and on black.
COLORS = ("#3b7dd8", "#e07b28", "#2a9d6f", "#c2557a", "#8a6fd1")
GRAY = "#808890"


def curves(metrics: Mapping[str, tuple[list[float], list[float]]]) -> list[Block]:
    """A chart for each measure; a measure of the validation part stands with its training one.

    Args:
        metrics: Steps and values by name.
    """
    names = [name for name in metrics if name not in _COUNTERS]
    order = list(MEASURES)  # others stand before what tells of the training alone
    names.sort(key=lambda name: (order.index(name if name in MEASURES else "lr"), name == "lr"))
    charts = []
    for name in names:
        if name.removeprefix("val_") in names and name.startswith("val_"):
            continue  # drawn with its training measure
        together = [one for one in (name, f"val_{name}") if one in names]
        drawn = _lines({one: metrics[one] for one in together})
        charts.append(Block(name.replace("_", " "), drawn, _explained(name)))
    return charts


def _explained(name: str) -> str:
    if name.startswith("val_"):
        return "On validation images."
    if name.endswith("_loss"):
        return "A part of the loss."
    return MEASURES.get(name, "")


def stages(layers: Mapping[str, Mapping[str, float]]) -> figure:
    """How good the features of each stage are.

    Args:
        layers: By stage, from the first to the last, by measure: a figure in [0, 1].
    """
    names = list(layers)
    chart = _figure(x_range=FactorRange(*names), height=280)
    measures = list(dict.fromkeys(measure for row in layers.values() for measure in row))
    for measure, color in zip(measures, COLORS, strict=False):
        values = [layers[name].get(measure, math.nan) for name in names]
        data = ColumnDataSource({"x": names, "y": values, "name": [measure] * len(names)})
        _line(chart, data, color, measure)
        chart.scatter("x", "y", source=data, color=color, size=7)
    _hover(chart, "<b>@name</b> @y{0.000}<br>@x")
    _legend(chart, measures)
    chart.xaxis.axis_label = "stage, from the image to the output"
    return chart


def _lines(series: Mapping[str, tuple[list[float], list[float]]]) -> figure:
    """Lines over training steps; losses on a logarithmic scale where they fall far."""
    drawn = {name: _thinned(*points) for name, points in series.items()}
    every = np.concatenate([values for _, values in drawn.values()])
    every = every[np.isfinite(every)]
    far = len(every) > 0 and every.min() > 0 and every.max() > 100 * every.min()
    losses = all(name.endswith("loss") for name in drawn)
    chart = _figure(y_axis_type="log" if far and losses else "linear", height=230)
    for (name, (steps, values)), color in zip(drawn.items(), COLORS, strict=False):
        data = ColumnDataSource({"x": steps, "y": values, "name": [name] * len(steps)})
        _line(chart, data, color, name)
        if len(steps) < 40:
            chart.scatter("x", "y", source=data, color=color, size=5)
    _hover(chart, "<b>@name</b> @y{0.[00000]}<br>step @x{0}")
    _legend(chart, list(drawn))
    chart.xaxis.axis_label = "step"
    chart.xaxis.formatter = NumeralTickFormatter(format="0.[0]a")
    return chart


def _thinned(steps: Sequence[float], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Averages of as many neighboring points as it takes; a gap stays a gap."""
    x, y = np.asarray(steps, float), np.asarray(values, float)
    if len(x) <= POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), POINTS)
    return np.array([x[part].mean() for part in parts]), np.array(
        [y[part].mean() for part in parts]
    )


def _figure(**options: Any) -> figure:
    """A chart without a background of its own, in grays that are read on white and on black."""
    chart = figure(
        sizing_mode="stretch_width",
        tools="box_zoom,reset",
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        min_border=4,
        **options,
    )
    chart.toolbar.logo = None
    chart.toolbar.autohide = True
    chart.grid.grid_line_color = GRAY
    chart.grid.grid_line_alpha = 0.25
    chart.axis.axis_line_color = chart.axis.major_tick_line_color = GRAY
    chart.axis.minor_tick_line_color = None
    chart.axis.major_label_text_color = chart.axis.axis_label_text_color = GRAY
    chart.axis.axis_label_text_font_style = "normal"
    return chart


def _line(chart: figure, data: ColumnDataSource, color: str, name: str) -> None:
    chart.line("x", "y", source=data, color=color, line_width=2, legend_label=name)


def _hover(chart: figure, tooltips: str) -> None:
    chart.add_tools(HoverTool(tooltips=tooltips, mode="vline", point_policy="snap_to_data"))


def _legend(chart: figure, names: Sequence[str]) -> None:
    chart.legend.visible = len(names) > 1
    chart.legend.background_fill_color = None
    chart.legend.border_line_color = None
    chart.legend.label_text_color = GRAY
    chart.legend.location = "top_left"
    chart.legend.orientation = "horizontal" if sum(map(len, names)) < 30 else "vertical"
    chart.add_layout(chart.legend[0], "above")
