"""Attention over few tokens on a CPU in bf16, faster than torch's with as little memory."""

from typing import Any

import torch
from torch import Tensor

# Beyond as many tokens torch's own is as fast. Below, forward and backward of 6 heads of 64 on two
# cores: 108 to 53 ms for 32 images of 197 tokens, 48 to 14 for 64 of 50. In float32 it is slower.
FEW_TOKENS = 640


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """``scaled_dot_product_attention`` in bf16 by ``attend``; None if that is not faster.

    All of timm's transformers call it.
    """
    few = max(query.shape[-2], key.shape[-2]) <= FEW_TOKENS
    if attn_mask is not None or dropout_p or is_causal or enable_gqa or not few:
        return None
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return attend(query.bfloat16(), key.bfloat16(), value.bfloat16(), scale)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention (Vaswani et al. 2017, eq. 1) that stores no weights for the backward pass.

    Args:
        query: ``(..., N, D)``.
        key: ``(..., M, D)``.
        value: ``(..., M, D')``.
        scale: Factor of the products of queries and keys.

    Returns:
        ``(..., N, D')``.
    """
    result: Tensor = _Attention.apply(query, key, value, scale)
    return result


class _Attention(torch.autograd.Function):
    """Recompute the weights in the backward pass, as Flash Attention does (Dao 2022)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        return _weights(query * scale, key) @ value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        scaled = query * ctx.scale
        with torch.enable_grad():
            products = (scaled @ key.transpose(-2, -1)).detach().requires_grad_()
            weights = torch.softmax(products, dim=-1)
        of_value = weights.detach().transpose(-2, -1) @ gradient
        of_weights = gradient @ value.transpose(-2, -1)
        (of_products,) = torch.autograd.grad(weights, products, of_weights)
        of_query = (of_products @ key) * ctx.scale
        return of_query, of_products.transpose(-2, -1) @ scaled, of_value, None


def _weights(scaled: Tensor, key: Tensor) -> Tensor:
    return torch.softmax(scaled @ key.transpose(-2, -1), dim=-1)
