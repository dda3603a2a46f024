import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vissl_lite
from vissl_lite.cli import main
from vissl_lite.commands.runs import RunSummary, find_runs
from vissl_lite.errors import UserError
from vissl_lite.run_folder import lock
from vissl_lite.run_record import RunRecord, Status


def make(
    folder: Path,
    command: str = "probe",
    day: int = 1,
    status: Status = "finished",
    reason: str | None = None,
    **results: Any,
) -> Path:
    folder.mkdir(parents=True)
    RunRecord(command, status, reason, f"2026-11-{day:02}T10:00:00+00:00", 75.0).write(folder)
    (folder / "config.yaml").write_text("seed: 0\n")
    if results:
        (folder / "results.json").write_text(json.dumps(results))
    return folder


def names(found: list[RunSummary]) -> list[str]:
    return [one.path.name for one in found]


def test_runs_are_listed_with_their_main_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "a", "pretrain", 1, loss=4.5, knn=0.25)
    make(tmp_path / "deep" / "b", "probe", 2, knn=0.5, linear=0.625, layers={"x": {"knn": 0.9}})
    make(tmp_path / "c", "finetune", 3, per_class={"cat": {"f1": 1}}, test={"top1": 0.75})
    other = {"overall": {"mean": 0.3, "low": 0, "high": 0.6}}
    make(tmp_path / "d", "compare", 4, verdict="helped", difference={"mean": 0.1},
         protocols={"knn": {"differences": {"runs/a": other}}})  # fmt: skip
    scores = {"fine-tuned": {"untrained": [0.2, 0.4], "pre-trained": [0.5, 0.7]}}
    make(tmp_path / "e", "demo", 5, scores=scores)
    make(tmp_path / "e" / "pretrain", "pretrain", 6, loss=1.0)
    make(tmp_path / "f", "predict", 7, "failed", "the disk is full")
    make(tmp_path / "g", "select", 1, images=40, chosen=5)
    found = vissl_lite.runs(tmp_path)
    assert found.pop().metric == "chosen 5"
    assert names(found) == ["f", "pretrain", "e", "d", "c", "b", "a"]  # the newest first
    assert [one.metric for one in found] == [
        "", "loss 1", "pre-trained 0.6", "helped (+0.100)", "top1 0.75", "linear 0.625", "knn 0.25",
    ]  # fmt: skip
    assert found[0].reason == "the disk is full"
    assert found[4].metrics == {"test.top1": 0.75, "seconds": 75.0}
    shown = capsys.readouterr().out
    assert "the disk is full" in shown
    assert "1:15" in shown


def test_a_run_without_its_process_was_killed(tmp_path: Path) -> None:
    run = make(tmp_path / "a", status="running")
    assert [(one.status, one.seconds) for one in vissl_lite.runs(tmp_path)] == [("killed", None)]
    with lock(run):
        ((status, seconds),) = [(one.status, one.seconds) for one in vissl_lite.runs(tmp_path)]
    assert status == "running"
    assert seconds is not None
    assert seconds > 75


def test_runs_are_sorted_by_a_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "low", day=1, linear=0.25, loss=1.0)
    make(tmp_path / "none", day=2, knn=0.5)
    make(tmp_path / "high", day=3, linear=0.75, loss=2.0)
    make(tmp_path / "tuned", "finetune", day=4, test={"top1": 0.5})
    assert names(vissl_lite.runs(tmp_path, "linear"))[:2] == ["high", "low"]
    assert names(vissl_lite.runs(tmp_path, sort="loss"))[:2] == ["low", "high"]
    assert names(vissl_lite.runs(tmp_path, sort="top1"))[0] == "tuned"
    capsys.readouterr()
    assert main(["runs", str(tmp_path), "--sort", "linnear"]) == 2
    assert "no run has the metric linnear: did you mean linear?" in capsys.readouterr().err
    assert main(["runs", str(tmp_path), "--sort", "xyz"]) == 2
    assert "there are knn, linear, loss, seconds, test.top1" in capsys.readouterr().err


@pytest.mark.parametrize("metric", ["alignment", "uniformity"])
def test_lower_is_better_for_measures_of_features(metric: str, tmp_path: Path) -> None:
    for name, value in (("bad", -0.5), ("good", -3.0)):
        make(tmp_path / name, "pretrain", **{metric: value})
    assert names(vissl_lite.runs(tmp_path, metric)) == ["good", "bad"]


def test_damage_is_said_and_stops_nothing(tmp_path: Path) -> None:
    (make(tmp_path / "a", day=3) / "results.json").write_bytes(b"\xff")
    (make(tmp_path / "b", day=2, linear=0.5) / "run.json").write_text('{"command":')
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text("{}")  # of another program
    make(tmp_path / "other" / "c", day=1)
    found = vissl_lite.runs(tmp_path)
    assert [(one.path.name, one.status) for one in found] == [
        ("a", "finished"),
        ("c", "finished"),
        ("b", "damaged"),
    ]
    assert found[0].reason == "results.json is damaged"
    assert "run.json is damaged" in str(found[2].reason)


def test_links_and_hidden_folders_and_the_insides_of_runs(tmp_path: Path) -> None:
    run = make(tmp_path / "real" / "a")
    (tmp_path / "real" / "loop").symlink_to(tmp_path)
    (run / "again").symlink_to(run)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    make(tmp_path / ".hidden" / "b")
    make(run / "data" / "deeper" / "c")
    unreadable: list[str] = []
    assert [path.name for path in find_runs(tmp_path, unreadable)] == ["a"]
    assert unreadable == []


def test_a_folder_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "a")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refused(path: str) -> Any:
        if path.endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)  # root may read everything
    assert names(vissl_lite.runs(tmp_path)) == ["a"]
    assert f"can't be read: 1, the first {tmp_path}/closed" in capsys.readouterr().err


def test_no_runs_and_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vissl_lite.runs(tmp_path) == []
    assert "no runs below" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"no folder .*nowhere: give one that holds runs"):
        vissl_lite.runs(tmp_path / "nowhere")


@pytest.mark.slow
def test_listing_runs_loads_no_torch(tmp_path: Path) -> None:
    make(tmp_path / "a")
    program = (
        "import sys\nfrom vissl_lite.cli import main\nassert main(['runs', sys.argv[1]]) == 0\n"
        "assert not {'torch', 'cv2', 'timm'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    assert subprocess.run(command, capture_output=True, check=True).stdout
