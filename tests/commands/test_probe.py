import csv
import json
from pathlib import Path

import pytest

import vissl_lite
from vissl_lite.cli import main
from vissl_lite.evaluation import attentive
from vissl_lite.transfer.classification.data import load_labelled


@pytest.mark.slow
def test_evaluates_every_layer_of_an_untrained_encoder(labelled: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["--encoder", "random:test_resnet", "--data", labelled, "--out", out, "--layers"]
    assert main(["probe", *map(str, arguments), "--k", "5"]) == 0
    results = json.loads((out / "results.json").read_text())
    assert list(results["layers"]) == ["act1", "layer1", "layer2", "layer3", "layer4"]
    for scores in (results, *results["layers"].values()):
        assert 0 <= scores["knn"] <= 1
    assert results["linear"] > 0.8  # color tells these classes apart
    assert results["k"] == 5
    assert results["classes"] == ["blue", "green", "red"]
    assert (results["train_images"], results["test_images"]) == (36, 18)
    assert results["trained_on"].startswith("Fitted to 36 labels; penalties are chosen by")


@pytest.mark.slow
def test_the_split_is_written_down_and_reads_back(labelled: Path, tmp_path: Path) -> None:
    result = vissl_lite.probe(encoder="random:test_vit", data=labelled, out=tmp_path / "run")
    again = load_labelled(result.run / "split.csv")
    assert (len(again.train), len(again.val), len(again.test)) == (30, 6, 18)


@pytest.mark.slow
def test_labels_can_be_few(labelled: Path, tmp_path: Path) -> None:
    for shots in (1, 3):
        out = tmp_path / str(shots)
        result = vissl_lite.probe(encoder="random:test_resnet", data=labelled, out=out, shots=shots)
        with (out / "split.csv").open(newline="") as file:
            rows = [row["split"] for row in csv.DictReader(file)]
        assert rows.count("train") == 3 * shots
        assert result.linear > 0.4


@pytest.mark.parametrize("command", ["probe", "finetune"])
def test_the_size_of_the_images_fits_the_patches_of_an_untrained_encoder(
    command: str, labelled: Path, tmp_path: Path
) -> None:
    """Images of 32 pixels, patches of 14."""
    arguments = ["--encoder", "random:vit_small_patch14_dinov2", "--data", str(labelled)]
    assert main([command, *arguments, "--out", str(tmp_path / "run"), "--dry_run"]) == 0


@pytest.mark.parametrize("backbone", ["test_vit", "test_resnet"])
def test_an_attentive_probe_stands_beside_the_others(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backbone: str
) -> None:
    monkeypatch.setattr(attentive, "MAX_STEPS", 30)
    monkeypatch.setattr(attentive, "PENALTIES", (1e-2, 1e-3))
    out = tmp_path / "run"
    result = vissl_lite.probe(encoder=f"random:{backbone}", data=labelled, out=out, attentive=True)
    results = json.loads((out / "results.json").read_text())
    assert results["attentive"] == result.attentive
    assert results["attentive"] > 0.8  # color tells these classes apart
    assert "penalty of the attentive probe: 0.0" in (out / "log.txt").read_text()
