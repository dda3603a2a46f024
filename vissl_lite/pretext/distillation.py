"""Distillation: a student learns the similarities that a frozen teacher sees.

Fang, Wang, Wang, Zhang, Yang & Liu 2021, "SEED: Self-supervised Distillation for Visual
Representation", arXiv 2101.04731; Abbasi Koohpayegani, Tejankar & Pirsiavash 2020, "CompRess:
Self-Supervised Learning by Compressing Representations", arXiv 2010.14713. Both compare an image
with a queue of the teacher's embeddings of other images. For feature maps: Liu, Chen, Liu, Qin, Luo
& Wang 2019, "Structured Knowledge Distillation for Semantic Segmentation", arXiv 1903.04197. One
view for both networks, and mixup: Beyer, Zhai, Royer, Markeeva, Anil & Kolesnikov 2022, "Knowledge
Distillation: A Good Teacher Is Patient and Consistent", arXiv 2106.05237. The teacher's embeddings
are centered, as the outputs of DINO's teacher are (Caron et al. 2021, arXiv 2104.14294, eq. 4):
those of a supervised network, which are not negative, are all similar otherwise.
"""

import hashlib
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import save_file
from torch import Tensor, nn

from vissl_lite.data.atomic_file import atomic_write
from vissl_lite.data.stream import Batch, Source
from vissl_lite.data.views import Views
from vissl_lite.encoders.encoder import Encoder, adapt_encoder
from vissl_lite.encoders.folder import encoder_for, read_weights
from vissl_lite.encoders.rescaling import rescale_encoder
from vissl_lite.errors import (
    LARGEST_IMAGE,
    LARGEST_QUEUE,
    UserError,
    check_not_negative,
    check_positive,
    check_sizes,
)
from vissl_lite.inference import run_in_batches
from vissl_lite.optim import OptimizerSettings
from vissl_lite.options import StrPath
from vissl_lite.pretext.base import PretextInfo, PretextTask
from vissl_lite.pretext.modules.crops import distorted_view
from vissl_lite.pretext.modules.losses import Center
from vissl_lite.pretext.modules.queue import Queue
from vissl_lite.run import is_main_process
from vissl_lite.run_folder import is_locked
from vissl_lite.training.progress import progress_bar

log = logging.getLogger(__name__)

# Embeddings of the training images by the teacher, in the run folder until the training ends.
TEACHER = "teacher.safetensors"

# Seconds to wait for these embeddings where no file lock tells whether the main process is alive.
LONGEST_WAIT = 24 * 60 * 60

# Momentum of the mean of the teacher's embeddings, that of DINO's center.
CENTER_MOMENTUM = 0.9

# Feature maps are compared at this side at most: B pairs of h w x h w similarities take memory.
LARGEST_MAP = 16

# Default weight of the loss between feature maps, that of Liu et al. 2019.
MAP_WEIGHT = 10.0


def similarity_distillation(
    student: Tensor, teacher: Tensor, queue: Tensor, temperature: float
) -> Tensor:
    """Divergence of the student's similarities to a queue from the teacher's.

    The similarities of an embedding to the teacher's embedding of the same image and to those in
    the queue, through a softmax, are a distribution over images. The loss is the Kullback-Leibler
    divergence of the student's distribution from the teacher's. SEED (section 3.2;
    ``seed/builder.py``) uses the cross-entropy, whose gradient is the same. One temperature for
    both, and the divergence, are CompRess's (``nn/compress_loss.py``, ``CompReSSA``).

    Args:
        student: ``(B, D)`` embeddings in the teacher's space; need not be normalized.
        teacher: ``(B, D)`` embeddings of the same images, without gradient; need not be normalized.
        queue: ``(Q, D)`` normalized embeddings of other images by the teacher.
        temperature: Softmax temperature, above 0.

    Returns:
        Scalar, the mean over the batch; 0 if both networks agree. Computed in float32.
    """
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = F.normalize(student.float(), dim=1), F.normalize(teacher.float(), dim=1)
        predicted, target = (
            torch.cat([(one * teacher).sum(dim=1, keepdim=True), one @ queue.float().T], dim=1)
            for one in (student, teacher)
        )
        return F.kl_div(
            F.log_softmax(predicted / temperature, dim=1),
            F.log_softmax(target / temperature, dim=1),
            reduction="batchmean",
            log_target=True,
        )


def pairwise_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of the cosine similarities between all positions of two feature maps.

    Pair-wise distillation of Liu et al. 2019 (section 3.2); with a teacher that is an earlier
    student, it is the Gram anchoring of DINOv3 (Siméoni et al. 2025, arXiv 2508.10104), but for a
    constant factor. The teacher's map is resized to the student's, and both to ``LARGEST_MAP``
    positions per side if the student's is larger.

    Args:
        student: ``(B, C, h, w)`` features.
        teacher: ``(B, C', h', w')`` features of the same images, without gradient.

    Returns:
        Scalar, the mean over the batch and over all (h w)^2 pairs of positions. Computed in
        float32.
    """
    with torch.autocast(student.device.type, enabled=False):
        size = [min(side, LARGEST_MAP) for side in student.shape[2:]]
        predicted, target = (
            F.normalize(_resized(one.float(), size).flatten(2), dim=1) for one in (student, teacher)
        )
        return F.mse_loss(predicted.mT @ predicted, target.mT @ target)


def mixup(images: Tensor) -> Tensor:
    """Mix each image of a batch with another one (Zhang et al. 2018, arXiv 1710.09412).

    As the teacher sees the mixed images, too, there are no labels to mix. The proportions are
    uniform in [0, 1], as by Beyer et al. 2022.

    Args:
        images: ``(B, C, H, W)`` floating-point images in random order.

    Returns:
        Images of the same shape.
    """
    share = torch.rand(len(images), 1, 1, 1, device=images.device, dtype=images.dtype)
    return images.roll(1, dims=0).lerp(images, share)


def _resized(maps: Tensor, size: list[int]) -> Tensor:
    """Resize ``(B, C, h, w)`` maps or images, averaging where they shrink."""
    if list(maps.shape[2:]) == size:
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", antialias=True)


class Teacher:
    """A frozen encoder in evaluation mode, with its own image size and normalization.

    It is not a module, and therefore no part of the task that has it: not of its checkpoints (a
    resumed run loads it again), its optimizer or its mode, and neither synchronized nor sharded
    over processes, each of which has all of it.

    Args:
        source: A run, an encoder folder, ``timm:NAME`` or ``random:NAME``. The weights of the last
            depend on the name alone.
        image_size: Side of the images in pixels; None for the encoder's own.
        student: Encoder whose images it sees. The teacher sees their values on the scale of its own
            training, as far as the student's range of values goes; see ``rescale_encoder``. Where
            that is not possible, as with other bands, it is adapted and gets their normalization.

    Raises:
        UserError: If there is no such encoder, or it does not support the size.
    """

    def __init__(self, source: str, image_size: int | None, student: Encoder) -> None:
        with torch.random.fork_rng(devices=[]):  # the student's weights must not depend on it
            torch.manual_seed(0)
            encoder = encoder_for(source, image_size)
            if encoder.reader != student.reader:
                reader = student.reader
                rescaled = rescale_encoder(encoder, reader, "teacher")
                encoder = rescaled or adapt_encoder(encoder, reader, "teacher")
        encoder.to(memory_format=torch.channels_last)
        self.encoder = encoder.eval().requires_grad_(False)

    def see(self, images: Tensor) -> tuple[Encoder, Tensor]:
        """The encoder, on the device of the images, and the images as it takes them.

        Args:
            images: ``(B, C, H, W)`` images of any size and floating-point type, not normalized.
        """
        encoder = self.encoder.to(images.device)
        # Normalized first: values are cut off at full resolution, as in the teacher's training.
        return encoder, _resized(encoder.normalize(images), [encoder.image_size] * 2)

    def embeddings(self, images: Source, progress: Callable[[int], None] | None = None) -> Tensor:
        """Embed the middle of each image once: resized and center-cropped, as in evaluation.

        Args:
            images: N image files.
            progress: Called with the number of images done since the last call.

        Returns:
            ``(N, D)`` float16 normalized embeddings on the CPU; zeros for unreadable images.

        Raises:
            UserError: If no image can be read.
        """
        paths = [images.name(number) for number in range(len(images))]
        found: list[Tensor] = []
        readable = run_in_batches(
            self.encoder,
            lambda batch: [self.encoder(batch)],
            self.encoder,
            paths,
            lambda _, outputs: found.append(F.normalize(outputs[0], dim=1).half()),
            progress,
        )
        embeddings = torch.zeros(len(paths), self.encoder.num_features, dtype=torch.float16)
        embeddings[torch.from_numpy(readable)] = torch.cat(found)
        return embeddings

    @cached_property
    def digest(self) -> str:
        """A digest of its weights, normalization and image size."""
        encoder = self.encoder
        scale, shift = (one.flatten().tolist() for one in (encoder.scale, encoder.shift))
        about = (encoder.backbone, encoder.image_size, scale, shift)
        found = hashlib.sha256(repr(about).encode())
        for name, tensor in encoder.state_dict().items():
            found.update(name.encode())
            found.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()


class Distillation(PretextTask):
    """Match a teacher's similarities between images, and between locations of a feature map.

    Args:
        encoder: Encoder to train, the student.
        teacher: Encoder to learn from, of any backbone: a run, an encoder folder or ``timm:NAME``
            (pre-trained weights). Required. It sees the student's views.
        teacher_size: Side in pixels to which the views are resized for the teacher; default its
            own image size. A smaller one is faster: DINOv2's is 518.
        temperature: Softmax temperature of the similarities to other images (0.04 in the code of
            CompRess; with centered embeddings, two minutes on UC Merced show little difference).
        queue_size: Number of the teacher's latest embeddings that an image is compared with; SEED
            uses 65536 and CompRess 128000, for 1.3 million images.
        map_weight: Weight of the loss between feature maps, the other loss having 1; 0 for the loss
            between images alone. Default: 10, as of Liu et al. 2019, or 0 with ``fixed_views``.
        mixup: Whether images are mixed with one another (Beyer et al. 2022). Default: true, but for
            short runs from random weights and with ``fixed_views``.
        fixed_views: Show the teacher the middle of each image once (resized and center-cropped, as
            in evaluation) before the training, and not every view at every step, as CompRess does
            with cached features. The student's views come from the same central square. Epochs then
            take as long as without a teacher; images cannot be mixed, nor feature maps compared.
        min_crop_scale: Smallest fraction of the image area in a view; with fixed views, of the area
            of the central square. With these, 0.6 and a color of 0.1 are better in few epochs
            (``benchmarks/README.md``, settings of short runs).
        color: Strength of the color distortion; 0.5 is that of MoCo v2, which SEED uses.
    """

    info = PretextInfo(
        name="distillation",
        family="distilling",
        views="1",
        paper="Fang et al. 2021, arXiv 2101.04731",
        use="a good encoder exists, but is too large or of another architecture",
        any_size=True,
        encoders=("teacher",),
        short_run={"mixup": False},
    )
    # SEED trains with SGD for 200 epochs; AdamW learns faster in short runs, as for moco. A third
    # of this rate was better in two epochs on 5,000 images, and worse in 70 on 600.
    optimizer_settings = OptimizerSettings("adamw", lr=6e-3, weight_decay=1e-4, scaling="sqrt")

    def __init__(
        self,
        encoder: Encoder,
        teacher: StrPath | None = None,
        teacher_size: int | None = None,
        temperature: float = 0.1,
        queue_size: int = 4096,
        map_weight: float | None = None,
        mixup: bool | None = None,
        fixed_views: bool = False,
        min_crop_scale: float = 0.2,
        color: float = 0.5,
    ) -> None:
        super().__init__(encoder)
        check_positive("pretext.temperature", temperature)
        check_sizes(LARGEST_QUEUE, queue_size=queue_size)
        check_sizes(LARGEST_IMAGE, teacher_size=teacher_size)
        check_not_negative("pretext.map_weight", map_weight)
        for name, needs_views in (("mixup", mixup), ("map_weight", map_weight)):
            if fixed_views and needs_views:
                raise UserError(
                    f"--pretext.{name} needs a teacher that sees the views: leave out --pretext."
                    f"{name} or --pretext.fixed_views"
                )
        if teacher is None:
            raise UserError(
                "distillation needs a teacher: give --pretext.teacher with a run, an encoder "
                "folder or timm:NAME, such as timm:vit_small_patch14_dinov2.lvd142m"
            )
        self.teacher = Teacher(os.fspath(teacher), teacher_size, encoder)
        features = self.teacher.encoder.num_features
        # Linear, as in CompRess (train_student_one_queue.py): what the teacher knows has to be in
        # the student's own features.
        self.head = nn.Linear(encoder.num_features, features)
        self.queue = Queue(queue_size, features)
        self.center = Center(features, CENTER_MOMENTUM)
        self.temperature = temperature
        self.map_weight = MAP_WEIGHT if map_weight is None else map_weight
        if self.map_weight and not fixed_views:
            for one in (encoder, self.teacher.encoder):
                try:
                    one.map_side()
                except UserError as error:
                    raise UserError(f"{error}: give --pretext.map_weight 0") from None
        self.mixup = mixup is None or mixup
        self.min_crop_scale, self.color = min_crop_scale, color
        self.reads_files = fixed_views
        self._embeddings: Tensor | None = None
        self._embeddings_file: Path | None = None
        self._maps_checked = False

    def views(self, upright: bool = True) -> Views:
        return distorted_view(
            self.encoder.image_size,
            self.min_crop_scale,
            self.color,
            upright,
            central=self.reads_files,  # with fixed views the teacher has seen nothing else
        )

    def loss(self, views: list[Tensor]) -> Tensor:
        view = mixup(views[0]) if self.mixup else views[0]
        # The teacher has its own normalization: undo the student's.
        raw = (view.float() - self.encoder.shift) / self.encoder.scale
        teacher, shown = self.teacher.see(raw)
        if not self.map_weight:
            with torch.no_grad():
                target = teacher(shown)
            return self._global_loss(self.encoder(view), target)
        pooled, student_map = self.encoder.pooled_and_map(view)
        with torch.no_grad():
            target, teacher_map = teacher.pooled_and_map(shown)
        loss = self._global_loss(pooled, target)
        if self._have_positions(view.shape[-1], student_map, teacher_map):
            dense = pairwise_distillation(student_map, teacher_map)
            self.measure("map_loss", dense)
            loss = loss + self.map_weight * dense
        return loss

    def _global_loss(self, pooled: Tensor, target: Tensor) -> Tensor:
        """Loss between images.

        Args:
            pooled: ``(B, D)`` features of the student.
            target: ``(B, D')`` embeddings of the same images by the teacher.
        """
        target, mean = F.normalize(target.float(), dim=1), self.center.mean.float()
        others = F.normalize(self.queue.items.float() - mean, dim=1)
        loss = similarity_distillation(self.head(pooled), target - mean, others, self.temperature)
        self.queue.push(target)
        if self._embeddings is None:  # else the center is the mean over all images
            self.center.update(target, self.batches_per_step)
        return loss

    def prepare(self, images: Source, run: Path) -> None:
        """With ``fixed_views``, embed all images by the teacher, or load what a run has embedded.

        Of several processes the main one embeds, and the others wait for its file.

        Args:
            images: Training images, files.
            run: Run folder, where the embeddings are kept until the training ends.

        Raises:
            UserError: If a resumed run has embeddings of another teacher, if no image can be read,
                or if the main process ends while this one waits for it.
        """
        if not self.reads_files:
            if not torch.cuda.is_available():
                log.info(
                    "The teacher sees the views at every step. With --pretext.fixed_views true it "
                    "sees each image once, before the training, and a run on a CPU trains on more "
                    "images per second"
                )
            return
        file, key = run / TEACHER, f"{self.teacher.digest} {images.digest()}"
        found = self._embed(images, file, key) if is_main_process() else _wait_for(file, key)
        self._embeddings, self._embeddings_file = found, file
        embeddings = found.float()
        self.center.mean.copy_(embeddings[embeddings.any(dim=1)].mean(dim=0))

    def _embed(self, images: Source, file: Path, key: str) -> Tensor:
        """Embed all images and write the embeddings, unless a resumed run has them."""
        # The main process has removed the files of an overwritten run before, so that a file that
        # it finds is of this run. Other processes can't tell.
        kept = read_weights(file) if file.is_file() else {}
        if any(not one.startswith(self.teacher.digest) for one in kept):
            raise _other_teacher()
        if key not in kept:
            log.info("The teacher sees each of the %d images once", len(images))
            with progress_bar() as bar:
                task = bar.add_task("teacher", total=len(images), info="")
                kept = {key: self.teacher.embeddings(images, partial(bar.advance, task))}
            with atomic_write(file) as part:
                save_file(kept, part)
        return kept[key]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self._embeddings is None:
            return super().training_step(batch, batch_idx)
        view = self.encoder.normalize(batch.views[0])
        self._embeddings = self._embeddings.to(view.device)
        loss = self._global_loss(self.encoder(view), self._embeddings[batch.indices])
        self.measure("loss", loss)
        return loss

    def on_train_end(self) -> None:
        if self._embeddings_file is not None and self.global_rank == 0:
            self._embeddings_file.unlink(missing_ok=True)

    def _have_positions(self, side: int, student_map: Tensor, teacher_map: Tensor) -> bool:
        """Whether both maps have several positions to compare; if not at full size, say so once.

        Args:
            side: Side of the views in pixels.
            student_map: ``(B, C, h, w)`` features.
            teacher_map: ``(B, C', h', w')`` features.
        """
        few = [
            f"{encoder.backbone}, the {role}, at {encoder.image_size} pixels"
            for role, encoder, found in (
                ("student", self.encoder, student_map),
                ("teacher", self.teacher.encoder, teacher_map),
            )
            if min(found.shape[2:]) < 2
        ]
        full = side >= self.encoder.image_size  # else of progressive resizing: larger views follow
        if few and full and not self._maps_checked:
            log.warning(
                "distillation: the last feature map of %(backbone)s has fewer than 2x2 positions, "
                "so that feature maps are not compared; give a larger --image_size or another "
                "--backbone or --pretext.teacher, or --pretext.map_weight 0",
                {"backbone": few[0]},
                extra={"code": "pretext.one_location"},
            )
        self._maps_checked |= full
        return not few

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["teacher"] = self.teacher.digest

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint.get("teacher") != self.teacher.digest:
            raise _other_teacher()


def _wait_for(file: Path, key: str) -> Tensor:
    """Wait until the main process has written a tensor; what else is in the file does not count.

    Args:
        file: File in the run folder, which the main process locks from its start to its end.
        key: Name of the tensor.

    Raises:
        UserError: If the main process ends, or, without locks, after ``LONGEST_WAIT``.
    """
    started, was_alive = time.monotonic(), False
    while True:
        alive = is_locked(file.parent)  # asked first: it may write and end in between
        with suppress(UserError):  # a file of an overwritten run is removed while it is read
            kept = read_weights(file) if file.is_file() else {}
            if key in kept:
                return kept[key]
        if was_alive and not alive:
            raise UserError(
                f"the main process ended before it had written {file}: its own message says why"
            )
        was_alive |= alive
        if not was_alive and time.monotonic() - started > LONGEST_WAIT:
            raise UserError(
                f"{file} was not written within {LONGEST_WAIT // 3600} hours: see what the main "
                f"process says, and whether all processes have the same --out"
            )
        time.sleep(1)


def _other_teacher() -> UserError:
    return UserError(
        "the --pretext.teacher is not the one that the run began with: put it back, or start a new "
        "run with --overwrite"
    )
