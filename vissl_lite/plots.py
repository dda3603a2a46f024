"""Pictures of curves, tables and predictions, drawn without a display."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image, ImageDraw, ImageFont
from torchvision.utils import draw_bounding_boxes

from vissl_lite.metrics_file import MetricsFile


def plot_curves(metrics: MetricsFile, names: Sequence[str], file: Path) -> None:
    """A panel for each metric that was logged, over steps.

    Args:
        metrics: The run's.
        names: Which metrics, in this order; those without values are left out.
        file: The PNG to write.
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


def plot_confusion(
    counts: np.ndarray, classes: Sequence[str], file: Path, unit: str = "images"
) -> None:
    """A confusion matrix.

    Args:
        counts: ``(K, K)`` images or pixels, by true class (row) and predicted class (column).
        classes: K names.
        file: The PNG to write.
        unit: What is counted: images are written into their cells, pixels as shares.
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
                    str(counts[row, column]) if unit == "images" else f"{shares[row, column]:.2f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if shares[row, column] > 0.5 else "black",
                )
    figure.savefig(file, dpi=100)


def plot_bars(axes: Axes, values: Mapping[str, Mapping[str, Sequence[float]]], title: str) -> None:
    """Grouped bars of means, with a dot for every seed.

    Args:
        axes: To draw in.
        values: By group (a label under the axis), then by encoder (a color): one value per seed.
        title: Of the panel.
    """
    encoders = list(next(iter(values.values())))
    width = 0.8 / len(encoders)
    for index, encoder in enumerate(encoders):
        at = np.arange(len(values)) + (index - (len(encoders) - 1) / 2) * width
        runs = [group[encoder] for group in values.values()]
        axes.bar(at, [float(np.mean(r)) for r in runs], width * 0.95, label=encoder, alpha=0.75)
        for x, dots in zip(at, runs, strict=True):
            axes.plot([x] * len(dots), dots, "k.", markersize=4)
    axes.set_xticks(range(len(values)), list(values))
    axes.set_ylim(0, 1)
    axes.set_title(title)
    axes.grid(alpha=0.3, axis="y")
    axes.legend()


def class_colors(classes: int) -> list[tuple[int, int, int]]:
    """A color for each class, RGB from 0 to 255, the same in every picture."""
    shades = colormaps["tab10" if classes <= 10 else "tab20"]
    return [
        tuple(round(255 * part) for part in shades(index % shades.N)[:3])  # type: ignore[misc]
        for index in range(classes)
    ]


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    scores: np.ndarray | None = None,
) -> np.ndarray:
    """An image with boxes, the class (and score) above each.

    Args:
        image: ``(H, W, 3)`` uint8.
        boxes: ``(N, 4)`` x1, y1, x2, y2 in pixels.
        labels: ``(N,)`` class indices.
        classes: Their names.
        scores: ``(N,)``.
    """
    if len(boxes) == 0:
        return image
    colors = class_colors(len(classes))
    words = [classes[label] for label in labels]
    if scores is not None:
        words = [f"{word} {score:.2f}" for word, score in zip(words, scores, strict=True)]
    drawn = draw_bounding_boxes(
        torch.from_numpy(image).permute(2, 0, 1),
        torch.from_numpy(boxes),
        labels=words,
        colors=[colors[label] for label in labels],
        width=max(1, min(image.shape[:2]) // 200),
    )
    return drawn.permute(1, 2, 0).numpy()


def draw_words(image: np.ndarray, words: str) -> np.ndarray:
    """An image with a line of text below it.

    Args:
        image: ``(H, W, 3)`` uint8; a small one is enlarged to be 160 pixels wide.
        words: The text.
    """
    picture = Image.fromarray(image)
    if picture.width < 160:
        shape = (160, min(round(picture.height * 160 / picture.width), max(1600, picture.height)))
        picture = picture.resize(shape, Image.Resampling.NEAREST)
    line = max(16, picture.width // 24)
    whole = Image.new("RGB", (picture.width, picture.height + line + 4), "white")
    whole.paste(picture)
    font = ImageFont.load_default(line * 3 // 4)
    ImageDraw.Draw(whole).text((3, picture.height + 2), words, fill="black", font=font)
    return np.asarray(whole)


def draw_mask(image: np.ndarray, mask: np.ndarray, classes: int) -> np.ndarray:
    """An image with its classes laid over it in color; the first class, 0, is left clear.

    Args:
        image: ``(H, W, 3)`` uint8.
        mask: ``(H, W)`` class indices; what is no class is left clear too.
        classes: How many there are.
    """
    drawn = image.astype(np.float32)
    for index, color in enumerate(class_colors(classes)):
        if index:
            drawn[mask == index] = 0.45 * drawn[mask == index] + 0.55 * np.array(color)
    return drawn.round().astype(np.uint8)


def plot_pictures(
    rows: Sequence[Sequence[np.ndarray]],
    columns: Sequence[str],
    file: Path,
    legend: Mapping[str, tuple[int, int, int]],
) -> None:
    """Rows of images, such as each test image's truth beside what was predicted.

    Args:
        rows: Images ``(H, W, 3)`` uint8, as many in each row.
        columns: What each column shows; used again where rows stand side by side.
        file: The PNG to write.
        legend: The color of each class by name.
    """
    beside = 1 if len(rows) < 3 else 2
    lines = -(-len(rows) // beside)
    figure = Figure(figsize=(3.4 * len(columns) * beside, 2.8 * lines), layout="constrained")
    grid = figure.subplots(lines, len(columns) * beside, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for index, row in enumerate(rows):
        line, side = divmod(index, beside)
        for column, image in enumerate(row):
            axes = grid[line, side * len(columns) + column]
            axes.imshow(image)
            if line == 0:
                axes.set_title(columns[column])
    patches = [
        Patch(color=(red / 255, green / 255, blue / 255), label=name)
        for name, (red, green, blue) in legend.items()
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(6, len(legend)))
    figure.savefig(file, dpi=100)


def plot_titled(
    images: Sequence[np.ndarray], titles: Sequence[str], right: Sequence[bool], file: Path
) -> None:
    """Images with what was predicted above each, in red where it is wrong.

    Args:
        images: ``(H, W, 3)`` uint8, of any sizes.
        titles: One each.
        right: Whether the prediction is.
        file: The PNG to write.
    """
    columns = min(8, len(images))
    lines = -(-len(images) // columns)
    figure = Figure(figsize=(1.7 * columns, 2.1 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, title, fine in zip(grid.flat, images, titles, right, strict=False):
        axes.imshow(image)
        axes.set_title(title, fontsize=8, color="black" if fine else "tab:red")
    figure.savefig(file, dpi=110)


def plot_per_class(scores: Mapping[str, Mapping[str, float]], file: Path) -> None:
    """Bars for each class, best first.

    Args:
        scores: By class, then by measure, from 0 to 1.
        file: The PNG to write.
    """
    measures = list(next(iter(scores.values()), {}))
    names = sorted(scores, key=lambda name: scores[name][measures[0]])
    height = 1.2 + 0.16 * len(names) * (len(measures) + 1)
    figure = Figure(figsize=(6.5, height), layout="constrained")
    axes = figure.add_subplot()
    thick = 0.8 / max(1, len(measures))
    for index, measure in enumerate(reversed(measures)):
        at = np.arange(len(names)) + (index - (len(measures) - 1) / 2) * thick
        bars = axes.barh(at, [scores[name][measure] for name in names], thick, label=measure)
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlim(0, 1.08)
    axes.grid(alpha=0.3, axis="x")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="lower right")
    figure.savefig(file, dpi=100)


@dataclass(frozen=True)
class Picture:
    """An image, and what is to be said of it.

    Attributes:
        image: ``(H, W, 3)`` uint8.
        caption: Stands below it.
        right: Whether what the caption says is: the image gets a green or a red frame.
    """

    image: np.ndarray
    caption: str = ""
    right: bool | None = None


def plot_visualization(
    columns: Sequence[str], rows: Sequence[Sequence[Picture]], file: Path
) -> None:
    """Rows of pictures, such as what a pretext was given beside what it made of it.

    Args:
        columns: Their titles; used again where rows stand side by side.
        rows: As many pictures in each as there are columns.
        file: The PNG to write.
    """
    beside = 2 if len(rows) > 3 and len(columns) <= 4 else 1
    lines = -(-len(rows) // beside)
    widths = ([1.0] * len(columns) + [0.15]) * beside  # a narrow column keeps rows apart
    del widths[-1]
    height = 1.9 if any(picture.caption for row in rows for picture in row) else 1.7
    figure = Figure(figsize=(1.7 * sum(widths), 0.4 + height * lines), layout="constrained")
    grid = figure.subplots(lines, len(widths), squeeze=False, width_ratios=widths)
    for axes in grid.flat:
        axes.axis("off")
    for index, row in enumerate(rows):
        line, side = divmod(index, beside)
        for column, picture in enumerate(row):
            axes = grid[line, side * (len(columns) + 1) + column]
            _show(axes, picture)
            if line == 0:
                axes.set_title(columns[column], fontsize=9)
    figure.savefig(file, dpi=110)


def _show(axes: Axes, picture: Picture) -> None:
    color = {None: "black", True: "tab:green", False: "tab:red"}[picture.right]
    axes.imshow(picture.image)
    axes.axis("on")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(picture.caption, fontsize=8, color=color)
    axes.spines[:].set(visible=picture.right is not None, color=color, linewidth=3)


def plot_views(
    images: Sequence[np.ndarray], views: Sequence[Sequence[np.ndarray]], file: Path
) -> None:
    """Images beside their augmented views; small views are shown as small as they are.

    Args:
        images: ``(H, W, 3)`` uint8, of any sizes.
        views: Of each image, ``(S, S, 3)`` uint8.
        file: The PNG to write.
    """
    largest = max(len(view) for view in views[0])
    rows = [
        [Picture(image), *(Picture(_on_white(view, largest)) for view in made)]
        for image, made in zip(images, views, strict=True)
    ]
    names = [f"view {number + 1}" for number in range(len(views[0]))]
    plot_visualization(["image", *names], rows, file)


def _on_white(view: np.ndarray, side: int) -> np.ndarray:
    """A square image in the middle of a white one with sides of ``side`` pixels."""
    before = (side - len(view)) // 2
    after = side - len(view) - before
    return np.pad(view, ((before, after), (before, after), (0, 0)), constant_values=255)


def plot_neighbors(
    rows: Sequence[Sequence[np.ndarray]],
    similarities: np.ndarray,
    file: Path,
    classes: Sequence[Sequence[str]] | None = None,
) -> None:
    """Images beside their nearest neighbors.

    Args:
        rows: K + 1 images each, ``(H, W, 3)`` uint8: the one that was asked for, then its
            neighbors, the nearest first.
        similarities: ``(Q, K)`` of the neighbors.
        file: The PNG to write.
        classes: Of each image, in the same order as ``rows``: neighbors of the same class as the
            first image are right.
    """
    shown = []
    for index, images in enumerate(rows):
        names = [""] * len(images) if classes is None else classes[index]
        row = [Picture(images[0], names[0])]
        for image, name, value in zip(images[1:], names[1:], similarities[index], strict=True):
            right = None if classes is None else name == names[0]
            row.append(Picture(image, f"{value:.2f} {name}".strip(), right))
        shown.append(row)
    count = len(rows[0]) - 1
    plot_visualization(
        ["image", *(f"neighbor {number + 1}" for number in range(count))], shown, file
    )
