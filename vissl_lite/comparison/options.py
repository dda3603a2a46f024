"""The options of ``vissl-lite compare``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

from vissl_lite.comparison.amounts import make_amounts
from vissl_lite.comparison.protocols import Protocol
from vissl_lite.data.reading import MAX_PIXELS
from vissl_lite.errors import UserError, check_count, check_image_size, check_seed
from vissl_lite.optim import OptimizerSettings, check_rates
from vissl_lite.options import Options, Paths, StrPath, path_list
from vissl_lite.transfer.finetuning import TransferSettings
from vissl_lite.transfer.tasks import AllTaskOptions, find_task, without_others

# Draws of labels; each is a training.
LARGEST_SEEDS = 10_000

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class CompareOptions(Options, AllTaskOptions):
    """Options of ``compare``; those that only some tasks have are inherited."""

    free_to_change = Options.free_to_change | {"encoder", "seeds", "baseline"}

    encoder: Paths
    """Runs, encoder folders, timm:NAME (pre-trained weights) or random:NAME (untrained)."""
    data: StrPath
    """Labelled images, as for finetune."""
    out: StrPath
    """The run folder to write."""
    task: str = "classification"
    """What to learn from the labels: classification, detection or segmentation."""
    protocols: Sequence[Protocol] | Protocol | None = None
    """How to judge an encoder: knn and linear for a frozen one, finetune to train it. Default knn
    and linear, or finetune for detection, segmentation and several labels per image."""
    fractions: Sequence[float] | float | None = None
    """Shares of the labels; default 0.01 0.05 0.1 1."""
    shots: Sequence[int] | int | None = None
    """Labels a class, instead."""
    seeds: int = 3
    """How often each amount of labels is drawn, at least 3; the same for all encoders."""
    baseline: StrPath | None = None
    """The encoder that others are held against; default the untrained one, which is added if it is
    not among them."""
    layers: bool = False
    """Judge every stage by knn and linear too."""
    k: int = 20
    """Neighbors that vote in knn."""
    lr: Sequence[float] | float | None = None
    """Learning rates of finetune to choose from; default 0.0003 0.001 0.003. They are chosen for
    each encoder and amount of labels with the first seed."""
    epochs: int | None = None
    """Of finetune; default as many as make 1,000 steps, between 10 and 100."""
    batch_size: int | None = None
    """Of finetune; default its own."""
    image_size: int | None = None
    """Side in pixels; default each encoder's own, or for random:NAME that of the images (for
    detection and segmentation that of finetune)."""
    upright: bool = True
    """Whether the images have an up, for finetune."""
    leaks: Literal["warn", "exclude", "error"] = "warn"
    """What to do about test images that an encoder has seen in pre-training, or that are in the
    training part too: warn, exclude them for all encoders, or stop with an error."""
    max_pixels: int = MAX_PIXELS
    """Skip images with more pixels (height times width): a small file may decode to billions. The
    default is what Pillow takes."""
    seed: int = 0
    """The first of the seeds."""
    precision: str = "auto"
    """auto, or one of Lightning's such as 32-true or bf16-mixed."""
    num_workers: int | None = None
    """Data workers of finetune; default by the cores there are."""
    resume: bool = False
    """Continue the comparison in --out: what is missing is run, further encoders and seeds
    included."""
    overwrite: bool = False
    """Replace the run in --out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("encoder", "protocols", "fractions", "shots", "lr"):
            value = getattr(self, name)
            self._set(name, value if isinstance(value, list) or value is None else [value])
        find_task(self.task)
        if self.seeds < 3:
            raise UserError(f"--seeds {self.seeds} must be at least 3: fewer show no spread")
        check_count("seeds", self.seeds, LARGEST_SEEDS)
        for name in ("k", "epochs", "batch_size"):
            check_count(name, getattr(self, name))
        check_image_size(self.image_size)
        for rate in listed(self.lr) or ():
            check_rates(rate, None)
        make_amounts(listed(self.fractions), listed(self.shots))
        check_seed(self.seed, self.seeds - 1)
        encoders = path_list(self.encoder)
        twice = [name for name in encoders if encoders.count(name) > 1]
        if twice:
            raise UserError(f"--encoder {twice[0]} is given twice")

    def as_config(self) -> dict[str, Any]:
        return without_others(find_task(self.task), super().as_config())

    def all_seeds(self) -> list[int]:
        """The seeds of the draws of labels."""
        return list(range(self.seed, self.seed + self.seeds))

    def settings(
        self, rate: float = 1e-3, seed: int | None = None, untrained: bool = True
    ) -> TransferSettings:
        """How to fine-tune: the settings of ``finetune``.

        Args:
            rate: Learning rate.
            seed: Of the training; default the first of the seeds.
            untrained: Whether the encoder is an untrained one.
        """
        settings: TransferSettings = find_task(self.task).make_settings(
            self,
            epochs=self.epochs,
            batch_size=self.batch_size,
            optimizer=OptimizerSettings("adamw", rate, 0.05, 1.0 if untrained else 0.75),
            upright=self.upright,
            seed=self.seed if seed is None else seed,
            pretrained=not untrained,
        )
        return settings


def listed(value: Sequence[T] | T | None) -> list[T] | None:
    """The value of an option for one or several things, as a list."""
    if value is None:
        return None
    return list(value) if isinstance(value, list | tuple) else [cast(T, value)]
