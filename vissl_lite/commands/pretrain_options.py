"""Options of ``vissl-lite pretrain``."""

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from vissl_lite.data.image_survey import ImageSettings
from vissl_lite.data.reading import MAX_PIXELS
from vissl_lite.encoders.folder import is_untrained
from vissl_lite.errors import (
    MOST_EPOCHS,
    UserError,
    annotations,
    brief,
    canonical_name,
    check_count,
    check_hyperparameters,
    check_image_size,
    check_not_negative,
    check_positive,
    check_positive_share,
    check_seed,
    check_warmup,
    did_you_mean,
)
from vissl_lite.optim import (
    LARGEST_RATE,
    canonical_optimizer,
    check_rates,
)
from vissl_lite.options import (
    OptionRow,
    Options,
    Paths,
    StrPath,
    option_row,
    parse_time,
    parse_value,
    path_list,
    unknown_option,
)
from vissl_lite.pretext import PRETEXTS, pretext_class
from vissl_lite.training.freezing import ALL_PARTS, check_parts, lora_rank
from vissl_lite.training.loggers import canonical_loggers, logger_names
from vissl_lite.training.token_drop import MAX_SHARE

DEFAULT_PRETEXT = "simclr"
DEFAULT_EPOCHS = 100
AUTO_TIME = "auto"
MAX_ACCUMULATION = 100_000

# Share of a run from pre-trained weights in which the heads are trained alone.
FREEZE_SHARE = 0.05


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(Options, ImageSettings):
    """Options of ``pretrain``.

    On construction, ``data`` is converted to a list and ``pretext`` to a mapping with all
    hyperparameters.
    """

    data: Paths
    """Folders of images (searched recursively; names of folders are not used as labels) or .txt
    files of paths; or shards, as local files or URLs, such as "train-{000000..000099}.tar"."""
    out: StrPath
    """Run folder to write."""
    pretext: str | dict[str, Any] = "simclr"
    """Pretext task: simclr, dino, mae or another one of `vissl-lite list pretexts`. Its
    hyperparameters are --pretext.NAME (in Python and YAML: a mapping with the name and the
    hyperparameters); `vissl-lite pretrain --pretext mae --help` shows those of mae."""
    backbone: str | None = None
    """timm architecture. Default: that of --encoder; otherwise resnet18, or for pretexts that need
    a transformer vit_tiny_patch16_224 (vit_tiny_patch4_32 below 64 pixels)."""
    image_size: int | None = None
    """Side length of the views in pixels. Default: that of the run or encoder folder given as
    --encoder, or, also with other weights, the size of the images, at most 224."""
    epochs: int | None = None
    """Number of passes over the images, or the largest one with --max_time auto. Default: 100,
    unless a time is given."""
    max_time: str | int | None = None
    """Time budget, as HH:MM:SS or in seconds. The learning rate schedule is fitted to it. auto: the
    run ends when the online evaluation has stopped improving, after --epochs (default 100) at the
    latest (see docs/watching.md)."""
    batch_size: int | None = None
    """Number of images per batch, summed over all devices. Default: 128, or all images if there
    are fewer, rounded down to a multiple of the number of devices."""
    accumulate_grad_batches: int = 1
    """Number of batches per optimizer step, for effective batches that do not fit into memory.
    Pretexts that compare the images of a batch still compare within each single batch."""
    upright: bool = True
    """Whether the images have a natural orientation (default true). Give --upright false for images
    without one, such as microscopy or satellite images: views are then also rotated and flipped in
    all directions."""
    progressive_resizing: bool | None = None
    """Train on views of half the side length in the first half of the run, on growing ones after
    that, and on full-size ones in the last fifth. Takes about half the time per epoch. Default:
    true from random weights for images of 64 pixels or more in runs of at least 200 steps or one
    minute, if the pretext and the backbone allow it and no crop is smaller; false from pre-trained
    weights, where it was not measured, and for distillation whose teacher sees the views."""
    token_drop: float | None = None
    """Share of the patches of a view that a ViT is trained without, in [0, 0.9], drawn at random
    at every step; half of it after 80 % of the run, and none after 90 %. Speeds up the training.
    Default: 0.5 for simclr with a ViT from random weights, in runs of at least 200 steps or one
    minute, if at least four patches are left of the smallest view; else 0: other pretexts did not
    gain by it or were not measured, nor were pre-trained weights."""
    encoder: StrPath | None = None
    """Weights to start from: a run, an encoder folder, timm:NAME (pre-trained weights), random:NAME
    (untrained), or a file with a state dict of --backbone, in timm's format or one that timm
    converts. Default: random weights of --backbone."""
    train: str | None = None
    """Weights of the encoder to train: all; blocks:N, the last N blocks of a ViT or stages of
    another backbone; norms, the scales and shifts of normalization layers; attn_proj, the output
    projections of attention layers; or lora:RANK (such as lora:16), low-rank adapters beside the
    weights of attention layers, which are merged into them when the encoder is saved. All others
    stay as they are in --encoder. The heads of the pretext are always trained, as is a first layer
    that is adapted to several other bands (see docs/formats.md). Default: all, but blocks:2 for
    diet from pre-trained weights."""
    freeze_share: float | None = None
    """Share of the run in which the whole encoder is frozen at first, while the heads of the
    pretext are trained; the warmup of the encoder follows. With --max_time auto, it is a share of
    --epochs. Default: 0.05 with pre-trained weights, otherwise 0."""
    probe_data: StrPath | None = None
    """Labelled images for evaluating the encoder during training (kNN and linear probe accuracy on
    validation images; the test part that probe finds with its default options is not used)."""
    optimizer: str | None = None
    """timm optimizer. Default: that of the pretext."""
    lr: float | None = None
    """Peak learning rate. Default: that of the pretext, scaled to the batch size by the pretext's
    own rule; for an encoder with pre-trained weights a tenth of it, unless only adapters of them
    are trained. With --epochs and random weights, that of mae, simmim, ijepa, moco_v3, lejepa,
    dino and ibot falls with the number of images that the run sees, down to the paper's for 256
    images."""
    base_lr: float | None = None
    """Peak learning rate for a batch of 256 images, as given in papers. It is scaled linearly with
    the batch size. Use instead of --lr."""
    weight_decay: float | None = None
    """Weight decay. Default: that of the pretext."""
    weight_decay_end: float | None = None
    """Weight decay at the end of the run, reached along a cosine. Default: that of the pretext, or
    --weight_decay if that is given (no change)."""
    betas: tuple[float, float] | None = None
    """Decay rates of the two averages of Adam and its relatives, such as 0.9 0.95. Default: those
    of the pretext."""
    clip_norm: float | None = None
    """Largest norm of the gradient; larger ones are scaled down to it. 0: no limit. Default: that
    of the pretext."""
    layer_decay: float | None = None
    """Factor by which the learning rate decreases from each layer of the encoder (a block of a ViT,
    a stage of other backbones) to the one below it, but for a first layer that is adapted to
    several other bands. Default: 0.75 for plain ViTs with pre-trained weights, otherwise, as for
    adapters, 1 (no decrease)."""
    ema: float | None = None
    """Decay of an exponential moving average of the encoder's weights, such as 0.999; the run
    then saves the average instead of the weights of the last step. After n steps it is at most
    (1 + n) / (10 + n), so that 0.999 is reached after 9,000 steps. Default: no average. Pretexts
    that save a momentum teacher have one already."""
    warmup: float = 0.1
    """Fraction of the training used for learning rate warmup. With --freeze_share, it is that of
    the training of the encoder, and the heads have a warmup of the same fraction of the frozen
    phase. With --max_time auto, it is a fraction of 10 epochs or 1000 steps, whichever is more."""
    on_collapse: Literal["warn", "stop"] = "warn"
    """What to do when the features collapse (all images get nearly the same ones): warn or stop."""
    logger: str | Sequence[str] | None = None
    """Loggers to use in addition to metrics.csv: tensorboard, wandb, mlflow, or none. Default:
    tensorboard if it is installed."""
    cache: bool = False
    """Cache decoded images for later epochs, downsized as far as the smallest crop allows: in
    memory if they fit into half of the free memory, for a single process whose data workers are
    forked (as on Linux) or that has none; otherwise in a temporary file in the run folder."""
    max_pixels: int = MAX_PIXELS
    """Skip images with more pixels (height times width) than this; a small file can decode to
    billions of pixels. The default is Pillow's limit."""
    seed: int = 0
    """Random seed."""
    precision: str = "auto"
    """Floating-point precision: auto, or one of Lightning's, such as 32-true or bf16-mixed."""
    devices: int | str = "auto"
    """Number of devices to use on each machine, or auto."""
    num_nodes: int = 1
    """Number of machines to use (see docs/scaling.md)."""
    strategy: str = "auto"
    """Strategy for training on several devices: auto, ddp, fsdp (shards the weights of models that
    are too large for one device), or another one of Lightning's."""
    num_workers: int | None = None
    """Number of data loading workers per device. Default: 1 on a CPU, which computes beside them;
    with GPUs, chosen from the number of CPU cores."""
    compile: bool = False
    """Train the encoder with torch.compile. The first step takes a minute or more; later steps are
    faster on most GPUs. Requires Triton, or a C++ compiler if there is no GPU."""
    resume: bool = False
    """Continue the run in --out, if there is one, with the options it was started with."""
    overwrite: bool = False
    """Replace an existing run in --out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_images()
        self._set("data", path_list(self.data))
        self._set("pretext", complete_pretext(self.pretext))
        check_count("epochs", self.epochs, MOST_EPOCHS)
        check_count("batch_size", self.batch_size)
        check_count("accumulate_grad_batches", self.accumulate_grad_batches, MAX_ACCUMULATION)
        check_image_size(self.image_size)
        if self.token_drop is not None and not 0 <= self.token_drop <= MAX_SHARE:
            raise UserError(f"--token_drop {self.token_drop} must be in [0, {MAX_SHARE}]")
        seconds = self.seconds
        if self.epochs is not None and seconds is not None:
            raise UserError(
                "give --epochs or --max_time, not both (--epochs null unsets the one of a --config)"
            )
        check_warmup("warmup", self.warmup)
        check_warmup("freeze_share", self.freeze_share)
        check_positive_share("layer_decay", self.layer_decay)
        check_warmup("ema", self.ema)
        check_parts(self.trained_parts)
        if not self.pretrained:
            for name, frozen in (
                ("train", self.trained_parts != ALL_PARTS),
                ("freeze_share", self.freeze_share),
            ):
                if frozen:
                    raise UserError(
                        f"--{name} {getattr(self, name)} freezes weights that are random: give "
                        f"pre-trained ones by --encoder, such as timm:NAME, or leave it out"
                    )
        check_rates(self.lr, self.weight_decay)
        check_not_negative("weight_decay_end", self.weight_decay_end, LARGEST_RATE)
        check_not_negative("clip_norm", self.clip_norm, LARGEST_RATE)
        if self.betas is not None and not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"--betas {list(self.betas)} must be two numbers in [0, 1)")
        check_positive("base_lr", self.base_lr, LARGEST_RATE)
        if self.lr is not None and self.base_lr is not None:
            raise UserError("give --lr or --base_lr, not both")
        check_seed(self.seed)
        if self.logger is not None:
            self._set("logger", canonical_loggers(self.logger))
        logger_names(self.logger)
        if self.optimizer is not None:
            self._set("optimizer", canonical_optimizer(self.optimizer))

    @property
    def open_ended(self) -> bool:
        """Whether the run ends when it has stopped improving."""
        return str(self.max_time).strip().lower() == AUTO_TIME

    @property
    def pretrained(self) -> bool:
        """Whether the training starts from pre-trained weights."""
        return self.encoder is not None and not is_untrained(self.encoder)

    @property
    def moves_pretrained(self) -> bool:
        """Whether pre-trained weights are trained themselves, rather than new adapters of them."""
        return self.pretrained and lora_rank(self.trained_parts) is None

    @property
    def trained_parts(self) -> str:
        """Weights of the encoder that are trained, by ``--train`` or its default."""
        if self.train is not None:
            return self.train
        return pretext_class(self.pretext_name).info.train if self.pretrained else ALL_PARTS

    @property
    def default_rate(self) -> bool:
        """Whether the learning rate is that of the pretext."""
        return self.lr is None and self.base_lr is None

    @property
    def frozen_share(self) -> float:
        """Share of the run in which the encoder is frozen, by ``--freeze_share`` or its default."""
        if self.freeze_share is not None:
            return self.freeze_share
        return FREEZE_SHARE if self.pretrained else 0.0

    @property
    def seconds(self) -> float | None:
        """Time budget in seconds; None without one."""
        if self.open_ended:
            return None
        return parse_time(self.max_time, f"HH:MM:SS, seconds or {AUTO_TIME}")

    @property
    def max_epochs(self) -> int | None:
        """Number of epochs, the largest one of a run of open length; None with a time budget."""
        return DEFAULT_EPOCHS if self.epochs is None and self.seconds is None else self.epochs

    @classmethod
    def merged(cls, layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """See ``Options``. The last source that names a pretext decides which one is used.

        Hyperparameters given for other pretexts are dropped. A file may hold ``overrides``: a
        mapping from pretexts to options that replace those of the file for that pretext.
        """
        name, sources = _named_pretext(layers)
        pretext: dict[str, Any] = {}
        for source in sources:
            overrides = source.pop("overrides", {})
            if not _is_nested(overrides):
                raise UserError("overrides must be a mapping from pretexts to options")
            for one in overrides:
                pretext_class(one)
            chosen = dict(overrides.get(name, {}))
            for part in (source.pop("pretext", {}), _as_mapping(chosen.pop("pretext", {}))):
                if part.get("name", name) == name:  # skip those of another pretext
                    pretext |= part
            source |= chosen
        values = super().merged(sources)
        if pretext:
            kinds = {"name": str, **hyperparameters_of(name)}
            for one in pretext:
                if one not in kinds:
                    raise unknown_option(f"pretext.{one}", [f"pretext.{known}" for known in kinds])
                pretext[one] = parse_value(f"pretext.{one}", pretext[one], kinds[one])
            values["pretext"] = {"name": name, **pretext}
        return values

    @classmethod
    def rows(cls, layers: Sequence[Mapping[str, Any]] = ()) -> list[OptionRow]:
        """See ``Options``. Includes the hyperparameters of the pretext named in ``layers``."""
        pretext = pretext_class(_named_pretext(layers)[0])
        defaults, docs = inspect.signature(pretext).parameters, _argument_docs(pretext)
        return [
            *super().rows(layers),
            *(
                option_row(f"pretext.{name}", kind, defaults[name].default, docs.get(name, ""))
                for name, kind in hyperparameters_of(pretext.info.name).items()
            ),
        ]

    @classmethod
    def epilog(cls, layers: Sequence[Mapping[str, Any]] = ()) -> str:
        """See ``Options``. Says how to see the hyperparameters of another pretext."""
        name = _named_pretext(layers)[0]
        other = next(one for one in ("mae", "dino") if one != name)
        return (
            f"The options --pretext.NAME above are those of {name}. For those of another pretext, "
            f"name it: vissl-lite pretrain --pretext {other} --help. "
            f"vissl-lite list pretexts lists all pretexts and when to use each."
        )

    @property
    def pretext_name(self) -> str:
        """Name of the pretext."""
        return str(_as_mapping(self.pretext)["name"])

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Hyperparameters of the pretext."""
        return {k: v for k, v in _as_mapping(self.pretext).items() if k != "name"}

    @property
    def sources(self) -> dict[str, str]:
        """Encoders that the run learns from, by option: initial weights, and a pretext's own."""
        given = {f"pretext.{name}": value for name, value in self.hyperparameters.items()}
        names = [f"pretext.{name}" for name in pretext_class(self.pretext_name).info.encoders]
        found = {"encoder": self.encoder, **{name: given[name] for name in names}}
        return {name: os.fspath(one) for name, one in found.items() if one is not None}

    def with_hyperparameters(self, values: Mapping[str, float]) -> Self:
        """Return a copy with some hyperparameters of the pretext changed."""
        return self.replace(pretext={**_as_mapping(self.pretext), **values})


def complete_pretext(pretext: str | Mapping[str, Any]) -> dict[str, Any]:
    """Name and all hyperparameters of a pretext, with defaults for those that are not given.

    Raises:
        UserError: The pretext or a hyperparameter is unknown.
    """
    given = _as_mapping(pretext)
    name = given.pop("name", DEFAULT_PRETEXT)
    cls = pretext_class(name)
    defaults = inspect.signature(cls).parameters
    known = {one: defaults[one].default for one in hyperparameters_of(name)}
    for one in given:
        if one not in known:
            raise UserError(f"unknown option --pretext.{one} of {name}: {did_you_mean(one, known)}")
    check_hyperparameters(cls, given)
    given = {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in given.items()}
    return {"name": name, **known, **given}


def hyperparameters_of(name: str) -> dict[str, Any]:
    """Types of the hyperparameters of a pretext, by name.

    Raises:
        UserError: The pretext is unknown.
    """
    types = annotations(pretext_class(name))
    del types["encoder"]
    return types


def _as_mapping(pretext: Any) -> dict[str, Any]:
    """A pretext as a mapping with its name, if given, and hyperparameters.

    The name may be in any case, and hyphens stand for underscores in hyperparameters.
    """
    named = {"name": pretext} if isinstance(pretext, str) else pretext
    if not isinstance(named, Mapping) or not isinstance(named.get("name", ""), str):
        raise UserError(f"--pretext {brief(pretext)} is neither a name nor a mapping with one")
    named = {str(key).replace("-", "_"): value for key, value in named.items()}
    if "name" in named:
        named["name"] = canonical_name(named["name"], PRETEXTS)
    return named


def _named_pretext(
    layers: Sequence[Mapping[str, Any]],
) -> tuple[str, list[dict[str, Any]]]:
    """The pretext named last, and the sources of options with their pretext as a mapping."""
    name, sources = DEFAULT_PRETEXT, [dict(layer) for layer in layers]
    for source in sources:
        if "pretext" in source:
            source["pretext"] = _as_mapping(source["pretext"])
            name = source["pretext"].get("name", name)
    return name, sources


def _is_nested(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(one, Mapping) for one in value.values())


def _argument_docs(cls: type) -> dict[str, str]:
    """Description of each argument in the section ``Args`` of a class's docstring."""
    section = (inspect.getdoc(cls) or "").partition("Args:\n")[2].partition("\n\n")[0]
    docs: dict[str, str] = {}
    for line in inspect.cleandoc(f"\n{section}").splitlines():
        if line.startswith(" ") and docs:  # continuation line
            name = next(reversed(docs))
            docs[name] = f"{docs[name]} {line.strip()}"
        else:
            name, _, text = line.partition(": ")
            docs[name] = text
    return docs
