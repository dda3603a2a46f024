"""Stochastic depth (Huang et al. 2016, arXiv 1603.09382) of timm models."""

import timm
import torch
from timm.layers import DropPath
from torch import nn

from vissl_lite.encoders.encoder import Encoder


def drop_path_rates(encoder: Encoder, rate: float) -> dict[str, float]:
    """Rates by module, as timm's ``drop_path_rate`` sets them; empty if it can't for a backbone.

    Args:
        encoder: Encoder, left as it is.
        rate: Fraction of the images without the branches of the last block, above 0.
    """
    args = {**encoder.model_args, "drop_path_rate": rate}
    try:
        with torch.device("meta"):  # The structure alone, without weights
            model = timm.create_model(encoder.backbone, num_classes=0, **args)
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        return {}
    named = model.named_modules()
    return {name: module.drop_prob for name, module in named if isinstance(module, DropPath)}


def set_drop_path(encoder: Encoder, rate: float) -> bool:
    """Train an encoder with stochastic depth.

    In training, residual branches are left out for random images: none of the first block, and more
    from block to block. Weights, their names, outputs in evaluation mode and a saved encoder are
    the same as without.

    Args:
        encoder: Changed in place.
        rate: Fraction of the images without the branches of the last block; 0 takes away what the
            backbone has by default.

    Returns:
        Whether the backbone has the rate now.
    """
    if not rate:
        remove_drop_path(encoder)
        return True
    rates = drop_path_rates(encoder, rate)
    for name, one in rates.items():
        block, _, attribute = name.rpartition(".")
        setattr(encoder.model.get_submodule(block), attribute, DropPath(one))
    return bool(rates)


def remove_drop_path(network: nn.Module) -> None:
    """Switch the stochastic depth of a network off."""
    for module in network.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
