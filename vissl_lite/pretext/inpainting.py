"""Inpainting (context encoder): fill in what was cut out of an image.

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
from vissl_lite.pretext.modules.heads import Decoder
from vissl_lite.pretext.modules.visualization import reconstruction

# Blocks that are tried for each image, and the shares that they reach: with less there might be no
# whole pixel, with more only corners would be left, which few blocks cover.
NUM_BLOCKS, MIN_MASKED, MAX_MASKED = 24, 0.01, 0.7


def random_blocks(count: int, size: int, share: float, device: torch.device) -> Tensor:
    """Masks of several, possibly overlapping, rectangles (section 3.3, random block).

    Rectangles have sides from a quarter to a half of the square that has the masked area: several
    are needed, as in the paper. Each is taken if it brings an image nearer to the share.

    Args:
        count: B, how many masks.
        size: side in pixels.
        share: of the area that is masked.
        device: where.

    Returns:
        ``(B, 1, size, size)`` bool: True is masked.
    """
    pixel = torch.arange(size, device=device)
    largest = size * share**0.5 / 2
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
        nearer = (masked - share).abs() < (area - share).abs()
        mask = torch.where(nearer[:, None, None], larger, mask)
        area = torch.where(nearer, masked, area)
    return mask[:, None]


def masked_l2(prediction: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    """Squared error of the masked pixels (eq. 1), over their number.

    Args:
        prediction: ``(B, C, H, W)``.
        images: ``(B, C, H, W)``.
        mask: ``(B, 1, H, W)`` bool: True is masked; somewhere it must be.

    Returns:
        A scalar, the mean over masked values of the batch. Computed in float32.
    """
    error = (prediction.float() - images.float()).square() * mask
    return error.sum() / (mask.sum() * images.shape[1])


class Inpainting(PretextTask):
    """Inpainting, by the reconstruction loss alone.

    The paper adds an adversarial loss, which makes what is filled in look sharp. It is left out
    here, as the authors did where they trained features: it did not converge with their encoder.

    Args:
        encoder: Encoder to train.
        masked: share of the image's area that is cut out, from 0.01 to 0.7; up to a quarter in
            the paper (section 3.3).
        decoder_width: channels of the decoder.
        min_crop_scale: Smallest fraction of the image area in a view.
    """

    info = PretextInfo(
        name="inpainting",
        family="predictive",
        views="1",
        paper="Pathak et al. 2016, arXiv 1604.07379",
        use="the simplest masked task, for convolutional backbones too; slow to learn",
    )
    # The paper's ADAM, with decoupled weight decay.
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
        # Each place of the decoder's map gives a square of pixels.
        self.decoder = Decoder(encoder, len(encoder.mean) * Decoder.STRIDE**2, decoder_width)
        self.masked, self.min_crop_scale = masked, min_crop_scale

    def views(self, upright: bool = True) -> Views:
        return cropped_views(self.encoder.image_size, self.min_crop_scale, upright)

    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        """The whole image as the encoder and the decoder imagine it.

        Args:
            images: ``(B, C, S, S)``, normalized.
            mask: ``(B, 1, S, S)`` bool: what is hidden, by the mean, which is 0.

        Returns:
            ``(B, C, S, S)``.
        """
        visible = images.masked_fill(mask, 0.0)
        decoded = self.decoder(*self.encoder.pooled_and_map(visible), Decoder.size(images))
        pixels = F.pixel_shuffle(decoded, Decoder.STRIDE)
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
