"""DINOv2: DINO on images and iBOT on masked patches, with a head each and balanced targets.

Oquab et al. 2023, "DINOv2: Learning Robust Visual Features without Supervision", arXiv 2304.07193,
section 4; what the paper leaves out is as in the authors' code (facebookresearch/dinov2).
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
from vissl_lite.pretext.modules.losses import koleo, patch_loss, sinkhorn, swapped_prediction
from vissl_lite.pretext.modules.masking import (
    block_masks,
    check_patches,
    masked_patches,
    select_patches,
)

# Share of the global crops with a mask, smallest and largest share of patches masked in one, and
# number of Sinkhorn-Knopp iterations (section 4; ``ssl_default_config.yaml``).
MASKED_CROPS, MIN_MASKED, MAX_MASKED = 0.5, 0.1, 0.5
SMALLEST_BLOCK = 4  # patches (``masking.py``)
SINKHORN_ITERATIONS = 3


def draw_masks(batch: int, rows: int, columns: int) -> Tensor:
    """Mask a tenth to half of the patches in half of the images, in blocks.

    The range of shares is cut into as many parts as images are masked, and each draws its share
    from another part: batches differ little in their number of masked patches (``collate.py``).

    Args:
        batch: B, number of images.
        rows: Number of rows of patches.
        columns: Number of columns of patches.

    Returns:
        ``(B, rows, columns)`` bool on the CPU, true where masked; at least one patch of the batch
        is.
    """
    rng = np.random.default_rng(int(torch.randint(2**62, ())))
    edges = np.linspace(MIN_MASKED, MAX_MASKED, int(MASKED_CROPS * batch) + 1)
    shares = np.zeros(batch)
    shares[: len(edges) - 1] = rng.uniform(edges[:-1], edges[1:])
    return block_masks(rng.permutation(shares), rows, columns, rng, SMALLEST_BLOCK)


class DINOv2(PretextTask):
    """DINOv2.

    The teacher sees the global crops whole. The student sees half of them with blocks of patches
    replaced by a mask token; it predicts the teacher's outputs for these patches, and from every
    crop those for the other global crops. Image features are those that the backbone pools: the
    class token of most ViTs, the mean of the patches of timm's DINOv3 models. Register tokens take
    part in attention only. timm's weights lack the mask token and the heads, which start anew.

    The defaults are for runs of minutes to hours. For long runs on ImageNet see
    ``configs/imagenet/dinov2.yaml``. These differences from the authors' code follow timm and the
    optimizer that all pretexts share, and were not measured: gradients are clipped by the norm of
    all parameters together, theirs by that of the backbone and of each head; position embeddings do
    not decay; stochastic depth rises from block to block, theirs has the same rate in all; the
    patch embedding has no learning rate of its own, theirs 0.2 times that of the lowest layer; and
    the mask token has the learning rate of the heads, theirs that of the lowest layer.

    Args:
        encoder: Encoder to train; a run saves the teacher, which has better features.
        prototypes: Number of prototypes of each head; the authors' code uses 65536 for ImageNet and
            131072 for its large runs. Sinkhorn-Knopp uses all of them in every batch.
        patch_weight: Weight of the loss on masked patches.
        koleo_weight: Weight of the KoLeo regularizer, which spreads the image features of the
            student on each global crop.
        temperature: Softmax temperature of the student.
        teacher_temperature: Final softmax temperature of the teacher; 0.07 in the authors' code.
        warm_teacher_temperature: Initial softmax temperature of the teacher.
        temperature_warmup: Fraction of the run in which the teacher temperature is warmed up; the
            authors' code uses 30 epochs of 100 or 500.
        momentum: Initial momentum of the teacher; increases to 1 along a cosine. Default 0.99; with
            ``--epochs`` and from random weights it rises with the length of the run to 0.994. The
            authors' code uses 0.992 to 0.994, for batches of 2048 and more and 125,000 steps and
            more.
        freeze_last_layer: Fraction of the run in which the last layers of the heads are not
            trained; the authors' code uses one epoch of 100 or 500.
        hidden_size: Hidden size of the heads; 2048 in the authors' code.
        bottleneck_size: Number of features before the last layer; 256 to 384 in the authors' code.
        local_crops: Number of local crops besides the two global ones; default 6, none below 64
            pixels; 8 in the authors' code.
        min_crop_scale: Smallest fraction of the image area in a local crop.
        min_global_crop_scale: Smallest fraction in a global crop.
        color: Strength of the color distortion; the paper uses about 0.5.
        drop_path: Rate of stochastic depth in the student; default 0.1; 0.3 to 0.4 in the
            authors' code, for ViT-L.
    """

    info = PretextInfo(
        name="dinov2",
        family="self-distilling and masked",
        views="2 + 6 small",
        paper="Oquab et al. 2023, arXiv 2304.07193",
        use="ViTs and long runs; to go on from weights of DINOv2 or DINOv3",
        backbones="any ViT",
        batch_loss="statistics",
        momentum=(0.99, 0.994, 2048),
    )
    # The authors' code uses 2e-3 for 256, for ViT-L and 125,000 steps; gradients are clipped at 3,
    # and the weight decay rises from 0.04 to 0.4 or 0.2.
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
        teacher_temperature: float = 0.07,
        warm_teacher_temperature: float = 0.04,
        temperature_warmup: float = 0.3,
        momentum: float | None = None,
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
        check_patches(self.info, encoder)
        check_not_negative("pretext.patch_weight", patch_weight)
        check_not_negative("pretext.koleo_weight", koleo_weight)
        check_positive("pretext.temperature", temperature)
        check_share("pretext.freeze_last_layer", freeze_last_layer)
        check_sizes(LARGEST_QUEUE, prototypes=prototypes)
        check_sizes(hidden_size=hidden_size, bottleneck_size=bottleneck_size)
        self.head, self.patch_head = (
            PrototypeHead(encoder.num_features, hidden_size, bottleneck_size, prototypes, False)
            for _ in range(2)
        )
        self.teacher_encoder = make_teacher(encoder)
        self.teacher_head = make_teacher(self.head)
        self.teacher_patch_head = make_teacher(self.patch_head)
        add_drop_path(encoder, drop_path)
        self.mask_token = nn.Parameter(torch.empty(encoder.num_features).normal_(std=0.02))
        self.patch_weight, self.koleo_weight = patch_weight, koleo_weight
        self.temperature, self.freeze_last_layer = temperature, freeze_last_layer
        self.teacher_schedule = TeacherSchedule(
            self.info.default_momentum(momentum),
            warm_teacher_temperature,
            teacher_temperature,
            temperature_warmup,
        )
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
            temperature = self.teacher_schedule.temperature_at(self.progress)
            targets = sinkhorn(self.teacher_head(pooled), temperature, SINKHORN_ITERATIONS)
            patch_outputs = self.teacher_patch_head(select_patches(patches, masked))
            patch_targets = sinkhorn(patch_outputs, temperature, SINKHORN_ITERATIONS)

        with masked_patches(self.encoder.model, mask, self.mask_token):
            pooled, patches = self.encoder.pooled_and_map(global_crops)
        scores = list(self.head(pooled).chunk(2))
        scores += forward_multi_crop(lambda images: self.head(self.encoder(images)), views[2:])
        patch_scores = self.patch_head(select_patches(patches, masked))

        on_images = swapped_prediction(scores, targets.chunk(2), self.temperature)
        on_patches = patch_loss(patch_targets, patch_scores, mask.flatten(1), self.temperature)
        closeness = koleo(pooled[: len(views[0])]) + koleo(pooled[len(views[0]) :])
        self.measure("image_loss", on_images)
        self.measure("patch_loss", on_patches)
        self.measure("koleo_loss", closeness)
        return on_images + self.patch_weight * on_patches + self.koleo_weight * closeness

    def on_after_backward(self) -> None:
        if self.progress < self.freeze_last_layer:
            self.head.freeze_last()
            self.patch_head.freeze_last()

    def after_step(self) -> None:
        momentum = self.teacher_schedule.momentum_at(self.progress)
        ema_update(self.teacher_encoder, self.encoder, momentum)
        ema_update(self.teacher_head, self.head, momentum)
        ema_update(self.teacher_patch_head, self.patch_head, momentum)

    def trained_encoder(self) -> Encoder:
        return self.teacher_encoder
