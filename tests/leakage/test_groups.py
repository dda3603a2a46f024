import logging

import numpy as np
import pytest

from vissl_lite.errors import UserError
from vissl_lite.leakage.groups import check_groups

GROUPS = {
    "train": np.array(["p1", "p2", "p2", "p3"]),
    "val": np.array(["p3", "p4", "p5"]),
    "test": np.array(["p2", "p4", "p6", "p2"]),
}


def test_groups_in_several_parts_are_warned_of(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("vissl_lite")
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    monkeypatch.setattr(logger, "propagate", False)
    assert check_groups(GROUPS, "column patient", "warn") == (3, {})
    (message,) = caplog.messages
    assert message == (
        "Leaks: 1 group is in the training part and the test part, the first p2; 1 group is in the "
        "training part and the validation part, the first p3; 1 group is in the validation part "
        "and the test part, the first p4 (groups: column patient). --leaks exclude leaves their "
        "test and validation images out."
    )
    assert getattr(caplog.records[0], "code", "") == "leak"


def test_excluding_them_leaves_no_group_in_two_parts() -> None:
    shared = check_groups(GROUPS, "column patient", "exclude")
    assert shared == (3, {"test": [0, 3], "val": [0, 1]})
    kept = {
        part: set(np.delete(names, shared.left_out.get(part, [])).tolist())
        for part, names in GROUPS.items()
    }
    assert kept == {"train": {"p1", "p2", "p3"}, "val": {"p5"}, "test": {"p4", "p6"}}


def test_groups_of_pretraining_are_found() -> None:
    apart = {"train": np.array(["p1"]), "val": np.array(["p2"]), "test": np.array(["p3", "p4"])}
    seen = {"runs/a": {"p1", "p4"}, "runs/b": {"p2"}}
    assert check_groups(apart, "column patient", "exclude", seen) == (1, {"test": [1], "val": []})
    # of a test group that is left out, the validation images can stay
    both = {**apart, "val": np.array(["p2", "p4"])}
    assert check_groups(both, "column patient", "exclude", seen) == (1, {"test": [1], "val": []})
    with pytest.raises(UserError, match="1 group is in the training images of runs/a and the"):
        check_groups(apart, "column patient", "error", seen)


def test_an_error_stops_if_there_are_any() -> None:
    with pytest.raises(UserError, match="1 group is in the training part and the test part"):
        check_groups(GROUPS, "column patient", "error")
    apart = {**GROUPS, "val": np.array(["p7"]), "test": np.array(["p8"])}
    assert check_groups(apart, "column patient", "error") == (0, {})
