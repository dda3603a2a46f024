"""VISReg: like LeJEPA, with separate regularization of scale and shape of the embeddings.

Wu, Balestriero & Levine 2026, "VISReg: Variance-Invariance-Sketching Regularization for JEPA
training", arXiv 2606.02572.
"""

import torch
from torch import Tensor

from vissl_lite.data.views import Views
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import LARGEST_DEPTH, UserError, check_sizes
from vissl_lite.optim import OptimizerSettings
from vissl_lite.pretext.base import PretextInfo, PretextTask
from vissl_lite.pretext.modules.crops import MultiCrop, forward_multi_crop
from vissl_lite.pretext.modules.drop_path import add_drop_path
from vissl_lite.pretext.modules.heads import ProjectionHead
from vissl_lite.pretext.modules.losses import random_directions, visreg

# Probability for each view. The authors' code gives 0.2 to a transform that then inverts half of
# the images, as torchvision's default is: in effect 0.1.
SOLARIZE = 0.1


class VISReg(PretextTask):
    """VISReg.

    In the authors' code the weights of the projection head do not decay; here they do, as in the
    other pretexts. This was not measured.

    Args:
        encoder: Encoder to train.
        lambd: Weight of the regularization relative to the agreement of views, in (0, 1); the
            authors use 0.9 for four global and six local crops and 0.6 for four global ones. 0.5,
            for two global ones, was not compared with these.
        directions: Number of random projections of the embeddings, drawn at every step; the
            authors use 4096.
        hidden_size: Hidden size of the projection head; 2048 in the authors' example.
        projection_size: Size of the embeddings.
        global_crops: Number of crops of the encoder's image size; the authors use 4.
        local_crops: Number of local crops; default 6 as the authors use, none below 64 pixels.
        min_crop_scale: Smallest fraction of the image area in a local crop.
        min_global_crop_scale: Smallest fraction in a global crop.
        color: Strength of the color distortion; the authors use 0.5, and 1 on Imagenette.
        drop_path: Rate of stochastic depth; default 0.1 for ViT, Swin and the like as in
            the authors' code (up to ViT-L), and timm's rate, mostly 0, for other backbones.
    """

    info = PretextInfo(
        name="visreg",
        family="non-contrastive",
        views="2 + 6 small",
        paper="Wu et al. 2026, arXiv 2606.02572",
        use="small, noisy or long-tailed data: the gradient does not vanish at collapse",
        batch_loss="statistics",
        any_size=True,
        token_drop=0.0,
        long_run_lr=0.32,
    )
    # The authors' recipe: AdamW, weight decay 0.05, gradients clipped at 1, and a learning rate of
    # 9e-4 for 100 epochs of ImageNet, whose batch size they do not give: that of a long run at 512.
    optimizer_settings = OptimizerSettings(
        "adamw", lr=2e-3, weight_decay=0.05, scaling="sqrt", clip_norm=1.0
    )

    def __init__(
        self,
        encoder: Encoder,
        lambd: float = 0.5,
        directions: int = 256,
        hidden_size: int = 1024,
        projection_size: int = 128,
        global_crops: int = 2,
        local_crops: int | None = None,
        min_crop_scale: float = 0.05,
        min_global_crop_scale: float = 0.3,
        color: float = 0.5,
        drop_path: float | None = None,
    ) -> None:
        super().__init__(encoder)
        if not 0 < lambd < 1:
            raise UserError(f"--pretext.lambd {lambd} must be between 0 and 1")
        check_sizes(LARGEST_DEPTH, global_crops=global_crops)
        check_sizes(directions=directions, hidden_size=hidden_size, projection_size=projection_size)
        self.head = ProjectionHead(
            encoder.num_features, hidden_size, hidden_size, projection_size, gelu=True
        )
        self.lambd, self.directions = lambd, directions
        self.crops = MultiCrop(
            global_crops,
            local_crops,
            min_crop_scale,
            min_global_crop_scale,
            color,
            solarize_all=SOLARIZE,
        )
        add_drop_path(encoder, drop_path)

    def views(self, upright: bool = True) -> Views:
        return self.crops.views(self.encoder, upright)

    def loss(self, views: list[Tensor]) -> Tensor:
        z = torch.stack(
            [view.float() for view in forward_multi_crop(self._embed, views)]
        )  # (V, B, D)
        center = z[: self.crops.global_crops].mean(dim=0)
        agreement = (z - center).square().mean()
        directions = random_directions(z.shape[2], self.directions, like=z)
        spread = torch.stack([visreg(view, directions) for view in z]).mean()
        self.measure("agreement", agreement)
        self.measure("spread", spread)
        return (1 - self.lambd) * agreement + self.lambd * spread

    def _embed(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images))
