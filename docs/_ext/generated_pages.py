"""Writes docs/commands/*.md and docs/pretexts.md from the package, at the start of a build."""

import importlib
import inspect
from pathlib import Path

from sphinx.application import Sphinx

from vissl_lite.cli import COMMANDS
from vissl_lite.pretext import PRETEXTS
from vissl_lite.pretext.base import KINDS


def command_page(name: str, summary: str) -> str:
    """Description and options of a command, from the signature and docstring of its function."""
    module = importlib.import_module(f"vissl_lite.commands.{name}")
    function = getattr(module, "list_" if name == "list" else name)
    text, _, rest = (inspect.getdoc(function) or "").partition("\n\nArgs:\n")
    helps = arguments(rest)
    lines = [
        f"# {name}",
        "",
        f"*{summary}*",
        "",
        text,
        "",
        "| option | default | |",
        "| --- | --- | --- |",
    ]
    for parameter in inspect.signature(function).parameters.values():
        required = parameter.default is inspect.Parameter.empty
        default = "required" if required else f"`{parameter.default}`"
        help_ = helps.get(parameter.name, "").replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| `--{parameter.name}` | {default} | {help_} |")
    return "\n".join(lines) + "\n"


def arguments(section: str) -> dict[str, str]:
    """The entries of a docstring's section on arguments, each as one line."""
    found: dict[str, str] = {}
    name = ""
    for line in section.split("\n\n")[0].splitlines():
        indent = len(line) - len(line.lstrip())
        if indent == 4 and ":" in line:
            name, _, found_text = line.strip().partition(": ")
            found[name] = found_text
        elif name:
            found[name] += f" {line.strip()}"
    return found


def pretexts_page() -> str:
    """One table of all pretexts, and the hyperparameters of each."""
    lines = [
        "# Pretexts",
        "",
        "| pretext | family | backbones | views | paper | when to use it |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, pretext in PRETEXTS.items():
        info = pretext.info
        kind = KINDS[info.backbones][0]
        cells = [f"`{name}`", info.family, kind, info.views, info.paper, info.use]
        lines.append(f"| {' | '.join(cells)} |")
    for name, pretext in PRETEXTS.items():
        lines += ["", f"## {name}", "", "| hyperparameter | default |", "| --- | --- |"]
        for parameter in inspect.signature(pretext).parameters.values():
            if parameter.name != "encoder":
                lines.append(f"| `--pretext.{parameter.name}` | `{parameter.default}` |")
    return "\n".join(lines) + "\n"


def write_pages(app: Sphinx) -> None:
    """Write all pages into the source folder."""
    folder = Path(app.srcdir)
    (folder / "commands").mkdir(exist_ok=True)
    for name, summary in COMMANDS.items():
        (folder / "commands" / f"{name}.md").write_text(command_page(name, summary))
    (folder / "pretexts.md").write_text(pretexts_page())


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("builder-inited", write_pages)
    return {"parallel_read_safe": True}
