"""``vissl-lite pretrain`` from pre-trained weights through the command line."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vissl_lite.cli import main
from vissl_lite.commands.pretrain_options import PretrainOptions
from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.encoders.folder import save_encoder
from vissl_lite.training.checkpoints import Checkpoints
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
    assert "% of the weights of the encoder are trained" in (tmp_path / "log.txt").read_text()


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train", "blocks:1"], "--train blocks:1 freezes weights that are random"),
        (["--freeze_share", 0.1], "--freeze_share 0.1 freezes weights that are random"),
        (["--train", "heads"], "--train heads is not all, blocks:N"),
        (["--freeze_share", 1], "--freeze_share 1 is not a share"),
        (["--encoder", "random:test_resnet", "--train", "attn_proj"], "has no attention layers"),
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


def test_heads_go_first_where_weights_are_pre_trained() -> None:
    def share(**given: object) -> float:
        return PretrainOptions(data="images", out="run", **given).frozen_share  # type: ignore[arg-type]

    assert share(encoder="runs/a") == share(encoder="timm:resnet18") == 0.05
    assert share(encoder="runs/a", freeze_share=0) == 0
    assert share() == share(encoder="random:resnet18") == 0
