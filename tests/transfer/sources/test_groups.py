"""Groups of images: where they come from, and that no split, fold or subset divides them."""

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.formats.making import dicom, noise
from vissl_lite.errors import UserError
from vissl_lite.transfer.classification.data import load_labelled
from vissl_lite.transfer.classification.linear_head import make_folds
from vissl_lite.transfer.classification.options import LabelOptions
from vissl_lite.transfer.dataset import LabelledDataset
from vissl_lite.transfer.detection.data import load_boxes
from vissl_lite.transfer.segmentation.data import load_masks
from vissl_lite.transfer.sources.groups import default_group, find_groups, groups_of_others
from vissl_lite.transfer.sources.parts import (
    PARTS,
    draw_groups,
    fold_numbers,
    hold_out_groups,
)
from vissl_lite.transfer.sources.reading_log import ReadingLog
from vissl_lite.transfer.summary import rows_of, summarize, title_of


def scans(folder: Path, classes: Sequence[str], patients: int, images: int = 3) -> Path:
    """Write empty images ``<class>/p<patient>_<image>.png``, each patient of one class."""
    for number in range(patients):
        name = classes[number % len(classes)]
        (folder / name).mkdir(parents=True, exist_ok=True)
        for image in range(images):
            (folder / name / f"p{number:02}_{image}.png").write_bytes(b"")
    return folder


def table(folder: Path, columns: str, rows: list[list[str]]) -> Path:
    """Write a table and the images in its first column."""
    for row in rows:
        (folder / row[0]).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 99, np.uint8)).save(folder / row[0])
    file = folder / "data.csv"
    with file.open("w", newline="") as out:
        csv.writer(out).writerows([columns.split(","), *rows])
    return file


def assert_together(data: LabelledDataset) -> None:
    """Assert that no group is in two parts, and that every part has images."""
    groups = []
    for part in PARTS:
        names = data.groups(part)
        assert names is not None
        groups.append(set(names.tolist()))
    assert all(groups)
    assert sum(map(len, groups)) == len(set().union(*groups))


# Where groups come from


def test_dicom_files_that_are_named_by_their_uid_have_their_patient(tmp_path: Path) -> None:
    file = tmp_path / "CT.1.2.840.113"
    file.write_bytes(dicom(noise(8, 8)))
    (tmp_path / "IM0001").write_bytes(dicom(noise(8, 8)))
    assert default_group(str(file)) is not None
    assert default_group(str(file)) == default_group(str(tmp_path / "IM0001"))


def test_slices_of_a_volume_are_a_group() -> None:
    assert default_group("a/scan.nii.gz#17") == os.path.abspath("a/scan.nii.gz")
    assert default_group("a/scan.nii.gz") is None
    assert default_group("a/photo#x.png") is None
    log = ReadingLog("data")
    paths = [f"{name}.nii#{i}" for name in "ab" for i in range(2)]
    group = find_groups(paths, [Path("data")], None, log)
    assert group is not None
    assert log.groups == {path: os.path.abspath(path[:5]) for path in paths}
    assert log.grouped_by == "patients or volumes"


@pytest.mark.parametrize(
    ("regex", "groups"),
    [
        (r"p\d", ["p1", "p1", "p2", None]),
        (r"(p\d)_0|x", ["p1", None, "p2", None]),
        (r"^(\w+)/", ["a", "a", "b", "b"]),
        (r"x*", None),
    ],
)
def test_a_regular_expression_on_the_path_below_the_folder(
    regex: str, groups: list[str | None] | None, tmp_path: Path
) -> None:
    log = ReadingLog("data")
    log.groups = {"replaced": "by the option"}
    paths = [str(tmp_path / name) for name in ("a/p1_0.png", "a/p1_1.png", "b/p2_0.png", "b/c.png")]
    if groups is None:
        with pytest.raises(UserError, match=r"--group_by x\* matches none of .* 4 images.*a/p1_0"):
            find_groups(paths, [tmp_path], regex, log)
        return
    find_groups(paths, [tmp_path], regex, log)
    expected = dict(zip(paths, groups, strict=True))
    matched = {path: group for path, group in expected.items() if group is not None}
    assert log.groups == (matched if len(set(matched.values())) < len(matched) else {})
    if None in groups:
        assert f"{groups.count(None)} of 4 images do not match --group_by" in log.notes[0]
    if not log.groups:
        assert "each image is a group of its own" in log.notes[-1]


def test_groups_of_images_that_are_not_of_the_data() -> None:
    paths = ["old/scan.nii.gz#3", "old/p7_1.png", "data/p1_0.png", "gone/x.png"]

    def found(log: ReadingLog) -> list[set[str]]:
        return [set(groups) for groups in groups_of_others(paths, log)]

    assert found(ReadingLog("data", group_by=r"p(\d)_")) == [set(), {"7"}, {"1"}, set()]
    by_file = ReadingLog("data", grouped_by="patients or volumes")
    assert found(by_file) == [{os.path.abspath("old/scan.nii.gz")}, set(), set(), set()]
    column = {"data/p1_0.png": "anna", "data/p2_0.png": "ben"}
    assert found(ReadingLog("data", groups=column)) == [set(), set(), {"anna"}, set()]


def test_unlabelled_rows_of_a_table_have_groups(tmp_path: Path) -> None:
    """Pre-training or pseudo-labels may have other images of a test patient."""
    rows = [[f"{i}.png", "ab"[i % 2] if i < 8 else "", f"patient{i % 8}"] for i in range(16)]
    data = load_labelled(table(tmp_path, "image,label,patient", rows), seed=0)
    unlabelled = [str(tmp_path / f"{i}.png") for i in range(8, 16)]
    names = [frozenset({f"patient{i}"}) for i in range(8)]
    assert groups_of_others(unlabelled, data.reading) == names
    tested = data.groups("test")
    assert tested is not None
    assert set(tested) < {f"patient{i}" for i in range(8)}


def test_a_column_without_repetitions_has_no_groups(tmp_path: Path) -> None:
    rows = [[f"{i}.png", "ab"[i % 2], f"case{i}"] for i in range(8)]
    data = load_labelled(table(tmp_path, "image,label,patient", rows), seed=0)
    assert data.groups("test") is None


def test_an_anchored_expression_matches_below_any_folder_of_others() -> None:
    """In the data, paths are relative to their folder; that of other images is unknown."""
    path = "/data/p3/new/p7/1.png"
    for regex in ("^(p.)/", "^p.", r"p(\d)/"):
        (groups,) = groups_of_others([path], ReadingLog("data", group_by=regex))
        assert {group.removeprefix("p") for group in groups} == {"3", "7"}, regex


def test_an_anchored_expression_matches_the_names_of_images_in_shards() -> None:
    paths = ["/s/train-000000.tar!p1/a.jpg", "https://x.org/s/train-000001.tar!all/p2/a.jpg"]
    groups = groups_of_others(paths, ReadingLog("data", group_by="^(p.)/"))
    assert groups == [frozenset({"p1"}), frozenset({"p2"})]


def test_an_invalid_expression_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--group_by \(p is not a regular expression"):
        find_groups(["p1.png"], [tmp_path], "(p", ReadingLog("data"))


def test_a_column_of_a_table_of_images_is_kept_by_what_a_run_writes(tmp_path: Path) -> None:
    rows = [[f"{p}_{i}.png", "ab"[p % 2], f"n{p}"] for p in range(10) for i in range(4)]
    source = table(tmp_path, "path,label,Patient ID", rows)
    data = load_labelled(source)
    assert_together(data)
    assert data.reading.grouped_by == "column Patient ID"
    assert [len(part) for part in (data.train, data.val, data.test)] == [24, 8, 8]
    data.write_split(tmp_path)
    assert (tmp_path / "split.csv").read_text().startswith("path,label,group,split\n")
    again = load_labelled(tmp_path / "split.csv")
    assert again.reading.groups == data.reading.groups
    assert again.identity() == data.identity()
    assert data.identity() != load_labelled(source, options=LabelOptions(group_by=".+")).identity()


def test_a_column_of_classes_named_like_groups_is_a_class(tmp_path: Path) -> None:
    rows = [[f"{i}.png", str(i % 2), str((i + 1) % 2)] for i in range(10)]
    data = load_labelled(table(tmp_path, "path,patient,control", rows))
    assert data.classes == ["control", "patient"]
    assert data.groups("train") is None


def test_tables_of_boxes_have_groups_that_a_run_writes(tmp_path: Path) -> None:
    rows = [
        [f"{p}_{i}.png", "1", "1", "5", "6", "ab"[i % 2], f"n{p}"]
        for p in range(6)
        for i in range(2)
    ]
    data = load_boxes(table(tmp_path, "filename,xmin,ymin,xmax,ymax,class,patient", rows))
    assert_together(data)
    data.write_split(tmp_path)
    written = json.loads((tmp_path / "split" / "test.json").read_text())
    assert {one["group"] for one in written["images"]} < {f"n{p}" for p in range(6)}
    again = load_boxes(tmp_path / "split")
    assert again.reading.groups == data.reading.groups
    some = data.subsample(fraction=0.3)
    assert len(some.train) == 2  # one patient


def test_tables_of_masks_have_groups_that_a_run_writes(tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    rows = []
    for number in range(12):
        mask = np.resize(np.arange(2, dtype=np.uint8), (8, 8))
        Image.fromarray(mask).save(tmp_path / "masks" / f"{number}.png")
        rows.append([f"{number}.png", f"masks/{number}.png", f"n{number % 4}"])
    data = load_masks(table(tmp_path, "path,mask,group", rows))
    assert_together(data)
    data.write_split(tmp_path)
    again = load_masks(tmp_path / "split.csv")
    assert again.reading.groups == data.reading.groups
    assert again.identity() == data.identity()


# What is done with them


def test_parts_are_made_of_whole_groups_of_all_classes(tmp_path: Path) -> None:
    scans(tmp_path, "ab", 20)
    data = load_labelled(tmp_path, options=LabelOptions(group_by=r"p\d+"))
    assert_together(data)
    for part, patients in (("train", 6), ("val", 2), ("test", 2)):
        assert data.class_counts(part).tolist() == [3 * patients] * 2  # type: ignore[arg-type]
    assert "stratified by class, no group in two parts" in data.reading.split
    summary = summarize(data)
    images = [row[1] for row in rows_of(summary)]
    assert images == ["36 in 12 groups", "12 in 4 groups", "12 in 4 groups"]
    assert r"groups: --group_by p\d+" in title_of(summary)
    for fold in data.folds(3):
        assert_together(fold)
        assert set(fold.test.paths) == set(data.test.paths)


def test_a_class_of_one_group_is_trained_on(tmp_path: Path) -> None:
    scans(tmp_path, "ab", 10)
    scans(tmp_path, "c", 1)
    (tmp_path / "c").rename(tmp_path / "rare")
    for one in (tmp_path / "rare").iterdir():
        one.rename(one.with_name(f"q{one.name}"))
    data = load_labelled(tmp_path, options=LabelOptions(group_by=r"[a-z]+/\w+_"))
    assert [data.class_counts(part)[2] for part in PARTS] == [3, 0, 0]


@pytest.mark.parametrize(
    ("patients", "message"),
    [
        (2, r"6 images in 2 groups \(--group_by p\\d\+\), too few to train, validate and test"),
        (3, "is the only one of some class, so that none can be held out"),
    ],
)
def test_too_few_groups_are_an_error(patients: int, message: str, tmp_path: Path) -> None:
    scans(tmp_path, "abc"[:patients], patients)
    with pytest.raises(UserError, match=message):
        load_labelled(tmp_path, options=LabelOptions(group_by=r"p\d+"))


def test_training_images_of_one_group_have_no_validation_part(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name in "ab":
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(3):
                (tmp_path / part / name / f"{part}_{number}.png").write_bytes(b"")
    data = load_labelled(tmp_path, options=LabelOptions(group_by="train|test"))
    assert [len(data.train), len(data.val), len(data.test)] == [6, 0, 6]
    assert "None can be made of the training images without dividing a group" in data.reading.split
    assert data.folds(3) == [data]


def test_fractions_take_whole_groups_and_shots_take_images(tmp_path: Path) -> None:
    scans(tmp_path, "ab", 40)
    data = load_labelled(tmp_path, options=LabelOptions(group_by=r"p\d+"))
    some = data.subsample(fraction=0.25, seed=1)
    assert some.class_counts("train").tolist() == [9, 9]
    assert len(np.unique(some.groups("train"))) == 6
    few = data.subsample(shots=4, seed=1)
    assert few.class_counts("train").tolist() == [4, 4]
    assert_together(few)


@pytest.mark.parametrize("seed", range(12))
def test_no_group_is_divided(seed: int) -> None:
    random = np.random.default_rng(seed)
    strata = random.integers(4, size=1 + 5 * seed)
    groups = np.array([f"g{group}" for group in random.integers(1 + seed, size=len(strata))])
    folds = fold_numbers(strata, 5, seed, groups)
    assert set(folds) == set(range(min(5, len(set(groups)))))
    assert len({*zip(groups, folds, strict=True)}) == len(set(groups))
    for exclusive in (False, True):
        held = hold_out_groups(strata, groups, exclusive, 0.2, seed)
        rest = np.delete(np.arange(len(groups)), held)
        assert not set(groups[held]) & set(groups[rest])
        assert len(rest) > 0
        assert len(held) > 0 or exclusive or len(set(groups)) == 1
        if exclusive:
            assert set(strata[held]) <= set(strata[rest])
    drawn: set[int] = set()
    for fraction in (0.01, 0.1, 0.4, 0.8, 1.0):
        more = draw_groups(strata, groups, fraction, seed)
        assert drawn <= set(more)
        drawn = set(more.tolist())
        assert set(strata[more]) == set(strata)
        assert not set(groups[more]) & set(np.delete(groups, more))
    assert len(drawn) == len(groups)


def test_folds_of_the_linear_probe_divide_no_group() -> None:
    groups = np.repeat([f"g{i}" for i in range(4)], 10)
    labels = np.repeat([0, 1, 0, 1], 10)
    folds = make_folds(labels, 0, groups)
    assert len(folds) == 2  # as many as groups of a class
    for inside, outside in folds:
        assert not set(groups[inside]) & set(groups[outside])
        assert set(labels[outside]) == {0, 1}
    assert make_folds(np.repeat([0, 1], 10), 0, np.repeat(["a", "b"], 10)) == []
