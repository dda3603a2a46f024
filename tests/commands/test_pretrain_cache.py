"""``vissl-lite pretrain --cache`` through the command line."""

import json
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import blobs
from vissl_lite.cli import main
from vissl_lite.data import cache
from vissl_lite.data.cache import CACHE
from vissl_lite.training.checkpoints import Checkpoints
from vissl_lite.training.schedule import Schedule

SMALL = ["--backbone", "test_resnet", "--image_size", "32", "--batch_size", "4", "--epochs", "3"]


def run(*arguments: object) -> int:
    return main(["pretrain", *SMALL, *map(str, arguments)])


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "encoder" / "model.safetensors")


def assert_equal_weights(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], msg=name, atol=1e-6, rtol=1e-5)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large photographs, one on its side, one of 16 bits, one broken."""
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(7):
        exif = Image.Exif()
        exif[0x0112] = 6 if index == 3 else 1
        blobs(index, 240, 320).save(folder / f"{index}.jpg", exif=exif)
    (folder / "broken.jpg").write_bytes((folder / "0.jpg").read_bytes()[:900])
    gray = np.asarray(blobs(8, 100, 90).convert("L"))
    assert cv2.imwrite(str(folder / "deep.png"), gray.astype(np.uint16) * 257)
    return folder


@pytest.fixture(scope="module")
def cached(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "cached"
    assert run("--data", pictures, "--out", out, "--cache", "true", "--num_workers", 0) == 0
    return out


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "free_memory", lambda: 1000)


@pytest.mark.slow
def test_the_log_says_what_is_kept_and_where(cached: Path) -> None:
    assert "decoded images are kept: 9 of 9, 0.00 GB, in memory" in (cached / "log.txt").read_text()
    assert json.loads((cached / "results.json").read_text())["steps"] == 6
    assert "cache: true" in (cached / "config.yaml").read_text()


@pytest.mark.slow
def test_workers_change_nothing(cached: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "workers"
    given = ["--data", pictures, "--out", out, "--cache", "true", "--num_workers", 2]
    assert run(*given) == 0
    assert_equal_weights(cached, out)


class KilledError(Exception):
    """Stands for whatever ends a process at the worst moment."""


@pytest.mark.slow
@pytest.mark.usefixtures("no_memory")
def test_a_run_with_a_file_is_killed_and_resumed(
    cached: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "resumed"

    def save_then_die(self, trainer, module, outputs, batch, batch_idx):
        self.save(trainer)
        schedule = next(c for c in trainer.callbacks if isinstance(c, Schedule))
        if schedule.batches == 4:  # in the last of three epochs
            raise KilledError

    given = ["--data", pictures, "--out", out, "--cache", "true", "--num_workers", 0]
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "on_train_batch_end", save_then_die)
        with pytest.raises(KilledError):
            run(*given)
    size = (out / CACHE).stat().st_size
    assert f"in {out / CACHE}" in (out / "log.txt").read_text()
    assert size < 9 * 3 * 240 * 320
    assert run(*given, "--resume") == 0
    assert not list(out.glob(f"{CACHE}*"))
    assert_equal_weights(cached, out)


@pytest.mark.usefixtures("no_memory")
def test_a_disk_without_room_is_refused_before_anything_is_written(
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    out = tmp_path / "run"
    assert run("--data", pictures, "--out", out, "--cache", "true") == 2
    assert "--cache needs 0.0 GB and" in capsys.readouterr().err
    assert not out.exists()


def test_several_machines_are_refused(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run("--data", pictures, "--out", out, "--cache", "true", "--num_nodes", 2) == 2
    assert "--cache is for one machine, not for --num_nodes 2" in capsys.readouterr().err
    assert not out.exists()
