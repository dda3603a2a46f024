"""A detector whose tensors have fixed sizes, for export as a graph with a free batch size.

torchvision drops boxes per image, so that the sizes of its tensors depend on the content of the
images. Here all boxes are kept until the end; those that would be dropped get the score 0.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign, batched_nms, roi_align

from vissl_lite.transfer.detection.model import MIN_SCORE, TWO_STAGES, Detector


@torch.library.custom_op("vissl_lite::suppress", mutates_args=())
def suppress(boxes: Tensor, scores: Tensor, iou_threshold: float, max_boxes: int) -> Tensor:
    """Apply non-maximum suppression without changing shapes: suppressed boxes get the score 0.

    Args:
        boxes: Boxes ``(B, N, 4)``.
        scores: Scores per class ``(B, K, N)``. Boxes with the score 0 are ignored.
        iou_threshold: IoU above which the weaker of two boxes of a class is suppressed.
        max_boxes: Maximum number of boxes to keep per image and class.

    Returns:
        Scores ``(B, K, N)``.
    """
    kept = torch.zeros_like(scores)
    for image, (places, values) in enumerate(zip(boxes, scores, strict=True)):
        label, place = (values > 0).nonzero(as_tuple=True)
        chosen = batched_nms(places[place], values[label, place], label, iou_threshold)
        for number in range(len(values)):
            some = chosen[label[chosen] == number][:max_boxes]
            kept[image, number, place[some]] = values[number, place[some]]
    return kept


@suppress.register_fake
def _(boxes: Tensor, scores: Tensor, iou_threshold: float, max_boxes: int) -> Tensor:
    return torch.empty_like(scores)


def suppress_in_onnx(boxes: Any, scores: Any, iou_threshold: float, max_boxes: int) -> Any:
    """Translate ``suppress`` into ONNX operators, for torch's exporter."""
    from onnxscript import opset18

    op: Any = opset18
    limits = (
        op.Constant(value_ints=[max_boxes]),
        op.Constant(value_floats=[iou_threshold]),
        op.Constant(value_floats=[0.0]),
    )
    chosen = op.NonMaxSuppression(boxes, scores, *limits)  # (M, 3): image, class, box
    return op.ScatterND(op.Sub(scores, scores), chosen, op.GatherND(scores, chosen))


# ONNX translations of custom operators, for torch's exporter.
ONNX_TRANSLATIONS: dict[Any, Any] = {torch.ops.vissl_lite.suppress.default: suppress_in_onnx}


class ExportableDetector(nn.Module):
    """Detector that returns its maximum number of boxes for each image, padded with zeros.

    Args:
        detector: Detector to export. Its weights are shared, not copied.
    """

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector, self.net = detector, detector.net
        self.two_stages = detector.kind in TWO_STAGES
        self.with_masks = detector.kind == "mask_rcnn"
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

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Detect objects in a batch.

        Args:
            images: Normalized images ``(B, C, H, W)`` of the size of the canvas.

        Returns:
            Boxes ``(B, N, 4)`` in pixels of the canvas, scores ``(B, N)`` in descending order, and
            labels ``(B, N)``. Of Mask R-CNN also masks ``(B, N, 28, 28)``: the probabilities of
            equal cells of the box, from its upper left corner on; 0 where nothing is found.
        """
        maps = list(self.net.backbone(images).values())
        if self.two_stages:
            boxes, scores = self._second_stage(maps, *self._proposals(maps))
            iou_threshold = self.net.roi_heads.nms_thresh
        else:
            boxes, scores = self._dense(maps)
            iou_threshold = self.net.nms_thresh
        scores = torch.where(scores > MIN_SCORE, scores, 0.0)
        (batch, classes, places), most = scores.shape, self.detector.max_boxes
        if boxes.ndim == 4:  # separate boxes per class
            separate = boxes.flatten(0, 1), scores.flatten(0, 1)[:, None]
            kept = suppress(*separate, iou_threshold, most).reshape(batch, classes * places)
            boxes = boxes.flatten(1, 2)
        else:
            kept = suppress(boxes, scores, iou_threshold, most).reshape(batch, classes * places)
            boxes = boxes.repeat(1, classes, 1)
        best, chosen = kept.topk(min(most, classes * places), dim=1)
        labels = torch.div(chosen, places, rounding_mode="floor")
        found = best > 0
        boxes, labels = _gather_boxes(boxes, chosen) * found[..., None], labels * found
        if not self.with_masks:
            return boxes, best, labels
        return boxes, best, labels, self._masks(maps, boxes, labels) * found[..., None, None]

    def _dense(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Boxes ``(B, N, 4)`` and scores ``(B, K, N)`` of all anchors, for FCOS and RetinaNet."""
        outputs = self.net.head(maps)
        if self.detector.kind == "fcos":
            scores = (outputs["cls_logits"].sigmoid() * outputs["bbox_ctrness"].sigmoid()).sqrt()
            boxes = self.net.box_coder.decode(outputs["bbox_regression"], self.anchors)
        else:
            scores = outputs["cls_logits"].sigmoid()
            boxes = decode_boxes(self.anchors, outputs["bbox_regression"])
        levels = [self._candidates(level) for level in scores.split(self.counts, dim=1)]
        return self._clip(boxes), torch.cat(levels, dim=1).transpose(1, 2)

    def _candidates(self, scores: Tensor) -> Tensor:
        """Scores ``(B, N, K)`` of a level, 0 for those below the best ``topk_candidates``."""
        flat = scores.flatten(1)
        best = flat.topk(min(self.net.topk_candidates, flat.shape[1]), dim=1).values
        return torch.where(scores < best[:, -1:, None], 0.0, scores)

    def _proposals(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Boxes ``(B, P, 4)`` and scores ``(B, P)`` of the region proposal network."""
        rpn = self.net.rpn
        objectness, offsets_per_level = rpn.head(maps)
        best, boxes = [], []
        levels = zip(objectness, offsets_per_level, self.anchors.split(self.counts), strict=True)
        for logits, offsets, anchors in levels:
            flat = logits.permute(0, 2, 3, 1).flatten(1)
            offsets = offsets.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3)
            values, chosen = flat.topk(min(rpn.pre_nms_top_n(), flat.shape[1]), dim=1)
            best.append(values.sigmoid())
            boxes.append(decode_boxes(anchors[chosen], _gather_boxes(offsets, chosen)))
        proposals = self._clip(torch.cat(boxes, dim=1))
        large = ((proposals[..., 2:] - proposals[..., :2]) >= rpn.min_size).all(dim=-1)
        scores = torch.cat(best, dim=1) * large
        # suppression is per level: treat each level as a class
        level = torch.cat([torch.full((b.shape[1],), i) for i, b in enumerate(best)])
        separate = torch.stack([scores * (level == i) for i in range(len(best))], dim=1)
        max_proposals = rpn.post_nms_top_n()
        kept = suppress(proposals, separate, rpn.nms_thresh, max_proposals).sum(dim=1)
        values, chosen = kept.topk(min(max_proposals, kept.shape[1]), dim=1)
        return _gather_boxes(proposals, chosen), values

    def _second_stage(
        self, maps: list[Tensor], proposals: Tensor, objectness: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Boxes ``(B, K, P, 4)`` and scores ``(B, K, P)`` of the proposals."""
        heads, count = self.net.roi_heads, proposals.shape[1]
        flat = proposals.flatten(0, 1)
        pooled = self._pool(maps, proposals, heads.box_roi_pool)
        logits, offsets = heads.box_predictor(heads.box_head(pooled))
        scores = logits.softmax(dim=1)[:, 1:].unflatten(0, (-1, count))  # without the background
        weights = torch.tensor(heads.box_coder.weights, device=flat.device)
        offsets = offsets.unflatten(1, (-1, 4))[:, 1:] / weights
        boxes = self._clip(decode_boxes(flat[:, None], offsets)).unflatten(0, (-1, count))
        large = ((boxes[..., 2:] - boxes[..., :2]) >= 1e-2).all(dim=-1)
        scores = scores * large * (objectness > 0)[..., None]
        return boxes.transpose(1, 2), scores.transpose(1, 2)

    def _masks(self, maps: list[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        """Probabilities ``(B, N, M, M)`` in boxes ``(B, N, 4)`` of labels ``(B, N)``."""
        heads = self.net.roi_heads
        logits = heads.mask_predictor(heads.mask_head(self._pool(maps, boxes, heads.mask_roi_pool)))
        side = logits.shape[-1]
        label = (labels.flatten() + 1)[:, None, None, None].expand(-1, 1, side, side)
        own = logits.gather(1, label)[:, 0]  # of the predicted class; class 0 is the background
        return own.sigmoid().unflatten(0, (-1, boxes.shape[1]))

    def _pool(self, maps: list[Tensor], boxes: Tensor, pool: MultiScaleRoIAlign) -> Tensor:
        """Features ``(B N, C, side, side)`` of boxes ``(B, N, 4)``, each from one level."""
        batch, count = boxes.shape[:2]
        flat = boxes.flatten(0, 1)
        image = torch.arange(batch, device=flat.device).repeat_interleave(count)
        regions = torch.cat([image[:, None].to(flat.dtype), flat], dim=1)
        level = self._level(flat)
        side, ratio = pool.output_size, pool.sampling_ratio
        return torch.stack(
            [
                roi_align(m, regions, side, scale, ratio) * (level == i)[:, None, None, None]
                # without the extra level, from which only proposals come
                for i, (m, scale) in enumerate(zip(maps, pool.scales, strict=False))
            ]
        ).sum(dim=0)

    def _level(self, boxes: Tensor) -> Tensor:
        """Index of the pyramid level that a box is pooled from (Lin et al. 2017, eq. 1)."""
        pool = self.net.roi_heads.box_roi_pool
        finest, coarsest = pool.map_levels.k_min, pool.map_levels.k_max
        size = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).clamp_min(1e-12).sqrt()
        level = pool.canonical_level + (size / pool.canonical_scale).log2() + 1e-6
        return level.floor().clamp(finest, coarsest) - finest

    def _clip(self, boxes: Tensor) -> Tensor:
        height, width = self.detector.canvas
        x, y = boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)
        return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], dim=-1)


def decode_boxes(boxes: Tensor, offsets: Tensor) -> Tensor:
    """Shift boxes by (dx, dy) times their size and scale them by exp(dw, dh).

    This inverts Ren et al. 2015, eq. 2. As in torchvision, the scale is clamped to 1000 / 16.

    Args:
        boxes: Boxes ``(..., 4)`` of x1, y1, x2, y2.
        offsets: Offsets ``(..., 4)`` of dx, dy, dw, dh.
    """
    size = boxes[..., 2:] - boxes[..., :2]
    middle = boxes[..., :2] + 0.5 * size + offsets[..., :2] * size
    half = 0.5 * size * offsets[..., 2:].clamp(max=float(torch.tensor(1000 / 16).log())).exp()
    return torch.cat([middle - half, middle + half], dim=-1)


def _gather_boxes(values: Tensor, chosen: Tensor) -> Tensor:
    """Select the rows ``(B, M)`` of values ``(B, N, 4)``."""
    return values.gather(1, chosen[..., None].expand(-1, -1, 4))
