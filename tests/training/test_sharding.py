"""A network in parts: pretexts of each kind train so in two processes, and are whole again."""

import os
from pathlib import Path

import pytest
import torch
from test_distributed import SERVER, free_port, place
from torch import nn
from torch.distributed.tensor import DTensor

from tests.conftest import prepared, required
from vissl_lite.data.images import find_images
from vissl_lite.data.stream import ViewDataset
from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.errors import UserError
from vissl_lite.pretext import PRETEXTS, pretext_class
from vissl_lite.training.fit import fit
from vissl_lite.training.hardware import Hardware
from vissl_lite.training.schedule import Schedule
from vissl_lite.training.sharding import check_same_sharding, repeated_blocks
from vissl_lite.training.stream import StreamData


def train(name: str, photos: Path) -> None:
    """Two steps with the pretext's own optimizer, in one of two processes, and what they left."""
    torch.manual_seed(0)
    convolutional = PRETEXTS[name].info.backbones in ("any", "CNN")
    backbone = "test_resnet" if convolutional else "test_vit"
    size = 64 if backbone == "test_vit" else 32
    task = prepared(pretext_class(name)(build_encoder(backbone, size), **required(name)))
    schedule = Schedule(task.optimizer_settings.lr, 0.0, seed=0, batches=2)
    dataset = ViewDataset(find_images([photos]), task.views(), seed=0)
    data = StreamData(dataset, 12, 1, schedule, workers=0)
    before = {key: weight.detach().clone() for key, weight in task.named_parameters()}
    fit(task, data, schedule, Hardware("32-true", devices=2, strategy="fsdp", num_workers=0))
    weights = list(task.parameters())
    assert all(isinstance(weight, DTensor) for weight in weights), name
    kept = sum(weight.to_local().numel() for weight in weights)
    assert kept < 0.55 * sum(weight.numel() for weight in before.values()), name
    whole = task.unsharded()
    if task.global_rank > 0:
        return
    assert type(whole) is pretext_class(name)
    after = dict(whole.named_parameters())
    assert after.keys() == before.keys()
    assert all(weight.isfinite().all() for weight in after.values()), name
    moved = [not torch.equal(after[key], before[key]) for key in before if after[key].requires_grad]
    assert sum(moved) > 0.9 * len(moved), name  # a gradient may be lost in rounding
    assert whole.trained_encoder().eval()(torch.randn(2, 3, size, size)).isfinite().all(), name


def one_of(rank: int, port: int, names: list[str], photos: Path) -> None:
    """One of the processes."""
    os.environ.update(place(rank, 2, port))
    torch.set_num_threads(1)
    for name in names:
        train(name, photos)


@pytest.mark.slow
def test_pretexts_train_sharded(photos: Path) -> None:
    """One of each kind: plain, with a queue, teachers, prototypes, masks, a decoder."""
    port = free_port()
    names = [
        "simclr",
        "moco",
        "dino",
        "dinov2",
        "distillation",
        "swav",
        "mae",
        "spark",
        "ijepa",
        "rotation",
    ]
    started = [SERVER.Process(target=one_of, args=(rank, port, names, photos)) for rank in (0, 1)]
    for process in started:
        process.start()
    for process in started:
        process.join(240)
    assert [process.exitcode for process in started] == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "blocks"), [("resnet18", 8), ("resnet50", 16), ("vit_tiny_patch16_224", 12)]
)
def test_blocks_are_what_a_network_repeats(backbone: str, blocks: int) -> None:
    with torch.device("meta"):
        encoder = build_encoder(backbone, 224)
    found = list(repeated_blocks(encoder))
    assert len(found) == blocks
    assert len({type(block) for block in found}) == 1
    weights = sum(p.numel() for block in found for p in block.parameters())
    assert weights > 0.9 * sum(p.numel() for p in encoder.parameters())


def test_blocks_in_blocks_come_first() -> None:
    inner = [nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(4)]
    outer = [nn.Sequential(*inner[:2]), nn.Sequential(*inner[2:])]
    assert list(repeated_blocks(nn.Sequential(*outer))) == [*inner[:2], *inner[2:], *outer]


@pytest.mark.parametrize(("saved", "sharded"), [({"sharded": True}, False), ({}, True)])
def test_a_run_is_resumed_as_it_began(saved: dict[str, bool], sharded: bool) -> None:
    with pytest.raises(UserError, match=f"with{'' if saved else 'out'} --strategy fsdp: resume"):
        check_same_sharding(saved, sharded)
    check_same_sharding(saved, not sharded)


def test_what_does_not_go_together_is_said_at_once() -> None:
    with pytest.raises(UserError, match=r"--precision auto, 32-true.*not with 16-mixed"):
        Hardware(strategy="fsdp", precision="16-mixed").check()
    with pytest.raises(UserError, match="leave one of them out"):
        Hardware(strategy="fsdp", compile=True).check()
    with pytest.raises(UserError, match="give --strategy fsdp for networks that do not fit"):
        Hardware(strategy="deepspeed_stage_3").check()
    with pytest.raises(UserError, match="--strategy ddp_spawn is not known: there are auto, ddp"):
        Hardware(strategy="ddp_spawn").check()  # trains in child processes
    Hardware(strategy="fsdp", precision="bf16-mixed").check()
    Hardware(strategy="ddp_find_unused_parameters_true").check()
