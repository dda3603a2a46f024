"""Write the synthetic sample data set: images, class labels, masks and boxes.

A network trained on a few of its labels relies on irrelevant variation (color, texture, light,
clutter); one pre-trained on thousands of its images without labels has learned to ignore it. The
demo shows this difference.

An image depends only on (seed, split, index), so the images can be drawn in any order and by any
number of processes with byte-identical results.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from vissl_lite.errors import UserError
from vissl_lite.sample.drawing import CLASSES, draw, to_bands

Annotation = dict[str, Any]  # A COCO annotation.
Kind = Literal["photographs", "multiband"]
Progress = Callable[[int, int], None]  # Called with (number of images done, total number).

LABELLED = ("train", "val", "test")
_PALETTE = [
    *(0, 0, 0, 230, 25, 75, 60, 180, 75, 255, 225, 25, 0, 130, 200, 245, 130, 48, 145, 30, 180),
    *(70, 240, 240, 240, 50, 230, 210, 245, 60, 250, 190, 212),
]


@dataclass(frozen=True)
class _Plan:
    """The parameters of ``make_sample_data``, stored in ``sample.json``."""

    seed: int
    unlabelled: int
    train: int
    val: int
    test: int
    size: int
    kind: Kind = "photographs"
    version: int = 3  # Increase when the files change, so that old data sets are not reused.


class _Job(NamedTuple):
    folder: Path
    plan: _Plan
    split: str
    number: int


_SUFFIXES: dict[Kind, str] = {"photographs": ".jpg", "multiband": ".npy"}


def _save(image: Image.Image, plan: _Plan, place: Path, rng: np.random.Generator) -> None:
    """Write an image, with the suffix of its kind."""
    place = place.with_suffix(_SUFFIXES[plan.kind])
    if plan.kind == "photographs":
        image.save(place, quality=92)
    else:
        np.save(place, to_bands(image, rng))


def _draw_file(job: _Job) -> Annotation | None:
    """Draw and write one image; return its COCO annotation if it is labelled."""
    folder, plan, split, index = job
    rng = np.random.default_rng([plan.seed, ("unlabelled", *LABELLED).index(split), index])
    if split == "unlabelled":
        image, _ = draw(str(rng.choice(CLASSES)), rng, plan.size)
        _save(image, plan, folder / split / f"{index:05d}", rng)
        return None
    label = index % len(CLASSES)
    name = CLASSES[label]
    image, visible = draw(name, rng, plan.size)
    _save(image, plan, folder / "labelled" / split / name / f"{index:05d}", rng)
    mask = Image.fromarray(np.uint8(visible * (label + 1)))
    mask.putpalette(_PALETTE)
    mask.save(folder / "masks" / split / name / f"{index:05d}.png")
    rows, columns = np.nonzero(visible)
    flat = visible.T.ravel()  # column by column, as COCO counts
    edges = np.flatnonzero(np.diff(flat, prepend=False))
    x, y = int(columns.min()), int(rows.min())
    return {
        "id": index + 1,
        "image_id": index + 1,
        "category_id": label + 1,
        "bbox": [x, y, int(columns.max()) - x + 1, int(rows.max()) - y + 1],
        "area": len(rows),
        "segmentation": {
            "size": list(visible.shape),
            "counts": np.diff(edges, prepend=0, append=flat.size).tolist(),
        },
        "iscrowd": 0,
    }


def _coco(plan: _Plan, annotations: list[Annotation]) -> dict[str, Any]:
    """Return the content of the COCO file of a split."""
    images = [
        {
            "id": one["image_id"],
            "file_name": f"{CLASSES[one['category_id'] - 1]}/{one['image_id'] - 1:05d}"
            f"{_SUFFIXES[plan.kind]}",
            "width": plan.size,
            "height": plan.size,
        }
        for one in annotations
    ]
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _run(
    jobs: list[_Job], processes: int | None, progress: Progress | None
) -> list[Annotation | None]:
    """Run the jobs in this process or in a pool, and return their results in order."""

    def collect(results: Iterable[Annotation | None]) -> list[Annotation | None]:
        collected = []
        for done, result in enumerate(results, start=1):
            collected.append(result)
            if progress is not None:
                progress(done, len(jobs))
        return collected

    processes = processes or os.cpu_count() or 1
    if processes == 1:
        return collect(map(_draw_file, jobs))
    with ProcessPoolExecutor(processes) as pool:
        return collect(pool.map(_draw_file, jobs, chunksize=32))


_README = """# Sample data

Synthetic pictures of {kinds} kinds of object ({names}), drawn by `vissl-lite` with seed {seed}:
{size} x {size} pixels, one object each. The class determines only the shape; color, position, size,
background, clutter and camera are random.

| folder | images |
|---|---|
| `unlabelled/` | {unlabelled} |
| `labelled/train/<class>/` | {train} |
| `labelled/val/<class>/` | {val} |
| `labelled/test/<class>/` | {test} |

- `masks/<split>/<class>/<stem>.png` pairs with `labelled/<split>/<class>/<stem>{suffix}`: 0 is
  background, 1..{kinds} the class, numbered as in `classes.txt`; visible pixels only.
- `annotations/<split>.json` contains the boxes and masks (run lengths) in COCO format,
  `file_name` relative to `labelled/<split>/`.
- `sample.json` contains the parameters; the same parameters give the same files.
"""


def _write(folder: Path, plan: _Plan, processes: int | None, progress: Progress | None) -> None:
    """Draw the whole data set into an existing empty folder."""
    (folder / "unlabelled").mkdir()
    (folder / "annotations").mkdir()
    for split in LABELLED:
        for kind in ("labelled", "masks"):
            for name in CLASSES:
                (folder / kind / split / name).mkdir(parents=True)
    counts = {split: getattr(plan, split) for split in ("unlabelled", *LABELLED)}
    jobs = [_Job(folder, plan, split, i) for split, count in counts.items() for i in range(count)]
    results = _run(jobs, processes, progress)
    for split in LABELLED:
        annotations = [
            one for job, one in zip(jobs, results, strict=True) if job.split == split and one
        ]
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(_coco(plan, annotations)))
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    facts = {
        **asdict(plan),
        "suffix": _SUFFIXES[plan.kind],
        "kinds": len(CLASSES),
        "names": ", ".join(CLASSES),
    }
    (folder / "README.md").write_text(_README.format(**facts))
    (folder / "sample.json").write_text(json.dumps(asdict(plan), indent=2) + "\n")


def _exists(out: Path, plan: _Plan) -> bool:
    """Whether ``out`` already holds the data set; ``UserError`` if it holds something else."""
    if not out.exists():
        return False
    if out.is_dir() and not any(out.iterdir()):
        return False
    try:
        found = json.loads((out / "sample.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"{out} is not a sample data set: give another folder") from None
    if found != asdict(plan):
        raise UserError(f"{out} holds a sample data set with other parameters: {found}")
    return True


def make_sample_data(
    out: str | Path,
    seed: int = 0,
    unlabelled: int = 4000,
    train: int = 500,
    val: int = 200,
    test: int = 1000,
    size: int = 64,
    kind: Kind = "photographs",
    processes: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Draw the sample data set into a folder, unless it exists there already.

    Args:
        out: Folder to create. It appears only when it is complete.
        seed: Seed of the images, at least 0. The same seed gives the same files.
        unlabelled: Number of images without labels, of random classes.
        train: Total number of labelled training images; the classes alternate.
        val: Total number of labelled validation images.
        test: Total number of labelled test images.
        size: Width and height of an image in pixels, at least 16.
        kind: ``photographs`` (JPEG), or ``multiband``: arrays of six bands of 16 bits; see
            ``to_bands``.
        processes: Number of processes; None for one per core. The files do not depend on it.
        progress: Called with (number of images done, total number) after every image.

    Returns:
        ``out`` as a path. It contains ``unlabelled/``, ``labelled/``, ``masks/``,
        ``annotations/``, ``classes.txt``, ``README.md`` and ``sample.json``.

    Raises:
        UserError: If ``out`` exists with other content, or a number is out of range.
    """
    out = Path(out)
    plan = _Plan(seed, unlabelled, train, val, test, size, kind)
    if min(seed, unlabelled, train, val, test) < 0 or size < 16:
        raise UserError("sample data: counts and seed must be 0 or more, and size 16 or more")
    if _exists(out, plan):
        return out
    draft = out.with_name(f".{out.name}.{os.getpid()}.part")
    draft.mkdir(parents=True)
    try:
        _write(draft, plan, processes, progress)
        draft.replace(out)  # Atomic, because it is on the same disk.
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return out
