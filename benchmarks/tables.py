"""Write the tables of benchmarks/README.md, and the demo's in the README, from what was measured.

python benchmarks/tables.py

Reads benchmarks/results/*.json; nothing is typed in by hand. Text between a pair of markers
<!-- NAME:begin --> and <!-- NAME:end --> is replaced.
"""

import json
import re
import statistics
from pathlib import Path

from common import RESULTS

from vissl_lite.pretext import PRETEXTS

ROOT = Path(__file__).parents[1]


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def made(results: dict, command: str) -> str:
    """Command, commit, hardware and date, as every table must say."""
    m = results["made"]
    return f"`{command}`, commit {m['commit']}, {m['cpu']}, {m['date']}; {m['versions']}."


def plus_minus(value: dict) -> str:
    return f"{value['mean']:.3f} ± {value['std']:.3f}"


def cifar10() -> str:
    results = load("cifar10")
    names = {
        "untrained": "untrained `resnet18`",
        "lightly": "lightly's SimCLR, `resnet18`",
        "rotation": "rotation, `resnet18`",
        "simclr": "SimCLR, `resnet18`",
        "simclr-small": "SimCLR, `resnet10t`",
    }
    rows = []
    for arm, name in names.items():
        if arm not in results:
            continue
        r = results[arm]
        speed = f"{r['images_per_second']:.0f}" if "images_per_second" in r else ""
        best = f"{r['best_layer_knn']:.3f} / {r['best_layer_linear']:.3f} ({r['best_layer']})"
        minutes = f"{r['seconds'] / 60:.0f}" if "seconds" in r else ""
        rows.append([name, minutes, speed, f"{r['knn']:.3f}", f"{r['linear']:.3f}", best])
    header = ["encoder", "minutes", "images/s", "kNN", "linear", "best stage: kNN / linear"]
    command = "python benchmarks/cifar10.py --data DATA/cifar10 --out RUNS --peer_python PYTHON"
    return table(header, rows) + "\n\n" + made(results, command)


def pretexts() -> str:
    results = load("pretexts")
    untrained = {r["backbone"]: r for name, r in results.items() if name.startswith("untrained")}
    rows = []
    for name in [*(n for n in results if n.startswith("untrained")), *PRETEXTS]:
        if name not in results:
            continue
        r = results[name]
        best = f"{r['best_layer_knn']:.3f} / {r['best_layer_linear']:.3f} ({r['best_layer']})"
        row = [f"`{name}`" if name in PRETEXTS else name.replace(" ", " `") + "`"]
        if name in PRETEXTS:
            gain = r["linear"] - untrained[r["backbone"]]["linear"]
            small = "ViT" if r["backbone"].startswith("vit") else ""
            row += [small, f"{r['images_per_second']:.0f}", f"{r['knn']:.3f}", f"{r['linear']:.3f}"]
            row.append(f"{gain:+.3f}")
        else:
            row += ["", "", f"{r['knn']:.3f}", f"{r['linear']:.3f}", ""]
        rows.append([*row, best])
    header = ["encoder", "", "images/s", "kNN", "linear", "gain", "best stage: kNN / linear"]
    command = "python benchmarks/pretexts.py --data DATA/cifar10 --out RUNS"
    return table(header, rows) + "\n\n" + made(results, command)


def gpu_cifar10() -> str:
    if not (RESULTS / "gpu_cifar10.json").exists():
        return "Not measured yet; the jobs stand in [gpu/README.md](gpu/README.md)."
    results = load("gpu_cifar10")
    rows = [
        [name, r["device"], f"{r['minutes']:.1f}", f"{r['images_per_second']:,.0f}",
         f"{r['knn']:.3f}", f"{r['linear']:.3f}",
         *("" if r["minutes_to"][level] is None else f"{r['minutes_to'][level]:.1f}"
           for level in ("0.70", "0.80"))]
        for name, r in results.items()
        if name != "made"
    ]  # fmt: skip
    header = ["pretext", "device", "minutes", "images/s", "kNN", "linear",
              "minutes to kNN 0.70", "to 0.80"]  # fmt: skip
    command = "python benchmarks/gpu/cifar10.py --data DATA/cifar10 --out RUNS --keep"
    return table(header, rows) + "\n\n" + made(results, command)


def gpu_throughput() -> str:
    if not (RESULTS / "gpu_throughput.json").exists():
        return "Not measured yet; the jobs stand in [gpu/README.md](gpu/README.md)."
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
    command = "python benchmarks/gpu/throughput.py"
    return table(header, rows) + f"\n\n{where} " + made(results, command)


GROWTH = {
    "side": "image side, `resnet18`",
    "side_vit": "image side, `vit_tiny_patch16_224`",
    "batch": "images a batch",
    "views": "views an image (lejepa)",
    "backbone": "GMACs of the backbone",
    "images": "images in the folder (listing them)",
    "processes": "processes on two cores, equal global batch",
}


def growth() -> str:
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
            row += [f"{f['exponent']:.2f}", f"{f['from']:,.3g} to {f['to']:,.3g}"
                    + ("" if f["off_by"] <= 1.1 else f" (within {f['off_by']:.1f})")]  # fmt: skip
        rows.append(row)
    header = ["with", "time: exponent", "holds for", "memory: exponent", "holds for"]
    picture = "![time and memory, measured and fitted](results/growth.png)"
    command = "python benchmarks/growth.py"
    return f"{picture}\n\n" + table(header, rows) + "\n\n" + made(results, command)


def few_labels() -> str:
    results = load("few_labels")
    names = {"untrained": "untrained", "simclr": "SimCLR, 8 minutes"}
    rows = [
        [name, plus_minus(results[arm]["linear"]), plus_minus(results[arm]["finetuned"])]
        for arm, name in names.items()
    ]
    command = "python benchmarks/cifar10.py ... --arms few"
    return (
        table(["encoder (`resnet18`)", "linear", "fine-tuned"], rows)
        + "\n\n"
        + made(results, command)
    )


PEERS = ("lightly", "lightly-train", "stable-pretraining")
HELP = ("vissl-lite --help", "lightly-ssl-train --help", "lightly-train --help", "spt --help")


def peers() -> str:
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
    helps = [[
        f"{statistics.median(results['help'][tool]):.2f}" if results["help"].get(tool) else ""
        for tool in tools
    ]]  # fmt: skip
    command = "python benchmarks/against_peers.py speed --data DATA --peer_python PYTHON"
    parts = [
        table(header, speeds),
        table(["peak memory in GiB / seconds to the first step", *tools], costs),
        table([f"`{program}`, seconds" for program in HELP], helps),
        made(results, command),
    ]
    return "\n\n".join(parts)


def in_short() -> str:
    """For the README: images a second against the fastest of the peers."""
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
        table(["images a second", "vissl_lite", "the fastest peer", "times as fast"], rows)
        + "\n\n"
        + made(results, "python benchmarks/against_peers.py speed --data DATA ...")
    )


def peers_accuracy() -> str:
    """SimCLR on CIFAR-10 for equal minutes."""
    results = load("peers_accuracy")
    rows = [
        [tool, str(r["cores"]), f"{r['minutes']:.1f}", f"{r['images_per_second']:.0f}",
         f"{r['knn']:.3f}", f"{r['linear']:.3f}"]
        for tool, r in results["accuracy"].items()
    ]  # fmt: skip
    command = (
        "python benchmarks/against_peers.py accuracy --data DATA --out RUNS --peer_python PYTHON"
    )
    header = ["`resnet18`, 32 pixels", "cores", "minutes", "images/s", "kNN", "linear"]
    return table(header, rows) + "\n\n" + made(results, command)


def operations() -> str:
    results = load("operations")
    rows = [
        [f"{kind}: {name}", f"{one['torch']:,.1f}", f"{one['ours']:,.1f}",
         f"{one['torch'] / one['ours']:.2f}"]
        for kind in ("attention", "convolution", "network")
        for name, one in results[kind].items()
    ]  # fmt: skip
    header = ["forward and backward, ms", "torch's", "ours", "times as fast"]
    return table(header, rows) + "\n\n" + made(results, "python benchmarks/operations.py")


def views() -> str:
    results = load("views")
    rows = [
        [name, f"{r['views_32']:,.0f}", f"{r['views_224']:,.0f}"]
        for name, r in results["arms"].items()
    ]
    command = (
        "python benchmarks/views.py --small DATA/cifar10/train --large DATA/bccd/JPEGImages "
        "--before BEFORE --peer_python PYTHON"
    )
    header = ["", "32 px, CIFAR files", "224 px, 640x480 JPEGs"]
    return table(header, rows) + "\n\n" + made(results, command)


def demo() -> str:
    results = load("demo")
    rows = []
    for measure, arms in results["summary"].items():
        cells = [plus_minus(arms[arm]) for arm in ("untrained", "pre-trained", "gain")]
        rows.append([measure, *cells[:2], f"+{cells[2]}" if arms["gain"]["mean"] > 0 else cells[2]])
    header = [f"test accuracy, {results['shots']} labels a class", "untrained", "pre-trained"]
    seconds = f"{results['seconds']:.0f} seconds in all. "
    picture = "![the sample data, and the table as a picture](benchmarks/results/demo.png)\n\n"
    return (
        table([*header, "gain"], rows)
        + f"\n\n{picture}{seconds}"
        + made(results, "python benchmarks/demo.py")
    )


ARMS = {
    "untrained": "`resnet18`, untrained",
    "ours": "`resnet18`, pre-trained by us",
    "ImageNet": "`tf_efficientnet_lite0`, ImageNet",
    "ImageNet, then ours": "the same, further pre-trained by us",
}


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    if len(values) == 1:
        return f"{values[0]:.3f} (one seed)"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def dense(name: str, measures: dict[str, str]) -> str:
    """A row for each arm: figures over seeds, and the CPU minutes of a run."""
    results = load("transfer")
    rows = []
    for arm, label in ARMS.items():
        runs = list(results[name][arm].values())
        minutes = statistics.mean(run["cpu_minutes"] for run in runs)
        figures = [spread([run["test"][measure] for run in runs]) for measure in measures]
        rows.append([label, *figures, str(len(runs)), f"{minutes:.1f}"])
    header = ["encoder", *measures.values(), "seeds", "CPU minutes a run"]
    command = f"python benchmarks/transfer.py {name} --data DATA --domains DOMAINS --out RUNS"
    return table(header, rows) + "\n\n" + made(results, command)


def bccd() -> str:
    return dense("bccd", {"map_50": "test mAP50", "map": "test mAP"})


def detectors() -> str:
    """The same encoder, seed and about the same CPU minutes."""
    results = load("transfer")
    rows = []
    for detector in ("faster_rcnn", "fcos"):
        key = "bccd" if detector == "faster_rcnn" else f"bccd-{detector}"
        run = results[key]["ImageNet"]["0"]
        figures = [f"{run['test'][measure]:.3f}" for measure in ("map_50", "map")]
        rows.append([f"`{detector}`", *figures, f"{run['cpu_minutes']:.1f}"])
    command = "python benchmarks/transfer.py bccd --detector fcos --arms ImageNet --epochs 8 ..."
    header = ["detector", "test mAP50", "test mAP", "CPU minutes"]
    return table(header, rows) + "\n\n" + made(results, command)


def water() -> str:
    return dense("water", {"miou": "test mIoU", "dice": "test Dice"})


def ucmerced() -> str:
    results = load("transfer")
    rows = []
    for arm, label in ARMS.items():
        runs = list(results["ucmerced"][arm].values())
        for kind in ("linear", "fine-tuned"):
            row = [label, kind]
            for shots in runs[0]:
                at = [run[shots] for run in runs if shots in run]
                row.append(spread([r["linear"] if kind == "linear" else r["test"]["top1"]
                                   for r in at]))  # fmt: skip
            rows.append(row)
    header = ["encoder", "", *(f"{shots} a class" for shots in runs[0])]
    command = "python benchmarks/transfer.py ucmerced --data DATA --domains DOMAINS --out RUNS"
    return table(header, rows) + "\n\n" + made(results, command)


def compared(job: str, command: str) -> str:
    """A table a protocol, the difference from the baseline below each arm; then the verdicts."""
    results = load("compare")[job]
    parts = []
    for protocol, found in results["protocols"].items():
        rows = []
        for arm, by_amount in found["arms"].items():
            rows.append([arm, *(plus_minus(one) for one in by_amount.values())])
            if arm != results["baseline"]:
                gains = [found["differences"][arm][amount] for amount in by_amount]
                cells = [f"{g['mean']:+.3f} ({g['low']:+.3f} to {g['high']:+.3f})" for g in gains]
                rows.append(["difference, 95 %", *cells])
        labels = [f"{count:,} labels ({amount})" for amount, count in results["labels"].items()]
        parts.append(table([f"{protocol}, test {found['metric']}", *labels], rows))
    parts += [f"> {sentence}" for sentence in results["sentences"]]
    return "\n\n".join([*parts, made(results, command)])


def compare_cifar10() -> str:
    command = "python benchmarks/compare.py cifar10 --data DATA/cifar10 --arm NAME=RUN --out OUT"
    return compared("cifar10", command)


def compare_finetune() -> str:
    command = "python benchmarks/compare.py cifar10-finetune --data DATA/cifar10 --arm NAME=RUN"
    return compared("cifar10-finetune", command)


def compare_ucmerced() -> str:
    command = "python benchmarks/compare.py ucmerced --data DATA/ucmerced --arm NAME=RUN --out OUT"
    return compared("ucmerced", command)


def verdict() -> str:
    """The README's example: the comparison of fine-tuning."""
    results = load("compare")["cifar10-finetune"]
    words = "\n\n".join(f"> {sentence}" for sentence in results["sentences"])
    link = "[measured](benchmarks/README.md#did-it-help-compare-on-cifar-10-and-uc-merced)"
    return f"CIFAR-10, fine-tuned on 50 and on 500 labels ({link}):\n\n{words}"


def layers() -> str:
    command = "python benchmarks/compare.py layers --data DATA/cifar10 --arm rotation=RUN ..."
    picture = "![accuracy over the stages of five encoders](results/layers.png)"
    return picture + "\n\n" + made(load("compare")["layers"], command)


def photographs() -> str:
    """Views a second by way of decoding and with a cache; accuracy of short runs."""
    if not (RESULTS / "photographs.json").exists():
        return "Not measured yet."
    results = load("photographs")
    parts = []
    if "speed" in results:
        rows = []
        for name, one in results["speed"].items():
            rates = one["views_per_second"]
            cells = [f"{rate:,.1f}" for rate in rates.values()]
            times = f"{rates['drawn crops'] / rates['whole']:.1f} / "
            times += f"{rates['drawn crops'] / rates['Pillow']:.1f}"
            rows.append([f"{name}, {one['megabytes']:.2f} MB", *cells, times])
        header = ["views/s", "whole, by Pillow", "whole, by OpenCV", "as any crop allows",
                  "as the drawn crops allow", "times OpenCV / Pillow"]  # fmt: skip
        parts.append(table(header, rows))
    if "cache" in results:
        rows = [
            [name, one["where"], f"{one['megabytes_an_image']:.2f}", f"{one['decoding']:,.0f}",
             f"{one['first_epoch']:,.0f}", f"{one['cache']:,.0f}",
             f"{one['cache'] / one['decoding']:.1f}"]
            for name, one in results["cache"].items()
        ]  # fmt: skip
        header = ["views/s", "kept in", "MB an image", "no cache", "cache, first epoch",
                  "cache, later epochs", "later: times no cache"]  # fmt: skip
        parts.append(table(header, rows))
    if "accuracy" in results:
        one = results["accuracy"]
        rows = [
            [arm, spread(runs["knn"]), spread(runs["linear"]),
             f"{statistics.mean(runs['seconds']) / 60:.1f}"]
            for arm, runs in one["arms"].items()
        ]  # fmt: skip
        parts.append(table(["images decoded", "kNN", "linear", "CPU minutes"], rows))
        parts.append(f"{one['images']} images of {one['side']} x {one['side']} pixels, "
                     f"{one['epochs']} epochs of SimCLR, `resnet10t` at 64 pixels.")  # fmt: skip
    command = "python benchmarks/photographs.py speed|cache|accuracy --data DATA"
    return "\n\n".join([*parts, made(results, command)])


def leaks() -> str:
    results = load("leaks")
    planted, whole = results["planted"], results["whole"]
    rows = [
        [kind.replace("_", " "), str(one["images"]), f"{one['recall']:.3f}",
         f"{one['least_similarity']:.3f}"]
        for kind, one in planted["kinds"].items()
    ]  # fmt: skip
    header = ["test images that are training images", "how many", "recall", "least similarity"]
    rest = (
        f"Found among {planted['new_images']} new images: {planted['found_among_new']}. "
        f"{whole['images']:,} images on {whole['cores']} core(s): "
        f"fingerprints {whole['fingerprints']['seconds']:.0f} s "
        f"({whole['fingerprints']['cpu_seconds']:.0f} s of CPU), matching 10,000 against 50,000 "
        f"{whole['matching']['seconds']:.0f} s ({whole['matching']['cpu_seconds']:.0f} s of CPU); "
        f"a fingerprint costs {whole['fingerprint_us_an_image']:.0f} microseconds beside "
        f"{whole['decoding_us_an_image']:.0f} of decoding."
    )
    command = "python benchmarks/leaks.py --data DATA/cifar10"
    return table(header, rows) + "\n\n" + rest + "\n\n" + made(results, command)


def listing() -> str:
    results = load("listing")
    rows = [
        [f"{then['images']:,}", *(f"{one[name]:.{digits}f}" for name, digits in shown
                                  for one in (then, now))]
        for then, now in zip(results["before"], results["now"], strict=True)
        for shown in [[("listing_seconds", 2), ("first_batch_seconds", 2),
                       ("main_rss_mb_of_paths", 0), ("worker_own_mb_after_epoch", 0)]]
    ]  # fmt: skip
    header = ["images", "listing, s: before", "now", "first batch, s: before", "now",
              "paths in the main process, MB: before", "now",
              "a worker's own memory after an epoch, MB: before", "now"]  # fmt: skip
    command = "python benchmarks/listing.py --photos DATA/cifar10/train"
    return table(header, rows) + "\n\n" + made(results, command)


def resizing() -> str:
    results = load("resizing")
    rows = [
        [row["arm"], str(row["epochs"]), str(row["seeds"]), f"{row['minutes']:.1f}",
         f"{row['knn']:.3f}", f"{row['linear']:.3f}"]
        for row in results["rows"]
    ]  # fmt: skip
    header = ["views", "epochs", "seeds", "minutes of one core", "kNN", "linear"]
    command = "python benchmarks/resizing.py --data DATA/ucmerced --out RUNS"
    picture = "![accuracy against minutes, with and without](results/resizing.png)"
    return table(header, rows) + f"\n\n{picture}\n\n" + made(results, command)


def shards() -> str:
    if not (RESULTS / "shards.json").exists():
        return "Not measured yet."
    results = load("shards")
    rows = [
        [name, *(f"{results[size][name][figure]:,.{digits}f}" for size in ("32", "224")
                 for figure, digits in (("images_per_second", 0), ("cpu_ms", 2)))]
        for name in results["224"]
    ]  # fmt: skip
    header = ["one data worker", "32 px, CIFAR files: images/s", "CPU ms an image",
              "224 px, 640x480 JPEGs: images/s", "CPU ms an image"]  # fmt: skip
    command = "python benchmarks/shards.py --small DATA/cifar10/train --large DATA/bccd/JPEGImages"
    return table(header, rows) + "\n\n" + made(results, command)


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


def losses() -> str:
    results = load("losses")
    rows = []
    for name, (of, floats, products) in COSTS.items():
        each = results["losses"][name]
        last = each[max(each, key=int)]
        rows.append([
            of, floats, f"{last['copies']:.1f}", products, f"{last['giga_a_second']:.3g}",
            *(f"{one['mib']:,.0f} MiB, {one['milliseconds']:,.0f} ms" for one in each.values()),
        ])  # fmt: skip
    header = ["loss of", "floats", "times", "multiplications", "10^9 a second",
              *(f"B = G = {batch}" for batch in each)]  # fmt: skip
    command = "OMP_NUM_THREADS=1 python benchmarks/losses.py"
    return table(header, rows) + "\n\n" + made(results, command)


# Multiplications of a step of ResNet-50 at 224 pixels: two views, a forward and a backward pass.
RESNET50 = 2 * 3 * 4.1e9


def at_scale() -> str:
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
    return table(header, rows)


def processes() -> str:
    results = load("losses")
    rows = []
    for number, one in results["processes"].items():
        measured, predicted = one["measured"], one["predicted"]
        parts = [f"{predicted[part] / 1e6:.2f}" for part in ("gradient", "embeddings", "norms")]
        mb = [f"{each['bytes'] / 1e6:.1f}" for each in (predicted, measured)]
        seconds = [f"{each['seconds']:.2f}" for each in (predicted, measured)]
        rows.append([number, *parts, *mb, *seconds])
    header = ["processes", "gradient, MB", "embeddings, MB", "BatchNorm, MB", "together, predicted",
              "measured", "seconds a step, predicted", "measured"]  # fmt: skip
    command = "OMP_NUM_THREADS=1 python benchmarks/losses.py"
    return table(header, rows) + "\n\n" + made(results, command)


def sharding() -> str:
    results = load("sharding")
    rows = []
    for name, run in results["runs"].items():
        if not {"least", "most", "seconds"} <= run.keys():
            continue
        processes, strategy = name.split()
        gib = [f"{run[which] / 2**30:.2f}" for which in ("least", "most")]
        rows.append([processes, strategy, *gib, f"{run['seconds']:.2f}"])
    header = ["processes", "strategy", "GiB of the least", "GiB of the most", "seconds a step"]
    command = "OMP_NUM_THREADS=1 python benchmarks/sharding.py --data DATA/ucmerced/train"
    return table(header, rows) + "\n\n" + made(results, command)


def rotation() -> str:
    """The file without its imports and what draws the pictures of the report."""
    source = (ROOT / "vissl_lite/pretext/rotation.py").read_text()
    begin, drawing = source.index("def rotation_views"), source.index("def turn(")
    method, show = source.index("class Rotation"), source.index("    def show(")
    shown = source[begin:drawing] + source[method:show].rstrip()
    return "```python\n" + shown + "\n```"


def fill(file: Path, **makers) -> None:
    text = file.read_text()
    for name, make in makers.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"{file} has no {begin}")
        content = f"{begin}\n{make()}\n{end}"
        text = pattern.sub(lambda _, content=content: content, text)
    file.write_text(text)


if __name__ == "__main__":
    fill(
        ROOT / "benchmarks/README.md",
        pretexts=pretexts,
        gpu_cifar10=gpu_cifar10,
        gpu_throughput=gpu_throughput,
        growth=growth,
        cifar10=cifar10,
        few_labels=few_labels,
        peers=peers,
        peers_accuracy=peers_accuracy,
        views=views,
        bccd=bccd,
        detectors=detectors,
        water=water,
        ucmerced=ucmerced,
        compare_cifar10=compare_cifar10,
        compare_finetune=compare_finetune,
        compare_ucmerced=compare_ucmerced,
        layers=layers,
        leaks=leaks,
        photographs=photographs,
        operations=operations,
        listing=listing,
        shards=shards,
        resizing=resizing,
    )
    fill(ROOT / "docs/scaling.md", losses=losses, at_scale=at_scale, processes=processes,
         sharding=sharding)  # fmt: skip
    fill(ROOT / "README.md", demo=demo, rotation=rotation, verdict=verdict, in_short=in_short)
