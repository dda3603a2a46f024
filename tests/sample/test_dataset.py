"""The sample data set: its files agree with one another, and only the shape tells the class."""

import json
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vissl_lite.data.image_survey import NO_SETTINGS, survey
from vissl_lite.data.images import find_images
from vissl_lite.errors import UserError
from vissl_lite.sample.dataset import make_sample_data
from vissl_lite.sample.drawing import CLASSES, NODATA, draw

COUNTS = {"unlabelled": 12, "train": 20, "val": 10, "test": 30}
SPLITS = ("train", "val", "test")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder: its relative name and its bytes."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sample_data(tmp_path_factory.mktemp("sample") / "data", processes=1, **COUNTS)


def test_same_files_whatever_the_number_of_processes(sample: Path, tmp_path: Path) -> None:
    again = make_sample_data(tmp_path / "again", processes=2, **COUNTS)
    assert contents(again) == contents(sample)


def test_another_seed_and_another_index_give_other_images(sample: Path, tmp_path: Path) -> None:
    other = make_sample_data(tmp_path / "other", seed=1, processes=1, **COUNTS)
    images = [
        data
        for folder in (sample, other)
        for name, data in contents(folder).items()
        if name.endswith(".jpg")
    ]
    assert len(set(images)) == len(images) == 2 * sum(COUNTS.values())


def test_an_image_does_not_depend_on_how_many_are_drawn(sample: Path, tmp_path: Path) -> None:
    fewer = make_sample_data(tmp_path / "fewer", unlabelled=5, train=7, val=0, test=0, processes=1)
    drawn = {name: data for name, data in contents(fewer).items() if name[-4:] in (".jpg", ".png")}
    whole = contents(sample)
    assert len(drawn) == 5 + 2 * 7
    assert all(whole[name] == data for name, data in drawn.items())


def test_layout(sample: Path) -> None:
    assert (sample / "classes.txt").read_text().split() == list(CLASSES) == sorted(CLASSES)
    assert "seed 0" in (sample / "README.md").read_text()
    names = set(contents(sample))
    assert sum(name.startswith("unlabelled/") for name in names) == COUNTS["unlabelled"]
    for split in SPLITS:
        per_class = [list((sample / "labelled" / split / name).iterdir()) for name in CLASSES]
        assert {len(files) for files in per_class} == {COUNTS[split] // len(CLASSES)}
        for file in chain(*per_class):
            mask = f"masks/{split}/{file.parent.name}/{file.stem}.png"
            assert mask in names
            with Image.open(file) as image:
                assert (image.mode, image.size) == ("RGB", (64, 64))


@pytest.mark.parametrize("split", SPLITS)
def test_masks_boxes_and_classes_agree(sample: Path, split: str) -> None:
    coco = json.loads((sample / "annotations" / f"{split}.json").read_text())
    assert [c["name"] for c in coco["categories"]] == list(CLASSES)
    assert [c["id"] for c in coco["categories"]] == list(range(1, len(CLASSES) + 1))
    images = {image["id"]: image for image in coco["images"]}
    assert len(images) == len(coco["annotations"]) == COUNTS[split]
    for note in coco["annotations"]:
        file = Path(images[note["image_id"]]["file_name"])
        assert (sample / "labelled" / split / file).is_file()
        assert CLASSES[note["category_id"] - 1] == file.parent.name
        mask = Image.open(sample / "masks" / split / file.with_suffix(".png"))
        runs = note["segmentation"]["counts"]
        inside = np.repeat(np.arange(len(runs)) % 2, runs).reshape(64, 64).T
        assert np.array_equal(inside, np.asarray(mask) > 0)
        assert mask.mode == "P"
        pixels = np.asarray(mask)
        assert set(np.unique(pixels)) == {0, note["category_id"]}
        left, top, right, bottom = Image.fromarray(np.uint8(pixels > 0)).getbbox()
        assert note["bbox"] == [left, top, right - left, bottom - top]
        assert note["area"] == (pixels > 0).sum()


def test_the_object_shows_even_in_tiny_pictures() -> None:
    for name in CLASSES:
        for number in range(20):
            _, seen = draw(name, np.random.default_rng(number), size=16)
            assert seen.sum() >= 8


def test_images_of_six_bands(tmp_path: Path) -> None:
    counts = {"unlabelled": 30, "train": 10, "val": 0, "test": 0}
    data = make_sample_data(tmp_path / "data", kind="multiband", processes=1, size=32, **counts)
    paths = find_images([data / "unlabelled"])
    bands = np.stack([np.load(path) for path in paths])
    assert (bands.shape, bands.dtype) == ((30, 32, 32, 6), np.int16)
    edges = (bands == NODATA).all(axis=3)
    assert 1 <= edges.any(axis=(1, 2)).sum() <= 14
    reader = survey(paths, NO_SETTINGS)
    assert (reader.channels, reader.nodata, reader.scope) == (6, NODATA, "dataset")
    assert reader.high[4] > 2 * reader.high[0] > 8 * reader.high[5]
    coco = json.loads((data / "annotations" / "train.json").read_text())
    assert all((data / "labelled" / "train" / one["file_name"]).is_file() for one in coco["images"])


def test_progress_counts_up_to_all(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    counts = {"unlabelled": 3, "train": 2, "val": 1, "test": 0}
    make_sample_data(
        tmp_path / "a", processes=1, progress=lambda *call: calls.append(call), **counts
    )
    assert calls == [(done, 6) for done in range(1, 7)]


def test_a_finished_set_is_kept(sample: Path) -> None:
    before = (sample / "sample.json").stat().st_mtime_ns
    assert make_sample_data(sample, **COUNTS) == sample
    assert (sample / "sample.json").stat().st_mtime_ns == before


def test_other_content_is_an_error(sample: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="other parameters"):
        make_sample_data(sample, seed=5, **COUNTS)
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(UserError, match="not a sample data set"):
        make_sample_data(tmp_path)
    with pytest.raises(UserError, match="not a sample data set"):
        make_sample_data(tmp_path / "mine.txt")
    assert contents(tmp_path) == {"mine.txt": b"keep me"}


@pytest.mark.parametrize("bad", [{"seed": -1}, {"train": -1}, {"size": 8}])
def test_bad_numbers_are_an_error(tmp_path: Path, bad: dict[str, int]) -> None:
    with pytest.raises(UserError, match="must be"):
        make_sample_data(tmp_path / "a", **bad)


def test_nothing_is_left_when_drawing_stops(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_sample_data(tmp_path / "a", processes=1, progress=stop, **COUNTS)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_color_place_and_area_do_not_tell_the_class() -> None:
    """A linear classifier on such features stays near chance (0.1) on images it has not seen."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    color, place, labels = [], [], []
    for number in range(1200):
        label = number % len(CLASSES)
        image, seen = draw(CLASSES[label], np.random.default_rng([3, number]), size=32)
        pixels = np.asarray(image, np.float32).reshape(-1, 3)
        histogram = [np.histogram(band, 8, (0, 256))[0] for band in pixels.T]
        color.append(np.concatenate([pixels.mean(0), pixels.std(0), *histogram]))
        rows, columns = np.nonzero(seen)
        place.append([len(rows), rows.mean(), columns.mean()])
        labels.append(label)
    for features in (np.array(color), np.array(place)):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
        model.fit(features[:800], labels[:800])
        # 400 images: chance is 0.1 with a standard error of 0.015
        assert model.score(features[800:], labels[800:]) < 0.2
