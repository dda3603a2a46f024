import json
from pathlib import Path

import pytest

from tests.commands.layouts import CLASSIFICATION, Layout
from vissl_lite.cli import main


@pytest.mark.parametrize("layout", [pytest.param(one, id=one.name) for one in CLASSIFICATION])
def test_layouts(
    layout: Layout,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    layout.build(data)
    monkeypatch.chdir(data)
    out = tmp_path / "run"
    given = ["--data", f"./{layout.data}", *layout.options, "--out", str(out)]
    status = main(["check", *given])
    printed = capsys.readouterr().err
    assert status == 0, printed
    summary = json.loads((out / "run.json").read_text())["labelled"]
    assert tuple(part["images"] for part in summary["parts"].values()) == layout.images
    assert sorted(summary["parts"]["train"]["classes"]) == layout.classes.split()
    for phrase in layout.says:
        assert phrase in printed
