from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vissl_lite.data.labeled_views import BoxView, box_pipeline
from vissl_lite.encoders.encoder import Encoder, build_encoder
from vissl_lite.errors import UserError
from vissl_lite.optim import OptimizerSettings
from vissl_lite.transfer.detection import metrics
from vissl_lite.transfer.detection.data import BoxedImage, LabelledBoxes
from vissl_lite.transfer.detection.metrics import best_threshold, match_boxes, score_detector
from vissl_lite.transfer.detection.model import (
    Detections,
    Detector,
    detect,
    fit_into,
    load_detector,
    save_detector,
)
from vissl_lite.transfer.detection.options import DetectorName, DetectorSettings
from vissl_lite.transfer.detection.training import (
    BoxDataset,
    build_detector,
    choose_threshold,
    rescale_batch,
    train_detector,
)
from vissl_lite.transfer.sources.reading_log import ReadingLog
from vissl_lite.transfer.tasks import TASKS


def squares(folder: Path, count: int, seed: int) -> list[BoxedImage]:
    """Images of 64 pixels with a red and possibly a blue square on gray noise."""
    folder.mkdir()
    random = np.random.default_rng(seed)
    boxed = []
    for index in range(count):
        image = random.integers(90, 140, (64, 64, 3), dtype=np.uint8)
        boxes, labels = [], []
        for label in range(int(random.integers(1, 3))):
            side = int(random.integers(14, 26))
            x, y = (int(v) for v in random.integers(0, (32 - side // 2, 64 - side)))
            x += 32 * label if side < 32 else 0
            x = min(x, 64 - side)
            image[y : y + side, x : x + side] = (220, 20, 20) if label == 0 else (20, 20, 220)
            boxes.append([x, y, x + side, y + side])
            labels.append(label)
        path = folder / f"{index}.png"
        Image.fromarray(image).save(path)
        ignored = np.zeros(len(boxes), dtype=bool)
        boxed.append(
            BoxedImage(str(path), (64, 64), np.array(boxes, np.float32), np.array(labels), ignored)
        )
    return boxed


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> LabelledBoxes:
    folder = tmp_path_factory.mktemp("squares")
    train, val, test = (
        squares(folder / name, count, seed)
        for seed, (name, count) in enumerate((("train", 24), ("val", 4), ("test", 8)))
    )
    return LabelledBoxes(["red", "blue"], train, val, test, ReadingLog("data"))


SETTINGS = DetectorSettings(
    detector="fcos",  # the fastest on a CPU
    epochs=20,
    batch_size=8,
    frozen_norm=False,
    optimizer=OptimizerSettings(lr=4e-3),
    min_crop_scale=0.8,
)


def trained(encoder: Encoder, data: LabelledBoxes, settings: DetectorSettings) -> Detector:
    detector = build_detector(encoder, data, settings)
    train_detector(detector, data, settings)
    choose_threshold(detector, data)
    return detector


@pytest.mark.parametrize(("boxes", "ignored"), [(1000, 0), (1001, 0), (1001, 1)])
def test_more_boxes_than_a_detector_returns_are_warned_of(
    boxes: int, ignored: int, data: LabelledBoxes, caplog: pytest.LogCaptureFixture
) -> None:
    crowd = BoxedImage(
        "crowd.png", (64, 64), np.tile(np.float32([1, 1, 9, 9]), (boxes, 1)),
        np.zeros(boxes, np.int64), np.arange(boxes) < ignored,
    )  # fmt: skip
    crowded = replace(data, train=[*data.train, crowd])
    TASKS["detection"].check(build_encoder("test_resnet", 64), crowded, SETTINGS)
    codes = [getattr(record, "code", "") for record in caplog.records]
    assert codes == ["data.many_boxes"] * (boxes - ignored > 1000)


@pytest.mark.slow
def test_learns_and_is_the_same_after_saving_and_loading(
    data: LabelledBoxes, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    encoder = build_encoder("test_resnet", 64)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    detector = trained(encoder, replace(data, val=[]), SETTINGS)
    assert all(torch.equal(before[name], t) for name, t in encoder.state_dict().items())
    scores = score_detector(detector, data.test)
    assert scores.map_50 > 0.4
    assert set(scores.per_class) == {"red", "blue"}
    assert 0.05 <= detector.threshold <= 1
    save_detector(detector, tmp_path / "model", {"encoder": "random"})
    loaded = load_detector(tmp_path / "model")
    classes = loaded.classes
    assert classes == data.classes
    assert loaded.threshold == detector.threshold
    paths = [image.path for image in data.test]
    for one, other in zip(detect(detector, paths)[0], detect(loaded, paths)[0], strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", ["fcos", "retinanet", "faster_rcnn"])
def test_every_weight_to_be_trained_gets_a_gradient(
    kind: DetectorName, data: LabelledBoxes
) -> None:
    settings = replace(SETTINGS, detector=kind)
    detector = build_detector(build_encoder("test_vit", 64), data, settings).train()
    target = {"boxes": torch.tensor([[4.0, 4, 30, 40]]), "labels": torch.tensor([1])}
    losses = detector.losses(torch.rand(1, 3, 64, 64), [target])
    torch.stack(list(losses.values())).sum().backward()
    trained = {name: p for name, p in detector.named_parameters() if p.requires_grad}
    assert not [name for name, parameter in trained.items() if parameter.grad is None]


@pytest.mark.slow
def test_frozen_leaves_the_encoder_as_it_was(data: LabelledBoxes) -> None:
    encoder = build_encoder("test_resnet", 64)
    settings = DetectorSettings(detector="fcos", epochs=1, batch_size=8, frozen=True)
    detector = trained(encoder, data, settings)
    before = encoder.state_dict()
    assert all(torch.equal(before[name], t) for name, t in detector.encoder.state_dict().items())


@pytest.mark.slow
def test_frozen_norms_do_not_change_after_validation(data: LabelledBoxes) -> None:
    encoder = build_encoder("test_resnet", 64)
    settings = DetectorSettings(
        detector="fcos", epochs=3, batch_size=8, frozen_norm=True, pretrained=True
    )
    detector = trained(encoder, data, settings)
    before = encoder.state_dict()
    changed = {n for n, t in detector.encoder.state_dict().items() if not torch.equal(before[n], t)}
    assert changed
    assert not [name for name in changed if "running" in name or "bn" in name]


def test_boxes_follow_the_view_and_ignored_ones_are_left_out(data: LabelledBoxes) -> None:
    one = data.train[0]
    ignored = np.ones(len(one.boxes), dtype=bool)
    ignored[0] = False
    partly = BoxedImage(one.path, one.size, one.boxes, one.labels, ignored)
    dataset = BoxDataset([partly], (64, 64), DetectorSettings(upright=False, min_crop_scale=0.5))
    checked = 0
    for epoch in range(20):
        item = dataset[epoch, 0]
        boxes, labels = item.target
        assert labels.tolist() in ([], [0])
        for x1, y1, x2, y2 in boxes.round().int().tolist():
            middle = item.views[0][(y1 + y2) // 2, (x1 + x2) // 2].astype(int)
            assert middle[0] > middle[2] + 60  # still on the red square
            checked += 1
    assert checked > 10


def test_boxes_of_a_reduced_photograph_are_scaled_along_each_side(tmp_path: Path) -> None:
    Image.new("RGB", (128, 17)).save(tmp_path / "a.jpg")  # read as 64 by 9 pixels
    boxes = np.array([[0, 0, 128, 17]], np.float32)
    one = BoxedImage(str(tmp_path / "a.jpg"), (17, 128), boxes, np.array([0]), np.array([False]))
    dataset = BoxDataset([one], (8, 64), DetectorSettings(detector="fcos", min_crop_scale=1.0))
    (box,) = dataset[0, 0].target[0].tolist()
    assert box == pytest.approx([0, 0, 57, 8], abs=0.1)


@pytest.mark.parametrize("upright", [True, False])
@pytest.mark.parametrize(
    ("shape", "canvas"),
    [((40, 90), (64, 64)), ((90, 40), (64, 64)), ((320, 200), (64, 64)), ((60, 96), (64, 96))],
)
def test_views_are_resized_and_padded_as_in_evaluation(
    shape: tuple[int, int], canvas: tuple[int, int], upright: bool
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    turned = [np.rot90(one, turns) for one in (image, image[:, ::-1]) for turns in range(4)]
    fitted = [fit_into(one, canvas) for one in turned]
    view = BoxView(box_pipeline(canvas, 1.0, upright), colors=None)
    box, seen = np.array([[10, 20, 30, 38]], np.float32), set()
    for index in range(12):
        made, (found,), _ = view(image, box, np.array([0]), 0, 0, index)
        (which,) = [n for n, (one, _) in enumerate(fitted) if np.array_equal(one, made)]
        if which == 0:
            np.testing.assert_allclose(found, box[0] * fitted[0][1], atol=0.5)
        seen.add(which)
    assert len(seen) > 1


@pytest.mark.slow
def test_an_image_without_boxes_can_be_trained_on(data: LabelledBoxes) -> None:
    one = data.train[0]
    empty = BoxedImage(
        one.path, one.size, np.empty((0, 4), np.float32), np.empty(0, np.int64), np.empty(0, bool)
    )
    item = BoxDataset([empty], (64, 64), DetectorSettings())[0, 0]
    assert item.target[0].shape == (0, 4)
    some = LabelledBoxes(data.classes, [empty, *data.train[:7]], [], data.test, ReadingLog("data"))
    trained(build_encoder("test_resnet", 64), some, DetectorSettings(epochs=1, batch_size=8))


def test_boxes_are_rescaled_with_their_images() -> None:
    image = torch.zeros(1, 3, 128, 160)
    image[:, :, 32:64, 80:120] = 1
    box, shapes = torch.tensor([80.0, 32, 120, 64]), set()
    for _ in range(30):
        resized, stretch = rescale_batch(image)
        shapes.add(tuple(resized.shape[-2:]))
        ys, xs = (resized[0, 0] > 0.5).nonzero(as_tuple=True)
        edges = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        assert (edges - box * stretch).abs().max() <= 1
    assert len(shapes) > 2
    assert all(side % 32 == 0 for shape in shapes for side in shape)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
def test_training_at_several_scales(data: LabelledBoxes, backbone: str) -> None:
    settings = DetectorSettings(epochs=1, batch_size=8, multi_scale=True)
    trained(build_encoder(backbone, 64), replace(data, val=[]), settings)


def answers(images: list[BoxedImage]) -> list[Detections]:
    return [Detections(i.boxes, np.full(len(i.boxes), 0.9, np.float32), i.labels) for i in images]


def test_map_of_perfect_wrong_and_shifted_boxes(
    data: LabelledBoxes, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = data.test
    good = np.ones(len(images), dtype=bool)

    def set_detections(detections: list[Detections]) -> None:
        monkeypatch.setattr(metrics, "detect", lambda *_: (detections, good))

    # nothing else is used, as detect is replaced
    detector: Any = SimpleNamespace(classes=data.classes, max_boxes=100)
    set_detections(answers(images))
    perfect = score_detector(detector, images)
    assert perfect.metrics == {"map": 1.0, "map_50": 1.0}
    set_detections([Detections(one.boxes, one.scores, 1 - one.labels) for one in answers(images)])
    assert score_detector(detector, images).map == 0.0
    # boxes shifted by a fifth of their width have an IoU of two thirds: correct at 0.5, not at 0.75
    shifted = []
    for one in answers(images):
        shift = 0.2 * (one.boxes[:, 2] - one.boxes[:, 0])
        boxes = one.boxes + np.stack([shift, 0 * shift, shift, 0 * shift], axis=1)
        shifted.append(one._replace(boxes=boxes.astype(np.float32)))
    set_detections(shifted)
    near = score_detector(detector, images)
    assert near.map_50 == 1.0
    assert near.map == pytest.approx(0.4)  # thresholds 0.5, 0.55, 0.6, 0.65 of ten
    # ignored boxes are neither false negatives nor false positives
    hidden = [
        BoxedImage(i.path, i.size, i.boxes, i.labels, np.arange(len(i.boxes)) > 0) for i in images
    ]
    set_detections(answers(images))
    assert score_detector(detector, hidden).map == 1.0


def test_the_threshold_is_where_f1_is_best() -> None:
    boxes = np.array([[0, 0, 10, 10], [20, 20, 30, 30]], np.float32)
    truth = BoxedImage("x", (40, 40), boxes, np.array([0, 0]), np.zeros(2, dtype=bool))
    found = Detections(
        np.array([[0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30], [5, 20, 9, 30]], np.float32),
        np.array([0.9, 0.7, 0.6, 0.3], np.float32),
        np.zeros(4, np.int64),
    )
    # correct, a duplicate, correct, wrong: F1 2/3, 1/2, 4/5, 2/3
    assert best_threshold([found], [truth]) == pytest.approx(0.6)
    nothing = Detections(np.empty((0, 4), np.float32), np.empty(0, np.float32), np.empty(0, int))
    assert best_threshold([nothing], [truth]) == 0.5


def test_boxes_of_ignored_objects_are_neither_right_nor_wrong() -> None:
    boxes = np.array([[0, 0, 10, 10], [20, 20, 40, 40]], np.float32)
    truth = BoxedImage("x", (40, 40), boxes, np.array([0, 0]), np.array([False, True]))
    found = Detections(
        np.array(
            [[20, 20, 30, 30], [21, 21, 31, 31], [0, 0, 10, 10], [22, 22, 40, 40]], np.float32
        ),
        np.array([0.9, 0.8, 0.7, 0.6], np.float32),
        np.array([0, 0, 0, 1]),
    )
    empty = np.empty((0, 4), np.float32)
    none = BoxedImage("y", (40, 40), empty, np.empty(0, np.int64), np.zeros(0, bool))
    scores, right, images, labels = match_boxes([found, found], [truth, none])
    # the first two are of the ignored object, the last is of another class
    np.testing.assert_allclose(scores, [0.7, 0.6, 0.9, 0.8, 0.7, 0.6])
    assert right.tolist() == [True] + [False] * 5
    assert images.tolist() == [0, 0, 1, 1, 1, 1]
    assert labels.tolist() == [0, 1, 0, 0, 0, 1]
    assert best_threshold([found], [truth]) == pytest.approx(0.7)
    nothing = Detections(empty, np.empty(0, np.float32), np.empty(0, np.int64))
    assert [len(one) for one in match_boxes([nothing], [truth])] == [0, 0, 0, 0]


def test_errors_of_damaged_folders_and_large_batches(data: LabelledBoxes, tmp_path: Path) -> None:
    detector = Detector(build_encoder("test_resnet", 64), ["a", "b"], "fcos", (64, 64))
    save_detector(detector, tmp_path, {})
    (tmp_path / "head.json").write_text('{"task": "detection"}')
    with pytest.raises(UserError, match="is damaged"):
        load_detector(tmp_path)
    with pytest.raises(UserError, match="larger than the training part: 24 images"):
        trained(detector.encoder, data, DetectorSettings(batch_size=100))
