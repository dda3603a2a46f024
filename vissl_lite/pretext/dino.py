"""DINO: predict the outputs of a momentum teacher on the global crops from all crops.

Caron, Touvron, Misra, Jégou, Mairal, Bojanowski & Joulin 2021, "Emerging Properties in
Self-Supervised Vision Transformers", arXiv 2104.14294.
"""

from dataclasses import replace

import torch
from torch import Tensor

from vissl_lite.data.views import Views
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import LARGEST_QUEUE, check_positive, check_share, check_sizes
from vissl_lite.optim import OptimizerSettings
from vissl_lite.pretext.base import PretextInfo, PretextTask
from vissl_lite.pretext.modules.crops import MultiCrop, forward_multi_crop
from vissl_lite.pretext.modules.drop_path import add_drop_path
from vissl_lite.pretext.modules.ema import TeacherSchedule, ema_update, make_teacher
from vissl_lite.pretext.modules.heads import PrototypeHead
from vissl_lite.pretext.modules.losses import Center, swapped_prediction


class DINO(PretextTask):
    """DINO.

    The defaults are for runs of minutes to hours; with ``--epochs`` the learning rate falls with
    the length of the run to the paper's (5e-4 for 256 images), and the momentum rises. For ImageNet
    see ``configs/imagenet/dino.yaml``.

    As in the authors' recipe for ViT-B, the prototypes are always normalized (their best ViT-S is
    trained without). Two differences come from the optimizer that all pretexts share, and were not
    measured: gradients are clipped by the norm of all parameters together, theirs by that of each;
    and position embeddings do not decay.

    Args:
        encoder: Encoder to train; a run saves the teacher, which has better features.
        prototypes: Number of prototypes of the heads; the paper uses 65536, for 1.3 million images.
        temperature: Softmax temperature of the student (section 3.3).
        teacher_temperature: Softmax temperature of the teacher after the warm-up; the paper uses
            0.04 to 0.07.
        warm_teacher_temperature: Initial softmax temperature of the teacher.
        temperature_warmup: Fraction of the run in which the teacher temperature is warmed up; the
            paper uses 30 epochs of 300 or more.
        momentum: Initial momentum of the teacher; increases to 1 along a cosine. Default 0.99; with
            ``--epochs`` and from random weights it rises with the length of the run to 0.9995,
            which the authors' code advises at batches of 256, or at larger ones to where the
            teacher averages as many images: 0.998 at 1024. (The paper uses 0.996 there.) In a short
            run the teacher would then hardly leave its initial weights.
        center_momentum: Momentum of the center of the teacher's outputs (equation 4).
        freeze_last_layer: Fraction of the run in which the last layer is not trained; the paper
            uses one epoch of a hundred (appendix C).
        hidden_size: Hidden size of the heads (appendix C: 2048).
        bottleneck_size: Number of features before the last layer (appendix C).
        head_norm: Whether the heads use BatchNorm; default true, as in the authors' recipe for
            ResNet-50, but for backbones of patch tokens such as ViT and Swin.
        local_crops: Number of local crops besides the two global ones; default 6, none below 64
            pixels; the paper uses 8 to 10.
        min_crop_scale: Smallest fraction of the image area in a local crop.
        min_global_crop_scale: Smallest fraction in a global crop (0.4 in the authors' recipes).
        color: Strength of the color distortion; the paper uses about 0.5.
        drop_path: Rate of stochastic depth in the student; default 0.1 for ViT, Swin and
            the like as in the paper, and timm's rate, mostly 0, for other backbones.
    """

    info = PretextInfo(
        name="dino",
        family="self-distilling",
        views="2 + 6 small",
        paper="Caron et al. 2021, arXiv 2104.14294",
        use="ViTs and long runs; strong kNN features",
        any_size=True,
        token_drop=0.0,
        long_run_lr=0.25,
        momentum=(0.99, 0.9995, 256),
    )
    # The paper uses 5e-4 at batches of 256 with linear scaling, for hundreds of epochs; gradients
    # are clipped at 3, and the weight decay rises from 0.04 to 0.4.
    optimizer_settings = OptimizerSettings(
        "adamw", lr=2e-3, weight_decay=0.04, scaling="sqrt", clip_norm=3.0, weight_decay_end=0.4
    )

    def __init__(
        self,
        encoder: Encoder,
        prototypes: int = 2048,
        temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        warm_teacher_temperature: float = 0.04,
        temperature_warmup: float = 0.1,
        momentum: float | None = None,
        center_momentum: float = 0.9,
        freeze_last_layer: float = 0.01,
        hidden_size: int = 1024,
        bottleneck_size: int = 256,
        head_norm: bool | None = None,
        local_crops: int | None = None,
        min_crop_scale: float = 0.05,
        min_global_crop_scale: float = 0.3,
        color: float = 0.5,
        drop_path: float | None = None,
    ) -> None:
        super().__init__(encoder)
        if encoder.patch_size is None:
            # The authors' recipe for ResNet-50 has a constant weight decay, too: 1e-4, with SGD.
            self.optimizer_settings = replace(self.optimizer_settings, weight_decay_end=None)
        check_share("pretext.center_momentum", center_momentum)
        check_share("pretext.freeze_last_layer", freeze_last_layer)
        check_positive("pretext.temperature", temperature)
        check_sizes(LARGEST_QUEUE, prototypes=prototypes)
        check_sizes(hidden_size=hidden_size, bottleneck_size=bottleneck_size)
        norm = encoder.patch_size is None if head_norm is None else head_norm
        self.head = PrototypeHead(
            encoder.num_features, hidden_size, bottleneck_size, prototypes, norm
        )
        self.teacher_encoder, self.teacher_head = make_teacher(encoder), make_teacher(self.head)
        add_drop_path(encoder, drop_path)
        self.center = Center(prototypes, center_momentum)
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
        features = forward_multi_crop(self.encoder, views)
        scores = self.head(torch.cat(features)).chunk(len(views))  # one BatchNorm for all crops
        with torch.no_grad():
            outputs = self.teacher_head(self.teacher_encoder(torch.cat(views[:2])))
            temperature = self.teacher_schedule.temperature_at(self.progress)
            targets = self.center.targets(outputs, temperature).chunk(2)
            self.center.update(outputs, self.batches_per_step)
        return swapped_prediction(scores, targets, self.temperature)

    def on_after_backward(self) -> None:
        if self.progress < self.freeze_last_layer:
            self.head.freeze_last()

    def after_step(self) -> None:
        momentum = self.teacher_schedule.momentum_at(self.progress)
        ema_update(self.teacher_encoder, self.encoder, momentum)
        ema_update(self.teacher_head, self.head, momentum)

    def trained_encoder(self) -> Encoder:
        return self.teacher_encoder
