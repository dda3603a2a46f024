"""Low-rank adapters (LoRA): small trained factors beside the frozen weights of attention layers.

Hu et al. 2021 (arXiv 2106.09685), who adapt transformers with labels; ExPLoRA (Khanna et al. 2024,
arXiv 2406.10973) does it to ViTs without labels. A frozen weight W acts as W + B A, whose factors
have r rows or columns each and are trained.

The adapted weight is a parametrization of torch, and not a layer that wraps another one as in
``peft``: timm's BEiT, EVA and Swin V2 read ``qkv.weight`` rather than call the layer, and would
bypass an adapter. (``peft`` would also bring ``transformers`` and ``accelerate`` with it.)
"""

import copy
import math
import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import UserError

# Names in timm of the linear layers of attention: for queries, keys and values together or apart.
_ADAPTED = re.compile(r"(^|\.)attn\.(qkv|kv|[qkv]|[qkv]_proj|proj)$")


class LowRankUpdate(nn.Module):
    """Parametrization that turns a weight W into W + B A (Hu et al. 2021, eq. 3).

    At the start B is zero and A is random, so that the sum is W. The paper's factor alpha / r is 1.

    Args:
        weight: ``(O, I)`` weight of a linear layer.
        rank: r, the number of rows of A and of columns of B.

    Attributes:
        a: ``(r, I)`` factor A, uniform with a variance of 1 / 3I, as in the authors' code.
        b: ``(O, r)`` factor B.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        self.b = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


def add_adapters(encoder: Encoder, rank: int) -> None:
    """Adapt the projections of all attention layers of an encoder, in place.

    The adapted weights give the same features until the factors are trained. Copies of the encoder,
    such as momentum teachers, have factors of their own; the average of a teacher is that of the
    factors, not of their product.

    Args:
        encoder: Encoder whose weights are to be frozen; see ``adapters``.
        rank: Rank of the update of each weight.

    Raises:
        UserError: The backbone has no attention layers, or they are too narrow for the rank.
    """
    layers = {
        name: module
        for name, module in encoder.model.named_modules()
        if isinstance(module, nn.Linear) and _ADAPTED.search(name)
    }
    if not layers:
        raise UserError(
            f"--train lora:{rank}: {encoder.backbone} has no attention layers as in a ViT; "
            f"--train blocks:1 and --train norms also work with other backbones"
        )
    narrowest = min(min(layer.weight.shape) for layer in layers.values())
    if rank >= narrowest:
        raise UserError(
            f"--train lora:{rank}: the attention layers of {encoder.backbone} have {narrowest} "
            f"features, and the rank must be lower: try lora:{min(16, narrowest // 4)}"
        )
    for layer in layers.values():
        parametrize.register_parametrization(layer, "weight", LowRankUpdate(layer.weight, rank))


def adapters(model: nn.Module) -> Iterator[tuple[str, LowRankUpdate]]:
    """The adapters in a timm model, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, LowRankUpdate):
            yield name, module


def merge_adapters(encoder: Encoder) -> Encoder:
    """A copy of an encoder that is a plain timm model, with W + B A as the weights.

    Args:
        encoder: Left as it is; returned itself if it has no adapters.
    """
    if not any(adapters(encoder.model)):
        return encoder
    merged = copy.deepcopy(encoder)
    for name, layer in list(merged.model.named_modules()):
        if not parametrize.is_parametrized(layer, "weight"):
            continue
        # (``remove_parametrizations`` changes the class of the layer, which its copies share.)
        with torch.device("meta"):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
        plain.weight = nn.Parameter(layer.weight.detach(), requires_grad=False)
        plain.bias = layer.bias
        owner, _, attribute = name.rpartition(".")
        setattr(merged.model.get_submodule(owner), attribute, plain)
    return merged
