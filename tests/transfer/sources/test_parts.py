from collections.abc import Sequence

import numpy as np
import pytest

from vissl_lite.errors import UserError
from vissl_lite.transfer.sources.parts import (
    Split,
    complete_parts,
    fold_numbers,
    hold_out_of_all,
    hold_out_of_each,
    part_of_file,
    part_of_name,
    part_of_path,
    rarest_classes,
)
from vissl_lite.transfer.sources.reading_log import ReadingLog


@pytest.mark.parametrize(
    ("name", "part"),
    [
        *(("train", "train"), ("Training", "train"), ("trainval", "train"), ("train2017", "train")),
        *(("TRAIN_SET", "train"), ("train_images", "train"), ("TrainImages", "train")),
        *(("val", "val"), ("valid", "val"), ("Validation", "val"), ("dev", "val")),
        *(("test", "test"), ("Testing", "test"), ("eval", "test"), ("test_1", "test")),
        *(("test tube", None), ("trains", None), ("latest", None), ("train_val", None), ("", None)),
    ],
)
def test_names_of_parts(name: str, part: Split | None) -> None:
    assert part_of_name(name) == part


def test_parts_in_paths() -> None:
    assert part_of_path("train/cats/1.jpg") == "train"
    assert part_of_path("train/old/test/1.jpg") == "test"
    assert part_of_path("cats/train.jpg") is None
    assert part_of_file("annotations/instances_val2017.json") == "val"
    assert part_of_file("train/_annotations.coco.json") == "train"


def strata(items: Sequence[int]) -> np.ndarray:
    return np.array(items) % 2


def complete(
    given: dict[Split | None, list[int]], seed: int = 0, wanted: bool = True
) -> tuple[dict[Split, list[int]], ReadingLog]:
    log = ReadingLog("data")
    return complete_parts(given, strata, True, seed, log, complete=wanted), log


def test_given_parts_stay_as_they_are() -> None:
    given: dict[Split | None, list[int]] = {"train": [1, 2], "val": [3], "test": [4]}
    parts, log = complete(given)
    assert parts == given
    assert log.split == ""


def test_a_validation_part_becomes_the_test_part() -> None:
    parts, log = complete({"train": list(range(20)), "val": [30, 31]})
    assert parts["test"] == [30, 31]
    assert len(parts["val"]) == 4
    assert sorted(parts["train"] + parts["val"]) == list(range(20))
    assert log.split == (
        "No test part was found: the given validation part is the test part. 4 of the training "
        "images, chosen at random and stratified by class (seed 0), are the validation part."
    )
    assert log.origins["test"] == "validation part, as given"


def test_the_test_part_that_is_made_does_not_follow_the_seed() -> None:
    one, other = (complete({None: list(range(40))}, seed)[0] for seed in (0, 1))
    assert one == other
    assert [len(one[part]) for part in ("train", "val", "test")] == [24, 8, 8]
    one, other = (complete({"train": list(range(40)), "test": [50]}, seed)[0] for seed in (0, 1))
    assert one["val"] != other["val"]


def test_no_part_is_made_if_disabled() -> None:
    parts, log = complete({"train": [0, 1, 2, 3], "val": [4]}, wanted=False)
    assert parts == {"train": [0, 1, 2, 3], "val": [4], "test": []}
    assert log.split == ""
    assert not log.val_from_train
    parts, log = complete({"test": [1], None: [2, 3]}, wanted=False)
    assert parts == {"train": [2, 3], "val": [], "test": [1]}
    assert log.counts == {}


def test_images_without_a_part_are_left_out_and_counted() -> None:
    parts, log = complete({"train": list(range(10)), "test": [11], None: [12, 13]})
    assert not {12, 13} & {one for part in parts.values() for one in part}
    assert log.counts == {"image without a part, left out": 2}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"val": [1], "test": [2]}, "data has no training images, only val and test"),
        ({}, "data has no labelled images that can be used"),
        ({None: [1, 2]}, "data has 2 images, too few to train, validate and test"),
    ],
)
def test_nothing_to_train_on(given: dict[Split | None, list[int]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        complete(given)


def test_each_class_is_held_out() -> None:
    labels = np.array([0] * 50 + [1] * 3 + [2])
    held = labels[hold_out_of_each(labels, 0.2, seed=0)]
    assert np.bincount(held, minlength=3).tolist() == [10, 1, 0]


def test_a_systematic_sample_is_proportional() -> None:
    random = np.random.default_rng(0)
    labels = random.permutation(np.repeat([0, 1, 2], [50, 30, 20]))
    for seed in range(5):
        held = hold_out_of_all(labels, 0.2, seed)
        assert len(set(held.tolist())) == 20
        assert np.abs(np.bincount(labels[held]) - [10, 6, 4]).max() <= 1
    assert len(hold_out_of_all(np.arange(2), 0.2, 0)) == 1
    assert len(hold_out_of_all(np.arange(1), 0.2, 0)) == 0


def test_the_rarest_class_of_an_image() -> None:
    assert rarest_classes([[0], [0, 1], [1, 0, 2], [], [0, 0]]).tolist() == [0, 1, 2, -1, 0]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_folds_are_stratified_and_of_equal_size(count: int) -> None:
    strata = np.array([0] * 10 + [1] * 7 + [2] * 3 + [3])
    folds = fold_numbers(strata, count, seed=0)
    assert np.ptp(np.bincount(folds, minlength=count)) <= 1
    for stratum in range(4):
        assert np.ptp(np.bincount(folds[strata == stratum], minlength=count)) <= 1
    assert not np.array_equal(folds, fold_numbers(strata, count, seed=1))


def test_the_origin_of_the_validation_part_is_known() -> None:
    """Hyperparameters may be refitted on labels that were taken out of the training part only."""

    def made(**given: int) -> bool:
        log = ReadingLog("data")
        parts = {name: list(range(count)) for name, count in given.items()}
        complete_parts(parts, lambda items: np.zeros(len(items), int), True, 0, log)  # type: ignore[arg-type]
        return log.val_from_train

    assert made(train=20, test=5)
    assert made(train=20)
    assert made(train=20, val=5)  # the given validation part is the test part
    assert not made(train=20, val=5, test=5)
