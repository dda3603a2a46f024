import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import timm
import torch
from safetensors.torch import load_file

import vissl_lite
from tests.conftest import with_pictures
from vissl_lite.cli import main
from vissl_lite.commands import finetune as command
from vissl_lite.errors import UserError
from vissl_lite.transfer import fitting
from vissl_lite.transfer.classification.task import Classification
from vissl_lite.transfer.finetuning import TransferSettings
from vissl_lite.transfer.prediction import Predictions


@pytest.fixture(scope="module")
def tuned(encoder: Path, labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tuned"
    arguments = ["--encoder", encoder, "--data", labelled, "--out", out, "--epochs", 12]
    options = ["--batch_size", "10", "--balanced", "--num_workers", "0", "--frozen_norm", "true"]
    with with_pictures():
        assert main(["finetune", "--task", "classification", *map(str, arguments), *options]) == 0
    return out


@pytest.mark.parametrize(
    ("classes", "warned"),
    [(["Left kidney", "spleen", "right kidney"], True), (["left turn", "cleft", "right"], False)],
)
def test_classes_of_two_sides_are_warned_of(
    classes: list[str], warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    command._warn_of_sides(classes)
    assert [getattr(one, "code", "") for one in caplog.records] == ["data.sides"] * warned


def test_a_table_of_classes_with_different_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    """Of masks, only some classes have a metric."""
    scores: Any = SimpleNamespace(
        metrics={"map": 0.5}, per_class={"cat": {"ap": 0.25}, "dog": {"mask_ap": 0.5, "ap": 0.75}}
    )
    fitted: Any = SimpleNamespace(
        train_images=2, train_metrics={}, val_images=1, chosen=SimpleNamespace(metrics={})
    )
    data: Any = SimpleNamespace(test=[1, 2], majority=lambda: None)
    command._print_results(data, scores, fitted, "random:resnet18", Path("run"))
    rows = [line.replace("│", " ").split() for line in capsys.readouterr().err.splitlines()]
    assert ["cat", "0.250"] in rows
    assert ["dog", "0.500", "0.750"] in rows


@pytest.mark.slow
def test_learns_and_reports_on_test_images(tuned: Path) -> None:
    results = json.loads((tuned / "results.json").read_text())
    assert results["test"]["top1"] > 0.8
    assert results["test"]["macro_f1"] > 0.8
    assert results["test_images"] == 18
    assert (tuned / "confusion.png").stat().st_size > 3000
    assert (tuned / "curves.png").stat().st_size > 3000


@pytest.mark.slow
def test_plain_timm_loads_the_model_with_its_classes_named(tuned: Path) -> None:
    model = timm.create_model(f"local-dir:{tuned / 'model'}", pretrained=True)
    assert model.num_classes == 3
    assert list(model.pretrained_cfg["label_names"]) == ["blue", "green", "red"]


def test_predict_writes_path_class_and_probability(
    tuned: Path, labelled: Path, tmp_path: Path
) -> None:
    out = tmp_path / "predictions"
    arguments = ["--model", tuned, "--data", labelled / "test", "--out", out]
    assert main(["predict", *map(str, arguments)]) == 0
    with (out / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 18
    right = [Path(row["path"]).parent.name == row["class"] for row in rows]
    top1 = json.loads((tuned / "results.json").read_text())["test"]["top1"]
    assert sum(right) / 18 == pytest.approx(top1)
    assert all(1 / 3 <= float(row["probability"]) <= 1 for row in rows)


def test_predict_reads_from_the_model_whether_images_have_an_up(
    tuned: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tuned / "model", model)
    config = json.loads((model / "config.json").read_text())
    assert config["vissl_lite"]["upright"] is True
    turns: list[int] = []

    def predict(_: object, __: object, todo: Predictions) -> tuple[Path, int]:
        turns.append(len(todo.turns))
        return todo.run / "predictions.csv", 18

    monkeypatch.setattr(Classification, "predict", predict)
    data, out = str(labelled / "test"), str(tmp_path / "run")
    for upright in (True, False, "yes"):
        config["vissl_lite"]["upright"] = upright
        (model / "config.json").write_text(json.dumps(config))
        if upright != "yes":
            vissl_lite.predict(model=model, data=data, out=out, tta=True, overwrite=True)
    assert turns == [2, 8]
    with pytest.raises(UserError, match=r"config.json is damaged: upright is neither true nor f"):
        vissl_lite.predict(model=model, data=data, out=out, tta=True, overwrite=True)


def test_predict_skips_broken_images(tuned: Path, labelled: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "broken.png").write_bytes(b"nothing")
    sources = [str(labelled / "test" / "red"), str(tmp_path / "photos")]
    result = vissl_lite.predict(model=str(tuned / "model"), data=sources, out=str(tmp_path / "run"))
    assert result.images == 6
    assert "broken.png" in (result.run / "log.txt").read_text()


@pytest.mark.slow
def test_frozen_leaves_the_encoder_as_it_was(encoder: Path, labelled: Path, tmp_path: Path) -> None:
    result = vissl_lite.finetune(
        data=str(labelled),
        out=str(tmp_path / "run"),
        encoder=str(encoder),
        frozen=True,
        epochs=2,
        num_workers=0,
    )
    before, after = (
        load_file(encoder / "model.safetensors"),
        load_file(result.model / "model.safetensors"),
    )
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    assert set(after) - set(before) == {"fc.weight", "fc.bias"}


@pytest.mark.slow
def test_the_same_seed_gives_the_same_model(encoder: Path, labelled: Path, tmp_path: Path) -> None:
    models = []
    for name in ("a", "b"):
        result = vissl_lite.finetune(
            data=str(labelled),
            out=str(tmp_path / name),
            encoder=str(encoder),
            shots=4,
            epochs=2,
            frozen_norm=True,
            num_workers=0,
        )
        models.append(load_file(result.model / "model.safetensors"))
    for name, tensor in models[0].items():
        torch.testing.assert_close(tensor, models[1][name], msg=name)


@pytest.mark.slow
def test_few_labels_are_stratified(encoder: Path, labelled: Path, tmp_path: Path) -> None:
    result = vissl_lite.finetune(
        data=str(labelled),
        out=str(tmp_path / "run"),
        encoder=str(encoder),
        fraction=0.4,
        epochs=1,
        num_workers=0,
    )
    with (result.run / "split.csv").open(newline="") as file:
        rows = [(row["split"], row["label"]) for row in csv.DictReader(file)]
    for name in ("red", "green", "blue"):
        assert rows.count(("train", name)) == 4
        assert rows.count(("test", name)) == 6


@pytest.mark.slow
def test_what_was_chosen_is_in_the_results_and_a_killed_run_goes_on(
    encoder: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the last of the trainings, a run ends as one that was not interrupted."""
    given: dict[str, Any] = {
        "data": str(labelled), "encoder": str(encoder), "epochs": 2, "num_workers": 0,
        "precision": "32-true", "batch_size": 8,
    }  # fmt: skip
    whole = vissl_lite.finetune(out=tmp_path / "whole", **given)
    results = json.loads((whole.run / "results.json").read_text())
    assert (results["folds"], results["val_images"], results["train_images"]) == (3, 36, 36)
    assert results["refit"]
    assert set(results["chosen"]) == {"lr", "tuned_share", "frozen_norm"}
    assert {one["tuned_share"] for one in results["candidates"]} == {0, 0.25, 0.5, 0.75, 1}
    assert results["monitor"] == "calibrated_loss"
    best = min(one["calibrated_loss"] for one in results["candidates"])
    assert results["val"]["calibrated_loss"] == best
    assert results["train"].keys() == results["val"].keys() == {"top1", "loss", "calibrated_loss"}

    original, begun = fitting._Fitting.train, []

    def until_killed(self: Any, settings: Any, data: Any, *rest: Any) -> Any:
        begun.append(len(data.train))
        if begun == [24] * 6 + [36]:  # in three folds with frozen and with trained norms
            raise KeyboardInterrupt
        return original(self, settings, data, *rest)

    monkeypatch.setattr(fitting._Fitting, "train", until_killed)
    with pytest.raises(KeyboardInterrupt):
        vissl_lite.finetune(out=tmp_path / "cut", **given)
    monkeypatch.undo()
    again = vissl_lite.finetune(out=tmp_path / "cut", resume=True, **given)
    assert again.test == whole.test
    one, other = (load_file(run.model / "model.safetensors") for run in (whole, again))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], msg=name)
    for name in ("metrics.csv", "refit.csv"):
        rows = [(run.run / name).read_text().count("\n") for run in (whole, again)]
        assert rows[0] == rows[1]


@pytest.mark.slow
def test_training_on_two_processes(encoder: Path, labelled: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = [
        "finetune",
        "--data",
        labelled,
        "--encoder",
        encoder,
        "--out",
        out,
        "--epochs",
        1,
        "--devices",
        2,
        "--num_workers",
        0,
    ]
    done = subprocess.run(
        [sys.executable, "-m", "vissl_lite", *map(str, words)], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text())
    assert results["train_images"] == 36  # of training and validation part
    assert (out / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--devices", 2, "--batch_size", 9], "--batch_size 9 can't be divided by 2 devices"),
        (["--devices", 4, "--shots", 1], "training images, fewer than 4 devices"),
    ],
)
def test_batches_that_the_devices_cannot_share_are_refused_before_the_run(
    options: list[object],
    message: str,
    labelled: Path,
    encoder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--data", labelled, "--encoder", encoder, "--out", tmp_path / "run", "--dry_run"]
    assert main(["finetune", *map(str, (*words, *options))]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("processes", "expected"), [(1, 31), (2, 30), (40, 40)])
def test_the_batch_of_a_small_fold_is_a_multiple_of_the_devices(
    processes: int, expected: int
) -> None:
    seen: list[int | None] = []
    task: Any = SimpleNamespace(
        build=lambda encoder, data, settings: seen.append(settings.batch_size) or torch.nn.ReLU(),
        starts_fitted=lambda *_: False,
        train=lambda *_: None,
    )
    hardware: Any = SimpleNamespace(processes=lambda: processes)
    data: Any = SimpleNamespace(train=range(31))
    one = fitting._Fitting(task, cast("Any", None), hardware, "loss", None)
    one.train(TransferSettings(batch_size=64), data, 0.1, cast("Any", None))
    assert seen == [expected]
