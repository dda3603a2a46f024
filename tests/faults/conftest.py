"""Commands in processes of their own, to be killed, stopped and starved."""

import csv
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import without_pictures
from vissl_lite.cli import main
from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.encoders.folder import save_encoder

PATIENCE = 240  # seconds for what takes a few on an idle machine


def last_given(words: Sequence[str]) -> list[str]:
    """The words of a command, of options given more than once the last: it refuses two values."""
    options: dict[str, list[str]] = {}
    option = ""
    for word in words:
        if word.startswith("--"):
            option = word
            options[option] = []
        options.setdefault(option, []).append(word)
    return [word for given in options.values() for word in given]


@pytest.fixture(scope="module", autouse=True)
def quick_runs() -> Iterator[None]:
    """Commands leave out pictures and reports."""
    with without_pictures():
        yield


class Child:
    """A command in a fork of this process: torch is loaded already, and it can be killed for good.

    Args:
        words: of the command line.
        log: gets what it prints.
        before: called in the child, before the command.
        after: called in the child, after the command.
    """

    def __init__(
        self,
        words: list[object],
        log: Path,
        before: Callable[[], object] | None = None,
        after: Callable[[], object] | None = None,
    ) -> None:
        self.log = log
        sys.stdout.flush(), sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            status = 99
            try:
                os.setsid()
                # ignored where the tests themselves run in the background of a shell
                signal.signal(signal.SIGINT, signal.default_int_handler)
                out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(out, 1), os.dup2(out, 2)
                sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
                if before is not None:
                    before()
                status = main(last_given([str(word) for word in words]))
                if after is not None:
                    after()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        self._status: int | None = None

    def running(self) -> bool:
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status is None

    def wait_for(self, ready: Callable[[], bool]) -> bool:
        """Wait until something is so; False if the command ended before."""
        end = time.monotonic() + PATIENCE
        while not ready():
            if not self.running():
                return False
            assert time.monotonic() < end, self.text()
            time.sleep(0.01)
        return True

    def send(self, number: signal.Signals, group: bool = True) -> None:
        """Send a signal to the command and its data workers, or to the command alone."""
        (os.killpg if group else os.kill)(self.pid, number)

    def status(self) -> int:
        """The exit status, once it has ended; minus the signal's number if that killed it."""
        self.wait_for(lambda: False)
        assert self._status is not None
        return self._status

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def last_line(self) -> str:
        return self.text().strip().splitlines()[-1]


class Fork(Protocol):
    """Starts a command in a fork."""

    def __call__(
        self,
        *words: object,
        before: Callable[[], object] | None = None,
        after: Callable[[], object] | None = None,
    ) -> Child: ...


def send_at(call: int, number: signal.Signals, owner: Any, name: str) -> Callable[[], None]:
    """Makes a function send a signal to its process at one of its calls, before it works."""
    calls = iter(range(10**9))
    original = getattr(owner, name)

    def function(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    return lambda: setattr(owner, name, function)


@pytest.fixture
def fork(tmp_path: Path) -> "Fork":
    """Starts commands, each in a process of its own."""
    number = iter(range(1000))

    def begin(
        *words: object,
        before: Callable[[], object] | None = None,
        after: Callable[[], object] | None = None,
    ) -> Child:
        return Child(list(words), tmp_path / f"log-{next(number)}", before, after)

    return begin


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained encoder's folder."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(5)
    save_encoder(build_encoder("test_resnet", 32), folder, {})
    return folder


@pytest.fixture
def training(photos: Path, labelled: Path) -> Callable[..., list[object]]:
    """The words of a short training by its command's name, with a data worker."""

    def words(command: str, out: Path, epochs: int) -> list[object]:
        common = ["--out", out, "--batch_size", 8, "--epochs", epochs, "--num_workers", 1,
                  "--precision", "32-true"]  # fmt: skip
        if command == "pretrain":
            return [command, "--data", photos, "--backbone", "test_resnet", "--image_size", 32,
                    "--logger", "none", *common]  # fmt: skip
        return [command, "--data", labelled, "--encoder", "random:test_resnet", "--refit", "false",
                *common]  # fmt: skip

    return words


@pytest.fixture(scope="session")
def _whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"": tmp_path_factory.mktemp("whole")}


@pytest.fixture
def undisturbed(
    fork: "Fork", training: Callable[..., list[object]], _whole: dict[str, Path]
) -> Callable[..., Path]:
    """A run of a training that nothing disturbs, made once a session for each kind."""

    def run(command: str, epochs: int, *more: object) -> Path:
        name = "-".join(map(str, (command, epochs, *more)))
        if name not in _whole:
            child = fork(*training(command, _whole[""] / name, epochs), *more)
            assert child.status() == 0, child.text()
            _whole[name] = _whole[""] / name
        return _whole[name]

    return run


def outcome(run: Path) -> dict[str, Any]:
    """What must be the same of two runs: weights, figures, metrics but for times."""
    found: dict[str, Any] = {"record": json.loads((run / "run.json").read_text())["status"]}
    for name in ("encoder", "model"):
        if (run / name).is_dir():
            found[name] = load_file(run / name / "model.safetensors")
    results = json.loads((run / "results.json").read_text())
    found["results"] = without_times(results)
    with (run / "metrics.csv").open(newline="") as file:
        found["metrics"] = [without_times(row) for row in csv.DictReader(file)]
    found["files"] = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    return found


def without_times(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is measured in seconds, or depends on it."""
    timed = ("seconds", "images_per_second", "data_wait", "evaluation_share", "warnings")
    watched = ("knn", "linear", "feature_std", "effective_rank", "alignment", "uniformity")
    return {name: value for name, value in values.items() if name not in (*timed, *watched)}


@pytest.fixture
def same() -> Callable[[Path, Path], None]:
    """Asserts that two runs came to the same."""

    def check(one: Path, other: Path) -> None:
        a, b = outcome(one), outcome(other)
        for name in ("encoder", "model"):
            for key, tensor in a.pop(name, {}).items():
                torch.testing.assert_close(tensor, b[name][key], msg=key, atol=1e-6, rtol=1e-5)
            b.pop(name, None)
        assert len(a["metrics"]) == len(b["metrics"])
        for mine, theirs in zip(a.pop("metrics"), b.pop("metrics"), strict=True):
            assert mine.keys() == theirs.keys()
            assert [bool(v) for v in mine.values()] == [bool(v) for v in theirs.values()]
            numbers = [[float(v) for v in row.values() if v] for row in (mine, theirs)]
            assert numbers[0] == pytest.approx(numbers[1], rel=1e-4, abs=1e-6)
        assert _near(a, b), (a, b)

    return check


def _near(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_near(one[key], other[key]) for key in one)
    if isinstance(one, float):
        return bool(one == pytest.approx(other, rel=1e-4, abs=1e-6))
    return bool(one == other)
