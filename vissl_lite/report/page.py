"""A page: blocks of HTML and interactive charts in one file that needs no network."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

from bokeh.embed import file_html
from bokeh.models import UIElement
from bokeh.resources import Resources
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vissl_lite.data.atomic_file import write_atomically

# HTML, a Bokeh layout, or cards that stand side by side where there is room.
Content: TypeAlias = Markup | UIElement | Sequence["Block"]

_templates = Environment(
    loader=PackageLoader("vissl_lite.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass(frozen=True)
class Block:
    """A part of a page.

    Attributes:
        heading: Above it; an empty one leaves it out of the page's list of contents too.
        content: What is shown.
        note: A sentence below the heading that says what one sees.
    """

    heading: str
    content: Content
    note: str = ""


def render(template: str, **variables: Any) -> Markup:
    """HTML from a template of this package; text is escaped, unless it is ``Markup``.

    Args:
        template: Its name without ``.jinja``.
        variables: What it shows; all that it names must be there.
    """
    return Markup(_templates.get_template(f"{template}.jinja").render(variables))


def write_page(file: Path, title: str, blocks: Sequence[Block], wide: bool = False) -> None:
    """Write a page as one file that appears whole or not at all.

    Bokeh's own code goes into it once, and only where there is a chart.

    Args:
        file: The HTML file.
        title: Of the browser's window.
        blocks: In this order.
        wide: Use the whole width of the window, as for one large chart.
    """
    charts = [chart for block in blocks for chart in _charts(block)]
    numbers = {id(chart): number for number, chart in enumerate(charts)}
    page = _templates.get_template("page.jinja")
    variables = {
        "blocks": [_plain(block, numbers) for block in blocks],
        "version": version("vissl-lite"),
        "wide": wide,
        "title": title,
    }
    if charts:
        inline = Resources(mode="inline")
        text = file_html(charts, inline, title=title, template=page, template_variables=variables)
    else:
        text = page.render(variables, bokeh_css="", bokeh_js="", plot_script="", roots=[])
    # names of files need not be UTF-8, but a page is
    write_atomically(file, text.encode(errors="replace").decode())


def _charts(block: Block) -> Iterator[UIElement]:
    if isinstance(block.content, UIElement):
        yield block.content
    elif not isinstance(block.content, str):
        for card in block.content:
            yield from _charts(card)


def _plain(block: Block, numbers: dict[int, int]) -> dict[str, Any]:
    """A block as its template takes it: a chart is the number of its root in the page."""
    plain: dict[str, Any] = {"heading": block.heading, "note": block.note}
    if isinstance(block.content, UIElement):
        plain["chart"] = numbers[id(block.content)]
    elif isinstance(block.content, str):
        plain["html"] = block.content
    else:
        plain["cards"] = [_plain(card, numbers) for card in block.content]
    return plain
