import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.commands.box_layouts import BOX, DETECTION
from tests.commands.layouts import CLASSIFICATION, Layout
from tests.commands.mask_layouts import SEGMENTATION
from vissl_lite.cli import main

LAYOUTS = [*CLASSIFICATION, *DETECTION, *SEGMENTATION]


@pytest.mark.parametrize("layout", [pytest.param(one, id=one.name) for one in LAYOUTS])
def test_layouts(
    layout: Layout,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    layout.build(data)
    monkeypatch.chdir(data)
    given = ["--data", f"./{layout.data}", *layout.options, "--out", str(run)]
    status = main(["check", *given])
    printed = capsys.readouterr().err
    assert status == 0, printed
    summary = json.loads((run / "run.json").read_text())["labelled"]
    parts = summary["parts"].values()
    assert tuple(part["images"] for part in parts) == layout.images
    assert sorted(summary["parts"]["train"]["classes"]) == layout.classes.split()
    for phrase in layout.says:
        assert phrase in printed
    assert yaml.safe_load((run / "config.yaml").read_text())["task"] == layout.task
    if layout.task == "detection":
        content = json.loads((run / "split" / "train.json").read_text())
        boxes = np.array([one["bbox"] for one in content["annotations"]])
        x1, y1, x2, y2 = BOX
        np.testing.assert_allclose(boxes, [[x1, y1, x2 - x1, y2 - y1]] * len(boxes), atol=1e-4)
        assert len(boxes) >= layout.images[0] - 1
