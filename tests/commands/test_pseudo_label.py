"""Pseudo-labels, and training on them, through the command line."""

import csv
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import yaml
from PIL import Image

import vissl_lite
from tests.conftest import with_pictures
from vissl_lite.cli import main
from vissl_lite.commands import self_training
from vissl_lite.commands.self_training import (
    PseudoLabels,
    check_same_reading,
    load_pseudo_labels,
    read_unlabelled,
    self_train,
)
from vissl_lite.data.image_reader import ImageReader
from vissl_lite.data.image_survey import ImageSettings
from vissl_lite.errors import OutOfMemoryError, UserError
from vissl_lite.sample.dataset import make_sample_data
from vissl_lite.transfer.tasks import TASKS


def run(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sample") / "data"
    return make_sample_data(out, unlabelled=8, train=20, val=10, test=10, size=48, processes=1)


@pytest.fixture(scope="module")
def tuned(encoder: Path, labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tuned"
    common = ("--data", labelled, "--encoder", encoder, "--epochs", 6, "--frozen_norm", "true")
    assert run("finetune", *common, "--num_workers", 0, "--out", out) == 0
    return out


@pytest.fixture(scope="module")
def pool(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unlabelled images: 30 new ones, two of the test part, one of the training part."""
    folder = tmp_path_factory.mktemp("pool")
    for index in range(30):
        image = np.random.default_rng(index).integers(0, 120, (32, 32, 3), dtype=np.uint8)
        image[..., index % 3] += 130
        Image.fromarray(image).save(folder / f"{('red', 'green', 'blue')[index % 3]}-{index}.png")
    for number, name in enumerate(("test/red/0", "test/blue/1", "train/red/2")):
        shutil.copy(labelled / f"{name}.png", folder / f"{name.split('/')[1]}-copy{number}.png")
    return folder


@pytest.fixture(scope="module")
def pseudo_labels(tuned: Path, pool: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "pseudo"
    options = ("--min_precision", 0.5, "--pictures", 2)
    with with_pictures():
        assert run("pseudo-label", "--model", tuned, "--data", pool, "--out", out, *options) == 0
    return out


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as table:
        return list(csv.DictReader(table))


def test_confident_predictions_are_written_as_labels(
    tuned: Path, pseudo_labels: Path, pool: Path
) -> None:
    rows = rows_of(pseudo_labels / "pseudo_labels.csv")
    results = json.loads((pseudo_labels / "results.json").read_text())
    assert results["images"] == 33
    assert len(rows) == results["labels"] == sum(results["labelled"].values()) >= 11
    assert all(float(row["confidence"]) >= results["min_confidence"] - 1e-4 for row in rows)
    right = [Path(row["path"]).name.startswith(row["label"]) for row in rows]
    assert sum(right) > len(rows) / 2
    assert results["precision"] >= 0.5
    assert results["held_out_images"] <= 36
    assert len((pseudo_labels / "unlabelled.txt").read_text().splitlines()) == 33
    trained_on = [Path(path) for path in (pseudo_labels / "trained_on.txt").read_text().split()]
    assert len(set(trained_on)) == 36  # validation images, too
    assert {path.parents[1].name for path in trained_on} == {"train"}
    assert len(list((pseudo_labels / "pictures").iterdir())) == 2
    assert "report.html" in {path.name for path in pseudo_labels.iterdir()}
    said = (pseudo_labels / "log.txt").read_text()
    config = yaml.safe_load((tuned / "config.yaml").read_text())
    assert (
        f"vissl-lite finetune --task classification --encoder {config['encoder']} "
        f"--data {config['data']} --pseudo_labels {pseudo_labels} --out"
    ) in said


def test_a_number_is_taken_as_it_is(tuned: Path, pool: Path, tmp_path: Path) -> None:
    result = vissl_lite.pseudo_label(model=tuned, data=pool, out=tmp_path, min_confidence=0)
    assert len(rows_of(result.labels)) == result.images == 33
    assert result.min_confidence == 0


def test_later_rounds_read_the_images_as_pseudo_label_did(
    pseudo_labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_unlabelled(pseudo_labels).reading == ImageSettings()
    other = tmp_path / "other"
    shutil.copytree(pseudo_labels, other)
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("nodata: null", "nodata: 7.0"))
    unlabelled = replace(read_unlabelled(other), min_confidence=0.5)
    assert unlabelled.reading.nodata == 7
    own = ImageReader(bands=(0,), low=(0.0,), high=(9.0,), mean=(0.5,), std=(0.2,))
    encoder, used = SimpleNamespace(reader=own), []
    model: Any = SimpleNamespace(confidence=None, model=SimpleNamespace(encoder=encoder))
    task: Any = SimpleNamespace(pseudo_label=lambda *_: used.append(encoder.reader.nodata))
    monkeypatch.setattr(self_training, "load_pseudo_labels", lambda *_: None)
    data: Any = SimpleNamespace(classes=["cat", "dog"])
    self_training._label_again(task, data, model, unlabelled, tmp_path / "2")
    assert used == [7]
    assert encoder.reader is own


class Rounds:
    """What ``self_train`` calls, with labels and models that are only counted."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, fails: int = 99, error: UserError | None = None
    ) -> None:
        self.labelled, self.read, self.fails = 0, list[str](), fails
        self.error = error or OutOfMemoryError("out of memory")
        monkeypatch.setattr(self_training, "_label_again", self.label_again)
        monkeypatch.setattr(self_training, "load_pseudo_labels", self.load)
        self.task: Any = SimpleNamespace(evaluate=lambda *_: None)

    def label_again(self, *given: Any) -> None:
        self.labelled += 1
        given[-1].mkdir(parents=True)
        (given[-1] / "pseudo_labels.csv").write_text(f"labels {self.labelled}")

    def load(self, task: Any, folder: Path, data: Any) -> PseudoLabels:
        self.read.append((folder / "pseudo_labels.csv").read_text())
        return PseudoLabels(data, {})

    def train(self, run: Path, resume: bool = False) -> list[Any]:
        def fit(data: Any, number: int) -> Any:
            if number >= self.fails:
                raise self.error
            return SimpleNamespace(model=None, number=number)

        none = cast("Any", None)
        first, pool = PseudoLabels(none, {}), cast("Any", "unlabelled")
        return self_train(self.task, none, first, pool, 2, run, fit, resume)


def test_a_round_that_is_resumed_keeps_its_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = Rounds(monkeypatch)
    rounds.train(tmp_path)
    rounds.train(tmp_path, resume=True)
    assert rounds.read == ["labels 1", "labels 1"]
    (tmp_path / "rounds" / "2" / "pseudo_labels.csv").rename(
        tmp_path / "rounds" / "2" / "pseudo_labels.csv.part"
    )
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: None)
    rounds.train(tmp_path, resume=True)  # it was stopped while labelling
    assert rounds.read[2:] == ["labels 2"]


@pytest.mark.parametrize("fails", [1, 2])
def test_a_round_that_fails_ends_them_and_the_models_before_are_kept(
    fails: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = Rounds(monkeypatch, fails).train(tmp_path)
    assert [one.fitted.number for one in found] == list(range(fails))
    assert f"There is no round {fails}: out of memory" in caplog.text


def test_a_round_whose_checkpoint_is_damaged_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="is damaged"):
        Rounds(monkeypatch, 1, UserError("last.ckpt is damaged")).train(tmp_path)


def test_images_that_are_read_otherwise_are_refused(tmp_path: Path) -> None:
    check_same_reading(tmp_path, ImageSettings())
    (tmp_path / "config.yaml").write_text("bands: 2,3,4\naxis: null\n")
    check_same_reading(tmp_path, ImageSettings(bands="2,3,4"))
    with pytest.raises(UserError, match=r"were read with --bands 2,3,4, and all images"):
        check_same_reading(tmp_path, ImageSettings())


def test_images_of_groups_in_validation_and_test_are_left_out(tmp_path: Path) -> None:
    """Other images of patients p3 and p4, in another folder and in one below it."""
    random = np.random.default_rng(0)

    def save(file: Path) -> Path:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
        return file

    patients = {"train": ("p1", "p2"), "val": ("p3",), "test": ("p4",)}
    for part, name, sort in itertools.product(patients, ("a", "b"), range(2)):
        for patient in patients[part]:
            save(tmp_path / "data" / part / ("cat", "dog")[sort] / patient / f"{name}.png")
    names = ("p1/c.png", "p3/c.png", "more/p4/c.png", "p5/c.png")
    pool = [save(tmp_path / "pool" / name) for name in names]
    lines = ["path,label,confidence", *(f"{path},cat,0.9" for path in pool)]
    (tmp_path / "pseudo_labels.csv").write_text("\n".join(lines))
    task = TASKS["classification"]
    for group_by, kept in ((r"/(p\d)/", (0, 3)), (None, (0, 1, 2, 3))):
        settings = task.settings(epochs=1, group_by=group_by)
        data = task.load_data(str(tmp_path / "data"), settings)
        found = load_pseudo_labels(task, tmp_path, data)
        assert found.data.paths("train") == [str(pool[index]) for index in kept]
        assert found.left_out == {"test": len(kept) == 2, "val": len(kept) == 2, "train": 0}


@pytest.mark.slow
def test_images_of_the_test_part_are_left_out_and_rounds_are_compared(
    pseudo_labels: Path, encoder: Path, labelled: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    everything = tmp_path / "pseudo"
    shutil.copytree(pseudo_labels, everything)
    rows = [
        [row["path"], Path(row["path"]).name.split("-")[0], 1, 0.5]
        for row in ({"path": path} for path in (everything / "unlabelled.txt").read_text().split())
    ]
    with (everything / "pseudo_labels.csv").open("w", newline="") as file:
        table = csv.writer(file, delimiter=";")  # as Excel writes it in some countries
        table.writerows([["path", "label", "confidence", "weight"], *rows])
    with (everything / "trained_on.txt").open("a") as file:
        file.write("/elsewhere.png\n")
    common = ("--data", labelled, "--encoder", encoder, "--num_workers", 0, "--epochs", 2)
    options = ("--pseudo_labels", everything, "--rounds", 2, "--frozen_norm", "true")
    with with_pictures():
        assert run("finetune", *common, *options, "--out", out) == 0
    results = json.loads((out / "results.json").read_text())
    found = results["pseudo_labels"]
    first, second, third = found["rounds"]
    assert third["pseudo_labelled"] > 0
    again = rows_of(out / "rounds" / "2" / "pseudo_labels.csv")
    assert third["pseudo_labelled"] + sum(third["left_out"].values()) == len(again)
    assert first["pseudo_labelled"] == 0
    assert second["pseudo_labelled"] == 30
    assert second["left_out"] == {"test": 2, "val": 0, "train": 1}
    assert results["train_images"] == 36  # true labels
    trained_on = (out / "model" / "trained_on.txt").read_text().split()
    assert ("/elsewhere.png" in trained_on) == (found["kept"] > 0)  # the labeller's, too
    assert len(trained_on) == 36 + (found["kept"] > 0)
    assert results["test"] == found["rounds"][found["kept"]]["test"]
    best = min(one["val"]["calibrated_loss"] for one in found["rounds"])
    assert results["val"]["calibrated_loss"] == best
    judged = found["rounds"][found["kept"] or 2]
    gap = judged["test"]["top1"] - first["test"]["top1"]
    assert found["difference"]["mean"] == pytest.approx(gap)
    assert found["difference"]["low"] <= gap <= found["difference"]["high"]
    assert {row["split"] for row in rows_of(out / "split.csv")} == {"train", "val", "test"}
    assert len(rows_of(out / "split.csv")) == 54
    assert "Pseudo-labels of" in (out / "report.html").read_text()
    assert (out / "metrics.csv").is_file()


def test_what_can_not_be_used_is_refused(
    tuned: Path, pool: Path, pseudo_labels: Path, labelled: Path, tmp_path: Path, capfd
) -> None:
    def refused(*words: object) -> str:
        assert run(*words, "--out", tmp_path / "out") == 2
        assert not (tmp_path / "out").exists()
        return capfd.readouterr().err

    model = tmp_path / "model"
    shutil.copytree(tuned / "model", model)
    (model / "confidence.json").unlink()
    message = refused("pseudo-label", "--model", model, "--data", pool)
    assert "does not say how often its confident predictions are right" in message
    message = refused("pseudo-label", "--model", tuned, "--data", pool, "--min_confidence", 2)
    assert "--min_confidence 2" in message
    message = refused("finetune", "--data", labelled, "--rounds", 2)
    assert "--rounds 2 needs --pseudo_labels" in message
    message = refused("finetune", "--data", labelled, "--pseudo_labels", pool)
    assert f"no pseudo-labels at {pool}: give a folder that vissl-lite pseudo-label has" in message
    shutil.copytree(pseudo_labels, tmp_path / "pseudo")
    table = tmp_path / "pseudo" / "pseudo_labels.csv"
    for rows, expected in (
        ("path,label\na.png,pink\n", "line 2: the data have no class 'pink'"),
        ("path,label,weight\na.png,red,-1\n", "line 2: the weight '-1' is no positive number"),
        ("path,labels\na.png,red\n", "has no column label"),
        ("path,label\n", "has no pseudo-labels, since no prediction was confident enough"),
        ("path,label\na.png,red\n", "none of the 1 pseudo-labelled images"),
    ):
        table.write_text(rows)
        words = ("--pseudo_labels", tmp_path / "pseudo")
        assert expected in refused("finetune", "--data", labelled, *words)


def test_a_labeller_that_knows_test_images_is_refused(
    pseudo_labels: Path, encoder: Path, labelled: Path, tmp_path: Path, capfd
) -> None:
    def tried(data: Path, pseudo: Path, *more: str) -> tuple[int, str]:
        common = ("--encoder", encoder, "--leaks", "exclude", "--out", tmp_path / "out")
        status = run(
            "finetune", "--data", data, "--pseudo_labels", pseudo, "--dry_run", *common, *more
        )
        return status, " ".join(capfd.readouterr().err.split())

    table = tmp_path / "other_split.csv"  # five training images are tested on
    lines = [
        f"{path},{path.parent.name},{'test' if path.stem in '67' else 'train'}"
        for path in sorted(labelled.glob("train/*/*.png"))
        if path.parent.name != "blue" or path.stem != "7"
    ]
    table.write_text("\n".join(["path,label,split", *lines]))
    message = "was trained on 5 of 5 test images: give the same --data, --test_fold and"
    status, error = tried(table, pseudo_labels)
    assert status == 2
    assert message in error
    copied = Path(shutil.copytree(labelled, tmp_path / "copied"))  # as one does on a cluster
    table.write_text(table.read_text().replace(str(labelled), str(copied)))
    status, error = tried(table, pseudo_labels)
    assert status == 2
    assert message in error
    for data in (labelled, copied):
        status, error = tried(data, pseudo_labels)
        assert status == 0
        assert "can't be checked" not in error
        assert "true labels" not in error
    status, error = tried(labelled, pseudo_labels, "--fraction", "0.5")
    assert status == 0
    assert "the true labels of 18 images that this training does not have" in error
    unknown = Path(shutil.copytree(pseudo_labels, tmp_path / "pseudo"))
    listed = unknown / "trained_on.txt"
    listed.write_text(listed.read_text().replace(str(labelled), "/gone"))
    status, error = tried(labelled, unknown)
    assert status == 0
    assert "36 of 36 images that the model" in error
    listed.unlink()
    status, error = tried(table, unknown)
    assert status == 0
    assert "it can't be checked that no test image is among these images" in error


@pytest.mark.slow
@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_boxes_and_masks_are_written_and_trained_on(
    task: str, sample: Path, encoder: Path, tmp_path: Path
) -> None:
    kind = ("--detector", "fcos") if task == "detection" else ()
    common = ("--task", task, *kind, "--data", sample, "--encoder", encoder, "--num_workers", 0)
    model, pseudo, out = (tmp_path / name for name in ("model", "pseudo", "run"))
    assert run("finetune", *common, "--epochs", 2, "--out", model) == 0
    confidence = json.loads((model / "model" / "confidence.json").read_text())
    assert confidence["of"] == {"detection": "boxes", "segmentation": "pixels"}[task]
    assert confidence["images"][0] == 10
    head = json.loads((model / "model" / "head.json").read_text())
    if task == "detection":  # a detector of two epochs is never sure
        head["threshold"] = 0.06
        (model / "model" / "head.json").write_text(json.dumps(head))
    words = ("--model", model, "--data", sample / "unlabelled", "--min_confidence", 0.06)
    words += ("--pictures", 1)
    assert run("pseudo-label", *words, "--out", pseudo) == 0
    results = json.loads((pseudo / "results.json").read_text())
    assert results["images"] == 8
    assert len(list((pseudo / "pictures").rglob("*.png"))) == 1
    if task == "detection":
        found = json.loads((pseudo / "pseudo_labels.json").read_text())
        assert len(found["annotations"]) == results["labels"] > 0
        assert all(one["score"] >= 0.06 for one in found["annotations"])
        images = len(found["images"])
    else:
        rows = rows_of(pseudo / "pseudo_labels.csv")
        images = len(rows)
        assert all((pseudo / row["mask"]).is_file() for row in rows)
    options = ("--pseudo_labels", pseudo, "--epochs", 1, "--out", out)
    assert run("finetune", *common, *options) == 0
    found = json.loads((out / "results.json").read_text())["pseudo_labels"]
    assert [one["pseudo_labelled"] for one in found["rounds"]] == [0, images]
    assert all(one["steps"] > 0 for one in found["rounds"])
    gap = found["difference"]
    assert gap["low"] <= gap["mean"] <= gap["high"]
    assert found["verdict"] in ("helped", "no difference", "hurt")
