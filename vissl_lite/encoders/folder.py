"""Encoder folders: save and load encoders in timm's format, without unpickling objects."""

import io
import json
import logging
import os
import pickle
import struct
import sys
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from timm.models import model_entrypoint
from torch import Tensor, nn

from vissl_lite.data.atomic_file import atomic_write
from vissl_lite.data.image_reader import MAX_BANDS, ImageReader
from vissl_lite.data.image_survey import ANY_IMAGES, ImageSet
from vissl_lite.data.reading import slice_along, slice_axis
from vissl_lite.encoders.config import (
    BUILD_ERRORS,
    ENCODER_CONFIG,
    create,
    draw_up,
    read_model_config,
)
from vissl_lite.encoders.encoder import (
    Encoder,
    adapt_encoder,
    build_encoder,
    first_line,
    first_weights,
    open_residual_branches,
    patch_multiple,
)
from vissl_lite.errors import UserError, check_count

log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"

# Maximum side of the patches of a file that are resampled to those of a backbone, which takes time
# and memory that grow with its fourth power. timm's models have patches of up to 32 pixels.
_LARGEST_PATCH = 64


def save_encoder(encoder: Encoder, folder: Path, about: dict[str, Any]) -> None:
    """Write an encoder folder in timm's format.

    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads the same model.

    Args:
        encoder: Encoder to save.
        folder: Destination folder; created if missing.
        about: How it was trained; written under ``vissl_lite`` in ``config.json``.
    """
    save_model(encoder, folder, about)


def save_model(
    encoder: Encoder, folder: Path, about: dict[str, Any], label_names: Sequence[str] = ()
) -> None:
    """Write a timm model as a folder that timm can load; each file is written atomically.

    Args:
        encoder: Encoder of the model, which may have got a classifier.
        folder: Destination folder; created if missing.
        about: How it was trained; written under ``vissl_lite`` in ``config.json``, together with
            how images are read.
        label_names: Names of the classes of its classifier.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model, image_size = encoder.model, encoder.image_size
    reader = encoder.reader.as_dict()
    config = dict(model.pretrained_cfg)
    channels = config["input_size"][0]
    kept = ("mean", "std", "interpolation", "first_conv", "classifier", "license")
    content = {
        "architecture": config["architecture"],
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "pretrained_cfg": {
            **{key: config[key] for key in kept if config.get(key) is not None},
            "tag": "vissl_lite",
            "input_size": [channels, image_size, image_size],
            "fixed_input_size": False,
            "crop_pct": 1.0,
            "crop_mode": "center",
            "num_classes": model.num_classes,
        },
        "model_args": encoder.model_args,
        **({"label_names": list(label_names)} if label_names else {}),
        "vissl_lite": {**about, **({"reader": reader} if reader else {})},
    }
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with atomic_write(folder / WEIGHTS) as part:
        save_file(tensors, part, metadata={"format": "pt"})
    with atomic_write(folder / ENCODER_CONFIG) as part:
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_encoder(
    source: str | Path,
    image_size: int | None = None,
    images: ImageSet = ANY_IMAGES,
) -> Encoder:
    """Load an encoder.

    Args:
        source: A run, an encoder folder, ``timm:NAME`` (pre-trained weights from the hub) or
            ``random:NAME`` (untrained, with open residual branches; reproducible through
            ``torch.manual_seed``).
        image_size: Side of the images in pixels for ``timm:`` and ``random:``; default: that of
            the backbone, or of a folder of the hub. Ignored for folders that vissl_lite has saved,
            which record their size.
        images: Images that it is used on. An encoder of photographs is adapted to images that are
            none; one of bands keeps its reader, unless the settings ask for another.

    Raises:
        UserError: If there is no encoder, it is damaged, its training has diverged, or its weights
            can't be built for the size.
    """
    kind, _, name = str(source).partition(":")
    if name and kind in ("timm", "random"):
        encoder = build_encoder(name, image_size, kind == "timm", images.reader)
        if kind == "random":  # as for pre-training, which is compared with it
            open_residual_branches(encoder)
        return encoder
    folder = Path(source)
    if not folder.exists():
        raise UserError(
            f"no encoder at {source}: give a run, an encoder folder, timm:NAME or random:NAME"
        )
    inside = _find_folder(folder)
    if inside is not None:
        return use_on(load_model(inside, num_classes=0, image_size=image_size)[0], images)
    tuned = folder / "model"  # of a run of finetune
    if _find_folder(tuned) is not None:
        raise UserError(
            f"{source} holds no encoder of its own, but a fine-tuned model: give {tuned} to use "
            f"the encoder in it"
        )
    raise UserError(
        f"{source} holds no encoder: neither {ENCODER_CONFIG} nor encoder/{ENCODER_CONFIG} is there"
    )


def is_untrained(source: str | os.PathLike[str]) -> bool:
    """Whether a source of ``load_encoder`` is a network with random weights, ``random:NAME``."""
    return os.fspath(source).startswith("random:")


def made_here(source: str | os.PathLike[str]) -> bool:
    """Whether a run or folder holds an encoder that vissl_lite has saved, not one of the hub.

    Args:
        source: A run or an encoder folder.

    Raises:
        UserError: The folder is damaged.
    """
    folder = _find_folder(source)
    return folder is not None and "vissl_lite" in read_model_config(folder / ENCODER_CONFIG)


def _find_folder(source: str | os.PathLike[str]) -> Path | None:
    """The encoder folder that a path is or holds, as a run does; None if there is none."""
    folders = (Path(source), Path(source) / "encoder")
    return next((one for one in folders if (one / ENCODER_CONFIG).is_file()), None)


def use_on(encoder: Encoder, images: ImageSet) -> Encoder:
    """An encoder for images, adapted to their bands where it does not fit them.

    Args:
        encoder: Returned as it is where it fits.
        images: Images to use it on.

    """
    known = encoder.reader
    if not images.paths:
        return encoder
    if known.bands is not None and not images.settings.chosen().keys() - {"axis"}:
        encoder.reader = replace(known, axis=slice_axis())
        return encoder
    return encoder if images.reader == known else adapt_encoder(encoder, images.reader)


def choose_slice_axis(given: int | None, *encoders: str | os.PathLike[str] | None) -> None:
    """Set the axis of the slices of volumes (``slice_along``) before any path is looked for.

    Args:
        given: The axis that the user gives; None for the one that the encoders were trained on.
        encoders: Runs, encoder folders, or anything else that ``load_encoder`` takes.

    Raises:
        UserError: They were trained on slices along different axes and none is given.
    """
    slice_along(given)
    known: dict[int | None, str] = {}
    for source in encoders:
        folder = _find_folder(source) if source is not None and given is None else None
        if source is None or folder is None:
            continue
        with suppress(UserError):  # a damaged one is reported when it is loaded
            reader = read_model_config(folder / ENCODER_CONFIG)["reader"]
            if reader.bands is not None:
                known[reader.axis] = os.fspath(source)
    if len(known) > 1:
        words = ", ".join(
            f"{source}: {'none' if axis is None else axis}" for axis, source in known.items()
        )
        raise UserError(f"the encoders know different axes of slices ({words}): give --axis")
    if known:
        slice_along(next(iter(known)))


def encoder_for(source: str, image_size: int | None, images: ImageSet = ANY_IMAGES) -> Encoder:
    """Load an encoder for use on images.

    Args:
        source: A run, an encoder folder, ``timm:NAME`` or ``random:NAME``.
        image_size: Side of the images in pixels; default: that of the encoder.
        images: Images that it is used on; see ``load_encoder``.

    Raises:
        UserError: If there is no such encoder, or it supports neither the size nor the images.
    """
    check_count("image_size", image_size)
    encoder = load_encoder(source, image_size, images)
    if image_size is not None:
        encoder.use_image_size(image_size)
    return encoder


def fitting_size(source: str, size: int | None) -> int | None:
    """Choose the size nearest to one that was chosen for images which an encoder supports.

    Args:
        source: A run, an encoder folder, ``timm:NAME`` or ``random:NAME``.
        size: Side of the images in pixels; None, for that of the encoder, stays None.

    Returns:
        The size, rounded to patches of the encoder (see ``patch_multiple``); the size of a folder
        of the hub whose weights can't be built for another one, which is logged.

    Raises:
        UserError: The folder is damaged.
    """
    if size is None:
        return None
    kind, _, name = source.partition(":")
    if name and kind in ("timm", "random"):
        return patch_multiple(name, size)
    folder = _find_folder(source)
    if folder is None:  # which is refused when it is loaded
        return size
    config = read_model_config(folder / ENCODER_CONFIG)
    size, own = patch_multiple(config["architecture"], size), _own_size(config)
    if "vissl_lite" in config or size == own:
        return size
    try:
        load_model(folder, num_classes=0, image_size=size)
    except UserError as error:
        load_model(folder, num_classes=0)  # a damaged folder has no size
        log.info("%s: so it is used at its own size of %d pixels", error, own)
        return own
    return size


def _own_size(config: Mapping[str, Any]) -> int:
    """Side of the images in pixels that an encoder folder records."""
    return int(config["pretrained_cfg"]["input_size"][-1])


def load_model(
    folder: Path, num_classes: int | None = None, image_size: int | None = None
) -> tuple[Encoder, dict[str, Any]]:
    """Build an encoder, perhaps with a classifier, from its folder and load its weights.

    Args:
        folder: Folder with ``config.json`` and ``model.safetensors``.
        num_classes: 0 to leave out the classifier; default: the number in the folder.
        image_size: Side of the images in pixels that a folder of the hub is built for, as timm
            builds the model of that name: with position embeddings and the like resampled. Default:
            that in the folder. Ignored for folders that vissl_lite has saved.

    Returns:
        The encoder, whose model has the folder's ``pretrained_cfg``, and the content of
        ``config.json``.

    Raises:
        UserError: If the folder is damaged, its weights belong to another architecture, or can't be
            built for the size.
    """
    config = read_model_config(folder / ENCODER_CONFIG)
    name, has_classes = config["architecture"], config["num_classes"]
    classes = has_classes if num_classes is None else num_classes
    shapes = _read_shapes(folder / WEIGHTS)
    try:
        drawn = draw_up(config, classes, len(shapes), (folder / WEIGHTS).stat().st_size)
    except BUILD_ERRORS as error:
        raise UserError(f"{folder / ENCODER_CONFIG} is damaged: {first_line(error)}") from None
    if "vissl_lite" in config:
        if classes == 0 and has_classes:
            shapes = _without_classifier(shapes, drawn)
        _compare(drawn, shapes, str(folder), name)
        weights = read_weights(folder / WEIGHTS)
    else:
        if image_size in (None, _own_size(config)):
            if hasattr(drawn, "dynamic_img_size") and drawn.patch_embed.strict_img_size:
                # build_encoder does the same for the names of the models of the hub
                config["model_args"]["dynamic_img_size"] = True
            weights = _converted(read_weights(folder / WEIGHTS), drawn)
        else:
            config, weights = _resized(folder, config, classes, image_size)
    model = create(config, classes)
    if classes == 0 and has_classes:
        weights = _without_classifier(weights, model)
    _load(model, weights, str(folder), name)
    return Encoder(model, config["model_args"], _own_size(config), config["reader"]), config


def _resized(
    folder: Path, config: dict[str, Any], classes: int, size: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and weights of a folder of the hub for images of another size.

    Args:
        folder: The folder.
        config: Content of its ``config.json``.
        classes: Number of classes; 0 for no classifier.
        size: Side of the images in pixels.

    Raises:
        UserError: The weights can't be resampled to this size, or the backbone does not support it.
    """
    name, own = config["architecture"], _own_size(config)
    saved, args = config["pretrained_cfg"], config["model_args"]
    fits = patch_multiple(name, size)
    advice = f"give --image_size {own}" if fits == size else f"{fits} pixels fit"
    refused = f"the weights in {folder} can't be built for {size} pixels"
    weights = read_weights(folder / WEIGHTS)
    saved = {**saved, "input_size": [saved["input_size"][0], size, size]}
    # as in build_encoder: some backbones accept no img_size, others no dynamic_img_size
    for more in ({"img_size": size, "dynamic_img_size": True}, {"img_size": size}, {}):
        changed = {**config, "pretrained_cfg": saved, "model_args": {**args, **more}}
        try:
            drawn = draw_up(changed, classes, len(weights), (folder / WEIGHTS).stat().st_size)
            break
        except BUILD_ERRORS as error:
            if not (more and isinstance(error, TypeError) and "img_size" in str(error)):
                raise UserError(f"{refused}: {first_line(error)}; {advice}") from None
    converted, own_state = _converted(weights, drawn), drawn.state_dict()
    for key, value in converted.items():
        if key in own_state and value.shape != own_state[key].shape:
            raise UserError(
                f"{refused}: timm does not resample {key} of {name} from "
                f"{tuple(value.shape)} to {tuple(own_state[key].shape)}; {advice}"
            )
    return changed, converted


def check_finite(module: nn.Module, source: str) -> None:
    """Raise a UserError for weights that are not finite or a negative running variance.

    Args:
        module: Module to check.
        source: Where the weights come from, for the message.
    """
    tensors = [*module.named_parameters(), *module.named_buffers()]
    if not all(one.isfinite().all() for _, one in tensors):
        raise UserError(
            f"the weights of {source} are not finite numbers: its training has diverged, or the "
            f"file is damaged; train it again with a lower --lr or a longer --warmup"
        )
    for name, one in tensors:
        if name.endswith("running_var") and (one < 0).any():
            raise UserError(f"the weights of {source} are damaged: the variance {name} is negative")


def load_weights(encoder: Encoder, file: Path) -> None:
    """Load a plain timm state dict without executing code in the file.

    Args:
        encoder: Encoder to load into; a classifier in the file is ignored.
        file: A ``.safetensors`` file, or a state dict written by ``torch.save``, bare or under
            the key ``state_dict`` or ``model``. It may be in another format that timm converts,
            such as those of DINOv2 and DINOv3, and position embeddings and the like are resampled
            to the image size.

    Raises:
        UserError: If the file can't be read safely or belongs to another architecture.
    """
    _load_converted(encoder, _converted(read_weights(file), encoder.model), file)


def _load_converted(encoder: Encoder, weights: dict[str, Tensor], file: Path) -> None:
    """Load the weights of a state dict file that ``_converted`` has returned."""
    weights = _without_classifier(weights, encoder.model)  # CLIP's projection has become one
    hint = (
        f"; perhaps they are of another backbone (--backbone) or can't be resampled to "
        f"{encoder.image_size} pixels (--image_size)"
    )
    _load(encoder.model, weights, str(file), encoder.backbone, hint)


def encoder_from_file(
    file: Path, backbone: str, image_size: int | None = None, images: ImageSet = ANY_IMAGES
) -> Encoder:
    """Build a backbone with the weights of a plain timm state dict.

    A file of three channels is taken to be of photographs, and adapted to other images as the
    folder of such an encoder is; see ``adapt_encoder``. One of as many channels as the images have
    is taken to be of their bands, in this order.

    Args:
        file: See ``load_weights``.
        backbone: Name of the timm architecture of the file.
        image_size: Side of the images in pixels; default: that of the backbone.
        images: Images that it is used on.

    Raises:
        UserError: If the file can't be read safely, or belongs to another architecture, or the
            backbone does not exist or does not support the size.
    """
    encoder = build_encoder(backbone, image_size, reader=images.reader)
    weights = _converted(read_weights(file), encoder.model)
    channels = _count_channels(weights, encoder)
    if channels == 3 and images.reader.bands is not None:
        encoder = build_encoder(backbone, image_size)
    elif channels != images.reader.channels:
        encoder = build_encoder(backbone, image_size, reader=_unnamed_bands(channels))
    _load_converted(encoder, weights, file)
    return encoder if encoder.reader == images.reader else adapt_encoder(encoder, images.reader)


def _count_channels(weights: Mapping[str, Tensor], encoder: Encoder) -> int:
    """Number of channels of the images that weights are for; the encoder's own if not known."""
    channels, own = encoder.reader.channels, encoder.model.state_dict()
    for name in first_weights(encoder.model):
        if name in weights and name in own and weights[name].ndim == own[name].ndim == 4:
            # a stem may take several values of each channel, those of neighboring pixels
            found = weights[name].shape[1] * channels / own[name].shape[1]
            return int(found) if found in range(1, MAX_BANDS + 1) else channels
    return channels


def _unnamed_bands(count: int) -> ImageReader:
    """Bands of which nothing is known but their number."""
    return ImageReader(
        bands=tuple(range(count)),
        low=(0.0,) * count,
        high=(1.0,) * count,
        mean=(0.5,) * count,
        std=(0.25,) * count,
    )


def _converted(weights: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Weights of a file as timm converts them when it loads the pre-trained weights of a model.

    The filter of the architecture renames the tensors of other formats, leaves out those that a
    model computes itself, and resamples what depends on the image size.

    Args:
        weights: Tensors by name.
        model: The timm model, which may be on the meta device.

    Returns:
        The tensors; those of the file where timm can't convert them, as it can't those of another
        architecture.
    """
    weights = dict(weights)  # some filters change what they are given
    builder = sys.modules[model_entrypoint(model.pretrained_cfg["architecture"]).__module__]
    convert = getattr(builder, "checkpoint_filter_fn", None)
    patches = [one for name, one in weights.items() if one.ndim == 4 and name.endswith("weight")]
    if convert is None or any(max(one.shape[2:]) > _LARGEST_PATCH for one in patches):
        return weights
    # The filter of EVA prints an error for each layer without a bias, and torch warns of how timm
    # interpolates the tables of Swin
    with (
        suppress(*BUILD_ERRORS),
        redirect_stdout(io.StringIO()),
        warnings.catch_warnings(action="ignore"),
    ):
        converted: dict[str, Tensor] = convert(dict(weights), model)
        if not any(one.is_meta for one in converted.values()):
            return converted
    return weights


# Exceptions that torch.load and safetensors raise on arbitrary bytes
_UNREADABLE = (
    pickle.UnpicklingError,
    SafetensorError,
    RuntimeError,
    OSError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    struct.error,
    zipfile.BadZipFile,
)


def read_torch(file: Path) -> Any:
    """Read a file written by ``torch.save``; only tensors and plain values are unpickled.

    Raises:
        UserError: If the file is missing, damaged, or contains other Python objects.
    """
    if not file.is_file():
        raise UserError(f"{file} does not exist")
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                # torch never compresses; a small compressed file could inflate to a very large one
                if any(one.compress_type != zipfile.ZIP_STORED for one in archive.infolist()):
                    raise ValueError("it is compressed")
        return torch.load(file, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        reason = first_line(error)
        if isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error).lower():
            reason = "it holds pickled Python objects beside tensors, which are never executed"
        raise UserError(f"{file} can't be loaded: {reason}") from None


def read_weights(file: Path) -> dict[str, Tensor]:
    """Read tensors by name from a safetensors or torch file; only tensors are unpickled.

    Raises:
        UserError: If the file is missing, damaged, or contains anything but tensors.
    """
    if file.suffix == ".safetensors":
        if not file.is_file():
            raise UserError(f"{file} does not exist")
        try:
            return load_file(file)
        except _UNREADABLE as error:
            raise UserError(f"{file} can't be loaded: {first_line(error)}") from None
    content = read_torch(file)
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{file} is not a state dict: expected tensors by name")
    return {str(name).removeprefix("module."): value for name, value in content.items()}


def _read_shapes(file: Path) -> dict[str, list[int]]:
    """Read the shapes of the tensors in a safetensors file from its header, by name.

    Raises:
        UserError: If the file is missing or damaged.
    """
    if not file.is_file():
        raise UserError(f"{file} does not exist")
    try:
        with safe_open(file, "pt") as opened:
            names = opened.keys()
            return {name: opened.get_slice(name).get_shape() for name in names}
    except _UNREADABLE as error:
        raise UserError(f"{file} can't be loaded: {first_line(error)}") from None


def _without_classifier(weights: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Weights without those of the classifier, and of layers beside it that the model lacks."""
    classifier, own = model.pretrained_cfg.get("classifier") or (), model.state_dict()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    layers = tuple(f"{name}." for name in names)
    # the classifier of LeViT has a normalization, head.bn beside head.linear; the head of
    # ConvNeXt has one, head.norm beside head.fc, that an encoder keeps
    around = tuple(f"{name.rpartition('.')[0]}." for name in names if "." in name)
    return {
        key: value
        for key, value in weights.items()
        if not key.startswith(layers) and (key in own or not key.startswith(around))
    }


def _compare(
    model: nn.Module,
    shapes: Mapping[str, Sequence[int]],
    source: str,
    name: str,
    hint: str = "",
) -> None:
    """Raise a UserError, which ends in a hint, if names and shapes differ from those of a model."""
    own = model.state_dict()
    missing = sorted(set(own) - set(shapes))
    unexpected = sorted(set(shapes) - set(own))
    shaped = [key for key in own if key in shapes and list(own[key].shape) != list(shapes[key])]
    if missing or unexpected or shaped:
        example = (missing or unexpected or shaped)[0]
        raise UserError(
            f"the weights in {source} are not those of {name}: {len(missing)} tensors missing, "
            f"{len(unexpected)} too many, {len(shaped)} of another shape, the first {example}{hint}"
        )


def _load(
    model: nn.Module, weights: dict[str, Tensor], source: str, name: str, hint: str = ""
) -> None:
    _compare(model, {key: value.shape for key, value in weights.items()}, source, name, hint)
    load_tensors(model, weights, source)
    log.debug("%d tensors loaded from %s", len(weights), source)


def load_tensors(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors into a module that has all of their names and shapes.

    Args:
        module: Module to load into; it may have further tensors.
        weights: Tensors by name.
        source: Where the weights come from, for the message.

    Raises:
        UserError: If the data types do not match or values are not finite.
    """
    own = module.state_dict()
    for key, value in weights.items():
        if value.is_complex() or value.is_floating_point() != own[key].is_floating_point():
            raise UserError(f"the weights in {source} are damaged: {key} is of {value.dtype}")
    try:
        module.load_state_dict(weights, strict=False)
    except (RuntimeError, NotImplementedError) as error:  # Data types that torch can't copy
        raise UserError(f"the weights in {source} are damaged: {first_line(error)}") from None
    check_finite(module, source)
