"""README and docs are true: commands, Python, paths and layers exist, tables are those measured."""

import ast
import importlib
import inspect
import re
import shlex
import textwrap
import tomllib
from pathlib import Path

import pytest

import vissl_lite
from vissl_lite.cli import COMMANDS, find_command, parse_words
from vissl_lite.options import options_of, required

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
GENERATED = ("pretexts.md", "commands")  # by docs/_ext
PAGES = [
    ROOT / "README.md",
    *sorted(p for p in DOCS.rglob("*.md") if not {*p.relative_to(DOCS).parts} & {*GENERATED}),
]
FIRST_PAGES = [ROOT / "README.md", DOCS / "quickstart.md"]


def blocks(text: str, *languages: str) -> list[str]:
    """The content of fenced blocks in one of these languages."""
    found = re.findall(r"^ *```([\w+-]*)\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(content) for language, content in found if language in languages]


def lines_in_blocks(text: str) -> list[str]:
    """Lines in blocks that call ``vissl-lite``, without its name; continued lines are joined."""
    joined = "\n".join(blocks(text, "", "bash", "sh", "console")).replace("\\\n", " ")
    return re.findall(r"^(?:srun )?vissl-lite (.*)$", joined, re.MULTILINE)


def lines_in_text(text: str) -> list[str]:
    """The same in inline code, where these are whole: no ``...`` and no ``[FOLDER]``."""
    inline = re.findall(r"`vissl-lite ([^`\n]+)`", text)
    return [line for line in inline if "..." not in line and "[" not in line]


def parsed(line: str) -> tuple[type, dict]:
    """The class of a command's options, and the values that a command line gives it."""
    name, *words = shlex.split(line, comments=True)
    assert name in COMMANDS, line
    options = options_of(find_command(name))
    if "--help" in words:
        return options, {}
    if "--config" in words:  # stands for a file of the reader's
        at = words.index("--config")
        if not (ROOT / words[at + 1]).is_file():
            del words[at : at + 2]
        else:
            words[at + 1] = str(ROOT / words[at + 1])
    return options, options.merged(parse_words(options, words))


@pytest.mark.parametrize("page", FIRST_PAGES, ids=lambda page: page.name)
def test_commands_of_the_first_pages_could_be_run_as_they_stand(page: Path) -> None:
    lines = lines_in_blocks(page.read_text())
    assert len(lines) >= 6
    for line in lines:
        options, values = parsed(line)
        assert set(required(options)) <= set(values), line
        options(**values)  # all values are right


def test_commands_on_all_pages_have_known_options() -> None:
    lines = [line for page in PAGES for line in lines_in_text(page.read_text())]
    lines += [line for page in PAGES for line in lines_in_blocks(page.read_text())]
    assert len(lines) >= 20
    for line in lines:
        if line.split()[0] != "COMMAND":
            parsed(line)


def test_python_on_the_pages_compiles_and_uses_what_there_is() -> None:
    calls = 0
    for page in PAGES:
        for block in blocks(page.read_text(), "python", "py"):
            tree = ast.parse(block, page.name)
            compile(tree, page.name, "exec")
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vissl_"):
                    module = importlib.import_module(node.module or "")
                    for name in node.names:
                        assert hasattr(module, name.name), f"{page.name}: {name.name}"
                if _is_ours(node):
                    assert node.attr in vissl_lite.__all__, f"{page.name}: {node.attr}"
                if isinstance(node, ast.Call) and _is_ours(node.func):
                    _check_call(node, page)
                    calls += 1
    assert calls >= 6


def _is_ours(node: ast.AST) -> bool:
    """Whether it is ``vissl_lite.NAME``."""
    return (
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "vissl_lite"
    )


def _check_call(node: ast.Call, page: Path) -> None:
    """The function takes these arguments, and they are all that it needs."""
    function = getattr(vissl_lite, node.func.attr)
    given = {word.arg: word.value for word in node.keywords if word.arg is not None}
    try:
        inspect.signature(function).bind(*node.args, **given)
    except TypeError as error:
        pytest.fail(f"{page.name}: {ast.unparse(node)}: {error}")


def test_commands_of_readme_are_those_that_there_are() -> None:
    files = (ROOT / "vissl_lite/commands").glob("*.py")
    assert {name.replace("-", "_") for name in COMMANDS} == {path.stem for path in files} - {
        "__init__",
        "excluded",
        "labelled",
        "leaks",
        "pretrain_data",
        "pretrain_options",
        "pretrain_setup",
        "select_images",
        "select_page",
        "self_training",
    }


def test_readme_is_a_first_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


def test_tables_are_those_of_the_stored_results() -> None:
    from benchmarks.tables import FILES, filled

    for file in FILES:
        assert filled(file.read_text()) == file.read_text(), file


def test_figures_of_readme_are_in_the_benchmarks() -> None:
    measured = (ROOT / "benchmarks/README.md").read_text()
    table = re.compile(r"<!-- in_short:begin -->.*?<!-- in_short:end -->", re.DOTALL)
    text = table.sub("", (ROOT / "README.md").read_text())  # the peers' table has the same ones
    figures = re.findall(r"(?<![\d.])0\.\d{3}(?!\d)", text)
    assert len(figures) >= 10
    for figure in figures:
        assert figure in measured, figure


def test_figures_of_the_advice_are_in_the_benchmarks() -> None:
    measured = (ROOT / "benchmarks/README.md").read_text()
    for page in ("choosing.md", "faq.md"):
        for figure in re.findall(r"(?<![\d.])0\.\d{3}(?!\d)", (DOCS / page).read_text()):
            assert figure in measured, f"{page}: {figure}"


def test_links_and_pictures_lead_somewhere() -> None:
    for page in [*PAGES, *ROOT.glob("*.md"), ROOT / "benchmarks/README.md"]:
        text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"https?:|#|mailto:", target):
                continue
            path = (page.parent / target.partition("#")[0]).resolve()
            generated = path.is_relative_to(DOCS) and path.relative_to(DOCS).parts[0] in GENERATED
            assert generated or path.exists(), f"{page.name}: {target}"
            if path.suffix == ".png":
                assert path.stat().st_size < 200_000, path


def test_tests_that_reliability_names_exist() -> None:
    found = re.findall(r"`([\w/]+\.py)`", (DOCS / "reliability.md").read_text())
    assert len(found) >= 20
    for name in found:
        assert (ROOT / "tests" / name).is_file(), name


def test_architecture_names_the_layers_and_all_files() -> None:
    text = (DOCS / "architecture.md").read_text()
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (layers,) = (one["layers"] for one in contracts["contracts"] if one["type"] == "layers")
    assert blocks(text, "text")[0].splitlines() == layers
    for path in (ROOT / "vissl_lite").iterdir():
        name = f"{path.name}/" if path.is_dir() else path.name
        if name not in ("__init__.py", "__main__.py", "__pycache__/", "py.typed"):
            assert f"`{name}`" in text, name
    for path in re.findall(r"`((?:transfer|data|pretext|commands)/[\w/]+\.py)`", text):
        assert (ROOT / "vissl_lite" / path).is_file(), path
