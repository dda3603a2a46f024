"""The same work with every tool: vissl_lite, lightly, lightly-train, stable-pretraining.

An environment for the peers, once:

    python3 -m venv PEERS && PEERS/bin/pip install -r benchmarks/peers/requirements.txt

Speed: the tools take turns, case by case and round by round, each alone on the whole machine, with
the same images, backbone, views and batch, each as its own documentation runs it (peers/run_*.py
say how, and where that stands). Beside them our training step alone on a batch made once, which is
the limit. Photographs at 224 pixels are UC Merced's and BCCD's JPEG files (links to them, repeated:
an epoch then outlasts the run), at 32 pixels the files of CIFAR-10. Every run is timed by the same
clock (peers/clock.py) for --seconds after its warm-up, and then ended. Measured are

    images per second, an image being a source image with all its views;
    peak memory while training, of all processes of the tool: the sum of their proportional set
        sizes (/proc/PID/smaps_rollup), which counts shared pages once, every half second;
    seconds from the start of the process to the end of the first optimizer step;
    seconds that each command line needs for --help.

    python -m benchmarks.peers.against_peers speed --data DATA --peer_python PEERS/bin/python

takes about 40 minutes a round on two cores. What is done is kept and not done again: a run that
was cut off goes on, --rounds 3 adds to what there is, and --anew measures the given cases and tools
again from nothing.

Accuracy: each tool trains SimCLR for the same minutes, with its own recipe, on CIFAR-10 (32 pixels)
or on UC Merced's training images (224 pixels); ours for part of the minutes, too. On UC Merced
ours is the default command line. The encoders are evaluated by ``vissl-lite probe`` (kNN, for
CIFAR-10 with k = 200 and T = 0.1, and linear, fitted to all training labels, on the test images).
Start-up and what comes after the training count. With ``taskset`` seeds run side by side.

    python -m benchmarks.peers.against_peers accuracy --data DATA --out RUNS --peer_python PYTHON \
        --cases ucmerced-resnet18-224 --minutes 10 --ours_minutes 2.5 10 --seeds 0 1

Results: benchmarks/results/peers.json and peers_accuracy.json (peers_accuracy_gpu.json on a GPU).
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import (
    HAS_GPU,
    RESULTS,
    keep,
    load,
    markdown_table,
    over_seeds,
    provenance,
    where_and_when,
)

HERE = Path(__file__).parent
TOOLS = ("ours", "alone", "lightly", "lightly-train", "stable-pretraining")
PEERS = TOOLS[2:]
HELP = {
    "ours": "vissl-lite",
    "lightly": "lightly-ssl-train",
    "lightly-train": "lightly-train",
    "stable-pretraining": "spt",
}


@dataclass(frozen=True)
class Case:
    """One kind of work; see ``Work`` in peers/work.py."""

    pretext: str
    backbone: str
    image_size: int
    batch_size: int
    images: int

    @property
    def arguments(self) -> list[str]:
        """As peers/work.py takes it."""
        names = ("pretext", "backbone", "image_size", "batch_size")
        return [text for name in names for text in (f"--{name}", str(getattr(self, name)))]


CASES = {
    "resnet18-simclr-224": Case("simclr", "resnet18", 224, 32, 4096),
    "resnet50-simclr-224": Case("simclr", "resnet50", 224, 16, 4096),
    "vit_small-simclr-224": Case("simclr", "vit_small_patch16_224", 224, 16, 4096),
    "resnet18-dino-224": Case("dino", "resnet18", 224, 16, 4096),
    "resnet50-dino-224": Case("dino", "resnet50", 224, 8, 4096),
    "vit_small-dino-224": Case("dino", "vit_small_patch16_224", 224, 8, 4096),
    "resnet18-simclr-32": Case("simclr", "resnet18", 32, 256, 65536),
}

# What is trained for some minutes: the data set, backbone and size
TRAINED = {
    "cifar10-resnet18-32": CASES["resnet18-simclr-32"],
    "ucmerced-resnet18-224": Case("simclr", "resnet18", 224, 64, 840),
    "ucmerced-vit_small-224": Case("simclr", "vit_small_patch16_224", 224, 32, 840),
}
SPEED = "images_per_second"

ACCURACY = "peers_accuracy_gpu" if HAS_GPU else "peers_accuracy"


def sources(data: Path, case: Case) -> list[Path]:
    """The files of a case."""
    large = [data / "ucmerced", data / "bccd" / "JPEGImages"]
    folders = large if case.image_size > 32 else [data / "cifar10" / "train"]
    found = [sorted(folder.rglob("*.jp*g")) for folder in folders]
    for folder, files in zip(folders, found, strict=True):
        if not files:
            raise SystemExit(f"no JPEG files below {folder}")
    return [file.resolve() for files in found for file in files]


def link(files: list[Path], folder: Path, count: int) -> None:
    """Links to files, repeated up to a count, in a folder in a folder (as classes are)."""
    (folder / "images").mkdir(parents=True)
    for number in range(count):
        file = files[number % len(files)]
        (folder / "images" / f"{number:06d}{file.suffix}").symlink_to(file)


def tree(pid: int) -> list[int]:
    """A process and all that it started."""
    found = [pid]
    for one in found:
        for task in Path(f"/proc/{one}/task").glob("*/children"):
            try:
                found += map(int, task.read_text().split())
            except OSError:  # it has ended since
                continue
    return found


def memory(pid: int, alone: bool = False) -> int:
    """Proportional set size of a process, and all that it started if not alone, in bytes."""
    total = 0
    for one in [pid] if alone else tree(pid):
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def run(command: list[str], log: Path, limit: float | None = None) -> tuple[float, int]:
    """Run a command in a process group of its own.

    Returns:
        When it started (seconds since 1970) and the peak memory in bytes.
    """
    peak = 0
    with log.open("w") as output:
        started = time.time()
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, cwd=log.parent
        )
        try:
            while process.poll() is None:
                peak = max(peak, memory(process.pid))
                if limit is not None and time.time() - started > limit:
                    break
                time.sleep(0.5)
        finally:
            # the data workers of a run that the clock ended, or all of one that was interrupted
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
    if status:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
        raise SystemExit(f"{tail}\n\n{' '.join(command)}\nended with {status}")
    return started, peak


def work(tool: str, peer_python: str, *arguments: object) -> list[str]:
    """The command that has a tool do some work."""
    python = peer_python if tool in PEERS else sys.executable
    return [python, str(HERE / "work.py"), tool, *map(str, arguments)]


def timed(tool: str, case: Case, images: Path, o: argparse.Namespace) -> dict[str, Any]:
    """One run of one tool."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        length = ["--seconds", o.seconds, "--steps", o.steps]
        length += ["--warmup_steps", o.warmup_steps, "--warmup_seconds", o.warmup_seconds]
        where = ["--data", images, "--out", out]
        command = work(tool, o.peer_python, *case.arguments, *where, *length)
        started, peak = run(command, out / "log.txt", o.limit)
        result = json.loads((out / "result.json").read_text())
    result["seconds_to_first_step"] = round(result.pop("first_step_at") - started, 2)
    result["peak_memory"] = peak
    return {**result, "commit": where_and_when()["commit"]}


def help_seconds(tool: str, peer_python: str) -> float:
    """Seconds that a tool's command line takes to tell what it can."""
    python = peer_python if tool in PEERS else sys.executable
    start = time.perf_counter()
    program = Path(python).absolute().parent / HELP[tool]
    subprocess.run([program, "--help"], capture_output=True, check=True)
    return round(time.perf_counter() - start, 3)


def kept(name: str = "peers") -> dict[str, Any]:
    """What has been measured."""
    file = RESULTS / f"{name}.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    empty: dict[str, Any] = {"accuracy": {}} if name == ACCURACY else {"speed": {}, "help": {}}
    return {**empty, **found}


def speed(o: argparse.Namespace) -> None:
    """Round by round, case by case, tool by tool; what is there already is left out."""
    if o.anew:
        results = kept()
        for case in o.cases:
            measured = results["help"] if case == "help" else results["speed"].get(case, {})
            for tool in o.tools:
                measured.pop(tool, None)
        keep("peers", results)
    for number in range(o.rounds):
        if "help" in o.cases:
            for _ in range(3):
                for tool in (tool for tool in o.tools if tool in HELP):
                    results = kept()
                    seconds = results["help"].setdefault(tool, [])
                    if len(seconds) < 3 * (number + 1):
                        seconds.append(help_seconds(tool, o.peer_python))
                        keep("peers", results)
        for name in (name for name in o.cases if name != "help"):
            case = CASES[name]
            with tempfile.TemporaryDirectory() as folder:
                link(sources(o.data, case), Path(folder), case.images)
                for tool in o.tools:
                    results = kept()
                    runs = results["speed"].setdefault(name, {}).setdefault(tool, [])
                    if len(runs) > number:
                        continue
                    runs.append(timed(tool, case, Path(folder), o))
                    keep("peers", results)
                    one = runs[-1]
                    print(
                        f"{name:22} {tool:20} {one['images_per_second']:8.1f} images/s "
                        f"{one['peak_memory'] / 2**30:6.2f} GiB, first step after "
                        f"{one['seconds_to_first_step']:5.1f} s, {one['steps']} steps of "
                        f"{one['median_step_seconds']:.2f} s",
                        flush=True,
                    )


def accuracy(o: argparse.Namespace) -> None:
    """Train for equal minutes, one after the other, and evaluate; what is there is left out."""
    if o.anew:
        results = kept(ACCURACY)
        for name in o.cases:
            for tool in o.tools:
                results["accuracy"].get(name, {}).pop(tool, None)
        keep(ACCURACY, results)
    for name in o.cases:
        for seed in o.seeds:
            for tool in o.tools:
                shares = o.ours_minutes if tool == "ours" and o.ours_minutes else [o.minutes]
                for minutes in shares:
                    if str(seed) in runs_of(kept(ACCURACY), name, tool, minutes):
                        continue
                    scores = trained(tool, name, minutes, seed, o)
                    results = kept(ACCURACY)  # again: another seed may run beside this one
                    runs_of(results, name, tool, minutes)[str(seed)] = scores
                    keep(ACCURACY, results)
                    print(name, tool, minutes, seed, scores, flush=True)


def runs_of(results: dict[str, Any], name: str, tool: str, minutes: float) -> dict[str, Any]:
    """The runs of a tool for some minutes, by seed."""
    lengths = results["accuracy"].setdefault(name, {}).setdefault(tool, {})
    return lengths.setdefault(f"{minutes:g}", {})


def trained(
    tool: str, name: str, minutes: float, seed: int, o: argparse.Namespace
) -> dict[str, Any]:
    """Figures of the encoder that a tool trains for some minutes."""
    case, data = TRAINED[name], o.data / name.split("-")[0]
    out = (o.out / f"{name}-{tool}-{minutes:g}-{seed}").resolve()
    out.mkdir(parents=True, exist_ok=True)
    if not is_trained(out):
        train(tool, case, data, minutes, seed, out, o)
    evaluated = ["--encoder", out / "encoder", "--data", data, "--out", out / "probe"]
    evaluated += ["--image_size", case.image_size, "--leaks", "warn", "--overwrite"]
    if case is CASES["resnet18-simclr-32"]:
        evaluated += ["--k", 200, "--temperature", 0.1]
    program = Path(sys.executable).absolute().parent / "vissl-lite"
    run([str(program), "probe", *map(str, evaluated)], out / "probe.txt")
    scores = json.loads((out / "probe" / "results.json").read_text())
    return {
        **json.loads((out / "result.json").read_text()),
        "knn": scores["knn"],
        "linear": scores["linear"],
        "cores": len(os.sched_getaffinity(0)),
        **{key: value for key, value in where_and_when().items() if key != "versions"},
    }


def is_trained(out: Path) -> bool:
    """Whether a training is there whose evaluation was cut off."""
    file = out / "result.json"  # that of a trial run has no minutes
    return file.exists() and "minutes" in json.loads(file.read_text())


def train(
    tool: str,
    case: Case,
    data: Path,
    minutes: float,
    seed: int,
    out: Path,
    o: argparse.Namespace,
) -> None:
    """Train an encoder with a tool for some minutes."""
    where = [*case.arguments, "--data", data / "train", "--out", out, "--seed", seed]
    steps = []
    if tool in ("lightly-train", "stable-pretraining"):
        # Their schedules have a length in steps: as many as fit, by a short run's speed.
        # Trainer's own time limit ends what takes longer.
        trial = [*where, "--seconds", min(30, 6 * minutes), "--warmup_seconds", 2]
        run(work(tool, o.peer_python, *trial), out / "trial.txt")
        rate = json.loads((out / "result.json").read_text())["images_per_second"]
        steps = ["--max_steps", max(2, int(60 * minutes * rate / case.batch_size))]
    run(work(tool, o.peer_python, *where, "--minutes", minutes, *steps), out / "log.txt")


def peers_table() -> str:
    """Speed, the ratios that matter, memory and start-up, case by case; medians over rounds."""
    if not (RESULTS / "peers.json").exists():
        return "Not measured yet."
    results = load("peers")
    tools = ("ours", *PEERS)
    speeds, costs = [], []
    for case, runs in results["speed"].items():
        found = {
            tool: {
                measure: statistics.median(one[measure] for one in each)
                for measure in ("images_per_second", "peak_memory", "seconds_to_first_step")
            }
            for tool, each in runs.items()
            if each
        }
        rate = {tool: one["images_per_second"] for tool, one in found.items()}
        best = max((rate[tool] for tool in PEERS if tool in rate), default=None)
        ours = rate.get("ours")
        batch = next((one["batch_size"] for each in runs.values() for one in each), "")
        row = [
            f"{case}, batch {batch}",
            *(f"{rate[tool]:.1f}" if tool in rate else "" for tool in tools),
        ]
        row.append(f"{ours / best:.2f}" if ours and best else "")
        row.append(f"{rate['alone']:.1f}" if "alone" in rate else "")
        row.append(f"{ours / rate['alone']:.2f}" if ours and "alone" in rate else "")
        speeds.append(row)
        costs.append([case])
        for tool in tools:
            one = found.get(tool, {"peak_memory": 0, "seconds_to_first_step": 0})
            cell = f"{one['peak_memory'] / 2**30:.2f} / {one['seconds_to_first_step']:.1f}"
            costs[-1].append(cell if tool in found else "")
    header = ["images/s", *tools, "ours / best peer", "the step alone", "ours / step alone"]
    helps = [
        [
            f"{statistics.median(results['help'][tool]):.2f}" if results["help"].get(tool) else ""
            for tool in tools
        ]
    ]
    command = "python -m benchmarks.peers.against_peers speed --data DATA --peer_python PYTHON"
    parts = [
        markdown_table(header, speeds),
        markdown_table(["peak memory in GiB / seconds to the first step", *tools], costs),
        markdown_table([f"`{program}`, seconds" for program in HELP], helps),
        provenance(results, command),
    ]
    return "\n\n".join(parts)


def in_short_table() -> str:
    """For the README: images per second against the fastest of the peers."""
    results = load("peers")
    rows = []
    for case, runs in results["speed"].items():
        rate = {
            tool: statistics.median(one["images_per_second"] for one in each)
            for tool, each in runs.items()
            if each
        }
        if "ours" not in rate or any(tool not in rate for tool in PEERS):
            continue
        best = max(PEERS, key=lambda tool: rate[tool])
        backbone, pretext, side = case.rsplit("-", 2)
        rows.append([f"{pretext}, `{backbone}`, {side} px", f"{rate['ours']:.1f}",
                     f"{rate[best]:.1f} ({best})", f"{rate['ours'] / rate[best]:.2f}"])  # fmt: skip
    return (
        markdown_table(["images per second", "vissl_lite", "fastest peer", "ratio"], rows)
        + "\n\n"
        + provenance(results, "python -m benchmarks.peers.against_peers speed --data DATA ...")
    )


def peers_accuracy_table(name: str) -> str:
    """SimCLR for equal minutes: a row for each case, tool and number of minutes."""
    if not (RESULTS / f"{name}.json").exists():
        return "Not measured yet; see [gpu/README.md](gpu/README.md)."
    results = load(name)
    rows = []
    for case, tools in results["accuracy"].items():
        images, backbone, side = case.split("-")
        for tool, lengths in tools.items():
            for seeds in lengths.values():
                runs = list(seeds.values())
                mean = {key: statistics.mean(r[key] for r in runs) for key in ("minutes", SPEED)}
                rows.append(
                    [
                        f"{images}, {side} px, `{backbone}`",
                        "vissl_lite" if tool == "ours" else tool,
                        processors(runs),
                        str(runs[0]["cores"]),
                        f"{mean['minutes']:.1f}",
                        f"{mean[SPEED]:.{0 if mean[SPEED] >= 10 else 1}f}",
                        over_seeds([r["knn"] for r in runs]),
                        over_seeds([r["linear"] for r in runs]),
                    ]
                )
    command = (
        "python -m benchmarks.peers.against_peers accuracy --data DATA --out RUNS "
        "--peer_python PYTHON"
    )
    header = ["images", "library", "processor", "cores", "minutes", "images/s", "kNN", "linear"]
    return markdown_table(header, rows) + "\n\n" + provenance(results, command)


def minutes_table() -> str:
    """For the README: the shortest of our runs that is as good as the best peer's, or the best.

    A row for each length of the peers' runs. Accuracies are compared to a thousandth, and runs on
    the same processor where there are any.
    """
    results = load("peers_accuracy")
    rows = []
    for name, tools in results["accuracy"].items():
        images, backbone, side = name.split("-")
        lengths = {minutes for tool in PEERS for minutes in tools.get(tool, {})}
        for length in sorted(lengths, key=float):
            runs = [
                (peer, scores_of(tools[peer][length]))
                for peer in PEERS
                if length in tools.get(peer, {})
            ]
            peer, (minutes, linear, knn) = max(runs, key=lambda one: one[1][1])
            where = processors(list(tools[peer][length].values()))
            ours = list(tools["ours"].values())
            same = [seeds for seeds in ours if processors(list(seeds.values())) == where]
            mine = sorted(map(scores_of, same or ours))
            reached = [one for one in mine if one[1] >= linear - 0.001]
            best = reached[0] if reached else max(mine, key=lambda one: one[1])
            rows.append([
                f"{images}, {side} px, `{backbone}`",
                f"{minutes:.1f} ({peer})", f"{linear:.3f} / {knn:.3f}",
                f"{best[0]:.1f}", f"{best[1]:.3f} / {best[2]:.3f}",
                f"{best[0] / minutes:.2f}" if reached else "not reached",
            ])  # fmt: skip
    header = [
        "minutes of SimCLR", "best peer", "its linear / kNN", "vissl_lite", "linear / kNN", "ratio"
    ]  # fmt: skip
    command = "python -m benchmarks.peers.against_peers accuracy --data DATA --out RUNS ..."
    return markdown_table(header, rows) + "\n\n" + provenance(results, command)


def processors(runs: list[dict[str, Any]]) -> str:
    """What some runs ran on, such as ``AMD EPYC (avx512_bf16)``; a table may hold several."""
    names = {run["cpu"].partition(" cores of ")[2].replace("(R)", "") for run in runs}
    return " and ".join(sorted(names))


def scores_of(seeds: dict[str, dict[str, float]]) -> tuple[float, float, float]:
    """Minutes, linear and kNN accuracy, each the mean over seeds."""
    minutes, linear, knn = (
        statistics.mean(one[measure] for one in seeds.values())
        for measure in ("minutes", "linear", "knn")
    )
    return minutes, linear, knn


TABLES = {
    "peers": peers_table,
    "in_short": in_short_table,
    "peers_accuracy": partial(peers_accuracy_table, "peers_accuracy"),
    "gpu_peers": partial(peers_accuracy_table, "peers_accuracy_gpu"),
    "minutes_in_short": minutes_table,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    measured = commands.add_parser("speed")
    names = ["help", *CASES]
    measured.add_argument("--cases", nargs="+", choices=names, default=names)
    measured.add_argument("--rounds", type=int, default=1)
    measured.add_argument("--seconds", type=float, default=30, help="timed in a run, at least")
    measured.add_argument("--steps", type=int, default=4, help="timed in a run, at least")
    measured.add_argument("--warmup_steps", type=int, default=2)
    measured.add_argument("--warmup_seconds", type=float, default=6)
    measured.add_argument("--limit", type=float, default=600, help="seconds a run may take")
    measured.add_argument("--anew", action="store_true", help="forget what is there before")
    evaluated = commands.add_parser("accuracy")
    evaluated.add_argument("--out", type=Path, required=True)
    evaluated.add_argument("--cases", nargs="+", choices=TRAINED, default=list(TRAINED))
    evaluated.add_argument("--minutes", type=float, default=8)
    evaluated.add_argument("--ours_minutes", type=float, nargs="+", help="default --minutes")
    evaluated.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    evaluated.add_argument("--anew", action="store_true", help="forget what is there before")
    for one, tools in ((measured, TOOLS), (evaluated, ("ours", *PEERS))):
        one.add_argument("--data", type=Path, required=True)
        one.add_argument("--peer_python", required=True)
        one.add_argument("--tools", nargs="+", choices=tools, default=list(tools))
    o = parser.parse_args()
    # so that what it started ends with it, then too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))
    o.data = o.data.resolve()
    o.peer_python = str(Path(o.peer_python).absolute())  # a virtual environment's link, kept
    speed(o) if o.command == "speed" else accuracy(o)


if __name__ == "__main__":
    main()
