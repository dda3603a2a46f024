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
from vissl_lite.transfer.base import PARTS, LabelledDataset, Split
from vissl_lite.transfer.classification.files import (
    LABEL_SEPARATORS,
    SEPARATORS,
    FoundLabels,
    read_csv,
    read_folder,
)
from vissl_lite.transfer.sources import TEST_SHARE, VAL_SHARE, hold_out, split_in_three, take_share

# Cells of a table of images and classes, eight bytes each.
MAX_TABLE_CELLS = 2**29


@dataclass(frozen=True)
class Part:
    """One part of a labelled data set.

    Attributes:
        paths: Image files.
        labels: Where each image has one class, ``(N,)`` int64, indices into the data set's
            classes; where it may have several or none (multi-label), ``(N, K)`` int64: 1 for each
            class that an image has, else 0.
    """

    paths: list[str]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: np.ndarray) -> "Part":
        """A copy of the part with the images of these indices, ascending."""
        indices = np.sort(indices)
        return Part([self.paths[i] for i in indices], self.labels[indices])


@dataclass(frozen=True)
class LabelledImages(LabelledDataset):
    """Classes and three parts; the test part is never used for selection.

    Attributes:
        classes: K names, sorted.
        train, val: May lose labels to ``subsample``.
        test: Empty only where the caller asked for no test part.
        note: Message about how the labels were read; usually empty.
    """

    classes: list[str]
    train: Part
    val: Part
    test: Part
    note: str = ""

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several classes, or none."""
        return self.train.labels.ndim == 2

    def write(self, file: Path) -> None:
        """Write the splits to a CSV file that ``--data`` accepts.

        One class an image goes into a column ``label`` (``class``, where a name would be split),
        several into a column ``labels``, or into a column for each class where that could not be
        read back: a name has a separator in it, or no image has the class.
        """
        columns = self._label_columns()
        with csv_writer(file) as rows:
            rows.writerow(["path", *columns, "split"])
            for name in PARTS:
                part: Part = getattr(self, name)
                for path, label in zip(part.paths, part.labels, strict=True):
                    if not self.multi_label:
                        cells = [self.classes[label]]
                    elif columns == ["labels"]:
                        cells = ["|".join(self.classes[i] for i in np.flatnonzero(label))]
                    else:
                        cells = label.tolist()
                    rows.writerow([Path(path).absolute(), *cells, name])

    def write_split(self, run: Path) -> None:
        self.write(run / "split.csv")

    def part(self, name: Split) -> Part:
        """A part by name."""
        return {"train": self.train, "val": self.val, "test": self.test}[name]

    def paths(self, part: Split) -> list[str]:
        return self.part(part).paths

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
            fraction: Share of each class in (0, 1]; at least one image of each. With several labels
                an image, where no class has images to itself, share of the images.
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

        def some(part: Part) -> Part:
            if self.multi_label:
                return part.take(np.array(take_share(range(len(part)), fraction, seed), np.int64))
            chosen = [
                members[
                    : shots if shots is not None else max(1, round(len(members) * (fraction or 1)))
                ]
                for members in _shuffled_classes(part.labels, seed)
            ]
            return part.take(np.concatenate(chosen)) if chosen else part

        return replace(self, train=some(self.train), val=some(self.val))

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
    need_test: bool = True,
    need_val: bool = True,
    multi_label: bool = False,
) -> LabelledImages:
    """Read a labelled data set.

    Several labels per image (multi-label) come in a CSV file: in a column ``labels``, names
    separated by ``|``, ``;`` or ``,`` (none where it is empty); in a column ``label`` in which
    some value has ``|`` or ``;``; or, without such a column, in a column for each class that
    holds 0 or 1 (false or true, empty for 0) alone.

    Args:
        source: A folder ``train/<class>/*`` with ``test/`` and optionally ``val/``; or plain class
            folders; or a CSV file with the columns ``path`` and ``label``, and optionally
            ``split`` (train, val, test), paths relative to the file. Without splits a seeded,
            stratified 60/20/20 split is made; without a validation part, 20 % of the training part
            becomes one. With several labels per image both go by chance.
        seed: Seed of the splits that are made here.
        need_test: Whether missing test images are an error.
        need_val: Whether to take a missing validation part out of the training part.
        multi_label: Whether the caller can take several labels per image.

    Returns:
        The parts, each sorted by path.

    Raises:
        UserError: Nothing there, one class only, no test images, a class in a part that the
            training part lacks, or several labels per image where one is needed.
    """
    source = Path(source)
    if not os.path.exists(source):
        raise UserError(f"{brief(source)} does not exist")
    if source.is_dir():
        found = read_folder(source)
    elif source.is_file() and source.suffix.lower() == ".csv":
        found = read_csv(source)
    else:
        raise UserError(f"{source} is neither a folder with class folders nor a .csv file")
    if found.multi_label and not multi_label:
        raise UserError(
            f"{source} has several labels per image: give finetune such a file; here "
            f"each image needs one, in a column class"
        )
    parts = _parts(found)
    classes = _classes(source, found, parts)
    train, val, test = (_numbered(parts[name], classes, found.multi_label) for name in PARTS)
    if need_test and len(test) == 0:
        raise UserError(
            f"{source} has no test images: add test/<class>/, or give plain class folders or a "
            f"CSV file without splits to have them split"
        )
    if need_test and found.multi_label and not has_both(test.labels).any():
        raise UserError(
            f"{source}: of no class are there test images with it and without it, so "
            f"that no score can be given: more test images are needed"
        )
    data = LabelledImages(classes, train, val, test, found.note)
    return hold_out_val(data, seed) if need_val and len(val) == 0 else data


def has_both(labels: np.ndarray) -> np.ndarray:
    """Whether some images have a class and others do not, ``(K,)`` bool.

    Args:
        labels: ``(N, K)`` of 0 and 1.
    """
    return np.asarray(labels.any(axis=0) & ~labels.all(axis=0))


def hold_out_val(data: LabelledImages, seed: int) -> LabelledImages:
    """Split a validation part off the training part; empty if there are too few labels.

    It is stratified, or with several labels per image by chance.
    """
    if data.multi_label:
        left, part = hold_out(range(len(data.train)), seed)
        kept, held = np.array(left, np.int64), np.array(part, np.int64)
    else:
        held, kept = _stratified(data.train.labels, VAL_SHARE, seed)
    return replace(data, train=data.train.take(kept), val=data.train.take(held))


def _shuffled_classes(labels: np.ndarray, seed: int) -> list[np.ndarray]:
    """The indices of each class, shuffled."""
    order = np.argsort(labels, kind="stable")
    numbers, begins = np.unique(labels[order], return_index=True)
    return [
        np.random.default_rng((seed, int(number))).permutation(members)
        for number, members in zip(numbers, np.split(order, begins)[1:], strict=True)
    ]


def _stratified(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split off a fraction of each class: at least one image of two or more."""
    off, rest = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for members in _shuffled_classes(labels, seed):
        count = max(1, round(len(members) * share)) if len(members) > 1 else 0
        off.append(members[:count])
        rest.append(members[count:])
    return np.concatenate(off), np.concatenate(rest)


_Named = list[tuple[str, tuple[str, ...]]]  # (path, names of its classes)


def _parts(found: FoundLabels) -> dict[str, _Named]:
    if found.splits is not None:
        given = list(zip(found.images, found.splits, strict=True))
        return {name: [image for image, part in given if part == name] for name in PARTS}
    if found.multi_label:
        return split_in_three(found.images)
    # This split does not follow the run's seed: the test part must stay the test part from one
    # run to the next.
    labels = np.unique([name for _, (name,) in found.images], return_inverse=True)[1]
    test, rest = _stratified(labels, TEST_SHARE, seed=0)
    within, _ = _stratified(labels[rest], VAL_SHARE / (1 - TEST_SHARE), seed=1)
    val = rest[within]
    members = {"train": np.setdiff1d(rest, val), "val": val, "test": test}
    return {name: [found.images[i] for i in np.sort(indices)] for name, indices in members.items()}


def _classes(source: Path, found: FoundLabels, parts: dict[str, _Named]) -> list[str]:
    """The names of all classes, sorted."""
    names = {part: {n for _, of in images for n in of} for part, images in parts.items()}
    if found.multi_label:  # a class may be missing from training, as chance splits such data
        classes = sorted(set(found.classes).union(*names.values()))
        if not classes:
            raise UserError(f"{source} names no class: the labels of all images are empty")
        return classes
    classes = sorted(names["train"])
    if len(classes) < 2:
        raise UserError(f"{source} has one class only ({classes[0]}): two or more are needed")
    for part in ("val", "test"):
        unknown = sorted(names[part] - set(classes))
        if unknown:
            raise UserError(
                f"{source}: the {part} images have the class {unknown[0]}, which no "
                f"training image has"
            )
    return classes


def _numbered(images: _Named, classes: list[str], multi_label: bool) -> Part:
    number = {name: index for index, name in enumerate(classes)}
    paths = [path for path, _ in images]
    if not multi_label:
        return Part(paths, np.array([number[name] for _, (name,) in images], np.int64))
    if len(images) * len(classes) > MAX_TABLE_CELLS:
        raise UserError(
            f"{len(images)} images with {len(classes)} classes, of which each may have "
            f"any, are more than the memory holds: give fewer classes"
        )
    labels = np.zeros((len(images), len(classes)), np.int64)
    for row, (_, names) in enumerate(images):
        labels[row, [number[name] for name in names]] = 1
    return Part(paths, labels)
