"""Stochastic depth of a student."""

from vissl_lite.encoders.drop_path import set_drop_path
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import UserError, check_share

# Of transformers in DINO, iBOT, LeJEPA and VISReg.
DEFAULT_RATE = 0.1


def add_drop_path(encoder: Encoder, rate: float | None) -> None:
    """Train an encoder with stochastic depth; its teacher has none (``make_teacher``).

    Args:
        encoder: Changed in place.
        rate: See ``set_drop_path``; None for 0.1 in backbones of patch tokens such as ViT and Swin,
            as in the methods above, and for timm's own rate in others, which is 0 in nearly all.

    Raises:
        UserError: The rate is not in [0, 1], or timm has no stochastic depth for this backbone.
    """
    check_share("pretext.drop_path", rate)
    if rate is None and encoder.patch_size is None:
        return
    if not set_drop_path(encoder, DEFAULT_RATE if rate is None else rate) and rate is not None:
        raise UserError(
            f"--pretext.drop_path {rate}: timm has no stochastic depth for {encoder.backbone}; "
            f"leave it out"
        )
