"""I-JEPA: predict the features of image blocks from those of the context around them.

Assran, Duval, Misra, Bojanowski, Vincent, Rabbat, LeCun & Ballas 2023, "Self-Supervised Learning
from Images with a Joint-Embedding Predictive Architecture", arXiv 2301.08243.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from vissl_lite.data.views import Views
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import LARGEST_DEPTH, UserError, check_share, check_sizes
from vissl_lite.optim import OptimizerSettings
from vissl_lite.pretext.base import PretextInfo, PretextTask
from vissl_lite.pretext.modules.crops import cropped_views
from vissl_lite.pretext.modules.ema import ema_update, make_teacher
from vissl_lite.pretext.modules.masking import (
    PatchPredictor,
    check_patches,
    encode_visible,
    gather_tokens,
    indices_to_mask,
    narrow_width,
)

Range = tuple[float, float]


def uniform(bounds: Range) -> float:
    """Draw a number uniformly from a range."""
    low, high = bounds
    return low + (high - low) * float(torch.rand(()))


def block_size(side: int, scale: float, aspect: float, largest: int) -> tuple[int, int]:
    """Number of rows and columns of a block of patches, each between 1 and ``largest``.

    Args:
        side: Number of patches along an edge of the image.
        scale: Area of the block as a fraction of the image area.
        aspect: Aspect ratio of the block, height divided by width.
        largest: Largest number of rows or columns.
    """
    area = scale * side * side
    rows, columns = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
    return min(max(rows, 1), largest), min(max(columns, 1), largest)


def place_blocks(
    batch: int, count: int, side: int, size: tuple[int, int], device: torch.device
) -> Tensor:
    """Draw random positions of blocks of a given size.

    Args:
        batch: B, number of images.
        count: T, number of blocks per image.
        side: Number of patches along an edge of the image.
        size: Number of rows and columns of a block.
        device: Device to draw on.

    Returns:
        ``(B, T, rows * columns)`` indices of patches.
    """
    rows, columns = size
    top = torch.randint(side - rows + 1, (batch, count, 1, 1), device=device)
    left = torch.randint(side - columns + 1, (batch, count, 1, 1), device=device)
    down = top + torch.arange(rows, device=device)[:, None]
    along = left + torch.arange(columns, device=device)
    return (down * side + along).flatten(2)


def draw_context(context: Tensor, targets: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Remove the targets from the context block, keeping a minimum context.

    On a small grid, the targets may cover the whole context. At least a quarter of the patches is
    kept as context: a target that would leave fewer is replaced by the first one. (The authors'
    code keeps 10 patches of 256 by letting the context overlap with targets.) The first target is
    always used; if it covers the context block, all other patches become the context.

    All contexts of a batch are reduced to the size of the smallest by dropping random patches.

    Args:
        context: ``(B, N)`` bool, true in the context block.
        targets: ``(B, T, K)`` indices of patches; no block covers the whole image.
        side: Number of patches along an edge of the image.

    Returns:
        ``(B, K')`` indices of context patches, at least one, and the targets, some replaced.
    """
    min_context = max(1, side * side // 4)
    first = indices_to_mask(targets[:, 0], side * side)
    remaining = context & ~first
    remaining = torch.where(remaining.any(dim=1, keepdim=True), remaining, ~first)
    kept = [targets[:, 0]]
    for block in targets.unbind(1)[1:]:
        reduced = remaining & ~indices_to_mask(block, side * side)
        fits = reduced.sum(dim=1, keepdim=True) >= min_context
        remaining = torch.where(fits, reduced, remaining)
        kept.append(torch.where(fits, block, targets[:, 0]))
    smallest = int(remaining.sum(dim=1).min())
    # Context patches come first, in random order.
    order = torch.rand(remaining.shape, device=remaining.device, dtype=torch.float32) + ~remaining
    return order.argsort(dim=1)[:, :smallest], torch.stack(kept, dim=1)


class IJEPA(PretextTask):
    """I-JEPA.

    A run saves the target encoder, which the paper evaluates. The paper's ViT has neither class nor
    register tokens, and its features are the mean over the patches. If the encoder has such tokens,
    they are inputs of the predictor, and are trained through attention only.

    The default learning rate is for runs of minutes to hours; with ``--epochs`` it falls with the
    length of the run to the paper's (``--base_lr 1.25e-4``). For ImageNet see
    ``configs/imagenet/ijepa.yaml``. Weights of the encoder are initialized as by timm, those of the
    predictor as MAE's decoder; the authors' code rescales those of residual branches in both. This
    was not measured.

    Blocks differ from those of the authors' code in details that the paper does not have: there,
    one random number gives both the scale and the aspect ratio of a target, no block touches the
    last row or column, and contexts are cut to equal length at their end instead of at random
    patches. A context block may also span the whole image here, since on grids of 4 to 8 patches
    a fifth to a third of the context would be lost otherwise.

    Args:
        encoder: Encoder to train; a plain ViT.
        targets: Number of blocks to predict in each image (section 3).
        target_scale: Smallest and largest fraction of the image area in a target (section 3); one
            size is drawn per batch, as in the authors' code.
        target_aspect: Smallest and largest aspect ratio of a target, height divided by width
            (section 3).
        context_scale: Smallest and largest fraction of the image area in the context block, before
            the targets are removed from it (section 3).
        momentum: Initial momentum of the target encoder; increases linearly to 1 over the run
            (appendix A.1). In runs of a few hundred steps, the target encoder hardly changes with
            the paper's 0.996 (after 300 steps, over half of the initial weights remain): use a
            lower value there.
        predictor_width: Width of the predictor, a multiple of 32; default half of the encoder's
            width, as the paper's 384 for 768 of ViT-B (appendix A.1).
        predictor_depth: Number of blocks of the predictor; default half of the encoder's blocks,
            as the paper's 6 for 12 of ViT-B, or a quarter below the width of ViT-S (384), because
            the predictor runs once per target.
        min_crop_scale: Smallest fraction of the image area in a view; 0.3 as in the authors' code
            (configs). That does not flip views; here they are flipped as in the other pretexts,
            which was not measured.
    """

    info = PretextInfo(
        name="ijepa",
        family="masked",
        views="1",
        paper="Assran et al. 2023, arXiv 2301.08243",
        use="ViTs, where color and texture must not be distorted; needs long runs",
        backbones="ViT",
        fixed_positions=True,
        long_run_lr=0.125,
    )
    # The paper uses 1e-3 for batches of 2048 and 600 epochs of ImageNet (appendix A.1), as we do in
    # runs of that kind.
    optimizer_settings = OptimizerSettings(
        "adamw", lr=1e-3, weight_decay=0.04, scaling="linear", weight_decay_end=0.4
    )

    def __init__(
        self,
        encoder: Encoder,
        targets: int = 4,
        target_scale: Range = (0.15, 0.2),
        target_aspect: Range = (0.75, 1.5),
        context_scale: Range = (0.85, 1.0),
        momentum: float = 0.996,
        predictor_width: int | None = None,
        predictor_depth: int | None = None,
        min_crop_scale: float = 0.3,
    ) -> None:
        super().__init__(encoder)
        encoder.freeze_after_map()
        patch = check_patches(self.info, encoder)
        check_sizes(LARGEST_DEPTH, targets=targets, predictor_depth=predictor_depth)
        check_sizes(predictor_width=predictor_width)
        _check_range("target_scale", target_scale, 1.0)
        _check_range("target_aspect", target_aspect, float("inf"))
        _check_range("context_scale", context_scale, 1.0)
        check_share("pretext.momentum", momentum)
        self.side = encoder.image_size // patch
        features, depth = encoder.map_features, len(encoder.model.blocks)
        self.predictor = PatchPredictor(
            features,
            self.side,
            width=predictor_width or narrow_width(features, 1 / 2),
            depth=predictor_depth or max(1, depth // (4 if features < 384 else 2)),
            outputs=features,
        )
        self.target_encoder = make_teacher(encoder)
        self.count, self.momentum = targets, momentum
        self.target_scale, self.target_aspect = target_scale, target_aspect
        self.context_scale = context_scale
        self.min_crop_scale = min_crop_scale

    def views(self, upright: bool = True) -> Views:
        return cropped_views(self.encoder.image_size, self.min_crop_scale, upright)

    def loss(self, views: list[Tensor]) -> Tensor:
        images = views[0]
        # Drawn on the CPU: the sizes of blocks are shapes, and reading them would synchronize with
        # a GPU at each step.
        blocks = self.draw_blocks(len(images), torch.device("cpu"))
        context, targets = (block.to(images.device, non_blocking=True) for block in blocks)
        # Smooth L1 as in the authors' code; the paper uses the squared distance (section 3).
        return F.smooth_l1_loss(
            self.predict(images, context, targets).float(), self.features(images, targets)
        )

    def draw_blocks(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Draw the patches of each image's context and targets (section 3).

        Args:
            batch: B, number of images.
            device: Device to draw on.

        Returns:
            ``(B, K)`` indices of context patches and ``(B, T, K')`` of target patches; no target
            overlaps with the context.
        """
        side = self.side
        scale, aspect = uniform(self.target_scale), uniform(self.target_aspect)
        size = block_size(side, scale, aspect, largest=side - 1)
        targets = place_blocks(batch, self.count, side, size, device)
        size = block_size(side, uniform(self.context_scale), 1.0, largest=side)
        context = place_blocks(batch, 1, side, size, device)[:, 0]
        return draw_context(indices_to_mask(context, side * side), targets, side)

    def predict(self, images: Tensor, context: Tensor, targets: Tensor) -> Tensor:
        """Predict the features of each target independently from the context.

        Args:
            images: ``(B, C, S, S)`` normalized images.
            context: ``(B, K)`` indices of context patches.
            targets: ``(B, T, K')`` indices of target patches.

        Returns:
            ``(B, T, K', D)`` predicted features.
        """
        prefix, tokens = encode_visible(self.encoder, images, context)
        times = targets.shape[1]
        predicted: Tensor = self.predictor(
            prefix.repeat_interleave(times, dim=0),
            tokens.repeat_interleave(times, dim=0),
            context.repeat_interleave(times, dim=0),
            targets.flatten(0, 1),
        )
        return predicted.unflatten(0, (-1, times))

    @torch.no_grad()
    def features(self, images: Tensor, targets: Tensor) -> Tensor:
        """Compute the features of the targets with the target encoder on the full image.

        Args:
            images: ``(B, C, S, S)`` normalized images.
            targets: ``(B, T, K')`` indices of target patches.

        Returns:
            ``(B, T, K', D)`` float32 features, normalized over D as in the authors' code.
        """
        model = self.target_encoder.model
        tokens = model.forward_features(images)[:, model.num_prefix_tokens :].float()
        tokens = F.layer_norm(tokens, tokens.shape[-1:])
        return gather_tokens(tokens, targets.flatten(1)).unflatten(1, targets.shape[1:])

    def after_step(self) -> None:
        momentum = self.momentum + (1 - self.momentum) * self.progress
        ema_update(self.target_encoder, self.encoder, momentum)

    def trained_encoder(self) -> Encoder:
        return self.target_encoder


def _check_range(name: str, values: Range, largest: float) -> None:
    if not 0 < values[0] <= values[1] <= largest:
        limit = f" and at most {largest:g}" if largest < float("inf") else ""
        raise UserError(
            f"--pretext.{name} {list(values)} is not a range: give two numbers, the smaller one "
            f"first, above 0{limit}"
        )
