"""Files to label that begin with the labels of earlier rounds."""

import json
from pathlib import Path
from typing import Any

from tests.conftest import blobs
from vissl_lite.transfer.skeleton import filled_skeleton, read_coco_labels, write_coco_skeleton


def written(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "to_label.json").read_text())
    return content


def test_images_and_categories_are_added_with_larger_ids(tmp_path: Path) -> None:
    """Names are made absolute, as the new file is in another folder; ids may be text."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images").mkdir()
    paths = [str(tmp_path / "images" / f"{name}.png") for name in "ab"]
    for seed, path in enumerate(paths):
        blobs(seed).save(path)
    box = {"id": "x1", "image_id": "7", "category_id": 4, "bbox": [1, 1, 5, 5], "score": 0.5}
    content = {
        "licenses": [{"id": 1}],
        "images": [
            {"id": "7", "file_name": "a.png", "license": 1},
            {"id": 2, "file_name": "no.png"},
        ],
        "annotations": [box],
        "categories": [{"id": 4, "name": "cell "}],
    }
    file = tmp_path / "annotations" / "labels.json"
    file.write_text(json.dumps(content))
    for earlier in (read_coco_labels(file), read_coco_labels(tmp_path / "images", file)):
        assert earlier is not None
        write_coco_skeleton(tmp_path / "to_label.json", paths[1:], ["dot", "cell"], earlier)
        whole = written(tmp_path)
        assert whole["licenses"] == [{"id": 1}]
        assert whole["images"] == [
            {"id": "7", "file_name": paths[0], "license": 1},
            {"id": 2, "file_name": "no.png"},
            {"id": 8, "file_name": paths[1], "height": 40, "width": 48},
        ]
        assert whole["annotations"] == [box]
        assert whole["categories"] == [{"id": 4, "name": "cell "}, {"id": 5, "name": "dot"}]


def test_what_the_earlier_file_says_of_itself_and_its_unusual_entries_are_kept(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.png"
    blobs(0).save(path)
    content = {
        "info": {"version": "2"},
        "images": [{"id": 0, "coco_url": "a.png"}],
        "annotations": [],
        "categories": [{"id": 3}, {"id": 4, "name": None}, {"id": 5, "name": "x"}],
    }
    (tmp_path / "labels.json").write_text(json.dumps(content))
    (tmp_path / "round2").mkdir()
    earlier = read_coco_labels(tmp_path / "labels.json")
    write_coco_skeleton(tmp_path / "round2" / "to_label.json", [], ["3", "4", "x"], earlier)
    whole = written(tmp_path / "round2")
    assert whole["info"]["version"] == "2"
    assert whole["images"] == [{"id": 0, "coco_url": "a.png", "file_name": str(path)}]
    assert whole["categories"] == content["categories"]


def test_only_files_in_the_format_of_coco_are_read(tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text('{"images": [], "annotations": []}')
    (tmp_path / "labels.csv").write_text("path,label\n")
    for labelled in (tmp_path, tmp_path / "labels.json", tmp_path / "labels.csv"):
        assert read_coco_labels(labelled) is None


def test_a_file_is_filled_once_its_lists_change(tmp_path: Path) -> None:
    path, file = str(tmp_path / "a.png"), tmp_path / "to_label.json"
    blobs(0).save(path)
    earlier = {"images": [{"id": 1}], "annotations": [{"id": 1}], "categories": []}
    write_coco_skeleton(file, [path], [], earlier)
    assert filled_skeleton(tmp_path) is None
    content = written(tmp_path)
    file.write_text(json.dumps(content))  # without line breaks
    assert filled_skeleton(tmp_path) is None
    content["annotations"].append({"id": 2})
    file.write_text(json.dumps(content))
    assert filled_skeleton(tmp_path) == file
