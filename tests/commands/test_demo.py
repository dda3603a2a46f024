import json
from functools import partial
from pathlib import Path

import pytest

from vissl_lite.cli import main
from vissl_lite.commands import demo
from vissl_lite.sample.dataset import make_sample_data


@pytest.mark.slow
def test_sample_data_pretrain_and_compare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "BACKBONE", "test_resnet")
    monkeypatch.setattr(demo, "IMAGE_SIZE", 32)
    few = partial(make_sample_data, train=60, val=40, test=60)
    monkeypatch.setattr(demo, "make_sample_data", few)
    out = tmp_path / "demo"
    options = ["--unlabelled", "64", "--max_time", "5", "--shots", "2"]
    monkeypatch.setattr(demo, "FINETUNE_EPOCHS", 2)
    assert main(["demo", "--out", str(out), *options]) == 0
    results = json.loads((out / "results.json").read_text())
    compared = json.loads((out / "compare" / "results.json").read_text())
    assert results["verdict"] == compared["verdict"]
    assert list(results["scores"]) == ["kNN", "linear", "fine-tuned"]
    for figures in results["scores"].values():
        assert {name: len(runs) for name, runs in figures.items()} == {
            "untrained": 3,
            "pre-trained": 3,
        }
    arms = compared["protocols"]["linear"]["arms"]
    assert results["scores"]["linear"] == {
        "untrained": arms["random:test_resnet"]["2 per class"]["runs"],
        "pre-trained": arms[str(out / "pretrain")]["2 per class"]["runs"],
    }
    assert compared["sentences"][-1] in " ".join(capsys.readouterr().err.split())
    assert (out / "compare" / "compare.png").is_file()
    assert (out / "pretrain" / "encoder" / "model.safetensors").is_file()


def test_two_seeds_are_too_few(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(tmp_path / "demo"), "--seeds", "2"]) == 2
    assert "--seeds 2 must be at least 3" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()
