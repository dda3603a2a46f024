import ast
import logging
import os
from operator import ne
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
import yaml
from PIL import Image

import vissl_lite
from vissl_lite.data.atomic_file import write_atomically
from vissl_lite.data.reading import limit_pixels, max_pixels
from vissl_lite.errors import UserError
from vissl_lite.run import (
    check_out,
    logged_warnings,
    open_run,
    read_config,
    write_results,
)
from vissl_lite.run_record import WarningRecord, read_record
from vissl_lite.session import session

log = logging.getLogger("vissl_lite")


@pytest.fixture(autouse=True)
def main_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    with open_run(tmp_path / "old", "probe", {"lr": 0.1}) as out:
        (out / "runs.csv").write_text("old")
    return tmp_path / "old"


def tree(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


# The folder


def test_a_new_or_an_empty_folder_is_fine(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    check_out(tmp_path / "empty")
    check_out(tmp_path / "a" / "b" / "new")
    assert [f.name for f in tmp_path.iterdir()] == ["empty"]


def test_another_run_is_not_written_over_unasked(old_run: Path) -> None:
    before = tree(old_run)
    with pytest.raises(UserError, match=r"old holds another run: give a new folder, or --overw"):
        check_out(old_run)
    check_out(old_run, overwrite=True)
    check_out(old_run, resume=True)
    assert tree(old_run) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_files_are_never_written_over(overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds other files.*: give a new folder with --out"):
        check_out(tmp_path, overwrite=overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_no_folder(overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="out is a file: --out must name a folder"):
        check_out(tmp_path / "out", overwrite=overwrite)


def test_a_folder_below_a_file_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        check_out(tmp_path / "file" / "run")


def test_a_folder_without_permission_is_a_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(UserError, match="new can't be written: no permission in"):
        check_out(tmp_path / "new")


def test_other_processes_neither_check_nor_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    (tmp_path / "other.txt").write_text("")
    check_out(tmp_path)
    with open_run(tmp_path / "run", "probe", {}) as out:
        assert out == tmp_path / "run"
    assert not (tmp_path / "run").exists()


def test_overwriting_removes_what_was_there(old_run: Path) -> None:
    with open_run(old_run, "probe", {"lr": 0.2}):
        pass
    assert sorted(tree(old_run)) == [".lock", "config.yaml", "log.txt", "run.json"]
    assert read_config(old_run) == {"lr": 0.2}


def test_resuming_keeps_what_was_there_and_appends_to_the_log(old_run: Path) -> None:
    before = tree(old_run)
    with open_run(old_run, "probe", {"lr": 0.9}, resume=True):
        log.info("second part")
    after = tree(old_run)
    assert after["log.txt"].startswith(before.pop("log.txt"))
    assert b"second part" in after.pop("log.txt")
    del before["run.json"], after["run.json"]  # which may say when it was resumed
    assert after == before


def test_config_yaml_holds_the_parameters_that_repeat_the_run(tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "data": ["a", "b"],
        "pretext": {"name": "simclr", "temperature": 0.2, "blur": None},
        "epochs": 3,
    }
    with open_run(tmp_path / "run", "probe", config) as out:
        text = (out / "config.yaml").read_text()  # there from the start
    assert yaml.safe_load(text) == config == read_config(tmp_path / "run")
    assert text.index("data") < text.index("pretext") < text.index("epochs")


# The log


def test_the_log_holds_messages_and_versions(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", "probe", {}) as out:
        log.info("batch %d of [bold]%s[/bold]", 3, "five")
        logging.getLogger("vissl_lite.training").warning("from a module")
    text = (out / "log.txt").read_text()
    assert "INFO batch 3 of [bold]five[/bold]" in text
    assert "WARNING from a module" in text
    assert all(f"{name} " in text for name in ("python", "torch", "timm", "lightning"))


def test_the_console_shows_messages_but_no_details(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_run(tmp_path / "run", "probe", {}):
        log.info("a [red]message[/red]")
        log.debug("a detail")
    shown = capsys.readouterr().err
    assert "a [red]message[/red]" in shown
    assert "a detail" not in shown


def test_the_log_ends_with_the_run(tmp_path: Path) -> None:
    with open_run(tmp_path / "one", "probe", {}):
        pass
    with open_run(tmp_path / "two", "probe", {}):
        log.info("in the second")
    log.info("after both")
    assert "in the second" not in (tmp_path / "one" / "log.txt").read_text()
    assert "after both" not in (tmp_path / "two" / "log.txt").read_text()


def test_the_log_says_why_a_run_stopped(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_run(tmp_path / "crash", "probe", {}):
        _ = 1 / 0
    text = (tmp_path / "crash" / "log.txt").read_text()
    assert "Traceback" in text
    assert "ZeroDivisionError: division by zero" in text
    with pytest.raises(UserError), open_run(tmp_path / "mistake", "probe", {}):
        raise UserError("too many images are broken")
    text = (tmp_path / "mistake" / "log.txt").read_text()
    assert "stopped: too many images are broken" in text
    assert "Traceback" not in text


# Resuming


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "holds no run to resume"),
        ("a: [1", "is not YAML that can be read"),
        ("", "is damaged"),
        ("[1, 2]", "is damaged"),
        ("\x00", "is not YAML that can be read"),
    ],
)
def test_a_run_without_readable_parameters_is_a_mistake(
    text: str | None, message: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_config(tmp_path)


def test_results_are_json_that_appears_whole(tmp_path: Path) -> None:
    write_results(tmp_path, {"knn": 0.5})
    write_atomically(tmp_path / "a.txt", "ä")
    assert tree(tmp_path) == {"results.json": b'{\n  "knn": 0.5\n}\n', "a.txt": "ä".encode()}


def test_what_is_logged_before_the_run_is_in_its_log_once(tmp_path: Path) -> None:
    module = logging.getLogger("vissl_lite.data.anything")
    with session():
        module.warning("3 boxes mended", extra={"code": "box.mended"})
        with open_run(tmp_path / "a", "demo", {}):
            module.info("training")
            with session():  # of a command within
                module.info("7 boxes mended")
                with open_run(tmp_path / "b", "probe", {}):
                    module.info("within")
    for run, mended in (("a", (1, 1)), ("b", (0, 1))):
        text = (tmp_path / run / "log.txt").read_text()
        assert (text.count("3 boxes mended"), text.count("7 boxes mended")) == mended
    assert [one.code for one in warnings(tmp_path / "a")] == ["box.mended"]
    assert warnings(tmp_path / "b") == []
    with session(), open_run(tmp_path / "c", "probe", {}):
        pass
    assert "mended" not in (tmp_path / "c" / "log.txt").read_text()


def test_a_session_leaves_everything_as_it_was(tmp_path: Path) -> None:
    def state() -> list[object]:
        return [
            *(
                (one.level, one.propagate, list(one.handlers))
                for one in map(logging.getLogger, ("vissl_lite", "PIL"))
            ),
            cv2.utils.logging.getLogLevel(),
            Image.MAX_IMAGE_PIXELS,
            max_pixels(),
        ]

    before = state()
    with session():
        limit_pixels(1000)
        with open_run(tmp_path / "run", "probe", {}):
            assert sum(map(ne, state(), before)) == 5
    assert state() == before


# run.json


def warnings(run: Path) -> list[WarningRecord]:
    record = read_record(run)
    assert record is not None
    return record.warnings


def test_run_json_tells_where_and_how_a_run_ended(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", "probe", {}) as run:
        running = read_record(run)
    finished = read_record(tmp_path / "run")
    assert running is not None
    assert finished is not None
    assert (running.status, finished.status, finished.reason) == ("running", "finished", None)
    assert finished.start() is not None
    assert {"python", "platform", "host", "torch", "timm", "device"} <= set(finished.environment)
    with pytest.raises(ValueError, match="a\nbug"), open_run(tmp_path / "bug", "probe", {}):
        raise ValueError("a\nbug")
    failed = read_record(tmp_path / "bug")
    assert failed is not None
    assert (failed.status, failed.reason) == ("failed", "a bug")


def test_warnings_are_records_as_soon_as_they_come(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", "probe", {}) as run:
        log.warning(
            "%(share).1f of %(path)s, 50 %%",
            {"share": torch.tensor(0.25), "path": run},
            extra={"code": "some.kind"},
        )
        assert warnings(run) == [
            WarningRecord("some.kind", f"0.2 of {run}, 50 %", {"share": 0.25, "path": str(run)})
        ]
        log.warning("without a code: %d", 3)
        log.warning("without a code: %d", 3)  # said again
        log.info("nothing to worry about")
        assert [(one.code, one.figures) for one in warnings(run)][1:] == [("other", {})]


def test_of_many_warnings_of_a_kind_the_first_ones_are_kept(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", "probe", {}) as run:
        for number in range(100):
            log.warning("image %(number)d", {"number": number}, extra={"code": "image.unreadable"})
        assert sum(one.count for one in warnings(run)) > 80  # were it killed now
    kept = warnings(tmp_path / "run")
    assert [one.figures["number"] for one in kept] == list(range(21))
    assert [one.count for one in kept] == [1] * 20 + [80]


def test_a_resumed_run_keeps_its_records(tmp_path: Path) -> None:
    for resume in (False, True):
        with open_run(tmp_path / "run", "probe", {}, resume):
            log.warning("twice", extra={"code": "a"})
            log.warning("resumed: %(resumed)s", {"resumed": resume}, extra={"code": "b"})
    assert [one.message for one in warnings(tmp_path / "run")] == [
        "twice",
        "resumed: False",
        "resumed: True",
    ]
    assert logged_warnings(tmp_path / "run")[0] == "twice"
    with open_run(tmp_path / "run", "probe", {}):
        pass
    assert warnings(tmp_path / "run") == []


@pytest.mark.slow
def test_every_warning_of_the_package_has_a_code() -> None:
    """And its figures by name, where it has some."""
    found = []
    for file in sorted(Path(vissl_lite.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "log.warning":
                extra = [one.value for one in node.keywords if one.arg == "extra"]
                good = extra and "'code'" in ast.unparse(extra[0]) and len(node.args) <= 2
                found.append((file.name, node.lineno, bool(good)))
    assert len(found) > 20
    assert [place for place in found if not place[2]] == []


def test_names_that_are_not_utf_8_are_logged(tmp_path: Path, capsys: Any) -> None:
    with open_run(tmp_path / "run", "probe", {}):
        record = log.makeRecord("a", logging.WARNING, "", 0, "skipped: %s", ("a\udcff.png",), None)
        for handler in log.handlers:  # ours alone: what pytest catches, xdist can't send
            if handler.__class__.__name__ in ("LogFile", "ConsoleHandler"):
                handler.handle(record)
    assert "skipped: a\\udcff.png" in (tmp_path / "run" / "log.txt").read_text()
    shown = capsys.readouterr().err
    assert "skipped: a\\udcff.png" in shown
    assert "Traceback" not in shown


def test_replacing_a_run_removes_all_of_its_files(old_run: Path) -> None:
    names = (
        "checkpoints/lr-0.001-2/last.ckpt", "lr-0.001-frozen_norm.csv", "refit.csv",
        "runs/untrained/10/metrics.csv", "split_masks/000001.png", "masks/a/scan.nii.gz",
        "masks/scene.tif", "labels.png", "model/fingerprints.npz", "sample.part/000001.jpg",
        "predictions.jsonl.part", "data/unlabelled/0.npy", "data/labelled/train/oak/0.npy",
    )  # fmt: skip
    for name in names:
        (old_run / name).parent.mkdir(parents=True, exist_ok=True)
        (old_run / name).write_text("old")
    with open_run(old_run, "probe", {"overwrite": True}, resume=False):
        assert not [name for name in names if (old_run / name).exists()]


def test_replacing_a_run_removes_its_checkpoint_behind_a_link(
    old_run: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    (disk / "last.ckpt").write_text("old")
    (old_run / "checkpoints").symlink_to(disk)
    with open_run(old_run, "probe", {"overwrite": True}, resume=False):
        assert not (disk / "last.ckpt").exists()
    assert disk.exists()


def test_a_run_is_either_resumed_or_replaced(old_run: Path) -> None:
    with pytest.raises(UserError, match="--resume continues a run and --overwrite replaces it"):
        check_out(old_run, resume=True, overwrite=True)
