"""MoCo v3: contrastive learning with a momentum teacher and no queue, for vision transformers.

Chen, Xie & He 2021, "An Empirical Study of Training Self-Supervised Vision Transformers",
arXiv 2104.02057.
"""

import math

import torch
from torch import Tensor, nn

from vissl_lite.data.views import Views
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import check_positive, check_share, check_sizes
from vissl_lite.optim import OptimizerSettings, cosine_schedule
from vissl_lite.pretext.base import PretextInfo, PretextTask
from vissl_lite.pretext.modules.crops import BYOL_BLUR, BYOL_SOLARIZE, two_views
from vissl_lite.pretext.modules.ema import ema_update, make_teacher
from vissl_lite.pretext.modules.heads import ProjectionHead
from vissl_lite.pretext.modules.losses import contrast


class MoCoV3(PretextTask):
    """MoCo v3.

    The default learning rate is for runs of minutes to hours; with ``--epochs`` it falls with the
    length of the run to the paper's (1.5e-4 for 256 images). For ImageNet see
    ``configs/imagenet/moco_v3.yaml``. ViTs are timm's, with its initial weights, so that the
    encoder is plain timm: the authors' ViT-S has 12 heads instead of 6, and Xavier-uniform weights.
    Biases and norms do not decay, as in all pretexts here; in the authors' code they do. None of
    this was measured. Both views are in one batch for the heads' BatchNorms, whose statistics the
    authors compute for each view; it made no clear difference in ``byol`` and ``simsiam``.

    Args:
        encoder: Encoder to train. The patch projection of a ViT, where it is one convolution of the
            image, is not trained, for stability (section 4.2), unless it was adapted to other bands
            (``Encoder.adapted_inputs``): a random projection tells bands apart, one with the same
            filters for them does not. Other encoders have heads of two layers, without a last norm
            in the predictor, as ResNets do in the authors' code (``moco/builder.py``).
        temperature: Softmax temperature (appendix A: 0.2). In minutes on CIFAR-10, 0.1 made no
            clear difference (``benchmarks/README.md``, settings of short runs).
        momentum: Initial momentum of the teacher; increases to 1 along a cosine (appendix A). It is
            at most (1 + n) / (10 + n) after n steps. The teacher follows each step with the
            momentum of that step; the authors' code does it in the middle of the next
            step, with the momentum of the next.
        hidden_size: Hidden size of the heads; the paper uses 4096.
        projection_size: Size of the embeddings; the paper uses 256.
        min_crop_scale: Smallest fraction of the image area in a view; the paper uses 0.08.
        color: Strength of the color distortion; the paper uses about 0.5.
    """

    info = PretextInfo(
        name="moco_v3",
        family="contrastive",
        views="2",
        paper="Chen et al. 2021, arXiv 2104.02057",
        use="ViTs with batches of 256 and more",
        batch_loss="negatives",
        any_size=True,
        token_drop=0.0,
        fixed_positions=True,
        long_run_lr=0.15,
    )
    # Appendix A uses AdamW with 1.5e-4 and decay 0.1, for batches of 4096 and 300 epochs
    optimizer_settings = OptimizerSettings("adamw", lr=1e-3, weight_decay=0.05, scaling="sqrt")

    def __init__(
        self,
        encoder: Encoder,
        temperature: float = 0.2,
        momentum: float = 0.99,
        hidden_size: int = 1024,
        projection_size: int = 256,
        min_crop_scale: float = 0.2,
        color: float = 0.5,
    ) -> None:
        super().__init__(encoder)
        check_share("pretext.momentum", momentum)
        check_positive("pretext.temperature", temperature)
        check_sizes(hidden_size=hidden_size, projection_size=projection_size)
        features = encoder.num_features
        is_vit = encoder.patch_size is not None
        hidden = (hidden_size, hidden_size) if is_vit else (hidden_size,)
        self.projector = ProjectionHead(
            features, *hidden, projection_size, last_norm=True, last_affine=False
        )
        self.predictor = ProjectionHead(
            projection_size, hidden_size, projection_size, last_norm=is_vit, last_affine=False
        )
        self.teacher_encoder = make_teacher(encoder)
        self.teacher_projector = make_teacher(self.projector)
        embed = encoder.model.patch_embed if is_vit else None
        projection = getattr(embed, "proj", None)
        is_hybrid = hasattr(embed, "backbone")  # has a CNN in front of it
        if isinstance(projection, nn.Conv2d) and not (is_hybrid or encoder.adapted_inputs):
            projection.requires_grad_(False)
        self.temperature, self.momentum = temperature, momentum
        self.min_crop_scale, self.color = min_crop_scale, color

    def views(self, upright: bool = True) -> Views:
        size = self.encoder.image_size
        return two_views(size, self.min_crop_scale, self.color, upright, BYOL_BLUR, BYOL_SOLARIZE)

    def chance_loss(self, images: int) -> float:
        return 4 * self.temperature * math.log(images)  # All embeddings are equal.

    def loss(self, views: list[Tensor]) -> Tensor:
        both = torch.cat(views)
        query1, query2 = self.predictor(self.projector(self.encoder(both))).chunk(2)
        with torch.no_grad():
            key1, key2 = self.teacher_projector(self.teacher_encoder(both)).chunk(2)
        loss = contrast(query1, key2, self.temperature) + contrast(query2, key1, self.temperature)
        return 2 * self.temperature * loss  # Algorithm 1.

    def after_step(self) -> None:
        momentum = min(cosine_schedule(self.momentum, 1, self.progress), self.largest_momentum)
        ema_update(self.teacher_encoder, self.encoder, momentum)
        ema_update(self.teacher_projector, self.projector, momentum)
