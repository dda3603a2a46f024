"""``--out`` and ``--overwrite`` never cost a user a file that is not a run's, nor an input."""

import json
import os
import shutil
import signal
import stat
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import send_at
from vissl_lite import run_folder
from vissl_lite.cli import main


def tree(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def pretrain(*words: object) -> int:
    small = ["--backbone", "test_resnet", "--image_size", 32, "--epochs", 1, "--logger", "none"]
    small += ["--num_workers", 0]
    return main(["pretrain", *map(str, [*small, *words])])


def test_a_folder_with_a_config_of_somebodys_is_not_a_run(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    project = tmp_path / "project"
    (project / "src").mkdir(parents=True)
    (project / "config.yaml").write_text("x")
    (project / "src" / "thesis.txt").write_text("years of work")
    before = tree(project)
    for more in ([], ["--overwrite"], ["--resume"]):
        assert pretrain("--data", photos, "--out", project, *more) == 2
        assert "holds other files" in capsys.readouterr().err
        assert tree(project) == before


@pytest.mark.slow
def test_what_is_not_the_runs_stays_in_its_folder(
    labelled: Path, encoder_folder: Path, tmp_path: Path
) -> None:
    real = tmp_path / "disk"
    real.mkdir(mode=0o750)
    out = tmp_path / "link"
    out.symlink_to(real)
    words = ["probe", "--encoder", encoder_folder, "--data", labelled, "--out", out]
    assert main(list(map(str, words))) == 0
    inode = real.stat().st_ino
    own = {"notes.txt": b"mine", "masks/notes.txt": b"mine", "encoder/thesis.txt": b"years of work"}
    for name, content in own.items():
        (real / name).parent.mkdir(exist_ok=True)
        (real / name).write_bytes(content)
    (real / "masks" / "0.png").write_bytes(b"as of a segmentation")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "0.png").write_bytes(b"kept")
    (real / "pictures").symlink_to(tmp_path / "elsewhere")
    (real / "results.json").write_text("{}")
    assert main([*map(str, words), "--overwrite"]) == 0
    assert out.is_symlink()
    assert (real.stat().st_ino, stat.S_IMODE(real.stat().st_mode)) == (inode, 0o750)
    left = tree(real)
    assert {name: left.get(name) for name in own} == own
    assert "masks/0.png" not in left
    assert (tmp_path / "elsewhere" / "0.png").read_bytes() == b"kept"
    assert json.loads((real / "results.json").read_text())


@pytest.fixture(scope="module")
def probed(labelled: Path, encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of probe, to be copied."""
    run = tmp_path_factory.mktemp("probed") / "run"
    words = ["probe", "--encoder", encoder_folder, "--data", labelled, "--out", run]
    assert main(list(map(str, words))) == 0
    return run


@pytest.mark.parametrize(
    "command", ["pretrain", "probe", "finetune", "predict", "pseudo-label", "compare"]
)
def test_inputs_and_out_lie_apart(
    command: str,
    probed: Path,
    labelled: Path,
    encoder_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of every option that names something to read, before any of it is touched."""
    run = tmp_path / "run"
    shutil.copytree(probed, run)
    (run / "images").mkdir()
    inside = ((run, run / "images"), (run / "images" / "new", run), (run, run))
    before = tree(run)
    named = {
        "pretrain": [("--data", "--encoder"), ("--encoder", "--data"), ("--probe_data", "--data")],
        "probe": [("--encoder", "--data"), ("--data", "--encoder")],
        "finetune": [("--encoder", "--data"), ("--data", "--encoder"), ("--annotations", "--data")],
        "predict": [("--model", "--data"), ("--data", "--model")],
        "pseudo-label": [("--model", "--data"), ("--data", "--model")],
        "compare": [("--encoder", "--data"), ("--data", "--encoder"), ("--baseline", "--data")],
    }[command]
    for (out, given), (option, other) in product(inside, named):
        rest = labelled if other == "--data" else encoder_folder
        extra = (
            ["--encoder", encoder_folder] if command == "compare" and option == "--baseline" else []
        )
        if option == "--annotations":
            extra = ["--task", "detection"]
        arguments = [command, option, given, other, rest, "--out", out, "--overwrite", *extra]
        capsys.readouterr()
        assert main(list(map(str, arguments))) == 2
        error = capsys.readouterr().err
        assert " lies in " in error
        assert f"{option} {given}" in error
        assert error.count("\n") == 1
        assert tree(run) == before


@pytest.mark.slow
def test_a_list_of_images_in_out_is_an_input_too(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, listed = tmp_path / "run", tmp_path / "list.txt"
    assert pretrain("--data", photos, "--out", out) == 0
    (out / "sample").mkdir()
    (out / "sample" / "000000001.jpg").write_bytes(next(photos.rglob("*.jpg")).read_bytes())
    listed.write_text("# mine\n\nrun/sample/000000001.jpg\n")
    assert pretrain("--data", listed, "--out", out, "--overwrite") == 2
    assert "names run/sample/000000001.jpg, which lies in --out" in capsys.readouterr().err
    assert (out / "sample" / "000000001.jpg").exists()


@pytest.mark.slow
def test_nothing_is_removed_before_everything_is_checked(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert pretrain("--data", photos, "--out", out) == 0
    before = tree(out)
    for wrong in (["--batch_size", 999], ["--lr", -1], ["--probe_data", tmp_path / "none"]):
        assert pretrain("--data", photos, "--out", out, "--overwrite", *wrong) == 2
        assert tree(out) == before


@pytest.mark.slow
def test_a_file_to_be_written_is_written_whole_by_one(
    photos: Path, encoder_folder: Path, fork: Any, tmp_path: Path
) -> None:
    """A process that is killed while it writes leaves the old file, and does not stop the next."""
    from vissl_lite.commands import embed

    file = tmp_path / "features.npz"
    words = ["embed", "--encoder", encoder_folder, "--data", photos, "--out", file]
    assert fork(*words).status() == 0
    before = file.read_bytes()
    killed = fork(*words, "--overwrite", before=send_at(0, signal.SIGKILL, embed, "_write_npz"))
    assert killed.status() == -signal.SIGKILL
    assert file.read_bytes() == before
    assert fork(*words, "--overwrite").status() == 0
    assert sorted(os.listdir(tmp_path)) == sorted(["features.npz", "log-0", "log-1", "log-2"])


@pytest.mark.slow
def test_two_writers_of_one_file(
    photos: Path, encoder_folder: Path, fork: Any, tmp_path: Path
) -> None:
    from vissl_lite.commands import embed

    file = tmp_path / "features.npz"
    words = ["embed", "--encoder", encoder_folder, "--data", photos, "--out", file]
    first = fork(*words, before=send_at(0, signal.SIGSTOP, embed, "_write_npz"))
    assert first.wait_for(tmp_path.joinpath("features.npz.part").exists)
    second = fork(*words)
    assert second.status() == 2
    assert "another process is writing" in second.last_line()
    first.send(signal.SIGCONT)
    assert first.status() == 0
    assert file.exists()


@pytest.mark.slow
def test_one_process_writes_to_a_run(fork: Any, training: Any, tmp_path: Path) -> None:
    """A killed one's lock is free at once, though its data workers may still be there."""
    out = tmp_path / "run"
    words = training("pretrain", out, 2000)
    first = fork(*words)
    assert first.wait_for((out / "metrics.csv").exists)
    for more in ([], ["--overwrite"], ["--resume"]):
        second = fork(*words, *more)
        assert second.status() == 2
        assert f"another process is writing to {out}" in second.last_line()
        assert first.running()
    first.send(signal.SIGKILL, group=False)
    assert first.status() == -signal.SIGKILL
    assert not run_folder.is_locked(out)
    assert fork(*training("pretrain", out, 1), "--overwrite").status() == 0


@pytest.mark.slow
def test_the_current_folder_may_be_a_run(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    inode = tmp_path.stat().st_ino
    assert pretrain("--data", photos, "--out", ".") == 0
    assert pretrain("--data", photos, "--out", ".", "--overwrite") == 0
    assert tmp_path.stat().st_ino == inode
    assert f"--out {tmp_path}-probe" in (tmp_path / "log.txt").read_text()
