"""Optimizer and initial weights of ``vissl-lite pretrain`` through the command line."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vissl_lite.cli import main
from vissl_lite.commands.pretrain_options import PretrainOptions
from vissl_lite.commands.pretrain_setup import make_task, optimizer_settings
from vissl_lite.encoders.encoder import Encoder, build_encoder, open_residual_branches
from vissl_lite.encoders.folder import load_encoder, save_encoder
from vissl_lite.errors import UserError
from vissl_lite.optim import OptimizerSettings
from vissl_lite.pretext import PRETEXTS
from vissl_lite.pretext.base import PretextTask
from vissl_lite.pretext.modules.positions import sine_cosine_positions
from vissl_lite.training.checkpoints import Checkpoints, read_checkpoint
from vissl_lite.training.schedule import Schedule

SMALL = ["--image_size", 32, "--batch_size", 8, "--num_workers", 0, "--backbone", "test_vit"]
OPTIONS = [*SMALL, "--pretext", "mae", "--epochs", 2]
OPTIONS += ["--weight_decay", 0.1, "--weight_decay_end", 0.3, "--betas", 0.8, 0.9]
OPTIONS += ["--clip_norm", 0.5]


def run(*arguments: object) -> int:
    return main(["pretrain", *map(str, arguments)])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "encoder" / "model.safetensors")


class KilledError(Exception):
    """Stands for whatever ends a process."""


def test_options_of_the_optimizer_also_after_a_resume(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert run("--data", photos, "--out", whole, *OPTIONS) == 0
    decays = []

    def note(self, trainer, module, outputs, batch, batch_idx):
        groups = trainer.optimizers[0].param_groups
        decays.append({group["decayed"]: group["weight_decay"] for group in groups})
        self.save(trainer)
        if next(c for c in trainer.callbacks if isinstance(c, Schedule)).batches == 3:
            raise KilledError

    monkeypatch.setattr(Checkpoints, "on_train_batch_end", note)
    with pytest.raises(KilledError):
        run("--data", photos, "--out", resumed, *OPTIONS)
    assert run("--data", photos, "--out", resumed, *OPTIONS, "--resume") == 0

    assert [decay[False] for decay in decays] == [0.0] * 6
    rising = [decay[True] for decay in decays]
    assert rising == pytest.approx([0.1, 0.1134, 0.15, 0.2, 0.25, 0.2866], abs=1e-4)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(tensor, weights(resumed)[name], msg=name, atol=1e-6, rtol=1e-5)
    checkpoint = read_checkpoint(whole / "checkpoints" / "last.ckpt")
    groups = checkpoint["optimizer_states"][0]["param_groups"]
    assert {tuple(group["betas"]) for group in groups} == {(0.8, 0.9)}


def test_positions_are_fixed_with_random_weights_and_trained_with_others(
    photos: Path, tmp_path: Path
) -> None:
    save_encoder(build_encoder("test_vit", 32), tmp_path / "start", {})
    options = ["--data", photos, *SMALL, "--epochs", 1, "--pretext", "ijepa"]
    assert run(*options, "--out", tmp_path / "random") == 0
    positions = weights(tmp_path / "random")["pos_embed"]
    torch.testing.assert_close(positions[0, 1:], sine_cosine_positions(2, 2, 64))
    assert positions[0, 0].count_nonzero() == 0
    given = ["--encoder", tmp_path / "start", "--freeze_share", 0, "--pretext.momentum", 0]
    assert run(*options, *given, "--out", tmp_path / "given") == 0
    before = load_file(tmp_path / "start" / "model.safetensors")["pos_embed"]
    after = weights(tmp_path / "given")["pos_embed"]
    assert 0 < (after - before).abs().max() < 0.1


def settings(pretext: str, images: int = 1000, **given: object) -> OptimizerSettings:
    options = PretrainOptions(data="images", out="run", pretext=pretext, **given)  # type: ignore[arg-type]
    return optimizer_settings(
        options, make_task(options, build_encoder("test_vit", 32)), 256, images
    )


def test_residual_branches_open_at_half_of_their_scale() -> None:
    last = ("layer1.0.bn2", "layer2.0.bn2", "layer3.0.bn3", "layer4.0.bn2")
    encoder = build_encoder("test_resnet", 32)
    scales = [encoder.model.get_submodule(name).weight for name in last]
    assert not any(scale.any() for scale in scales)
    open_residual_branches(encoder)
    assert all((scale == 0.5).all() for scale in scales)
    # a baseline begins like the training that is compared with it
    baseline = load_encoder("random:test_resnet", 32).model
    assert (baseline.get_submodule(last[0]).weight == 0.5).all()


@pytest.mark.parametrize(
    ("source", "epochs", "opened"),
    [
        ("random:test_resnet", "1", True),
        ("random:test_resnet", "20000000", False),  # as in the papers
        ("folder", "1", False),
    ],
)
def test_branches_open_with_random_weights_unless_a_run_is_long(
    source: str,
    epochs: str,
    opened: bool,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if source == "folder":
        source = str(tmp_path / "folder")
        save_encoder(build_encoder("test_resnet", 32), Path(source), {})
    found = []

    def make(options: PretrainOptions, encoder: Encoder) -> PretextTask:
        found.append(bool(encoder.model.get_submodule("layer1.0.bn2").weight.any()))
        raise UserError("enough")

    monkeypatch.setattr("vissl_lite.commands.pretrain.make_task", make)
    given = ("--data", photos, "--out", tmp_path / "run", "--encoder", source, "--epochs", epochs)
    assert main(["pretrain", *map(str, given), "--batch_size", "8"]) == 2
    assert found == [opened]


@pytest.mark.parametrize(
    ("pretext", "of_paper"),
    [
        ("mae", 1.5e-4),
        ("simmim", 1e-4),
        ("ijepa", 1.25e-4),
        ("moco_v3", 1.5e-4),
        ("dino", 5e-4),
        ("ibot", 5e-4),
    ],
)
def test_the_learning_rate_of_long_runs_is_that_of_the_paper(pretext: str, of_paper: float) -> None:
    lr = PRETEXTS[pretext].optimizer_settings.lr

    def rate(images: int, **given: Any) -> float:
        return settings(pretext, images, **given).lr

    assert rate(1000, epochs=250) == lr
    assert rate(1_281_167, epochs=200) == pytest.approx(of_paper)
    # sqrt(250,000 * 128,000,000) images lie in the middle
    assert rate(5_656_854, epochs=1) == pytest.approx((lr * of_paper) ** 0.5)
    assert rate(1_281_167, epochs=200, lr=0.3) == 0.3
    for length in ({"max_time": "48:00:00"}, {"max_time": "auto", "epochs": 200}):
        assert rate(1_281_167, **length) == lr
    assert rate(1_281_167, epochs=200, encoder="somewhere") == pytest.approx(lr / 10)


def test_a_weight_decay_without_an_end_does_not_change() -> None:
    assert settings("dino").weight_decay_end == 0.4
    assert settings("dino", weight_decay=0.1).weight_decay_end is None
    assert settings("dino", weight_decay_end=0.2).weight_decay == 0.04
    assert settings("simclr", weight_decay=0.1, weight_decay_end=0.2).weight_decay_end == 0.2


def test_betas_and_clipping_are_those_of_the_pretext_unless_given() -> None:
    assert settings("mae").betas == (0.9, 0.95)
    assert settings("mae", optimizer="sgd", lr=0.1).betas is None
    assert settings("simmim").clip_norm == 5
    assert settings("simmim", clip_norm=0).clip_norm == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--betas", 0.9], "--betas 0.9 is not 2 values of the type float"),
        (["--betas", 1, 0.9], "--betas [1, 0.9] must be two numbers in [0, 1)"),
        (["--optimizer", "sgd", "--lr", 0.1, "--betas", 0.9, 0.95], "--betas: sgd has none"),
        (["--clip_norm", -1], "--clip_norm -1 must not be negative"),
        (["--weight_decay_end", -1], "--weight_decay_end -1 must not be negative"),
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
