"""The first layer of exported models against the reader of images."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from vissl_lite.data.formats import RawImage
from vissl_lite.data.image_reader import BAND_MAX, ImageReader
from vissl_lite.encoders.encoder import build_encoder
from vissl_lite.transfer.exporting import Normalization

NODATA = -9999.0


def make_reader(**given: Any) -> ImageReader:
    values: dict[str, Any] = {
        "bands": (0, 1), "low": (-10.0, 0.0), "high": (10.0, 1000.0), "mean": (0.25, 0.75),
        "std": (0.5, 0.25), "nodata": NODATA,
    }  # fmt: skip
    return ImageReader(**values | given)


def with_gaps() -> np.ndarray:
    """``(32, 32, 2)`` values in and out of range, some of them missing."""
    random = np.random.default_rng(0)
    pixels = random.uniform((-15, -100), (15, 1200), (32, 32, 2)).astype(np.float32)
    for number, gap in enumerate((np.nan, np.inf, -np.inf, NODATA)):
        pixels[number::8, ::3, number % 2] = gap
    return pixels


def test_missing_data_are_the_mean_as_in_training() -> None:
    reader, pixels = make_reader(), with_gaps()
    encoder = build_encoder("test_resnet", 32, reader=reader)
    scaled = reader.scale(RawImage(pixels), "a.tif")
    expected = encoder.normalize(torch.from_numpy(scaled).permute(2, 0, 1)[None])
    found = Normalization(encoder)(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_of_values_that_are_scaled_already_only_nan_is_missing() -> None:
    """Where each image has a range of its own, the value of the files means nothing any more."""
    reader = make_reader(scope="image", low=(), high=(), nodata=0.0)
    encoder = build_encoder("test_resnet", 32, reader=reader)
    images = torch.tensor([0.0, float("nan"), 1.0]).view(1, 1, 1, 3).expand(1, 2, 1, 3)
    found = Normalization(encoder)(images)
    assert found[0, 0, 0].tolist() == pytest.approx([-0.5, 0, 1.5], abs=1 / BAND_MAX)


@pytest.mark.slow
def test_missing_data_in_onnx_runtime(tmp_path: Path) -> None:
    layer = Normalization(build_encoder("test_resnet", 32, reader=make_reader())).eval()
    images = torch.from_numpy(with_gaps()).permute(2, 0, 1)[None].contiguous()
    file = tmp_path / "layer.onnx"
    torch.onnx.export(layer, (images,), file, input_names=["images"], opset_version=18, dynamo=True)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images.numpy()})
    np.testing.assert_allclose(found, layer(images).numpy(), atol=1e-5)
