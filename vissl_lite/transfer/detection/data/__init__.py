"""Detection data: images with boxes, in COCO, Pascal VOC or YOLO format, cleaned and split."""

import json
import logging
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from vissl_lite.errors import UserError
from vissl_lite.options import StrPath
from vissl_lite.transfer.base import ListDataset
from vissl_lite.transfer.detection.data.annotations import Note
from vissl_lite.transfer.detection.data.cleaning import RepairLog, clean
from vissl_lite.transfer.detection.data.discovery import read_annotations
from vissl_lite.transfer.sources import SPLITS, hold_out, is_utf8, split_in_three

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BoxedImage:
    """An image and its boxes.

    Attributes:
        path: of the file.
        size: height and width in pixels as it is shown, with its EXIF orientation applied.
        boxes: ``(N, 4)`` float32: x1, y1, x2, y2 in pixels of the shown image.
        labels: ``(N,)`` int64, indices into the data set's classes.
        ignored: ``(N,)`` bool: COCO's ``iscrowd``, VOC's ``difficult``: not trained on, and not
            counted in evaluation.
    """

    path: str
    size: tuple[int, int]
    boxes: np.ndarray
    labels: np.ndarray
    ignored: np.ndarray


@dataclass(frozen=True)
class LabelledBoxes(ListDataset[BoxedImage]):
    """Classes and the three parts; nothing is ever chosen on the test part.

    Attributes:
        classes: names.
        train: to train on; sorted by path, as the others.
        val: to choose by; empty only where there is one training image.
        test: to report on; empty only where the caller asked for no test part.
        repairs: what was repaired or left out, such as ``{"box without area, left out": 2}``.
    """

    repairs: dict[str, int]

    def subsample(
        self, fraction: float | None = None, shots: int | None = None, seed: int = 0
    ) -> Self:
        some = super().subsample(fraction, shots, seed)
        if fraction is not None:
            _check(some, f"--fraction {fraction}", "take a larger share")
        return some

    def without(
        self, left_out: Mapping[str, Collection[str]], broken: Mapping[str, Mapping[str, str]]
    ) -> Self:
        left = super().without(left_out, broken)
        if broken.get("train") and all(one.ignored.all() for one in left.train):
            path, why = next(iter(broken["train"].items()))
            raise UserError(f"no training image with boxes can be read, the first {path} ({why})")
        return left

    def write_split(self, run: Path) -> None:
        self.write(run / "split")

    def write(self, folder: Path) -> None:
        """Write down the splits in COCO's format: a folder that can be given as data again.

        Args:
            folder: gets ``train.json``, ``val.json`` and ``test.json``, with absolute file names;
                made if missing.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for name in SPLITS:
            content = json.dumps(_as_coco(self.classes, getattr(self, name)))
            (folder / f"{name}.json").write_text(content, encoding="utf-8")


def load_boxes(
    source: StrPath,
    annotations: StrPath | None = None,
    seed: int = 0,
    need_test: bool = True,
) -> LabelledBoxes:
    """Read a detection data set.

    Boxes and images that can't be used are left out, others are cleaned; each kind of repair is
    counted, and logged with its first file. VOC's coordinates count from 1, unless a coordinate of
    0 shows that the tool which wrote the set counts from 0.

    Args:
        source: a folder in one of the usual layouts, found out by looking:

            - COCO: JSON files whose names tell the split in ``annotations/`` or at the top, or one
              file in each of the folders ``train``, ``valid`` and ``test``, or a single file; the
              images anywhere below.
            - Pascal VOC: XML files in ``Annotations`` or beside the images, with the splits in
              ``ImageSets/Main/{train,val,test}.txt`` or in the folders' names.
            - YOLO: a ``data.yaml`` at the top, text files in ``labels`` beside ``images``.

            Or COCO's ``.json`` or YOLO's ``.yaml`` file itself. With ``annotations``, the folder of
            the images, searched recursively.
        annotations: a COCO ``.json`` file, or a folder of such files for each split, of VOC's
            ``.xml`` files, or of YOLO's ``.txt`` files, where a ``classes.txt`` names the classes.
        seed: of the validation part, where the annotations name none.
        need_test: whether missing test images are an error.

    Returns:
        The parts. Without splits in the annotations a 60/20/20 split by chance is made; without a
        validation part, 20 % of the training part becomes one. An image of several parts is left
        in the last of them: what is trained on is not tested on.

    Raises:
        UserError: nothing there, more than one format, a damaged file, no test images, or no box
            to train on.
    """
    source = Path(source)
    repairs = RepairLog()
    found = read_annotations(source, None if annotations is None else Path(annotations), repairs)
    classes = list(dict.fromkeys(found.classes))
    for name in classes:
        if not is_utf8(name):  # it goes into models, tables and pictures
            raise UserError(f"{source}: the name of the class {name!a} is not text in UTF-8")
    numbers = {name: index for index, name in enumerate(classes)}
    splits, by_image = _sort(found.notes, source, repairs)
    images: dict[str | None, list[BoxedImage]] = defaultdict(list)
    for path in sorted(by_image):
        cleaned = clean(by_image[path], numbers, repairs)
        if cleaned is not None:
            images[splits[path]].append(BoxedImage(path, *cleaned))
    repairs.report()
    if not any(images.values()):
        raise UserError(
            f"{source}: of {found.named} images that its annotations name none is "
            f"there and readable; give the folder of the images as the data, and "
            f"--annotations"
        )
    parts = _parts(images, source, seed, need_test)
    data = LabelledBoxes(classes, **parts, repairs=repairs.counts)
    _check(data, str(source), "draw some, or name the annotations with --annotations")
    return data


def _sort(
    notes: list[Note], source: Path, repairs: RepairLog
) -> tuple[dict[str, str | None], dict[str, list[Note]]]:
    """The split of each image, and its notes in that split."""
    named = sorted({note.split for note in notes if note.split is not None})
    if named and "train" not in named:
        raise UserError(
            f"{source} has images of {' and '.join(named)}, but none to train on that "
            f"could be found: add annotations and images of train"
        )
    splits: dict[str, str | None] = {}
    by_image: dict[str, list[Note]] = defaultdict(list)
    for note in sorted(notes, key=lambda note: (*SPLITS, None).index(note.split)):
        if named and note.split is None:
            repairs.add("image of no split, left out", note.image)
            continue
        if splits.setdefault(note.image, note.split) != note.split:
            repairs.add("image of two splits, left out of the first", note.image)
            splits[note.image] = note.split
            by_image[note.image].clear()
        by_image[note.image].append(note)
    return splits, by_image


def _parts(
    images: dict[str | None, list[BoxedImage]], source: Path, seed: int, need_test: bool
) -> dict[str, list[BoxedImage]]:
    """The three parts, made here as far as the annotations do not name them."""
    if images[None]:
        parts = split_in_three(images[None])
        if need_test and not parts["test"]:
            raise UserError(
                f"{source} has {len(images[None])} images with annotations: three are "
                f"needed to train, validate and test"
            )
        return parts
    parts = {split: images[split] for split in SPLITS}
    if not parts["train"]:
        raise UserError(
            f"{source} has no train images that are not in val or test too, or none "
            f"that can be read"
        )
    if need_test and not parts["test"]:
        raise UserError(
            f"{source} has no test images with annotations: add some (COCO: test.json, VOC: "
            f"ImageSets/Main/test.txt, YOLO: test in data.yaml), or give annotations without "
            f"splits to have them split"
        )
    if not parts["val"]:
        parts["train"], parts["val"] = hold_out(parts["train"], seed)
    return parts


def _check(data: LabelledBoxes, source: str, remedy: str) -> None:
    """Raise if there is nothing to train on; warn of classes that can't be learned."""
    seen: dict[str, set[int]] = {
        split: {int(n) for one in getattr(data, split) for n in one.labels[~one.ignored]}
        for split in SPLITS
    }
    if not seen["train"]:
        raise UserError(
            f"{source} has no boxes to train on in {len(data.train)} train images: {remedy}"
        )
    for split in ("val", "test"):
        for number in sorted(seen[split] - seen["train"]):
            log.warning(
                "the class %(class)s has boxes in %(split)s, none in train",
                {"class": data.classes[number], "split": split},
                extra={"code": "class.untrained"},
            )


def _as_coco(classes: list[str], images: list[BoxedImage]) -> dict[str, list[dict[str, object]]]:
    """The content of a file in COCO's format."""
    listed: list[dict[str, object]] = []
    notes: list[dict[str, object]] = []
    for number, one in enumerate(images, start=1):
        name, (height, width) = str(Path(one.path).absolute()), one.size
        listed.append({"id": number, "file_name": name, "height": height, "width": width})
        for box, label, ignored in zip(
            one.boxes.tolist(), one.labels.tolist(), one.ignored.tolist(), strict=True
        ):
            x1, y1, x2, y2 = box
            notes.append(
                {
                    "id": len(notes) + 1,
                    "image_id": number,
                    "category_id": label + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],  # exact, and so is the way back
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": int(ignored),
                }
            )
    categories: list[dict[str, object]] = [
        {"id": number, "name": name} for number, name in enumerate(classes, start=1)
    ]
    return {"images": listed, "annotations": notes, "categories": categories}
