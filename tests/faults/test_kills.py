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
    "while config.yaml is written": (os, "replace", 1),
    "while a checkpoint is written": (os, "fsync", 0),
    "while metrics are written": (MetricsFile, "flush", 2),
    "after the last step": (pretrain, "save_encoder", 0),
    "after the results": (pretrain, "add_report", 0),
    "before the end is written": (run_record.RunRecord, "write", 1),
}


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (AtomicCheckpointIO, "save_checkpoint", 1),
        (finetune, "write_results", 0),
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
    out, words = tmp_path / "killed", training("finetune", tmp_path / "killed", 4)
    inside = ["--num_workers", 0, "--ema", 0.9]
    killed = fork(*words, *inside, before=send_at(call, signal.SIGKILL, owner, name))
    assert killed.status() == -signal.SIGKILL, killed.text()
    assert fork(*words, *inside, "--resume").status() == 0
    same(out, undisturbed("finetune", 4, *inside))


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_comparison_goes_on(
    fork: Any, labelled: Path, encoder_folder: Path, tmp_path: Path
) -> None:
    def words(out: Path) -> list[object]:
        return ["compare", "--encoder", encoder_folder, "--data", labelled, "--out", out,
                "--protocols", "knn", "--shots", 2]  # fmt: skip

    killed = fork(*words(tmp_path / "killed"), before=send_at(3, signal.SIGKILL, Store, "save"))
    assert killed.status() == -signal.SIGKILL, killed.text()
    assert fork(*words(tmp_path / "killed"), "--resume").status() == 0
    assert fork(*words(tmp_path / "whole"), "--resume").status() == 0  # there is none: it starts
    assert results(tmp_path / "killed") == results(tmp_path / "whole")


@pytest.mark.slow
def test_what_can_not_go_on_starts_again(
    fork: Any, labelled: Path, encoder_folder: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    model = undisturbed("finetune", 4, "--num_workers", 0)
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
@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_killed_again_and_again(
    command: str,
    fork: Any,
    training: Training,
    undisturbed: Undisturbed,
    same: Same,
    tmp_path: Path,
) -> None:
    """At moments by chance, a data worker included or left behind, until it comes to its end."""
    chance, epochs = random.Random(0), 12
    out, whole = tmp_path / "killed", undisturbed(command, epochs)
    for kill in range(3):
        child = fork(*training(command, out, epochs), "--resume")
        rows = len(out.joinpath("metrics.csv").read_bytes()) if kill else 0
        child.wait_for(
            lambda least=rows: (f := out / "metrics.csv").exists() and f.stat().st_size > least
        )
        time.sleep(chance.uniform(0, 0.3))
        if child.running():
            child.send(signal.SIGKILL, group=kill % 2 == 0)
        child.status()
    assert fork(*training(command, out, epochs), "--resume").status() == 0
    same(out, whole)


OTHERS = ("probe", "predict", "compare", "select", "embed", "explore", "export")
SUFFIX = {"embed": ".npz", "explore": ".html"}


@pytest.mark.slow
@pytest.mark.parametrize("command", OTHERS)
def test_any_command_is_killed_and_starts_again(
    command: str,
    fork: Any,
    labelled: Path,
    photos: Path,
    encoder_folder: Path,
    undisturbed: Undisturbed,
    tmp_path: Path,
) -> None:
    """At a moment by chance; the same command then gives what it gives undisturbed."""
    model = undisturbed("finetune", 4, "--num_workers", 0)
    options: dict[str, list[object]] = {
        "probe": ["--encoder", encoder_folder, "--data", labelled],
        "predict": ["--model", model, "--data", photos],
        "compare": ["--encoder", encoder_folder, "--data", labelled, "--protocols", "knn",
                    "--shots", 2],
        "select": ["--encoder", encoder_folder, "--data", photos, "--budget", 5],
        "embed": ["--encoder", encoder_folder, "--data", photos],
        "explore": ["--encoder", encoder_folder, "--data", photos],
        "export": ["--encoder", encoder_folder, "--format", "safetensors"],
    }  # fmt: skip
    suffix = SUFFIX.get(command, "")
    out, whole = tmp_path / f"killed{suffix}", tmp_path / f"whole{suffix}"
    begun = time.monotonic()
    assert fork(command, *options[command], "--out", whole).status() == 0
    length = time.monotonic() - begun
    for share in (0.3, 0.6, 0.9):
        child = fork(command, *options[command], "--out", out, "--overwrite")
        time.sleep(share * length)
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
    elif command == "export":
        mine, theirs = (folder / "model.safetensors" for folder in (out, whole))
        assert mine.read_bytes() == theirs.read_bytes()
    else:
        assert results(out) == results(whole)
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.slow
def test_the_clock_of_a_time_budget_is_not_the_one_that_people_set(
    fork: Any, training: Training, tmp_path: Path
) -> None:
    """A jump of the date by a day, forwards and back, ends nothing and prolongs nothing."""
    real, jumps = time.time, iter(np.tile([86400.0, -86400.0], 10**5))
    budget = ["--epochs", "null", "--max_time", 2, "--num_workers", 0]

    def jump() -> None:
        time.time = lambda: real() + next(jumps)  # type: ignore[assignment]

    out = tmp_path / "run"
    assert fork(*training("pretrain", out, 1), *budget, before=jump).status() == 0
    assert results(out)["steps"] > 1
    assert 1 < json.loads((out / "results.json").read_text())["seconds"] < 3600
