import os
import signal
from pathlib import Path

import pytest

from vissl_lite import cli
from vissl_lite.errors import Terminated


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job of SLURM, and the file in which its scontrol writes what it was asked for."""
    tool, file = tmp_path / "scontrol", tmp_path / "asked"
    tool.write_text(f'#!/bin/sh\necho "$@" >> {file}\n')
    tool.chmod(0o755)
    for name, value in {
        "NTASKS": "2",
        "JOB_ID": "4711",
        "PROCID": "0",
        "JOB_NAME": "train",
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return file


def receive(number: signal.Signals) -> None:
    """Get a signal while a command does something other than to train."""
    with cli._signals_raise():
        os.kill(os.getpid(), number)
        signal.pause()


@pytest.mark.parametrize(
    ("number", "process", "expected"),
    [
        (signal.SIGUSR1, "SLURM_PROCID=0", "requeue 4711\n"),
        (signal.SIGUSR1, "SLURM_PROCID=1", ""),
        (signal.SIGUSR1, "RANK=1", ""),
        (signal.SIGUSR1, "LOCAL_RANK=1", ""),
        (signal.SIGTERM, "SLURM_PROCID=0", ""),
    ],
)
def test_a_job_whose_time_is_up_outside_of_a_training_is_queued_again_once(
    number: signal.Signals,
    process: str,
    expected: str,
    asked: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(*process.split("="))
    before = signal.getsignal(number)
    with pytest.raises(Terminated) as stopped:
        receive(number)
    assert stopped.value.code == 128 + number
    assert (asked.read_text() if asked.exists() else "") == expected
    assert signal.getsignal(number) == before


def test_a_task_of_an_array_is_queued_again_alone(
    asked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    with pytest.raises(Terminated):
        receive(signal.SIGUSR1)
    assert asked.read_text() == "requeue 7_3\n"


def test_without_slurm_the_signal_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    before = signal.getsignal(signal.SIGUSR1)
    with cli._signals_raise():
        assert signal.getsignal(signal.SIGUSR1) == before
