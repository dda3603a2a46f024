import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from vissl_lite.data.whole_file import write_atomically
from vissl_lite.errors import UserError
from vissl_lite.run import (
    MetricsFile,
    check_out,
    open_run,
    read_config,
    write_results,
)

log = logging.getLogger("vissl_lite")


@pytest.fixture(autouse=True)
def main_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def log_as_it_was() -> Iterator[None]:
    """Opening a run configures the package's logger; other tests should not see that."""
    handlers, level, propagate = list(log.handlers), log.level, log.propagate
    yield
    log.handlers[:] = handlers
    log.setLevel(level)
    log.propagate = propagate


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
    with open_run(tmp_path / "run", "probe", {**config, "resume": False, "overwrite": True}) as out:
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
    assert all(f"{name} " in text for name in ("Python", "torch", "timm", "lightning"))


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


# Metrics


def lines(file: Path) -> list[list[str]]:
    """The rows, without their times."""
    rows = [line.split(",") for line in file.read_text().splitlines()]
    assert rows[0][:2] == ["step", "seconds"]
    assert all(float(row[1]) >= 0 for row in rows[1:])
    return [[row[0], *row[2:]] for row in rows]


@pytest.fixture
def metrics(tmp_path: Path) -> MetricsFile:
    return MetricsFile(tmp_path / "metrics.csv")


def test_a_row_for_each_step_and_a_column_for_each_metric(metrics: MetricsFile) -> None:
    metrics.add(0, {"loss": 1.5})
    metrics.add(0, {"lr": 0.25})
    metrics.add(10, {"loss": 1.0, "lr": 0.5})
    metrics.flush(final=True)
    assert lines(metrics.file) == [
        ["step", "loss", "lr"],
        ["0", "1.5", "0.25"],
        ["10", "1.0", "0.5"],
    ]


def test_the_last_row_stays_open_until_the_end(metrics: MetricsFile) -> None:
    metrics.add(0, {"loss": 1.5})
    metrics.flush()
    assert lines(metrics.file) == [["step", "loss"]]
    metrics.add(1, {"loss": 1.0})
    metrics.flush()
    assert lines(metrics.file) == [["step", "loss"], ["0", "1.5"]]
    metrics.add(1, {"loss": 0.5})
    metrics.flush(final=True)
    assert lines(metrics.file) == [["step", "loss"], ["0", "1.5"], ["1", "0.5"]]


def test_flushing_often_gives_the_same_file_as_flushing_once(tmp_path: Path) -> None:
    often, once = MetricsFile(tmp_path / "often.csv"), MetricsFile(tmp_path / "once.csv")
    for step in range(6):
        for metrics in (often, once):
            metrics.add(step, {"loss": step / 2})
            if step == 3:
                metrics.add(step, {"knn": 0.5})
        often.flush()
        often.flush()
    for metrics in (often, once):
        metrics.flush(final=True)
        metrics.flush(final=True)
    assert lines(often.file) == lines(once.file)


def test_a_new_column_is_empty_in_earlier_rows(metrics: MetricsFile) -> None:
    metrics.add(0, {"loss": 1.5})
    metrics.add(1, {"loss": 1.0})
    metrics.flush()
    metrics.add(2, {"knn": 0.25})
    metrics.flush(final=True)
    assert lines(metrics.file) == [
        ["step", "loss", "knn"], ["0", "1.5", ""], ["1", "1.0", ""], ["2", "", "0.25"],
    ]  # fmt: skip


def test_what_was_written_reads_back(metrics: MetricsFile) -> None:
    metrics.add(0, {"loss": 1.5, "images": 3})
    metrics.add(7, {"lr": 1e-07, "loss": float("nan")})
    metrics.flush(final=True)
    again = MetricsFile(metrics.file)
    assert again.columns == ["step", "seconds", "loss", "images", "lr"]
    assert again.series("lr") == ([7], [1e-07])
    assert again.series("images") == ([0], [3])
    assert [list(row) for row in again.rows] == [
        ["step", "seconds", "loss", "images"],
        ["step", "seconds", "loss", "lr"],
    ]
    assert again.rows[0] == metrics.rows[0]
    assert math.isnan(again.series("loss")[1][1])


def test_resuming_forgets_later_steps_and_goes_on(metrics: MetricsFile) -> None:
    for step in range(5):
        metrics.add(step, {"loss": float(step)})
    metrics.flush(final=True)
    again = MetricsFile(metrics.file)
    again.forget_after(2)
    again.add(3, {"loss": 30.0, "knn": 0.5})
    again.flush(final=True)
    assert lines(metrics.file) == [
        ["step", "loss", "knn"], ["0", "0.0", ""], ["1", "1.0", ""], ["2", "2.0", ""],
        ["3", "30.0", "0.5"],
    ]  # fmt: skip


def test_time_goes_on_where_it_stopped(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    file.write_text("step,seconds,loss\n4,100.0,1.0\n")
    metrics = MetricsFile(file)
    metrics.add(5, {"loss": 0.5})
    assert 100 <= metrics.rows[-1]["seconds"] < 130


def test_series_gives_the_steps_that_have_the_metric(metrics: MetricsFile) -> None:
    metrics.add(0, {"loss": 1.5})
    metrics.add(1, {"loss": 1.0, "knn": 0.5})
    assert metrics.series("loss") == ([0, 1], [1.5, 1.0])
    assert metrics.series("knn") == ([1], [0.5])
    assert metrics.series("none") == ([], [])


def test_what_is_logged_before_the_run_is_in_its_log_once(tmp_path: Path) -> None:
    log = logging.getLogger("vissl_lite.data.anything")
    log.warning("3 boxes mended")
    with open_run(tmp_path / "a", "probe", {}):
        log.info("training")
        with open_run(tmp_path / "b", "probe", {}):
            log.info("within")
    assert (tmp_path / "a" / "log.txt").read_text().count("3 boxes mended") == 1
    log.info("between")
    with open_run(tmp_path / "c", "probe", {}):
        pass
    text = (tmp_path / "c" / "log.txt").read_text()
    assert "between" in text
    assert "3 boxes mended" not in text
    assert "within" not in text


def test_names_that_are_not_utf_8_are_logged(tmp_path: Path, capsys: Any) -> None:
    with open_run(tmp_path / "run", "probe", {}):
        record = log.makeRecord("a", logging.WARNING, "", 0, "skipped: %s", ("a\udcff.png",), None)
        for handler in log.handlers:  # ours alone: what pytest catches, xdist can't send
            if handler.__class__.__name__ in ("_LogFile", "_ConsoleHandler"):
                handler.handle(record)
    assert "skipped: a\\udcff.png" in (tmp_path / "run" / "log.txt").read_text()
    shown = capsys.readouterr().err
    assert "skipped: a\\udcff.png" in shown
    assert "Traceback" not in shown
