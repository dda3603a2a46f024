"""Multi-task training of one encoder: weighted sum of the losses of rotation and SimCLR.

The tasks complement each other (Doersch & Zisserman 2017, "Multi-task Self-Supervised Visual
Learning", arXiv 1708.07860).
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from vissl_lite.data.views import Views
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import check_positive, check_sizes
from vissl_lite.optim import OptimizerSettings
from vissl_lite.pretext.base import PretextInfo, PretextTask, Visualization
from vissl_lite.pretext.modules.chance_monitor import ChanceMonitor
from vissl_lite.pretext.modules.crops import two_views
from vissl_lite.pretext.modules.heads import ProjectionHead
from vissl_lite.pretext.modules.losses import nt_xent
from vissl_lite.pretext.rotation import all_rotations, visualize_rotations


class Multi(PretextTask):
    """Rotation prediction on SimCLR's first view, and SimCLR on both.

    Args:
        encoder: Encoder to train.
        rotation_weight: Weight of the rotation loss; the weight of the SimCLR loss is 1.
        temperature: Softmax temperature of the SimCLR loss.
        projection_size: Size of the embeddings of the SimCLR loss.
        min_crop_scale: Smallest fraction of the image area in a view.
        color: Strength of the color distortion.
    """

    info = PretextInfo(
        name="multi",
        family="predictive and contrastive",
        views="2",
        paper="Doersch & Zisserman 2017, arXiv 1708.07860",
        use="rotation and simclr together, on photographs with a natural orientation",
        orientation=True,
        batch_loss="negatives",
        any_size=True,
        token_drop=0.0,
    )
    optimizer_settings = OptimizerSettings("adamw", lr=2e-3, weight_decay=1e-4, scaling="sqrt")

    def __init__(
        self,
        encoder: Encoder,
        rotation_weight: float = 1.0,
        temperature: float = 0.1,
        projection_size: int = 128,
        min_crop_scale: float = 0.2,
        color: float = 0.5,
    ) -> None:
        super().__init__(encoder)
        check_positive("pretext.temperature", temperature)
        check_sizes(projection_size=projection_size)
        features = encoder.num_features
        self.contrast_head = ProjectionHead(features, features, projection_size)
        self.rotation_head = nn.Linear(features, 4)
        self.signal = ChanceMonitor("rotation", chance=1 / 4)
        self.rotation_weight, self.temperature = rotation_weight, temperature
        self.min_crop_scale, self.color = min_crop_scale, color

    def views(self, upright: bool = True) -> Views:
        # Not turned, even if the images have no natural orientation: the loss turns them.
        size = self.encoder.image_size
        return two_views(size, self.min_crop_scale, self.color, upright=True)

    def loss(self, views: list[Tensor]) -> Tensor:
        turned, labels = all_rotations(views[0])
        # The first quarter of the rotated images are the unrotated first views.
        features = self.encoder(torch.cat([turned, views[1]]))
        count = len(views[0])
        z1, z2 = self.contrast_head(torch.cat([features[:count], features[-count:]])).chunk(2)
        logits = self.rotation_head(features[:-count]).float()
        contrast, rotation = nt_xent(z1, z2, self.temperature), F.cross_entropy(logits, labels)
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        self.measure("accuracy", accuracy)
        self.measure("contrast_loss", contrast)
        self.measure("rotation_loss", rotation)
        self.signal.update(accuracy, self.progress)
        return contrast + self.rotation_weight * rotation

    def visualize(self, views: list[Tensor]) -> Visualization:
        classifier = nn.Sequential(self.encoder, self.rotation_head)
        return visualize_rotations(views[0], self.encoder, classifier)
