"""Networks for use elsewhere: from decoded images to what one wants to know about them."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from vissl_lite.encoder import Normalize
from vissl_lite.encoder_config import CONFIG
from vissl_lite.encoder_folder import load_encoder
from vissl_lite.transfer.classification.training import load_classifier
from vissl_lite.transfer.detection.export import FixedDetector
from vissl_lite.transfer.detection.training import load_detector
from vissl_lite.transfer.finetuning import find_model
from vissl_lite.transfer.segmentation.training import load_segmenter


@dataclass(frozen=True)
class Network:
    """A model from decoded images to what a user wants to know.

    Attributes:
        layers: how to normalise, the model, and the last step: from ``(B, 3, H, W)`` uint8.
        task: encoder, classification, detection or segmentation.
        outputs: the names of what comes out.
        image_size: height and width in pixels.
        timm_folder: where it stands in timm's format; None where it does not.
        about: more facts for users of the ONNX file, by name.
        any_size: whether images of other sizes mean something to it.
    """

    layers: nn.Sequential
    task: str
    outputs: tuple[str, ...]
    image_size: tuple[int, int]
    timm_folder: Path | None
    about: dict[str, str] = field(default_factory=dict)
    any_size: bool = False


def encoder_network(source: str, image_size: int | None) -> Network:
    """The network of an encoder.

    Args:
        source: see ``load_encoder``.
        image_size: likewise.

    Raises:
        UserError: there is no encoder, or it is damaged.
    """
    encoder = load_encoder(source, image_size)
    # not `encoder` itself, whose care for bf16 on small images the exporter can't follow
    layers = nn.Sequential(Normalize(encoder.mean, encoder.std), encoder.model, nn.Identity())
    places = (Path(source), Path(source) / "encoder")
    folder = next((place for place in places if (place / CONFIG).is_file()), None)
    size = encoder.image_size
    return Network(layers, "encoder", ("features",), (size, size), folder)


def _classification_network(folder: Path) -> Network:
    loaded = load_classifier(folder)
    last = nn.Sigmoid() if loaded.multi_label else nn.Softmax(dim=1)
    layers = nn.Sequential(loaded.normalize, loaded.model, last)
    about = {"classes": json.dumps(loaded.classes), "multi_label": json.dumps(loaded.multi_label)}
    size = loaded.image_size
    return Network(layers, "classification", ("probabilities",), (size, size), folder, about)


def _detection_network(folder: Path) -> Network:
    detector, classes = load_detector(folder)
    normalize = Normalize(detector.encoder.mean, detector.encoder.std)
    layers = nn.Sequential(normalize, FixedDetector(detector), nn.Identity())
    about = {"classes": json.dumps(classes), "threshold": str(detector.threshold)}
    outputs = ("boxes", "scores", "labels")
    return Network(layers, "detection", outputs, detector.canvas, None, about)


def _segmentation_network(folder: Path) -> Network:
    segmenter, classes = load_segmenter(folder)
    encoder = segmenter.encoder
    layers = nn.Sequential(Normalize(encoder.mean, encoder.std), segmenter, nn.Softmax(dim=1))
    about = {"classes": json.dumps(classes)}
    # Windows of attention, as in Swin, over a free size keep the exporter busy without end.
    windows = any(hasattr(module, "window_size") for module in encoder.modules())
    shape = (encoder.image_size, encoder.image_size)
    return Network(layers, "segmentation", ("probabilities",), shape, None, about, not windows)


# By the task of a model: from its folder to its network.
_NETWORKS: dict[str, Callable[[Path], Network]] = {
    "classification": _classification_network,
    "detection": _detection_network,
    "segmentation": _segmentation_network,
}


def model_network(source: str) -> Network:
    """The network of a fine-tuned model.

    Args:
        source: a run of ``finetune``, or the ``model`` folder in it.

    Raises:
        UserError: there is no model, or it is damaged.
    """
    folder, task = find_model(Path(source))
    return _NETWORKS[task](folder)
