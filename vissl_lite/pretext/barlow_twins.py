"""Barlow Twins: features agree between views, and different features are uncorrelated.

Zbontar, Jing, Misra, LeCun & Deny 2021, "Barlow Twins: Self-Supervised Learning via Redundancy
Reduction", arXiv 2103.03230.
"""

import torch
from torch import Tensor
from torch.optim import Optimizer

from vissl_lite.data.views import Views
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import check_positive, check_sizes
from vissl_lite.optim import OptimizerSettings
from vissl_lite.pretext.base import PretextInfo, PretextTask
from vissl_lite.pretext.modules.crops import BYOL_BLUR, BYOL_SOLARIZE, two_views
from vissl_lite.pretext.modules.heads import ProjectionHead
from vissl_lite.pretext.modules.losses import barlow_twins

# Factor on the learning rate of biases and norms with LARS (section 2.2).
LARS_BIAS_LR = 0.0048 / 0.2


class BarlowTwins(PretextTask):
    """Barlow Twins.

    Both views are in one batch for BatchNorm, whose statistics the authors compute for each view.
    This made no clear difference in two minutes on CIFAR-10: linear accuracy 0.273, and 0.274 with
    statistics of each view (``benchmarks/README.md``, settings of short runs; one seed).

    Args:
        encoder: Encoder to train.
        lambd: Weight of the redundancy reduction term (section 2.2).
        projection_size: Size of the three layers of the projector and of the embeddings; the paper
            uses 8192 and finds larger sizes better, at a higher cost.
        bias_lr: Factor on the learning rate of biases and norms; default 1, and with ``--optimizer
            lars``, which adapts the rate of all other parameters, 0.024 as in the paper (0.0048
            instead of 0.2, section 2.2).
        min_crop_scale: Smallest fraction of the image area in a view; the paper uses 0.08.
        color: Strength of the color distortion; the paper uses about 0.5.
    """

    info = PretextInfo(
        name="barlow_twins",
        family="non-contrastive",
        views="2",
        paper="Zbontar et al. 2021, arXiv 2103.03230",
        use="batches of 128 to 1024; needs no negatives and no teacher",
        batch_loss="statistics",
        any_size=True,
        token_drop=0.0,
    )
    # The paper trains with LARS on batches of 2048; at 64 to 256 AdamW learns faster.
    optimizer_settings = OptimizerSettings("adamw", lr=2e-3, weight_decay=1e-4, scaling="sqrt")

    def __init__(
        self,
        encoder: Encoder,
        lambd: float = 0.005,
        projection_size: int = 1024,
        bias_lr: float | None = None,
        min_crop_scale: float = 0.2,
        color: float = 0.5,
    ) -> None:
        super().__init__(encoder)
        check_positive("pretext.lambd", lambd)
        check_positive("pretext.bias_lr", bias_lr)
        check_sizes(projection_size=projection_size)
        size = projection_size
        self.projector = ProjectionHead(encoder.num_features, size, size, size)
        self.lambd, self.bias_lr = lambd, bias_lr
        self.min_crop_scale, self.color = min_crop_scale, color

    def views(self, upright: bool = True) -> Views:
        size = self.encoder.image_size
        return two_views(size, self.min_crop_scale, self.color, upright, BYOL_BLUR, BYOL_SOLARIZE)

    def loss(self, views: list[Tensor]) -> Tensor:
        z1, z2 = self.projector(self.encoder(torch.cat(views))).chunk(2)
        return barlow_twins(z1, z2, self.lambd)

    def configure_optimizers(self) -> Optimizer:
        optimizer, factor = super().configure_optimizers(), self.bias_lr
        if factor is None:
            factor = LARS_BIAS_LR if self.optimizer_settings.name == "lars" else 1.0
        for group in optimizer.param_groups:
            if not group["decayed"]:
                group["lr_scale"] *= factor
        return optimizer
