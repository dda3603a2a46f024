import pytest
import torch

from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.transfer.detection.export import ExportableDetector, suppress
from vissl_lite.transfer.detection.model import TWO_STAGES, Detector
from vissl_lite.transfer.detection.options import DetectorName


def make_detector(
    kind: DetectorName, canvas: tuple[int, int] = (64, 96), max_boxes: int = 100
) -> Detector:
    """Detector with random weights so large that it detects many boxes of all classes."""
    torch.manual_seed(0)
    encoder = build_encoder("test_resnet", 64)
    detector = Detector(encoder, ["a", "b", "c"], kind, canvas, max_boxes=max_boxes).eval()
    net = detector.net
    if kind in TWO_STAGES:
        scale = {net.roi_heads.box_predictor.cls_score: 5, net.rpn.head.cls_logits: 50,
                 net.roi_heads.box_predictor.bbox_pred: 10, net.rpn.head.bbox_pred: 30}  # fmt: skip
    else:
        net.head.classification_head.cls_logits.bias.data.fill_(-1.0)
        scale = {net.head.classification_head.cls_logits: 30, net.head.regression_head.bbox_reg: 20}
    for layer, times in scale.items():
        layer.weight.data *= times
    return detector


@pytest.mark.parametrize(
    ("kind", "canvas", "max_boxes"),
    [
        ("fcos", (64, 96), 200),
        ("retinanet", (64, 96), 100),
        ("faster_rcnn", (64, 96), 100),
        ("faster_rcnn", (68, 100), 200),  # a canvas that no stride divides
        ("mask_rcnn", (64, 96), 100),
    ],
)
def test_detections_equal_those_of_the_detector(
    kind: DetectorName, canvas: tuple[int, int], max_boxes: int
) -> None:
    detector = make_detector(kind, canvas, max_boxes)
    images = torch.rand(3, 3, *canvas) * 4 - 2
    with torch.no_grad():
        expected = detector(images)
        boxes, scores, labels, *masks = ExportableDetector(detector)(images)
    assert len(masks) == (kind == "mask_rcnn")
    assert any(len(one["scores"]) > max_boxes - 80 for one in expected)
    for index, one in enumerate(expected):
        count = len(one["scores"])
        assert (scores[index, :count] > 0.05).all()
        assert all((what[index, count:] == 0).all() for what in (boxes, scores, labels, *masks))
        torch.testing.assert_close(scores[index, :count], one["scores"])
        # match one to one, as the order of scores that are equal up to rounding may differ
        unmatched = set(range(count))
        for row, (box, score, label) in enumerate(
            zip(one["boxes"], one["scores"], one["labels"], strict=True)
        ):
            near = (boxes[index, :count] - box).abs().amax(dim=1) < 1e-3 + 1e-4 * box.abs().max()
            alike = near & ((scores[index, :count] - score).abs() < 1e-4)
            same = unmatched & set(
                (alike & (labels[index, :count] == label)).nonzero()[:, 0].tolist()
            )
            assert same
            for cells in masks:
                assert cells.shape == (3, 100, 28, 28)
                found = cells[index, list(same)]
                assert ((found - one["masks"][row, 0]).abs().amax(dim=(1, 2)) < 1e-3).any()
            unmatched.remove(min(same))


@pytest.mark.parametrize("kind", ["fcos", "retinanet"])
def test_a_level_has_as_many_candidates_as_in_torchvision(kind: DetectorName) -> None:
    detector = make_detector(kind)
    detector.net.topk_candidates = 10
    images = torch.rand(1, 3, 64, 96) * 4 - 2
    with torch.no_grad():
        [expected] = detector(images)
        scores = ExportableDetector(detector)(images)[1]
    assert len(expected["scores"]) < 50
    torch.testing.assert_close(scores[scores > 0], expected["scores"])


@pytest.mark.slow
def test_an_image_does_not_depend_on_the_others_in_the_batch() -> None:
    model = ExportableDetector(make_detector("faster_rcnn"))
    images = torch.rand(2, 3, 64, 96) * 4 - 2
    with torch.no_grad():
        both, alone = model(images), model(images[1:])
    for one, other in zip(both, alone, strict=True):
        torch.testing.assert_close(one[1:], other, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_where_nothing_is_found_all_scores_are_zero() -> None:
    torch.manual_seed(0)
    detector = Detector(
        build_encoder("test_resnet", 64), ["a", "b", "c"], "retinanet", (64, 64)
    ).eval()
    with torch.no_grad():
        _, scores, _ = ExportableDetector(detector)(torch.rand(2, 3, 64, 64))
    assert (scores == 0).all()


def test_suppression_against_a_loop() -> None:
    random = torch.Generator().manual_seed(0)
    corner = torch.rand(2, 30, 2, generator=random) * 30
    boxes = torch.cat([corner, corner + 5 + 10 * torch.rand(2, 30, 2, generator=random)], dim=2)
    scores = torch.rand(2, 3, 30, generator=random)
    scores[scores < 0.2] = 0
    kept = suppress(boxes, scores, 0.4, 5)
    for image in range(2):
        for label in range(3):
            selected: list[int] = []
            for place in scores[image, label].argsort(descending=True).tolist():
                x1, y1, x2, y2 = boxes[image, place].tolist()
                suppressed = scores[image, label, place] == 0
                for other in selected:
                    u1, v1, u2, v2 = boxes[image, other].tolist()
                    shared = max(0, min(x2, u2) - max(x1, u1)) * max(0, min(y2, v2) - max(y1, v1))
                    union = (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - shared
                    suppressed |= shared / union > 0.4
                if not suppressed and len(selected) < 5:
                    selected.append(place)
            expected = torch.zeros(30)
            expected[selected] = scores[image, label, selected]
            assert torch.equal(kept[image, label], expected)
