"""``vissl-lite export``: write an encoder or a model as a file that runs without vissl_lite."""

import importlib.util
import json
import logging
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import timm
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from vissl_lite import __version__
from vissl_lite.data.atomic_file import check_place
from vissl_lite.data.images import BROKEN_IMAGE, find_images
from vissl_lite.data.reading import MAX_PIXELS, limit_pixels, slice_along
from vissl_lite.encoders.config import ENCODER_CONFIG, read_model_config
from vissl_lite.encoders.encoder import first_line
from vissl_lite.encoders.folder import WEIGHTS, save_encoder
from vissl_lite.errors import UserError, check_image_size
from vissl_lite.options import Options, Paths, StrPath, command, path_list
from vissl_lite.run import console
from vissl_lite.transfer.exporting import ExportModel, Normalization, export_encoder
from vissl_lite.transfer.tasks import find_model

# Largest accepted difference from torch's outputs, relative to the largest output.
TOLERANCE = 1e-3

# ONNX operator set: supported by the runtimes in use, and native to every version of the exporter.
OPSET = 18

NUM_CHECK_IMAGES = 4  # run as a batch of one and a batch of three


@dataclass(frozen=True)
class ExportResult:
    """Result of an export.

    Attributes:
        path: ONNX file, or folder in timm's format.
        task: ``encoder``, ``classification``, ``detection`` or ``segmentation``.
        difference: Largest difference from torch's outputs, relative to the largest output.
    """

    path: Path
    task: str
    difference: float


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    """Options of ``export``."""

    out: StrPath
    """File to write (FILE.onnx), or for safetensors a folder, which timm.create_model can load."""
    encoder: StrPath | None = None
    """A run, an encoder folder, timm:NAME (pre-trained weights) or random:NAME (untrained)."""
    model: StrPath | None = None
    """A run of finetune, or the model folder in it. Use instead of --encoder."""
    format: Literal["onnx", "safetensors"] = "onnx"
    """Format: onnx, or safetensors (a folder in timm's format)."""
    image_size: int | None = None
    """Side length in pixels of the input of an ONNX file. Default: that of the encoder or model."""
    check_data: Paths | None = None
    """Folders of images, or .txt files of paths, on which to compare the exported model with torch.
    Default: synthetic images."""
    max_pixels: int = MAX_PIXELS
    """Skip images of --check_data with more pixels (height times width) than this; a small file can
    decode to billions of pixels. The default is Pillow's limit."""
    overwrite: bool = False
    """Replace an existing export in --out."""


@command(ExportOptions)
def export(options: ExportOptions) -> ExportResult:
    """Export an encoder or a fine-tuned model for use without vissl_lite, and check the outputs.

    An ONNX file takes decoded RGB images, (B, 3, H, W) uint8, or bands in the units of the files,
    (B, C, H, W) float32, with NaN for missing data, and normalizes them itself. Encoders return
    features, classifiers and segmenters probabilities. Detectors return boxes (x1, y1, x2, y2 in
    pixels), scores and labels, best first, padded with zeros to N per image: 100, or up to 1,000
    where training images had more than 50 boxes. mask_rcnn also returns masks, (B, N, 28, 28): the
    probability that each of 28 x 28 equal cells of the box is inside the object.

    Returns:
        What was written, and how far its outputs differ from torch's.

    Raises:
        UserError: An option is invalid; nothing is written then.
        RuntimeError: The outputs differ from torch's; nothing is written then.
    """
    if (options.encoder is None) == (options.model is None):
        raise UserError("give what to export: --encoder or --model, exactly one of them")
    limit_pixels(options.max_pixels)
    check_image_size(options.image_size)
    path = Path(options.out)
    _check_out(path, options.format, options.overwrite)
    if options.format == "onnx":
        _check_packages()
    elif options.image_size is not None:
        raise UserError("--image_size is for --format onnx: a timm folder is copied as it is")
    if options.encoder is not None:
        network = export_encoder(os.fspath(options.encoder), options.image_size)
    else:
        assert options.model is not None
        task, folder = find_model(Path(options.model))
        network = task.export_model(task.load(folder), folder)
    network.layers.eval()
    if options.image_size is not None:
        if network.fixed_size:
            raise UserError(f"--image_size is not for {network.task}: {network.fixed_size}")
        reason = _size_error(network, options.image_size, options.image_size)
        if reason is not None:
            raise UserError(f"--image_size {options.image_size} does not suit the model: {reason}")
        network = replace(network, image_size=(options.image_size, options.image_size))
    images = _images_to_check(options.check_data, network)
    batches = [images[:1], images[1:]]
    with _temporary_folder(path if options.format == "onnx" else path / ENCODER_CONFIG) as draft:
        if options.format == "onnx":
            difference = _make_onnx(network, batches, draft / path.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(draft / path.name, path)
        else:
            difference = _make_timm_folder(network, batches, draft)
            path.mkdir(parents=True, exist_ok=True)
            for name in (WEIGHTS, ENCODER_CONFIG):
                os.replace(draft / name, path / name)
    source = "synthetic" if options.check_data is None else "given"
    for line in (
        f"{path}: {network.task}, images of {_format_size(network.image_size)} pixels",
        f"checked on {NUM_CHECK_IMAGES} {source} images: differs from torch by "
        f"{difference:.1e} of the largest output",
    ):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    return ExportResult(path, network.task, difference)


def _check_out(out: Path, format: str, overwrite: bool) -> None:
    """Raise a UserError if ``out`` must not be written. Changes nothing."""
    if format == "onnx":
        if out.suffix.lower() != ".onnx" or out.is_dir():
            raise UserError(f"--out {out} is not an ONNX file: give a name that ends in .onnx")
        if out.exists() and not overwrite:
            raise UserError(f"{out} exists: give a new file, or --overwrite")
    else:
        if out.is_file() or out.suffix.lower() in (".onnx", ".safetensors"):
            raise UserError(f"--out {out} is a file: for safetensors give a folder")
        inside = {entry.name for entry in out.iterdir()} if out.is_dir() else set()
        if inside - {ENCODER_CONFIG, WEIGHTS}:
            raise UserError(f"{out} holds other files: give a new folder with --out")
        if inside and not overwrite:
            raise UserError(f"{out} holds an encoder or a model: give a new folder, or --overwrite")
    check_place(out)


def _check_packages() -> None:
    needed = ("onnx", "onnxscript", "onnxruntime")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"--format onnx needs {', '.join(missing)}: pip install 'vissl-lite[export]'"
        )


def _size_error(network: ExportModel, height: int, width: int) -> str | None:
    """Reason why a network can't process images of this size; None if it can."""
    try:
        _outputs(network.layers, [network.blank(1, height, width)])
    except (AssertionError, RuntimeError, ValueError) as error:
        return first_line(error)
    return None


def _format_size(size: tuple[int, int]) -> str:
    """Format height and width as ``224`` or ``256 x 320``."""
    return str(size[0]) if size[0] == size[1] else f"{size[0]} x {size[1]}"


def _images_to_check(sources: Paths | None, network: ExportModel) -> Tensor:
    """``(NUM_CHECK_IMAGES, C, H, W)``: the first readable images, or synthetic ones."""
    size, reader = network.image_size, network.reader
    if sources is None:
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(NUM_CHECK_IMAGES, reader.channels, 6, 6, generator=generator)
        smooth = F.interpolate(coarse, size, mode="bicubic").clamp(0, 1) * reader.max_value
        made = smooth.permute(0, 2, 3, 1).numpy().astype(reader.dtype)
        return torch.from_numpy(reader.to_units(made)).permute(0, 3, 1, 2)
    slice_along(reader.axis)
    paths = find_images(path_list(sources))
    good: list[np.ndarray] = []
    for path in paths:
        with suppress(*BROKEN_IMAGE):
            image = network.prepare(reader.read(path), size)
            good.append(reader.to_units(image))
        if len(good) == NUM_CHECK_IMAGES:
            break
    if not good:
        raise UserError(f"none of {len(paths)} images can be read, the first {paths[0]}")
    return torch.from_numpy(np.stack((good * NUM_CHECK_IMAGES)[:NUM_CHECK_IMAGES])).permute(
        0, 3, 1, 2
    )


@contextmanager
def _temporary_folder(out: Path) -> Iterator[Path]:
    """Temporary folder on the same disk as the file ``out``, removed afterwards."""
    existing = next(parent for parent in out.absolute().parents if parent.exists())
    with TemporaryDirectory(prefix=".vissl-lite-", dir=existing) as folder:
        yield Path(folder)


def _outputs(layers: nn.Module, batches: Sequence[Tensor]) -> list[Tensor]:
    """All outputs for all batches, in order."""
    with torch.no_grad():
        outputs = [layers(batch) for batch in batches]
    return [one for out in outputs for one in (out if isinstance(out, tuple) else (out,))]


def _finite_outputs(layers: nn.Module, batches: Sequence[Tensor]) -> list[Tensor]:
    """Torch's outputs for all batches; raise a UserError if they are not finite.

    Checked before another runtime is tried: some runtimes crash on boxes that are NaN.
    """
    outputs = _outputs(layers, batches)
    if not all(one.isfinite().all() for one in outputs):
        raise UserError(
            "the outputs are not finite numbers: the training has diverged; train again with a "
            "lower --lr or a longer --warmup"
        )
    return outputs


def _compare(expected: Sequence[Tensor], found: Sequence[Tensor], what: str) -> float:
    """Largest difference, relative to the largest expected value of the same output.

    Raises:
        RuntimeError: The difference is larger than ``TOLERANCE``.
    """
    difference = max(
        float((one - two).abs().max() / one.abs().max().float().clamp_min(1e-12))
        if one.shape == two.shape
        else math.inf
        for one, two in zip(expected, found, strict=True)
    )
    if not difference <= TOLERANCE:  # written so that NaN fails too
        raise RuntimeError(
            f"{what} differs from torch by {difference:.2g} of the largest output, which is more "
            f"than {TOLERANCE}: nothing was written"
        )
    return difference


def _make_timm_folder(network: ExportModel, batches: list[Tensor], draft: Path) -> float:
    """Copy a network's folder in timm's format and load the copy with timm alone.

    Of a folder of the hub with a classifier only the encoder is written.
    """
    folder = network.timm_folder
    if folder is None and network.task == "encoder":
        raise UserError(
            "--format safetensors copies an encoder folder, and timm:NAME and random:NAME have "
            "none: timm builds them by name"
        )
    if folder is None:
        raise UserError(
            f"--format safetensors is for encoders and classifiers; the folder encoder of a model "
            f"for {network.task} is already in timm's format"
        )
    normalize, _, last = network.layers
    assert isinstance(normalize, Normalization)
    config = read_model_config(folder / ENCODER_CONFIG)
    if network.task == "encoder" and config["num_classes"] and "label_names" not in config:
        # --model would not take it, as its classes have no names
        save_encoder(normalize.encoder, draft, {})
    else:
        shutil.copyfile(folder / WEIGHTS, draft / WEIGHTS)
        # Only the checked entries: timm would act on any others.
        del config["reader"]  # it is in the other entries
        (draft / ENCODER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    loaded = timm.create_model(f"local-dir:{draft}", pretrained=True).eval()
    expected = _finite_outputs(network.layers, batches)
    found = _outputs(nn.Sequential(normalize, loaded, last), batches)
    if found[0].shape != expected[0].shape:
        raise UserError(f"{folder} holds a classifier too: export it with --model")
    return _compare(expected, found, "the folder that timm loads")


def _make_onnx(network: ExportModel, batches: list[Tensor], file: Path) -> float:
    """Write a network as an ONNX file and run it in ONNX Runtime."""
    import onnx
    import onnxruntime

    if sum(p.numel() * p.element_size() for p in network.layers.parameters()) > 2e9:
        raise UserError("the weights take more than 2 GB, the limit of an ONNX file")
    size = network.image_size[0]
    wide = size + size // 2 + 1
    any_size = network.any_size and not _size_error(network, size, wide)
    network = replace(network, any_size=any_size)
    if network.any_size:
        batches = [*batches, batches[0].repeat(1, 1, 1, 2)[..., :wide]]
    expected = _finite_outputs(network.layers, batches)
    program = _trace(network)
    names = {"size": _format_size(network.image_size), "version": __version__}
    onnx.helper.set_model_props(program, {"task": network.task, **network.about, **names})
    resizing = network.preparation.format(size=_format_size(network.image_size))
    if not network.any_size and not network.fixed_size:
        resizing += ", center-cropped to a square"
    program.doc_string = f"images: {network.reader.units()}, {resizing}; normalized by the model"
    onnx.save(program, file)
    onnx.checker.check_model(str(file), full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(str(file), options, ["CPUExecutionProvider"])
    if not isinstance(session.get_inputs()[0].shape[3], str):
        batches = batches[:2]
    found = [
        torch.from_numpy(one) for b in batches for one in session.run(None, {"images": b.numpy()})
    ]
    return _compare(expected[: len(found)], found, "the ONNX file")


def _trace(network: ExportModel) -> Any:
    """Export the network to an ``onnx.ModelProto``, with dynamic sizes if the exporter can.

    Raises:
        UserError: Torch's exporter does not support the model.
    """
    for module in network.layers.modules():
        if hasattr(module, "fused_attn"):  # the exporter fails on some of timm's, as in BEiT
            module.fused_attn = False  # type: ignore[assignment]
    height, width = network.image_size

    def trace(width: int, dynamic: dict[int, str]) -> Any:
        # Two images: torch.export would treat a batch size of one as a constant.
        example = network.blank(2, height, width)
        with _silenced():
            program = torch.onnx.export(
                network.layers,
                (example,),
                dynamo=True,
                verbose=False,
                external_data=False,
                input_names=["images"],
                output_names=list(network.outputs),
                opset_version=OPSET,
                dynamic_shapes=(dynamic,),
                custom_translation_table=network.translations,
            )
        assert program is not None
        return program.model_proto

    attempts: list[Callable[[], Any]] = [lambda: trace(width, {0: "batch"})]
    if network.any_size:  # not square: torch.export would treat equal sides as the same size
        attempts.insert(0, lambda: trace(2 * width, {0: "batch", 2: "height", 3: "width"}))
    for attempt in attempts:
        try:
            return attempt()
        except torch.onnx.OnnxExporterError as error:
            cause = error.__cause__
            reason = first_line(cause if isinstance(cause, Exception) else error)
    raise UserError(f"torch {torch.__version__} can't export this model to ONNX: {reason}")


@contextmanager
def _silenced() -> Iterator[None]:
    """Hide the exporter's developer messages."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
