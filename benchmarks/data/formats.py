"""SimCLR's two views of images that are not photographs: views per second and core.

    taskset -c 0 python -m benchmarks.data.formats --water DATA/water12/images --mr DATA/mr \
        --hippocampus DATA/hippocampus/images

Scenes of 12 bands of 16 bits (TIFF, 128 pixels), DICOM files and slices of NIfTI volumes, each
beside 8-bit RGB PNGs of the same size that show the same; reading and decoding included, in later
epochs, in random order. All take turns, on one thread, by the processor's clock, so that other work
on the core does not count. Medians over the rounds.

Results: benchmarks/results/formats.json.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import cv2
import numpy as np
import torch

from benchmarks.common import keep, load, markdown_table, provenance
from vissl_lite.data.image_reader import ImageReader
from vissl_lite.data.image_survey import NO_SETTINGS, survey
from vissl_lite.data.images import find_images, read_image
from vissl_lite.data.stream import ViewDataset, collate
from vissl_lite.data.views import Views, distorted_crop

ROUNDS, IMAGES, PNGS = 5, 64, 136

# Name of a set, and the side of its views in pixels.
SETS = {
    "water": ("12 bands of 16 bits, TIFF of 128 pixels", 96),
    "mr": ("DICOM of 256 to 512 pixels", 224),
    "hippocampus": ("slices of NIfTI volumes, about 50 x 35 pixels", 32),
}


def views_per_second(paths: list[str], reader: ImageReader, size: int, start: int) -> float:
    """Two views of each of some images."""
    pipeline = distorted_crop(size, 0.2, color=0.5, blur_probability=0.5, upright=False)
    dataset = ViewDataset(paths, Views([pipeline, pipeline], size), seed=0, reader=reader)
    keys = [(1, (start + number) * 7919 % len(paths)) for number in range(IMAGES)]
    began = time.process_time()
    for first in range(0, IMAGES, 32):
        collate([dataset[key] for key in keys[first : first + 32]])
    return 2 * IMAGES / (time.process_time() - began)


def write_pngs(paths: list[str], folder: Path) -> list[str]:
    """Some of the images as PNGs, as they are shown."""
    made = []
    for number, path in enumerate(paths[:: max(1, len(paths) // PNGS)]):
        made.append(str(folder / f"{number}.png"))
        cv2.imwrite(made[-1], np.ascontiguousarray(read_image(path)[..., ::-1]))
    return made


def formats_table() -> str:
    results = load("formats")
    rows = [
        [SETS[name][0], str(SETS[name][1]), f"{one['images']:,.0f}", f"{one['pngs']:,.0f}"]
        for name, one in results["measured"].items()
    ]
    command = "python -m benchmarks.data.formats --water ... --mr ... --hippocampus ..."
    header = ["views per second", "side of a view", "as they are", "as 8-bit PNG"]
    return markdown_table(header, rows) + "\n\n" + provenance(results, command)


TABLES = {"formats": formats_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in SETS:
        parser.add_argument(f"--{name}", required=True)
    given = vars(parser.parse_args())
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (_, size) in SETS.items():
            paths = find_images([given[name]])
            place = Path(folder) / name
            place.mkdir()
            pngs = write_pngs(paths, place)
            reader, usual = survey(paths, NO_SETTINGS), survey(pngs, NO_SETTINGS)
            for path in paths:  # the range of each volume is measured once in a run
                if reader.scope == "volume":
                    reader.read(path)
            rates: dict[str, list[float]] = {"images": [], "pngs": []}
            for number in range(ROUNDS + 1):
                start = number * IMAGES
                rates["images"].append(views_per_second(paths, reader, size, start))
                rates["pngs"].append(views_per_second(pngs, usual, size, start))
            measured[name] = {kind: median(values[1:]) for kind, values in rates.items()}
            print(name, measured[name], flush=True)
    keep("formats", {"measured": measured})


if __name__ == "__main__":
    main()
