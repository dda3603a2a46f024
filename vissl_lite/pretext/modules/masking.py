"""What the masked pretexts share: masks, patches, an encoder on the visible ones, a predictor."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import UserError
from vissl_lite.pretext.base import BACKBONE_KINDS, PretextInfo


def check_ratio(ratio: float) -> None:
    """Raise a UserError for a masked share that is not between 0 and 1."""
    if not 0 < ratio < 1:
        raise UserError(f"--pretext.mask_ratio {ratio} is not a share: it must be between 0 and 1")


def check_patches(info: PretextInfo, encoder: Encoder) -> int:
    """Raise a UserError unless masking can hide an encoder's patches.

    Patches that overlap, or that come from a convolutional stem, see the pixels beside them: what
    is masked would still be seen.

    Args:
        info: the pretext that asks.
        encoder: with a ``patch_embed``.

    Returns:
        Their side in pixels.

    Raises:
        UserError: it is not one convolution that cuts the image into at least 2 x 2 whole patches.
    """
    patch, size = encoder.patch_size, encoder.image_size
    assert patch is not None  # as there is a patch_embed
    embed = encoder.model.patch_embed
    cuts = [module for module in embed.modules() if isinstance(module, nn.Conv2d)]
    if len(cuts) != 1 or not cuts[0].kernel_size == cuts[0].stride == (patch, patch):
        raise UserError(
            f"the pretext {info.name} needs patches that do not overlap, and those of "
            f"{encoder.backbone} do: try one of {BACKBONE_KINDS[info.backbones][1]}"
        )
    if size % patch or size < 2 * patch:
        near = max(2, round(size / patch)) * patch
        raise UserError(
            f"the pretext {info.name} needs at least 2 x 2 whole patches: images of {size} pixels "
            f"do not hold them with patches of {patch}, those of {near} do"
        )
    return patch


def num_masked(count: int, ratio: float) -> int:
    """How many patches to mask: at least one, and one stays visible.

    Args:
        count: patches of an image; at least 2.
        ratio: share that is to be masked.
    """
    return min(max(round(ratio * count), 1), count - 1)


def random_mask(
    batch: int, count: int, ratio: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Choose the patches to mask, equally many in each image, anew for each image.

    Args:
        batch: B, number of images.
        count: N, number of patches of an image; at least 2.
        ratio: Share of the patches that is masked; see ``num_masked``.
        device: Device to draw on.

    Returns:
        ``(B, N - M)`` indices of the visible patches and ``(B, M)`` of the masked ones, both
        ascending.
    """
    masked = num_masked(count, ratio)
    shuffled = torch.rand(batch, count, device=device).argsort(dim=1)
    return shuffled[:, masked:].sort(dim=1).values, shuffled[:, :masked].sort(dim=1).values


def indices_to_mask(indices: Tensor, count: int) -> Tensor:
    """Mask of the patches with the given indices.

    Args:
        indices: ``(B, K)``, below N.
        count: N, number of patches of an image.

    Returns:
        ``(B, N)`` bool, true at the indices.
    """
    empty = torch.zeros(len(indices), count, dtype=torch.bool, device=indices.device)
    return empty.scatter(1, indices, True)


def gather_tokens(tokens: Tensor, where: Tensor) -> Tensor:
    """Some of each image's tokens.

    Args:
        tokens: ``(B, N, D)``.
        where: ``(B, K)`` indices below N.

    Returns:
        ``(B, K, D)``.
    """
    return tokens.gather(1, where[:, :, None].expand(-1, -1, tokens.shape[2]))


def patchify(images: Tensor, patch: int) -> Tensor:
    """Cut images into patches, row by row as timm does.

    Args:
        images: ``(B, C, H, W)``.
        patch: side in pixels.

    Returns:
        ``(B, N, patch * patch * C)``: rows, columns, channels of each patch.
    """
    cut = images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # B C row y column x
    return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch: int) -> Tensor:
    """Join patches to square images; undoes ``patchify``.

    Args:
        patches: ``(B, N, patch * patch * C)``, N a square.
        patch: side in pixels.

    Returns:
        ``(B, C, S, S)``.
    """
    side = math.isqrt(patches.shape[1])
    cut = patches.unflatten(2, (patch, patch, -1)).unflatten(1, (side, side))  # B row column y x C
    return cut.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def normalized_patches(images: Tensor, patch: int) -> Tensor:
    """Patches, each with mean 0 and variance 1 over its own pixels and channels.

    Such targets stress local contrast (MAE, He et al. 2021, section 3 and table 1d). Variance as
    in the authors' code: unbiased, plus 1e-6.

    Args:
        images: ``(B, C, H, W)``.
        patch: side in pixels.

    Returns:
        ``(B, N, patch * patch * C)`` in float32.
    """
    patches = patchify(images.float(), patch)
    variance, mean = torch.var_mean(patches, dim=2, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


def denormalized_patches(patches: Tensor, images: Tensor, patch: int) -> Tensor:
    """Patches with the mean and variance of an image's own; undoes ``normalized_patches``.

    Args:
        patches: ``(B, N, patch * patch * C)``, normalized each for itself.
        images: ``(B, C, H, W)``, where their means and variances are taken from.
        patch: side in pixels.

    Returns:
        ``(B, N, patch * patch * C)`` in float32.
    """
    variance, mean = torch.var_mean(patchify(images.float(), patch), dim=2, keepdim=True)
    return patches.float() * (variance + 1e-6).sqrt() + mean


@contextmanager
def masked_patches(model: Any, mask: Tensor, token: Tensor) -> Iterator[None]:
    """Within it, a model sees a token instead of each masked patch.

    A forward hook on the patch embedding, which comes before everything else.

    Args:
        model: a timm model with a ``patch_embed``.
        mask: ``(B, h, w)``, true where a patch is masked.
        token: ``(D,)``, what stands there instead.
    """

    def replace(embed: nn.Module, images: tuple[Tensor, ...], tokens: Tensor) -> Tensor:
        shown = token.to(tokens.dtype)
        if tokens.ndim == 3:
            return torch.where(mask.flatten(1)[:, :, None], shown, tokens)
        if getattr(embed, "output_fmt", "NCHW") == "NHWC":
            return torch.where(mask[..., None], shown, tokens)
        return torch.where(mask[:, None], shown[:, None, None], tokens)

    hook = model.patch_embed.register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()


def encode_visible(encoder: Encoder, images: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Run a ViT on some patches of each image; the others cost nothing (MAE, section 3).

    A forward hook chooses them in the place of timm's patch dropout, which comes after the position
    embedding: each patch keeps its own position.

    Args:
        encoder: Encoder with a plain ViT.
        images: ``(B, C, S, S)``, normalized.
        visible: ``(B, K)`` indices of patches.

    Returns:
        ``(B, P, D)`` class and register tokens (P may be 0), and ``(B, K, D)`` patch tokens.
    """
    model = encoder.model
    first = model.num_prefix_tokens

    def choose(_: nn.Module, __: tuple[Tensor, ...], tokens: Tensor) -> Tensor:
        return torch.cat([tokens[:, :first], gather_tokens(tokens[:, first:], visible)], dim=1)

    hook = model.patch_drop.register_forward_hook(choose)
    try:
        tokens = model.forward_features(images)
    finally:
        hook.remove()
    return tokens[:, :first], tokens[:, first:]


def narrow_width(features: int, share: float) -> int:
    """A share of an encoder's width, in whole heads of 32 as in MAE's decoder (512 with 16 heads).

    Args:
        features: width of the encoder.
        share: of it.
    """
    return max(1, round(features * share / 32)) * 32


class PatchPredictor(nn.Module):
    """A narrow transformer that predicts something of patches that it does not see.

    MAE's decoder and I-JEPA's predictor. Tokens of patches that are seen and a learned mask token
    for each patch that is wanted, each with a fixed position embedding, go through blocks;
    the mask tokens become the predictions. As attention knows no order but by the positions, the
    papers' unshuffling of tokens is not needed.

    Args:
        features: width of the encoder.
        side: patches along an edge of the image.
        width: a multiple of 32.
        depth: number of blocks.
        outputs: length of a prediction.
    """

    def __init__(self, features: int, side: int, width: int, depth: int, outputs: int) -> None:
        super().__init__()
        if width < 32 or width % 32 or depth < 1:
            raise UserError(
                f"a predictor of width {width} and depth {depth} can't be built: the width must be "
                "a multiple of 32, the depth at least 1"
            )
        self.embed = nn.Linear(features, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.positions: Tensor
        # sines and cosines of the row, then of the column, as in MAE (appendix A.1) and I-JEPA
        positions = build_sincos2d_pos_embed([side, side], width, interleave_sin_cos=True)
        self.register_buffer("positions", positions, persistent=False)
        self.blocks = nn.Sequential(
            *(Block(width, num_heads=width // 32, qkv_bias=True) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)  # as the authors of MAE do
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.head.weight, std=0.02)  # first predictions near 0 learn faster

    def forward(self, prefix: Tensor, seen: Tensor, where: Tensor, wanted: Tensor) -> Tensor:
        """Predict.

        Args:
            prefix: ``(B, P, D)`` class and register tokens, which have no position; P may be 0.
            seen: ``(B, K, D)`` tokens of patches, in any order.
            where: ``(B, K)`` their indices.
            wanted: ``(B, M)`` indices of the patches to predict.

        Returns:
            ``(B, M, outputs)``.
        """
        known = self.embed(torch.cat([prefix, seen], dim=1))
        first = prefix.shape[1]
        seen = known[:, first:] + self.positions[where]
        unknown = self.mask_token + self.positions[wanted]
        tokens = self.blocks(torch.cat([known[:, :first], seen, unknown], dim=1))
        predicted: Tensor = self.head(self.norm(tokens[:, -wanted.shape[1] :]))
        return predicted
