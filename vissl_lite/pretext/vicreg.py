"""VICReg: views agree (invariance), features vary (variance) without redundancy (covariance).

Bardes, Ponce & LeCun 2022, "VICReg: Variance-Invariance-Covariance Regularization for
Self-Supervised Learning", arXiv 2105.04906.
"""

from torch import Tensor

from vissl_lite.data.views import Views
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import check_sizes
from vissl_lite.optim import OptimizerSettings
from vissl_lite.pretext.base import PretextInfo, PretextTask
from vissl_lite.pretext.modules.crops import forward_multi_crop, local_views, two_views
from vissl_lite.pretext.modules.heads import ProjectionHead
from vissl_lite.pretext.modules.losses import vicreg


class VICReg(PretextTask):
    """VICReg.

    The two views are drawn alike, as in the paper; the authors' code draws them as BYOL does.
    Both views are in one batch for BatchNorm, whose statistics the authors compute for each view.
    This made no clear difference in two minutes on CIFAR-10: linear accuracy 0.295, and 0.287 with
    statistics of each view (``benchmarks/README.md``, settings of short runs; one seed).

    Args:
        encoder: Encoder to train.
        sim_weight: Weight of the invariance term (section 4.2).
        std_weight: Weight of the variance term (section 4.2).
        cov_weight: Weight of the covariance term (section 4.2).
        projection_size: Size of the three layers of the expander and of the embeddings; the paper
            uses 8192.
        local_crops: Number of local crops (small views of small parts of the image), each of which
            is matched with both views (multi-crop; SwAV, Caron et al. 2020, arXiv 2006.09882).
        min_crop_scale: Smallest fraction of the image area in a view, largest in a local crop; the
            paper uses 0.08.
        color: Strength of the color distortion; default 0.5, and 0.25 in short runs, which measured
            better. The paper uses about 0.5.
    """

    info = PretextInfo(
        name="vicreg",
        family="non-contrastive",
        views="2",
        paper="Bardes et al. 2022, arXiv 2105.04906",
        use="batches of 128 to 1024; three interpretable loss terms",
        batch_loss="statistics",
        any_size=True,
        token_drop=0.0,
        short_run={"color": 0.25},
    )
    # The paper trains with LARS on batches of 2048; at 64 to 256 AdamW learns faster.
    optimizer_settings = OptimizerSettings("adamw", lr=2e-3, weight_decay=1e-4, scaling="sqrt")

    def __init__(
        self,
        encoder: Encoder,
        sim_weight: float = 25.0,
        std_weight: float = 25.0,
        cov_weight: float = 1.0,
        projection_size: int = 1024,
        local_crops: int = 0,
        min_crop_scale: float = 0.2,
        color: float | None = None,
    ) -> None:
        super().__init__(encoder)
        color = 0.5 if color is None else color
        check_sizes(projection_size=projection_size)
        size = projection_size
        self.projector = ProjectionHead(encoder.num_features, size, size, size)
        self.sim_weight, self.std_weight, self.cov_weight = sim_weight, std_weight, cov_weight
        self.local_crops = local_crops
        self.min_crop_scale, self.color = min_crop_scale, color

    def views(self, upright: bool = True) -> Views:
        size = self.encoder.image_size
        large = two_views(size, self.min_crop_scale, self.color, upright, solarize=(0.1, 0.1))
        border = self.min_crop_scale
        return large + local_views(self.encoder, self.local_crops, border, self.color, upright)

    def loss(self, views: list[Tensor]) -> Tensor:
        z1, z2, *local = forward_multi_crop(self._embed, views)
        return vicreg(z1, z2, self.sim_weight, self.std_weight, self.cov_weight, local)

    def _embed(self, images: Tensor) -> Tensor:
        return self.projector(self.encoder(images))
