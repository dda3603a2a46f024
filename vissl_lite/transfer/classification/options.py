"""Options of classification."""

from dataclasses import dataclass

from vissl_lite.errors import check_not_negative, check_warmup
from vissl_lite.transfer.finetuning import TransferSettings
from vissl_lite.transfer.options import ClassNameOptions, ClassWeightsOption, SourceOptions

# Strength of the color jitter at which brightness is between black and 1.8 times itself.
MAX_COLOR = 1.25

# Parameter of mixup and CutMix at which almost all ratios are one half.
MAX_ALPHA = 1000.0


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
    mixup: float = 0.0
    """Mix pairs of training images: parameter alpha of mixup; 0.8 in DeiT and MAE, for many labels
    and long trainings. 0 for none."""
    cutmix: float = 0.0
    """Put a rectangle of one training image into another: parameter alpha of CutMix; 1 in DeiT and
    MAE. With --mixup, half of the batches have each. 0 for none."""
    drop_path: float = 0.0
    """Probability of leaving out a branch of the last block of a transformer, less in earlier
    blocks (stochastic depth); 0.1 in MAE."""
    color: float = 0.5
    """Strength of the color jitter of training images: brightness, contrast and saturation change
    by up to 0.8 times it, the hue by up to 0.2 of the circle times it. 0 leaves colors alone."""
    rand_augment: float = 0.0
    """Strength, up to 10, of two random operations on each training image (RandAugment): turns,
    shears, shifts, colors and others; 9 in DeiT and MAE, for many labels. 0 for none."""


@dataclass(frozen=True, kw_only=True)
class ClassifierSettings(TransferSettings, ClassificationOptions):
    """Settings of the training of a classifier.

    Attributes:
        label_smoothing: Share s of the target that is spread over all classes (Szegedy et al. 2016,
            section 7); with several labels per image over yes and no, so that targets are s / 2 and
            1 - s / 2.
        balanced: Sample all classes equally often.
        mixup, cutmix: See ``mixing.mix``.
        drop_path: See ``set_drop_path``.
        color: Strength of the color jitter, see ``color_distortion``.
        rand_augment: Magnitude of ``RandAugment``; 0 for none.
        class_weights: Weights of the classes in the loss, see ``loss_weights``: ``balanced``, or a
            weight by name. None for all alike.
    """

    def __post_init__(self) -> None:
        check_warmup("label_smoothing", self.label_smoothing)
        check_not_negative("color", self.color, MAX_COLOR)
        check_not_negative("rand_augment", self.rand_augment, 10)
        check_not_negative("mixup", self.mixup, MAX_ALPHA)
        check_not_negative("cutmix", self.cutmix, MAX_ALPHA)
        check_warmup("drop_path", self.drop_path)
