"""The mask head, its loss, its targets and the figures of masks."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.transfer.detection.test_training import squares
from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.errors import UserError
from vissl_lite.transfer.detection import metrics
from vissl_lite.transfer.detection.data import BoxedImage
from vissl_lite.transfer.detection.masks import MASK_SIDE, mask_loss, paste_mask
from vissl_lite.transfer.detection.metrics import (
    average_precision,
    coco_evaluation,
    score_detector,
)
from vissl_lite.transfer.detection.model import Detections, Detector
from vissl_lite.transfer.detection.options import DetectorSettings
from vissl_lite.transfer.detection.task import Detection
from vissl_lite.transfer.detection.training import BoxDataset, resize_masks, unpack_masks
from vissl_lite.transfer.sources.run_lengths import mask_of_runs, runs_of_mask
from vissl_lite.transfer.sources.shapes import Shape


def decoded(shape: Shape, size: tuple[int, int]) -> np.ndarray:
    return mask_of_runs(shape.run_lengths(), size) > 0


def encoded(mask: np.ndarray) -> Shape:
    return Shape(runs=runs_of_mask(mask).tobytes())


# Loss


def literal_loss(
    logits: Tensor, regions: list[Tensor], masks: list[Tensor], matched: list[Tensor],
    labels: list[Tensor],
) -> float:  # fmt: skip
    """The same for regions whose cells are of whole pixels: means over pixels, one by one."""
    terms, row = [], 0
    for boxes, objects, indices, classes in zip(regions, masks, matched, labels, strict=True):
        for (x1, y1, x2, y2), which, label in zip(boxes.tolist(), indices, classes, strict=True):
            side = logits.shape[-1]
            width, height = round((x2 - x1) / side), round((y2 - y1) / side)
            for down in range(side):
                for across in range(side):
                    top, left = round(y1) + down * height, round(x1) + across * width
                    cell = objects[which][top : top + height, left : left + width]
                    target = float(cell.float().mean())
                    p = float(logits[row, label, down, across].double().sigmoid())
                    terms.append(-target * np.log(p) - (1 - target) * np.log(1 - p))
            row += 1
    return float(np.mean(terms))


def test_the_loss_against_a_loop() -> None:
    random = torch.Generator().manual_seed(0)
    masks = [torch.rand(n, 40, 50, generator=random) < 0.5 for n in (3, 2)]
    regions = [
        torch.tensor([[0.0, 0, 16, 24], [10, 8, 42, 16]]),
        torch.tensor([[5.0, 5, 29, 37]]),
    ]
    matched = [torch.tensor([2, 0]), torch.tensor([1])]
    labels = [torch.tensor([1, 3]), torch.tensor([2])]
    logits = torch.randn(3, 4, 8, 8, generator=random)
    loss = mask_loss(logits, regions, masks, matched, labels)
    assert float(loss) == pytest.approx(literal_loss(logits, regions, masks, matched, labels))
    assert loss.dtype == mask_loss(logits.bfloat16(), regions, masks, matched, labels).dtype
    none = mask_loss(logits[:0], [torch.zeros(0, 4)], masks[:1], [matched[1][:0]], [matched[1][:0]])
    assert float(none) == 0


def make(size: int = 64) -> Detector:
    torch.manual_seed(0)
    return Detector(build_encoder("test_resnet", size), ["a", "b"], "mask_rcnn", (size, size))


def targets(drawn: bool) -> list[dict[str, Tensor]]:
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[0, 10:40, 8:50] = drawn
    box = torch.tensor([[8.0, 10, 50, 40]])
    label = torch.tensor([1])
    return [{"boxes": box, "labels": label, "masks": mask, "drawn": torch.tensor([drawn])}]


@pytest.mark.slow
def test_objects_without_a_mask_train_the_box_head_alone() -> None:
    images = torch.rand(1, 3, 64, 64)
    for drawn in (True, False):
        detector = make().train()
        losses = detector.losses(images, targets(drawn))
        assert {"loss_classifier", "loss_box_reg", "loss_mask"} < set(losses)
        assert (float(losses["loss_mask"].detach()) > 0) == drawn
        torch.stack(list(losses.values())).sum().backward()
        head = detector.net.roi_heads.mask_predictor.conv5_mask.weight.grad
        assert (float(head.abs().sum()) > 0) == drawn
        assert detector.net.roi_heads.box_predictor.cls_score.weight.grad.abs().sum() > 0


# From cells to pixels


def test_a_mask_is_pasted_into_its_box() -> None:
    cells = np.zeros((MASK_SIDE, MASK_SIDE), np.float32)
    cells[:14, 7:] = 1  # above, without the left quarter
    size = (60, 80)
    mask = decoded(paste_mask(cells, np.array([10.0, 20, 38, 48], np.float32), size), size)
    rows, columns = np.nonzero(mask)
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (20, 34, 17, 38)
    assert mask.sum() == 14 * 21
    # half of it beyond the edges
    mask = decoded(paste_mask(cells, np.array([-28.0, -28, 28, 28], np.float32), size), size)
    assert mask.sum() == 0
    mask = decoded(paste_mask(cells, np.array([52.0, 46, 108, 102], np.float32), size), size)
    assert mask.sum() == (60 - 46) * (80 - 66)


@pytest.mark.parametrize("seed", range(4))
def test_pasting_interpolates_linearly(seed: int) -> None:
    random = np.random.default_rng(seed)
    cells = random.random((6, 6)).astype(np.float32)
    x1, y1 = random.uniform(-5, 10, 2)
    x2, y2 = x1 + random.uniform(8, 30), y1 + random.uniform(8, 30)
    mask = decoded(paste_mask(cells, np.array([x1, y1, x2, y2]), (32, 32)), (32, 32))
    for y in range(32):
        for x in range(32):
            u, v = (x + 0.5 - x1) / (x2 - x1) * 6, (y + 0.5 - y1) / (y2 - y1) * 6
            value = 0.0
            if 0 <= u < 6 and 0 <= v < 6:
                u, v = np.clip(u - 0.5, 0, 5), np.clip(v - 0.5, 0, 5)
                a, b = min(4, int(u)), min(4, int(v))
                left = cells[b, a] * (b + 1 - v) + cells[b + 1, a] * (v - b)
                right = cells[b, a + 1] * (b + 1 - v) + cells[b + 1, a + 1] * (v - b)
                value = left * (a + 1 - u) + right * (u - a)
            assert mask[y, x] == (value >= 0.5) or abs(value - 0.5) < 1e-5


def test_the_target_of_the_loss_pasted_back_is_the_mask() -> None:
    """The loss and the pasting agree on where cells are, to less than half a pixel."""
    y, x = np.mgrid[:70, :90] + 0.5
    mask = (((x - 40) / 23) ** 2 + ((y - 33) / 17) ** 2 < 1) & (x + y > 60)
    rows, columns = np.nonzero(mask)
    box = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], np.float32)
    for shift in (0.0, 0.4):  # an error of the proposal
        region = torch.from_numpy(box + np.float32(shift))[None]
        targets = torch.zeros(1, 1, MASK_SIDE, MASK_SIDE, requires_grad=True)
        which = [torch.tensor([0])]
        mask_loss(targets, [region], [torch.from_numpy(mask)[None]], which, which).backward()
        assert targets.grad is not None  # 0.5 less the target, over the number of cells
        cells = 0.5 - targets.grad[0, 0].numpy() * MASK_SIDE**2
        pasted = decoded(paste_mask(cells, region[0].numpy(), (70, 90)), (70, 90))
        assert (pasted & mask).sum() > 0.97 * (pasted | mask).sum()


# Targets


def shaped(tmp_path: Any, count: int = 4) -> list[BoxedImage]:
    """Images with squares, whose shapes are the lower left halves of them as polygons."""
    images = []
    for one in squares(tmp_path / "images", count, 0):
        shapes = []
        for x1, y1, x2, y2 in one.boxes:
            shapes.append(Shape((np.array([x1, y1, x2, y2, x1, y2], np.float32).tobytes(),)))
        images.append(replace(one, shapes=tuple(shapes)))
    return images


def test_masks_of_training_items(tmp_path: Any) -> None:
    whole = shaped(tmp_path)[0]
    ignored = np.zeros(3, bool)
    ignored[1] = True
    one = replace(
        whole,
        boxes=np.array([whole.boxes[0], whole.boxes[0], [0, 0, 60, 60]], np.float32),
        labels=np.array([0, 1, 2]),
        ignored=ignored,
        shapes=(whole.shapes[0], whole.shapes[0], None),
    )  # fmt: skip
    settings = DetectorSettings(detector="mask_rcnn", upright=False, min_crop_scale=0.5)
    dataset = BoxDataset([one], (64, 64), settings)
    seen = 0
    for epoch in range(12):
        item = dataset[epoch, 0]
        boxes, labels, bits, drawn = item.target
        masks = unpack_masks(bits, 64)
        assert masks.shape == (len(boxes), 64, 64)
        assert set(labels.tolist()) <= {0, 2}
        for box, label, mask, is_drawn in zip(boxes, labels, masks, drawn, strict=True):
            assert bool(is_drawn) == (label == 0) == bool(mask.any())
            if is_drawn:
                inside = item.views[0][mask.numpy()].astype(int)
                assert (inside[:, 0] > inside[:, 2] + 40).mean() > 0.95  # on the red square
                area = float((box[2] - box[0]) * (box[3] - box[1]))
                assert 0.3 < float(mask.sum()) / area < 0.7  # half of it
                seen += 1
    assert seen > 6


def test_packed_masks_and_their_resizing() -> None:
    masks = torch.rand(3, 5, 21) < 0.5
    bits = torch.from_numpy(np.packbits(masks.numpy(), axis=-1))
    assert torch.equal(unpack_masks(bits, 21), masks)
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[0, 16:32, 8:48] = True
    larger = resize_masks(mask, (96, 128))
    assert larger.shape == (1, 96, 128)
    assert torch.equal(larger[0, 24:48, 16:96], torch.ones(24, 80, dtype=torch.bool))
    assert int(larger.sum()) == 24 * 80
    assert resize_masks(mask[:0], (96, 128)).shape == (0, 96, 128)


# Figures


def truth() -> list[BoxedImage]:
    images = []
    for seed in range(3):
        random = np.random.default_rng(seed)
        boxes, shapes = [], []
        for left in (5, 55):
            mask = np.zeros((80, 120), bool)
            width, height = random.integers(20, 40, 2)
            mask[10 : 10 + height, left : left + width] = True
            boxes.append([left, 10, left + width, 10 + height])
            shapes.append(encoded(mask))
        images.append(
            BoxedImage(f"{seed}.png", (80, 120), np.array(boxes, np.float32), np.array([0, 1]),
                       np.zeros(2, bool), tuple(shapes))
        )  # fmt: skip
    return images


def answers(images: list[BoxedImage], shift: float = 0) -> list[Detections]:
    """The true objects, their masks shifted to the right by a share of their width."""
    found = []
    for one in images:
        masks = []
        for index, box in enumerate(one.boxes):
            masks.append(encoded(np.roll(one.mask(index), round(shift * (box[2] - box[0])), 1) > 0))
        scores = np.full(len(masks), 0.9, np.float32)
        found.append(Detections(one.boxes, scores, one.labels, tuple(masks)))
    return found


def test_map_of_perfect_and_shifted_masks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = truth()
    detector: Any = SimpleNamespace(classes=["a", "b", "never seen"], max_boxes=100)
    found = answers(images)
    monkeypatch.setattr(metrics, "detect", lambda *_: (found, np.ones(3, bool)))
    scores = score_detector(detector, images)
    assert list(scores.metrics) == ["mask_map", "mask_map_50", "map", "map_50"]
    assert set(scores.metrics.values()) == {1.0}
    assert scores.per_class == {name: {"mask_ap": 1.0, "ap": 1.0} for name in "ab"}
    found = answers(images, 0.2)  # an IoU of about two thirds
    scores = score_detector(detector, images)
    assert scores.map == 1.0  # of the boxes
    assert scores.mask_map_50 == 1.0
    expected = []
    for one, other in zip(images, found, strict=True):
        for index, mask in enumerate(other.masks or ()):
            a, b = one.mask(index) > 0, decoded(mask, one.size)
            expected.append((a & b).sum() / (a | b).sum())
    assert scores.mask_map is not None
    assert 0 < scores.mask_map < np.mean(expected)
    found = answers(images, 0.6)
    assert score_detector(detector, images).mask_map_50 == 0.0
    found = [one._replace(scores=one.scores[:0], labels=one.labels[:0], boxes=one.boxes[:0],
                          masks=()) for one in found]  # fmt: skip
    assert score_detector(detector, images).mask_map == 0.0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("metric", ["mask_map", "map"])
def test_each_image_has_its_part_in_the_mean_precision(
    metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = truth()
    found, wrong = answers(images), answers(images, 0.6)[1]
    masks = ((found[1].masks or ())[0], (wrong.masks or ())[1])
    boxes = found[1].boxes + np.array([[0] * 4, [20, 0, 20, 0]], np.float32)
    found[1] = found[1]._replace(boxes=boxes, masks=masks)
    found[2] = answers(images, 0.2)[2]._replace(
        boxes=found[2].boxes + 4, scores=np.full(2, 0.95, np.float32)
    )
    if metric == "map":
        found = [one._replace(masks=None) for one in found]
    detector: Any = SimpleNamespace(classes=["a", "b"], max_boxes=100)

    def score(numbers: list[int], units: np.ndarray | None = None) -> metrics.DetectionScores:
        chosen = [found[number] for number in numbers]
        monkeypatch.setattr(metrics, "detect", lambda *_: (chosen, np.ones(len(chosen), bool)))
        return score_detector(detector, [images[number] for number in numbers], units=units)

    scores = score([0, 1, 2], np.arange(3))
    value = scores.metrics[metric]
    without = [score(kept).metrics[metric] for kept in ([1, 2], [0, 2], [0, 1])]
    assert len(set(without)) == 3
    assert scores.per_image == pytest.approx([3 * value - 2 * one for one in without])


@pytest.mark.parametrize(("most", "precision"), [(100, 2 / 3), (200, 1.0)])
def test_every_box_that_is_returned_counts(most: int, precision: float) -> None:
    """150 objects, all of them found: more than COCO's metrics have of an image."""
    corners = np.array([(x, y) for x in range(15) for y in range(10)], np.float32) * 10
    boxes, labels = np.concatenate([corners, corners + 8], axis=1), np.zeros(150, np.int64)
    crowd = BoxedImage("crowd.png", (100, 150), boxes, labels, np.zeros(150, bool))
    found = Detections(boxes, np.linspace(0.9, 0.5, 150, dtype=np.float32), labels)
    by_class, _ = average_precision(coco_evaluation([found], [crowd], 1, "bbox", most))
    assert by_class[0] == pytest.approx(precision, abs=0.01)


def test_objects_without_a_shape_and_ignored_ones_do_not_count() -> None:
    images = truth()
    found = answers(images, 0.6)
    good = answers(images)
    for index, one in enumerate(images):  # the second object of each is found wrongly
        masks = ((good[index].masks or ())[0], (found[index].masks or ())[1])
        found[index] = good[index]._replace(masks=masks)
        shapes = (one.shapes[0], None)
        boxes = one.boxes + np.array([[0] * 4, [0, 0, 20, 0]], np.float32)
        images[index] = replace(one, shapes=shapes, boxes=boxes)
    by_class, at_50 = average_precision(coco_evaluation(found, images, 2, "segm"))
    assert by_class.tolist() == [1.0, -1.0]
    assert at_50 == 1.0
    images = [replace(one, ignored=np.array([False, True]), shapes=first.shapes)
              for one, first in zip(images, truth(), strict=True)]  # fmt: skip
    again, _ = average_precision(coco_evaluation(found, images, 2, "segm"))
    assert again.tolist() == [1.0, -1.0]


@pytest.mark.slow
def test_predicted_masks_lie_in_their_boxes(tmp_path: Any) -> None:
    from vissl_lite.transfer.detection.model import detect

    detector = make().eval()
    detector.net.roi_heads.score_thresh = 0.0
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 90, 3), np.uint8)).save(
        tmp_path / "a.png"
    )
    (found,), _ = detect(detector, [str(tmp_path / "a.png")])
    assert found.masks is not None
    assert len(found.masks) == len(found.boxes) > 10
    drawn = 0
    for box, mask in zip(found.boxes, found.masks, strict=True):
        rows, columns = np.nonzero(decoded(mask, (50, 90)))
        drawn += len(rows) > 0
        assert all(np.abs(columns + 0.5 - (box[0] + box[2]) / 2) <= (box[2] - box[0]) / 2 + 1e-3)
        assert all(np.abs(rows + 0.5 - (box[1] + box[3]) / 2) <= (box[3] - box[1]) / 2 + 1e-3)
    assert drawn > 3


def test_masks_are_not_averaged_over_turns() -> None:
    with torch.device("meta"):
        detector = Detector(build_encoder("test_resnet", 64), ["a"], "mask_rcnn", (64, 64))
    with pytest.raises(UserError, match="--tta does not merge the masks"):
        Detection().check_turns(detector)
