"""DenseCL: MoCo for whole images and for every location of the feature map.

Wang, Zhang, Shen, Kong & Li 2021, "Dense Contrastive Learning for Self-Supervised Visual
Pre-Training", arXiv 2011.09157.
"""

import logging
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from vissl_lite.data.stream import Source
from vissl_lite.data.views import Views
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import (
    LARGEST_QUEUE,
    check_positive,
    check_share,
    check_sizes,
)
from vissl_lite.optim import OptimizerSettings
from vissl_lite.pretext.base import PretextInfo, PretextTask
from vissl_lite.pretext.modules.crops import two_views
from vissl_lite.pretext.modules.ema import ema_update, make_teacher
from vissl_lite.pretext.modules.losses import info_nce
from vissl_lite.pretext.modules.queue import DEFAULT_SIZE, Queue, suitable_size

log = logging.getLogger(__name__)


@torch.no_grad()
def correspondence(map1: Tensor, map2: Tensor) -> Tensor:
    """Match each location of a feature map to the most similar one of another (equation 4).

    Args:
        map1: ``(B, C, N)`` features at N locations of the first views.
        map2: ``(B, C, N)`` features at N locations of the second views.

    Returns:
        ``(B, N)`` indices of locations of the second map.
    """
    map1, map2 = F.normalize(map1.float(), dim=1), F.normalize(map2.float(), dim=1)
    with torch.autocast(map1.device.type, enabled=False):  # it would round to ties
        return (map1.transpose(1, 2) @ map2).argmax(dim=2)


class DenseHead(nn.Module):
    """MoCo's head on the pooled features, and its 1x1 convolutional counterpart (figure 2).

    Args:
        features: Number of pooled features.
        map_features: Number of channels of the feature map.
        projection_size: Size of the embeddings.
    """

    def __init__(self, features: int, map_features: int, projection_size: int) -> None:
        super().__init__()
        self.whole = nn.Sequential(
            nn.Linear(features, features),
            nn.ReLU(inplace=True),
            nn.Linear(features, projection_size),
        )
        self.dense = nn.Sequential(
            nn.Conv2d(map_features, map_features, kernel_size=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(map_features, projection_size, kernel_size=1),
        )

    def forward(self, pooled: Tensor, feature_map: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``(B, D)`` and ``(B, D', h, w)`` to ``(B, E)`` and ``(B, E, h w)``."""
        return self.whole(pooled), self.dense(feature_map).flatten(2)


class DenseCL(PretextTask):
    """DenseCL.

    The teacher is in evaluation mode, so that BatchNorm does not tell the keys of the same batch
    from those of the queues, as in ``moco``. In four minutes on CIFAR-10 the linear accuracy was
    0.316 this way, and 0.327 with the statistics of the batch (one seed). Unlike in the paper, the
    keys of the other images of the batch are negatives too (in the dense loss the mean over their
    locations, as in its queue), and those of the queues only if the teacher has changed little
    since: 0.370 (``benchmarks/README.md``, every pretext for the same minutes).

    Args:
        encoder: Encoder to train. Its last feature map should have several locations: at 32 pixels,
            that of ``resnet18`` has one, that of ``resnet18_cifar`` sixteen.
        temperature: Softmax temperature of both losses, as in the paper. In minutes on
            CIFAR-10, 0.1 made no clear difference (``benchmarks/README.md``, settings of short
            runs).
        momentum: Momentum of the teacher; at most (1 + n) / (10 + n) after n steps.
        queue_size: Largest number of negatives of each loss from its queue; default 4096, but at
            most a quarter of the images. The paper uses 65536, for 1.3
            million images.
        projection_size: Size of the embeddings.
        dense_weight: Lambda, weight of the dense loss (equation 3; 0.5 in section 4.1).
        min_crop_scale: Smallest fraction of the image area in a view.
        color: Strength of the color distortion; the paper uses 0.5.
    """

    info = PretextInfo(
        name="densecl",
        family="contrastive",
        views="2",
        paper="Wang et al. 2021, arXiv 2011.09157",
        use="before detection or segmentation: trains every location of the feature map",
        batch_loss="negatives",
        any_size=True,
    )
    # As for moco: the paper trains with SGD for hundreds of epochs.
    optimizer_settings = OptimizerSettings("adamw", lr=2e-3, weight_decay=1e-4, scaling="sqrt")

    def __init__(
        self,
        encoder: Encoder,
        temperature: float = 0.2,
        momentum: float = 0.999,
        queue_size: int | None = None,
        projection_size: int = 128,
        dense_weight: float = 0.5,
        min_crop_scale: float = 0.2,
        color: float = 0.5,
    ) -> None:
        super().__init__(encoder)
        check_share("pretext.momentum", momentum)
        check_positive("pretext.temperature", temperature)
        check_share("pretext.dense_weight", dense_weight)
        check_sizes(LARGEST_QUEUE, queue_size=queue_size)
        check_sizes(projection_size=projection_size)
        encoder.map_side()  # raises now if there is no single map
        self.head = DenseHead(encoder.num_features, encoder.map_features, projection_size)
        self.teacher_encoder, self.teacher_head = make_teacher(encoder), make_teacher(self.head)
        self.queue_size, self.projection_size = queue_size, projection_size
        self._make_queues(queue_size or DEFAULT_SIZE)
        self.temperature, self.momentum = temperature, momentum
        self.dense_weight = dense_weight
        self.min_crop_scale, self.color = min_crop_scale, color
        self._map_checked = False

    def _make_queues(self, size: int) -> None:
        self.queue = Queue(size, self.projection_size)
        self.dense_queue = Queue(size, self.projection_size)

    def prepare(self, images: Source, run: Path) -> None:
        if self.queue_size is None:
            self._make_queues(suitable_size(len(images)))

    def views(self, upright: bool = True) -> Views:
        size = self.encoder.image_size
        return two_views(size, self.min_crop_scale, self.color, upright)

    def loss(self, views: list[Tensor]) -> Tensor:
        pooled, map1 = self.encoder.pooled_and_map(views[0])
        query, dense_query = self.head(pooled, map1)
        with torch.no_grad():
            pooled, map2 = self.teacher_encoder.pooled_and_map(views[1])
            key, dense_keys = self.teacher_head(pooled, map2)
            if views[0].shape[-1] >= self.encoder.image_size:  # not small in progressive resizing
                self._check_map(map1)
            partner = correspondence(map1.flatten(2), map2.flatten(2))
            dense_key = dense_keys.gather(2, partner[:, None].expand_as(dense_keys))
            dense_mean = dense_keys.mean(dim=2)  # one per image (section 3.3)
        images = len(key) * self.batches_per_step
        queue = self.queue.fresh(images, self.teacher_momentum)
        dense_queue = self.dense_queue.fresh(images, self.teacher_momentum)
        whole = info_nce(query, key, key, queue, self.temperature)
        dense = info_nce(
            dense_query.transpose(1, 2).flatten(0, 1),
            dense_key.transpose(1, 2).flatten(0, 1),
            dense_mean,
            dense_queue,
            self.temperature,
        )
        self.queue.push(key)
        self.dense_queue.push(dense_mean)
        self.measure("dense_loss", dense)
        return (1 - self.dense_weight) * whole + self.dense_weight * dense

    def _check_map(self, feature_map: Tensor) -> None:
        if not self._map_checked and feature_map.shape[2:].numel() == 1:
            log.warning(
                "densecl: the last feature map of %(backbone)s at %(pixels)d pixels has a single "
                "location, so that the loss is not dense; give a larger --image_size or another "
                "--backbone",
                {"backbone": self.encoder.backbone, "pixels": self.encoder.image_size},
                extra={"code": "pretext.one_location"},
            )
        self._map_checked = True

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
