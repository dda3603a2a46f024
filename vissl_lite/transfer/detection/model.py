"""Torchvision's detectors on a feature pyramid over an encoder, and inference with them."""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import initLevelMapper

from vissl_lite.data.images import BROKEN_IMAGE, resize
from vissl_lite.data.reading import reason
from vissl_lite.data.turns import UNTURNED, Turn
from vissl_lite.data.views import padding_value
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.inference import check_outputs, inference_mode, report_broken
from vissl_lite.transfer.detection.anchors import (
    ANCHOR_SCALES,
    DEFAULT_ANCHOR_SCALE,
    StridedAnchors,
    anchor_sizes,
    finest_stride,
    has_extra_level,
    level_strides,
)
from vissl_lite.transfer.detection.data import BoxedImage
from vissl_lite.transfer.detection.fusion import fuse_boxes
from vissl_lite.transfer.detection.masks import MASK_SIDE, MaskHeads, paste_mask
from vissl_lite.transfer.detection.options import DetectorName
from vissl_lite.transfer.finetuning import TransferModel, load_with_head, save_with_head
from vissl_lite.transfer.pyramid import Pyramid
from vissl_lite.transfer.sources.run_lengths import mask_of_runs
from vissl_lite.transfer.sources.shapes import Shape

# Boxes with a lower score are dropped. It is low because mean average precision needs weak boxes.
MIN_SCORE = 0.05

# Boxes that a detector returns for an image, at most: 100, as in COCO's metrics and by default in
# torchvision, or twice as many as a training image has, up to 1,000.
MIN_MAX_BOXES, LARGEST_MAX_BOXES = 100, 1000

# Detectors that classify proposals, with class 0 as the background.
TWO_STAGES = ("faster_rcnn", "mask_rcnn")

# Channels of the pyramid and the heads: half as many as in the papers, for small data sets.
PYRAMID_CHANNELS = 128


class Detections(NamedTuple):
    """Objects detected in one image, sorted by descending score.

    Attributes:
        boxes: Array ``(N, 4)`` float32 of x1, y1, x2, y2 in pixels of the image.
        scores: Array ``(N,)`` of values in [0, 1].
        labels: Array ``(N,)`` of class indices.
        masks: The N masks at the size of the image, as run lengths; None without a mask head.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: tuple[Shape, ...] | None = None

    def drawn(self, kept: np.ndarray, size: tuple[int, int]) -> Iterator[np.ndarray]:
        """Decode masks one by one; none without a mask head.

        Args:
            kept: ``(N,)`` bool, which of the masks.
            size: Height and width of the image.

        Yields:
            ``(H, W)`` uint8 of 0 and 1.
        """
        for mask, wanted in zip(self.masks or (), kept, strict=False):
            if wanted:
                yield mask_of_runs(mask.run_lengths(), size)


class _PyramidBackbone(nn.Module):
    """Encoder and pyramid with the interface of a torchvision detector's backbone.

    The maps are float32 under any precision: torchvision creates anchors in the dtype of the maps,
    and bf16 can't represent pixel coordinates.

    Args:
        encoder: Encoder of the detector.
        pyramid: Pyramid over its stages.
        extra_level: Whether every second pixel of the coarsest map makes one more, for proposals
            of large objects (Lin et al. 2017, FPN, section 4.1).
    """

    def __init__(self, encoder: Encoder, pyramid: Pyramid, extra_level: bool) -> None:
        super().__init__()
        self.encoder, self.pyramid, self.extra_level = encoder, pyramid, extra_level
        self.out_channels = pyramid.channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.pyramid(self.encoder.stages(images))
        if self.extra_level:
            maps.append(F.max_pool2d(maps[-1], kernel_size=1, stride=2))
        return OrderedDict((str(index), level.float()) for index, level in enumerate(maps))


class _IdentityTransform(nn.Module):
    """Replace torchvision's transform: images are already normalized and of equal size."""

    def forward(self, images: Tensor, targets: Any) -> tuple[ImageList, Any]:
        height, width = images.shape[-2:]
        return ImageList(images, [(height, width)] * len(images)), targets

    def postprocess(self, found: Any, sizes: Any, original_sizes: Any) -> Any:
        return found


def _roi_pool(strides: Sequence[int], side: int) -> MultiScaleRoIAlign:
    """Pooling of regions from the maps of a pyramid, without an extra level.

    Args:
        strides: Strides of the pyramid, fine to coarse.
        side: Height and width of a pooled region.
    """
    names = [str(index) for index in range(len(strides))]
    pool = MultiScaleRoIAlign(names, output_size=side, sampling_ratio=2)
    # torchvision would round the strides to powers of 2, which a ViT of 14-pixel patches has not
    pool.scales = [1 / stride for stride in strides]
    finest, coarsest = (int(math.log2(stride)) for stride in (strides[0], strides[-1]))
    pool.map_levels = initLevelMapper(finest, coarsest, pool.canonical_scale, pool.canonical_level)
    return pool


def _to_float(module: nn.Module, arguments: Any, output: Any) -> Any:
    """Forward hook that casts outputs to float32, so that losses and boxes are computed in it."""
    if isinstance(output, Tensor):
        return output.float()
    if isinstance(output, dict):
        return {name: _to_float(module, arguments, value) for name, value in output.items()}
    return type(output)(_to_float(module, arguments, value) for value in output)


class Detector(TransferModel):
    """One of torchvision's detectors on a feature pyramid over an encoder.

    Args:
        encoder: Backbone of the detector. It is not copied.
        classes: Names of the K classes.
        kind: Architecture: ``fcos`` (Tian et al. 2019), ``retinanet`` (Lin et al. 2017),
            ``faster_rcnn`` (Ren et al. 2015, with the pyramid of Lin et al. 2017) or ``mask_rcnn``
            (He et al. 2017), which adds a mask head to it.
        canvas: Height and width in pixels of the input, which images are resized and padded to.
        anchor_scale: Smallest anchor of a level as a multiple of its stride. FCOS has no anchors.
        max_boxes: Boxes to return for an image, at most; see ``choose_max_boxes``.

    Attributes:
        threshold: Minimum score of boxes to show. Training sets it to the score of the best F1.
    """

    def __init__(
        self,
        encoder: Encoder,
        classes: Sequence[str],
        kind: DetectorName,
        canvas: tuple[int, int],
        anchor_scale: float = DEFAULT_ANCHOR_SCALE,
        max_boxes: int = MIN_MAX_BOXES,
    ) -> None:
        super().__init__()
        self.classes, count = list(classes), len(classes)
        self.kind, self.canvas, self.threshold = kind, canvas, 0.5
        self.anchor_scale, self.max_boxes = anchor_scale, max_boxes
        pyramid = Pyramid(encoder, PYRAMID_CHANNELS, finest_stride(kind))
        maps = _PyramidBackbone(encoder, pyramid, has_extra_level(kind))
        strides = level_strides(kind, pyramid.strides)
        size_limits: dict[str, Any] = {"min_size": min(canvas), "max_size": max(canvas)}
        self.net: Any
        if kind == "fcos":
            anchors = StridedAnchors([(stride,) for stride in strides], strides, (1.0,))
            self.net = FCOS(
                maps,
                count,
                anchor_generator=anchors,
                score_thresh=MIN_SCORE,
                detections_per_img=max_boxes,
                topk_candidates=10 * max_boxes,  # of each level
                **size_limits,
            )
            heads = [self.net.head]
        elif kind == "retinanet":
            anchors = StridedAnchors(anchor_sizes(kind, strides, anchor_scale), strides)
            self.net = RetinaNet(
                maps,
                count,
                anchor_generator=anchors,
                score_thresh=MIN_SCORE,
                detections_per_img=max_boxes,
                topk_candidates=10 * max_boxes,
                **size_limits,
            )
            heads = [self.net.head]
        else:
            anchors = StridedAnchors(anchor_sizes(kind, strides, anchor_scale), strides)
            self.net = FasterRCNN(
                maps,
                count + 1,  # class 0 is the background
                rpn_anchor_generator=anchors,
                box_roi_pool=_roi_pool(pyramid.strides, 7),
                box_score_thresh=MIN_SCORE,
                box_detections_per_img=max_boxes,
                # fewer than torchvision's defaults, for small images and computers
                rpn_pre_nms_top_n_train=1000,
                rpn_post_nms_top_n_train=500,
                rpn_pre_nms_top_n_test=5 * max_boxes,  # of each level
                rpn_post_nms_top_n_test=3 * max_boxes,
                box_batch_size_per_image=128,
                **size_limits,
            )
            heads = [self.net.rpn.head, self.net.roi_heads.box_predictor]
            if kind == "mask_rcnn":
                pool = _roi_pool(pyramid.strides, MASK_SIDE // 2)
                self.net.roi_heads = MaskHeads(
                    self.net.roi_heads, pool, PYRAMID_CHANNELS, count + 1
                )
                heads.append(self.net.roi_heads.mask_predictor)
        self.heads = heads  # a plain list, so that the parameters are not registered twice
        for head in heads:
            head.register_forward_hook(_to_float)
        self.net.transform = _IdentityTransform()

    @property
    def encoder(self) -> Encoder:
        """The encoder, which is part of the backbone."""
        encoder: Encoder = self.net.backbone.encoder
        return encoder

    def losses(self, images: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Compute the losses of a batch.

        Args:
            images: Normalized images ``(B, C, H, W)``.
            targets: ``boxes`` ``(N, 4)`` in pixels and ``labels`` ``(N,)``, counted from 0, of
                each image; with a mask head also ``masks`` ``(N, H, W)`` and ``drawn`` ``(N,)``,
                see ``MaskHeads``.

        Returns:
            Scalar losses by torchvision's names.
        """
        if self.kind in TWO_STAGES:
            targets = [{**target, "labels": target["labels"] + 1} for target in targets]
        losses: dict[str, Tensor] = self.net(images, targets)
        return losses

    def forward(self, images: Tensor) -> list[dict[str, Tensor]]:
        """Return ``boxes``, ``scores`` and ``labels`` (from 0) for each normalized image.

        With a mask head also ``masks`` ``(N, 1, 28, 28)``: probabilities of cells of the boxes.
        """
        found: list[dict[str, Tensor]] = self.net(images)
        if self.kind in TWO_STAGES:
            found = [{**one, "labels": one["labels"] - 1} for one in found]
        return found


def choose_max_boxes(images: Sequence[BoxedImage]) -> int:
    """Choose how many boxes a detector returns for an image, at most.

    Args:
        images: Training images.

    Returns:
        100, or twice as many as an image has, up to 1,000.
    """
    most = max(int((~image.ignored).sum()) for image in images)
    return min(max(MIN_MAX_BOXES, 2 * most), LARGEST_MAX_BOXES)


def choose_canvas(images: Sequence[BoxedImage], encoder: Encoder) -> tuple[int, int]:
    """Choose the input size of a detector from the aspect ratios of the training images.

    The longer side is the encoder's image size. If 90 % of the images have similar aspect ratios,
    the shorter side follows their median, so that little is padding; else the canvas is square.

    Args:
        images: Training images.
        encoder: Encoder of the detector.

    Returns:
        Height and width in pixels.
    """
    size = encoder.image_size
    shapes = np.array([image.size for image in images], dtype=float)
    ratios = shapes[:, 0] / shapes[:, 1]
    median = float(np.median(ratios))
    similar = np.mean(np.abs(np.log(ratios / median)) < 0.1)
    if similar < 0.9:
        return size, size
    step = max(32, encoder.patch_size or 1)
    short = max(step, round(size * min(median, 1 / median) / step) * step)
    canvas = (short, size) if median < 1 else (size, short)
    try:
        encoder.stage_shapes(*canvas)
    except (AssertionError, RuntimeError, ValueError):
        return size, size  # the backbone accepts square images only
    return canvas


def fit_into(image: np.ndarray, canvas: tuple[int, int]) -> tuple[np.ndarray, float]:
    """Resize an image to fit into a canvas, and pad it at the right and the bottom.

    Args:
        image: Image ``(h, w, C)``, uint8 or uint16.
        canvas: Height and width in pixels.

    Returns:
        The padded image ``(H, W, C)`` and the scale factor of the image.
    """
    scale = min(canvas[0] / image.shape[0], canvas[1] / image.shape[1])
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    padded = np.full((*canvas, image.shape[2]), padding_value(image.dtype), image.dtype)
    padded[:height, :width] = resize(image, (height, width))
    return padded, scale


def detect(
    detector: Detector,
    paths: Sequence[str],
    progress: Callable[[int], None] | None = None,
    batch_size: int = 8,
) -> tuple[list[Detections], np.ndarray]:
    """Detect objects in image files.

    Args:
        detector: Detector. It is moved to the accelerator, if there is one, and back afterwards.
        paths: Image files. Unreadable ones are skipped and logged.
        progress: Called with the number of images processed since the last call.
        batch_size: Number of images per batch.

    Returns:
        Detections of each readable image, and an array ``(M,)`` bool that tells which of the M
        images are readable.

    Raises:
        UserError: If no image can be read, or the outputs of the heads are not finite.
    """
    found: list[Detections] = []
    good = detect_in_batches(
        detector, paths, lambda _, batch, sizes: found.extend(batch), progress, batch_size
    )
    return found, good


def detect_in_batches(
    detector: Detector,
    paths: Sequence[str],
    on_batch: Callable[[list[str], list[Detections], list[tuple[int, int]]], None],
    progress: Callable[[int], None] | None = None,
    batch_size: int = 8,
    turns: Sequence[Turn] = UNTURNED,
) -> np.ndarray:
    """Detect objects like ``detect``, but pass on each batch instead of keeping all detections.

    Args:
        detector: Detector. It is moved to the accelerator, if there is one, and back afterwards.
        paths: Image files. Unreadable ones are skipped and logged.
        on_batch: Called for each batch with the paths of its readable images, their detections, and
            their (height, width).
        progress: Called with the number of images processed since the last call.
        batch_size: Number of images per batch.
        turns: Flips and turns of each image; their boxes are mapped back and merged, see
            ``fuse_boxes``. Quarter turns are left out unless the canvas is square: a turned image
            would be resized to another scale, which training does not show either.

    Returns:
        Array ``(M,)`` bool that tells which images are readable.

    Raises:
        UserError: If no image can be read, or the outputs of the heads are not finite.
    """
    faults: list[str | None] = []
    if detector.canvas[0] != detector.canvas[1]:
        turns = [turn for turn in turns if not turn.swaps_sides]
    with inference_mode(detector) as device, _check_head_outputs(detector) as current:
        for start in range(0, len(paths), batch_size):
            batch_paths = paths[start : start + batch_size]
            current[:] = batch_paths
            readable: list[str] = []
            sizes: list[tuple[int, int]] = []
            fitted: list[list[np.ndarray]] = [[] for _ in turns]
            scales: list[float] = []
            for path in batch_paths:
                try:
                    image = detector.encoder.reader.read(path)
                except BROKEN_IMAGE as error:
                    faults.append(reason(error, path))
                    continue
                faults.append(None)
                readable.append(path)
                for turn, some in zip(turns, fitted, strict=True):
                    padded, scale = fit_into(turn.image(image), detector.canvas)
                    some.append(padded)
                scales.append(scale)  # the same for all turns
                sizes.append((image.shape[0], image.shape[1]))
            if sizes:
                by_turn = []
                for turn, some in zip(turns, fitted, strict=True):
                    batch = torch.from_numpy(np.stack(some)).permute(0, 3, 1, 2).to(device)
                    outputs = detector(detector.encoder.normalize(batch))
                    by_turn.append(
                        [_to_image(*one, turn) for one in zip(outputs, scales, sizes, strict=True)]
                    )
                on_batch(readable, [_merge(one) for one in zip(*by_turn, strict=True)], sizes)
            if progress is not None:
                progress(len(batch_paths))
    return report_broken(paths, faults)


@contextmanager
def _check_head_outputs(detector: Detector) -> Iterator[list[str]]:
    """Check that the outputs of the heads are finite, as torchvision drops boxes that are not.

    Yields:
        A list that the caller fills with the paths of the current batch, for the error message.
    """
    current: list[str] = []

    def check(module: nn.Module, arguments: Any, output: Any) -> None:
        values = output.values() if isinstance(output, dict) else output
        flat = [one for some in values for one in (some if isinstance(some, list) else [some])]
        check_outputs(flat, f"one of the {len(current)} images from {current[0]} on")

    hooks = [head.register_forward_hook(check) for head in detector.heads]
    try:
        yield current
    finally:
        for hook in hooks:
            hook.remove()


def _to_image(
    output: dict[str, Tensor], scale: float, size: tuple[int, int], turn: Turn
) -> Detections:
    """Convert boxes from the canvas to pixels of the image, and drop those in the padding."""
    boxes = output["boxes"].float().cpu().numpy() / scale
    whole = boxes.copy()  # masks are relative to boxes that are not clipped
    boxes = turn.boxes_back(boxes, *size)
    boxes[:, 0::2] = boxes[:, 0::2].clip(0, size[1])
    boxes[:, 1::2] = boxes[:, 1::2].clip(0, size[0])
    scores, labels = output["scores"].float().cpu().numpy(), output["labels"].cpu().numpy()
    inside = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(axis=1)
    order = np.argsort(-scores[inside], kind="stable")
    masks = None
    if "masks" in output:
        cells = output["masks"][:, 0].float().cpu().numpy()
        kept = np.flatnonzero(inside)[order]
        masks = tuple(paste_mask(cells[index], whole[index], size) for index in kept)
    return Detections(boxes[inside][order], scores[inside][order], labels[inside][order], masks)


def _merge(by_turn: Sequence[Detections]) -> Detections:
    """Merge the detections in the turns of one image; masks are not merged."""
    if len(by_turn) == 1:
        return by_turn[0]
    boxes, scores = [one.boxes for one in by_turn], [one.scores for one in by_turn]
    found = Detections(*fuse_boxes(boxes, scores, [one.labels for one in by_turn]))
    sure = found.scores >= MIN_SCORE
    return Detections(found.boxes[sure], found.scores[sure], found.labels[sure])


def save_detector(detector: Detector, folder: Path, about: dict[str, Any]) -> None:
    """Write a model folder; see ``save_with_head``.

    Args:
        detector: Trained detector.
        folder: Folder to write, created if missing.
        about: Additional entries of ``head.json``.
    """
    head = {
        "task": "detection",
        "classes": detector.classes,
        "detector": detector.kind,
        "canvas": list(detector.canvas),
        "anchor_scale": detector.anchor_scale,
        "max_boxes": detector.max_boxes,
        "threshold": detector.threshold,
    }
    save_with_head(detector, detector.encoder, folder, {**head, **about})


def load_detector(folder: Path) -> Detector:
    """Load a detector written by ``save_detector``.

    Args:
        folder: Run folder of ``finetune``, or the ``model`` folder in it.

    Raises:
        UserError: If the folder holds no detector, or a damaged one.
    """

    def build(encoder: Encoder, about: dict[str, Any]) -> Detector:
        kind, canvas, threshold = about["detector"], about["canvas"], about["threshold"]
        if kind not in get_args(DetectorName):
            raise ValueError(f"unknown detector {str(kind)[:60]!r}")
        if not isinstance(canvas, list) or len(canvas) != 2:
            raise ValueError("the canvas is not a height and width")
        max_side = encoder.image_size + 32  # ``choose_canvas`` rounds to multiples of 32
        if not all(type(side) is int and 1 <= side <= max_side for side in canvas):
            raise ValueError(f"the sides of the canvas are not from 1 to {max_side} pixels")
        if not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
            raise ValueError("the threshold is not a number from 0 to 1")
        scale, limits = about["anchor_scale"], (ANCHOR_SCALES[0], ANCHOR_SCALES[-1])
        if not isinstance(scale, int | float) or not limits[0] <= scale <= limits[1]:
            raise ValueError(f"anchor_scale is not a number from {limits[0]:g} to {limits[1]:g}")
        most, bounds = about["max_boxes"], (MIN_MAX_BOXES, LARGEST_MAX_BOXES)
        if type(most) is not int or not bounds[0] <= most <= bounds[1]:
            raise ValueError(f"max_boxes is not an integer from {bounds[0]} to {bounds[1]}")
        encoder.stage_shapes(*canvas)
        size = (canvas[0], canvas[1])
        detector = Detector(encoder, about["classes"], kind, size, float(scale), most)
        detector.threshold = float(threshold)
        return detector

    return load_with_head(folder, "detection", build)[0]
