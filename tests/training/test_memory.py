"""Out of memory gives the batch that would fit."""

from pathlib import Path

import pytest
import torch

from vissl_lite.cli import main
from vissl_lite.pretext.simclr import SimCLR
from vissl_lite.training.memory import largest_that_fits, peak_memory


@pytest.mark.parametrize(("room", "found"), [(100, 64), (64, 64), (63, 32), (2, 2), (1, 0)])
def test_halves_until_it_fits(room: int, found: int) -> None:
    tried = []

    def try_out(size: int) -> None:
        tried.append(size)
        if size > room:
            raise torch.OutOfMemoryError("out of memory")

    assert largest_that_fits(try_out, lambda: None, too_large=128) == found
    assert tried == sorted(tried, reverse=True)


@pytest.mark.slow
def test_a_run_that_does_not_fit_says_what_would(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    loss = SimCLR.loss

    def loss_with_little_memory(self: SimCLR, views: list[torch.Tensor]) -> torch.Tensor:
        if len(views[0]) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(self, views)

    monkeypatch.setattr(SimCLR, "loss", loss_with_little_memory)
    options = ["--backbone", "test_resnet", "--image_size", "32", "--epochs", "1"]
    where = ["--data", str(photos), "--out", str(tmp_path / "run")]
    assert main(["pretrain", *where, *options, "--batch_size", "16"]) == 2
    error = capsys.readouterr().err
    assert "--batch_size 16 does not fit" in error
    assert "--batch_size 4 --accumulate_grad_batches 4" in error
    assert main(["pretrain", *where, *options, "--batch_size", "4", "--overwrite"]) == 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux only")
def test_the_peak_stays_when_memory_is_given_back() -> None:
    cpu = torch.device("cpu")
    before = peak_memory(cpu)
    assert before is not None
    block = torch.ones(before // 4)  # as many bytes as there are
    del block
    after = peak_memory(cpu)
    assert after is not None
    assert after > before
