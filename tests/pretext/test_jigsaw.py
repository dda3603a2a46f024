"""Permutations, tiles, and the shortcuts that are closed."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.errors import UserError
from vissl_lite.pretext.jigsaw import (
    SHUFFLES_PER_IMAGE,
    Jigsaw,
    all_permutations,
    distant_permutations,
    jigsaw_views,
    normalize_tiles,
    shuffle,
)
from vissl_lite.pretext.modules.patches import Grid
from vissl_lite.pretext.modules.visualization import to_pixels


def made(backbone: str = "test_resnet", size: int = 32, **options: object) -> Jigsaw:
    torch.manual_seed(0)
    return Jigsaw(build_encoder(backbone, size), **options)  # type: ignore[arg-type]


def mean_distance(permutations: np.ndarray) -> float:
    pairs = itertools.combinations(permutations, 2)
    return float(np.mean([np.sum(one != other) for one, other in pairs]))


# Permutations


def test_all_permutations_are_those_of_itertools() -> None:
    for tiles in (1, 2, 5):
        expected = list(itertools.permutations(range(tiles)))
        assert all_permutations(tiles).tolist() == [list(one) for one in expected]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_distant_permutations_are_those_of_algorithm_1(seed: int) -> None:
    """Term by term: all distances anew for each permutation that is added."""
    left = [list(one) for one in itertools.permutations(range(4))]
    place = int(np.random.default_rng(seed).integers(len(left)))
    chosen = []
    while len(chosen) < 12:
        chosen.append(left.pop(place))
        sums, nearest = [], []
        for candidate in left:
            distances = []
            for other in chosen:
                distances.append(
                    sum(candidate[position] != other[position] for position in range(4))
                )
            sums.append(sum(distances))
            nearest.append(min(distances))
        ties = [at for at in range(len(left)) if sums[at] == max(sums)]
        place = max(ties, key=lambda at: nearest[at])  # the first of the largest
    assert distant_permutations(4, 12, seed).tolist() == chosen


def test_all_of_them_can_be_chosen() -> None:
    assert len(np.unique(distant_permutations(4, 24), axis=0)) == 24


@pytest.mark.slow
def test_a_hundred_are_distinct_far_apart_and_found_once() -> None:
    found = distant_permutations(9, 100)
    assert distant_permutations(9, 100) is found
    assert (np.sort(found, axis=1) == np.arange(9)).all()
    assert len(np.unique(found, axis=0)) == 100
    for seed in range(5):
        random = np.random.default_rng(seed)
        drawn = np.stack([random.permutation(9) for _ in range(100)])
        assert mean_distance(found) > mean_distance(drawn) + 0.05
    # no code of 9 symbols in 9 places has more: each place holds every symbol equally often
    assert mean_distance(found) == pytest.approx(9 * 8 / 9 * 100 / 99, abs=0.01)
    assert min(np.sum(a != b) for a, b in itertools.combinations(found, 2)) >= 4


# Tiles


@pytest.mark.slow
def test_sizes_are_the_papers_at_224() -> None:
    grid = made("resnet18", 224).grid
    assert grid == Grid(side=64, step=75, slack=11)
    assert grid.image_size == 225


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit", "vit_slim_patch4_32"])
def test_tiles_have_16_pixels_at_least(backbone: str) -> None:
    assert made(backbone, 32).grid.side == 16


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["test_vit", "vit_slim_patch4_32"])
def test_it_works_for_a_vit(backbone: str) -> None:
    task = made(backbone)
    size = task.grid.image_size
    loss = task.loss([torch.randn(3, 3, size, size)])
    loss.backward()
    # at the start it guesses
    assert loss.item() == pytest.approx(math.log(100), rel=0.1)
    assert all(p.grad is not None for p in task.encoder.parameters())


def test_normalizing_removes_brightness_contrast_and_tint() -> None:
    tiles = torch.randn(6, 3, 16, 16)
    normal = normalize_tiles(tiles)
    assert normal.mean(dim=(2, 3)).abs().max() < 1e-6
    torch.testing.assert_close(normal.std(dim=(2, 3)), torch.ones(6, 3))
    contrast, brightness = 0.1 + torch.rand(6, 3, 1, 1), torch.randn(6, 3, 1, 1)
    torch.testing.assert_close(
        normalize_tiles(contrast * tiles + brightness), normal, atol=1e-4, rtol=1e-4
    )


def test_flat_tiles_stay_flat() -> None:
    flat = 0.7 + 1e-4 * torch.randn(1, 3, 16, 16)
    assert normalize_tiles(flat).abs().max() < 0.1


def test_features_are_shuffled_as_tiles_would_be() -> None:
    task = made().eval()
    tiles = torch.randn(4, 9, 3, 16, 16)
    orders = task.permutations[torch.tensor([0, 5, 17, 99])]
    with torch.no_grad():
        first = task.encoder(shuffle(tiles, orders).flatten(0, 1)).unflatten(0, (4, 9))
        after = shuffle(task.encoder(tiles.flatten(0, 1)).unflatten(0, (4, 9)), orders)
    torch.testing.assert_close(first, after)
    for puzzle in range(4):
        for place in range(9):
            expected = tiles[puzzle, orders[puzzle, place]]
            assert torch.equal(shuffle(tiles, orders)[puzzle, place], expected)


def test_the_head_sees_features_in_the_order_of_the_label(monkeypatch: pytest.MonkeyPatch) -> None:
    task = made(tile_features=1)
    monkeypatch.setattr(task.encoder, "forward", lambda tiles: torch.arange(18.0)[:, None])
    monkeypatch.setattr(task.reduce, "forward", lambda features: features)
    seen: list[Tensor] = []
    monkeypatch.setattr(task.head, "forward", lambda x: seen.append(x) or torch.zeros(8, 100))
    labels: list[Tensor] = []
    monkeypatch.setattr(F, "cross_entropy", lambda logits, y: labels.append(y) or logits.sum())
    task.loss([torch.randn(2, 3, task.grid.image_size, task.grid.image_size)])
    orders = task.permutations[labels[0]]
    first = torch.tensor([0, 9]).repeat(SHUFFLES_PER_IMAGE)[:, None]  # each image's own features
    assert torch.equal(seen[0], (orders + first).float())


@pytest.mark.slow
def test_labels_are_drawn_from_all_permutations(monkeypatch: pytest.MonkeyPatch) -> None:
    task = made(permutations=3)
    drawn: list[int] = []
    monkeypatch.setattr(
        F, "cross_entropy", lambda logits, y: drawn.extend(y.tolist()) or logits.sum()
    )
    for _ in range(5):
        task.loss([torch.randn(12, 3, task.grid.image_size, task.grid.image_size)])
    assert len(drawn) == 60 * SHUFFLES_PER_IMAGE
    assert min(drawn.count(label) for label in range(3)) > 5


# Shortcuts


def told_from_borders(task: Jigsaw, count: int = 64) -> float:
    """Share of the middle tile's straight neighbors that matching of borders puts in place."""
    size = task.grid.image_size
    picture = F.avg_pool2d(torch.randn(count, 1, size + 2, size + 2), 3, stride=1)
    tiles = task.tiles(picture.repeat(1, 3, 1, 1))[:, 0].unflatten(0, (-1, 9))
    middle, right = tiles[:, 4], 0
    for label, place in enumerate([1, 3, 5, 7]):  # above, left, right, below
        other = tiles[:, place]
        differences = torch.stack(
            [
                (other[:, -1] - middle[:, 0]).abs().mean(dim=1),
                (other[:, :, -1] - middle[:, :, 0]).abs().mean(dim=1),
                (other[:, :, 0] - middle[:, :, -1]).abs().mean(dim=1),
                (other[:, 0] - middle[:, -1]).abs().mean(dim=1),
            ]
        )
        right += (differences.argmin(dim=0) == label).sum().item()
    return right / (4 * count)


@pytest.mark.slow
def test_borders_put_tiles_in_place_only_without_gap() -> None:
    assert told_from_borders(made(tile_size=64, cell_size=64)) > 0.95
    deviation = math.sqrt(0.25 * 0.75 / 256)
    # a few tiles touch by chance, as the paper's do
    assert told_from_borders(made(tile_size=64)) < 0.27 + 4 * deviation


def test_three_of_ten_views_are_gray() -> None:
    views = jigsaw_views(32, 0.5, gray_share=0.3, upright=True)
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    made_views = [views(image, seed=0, epoch=0, index=index)[0] for index in range(400)]
    assert all(view.shape == (32, 32, 3) for view in made_views)
    gray = [(view == view[..., :1]).all() for view in made_views]
    assert np.mean(gray) == pytest.approx(0.3, abs=0.08)
    never = jigsaw_views(32, 0.5, gray_share=0.0, upright=True)
    assert all(never(image, 0, 0, index)[0].std(axis=2).max() > 0 for index in range(20))


# What a user did wrong


def test_errors_say_what_would_work() -> None:
    with pytest.raises(UserError, match="must be from 2 to 1000"):
        made(permutations=400_000)
    with pytest.raises(UserError, match="must be from 2 to"):
        made(permutations=1)
    with pytest.raises(UserError, match="tile_size"):
        made("test_vit", tile_size=20)
    with pytest.raises(UserError, match="give 16 or more"):
        made(cell_size=12)
    with pytest.raises(UserError, match="gray"):
        made(gray=1.5)


# What it shows


@pytest.mark.parametrize("off", [0, 1])
def test_a_solved_puzzle_is_the_image_again(off: int, monkeypatch: pytest.MonkeyPatch) -> None:
    task = made()
    asked: list[Tensor] = []

    def guess(features: Tensor, labels: Tensor) -> Tensor:
        asked.append(labels)
        return F.one_hot((labels + off) % 100, 100).float()

    monkeypatch.setattr(task, "predict", guess)
    size = task.grid.image_size
    images = task.encoder.normalize(torch.randint(256, (8, 3, size, size), dtype=torch.uint8))
    rows = task.visualize([images]).rows
    whole = to_pixels(images, task.encoder)
    for row, label, image in zip(rows, asked[0].tolist(), whole, strict=True):
        shuffled, placed, truth = (tiles_of(picture.image) for picture in row)
        orders = task.permutations[[label, (label + off) % 100]].tolist()
        for place in range(9):
            assert np.array_equal(shuffled[place], truth[orders[0][place]])
            assert np.array_equal(placed[orders[1][place]], shuffled[place])
            down, right = place // 3 * task.grid.step, place % 3 * task.grid.step
            reach = task.grid.side + task.grid.slack
            cell = image[down : down + reach, right : right + reach]
            windows = np.lib.stride_tricks.sliding_window_view(cell, (16, 16), axis=(0, 1))
            assert (windows.transpose(0, 1, 3, 4, 2) == truth[place]).all(axis=(2, 3, 4)).any()
        assert np.array_equal(row[1].image, row[2].image) == (off == 0)
        assert row[1].right == (off == 0)
        fits = sum(one == other for one, other in zip(*orders, strict=True))
        assert row[1].caption == f"{fits} of 9 in place"


def tiles_of(picture: np.ndarray) -> np.ndarray:
    """The nine tiles of 16 pixels, a white line between them: ``(9, 16, 16, 3)``."""
    assert picture.shape == (50, 50, 3)
    assert (picture[[16, 33]] == 255).all()
    assert (picture[:, [16, 33]] == 255).all()
    return np.stack([picture[y : y + 16, x : x + 16] for y in (0, 17, 34) for x in (0, 17, 34)])
