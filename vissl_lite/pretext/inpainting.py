"""Inpainting (context encoder): predict regions that were cut out of an image.

Pathak, Krähenbühl, Donahue, Darrell & Efros 2016, "Context Encoders: Feature Learning by
Inpainting", arXiv 1604.07379.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from vissl_lite.data.views import Views
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import UserError
from vissl_lite.optim import OptimizerSettings
from vissl_lite.pretext.base import PretextInfo, PretextTask, Visualization
from vissl_lite.pretext.modules.crops import cropped_views
from vissl_lite.pretext.modules.heads import MapDecoder
from vissl_lite.pretext.modules.visualization import reconstruction

# Number of blocks to try for each image, and range of the masked fraction. Smaller masks might not
# contain a whole pixel; larger ones would leave corners only, which few blocks cover.
NUM_BLOCKS, MIN_MASKED, MAX_MASKED = 24, 0.01, 0.7


def random_blocks(count: int, size: int, fraction: float, device: torch.device) -> Tensor:
    """Draw masks of several, possibly overlapping, rectangles (section 3.3, random block).

    The sides of a rectangle are a quarter to a half of the side of a square with the masked area,
    so that several are needed, as in the paper. A rectangle is added if this brings the masked
    area closer to ``fraction``.

    Args:
        count: B, number of masks.
        size: Side of a mask in pixels.
        fraction: Fraction of the area to mask.
        device: Device to draw on.

    Returns:
        ``(B, 1, size, size)`` bool, true where masked.
    """
    pixel = torch.arange(size, device=device)
    largest = size * fraction**0.5 / 2
    mask = torch.zeros(count, size, size, dtype=torch.bool, device=device)
    area = torch.zeros(count, device=device)
    for _ in range(NUM_BLOCKS):
        height, width = (largest * (1 + torch.rand(2, count, 1, device=device)) / 2).clamp(min=1)
        top, left = torch.rand(2, count, 1, device=device)
        top, left = top * (size - height), left * (size - width)
        down = (pixel >= top.round()) & (pixel < (top + height).round())
        right = (pixel >= left.round()) & (pixel < (left + width).round())
        larger = mask | (down[:, :, None] & right[:, None, :])
        masked = larger.sum(dim=(1, 2)) / size**2
        closer = (masked - fraction).abs() < (area - fraction).abs()
        mask = torch.where(closer[:, None, None], larger, mask)
        area = torch.where(closer, masked, area)
    return mask[:, None]


def masked_l2(prediction: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over the masked pixels (eq. 1).

    Args:
        prediction: ``(B, C, H, W)`` predictions.
        images: ``(B, C, H, W)`` targets.
        mask: ``(B, 1, H, W)`` bool, true where masked; at least one pixel must be masked.

    Returns:
        Scalar, the mean over the masked values of the batch. Computed in float32.
    """
    error = (prediction.float() - images.float()).square() * mask
    return error.sum() / (mask.sum() * images.shape[1])


class Inpainting(PretextTask):
    """Inpainting with a reconstruction loss.

    The paper adds an adversarial loss for sharper predictions. It is omitted here, as in the
    authors' feature learning experiments, where it did not converge with their encoder.

    Args:
        encoder: Encoder to train.
        masked: Fraction of the image area to mask, from 0.01 to 0.7; up to a quarter in the paper
            (section 3.3).
        decoder_width: Number of channels of the decoder.
        min_crop_scale: Smallest fraction of the image area in a view.
    """

    info = PretextInfo(
        name="inpainting",
        family="predictive",
        views="1",
        paper="Pathak et al. 2016, arXiv 1604.07379",
        use="the simplest masked task, for convolutional backbones too; slow to learn",
    )
    # Adam as in the paper, with decoupled weight decay.
    optimizer_settings = OptimizerSettings("adamw", lr=1e-3, weight_decay=1e-4, scaling="sqrt")

    def __init__(
        self,
        encoder: Encoder,
        masked: float = 0.25,
        decoder_width: int = 128,
        min_crop_scale: float = 0.3,
    ) -> None:
        super().__init__(encoder)
        if not MIN_MASKED <= masked <= MAX_MASKED:
            raise UserError(f"--pretext.masked {masked} must be in [{MIN_MASKED}, {MAX_MASKED}]")
        # Each location of the decoder's map predicts a square of pixels.
        self.decoder = MapDecoder(encoder, len(encoder.mean) * MapDecoder.STRIDE**2, decoder_width)
        self.masked, self.min_crop_scale = masked, min_crop_scale

    def views(self, upright: bool = True) -> Views:
        return cropped_views(self.encoder.image_size, self.min_crop_scale, upright)

    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        """Reconstruct masked images.

        Args:
            images: ``(B, C, S, S)`` normalized images.
            mask: ``(B, 1, S, S)`` bool, true for pixels to replace by the mean, which is 0.

        Returns:
            ``(B, C, S, S)`` predictions of all pixels.
        """
        visible = images.masked_fill(mask, 0.0)
        decoded = self.decoder(*self.encoder.pooled_and_map(visible), MapDecoder.size(images))
        pixels = F.pixel_shuffle(decoded, MapDecoder.STRIDE)
        return pixels[:, :, : images.shape[2], : images.shape[3]]

    def loss(self, views: list[Tensor]) -> Tensor:
        images = views[0]
        mask = random_blocks(len(images), images.shape[-1], self.masked, images.device)
        return masked_l2(self.reconstruct(images, mask), images, mask)

    def visualize(self, views: list[Tensor]) -> Visualization:
        images = views[0]
        mask = random_blocks(len(images), images.shape[-1], self.masked, images.device)
        return reconstruction(
            self.encoder, images, mask, self.reconstruct(images, mask), "filled in"
        )
