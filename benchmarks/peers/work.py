"""The work that is compared, as every tool is told it, and the command that has one tool do it.

    python work.py TOOL --data FOLDER --out SCRATCH --pretext simclr --backbone resnet18 ...

Times the run (clock.py) and writes SCRATCH/result.json. With --minutes it trains for that time
instead and writes the encoder, in timm's format, to SCRATCH/encoder. TOOL is the name of one of the
files beside this one, which say how the tool is run and where its documentation says so.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from clock import Clock, Span

TOOLS = {
    "ours": "run_ours",
    "alone": "run_alone",
    "lightly": "run_lightly",
    "lightly-train": "run_lightly_train",
    "stable-pretraining": "run_stable_pretraining",
}


@dataclass(frozen=True)
class Work:
    """What has to be done.

    Attributes:
        data: folder that holds a folder of images.
        out: folder for whatever the tool writes.
        pretext: simclr (two views) or dino (two large views and six small ones).
        backbone: a timm name; no weights are loaded.
        image_size: side of a view in pixels.
        batch_size: source images per step, each with all its views.
        steps: after how many a run ends; None for one that the clock ends.
        seconds: after how many it ends at the latest; None for no limit.
        seed: random seed.
    """

    data: Path
    out: Path
    pretext: str
    backbone: str
    image_size: int
    batch_size: int
    steps: int | None
    seconds: float | None
    seed: int

    @property
    def epochs(self) -> int:
        """As many as will never be done."""
        return 1000

    @property
    def workers(self) -> int:
        """For tools whose examples give a number (8, mostly) for a larger machine: one a core."""
        return len(os.sched_getaffinity(0))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pretext", choices=("simclr", "dino"), required=True)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--image_size", type=int, required=True)
    parser.add_argument("--batch_size", type=int, required=True)
    parser.add_argument("--warmup_steps", type=int, default=3)
    parser.add_argument("--warmup_seconds", type=float, default=6)
    parser.add_argument("--steps", type=int, default=4, help="timed steps at least")
    parser.add_argument("--seconds", type=float, default=40, help="timed at least")
    parser.add_argument("--minutes", type=float, help="train for this time, and keep the encoder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_steps", type=int, help="with --minutes: the schedule's length")
    o = parser.parse_args()
    o.out.mkdir(parents=True, exist_ok=True)
    seconds = None if o.minutes is None else 60 * o.minutes
    work = Work(
        o.data.resolve(), o.out.resolve(), o.pretext, o.backbone, o.image_size, o.batch_size,
        o.max_steps, seconds, o.seed,
    )  # fmt: skip
    # What a tool would fetch or report, there is no network for.
    os.environ |= {"NO_ALBUMENTATIONS_UPDATE": "1", "HF_HUB_OFFLINE": "1"}
    tool = importlib.import_module(TOOLS[o.tool])
    if o.minutes is None:
        span = Span(o.warmup_steps, o.warmup_seconds, o.steps, o.seconds)
        Clock(span, work.out / "result.json", o.batch_size, tool.about()).start()
        tool.train(work)
        raise SystemExit(f"{o.tool} ended its run before the clock did")
    start = time.perf_counter()  # start-up and whatever comes after training count
    images = tool.train(work)
    taken = time.perf_counter() - start
    result = {
        **tool.about(),
        "minutes": round(taken / 60, 3),
        "images": images,
        "images_per_second": round(images / taken, 1),
    }
    (work.out / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
