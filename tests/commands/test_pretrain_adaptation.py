"""``vissl-lite pretrain`` from pre-trained weights through the command line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from vissl_lite.cli import main
from vissl_lite.commands.pretrain_options import PretrainOptions
from vissl_lite.commands.pretrain_setup import make_encoder, make_task, optimizer_settings
from vissl_lite.data.image_survey import ImageSet
from vissl_lite.data.images import find_images
from vissl_lite.encoders.encoder import Encoder, build_encoder
from vissl_lite.encoders.folder import load_encoder, save_encoder
from vissl_lite.errors import UserError
from vissl_lite.evaluation.online import ONLINE_METRICS, EncoderMetrics
from vissl_lite.optim import OptimizerSettings
from vissl_lite.pretext.simclr import SimCLR
from vissl_lite.training.checkpoints import Checkpoints, read_checkpoint
from vissl_lite.training.schedule import Schedule

SMALL = ["--image_size", 32, "--batch_size", 8, "--num_workers", 0]


def run(*arguments: object) -> int:
    return main(["pretrain", *map(str, arguments)])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def changes(before: Path, after: Path) -> set[str]:
    one, other = weights(before), weights(after)
    return {name for name, value in one.items() if not torch.equal(value, other[name])}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that count as pre-trained."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("start")
    save_encoder(build_encoder("test_resnet", 32), folder, {})
    return folder


def test_frozen_stages_are_those_of_the_start(start: Path, photos: Path, tmp_path: Path) -> None:
    options = ["--data", photos, "--encoder", start, *SMALL, "--epochs", 1]
    assert run(*options, "--train", "blocks:1", "--out", tmp_path) == 0
    changed = changes(start, tmp_path / "encoder")
    assert {name.split(".")[0] for name in changed} == {"layer4"}
    log = (tmp_path / "log.txt").read_text()
    assert "% of the weights of the encoder are trained" in log
    assert "adapted to" not in log


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images of five bands."""
    folder, random = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    for number in range(24):
        np.save(folder / f"{number}.npy", random.integers(0, 4000, (32, 32, 5)).astype(np.int16))
    return folder


LAST_STAGE = ["--train", "blocks:1", "--freeze_share", 0]


def test_filters_for_bands_that_the_start_does_not_know_are_trained(
    start: Path, scenes: Path, tmp_path: Path
) -> None:
    options = ["--data", scenes, "--encoder", start, *SMALL, "--epochs", 2, *LAST_STAGE]
    assert run(*options, "--out", tmp_path) == 0
    before, after = weights(start), weights(tmp_path / "encoder")
    mean = before.pop("conv1.0.weight").mean(dim=1) * 3 / 5
    filters = after["conv1.0.weight"]
    assert not any(torch.equal(filters[:, band], mean) for band in range(5))
    assert not torch.allclose(filters[:, 0], filters[:, 1], atol=1e-6, rtol=0)
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert {name.split(".")[0] for name in changed} == {"layer4"}
    log = (tmp_path / "log.txt").read_text()
    assert log.count("conv1.0.weight, adapted to those of the images, is trained") == 1


@pytest.mark.slow
def test_filters_for_other_bands_are_trained_after_a_resume(
    start: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--data", scenes, "--encoder", start, *SMALL, "--epochs", 2, *LAST_STAGE]
    assert run(*options, "--out", tmp_path / "whole") == 0
    interrupted(monkeypatch, 3, *options, "--out", tmp_path / "resumed")
    assert_equal_weights(tmp_path / "whole" / "encoder", tmp_path / "resumed" / "encoder")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT whose weights count as pre-trained."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vit")
    save_encoder(build_encoder("test_vit", 32), folder, {})
    return folder


def test_low_rank_adapters_end_up_in_the_weights_of_attention(
    vit: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The online evaluation sees the weights that are saved in the end."""
    images, seen = torch.randn(4, 3, 32, 32), []

    def measure(self: EncoderMetrics, encoder: Encoder, counts: object) -> dict[str, float]:
        with torch.no_grad():
            seen.append(encoder.eval()(images))
        unlabelled = [name for name in ONLINE_METRICS if name not in ("knn", "linear")]
        return dict.fromkeys(unlabelled, 1.0) | {"effective_rank": 9.0}

    monkeypatch.setattr(EncoderMetrics, "__call__", measure)
    options = ["--data", photos, "--encoder", vit, *SMALL, "--epochs", 2]
    assert run(*options, "--train", "lora:4", "--out", tmp_path) == 0
    folder = tmp_path / "encoder"
    assert weights(vit).keys() == weights(folder).keys()
    assert changes(vit, folder) == {
        f"blocks.{block}.attn.{layer}.weight" for block in range(6) for layer in ("qkv", "proj")
    }
    with torch.no_grad():
        first, last = (load_encoder(one).eval()(images) for one in (vit, folder))
    torch.testing.assert_close(seen[0], first)
    torch.testing.assert_close(seen[-1], last, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(first, last, atol=1e-3)


class KilledError(Exception):
    """Stands for whatever ends a process at the worst moment."""


def interrupted(monkeypatch: pytest.MonkeyPatch, after: int, *options: object) -> None:
    """A run that is killed right after the checkpoint of a step, then resumed."""
    saved = Checkpoints.on_train_batch_end

    def save_then_die(self, trainer, module, outputs, batch, batch_idx):
        self.save(trainer)
        if next(c for c in trainer.callbacks if isinstance(c, Schedule)).batches == after:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "on_train_batch_end", save_then_die)
        with pytest.raises(KilledError):
            run(*options)
    assert Checkpoints.on_train_batch_end is saved
    assert run(*options, "--resume") == 0


def assert_equal_weights(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], msg=name, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("last_step", [2, 5])
def test_resume_while_the_encoder_is_frozen_and_after(
    last_step: int, start: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 9 steps, 4 train the heads alone. BYOL has a teacher with BatchNorms of its own."""
    options = ["--data", photos, "--encoder", start, *SMALL, "--epochs", 3, "--pretext", "byol"]
    options += ["--freeze_share", 0.4, "--train", "blocks:2"]
    assert run(*options, "--out", tmp_path / "whole") == 0
    interrupted(monkeypatch, last_step, *options, "--out", tmp_path / "resumed")
    assert changes(start, tmp_path / "whole" / "encoder")
    assert_equal_weights(tmp_path / "whole" / "encoder", tmp_path / "resumed" / "encoder")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [("--pretext", "dino"), ("--pretext", "moco_v3", "--ema", 0.9)], ids=["dino", "ema"]
)
def test_adapters_are_resumed_with_those_of_teachers_and_averages(
    options: tuple[object, ...],
    vit: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ("--data", photos, "--encoder", vit, *SMALL, "--epochs", 2, *options)
    options += ("--train", "lora:4")
    assert run(*options, "--out", tmp_path / "whole") == 0
    interrupted(monkeypatch, 4, *options, "--out", tmp_path / "resumed")
    assert changes(vit, tmp_path / "whole" / "encoder")
    assert_equal_weights(tmp_path / "whole" / "encoder", tmp_path / "resumed" / "encoder")


@pytest.mark.slow
def test_an_average_of_the_encoder_is_what_is_saved_also_after_a_resume(
    start: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--data", photos, "--encoder", start, *SMALL, "--epochs", 2, "--ema", 0.9]
    assert run(*options, "--out", tmp_path / "whole") == 0
    interrupted(monkeypatch, 4, *options, "--out", tmp_path / "resumed")
    saved = weights(tmp_path / "whole" / "encoder")
    state = read_checkpoint(tmp_path / "whole" / "checkpoints" / "last.ckpt")["state_dict"]
    for name in ("conv1.0.weight", "bn1.running_mean"):
        assert torch.equal(saved[name], state[f"average.model.{name}"])
        assert not torch.equal(saved[name], state[f"encoder.model.{name}"])
    assert_equal_weights(tmp_path / "whole" / "encoder", tmp_path / "resumed" / "encoder")


def test_an_average_is_nearly_the_encoder_after_the_first_steps(
    start: Path, photos: Path, tmp_path: Path
) -> None:
    options = ["--data", photos, "--encoder", start, *SMALL, "--freeze_share", 0, "--warmup", 0]
    assert run(*options, "--epochs", 1, "--batch_size", 24, "--ema", 0.999, "--out", tmp_path) == 0
    state = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["state_dict"]
    saved, before = weights(tmp_path / "encoder"), weights(start)
    for name in ("conv1.0.weight", "bn1.running_mean"):
        trained = state[f"encoder.model.{name}"]
        assert not torch.equal(trained, before[name])
        torch.testing.assert_close(saved[name], 0.1 * before[name] + 0.9 * trained)


def test_gentle_rates_where_weights_are_pre_trained() -> None:
    def settings(backbone: str = "test_vit", **given: object) -> OptimizerSettings:
        options = PretrainOptions(data="images", out="run", **given)  # type: ignore[arg-type]
        return optimizer_settings(options, make_task(options, build_encoder(backbone, 32)), 256, 24)

    assert settings().lr == pytest.approx(SimCLR.optimizer_settings.lr)
    assert settings(encoder="random:test_vit") == settings()
    assert settings(encoder="runs/a").lr == pytest.approx(settings().lr / 10)
    assert settings(encoder="runs/a").head_scale == 10  # the heads are random
    for given in ({"lr": 0.3}, {"base_lr": 0.3}):
        found = settings(encoder="runs/a", **given)
        assert (found.lr, found.head_scale) == (0.3, 1)
    assert settings().layer_decay == 1
    assert settings(encoder="runs/a").layer_decay == 0.75
    assert settings("test_resnet", encoder="runs/a").layer_decay == 1
    assert settings(encoder="runs/a", layer_decay=0.9).layer_decay == 0.9
    assert settings(encoder="runs/a", train="lora:4") == settings()


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({}, "all"),
        ({"encoder": "random:test_vit"}, "all"),
        ({"encoder": "runs/a"}, "blocks:2"),
        ({"encoder": "runs/a", "train": "all"}, "all"),
    ],
)
def test_diet_trains_the_last_blocks_of_pre_trained_weights(
    given: dict[str, Any], parts: str
) -> None:
    options = PretrainOptions(data="images", out="run", pretext="diet", **given)
    assert options.trained_parts == parts
    assert PretrainOptions(data="images", out="run", encoder="runs/a").trained_parts == "all"


def test_layer_decay_is_that_of_the_encoder_alone() -> None:
    options = PretrainOptions(data="images", out="run", encoder="runs/a", layer_decay=0.5)
    task = make_task(options, build_encoder("test_vit", 32))
    task.optimizer_settings = optimizer_settings(options, task, 256, 24)
    groups = task.configure_optimizers().param_groups
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    blocks = task.encoder.model.blocks
    assert [scale[id(block.norm1.weight)] for block in blocks[-3:]] == [0.25, 0.5, 1.0]
    assert {scale[id(parameter)] for parameter in task.head.parameters()} == {10.0}


@pytest.mark.parametrize("pretext", ["simclr", "simsiam"])  # which builds its own optimizer
def test_layer_decay_leaves_out_filters_for_other_bands(pretext: str) -> None:
    options = PretrainOptions(data="images", out="run", encoder="runs/a", pretext=pretext)
    encoder = build_encoder("test_vit", 32)
    encoder.adapted_inputs = frozenset({"patch_embed.proj.weight"})
    task = make_task(options, encoder)
    task.optimizer_settings = optimizer_settings(options, task, 256, 24)
    groups = task.configure_optimizers().param_groups
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    embed = task.encoder.model.patch_embed.proj
    assert scale[id(embed.weight)] == 1
    assert scale[id(embed.bias)] == pytest.approx(0.75**6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train", "blocks:1"], "--train blocks:1 freezes weights that are random"),
        (["--freeze_share", 0.1], "--freeze_share 0.1 freezes weights that are random"),
        (["--train", "heads"], "--train heads is not all, blocks:N"),
        (
            ["--encoder", "random:test_vit", "--train", "norms"],
            "--train norms freezes weights that",
        ),
        (
            ["--encoder", "random:test_vit", "--freeze_share", 0.1],
            "freezes weights that are random",
        ),
        (["--freeze_share", 1], "--freeze_share 1 is not a share"),
        (["--ema", 1], "--ema 1 is not a share"),
        (["--layer_decay", 0], "--layer_decay 0 is not a share"),
        (["--ema", 0.9, "--pretext", "dino"], "dino saves its momentum teacher"),
        (
            ["--backbone", "poolformer_s12", "--layer_decay", 0.8],
            "--layer_decay: timm does not say which layers",
        ),
    ],
)
def test_mistakes(
    options: list[object],
    message: str,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("--data", photos, "--out", tmp_path / "run", *SMALL, *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_parts_that_the_pre_trained_backbone_lacks(
    start: Path, vit: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for encoder, parts, message in (
        (vit, "lora:64", "have 64 features, and the rank"),
        (start, "attn_proj", "has no attention layers"),
    ):
        options = ["--encoder", encoder, "--train", parts, "--out", tmp_path / "run"]
        assert run("--data", photos, *SMALL, *options) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_heads_go_first_where_weights_are_pre_trained() -> None:
    def share(**given: object) -> float:
        return PretrainOptions(data="images", out="run", **given).frozen_share  # type: ignore[arg-type]

    assert share(encoder="runs/a") == share(encoder="timm:resnet18") == 0.05
    assert share(encoder="runs/a", freeze_share=0) == 0
    assert share() == share(encoder="random:resnet18") == 0


def test_diet_has_a_class_for_each_image(start: Path, photos: Path, tmp_path: Path) -> None:
    options = ["--data", photos, "--encoder", start, *SMALL, "--epochs", 1, "--train", "blocks:2"]
    assert run(*options, "--pretext", "diet", "--out", tmp_path) == 0
    state = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["state_dict"]
    assert len(state["head.weight"]) == 24
    changed = changes(start, tmp_path / "encoder")
    assert {name.split(".")[0] for name in changed} == {"layer3", "layer4"}


@pytest.mark.slow
def test_weights_that_have_become_worse_are_a_warning_of_the_run(
    start: Path, photos: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = weights(start)["conv1.0.weight"]

    def measure(self: EncoderMetrics, encoder: Encoder, counts: object) -> dict[str, float]:
        untouched = torch.equal(encoder.model.conv1[0].weight, first)
        knn = 0.9 if untouched else 0.2
        return dict.fromkeys(ONLINE_METRICS, 1.0) | {"effective_rank": 9.0, "knn": knn}

    monkeypatch.setattr(EncoderMetrics, "__call__", measure)
    options = ["--data", photos, "--encoder", start, *SMALL, "--epochs", 1]
    assert run(*options, "--probe_data", labelled, "--out", tmp_path) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["before"]["knn"], results["knn"]) == (0.9, 0.2)
    record = json.loads((tmp_path / "run.json").read_text())
    assert [one["code"] for one in record["warnings"]] == ["features.forgotten"]
    assert "This is a weak hint" in (tmp_path / "log.txt").read_text()


def test_the_default_size_is_that_of_the_images_where_the_weights_can_be_built_for_it(
    photos: Path, tmp_path: Path
) -> None:
    images = ImageSet(find_images([photos]))
    name = "test_coatnet"  # whose tables of positions depend on the size
    plain = timm.create_model(name, num_classes=0)
    torch.save(plain.state_dict(), tmp_path / "weights.pt")
    timm.models.save_for_hf(plain, tmp_path / "hub", safe_serialization=True)
    untrained = make_encoder(name, None, None, images, "simclr")
    from_file = make_encoder(name, None, tmp_path / "weights.pt", images, "simclr")
    from_hub = make_encoder(None, None, tmp_path / "hub", images, "simclr")
    sizes = {one.image_size for one in (untrained, from_file, from_hub)}
    assert len(sizes) == 1
    assert sizes.pop() < 160  # of the weights
    for key, value in from_file.model.state_dict().items():
        torch.testing.assert_close(from_hub.model.state_dict()[key], value, msg=key)
    fixed = timm.create_model("levit_128s", num_classes=0)  # whose tables timm does not resample
    timm.models.save_for_hf(fixed, tmp_path / "fixed", safe_serialization=True)
    assert make_encoder(None, None, tmp_path / "fixed", images, "simclr").image_size == 224


def test_a_file_without_its_backbone_is_told_to_name_it(photos: Path, tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "weights.pt")
    images = ImageSet(find_images([photos]))
    with pytest.raises(UserError, match=r"not those of resnet18: .*another backbone .--backbone"):
        make_encoder(None, 64, tmp_path / "weights.pt", images, "simclr")
