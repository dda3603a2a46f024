from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vissl_lite.data.turns import Turn, turns_for
from vissl_lite.encoders.encoder import Encoder, build_encoder
from vissl_lite.errors import UserError
from vissl_lite.transfer.detection.data import BoxedImage
from vissl_lite.transfer.detection.model import (
    TWO_STAGES,
    Detections,
    Detector,
    choose_canvas,
    choose_max_boxes,
    detect,
    detect_in_batches,
    fit_into,
    load_detector,
    save_detector,
)
from vissl_lite.transfer.detection.options import DetectorName

KINDS: tuple[DetectorName, ...] = ("fcos", "retinanet", "faster_rcnn", "mask_rcnn")


def shaped(height: int, width: int) -> BoxedImage:
    none = np.empty(0)
    return BoxedImage("x.jpg", (height, width), none.reshape(0, 4), none, none.astype(bool))


def make(kind: DetectorName = "fcos", backbone: str = "test_resnet") -> Detector:
    torch.manual_seed(0)
    return Detector(build_encoder(backbone, 64), ["a", "b", "c"], kind, (64, 64))


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_finite_and_reach_the_encoder(kind: DetectorName, backbone: str) -> None:
    detector = make(kind, backbone).train()
    boxes = torch.tensor([[4.0, 4, 30, 40], [20, 10, 60, 60]])
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    targets = [{"boxes": boxes, "labels": torch.tensor([0, 2])}, none]
    for target in targets:  # which only Mask R-CNN uses
        count = len(target["boxes"])
        masks = torch.rand(count, 64, 64) < 0.5
        target |= {"masks": masks, "drawn": torch.ones(count, dtype=torch.bool)}
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector.losses(torch.rand(2, 3, 64, 64), targets)
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    first = next(detector.encoder.parameters()).grad
    assert first is not None
    assert first.abs().sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_classes_are_counted_from_zero(kind: DetectorName) -> None:
    detector = make(kind).eval()
    detector.net.score_thresh = 0.0
    if kind in TWO_STAGES:
        detector.net.roi_heads.score_thresh = 0.0
    with torch.no_grad():
        found = detector(torch.rand(1, 3, 64, 64))[0]
    assert set(found["labels"].tolist()) == {0, 1, 2}


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_and_scores_are_float32_under_bf16(kind: DetectorName) -> None:
    detector = make(kind).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = detector(images)
    names = ["boxes", "scores", *(["masks"] if kind == "mask_rcnn" else [])]
    assert all(one[name].dtype == torch.float32 for one in found for name in names)


def test_the_encoder_keeps_timms_names() -> None:
    detector = make()
    own = dict(build_encoder("test_resnet", 64).named_parameters())
    assert list(own) == [name for name, _ in detector.encoder.named_parameters()]


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
@pytest.mark.parametrize("kind", KINDS)
def test_proposals_but_not_regions_come_from_one_more_level(
    kind: DetectorName, backbone: str
) -> None:
    net = make(kind, backbone).net
    maps = list(net.backbone(torch.zeros(1, 3, 64, 64)).values())
    strides = net.backbone.pyramid.strides
    expected = strides if kind == "fcos" else [*strides, 64]
    assert [64 // level.shape[-1] for level in maps] == expected
    if kind == "faster_rcnn":
        torch.testing.assert_close(maps[-1], maps[-2][:, :, ::2, ::2])
        assert net.rpn.anchor_generator.sizes == tuple((4 * stride,) for stride in expected)
        assert len(net.roi_heads.box_roi_pool.featmap_names) == len(strides)


@pytest.mark.parametrize("kind", KINDS)
def test_sides_that_no_stride_divides(kind: DetectorName) -> None:
    torch.manual_seed(0)
    detector = Detector(build_encoder("test_resnet", 100), ["a"], kind, (68, 100), 2.5).train()
    target = {
        "boxes": torch.tensor([[4.0, 4, 90, 60]]),
        "labels": torch.tensor([0]),
        "masks": torch.ones(1, 68, 100, dtype=torch.uint8),
        "drawn": torch.tensor([True]),
    }
    losses = detector.losses(torch.rand(1, 3, 68, 100), [target])
    assert all(loss.isfinite() for loss in losses.values())


def test_regions_are_pooled_at_the_stride_of_a_vit_of_14_pixels() -> None:
    encoder = build_encoder("eva02_tiny_patch14_224", 56)
    with torch.device("meta"):
        detector = Detector(encoder, ["a"], "faster_rcnn", (56, 56))
    assert detector.net.roi_heads.box_roi_pool.scales == [1 / 7, 1 / 14, 1 / 28]


def test_the_anchors_and_the_number_of_boxes_are_saved(tmp_path: Path) -> None:
    encoder = build_encoder("test_resnet", 64)
    detector = Detector(encoder, ["a"], "faster_rcnn", (64, 64), anchor_scale=2.5, max_boxes=150)
    save_detector(detector, tmp_path, {})
    loaded = load_detector(tmp_path)
    sizes = ((10,), (20,), (40,), (80,), (160,))
    assert loaded.net.rpn.anchor_generator.sizes == sizes
    assert loaded.max_boxes == loaded.net.roi_heads.detections_per_img == 150
    head = tmp_path / "head.json"
    head.write_text(head.read_text().replace('"anchor_scale": 2.5', '"anchor_scale": 1e9'))
    with pytest.raises(UserError, match="anchor_scale is not a number from 2 to 8"):
        load_detector(tmp_path)


@pytest.mark.parametrize(("boxes", "returned"), [(50, 100), (60, 120), (700, 1000)])
def test_a_detector_returns_twice_as_many_boxes_as_an_image_has(boxes: int, returned: int) -> None:
    ignored = np.arange(boxes + 30) >= boxes
    crowd = replace(shaped(64, 64), boxes=np.zeros((boxes + 30, 4)), ignored=ignored)
    assert choose_max_boxes([shaped(64, 64), crowd]) == returned


@pytest.mark.slow
def test_the_canvas_has_the_shape_of_the_images() -> None:
    encoder = build_encoder("test_resnet", 128)
    assert choose_canvas([shaped(480, 640)] * 10, encoder) == (96, 128)
    assert choose_canvas([shaped(640, 480)] * 10, encoder) == (128, 96)
    assert choose_canvas([shaped(480, 640)] * 5 + [shaped(640, 480)] * 5, encoder) == (128, 128)


def test_a_vit_takes_the_shape_of_the_images_too() -> None:
    assert choose_canvas([shaped(50, 100)] * 10, build_encoder("test_vit", 64)) == (32, 64)


def test_fitting_keeps_the_shape_and_pads() -> None:
    image = np.full((20, 40, 3), 200, np.uint8)
    padded, scale = fit_into(image, (64, 64))
    assert scale == 1.6
    assert padded.shape == (64, 64, 3)
    assert (padded[:32] == 200).all()
    assert (padded[32:] == 114).all()


class _ConstantNet(torch.nn.Module):
    """Network that returns the same detections for each image."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.backbone = net.backbone

    def forward(self, images: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        boxes = torch.tensor([[8.0, 4, 24, 16], [40, 50, 60, 60], [0, 0, 64, 32]])
        scores, labels = torch.tensor([0.5, 0.9, 0.7]), torch.tensor([0, 1, 2])
        return [{"boxes": boxes, "scores": scores, "labels": labels}] * len(images)


def test_boxes_come_back_in_pixels_of_the_image_best_first(tmp_path: Path) -> None:
    detector = make()
    detector.net = _ConstantNet(detector.net)
    Image.new("RGB", (128, 64)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"broken")
    paths = [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    (found,), good = detect(detector, paths)
    assert good.tolist() == [True, False]
    sizes: list[tuple[int, int]] = []
    detect_in_batches(detector, paths, lambda _, __, some: sizes.extend(some))
    assert sizes == [(64, 128)]
    # the second box lies in the padding below the image
    assert found.labels.tolist() == [2, 0]
    assert found.boxes.tolist() == [[0, 0, 128, 64], [16, 8, 48, 32]]
    with pytest.raises(UserError, match="none of 1 images can be read"):
        detect(detector, paths[1:])


class _ColorNet(torch.nn.Module):
    """Network that finds the red rectangle (class 0) and the blue one (class 2) of an image."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.backbone = net.backbone
        self.shapes: list[torch.Size] = []

    def forward(self, images: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        self.shapes.append(images.shape)
        encoder: Encoder = self.backbone.encoder
        found = []
        for red, _, blue in encoder.denormalize(images).int():
            corners = []
            for excess in (red - blue, blue - red):
                rows, columns = (excess > 100).nonzero(as_tuple=True)
                low = columns.min(), rows.min()
                corners.append([*low, columns.max() + 1, rows.max() + 1])
            boxes, labels = torch.tensor(corners).float(), torch.tensor([0, 2])
            found.append({"boxes": boxes, "scores": torch.tensor([0.6, 0.8]), "labels": labels})
        return found


def detect_turned(detector: Detector, path: Path, turns: tuple[Turn, ...]) -> Detections:
    found: list[Detections] = []
    detect_in_batches(detector, [str(path)], lambda _, some, __: found.extend(some), turns=turns)
    return found[0]


@pytest.mark.parametrize("canvas", [(64, 64), (32, 64)])
def test_a_detector_that_turns_with_the_image_gives_the_same_boxes_with_turns(
    tmp_path: Path, canvas: tuple[int, int]
) -> None:
    detector = Detector(build_encoder("test_resnet", 64), ["a", "b", "c"], "fcos", canvas)
    detector.net = net = _ColorNet(detector.net)
    pixels = np.full((30, 64, 3), 40, np.uint8)
    pixels[4:9, 10:40, 0] = 250
    pixels[12:29, 50:63, 2] = 250
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = detect_turned(detector, tmp_path / "a.png", turns_for(upright=False))
    assert found.labels.tolist() == [2, 0]
    np.testing.assert_allclose(found.boxes, [[50, 12, 63, 29], [10, 4, 40, 9]], atol=1e-4)
    np.testing.assert_allclose(found.scores, [0.8, 0.6], atol=1e-6)
    # a quarter turn does not fit into a canvas that is not square
    assert len(net.shapes) == (8 if canvas[0] == canvas[1] else 4)


def test_a_box_that_only_one_turn_finds_loses_score(tmp_path: Path) -> None:
    detector = make()
    detector.net = _ConstantNet(detector.net)
    Image.new("RGB", (128, 64)).save(tmp_path / "a.png")
    found = detect_turned(detector, tmp_path / "a.png", turns_for(upright=True))
    assert found.labels.tolist() == [2, 0, 0]
    assert found.boxes.tolist() == [[0, 0, 128, 64], [16, 8, 48, 32], [80, 8, 112, 32]]
    np.testing.assert_allclose(found.scores, [0.7, 0.25, 0.25])
