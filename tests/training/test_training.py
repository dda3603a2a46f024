from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import lightning.pytorch as pl
import pytest
import timm
import torch

from vissl_lite.data.reading import Broken
from vissl_lite.data.stream import Batch, Lost
from vissl_lite.errors import UserError
from vissl_lite.training import hardware
from vissl_lite.training.checkpoints import AtomicCheckpointIO, read_checkpoint
from vissl_lite.training.hardware import choose_precision
from vissl_lite.training.stream import BrokenImages


@pytest.mark.parametrize(
    ("backbone", "has_bf16", "expected"),
    [
        ("test_resnet", True, "bf16-mixed"),
        ("test_vit", True, "bf16-mixed"),
        ("test_resnet", False, "32-true"),
        ("mobilenetv3_small_050", True, "32-true"),  # depthwise convolutions gain nothing
        ("convnext_atto", True, "32-true"),
    ],
)
def test_auto_precision_on_the_cpu(
    backbone: str, has_bf16: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "cpu_gains_from_bf16", lambda: has_bf16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = timm.create_model(backbone, num_classes=0)
    assert choose_precision("auto", model) == expected
    assert choose_precision("64-true", model) == "64-true"


@pytest.mark.parametrize(
    ("supported", "seconds", "expected"),
    [(True, (1, 2), True), (True, (2, 1), False), (False, (1, 2), False)],
)
def test_bf16_is_used_where_its_products_are_faster(
    supported: bool, seconds: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = dict(zip((torch.bfloat16, torch.float32), seconds, strict=True))
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    monkeypatch.setattr(hardware, "_product_seconds", taken.__getitem__)
    hardware.cpu_gains_from_bf16.cache_clear()
    assert hardware.cpu_gains_from_bf16() is expected
    hardware.cpu_gains_from_bf16.cache_clear()


@pytest.mark.parametrize(("world", "batches"), [(1, 5), (4, 2)])
def test_each_process_counts_broken_images_among_its_own(world: int, batches: int) -> None:
    """A fifth of 40 images, or of the ten that one of four processes reads in an epoch."""
    callback = BrokenImages(40)
    trainer: Any = SimpleNamespace(world_size=world)

    def step(number: int) -> None:
        broken = [Broken(f"{number}-{i}.png", "cut short") for i in range(2)]
        batch = Batch([], torch.arange(5), broken, [])
        callback.on_train_batch_start(trainer, pl.LightningModule(), batch, number)

    for number in range(batches - 1):
        step(number)
    with pytest.raises(UserError, match=f"^{2 * batches} of [0-9]+ images can't be read"):
        step(batches)


def test_a_broken_shard_counts_among_all_images() -> None:
    """Four of 40 images, all of a shard, of which each of eight processes was to read a part."""
    callback = BrokenImages(40)
    trainer: Any = SimpleNamespace(world_size=8)
    batch = Batch([], torch.arange(5), [], [], lost=[Lost("a.tar", 4, "cut short")])
    callback.on_train_batch_start(trainer, pl.LightningModule(), batch, 0)
    batch = batch._replace(lost=[Lost("b.tar", 5, "cut short")])
    with pytest.raises(UserError, match=r"^9 of 40 images can't be read"):
        callback.on_train_batch_start(trainer, pl.LightningModule(), batch, 1)


def test_a_product_takes_time_and_no_random_numbers() -> None:
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        assert 0 < hardware._product_seconds(torch.float32) < 10
    assert torch.equal(torch.get_rng_state(), state)


def test_a_checkpoint_that_fails_halfway_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"global_step": 1}, file)

    def write_half(content: dict, opened: BinaryIO) -> None:
        opened.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", write_half)
    with pytest.raises(OSError, match="disk full"):
        AtomicCheckpointIO().save_checkpoint({"global_step": 2}, file)
    assert read_checkpoint(file) == {"global_step": 1}
    assert [one.name for one in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_damaged_checkpoint_is_the_users_to_know(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(UserError, match=r"last\.ckpt can't be loaded"):
        read_checkpoint(tmp_path / "last.ckpt")


def test_tf32_is_for_training_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with hardware.tf32():
        assert torch.get_float32_matmul_precision() == "highest"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with hardware.tf32():
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_gpu_that_emulates_bf16_gets_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    assert choose_precision("auto", torch.nn.Identity()) == "16-mixed"
