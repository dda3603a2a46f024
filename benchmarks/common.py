"""What the benchmarks share: provenance of figures, results on disk, and Markdown tables."""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
HAS_GPU = shutil.which("nvidia-smi") is not None  # results are then kept apart


def where_and_when() -> dict[str, str]:
    """Hardware (``cpu``, with GPUs where there are any), versions, commit and date."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        flags = info.read_text()
        bf16 = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags] or ["no bf16"]
        cpu = f"{len(lines)} cores of {lines[0].split(':')[1].strip()} ({', '.join(bf16)})"
    if HAS_GPU:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(query, capture_output=True, text=True, check=False).stdout
        cpu += f", {', '.join(names.strip().splitlines())}"
    asked = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    commit = asked.stdout.strip() or os.environ.get("COMMIT", "unknown")  # a copy without .git
    packages = ("torch", "timm", "lightning", "albumentations")
    return {
        "cpu": cpu,
        "commit": commit,
        "date": date.today().isoformat(),
        "versions": ", ".join(f"{name} {version(name)}" for name in packages),
    }


def keep(name: str, results: dict[str, Any]) -> None:
    """Write a benchmark's results beside the ones that are there, with where and when."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    text = json.dumps({**before, **results, "made": where_and_when()}, indent=2)
    file.write_text(text + "\n")


def results_of(run: Path) -> dict[str, Any]:
    """Results of a run of vissl_lite."""
    return json.loads((run / "results.json").read_text())


def use_core(core: int) -> None:
    """Compute on one core."""
    import torch

    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)


def vissl_lite(core: int, *arguments: object, code: Path = ROOT) -> None:
    """Run a command of vissl_lite, of the checkout ``code``, on one core."""
    subprocess.run(
        [sys.executable, "-m", "vissl_lite", *map(str, arguments), "--overwrite"],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(code)},
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        stdout=subprocess.DEVNULL,
    )


def last_json_line(command: list[str]) -> dict[str, Any]:
    """Run a command and read the last line that it prints."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def load(name: str) -> dict[str, Any]:
    """The stored results of a benchmark."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def provenance(results: dict[str, Any], command: str) -> str:
    """Command, commit, hardware, date and versions, which stand below every table."""
    m = results["made"]
    return f"`{command}`, commit {m['commit']}, {m['cpu']}, {m['date']}; {m['versions']}."


def plus_minus(value: dict[str, float]) -> str:
    return f"{value['mean']:.3f} ± {value['std']:.3f}"


def over_seeds(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    return mean_and_spread(values) + (" (one seed)" if len(values) == 1 else "")


def mean_and_spread(values: list[float]) -> str:
    """Mean and standard deviation; of one value itself, where a column counts the seeds."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"
