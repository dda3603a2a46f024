"""MAE: encode a quarter of the patches of an image and decode the pixels of all others.

He, Chen, Xie, Li, Dollar & Girshick 2021, "Masked Autoencoders Are Scalable Vision Learners",
arXiv 2111.06377.
"""

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from vissl_lite.data.views import Views
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import LARGEST_DEPTH, check_sizes
from vissl_lite.optim import OptimizerSettings
from vissl_lite.pretext.base import PretextInfo, PretextTask, Visualization
from vissl_lite.pretext.modules.crops import cropped_views
from vissl_lite.pretext.modules.masking import (
    PatchPredictor,
    check_patches,
    check_ratio,
    denormalized_patches,
    encode_visible,
    gather_tokens,
    indices_to_mask,
    narrow_width,
    normalized_patches,
    patchify,
    random_mask,
    unpatchify,
)
from vissl_lite.pretext.modules.visualization import reconstruction


class MAE(PretextTask):
    """Masked autoencoder.

    Layers after the last patch tokens are not trained: a class token is trained only through
    attention in the encoder and in the decoder, which takes it as input (appendix A.1), and a
    pooling layer with weights not at all. Fine-tuning benefits more from the pre-training than a
    linear probe (section 4.3).

    The default learning rate is for runs of minutes to hours; with ``--epochs`` it falls with the
    length of the run to the paper's (``--base_lr 1.5e-4``). For ImageNet see
    ``configs/imagenet/mae.yaml``. The encoder has timm's initial weights, in the authors' code
    Xavier-uniform ones; this was not measured.

    Args:
        encoder: Encoder to train; a plain ViT.
        mask_ratio: Fraction of the patches to mask (figure 5).
        decoder_width: Width of the decoder, a multiple of 32; default two thirds of the encoder's
            width, as the paper's 512 for 768 of ViT-B (table 1b).
        decoder_depth: Number of decoder blocks; default 8 as in the paper (table 1a) from the width
            of ViT-S (384), else 2. The decoder processes all patches, the encoder a quarter: 8
            blocks would cost more than a whole ViT-Tiny, and one is enough before fine-tuning
            (table 1a).
        normalize_pixels: Whether to predict pixels normalized within their patch (table 1d).
        min_crop_scale: Smallest fraction of the image area in a view; 0.2 as in the authors' code
            (main_pretrain.py).
    """

    info = PretextInfo(
        name="mae",
        family="masked",
        views="1",
        paper="He et al. 2021, arXiv 2111.06377",
        use="ViTs that will be fine-tuned; the cheapest training step; needs long runs",
        backbones="ViT",
        fixed_positions=True,
        long_run_lr=0.1,
    )
    # Ten times the learning rate of the paper (table 8), which is for 800 epochs of ImageNet and
    # the default in runs of that kind.
    optimizer_settings = OptimizerSettings(
        "adamw", lr=1.5e-3, weight_decay=0.05, scaling="linear", betas=(0.9, 0.95)
    )

    def __init__(
        self,
        encoder: Encoder,
        mask_ratio: float = 0.75,
        decoder_width: int | None = None,
        decoder_depth: int | None = None,
        normalize_pixels: bool = True,
        min_crop_scale: float = 0.2,
    ) -> None:
        super().__init__(encoder)
        encoder.freeze_after_map()
        check_ratio(mask_ratio)
        check_sizes(decoder_width=decoder_width)
        check_sizes(LARGEST_DEPTH, decoder_depth=decoder_depth)
        self.patch = check_patches(self.info, encoder)
        self.side = encoder.image_size // self.patch
        features = encoder.map_features
        self.decoder = PatchPredictor(
            features,
            self.side,
            width=decoder_width or narrow_width(features, 2 / 3),
            depth=decoder_depth or (2 if features < 384 else 8),
            outputs=self.patch**2 * len(encoder.mean),
        )
        self.mask_ratio, self.normalize_pixels = mask_ratio, normalize_pixels
        self.min_crop_scale = min_crop_scale

    def views(self, upright: bool = True) -> Views:
        return cropped_views(self.encoder.image_size, self.min_crop_scale, upright)

    def loss(self, views: list[Tensor]) -> Tensor:
        images = views[0]
        visible, masked = self.draw_mask(images)
        prefix, tokens = self.forward_encoder(images, visible)
        predicted = self.forward_decoder(prefix, tokens, visible, masked)
        # The mean over masked patches only (section 3).
        return F.mse_loss(predicted.float(), gather_tokens(self.targets(images), masked))

    def draw_mask(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Draw the indices of visible, ``(B, N - M)``, and masked patches, ``(B, M)``."""
        return random_mask(len(images), self.side**2, self.mask_ratio, images.device)

    def forward_encoder(self, images: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        """Encode the visible patches.

        Args:
            images: ``(B, C, S, S)`` normalized images.
            visible: ``(B, K)`` indices of the visible patches.

        Returns:
            ``(B, P, D)`` class and register tokens, and ``(B, K, D)`` patch tokens.
        """
        return encode_visible(self.encoder, images, visible)

    def forward_decoder(
        self, prefix: Tensor, tokens: Tensor, visible: Tensor, masked: Tensor
    ) -> Tensor:
        """Predict the masked patches.

        Args:
            prefix: ``(B, P, D)`` class and register tokens.
            tokens: ``(B, K, D)`` tokens of the visible patches.
            visible: ``(B, K)`` indices of the visible patches.
            masked: ``(B, M)`` indices of the masked patches.

        Returns:
            ``(B, M, patch * patch * C)`` predicted pixels.
        """
        predicted: Tensor = self.decoder(prefix, tokens, visible, masked)
        return predicted

    def targets(self, images: Tensor) -> Tensor:
        """Compute the prediction targets of all patches.

        Args:
            images: ``(B, C, S, S)`` normalized images.

        Returns:
            ``(B, N, patch * patch * C)`` target pixels.
        """
        if self.normalize_pixels:
            return normalized_patches(images, self.patch)
        return patchify(images, self.patch)

    def visualize(self, views: list[Tensor]) -> Visualization:
        images, title = views[0], "reconstructed"
        visible, masked = self.draw_mask(images)
        prefix, tokens = self.forward_encoder(images, visible)
        predicted = self.forward_decoder(prefix, tokens, visible, masked).float()
        indices = masked[:, :, None].expand_as(predicted)
        patches = self.targets(images).scatter(1, indices, predicted)
        if self.normalize_pixels:
            patches = denormalized_patches(patches, images, self.patch)
            title = "reconstructed, mean and\ncontrast of patches given"
        mask = indices_to_mask(masked, self.side**2).view(-1, 1, self.side, self.side)
        return reconstruction(self.encoder, images, mask, unpatchify(patches, self.patch), title)
