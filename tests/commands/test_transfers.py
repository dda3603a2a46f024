"""Detection, segmentation and several labels per image, through the command line."""

import csv
import json
from pathlib import Path

import faster_coco_eval.core.mask as coco
import numpy as np
import pytest
import timm
from PIL import Image

import vissl_lite
from tests.conftest import with_pictures
from vissl_lite.cli import main
from vissl_lite.sample.dataset import make_sample_data
from vissl_lite.transfer.detection import task as detection
from vissl_lite.transfer.detection.data import load_boxes
from vissl_lite.transfer.detection.model import detect, load_detector
from vissl_lite.transfer.sources.run_lengths import mask_of_runs


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sample") / "data"
    return make_sample_data(out, unlabelled=0, train=20, val=10, test=10, size=48, processes=1)


def run(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def detector(sample: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "detector"
    common = ("--encoder", encoder, "--data", sample, "--out", out, "--num_workers", 0)
    # FCOS finds something after the first step already
    how = ("--task", "detection", "--detector", "fcos", "--epochs", 2)
    with with_pictures():
        assert run("finetune", *how, *common) == 0
    return out


@pytest.fixture(scope="module")
def segmenter(sample: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "segmenter"
    common = ("--encoder", encoder, "--data", sample, "--out", out, "--num_workers", 0)
    with with_pictures():
        assert run("finetune", "--task", "segmentation", *common, "--epochs", 2) == 0
    return out


@pytest.mark.gpu
@pytest.mark.slow
def test_a_detector_is_trained_and_reported(detector: Path) -> None:
    results = json.loads((detector / "results.json").read_text())
    assert set(results["test"]) == {"map", "map_50"}
    assert results["test_images"] == 10
    assert results["val"]["map"] is not None
    assert len(results["classes"]) == 10
    for name in ("test.png", "per_class.png", "curves.png"):
        assert (detector / name).stat().st_size > 3000, name
    log = (detector / "log.txt").read_text()
    assert "45 of the 45 tensors of" in log
    assert "test_resnet at 64 pixels" in log  # 48 pixels, as a multiple of 32


@pytest.mark.slow
def test_the_splits_of_a_detector_can_be_given_again(detector: Path, sample: Path) -> None:
    again, before = load_boxes(detector / "split"), load_boxes(sample)
    assert again.classes == before.classes
    for one, other in zip(again.test, before.test, strict=True):
        assert Path(one.path).samefile(other.path)
        assert np.array_equal(one.boxes, other.boxes)


@pytest.mark.slow
def test_the_tuned_encoder_of_a_detector_is_timms(detector: Path) -> None:
    folder = detector / "model" / "encoder"
    assert timm.create_model(f"local-dir:{folder}", pretrained=True).num_classes == 0
    assert vissl_lite.load_encoder(detector / "model").backbone == "test_resnet"


@pytest.mark.gpu
@pytest.mark.slow
def test_predict_writes_boxes_as_coco_reads_them(
    detector: Path, sample: Path, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "broken.jpg").write_bytes(b"nothing")
    Image.new("RGB", (90, 60), "red").save(tmp_path / "data" / "red.png")
    data = ("--data", sample / "labelled" / "test", tmp_path / "data")
    out = tmp_path / "out"
    assert run("predict", "--model", detector, *data, "--out", out, "--pictures", 3) == 0
    content = json.loads((out / "predictions.json").read_text())
    assert len(content["images"]) == 11
    assert len(content["categories"]) == 10
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    assert (90, 60) in sizes.values()
    assert content["annotations"]
    for note in content["annotations"]:
        x, y, width, height = note["bbox"]
        right, lower = sizes[note["image_id"]]
        assert 0 <= x < x + width <= right + 0.02
        assert 0 <= y < y + height <= lower + 0.02
        assert 0.05 <= note["score"] <= 1
        assert 1 <= note["category_id"] <= 10
    assert len(list((out / "pictures").rglob("*.png"))) == 3
    assert json.loads((out / "results.json").read_text())["skipped"] == 1


@pytest.fixture(scope="module")
def mask_detector(sample: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "masks"
    common = ("--encoder", encoder, "--data", sample, "--out", out, "--num_workers", 0)
    how = ("--task", "detection", "--detector", "mask_rcnn", "--epochs", 1, "--multi_scale", "true")
    with with_pictures():
        assert run("finetune", *how, *common) == 0
    return out


@pytest.mark.gpu
@pytest.mark.slow
def test_a_detector_with_masks_is_trained_and_reported(mask_detector: Path) -> None:
    results = json.loads((mask_detector / "results.json").read_text())
    assert list(results["test"]) == ["mask_map", "mask_map_50", "map", "map_50"]
    assert results["val"]["mask_map"] is not None
    assert (mask_detector / "test.png").stat().st_size > 3000
    assert (
        json.loads((mask_detector / "model" / "head.json").read_text())["detector"] == "mask_rcnn"
    )
    again = load_boxes(mask_detector / "split", with_shapes=True)
    assert all(one.has_shape.all() for one in again.test)


@pytest.mark.slow
def test_predict_writes_masks_that_are_read_back(
    mask_detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = load_detector(mask_detector), tmp_path / "images"
    model.net.roi_heads.score_thresh = 0.0  # it has hardly learned anything
    monkeypatch.setattr(detection, "load_detector", lambda folder: model)
    images.mkdir()
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 256, (40, 60, 3), np.uint8)
        Image.fromarray(noise).save(images / f"{number}.png")
    out = tmp_path / "out"
    given = ("--model", mask_detector, "--data", images, "--out", out, "--pictures", 1)
    assert run("predict", *given) == 0
    found, _ = detect(model, sorted(map(str, images.iterdir())))
    content = json.loads((out / "predictions.json").read_text())
    masks = [mask for one in found for mask in one.masks or ()]
    assert len(masks) == len(content["annotations"]) > 20
    for note, mask in zip(content["annotations"], masks, strict=True):
        drawn = coco.decode(note["segmentation"])
        assert drawn.shape == (40, 60)
        assert np.array_equal(drawn, mask_of_runs(mask.run_lengths(), (40, 60)))
        assert note["area"] == drawn.sum()
    assert len({note["area"] for note in content["annotations"]}) > 10
    again = load_boxes(images, out / "predictions.json", with_shapes=True)
    shapes = {
        shape
        for one in (*again.train, *again.val, *again.test)
        for shape in one.shapes
        if shape is not None
    }
    assert shapes == {mask for mask in masks if mask.area}
    assert len(list((out / "pictures").rglob("*.png"))) == 1


@pytest.mark.gpu
@pytest.mark.slow
def test_a_segmenter_is_trained_and_reported(segmenter: Path) -> None:
    results = json.loads((segmenter / "results.json").read_text())
    assert set(results["test"]) == {"miou", "dice", "accuracy"}
    assert results["classes"][0] == "background"
    assert len(results["classes"]) == 11
    for name in ("test.png", "per_class.png", "curves.png", "confusion.png"):
        assert (segmenter / name).stat().st_size > 3000, name


@pytest.mark.slow
def test_predict_writes_masks_of_the_images_size(
    segmenter: Path, sample: Path, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    Image.new("RGB", (150, 70), "red").save(tmp_path / "data" / "red.png")
    Image.new("RGB", (150, 70), "red").save(tmp_path / "data" / "red.jpg")
    out = tmp_path / "out"
    data = ("--data", sample / "labelled" / "test", tmp_path / "data")
    model = segmenter / "model"
    assert run("predict", "--model", model, *data, "--out", out, "--pictures", 2) == 0
    masks = sorted((out / "masks").rglob("*.png"))
    assert len(masks) == 12
    sizes = {Image.open(mask).size for mask in masks}
    assert sizes == {(48, 48), (150, 70)}
    assert all(Image.open(mask).mode == "P" for mask in masks)
    assert max(int(np.asarray(Image.open(mask)).max()) for mask in masks) <= 10
    assert len(list((out / "pictures").rglob("*.png"))) == 2


@pytest.mark.slow
def test_explicit_folders_do_as_well_as_recognized_ones(
    sample: Path, encoder: Path, tmp_path: Path
) -> None:
    for task, where in (("detection", "annotations"), ("segmentation", "masks")):
        result = vissl_lite.finetune(
            data=str(sample / "labelled"), out=str(tmp_path / task), encoder=str(encoder),
            task=task,  # type: ignore[arg-type]
            annotations=str(sample / where), epochs=1, fraction=0.5, num_workers=0,
        )  # fmt: skip
        results = json.loads((result.run / "results.json").read_text())
        assert (results["train_images"], results["test_images"]) == (10, 10)


@pytest.mark.slow
def test_several_labels_an_image(labelled: Path, encoder: Path, tmp_path: Path) -> None:
    rows = [("path", "labels", "split")]
    for part in ("train", "test"):
        for path in sorted((labelled / part).rglob("*.png")):
            color = path.parent.name
            also = "|warm" if color == "red" else ""
            rows.append((str(path), "" if color == "blue" else color + also, part))
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    out = tmp_path / "run"
    common = ("--encoder", encoder, "--data", tmp_path / "labels.csv", "--out", out)
    options = ("--epochs", 12, "--batch_size", 9, "--class_weights", "balanced",
               "--frozen_norm", "true")  # fmt: skip
    with with_pictures():
        assert run("finetune", *common, *options, "--num_workers", 0) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["classes"] == ["green", "red", "warm"]
    assert results["test"]["map"] > 0.8
    assert set(results["test"]) == {"map", "auroc", "macro_f1"}
    assert (out / "test.png").stat().st_size > 3000
    predictions = tmp_path / "predictions"
    assert run("predict", "--model", out, "--data", labelled / "test", "--out", predictions) == 0
    with (predictions / "predictions.csv").open(newline="") as file:
        (first, *_) = csv.DictReader(file)
    assert list(first) == ["path", "labels", "green", "red", "warm"]
    assert sum(float(first[name]) for name in ("green", "red", "warm")) != pytest.approx(1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--task", "detection", "--shots", "3"], "--shots is for --task classification"),
        (["--task", "classification", "--detector", "fcos"], "--detector is for --task detection"),
        (["--task", "segmentation", "--label_smoothing", "0.1"], "--label_smoothing is for"),
        (["--task", "detection", "--class_weights", "balanced"], "classification or segmentation"),
        (["--task", "segmentation", "--monitor", "top1"], "--monitor top1: there are"),
        (["--task", "detection", "--epochs", "3", "--max_time", "60"], "not both"),
        (["--task", "segmentation", "--class_weights.starr", "2"], "star"),
        (["--task", "detection", "--batch_size", "21"], "training part: 20 images"),
        (["--task", "detection", "--annotations", "/nowhere"], "/nowhere"),
        (["--task", "tracking"], "--task tracking is none of classification, detection, segm"),
        (
            ["--task", "detection", "--detector", "yolo"],
            "is none of fcos, retinanet, faster_rcnn, mask_rcnn",
        ),
        (["--task", "classification", "--multi_scale"], "--multi_scale is for --task detection"),
        (["--task", "classification", "--class_weights", "odd"], "odd"),
    ],
)
def test_what_a_task_can_not_take_is_one_line(
    words: list[str], said: str, sample: Path, encoder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "run"
    assert run("finetune", "--encoder", encoder, "--data", sample, "--out", out, *words) == 2
    message = capsys.readouterr().err.strip().splitlines()
    assert len(message) == 1
    assert said in message[0]
    assert not out.exists()
