"""Options of ``vissl-lite compare``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

from vissl_lite.comparison.amounts import make_amounts
from vissl_lite.comparison.protocols import Protocol
from vissl_lite.comparison.simulation import Selector
from vissl_lite.data.image_survey import ImageSettings
from vissl_lite.data.reading import MAX_PIXELS
from vissl_lite.errors import MOST_EPOCHS, UserError, check_count, check_image_size, check_seed
from vissl_lite.optim import check_rates
from vissl_lite.options import Options, Paths, StrPath, path_list
from vissl_lite.transfer.finetuning import TransferSettings, finetune_optimizer
from vissl_lite.transfer.tasks import AllTaskOptions, find_task, without_others

MAX_SEEDS = 10_000

DEFAULT_BUDGETS = (10, 50, 100, 500)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class CompareOptions(Options, ImageSettings, AllTaskOptions):
    """Options of ``compare``. Options that only some tasks have are inherited."""

    free_to_change = Options.free_to_change | {"encoder", "seeds", "baseline"}

    encoder: Paths
    """Encoders to compare: runs, encoder folders, timm:NAME (pre-trained weights) or random:NAME
    (untrained)."""
    data: StrPath
    """Labelled images, as for finetune."""
    out: StrPath
    """Run folder to write."""
    task: str = "classification"
    """Task: classification, detection or segmentation."""
    protocols: Sequence[Protocol] | Protocol | None = None
    """How to evaluate an encoder: knn and linear keep it frozen, finetune trains it. Default: knn
    and linear, or finetune for detection, segmentation and several labels per image."""
    fractions: Sequence[float] | float | None = None
    """Fractions of the labels to use. Default: 0.01 0.05 0.1 1."""
    shots: Sequence[int] | int | None = None
    """Numbers of training and validation labels per class to use, instead of --fractions."""
    seeds: int = 3
    """Number of random draws of each amount of labels, at least 3. All encoders get the same
    draws."""
    baseline: StrPath | None = None
    """Encoder that the others are compared with. Default: the untrained encoder, which is added if
    --encoder does not name one."""
    selection: Sequence[Selector] | Selector | None = None
    """Compare ways to choose which images are labelled, instead of encoders: random, herding,
    uncertainty_herding, typiclust, probcover, k_center, margin or dropquery; see the command
    select. One --encoder finds the images and is trained with them. Labelling is simulated on the
    training images, of which each seed has 80 % to choose from, and the others are compared with
    random."""
    budgets: Sequence[int] | int | None = None
    """Numbers of images to label with --selection, each of which includes the smaller one. Default:
    10 50 100 500."""
    layers: bool = False
    """Also evaluate every stage with knn and linear."""
    k: int = 20
    """Number of neighbors in knn."""
    lr: Sequence[float] | float | None = None
    """Candidate learning rates of finetune. Default: 0.00003 0.0001 0.0003 0.001 0.003. The best is
    chosen for each encoder, amount of labels and seed, on labels that are held out."""
    refit: bool | None = None
    """Whether all protocols train on the validation labels too, once hyperparameters are chosen.
    Default: true if the validation part was taken out of the training labels, false for a
    validation part of your own."""
    frozen_norm: bool | None = None
    """Whether finetune keeps the BatchNorm layers of pre-trained encoders as they are. Default: as
    for the command finetune."""
    epochs: int | None = None
    """Number of epochs of finetune. Default: as many as give 1,000 steps, but at least 10."""
    batch_size: int | None = None
    """Batch size of finetune. Default: as for the command finetune."""
    image_size: int | None = None
    """Side length of the input in pixels. Default for classification: that of each encoder, and for
    random:NAME that of the first pre-trained one; for other tasks as for the command finetune."""
    upright: bool = True
    """Whether the images have a natural orientation (default true). Give --upright false for images
    without one, such as microscopy images: finetune then also rotates and flips them in all
    directions."""
    leaks: Literal["warn", "exclude", "error"] = "warn"
    """What to do about test images that were used in pre-training an encoder or are also among the
    training images: warn, exclude them for all encoders, or stop with an error."""
    max_pixels: int = MAX_PIXELS
    """Skip images with more pixels (height times width) than this; a small file can decode to
    billions of pixels. The default is Pillow's limit."""
    seed: int = 0
    """First seed; the following draws use the next integers."""
    precision: str = "auto"
    """Floating-point precision: auto, or one of Lightning's, such as 32-true or bf16-mixed."""
    num_workers: int | None = None
    """Number of data loading workers of finetune. Default: 1 on a CPU, which computes beside them;
    with GPUs, chosen from the number of CPU cores."""
    dry_run: bool = False
    """Only print what is read of the data, and write nothing."""
    resume: bool = False
    """Continue the comparison in --out: run what is missing, including encoders and seeds that were
    added."""
    overwrite: bool = False
    """Replace an existing run in --out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_images()
        for name in ("encoder", "protocols", "fractions", "shots", "lr", "selection", "budgets"):
            value = getattr(self, name)
            self._set(name, value if isinstance(value, list) or value is None else [value])
        self._set("task", find_task(self.task).name)
        if self.seeds < 3:
            raise UserError(f"--seeds {self.seeds} must be at least 3 to estimate the spread")
        check_count("seeds", self.seeds, MAX_SEEDS)
        check_count("epochs", self.epochs, MOST_EPOCHS)
        for name in ("k", "batch_size", "class_level"):
            check_count(name, getattr(self, name))
        check_image_size(self.image_size)
        for rate in as_list(self.lr) or ():
            check_rates(rate, None)
        make_amounts(as_list(self.fractions), as_list(self.shots))
        self._check_selection()
        check_seed(self.seed, self.seeds - 1)
        encoders = path_list(self.encoder)
        twice = [name for name in encoders if encoders.count(name) > 1]
        if twice:
            raise UserError(f"--encoder {twice[0]} is given twice")

    def _check_selection(self) -> None:
        if self.selection is None:
            if self.budgets is not None:
                raise UserError("--budgets belongs to --selection: give --fractions or --shots")
            return
        given = [name for name in ("fractions", "shots", "baseline") if getattr(self, name)]
        if given:
            raise UserError(f"--selection and --{given[0]} do not go together: give --budgets")
        if len(path_list(self.encoder)) > 1:
            raise UserError("--selection compares ways to choose images: give one --encoder")
        if self.refit is not None:
            raise UserError("--selection trains on all labels that are chosen: leave --refit out")
        if self.selectors() == ["random"]:
            raise UserError(
                "--selection random has nothing that it is compared with: give another way, "
                "such as herding"
            )
        for budget in as_list(self.budgets) or ():
            check_count("budgets", budget)

    def all_budgets(self) -> list[int]:
        """Numbers of images to label, ascending."""
        return sorted(set(as_list(self.budgets) or DEFAULT_BUDGETS))

    def selectors(self) -> list[Selector]:
        """Ways to choose images, random ones included; empty if encoders are compared."""
        chosen: list[Selector] | None = as_list(self.selection)
        return list(dict.fromkeys([*chosen, "random"])) if chosen else []

    def as_config(self) -> dict[str, Any]:
        return without_others(find_task(self.task), super().as_config())

    def all_seeds(self) -> list[int]:
        """Seeds of the draws of labels."""
        return list(range(self.seed, self.seed + self.seeds))

    def settings(self, seed: int | None = None, untrained: bool = True) -> TransferSettings:
        """Settings for fine-tuning, but for the learning rate.

        Args:
            seed: Seed of the training. Default: the first seed.
            untrained: Whether the encoder is untrained.
        """
        settings: TransferSettings = find_task(self.task).make_settings(
            self,
            epochs=self.epochs,
            batch_size=self.batch_size,
            optimizer=finetune_optimizer(untrained),
            frozen_norm=self.frozen_norm,
            refit=self.refit,
            upright=self.upright,
            seed=self.seed if seed is None else seed,
            pretrained=not untrained,
        )
        return settings


def as_list(value: Sequence[T] | T | None) -> list[T] | None:
    """Convert the value of an option that takes one or several values to a list."""
    if value is None:
        return None
    return list(value) if isinstance(value, list | tuple) else [cast(T, value)]
