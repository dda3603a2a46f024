import os
import shutil
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from vissl_lite.data.fingerprints import Fingerprints, fingerprints_of
from vissl_lite.data.images import find_images
from vissl_lite.data.stream import Batch, ViewDataset
from vissl_lite.data.views import Views, flip, random_crop
from vissl_lite.leakage.callback import FingerprintCallback
from vissl_lite.training.fit import TrainingFiles, fit
from vissl_lite.training.hardware import Hardware
from vissl_lite.training.schedule import Schedule
from vissl_lite.training.stream import StreamData

BATCH = 7  # of 24 images: three batches, and three images left over


class Small(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 1, 1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.layer(batch.views[0].float()).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Kill(Callback):
    """Ends the run as a signal would, after so many batches."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, *_: object) -> None:
        self.after -= 1
        if self.after == 0:
            raise SystemExit


def train(
    paths: list[str],
    run: Path,
    epochs: int = 2,
    kill_after: int | None = None,
    before: Fingerprints | None = None,
) -> None:
    views = Views([[random_crop(16, 0.3), flip()]], shortest=16)
    schedule = Schedule(0.1, 0.1, 0, epochs * (len(paths) // BATCH))
    data = StreamData(ViewDataset(paths, views, 0), BATCH, epochs, schedule, workers=0)
    callbacks: list[Callback] = [FingerprintCallback(run, data, schedule, before)]
    if kill_after is not None:
        callbacks.append(Kill(kill_after))
    fit(
        Small(),
        data,
        schedule,
        Hardware(devices=1),
        callbacks,
        TrainingFiles(None, run / "checkpoints", True),
    )


@pytest.mark.slow
def test_all_images_are_kept_as_their_files_give_them(photos: Path, tmp_path: Path) -> None:
    paths = find_images([photos])
    train(paths, tmp_path)
    seen = Fingerprints.load(tmp_path / "fingerprints.npz")
    expected = fingerprints_of(paths)
    assert sorted(seen.paths) == expected.paths
    order = np.argsort(seen.paths)
    np.testing.assert_array_equal(seen.exact[order], expected.exact)
    # the views are cut from JPEGs decoded at half their size
    products = (seen.looks[order].astype(int) * expected.looks).sum(axis=1)
    assert (products / 127**2 > 0.99).all()
    assert not (tmp_path / "fingerprints").exists()


@pytest.mark.slow
def test_what_the_run_never_reached_is_not_there(photos: Path, tmp_path: Path) -> None:
    train(find_images([photos]), tmp_path, epochs=1)
    assert len(Fingerprints.load(tmp_path / "fingerprints.npz")) == 3 * BATCH


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_has_them_all(photos: Path, tmp_path: Path) -> None:
    paths = find_images([photos])
    with pytest.raises(SystemExit):
        train(paths, tmp_path, epochs=1, kill_after=2)
    assert not (tmp_path / "fingerprints.npz").exists()
    with (tmp_path / "fingerprints" / "0.bin").open("ab") as out:
        out.write(b"half")  # the kill came in the middle of a record
    train(paths, tmp_path, epochs=1)
    train(paths, tmp_path / "whole", epochs=1)
    seen, whole = (
        Fingerprints.load(run / "fingerprints.npz") for run in (tmp_path, tmp_path / "whole")
    )
    assert len(whole) == 3 * BATCH
    assert seen.paths == whole.paths
    np.testing.assert_array_equal(seen.looks, whole.looks)
    assert not (tmp_path / "fingerprints").exists()


@pytest.mark.slow
def test_several_processes_and_repeated_records_become_one_file(
    photos: Path, tmp_path: Path
) -> None:
    paths = find_images([photos])
    with pytest.raises(SystemExit):
        train(paths, tmp_path, epochs=1, kill_after=2)
    folder = tmp_path / "fingerprints"
    shutil.copy(folder / "0.bin", folder / "1.bin")
    (folder / "0.bin").unlink()
    shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)  # killed before there was one
    train(paths, tmp_path, epochs=1)
    seen = Fingerprints.load(tmp_path / "fingerprints.npz")
    assert len(seen) == len(set(seen.paths)) == 3 * BATCH


@pytest.mark.slow
def test_images_of_the_run_that_it_started_from_count_too(photos: Path, tmp_path: Path) -> None:
    paths = find_images([photos])
    before = fingerprints_of(paths[12:])
    train(paths[:14], tmp_path, before=before)
    seen = Fingerprints.load(tmp_path / "fingerprints.npz")
    assert sorted(seen.paths) == paths
    assert seen.paths[:12] == before.paths


@pytest.mark.slow
def test_broken_images_are_not_there_and_paths_are_absolute(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "images"
    shutil.copytree(photos / "a", folder)
    (folder / "zz.jpg").write_bytes(b"broken")
    monkeypatch.chdir(folder)
    paths = [os.path.relpath(path) for path in find_images([folder])]
    train(paths, tmp_path / "run")
    seen = Fingerprints.load(tmp_path / "run" / "fingerprints.npz")
    assert sorted(seen.paths) == [os.path.join(folder, path) for path in paths[:-1]]
