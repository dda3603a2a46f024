"""Jigsaw: tell by which permutation nine tiles of an image were shuffled.

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

# Puzzles made of each image. Features are shuffled, not tiles: more of them cost next to nothing.
SHUFFLES_PER_IMAGE = 4

# Contrast below which a tile counts as flat, in normalized values: its noise is not blown up.
MIN_TILE_STD = 0.01

# Spread of the last layer's first weights: small, so that training starts at guessing.
LAST_LAYER_STD = 0.01

# The paper's largest set of permutations; the time to find them grows with their number.
MAX_PERMUTATIONS = 1000


def jigsaw_views(size: int, min_crop_scale: float, gray_share: float, upright: bool) -> Views:
    """One view: a random crop, flipped, perhaps gray. Cutting it up is left to the loss.

    Args:
        size: side in pixels.
        min_crop_scale: smallest share of the image's area.
        gray_share: probability of being made gray.
        upright: Whether the images have a natural orientation.
    """
    one = [random_crop(size, min_crop_scale), flip(upright), gray(gray_share)]
    return Views([one], shortest=crop_decode_size(size, min_crop_scale))


def all_permutations(tiles: int) -> np.ndarray:
    """All permutations in lexicographic order.

    Args:
        tiles: how many things are permuted; up to about ten.

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

    The first is drawn at random; each further one has the largest sum of distances to those before
    it. Where several do, which the paper leaves open, it is the one whose nearest is furthest, and
    the first of these in lexicographic order: else near-twins get in.

    Args:
        tiles: of a puzzle.
        count: how many, at most ``tiles!``.
        seed: of the first one. Part of the task's definition, not of a run.

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
        total[chosen[-1]] = np.iinfo(np.int32).min // 2  # never again
        best = np.flatnonzero(total == total.max())
        chosen.append(int(best[nearest[best].argmax()]))
    found = np.ascontiguousarray(candidates[:, chosen].T)
    found.flags.writeable = False
    return found


def normalize_tiles(tiles: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 of each channel of each tile.

    Neighbors are alike in brightness and contrast, which alone would put many tiles in order (the
    paper's shortcut of low-level statistics).

    Args:
        tiles: ``(N, C, S, S)``.

    Returns:
        The same shape. Flat tiles stay flat.
    """
    deviation, mean = torch.std_mean(tiles, dim=(2, 3), keepdim=True)
    return (tiles - mean) / deviation.clamp(min=MIN_TILE_STD)


def shuffle(tiles: Tensor, permutations: Tensor) -> Tensor:
    """Put tiles, or what was computed from each of them, in another order.

    Args:
        tiles: ``(B, 9, ...)``.
        permutations: ``(B, 9)`` int64: which tile comes first, second and so on.

    Returns:
        The same shape as ``tiles``.
    """
    return tiles[torch.arange(len(tiles), device=tiles.device)[:, None], permutations]


def join_tiles(tiles: np.ndarray) -> np.ndarray:
    """Lay nine tiles together, white lines between them.

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

    The nine tiles go through the encoder one by one (the paper's context-free network), so they
    are shuffled after it, when they are features: that is the same and costs nothing.

    Of the paper's guards against shortcuts, the gap between tiles hides lines that cross a border,
    and normalizing each channel of each tile hides brightness, contrast and tint. The displacement
    of colors by the lens grows towards an image's borders and survives normalizing; puzzles of
    gray images, which have none, are what keeps the encoder from relying on it. The paper also
    shifts the channels of colored images by up to two pixels, which is left out here.

    Args:
        encoder: Encoder to train.
        permutations: to tell apart. The paper finds 1000 best on ImageNet; 100 ask less of small
            sets of images.
        tile_size: side of a tile in pixels; default what fits the encoder, about 2/7 of its
            images, at least 16: 64 at 224 as in the paper.
        cell_size: side in pixels of the cell in which a tile lies at random; default 75/64 of the
            tile as in the paper, so that tiles lie 11/64 of a tile apart on average.
        tile_features: to which a shared linear layer reduces each tile's features; 512 in the
            paper (its fc6), for a million images.
        hidden_size: of the head on all nine; 4096 in the paper (its fc7).
        gray: share of the images made gray; 0.3 in the paper.
        min_crop_scale: Smallest fraction of the image area in the view that is cut up; the paper
            takes 225^2 pixels of an image with a shorter side of 256.
    """

    info = PretextInfo(
        name="jigsaw",
        family="predictive",
        views="1",
        paper="Noroozi & Favaro 2016, arXiv 1603.09246",
        use="pictures of things with parts; learns how they belong together",
    )
    # The paper's SGD runs for days on ImageNet; AdamW suits short runs.
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
                f"--pretext.permutations {permutations} must be from 2 to {MAX_PERMUTATIONS}: it takes "
                "two to tell them apart, and the paper uses no use for more"
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
        """Nine tiles of each image, normalized each for itself: what the encoder sees.

        Args:
            images: ``(B, C, S, S)``, normalized.

        Returns:
            ``(9 B, C, side, side)``: image by image, each in reading order.
        """
        return normalize_tiles(self.grid.cut(images))

    def features(self, tiles: Tensor) -> Tensor:
        """What is known of each tile: ``(9 B, C, side, side)`` to ``(B, 9, tile_features)``."""
        return self.reduce(self.encoder(tiles)).unflatten(0, (-1, NUM_PATCHES))

    def predict(self, features: Tensor, labels: Tensor) -> Tensor:
        """Shuffle, and tell by which permutation.

        Args:
            features: ``(B, 9, tile_features)``.
            labels: ``(B,)`` numbers of permutations.

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
        for number, truth in enumerate(tiles.reshape(-1, NUM_PATCHES, *tiles.shape[1:])):
            order = self.permutations[labels[number]].cpu().numpy()
            predicted = self.permutations[predictions[number]].cpu().numpy()
            shuffled = truth[order]
            fits = int((order == predicted).sum())
            placed = join_tiles(shuffled[predicted.argsort()])
            solved = Picture(placed, f"{fits} of 9 in place", right=fits == NUM_PATCHES)
            rows.append([Picture(join_tiles(shuffled)), solved, Picture(join_tiles(truth))])
        return Visualization(("shuffled", "placed as predicted", "truth"), rows)
