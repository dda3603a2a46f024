"""Stochastic depth of a student."""

import timm
import torch
from timm.layers import DropPath
from torch import nn

from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import UserError, check_share

# Of transformers in DINO, iBOT, LeJEPA and VISReg.
DEFAULT_RATE = 0.1


def add_drop_path(encoder: Encoder, rate: float | None) -> None:
    """Train an encoder with stochastic depth (Huang et al. 2016, arXiv 1603.09382).

    In training, residual branches are left out for random images: none of the first block, and more
    from block to block, as with timm's ``drop_path_rate``. Weights, their names, outputs in
    evaluation mode and a saved encoder are the same as without. A teacher, which is to use all
    branches, has none (``make_teacher``).

    Args:
        encoder: Changed in place.
        rate: Fraction of the images without the branches of the last block; None for 0.1 in
            transformers, as in the methods above, and for timm's own rate in other backbones, which
            is 0 in nearly all.

    Raises:
        UserError: The rate is not in [0, 1], or timm has no stochastic depth for this backbone.
    """
    check_share("pretext.drop_path", rate)
    chosen = DEFAULT_RATE if rate is None else rate
    if rate is None and encoder.patch_size is None:
        return
    if not chosen:
        remove_drop_path(encoder)
        return
    rates: dict[str, float] = {}
    try:
        with torch.device("meta"):  # The structure alone, without weights
            args = {**encoder.model_args, "drop_path_rate": chosen}
            model = timm.create_model(encoder.backbone, num_classes=0, **args)
        rates = {
            name: module.drop_prob
            for name, module in model.named_modules()
            if isinstance(module, DropPath)
        }
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
    if not rates and rate is not None:
        raise UserError(
            f"--pretext.drop_path {rate}: timm has no stochastic depth for {encoder.backbone}; "
            f"leave it out"
        )
    for name, one in rates.items():
        block, _, attribute = name.rpartition(".")
        setattr(encoder.model.get_submodule(block), attribute, DropPath(one))


def remove_drop_path(network: nn.Module) -> None:
    """Switch the stochastic depth of a network off."""
    for module in network.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
