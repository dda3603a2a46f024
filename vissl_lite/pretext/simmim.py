"""SimMIM: replace patches by a mask token and predict their pixels with one linear layer.

Xie, Zhang, Cao, Lin, Bao, Yao, Dai & Hu 2021, "SimMIM: A Simple Framework for Masked Image
Modeling", arXiv 2111.09886.
"""

import math

import torch
from torch import Tensor, nn

from vissl_lite.data.views import Views
from vissl_lite.encoders.drop_path import remove_drop_path
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import UserError
from vissl_lite.optim import OptimizerSettings
from vissl_lite.pretext.base import PretextInfo, PretextTask, Visualization
from vissl_lite.pretext.modules.crops import cropped_views
from vissl_lite.pretext.modules.masking import (
    check_patches,
    check_ratio,
    indices_to_mask,
    masked_patches,
    random_mask,
)
from vissl_lite.pretext.modules.visualization import reconstruction


def default_mask_unit(size: int, patch: int) -> int:
    """Side of a masked square: about a sixth of the image, as 32 of 192 (section 4.1).

    The multiple of the patch closest to a sixth of the image, among those that divide the image
    into at least 2 x 2 squares; the larger one of two equally close ones. 32 at 192 and 224 pixels
    with patches of 4 or 16 as in the paper, 8 at 64 pixels with patches of 4.

    Args:
        size: Side of the image in pixels, a multiple of the patch.
        patch: Side of the encoder's patches in pixels.
    """
    units = [unit for unit in range(patch, size // 2 + 1, patch) if size % unit == 0]
    return min(units, key=lambda unit: (abs(unit - size / 6), -unit))


def enlarge(mask: Tensor, factor: int) -> Tensor:
    """Upsample a mask by repeating each element.

    Args:
        mask: ``(B, h, w)`` mask.
        factor: Upsampling factor.

    Returns:
        ``(B, h * factor, w * factor)``.
    """
    return mask.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def masked_l1(predicted: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute error over the masked pixels and their channels (section 3.4).

    Args:
        predicted: ``(B, C, S, S)`` predictions.
        images: ``(B, C, S, S)`` targets.
        mask: ``(B, S, S)``, true where masked.

    Returns:
        Scalar, computed in float32.
    """
    distance = (predicted.float() - images.float()).abs() * mask[:, None]
    return distance.sum() / (mask.sum() * images.shape[1])


class SimMIM(PretextTask):
    """SimMIM.

    The encoder processes all positions, including masked ones. This supports hierarchical
    transformers such as Swin, but costs several times as much as MAE for a ViT. Layers after the
    last feature map are not trained: a class token is trained only through attention, a pooling
    layer with weights not at all. There is no stochastic depth, as in the authors' configuration of
    Swin (their ViTs have 0.1); timm's Swin has 0.1 by default.

    The default learning rate is for runs of minutes to hours; with ``--epochs`` it falls with the
    length of the run to the paper's (``--base_lr 1e-4``). For ImageNet see
    ``configs/imagenet/simmim.yaml``.

    Args:
        encoder: Encoder to train; a ViT or a Swin Transformer.
        mask_ratio: Fraction of the image to mask (table 1).
        mask_unit: Side of a masked square in pixels; default about a sixth of the image, as the
            paper's 32 for 192, that is a multiple of the patch size and divides the image size.
        min_crop_scale: Smallest fraction of the image area in a view (section 4.1).
    """

    info = PretextInfo(
        name="simmim",
        family="masked",
        views="1",
        paper="Xie et al. 2021, arXiv 2111.09886",
        use="Swin Transformers, and ViTs that will be fine-tuned; needs long runs",
        backbones="patches",
        long_run_lr=0.1,
    )
    # The paper uses 8e-4 for batches of 2048, so 1e-4 for 256 (section 4.1), for long runs on
    # ImageNet, and so do we there. The authors' code clips gradients at 5.
    optimizer_settings = OptimizerSettings(
        "adamw", lr=1e-3, weight_decay=0.05, scaling="linear", clip_norm=5.0
    )

    def __init__(
        self,
        encoder: Encoder,
        mask_ratio: float = 0.6,
        mask_unit: int | None = None,
        min_crop_scale: float = 0.67,
    ) -> None:
        super().__init__(encoder)
        remove_drop_path(encoder)
        encoder.freeze_after_map()
        check_ratio(mask_ratio)
        size, patch = encoder.image_size, check_patches(self.info, encoder)
        unit = default_mask_unit(size, patch) if mask_unit is None else mask_unit
        if unit < 1 or unit % patch or size % unit or unit == size:
            raise UserError(
                f"--pretext.mask_unit {unit} must be a smaller multiple of the patch size "
                f"({patch}) that divides the image size ({size}), such as "
                f"{default_mask_unit(size, patch)}"
            )
        stride = self._stride()
        channels = len(encoder.mean)
        self.head = nn.Sequential(
            nn.Conv2d(encoder.map_features, stride**2 * channels, 1), nn.PixelShuffle(stride)
        )
        width = encoder.model.patch_embed.proj.out_channels
        self.mask_token = nn.Parameter(torch.empty(width).normal_(std=0.02))
        self.patch, self.unit, self.mask_ratio = patch, unit, mask_ratio
        self.min_crop_scale = min_crop_scale

    def _stride(self) -> int:
        """Stride of the last feature map in pixels."""
        size, side = self.encoder.image_size, self.encoder.map_side()
        if size % side:
            raise UserError(
                f"the pretext simmim can't split {size} pixels among the {side} x {side} positions "
                f"of {self.encoder.backbone}'s last feature map: choose a multiple of 32"
            )
        return size // side

    def views(self, upright: bool = True) -> Views:
        return cropped_views(self.encoder.image_size, self.min_crop_scale, upright)

    def loss(self, views: list[Tensor]) -> Tensor:
        images = views[0]
        mask = self.draw_mask(images)
        return masked_l1(self.predict(images, mask), images, enlarge(mask, self.unit))

    def visualize(self, views: list[Tensor]) -> Visualization:
        images = views[0]
        mask = self.draw_mask(images)
        predicted = self.predict(images, mask)
        return reconstruction(self.encoder, images, mask[:, None], predicted, "reconstructed")

    def draw_mask(self, images: Tensor) -> Tensor:
        """Draw a random mask for each image: ``(B, S / unit, S / unit)``, true where masked."""
        side = self.encoder.image_size // self.unit
        # rounded up, as in the authors' code
        _, masked = random_mask(len(images), side**2, self.mask_ratio, images.device, math.ceil)
        return indices_to_mask(masked, side**2).unflatten(1, (side, side))

    def predict(self, images: Tensor, mask: Tensor) -> Tensor:
        """Predict all pixels of masked images.

        Args:
            images: ``(B, C, S, S)`` normalized images.
            mask: ``(B, S / unit, S / unit)``, true where masked.

        Returns:
            ``(B, C, S, S)`` predictions.
        """
        patches = enlarge(mask, self.unit // self.patch)
        with masked_patches(self.encoder.model, patches, self.mask_token):
            last = self.encoder.pooled_and_map(images)[1]
        predicted: Tensor = self.head(last)
        return predicted
