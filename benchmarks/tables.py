"""Fill the tables of README.md, docs/ and benchmarks/README.md from the stored results.

    python -m benchmarks.tables

A table stands between the markers ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``. Each benchmark
script has a ``TABLES`` that maps such names to functions, which read ``benchmarks/results`` and
return Markdown. Nothing is typed in by hand.
"""

import re
from collections.abc import Callable

from benchmarks.accuracy import (
    adaptation,
    bands,
    compare,
    demo,
    distillation,
    leaks,
    pretexts,
    pseudo_labels,
    recipes,
    selection,
    transfer,
)
from benchmarks.common import ROOT
from benchmarks.data import formats, listing, photographs, selection_growth, shards, views
from benchmarks.gpu import cifar10, throughput
from benchmarks.peers import against_peers, detection
from benchmarks.training import growth, levers, losses, operations, sharding, short_runs

FILES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted(ROOT.glob("docs/*.md"))]
SCRIPTS = (
    adaptation, bands, compare, demo, distillation, leaks, pretexts, pseudo_labels,
    recipes, selection, transfer, formats, listing, photographs, selection_growth, shards, views,
    cifar10, throughput, against_peers, detection, growth, levers, losses, operations,
    sharding, short_runs,
)  # fmt: skip
TABLES: dict[str, Callable[[], str]] = {
    name: table for script in SCRIPTS for name, table in script.TABLES.items()
}
MARKED = re.compile(r"<!-- (?P<name>\w+):begin -->\n.*?\n<!-- (?P=name):end -->", re.DOTALL)


def filled(text: str) -> str:
    """A page with its tables as the stored results give them.

    Raises:
        KeyError: no script has a table of that name.
    """

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        return f"<!-- {name}:begin -->\n{TABLES[name]()}\n<!-- {name}:end -->"

    return MARKED.sub(table, text)


if __name__ == "__main__":
    for file in FILES:
        file.write_text(filled(file.read_text()))
