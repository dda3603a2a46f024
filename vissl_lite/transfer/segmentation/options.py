"""Options and settings of segmentation."""

from dataclasses import dataclass

from vissl_lite.transfer.finetuning import TransferSettings
from vissl_lite.transfer.options import AnnotationsOption, ClassWeightsOption, SourceOptions


@dataclass(frozen=True, kw_only=True)
class SegmentationOptions(SourceOptions, AnnotationsOption, ClassWeightsOption):
    """Command-line options of segmentation."""


@dataclass(frozen=True, kw_only=True)
class SegmenterSettings(TransferSettings, SegmentationOptions):
    """Settings for training a segmenter.

    Attributes:
        class_weights: Class weights in the loss, by name, 1 for classes without one; or
            ``balanced``: inverse to the frequency of the class. None gives equal weights.
    """
