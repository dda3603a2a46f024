"""Options of ``vissl-lite pretrain``, and what they stand for."""

import inspect
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from vissl_lite.data.images import suitable_size
from vissl_lite.data.reading import MAX_PIXELS
from vissl_lite.encoders.encoder import Encoder, build_encoder
from vissl_lite.encoders.folder import load_encoder, load_weights
from vissl_lite.errors import (
    UserError,
    annotations,
    brief,
    check_count,
    check_hyperparameters,
    check_image_size,
    check_positive,
    check_seed,
    check_warmup,
    did_you_mean,
)
from vissl_lite.optim import LARGEST_RATE, OptimizerSettings, check_optimizer, check_rates
from vissl_lite.options import (
    OptionRow,
    Options,
    Paths,
    StrPath,
    option_row,
    parse_value,
    path_list,
    unknown_option,
)
from vissl_lite.pretext import PRETEXTS, pretext_class
from vissl_lite.pretext.base import PretextTask
from vissl_lite.training.loggers import logger_names
from vissl_lite.training.resizing import SMALLEST

DEFAULT_PRETEXT = "simclr"
LONGEST_DAYS = 3650  # of training
LARGEST_STEP = 100_000  # batches


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(Options):
    """Options of ``pretrain``.

    When one is made, ``data`` becomes a list and ``pretext`` a mapping of all hyperparameters.
    """

    data: Paths
    """Folders (searched recursively, class folders ignored) or .txt files of paths; or shards,
    on a disk or behind URLs, such as "train-{000000..000099}.tar"."""
    out: StrPath
    """The run folder to write."""
    pretext: str | dict[str, Any] = "simclr"
    """The pretext task; its hyperparameters as --pretext.NAME (in Python and YAML a mapping of
    name and hyperparameters)."""
    backbone: str | None = None
    """A timm architecture; default that of --init, or resnet18, for pretexts of transformers
    vit_tiny_patch16_224 (below 64 pixels vit_tiny_patch4_32)."""
    image_size: int | None = None
    """Side in pixels; default that of --init, or of the images, at most 224."""
    epochs: int | None = None
    """Times that every image is seen; default 100 without --max_time."""
    max_time: str | int | None = None
    """Time budget, as HH:MM:SS or seconds; the schedule ends when it ends."""
    batch_size: int | None = None
    """Images that go through the network together, over all devices; default 128, or all if
    there are fewer."""
    accumulate_grad_batches: int = 1
    """Batches an optimizer step: for a larger step than the memory holds. Pretexts that compare
    the images of a batch get no more of them to compare."""
    upright: bool = True
    """Whether the images have an up. Without one, as from a microscope or a satellite, views
    are turned and flipped in all directions."""
    progressive_resizing: bool = False
    """Train on views of half the side for the first half of the run, then on larger ones, and
    on whole ones in the last fifth: about half the time an epoch."""
    init: StrPath = "random"
    """Where to start: random, pretrained (timm's weights), a run, an encoder folder, or a file
    with a timm state dict."""
    probe_data: StrPath | None = None
    """Labelled images to judge the encoder by while it trains (kNN and a linear probe, on
    validation images)."""
    optimizer: str | None = None
    """A timm optimizer; default the pretext's."""
    lr: float | None = None
    """Peak learning rate; default the pretext's, scaled to the batch by its own rule."""
    base_lr: float | None = None
    """The same for a batch of 256 images, as papers give it: it grows with the batch."""
    weight_decay: float | None = None
    """Default the pretext's."""
    warmup: float = 0.1
    """Share of the training in which the learning rate rises."""
    on_collapse: Literal["warn", "stop"] = "warn"
    """What to do when all images get nearly the same features: warn, or stop."""
    logger: str | Sequence[str] | None = None
    """Where curves go beside metrics.csv: tensorboard, wandb, mlflow, or none; default
    tensorboard where it is installed."""
    cache: bool = False
    """Keep decoded images, down-sized as far as the smallest crop allows, for later epochs: in
    memory where they fit into half of what is free, else in one file in the run's folder as
    long as it trains."""
    max_pixels: int = MAX_PIXELS
    """Skip images with more pixels (height times width): a small file may decode to billions.
    The default is what Pillow takes."""
    seed: int = 0
    """Of everything random."""
    precision: str = "auto"
    """auto, or one of Lightning's such as 32-true or bf16-mixed."""
    devices: int | str = "auto"
    """How many devices of each machine to use, or auto."""
    num_nodes: int = 1
    """How many machines to use (see docs/scaling.md)."""
    strategy: str = "auto"
    """auto, ddp, fsdp for networks that are too large for a device (each then keeps a share of
    the weights), or another of Lightning's."""
    num_workers: int | None = None
    """Data workers a device; default by the cores there are."""
    compile: bool = False
    """Train the encoder through torch.compile: the first step takes a minute or more, later
    ones less time on most GPUs. It needs Triton, or a C++ compiler without a GPU."""
    resume: bool = False
    """Continue the run in --out, if there is one; its own options are kept."""
    overwrite: bool = False
    """Replace the run in --out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("data", path_list(self.data))
        self._set("pretext", whole_pretext(self.pretext))
        for name in ("epochs", "batch_size"):
            check_count(name, getattr(self, name))
        check_count("accumulate_grad_batches", self.accumulate_grad_batches, LARGEST_STEP)
        check_image_size(self.image_size)
        parse_time(self.max_time)
        if self.epochs is not None and self.max_time is not None:
            raise UserError(
                "give --epochs or --max_time, not both (--epochs null takes back a --config's)"
            )
        check_warmup("warmup", self.warmup)
        check_rates(self.lr, self.weight_decay)
        check_positive("base_lr", self.base_lr, LARGEST_RATE)
        if self.lr is not None and self.base_lr is not None:
            raise UserError("give --lr or --base_lr, not both")
        check_seed(self.seed)
        logger_names(self.logger)
        if self.optimizer is not None:
            check_optimizer(self.optimizer)

    @classmethod
    def merged(cls, layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """See ``Options``. The last source to name a pretext wins; hyperparameters are its own.

        A file may hold ``overrides``: by pretext, options for it in place of those of the file.
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
                if part.get("name", name) == name:  # not the hyperparameters of another pretext
                    pretext |= part
            source |= chosen
        values = super().merged(sources)
        if pretext:
            kinds = {"name": str, **hyperparameters(name)}
            for one in pretext:
                if one not in kinds:
                    raise unknown_option(f"pretext.{one}", [f"pretext.{known}" for known in kinds])
                pretext[one] = parse_value(f"pretext.{one}", pretext[one], kinds[one])
            values["pretext"] = {"name": name, **pretext}
        return values

    @classmethod
    def rows(cls, layers: Sequence[Mapping[str, Any]] = ()) -> list[OptionRow]:
        """See ``Options``; with the hyperparameters of the pretext that ``layers`` name."""
        made = pretext_class(_named_pretext(layers)[0])
        defaults, docs = inspect.signature(made).parameters, _argument_docs(made)
        return [
            *super().rows(layers),
            *(
                option_row(f"pretext.{name}", kind, defaults[name].default, docs.get(name, ""))
                for name, kind in hyperparameters(made.info.name).items()
            ),
        ]

    @property
    def pretext_name(self) -> str:
        """The name of the pretext."""
        return str(_as_mapping(self.pretext)["name"])

    def task(self, encoder: Encoder) -> PretextTask:
        given = {k: v for k, v in _as_mapping(self.pretext).items() if k != "name"}
        task = pretext_class(self.pretext_name)(encoder, **given)
        if self.progressive_resizing:
            _check_resizing(task)
        return task

    def optimizer_settings(self, task: PretextTask, batch_size: int) -> OptimizerSettings:
        """What trains the task; ``batch_size`` is that of an optimizer step."""
        own = task.optimizer_settings
        name = self.optimizer or own.name
        if name != own.name and self.lr is None and self.base_lr is None:
            raise UserError(
                f"--optimizer {name} needs an --lr: {task.info.name}'s {own.lr} is for {own.name}"
            )
        if self.base_lr is not None:  # linearly: the rule of the papers that give it so
            own = replace(own, lr=self.base_lr, scaling="linear")
        decay = own.weight_decay if self.weight_decay is None else self.weight_decay
        lr = self.lr or own.scaled_lr(batch_size)
        return replace(own, name=name, lr=lr, weight_decay=decay)


def _check_resizing(task: PretextTask) -> None:
    if not task.info.any_size:
        able = ", ".join(name for name, made in PRETEXTS.items() if made.info.any_size)
        raise UserError(
            f"--progressive_resizing: the views of {task.info.name} can't change their size; "
            f"those of {able} can"
        )
    encoder = task.encoder
    try:
        encoder.check_image_size(encoder.fitting_size(encoder.image_size * SMALLEST))
    except UserError as error:
        raise UserError(f"--progressive_resizing: {error}") from None


def parse_time(text: str | int | None) -> float | None:
    """Seconds from ``HH:MM:SS``, ``MM:SS``, seconds, or days as in ``1-00:00:00``.

    Raises:
        UserError: it is none of these, not above 0, or longer than ten years.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(?:(?:(?:(\d+)[-:])?(\d+):)?(\d+):)?(\d+)", str(text).strip())
    if match is None:
        raise UserError(f"--max_time {brief(text)} is no time: give HH:MM:SS or seconds")
    if len(match[0]) > 20:
        raise UserError(f"--max_time {brief(text)} is longer than {LONGEST_DAYS} days")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise UserError(f"--max_time {text} leaves no time")
    if total > LONGEST_DAYS * 24 * 60 * 60:
        raise UserError(f"--max_time {text} is longer than {LONGEST_DAYS} days")
    return float(total)


def make_encoder(
    backbone: str | None, image_size: int | None, init: StrPath, paths: Sequence[str], pretext: str
) -> Encoder:
    """The encoder to start from.

    Args:
        backbone: a timm name; None for that of ``init``, or the default.
        image_size: side in pixels; None for that of ``init``, or what suits the images.
        init: ``random``, ``pretrained``, a run, an encoder folder, or a state dict file.
        paths: the images.
        pretext: which pretext the default has to suit.

    Raises:
        UserError: there is no such thing, or it is of another backbone.
    """
    init = os.fspath(init)
    if Path(init).is_dir():
        encoder = load_encoder(init)
        if backbone is not None and backbone.split(".")[0] != encoder.backbone:
            raise UserError(f"--init {init} is a {encoder.backbone}, not --backbone {backbone}")
        if image_size is not None:
            encoder.use_image_size(image_size)
        return encoder
    size = image_size or suitable_size(paths)
    name = backbone or default_backbone(pretext, size)
    if init in ("random", "pretrained"):
        return build_encoder(name, size, pretrained=init == "pretrained")
    if not Path(init).is_file():
        raise UserError(
            f"--init {init} does not exist: give random, pretrained, a run, an encoder folder or a "
            f"state dict file"
        )
    encoder = build_encoder(name, size)
    load_weights(encoder, Path(init))
    return encoder


def default_backbone(pretext: str, image_size: int) -> str:
    """A small backbone that suits a pretext.

    Args:
        pretext: its name.
        image_size: side in pixels.
    """
    if pretext_class(pretext).info.backbones in ("any", "CNN"):
        return "resnet18"
    return "vit_tiny_patch16_224" if image_size >= 64 else "vit_tiny_patch4_32"


def whole_pretext(pretext: str | Mapping[str, Any]) -> dict[str, Any]:
    """The name of a pretext and all its hyperparameters, those not given with their defaults.

    Raises:
        UserError: The pretext or a hyperparameter is not known.
    """
    given = _as_mapping(pretext)
    name = given.pop("name", DEFAULT_PRETEXT)
    made = pretext_class(name)
    defaults = inspect.signature(made).parameters
    known = {one: defaults[one].default for one in hyperparameters(name)}
    for one in given:
        if one not in known:
            raise UserError(f"unknown option --pretext.{one} of {name}: {did_you_mean(one, known)}")
    check_hyperparameters(made, given)
    return {"name": name, **known, **given}


def hyperparameters(name: str) -> dict[str, Any]:
    """The hyperparameters of a pretext with their types.

    Raises:
        UserError: The pretext is not known.
    """
    kinds = annotations(pretext_class(name))
    del kinds["encoder"]
    return kinds


def _as_mapping(pretext: Any) -> dict[str, Any]:
    """A pretext as a mapping of its name, where that is given, and hyperparameters."""
    named = {"name": pretext} if isinstance(pretext, str) else pretext
    if not isinstance(named, Mapping) or not isinstance(named.get("name", ""), str):
        raise UserError(f"--pretext {brief(pretext)} is neither a name nor a mapping with one")
    return dict(named)


def _named_pretext(
    layers: Sequence[Mapping[str, Any]],
) -> tuple[str, list[dict[str, Any]]]:
    """The pretext that sources of options name last, and the sources with it as a mapping."""
    name, sources = DEFAULT_PRETEXT, [dict(layer) for layer in layers]
    for source in sources:
        if "pretext" in source:
            source["pretext"] = _as_mapping(source["pretext"])
            name = source["pretext"].get("name", name)
    return name, sources


def _is_nested(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(one, Mapping) for one in value.values())


def _argument_docs(made: type) -> dict[str, str]:
    """What the section ``Args`` of a class's docstring says of each argument."""
    section = (inspect.getdoc(made) or "").partition("Args:\n")[2].partition("\n\n")[0]
    docs: dict[str, str] = {}
    for line in inspect.cleandoc(f"\n{section}").splitlines():
        if line.startswith(" ") and docs:  # goes on
            name = next(reversed(docs))
            docs[name] = f"{docs[name]} {line.strip()}"
        else:
            name, _, text = line.partition(": ")
            docs[name] = text
    return docs
