"""Read and validate ``config.json`` of an encoder folder, and build models from it.

Folders may be untrusted. timm's own loader passes on all values in the file, which can make it
fetch URLs, open files and allocate any amount of memory. Here only known arguments are accepted,
and a model is first built on the meta device and compared with the tensors in the weights file.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch

from vissl_lite.data.image_reader import MAX_BANDS, ImageReader
from vissl_lite.data.json_file import read_json
from vissl_lite.encoders.encoder import first_line
from vissl_lite.errors import UserError

ENCODER_CONFIG = "config.json"

# Maximum bytes of the file; names of 100,000 classes take less
_LARGEST_FILE = 16 * 2**20

# Maximum side of images in pixels; 128 of them take 26 GB
LARGEST_SIDE = 4096

# Maximum of widths, channels and so on, so that products of several still fit int64
_LARGEST_WIDTH = 2**20

# Maximum memory of a model, for example with position tables: this many bytes plus this multiple of
# the size of its weights file
_BESIDE, _TIMES = 256 * 2**20, 8

# Accepted keys of ``pretrained_cfg``: descriptions, not locations of weights
_DESCRIPTION = frozenset(
    {"mean", "std", "input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode"}
    | {"num_classes", "pool_size", "first_conv", "classifier", "license", "tag"}
)

# Accepted arguments of timm models: integers, fractions, booleans, strings; see ``_check_argument``
_SIZES = frozenset(
    {"img_size", "patch_size", "embed_dim", "num_heads", "in_chans", "depth"}
    | {"reg_tokens", "output_stride"}
)
_SHARES = frozenset(
    {"mlp_ratio", "init_values", "drop_rate", "drop_path_rate", "proj_drop_rate"}
    | {"attn_drop_rate", "pos_drop_rate", "patch_drop_rate"}
)
_SWITCHES = frozenset(
    {"dynamic_img_size", "dynamic_img_pad", "strict_img_size", "qkv_bias"}
    | {"class_token", "no_embed_class", "qk_norm"}
)
_WORDS = frozenset({"global_pool"})

# Exceptions that timm and torch raise for inconsistent arguments
BUILD_ERRORS = (
    TypeError,
    ValueError,
    AssertionError,
    RuntimeError,
    AttributeError,
    LookupError,
    ArithmeticError,
)


def read_model_config(file: Path) -> dict[str, Any]:
    """Read and validate the known keys of a ``config.json``; others are ignored.

    Args:
        file: File in the format of timm's ``save_for_hf``.

    Returns:
        ``architecture``, ``num_classes``, ``pretrained_cfg``, ``model_args`` and ``reader`` (an
        ``ImageReader``); if present also
        ``num_features``, ``label_names`` (a list) and ``vissl_lite`` (a mapping).

    Raises:
        UserError: If the file is missing or damaged, or has a value that is not accepted.
    """
    content = read_json(file, _LARGEST_FILE)
    try:
        return _checked(content)
    except (ValueError, LookupError, TypeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else first_line(error)
        raise UserError(f"{file} is damaged: {reason}") from None


def _checked(content: Any) -> dict[str, Any]:
    """Validate the content; raise ValueError, LookupError or TypeError if it is invalid."""
    content = _mapping(content, "the file")
    name = content["architecture"]
    if not isinstance(name, str) or not timm.is_model(name):
        raise ValueError(f"unknown backbone {_shown(name)}")
    saved = _mapping(content["pretrained_cfg"], "pretrained_cfg")
    saved = {key: value for key, value in saved.items() if key in _DESCRIPTION}
    _check_description(saved)
    model_args = _mapping(content.get("model_args") or {}, "model_args")
    model_args.pop("num_classes", None)  # timm writes it here too
    for key, value in model_args.items():
        _check_argument(key, value)
    classes = content.get("num_classes", saved.get("num_classes", 0))
    checked = {
        "architecture": name,
        "num_classes": _whole(classes, "num_classes", 0, _LARGEST_WIDTH),
        "pretrained_cfg": saved,
        "model_args": model_args,
    }
    if isinstance(content.get("num_features"), int):
        checked["num_features"] = content["num_features"]
    if "label_names" in content:
        checked["label_names"] = checked_names(content["label_names"], "label_names")
    if "vissl_lite" in content:
        checked["vissl_lite"] = _mapping(content["vissl_lite"], "vissl_lite")
    about = _mapping(content.get("vissl_lite") or {}, "vissl_lite")
    read_by = _mapping(about.get("reader") or {}, "reader")
    reader = ImageReader.from_dict(read_by, saved["mean"], saved["std"])
    if reader.channels != saved["input_size"][0]:
        raise ValueError(f"images with {reader.channels} bands do not fit input_size")
    return {**checked, "reader": reader}


def checked_names(value: Any, what: str) -> list[str]:
    """Return a non-empty list of strings; raise TypeError for anything else."""
    if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
        raise TypeError(f"{what} is not a list of names")
    return value


def checked_statistics(
    mean: Any, std: Any, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Validate the mean and standard deviation per channel, for values in [0, 1].

    Args:
        mean: List of one number in [0, 1] per channel.
        std: List of one number per channel, from 0.001 to 10: no real deviation is above 0.5, but 1
            is in use.
        channels: Number of channels.

    Raises:
        TypeError, ValueError: If they are not such lists.
    """
    found = []
    for what, values, least, most in (("mean", mean, 0.0, 1.0), ("std", std, 1e-3, 10.0)):
        if not isinstance(values, list) or len(values) != channels:
            raise TypeError(f"{what} is not a list of {channels} numbers: {_shown(values)}")
        found.append(tuple(_number(value, what, least, most) for value in values))
    return found[0], found[1]


def _check_description(saved: dict[str, Any]) -> None:
    size = saved["input_size"]
    if not isinstance(size, list) or len(size) != 3:
        raise ValueError(f"input_size is not [channels, height, width]: {_shown(size)}")
    channels = _whole(size[0], "input_size", 1, MAX_BANDS)
    checked_statistics(saved["mean"], saved["std"], channels)
    for side in size[1:]:
        _whole(side, "input_size", 1, LARGEST_SIDE)
    for key in ("interpolation", "crop_mode", "license", "tag"):
        if not isinstance(saved.get(key, ""), str | None):
            raise TypeError(f"{key} is not text: {_shown(saved[key])}")
    for key in ("first_conv", "classifier"):
        names = saved.get(key)
        some = names if isinstance(names, list) else [] if names is None else [names]
        if not all(isinstance(name, str) and name for name in some):
            raise TypeError(f"{key} is not a name of a layer: {_shown(names)}")
    if not isinstance(saved.get("fixed_input_size", False), bool):
        raise TypeError("fixed_input_size is neither true nor false")
    _number(saved.get("crop_pct", 1.0), "crop_pct", 0.0, 10.0)
    _whole(saved.get("num_classes", 0), "num_classes", 0, _LARGEST_WIDTH)
    pool = saved.get("pool_size")
    for side in [] if pool is None else pool if isinstance(pool, list) else [pool]:
        _whole(side, "pool_size", 1, LARGEST_SIDE)


def _check_argument(key: str, value: Any) -> None:
    """Raise a TypeError or ValueError for a model argument that is not accepted."""
    if value is None:
        return  # timm treats it as not given
    if key in _SIZES:
        most = LARGEST_SIDE if key == "img_size" else _LARGEST_WIDTH
        for one in value if isinstance(value, list) and len(value) == 2 else [value]:
            _whole(one, key, 0, most)
    elif key in _SHARES:
        _number(value, key, 0.0, 1000.0)
    elif key in _SWITCHES or (key in _WORDS and isinstance(value, bool)):
        if not isinstance(value, bool):
            raise TypeError(f"{key} is neither true nor false: {_shown(value)}")
    elif key in _WORDS:
        if not isinstance(value, str):
            raise TypeError(f"{key} is not a word: {_shown(value)}")
    else:
        known = sorted(_SIZES | _SHARES | _SWITCHES | _WORDS)
        raise ValueError(f"model_args may not hold {_shown(key)}, only {', '.join(known)}")


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{what} is not a mapping: {_shown(value)}")
    return dict(value)


def _whole(value: Any, what: str, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{what} is not a whole number from {least} to {most}: {_shown(value)}")
    return value


def _number(value: Any, what: str, least: float, most: float) -> float:
    # NaN fails the comparison, too
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{what} is not a number from {least:g} to {most:g}: {_shown(value)}")
    return float(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def create(config: Mapping[str, Any], classes: int) -> Any:
    """Build the timm model of a config, with random weights.

    Args:
        config: Result of ``read_model_config``.
        classes: Number of classes; 0 for no classifier.

    Raises:
        TypeError, ValueError, ...: If the arguments are inconsistent (``BUILD_ERRORS``).
    """
    saved = dict(config["pretrained_cfg"])
    saved.pop("tag", None)
    if "label_names" in config:
        saved["label_names"] = config["label_names"]
    return timm.create_model(
        config["architecture"],
        num_classes=classes,
        pretrained_cfg_overlay=saved,
        **config["model_args"],
    )


def draw_up(config: Mapping[str, Any], classes: int, tensors: int, weight_bytes: int) -> Any:
    """Build the model of a config on torch's meta device, where it takes no memory.

    A forward pass with an image of its size checks it.

    Args:
        config: Result of ``read_model_config``.
        classes: Number of classes; 0 for no classifier.
        tensors: Number of tensors in the weights file, the maximum depth.
        weight_bytes: Size of the weights file.

    Raises:
        ValueError: If the output has the wrong shape, or the model would take much more memory
            than its weights.
        TypeError, ...: If the arguments are inconsistent (``BUILD_ERRORS``).
    """
    depth = config["model_args"].get("depth") or 0
    if not isinstance(depth, int) or depth > tensors:
        raise ValueError(f"depth {depth} is more than the {tensors} tensors of the weights")
    with torch.device("meta"), torch.no_grad():
        model = create(config, classes).eval()
        found = model(torch.zeros(1, *config["pretrained_cfg"]["input_size"]))
    wanted = classes or int(getattr(model, "head_hidden_size", model.num_features))
    if not isinstance(found, torch.Tensor) or found.shape != (1, wanted):
        raise ValueError(f"the model does not give {wanted} numbers for each image")
    held = [*model.parameters(), *model.buffers()]
    taken = sum(math.prod(one.shape) * one.element_size() for one in held)
    if taken > _BESIDE + _TIMES * weight_bytes:
        raise ValueError(f"the model would take {taken} bytes, and its weights {weight_bytes}")
    return model
