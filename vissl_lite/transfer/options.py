"""Options that several tasks share. Each task combines them in its own ``options.py``."""

from dataclasses import dataclass
from typing import Literal

from vissl_lite.options import StrPath


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Base of the options that one task has and others may lack."""


@dataclass(frozen=True, kw_only=True)
class AnnotationsOption(TaskOptions):
    """Option for the annotations."""

    annotations: StrPath | None = None
    """Where the boxes or masks are, if --data is the folder of the images alone."""


@dataclass(frozen=True, kw_only=True)
class FrozenNormOption(TaskOptions):
    """Option for BatchNorm in small batches."""

    frozen_norm: bool | None = None
    """Leave the encoder's BatchNorms as they are, for detection and segmentation; default where a
    batch has fewer than 8 images, which is too few for them; never for random:NAME."""


@dataclass(frozen=True, kw_only=True)
class ClassWeightsOption(TaskOptions):
    """Option for class weights."""

    class_weights: Literal["balanced"] | dict[str, float] | None = None
    """Weights of the classes in the loss: balanced, or a weight for each name."""
