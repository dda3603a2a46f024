"""Plots of curves, tables and predictions, drawn with matplotlib without a display."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from matplotlib import colormaps, get_data_path
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torchvision.utils import draw_bounding_boxes

from vissl_lite.metrics_file import MetricsFile

# Classes that a figure shows by name; of more, one row per class would make a picture of any size.
MAX_NAMED_CLASSES = 100


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
    """Plot a confusion matrix; without the names of the classes if there are more than 100.

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
    names = [verbatim(name) for name in classes] if len(classes) <= MAX_NAMED_CLASSES else []
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
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


def verbatim(text: str) -> str:
    """Text that matplotlib draws as it is: two dollar signs would enclose a formula."""
    return text.replace("$", r"\$")


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
    bars = []
    for index, encoder in enumerate(encoders):
        at = np.arange(len(values)) + (index - (len(encoders) - 1) / 2) * width
        runs = [group[encoder] for group in values.values()]
        bars.append(axes.bar(at, [float(np.mean(r)) for r in runs], width * 0.95, alpha=0.75))
        for x, dots in zip(at, runs, strict=True):
            axes.plot([x] * len(dots), dots, "k.", markersize=4)
    axes.set_xticks(range(len(values)), list(values))
    axes.set_ylim(0, 1)
    axes.set_title(title)
    axes.grid(alpha=0.3, axis="y")
    axes.legend(bars, [verbatim(encoder) for encoder in encoders])


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
    masks: Iterable[np.ndarray | None] = (),
) -> np.ndarray:
    """Draw boxes into an image, each with its class and optionally its score and its mask.

    The text of a box is left out where it neither fits into the box nor is clear of the others.

    Args:
        image: Image ``(H, W, 3)``, uint8.
        boxes: Boxes ``(N, 4)`` as x1, y1, x2, y2 in pixels.
        labels: Class indices ``(N,)``.
        classes: Class names.
        scores: Scores ``(N,)``.
        masks: Masks ``(H, W)`` of the N objects, nonzero inside; None for objects without one. They
            are filled, with a contour, below the boxes.

    Returns:
        The image with boxes, ``(H, W, 3)`` uint8.
    """
    if len(boxes) == 0:
        return image
    colors = class_colors(len(classes))
    width = max(1, min(image.shape[:2]) // 200)
    image = _fill_masks(image, masks, [colors[label] for label in labels], width)
    captions = [classes[label] for label in labels]
    if scores is not None:
        captions = [f"{name} {score:.2f}" for name, score in zip(captions, scores, strict=True)]
    readable = _readable(boxes, captions, width)
    drawn = draw_bounding_boxes(
        torch.from_numpy(image).permute(2, 0, 1),
        torch.from_numpy(boxes),
        labels=[text if fits else None for text, fits in zip(captions, readable, strict=True)],
        colors=[colors[label] for label in labels],
        width=width,
    )
    return drawn.permute(1, 2, 0).numpy()


def _readable(boxes: np.ndarray, captions: Sequence[str], width: int) -> np.ndarray:
    """Whether each text, at the upper left in its box, fits into it or covers no other box."""
    font = ImageFont.load_default()  # as draw_bounding_boxes writes
    texts = boxes.astype(float)
    texts[:, 2:] = texts[:, :2] + [font.getbbox(text)[2:] for text in captions] + width + 1
    fits: np.ndarray = np.all(texts[:, 2:] <= boxes[:, 2:], axis=1)
    upper, lower = boxes[:, :2], boxes[:, 2:]
    for index in np.flatnonzero(~fits):  # one at a time: a micrograph may have thousands of boxes
        covered: np.ndarray = np.all(
            (texts[index, :2] < lower) & (upper < texts[index, 2:]), axis=1
        )
        covered[index] = False
        fits[index] = not covered.any()
    return fits


def _fill_masks(
    image: np.ndarray,
    masks: Iterable[np.ndarray | None],
    colors: Sequence[tuple[int, int, int]],
    width: int,
) -> np.ndarray:
    """Blend masks into a copy of an image, each in its color, with contours of ``width`` pixels."""
    drawn = image.copy()
    for mask, color in zip(masks, colors, strict=False):
        if mask is None:
            continue
        inside = mask > 0
        drawn[inside] = (0.6 * drawn[inside] + 0.4 * np.array(color)).astype(np.uint8)
        contours, _ = cv2.findContours(
            inside.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE
        )
        cv2.drawContours(drawn, contours, -1, color, width)
    return drawn


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


def metrics_of_classes(scores: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the metrics that any class has, in the order of a class that has the most.

    Args:
        scores: Values by class, then by metric. Of masks or volumes, some classes have none.
    """
    rows = sorted(scores.values(), key=len, reverse=True)
    return list(dict.fromkeys(metric for row in rows for metric in row))


def plot_per_class(scores: Mapping[str, Mapping[str, float]], file: Path) -> None:
    """Plot the metrics of each class as bars, best class first; of many, the best and the worst.

    Args:
        scores: Values in [0, 1] by class, then by metric. Classes without the first metric come
            last.
        file: PNG file to write.
    """
    metrics = metrics_of_classes(scores)
    names = sorted(scores, key=lambda name: scores[name].get(metrics[0], -math.inf))
    title, half = "", MAX_NAMED_CLASSES // 2
    if len(names) > MAX_NAMED_CLASSES:
        title = f"the {half} best and the {half} worst of {len(names):,} classes"
        names = names[:half] + names[-half:]
    height = 1.2 + 0.16 * len(names) * (len(metrics) + 1)
    figure = Figure(figsize=(6.5, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    thickness = 0.8 / max(1, len(metrics))
    for index, metric in enumerate(reversed(metrics)):
        at = np.arange(len(names)) + (index - (len(metrics) - 1) / 2) * thickness
        values = [scores[name].get(metric, math.nan) for name in names]
        bars = axes.barh(at, values, thickness, label=metric)
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
    axes.set_yticks(range(len(names)), [verbatim(name) for name in names])
    axes.set_xlim(0, 1.08)
    axes.grid(alpha=0.3, axis="x")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="lower right")
    figure.savefig(file, dpi=100)


# In pixels: default side of a cell, width between images, between blocks, and for a legend's entry;
# height of a line of text.
CELL, GAP, BLOCK_GAP, LEGEND_ENTRY, LINE = 180, 6, 30, 170, 20

BLACK, GREEN, RED = (0, 0, 0), (44, 160, 44), (214, 39, 40)


@dataclass(frozen=True)
class Picture:
    """An image with a caption.

    Attributes:
        image: ``(H, W, 3)`` uint8.
        caption: Text below the image.
        right: Whether what the caption says is correct: the image gets a green or a red frame.
    """

    image: np.ndarray
    caption: str = ""
    right: bool | None = None


def plot_grid(
    rows: Sequence[Sequence[Picture]],
    file: Path,
    columns: Sequence[str] = (),
    legend: Mapping[str, tuple[int, int, int]] | None = None,
    cell: int = CELL,
) -> None:
    """Write rows of images as one PNG.

    Drawn with Pillow: Matplotlib takes seconds for that many axes.

    Args:
        rows: Images of any sizes; each is scaled to fit its cell. Many rows of few columns stand in
            two blocks side by side.
        file: PNG to write.
        columns: Titles of the columns, of one or more lines.
        legend: Color of each class by name.
        cell: Side of a cell in pixels.
    """
    blocks = 2 if columns and len(rows) > 3 and len(columns) <= 4 else 1
    lines = -(-len(rows) // blocks)
    step = cell + GAP
    block = max(map(len, rows)) * step + BLOCK_GAP
    top = GAP + LINE * max((len(title.splitlines()) for title in columns), default=0)
    captions = any(picture.caption for row in rows for picture in row)
    height = step + (LINE if captions else 0)
    width = max(blocks * block - BLOCK_GAP + GAP, LEGEND_ENTRY)
    per_line = width // LEGEND_ENTRY
    bottom = top + lines * height
    page = Image.new("RGB", (width, bottom + LINE * -(-len(legend or ()) // per_line)), "white")
    draw = ImageDraw.Draw(page)
    ttf = Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    font = ImageFont.truetype(ttf, 12, layout_engine=ImageFont.Layout.BASIC)
    for index, row in enumerate(rows):
        side, line = index % blocks, index // blocks
        for column, picture in enumerate(row):
            left, upper = GAP + side * block + column * step, top + line * height
            if line == 0 and columns:
                for number, words in enumerate(columns[column].splitlines()):
                    _write(draw, (left, GAP // 2 + number * LINE), words, font, cell)
            color = {None: BLACK, True: GREEN, False: RED}[picture.right]
            if picture.right is not None:
                draw.rectangle((left - 3, upper - 3, left + cell + 2, upper + cell + 2), color)
                draw.rectangle((left, upper, left + cell - 1, upper + cell - 1), "white")
            scaled = _scaled(picture.image, cell)
            corner = (left + (cell - scaled.width) // 2, upper + (cell - scaled.height) // 2)
            page.paste(scaled, corner)
            _write(draw, (left, upper + cell + 3), picture.caption, font, cell, color)
    for index, (name, color) in enumerate((legend or {}).items()):
        left, upper = index % per_line * LEGEND_ENTRY + GAP, bottom + index // per_line * LINE
        draw.rectangle((left, upper + 3, left + 12, upper + 15), color)
        _write(draw, (left + 18, upper + 2), name, font, LEGEND_ENTRY - 18 - GAP)
    page.save(file)


def _scaled(image: np.ndarray, side: int) -> Image.Image:
    """An image scaled to fit a square, with hard pixels where it is enlarged."""
    scale = side / max(image.shape[:2])
    height, width = (max(1, round(scale * length)) for length in image.shape[:2])
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX
    return Image.fromarray(image).resize((width, height), how)


def _write(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    text: str,
    font: ImageFont.FreeTypeFont,
    width: int,
    color: tuple[int, int, int] = BLACK,
) -> None:
    """Write a line of text, cut to a width in pixels."""
    if font.getlength(text) > width:
        while text and font.getlength(f"{text}…") > width:
            text = text[:-1]
        text += "…"
    draw.text(corner, text, color, font)


def plot_views(
    images: Sequence[np.ndarray], views: Sequence[Sequence[np.ndarray]], file: Path
) -> None:
    """Write images beside their augmented views as one PNG.

    Args:
        images: ``(H, W, 3)`` uint8, of any sizes.
        views: Views of each image, ``(S, S, 3)`` uint8; small ones are shown smaller.
        file: PNG to write.
    """
    largest = max(len(view) for view in views[0])
    rows = [
        [Picture(image), *(Picture(_pad_white(view, largest)) for view in augmented)]
        for image, augmented in zip(images, views, strict=True)
    ]
    plot_grid(rows, file, ["image", *(f"view {number + 1}" for number in range(len(views[0])))])


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
    """Write images beside their nearest neighbors as one PNG.

    Args:
        rows: K + 1 images each, ``(H, W, 3)`` uint8: the query, then its neighbors, the nearest
            first.
        similarities: ``(Q, K)`` cosine similarities of the neighbors.
        file: PNG to write.
        classes: Class of each image, in the same order as ``rows``: a neighbor of the query's class
            counts as right.
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
    plot_grid(pictures, file, ["image", *(f"neighbor {number + 1}" for number in range(count))])
