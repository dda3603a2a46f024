"""Interactive map of images: hover, click, select and save points, without a server."""

import html
import os
from base64 import b64encode
from collections.abc import Sequence
from typing import Any

import numpy as np
from bokeh.layouts import column, row
from bokeh.models import (
    Button,
    CDSView,
    ColumnDataSource,
    CustomJS,
    Div,
    GlyphRenderer,
    HoverTool,
    IndexFilter,
    LayoutDOM,
    Legend,
    LegendItem,
    MultiChoice,
    RadioButtonGroup,
)
from bokeh.plotting import figure

from vissl_lite.evaluation.embedding import ImageMap
from vissl_lite.plots import class_colors
from vissl_lite.report.charts import GRAY

# With more classes than this there is no legend: it would be longer than the map.
MAX_LEGEND_CLASSES = 50

# Maximum numbers of thumbnails.
MAX_OUTLIERS, MAX_PAIRS, MAX_SELECTED = 24, 24, 60

PROJECTION_NAMES = {"pca": "PCA", "umap": "UMAP"}

# Once all colors are used, the shape of the points distinguishes further classes.
MARKERS = ("circle", "square", "triangle", "diamond", "inverted_triangle", "hex")

# Style of the points of a class that is marked.
_MARKED = {"marker": "diamond", "size": 15, "alpha": 1.0, "line_color": "black"}

_TOOLTIP = """
<div style="max-width: 260px; overflow-wrap: anywhere">
  <img src="data:image/jpeg;base64,@thumbnail" width="128" height="128"><br>
  <b>@class_name</b><br>@path
</div>
"""

_STYLE = """
.cards { display: flex; flex-wrap: wrap; gap: 6px; margin: 6px 0; }
.cards button { width: 76px; padding: 3px; border: 1px solid #8888; border-radius: 4px;
  background: none; color: inherit; font: 11px sans-serif; cursor: pointer;
  overflow-wrap: anywhere; }
.cards button:hover { border-color: currentcolor; }
.cards img { display: block; margin: 0 auto 2px; }
.pair { display: flex; gap: 2px; padding: 2px; background: #8882; border-radius: 4px; }
"""

# Bokeh renders HTML blocks apart from the page, so the code is inlined in every ``onclick``.
_SELECT = (
    "for (const page of Bokeh.documents) { const points = page.get_model_by_id('%s'); "
    "if (points != null) points.selected.indices = [%s] }"
)

_SHOW_SELECTED = """
const data = source.data, chosen = source.selected.indices
const escape = (text) => text.replace(/[&<>"']/g, (char) => `&#${char.charCodeAt(0)};`)
const card = (index, caption) => `<button title="${escape(data.path[index])}"
  onclick="${select.replace('INDEX', index)}"><img width="64" height="64"
  src="data:image/jpeg;base64,${data.thumbnail[index]}">${escape(caption)}</button>`
const cards = (list) => `<div class="cards">${list.join("")}</div>`
if (chosen.length == 0) {
  details.text = hint
} else if (chosen.length == 1) {
  const index = chosen[0]
  const near = neighbors[index].map((other, place) =>
    card(other, `${similarities[index][place].toFixed(2)} ${data.class_name[other]}`))
  details.text = `<b>${escape(data.path[index])}</b> and its nearest neighbors, with their cosine
    similarity` + cards([card(index, data.class_name[index]), ...near])
} else {
  const first = chosen.slice(0, limit)
  const note = first.length < chosen.length ? ` (showing the first ${limit})` : ""
  details.text = `<b>${chosen.length} images selected</b>${note}: click one for its neighbors`
    + cards(first.map((index) => card(index, data.class_name[index])))
}
if (save != null) {
  save.disabled = chosen.length == 0
  save.label = chosen.length == 0 ? save_label : `Save the paths of ${chosen.length} selected`
}
"""

_SHOW_METHOD = """
const method = methods[cb_obj.active]
for (const range of ranges)
  range.have_updated_interactively = false  // Fit the range to the points again.
source.data = {...source.data, x: source.data[`${method}_x`], y: source.data[`${method}_y`]}
"""

_SHOW_CLASSES = """
for (const [name, points] of layers)
  points.visible = cb_obj.value.length == 0 || cb_obj.value.includes(name)
"""

_SAVE = """
const lines = source.selected.indices.map((index) => `${folder}${source.data.path[index]}\\n`)
const link = document.createElement("a")
link.href = URL.createObjectURL(new Blob(lines, {type: "text/plain"}))
link.download = "selected.txt"
link.click()
setTimeout(() => URL.revokeObjectURL(link.href), 1000)
"""

_HINT = "Click a point to see its nearest neighbors; hover to see the image."
_SAVE_LABEL = "Save the paths of selected images"


def map_layout(image_map: ImageMap, explore: bool = False, marked: str | None = None) -> LayoutDOM:
    """Build the map as a self-contained Bokeh layout.

    The page needs ``Resources(components=["bokeh", "bokeh-widgets"])``.

    Args:
        image_map: Images, their coordinates and their neighbors.
        explore: Whether to add tools for browsing a folder: lasso selection, saving the selected
            paths, a class filter, outliers and near-duplicates.
        marked: Class whose points are large diamonds.
    """
    folder = common_folder(image_map.paths)
    source = _source(image_map, len(folder))
    tools = "pan,wheel_zoom,tap,reset" + (",box_select,lasso_select" if explore else "")
    points = figure(
        height=560,
        sizing_mode="stretch_width",
        tools=tools,
        # In a report the mouse wheel scrolls the page unless zooming is switched on.
        active_scroll="wheel_zoom" if explore else None,
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
    )
    points.toolbar.logo = None
    points.axis.visible = False
    points.grid.grid_line_color = GRAY
    points.grid.grid_line_alpha = 0.25
    points.add_tools(HoverTool(tooltips=_TOOLTIP, limit=1))
    layers = _draw(points, source, image_map, marked)
    details = _html(_HINT)
    controls: list[Any] = []
    if len(image_map.coordinates) > 1:
        methods = list(reversed(image_map.coordinates))
        switch = RadioButtonGroup(labels=[PROJECTION_NAMES[name] for name in methods], active=0)
        ranges = [points.x_range, points.y_range]
        variables = {"source": source, "methods": methods, "ranges": ranges}
        switch.js_on_change("active", CustomJS(args=variables, code=_SHOW_METHOD))
        controls.append(switch)
    save = None
    if explore:
        if len(layers) > 1:
            # Bokeh interprets the labels as HTML.
            names = [(name, html.escape(name)) for name, _ in layers]
            choice = MultiChoice(options=names, placeholder="all classes; choose some", width=320)
            choice.js_on_change("value", CustomJS(args={"layers": layers}, code=_SHOW_CLASSES))
            controls.append(choice)
        save = Button(label=_SAVE_LABEL, disabled=True)
        save.js_on_click(CustomJS(args={"source": source, "folder": folder}, code=_SAVE))
        controls.append(save)
    variables = {
        "source": source,
        "details": details,
        "save": save,
        "neighbors": image_map.neighbors.tolist(),
        "similarities": image_map.similarities.round(3).tolist(),
        "select": _SELECT % (source.id, "INDEX"),
        "limit": MAX_SELECTED,
        "hint": _HINT,
        "save_label": _SAVE_LABEL,
    }
    source.selected.js_on_change("indices", CustomJS(args=variables, code=_SHOW_SELECTED))
    lists = [_outliers(source, image_map), _near_duplicates(source, image_map)] if explore else []
    parts = [row(*controls, sizing_mode="stretch_width")] if controls else []
    return column(*parts, points, details, *lists, sizing_mode="stretch_width")


def common_folder(paths: Sequence[str]) -> str:
    """Return the innermost common folder of absolute paths, with a trailing separator.

    Empty if there is none, as on two drives of Windows.
    """
    try:
        return os.path.join(os.path.commonpath([os.path.dirname(path) for path in paths]), "")
    except ValueError:
        return ""


def _source(image_map: ImageMap, skip: int) -> ColumnDataSource:
    """Build the data source with one row per point; paths lose their first ``skip`` characters."""
    first = list(image_map.coordinates.values())[-1]
    columns: dict[str, Any] = {
        "x": first[:, 0],
        "y": first[:, 1],
        "path": [path[skip:] for path in image_map.paths],
        "class_name": _class_names(image_map),
        "thumbnail": [b64encode(one).decode() for one in image_map.thumbnails],
    }
    for name, flat in image_map.coordinates.items():
        columns |= {f"{name}_x": flat[:, 0], f"{name}_y": flat[:, 1]}
    return ColumnDataSource(columns)


def _class_names(image_map: ImageMap) -> list[str]:
    if image_map.labels is None:
        return [""] * len(image_map.paths)
    return [image_map.classes[label] for label in image_map.labels]


def _draw(
    points: figure, source: ColumnDataSource, image_map: ImageMap, marked: str | None
) -> list[tuple[str, GlyphRenderer]]:
    """Draw the points, with one layer per class if there are few, and return layers by name."""
    rgb = class_colors(len(image_map.classes) or 1)
    colors = [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in rgb]
    style: dict[str, Any] = {
        "size": 8,
        "alpha": 0.8,
        "line_color": "white",
        "line_width": 0.5,
        "nonselection_alpha": 0.15,
    }
    labels = image_map.labels
    if labels is None or len(image_map.classes) > MAX_LEGEND_CLASSES:
        indices = np.zeros(len(image_map.paths), np.int64) if labels is None else labels
        source.data["color"] = [colors[index] for index in indices]
        return [("", points.scatter("x", "y", source=source, fill_color="color", **style))]
    layers = []
    for label, name in enumerate(image_map.classes):
        inside = np.flatnonzero(labels == label)
        if len(inside) == 0:
            continue
        style["marker"] = MARKERS[label // 20 % len(MARKERS)]
        layer = points.scatter(
            "x",
            "y",
            source=source,
            view=CDSView(filter=IndexFilter(inside.tolist())),
            fill_color=colors[label],
            **{**style, **(_MARKED if name == marked else {})},
        )
        layers.append((name, layer))
    items = [LegendItem(label={"value": _short(name)}, renderers=[one]) for name, one in layers]
    legend = Legend(
        items=items,
        click_policy="hide",
        ncols=1 if len(items) <= 25 else 2,
        spacing=0,
        label_text_font_size="11px",
        glyph_height=16,
        label_height=16,
        padding=4,
        label_text_color=GRAY,
        background_fill_color=None,
        border_line_color=None,
    )
    points.add_layout(legend, "right")
    return layers


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"


def _html(text: str) -> Div:
    # Dollar signs in paths must not be parsed as math: Bokeh would download a renderer.
    return Div(text=text, stylesheets=[_STYLE], disable_math=True, sizing_mode="stretch_width")


def _card(source: ColumnDataSource, index: int, caption: str) -> str:
    """Return a thumbnail that selects its point on click; the same as in ``_SHOW_SELECTED``."""
    path = html.escape(source.data["path"][index])
    return (
        f'<button title="{path}" onclick="{_SELECT % (source.id, index)}"><img width="64" '
        f'height="64" src="data:image/jpeg;base64,{source.data["thumbnail"][index]}">'
        f"{html.escape(caption)}</button>"
    )


def _outliers(source: ColumnDataSource, image_map: ImageMap) -> Div:
    order = np.argsort(-image_map.outlier_score, kind="stable")[:MAX_OUTLIERS]
    cards = [_card(source, int(index), f"{image_map.outlier_score[index]:.3f}") for index in order]
    return _html(
        f"<b>Outliers</b>: images farthest from all others, with the distance to their neighbor "
        f'number {image_map.neighbors.shape[1]}<div class="cards">{"".join(cards)}</div>'
    )


def _near_duplicates(source: ColumnDataSource, image_map: ImageMap) -> Div:
    if len(image_map.duplicates) == 0:
        return _html("<b>Near-duplicates</b>: none")
    names = source.data["class_name"]
    pairs = [
        f'<div class="pair">{_card(source, first, names[first])}'
        f"{_card(source, second, names[second])}</div>"
        for first, second in image_map.duplicates[:MAX_PAIRS].tolist()
    ]
    return _html(
        f"<b>Near-duplicates</b>: the {len(pairs)} image pairs with the most similar features"
        f'<div class="cards">{"".join(pairs)}</div>'
    )
