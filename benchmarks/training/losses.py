"""What losses cost, and what several processes cost: the constants in docs/scaling.md.

    OMP_NUM_THREADS=1 python -m benchmarks.training.losses

The first part measures each loss alone, forward and backward, on one thread: the most that is
allocated beside its inputs, and the median time, at growing batches; and the same of NT-Xent as one
writes it down, with the whole matrix of similarities. The second part trains SimCLR in 1, 2 and 4
processes through gloo, counts the bytes on the loopback device, and sets them and the time of a
step beside what the formulas say. About two minutes. Results: benchmarks/results/losses.json.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import keep, load, markdown_table, provenance
from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.pretext import pretext_class
from vissl_lite.pretext.modules import losses
from vissl_lite.training.sync_batchnorm import SyncBatchNorm, Synchronized

BATCHES = (256, 1024, 4096)
CHUNK = losses.CHUNK_BYTES
MiB = 2**20


def whole_nt_xent(z1: Tensor, z2: Tensor) -> Tensor:
    """NT-Xent out of ordinary operations: autograd keeps matrices of all pairs."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    similarity = (z @ z.T / 0.1).fill_diagonal_(float("-inf"))
    return F.cross_entropy(similarity, torch.arange(len(z)).roll(len(z1)))


def swav(*scores: Tensor) -> Tensor:
    codes = [losses.sinkhorn(one, 0.05, 3) for one in scores[:2]]
    return losses.swapped_prediction(scores, codes, 0.1)


def dino(*scores: Tensor) -> Tensor:
    center = losses.Center(scores[0].shape[1], 0.9)
    targets = [center.targets(one.detach(), 0.04) for one in scores[:2]]
    return losses.swapped_prediction(scores, targets, 0.1)


def directions(size: int) -> Tensor:
    return losses.random_directions(size, 256, torch.zeros(1))


# A loss of some tensors, their number and width (the pretext's default), and what its cost goes
# with, for a batch of B images in this process and G over all: floats at a time, multiplications.
Elements = Callable[[int, int], float]
LOSSES: dict[str, tuple[Callable[..., Tensor], int, int, Elements, Elements]] = {
    "nt_xent, whole": (whole_nt_xent, 2, 128, lambda b, g: 4 * b * g,
                       lambda b, g: 12 * b * g * 128),
    "nt_xent": (lambda a, b: losses.nt_xent(a, b, 0.1), 2, 128,
                lambda b, g: min(4 * b * g, CHUNK / 4) + 4 * (b + g) * 128,
                lambda b, g: 12 * b * g * 128),
    "contrast": (lambda a, b: losses.contrast(a, b, 0.1), 2, 256,
                 lambda b, g: min(b * g, CHUNK / 4) + 2 * (b + g) * 256,
                 lambda b, g: 3 * b * g * 256),
    "info_nce": (lambda a, b: losses.info_nce(a, b.detach(), F.normalize(torch.ones(4096, 128)),
                                              0.1), 2, 128,
                 lambda b, g: b * 4096, lambda b, g: 2 * b * 4096 * 128),
    "swav": (swav, 8, 128, lambda b, g: 8 * b * 128, lambda b, g: 8 * b * 128),
    "dino": (dino, 8, 2048, lambda b, g: 8 * b * 2048, lambda b, g: 8 * b * 2048),
    "negative_cosine": (losses.negative_cosine, 2, 256, lambda b, g: 2 * b * 256,
                        lambda b, g: 2 * b * 256),
    "barlow_twins": (lambda a, b: losses.barlow_twins(a, b, 0.01), 2, 1024,
                     lambda b, g: 2 * g * 1024 + 1024**2, lambda b, g: 3 * g * 1024**2),
    "vicreg": (lambda a, b: losses.vicreg(a, b, 25, 25, 1), 2, 1024,
               lambda b, g: 2 * g * 1024 + 1024**2, lambda b, g: 6 * g * 1024**2),
    "sigreg": (lambda a: losses.sigreg(a, directions(64)), 1, 64,
               lambda b, g: g * 256 * 17, lambda b, g: g * 256 * 17),
    "visreg": (lambda a: losses.visreg(a, directions(128)), 1, 128,
               lambda b, g: g * 256, lambda b, g: g * 256),
}  # fmt: skip


def peak(call: Callable[[], Any]) -> int:
    """The most bytes that are allocated at a time while it runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def cost(name: str, batch: int) -> dict[str, float]:
    loss, count, width, floats, products = LOSSES[name]
    inputs = [torch.randn(batch, width).clamp(-1, 1).requires_grad_() for _ in range(count)]

    def step() -> None:
        loss(*inputs).backward()
        for one in inputs:
            one.grad = None

    step()
    bytes_ = peak(step)
    seconds = []
    while len(seconds) < 3 or (sum(seconds) < 0.3 and len(seconds) < 50):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds)
    return {
        "mib": bytes_ / MiB,
        "milliseconds": 1000 * median,
        "copies": bytes_ / 4 / floats(batch, batch),
        "giga_a_second": products(batch, batch) / median / 1e9,
    }


STEPS, SIDE, BATCH = 6, 64, 32


def sent() -> int:
    """Bytes that the loopback device has sent since the machine started."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    [loopback] = [line.split(":")[1].split() for line in lines if line.strip().startswith("lo:")]
    return int(loopback[8])


def one_process(batch: int) -> dict[str, float]:
    """Some steps of SimCLR; in the first of several processes, what they cost."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    task = pretext_class("simclr")(build_encoder("resnet18", SIDE)).train()
    task.to(memory_format=torch.channels_last)
    several = "WORLD_SIZE" in os.environ
    network: Any = task.loss
    found: dict[str, float] = {}
    if several:
        dist.init_process_group("gloo")
        SyncBatchNorm().apply(task)
        task.forward = task.loss  # what DistributedDataParallel calls
        warnings.filterwarnings("ignore", ".*broadcast_buffers. is deprecated.*")
        network = nn.parallel.DistributedDataParallel(task, broadcast_buffers=False)
        large, small = torch.zeros(2**22), torch.zeros(129)
        for name, tensor, times in (("large", large, 5), ("small", small, 50)):
            dist.all_reduce(tensor)
            started = time.perf_counter()
            for _ in range(times):
                dist.all_reduce(tensor)
            found[name] = (time.perf_counter() - started) / times
    optimizer = task.configure_optimizers()
    views = [torch.randn(batch, 3, SIDE, SIDE) for _ in range(2)]
    seconds, before = [], 0
    for step in range(STEPS):
        if step == 1 and several:
            dist.barrier()
            before = sent()
        started = time.perf_counter()
        loss = network(views)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    if several:
        dist.barrier()
        found["bytes"] = (sent() - before) / (STEPS - 1)
    found["seconds"] = statistics.median(seconds[1:])
    found["parameters"] = sum(p.numel() for p in task.parameters() if p.requires_grad)
    norms = [m for m in task.modules() if isinstance(m, Synchronized)]
    found["norms"], found["channels"] = len(norms), sum(2 * m.num_features + 1 for m in norms)
    return found


def started(processes: int, batch: int) -> dict[str, float]:
    """The processes' figures, ``batch`` images in each."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.training.losses", "--one", str(batch)]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    running = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **({**place, "RANK": str(rank)} if processes > 1 else {})},
        )
        for rank in range(processes)
    ]
    texts = [one.communicate()[0] for one in running]
    if any(one.returncode for one in running):
        raise SystemExit("a process has failed")
    return json.loads(texts[0].splitlines()[-1])


def predicted(processes: int, alone: float, own: dict[str, float]) -> dict[str, float]:
    """Bytes and seconds of a step, over all processes, by the formulas of docs/scaling.md.

    Args:
        processes: W.
        alone: seconds of one process with an equal share of the batch.
        own: what was measured: parameters, norms, and all-reduces of a large and a small tensor.
    """
    w, images = processes, BATCH // processes
    gradient = 2 * (w - 1) * 4 * own["parameters"]
    embeddings = 2 * (w * (w - 1) * images * 128 + 2 * (w - 1) * w * images * 128) * 4
    norms = (w * (w - 1) + 2 * (w - 1) * w) * own["channels"] * 4
    speed = 2 * (w - 1) * 4 * 2**22 / own["large"]  # bytes per second, over all processes
    waits = 2 * own["norms"] * own["small"]
    busy = alone * max(1.0, processes / len(os.sched_getaffinity(0)))
    total = gradient + embeddings + norms
    return {"bytes": total, "gradient": gradient, "embeddings": embeddings, "norms": norms,
            "seconds": busy + total / speed + waits}  # fmt: skip


# What the cost of a loss goes with, as benchmarks/losses.py computes it: floats, multiplications.
COSTS = {
    "nt_xent, whole": ("NT-Xent, written plainly", "4 B G", "12 B G D"),
    "nt_xent": ("NT-Xent: simclr, multi", "min(4 B G, 2^24) + 4 (B + G) D", "12 B G D"),
    "contrast": ("nnclr, moco_v3", "min(B G, 2^24) + 2 (B + G) D", "3 B G D"),
    "info_nce": ("moco, densecl", "B Q", "2 B Q D"),
    "swav": ("swav", "V B K", "V B K"),
    "dino": ("dino", "V B K", "V B K"),
    "negative_cosine": ("byol, simsiam", "2 B D", "2 B D"),
    "barlow_twins": ("barlow_twins", "2 G D + D^2", "3 G D^2"),
    "vicreg": ("vicreg", "2 G D + D^2", "6 G D^2"),
    "sigreg": ("lejepa, a view", "17 G S", "17 G S"),
    "visreg": ("visreg, a view", "G S", "G S"),
}


def losses_table() -> str:
    results = load("losses")
    rows = []
    for name, (of, floats, products) in COSTS.items():
        each = results["losses"][name]
        last = each[max(each, key=int)]
        rows.append([
            of, floats, f"{last['copies']:.1f}", products, f"{last['giga_a_second']:.3g}",
            *(f"{one['mib']:,.0f} MiB, {one['milliseconds']:,.0f} ms" for one in each.values()),
        ])  # fmt: skip
    header = ["loss of", "floats", "times", "multiplications", "10^9 per second",
              *(f"B = G = {batch}" for batch in each)]  # fmt: skip
    command = "OMP_NUM_THREADS=1 python -m benchmarks.training.losses"
    return markdown_table(header, rows) + "\n\n" + provenance(results, command)


# Multiplications of a step of ResNet-50 at 224 pixels: two views, a forward and a backward pass.
RESNET50 = 2 * 3 * 4.1e9


def at_scale_table() -> str:
    """What the constants of ``losses`` say of many processes."""
    measured = load("losses")["losses"]

    def mib(name: str, floats: float) -> str:
        last = measured[name][max(measured[name], key=int)]
        return f"{last['copies'] * floats * 4 / 2**20:,.0f}"

    rows = []
    for b, number in ((128, 1), (128, 8), (128, 64), (128, 512), (1024, 8), (1024, 64)):
        g = b * number
        pairs, vectors = 4 * b * g, 4 * (b + g) * 128
        share = 12 * b * g * 128 / (b * RESNET50)
        rows.append([
            f"{number} x {b}", f"{g:,}", mib("nt_xent, whole", pairs),
            mib("nt_xent", min(pairs, 2**24) + vectors), f"{100 * share:.2f} %",
            mib("barlow_twins", 2 * g * 1024 + 1024**2), mib("vicreg", 2 * g * 1024 + 1024**2),
            mib("sigreg", 17 * g * 256),
        ])  # fmt: skip
    header = ["processes x B", "G", "NT-Xent plainly, MiB", "NT-Xent, MiB", "its share of the step",
              "barlow_twins, MiB", "vicreg, MiB", "lejepa, a view, MiB"]  # fmt: skip
    return markdown_table(header, rows)


def processes_table() -> str:
    results = load("losses")
    rows = []
    for number, one in results["processes"].items():
        measured, predicted = one["measured"], one["predicted"]
        parts = [f"{predicted[part] / 1e6:.2f}" for part in ("gradient", "embeddings", "norms")]
        mb = [f"{each['bytes'] / 1e6:.1f}" for each in (predicted, measured)]
        seconds = [f"{each['seconds']:.2f}" for each in (predicted, measured)]
        rows.append([number, *parts, *mb, *seconds])
    header = ["processes", "gradient, MB", "embeddings, MB", "BatchNorm, MB", "together, predicted",
              "measured", "seconds per step, predicted", "measured"]  # fmt: skip
    command = "OMP_NUM_THREADS=1 python -m benchmarks.training.losses"
    return markdown_table(header, rows) + "\n\n" + provenance(results, command)


TABLES = {"losses": losses_table, "at_scale": at_scale_table, "processes": processes_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help="one small batch, to try it out")
    o = parser.parse_args()
    if o.one:
        print(json.dumps(one_process(o.one)))
        return
    torch.set_num_threads(1)
    batches = (64,) if o.tiny else BATCHES
    alone = {}
    for name in LOSSES:
        alone[name] = {str(batch): cost(name, batch) for batch in batches}
        print(name, {b: {k: round(v, 2) for k, v in c.items()} for b, c in alone[name].items()})
    several = {}
    for processes in (2,) if o.tiny else (2, 4):
        own = started(processes, BATCH // processes)
        expected = predicted(processes, started(1, BATCH // processes)["seconds"], own)
        several[str(processes)] = {"measured": own, "predicted": expected}
        print(processes, several[str(processes)])
    if not o.tiny:
        keep("losses", {"losses": alone, "processes": several})


if __name__ == "__main__":
    main()
