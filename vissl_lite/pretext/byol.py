"""BYOL: predict the output of a momentum teacher on the other view, without negatives.

Grill, Strub, Altché et al. 2020, "Bootstrap Your Own Latent: A New Approach to Self-Supervised
Learning", arXiv 2006.07733.
"""

import torch
from torch import Tensor

from vissl_lite.data.views import Views
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import check_share, check_sizes
from vissl_lite.optim import OptimizerSettings, cosine_schedule
from vissl_lite.pretext.base import PretextInfo, PretextTask
from vissl_lite.pretext.modules.crops import (
    BYOL_BLUR,
    BYOL_SOLARIZE,
    forward_multi_crop,
    local_views,
    two_views,
)
from vissl_lite.pretext.modules.ema import ema_update, make_teacher
from vissl_lite.pretext.modules.heads import ProjectionHead
from vissl_lite.pretext.modules.losses import swapped_cosine


class BYOL(PretextTask):
    """BYOL.

    Both views are in one batch for BatchNorm, whose statistics the authors compute for each view.
    This made no clear difference in two minutes on CIFAR-10: linear accuracy 0.243, and 0.253 with
    statistics of each view (``benchmarks/README.md``, settings of short runs; one seed).

    Args:
        encoder: Encoder to train.
        momentum: Initial momentum of the teacher; increases to 1 along a cosine (section 3.3: 0.996
            for a thousand epochs, less for fewer). It is at most
            (1 + n) / (10 + n) after n steps.
        hidden_size: Hidden size of both heads; the paper uses 4096.
        projection_size: Size of the embeddings (section 3.3).
        local_crops: Number of local crops (small views of small parts of the image), from which the
            teacher's outputs on both views are predicted too (multi-crop; SwAV, Caron et al. 2020,
            arXiv 2006.09882).
        min_crop_scale: Smallest fraction of the image area in a view, largest in a local crop; the
            paper uses 0.08.
        color: Strength of the color distortion; the paper uses about 0.5.
    """

    info = PretextInfo(
        name="byol",
        family="non-contrastive",
        views="2",
        paper="Grill et al. 2020, arXiv 2006.07733",
        use="small batches and long runs; needs no negatives",
        any_size=True,
        token_drop=0.0,
    )
    # The paper trains with LARS on batches of 4096; at 64 to 256 AdamW learns faster.
    optimizer_settings = OptimizerSettings("adamw", lr=2e-3, weight_decay=1e-4, scaling="sqrt")

    def __init__(
        self,
        encoder: Encoder,
        momentum: float = 0.996,
        hidden_size: int = 1024,
        projection_size: int = 256,
        local_crops: int = 0,
        min_crop_scale: float = 0.2,
        color: float = 0.5,
    ) -> None:
        super().__init__(encoder)
        check_share("pretext.momentum", momentum)
        check_sizes(hidden_size=hidden_size, projection_size=projection_size)
        self.projector = ProjectionHead(encoder.num_features, hidden_size, projection_size)
        self.predictor = ProjectionHead(projection_size, hidden_size, projection_size)
        self.teacher_encoder = make_teacher(encoder)
        self.teacher_projector = make_teacher(self.projector)
        self.momentum, self.local_crops = momentum, local_crops
        self.min_crop_scale, self.color = min_crop_scale, color

    def views(self, upright: bool = True) -> Views:
        size = self.encoder.image_size
        large = two_views(size, self.min_crop_scale, self.color, upright, BYOL_BLUR, BYOL_SOLARIZE)
        border = self.min_crop_scale
        return large + local_views(self.encoder, self.local_crops, border, self.color, upright)

    def loss(self, views: list[Tensor]) -> Tensor:
        predictions = forward_multi_crop(self._predict, views)
        with torch.no_grad():
            targets = self.teacher_projector(self.teacher_encoder(torch.cat(views[:2]))).chunk(2)
        # Equation 2; without local crops it is the sum for both orders of the views.
        return 4 + 4 * swapped_cosine(predictions, targets)

    def _predict(self, images: Tensor) -> Tensor:
        return self.predictor(self.projector(self.encoder(images)))

    def after_step(self) -> None:
        momentum = min(cosine_schedule(self.momentum, 1, self.progress), self.largest_momentum)
        ema_update(self.teacher_encoder, self.encoder, momentum)
        ema_update(self.teacher_projector, self.projector, momentum)
