"""Small images that the tests make themselves."""

import os

# Tests share the cores: one thread each is faster than many that wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What was printed and logged, without the file names in it that xdist can't send."""
    report = yield
    report.sections = [
        (name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections
    ]
    return report


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Whatever test ran before."""
    torch.manual_seed(0)


def blobs(seed: int, height: int = 40, width: int = 48) -> Image.Image:
    """A picture of smooth random colours: no two seeds look alike."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 unlabelled photographs of 40x48 pixels in two subfolders."""
    folder = tmp_path_factory.mktemp("photos")
    for index in range(24):
        place = folder / ("a" if index % 2 else "b")
        place.mkdir(exist_ok=True)
        blobs(index).save(place / f"{index:02}.jpg", quality=95)
    return folder


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes that a colour tells apart: 12 training and 6 test images each, 32 pixels."""
    folder = tmp_path_factory.mktemp("labelled")
    for part, count in (("train", 12), ("test", 6)):
        for channel, name in enumerate(("red", "green", "blue")):
            place = folder / part / name
            place.mkdir(parents=True)
            for index in range(count):
                random = np.random.default_rng((channel, index, count))
                image = random.integers(0, 120, (32, 32, 3), dtype=np.uint8)
                image[..., channel] += 130
                Image.fromarray(image).save(place / f"{index}.png")
    return folder
