import json
from functools import partial
from pathlib import Path

from vissl_lite.cli import main
from vissl_lite.data.sample import make_sample_data


def test_tells_the_whole_story(tmp_path: Path, capsys, monkeypatch) -> None:
    from vissl_lite.commands import demo

    monkeypatch.setattr(demo, "BACKBONE", "test_resnet")
    monkeypatch.setattr(demo, "SIZE", 32)
    few = partial(make_sample_data, train=60, val=40, test=60)
    monkeypatch.setattr(demo, "make_sample_data", few)
    out = tmp_path / "demo"
    options = ["--unlabelled", "64", "--max_time", "5", "--seeds", "2", "--shots", "2"]
    assert main(["demo", "--out", str(out), *options]) == 0
    scores = json.loads((out / "results.json").read_text())["scores"]
    for measure in ("kNN", "linear", "fine-tuned"):
        for arm in ("untrained", "pre-trained"):
            assert len(scores[measure][arm]) == 2
    assert (out / "demo.png").stat().st_size > 20_000
    said = capsys.readouterr().err
    assert "±" in said
    assert str(out) in said
    assert (out / "pretrain" / "encoder" / "model.safetensors").is_file()
