"""The commands on images with bands: from files to an encoder, a segmenter and their use."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import onnxruntime
import pytest

import vissl_lite
from vissl_lite.cli import main
from vissl_lite.data.formats import read_raw
from vissl_lite.encoders.folder import load_encoder


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six volumes of two bands on scales of their own, with a bright ball and its mask."""
    folder = tmp_path_factory.mktemp("volumes")
    random = np.random.default_rng(0)
    place = np.stack(np.meshgrid(*[np.arange(12)] * 3, indexing="ij"), axis=-1)
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    for number in range(6):
        ball = ((place - random.integers(4, 8, 3)) ** 2).sum(axis=-1) < 10
        values = random.random((12, 12, 12, 2)) + 2 * ball[..., None]
        affine = np.diag([1, 1, 2, 1]) * [1, 1, -1, 1]
        name = f"scan{number}.nii.gz"
        image = (values * 10.0**number).astype(np.float32)
        nib.save(nib.Nifti1Image(image, affine), folder / "images" / name)
        nib.save(nib.Nifti1Image(ball.astype(np.uint8), affine), folder / "labels" / name)
    return folder


@pytest.mark.slow
def test_from_volumes_to_predicted_volumes(
    volumes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common: dict[str, Any] = {"num_workers": 0, "epochs": 1, "upright": False}
    pretrained = vissl_lite.pretrain(
        data=volumes / "images", out=tmp_path / "pre", backbone="test_resnet", image_size=32,
        batch_size=16, cache=True, pretext={"name": "simclr"}, **common,
    )  # fmt: skip
    reader = load_encoder(pretrained.encoder).reader
    assert (reader.channels, reader.scope) == (2, "volume")
    assert main(["report", "--run", str(pretrained.run)]) == 0
    assert "Bands" in (tmp_path / "pre" / "report.html").read_text()
    found = vissl_lite.finetune(
        data=volumes, task="segmentation", encoder=pretrained, out=tmp_path / "seg", image_size=32,
        batch_size=8, **common,
    )  # fmt: skip
    results = json.loads((found.run / "results.json").read_text())
    assert set(results["per_class"]["foreground"]) == {
        "iou",
        "dice",
        "volume_dice",
        "volume_dice_std",
    }
    assert results["test"]["volume_dice"] == results["per_class"]["foreground"]["volume_dice"]
    split = (found.run / "split.csv").read_text().splitlines()
    parts: dict[str, set[str]] = {}
    for line in split[1:]:
        part = next(name for name in ("train", "val", "test") if f"{name}" in line.split(","))
        parts.setdefault(next(w for w in line.split("/") if "scan" in w)[:5], set()).add(part)
    assert len(parts) == 6
    assert all(len(one) == 1 for one in parts.values())
    out = tmp_path / "predicted"
    images = str(volumes / "images")
    assert main(["predict", "--model", str(found.run), "--data", images, "--out", str(out)]) == 0
    predicted, image = (nib.load(f / "scan0.nii.gz") for f in (out / "masks", volumes / "images"))
    assert predicted.shape == (12, 12, 12)
    assert np.allclose(predicted.affine, image.affine)
    assert set(np.unique(np.asarray(predicted.dataobj))) <= {0, 1}
    # a list that goes to and fro, and two volumes of one name
    other = tmp_path / "images" / "scan1.nii"
    other.parent.mkdir()
    for number in (0, 1):
        shutil.copy(volumes / "images" / f"scan{number}.nii.gz", other.parent)
    other.write_bytes(gzip.decompress((other.parent / "scan1.nii.gz").read_bytes()))
    places = [("scan0.nii.gz", 3), ("scan1.nii", 2), ("scan0.nii.gz", 4), ("scan1.nii.gz", 5)]
    lines = [f"{other.parent / name}#{number}" for name, number in places]
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n")
    words = ["--model", found.run, "--data", tmp_path / "list.txt", "--out", tmp_path / "again"]
    written: dict[str, list[int]] = {}

    def keep(path: str, masks: dict[int, np.ndarray], file: Path) -> None:
        written[file.name.removesuffix(".part")] = sorted(masks)
        file.write_bytes(b"")

    monkeypatch.setattr("vissl_lite.data.formats.nifti.write_masks", keep)
    assert main(["predict", *map(str, words)]) == 0
    assert written == {
        "scan0.nii.gz": [3, 4], "scan1.nii.nii.gz": [2], "scan1.nii.gz": [5]
    }  # fmt: skip


@pytest.mark.slow
def test_an_exported_encoder_takes_bands_in_their_own_units(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(12):
        values = random.integers(-500, 4000, (32, 32, 5)).astype(np.int16)
        np.save(tmp_path / "images" / f"{number}.npy", values)
    bands = {"bands": "5,1,2", "value_range": "-500,4000"}
    vissl_lite.pretrain(
        data=tmp_path / "images", out=tmp_path / "pre", backbone="test_resnet", image_size=32,
        batch_size=8, epochs=1, num_workers=0, **bands,
    )  # fmt: skip
    vissl_lite.embed(data=tmp_path / "images", encoder=tmp_path / "pre", out=tmp_path / "e.npz")
    with np.load(tmp_path / "e.npz") as embedded:
        features, paths = embedded["features"], embedded["paths"].tolist()
    vissl_lite.export(encoder=tmp_path / "pre", out=tmp_path / "e.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "e.onnx")
    raw = np.stack([read_raw(path).pixels[..., [4, 0, 1]] for path in paths])
    (found,) = session.run(None, {"images": raw.transpose(0, 3, 1, 2).astype(np.float32)})
    assert found == pytest.approx(features, abs=0.02 * float(np.abs(features).max()))
