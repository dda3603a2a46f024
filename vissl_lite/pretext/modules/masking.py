"""Shared parts of masked pretexts: masks, patches, encoding of visible patches, a predictor."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import UserError
from vissl_lite.pretext.base import BACKBONE_KINDS, PretextInfo
from vissl_lite.pretext.modules.positions import sine_cosine_positions

# Tries to place a block before it is given up, and the logarithm of its largest aspect ratio.
BLOCK_TRIES, MAX_LOG_ASPECT = 10, math.log(1 / 0.3)


def check_ratio(ratio: float) -> None:
    """Raise a UserError if a mask ratio is not between 0 and 1."""
    if not 0 < ratio < 1:
        raise UserError(f"--pretext.mask_ratio {ratio} is not a share: it must be between 0 and 1")


def check_patches(info: PretextInfo, encoder: Encoder) -> int:
    """Check that the patches of an encoder can be masked.

    Patches that overlap, or that come from a convolutional stem, contain information about
    neighboring pixels, so that masking them leaks.

    Args:
        info: Description of the pretext, for errors.
        encoder: Encoder with a ``patch_embed``.

    Returns:
        Side of a patch in pixels.

    Raises:
        UserError: If the patch embedding is not a single convolution that splits the image into at
            least 2 x 2 non-overlapping patches.
    """
    patch, size = encoder.patch_size, encoder.image_size
    assert patch is not None  # Encoders with a patch_embed have a patch size.
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


def num_masked(count: int, ratio: float, rounded: Callable[[float], int] = round) -> int:
    """Number of patches to mask, such that at least one is masked and one visible.

    Args:
        count: Number of patches of an image; at least 2.
        ratio: Fraction of the patches to mask.
        rounded: How a number of patches is rounded.
    """
    return min(max(rounded(ratio * count), 1), count - 1)


def random_mask(
    batch: int,
    count: int,
    ratio: float,
    device: torch.device,
    rounded: Callable[[float], int] = round,
) -> tuple[Tensor, Tensor]:
    """Choose random patches to mask, the same number in each image.

    Args:
        batch: B, number of images.
        count: N, number of patches of an image; at least 2.
        ratio: Fraction of the patches to mask; see ``num_masked``.
        device: Device to draw on.
        rounded: See ``num_masked``.

    Returns:
        ``(B, N - M)`` indices of the visible patches and ``(B, M)`` of the masked ones, both
        ascending.
    """
    masked = num_masked(count, ratio, rounded)
    shuffled = torch.rand(batch, count, device=device, dtype=torch.float32).argsort(dim=1)
    return shuffled[:, masked:].sort(dim=1).values, shuffled[:, :masked].sort(dim=1).values


def block_mask(
    rows: int, columns: int, count: int, rng: np.random.Generator, smallest: int | None = None
) -> np.ndarray:
    """Mask rectangles of patches until enough are masked, or none that fits is found.

    Bao et al. 2022 (BEiT), arXiv 2106.08254, algorithm 1; number of tries as in the code of iBOT
    (``loader.py``) and DINOv2 (``masking.py``).

    Args:
        rows: Number of rows of patches.
        columns: Number of columns of patches.
        count: Number of patches to mask at most.
        rng: Generator to draw from.
        smallest: Patches of the smallest block; default (side // 3)^2, of the shorter side, as in
            the code of iBOT.

    Returns:
        ``(rows, columns)`` bool, true where masked.
    """
    mask = np.zeros((rows, columns), dtype=bool)
    if smallest is None:
        smallest = (min(rows, columns) // 3) ** 2
    tries = BLOCK_TRIES
    while tries and (left := count - int(mask.sum())) > 0:
        tries -= 1
        area = rng.uniform(*sorted((smallest, left)))
        aspect = math.exp(rng.uniform(-MAX_LOG_ASPECT, MAX_LOG_ASPECT))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (1 <= height < rows and 1 <= width < columns):
            continue
        top, start = rng.integers(rows - height + 1), rng.integers(columns - width + 1)
        block = mask[top : top + height, start : start + width]
        if 0 < height * width - block.sum() <= left:
            block[:] = True
            tries = BLOCK_TRIES
    return mask


def block_masks(
    shares: Iterable[float],
    rows: int,
    columns: int,
    rng: np.random.Generator,
    smallest: int | None = None,
) -> Tensor:
    """Mask a share of the patches of each image, in blocks; see ``block_mask``.

    Args:
        shares: Share of the patches to mask at most in each of B images, in [0, 1].
        rows: Number of rows of patches.
        columns: Number of columns of patches.
        rng: Generator to draw from.
        smallest: See ``block_mask``.

    Returns:
        ``(B, rows, columns)`` bool on the CPU, true where masked; at least one patch of the batch
        is.
    """
    counts = [round(share * rows * columns) for share in shares]
    mask = np.stack([block_mask(rows, columns, count, rng, smallest) for count in counts])
    if not mask.any():
        mask[0, rng.integers(rows), rng.integers(columns)] = True
    return torch.from_numpy(mask)


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


def gather_tokens(tokens: Tensor, indices: Tensor) -> Tensor:
    """Select tokens of each image by index.

    Args:
        tokens: ``(B, N, D)`` tokens.
        indices: ``(B, K)`` indices below N.

    Returns:
        ``(B, K, D)`` selected tokens.
    """
    return tokens.gather(1, indices[:, :, None].expand(-1, -1, tokens.shape[2]))


def select_patches(patches: Tensor, indices: Tensor) -> Tensor:
    """Select positions of the feature maps of a batch.

    Indices, unlike a mask, have a known number: a GPU need not be waited for to count them.

    Args:
        patches: ``(B, D, h, w)`` feature maps.
        indices: ``(M,)`` indices below B * h * w, image by image and row by row.

    Returns:
        ``(M, D)`` selected features.
    """
    return patches.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, indices)


def patchify(images: Tensor, patch: int) -> Tensor:
    """Split images into patches, in row-major order as in timm.

    Args:
        images: ``(B, C, H, W)`` images.
        patch: Side of a patch in pixels.

    Returns:
        ``(B, N, patch * patch * C)``: rows, columns and channels of each patch.
    """
    cut = images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # B C row y column x
    return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch: int) -> Tensor:
    """Assemble square images from patches; the inverse of ``patchify``.

    Args:
        patches: ``(B, N, patch * patch * C)`` patches; N is a square number.
        patch: Side of a patch in pixels.

    Returns:
        ``(B, C, S, S)`` images.
    """
    side = math.isqrt(patches.shape[1])
    cut = patches.unflatten(2, (patch, patch, -1)).unflatten(1, (side, side))  # B row column y x C
    return cut.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def normalized_patches(images: Tensor, patch: int) -> Tensor:
    """Split images into patches, each normalized to mean 0 and variance 1.

    Such targets emphasize local contrast (MAE, He et al. 2021, section 3 and table 1d). The
    variance is unbiased and increased by 1e-6, as in the authors' code.

    Args:
        images: ``(B, C, H, W)`` images.
        patch: Side of a patch in pixels.

    Returns:
        ``(B, N, patch * patch * C)`` in float32.
    """
    patches = patchify(images.float(), patch)
    variance, mean = torch.var_mean(patches, dim=2, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


def denormalized_patches(patches: Tensor, images: Tensor, patch: int) -> Tensor:
    """Restore the mean and variance of patches; the inverse of ``normalized_patches``.

    Args:
        patches: ``(B, N, patch * patch * C)`` normalized patches.
        images: ``(B, C, H, W)`` images that provide mean and variance of each patch.
        patch: Side of a patch in pixels.

    Returns:
        ``(B, N, patch * patch * C)`` in float32.
    """
    variance, mean = torch.var_mean(patchify(images.float(), patch), dim=2, keepdim=True)
    return patches.float() * (variance + 1e-6).sqrt() + mean


@contextmanager
def masked_patches(model: Any, mask: Tensor, token: Tensor) -> Iterator[None]:
    """Context manager that replaces the embeddings of masked patches by a token.

    Uses a forward hook on the patch embedding.

    Args:
        model: Timm model with a ``patch_embed``.
        mask: ``(B, h, w)``, true where a patch is masked; on any device.
        token: ``(D,)`` mask token.
    """
    mask = mask.to(token.device)

    def replace(embed: nn.Module, images: tuple[Tensor, ...], tokens: Tensor) -> Tensor:
        value = token.to(tokens.dtype)
        if tokens.ndim == 3:
            return torch.where(mask.flatten(1)[:, :, None], value, tokens)
        if getattr(embed, "output_fmt", "NCHW") == "NHWC":
            return torch.where(mask[..., None], value, tokens)
        return torch.where(mask[:, None], value[:, None, None], tokens)

    hook = model.patch_embed.register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()


def encode_visible(encoder: Encoder, images: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Run a ViT on the visible patches of each image only (MAE, section 3).

    A forward hook on timm's patch dropout selects them. It runs after the position embedding is
    added, so that each patch keeps its position.

    Args:
        encoder: Encoder with a plain ViT.
        images: ``(B, C, S, S)`` normalized images.
        visible: ``(B, K)`` indices of the visible patches.

    Returns:
        ``(B, P, D)`` class and register tokens (P may be 0), and ``(B, K, D)`` patch tokens.
    """
    model = encoder.model
    first = model.num_prefix_tokens

    def select(_: nn.Module, __: tuple[Tensor, ...], tokens: Tensor) -> Tensor:
        return torch.cat([tokens[:, :first], gather_tokens(tokens[:, first:], visible)], dim=1)

    hook = model.patch_drop.register_forward_hook(select)
    try:
        tokens = model.forward_features(images)
    finally:
        hook.remove()
    return tokens[:, :first], tokens[:, first:]


def narrow_width(features: int, fraction: float) -> int:
    """Fraction of an encoder's width, rounded to heads of 32 as in MAE's decoder (512, 16 heads).

    Args:
        features: Width of the encoder.
        fraction: Fraction of the width.
    """
    return max(1, round(features * fraction / 32)) * 32


class PatchPredictor(nn.Module):
    """Narrow transformer that predicts masked patches from visible ones.

    Used as MAE's decoder and as I-JEPA's predictor. Its inputs are the tokens of the visible
    patches and a learned mask token for each patch to predict, all with fixed position embeddings;
    the outputs at the mask tokens are the predictions. Attention is invariant to the order of
    tokens, so that the papers' unshuffling is not needed.

    Args:
        features: Width of the encoder.
        side: Number of patches along an edge of the image.
        width: Width of the transformer, a multiple of 32.
        depth: Number of transformer blocks.
        outputs: Number of outputs per patch.

    Raises:
        UserError: If width or depth are invalid.
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
        # 2D sine-cosine embeddings, as in MAE (appendix A.1) and I-JEPA.
        positions = sine_cosine_positions(side, side, width)
        self.register_buffer("positions", positions, persistent=False)
        self.blocks = nn.Sequential(
            *(Block(width, num_heads=width // 32, qkv_bias=True) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)  # as in the blocks
        self.head = nn.Linear(width, outputs)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)  # As in the authors' code of MAE.
                nn.init.zeros_(module.bias)
        nn.init.normal_(
            self.head.weight, std=0.02
        )  # Training is faster if initial predictions are near 0.

    def forward(self, prefix: Tensor, tokens: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """Predict the masked patches.

        Args:
            prefix: ``(B, P, D)`` class and register tokens, which have no position; P may be 0.
            tokens: ``(B, K, D)`` tokens of the visible patches, in any order.
            visible: ``(B, K)`` indices of the visible patches.
            masked: ``(B, M)`` indices of the patches to predict.

        Returns:
            ``(B, M, outputs)`` predictions.
        """
        embedded = self.embed(torch.cat([prefix, tokens], dim=1))
        first = prefix.shape[1]
        tokens = embedded[:, first:] + self.positions[visible]
        mask_tokens = self.mask_token + self.positions[masked]
        tokens = self.blocks(torch.cat([embedded[:, :first], tokens, mask_tokens], dim=1))
        predicted: Tensor = self.head(self.norm(tokens[:, -masked.shape[1] :]))
        return predicted
