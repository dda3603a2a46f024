"""kill -9 at any moment: the same command goes on, or starts again, as if nothing had happened."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.faults.conftest import send_at, without_times
from vissl_lite import run_record
from vissl_lite.commands import finetune, predict, pretrain, probe
from vissl_lite.comparison.store import Store
from vissl_lite.metrics_file import MetricsFile
from vissl_lite.training.checkpoints import AtomicCheckpointIO

Training = Callable[[str, Path, int], list[object]]
Same = Callable[[Path, Path], None]
Undisturbed = Callable[..., Path]

MOMENTS = {
    "before run.json": (run_record.RunRecord, "write", 0),
    "while run.json is written": (os, "replace", 0),
    "while config.yaml is written": (os, "replace", 1),
    "while a checkpoint is written": (os, "fsync", 0),
    "before the next row of metrics": (MetricsFile, "add", 3),
    "while metrics are written": (MetricsFile, "flush", 2),
    "after the last step": (pretrain, "save_encoder", 0),
    "before the results": (pretrain, "write_results", 0),
    "after the results": (pretrain, "add_report", 0),
    "before the end is written": (run_record.RunRecord, "write", 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_pretraining_goes_on(
    moment: str,
    fork: Any,
    training: Training,
    undisturbed: Undisturbed,
    same: Same,
    tmp_path: Path,
) -> None:
    owner, name, call = MOMENTS[moment]
    out, words = tmp_path / "killed", [*training("pretrain", tmp_path / "killed", 4)]
    inside = ["--num_workers", 0]
    killed = fork(*words, *inside, before=send_at(call, signal.SIGKILL, owner, name))
    assert killed.status() == -signal.SIGKILL, killed.text()
    assert fork(*words, *inside, "--resume").status() == 0
    same(out, undisturbed("pretrain", 4, *inside))


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (AtomicCheckpointIO, "save_checkpoint", 1),
        (MetricsFile, "add", 6),
        (finetune, "write_results", 0),
        (finetune, "add_report", 0),
    ],
)
def test_a_finetuning_goes_on(
    owner: Any,
    name: str,
    call: int,
    fork: Any,
    training: Training,
    undisturbed: Undisturbed,
    same: Same,
    tmp_path: Path,
) -> None:
    out, words = tmp_path / "killed", training("finetune", tmp_path / "killed", 8)
    inside = ["--num_workers", 0]
    killed = fork(*words, *inside, before=send_at(call, signal.SIGKILL, owner, name))
    assert killed.status() == -signal.SIGKILL, killed.text()
    assert fork(*words, *inside, "--resume").status() == 0
    same(out, undisturbed("finetune", 8, *inside))


def test_a_run_is_not_resumed_on_other_images(
    fork: Any, training: Training, photos: Path, tmp_path: Path
) -> None:
    out, data = tmp_path / "run", tmp_path / "photos"
    data.mkdir()
    for number, photo in enumerate(sorted(photos.rglob("*.jpg"))):
        (data / f"{number}.jpg").write_bytes(photo.read_bytes())
    words = [*training("pretrain", out, 4), "--data", data, "--num_workers", 0]
    killed = fork(*words, before=send_at(0, signal.SIGKILL, pretrain, "save_encoder"))
    assert killed.status() == -signal.SIGKILL
    (data / "new.jpg").write_bytes((data / "0.jpg").read_bytes())
    refused = fork(*words, "--resume")
    assert refused.status() == 2
    assert "are not those that the run began with (24 then, 25 now)" in refused.last_line()
    (data / "new.jpg").unlink()
    assert fork(*words, "--resume").status() == 0


def test_a_run_is_resumed_by_its_own_command(
    fork: Any, training: Training, labelled: Path, encoder_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = ["probe", "--encoder", encoder_folder, "--data", labelled, "--out", out]
    assert fork(*words).status() == 0
    refused = fork(*training("pretrain", out, 1), "--resume")
    assert refused.status() == 2
    assert "holds a run of probe, which pretrain can't resume" in refused.last_line()


def results(out: Path) -> Any:
    return without_times(json.loads((out / "results.json").read_text()))


def test_a_comparison_goes_on(
    fork: Any, labelled: Path, encoder_folder: Path, tmp_path: Path
) -> None:
    def words(out: Path) -> list[object]:
        return ["compare", "--encoder", encoder_folder, "--data", labelled, "--out", out,
                "--protocols", "knn", "--shots", 2]  # fmt: skip

    killed = fork(*words(tmp_path / "killed"), before=send_at(3, signal.SIGKILL, Store, "keep"))
    assert killed.status() == -signal.SIGKILL, killed.text()
    assert fork(*words(tmp_path / "killed"), "--resume").status() == 0
    assert fork(*words(tmp_path / "whole"), "--resume").status() == 0  # there is none: it starts
    assert results(tmp_path / "killed") == results(tmp_path / "whole")


def test_what_can_not_go_on_starts_again(
    fork: Any, labelled: Path, encoder_folder: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    model = undisturbed("finetune", 8, "--num_workers", 0)
    commands: dict[str, tuple[Any, list[object]]] = {
        "probe": (probe, ["--encoder", encoder_folder, "--data", labelled]),
        "predict": (predict, ["--model", model, "--data", labelled]),
    }
    for name, (module, options) in commands.items():
        out = tmp_path / name
        words = [name, *options, "--out", out]
        at = send_at(0, signal.SIGKILL, module, "write_results")
        assert fork(*words, before=at).status() == -signal.SIGKILL
        refused = fork(*words)
        assert refused.status() == 2
        assert refused.last_line().endswith("give a new folder, or --overwrite")
        assert fork(*words, "--overwrite").status() == 0
        assert fork(*words[:-1], tmp_path / f"{name}-whole").status() == 0
        assert results(out) == results(tmp_path / f"{name}-whole")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_killed_again_and_again(
    command: str,
    seed: int,
    fork: Any,
    training: Training,
    undisturbed: Undisturbed,
    same: Same,
    tmp_path: Path,
) -> None:
    """At moments by chance, a data worker included, until it comes to its end."""
    chance, epochs = random.Random(seed), 30
    out = tmp_path / "killed"
    started = time.monotonic()
    whole = undisturbed(command, epochs)
    length = max(2.0, time.monotonic() - started) if seed == 0 else 6.0
    for _ in range(6):
        child = fork(*training(command, out, epochs), "--resume")
        end = time.monotonic() + chance.uniform(0, length)
        while child.running() and time.monotonic() < end:
            time.sleep(0.005)
        if not child.running():
            break
        child.send(signal.SIGKILL, group=chance.random() < 0.5)
        child.status()
    assert fork(*training(command, out, epochs), "--resume").status() == 0
    same(out, whole)


OTHERS = ("probe", "predict", "compare", "embed", "explore", "export")
SUFFIX = {"embed": ".npz", "explore": ".html", "export": ".onnx"}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("command", OTHERS)
def test_any_command_is_killed_and_starts_again(
    command: str,
    seed: int,
    fork: Any,
    labelled: Path,
    photos: Path,
    encoder_folder: Path,
    undisturbed: Undisturbed,
    tmp_path: Path,
) -> None:
    """At a moment by chance; the same command then gives what it gives undisturbed."""
    model = undisturbed("finetune", 8, "--num_workers", 0)
    options: dict[str, list[object]] = {
        "probe": ["--encoder", encoder_folder, "--data", labelled],
        "predict": ["--model", model, "--data", photos],
        "compare": ["--encoder", encoder_folder, "--data", labelled, "--protocols", "knn",
                    "--shots", 2],
        "embed": ["--encoder", encoder_folder, "--data", photos],
        "explore": ["--encoder", encoder_folder, "--data", photos],
        "export": ["--encoder", encoder_folder],
    }  # fmt: skip
    suffix = SUFFIX.get(command, "")
    out, whole = tmp_path / f"killed{suffix}", tmp_path / f"whole{suffix}"
    begun = time.monotonic()
    assert fork(command, *options[command], "--out", whole).status() == 0
    moment = random.Random(seed).uniform(0, time.monotonic() - begun)
    child = fork(command, *options[command], "--out", out)
    time.sleep(moment)
    if child.running():
        child.send(signal.SIGKILL)
    child.status()
    again = fork(command, *options[command], "--out", out, "--overwrite")
    assert again.status() == 0, again.text()
    if suffix:
        assert out.is_file()
        if suffix == ".npz":
            mine, theirs = np.load(out), np.load(whole)
            assert (mine["features"] == theirs["features"]).all()
    else:
        assert results(out) == results(whole)
    assert not list(tmp_path.rglob("*.part"))


def test_the_clock_of_a_time_budget_is_not_the_one_that_people_set(
    fork: Any, training: Training, tmp_path: Path
) -> None:
    """A jump of the date by a day, forwards and back, ends nothing and prolongs nothing."""
    real, jumps = time.time, iter(np.tile([86400.0, -86400.0], 10**5))
    budget = ["--epochs", "null", "--max_time", 6, "--num_workers", 0]

    def jump() -> None:
        time.time = lambda: real() + next(jumps)  # type: ignore[assignment]

    begun = time.monotonic()
    out = tmp_path / "run"
    assert fork(*training("pretrain", out, 1), *budget, before=jump).status() == 0
    assert 5 < time.monotonic() - begun < 60
    assert results(out)["steps"] > 3
    assert 4 < json.loads((out / "results.json").read_text())["seconds"] < 12
