"""Labelled images in training, validation and test parts, as all tasks have them."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic, Self, TypeVar

import numpy as np

from vissl_lite.errors import UserError
from vissl_lite.transfer.jackknife import jackknife_blocks
from vissl_lite.transfer.sources.groups import Record, group_names
from vissl_lite.transfer.sources.parts import PARTS, Split, take_share
from vissl_lite.transfer.sources.reading_log import ReadingLog

# Images that an evaluation on training or validation images uses at most.
MAX_VALIDATION_IMAGES = 5000


class LabelledDataset(ABC):
    """Labelled images in three parts; the test part is never used for selection.

    Attributes:
        classes: K names.
        train: Images to train on.
        val: Images for model selection; may be empty.
        test: Images to report on.
        reading: How the data were read.
    """

    classes: list[str]
    train: Sized
    val: Sized
    test: Sized
    reading: ReadingLog

    @property
    def val_from_train(self) -> bool:
        """Whether the validation part was taken out of the training images."""
        return self.reading.val_from_train

    @abstractmethod
    def paths(self, part: Split) -> list[str]:
        """The image files of a part."""

    def groups(self, part: Split) -> np.ndarray | None:
        """The group of each image of a part, such as its patient, which no split divides.

        Returns:
            ``(N,)`` str; None if all images are apart.
        """
        return group_names(self.paths(part), self.reading.groups)

    def sampling_units(self) -> np.ndarray | None:
        """Groups or blocks of test images over which intervals of the main metric are taken.

        Returns:
            ``(N,)``: blocks of a jackknife; for the accuracy, which is a mean over images, the
            groups; None if those are single images.
        """
        return jackknife_blocks(len(self.test), self.groups("test"))

    @abstractmethod
    def class_counts(self, part: Split) -> np.ndarray:
        """Number of labels of each class in a part, ``(K,)`` int64."""

    @abstractmethod
    def take(self, kept: Mapping[Split, Sequence[int]]) -> Self:
        """A copy of the data set with some of its images.

        Args:
            kept: Indices by part, ascending; a part that is not named stays whole.
        """

    @abstractmethod
    def subsample(
        self, fraction: float | None = None, shots: int | None = None, seed: int = 0
    ) -> Self:
        """A seeded subset of the training and validation labels.

        A smaller amount is always contained in a larger one of the same seed.

        Args:
            fraction: Share in (0, 1], in whole groups; None takes all.
            shots: Labels per class, instead, where each image has one class.
            seed: Seed of the choice.

        Raises:
            UserError: Both are given, a number is out of range, or the data have no such labels.
        """

    @abstractmethod
    def merged(self) -> Self:
        """A copy with the validation part added to the training part."""

    @abstractmethod
    def hold_out(self, indices: Sequence[int]) -> Self:
        """A copy whose validation part is some of the training images.

        Args:
            indices: Indices of training images, ascending.
        """

    @abstractmethod
    def with_train(self, other: Self) -> Self:
        """A copy with the training part of another data set of these classes added to its own."""

    def refits(self, refit: bool | None) -> bool:
        """Whether validation images are trained on once hyperparameters are chosen.

        Args:
            refit: What the user wants; None for those that were taken out of the training images.
        """
        return self.val_from_train if refit is None else refit

    def for_probes(self, refit: bool | None) -> Self:
        """The data set whose training part probes are fitted to.

        Args:
            refit: See ``refits``.
        """
        return self.merged() if self.refits(refit) else self

    def folds(self, count: int, seed: int = 0) -> list[Self]:
        """Copies of the data set for a cross-validation over training and validation images.

        Args:
            count: Number of copies wanted; in each, other images are the validation part.
            seed: Seed of the division.

        Returns:
            The copies, fewer where there are fewer groups; the data set itself if such a division
            is not needed for its kind of labels, or not possible.
        """
        return [self]

    @abstractmethod
    def write_split(self, run: Path) -> None:
        """Write the split to a file that ``--data`` accepts."""

    def without(
        self,
        left_out: Mapping[str, Collection[str]],
        broken: Mapping[str, Mapping[str, str]],
    ) -> Self:
        """A copy of the data set without some image files.

        Args:
            left_out: Files that are not to be used, by part.
            broken: Unreadable files and the reasons, by part.

        Raises:
            UserError: What is left is too little to train on or to evaluate by.
        """
        for part in PARTS:
            paths, gone = self.paths(part), broken.get(part, {})
            if paths and len(gone) == len(set(paths)):
                raise UserError(
                    f"none of {len(paths)} {part} images can be read, the first "
                    f"{paths[0]} ({gone[paths[0]]})"
                )
        kept: dict[Split, Sequence[int]] = {}
        for part in PARTS:
            out = {*left_out.get(part, ()), *broken.get(part, ())}
            kept[part] = [i for i, path in enumerate(self.paths(part)) if path not in out]
        return self.take(kept)

    def image_classes(self, part: Split) -> np.ndarray | None:
        """``(N,)`` class indices of the images of a part; None unless each image has one class."""
        return None

    def majority(self) -> float | None:
        """Test accuracy of always predicting the most frequent training class.

        Where several are equally frequent, the mean of their accuracies.

        Returns:
            Share of the test images; None unless each image has one class.
        """
        train, test = self.image_classes("train"), self.image_classes("test")
        if train is None or test is None or not len(train) or not len(test):
            return None
        counts = np.bincount(train, minlength=len(self.classes))
        shares = np.bincount(test, minlength=len(counts)) / len(test)
        return float(shares[counts == counts.max()].mean())

    def identity(self) -> list[str]:
        """Strings that identify the images and parts of the data set."""
        groups = self.reading.groups
        return [
            f"{part} {path}{f' of {groups[path]}' if path in groups else ''}"
            for part in PARTS
            for path in self.paths(part)
        ]


RecordT = TypeVar("RecordT", bound=Record)


@dataclass(frozen=True)
class ListDataset(LabelledDataset, Generic[RecordT]):
    """A data set whose parts are lists of records, each with the ``path`` of its image."""

    classes: list[str]
    train: list[RecordT]
    val: list[RecordT]
    test: list[RecordT]
    reading: ReadingLog

    def part(self, name: Split) -> list[RecordT]:
        """A part by name."""
        parts = {"train": self.train, "val": self.val, "test": self.test}
        return parts[name]

    def paths(self, part: Split) -> list[str]:
        return [str(one.path) for one in self.part(part)]

    def take(self, kept: Mapping[Split, Sequence[int]]) -> Self:
        train, val, test = (
            [self.part(name)[i] for i in kept[name]] if name in kept else self.part(name)
            for name in PARTS
        )
        return replace(self, train=train, val=val, test=test)

    def merged(self) -> Self:
        return replace(self, train=[*self.train, *self.val], val=[])

    def hold_out(self, indices: Sequence[int]) -> Self:
        held = set(indices)
        train = [one for i, one in enumerate(self.train) if i not in held]
        val = [self.train[i] for i in indices]
        return replace(self, train=train, val=val, reading=self.reading.with_val_from_train())

    def with_train(self, other: Self) -> Self:
        return replace(self, train=[*self.train, *other.train])

    def subsample(
        self, fraction: float | None = None, shots: int | None = None, seed: int = 0
    ) -> Self:
        if shots is not None:
            raise UserError(
                f"--shots {shots} counts images of one class each, which these images "
                f"are not: give --fraction"
            )
        if fraction is None:
            return self
        made: tuple[Split, ...] = ("train", "val")
        return self.take(
            {
                part: take_share(len(self.part(part)), fraction, seed, self.groups(part))
                for part in made
            }
        )


@dataclass(frozen=True)
class KnownImages:
    """Images that are labelled already.

    Attributes:
        paths: Their files.
        classes: Names of the classes.
        labels: Class of each image; None unless each image has one class.
        parts_given: Whether the source has validation or test images of its own.
        test: Files of those for testing, if it does; their labels must not influence the training.
        groups: Groups by file that the source names, such as by a column ``patient_id``; also of
            images without a label.
    """

    paths: list[str]
    classes: list[str]
    labels: list[str] | None = None
    parts_given: bool = False
    test: frozenset[str] = frozenset()
    groups: Mapping[str, str] = field(default_factory=dict)


def sample(images: list[RecordT], wanted: int = MAX_VALIDATION_IMAGES) -> list[RecordT]:
    """Up to so many images, evenly spread."""
    return [images[i] for i in spread(len(images), wanted)]


def spread(images: int, wanted: int) -> np.ndarray:
    """Indices of up to so many images, evenly spread."""
    return np.unique(np.linspace(0, images - 1, min(images, wanted)).round().astype(int))
