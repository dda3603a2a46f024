"""Patches lie where their labels say, and neither colors nor borders give the labels away."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from vissl_lite.data.image_reader import ImageReader
from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.errors import UserError
from vissl_lite.plots import Picture
from vissl_lite.pretext.modules.patches import Grid, cut
from vissl_lite.pretext.modules.visualization import to_pixels
from vissl_lite.pretext.relative_patch import (
    DIRECTIONS as DIRECTIONS_IN_WORDS,
)
from vissl_lite.pretext.relative_patch import (
    NEIGHBORS,
    RelativePatch,
    drop_colors,
    project_colors,
)

# (down, right) of the eight labels: in reading order around the center
DIRECTIONS = [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]


def made(backbone: str = "test_resnet", size: int = 64, **options: object) -> RelativePatch:
    torch.manual_seed(0)
    return RelativePatch(build_encoder(backbone, size), **options)  # type: ignore[arg-type]


def noise(count: int, size: int, blurs: int) -> Tensor:
    """Gray noise, alike in neighboring pixels: ``(count, 1, size, size)`` of deviation 1."""
    random = torch.randn(count, 1, size + 2 * blurs, size + 2 * blurs)
    for _ in range(blurs):
        random = F.avg_pool2d(random, 3, stride=1)
    return random / random.std()


# Where patches lie


@pytest.mark.slow
def test_sizes_are_the_papers_at_224() -> None:
    task = made("resnet18", 224)
    assert task.grid == Grid(side=96, step=144, slack=14)
    assert task.grid.image_size == 3 * 96 + 2 * 48 + 2 * 7


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit", "vit_slim_patch4_32"])
@pytest.mark.parametrize("size", [32, 64])
def test_patches_lie_where_their_labels_say(backbone: str, size: int) -> None:
    task = made(backbone, size, color="keep")
    grid = task.grid
    pixel = torch.arange(grid.image_size, dtype=torch.float32)
    one = torch.stack(torch.meshgrid(pixel, pixel, indexing="ij"))  # its own row and column
    patches = task.patches(torch.stack([one, 1000 + one])[:, [0, 1, 1]])
    assert patches.shape == (18, 3, grid.side, grid.side)
    corners = patches[:, :2, 0, 0].unflatten(0, (2, 9))
    for image in range(2):
        for place in range(9):
            off = corners[image, place] - 1000 * image
            row, column = divmod(place, 3)
            for at, got in ((row, off[0]), (column, off[1])):
                assert 0 <= got - at * grid.step <= grid.slack
    center = corners[:, 4:5]
    for label, place in enumerate(NEIGHBORS):
        down, right = ((corners[:, [place]] - center) / grid.step).round().unbind(-1)
        assert (down == DIRECTIONS[label][0]).all()
        assert (right == DIRECTIONS[label][1]).all()


def test_cut_equals_slicing() -> None:
    images = torch.randn(2, 3, 20, 24)
    rows, columns = torch.tensor([[0, 3], [15, 7]]), torch.tensor([[1, 19], [0, 12]])
    patches = cut(images, rows, columns, 5)
    for image in range(2):
        for number in range(2):
            top, left = rows[image, number], columns[image, number]
            expected = images[image, :, top : top + 5, left : left + 5]
            assert torch.equal(patches[2 * image + number], expected)
    assert patches.is_contiguous(memory_format=torch.channels_last)


def test_jitter_reaches_its_limits_and_is_the_patchs_own() -> None:
    rows, columns = Grid(side=8, step=12, slack=4).draw(500, torch.device("cpu"))
    off = torch.stack([rows - torch.arange(9) // 3 * 12, columns - torch.arange(9) % 3 * 12])
    assert off.min() == 0
    assert off.max() == 4
    together = torch.corrcoef(off.permute(0, 2, 1).reshape(18, -1).float())
    assert (together - torch.eye(18)).abs().max() < 0.2


@pytest.mark.parametrize("gap", [0, 3])
def test_gap_is_what_lies_between_patches(gap: int) -> None:
    task = made(gap=gap, jitter=0)
    assert task.grid.image_size == 3 * task.grid.side + 2 * gap


def test_all_eight_labels_occur_each_with_its_own_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    task = made(size=32)
    task.encoder.forward = lambda patches: torch.arange(18.0)[:, None]  # type: ignore[method-assign]
    seen: list[Tensor] = []
    monkeypatch.setattr(task.head, "forward", lambda x: seen.append(x) or torch.zeros(16, 8))
    labels: list[Tensor] = []
    monkeypatch.setattr(F, "cross_entropy", lambda logits, y: labels.append(y) or logits.sum())
    task.loss([torch.zeros(2, 3, task.grid.image_size, task.grid.image_size)])
    assert labels[0].tolist() == [*range(8), *range(8)]
    for pair, label in zip(seen[0].tolist(), labels[0].tolist(), strict=True):
        center = 4 if pair[0] < 9 else 13
        assert pair == [center, center - 4 + NEIGHBORS[label]]


# Shortcut: the lens displaces colors outwards


def aberrated(count: int, size: int, channels: list[int]) -> Tensor:
    """Gray noise; the given channels are larger by 6 %, as seen from the middle of the picture."""
    gray = noise(count, size, blurs=3)
    zoom = torch.tensor([[1 / 1.06, 0.0, 0.0], [0.0, 1 / 1.06, 0.0]]).expand(count, 2, 3)
    where = F.affine_grid(zoom, list(gray.shape), align_corners=False)
    larger = F.grid_sample(gray, where, padding_mode="reflection", align_corners=False)
    picture = gray.repeat(1, 3, 1, 1)
    picture[:, channels] = larger
    return picture


def displacements(patches: Tensor) -> Tensor:
    """How far each channel is displaced against the next, by least squares on its gradient.

    ``(N, 3, S, S)`` to ``(N, 6)``: down and right for red-green, green-blue, blue-red.
    """
    found = []
    patches = patches / patches.std(dim=(2, 3), keepdim=True)
    for one, other in ((0, 1), (1, 2), (2, 0)):
        mean = (patches[:, one] + patches[:, other]) / 2
        slopes = torch.stack(torch.gradient(mean, dim=(1, 2)), dim=1).flatten(2)
        difference = (patches[:, other] - patches[:, one]).flatten(1)
        normal = slopes @ slopes.transpose(1, 2) + 1e-3 * torch.eye(2)
        found.append(torch.linalg.solve(normal, slopes @ difference[:, :, None])[:, :, 0])
    return torch.cat(found, dim=1)


def told_from_colors(task: RelativePatch, channels: list[int]) -> float:
    """Share of held-out neighbors whose direction the displacements of colors give away."""
    statistics = displacements(
        task.patches(aberrated(96, task.grid.image_size, channels))
    ).unflatten(0, (-1, 9))[:, NEIGHBORS]
    means = statistics[:48].mean(dim=0)  # of each direction
    spread = statistics[:48].std(dim=0).mean(dim=0) + 1e-9
    distance = ((statistics[48:, :, None] - means) / spread).square().sum(dim=3)
    return (distance.argmin(dim=2) == torch.arange(8)).float().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("color", "channels"), [("drop", [0]), ("drop", [0, 2]), ("project", [0, 2])]
)
def test_displaced_colors_tell_the_direction_only_if_kept(color: str, channels: list[int]) -> None:
    chance = 1 / 8
    assert told_from_colors(made(color="keep"), channels) > 0.8
    deviation = math.sqrt(chance * (1 - chance) / (48 * 8))
    assert told_from_colors(made(color=color), channels) < chance + 4 * deviation


@pytest.mark.slow
def test_projecting_leaves_red_against_blue_as_documented() -> None:
    assert told_from_colors(made(color="project"), [0]) > 0.5


# Shortcut: what crosses a border


def told_from_borders(task: RelativePatch, count: int = 128) -> float:
    """Share of the four straight neighbors whose direction matching of borders gives away."""
    picture = noise(count, task.grid.image_size, blurs=2).repeat(1, 3, 1, 1)
    patches = task.patches(picture)[:, 0].unflatten(0, (-1, 9))
    center, right = patches[:, 4], 0
    straight = [1, 3, 5, 7]  # above, left, right, below
    for label, place in enumerate(straight):
        other = patches[:, place]
        differences = torch.stack(
            [
                (other[:, -1] - center[:, 0]).abs().mean(dim=1),
                (other[:, :, -1] - center[:, :, 0]).abs().mean(dim=1),
                (other[:, :, 0] - center[:, :, -1]).abs().mean(dim=1),
                (other[:, 0] - center[:, -1]).abs().mean(dim=1),
            ]
        )
        right += (differences.argmin(dim=0) == label).sum().item()
    return right / (4 * count)


@pytest.mark.slow
def test_borders_tell_the_direction_only_without_gap() -> None:
    assert told_from_borders(made(color="keep", gap=0, jitter=0)) > 0.95
    deviation = math.sqrt(0.25 * 0.75 / 512)
    assert told_from_borders(made(color="keep")) < 0.25 + 4 * deviation


# The treatment of colors


def test_dropping_keeps_one_channel_and_a_hundredth_of_noise() -> None:
    torch.manual_seed(0)
    patches = 3 + 2 * torch.randn(300, 3, 16, 16)
    dropped = drop_colors(patches)
    same = (dropped == patches).all(dim=(2, 3))
    assert (same.sum(dim=1) == 1).all()
    assert same.sum(dim=0).min() > 60  # each channel is kept for a third of the patches
    kept = patches[same].std(dim=(1, 2))
    others = dropped[~same].view(300, 2, 16, 16)
    ratio = others.std(dim=(2, 3)) / kept[:, None]
    assert ratio.mean().item() == pytest.approx(0.01, rel=0.02)
    assert others.mean().abs() < 1e-3


def test_projecting_is_the_papers_matrix_on_rgb() -> None:
    task = made(size=32, color="project")
    rgb = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    normalize = task.encoder.normalize
    ours = project_colors(normalize(rgb), task.encoder.scale, task.encoder.shift)
    a = torch.tensor([[-1.0, 2.0, -1.0]])
    b = torch.eye(3) - a.T @ a / (a @ a.T)
    for image in range(2):
        for row in range(4):
            for column in range(4):
                value = b @ rgb[image, :, row, column].float()
                expected = normalize(value[None, :, None, None])[0, :, 0, 0]
                torch.testing.assert_close(ours[image, :, row, column], expected)
    assert (a @ b).abs().max() < 1e-6


# What a user did wrong


@pytest.mark.slow
def test_errors_say_what_would_work() -> None:
    with pytest.raises(UserError, match="patch_size"):
        made("test_vit", patch_size=20)
    with pytest.raises(UserError, match="give drop, project or keep"):
        made(color="gray")
    with pytest.raises(UserError, match="gap -1"):
        made(gap=-1)
    reader = ImageReader(bands=(0,), low=(0.0,), high=(9.0,), mean=(0.5,), std=(0.5,))
    with pytest.raises(UserError, match="needs photographs of 8-bit color"):
        RelativePatch(build_encoder("test_resnet", 64, reader=reader), color="project")


# What it shows


def test_patches_are_shown_at_the_true_place_and_at_the_predicted_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = made(size=32, jitter=2)
    size, side = task.grid.image_size, task.grid.side
    images = task.encoder.normalize(torch.randint(120, (8, 3, size, size), dtype=torch.uint8))
    whole = to_pixels(images, task.encoder)

    def bright(picture: Picture, image: np.ndarray) -> set[int]:
        """Places at which the picture is not faded; all that is not must be the image's own."""
        assert (picture.image[picture.image < 185] == image[picture.image < 185]).all()
        return {place for place in range(9) if (at_place(picture.image, place) < 185).mean() > 0.5}

    def at_place(picture: np.ndarray, place: int) -> np.ndarray:
        down, right = place // 3 * task.grid.step, place % 3 * task.grid.step
        return picture[down : down + side + 4, right : right + side + 4]

    monkeypatch.setattr(task, "predict", lambda patches: torch.eye(8).repeat(len(images), 1))
    for row, image in zip(task.visualize([images]).rows, whole, strict=True):
        label = DIRECTIONS_IN_WORDS.index(row[0].caption)
        assert bright(row[0], image) == {4, NEIGHBORS[label]}
        assert row[1].right
        assert row[1].caption == row[0].caption
        assert np.array_equal(row[0].image, row[1].image)

    always = torch.eye(8)[[1]].repeat(8 * len(images), 1)
    monkeypatch.setattr(task, "predict", lambda patches: always)
    rows = task.visualize([images]).rows
    assert {row[1].right for row in rows} == {True, False}
    for row in rows:
        assert row[1].caption == "above"
        assert row[1].right == (row[0].caption == "above")
        assert (at_place(row[1].image, 1) < 185).mean() > 0.5
