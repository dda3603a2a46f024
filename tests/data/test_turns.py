import numpy as np
import pytest
import torch

from vissl_lite.data.turns import UNTURNED, Turn, turns_for

ALL = turns_for(upright=False)


def test_without_an_up_there_are_eight_turns_and_with_one_two() -> None:
    image = np.arange(12).reshape(3, 4)
    assert len({turn.image(image).tobytes() + bytes(turn.image(image).shape) for turn in ALL}) == 8
    assert [turn.image(image).tolist() for turn in turns_for(upright=True)] == [
        image.tolist(),
        image[:, ::-1].tolist(),
    ]
    assert ALL[0] == turns_for(upright=True)[0] == UNTURNED[0] == Turn()


@pytest.mark.parametrize("turn", ALL)
def test_maps_of_a_turned_image_come_back(turn: Turn) -> None:
    images = torch.rand(2, 3, 5, 7)
    turned = turn.batch(images)
    assert turned.shape[-2:] == ((7, 5) if turn.swaps_sides else (5, 7))
    assert torch.equal(turn.map_back(turned), images)
    as_array = turn.image(images[1].permute(1, 2, 0).numpy())
    assert np.array_equal(as_array, turned[1].permute(1, 2, 0).numpy())


@pytest.mark.parametrize("turn", ALL)
def test_boxes_in_a_turned_image_come_back(turn: Turn) -> None:
    image = np.zeros((9, 13), np.uint8)
    image[2:5, 1:8] = 1
    rows, columns = np.nonzero(turn.image(image))
    box = np.array([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]], np.float32)
    assert turn.boxes_back(box, 9, 13).tolist() == [[1, 2, 8, 5]]
    assert turn.boxes_back(np.empty((0, 4), np.float32), 9, 13).shape == (0, 4)
