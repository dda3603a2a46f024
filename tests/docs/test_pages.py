"""Commands in README and docs are known, and tables are those of the stored results."""

import importlib
import inspect
import re
from pathlib import Path

from vissl_lite.cli import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(text: str) -> list[str]:
    """Lines that call ``vissl-lite``, continued lines joined; in blocks and in inline code."""
    joined = text.replace("\\\n", " ")
    return re.findall(r"vissl-lite ((?:[a-z]+)(?: [^`\n]*)?--[^`\n]*)", joined)


def test_commands_on_the_pages_have_known_options() -> None:
    found = 0
    for page in PAGES:
        for line in commands(page.read_text()):
            name = line.split()[0]
            assert name in COMMANDS, f"{page.name}: {line}"
            module = importlib.import_module(f"vissl_lite.commands.{name}")
            function = getattr(module, "list_" if name == "list" else name)
            known = {*inspect.signature(function).parameters, "config", "help", "pretext"}
            given = {option.split(".")[0] for option in re.findall(r"--([\w.]+)", line)}
            assert given <= known, f"{page.name}: {line}"
            found += 1
    assert found >= 10


def test_readme_is_a_first_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


def test_tables_are_those_of_the_stored_results() -> None:
    from benchmarks.tables import FILES, filled

    for file in FILES:
        assert filled(file.read_text()) == file.read_text(), file
