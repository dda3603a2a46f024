"""The demo's figures for the README: runs ``vissl-lite demo`` as it is.

    python benchmarks/demo.py

Results: benchmarks/results/demo.json and demo.png.
"""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
from common import RESULTS, keep

from vissl_lite.cli import main as vissl_lite


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "demo"
        if status := vissl_lite(["demo", "--out", str(run)]):
            raise SystemExit(status)
        results = json.loads((run / "results.json").read_text())
        RESULTS.mkdir(exist_ok=True)
        shutil.copy(run / "demo.png", RESULTS / "demo.png")
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
