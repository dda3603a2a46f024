"""Plots of curves, tables and predictions, drawn with matplotlib without a display."""

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
    """Plot each logged metric over training steps, in a panel of its own.

    Args:
        metrics: Metrics of the run.
        names: Metrics to plot, in this order. Those without values are left out.
        file: PNG file to write.
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
    """Plot a confusion matrix.

    Args:
        counts: Number of images or pixels by true class (row) and predicted class (column),
            ``(K, K)``.
        classes: K class names.
        file: PNG file to write.
        unit: ``images`` to write counts into the cells; otherwise fractions are written.
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
    """Plot means as grouped bars, with a dot for every seed.

    Args:
        axes: Axes to draw in.
        values: One value in [0, 1] per seed, by group (a label under the axis), then by encoder
            (a color).
        title: Title of the panel.
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
    """Return an RGB color from 0 to 255 for each class, the same in every plot."""
    palette = colormaps["tab10" if classes <= 10 else "tab20"]
    return [
        tuple(round(255 * part) for part in palette(index % palette.N)[:3])  # type: ignore[misc]
        for index in range(classes)
    ]


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    scores: np.ndarray | None = None,
) -> np.ndarray:
    """Draw boxes into an image, each with its class and optionally its score.

    Args:
        image: Image ``(H, W, 3)``, uint8.
        boxes: Boxes ``(N, 4)`` as x1, y1, x2, y2 in pixels.
        labels: Class indices ``(N,)``.
        classes: Class names.
        scores: Scores ``(N,)``.

    Returns:
        The image with boxes, ``(H, W, 3)`` uint8.
    """
    if len(boxes) == 0:
        return image
    colors = class_colors(len(classes))
    captions = [classes[label] for label in labels]
    if scores is not None:
        captions = [f"{name} {score:.2f}" for name, score in zip(captions, scores, strict=True)]
    drawn = draw_bounding_boxes(
        torch.from_numpy(image).permute(2, 0, 1),
        torch.from_numpy(boxes),
        labels=captions,
        colors=[colors[label] for label in labels],
        width=max(1, min(image.shape[:2]) // 200),
    )
    return drawn.permute(1, 2, 0).numpy()


def draw_caption(image: np.ndarray, caption: str) -> np.ndarray:
    """Add a line of text below an image.

    Args:
        image: Image ``(H, W, 3)``, uint8. Images narrower than 160 pixels are enlarged.
        caption: Text below the image.

    Returns:
        The image with its caption, uint8.
    """
    picture = Image.fromarray(image)
    if picture.width < 160:
        shape = (160, min(round(picture.height * 160 / picture.width), max(1600, picture.height)))
        picture = picture.resize(shape, Image.Resampling.NEAREST)
    line = max(16, picture.width // 24)
    canvas = Image.new("RGB", (picture.width, picture.height + line + 4), "white")
    canvas.paste(picture)
    font = ImageFont.load_default(line * 3 // 4)
    ImageDraw.Draw(canvas).text((3, picture.height + 2), caption, fill="black", font=font)
    return np.asarray(canvas)


def draw_mask(image: np.ndarray, mask: np.ndarray, classes: int) -> np.ndarray:
    """Overlay a segmentation mask on an image; class 0 is left transparent.

    Args:
        image: Image ``(H, W, 3)``, uint8.
        mask: Class indices ``(H, W)``. Other values are left transparent too.
        classes: Number of classes.

    Returns:
        The image with the overlay, ``(H, W, 3)`` uint8.
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
    """Plot rows of images, such as ground truth beside predictions.

    Args:
        rows: Images ``(H, W, 3)`` uint8, the same number in each row.
        columns: Column titles, repeated if rows are placed side by side.
        file: PNG file to write.
        legend: Color of each class by name.
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


def plot_predictions(
    images: Sequence[np.ndarray], titles: Sequence[str], right: Sequence[bool], file: Path
) -> None:
    """Plot images with their prediction as the title, in red if it is wrong.

    Args:
        images: Images ``(H, W, 3)`` uint8 of any sizes.
        titles: One title per image.
        right: Whether the prediction for each image is right.
        file: PNG file to write.
    """
    columns = min(8, len(images))
    lines = -(-len(images) // columns)
    figure = Figure(figsize=(1.7 * columns, 2.1 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, title, is_right in zip(grid.flat, images, titles, right, strict=False):
        axes.imshow(image)
        axes.set_title(title, fontsize=8, color="black" if is_right else "tab:red")
    figure.savefig(file, dpi=110)


def plot_per_class(scores: Mapping[str, Mapping[str, float]], file: Path) -> None:
    """Plot the metrics of each class as bars, best class first.

    Args:
        scores: Values in [0, 1] by class, then by metric.
        file: PNG file to write.
    """
    metrics = list(next(iter(scores.values()), {}))
    names = sorted(scores, key=lambda name: scores[name][metrics[0]])
    height = 1.2 + 0.16 * len(names) * (len(metrics) + 1)
    figure = Figure(figsize=(6.5, height), layout="constrained")
    axes = figure.add_subplot()
    thickness = 0.8 / max(1, len(metrics))
    for index, metric in enumerate(reversed(metrics)):
        at = np.arange(len(names)) + (index - (len(metrics) - 1) / 2) * thickness
        bars = axes.barh(at, [scores[name][metric] for name in names], thickness, label=metric)
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlim(0, 1.08)
    axes.grid(alpha=0.3, axis="x")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="lower right")
    figure.savefig(file, dpi=100)


@dataclass(frozen=True)
class Picture:
    """An image with a caption.

    Attributes:
        image: Image ``(H, W, 3)``, uint8.
        caption: Text below the image.
        right: Whether the prediction in the caption is right, shown as a green or red frame. None
            for no frame.
    """

    image: np.ndarray
    caption: str = ""
    right: bool | None = None


def plot_visualization(
    columns: Sequence[str], rows: Sequence[Sequence[Picture]], file: Path
) -> None:
    """Plot rows of pictures, such as the input of a pretext beside its prediction.

    Args:
        columns: Column titles, repeated if rows are placed side by side.
        rows: Rows of pictures, one per column.
        file: PNG file to write.
    """
    beside = 2 if len(rows) > 3 and len(columns) <= 4 else 1
    lines = -(-len(rows) // beside)
    widths = ([1.0] * len(columns) + [0.15]) * beside  # A narrow column separates the rows.
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
            _draw_picture(axes, picture)
            if line == 0:
                axes.set_title(columns[column], fontsize=9)
    figure.savefig(file, dpi=110)


def _draw_picture(axes: Axes, picture: Picture) -> None:
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
    """Plot images beside their augmented views, all views at the same scale.

    Args:
        images: Images ``(H, W, 3)`` uint8 of any sizes.
        views: Views ``(S, S, 3)`` uint8 of each image.
        file: PNG file to write.
    """
    largest = max(len(view) for view in views[0])
    rows = [
        [Picture(image), *(Picture(_pad_white(view, largest)) for view in its_views)]
        for image, its_views in zip(images, views, strict=True)
    ]
    names = [f"view {number + 1}" for number in range(len(views[0]))]
    plot_visualization(["image", *names], rows, file)


def _pad_white(view: np.ndarray, side: int) -> np.ndarray:
    """Pad a square image with white to ``side`` pixels, keeping it centered."""
    before = (side - len(view)) // 2
    after = side - len(view) - before
    return np.pad(view, ((before, after), (before, after), (0, 0)), constant_values=255)


def plot_neighbors(
    rows: Sequence[Sequence[np.ndarray]],
    similarities: np.ndarray,
    file: Path,
    classes: Sequence[Sequence[str]] | None = None,
) -> None:
    """Plot images beside their nearest neighbors.

    Args:
        rows: Q rows of K + 1 images ``(H, W, 3)`` uint8: the query, then its neighbors, the
            nearest first.
        similarities: Similarities of the neighbors, ``(Q, K)``.
        file: PNG file to write.
        classes: Class name of each image, in the order of ``rows``. Neighbors of the query's class
            are marked as right.
    """
    pictures = []
    for index, images in enumerate(rows):
        names = [""] * len(images) if classes is None else classes[index]
        row = [Picture(images[0], names[0])]
        for image, name, value in zip(images[1:], names[1:], similarities[index], strict=True):
            right = None if classes is None else name == names[0]
            row.append(Picture(image, f"{value:.2f} {name}".strip(), right))
        pictures.append(row)
    count = len(rows[0]) - 1
    plot_visualization(
        ["image", *(f"neighbor {number + 1}" for number in range(count))], pictures, file
    )
