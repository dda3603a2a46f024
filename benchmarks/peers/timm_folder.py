"""A timm model as a folder in timm's own format, which ``vissl-lite probe`` reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from timm.models import save_for_hf
from torch import Tensor, nn


def save_encoder(
    encoder: nn.Module,
    folder: Path,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Write model.safetensors and config.json as timm's own hub export does."""
    preprocessing = {
        "input_size": (3, image_size, image_size),
        "mean": tuple(mean),
        "std": tuple(std),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    save_for_hf(encoder.eval(), folder, safe_serialization=True, data_config=preprocessing)
    # timm copies what it knows of the published weights; none of it is true of these.
    path = folder / "config.json"
    config = json.loads(path.read_text())
    known = {*preprocessing, "num_classes", "pool_size", "fixed_input_size", "custom_load"}
    known |= {"first_conv", "classifier"}
    config["model_args"].pop("zero_init_last", None)  # how weights start, which these are past
    cfg = config["pretrained_cfg"]
    config["pretrained_cfg"] = {key: cfg[key] for key in cfg if key in known}
    path.write_text(json.dumps(config, indent=2) + "\n")


def load_encoder(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load the weights of a timm model into one without its classifier."""
    head = f"{model.pretrained_cfg['classifier']}."
    model.load_state_dict({k: v for k, v in state.items() if not k.startswith(head)})
