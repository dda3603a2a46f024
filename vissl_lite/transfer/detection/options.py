"""The options that detection has beside those of all tasks."""

from dataclasses import dataclass
from typing import Literal

from vissl_lite.transfer.options import AnnotationsOption, FrozenNormOption
from vissl_lite.transfer.pyramid import PyramidSettings

DetectorName = Literal["fcos", "retinanet", "faster_rcnn"]


@dataclass(frozen=True, kw_only=True)
class DetectionOptions(AnnotationsOption, FrozenNormOption):
    """Options of detection."""

    detector: DetectorName = "faster_rcnn"
    """Which detector; faster_rcnn learns fastest from few images."""
    multi_scale: bool = False
    """Resize each training batch by 0.75 to 1.25 times, for detection."""


@dataclass(frozen=True, kw_only=True)
class DetectorSettings(PyramidSettings, DetectionOptions):
    """How to train a detector.

    Attributes:
        detector: which of torchvision's detectors.
        multi_scale: resize each batch, by 0.75 to 1.25 times (YOLO9000, Redmon & Farhadi 2017,
            section 2). The average step costs a little more.
    """
