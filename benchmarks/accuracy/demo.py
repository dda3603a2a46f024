"""The demo's figures for the README: runs ``vissl-lite demo`` as it is.

    python -m benchmarks.accuracy.demo

Results: benchmarks/results/demo.json. The table stands in README.md and benchmarks/README.md; the
picture docs/images/demo.png is of an earlier version, whose figures these are.
"""

import json
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.common import RESULTS, keep, load, markdown_table, plus_minus, provenance
from vissl_lite.cli import main as vissl_lite


def demo_table() -> str:
    results = load("demo")
    rows = []
    for measure, arms in results["summary"].items():
        cells = [plus_minus(arms[arm]) for arm in ("untrained", "pre-trained", "gain")]
        rows.append([measure, *cells[:2], f"+{cells[2]}" if arms["gain"]["mean"] > 0 else cells[2]])
    header = [f"test accuracy, {results['shots']} labels per class", "untrained", "pre-trained"]
    seconds = f"{results['seconds']:.0f} seconds in all. "
    return (
        markdown_table([*header, "gain"], rows)
        + f"\n\n{seconds}"
        + provenance(results, "python -m benchmarks.accuracy.demo")
    )


TABLES = {"demo": demo_table}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "demo"
        if status := vissl_lite(["demo", "--out", str(run)]):
            raise SystemExit(status)
        results = json.loads((run / "results.json").read_text())
        RESULTS.mkdir(exist_ok=True)
    summary = {}
    for measure, arms in results["scores"].items():
        values = {arm: np.array(runs) for arm, runs in arms.items()}
        values["gain"] = values["pre-trained"] - values["untrained"]
        summary[measure] = {
            arm: {"mean": float(v.mean()), "std": float(v.std(ddof=1))} for arm, v in values.items()
        }
    keep("demo", {**results, "summary": summary})


if __name__ == "__main__":
    main()
