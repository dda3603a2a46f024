"""How time and memory grow: with image side, batch, views, backbone, images and processes.

    python -m benchmarks.training.growth              # what is missing, then the plot
    python -m benchmarks.training.growth --only side  # one of them

About 12 minutes; ``--tiny`` measures two cheap points of each.

Each point is a few training steps in a process of its own, on one thread (a process), in the
precision of ``--precision auto``. Time is the median step; memory is the process's largest resident
size, less what it was once torch and the package were loaded and before the model was built; of
several processes it is that of one.
Finished points are kept, so that a run that is cut off goes on. Results:
benchmarks/results/growth.json and growth.png.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS, keep, last_json_line, load, markdown_table, provenance

# What is varied, over which values, and what stays the same.
BASE = {"pretext": "simclr", "backbone": "resnet18", "side": 96, "batch": 32, "views": 2}
SWEEPS: dict[str, tuple[str, list[Any], dict[str, Any]]] = {
    "side": ("image side, pixels", [32, 64, 96, 128, 192, 256], {"batch": 16}),
    "side_vit": (
        "image side, pixels",
        [64, 96, 128, 192, 256, 384],
        {"backbone": "vit_tiny_patch16_224", "batch": 8},
    ),
    "batch": ("images per batch", [8, 16, 32, 64, 128], {"side": 64}),
    "views": ("views per image", [2, 4, 6, 8, 10], {"pretext": "lejepa", "side": 64, "batch": 16}),
    "backbone": (
        "GMACs an image at 96 pixels",
        ["resnet10t", "resnet18", "resnet50", "vit_tiny_patch16_224", "vit_small_patch16_224"],
        {"batch": 8},
    ),
    "images": ("images", [10**4, 10**5, 10**6], {}),
    "processes": ("processes", [1, 2, 4], {"side": 64, "batch": 64}),
}
NAMES = {
    "side": "image side, resnet18",
    "side_vit": "image side, vit_tiny",
    "batch": "batch",
    "views": "views (lejepa)",
    "backbone": "backbone",
    "images": "images (listing)",
    "processes": "processes (equal global batch)",
}
STEPS, TINY = 5, {"side": 32, "batch": 4}


def resident(name: str) -> float:
    """What this process holds in MB: now (VmRSS), or at most since it began (VmHWM)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) / 1024


def measure(point: dict[str, Any]) -> dict[str, float]:
    """Median seconds of a step, memory in MB, and for ``backbone`` the cost of a forward pass."""
    import torch
    from torch import distributed
    from torch.utils.flop_counter import FlopCounterMode

    from vissl_lite.encoders.encoder import build_encoder
    from vissl_lite.pretext import pretext_class
    from vissl_lite.training.cpu.operators import fast_cpu_operators
    from vissl_lite.training.hardware import choose_precision

    torch.set_num_threads(1)
    several = "WORLD_SIZE" in os.environ
    before = resident("VmRSS")
    torch.manual_seed(0)
    side, batch = point["side"], point["batch"]
    task = pretext_class(point["pretext"])(build_encoder(point["backbone"], side))
    task.to(memory_format=torch.channels_last).train()
    task.progress = 0.5
    network: Any = task.loss
    if several:
        distributed.init_process_group("gloo")
        batch //= distributed.get_world_size()
        task.forward = task.loss  # what DistributedDataParallel calls
        warnings.filterwarnings("ignore", ".*broadcast_buffers. is deprecated.*")
        network = torch.nn.parallel.DistributedDataParallel(task, broadcast_buffers=False)
    bf16 = choose_precision("auto", task) == "bf16-mixed"
    optimizer = task.configure_optimizers()
    views = [
        torch.randint(256, (batch, 3, side, side), dtype=torch.uint8).contiguous(
            memory_format=torch.channels_last
        )
        for _ in range(point["views"])
    ]
    seconds = []
    for _ in range(point["steps"]):
        start = time.perf_counter()
        with fast_cpu_operators(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = network([task.normalize(view) for view in views])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        task.after_step()
        seconds.append(time.perf_counter() - start)
    found = {"seconds": statistics.median(seconds[1:]), "mb": resident("VmHWM") - before}
    if several:
        distributed.barrier()
        distributed.destroy_process_group()
    else:
        flops = FlopCounterMode(display=False)
        with flops, torch.no_grad():
            task.eval().encoder(torch.zeros(1, 3, side, side))
        found["gmacs"] = flops.get_total_flops() / 2e9
    return found


def run_point(point: dict[str, Any]) -> dict[str, float]:
    """Measure a point in a process of its own, or in several."""
    command = [sys.executable, "-m", "benchmarks.training.growth", "--measure", json.dumps(point)]
    os.environ["OMP_NUM_THREADS"] = "1"
    if "processes" not in point:
        return last_json_line(command)
    started = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            text=True,
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(point["processes"]),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(29500 + os.getpid() % 2000),
            },
        )
        for rank in range(point["processes"])
    ]
    output = started[0].communicate()[0]
    if any(process.wait() for process in started):
        raise SystemExit("a process has failed")
    return json.loads(output.strip().splitlines()[-1])


def of_images() -> list[dict[str, float]]:
    """From the benchmark of listings: seconds to list files, and what their paths take."""
    rows = json.loads((RESULTS / "listing.json").read_text())["now"]
    return [
        {"x": row["images"], "seconds": row["listing_seconds"], "mb": row["main_rss_mb_of_paths"]}
        for row in rows
    ]


def points_of(sweep: str, tiny: bool) -> list[dict[str, Any]]:
    """All points of a sweep; each says what it needs."""
    key = "side" if sweep == "side_vit" else sweep
    _, values, fixed = SWEEPS[sweep]
    points = []
    for value in values[:2] if tiny else values:
        own = {**BASE, "steps": STEPS, **fixed}
        if tiny:
            own |= {"steps": 2, **{k: v for k, v in TINY.items() if k != key}}
            own["side"] = max(own["side"], 64 if "vit" in str((own["backbone"], value)) else 32)
        points.append({**own, key: value})
    return points


def exponent(rows: list[dict[str, Any]], name: str) -> dict[str, float]:
    """Least squares of log(cost) on log(x), and the range that it holds for.

    What a step costs in any case bends the line where x is small: small values are left out until
    no point lies further than a tenth from it, or three are left.
    """
    rows = sorted(rows, key=lambda row: row["x"])
    while True:
        x, y = (np.log([row[key] for row in rows]) for key in ("x", name))
        slope, at = np.polyfit(x, y, 1)
        off = float(np.exp(np.abs(y - slope * x - at).max()))
        if off <= 1.1 or len(rows) <= 3:
            break
        rows = rows[1:]
    return {
        "exponent": float(slope),
        "at_one": float(np.exp(at)),
        "off_by": off,
        "from": float(rows[0]["x"]),
        "to": float(rows[-1]["x"]),
    }


def plot(results: dict[str, Any], file: Path) -> None:
    """A panel each: measured points and the fitted line, time and memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [sweep for sweep in SWEEPS if sweep in results]
    figure, axes = plt.subplots(2, len(shown), figsize=(3.1 * len(shown), 5.4), squeeze=False)
    for column, sweep in enumerate(shown):
        rows = results[sweep]["rows"]
        for axis, name, unit in zip(axes[:, column], ("seconds", "mb"), ("s", "MB"), strict=True):
            fitted = results[sweep][name]
            ends = np.array([fitted["from"], fitted["to"]])
            slope, color = fitted["exponent"], "tab:blue" if name == "seconds" else "tab:orange"
            axis.loglog([row["x"] for row in rows], [row[name] for row in rows], "o", color=color)
            line = fitted["at_one"] * ends**slope
            axis.loglog(ends, line, "-", color="gray", label=f"x^{slope:.2f}")
            axis.legend(frameon=False, fontsize=8)
            axis.set_ylabel(f"{'time' if name == 'seconds' else 'memory'} [{unit}]", fontsize=8)
            axis.tick_params(labelsize=7, which="both")
        axes[0, column].set_title(NAMES[sweep], fontsize=9)
        axes[1, column].set_xlabel(SWEEPS[sweep][0], fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=90)
    plt.close(figure)


def finish(sweep: str, rows: list[dict[str, float]]) -> dict[str, Any]:
    """A sweep's rows with what was fitted to them."""
    return {"rows": rows, **{name: exponent(rows, name) for name in ("seconds", "mb")}}


GROWTH = {
    "side": "image side, `resnet18`",
    "side_vit": "image side, `vit_tiny_patch16_224`",
    "batch": "images per batch",
    "views": "views per image (lejepa)",
    "backbone": "GMACs of the backbone",
    "images": "images in the folder (listing them)",
    "processes": "processes on two cores, equal global batch",
}


def growth_table() -> str:
    if not (RESULTS / "growth.json").exists():
        return "Not measured yet."
    results = load("growth")
    rows = []
    for sweep, name in GROWTH.items():
        if sweep not in results:
            continue
        row = [name]
        for cost in ("seconds", "mb"):
            f = results[sweep][cost]
            row += [
                f"{f['exponent']:.2f}",
                f"{f['from']:,.3g} to {f['to']:,.3g}"
                + ("" if f["off_by"] <= 1.1 else f" (within {f['off_by']:.1f})"),
            ]
        rows.append(row)
    header = ["with", "time: exponent", "holds for", "memory: exponent", "holds for"]
    picture = "![time and memory, measured and fitted](results/growth.png)"
    command = "python -m benchmarks.training.growth"
    return f"{picture}\n\n" + markdown_table(header, rows) + "\n\n" + provenance(results, command)


TABLES = {"growth": growth_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--tiny", action="store_true", help="to see that it works; in /tmp")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.measure:
        print(json.dumps(measure(o.measure)))
        return
    folder = Path(tempfile.gettempdir()) if o.tiny else RESULTS
    points_file = folder / "growth_points.json"
    done = json.loads(points_file.read_text()) if points_file.exists() else {}
    results = {}
    for sweep in o.only:
        rows = []
        for point in points_of(sweep, o.tiny) if sweep != "images" else []:
            key = f"{sweep} {json.dumps(point, sort_keys=True)}"
            if key not in done:
                done[key] = run_point(point)
                points_file.write_text(json.dumps(done, indent=1) + "\n")
                print(sweep, point, done[key], flush=True)
            found = done[key]
            name = "side" if sweep == "side_vit" else sweep
            x = found["gmacs"] if sweep == "backbone" else point[name]
            label = {"label": point["backbone"]} if sweep == "backbone" else {}
            rows.append({"x": x, **label, "seconds": found["seconds"], "mb": found["mb"]})
        results[sweep] = finish(sweep, of_images() if sweep == "images" else rows)
        if not o.tiny:
            keep("growth", {sweep: results[sweep]})
    if not o.tiny:
        results = json.loads((RESULTS / "growth.json").read_text())
    plot(results, folder / "growth.png")
    print({sweep: results[sweep]["seconds"] for sweep in SWEEPS if sweep in results})


if __name__ == "__main__":
    main()
