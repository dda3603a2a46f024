"""Simulated labelling: pools, rounds and the labels that a method has."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vissl_lite.comparison import simulation
from vissl_lite.comparison.simulation import NAMES, SimulatedLabelling
from vissl_lite.errors import UserError
from vissl_lite.transfer.classification.data import LabelledImages, Part
from vissl_lite.transfer.sources.reading_log import ReadingLog

IMAGES = 60


def part(start: int, count: int) -> Part:
    return Part([f"{i}.png" for i in range(start, start + count)], np.arange(count) % 3)


def labelled(val_from_train: bool) -> LabelledImages:
    reading = ReadingLog("data", val_from_train=val_from_train)
    return LabelledImages(["a", "b", "c"], part(0, 40), part(40, 20), part(100, 9), reading=reading)


def features(count: int = IMAGES) -> np.ndarray:
    """Three clusters, which are the classes."""
    centers = 4 * np.eye(3)[np.r_[np.arange(40) % 3, np.arange(20) % 3][:count]]
    return (centers + np.random.default_rng(0).normal(size=centers.shape)).astype(np.float32)


def chosen(
    simulated: SimulatedLabelling[LabelledImages], name: str, budget: int, seed: int = 0
) -> set[str]:
    count = len(simulated.paths)
    found = simulated.subset(name, budget, seed, features(count))  # type: ignore[arg-type]
    return {*found.train.paths, *found.val.paths}


@pytest.mark.parametrize("name", NAMES)
def test_a_larger_budget_includes_the_smaller_one(name: str) -> None:
    simulated = SimulatedLabelling(labelled(True), [6, 12])
    few, more = (chosen(simulated, name, budget) for budget in (6, 12))
    assert (len(few), len(more)) == (6, 12)
    assert few < more


def test_seeds_have_pools_of_their_own_and_methods_share_them() -> None:
    simulated = SimulatedLabelling(labelled(True), [48])  # 80 % of all training images
    pools = [chosen(simulated, "random", 48, seed) for seed in range(3)]
    assert len(set(map(frozenset, pools))) == 3
    assert chosen(simulated, "herding", 48, 1) == pools[1]


def test_labels_are_divided_for_the_choice_of_hyperparameters_and_refitted() -> None:
    simulated = SimulatedLabelling(labelled(False), [12])
    assert simulated.own_val
    own = simulated.subset("random", 12, 0, features(40))
    assert (len(own.train), own.val.paths) == (12, labelled(False).val.paths)
    assert simulated.labels == {"12 images": (12, 0)}  # the validation part is not chosen
    made = SimulatedLabelling(labelled(True), [12]).subset("random", 12, 0, features())
    assert (len(made.train), len(made.val)) == (8, 4)
    assert made.refits(None)
    labels = dict(zip([f"{i}.png" for i in range(40)], np.arange(40) % 3, strict=True))
    labels |= dict(zip([f"{i}.png" for i in range(40, 60)], np.arange(20) % 3, strict=True))
    for one in (made.train, made.val):
        assert [labels[path] for path in one.paths] == one.labels.tolist()


def test_no_group_is_divided_for_the_choice_of_hyperparameters() -> None:
    data = labelled(True)
    groups = {f"{i}.png": f"patient {i // 5}" for i in range(IMAGES)}
    data = replace(data, reading=replace(data.reading, groups=groups))
    found = SimulatedLabelling(data, [24]).subset("random", 24, 0, features())
    train, val = (set(map(groups.__getitem__, part.paths)) for part in (found.train, found.val))
    assert min(len(train), len(val)) > 0
    assert not train & val
    assert len(found.train) + len(found.val) == 24


def test_uncertain_images_are_those_between_the_classes() -> None:
    simulated = SimulatedLabelling(labelled(True), [9, 15])
    first = chosen(simulated, "random", 9)
    pool = [path for path in simulated.paths if path not in first]
    border = pool[::4]
    points = features()
    points[[simulated.paths.index(path) for path in border]] = 4 / 3  # mean of the centers
    found = simulated.subset("margin", 9, 0, points)
    assert {*found.train.paths, *found.val.paths} == first  # without a model yet
    found = simulated.subset("margin", 15, 0, points)
    added = {*found.train.paths, *found.val.paths} - first
    assert len(added & {*border}) >= 5


def test_dropquery_chooses_among_images_whose_class_dropout_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def changed(logits: Callable, points: np.ndarray, seed: int) -> np.ndarray:
        assert logits(points).shape == (48, 3)
        return points[:, 0] > 3

    simulated = SimulatedLabelling(labelled(True), [9, 15])
    monkeypatch.setattr(simulation, "changed_by_dropout", changed)
    centers = [simulated.paths.index(one) for one in chosen(simulated, "dropquery", 9)]
    assert len({*(features()[centers].argmax(axis=1))}) == 3  # of all clusters, without labels
    both = [simulated.paths.index(one) for one in chosen(simulated, "dropquery", 15)]
    assert (features()[sorted({*both} - {*centers}), 0] > 3).all()


def test_a_budget_that_is_too_large_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    simulated = SimulatedLabelling(labelled(True), [10, 100])
    assert list(simulated.labels) == ["10 images"]
    assert "budgets of 100, since each seed has 48 images to choose from" in caplog.text
    with pytest.raises(UserError, match=r"--budgets 100 is more .* 80% of 60 .* which is 48"):
        SimulatedLabelling(labelled(True), [100])


def test_of_near_duplicates_one_may_be_chosen() -> None:
    repeated = {f"{number}.png" for number in (0, 7, 45)}
    simulated = SimulatedLabelling(labelled(True), [10], repeated)
    assert len(simulated.paths) == IMAGES - 3
    assert not repeated & set(simulated.paths)
    own = SimulatedLabelling(labelled(False), [10], repeated)
    assert (len(own.paths), len(own.data.val)) == (38, 20)  # the user's own part stays as it is


def test_names_of_files_that_are_not_utf8_are_written(tmp_path: Path) -> None:
    data = labelled(True)
    data.train.paths[:] = [f"{name}\udce4.png" for name in data.train.paths]
    simulated = SimulatedLabelling(data, [48])
    chosen(simulated, "random", 48)
    simulated.write_csv(tmp_path / "selected.csv")
    assert b"\xe4.png" in (tmp_path / "selected.csv").read_bytes()
