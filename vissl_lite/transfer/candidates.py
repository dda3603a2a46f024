"""A dense detector as an ONNX graph: all candidate boxes of a batch, then non-maximum suppression.

torchvision throws weak boxes away image by image, in steps whose sizes depend on the values; for a
graph with a free batch size they are computed for all places at once, and ONNX's own operator
suppresses what overlaps.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import batched_nms

from vissl_lite.transfer.detector import LEAST_SCORE, Detector

MOST = 100  # boxes of a class and image


class Candidates(nn.Module):
    """A box and its scores for every place of every map.

    Args:
        detector: of the kind ``fcos`` or ``retinanet``.
    """

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector
        height, width = detector.canvas
        blank = torch.zeros(1, len(detector.encoder.mean), height, width)
        was_training = detector.training
        with torch.no_grad():
            maps = list(detector.eval().net.backbone(blank).values())
        detector.train(was_training)
        (anchors,) = detector.net.anchor_generator(ImageList(blank, [(height, width)]), maps)
        self.anchors: Tensor
        self.register_buffer("anchors", anchors)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes ``(B, N, 4)`` within the canvas and scores ``(B, N, K)``.

        Args:
            images: ``(B, C, H, W)``, normalised, of the canvas's size.
        """
        net = self.detector.net
        said = net.head(list(net.backbone(images).values()))
        if self.detector.kind == "fcos":
            scores = (said["cls_logits"].sigmoid() * said["bbox_ctrness"].sigmoid()).sqrt()
            boxes = net.box_coder.decode(said["bbox_regression"], self.anchors)
        else:
            scores = said["cls_logits"].sigmoid()
            boxes = _moved(said["bbox_regression"], self.anchors, net.box_coder.bbox_xform_clip)
        height, width = self.detector.canvas
        x, y = boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)
        return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], dim=-1), scores


def _moved(change: Tensor, anchors: Tensor, largest: float) -> Tensor:
    """Anchors moved by (dx, dy) of their size and enlarged by exp(dw, dh); Faster R-CNN, eq. 2."""
    size = anchors[:, 2:] - anchors[:, :2]
    middle = anchors[:, :2] + 0.5 * size + change[..., :2] * size
    half = 0.5 * size * change[..., 2:].clamp(max=largest).exp()
    return torch.cat([middle - half, middle + half], dim=-1)


def suppress(
    boxes: Tensor, scores: Tensor, overlap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What ``add_suppression`` computes, with torchvision's operator: to check it by.

    Args:
        boxes: ``(B, N, 4)``.
        scores: ``(B, N, K)``.
        overlap: IoU above which the weaker of two boxes of a class is dropped.

    Returns:
        ``(M, 4)`` boxes, ``(M,)`` scores, ``(M,)`` labels and ``(M,)`` numbers of images, by image
        and class, best first.
    """
    image, place, label = (scores > LEAST_SCORE).nonzero(as_tuple=True)
    values = scores[image, place, label]
    found = boxes[image, place]
    kept = batched_nms(found, values, image * scores.shape[2] + label, overlap)
    kept = kept[values[kept].argsort(descending=True, stable=True)]
    group = image[kept] * scores.shape[2] + label[kept]
    kept = kept[group.argsort(stable=True)]
    group = group.sort(stable=True).values
    first = torch.searchsorted(group, group)
    kept = kept[torch.arange(len(kept)) - first < MOST]
    return found[kept], values[kept], label[kept], image[kept]


def add_suppression(program: Any, overlap: float) -> None:
    """Append non-maximum suppression to a graph with the outputs ``all_boxes`` and ``all_scores``.

    Its outputs are then ``boxes`` ``(M, 4)``, ``scores`` ``(M,)``, ``labels`` ``(M,)`` and
    ``image`` ``(M,)``: which image of the batch a box belongs to.

    Args:
        program: an ``onnx.ModelProto``; changed in place.
        overlap: see ``suppress``.
    """
    from onnx import TensorProto, helper

    graph = program.graph

    def constant(name: str, kind: int, values: list[float] | list[int]) -> str:
        graph.initializer.append(helper.make_tensor(name, kind, [len(values)], values))
        return name

    numbers = TensorProto.INT64
    limits = [
        constant("most_boxes", numbers, [MOST]),
        constant("overlap", TensorProto.FLOAT, [overlap]),
        constant("least_score", TensorProto.FLOAT, [LEAST_SCORE]),
    ]
    constant("to_image", numbers, [0])
    constant("to_label", numbers, [1])
    constant("to_place", numbers, [0, 2])
    constant("column", numbers, [1])
    graph.node.extend(
        [
            helper.make_node("Transpose", ["all_scores"], ["by_class"], perm=[0, 2, 1]),
            helper.make_node("NonMaxSuppression", ["all_boxes", "by_class", *limits], ["chosen"]),
            helper.make_node("Gather", ["chosen", "to_image"], ["image_column"], axis=1),
            helper.make_node("Squeeze", ["image_column", "column"], ["image"]),
            helper.make_node("Gather", ["chosen", "to_label"], ["label_column"], axis=1),
            helper.make_node("Squeeze", ["label_column", "column"], ["labels"]),
            helper.make_node("Gather", ["chosen", "to_place"], ["places"], axis=1),
            helper.make_node("GatherND", ["all_boxes", "places"], ["boxes"]),
            helper.make_node("GatherND", ["by_class", "chosen"], ["scores"]),
        ]
    )
    del graph.output[:]
    for name, kind, *more in (
        ("boxes", TensorProto.FLOAT, 4),
        ("scores", TensorProto.FLOAT),
        ("labels", numbers),
        ("image", numbers),
    ):
        graph.output.append(helper.make_tensor_value_info(name, kind, ["found", *more]))
