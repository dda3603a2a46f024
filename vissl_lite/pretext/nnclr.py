"""NNCLR: SimCLR with the nearest neighbor of a view as the positive of the other view.

Dwibedi, Aytar, Tompson, Sermanet & Zisserman 2021, "With a Little Help from My Friends:
Nearest-Neighbor Contrastive Learning of Visual Representations", arXiv 2104.14548.
"""

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from vissl_lite.data.views import Views
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import LARGEST_QUEUE, check_positive, check_sizes
from vissl_lite.optim import OptimizerSettings
from vissl_lite.pretext.base import PretextInfo, PretextTask
from vissl_lite.pretext.modules.crops import two_views
from vissl_lite.pretext.modules.heads import ProjectionHead
from vissl_lite.pretext.modules.losses import contrast
from vissl_lite.pretext.modules.queue import Queue


@torch.no_grad()
def nearest_neighbors(embeddings: Tensor, support: Tensor) -> Tensor:
    """Find the most similar item of a support set for each embedding (equation 2).

    Args:
        embeddings: ``(B, D)`` embeddings.
        support: ``(Q, D)`` normalized support set.

    Returns:
        ``(B, D)`` normalized nearest neighbors, without gradient.
    """
    with torch.autocast(embeddings.device.type, enabled=False):  # it would round to ties
        similarity = F.normalize(embeddings.float(), dim=1) @ support.float().T
    return support[similarity.argmax(dim=1)]


class NNCLR(PretextTask):
    """NNCLR.

    Both views are in one batch for BatchNorm, as in SimCLR; the authors compute its statistics for
    each view. For ``byol`` and ``simsiam`` this made little difference (see there); for NNCLR it
    was not measured.

    Args:
        encoder: Encoder to train.
        temperature: Softmax temperature (section 4.1).
        queue_size: Size of the support set; the paper uses 98304, for 1.3 million images. One that
            is larger than the set of images holds earlier embeddings of the image itself; a smaller
            one was worse still in minutes on 588 images (seen while this was developed, not in a
            benchmark).
        hidden_size: Hidden size of the projection head; the paper uses 2048 (section 4.1).
        projection_size: Size of the embeddings (section 4.1).
        prediction_hidden_size: Hidden size of the prediction head; the paper uses 4096.
        min_crop_scale: Smallest fraction of the image area in a view; the paper uses 0.08.
        color: Strength of the color distortion; the paper uses 1.
    """

    info = PretextInfo(
        name="nnclr",
        family="contrastive",
        views="2",
        paper="Dwibedi et al. 2021, arXiv 2104.14548",
        use="data sets with few classes, where nearest neighbors are good positives",
        batch_loss="negatives",
        any_size=True,
        token_drop=0.0,
    )
    # The paper trains with LARS on batches of 4096; at 64 to 256 AdamW learns faster.
    optimizer_settings = OptimizerSettings("adamw", lr=2e-3, weight_decay=1e-4, scaling="sqrt")

    def __init__(
        self,
        encoder: Encoder,
        temperature: float = 0.1,
        queue_size: int = 4096,
        hidden_size: int = 1024,
        projection_size: int = 256,
        prediction_hidden_size: int = 1024,
        min_crop_scale: float = 0.2,
        color: float = 0.5,
    ) -> None:
        super().__init__(encoder)
        check_positive("pretext.temperature", temperature)
        check_sizes(LARGEST_QUEUE, queue_size=queue_size)
        check_sizes(
            hidden_size=hidden_size,
            projection_size=projection_size,
            prediction_hidden_size=prediction_hidden_size,
        )
        features = encoder.num_features
        self.projector = ProjectionHead(
            features, hidden_size, hidden_size, projection_size, last_norm=True
        )
        self.predictor = ProjectionHead(projection_size, prediction_hidden_size, projection_size)
        self.queue = Queue(queue_size, projection_size)
        self.temperature = temperature
        self.min_crop_scale, self.color = min_crop_scale, color

    def views(self, upright: bool = True) -> Views:
        size = self.encoder.image_size
        return two_views(size, self.min_crop_scale, self.color, upright)

    def chance_loss(self, images: int) -> float:
        return math.log(images)  # All embeddings are equal.

    def loss(self, views: list[Tensor]) -> Tensor:
        z = self.projector(self.encoder(torch.cat(views)))
        p1, p2 = self.predictor(z).chunk(2)
        z1, z2 = z.chunk(2)
        nn1 = nearest_neighbors(z1, self.queue.items)
        nn2 = nearest_neighbors(z2, self.queue.items)
        loss = contrast(nn1, p2, self.temperature) + contrast(nn2, p1, self.temperature)
        self.queue.push(z1)  # One view of each image (section 3.2).
        return loss / 2
