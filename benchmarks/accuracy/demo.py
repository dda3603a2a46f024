"""The demo's figures for the README: runs ``vissl-lite demo`` as it is.

    python -m benchmarks.accuracy.demo

Results: benchmarks/results/demo.json, and the picture of the comparison, docs/images/demo.png. The
table stands in README.md and benchmarks/README.md.
"""

import contextlib
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.common import ROOT, keep, load, markdown_table, plus_minus, provenance
from vissl_lite.cli import main as vissl_lite


def demo_table() -> str:
    results = load("demo")
    rows = []
    for metric, encoders in results["summary"].items():
        cells = [plus_minus(encoders[name]) for name in ("untrained", "pre-trained", "gain")]
        gain = f"+{cells[2]}" if encoders["gain"]["mean"] > 0 else cells[2]
        rows.append([metric, *cells[:2], gain])
    header = [f"test accuracy, {results['shots']} labels per class", "untrained", "pre-trained"]
    seconds = f"{results['seconds']:.0f} seconds in all. "
    return (
        markdown_table([*header, "gain"], rows)
        + f"\n\n{seconds}"
        + provenance(results, "python -m benchmarks.accuracy.demo")
    )


def verdict_table() -> str:
    """The README's example: the verdicts of the demo's comparison."""
    results = load("demo")
    names = {"runs/demo/pretrain": "Two minutes of SimCLR", "random:resnet10t_slim": "untrained"}
    sentences = []
    for sentence in results["sentences"]:
        for source, name in names.items():
            sentence = sentence.replace(source, name)
        sentences.append(f"> {sentence}")
    return "\n\n".join(["What `compare` says of the demo above:", *sentences])


TABLES = {"demo": demo_table, "verdict": verdict_table}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        run = Path("runs/demo")
        if status := vissl_lite(["demo", "--out", str(run)]):
            raise SystemExit(status)
        results = json.loads((run / "results.json").read_text())
        shutil.copy(run / "compare" / "compare.png", ROOT / "docs" / "images" / "demo.png")
    summary = {}
    for metric, encoders in results["scores"].items():
        values = {name: np.array(runs) for name, runs in encoders.items()}
        values["gain"] = values["pre-trained"] - values["untrained"]
        summary[metric] = {
            name: {"mean": float(v.mean()), "std": float(v.std(ddof=1))}
            for name, v in values.items()
        }
    keep("demo", {**results, "summary": summary})


if __name__ == "__main__":
    main()
