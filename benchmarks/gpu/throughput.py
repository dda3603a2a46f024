"""Images per second of training at 224 pixels on a GPU: from files, and on a batch that is there.

The limit is the same model, step and precision on a batch that already lies on the device, in a
plain loop; from files is what ``vissl-lite pretrain`` does: data workers, Lightning, logging. An
image is one image with all its views.

    python -m benchmarks.gpu.throughput --data FOLDER
    python -m benchmarks.gpu.throughput --compile

Without ``--data`` it draws 640 x 480 JPEGs of a photograph's spectrum. Without a GPU it runs on the
CPU, to see that it works:

    python -m benchmarks.gpu.throughput --backbones resnet18 vit_tiny_patch16_224 --image_size 64 \
        --batch_size 8 --steps 3 --images 16 --out OUT/throughput.json

Every finished row is kept at once. Results: benchmarks/results/gpu_throughput.json.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from benchmarks.common import RESULTS, load, markdown_table, provenance, where_and_when
from vissl_lite.data.images import find_images
from vissl_lite.data.stream import ViewDataset, collate
from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.metrics_file import MetricsFile
from vissl_lite.pretext import PretextTask, pretext_class
from vissl_lite.training.compiling import compiled
from vissl_lite.training.cpu.operators import fast_cpu_operators
from vissl_lite.training.fit import TrainingFiles, fit
from vissl_lite.training.hardware import Hardware, choose_precision, tf32
from vissl_lite.training.schedule import Schedule
from vissl_lite.training.stream import StreamData

# Images a batch that fit into 80 GB with either backbone.
BATCH = {"simclr": 256, "dino": 128, "mae": 512}

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def draw_photos(folder: Path, count: int) -> None:
    """JPEGs of 640 x 480 pixels: noise at all scales, weaker the finer, as in photographs."""
    for number in range(count):
        random = np.random.default_rng(number)
        image = np.zeros((480, 640, 3), np.float32)
        for octave in range(8):
            noise = random.standard_normal((480 * 2**octave // 128 + 2, 5 * 2**octave + 2, 3))
            image += cv2.resize(noise.astype(np.float32), (640, 480)) * 40 / 1.6**octave
        cv2.imwrite(str(folder / f"{number:05}.jpg"), np.clip(image + 128, 0, 255).astype(np.uint8))


def make_task(pretext: str, backbone: str, size: int) -> PretextTask:
    torch.manual_seed(0)
    return pretext_class(pretext)(build_encoder(backbone, size))


def from_files(
    task: PretextTask, paths: list[str], batch: int, steps: int, hardware: Hardware
) -> dict[str, float]:
    """Images per second as in a run, its start left out, and the share of waiting for data."""
    schedule = Schedule(1e-4, 0.1, 0, steps)
    dataset = ViewDataset(paths, task.views(), 0)
    batch = min(batch, len(paths))
    epochs = -(-steps // (len(paths) // batch))
    stream = StreamData(dataset, batch, epochs, schedule, hardware.workers())
    stream.batches_per_epoch = 5 * max(1, steps // 10)  # ten rows of metrics
    with tempfile.TemporaryDirectory() as folder:
        metrics = MetricsFile(Path(folder) / "metrics.csv")
        fit(task, stream, schedule, hardware, files=TrainingFiles(metrics))
        speeds = metrics.series("images_per_second")[1]
        waits = metrics.series("data_wait")[1]
    settled = slice(min(2, len(speeds) - 1), None)
    return {
        "files": statistics.median(speeds[settled]),
        "data_wait": statistics.median(waits[settled]),
    }


def finished() -> float:
    """The time at which the device has done all that was asked of it."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def limit(
    task: PretextTask, paths: list[str], batch: int, steps: int, compile: bool
) -> dict[str, float]:
    """Images per second of the bare step on a batch on the device, and the memory that it takes."""
    task.to(DEVICE, memory_format=torch.channels_last).train()
    task.progress = 0.5
    dataset = ViewDataset(paths, task.views(), 0)
    items = [dataset[0, index % len(paths)] for index in range(min(batch, 32))]
    batch = min(batch, len(paths))
    some = collate([items[index % len(items)] for index in range(batch)])
    views = [view.to(DEVICE, memory_format=torch.channels_last) for view in some.views]
    optimizer = task.configure_optimizers()
    precision = choose_precision("auto", task)
    half = torch.float16 if precision == "16-mixed" else torch.bfloat16
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=precision == "16-mixed")
    torch.backends.cudnn.benchmark = True
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    first = warm = start = time.perf_counter()
    settled = min(steps - 1, 10)
    with tf32(), compiled(task) if compile else fast_cpu_operators():
        for step in range(steps):
            with torch.autocast(DEVICE.type, half, enabled=precision != "32-true"):
                loss = task.loss([task.normalize(view) for view in views])
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            task.on_before_optimizer_step(optimizer)
            scaler.step(optimizer)
            scaler.update()
            task.after_step()
            if step == 0:
                first = finished()
            if step + 1 == settled:
                warm = finished()
        seconds = (finished() - warm) / (steps - settled)
    memory = torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else float("nan")
    return {
        "limit": batch / seconds,
        "first_step_seconds": first - start,
        "gib": memory,
    }


def measure(pretext: str, backbone: str, paths: list[str], o: argparse.Namespace) -> dict[str, Any]:
    """Both, with the same batch."""
    batch = o.batch_size or BATCH[pretext]
    size = (paths, batch, o.steps)
    bare = limit(make_task(pretext, backbone, o.image_size), *size, o.compile)
    gc.collect()
    torch.cuda.empty_cache()
    hardware = Hardware(devices=1, num_workers=o.num_workers, compile=o.compile)
    run = from_files(make_task(pretext, backbone, o.image_size), *size, hardware)
    gc.collect()
    torch.cuda.empty_cache()
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    return {
        "pretext": pretext,
        "backbone": backbone,
        "image_size": o.image_size,
        "batch_size": min(batch, len(paths)),
        "compile": o.compile,
        "workers": hardware.workers(),
        "device": name,
        **bare,
        **run,
        "share": run["files"] / bare["limit"],
    }


def keep(file: Path, name: str, row: dict[str, Any]) -> None:
    """Write a row beside the others; NaN, as of the memory of a CPU, is none."""
    rows = json.loads(file.read_text()) if file.exists() else {}
    row = {key: None if value != value else value for key, value in row.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**rows, name: row, "made": where_and_when()}, indent=2)
    file.write_text(text + "\n")


def gpu_throughput_table() -> str:
    if not (RESULTS / "gpu_throughput.json").exists():
        return "Not measured yet; see [gpu/README.md](gpu/README.md)."
    results = load("gpu_throughput")
    rows = [
        [name, str(r["batch_size"]), f"{r['limit']:,.0f}", f"{r['files']:,.0f}",
         f"{r['share']:.2f}", f"{100 * r['data_wait']:.1f} %",
         f"{r['gib']:.0f}" if r["gib"] else "", f"{r['first_step_seconds']:.0f}"]
        for name, r in results.items()
        if name != "made"
    ]  # fmt: skip
    header = ["", "batch", "limit, images/s", "from files", "share", "waiting for data", "GiB",
              "first step, s"]  # fmt: skip
    devices = {r["device"] for name, r in results.items() if name != "made"}
    workers = {str(r["workers"]) for name, r in results.items() if name != "made"}
    where = f"{', '.join(sorted(devices))}, {', '.join(sorted(workers))} data workers."
    command = "python -m benchmarks.gpu.throughput"
    return markdown_table(header, rows) + f"\n\n{where} " + provenance(results, command)


TABLES = {"gpu_throughput": gpu_throughput_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a folder of photographs; default: draws some")
    parser.add_argument("--images", type=int, default=2048, help="how many to draw")
    parser.add_argument("--backbones", nargs="+", default=["resnet50", "vit_small_patch16_224"])
    parser.add_argument("--pretexts", nargs="+", default=list(BATCH))
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, help="default: " + str(BATCH))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--num_workers", type=int)
    parser.add_argument("--compile", action="store_true", help="through torch.compile")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu_throughput.json")
    o = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        if o.data is None:
            draw_photos(Path(made), o.images)
        paths = list(find_images([str(o.data or made)]))
        for backbone in o.backbones:
            for pretext in o.pretexts:
                kind = pretext_class(pretext).info.backbones
                if kind == "ViT" and not backbone.startswith("vit"):
                    continue
                row = measure(pretext, backbone, paths, o)
                name = f"{pretext} {backbone}{' compiled' if o.compile else ''}"
                print(name, json.dumps(row), flush=True)
                keep(o.out, name, row)


if __name__ == "__main__":
    main()
