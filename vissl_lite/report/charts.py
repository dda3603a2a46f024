"""Interactive Bokeh charts of metrics."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from bokeh.models import ColumnDataSource, FactorRange, HoverTool, NumeralTickFormatter, Span
from bokeh.palettes import viridis
from bokeh.plotting import figure

from vissl_lite.report.page import Block

# Explanation of each metric, in the order in which the charts are shown.
METRIC_NOTES = {
    "loss": "Training loss. It should fall and then level off. Its value cannot be compared between"
    " pretexts.",
    "accuracy": "Accuracy on the pretext's own task. Near 1 or near chance, the task is too easy or"
    " too hard to learn from.",
    "knn": "kNN accuracy on labelled validation images: the most direct sign that the features"
    " become useful.",
    "linear": "Accuracy of a linear classifier on the features of labelled validation images.",
    "feature_std": "Spread of the features. Near 1 is evenly spread; 0 means that all images have"
    " the same features (a collapse).",
    "effective_rank": "Effective number of feature dimensions (RankMe). Near 1 is a collapse.",
    "alignment": "Distance between the features of two views of an image; lower is closer.",
    "uniformity": "How uniformly the features cover the sphere; lower is more uniform.",
    "lr": "Learning rate: rises during warm-up, then falls until the end.",
    "view_size": "Side of the views in pixels.",
    "token_drop": "Share of the patches of a view that the encoder does not see.",
    "images_per_second": "Training speed.",
    "data_wait": "Fraction of the time spent waiting for images. Well above 0.1, use more workers"
    " or smaller files.",
}

# Columns of metrics.csv that get no chart.
_COUNTERS = ("step", "epoch", "seconds")

# Maximum number of points per line: more are not visible and make the file large.
POINTS = 600

# Colors that are readable on white and on black.
COLORS = ("#3b7dd8", "#e07b28", "#2a9d6f", "#c2557a", "#8a6fd1")
GRAY = "#808890"


def curves(metrics: Mapping[str, tuple[list[float], list[float]]]) -> list[Block]:
    """Draw one chart per metric; a validation metric shares the chart of its training metric.

    Args:
        metrics: Steps and values of each metric by name.
    """
    names = [name for name in metrics if name not in _COUNTERS]
    order = list(METRIC_NOTES)  # Unknown metrics come before the learning rate.
    names.sort(key=lambda name: (order.index(name if name in METRIC_NOTES else "lr"), name == "lr"))
    charts = []
    for name in names:
        if name.removeprefix("val_") in names and name.startswith("val_"):
            continue  # Drawn with its training metric.
        together = [one for one in (name, f"val_{name}") if one in names]
        chart = _line_chart({one: metrics[one] for one in together})
        charts.append(Block(name.replace("_", " "), chart, _note(name)))
    return charts


def _note(name: str) -> str:
    if name.startswith("val_"):
        return "On validation images."
    if name.endswith("_loss"):
        return "Component of the loss."
    return METRIC_NOTES.get(name, "")


def stages(layers: Mapping[str, Mapping[str, float]]) -> figure:
    """Draw the accuracy of the features of each stage.

    Args:
        layers: Values in [0, 1] by stage, from the first to the last, then by metric.
    """
    names = list(layers)
    chart = _figure(x_range=FactorRange(*names), height=280)
    metrics = list(dict.fromkeys(metric for row in layers.values() for metric in row))
    for metric, color in zip(metrics, _colors(len(metrics)), strict=True):
        values = [layers[name].get(metric, math.nan) for name in names]
        data = ColumnDataSource({"x": names, "y": values, "name": [metric] * len(names)})
        _line(chart, data, color, metric)
        chart.scatter("x", "y", source=data, color=color, size=7)
    _hover(chart, "<b>@name</b> @y{0.000}<br>@x")
    _legend(chart, metrics)
    chart.xaxis.axis_label = "stage, from input to output"
    return chart


def coverage(lines: Mapping[str, tuple[int, Sequence[float]]], knee: int) -> figure:
    """Draw the coverage by number of images.

    Args:
        lines: Number of images at the first value, and the values, by name.
        knee: Number of images at which a dashed line stands; 0 for none.
    """
    chart = _figure(height=280)
    for (name, (start, values)), color in zip(lines.items(), COLORS, strict=False):
        counts = np.arange(start, start + len(values))
        data = ColumnDataSource({"x": counts, "y": values, "name": [name] * len(values)})
        _line(chart, data, color, name)
    if knee:
        line = Span(location=knee, dimension="height", line_color=GRAY, line_dash="dashed")
        chart.add_layout(line)
    _hover(chart, "<b>@name</b> @y{0.000}<br>@x images")
    _legend(chart, list(lines))
    chart.xaxis.axis_label = "images to label"
    chart.yaxis.axis_label = "coverage"
    return chart


def histograms(shares: Mapping[str, Sequence[float]]) -> figure:
    """Draw the distribution of the scaled values of each band.

    Args:
        shares: Share of the values in equal intervals of [0, 1], by the name of the band.
    """
    chart = _figure(height=230)
    few = len(shares) <= len(COLORS)
    for (name, values), color in zip(shares.items(), _colors(len(shares)), strict=True):
        centers = (np.arange(len(values)) + 0.5) / len(values)
        data = ColumnDataSource({"x": centers, "y": values, "name": [name] * len(values)})
        chart.step(
            "x",
            "y",
            source=data,
            color=color,
            mode="center",
            line_width=2,
            **({"legend_label": name} if few else {}),
        )
    _hover(chart, "<b>band @name</b> @y{0.0%}<br>@x{0.00}")
    if few:
        _legend(chart, list(shares))
    chart.xaxis.axis_label = "value, scaled"
    chart.yaxis.axis_label = "share of pixels"
    return chart


def _line_chart(series: Mapping[str, tuple[list[float], list[float]]]) -> figure:
    """Draw lines over training steps, with a logarithmic scale for losses of a wide range."""
    lines = {name: _downsample(*points) for name, points in series.items()}
    every = np.concatenate([values for _, values in lines.values()])
    every = every[np.isfinite(every)]
    wide = len(every) > 0 and every.min() > 0 and every.max() > 100 * every.min()
    losses = all(name.endswith("loss") for name in lines)
    chart = _figure(y_axis_type="log" if wide and losses else "linear", height=230)
    for (name, (steps, values)), color in zip(lines.items(), COLORS, strict=False):
        data = ColumnDataSource({"x": steps, "y": values, "name": [name] * len(steps)})
        _line(chart, data, color, name)
        if len(steps) < 40:
            chart.scatter("x", "y", source=data, color=color, size=5)
    _hover(chart, "<b>@name</b> @y{0.[00000]}<br>step @x{0}")
    _legend(chart, list(lines))
    chart.xaxis.axis_label = "step"
    chart.xaxis.formatter = NumeralTickFormatter(format="0.[0]a")
    return chart


def _downsample(steps: Sequence[float], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Average neighboring points down to ``POINTS``; NaN values stay NaN."""
    x, y = np.asarray(steps, float), np.asarray(values, float)
    if len(x) <= POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), POINTS)
    return np.array([x[part].mean() for part in parts]), np.array(
        [y[part].mean() for part in parts]
    )


def _colors(count: int) -> Sequence[str]:
    """Colors of so many lines."""
    return COLORS[:count] if count <= len(COLORS) else viridis(count)


def _figure(**options: Any) -> figure:
    """Create a chart with a transparent background and grays readable on white and on black."""
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
