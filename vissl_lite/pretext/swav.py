"""SwAV: views of an image predict the cluster of each other, with clusters of equal size.

Caron, Misra, Mairal, Goyal, Bojanowski & Joulin 2020, "Unsupervised Learning of Visual Features by
Contrasting Cluster Assignments", arXiv 2006.09882.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from vissl_lite.data.views import Views
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import LARGEST_QUEUE, check_positive, check_share, check_sizes
from vissl_lite.optim import OptimizerSettings
from vissl_lite.pretext.base import PretextInfo, PretextTask
from vissl_lite.pretext.modules.crops import MultiCrop, forward_multi_crop
from vissl_lite.pretext.modules.heads import ProjectionHead
from vissl_lite.pretext.modules.losses import sinkhorn, swapped_prediction
from vissl_lite.pretext.modules.queue import Queue


class SwAV(PretextTask):
    """SwAV.

    Prototypes are normalized where they are used, which does not depend on how the parameters are
    stored; in the authors' code in place before each step. With LARS, biases and norms have the
    plain learning rate, as in SimCLR and BYOL; theirs adapts it for all parameters. Neither was
    measured.

    Args:
        encoder: Encoder to train.
        prototypes: Number of clusters; the paper uses 3000, for 1000 classes and batches of 4096.
            With batches of 64, more than 128 learned nothing in the first minutes (seen while this
            was developed, not in a benchmark).
        temperature: Softmax temperature of the predictions (appendix A.1).
        epsilon: Smoothness of the assignments (section 3.1).
        sinkhorn_iterations: Number of Sinkhorn iterations (section 3.1).
        queue_size: Number of embeddings of earlier images in the assignment, for small batches
            (section 3.1: 3840 for batches of 256, fifteen batches); 0 for none.
        queue_start: Fraction of the run after which the queue is used, once embeddings change
            slowly; the paper uses 15 epochs of 200, short runs need a larger fraction.
        freeze_prototypes: Fraction of the run in which the prototypes are not trained; the authors'
            code uses the first of 100 to 800 epochs.
        hidden_size: Hidden size of the projection head; the paper uses 2048.
        projection_size: Size of the embeddings (appendix A.1).
        local_crops: Number of local crops besides the two global ones; default 6 as in the paper,
            none below 64 pixels.
        min_crop_scale: Smallest fraction of the image area in a local crop (section 5).
        min_global_crop_scale: Smallest fraction in a global crop; the paper uses 0.14.
        color: Strength of the color distortion; the paper uses 1.
    """

    info = PretextInfo(
        name="swav",
        family="clustering",
        views="2 + 6 small",
        paper="Caron et al. 2020, arXiv 2006.09882",
        use="data with clusters of similar size; benefits from local crops",
        batch_loss="statistics",
        any_size=True,
        token_drop=0.0,
    )
    # The paper trains long with LARS, 0.6 at batches of 256; AdamW learns faster in short runs.
    optimizer_settings = OptimizerSettings("adamw", lr=2e-3, weight_decay=1e-6, scaling="sqrt")

    def __init__(
        self,
        encoder: Encoder,
        prototypes: int = 128,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        sinkhorn_iterations: int = 3,
        queue_size: int = 1024,
        queue_start: float = 0.5,
        freeze_prototypes: float = 0.01,
        hidden_size: int = 1024,
        projection_size: int = 128,
        local_crops: int | None = None,
        min_crop_scale: float = 0.05,
        min_global_crop_scale: float = 0.2,
        color: float = 0.5,
    ) -> None:
        super().__init__(encoder)
        check_positive("pretext.temperature", temperature)
        check_positive("pretext.epsilon", epsilon)
        check_share("pretext.queue_start", queue_start)
        check_share("pretext.freeze_prototypes", freeze_prototypes)
        check_sizes(LARGEST_QUEUE, prototypes=prototypes, queue_size=queue_size or None)
        check_sizes(hidden_size=hidden_size, projection_size=projection_size)
        check_sizes(100, sinkhorn_iterations=sinkhorn_iterations)
        self.head = ProjectionHead(encoder.num_features, hidden_size, projection_size)
        self.prototypes = nn.Linear(projection_size, prototypes, bias=False)
        self.queues = [Queue(queue_size, projection_size) for _ in range(2 if queue_size else 0)]
        self.earlier = nn.ModuleList(self.queues)  # Registered, so that checkpoints contain them.
        self.temperature, self.epsilon = temperature, epsilon
        self.sinkhorn_iterations, self.queue_start = sinkhorn_iterations, queue_start
        self.freeze_prototypes = freeze_prototypes
        self.crops = MultiCrop(2, local_crops, min_crop_scale, min_global_crop_scale, color)

    def views(self, upright: bool = True) -> Views:
        return self.crops.views(self.encoder, upright)

    def loss(self, views: list[Tensor]) -> Tensor:
        features = forward_multi_crop(self.encoder, views)
        embedded = self.head(torch.cat(features)).float()  # one BatchNorm for all crops
        z = F.normalize(embedded, dim=1).chunk(len(views))
        prototypes = F.normalize(self.prototypes.weight.float(), dim=1)
        with torch.autocast(z[0].device.type, enabled=False):
            scores = [view @ prototypes.T for view in z]
        codes = [self._codes(index, z[index], scores[index], prototypes) for index in range(2)]
        return swapped_prediction(scores, codes, self.temperature)

    def on_after_backward(self) -> None:
        if self.progress < self.freeze_prototypes:
            self.prototypes.weight.grad = None

    @torch.no_grad()
    def _codes(self, view: int, z: Tensor, scores: Tensor, prototypes: Tensor) -> Tensor:
        """Assign a batch to prototypes, along with the queue once the embeddings are stable."""
        if not len(self.queues):
            return sinkhorn(scores, self.epsilon, self.sinkhorn_iterations)
        queue = self.queues[view]
        earlier = None
        if self.progress >= self.queue_start:
            with torch.autocast(z.device.type, enabled=False):
                # not float32 with --precision bf16-true
                earlier = queue.items.float() @ prototypes.T
        queue.push(z)
        return sinkhorn(scores, self.epsilon, self.sinkhorn_iterations, earlier)
