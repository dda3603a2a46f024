"""Do pseudo-labels help? The same encoder and labels, without and with them.

    python -m benchmarks.accuracy.pseudo_labels SET --data DATA/SET --encoder RUN --out OUT

``SET`` is ``cifar10`` (500 labels: 25 for training and 25 for validation per class) or ``bccd``
(20 images with boxes, of which 6 are held out: too few to choose a confidence, so it is given). For
each seed a model is trained on labels that the seed draws, it labels all training images, and a
second one is trained on both: ``finetune``, ``pseudo-label`` and ``finetune --pseudo_labels``, with
their defaults (``bccd``: with a time budget). The last command trains the model without
pseudo-labels once more; its figures are those of the table. Runs that are there are kept.

Results: benchmarks/results/pseudo_labels.json.
"""

import argparse
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any, Literal

import vissl_lite
from benchmarks.common import (
    keep,
    load,
    markdown_table,
    over_seeds,
    provenance,
    results_of,
    use_core,
    where_and_when,
)

SETS: dict[str, dict[str, Any]] = {
    "cifar10": {"shots": 25, "image_size": 32},
    "bccd": {"task": "detection", "fraction": 0.07, "image_size": 320, "upright": False},
}
# Seconds for the first command and for the last, which trains twice; None: its number of epochs
TIMES: dict[str, tuple[int | None, int | None]] = {"cifar10": (None, None), "bccd": (240, 600)}


# From which confidence predictions are labels
MIN_CONFIDENCE: dict[str, float | Literal["auto"]] = {"cifar10": "auto", "bccd": 0.8}
# With the default precision, 0.95, one of three seeds finds no such confidence.
MIN_PRECISION = 0.9


def unlabelled(name: str, data: Path, out: Path) -> Path:
    """Training images, as a folder or a file of paths."""
    if name == "cifar10":
        return data / "train"
    lists = [(data / "ImageSets" / "Main" / f"{part}.txt").read_text() for part in ("train", "val")]
    paths = [str(data / "JPEGImages" / f"{image}.jpg") for text in lists for image in text.split()]
    file = out / "bccd.txt"
    file.write_text("\n".join(paths) + "\n")
    return file


def once(name: str, given: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Figures of one seed: ``without``, ``with`` and what was labelled."""
    place: Path = given.out / f"{name}-{seed}"
    common = {
        "data": str(given.data), "encoder": given.encoder, "seed": seed, "num_workers": 0,
        **SETS[name],
    }  # fmt: skip
    again = place / "again"
    if not (again / "report.html").exists():  # written last
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        time, last_time = TIMES[name]
        vissl_lite.finetune(out=str(place / "first"), max_time=time, **common)
        pool = unlabelled(name, given.data, place)
        vissl_lite.pseudo_label(
            model=str(place / "first"), data=str(pool), out=str(place / "pseudo"),
            min_confidence=MIN_CONFIDENCE[name], min_precision=MIN_PRECISION,
        )  # fmt: skip
        vissl_lite.finetune(
            out=str(again), pseudo_labels=str(place / "pseudo"), max_time=last_time, **common
        )
    labelled, found = results_of(place / "pseudo"), results_of(again)["pseudo_labels"]
    before, after = found["rounds"]
    return {
        "min_confidence": labelled["min_confidence"],
        "images": after["pseudo_labelled"],
        "without": before["test"],
        "with": after["test"],
        "kept": found["kept"],
    }


def table(name: str) -> str:
    """Test figures of the models without and with pseudo-labels, and their differences."""
    found = load("pseudo_labels")[name]
    runs = list(found["seeds"].values())
    metrics = list(runs[0]["without"])[:2]
    rows = []
    for metric in metrics:
        without, with_them = ([run[kind][metric] for run in runs] for kind in ("without", "with"))
        gains = [after - before for before, after in zip(without, with_them, strict=True)]
        cells = [over_seeds(without), over_seeds(with_them), ", ".join(f"{g:+.3f}" for g in gains)]
        rows.append([f"test {metric}", *cells])
    counts = ", ".join(f"{run['images']:,} (from {run['min_confidence']:.2f})" for run in runs)
    kept = sum(run["kept"] > 0 for run in runs)
    header = ["", "without pseudo-labels", "with them", "difference of each seed"]
    command = f"python -m benchmarks.accuracy.pseudo_labels {name} --data DATA/{name} ..."
    return "\n\n".join(
        [
            markdown_table(header, rows),
            f"Pseudo-labelled images of each seed (from which confidence): {counts}. By validation "
            f"images the model with pseudo-labels was kept {kept} times of {len(runs)}.",
            provenance(found, command),
        ]
    )


TABLES = {f"pseudo_labels_{name}": partial(table, name) for name in SETS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--core", type=int, help="use this one core")
    given = parser.parse_args()
    if given.core is not None:
        use_core(given.core)
    seeds = {}
    for seed in given.seeds:
        seeds[str(seed)] = once(given.set, given, seed)
        print(given.set, seed, json.dumps(seeds[str(seed)]), flush=True)
    keep("pseudo_labels", {given.set: {"seeds": seeds, "made": where_and_when()}})


if __name__ == "__main__":
    main()
