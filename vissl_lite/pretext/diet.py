"""DIET: tell each training image from all others, by a classifier with one class per image.

Ibrahim, Klindt & Balestriero 2024, "Occam's Razor for Self Supervised Learning: What is Sufficient
to Learn Good Representations?", arXiv 2406.10743; from pre-trained weights and with few images:
Rodas, Montesino, Ambsdorf, Klindt & Balestriero 2025, "DIET-CP: Lightweight and Data Efficient Self
Supervised Continued Pretraining", arXiv 2509.06990.
"""

import logging
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from vissl_lite.data.stream import Batch, Source
from vissl_lite.data.views import Views
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import check_warmup
from vissl_lite.optim import OptimizerSettings
from vissl_lite.pretext.base import PretextInfo, PretextTask
from vissl_lite.pretext.modules.crops import distorted_view

log = logging.getLogger(__name__)

# More images than this give a warning. With 50,000 (CIFAR-10, from random weights, 90 seconds) its
# linear accuracy fell from 0.390 to 0.185 (benchmarks/README.md, every pretext).
MANY_IMAGES = 20_000


class DIET(PretextTask):
    """DIET.

    The classifier has a row of weights for each training image, so it is for sets of hundreds or
    thousands of images. From pre-trained weights, first the classifier is trained alone, then the
    last two blocks of the encoder with it, as in DIET-CP (the defaults of ``--freeze_share`` and
    ``--train``).

    Args:
        encoder: Encoder to train.
        label_smoothing: Share of the target that is spread over all images, in [0, 1); 0.3 as in
            DIET-CP (DIET from random weights uses 0.8).
        min_crop_scale: Smallest fraction of the image area in the view.
        color: Strength of the color distortion.
    """

    info = PretextInfo(
        name="diet",
        family="predictive",
        views="1",
        paper="Ibrahim et al. 2024, arXiv 2406.10743; DIET-CP 2509.06990",
        use="hundreds or thousands of images, from pre-trained weights",
        any_size=True,
        token_drop=0.0,
        train="blocks:2",
        long_run_lr=0.5,
    )
    # As of the other pretexts that classify; DIET uses 1e-3 for batches of 256 and long runs.
    optimizer_settings = OptimizerSettings("adamw", lr=2e-3, weight_decay=0.05, scaling="sqrt")

    def __init__(
        self,
        encoder: Encoder,
        label_smoothing: float = 0.3,
        min_crop_scale: float = 0.2,
        color: float = 0.5,
    ) -> None:
        super().__init__(encoder)
        check_warmup("pretext.label_smoothing", label_smoothing)
        self.label_smoothing = label_smoothing
        self.min_crop_scale, self.color = min_crop_scale, color
        self.head: nn.Linear
        self._indices: Tensor  # (B,) numbers of the images of the current batch

    def prepare(self, images: Source, run: Path) -> None:
        if len(images) > MANY_IMAGES:
            log.warning(
                "diet has a class for each of the %(images)d images and is made for hundreds or "
                "thousands: with more, and from random weights, all other pretexts were "
                "better; give another --pretext",
                {"images": len(images)},
                extra={"code": "pretext.many_classes"},
            )
        self.head = nn.Linear(self.encoder.num_features, len(images), bias=False)

    def views(self, upright: bool = True) -> Views:
        return distorted_view(self.encoder.image_size, self.min_crop_scale, self.color, upright)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self._indices = batch.indices
        return super().training_step(batch, batch_idx)

    def loss(self, views: list[Tensor]) -> Tensor:
        logits = self.head(self.encoder(views[0])).float()
        with torch.no_grad():
            self.measure("accuracy", (logits.argmax(dim=1) == self._indices).float().mean())
        return F.cross_entropy(logits, self._indices, label_smoothing=self.label_smoothing)
