"""Which weights of an encoder are trained, and from when on."""

from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from vissl_lite.data.image_reader import ImageReader
from vissl_lite.encoders.encoder import Encoder, adapt_encoder, build_encoder
from vissl_lite.errors import UserError
from vissl_lite.pretext.byol import BYOL
from vissl_lite.pretext.moco import MoCo
from vissl_lite.pretext.moco_v3 import MoCoV3
from vissl_lite.training.freezing import FrozenParts, check_parts, select_parameters, train_only
from vissl_lite.training.schedule import Schedule


@pytest.mark.parametrize("backbone", ["test_vit", "test_resnet"])
def test_all_is_every_parameter(backbone: str) -> None:
    encoder = build_encoder(backbone, 32)
    assert select_parameters(encoder, "all") == set(dict(encoder.model.named_parameters()))


@pytest.mark.parametrize(
    ("backbone", "parts", "first_trained", "last_frozen"),
    [
        ("test_vit", "blocks:2", "blocks.4.norm1.weight", "blocks.3.mlp.fc2.bias"),
        ("test_resnet", "blocks:1", "layer4.0.conv1.weight", "layer3.0.downsample.2.bias"),
        # a final norm of its own is not a block, and is trained
        ("convnext_atto", "blocks:1", "stages.3.downsample.0.weight", "stages.2.blocks.5.gamma"),
    ],
)
def test_the_last_blocks_and_what_follows_them(
    backbone: str, parts: str, first_trained: str, last_frozen: str
) -> None:
    encoder = build_encoder(backbone, 32)
    names = list(dict(encoder.model.named_parameters()))
    chosen = select_parameters(encoder, parts)
    assert first_trained in chosen
    assert last_frozen in names
    assert last_frozen not in chosen
    assert chosen == set(names[names.index(first_trained) :])


def test_norms_are_scales_and_shifts_alone() -> None:
    vit = select_parameters(build_encoder("test_vit", 32), "norms")
    assert vit == {
        f"{place}.{name}"
        for place in ("norm", *(f"blocks.{i}.norm{k}" for i in range(6) for k in (1, 2)))
        for name in ("weight", "bias")
    }
    cnn = build_encoder("resnet18", 32)
    shapes = {cnn.model.get_parameter(name).ndim for name in select_parameters(cnn, "norms")}
    assert shapes == {1}


@pytest.mark.parametrize(
    ("backbone", "place"),
    [("test_vit", "blocks.0."), ("swin_tiny_patch4_window7_224", "layers.0.blocks.0.")],
)
def test_attention_projections(backbone: str, place: str) -> None:
    chosen = select_parameters(build_encoder(backbone, 224), "attn_proj")
    first = {name for name in chosen if name.startswith(place)}
    assert first == {f"{place}attn.proj.weight", f"{place}attn.proj.bias"}
    assert all(name.split(".")[-3:-1] == ["attn", "proj"] for name in chosen)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ("attn_proj", "test_resnet has no attention layers"),
        ("blocks:5", "test_resnet has 4 blocks or stages"),
    ],
)
def test_parts_that_a_backbone_lacks(parts: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        select_parameters(build_encoder("test_resnet", 32), parts)


@pytest.mark.parametrize(
    ("backbone", "parts"), [("rdnet_tiny", "blocks:1"), ("poolformer_s12", "blocks:1"),
                            ("dm_nfnet_f0", "norms")],
)  # fmt: skip
def test_what_timm_does_not_tell_apart_is_said_with_a_way_out(backbone: str, parts: str) -> None:
    with torch.device("meta"):
        encoder = Encoder(timm.create_model(backbone, num_classes=0), {}, 64)
    with pytest.raises(UserError, match=f"{backbone} has no .*; --train all trains all of it"):
        select_parameters(encoder, parts)


@pytest.mark.parametrize("parts", ["blocks", "blocks:0", "lora", "lora:0", "lora:-1", "heads"])
def test_parts_that_do_not_exist(parts: str) -> None:
    with pytest.raises(UserError, match="is not all, blocks:N"):
        check_parts(parts)


def test_what_a_pretext_has_frozen_stays_frozen() -> None:
    task = MoCoV3(build_encoder("test_vit", 32))
    train_only(task.encoder, "all")
    assert not task.encoder.model.patch_embed.proj.weight.requires_grad


def adapted_to_bands(backbone: str, bands: int = 5) -> Encoder:
    """An encoder of photographs whose first layer got filters for other bands."""
    scale: dict[str, Any] = {"low": (0.0,) * bands, "high": (1.0,) * bands}
    scale |= {"mean": (0.5,) * bands, "std": (0.25,) * bands}
    reader = ImageReader(bands=tuple(range(bands)), **scale)
    return adapt_encoder(build_encoder(backbone, 32), reader)


@pytest.mark.parametrize(
    ("backbone", "parts"),
    [
        ("test_resnet", "blocks:1"), ("test_resnet", "norms"), ("test_vit", "blocks:2"),
        ("test_vit", "norms"), ("test_vit", "attn_proj"), ("test_vit", "lora:4"),
    ],
)  # fmt: skip
def test_a_first_layer_that_is_adapted_to_other_bands_is_always_trained(
    backbone: str, parts: str
) -> None:
    encoder = adapted_to_bands(backbone)
    first = {"test_resnet": "conv1.0.weight", "test_vit": "patch_embed.proj.weight"}[backbone]
    train_only(encoder, parts)
    trained = {name for name, one in encoder.model.named_parameters() if one.requires_grad}
    assert first in trained
    assert trained == select_parameters(encoder, parts) | {first}
    gray = adapted_to_bands(backbone, bands=1)  # seen like a gray image: it needs no training
    train_only(gray, parts)
    assert not gray.model.get_parameter(first).requires_grad


class Steps:
    """Optimizer steps of BYOL, whose teacher is a moving average, on random images."""

    def __init__(
        self,
        parts: str,
        freeze_share: float,
        backbone: str = "test_resnet",
        encoder: Encoder | None = None,
    ) -> None:
        torch.manual_seed(0)
        encoder = encoder or build_encoder(backbone, 32)
        train_only(encoder, parts)
        self.task, self.bands = BYOL(encoder), encoder.reader.channels
        self.schedule = Schedule(0.1, 0.0, 0, batches=10, freeze_share=freeze_share)
        self.callback = FrozenParts(self.schedule, self.task.encoder)
        self.optimizer: Any = self.task.configure_optimizers()
        self.trainer: Any = SimpleNamespace(
            world_size=1, global_rank=0, optimizers=[self.optimizer]
        )
        self.task.train()

    def step(self, number: int) -> None:
        self.schedule.batches = number
        batch: Any = SimpleNamespace(views=[torch.randn(4, self.bands, 32, 32) for _ in range(2)])
        for callback in (self.schedule, self.callback):
            callback.on_train_batch_start(self.trainer, self.task, batch, 0)
        self.task.loss(batch.views).backward()
        self.callback.on_before_optimizer_step(self.trainer, self.task, self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.task.after_step()

    def changes(self, module: nn.Module, number: int) -> set[str]:
        """Tensors of a module that a step changes."""
        before = {name: value.clone() for name, value in module.state_dict().items()}
        self.step(number)
        after: dict[str, Tensor] = module.state_dict()
        return {name for name in before if not torch.equal(before[name], after[name])}


def test_heads_are_trained_first_and_the_encoder_waits_with_its_statistics() -> None:
    steps = Steps("all", freeze_share=0.2)
    encoders = nn.ModuleList([steps.task.encoder, steps.task.teacher_encoder])
    assert steps.changes(encoders, 0) == set()
    assert steps.changes(steps.task.predictor, 1)
    changed = steps.changes(encoders, 2)
    statistics = {name for name in encoders.state_dict() if "running" in name}
    assert statistics < changed
    assert {"0.model.conv1.0.weight", "1.model.conv1.0.weight"} < changed


def test_frozen_blocks_keep_their_statistics_in_the_teacher_too() -> None:
    steps = Steps("blocks:1", freeze_share=0.0)
    encoder, teacher = steps.task.encoder, steps.task.teacher_encoder
    for module in (encoder, teacher):
        changed = steps.changes(module, 1)
        assert {name.split(".")[1] for name in changed} == {"layer4"}
        assert {
            name for name in encoder.state_dict() if "layer4" in name and "running" in name
        } < changed


def test_an_adapted_first_layer_waits_for_the_heads_like_the_rest_of_the_encoder() -> None:
    steps = Steps("norms", freeze_share=0.2, encoder=adapted_to_bands("test_vit"))
    encoder, teacher = steps.task.encoder, steps.task.teacher_encoder
    assert steps.changes(encoder, 0) == set()
    for number, module in ((2, encoder), (3, teacher)):
        assert "model.patch_embed.proj.weight" in steps.changes(module, number)


def test_a_teacher_that_a_pretext_keeps_in_evaluation_mode_stays_so() -> None:
    task = MoCo(build_encoder("test_resnet", 32))
    schedule = Schedule(0.1, 0.0, 0, batches=10, freeze_share=0.5)
    callback, trainer = FrozenParts(schedule, task.encoder), SimpleNamespace(optimizers=[])
    for schedule.fraction in (0.0, 0.6):
        callback.on_train_batch_start(trainer, task, None, 0)  # type: ignore[arg-type]
        assert task.encoder.model.bn1.training == (schedule.fraction > 0.5)
        assert not task.teacher_encoder.model.bn1.training


def test_a_frozen_encoder_has_no_state_in_the_optimizer() -> None:
    steps = Steps("all", freeze_share=0.5)
    steps.step(0)
    weights = list(steps.task.encoder.parameters())
    assert not any(weight in steps.optimizer.state for weight in weights)
    assert any(weight in steps.optimizer.state for weight in steps.task.predictor.parameters())


def test_without_norms_of_batches_only_the_chosen_weights_move() -> None:
    steps = Steps("norms", freeze_share=0.0, backbone="test_vit")
    chosen = {f"model.{name}" for name in select_parameters(steps.task.encoder, "norms")}
    assert steps.changes(steps.task.encoder, 0) == chosen


def test_low_rank_adapters_move_alone_and_those_of_the_teacher_follow() -> None:
    steps = Steps("lora:4", freeze_share=0.0, backbone="test_vit")
    encoder, teacher = steps.task.encoder, steps.task.teacher_encoder
    chosen = {f"model.{name}" for name in select_parameters(encoder, "lora:4")}
    assert len(chosen) == 6 * 2 * 2
    steps.step(0)  # the first factors have no gradient as long as the second ones are zero
    assert steps.changes(encoder, 1) == chosen
    assert steps.changes(teacher, 2) == chosen
