"""SimCLR: match two views of an image among the views of all other images.

Chen, Kornblith, Norouzi & Hinton 2020, "A Simple Framework for Contrastive Learning of Visual
Representations", arXiv 2002.05709.
"""

import math

from torch import Tensor

from vissl_lite.data.views import Views
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import check_positive, check_sizes
from vissl_lite.optim import OptimizerSettings
from vissl_lite.pretext.base import PretextInfo, PretextTask
from vissl_lite.pretext.modules.crops import forward_multi_crop, local_views, two_views
from vissl_lite.pretext.modules.heads import ProjectionHead
from vissl_lite.pretext.modules.losses import nt_xent


class SimCLR(PretextTask):
    """SimCLR.

    The last layer of the head has a bias; the authors' code has a BatchNorm after it instead, which
    measured no better in short training (``benchmarks/README.md``, settings of short runs).

    Args:
        encoder: Encoder to train.
        temperature: Softmax temperature. The paper finds 0.1 best on ImageNet (table 5) and 0.5 in
            long training on CIFAR-10 (appendix B.9); in short training we find 0.1 better there
            too.
        hidden_size: Hidden size of the projection head; default the number of features of the
            encoder (section 4.2).
        projection_size: Size of the embeddings (section 4.2).
        local_crops: Number of local crops (small views of small parts of the image), each of which
            is matched with both views (multi-crop; SwAV, Caron et al. 2020, arXiv 2006.09882).
        min_crop_scale: Smallest fraction of the image area in a view, largest in a local crop; the
            paper uses 0.08.
        color: Strength of the color distortion; default 0.5 as in the paper on CIFAR-10 (appendix
            B.9; it uses 1 on ImageNet). From random weights, ``pretrain`` chooses 0.25 for runs of
            at most 250,000 images, or 30 minutes without a GPU, which measured better in minutes
            (``benchmarks/README.md``, settings of short runs).
    """

    info = PretextInfo(
        name="simclr",
        family="contrastive",
        views="2",
        paper="Chen et al. 2020, arXiv 2002.05709",
        use="the first to try: simple, stable, good in short runs",
        batch_loss="negatives",
        any_size=True,
        token_drop=0.5,
        short_run={"color": 0.25},
    )
    # The paper trains with LARS on batches of thousands; at 64 to 256 AdamW learns faster.
    optimizer_settings = OptimizerSettings("adamw", lr=2e-3, weight_decay=1e-4, scaling="sqrt")

    def __init__(
        self,
        encoder: Encoder,
        temperature: float = 0.1,
        hidden_size: int | None = None,
        projection_size: int = 128,
        local_crops: int = 0,
        min_crop_scale: float = 0.2,
        color: float | None = None,
    ) -> None:
        super().__init__(encoder)
        check_positive("pretext.temperature", temperature)
        check_sizes(hidden_size=hidden_size, projection_size=projection_size)
        features = encoder.num_features
        hidden = features if hidden_size is None else hidden_size
        self.head = ProjectionHead(features, hidden, projection_size)
        self.temperature, self.local_crops = temperature, local_crops
        self.min_crop_scale, self.color = min_crop_scale, 0.5 if color is None else color

    def views(self, upright: bool = True) -> Views:
        size = self.encoder.image_size
        large = two_views(size, self.min_crop_scale, self.color, upright)
        border = self.min_crop_scale
        return large + local_views(self.encoder, self.local_crops, border, self.color, upright)

    def chance_loss(self, images: int) -> float:
        return math.log(2 * images - 1)  # All embeddings are equal.

    def loss(self, views: list[Tensor]) -> Tensor:
        # A single pass over both views is faster, and BatchNorm uses the statistics of both, as in
        # the authors' code (tf2/run.py).
        z1, z2, *local = forward_multi_crop(self._embed, views)
        return nt_xent(z1, z2, self.temperature, local)

    def _embed(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images))
