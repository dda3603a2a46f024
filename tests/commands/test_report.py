from pathlib import Path

import pytest

import vissl_lite
from vissl_lite.commands.report import report
from vissl_lite.errors import UserError
from vissl_lite.run_record import RunRecord


@pytest.fixture
def run(labelled: Path, tmp_path: Path) -> Path:
    vissl_lite.probe(
        encoder="random:test_resnet", data=str(labelled), out=str(tmp_path / "run"), layers=True
    )
    return tmp_path / "run"


@pytest.mark.slow
def test_the_page_of_a_probe_is_made_again(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / "report.html").write_text("old")
    before = {file.name for file in run.iterdir()}
    monkeypatch.chdir(run)
    assert report(".") == Path("report.html")
    text = (run / "report.html").read_text()
    assert "<h1>run</h1>" in text  # not a dot
    for part in ("Accuracy per stage", "layer4", "kNN accuracy", "random:test_resnet"):
        assert part in text
    assert {file.name for file in run.iterdir()} == before  # nothing else is touched
    assert "Written: report.html" in capsys.readouterr().err


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run at .*nowhere: give a folder"):
        report(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"is not a run \(run.json is missing\)"):
        report(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_cannot_be_written_is_a_mistake_in_one_line(tmp_path: Path) -> None:
    RunRecord("probe").write(tmp_path)
    (tmp_path / "report.html").mkdir()
    with pytest.raises(UserError, match="can't be written: Is a directory"):
        report(str(tmp_path))
