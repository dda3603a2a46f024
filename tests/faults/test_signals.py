"""SIGTERM and Ctrl-C: what is there is saved, the exit status tells, and the run goes on."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import send_at
from vissl_lite.commands import pretrain, probe
from vissl_lite.data.stream import ViewDataset
from vissl_lite.training.checkpoints import AtomicCheckpointIO, Checkpoints

Training = Callable[[str, Path, int], list[object]]
Same = Callable[[Path, Path], None]
Undisturbed = Callable[..., Path]

EPOCHS = 15  # long enough to be stopped in the middle

TOLD = {signal.SIGTERM: (143, "stopped by SIGTERM"), signal.SIGINT: (130, "interrupted")}


def record(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "run.json").read_text())
    return content


def check_stopped(child: Any, out: Path, number: signal.Signals) -> None:
    status, words = TOLD[number]
    assert child.status() == status, child.text()
    assert "Traceback" not in child.text()
    assert child.last_line().startswith(f"vissl-lite: {words}")
    assert "--resume" in child.last_line()
    assert record(out)["status"] == "stopped"
    assert not list(out.rglob("*.part"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "number", "group"),
    [
        ("pretrain", signal.SIGTERM, True),
        ("finetune", signal.SIGINT, False),
    ],
)
def test_a_training_told_to_stop_saves_and_goes_on(
    command: str,
    number: signal.Signals,
    group: bool,
    fork: Any,
    training: Training,
    undisturbed: Undisturbed,
    same: Same,
    tmp_path: Path,
) -> None:
    """As when systemd, SLURM, timeout or a terminal send it; data workers are in the group."""
    out = tmp_path / "stopped"
    child = fork(*training(command, out, EPOCHS))
    metrics = out / "metrics.csv"
    assert child.wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 1)
    child.send(number, group)
    check_stopped(child, out, number)
    assert (out / "checkpoints" / "last.ckpt").exists()
    assert fork(*training(command, out, EPOCHS), "--resume").status() == 0
    same(out, undisturbed(command, EPOCHS))


MOMENTS = {
    "checkpoint": (AtomicCheckpointIO, "save_checkpoint", 0),  # one is being written
    "last checkpoint": (Checkpoints, "on_train_end", 0),
    "data": (ViewDataset, "item", 40),  # it waits for data
    "report": (pretrain, "add_report", 0),  # what comes after training
}


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "number"), list(zip(MOMENTS, [*TOLD, *TOLD], strict=True)))
def test_at_whatever_moment(
    moment: str,
    number: signal.Signals,
    fork: Any,
    training: Training,
    undisturbed: Undisturbed,
    same: Same,
    tmp_path: Path,
) -> None:
    owner, name, call = MOMENTS[moment]
    out = tmp_path / "stopped"
    inside = ["--num_workers", 0]
    child = fork(*training("pretrain", out, 4), *inside, before=send_at(call, number, owner, name))
    check_stopped(child, out, number)
    assert fork(*training("pretrain", out, 4), *inside, "--resume").status() == 0
    same(out, undisturbed("pretrain", 4, *inside))


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(fork: Any, training: Training, tmp_path: Path) -> None:
    def twice() -> None:
        step = Checkpoints.on_train_batch_end

        def slow_step(self: Checkpoints, *args: Any) -> None:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("not reached")

        assert step is not slow_step
        Checkpoints.on_train_batch_end = slow_step  # type: ignore[method-assign]

    out = tmp_path / "run"
    child = fork(*training("pretrain", out, 4), before=twice)
    assert child.status() == 130
    assert "no checkpoint of" in child.last_line()
    assert record(out)["status"] == "stopped"


@pytest.mark.slow
@pytest.mark.parametrize("number", list(TOLD))
def test_commands_that_can_not_go_on_leave_a_run_to_replace(
    number: signal.Signals, fork: Any, labelled: Path, encoder_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "probe"
    words = ["probe", "--encoder", encoder_folder, "--data", labelled, "--out", out]
    child = fork(*words, before=send_at(0, number, probe, "add_report"))
    assert child.status() == TOLD[number][0]
    assert child.last_line().endswith("the same command with --overwrite starts again")
    assert fork(*words).status() == 2
    assert fork(*words, "--overwrite").status() == 0
    assert record(out)["status"] == "finished"
