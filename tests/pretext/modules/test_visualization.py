"""Pictures of the images of a run, whatever the state of its files and of its weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vissl_lite.data.images import find_images
from vissl_lite.data.stream import ViewDataset
from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.pretext import pretext_class
from vissl_lite.pretext.modules import visualization as module
from vissl_lite.pretext.modules.visualization import draw_views, to_pixels, visualization_of


def test_pixels_are_those_that_were_normalized() -> None:
    encoder = build_encoder("test_resnet", 32)
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    images[1, 0] = 255 - images[1, 0]
    assert np.array_equal(to_pixels(encoder.normalize(images), encoder), images.permute(0, 2, 3, 1))
    wild = (
        torch.tensor([torch.nan, torch.inf, -torch.inf, 99.0]).view(1, 1, 2, 2).repeat(1, 3, 1, 1)
    )
    assert to_pixels(wild, encoder)[0, :, :, 0].tolist() == [[0, 255], [0, 255]]


@pytest.fixture
def damaged(photos: Path, tmp_path: Path) -> list[str]:
    """Six photographs among files that are cut short, empty or gone."""
    paths = find_images([photos])
    for index, content in enumerate([b"", b"no image", Path(paths[0]).read_bytes()[:400]] * 8):
        (tmp_path / f"{index}.jpg").write_bytes(content)
        paths.append(str(tmp_path / f"{index}.jpg"))
    return [str(tmp_path / "gone.png"), *paths[18:]]


def test_broken_images_are_passed_over(damaged: list[str], tmp_path: Path) -> None:
    task = pretext_class("rotation")(build_encoder("test_resnet", 32))
    views, file = task.views(), tmp_path / "views.png"
    shown = visualization_of(task, damaged, views, seed=0)
    assert shown is not None
    assert len(shown.rows) == 6
    draw_views(damaged, views, 0, file)
    assert Image.open(file).width > 300
    file.unlink()
    broken = damaged[7:]
    assert visualization_of(task, broken, views, seed=0) is None
    draw_views(broken, views, 0, file)
    assert not file.exists()


def test_views_are_those_of_the_run_beside_their_own_image(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[list[np.ndarray], list[list[np.ndarray]]]] = []
    monkeypatch.setattr(
        module, "plot_views", lambda images, views, file: drawn.append((images, views))
    )
    paths, views = (
        find_images([photos]),
        pretext_class("simclr")(build_encoder("test_resnet", 32)).views(),
    )
    draw_views(paths, views, 7, tmp_path / "views.png")
    run = ViewDataset(paths, views, seed=7)
    images, made = drawn[0]
    assert len(images) == 4
    for image, pair in zip(images, made, strict=True):
        number = next(
            n for n, path in enumerate(paths) if np.array_equal(np.asarray(Image.open(path)), image)
        )
        for one, other in zip(pair, run[0, number].views, strict=True):
            assert np.array_equal(one, other)


@pytest.mark.parametrize(
    "name", ["rotation", "relative_patch", "jigsaw", "colorization", "inpainting", "spark"]
)
def test_a_task_that_diverged_is_shown_too(name: str, photos: Path) -> None:
    task = pretext_class(name)(build_encoder("test_resnet", 32))
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.fill_(torch.nan)
    shown = visualization_of(task, find_images([photos]), task.views(), seed=0)
    assert shown is not None
    assert len(shown.rows) == 8
