import csv
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vissl_lite.cli import main
from vissl_lite.errors import UserError
from vissl_lite.transfer.classification.data import LabelledImages, Part, load_labelled
from vissl_lite.transfer.classification.options import LabelOptions
from vissl_lite.transfer.sources.parts import PARTS


def make_class_folders(folder: Path, counts: dict[str, int]) -> Path:
    """Create class folders of empty files, as reading labels does not open the images."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            (folder / name / f"{index}.jpg").write_bytes(b"")
    return folder


def write_csv(folder: Path, rows: list[list[str]], header: str = "path,label") -> Path:
    """Write a CSV file and its images."""
    for path, *_ in rows:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"")
    file = folder / "data.csv"
    with file.open("w", newline="") as out:
        csv.writer(out).writerows([header.split(","), *rows])
    return file


def parts(data: LabelledImages) -> tuple[Part, Part, Part]:
    return data.train, data.val, data.test


def assert_disjoint(data: LabelledImages) -> None:
    paths = [path for part in parts(data) for path in part.paths]
    assert len(paths) == len(set(paths))


def assert_same(a: LabelledImages, b: LabelledImages) -> None:
    assert a.classes == b.classes
    for ours, theirs in zip(parts(a), parts(b), strict=True):
        assert ours.paths == theirs.paths
        assert ours.labels.tolist() == theirs.labels.tolist()


def assert_labels_true(data: LabelledImages) -> None:
    """Assert that the class of each image is the name of its folder."""
    for part in parts(data):
        assert [data.classes[i] for i in part.labels] == [Path(p).parent.name for p in part.paths]
        assert part.labels.dtype == np.int64


def counts(part: Part) -> list[int]:
    return np.bincount(part.labels).tolist()


# Layouts


def test_train_and_test_folders(labelled: Path) -> None:
    data = load_labelled(labelled)
    assert data.classes == ["blue", "green", "red"]
    assert_labels_true(data)
    assert_disjoint(data)
    assert counts(data.test) == [6, 6, 6]
    assert all(Path(p).is_relative_to(labelled / "test") for p in data.test.paths)
    held = data.train.paths + data.val.paths
    assert all(Path(p).is_relative_to(labelled / "train") for p in held)
    assert counts(data.train) == [10, 10, 10]  # 20 % of 12 are 2.4
    assert counts(data.val) == [2, 2, 2]


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_validation_folder_is_used_as_given(name: str, tmp_path: Path) -> None:
    make_class_folders(tmp_path / "train", {"a": 5, "b": 5})
    make_class_folders(tmp_path / name, {"a": 2, "b": 3})
    make_class_folders(tmp_path / "test", {"a": 1, "b": 1})
    data = load_labelled(tmp_path)
    assert [counts(part) for part in parts(data)] == [[5, 5], [2, 3], [1, 1]]
    assert all(Path(p).is_relative_to(tmp_path / name) for p in data.val.paths)


def test_plain_class_folders_are_split_60_20_20(tmp_path: Path) -> None:
    data = load_labelled(make_class_folders(tmp_path, {"a": 50, "b": 20, "c": 10}))
    assert [counts(part) for part in parts(data)] == [[30, 12, 6], [10, 4, 2], [10, 4, 2]]
    assert_labels_true(data)
    assert_disjoint(data)


def test_the_split_of_plain_folders_is_the_same_for_every_seed(tmp_path: Path) -> None:
    make_class_folders(tmp_path, {"a": 20, "b": 20})
    assert_same(load_labelled(tmp_path, seed=0), load_labelled(tmp_path, seed=5))


def test_the_split_of_plain_folders_is_shuffled(tmp_path: Path) -> None:
    data = load_labelled(make_class_folders(tmp_path, {"a": 50, "b": 50}))
    numbers = [int(Path(path).stem) for path in data.test.paths]
    assert 15 < np.mean(numbers) < 34
    assert numbers[:10] != numbers[10:]


def test_small_classes_are_in_the_test_split(tmp_path: Path) -> None:
    data = load_labelled(make_class_folders(tmp_path, {"a": 3, "b": 2}))
    assert [counts(part) for part in parts(data)] == [[1, 1], [1], [1, 1]]


def test_hidden_folders_are_not_classes(tmp_path: Path) -> None:
    make_class_folders(tmp_path, {"a": 5, "b": 5, ".cache": 5})
    assert load_labelled(tmp_path).classes == ["a", "b"]


def test_a_csv_file_without_splits_is_split(tmp_path: Path) -> None:
    rows = [[f"images/{c}/{i}.jpg", c] for c in "ab" for i in range(10)]
    data = load_labelled(write_csv(tmp_path, rows))
    assert [counts(part) for part in parts(data)] == [[6, 6], [2, 2], [2, 2]]
    assert_labels_true(data)
    assert_disjoint(data)


def test_the_splits_of_a_csv_file_are_used_as_given(tmp_path: Path) -> None:
    names = ["train", "train", "test", "val", "validation"]
    rows = [[f"{c}/{i}.jpg", c, name] for c in "ab" for i, name in enumerate(names)]
    data = load_labelled(write_csv(tmp_path, rows, "path,label,split"))
    stems = [[Path(p).stem for p in part.paths] for part in parts(data)]
    assert stems == [["0", "1"] * 2, ["3", "4"] * 2, ["2"] * 2]
    assert_labels_true(data)


def test_validation_rows_are_held_out_of_a_csv_file_without_any(tmp_path: Path) -> None:
    rows = [[f"{c}/{i}.jpg", c, "test" if i < 5 else "train"] for c in "ab" for i in range(15)]
    data = load_labelled(write_csv(tmp_path, rows, "path,label,split"))
    assert [counts(part) for part in parts(data)] == [[8, 8], [2, 2], [5, 5]]
    assert_disjoint(data)


@pytest.mark.parametrize("header", ["path,label", "image,class", "filename,label", "file,class"])
def test_columns_may_have_other_names(header: str, tmp_path: Path) -> None:
    rows = [[f"{c}/{i}.jpg", c] for c in "ab" for i in range(5)]
    assert load_labelled(write_csv(tmp_path, rows, header)).classes == ["a", "b"]


def test_additional_columns_and_a_byte_order_mark_are_ignored(tmp_path: Path) -> None:
    rows = [[f"{c}/{i}.jpg", "x", c] for c in "ab" for i in range(5)]
    file = write_csv(tmp_path, rows, "path,note,label")
    file.write_text(file.read_text(), encoding="utf-8-sig")
    assert load_labelled(file).classes == ["a", "b"]


def test_the_splits_of_a_csv_file_are_sorted_by_path(tmp_path: Path) -> None:
    rows = [[f"{c}/{i}.jpg", c, "test" if i < 2 else "train"] for c in "ab" for i in range(9)]
    data = load_labelled(write_csv(tmp_path, rows[::-1], "path,label,split"))
    for part in parts(data):
        assert part.paths == sorted(part.paths)


def test_the_order_of_rows_does_not_change_the_split(tmp_path: Path) -> None:
    rows = [[f"{c}/{i}.jpg", c] for c in "ab" for i in range(10)]
    one = load_labelled(write_csv(tmp_path, rows))
    assert_same(load_labelled(write_csv(tmp_path, rows[::-1])), one)


# User errors


def test_one_class_is_not_enough(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"one class only \(cats\)"):
        load_labelled(make_class_folders(tmp_path, {"cats": 9}))


@pytest.mark.parametrize("part", ["val", "test"])
def test_a_class_without_training_images_is_an_error(part: str, tmp_path: Path) -> None:
    for name in ("train", "val", "test"):
        make_class_folders(tmp_path / name, {"a": 2, "b": 2} | ({"cow": 1} if name == part else {}))
    with pytest.raises(UserError, match=f"the {part} images have the class 'cow'"):
        load_labelled(tmp_path)


def test_a_folder_without_class_folders_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="1 images, but no class folders and no table"):
        load_labelled(tmp_path)


def test_a_class_folder_without_images_is_named(tmp_path: Path) -> None:
    make_class_folders(tmp_path, {"a": 3, "b": 3, "empty": 0})
    data = load_labelled(tmp_path)
    assert data.classes == ["a", "b"]
    assert "Folders without images, skipped: empty" in data.reading.notes


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        load_labelled(tmp_path / "nowhere")


def test_a_file_of_another_kind_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text("{}")
    with pytest.raises(UserError, match=r"neither a folder nor a table"):
        load_labelled(tmp_path / "data.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "path,ward,age\na/0.jpg,5,x\n",
            "no column of labels .* it has path, ward, age; name",
        ),
        ("where,label\nx,a\ny,b\n", "no column of images: it has where, label; name it"),
        ("", "has no rows"),
        ("path,label\n", "has no rows"),
        (
            "path,label\na/0.jpg,a\na/9.jpg,a\nb/9.jpg,b\n",
            "2 do not exist.*a/9.jpg.*--image_root",
        ),
        ("path,label,split\na/0.jpg,a,dog\n", "the split 'dog' is none of train, val, test"),
        ("path,label,split\na/0.jpg,a,test\n", "no training images, only test"),
        ("path,label\na/0.jpg\na/0.jpg,\n", "2 of 2 rows can't be used: 1 row that is cut short"),
        ("path,label\na/0.jpg,1.5\na/0.jpg,3\n", "numbers such as 1.5, which is a regression"),
        ("path,a,a\na/0.jpg,1,2\n", "the column a twice"),
        ('path,label\n"a/0.jpg,a\n', "can't be read as a table"),
    ],
)
def test_invalid_csv_files(text: str, message: str, tmp_path: Path) -> None:
    make_class_folders(tmp_path, {"a": 1})
    (tmp_path / "data.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        load_labelled(tmp_path / "data.csv")


@pytest.mark.parametrize("column", ["class", "score"])
def test_grades_with_a_fraction_are_classes_if_the_user_says_so(
    column: str, tmp_path: Path
) -> None:
    make_class_folders(tmp_path, {"a": 12})
    lines = [f"a/{number}.jpg,{(1.5, 2.0, 2.5)[number % 3]}" for number in range(12)]
    (tmp_path / "data.csv").write_text("\n".join([f"path,{column}", *lines]) + "\n")
    options = LabelOptions(label_column=None if column == "class" else column)
    assert load_labelled(tmp_path / "data.csv", options=options).classes == ["1.5", "2.0", "2.5"]


def test_weights_of_images_that_are_not_used_are_said(tmp_path: Path) -> None:
    make_class_folders(tmp_path, {"a": 12})
    lines = [f"a/{number}.jpg,{'xy'[number % 2]},0.5" for number in range(12)]
    (tmp_path / "data.csv").write_text("\n".join(["path,class,weight", *lines]) + "\n")
    notes = load_labelled(tmp_path / "data.csv").reading.notes
    assert any("The column weight of data.csv is not used" in note for note in notes)


def test_a_csv_file_that_is_not_text_is_an_error(tmp_path: Path) -> None:
    make_class_folders(tmp_path, {"a": 1})
    (tmp_path / "data.csv").write_bytes(b"path,label\na/0.jpg,\xff\n")
    with pytest.raises(UserError, match="it is not text in UTF-8"):
        load_labelled(tmp_path / "data.csv")


# Folders that are something else, and labels that look wrong


def make_files(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["images/1.jpg", "masks/1.png"], "with masks/ it looks like a segmentation data set"),
        (["train/images/1.jpg", "train/labels/1.png"], "with labels/ .* give --task segmentation"),
        (["images/train/1.jpg", "annotations/train/1.png"], "with annotations/ .*segmentation"),
        (["JPEGImages/1.jpg", "Annotations/1.xml"], "with 1 .xml it looks like a detection data"),
        (["train/1.jpg", "val/2.jpg", "ann/instances.json"], "with 1 .json .* --task detection"),
        (
            ["images/1.jpg", "labels/1.txt", "notes.txt"],
            "with 1 .txt it looks like a detection data set",
        ),
        ([f"{c}_{i}.jpg" for c in "ab" for i in range(4)], "--label_regex .* 2 classes.* a, b"),
        (
            [*(f"images/{c}_{i}.jpg" for c in "ab" for i in range(4)), "annotations/a_1.png"],
            "give --task segmentation; or .* --label_regex .* such as a, b",
        ),
        (["a.jpg", "b.jpg"], "put the images of each class into a folder, or give a .csv file"),
        (["a.czi", "b.czi", "c"], "no images that can be read, but 2 .czi, 1 without ending"),
        ([], "no images that can be read, but no files"),
        (["val/a/1.jpg", "test/a/1.jpg"], "has no training images, only val and test"),
    ],
)
def test_a_folder_of_something_else(files: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_labelled(make_files(tmp_path, *files))


def test_a_class_may_have_the_name_of_a_part(tmp_path: Path) -> None:
    make_class_folders(tmp_path, {"bus": 3, "car": 3, "train": 3})
    data = load_labelled(tmp_path)
    assert data.classes == ["bus", "car", "train"]
    assert [code for code, _ in data.reading.warnings] == ["data.class_names"]
    assert "The class train is named like a part of the data" in data.reading.warnings[0][1]


def test_a_flat_folder_in_a_folder_suggests_file_names(tmp_path: Path) -> None:
    make_files(tmp_path, *(f"faces/{c}_{i}.jpg" for c in "ab" for i in range(4)))
    with pytest.raises(UserError, match=r"one class only \(faces\).*--label_regex .* such as a, b"):
        load_labelled(tmp_path)


def test_a_copy_of_the_class_folders_is_left_out(tmp_path: Path) -> None:
    make_class_folders(tmp_path, {"sick": 5, "well": 5, "cells/sick": 5, "cells/well": 5})
    data = load_labelled(tmp_path)
    assert data.classes == ["sick", "well"]
    assert data.reading.counts == {"image in a second copy of the class folders, left out": 10}


def test_images_of_a_part_without_classes_are_left_out(tmp_path: Path) -> None:
    """Tiny ImageNet: train/<class>/images and val/images."""
    make_class_folders(tmp_path / "train", {"a/images": 5, "b/images": 5})
    make_class_folders(tmp_path / "val", {"images": 4})
    data = load_labelled(tmp_path)
    assert data.classes == ["a", "b"]
    assert data.reading.counts == {"image outside the class folders, left out": 4}


def test_parts_beside_the_given_one_are_named(tmp_path: Path) -> None:
    for part in ("train", "test"):
        make_class_folders(tmp_path / part, {"a": 5, "b": 5})
    ((code, text),) = load_labelled(tmp_path / "train").reading.warnings
    assert code == "data.part"
    assert text.endswith(f"to use test beside it, give {tmp_path}")


def test_uncertain_labels_are_warned_of(tmp_path: Path) -> None:
    rows = [[f"{i}.jpg", str(i % 2), str(i % 3 - 1)] for i in range(12)]
    data = many(write_csv(tmp_path, rows, "path,sick,unsure"))
    assert data.classes == ["sick"]
    ((code, text),) = data.reading.warnings
    assert code == "data.labels"
    assert "the column unsure holds -1 beside 0 and 1" in text


def test_imbalance_is_warned_of(tmp_path: Path) -> None:
    data = load_labelled(make_class_folders(tmp_path, {"sick": 3, "well": 200}))
    ((code, text),) = data.reading.warnings
    assert code == "data.imbalance"
    assert text.startswith("120 of 121 training images have the class well")


def test_many_unread_files_are_warned_of(tmp_path: Path) -> None:
    make_class_folders(tmp_path, {"a": 3, "b": 3})
    make_files(tmp_path, *(f"a/{i}.czi" for i in range(6)))
    ((code, text),) = load_labelled(tmp_path).reading.warnings
    assert code == "data.unread"
    assert "6 .czi, beside 6 images" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_level": 3}, "--class_level 3: the class folders of .* have 1 level"),
        ({"label_regex": "("}, "is not a regular expression"),
        ({"label_regex": "^a"}, "has 0 groups: one, in parentheses, is the class"),
        ({"label_regex": "^(x)"}, "matches none of the 6 file names"),
        ({"image_root": "nowhere"}, "--image_root nowhere is not a folder"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    make_class_folders(tmp_path, {"a": 3, "b": 3})
    (tmp_path / "t.csv").write_text("path,label\na/0.jpg,a\nb/0.jpg,b\n")
    source = tmp_path / "t.csv" if "image_root" in options else tmp_path
    with pytest.raises(UserError, match=message):
        load_labelled(source, options=LabelOptions(**options))


def test_rows_of_one_image_are_merged(tmp_path: Path) -> None:
    rows = [[f"{c}/{i}.jpg", c] for c in "ab" for i in range(50)]
    data = load_labelled(write_csv(tmp_path, [*rows, rows[0], ["a/1.jpg", "b"]]))
    assert sum(map(len, parts(data))) == 99
    assert data.reading.counts == {
        "row that repeats another, left out": 1,
        "image with rows of different classes, left out": 1,
    }
    rows = [[f"{i}.jpg", c] for i in range(12) for c in ("ab" if i % 2 else "a")]
    data = many(write_csv(tmp_path, rows))
    assert data.multi_label
    assert sum(map(len, parts(data))) == 12


# Subsampling


@pytest.fixture
def data(tmp_path: Path) -> LabelledImages:
    make_class_folders(tmp_path / "train", {"a": 50, "b": 20, "c": 5})
    make_class_folders(tmp_path / "test", {"a": 3, "b": 3, "c": 3})
    return load_labelled(tmp_path)


def test_val_is_held_out_of_train(data: LabelledImages, tmp_path: Path) -> None:
    whole = load_labelled(tmp_path, complete=False)
    assert not set(data.train.paths) & set(data.val.paths)
    assert sorted(data.train.paths + data.val.paths) == sorted(whole.train.paths)
    assert [counts(data.train), counts(data.val)] == [[40, 16, 4], [10, 4, 1]]
    assert_labels_true(data)


def test_folds_and_the_merged_part_hold_all_labels_but_those_of_the_test_part(
    data: LabelledImages,
) -> None:
    assert data.val_from_train
    merged = data.merged()
    assert len(merged.val) == 0
    assert_labels_true(merged)
    everything = sorted(data.train.paths + data.val.paths)
    assert sorted(merged.train.paths) == everything
    folds = data.folds(3, seed=1)
    assert sorted(path for fold in folds for path in fold.val.paths) == everything
    for fold in folds:
        assert_labels_true(fold)
        assert sorted(fold.train.paths + fold.val.paths) == everything
        assert fold.test.paths == data.test.paths
        assert (np.abs(np.array(counts(fold.val)) - [50 / 3, 20 / 3, 5 / 3]) < 1).all()
    assert data.folds(3, seed=2)[0].val.paths != folds[0].val.paths


def test_val_depends_on_the_seed(data: LabelledImages, tmp_path: Path) -> None:
    assert_same(load_labelled(tmp_path, seed=0), data)
    assert load_labelled(tmp_path, seed=1).val.paths != data.val.paths
    assert load_labelled(tmp_path, seed=1).test.paths == data.test.paths


@pytest.mark.parametrize(
    ("fraction", "train", "val"),
    [(1.0, [40, 16, 4], [10, 4, 1]), (0.5, [20, 8, 2], [5, 2, 1]), (0.01, [1, 1, 1], [1, 1, 1])],
)
def test_a_fraction_is_stratified(
    data: LabelledImages, fraction: float, train: list[int], val: list[int]
) -> None:
    few = data.subsample(fraction, None, seed=0)
    assert [counts(few.train), counts(few.val)] == [train, val]
    assert_labels_true(few)
    assert_disjoint(few)
    assert few.test is data.test


def test_shots_are_images_per_class_as_far_as_available(data: LabelledImages) -> None:
    few = data.subsample(None, 8, seed=0)
    assert [counts(few.train), counts(few.val)] == [[8, 8, 4], [8, 4, 1]]
    assert_labels_true(few)
    assert few.test is data.test


def test_smaller_subsamples_are_part_of_larger_ones(data: LabelledImages) -> None:
    amounts = [(None, 1), (0.1, None), (None, 5), (0.25, None), (None, 10), (0.9, None)]
    taken = [data.subsample(fraction, shots, seed=3) for fraction, shots in amounts]
    for name in ("a", "b"):
        number = data.classes.index(name)
        members = [
            {
                path
                for path, label in zip(few.train.paths, few.train.labels, strict=True)
                if label == number
            }
            for few in taken
        ]
        members.sort(key=len)
        assert len(members[0]) < len(members[-1])
        for less, more in itertools.pairwise(members):
            assert less <= more
    for few in taken:
        assert set(few.val.paths) <= set(data.val.paths)


def test_the_subsample_depends_on_the_seed(data: LabelledImages) -> None:
    assert_same(data.subsample(0.2, None, 1), data.subsample(0.2, None, 1))
    assert data.subsample(0.2, None, 1).train.paths != data.subsample(0.2, None, 2).train.paths


def test_all_labels_by_default(data: LabelledImages) -> None:
    assert data.subsample(None, None, seed=0) is data


@pytest.mark.parametrize(
    ("fraction", "shots", "message"),
    [
        (0.5, 3, "--fraction or --shots, not both"),
        (0.0, None, "--fraction 0.0 is not a share"),
        (1.5, None, "--fraction 1.5 is not a share"),
        (-0.1, None, "--fraction -0.1 is not a share"),
        (None, 0, "--shots 0 must be at least 1"),
    ],
)
def test_an_amount_out_of_range_is_an_error(
    data: LabelledImages, fraction: float | None, shots: int | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        data.subsample(fraction, shots, seed=0)


# Writing


@pytest.mark.parametrize("shots", [None, 2])
def test_written_splits_are_read_back_unchanged(
    data: LabelledImages, shots: int | None, tmp_path: Path
) -> None:
    few = data.subsample(None, shots, seed=0)
    few.write(tmp_path / "split.csv")
    assert_same(load_labelled(tmp_path / "split.csv", seed=9), few)


def test_odd_names_survive_writing(tmp_path: Path) -> None:
    data = load_labelled(make_class_folders(tmp_path / "set", {'a, "b"': 5, "größer": 5}))
    data.write(tmp_path / "split.csv")
    assert_same(load_labelled(tmp_path / "split.csv"), data)


def test_written_paths_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_class_folders(tmp_path / "set", {"a": 5, "b": 5})
    monkeypatch.chdir(tmp_path)
    load_labelled("set").write(Path("split.csv"))
    monkeypatch.chdir("/")
    assert len(load_labelled(tmp_path / "split.csv").train) == 6


# Several labels per image

# expected labels of images 0 to 3: cat; dog; both; neither
TRUTH = [[1, 0], [0, 1], [1, 1], [0, 0]]


def many(file: Path, **options: bool) -> LabelledImages:
    return load_labelled(file, multi_label=True, **options)


def random_tags(folder: Path, images: int = 50) -> Path:
    """Write images with random labels of three classes."""
    random = np.random.default_rng(0)
    names = np.array(["a", "b", "c"])
    rows = [[f"{i:02}.jpg", "|".join(names[random.random(3) < 0.5])] for i in range(images)]
    return write_csv(folder, rows, "path,labels")


@pytest.mark.parametrize(
    ("header", "cells"),
    [
        ("cat,dog", [["1", "0"], ["0", "1"], ["1", "1"], ["0", "0"]]),
        ("dog, cat ", [["", "1.0"], ["1.0", "0.0"], ["1", "1"], ["", ""]]),  # classes are sorted
        ("cat,dog", [["True", "false"], ["", "TRUE"], [" true", "1"], ["False", "0"]]),
        ("labels", [["cat"], ["dog"], ["dog|cat"], [""]]),
        ("labels", [["cat, "], [" dog"], ["cat ,dog,cat"], [" "]]),
        ("labels", [["cat;"], ["dog"], ["cat;dog"], [""]]),
        ("label", [["cat"], ["dog"], ["cat|dog"], ["|"]]),
    ],
)
def test_formats_of_several_labels(header: str, cells: list[list[str]], tmp_path: Path) -> None:
    rows = [
        [f"{part}{i}.jpg", *cell, part]
        for part in ("train", "test")
        for i, cell in enumerate(cells)
    ]
    data = many(write_csv(tmp_path, rows, f"image,{header},split"), complete=False)
    assert data.multi_label
    assert data.classes == ["cat", "dog"]
    assert data.train.labels.tolist() == data.test.labels.tolist() == TRUTH
    assert data.train.labels.dtype == np.int64
    assert data.val.labels.shape == (0, 2)


def test_other_columns_are_not_classes_and_are_logged(tmp_path: Path) -> None:
    """The column without a name holds the row numbers that pandas writes."""
    rows = [[f"{i}.jpg", str(i), "ward 5", "65", str(i % 2)] for i in range(20)]
    data = many(write_csv(tmp_path, rows, "path,,place,age,ill"))
    assert data.classes == ["ill"]
    assert data.reading.notes[0].endswith("left out, as they are not 0 and 1: place, age")


def test_a_divided_label_is_logged_and_a_column_class_is_never_divided(tmp_path: Path) -> None:
    rows = [[f"{i}.jpg", ("salt; pepper", "sugar")[i % 2]] for i in range(20)]
    data = many(write_csv(tmp_path, rows))
    assert data.classes == ["pepper", "salt", "sugar"]
    assert "'salt; pepper' is read as several labels" in data.reading.notes[0]
    data = many(write_csv(tmp_path, rows, "path,class"))
    assert not data.multi_label
    assert data.classes == ["salt; pepper", "sugar"]
    data.write(tmp_path / "split.csv")
    assert_same(load_labelled(tmp_path / "split.csv"), data)


def test_the_random_split_of_several_labels_is_the_same_for_every_seed(tmp_path: Path) -> None:
    file = random_tags(tmp_path)
    data = many(file)
    assert [len(part) for part in parts(data)] == [30, 10, 10]
    assert_disjoint(data)
    assert data.test.paths != sorted(p for part in parts(data) for p in part.paths)[:10]
    assert_same(load_labelled(file, seed=7, multi_label=True), data)
    rows = list(csv.reader(file.open()))[1:]
    assert_same(many(write_csv(tmp_path, rows[::-1], "path,labels")), data)
    truth = {path: set(filter(None, names.split("|"))) for path, names in rows}
    for part in parts(data):
        for path, row in zip(part.paths, part.labels, strict=True):
            assert {data.classes[i] for i in np.flatnonzero(row)} == truth[Path(path).name]


def test_the_validation_split_of_several_labels_depends_on_the_seed(tmp_path: Path) -> None:
    rows = [
        [f"{i:02}.jpg", "a|b" if i % 2 else "a", "test" if i < 5 else "train"] for i in range(30)
    ]
    file = write_csv(tmp_path, rows, "path,labels,split")
    one, other = (load_labelled(file, seed, multi_label=True) for seed in (0, 1))
    assert [len(part) for part in parts(one)] == [20, 5, 5]
    assert_disjoint(one)
    assert one.val.paths != other.val.paths
    assert one.test.paths == other.test.paths


def test_a_subsample_of_several_labels_is_part_of_a_larger_one(tmp_path: Path) -> None:
    data = many(random_tags(tmp_path))
    less, more = (data.subsample(fraction, None, seed=0) for fraction in (0.1, 0.5))
    assert [len(part) for part in parts(less)] == [3, 1, 10]
    assert [len(part) for part in parts(more)] == [15, 5, 10]
    assert set(less.train.paths) < set(more.train.paths) < set(data.train.paths)
    with pytest.raises(UserError, match=r"--shots 3 .* several labels: give --fraction"):
        data.subsample(None, 3, seed=0)


def test_a_class_without_training_images_is_kept(tmp_path: Path) -> None:
    rows = [
        ["0.jpg", "a", "train"],
        ["1.jpg", "", "train"],
        ["2.jpg", "b", "test"],
        ["3.jpg", "a", "test"],
    ]
    data = many(write_csv(tmp_path, rows, "path,labels,split"), complete=False)
    assert data.classes == ["a", "b"]
    assert data.train.labels.tolist() == [[1, 0], [0, 0]]


@pytest.mark.parametrize(
    ("header", "columns"),
    [
        ("labels", ["labels"]),
        ("a,b,nobody", ["a", "b", "nobody"]),  # which a column of label names could not express
        ('a,"b, red"', ["a", "b, red"]),
    ],
)
def test_written_splits_of_several_labels_are_read_back_unchanged(
    header: str, columns: list[str], tmp_path: Path
) -> None:
    random = np.random.default_rng(1)
    bits = random.integers(0, 2, (40, 2))
    file = tmp_path / "data.csv"
    lines = [f"path,{header}"]
    for i, (a, b) in enumerate(bits):
        (tmp_path / f"{i}.jpg").write_bytes(b"")
        named = "|".join(name for name, yes in zip("ab", (a, b), strict=True) if yes)
        cells = named if header == "labels" else f"{a},{b}" + ",0" * (len(columns) - 2)
        lines.append(f"{i}.jpg,{cells}")
    file.write_text("\n".join(lines))
    data = many(file).subsample(0.7, None, seed=0)
    data.write(tmp_path / "split.csv")
    with (tmp_path / "split.csv").open(newline="") as written:
        assert next(csv.reader(written)) == ["path", *columns, "split"]
    assert_same(many(tmp_path / "split.csv"), data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "path,a,b\n" + "0.jpg,1,0\n" * 20 + "1.jpg,5,1\n",
            "column a has '5' beside 0 and 1",
        ),
        ("path,labels\n0.jpg,\n1.jpg,\n2.jpg,|\n", "names no class: the labels of all images"),
        ("path,split\n0.jpg,train\n", "no column of labels.* give a column labels, or one of"),
        (
            "path,labels\n0.jpg,a|b\n1.jpg,a|b\n2.jpg,a|b\n",
            "of no class are there test images with it and",
        ),
    ],
)
def test_invalid_files_of_several_labels(text: str, message: str, tmp_path: Path) -> None:
    for index in range(3):
        (tmp_path / f"{index}.jpg").write_bytes(b"")
    (tmp_path / "data.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        many(tmp_path / "data.csv")


def test_the_probe_refuses_several_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = random_tags(tmp_path), tmp_path / "run"
    given = ["--encoder", "random:test_resnet", "--data", file, "--out", out]
    assert main(["probe", *map(str, given)]) == 2
    error = capsys.readouterr().err
    assert "has several labels per image (column labels): give finetune such data" in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_masks_in_class_folders_are_left_out(tmp_path: Path) -> None:
    names = ("COVID/images", "COVID/masks", "Normal/images", "Normal/masks")
    make_class_folders(tmp_path, dict.fromkeys(names, 5))
    data = load_labelled(tmp_path)
    assert data.classes == ["COVID", "Normal"]
    assert sum(len(data.paths(part)) for part in PARTS) == 10
    assert not any("/masks/" in path for part in PARTS for path in data.paths(part))
    assert data.reading.counts == {"mask beside the images of a class, left out": 10}


def test_folders_named_like_parts_are_warned_of(tmp_path: Path) -> None:
    make_class_folders(tmp_path, {"cars_train": 5, "cars_test": 5})
    assert [code for code, _ in load_labelled(tmp_path).reading.warnings] == ["data.class_names"]


def test_folders_of_patients_beside_a_table_are_warned_of(tmp_path: Path) -> None:
    make_class_folders(tmp_path, {f"patient{n}": 2 for n in range(6)})
    (tmp_path / "studies.csv").write_text("study,finding\n1,edema\n")
    ((code, text),) = load_labelled(tmp_path).reading.warnings
    assert code == "data.class_names"
    assert f"--data, such as {tmp_path / 'studies.csv'}" in text


@pytest.mark.parametrize("folder", ["", "photos"])
def test_a_table_that_cannot_be_used_is_named(tmp_path: Path, folder: str) -> None:
    for n in range(4):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{n}.jpg").write_bytes(b"")
    (tmp_path / "labels.csv").write_bytes("path,label\n0.jpg,Bär\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"labels\.csv can't be read: it is not text in UTF-8"):
        load_labelled(tmp_path)


def test_lists_of_parts_in_a_wrapped_data_set(tmp_path: Path) -> None:
    make_class_folders(tmp_path / "food" / "images", {"cat": 5, "dog": 5})
    for part, numbers in (("train", range(3)), ("test", range(3, 5))):
        lines = (f"{name}/{n}\n" for name in ("cat", "dog") for n in numbers)
        file = tmp_path / "food" / "meta" / f"{part}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(lines))
    data = load_labelled(tmp_path)
    assert sorted(Path(path).stem for path in data.test.paths) == ["3", "3", "4", "4"]


def test_the_separator_that_excel_names(tmp_path: Path) -> None:
    make_class_folders(tmp_path, {"i": 6})
    rows = "".join(f"i/{n}.jpg;{('cat', 'dog')[n % 2]}\r\n" for n in range(6))
    (tmp_path / "labels.csv").write_text("sep=;\r\npath;label\r\n" + rows, newline="")
    assert load_labelled(tmp_path / "labels.csv").classes == ["cat", "dog"]


def test_options_for_tables_are_not_passed_over_for_class_folders(tmp_path: Path) -> None:
    make_class_folders(tmp_path, {"cat": 5, "dog": 5})
    rows = [
        [f"{name}/{number}.jpg", ("small", "large")[number % 2], str(number)]
        for name in ("cat", "dog")
        for number in range(5)
    ]
    write_csv(tmp_path, rows, "path,size,fold")
    data = load_labelled(tmp_path, options=LabelOptions(test_fold="4", label_column="size"))
    assert data.classes == ["large", "small"]
    assert [Path(path).name for path in data.test.paths] == ["4.jpg", "4.jpg"]
    with pytest.raises(UserError, match=r"--label_column is for a table of labels.*no such column"):
        load_labelled(tmp_path, options=LabelOptions(label_column="sise"))
    (tmp_path / "data.csv").unlink()
    with pytest.raises(UserError, match=r"--test_fold is for a table of labels, and .* has none"):
        load_labelled(tmp_path, options=LabelOptions(test_fold="4"))


def test_folders_name_the_parts_of_a_table_without_parts(tmp_path: Path) -> None:
    rows = [
        [f"{part}/{number}.jpg", ("cat", "dog")[number % 2]]
        for part in ("train", "test")
        for number in range(6)
    ]
    data = load_labelled(write_csv(tmp_path, rows))
    assert {Path(path).parent.name for path in data.test.paths} == {"test"}
    assert len(data.test.paths) == 6
    assert data.reading.origins["test"] == "folder names"


def test_tables_that_are_not_used_are_named(tmp_path: Path) -> None:
    make_class_folders(tmp_path / "images", {"cat": 5, "dog": 5})
    rows = [f"images/{name}/{n}.jpg,{name}" for n in range(5) for name in ("cat", "dog")]
    for number, some in ((1, rows[:4]), (2, rows[4:])):
        (tmp_path / f"round{number}.csv").write_text("\n".join(["path,label", *some]) + "\n")
    options = LabelOptions(label_column="label")
    ((code, text),) = load_labelled(tmp_path, options=options).reading.warnings
    assert code == "data.unused_tables"
    assert "round2.csv, and not round1.csv: put all rows into one table" in text
    (tmp_path / "round1.csv").rename(tmp_path / "train.csv")
    ((_, text),) = load_labelled(tmp_path, options=options).reading.warnings
    assert "train.csv, and not round2.csv: name the others after a part" in text


def test_a_table_of_images_that_are_not_usable_has_no_labels(tmp_path: Path) -> None:
    make_class_folders(tmp_path / "images", {"cat": 5, "dog": 5})
    rows = [f"images/{name}/{n}.jpg,{name}" for n in range(5) for name in ("cat", "dog")]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *rows[:4]]) + "\n")
    others = [f"{row.split(',')[0]},1" for row in rows[4:]]
    unusable = tmp_path / "not_usable.csv"
    unusable.write_text("\n".join(["path,not_usable", *others]) + "\n")
    data = load_labelled(tmp_path, options=LabelOptions(label_column="label"))
    assert data.classes == ["cat", "dog"]
    assert data.reading.warnings == []
    with pytest.raises(UserError, match=r"not_usable\.csv names images.*give it as --exclude"):
        load_labelled(unusable)


def test_an_image_in_the_tables_of_two_parts_is_in_the_last(tmp_path: Path) -> None:
    make_class_folders(tmp_path / "images", {"cat": 5, "dog": 5})
    rows = [f"images/{name}/{n}.jpg,{name}" for n in range(5) for name in ("cat", "dog")]
    for part, some in (("train", rows[:8]), ("test", rows[6:])):
        (tmp_path / f"{part}.csv").write_text("\n".join(["path,label", *some]) + "\n")
    data = load_labelled(tmp_path, options=LabelOptions(label_column="label"))
    assert_disjoint(data)
    assert len(data.test.paths) == 4
    assert "image of several parts, left out of the first" in data.reading.counts
