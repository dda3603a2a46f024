"""Fixed position embeddings."""

import torch
import torch.nn.functional as F  # noqa: N812
from timm.layers import build_sincos2d_pos_embed
from timm.models import VisionTransformer
from torch import Tensor

from vissl_lite.encoders.encoder import Encoder


def sine_cosine_positions(rows: int, columns: int, width: int) -> Tensor:
    """Sine-cosine embeddings of the positions in a grid (MAE, He et al. 2021, appendix A.1).

    Args:
        rows: Number of rows.
        columns: Number of columns.
        width: Size of an embedding, a multiple of 4; half of it is for the row.

    Returns:
        ``(rows * columns, width)``, row by row.
    """
    return build_sincos2d_pos_embed([rows, columns], width, interleave_sin_cos=True)


@torch.no_grad()
def fix_positions(encoder: Encoder) -> None:
    """Replace the learned position embeddings of a ViT by sine-cosine ones that are not trained.

    For random weights: MAE, I-JEPA and MoCo v3 train with them, so that positions need not be
    learned before the task can be. Class and register tokens get an embedding of 0. It stays a
    parameter of the timm model, so that it is saved, resized and fine-tuned as any other.

    Args:
        encoder: Changed in place; one without such embeddings is left as it is.
    """
    model = encoder.model
    if not isinstance(model, VisionTransformer) or model.pos_embed is None:
        return
    rows, columns = model.patch_embed.grid_size
    positions = sine_cosine_positions(rows, columns, model.pos_embed.shape[2])
    prefix = model.pos_embed.shape[1] - len(positions)
    model.pos_embed.copy_(F.pad(positions, (0, 0, prefix, 0)))
    model.pos_embed.requires_grad_(False)
