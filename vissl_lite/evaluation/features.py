"""Features of many images, from a frozen encoder."""

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from vissl_lite.encoders.encoder import Encoder
from vissl_lite.inference import predict_images


def extract(
    encoder: Encoder,
    paths: Sequence[str],
    layers: bool = False,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Features of images.

    Args:
        encoder: Encoder to use.
        paths: Image files.
        layers: Give the mean-pooled maps of every stage too.
        progress: Called with the number of images done since the last call.

    Returns:
        ``(N, D)`` float32 features by layer: ``last`` is the encoder's output; and ``(N,)`` bool:
        which images could be read; features are of those only.
    """
    names = ["last", *(encoder.stage_names() if layers else [])]

    def compute(images: Tensor) -> list[Tensor]:
        last = encoder(images)
        if not layers:
            return [last]
        return [last, *(stage.float().mean(dim=(2, 3)) for stage in encoder.stages(images))]

    outputs, good = predict_images(encoder, compute, encoder, paths, progress)
    return {name: out.numpy() for name, out in zip(names, outputs, strict=True)}, good
