"""Write a page: blocks of HTML and interactive charts in one self-contained file."""

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

# HTML, a Bokeh layout, or cards that are placed side by side if there is room.
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
    """A section of a page, or a card in a section.

    Attributes:
        heading: Heading. A section without one is not listed in the table of contents.
        content: HTML, a chart, or cards.
        note: A sentence below the heading that explains the content.
    """

    heading: str
    content: Content
    note: str = ""


def render(template: str, **variables: Any) -> Markup:
    """Render a template of this package to HTML. Text is escaped unless it is ``Markup``.

    Args:
        template: Name of the template without ``.jinja``.
        variables: Variables of the template; all that it uses must be given.
    """
    return Markup(_templates.get_template(f"{template}.jinja").render(variables))


def write_page(file: Path, title: str, blocks: Sequence[Block], wide: bool = False) -> None:
    """Write a page atomically as one file.

    Bokeh's JavaScript is embedded once, and only if the page has a chart.

    Args:
        file: HTML file to write.
        title: Title of the page.
        blocks: Sections of the page, in order.
        wide: Whether to use the whole width of the window, as for one large chart.
    """
    charts = [chart for block in blocks for chart in _charts(block)]
    numbers = {id(chart): number for number, chart in enumerate(charts)}
    page = _templates.get_template("page.jinja")
    variables = {
        "blocks": [_template_block(block, numbers) for block in blocks],
        "version": version("vissl-lite"),
        "wide": wide,
        "title": title,
    }
    if charts:
        inline = Resources(mode="inline")
        text = file_html(charts, inline, title=title, template=page, template_variables=variables)
    else:
        text = page.render(variables, bokeh_css="", bokeh_js="", plot_script="", roots=[])
    # File names are not necessarily valid UTF-8, but the page must be.
    write_atomically(file, text.encode(errors="replace").decode())


def _charts(block: Block) -> Iterator[UIElement]:
    if isinstance(block.content, UIElement):
        yield block.content
    elif not isinstance(block.content, str):
        for card in block.content:
            yield from _charts(card)


def _template_block(block: Block, numbers: dict[int, int]) -> dict[str, Any]:
    """Convert a block for the template; a chart becomes the index of its Bokeh root."""
    fields: dict[str, Any] = {"heading": block.heading, "note": block.note}
    if isinstance(block.content, UIElement):
        fields["chart"] = numbers[id(block.content)]
    elif isinstance(block.content, str):
        fields["html"] = block.content
    else:
        fields["cards"] = [_template_block(card, numbers) for card in block.content]
    return fields
