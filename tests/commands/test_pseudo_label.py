"""Pseudo-labels, and training on them, through the command line."""

import csv
import itertools
import json
import shutil
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import vissl_lite
from tests.conftest import with_pictures
from vissl_lite.cli import main
from vissl_lite.commands import self_training
from vissl_lite.commands.finetune import FinetuneOptions
from vissl_lite.commands.pseudo_label import REPEATED, _next_command
from vissl_lite.commands.runs import MAIN_METRICS
from vissl_lite.commands.self_training import (
    PseudoLabels,
    check_same_reading,
    load_pseudo_labels,
    read_unlabelled,
    self_train,
)
from vissl_lite.data.fingerprints import Fingerprints, fingerprints_of
from vissl_lite.data.image_reader import ImageReader
from vissl_lite.data.image_survey import ImageSettings
from vissl_lite.data.text_file import read_paths
from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.errors import OutOfMemoryError, UserError
from vissl_lite.sample.dataset import make_sample_data
from vissl_lite.transfer.classification.model import Classifier, save_classifier
from vissl_lite.transfer.tasks import TASKS

NO_PRINTS = fingerprints_of([])


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
    assert len(rows) == results["labelled_images"] == sum(results["labelled"].values()) >= 11
    assert set(results).issuperset(MAIN_METRICS["pseudo-label"])
    assert results["trained_on_images"] == 0  # a copy is another file
    assert "excluded" not in results
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
    assert f"{len(rows)} of 33 images that were read have pseudo-labels: " in said
    config = yaml.safe_load((tuned / "config.yaml").read_text())
    assert (
        f"vissl-lite finetune --task classification --encoder {config['encoder']} "
        f"--data {config['data']} --pseudo_labels {pseudo_labels} --out"
    ) in said


def test_a_number_is_taken_as_it_is(tuned: Path, pool: Path, tmp_path: Path) -> None:
    result = vissl_lite.pseudo_label(model=tuned, data=pool, out=tmp_path, min_confidence=0)
    assert len(rows_of(result.labels)) == result.images == 33
    assert result.min_confidence == 0


def test_images_that_the_model_was_trained_on_are_counted(
    tuned: Path, labelled: Path, tmp_path: Path
) -> None:
    result = vissl_lite.pseudo_label(model=tuned, data=labelled, out=tmp_path, min_confidence=0)
    assert json.loads((tmp_path / "results.json").read_text())["trained_on_images"] == 36
    said = (tmp_path / "log.txt").read_text()
    assert (
        f"{result.images} of {result.images} images that were read have pseudo-labels (the model "
        f"was trained on 36 of them): {result.labels}"
    ) in said


def test_images_without_any_class_count_as_labelled(
    encoder: Path, pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several labels per image, "none of them" is a label, too."""
    folder = tmp_path / "tuned" / "model"
    model = build_encoder("test_resnet", 32)
    save_classifier(Classifier(model, ["red", "green"], multi_label=True), folder, {})
    none = lambda logits, multi_label: (  # noqa: E731
        torch.ones(len(logits)),
        torch.zeros(logits.shape, dtype=torch.long),
    )
    place = "vissl_lite.transfer.classification.pseudo_labels.confident_labels"
    monkeypatch.setattr(place, none)
    out = tmp_path / "pseudo"
    result = vissl_lite.pseudo_label(model=folder, data=pool, out=out, min_confidence=0.5)
    assert len(rows_of(result.labels)) == 33
    assert result.labelled == {"red": 0, "green": 0}
    said = (out / "log.txt").read_text()
    assert "33 of 33 images that were read have pseudo-labels: " in said
    assert "vissl-lite finetune --task classification" in said


def test_excluded_images_and_copies_of_them_get_no_label(
    tuned: Path, pool: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images = Path(shutil.copytree(pool, tmp_path / "images"))
    Image.open(images / "red-0.png").resize((64, 64)).save(images / "larger.png")
    (images / "broken.png").write_bytes(b"no image")
    table = tmp_path / "not_usable.csv"
    named = [images / "red-0.png", images / "broken.png", tmp_path / "gone.png"]
    table.write_text("\n".join(["path,not_usable", *(f"{path},1" for path in named)]) + "\n")
    words = ("--model", tuned, "--data", images, "--min_confidence", 0, "--exclude", table)
    assert run("pseudo-label", *words, "--out", tmp_path / "out") == 0
    left_out = {"red-0.png", "larger.png", "broken.png"}
    expected = {path.name for path in images.iterdir()} - left_out
    rows = rows_of(tmp_path / "out" / "pseudo_labels.csv")
    assert {Path(row["path"]).name for row in rows} == expected
    assert {Path(path).name for path in read_paths(tmp_path / "out" / "unlabelled.txt")} == expected
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["excluded"], results["skipped"]) == (3, 0)
    said = (tmp_path / "out" / "log.txt").read_text()
    assert "Left out by --exclude: 2 images that it names, and 1 near-duplicates of them" in said
    assert "1 of the 3 images that --exclude names are not among the images of --data" in said
    table.write_text("\n".join(["path", *map(str, images.iterdir())]) + "\n")
    assert run("pseudo-label", *words, "--out", tmp_path / "none") == 2
    assert "--exclude leaves none of the 35 images of --data" in capfd.readouterr().err
    assert not (tmp_path / "none").exists()


def test_the_next_command_trains_the_same_model_on_the_same_labels(tmp_path: Path) -> None:
    options = FinetuneOptions(
        data="boxes",
        out="run",
        encoder="runs/a b",
        task="detection",
        detector="mask_rcnn",
        fraction=0.5,
        seed=3,
        frozen=True,
        upright=False,
        lr=0.01,
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(options.as_config()))
    words = _next_command(TASKS["detection"], tmp_path, tmp_path / "pseudo")
    assert words == (
        f"vissl-lite finetune --task detection --encoder 'runs/a b' --data boxes "
        f"--detector mask_rcnn --fraction 0.5 --seed 3 --frozen true --upright false "
        f"--pseudo_labels {tmp_path / 'pseudo'} --out {tmp_path / 'pseudo-model'}"
    )
    options = FinetuneOptions(
        data="labels.csv", out="run", shots=4, class_weights={"cat": 2.0}, path_column="where"
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(options.as_config()))
    words = _next_command(TASKS["classification"], tmp_path, tmp_path / "pseudo")
    assert "--class_weights.cat 2.0 --path_column where --shots 4 --pseudo" in words


def test_options_that_are_repeated_have_the_defaults_of_finetune() -> None:
    defaults = {one.name: one.default for one in fields(FinetuneOptions)}
    assert {name: defaults[name] for name in REPEATED} == REPEATED


def test_paths_with_line_breaks_stay_whole(tuned: Path, pool: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    names = ["two\nlines.png", "plain.png"]
    for name in names:
        shutil.copy(pool / "red-0.png", images / name)
    out = tmp_path / "out"
    vissl_lite.pseudo_label(model=tuned, data=images, out=out, min_confidence=0)
    assert set(read_unlabelled(out).paths) == {str(images / name) for name in names}


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
        return PseudoLabels(data, {}, NO_PRINTS)

    def train(self, run: Path, resume: bool = False) -> list[Any]:
        def fit(data: Any, number: int) -> Any:
            if number >= self.fails:
                raise self.error
            return SimpleNamespace(model=None, number=number)

        none = cast("Any", None)
        first, pool = PseudoLabels(none, {}, NO_PRINTS), cast("Any", "unlabelled")
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
        assert found.prints.paths == found.data.paths("train")
        assert found.left_out == {"test": len(kept) == 2, "val": len(kept) == 2, "train": 0}


@pytest.mark.slow
def test_pseudo_labelled_images_are_training_images_for_the_leak_guard(
    tuned: Path,
    pseudo_labels: Path,
    encoder: Path,
    labelled: Path,
    pool: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    everything = Path(shutil.copytree(pseudo_labels, tmp_path / "pseudo"))
    lines = [f"{path},{path.name.split('-')[0]},0.9" for path in sorted(pool.iterdir())]
    (everything / "pseudo_labels.csv").write_text("\n".join(["path,label,confidence", *lines]))
    start = Path(shutil.copytree(encoder, tmp_path / "start"))
    pretrained = sorted(map(str, labelled.glob("train/red/*.png")))[:2]
    fingerprints_of(pretrained).save(start / "fingerprints.npz")
    monkeypatch.setattr("vissl_lite.commands.finetune.best_round", lambda *_: 1)
    common = ("--data", labelled, "--encoder", start, "--epochs", 1, "--num_workers", 0)
    more = ("--frozen_norm", "true", "--pseudo_labels", everything)
    out = tmp_path / "run"
    assert run("finetune", *common, *more, "--out", out) == 0
    added = {str(path) for path in pool.iterdir() if "copy" not in path.name}
    assert set(Fingerprints.load(out / "model" / "fingerprints.npz").paths) == added | {*pretrained}
    assert added.isdisjoint(read_paths(out / "model" / "trained_on.txt"))
    # as a test part, they are leaks of this model, but not of the one without pseudo-labels
    tested = tmp_path / "tested.csv"
    lines = [f"{path},{path.parent.name},train" for path in sorted(labelled.glob("train/*/*.png"))]
    lines += [f"{path},{Path(path).name.split('-')[0]},test" for path in sorted(added)]
    tested.write_text("\n".join(["path,label,split", *lines]))
    for model, count in ((out / "model", 30), (tuned / "model", 0)):
        probed = tmp_path / f"probe-{count}"
        assert run("probe", "--encoder", model, "--data", tested, "--out", probed) == 0
        assert json.loads((probed / "results.json").read_text())["leaks"] == count
        said = "30 test images are among the images that the encoder was trained on (30 exact)"
        assert (said in (probed / "log.txt").read_text()) == (count > 0)
    # what is done with this model on the same images goes on as before
    words = ("--model", out, "--data", pool)
    assert run("predict", *words, "--out", tmp_path / "predicted") == 0
    assert run("pseudo-label", *words, "--min_confidence", 0, "--out", tmp_path / "again") == 0
    assert "Leaks" not in (tmp_path / "again" / "log.txt").read_text()
    words = ("finetune", "--data", labelled, "--encoder", start, "--dry_run", "--leaks", "error")
    assert run(*words, "--pseudo_labels", tmp_path / "again", "--out", tmp_path / "next") == 0


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
    message = (
        "was trained on 5 of 5 test images, perhaps since the test part is made anew when labels "
        "are added: train a model on these labels and make the pseudo-labels again, or give the "
        "same --data, --test_fold and --group_by as for that model, or a test part that it was not"
    )
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
    assert "the same --fraction or --shots with the same --seed" in error
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
        assert len(found["annotations"]) == sum(results["labelled"].values()) > 0
        assert results["labelled_images"] == len(found["images"])
        assert all(one["score"] >= 0.06 for one in found["annotations"])
        images = len(found["images"])
    else:
        rows = rows_of(pseudo / "pseudo_labels.csv")
        images = len(rows)
        assert results["labelled_images"] == images
        assert all((pseudo / row["mask"]).is_file() for row in rows)
    options = ("--pseudo_labels", pseudo, "--epochs", 1, "--out", out)
    assert run("finetune", *common, *options) == 0
    found = json.loads((out / "results.json").read_text())["pseudo_labels"]
    assert [one["pseudo_labelled"] for one in found["rounds"]] == [0, images]
    assert all(one["steps"] > 0 for one in found["rounds"])
    gap = found["difference"]
    assert gap["low"] <= gap["mean"] <= gap["high"]
    assert found["verdict"] in ("helped", "no difference", "hurt")
