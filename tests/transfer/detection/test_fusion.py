import numpy as np
import pytest

from vissl_lite.transfer.detection.fusion import fuse_boxes

BOX, NEAR, FAR = [0.0, 0, 10, 10], [0.0, 0, 10, 12], [50.0, 50, 60, 60]


def fuse(*turns: list[tuple[list[float], float, int]]) -> list[tuple[list[float], float, int]]:
    """Fuse lists of boxes, scores and labels, one list for each turn."""
    arrays = [
        (
            np.array([box for box, _, _ in turn], np.float32).reshape(-1, 4),
            np.array([score for _, score, _ in turn], np.float32),
            np.array([label for _, _, label in turn], np.int64),
        )
        for turn in turns
    ]
    boxes, scores, labels = fuse_boxes(*zip(*arrays, strict=True))
    return list(zip(boxes.tolist(), scores.tolist(), labels.tolist(), strict=True))


def test_boxes_are_averaged_by_their_scores() -> None:
    ((box, score, label),) = fuse([(BOX, 0.9, 3)], [(NEAR, 0.3, 3)])
    assert box == pytest.approx([0, 0, 10, (0.9 * 10 + 0.3 * 12) / 1.2])
    assert (score, label) == (pytest.approx(0.6), 3)


def test_a_box_of_one_turn_loses_the_share_of_the_others() -> None:
    found = fuse([(BOX, 0.8, 0)], [], [(FAR, 0.9, 0)], [(BOX, 0.8, 0)])
    assert [box for box, _, _ in found] == [BOX, FAR]
    assert [score for _, score, _ in found] == pytest.approx([0.4, 0.225])


def test_classes_are_kept_apart() -> None:
    assert len(fuse([(BOX, 0.8, 0)], [(BOX, 0.7, 1)])) == 2


def test_neighbors_that_each_turn_tells_apart_stay_apart() -> None:
    both = [(BOX, 0.8, 0), (NEAR, 0.8, 0)]  # intersection over union 10 / 12
    found = fuse(both, both, both)
    assert sorted(box for box, _, _ in found) == [BOX, NEAR]
    assert [score for _, score, _ in found] == pytest.approx([0.8, 0.8])


def test_no_turn_finds_anything() -> None:
    assert fuse([], []) == []
