"""MoCo v2: match a view to the momentum teacher's embedding of the other, with a queue.

He, Fan, Wu, Xie & Girshick 2020, "Momentum Contrast for Unsupervised Visual Representation
Learning", arXiv 1911.05722; Chen, Fan, Girshick & He 2020, "Improved Baselines with Momentum
Contrastive Learning" (v2), arXiv 2003.04297.
"""

from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from vissl_lite.data.stream import Source
from vissl_lite.data.views import Views
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import LARGEST_QUEUE, check_positive, check_share, check_sizes
from vissl_lite.optim import OptimizerSettings
from vissl_lite.pretext.base import PretextInfo, PretextTask
from vissl_lite.pretext.modules.crops import two_views
from vissl_lite.pretext.modules.ema import ema_update, make_teacher
from vissl_lite.pretext.modules.losses import info_nce
from vissl_lite.pretext.modules.queue import DEFAULT_SIZE, Queue, suitable_size


class MoCo(PretextTask):
    """MoCo v2.

    With the statistics of one batch, BatchNorm would tell the key of the same batch from those of
    the queue. The paper shuffles the images of keys between GPUs (section 3.3); here the teacher
    is in evaluation mode, with a moving average of the student's statistics (EMAN, Cai et al. 2021,
    arXiv 2101.08482), which works on a single device as well. In four minutes on CIFAR-10 this made
    little difference: the linear accuracy was 0.316, and 0.310 with the statistics of the batch
    (``benchmarks/README.md``, every pretext for the same minutes; one seed).

    Unlike in the paper, the keys of the other images of the batch are negatives too, and those
    of the queue only if the teacher has changed little since: if all negatives
    are from earlier steps of a teacher that changes quickly, the positive is recognized by its age.
    In two minutes on CIFAR-10, the linear accuracy was 0.340 with these negatives, 0.277 with the
    whole queue of 4096 and the batch, and 0.226 with the queue alone, no more than untrained
    (``benchmarks/README.md``, settings of short runs; one seed).

    Args:
        encoder: Encoder to train.
        temperature: Softmax temperature (v2, table 1: 0.2). In minutes on CIFAR-10, 0.1 made no
            clear difference (``benchmarks/README.md``, settings of short runs).
        momentum: Momentum m of the teacher; at most (1 + n) / (10 + n) after n steps.
        queue_size: Largest number of negatives from the queue; default 4096, but at most a quarter
            of the images. The paper uses 65536, for 1.3 million images.
        projection_size: Size of the embeddings.
        min_crop_scale: Smallest fraction of the image area in a view.
        color: Strength of the color distortion; default 0.5, and 0.25 in short runs, which measured
            better. The paper uses 0.5.
    """

    info = PretextInfo(
        name="moco",
        family="contrastive",
        views="2",
        paper="He et al. 2020, arXiv 1911.05722; v2 2003.04297",
        use="small batches: most negatives come from a queue",
        batch_loss="negatives",
        any_size=True,
        token_drop=0.0,
        short_run={"color": 0.25},
    )
    # The paper uses SGD, 0.03 at 256, for hundreds of epochs; AdamW learns faster in short runs.
    optimizer_settings = OptimizerSettings("adamw", lr=2e-3, weight_decay=1e-4, scaling="sqrt")

    def __init__(
        self,
        encoder: Encoder,
        temperature: float = 0.2,
        momentum: float = 0.999,
        queue_size: int | None = None,
        projection_size: int = 128,
        min_crop_scale: float = 0.2,
        color: float | None = None,
    ) -> None:
        super().__init__(encoder)
        color = 0.5 if color is None else color
        check_share("pretext.momentum", momentum)
        check_positive("pretext.temperature", temperature)
        check_sizes(LARGEST_QUEUE, queue_size=queue_size)
        check_sizes(projection_size=projection_size)
        features = encoder.num_features
        self.head = nn.Sequential(
            nn.Linear(features, features),
            nn.ReLU(inplace=True),
            nn.Linear(features, projection_size),
        )
        self.teacher_encoder, self.teacher_head = make_teacher(encoder), make_teacher(self.head)
        self.queue_size, self.projection_size = queue_size, projection_size
        self.queue = Queue(queue_size or DEFAULT_SIZE, projection_size)
        self.temperature, self.momentum = temperature, momentum
        self.min_crop_scale, self.color = min_crop_scale, color

    def prepare(self, images: Source, run: Path) -> None:
        if self.queue_size is None:
            self.queue = Queue(suitable_size(len(images)), self.projection_size)

    def views(self, upright: bool = True) -> Views:
        size = self.encoder.image_size
        return two_views(size, self.min_crop_scale, self.color, upright)

    def loss(self, views: list[Tensor]) -> Tensor:
        query = self.head(self.encoder(views[0]))
        with torch.no_grad():
            key = self.teacher_head(self.teacher_encoder(views[1]))
        queue = self.queue.fresh(len(key) * self.batches_per_step, self.teacher_momentum)
        loss = info_nce(query, key, key, queue, self.temperature)
        self.queue.push(key)
        return loss

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.teacher_encoder.eval()
        return self

    @property
    def teacher_momentum(self) -> float:
        return min(self.momentum, self.largest_momentum)

    def after_step(self) -> None:
        ema_update(self.teacher_encoder, self.encoder, self.teacher_momentum, norms=True)
        ema_update(self.teacher_head, self.head, self.teacher_momentum)
