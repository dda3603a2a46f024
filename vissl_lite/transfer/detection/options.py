"""Options and settings of detection."""

from dataclasses import dataclass
from typing import Literal

from vissl_lite.transfer.finetuning import TransferSettings
from vissl_lite.transfer.options import AnnotationsOption, SourceOptions

DetectorName = Literal["fcos", "retinanet", "faster_rcnn", "mask_rcnn"]


@dataclass(frozen=True, kw_only=True)
class DetectionOptions(SourceOptions, AnnotationsOption):
    """Command-line options of detection."""

    detector: DetectorName = "faster_rcnn"
    """Detector architecture. faster_rcnn learns fastest from few images. mask_rcnn is faster_rcnn
    that also segments each object; it needs polygons or run lengths of objects in the
    annotations."""
    multi_scale: bool = False
    """Resize each training batch by a random factor from 0.75 to 1.25, for detection."""


@dataclass(frozen=True, kw_only=True)
class DetectorSettings(TransferSettings, DetectionOptions):
    """Settings for training a detector.

    Attributes:
        detector: Detector architecture, from torchvision.
        multi_scale: Resize each batch by a random factor from 0.75 to 1.25 (YOLO9000, Redmon &
            Farhadi 2017, section 2). This makes the average step slightly slower.
    """
