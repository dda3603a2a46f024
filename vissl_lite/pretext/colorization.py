"""Colorization: predict the colors of an image from its lightness.

Zhang, Isola & Efros 2016, "Colorful Image Colorization", arXiv 1603.08511.
"""

import logging
from functools import lru_cache

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from vissl_lite.data.views import Views
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import UserError
from vissl_lite.optim import OptimizerSettings
from vissl_lite.pretext.base import PretextInfo, PretextTask, Visualization
from vissl_lite.pretext.modules.crops import cropped_views
from vissl_lite.pretext.modules.heads import MapDecoder
from vissl_lite.pretext.modules.visualization import picture_rows
from vissl_lite.training.processes import world

log = logging.getLogger(__name__)

# Bin size of the grid in the ab plane, and largest absolute value of a and b (section 2.1).
BIN_SIZE, AB_LIMIT = 10, 110

# Number of nearest bins that encode a color, and standard deviation of the Gaussian that weights
# them (section 2.1), which also smooths the distribution of colors (section 2.2).
NUM_NEAREST, SIGMA = 5, 5.0

# Temperature of the annealed mean: interpolates between the mode of a predicted distribution, which
# is vivid, and its mean, which is smooth (section 2.3, eq. 5).
TEMPERATURE = 0.38

# Number of batches that measure the mean chroma of the images, and the chroma below which a warning
# says that they are gray. Chroma is the distance from gray in the ab plane: 105 for pure red.
CHROMA_BATCHES, MIN_CHROMA = 20, 2.0

# IEC 61966-2-1: linear sRGB to XYZ. The row sums are the white point (D65).
RGB_TO_XYZ = (
    (0.4124564, 0.3575761, 0.1804375),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339, 0.1191920, 0.9503041),
)


def rgb_to_lab(rgb: Tensor) -> Tensor:
    """Convert sRGB to CIE Lab (D65).

    Args:
        rgb: ``(N, 3, ...)``, in [0, 1].

    Returns:
        ``(N, 3, ...)``: lightness in [0, 100], then a and b, about -110 to 100.
    """
    is_linear = rgb <= 0.04045
    red, green, blue = torch.where(is_linear, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4).unbind(1)
    delta = 6 / 29
    roots = []
    for r, g, b in RGB_TO_XYZ:  # Not a matrix product, which autocast would round.
        value = (r * red + g * green + b * blue) / (r + g + b)
        root = value.clamp(min=delta**3) ** (1 / 3)
        roots.append(torch.where(value > delta**3, root, value / (3 * delta**2) + 4 / 29))
    x, y, z = roots
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def lab_to_rgb(lab: Tensor) -> Tensor:
    """Convert CIE Lab to sRGB; the inverse of ``rgb_to_lab``.

    Args:
        lab: ``(N, 3, ...)``.

    Returns:
        ``(N, 3, ...)`` in [0, 1]; colors outside of sRGB are clipped.
    """
    lightness, a, b = lab.unbind(1)
    y = (lightness + 16) / 116
    delta = 6 / 29
    xyz = [
        torch.where(root > delta, root**3, 3 * delta**2 * (root - 4 / 29)) * sum(white)
        for root, white in zip((y + a / 500, y, y - b / 200), RGB_TO_XYZ, strict=True)
    ]
    inverse = torch.linalg.inv(torch.tensor(RGB_TO_XYZ, dtype=torch.float64)).tolist()
    linear = torch.stack([r * xyz[0] + g * xyz[1] + b * xyz[2] for r, g, b in inverse], dim=1)
    curved = 1.055 * linear.clamp(min=0.0031308) ** (1 / 2.4) - 0.055
    return torch.where(linear <= 0.0031308, 12.92 * linear, curved).clamp(0, 1)


@lru_cache(maxsize=1)
def gamut_bins() -> Tensor:
    """Bins of the ab plane that contain sRGB colors (section 2.1): 261 of 529.

    The paper uses a list of 313 bins that extends beyond sRGB. These are the bins of all 8-bit
    colors; further ones would be unused outputs. The surface of the RGB cube suffices, because a
    line along the lightness leaves the cube through it. So does every third level, because all 256
    give the same bins.

    Returns:
        ``(261, 2)`` float32 centers, multiples of 10. Cached: do not modify in place.
    """
    level = torch.arange(0, 256, 3, dtype=torch.float64) / 255
    u, v = torch.cartesian_prod(level, level).unbind(1)
    faces = []
    for end in (torch.zeros_like(u), torch.ones_like(u)):
        faces += [(end, u, v), (u, end, v), (u, v, end)]
    surface = torch.cat([torch.stack(face, dim=1) for face in faces])
    bins = (rgb_to_lab(surface)[:, 1:] / BIN_SIZE).round().unique(dim=0) * BIN_SIZE
    return bins.float()


def grid_index(colors: Tensor) -> Tensor:
    """Index of the grid cell of a color, inside or outside of the gamut.

    Args:
        colors: ``(N, 2)``, a and b.

    Returns:
        ``(N,)`` int64 indices.
    """
    last = AB_LIMIT // BIN_SIZE
    a, b = (colors / BIN_SIZE).round().long().clamp(-last, last).unbind(1)
    return (a + last) * (2 * last + 1) + b + last


def candidate_bins(bins: Tensor) -> Tensor:
    """For each cell of the grid, bins that include the five nearest bins of all colors in it.

    Comparing a color with these 22 instead of all 261 bins makes the encoding ten times as fast.
    The distance of a color to the center of its cell is at most h, half a diagonal. Therefore the
    distance of its five nearest bins to the center exceeds that of the center's fifth nearest bin
    by at most 2 h.

    Args:
        bins: ``(Q, 2)`` centers.

    Returns:
        ``(529, K)`` int64.
    """
    side = torch.arange(-AB_LIMIT, AB_LIMIT + 1, BIN_SIZE, device=bins.device, dtype=bins.dtype)
    distance = torch.cdist(torch.cartesian_prod(side, side), bins)
    ordered, order = distance.sort(dim=1, stable=True)
    limit = ordered[:, NUM_NEAREST - 1 : NUM_NEAREST] + BIN_SIZE * 2**0.5 + 1e-3
    return order[:, : int((ordered <= limit).sum(dim=1).max())]


def soft_encode(colors: Tensor, bins: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Encode each color as a distribution over its five nearest bins (section 2.1).

    Args:
        colors: ``(N, 2)``, a and b.
        bins: ``(Q, 2)`` bin centers.
        candidates: Result of ``candidate_bins``.

    Returns:
        ``(N, 5)`` indices of bins, the nearest first, and their ``(N, 5)`` weights of sum 1.
    """
    nearby = candidates[grid_index(colors)]
    distance = (bins[nearby] - colors[:, None]).square().sum(dim=2)
    distance, order = distance.topk(NUM_NEAREST, largest=False)
    return nearby.gather(1, order), F.softmax(-distance / (2 * SIGMA**2), dim=1)


def smoothing_matrix(bins: Tensor) -> Tensor:
    """Matrix that smooths a distribution over bins by a Gaussian in the ab plane (section 2.2).

    Args:
        bins: ``(Q, 2)`` bin centers.

    Returns:
        ``(Q, Q)`` matrix whose columns sum to 1, which preserves the sum of a distribution.
    """
    difference = bins[:, None] - bins[None]
    kernel = torch.exp(-difference.square().sum(dim=2) / (2 * SIGMA**2))
    return kernel / kernel.sum(dim=0)


def rarity_weights(counts: Tensor, smoothing: Tensor, uniform: float) -> Tensor:
    """Class weights that emphasize rare colors (eq. 4).

    w is proportional to ((1 - lambda) p + lambda / Q)^-1 for the smoothed distribution p, and its
    expectation under p is 1.

    Args:
        counts: ``(Q,)`` number of pixels per bin.
        smoothing: Result of ``smoothing_matrix``.
        uniform: Lambda, in [0, 1]; 1 gives equal weights.

    Returns:
        ``(Q,)`` float32 weights.
    """
    counts = counts.float()
    frequency = (smoothing * (counts / counts.sum())).sum(dim=1)
    weights = 1 / ((1 - uniform) * frequency + uniform / len(counts))
    return weights / (frequency * weights).sum()


def color_cross_entropy(logits: Tensor, nearest: Tensor, shares: Tensor, rarity: Tensor) -> Tensor:
    """Cross-entropy of soft-encoded colors, each pixel weighted by its nearest bin (eq. 2, 3).

    Args:
        logits: ``(N, Q)`` logits of the bins.
        nearest: ``(N, 5)`` indices of bins, the nearest first.
        shares: ``(N, 5)`` target probabilities of these bins.
        rarity: ``(Q,)`` weights of the bins.

    Returns:
        Scalar, the mean over pixels; the paper uses the sum. Computed in float32.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.float()
        # As the shares sum to 1, the log-probabilities of all Q bins are not needed.
        entropy = logits.logsumexp(dim=1) - (shares * logits.gather(1, nearest)).sum(dim=1)
        return (rarity[nearest[:, 0]] * entropy).mean()


def annealed_mean(logits: Tensor, bins: Tensor) -> Tensor:
    """Point estimate of the color from a predicted distribution (section 2.3, eq. 5).

    Args:
        logits: ``(B, Q, h, w)`` logits of the bins.
        bins: ``(Q, 2)`` bin centers.

    Returns:
        ``(B, 2, h, w)``, a and b, computed in float32.
    """
    with torch.autocast(logits.device.type, enabled=False):
        shares = F.softmax(logits.float() / TEMPERATURE, dim=1)
        return torch.einsum("bqhw,qc->bchw", shares, bins)


class Colorization(PretextTask):
    """Colorization by classification, with rebalanced rare colors.

    The input of the encoder is the lightness, repeated in three channels, so that the trained
    encoder takes RGB images; it learns nothing about color. A small decoder predicts the
    distribution of colors at a quarter of the resolution (56 of 224, as in the paper). The
    frequency of colors is counted on the training images during training; the paper counts it on
    ImageNet beforehand.

    Args:
        encoder: Encoder to train; takes images of three channels.
        uniform: Lambda of the color weights: 1 weights all colors equally, 0 by their rarity alone
            (section 2.2).
        decoder_width: Number of channels of the decoder.
        min_crop_scale: Smallest fraction of the image area in a view.
    """

    info = PretextInfo(
        name="colorization",
        family="predictive",
        views="1",
        paper="Zhang et al. 2016, arXiv 1603.08511",
        use="color photographs; its encoder sees gray ones, and learns nothing about color",
    )
    # Adam as in the paper, with decoupled weight decay and a higher learning rate for short runs.
    optimizer_settings = OptimizerSettings("adamw", lr=1e-3, weight_decay=1e-4, scaling="sqrt")

    def __init__(
        self,
        encoder: Encoder,
        uniform: float = 0.5,
        decoder_width: int = 128,
        min_crop_scale: float = 0.3,
    ) -> None:
        super().__init__(encoder)
        if encoder.reader.bands is not None:
            raise UserError(
                "the pretext colorization needs photographs of 8-bit color, and these images have "
                "bands: take another one, such as simclr, mae or spark"
            )
        if not 0 < uniform <= 1:
            raise UserError(f"--pretext.uniform {uniform} is not a share above 0, at most 1")
        bins = gamut_bins().clone()
        self.decoder = MapDecoder(encoder, len(bins), decoder_width)
        self.bins: Tensor
        self.candidates: Tensor
        self.smoothing: Tensor
        self.register_buffer("bins", bins, persistent=False)
        self.register_buffer("candidates", candidate_bins(bins), persistent=False)
        self.register_buffer("smoothing", smoothing_matrix(bins), persistent=False)
        # Color statistics of the training images, part of checkpoints.
        self.counts: Tensor
        self.chroma: Tensor
        self.looked: Tensor
        self.register_buffer("counts", torch.ones(len(bins), dtype=torch.long))
        self.register_buffer("chroma", torch.tensor(0.0))
        self.register_buffer("looked", torch.tensor(0))
        self.uniform, self.min_crop_scale = uniform, min_crop_scale

    def views(self, upright: bool = True) -> Views:
        return cropped_views(self.encoder.image_size, self.min_crop_scale, upright)

    @torch.no_grad()
    def split(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Split images into the input of the encoder and the target.

        Args:
            images: ``(B, 3, S, S)`` normalized images.

        Returns:
            ``(B, 3, S, S)`` lightness as normalized gray images, and ``(B, 2, s, s)`` a and b,
            averaged to a quarter of the resolution.
        """
        scale, shift = self.encoder.scale, self.encoder.shift
        lab = rgb_to_lab(((images - shift) / (255 * scale)).clamp(0, 1))
        gray = lab[:, :1] / 100 * (255 * scale) + shift
        gray = gray.contiguous(memory_format=torch.channels_last)
        return gray, F.adaptive_avg_pool2d(lab[:, 1:], MapDecoder.size(images))

    @torch.no_grad()
    def count_colors(self, colors: Tensor, nearest: Tensor) -> None:
        """Count the colors of a batch; warn once if the first batches are almost gray.

        Args:
            colors: ``(N, 2)``, a and b.
            nearest: ``(N,)`` indices of the nearest bins.
        """
        counts = torch.bincount(nearest, minlength=len(self.counts))
        if world()[1] > 1:
            dist.all_reduce(counts)
        self.counts += counts
        if self.looked == CHROMA_BATCHES:
            return
        self.looked += 1
        self.chroma += colors.norm(dim=1).mean() / CHROMA_BATCHES
        if self.looked == CHROMA_BATCHES and self.chroma < MIN_CHROMA:
            log.warning(
                "the images are gray, or nearly so: their mean chroma is %(chroma).1f (pure red: "
                "105). Colorization can't learn from them; try another pretext, such as simclr.",
                {"chroma": float(self.chroma)},
                extra={"code": "pretext.gray_images"},
            )

    def predict(self, gray: Tensor) -> Tensor:
        """Predict the distribution of colors at a quarter of the resolution.

        Args:
            gray: ``(B, 3, S, S)`` lightness as normalized gray images.

        Returns:
            ``(B, Q, s, s)`` logits of the bins.
        """
        return self.decoder(*self.encoder.pooled_and_map(gray), MapDecoder.size(gray))

    def loss(self, views: list[Tensor]) -> Tensor:
        gray, target = self.split(views[0])
        colors = target.permute(0, 2, 3, 1).reshape(-1, 2)
        nearest, shares = soft_encode(colors, self.bins, self.candidates)
        self.count_colors(colors, nearest[:, 0])
        rarity = rarity_weights(self.counts, self.smoothing, self.uniform)
        logits = self.predict(gray).permute(0, 2, 3, 1).flatten(0, 2)
        return color_cross_entropy(logits, nearest, shares, rarity)

    def visualize(self, views: list[Tensor]) -> Visualization:
        scale, shift = 255 * self.encoder.scale, self.encoder.shift
        gray, _ = self.split(views[0])
        colors = annealed_mean(self.predict(gray), self.bins)
        colors = F.interpolate(colors, gray.shape[2:], mode="bilinear", align_corners=False)
        lightness = 100 * ((gray - shift) / scale)[:, :1]
        colorized = lab_to_rgb(torch.cat([lightness, colors], dim=1)) * scale + shift
        rows = picture_rows(self.encoder, gray, colorized, views[0])
        return Visualization(("gray", "predicted colors", "truth"), rows)
