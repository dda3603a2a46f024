"""The options that segmentation has beside those of all tasks."""

from dataclasses import dataclass

from vissl_lite.transfer.options import AnnotationsOption, ClassWeightsOption, FrozenNormOption
from vissl_lite.transfer.pyramid import PyramidSettings


@dataclass(frozen=True, kw_only=True)
class SegmentationOptions(AnnotationsOption, FrozenNormOption, ClassWeightsOption):
    """Options of segmentation."""


@dataclass(frozen=True, kw_only=True)
class SegmenterSettings(PyramidSettings, SegmentationOptions):
    """How to train a segmenter.

    Attributes:
        class_weights: weights of the classes in the loss, by name, 1 for those left out; or
            ``balanced``: by how rare a class's pixels are. None weighs all alike.
    """
