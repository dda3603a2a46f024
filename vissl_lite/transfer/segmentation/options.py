"""Options and settings of segmentation."""

from dataclasses import dataclass

from vissl_lite.transfer.options import (
    AnnotationsOption,
    ClassWeightsOption,
    FrozenNormOption,
    SourceOptions,
)
from vissl_lite.transfer.pyramid import PyramidSettings


@dataclass(frozen=True, kw_only=True)
class SegmentationOptions(SourceOptions, AnnotationsOption, FrozenNormOption, ClassWeightsOption):
    """Command-line options of segmentation."""


@dataclass(frozen=True, kw_only=True)
class SegmenterSettings(PyramidSettings, SegmentationOptions):
    """Settings for training a segmenter.

    Attributes:
        class_weights: Class weights in the loss, by name, 1 for classes without one; or
            ``balanced``: inverse to the frequency of the class. None gives equal weights.
    """
