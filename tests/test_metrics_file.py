import math
from pathlib import Path

import pytest

from vissl_lite.metrics_file import MetricsFile


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
        ["step", "loss", "knn"],
        ["0", "1.5", ""],
        ["1", "1.0", ""],
        ["2", "", "0.25"],
    ]


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
    again.drop_after(2)
    again.add(3, {"loss": 30.0, "knn": 0.5})
    again.flush(final=True)
    assert lines(metrics.file) == [
        ["step", "loss", "knn"],
        ["0", "0.0", ""],
        ["1", "1.0", ""],
        ["2", "2.0", ""],
        ["3", "30.0", "0.5"],
    ]


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
