"""iBOT: DINO with an additional loss that predicts the teacher's outputs of masked patches.

Zhou, Wei, Wang, Shen, Xie, Yuille & Kong 2022, "iBOT: Image BERT Pre-Training with Online
Tokenizer", arXiv 2111.07832; with DINOv2's regularizer KoLeo (Oquab et al. 2023, arXiv 2304.07193).
"""

import numpy as np
import torch
from torch import Tensor, nn

from vissl_lite.data.views import Views
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import (
    LARGEST_QUEUE,
    check_not_negative,
    check_positive,
    check_share,
    check_sizes,
)
from vissl_lite.optim import OptimizerSettings
from vissl_lite.pretext.base import PretextInfo, PretextTask
from vissl_lite.pretext.modules.crops import MultiCrop, forward_multi_crop
from vissl_lite.pretext.modules.drop_path import add_drop_path
from vissl_lite.pretext.modules.ema import TeacherSchedule, ema_update, make_teacher
from vissl_lite.pretext.modules.heads import PrototypeHead
from vissl_lite.pretext.modules.losses import Center, koleo, patch_loss, swapped_prediction
from vissl_lite.pretext.modules.masking import (
    block_masks,
    check_patches,
    masked_patches,
    select_patches,
)


def draw_masks(batch: int, rows: int, columns: int) -> Tensor:
    """Mask a tenth to half of the patches in half of the images, in blocks (section 4.1).

    Args:
        batch: B, number of images.
        rows: Number of rows of patches.
        columns: Number of columns of patches.

    Returns:
        ``(B, rows, columns)`` bool on the CPU, true where masked; at least one patch of the batch
        is.
    """
    rng = np.random.default_rng(int(torch.randint(2**62, ())))
    shares = (rng.uniform(0.1, 0.5) if rng.random() < 0.5 else 0.0 for _ in range(batch))
    return block_masks(shares, rows, columns, rng)


class IBOT(PretextTask):
    """iBOT.

    The defaults are for runs of minutes to hours; with ``--epochs`` the learning rate falls with
    the length of the run to the paper's (5e-4 for 256 images), and the momentum rises. For ImageNet
    see ``configs/imagenet/ibot.yaml``. Normalization of the prototypes, clipping, and decay of
    position embeddings differ from the authors' code as in ``dino``. The center of the patches is
    that of masked ones, the only ones whose teacher outputs are computed; theirs is that of all.
    This was not measured.

    Args:
        encoder: Encoder to train; a run saves the teacher, which has better features.
        prototypes: Number of prototypes of the heads; the paper uses 8192, for 1.3 million images.
        patch_weight: Weight of the loss on masked patches.
        koleo_weight: Weight of the KoLeo regularizer, which spreads the embeddings of a batch;
            DINOv2 uses 0.1, iBOT none.
        temperature: Softmax temperature of the student (section 4.1).
        teacher_temperature: Final softmax temperature of the teacher; the paper uses 0.07.
        warm_teacher_temperature: Initial softmax temperature of the teacher.
        temperature_warmup: Fraction of the run in which the teacher temperature is warmed up; the
            paper uses 30 epochs of 800.
        momentum: Initial momentum of the teacher; increases to 1 along a cosine. Default 0.99; with
            ``--epochs`` and from random weights it rises with the length of the run to 0.9995, as
            in ``dino``. The paper uses 0.996, for batches of 1024 and hundreds of epochs.
        center_momentum: Momentum of the centers of the teacher's outputs.
        freeze_last_layer: Fraction of the run in which the last layer is not trained.
        hidden_size: Hidden size of the head, which is shared by images and patches (section 4.1).
        bottleneck_size: Number of features before the last layer.
        local_crops: Number of local crops besides the two global ones; default 6, none below 64
            pixels; the paper uses 10.
        min_crop_scale: Smallest fraction of the image area in a local crop.
        min_global_crop_scale: Smallest fraction in a global crop (0.25 in the authors' recipe for
            ViT-S, 0.32 for larger ones).
        color: Strength of the color distortion; the paper uses about 0.5.
        drop_path: Rate of stochastic depth in the student; default 0.1 as in the paper.
    """

    info = PretextInfo(
        name="ibot",
        family="self-distilling and masked",
        views="2 + 6 small",
        paper="Zhou et al. 2022, arXiv 2111.07832; DINOv2 2304.07193",
        use="ViTs and long runs; before detection or segmentation; trains patch features",
        backbones="any ViT",
        batch_loss="statistics",
        long_run_lr=0.5,
        momentum=(0.99, 0.9995, 256),
    )
    # The paper uses 5e-4 at batches of 256 with linear scaling, for hundreds of epochs; gradients
    # are clipped at 3, and the weight decay rises from 0.04 to 0.4.
    optimizer_settings = OptimizerSettings(
        "adamw", lr=1e-3, weight_decay=0.04, scaling="sqrt", clip_norm=3.0, weight_decay_end=0.4
    )

    def __init__(
        self,
        encoder: Encoder,
        prototypes: int = 2048,
        patch_weight: float = 1.0,
        koleo_weight: float = 0.1,
        temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        warm_teacher_temperature: float = 0.04,
        temperature_warmup: float = 0.1,
        momentum: float | None = None,
        center_momentum: float = 0.9,
        freeze_last_layer: float = 0.01,
        hidden_size: int = 1024,
        bottleneck_size: int = 256,
        local_crops: int | None = None,
        min_crop_scale: float = 0.05,
        min_global_crop_scale: float = 0.32,
        color: float = 0.5,
        drop_path: float | None = None,
    ) -> None:
        super().__init__(encoder)
        check_share("pretext.center_momentum", center_momentum)
        check_share("pretext.freeze_last_layer", freeze_last_layer)
        check_patches(self.info, encoder)
        check_not_negative("pretext.patch_weight", patch_weight)
        check_not_negative("pretext.koleo_weight", koleo_weight)
        check_positive("pretext.temperature", temperature)
        check_sizes(LARGEST_QUEUE, prototypes=prototypes)
        check_sizes(hidden_size=hidden_size, bottleneck_size=bottleneck_size)
        features = encoder.num_features
        self.head = PrototypeHead(features, hidden_size, bottleneck_size, prototypes, norm=False)
        self.teacher_encoder, self.teacher_head = make_teacher(encoder), make_teacher(self.head)
        add_drop_path(encoder, drop_path)
        self.mask_token = nn.Parameter(torch.empty(features).normal_(std=0.02))
        self.center = Center(prototypes, center_momentum)
        self.patch_center = Center(prototypes, center_momentum)
        self.patch_weight, self.koleo_weight = patch_weight, koleo_weight
        self.teacher_schedule = TeacherSchedule(
            self.info.default_momentum(momentum),
            warm_teacher_temperature,
            teacher_temperature,
            temperature_warmup,
        )
        self.temperature, self.freeze_last_layer = temperature, freeze_last_layer
        self.crops = MultiCrop(
            2, local_crops, min_crop_scale, min_global_crop_scale, color, solarize=True
        )

    def views(self, upright: bool = True) -> Views:
        return self.crops.views(self.encoder, upright)

    def loss(self, views: list[Tensor]) -> Tensor:
        global_crops = torch.cat(views[:2])
        with torch.no_grad():
            pooled, patches = self.teacher_encoder.pooled_and_map(global_crops)
            rows, columns = patches.shape[2:]
            mask = draw_masks(len(global_crops), rows, columns)
            masked = mask.flatten().nonzero().flatten().to(global_crops.device)
            outputs = self.teacher_head(pooled)
            patch_outputs = self.teacher_head(select_patches(patches, masked))
            temperature = self.teacher_schedule.temperature_at(self.progress)
            targets = self.center.targets(outputs, temperature)
            patch_targets = self.patch_center.targets(patch_outputs, temperature)
            self.center.update(outputs, self.batches_per_step)
            patch_mean = patch_outputs.mean(dim=0, keepdim=True)
            self.patch_center.update(patch_mean, self.batches_per_step)

        with masked_patches(self.encoder.model, mask, self.mask_token):
            pooled, patches = self.encoder.pooled_and_map(global_crops)
        scores = list(self.head(pooled).chunk(2))
        scores += forward_multi_crop(lambda images: self.head(self.encoder(images)), views[2:])
        patch_scores = self.head(select_patches(patches, masked))

        on_images = swapped_prediction(scores, targets.chunk(2), self.temperature)
        on_patches = patch_loss(patch_targets, patch_scores, mask.flatten(1), self.temperature)
        self.measure("image_loss", on_images)
        self.measure("patch_loss", on_patches)
        spread = sum(koleo(z) for z in pooled.chunk(2))
        return on_images + self.patch_weight * on_patches + self.koleo_weight * spread

    def on_after_backward(self) -> None:
        if self.progress < self.freeze_last_layer:
            self.head.freeze_last()

    def after_step(self) -> None:
        momentum = self.teacher_schedule.momentum_at(self.progress)
        ema_update(self.teacher_encoder, self.encoder, momentum)
        ema_update(self.teacher_head, self.head, momentum)

    def trained_encoder(self) -> Encoder:
        return self.teacher_encoder
