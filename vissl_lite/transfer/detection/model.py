"""The detector: torchvision's on a feature pyramid over an encoder, and what it finds in images."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, get_args

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign

from vissl_lite.data.images import BROKEN_IMAGE, read_image
from vissl_lite.data.reading import reason
from vissl_lite.data.views import PADDING
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.inference import check_outputs, inference_mode, report_broken
from vissl_lite.transfer.detection.data import BoxedImage
from vissl_lite.transfer.detection.options import DetectorName
from vissl_lite.transfer.finetuning import load_with_head, save_with_head
from vissl_lite.transfer.pyramid import Pyramid, PyramidModel

# Boxes below this score are not worth a line; mean average precision wants the weak ones too.
LEAST_SCORE = 0.05

CHANNELS = 128  # of the pyramid and the heads: half of the papers', for small sets and machines


class Detections(NamedTuple):
    """What is found in one image, best first.

    Attributes:
        boxes: ``(N, 4)`` float32 x1, y1, x2, y2 in pixels of the image.
        scores: ``(N,)`` in [0, 1].
        labels: ``(N,)`` class indices.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


class _Maps(nn.Module):
    """Encoder and pyramid, as torchvision's detectors want their backbone.

    The maps are float32 whatever the precision: anchors take the maps' type, and bf16 can't hold a
    pixel's coordinate.
    """

    def __init__(self, encoder: Encoder, pyramid: Pyramid) -> None:
        super().__init__()
        self.encoder, self.pyramid = encoder, pyramid
        self.out_channels = pyramid.channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.pyramid(self.encoder.stages(images))
        return OrderedDict((str(index), level.float()) for index, level in enumerate(maps))


class _AsTheyAre(nn.Module):
    """In place of torchvision's transform: images come normalized and of one size already."""

    def forward(self, images: Tensor, targets: Any) -> tuple[ImageList, Any]:
        height, width = images.shape[-2:]
        return ImageList(images, [(height, width)] * len(images)), targets

    def postprocess(self, found: Any, sizes: Any, original_sizes: Any) -> Any:
        return found


def _to_float(module: nn.Module, arguments: Any, output: Any) -> Any:
    """A forward hook: losses and boxes are computed in float32."""
    if isinstance(output, Tensor):
        return output.float()
    if isinstance(output, dict):
        return {name: _to_float(module, arguments, value) for name, value in output.items()}
    return type(output)(_to_float(module, arguments, value) for value in output)


class Detector(PyramidModel):
    """An encoder, a pyramid and one of torchvision's detectors.

    Args:
        encoder: becomes a part of it.
        classes: K names.
        kind: ``fcos`` (Tian et al. 2019), ``retinanet`` (Lin et al. 2017) or ``faster_rcnn`` (Ren
            et al. 2015, with the pyramid of Lin et al. 2017).
        canvas: height and width in pixels that images are fitted into.

    Attributes:
        threshold: the score from which on to believe a box; training sets it.
    """

    def __init__(
        self, encoder: Encoder, classes: Sequence[str], kind: DetectorName, canvas: tuple[int, int]
    ) -> None:
        super().__init__()
        self.classes, count = list(classes), len(classes)
        self.kind, self.canvas, self.threshold = kind, canvas, 0.5
        pyramid = Pyramid(encoder, CHANNELS, finest=4 if kind == "faster_rcnn" else 8)
        maps, strides = _Maps(encoder, pyramid), pyramid.strides
        usual: dict[str, Any] = {"min_size": min(canvas), "max_size": max(canvas)}
        self.net: Any
        if kind == "fcos":
            anchors = AnchorGenerator(tuple((s,) for s in strides), ((1.0,),) * len(strides))
            self.net = FCOS(
                maps, count, anchor_generator=anchors, score_thresh=LEAST_SCORE, **usual
            )
            heads = [self.net.head]
        elif kind == "retinanet":
            octave = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
            sizes = tuple(tuple(round(4 * s * o) for o in octave) for s in strides)
            anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(strides))
            self.net = RetinaNet(
                maps,
                count,
                anchor_generator=anchors,
                score_thresh=LEAST_SCORE,
                detections_per_img=100,  # as the other two
                **usual,
            )
            heads = [self.net.head]
        else:
            sizes = tuple((8 * s,) for s in strides)
            anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(strides))
            names = [str(index) for index in range(len(strides))]
            self.net = FasterRCNN(
                maps,
                count + 1,  # the first is the background
                rpn_anchor_generator=anchors,
                box_roi_pool=MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2),
                box_score_thresh=LEAST_SCORE,
                # half and a quarter of torchvision's numbers: small images, small machines
                rpn_pre_nms_top_n_train=1000,
                rpn_post_nms_top_n_train=500,
                rpn_pre_nms_top_n_test=500,
                rpn_post_nms_top_n_test=300,
                box_batch_size_per_image=128,
                **usual,
            )
            heads = [self.net.rpn.head, self.net.roi_heads.box_predictor]
        self.heads = heads  # a list, so that their weights keep their names
        for head in heads:
            head.register_forward_hook(_to_float)
        self.net.transform = _AsTheyAre()

    @property
    def encoder(self) -> Encoder:
        """The encoder in it."""
        encoder: Encoder = self.net.backbone.encoder
        return encoder

    def losses(self, images: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The detector's losses, by torchvision's names.

        Args:
            images: ``(B, C, H, W)``, normalized.
            targets: for each image ``boxes`` ``(N, 4)`` in pixels and ``labels`` ``(N,)`` from 0.
        """
        if self.kind == "faster_rcnn":
            targets = [{**target, "labels": target["labels"] + 1} for target in targets]
        losses: dict[str, Tensor] = self.net(images, targets)
        return losses

    def forward(self, images: Tensor) -> list[dict[str, Tensor]]:
        """``boxes``, ``scores`` and ``labels`` (from 0) of each normalized image."""
        found: list[dict[str, Tensor]] = self.net(images)
        if self.kind == "faster_rcnn":
            found = [{**one, "labels": one["labels"] - 1} for one in found]
        return found


def choose_canvas(images: Sequence[BoxedImage], encoder: Encoder) -> tuple[int, int]:
    """Height and width to fit images into: the shape that most of them have, else a square.

    The longer side is the encoder's image size; no pixels are wasted on padding where all images
    have one shape.

    Args:
        images: of the training part.
        encoder: that is to take them.
    """
    size = encoder.image_size
    shapes = np.array([image.size for image in images], dtype=float)
    ratios = shapes[:, 0] / shapes[:, 1]
    usual = float(np.median(ratios))
    alike = np.mean(np.abs(np.log(ratios / usual)) < 0.1)
    if alike < 0.9:
        return size, size
    step = max(32, encoder.patch_size or 1)
    short = max(step, round(size * min(usual, 1 / usual) / step) * step)
    canvas = (short, size) if usual < 1 else (size, short)
    try:
        encoder.stage_shapes(*canvas)
    except (AssertionError, RuntimeError, ValueError):
        return size, size  # the backbone takes squares alone
    return canvas


def fit_into(image: np.ndarray, canvas: tuple[int, int]) -> tuple[np.ndarray, float]:
    """Resize an image to fit into a canvas, at its upper left.

    Args:
        image: ``(h, w, C)`` uint8.
        canvas: height and width.

    Returns:
        ``(H, W, C)`` and the factor by which the image was enlarged.
    """
    scale = min(canvas[0] / image.shape[0], canvas[1] / image.shape[1])
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    whole = np.full((*canvas, image.shape[2]), PADDING, np.uint8)
    whole[:height, :width] = cv2.resize(image, (width, height), interpolation=way)
    return whole, scale


def detect(
    detector: Detector,
    paths: Sequence[str],
    progress: Callable[[int], None] | None = None,
    batch_size: int = 8,
) -> tuple[list[Detections], np.ndarray]:
    """Find objects in images.

    Args:
        detector: put on the accelerator if there is one, and back afterwards.
        paths: image files. Broken ones are left out, and named in the log.
        progress: called with the number of images done since the last call.
        batch_size: images at a time.

    Returns:
        For each readable image what is found in it; and ``(M,)`` bool: which of all M images these
        are.

    Raises:
        UserError: no image can be read.
    """
    found: list[Detections] = []
    good = detect_in_batches(
        detector, paths, lambda some, those, sizes: found.extend(those), progress, batch_size
    )
    return found, good


def detect_in_batches(
    detector: Detector,
    paths: Sequence[str],
    use: Callable[[list[str], list[Detections], list[tuple[int, int]]], None],
    progress: Callable[[int], None] | None = None,
    batch_size: int = 8,
) -> np.ndarray:
    """The same as ``detect``, but each batch is used at once, so that nothing has to be kept.

    Args:
        detector: put on the accelerator if there is one, and back afterwards.
        paths: image files. Broken ones are left out, and named in the log.
        use: called with the paths of the images of a batch that can be read, what is found in
            each, and their heights and widths.
        progress: called with the number of images done since the last call.
        batch_size: images at a time.

    Returns:
        ``(M,)`` bool: which images can be read.

    Raises:
        UserError: no image can be read, or what the heads say is not finite.
    """
    faults: list[str | None] = []
    with inference_mode(detector) as device, _finite_heads(detector) as named:
        for start in range(0, len(paths), batch_size):
            some = paths[start : start + batch_size]
            named[:] = some
            read: list[str] = []
            fitted, scales, sizes = [], [], []
            for path in some:
                try:
                    image = read_image(path)
                except BROKEN_IMAGE as error:
                    faults.append(reason(error, path))
                    continue
                faults.append(None)
                read.append(path)
                whole, scale = fit_into(image, detector.canvas)
                fitted.append(whole)
                scales.append(scale)
                sizes.append((image.shape[0], image.shape[1]))
            if fitted:
                batch = torch.from_numpy(np.stack(fitted)).permute(0, 3, 1, 2).to(device)
                outputs = detector(detector.encoder.normalize(batch))
                those = [_on_image(*one) for one in zip(outputs, scales, sizes, strict=True)]
                use(read, those, sizes)
            if progress is not None:
                progress(len(some))
    return report_broken(paths, faults)


@contextmanager
def _finite_heads(detector: Detector) -> Iterator[list[str]]:
    """Refuse what is not finite where the heads say it: torchvision's next steps would drop it.

    Yields:
        A list for the images that are on their way, to be named.
    """
    named: list[str] = []

    def check(module: nn.Module, arguments: Any, output: Any) -> None:
        said = output.values() if isinstance(output, dict) else output
        flat = [one for some in said for one in (some if isinstance(some, list) else [some])]
        check_outputs(flat, f"{named[0]} or one of the {len(named)} images from there on")

    hooks = [head.register_forward_hook(check) for head in detector.heads]
    try:
        yield named
    finally:
        for hook in hooks:
            hook.remove()


def _on_image(output: dict[str, Tensor], scale: float, size: tuple[int, int]) -> Detections:
    """From the canvas back to the image; what lies in the padding is left out."""
    boxes = output["boxes"].float().cpu().numpy() / scale
    boxes[:, 0::2] = boxes[:, 0::2].clip(0, size[1])
    boxes[:, 1::2] = boxes[:, 1::2].clip(0, size[0])
    scores, labels = output["scores"].float().cpu().numpy(), output["labels"].cpu().numpy()
    real = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(axis=1)
    order = np.argsort(-scores[real], kind="stable")
    return Detections(boxes[real][order], scores[real][order], labels[real][order])


def save_detector(detector: Detector, folder: Path, about: dict[str, Any]) -> None:
    """Write a model folder; see ``save_with_head``.

    Args:
        detector: from ``train_detector``.
        folder: where.
        about: more to say.
    """
    what = {
        "task": "detection",
        "classes": detector.classes,
        "detector": detector.kind,
        "canvas": list(detector.canvas),
        "threshold": detector.threshold,
    }
    save_with_head(detector, detector.encoder, folder, {**what, **about})


def load_detector(folder: Path) -> Detector:
    """Load what ``save_detector`` wrote.

    Args:
        folder: a run of ``finetune``, or the ``model`` folder in it.

    Raises:
        UserError: there is no detector, or it is damaged.
    """

    def build(encoder: Encoder, about: dict[str, Any]) -> Detector:
        kind, canvas, threshold = about["detector"], about["canvas"], about["threshold"]
        if kind not in get_args(DetectorName):
            raise ValueError(f"unknown detector {str(kind)[:60]!r}")
        if not isinstance(canvas, list) or len(canvas) != 2:
            raise ValueError("the canvas is no height and width")
        most = encoder.image_size + 32  # ``choose_canvas`` rounds up to steps of 32
        if not all(type(side) is int and 1 <= side <= most for side in canvas):
            raise ValueError(f"the sides of the canvas are not from 1 to {most} pixels")
        if not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
            raise ValueError("the threshold is no number from 0 to 1")
        encoder.stage_shapes(*canvas)
        detector = Detector(encoder, about["classes"], kind, (canvas[0], canvas[1]))
        detector.threshold = float(threshold)
        return detector

    return load_with_head(folder, "detection", build)[0]
