import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import vissl_lite
from vissl_lite import inference
from vissl_lite.cli import main
from vissl_lite.commands import export as command
from vissl_lite.data.images import read_image
from vissl_lite.encoders.encoder import Encoder, build_encoder
from vissl_lite.encoders.folder import load_encoder, save_encoder, save_model
from vissl_lite.errors import UserError
from vissl_lite.transfer.detection.masks import paste_mask
from vissl_lite.transfer.detection.model import Detector, detect, fit_into, save_detector
from vissl_lite.transfer.detection.options import DetectorName
from vissl_lite.transfer.segmentation import task as segmentation
from vissl_lite.transfer.tasks import find_model


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("run")
    save_encoder(build_encoder("test_resnet", 32), folder / "encoder", {})
    return folder


@pytest.fixture(scope="module")
def tuned(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tuned"
    options = ["--encoder", "random:test_resnet", "--image_size", "32", "--epochs", "1",
               "--num_workers", "0"]  # fmt: skip
    assert main(["finetune", "--data", str(labelled), "--out", str(out), *options]) == 0
    return out


def run(file: Path, images: np.ndarray) -> np.ndarray:
    """The one output of an ONNX file."""
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images})
    return np.asarray(found)


def outspoken(kind: DetectorName) -> Detector:
    """A detector with random weights so large that it finds boxes of all classes anywhere."""
    torch.manual_seed(0)
    detector = Detector(build_encoder("test_resnet", 64), ["a", "b", "c"], kind, (64, 96)).eval()
    heads = detector.net.roi_heads.box_predictor
    heads.cls_score.weight.data *= 5
    heads.bbox_pred.weight.data *= 10
    detector.net.rpn.head.cls_logits.weight.data *= 50
    return detector


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main(["export", *map(str, arguments)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    return shown.err


@pytest.mark.slow
def test_an_encoder_takes_images_as_they_are_decoded(
    encoder: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Broken images to check by are passed over; and the exporter keeps quiet."""
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "a.jpg").write_bytes(b"nothing")
    sources = [str(tmp_path / "given"), str(photos / "a")]
    out = tmp_path / "new" / "encoder.onnx"
    capfd.readouterr()
    assert (
        main(["export", "--encoder", str(encoder), "--out", str(out), "--check_data", *sources])
        == 0
    )
    shown = capfd.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 2
    assert "checked on 4 given images" in shown.err
    assert [path.name for path in out.parent.iterdir()] == ["encoder.onnx"]

    content = onnx.load(out)
    (images,), (features,) = content.graph.input, content.graph.output
    assert (images.name, features.name) == ("images", "features")
    assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    facts = {fact.key: fact.value for fact in content.metadata_props}
    assert facts == {"task": "encoder", "size": "32", "version": vissl_lite.__version__}

    pixels = np.stack([read_image(photos / "a" / f"{i:02}.jpg")[:32, :32] for i in (1, 3, 5, 7, 9)])
    loaded = load_encoder(encoder).eval()
    mean, std = torch.tensor(loaded.mean), torch.tensor(loaded.std)
    with torch.no_grad():
        normal = (torch.from_numpy(pixels) / 255 - mean) / std
        expected = loaded(normal.permute(0, 3, 1, 2)).numpy()
    found = run(out, pixels.transpose(0, 3, 1, 2))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.slow
def test_a_vit_at_another_size(tmp_path: Path) -> None:
    save_encoder(build_encoder("test_vit", 32), tmp_path / "vit", {})
    out = tmp_path / "vit.onnx"
    result = vissl_lite.export(out=str(out), encoder=str(tmp_path / "vit"), image_size=64)
    assert result.difference < 1e-4
    assert run(out, np.zeros((5, 3, 64, 64), np.uint8)).shape == (5, 64)


@pytest.mark.slow
def test_a_classifier_gives_the_probabilities_of_predict(
    tuned: Path, labelled: Path, tmp_path: Path
) -> None:
    out = tmp_path / "classifier.onnx"
    result = vissl_lite.export(out=str(out), model=str(tuned))
    assert (result.path, result.task) == (out, "classification")
    facts = {fact.key: fact.value for fact in onnx.load(out).metadata_props}
    assert json.loads(facts["classes"]) == ["blue", "green", "red"]
    assert (facts["task"], facts["multi_label"]) == ("classification", "false")

    file = labelled / "test" / "red" / "3.png"
    (found,) = run(out, read_image(file).transpose(2, 0, 1)[None])
    assert found.sum() == pytest.approx(1, abs=1e-5)
    predicted = vissl_lite.predict(
        model=str(tuned), data=str(file), out=str(tmp_path / "predictions")
    )
    _, name, probability = predicted.predictions.read_text().splitlines()[1].split(",")
    assert ["blue", "green", "red"][found.argmax()] == name
    assert found.max() == pytest.approx(float(probability), abs=0.02)  # predict may use bf16


def test_several_labels_have_a_probability_each(tmp_path: Path) -> None:
    start = build_encoder("test_resnet", 32)
    start.model.reset_classifier(3)
    save_model(start, tmp_path / "model", {"multi_label": True}, ["a", "b", "c"])
    task, folder = find_model(tmp_path)
    made = task.export_model(task.load(folder), folder)
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    shares = made.layers.eval()(images)
    logits = made.layers[1](made.layers[0](images))
    torch.testing.assert_close(shares, logits.sigmoid())
    assert made.about["multi_label"] == "true"


class SmallSegmenter(nn.Module):
    """Stands in for one with a pyramid, which takes the exporter a while."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.classes: list[str] = []
        self.encoder, self.classify = encoder, nn.Conv2d(encoder.map_features, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        coarse = self.classify(self.encoder.stages(images)[-1])
        return nn.functional.interpolate(coarse, images.shape[-2:], mode="bilinear")


@pytest.mark.slow
def test_a_segmenter_takes_images_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "head.json").write_text('{"task": "segmentation", "classes": ["a", "b"]}')
    segmenter = SmallSegmenter(build_encoder("test_resnet", 32))
    segmenter.classes = ["a", "b", "c", "d"]
    monkeypatch.setattr(segmentation, "load_segmenter", lambda folder: segmenter)
    out = tmp_path / "segmenter.onnx"
    assert vissl_lite.export(out=str(out), model=str(tmp_path)).task == "segmentation"
    for height, width in ((32, 32), (45, 70)):
        found = run(out, np.full((3, 3, height, width), 90, np.uint8))
        assert found.shape == (3, 4, height, width)
        np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encoder", "model"])
def test_a_copy_in_timms_format(kind: str, encoder: Path, tuned: Path, tmp_path: Path) -> None:
    run, out = (encoder if kind == "encoder" else tuned), tmp_path / "copy"
    arguments = [f"--{kind}", str(run), "--format", "safetensors", "--out", str(out)]
    assert main(["export", *arguments]) == 0
    assert {file.name for file in out.iterdir()} == {"config.json", "model.safetensors"}
    model = timm.create_model(f"local-dir:{out}", pretrained=True)
    for name, tensor in load_file(run / kind / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert model.num_classes == (0 if kind == "encoder" else 3)
    assert main(["export", *arguments]) == 2
    assert main(["export", *arguments, "--overwrite"]) == 0


def test_of_a_folder_of_the_hub_the_encoder_is_written(tmp_path: Path) -> None:
    """Its classes have no names, so it is not a model."""
    hub, out = tmp_path / "hub", tmp_path / "copy"
    timm.models.save_for_hf(timm.create_model("test_resnet"), hub, safe_serialization=True)
    vissl_lite.export(encoder=hub, format="safetensors", out=out)
    model = timm.create_model(f"local-dir:{out}", pretrained=True)
    assert model.num_classes == 0
    for name, tensor in load_encoder(hub).model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


# The first pixels of an image, as many as test_resnet has features.
NO_ENCODER = """<ir_version: 8, opset_import: ["": 18]>
pixels (uint8[batch, 3, 32, 32] images) => (float[batch, 96] features) {
    flat = Flatten(images)
    start = Constant<value_ints = [0]>()
    end = Constant<value_ints = [96]>()
    axis = Constant<value_ints = [1]>()
    some = Slice(flat, start, end, axis)
    features = Cast<to = 1>(some)
}"""


@pytest.mark.parametrize("format", ["onnx", "safetensors"])
def test_outputs_that_are_not_torchs_are_not_written(
    format: str, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the exporter, or timm, had made something else of the encoder."""
    create, other = timm.create_model, build_encoder("test_resnet", 32).model

    def create_other(name: str, **arguments: Any) -> Any:
        return other if name.startswith("local-dir:") else create(name, **arguments)

    monkeypatch.setattr(timm, "create_model", create_other)
    monkeypatch.setattr(command, "_trace", lambda made: onnx.parser.parse_model(NO_ENCODER))
    out = tmp_path / "new" / ("file.onnx" if format == "onnx" else "folder")
    with pytest.raises(RuntimeError, match=r"differs from torch by .* nothing was written"):
        vissl_lite.export(out=str(out), encoder=str(encoder), format=format)  # type: ignore[arg-type]
    assert not any(tmp_path.iterdir())


def test_an_encoder_that_has_diverged(encoder: Path, tmp_path: Path) -> None:
    broken = load_encoder(encoder)
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    save_encoder(broken, tmp_path / "encoder", {})
    with pytest.raises(UserError, match="its training has diverged"):
        vissl_lite.export(
            out=str(tmp_path / "out"), encoder=str(tmp_path / "encoder"), format="safetensors"
        )
    assert not (tmp_path / "out").exists()


def test_what_can_not_be_exported(
    encoder: Path, tuned: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--out", tmp_path / "x.onnx")
    folder = ("--out", tmp_path / "x", "--format", "safetensors")
    for given, message in (
        (out, "give what to export: --encoder or --model"),
        ((*out, "--encoder", encoder, "--model", tuned), "exactly one of them"),
        ((*out, "--encoder", tmp_path / "gone"), "no encoder at"),
        ((*out, "--model", tmp_path / "gone"), "no model at"),
        (
            (*out, "--encoder", encoder, "--image_size", 0),
            "--image_size 0 must be from 8 to 4096 pixels",
        ),
        ((*out, "--encoder", encoder, "--check_data", tmp_path / "gone"), "does not exist"),
        ((*out, "--encoder", "random:test_vit", "--image_size", 40), "40 pixels"),
        ((*folder, "--encoder", "random:test_vit"), "copies an encoder folder"),
        ((*folder, "--encoder", encoder, "--image_size", 64), "--image_size is for --format onnx"),
        ((*folder, "--encoder", tuned / "model"), "holds a classifier too: export it with --model"),
        (("--out", photos, "--encoder", encoder), "give a name that ends in .onnx"),
        (("--out", tmp_path / "x", "--encoder", encoder), "give a name that ends in .onnx"),
        (("--out", photos, *folder[2:], "--encoder", encoder), "holds other files"),
        ((*out, *folder[2:], "--encoder", encoder), "for safetensors give a folder"),
        (("--out", photos / "a" / "01.jpg" / "x.onnx", "--encoder", encoder), "is a file"),
    ):
        assert message in refused(capsys, *given)
        assert not any(tmp_path.iterdir())


def test_a_size_that_does_not_suit_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_encoder(build_encoder("test_vit", 32), tmp_path / "vit", {})
    given = ("--encoder", tmp_path / "vit", "--out", tmp_path / "x.onnx", "--image_size", 40)
    assert "--image_size 40 does not suit the model: " in refused(capsys, *given)


def test_a_file_that_is_there_stays(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.onnx"
    out.write_text("mine")
    assert "x.onnx exists: give a new file, or --overwrite" in refused(
        capsys, "--encoder", encoder, "--out", out
    )
    assert out.read_text() == "mine"


def test_a_damaged_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "head.json").write_text("{")
    assert "is not JSON that can be read" in refused(
        capsys, "--model", tmp_path, "--out", tmp_path / "x.onnx"
    )


@pytest.mark.slow
def test_a_detector_gives_the_boxes_and_masks_of_predict(
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # as the ONNX file computes
    monkeypatch.setattr(inference, "cpu_gains_from_bf16", lambda: False)
    detector = outspoken("mask_rcnn")
    detector.net.roi_heads.mask_predictor.mask_fcn_logits.weight.data *= 50
    save_detector(detector, tmp_path / "model", {})
    out = tmp_path / "detector.onnx"
    images = photos / "a"  # 40 by 48 pixels, fitted into 64 by 96
    given = ("--model", tmp_path, "--out", out)
    assert main(["export", *map(str, given), "--check_data", str(images)]) == 0
    assert "images of 64 x 96 pixels" in capsys.readouterr().err
    facts = {fact.key: fact.value for fact in onnx.load(out).metadata_props}
    assert (facts["task"], facts["size"]) == ("detection", "64 x 96")
    assert float(facts["threshold"]) == detector.threshold
    paths = sorted(str(path) for path in images.iterdir())[:5]
    expected, _ = detect(detector, paths)
    fitted = [fit_into(read_image(path), (64, 96)) for path in paths]
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    batch = np.stack([image for image, _ in fitted]).transpose(0, 3, 1, 2)
    names = ["boxes", "scores", "labels", "masks"]
    boxes, scores, labels, masks = session.run(names, {"images": batch})
    assert boxes.shape == (5, 100, 4)
    assert masks.shape == (5, 100, 28, 28)
    sizes = set()
    for index, (one, (_, scale)) in enumerate(zip(expected, fitted, strict=True)):
        assert len(one.scores) > 3
        assert one.masks is not None
        for box, score, label, mask in zip(*one[:3], one.masks, strict=True):
            found = (boxes[index] / scale).clip(0, (48, 40, 48, 40))
            near = (labels[index] == label) & (np.abs(scores[index] - score) < 1e-4)
            near &= np.abs(found - box).max(axis=1) < 0.01
            pasted = [
                paste_mask(masks[index, row], boxes[index, row] / scale, (40, 48)).area
                for row in np.flatnonzero(near)
            ]
            assert pasted
            assert min(abs(area - mask.area) for area in pasted) <= 2  # pixels at the contour
            sizes.add(mask.area)
    assert len(sizes) > 5
    error = refused(capsys, *given, "--overwrite", "--image_size", 64)
    assert "a detector has the image size that it was trained at" in error


def test_a_segmenter_is_no_timm_folder(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "head.json").write_text('{"task": "segmentation", "classes": ["a", "b"]}')
    segmenter = SmallSegmenter(load_encoder(encoder))
    segmenter.classes = ["a"]
    monkeypatch.setattr(segmentation, "load_segmenter", lambda folder: segmenter)
    with pytest.raises(UserError, match="is already in timm's format"):
        vissl_lite.export(out=str(tmp_path / "x"), model=str(tmp_path), format="safetensors")


def test_packages_that_are_missing(
    encoder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    error = refused(capsys, "--encoder", encoder, "--out", tmp_path / "x.onnx")
    assert "pip install 'vissl-lite[export]'" in error
