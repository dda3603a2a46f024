"""Shapes of objects from annotation files, up to the masks of images."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.transfer.detection.test_data import HEIGHT, WIDTH, coco, every, picture, voc_set, write
from vissl_lite.data.images import read_image
from vissl_lite.errors import UserError
from vissl_lite.transfer.detection.data import BOX_ONLY, BoxedImage, LabelledBoxes, load_boxes
from vissl_lite.transfer.sources.run_lengths import runs_of_mask, text_of_runs

# what ``picture`` draws in white, in the pixels that are stored
BOX = (5, 10, 10, 4)  # x, y, width, height
POLYGON = [5, 10, 15, 10, 15, 14, 5, 14]


def runs(scale: int = 1) -> dict[str, Any]:
    mask = np.zeros((HEIGHT * scale, WIDTH * scale), bool)
    mask[10 * scale : 14 * scale, 5 * scale : 15 * scale] = True
    return {"size": list(mask.shape), "counts": runs_of_mask(mask).tolist()}


def coco_set(folder: Path, segmentation: Any, count: int = 6, **keys: Any) -> Path:
    """Images of a white object, with its shape; ``keys`` are more of its annotation."""
    for number in range(count):
        picture(folder / "images" / f"{number}.png")
    file = coco(
        folder / "annotations.json",
        [f"{number}.png" for number in range(count)],
        [(number, 7, BOX) for number in range(count)],
    )
    content = json.loads(file.read_text())
    for one in content["annotations"]:
        one |= {"segmentation": segmentation, **keys}
    file.write_text(json.dumps(content))
    return folder


def load(folder: Path) -> LabelledBoxes:
    return load_boxes(folder, with_shapes=True)


def is_white(one: BoxedImage) -> bool:
    """Whether the mask of the first object is what is white in the image."""
    return np.array_equal(one.mask(0) > 0, read_image(one.path).mean(axis=2) > 128)


@pytest.mark.parametrize("kind", ["polygon", "numbers", "text", "two polygons"])
def test_coco(tmp_path: Path, kind: str) -> None:
    halves = [[5, 10, 9, 10, 9, 14, 5, 14], [9, 10, 15, 10, 15, 14, 9, 14]]
    text = {**runs(), "counts": text_of_runs(np.array(runs()["counts"]))}
    shapes = {"polygon": [POLYGON], "numbers": runs(), "text": text, "two polygons": halves}
    data = load(coco_set(tmp_path, shapes[kind]))
    assert data.with_shapes
    assert all(map(is_white, every(data)))
    assert data.reading.counts == {}
    assert all(one.shapes == () for one in every(load_boxes(tmp_path)))  # unless asked for


def test_yolo(tmp_path: Path) -> None:
    points = np.reshape(POLYGON, (-1, 2)) / (WIDTH, HEIGHT)
    for number in range(6):
        picture(tmp_path / "images" / f"{number}.png")
        text = " ".join(map(str, points.ravel()))
        write(tmp_path / "labels" / f"{number}.txt", f"0 {text}\n")
    assert all(map(is_white, every(load(tmp_path))))


def test_labelme(tmp_path: Path) -> None:
    points = np.reshape(POLYGON, (-1, 2)).tolist()
    for number in range(6):
        picture(tmp_path / f"{number}.png")
        shape = {"label": "dog", "points": points, "shape_type": "polygon"}
        content = {"shapes": [shape], "imageHeight": HEIGHT, "imageWidth": WIDTH}
        write(tmp_path / f"{number}.json", json.dumps(content))
    assert all(map(is_white, every(load(tmp_path))))


def test_cvat(tmp_path: Path) -> None:
    points = ";".join(f"{x},{y}" for x, y in np.reshape(POLYGON, (-1, 2)))
    images = ""
    for number in range(6):
        picture(tmp_path / "images" / f"{number}.png")
        images += f'<image name="{number}.png" width="{WIDTH}" height="{HEIGHT}">'
        images += f'<polygon label="dog" points="{points}"/></image>'
    write(tmp_path / "annotations.xml", f"<annotations>{images}</annotations>")
    assert all(map(is_white, every(load(tmp_path))))


@pytest.mark.parametrize("orientation", [1, 5, 6, 7, 8])
@pytest.mark.parametrize("of", ["polygon", "runs"])
def test_shapes_turn_with_their_image(tmp_path: Path, orientation: int, of: str) -> None:
    coco_set(tmp_path, [POLYGON] if of == "polygon" else runs())
    for number in range(6):
        picture(tmp_path / "images" / f"{number}.png", orientation)
    assert all(map(is_white, every(load(tmp_path))))


@pytest.mark.parametrize("of", ["polygon", "runs"])
def test_shapes_annotated_at_another_size(tmp_path: Path, of: str) -> None:
    shape = [[2 * value for value in POLYGON]] if of == "polygon" else runs(2)
    file = coco_set(tmp_path, shape, bbox=[2 * value for value in BOX]) / "annotations.json"
    content = json.loads(file.read_text())
    for one in content["images"]:
        one |= {"height": 2 * HEIGHT, "width": 2 * WIDTH}
    file.write_text(json.dumps(content))
    assert all(map(is_white, every(load(tmp_path))))


@pytest.mark.parametrize("of", ["polygon", "runs"])
def test_written_shapes_are_read_back_unchanged(tmp_path: Path, of: str) -> None:
    shape = [[5.3, 10.1, 15, 10, 14.7, 13.9]] if of == "polygon" else runs()
    data = load(coco_set(tmp_path / "a", shape))
    data.write(tmp_path / "b")
    again = load(tmp_path / "b")
    assert [one.shapes for one in every(again)] == [one.shapes for one in every(data)]
    assert load(tmp_path / "b").reading.counts == {}


def test_data_without_shapes_are_refused(tmp_path: Path) -> None:
    folder = voc_set(tmp_path, [("dog", (2, 3, 30, 20))])
    with pytest.raises(
        UserError, match=r"no shapes of objects in \d train images, the first .*\.png"
    ):
        load(folder)
    load_boxes(folder)


def test_objects_with_a_box_alone_are_counted_and_stay(tmp_path: Path) -> None:
    file = coco_set(tmp_path, [POLYGON]) / "annotations.json"
    content = json.loads(file.read_text())
    for number in range(6):
        more = {"image_id": number, "category_id": 3, "bbox": [20, 2, 9, 9], "iscrowd": 0}
        content["annotations"] += [more, {**more, "bbox": [1, 1, 3, 3], "segmentation": [[1, 2]]}]
    file.write_text(json.dumps(content))
    data = load(tmp_path)
    assert data.reading.counts == {BOX_ONLY: 12, "shape not readable, the box kept": 6}
    assert all(one.has_shape.tolist() == [True, False, False] for one in every(data))


def test_a_fraction_without_shapes_is_refused(tmp_path: Path) -> None:
    data = load(coco_set(tmp_path, [POLYGON], count=20))
    plain = [replace(one, shapes=(None,)) for one in data.train]
    plain = replace(data, train=plain)
    with pytest.raises(UserError, match=r"what --fraction 0.5 takes has boxes, but no shapes"):
        plain.subsample(0.5)
    data.subsample(0.5)


def test_of_two_equal_boxes_the_one_with_a_shape_is_kept(tmp_path: Path) -> None:
    file = coco_set(tmp_path, [POLYGON]) / "annotations.json"
    content = json.loads(file.read_text())
    plain = [{**one, "segmentation": []} for one in content["annotations"]]
    content["annotations"] = plain + content["annotations"]
    file.write_text(json.dumps(content))
    assert all(one.has_shape.tolist() == [True] and is_white(one) for one in every(load(tmp_path)))
