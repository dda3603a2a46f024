"""The mask head of Mask R-CNN (He et al. 2017), its loss, and masks in pixels of the image."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.ops import MultiScaleRoIAlign, roi_align

from vissl_lite.transfer.sources.run_lengths import runs_of_mask
from vissl_lite.transfer.sources.shapes import Shape

# Side of a mask within its box, as in the paper.
MASK_SIDE = 28

Targets = list[dict[str, Tensor]]


class MaskHeads(RoIHeads):
    """Torchvision's heads of Mask R-CNN, which can be trained with objects that have no mask.

    Those train the box head alone. In evaluation it is torchvision's own ``RoIHeads``.

    Args:
        heads: Heads of Faster R-CNN, whose modules and settings are taken over.
        pool: Pooling of regions for the mask head, with half the sides of its masks.
        channels: Channels of the maps and of the mask head.
        num_classes: Number of classes with the background, which is class 0.
    """

    def __init__(
        self, heads: RoIHeads, pool: MultiScaleRoIAlign, channels: int, num_classes: int
    ) -> None:
        super().__init__(
            heads.box_roi_pool,
            heads.box_head,
            heads.box_predictor,
            heads.proposal_matcher.high_threshold,
            heads.proposal_matcher.low_threshold,
            heads.fg_bg_sampler.batch_size_per_image,
            heads.fg_bg_sampler.positive_fraction,
            heads.box_coder.weights,
            heads.score_thresh,
            heads.nms_thresh,
            heads.detections_per_img,
            pool,
            MaskRCNNHeads(channels, (channels,) * 4, dilation=1),
            MaskRCNNPredictor(channels, channels, num_classes),
        )

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: Targets | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Return detections with ``masks`` ``(N, 1, 28, 28)``, and in training losses instead.

        Args:
            features: Maps of the pyramid by name.
            proposals: Boxes of each image.
            image_shapes: Height and width of each image.
            targets: ``boxes``, ``labels``, ``masks`` ``(N, H, W)`` of 0 and 1, and ``drawn``
                ``(N,)`` bool, which objects have a mask.
        """
        if not self.training or targets is None:
            detected: Any = super().forward(features, proposals, image_shapes)
            return detected[0], detected[1]
        regions, matched, labels, offsets = self.select_training_samples(proposals, targets)
        pooled = self.box_roi_pool(features, regions, image_shapes)
        logits, shifts = self.box_predictor(self.box_head(pooled))
        loss_classifier, loss_box_reg = fastrcnn_loss(logits, shifts, labels, offsets)
        used: list[tuple[Tensor, Tensor, Tensor]] = []
        for boxes, which, label, target in zip(regions, matched, labels, targets, strict=True):
            positive = (label > 0).nonzero()[:, 0]
            positive = positive[target["drawn"][which[positive]]]
            used.append((boxes[positive], which[positive], label[positive]))
        regions, matched, labels = (list(some) for some in zip(*used, strict=True))
        pooled = self.mask_roi_pool(features, regions, image_shapes)
        drawn = self.mask_predictor(self.mask_head(pooled))
        masks = [target["masks"] for target in targets]
        losses = {
            "loss_classifier": loss_classifier,
            "loss_box_reg": loss_box_reg,
            "loss_mask": mask_loss(drawn, regions, masks, matched, labels),
        }
        return [], losses


def mask_loss(
    logits: Tensor,
    regions: list[Tensor],
    masks: list[Tensor],
    matched: list[Tensor],
    labels: list[Tensor],
) -> Tensor:
    """Binary cross-entropy of the mask of the true class in each region (He et al. 2017, 3).

    The target of each of the M x M cells of a region is the share of it that the object covers.

    Args:
        logits: ``(R, K, M, M)`` of the R regions of all images.
        regions: Boxes ``(R_i, 4)`` of the regions of each image.
        masks: Masks ``(N_i, H, W)`` of 0 and 1 of the objects of each image.
        matched: Index ``(R_i,)`` of the object of each region.
        labels: Class ``(R_i,)`` of each region.

    Returns:
        Mean over regions and cells; 0 if there are no regions.
    """
    if not len(logits):
        return logits.sum() * 0
    side, targets = logits.shape[-1], []
    for boxes, objects, index in zip(regions, masks, matched, strict=True):
        present, place = index.unique(return_inverse=True)  # no float masks of the others
        rois = torch.cat([place[:, None].to(boxes), boxes], dim=1)
        chosen = objects[present][:, None].to(boxes)
        targets.append(roi_align(chosen, rois, side, aligned=True)[:, 0])
    rows = torch.arange(len(logits), device=logits.device)
    chosen = logits[rows, torch.cat(labels)].float()
    return F.binary_cross_entropy_with_logits(chosen, torch.cat(targets))


def paste_mask(probabilities: np.ndarray, box: np.ndarray, size: tuple[int, int]) -> Shape:
    """Enlarge the mask in a box to the pixels of the image, by linear interpolation.

    Args:
        probabilities: ``(M, M)`` float32 of the cells of the box.
        box: x1, y1, x2, y2 in pixels; may reach beyond the image.
        size: Height and width of the image.

    Returns:
        The pixels with a probability of at least 0.5, as run lengths.
    """
    top, rows = _weights(box[1], box[3], size[0], len(probabilities))
    left, columns = _weights(box[0], box[2], size[1], len(probabilities))
    inside = rows @ probabilities @ columns.T >= 0.5
    return Shape(runs=runs_of_mask(inside, (left, top), size).tobytes())


def _weights(start: float, stop: float, length: int, cells: int) -> tuple[int, np.ndarray]:
    """The first pixel whose center is in an interval, and the weights ``(n, cells)`` of the n."""
    first, last = (int(np.clip(np.ceil(side - 0.5), 0, length)) for side in (start, stop))
    centers = np.arange(first, max(first, last)) + 0.5
    places = (centers - start) / max(stop - start, 1e-6) * cells - 0.5
    distance = np.abs(np.clip(places, 0, cells - 1)[:, None] - np.arange(cells))
    return first, np.clip(1 - distance, 0, None).astype(np.float32)
