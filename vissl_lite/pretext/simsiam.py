"""SimSiam: predict one view from the other; a stop-gradient alone prevents collapse.

Chen & He 2021, "Exploring Simple Siamese Representation Learning", arXiv 2011.10566.
"""

import torch
from torch import Tensor
from torch.optim import Optimizer

from vissl_lite.data.views import Views
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import check_sizes
from vissl_lite.optim import OptimizerSettings, build_optimizer
from vissl_lite.pretext.base import PretextInfo, PretextTask
from vissl_lite.pretext.modules.crops import two_views
from vissl_lite.pretext.modules.heads import ProjectionHead
from vissl_lite.pretext.modules.losses import negative_cosine


class SimSiam(PretextTask):
    """SimSiam.

    The learning rate of the predictor stays at its peak, which works better (section 4.2, table 1;
    ``--fix-pred-lr`` of the authors' code). Biases and norms do not decay. Both views are in one
    batch for BatchNorm, whose statistics the authors compute for each view. This made no clear
    difference in two minutes on CIFAR-10: linear accuracy 0.222, and 0.218 with statistics of each
    view (``benchmarks/README.md``, settings of short runs; one seed).

    Args:
        encoder: Encoder to train.
        projection_size: Size of the three layers of the projector and of the embeddings; 2048 in
            the paper.
        hidden_size: Bottleneck size of the predictor, a quarter of ``projection_size`` in the paper
            (section 3).
        min_crop_scale: Smallest fraction of the image area in a view (section 3).
        color: Strength of the color distortion; the paper uses 0.5.
    """

    info = PretextInfo(
        name="simsiam",
        family="non-contrastive",
        views="2",
        paper="Chen & He 2021, arXiv 2011.10566",
        use="when memory is limited: no negatives, no teacher",
        any_size=True,
        token_drop=0.0,
    )
    # SGD with momentum, not that of Nesterov (section 3)
    optimizer_settings = OptimizerSettings("momentum", lr=0.05, weight_decay=1e-4)

    def __init__(
        self,
        encoder: Encoder,
        projection_size: int = 2048,
        hidden_size: int = 512,
        min_crop_scale: float = 0.2,
        color: float = 0.5,
    ) -> None:
        super().__init__(encoder)
        check_sizes(hidden_size=hidden_size, projection_size=projection_size)
        size = projection_size
        self.projector = ProjectionHead(
            encoder.num_features, size, size, size, last_norm=True, last_affine=False
        )
        self.predictor = ProjectionHead(size, hidden_size, size)
        self.min_crop_scale, self.color = min_crop_scale, color

    def views(self, upright: bool = True) -> Views:
        size = self.encoder.image_size
        return two_views(size, self.min_crop_scale, self.color, upright)

    def loss(self, views: list[Tensor]) -> Tensor:
        z = self.projector(self.encoder(torch.cat(views)))
        (z1, z2), (p1, p2) = z.chunk(2), self.predictor(z).chunk(2)
        return (negative_cosine(p1, z2) + negative_cosine(p2, z1)) / 2  # Equation 4.

    def configure_optimizers(self) -> Optimizer:
        return build_optimizer(
            self,
            self.optimizer_settings,
            self.encoder.model,
            constant=self.predictor,
            full_rate=self.encoder.adapted_inputs,
        )
