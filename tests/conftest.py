"""Small images that the tests make themselves."""

import os

# Tests share the cores: one thread each is faster than many that wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import importlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import hypothesis
import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)

# The same few examples each time: continuous integration must not fail by chance.
hypothesis.settings.register_profile(
    "few",
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("few")

# What commands draw at the end of a run. It takes ten times as long as the training of a test.
DRAWN = {
    "pretrain": ("plot_curves", "add_pretext", "add_embeddings", "add_report"),
    "finetune": ("plot_curves", "add_test_embeddings", "add_test_pictures", "add_report"),
    "probe": ("add_test_embeddings", "add_report"),
    "compare": ("add_test_embeddings", "add_report"),
    "predict": ("add_report",),
    "select": ("add_selection", "add_report"),
    "pseudo_label": ("add_report",),
}


@contextmanager
def trying(what: object) -> Iterator[None]:
    """Names the input, of the many that a test tries, with which it has failed."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"with {what!r:.200}")
        raise


def _commands() -> Iterator[tuple[Any, str]]:
    for command, names in DRAWN.items():
        module = importlib.import_module(f"vissl_lite.commands.{command}")
        yield from ((module, name) for name in names)


@contextmanager
def without_pictures() -> Iterator[None]:
    """Within it, commands leave out pictures, maps and reports."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in _commands():
            nothing = lambda *_, **__: None  # noqa: E731
            nothing.original = getattr(module, name)  # type: ignore[attr-defined]
            patch.setattr(module, name, nothing)
        yield


@contextmanager
def with_pictures() -> Iterator[None]:
    """Within it, commands draw, wherever else they do not."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in _commands():
            function = getattr(module, name)
            patch.setattr(module, name, getattr(function, "original", function))
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What was printed and logged, without the file names in it that xdist can't send."""
    report = yield
    report.sections = [
        (name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections
    ]
    return report


def required(pretext: str) -> dict[str, str]:
    """The hyperparameters without which a pretext can't be built: encoders to learn from."""
    from vissl_lite.pretext import pretext_class

    return dict.fromkeys(pretext_class(pretext).info.encoders, "random:test_resnet")


Task = TypeVar("Task", bound=Any)


def prepared(task: Task, images: int = 24) -> Task:
    """A pretext that is ready to be trained on a number of images, which it does not read."""
    from vissl_lite.data.stream import ViewDataset

    task.prepare(ViewDataset(["image.png"] * images, task.views(), seed=0), Path())
    return task


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Whatever test ran before."""
    torch.manual_seed(0)


def blobs(seed: int, height: int = 40, width: int = 48) -> Image.Image:
    """A picture of smooth random colors: no two seeds look alike."""
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
    """Three classes that a color tells apart: 12 training and 6 test images each, 32 pixels."""
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
