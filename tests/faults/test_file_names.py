"""Names of image files that are no plain text, through every command and file that names them."""

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vissl_lite.cli import main
from vissl_lite.data.images import find_images
from vissl_lite.data.reading import printable
from vissl_lite.errors import UserError
from vissl_lite.evaluation import embedding
from vissl_lite.sample.dataset import make_sample_data
from vissl_lite.transfer.classification.data import load_labelled
from vissl_lite.transfer.detection.data import load_boxes
from vissl_lite.transfer.prediction import MAX_NAME_BYTES, file_name
from vissl_lite.transfer.sources.file_tree import FileTree
from vissl_lite.transfer.sources.tables import read_table

NAMES = [
    b"caf\xe9.jpg",  # Latin-1
    b"\xff\xfe.jpg",
    b"a" * 251 + b".jpg",
    "é".encode() * 125 + b".jpg",
    b"new\nline.jpg",
    b"carriage\rreturn.jpg",
    b"q\"uo'te.jpg",
    b"a,b;c|d.jpg",
    b"--model.jpg",
    "right to \u202egpj.jpg".encode(),
    b"escape\x1b[31m.jpg",
    b" spaces .jpg",
    "zero\u200bwidth.jpg".encode(),
    b"<b>&amp;$x$.jpg",
    b"%s%d{}.jpg",
    b"tab\t.jpg",
    "\U0001f600.jpg".encode(),
    b"back\\slash.jpg",
    b"[a-z]*?.jpg",
    "line\u2028separator.jpg".encode(),
    b"next\x85line.jpg",
]
SMALL = ["--encoder", "random:test_resnet", "--image_size", 32]
SHORT = ["--epochs", 1, "--num_workers", 0]


@pytest.fixture(autouse=True)
def no_umap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "UMAP_LEAST", 10**9)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample") / "data"
    return make_sample_data(folder, unlabelled=1, train=30, val=10, test=10, size=32, processes=1)


def named(images: list[Path], folder: Path, suffix: bytes = b".jpg") -> Path:
    """A folder of images with the names."""
    folder.mkdir(parents=True)
    for image, name in zip(images, NAMES, strict=False):
        try:
            shutil.copy(image, os.fsencode(folder) + b"/" + name[:-4] + suffix)
        except OSError:
            pytest.skip("this file system takes no such names")
    return folder


@pytest.fixture(scope="module")
def data(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of three tasks: labelled (two classes), segmentation, detection."""
    root = tmp_path_factory.mktemp("names")
    images = sorted((sample / "labelled" / "train").rglob("*.jpg"))
    masks = sorted((sample / "masks" / "train").rglob("*.png"))
    for part in ("train", "test"):
        for shift, name in enumerate(("one", "other")):
            named(images[shift:] + images[:shift], root / "labelled" / part / name)
    named(images, root / "segmentation" / "images")
    named(masks, root / "segmentation" / "masks", b".png")
    boxes = named(images, root / "detection")
    listed = [
        {"id": i, "file_name": os.fsdecode(name), "height": 32, "width": 32}
        for i, name in enumerate(NAMES)
    ]
    notes = [
        {"id": i, "image_id": i, "category_id": 1, "bbox": [4, 4, 20, 20], "iscrowd": 0}
        for i in range(len(NAMES))
    ]
    content = {"images": listed, "annotations": notes, "categories": [{"id": 1, "name": "x"}]}
    (boxes / "annotations.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def models(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of finetune for each task, on images with the names."""
    root = tmp_path_factory.mktemp("models")
    for task in TASKS:
        source = data / ("labelled" if task == "classification" else task)
        words = ["--refit", "false", *SMALL, *SHORT, "--out", root / task]
        assert run("finetune", "--task", task, "--data", source, *words) == 0
    return root


TASKS = ("classification", "segmentation", "detection")


def run(*words: Any) -> int:
    return main([str(word) for word in words])


def warnings(folder: Path) -> list[str]:
    """What the log warns of, but for copies of images, and what a short training has learned."""
    lines = (folder / "log.txt").read_text().splitlines()
    expected = (" Leaks: ", " are classified as one")
    return [line for line in lines if " WARNING " in line and not any(e in line for e in expected)]


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_the_split_that_is_written_is_read_again(task: str, models: Path, tmp_path: Path) -> None:
    assert warnings(models / task) == []
    split = models / task / ("split" if task == "detection" else "split.csv")
    assert run("finetune", "--task", task, "--data", split, *SMALL, *SHORT,
               "--out", tmp_path / "again") == 0  # fmt: skip
    first, again = (
        json.loads((place / "results.json").read_text())
        for place in (models / task, tmp_path / "again")
    )
    for part in ("train", "val", "test"):
        assert first[f"{part}_images"] == again[f"{part}_images"] > 0
    assert warnings(tmp_path / "again") == []


@pytest.mark.slow
def test_classes_are_predicted_in_a_table(models: Path, data: Path, tmp_path: Path) -> None:
    source, out = data / "labelled", tmp_path / "out"
    assert run("predict", "--model", models / "classification", "--data", source, "--pictures", 200,
               "--out", out) == 0  # fmt: skip
    with (out / "predictions.csv").open(newline="", errors="surrogateescape") as file:
        paths = [row["path"] for row in csv.DictReader(file)]
    assert paths == find_images([source])
    assert len(paths) == 4 * len(NAMES)
    assert len(list((out / "pictures").rglob("*.png"))) == len(paths)
    assert not list(out.glob("*.part"))
    assert warnings(out) == []
    assert run("report", out) == 0


@pytest.mark.slow
def test_boxes_are_predicted_in_json(models: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("predict", "--model", models / "detection", "--data", data / "detection",
               "--pictures", 200, "--out", out) == 0  # fmt: skip
    content = json.loads((out / "predictions.json").read_text())
    assert [one["file_name"] for one in content["images"]] == find_images([data / "detection"])
    assert len(list((out / "pictures").iterdir())) == len(NAMES)
    assert [file.name for file in out.glob("predictions*")] == ["predictions.json"]


@pytest.mark.slow
def test_masks_have_the_names_of_their_images(models: Path, data: Path, tmp_path: Path) -> None:
    source, out = data / "segmentation" / "images", tmp_path / "out"
    assert run("predict", "--model", models / "segmentation", "--data", source, "--pictures", 200,
               "--out", out) == 0  # fmt: skip
    expected = {os.fsdecode(name) + ".png" for name in NAMES if len(name) <= MAX_NAME_BYTES}
    found = {file.name for file in (out / "masks").iterdir()}
    assert len(found) == len(NAMES)
    assert expected <= found
    long = (out / "log.txt").read_text().count("the file name is too long: the mask of ")
    assert long == len(NAMES) - len(expected) == 2
    assert {file.name for file in (out / "pictures").iterdir()} == found


@pytest.mark.parametrize("name", ["a" * 255, "é" * 127, "\udce9" * 255, "a.jpg", "日" * 85])
def test_a_name_is_cut_only_where_it_must_be(name: str) -> None:
    made = file_name(name)
    assert len(os.fsencode(made)) + len(".part") <= 255
    assert made.endswith(".png")
    if name == "a.jpg":
        assert made == "a.jpg.png"
    else:
        assert made != file_name(name[:-1] + "b")
        made.encode("utf-8", "surrogateescape")


@pytest.mark.slow
def test_features_and_a_map(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = data / "labelled"
    assert run("embed", *SMALL, "--data", source, "--out", tmp_path / "a.npz") == 0
    assert np.load(tmp_path / "a.npz")["paths"].tolist() == find_images([source])
    assert run("explore", *SMALL, "--data", source, "--out", tmp_path / "a.html") == 0
    assert (tmp_path / "a.html").read_text(encoding="utf-8")
    assert run("embed", *SMALL, "--data", source, "--out", tmp_path / "a.parquet") == 2
    assert "a Parquet file can't hold the name" in capsys.readouterr().err


@pytest.mark.slow
def test_pretraining_and_its_leaks(data: Path, tmp_path: Path) -> None:
    source = data / "labelled"
    assert run("pretrain", "--data", source, "--backbone", "test_resnet", "--image_size", 32,
               *SHORT, "--batch_size", 16, "--cache", "--logger", "none",
               "--out", tmp_path / "run") == 0  # fmt: skip
    assert (
        run("probe", "--encoder", tmp_path / "run", "--data", source, "--out", tmp_path / "probe")
        == 0
    )
    with (tmp_path / "probe" / "leaks.csv").open(newline="", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    leaked = {row["path"] for row in rows if row["part"] == "test"}
    assert leaked == set(find_images([source / "test"]))
    assert run("compare", "--encoder", tmp_path / "run", "--data", source, "--fractions", 1,
               "--image_size", 32, "--out", tmp_path / "compare") == 0  # fmt: skip


@pytest.mark.slow
def test_shards(data: Path, tmp_path: Path) -> None:
    assert run("shard", "--data", data / "labelled", "--out", tmp_path / "shards") == 0
    assert run("pretrain", "--data", tmp_path / "shards", "--backbone", "test_resnet", *SHORT,
               "--image_size", 32, "--batch_size", 16, "--logger", "none",
               "--out", tmp_path / "run") == 0  # fmt: skip
    assert json.loads((tmp_path / "run" / "results.json").read_text())["images"] == 4 * len(NAMES)


def test_a_list_of_paths_holds_names_that_are_not_utf8(data: Path, tmp_path: Path) -> None:
    paths = find_images([data / "detection"])
    kept = [path for path in paths if "\n" not in path]
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbf" + os.fsencode("\r\n".join(kept)))
    assert find_images([tmp_path / "list.txt"]) == kept


@pytest.mark.slow
def test_every_entry_of_the_log_is_one_line(models: Path, data: Path, tmp_path: Path) -> None:
    source = shutil.copytree(data / "detection", tmp_path / "images")
    for path in find_images([source]):
        if len(os.path.basename(path)) < 40:
            Path(path).write_bytes(b"no image")
    out = tmp_path / "out"
    assert run("predict", "--model", models / "classification", "--data", source, "--out", out) == 0
    lines = (out / "log.txt").read_text(encoding="utf-8").split("\n")[:-1]
    assert all(line[:2] == "20" and line.isprintable() for line in lines)
    skipped = [line for line in lines if "WARNING skipped, can't be read: " in line]
    assert len(skipped) == len(NAMES) - 2
    assert any(r"new\nline.jpg (no image of a format that is known)" in line for line in skipped)
    assert any(r"caf\udce9.jpg" in line for line in skipped)


def test_what_is_printable_stays_and_the_rest_is_escaped() -> None:
    assert printable("a b, ü 日") == "a b, ü 日"
    assert printable("a\nb\x1b[1m\udce9\u202e") == r"a\nb\x1b[1m\udce9\u202e"


def test_a_table_may_hold_names_in_other_encodings_but_no_other_text(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b"path,label\ncaf\xe9.jpg,green\n")
    rows = read_table(file, lambda cell: False).rows
    assert rows == [{"path": "caf\udce9.jpg", "label": "green"}]
    (tmp_path / "a.jpg").write_bytes(b"")
    file.write_bytes(b"path,label\na.jpg,gr\xfcn\n")
    with pytest.raises(UserError, match="can't be read: it is not text in UTF-8"):
        load_labelled(file)


def test_a_class_whose_name_is_not_utf8_is_a_mistake(sample: Path, tmp_path: Path) -> None:
    for name in (b"gr\xfcn", b"rot"):
        folder = os.fsencode(tmp_path) + b"/" + name
        try:
            os.mkdir(folder)
        except OSError:
            pytest.skip("this file system takes no such names")
        for image in sorted((sample / "labelled" / "train").rglob("*.jpg"))[:5]:
            shutil.copy(os.fsencode(image), folder)
    with pytest.raises(UserError, match=r"class folder 'gr\\udcfcn' has a name that is not UTF-8"):
        load_labelled(tmp_path)


def test_a_class_of_boxes_whose_name_is_not_utf8_is_a_mistake(data: Path, tmp_path: Path) -> None:
    source = shutil.copytree(data / "detection", tmp_path / "boxes")
    file = source / "annotations.json"
    file.write_text(file.read_text().replace('"name": "x"', '"name": "gr\\udcfcn"'))
    with pytest.raises(UserError, match=r"the class 'gr\\udcfcn' is not text in UTF-8"):
        load_boxes(source)


def test_a_backslash_may_be_part_of_a_name(tmp_path: Path) -> None:
    for name in ("back\\slash.jpg", "slash.jpg"):
        (tmp_path / name).write_bytes(b"")
    tree = FileTree(tmp_path)
    assert tree.image("back\\slash.jpg") == str(tmp_path / "back\\slash.jpg")
    assert tree.image("C:\\images\\slash.jpg") == str(tmp_path / "slash.jpg")


# What was done stays


@pytest.mark.slow
def test_predictions_are_there_when_a_failure_comes_late(
    models: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vissl_lite.transfer.classification import task as classification
    from vissl_lite.transfer.detection import task as detection

    drawn = []

    def fail_late(image: np.ndarray, **_: Any) -> np.ndarray:
        drawn.append(image)
        if len(drawn) > 15:
            raise MemoryError("no more")
        return image

    for task, module, how, file in (
        ("classification", classification, "draw_caption", "predictions.csv.part"),
        ("detection", detection, "draw_boxes", "predictions.jsonl.part"),
    ):
        drawn.clear()
        monkeypatch.setattr(module, how, fail_late)
        out = tmp_path / task
        status = run("predict", "--model", models / task, "--data", data / "detection",
                "--pictures", 99, "--out", out)  # fmt: skip
        assert status == 1
        assert (out / file).read_bytes().count(b"\n") >= 8
        assert not (out / file.removesuffix(".part")).exists()
        assert not (out / "results.json").exists()
        assert f"what was predicted up to here is in {out / file}" in (out / "log.txt").read_text()
