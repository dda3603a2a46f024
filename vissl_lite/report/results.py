"""Results of a run for its report: figures, tables and verdicts."""

import csv
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from markupsafe import Markup

from vissl_lite.evaluation.online import COLLAPSED_RANK, COLLAPSED_STD
from vissl_lite.leakage.matching import LEAKS
from vissl_lite.report.charts import stages
from vissl_lite.report.folder import RunFolder
from vissl_lite.report.page import Block, render

# Display names of figures.
NAMES = {
    "knn": "kNN accuracy",
    "linear": "linear accuracy",
    "attentive": "attentive accuracy",
    "top1": "accuracy",
    "macro_f1": "F1, mean over classes",
    "map": "mean average precision",
    "map_50": "mean average precision at IoU 0.5",
    "mask_map": "mean average precision of masks",
    "mask_map_50": "mean average precision of masks at IoU 0.5",
    "ap": "average precision",
    "mask_ap": "average precision of masks",
    "auroc": "AUROC",
    "miou": "mean IoU",
    "dice": "Dice, mean over classes",
    "accuracy": "accuracy",
    "majority": "accuracy of always predicting the most frequent class",
    "loss": "last loss",
    "feature_std": "spread of the features",
    "effective_rank": "effective rank",
    "skipped": "unreadable images",
    "train_images": "training images",
    "val_images": "validation images",
    "test_images": "test images",
}

# Values of an online metric below which ``pretrain`` warns of a collapse.
COLLAPSE_BELOW = {"feature_std": COLLAPSED_STD, "effective_rank": COLLAPSED_RANK}

# How to read the figures of pretrain; docs/watching.md says more.
ONLINE_NOTES = {
    "loss": "Should have fallen. Not comparable between pretexts.",
    "feature_std": "Higher is not better.",
    "effective_rank": "Compare it only with runs of this pretext and backbone.",
    "alignment": "0: two crops of an image have the same features. Read it with the uniformity.",
    "uniformity": "0: the features of all images are in one place. Lower is more even.",
    "knn": "On validation images. Higher is better.",
    "linear": "On validation images. Higher is better.",
}

# Figures that are not shown at the top of the page.
_NOT_AT_TOP = frozenset({"seconds", "k", "temperature", "image_size", "leaks", "evaluation_share"})

# Maximum number of leaks in the table.
LISTED_LEAKS = 20

BADGES = {"helped": "good", "hurt": "bad", "no difference": "warn"}


def number(value: Any) -> str:
    """Format a figure: integers in full, others with three decimals or significant digits."""
    if not _is_figure(value):
        return str(value)
    if not math.isfinite(value):
        return "not a number"
    if isinstance(value, int) or (value.is_integer() and abs(value) > 1):
        return f"{value:,.0f}"
    return f"{value:.3f}" if 0.001 <= abs(value) < 100 or value == 0 else f"{value:.3g}"


class Tile(NamedTuple):
    """A figure at the top of the page.

    Attributes:
        name: Name of the figure.
        figure: Formatted value.
        note: How to read it; empty for figures that need no words.
        kind: ``good`` or ``bad`` where a threshold tells; otherwise empty.
    """

    name: str
    figure: str
    note: str = ""
    kind: str = ""


def main_figures(run: RunFolder) -> list[Tile]:
    """Return the figures at the top of the page."""
    results = run.figures
    named: dict[str, Any] = {}
    if isinstance(results.get("test"), dict):
        named |= {f"{_name(name)} (test)": value for name, value in results["test"].items()}
    for metric, encoders in _demo_scores(results).items():
        for encoder, values in encoders.items():
            named[f"{metric}, {encoder}"] = _mean(values)
    for name, value in results.items():
        if name not in _NOT_AT_TOP and _is_figure(value):
            named[_name(name)] = value
    if isinstance(results.get("classes"), list):
        named["classes"] = len(results["classes"])
    tiles = [Tile(name, number(value)) for name, value in named.items()]
    if run.command == "probe":
        probes = [_name(name) for name in ("knn", "linear", "attentive")]
        note = str(results.get("trained_on", ""))
        return [tile._replace(note=note) if tile.name in probes else tile for tile in tiles]
    return [_read_online(tile, results) for tile in tiles] if run.command == "pretrain" else tiles


def _read_online(tile: Tile, results: Mapping[str, Any]) -> Tile:
    """Add how to read a metric of the online evaluation of ``pretrain``."""
    for metric, note in ONLINE_NOTES.items():
        if tile.name == _name(metric):
            least = COLLAPSE_BELOW.get(metric)
            if least is None:
                return tile._replace(note=note)
            kind = "good" if results[metric] >= least else "bad"  # "bad" also for not a number.
            state = "No collapse" if kind == "good" else "Collapsed"
            return tile._replace(note=f"{state} (that is below {least}). {note}", kind=kind)
    return tile


def verdicts(run: RunFolder) -> Markup | None:
    """Render the verdicts of a comparison; None if there are none."""
    alerts = [
        {"text": one["sentence"], "kind": BADGES.get(str(one.get("verdict")), "")}
        for protocol in _mappings(run.figures.get("protocols")).values()
        for one in _mappings(protocol.get("verdicts")).values()
        if "sentence" in one
    ]
    pseudo_labels = _mapping(run.figures.get("pseudo_labels"))
    if "sentence" in pseudo_labels:
        kind = BADGES.get(str(pseudo_labels.get("verdict")), "")
        alerts.append({"text": str(pseudo_labels["sentence"]), "kind": kind})
    if not alerts and isinstance(run.figures.get("sentences"), list):
        alerts = [{"text": str(one), "kind": ""} for one in run.figures["sentences"]]
    return render("alerts", alerts=alerts) if alerts else None


def comparison(run: RunFolder) -> list[Block]:
    """Render a table per protocol of a comparison, with means, deviations and differences."""
    tables = []
    for protocol, found in _mappings(run.figures.get("protocols")).items():
        encoders, differences = _mappings(found.get("arms")), _mappings(found.get("differences"))
        amounts = list(dict.fromkeys(amount for encoder in encoders.values() for amount in encoder))
        rows = []
        for encoder, figures in encoders.items():
            verdict = _mappings(found.get("verdicts")).get(encoder, {}).get("verdict")
            against = _mappings(differences.get(encoder))
            cells = [_cell(figures.get(one), against.get(one)) for one in amounts]
            overall = _difference(against.get("overall"))
            kind = BADGES.get(str(verdict), "")
            rows.append(
                {
                    "encoder": encoder,
                    "cells": cells,
                    "verdict": verdict or "baseline",
                    "kind": kind,
                    "overall": overall,
                }
            )
        columns = [_amount(one, encoders) for one in amounts]
        metric = found.get("metric", "accuracy")
        tables.append(
            render(
                "comparison",
                compared=_compared(run),
                rows=rows,
                columns=columns,
                caption=f"{protocol}: test {metric}",
            )
        )
    if not tables:
        return []
    baseline = run.figures.get("baseline")
    note = "Mean ± standard deviation over seeds" + (
        f"; below it the difference from {baseline} with its 95 % interval." if baseline else "."
    )
    if isinstance(run.figures.get("trained_on"), str):
        note += f" {run.figures['trained_on']}"
    return [Block("Comparison", Markup("").join(tables), note)]


def _amount(name: str, encoders: Mapping[str, Any]) -> tuple[str, str]:
    figures = [_mapping(encoder.get(name)) for encoder in encoders.values()]
    counts = {(one.get("train_labels"), one.get("val_labels")) for one in figures if one}
    if len(counts) != 1:
        return name, ""
    train, val = counts.pop()
    if train is None or val is None:
        return name, ""
    return name, f"{number(train)} training + {number(val)} validation labels"


def _cell(figures: Any, difference: Any) -> tuple[str, str]:
    one = _mapping(figures)
    if "mean" not in one:
        return "", ""
    spread = f" ± {number(one['std'])}" if "std" in one else ""
    return f"{number(one['mean'])}{spread}", _difference(difference)


def _difference(found: Any) -> str:
    mean, low, high = (_mapping(found).get(name) for name in ("mean", "low", "high"))
    if not _is_figure(mean):
        return ""
    if not (_is_figure(low) and _is_figure(high)):
        return f"{mean:+.3f} (no interval)"
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


def result_blocks(run: RunFolder) -> list[Block]:
    """Return tables and charts of the results that are not at the top of the page."""
    return [
        *comparison(run),
        *_rounds(run),
        *_overfitting(run),
        *_layers(run),
        *_per_class(run),
    ]


def _rounds(run: RunFolder) -> list[Block]:
    """Table of the trainings with and without pseudo-labels."""
    found = _mapping(run.figures.get("pseudo_labels"))
    listed = found.get("rounds")
    rounds = [_mapping(one) for one in listed] if isinstance(listed, list) else []
    if not rounds:
        return []
    monitor, metric = str(found.get("monitor")), str(found.get("metric"))
    rows = [
        [
            f"{index}, kept" if index == found.get("kept") else index,
            number(one.get("pseudo_labelled")),
            number(_mapping(one.get("val")).get(monitor)),
            number(_mapping(one.get("test")).get(metric)),
        ]
        for index, one in enumerate(rounds)
    ]
    columns = [
        "round", "pseudo-labelled images", f"validation {_name(monitor)}", f"test {_name(metric)}",
    ]  # fmt: skip
    note = "The model that is best on validation images is kept. Round 0 has true labels only."
    return [Block("Pseudo-labels", render("table", columns=columns, rows=rows), note)]


def _compared(run: RunFolder) -> str:
    """What a comparison compares: encoders, or ways to choose images."""
    return str(run.figures.get("compared", "encoder"))


def _overfitting(run: RunFolder) -> list[Block]:
    """Tables of a metric on training, held-out and test images beside each other."""
    note = (
        "The larger the difference between images that were trained on and others, the more a "
        "model overfits. Held-out images are those that hyperparameters were chosen by, "
        "evaluated with models that were not trained on them."
    )
    columns = ["training images", "held-out images", "test images", "training - test"]
    tables = []
    for protocol, found in _mappings(run.figures.get("protocols")).items():
        rows = [
            [encoder, amount, *_by_part(_mapping(figures.get("by_part")))]
            for encoder, amounts in _mappings(found.get("arms")).items()
            for amount, figures in _mappings(amounts).items()
            if _mapping(figures.get("by_part"))
        ]
        if rows:
            table = render("table", columns=[_compared(run), "labels", *columns], rows=rows)
            tables.append(Block(f"{protocol}: {found.get('metric', 'accuracy')}", table))
    train, val, test = (_mapping(run.figures.get(part)) for part in ("train", "val", "test"))
    rows = [
        [_name(name), *_by_part({"train": train[name], "val": val.get(name), "test": test[name]})]
        for name in test
        if _is_figure(train.get(name))
    ]
    if rows:
        tables.append(Block("", render("table", columns=["metric", *columns], rows=rows)))
    if isinstance(run.figures.get("trained_on"), str) and run.command == "finetune":
        note = f"{run.figures['trained_on']} {note}"
    return [Block("Overfitting", tables, note)] if tables else []


def _by_part(found: Mapping[str, Any]) -> list[Any]:
    """Cells with the figures of each part, and the difference between the first and the last."""
    train, test = found.get("train"), found.get("test")
    cells: list[Any] = [
        number(found[part]) if _is_figure(found.get(part)) else {"text": "none", "unset": True}
        for part in ("train", "val", "test")
    ]
    if _is_figure(train) and _is_figure(test):
        return [*cells, number(float(train or 0) - float(test or 0))]
    return [*cells, {"text": "none", "unset": True}]


def _layers(run: RunFolder) -> list[Block]:
    note = (
        "Test accuracy with the features of each stage. With many pretexts, an earlier stage is "
        "better than the last."
    )
    layers = _stages(run.figures.get("layers"))
    if layers:
        last = _stages({"last": {name: run.figures.get(name) for name in ("knn", "linear")}})
        return [Block("Accuracy per stage", stages({**layers, **last}), note)]
    charts = []
    for protocol, found in _mappings(run.figures.get("protocols")).items():
        by_stage: dict[str, dict[str, float]] = {}
        for encoder, scores in _mappings(found.get("layers")).items():
            for stage, amounts in _stages(scores).items():
                by_stage.setdefault(stage, {})[encoder] = list(amounts.values())[-1]  # Most labels.
        if by_stage:
            charts.append(Block(protocol, stages(by_stage)))
    if not charts:
        return []
    return [Block("Accuracy per stage", charts, f"{note} For the largest number of labels.")]


def _stages(layers: Any) -> dict[str, dict[str, float]]:
    """Keep the valid figures per stage, and the stages that have any."""
    rows = {
        stage: {name: value for name, value in row.items() if _is_figure(value)}
        for stage, row in _mappings(layers).items()
    }
    return {stage: row for stage, row in rows.items() if row}


def _per_class(run: RunFolder) -> list[Block]:
    scores = _mappings(run.figures.get("per_class"))
    metrics = list(dict.fromkeys(metric for row in scores.values() for metric in row))
    if not metrics:
        return []

    def cell(value: Any) -> Any:
        if not _is_figure(value) or not math.isfinite(value):
            return {"text": "none", "unset": True}
        return {"text": number(value), "share": min(1.0, max(0.0, float(value)))}

    rows = [[name, *(cell(row.get(metric)) for metric in metrics)] for name, row in scores.items()]
    columns = ["class", *map(_name, metrics)]
    return [
        Block("Results per class", render("table", columns=columns, rows=rows), "On the test part.")
    ]


def _demo_scores(results: Mapping[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Return the scores of ``demo`` by metric and encoder, one value per seed."""
    return {
        metric: {
            encoder: values
            for encoder, values in encoders.items()
            if isinstance(values, list) and values
        }
        for metric, encoders in _mappings(results.get("scores")).items()
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def leak_blocks(run: RunFolder) -> list[Block]:
    """Render a table of leaks, folded, from the file that ``leakage/matching.py`` writes."""
    if not run.has(LEAKS):
        return []
    columns = ("path", "twin", "where", "kind")
    try:
        with (run.folder / LEAKS).open(newline="", encoding="utf-8", errors="replace") as file:
            found = [
                [row[name] or "" for name in columns]
                for row in csv.DictReader(file)
                if (row["part"], row["where"]) != ("val", "pretraining")  # Harmless.
            ]
    except (OSError, KeyError, csv.Error):
        run.unreadable.append(f"{LEAKS} is damaged and left out.")
        return []
    if not found:
        return []
    names = ["evaluated image", "training image", "found in", "match"]
    table = render("table", columns=names, rows=found[:LISTED_LEAKS])
    count = f"{len(found):,} image{'s' * (len(found) != 1)}"
    shown = f"The first {LISTED_LEAKS} of {count}" if len(found) > LISTED_LEAKS else count
    html = Markup("<details><summary>{}</summary>{}</details>").format(shown, table)
    note = f"Evaluated images that were seen in training; {LEAKS} lists all of them."
    return [Block("Leaks", html, note)]


def _name(name: str) -> str:
    return NAMES.get(name, name.replace("_", " "))


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _mappings(value: Any) -> dict[str, dict[str, Any]]:
    """Return the values of a mapping that are mappings themselves."""
    return {str(k): v for k, v in _mapping(value).items() if isinstance(v, dict)}
