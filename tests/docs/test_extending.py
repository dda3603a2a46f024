"""The examples of docs/extending.md are a pretext and a task that all commands can do with."""

import csv
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from tests.conftest import without_pictures
from vissl_lite.cli import main
from vissl_lite.pretext import PRETEXTS
from vissl_lite.transfer.tasks import TASKS

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


def example(number: int, name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A Python block of the page as a module."""
    block = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[number]
    module = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(block, str(PAGE), "exec", dont_inherit=True), module.__dict__)
    return module


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """Images whose value is how bright they are."""
    random = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    with (tmp_path / "measured.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "value"])
        for index in range(30):
            value = index / 30
            pixels = random.integers(0, 40, (32, 32, 3)) + 200 * value
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "images" / f"{index}.png")
            rows.writerow([f"images/{index}.png", value])
    return tmp_path


def run(*words: object) -> None:
    with without_pictures():
        assert main([str(word) for word in words]) == 0


@pytest.mark.slow
def test_the_pretext_trains(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = example(0, "example_pretext", monkeypatch).Whitened
    monkeypatch.setitem(PRETEXTS, "whitened", made)
    out = measured / "run"
    run("pretrain", "--data", measured / "images", "--out", out, "--pretext", "whitened",
        "--pretext.size", 16, "--backbone", "test_resnet", "--image_size", 32, "--epochs", 1,
        "--batch_size", 10, "--num_workers", 0)  # fmt: skip
    assert np.isfinite(json.loads((out / "results.json").read_text())["loss"])
    assert (out / "encoder" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_task_is_known_to_every_command(
    measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = example(1, "example_task", monkeypatch).Regression()
    monkeypatch.setitem(TASKS, "regression", task)
    data, tuned = measured / "measured.csv", measured / "tuned"
    common = ("--data", data, "--task", "regression", "--epochs", 8, "--batch_size", 6,
              "--num_workers", 0, "--image_size", 32)  # fmt: skip
    run("finetune", *common, "--encoder", "random:test_resnet", "--out", tuned, "--lr", 0.01)
    test = json.loads((tuned / "results.json").read_text())["test"]
    assert test["mae"] < 0.3  # the mean would be off by a quarter, at random by more
    run("predict", "--model", tuned, "--data", measured / "images", "--out", measured / "predicted")
    with (measured / "predicted" / "predictions.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 30
    run("compare", *common, "--encoder", "random:test_resnet", "random:test_vit",
        "--protocols", "finetune", "--fractions", 1.0, "--lr", 0.01, "--out",
        measured / "compared")  # fmt: skip
    assert "r2" in (measured / "compared" / "runs.csv").read_text()
