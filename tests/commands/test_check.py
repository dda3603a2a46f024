import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.commands.box_layouts import BOX, DETECTION
from tests.commands.layouts import (
    CLASSIFICATION,
    Layout,
    write_image,
    write_images,
    write_text,
)
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


def refusal(*words: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["check", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_the_report_shows_the_table_and_the_labels(tmp_path: Path) -> None:
    write_images(tmp_path / "pets", {f"{part}/{c}": 4 for part in ("train", "val") for c in "ab"})
    write_text(tmp_path / "pets" / "train" / "a" / "9.png", "no image")
    assert main(["check", "--data", str(tmp_path / "pets"), "--out", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    for text in ("Labelled data", "validation part, val/", "a 3, b 3", "Check that the labels"):
        assert text in page
    assert "1 image that can&#39;t be read, left out" in page
    left_out = json.loads((tmp_path / "run" / "run.json").read_text())["labelled"]["left_out"]
    assert left_out == {"image that can't be read, left out": 1}
    assert (tmp_path / "run" / "labels.png").is_file()
    assert (tmp_path / "run" / "split.csv").is_file()


def test_without_out_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "pets", {"a": 4, "b": 4})
    monkeypatch.chdir(tmp_path)
    assert main(["check", "--data", "pets"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["pets"]
    lines = capsys.readouterr().err.splitlines()
    assert lines[-4].split() == ["part", "images", "from", "labels", "per", "class"]
    assert lines[-3].split() == ["training", "4", "60", "%", "a", "2,", "b", "2"]


@pytest.mark.parametrize("command", ["finetune", "probe", "compare"])
def test_a_dry_run_stops_after_the_table(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "pets", {"a": 4, "b": 4})
    given = ["--data", str(tmp_path / "pets"), "--out", str(tmp_path / "run"), "--dry_run"]
    encoders = ["random:test_resnet", *(["random:test_vit"] if command == "compare" else [])]
    assert main([command, "--encoder", *encoders, *given]) == 0
    printed = capsys.readouterr().err
    assert "a 2, b 2" in printed
    assert printed.endswith("Nothing was trained or written (--dry_run)\n")
    assert not (tmp_path / "run").exists()


def test_labels_of_several_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for layout in DETECTION:
        if layout.name == "Pascal VOC in folders of parts":
            layout.build(tmp_path / "pets")
    for number in range(6):
        write_image(tmp_path / "pets" / "Train" / "cat" / f"c{number}.png")
        write_image(tmp_path / "pets" / "Train" / "dog" / f"d{number}.png")
    assert main(["check", "--data", str(tmp_path / "pets")]) == 0
    printed = capsys.readouterr().err
    assert "The labels are for --task detection; they also fit --task classification" in printed


def test_refusals_lead_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere does not exist" in refusal("--data", "nowhere", capsys=capsys)
    write_images(tmp_path, {"images": 3})
    error = refusal("--data", str(tmp_path), capsys=capsys)
    assert f"{tmp_path} fits no task: as classification: " in error
    assert "; as detection: " in error
    one = ["--data", str(tmp_path), "--task", "classification"]
    assert "put the images of each class into a folder" in refusal(*one, capsys=capsys)
    assert "--task x is none of" in refusal(*one[:-1], "x", capsys=capsys)
    rows = "".join(f"{file},\n" for file in (tmp_path / "images").iterdir())
    (tmp_path / "to_label.csv").write_text(f"path,label\n{rows}")  # as select writes it
    error = refusal("--data", str(tmp_path / "to_label.csv"), capsys=capsys)
    assert "as classification: 3 of 3 rows can't be used: 3 images without a label" in error
    assert "; as segmentation: the column label is empty; as detection: " in error
    level = ["--class_level", "0"]
    assert "--class_level 0 must be at least 1" in refusal(*one, *level, capsys=capsys)
    given = ["--task", "detection", "--class_level", "2", "--data", str(tmp_path)]
    assert "--class_level is for --task classification" in refusal(*given, capsys=capsys)
