"""A detector whose every step has a fixed size: what a graph with a free batch size needs.

torchvision throws boxes away image by image, so that the sizes of its tensors depend on what is in
the images. Here nothing is thrown away until the end: what would be gets the score 0.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import batched_nms, roi_align

from vissl_lite.transfer.detection.model import LEAST_SCORE, Detector

MOST = 100  # boxes per image


@torch.library.custom_op("vissl_lite::suppress", mutates_args=())
def suppress(boxes: Tensor, scores: Tensor, overlap: float, most: int) -> Tensor:
    """Non-maximum suppression that keeps all sizes: what is suppressed gets the score 0.

    Args:
        boxes: ``(B, N, 4)``.
        scores: ``(B, K, N)``, by class; what is 0 is suppressed already.
        overlap: IoU above which the weaker of two boxes of a class goes.
        most: boxes of an image and class that stay.

    Returns:
        ``(B, K, N)`` scores.
    """
    kept = torch.zeros_like(scores)
    for image, (places, values) in enumerate(zip(boxes, scores, strict=True)):
        label, place = (values > 0).nonzero(as_tuple=True)
        chosen = batched_nms(places[place], values[label, place], label, overlap)
        for number in range(len(values)):
            some = chosen[label[chosen] == number][:most]
            kept[image, number, place[some]] = values[number, place[some]]
    return kept


@suppress.register_fake
def _(boxes: Tensor, scores: Tensor, overlap: float, most: int) -> Tensor:
    return torch.empty_like(scores)


def suppress_in_onnx(boxes: Any, scores: Any, overlap: float, most: int) -> Any:
    """``suppress`` in ONNX's own operators, for torch's exporter."""
    from onnxscript import opset18

    op: Any = opset18
    limits = (
        op.Constant(value_ints=[most]),
        op.Constant(value_floats=[overlap]),
        op.Constant(value_floats=[0.0]),
    )
    chosen = op.NonMaxSuppression(boxes, scores, *limits)  # (M, 3): image, class, place
    return op.ScatterND(op.Sub(scores, scores), chosen, op.GatherND(scores, chosen))


# What torch's exporter does not know by itself.
TRANSLATIONS: dict[Any, Any] = {torch.ops.vissl_lite.suppress.default: suppress_in_onnx}


class ExportableDetector(nn.Module):
    """What a ``Detector`` finds, at most ``MOST`` boxes per image, padded with zeros.

    Args:
        detector: whose weights it shares.
    """

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector, self.net = detector, detector.net
        self.two_stages = detector.kind == "faster_rcnn"
        height, width = detector.canvas
        blank = torch.zeros(1, len(detector.encoder.mean), height, width)
        was_training = detector.training
        with torch.no_grad():
            maps = list(detector.eval().net.backbone(blank).values())
        detector.train(was_training)
        generator = self.net.rpn.anchor_generator if self.two_stages else self.net.anchor_generator
        (anchors,) = generator(ImageList(blank, [(height, width)]), maps)
        self.anchors: Tensor
        self.register_buffer("anchors", anchors, persistent=False)
        places = generator.num_anchors_per_location()
        self.counts = [m.shape[2] * m.shape[3] * n for m, n in zip(maps, places, strict=True)]
        self.scales = [m.shape[3] / width for m in maps]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes ``(B, N, 4)`` within the canvas, scores ``(B, N)`` best first, labels ``(B, N)``.

        Args:
            images: ``(B, C, H, W)``, normalized, of the canvas's size.
        """
        maps = list(self.net.backbone(images).values())
        if self.two_stages:
            boxes, scores = self._second_stage(maps, *self._proposals(maps))
            overlap = self.net.roi_heads.nms_thresh
        else:
            boxes, scores = self._dense(maps)
            overlap = self.net.nms_thresh
        scores = torch.where(scores > LEAST_SCORE, scores, 0.0)
        batch, classes, places = scores.shape
        if boxes.ndim == 4:  # each class has boxes of its own
            apart = boxes.flatten(0, 1), scores.flatten(0, 1)[:, None]
            kept = suppress(*apart, overlap, MOST).reshape(batch, classes * places)
            boxes = boxes.flatten(1, 2)
        else:
            kept = suppress(boxes, scores, overlap, MOST).reshape(batch, classes * places)
            boxes = boxes.repeat(1, classes, 1)
        best, chosen = kept.topk(min(MOST, classes * places), dim=1)
        labels = torch.div(chosen, places, rounding_mode="floor")
        found = best > 0
        return _take(boxes, chosen) * found[..., None], best, labels * found

    def _dense(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """FCOS and RetinaNet: a box and its scores at every place."""
        said = self.net.head(maps)
        if self.detector.kind == "fcos":
            scores = (said["cls_logits"].sigmoid() * said["bbox_ctrness"].sigmoid()).sqrt()
            boxes = self.net.box_coder.decode(said["bbox_regression"], self.anchors)
        else:
            scores = said["cls_logits"].sigmoid()
            boxes = moved(self.anchors, said["bbox_regression"])
        return self._clipped(boxes), scores.transpose(1, 2)

    def _proposals(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The first stage: ``(B, P, 4)`` boxes that may hold something, and ``(B, P)`` scores."""
        rpn = self.net.rpn
        objectness, changes = rpn.head(maps)
        best, boxes = [], []
        levels = zip(objectness, changes, self.anchors.split(self.counts), strict=True)
        for logits, change, anchors in levels:
            flat = logits.permute(0, 2, 3, 1).flatten(1)
            change = change.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3)
            values, chosen = flat.topk(min(rpn.pre_nms_top_n(), flat.shape[1]), dim=1)
            best.append(values.sigmoid())
            boxes.append(moved(anchors[chosen], _take(change, chosen)))
        every = self._clipped(torch.cat(boxes, dim=1))
        large = ((every[..., 2:] - every[..., :2]) >= rpn.min_size).all(dim=-1)
        scores = torch.cat(best, dim=1) * large
        # each level is suppressed alone, as if it were a class
        level = torch.cat([torch.full((b.shape[1],), i) for i, b in enumerate(best)])
        apart = torch.stack([scores * (level == i) for i in range(len(best))], dim=1)
        wanted = rpn.post_nms_top_n()
        kept = suppress(every, apart, rpn.nms_thresh, wanted).sum(dim=1)
        values, chosen = kept.topk(min(wanted, kept.shape[1]), dim=1)
        return _take(every, chosen), values

    def _second_stage(
        self, maps: list[Tensor], proposals: Tensor, objectness: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``(B, K, P, 4)`` boxes and ``(B, K, P)`` scores of the proposals."""
        heads = self.net.roi_heads
        batch, count = proposals.shape[:2]
        flat = proposals.flatten(0, 1)
        image = torch.arange(batch, device=flat.device).repeat_interleave(count)
        regions = torch.cat([image[:, None].to(flat.dtype), flat], dim=1)
        level = self._level(flat)
        side, ratio = heads.box_roi_pool.output_size, heads.box_roi_pool.sampling_ratio
        pooled = torch.stack(
            [
                roi_align(m, regions, side, scale, ratio) * (level == i)[:, None, None, None]
                for i, (m, scale) in enumerate(zip(maps, self.scales, strict=True))
            ]
        ).sum(dim=0)
        logits, change = heads.box_predictor(heads.box_head(pooled))
        scores = logits.softmax(dim=1)[:, 1:].unflatten(0, (-1, count))  # without the background
        weights = torch.tensor(heads.box_coder.weights, device=flat.device)
        change = change.unflatten(1, (-1, 4))[:, 1:] / weights
        boxes = self._clipped(moved(flat[:, None], change)).unflatten(0, (-1, count))
        large = ((boxes[..., 2:] - boxes[..., :2]) >= 1e-2).all(dim=-1)
        scores = scores * large * (objectness > 0)[..., None]
        return boxes.transpose(1, 2), scores.transpose(1, 2)

    def _level(self, boxes: Tensor) -> Tensor:
        """Which map a box is looked up in, by its size (Lin et al. 2017, eq. 1)."""
        pool = self.net.roi_heads.box_roi_pool
        finest, coarsest = (-torch.tensor(s).log2() for s in (self.scales[0], self.scales[-1]))
        size = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).clamp_min(1e-12).sqrt()
        level = pool.canonical_level + (size / pool.canonical_scale).log2() + 1e-6
        return level.floor().clamp(float(finest), float(coarsest)) - float(finest)

    def _clipped(self, boxes: Tensor) -> Tensor:
        height, width = self.detector.canvas
        x, y = boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)
        return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], dim=-1)


def moved(boxes: Tensor, change: Tensor) -> Tensor:
    """Boxes moved by (dx, dy) of their size and enlarged by exp(dw, dh); Ren et al. 2015, eq. 2.

    Args:
        boxes: ``(..., 4)``.
        change: ``(..., 4)``; enlarging stops at 1000 / 16, as in torchvision.
    """
    size = boxes[..., 2:] - boxes[..., :2]
    middle = boxes[..., :2] + 0.5 * size + change[..., :2] * size
    half = 0.5 * size * change[..., 2:].clamp(max=float(torch.tensor(1000 / 16).log())).exp()
    return torch.cat([middle - half, middle + half], dim=-1)


def _take(values: Tensor, chosen: Tensor) -> Tensor:
    """``(B, N, 4)`` values at ``(B, M)`` places."""
    return values.gather(1, chosen[..., None].expand(-1, -1, 4))
