"""Images a second of SimCLR training at 224 pixels: from files, on one batch, and lightly-train's.

Three measurements take turns, each on the whole machine: our training from JPEG files (Lightning,
data workers, logging, as ``vissl-lite pretrain`` runs it); the bare training step on one batch made
once, which is what the machine can reach; and the peer. An image has two views.

    python benchmarks/throughput.py --data DATA/ucmerced --peer_python PEERS/bin/python

Results: benchmarks/results/throughput.json.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import keep, last_json_line

from vissl_lite.data.images import find_images
from vissl_lite.data.stream import ViewDataset, collate
from vissl_lite.encoder import build_encoder
from vissl_lite.optim import build_optimizer
from vissl_lite.pretext.simclr import SimCLR
from vissl_lite.run import MetricsFile
from vissl_lite.training.fit import fit
from vissl_lite.training.hardware import Hardware, choose_precision
from vissl_lite.training.pace import Pace
from vissl_lite.training.stream import StreamData

HERE = Path(__file__).parent


def from_files(data: Path, backbone: str, size: int, batch: int, steps: int) -> tuple[float, float]:
    """Images a second and the share of waiting for data, start-up left out."""
    task = SimCLR(build_encoder(backbone, size))
    paths = find_images([data])[: steps * batch]
    epochs = -(-steps * batch // len(paths))
    pace = Pace(1e-3, 0.1, 0, steps)
    dataset = ViewDataset(paths, task.views(), 0)
    hardware = Hardware(devices=1)
    stream = StreamData(dataset, batch, epochs, pace, hardware.workers())
    stream.batches_per_epoch = 25  # a row every five steps
    with tempfile.TemporaryDirectory() as folder:
        metrics = MetricsFile(Path(folder) / "metrics.csv")
        fit(task, stream, pace, hardware, metrics=metrics, checkpoints=Path(folder))
        speeds = metrics.series("images_per_second")[1][1:]
        waits = metrics.series("data_wait")[1][1:]
    return statistics.median(speeds), statistics.median(waits)


def step_alone(data: Path, backbone: str, size: int, batch: int, steps: int) -> float:
    """Images a second of the bare training step on one batch, in the same precision."""
    task = SimCLR(build_encoder(backbone, size)).to(memory_format=torch.channels_last)
    dataset = ViewDataset(find_images([data]), task.views(), 0)
    one = collate([dataset[(0, index)] for index in range(batch)])
    optimizer = build_optimizer(task, task.optimizer_settings)
    bf16 = choose_precision("auto", task) == "bf16-mixed"
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = task.loss([task.normalize(view) for view in one.views])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return batch / statistics.median(seconds[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--peer_python", help="interpreter of the environment with the peers")
    parser.add_argument("--peers", nargs="+", default=["lightly-train"])
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=2)
    o = parser.parse_args()
    rows: dict[str, list[float]] = {"files": [], "alone": [], "wait": []}
    rows |= {peer: [] for peer in o.peers if o.peer_python}
    for _ in range(o.rounds):
        shape = (o.backbone, o.image_size, o.batch_size)
        speed, wait = from_files(o.data, *shape, o.steps)
        rows["files"].append(speed)
        rows["wait"].append(wait)
        rows["alone"].append(step_alone(o.data, *shape, 10))
        for peer in o.peers if o.peer_python else ():
            script = [o.peer_python, str(HERE / "peers" / "throughput.py"), "--data", str(o.data)]
            sizes = ["--image_size", str(o.image_size), "--batch_size", str(o.batch_size)]
            done = last_json_line([*script, *sizes, "--peer", peer, "--steps", "12"])
            rows[peer].append(done["images_per_second"])
        print(rows, flush=True)
    medians = {name: statistics.median(values) for name, values in rows.items()}
    ratios = {
        "share_of_step_alone": medians["files"] / medians["alone"],
        **{f"times_{peer}": medians["files"] / medians[peer] for peer in rows if peer in o.peers},
    }
    print(medians, ratios)
    keep("throughput", {"rounds": rows, "medians": medians, "ratios": ratios})


if __name__ == "__main__":
    main()
