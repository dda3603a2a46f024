"""Writes docs/commands/*.md and docs/pretexts.md from the package, at the start of a build."""

import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

from vissl_lite.cli import COMMANDS, find_command
from vissl_lite.options import OptionRow, options_of
from vissl_lite.pretext import PRETEXTS
from vissl_lite.pretext.base import BACKBONE_KINDS


def command_page(name: str) -> str:
    """Description and options of a command, from its function and the dataclass of its options."""
    function = find_command(name)
    text = (inspect.getdoc(function) or "").partition("\n\nArgs:\n")[0]
    rows = [row for row in options_of(function).rows() if not row.name.startswith("pretext.")]
    lines = [f"# {name}", "", text, ""]
    positional = [f"`{one.name}`" for one in fields(options_of(function)) if not one.kw_only]
    if positional:
        lines += [f"May be given without their names, in this order: {', '.join(positional)}.", ""]
    if name == "pretrain":
        lines += ["The hyperparameters of each [pretext](../pretexts.md) are `--pretext.NAME`.", ""]
    return "\n".join([*lines, *option_table(rows, function)]) + "\n"


def option_table(rows: Iterable[OptionRow], function: Callable[..., Any]) -> list[str]:
    """A table of options; ``function`` has the defaults of flags, which help does not show."""
    parameters = inspect.signature(function).parameters
    lines = ["| option | default | |", "| --- | --- | --- |"]
    for row in rows:
        flag = parameters[row.name.removeprefix("pretext.")].default
        default = str(flag).lower() if isinstance(flag, bool) else row.default
        cell = "required" if row.required else f"`{default}`" if default is not None else ""
        values = row.values.removeprefix(row.name.upper()).strip()  # choices, or dots for several
        lines.append(f"| `{f'--{row.name} {values}'.strip()}` | {cell} | {escaped(row.help)} |")
    return lines


def escaped(text: str) -> str:
    """Text of a docstring in a cell of a table: options as code, and no other markup."""
    parts = re.split(r"(``.*?``|`.*?`|(?<!\w)--[a-z][\w.]*\w)", text)
    for number, part in enumerate(parts):
        if part.startswith("--"):
            parts[number] = f"`{part}`"
        elif not part.startswith("`"):
            parts[number] = re.sub(r"[\\<*_\[]", r"\\\g<0>", part)
    return "".join(parts).replace("|", "\\|")


def pretexts_page() -> str:
    """One table of all pretexts, and the hyperparameters of each."""
    options = options_of(find_command("pretrain"))
    lines = [
        "# Pretexts",
        "",
        "| pretext | family | backbones | views | paper | when to use it |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, pretext in PRETEXTS.items():
        info = pretext.info
        kind = BACKBONE_KINDS[info.backbones][0]
        cells = [f"[`{name}`](#{name.replace('_', '-')})", info.family, kind, info.views]
        lines.append(f"| {' | '.join([*cells, info.paper, info.use])} |")
    for name, pretext in PRETEXTS.items():
        own = [row for row in options.rows([{"pretext": name}]) if row.name.startswith("pretext.")]
        about = (inspect.getdoc(pretext) or "").partition("Args:\n")[0].strip()
        lines += [
            "",
            f"({name.replace('_', '-')})=",
            f"## {name}",
            "",
            about,
            "",
            *option_table(own, pretext),
        ]
    return "\n".join(lines) + "\n"


def write_pages(app: Sphinx) -> None:
    """Write all pages into the source folder."""
    folder = Path(app.srcdir)
    (folder / "commands").mkdir(exist_ok=True)
    for name in COMMANDS:
        (folder / "commands" / f"{name}.md").write_text(command_page(name))
    (folder / "pretexts.md").write_text(pretexts_page())


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("builder-inited", write_pages)
    return {"parallel_read_safe": True}
