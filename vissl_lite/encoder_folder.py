"""The encoder folder: an encoder on disk, in timm's own format. Nothing is ever unpickled."""

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vissl_lite.data.whole_file import whole_file
from vissl_lite.encoder import Encoder, build_encoder, first_line
from vissl_lite.errors import UserError, check_count

log = logging.getLogger(__name__)

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def save_encoder(encoder: Encoder, folder: Path, about: dict[str, Any]) -> None:
    """Write an encoder folder, in timm's own format.

    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` gives the same outputs.

    Args:
        encoder: what to save.
        folder: where; made if missing.
        about: how it was trained; stands under ``vissl_lite`` in ``config.json``.
    """
    save_model(encoder.model, folder, encoder.model_args, encoder.image_size, {"vissl_lite": about})


def save_model(
    model: Any, folder: Path, model_args: dict[str, Any], image_size: int, extra: dict[str, Any]
) -> None:
    """Write any timm model as a folder that timm loads; each file appears whole or not at all.

    Args:
        model: the timm model.
        folder: where; made if missing.
        model_args: arguments that ``timm.create_model`` needs beside the name.
        image_size: side in pixels.
        extra: more keys of ``config.json``.
    """
    folder.mkdir(parents=True, exist_ok=True)
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
        "model_args": model_args,
        **extra,
    }
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with whole_file(folder / WEIGHTS) as part:
        save_file(tensors, part, metadata={"format": "pt"})
    with whole_file(folder / CONFIG) as part:
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_encoder(source: str | Path, image_size: int | None = None) -> Encoder:
    """Load an encoder.

    Args:
        source: a run, an encoder folder, ``timm:NAME`` (pre-trained weights from the hub) or
            ``random:NAME`` (untrained; reproducible through ``torch.manual_seed``).
        image_size: for ``timm:`` and ``random:``, side of the images in pixels; default the
            backbone's own. Folders know their size.

    Raises:
        UserError: there is no encoder, or it is damaged.
    """
    kind, _, name = str(source).partition(":")
    if name and kind in ("timm", "random"):
        return build_encoder(name, image_size, pretrained=kind == "timm")
    folder = Path(source)
    if not folder.exists():
        raise UserError(
            f"no encoder at {source}: give a run, an encoder folder, timm:NAME or random:NAME"
        )
    for inside in (folder, folder / "encoder"):
        if (inside / CONFIG).is_file():
            model, config = load_model(inside, num_classes=0)
            size = config["pretrained_cfg"]["input_size"][-1]
            return Encoder(model, config.get("model_args", {}), size)
    raise UserError(f"{source} holds no encoder: neither {CONFIG} nor encoder/{CONFIG} is there")


def encoder_for(source: str, image_size: int | None) -> Encoder:
    """Load an encoder to be used on labelled images.

    Args:
        source: a run, an encoder folder, ``timm:NAME`` or ``random:NAME``.
        image_size: side in pixels; default the encoder's.

    Raises:
        UserError: there is no such encoder, it has diverged, or it can't take the size.
    """
    check_count("image_size", image_size)
    encoder = load_encoder(source, image_size)
    if image_size is not None:
        encoder.use_image_size(image_size)
    if not all(p.isfinite().all() for p in encoder.parameters()):
        raise UserError(
            f"the weights of {source} are not finite numbers: its training has diverged; train it "
            f"again with a lower --lr or a longer --warmup"
        )
    return encoder


def load_model(folder: Path, num_classes: int | None = None) -> tuple[Any, dict[str, Any]]:
    """Build a timm model from its folder and load the weights.

    Args:
        folder: with ``config.json`` and ``model.safetensors``.
        num_classes: 0 to leave out a classifier; default what the folder holds.

    Returns:
        The model, with the folder's ``pretrained_cfg``, and the content of ``config.json``.

    Raises:
        UserError: the folder is damaged or its weights are another architecture's.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        name, saved = config["architecture"], config["pretrained_cfg"]
        _ = tuple(saved["mean"]), tuple(saved["std"]), int(saved["input_size"][-1])
        model_args = dict(config.get("model_args", {}))
        model_args.pop("num_classes", None)  # timm writes it here too
        if not isinstance(name, str):
            raise TypeError(f"architecture {name}")
        has_classes = config.get("num_classes", saved.get("num_classes", 0))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / CONFIG} is damaged: {error!r}") from None
    if not timm.is_model(name):
        raise UserError(f"{folder / CONFIG}: unknown backbone {name}")
    if "label_names" in config:
        saved = saved | {"label_names": config["label_names"]}
    classes = has_classes if num_classes is None else num_classes
    overlay = {key: value for key, value in saved.items() if key != "tag"}
    try:
        model = timm.create_model(
            name, num_classes=classes, pretrained_cfg_overlay=overlay, **model_args
        )
    except (TypeError, ValueError, AssertionError, RuntimeError, AttributeError) as error:
        raise UserError(f"{folder / CONFIG} is damaged: {first_line(error)}") from None
    weights = read_weights(folder / WEIGHTS)
    if classes == 0 and has_classes:
        weights = _without_classifier(weights, model)
    _load(model, weights, str(folder), name)
    return model, config


def load_weights(encoder: Encoder, file: Path) -> None:
    """Load a plain timm state dict, without running any code that the file may hold.

    Args:
        encoder: takes the weights; a classifier in the file is left out.
        file: ``.safetensors``, or what ``torch.save`` wrote of a state dict, bare or under the key
            ``state_dict`` or ``model``.

    Raises:
        UserError: the file can't be read safely, or is of another architecture.
    """
    weights = _without_classifier(read_weights(file), encoder.model)
    _load(encoder.model, weights, str(file), encoder.backbone)


# What torch.load raises on bytes that are no checkpoint, whatever they happen to mean as a pickle
_UNREADABLE = (
    pickle.UnpicklingError, SafetensorError, RuntimeError, OSError, EOFError, LookupError,
    ValueError, TypeError, AttributeError,
)  # fmt: skip


def read_weights(file: Path) -> dict[str, Tensor]:
    """Read tensors by name from a safetensors or torch file; nothing is unpickled but tensors.

    Raises:
        UserError: the file is missing, damaged, or holds anything else than tensors.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{file} does not exist") from None
    except _UNREADABLE as error:
        reason = first_line(error)
        if isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error).lower():
            reason = "it holds pickled Python objects beside tensors, which are never executed"
        raise UserError(f"{file} can't be loaded: {reason}") from None
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{file} is no state dict: expected tensors by name")
    return {str(name).removeprefix("module."): value for name, value in content.items()}


def _without_classifier(weights: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    classifier = model.pretrained_cfg.get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return {k: v for k, v in weights.items() if not k.startswith(tuple(f"{n}." for n in names))}


def _load(model: nn.Module, weights: dict[str, Tensor], source: str, name: str) -> None:
    own = model.state_dict()
    missing = sorted(set(own) - set(weights))
    unexpected = sorted(set(weights) - set(own))
    shaped = [key for key in own if key in weights and own[key].shape != weights[key].shape]
    if missing or unexpected or shaped:
        example = (missing or unexpected or shaped)[0]
        raise UserError(
            f"the weights in {source} are not those of {name}: {len(missing)} tensors missing, "
            f"{len(unexpected)} too many, {len(shaped)} of another shape, the first {example}"
        )
    model.load_state_dict(weights)
    log.debug("%d tensors loaded from %s", len(weights), source)
