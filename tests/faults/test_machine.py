"""A machine that refuses: full disks, limits on files and memory, little shared memory."""

import ctypes
import errno
import json
import os
import resource
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from vissl_lite.data.images import read_image
from vissl_lite.data.workers import WorkerLoader
from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import MachineError, UserError
from vissl_lite.faults import machine_error
from vissl_lite.training.checkpoints import AtomicCheckpointIO

Training = Callable[[str, Path, int], list[object]]

_NEW_USER, _NEW_MOUNTS = 0x10000000, 0x00020000  # of unshare(2)


def mount(place: Path, size: str) -> None:
    """Mount a small disk in memory, in a name space of this process alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_NEW_MOUNTS):
        if libc.unshare(_NEW_USER | _NEW_MOUNTS):
            raise OSError(ctypes.get_errno(), "unshare")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True, capture_output=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)],
        check=True,
        capture_output=True,
    )


@pytest.fixture(scope="session")
def _can_mount(tmp_path_factory: pytest.TempPathFactory) -> bool:
    place = tmp_path_factory.mktemp("mount")
    pid = os.fork()
    if pid == 0:
        try:
            mount(place, "64k")
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


@pytest.fixture
def small_disk(_can_mount: bool, tmp_path: Path) -> Path:
    """Where a test's children may mount a small disk."""
    if not _can_mount:
        pytest.skip("no disk can be mounted here: neither root nor user name spaces")
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


def check_refused(child: Any, words: str) -> None:
    """It ended with one sentence that says what was refused and how to go on."""
    assert child.status() == 1, child.text()
    assert "Traceback" not in child.text()
    assert "Logging error" not in child.text()
    assert words in child.last_line(), child.text()
    assert child.last_line().startswith("vissl-lite: ")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_a_training_on_a_full_disk_keeps_its_last_checkpoint_and_goes_on(
    command: str, fork: Any, training: Training, small_disk: Path, tmp_path: Path
) -> None:
    out, seen = small_disk / "run", tmp_path / "seen.json"

    def fill() -> None:
        mount(small_disk, "40m")
        save, calls = AtomicCheckpointIO.save_checkpoint, iter(range(1000))

        def save_until_full(self: AtomicCheckpointIO, *args: Any, **kwargs: Any) -> None:
            if next(calls) == 1:
                room = os.statvfs(small_disk)
                (small_disk / "other").write_bytes(bytes(room.f_bavail * room.f_frsize - 8192))
            save(self, *args, **kwargs)

        AtomicCheckpointIO.save_checkpoint = save_until_full  # type: ignore[method-assign]

    def go_on() -> None:
        (small_disk / "other").unlink()
        files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
        from vissl_lite.cli import main

        status = main([*map(str, training(command, out, 8)), "--resume"])
        record = json.loads((out / "run.json").read_text())
        seen.write_text(json.dumps([sorted(files), status, record["status"]]))

    child = fork(*training(command, out, 8), "--num_workers", 0, before=fill, after=go_on)
    assert child.status() == 1, child.text()
    assert "the disk is full: free some space; the training up to its last" in child.text()
    assert "--resume continues it" in child.text()
    assert "Traceback" not in child.text()
    files, status, ended = json.loads(seen.read_text())
    assert "checkpoints/last.ckpt" in files
    assert not [name for name in files if name.endswith(".part")]
    assert (status, ended) == (0, "finished")


def commands(labelled: Path, photos: Path, encoder: Path, model: Path) -> dict[str, list[object]]:
    """What writes something, but for trainings."""
    return {
        "probe": ["probe", "--encoder", encoder, "--data", labelled],
        "predict": ["predict", "--model", model, "--data", photos],
        "compare": ["compare", "--encoder", encoder, "--data", labelled, "--shots", 2,
                    "--protocols", "knn"],
        "select": ["select", "--encoder", encoder, "--data", photos, "--budget", 5],
        "embed": ["embed", "--encoder", encoder, "--data", photos],
        "explore": ["explore", "--encoder", encoder, "--data", photos],
        "export": ["export", "--encoder", encoder],
        "shard": ["shard", "--data", photos],
    }  # fmt: skip


SUFFIX = {"embed": ".npz", "explore": ".html", "export": ".onnx"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", ["probe", "predict", "compare", "select", "embed", "explore", "export", "shard"]
)
def test_a_full_disk_is_one_sentence_in_every_command(
    command: str,
    fork: Any,
    undisturbed: Callable[..., Path],
    labelled: Path,
    photos: Path,
    encoder_folder: Path,
    small_disk: Path,
) -> None:
    """With room for three small files."""
    model = undisturbed("finetune", 4, "--num_workers", 0)
    words = commands(labelled, photos, encoder_folder, model)[command]
    out = small_disk / f"out{SUFFIX.get(command, '')}"

    def fill() -> None:
        mount(small_disk, "1m")
        room = os.statvfs(small_disk)
        rest = max(0, room.f_bavail * room.f_frsize - 1024 * 12)
        (small_disk / "other").write_bytes(bytes(rest))

    check_refused(fork(*words, "--out", out, before=fill), "the disk is full: free some space")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_a_limit_on_file_sizes(command: str, fork: Any, training: Training, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    out = tmp_path / "run"
    child = fork(*training(command, out, 4), before=limit)
    check_refused(child, "ulimit -f")
    assert not list(out.rglob("*.part"))
    assert fork(*training(command, out, 4), "--resume").status() == 0


@pytest.mark.slow
@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_too_many_open_files(command: str, fork: Any, training: Training, tmp_path: Path) -> None:
    def limit() -> None:
        used = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 2, used + 2))

    child = fork(*training(command, tmp_path / "run", 4), before=limit)
    check_refused(child, "too many files are open: raise the limit (ulimit -n)")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_memory_of_a_cpu_that_does_not_suffice(
    command: str, fork: Any, training: Training, photos: Path, tmp_path: Path
) -> None:
    """Smaller batches are tried out, as on a GPU; the allocator's own error stands for a small one.

    A limit on the address space would not do: native code may crash instead of reporting it.
    """
    normalize = Encoder.normalize

    def limit() -> None:
        def needs_memory(self: Encoder, images: torch.Tensor) -> torch.Tensor:
            torch.empty(len(images) << 45 if len(images) > 4 else 1)
            return normalize(self, images)

        Encoder.normalize = needs_memory  # type: ignore[method-assign]

    large = ["--batch_size", 24, "--num_workers", 0]
    child = fork(*training(command, tmp_path / "run", 1), *large, before=limit)
    assert child.status() == 2, child.text()
    assert "Traceback" not in child.text()
    assert "into the memory of this machine" in child.last_line()


@pytest.mark.slow
def test_little_shared_memory_makes_training_slower_and_no_more(
    fork: Any,
    training: Training,
    same: Callable[[Path, Path], None],
    small_disk: Path,
    tmp_path: Path,
) -> None:
    """Docker gives 64 MB; a batch that finds no room there comes through a pipe."""
    words = [*training("pretrain", tmp_path / "small", 4), "--batch_size", 24, "--image_size", 64]
    child = fork(*words, before=lambda: mount(Path("/dev/shm"), "256k"))
    assert child.status() == 0, child.text()
    assert child.text().count("There is too little shared memory for the batches") == 1
    assert fork(*words[:2], *words[2:], "--out", tmp_path / "whole").status() == 0
    same(tmp_path / "small", tmp_path / "whole")


@pytest.mark.slow
def test_a_data_worker_that_is_killed(fork: Any, training: Training, tmp_path: Path) -> None:
    """As by the system when memory runs out."""
    out = tmp_path / "run"
    child = fork(*training("pretrain", out, 2000))
    assert child.wait_for((out / "checkpoints" / "last.ckpt").exists)
    listed = subprocess.run(["pgrep", "-P", str(child.pid)], capture_output=True, text=True)
    os.kill(int(listed.stdout.split()[0]), signal.SIGKILL)
    check_refused(child, "a data worker was ended")
    assert "--num_workers" in child.last_line()
    assert "--resume continues it" in child.last_line()


class Numbers(Dataset[int]):
    """Numbers, whose worker gets signals for each of them."""

    def __init__(self, signals: bool) -> None:
        self.signals = signals

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> int:
        if self.signals:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        return index


@pytest.mark.slow
def test_signals_for_the_group_leave_data_workers_alone() -> None:
    loader = WorkerLoader(Numbers(signals=True), torch.tensor, 2, batch_size=4)
    assert torch.cat(list(loader)).tolist() == list(range(64))


@pytest.mark.slow
def test_data_workers_end_when_the_process_that_started_them_says_so() -> None:
    batches = iter(WorkerLoader(Numbers(signals=False), torch.tensor, 2, batch_size=4).loader)
    next(batches)
    [first, *_] = batches._workers  # type: ignore[attr-defined]
    first.terminate()
    first.join(20)
    assert first.exitcode == 0


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_no_image_is_called_broken_for_what_the_machine_lacks(
    number: int, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(MachineError):
        read_image(photos / "a" / "01.jpg")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device", "/x/y"), "/x/y: the disk is full: free some space"),
        (OSError(27, "File too large"), "ulimit -f"),
        (OSError(24, "Too many open files"), "ulimit -n"),
        (OSError(30, "Read-only file system"), "can only be read"),
        (OSError(5, "Input/output error"), "the disk does not work"),
        (OSError(13, "Permission denied", "/run/a"), "/run/a: can't be written: Permission"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
         "can't be written"),
        (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
         "too little memory"),
        (MemoryError(), "too little memory"),
    ],
)  # fmt: skip
def test_what_was_refused_is_said(error: Exception, words: str) -> None:
    assert words in str(machine_error(error, Path("/run")))
    later = ValueError("while it was handled")
    later.__context__ = error
    assert words in str(machine_error(later, Path("/run")))


@pytest.mark.parametrize(
    "error", [ValueError("x"), UserError("y"), OSError(13, "Permission denied", "/other")]
)
def test_what_is_not_the_machines_is_not_said_to_be(error: Exception) -> None:
    assert machine_error(error, Path("/run")) is None
    assert machine_error(MachineError("full")).args == ("full",)  # type: ignore[union-attr]
