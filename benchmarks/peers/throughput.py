"""Images a second of a peer's SimCLR training of a resnet18, from JPEG files on disk.

An image is one source image with its two views. The peers run with their own defaults:

lightly        the loop of lightly_simclr.py (lightly's PyTorch example) with two workers. Above 32
               pixels the transform is SimCLRTransform's default, so the blur is on.
lightly-train  lightly_train.pretrain(method="simclr", model="timm/resnet18", accelerator="cpu"),
               all else its default: transform, loader, callbacks, logging, fp32 (its choice on a
               CPU), and num_workers "auto", which is one less than the cores. trainer_args'
               max_steps ends it.

Both are timed by one clock, PyTorch's global hook after each optimizer step, which leaves the
peers' own code, callbacks included, as it is.

How the steady state is found, for both: the run reads a folder of links to the source images, each
repeated as often as needed to make one epoch longer than the run. The rate is taken between the end
of step `warmup` and the end of step `warmup + steps`. So it leaves out the start-up, the first
batches that the workers prepare before training slows them, and the end of an epoch. The seconds to
the first step run from before the peer is imported to the end of its first optimizer step.
cores_used says what the training process, its workers aside, got of the machine while it was timed;
well below the number of cores, at 224 pixels, it means that other work slowed the run.

    python throughput.py --data DATA/ucmerced --peer lightly --steps 30
    python throughput.py --data DATA/bccd/JPEGImages --peer lightly-train --steps 30

Prints one JSON line on stdout; what the peer prints goes to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

SPARE_BATCHES = 16  # so that the loader never runs out of work while it is timed


class Clock:
    """When each step ended, by the wall clock and by this process's processor time."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def step_ended(self, *_: object) -> None:
        """Note that an optimizer step ended just now."""
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())


def link_images(source: Path, folder: Path, count: int) -> int:
    """Fill a folder with links to the images below source, repeated up to count."""
    images = sorted(p for p in source.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    if not images:
        raise SystemExit(f"no JPEG files below {source}")
    folder.mkdir()
    for i in range(count):
        image = images[i % len(images)].resolve()
        (folder / f"{i:06d}{image.suffix}").symlink_to(image)
    return len(images)


def run_lightly(args: argparse.Namespace, folder: Path, scratch: Path) -> dict[str, Any]:
    """Run lightly's example loop."""
    from lightly_simclr import SimCLR, make_loader, train

    workers = 2 if args.num_workers == "auto" else int(args.num_workers)
    loader = make_loader(folder, args.image_size, args.batch_size, workers)
    for _ in islice(train(SimCLR(), loader), args.warmup + args.steps):
        pass
    return {"num_workers": workers, "precision": "32-true"}


def run_lightly_train(args: argparse.Namespace, folder: Path, scratch: Path) -> dict[str, Any]:
    """Run lightly-train's pretraining."""
    # Keep it off the network and its caches out of the home folder.
    os.environ["LIGHTLY_TRAIN_EVENTS_DISABLED"] = "1"
    os.environ["LIGHTLY_TRAIN_CACHE_DIR"] = str(scratch / "cache")
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    import lightly_train

    optional: dict[str, Any] = {}
    if args.image_size != 224:  # 224 is its default
        optional["transform_args"] = {"image_size": (args.image_size, args.image_size)}
    lightly_train.pretrain(
        out=scratch / "out",
        data=folder,
        model="timm/resnet18",
        method="simclr",
        epochs=1,
        batch_size=args.batch_size,
        num_workers="auto" if args.num_workers == "auto" else int(args.num_workers),
        accelerator="cpu",
        trainer_args={"max_steps": args.warmup + args.steps},
        **optional,
    )
    log = (scratch / "out" / "train.log").read_text().rpartition("Resolved configuration")[2]
    workers = re.search(r'"num_workers": (\d+)', log)
    precision = re.search(r'"precision": "([^"]+)"', log)
    return {
        "num_workers": int(workers[1]) if workers else None,
        "precision": precision[1] if precision else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with JPEG files")
    parser.add_argument("--peer", choices=("lightly", "lightly-train"), required=True)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=30, help="timed steps")
    parser.add_argument("--warmup", type=int, default=8, help="steps before the timed ones")
    parser.add_argument("--num_workers", default="auto", help="a number; auto: the peer's default")
    args = parser.parse_args()
    if args.steps < 1 or args.warmup < 1:
        parser.error("--steps and --warmup must be at least 1")

    run = run_lightly if args.peer == "lightly" else run_lightly_train
    clock = Clock()
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        folder = Path(scratch, "images")
        batches = args.warmup + args.steps + SPARE_BATCHES
        sources = link_images(args.data, folder, batches * args.batch_size)
        start = time.perf_counter()
        from torch.optim import optimizer  # importing torch counts as start-up

        optimizer.register_optimizer_step_post_hook(clock.step_ended)
        settings = run(args, folder, Path(scratch))

    if len(clock.wall) != args.warmup + args.steps:
        raise SystemExit(f"{len(clock.wall)} steps ran and not {args.warmup + args.steps}")
    timed = clock.wall[args.warmup - 1 :]
    seconds = timed[-1] - timed[0]
    cpu_seconds = clock.cpu[-1] - clock.cpu[args.warmup - 1]
    step_seconds = [after - before for before, after in pairwise(timed)]
    result = {
        "peer": args.peer,
        "version": version(args.peer),
        "images_per_second": round(args.steps * args.batch_size / seconds, 3),
        "seconds_to_first_step": round(clock.wall[0] - start, 3),
        "cpu_seconds_to_first_step": round(clock.cpu[0], 3),
        "steps": args.steps,
        "warmup_steps": args.warmup,
        "seconds": round(seconds, 3),
        "median_step_seconds": round(statistics.median(step_seconds), 4),
        "cores_used": round(cpu_seconds / seconds, 3),
        "batch_size": args.batch_size,
        "image_size": args.image_size,
        **settings,
        "data": str(args.data),
        "source_images": sources,
        "torch": version("torch"),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
