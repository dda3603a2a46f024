"""The interface between commands and tasks: data, models, scores.

A task is a folder that holds a subclass of ``Task``; ``tasks.py`` lists them. See
docs/extending.md for one to start from.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence, Sized
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np
from torch import Tensor

from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import UserError
from vissl_lite.plots import Picture
from vissl_lite.training.fit import NO_FILES, TrainingFiles
from vissl_lite.training.hardware import Hardware
from vissl_lite.transfer.confidence import Confidence, Cutoff, HeldOut
from vissl_lite.transfer.exporting import ExportModel
from vissl_lite.transfer.finetuning import TransferSettings
from vissl_lite.transfer.options import TaskOptions
from vissl_lite.transfer.prediction import Predictions
from vissl_lite.transfer.skeleton import COCO_SKELETON, write_coco_skeleton
from vissl_lite.transfer.sources.groups import Record, group_names
from vissl_lite.transfer.sources.parts import PARTS, Split, take_share
from vissl_lite.transfer.sources.reading_log import ReadingLog


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
        parts_given: Whether the source says which images are for training and which for testing.
    """

    paths: list[str]
    classes: list[str]
    labels: list[str] | None = None
    parts_given: bool = False


class TrainedModel(Protocol):
    """A fine-tuned model.

    Attributes:
        encoder: The encoder in the model, which normalizes images.
        classes: K names.
    """

    @property
    def encoder(self) -> Encoder: ...

    @property
    def classes(self) -> list[str]: ...

    def state_dict(self) -> dict[str, Tensor]:
        """Weights and buffers by name."""

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> object:
        """Load weights and buffers."""


class Scores(Protocol):
    """Scores of a model on the test part.

    Attributes:
        metrics: Metrics by name; the first one is the main metric of the task.
        per_class: Metrics by class, then by name.
        right: ``(N,)`` bool: which images are classified rightly, if that is what is counted.
    """

    @property
    def metrics(self) -> dict[str, float]: ...

    @property
    def per_class(self) -> dict[str, dict[str, float]]: ...

    @property
    def right(self) -> np.ndarray | None: ...


# Images that an evaluation on training or validation images uses at most.
MAX_VALIDATION_IMAGES = 5000

DatasetT = TypeVar("DatasetT", bound=LabelledDataset)
ModelT = TypeVar("ModelT", bound=TrainedModel)
SettingsT = TypeVar("SettingsT", bound=TransferSettings)
ScoresT = TypeVar("ScoresT", bound=Scores)


class Task(ABC, Generic[DatasetT, ModelT, SettingsT, ScoresT]):
    """A task of fine-tuning, such as classification. Objects have no state.

    Attributes:
        name: Name as in ``--task``.
        options: Dataclass of the options that only some tasks have.
        settings: Dataclass of all settings of a training: ``TransferSettings`` and the options.
        curves: Metrics of the training that are drawn.
        takes_shots: Whether labels can be counted per class.
    """

    name: str
    options: type[TaskOptions]
    settings: type[SettingsT]
    curves: tuple[str, ...]
    takes_shots: bool = False

    def make_settings(self, options: object, **common: Any) -> SettingsT:
        """The settings of a training.

        Args:
            options: Has the task's own options among its attributes.
            **common: Keyword arguments of ``TransferSettings``.
        """
        own = {field.name: getattr(options, field.name) for field in fields(self.options)}
        return self.settings(**common, **own)

    @abstractmethod
    def load_data(self, source: str, settings: SettingsT) -> DatasetT:
        """Read a labelled data set.

        Args:
            source: Folder or file, as the user gave it.
            settings: The seed of splits that are made here, and the task's own options.

        Raises:
            UserError: Nothing is there, or it can't be used.
        """

    def labelled_images(self, source: str, settings: SettingsT) -> KnownImages:
        """The images of a labelled data set of which the parts do not matter.

        Args:
            source: Folder or file, as the user gave it.
            settings: See ``load_data``.

        Raises:
            UserError: Nothing is there, or it can't be used.
        """
        data = self.load_data(source, settings)
        return KnownImages([path for part in PARTS for path in data.paths(part)], data.classes)

    @abstractmethod
    def image_size(self, data: DatasetT, settings: SettingsT) -> int | None:
        """Image size in pixels that suits the images; None for the encoder's own."""

    def check(self, encoder: Encoder, data: DatasetT, settings: SettingsT) -> None:
        """Raise a UserError if settings do not suit the encoder or the data.

        It is called before anything is written.
        """

    def report_use(self, encoder: Encoder, source: str) -> None:
        """Log how much of an encoder the model uses, if not all of it.

        Args:
            encoder: Loaded encoder.
            source: Source of its weights.

        Raises:
            UserError: The model uses none of its weights.
        """

    @abstractmethod
    def metric_names(self, data: DatasetT) -> tuple[str, ...]:
        """Names of the metrics of ``validate``, such as ``map``.

        By the first one encoders are compared. Hyperparameters are chosen by the first loss among
        them, or by the first metric where there is none, unless ``--monitor`` names another.
        """

    @abstractmethod
    def build(self, encoder: Encoder, data: DatasetT, settings: SettingsT) -> ModelT:
        """A model to be trained, on a copy of an encoder.

        Args:
            encoder: Left as it is.
            data: Labelled images; only the training part may be used.
            settings: Settings of the training; the seed determines the new weights.
        """

    def starts_fitted(self, model: ModelT, settings: SettingsT) -> bool:
        """Whether a model from ``build`` is fitted to the labels already.

        It is then a candidate beside the trained model, and so are interpolations between them.
        """
        return False

    def variants(
        self, encoder: Encoder, data: DatasetT, settings: SettingsT
    ) -> Sequence[SettingsT]:
        """Settings among which one is chosen on held-out labels; by default the given ones alone.

        They may differ in ``frozen_norm``.
        """
        return [settings]

    @abstractmethod
    def train(
        self,
        model: ModelT,
        data: DatasetT,
        settings: SettingsT,
        hardware: Hardware | None = None,
        files: TrainingFiles = NO_FILES,
    ) -> None:
        """Train a model; it holds the weights of the last step afterwards.

        Args:
            model: Model from ``build``.
            data: Trained on the training part; the validation part is evaluated for the curve. The
                test part is not used.
            settings: Settings of the training.
            hardware: Hardware to train on; default one device.
            files: Files for metrics and checkpoints.
        """

    @abstractmethod
    def validate(self, model: ModelT, data: DatasetT, part: Split = "val") -> dict[str, float]:
        """Metrics of a model on a part, by name; see ``metric_names``.

        ``loss`` among them is better if it is smaller, any other if it is larger.

        Args:
            model: Model to evaluate.
            data: Labelled images.
            part: Part to evaluate on, which is not empty.
        """

    def calibrate(self, model: ModelT, data: DatasetT, like: ModelT | None = None) -> None:
        """Set what is chosen after the training, such as the score threshold of a detector.

        Args:
            model: Trained model.
            data: The validation part is used, or the training part where it is empty.
            like: Model for which it has been chosen already; its values are copied.
        """

    def held_out(self, model: ModelT, data: DatasetT) -> HeldOut | None:
        """Predictions for the validation part, from which ``confidence`` is computed.

        Args:
            model: A model that was not trained on the validation part.
            data: The validation part is used; it is not empty.

        Returns:
            None for a task that can't make pseudo-labels.
        """
        return None

    def confidence(self, held_out: HeldOut) -> Confidence | None:
        """Calibrate predictions and count how often those of a confidence are right.

        Args:
            held_out: Predictions of one model, or of those of all folds.

        Returns:
            None if that can't be told, as of outputs that are not finite.
        """
        return None

    def pseudo_label(
        self, model: ModelT, cutoff: Cutoff, predictions: Predictions
    ) -> tuple[Path, int, np.ndarray]:
        """Write the confident predictions as a data set for ``read_pseudo_labels``.

        Args:
            model: Model from ``load``.
            cutoff: Which predictions are confident.
            predictions: The images, and the folder of the data set.

        Returns:
            The file of the labels; how many images could be read; and ``(K,)`` int64, how many
            images (of boxes: how many boxes) have each class.

        Raises:
            UserError: The task can't make pseudo-labels.
        """
        raise UserError(f"--task {self.name} makes no pseudo-labels")

    def read_pseudo_labels(self, folder: Path, data: DatasetT) -> DatasetT:
        """Read a data set that ``pseudo_label`` has written.

        Args:
            folder: Folder of the data set.
            data: Labelled images, whose classes count.

        Returns:
            A data set of these classes with a training part only.

        Raises:
            UserError: There is none, it is damaged, or it has other classes.
        """
        raise UserError(f"--pseudo_labels: --task {self.name} reads none")

    @abstractmethod
    def evaluate(self, model: ModelT, data: DatasetT) -> ScoresT:
        """Score the model on the test part."""

    @abstractmethod
    def visualize(self, model: ModelT, data: DatasetT, scores: ScoresT, run: Path) -> None:
        """Plot test predictions beside the ground truth (``test.png``) and metrics per class."""

    @abstractmethod
    def labelled_picture(self, data: DatasetT, part: Split, index: int) -> Picture:
        """Draw an image with its label.

        Args:
            data: Labelled data set.
            part: Part of the image.
            index: Index of the image in its part.

        Raises:
            OSError, ValueError, SyntaxError: The image can't be read (``BROKEN_IMAGE``).
        """

    @abstractmethod
    def save(self, model: ModelT, folder: Path, about: dict[str, Any]) -> None:
        """Write the model folder.

        Args:
            model: Model from ``train``.
            folder: Made if missing.
            about: Record of the training.
        """

    @abstractmethod
    def load(self, folder: Path) -> ModelT:
        """Read a model folder, or the one in a run.

        Raises:
            UserError: There is no model for this task, or it is damaged.
        """

    def check_turns(self, model: ModelT) -> None:
        """Raise a UserError if predictions of the model can't be averaged over turns."""

    @abstractmethod
    def predict(self, model: ModelT, predictions: Predictions) -> tuple[Path, int]:
        """Write predictions for images.

        Args:
            model: Model from ``load``.
            predictions: The images, the turns to average over, and where files and pictures go.

        Returns:
            The file or folder of the predictions, and how many images could be read.
        """

    def uncertainty(
        self,
        model: ModelT,
        temperature: float,
        paths: Sequence[str],
        advance: Callable[[int], None],
    ) -> tuple[np.ndarray, np.ndarray]:
        """How uncertain a model is of images, for the choice of those to label next.

        Args:
            model: Model from ``load``.
            temperature: Logits are divided by it before they become probabilities, see
                ``Confidence``; 1 leaves them as they are.
            paths: Image files. Broken ones are left out, and named in the log.
            advance: Called with the number of images done since the last call.

        Returns:
            ``(N,)`` float32, at least 0 and larger where it is more uncertain, of the readable
            images, and ``(M,)`` bool: which images these are.

        Raises:
            UserError: No image can be read, or the task has no measure of uncertainty.
        """
        raise UserError(f"--model: --task {self.name} has no measure of uncertainty")

    def write_skeleton(self, paths: Sequence[str], classes: Sequence[str], folder: Path) -> Path:
        """Write a file of images without labels, to be filled by hand or with a labelling tool.

        By default it is in COCO's format.

        Args:
            paths: Image files.
            classes: Names of the classes; empty if they are not known yet.
            folder: Folder to write to.

        Returns:
            The file, ``to_label.json`` or ``to_label.csv``.
        """
        return write_coco_skeleton(folder / COCO_SKELETON, paths, classes)

    @abstractmethod
    def export_model(self, model: ModelT, folder: Path) -> ExportModel:
        """The model as a network from decoded images to predictions.

        Args:
            model: Model from ``load``.
            folder: Folder that it was loaded from.
        """


def sample(images: list[RecordT], wanted: int = MAX_VALIDATION_IMAGES) -> list[RecordT]:
    """Up to so many images, evenly spread."""
    return [images[i] for i in spread(len(images), wanted)]


def spread(images: int, wanted: int) -> np.ndarray:
    """Indices of up to so many images, evenly spread."""
    return np.unique(np.linspace(0, images - 1, min(images, wanted)).round().astype(int))
