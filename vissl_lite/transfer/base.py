"""The interface between commands and tasks: models, scores, and what a task does.

A task is a folder that holds a subclass of ``Task``; ``tasks.py`` lists them. See
docs/extending.md for one to start from.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from torch import Tensor

from vissl_lite.encoders.encoder import Encoder
from vissl_lite.errors import UserError
from vissl_lite.plots import Picture
from vissl_lite.training.fit import NO_FILES, TrainingFiles
from vissl_lite.training.hardware import Hardware
from vissl_lite.transfer.confidence import Confidence, Cutoff, HeldOut
from vissl_lite.transfer.dataset import KnownImages, LabelledDataset
from vissl_lite.transfer.exporting import ExportModel
from vissl_lite.transfer.finetuning import TransferSettings
from vissl_lite.transfer.options import TaskOptions
from vissl_lite.transfer.prediction import Predictions, PseudoLabelled
from vissl_lite.transfer.skeleton import COCO_SKELETON, CocoContent, write_coco_skeleton
from vissl_lite.transfer.sources.groups import named_groups
from vissl_lite.transfer.sources.parts import PARTS, Split


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
        per_image: ``(N,)`` part of each image in the main metric: for accuracy bool, whether it is
            classified correctly; for others jackknife pseudo-values over
            ``LabelledDataset.sampling_units``; None if there is neither.
    """

    @property
    def metrics(self) -> dict[str, float]: ...

    @property
    def per_class(self) -> dict[str, dict[str, float]]: ...

    @property
    def per_image(self) -> np.ndarray | None: ...


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
    def load_data(self, source: str, settings: SettingsT, complete: bool = True) -> DatasetT:
        """Read a labelled data set.

        Args:
            source: Folder or file, as the user gave it.
            settings: The seed of splits that are made here, and the task's own options.
            complete: Whether missing validation and test parts are made, which takes three images.

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
        data = self.load_data(source, settings, complete=False)
        return KnownImages(
            [path for part in PARTS for path in data.paths(part)],
            data.classes,
            parts_given=bool(data.paths("val") or data.paths("test")),
            test=frozenset(data.paths("test")),
            groups=named_groups(data.reading),
        )

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

        By the first one encoders are compared. Hyperparameters are chosen by it as well, or with
        few validation images by the first loss, if there is one; see ``monitor_of``.
        """

    @abstractmethod
    def build(self, encoder: Encoder, data: DatasetT, settings: SettingsT) -> ModelT:
        """A model to be trained, on a copy of an encoder.

        Args:
            encoder: Left as it is.
            data: Labelled images; only the training part may be used.
            settings: Settings of the training; the seed determines the new weights.
        """

    def starts_fitted(self, model: ModelT, data: DatasetT, settings: SettingsT) -> bool:
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
    ) -> PseudoLabelled:
        """Write the confident predictions as a data set for ``read_pseudo_labels``.

        Args:
            model: Model from ``load``.
            cutoff: Which predictions are confident.
            predictions: The images, and the folder of the data set.

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

    def write_skeleton(
        self,
        paths: Sequence[str],
        classes: Sequence[str],
        folder: Path,
        groups: Mapping[str, str] | None = None,
        earlier: CocoContent | None = None,
    ) -> Path:
        """Write a file of images without labels, to be filled by hand or with a labelling tool.

        By default it is in COCO's format.

        Args:
            paths: Image files.
            classes: Names of the classes; empty if they are not known yet.
            folder: Folder to write to.
            groups: Groups of images that have one; COCO's format has no place for them. None if
                there are none.
            earlier: Images that are labelled already, with their labels, which a file in COCO's
                format begins with; None if there are none in this format.

        Returns:
            The file, ``to_label.json`` or ``to_label.csv``.
        """
        return write_coco_skeleton(folder / COCO_SKELETON, paths, classes, earlier)

    @abstractmethod
    def export_model(self, model: ModelT, folder: Path) -> ExportModel:
        """The model as a network from decoded images to predictions.

        Args:
            model: Model from ``load``.
            folder: Folder that it was loaded from.
        """
