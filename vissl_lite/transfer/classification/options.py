"""Options of classification."""

from dataclasses import dataclass

from vissl_lite.errors import check_warmup
from vissl_lite.transfer.finetuning import TransferSettings
from vissl_lite.transfer.options import ClassNameOptions, ClassWeightsOption, SourceOptions


@dataclass(frozen=True, kw_only=True)
class LabelOptions(SourceOptions, ClassNameOptions):
    """Options for reading classes of images."""


# Everything by its usual name.
DEFAULT_LABELS = LabelOptions()


@dataclass(frozen=True, kw_only=True)
class ClassificationOptions(LabelOptions, ClassWeightsOption):
    """Options of classification."""

    label_smoothing: float = 0.1
    """Share of the target that is spread over all classes."""
    balanced: bool = False
    """Sample all classes equally often."""


@dataclass(frozen=True, kw_only=True)
class ClassifierSettings(TransferSettings, ClassificationOptions):
    """Settings of the training of a classifier.

    Attributes:
        label_smoothing: Share s of the target that is spread over all classes (Szegedy et al. 2016,
            section 7); with several labels per image over yes and no, so that targets are s / 2 and
            1 - s / 2.
        balanced: Sample all classes equally often.
        class_weights: Weights of the classes in the loss, see ``loss_weights``: ``balanced``, or a
            weight by name. None for all alike.
    """

    def __post_init__(self) -> None:
        check_warmup("label_smoothing", self.label_smoothing)
