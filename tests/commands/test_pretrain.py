"""``vissl-lite pretrain`` through the command line: what it writes, resume, time budget, DDP."""

import csv
import json
import math
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import required, with_pictures
from vissl_lite.cli import main
from vissl_lite.commands import pretrain_setup
from vissl_lite.commands.pretrain import (
    MIN_MAP_IMAGES,
    batch_cost,
    choose_batch_size,
    images_on_map,
    loading_code,
    pretrain,
)
from vissl_lite.commands.pretrain_options import PretrainOptions
from vissl_lite.commands.pretrain_setup import (
    default_backbone,
    dropped_tokens,
    long_run_defaults,
    make_task,
    short_run_defaults,
    uses_small_views,
)
from vissl_lite.encoders.encoder import Encoder, build_encoder
from vissl_lite.encoders.folder import save_encoder
from vissl_lite.errors import UserError
from vissl_lite.evaluation import online
from vissl_lite.evaluation.embedding import MAP_IMAGES
from vissl_lite.evaluation.online import ONLINE_METRICS, EncoderMetrics
from vissl_lite.options import parse_time
from vissl_lite.pretext import PRETEXTS
from vissl_lite.pretext.base import check_backbone
from vissl_lite.pretext.simclr import SimCLR
from vissl_lite.run import read_config
from vissl_lite.training.checkpoints import Checkpoints, read_checkpoint
from vissl_lite.training.open_schedule import OpenSchedule
from vissl_lite.transfer.classification.data import load_labelled

SMALL = ["--backbone", "test_resnet", "--image_size", "32", "--batch_size", "8"]


def run(*arguments: str | Path) -> int:
    return main(["pretrain", *map(str, arguments)])


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "encoder" / "model.safetensors")


def assert_equal_weights(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], msg=name, atol=1e-6, rtol=1e-5)


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(photos: Path, labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    with with_pictures():
        status = run(
            "--data", photos, "--out", out, "--epochs", 4, "--num_workers", 0, *SMALL,
            "--probe_data", labelled, "--pretext.temperature", 0.3,
        )  # fmt: skip
    assert status == 0
    return out


@pytest.mark.gpu
@pytest.mark.slow
def test_writes_an_encoder_that_plain_timm_loads(finished: Path) -> None:
    model = timm.create_model(f"local-dir:{finished / 'encoder'}", pretrained=True).eval()
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, model.num_features)


@pytest.mark.gpu
@pytest.mark.slow
def test_writes_results_curves_log_and_config(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert results["steps"] == 12
    assert results["epochs"] == 4
    assert 0 <= results["knn"] <= 1
    assert 0 <= results["linear"] <= 1
    assert 0 < results["evaluation_share"] < 1
    assert results["stopped"] is None
    assert "Online evaluation took" in (finished / "log.txt").read_text()
    assert (finished / "curves.png").stat().st_size > 5000
    assert "simclr on test_resnet at 32 pixels" in (finished / "log.txt").read_text()
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["pretext"]["temperature"] == 0.3
    assert config["batch_size"] == 8


def test_logs_the_curve_of_every_measure(finished: Path) -> None:
    table = rows(finished)
    for name in ("loss", "lr", "images_per_second", "data_wait", "epoch"):
        assert [float(row[name]) for row in table if row[name]], name
    for name in ONLINE_METRICS:
        assert len([row for row in table if row[name]]) >= 2, name  # before and after


@pytest.mark.slow
def test_its_config_repeats_the_run(finished: Path, tmp_path: Path) -> None:
    assert run("--config", finished / "config.yaml", "--out", tmp_path / "again") == 0
    assert_equal_weights(finished, tmp_path / "again")


@pytest.mark.slow
def test_another_seed_gives_another_encoder(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "other"
    assert run("--config", finished / "config.yaml", "--out", out, "--seed", 1) == 0
    same = [
        torch.equal(a, b)
        for a, b in zip(weights(finished).values(), weights(out).values(), strict=True)
    ]
    assert not all(same)


@pytest.mark.slow
def test_workers_change_nothing(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "workers"
    assert run("--config", finished / "config.yaml", "--out", out, "--num_workers", 2) == 0
    assert_equal_weights(finished, out)


class KilledError(Exception):
    """Stands for whatever ends a process at the worst moment."""


# What there is to save: weights alone, a queue and a teacher, a center, masks, another's teacher.
STATES = (
    ("simclr", 1), ("simclr", 6), ("moco", 5), ("dino", 5), ("dinov2", 5), ("mae", 5),
    ("diet", 5), ("distillation", 5), ("distillation --pretext.fixed_views=true", 5),
)  # fmt: skip


def backbone_for(pretext: str) -> list[str]:
    transformer = PRETEXTS[pretext].info.backbones not in ("any", "CNN")
    return ["--backbone", "test_vit" if transformer else "test_resnet"]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(("pretext", "last_step"), STATES)
def test_resume_continues_as_if_nothing_had_happened(
    pretext: str, last_step: int, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of an epoch (of 3 steps) and at the end of one."""
    from vissl_lite.training.schedule import Schedule

    pretext, *words = pretext.split()
    options = ["--data", photos, *SMALL[2:], "--epochs", 3, "--pretext", pretext, *words]
    options += ["--num_workers", 0, *backbone_for(pretext)]
    options += [f"--pretext.{name}={value}" for name, value in required(pretext).items()]
    assert run(*options, "--out", tmp_path / "whole") == 0

    saved = Checkpoints.on_train_batch_end

    def save_then_die(self, trainer, module, outputs, batch, batch_idx):
        self.save(trainer)
        schedule = next(c for c in trainer.callbacks if isinstance(c, Schedule))
        if schedule.batches == last_step:
            raise KilledError

    monkeypatch.setattr(Checkpoints, "on_train_batch_end", save_then_die)
    with pytest.raises(KilledError):
        run(*options, "--out", tmp_path / "resumed")
    monkeypatch.setattr(Checkpoints, "on_train_batch_end", saved)
    assert not (tmp_path / "resumed" / "encoder").exists()
    assert run("--out", tmp_path / "resumed", "--resume") == 0
    assert_equal_weights(tmp_path / "whole", tmp_path / "resumed")
    steps = [int(row["step"]) for row in rows(tmp_path / "resumed")]
    assert steps == sorted(set(steps))


@pytest.mark.slow
def test_resume_between_accumulated_batches(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the first of two batches of a step: it goes on from the step before."""
    from vissl_lite.training.schedule import Schedule

    options = ["--data", photos, *SMALL, "--epochs", 4, "--pretext", "byol"]
    options += ["--accumulate_grad_batches", 2]
    assert run(*options, "--out", tmp_path / "whole") == 0
    assert json.loads((tmp_path / "whole" / "results.json").read_text())["steps"] == 6

    def hurry_then_die(self, trainer, module, outputs, batch, batch_idx):
        self._saved_at = -1e9  # due at once
        on_time(self, trainer, module, outputs, batch, batch_idx)
        if next(c for c in trainer.callbacks if isinstance(c, Schedule)).batches == 5:
            raise KilledError

    on_time = Checkpoints.on_train_batch_end
    monkeypatch.setattr(Checkpoints, "on_train_batch_end", hurry_then_die)
    with pytest.raises(KilledError):
        run(*options, "--out", tmp_path / "resumed")
    monkeypatch.setattr(Checkpoints, "on_train_batch_end", on_time)
    assert run("--out", tmp_path / "resumed", "--resume") == 0
    assert_equal_weights(tmp_path / "whole", tmp_path / "resumed")


@pytest.mark.slow
def test_accumulation_says_what_it_does_not_do(photos: Path, tmp_path: Path) -> None:
    options = ["--data", photos, *SMALL, "--epochs", 1, "--accumulate_grad_batches", 2]
    compared = "compares one only with the 7 others"
    statistics = "the statistics in the loss of barlow_twins are those of 8 images"
    for pretext, said in (("simclr", compared), ("barlow_twins", statistics), ("byol", "")):
        out = tmp_path / pretext
        assert run(*options, "--pretext", pretext, "--out", out) == 0
        log = (out / "log.txt").read_text()
        assert "each optimizer step uses 2 batches of 8 images" in log
        assert [text in log for text in (compared, statistics)] == [
            said == compared,
            said == statistics,
        ]


@pytest.mark.slow
def test_upright_reaches_the_views(photos: Path, tmp_path: Path) -> None:
    options = ["--data", photos, *SMALL, "--epochs", 1]
    assert run(*options, "--out", tmp_path / "up") == 0
    assert run(*options, "--upright", "false", "--out", tmp_path / "any") == 0
    up, any_way = weights(tmp_path / "up"), weights(tmp_path / "any")
    assert not all(torch.equal(up[name], any_way[name]) for name in up)


@pytest.mark.slow
def test_views_grow_to_their_size(photos: Path, tmp_path: Path) -> None:
    options = ["--data", photos, "--backbone", "test_resnet", "--image_size", 64]
    options += ["--batch_size", 8, "--epochs", 5, "--num_workers", 0]
    grown = ["--progressive_resizing", "true", "--out", tmp_path / "grown"]
    assert run(*options, *grown) == 0
    sizes = [float(row["view_size"]) for row in rows(tmp_path / "grown") if row["view_size"]]
    assert sizes[0] == sizes[-1] == 64  # the first step is a whole one, to try out the memory
    assert sizes[1] == 32
    assert sizes[1:] == sorted(sizes[1:])
    config = json.loads((tmp_path / "grown" / "encoder" / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [3, 64, 64]
    assert run(*options, "--out", tmp_path / "plain") == 0
    grown_weights, plain_weights = weights(tmp_path / "grown"), weights(tmp_path / "plain")
    assert not all(torch.equal(grown_weights[name], plain_weights[name]) for name in plain_weights)


def test_short_runs_change_colors_less(monkeypatch: pytest.MonkeyPatch) -> None:
    def color(pretext: Any = "simclr", images: int = 1000, **given: Any) -> float | None:
        options = PretrainOptions(data="x", out="y", pretext=pretext, **given)
        return short_run_defaults(options, images).get("color")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert color(epochs=250) == color(max_time="00:30:00") == 0.25
    assert color(epochs=251) is color(max_time="00:30:01") is color(max_time="auto") is None
    assert color(epochs=1, encoder="timm:resnet18") is None
    assert color(epochs=1, encoder="random:resnet18") == 0.25
    assert color({"name": "simclr", "color": 0.5}, epochs=1) is None
    assert color("byol", epochs=1) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert color(epochs=250) == 0.25
    assert color(max_time=60) is None  # a GPU sees many images in a minute


def test_the_momentum_of_a_teacher_rises_with_the_length_of_the_run() -> None:
    def momentum(pretext: Any, images: int, batch: int = 256, **given: Any) -> float | None:
        options = PretrainOptions(data="x", out="y", pretext=pretext, **given)
        return long_run_defaults(options, images, batch).get("momentum")

    assert momentum("dino", 2500, epochs=100) is None  # short
    assert momentum("dino", 1_280_000, epochs=100) == momentum("ibot", 10**7, epochs=100) == 0.9995
    assert momentum("dinov2", 1_280_000, epochs=100) == 0.994
    # The teacher averages over as many images, but never less long than in a short run.
    assert [momentum("dino", 10**7, b, epochs=100) for b in (64, 1024, 8192)] == [
        0.9995,
        0.998,
        0.99,
    ]
    middle = math.sqrt(250_000 * 128_000_000)
    between = 1 - math.sqrt(0.01 * 0.0005)
    assert momentum("dino", round(middle), epochs=1) == pytest.approx(between, abs=1e-5)
    assert momentum({"name": "dino", "momentum": 0.99}, 10**7, epochs=100) is None
    assert (
        momentum("dino", 10**7, max_time=3600) is momentum("dino", 10**7, max_time="auto") is None
    )
    assert momentum("dino", 10**7, epochs=100, encoder="timm:test_vit") is None
    assert momentum("byol", 10**7, epochs=100) is None


def test_a_short_run_says_what_it_changes(photos: Path, tmp_path: Path) -> None:
    options = ["--data", photos, "--backbone", "test_resnet", "--image_size", 32]
    options += ["--batch_size", 8, "--epochs", 1, "--num_workers", 0]
    said = "The run is short: --pretext.color is 0.25 by default"
    assert run(*options, "--out", tmp_path / "short") == 0
    assert read_config(tmp_path / "short")["pretext"]["color"] == 0.25
    assert said in (tmp_path / "short" / "log.txt").read_text()
    assert run(*options, "--pretext.color", 0.5, "--out", tmp_path / "given") == 0
    assert read_config(tmp_path / "given")["pretext"]["color"] == 0.5
    assert said not in (tmp_path / "given" / "log.txt").read_text()


@pytest.mark.parametrize(
    ("precision", "pretext", "more"),
    [("bf16-true", "byol", []), ("16-true", "simclr", ["--ema", 0.9])],
)
def test_averages_of_coarse_weights_are_refused(
    precision: str,
    pretext: str,
    more: list[object],
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--data", photos, "--out", tmp_path / "out", "--backbone", "test_resnet"]
    words += ["--pretext", pretext, "--precision", precision, *more]
    assert run(*words) == 2
    mixed = precision.replace("true", "mixed")
    assert f"would stand still: give --precision {mixed}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_compiling_is_refused_where_it_has_no_effect(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", photos, "--out", tmp_path / "out", "--backbone", "test_resnet"]
    assert run(*words, "--pretext", "spark", "--image_size", 64, "--compile", "true") == 2
    assert "--compile: it makes spark no faster" in capsys.readouterr().err


def test_views_that_fit_at_first_must_fit_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """HRNet takes 32 and 64 pixels, and none of those between."""

    def check(self: Encoder, size: int) -> None:
        if size % 32:
            raise UserError(f"{size} pixels")

    options = PretrainOptions(data="x", out="y", epochs=4)
    task = make_task(options, build_encoder("test_resnet", 64))
    assert uses_small_views(options, task, 50)
    monkeypatch.setattr(Encoder, "check_image_size", check)
    assert not uses_small_views(options, task, 50)


def test_views_grow_by_default_where_they_can_and_the_run_is_long_enough() -> None:
    def resizes(pretext: Any = "simclr", size: int = 64, steps: int = 50, **given: Any) -> bool:
        backbone = backbones.get(str(pretext), "test_resnet")
        options = PretrainOptions(data="x", out="y", pretext=pretext, **given)
        return uses_small_views(options, make_task(options, build_encoder(backbone, size)), steps)

    backbones = {"mae": "test_vit", "dino": "test_convnext"}

    assert resizes(epochs=4)
    assert resizes(max_time=60)
    assert not resizes(epochs=3)  # 150 steps
    assert not resizes(max_time=59)
    assert not resizes(epochs=4, size=48)
    assert not resizes(pretext="mae", epochs=4)
    assert resizes(pretext="dino", epochs=4, size=224)
    assert not resizes(pretext="dino", epochs=4, size=96)  # local crops would have 16 pixels
    with pytest.raises(UserError, match=r"--progressive_resizing: test_convnext .* 16 pixels"):
        resizes(pretext="dino", epochs=4, size=96, progressive_resizing=True)
    assert not resizes(epochs=4, progressive_resizing=False)
    assert resizes(epochs=1, progressive_resizing=True)
    assert not resizes(epochs=4, encoder="runs/a")
    assert resizes(epochs=4, encoder="random:test_resnet")
    taught = {"name": "distillation", "teacher": "random:test_vit"}
    assert not resizes(pretext=taught, epochs=4)
    assert resizes(pretext=taught, epochs=4, progressive_resizing=True)


def test_masked_views_can_not_grow(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data", photos, "--out", tmp_path / "run", "--pretext", "mae"]
    assert run(*options, "--backbone", "test_vit", "--progressive_resizing", "true") == 2
    error = capsys.readouterr().err
    assert "the views of mae can't change their size; those of rotation, diet, simclr" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("pretext", "backbone", "share", "message"),
    [
        ("mae", "test_vit", 0.5, "mae needs all tokens of its views; rotation, diet, simclr"),
        ("densecl", "test_vit", 0.5, "densecl needs all tokens of its views"),
        ("simclr", "test_resnet", 0.5, "needs a plain ViT, which test_resnet is not: try one of"),
        ("simclr", "test_vit", 0.95, r"--token_drop 0.95 must be in [0, 0.9]"),
    ],
)
def test_tokens_that_can_not_be_dropped(
    pretext: str,
    backbone: str,
    share: float,
    message: str,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--data", photos, "--out", tmp_path / "run", "--image_size", 32]
    options += ["--pretext", pretext, "--backbone", backbone, "--token_drop", share]
    assert run(*options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "jigsaw" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "pretext", "backbone", "steps", "share"),
    [
        (None, "simclr", "vit_slim_patch4_32", 2, 0.5),
        (None, "simclr", "vit_slim_patch4_32", 1, 0.0),  # 100 steps are too few to begin with less
        (None, "simclr", "test_resnet", 2, 0.0),
        (None, "byol", "vit_slim_patch4_32", 2, 0.0),  # not measured
        (None, "mae", "vit_slim_patch4_32", 2, 0.0),
        (0.3, "simclr", "vit_slim_patch4_32", 1, 0.3),
        (0.0, "simclr", "vit_slim_patch4_32", 2, 0.0),
    ],
)
def test_tokens_are_dropped_where_possible(
    given: float | None, pretext: str, backbone: str, steps: int, share: float
) -> None:
    options = PretrainOptions(
        data="images", out="run", pretext=pretext, token_drop=given, epochs=100
    )
    assert dropped_tokens(options, make_task(options, build_encoder(backbone, 32)), steps) == share


@pytest.mark.parametrize(
    ("size", "given", "share"),
    [
        (96, {}, 0.5),
        (96, {"progressive_resizing": True}, 0.5),  # four of nine patches are left at first
        (64, {}, 0.5),
        (64, {"progressive_resizing": True}, 0.0),  # two of four would be
        (96, {"encoder": "timm:test_vit"}, 0.0),
        (96, {"encoder": "random:test_vit"}, 0.5),
        (96, {"max_time": "00:00:59", "epochs": None}, 0.0),
        (96, {"max_time": "00:01:00", "epochs": None}, 0.5),
    ],
)
def test_tokens_are_dropped_by_default_where_enough_are_left(
    size: int, given: dict[str, Any], share: float
) -> None:
    options = PretrainOptions(**{"data": "images", "out": "run", "epochs": 100, **given})
    task = make_task(options, build_encoder("test_vit", size))
    assert dropped_tokens(options, task, batches_per_epoch=2) == share


@pytest.mark.slow
def test_a_vit_starts_with_small_views_and_half_of_their_patches(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default, and ``config.yaml`` says so, so that ``--resume`` goes on in the same way."""
    monkeypatch.setattr(pretrain_setup, "MIN_PHASES_STEPS", 1)
    options = ["--data", photos, "--backbone", "test_vit", "--image_size", 96, "--batch_size", 8]
    assert run(*options, "--epochs", 4, "--num_workers", 0, "--out", tmp_path) == 0
    config = read_config(tmp_path)
    assert (config["progressive_resizing"], config["token_drop"]) == (True, 0.5)
    found = [(float(r["view_size"]), float(r["token_drop"])) for r in rows(tmp_path) if r["loss"]]
    assert found[0] == (96, 0)  # a whole step, to try out the memory
    assert found[1] == (48, 0.5)
    assert found[-1] == (96, 0)
    assert "without 50 % of the patches" in (tmp_path / "log.txt").read_text()


@pytest.mark.slow
def test_a_run_sees_more_tokens_towards_its_end(photos: Path, tmp_path: Path) -> None:
    options = ["--data", photos, *SMALL[2:], "--epochs", 4, "--num_workers", 0]
    options += ["--backbone", "vit_slim_patch4_32", "--token_drop", 0.5]
    assert run(*options, "--out", tmp_path) == 0
    shares = [float(row["token_drop"]) for row in rows(tmp_path) if row["token_drop"]]
    assert shares == [0.0] + [0.5] * 9 + [0.25] + [0.0]
    assert "without 50 % of the patches" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize(
    ("resizing", "dropped", "expected"),
    [(False, 0.0, [1.0] * 3), (True, 0.0, [0.25, 1.0, 1.0]), (True, 0.9, [0.025, 0.55, 1.0])],
)
def test_later_batches_are_expected_to_take_longer(
    resizing: bool, dropped: float, expected: list[float]
) -> None:
    options = PretrainOptions(data="photos", out="run", progressive_resizing=resizing)
    costs = [batch_cost(options, dropped, fraction) for fraction in (0.1, 0.85, 0.95)]
    assert costs == pytest.approx(expected)


def test_resuming_a_finished_run_gives_its_result(
    finished: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "results.json").read_text()
    assert run("--out", finished, "--resume") == 0
    assert "Nothing is left to resume" in " ".join(capsys.readouterr())
    result = pretrain(data=str(photos), out=str(finished), resume=True)
    assert result.steps == 12
    assert (finished / "results.json").read_text() == before


@pytest.mark.slow
def test_the_same_command_resumes_a_run_whose_backbone_has_a_tag(
    photos: Path, tmp_path: Path
) -> None:
    options = ["--data", photos, *SMALL, "--epochs", 1, "--resume", "--out", tmp_path / "run"]
    for _ in range(2):  # as a job script does
        assert run(*options, "--backbone", "test_resnet.r160_in1k") == 0


@pytest.mark.slow
def test_a_checkpoint_with_a_pickle_is_never_executed(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    out = tmp_path / "run"
    assert run("--data", photos, *SMALL, "--epochs", 1, "--out", out) == 0
    (out / "results.json").unlink()
    torch.save({"state_dict": {}, "global_step": 1, "bomb": Bomb()}, out / "checkpoints/last.ckpt")
    assert run("--out", out, "--resume") == 2
    assert "never executed" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()


@pytest.mark.slow
def test_a_time_budget_is_kept_schedule_and_all(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that goes on by 20 ms each time that anybody looks at it."""
    begun, looks = time.monotonic(), count()
    monkeypatch.setattr(time, "monotonic", lambda: begun + next(looks) / 50)
    assert run("--data", photos, *SMALL, "--max_time", 12, "--out", tmp_path / "run",
               "--num_workers", 0) == 0  # fmt: skip
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["seconds"] == pytest.approx(12, rel=0.1)
    assert results["steps"] > 20
    rates = [float(row["lr"]) for row in rows(tmp_path / "run") if row["lr"]]
    assert max(rates) > 0.9 * max(rates[len(rates) // 20 :])
    assert rates[-1] < 0.05 * max(rates)


@pytest.mark.slow
def test_an_open_length_ends_by_itself(
    photos: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluations cost nothing here, and find the same accuracy each time from the third on."""
    accuracies = count()

    def measure(self: EncoderMetrics, encoder: Any, counts: Any) -> dict[str, float]:
        knn = min(next(accuracies), 3) / 4
        return dict.fromkeys(ONLINE_METRICS, 1.0) | {"effective_rank": 9.0, "knn": knn}

    monkeypatch.setattr(EncoderMetrics, "__call__", measure)
    monkeypatch.setattr(OpenSchedule, "evaluated", with_spacing_one(OpenSchedule.evaluated))
    out = tmp_path / "run"
    options = ["--data", photos, *SMALL, "--probe_data", labelled, "--num_workers", 0]
    assert run(*options, "--max_time", "auto", "--epochs", 40, "--out", out) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["stopped"] == "plateau"
    assert results["epochs"] < 36
    rates = [float(row["lr"]) for row in rows(out) if row["lr"]]
    assert rates[-1] < 0.1 * max(rates)
    log = (out / "log.txt").read_text()
    assert "it ends when knn has stopped improving, after 40.0 epochs at most" in log
    assert "The cool-down begins in epoch" in log
    assert "The run ended by itself after" in log
    assert "images per second: at most 40 epochs take about" in log
    assert yaml.safe_load((out / "config.yaml").read_text())["max_time"] == "auto"


def color_folders(folder: Path, images: int) -> None:
    """Write a class folder of each of three colors, with images of different brightness."""
    for channel, name in enumerate(("red", "green", "blue")):
        (folder / name).mkdir(parents=True)
        for index in range(images):
            color = np.eye(3)[channel] * (100 + 10 * index)
            image = Image.fromarray(np.tile(color.astype(np.uint8), (32, 32, 1)))
            image.save(folder / name / f"{index}.png")


def test_watching_never_uses_the_test_images_of_probe(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Class folders without parts, of which every command makes the same test part."""
    color_folders(tmp_path / "set", 10)
    watched = []

    class Noted(EncoderMetrics):
        def __init__(self, paths: Any, labelled: Any, *more: Any) -> None:
            watched.extend([*labelled.train.paths, *labelled.val.paths])
            super().__init__(paths, labelled, *more)

    monkeypatch.setattr("vissl_lite.commands.pretrain.EncoderMetrics", Noted)
    options = ["--data", photos, *SMALL, "--num_workers", 0, "--epochs", 1]
    assert run(*options, "--probe_data", tmp_path / "set", "--out", tmp_path / "run") == 0
    test = set(load_labelled(tmp_path / "set").test.paths)
    assert len(watched) == 24
    assert len(test) == 6
    assert not test.intersection(watched)


def test_labelled_images_of_which_none_can_be_held_out_are_refused(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    color_folders(tmp_path / "set" / "train", 1)
    color_folders(tmp_path / "set" / "test", 2)
    options = ["--data", photos, *SMALL, "--epochs", 1, "--out", tmp_path / "run"]
    assert run(*options, "--probe_data", tmp_path / "set") == 2
    assert "has no validation images, and each class has a single" in capsys.readouterr().err


def with_spacing_one(evaluated: Callable[..., None]) -> Callable[..., None]:
    """``OpenSchedule.evaluated`` as if evaluations cost nothing."""

    def wrapped(self: OpenSchedule, scores: dict[str, float] | None) -> None:
        self.min_spacing = 1
        evaluated(self, scores)

    return wrapped


def test_an_open_length_has_a_limit() -> None:
    options = partial(PretrainOptions, data="photos", out="run", max_time="Auto")
    assert options().open_ended
    assert options().seconds is None
    assert options().max_epochs == 100
    assert options(epochs=7).max_epochs == 7
    assert PretrainOptions(data="photos", out="run", max_time=60).max_epochs is None


@pytest.mark.parametrize(
    ("images", "processes", "expected"),
    [(1000, 1, 128), (101, 1, 101), (101, 2, 100), (1000, 3, 126), (1000, 200, 200)],
)
def test_the_default_batch_is_shared_equally(images: int, processes: int, expected: int) -> None:
    assert choose_batch_size(None, images, processes) == expected


def test_there_are_fewer_images_than_devices() -> None:
    with pytest.raises(UserError, match="at least 8 images, one per device, found 7"):
        choose_batch_size(None, 7, 8)


def test_times() -> None:
    for text, seconds in (("00:15:00", 900), ("90", 90), (90, 90), ("02:30", 150),
                          ("1-00:00:01", 86401)):  # fmt: skip
        assert parse_time(text) == seconds, text
    for text in ("soon", "0", "-5", "1:2:3:4:5"):
        with pytest.raises(UserError, match="max_time"):
            parse_time(text)


@pytest.mark.slow
def test_yaml_may_name_the_pretext_alone(photos: Path, tmp_path: Path) -> None:
    config = {"data": [str(photos)], "pretext": "rotation", "epochs": 1, "batch_size": 8}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**config, "backbone": "test_resnet"}))
    out = tmp_path / "run"
    assert run("--config", tmp_path / "c.yaml", "--out", out, "--image_size", 32) == 0
    assert any(row.get("accuracy") for row in rows(out))


@pytest.mark.slow
def test_training_starts_from_a_run_a_folder_or_a_state_dict(
    finished: Path, photos: Path, tmp_path: Path
) -> None:
    torch.save(weights(finished), tmp_path / "weights.pth")
    for number, init in enumerate((finished, finished / "encoder", tmp_path / "weights.pth")):
        out = tmp_path / str(number)
        assert run("--data", photos, "--out", out, *SMALL, "--epochs", 1, "--encoder", init,
                   "--lr", 1e-12, "--num_workers", 0) == 0  # fmt: skip
        for name, tensor in weights(out).items():
            if "running" not in name and "num_batches" not in name:
                said = f"{name} from {init}"
                torch.testing.assert_close(tensor, weights(finished)[name], msg=said)


@pytest.mark.slow
def test_broken_images_are_named_and_too_many_stop_the_run(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few, many = tmp_path / "few", tmp_path / "many"
    for folder, images in ((few, 2), (many, 12)):
        folder.mkdir()
        for index in range(images):
            (folder / f"broken{index}.jpg").write_bytes(b"not an image")
    assert run("--data", photos, few, *SMALL, "--epochs", 1, "--out", tmp_path / "a") == 0
    log = (tmp_path / "a" / "log.txt").read_text()
    assert "broken0.jpg" in log
    assert "broken1.jpg" in log
    capsys.readouterr()
    assert run("--data", photos, many, *SMALL, "--epochs", 5, "--out", tmp_path / "b") == 2
    assert "of 36 images can't be read" in capsys.readouterr().err


@pytest.mark.slow
def test_a_collapse_is_said_in_plain_words(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def push_all_together(self: SimCLR, views: list[torch.Tensor]) -> torch.Tensor:
        for parameter in self.encoder.parameters():
            parameter.data.mul_(0.0)
        return sum(p.sum() * 0 for p in self.parameters())  # type: ignore[return-value]

    monkeypatch.setattr(SimCLR, "loss", push_all_together)
    out = tmp_path / "run"
    assert run("--data", photos, *SMALL, "--epochs", 1, "--out", out) == 0
    log = (out / "log.txt").read_text()
    assert "has collapsed" in log
    assert "--lr" in log
    results = json.loads((out / "results.json").read_text())
    assert results["collapsed"] is True
    assert results["steps"] == 3
    assert results["stopped"] is None
    assert [line for line in results["warnings"] if "has collapsed" in line]


@pytest.mark.slow
@pytest.mark.parametrize(("accumulate", "steps"), [(1, 14), (4, 5)])
def test_a_collapse_may_end_the_run(
    accumulate: int, steps: int, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends cleanly, at the first evaluation after the warm-up, and its encoder is there.

    Batch 14 of 24 is the first that collapses, or of accumulated ones batch 17, as a step has the
    progress of its start; a step of several batches is completed. If the run is killed before it
    has written its results, it writes the same ones when it is resumed.
    """
    loss = SimCLR.loss

    def collapse_at_last(self: SimCLR, views: list[torch.Tensor]) -> torch.Tensor:
        if self.progress > 0.5:
            for parameter in self.encoder.parameters():
                parameter.data.mul_(0.0)
        return loss(self, views)

    monkeypatch.setattr(SimCLR, "loss", collapse_at_last)
    monkeypatch.setattr(online, "TIME_SHARE", 100)  # an evaluation after every step
    out = tmp_path / "run"
    options = ["--data", photos, *SMALL, "--epochs", 8, "--on_collapse", "stop", "--out", out]
    assert run(*options, "--accumulate_grad_batches", accumulate) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["stopped"] == "collapsed"
    assert results["steps"] == steps
    assert results["epochs"] == steps * accumulate / 3
    assert any("as --on_collapse stop asks for" in line for line in results["warnings"])
    assert weights(out)
    assert run("--out", out, "--resume") == 0  # it is done
    (out / "results.json").unlink()
    assert run("--out", out, "--resume") == 0
    again = json.loads((out / "results.json").read_text())
    for name in ("stopped", "steps", "collapsed"):
        assert again[name] == results[name]


@pytest.mark.slow
@pytest.mark.parametrize("bad", ["loss", "weights"])
def test_a_loss_that_is_no_number_ends_the_run_and_leaves_a_good_checkpoint(
    bad: str,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    loss, saved = SimCLR.loss, Checkpoints.on_train_batch_end

    def spoilt(self: SimCLR, views: list[torch.Tensor]) -> torch.Tensor:
        late = self.progress >= 0.5
        return loss(self, views) * (float("nan") if late and bad == "loss" else 1)

    def spoil_then_save(self, trainer, module, outputs, batch, batch_idx):
        if module.progress >= 0.5 and bad == "weights":
            next(module.encoder.parameters()).data.fill_(float("inf"))
        self._saved_at = -1e9  # due after every step
        saved(self, trainer, module, outputs, batch, batch_idx)

    monkeypatch.setattr(SimCLR, "loss", spoilt)
    monkeypatch.setattr(Checkpoints, "on_train_batch_end", spoil_then_save)
    out = tmp_path / "run"
    assert run("--data", photos, *SMALL, "--epochs", 8, "--lr", 0.01, "--out", out) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "simclr has diverged: after step 13" in error
    assert "lower --lr (it was 0.01)" in error
    assert "simclr has diverged" in (out / "log.txt").read_text()
    assert not (out / "results.json").exists()
    state = read_checkpoint(out / "checkpoints" / "last.ckpt")
    assert state["global_step"] == 12
    assert all(tensor.isfinite().all() for tensor in state["state_dict"].values())


@pytest.mark.slow
def test_a_run_no_better_than_guessing_is_warned_of(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def guess(self: SimCLR, views: list[torch.Tensor]) -> torch.Tensor:
        return math.log(15) + sum(p.sum() * 0 for p in self.parameters())  # type: ignore[return-value]

    monkeypatch.setattr(SimCLR, "loss", guess)
    out = tmp_path / "run"
    assert run("--data", photos, *SMALL, "--epochs", 10, "--out", out) == 0
    warnings = json.loads((out / "results.json").read_text())["warnings"]
    assert [line for line in warnings if "simclr does no better than chance" in line]


@pytest.mark.slow
def test_tensorboard_gets_the_curves_where_it_is_installed(finished: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(finished / "tensorboard")).Reload()
    table = rows(finished)
    for name in (*ONLINE_METRICS, "loss", "lr", "epoch"):
        curve = [(event.step, pytest.approx(event.value)) for event in events.Scalars(name)]
        assert curve == [(int(row["step"]), float(row[name])) for row in table if row[name]], name
    out = tmp_path / "none"
    assert run("--config", finished / "config.yaml", "--out", out, "--logger", "none") == 0
    assert not (out / "tensorboard").exists()


@pytest.mark.slow
def test_the_default_backbone_suits_the_pretext() -> None:
    for name, size, backbone in (
        ("simclr", 32, "resnet18"),
        ("spark", 224, "resnet18"),
        ("mae", 32, "vit_tiny_patch4_32"),
        ("ibot", 224, "vit_tiny_patch16_224"),
    ):
        assert default_backbone(name, size) == backbone
        with torch.device("meta"):
            encoder = build_encoder(backbone, size)
        check_backbone(PRETEXTS[name].info, encoder)  # else it raises


@pytest.mark.slow
def test_from_python_with_a_vit(photos: Path, tmp_path: Path) -> None:
    import vissl_lite

    result = vissl_lite.pretrain(
        data=[str(photos)],
        out=str(tmp_path / "run"),
        pretext={"name": "rotation", "min_crop_scale": 0.8},
        backbone="test_vit",
        image_size=32,
        epochs=1,
        batch_size=8,
        num_workers=0,
    )
    assert result.encoder == tmp_path / "run" / "encoder"
    assert {"loss", "feature_std", "effective_rank"} <= result.metrics.keys()
    assert vissl_lite.load_encoder(result.run).backbone == "test_vit"


@pytest.mark.parametrize("backbone", ["test_resnet", "vit_slim_patch4_32"])
def test_the_printed_lines_load_the_encoder(backbone: str, tmp_path: Path) -> None:
    save_encoder(build_encoder(backbone, 32), tmp_path, {})
    lines = loading_code(tmp_path, backbone)
    assert ("vissl_lite" in "\n".join(lines[:-1])) == (backbone != "test_resnet")
    exec("\n".join(lines))


@pytest.mark.parametrize(
    ("spent", "seconds_per_image", "images"),
    [(300, 0.06, 150), (60, 0.1, MIN_MAP_IMAGES), (3600, 0.001, MAP_IMAGES), (60, 0, MAP_IMAGES)],
)
def test_the_map_of_a_short_run_has_fewer_images(
    spent: float, seconds_per_image: float, images: int
) -> None:
    """Three hundredths of five minutes are nine seconds."""
    assert images_on_map(spent, seconds_per_image) == images
