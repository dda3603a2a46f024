"""The tables of docs/data.md; ``python -m tests.docs.test_data_page`` writes them."""

import re
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.commands.box_layouts import DETECTION
from tests.commands.layouts import CLASSIFICATION, Layout
from tests.commands.mask_layouts import SEGMENTATION

PAGE = Path(__file__).parents[2] / "docs" / "data.md"

TABLES = {
    "classification": CLASSIFICATION,
    "detection": DETECTION,
    "segmentation": SEGMENTATION,
}

# Number of patterns of files that are shown.
SHOWN = 4


# Length in characters of a first line that is shown.
LINE = 60


def patterns(layout: Layout) -> list[str]:
    """The files of a layout, with ``*`` for numbers and ``<class>`` for classes.

    A table is followed by its first line.
    """
    classes = "|".join(sorted({*layout.classes.split(), "cat", "dog"}))
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        layout.build(Path(folder))
        for path in sorted(Path(folder).rglob("*")):
            if not path.is_file():
                continue
            name = path.relative_to(folder).as_posix()
            name = re.sub(r"(\b|_)\d+(?=(_[A-Za-z]\w*)?\.\w+$|/)", r"\1*", name)
            name = re.sub(rf"\b({classes})\b", "<class>", name)
            found.setdefault(name, f"`{name}`")
            if "*" not in name and path.suffix in (".csv", ".tsv", ".jsonl", ".txt"):
                first = path.read_text().split("\n")[0].replace("\t", "⇥")
                found[name] = f"`{name}` (`{first[:LINE]}`)" if first.strip() else f"`{name}`"
    return [found[name] for name in sorted(found, key=lambda name: ("*" in name, name))]


def table(layouts: Sequence[Layout]) -> str:
    lines = ["| layout | files | `--data` |", "| --- | --- | --- |"]
    for layout in layouts:
        files = patterns(layout)
        shown = " ".join(files[:SHOWN])
        source = "/".join(filter(None, ("FOLDER", layout.data)))
        command = shlex.join([source, *layout.options]).replace("|", "\\|")
        more = " …" if len(files) > SHOWN else ""
        lines.append(f"| {layout.name} | {shown}{more} | `{command}` |")
    return "\n".join(lines)


def filled(page: str) -> str:
    for name, layouts in TABLES.items():
        begin, end = f"<!-- layouts of {name} -->\n", "\n<!-- end -->"
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}{table(layouts)}{end}{rest.partition(end.strip())[2]}"
    return page


def test_the_tables_are_those_of_the_layouts_that_are_tested() -> None:
    page = PAGE.read_text()
    assert page == filled(page), "run python -m tests.docs.test_data_page"


def test_names_of_layouts_differ() -> None:
    names = [layout.name for layouts in TABLES.values() for layout in layouts]
    assert len(set(names)) == len(names)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
