"""A network in parts (--strategy fsdp) against one in each process (ddp): memory and time.

    OMP_NUM_THREADS=1 python -m benchmarks.training.sharding --data DATA/ucmerced/train

`vissl-lite pretrain` with a ViT-B at 64 pixels, SimCLR, 16 images over all processes, which all run
on this machine through gloo: what one process takes at its peak (its proportional set size, in
which shared pages count once), and seconds per step. Memory is measured in a run of its own,
in which the C library gives back at once what is freed: else it keeps most of what whole blocks
have taken, which a GPU's allocator uses again.

What is measured is kept; results: benchmarks/results/sharding.json.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks.common import RESULTS, keep, load, markdown_table, provenance
from benchmarks.peers.against_peers import memory, tree

RUNS = ((1, "auto"), (2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp"))
FRUGAL = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # glibc's


def measured(
    data: Path, processes: int, strategy: str, steps: int, environment: dict[str, str]
) -> dict[str, float]:
    """Peak memory in bytes of the process that has least and most, and seconds per step."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "images").mkdir()
        for number, file in enumerate(sorted(data.resolve().rglob("*.jpg"))[: 16 * steps]):
            (folder / "images" / f"{number}.jpg").symlink_to(file)
        command = [str(Path(sys.executable).absolute().parent / "vissl-lite"), "pretrain"]
        command += ["--data", str(folder / "images"), "--out", str(folder / "run")]
        command += ["--backbone", "vit_base_patch16_224", "--image_size", "64"]
        command += ["--batch_size", "16", "--epochs", "1", "--logger", "none"]
        command += ["--devices", str(processes), "--strategy", strategy, "--num_workers", "0"]
        log = (folder / "log.txt").open("w")
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **environment}
        )
        peaks: dict[int, int] = {}
        while process.poll() is None:
            for one in tree(process.pid):
                peaks[one] = max(peaks.get(one, 0), memory(one, alone=True))
            time.sleep(0.2)
        if process.returncode:
            raise SystemExit((folder / "log.txt").read_text())
        with (folder / "run" / "metrics.csv").open(newline="") as file:
            rates = [
                float(row["images_per_second"])
                for row in csv.DictReader(file)
                if row["images_per_second"]
            ]
    trained = sorted(peaks.values())[-processes:]  # without helpers that only start the others
    return {"least": trained[0], "most": trained[-1], "seconds": 16 / median(rates[1:])}


def sharding_table() -> str:
    results = load("sharding")
    rows = []
    for name, run in results["runs"].items():
        if not {"least", "most", "seconds"} <= run.keys():
            continue
        processes, strategy = name.split()
        gib = [f"{run[which] / 2**30:.2f}" for which in ("least", "most")]
        rows.append([processes, strategy, *gib, f"{run['seconds']:.2f}"])
    header = ["processes", "strategy", "GiB of the least", "GiB of the most", "seconds per step"]
    command = "OMP_NUM_THREADS=1 python -m benchmarks.training.sharding --data DATA/ucmerced/train"
    return markdown_table(header, rows) + "\n\n" + provenance(results, command)


TABLES = {"sharding": sharding_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    file = RESULTS / "sharding.json"
    results = json.loads(file.read_text())["runs"] if file.exists() else {}
    for processes, strategy in RUNS:
        one = results.setdefault(f"{processes} {strategy}", {})
        for names, environment in ((("seconds",), {}), (("least", "most"), FRUGAL)):
            if all(name in one for name in names):
                continue
            found = measured(options.data, processes, strategy, options.steps, environment)
            one |= {name: found[name] for name in names}
            print(processes, strategy, one, flush=True)
            keep("sharding", {"runs": results})


if __name__ == "__main__":
    main()
