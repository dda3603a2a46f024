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
         f"{r['knn']:.3f}", f"{r['linear']:.3f}"]
        for name, r in results.items()
        if name != "made"
    ]  # fmt: skip
    header = ["pretext", "device", "minutes", "images/s", "kNN", "linear"]
    command = "python benchmarks/gpu/cifar10.py --data DATA/cifar10 --out RUNS --keep"
    return table(header, rows) + "\n\n" + made(results, command)


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


def throughput() -> str:
    results = load("throughput")
    m, r = results["medians"], results["ratios"]
    rows = [
        ["the training step alone, one batch", f"{m['alone']:.1f}", ""],
        ["vissl_lite from files", f"{m['files']:.1f}", f"{100 * m['wait']:.1f} %"],
    ]
    peers = [name for name in m if name not in ("alone", "files", "wait")]
    rows += [[f"{peer} from files", f"{m[peer]:.1f}", ""] for peer in peers]
    ratios = ", ".join(f"{r[f'times_{peer}']:.2f} times {peer}" for peer in peers)
    command = "python benchmarks/throughput.py --data DATA/ucmerced --peer_python PYTHON"
    return (
        table(["", "images/s", "waiting for data"], rows)
        + f"\n\nFrom files: {r['share_of_step_alone']:.2f} of the step alone, {ratios}.\n\n"
        + made(results, command)
    )


def views() -> str:
    results = load("views")
    rows = [
        [name, f"{r['views_32']:,.0f}", f"{r['views_224']:,.0f}"]
        for name, r in results.items()
        if name != "made"
    ]
    command = "python benchmarks/views.py --small DATA/cifar10/train --large DATA/bccd/JPEGImages"
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
        cifar10=cifar10,
        few_labels=few_labels,
        throughput=throughput,
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
    )
    fill(ROOT / "README.md", demo=demo, rotation=rotation, verdict=verdict)
