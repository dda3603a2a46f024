import csv
import itertools
from pathlib import Path

import numpy as np
import pytest

from vissl_lite.data.labelled import LabelledImages, Part, load_labelled, take_labels
from vissl_lite.errors import UserError


def fill(folder: Path, counts: dict[str, int]) -> Path:
    """Class folders of empty files: what labels are made of never looks inside."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            (folder / name / f"{index}.jpg").write_bytes(b"")
    return folder


def table(folder: Path, rows: list[list[str]], header: str = "path,label") -> Path:
    """A CSV file; its images are made too."""
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
    """The folder that an image lies in is its class."""
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
def test_a_validation_folder_is_taken_as_it_is(name: str, tmp_path: Path) -> None:
    fill(tmp_path / "train", {"a": 5, "b": 5})
    fill(tmp_path / name, {"a": 2, "b": 3})
    fill(tmp_path / "test", {"a": 1, "b": 1})
    data = load_labelled(tmp_path)
    assert [counts(part) for part in parts(data)] == [[5, 5], [2, 3], [1, 1]]
    assert all(Path(p).is_relative_to(tmp_path / name) for p in data.val.paths)


def test_plain_class_folders_are_split_60_20_20(tmp_path: Path) -> None:
    data = load_labelled(fill(tmp_path, {"a": 50, "b": 20, "c": 10}))
    assert [counts(part) for part in parts(data)] == [[30, 12, 6], [10, 4, 2], [10, 4, 2]]
    assert_labels_true(data)
    assert_disjoint(data)


def test_the_split_of_plain_folders_is_the_same_for_every_seed(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 20, "b": 20})
    assert_same(load_labelled(tmp_path, seed=0), load_labelled(tmp_path, seed=5))


def test_the_split_of_plain_folders_is_a_mixture(tmp_path: Path) -> None:
    data = load_labelled(fill(tmp_path, {"a": 50, "b": 50}))
    numbers = [int(Path(path).stem) for path in data.test.paths]
    assert 15 < np.mean(numbers) < 34
    assert numbers[:10] != numbers[10:]


def test_small_classes_reach_the_test_part_too(tmp_path: Path) -> None:
    data = load_labelled(fill(tmp_path, {"a": 3, "b": 2}))
    assert [counts(part) for part in parts(data)] == [[1, 1], [1], [1, 1]]


def test_hidden_folders_are_no_classes(tmp_path: Path) -> None:
    fill(tmp_path, {"a": 5, "b": 5, ".cache": 5})
    assert load_labelled(tmp_path).classes == ["a", "b"]


def test_a_csv_file_without_splits_is_split(tmp_path: Path) -> None:
    rows = [[f"images/{c}/{i}.jpg", c] for c in "ab" for i in range(10)]
    data = load_labelled(table(tmp_path, rows))
    assert [counts(part) for part in parts(data)] == [[6, 6], [2, 2], [2, 2]]
    assert_labels_true(data)
    assert_disjoint(data)


def test_a_csv_file_with_splits_is_taken_at_its_word(tmp_path: Path) -> None:
    names = ["train", "train", "test", "val", "validation"]
    rows = [[f"{c}/{i}.jpg", c, name] for c in "ab" for i, name in enumerate(names)]
    data = load_labelled(table(tmp_path, rows, "path,label,split"))
    stems = [[Path(p).stem for p in part.paths] for part in parts(data)]
    assert stems == [["0", "1"] * 2, ["3", "4"] * 2, ["2"] * 2]
    assert_labels_true(data)


def test_a_csv_file_without_validation_rows_holds_some_out(tmp_path: Path) -> None:
    rows = [[f"{c}/{i}.jpg", c, "test" if i < 5 else "train"] for c in "ab" for i in range(15)]
    data = load_labelled(table(tmp_path, rows, "path,label,split"))
    assert [counts(part) for part in parts(data)] == [[8, 8], [2, 2], [5, 5]]
    assert_disjoint(data)


@pytest.mark.parametrize("header", ["path,label", "image,class", "filename,label", "file,class"])
def test_columns_may_be_called_otherwise(header: str, tmp_path: Path) -> None:
    rows = [[f"{c}/{i}.jpg", c] for c in "ab" for i in range(5)]
    assert load_labelled(table(tmp_path, rows, header)).classes == ["a", "b"]


def test_more_columns_and_a_byte_order_mark_do_not_matter(tmp_path: Path) -> None:
    rows = [[f"{c}/{i}.jpg", "x", c] for c in "ab" for i in range(5)]
    file = table(tmp_path, rows, "path,note,label")
    file.write_text(file.read_text(), encoding="utf-8-sig")
    assert load_labelled(file).classes == ["a", "b"]


def test_the_parts_of_a_csv_file_come_sorted_by_path(tmp_path: Path) -> None:
    rows = [[f"{c}/{i}.jpg", c, "test" if i < 2 else "train"] for c in "ab" for i in range(9)]
    data = load_labelled(table(tmp_path, rows[::-1], "path,label,split"))
    for part in parts(data):
        assert part.paths == sorted(part.paths)


def test_the_order_of_rows_does_not_change_the_split(tmp_path: Path) -> None:
    rows = [[f"{c}/{i}.jpg", c] for c in "ab" for i in range(10)]
    one = load_labelled(table(tmp_path, rows))
    assert_same(load_labelled(table(tmp_path, rows[::-1])), one)


# Mistakes


def test_one_class_is_not_enough(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"one class only \(cats\)"):
        load_labelled(fill(tmp_path, {"cats": 9}))


def test_a_test_part_is_needed_unless_the_caller_says_otherwise(tmp_path: Path) -> None:
    fill(tmp_path / "train", {"a": 5, "b": 5})
    with pytest.raises(UserError, match="no test images: add test/<class>/"):
        load_labelled(tmp_path)
    assert len(load_labelled(tmp_path, need_test=False).test) == 0


def test_a_validation_part_is_not_made_where_it_is_not_wanted(labelled: Path) -> None:
    data = load_labelled(labelled, need_val=False)
    assert len(data.val) == 0
    assert counts(data.train) == [12, 12, 12]


@pytest.mark.parametrize("part", ["val", "test"])
def test_a_class_that_training_lacks_is_a_mistake(part: str, tmp_path: Path) -> None:
    for name in ("train", "val", "test"):
        fill(tmp_path / name, {"a": 2, "b": 2} | ({"cow": 1} if name == part else {}))
    with pytest.raises(UserError, match=f"the {part} images have the class cow"):
        load_labelled(tmp_path)


def test_a_folder_without_class_folders_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="has no class folders"):
        load_labelled(tmp_path)


def test_a_class_folder_without_images_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no images found in .*b "):
        load_labelled(fill(tmp_path, {"a": 3, "b": 0}))


def test_a_missing_folder_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        load_labelled(tmp_path / "nowhere")


def test_a_file_of_another_kind_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text("{}")
    with pytest.raises(UserError, match=r"neither a folder with class folders nor a \.csv"):
        load_labelled(tmp_path / "data.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,species\na/0.jpg,a\n", "no column label or class: it has path, species"),
        ("where,label\na/0.jpg,a\n", "no column path or image or file or filename"),
        ("", "no column path"),
        ("path,label\n", "has no rows"),
        ("path,label\na/0.jpg,a\na/9.jpg,a\nb/9.jpg,b\n", r"names 2 missing files.*a/9\.jpg"),
        ("path,label,split\na/0.jpg,a,dev\n", "the split 'dev' is none of train, val, test"),
        ("path,label,split\na/0.jpg,a,test\n", "has no training images"),
        ("path,label\na/0.jpg,a\na/0.jpg\n", "label"),
        ("path,label\na/0.jpg,a\na/0.jpg,\n", "label"),
        ("path,label,split\na/0.jpg,a,train\na/0.jpg,b\n", "split"),
        ("label,path\na\n", "path|missing"),
    ],
)
def test_a_csv_file_with_a_mistake(text: str, message: str, tmp_path: Path) -> None:
    fill(tmp_path, {"a": 1})
    (tmp_path / "data.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        load_labelled(tmp_path / "data.csv")


def test_a_csv_file_that_is_no_text_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(UserError, match="can't be read as a CSV file"):
        load_labelled(tmp_path / "data.csv")


# Few labels


@pytest.fixture
def data(tmp_path: Path) -> LabelledImages:
    fill(tmp_path / "train", {"a": 50, "b": 20, "c": 5})
    fill(tmp_path / "test", {"a": 3, "b": 3, "c": 3})
    return load_labelled(tmp_path)


def test_val_is_held_out_of_train(data: LabelledImages, tmp_path: Path) -> None:
    whole = load_labelled(tmp_path, need_val=False)
    assert not set(data.train.paths) & set(data.val.paths)
    assert sorted(data.train.paths + data.val.paths) == sorted(whole.train.paths)
    assert [counts(data.train), counts(data.val)] == [[40, 16, 4], [10, 4, 1]]
    assert_labels_true(data)


def test_val_follows_the_seed(data: LabelledImages, tmp_path: Path) -> None:
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
    few = take_labels(data, fraction, None, seed=0)
    assert [counts(few.train), counts(few.val)] == [train, val]
    assert_labels_true(few)
    assert_disjoint(few)
    assert few.test is data.test


def test_shots_are_images_a_class_as_far_as_there_are_any(data: LabelledImages) -> None:
    few = take_labels(data, None, 8, seed=0)
    assert [counts(few.train), counts(few.val)] == [[8, 8, 4], [8, 4, 1]]
    assert_labels_true(few)
    assert few.test is data.test


def test_fewer_labels_are_part_of_more(data: LabelledImages) -> None:
    amounts = [(None, 1), (0.1, None), (None, 5), (0.25, None), (None, 10), (0.9, None)]
    taken = [take_labels(data, fraction, shots, seed=3) for fraction, shots in amounts]
    for name in ("a", "b"):
        number = data.classes.index(name)
        members = [
            {path for path, label in zip(few.train.paths, few.train.labels, strict=True)
             if label == number}
            for few in taken
        ]  # fmt: skip
        members.sort(key=len)
        assert len(members[0]) < len(members[-1])
        for less, more in itertools.pairwise(members):
            assert less <= more
    for few in taken:
        assert set(few.val.paths) <= set(data.val.paths)


def test_which_labels_follows_the_seed(data: LabelledImages) -> None:
    assert_same(take_labels(data, 0.2, None, 1), take_labels(data, 0.2, None, 1))
    assert (
        take_labels(data, 0.2, None, 1).train.paths != take_labels(data, 0.2, None, 2).train.paths
    )


def test_all_labels_by_default(data: LabelledImages) -> None:
    assert take_labels(data, None, None, seed=0) is data


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
def test_an_amount_out_of_range_is_a_mistake(
    data: LabelledImages, fraction: float | None, shots: int | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        take_labels(data, fraction, shots, seed=0)


# Writing


@pytest.mark.parametrize("shots", [None, 2])
def test_the_splits_written_down_read_back_as_the_same_data(
    data: LabelledImages, shots: int | None, tmp_path: Path
) -> None:
    few = take_labels(data, None, shots, seed=0)
    few.write(tmp_path / "split.csv")
    assert_same(load_labelled(tmp_path / "split.csv", seed=9), few)


def test_odd_names_survive_writing(tmp_path: Path) -> None:
    data = load_labelled(fill(tmp_path / "set", {'a, "b"': 5, "größer": 5}))
    data.write(tmp_path / "split.csv")
    assert_same(load_labelled(tmp_path / "split.csv"), data)


def test_paths_are_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "set", {"a": 5, "b": 5})
    monkeypatch.chdir(tmp_path)
    load_labelled("set").write(Path("split.csv"))
    monkeypatch.chdir("/")
    assert len(load_labelled(tmp_path / "split.csv").train) == 6
