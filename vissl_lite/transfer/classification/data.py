"""Labelled images for classification: class folders or a CSV file, and their splits."""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np

from vissl_lite.data.text_file import csv_writer
from vissl_lite.errors import UserError, brief, check_count, check_positive_share
from vissl_lite.transfer.classification.discovery import find_labels, how_read
from vissl_lite.transfer.classification.labels import FoundImage, FoundLabels
from vissl_lite.transfer.classification.options import DEFAULT_LABELS, LabelOptions
from vissl_lite.transfer.classification.tables import (
    LABEL_SEPARATORS,
    SEPARATORS,
)
from vissl_lite.transfer.dataset import LabelledDataset
from vissl_lite.transfer.sources.file_tree import MASK_FOLDERS
from vissl_lite.transfer.sources.groups import find_groups, group_names
from vissl_lite.transfer.sources.opening import unpacked
from vissl_lite.transfer.sources.parts import (
    PARTS,
    Split,
    complete_parts,
    draw_groups,
    fold_numbers,
    part_of_file,
    part_of_name,
    rarest_classes,
    shuffled_classes,
    take_share,
)
from vissl_lite.transfer.sources.reading_log import ReadingLog
from vissl_lite.transfer.sources.tables import group_column

# Cells of a table of images and classes, eight bytes each.
MAX_TABLE_CELLS = 2**29

# Share of the largest class from which the classes are called imbalanced.
IMBALANCED = 0.95


@dataclass(frozen=True)
class Part:
    """One part of a labelled data set.

    Attributes:
        paths: Image files.
        labels: Where each image has one class, ``(N,)`` int64, indices into the data set's
            classes; where it may have several or none (multi-label), ``(N, K)`` int64: 1 for each
            class that an image has, else 0.
        weights: ``(N,)`` float32 weights of the images in the training loss; None for 1.
    """

    paths: list[str]
    labels: np.ndarray
    weights: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: np.ndarray) -> "Part":
        """A copy of the part with the images of these indices, ascending."""
        indices = np.sort(indices)
        weights = None if self.weights is None else self.weights[indices]
        return Part([self.paths[i] for i in indices], self.labels[indices], weights)

    def image_weights(self) -> np.ndarray:
        """``(N,)`` float32 weights of the images in the training loss."""
        return np.ones(len(self), np.float32) if self.weights is None else self.weights


@dataclass(frozen=True)
class LabelledImages(LabelledDataset):
    """Classes and three parts; the test part is never used for selection.

    Attributes:
        classes: K names, sorted.
        train, val: May lose labels to ``subsample``.
        test: Empty only where the caller asked for no test part.
    """

    classes: list[str]
    train: Part
    val: Part
    test: Part
    reading: ReadingLog

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several classes, or none."""
        return self.train.labels.ndim == 2

    def sampling_units(self) -> np.ndarray | None:
        return super().sampling_units() if self.multi_label else self.groups("test")

    def write(self, file: Path) -> None:
        """Write the splits, and groups if there are any, to a CSV file that ``--data`` accepts.

        One class an image goes into a column ``label`` (``class``, where a name would be split),
        several into a column ``labels``, or into a column for each class where that could not be
        read back: a name has a separator in it, or no image has the class.
        """
        columns = self._label_columns()
        with csv_writer(file) as rows:
            groups = self.reading.groups
            rows.writerow(["path", *columns, *([group_column(columns)] if groups else []), "split"])
            for name in PARTS:
                part: Part = getattr(self, name)
                for path, label in zip(part.paths, part.labels, strict=True):
                    if not self.multi_label:
                        cells = [self.classes[label]]
                    elif columns == ["labels"]:
                        cells = ["|".join(self.classes[i] for i in np.flatnonzero(label))]
                    else:
                        cells = label.tolist()
                    cells += [groups.get(path, "")] if groups else []
                    rows.writerow([Path(path).absolute(), *cells, name])

    def write_split(self, run: Path) -> None:
        self.write(run / "split.csv")

    def part(self, name: Split) -> Part:
        """A part by name."""
        return {"train": self.train, "val": self.val, "test": self.test}[name]

    def paths(self, part: Split) -> list[str]:
        return self.part(part).paths

    def class_counts(self, part: Split) -> np.ndarray:
        labels = self.part(part).labels
        return (
            labels.sum(0) if self.multi_label else np.bincount(labels, minlength=len(self.classes))
        )

    def take(self, kept: Mapping[Split, Sequence[int]]) -> Self:
        train, val, test = (
            self.part(name).take(np.array(kept[name], np.int64))
            if name in kept
            else self.part(name)
            for name in PARTS
        )
        return replace(self, train=train, val=val, test=test)

    def subsample(
        self, fraction: float | None = None, shots: int | None = None, seed: int = 0
    ) -> Self:
        """A seeded, stratified subset of the training and validation labels.

        A smaller amount is always contained in a larger one of the same seed.

        Args:
            fraction: Share of each class in (0, 1]; at least one image of each, or one group. With
                several labels per image, where no class has images to itself, share of the images.
            shots: Images per class, instead.
            seed: Seed of the choice.

        Raises:
            UserError: Both are given, a number is out of range, or shots with several labels an
                image.
        """
        if fraction is None and shots is None:
            return self
        if fraction is not None and shots is not None:
            raise UserError("give --fraction or --shots, not both")
        check_positive_share("fraction", fraction)
        check_count("shots", shots)
        if shots is not None and self.multi_label:
            raise UserError(
                f"--shots {shots} counts images of one class each, but here an image "
                f"has several labels: give --fraction"
            )

        def some(part: Part, groups: np.ndarray | None) -> Part:
            if self.multi_label:
                return part.take(np.array(take_share(len(part), fraction, seed, groups), np.int64))
            if fraction is not None and groups is not None:
                return part.take(draw_groups(part.labels, groups, fraction, seed))
            chosen = [
                members[
                    : shots if shots is not None else max(1, round(len(members) * (fraction or 1)))
                ]
                for members in shuffled_classes(part.labels, seed)
            ]
            return part.take(np.concatenate(chosen)) if chosen else part

        train, val = some(self.train, self.groups("train")), some(self.val, self.groups("val"))
        return replace(self, train=train, val=val)

    def merged(self) -> Self:
        return replace(self, train=self._all(), val=self.train.take(np.empty(0, np.int64)))

    def hold_out(self, indices: Sequence[int]) -> Self:
        kept = np.setdiff1d(np.arange(len(self.train)), indices)
        return replace(
            self,
            train=self.train.take(kept),
            val=self.train.take(np.array(indices, np.int64)),
            reading=self.reading.with_val_from_train(),
        )

    def with_train(self, other: Self) -> Self:
        one, more = self.train, other.train
        weights = None
        if one.weights is not None or more.weights is not None:
            weights = np.concatenate([one.image_weights(), more.image_weights()])
        labels = np.concatenate([one.labels, more.labels])
        return replace(self, train=Part([*one.paths, *more.paths], labels, weights))

    def folds(self, count: int, seed: int = 0) -> list[Self]:
        everything = self._all()
        labels = everything.labels
        strata = (
            rarest_classes([np.flatnonzero(row).tolist() for row in labels])
            if self.multi_label
            else labels
        )
        groups = group_names(everything.paths, self.reading.groups)
        numbers = fold_numbers(strata, count, seed, groups)
        count = count if groups is None else int(numbers.max()) + 1
        if count < 2:
            return [self]
        return [
            replace(
                self,
                train=everything.take(np.flatnonzero(numbers != fold)),
                val=everything.take(np.flatnonzero(numbers == fold)),
            )
            for fold in range(count)
        ]

    def _all(self) -> Part:
        """Training and validation images."""
        paths = self.train.paths + self.val.paths
        return Part(paths, np.concatenate([self.train.labels, self.val.labels]))

    def without(
        self, left_out: Mapping[str, Collection[str]], broken: Mapping[str, Mapping[str, str]]
    ) -> Self:
        left = super().without(left_out, broken)
        gone = broken.get("train", {})
        for number, name in enumerate(() if self.multi_label else self.classes):
            members = np.flatnonzero(self.train.labels == number).tolist()
            paths = [self.train.paths[i] for i in members]
            if paths and gone.keys() >= set(paths):
                raise UserError(
                    f"none of {len(paths)} training images of the class {name} can be "
                    f"read, the first {paths[0]} ({gone[paths[0]]})"
                )
        changed = any(map(len, left_out.values())) or any(map(len, broken.values()))
        if changed and self.multi_label and not has_both(left.test.labels).any():
            cause = "--leaks exclude leaves" if left_out.get("test") else "what can be read has"
            raise UserError(
                f"{cause} no class that some test images have and some have not, so that no score "
                f"can be given: more test images are needed"
            )
        return left

    def image_classes(self, part: Split) -> np.ndarray | None:
        return None if self.multi_label else self.part(part).labels

    def identity(self) -> list[str]:
        labels = [str(self.part(name).labels.tolist()) for name in PARTS]
        return [*super().identity(), *labels]

    def _label_columns(self) -> list[str]:
        separators = SEPARATORS if self.multi_label else LABEL_SEPARATORS
        divisible = any(re.search(separators, name) for name in self.classes)
        if not self.multi_label:
            return ["class" if divisible else "label"]
        seen = np.concatenate([getattr(self, name).labels for name in PARTS]).any(axis=0)
        return self.classes if divisible or not seen.all() else ["labels"]


def load_labelled(
    source: str | Path,
    seed: int = 0,
    complete: bool = True,
    multi_label: bool = False,
    options: LabelOptions = DEFAULT_LABELS,
) -> LabelledImages:
    """Read a labelled data set.

    The class of an image is the name of its folder, or stands in a table (CSV, TSV, JSON Lines, or
    a text file of paths and labels), whose columns are found by their usual names or content.

    Several labels per image (multi-label) come in a table: in a column ``labels`` or ``tags``,
    names separated by ``|``, ``;``, ``,`` or spaces; in a column ``label`` in which some value has
    ``|`` or ``;``; or in a column for each class that holds 0 or 1 (false or true, empty for 0)
    alone, unless each image has exactly one.

    Args:
        source: A folder of class folders, below folders of parts or with folders of parts in them;
            a folder of images with a table in it; or a table. docs/data.md lists the layouts.
        seed: Seed of the parts that are made here.
        complete: Whether missing validation and test parts are made.
        multi_label: Whether the caller can take several labels per image.
        options: Columns, levels of folders, and so on.

    Returns:
        The parts, each sorted by path.

    Raises:
        UserError: Nothing there, one class only, a class in a part that the training part lacks, or
            several labels per image where one is needed.
    """
    source = Path(source)
    if not os.path.exists(source):
        raise UserError(f"{brief(source)} does not exist")
    reading = ReadingLog(str(source))
    opened = unpacked(source)
    found = find_labels(opened, options, reading)
    if found.multi_label and not multi_label:
        raise UserError(
            f"{source} has several labels per image ({reading.label}): give finetune such data; "
            f"here each image needs one, in a column class"
        )
    given: dict[Split | None, list[FoundImage]] = {}
    for image in sorted(found.images, key=lambda one: one.path):
        given.setdefault(image.part, []).append(image)
    numbers = {name: i for i, name in enumerate(sorted({n for i in found.images for n in i.names}))}

    def strata(images: Sequence[FoundImage]) -> np.ndarray:
        sets = [[numbers[name] for name in one.names] for one in images]
        return rarest_classes(sets) if found.multi_label else np.array(sets, np.int64)[:, 0]

    groups = find_groups([one.path for one in found.images], [opened], options.group_by, reading)
    parts = complete_parts(given, strata, not found.multi_label, seed, reading, groups, complete)
    classes = _classes(reading, found, parts)
    train, val, test = (_numbered(parts[name], classes, found.multi_label) for name in PARTS)
    if complete and len(test) == 0:
        raise UserError(
            f"{source} has no test images: each class has one image only, so that none can be "
            f"held out; give a part test, or more images"
        )
    if complete and found.multi_label and not has_both(test.labels).any():
        raise UserError(
            f"{source}: of no class are there test images with it and without it, so "
            f"that no score can be given: more test images are needed{how_read(reading)}"
        )
    data = LabelledImages(classes, train, val, test, reading)
    _warn_of_classes(data)
    reading.report()
    return data


def _warn_of_classes(data: LabelledImages) -> None:
    """Warn of class names and counts that look wrong."""
    odd = [name for name in data.classes if part_of_name(name) is not None]
    near = [name for name in data.classes if part_of_file(name.rpartition("/")[2]) is not None]
    odd = near if 2 * len(near) >= len(data.classes) else odd
    masks = [name for name in data.classes if name.lower() in MASK_FOLDERS]
    if odd or masks:
        kind = "a part of the data" if odd else "a folder of masks or annotations"
        data.reading.warn(
            "data.class_names",
            f"The class {(odd or masks)[0]} is named like {kind}: are the classes of "
            f"{data.reading.source} really {brief(', '.join(data.classes))}?",
        )
    counts = data.class_counts("train")
    if not data.multi_label and len(data.train) and counts.max() >= IMBALANCED * len(data.train):
        data.reading.warn(
            "data.imbalance",
            f"{counts.max()} of {len(data.train)} training images have the class "
            f"{data.classes[int(counts.argmax())]}: always predicting it is hard to beat in "
            f"accuracy, so look at macro F1 and the accuracy per class",
        )


def has_both(labels: np.ndarray) -> np.ndarray:
    """Whether some images have a class and others do not, ``(K,)`` bool.

    Args:
        labels: ``(N, K)`` of 0 and 1.
    """
    return np.asarray(labels.any(axis=0) & ~labels.all(axis=0))


_Named = list[FoundImage]


def _classes(reading: ReadingLog, found: FoundLabels, parts: Mapping[Split, _Named]) -> list[str]:
    """The names of all classes, sorted."""
    names = {part: {n for one in images for n in one.names} for part, images in parts.items()}
    if found.multi_label:  # a class may be missing from training, as chance splits such data
        classes = sorted(set(found.classes).union(*names.values()))
        if not classes:
            raise UserError(f"{reading.source} names no class: the labels of all images are empty")
        return classes
    classes = sorted(names["train"])
    if len(classes) < 2:
        raise UserError(
            f"{reading.source} has one class only ({classes[0]}): two or more are needed"
            f"{how_read(reading)}"
        )
    for part in PARTS:
        unknown = sorted(names[part] - set(classes))
        if unknown:
            known = brief(", ".join(map(repr, classes)))
            raise UserError(
                f"{reading.source}: the {part} images have the class {unknown[0]!r}, which no "
                f"training image has; those have {known}: correct the name, or add training images"
            )
    return classes


def _numbered(images: _Named, classes: list[str], multi_label: bool) -> Part:
    number = {name: index for index, name in enumerate(classes)}
    paths = [one.path for one in images]
    if not multi_label:
        return Part(paths, np.array([number[one.names[0]] for one in images], np.int64))
    if len(images) * len(classes) > MAX_TABLE_CELLS:
        raise UserError(
            f"{len(images)} images with {len(classes)} classes, of which each may have "
            f"any, are more than the memory holds: give fewer classes"
        )
    labels = np.zeros((len(images), len(classes)), np.int64)
    for row, one in enumerate(images):
        labels[row, [number[name] for name in one.names]] = 1
    return Part(paths, labels)
