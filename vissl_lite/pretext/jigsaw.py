"""Jigsaw: predict the permutation by which nine tiles of an image were shuffled.

Noroozi & Favaro 2016, "Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles",
arXiv 1603.09246.
"""

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from vissl_lite.data.views import Views, crop_decode_size, flip, gray, random_crop
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import UserError, check_share, check_sizes
from vissl_lite.optim import OptimizerSettings
from vissl_lite.plots import Picture
from vissl_lite.pretext.base import PretextInfo, PretextTask, Visualization
from vissl_lite.pretext.modules.chance_monitor import ChanceMonitor
from vissl_lite.pretext.modules.heads import ProjectionHead
from vissl_lite.pretext.modules.patches import GRID_ROWS, NUM_PATCHES, Grid, patch_side
from vissl_lite.pretext.modules.visualization import to_pixels

# Number of puzzles per image. They are cheap, because features are shuffled instead of tiles.
SHUFFLES_PER_IMAGE = 4

# Lower bound of the standard deviation that normalizes a tile, so that noise is not amplified.
MIN_TILE_STD = 0.01

# Initial standard deviation of the weights of the last layer; small, to start at chance level.
LAST_LAYER_STD = 0.01

# Largest set of permutations in the paper; the time to choose them grows with their number.
MAX_PERMUTATIONS = 1000


def jigsaw_views(size: int, min_crop_scale: float, gray_share: float, upright: bool) -> Views:
    """One randomly cropped and flipped view, sometimes gray; the loss cuts it into tiles.

    Args:
        size: Side of the view in pixels.
        min_crop_scale: Smallest fraction of the image area in the view.
        gray_share: Probability of converting to gray.
        upright: Whether the images have a natural orientation.
    """
    one = [random_crop(size, min_crop_scale), flip(upright), gray(gray_share)]
    return Views([one], shortest=crop_decode_size(size, min_crop_scale))


def all_permutations(tiles: int) -> np.ndarray:
    """All permutations in lexicographic order.

    Args:
        tiles: Number of elements to permute; up to about ten.

    Returns:
        ``(tiles!, tiles)`` uint8.
    """
    if tiles == 0:
        return np.zeros((1, 0), np.uint8)
    rest = all_permutations(tiles - 1)
    parts = []
    for first in range(tiles):
        first_column = np.full((len(rest), 1), first, np.uint8)
        parts.append(np.hstack([first_column, rest + (rest >= first)]))
    return np.vstack(parts)


@lru_cache(maxsize=4)
def distant_permutations(tiles: int, count: int, seed: int = 0) -> np.ndarray:
    """Permutations that are far apart in Hamming distance (algorithm 1).

    The first is drawn at random; each further one maximizes the sum of distances to those before
    it. The paper does not specify how to break ties: here, by the largest distance to the nearest
    chosen one, which avoids near-duplicates, then by lexicographic order.

    Args:
        tiles: Number of tiles of a puzzle.
        count: Number of permutations, at most ``tiles!``.
        seed: Seed of the first permutation. Part of the task's definition, not of a run.

    Returns:
        ``(count, tiles)`` uint8; read-only.
    """
    candidates = np.ascontiguousarray(all_permutations(tiles).T)
    total = np.zeros(candidates.shape[1], np.int32)
    nearest = np.full(candidates.shape[1], tiles, np.uint8)
    chosen = [int(np.random.default_rng(seed).integers(len(total)))]
    while len(chosen) < count:
        distance = np.zeros(len(total), np.uint8)
        for column, tile in zip(candidates, candidates[:, chosen[-1]], strict=True):
            distance += column != tile
        total += distance
        np.minimum(nearest, distance, out=nearest)
        total[chosen[-1]] = np.iinfo(np.int32).min // 2  # Do not choose it again.
        best = np.flatnonzero(total == total.max())
        chosen.append(int(best[nearest[best].argmax()]))
    found = np.ascontiguousarray(candidates[:, chosen].T)
    found.flags.writeable = False
    return found


def normalize_tiles(tiles: Tensor) -> Tensor:
    """Normalize each channel of each tile to mean 0 and standard deviation 1.

    Neighboring tiles have similar brightness and contrast, which would be a shortcut (low-level
    statistics in the paper).

    Args:
        tiles: ``(N, C, S, S)`` tiles.

    Returns:
        Tensor of the same shape. Tiles without contrast stay flat.
    """
    deviation, mean = torch.std_mean(tiles, dim=(2, 3), keepdim=True)
    return (tiles - mean) / deviation.clamp(min=MIN_TILE_STD)


def shuffle(tiles: Tensor, permutations: Tensor) -> Tensor:
    """Permute the tiles of each image, or their features.

    Args:
        tiles: ``(B, 9, ...)`` tiles or features.
        permutations: ``(B, 9)`` int64 index of the tile at each position.

    Returns:
        Tensor of the same shape as ``tiles``.
    """
    return tiles[torch.arange(len(tiles), device=tiles.device)[:, None], permutations]


def join_tiles(tiles: np.ndarray) -> np.ndarray:
    """Arrange nine tiles in a picture, separated by white lines.

    Args:
        tiles: ``(9, S, S, 3)`` uint8, in reading order.

    Returns:
        ``(H, H, 3)`` uint8.
    """
    line = max(1, tiles.shape[1] // 16)
    framed = np.pad(tiles, ((0, 0), (0, line), (0, line), (0, 0)), constant_values=255)
    side = framed.shape[1]
    laid = framed.reshape(GRID_ROWS, GRID_ROWS, side, side, 3).transpose(0, 2, 1, 3, 4)
    return laid.reshape(GRID_ROWS * side, GRID_ROWS * side, 3)[:-line, :-line]


class Jigsaw(PretextTask):
    """Jigsaw puzzles.

    The encoder processes the nine tiles independently (the paper's context-free network).
    Therefore their features are shuffled instead of the tiles, which is equivalent and cheaper.

    Shortcuts are prevented as in the paper: gaps between tiles hide lines that cross a border, and
    normalizing each channel of each tile hides brightness, contrast and tint. Chromatic aberration
    of the lens grows towards the image borders and survives the normalization; gray images, which
    have none, keep the encoder from relying on it. The paper also shifts the channels of color
    images by up to two pixels, which is omitted here.

    Args:
        encoder: Encoder to train.
        permutations: Number of permutations to distinguish. The paper finds 1000 best on ImageNet;
            100 is easier on small data sets.
        tile_size: Side of a tile in pixels; default a size that the encoder supports near 2/7 of
            its image size, at least 16: 64 at 224 as in the paper.
        cell_size: Side in pixels of the cell in which a tile is placed at random; default 75/64 of
            the tile as in the paper, for a gap of 11/64 of a tile on average.
        tile_features: Number of features per tile after a shared linear layer; 512 in the paper
            (fc6), for a million images.
        hidden_size: Hidden size of the head on all nine tiles; 4096 in the paper (fc7).
        gray: Fraction of the images converted to gray; 0.3 in the paper.
        min_crop_scale: Smallest fraction of the image area in the view that is cut into tiles; the
            paper crops 225^2 pixels of an image with a shorter side of 256.
    """

    info = PretextInfo(
        name="jigsaw",
        family="predictive",
        views="1",
        paper="Noroozi & Favaro 2016, arXiv 1603.09246",
        use="photographs of objects with parts; learns their spatial arrangement",
    )
    # The paper trains with SGD for days on ImageNet; AdamW suits short runs.
    optimizer_settings = OptimizerSettings("adamw", lr=1e-3, weight_decay=1e-4, scaling="sqrt")

    def __init__(
        self,
        encoder: Encoder,
        permutations: int = 100,
        tile_size: int | None = None,
        cell_size: int | None = None,
        tile_features: int = 128,
        hidden_size: int = 512,
        gray: float = 0.3,
        min_crop_scale: float = 0.5,
    ) -> None:
        super().__init__(encoder)
        if not 2 <= permutations <= MAX_PERMUTATIONS:
            raise UserError(
                f"--pretext.permutations {permutations} must be from 2 to {MAX_PERMUTATIONS}, "
                "the largest set in the paper"
            )
        check_share("pretext.gray", gray)
        check_sizes(tile_features=tile_features, hidden_size=hidden_size)
        share = max(2 / 7, 16 / encoder.image_size)
        tile = patch_side(encoder, tile_size, share, "tile_size")
        cell = round(tile * 75 / 64) if cell_size is None else cell_size
        if cell < tile:
            raise UserError(
                f"--pretext.cell_size {cell} can't hold tiles of {tile} pixels: give {tile} or more"
            )
        self.grid = Grid(tile, step=cell, slack=cell - tile)
        self.reduce = nn.Linear(encoder.num_features, tile_features)
        self.head = ProjectionHead(NUM_PATCHES * tile_features, hidden_size, permutations)
        last = self.head[-1]
        assert isinstance(last, nn.Linear)
        nn.init.normal_(last.weight, std=LAST_LAYER_STD)
        nn.init.zeros_(last.bias)
        self.signal = ChanceMonitor("jigsaw", chance=1 / permutations)
        self.permutations: Tensor
        orders = torch.from_numpy(distant_permutations(NUM_PATCHES, permutations).astype(np.int64))
        self.register_buffer("permutations", orders, persistent=False)
        self.gray, self.min_crop_scale = gray, min_crop_scale

    def views(self, upright: bool = True) -> Views:
        return jigsaw_views(self.grid.image_size, self.min_crop_scale, self.gray, upright)

    def tiles(self, images: Tensor) -> Tensor:
        """Cut nine tiles out of each image and normalize each of them.

        Args:
            images: ``(B, C, S, S)`` normalized images.

        Returns:
            ``(9 B, C, side, side)`` tiles, image by image, each in reading order.
        """
        return normalize_tiles(self.grid.cut(images))

    def features(self, tiles: Tensor) -> Tensor:
        """Encode tiles: ``(9 B, C, side, side)`` to ``(B, 9, tile_features)``."""
        return self.reduce(self.encoder(tiles)).unflatten(0, (-1, NUM_PATCHES))

    def predict(self, features: Tensor, labels: Tensor) -> Tensor:
        """Shuffle features and predict the permutation.

        Args:
            features: ``(B, 9, tile_features)`` features of the tiles in reading order.
            labels: ``(B,)`` indices of permutations.

        Returns:
            ``(B, permutations)`` logits in float32.
        """
        return self.head(shuffle(features, self.permutations[labels]).flatten(1)).float()

    def loss(self, views: list[Tensor]) -> Tensor:
        features = self.features(self.tiles(views[0])).repeat(SHUFFLES_PER_IMAGE, 1, 1)
        labels = torch.randint(len(self.permutations), (len(features),), device=features.device)
        logits = self.predict(features, labels)
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        self.measure("accuracy", accuracy)
        self.signal.update(accuracy, self.progress)
        return F.cross_entropy(logits, labels)

    def visualize(self, views: list[Tensor]) -> Visualization:
        cut = self.grid.cut(views[0])
        labels = torch.randint(len(self.permutations), (len(views[0]),), device=cut.device)
        predictions = self.predict(self.features(normalize_tiles(cut)), labels).argmax(dim=1)
        tiles = to_pixels(cut, self.encoder)
        rows = []
        for index, truth in enumerate(tiles.reshape(-1, NUM_PATCHES, *tiles.shape[1:])):
            order = self.permutations[labels[index]].cpu().numpy()
            predicted = self.permutations[predictions[index]].cpu().numpy()
            shuffled = truth[order]
            correct = int((order == predicted).sum())
            placed = join_tiles(shuffled[predicted.argsort()])
            solved = Picture(placed, f"{correct} of 9 in place", right=correct == NUM_PATCHES)
            rows.append([Picture(join_tiles(shuffled)), solved, Picture(join_tiles(truth))])
        return Visualization(("shuffled", "placed as predicted", "truth"), rows)
