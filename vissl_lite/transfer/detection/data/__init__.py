"""Detection data sets: reading COCO, Pascal VOC and YOLO, cleaning, and splitting."""

import json
import logging
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Self

import numpy as np

from vissl_lite.data.archives import is_archive, unpack
from vissl_lite.errors import UserError
from vissl_lite.options import StrPath
from vissl_lite.transfer.dataset import ListDataset
from vissl_lite.transfer.detection.data.annotations import ImageAnnotation
from vissl_lite.transfer.detection.data.cleaning import clean
from vissl_lite.transfer.detection.data.discovery import read_annotations
from vissl_lite.transfer.options import DEFAULT_SOURCE, SourceOptions
from vissl_lite.transfer.sources.groups import find_groups
from vissl_lite.transfer.sources.parts import PARTS, Split, complete_parts, rarest_classes
from vissl_lite.transfer.sources.reading_log import ReadingLog
from vissl_lite.transfer.sources.shapes import Shape, as_coco, draw_shape
from vissl_lite.transfer.sources.tables import check_fold, is_utf8

log = logging.getLogger(__name__)

BOX_ONLY = "object without a shape, whose box alone is used"


@dataclass(frozen=True)
class BoxedImage:
    """An image and its boxes.

    Attributes:
        path: Path of the image file.
        size: Height and width in pixels, after applying the EXIF orientation.
        boxes: Array ``(N, 4)`` float32 of x1, y1, x2, y2 in pixels, after applying the EXIF
            orientation.
        labels: Array ``(N,)`` int64 of indices into the classes of the data set.
        ignored: Array ``(N,)`` bool of COCO's ``iscrowd`` or VOC's ``difficult``. Such boxes are
            not trained on and do not count in evaluation.
        shapes: Polygons or run lengths of the N objects in pixels, after applying the EXIF
            orientation; None for objects that have a box only. Empty unless shapes were asked for.
    """

    path: str
    size: tuple[int, int]
    boxes: np.ndarray
    labels: np.ndarray
    ignored: np.ndarray
    shapes: tuple[Shape | None, ...] = ()

    @property
    def has_shape(self) -> np.ndarray:
        """Array ``(N,)`` bool that tells which objects have a shape."""
        shapes = self.shapes or (None,) * len(self.boxes)
        return np.array([shape is not None for shape in shapes], bool)

    def mask(self, index: int, size: tuple[int, int] | None = None) -> np.ndarray:
        """Draw the shape of an object.

        Args:
            index: Index of an object that has a shape.
            size: Height and width to draw it at; default those of the image.

        Returns:
            ``(H, W)`` uint8 of 0 and 1.
        """
        shape, mask = self.shapes[index], np.zeros(size or self.size, np.uint8)
        if shape is not None:
            draw_shape(mask, shape, self.size)
        return mask


@dataclass(frozen=True)
class LabelledBoxes(ListDataset[BoxedImage]):
    """Detection data set with three splits, each sorted by path.

    Attributes:
        classes: Class names.
        train: Training images.
        val: Validation images, for model selection; empty only if there is one training image, or
            if missing parts were not made.
        test: Test images, never used for selection; empty only if missing parts were not made.
        with_shapes: Whether objects have shapes, for instance segmentation.
    """

    with_shapes: bool = False

    def class_counts(self, part: Split) -> np.ndarray:
        labels = [one.labels[~one.ignored] for one in self.part(part)]
        joined = np.concatenate([np.empty(0, np.int64), *labels])
        return np.bincount(joined, minlength=len(self.classes))

    def subsample(
        self, fraction: float | None = None, shots: int | None = None, seed: int = 0
    ) -> Self:
        some = super().subsample(fraction, shots, seed)
        if fraction is not None:
            _check_boxes(some, f"--fraction {fraction}", "use a larger fraction")
            if self.with_shapes:
                _check_shapes(some, f"what --fraction {fraction} takes")
        return some

    def without(
        self, left_out: Mapping[str, Collection[str]], broken: Mapping[str, Mapping[str, str]]
    ) -> Self:
        left = super().without(left_out, broken)
        if broken.get("train") and all(one.ignored.all() for one in left.train):
            path, why = next(iter(broken["train"].items()))
            raise UserError(f"no training image with boxes can be read, the first {path} ({why})")
        return left

    def identity(self) -> list[str]:
        digest = blake2b(digest_size=16)
        for name in PARTS:
            for one in self.part(name):
                digest.update(repr((len(one.boxes), one.shapes)).encode())
                for array in (one.boxes, one.labels, one.ignored):
                    digest.update(array.tobytes())
        return [*super().identity(), digest.hexdigest()]

    def write_split(self, run: Path) -> None:
        self.write(run / "split")

    def write(self, folder: Path) -> None:
        """Write the splits in COCO's format, to a folder that ``load_boxes`` can read again.

        Args:
            folder: Folder for ``train.json``, ``val.json`` and ``test.json``, which hold absolute
                file names, and groups if there are any. It is created if missing.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for name in PARTS:
            content = json.dumps(
                as_coco_content(self.classes, self.part(name), self.reading.groups)
            )
            (folder / f"{name}.json").write_text(content, encoding="utf-8")


def load_boxes(
    source: StrPath,
    annotations: StrPath | None = None,
    seed: int = 0,
    complete: bool = True,
    options: SourceOptions = DEFAULT_SOURCE,
    with_shapes: bool = False,
) -> LabelledBoxes:
    """Read a detection data set.

    Invalid boxes and images are repaired or left out; repairs are counted per kind, and logged with
    the first file. VOC's coordinates count from 1, unless a coordinate of 0 shows that the tool
    that wrote the annotations counts from 0.

    Args:
        source: Folder in one of these layouts, which is detected automatically:

            - COCO: JSON files named by split in ``annotations/`` or at the top, or one file in each
              of the folders ``train``, ``valid`` and ``test``, or a single file. The images may be
              anywhere below.
            - Pascal VOC: XML files in ``Annotations`` or next to the images, with the splits in
              ``ImageSets/Main/{train,val,test}.txt`` or in the names of folders.
            - YOLO: a ``data.yaml`` or Darknet's ``obj.data`` at the top, or only text files in
              ``labels`` next to ``images``, or beside the images.
            - CVAT's ``annotations.xml``, LabelMe's JSON files, or tables with a row for each box.

            Or a file of annotations itself, or an archive of such a folder. With ``annotations``,
            the folder of the images, searched recursively.
        annotations: File of annotations, or a folder of them.
        seed: Seed for holding out validation images, if the annotations name none.
        complete: Whether missing validation and test parts are made.
        options: How tables are read.
        with_shapes: Whether the shapes of objects are read, too: polygons of COCO, YOLO, LabelMe
            and CVAT, and run lengths of COCO. Objects that have a box only are counted.

    Returns:
        The data set. Missing parts are made if ``complete``, see ``complete_parts``. An image
        listed in several splits is kept only in the last of train, val and test, so that no test
        image is trained on.

    Raises:
        UserError: If there are no annotations, annotations in more than one format, a damaged
            file, no test images, no boxes to train on, or a part without shapes that are wanted.
    """
    source = Path(source)
    reading = ReadingLog(str(source))
    if is_archive(source):
        source = unpack(source)
    given = None if annotations is None else Path(annotations)
    found = read_annotations(source, given, options, reading, with_shapes)
    check_fold(options, reading)
    classes = list(dict.fromkeys(found.classes))
    for name in classes:
        if not is_utf8(name):  # names are written to models, tables and figures
            raise UserError(f"{source}: the name of the class {name!a} is not text in UTF-8")
    class_indices = {name: index for index, name in enumerate(classes)}
    splits, by_image = _group_by_image(found.images, reading)
    images: dict[Split | None, list[BoxedImage]] = defaultdict(list)
    for path in sorted(by_image):
        cleaned = clean(by_image[path], class_indices, reading)
        if cleaned is not None:
            if not with_shapes:
                cleaned = cleaned._replace(shapes=())
            one = BoxedImage(path, *cleaned)
            if with_shapes:
                reading.add(BOX_ONLY, path, np.count_nonzero(~one.has_shape & ~one.ignored))
            images[splits[path]].append(one)
    if not any(images.values()):
        raise UserError(
            f"{source}: none of the {found.num_listed} images in its annotations exists "
            f"and is readable; give the folder of the images with --data, and the "
            f"annotations with --annotations"
        )
    groups = find_groups(sorted(by_image), [source], options.group_by, reading)
    parts = complete_parts(images, _rarest_labels, False, seed, reading, groups, complete)
    data = LabelledBoxes(classes, **parts, reading=reading, with_shapes=with_shapes)
    reading.report()
    if complete:
        if with_shapes:
            _check_shapes(data, str(source))
        _check_boxes(data, str(source), "add some, or give the annotations with --annotations")
    return data


def _rarest_labels(images: Sequence[BoxedImage]) -> np.ndarray:
    """A stratum for each image: its class that the fewest images have."""
    return rarest_classes([one.labels.tolist() for one in images])


def _group_by_image(
    annotations: list[ImageAnnotation], reading: ReadingLog
) -> tuple[dict[str, Split | None], dict[str, list[ImageAnnotation]]]:
    """Return the split of each image, and its annotations in that split."""
    splits: dict[str, Split | None] = {}
    by_image: dict[str, list[ImageAnnotation]] = defaultdict(list)
    for annotation in sorted(annotations, key=lambda one: (*PARTS, None).index(one.split)):
        if splits.setdefault(annotation.image, annotation.split) != annotation.split:
            if annotation.split is None:
                reading.add("image without a part, left out", annotation.image)
                continue
            reading.add("image of two splits, left out of the first", annotation.image)
            splits[annotation.image] = annotation.split
            by_image[annotation.image].clear()
        by_image[annotation.image].append(annotation)
    return splits, by_image


def _check_boxes(data: LabelledBoxes, source: str, remedy: str) -> None:
    """Raise a UserError if there are no training boxes; warn about classes without any."""
    occurring = {part: set(np.flatnonzero(data.class_counts(part)).tolist()) for part in PARTS}
    if not occurring["train"]:
        raise UserError(
            f"{source} has no boxes to train on in {len(data.train)} train images: {remedy}"
        )
    made: tuple[Split, ...] = ("val", "test")
    for split in made:
        for number in sorted(occurring[split] - occurring["train"]):
            log.warning(
                "the class %(class)s has boxes in %(split)s, but none in train",
                {"class": data.classes[number], "split": split},
                extra={"code": "class.untrained"},
            )


def _check_shapes(data: LabelledBoxes, source: str) -> None:
    """Raise a UserError if a part has objects, but none with a shape."""
    for name in PARTS:
        images = [one for one in data.part(name) if (~one.ignored).any()]
        if images and not any((one.has_shape & ~one.ignored).any() for one in images):
            raise UserError(
                f"{source} has boxes, but no shapes of objects in {len(images)} {name} images, the "
                f"first {images[0].path}: --detector mask_rcnn needs polygons (of COCO, YOLO, "
                f"LabelMe or CVAT) or run lengths (of COCO); or give --detector faster_rcnn"
            )


def as_coco_content(
    classes: list[str], images: list[BoxedImage], groups: Mapping[str, str]
) -> dict[str, list[dict[str, object]]]:
    """Convert images to the content of a file in COCO's format.

    Args:
        classes: Names of all classes.
        images: Images with their boxes.
        groups: Groups by path of the image, written to a key ``group``.
    """
    listed: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for number, one in enumerate(images, start=1):
        name, (height, width) = str(Path(one.path).absolute()), one.size
        group = {"group": groups[one.path]} if one.path in groups else {}
        size: dict[str, object] = {"height": height, "width": width}
        listed.append({"id": number, "file_name": name, **size, **group})
        shapes = one.shapes or (None,) * len(one.boxes)
        for box, label, ignored, shape in zip(
            one.boxes.tolist(), one.labels.tolist(), one.ignored.tolist(), shapes, strict=True
        ):
            x1, y1, x2, y2 = box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": label + 1,
                    "bbox": [
                        x1,
                        y1,
                        x2 - x1,
                        y2 - y1,
                    ],  # not rounded, so that reading gives the same boxes
                    "area": (x2 - x1) * (y2 - y1) if shape is None else shape.area,
                    "iscrowd": int(ignored),
                    **({} if shape is None else {"segmentation": as_coco(shape, one.size)}),
                }
            )
    categories: list[dict[str, object]] = [
        {"id": number, "name": name} for number, name in enumerate(classes, start=1)
    ]
    return {"images": listed, "annotations": annotations, "categories": categories}
